"Recommendations: laws on made-up results, the command that trains what is recommended, and one comparison end to end."
import dataclasses
import json
import random
import shlex
from functools import partial

import numpy as np
import pytest
import scipy.stats
import typer.main
from command_line import ltrl_here
from ltrl_fastai.cli import compare as compare_command
from ltrl_fastai.cli import train as train_command_module
from ltrl_fastai.cli.main import app
from ltrl_fastai.data.beds import write_digits_folder
from ltrl_fastai.evaluation.metrics import interval
from ltrl_fastai.experiments import training
from ltrl_fastai.experiments.plan import make_plan, parse_setting, variants
from ltrl_fastai.experiments.recommend import (
    _option, _without_option,
    least_lead, recommend, recommendation_markdown, recommendations, train_command, write_recommendations)
from ltrl_fastai.experiments.settings import RunSettings
from ltrl_fastai.experiments.training import train_run
from ltrl_fastai.methods.catalogue import methods
from ltrl_fastai.methods.facts import auto_methods
from typer.testing import CliRunner


def made(variant, accuracies, seconds=60., test=None, first_seed=0, factor=20., counts=(20, 30), **fields):
    "Results of one way to train, a run for each accuracy; `counts` are the validation images of each class"
    method, _, rl = variant.partition(' + ')
    reflective = {} if rl else None
    res = []
    for seed, accuracy in enumerate(accuracies, first_seed):
        run = RunSettings('digits-lt', factor, method=method, reflective=reflective, seed=seed, **fields)
        o = dict(group=f'digits-lt IF {factor:g} {method}', variant=variant, method=method, seed=seed, seconds=seconds,
                 identity=dict(settings=dataclasses.asdict(run)), valid_accuracy=dict(all=accuracy),
                 classes=['a', 'b'], data=dict(valid=dict(n=sum(counts), counts=list(counts))))
        if test is not None: o['accuracy'] = dict(all=test[seed-first_seed])
        res.append(o)
    return res


names = ('softmax', 'softmax + RL', 'bsce', 'bsce + RL', 'crt', 'ldam-drw + RL')


def random_results(seed, n=4, lead=0., test=True):
    "Results of all `names`, where `bsce + RL` has a lead, and that lead"
    rng = np.random.default_rng(seed)
    luck = rng.normal(60, 5, n)
    res = []
    for name in names:
        scores = luck+rng.normal(size=n)+lead*(name == 'bsce + RL')
        of_test = rng.uniform(0, 100, n).tolist() if test else None
        res += made(name, scores.tolist(), rng.uniform(50, 300), of_test)
    return res


def scores(results, variant): return np.array([o['valid_accuracy']['all'] for o in results if o['variant'] == variant])


seeds = pytest.mark.parametrize('seed', range(5))


# Which is recommended


@seeds
def test_a_clear_winner_is_recommended_with_its_gains(seed):
    results = random_results(seed, lead=30.)
    o = recommend(results)
    assert (o.variant, o.verdict, o.not_worse) == ('bsce + RL', 'clear', ['bsce + RL']) and o.reflective == {}
    others = {name: scores(results, name).mean() for name in names if name != o.variant}
    assert o.runner_up == max(others, key=others.get)
    for gain, other in ((o.over_softmax, 'softmax'), (o.over_runner_up, o.runner_up)):
        expected = interval(scores(results, o.variant)-scores(results, other))
        assert [gain.mean, gain.low, gain.high] == pytest.approx(expected, abs=1e-5) and gain.pairs == 4
    time = {run['variant']: run['seconds'] for run in results}
    assert o.cost == pytest.approx(time['bsce + RL']/time['softmax'], abs=1e-5)
    assert o.more_seeds == '' and '**bsce + RL**' in recommendation_markdown(o)


@seeds
def test_what_is_not_separated_goes_to_the_cheapest(seed):
    "Of all that are within the least significant lead of the best"
    results = random_results(seed, lead=1.)
    o = recommend(results)
    means = {name: scores(results, name).mean() for name in names}
    best = max(means.values())
    near = {name for name in names if best-means[name] <= o.least_lead}
    assert o.least_lead == pytest.approx(least_lead(np.stack([scores(results, name) for name in names])))
    assert set(o.not_worse) == near and o.best == max(means, key=means.get)
    time = {run['variant']: run['seconds'] for run in results}
    assert o.variant in near and time[o.variant] <= 1.5*min(time[name] for name in near)


@seeds
def test_equal_accuracies_give_the_cheapest(seed):
    rng = random.Random(seed)
    times = [60., 120., 240., 480., 960., 1920.]
    rng.shuffle(times)
    accuracies = [rng.uniform(40, 60) for _ in range(3)]
    results = [run for name, time in zip(names, times) for run in made(name, accuracies, time)]
    o = recommend(results)
    assert o.variant == names[times.index(60.)] and o.verdict == 'tie' and len(o.not_worse) == len(names)


def test_equal_accuracies_and_times_give_the_simplest():
    o = recommend([run for name in names[1:] for run in made(name, [50., 60.])])
    assert o.variant == 'bsce'  # without Reflective Learning, and in one stage
    o = recommend([run for name in ('crt', 'bsce + RL') for run in made(name, [50., 60.])])
    assert o.variant == 'crt'


def test_of_equally_simple_methods_the_more_accurate_is_taken():
    results = [*made('softmax', [50., 52., 51.]), *made('bsce', [50.5, 51., 53.])]
    assert recommend(results).variant == 'bsce'


@seeds
def test_order_does_not_matter(seed):
    results = random_results(seed, lead=2.)
    shuffled = random.Random(seed).sample(results, len(results))
    assert recommend(shuffled) == recommend(results)


@seeds
def test_test_images_choose_nothing(seed):
    results, rng = random_results(seed, lead=2.), random.Random(seed)
    before = dataclasses.asdict(recommend(results))
    for run in results: run['accuracy'] = dict(all=rng.uniform(0, 100))
    after = dataclasses.asdict(recommend(results))
    differ = {k for k in before if before[k] != after[k]}
    assert differ <= {'test_accuracy', 'test_over_softmax'} and 'test_accuracy' in differ
    for run in results: del run['accuracy']
    untested = dataclasses.asdict(recommend(results))
    assert {k for k in before if before[k] != untested[k]} == differ and untested['test_accuracy'] is None


def test_the_gain_on_test_images_is_that_of_the_recommended():
    results = random_results(1, lead=30.)
    by_variant = {name: np.array([o['accuracy']['all'] for o in results if o['variant'] == name]) for name in names}
    expected = interval(by_variant['bsce + RL']-by_variant['softmax'])
    gain = recommend(results).test_over_softmax
    assert [gain.mean, gain.low, gain.high] == pytest.approx(expected, abs=1e-5)


# Runs that are missing


@seeds
def test_a_way_that_lacks_a_run_is_left_out(seed):
    results = random_results(seed, lead=2.)
    without = [run for run in results if run['variant'] != 'bsce + RL']
    expected = recommend(without)
    lost = next(run for run in results if run['variant'] == 'bsce + RL')
    for broken in ([run for run in results if run is not lost],
                   [{**run, 'valid_accuracy': dict(all=None)} if run is lost else run for run in results],
                   [{**run, 'valid_accuracy': None} if run is lost else run for run in results]):
        o = recommend(broken)
        assert dataclasses.replace(o, notes=[]) == expected
        assert 'bsce + RL is left out: it has 3 of 4 runs.' in o.notes[0]


def test_too_few_ways_are_an_error():
    with pytest.raises(ValueError, match='at least two ways'): recommend(made('bsce', [50., 60.]))
    with pytest.raises(ValueError, match='crt is left out: it has 1 of 2'):
        recommend([*made('bsce', [50., 60.]), *made('crt', [50.])])
    with pytest.raises(ValueError, match='at least two ways'): recommend([])
    assert recommendations(made('bsce', [50., 60.])) == []


def test_without_softmax_there_is_no_gain_over_it():
    o = recommend([*made('bsce', [50., 51., 52.]), *made('bsce + RL', [60., 61., 62.])])
    assert o.over_softmax is None and o.cost is None and o.test_over_softmax is None
    assert 'softmax' not in recommendation_markdown(o)
    o = recommend([*made('softmax', [50., 51., 52.]), *made('bsce', [30., 31., 32.])])
    assert o.variant == 'softmax' and o.over_softmax is None and o.cost == 1


def test_data_sets_are_apart():
    "Accuracies of other images can't be compared"
    few, many = (partial(made, factor=factor) for factor in (10., 100.))
    a = [*few('softmax', [90., 91., 92.]), *few('bsce', [50., 51., 52.])]
    b = [*many('softmax', [10., 11., 12.]), *many('bsce', [40., 41., 42.])]
    with pytest.raises(ValueError, match='one data set'): recommend(a+b)
    assert recommendations(a+b) == [recommend(a), recommend(b)]
    assert [o.data for o in recommendations(a+b)] == ['digits-lt IF 10', 'digits-lt IF 100']
    other = [*made('softmax', [10., 11.]), *made('softmax', [10., 11.], n_max=20)]
    assert recommendations(other) == []  # one way on each


# The least significant lead


def naive_least_lead(x):
    "Tukey's range with seeds as blocks, by sums over all cells"
    k, n = len(x), len(x[0])
    mean = sum(map(sum, x))/(k*n)
    rows = [sum(row)/n for row in x]
    columns = [sum(row[j] for row in x)/k for j in range(n)]
    total = sum((x[i][j]-rows[i]-columns[j]+mean)**2 for i in range(k) for j in range(n))
    freedom = (k-1)*(n-1)
    return scipy.stats.studentized_range.ppf(.95, k, freedom)*(total/freedom/n)**.5


@seeds
def test_the_least_lead(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rng.integers(2, 7, 2))
    assert least_lead(x) == pytest.approx(naive_least_lead(x.tolist()))
    assert least_lead(x+rng.normal(size=x.shape[1])) == pytest.approx(least_lead(x))  # luck that all share
    assert least_lead(x+rng.normal(size=(len(x), 1))) == pytest.approx(least_lead(x))  # whatever the means are
    assert least_lead(3*x) == pytest.approx(3*least_lead(x))
    mean, low, high = interval(x[1]-x[0])
    assert least_lead(x[:2]) == pytest.approx((high-low)/2, rel=1e-3)  # of two: the paired interval
    assert np.isnan(least_lead(x[:, :1])) and np.isnan(least_lead(x[:1]))


# One seed, and more seeds


def test_one_seed_decides_nothing():
    results = [run for run in random_results(0, lead=30.) if run['seed'] == 0]
    o = recommend(results, 'ltrl compare --methods auto --seeds 1 --out a')
    assert o.verdict == 'one seed' and o.least_lead is None and o.over_runner_up.low is None
    assert o.more_seeds == 'ltrl compare --methods auto --out a --seeds 5'
    said = recommendation_markdown(o)
    assert 'One seed decides nothing' in said and o.more_seeds in said and o.train not in said


@pytest.mark.parametrize('command,n,expected', [
    ('ltrl compare --out a', 3, 'ltrl compare --out a --seeds 5'),
    ('ltrl compare --seeds 0-2 --out "a b"', 3, "ltrl compare --out 'a b' --seeds 5"),
    ('python -m ltrl_fastai compare --seeds=3 --tune-seeds 9 --out a', 3,
     'python -m ltrl_fastai compare --tune-seeds 9 --out a --seeds 5'),
    ('ltrl compare --seeds 5 --out a', 5, 'ltrl compare --out a --seeds 10'),
    ('ltrl compare --seeds 10 --out a', 10, ''),
    ('pytest', 3, ''),
    ('', 3, ''),
])
def test_more_seeds_are_asked_for_if_nothing_is_separated(command, n, expected):
    accuracies = [50.+i for i in range(n)]
    assert recommend([*made('softmax', accuracies), *made('bsce', accuracies)], command).more_seeds == expected


# Few validation images


@pytest.mark.parametrize('counts,expected', [
    ((20, 10), None), ((20, 9), '1 of 2 classes have fewer than 10 validation images (class b has 9)'),
    ((0, 9), '2 of 2 classes have fewer than 10 validation images (class a has 0)')])
def test_few_validation_images_are_noted(counts, expected):
    made_of = partial(made, accuracies=[50., 51.], counts=counts)
    notes = recommend([*made_of('softmax'), *made_of('bsce')]).notes
    assert (expected is None and notes == []) or expected in notes[0] and 'uncertain' in notes[0]


@pytest.mark.parametrize('n,is_noted', [(19, True), (20, False)])
def test_results_of_earlier_versions_say_how_many_there_are_in_all(n, is_noted):
    results = [*made('softmax', [50., 51.]), *made('bsce', [50., 51.])]
    for run in results: run['data'] = dict(valid=dict(n=n))
    assert any('some classes' in note.lower() for note in recommend(results).notes) == is_noted


# The command that trains it


@pytest.fixture
def trained(monkeypatch):
    "The settings that `ltrl train` would train with, by its command line"
    def settings_of(command):
        found = []
        monkeypatch.setattr(train_command_module, '_train_once', lambda todo, out, **kwargs: found.extend(todo))
        program, *args = shlex.split(command)
        assert program == 'ltrl'
        res = CliRunner().invoke(app, args)
        assert res.exit_code == 0, res.output
        one, = found
        return one
    return settings_of


def test_the_command_spells_the_options_that_there_are():
    train = next(o for o in typer.main.get_command(app).commands.values() if o.name == 'train')
    options = {o.name: [*o.opts, *o.secondary_opts] for o in train.params}
    settings = {f.name for f in dataclasses.fields(RunSettings)}-{'reflective'}
    assert settings-set(options) == _without_option
    for name, spelled in options.items():
        values = [True, False] if len(spelled) > 1 else [True] if spelled == [f'--{name}'] else ['1']
        assert spelled == [_option(name, value)[0] for value in values]


@pytest.mark.parametrize('reflective', [
    None, {}, dict(preset='paper'), dict(ks=False), dict(kr=True, ks=True, kc=True), dict(kr=False, kc=True),
    dict(kr={}, ks={})])
@pytest.mark.parametrize('fields', [
    {}, dict(method='weight-balancing', epochs=7), dict(dataset='grocery'), dict(dataset='grocery', pretrained=False),
    dict(dataset='grocery', net='resnet18', amp=True, many=50, few=5, weights='some file.pth'),
    dict(lr=1e-5, bs=3, size=12, n_valid=4, data_seed=3),
    dict(dataset='cifar100-lt', imbalance_factor=50., net='resnet20', policy='randaugment', cut=16, data='some where')])
def test_the_command_trains_with_these_settings(fields, reflective, trained):
    settings = RunSettings(**{'dataset': 'digits-lt', 'method': 'bsce', **fields}, reflective=reflective)
    again = trained(train_command(dataclasses.asdict(settings), settings.data))
    def without(o): return {k: v for k, v in dataclasses.asdict(o).items() if k != 'reflective'}
    assert without(again) == without(settings) and (again.reflective is None) == (reflective is None)
    if reflective is None: return
    def config(o): return training.ReflectiveLearning(**o).config
    assert config(again.reflective) == config(reflective)


@pytest.mark.parametrize('fields', [
    dict(reflective=dict(kr=dict(tau=4.))), dict(method_args=dict(tau=1.5)), dict(schedule='fine-tune', dropout=.5),
    dict(dataset='grocery', extract='lite0')])
def test_settings_without_an_option_are_trained_in_python(fields, monkeypatch):
    settings = RunSettings(**{'dataset': 'digits-lt', 'method': 'bsce', **fields})
    command = train_command(dataclasses.asdict(settings))
    if command.startswith('ltrl'): pytest.skip('`ltrl train` has an option for it')
    found = []
    monkeypatch.setattr('ltrl_fastai.experiments.training.train_run', found.append)
    exec(command, {})
    assert [dataclasses.asdict(o) for o in found] == [dataclasses.asdict(settings)]


def test_a_seed_of_the_data_is_trained_with_if_all_runs_have_it():
    "But not if each run drew its own images"
    one = [*made('softmax', [50., 51.], data_seed=7), *made('bsce', [50., 51.], data_seed=7)]
    assert '--data-seed 7' in recommend(one).train
    each = [run for seed in (0, 1) for name in ('softmax', 'bsce')
            for run in made(name, [50.+seed], first_seed=seed, data_seed=seed+5)]
    assert recommend(each).seeds == 2 and '--data-seed' not in recommend(each).train


def test_it_is_written_as_json(tmp_path):
    results = random_results(0, lead=30.)
    said = write_recommendations(results, tmp_path, 'ltrl compare --out a')
    o = recommend(results, 'ltrl compare --out a')
    assert json.loads((tmp_path/'recommendation.json').read_text()) == [dataclasses.asdict(o)]
    assert said == recommendation_markdown(o) and f'\n    {o.train}\n' in said
    assert write_recommendations(results[:2], tmp_path) == ''
    assert not list(tmp_path.iterdir())  # a recommendation of an earlier plan is gone


# --methods auto


def test_auto_is_explained():
    said = ' '.join(CliRunner().invoke(app, ['compare', '--help']).output.split())
    assert all(why in said for why in auto_methods.values())


def test_auto_leaves_out_what_the_settings_do_not_fit():
    fixed = [parse_setting('posthoc=auto')]
    ways = variants('both', fixed=fixed)
    def plan_of(names): return make_plan(names, ways, [0])
    chosen, left_out = compare_command._fitting_methods(['ride', 'auto'], plan_of)
    assert chosen == ['ride', *(o for o in auto_methods if o != 'logit-adjustment')]
    assert 'log prior' in str(left_out['logit-adjustment'])
    for named in (['auto', 'logit-adjustment'], ['logit-adjustment']):
        with pytest.raises(ValueError, match='posthoc'): compare_command._fitting_methods(named, plan_of)
    with pytest.raises(ValueError, match="Did you mean 'digits-lt'"):  # what fits no method is an error
        compare_command._fitting_methods(['auto'], lambda names: make_plan(names, ways, [0], dataset='digit-lt'))


def test_all_leaves_out_a_method_whose_weights_cannot_be_had(monkeypatch):
    def no_network(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr('ltrl_fastai.methods.heads.torchvision.models.get_model', no_network)
    monkeypatch.setattr(compare_command, 'method_facts', ['softmax', 'lift', 'bsce'])
    ways = variants('off')
    chosen, left_out = compare_command._fitting_methods(['all'], lambda names: make_plan(names, ways, [0]))
    assert chosen == ['softmax', 'bsce']
    assert 'weights of vit_b_16 could not be downloaded' in str(left_out['lift'])


@pytest.mark.parametrize('method', auto_methods)
def test_auto_trains_on_vectors(method):
    assert max(methods[method].views, *(o.views for o in methods[method].later_stages), 1) == 1
    settings = RunSettings('photos-lt', 5., method=method, n_max=5, n_valid=2, epochs=1, reflective={})
    res, _ = train_run(settings, bar=False)
    assert res['valid_accuracy']['all'] >= 0


@pytest.mark.slow
def test_a_comparison_of_a_folder_ends_with_a_recommendation(tmp_path, trained):
    write_digits_folder(tmp_path/'mine')
    def ltrl(*args):
        r = ltrl_here(*args, cwd=tmp_path)
        assert r.returncode == 0, r.stdout+r.stderr
        return r.stdout
    common = ['compare', '--dataset', 'mine', '--methods', 'auto', '--rl', 'off', '--set', 'epochs=1', '--set',
              'net=resnet8', '--jobs', '1', '--out', 'a']
    said = ltrl(*common, '--seeds', '2')
    found, = json.loads((tmp_path/'a/recommendation.json').read_text())
    assert found['candidates'] == len(auto_methods) and found['seeds'] == 2 and found['variant'] in auto_methods
    assert found['test_accuracy'] is not None and 'With --redraw' in found['notes'][0]
    results = [json.loads(o.read_text()) for o in (tmp_path/'a/runs').glob('*.json')]
    fewest = np.min([o['data']['valid']['counts'] for o in results], axis=0)
    n_few = sum(n < 10 for n in fewest)
    assert n_few and f'{n_few} of 7 classes' in found['notes'][0]
    for text in (said, (tmp_path/'a/summary.md').read_text(), ltrl('report', 'a')):
        assert '### Recommendation for mine' in text and found['train'] in text and found['more_seeds'] in text
    first = next(o for o in results if (o['variant'], o['seed']) == (found['variant'], 0))
    ltrl(*shlex.split(found['train'])[1:], '--out', 'b')
    again = json.loads((tmp_path/'b/result.json').read_text())
    assert again['settings'] == first['settings'] and again['valid_accuracy'] == first['valid_accuracy']
    assert 'One seed decides nothing' in ltrl(*common, '--seeds', '1')
