"A checkpoint in each call of a `Learner`, with a loss scale, and where the file that exists can't be used."
from functools import partial

import pytest
import torch
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, MixedPrecision, MixUp
from fastai.vision.all import SGD, Adam, Callback, Learner, nn, params, set_seed, tensor
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, LDAMLoss, ReflectiveLearning, SAM, digits_lt
from ltrl_fastai.experiments.checkpoint import ForeignCheckpoint


def learner(*cbs, n_max=40, hidden=16, opt_func=partial(SGD, mom=.9), kr=True):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=n_max)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))
    loss = BalancedSoftmaxLoss(dls.class_counts)
    return Learner(dls, net, loss_func=loss, opt_func=opt_func, cbs=[ReflectiveLearning(kr=kr, ks=True, kc=True), *cbs])


def weights(learn): return torch.cat([o.flatten().double() for o in learn.model.state_dict().values()])


calls = dict(
    validate=lambda learn: learn.validate(),
    get_preds=lambda learn: learn.get_preds(),
    predict=lambda learn: learn.predict(learn.dls.valid.dataset.images[0]),
    lr_find=lambda learn: learn.lr_find(num_it=3*len(learn.dls.train)-1, show_plot=False),  # as many epochs as the fit
)


@pytest.mark.parametrize('call', calls.values(), ids=calls)
def test_one_that_stays_on_a_learner_acts_in_fits_only(call, tmp_path):
    "Nothing else writes a checkpoint, or resumes from one"
    f, ended = tmp_path/'fit.pt', []
    for cbs in ([], [Checkpoint(f)]):
        learn = learner(*cbs)
        with learn.no_bar(), learn.no_logging():
            call(learn)
            assert not f.exists()
            learn.fit(3, .05)
        ended.append(weights(learn))
    content, n = f.read_bytes(), len(learn.cbs)
    with learn.no_bar(), learn.no_logging(): call(learn)
    assert f.read_bytes() == content and len(learn.cbs) == n and torch.equal(*ended)


class Crash(Callback):
    "Raise an error in the second batch of an epoch"
    order = -100
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise InterruptedError('crash')


def fit(learn, file, crash=None, n=5):
    cbs = [Checkpoint(file)]
    if crash is not None: cbs.append(Crash(crash))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, .05, cbs=cbs)
    return weights(learn)


def interrupted_fit(file, make=learner, crash=3):
    "A fit that crashes in its fourth epoch, and leaves two checkpoints"
    with pytest.raises(InterruptedError): fit(make(), file, crash)


def on_disk(): return learner(kr=dict(store='disk'))


def another_fit(f): torch.save(dict(torch.load(f, weights_only=True), n_epoch=9), f)
def no_checkpoint(f): torch.save(dict(weight=torch.ones(3)), f)
def truncated(f): f.write_bytes(f.read_bytes()[:1000])
def without_its_teachers(f):
    store = torch.load(f, weights_only=True)['callbacks']['knowledge_review']['teachers']['store']
    truncated(f.with_name(f.name+'.d')/store['frozen'][-1])


damages = [
    (truncated, 'no checkpoint that can be read'), (no_checkpoint, 'no checkpoint of this package'),
    (another_fit, 'epochs 9 in the file'), (without_its_teachers, 'not there or not whole')]


@pytest.mark.parametrize('damage,message', damages)
def test_a_refused_file_is_reported_and_the_previous_one_used(damage, message, tmp_path, capsys):
    "The previous file is kept until a new one is written: after a kill at any time there is one to resume from"
    f, make = tmp_path/'fit.pt', on_disk if damage is without_its_teachers else learner
    expected = fit(make(), tmp_path/'whole.pt')
    interrupted_fit(f, make)
    damage(f)
    refused = f.read_bytes()
    interrupted_fit(f, make, crash=2)  # resumes from epoch 2, and saves nothing
    out = capsys.readouterr().out
    assert message in out and 'Going on from the one before it' in out
    assert f.read_bytes() == refused and torch.equal(fit(make(), f), expected)
    assert f.with_name('fit.pt.refused').read_bytes() == refused
    assert torch.load(f.with_name('fit.pt.older'), weights_only=True)['done'] == 4


others = dict(
    data=(dict(n_max=60), 'number of training samples'), model=(dict(hidden=8), 'another model'),
    optimizer=(dict(opt_func=Adam), 'another optimizer'))


@pytest.mark.parametrize('kwargs,message', others.values(), ids=others)
def test_another_fit_is_recognised_without_an_identity(kwargs, message, tmp_path):
    interrupted_fit(tmp_path/'fit.pt')
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ForeignCheckpoint, match=message): fit(learner(**kwargs), tmp_path/'fit.pt')
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


def small(*cbs, loss=BalancedSoftmaxLoss, counts=tensor(range(10, 110, 10)), **kwargs):
    "A learner with a loss of its own"
    set_seed(0, reproducible=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Learner(digits_lt(device='cpu', n_max=40), net, loss_func=loss(counts, **kwargs), lr=.05, cbs=cbs)


other_settings = dict(
    tau=(dict(tau=1.), dict(tau=1.5), [], [], 'loss function has other settings .tau 1 there, 1.5 here'),
    counts=({}, dict(counts=tensor(range(10, 120, 11))), [], [], 'loss function has other settings .log_counts'),
    margins=(dict(loss=LDAMLoss), dict(loss=LDAMLoss, max_margin=.4), [], [], 'margins .* there'),
    weight=({}, {}, [ReflectiveLearning(kr=dict(weight=1.))], [ReflectiveLearning(kr=dict(weight=2.))],
            'its knowledge_review has other settings .weight 1 there, 2 here'),
    temperature=({}, {}, [ReflectiveLearning(kr=dict(tau=2.))], [ReflectiveLearning(kr=dict(tau=3.))],
                 'its knowledge_review has other settings .tau 2 there, 3 here'),
    rl_added=({}, {}, [], [ReflectiveLearning()], 'another fit, without .*knowledge_review.* Remove what was added'),
    rl_removed=({}, {}, [ReflectiveLearning()], [], 'holds the state of .*knowledge_review'),
    mixup_added=({}, {}, [], [MixUp()], 'another fit, without mix_up. Remove what was added'),
    mixup_removed=({}, {}, [MixUp()], [], 'another fit, with mix_up. Add what is missing'),
    mixup_weaker=({}, {}, [MixUp(.4)], [MixUp(.2)], 'mix_up has other settings .distrib concentration1=0.4, .*=0.2'),
    sam=({}, {}, [SAM(rho=.1)], [SAM(rho=.05)], 'sam has other settings .rho 0.1 there, 0.05 here'),
    clipping=({}, {}, [GradientClip(1.)], [GradientClip(.1)], 'max_norm 1 there, 0.1 here'))


@pytest.mark.parametrize('before,after,cbs,other_cbs,message', other_settings.values(), ids=other_settings)
def test_other_settings_are_another_fit(before, after, cbs, other_cbs, message, tmp_path):
    "Of the loss function, and of callbacks that change what is learned"
    f = tmp_path/'fit.pt'
    interrupted_fit(f, lambda: small(*cbs, **before))
    content = f.read_bytes()
    with pytest.raises(ForeignCheckpoint, match=message): fit(small(*other_cbs, **after), f)
    assert f.read_bytes() == content


def test_settings_that_change_within_a_fit_do_not_matter(tmp_path):
    "Class weights that begin late, on a loss that was in a fit that crashed; and a logger that is added"
    class LateWeights(Callback):
        def before_epoch(self): self.loss_func.func.weight = tensor(range(1, 11)).float() if self.epoch > 1 else None
    f, expected = tmp_path/'fit.pt', fit(small(LateWeights(), loss=LDAMLoss), tmp_path/'whole.pt')
    learn = small(LateWeights(), loss=LDAMLoss)
    interrupted_fit(f, lambda: learn)
    assert learn.loss_func.func.weight is not None
    learn.path = tmp_path
    learn.add_cb(CSVLogger())
    assert torch.equal(fit(learn, f), expected)


def test_a_file_of_an_earlier_version_has_no_settings(tmp_path):
    f, make = tmp_path/'fit.pt', lambda: small(MixUp())
    expected = fit(make(), tmp_path/'whole.pt')
    interrupted_fit(f, make)
    for file in (f, f.with_name('fit.pt.older')):
        state = torch.load(file, weights_only=True)
        del state['settings']
        torch.save(state, file)
    assert torch.equal(fit(make(), f), expected)


schedules = [
    ('fit', (5, .05), 'lr, in its course: 0.002, 0.05, .* there, 0.05 here'),
    ('fit_flat_cos', (5, .05), 'another schedule'),
    ('fit_one_cycle', (5, .1), '0.05, .* there, .* 0.1, .* here')]


@pytest.mark.parametrize('call,args,message', schedules)
def test_another_schedule_is_another_fit(call, args, message, tmp_path):
    f = tmp_path/'fit.pt'
    interrupted_fit(f)
    with pytest.raises(ForeignCheckpoint, match=message): getattr(learner(), call)(*args, cbs=Checkpoint(f))
    interrupted_fit(f, crash=4)  # the same schedule resumes
    constant = f.with_name('constant.pt')
    learner().fit(4, .05, cbs=Checkpoint(constant))
    with pytest.raises(ForeignCheckpoint, match='lr, in its course: 0.05 there, 0.1 here'):
        learner().fit(4, .1, cbs=Checkpoint(constant))


class CrashAtEnd(Callback):
    "Raise an error in the last epoch of a fit of `n_epoch` epochs; keep which epochs were trained"
    order = -100
    def __init__(self, n_epoch=None): self.crash_in, self.trained = n_epoch, []
    def before_batch(self):
        if not self.training or self.iter != 1: return
        self.trained.append((self.n_epoch, self.epoch))
        if self.n_epoch == self.crash_in and self.epoch == self.n_epoch-1: raise InterruptedError('crash')


def fine_tune(file, crash_in=None, store='auto', cp=None, epochs=3):
    learn, crash = learner(kr=dict(store=store)), CrashAtEnd(crash_in)
    learn.splitter = lambda m: [params(m[:3]), params(m[3:])]
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(epochs, .1, freeze_epochs=2, cbs=[cp or Checkpoint(file), crash])
    return weights(learn), crash.trained, learn.recorder.losses


@pytest.mark.parametrize('store', ['dense', 'disk'])
def test_a_call_of_two_fits_resumes_in_either(store, tmp_path):
    "Finished epochs are skipped, frozen or not; each fit has a file of its own"
    expected, trained, losses = fine_tune(tmp_path/'whole.pt', store=store)
    assert trained == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    f = tmp_path/'fit.pt'
    for n_epoch in (2, 3):
        with pytest.raises(InterruptedError): fine_tune(f, n_epoch, store)
        assert f.with_name('fit.pt.next').exists() == (n_epoch == 3)
    for remaining in ([(3, 2)], []):
        got, trained, resumed_losses = fine_tune(f, store=store)
        assert trained == remaining and torch.equal(got, expected) and resumed_losses == losses
    message = 'fit.pt.next is the checkpoint of another fit than this: epochs 3 in the file, 4 here'
    with pytest.raises(ForeignCheckpoint, match=message): fine_tune(f, store=store, epochs=4)
    Checkpoint(f).remove()
    assert not list(tmp_path.glob('*fit*'))


def test_a_kill_between_two_fits(tmp_path):
    "The first fit has a checkpoint, the second has none yet"
    expected, f = fine_tune(tmp_path/'whole.pt')[0], tmp_path/'fit.pt'
    fine_tune(f)
    for o in tmp_path.glob('fit.pt.next*'): o.unlink()
    got, trained, _ = fine_tune(f)
    assert trained == [(3, 0), (3, 1), (3, 2)] and torch.equal(got, expected)


def test_what_a_second_fit_can_not_resume_from(tmp_path):
    f, cp = tmp_path/'fit.pt', Checkpoint(tmp_path/'fit.pt')
    with pytest.raises(InterruptedError): fine_tune(f, 3, cp=cp)
    message = 'fit 2 of one callback; another `Checkpoint` begins with the first'
    with pytest.raises(ForeignCheckpoint, match=message): fine_tune(f, cp=cp)
    assert fine_tune(f)[1] == [(3, 2)]
    for o in (f, f.with_name('fit.pt.older')): o.unlink()
    with pytest.raises(ForeignCheckpoint, match='fit.pt.next is there, of the fit after this one'): fine_tune(f)


def test_files_of_a_killed_process_are_removed(tmp_path):
    "A temporary file of this checkpoint goes, one of another checkpoint stays"
    f = tmp_path/'fit.pt'
    for name in ('.fit.123.pt', '.fit.pt.123.next', '.fit.other.123.pt'): (tmp_path/name).write_bytes(b'half')
    Checkpoint(f).remove()
    assert [o.name for o in tmp_path.iterdir()] == ['.fit.other.123.pt']


class CpuAMP(MixedPrecision):
    "fastai's MixedPrecision needs CUDA; this is the same on a CPU, with a scale that overflows at first"
    order, skips = MixedPrecision.order, 0
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.float16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**24, growth_interval=8)
    def after_cancel_step(self): self.skips += 1


@pytest.mark.parametrize('cbs', [list, lambda: [GradientAccumulation(50)]], ids=['every batch', 'accumulated'])
def test_a_loss_scale_is_resumed(cbs, tmp_path):
    "Steps are skipped, before the crash and after it"
    amp, f = CpuAMP('fp16'), tmp_path/'fit.pt'
    expected = fit(learner(amp, *cbs()), tmp_path/'whole.pt')
    interrupted_fit(f, lambda: learner(CpuAMP('fp16'), *cbs()))
    assert torch.load(f, weights_only=True)['fastai']['cpu_amp']['scale'] < 2**24
    assert amp.skips > 1 and torch.equal(fit(learner(CpuAMP('fp16'), *cbs()), f), expected)
