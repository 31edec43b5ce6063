"Recipes hold every number of the slides and can be trained; `ltrl recipes`, `ltrl run` and `ltrl report` for users."
import dataclasses
import json
import re
import time

import pytest
import torch
from command_line import ltrl_here, start_ltrl
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.plan import hash_of
from ltrl_fastai.experiments.recipes import (
    Recipe, caveat, compare_reported, later_recipes, matching, recipe, recipes)
from ltrl_fastai.experiments.summary import slides_row
from ltrl_fastai.experiments.training import RunSettings
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.reflective.learning import ReflectiveLearning
from typer.testing import CliRunner

tiny = [o for s in ('dataset=digits-lt', 'net=resnet8', 'imbalance_factor=20', 'bs=32') for o in ('--set', s)]


def run(*args, cwd, code=0):
    r = ltrl_here(*args, cwd=cwd)
    assert r.returncode == code, r.stdout+r.stderr
    assert 'Traceback' not in r.stderr and 'Warning' not in r.stderr, r.stderr
    return r.stdout+r.stderr


def said_here(*args, code=0):
    "The same in this process, which has already imported everything"
    r = CliRunner().invoke(app, args)
    assert r.exit_code == code and isinstance(r.exception, (SystemExit, type(None))), (r.output, r.exception)
    return r.output


def of(table):
    "A recipe for each number of a table"
    return [o for o in recipes.values() if o.table == table and o.policy != 'autoaugment']


with_autoaugment = [o for o in recipes.values() if o.policy == 'autoaugment']  # the same numbers, with Cutout too


# rows, columns, and numbers of each table, counted on the slides
counts = dict(table1=(17, 3, 45), table2=(18, 4, 72), table3=(12, 4, 48), table4=(17, 4, 67), table5=(13, 4, 33),
              table6=(11, 4, 43), table7=(7, 3, 21), table8=(10, 2, 20))


@pytest.mark.parametrize('table', counts)
def test_every_number_is_there(table):
    rows, columns, numbers = counts[table]
    found = of(table)
    assert len({o.row for o in found}) == rows
    one_run_a_row = found[0].column == ''
    heads = {k for o in found for k in o.reported} if one_run_a_row else {o.column for o in found}
    assert len(heads) == columns
    assert sum(len(o.reported) for o in found) == numbers
    assert all(0 < v < 100 and round(v, 1) == v for o in found for v in o.reported.values())


rows_of_shots = {  # Many, Medium, Few, All; typed from the slides
    'table2/Softmax': (68.1, 41.5, 14.0, 48.0), 'table2/Decouple-LWS': (61.8, 47.6, 30.9, 50.8),
    'table2/SADE+RL': (66.3, 58.3, 47.8, 60.2),
    'table2/MDCS+RL+RandAugment': (72.7, 59.5, 46.0, 62.7),
    'table3/BLS': (42.6, 39.8, 32.7, 39.4), 'table3/Softmax+RL': (46.1, 28.0, 15.6, 32.8),
    'table3/PaCo+RL+RandAugment': (36.4, 47.7, 36.6, 42.8),
    'table4/Softmax': (74.7, 66.3, 60.0, 64.7), 'table4/BLS': (70.9, 70.7, 70.4, 70.6),
    'table4/LADE': (64.4, 47.7, 34.3, 52.3),
    'table4/MiSLAS': (71.7, 71.5, 69.7, 70.7),
    'table4/RIDE': (71.5, 70.0, 71.6, 71.8), 'table4/SADE': (74.5, 72.5, 73.0, 72.9),
    'table4/Softmax+RL': (75.4, 67.1, 61.1, 65.5),
    'table4/BLS+RL': (68.8, 72.5, 75.9, 73.1),
    'table4/LADE+RL': (64.8, 48.9, 36.6, None), 'table4/RIDE+RL': (71.4, 70.9, 74.8, 73.6),
    'table4/SADE+RL': (74.7, 73.1, 77.8, 74.2),
    'table4/NCL+RL+RandAugment': (72.5, 76.7, 77.8, 76.5),
    'table6/OLTR': (61.8, 41.4, 17.6, None), 'table6/tau-norm': (65.7, 43.6, 17.3, 43.2),
    'table6/LDAM+RL': (62.4, 42.4, 28.3, 49.2),
    'table6/SADE+RL': (60.4, 50.8, 35.5, 50.7),
}
single = {  # All
    'table1/Softmax/10': 59.1, 'table1/BBN/50': 49.3, 'table1/BSCE+RL/100': 47.9, 'table1/SADE/100': 49.4,
    'table1/BSCE+RandAugment/100': 50.3,
    'table1/PaCo+RandAugment/50': 56.0,
    'table1/BSCE+RL+RandAugment/10': 64.6, 'table1/SADE+RL+RandAugment/50': 59.1,
    'table1/MDCS+RL+RandAugment/100': 57.3,
    'table5/Softmax/ResNet-50': 41.6, 'table5/OLTR/ResNeXt-50': 46.3, 'table5/LDAM/Swin-T': 50.6,
    'table5/RIDE/Swin-S': 54.2,
    'table5/tau-norm+RL/ResNeXt-50': 50.5, 'table5/RIDE+RL/Swin-T': 59.1,
    'table7/Decouple/CIFAR100-LT': 43.8, 'table7/MiSLAS+RL/ImageNet-LT': 56.0, 'table7/WD+Max/iNaturalist2018': 70.2,
    'table7/WD+Max+RL/CIFAR100-LT': 56.8, 'table7/Mixup/ImageNet-LT': 51.5,
    'table8/RIDE/ImageNet-LT': 56.3, 'table8/SADE+KR/iNaturalist2018': 73.3, 'table8/RIDE+KS/ImageNet-LT': 58.4,
    'table8/SADE+KR+KS/ImageNet-LT': 60.0, 'table8/RIDE+KR+KS+KC/iNaturalist2018': 73.6,
}


def test_numbers_typed_from_the_slides():
    for name, accuracies in rows_of_shots.items():
        by_shot = zip(('many', 'medium', 'few', 'all'), accuracies)
        assert recipes[name].reported == {k: v for k, v in by_shot if v is not None}, name
    for name, accuracy in single.items(): assert recipes[name].reported == {'all': accuracy}, name


def test_a_number_that_can_not_be_read_is_left_out_and_said():
    assert any('73.6' in o and 'left out' in o for o in recipes['table4/LADE+RL'].notes)
    assert any('table 2' in o for o in recipes['table4/LADE'].notes)  # a slip of the slides
    figures = [o for o in recipes.values() if o.table.startswith('figure5')]
    assert {o.table for o in figures} == {'figure5a', 'figure5b', 'figure5c'}
    assert all(o.reported is None and any('no number' in n for n in o.notes) for o in figures)


def test_numbers_that_do_not_fit_together_are_said():
    # (35*62.4+35*42.4+30*28.3)/100, and 49.2 is reported
    assert any('45.2' in o for o in recipes['table6/LDAM+RL'].notes)
    assert not any('same runs' in o for o in recipes['table2/Softmax'].notes)


def test_names_are_unique_and_round_trip():
    for name, o in recipes.items():
        assert o.name == name and recipe(name) is o and matching(name) == [o]
        assert name.split('/')[0] == o.table and name.isascii() and ' ' not in name
    assert len(recipes)-len(with_autoaugment) == sum(len(of(t)) for t in {o.table for o in recipes.values()}) == 201
    assert len(with_autoaugment) == 30
    assert Recipe(**dataclasses.asdict(recipes['table1/RIDE+RL/50'])) == recipes['table1/RIDE+RL/50']
    with pytest.raises(dataclasses.FrozenInstanceError): recipes['table1/RIDE+RL/50'].epochs = 1


def test_settings_are_valid():
    for o in recipes.values():
        s = o.settings(seed=7)
        assert isinstance(s, RunSettings) and s.seed == 7
        for k in ('net schedule epochs lr body_lr bs wd policy cut pretrained reflective dataset method method_args '
                  'imbalance_factor').split():
            assert getattr(s, k) == getattr(o, k), (o.name, k)
        if o.reflective: ReflectiveLearning(**o.reflective)
    for net in {o.net for o in recipes.values()}:
        with torch.device('meta'): create_net(net, 10)


def test_rows_of_a_benchmark_are_trained_alike():
    "With Reflective Learning as without; and methods of one repository: softmax, BSCE, SADE, or Kang et al.'s stages"
    shared = 'dataset net pretrained schedule epochs lr body_lr bs wd policy cut imbalance_factor'.split()
    for o in recipes.values():
        if o.reflective is None or o.reported is None: continue
        partner = recipes.get(re.sub(r'\+(KC|KS|KR|RL)\b', '', o.name))
        same = [*shared, 'nesterov', 'method', 'method_args']
        if partner: assert all(getattr(o, k) == getattr(partner, k) for k in same), o.name
    for table in counts:
        for group in {(o.column, o.row.endswith('†')) for o in of(table)}:
            for methods_alike in (('softmax', 'bsce', 'sade'), ('crt', 'lws', 'tau-norm')):
                same = [o for o in of(table) if o.method in methods_alike and (o.column, o.row.endswith('†')) == group]
                assert len({hash_of([getattr(o, k) for k in shared]) for o in same}) <= 1, (table, group)
    daggers = [o for o in recipes.values() if o.row.endswith('†')]
    assert len(daggers) == 18+6+2+6 and all((o.policy, o.epochs) == ('randaugment', 400) for o in daggers)
    assert all(o.policy is None for o in recipes.values() if not o.row.endswith('†') and o not in with_autoaugment)
    assert all(o.epochs < 400 for o in recipes.values() if not o.row.endswith('†'))


def test_ablation_and_figure_change_one_thing():
    def parts_of(o):
        if not o.reflective: return []
        return [k for k in ('kr', 'ks', 'kc') if ReflectiveLearning(**o.reflective).is_on(k)]
    on = {o.row: parts_of(o) for o in of('table8')}
    assert on['RIDE'] == []
    assert on['SADE+KR'] == ['kr']
    assert on['RIDE+KS'] == ['ks']
    assert on['SADE+KR+KS'] == ['kr', 'ks']
    assert on['RIDE+KR+KS+KC'] == ['kr', 'ks', 'kc']
    def config(name): return ReflectiveLearning(**recipes[name].reflective).config
    paper = ReflectiveLearning(preset='paper').config
    for name in ('table1/SADE+RL/100', 'figure5b/SADE+RL/CIFAR100-LT-CCI', 'figure5a/SADE+RL/CIFAR100-LT-tau=2'):
        assert config(name) == paper
    assert config('figure5b/SADE+RL/CIFAR100-LT-all-samples') == {**paper, 'kr': {**paper['kr'], 'cci': False}}
    assert config('figure5c/BSCE+RL/CIFAR100-LT-logits') == {**paper, 'kr': {**paper['kr'], 'distance': 'logits'}}


def test_the_summary_takes_its_numbers_from_recipes():
    assert slides_row('cifar100-lt IF 50 sade', 'sade + RL') == dict(all=55.4, gain=1.5)
    softmax = dict(many=66.1, medium=37.3, few=10.6, all=41.4, gain=None)
    assert slides_row('cifar100-lt IF 100 softmax', 'softmax') == softmax
    assert slides_row('cifar100-frozen-lt IF 10 bsce', 'bsce + RL') == dict(all=64.5, gain=3.5)
    assert slides_row('cifar10-lt IF 100 bsce', 'bsce') is None and slides_row('cifar100-lt IF 20 bsce', 'bsce') is None


def test_a_shortened_schedule():
    r = recipes['table1/BSCE+RL/100']
    assert [r.settings(b).epochs for b in (1, .5, .1, 1e-6)] == [200, 100, 20, 1]
    for b in (0, -1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='above 0 and at most 1'): r.settings(b)
    assert r.mark(.1)['shortened']
    assert not r.mark()['shortened']
    assert 'shortened' in caveat(r.mark(.1))
    assert not caveat(r.mark())
    table = compare_reported(dict(many=None, medium=1., few=2., all=48.9), r.reported)
    assert table.loc['difference', 'All'] == '+1.0'


def test_list(tmp_path):
    every = json.loads(run('recipes', '--json', cwd=tmp_path))
    assert [o['name'] for o in every] == [*recipes, *later_recipes] and every[0]['reported'] == {'all': 59.1}
    assert Recipe(**{k: tuple(v) if k == 'notes' else v for k, v in every[40].items()}) == list(recipes.values())[40]
    said = said_here('recipes', 'TABLE4/')
    assert said.count('\ntable4/') == 17
    assert '64.8 / 48.9 / 36.6 / ?' in said
    assert 'resnet50' in said
    assert '200 cosine' in said
    assert 'left out' in said_here('recipes', 'table4/LADE+RL')
    assert "Did you mean 'table1/BSCE+RL/100'" in said_here('recipes', 'table1/BSEC+RL/100', code=2)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A recipe on digits, with 3% of its schedule"
    cwd = tmp_path_factory.mktemp('recipe')
    return run('run', 'table1/BSCE+RL/100', *tiny, '--budget', '.03', '--out', 'a/s0', cwd=cwd), cwd


@pytest.mark.slow
def test_run_marks_what_is_shortened_and_changed(done):
    said, cwd = done
    assert 'reported' in said and '47.9' in said and 'difference' in said and '6 epochs (steps)' in said
    assert 'a shortened schedule, 0.03 of it (6 epochs) and changed settings (dataset=digits-lt,' in said
    assert "can't be compared" in said
    assert sorted(o.name for o in (cwd/'a/s0').iterdir()) == ['per_class.png', 'result.json']
    res = json.loads((cwd/'a/s0/result.json').read_text())
    mark = res['recipe']
    assert (mark['name'], mark['reported']) == ('table1/BSCE+RL/100', {'all': 47.9})
    assert (mark['budget'], mark['shortened']) == (.03, True)
    assert mark['changed'] == dict(dataset='digits-lt', net='resnet8', imbalance_factor=20, bs=32)
    assert res['reflective']['preset'] == 'paper'
    assert res['settings']['schedule'] == 'steps'
    assert len(res['history']['train_loss']) == 6
    gap = res['accuracy']['all']-47.9
    assert f"{gap:+.1f}" in said


@pytest.mark.slow
def test_report_sets_measured_beside_reported(done):
    _, cwd = done
    run('run', 'table1/BSCE+RL/100', *tiny, '--budget', '.03', '--seed', '1', '--out', 'a/s1', cwd=cwd)
    run('run', 'table6/Softmax', *tiny, '--set', 'epochs=2', '--out', 'a/full', cwd=cwd)
    run('train', '--dataset', 'digits-lt', '--epochs', '1', '--no-rl', '--out', 'a/plain', cwd=cwd)
    said = said_here('report', str(cwd/'a'))
    accs = [json.loads((cwd/f'a/{o}/result.json').read_text())['accuracy']['all'] for o in ('s0', 's1')]
    m = sum(accs)/2
    row = next(o for o in said.splitlines() if 'table1/BSCE+RL/100' in o).split('|')
    assert row[2].strip() == '2' and row[-2].strip() == f'{m:.1f} (47.9, {m-47.9:+.1f})'
    assert '(66.1, ' in said
    assert '[1] The measured numbers come from changed settings' in said
    assert 'epochs=2' in said
    assert '[2] The measured numbers come from a shortened' in said
    assert 'a/plain\n\n### digits-lt IF 20 bsce' in said and '## '+str(cwd/'a/s0') not in said
    assert '47.9' in said_here('report', str(cwd/'a/s0'))


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    "kill -9 after a checkpoint, then --resume: the same numbers as without"
    args = ('run', 'table1/BSCE+RL/100', *tiny, '--budget', '.03', '--out', 'a')
    run(*args[:-1], 'whole', cwd=tmp_path)
    p = start_ltrl(*args, cwd=tmp_path)
    until = time.time()+120
    while not (tmp_path/'a/.fit-0.pt').exists() and p.poll() is None and time.time() < until: time.sleep(.01)
    p.kill()
    p.wait()
    assert (tmp_path/'a/.fit-0.pt').exists() and not (tmp_path/'a/result.json').exists()
    assert '--resume' in run(*args, cwd=tmp_path, code=2)
    assert 'another fit' in run(*args, '--seed', '1', '--resume', cwd=tmp_path, code=2)
    assert 'going on' in run(*args, '--resume', cwd=tmp_path)
    got, want = [json.loads((tmp_path/o/'result.json').read_text()) for o in ('a', 'whole')]
    for o in (got, want):
        o.pop('seconds')
        o.pop('command')
    assert got == want and not list((tmp_path/'a').glob('.fit*'))
    assert 'is complete' in run(*args, '--resume', cwd=tmp_path)
    assert '--force' in run(*args, '--seed', '1', cwd=tmp_path, code=2)


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, said in {('table1/RIED/100',): "Did you mean 'table1/RIDE/100'",
                       ('table1/BSCE/100', '--set', 'tau=4'): 'without Reflective Learning',
                       ('table1/BSCE+RL/100', '--preset', 'mine'): 'published',
                       ('table1/BSCE+RL/100', '--budget', '0'): 'above 0',
                       ('table1/BSCE+RL/100', '--data', 'nowhere'): 'was not found at nowhere',
                       ('table1/BSCE+RL/100', '--set', 'net=resnet9', '--set', 'dataset=digits-lt'): 'resnet8'}.items():
        assert said in said_here('run', *args, code=2)
    (tmp_path/'file').write_text('')
    assert 'is a file' in said_here('run', 'table1/BSCE/100', *tiny, '--out', 'file', code=2)
