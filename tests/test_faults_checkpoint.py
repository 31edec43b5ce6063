"Regression tests of resuming, exporting and monitoring, by fault number."
import math
import os
import warnings
from collections import deque
from functools import partial

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from fastai.callback.all import (
    CSVLogger,
    EarlyStoppingCallback,
    FetchPredsCallback,
    GradientAccumulation,
    ReduceLROnPlateau,
    SaveModelCallback,
    TrainEvalCallback,
)
from fastai.callback.data import WeightedDL
from fastai.metrics import F1Score, Recall, skm_to_fastai
from fastai.optimizer import SGD, Adam, Lamb, Larc, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, ranger
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    ImageDataLoaders,
    IntToFloatTensor,
    Learner,
    Metric,
    RandomResizedCrop,
    Rotate,
    TfmdDL,
    ToTensor,
    aug_transforms,
    deepcopy,
    load_learner,
    nn,
    params,
    accuracy,
    set_seed,
)
from sklearn.metrics import confusion_matrix

from ltrl_fastai.all import (
    BalancedSoftmaxLoss,
    Checkpoint,
    Method,
    ReflectiveLearning,
    ShotReport,
    class_counts,
    create_net,
    digits_lt,
    methods,
    shot_accuracies,
)
from ltrl_fastai.experiments.checkpoint import ForeignCheckpoint
from ltrl_fastai.methods.decouple import mean_head, ncm, tau_norm, tau_norm_head
from test_methods import from_scratch


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def learner(path, cbs=None, opt_func=partial(SGD, mom=0.9), make=net, **kwargs):
    set_seed(0, reproducible=True)
    dls = kwargs.pop('dls', None) or digits_lt(device='cpu', n_max=40)
    return Learner(
        dls, make(), opt_func=opt_func, cbs=cbs, path=path, **{'loss_func': CrossEntropyLossFlat(), **kwargs}
    )


class Crash(Callback):
    "Raise an error in the second batch of an epoch"

    order = -100

    def __init__(self, at):
        self.at, self.epochs = at, -1

    def before_train(self):
        self.epochs, self.batches = self.epochs + 1, 0

    def before_batch(self):
        if self.learn.lock.locked() or not self.training:
            return
        self.batches += 1
        if self.epochs == self.at and self.batches == 2:
            raise InterruptedError('crash')


def quiet(learn, n, lr=1e-2, call='fit', **kwargs):
    with learn.no_bar(), learn.no_logging():
        getattr(learn, call)(n, lr, **kwargs)
    return learn


def killed_and_resumed(make, file, n=4, crashes=(2,), every=1, **kwargs):
    "The learner of a fit that crashed in these epochs, counted from each start, and was resumed"
    for at in crashes:
        with pytest.raises(InterruptedError):
            quiet(make(), n, cbs=[Checkpoint(file, every=every), Crash(at)], **kwargs)
    return quiet(make(), n, cbs=Checkpoint(file, every=every), **kwargs)


def weights(learn):
    return torch.cat([o.flatten().double() for o in learn.model.state_dict().values()])


def same(a, b):
    "Weights are equal to the last bit, and so is the Recorder's table, types included"
    assert torch.equal(weights(a), weights(b))
    assert repr(a.recorder.values) == repr(b.recorder.values) and a.recorder.lrs == b.recorder.lrs
    assert [o.item() for o in a.recorder.losses] == [o.item() for o in b.recorder.losses]


def done(file):
    return torch.load(file, weights_only=True)['done']


# 1: what is saved can be loaded


class Value(Metric):
    "A metric whose value is a function of the number of resets"

    def __init__(self, f):
        self.f, self.n = f, 0

    def reset(self):
        self.n += 1

    @property
    def value(self):
        return self.f(self.n)

    @property
    def name(self):
        return 'odd'


values = dict(
    array=lambda n: np.arange(n * 3.0).reshape(3, n),
    scalar=lambda n: [np.float32(n / 3)],
    none=lambda n: None,
    text=lambda n: f'epoch {n}',
    nested=lambda n: {np.int64(n): [np.arange(n), {'a': (torch.ones(n), np.bool_(True))}], (1, 2): 'pair'},
    tensor=lambda n: torch.arange(n + 1.0),
    objects=lambda n: np.array([None, 'a', n], dtype=object),
    texts=lambda n: np.array(['a', 'bc']),
    sparse=lambda n: torch.eye(3).to_sparse(),
    rows=lambda n: torch.eye(3).to_sparse_csr(),
    quantized=lambda n: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.quint8),
    sets=lambda n: {1, n},
)


@pytest.mark.parametrize(
    'metric',
    [
        lambda: F1Score(average=None),
        lambda: Recall(average=None),
        lambda: skm_to_fastai(confusion_matrix),
        *(lambda f=f: Value(f) for f in values.values()),
    ],
    ids=['f1', 'recall', 'confusion', *values],
)
def test_fault_01_values_of_metrics(metric, tmp_path):
    "With any value of a metric the fit resumes, and the table keeps values and types"

    def make():
        return learner(tmp_path, metrics=metric())

    whole = quiet(make(), 3, cbs=Checkpoint(tmp_path / 'whole.pt'))

    class Number(Callback):
        "Give the metric the number of resets of an uninterrupted fit"

        order = 60

        def before_epoch(self):
            if isinstance(self.learn.metrics[0], Value):
                self.learn.metrics[0].n = self.epoch

    for crash in ([Crash(2)], []):
        o = make()
        try:
            quiet(o, 3, cbs=[Checkpoint(tmp_path / 'fit.pt'), Number(), *crash])
        except InterruptedError:
            assert crash
    same(o, whole)
    assert all(type(a) is type(b) for a, b in zip(o.recorder.values[0], whole.recorder.values[0]))


class Foreign:
    pass


@pytest.mark.parametrize(
    'value', [Foreign(), range(3), lambda: 3, [1, {'a': Foreign()}]], ids=['object', 'range', 'function', 'nested']
)
def test_fault_01_an_unsavable_value_is_named_by_the_first_save(value, tmp_path):
    f = tmp_path / 'fit.pt'
    with pytest.raises(
        TypeError,
        match=r"value of 'odd' in epoch 0 is of a type that a checkpoint can't hold, .*(Foreign|range|function)",
    ):
        quiet(learner(tmp_path, metrics=Value(lambda n: value)), 3, cbs=Checkpoint(f))
    assert not list(tmp_path.glob('*fit.pt*'))


def test_fault_01_the_last_good_file_stays(tmp_path):
    "A value that can't be saved later leaves the file of the epochs before"
    f = tmp_path / 'fit.pt'
    with pytest.raises(TypeError, match="'odd' in epoch 2"):
        quiet(learner(tmp_path, metrics=Value(lambda n: n if n < 3 else Foreign())), 4, cbs=Checkpoint(f))
    assert done(f) == 2


def test_fault_01_state_of_a_callback(tmp_path):
    "Arrays in the state of a user's callback are restored; what can't be saved is named"

    class Counts(Callback):
        def __init__(self, more=None):
            self.n, self.more, self.got = np.zeros(3, int), more, None

        def after_epoch(self):
            self.n[self.epoch % 3] += 1

        def state_dict(self):
            return dict(n=self.n, more=self.more)

        def load_state_dict(self, state, learn):
            self.n = self.got = state['n']

    f = tmp_path / 'fit.pt'
    with pytest.raises(InterruptedError):
        quiet(learner(tmp_path), 5, cbs=[Checkpoint(f), Counts(), Crash(3)])
    quiet(learner(tmp_path), 5, cbs=[Checkpoint(f), counts := Counts()])
    assert counts.got is counts.n and counts.n.tolist() == [2, 2, 1]
    with pytest.raises(TypeError, match='callbacks/counts/more .*Foreign'):
        quiet(learner(tmp_path), 2, cbs=[Checkpoint(tmp_path / 'b.pt'), Counts(Foreign())])


# 2: optimizers


def test_fault_01_the_error_gives_no_advice_on_foreign_files(tmp_path):
    "PyTorch's advice, to trust the file, is of no use to one who saves"
    learn = learner(tmp_path, metrics=Value(lambda n: pd.Timestamp('2026-01-01')))
    with pytest.raises(TypeError, match="The value of '.*' in epoch 0 .* can't hold, .*Timestamp") as caught:
        quiet(learn, 1, cbs=Checkpoint(tmp_path/'fit.pt'))
    assert 'trust' not in str(caught.value) and '\x1b' not in str(caught.value)


def test_fault_01_a_callback_without_a_state_saves_none(tmp_path):
    "fastai delegates `cb.state_dict` to the model, whose weights would be saved once more for each callback"
    quiet(learner(tmp_path, cbs=ReflectiveLearning()), 1, cbs=Checkpoint(tmp_path/'fit.pt'))
    saved = torch.load(tmp_path/'fit.pt', weights_only=True)['callbacks']
    assert {'knowledge_review', 'loss_terms'} <= set(saved)
    assert not {'recorder', 'train_eval', 'reflective_learning', 'checkpoint'} & set(saved)


def another_loss(path): return learner(path, loss_func=BalancedSoftmaxLoss([1]*10))
def another_batch_size(path): return learner(path, dls=digits_lt(device='cpu', n_max=40, bs=48))
def without_reflective_learning(path): return learner(path)


@pytest.mark.parametrize('make, said', [
    (another_loss, 'loss function.*CrossEntropyLoss.* there, BalancedSoftmax.* here'),
    (another_batch_size, r'batch size \(32 there, 48 here\)'),
    (without_reflective_learning, 'holds the state of .*knowledge_review.* this fit has no such callback')])
def test_fault_09_another_fit_is_refused_before_it_starts(make, said, tmp_path):
    "Its state would be lost, or loaded into something else, after an epoch or more"
    cbs = ReflectiveLearning() if make is without_reflective_learning else None
    with pytest.raises(InterruptedError):
        quiet(learner(tmp_path, cbs=cbs), 3, cbs=[Checkpoint(tmp_path/'fit.pt'), Crash(1)])
    changed = make(tmp_path)
    before = weights(changed)
    with pytest.raises(ValueError, match=f'(?s)another fit.*{said}'):
        quiet(changed, 3, cbs=Checkpoint(tmp_path/'fit.pt'))
    assert torch.equal(weights(changed), before) and done(tmp_path/'fit.pt') == 1
    again = learner(tmp_path, cbs=ReflectiveLearning() if cbs else None)
    same_again = quiet(again, 3, cbs=Checkpoint(tmp_path/'fit.pt'))
    assert len(same_again.recorder.values) == 3


def wrapped(cls, **kwargs):
    return partial(OptimWrapper, opt=cls, **kwargs)


def tensor_step(p, step=None, **kwargs):
    "Count steps in a tensor, in place"
    step = torch.zeros(()) if step is None else step
    return {'step': step.add_(1)}


def slower(p, lr, step, **kwargs):
    p.data.add_(p.grad.data, alpha=-lr / step.item())


def CountingSGD(params, lr, **kwargs):
    from fastai.optimizer import Optimizer

    return Optimizer(params, [tensor_step, slower], lr=lr)


def lookahead_sgd(params, lr, **kwargs):
    return Lookahead(SGD(params, lr=lr, mom=0.9), k=3)


optimizers = dict(
    sgd=partial(SGD, mom=0.9),
    plain=SGD,
    rmsprop=RMSProp,
    adam=Adam,
    radam=RAdam,
    qhadam=QHAdam,
    larc=Larc,
    lars=partial(Larc, clip=False),
    lamb=Lamb,
    ranger=ranger,
    lookahead=lookahead_sgd,
    counting=CountingSGD,
    **{
        f'torch-{k}': wrapped(getattr(torch.optim, k))
        for k in ('SGD', 'Adam', 'AdamW', 'RMSprop', 'Adagrad', 'NAdam', 'Adamax', 'Adadelta', 'ASGD', 'Rprop')
    },
    momentum=wrapped(torch.optim.SGD, momentum=0.9, nesterov=True),
    amsgrad=wrapped(torch.optim.Adam, amsgrad=True),
)


@pytest.mark.slow
@pytest.mark.parametrize('opt_func', optimizers.values(), ids=optimizers)
def test_fault_02_any_optimizer_is_resumed(opt_func, tmp_path):
    def make():
        return learner(tmp_path, opt_func=opt_func)

    whole = quiet(make(), 4)
    same(killed_and_resumed(make, tmp_path / 'fit.pt', crashes=(2, 1)), whole)


@pytest.mark.parametrize('name', ['adam', 'ranger', 'torch-AdamW', 'momentum'])
def test_fault_02_frozen_groups(name, tmp_path):
    "`fine_tune`, interrupted in either of its fits"
    opt_func, f = optimizers[name], tmp_path / 'fit.pt'
    whole = run_fine_tune(opt_func, tmp_path, None)
    for n, at in ((2, 1), (3, 2)):
        with pytest.raises(InterruptedError):
            run_fine_tune(opt_func, tmp_path, f, Out(n, at))
    same(run_fine_tune(opt_func, tmp_path, f), whole)


class Out(Callback):
    order = -100

    def __init__(self, n, at):
        self.n, self.at = n, at

    def before_batch(self):
        if self.training and (self.n_epoch, self.epoch, self.iter) == (self.n, self.at, 1):
            raise InterruptedError('crash')


def run_fine_tune(opt_func, path, file, *cbs):
    learn = learner(path, opt_func=opt_func, splitter=lambda m: [params(m[:3]), params(m[3:])])
    return quiet(learn, 3, 0.01, 'fine_tune', freeze_epochs=2, cbs=[*([Checkpoint(file)] if file else []), *cbs])


class Forgetful(torch.optim.SGD):
    "Count steps where no `state_dict` looks"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n = 0

    def step(self, closure=None):
        self.n += 1
        for group in self.param_groups:
            group['lr'] = 0.1 / self.n
        return super().step(closure)


class Unreadable(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), 'lambda': Foreign()}


class Steps(Callback):
    n = 0

    def after_step(self):
        self.n += 1


@pytest.mark.parametrize(
    'cls,said',
    [
        (Forgetful, "`state_dict` doesn't hold all"),
        (Unreadable, "can't be saved and loaded"),
        (torch.optim.LBFGS, 'closure'),
    ],
)
def test_fault_02_refused_before_the_first_step(cls, said, tmp_path):
    learn = learner(tmp_path, opt_func=wrapped(cls))
    before = weights(learn)
    cbs = [Checkpoint(tmp_path / 'fit.pt'), steps := Steps()]
    with pytest.raises(ValueError, match=f'could not be resumed with its optimizer, {cls.__name__}: .*{said}'):
        quiet(learn, 3, cbs=cbs)
    assert not steps.n and torch.equal(weights(learn), before) and not list(tmp_path.glob('*fit.pt*'))


def test_fault_02_the_trial_leaves_no_trace(tmp_path):
    "PyTorch's hooks and schedulers are not called, and an optimizer that draws random numbers is not affected"

    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group['params']:
                        p.add_(torch.randn_like(p), alpha=1e-3)

    def make():
        return learner(tmp_path, opt_func=wrapped(Noisy, momentum=0.9))

    def count_calls(cbs):
        "How often a hook was called: more than once for a step if a class calls `step` of its base"
        learn, calls = make(), []
        learn.create_opt()
        learn.opt.opt.register_step_post_hook(lambda *args: calls.append(1))
        torch.optim.lr_scheduler.ExponentialLR(learn.opt.opt, 0.9)
        return quiet(learn, 3, cbs=cbs), len(calls)

    learn, calls = count_calls(Checkpoint(tmp_path / 'a.pt'))
    whole, expected = count_calls([])
    assert torch.equal(weights(learn), weights(whole)) and calls == expected
    assert calls >= 3 * len(learn.dls.train)
    same(killed_and_resumed(make, tmp_path / 'fit.pt', n=3), whole)


def test_fault_02_another_optimizer_with_the_same_hyperparameters_is_another_fit(tmp_path):
    f = tmp_path / 'fit.pt'
    with pytest.raises(InterruptedError):
        quiet(learner(tmp_path, opt_func=Adam), 4, cbs=[Checkpoint(f), Crash(2)])
    with pytest.raises(ValueError, match='another kind of optimizer'):
        quiet(learner(tmp_path, opt_func=Lamb), 4, cbs=Checkpoint(f))


class Skipping(nn.Module):
    "A net that skips its middle layer in every other batch"

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last, self.n = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10), 0

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        self.n += self.training
        return self.last(self.middle(x) if self.n % 2 else x)


def test_fault_02_gradients_of_zero_are_restored(tmp_path):
    "A layer that the first batch skips is moved by its momentum, resumed or not"

    class Alternate(Callback):
        def before_train(self):
            self.model.n = 1

    def make():
        return learner(tmp_path, make=Skipping, cbs=Alternate())

    same(killed_and_resumed(make, tmp_path / 'fit.pt'), quiet(make(), 4))


def test_fault_02_what_was_unfrozen_within_a_fit_is_restored(tmp_path):
    class Thaw(Callback):
        def before_epoch(self):
            if self.epoch == 0:
                self.learn.freeze()
            if self.epoch == 1:
                self.learn.unfreeze()
            if self.epoch == 2:
                self.learn.freeze()

    def make():
        return learner(tmp_path, splitter=lambda m: [params(m[:3]), params(m[3:])], cbs=Thaw(), train_bn=False)

    whole, again = quiet(make(), 5), killed_and_resumed(make, tmp_path / 'fit.pt', n=5, crashes=(2, 2))
    same(again, whole)
    assert [p.requires_grad for p in again.model.parameters()] == [False] * 4 + [True] * 2 and again.opt.frozen_idx == 1


def test_fault_02_a_loss_with_buffers(tmp_path):
    "Buffers of the loss function are restored"

    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('shares', torch.full((10,), 0.1))
            self.register_buffer('last', None)

        def forward(self, pred, y):
            if pred.requires_grad:
                self.shares = 0.9 * self.shares + 0.1 * torch.bincount(y, minlength=10) / len(y)
                self.last = self.shares.clone()
            return nn.functional.cross_entropy(pred + self.shares.log(), y.as_subclass(torch.Tensor))

    def make():
        return learner(tmp_path, loss_func=Prior())

    whole, again = quiet(make(), 4), killed_and_resumed(make, tmp_path / 'fit.pt')
    same(again, whole)
    assert again.loss_func.last.equal(whole.loss_func.last)


# 3: callbacks that validate or predict within a fit


class Within(Callback):
    "Do something with the learner at an event"

    busy, active = False, True

    def __init__(self, do, event, order=0):
        self.do, self.order = do, order
        setattr(self, event, self.act)

    def act(self):
        if self.busy or self.learn.lock.locked():
            return
        self.busy = True
        training, dl, n_iter, i, epoch = [
            getattr(self.learn, k, None) for k in ('training', 'dl', 'n_iter', 'iter', 'epoch')
        ]
        batch = {k: getattr(self.learn, k) for k in ('xb', 'yb', 'pred', 'loss') if hasattr(self.learn, k)}
        try:
            self.do(self.learn)
        finally:
            self.busy = False
        if training:  # fastai leaves the learner as after validation
            self.model.train()
            self.learn.training, self.learn.dl, self.learn.n_iter, self.learn.iter = True, dl, n_iter, i
            for k, v in batch.items():
                setattr(self.learn, k, v)


passes = dict(
    validate=lambda o: o.validate(),
    get_preds=lambda o: o.get_preds(),
    train_preds=lambda o: o.get_preds(ds_idx=0),
    report=lambda o: ShotReport.from_learner(o),
    predict=lambda o: o.predict(o.dls.valid_ds.images[0]),
)


events = ['after_epoch', 'before_epoch', 'after_batch', 'after_validate', 'before_fit']
orders = [0, 55, 1000]
# every pass at every event, and each of them in every order: all pairs of the 75 combinations
pairwise = [(do, event, orders[(i + j) % 3]) for i, do in enumerate(passes) for j, event in enumerate(events)]


@pytest.mark.slow
@pytest.mark.parametrize('do,event,order', pairwise)
def test_fault_03_passes_within_a_fit(do, event, order, tmp_path):
    if event == 'after_batch' and order == 1000:
        order = 40

    def make():
        within = Within(passes[do], event, order)
        return learner(tmp_path, cbs=[ReflectiveLearning(kr=True, ks=True, kc=True), within])

    def fit(file, *cbs):
        learn = make()
        return quiet(learn, 3, cbs=[Checkpoint(file), *cbs])

    whole = fit(tmp_path / 'whole.pt')
    with pytest.raises(InterruptedError):
        fit(tmp_path / 'fit.pt', Crash(2))
    assert done(tmp_path / 'fit.pt') == 2 and done(tmp_path / 'whole.pt') == 3
    same(fit(tmp_path / 'fit.pt'), whole)


@pytest.mark.parametrize(
    'do', [passes['validate'], passes['get_preds'], passes['report']], ids=['validate', 'get_preds', 'report']
)
def test_fault_03_every_third_epoch(do, tmp_path):
    "The file is of the right epoch"
    f = tmp_path / 'fit.pt'
    quiet(learner(tmp_path, cbs=Within(do, 'after_epoch')), 7, cbs=Checkpoint(f, every=3))
    assert done(f) == 7 and done(tmp_path / 'fit.pt.older') == 6


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    res, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for c, n in dict(cat=14, dog=9, lynx=6).items():
        (res / c).mkdir()
        for i in range(n):
            PIL.Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(res / c / f'{i}.png')
    return res


class Holder(Callback):
    "Predict a loader of its own after each epoch from `since` on"

    def __init__(self, dl, since):
        self.dl, self.since = dl, since

    def after_epoch(self):
        if self.learn.lock.locked() or self.epoch < self.since:
            return
        epoch = self.epoch
        self.learn.get_preds(dl=self.dl)
        self.learn.epoch = epoch


@pytest.mark.parametrize('first', [0, 1, 2, 3])
@pytest.mark.parametrize('held', [False, True], ids=['of the learner', 'of the callback'])
def test_fault_03_how_loaders_were_used(folder, first, held, tmp_path):
    "fastai draws random numbers when it first copies a loader, before the kill or after it"

    def make():
        set_seed(0, reproducible=True)
        dls = ImageDataLoaders.from_folder(
            folder,
            valid_pct=0.3,
            seed=1,
            item_tfms=RandomResizedCrop(16),
            batch_tfms=aug_transforms(size=16),
            bs=4,
            device='cpu',
            num_workers=0,
        )
        own = TfmdDL(
            dls.train_ds,
            bs=4,
            after_item=[RandomResizedCrop(16), ToTensor()],
            after_batch=[IntToFloatTensor()],
            num_workers=0,
        )
        model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))

        def do(learn):
            if seen.epochs >= first:
                learn.get_preds(ds_idx=0)

        seen = Count()
        return Learner(
            dls,
            model,
            loss_func=CrossEntropyLossFlat(),
            opt_func=SGD,
            path=tmp_path,
            cbs=[seen, Holder(own, first) if held else Within(do, 'after_epoch', 300)],
        )

    whole = quiet(make(), 4, cbs=Checkpoint(tmp_path / 'whole.pt'))
    same(killed_and_resumed(make, tmp_path / 'fit.pt', crashes=(2,)), whole)


class Count(Callback):
    "Count epochs, also in a fit that is resumed"

    def before_fit(self):
        if not self.learn.lock.locked():
            self.epochs = -1

    def before_train(self):
        self.epochs = round(self.learn.pct_train * self.n_epoch)


def test_fault_03_a_generator_of_a_loader(tmp_path):
    "A PyTorch loader whose order comes from a generator of the user"

    def make():
        set_seed(0)
        x = torch.randn(60, 64)
        ds = torch.utils.data.TensorDataset(x, torch.arange(60) % 10)
        dl = torch.utils.data.DataLoader(ds, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(1))
        return Learner(
            DataLoaders(dl, torch.utils.data.DataLoader(ds, batch_size=20)),
            net(),
            loss_func=CrossEntropyLossFlat(),
            opt_func=SGD,
            path=tmp_path,
        )

    same(killed_and_resumed(make, tmp_path / 'fit.pt'), quiet(make(), 4))


def test_fault_03_tta_with_a_checkpoint_that_stays(tmp_path):
    "`tta` triggers the events of a fit, and is none"
    f = tmp_path / 'fit.pt'
    learn = quiet(learner(tmp_path, cbs=Checkpoint(f)), 2)
    kept, cbs = f.read_bytes(), list(learn.cbs)
    with learn.no_bar(), learn.no_logging():
        preds, _ = learn.tta(dl=learn.dls.valid)
    assert len(preds) == len(learn.dls.valid_ds) and f.read_bytes() == kept
    assert [type(o) for o in learn.cbs][:3] == [type(o) for o in cbs][:3]
    quiet(learn, 2)
    assert done(tmp_path / 'fit.pt.next') == 2


# one Checkpoint, several learners


def test_swapped_learners_are_each_saved_as_themselves(tmp_path):
    "The callback is added to a second learner before the first is fitted: each file is of the fitted learner"
    f = tmp_path / 'fit.pt'
    cp = Checkpoint(f)
    a = learner(tmp_path, cbs=cp)
    b = learner(tmp_path, cbs=cp, make=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    quiet(a, 2)
    kept = torch.load(f, weights_only=True)['model']
    assert kept.keys() == a.model.state_dict().keys() and all(v.equal(kept[k]) for k, v in a.model.state_dict().items())
    quiet(b, 2)
    kept = torch.load(tmp_path / 'fit.pt.next', weights_only=True)['model']
    assert all(v.equal(kept[k]) for k, v in b.model.state_dict().items()) and len(kept) == 2


def test_swapped_learners_after_a_crash(tmp_path):
    "A notebook creates a new learner, and keeps the callback"
    cp = Checkpoint(tmp_path / 'fit.pt')
    whole = quiet(learner(tmp_path), 4)
    with pytest.raises(InterruptedError):
        quiet(learner(tmp_path), 4, cbs=[cp, Crash(2)])
    same(quiet(learner(tmp_path), 4, cbs=cp), whole)


def test_swapped_learners_in_turn(tmp_path):
    "Folds of a cross-validation with one callback: after a crash in the second, the first is skipped"

    def folds(*crash):
        cp, res = Checkpoint(tmp_path / 'fit.pt'), []
        for i in range(3):
            res.append(quiet(learner(tmp_path), 3, 0.01 * (i + 1), cbs=[cp, *(crash if i == 1 else ())]))
        return res

    with pytest.raises(InterruptedError):
        folds(Crash(2))
    again = folds()
    for i, o in enumerate(again):
        same(o, quiet(learner(tmp_path), 3, 0.01 * (i + 1)))


# 4: logs and trackers


def rows(file):
    return [','.join(o.split(',')[:-1]) for o in file.read_text().splitlines()]  # but for the time


def logged(path, append=False, *cbs, n=5, every=1):
    with (o := learner(path, metrics=lambda p, y: p.argmax(1).eq(y).float().mean())).no_bar():
        o.logger = lambda row: None
        o.fit(n, 1e-2, cbs=[CSVLogger(append=append), Checkpoint(path / 'fit.pt', every=every), *cbs])
    return o


@pytest.mark.parametrize('append', [False, True])
@pytest.mark.parametrize('every', [1, 2])
def test_fault_04_a_log_is_resumed(append, every, tmp_path):
    "No row is lost or repeated, and there is one header; earlier rows stay if rows are appended"
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    for o in (whole, part):
        o.mkdir()
        if append:
            (o / 'history.csv').write_text('epoch,of another fit\n0,1\n')
    logged(whole, append)
    for at in (1, 2) if every == 1 else (3, 1):
        with pytest.raises(InterruptedError):
            logged(part, append, Crash(at), every=every)
    logged(part, append, every=every)
    assert rows(part / 'history.csv') == rows(whole / 'history.csv')
    assert len(rows(part / 'history.csv')) == 6 + 2 * append
    logged(part, append, every=every)  # a finished fit
    assert rows(part / 'history.csv') == rows(whole / 'history.csv')


def test_fault_04_others_write_to_the_same_log(tmp_path):
    "Between kill and resume: all rows are there, and ours are together"
    with pytest.raises(InterruptedError):
        logged(tmp_path, True, Crash(3), every=2)
    file = tmp_path / 'history.csv'
    first = rows(file)
    assert len(first) == 4
    with file.open('a') as o:
        o.write('epoch,mine\n0,a\n1,b\n')
    logged(tmp_path, True, every=2)
    got = file.read_text().splitlines()
    assert got[:3] == ['epoch,mine', '0,a', '1,b'] and rows(file)[3:6] == first[:3]
    assert [o.split(',')[0] for o in got[3:]] == ['epoch', *'01234']


@pytest.mark.parametrize(
    'spoil', [lambda f: f.unlink(), lambda f: f.write_text(f.read_text()[:-7])], ids=['gone', 'half a row']
)
@pytest.mark.parametrize('append', [False, True])
def test_fault_04_a_log_that_was_lost(spoil, append, tmp_path):
    with pytest.raises(InterruptedError):
        logged(tmp_path, append, Crash(3))
    first = rows(tmp_path / 'history.csv')
    spoil(tmp_path / 'history.csv')
    logged(tmp_path, append)
    restored = rows(tmp_path / 'history.csv')
    assert [o.split(',')[0] for o in restored][-6:] == ['epoch', *'01234'] and restored[-6:-2] == first


def test_fault_04_of_two_fits(tmp_path):
    "`fine_tune` appends two tables; it is interrupted in either fit"

    def run(path, *cbs):
        o = learner(path, splitter=lambda m: [params(m[:3]), params(m[3:])])
        with o.no_bar():
            o.logger = lambda row: None
            o.fine_tune(3, 1e-2, freeze_epochs=2, cbs=[CSVLogger(append=True), Checkpoint(path / 'fit.pt'), *cbs])
        return rows(path / 'history.csv')

    whole, part = tmp_path / 'whole', tmp_path / 'part'
    whole.mkdir()
    part.mkdir()
    expected = run(whole)
    for out in (Out(2, 1), Out(3, 1)):
        with pytest.raises(InterruptedError):
            run(part, out)
    assert run(part) == expected and len(expected) == 7


class Fixed(Metric):
    "A metric with a given value for each epoch"

    def __init__(self, values):
        self.values = values

    def accumulate(self, learn):
        self.epoch = learn.epoch

    @property
    def value(self):
        return self.values[self.epoch]

    @property
    def name(self):
        return 'fixed'


class See(Callback):
    order = 100

    def __init__(self, *cbs):
        self.cbs, self.seen = cbs, []

    def after_epoch(self):
        self.seen.append([(o.best, getattr(o, 'wait', None)) for o in self.cbs])


@pytest.mark.parametrize('crash', [1, 2, 3, 4])
def test_fault_04_trackers_are_resumed(crash, tmp_path):
    "Best value and count of each, also where there are two of a class"

    def run(path, *more):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            trackers = [
                SaveModelCallback(monitor='fixed', fname='best'),
                SaveModelCallback(monitor='valid_loss', fname='loss'),
                ReduceLROnPlateau(monitor='fixed', patience=2),
                EarlyStoppingCallback(monitor='fixed', patience=4),
                EarlyStoppingCallback(monitor='fixed', comp=np.less, patience=9),
            ]
        path.mkdir(exist_ok=True)
        o, see = learner(path, metrics=Fixed([0.3, 0.5, 0.4, 0.2, 0.1, 0.45, 0.7, 0.8])), See(*trackers)
        quiet(o, 8, cbs=[*trackers, see, Checkpoint(path / 'fit.pt'), *more])
        return o, see.seen

    whole, want = run(tmp_path / 'whole')
    with pytest.raises(InterruptedError):
        run(tmp_path / 'part', Crash(crash))
    again, got = run(tmp_path / 'part')
    same(again, whole)
    assert got == want[crash:] and len(want) == 6 - 1
    a, b = [torch.load(tmp_path / o / 'models/best.pth', weights_only=True) for o in ('whole', 'part')]
    assert all(v.equal(b[k]) for k, v in a.items())


# 5: export


def exported(learn, dls, path):
    "Predictions of a learner, which keeps its loaders, and of one that is loaded from its export"
    loaders = learn.dls
    learn.export(path / 'export.pkl')
    assert learn.dls is loaders and learn.dls.loaders[0] is loaders.loaders[0] and len(learn.dls.train_ds)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(path / 'export.pkl')
    x = dls.valid_ds.images[:20]
    with learn.no_bar(), other.no_bar():
        return [o.get_preds(dl=o.dls.test_dl(list(x)))[0] for o in (learn, other)]


@pytest.mark.parametrize('name', from_scratch)
def test_fault_05_export_after_every_method(name, dls, tmp_path):
    counts = class_counts(dls)
    method = methods[name]
    if method.views > 1 or any(s.views > 1 for s in method.later_stages) or name == 'bbn':
        dls = digits_lt(device='cpu', n_max=40)
    learn = method.learner(dls, create_net('resnet8', 10, n_in=1), opt_func=partial(SGD, mom=0.9), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        method.fit(learn, 1, 0.01)
    a, b = exported(learn, dls, tmp_path)
    assert torch.equal(a, b) and a.isfinite().all() and len(counts) == 10
    quiet(learn, 1)  # it can still be trained


@pytest.mark.parametrize('opt_func', [Adam, ranger, wrapped(torch.optim.AdamW)], ids=['adam', 'ranger', 'wrapped'])
@pytest.mark.parametrize('prepare', [mean_head, tau_norm_head], ids=['ncm', 'tau'])
def test_fault_05_stages_by_hand(prepare, opt_func, dls, tmp_path):
    "Without `Method.fit`, twice in a row, with any optimizer, and with a frozen body"
    for frozen in (False, True):
        learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, path=tmp_path)
        quiet(learn, 1)
        for p in learn.model[:-1].parameters():
            p.requires_grad_(not frozen)
        prepare(learn)
        a, b = exported(learn, dls, tmp_path)
        assert torch.equal(a, b) and learn.model[1].weight.requires_grad != frozen
        exported(learn, dls, tmp_path)


def test_fault_05_a_new_head_is_trained_afterwards(dls, tmp_path):
    "The optimizer has the new parameters"
    learn = quiet(Learner(dls, net(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, path=tmp_path), 1)
    with learn.no_bar(), learn.no_logging():
        Method('', '', later_stages=(tau_norm,)).fit(learn, 2, 0.01, first=lambda *args: None)
    before = learn.model[-1].weight.detach().clone()
    quiet(learn, 1)
    assert not learn.model[-1].weight.equal(before)


def test_fault_05_two_stages_without_training(dls, tmp_path):
    "Also for a net without BatchNorm"
    learn = quiet(
        Learner(
            dls,
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
            loss_func=CrossEntropyLossFlat(),
            path=tmp_path,
        ),
        1,
    )
    with learn.no_bar(), learn.no_logging():
        Method('', '', later_stages=(tau_norm, ncm)).fit(learn, 1, 0.01, first=lambda *args: None)
    a, b = exported(learn, dls, tmp_path)
    assert torch.equal(a, b)


# 19: a shot without validation images


def shots(path, known=True, classes=4, **kwargs):
    "A learner whose validation images are of the most frequent classes only"
    dls = digits_lt(device='cpu', n_max=40)
    n, ds = class_counts(dls), dls.valid_ds
    ids = (ds.targets < classes).nonzero().flatten()
    part = type(ds)(ds.x[ids], ds.targets[ids], ds.vocab, 1)
    if not known:
        pairs = [(x, y) for x, y in zip(ds.x[ids].float() / 255, ds.targets[ids])]

        class WithoutTargets(torch.utils.data.Dataset):
            def __len__(self):
                return len(pairs)

            def __getitem__(self, i):
                return pairs[i]

        dls = DataLoaders(dls.train, torch.utils.data.DataLoader(WithoutTargets(), batch_size=32))
    else:
        dls = DataLoaders(dls.train, dls.valid.new(part))
    return Learner(
        dls, net(), loss_func=CrossEntropyLossFlat(), metrics=shot_accuracies(n, many=20, few=8), path=path, **kwargs
    )


def said_in(f):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in warned if 'monitors' in str(o.message)]


trackers = dict(
    save=(SaveModelCallback, 'SaveModelCallback', 'saves the model of the last epoch'),
    stop=(EarlyStoppingCallback, 'EarlyStoppingCallback', 'stops'),
    reduce=(ReduceLROnPlateau, 'ReduceLROnPlateau', 'reducing'),
)


class CountWarnings(Callback):
    "Count the warnings before the first batch"

    order = -100

    def __init__(self, warned):
        self.warned, self.n = warned, None

    def before_batch(self):
        if self.n is None:
            self.n = sum('monitors' in str(o.message) for o in self.warned)


@pytest.mark.parametrize('cls,name,effect', trackers.values(), ids=trackers)
def test_fault_19_warned_once_at_the_start(cls, name, effect, tmp_path):
    learn = shots(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        quiet(learn, 2, cbs=[cls(monitor='few'), count := CountWarnings(warned)])
        learn.validate()
    said = [str(o.message) for o in warned if 'monitors' in str(o.message)]
    assert len(said) == count.n == 1
    assert (
        f"{name} monitors 'few'" in said[0]
        and effect in said[0]
        and "Monitor 'all' or 'many'" in said[0]
        and 'no image of a Few-shot class' in said[0]
    )


def test_fault_19_nothing_fails_when_training_is_over(tmp_path):
    "The last model is saved; a later fit with Few-shot images saves its best again"
    learn = shots(tmp_path)
    save = SaveModelCallback(monitor='few')
    assert len(said_in(lambda: quiet(learn, 2, cbs=save))) == 1
    kept = torch.load(tmp_path / 'models/model.pth', weights_only=True)
    assert all(v.equal(kept[k]) for k, v in learn.model.state_dict().items())
    other = shots(tmp_path, classes=10)
    assert not said_in(lambda: quiet(other, 2, cbs=save)) and save.at_end is False and save.best >= 0


@pytest.mark.parametrize('monitor', ['few', 'medium', 'valid_few'])
def test_fault_19_other_columns(monitor, tmp_path):
    learn = shots(tmp_path, classes=1)
    if monitor == 'valid_few':
        learn.recorder.train_metrics = True
    said = said_in(
        lambda: quiet(learn, 1, cbs=[ReduceLROnPlateau(monitor=monitor), EarlyStoppingCallback(monitor='valid_loss')])
    )
    assert len(said) == 1 and f"'{monitor}'" in said[0] and 'EarlyStopping' not in said[0]


def test_fault_19_no_warning_where_a_value_is_measured_or_not_needed(tmp_path):
    "`every_epoch`, other columns, `lr_find`, and reading the names give no warning"
    learn = shots(tmp_path)
    measured = [
        SaveModelCallback(monitor='all'),
        SaveModelCallback(monitor='few', every_epoch=True),
        SaveModelCallback(monitor='valid_loss'),
        EarlyStoppingCallback(monitor='many', patience=9),
    ]
    assert not said_in(lambda: [quiet(learn, 1, cbs=o) for o in measured])
    learn.add_cb(EarlyStoppingCallback(monitor='few'))

    def without_fit():
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=20, show_plot=False)
            learn.validate()
            learn.get_preds()
        assert learn.metrics.attrgot('name') == ['many', 'medium', 'few', 'all']

    assert not said_in(without_fit)
    for _ in range(2):  # once for each fit
        assert len(said_in(lambda: quiet(learn, 1))) == 1


def test_fault_19_where_targets_are_not_known(tmp_path):
    "One warning, after the first epoch"
    learn = shots(tmp_path, known=False)
    said = said_in(lambda: quiet(learn, 3, cbs=SaveModelCallback(monitor='few')))
    assert len(said) == 1 and 'the first epoch had no image' in said[0] and (tmp_path / 'models/model.pth').exists()


def test_fault_19_no_such_column(tmp_path):
    "No class is Few-shot: an error with a reason, before training"
    learn = shots(tmp_path)
    learn.metrics = shot_accuracies(class_counts(learn.dls), many=20, few=0)
    with pytest.raises(
        LookupError, match="monitors 'few', and there is no such column, .* Monitor 'many' or 'medium' or 'all'"
    ):
        quiet(learn, 2, cbs=[SaveModelCallback(monitor='few'), steps := Steps()])
    assert not steps.n


def test_fault_19_with_a_checkpoint(tmp_path):
    "A resumed fit saves the last model too"
    f = tmp_path / 'fit.pt'

    def make():
        set_seed(0, reproducible=True)
        return shots(tmp_path)

    said_in(
        lambda: pytest.raises(
            InterruptedError, quiet, make(), 3, cbs=[SaveModelCallback(monitor='few'), Checkpoint(f), Crash(2)]
        )
    )
    learn = make()
    assert len(said_in(lambda: quiet(learn, 3, cbs=[SaveModelCallback(monitor='few'), Checkpoint(f)]))) == 1
    kept = torch.load(tmp_path / 'models/model.pth', weights_only=True)
    assert all(v.equal(kept[k]) for k, v in learn.model.state_dict().items()) and math.isnan(
        learn.recorder.values[-1][4]
    )
    assert os.path.getsize(f) and deepcopy(learn.metrics[0]).name == 'many'


# Further cases


class Title(str):
    pass


odd_values = dict(
    title=lambda n: Title('a'),
    view=lambda n: torch.rand(1000, 1000)[0, :2] * 0 + n,
    graph=lambda n: torch.ones(2, requires_grad=True) * n,
    structured=lambda n: np.array([(1, 2.0)] * 2, 'i4,f8'),
    nan=lambda n: {'a': [np.float64('nan'), None]},
)


@pytest.mark.parametrize('f', odd_values.values(), ids=odd_values)
def test_fault_01_more_values(f, tmp_path):
    file = tmp_path / 'fit.pt'
    quiet(learner(tmp_path, metrics=Value(f)), 2, cbs=Checkpoint(file))
    again = quiet(learner(tmp_path, metrics=Value(f)), 2, cbs=Checkpoint(file))
    got, want = again.recorder.values[0][2], f(1)
    assert len(again.recorder.values) == 2 and file.stat().st_size < 300_000
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else repr(got) == repr(want)


def test_fault_01_metrics_of_training_images_too(tmp_path):
    def make():
        learn = learner(tmp_path, metrics=Recall(average=None))
        learn.recorder.train_metrics = True
        return learn

    same(killed_and_resumed(make, tmp_path / 'fit.pt'), quiet(make(), 4))


def test_fault_02_an_optimizer_that_was_made_beforehand(tmp_path):
    "fastai accepts a wrapped optimizer in place of a function"

    def make():
        set_seed(0)
        model = net()
        opt = torch.optim.AdamW(
            [dict(params=model[:3].parameters(), lr=0.1), dict(params=model[3:].parameters(), lr=0.2)]
        )
        return learner(tmp_path, make=lambda: model, opt_func=OptimWrapper(opt=opt))

    same(killed_and_resumed(make, tmp_path / 'fit.pt'), quiet(make(), 4))


@pytest.mark.parametrize('call', ['fit_one_cycle', 'fit_flat_cos'])
@pytest.mark.parametrize('name', ['ranger', 'torch-AdamW', 'lars'])
def test_fault_02_schedules_and_rates_by_group(call, name, tmp_path):
    def make():
        return learner(tmp_path, opt_func=optimizers[name], splitter=lambda m: [params(m[:3]), params(m[3:])])

    kwargs = dict(n=5, lr=slice(1e-3, 1e-2), call=call)
    same(killed_and_resumed(make, tmp_path / 'fit.pt', every=2, crashes=(3,), **kwargs), quiet(make(), **kwargs))


def test_fault_02_a_fit_after_another(tmp_path):
    "The optimizer has a state when the fit with the checkpoint begins"

    def make():
        return quiet(learner(tmp_path, opt_func=ranger), 2)

    same(killed_and_resumed(make, tmp_path / 'fit.pt'), quiet(make(), 4))


def validate_alone(learn):
    with learn.removed_cbs([o for o in learn.cbs if not isinstance(o, (TrainEvalCallback, Within))]):
        learn._do_epoch_validate()


def look_at_training(learn):
    ShotReport.from_learner(learn, dl=learn.dls.train.new(shuffle=False, drop_last=False))


@pytest.mark.parametrize(
    'do,event',
    [
        (validate_alone, 'after_epoch'),
        (look_at_training, 'after_train'),
        (lambda o: o.get_preds(inner=True), 'after_epoch'),
        (lambda o: o.get_preds(with_loss=True), 'after_epoch'),
    ],
)
def test_fault_03_more_passes(do, event, tmp_path):
    def make():
        return learner(tmp_path, cbs=[GradientAccumulation(100), Within(do, event, 30)])

    whole = quiet(make(), 4, cbs=Checkpoint(tmp_path / 'whole.pt', every=2))
    assert done(tmp_path / 'whole.pt') == 4 and done(tmp_path / 'whole.pt.older') == 2
    same(killed_and_resumed(make, tmp_path / 'fit.pt', crashes=(3,), every=2), whole)


fits_within = dict(
    lr_find=lambda o: o.lr_find(num_it=6, show_plot=False),
    same_fit=lambda o: o.fit(3, 1e-2),
    other_fit=lambda o: o.fit_one_cycle(1, 1e-3),
    fit_of_a_copy=lambda o: deepcopy(o).fit(1, 1e-3),
)


class InSecondEpoch(Within):
    "Do something with the learner at the second time of an event; nothing in a fit that goes on after it"

    times = 0

    def act(self):
        self.times += not self.busy
        if self.times == 2:
            super().act()


class CrashWhenDone(Crash):
    "Raise an error in the first epoch after so many of the checkpoint"

    def __init__(self, n, file):
        self.n, self.file = n, file

    def before_train(self):
        if self.file.exists() and done(self.file) == self.n:
            raise InterruptedError('crash')

    def before_batch(self): ...


@pytest.mark.parametrize('do,event', zip(fits_within, ['before_epoch', 'after_epoch'] * 2, strict=True))
def test_fault_03_fits_within_a_fit(do, event, tmp_path):
    "They change the learner's number of epochs, and are no fits to resume"

    def fit(file, *cbs):
        within = InSecondEpoch(fits_within[do], event)
        return quiet(learner(tmp_path, cbs=within), 3, cbs=[Checkpoint(tmp_path / file), *cbs])

    whole = fit('whole.pt')
    file = tmp_path / 'fit.pt'
    with pytest.raises(InterruptedError):
        fit(file, CrashWhenDone(2, file))
    same(fit(file), whole)
    assert done(file) == done(tmp_path / 'whole.pt') == 3
    assert not list(tmp_path.glob('*.next'))


class Computed:
    "A data set that computes its items"

    def __init__(self, seed):
        self.seed, self.calls = seed, 0

    def __len__(self):
        return 40

    def __getitem__(self, i):
        self.calls += 1
        return torch.randn(64, generator=torch.Generator().manual_seed(int(100 * self.seed + i))), i % 10


class ById:
    "A data set that keeps its items in a dict"

    def __init__(self, value):
        self.by_id = {i: (torch.full((64,), float(value if i == 7 else i)), i % 10) for i in range(40)}

    def __len__(self):
        return len(self.by_id)

    def __getitem__(self, i):
        return self.by_id[i]


def on(train, **kwargs):
    valid = DataLoader(Computed(5), bs=20)
    return dict(dls=DataLoaders(DataLoader(train, bs=20, **kwargs), valid, device='cpu'))


def weighted(weight):
    weights = np.ones(40)
    weights[:9] = weight
    dl = WeightedDL(Computed(0), bs=20, wgts=weights, shuffle=True, num_workers=0, device='cpu')
    return dict(dls=DataLoaders(dl, DataLoader(Computed(5), bs=20), device='cpu'))


def augmented(degrees):
    dl = TfmdDL(Computed(0), bs=20, after_batch=[Rotate(max_deg=degrees)], num_workers=0, device='cpu')
    return dict(dls=DataLoaders(dl, DataLoader(Computed(5), bs=20), device='cpu'))


@pytest.mark.parametrize(
    'first,second,said',
    [
        (on(Computed(0)), on(Computed(1)), 'training loader.*dataset.seed 0 there, 1 here'),
        (on(ById(3)), on(ById(4)), '1 training item differs, first: item 7'),
        (on(Computed(0), shuffle=True), on(Computed(0)), 'shuffle True there, False here'),
        (on(Computed(0), drop_last=True), on(Computed(0)), 'drop_last True there, False here'),
        (weighted(1), weighted(5), 'digest of weights'),
        (augmented(10), augmented(30), r'aff_fs.*max_deg 10 there, 30 here'),
        (dict(make=lambda: dropped(0.1)), dict(make=lambda: dropped(0.5)), 'its model.*p 0.1 there, 0.5 here'),
        (dict(make=net), dict(make=lambda: activated(nn.Tanh())), 'its model.*type ReLU there, Tanh here'),
    ],
    ids=['computed', 'dict', 'shuffle', 'drop_last', 'weights', 'augmentation', 'dropout', 'activation'],
)
def test_fault_09_loaders_and_model_of_another_fit(first, second, said, tmp_path):
    "They have as many items and tensors of the same shapes, and what is learned differs"
    file = tmp_path / 'fit.pt'
    with pytest.raises(InterruptedError):
        quiet(learner(tmp_path, **first), 3, cbs=[Checkpoint(file), Crash(1)])
    with pytest.raises(ForeignCheckpoint, match=said):
        quiet(learner(tmp_path, **second), 3, cbs=[Checkpoint(file), Steps()])
    quiet(learner(tmp_path, **first), 3, cbs=Checkpoint(file))  # what changes by itself, as `calls`, does no harm
    assert done(file) == 3


def dropped(p):
    res = net()
    res.append(nn.Dropout(p))
    return res


def activated(layer):
    res = net()
    res[[isinstance(o, nn.ReLU) for o in res].index(True)] = layer
    return res


def test_fault_09_layers_that_change_in_a_fit(tmp_path):
    "A fit that lowers its dropout goes on in the same process"

    class Lower(Callback):
        def before_epoch(self):
            self.model[-1].p = 0.1 / (1 + self.epoch)

    learn = learner(tmp_path, make=lambda: dropped(0.5), cbs=Lower())
    file = tmp_path / 'fit.pt'
    with pytest.raises(InterruptedError):
        quiet(learn, 3, cbs=[Checkpoint(file), Crash(1)])
    quiet(learn, 3, cbs=Checkpoint(file))
    assert done(file) == 3


def test_fault_01_a_value_that_contains_itself(tmp_path):
    def endless(_):
        res = [1]
        res.append(res)
        return res

    with pytest.raises(TypeError, match="'odd' in epoch 0 is a list or dict that contains itself"):
        quiet(learner(tmp_path, metrics=Value(endless)), 2, cbs=Checkpoint(tmp_path / 'fit.pt'))
    assert not (tmp_path / 'fit.pt').exists()


def test_fault_02_a_type_that_is_not_read_is_named(tmp_path):
    class Queued(torch.optim.SGD):
        "Remembers gradients in a deque"

        def step(self, closure=None):
            for p in self.param_groups[0]['params']:
                self.state[p].setdefault('last', deque(maxlen=3)).append(0.0)
            return super().step(closure)

    with pytest.raises(ValueError, match=r'\(UnpicklingError: collections.deque can.t be read from a file\)'):
        quiet(learner(tmp_path, opt_func=wrapped(Queued)), 2, cbs=Checkpoint(tmp_path / 'fit.pt'))


def test_fault_03_predictions_fetched_each_epoch(tmp_path):
    "fastai's own callback removes other callbacks and adds them again"

    def make():
        return learner(tmp_path, cbs=FetchPredsCallback())

    same(killed_and_resumed(make, tmp_path / 'fit.pt'), quiet(make(), 4))


def test_fault_04_two_logs_in_folders_and_a_stopped_fit(tmp_path):
    "A fit that was stopped early ends in the same epoch when it is resumed"

    def run(path, *cbs):
        (path / 'a').mkdir(parents=True, exist_ok=True)
        stop = EarlyStoppingCallback(monitor='fixed', patience=2)
        learn = learner(path, metrics=Fixed([0.3, 0.5, 0.4, 0.2, 0.1, 0.45]))
        logs = [CSVLogger('a/one.csv'), CSVLogger(path / 'two.csv')]
        with learn.no_bar():
            learn.logger = lambda row: None
            learn.fit(6, 1e-2, cbs=[*logs, stop, Checkpoint(path / 'fit.pt'), *cbs])
        return rows(path / 'a/one.csv'), rows(path / 'two.csv'), len(learn.recorder.values)

    expected = run(tmp_path / 'whole')
    assert expected[0] == expected[1] and expected[2] == 4
    with pytest.raises(InterruptedError):
        run(tmp_path / 'part', Crash(2))
    for folder in ('part', 'part', 'whole'):
        assert run(tmp_path / folder) == expected


def test_fault_05_a_vision_learner_with_groups_and_callbacks(tmp_path):
    "Two groups, that of the head empty after `ncm`, with Reflective Learning and a checkpoint"
    dls = digits_lt(device='cpu', n_max=40)
    learn = Learner(
        dls,
        net(),
        loss_func=CrossEntropyLossFlat(),
        splitter=lambda m: [params(m[:4]), params(m[4:])],
        cbs=[ReflectiveLearning(ks=True), Checkpoint(tmp_path / 'fit.pt')],
        path=tmp_path,
    )
    quiet(learn, 1)
    learn.freeze_to(1)
    mean_head(learn)
    assert [len(o) for o in learn.opt.param_lists] == [4, 0] and learn.opt.frozen_idx == 1
    a, b = exported(learn, dls, tmp_path)
    assert torch.equal(a, b)


class MyStopping(EarlyStoppingCallback):
    pass


def test_fault_19_several_callbacks_in_one_warning(tmp_path):
    learn = shots(tmp_path)
    cbs = [
        MyStopping(monitor='few', patience=3),
        SaveModelCallback(monitor='few', at_end=True),
        ReduceLROnPlateau(monitor='valid_loss'),
    ]
    said = said_in(lambda: quiet(learn, 1, cbs=cbs))
    assert len(said) == 1 and "MyStopping monitors 'few' and stops" in said[0] and 'SaveModelCallback' in said[0]
    assert 'ReduceLROnPlateau' not in said[0] and cbs[1].at_end is True


def test_fault_19_names_in_another_order(tmp_path):
    "Another metric comes first, and only one of the shots is there"
    learn = shots(tmp_path)
    learn.metrics = [accuracy, *learn.metrics[2:3]]
    said = said_in(lambda: quiet(learn, 1, cbs=EarlyStoppingCallback(monitor='few')))
    assert len(said) == 1 and "Monitor 'valid_loss'" in said[0]


def test_fault_19_of_a_learner_that_was_copied(tmp_path):
    learn = deepcopy(shots(tmp_path))
    assert len(said_in(lambda: quiet(learn, 1, cbs=SaveModelCallback(monitor='few')))) == 1
