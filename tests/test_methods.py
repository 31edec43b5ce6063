"Methods through settings and the command line: stages and their resumption, what is refused, the list."
import json

import pytest
import torch
from fastai.basics import Callback, DataLoaders, accuracy, set_seed
from ltrl_fastai.all import Method, ReflectiveLearning, Stage, digits_lt, methods
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.nets import create_net
from test_cli import run

# (method, which fit is interrupted, after which of its epochs)
staged = [(k, fit, epoch) for k, o in methods.items() if o.then for fit, epoch in ((0, 1), (1, 0), (1, 1)) if fit == 0 or o.then[0].epochs != 0]


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
    with pytest.raises(KeyboardInterrupt): train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt', cbs=[Crash(fit, epoch)])
    assert (tmp_path/'fit.pt').exists() and (tmp_path/'fit.pt.1').exists() == (fit == 1)
    resumed, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt')
    same(whole, resumed)


def test_nothing_is_left_of_checkpoints(tmp_path):
    "Of no stage"
    run('train', '--method', 'ride-assigned', '--epochs', '2', '--rl', '--out', 'out', cwd=tmp_path)
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['per_class.png', 'result.json']
    res = json.loads((tmp_path/'out'/'result.json').read_text())
    assert res['method'] == 'ride-assigned' and len(res['stages']) == 1 and len(res['stages'][0]['history']['train_loss']) == 2


def test_the_list(tmp_path):
    rows = json.loads(run('methods', '--json', cwd=tmp_path).stdout)
    assert {o['name'] for o in rows} == set(methods) and all({'name', 'about', 'reference', 'stages', 'views', 'reported'} == set(o) for o in rows)
    assert all(o['about'] and o['reference'] and o['stages'] >= 1 for o in rows)
    shown = run('methods', cwd=tmp_path).stdout
    assert all(k in shown for k in methods) and 'no result of this program' in shown


@pytest.mark.parametrize('kwargs,message', [
    (dict(method='mdcs', crop=0), 'both views would be the same'),
    (dict(method='rides'), "Did you mean 'ride'"),
])
def test_what_does_not_fit_is_refused_before_training(kwargs, message):
    with pytest.raises(ValueError, match=message): RunSettings(**kwargs).check()


def test_a_net_that_can_not_be_split():
    with pytest.raises(ValueError, match='it is not known where to split a DenseNet'): methods['ride'].net(create_net('densenet121', 10), None)


def test_counts_that_are_not_those_of_the_head():
    dls = digits_lt(device='cpu')
    for name in ('bsce', 'ldam-drw', 'ride', 'sade'):
        with pytest.raises(ValueError, match='its head has 7 outputs, and there are 10 classes'): methods[name].learner(dls, create_net('resnet8', 7, n_in=1))


def test_a_method_of_the_user_is_known_to_settings():
    "As in the tutorial: a name in `methods`"
    seen = []
    methods['mine'] = Method('softmax, and a look', 'this test', then=(Stage('a look', lambda learn, counts: seen.append((type(learn.model).__name__, counts.tolist()))),))
    try: res, _ = train_run(RunSettings(method='mine', epochs=1, reflective={}), bar=False)
    finally: del methods['mine']
    assert seen == [('CifarResNet', res['class_counts'])] and res['stages'][0]['about'] == 'a look'


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
    return DataLoaders(dls.train.new(type(ds)(ds.x[ids], ds.targets[ids], ds.vocab, ds.split_idx), bs=20), dls.valid.new(few), device='cpu')


@pytest.mark.parametrize('rl', [None, dict(ks=True, kc=True)], ids=['alone', 'with RL'])
@pytest.mark.parametrize('name', methods)
def test_a_small_batch_by_heart(name, rl):
    "After all stages; with Reflective Learning too, which reviews logits of classes and summarises a feature for each"
    set_seed(0, reproducible=True)
    m, dls = methods[name], small_digits()
    learn = m.learner(dls, create_net('resnet8', 10, n_in=1), cbs=[] if rl is None else ReflectiveLearning(**rl), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        m.fit(learn, 200 if name == 'paco' else 60, .01)  # its centres have to stand out from a queue of keys that are all alike at first
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
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): m.fit(learn, 3, .01, cbs=lambda i: [Crash(0, 2)] if i else [])
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.knowledge_review in learn.cbs
    assert getattr(learn.loss_func, 'weight', None) is None
