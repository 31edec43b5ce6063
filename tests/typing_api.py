"User code for a type checker: `mypy` must agree with the asserted types. It is never run."
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback, Learner, nn, vision_learner
from torch import Tensor
from torchvision.models import resnet34
from typing_extensions import assert_type

from ltrl_fastai.all import (
    BalancedSoftmaxLoss, Checkpoint, Diagnosis, KnowledgeReview, LADELoss, LongTailDataLoaders, Method, Recipe,
    ReflectiveLearning, ShotReport, Stage, cifar100_lt, class_centers, class_counts, class_similarity, create_net,
    digits_lt, expert_net, group_accuracy, imbalanced_counts, long_tail_subset, methods, picture_palette,
    project_conflict, recipe, recipes, review_loss, shifted_table, shot_accuracies, soft_labels)


def data(folder: Path) -> LongTailDataLoaders:
    assert_type(imbalanced_counts(500, 100, 100., profile='exp'), list[Any])
    assert_type(cifar100_lt(50, path=folder, tfms=dict(crop=4)), LongTailDataLoaders)
    assert_type(long_tail_subset([(0, 1)], 10, targets=[1]), torch.utils.data.Subset[Any])
    dls = digits_lt(n_max=None or 120, device='cpu')
    assert_type(dls, LongTailDataLoaders)
    assert_type(dls.n_in, int)
    assert_type(dls.class_counts, Tensor)
    return dls


def training(dls: LongTailDataLoaders) -> Learner:
    counts = class_counts(dls)
    assert_type(counts, Tensor)
    for some in (counts, counts.tolist(), np.array([3, 2, 1])): BalancedSoftmaxLoss(some, tau=.5) # any kind of numbers
    learn = Learner(dls, create_net('resnet20', 10, n_in=1), loss_func=LADELoss([3, 2, 1]),
                    metrics=shot_accuracies(counts), cbs=[Diagnosis(), Checkpoint('fit.pt')])
    rl = ReflectiveLearning(kr=dict(tau=4.), ks=True, kc=None, preset='paper')
    assert_type(rl.switch(ks=False), ReflectiveLearning)
    assert_type(rl.is_on('ks'), bool)
    learn.add_cbs([rl, KnowledgeReview(weight=None, store=dict(kind='disk', folder='teachers'))])
    return vision_learner(dls, resnet34, loss_func=BalancedSoftmaxLoss(counts))


def reports(learn: Learner, other: Learner) -> pd.DataFrame:
    a = ShotReport.from_learner(learn, dl=learn.dls.valid, label='a')
    b = ShotReport.from_preds(torch.rand(8, 3), torch.zeros(8), [3, 2, 1], vocab=['a', 'b', 'c'])
    assert_type(a, ShotReport)
    assert_type(a.per_class, list[Any])
    assert_type(group_accuracy(a.hits, a.totals, a.groups['few']), float|None)
    assert_type(shifted_table(a, b), pd.DataFrame)
    assert_type(picture_palette[0], str)
    return a.table(b)


def with_methods(dls: LongTailDataLoaders, net: nn.Module) -> Learner:
    m = methods['ride']
    assert_type(m, Method)
    assert_type(m.stages, int)
    assert_type(m.reported, float|None)
    assert_type(expert_net(net, 3, cosine=False).features(torch.rand(1, 3, 8, 8)), Tensor)
    def again(learn: Learner, counts: Tensor) -> None: pass
    def cbs(counts: Tensor) -> list[Callback]: return []
    stage = Stage('again', again, cbs, epochs=None, lr=None)
    mine = Method('a line', 'a reference', BalancedSoftmaxLoss, later_stages=(stage,))
    return mine.fit(m.learner(dls, net, cbs=ReflectiveLearning()), 30, .1, done=lambda i: None)


def maths(z: Tensor, y: Tensor) -> Tensor:
    centers = class_centers(z, y, 3, previous=None)
    assert_type(class_similarity(centers), Tensor)
    assert_type(project_conflict(z, z), Tensor)
    assert_type(review_loss(z, z, y, tau=2, has_teacher=None), Tensor)
    return soft_labels(y, class_similarity(centers))


def from_the_slides() -> Recipe:
    assert_type(recipe('table1/BSCE+RL/100'), Recipe)
    return recipes['table1/BSCE+RL/100']
