"Where methods differed from their authors' code, and what broke: each fault by its number, with the right value."
import math

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Learner

from ltrl_fastai.all import RIDELoss, ReflectiveLearning, SADELoss, digits_lt, methods, soft_cross_entropy, soft_labels, two_views
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.methods.ride import Distilled
from test_methods import small_digits
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


def learner_of(name, cbs=None):
    "Of a method by name, on twenty digits"
    return methods[name].learner(small_digits(), create_net('resnet8', 10, n_in=1), cbs=cbs)


@pytest.mark.parametrize('name', methods)
def test_fault_20_summary_of_every_method(name):
    "Before the fit and after all stages"
    learn = learner_of(name)
    assert 'Total params' in str(learn.summary())
    with learn.no_bar(), learn.no_logging(): methods[name].fit(learn, 2, .01)
    assert 'Total params' in str(learn.summary())


@pytest.mark.parametrize('name', ['mdcs', 'paco'])
def test_fault_20_the_training_loader_outside_of_training(name):
    "Summary with Reflective Learning; validation, prediction and one batch of the training loader: the first view of each image is predicted, and labels keep their order"
    learn = learner_of(name, ReflectiveLearning())
    assert 'Total params' in str(learn.summary())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, .01)
        assert len(learn.validate(dl=learn.dls.train)) == 1
        batch = learn.dls.train.one_batch()
        preds, targets = learn.get_preds(dl=[batch], reorder=False)
        with torch.no_grad(): want = learn.model.eval()(batch[0][:, 0])
    assert preds.shape == (20, 10) and targets.equal(batch[1].cpu())
    close(preds, F.softmax(want, 1), 1e-5)


def test_fault_20_a_list_of_plain_batches():
    "One view of each image stays as it is, also where there are as many channels as views"
    learn = learner_of('mdcs')
    batch = learn.dls.valid.one_batch()
    with learn.no_bar(), learn.no_logging(): preds, _ = learn.get_preds(dl=[batch], reorder=False)
    with torch.no_grad(): close(preds, F.softmax(learn.model.eval()(batch[0]), 1), 1e-5)
