"Where methods differed from their authors' code, and what broke: each fault by its number, with the right value."
import dataclasses
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, DataLoader, DataLoaders, Learner, OptimWrapper, nn
from torch.utils.data import TensorDataset

from ltrl_fastai.all import (BinaryBalancedLoss, ClassBalancedLoss, CosineHead, EvenClasses, MDCSLoss, MeanHead,
                             NCLLoss, PaCoLoss, RampUp,
                             ReflectiveLearning, RIDELoss, SADELoss, ScaledHead, WeightDecay, aggregate_experts,
                             balanced_head, class_balanced, decay_in_gradient,
                             digits_lt, effective_weights, expert_net, features_of, mean_head, methods, ncl_net,
                             queued_net, soft_cross_entropy, soft_labels, unaugmented)
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.methods.balancing import MaxNorm, published_balancing
from ltrl_fastai.methods.ride import Distilled, GatedExperts, GateLoss, assignment, distillation, follow, gates_alone
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


def mdcs_logits(weak, strong, n_experts=3, dtype=torch.float64):
    "Logits `(2, 1, K, C)` of one image, all experts alike"
    return torch.tensor([weak, strong], dtype=dtype)[:, None, None].expand(2, 1, n_experts, len(weak))


def test_fault_23_mean_over_views():
    "Two views that are alike: the loss is the sum of cross-entropies of one view, where it was twice that"
    loss, z, y = MDCSLoss(counts).double(), torch.randn(6, 3, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 3, 1])
    one_view = sum(F.cross_entropy(z[:, k]+loss.shifts[k], y) for k in range(3))
    close(loss(torch.stack([z, z]), y), one_view, 1e-9)
    # by hand: logits of 0, counts (100, 1), class 1: log(1 + 100**lambda) for lambda = -0.5, 1, 2.5
    by_hand = math.log(1+100**-.5) + math.log(1+100) + math.log(1+100**2.5)
    assert MDCSLoss((100, 1)).double()(mdcs_logits((0., 0), (0., 0)),
                                       torch.tensor([1])).item() == pytest.approx(by_hand, rel=1e-6)


def test_fault_23_right_is_what_the_trained_logits_say():
    "n = (100, 1), weak logits (-1, 1), class 1: with 2.5 log n added, class 0 is predicted, so that nothing is taught; expert 1 (-0.5) is right and teaches"
    loss, y = MDCSLoss((100, 1)).double(), torch.tensor([1])
    z = mdcs_logits((-1., 1), (1., -1)).clone().requires_grad_()
    without = MDCSLoss((100, 1), weight=0.).double()
    kl = loss(z, y) - without(z, y)
    shift = -.5*math.log(100)
    p, q = torch.log_softmax(torch.tensor([[-1.+shift, 1], [1+shift, -1]], dtype=torch.float64), 1)
    assert kl.item() == pytest.approx(.6*(p.exp()*(p-q)).sum().item(), rel=1e-6)
    grad, = torch.autograd.grad(kl, z)
    assert grad[1, 0, 0].abs().sum() > 0 and grad[1, 0, 1:].abs().sum() == 0 and grad[0].abs().sum() == 0


def ramps(epochs, ramp_epochs=20):
    "Of each epoch of a fit"
    learn, seen = learner_of('mdcs'), []
    learn.remove_cb(RampUp)
    class Look(Callback):
        def before_batch(self):
            if self.training: seen.append(self.learn.loss_func.ramp)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .01, cbs=[RampUp(ramp_epochs), Look()])
    return seen


def test_fault_23_the_ramp_begins_at_a_twentieth():
    assert ramps(22) == pytest.approx([min(e/20, 1) for e in range(1, 23)])


def test_fault_23_variants():
    "A short fit ramps over its own epochs; no images that are right, no consistency; a mean over the images that are right, expert by expert"
    assert ramps(4) == pytest.approx([.25, .5, .75, 1]) and ramps(3, 1) == [1, 1, 1]
    loss, plain = MDCSLoss(counts).double(), MDCSLoss(counts, weight=0.).double()
    wrong = mdcs_logits((-99., 9, 9, 9), (0., 0, 0, 0))
    close(loss(wrong, torch.tensor([0])), plain(wrong, torch.tensor([0])), 1e-12)
    right = mdcs_logits((99., 0, 0, 0), (0., 0, 0, 0))
    both, y = torch.cat([wrong, right], 1), torch.tensor([0, 0])
    taught = loss(right, y[:1]) - plain(right, y[:1])
    close(loss(both, y) - plain(both, y), taught, 1e-9)
    close(MDCSLoss(counts, reduction='none').double()(both, y).mean(), loss(both, y), 1e-9)
    close(MDCSLoss(counts).float()(both.half(), y), loss(both, y).float(), 1e-3)


def test_fault_24_easy_classes_stay_in():
    "n = (1, 1, 1), z = (2, 0, -9), y = 0, 2 hard: log(1 + exp(-2) + exp(-2)) = 0.240 where it was 0.127"
    z, y = torch.tensor([[[2., 0, -9]]*2], dtype=torch.float64), torch.tensor([0])
    on_all = F.cross_entropy(z[:, 0], y).item()
    as_published = NCLLoss((1, 1, 1), weight=0., hard=2).double()(z, y).item()
    as_in_the_paper = NCLLoss((1, 1, 1), weight=0., hard=2, form='paper').double()(z, y).item()
    assert as_published/2-on_all == pytest.approx(.2395, abs=1e-4)
    assert as_in_the_paper/2-on_all == pytest.approx(.1269, abs=1e-4)


def ncl_by_definition(z, y, n, n_hard, weight=.6):
    "One class at a time: hard classes by the first net, others multiplied by 0, divergence of every pair"
    total = 0.
    for image, target in zip(z, y.tolist()):
        order = sorted((c for c in range(len(n)) if c != target), key=lambda c: -image[0, c].item())
        hard = [target, *order[:n_hard-1]]
        adjusted = [[v.item()+math.log(m) for v, m in zip(net, n)] for net in image]
        masked = [[v if c in hard else 0. for c, v in enumerate(net)] for net in adjusted]
        for nets in (adjusted, masked):
            logp = [[v-math.log(sum(math.exp(o) for o in net)) for v in net] for net in nets]
            total -= sum(net[target] for net in logp)
            for k, own in enumerate(logp):
                for j, other in enumerate(logp):
                    if j != k: total += weight/(len(nets)-1)*sum(math.exp(a)*(a-b) for a, b in zip(other, own))
    return total/len(y)


@pytest.mark.parametrize('n_hard', [2, 3, 4])
@pytest.mark.parametrize('nets', [2, 3])
def test_fault_24_hard_classes_are_those_of_the_first_net(n_hard, nets):
    torch.manual_seed(n_hard)
    z, y = torch.randn(5, nets, 4, dtype=torch.float64)*3, torch.tensor([0, 1, 2, 3, 0])
    assert NCLLoss(counts, hard=n_hard).double()(z,
                                                 y).item() == pytest.approx(ncl_by_definition(z, y, counts, n_hard),
                                                     rel=1e-6)


def test_fault_24_teachers_learn_too():
    "The gradient of a pair's divergence reaches both nets: all of the loss is differentiated; the paper's form keeps it from the teacher"
    torch.manual_seed(0)
    z, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.tensor([0, 1, 3])
    loss = NCLLoss(counts, hard=3).double()
    assert torch.autograd.gradcheck(lambda o: loss(o, y), z.clone().requires_grad_())
    assert not torch.autograd.gradcheck(lambda o: NCLLoss(counts, hard=3, form='paper').double()(o, y),
                                        z.clone().requires_grad_(), raise_exception=False)


def test_fault_24_a_share_of_the_classes():
    "30% as in its authors' settings: 30 of CIFAR-100, 300 of ImageNet-LT, 2,442 of iNaturalist 2018; a number is a number"
    assert [NCLLoss(torch.ones(c)).n_hard for c in (100, 1000, 8142)] == [30, 300, 2442]
    assert NCLLoss(torch.ones(365), hard=122).n_hard == 122
    assert NCLLoss(torch.ones(3)).n_hard == 2
    assert NCLLoss(torch.ones(10), hard=.5).n_hard == 5
    for hard in (1, 0, -.3, 1.5, math.nan):
        with pytest.raises(ValueError, match='hard: expected'): NCLLoss(counts, hard=hard)
    with pytest.raises(ValueError, match="form: expected 'code' or 'paper'"): NCLLoss(counts, form='slides')


def test_fault_24_cosine_heads():
    "On ImageNet-LT and iNaturalist, with scales of 16 and 32; linear ones on CIFAR"
    for kwargs, scale in ((dict(cosine=True), 16.), (dict(cosine=True, scale=32.), 32.)):
        heads = ncl_net(create_net('resnet8', 10, n_in=1), **kwargs).heads.heads
        assert len(heads) == 3 and all(isinstance(o, CosineHead) and o.scale == scale for o in heads)
    assert all(isinstance(o, nn.Linear) for o in ncl_net(create_net('resnet8', 10, n_in=1)).heads.heads)


def test_fault_24_variants():
    "All classes hard: twice the loss on all; in half precision and with large logits it stays finite; counts shift only what is hard"
    z, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    whole = NCLLoss(counts, hard=4, weight=0.).double()
    close(whole(z, y), 2*sum(F.cross_entropy(z[:, k]+whole.log_counts, y) for k in range(3)), 1e-9)
    big = (torch.randn(4, 3, 4)*1e4).requires_grad_()
    NCLLoss(counts, hard=2)(big, y).backward()
    assert big.grad.isfinite().all() and NCLLoss(counts, hard=2)(z.half(), y).isfinite()
    # class 2 is easy: its count changes the loss on all classes, not that on hard ones
    easy, only = torch.tensor([[[5., 0, -9]]*2]), torch.tensor([0])
    a, b = (NCLLoss(n, weight=0., hard=2)(easy, only) - 2*F.cross_entropy(easy[:, 0]+torch.tensor(n).log(), only)
            for n in ((4., 2, 1), (4., 2, 9)))
    close(a, b, 1e-5)


def test_fault_22_the_loss_of_the_second_stage():
    "Class-weighted binary cross-entropy of the softmax, a mean over images and classes: PyTorch's own; at 100 classes it is 60 times smaller, in nearly the same direction"
    torch.manual_seed(0)
    n = torch.tensor([int(500*.01**(c/99)) for c in range(100)])
    z, y = (torch.randn(64, 100, dtype=torch.float64)).requires_grad_(), torch.randint(0, 100, (64,))
    loss, w = BinaryBalancedLoss(n).double()(z, y), effective_weights(n).double()
    close(loss, F.binary_cross_entropy(z.softmax(1), F.one_hot(y, 100).double(),
                                       weight=w[y][:, None].expand(-1, 100)), 1e-6)
    usual = F.cross_entropy(z, y, weight=w)
    assert 50 < (usual/loss).item() < 100
    a, b = (torch.autograd.grad(o, z)[0].flatten() for o in (loss, usual))
    assert F.cosine_similarity(a, b, dim=0) > .999
    # by hand: logits of 0, 100 classes of one size: (log 100 - 99 log 0.99)/100
    flat = BinaryBalancedLoss(torch.full((100,), 7))(torch.zeros(1, 100), torch.tensor([3]))
    assert flat.item() == pytest.approx((math.log(100)-99*math.log(.99))/100, rel=1e-5)


def decayed(cbs, opt_func, steps=40, bias=True, **kwargs):
    "A linear layer after steps without a gradient of its own, from 1"
    layer = nn.Linear(2, 2, bias=bias)
    with torch.no_grad():
        for p in layer.parameters(): p.fill_(1.)
    x = TensorDataset(torch.zeros(steps, 2), torch.zeros(steps, 2))
    dls = DataLoaders(DataLoader(x, bs=1), DataLoader(x, bs=1))
    learn = Learner(dls, layer, loss_func=lambda p, y: p.sum()*0, opt_func=opt_func, cbs=cbs, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    return learn


@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), partial(SGD, mom=.9, decouple_wd=False)],
                         ids=['decoupled', 'in the gradient'])
def test_fault_22_decay_in_the_gradient(opt_func):
    "As PyTorch's SGD with momentum 0.9 decays, of weight and bias, whatever the learner's optimizer does by itself"
    p = torch.ones(1, requires_grad=True)
    opt = torch.optim.SGD([p], lr=.01, momentum=.9, weight_decay=.1)
    for _ in range(40):
        p.grad = torch.zeros(1)
        opt.step()
    learn = decayed(WeightDecay(.1, in_gradient=True), opt_func)
    for o in learn.model.parameters(): close(o.detach(), p.detach().expand_as(o), 1e-5)
    assert learn.opt.cbs[0] is opt_func([p], lr=.1).cbs[0], 'the optimizer is as it was'


def test_fault_22_the_stage_has_both():
    "The authors' by its name; by default the usual class-balanced loss and the decay of the optimizer"
    m = dataclasses.replace(methods['weight-balancing'], then=(published_balancing,))
    learn, seen = learner_of('weight-balancing'), []
    class Look(Callback):
        order = 9
        def before_step(self):
            seen.append((type(self.learn.loss_func), self.learn.opt.cbs[0], self.learn.opt.hypers[0]['wd']))
    with learn.no_bar(), learn.no_logging(): m.fit(learn, 1, .01, cbs=lambda i: [Look()] if i else [])
    assert len(seen) == 1 and seen[0][0] is BinaryBalancedLoss and seen[0][1] is decay_in_gradient and seen[0][2] == .1
    class_balanced(learn, counts=torch.ones(10))
    assert type(learn.loss_func) is ClassBalancedLoss
    cuts = [o.every_epoch for o in published_balancing.cbs([3, 2, 1]) if isinstance(o, MaxNorm)]
    assert cuts == [True], 'the authors cut once an epoch'
    head, norm, decay = balanced_head(counts, wd=.2, every_epoch=True)
    assert (head.shift_bn, norm.every_epoch, decay.wd_of_fit, decay.in_gradient) == (False, True, .2, False)


def test_fault_22_variants():
    "Large logits, half precision and one class of the batch; decay by itself shrinks weights alone; nothing is left after a crash in a step"
    z = (torch.randn(4, 5)*1e4).requires_grad_()
    loss = BinaryBalancedLoss([9, 5, 3, 2, 1])
    loss(z, torch.tensor([0, 1, 2, 4])).backward()
    assert z.grad.isfinite().all() and loss(z.detach().half(), torch.tensor([0, 1, 2, 4])).isfinite()
    sure = torch.tensor([[20., 0, 0]])  # p rounds to 1 in float32, and the wrong classes' share is still there
    assert BinaryBalancedLoss([1, 1, 1])(sure,
                                         torch.tensor([1])).item() == pytest.approx((20+20-math.log(2))/3, rel=1e-4)
    learn = decayed(WeightDecay(.1), partial(SGD, mom=.9))
    close(learn.model.weight.detach(), torch.full((2, 2), (1-.001)**40), 1e-5)
    assert learn.model.bias.eq(1).all()
    class Fail(Callback):
        order = 9
        def before_step(self): raise KeyError('in a step')
    learn, decay = decayed([], partial(SGD, mom=.9)), WeightDecay(.1, in_gradient=True)
    usual = list(learn.opt.cbs)
    with pytest.raises(KeyError), learn.no_bar(), learn.no_logging():
        learn.fit(1, .01, cbs=[decay, Fail()], reset_opt=False)
    decay.after_crash()  # as `Method.fit` calls it
    assert learn.opt.cbs == usual and learn.opt.hypers[0]['wd'] != .1
    wrapped = decayed(WeightDecay(.1, in_gradient=True), partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
                      bias=False)
    p = decayed(WeightDecay(.1, in_gradient=True), partial(SGD, mom=.9), bias=False)
    close(wrapped.model.weight.detach(), p.model.weight.detach(), 1e-5)


@pytest.mark.parametrize('n_images,bs,lr', [(10000, 128, .1), (50000, 128, .025), (100000, 128, .025), (5000, 128, .1975), (10000, 64, .05032)])
def test_fault_27_rate_of_aggregation(n_images, bs, lr, monkeypatch):
    "The authors' 0.1 on CIFAR's 10,000 test images and 0.025 on ImageNet-LT's 50,000, in batches of 128; between and below by the number of steps"
    seen = []
    class Stop(Exception): pass
    def look(params, lr, momentum):
        seen.append((lr, momentum))
        raise Stop
    learn = learner_of('sade')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    dl = learn.dls.valid
    dl.bs = bs
    dl.get_idxs = lambda: list(range(n_images))
    monkeypatch.setattr(torch.optim, 'SGD', look)
    with pytest.raises(Stop): aggregate_experts(learn, dl)
    with pytest.raises(Stop): aggregate_experts(learn, dl, lr=.2)
    assert seen[0] == (pytest.approx(lr, rel=1e-3), .9) and seen[1][0] == .2


def test_fault_27_gates():
    "A hidden layer of 16 for each gate, one output layer for all, beside the 30 largest logits; trained on even classes at 0.01, in batches of 512 where asked for"
    net = GatedExperts(expert_net(create_net('resnet8', 100)))
    assert [(g.hidden.in_features, g.hidden.out_features, g.out.in_features) for g in net.gates] == [(48, 16, 46)]*2
    assert net.gates[0].out is net.gates[1].out and net.gates[0].hidden is not net.gates[1].hidden
    feats, logits = torch.randn(3, 48), torch.randn(3, 100)
    g = net.gates[1]
    by_hand = torch.cat([F.relu(F.normalize(feats, dim=1) @ g.hidden.weight.T + g.hidden.bias),
                         logits.sort(1, descending=True).values[:, :30]], 1) @ g.out.weight.T + g.out.bias
    close(g(feats, logits), by_hand[:, 0].detach(), 1e-5)
    stage = methods['ride-assigned'].then[0]
    head, even = stage.cbs(counts)
    assert stage.lr == .01 and stage.epochs == 5 and isinstance(even, EvenClasses) and even.bs is None
    assert gates_alone(counts, bs=512)[1].bs == 512


def test_fault_27_loss_of_gates_is_a_mean():
    "Two gates that say 0 of images which need no more experts: log 2, where it was twice that"
    z = torch.tensor([[[9., 0], [9, 0], [9, 0]]])
    assert GateLoss()((z, torch.zeros(1, 2)), torch.tensor([0])).item() == pytest.approx(math.log(2))
    assert GateLoss()((z.flip(2), torch.zeros(1, 2)),
                      torch.tensor([0])).item() == pytest.approx(math.log(2)), 'wrong for good'
    helped = torch.tensor([[[0., 9], [99, 0], [99, 0]]])  # the first gate is to say yes, which weighs 100
    assert GateLoss()((helped, torch.zeros(1, 2)), torch.tensor([0])).item() == pytest.approx(101*math.log(2)/2)


class Sizes(Callback):
    "Of training batches"
    def __init__(self): self.sizes = []
    def before_batch(self):
        if self.training: self.sizes.append(len(self.x))


def test_fault_27_batches_of_the_gates():
    "Batches are as large as asked for, or as there are images; all learn, and only gates"
    for bs, want in ((8, 8), (512, 20), (None, 20)):
        learn, look = learner_of('ride-assigned'), Sizes()
        stage = dataclasses.replace(assignment, cbs=partial(gates_alone, bs=bs))
        m = dataclasses.replace(methods['ride-assigned'], then=(stage,))
        with learn.no_bar(), learn.no_logging(): m.fit(learn, 1, .01, cbs=lambda i, look=look: [look] if i else [])
        assert look.sizes[0] == want and sum(look.sizes) == 20, bs
    fresh = GatedExperts(learn.model.net)
    assert {k for k, _ in fresh.named_parameters() if k.startswith('gates')} == {f'gates.{k}' for k in
        ('0.hidden.weight', '0.hidden.bias', '0.out.weight', '0.out.bias', '1.hidden.weight', '1.hidden.bias')}


def test_fault_27_distillation_as_published():
    "As many times the loss and the divergence of the mean from the teacher as there are experts; ours is the loss once, and each expert's divergence"
    torch.manual_seed(0)
    z, teacher, y = torch.randn(6, 3, 4,
                                dtype=torch.float64)*3, torch.randn(6, 4,
                                                                    dtype=torch.float64)*3, torch.tensor([0, 0, 1, 2,
                                                                        3, 1])
    ride = RIDELoss(counts).double()
    kl = lambda s: 2.25*F.kl_div(F.log_softmax(s/1.5, 1), F.softmax(teacher/1.5, 1), reduction='batchmean')
    close(Distilled(ride, published=True)((z, teacher), y), 3*(ride(z, y)+kl(z.mean(1))), 1e-6)
    close(Distilled(ride)((z, teacher), y), ride(z, y)+sum(kl(z[:, k]) for k in range(3)), 1e-6)
    alike = z[:, :1].expand(-1, 3, -1)
    close(Distilled(ride, published=True)((alike, teacher), y)-Distilled(ride)((alike, teacher), y), 2*ride(alike, y),
          1e-6)
    m = dataclasses.replace(methods['ride-distilled'],
                            then=(dataclasses.replace(distillation, prepare=partial(follow, published=True)),))
    learn = learner_of('ride-distilled')
    with learn.no_bar(), learn.no_logging(): m.fit(learn, 1, .01)
    assert learn.loss_func.published


@pytest.mark.parametrize('name', ['crt', 'lws'])
def test_fault_28_batch_statistics_of_the_second_stage(name):
    "Of the frozen body they go on moving, as in the authors' code; they stand still where asked for; nothing else of the body moves"
    for kwargs, moves in (({}, True), (dict(shift_bn=False), False)):
        stage = methods[name].then[0]
        m = dataclasses.replace(methods[name], then=(dataclasses.replace(stage, cbs=partial(stage.cbs, **kwargs)),))
        learn, kept = learner_of(name), []
        with learn.no_bar(), learn.no_logging():
            m.fit(learn, 2, .01, done=lambda i, kept=kept, learn=learn: kept.append(deepcopy(learn.model.state_dict())))
        body = [k for k in kept[0] if not k.startswith('fc')]
        changed = {k.rpartition('.')[2] for k in body if not kept[0][k].equal(kept[1][k])}
        assert changed == ({'running_mean', 'running_var', 'num_batches_tracked'} if moves else set())


def test_fault_28_scales_multiply_the_bias():
    "Logits times a scale for each class, bias included; without a bias; and the scales alone learn"
    for bias in (True, False):
        head, x = nn.Linear(4, 3, bias=bias), torch.randn(5, 4)
        scaled = ScaledHead(head)
        with torch.no_grad(): scaled.scale.copy_(torch.tensor([2., 0, -1]))
        close(scaled(x), head(x)*torch.tensor([2., 0, -1]), 1e-6)
    big = ScaledHead(nn.Linear(4, 3)).half()
    assert big(torch.randn(5, 4).half()).dtype == torch.half


def nearest_by_definition(train, y, test, n_classes):
    "Centred by the mean of all training features, each of length one; class means of those; the smallest Euclidean distance"
    mean = train.mean(0)
    unit = lambda f: (f-mean)/(f-mean).norm(dim=1, keepdim=True)
    means = torch.stack([unit(train)[y == c].mean(0) for c in range(n_classes)])
    return torch.cdist(unit(test), means).argmin(1)


def test_fault_28_nearest_class_mean():
    "As in the authors' code ('cl2n', Euclidean): all predictions agree, where the cosine of plain means agreed in 85 to 88% of them; the plain cosine by its name"
    learn = methods['ncm'].learner(digits_lt(device='cpu'), create_net('resnet8', 10, n_in=1))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
    first = deepcopy(learn.model)
    train, y = features_of(learn, unaugmented(learn))
    test, _ = features_of(learn, learn.dls.test)
    want = nearest_by_definition(train, y, test, 10)
    mean_head(learn)
    with learn.no_bar(): assert learn.get_preds(dl=learn.dls.test)[0].argmax(1).equal(want)
    learn.model = first
    mean_head(learn, form='cosine')
    plain = F.normalize(torch.stack([train[y == c].mean(0) for c in range(10)]), dim=1)
    with learn.no_bar(): got = learn.get_preds(dl=learn.dls.test)[0].argmax(1)
    assert got.equal((F.normalize(test, dim=1)@plain.T).argmax(1)) and .5 < (got == want).float().mean() < 1
    with pytest.raises(ValueError, match="form: expected 'cl2n' or 'cosine'"): mean_head(learn, form='l2')


def test_fault_28_nearest_class_mean_variants():
    "A class without an image is never predicted; by hand; saved and loaded, the same"
    means, center = torch.tensor([[1., 0], [0, .5], [9, 9]]), torch.tensor([1., 1])
    head = MeanHead(means, torch.tensor([True, True, False]), center=center)
    x = torch.tensor([[3., 1], [1, 4], [1.8, 1.6]])  # less the centre, of length one: (1, 0), (0, 1), (0.8, 0.6)
    close(head(x)[:, :2], -15*torch.tensor([[0., 1.25], [2, .25], [.4, .65]])+15, 1e-4)
    assert head(x).argmax(1).tolist() == [0, 1, 0]
    other = MeanHead(torch.zeros(3, 2), torch.tensor([True]*3), center=torch.zeros(2))
    other.load_state_dict(head.state_dict())
    close(other(x), head(x), 0)


def test_fault_28_queue_and_dimensions_of_paco():
    "32 dimensions on CIFAR, 128 and a queue of 8,192 elsewhere; it begins as random keys of length one, with random labels"
    net = queued_net(create_net('resnet8', 10, n_in=1))
    assert net.queue.shape == (1024, 32) and net.project[-1].out_features == 32
    close(net.queue.norm(dim=1), torch.ones(1024), 1e-5)
    assert set(net.labels.tolist()) == set(range(10)) and abs((net.queue@net.queue.T).fill_diagonal_(0).mean()) < .01
    other = queued_net(create_net('resnet8', 10, n_in=1), dims=128, size=8192)
    assert other.queue.shape == (8192, 128) and not other.queue[:1024, :32].equal(net.queue)


def test_fault_28_queue_variants():
    "The first batch is compared with the random keys; the oldest are replaced; a label that is met counts as positive"
    net = queued_net(create_net('resnet8', 10, n_in=1), size=8)
    queue, labels = net.queue.clone(), net.labels.clone()
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    out = net.train()(x, x)
    assert out[3].equal(queue) and out[4].equal(labels)
    net.enqueue(out[2], y)
    assert net.queue[4:].equal(queue[4:]) and net.labels.tolist() == [0, 1, 2, 3, *labels[4:].tolist()]
    loss = PaCoLoss(torch.ones(10), alpha=1., temperature=1.)
    logits, q = torch.zeros(1, 10), torch.tensor([[1., 0]])
    of = lambda label: loss((logits, q, q, q, torch.tensor([label])), torch.tensor([0])).item()
    row = [math.log(.1)]*10+[1., 1]  # centres, key, queue; the query itself is out
    lse = math.log(sum(math.exp(o) for o in row))
    assert of(0) == pytest.approx(lse-(math.log(.1)+2)/3, rel=1e-5)
    assert of(1) == pytest.approx(lse-(math.log(.1)+1)/2, rel=1e-5)


def balanced_by_pytorch(feats, targets, batches, head, n, lr=.01, wd=.1, beta=.9999):
    "The authors' second stage by PyTorch alone: binary cross-entropy, decay of weight and bias, a cut after the epoch"
    weights = (1-beta)/(1-torch.tensor([beta]).double()**torch.tensor(n))
    weights = (weights/weights.sum()*len(n)).to(feats)
    lengths = head.weight.detach().norm(dim=1)
    radius = lengths.min()+.1*(lengths.max()-lengths.min())
    opt = torch.optim.SGD(head.parameters(), lr=lr, momentum=.9, weight_decay=wd)
    for i, ids in enumerate(batches):
        for group in opt.param_groups: group['lr'] = lr*(1+math.cos(math.pi*i/len(batches)))/2
        p, onehot = head(feats[ids]).softmax(1), F.one_hot(targets[ids], len(n)).to(feats)
        loss = F.binary_cross_entropy(p, onehot, weight=weights[targets[ids]][:, None].expand_as(p))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        lengths = head.weight.norm(dim=1, keepdim=True)
        head.weight.mul_((radius/lengths).clamp(max=1))
    return head


def test_fault_22_a_whole_stage_by_pytorch_alone():
    "Variant: three batches of the published stage on a linear net end where PyTorch's own parts end, weight and bias"
    torch.manual_seed(0)
    feats, targets = torch.randn(24, 6), torch.arange(24) % 4
    dl = DataLoader(TensorDataset(feats, targets), bs=8)
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 4))
    learn = Learner(DataLoaders(dl, dl), net, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .5)
    want = balanced_by_pytorch(feats, targets, torch.arange(24).split(8), deepcopy(net[1]), counts)
    assert (published_balancing.epochs, published_balancing.lr) == (10, .01)
    one_epoch = dataclasses.replace(published_balancing, epochs=1)
    m = dataclasses.replace(methods['weight-balancing'], then=(one_epoch,))
    learn.class_counts = counts
    with learn.no_bar(), learn.no_logging(): m.fit(learn, 1, .01, first=lambda *_: None)
    close(net[1].weight, want.weight, 1e-5)
    close(net[1].bias, want.bias, 1e-5)


def mdcs_by_definition(z, y, n, lambdas, weight=.6):
    "One image and one expert at a time"
    weak, strong = [[[[v.item()+lam*math.log(m) for v, m in zip(expert, n)] for lam, expert in zip(lambdas, image)]
                     for image in view] for view in z]
    logp = lambda net: [v-math.log(sum(math.exp(o) for o in net)) for v in net]
    entropy = -sum(logp(view[i][k])[t] for view in (weak, strong) for i, t in enumerate(y) for k in range(len(lambdas)))
    taught = 0.
    for k in range(len(lambdas)):
        right = [i for i, t in enumerate(y) if max(range(len(n)), key=weak[i][k].__getitem__) == t]
        pairs = [(logp(weak[i][k]), logp(strong[i][k])) for i in right]
        taught += sum(math.exp(a)*(a-b) for p, q in pairs for a, b in zip(p, q))/max(1, len(right))
    return entropy/2/len(y)+weight*taught


@pytest.mark.parametrize('lambdas', [(-.5, 1, 2.5), (0., 1, 2, 3), (1., -1)])
def test_fault_23_by_definition(lambdas):
    "Variant: other numbers of experts and powers, drawn views, image by image"
    for seed in range(3):
        torch.manual_seed(seed)
        z, y = torch.randn(2, 7, len(lambdas), 4, dtype=torch.float64)*4, torch.randint(0, 4, (7,))
        loss = MDCSLoss(counts, lambdas).double()(z, y).item()
        assert loss == pytest.approx(mdcs_by_definition(z, y.tolist(), counts, lambdas), rel=1e-5)


def test_fault_24_nets_that_agree():
    "Variant: of alike nets no divergence is left; another order of classes, or of teachers, is the same loss"
    torch.manual_seed(0)
    z, y = torch.randn(5, 3, 4, dtype=torch.float64)*3, torch.tensor([0, 1, 2, 3, 0])
    loss = lambda n, **args: NCLLoss(n, hard=2, **args).double()
    alike = z[:, :1].expand(-1, 3, -1)
    close(loss(counts)(alike, y), loss(counts, weight=0.)(alike, y), 1e-9)
    order = torch.tensor([2, 0, 3, 1])
    turned = loss([counts[i] for i in order])(z[..., order], order.argsort()[y])
    close(turned, loss(counts)(z, y), 1e-9)
    close(loss(counts)(z[:, [0, 2, 1]], y), loss(counts)(z, y), 1e-9)
    first = loss(counts)(z[:, [1, 0, 2]], y)  # hard classes are those of the first net
    assert abs(first-loss(counts)(z, y)) > 1e-3


def test_fault_27_more_logits_than_classes():
    "Variant: gates that look at 50 logits of 10 classes, or of 60; every image asks a number of experts"
    for n_classes in (10, 60):
        net = GatedExperts(expert_net(create_net('resnet8', n_classes, n_in=1)), top=50)
        assert net.gates[0].out.in_features == 66
        logits, feats = torch.randn(4, n_classes), torch.randn(4, net.gates[0].hidden.in_features)
        best = F.pad(logits.sort(1, descending=True).values[:, :50], (0, max(0, 50-n_classes)))
        seen = torch.cat([F.relu(net.gates[0].hidden(F.normalize(feats, dim=1))), best], 1)
        close(net.gates[0](feats, logits), net.gates[0].out(seen)[:, 0], 1e-5)
        with torch.no_grad(): out = net.eval()(torch.randn(9, 1, 8, 8))
        assert out.shape == (9, n_classes) and net.asked.sum() == 9


def test_fault_28_more_keys_than_the_queue_holds():
    "Variant: the last of them stay; heads keep their scales and statistics when they are saved and loaded"
    net = queued_net(create_net('resnet8', 10, n_in=1), size=8)
    keys = F.normalize(torch.randn(20, 32), dim=1)
    net.enqueue(keys, torch.arange(20) % 10)
    assert net.labels.sort().values.tolist() == sorted((torch.arange(12, 20) % 10).tolist())
    assert {tuple(o) for o in net.queue.tolist()} == {tuple(o) for o in keys[12:].tolist()}
    scaled, other = ScaledHead(nn.Linear(4, 3)), ScaledHead(nn.Linear(4, 3))
    with torch.no_grad(): scaled.scale.mul_(torch.tensor([2., 3, 4]))
    other.load_state_dict(scaled.state_dict())
    x = torch.randn(5, 4)
    close(other(x), scaled(x), 0)
