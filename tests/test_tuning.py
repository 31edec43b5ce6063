"Fields of a run that regularise, and `ltrl compare --tune`: the same grid for both sides, chosen without the test set."
import json
import math
import random
from itertools import chain

import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.vision.all import CancelFitException, Callback, F, first, nn, noop
from ltrl_fastai.cli.main import app
from ltrl_fastai.core.files import write_json
from ltrl_fastai.experiments import runner, training, tuning
from ltrl_fastai.experiments import settings as settings_module
from ltrl_fastai.experiments.plan import Variant, make_plan, parse_setting, variants
from ltrl_fastai.experiments.runner import Failed, compute_run, plan_status
from ltrl_fastai.experiments.summary import evidence, load_results, tuned_gains
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.experiments.tuning import check_disjoint, greedy_search, tune, tuned_plan, tuning_cases
from ltrl_fastai.methods.catalogue import methods
from ltrl_fastai.methods.losses import BalancedSoftmaxLoss, smooth_labels
from ltrl_fastai.methods.nets import create_net, drop_features
from ltrl_fastai.methods.posthoc import LogitAdjustment, best_tau, crossfit_adjusted
from typer.testing import CliRunner

tiny = dict(dataset='digits-lt', epochs=1, n_max=20, n_valid=3)
grid = {'dropout': [0., .5], 'lr': [.05, .1], 'posthoc': [0., 'auto']}


class Keep(Callback):
    "Hands out the learner"
    def after_fit(self): type(self).kept = self.learn


def trained(**kw):
    res, report = train_run(RunSettings(**{**tiny, **kw}), bar=False, cbs=Keep())
    return res, report, Keep.kept


def dropouts(net): return [m.p for m in net.modules() if isinstance(m, nn.Dropout)]


# Fields reach the learner


def test_dropout_is_before_the_classifier():
    net = RunSettings(**tiny, dropout=.5).learner().model
    assert [type(m) for m in net.fc] == [nn.Dropout, nn.Linear] and dropouts(net) == [.5]
    net = RunSettings(**tiny, dropout=.5, method='sade').learner().model
    assert dropouts(net) == [.5]*3 and all(isinstance(m[0], nn.Dropout) for m in net.heads.heads)
    assert dropouts(RunSettings(**tiny, dropout=.5, method='mdcs').learner().model) == [.5]*3
    assert dropouts(RunSettings(**tiny).learner().model) == []


def test_dropout_of_an_mlp_is_in_the_input_too():
    net = create_net('mlp16', 3, n_in=8, dropout=.5)
    assert isinstance(net[0], nn.Dropout) and isinstance(net[-2], nn.Dropout) and dropouts(net) == [.3, .5]
    assert dropouts(create_net('mlp16', 3, n_in=8)) == []
    torch.manual_seed(0)
    plain = create_net('mlp16', 3, n_in=8).eval()
    torch.manual_seed(0)
    dropped = create_net('mlp16', 3, n_in=8, dropout=.5).eval()
    x = torch.randn(4, 8)
    assert torch.equal(plain(x), dropped(x))  # the same weights, and nothing is dropped outside of training
    torch.manual_seed(0)
    a = dropped.train()(x)
    torch.manual_seed(1)
    b = dropped(x)
    assert not torch.equal(a, b)


def test_a_dropout_that_is_there_is_changed():
    net = create_net('efficientnet_b0', 3, dropout=.7)
    assert [m.p for m in net.classifier if isinstance(m, nn.Dropout)] == [.7] and len(net.classifier) == 2
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    assert dropouts(drop_features(net, .2)) == [.2] and net(torch.zeros(2, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match='no layer with in_features'): drop_features(nn.Flatten(), .2)


trained_here = [k for k, o in methods.items() if k != 'ride-distilled' and not o.pretrained]
of_each_kind = ('bsce', 'crt', 'sade', 'paco')  # a loss, two stages, experts, two views


@pytest.mark.parametrize('method', [
    pytest.param(o, marks=[] if o in of_each_kind else pytest.mark.slow) for o in trained_here])
def test_every_method_trains_with_what_it_takes(method):
    "One epoch with all fields that it does not refuse"
    fields = {}
    for name, value in dict(dropout=.5, mixup=.2, label_smoothing=.1, posthoc='auto').items():
        try: RunSettings(**tiny, method=method, **{name: value})
        except ValueError as e: assert str(e).startswith(f'{name}: '), e
        else: fields[name] = value
    res, _ = train_run(RunSettings(**tiny, method=method, reflective={}, **fields), bar=False, test=False)
    assert {k: res['settings'][k] for k in fields} == fields and res['valid_accuracy']['all'] is not None
    assert ('posthoc' in res) == ('posthoc' in fields)


def test_mixup_is_a_callback_of_the_first_stage():
    learn = RunSettings(**tiny, mixup=.2).learner()
    cb, = learn._grab_cbs(MixUp)
    assert cb.distrib.concentration0 == pytest.approx(.2)
    seen = []

    class Look(Callback):
        order, run_valid = 45, False
        def after_loss(self):
            mix, counts = self.learn.mix_up, self.dls.class_counts
            z = self.learn.pred.detach()+counts.float().log()
            other, own = (F.cross_entropy(z, y.long(), reduction='none') for y in (mix.yb1[0], self.y))
            seen.append((float(self.learn.loss_grad), float(torch.lerp(other, own, mix.lam).mean())))
    train_run(RunSettings(**tiny, mixup=.2), bar=False, test=False, cbs=Look())
    assert seen and all(a == pytest.approx(b, rel=1e-5) for a, b in seen)
    _, _, learn = trained(method='crt', mixup=.2)
    assert not learn._grab_cbs(MixUp)


@pytest.mark.parametrize('method,shift', [('softmax', 0.), ('bsce', 1.), ('lade', 1.)])
def test_smoothed_labels_by_hand(method, shift):
    "The mean over classes takes the share of the label that is spread"
    counts, eps = torch.tensor([50, 10, 2]), .2
    torch.manual_seed(0)
    z, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    loss, plain = smooth_labels(methods[method].loss(counts), eps), methods[method].loss(counts)
    logp = F.log_softmax(z+shift*counts.float().log(), 1)
    by_hand = -((1-eps)*logp[range(6), y]+eps*logp.mean(1)).mean()
    if method == 'lade': by_hand += plain(z, y)+logp[range(6), y].mean()  # its second term stays as it is
    assert float(loss(z, y)) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(loss(z, y)) != pytest.approx(float(plain(z, y)), rel=1e-3)


def test_smoothed_labels_of_margins_and_of_experts_by_hand():
    counts, eps = torch.tensor([50, 10, 2]), .2
    torch.manual_seed(0)
    z, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    ldam = methods['ldam'].loss(counts)
    logp = F.log_softmax(z-30*.5*(counts/2.)**-.25*F.one_hot(y, 3), 1)
    by_hand = -((1-eps)*logp[range(6), y]+eps*logp.mean(1)).mean()
    assert float(smooth_labels(ldam, eps)(z, y)) == pytest.approx(float(by_hand), rel=1e-5)
    sade, z = methods['sade'].loss(counts), torch.randn(6, 3, 3)
    logp = [F.log_softmax(z[:, k]+sade.shifts[k], 1) for k in range(3)]
    by_hand = -sum(((1-eps)*o[range(6), y]+eps*o.mean(1)).mean() for o in logp)
    assert float(smooth_labels(sade, eps)(z, y)) == pytest.approx(float(by_hand), rel=1e-5)


def training_batch(name):
    "The loss of a method, its model's output for a batch in training, and the targets"
    learn = RunSettings(**{**tiny, 'method': name}).learner()
    seen = {}
    class Stop(Callback):
        run_valid = False
        def after_pred(self):
            seen.update(pred=self.learn.pred, y=self.y)
            raise CancelFitException
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Stop())
    return learn.loss_func, seen['pred'], seen['y']


@pytest.mark.parametrize('name', 'ride ride-distilled sade mdcs ncl balpoe bcl proco glmc bbn'.split())
def test_smoothed_labels_of_every_method(name):
    "The loss is an affine function of the share, and only the trained labels are smoothed"
    loss, pred, y = training_batch(name)
    values = [float(smooth_labels(loss, share)(pred, y)) for share in (0., .1, .2)]
    assert values[1] != pytest.approx(values[0], rel=1e-4)
    assert values[2]-values[1] == pytest.approx(values[1]-values[0], rel=1e-3)


def test_smoothed_labels_of_class_centres_by_hand():
    "PaCo with an empty queue and no weight on samples is the cross-entropy of centres and samples together"
    loss, pred, y = training_batch('paco')
    logits, queries, keys, queue, queue_labels = pred
    loss.alpha = 0.
    empty = (logits, queries, keys, queue[:0], queue_labels[:0])
    similarity = (queries@torch.cat([queries, keys]).T)/loss.temperature
    similarity[range(len(y)), range(len(y))] = -torch.inf
    logp = F.log_softmax(torch.cat([loss.trained_logits(logits), similarity], 1), 1)
    n_classes = logits.shape[1]
    by_hand = -(.8*logp[range(len(y)), y] + .2*logp[:, :n_classes].mean(1)).mean()
    assert float(smooth_labels(loss, .2)(empty, y)) == pytest.approx(float(by_hand), rel=1e-5)


def test_smoothing_reaches_the_learner_and_leaves_the_loss_of_others_alone():
    a, b = (RunSettings(**tiny, label_smoothing=o).learner().loss_func for o in (.1, None))
    assert a.func.label_smoothing == .1
    assert b.func.label_smoothing == 0.
    assert BalancedSoftmaxLoss([2, 1]).func.label_smoothing == 0.


# After training


def test_posthoc_adjusts_predictions_by_hand():
    plain, _, learn = trained(epochs=2)
    z, y = learn.get_preds(dl=learn.dls.test, act=noop)
    res, _, adjusted = trained(epochs=2, posthoc=.7)
    right = (z-.7*(learn.dls.class_counts/learn.dls.class_counts.sum()).log()).argmax(1) == y
    assert res['per_class'] == [round(100*float(right[y == c].float().mean()), 5) for c in range(10)]
    assert res['per_class'] != plain['per_class'] and res['history'] == plain['history']  # training is the same
    assert res['posthoc'] == dict(tau=.7, chosen=False) and 'posthoc' not in plain
    assert first(adjusted._grab_cbs(LogitAdjustment)).tau == .7


def test_posthoc_auto_is_chosen_on_validation_images():
    res, _, learn = trained(epochs=2, posthoc='auto', n_valid=10)
    learn.remove_cbs(learn._grab_cbs(LogitAdjustment))
    z, y = learn.get_preds(act=noop)
    log_prior = (learn.dls.class_counts/learn.dls.class_counts.sum()).log()

    def accuracy(tau, among):
        right = (z-tau*log_prior).argmax(1) == y
        of_classes = [right[among & (y == c)].float() for c in range(10)]
        return round(sum(float(o.mean()) for o in of_classes if len(o))/10, 9)
    taus, every = [round(.1*i, 1) for i in range(-10, 21)], torch.ones_like(y, dtype=torch.bool)
    def best(among): return max(taus, key=lambda tau: (accuracy(tau, among), -abs(tau)))
    assert res['posthoc'] == dict(tau=best(every), chosen=True)
    assert best_tau(z, y, learn.dls.class_counts) == best(every)
    part = torch.zeros_like(y)
    for c in range(10): part[y == c] = (torch.arange((y == c).sum())+c) % 5
    hits = torch.zeros_like(y, dtype=torch.bool)
    for k in range(5): hits[part == k] = ((z-best(part != k)*log_prior).argmax(1) == y)[part == k]
    assert torch.equal(crossfit_adjusted(z, y, learn.dls.class_counts) == y, hits)
    by_class = [float(hits[y == c].float().mean()) for c in range(10)]
    assert res['valid_accuracy']['all'] == pytest.approx(100*sum(by_class)/10, abs=1e-4)


def test_what_is_chosen_on_an_image_is_not_scored_on_it():
    "Where the choice fits noise alone, the fitted accuracy is above chance and the cross-fitted one is not"
    torch.manual_seed(0)
    counts, y = torch.tensor([100, 1]), torch.arange(40) % 2
    fitted, crossed = [], []
    for _ in range(100):
        z = torch.randn(40, 2)*3
        tau = best_tau(z, y, counts)
        fitted.append(((z-tau*(counts/counts.sum()).log()).argmax(1) == y).float().mean())
        crossed.append((crossfit_adjusted(z, y, counts) == y).float().mean())
    assert torch.stack(fitted).mean() > .53 and torch.stack(crossed).mean() < .52


def test_an_adjustment_of_one_class_or_of_few_images():
    assert best_tau(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), [5]) == 0.
    assert crossfit_adjusted(torch.eye(2), torch.tensor([0, 1]), [5, 1]).tolist() == [0, 1]


# What is refused, before training


@pytest.mark.parametrize('fields,said', [
    (dict(dropout=1.), 'dropout: expected a share from 0 to below 1, got 1.0'),
    (dict(dropout=-.1), 'dropout: expected a share'),
    (dict(dropout=math.nan), 'dropout: expected a share'),
    (dict(dropout='x'), 'dropout: expected a number'),
    (dict(dropout=.5, method='ride-distilled'), 'dropout: ride-distilled trains a second net'),
    (dict(mixup=-1.), 'mixup: expected an alpha above 0'),
    (dict(mixup=math.inf), 'mixup: expected an alpha above 0'),
    (dict(mixup=.2, method='mislas'), 'mixup: mislas mixes images already'),
    (dict(mixup=.2, method='mixup'), 'mixup: mixup mixes images already'),
    (dict(mixup=.2, method='paco'), "mixup: paco trains on two images or two views"),
    (dict(mixup=.2, method='bbn'), "mixup: bbn trains on two images or two views"),
    (dict(mixup=.2, method='imbsam'), 'mixup: imbsam treats images by their class'),
    (dict(mixup=.2, method='lade'), "LADE's second term"),
    (dict(label_smoothing=1.), 'label_smoothing: expected a share from 0 to below 1'),
    (dict(label_smoothing=.1, method='focal'), 'label_smoothing: FocalLossFlat has no labels that could be smoothed'),
    (dict(label_smoothing=.1, method='class-balanced', method_args=dict(label_smoothing=.1)),
     "has no 'label_smoothing'"),
    (dict(posthoc='best'), "posthoc: expected a number or 'auto', got 'best'"),
    (dict(posthoc=True), "posthoc: expected a number or 'auto'"),
    (dict(posthoc=math.nan), "posthoc: expected a number or 'auto'"),
    (dict(posthoc=1., method='logit-adjustment'), 'posthoc: logit-adjustment takes the log prior off already'),
    (dict(method='softmax', method_args=dict(tau=1.5)), "softmax has no 'tau'"),
])
def test_refused(fields, said):
    with pytest.raises(ValueError) as e: RunSettings(**{**tiny, **fields})
    assert said in str(e.value)


def test_mixup_of_items_that_are_no_numbers_is_refused(monkeypatch):
    made = training.datasets['digits-lt']['make']
    def of_words(*args, **kw):
        dls = made(*args, **kw)
        for dl in dls.loaders: dl.after_batch.fs.clear()  # as words: whole numbers
        return dls
    monkeypatch.setitem(training.datasets, 'digits-lt', {**training.datasets['digits-lt'], 'make': of_words})
    def net_of_words(*args, **kw): return nn.Sequential(Floats(), nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(settings_module, 'create_net', net_of_words)
    RunSettings(**tiny).check()
    with pytest.raises(ValueError, match="can't be mixed"): RunSettings(**tiny, mixup=.2).check()


class Floats(nn.Module):
    def forward(self, x): return x.float()


def test_nothing_has_one_name():
    "0 is none, so that it is no other run"
    zero = RunSettings(**tiny, dropout=0., mixup=0, label_smoothing=0., posthoc=0)
    assert zero == RunSettings(**tiny) and (zero.dropout, zero.posthoc) == (None, None)


def test_constants_of_a_method_by_name():
    assert parse_setting('method.tau=1,1.5', many=True) == ((None, 'method.tau'), [1, 1.5])
    assert parse_setting('tau=2')[0] == ('kr', 'tau')
    mistakes = {'method.tua=1': "Did you mean 'method.tau'?", 'method.tau=x': 'expected a number',
                'method.of=2': 'expected a text', 'method.=1': 'name of a setting'}
    for text, said in mistakes.items():
        with pytest.raises(ValueError) as e: parse_setting(text)
        assert said in str(e.value)
    fixed = [parse_setting(o) for o in ('method.alpha=.2', 'method.lam=.1')]
    run, with_rl = make_plan(['lade'], variants(fixed=fixed), [0])
    assert run.settings.method_args == dict(alpha=.2, lam=.1) == with_rl.settings.method_args
    assert run.settings.learner().loss_func.func.lam == .1
    swept = make_plan(['bsce'], variants('off', sweep=[parse_setting('method.tau=1,1.5', many=True)]), [0])
    assert [o.variant for o in swept] == ['bsce (method.tau=1)', 'bsce (method.tau=1.5)']
    assert swept[1].settings.learner().loss_func.func.tau == 1.5
    with pytest.raises(ValueError, match="softmax has no 'tau'"):
        make_plan(['softmax'], variants(fixed=[parse_setting('method.tau=1.5')]), [0])


# The search


def searched(score, changes):
    search, tried, scores = greedy_search(changes), [], []
    wanted = next(search)
    while True:
        tried += wanted
        scores += (new := [score(o) for o in wanted])
        try: wanted = search.send(new)
        except StopIteration: return tried, scores


@pytest.mark.parametrize('seed', range(20))
def test_the_budget_does_not_depend_on_what_is_found(seed):
    "And no setting is tried twice"
    rng = random.Random(seed)
    changes = [{name: i} for name in 'abcd' for i in range(rng.randint(1, 3))]
    tried, _ = searched(lambda o: rng.choice([rng.random(), 1., -math.inf]), changes)
    assert len(tried) == 1+len(changes)+3 and len({json.dumps(o, sort_keys=True) for o in tried}) == len(tried)
    assert tried[0] == {} and all(len(o) > 1 for o in tried[1+len(changes):])


def test_a_change_is_kept_only_if_it_improves_the_combination():
    gains = dict(a=3., b=2., c=1.)
    def score(o): return sum(gains[k] for k in o)-(2.5 if {'a', 'b'} <= {*o} else 0)
    tried, scores = searched(score, [{'a': 1}, {'b': 1}, {'c': 1}])
    assert tried[4:] == [{'a': 1, 'b': 1}, {'a': 1, 'c': 1}] and max(scores) == scores[5]


def run_here(plan, folder, jobs=None, test=True, watch=None, command=None, about=None):
    "`run_plan` in this process"
    watch, failed = watch or noop, {}
    todo = plan_status(plan, folder, test)
    made_of = [runner.hash_of(o.identity) for o in todo]
    if about is not None:
        write_json({**about, 'runs': [o.name for o in plan], 'made_of': made_of}, folder/'compare.json')
    for o in todo:
        if o.done:
            watch('known', o)
            continue
        if len(run_here.trained) == run_here.killed_after: raise KeyboardInterrupt
        run_here.trained.append((folder.name, o.run.name))
        watch('start', o)
        try:
            compute_run(o, folder, command=command)
            watch('done', o)
        except FloatingPointError as e:
            failed[o.run.name] = f'FloatingPointError: {e}'
            watch('failed', o, failed[o.run.name], '')
    if failed: raise Failed(f'{len(failed)} failed')
    return [runner.read_result(runner.run_file(folder, o)) for o in plan]


@pytest.fixture
def here(monkeypatch):
    run_here.trained, run_here.killed_after = [], None
    monkeypatch.setattr(tuning, 'run_plan', run_here)
    monkeypatch.setattr(runner, 'run_plan', run_here)
    return run_here.trained


@pytest.mark.slow
def test_both_sides_try_the_same_and_the_best_is_chosen(here, tmp_path):
    values = {'dropout': [0., .5], 'posthoc': [0., 'auto'], 'method.tau': [1.5]}
    res = tune(['bsce', 'softmax'], tmp_path, values, [100, 101], [0], **tiny)
    assert json.loads((tmp_path/'tuning.json').read_text()) == res and res['done'] and res['seeds'] == [100, 101]
    bsce, softmax = res['cases']
    assert bsce['left_out'] == {}
    assert softmax['left_out']['method.tau=1.5'].startswith("method_args: softmax has no 'tau'")
    for case, n in ((bsce, 1+3+2), (softmax, 1+2+1)):
        sides = case['sides']
        assert case['settings_each_side'] == n and {o['runs'] for o in sides.values()} == {2*n}
        first_round = [[o['setting'] for o in side['tried'] if o['step'] == 1] for side in sides.values()]
        expected = [{}, {'dropout': .5}, {'posthoc': 'auto'}, {'method.tau': 1.5}]
        assert first_round[0] == first_round[1] == expected[:1+n//2]
        for side in sides.values():
            assert len(side['tried']) == n
            for o in side['tried']:
                assert {*o['valid_accuracy']} == {'100', '101'}
                assert o['mean'] == pytest.approx(sum(o['valid_accuracy'].values())/2, abs=1e-4)
            best = first(o for o in side['tried'] if o['mean'] == max(t['mean'] for t in side['tried']))
            assert (side['chosen'], side['mean']) == (dict(sorted(best['setting'].items())), best['mean'])
    assert len(here) == len(set(here)) == 2*2*(6+4)
    kept = [json.loads(o.read_text()) for o in (tmp_path/'tuning'/'runs').iterdir()]
    assert len(kept) == len(here) and not any('accuracy' in o for o in kept) and {o['seed'] for o in kept} == {100, 101}
    tried = [o for case in res['cases'] for side in case['sides'].values() for o in side['tried']]
    accuracies = sorted(chain(*(o['valid_accuracy'].values() for o in tried)))
    assert sorted(o['valid_accuracy']['all'] for o in kept) == accuracies


def test_nothing_of_the_test_set_is_read_while_settings_are_chosen(here, monkeypatch, tmp_path):
    made = training.datasets['digits-lt']['make']
    class Untouchable(type(made(20., n_max=20).test)):
        def __iter__(self): raise AssertionError('the test set is read')
    def guarded(*args, **kw):
        dls = made(*args, **kw)
        dls.loaders[2].__class__ = Untouchable
        return dls
    monkeypatch.setitem(training.datasets, 'digits-lt', {**training.datasets['digits-lt'], 'make': guarded})
    # the second method adapts to the images that it classifies
    res = tune(['bsce', 'sade-aggregated'], tmp_path, grid, [100], [0], **tiny)
    plan, _ = tuned_plan(res, **tiny)
    with pytest.raises(AssertionError, match='the test set is read'): run_here(plan, tmp_path)  # the guard works


def test_goes_on_where_it_was_killed(here, tmp_path):
    args = dict(methods=['bsce'], grid=grid, seeds=[100], final_seeds=[0], **tiny)
    whole = tune(folder=tmp_path/'whole', **args)
    trained_at_once = [o for _, o in here]
    for after in (3, 9):  # in the first step, and among the combinations
        here.clear()
        folder, run_here.killed_after = tmp_path/str(after), after
        with pytest.raises(KeyboardInterrupt): tune(folder=folder, **args)
        assert len(here) == after
        before, run_here.killed_after = [o for _, o in here], None
        here.clear()
        assert tune(folder=folder, **args) == whole
        assert before+[o for _, o in here] == trained_at_once  # nothing twice
        here.clear()
        assert tune(folder=folder, **args) == whole and not here


def test_a_setting_that_diverges_is_never_chosen(here, tmp_path):
    settings = dict(dataset='digits-lt', epochs=2, n_valid=3)
    res = tune(['bsce'], tmp_path, {'lr': [1e6], 'dropout': [.5]}, [100], [0], **settings)
    for side in res['cases'][0]['sides'].values():
        assert [o['mean'] is None for o in side['tried']] == [False, True, False, True] and 'lr' not in side['chosen']
        assert side['tried'][1]['valid_accuracy'] == {'100': None}
    with pytest.raises(ValueError, match='training diverged with every setting'):
        tune(['bsce'], tmp_path/'all', {'lr': [1e7]}, [100], [0], **settings, lr=1e6)


def test_a_run_that_fails_otherwise_stops_the_search(monkeypatch, tmp_path):
    def broken(plan, folder, jobs=None, test=True, watch=None, command=None, about=None):
        watch('failed', plan_status(plan[:1], folder, test)[0], 'RuntimeError: out of memory', '')
        raise Failed('1 of 2 runs failed')
    monkeypatch.setattr(tuning, 'run_plan', broken)
    with pytest.raises(Failed): tune(['bsce'], tmp_path, grid, [100], [0], **tiny)
    assert not (tmp_path/'tuning.json').exists()


def test_seeds_are_disjoint():
    with pytest.raises(ValueError, match='seeds: 3, 4 would be used for tuning and for the final runs'):
        check_disjoint([3, 4, 100], range(5))
    with pytest.raises(ValueError, match='0 would be used'): tune(['bsce'], 'nowhere', seeds=[0], **tiny)
    check_disjoint(range(100, 103), range(5))


@pytest.mark.parametrize('bad,said', [
    ({}, 'expected names and values'),
    ({'dropuot': [.5]}, "Did you mean 'dropout'?"),
    ({'kr.weight': [1.]}, 'belongs to Reflective Learning, and both sides get the same grid'),
    ({'preset': ['paper']}, 'belongs to Reflective Learning'),
    ({'n_valid': [1]}, 'changes the data'),
    ({'imbalance_factor': [10.]}, 'changes the data'),
    ({'dropout': .5}, 'expected a list of values for dropout'),
    ({'dropout': [2.]}, 'expected a share from 0 to below 1'),
    ({'method.beta': [.9]}, "bsce has no 'beta'"),
    ({'method.tau': [1.]}, 'nothing is left to try'),
])
def test_grids_that_are_refused(bad, said):
    with pytest.raises(ValueError) as e: tuning_cases(['bsce'], bad, **tiny)
    assert said in str(e.value)


def test_what_all_runs_have_is_no_change():
    of_all = dict(**tiny, dropout=.5, method_args=dict(tau=1.5))
    case, = tuning_cases(['bsce'], {'dropout': [0, .5], 'method.tau': [1., 1.5]}, **of_all)
    assert case.changes == [{'dropout': 0}, {'method.tau': 1.}]
    fields = tuning._fields({'method.lam': .1}, dict(method_args=dict(alpha=.2)))
    run, = make_plan(['lade'], [Variant('', None, fields)], [0], **tiny)
    assert run.settings.method_args == dict(alpha=.2, lam=.1)  # constants of all runs stay
    assert [o.budget for o in tuning_cases(['bsce', 'softmax', 'lade'], dataset='digits-lt')] == [15, 13, 11]


# The final runs, and what is said of them


def test_roles_share_runs_where_they_are_the_same():
    def told(without, with_rl):
        sides = {'without': dict(chosen=without), 'with': dict(chosen=with_rl)}
        return dict(final_seeds=[0, 1], cases=[dict(group='g', method='bsce', imbalance_factor=None, sides=sides)])
    plan, roles = tuned_plan(told({}, {}), **tiny)
    assert [o.variant for o in plan] == ['bsce', 'bsce + RL']*2
    assert roles['g']['best + RL'] == roles['g']['plain + RL'] == 'bsce + RL'
    plan, roles = tuned_plan(told({'dropout': .5}, {'epochs': 2}), dict(preset='paper'), paired_data=True, **tiny)
    assert roles['g'] == {'plain': 'bsce', 'plain + RL': 'bsce + RL', 'tuned': 'bsce (dropout=0.5)',
                          'tuned + RL': 'bsce + RL (dropout=0.5)', 'best + RL': 'bsce + RL (epochs=2)'}
    assert len(plan) == 10 and [o.settings.seed for o in plan] == [o.settings.data_seed for o in plan] == [0]*5+[1]*5
    assert {json.dumps(o.settings.reflective) for o in plan} == {'null', '{"preset": "paper"}'}


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    "What the command line says and writes, in this process"
    run_here.trained, run_here.killed_after, out = [], None, tmp_path_factory.mktemp('tuned')/'out'
    small = chain(*(['--set', f'{k}={v}'] for k, v in tiny.items() if k != 'dataset'))
    args = ['compare', '--tune', *small, '--sweep', 'dropout=0,.5', '--sweep', 'lr=.1', '--tune-seeds', '100-101',
            '--seeds', '3', '--out', str(out)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tuning, 'run_plan', run_here)
        m.setattr(runner, 'run_plan', run_here)
        said = [CliRunner().invoke(app, args) for _ in range(2)]
    return said, out, list(run_here.trained)


def test_the_command_line_tunes_and_reports_three_gains(compared):
    (said, again), out, done = compared
    assert said.exit_code == 0, said.output
    assert '4 settings on each side' in said.output and 'best without Reflective Learning: ' in said.output
    res = json.loads((out/'tuning.json').read_text())
    assert res['final_seeds'] == [0, 1, 2] and res['grid'] == {'dropout': [0, .5], 'lr': [.1]}
    roles = json.loads((out/'compare.json').read_text())['tuned']['digits-lt IF 20 bsce']
    results = {(o['variant'], o['seed']): o['accuracy']['all'] for o in load_results(out)}
    gains = tuned_gains(out).set_index('baseline')
    compared_roles = dict(plain=('plain', 'plain + RL'), tuned=('tuned', 'tuned + RL'), best=('tuned', 'best + RL'))
    for letter, (baseline, (without, with_rl)) in zip('abc', compared_roles.items()):
        pairs = [results[roles[with_rl], s]-results[roles[without], s] for s in range(3)]
        assert gains.gain_all[baseline] == pytest.approx(sum(pairs)/3, abs=1e-9) and gains.pairs[baseline] == 3
        half = 4.302653*math.sqrt(sum((o-sum(pairs)/3)**2 for o in pairs)/2/3)  # Student's t of two degrees of freedom
        assert gains.gain_all_hi[baseline]-gains.gain_all[baseline] == pytest.approx(half, abs=1e-4)
        mean, low, high = gains.loc[baseline, ['gain_all', 'gain_all_lo', 'gain_all_hi']]
        text = f'{mean:+.1f} ({low:+.1f} to {high:+.1f})'
        line = first(o for o in (out/'summary.md').read_text().splitlines() if f'({letter})' in o)
        assert text in line and line in said.output
    assert 'Chosen on validation images: bsce' in said.output
    assert {o.name for o in out.iterdir() if o.name[0] != '.'} == {
        'compare.json', 'recommendation.json', 'runs', 'runs.csv', 'summary.csv', 'summary.md', 'summary.png',
        'tuning', 'tuning.json'}
    assert again.exit_code == 0 and '0 computed' in again.output and len(done) == len(set(done))  # all was there
    report = CliRunner().invoke(app, ['report', str(out.parent)]).output
    assert report.count('(c) best with, over best without') == 1 and '/tuning' not in report


def test_evidence_says_which_baseline(compared, tmp_path):
    _, out, _ = compared
    plan = json.loads((out/'compare.json').read_text())
    file = tmp_path/'a'/'compare.json'
    write_json({**plan, 'command': 'ltrl compare --protocol frozen --tune --sweep dropout=0,.5 --out a'}, file)
    (tmp_path/'a'/'runs').symlink_to(out/'runs')
    rows, gains = evidence(tmp_path/'a'), tuned_gains(out).set_index('baseline')
    expected = [('plain', None), ('plain', 'default'), ('tuned', None), ('tuned', 'default'), ('best', 'default')]
    assert [(o['baseline'], o['rl']) for o in rows] == expected
    for o in rows:
        of = gains.loc[o['baseline']]
        if not o['rl']: continue
        expected = [round(v, 2) for v in (of.gain_all, of.gain_all_lo, of.gain_all_hi)]
        assert [o['gain_all'], o['ci_low'], o['ci_high']] == expected
    write_json({**plan, 'command': 'ltrl compare --protocol frozen --tune --set bs=64 --out a'}, file)
    with pytest.raises(ValueError, match='no comparison by a protocol'): evidence(tmp_path/'a')


@pytest.mark.parametrize('args,said', [
    (['--tune', '--tune-seeds', '4-6', '--seeds', '5'], 'seeds: 4 would be used for tuning'),
    (['--tune', '--tune-seeds', '3'], 'seeds: 0, 1, 2 would be used'),
    (['--tune-seeds', '100-102'], '--tune-seeds: settings are chosen with --tune only'),
    (['--tune', '--rl', 'on'], '--rl: with --tune both sides are compared'),
    (['--tune', '--ablate', 'kr'], '--ablate: with --tune'),
    (['--tune', '--grid'], '--grid: with --tune'),
    (['--tune', '--no-test'], '--no-test: with --tune'),
    (['--tune', '--sweep', 'kr.weight=1,2'], '--sweep: kr.weight belongs to Reflective Learning'),
    (['--tune', '--sweep', 'method.tau=1,2', '--methods', 'softmax'], "softmax has no 'tau'"),
    (['--tune', '--sweep', 'net=resnet8,resnet9'], 'resnet9'),
    (['--tune', '--set', 'mixup=.2', '--methods', 'paco'], 'mixup: paco'),
])
def test_mistakes_are_said_before_anything_is_trained(args, said, tmp_path):
    r = CliRunner().invoke(app, ['compare', *args, '--out', str(tmp_path/'out')])
    assert r.exit_code == 2 and said in r.output and not (tmp_path/'out').exists(), r.output
