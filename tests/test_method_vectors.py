"Losses of methods against published values (float64 to 1e-6, float32 to 1e-5), and against loops in plain Python."
import math

import pytest
import torch
import torch.nn.functional as F
from test_vectors import close, dtypes, load

from ltrl_fastai.all import (RIDELoss, SADELoss, effective_weights, methods, review_loss, soft_cross_entropy,
    with_reversed_ranks,
                             soft_labels)
from ltrl_fastai.methods.ride import Distilled, GateLoss


@dtypes
@pytest.mark.parametrize('tau', [1, 2])
def test_sade(dtype, tol, tau):
    d = load('baselines', dtype)
    loss = SADELoss(d['cls_num_list'], tau).to(dtype)
    close(loss(d['expert_logits'], d['targets']), d[f'sade_tau{tau}'], 10*tol)  # theirs adds 1e-9 to the prior


@dtypes
def test_mirrored_prior(dtype, tol):
    d = load('baselines', dtype)
    prior = d['cls_num_list'].to(dtype)
    close(with_reversed_ranks(prior/prior.sum()), d['sade_inverse_prior'], tol)


@dtypes
def test_ride(dtype, tol):
    d = load('baselines', dtype)
    n = d['cls_num_list']
    weight = effective_weights(n)  # computed in float32
    close(RIDELoss(n).to(dtype)(d['expert_logits'], d['targets']), d['ride_before_reweight'], 10*tol)
    close(RIDELoss(n, weight=weight).to(dtype)(d['expert_logits'], d['targets']), d['ride_after_reweight'], 10*tol)


@dtypes
def test_sade_with_soft_labels_and_review(dtype, tol):
    "Published: each expert against soft labels, and the review of the mean, divided by the class's count in the batch"
    d = load('sade_rl', dtype)
    logits = d['logits'].clone().requires_grad_()
    loss = SADELoss(d['cls_num_list']).to(dtype)
    soft = soft_labels(d['targets'], d['similarity'], alpha=.99)
    summary = sum(soft_cross_entropy(logits[:, k]+loss.shifts[k], soft) for k in range(3))
    close(summary, d['loss_ltr_ks'], 10*tol)
    close(torch.autograd.grad(summary, logits)[0], d['grad_logits_ltr_ks'], 10*tol)
    mean = loss.logits_of(logits)
    is_right = d['prev_logits'].argmax(1) == d['targets']
    close(is_right.to(dtype), d['cci_mask'].to(dtype), 0)
    review = review_loss(mean/d['batch_class_count'][:, None], d['prev_logits'], d['targets'], tau=2.)
    review = d['kr_weight']*review
    close(review, d['loss_kr'], 10*tol)
    close(torch.autograd.grad(review, logits)[0], d['grad_logits_kr'], 10*tol)


def test_cross_entropy_of_the_mean_logits():
    d = load('baselines', torch.float64)
    close(F.cross_entropy(d['expert_logits'].mean(1), d['targets']), d['ce_on_mean'], 1e-6)


n = [50, 20, 7, 1]
# all classes, one class, a single image of the rarest
batches = [torch.tensor([0, 0, 1, 2, 3, 1]), torch.tensor([2, 2]), torch.tensor([3])]
every_batch = pytest.mark.parametrize('y', batches, ids=len)


def log_softmax(v):
    lse = math.log(sum(math.exp(o) for o in v))
    return [o-lse for o in v]


@every_batch
def test_focal_and_class_balanced_by_a_loop(y):
    "Values in plain Python, gradients by finite differences, extreme logits"
    torch.manual_seed(0)
    z = torch.randn(len(y), 4, dtype=torch.float64)*3
    w = effective_weights(n).double()
    focal, balanced = methods['focal'].loss(n), methods['class-balanced'].loss(n)
    logp = [log_softmax(v)[c] for v, c in zip(z.tolist(), y.tolist())]
    close(focal(z, y), torch.tensor(sum(-(1-math.exp(o))**2*o for o in logp)/len(y)), 1e-5)
    close(balanced(z, y), torch.tensor(sum(-w[c].item()*o for o, c in zip(logp, y))/w[y].sum().item()), 1e-5)
    balanced.func.weight = w  # in float64; fastai's wrapper would make it float32
    for loss in (focal, balanced):
        assert torch.autograd.gradcheck(lambda o, loss=loss: loss.func(o, y), z.clone().requires_grad_())
        extreme = (z.float()*1e4).requires_grad_()
        loss.func.double()(extreme.double(), y).backward()
        assert extreme.grad.isfinite().all()


@every_batch
def test_gates_by_a_loop(y):
    "The label is yes if the mean so far is wrong and a later one right; a yes weighs 100"
    torch.manual_seed(0)
    z = torch.randn(len(y), 3, 4, dtype=torch.float64)*3
    gates = torch.randn(len(y), 2, dtype=torch.float64)
    total = 0.
    for zi, gi, c in zip(z.tolist(), gates.tolist(), y.tolist()):
        means = [[sum(o[j] for o in zi[:k])/k for j in range(4)] for k in (1, 2, 3)]
        is_right = [m.index(max(m)) == c for m in means]
        for k in (0, 1):
            p = 1/(1+math.exp(-gi[k]))
            ask_next = not is_right[k] and any(is_right[k+1:])
            total -= 100*math.log(p) if ask_next else math.log(1-p)
    close(GateLoss()((z, gates), y), torch.tensor(total/len(y)/2), 1e-6)  # the mean over both gates
    assert torch.autograd.gradcheck(lambda o: GateLoss()((z, o), y), gates.clone().requires_grad_())
    assert GateLoss()((z*1e4, gates*1e4), y).isfinite()


@every_batch
def test_distillation_by_a_loop(y):
    "RIDE's loss, plus the divergence of each expert from the teacher at a temperature of 1.5"
    torch.manual_seed(0)
    z = torch.randn(len(y), 3, 4, dtype=torch.float64)*3
    teacher = torch.randn(len(y), 4, dtype=torch.float64)*3
    kl = 0.
    for zi, ti in zip(z.tolist(), teacher.tolist()):
        p = log_softmax([o/1.5 for o in ti])
        for expert in zi:
            q = log_softmax([o/1.5 for o in expert])
            kl += sum(math.exp(a)*(a-b) for a, b in zip(p, q))
    loss = Distilled(RIDELoss(n))
    close(loss((z, teacher), y), loss.loss(z, y)+1.5**2*kl/len(y), 1e-6)
    no_diversity = Distilled(RIDELoss(n, diversity=0.))  # the mean in the diversity term has no gradient on purpose
    assert torch.autograd.gradcheck(lambda o: no_diversity((o, teacher), y), z.clone().requires_grad_())
    extreme = (z*1e4).requires_grad_()
    loss((extreme, teacher*1e4), y).backward()
    assert extreme.grad.isfinite().all()
