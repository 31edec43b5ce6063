"Reflective Learning in every call of a `Learner`, beside every common callback, under `torch.compile`, and what it costs there."
import gc
import random
import shutil
from copy import deepcopy
from types import MethodType

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.all import (CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback)
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import BnFreeze
from fastai.vision.all import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CancelValidException,
                               ClassificationInterpretation, FocalLossFlat, LabelSmoothingCrossEntropyFlat, Learner, SGD, accuracy, nn, params, set_seed)
from ltrl_fastai.all import BalancedSoftmaxLoss, KnowledgeReview, KnowledgeSummary, ReflectiveLearning, digits_lt
from parts import all_three
from torch._dynamo.utils import counters

exact = dict(rtol=0, atol=0, equal_nan=True)


def same(a, b, **kw): torch.testing.assert_close(a, b, **{**exact, **kw})


def hooks(model): return sum(len(m._forward_pre_hooks)+len(m._forward_hooks) for m in model.modules())


def convnet():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.1), nn.Linear(32, 10))


def learner(net=convnet, cbs=None, loss=None, seed=0, **kwargs):
    "A learner on digits-LT with loaders of its own, all drawn from `seed`"
    set_seed(seed, reproducible=True)
    dls = digits_lt(device='cpu')
    return Learner(dls, net(), loss_func=loss or BalancedSoftmaxLoss(dls.class_counts), metrics=accuracy, cbs=cbs, **kwargs)


def quietly(learn, call='fit', *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, call)(*args, **kwargs)


def trained(*args, n=3, lr=1e-2, **kwargs):
    learn = learner(*args, **kwargs)
    quietly(learn, 'fit', n, lr)
    return learn


def weights(learn): return torch.cat([o.detach().flatten().float() for o in learn.model.state_dict().values()])


def memory(learn):
    "A copy of all that our callbacks remember"
    r, s = learn.knowledge_review.teachers, learn.knowledge_summary
    return None if r is None else deepcopy([r.store.logits, r._flags, s.centers, s.similarity, s.learned, s.bank.features])


def state(learn): return [*deepcopy([learn.model.state_dict(), learn.opt.state_dict()['state']]), memory(learn)]


def loaders(dls):
    "What the loaders hold, but for what fastai's own loop and its `new` write there"
    return [{k: v for k, v in vars(dl).items() if k not in ('rng', '_DataLoader__idxs', 'it', '_n_inp', '_types')} for dl in dls.loaders]


def twin(learn):
    "A learner of the same weights, optimizer and loaders without our callbacks"
    res = Learner(deepcopy(learn.dls), deepcopy(learn.model), loss_func=learn.loss_func, metrics=accuracy)
    res.create_opt()
    if learn.opt: res.opt.load_state_dict(deepcopy(learn.opt.state_dict()))
    return res


# Calls
@pytest.mark.parametrize('call,args', [('fit_flat_cos', (3, 1e-2)), ('fit_one_cycle', (3, 1e-2)), ('fine_tune', (2, 1e-1))])
def test_schedules(call, args):
    learn = learner(cbs=all_three(), splitter=lambda m: [params(m[:3]), params(m[3:])])
    quietly(learn, call, *args)
    row, h = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])), learn.loss_terms.history[-1]
    assert h['review_loss'] > 0 and h['summary_loss'] > 0 and all(row[k] == h[k] for k in h) and row['accuracy'] > .2
    assert learn.knowledge_review.teachers.visited.all() and hooks(learn.model) == 0


@pytest.mark.parametrize('call', ['fit', 'fit_flat_cos', 'fit_one_cycle'])
def test_given_to_a_call_or_to_the_learner_is_one(call):
    "`learn.fit(cbs=...)` takes all parts away again"
    res = []
    for given in (False, True):
        ours = all_three()
        learn = learner(cbs=None if given else ours)
        before = sorted(learn.cbs.attrgot('name'))
        quietly(learn, call, 2, 1e-2, **(dict(cbs=ours) if given else {}))
        assert sorted(learn.cbs.attrgot('name')) == before and hooks(learn.model) == 0
        res.append(weights(learn))
    same(*res)


@pytest.mark.parametrize('n', [0, 2], ids=['fresh', 'trained'])
def test_a_fit_from_a_later_epoch_on(n):
    "`start_epoch` skips the first epochs: what is begun in epoch 0 has to be there all the same"
    learn = learner(cbs=all_three())
    if n: quietly(learn, 'fit', n, 1e-2)
    quietly(learn, 'fit', 3, 1e-2, start_epoch=1)
    assert len(learn.loss_terms.history) == len(learn.knowledge_correction.conflict_rates) == n+2
    assert learn.loss_terms.history[-1]['review_loss'] > 0


def draw_from(learn, seed):
    set_seed(seed)
    learn.dls.train.rng = random.Random(seed)


@pytest.mark.parametrize('n', [0, 2], ids=['fresh', 'trained'])
def test_lr_find_leaves_everything_as_it_was(n, tmp_path):
    "Its losses are those of the plain learner, and the next fit is that of a learner that has not searched"
    learn, other = [trained(cbs=all_three(), n=n, path=tmp_path) for _ in range(2)]
    plain, before, dls = twin(learn), state(learn), loaders(learn.dls)
    plain.path = tmp_path
    found = []
    for o in (learn, plain):
        draw_from(o, 1)
        found.append((quietly(o, 'lr_find', num_it=40, show_plot=False), o.recorder.losses, o.recorder.lrs))
    assert found[0][0] == found[1][0] and len(found[0][1]) > 20
    same(*[o[1:] for o in found])
    same(state(learn), before)
    assert loaders(learn.dls) == dls and hooks(learn.model) == 0
    for o in (learn, other):
        draw_from(o, 2)
        quietly(o, 'fit', 2, 1e-2)
    same(state(learn), state(other))


def shown(learn):
    "What `show_results` draws"
    learn.show_results(max_n=4)
    res = [(ax.get_title(), ax.images[0].get_array()) for ax in plt.gcf().axes if ax.images]
    plt.close('all')
    return [o for o, _ in res], [torch.as_tensor(o) for _, o in res]


def interpreted(learn, **kwargs):
    o = ClassificationInterpretation.from_learner(learn, **kwargs)
    return *o.top_losses(5), o.confusion_matrix(), len(o.most_confused())


calls = dict(validate=lambda o: [*o.validate()], validate_train=lambda o: [*o.validate(ds_idx=0)], preds_train=lambda o: o.get_preds(ds_idx=0, with_loss=True, with_input=True),
             preds_unordered=lambda o: o.get_preds(ds_idx=0, reorder=False, with_decoded=True), tta=lambda o: o.tta(ds_idx=0, n=2),
             predict=lambda o: o.predict(o.dls.valid.dataset.images[3], with_input=True)[2:], show_results=shown,
             interpret=interpreted, interpret_train=lambda o: interpreted(o, ds_idx=0))


@pytest.mark.parametrize('call', calls.values(), ids=calls)
def test_inference_is_that_of_a_plain_learner(call):
    "Augmentation is on: a random number drawn by us would show"
    learn = trained(cbs=all_three(), n=2)
    plain, before, dls = twin(learn), state(learn), loaders(learn.dls)
    results = []
    for o in (learn, plain):
        set_seed(2)
        with o.no_bar(), o.no_logging(): results.append(call(o))
    if call is shown:
        (titles, images), (theirs, others) = results
        assert titles == theirs and len(titles) == 4
        results = images, others
    same(*map(list, results))
    same(state(learn), before)
    assert loaders(learn.dls) == dls and hooks(learn.model) == 0


# Ends
where = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'forward', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step',
         'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
ends = [(o, e) for o in (KeyboardInterrupt, RuntimeError) for e in where]
ends += [(CancelFitException, e) for e in where if e not in ('before_fit', 'after_fit')]
ends += [(CancelEpochException, e) for e in where[2:-2]] + [(CancelTrainException, e) for e in where[2:12]]
ends += [(CancelBatchException, e) for e in where[3:11]] + [(CancelStepException, 'before_step'), (CancelValidException, 'before_validate')]


class Stop(Callback):
    "Raises `exc` once, behind all other callbacks, or in the model's first layer: there a hook on the head has been set and has not fired"
    order = 100
    def __init__(self, exc, event):
        self.exc, self.at = exc, event
        if event != 'forward': setattr(self, event, self.stop)
    def before_batch(self):
        if self.at == 'forward' and self.training and self.due: self.handle = self.model[0].register_forward_pre_hook(lambda *_: self.stop())
    @property
    def due(self): return self.exc and (self.at in ('before_fit', 'after_fit') or self.epoch == 1 and (self.training is False or self.at in where[1:3] or self.iter >= 3))
    def stop(self):
        if not self.due: return
        if self.at == 'forward': self.handle.remove()
        exc, self.exc = self.exc, None
        raise exc('stop')


@pytest.mark.parametrize('exc,event', [(None, 'nowhere'), *ends], ids=lambda o: o if isinstance(o, str) or o is None else o.__name__)
def test_an_end_anywhere_leaves_no_hook(exc, event):
    "Also where it comes behind our callbacks; looked at before anything else runs the model"
    learn = learner(cbs=[all_three(), Stop(exc, event)])
    before = loaders(learn.dls)
    try: quietly(learn, 'fit', 2, 1e-2)
    except (KeyboardInterrupt, RuntimeError) as e: assert type(e) is exc
    assert learn.stop.exc is None  # it was raised
    assert hooks(learn.model) == 0 and loaders(learn.dls) == before
    learn.remove_cbs(ReflectiveLearning)
    assert hooks(learn.model) == 0 and 'fit' not in vars(learn)


def test_the_hook_of_an_end_is_gone_with_the_next_batch():
    "Where somebody has replaced `fit`: what an interrupt in the forward pass leaves then, the next fit and prediction take away; nothing is counted twice"
    learn = learner(cbs=[Stop(KeyboardInterrupt, 'forward')])
    theirs = learn.fit = MethodType(Learner.fit, learn)
    learn.add_cb(all_three())
    assert learn.fit is theirs
    for after in (lambda: quietly(learn, 'fit', 1, 1e-2), lambda: quietly(learn, 'validate')):
        with pytest.raises(KeyboardInterrupt): quietly(learn, 'fit', 3, 1e-2)
        assert hooks(learn.model) == 1
        after()
        assert hooks(learn.model) == 0
        learn.stop.exc = KeyboardInterrupt
    assert learn.knowledge_summary.similarity.isfinite().all()


# Beside
class EMA(Callback):
    "Validates with a moving average of the weights"
    run_valid, order = True, 20
    def before_fit(self): self.mean = [p.detach().clone() for p in self.model.parameters()]
    def after_step(self):
        for o, p in zip(self.mean, self.model.parameters()): o.lerp_(p.detach(), .1)
    def swap(self):
        for i, p in enumerate(self.model.parameters()): p.data, self.mean[i] = self.mean[i], p.data
    def before_validate(self): self.swap()
    def after_validate(self): self.swap()


beside = dict(nothing=lambda: [], cutmix=lambda: [CutMix()], mixup=lambda: [MixUp()], ema=lambda: [EMA()], channels_last=lambda: [ChannelsLast()], bn_freeze=lambda: [BnFreeze()],
              stopping=lambda: [SaveModelCallback(monitor='accuracy'), EarlyStoppingCallback(patience=2), TerminateOnNaNCallback(), ReduceLROnPlateau()])
beside['everything'] = lambda: [CutMix(), EMA(), ChannelsLast(), *beside['stopping'](), GradientAccumulation(64), GradientClip(.5)]
losses = dict(balanced=None, smoothed=LabelSmoothingCrossEntropyFlat, focal=FocalLossFlat)


@pytest.mark.parametrize('cbs,loss', [*[(o, 'balanced') for o in beside], *[(o, l) for o in ('nothing', 'cutmix', 'everything') for l in ('smoothed', 'focal')]])
def test_adding_order_changes_no_bit(cbs, loss, tmp_path):
    cbs, loss, res = beside[cbs], losses[loss], []
    for first in (True, False):
        ours = [all_three()]
        learn = trained(cbs=[*ours, *cbs()] if first else [*cbs(), *ours], loss=loss and loss(), path=tmp_path/str(first))
        h = learn.loss_terms.history[-1]
        assert h['review_loss'] > 0 and h['summary_loss'] > 0 and hooks(learn.model) == 0
        assert type(learn.loss_func) is (loss or BalancedSoftmaxLoss) and learn.loss_func.reduction == 'mean'
        res.append((weights(learn), memory(learn)[0], torch.tensor([o[:2] for o in learn.recorder.values])))
    same(*res)


@pytest.mark.parametrize('cbs', [EMA, ChannelsLast, TerminateOnNaNCallback])
def test_what_only_watches_changes_nothing(cbs):
    "Nor does a memory format, up to rounding"
    a, b = [trained(cbs=[all_three(), *o], opt_func=SGD) for o in ([], [cbs()])]
    tol = dict(rtol=1e-3, atol=1e-5) if cbs is ChannelsLast else exact
    same(weights(a), weights(b), **tol)
    same(memory(a)[0], memory(b)[0], **tol)


def test_a_loss_that_is_nan_ends_the_fit_and_spoils_no_memory():
    class Spoil(Callback):
        order, run_valid = -20, False
        def after_pred(self):
            if self.epoch == 1 and self.iter == 3: self.learn.pred = self.pred*float('nan')
    learn = trained(cbs=[all_three(), Spoil(), TerminateOnNaNCallback()])
    assert learn.epoch == 1 and hooks(learn.model) == 0
    assert learn.knowledge_review.teachers.store.logits.isfinite().all() and learn.knowledge_summary.centers.isfinite().all()


# torch.compile
class Net(nn.Module):
    "A net whose forward is a function, not a loop over layers"
    def __init__(self):
        super().__init__()
        self.body, self.fc = convnet()[:-1], nn.Linear(32, 10)
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
    "A fit of a compiled model, how many graphs it was compiled to, and where they were broken"
    torch._dynamo.reset(); counters.clear()
    learn = learner(net, cbs=[*([ReflectiveLearning(**ours)] if ours else []), *cbs], opt_func=SGD)
    if backend: learn.model = torch.compile(learn.model, backend=backend)
    quietly(learn, 'fit', n, 5e-2)
    return learn, counters['stats']['unique_graphs'], dict(counters['graph_break'])


@pytest.mark.parametrize('backend', ['eager', 'aot_eager', inductor])
@pytest.mark.parametrize('ours', [dict(ks=True), dict(kc=True), dict(ks=True, kc=True)], ids='+'.join)
def test_a_compiled_model_trains_as_it_does_uncompiled(ours, backend):
    "In float64, where rounding (inductor has kernels of its own) can't turn a prediction from right to wrong and so what is reviewed"
    a, b = [compiled(o, lambda: Net().double(), cbs=[InDouble()], **ours)[0] for o in (None, backend)]
    same(weights(a), weights(b), rtol=1e-6, atol=1e-6)
    assert hooks(b.model) == 0 and b.loss_terms.history[-1]['review_loss'] > 0
    if 'ks' in ours: same(a.knowledge_summary.similarity, b.knowledge_summary.similarity, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('ours', [dict(kr=True), dict(ks=True)], ids='+'.join)
@pytest.mark.parametrize('net', [Net, Loop])
def test_a_compiled_model_stays_compiled(net, ours):
    "As many graphs as without us, none of them broken, and not one more for every batch"
    (_, graphs, breaks), (_, mine, more) = [compiled('eager', net, **o) for o in ({}, ours)]
    assert (mine, more) == (graphs, breaks)


# Memory
class Live(Callback):
    "Bytes of all tensors that are alive at the end of each epoch"
    order = 90
    def before_fit(self): self.bytes, self.number = [], []
    def after_epoch(self):
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not type(o).__module__.startswith('torch._')]  # not the compiler's
        tensors = [o for o in tensors if o.layout == torch.strided]  # tests before may have left sparse ones, which have no storage
        storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in tensors}
        self.bytes.append(sum(storages.values())); self.number.append(len(tensors))


def test_memory_is_flat():
    "What grows by the epoch is what fastai's Recorder keeps: a loss of each step"
    live, plain = [trained(cbs=[*o, Live()], n=5).live for o in ([all_three()], [])]
    for a, b in ((live.bytes, plain.bytes), (live.number, plain.number)):
        excess = [x-y for x, y in zip(a, b)]
        assert len(set(excess[1:])) == 1, (a, b)


def test_what_is_remembered_holds_no_graph():
    learn = trained(cbs=all_three(), n=2)
    def tensors(o): return [t for v in vars(o).values() for t in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(t, torch.Tensor)]
    kept = [t for cb in learn.cbs if isinstance(cb, (KnowledgeReview, KnowledgeSummary)) for t in tensors(cb)] + memory(learn)[-1]
    assert kept and not any(t.requires_grad for t in kept)
