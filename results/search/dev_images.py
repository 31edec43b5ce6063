"""Gains of Reflective Learning on images that are neither trained on nor in any test set, for choices of its default.

`python results/search/dev_images.py cifar dropout 100,101,102` prints a row of dev_images.json. It needs the data of
the protocol 'frozen', and for `grocery` and `magnetic` a folder of that name in fastai's data folder. `cifar` draws,
for each class of CIFAR-100's training images, 20 for validation and 130 for scoring, and a long tail from 350 down to 3
of the rest. The others draw 15% (at most 40) and 25% (at most 60) of each class of the training and validation folders.
To reproduce a row, check out its commit.
"""
import contextlib
import io
import json
import sys
from functools import partial
from pathlib import Path
import numpy as np
import torch
from fastai.vision.all import L, MixUp, nn, set_seed
from ltrl_fastai.all import ReflectiveLearning, frozen_loaders
from ltrl_fastai.data.benchmarks import LongTailDataLoaders, load_cifar
from ltrl_fastai.data.fast import FeatureTensors, tensor_dataloaders
from ltrl_fastai.data.frozen import Lite0, default_features, frozen_features
from ltrl_fastai.data.imbalance import imbalanced_counts
from ltrl_fastai.methods.catalogue import method_with
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.methods.optimizer import benchmark_sgd


class SmoothedLabels(nn.Module):
    "Label smoothing of 0.1, on the logits that `loss` trains"
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.trained_logits = loss.trained_logits
    def forward(self, logits, targets):
        return nn.functional.cross_entropy(self.trained_logits(logits), targets, label_smoothing=.1)
    def activation(self, logits): return logits.softmax(1)
    def decodes(self, logits): return logits.argmax(1)


settings = {
    'plain': {}, 'dropout': dict(dropout=True), 'smoothing': dict(smoothing=True), 'mixup': dict(mixup=True),
    'tau': dict(constants=dict(tau=1.5)), 'few_epochs': dict(epochs=5), 'decay': dict(wd=5e-3),
    'softmax': dict(method='softmax'), 'lade': dict(method='lade'), 'sade': dict(method='sade'),
    'ldam-drw': dict(method='ldam-drw'),
}


def all_images(bed):
    "Features and classes of all images that may be used"
    if bed=='cifar':
        train,_,_ = load_cifar(100)
        features = frozen_features(train[0], Lite0(), default_features()/'efficientnet-lite0')
        return features,torch.as_tensor(np.array(train[1]))
    dls = frozen_loaders(Path.home()/'.fastai'/'data'/bed, size=128)
    parts = dls.train_ds,dls.valid_ds
    return torch.cat([o.x for o in parts]), torch.cat([torch.as_tensor(o.targets) for o in parts])


def split(bed, seed):
    "Training, validation and scored images, and the number of classes"
    x,y = all_images(bed)
    draw = np.random.default_rng(seed)
    n_classes = int(y.max())+1
    profile = imbalanced_counts(350, n_classes, 100) if bed=='cifar' else None
    parts = [],[],[]
    for c in range(n_classes):
        ids = draw.permutation(np.flatnonzero(y.numpy()==c))
        n = len(ids)
        n_valid,n_scored = (20,130) if profile else (min(40, max(1, round(.15*n))), min(60, max(1, round(.25*n))))
        if n<3: n_valid,n_scored = 0,0
        n_train = profile[c] if profile else n-n_valid-n_scored
        held_out = n_valid+n_scored
        drawn = ids[held_out:][:n_train],ids[:n_valid],ids[n_valid:held_out]
        for part,ids_of_part in zip(parts, drawn): part.extend(ids_of_part)
    vocab = [str(c) for c in range(n_classes)]
    return [FeatureTensors(x[ids], y[ids], vocab) for ids in parts], n_classes


def score(bed, seed, reflective=None, method='bsce', epochs=20, wd=5e-4, dropout=False, mixup=False, smoothing=False,
          constants=None):
    "Class-balanced accuracy in percent"
    (train,valid,scored),n_classes = split(bed, seed)
    set_seed(seed, reproducible=True)
    dls = tensor_dataloaders(train, valid, bs=min(128, len(train)), device='cpu', cls=LongTailDataLoaders,
                             drop_last=len(train)%128==1)
    made = method_with(method, **(constants or {}))
    net = create_net('mlp256', n_classes, n_in=1280)
    if dropout:
        name,head = list(net.named_children())[-1]
        setattr(net, name, nn.Sequential(nn.Dropout(.5), head))
        net = nn.Sequential(nn.Dropout(.3), net)
    cbs = [] if reflective is None else [ReflectiveLearning(**reflective)]
    if mixup: cbs.append(MixUp(.2))
    sgd = partial(benchmark_sgd, nesterov=True, decouple_wd=False)
    counts = torch.bincount(torch.as_tensor(train.targets), minlength=n_classes)
    learn = made.learner(dls, net, counts, cbs, opt_func=sgd, wd=wd, wd_bn_bias=True, moms=(.9,.9,.9), metrics=[])
    if smoothing: learn.loss_func = SmoothedLabels(learn.loss_func)
    def one_cycle(learn, epochs, lr, cbs): learn.fit_one_cycle(epochs, lr, pct_start=min(.25, 5/epochs), cbs=cbs)
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        made.fit(learn, epochs, .1, one_cycle, lambda stage: L(), lambda stage: None)
        probs,targets = learn.get_preds(dl=dls.valid.new(scored))
    right = (probs.argmax(1)==targets).float()
    return 100*float(np.mean([right[targets==c].mean().item() for c in range(n_classes) if (targets==c).any()]))


if __name__=='__main__':
    bed,setting,seeds = sys.argv[1],sys.argv[2],[int(o) for o in sys.argv[3].split(',')]
    reflective = json.loads(sys.argv[4]) if len(sys.argv)>4 else {}
    gains = [score(bed, seed, reflective, **settings[setting])-score(bed, seed, **settings[setting]) for seed in seeds]
    error = np.std(gains, ddof=1)/len(gains)**.5 if len(gains)>1 else float('nan')
    print(f"{bed} {setting} {reflective}: gain {np.mean(gains):+.2f}, standard error {error:.2f}")
