"Methods through settings and the command line: stages and their resumption, what is refused, the list."
import dataclasses
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from fastai.basics import Callback, DataLoaders, Datasets, Learner, accuracy, set_seed
from ltrl_fastai.all import Method, ReflectiveLearning, Stage, adapted_table, aggregate_experts, digits_lt, methods, own_images
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.nets import create_net
from test_cli import run

# (method, which fit is interrupted, after which of its epochs)
staged = [(k, fit, epoch) for k, o in methods.items() if o.then for fit, epoch in ((0, 1), (1, 0), (1, 1)) if fit == 0
          or o.then[0].epochs != 0]


class Crash(Callback):
    "Raises in an epoch of the fit in which `when` holds"
    order = 300
    def __init__(self, fit, epoch): self.fits, self.fit, self.at = -1, fit, epoch
    def before_fit(self): self.fits += 1
    def after_epoch(self):
        if (self.fits, self.epoch) == (self.fit, self.at): raise KeyboardInterrupt


def same(a, b):
    drop = ('seconds', 'command')
    assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}


@pytest.mark.parametrize('method,fit,epoch', staged)
def test_stages_are_resumed_where_they_were(method, fit, epoch, tmp_path):
    "Interrupted in the first stage or in the second: the same numbers as without"
    settings = RunSettings(method=method, epochs=3, reflective={})
    whole, _ = train_run(settings, bar=False)
    assert [o['about'] for o in whole['stages']] == [o.about for o in methods[method].then]
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt', cbs=[Crash(fit, epoch)])
    second = fit == 1 and epoch > 0  # a stage has a file from the end of its first epoch on
    assert (tmp_path/'fit.pt').exists() and (tmp_path/'fit.pt.1').exists() == second
    resumed, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt')
    same(whole, resumed)


def test_nothing_is_left_of_checkpoints(tmp_path):
    "Of no stage"
    run('train', '--dataset', 'digits-lt', '--method', 'ride-assigned', '--epochs', '2', '--rl', '--out', 'out',
        cwd=tmp_path)
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['per_class.png', 'result.json']
    res = json.loads((tmp_path/'out'/'result.json').read_text())
    assert res['method'] == 'ride-assigned'
    assert len(res['stages']) == 1
    assert len(res['stages'][0]['history']['train_loss']) == 2


def seeded_weights(learn, dl):
    "Of experts; the loader's first copy looks at an item, and moves random numbers"
    learn.dls.train.new()
    set_seed(0)
    return aggregate_experts(learn, dl)


def files(folder):
    "Images of three classes: to train on, to validate, to test"
    rng = np.random.default_rng(0)
    for split, n in dict(train=6, valid=2, test=4).items():
        for c in range(3):
            (folder/split/str(c)).mkdir(parents=True)
            for i in range(n):
                PIL.Image.fromarray(rng.integers(0, 255, (24, 24, 3),
                                                 dtype=np.uint8)).save(folder/split/str(c)/f'{i}.png')
    return own_images(folder, bs=4, size=16, device='cpu')


@pytest.mark.parametrize('kind', ['tensors', 'files'])
def test_weights_of_experts_read_no_label(kind, tmp_path):
    "Shuffled, wrong or not there: the same to the bit; and other images give others"
    set_seed(0)
    dls = digits_lt(device='cpu') if kind == 'tensors' else files(tmp_path)
    learn = methods['sade'].learner(dls, create_net('resnet8', dls.c, n_in=dls.n_in))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    want, ds = seeded_weights(learn, dls.test), dls.test.dataset
    if kind == 'tensors':
        others = [type(ds)(ds.x, y, ds.vocab, 1)
                  for y in (ds.targets.flip(0), ds.targets[torch.randperm(len(ds))], None)]
    else:
        wrong = [[(f, v) for (f, _), v in zip(ds.items,
                                              reversed([y for _, y in ds.items]))], [(f, '0') for f, _ in ds.items]]
        others = [Datasets(tls=[tl._new(o, split_idx=1) for tl in ds.tls], n_inp=1) for o in wrong]
    for o in others: assert seeded_weights(learn, dls.test.new(o)).equal(want)
    assert not seeded_weights(learn, dls.valid).equal(want)


def test_the_test_images_are_looked_at_or_else_those_for_validation():
    "And no stage gets hold of a test set that is not to be read"
    seen = []
    methods['looks'] = Method('a look', 'this test',
                              then=(Stage('a look', adapt=lambda learn, dl: seen.append(len(dl.dataset))),))
    try:
        res, _ = train_run(RunSettings(method='looks', epochs=1), bar=False, test=False)
        assert 'accuracy' not in res
        train_run(RunSettings(method='looks', epochs=1), bar=False)
    finally: del methods['looks']
    assert seen == [len(digits_lt().valid_ds), 400]


def test_other_worlds(tmp_path):
    "For each run a row, of a method that looks at their images and of one that doesn't; the balanced world is the balanced test set; again to the same numbers"
    out = run('train', '--dataset', 'digits-lt', '--epochs', '2', '--worlds', '--out', 'a', cwd=tmp_path).stdout
    res = json.loads((tmp_path/'a/result.json').read_text())
    assert 'forward' in out
    assert 'backward' in out
    assert re.search(r'^bsce \+ RL( +\d+\.\d){11}', out, re.M)
    assert re.search(r'^bsce( +\d+\.\d){11}', out, re.M)
    assert [(o['order'], o['factor']) for o in res['worlds']] == [('forward', o)
                                                                  for o in (50, 25, 10, 5,
                                                                      2)]+[('uniform', 1)]+[('backward', o)
                                                                          for o in (2, 5, 10, 25, 50)]
    assert len(res['baseline']['worlds']) == 11
    assert res['worlds'][5]['accuracy'] == pytest.approx(res['accuracy']['all'], abs=1e-3)
    settings = RunSettings(method='sade-aggregated', epochs=2)
    (first, _), (again, _), (without, _) = [train_run(settings, bar=False, worlds=o) for o in (True, True, False)]
    same(first, again)
    assert {k: v for k, v in first.items() if k != 'worlds'
            and k not in ('seconds', 'command')} == {k: v
                                                     for k, v in without.items() if k not in ('seconds', 'command')}


def test_weights_are_found_in_each_world_anew():
    m = methods['sade-aggregated']
    learn = m.learner(digits_lt(device='cpu'), create_net('resnet8', 10, n_in=1))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    before, parts = learn.model.weights.clone(), []

    def look(learn, dl):
        assert learn.model.weights.equal(before), 'what was found in the last world is forgotten'
        parts.append(torch.bincount(dl.dataset.targets[dl.get_idxs()], minlength=10).tolist())
        m.adapt(learn, dl)
    adapted_table(learn, learn.dls.test, look)
    assert len(parts) == 11
    assert parts[0] == parts[-1][::-1]
    assert parts[5] == [40]*10
    assert parts[0][0] == 40
    assert parts[0][-1] == 1
    assert learn.model.weights.equal(before)


def test_the_list(tmp_path):
    rows = json.loads(run('methods', '--json', cwd=tmp_path).stdout)
    assert {o['name'] for o in rows} == set(methods)
    assert all({'name', 'about', 'reference', 'stages', 'views', 'reported'} == set(o) for o in rows)
    assert all(o['about'] and o['reference'] and o['stages'] >= 1 for o in rows)
    shown = run('methods', cwd=tmp_path).stdout
    assert all(k in shown for k in methods) and 'no result of this program' in shown


@pytest.mark.parametrize('kwargs,message', [
    (dict(method='mdcs', crop=0), 'both views would be the same'),
    (dict(method='rides'), "Did you mean 'ride'"),
    (dict(method='sade-aggregated', crop=0), 'both views would be the same'),
])
def test_what_does_not_fit_is_refused_before_training(kwargs, message):
    with pytest.raises(ValueError, match=message): RunSettings(**kwargs).check()


def test_a_net_that_can_not_be_split():
    with pytest.raises(ValueError, match='it is not known where to split a DenseNet'):
        methods['ride'].net(create_net('densenet121', 10), None)


def test_counts_that_are_not_those_of_the_head():
    dls = digits_lt(device='cpu')
    for name in ('bsce', 'ldam-drw', 'ride', 'sade'):
        with pytest.raises(ValueError, match='its head has 7 outputs, and there are 10 classes'):
            methods[name].learner(dls, create_net('resnet8', 7, n_in=1))


def test_a_method_of_the_user_is_known_to_settings():
    "As in the tutorial: a name in `methods`"
    seen = []
    methods['mine'] = Method('softmax, and a look', 'this test',
                             then=(Stage('a look',
                                         lambda learn, counts: seen.append((type(learn.model).__name__,
                                             counts.tolist()))),))
    try: res, _ = train_run(RunSettings(method='mine', epochs=1, reflective={}), bar=False)
    finally: del methods['mine']
    assert seen == [('CifarResNet', res['class_counts'])] and res['stages'][0]['about'] == 'a look'


def test_counts_are_those_that_the_learner_was_made_with():
    "In all stages; where no method made the learner, they are counted"
    seen, counts, dls = [], torch.arange(10, 0, -1), digits_lt(device='cpu')
    m = dataclasses.replace(methods['crt'],
                            then=(Stage('a look', lambda learn, n: seen.append(n), lambda n: seen.append(n) or [],
                                        epochs=1),))
    learn = m.learner(dls, create_net('resnet8', 10, n_in=1), counts.tolist())
    with learn.no_bar(), learn.no_logging(): m.fit(learn, 1, .01)
    assert len(seen) == 2 and all(o.equal(counts) for o in seen)
    other = Learner(dls, create_net('resnet8', 10, n_in=1), loss_func=learn.loss_func)
    with other.no_bar(), other.no_logging(): m.fit(other, 1, .01)  # made without the method: counted
    assert seen[-1].equal(dls.class_counts)


@pytest.mark.parametrize('name', ['mislas', 'ride-assigned', 'tau-norm', 'sade-aggregated'])
def test_a_method_of_stages_is_fitted_once(name):
    "A second time would train another method: refused in words, and fastai's own fit goes on with what there is; an interrupted first stage can begin again"
    m = methods[name]
    learn = m.learner(small_digits(), create_net('resnet8', 10, n_in=1))
    with learn.no_bar(), learn.no_logging():
        m.fit(learn, 2, .01)
        with pytest.raises(ValueError, match='stage 2 of a method has begun on this learner.*Make a new learner'):
            m.fit(learn, 2, .01)
        learn.fit(1, .01)
        fresh = m.learner(learn.dls, create_net('resnet8', 10, n_in=1))
        with fresh.no_bar(), fresh.no_logging():
            with pytest.raises(KeyboardInterrupt): m.fit(fresh, 2, .01, cbs=lambda i: [Crash(0, 1)])
            m.fit(fresh, 2, .01)  # of an interrupted first stage nothing has changed


@pytest.mark.parametrize('name', ['mixup', 'ldam-drw', 'mdcs'])
def test_a_method_of_one_stage_goes_on(name):
    "With its callbacks, as usual with fastai"
    m = methods[name]
    learn = m.learner(small_digits(), create_net('resnet8', 10, n_in=1))
    mine = {type(o) for o in m.cbs(torch.ones(10))}
    with learn.no_bar(), learn.no_logging(): m.fit(m.fit(learn, 2, .01), 2, .01)
    assert mine and mine <= {type(o) for o in learn.cbs}


@pytest.mark.parametrize('name', methods)
def test_a_state_is_plain(name):
    "What a method puts on a learner can be kept and read without pickled code"
    m, dls = methods[name], digits_lt(device='cpu')
    learn = m.learner(dls, create_net('resnet8', 10, n_in=1), cbs=ReflectiveLearning())
    torch.save(learn.model.state_dict(), f := learn.path/'state.pt')
    try: learn.model.load_state_dict(torch.load(f, weights_only=True))
    finally: f.unlink()


def small_digits():
    "Twenty images, two of each class, to train on and to be asked about"
    dls = digits_lt(device='cpu')
    ds = dls.train_ds
    ids = torch.cat([(ds.targets == c).nonzero().flatten()[:2] for c in range(10)])
    few = type(ds)(ds.x[ids], ds.targets[ids], ds.vocab, 1)
    return DataLoaders(dls.train.new(type(ds)(ds.x[ids], ds.targets[ids], ds.vocab, ds.split_idx), bs=20),
                       dls.valid.new(few), device='cpu')


@pytest.mark.parametrize('rl', [None, dict(preset='v0.0.1', ks=True, kc=True)], ids=['alone', 'with RL'])
@pytest.mark.parametrize('name', methods)
def test_a_small_batch_by_heart(name, rl):
    "After all stages; with Reflective Learning too, which reviews logits of classes and summarises a feature for each"
    set_seed(0, reproducible=True)
    m, dls = methods[name], small_digits()
    learn = m.learner(dls, create_net('resnet8', 10, n_in=1), cbs=[] if rl is None else ReflectiveLearning(**rl),
                      metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        # its centres have to stand out from a queue of keys that are all alike at first
        m.fit(learn, 200 if name == 'paco' else 60, .01)
        assert learn.validate()[1] == 1.
    if rl is None: return
    assert learn.knowledge_review.teachers.store.get(torch.arange(20))[0].shape == (20, 10)
    assert len(learn.knowledge_summary.centers) == 10 and learn.knowledge_summary.centers.isfinite().all()
    assert all(o['review_loss'] >= 0 for o in learn.loss_terms.history[1:])


@pytest.mark.parametrize('name', ['crt', 'mislas', 'ride-assigned', 'ride-distilled'])
def test_a_crash_in_the_second_stage_leaves_nothing_frozen(name):
    "As a newcomer ends a cell of a notebook: all may learn again, Reflective Learning is back, the loss has no late weights"
    m = methods[name]
    learn = m.learner(small_digits(), create_net('resnet8', 10, n_in=1), cbs=ReflectiveLearning())
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        m.fit(learn, 3, .01, cbs=lambda i: [Crash(0, 2)] if i else [])
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.knowledge_review in learn.cbs
    assert getattr(learn.loss_func, 'weight', None) is None
