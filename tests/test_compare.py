"`ltrl compare` and `ltrl report` on the command line: killed, repeated, changed, misused."
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import ltrl_here, ltrl_process, start_ltrl
from ltrl_fastai.experiments import runner
from ltrl_fastai.experiments.plan import make_plan, variants
from ltrl_fastai.experiments.runner import run_file, work_folder
from ltrl_fastai.experiments.training import RunSettings, train_run
from quick_workers import forked


def run(*args, cwd, code=0, start=ltrl_here):
    r = start(*args, cwd=cwd)
    assert r.returncode == code, r.stdout+r.stderr
    assert 'Traceback' not in r.stderr and 'Warning' not in r.stderr, r.stderr
    return r.stdout+r.stderr


def results(folder): return {f.stem: json.loads(f.read_text()) for f in (folder/'runs').glob('*.json')}
def numbers(res):
    keys = ('accuracy', 'history', 'per_class', 'train_accuracy')
    return {name: {k: o[k] for k in keys} for name, o in res.items()}


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "Four runs of three epochs"
    cwd = tmp_path_factory.mktemp('compare')
    return run('compare', '--set', 'epochs=3', '--seeds', '2', '--out', 'a', cwd=cwd, start=ltrl_process), cwd


@pytest.mark.slow
def test_table_files_and_pairs(done):
    said, cwd = done
    assert '4 computed, 0 were there already' in said and '4/4' in said and '### digits-lt IF 20 bsce' in said
    files = sorted(o.name for o in (cwd/'a').iterdir() if o.suffix)
    assert files == ['compare.json', 'recommendation.json', 'runs.csv', 'summary.csv', 'summary.md', 'summary.png']
    res = {(o['variant'], o['seed']): o for o in results(cwd/'a').values()}
    assert set(res) == {(v, s) for v in ('bsce', 'bsce + RL') for s in (0, 1)}
    for s in (0, 1):  # partners share weights, batches and images
        a, b = res['bsce', s], res['bsce + RL', s]
        assert a['history']['train_loss'][0] == b['history']['train_loss'][0]
        assert a['identity']['data'] == b['identity']['data']
    gains = [res['bsce + RL', s]['accuracy']['all']-res['bsce', s]['accuracy']['all'] for s in (0, 1)]
    assert f'{sum(gains)/2:+.1f} (' in (cwd/'a/summary.md').read_text()
    assert all(o['command'] == 'ltrl compare --set epochs=3 --seeds 2 --out a' for o in res.values())


@pytest.mark.slow
def test_nothing_is_computed_twice(done):
    _, cwd = done
    times = {f: f.stat().st_mtime_ns for f in (cwd/'a/runs').iterdir()}
    def compare(seeds): return run('compare', '--set', 'epochs=3', '--seeds', seeds, '--out', 'a', cwd=cwd)
    assert '0 computed, 4 were there already' in compare('2')
    assert '2 computed, 4 were there already' in compare('3')
    assert all(f.stat().st_mtime_ns == t for f, t in times.items())


@pytest.mark.slow
def test_a_result_of_other_code_is_computed_again_with_a_reason(done):
    _, cwd = done
    run('compare', '--set', 'epochs=3', '--seeds', '1', '--out', 'b', cwd=cwd)
    before = results(cwd/'b')
    for f in (cwd/'b/runs').glob('*-rl-*.json'):
        res = json.loads(f.read_text())
        res['identity']['code']['ltrl'] = '0'*8
        res['accuracy']['all'] = 99.
        f.write_text(json.dumps(res))
    said = run('compare', '--set', 'epochs=3', '--seeds', '1', '--out', 'b', cwd=cwd)
    assert 'bsce + RL, seed 0, is computed again: the code changed' in said
    assert '1 computed, 1 were there already' in said
    assert numbers(results(cwd/'b')) == numbers(before)


@pytest.mark.slow
def test_a_killed_comparison_resumes_to_the_same_numbers(tmp_path):
    args = ['compare', '--set', 'epochs=12', '--seeds', '1', '--jobs', '1', '--out']
    def second_run(): return list((tmp_path/'a').glob('.unfinished/*-rl-*.pt'))
    p = start_ltrl(*args, 'a', cwd=tmp_path)
    try:
        end = time.time()+900
        while not second_run():
            assert time.time() < end and p.poll() is None
            time.sleep(.02)
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert len(results(tmp_path/'a')) == 1 and len(second_run()) == 1
    said = run(*args, 'a', cwd=tmp_path)  # at once: the worker has died with its parent, and nothing locks the folder
    assert '1 computed, 1 were there already' in said and not list((tmp_path/'a/.unfinished').iterdir())
    run(*args, 'b', cwd=tmp_path)
    assert numbers(results(tmp_path/'a')) == numbers(results(tmp_path/'b'))


@pytest.mark.slow
def test_a_sweep_reads_no_test_image(tmp_path):
    common = ('compare', '--set', 'epochs=1', '--seeds', '1', '--out', 'a')
    said = run(*common, '--sweep', 'tau=1,2', cwd=tmp_path)
    res = results(tmp_path/'a')
    assert len(res) == 3 and all('accuracy' not in o and o['valid_accuracy']['all'] > 0 for o in res.values())
    assert 'scored on validation images' in said and 'RL (tau=2)' in said and 'Accuracy on validation images' in said
    again = run(*common, '--sweep', 'tau=1', '--test', cwd=tmp_path)
    assert 'it has not read the test set' in again and '2 computed' in again


@pytest.mark.slow
def test_report_shows_the_table_again(done):
    _, cwd = done
    said = run('report', 'a', cwd=cwd)
    assert '### digits-lt IF 20 bsce' in said and 'slides' not in said  # the slides have no digits
    features = str(Path(__file__).parent.parent/'results/bed-cifar100-features')
    assert 'slides: All' in run('report', features, '--no-html', cwd=cwd)
    whole = run('report', '.', cwd=cwd)  # each comparison by itself
    assert whole.count('### digits-lt IF 20 bsce') == len(list(cwd.glob('*/runs'))) and '## a\n' in whole
    assert 'does not exist' in run('report', 'nowhere', cwd=cwd, code=2)
    (cwd/'empty').mkdir(exist_ok=True)
    assert 'no result in it' in run('report', 'empty', cwd=cwd, code=2)


@pytest.mark.slow
def test_report_of_a_single_training(tmp_path):
    run('train', '--dataset', 'digits-lt', '--epochs', '1', '--out', 'a', cwd=tmp_path)
    assert 'bsce + RL' in run('report', 'a', cwd=tmp_path)


@pytest.mark.slow
def test_mistakes_are_reported_before_training(tmp_path):
    mistakes = {
        ('--methods', 'bsec'): "Did you mean 'bsce'?",
        ('--protocol', 'frosen'): "Did you mean 'frozen'?",
        ('--seeds', 'x'): "'5' is 0 to 4",
        ('--sweep', 'weight=1,2'): 'kr.weight or ks.weight',
        ('--set', 'tau=0'): 'above 0',
        ('--ablate', 'kx'): 'expected one of kr, ks, kc',
        ('--rl', 'maybe'): 'both, on, off',
        ('--rl', 'off', '--ablate', 'kr'): 'nothing of Reflective Learning',
        ('--jobs', '0'): 'at least 1',
        ('--imbalance-factor', '10,x'): 'expected numbers',
        ('--set', 'net=resnet9'): 'resnet8',
        ('--imbalance-factor', '20,1000'): 'At most 120',
        ('--dataset', 'cifar100-lt', '--data', 'nowhere'): 'was not found at nowhere',
    }
    for args, text in mistakes.items():
        assert text in run('compare', *args, '--out', 'a', cwd=tmp_path, code=2), args
    assert not (tmp_path/'a').exists()
    (tmp_path/'file').write_text('')
    assert 'is a file' in run('compare', '--out', 'file', cwd=tmp_path, code=2)


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(tmp_path):
    args = ('--set', 'epochs=2', '--rl', 'off', '--seeds', '1', '--sweep', 'lr=.05,1e6', '--out', 'a')
    said = run('compare', *args, cwd=tmp_path, code=1)
    assert '1 computed, 0 were there already, 1 failed' in said
    assert 'training has diverged' in said and 'bsce (lr=0.05)' in said


@pytest.mark.slow
def test_what_all_runs_print_is_shown_once(tmp_path):
    args = ('compare', '--methods', 'softmax', '--set', 'epochs=2', '--set', 'net=resnet8', '--seeds', '2')
    said = run(*args, '--jobs', '1', '--out', 'a', cwd=tmp_path)
    assert '4 computed' in said and said.count('Reflective Learning is off') == 1


@pytest.mark.slow
def test_nested_comparisons_are_reported_apart(tmp_path):
    one = ('--rl', 'off', '--set', 'epochs=1', '--seeds', '1', '--jobs', '1')
    run('compare', *one, '--out', 'runs/bsce', cwd=tmp_path)
    run('compare', *one, '--methods', 'softmax', '--out', 'runs', cwd=tmp_path)
    assert 'softmax' in (tmp_path/'runs/summary.csv').read_text()
    assert 'bsce' in (tmp_path/'runs/bsce/summary.csv').read_text()
    said = run('report', '.', cwd=tmp_path)
    assert '## runs\n' in said and '## runs/bsce\n' in said
    (tmp_path/'runs/compare.json').write_text('[]')
    assert 'compare.json is no plan' in run('report', 'runs', cwd=tmp_path, code=2)


@pytest.mark.slow
def test_results_of_other_code_are_not_paired(done):
    _, cwd = done
    run('compare', '--set', 'epochs=3', '--seeds', '1', '--out', 'c', cwd=cwd)
    file = next((cwd/'c/runs').glob('*-rl-*.json'))
    res = json.loads(file.read_text())
    res['identity']['code']['ltrl'] = 'other'
    file.write_text(json.dumps(res))
    said = run('report', 'c', cwd=cwd)
    assert '| bsce ' in said and 'bsce + RL' not in said


def test_seconds_before_an_interruption_count(tmp_path):
    cp = tmp_path/'run.pt'
    settings = RunSettings(epochs=1, n_max=20)
    train_run(settings, bar=False, checkpoint=cp)
    kept = torch.load(cp, weights_only=True)
    assert 0 < kept['seconds'] < 60
    torch.save({**kept, 'seconds': 1000.}, cp)
    res, _ = train_run(settings, bar=False, checkpoint=cp)
    assert 1000 < res['seconds'] < 1060


def test_the_committed_evidence_is_made_from_the_results(tmp_path):
    "And covers all test beds and parts, with today's weight decay"
    from ltrl_fastai.experiments.summary import evidence
    root = Path(__file__).parent.parent/'results'
    rows = json.loads((root/'evidence.json').read_text())
    assert rows == evidence(root)
    beds = 'frozen-grocery frozen-magnetic finetune-grocery finetune-magnetic text tabular folder digits'.split()
    others = {(o, o) for o in beds}
    assert {(o['protocol'], o['bed']) for o in rows} == {('P1', 'frozen')} | others
    assert {o['method'] for o in rows} == {'softmax', 'bsce'}
    keys = ('protocol bed imbalance_factor method rl baseline decay seeds many medium few all '
            'train_accuracy command').split()
    of_gain = ('gain_all', 'gain_few', 'ci_low', 'ci_high')
    for o in rows: assert set(o) == {*keys, *(of_gain if o['rl'] else ())}
    tuned = {o['bed'] for o in rows if o['baseline'] != 'plain'}
    assert tuned == {'frozen', 'frozen-grocery', 'frozen-magnetic', 'text', 'tabular'}
    decays = {(o['protocol'].startswith('finetune'), o['decay']) for o in rows} # fine-tuning uses Adam
    assert decays == {(False, 'gradient'), (True, 'decoupled')}
    of_bsce = {o['rl'] for o in rows if (o['protocol'], o['method']) == ('P1', 'bsce')}
    assert of_bsce == {None, 'default', 'KR', 'KS', 'KR + KS + KC'}
    (tmp_path/'a/runs').mkdir(parents=True)
    (tmp_path/'a/runs/x.json').write_text('{}')
    with pytest.raises(ValueError, match='no comparison by a protocol'): evidence(tmp_path)


def say_start_method(conn):
    "In a worker: a run that says how it would start the processes of a loader"
    def compute_run(todo, folder, send, command): send(('said', multiprocessing.get_start_method()))
    runner.compute_run = compute_run
    runner._work(conn, None, None)


def test_loaders_of_a_run_start_processes_as_anywhere():
    "By `spawn`, as workers are started, each pass over the images would import PyTorch in each process of a loader"
    process, conn = forked(say_start_method)
    assert conn.recv() == ('ready',)
    conn.send('a run')
    assert conn.recv() == ('said', multiprocessing.get_start_method())
    conn.close()
    process.join()


def test_a_class_with_a_bar_in_its_name_keeps_its_row():
    from ltrl_fastai.experiments.summary import text_table
    lines = text_table([{'class': 'x|y', 'images': '3'}, {'class': 'two\nlines', 'images': '4'}]).splitlines()
    cells = [[o.strip() for o in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines]
    assert cells[0] == ['class', 'images'] and cells[2:] == [[r'x\|y', '3'], ['two lines', '4']]


@pytest.mark.parametrize('option', ['--epochs', '--n-max'])
def test_an_option_of_train_is_suggested_as_a_setting(option, tmp_path):
    said = run('compare', option, '3', '--out', 'a', cwd=tmp_path, code=2)
    assert f"--set {option[2:].replace('-', '_')}=..." in said


@pytest.mark.parametrize('seeds,runs,begun,said', [
    ('2', 4, 0, '4 runs, 2 at a time, scored on'), ('1', 2, 1, 'Going on: 1 finished run, 1 interrupted run\n')])
def test_the_header_of_a_comparison(seeds, runs, begun, said, tmp_path, monkeypatch):
    "It says what an earlier start has left; --workers reaches the processes"
    def run_nothing(plan, out, *_):
        assert len(plan) == runs and os.environ['LTRL_WORKERS'] == '3'
    monkeypatch.setattr('ltrl_fastai.experiments.runner.run_plan', run_nothing)
    monkeypatch.setenv('LTRL_WORKERS', '0')  # is put back
    plan = make_plan(['bsce'], variants('both', [], [], [], False), [0])
    if begun:
        for file in (run_file(tmp_path/'a', plan[0]), work_folder(tmp_path/'a')/f'{plan[1].name}-1234.pt'):
            file.parent.mkdir(parents=True)
            file.touch()
    args = ['compare', '--seeds', seeds, '--jobs', '2', '--workers', '3', '--out', 'a']
    assert said in run(*args, cwd=tmp_path) and run('compare', '--workers', '-1', '--out', 'a', cwd=tmp_path, code=2)


def test_the_header_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr('ltrl_fastai.experiments.runner.run_plan', lambda *_: [])
    assert run('compare', '--seeds', '1', '--rl', 'on', '--out', 'a', cwd=tmp_path).startswith('1 run, scored on')
