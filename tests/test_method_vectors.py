"The criteria of SADE and RIDE as published, alone and with Reflective Learning: their outputs in float64 to 1e-6, float32 to 1e-5."
import pytest
import torch
import torch.nn.functional as F
from test_vectors import close, dtypes, load

from ltrl_fastai.all import RIDELoss, SADELoss, effective_weights, mirrored, review_loss, soft_cross_entropy, soft_labels


@dtypes
@pytest.mark.parametrize('tau', [1, 2])
def test_sade(dtype, tol, tau):
    d = load('baselines', dtype)
    close(SADELoss(d['cls_num_list'], tau).to(dtype)(d['expert_logits'], d['targets']), d[f'sade_tau{tau}'], 10*tol)  # theirs adds 1e-9 to the prior


@dtypes
def test_mirrored_prior(dtype, tol):
    d = load('baselines', dtype)
    prior = d['cls_num_list'].to(dtype)
    close(mirrored(prior/prior.sum()), d['sade_inverse_prior'], tol)


@dtypes
def test_ride(dtype, tol):
    d = load('baselines', dtype)
    n = d['cls_num_list']
    weight = effective_weights(n)  # float32 numbers
    close(RIDELoss(n).to(dtype)(d['expert_logits'], d['targets']), d['ride_before_reweight'], 10*tol)
    close(RIDELoss(n, weight=weight).to(dtype)(d['expert_logits'], d['targets']), d['ride_after_reweight'], 10*tol)


@dtypes
def test_sade_with_soft_labels_and_review(dtype, tol):
    "The published whole: each expert against soft labels, and the review of the mean, divided by the number of its class in the batch"
    d = load('sade_rl', dtype)
    logits = d['logits'].clone().requires_grad_()
    loss = SADELoss(d['cls_num_list']).to(dtype)
    soft = soft_labels(d['targets'], d['similarity'], alpha=.99)
    ltr_ks = sum(soft_cross_entropy(logits[:, k]+loss.shifts[k], soft) for k in range(3))
    close(ltr_ks, d['loss_ltr_ks'], 10*tol)
    close(torch.autograd.grad(ltr_ks, logits)[0], d['grad_logits_ltr_ks'], 10*tol)
    mean = loss.logits_of(logits)
    mask = d['prev_logits'].argmax(1) == d['targets']
    close(mask.to(dtype), d['cci_mask'].to(dtype), 0)
    kr = d['kr_weight']*review_loss(mean/d['batch_class_count'][:, None], d['prev_logits'], d['targets'], tau=2.)
    close(kr, d['loss_kr'], 10*tol)
    close(torch.autograd.grad(kr, logits)[0], d['grad_logits_kr'], 10*tol)


def test_one_cross_entropy_is_that_of_a_single_expert():
    d = load('baselines', torch.float64)
    close(F.cross_entropy(d['expert_logits'].mean(1), d['targets']), d['ce_on_mean'], 1e-6)
