"Train until the end or a kill, and report each batch; test_kill.py starts this."
from functools import partial

import torch
from fastai.vision.all import SGD, Callback, Learner, nn, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, ReflectiveLearning, class_counts, digits_lt


class ReportBatches(Callback):
    "Report each batch, which leaves time for a kill between two batches"
    def __init__(self, said): self.said = said
    def after_batch(self):
        if self.training: self.said.send(self.learn.train_iter)


def train(folder, store, said):
    "Train with this store of teachers, a checkpoint after each epoch, and save the weights and losses"
    store = dict(kind='disk', folder=folder) if store == 'disk' else store
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=60)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))
    learn = Learner(dls, net, loss_func=BalancedSoftmaxLoss(class_counts(dls)), opt_func=partial(SGD, mom=.9),
                    cbs=[ReflectiveLearning(kr=dict(store=store), ks=True, kc=dict(every=3)), ReportBatches(said)])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, .05, cbs=Checkpoint(folder/'fit.pt'))
    losses = torch.stack(learn.recorder.losses).as_subclass(torch.Tensor)
    torch.save(dict(model=learn.model.state_dict(), losses=losses), folder/'end.pt')
