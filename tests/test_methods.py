"Methods through settings and the command line: stages and their resumption, rejected settings, the list of methods."
import dataclasses
import functools
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from fastai.basics import Callback, CancelValidException, DataLoaders, Datasets, Learner, accuracy, set_seed
from ltrl_fastai.all import (Method, ReflectiveLearning, Stage, adapted_table, aggregate_experts, digits_lt, methods,
                             own_images)
from ltrl_fastai.evaluation import shift
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.nets import create_net
from test_cli import run

uncorrected = {'imbsam', 'focal-sam'}  # they mix gradients at two points, and Knowledge Correction refuses them
from_scratch = [name for name, o in methods.items() if not o.pretrained]


def interruptions():
    "(method, index of the interrupted fit, epoch after which it is interrupted) for all methods with a second stage"
    for name, method in methods.items():
        if not method.later_stages: continue
        yield name, 0, 1
        if method.later_stages[0].epochs != 0: yield from ((name, 1, 0), (name, 1, 1))


class Crash(Callback):
    "Raises `KeyboardInterrupt` after a given epoch of a given fit"
    order = 300
    def __init__(self, fit, epoch):
        self.fit = fit
        self.at = epoch
        self.fits = -1
    def before_fit(self): self.fits += 1
    def after_epoch(self):
        if (self.fits, self.epoch) == (self.fit, self.at): raise KeyboardInterrupt


def comparable(result, *dropped):
    "A result without the entries that differ between equal runs"
    return {k: v for k, v in result.items() if k not in ('seconds', 'command', *dropped)}


def same(a, b): assert comparable(a) == comparable(b)


class OnlyTrain(Callback):
    "Leave out the validation of all epochs but the last, where it is not the point"
    order = -300
    def before_validate(self):
        if self.epoch < self.n_epoch-1: raise CancelValidException


def three_epochs(method): return RunSettings(method=method, epochs=3, n_max=40, n_valid=3, reflective={})


@pytest.fixture(scope='module')
def whole_run():
    "The result of a run that nothing interrupts, by the name of its method"
    return functools.cache(lambda method: train_run(three_epochs(method), bar=False)[0])


@pytest.mark.slow
@pytest.mark.parametrize('method,fit,epoch', list(interruptions()))
def test_stages_are_resumed_where_they_were(method, fit, epoch, whole_run, few_test_digits, tmp_path):
    "A run interrupted in the first or second stage gives the same numbers as an uninterrupted one"
    settings, whole = three_epochs(method), whole_run(method)
    assert [o['about'] for o in whole['stages']] == [o.about for o in methods[method].later_stages]
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt', cbs=[Crash(fit, epoch)])
    assert (tmp_path/'fit.pt').exists()
    in_second = fit == 1 and epoch > 0  # a stage has a file from the end of its first epoch on
    assert (tmp_path/'fit.pt.1').exists() == in_second
    resumed, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt')
    same(whole, resumed)


@pytest.mark.slow
def test_no_checkpoint_is_left(tmp_path):
    run('train', '--dataset', 'digits-lt', '--method', 'ride-assigned', '--epochs', '2', '--rl', '--out', 'out',
        cwd=tmp_path)
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['model', 'per_class.png', 'result.json']
    res = json.loads((tmp_path/'out'/'result.json').read_text())
    assert res['method'] == 'ride-assigned'
    assert len(res['stages']) == 1
    assert len(res['stages'][0]['history']['train_loss']) == 2


def seeded_weights(learn, dl):
    "Expert weights fitted with a fixed seed"
    learn.dls.train.new()  # a loader's first copy looks at an item, which draws random numbers
    set_seed(0)
    return aggregate_experts(learn, dl, epochs=2)


def image_folders(folder):
    "Loaders of image files of three classes, for training, validation and test"
    rng = np.random.default_rng(0)
    for split, n in dict(train=6, valid=2, test=4).items():
        for c in range(3):
            of_class = folder/split/str(c)
            of_class.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(of_class/f'{i}.png')
    return own_images(folder, bs=4, size=16, device='cpu')


@pytest.mark.parametrize('kind', ['tensors', 'files'])
def test_expert_weights_do_not_depend_on_labels(kind, tmp_path):
    "Shuffled, wrong or missing labels give identical weights; other images give other weights"
    set_seed(0)
    dls = digits_lt(device='cpu') if kind == 'tensors' else image_folders(tmp_path)
    learn = methods['sade'].learner(dls, create_net('resnet8', dls.c, n_in=dls.n_in))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    expected = seeded_weights(learn, dls.test)
    ds = dls.test.dataset
    if kind == 'tensors':
        wrong = (ds.targets.flip(0), ds.targets[torch.randperm(len(ds))], None)
        others = [type(ds)(ds.x, y, ds.vocab, 1) for y in wrong]
    else:
        files = [f for f, _ in ds.items]
        labels = [y for _, y in ds.items]
        wrong = [list(zip(files, reversed(labels))), [(f, '0') for f in files]]
        others = [Datasets(tls=[tl._new(o, split_idx=1) for tl in ds.tls], n_inp=1) for o in wrong]
    for o in others: assert seeded_weights(learn, dls.test.new(o)).equal(expected)
    assert not seeded_weights(learn, dls.valid).equal(expected)


def test_a_stage_adapts_to_test_images_or_else_to_validation_images():
    "No stage gets a test set that must not be used"
    sizes = []
    stage = Stage('keep the size', adapt=lambda learn, dl: sizes.append(len(dl.dataset)))
    methods['adapting'] = Method('softmax, then a stage that adapts', 'this test', later_stages=(stage,))
    try:
        res, _ = train_run(RunSettings(method='adapting', epochs=1), bar=False, test=False)
        assert 'accuracy' not in res
        train_run(RunSettings(method='adapting', epochs=1), bar=False)
    finally: del methods['adapting']
    assert sizes == [len(digits_lt().valid_ds), 400]


def test_other_test_distributions(tmp_path):
    "Each run gets a row with one accuracy per distribution"
    options = ('--dataset', 'digits-lt', '--epochs', '2', '--test-distributions', '--out', 'a')
    out = run('train', *options, cwd=tmp_path).stdout
    res = json.loads((tmp_path/'a/result.json').read_text())
    assert 'forward' in out
    assert 'backward' in out
    assert re.search(r'^bsce \+ RL( +\d+\.\d){11}', out, re.M)
    assert re.search(r'^bsce( +\d+\.\d){11}', out, re.M)
    forward = [('forward', o) for o in (50, 25, 10, 5, 2)]
    backward = [('backward', o) for o in (2, 5, 10, 25, 50)]
    assert [(o['order'], o['factor']) for o in res['test_distributions']] == [*forward, ('uniform', 1), *backward]
    assert len(res['baseline']['test_distributions']) == 11
    # the uniform distribution is the balanced test set
    assert res['test_distributions'][5]['accuracy'] == pytest.approx(res['accuracy']['all'], abs=1e-3)


def test_other_test_distributions_of_a_method_that_adapts_to_them(few_test_digits, monkeypatch):
    "The numbers are the same in a second run, and measuring them changes nothing else"
    monkeypatch.setattr(shift, 'test_distributions', [(5, 'forward'), (5, 'backward')])
    settings = RunSettings(method='sade-aggregated', epochs=1, n_max=40)
    def trained(test_distributions): return train_run(settings, bar=False, test_distributions=test_distributions)[0]
    first, again, without = map(trained, (True, True, False))
    same(first, again)
    assert comparable(first, 'test_distributions') == comparable(without)


def test_expert_weights_are_fitted_to_each_test_distribution():
    method = methods['sade-aggregated']
    learn = method.learner(digits_lt(device='cpu'), create_net('resnet8', 10, n_in=1))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    before = learn.model.weights.clone()
    counts = []

    def adapt(learn, dl):
        assert learn.model.weights.equal(before), 'the weights of the previous distribution are still there'
        counts.append(torch.bincount(dl.dataset.targets[dl.get_idxs()], minlength=10).tolist())
        aggregate_experts(learn, dl, epochs=1)
    adapted_table(learn, learn.dls.test, adapt)
    assert len(counts) == 11
    assert counts[0] == counts[-1][::-1]
    assert counts[5] == [40]*10
    assert counts[0][0] == 40
    assert counts[0][-1] == 1
    assert learn.model.weights.equal(before)


def test_the_list(tmp_path):
    rows = json.loads(run('methods', '--json', cwd=tmp_path).stdout)
    assert {o['name'] for o in rows} == set(methods)
    assert all({'name', 'about', 'reference', 'year', 'stages', 'views', 'reported'} == set(o) for o in rows)
    assert all(o['about'] and o['reference'] and o['stages'] >= 1 for o in rows)
    shown = run('methods', cwd=tmp_path).stdout
    assert all(k in shown for k in methods)
    assert 'no result of this program' in shown


@pytest.mark.parametrize('kwargs,message', [
    (dict(method='mdcs', crop=0), 'both views would be the same'),
    (dict(method='rides'), "Did you mean 'ride'"),
    (dict(method='sade-aggregated', crop=0), 'both views would be the same'),
])
def test_settings_that_do_not_fit_are_rejected_before_training(kwargs, message):
    with pytest.raises(ValueError, match=message): RunSettings(**kwargs).check()


def test_a_net_that_cannot_be_split():
    with pytest.raises(ValueError, match='it is not known where to split a DenseNet'):
        methods['ride'].net(create_net('densenet121', 10), None)


def test_a_head_that_does_not_fit_the_counts():
    dls = digits_lt(device='cpu')
    for name in ('bsce', 'ldam-drw', 'ride', 'sade'):
        with pytest.raises(ValueError, match='its head has 7 outputs, and there are 10 classes'):
            methods[name].learner(dls, create_net('resnet8', 7, n_in=1))


def test_settings_know_methods_that_a_user_adds():
    "As in the tutorial: a name in `methods`"
    calls = []

    def keep(learn, counts): calls.append((type(learn.model).__name__, counts.tolist()))
    stage = Stage('keep the arguments', keep)
    methods['own'] = Method('softmax, then a stage', 'this test', later_stages=(stage,))
    try: res, _ = train_run(RunSettings(method='own', epochs=1, reflective={}), bar=False)
    finally: del methods['own']
    assert calls == [('CifarResNet', res['class_counts'])]
    assert res['stages'][0]['about'] == 'keep the arguments'


def test_stages_get_the_counts_that_the_learner_was_made_with():
    "If no method made the learner, its training images are counted"
    got = []
    counts = torch.arange(10, 0, -1)
    dls = digits_lt(device='cpu')
    stage = Stage('keep the counts', lambda learn, n: got.append(n), lambda n: got.append(n) or [], epochs=1)
    method = dataclasses.replace(methods['crt'], later_stages=(stage,))
    learn = method.learner(dls, create_net('resnet8', 10, n_in=1), counts.tolist())
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 1, .01)
    assert len(got) == 2
    assert all(o.equal(counts) for o in got)
    other = Learner(dls, create_net('resnet8', 10, n_in=1), loss_func=learn.loss_func)
    with other.no_bar(), other.no_logging(): method.fit(other, 1, .01)
    assert got[-1].equal(dls.class_counts)


@pytest.mark.parametrize('name', ['mislas', 'ride-assigned', 'tau-norm', 'sade-aggregated'])
def test_a_method_with_stages_is_fitted_once(name):
    "A second `Method.fit` is rejected, `learn.fit` continues training, and an interrupted first stage can begin again"
    method = methods[name]
    learn = method.learner(small_digits(), create_net('resnet8', 10, n_in=1))
    with learn.no_bar(), learn.no_logging():
        method.fit(learn, 2, .01)
        with pytest.raises(ValueError, match='stage 2 of a method has begun on this learner.*Make a new learner'):
            method.fit(learn, 2, .01)
        learn.fit(1, .01)
    fresh = method.learner(learn.dls, create_net('resnet8', 10, n_in=1))
    with fresh.no_bar(), fresh.no_logging():
        with pytest.raises(KeyboardInterrupt): method.fit(fresh, 2, .01, cbs=lambda i: [Crash(0, 1)])
        method.fit(fresh, 2, .01)


@pytest.mark.parametrize('name', ['mixup', 'ldam-drw', 'mdcs'])
def test_a_method_with_one_stage_can_be_fitted_again(name):
    "Its callbacks stay on the learner, as usual in fastai"
    method = methods[name]
    learn = method.learner(small_digits(), create_net('resnet8', 10, n_in=1))
    of_method = {type(o) for o in method.cbs(torch.ones(10))}
    with learn.no_bar(), learn.no_logging(): method.fit(method.fit(learn, 2, .01), 2, .01)
    assert of_method
    assert of_method <= {type(o) for o in learn.cbs}


@pytest.mark.parametrize('name', from_scratch)
def test_a_state_contains_no_pickled_code(name, tmp_path):
    learn = methods[name].learner(digits_lt(device='cpu'), create_net('resnet8', 10, n_in=1), cbs=ReflectiveLearning())
    torch.save(learn.model.state_dict(), tmp_path/'state.pt')
    learn.model.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))


def small_digits():
    "Twenty images, two of each class, for training and for validation"
    dls = digits_lt(device='cpu')
    ds = dls.train_ds
    ids = torch.cat([(ds.targets == c).nonzero().flatten()[:2] for c in range(10)])
    train, valid = [type(ds)(ds.x[ids], ds.targets[ids], ds.vocab, split_idx) for split_idx in (ds.split_idx, 1)]
    return DataLoaders(dls.train.new(train, bs=20), dls.valid.new(valid), device='cpu')


@pytest.mark.slow
@pytest.mark.parametrize('rl', [None, dict(preset='v0.0.1', ks=True, kc=True)], ids=['alone', 'with RL'])
@pytest.mark.parametrize('name', from_scratch)
def test_a_small_batch_is_overfitted(name, rl):
    "After all stages; Reflective Learning reviews logits `(N, C)` and summarises one feature per class"
    set_seed(0, reproducible=True)
    if rl and name in uncorrected: rl = dict(rl, kc=False)
    method = methods[name]
    learn = method.learner(small_digits(), create_net('resnet8', 10, n_in=1), metrics=accuracy,
                           cbs=[] if rl is None else ReflectiveLearning(**rl))
    epochs = 200 if name == 'paco' else 60  # PaCo's centres must first stand out from a queue of similar keys
    with learn.no_bar(), learn.no_logging():
        with learn.added_cbs(OnlyTrain()): method.fit(learn, epochs, .01)
        assert learn.validate()[1] == 1.
    if rl is None: return
    assert learn.knowledge_review.teachers.store.get(torch.arange(20)).shape == (20, 10)
    assert len(learn.knowledge_summary.centers) == 10
    assert learn.knowledge_summary.centers.isfinite().all()
    assert all(o['review_loss'] >= 0 for o in learn.loss_terms.history[1:])


@pytest.mark.parametrize('name', ['crt', 'mislas', 'ride-assigned', 'ride-distilled'])
def test_a_crash_in_the_second_stage_leaves_nothing_frozen(name):
    "As when a notebook cell is interrupted: Reflective Learning is back, and the loss has no deferred weights"
    method = methods[name]
    learn = method.learner(small_digits(), create_net('resnet8', 10, n_in=1), cbs=ReflectiveLearning())
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        method.fit(learn, 3, .01, cbs=lambda i: [Crash(0, 2)] if i else [])
    assert all(p.requires_grad for p in learn.model.parameters())
    assert learn.knowledge_review in learn.cbs
    assert getattr(learn.loss_func, 'weight', None) is None
