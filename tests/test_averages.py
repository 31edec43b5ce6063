"Averages of weights: what they are, what evaluates, what a crash leaves, and how a fit resumes."
import copy
from functools import partial

import pytest
import torch
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation
from fastai.vision.all import Callback, CancelStepException, Learner, SGD, nn, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, digits_lt, shot_accuracies
from ltrl_fastai.methods.averages import WeightAverage
from ltrl_fastai.methods.sam import SAM
from ltrl_fastai.methods.views import SplitViews
from parts import all_three


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.2),
                         nn.Linear(16, 10))


def learner(*cbs, make=net, n_max=40):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=n_max)
    return Learner(dls, make(), loss_func=BalancedSoftmaxLoss(dls.class_counts), opt_func=partial(SGD, mom=.9),
                   metrics=shot_accuracies(dls.class_counts), cbs=cbs)


def fit(learn, n=4, lr=.1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn


def copied(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


class Steps(Callback):
    "Keep the state of the model after each step, after each training pass, and in each validation"
    order, run_valid = 500, True
    def before_fit(self): self.steps, self.passes, self.valid, self.ends = [], [], [], []
    def after_step(self): self.steps.append(copied(self.learn))
    def after_train(self): self.passes.append(copied(self.learn))
    def after_validate(self): self.valid.append(copied(self.learn))
    def after_epoch(self): self.ends.append(copied(self.learn))


class AtEnd(Callback):
    "Keep the state of the model where `Checkpoint` saves it"
    order = 2000
    def before_fit(self): self.ends = []
    def after_epoch(self): self.ends.append(copied(self.learn))


def test_an_ema_equals_a_loop_by_hand():
    "Of parameters and of the statistics of BatchNorm; counts are those of the last step"
    learn = fit(learner(WeightAverage(decay=.9), Steps()))
    average = None
    for step in learn.steps.steps:
        if average is None: average = {k: v.clone() for k, v in step.items()}
        for k, v in step.items(): average[k] = .9*average[k]+.1*v if v.is_floating_point() else v
    for k, v in learn.model.state_dict().items(): torch.testing.assert_close(v, average[k], rtol=1e-4, atol=1e-6)
    assert learn.weight_average.n_averaged == len(learn.steps.steps)


def test_swa_equals_the_mean_of_the_last_epochs():
    "With statistics of BatchNorm of all training images"
    learn = fit(learner(WeightAverage('swa', start=.5), Steps()))
    assert learn.weight_average.n_averaged == 2
    last = learn.steps.passes[2:]
    for k, p in learn.model.named_parameters(): torch.testing.assert_close(p.detach(), (last[0][k]+last[1][k])/2)


def test_the_statistics_for_swa_are_those_of_all_training_images():
    def make(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    set_seed(0)
    dls = digits_lt(device='cpu', n_max=40, tfms=dict(crop=0, flip=False), bs=8)
    learn = Learner(dls, make(), loss_func=BalancedSoftmaxLoss(dls.class_counts), cbs=WeightAverage('swa'))
    fit(learn)
    batches = [b[0].flatten(1) for b in dls.train.new(shuffle=False, drop_last=False)]
    means = torch.stack([o.mean(0) for o in batches if len(o) > 1])
    torch.testing.assert_close(learn.model[1].running_mean, torch.as_tensor(means.mean(0)), rtol=1e-4, atol=1e-5)


kinds = dict(ema=dict(decay=.9), swa=dict(kind='swa', start=.25))


@pytest.mark.parametrize('kwargs', kinds.values(), ids=kinds)
@pytest.mark.parametrize('cbs', [lambda: [], lambda: [all_three()], lambda: [SAM(.2), GradientAccumulation(100)]],
                         ids=['alone', 'reflective', 'sam'])
def test_training_is_that_without_an_average(kwargs, cbs):
    "To the last bit, whatever the average does between epochs; the weights of training are kept"
    plain, averaged = fit(learner(*cbs())), fit(learner(*cbs(), WeightAverage(**kwargs)))
    assert plain.recorder.losses == averaged.recorder.losses
    assert_same(copied(plain), averaged.weight_average.raw_weights)
    assert not torch.equal(plain.model[1].weight, averaged.model[1].weight)


@pytest.mark.parametrize('kwargs', kinds.values(), ids=kinds)
def test_evaluation_uses_the_average(kwargs):
    "In validation and where callbacks save the best epoch; at the end of an epoch the model holds what is trained"
    learn = fit(learner(WeightAverage(**kwargs), Steps(), AtEnd()))
    steps, average = learn.steps, learn.weight_average
    for valid, end in zip(steps.valid, steps.ends): assert_same(valid, end)
    for end, trained in zip(learn.at_end.ends, steps.passes): assert_same(end, trained)
    for valid, trained in list(zip(steps.valid, steps.passes))[2:]:
        assert not torch.equal(valid['1.weight'], trained['1.weight'])
    assert_same(steps.valid[-1], copied(learn))
    assert_same(average.raw_weights, steps.passes[-1])
    loss = learn.recorder.values[-1][1]  # predictions empty its table
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[0] == loss
    assert_same(average.average, copied(learn))


def test_parameters_stay_the_same_objects():
    learn = learner(WeightAverage())
    before = [id(p) for p in learn.model.parameters()]
    assert [id(p) for p in fit(learn).model.parameters()] == before


def test_without_decay_there_is_no_average():
    plain, averaged = fit(learner()), fit(learner(WeightAverage(decay=0.)))
    assert_same(copied(plain), copied(averaged))
    assert [list(o)[:2] for o in plain.recorder.values] == [list(o)[:2] for o in averaged.recorder.values]


class Raises(Callback):
    "Raise an error in an event of an epoch"
    order = 100
    def __init__(self, event, error): self.event, self.error = event, error
    def __call__(self, name):
        if name == self.event and getattr(self.learn, 'epoch', 0) == 2: raise self.error('here')
        return super().__call__(name)


@pytest.mark.parametrize('error', [InterruptedError, KeyboardInterrupt])
@pytest.mark.parametrize('event', ['after_validate', 'after_epoch'])
@pytest.mark.parametrize('kwargs', kinds.values(), ids=kinds)
def test_a_crash_leaves_the_weights_of_training(kwargs, event, error):
    learn = learner(WeightAverage(**kwargs), Steps(), Raises(event, error))
    with pytest.raises(error): fit(learn)
    assert_same(copied(learn), learn.steps.passes[-1])
    learn.remove_cb(Raises)
    fit(learn, 1)  # and training goes on


def test_an_early_stop_ends_with_the_average():
    stop = EarlyStoppingCallback(monitor='all', min_delta=1., patience=1)
    learn = fit(learner(WeightAverage(decay=.9), Steps(), stop))
    assert len(learn.steps.valid) < 4
    assert_same(copied(learn), learn.steps.valid[-1])


class Validates(Callback):
    "Begin to validate within a training pass, as a callback of a user may do"
    order, run_valid = 60, False
    def after_batch(self):
        if self.iter == 1: self.learn('before_validate')
    def before_batch(self): self.model.train()


def test_validation_within_a_training_pass_changes_no_training():
    plain, averaged = fit(learner(Validates())), fit(learner(Validates(), WeightAverage(decay=.9)))
    assert_same(copied(plain), averaged.weight_average.raw_weights)


class SkipsSteps(Callback):
    "Skip every other step, as mixed precision does after an overflow"
    order, run_valid = 9, False
    def before_step(self):
        if self.iter % 2: raise CancelStepException


def test_a_skipped_step_does_not_count():
    learn = fit(learner(WeightAverage(), SkipsSteps()), 1)
    assert learn.weight_average.n_averaged == (len(learn.dls.train)+1)//2


class Crash(Callback):
    "Raise an error in the second batch of an epoch"
    order = -100
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise InterruptedError('crash')


@pytest.mark.parametrize('kwargs', kinds.values(), ids=kinds)
def test_an_interrupted_fit_resumes_to_the_same_bits(kwargs, tmp_path):
    "Average, weights of training and table; also a fit that has ended already"
    def run(file, *more):
        learn = learner(WeightAverage(**kwargs), all_three())
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, .1, cbs=[Checkpoint(file), *more])
        return learn
    whole = run(tmp_path/'whole.pt')
    with pytest.raises(InterruptedError): run(tmp_path/'fit.pt', Crash(2))
    for _ in range(2):
        resumed = run(tmp_path/'fit.pt')
        assert_same(copied(resumed), copied(whole))
        assert_same(resumed.weight_average.raw_weights, whole.weight_average.raw_weights)
        assert [list(o)[1] for o in resumed.recorder.values] == [list(o)[1] for o in whole.recorder.values]


def test_a_second_fit_has_an_average_of_its_own():
    learn = fit(learner(WeightAverage(decay=.9)))
    first = copy.deepcopy(learn.weight_average.average)
    fit(learn, 2)
    assert learn.weight_average.n_averaged == 2*len(learn.dls.train)
    assert not torch.equal(first['1.weight'], learn.weight_average.average['1.weight'])


def test_what_swa_cannot_be_used_with_is_named():
    with pytest.raises(ValueError, match="together with SplitViews. Use kind='ema'"):
        fit(learner(WeightAverage('swa'), SplitViews()))


bad = [(dict(kind='mean'), 'kind: '), (dict(decay=1.), 'decay: expected a share from 0 to below 1'),
       (dict(start=-1), 'start: expected'), (dict(kind='swa', start=1.5), 'start: expected')]


@pytest.mark.parametrize('kwargs,message', bad)
def test_invalid_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message): WeightAverage(**kwargs)
