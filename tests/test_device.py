"On a GPU, everything is on the device of the batches, and no step waits; a pretended device stands in for it."
import functools
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.all import CutMix, GradientAccumulation, GradientClip, MixUp
from fastai.vision.all import (
    Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, LabelSmoothingCrossEntropyFlat, Learner, accuracy, nn,
    set_seed)
from ltrl_fastai.all import (
    BalancedSoftmaxLoss, Checkpoint, Diagnosis, ReflectiveLearning, WithIds, digits_lt, methods)
from ltrl_fastai.experiments.training import RunSettings, train_run
from pretend import PretendDevice, There, here, there
from test_methods import uncorrected

digits = digits_lt(device='cpu')


def as_tensors(ds):
    "Every third image: the pretended device takes its time"
    return [(x.as_subclass(torch.Tensor).float()/256, y.as_subclass(torch.Tensor)) for x, y in list(ds)[::3]]


train, valid = as_tensors(digits.train_ds), as_tensors(digits.valid_ds)
counts = torch.bincount(torch.stack([y for _, y in train]), minlength=10)


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(.1), nn.Linear(32, 10))


def learner(device, bs=64, with_ids=False, loss=None, cbs=(), rl=True, **kwargs):
    "A learner of digits-LT, whose random numbers are drawn on the host"
    set_seed(0, reproducible=True)
    with_ids = with_ids and rl
    if with_ids: dl = torch.utils.data.DataLoader(WithIds(train), batch_size=bs, shuffle=True)
    else: dl = DataLoader(train, bs=bs, shuffle=True)
    dls = DataLoaders(dl, DataLoader(valid, bs=bs), device=None if with_ids else torch.device(device))
    if rl: cbs = [ReflectiveLearning(**kwargs), *cbs]
    return Learner(dls, convnet(), loss_func=loss or BalancedSoftmaxLoss(counts), metrics=accuracy, cbs=cbs)


def fitted(*args, epochs=3, **kwargs):
    learn = learner(*args, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn


def weights(learn):
    return torch.cat([here(o.detach()).flatten().float().cpu() for o in learn.model.state_dict().values()])


def test_the_pretended_device_behaves_like_a_gpu():
    "Tensors of two devices don't mix, and what waits for the device is counted"
    with PretendDevice() as waits:
        a, host = torch.ones(3, device=there), torch.ones(3)
        assert type(a*2) is There and (a*2).device == there and not waits
        zero = torch.tensor(0)
        mixing = [
            lambda: a+host, lambda: torch.where(a > 0, torch.zeros(3), a), lambda: torch.stack([a, host]),
            lambda: torch.stack([a[0], torch.tensor(1.)]), lambda: host[zero[None].to(there)],
            lambda: a.index_put_((a > 0,), host), lambda: torch.ones(3).index_put_((torch.arange(3),), a),
            lambda: torch.tensor(0.).add_(a[0]), lambda: a.index_select(0, zero)]
        for f in mixing:
            with pytest.raises(RuntimeError, match='same device'): f()
        with pytest.raises(TypeError, match='cpu'): a.numpy()
        waits.clear()
        assert (a+torch.tensor(1.)).tolist() == [2, 2, 2] and waits == dict(tolist=1)
        waiting_once = [
            lambda: a.sum().item(), lambda: bool(a.sum() > 2), lambda: a[a > 1], a.nonzero,
            lambda: a[torch.tensor([0])], a.cpu, lambda: torch.ones(3).to(there),
            lambda: torch.tensor(1., device=there), lambda: torch.ones(3).copy_(a), lambda: float(a[0])]
        for f in waiting_once:
            n = waits.total()
            f()
            assert waits.total() == n+1
        n = waits.total()
        torch.ones(3).to(there, non_blocking=True)
        assert len(a[torch.tensor([0]).to(there, non_blocking=True)]) == 1
        a.zero_().add_(1)
        a.view(3, 1)
        assert waits.total() == n
        p = nn.Linear(3, 1).to(there)
        p(a).backward()
        assert p.weight.grad.device == there and torch.equal(p.weight.grad.here, torch.ones(1, 3))
    assert torch.ones(3).device.type == 'cpu'


cases = dict(
    review=dict(),
    all_three=dict(ks=True, kc=True),
    paper=dict(ks=True, kc=True, preset='paper'),
    published=dict(ks=True, kc=True, preset='published'),
    no_counts=dict(loss=CrossEntropyLossFlat()),
    first_version=dict(preset='v0.0.1', ks=True, kc=True),
    half=dict(kr=dict(store='half')),
    disk=dict(kr=dict(store='disk')),
    disk_with_ids=dict(kr=dict(store='disk'), with_ids=True),
    with_ids=dict(with_ids=True, ks=True),
    logits=dict(kr=dict(distance='logits')),
    smoothed=dict(loss=LabelSmoothingCrossEntropyFlat(), ks=True),
)


@contextmanager
def counted(device):
    "Yield counts of waiting: those of the pretended device, or PyTorch's warnings of a GPU"
    if device == there:
        with PretendDevice() as waits: yield waits
        return
    waits = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try: yield waits
        finally: torch.cuda.set_sync_debug_mode('default')
    waits['syncs'] = sum('synchronizing CUDA operation' in str(o.message) for o in warned)


@functools.cache
def waits_without_rl(device, bs, loss):
    "How often two epochs of plain fastai wait, which depends on no part of Reflective Learning"
    with counted(device) as waits: fitted(device, bs, epochs=2, rl=False, loss=loss)
    return dict(waits)


@pytest.mark.slow
@pytest.mark.parametrize('device', [there, *[torch.device('cuda', 0)]*torch.cuda.is_available()], ids=str)
@pytest.mark.parametrize('case', cases)
def test_no_step_waits(case, device):
    "More batches wait no more often than in plain fastai, and weights are equal to those of the CPU"
    def excess(bs):
        "How much more often a fit waits with Reflective Learning than without"
        with counted(device) as waits: learn = fitted(device, bs, epochs=2, **cases[case])
        waits = dict(waits)
        without = waits_without_rl(device, bs, cases[case].get('loss'))
        if device == there:
            on_cpu = fitted('cpu', bs, epochs=2, **cases[case])
            assert torch.equal(weights(learn), weights(on_cpu))
        return {k: n-without.get(k, 0) for k, n in waits.items()}
    assert excess(64) == excess(32)


other_callbacks = dict(
    accumulation=lambda: GradientAccumulation(128), clip=lambda: GradientClip(1.), mixup=MixUp, cutmix=CutMix,
    diagnosis=Diagnosis)


@pytest.mark.parametrize('make', other_callbacks.values(), ids=other_callbacks)
def test_other_callbacks(make):
    with PretendDevice(): learn = fitted(there, cbs=[make()], ks=True, kc=True)
    assert torch.equal(weights(learn), weights(fitted('cpu', cbs=[make()], ks=True, kc=True)))


def test_memories_are_on_the_device():
    with PretendDevice(): learn = fitted(there, preset='v0.0.1', ks=True, kc=True)
    r, s = learn.knowledge_review.teachers, learn.knowledge_summary
    for o in (r.store.logits, r.seen, r.right, r.targets, s.centers, s.similarity): assert o.device == there


calls = dict(lr_find=dict(show_plot=False, num_it=20), validate={}, get_preds=dict(ds_idx=0), fine_tune=dict(epochs=1))


@pytest.mark.parametrize('call', calls)
def test_other_calls(call):
    "Results and weights are equal to those on the CPU"
    res = []
    for device in (there, 'cpu'):
        with PretendDevice() if device == there else nullcontext():
            learn = fitted(device, ks=True, kc=True)
            with learn.no_bar(), learn.no_logging(): out = getattr(learn, call)(**calls[call])
        res.append((out, weights(learn)))
    (out, w), (cpu_out, cpu_w) = res
    torch.testing.assert_close(out, cpu_out, rtol=0, atol=0)
    assert torch.equal(w, cpu_w)


stores = [{}, dict(with_ids=True), dict(kr=dict(store='disk')), dict(kr=dict(store='disk'), with_ids=True)]


@pytest.mark.parametrize('kwargs', stores, ids=str)
def test_a_checkpoint_moves_between_devices(kwargs, tmp_path):
    "A fit that is interrupted on one device resumes on the other to the same weights"
    expected = weights(fitted('cpu', ks=True, kc=True, **kwargs))
    for first, second in ((there, 'cpu'), ('cpu', there)):
        file = tmp_path/f'{second}.pt'
        for device, stop in ((first, 1), (second, None)):
            with PretendDevice() if device == there else nullcontext():
                cbs = [Checkpoint(file), Diagnosis(), Interrupt(stop)]
                learn = learner(device, ks=True, kc=True, cbs=cbs, **kwargs)
                interrupted = nullcontext() if stop is None else pytest.raises(KeyboardInterrupt)
                with learn.no_bar(), learn.no_logging(), interrupted: learn.fit(3, 1e-2)
        assert torch.equal(weights(learn), expected)


class Interrupt(Callback):
    "Raise `KeyboardInterrupt` after an epoch"
    order = 300
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch == self.at: raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize('method', [k for k, o in methods.items() if not o.pretrained])
def test_every_method(method, few_test_digits):
    "With Reflective Learning and all stages, the accuracy of each class is equal to that on the CPU"
    reflective = dict(ks=True, kc=method not in uncorrected)
    settings = RunSettings(method=method, epochs=1, n_max=40, n_valid=3, reflective=reflective)
    with PretendDevice(): got, _ = train_run(settings, bar=False)
    expected, _ = train_run(settings, bar=False)
    assert got['accuracy'] == expected['accuracy'] and got['per_class'] == expected['per_class']


# Methods that have to wait: the number of experts depends on the image, weights are fitted until they converge,
# batches are drawn by the method, fastai's MixUp waits, or there are several stages
waiting = {'ride-assigned', 'sade-aggregated', 'bbn', 'mixup', 'balpoe'} | {
    k for k, o in methods.items() if o.later_stages}


def waits_per_batch(**kwargs):
    "How much more often a fit waits with smaller batches"
    res = Counter()
    for bs, sign in ((32, 1), (64, -1)):
        settings = RunSettings(epochs=1, bs=bs, n_max=40, n_valid=1, **kwargs)
        with PretendDevice() as waits: train_run(settings, bar=False, test=False)
        for k, n in waits.items(): res[k] += sign*n
    return {k: n for k, n in res.items() if n}


@pytest.mark.slow
def test_no_step_of_a_method_waits():
    "No method waits more often than plain cross-entropy"
    expected = waits_per_batch(method='softmax', reflective=None)
    names = [k for k, o in methods.items() if k not in waiting and not o.pretrained]
    found = {k: waits_per_batch(method=k, reflective=dict(ks=True, kc=k not in uncorrected)) for k in names}
    assert found == {k: expected for k in names}


pictures = [o for o in dir(Learner) if o.startswith('plot_')]


def test_pictures():
    "Every picture of a learner is drawn with data on the device"
    with PretendDevice():
        learn = fitted(there, ks=True, kc=True, cbs=[Diagnosis()])
        for name in pictures:
            plt.close('all')
            getattr(learn, name)()
            figure = plt.gcf()
            assert figure.axes and all(ax.has_data() for ax in figure.axes[:1]), name
    plt.close('all')
