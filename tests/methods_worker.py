"Train methods with their own loader, queue or nets in several processes; test_ranks.py starts this."
import os
from functools import partial

import torch
from fastai.basics import SGD, Callback, set_seed
from ltrl_fastai.all import ReflectiveLearning, allow_cpu_ranks, create_net, digits_lt, methods

names = ['paco', 'proco', 'bbn', 'ncl', 'crt', 'mislas', 'class-aware-sampling', 'progressive-sampling']


class Targets(Callback):
    "Records the targets that this rank is trained on, epoch by epoch"
    run_valid = False
    def before_fit(self): self.seen = []
    def before_train(self): self.seen.append([])
    def after_batch(self): self.seen[-1] += self.y.tolist()


def train(name, folder):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu')
    cbs = [ReflectiveLearning(preset='v0.0.1', ks=True, kc=True), Targets()]
    learn = methods[name].learner(dls, create_net('resnet8', 10, n_in=1), opt_func=partial(SGD, mom=.9), cbs=cbs)
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
        methods[name].fit(learn, 2, .02)
    result = dict(state=learn.model.state_dict(), seen=learn.targets.seen)
    torch.save(result, f"{folder}/{name}-{os.environ['RANK']}.pt")


def in_rank(folder):
    "Train all of them in this rank"
    with allow_cpu_ranks():
        for name in names: train(name, folder)
        torch.distributed.destroy_process_group()
