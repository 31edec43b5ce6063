"A checkpoint in the calls of a `Learner`, beside a loss scale, and where what lies there can't be used."
from functools import partial

import pytest
import torch
from fastai.callback.all import GradientAccumulation, MixedPrecision
from fastai.vision.all import SGD, Adam, Callback, Learner, nn, params, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, ReflectiveLearning, digits_lt
from ltrl_fastai.experiments.checkpoint import ForeignCheckpoint


def learner(*cbs, n_max=40, hidden=16, opt_func=partial(SGD, mom=.9), kr=True):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=n_max)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return Learner(dls, net, loss_func=BalancedSoftmaxLoss(dls.class_counts), opt_func=opt_func, cbs=[ReflectiveLearning(kr=kr, ks=True, kc=True), *cbs])


def weights(learn): return torch.cat([o.flatten().double() for o in learn.model.state_dict().values()])


@pytest.mark.parametrize('call', [lambda o: o.validate(), lambda o: o.get_preds(), lambda o: o.predict(o.dls.valid.dataset.images[0]),
                                  lambda o: o.lr_find(num_it=3*len(o.dls.train)-1, show_plot=False)], ids=['validate', 'get_preds', 'predict', 'lr_find'])
def test_one_that_stays_on_a_learner_is_for_fits_alone(call, tmp_path):
    "Nothing else writes a checkpoint, or takes one for its own; `lr_find` has as many epochs here as the fit"
    f, ended = tmp_path/'fit.pt', []
    for cbs in ([], [Checkpoint(f)]):
        learn = learner(*cbs)
        with learn.no_bar(), learn.no_logging():
            call(learn)
            assert not f.exists()
            learn.fit(3, .05)
        ended.append(weights(learn))
    kept, n = f.read_bytes(), len(learn.cbs)
    with learn.no_bar(), learn.no_logging(): call(learn)
    assert f.read_bytes() == kept and len(learn.cbs) == n and torch.equal(*ended)


class Crash(Callback):
    "In the middle of an epoch"
    order = -100
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise InterruptedError('crash')


def fit(learn, file, crash=None, n=5):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, .05, cbs=[Checkpoint(file), *([] if crash is None else [Crash(crash)])])
    return weights(learn)


def begun(file, make=learner, crash=3):
    "A fit that crashed in its fourth epoch: two checkpoints are there"
    with pytest.raises(InterruptedError): fit(make(), file, crash)


def on_disk(): return learner(kr=dict(store='disk'))


def another_fit(f): torch.save(dict(torch.load(f, weights_only=True), n_epoch=9), f)
def no_checkpoint(f): torch.save(dict(weight=torch.ones(3)), f)
def truncated(f): f.write_bytes(f.read_bytes()[:1000])
def without_its_teachers(f):
    store = torch.load(f, weights_only=True)['callbacks']['knowledge_review']['teachers']['store']
    truncated(f.with_name(f.name+'.d')/store['frozen'][-1])


@pytest.mark.parametrize('spoil,said', [(truncated, 'no checkpoint that can be read'), (no_checkpoint, 'no checkpoint of this package'), (another_fit, 'epochs 9 in the file'),
                                        (without_its_teachers, 'not there or not whole')])
def test_what_is_refused_is_told_and_the_one_before_is_used(spoil, said, tmp_path, capsys):
    "And kept, until what was refused is no longer in its way: a kill at any time finds one of use"
    f, make = tmp_path/'fit.pt', on_disk if spoil is without_its_teachers else learner
    want = fit(make(), tmp_path/'whole.pt')
    begun(f, make)
    spoil(f)
    bad = f.read_bytes()
    begun(f, make, crash=2)  # goes on from epoch 2, and saves nothing
    assert said in (out := capsys.readouterr().out) and 'Going on from the one before it' in out
    assert f.read_bytes() == bad and torch.equal(fit(make(), f), want)
    assert f.with_name('fit.pt.refused').read_bytes() == bad and torch.load(f.with_name('fit.pt.older'), weights_only=True)['done'] == 4


@pytest.mark.parametrize('kw,said', [(dict(n_max=60), 'number of training samples'), (dict(hidden=8), 'another model'), (dict(opt_func=Adam), 'another optimizer')],
                         ids=['data', 'model', 'optimizer'])
def test_another_fit_is_known_without_an_identity(kw, said, tmp_path):
    begun(tmp_path/'fit.pt')
    kept = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ForeignCheckpoint, match=said): fit(learner(**kw), tmp_path/'fit.pt')
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == kept


@pytest.mark.parametrize('call,args,said', [('fit', (5, .05), 'lr, in its course: 0.002, 0.05, .* there, 0.05 here'), ('fit_flat_cos', (5, .05), 'another schedule'),
                                            ('fit_one_cycle', (5, .1), '0.05, .* there, .* 0.1, .* here')])
def test_another_schedule_is_another_fit(call, args, said, tmp_path):
    f = tmp_path/'fit.pt'
    begun(f)
    with pytest.raises(ForeignCheckpoint, match=said): getattr(learner(), call)(*args, cbs=Checkpoint(f))
    begun(f, crash=4)  # the same goes on
    learner().fit(4, .05, cbs=Checkpoint(f.with_name('plain.pt')))
    with pytest.raises(ForeignCheckpoint, match='lr, in its course: 0.05 there, 0.1 here'): learner().fit(4, .1, cbs=Checkpoint(f.with_name('plain.pt')))


class Lights(Callback):
    "Go out in the middle of the last epoch of a fit of so many; tells which epochs there were"
    order = -100
    def __init__(self, out=None): self.out, self.seen = out, []
    def before_batch(self):
        if not self.training or self.iter != 1: return
        self.seen.append((self.n_epoch, self.epoch))
        if self.n_epoch == self.out and self.epoch == self.n_epoch-1: raise InterruptedError('crash')


def fine_tune(file, out=None, store='auto', cp=None, epochs=3):
    learn, lights = learner(kr=dict(store=store)), Lights(out)
    learn.splitter = lambda m: [params(m[:3]), params(m[3:])]
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(epochs, .1, freeze_epochs=2, cbs=[cp or Checkpoint(file), lights])
    return weights(learn), lights.seen, learn.recorder.losses


@pytest.mark.parametrize('store', ['dense', 'disk'])
def test_a_call_of_two_fits_goes_on_in_either(store, tmp_path):
    "What is done is passed over, frozen or not; each fit has a file of its own"
    want, seen, losses = fine_tune(tmp_path/'whole.pt', store=store)
    assert seen == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    f = tmp_path/'fit.pt'
    for out in (2, 3):
        with pytest.raises(InterruptedError): fine_tune(f, out, store)
        assert f.with_name('fit.pt.next').exists() == (out == 3)
    for again in ([(3, 2)], []):
        got, seen, more = fine_tune(f, store=store)
        assert seen == again and torch.equal(got, want) and more == losses
    with pytest.raises(ForeignCheckpoint, match='fit.pt.next is the checkpoint of another fit than this: epochs 3 in the file, 4 here'): fine_tune(f, store=store, epochs=4)
    Checkpoint(f).remove()
    assert not list(tmp_path.glob('*fit.pt*'))


def test_between_two_fits_nothing_is_lost(tmp_path):
    "A kill before the second has a checkpoint"
    want, f = fine_tune(tmp_path/'whole.pt')[0], tmp_path/'fit.pt'
    fine_tune(f)
    for o in tmp_path.glob('fit.pt.next*'): o.unlink()
    got, seen, _ = fine_tune(f)
    assert seen == [(3, 0), (3, 1), (3, 2)] and torch.equal(got, want)


def test_what_a_second_fit_can_not_go_on_with(tmp_path):
    f, cp = tmp_path/'fit.pt', Checkpoint(tmp_path/'fit.pt')
    with pytest.raises(InterruptedError): fine_tune(f, 3, cp=cp)
    with pytest.raises(ForeignCheckpoint, match='fit 2 of one callback; another `Checkpoint` begins with the first'): fine_tune(f, cp=cp)
    assert fine_tune(f)[1] == [(3, 2)]
    for o in (f, f.with_name('fit.pt.older')): o.unlink()
    with pytest.raises(ForeignCheckpoint, match='fit.pt.next is there, of the fit after this one'): fine_tune(f)


class CpuAMP(MixedPrecision):
    "fastai's MixedPrecision is for CUDA alone; this is the same on a CPU, with a scale that overflows at first"
    order, skips = MixedPrecision.order, 0
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast('cpu', dtype=torch.float16), torch.amp.GradScaler('cpu', init_scale=2.**24, growth_interval=8)
    def after_cancel_step(self): self.skips += 1


@pytest.mark.parametrize('cbs', [list, lambda: [GradientAccumulation(50)]], ids=['every batch', 'accumulated'])
def test_a_loss_scale_goes_on(cbs, tmp_path):
    "Steps are skipped, before the crash and after it"
    amp, f = CpuAMP('fp16'), tmp_path/'fit.pt'
    want = fit(learner(amp, *cbs()), tmp_path/'whole.pt')
    begun(f, lambda: learner(CpuAMP('fp16'), *cbs()))
    assert torch.load(f, weights_only=True)['fastai']['cpu_amp']['scale'] < 2**24
    assert amp.skips > 1 and torch.equal(fit(learner(CpuAMP('fp16'), *cbs()), f), want)
