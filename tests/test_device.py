"On a GPU: everything is where the batches are, and no step waits. Without one, a device that is not there stands in for it."
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.all import CutMix, GradientAccumulation, GradientClip, MixUp
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, LabelSmoothingCrossEntropyFlat, Learner, accuracy, nn, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, Diagnosis, ReflectiveLearning, WithIds, class_counts, digits_lt, methods
from ltrl_fastai.experiments.training import RunSettings, train_run
from pretend import PretendDevice, There, here, there

digits = digits_lt(device='cpu')
counts = class_counts(digits)
train, valid = [[(x.as_subclass(torch.Tensor).float()/256, y.as_subclass(torch.Tensor)) for x, y in o] for o in (digits.train_ds, digits.valid_ds)]


def convnet(): return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.1), nn.Linear(32, 10))


def learner(device, bs=64, with_ids=False, loss=None, cbs=(), rl=True, **kwargs):
    "On digits-LT, drawn on the host"
    set_seed(0, reproducible=True)
    with_ids &= rl
    dl = torch.utils.data.DataLoader(WithIds(train), batch_size=bs, shuffle=True) if with_ids else DataLoader(train, bs=bs, shuffle=True)
    dls = DataLoaders(dl, DataLoader(valid, bs=bs), device=None if with_ids else torch.device(device))
    return Learner(dls, convnet(), loss_func=loss or BalancedSoftmaxLoss(counts), metrics=accuracy, cbs=[*[ReflectiveLearning(**kwargs)]*rl, *cbs])


def fitted(*args, **kwargs):
    learn = learner(*args, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    return learn


def weights(learn): return torch.cat([here(o.detach()).flatten().float().cpu() for o in learn.model.state_dict().values()])


def test_the_device_that_is_not_there_is_like_one():
    with PretendDevice() as waits:
        a = torch.ones(3, device=there)
        assert type(a*2) is There and (a*2).device == there and not waits
        zero = torch.tensor(0)
        for f in (lambda: a+torch.ones(3), lambda: torch.where(a > 0, torch.zeros(3), a), lambda: torch.stack([a, torch.ones(3)]), lambda: torch.stack([a[0], torch.tensor(1.)]),
                  lambda: torch.ones(3)[zero[None].to(there)], lambda: a.index_put_((a > 0,), torch.ones(3)), lambda: torch.ones(3).index_put_((torch.arange(3),), a),
                  lambda: torch.tensor(0.).add_(a[0]), lambda: a.index_select(0, zero)):
            with pytest.raises(RuntimeError, match='same device'): f()
        with pytest.raises(TypeError, match='cpu'): a.numpy()
        waits.clear()
        assert (a+torch.tensor(1.)).tolist() == [2, 2, 2] and waits == dict(tolist=1)
        for f in (lambda: a.sum().item(), lambda: bool(a.sum() > 2), lambda: a[a > 1], a.nonzero, lambda: a[torch.tensor([0])], a.cpu, lambda: torch.ones(3).to(there),
                  lambda: torch.tensor(1., device=there), lambda: torch.ones(3).copy_(a), lambda: float(a[0])):
            n = waits.total()
            f()
            assert waits.total() == n+1
        n = waits.total()
        torch.ones(3).to(there, non_blocking=True), a[torch.tensor([0]).to(there, non_blocking=True)], a.zero_().add_(1), a.view(3, 1)
        assert waits.total() == n
        p = nn.Linear(3, 1).to(there)
        p(a).backward()
        assert p.weight.grad.device == there and torch.equal(p.weight.grad.here, torch.ones(1, 3))
    assert torch.ones(3).device.type == 'cpu'


cases = dict(
    review=dict(), all_three=dict(ks=True, kc=True), paper=dict(ks=True, kc=True, preset='paper'), published=dict(ks=True, kc=True, preset='published'),
    no_counts=dict(loss=CrossEntropyLossFlat()), topk=dict(kr=dict(store=dict(kind='topk', k=4), memory=0., adapt=0., weight=1.), kc=dict(every=2)),
    first_version=dict(preset='v0.0.1', ks=True, kc=True), half=dict(kr=dict(store='half')),
    disk=dict(kr=dict(store='disk')), disk_with_ids=dict(kr=dict(store='disk'), with_ids=True), with_ids=dict(with_ids=True, ks=True),
    logits=dict(kr=dict(distance='logits')), smoothed=dict(loss=LabelSmoothingCrossEntropyFlat(), ks=True))


@contextmanager
def counted(device):
    "Counts of waiting: of the device that is not there, or the warnings of a GPU"
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


@pytest.mark.parametrize('device', [there, *[torch.device('cuda', 0)]*torch.cuda.is_available()], ids=str)
@pytest.mark.parametrize('case', cases)
def test_no_step_waits(case, device):
    "What comes on top of plain fastai is as much for twice the batches; and on the device that is not there the weights are those of the CPU, to the bit"
    excess = []
    for bs in (64, 32):
        found = []
        for rl in (True, False):
            with counted(device) as waits: learn = fitted(device, bs, rl=rl, **cases[case])
            found.append(dict(waits))
            if rl and device == there: assert torch.equal(weights(learn), weights(fitted('cpu', bs, **cases[case])))
        excess.append({k: found[0].get(k, 0)-found[1].get(k, 0) for k in found[0]})
    assert excess[0] == excess[1], excess


beside = dict(accumulation=lambda: GradientAccumulation(128), clip=lambda: GradientClip(1.), mixup=lambda: MixUp(), cutmix=lambda: CutMix(), diagnosis=lambda: Diagnosis())


@pytest.mark.parametrize('cb', beside)
def test_callbacks_beside_ours(cb):
    with PretendDevice(): learn = fitted(there, cbs=[beside[cb]()], ks=True, kc=True)
    assert torch.equal(weights(learn), weights(fitted('cpu', cbs=[beside[cb]()], ks=True, kc=True)))


def test_what_is_remembered_is_there():
    with PretendDevice(): learn = fitted(there, preset='v0.0.1', ks=True, kc=True)
    r, s = learn.knowledge_review.teachers, learn.knowledge_summary
    for o in (r.store.logits, r.seen, r.right, r.targets, s.centers, s.similarity): assert o.device == there


calls = dict(lr_find=dict(show_plot=False, num_it=20), validate={}, get_preds=dict(ds_idx=0), fine_tune=dict(epochs=1))


@pytest.mark.parametrize('call', calls)
def test_other_calls(call):
    "As on the CPU, numbers and weights"
    res = []
    for device in (there, 'cpu'):
        with PretendDevice() if device == there else nullcontext():
            learn = fitted(device, ks=True, kc=True)
            with learn.no_bar(), learn.no_logging(): out = getattr(learn, call)(**calls[call])
        res.append((out, weights(learn)))
    torch.testing.assert_close(*[o[0] for o in res], rtol=0, atol=0)
    assert torch.equal(*[o[1] for o in res])


@pytest.mark.parametrize('kwargs', [{}, dict(with_ids=True), dict(kr=dict(store='disk')), dict(kr=dict(store='disk'), with_ids=True)], ids=str)
def test_a_checkpoint_goes_from_one_device_to_another(kwargs, tmp_path):
    "Broken off on either, it goes on on the other as if nothing had happened"
    want = weights(fitted('cpu', ks=True, kc=True, **kwargs))
    for first, second in ((there, 'cpu'), ('cpu', there)):
        file = tmp_path/f'{second}.pt'
        for device, stop in ((first, 1), (second, None)):
            with PretendDevice() if device == there else nullcontext():
                learn = learner(device, ks=True, kc=True, cbs=[Checkpoint(file), Diagnosis(), Stop(stop)], **kwargs)
                with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt) if stop else nullcontext(): learn.fit(3, 1e-2)
        assert torch.equal(weights(learn), want)


class Stop(Callback):
    order = 300
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch == self.at: raise KeyboardInterrupt


@pytest.mark.parametrize('method', methods)
def test_every_method(method):
    "With Reflective Learning and all its stages: the accuracy that it has on the CPU, class by class"
    settings = RunSettings(method=method, epochs=1, reflective=dict(ks=True, kc=True))
    with PretendDevice(): got, _ = train_run(settings, bar=False)
    want, _ = train_run(settings, bar=False)
    assert got['accuracy'] == want['accuracy'] and got['per_class'] == want['per_class']


# those that must: experts whose number depends on the image, weights found until they settle, batches of their own, MixUp as fastai has it, several stages
waiting = {'ride-assigned', 'sade-aggregated', 'bbn', 'mixup'} | {k for k, o in methods.items() if o.then}


def waits_per_batch(**kwargs):
    "By how much more there is to wait for in smaller batches"
    res = Counter()
    for bs, sign in ((32, 1), (64, -1)):
        with PretendDevice() as waits: train_run(RunSettings(epochs=1, bs=bs, **kwargs), bar=False)
        for k, n in waits.items(): res[k] += sign*n
    return {k: n for k, n in res.items() if n}


def test_no_step_of_a_method_waits():
    "More than one of plain cross-entropy does"
    want = waits_per_batch(method='softmax', reflective=None)
    assert {k: waits_per_batch(method=k, reflective=dict(ks=True, kc=True)) for k in methods if k not in waiting} == {k: want for k in methods if k not in waiting}


pictures = [o for o in dir(Learner) if o.startswith('plot_')]


def test_pictures_and_reports():
    "All that ours draw of a learner"
    with PretendDevice():
        learn = fitted(there, ks=True, kc=True, cbs=[Diagnosis()])
        for o in pictures: getattr(learn, o)()
    plt.close('all')
