"Where methods once differed from their authors' code, and other faults: each by its number, with the right value."
import dataclasses
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, DataLoader, DataLoaders, Learner, OptimWrapper, nn, set_seed
from torch.utils.data import TensorDataset

from ltrl_fastai.all import (BinaryBalancedLoss, ClassBalancedLoss, CosineHead, ClassAwareSampling, MDCSLoss, MeanHead,
                             NCLLoss, PaCoLoss, RampUp, ReflectiveLearning, RIDELoss, SADELoss, ScaledHead,
                             WeightDecay, aggregate_experts, balancing_callbacks, class_balanced,
                             digits_lt, effective_weights, expert_net, features_of, mean_head, methods, ncl_net,
                             queued_net, soft_cross_entropy, soft_labels, unaugmented)
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.methods.balancing import decay_in_gradient, MaxNorm, published_balancing
from ltrl_fastai.methods.ride import Distilled, GatedExperts, GateLoss, assignment, distil, distillation, gate_callbacks
from test_methods import from_scratch, small_digits
from test_vectors import close, load

counts = [50, 20, 7, 1]


def log_softmax(v):
    lse = math.log(sum(math.exp(o) for o in v))
    return [o-lse for o in v]


def three_experts(dtype=torch.float64):
    "Logits `(B, 3, C)` of two images, and their classes"
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, dtype=dtype)*3, torch.tensor([0, 3])


def softening(logits, targets, similarity, alpha=.99):
    "What the published summary adds: cross-entropy against the soft label instead of the one-hot one"
    soft = soft_labels(targets, similarity, alpha=alpha) - F.one_hot(targets, len(similarity))
    return sum(soft_cross_entropy(z, soft) for z in logits)


def test_fault_26_each_expert_of_sade_is_softened():
    "The published SADE+RL loss with soft labels is the loss without them plus the softening of three experts"
    d = load('sade_rl', torch.float64)
    loss = SADELoss(d['cls_num_list']).double()
    logits = loss.summary_logits(d['logits'])
    assert len(logits) == 3
    added = softening(logits, d['targets'], d['similarity'])
    close(loss(d['logits'], d['targets']) + added, d['loss_ltr_ks'], 1e-6)


def test_fault_26_the_mean_alone_is_a_third():
    "For equal experts, the softening of three is three times that of their mean"
    z = torch.tensor([[[1., 0, 0, 0]]*3], dtype=torch.float64)
    y = torch.tensor([0])
    loss = SADELoss([5, 5, 5, 5]).double()
    similarity = torch.eye(4, dtype=torch.float64)
    of_each = softening(loss.summary_logits(z), y, similarity)
    of_mean = softening([loss.trained_logits(z.mean(1))], y, similarity)
    assert of_each.item() == pytest.approx(3*of_mean.item(), rel=1e-6)
    # by hand: 1% of the label moves to softmax((1, 0, 0, 0)) = (0.4754, 0.1749, 0.1749, 0.1749), and the logit of
    # the right class is 1 above the others
    assert of_mean.item() == pytest.approx(.01*(1-math.e/(math.e+3)), rel=1e-5)


def test_fault_26_variants():
    "RIDE softens nothing, distilled or not; SADE softens each expert under its own prior, distilled or not"
    z, y = three_experts()
    assert RIDELoss(counts).summary_logits(z) == []
    assert Distilled(RIDELoss(counts)).summary_logits((z, z.mean(1))) == []
    loss = SADELoss(counts).double()
    logits = loss.summary_logits(z)
    for k, o in enumerate(logits):
        close(F.cross_entropy(o, y, reduction='none'), loss.loss_per_expert(z[:, k], k, y), 1e-12)
    for a, b in zip(Distilled(loss).summary_logits((z, z.mean(1))), logits): close(a, b, 0)
    # plain logits are softened as they are trained
    close(torch.stack(loss.summary_logits(z[:, 0])), loss.trained_logits(z[:, 0])[None], 0)


def learner_of(name, cbs=None):
    "A learner for a method by name, on twenty digits"
    return methods[name].learner(small_digits(), create_net('resnet8', 10, n_in=1), cbs=cbs)


@pytest.mark.parametrize('name', from_scratch)
def test_fault_20_summary_of_every_method(name):
    "Before the fit and after all stages"
    learn = learner_of(name)
    assert 'Total params' in str(learn.summary())
    with learn.no_bar(), learn.no_logging(): methods[name].fit(learn, 2, .01)
    assert 'Total params' in str(learn.summary())


@pytest.mark.parametrize('name', ['mdcs', 'paco', 'proco', 'glmc'])
def test_fault_20_the_training_loader_outside_of_training(name):
    "Summary, validation and prediction of training batches use the first view of each image"
    learn = learner_of(name, ReflectiveLearning())
    assert 'Total params' in str(learn.summary())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, .01)
        assert len(learn.validate(dl=learn.dls.train)) == 1
        batch = learn.dls.train.one_batch()
        preds, targets = learn.get_preds(dl=[batch], reorder=False)
    with torch.no_grad(): expected = learn.model.eval()(batch[0][:, 0])
    assert preds.shape == (20, 10)
    assert targets.equal(batch[1].cpu())
    close(preds, F.softmax(expected, 1), 1e-5)


def test_fault_20_a_list_of_ordinary_batches():
    "Batches with one view stay as they are, even with as many channels as there are views"
    learn = learner_of('mdcs')
    batch = learn.dls.valid.one_batch()
    with learn.no_bar(), learn.no_logging(): preds, _ = learn.get_preds(dl=[batch], reorder=False)
    with torch.no_grad(): close(preds, F.softmax(learn.model.eval()(batch[0]), 1), 1e-5)


def mdcs_logits(weak, strong, n_experts=3, dtype=torch.float64):
    "Logits `(2, 1, K, C)` of one image, the same for all experts"
    return torch.tensor([weak, strong], dtype=dtype)[:, None, None].expand(2, 1, n_experts, len(weak))


def test_fault_23_mean_over_views():
    "With two equal views, the loss is the sum of the experts' cross-entropies for one view; it was twice that"
    loss = MDCSLoss(counts).double()
    z = torch.randn(6, 3, 4, dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 2, 3, 1])
    one_view = sum(F.cross_entropy(z[:, k]+loss.shifts[k], y) for k in range(3))
    close(loss(torch.stack([z, z]), y), one_view, 1e-9)
    # by hand: logits of 0, counts (100, 1), class 1: log(1 + 100**lambda) for lambda = -0.5, 1, 2.5
    by_hand = math.log(1+100**-.5) + math.log(1+100) + math.log(1+100**2.5)
    equal = MDCSLoss((100, 1)).double()(mdcs_logits((0., 0), (0., 0)), torch.tensor([1]))
    assert equal.item() == pytest.approx(by_hand, rel=1e-6)


def test_fault_23_the_trained_logits_decide_what_is_right():
    "n = (100, 1), weak logits (-1, 1), class 1: with log n or 2.5 log n added, class 0 is predicted, and not taught"
    loss = MDCSLoss((100, 1)).double()
    without_kl = MDCSLoss((100, 1), weight=0.).double()
    y = torch.tensor([1])
    z = mdcs_logits((-1., 1), (1., -1)).clone().requires_grad_()
    kl = loss(z, y) - without_kl(z, y)
    # expert 0 (-0.5) is right and teaches its strong view
    shift = -.5*math.log(100)
    p, q = torch.log_softmax(torch.tensor([[-1.+shift, 1], [1+shift, -1]], dtype=torch.float64), 1)
    assert kl.item() == pytest.approx(.6*(p.exp()*(p-q)).sum().item(), rel=1e-6)
    grad, = torch.autograd.grad(kl, z)
    assert grad[1, 0, 0].abs().sum() > 0
    assert grad[1, 0, 1:].abs().sum() == 0
    assert grad[0].abs().sum() == 0


def ramps(epochs, ramp_epochs=20):
    "The loss's `ramp` in each epoch of a fit"
    learn = learner_of('mdcs')
    values = []
    learn.remove_cb(RampUp)
    class RampLog(Callback):
        def before_batch(self):
            if self.training: values.append(self.learn.loss_func.ramp)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .01, cbs=[RampUp(ramp_epochs), RampLog()])
    return values


def test_fault_23_the_ramp_begins_at_a_twentieth():
    assert ramps(22) == pytest.approx([min(e/20, 1) for e in range(1, 23)])


def test_fault_23_a_short_fit_ramps_over_its_own_epochs():
    assert ramps(4) == pytest.approx([.25, .5, .75, 1])
    assert ramps(3, 1) == [1, 1, 1]


def test_fault_23_variants():
    "Consistency is averaged over the images whose weak view is right, and is zero if there are none"
    loss, without_kl = MDCSLoss(counts).double(), MDCSLoss(counts, weight=0.).double()
    wrong = mdcs_logits((-99., 9, 9, 9), (0., 0, 0, 0))
    y = torch.tensor([0, 0])
    close(loss(wrong, y[:1]), without_kl(wrong, y[:1]), 1e-12)
    right = mdcs_logits((99., 0, 0, 0), (0., 0, 0, 0))
    both = torch.cat([wrong, right], 1)
    kl = loss(right, y[:1]) - without_kl(right, y[:1])
    close(loss(both, y) - without_kl(both, y), kl, 1e-9)
    close(MDCSLoss(counts, reduction='none').double()(both, y).mean(), loss(both, y), 1e-9)
    close(MDCSLoss(counts).float()(both.half(), y), loss(both, y).float(), 1e-3)


def test_fault_24_easy_classes_stay_in_the_softmax():
    "n = (1, 1, 1), z = (2, 0, -9), y = 0, 2 hard: log(1 + exp(-2) + exp(-2)) = 0.240; it was 0.127"
    z = torch.tensor([[[2., 0, -9]]*2], dtype=torch.float64)
    y = torch.tensor([0])
    on_all = F.cross_entropy(z[:, 0], y).item()
    of_code = NCLLoss((1, 1, 1), weight=0., hard=2).double()(z, y).item()
    of_paper = NCLLoss((1, 1, 1), weight=0., hard=2, form='paper').double()(z, y).item()
    assert of_code/2-on_all == pytest.approx(.2395, abs=1e-4)
    assert of_paper/2-on_all == pytest.approx(.1269, abs=1e-4)


def ncl_by_definition(z, y, n, n_hard, weight=.6):
    "In plain Python: hard classes of the first net, other logits multiplied by 0, divergence of every pair"
    total = 0.
    for image, target in zip(z, y.tolist()):
        others = sorted((c for c in range(len(n)) if c != target), key=lambda c: -image[0, c].item())
        hard = [target, *others[:n_hard-1]]
        adjusted = [[v.item()+math.log(m) for v, m in zip(net, n)] for net in image]
        masked = [[v if c in hard else 0. for c, v in enumerate(net)] for net in adjusted]
        for nets in (adjusted, masked):
            logp = [log_softmax(net) for net in nets]
            total -= sum(net[target] for net in logp)
            for k, own in enumerate(logp):
                for j, other in enumerate(logp):
                    if j == k: continue
                    total += weight/(len(nets)-1)*sum(math.exp(a)*(a-b) for a, b in zip(other, own))
    return total/len(y)


@pytest.mark.parametrize('n_hard', [2, 3, 4])
@pytest.mark.parametrize('n_nets', [2, 3])
def test_fault_24_hard_classes_are_those_of_the_first_net(n_hard, n_nets):
    torch.manual_seed(n_hard)
    z = torch.randn(5, n_nets, 4, dtype=torch.float64)*3
    y = torch.tensor([0, 1, 2, 3, 0])
    expected = ncl_by_definition(z, y, counts, n_hard)
    assert NCLLoss(counts, hard=n_hard).double()(z, y).item() == pytest.approx(expected, rel=1e-6)


def test_fault_24_teachers_learn_too():
    "The gradient of a pair's divergence reaches both nets; in the paper's form, only the student"
    torch.manual_seed(0)
    z = torch.randn(3, 2, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 3])
    of_code, of_paper = [NCLLoss(counts, hard=3, form=o).double() for o in ('code', 'paper')]
    assert torch.autograd.gradcheck(lambda o: of_code(o, y), z.clone().requires_grad_())
    assert not torch.autograd.gradcheck(lambda o: of_paper(o, y), z.clone().requires_grad_(), raise_exception=False)


def test_fault_24_a_share_of_the_classes():
    "30% as in the authors' settings: 30 on CIFAR-100, 300 on ImageNet-LT, 2,442 on iNaturalist 2018; or a number"
    assert [NCLLoss(torch.ones(c)).n_hard for c in (100, 1000, 8142)] == [30, 300, 2442]
    assert NCLLoss(torch.ones(365), hard=122).n_hard == 122
    assert NCLLoss(torch.ones(3)).n_hard == 2
    assert NCLLoss(torch.ones(10), hard=.5).n_hard == 5
    for hard in (1, 0, -.3, 1.5, math.nan):
        with pytest.raises(ValueError, match='hard: expected'): NCLLoss(counts, hard=hard)
    with pytest.raises(ValueError, match="form: expected 'code' or 'paper'"): NCLLoss(counts, form='slides')


def test_fault_24_cosine_heads():
    "On ImageNet-LT and iNaturalist, with scales of 16 and 32; linear heads on CIFAR"
    for kwargs, scale in ((dict(cosine=True), 16.), (dict(cosine=True, scale=32.), 32.)):
        heads = ncl_net(create_net('resnet8', 10, n_in=1), **kwargs).heads.heads
        assert len(heads) == 3
        assert all(isinstance(o, CosineHead) and o.scale == scale for o in heads)
    assert all(isinstance(o, nn.Linear) for o in ncl_net(create_net('resnet8', 10, n_in=1)).heads.heads)


def test_fault_24_variants():
    "If all classes are hard, twice the loss on all; finite in half precision and for extreme logits"
    z = torch.randn(4, 3, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3])
    all_hard = NCLLoss(counts, hard=4, weight=0.).double()
    close(all_hard(z, y), 2*sum(F.cross_entropy(z[:, k]+all_hard.log_counts, y) for k in range(3)), 1e-9)
    extreme = (torch.randn(4, 3, 4)*1e4).requires_grad_()
    NCLLoss(counts, hard=2)(extreme, y).backward()
    assert extreme.grad.isfinite().all()
    assert NCLLoss(counts, hard=2)(z.half(), y).isfinite()


def test_fault_24_the_count_of_an_easy_class_changes_only_the_loss_on_all():
    z = torch.tensor([[[5., 0, -9]]*2])
    y = torch.tensor([0])

    def on_hard(n):
        on_all = F.cross_entropy(z[:, 0]+torch.tensor(n).log(), y)
        return NCLLoss(n, weight=0., hard=2)(z, y) - 2*on_all
    close(on_hard((4., 2, 1)), on_hard((4., 2, 9)), 1e-5)  # class 2 is easy


def test_fault_22_the_loss_of_the_second_stage():
    "It equals PyTorch's weighted binary cross-entropy; with 100 classes it is some 60 times smaller than cross-entropy"
    torch.manual_seed(0)
    n = torch.tensor([int(500*.01**(c/99)) for c in range(100)])
    z = torch.randn(64, 100, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, 100, (64,))
    w = effective_weights(n).double()
    loss = BinaryBalancedLoss(n).double()(z, y)
    weight = w[y][:, None].expand(-1, 100)
    close(loss, F.binary_cross_entropy(z.softmax(1), F.one_hot(y, 100).double(), weight=weight), 1e-6)
    balanced = F.cross_entropy(z, y, weight=w)
    assert 50 < (balanced/loss).item() < 100
    a, b = [torch.autograd.grad(o, z)[0].flatten() for o in (loss, balanced)]
    assert F.cosine_similarity(a, b, dim=0) > .999
    # by hand: logits of 0, 100 equally large classes: (log 100 - 99 log 0.99)/100
    equal = BinaryBalancedLoss(torch.full((100,), 7))(torch.zeros(1, 100), torch.tensor([3]))
    assert equal.item() == pytest.approx((math.log(100)-99*math.log(.99))/100, rel=1e-5)


def decayed(cbs, opt_func, steps=40, bias=True, **kwargs):
    "The learner of a linear layer that started at 1, after steps of weight decay alone"
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
    "Weight and bias decay as with PyTorch's SGD with momentum, whatever the learner's optimizer does by itself"
    p = torch.ones(1, requires_grad=True)
    opt = torch.optim.SGD([p], lr=.01, momentum=.9, weight_decay=.1)
    for _ in range(40):
        p.grad = torch.zeros(1)
        opt.step()
    learn = decayed(WeightDecay(.1, in_gradient=True), opt_func)
    for o in learn.model.parameters(): close(o.detach(), p.detach().expand_as(o), 1e-5)
    assert learn.opt.cbs[0] is opt_func([p], lr=.1).cbs[0], 'the optimizer is not restored'


def test_fault_22_the_published_stage_has_its_own_loss_and_decay():
    "By default, the second stage has the class-balanced loss and the optimizer's weight decay"
    method = dataclasses.replace(methods['weight-balancing'], later_stages=(published_balancing,))
    learn = learner_of('weight-balancing')
    steps = []
    class StepLog(Callback):
        order = 9
        def before_step(self):
            opt = self.learn.opt
            steps.append((type(self.learn.loss_func), opt.cbs[0], opt.hypers[0]['wd']))
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 1, .01, cbs=lambda i: [StepLog()] if i else [])
    assert steps == [(BinaryBalancedLoss, decay_in_gradient, .1)]
    class_balanced(learn, counts=torch.ones(10))
    assert type(learn.loss_func) is ClassBalancedLoss
    assert [o.every_epoch for o in published_balancing.cbs([3, 2, 1]) if isinstance(o, MaxNorm)] == [True]
    head, norm, decay = balancing_callbacks(counts, wd=.2, every_epoch=True)
    assert (head.shift_bn, norm.every_epoch, decay.wd_of_fit, decay.in_gradient) == (False, True, .2, False)


def test_fault_22_variants_of_the_loss():
    "Finite for extreme logits and in half precision; precise if a probability rounds to 1"
    loss = BinaryBalancedLoss([9, 5, 3, 2, 1])
    z = (torch.randn(4, 5)*1e4).requires_grad_()
    y = torch.tensor([0, 1, 2, 4])
    loss(z, y).backward()
    assert z.grad.isfinite().all()
    assert loss(z.detach().half(), y).isfinite()
    rounded = BinaryBalancedLoss([1, 1, 1])(torch.tensor([[20., 0, 0]]), torch.tensor([1]))
    assert rounded.item() == pytest.approx((20+20-math.log(2))/3, rel=1e-4)


def test_fault_22_decoupled_decay_shrinks_weights_only():
    learn = decayed(WeightDecay(.1), partial(SGD, mom=.9))
    close(learn.model.weight.detach(), torch.full((2, 2), (1-.001)**40), 1e-5)
    assert learn.model.bias.eq(1).all()


def test_fault_22_decay_is_restored_after_a_crash_in_a_step():
    class Fail(Callback):
        order = 9
        def before_step(self): raise KeyError('in a step')
    learn = decayed([], partial(SGD, mom=.9))
    decay = WeightDecay(.1, in_gradient=True)
    before = list(learn.opt.cbs)
    with pytest.raises(KeyError), learn.no_bar(), learn.no_logging():
        learn.fit(1, .01, cbs=[decay, Fail()], reset_opt=False)
    decay.after_crash()  # as `Method.fit` calls it
    assert learn.opt.cbs == before
    assert learn.opt.hypers[0]['wd'] != .1


def test_fault_22_an_optimizer_of_pytorch_decays_by_itself():
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    of_pytorch = decayed(WeightDecay(.1, in_gradient=True), sgd, bias=False)
    of_fastai = decayed(WeightDecay(.1, in_gradient=True), partial(SGD, mom=.9), bias=False)
    close(of_pytorch.model.weight.detach(), of_fastai.model.weight.detach(), 1e-5)


@pytest.mark.parametrize('n_images,bs,lr', [(10000, 128, .1), (50000, 128, .025), (100000, 128, .025),
                                            (5000, 128, .1975), (10000, 64, .05032)])
def test_fault_27_learning_rate_of_aggregation(n_images, bs, lr, monkeypatch):
    "The authors' 0.1 on CIFAR's 10,000 test images and 0.025 on ImageNet-LT's 50,000, or by the number of steps"
    made = []
    class Stop(Exception): pass
    def fake_sgd(params, lr, momentum):
        made.append((lr, momentum))
        raise Stop
    learn = learner_of('sade')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    dl = learn.dls.valid
    dl.bs = bs
    dl.get_idxs = lambda: list(range(n_images))
    monkeypatch.setattr(torch.optim, 'SGD', fake_sgd)
    with pytest.raises(Stop): aggregate_experts(learn, dl)
    with pytest.raises(Stop): aggregate_experts(learn, dl, lr=.2)
    assert made == [(pytest.approx(lr, rel=1e-3), .9), (.2, .9)]


def test_fault_27_gates():
    "16 hidden units for each gate, and one output layer for all, which also gets the 30 largest logits"
    net = GatedExperts(expert_net(create_net('resnet8', 100)))
    assert [(g.hidden.in_features, g.hidden.out_features, g.out.in_features) for g in net.gates] == [(48, 16, 46)]*2
    first, second = net.gates
    assert first.out is second.out
    assert first.hidden is not second.hidden
    feats, logits = torch.randn(3, 48), torch.randn(3, 100)
    hidden = F.relu(F.normalize(feats, dim=1) @ second.hidden.weight.T + second.hidden.bias)
    largest = logits.sort(1, descending=True).values[:, :30]
    by_hand = torch.cat([hidden, largest], 1) @ second.out.weight.T + second.out.bias
    close(second(feats, logits), by_hand[:, 0].detach(), 1e-5)


def test_fault_27_training_of_gates():
    "With class-aware sampling, for 5 epochs at 0.01, in batches of 512 if asked for"
    stage = methods['ride-assigned'].later_stages[0]
    _, sampling = stage.cbs(counts)
    assert (stage.lr, stage.epochs) == (.01, 5)
    assert isinstance(sampling, ClassAwareSampling)
    assert sampling.bs is None
    assert gate_callbacks(counts, bs=512)[1].bs == 512


def test_fault_27_loss_of_gates_is_a_mean():
    "Two gates with a logit of 0 for images that need no more experts: log 2; it was twice that"
    y = torch.tensor([0])
    gates = torch.zeros(1, 2)
    always_right = torch.tensor([[[9., 0], [9, 0], [9, 0]]])
    always_wrong = always_right.flip(2)
    for z in (always_right, always_wrong): assert GateLoss()((z, gates), y).item() == pytest.approx(math.log(2))
    corrected = torch.tensor([[[0., 9], [99, 0], [99, 0]]])  # the first gate's label is yes, which weighs 100
    assert GateLoss()((corrected, gates), y).item() == pytest.approx(101*math.log(2)/2)


class Sizes(Callback):
    "Records the sizes of training batches"
    def __init__(self): self.sizes = []
    def before_batch(self):
        if self.training: self.sizes.append(len(self.x))


@pytest.mark.parametrize('bs,expected', [(8, 8), (512, 20), (None, 20)])
def test_fault_27_batches_of_the_gates(bs, expected):
    "Batches are as large as asked for, but at most the number of images"
    learn = learner_of('ride-assigned')
    log = Sizes()
    stage = dataclasses.replace(assignment, cbs=partial(gate_callbacks, bs=bs))
    method = dataclasses.replace(methods['ride-assigned'], later_stages=(stage,))
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 1, .01, cbs=lambda i: [log] if i else [])
    assert log.sizes[0] == expected
    assert sum(log.sizes) == 20


def test_fault_27_parameters_of_the_gates():
    net = GatedExperts(expert_net(create_net('resnet8', 10, n_in=1)))
    names = {'0.hidden.weight', '0.hidden.bias', '0.out.weight', '0.out.bias', '1.hidden.weight', '1.hidden.bias'}
    assert {k for k, _ in net.named_parameters() if k.startswith('gates')} == {f'gates.{k}' for k in names}


def test_fault_27_distillation_as_published():
    "K times the loss and the mean's divergence from the teacher; by default, the loss and each expert's divergence"
    torch.manual_seed(0)
    z = torch.randn(6, 3, 4, dtype=torch.float64)*3
    teacher = torch.randn(6, 4, dtype=torch.float64)*3
    y = torch.tensor([0, 0, 1, 2, 3, 1])
    ride = RIDELoss(counts).double()
    default, published = Distilled(ride), Distilled(ride, published=True)

    def kl(student):
        p = F.softmax(teacher/1.5, 1)
        return 2.25*F.kl_div(F.log_softmax(student/1.5, 1), p, reduction='batchmean')
    close(published((z, teacher), y), 3*(ride(z, y)+kl(z.mean(1))), 1e-6)
    close(default((z, teacher), y), ride(z, y)+sum(kl(z[:, k]) for k in range(3)), 1e-6)
    equal = z[:, :1].expand(-1, 3, -1)
    close(published((equal, teacher), y)-default((equal, teacher), y), 2*ride(equal, y), 1e-6)
    stage = dataclasses.replace(distillation, prepare=partial(distil, published=True))
    method = dataclasses.replace(methods['ride-distilled'], later_stages=(stage,))
    learn = learner_of('ride-distilled')
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 1, .01)
    assert learn.loss_func.published


@pytest.mark.parametrize('shift_bn', [None, False], ids=['default', 'fixed'])
@pytest.mark.parametrize('name', ['crt', 'lws'])
def test_fault_28_batch_statistics_of_the_second_stage(name, shift_bn):
    "Those of the frozen body are updated as in the authors' code, unless switched off; its weights never change"
    stage = methods[name].later_stages[0]
    cbs = stage.cbs if shift_bn is None else partial(stage.cbs, shift_bn=shift_bn)
    method = dataclasses.replace(methods[name], later_stages=(dataclasses.replace(stage, cbs=cbs),))
    learn = learner_of(name)
    states = []
    def keep(stage): states.append(deepcopy(learn.model.state_dict()))
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 2, .01, done=keep)
    first, second = states
    body = [k for k in first if not k.startswith('fc')]
    changed = {k.rpartition('.')[2] for k in body if not first[k].equal(second[k])}
    assert changed == ({'running_mean', 'running_var', 'num_batches_tracked'} if shift_bn is None else set())


@pytest.mark.parametrize('bias', [True, False])
def test_fault_28_scales_multiply_the_bias(bias):
    head = nn.Linear(4, 3, bias=bias)
    x = torch.randn(5, 4)
    scaled = ScaledHead(head)
    scale = torch.tensor([2., 0, -1])
    with torch.no_grad(): scaled.scale.copy_(scale)
    close(scaled(x), head(x)*scale, 1e-6)
    assert scaled.half()(x.half()).dtype == torch.half


def nearest_by_definition(train, y, test, n_classes):
    "The nearest class mean of centred unit features, by Euclidean distance"
    center = train.mean(0)
    def unit(f): return (f-center)/(f-center).norm(dim=1, keepdim=True)
    means = torch.stack([unit(train)[y == c].mean(0) for c in range(n_classes)])
    return torch.cdist(unit(test), means).argmin(1)


def test_fault_28_nearest_class_mean():
    "With 'cl2n', the authors' code, all predictions agree; with 'cosine', those by the cosine to plain means"
    set_seed(0, reproducible=True)
    learn = methods['ncm'].learner(digits_lt(device='cpu'), create_net('resnet8', 10, n_in=1))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
    after_first_stage = deepcopy(learn.model)
    train, y = features_of(learn, unaugmented(learn))
    test, _ = features_of(learn, learn.dls.test)
    expected = nearest_by_definition(train, y, test, 10)

    def predicted():
        with learn.no_bar(): return learn.get_preds(dl=learn.dls.test)[0].argmax(1)
    mean_head(learn)
    assert predicted().equal(expected)
    learn.model = after_first_stage
    mean_head(learn, form='cosine')
    means = F.normalize(torch.stack([train[y == c].mean(0) for c in range(10)]), dim=1)
    by_cosine = predicted()
    assert by_cosine.equal((F.normalize(test, dim=1)@means.T).argmax(1))
    assert .25 < (by_cosine == expected).float().mean() < 1
    with pytest.raises(ValueError, match="form: got 'l2'. Did you mean 'cl2n'"): mean_head(learn, form='l2')


def test_fault_28_nearest_class_mean_variants():
    "By hand; a class without an image is never predicted; saved and loaded, the head is the same"
    means, center = torch.tensor([[1., 0], [0, .5], [9, 9]]), torch.tensor([1., 1])
    head = MeanHead(means, torch.tensor([True, True, False]), center=center)
    x = torch.tensor([[3., 1], [1, 4], [1.8, 1.6]])  # minus the centre, of length one: (1, 0), (0, 1), (0.8, 0.6)
    close(head(x)[:, :2], -15*torch.tensor([[0., 1.25], [2, .25], [.4, .65]])+15, 1e-4)
    assert head(x).argmax(1).tolist() == [0, 1, 0]
    other = MeanHead(torch.zeros(3, 2), torch.tensor([True]*3), center=torch.zeros(2))
    other.load_state_dict(head.state_dict())
    close(other(x), head(x), 0)


def test_fault_28_queue_and_dimensions_of_paco():
    "32 dimensions on CIFAR, 128 and a queue of 8,192 elsewhere; random initial keys of length one, with random labels"
    net = queued_net(create_net('resnet8', 10, n_in=1))
    assert net.queue.shape == (1024, 32)
    assert net.project[-1].out_features == 32
    close(net.queue.norm(dim=1), torch.ones(1024), 1e-5)
    assert set(net.labels.tolist()) == set(range(10))
    assert abs((net.queue@net.queue.T).fill_diagonal_(0).mean()) < .01
    other = queued_net(create_net('resnet8', 10, n_in=1), dims=128, size=8192)
    assert other.queue.shape == (8192, 128)
    assert not other.queue[:1024, :32].equal(net.queue)


def test_fault_28_the_oldest_keys_are_replaced():
    "The first batch is compared with the random keys"
    net = queued_net(create_net('resnet8', 10, n_in=1), size=8)
    queue, labels = net.queue.clone(), net.labels.clone()
    x = torch.randn(4, 1, 8, 8)
    _, _, keys, queue_of_batch, labels_of_batch = net.train()(x, x)
    assert queue_of_batch.equal(queue)
    assert labels_of_batch.equal(labels)
    net.enqueue(keys, torch.tensor([0, 1, 2, 3]))
    assert net.queue[4:].equal(queue[4:])
    assert net.labels.tolist() == [0, 1, 2, 3, *labels[4:].tolist()]


def test_fault_28_keys_with_the_same_label_are_positive():
    loss = PaCoLoss(torch.ones(10), alpha=1., temperature=1.)
    logits = torch.zeros(1, 10)
    q = torch.tensor([[1., 0]])
    def with_label(label): return loss((logits, q, q, q, torch.tensor([label])), torch.tensor([0])).item()
    lse = math.log(sum(math.exp(o) for o in [math.log(.1)]*10+[1., 1]))  # centres, key and queue, without the query
    assert with_label(0) == pytest.approx(lse-(math.log(.1)+2)/3, rel=1e-5)
    assert with_label(1) == pytest.approx(lse-(math.log(.1)+1)/2, rel=1e-5)


def balanced_by_pytorch(feats, targets, batches, head, n, lr=.01, wd=.1, beta=.9999):
    "The authors' second stage with PyTorch alone: binary cross-entropy, decay of weight and bias, MaxNorm at the end"
    weights = (1-beta)/(1-torch.tensor([beta]).double()**torch.tensor(n))
    weights = (weights/weights.sum()*len(n)).to(feats)
    lengths = head.weight.detach().norm(dim=1)
    radius = lengths.min()+.1*(lengths.max()-lengths.min())
    opt = torch.optim.SGD(head.parameters(), lr=lr, momentum=.9, weight_decay=wd)
    for i, ids in enumerate(batches):
        for group in opt.param_groups: group['lr'] = lr*(1+math.cos(math.pi*i/len(batches)))/2
        p = head(feats[ids]).softmax(1)
        onehot = F.one_hot(targets[ids], len(n)).to(feats)
        loss = F.binary_cross_entropy(p, onehot, weight=weights[targets[ids]][:, None].expand_as(p))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        lengths = head.weight.norm(dim=1, keepdim=True)
        head.weight.mul_((radius/lengths).clamp(max=1))
    return head


def test_fault_22_a_whole_stage_by_pytorch_alone():
    "Three batches of the published stage on a linear net give the weight and bias that PyTorch's own parts give"
    torch.manual_seed(0)
    feats, targets = torch.randn(24, 6), torch.arange(24) % 4
    dl = DataLoader(TensorDataset(feats, targets), bs=8)
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 4))
    learn = Learner(DataLoaders(dl, dl), net, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .5)
    expected = balanced_by_pytorch(feats, targets, torch.arange(24).split(8), deepcopy(net[1]), counts)
    assert (published_balancing.epochs, published_balancing.lr) == (10, .01)
    one_epoch = dataclasses.replace(published_balancing, epochs=1)
    method = dataclasses.replace(methods['weight-balancing'], later_stages=(one_epoch,))
    learn.class_counts = counts
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 1, .01, first=lambda *_: None)
    close(net[1].weight, expected.weight, 1e-5)
    close(net[1].bias, expected.bias, 1e-5)


def mdcs_by_definition(z, y, n, lambdas, weight=.6):
    "In plain Python, one image and one expert at a time"
    def shifted(logits, lam): return [v.item()+lam*math.log(m) for v, m in zip(logits, n)]
    total = 0.
    for k, lam in enumerate(lambdas):
        weak, strong = [[shifted(image[k], lam) for image in view] for view in z]
        for view in (weak, strong): total -= sum(log_softmax(v)[t] for v, t in zip(view, y))/2/len(y)
        right = [i for i, t in enumerate(y) if weak[i].index(max(weak[i])) == t]
        for i in right:
            p, q = log_softmax(weak[i]), log_softmax(strong[i])
            total += weight*sum(math.exp(a)*(a-b) for a, b in zip(p, q))/len(right)
    return total


@pytest.mark.parametrize('lambdas', [(-.5, 1, 2.5), (0., 1, 2, 3), (1., -1)])
def test_fault_23_by_definition(lambdas):
    "Other numbers of experts and powers, random views"
    for seed in range(3):
        torch.manual_seed(seed)
        z = torch.randn(2, 7, len(lambdas), 4, dtype=torch.float64)*4
        y = torch.randint(0, 4, (7,))
        loss = MDCSLoss(counts, lambdas).double()(z, y).item()
        assert loss == pytest.approx(mdcs_by_definition(z, y.tolist(), counts, lambdas), rel=1e-5)


def test_fault_24_symmetries():
    "Equal nets have no divergence; the order of the classes does not matter, nor that of all nets but the first"
    torch.manual_seed(0)
    z = torch.randn(5, 3, 4, dtype=torch.float64)*3
    y = torch.tensor([0, 1, 2, 3, 0])
    loss = NCLLoss(counts, hard=2).double()
    without_kl = NCLLoss(counts, hard=2, weight=0.).double()
    equal = z[:, :1].expand(-1, 3, -1)
    close(loss(equal, y), without_kl(equal, y), 1e-9)
    order = torch.tensor([2, 0, 3, 1])
    reordered = NCLLoss([counts[i] for i in order], hard=2).double()
    close(reordered(z[..., order], order.argsort()[y]), loss(z, y), 1e-9)
    close(loss(z[:, [0, 2, 1]], y), loss(z, y), 1e-9)
    assert abs(loss(z[:, [1, 0, 2]], y)-loss(z, y)) > 1e-3  # the first net determines the hard classes


@pytest.mark.parametrize('n_classes', [10, 60])
def test_fault_27_more_logits_than_classes(n_classes):
    "Gates that use 50 logits of 10 or 60 classes; every image is counted"
    net = GatedExperts(expert_net(create_net('resnet8', n_classes, n_in=1)), top=50)
    gate = net.gates[0]
    assert gate.out.in_features == 66
    feats, logits = torch.randn(4, gate.hidden.in_features), torch.randn(4, n_classes)
    largest = F.pad(logits.sort(1, descending=True).values[:, :50], (0, max(0, 50-n_classes)))
    hidden = F.relu(gate.hidden(F.normalize(feats, dim=1)))
    close(gate(feats, logits), gate.out(torch.cat([hidden, largest], 1))[:, 0], 1e-5)
    with torch.no_grad(): out = net.eval()(torch.randn(9, 1, 8, 8))
    assert out.shape == (9, n_classes)
    assert net.asked.sum() == 9


def test_fault_28_more_keys_than_the_queue_holds():
    "The last of them stay"
    net = queued_net(create_net('resnet8', 10, n_in=1), size=8)
    keys = F.normalize(torch.randn(20, 32), dim=1)
    net.enqueue(keys, torch.arange(20) % 10)
    assert net.labels.sort().values.tolist() == sorted((torch.arange(12, 20) % 10).tolist())
    assert {tuple(o) for o in net.queue.tolist()} == {tuple(o) for o in keys[12:].tolist()}


def test_fault_28_scales_are_saved_and_loaded():
    scaled, other = ScaledHead(nn.Linear(4, 3)), ScaledHead(nn.Linear(4, 3))
    with torch.no_grad(): scaled.scale.mul_(torch.tensor([2., 3, 4]))
    other.load_state_dict(scaled.state_dict())
    x = torch.randn(5, 4)
    close(other(x), scaled(x), 0)
