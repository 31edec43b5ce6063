"`ltrl train` as a user has it: a process, its files, its numbers, its errors."
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import torch
from command_line import ltrl_here, ltrl_process, start_ltrl
from ltrl_fastai.cli.outputs import describe_model
from ltrl_fastai.data.beds import write_digits_folder
from ltrl_fastai.experiments.training import RunSettings, train_run


def run(*args, cwd, check=True, start=ltrl_here):
    r = start(*args, cwd=cwd)
    assert not check or r.returncode == 0, r.stdout+r.stderr
    return r


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "One pair of runs, on digits, shortened"
    cwd = tmp_path_factory.mktemp('both')
    return run('train', '--dataset', 'digits-lt', '--epochs', '3', cwd=cwd, start=ltrl_process), cwd


@pytest.mark.slow
def test_one_pair_of_runs(both):
    r, cwd = both
    out = next((cwd/'ltrl-runs').iterdir())
    assert sorted(o.name for o in out.iterdir()) == ['model', 'per_class.png', 'result.json']
    assert (out/'per_class.png').read_bytes()[:4] == b'\x89PNG'
    assert re.search(r'Many \(1\) +Medium \(5\) +Few \(4\) +All \(10\)', r.stdout)
    assert 'gain' in r.stdout
    assert 'Next: `ltrl train' in r.stdout
    assert 'Traceback' not in r.stderr and 'Warning' not in r.stderr, r.stderr
    res = json.loads((out/'result.json').read_text())
    keys = ('dataset imbalance_factor method reflective seed epochs accuracy per_class class_counts history seconds '
            'versions command')
    assert set(keys.split()) <= set(res)
    assert list(res['accuracy']) == ['many', 'medium', 'few', 'all']
    assert res['reflective']['kr']['tau'] == 2.
    assert res['command'] == 'ltrl train --dataset digits-lt --epochs 3'
    assert len(res['per_class']) == len(res['class_counts']) == 10 and sum(res['class_counts']) == 405
    assert {'train_loss', 'base_loss', 'review_loss', 'right', 'all'} <= set(res['history'])
    assert res['baseline']['reflective'] is None
    assert res['gain']['all'] == pytest.approx(res['accuracy']['all']-res['baseline']['accuracy']['all'], abs=1e-5)
    means = [sum(res['per_class'][i] for i in ids)/len(ids) for ids in ([0], range(1, 6), range(6, 10), range(10))]
    assert list(res['accuracy'].values()) == pytest.approx(means, abs=1e-4)


@pytest.mark.slow
def test_same_seed_same_numbers(both, tmp_path):
    _, cwd = both
    first = json.loads(next((cwd/'ltrl-runs').glob('*/result.json')).read_text())
    run('train', '--dataset', 'digits-lt', '--epochs', '3', '--out', 'again', cwd=tmp_path)
    again = json.loads((tmp_path/'again/result.json').read_text())
    def own(res): return {k: v for k, v in res.items() if k not in ('seconds', 'command', 'baseline')}
    assert own(first) == own(again)
    assert first['baseline']['history'] == again['baseline']['history']
    run('train', '--dataset', 'digits-lt', '--epochs', '3', '--seed', '1', '--no-rl', '--out', 'other', cwd=tmp_path)
    other = json.loads((tmp_path/'other/result.json').read_text())
    assert other['reflective'] is None and 'gain' not in other and other['history'] != first['baseline']['history']


@pytest.mark.slow
def test_toggles_and_a_group_that_is_absent(tmp_path):
    r = run('train', '--dataset', 'digits-lt', '--epochs', '2', '--rl', '--no-kc', '--no-ks', '--imbalance-factor', '2',
            '--out', 'a', cwd=tmp_path)
    def refuse(constant): pytest.fail(f'{constant} in result.json')
    res = json.loads((tmp_path/'a/result.json').read_text(), parse_constant=refuse)
    assert res['reflective']['kc'] is False and res['reflective']['ks'] is False and res['reflective']['kr']
    assert res['accuracy']['few'] is None and 'Few (0)' in r.stdout and 'NaN' not in r.stdout


@pytest.mark.slow
def test_cutout(tmp_path):
    "It changes the training and the name of the output folder; a text is refused"
    for args in ([], ['--cut', '4']):
        run('train', '--dataset', 'digits-lt', '--epochs', '1', '--no-rl', *args, cwd=tmp_path)
    results = [json.loads(o.read_text()) for o in (tmp_path/'ltrl-runs').glob('*/result.json')]
    plain, cut = sorted(results, key=lambda o: o['settings']['cut'] or 0)
    assert (plain['settings']['cut'], cut['settings']['cut']) == (None, 4)
    assert plain['history']['train_loss'] != cut['history']['train_loss']
    assert run('train', '--cut', 'much', cwd=tmp_path, check=False).returncode == 2


@pytest.mark.slow
def test_results_are_not_replaced_by_others(tmp_path):
    args = ('train', '--dataset', 'digits-lt', '--epochs', '1', '--no-rl', '--out', 'a')
    run(*args, cwd=tmp_path)
    kept = (tmp_path/'a/result.json').read_text()
    r = run(*args, '--seed', '1', cwd=tmp_path, check=False)
    assert r.returncode == 2 and '--force' in r.stderr and (tmp_path/'a/result.json').read_text() == kept
    run(*args, '--seed', '1', '--force', cwd=tmp_path)
    assert (tmp_path/'a/result.json').read_text() != kept
    (tmp_path/'file').write_text('')
    r = run('train', '--dataset', 'digits-lt', '--out', 'file', cwd=tmp_path, check=False)
    assert r.returncode == 2 and 'is a file' in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.slow
def test_a_data_set_that_is_not_there(tmp_path):
    for args in (['--data', 'nowhere'], ['--data', '.']):
        r = run('train', '--dataset', 'cifar100-lt', *args, cwd=tmp_path, check=False)
        assert r.returncode == 2 and 'Traceback' not in r.stderr, r.stderr
        assert 'cifar-100-python' in r.stderr and 'untar_data' in r.stderr
    nowhere = 'http://127.0.0.1:9'
    offline = {'FASTAI_HOME': str(tmp_path/'home'), 'http_proxy': nowhere, 'https_proxy': nowhere}
    r = ltrl_process('train', '--dataset', 'cifar10-lt', cwd=tmp_path, **offline)
    assert r.returncode == 2 and 'was not found at' in r.stderr and 'To get it' in r.stderr, r.stdout+r.stderr


@pytest.mark.slow
def test_killed_in_the_middle_leaves_no_half_result(tmp_path):
    args = ('train', '--dataset', 'digits-lt', '--epochs', '500', '--no-rl', '--out', 'a')
    p = start_ltrl(*args, cwd=tmp_path, stdout=subprocess.PIPE)
    for line in p.stdout:
        if line.split()[:1] == ['1']: break
    p.kill()
    p.wait()
    checkpoints = ('.fit-0.pt', '..fit-0.pt')  # one that is whole, and perhaps one that was being written
    assert not [o.name for o in (tmp_path/'a').iterdir() if not o.name.startswith(checkpoints)]
    run('train', '--dataset', 'digits-lt', '--epochs', '1', '--no-rl', '--out', 'a', '--force', cwd=tmp_path)
    assert sorted(o.name for o in (tmp_path/'a').iterdir()) == ['model', 'per_class.png', 'result.json']


@pytest.mark.slow
def test_a_finished_run_is_kept_when_the_next_is_killed(tmp_path):
    args = ('train', '--dataset', 'digits-lt', '--epochs', '12', '--out', 'a')
    p = start_ltrl(*args, cwd=tmp_path, stdout=subprocess.PIPE)
    for line in p.stdout:
        if 'bsce, 12 epochs' in line: break  # the second run begins
    p.kill()
    p.wait()
    res = json.loads((tmp_path/'a/result.json').read_text())
    assert len(res['history']['train_loss']) == 12 and res['reflective'] and 'baseline' not in res


def test_help_names_the_options():
    r = run('train', '--help', cwd='.')
    options = '--dataset --imbalance-factor --method --net --rl --no-rl --kr --ks --kc --preset --epochs --seed --out'
    for o in options.split(): assert o in r.stdout


@pytest.mark.slow
def test_real_cifar_if_it_is_there(tmp_path):
    "Two steps' worth of CIFAR-100-LT through the whole command; without the data the error says how to get it"
    from ltrl_fastai.data.benchmarks import archive_folder
    from fastai.data.external import URLs
    there = (archive_folder(URLs.CIFAR_100)/'test').is_dir()
    if not there:
        folder = str(archive_folder(URLs.CIFAR_100))
        r = run('train', '--dataset', 'cifar100-lt', '--data', folder, cwd=tmp_path, check=False)
        assert r.returncode == 2 and 'untar_data' in r.stderr
        return
    run('train', '--dataset', 'cifar100-lt', '--net', 'resnet8', '--epochs', '1', '--bs', '512', '--rl', '--out', 'a',
        cwd=tmp_path)
    res = json.loads((tmp_path/'a/result.json').read_text())
    assert sum(res['class_counts']) == 10827 and res['accuracy']['all'] > 1 and len(res['per_class']) == 100


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(both, tmp_path):
    "kill -9 after a checkpoint; the same numbers as without, and never silently lost or mixed up"
    args, log = ('train', '--dataset', 'digits-lt', '--epochs', '3', '--out', 'a'), tmp_path/'a'
    p = start_ltrl(*args, cwd=tmp_path)
    until = time.time()+120
    while not (log/'.fit-0.pt').exists() and p.poll() is None and time.time() < until: time.sleep(.01)
    p.kill()
    p.wait()
    assert (log/'.fit-0.pt').exists()
    r = run(*args, cwd=tmp_path, check=False)
    assert r.returncode == 2 and '--resume' in r.stderr and (log/'.fit-0.pt').exists()
    r = run('train', '--dataset', 'digits-lt', '--epochs', '4', '--out', 'a', '--resume', cwd=tmp_path, check=False)
    assert r.returncode == 2 and 'another fit' in r.stderr and 'Traceback' not in r.stderr
    assert r.stderr.startswith('Error: a/.fit-0.pt')  # without fastai's words
    assert 'going on' in run(*args, '--resume', cwd=tmp_path).stdout
    got, want = [json.loads(next(o.glob('*/result.json')).read_text()) for o in (tmp_path, both[1]/'ltrl-runs')]
    for o in (got, got['baseline'], want, want['baseline']):
        o.pop('seconds')
        o.pop('command', None)
    assert got == want and not list(log.glob('.fit*'))
    assert 'is complete' in run(*args, '--resume', cwd=tmp_path).stdout


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on(tmp_path):
    args = ('train', '--dataset', 'digits-lt', '--rl', '--epochs', '200', '--out', 'a')
    p = start_ltrl(*args, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        end = time.time()+300
        while not (tmp_path/'a/.fit-0.pt').exists():
            assert time.time() < end and p.poll() is None
            time.sleep(.02)
    finally: p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=100)[1]
    assert p.returncode == 130
    assert 'Interrupted. The same command with --resume goes on' in said
    assert 'Traceback' not in said
    assert (tmp_path/'a/.fit-0.pt').exists()


@pytest.mark.parametrize('command', ['train', 'compare'])
def test_a_data_set_given_as_an_argument(command, tmp_path):
    r = run(command, 'photos', '--out', 'here', cwd=tmp_path, check=False)
    assert r.returncode == 2 and 'photos' in r.stderr and '--dataset PATH' in r.stderr


@pytest.mark.parametrize('method', ['bsce', 'crt'])
def test_the_table_of_epochs(method, capsys):
    "Narrow, from epoch 1 in each stage, and in percent as the result is"
    settings = RunSettings(epochs=2, n_max=20, method=method, reflective={})
    res, _ = train_run(settings, bar=True)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.split()[:1] in (['epoch'], ['1'], ['2'])]  # others are notes
    header, *rows = [line.split() for line in lines[:3]]
    n_stages = len(res.get('stages', []))+1
    assert max(map(len, lines)) <= 80 and lines.count(lines[0]) == n_stages == (1 if method == 'bsce' else 2)
    assert [row[0] for row in rows] == ['1', '2']
    names = [name for name in header if name != '%']
    for name in ('all', 'few'):
        shown = [row[names.index(name)] for row in rows]
        assert f'{name} %' in lines[0] and shown == [f'{v:.1f}' for v in res['history'][name]]


_ways = {
    'train': ('train', '--dataset', 'digits-lt', '--out'), 'compare': ('compare', '--out'),
    'run': ('run', 'table1/BSCE+RL/100', '--out'), 'bench': ('bench', '--out'),
    'inspect': ('inspect', '{images}', '--out'), 'evaluate': ('evaluate', '{model}', '{images}', '--out'),
    'predict': ('predict', '{model}', '{images}', '--out'), 'export': ('export', '{model}', '--out'),
    'report': ('report', '{model}', '--html'), 'evidence': ('report', '{model}', '--evidence')}


@pytest.mark.parametrize('name', _ways)
def test_a_file_where_the_output_needs_a_folder(name, digits_model, tmp_path):
    "Each command says which file is in the way, before it does anything"
    images, model = digits_model
    (tmp_path/'notes').write_text('mine')
    ending = dict(inspect='a.html', bench='a.json', predict='a.csv', export='a.onnx', report='a.html',
                  evidence='a.json')
    out = f"notes/{ending.get(name, 'sub')}"
    r = run(*(o.format(images=images, model=model) for o in _ways[name]), out, cwd=tmp_path, check=False)
    option = {'report': '--html', 'evidence': '--evidence'}.get(name, '--out')
    assert r.returncode == 2 and 'Traceback' not in r.stderr, r.stderr
    assert f"{option}: {out} can't be made, since notes is a file and no folder. Give another place." in r.stderr
    assert (tmp_path/'notes').read_text() == 'mine' and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize('args,reason', [
    (('--dataset', 'grocery', '--net', 'resnet34', '--weights', 'w.pth'), 'w.pth'), (('--dataset', 'empty'), 'empty')])
def test_a_training_that_can_not_start_leaves_no_folder(args, reason, tmp_path):
    (tmp_path/'empty').mkdir()
    for out in ([], ['--out', 'runs/deep/a']):
        r = run('train', *args, *out, cwd=tmp_path, check=False)
        assert r.returncode == 2 and reason in r.stderr, r.stderr
        assert [o.name for o in tmp_path.iterdir()] == ['empty']


def full_disk(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'x')


def test_a_full_disk_in_training(tmp_path, monkeypatch):
    "The reason without fastai's words, and what the next command does"
    monkeypatch.setattr('ltrl_fastai.experiments.checkpoint.atomic_write', full_disk)
    args = ('train', '--dataset', 'digits-lt', '--epochs', '1', '--no-rl', '--out', 'a')
    r = run(*args, cwd=tmp_path, check=False)
    assert r.returncode == 2 and 'No space left on device' in r.stderr and 'Traceback' not in r.stderr
    assert 'Exception occured' not in r.stderr and 'the same command starts over' in r.stderr
    assert not (tmp_path/'a').exists()


@pytest.mark.parametrize('args', [
    ('train', '--dataset', 'digits-lt', '--out'), ('compare', '--seeds', '1', '--out')])
def test_a_folder_that_can_not_be_made(args, tmp_path):
    "The system's reason, with the place and what to do"
    r = run(*args, tmp_path/('x'*300), cwd=tmp_path, check=False)
    assert r.returncode == 2 and "can't be made (File name too long). Choose another place." in r.stderr
    assert 'Errno' not in r.stderr


def test_a_wrong_path_names_what_is_expected(tmp_path):
    (tmp_path/'a.txt').touch()
    for name, reason in {'a.txt': 'a.txt is no folder and no CSV file', 'no/where': 'no/where is not there'}.items():
        r = run('train', '--dataset', './'+name, cwd=tmp_path, check=False)
        assert r.returncode == 2 and reason in r.stderr and '`ltrl datasets` lists' in r.stderr
    for name, more in {'birds': '', 'grocry': " Did you mean 'grocery'?"}.items():
        r = run('train', '--dataset', name, cwd=tmp_path, check=False)
        assert r.returncode == 2 and 'Give the path of your own images, or one of digits-lt' in r.stderr
        assert f'no folder or CSV file {name!r}, and no data set of that name.{more} Give' in r.stderr


@pytest.mark.parametrize('moment', ['before the first epoch', 'in the second run', 'after the last epoch'])
def test_an_interrupt_names_the_next_command(moment, tmp_path, monkeypatch):
    "Whenever it comes, the command that is named then goes on, and what it suggests can be typed as it stands"
    def stop(*args, **kwargs): raise KeyboardInterrupt
    trained = []

    def stop_second(settings, **kwargs):
        if trained: stop()
        trained.append(settings)
        return train_run(settings, **kwargs)
    name, stand_in = {
        'before the first epoch': ('ltrl_fastai.experiments.settings.RunSettings.check', stop),
        'in the second run': ('ltrl_fastai.experiments.training.train_run', stop_second),
        'after the last epoch': ('ltrl_fastai.cli.outputs.choose_model', stop)}[moment]
    args = ('train', '--dataset', 'digits-lt', '--epochs', '1', '--out', 'mes essais')
    with monkeypatch.context() as patched:
        patched.setattr(name, stand_in)
        r = run(*args, cwd=tmp_path, check=False)
    assert r.returncode == 130 and 'Traceback' not in r.stderr
    resume = [] if moment == 'before the first epoch' else ['--resume']
    said = 'with --resume goes on' if resume else 'starts over: no epoch was done'
    assert r.stderr.strip() in (f'Interrupted. The same command {said}.',
                                f'Interrupted. The same command {said} after the last whole epoch.')
    run(*args, *resume, cwd=tmp_path)
    files = sorted(o.name for o in (tmp_path/'mes essais').iterdir())
    assert files == ['model', 'per_class.png', 'result.json']


def test_commands_are_quoted_and_other_settings_named(tmp_path):
    write_digits_folder(tmp_path/'mes chiffres')
    r = run('train', '--dataset', 'mes chiffres', '--net', 'resnet8', '--epochs', '1', '--no-rl', '--workers', '0',
            '--out', 'mes essais', cwd=tmp_path)
    suggested = [shlex.split(o) for o in re.findall('`(ltrl [^`]+)`', r.stdout)]
    assert ['ltrl', 'predict', 'mes essais/model', 'image.jpg'] in suggested
    assert ['ltrl', 'report', 'mes essais'] in suggested
    (tmp_path/'mes chiffres').rename(tmp_path/'moved')
    r = run('train', '--dataset', 'moved', '--net', 'resnet8', '--epochs', '2', '--no-rl', '--workers', '0', '--out',
            'mes essais', '--resume', cwd=tmp_path, check=False)
    assert r.returncode == 2
    assert "other settings: dataset was 'mes chiffres' and is 'moved'; epochs was 1 and is 2. Choose" in r.stderr


@pytest.mark.parametrize('args, name', [
    (['export', '{model}'], 'ltrl_fastai.deploy.export.export_model'),
    (['report', '{model}'], 'ltrl_fastai.experiments.summary.result_folders'),
    (['compare', '--dataset', 'digits-lt', '--out', 'a'], 'ltrl_fastai.experiments.settings.RunSettings.check'),
    (['datasets'], 'ltrl_fastai.data.catalogue.catalogue')], ids=lambda o: str(o[0]))
def test_an_interrupt_of_other_commands(args, name, digits_model, tmp_path, monkeypatch):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(name, stop)
    r = run(*(o.format(model=digits_model[1]) for o in args), cwd=tmp_path, check=False)
    assert (r.returncode, r.stderr) == (130, '\nInterrupted. Run the same command again.\n')
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('scores, said', [
    ([80., 80.], '80.0 % on validation images, equal to the other)'),
    ([80.02, 80.04], '80.04 % on validation images, against 80.02 %)'),
    ([80.001, 80.002], '80.0 % on validation images, equal to the other)'),
    ([80.2, 70.], '80.2 % on validation images, against 70.0 %)'), ([None, None], '(epoch 2 of 3)')], ids=str)
def test_two_models_are_compared_as_far_as_they_differ(scores, said, tmp_path):
    best = max(scores, key=lambda o: o or 0)
    model = dict(epoch=2, accuracy=dict(validation=dict(all=best)), all_scores=scores, reflective=True)
    assert describe_model(model, tmp_path, 3).endswith(said)


@pytest.mark.parametrize('name', ['train', 'compare', 'inspect', 'evaluate', 'predict', 'export', 'report'])
def test_a_folder_that_may_not_be_written_to(name, digits_model, tmp_path, monkeypatch):
    "Found before any work; tests may run as a user who may write everywhere"
    images, model = digits_model
    (tmp_path/'theirs').mkdir()
    ending = dict(inspect='a.html', predict='a.csv', export='a.onnx', report='a.html')
    out = f"theirs/{ending.get(name, 'sub')}"
    monkeypatch.setattr(os, 'access', lambda place, mode: not str(place).endswith('theirs'))
    r = run(*(o.format(images=images, model=model) for o in _ways[name]), out, cwd=tmp_path, check=False)
    option = '--html' if name == 'report' else '--out'
    said = f"{option}: {out} can't be made, since you may not write to theirs. Give another place."
    assert r.returncode == 2 and said in r.stderr and 'Traceback' not in r.stderr


def test_a_gpu_with_too_little_memory(tmp_path, monkeypatch):
    def fails(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr('ltrl_fastai.experiments.training.train_run', fails)
    for bs, remedy in {32: 'Take fewer: --bs 8.', 1: 'Add --device cpu.'}.items():
        r = run('train', '--dataset', 'digits-lt', '--bs', bs, '--out', 'a', cwd=tmp_path, check=False)
        assert r.returncode == 2 and remedy in r.stderr and 'Traceback' not in r.stderr
        assert not (tmp_path/'a').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
@pytest.mark.parametrize('args, said', [
    (['--amp'], 'amp: half precision needs a CUDA GPU, and there is none here. Leave it out.'),
    (['--device', 'cuda'], '--device: cuda is not there; PyTorch sees 0 CUDA devices. Take cpu')], ids=str)
def test_what_needs_a_gpu(args, said, tmp_path):
    r = run('train', '--dataset', 'digits-lt', *args, '--out', 'a', cwd=tmp_path, check=False)
    assert r.returncode == 2 and said in r.stderr and not [*tmp_path.iterdir()]


def test_a_log_for_each_run(tmp_path):
    "A row for each epoch, and a column for each term of the loss"
    run('train', '--dataset', 'digits-lt', '--epochs', '2', '--log', 'csv', '--out', 'a', cwd=tmp_path)
    for label, has_review in {'bsce-RL': True, 'bsce': False}.items():
        header, *rows = (tmp_path/'a'/'logs'/label/'history.csv').read_text().splitlines()
        columns = header.split(',')
        assert {'epoch', 'train_loss', 'all', 'few'} <= set(columns) and ('review_loss' in columns) == has_review
        assert [row.split(',')[0] for row in rows] == ['0', '1']
