"The criteria of SADE and RIDE as published, alone and with Reflective Learning: their outputs in float64 to 1e-6, float32 to 1e-5. Others by loops."
import math

import pytest
import torch
import torch.nn.functional as F
from test_vectors import close, dtypes, load

from ltrl_fastai.all import RIDELoss, SADELoss, effective_weights, methods, mirrored, review_loss, soft_cross_entropy, soft_labels
from ltrl_fastai.methods.ride import Distilled, GateLoss


@dtypes
@pytest.mark.parametrize('tau', [1, 2])
def test_sade(dtype, tol, tau):
    d = load('baselines', dtype)
    # theirs adds 1e-9 to the prior
    close(SADELoss(d['cls_num_list'], tau).to(dtype)(d['expert_logits'], d['targets']), d[f'sade_tau{tau}'], 10*tol)


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


n = [50, 20, 7, 1]
logsoft = lambda v: [o-math.log(sum(math.exp(u) for u in v)) for o in v]
# all classes, one of them, a single image of the rarest
absent = [torch.tensor([0, 0, 1, 2, 3, 1]), torch.tensor([2, 2]), torch.tensor([3])]


@pytest.mark.parametrize('y', absent, ids=len)
def test_focal_and_class_balanced_by_a_loop(y):
    "In plain Python; their gradients by finite differences; logits at the ends"
    torch.manual_seed(0)
    z = torch.randn(len(y), 4, dtype=torch.float64)*3
    w = effective_weights(n).double()
    focal, balanced = methods['focal'].loss(n), methods['class-balanced'].loss(n)
    logp = [logsoft(v)[c] for v, c in zip(z.tolist(), y.tolist())]
    close(focal(z, y), torch.tensor(sum(-(1-math.exp(o))**2*o for o in logp)/len(y)), 1e-5)
    close(balanced(z, y), torch.tensor(sum(-w[c].item()*o for o, c in zip(logp, y))/w[y].sum().item()), 1e-5)
    balanced.func.weight = w  # in float64, past fastai's wrapper, which makes it float32
    for loss in (focal, balanced):
        assert torch.autograd.gradcheck(lambda o, loss=loss: loss.func(o, y), z.clone().requires_grad_())
        big = (z.float()*1e4).requires_grad_()
        loss.func.double()(big.double(), y).backward()
        assert big.grad.isfinite().all()


@pytest.mark.parametrize('y', absent, ids=len)
def test_gates_by_a_loop(y):
    "Is the mean so far wrong, and would one of those to come be right? Yes weighs a hundredfold"
    torch.manual_seed(0)
    z, g = torch.randn(len(y), 3, 4, dtype=torch.float64)*3, torch.randn(len(y), 2, dtype=torch.float64)
    total = 0.
    for zi, gi, c in zip(z.tolist(), g.tolist(), y.tolist()):
        means = [[sum(o[j] for o in zi[:k])/k for j in range(4)] for k in (1, 2, 3)]
        right = [max(range(4), key=lambda j, m=m: m[j]) == c for m in means]
        for k in (0, 1):
            p = 1/(1+math.exp(-gi[k]))
            total -= 100*math.log(p) if not right[k] and any(right[k+1:]) else math.log(1-p)
    close(GateLoss()((z, g), y), torch.tensor(total/len(y)/2), 1e-6)  # a mean over gates
    assert torch.autograd.gradcheck(lambda o: GateLoss()((z, o), y), g.clone().requires_grad_())
    assert GateLoss()((z*1e4, g*1e4), y).isfinite()


@pytest.mark.parametrize('y', absent, ids=len)
def test_distillation_by_a_loop(y):
    "RIDE's loss, and the divergence of each expert from the teacher at a temperature of 1.5"
    torch.manual_seed(0)
    z, teacher = torch.randn(len(y), 3, 4, dtype=torch.float64)*3, torch.randn(len(y), 4, dtype=torch.float64)*3
    kl = 0.
    for zi, ti in zip(z.tolist(), teacher.tolist()):
        p = logsoft([o/1.5 for o in ti])
        kl += sum(math.exp(a)*(a-b) for o in zi for a, b in zip(p, logsoft([u/1.5 for u in o])))
    loss = Distilled(RIDELoss(n))
    close(loss((z, teacher), y), loss.loss(z, y)+1.5**2*kl/len(y), 1e-6)
    plain = Distilled(RIDELoss(n, diversity=0.))  # whose mean has a gradient of none by intention
    assert torch.autograd.gradcheck(lambda o: plain((o, teacher), y), z.clone().requires_grad_())
    big = (z*1e4).requires_grad_()
    loss((big, teacher*1e4), y).backward()
    assert big.grad.isfinite().all()
