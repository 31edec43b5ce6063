"Where methods differed from their authors' code, and what broke: each fault by its number, with the right value."
import math

import pytest
import torch
import torch.nn.functional as F

from ltrl_fastai.all import RIDELoss, SADELoss, soft_cross_entropy, soft_labels
from ltrl_fastai.methods.ride import Distilled
from test_vectors import close, load

counts = [50, 20, 7, 1]


def three_experts(dtype=torch.float64):
    "Logits `(B, 3, C)` of two images, and their classes"
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, dtype=dtype)*3, torch.tensor([0, 3])


def softened(logits, targets, similarity, alpha=.99):
    "What the published summary adds: cross-entropy against the soft label instead of the one-hot one"
    soft = soft_labels(targets, similarity, alpha=alpha) - F.one_hot(targets, len(similarity))
    return sum(soft_cross_entropy(z, soft) for z in logits)


def test_fault_26_each_expert_of_sade_is_softened():
    "The published SADE+RL: the loss with soft labels is that without, and the softening of three experts"
    d = load('sade_rl', torch.float64)
    loss = SADELoss(d['cls_num_list']).double()
    views = loss.summary_logits(d['logits'])
    assert len(views) == 3
    close(loss(d['logits'], d['targets']) + softened(views, d['targets'], d['similarity']), d['loss_ltr_ks'], 1e-6)


def test_fault_26_the_mean_alone_is_a_third():
    "Three experts softened one by one are three times the softening of their mean, as it is linear in the logits up to the normaliser"
    z, y = torch.tensor([[[1., 0, 0, 0]]*3], dtype=torch.float64), torch.tensor([0])
    loss, similarity = SADELoss([5, 5, 5, 5]).double(), torch.eye(4, dtype=torch.float64)
    each = softened(loss.summary_logits(z), y, similarity)
    mean = softened([loss.trained_logits(z.mean(1))], y, similarity)
    assert each.item() == pytest.approx(3*mean.item(), rel=1e-6)
    # by hand: 1% of the label moves to softmax((1, 0, 0, 0)) = (0.4754, 0.1749, 0.1749, 0.1749); the right logit is 1 above the others
    assert mean.item() == pytest.approx(.01*(1-math.e/(math.e+3)), rel=1e-5)


def test_fault_26_variants():
    "RIDE softens nothing, distilled or not; SADE distilled its experts; each expert's own prior; logits alone are those that are trained"
    z, y = three_experts()
    assert RIDELoss(counts).summary_logits(z) == [] and Distilled(RIDELoss(counts)).summary_logits((z, z.mean(1))) == []
    loss = SADELoss(counts).double()
    views = loss.summary_logits(z)
    for k, view in enumerate(views): close(F.cross_entropy(view, y, reduction='none'), loss.each(z[:, k], k, y), 1e-12)
    for a, b in zip(Distilled(loss).summary_logits((z, z.mean(1))), views): close(a, b, 0)
    close(torch.stack(loss.summary_logits(z[:, 0])), loss.trained_logits(z[:, 0])[None], 0)
