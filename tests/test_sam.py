"SAM and its kin: what a step is, what is restored, and what takes part in the second pass."
import copy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.all import GradientAccumulation, GradientClip, MixedPrecision, MixUp
from fastai.vision.all import (Adam, Callback, CancelBackwardException, CancelBatchException, CrossEntropyLossFlat, F,
                               Learner, SGD, nn, set_seed)
from ltrl_fastai.all import (BalancedSoftmaxLoss, Checkpoint, Diagnosis, KnowledgeCorrection, KnowledgeReview,
                             KnowledgeSummary, ReflectiveLearning, digits_lt)
from ltrl_fastai.methods.sam import FocalSAM, ImbSAM, SAM
from parts import all_three


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3),
                         nn.Linear(16, 10))


def learner(*cbs, make=net, opt_func=partial(SGD, mom=.9), loss=None, n_max=40, **kwargs):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=n_max, **kwargs)
    loss = BalancedSoftmaxLoss(dls.class_counts) if loss is None else loss
    return Learner(dls, make(), loss_func=loss, opt_func=opt_func, cbs=cbs)


def fit(learn, n=3, lr=.05, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn


def state(learn): return torch.cat([o.flatten().double() for o in learn.model.state_dict().values()])


class CpuAMP(MixedPrecision):
    "fastai's MixedPrecision, which is only for CUDA, on a CPU"
    def before_fit(self):
        super().before_fit()
        dtype = torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16
        self.autocast = torch.autocast('cpu', dtype=dtype)
        self.learn.scaler = torch.amp.GradScaler('cpu', **{**self.kwargs, 'enabled': dtype == torch.float16})


class ScaledFloat32(CpuAMP):
    "A loss scale without low precision"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', enabled=False)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=4096.)


companions = dict(
    alone=lambda: [], accumulation=lambda: [GradientAccumulation(100)], clip=lambda: [GradientClip(.5)],
    mixup=lambda: [MixUp()], bf16=lambda: [CpuAMP('bf16')], fp16=lambda: [CpuAMP('fp16')],
    reflective=lambda: [all_three()],
    paper=lambda: [ReflectiveLearning(preset='paper', ks=True, kc=True)],
    published=lambda: [ReflectiveLearning(preset='published', ks=True, kc=True)],
    everything=lambda: [all_three(), GradientAccumulation(100), GradientClip(.5), ScaledFloat32(), Diagnosis()])


@pytest.mark.parametrize('make', companions.values(), ids=companions)
def test_a_radius_of_zero_is_plain_training(make):
    "To the last bit, with dropout, BatchNorm and all that is remembered and logged"
    plain, sam = fit(learner(*make()), 2), fit(learner(SAM(0.), *make()), 2)
    assert torch.equal(state(plain), state(sam))
    values = [[list(row) for row in o.recorder.values] for o in (sam, plain)]
    np.testing.assert_equal(*values)  # where NaN equals NaN
    assert plain.recorder.losses == sam.recorder.losses
    if hasattr(plain, 'loss_terms'): np.testing.assert_equal(sam.loss_terms.history, plain.loss_terms.history)


@pytest.mark.parametrize('make', companions.values(), ids=companions)
def test_a_radius_changes_training_and_stays_finite(make):
    plain, sam = fit(learner(*make()), 2), fit(learner(SAM(.3), *make()), 2)
    assert state(sam).isfinite().all() and not torch.allclose(state(plain), state(sam))


class Watch(Callback):
    "Keep parameters, buffers and generators before each batch's forward pass and after its backward pass"
    order, run_valid = 1000, False
    def before_fit(self): self.before, self.after, self.pred = [], [], []
    def now(self):
        model = self.learn.model
        return dict(weights=flat(model),
                    buffers=torch.cat([o.flatten().double() for o in model.buffers()]),
                    torch=torch.get_rng_state(), numpy=torch.from_numpy(np.random.get_state()[1].astype(int)))
    def before_batch(self): self.before.append(self.now())
    def after_pred(self): self.pred.append(self.learn.pred.detach().clone())
    in_second_pass = False
    def after_backward(self):
        self.after.append(self.now())
        assert torch.equal(self.learn.pred.detach(), self.pred[-1])


def test_weights_buffers_and_generators_are_those_of_the_first_pass():
    "The weights are those before the batch; everything else is what one plain pass leaves"
    sam, plain = [fit(learner(*cbs, Watch()), 1, 0.) for cbs in ([SAM(.5)], [])]  # a rate of 0: the same weights
    assert len(sam.watch.after) == len(sam.dls.train) > 1
    for before, after in zip(sam.watch.before, sam.watch.after): assert torch.equal(before['weights'], after['weights'])
    for a, b in zip(sam.watch.after, plain.watch.after):
        for name in ('buffers', 'torch', 'numpy'): assert torch.equal(a[name], b[name]), name


class SeesPasses(nn.Module):
    "A net that keeps the dropout masks and weights of its forward passes, and raises in one of them"
    def __init__(self, raises=None, error=InterruptedError):
        super().__init__()
        self.net, self.raises, self.error = net(), raises, error
        self.masks, self.weights = [], []
    def forward(self, x):
        if not self.training: return self.net(x)
        if len(self.masks) == self.raises: raise self.error('in the second pass')
        self.masks.append(F.dropout(torch.ones(200), .5))
        self.weights.append(torch.cat([p.detach().flatten() for p in self.parameters()]))
        return self.net(x)


def test_both_passes_draw_the_same_masks_and_differ_by_the_radius():
    learn = fit(learner(SAM(.5), make=SeesPasses), 2)
    masks, weights = learn.model.masks, learn.model.weights
    assert len(masks) == 2*2*len(learn.dls.train)
    for first, second in zip(masks[::2], masks[1::2]): assert torch.equal(first, second)
    assert len({o.sum().item() for o in masks[::2]}) > 1
    for first, second in zip(weights[::2], weights[1::2]):
        torch.testing.assert_close((second-first).norm(), torch.tensor(.5), rtol=1e-3, atol=0)


def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize('error', [InterruptedError, KeyboardInterrupt])
def test_an_error_in_the_second_forward_pass_restores_the_weights(error):
    learn = learner(SAM(.5), all_three(), make=partial(SeesPasses, 3, error))
    with pytest.raises(error): fit(learn, 1)
    assert torch.equal(flat(learn.model), learn.model.weights[2]) and not learn.loss_terms.second_pass


def test_a_cancelled_second_pass_restores_the_weights():
    learn = learner(SAM(.5), all_three(), make=partial(SeesPasses, 1, CancelBatchException))
    before = flat(learn.model)
    fit(learn, 1)
    assert torch.equal(flat(learn.model), before) and not learn.loss_terms.second_pass


class FailsBackward(torch.autograd.Function):
    "The identity, whose n-th gradient fails"
    calls = 0
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g):
        FailsBackward.calls += 1
        if FailsBackward.calls == 4: raise InterruptedError('in the second backward pass')
        return g


class WithFailure(SeesPasses):
    def forward(self, x): return FailsBackward.apply(super().forward(x)) if self.training else super().forward(x)


def test_an_error_in_the_second_backward_pass_restores_the_weights():
    FailsBackward.calls = 0
    learn = learner(SAM(.5), make=WithFailure)
    with pytest.raises(InterruptedError): fit(learn, 1)
    assert len(learn.model.weights) == 4
    assert not torch.equal(learn.model.weights[3], learn.model.weights[2])
    assert torch.equal(flat(learn.model), learn.model.weights[2])


class CancelsBackward(Callback):
    "Cancel the backward pass of every second batch"
    order, run_valid, in_second_pass = 200, False, False
    def before_backward(self):
        if self.iter % 2: raise CancelBackwardException


def test_a_cancelled_backward_pass_restores_the_weights():
    fit(learn := learner(SAM(.5), CancelsBackward(), Watch()), 1, 0.)
    for before, after in zip(learn.watch.before, learn.watch.after):
        assert torch.equal(before['weights'], after['weights'])


def test_training_equals_a_loop_by_hand():
    "An epoch of SGD, with dropout masks and BatchNorm"
    learn = learner(opt_func=partial(SGD, wd=0.))
    model, loss = learn.model.train(), learn.loss_func
    params = [*model.parameters()]
    for xb, yb in learn.dls.train:
        buffers, rng = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
        grads = torch.autograd.grad(loss(model(xb), yb), params)
        kept, rng_after = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
        length = torch.cat([g.flatten() for g in grads]).norm()
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, grads): p.data += .3*g/length
        for name, o in model.named_buffers(): o.data.copy_(buffers[name])
        torch.set_rng_state(rng)
        grads = torch.autograd.grad(loss(model(xb), yb), params)
        torch.set_rng_state(rng_after)
        for name, o in model.named_buffers(): o.data.copy_(kept[name])
        for p, w, g in zip(params, before, grads): p.data = w-.05*g
    sam = fit(learner(SAM(.3), opt_func=partial(SGD, wd=0.)), 1)
    torch.testing.assert_close(state(sam), state(learn), rtol=1e-4, atol=1e-5)


class ByHand(Callback):
    "Recompute in each batch both gradients at w+e, and their correction, and compare them with what is stepped with"
    order, run_valid, in_second_pass = 20, False, False
    def __init__(self, rho): self.rho, self.n_conflicts, self.n_terms = rho, 0, 0
    def losses(self, model):
        "The main loss, and the review and summary terms, at the weights of `model`"
        learn, review, summary = self.learn, self.learn.knowledge_review, self.learn.knowledge_summary
        logits = model(*learn.xb)
        main, terms, loss = learn.loss_func(logits, *learn.yb), logits.new_zeros(()), learn.loss_func
        if self.recalled is not None and review.strength is not None:
            teacher, _, reviewed = self.recalled
            shift = review.logit_shift
            p = ((loss.trained_logits(teacher)+shift)/review.tau).softmax(1)
            logq = ((loss.trained_logits(logits)+shift)/review.tau).log_softmax(1)
            kl = (p*(p.log()-logq)).sum(1)*review.tau**2
            terms = terms + review.strength*(kl*reviewed).sum()/reviewed.sum().clamp(min=1)
        soft = summary._soft_labels(learn.y, logits.shape[1])
        if soft is not None:
            onehot = F.one_hot(learn.y, logits.shape[1])
            main = main - ((soft-onehot)*loss.trained_logits(logits).log_softmax(1)).sum(1).mean()
        return main, terms
    def after_loss(self):
        self.recalled = self.learn.knowledge_review._recalled
    def before_batch(self): self.recalled = None
    def before_step(self):
        model = copy.deepcopy(self.learn.model)
        params = [*model.parameters()]
        grads = torch.autograd.grad(sum(self.losses(model)), params)
        length = torch.cat([g.flatten() for g in grads]).norm()
        for p, g in zip(params, grads): p.data += self.rho*g/length
        main, terms = self.losses(model)
        mains = torch.autograd.grad(main, params, retain_graph=True)
        added = torch.autograd.grad(terms, params, allow_unused=True) if terms.requires_grad else [None]*len(params)
        for p, g, a in zip(self.learn.model.parameters(), mains, added):
            expected = g
            if a is not None:
                self.n_terms += 1
                dot = (a*g).sum()
                self.n_conflicts += int(dot < 0)
                expected = g + (a if dot >= 0 else a-dot/(g*g).sum()*g)
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


def plain_net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def test_with_correction_both_gradients_are_those_at_the_perturbed_weights():
    learn = fit(learner(SAM(.5), all_three(), ByHand(.5), make=plain_net), 4)
    assert learn.by_hand.n_terms > 20 and learn.by_hand.n_conflicts > 0


def test_each_sample_is_remembered_once():
    "Memories, counts and records after an epoch at a rate of 0 are those of plain training"
    learns = []
    for sam in ([], [SAM(.5)]):
        cbs = [KnowledgeReview(adapt=0.), KnowledgeSummary(adapt=6., resemblance='features'), KnowledgeCorrection()]
        learns.append(fit(learner(*sam, *cbs, Diagnosis(), make=plain_net), 3, 0.))
    plain, sam = learns
    teachers = [o.knowledge_review.teachers for o in learns]
    assert torch.equal(*[o.store.logits for o in teachers]) and teachers[0].seen.all()
    assert torch.equal(*[o.knowledge_summary.centers for o in learns])
    assert torch.equal(*[o.generalization_gap.train_counts for o in learns])
    assert sam.generalization_gap.train_counts[1].sum() == sum(len(b[1]) for b in sam.dls.train)
    assert plain.diagnosis.kl[1:] == sam.diagnosis.kl[1:]
    assert plain.diagnosis.train_accuracy == sam.diagnosis.train_accuracy
    for a, b in zip(plain.loss_terms.history, sam.loss_terms.history):
        assert {k: v for k, v in a.items() if k != 'conflicts'} == {k: v for k, v in b.items() if k != 'conflicts'}


def test_a_loss_scale_changes_nothing():
    results = [state(fit(learner(SAM(.3), *cbs, opt_func=SGD))) for cbs in ([], [ScaledFloat32()])]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class OverflowOnce(Callback):
    "Let the gradients of one batch overflow"
    order, run_valid, in_second_pass = 1, False, False
    def after_loss(self):
        if (self.epoch, self.iter) == (1, 0): self.learn.loss_grad = self.learn.loss_grad*float('inf')


def test_an_overflow_skips_the_step():
    learn = fit(learner(SAM(.3), OverflowOnce(), ScaledFloat32()))
    assert state(learn).isfinite().all()


def test_accumulated_micro_batches_have_perturbations_of_their_own():
    "The gradient of a step is the sum of the gradients of micro-batches, each at its own perturbed weights"
    def make(*cbs): return learner(*cbs, opt_func=partial(SGD, wd=0.), make=plain_net, bs=16)
    learn = make()
    model, loss = learn.model, learn.loss_func
    params = [*model.parameters()]
    total = [torch.zeros_like(p) for p in params]
    for xb, yb in learn.dls.train:
        grads = torch.autograd.grad(loss(model(xb), yb), params)
        length = torch.cat([g.flatten() for g in grads]).norm()
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, grads): p.data += .3*g/length
        grads = torch.autograd.grad(loss(model(xb), yb)*len(yb)/10**6, params)
        for p, w, t, g in zip(params, before, total, grads):
            p.data = w
            t += g
    sam = fit(make(SAM(.3), GradientAccumulation(10**6)), 1)
    for p, t in zip(sam.model.parameters(), total): torch.testing.assert_close(p.grad, t, rtol=1e-3, atol=1e-9)


class Crash(Callback):
    "Raise an error in the second batch of an epoch"
    order = -100
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise InterruptedError('crash')


@pytest.mark.parametrize('cbs', [lambda: [], lambda: [all_three(), GradientAccumulation(100)]], ids=['alone', 'all'])
def test_an_interrupted_fit_resumes_to_the_same_bits(cbs, tmp_path):
    def run(file, *more):
        learn = learner(SAM(.3), *cbs(), opt_func=Adam)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, .01, cbs=[Checkpoint(file), *more])
        return state(learn)
    whole = run(tmp_path/'whole.pt')
    with pytest.raises(InterruptedError): run(tmp_path/'fit.pt', Crash(2))
    assert torch.equal(run(tmp_path/'fit.pt'), whole)


class AddsPenalty(Callback):
    "A callback of a user, which says nothing of a second pass"
    run_valid = False
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + self.model[1].weight.square().sum()


class AddsTwice(AddsPenalty): in_second_pass = True


def test_an_unknown_callback_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match='AddsPenalty may act twice .after_loss.*in_second_pass = True'):
        fit(learner(SAM(), AddsPenalty()))
    fit(learner(SAM(), AddsTwice()))


def test_two_are_refused():
    with pytest.raises(ValueError, match='has a SAM already'): learner(SAM(), SAM())


@pytest.mark.parametrize('rho', [-1, float('nan'), 'a', None])
def test_an_invalid_radius_is_named(rho):
    with pytest.raises((ValueError, TypeError), match='rho: expected a radius'): SAM(rho)


def test_frozen_parameters_stay():
    learn = learner(SAM(.5), make=plain_net)
    frozen = learn.model[1].weight.requires_grad_(False)
    before = frozen.clone()
    fit(learn)
    assert torch.equal(frozen, before)


def test_it_rests_in_lr_find():
    learn = learner(SAM(.5), make=SeesPasses)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
    masks = learn.model.masks
    assert len(masks) == 12 and not any(torch.equal(a, b) for a, b in zip(masks, masks[1:]))


def test_export_keeps_the_radius_alone(tmp_path):
    learn = fit(learner(SAM(.25), loss=CrossEntropyLossFlat()))
    assert learn.sam.rho == .25 and not learn.sam._weights and learn.sam._before is None


def counts(): return digits_lt(device='cpu', n_max=40).class_counts


no_sharpness = dict(no_rare=lambda: ImbSAM(counts(), rare=0, rho=.5), no_weight=lambda: FocalSAM(counts(), weight=0.))
all_sharp = dict(all_rare=lambda: ImbSAM(counts(), rare=10**6, rho=.3),
                 all_alike=lambda: FocalSAM(counts(), gamma=0., weight=1., rho=.3))
review_and_summary = partial(ReflectiveLearning, preset='v0.0.1', ks=True)


@pytest.mark.parametrize('make', no_sharpness.values(), ids=no_sharpness)
@pytest.mark.parametrize('cbs', [lambda: [], lambda: [review_and_summary(), GradientAccumulation(100)]],
                         ids=['alone', 'reflective'])
def test_without_a_sharp_class_it_is_plain_training(make, cbs):
    "To the last bit"
    assert torch.equal(state(fit(learner(make(), *cbs()), 2)), state(fit(learner(*cbs()), 2)))


@pytest.mark.parametrize('make', all_sharp.values(), ids=all_sharp)
@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientAccumulation(100), ScaledFloat32()]],
                         ids=['alone', 'scaled'])
def test_with_all_classes_sharp_it_is_sam(make, cbs):
    results = [state(fit(learner(o, *cbs(), make=plain_net, opt_func=SGD), 2)) for o in (make(), SAM(.3))]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_class_weights_of_the_loss_are_kept():
    "A weighted mean is no mean of weighted losses: it is divided by the sum of weights"
    def loss(): return CrossEntropyLossFlat(weight=torch.linspace(.2, 3., 10))
    results = [state(fit(learner(o, make=plain_net, opt_func=SGD, loss=loss()), 2))
               for o in (ImbSAM(counts(), rare=10**6, rho=.3), SAM(.3))]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_what_a_sharpness_by_class_cannot_be_used_with_is_named():
    with pytest.raises(ValueError, match="ImbSAM can't be used with KnowledgeCorrection.*kc=False"):
        fit(learner(ImbSAM(counts()), all_three()))
    with pytest.raises(ValueError, match="FocalSAM can't be used with MixUp"):
        fit(learner(FocalSAM(counts()), MixUp()))
    with pytest.raises(ValueError, match='SAM and ImbSAM'): fit(learner(SAM(), ImbSAM(counts())))
