"Reflective Learning in every call of a `Learner`, with common callbacks and `torch.compile`, and its memory."
import gc
import random
import shutil
from copy import deepcopy
from types import MethodType

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.all import (CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp,
                                 ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback)
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import BnFreeze
from fastai.vision.all import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                               CancelStepException, CancelTrainException, CancelValidException,
                               ClassificationInterpretation, FocalLossFlat, LabelSmoothingCrossEntropyFlat, Learner,
                               SGD, accuracy, nn, params, set_seed)
from ltrl_fastai.all import BalancedSoftmaxLoss, ReflectiveLearning, digits_lt
from parts import all_three
from torch._dynamo.utils import counters

exact = dict(rtol=0, atol=0, equal_nan=True)


def assert_same(a, b, **tolerance): torch.testing.assert_close(a, b, **{**exact, **tolerance})


def hooks(model): return sum(len(m._forward_pre_hooks)+len(m._forward_hooks) for m in model.modules())


def convnet():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Dropout(.1), nn.Linear(32, 10))


def learner(net=convnet, cbs=None, loss=None, seed=0, **kwargs):
    "A learner on digits-LT with its own loaders, all drawn from `seed`"
    set_seed(seed, reproducible=True)
    dls = digits_lt(device='cpu', n_max=48)
    loss = loss or BalancedSoftmaxLoss(dls.class_counts)
    return Learner(dls, net(), loss_func=loss, metrics=accuracy, cbs=cbs, **kwargs)


def quietly(learn, call='fit', *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, call)(*args, **kwargs)


def trained(*args, n=3, lr=1e-2, **kwargs):
    learn = learner(*args, **kwargs)
    quietly(learn, 'fit', n, lr)
    return learn


def weights(learn): return torch.cat([o.detach().flatten().float() for o in learn.model.state_dict().values()])


def memory(learn):
    "A copy of everything that our callbacks remember"
    teachers, summary = learn.knowledge_review.teachers, learn.knowledge_summary
    if teachers is None: return None
    return deepcopy([teachers.store.logits, teachers._flags, summary.centers, summary.similarity,
                     summary.train_accuracy, summary.bank.features])


def state(learn): return [*deepcopy([learn.model.state_dict(), learn.opt.state_dict()['state']]), memory(learn)]


def loaders(dls):
    "Attributes of the loaders, except those that fastai's own loop and `new` set"
    fastais = ('rng', '_DataLoader__idxs', 'it', '_n_inp', '_types')
    return [{k: v for k, v in vars(dl).items() if k not in fastais} for dl in dls.loaders]


def without_ours(learn):
    "A learner with the same weights, optimizer and loaders, but without our callbacks"
    res = Learner(deepcopy(learn.dls), deepcopy(learn.model), loss_func=learn.loss_func, metrics=accuracy)
    res.create_opt()
    if learn.opt: res.opt.load_state_dict(deepcopy(learn.opt.state_dict()))
    return res


# Calls
schedules = [('fit_flat_cos', (3, 3e-2)), ('fit_one_cycle', (3, 3e-2)), ('fine_tune', (2, 1e-1))]


@pytest.mark.parametrize('call,args', schedules)
def test_schedules(call, args):
    learn = learner(cbs=all_three(), splitter=lambda m: [params(m[:3]), params(m[3:])])
    quietly(learn, call, *args)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    means = learn.loss_terms.history[-1]
    assert means['review_loss'] > 0
    assert means['summary_loss'] > 0
    assert all(row[k] == means[k] for k in means)
    assert row['accuracy'] > .2
    assert learn.knowledge_review.teachers.visited.all()
    assert hooks(learn.model) == 0


@pytest.mark.parametrize('call', ['fit', 'fit_flat_cos', 'fit_one_cycle'])
def test_callbacks_of_a_call_and_of_the_learner_train_the_same(call):
    "`learn.fit(cbs=...)` removes all parts again"
    res = []
    for of_learner, of_call in ((all_three(), {}), (None, dict(cbs=all_three()))):
        learn = learner(cbs=of_learner)
        before = sorted(learn.cbs.attrgot('name'))
        quietly(learn, call, 2, 1e-2, **of_call)
        assert sorted(learn.cbs.attrgot('name')) == before
        assert hooks(learn.model) == 0
        res.append(weights(learn))
    assert_same(*res)


@pytest.mark.parametrize('n', [0, 2], ids=['fresh', 'trained'])
def test_a_fit_from_a_later_epoch_on(n):
    "`start_epoch` skips epoch 0, and what is initialised in it has to exist all the same"
    learn = learner(cbs=all_three())
    if n: quietly(learn, 'fit', n, 1e-2)
    quietly(learn, 'fit', 3, 1e-2, start_epoch=1)
    assert len(learn.loss_terms.history) == len(learn.knowledge_correction.conflict_rates) == n+2
    assert learn.loss_terms.history[-1]['review_loss'] > 0


def draw_from(learn, seed):
    set_seed(seed)
    learn.dls.train.rng = random.Random(seed)


@pytest.mark.parametrize('n', [0, 2], ids=['fresh', 'trained'])
def test_lr_find_changes_nothing(n, tmp_path):
    "Its losses are those without our callbacks, and the next fit is that of a learner that has not searched"
    learn, not_searched = [trained(cbs=all_three(), n=n, path=tmp_path) for _ in range(2)]
    reference = without_ours(learn)
    reference.path = tmp_path
    before, dls_before = state(learn), loaders(learn.dls)
    suggestions, curves = [], []
    for o in (learn, reference):
        draw_from(o, 1)
        suggestions.append(quietly(o, 'lr_find', num_it=40, show_plot=False))
        curves.append((o.recorder.losses, o.recorder.lrs))
    assert suggestions[0] == suggestions[1]
    assert len(curves[0][0]) > 20
    assert_same(*curves)
    assert_same(state(learn), before)
    assert loaders(learn.dls) == dls_before
    assert hooks(learn.model) == 0
    for o in (learn, not_searched):
        draw_from(o, 2)
        quietly(o, 'fit', 2, 1e-2)
    assert_same(state(learn), state(not_searched))


def shown(learn):
    "Images and titles that `show_results` draws"
    learn.show_results(max_n=4)
    axs = [ax for ax in plt.gcf().axes if ax.images]
    images = [torch.as_tensor(ax.images[0].get_array()) for ax in axs]
    titles = [ax.get_title() for ax in axs]
    plt.close('all')
    assert len(titles) == 4
    return [*images, torch.tensor([ord(c) for c in ' '.join(titles)])]


def interpreted(learn, **kwargs):
    o = ClassificationInterpretation.from_learner(learn, **kwargs)
    return *o.top_losses(5), o.confusion_matrix(), len(o.most_confused())


calls = dict(
    validate=lambda o: [*o.validate()],
    validate_train=lambda o: [*o.validate(ds_idx=0)],
    preds_train=lambda o: o.get_preds(ds_idx=0, with_loss=True, with_input=True),
    preds_unordered=lambda o: o.get_preds(ds_idx=0, reorder=False, with_decoded=True),
    tta=lambda o: o.tta(ds_idx=0, n=2),
    predict=lambda o: o.predict(o.dls.valid.dataset.images[3], with_input=True)[2:],
    show_results=shown,
    interpret=interpreted,
    interpret_train=lambda o: interpreted(o, ds_idx=0),
)


@pytest.mark.parametrize('call', calls.values(), ids=calls)
def test_inference_is_that_without_our_callbacks(call):
    "With augmentation, which would reveal a random number drawn by us"
    learn = trained(cbs=all_three(), n=2)
    reference = without_ours(learn)
    before, dls_before = state(learn), loaders(learn.dls)
    results = []
    for o in (learn, reference):
        set_seed(2)
        with o.no_bar(), o.no_logging(): results.append(list(call(o)))
    assert_same(*results)
    assert_same(state(learn), before)
    assert loaders(learn.dls) == dls_before
    assert hooks(learn.model) == 0


# Interrupts, crashes and cancellations
events = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'forward', 'after_pred', 'after_loss',
          'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch', 'after_train',
          'before_validate', 'after_validate', 'after_epoch', 'after_fit']
ends = [(exc, event) for exc in (KeyboardInterrupt, RuntimeError) for event in events]
ends += [(CancelFitException, event) for event in events if event not in ('before_fit', 'after_fit')]
ends += [(CancelEpochException, event) for event in events[2:-2]]
ends += [(CancelTrainException, event) for event in events[2:12]]
ends += [(CancelBatchException, event) for event in events[3:11]]
ends += [(CancelStepException, 'before_step'), (CancelValidException, 'before_validate')]


class Stop(Callback):
    """Raise `exc` once, after all other callbacks of an event; 'forward' is the model's first layer, where the hook on
    the head has been added and not yet called"""
    order = 100
    def __init__(self, exc, event):
        self.exc = exc
        self.at = event
        if event != 'forward': setattr(self, event, self.stop)
    def before_batch(self):
        if self.at != 'forward' or not self.training or not self.is_due: return
        self.handle = self.model[0].register_forward_pre_hook(lambda *args: self.stop())
    @property
    def is_due(self):
        if not self.exc: return False
        if self.at in ('before_fit', 'after_fit'): return True
        in_time = self.training is False or self.at in ('before_epoch', 'before_train') or self.iter >= 3
        return self.epoch == 1 and in_time
    def stop(self):
        if not self.is_due: return
        if self.at == 'forward': self.handle.remove()
        exc, self.exc = self.exc, None
        raise exc('stop')


def end_id(o): return getattr(o, '__name__', o)


@pytest.mark.parametrize('exc,event', [(None, 'nowhere'), *ends], ids=end_id)
def test_an_end_anywhere_leaves_no_hook(exc, event):
    "Also if it comes after our callbacks; checked before anything else runs the model"
    learn = learner(cbs=[all_three(), Stop(exc, event)])
    before = loaders(learn.dls)
    try: quietly(learn, 'fit', 2, 1e-2)
    except (KeyboardInterrupt, RuntimeError) as e: assert type(e) is exc
    assert learn.stop.exc is None  # it was raised
    assert hooks(learn.model) == 0
    assert loaders(learn.dls) == before
    learn.remove_cbs(ReflectiveLearning)
    assert hooks(learn.model) == 0
    assert 'fit' not in vars(learn)


def test_a_hook_that_an_interrupt_left_is_removed_by_the_next_batch():
    "If the user replaced `fit`, an interrupt in the forward pass leaves a hook; the next fit or prediction removes it"
    learn = learner(cbs=[Stop(KeyboardInterrupt, 'forward')])
    replaced = learn.fit = MethodType(Learner.fit, learn)
    learn.add_cb(all_three())
    assert learn.fit is replaced
    for call, args in (('fit', (1, 1e-2)), ('validate', ())):
        with pytest.raises(KeyboardInterrupt): quietly(learn, 'fit', 3, 1e-2)
        assert hooks(learn.model) == 1
        quietly(learn, call, *args)
        assert hooks(learn.model) == 0
        learn.stop.exc = KeyboardInterrupt
    assert learn.knowledge_summary.similarity.isfinite().all()


# With other callbacks
class EMA(Callback):
    "Validate with a moving average of the weights"
    run_valid, order = True, 20
    def before_fit(self): self.mean = [p.detach().clone() for p in self.model.parameters()]
    def after_step(self):
        for o, p in zip(self.mean, self.model.parameters()): o.lerp_(p.detach(), .1)
    def swap(self):
        for i, p in enumerate(self.model.parameters()): p.data, self.mean[i] = self.mean[i], p.data
    def before_validate(self): self.swap()
    def after_validate(self): self.swap()


def stopping(): return [SaveModelCallback(monitor='accuracy'), EarlyStoppingCallback(patience=2),
                        TerminateOnNaNCallback(), ReduceLROnPlateau()]


def everything(): return [CutMix(), EMA(), ChannelsLast(), *stopping(), GradientAccumulation(64), GradientClip(.5)]


others = dict(nothing=lambda: [], cutmix=lambda: [CutMix()], mixup=lambda: [MixUp()], ema=lambda: [EMA()],
              channels_last=lambda: [ChannelsLast()], bn_freeze=lambda: [BnFreeze()], stopping=stopping,
              everything=everything)
losses = dict(balanced=None, smoothed=LabelSmoothingCrossEntropyFlat, focal=FocalLossFlat)
combinations = [(name, 'balanced') for name in others]
combinations += [(name, loss) for name in ('nothing', 'cutmix', 'everything') for loss in ('smoothed', 'focal')]


@pytest.mark.parametrize('name,loss', combinations)
def test_the_order_of_adding_callbacks_changes_no_bit(name, loss, tmp_path):
    loss = losses[loss]
    res = []
    for first in (True, False):
        cbs = [all_three(), *others[name]()]
        if not first: cbs = [*cbs[1:], cbs[0]]
        learn = trained(cbs=cbs, loss=loss and loss(), path=tmp_path/str(first))
        means = learn.loss_terms.history[-1]
        assert means['review_loss'] > 0
        assert means['summary_loss'] > 0
        assert hooks(learn.model) == 0
        assert type(learn.loss_func) is (loss or BalancedSoftmaxLoss)
        assert learn.loss_func.reduction == 'mean'
        losses_by_epoch = torch.tensor([row[:2] for row in learn.recorder.values])
        res.append((weights(learn), memory(learn)[0], losses_by_epoch))
    assert_same(*res)


@pytest.mark.parametrize('cb', [EMA, ChannelsLast, TerminateOnNaNCallback])
def test_callbacks_that_do_not_act_on_training_change_nothing(cb):
    "Nor does a memory format, up to rounding"
    a, b = [trained(cbs=[all_three(), *more], opt_func=SGD) for more in ([], [cb()])]
    tolerance = dict(rtol=1e-3, atol=1e-5) if cb is ChannelsLast else exact
    assert_same(weights(a), weights(b), **tolerance)
    assert_same(memory(a)[0], memory(b)[0], **tolerance)


class PredictsNaN(Callback):
    "Predict NaN once, in the second epoch"
    order, run_valid = -20, False
    def after_pred(self):
        if self.epoch == 1 and self.iter == 3: self.learn.pred = self.pred*float('nan')


def test_a_nan_loss_ends_the_fit_and_leaves_memories_finite():
    learn = trained(cbs=[all_three(), PredictsNaN(), TerminateOnNaNCallback()])
    assert learn.epoch == 1
    assert hooks(learn.model) == 0
    assert learn.knowledge_review.teachers.store.logits.isfinite().all()
    assert learn.knowledge_summary.centers.isfinite().all()


# torch.compile
class Net(nn.Module):
    "A network whose forward is a function, not a loop over layers"
    def __init__(self):
        super().__init__()
        self.body = convnet()[:-1]
        self.fc = nn.Linear(32, 10)
        self.body[-1].p = 0.  # a compiled dropout may draw other numbers
    def forward(self, x): return self.fc(self.body(x))


class Loop(Net):
    "The same in a loop over layers"
    def forward(self, x):
        for o in (*self.body, self.fc): x = o(x)
        return x


compiler = shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')
inductor = pytest.param('inductor', marks=pytest.mark.skipif(not compiler, reason='inductor needs a C++ compiler'))


class InDouble(Callback):
    def before_batch(self): self.learn.xb = tuple(o.double() for o in self.xb)


def compiled(backend, net=Net, n=3, cbs=(), **ours):
    "A fit of a compiled model, the number of its graphs, and the causes of graph breaks"
    torch._dynamo.reset()
    counters.clear()
    if ours: cbs = [ReflectiveLearning(**ours), *cbs]
    learn = learner(net, cbs=list(cbs), opt_func=SGD)
    if backend: learn.model = torch.compile(learn.model, backend=backend)
    quietly(learn, 'fit', n, 5e-2)
    return learn, counters['stats']['unique_graphs'], dict(counters['graph_break'])


@pytest.mark.slow
@pytest.mark.parametrize('ours,backend', [
    (dict(ks=True), 'aot_eager'), (dict(kc=True), 'aot_eager'), (dict(ks=True, kc=True), 'eager'),
    pytest.param(dict(ks=True, kc=True), *inductor.values, marks=inductor.marks)])
def test_a_compiled_model_trains_as_it_does_uncompiled(ours, backend):
    "In float64, so that rounding (inductor has its own kernels) does not change which samples are reviewed"
    a, b = [compiled(o, lambda: Net().double(), cbs=[InDouble()], **ours)[0] for o in (None, backend)]
    assert_same(weights(a), weights(b), rtol=1e-6, atol=1e-6)
    assert hooks(b.model) == 0
    assert b.loss_terms.history[-1]['review_loss'] > 0
    if 'ks' not in ours: return
    assert_same(a.knowledge_summary.similarity, b.knowledge_summary.similarity, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('ours', [dict(kr=True), dict(ks=True)], ids='+'.join)
@pytest.mark.parametrize('net', [Net, Loop])
def test_a_compiled_model_stays_compiled(net, ours):
    "As many graphs and graph breaks as without our callbacks, and none for each batch"
    assert compiled('eager', net, **ours)[1:] == compiled('eager', net)[1:]


# Memory
def is_live_tensor(o):
    "Whether `o` is a tensor, but none of the compiler's, and no sparse one of an earlier test, which has no storage"
    cls = type(o)
    return issubclass(cls, torch.Tensor) and not cls.__module__.startswith('torch._') and o.layout == torch.strided


class LiveTensors(Callback):
    "Record number and bytes of all live tensors at the end of each epoch"
    order = 90
    def before_fit(self):
        self.n_bytes = []
        self.n_tensors = []
    def after_epoch(self):
        gc.collect()
        tensors = [o for o in gc.get_objects() if is_live_tensor(o)]
        storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in tensors}
        self.n_bytes.append(sum(storages.values()))
        self.n_tensors.append(len(tensors))


def test_memory_does_not_grow():
    "Only fastai's Recorder grows by the epoch: it keeps the loss of each step"
    ours, reference = [trained(cbs=[*cbs, LiveTensors()], n=5).live_tensors for cbs in ([all_three()], [])]
    for a, b in ((ours.n_bytes, reference.n_bytes), (ours.n_tensors, reference.n_tensors)):
        excess = [x-y for x, y in zip(a, b)]
        assert len(set(excess[1:])) == 1, (a, b)


def tensors_of(cb):
    "Tensors among the attributes of a callback, also in lists"
    values = [o for v in vars(cb).values() for o in (v if isinstance(v, (list, tuple)) else [v])]
    return [o for o in values if isinstance(o, torch.Tensor)]


def test_memories_hold_no_graph():
    learn = trained(cbs=all_three(), n=2)
    kept = memory(learn)[-1] + tensors_of(learn.knowledge_review) + tensors_of(learn.knowledge_summary)
    assert kept
    assert not any(t.requires_grad for t in kept)
