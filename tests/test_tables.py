"Whole tables of the slides: runs of recipes that survive a change of code, and can be put together."
import json
import shutil

import pytest
from ltrl_fastai.experiments import runner
from ltrl_fastai.experiments.runner import compute_run, plan_status, read_result
from ltrl_fastai.experiments.slides import recipe_runs, slides_state

quick = ['dataset=digits-lt', 'net=resnet8', 'epochs=1', 'bs=512']
may_differ = ('code', 'threads')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder with a result of a recipe, made smaller, and its plan"
    folder = tmp_path_factory.mktemp('slides')
    plan = recipe_runs(['table1/BSCE/100'], [0], changes=quick)
    compute_run(plan_status(plan, folder)[0], folder)
    return folder, plan


@pytest.fixture
def other_code(monkeypatch):
    before = runner.code_identity()
    monkeypatch.setattr(runner, 'code_identity', lambda: {**before, 'ltrl': 'other code'})


def test_a_result_says_its_recipe_and_its_device(trained):
    folder, (run,) = trained
    result = read_result(folder/'runs'/f'{run.name}.json')
    assert result['recipe']['name'] == 'table1/BSCE/100' and result['device'] == 'cpu'
    assert result['recipe']['changed'] == {'dataset': 'digits-lt', 'net': 'resnet8', 'epochs': 1, 'bs': 512}


def test_a_result_stays_valid_under_other_code_and_threads(trained, other_code):
    folder, plan = trained
    kept, = plan_status(plan, folder, threads=7, may_differ=may_differ)
    assert kept.done and not kept.why
    again, = plan_status(plan, folder, threads=7)
    assert not again.done and 'the code changed' in again.why and 'the threads changed' in again.why


def test_a_checkpoint_stays_valid_under_other_code(trained, monkeypatch):
    folder, plan = trained
    def names(**kwargs): return plan_status(plan, folder, **kwargs)[0].checkpoint
    before, strict = names(may_differ=may_differ), names()
    old = runner.code_identity()
    monkeypatch.setattr(runner, 'code_identity', lambda: {**old, 'ltrl': 'other code'})
    assert names(may_differ=may_differ) == before and names() != strict


def test_other_data_are_never_taken_for_the_same(trained, tmp_path):
    folder, plan = trained
    shutil.copytree(folder/'runs', tmp_path/'runs')
    file, = (tmp_path/'runs').glob('*.json')
    result = json.loads(file.read_text())
    result['identity']['data'] = 'of other images'
    file.write_text(json.dumps(result))
    status, = plan_status(plan, tmp_path, may_differ=may_differ)
    assert not status.done and 'the data changed' in status.why


def test_results_of_two_machines_count_together(trained):
    folder, (run,) = trained
    result = read_result(folder/'runs'/f'{run.name}.json')
    whole = recipe_runs(['table1/BSCE/100'], [0, 1])
    results = [{**result, 'seed': o.settings.seed, 'identity': {'settings': o.identity}, 'device': device}
               for o, device in zip(whole, ('cpu', 'cuda'), strict=True)]
    row, = slides_state(results, 'table1/BSCE/100')
    assert row['state'] == '2 seeds, cpu, cuda' and row['measured'] != '-'
    only_cuda, = recipe_runs(['table1/BSCE/100'], [0], device='cuda')
    assert only_cuda.name != whole[0].name and only_cuda.name.endswith('-cuda')


def test_settings_of_reflective_learning_skip_recipes_without_it():
    plain, reflective = recipe_runs(['table1/BSCE/100', 'table1/BSCE+RL/100'], [0], changes=['preset=default'])
    assert plain.settings.reflective is None and plain.mark['changed'] == {}
    assert reflective.settings.reflective['preset'] == 'default'


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match='BSCE'): recipe_runs(['table1/BSEC/100'], [0])
