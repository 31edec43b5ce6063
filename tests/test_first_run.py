"`ltrl train` without options: its data come with the package, and it ends with a gain and its interval."
import importlib.util
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import ltrl_here, start_ltrl
from ltrl_fastai.data.benchmarks import archive_folder
from ltrl_fastai.data.frozen import Lite0, default_features
from ltrl_fastai.data.imbalance import class_counts, imbalanced_counts
from ltrl_fastai.data.shipped import photos_lt, shipped_photos
from ltrl_fastai.evaluation.metrics import interval
from ltrl_fastai.experiments.summary import load_results, runs_table, summarise
from ltrl_fastai.experiments.training import RunSettings
from fastai.data.external import URLs

root = Path(__file__).parent.parent
groups = ('many', 'medium', 'few', 'all')


def run(*args, cwd, code=0):
    r = ltrl_here(*args, cwd=cwd)
    assert r.returncode == code and 'Traceback' not in r.stderr, r.stdout+r.stderr
    return r.stdout+r.stderr


# Data of the package


def test_the_file_is_package_data_and_small():
    "test_package.py builds a wheel, and checks that it is in there"
    import tomllib
    patterns = tomllib.loads((root/'pyproject.toml').read_text())['tool']['setuptools']['package-data']['ltrl_fastai']
    files = {o for p in patterns for o in (root/'ltrl_fastai').glob(p)}
    assert root/'ltrl_fastai/data/photos_lt.npz' in files
    assert 1e6 < (root/'ltrl_fastai/data/photos_lt.npz').stat().st_size < 2.5e6


def test_the_file_describes_itself():
    photos = shipped_photos()
    assert len(photos['classes']) == len(set(photos['classes'])) == 100 and {'apple', 'worm'} <= set(photos['classes'])
    assert 'CIFAR-100' in photos['about']['data'] and 'EfficientNet-Lite0' in photos['about']['net']
    assert (root/photos['about']['made_by']).is_file()
    x, y = photos['test']
    assert x.shape == (10000, 128) and torch.bincount(y).tolist() == [100]*100
    assert photos['train'][0].isfinite().all() and photos['train'][0].std() > .1


def test_counts_of_the_benchmark():
    "The largest class takes all images, and leaves twenty of them for validation"
    dls = photos_lt(device='cpu')
    published = imbalanced_counts(500, 100, 100)
    assert sum(published) == 10847
    assert class_counts(dls).tolist() == [480]+published[1:]
    assert [len(o.dataset) for o in dls.loaders] == [10827, 2000, 10000]
    assert torch.bincount(dls.valid.dataset.targets).tolist() == [20]*100
    assert (dls.name, dls.imbalance_factor, dls.n_in, len(dls.vocab)) == ('photos-lt', 100, 128, 100)


@pytest.mark.parametrize('factor', [1, 2, 10, 50, 100, 250, 500])
def test_other_factors_drop_images(factor):
    dls = photos_lt(factor, device='cpu')
    want = imbalanced_counts(min(500, 5*factor), 100, factor)
    assert class_counts(dls).tolist() == [min(want[0], 480)]+want[1:]
    assert torch.bincount(dls.valid.dataset.targets, minlength=100).tolist() == [20]*100


def test_draws_are_reproducible_and_differ_by_data_seed():
    def rows(seed): return [o.dataset.x for o in photos_lt(data_seed=seed, device='cpu').loaders]
    for a, b in zip(rows(3), rows(3)): assert a.equal(b)
    train, valid, test = zip(rows(0), rows(1))
    assert not train[0].equal(train[1]) and not valid[0].equal(valid[1]) and test[0].equal(test[1])
    everything = torch.cat([train[0], valid[0]]).sum(0), torch.cat([train[1], valid[1]]).sum(0)
    assert torch.allclose(*everything, atol=.01)  # another split of the same images


def test_wrong_arguments():
    mistakes = [
        (dict(n_max=501), 'Lower n_max'), (dict(imbalance_factor=1, n_max=26), 'there are|are wanted'),
        (dict(size=8), 'features'), (dict(tfms=dict(flip=True)), 'features'), (dict(n_valid=0), 'at least 1'),
        (dict(imbalance_factor=501), 'no image')]
    for wrong, text in mistakes:
        with pytest.raises(ValueError, match=text): photos_lt(**wrong)
    with pytest.raises(ValueError, match='part of this package'): RunSettings('photos-lt', data='.')


class MissingFeatures(Exception):
    "Features are not in the cache"


def cached_features(tool, monkeypatch):
    "Features of CIFAR-100, or None if they have to be computed, which takes minutes"
    def refuse(extractor, images): raise MissingFeatures
    if not (archive_folder(URLs.CIFAR_100)/'train').is_dir() or not default_features().is_dir(): return None
    monkeypatch.setattr(Lite0, '__call__', refuse)
    try: return tool.full_features()
    except MissingFeatures: return None


def test_reproduced_from_the_images(monkeypatch):
    "Without CIFAR-100 or its features, the tool is tested on other features instead"
    spec = importlib.util.spec_from_file_location('tool', root/'tools/make_shipped_features.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    data = cached_features(tool, monkeypatch)
    if data is not None:
        made = tool.made(*data)
        photos = shipped_photos()
        for k in ('train', 'test'):
            x, y = photos[k]
            again = torch.from_numpy(made[f'{k}_x']*made['scale'])
            assert (x-again).abs().max() <= 1.01*made['scale'].max() and y.tolist() == made[f'{k}_y'].tolist()
        assert photos['classes'] == data[2]
    else:
        rng = np.random.default_rng(0)
        x = torch.tensor(rng.normal(size=(400, 20))*np.linspace(3, .1, 20), dtype=torch.float32)
        y = torch.arange(400) % 4
        data = (x, y), (x[:40], y[:40]), list('abcd')
        made = tool.made(*data, n=6)
    mean, vectors, _ = tool.principal(data[0][0], made['train_x'].shape[1])
    for (x, _), k in zip(data, ('train', 'test')):
        exact = (x.double()-mean)@vectors
        scale = torch.from_numpy(made['scale'])
        error = (torch.from_numpy(made[f'{k}_x']*made['scale'])-exact).abs()/scale
        inside = (exact/scale).abs() < 127
        assert error[inside].max() < .501 and inside.double().mean() > .999
    assert torch.allclose(vectors.T@vectors, torch.eye(vectors.shape[1], dtype=torch.float64), atol=1e-8)


# The command


@pytest.fixture(scope='module')
def first_run(tmp_path_factory):
    "The bare command with fewer seeds and epochs"
    cwd = tmp_path_factory.mktemp('first')
    return run('train', '--seeds', '3', '--epochs', '3', cwd=cwd), next((cwd/'ltrl-runs').iterdir())


@pytest.mark.slow
def test_a_gain_with_its_interval(first_run):
    said, out = first_run
    assert re.search(r'Many \(35\) +Medium \(35\) +Few \(30\) +All \(100\)', said) and 'mean of 3 seeds' in said
    rows = {m[1]: m[2].split() for m in re.finditer(r'^(bsce \+ RL|bsce|gain|95% interval) {2,}(.*)$', said, re.M)}
    assert list(rows) == ['bsce', 'bsce + RL', 'gain', '95% interval']
    results = load_results(out)
    assert [(o['variant'], o['seed']) for o in results] == [(v, s) for s in range(3) for v in ('bsce', 'bsce + RL')]
    for i, k in enumerate(groups):
        base, new = ([o['accuracy'][k] for o in results[start::2]] for start in (0, 1))
        assert float(rows['bsce'][i]) == pytest.approx(np.mean(base), abs=.06)
        mean, low, high = interval(np.subtract(new, base))
        assert float(rows['gain'][i]) == pytest.approx(mean, abs=.06)
        shown_low, _, shown_high = rows['95% interval'][3*i:3*i+3]
        assert [float(shown_low), float(shown_high)] == pytest.approx([low, high], abs=.06)
    if low > 0: verdict = 'is above 0'
    elif high < 0: verdict = 'is below 0'
    else: verdict = 'contains 0'
    assert f'interval {verdict}' in said
    assert '3 pairs of runs' in said and 'Next: your own images, `ltrl train --dataset path/to/folder`' in said


def test_files_of_the_first_run(first_run):
    _, out = first_run
    visible = sorted(o.name for o in out.iterdir() if not o.name.startswith('.'))
    assert visible == ['compare.json', 'per_class.png', 'result.json', 'runs']
    assert out.name == 'photos-lt-if100-bsce-rl-and-without-3ep-3seeds'
    assert (out/'per_class.png').read_bytes()[:4] == b'\x89PNG' and len(list((out/'runs').iterdir())) == 6
    res = json.loads((out/'result.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} in result.json'))
    found = summarise(runs_table(load_results(out))).iloc[1]
    assert res['seeds'] == [0, 1, 2] and res['command'] == 'ltrl train --seeds 3 --epochs 3'
    for k in groups:
        assert res['gain'][k] == pytest.approx(found[f'gain_{k}'], abs=1e-4)
        assert res['gain_interval'][k] == pytest.approx([found[f'gain_{k}_lo'], found[f'gain_{k}_hi']], abs=1e-4)
        assert res['accuracy'][k]-res['baseline']['accuracy'][k] == pytest.approx(res['gain'][k], abs=1e-4)
    assert len(res['per_class']) == len(res['class_counts']) == len(res['classes']) == 100
    assert np.mean(res['per_class']) == pytest.approx(res['accuracy']['all'], abs=1e-3)
    said = run('report', str(out), cwd=out)
    assert '### photos-lt IF 100 bsce' in said and '| bsce + RL |    3 |' in said


@pytest.mark.slow
def test_a_second_run_skips_finished_ones(first_run):
    said, out = first_run
    def times(): return {o: o.stat().st_mtime_ns for o in (out/'runs').iterdir()}
    before = times()
    again = run('train', '--seeds', '3', '--epochs', '3', cwd=out.parent.parent)
    assert '6 of 6 runs were there already' in again and times() == before
    table = said[said.index('Accuracy on'):said.index('Written')]
    assert table in again
    assert 'is complete' in run('train', '--seeds', '3', '--epochs', '3', '--resume', cwd=out.parent.parent)


def test_one_seed_has_the_numbers_of_its_pair(first_run, tmp_path):
    _, out = first_run
    run('train', '--seed', '1', '--epochs', '3', '--out', 'a', cwd=tmp_path)
    one = json.loads((tmp_path/'a/result.json').read_text())
    pair = {o['variant']: o for o in load_results(out) if o['seed'] == 1}
    assert one['accuracy'] == pair['bsce + RL']['accuracy']
    assert one['baseline']['accuracy'] == pair['bsce']['accuracy']
    assert 'gain_interval' not in one and one['seed'] == 1


def killed(cwd, *args, when):
    "Start the command, and kill -9 its process as soon as `when()` is true"
    p = start_ltrl(*args, cwd=cwd)
    end = time.time()+400
    while not when():
        assert p.poll() is None and time.time() < end
        time.sleep(.01)
    p.kill()
    p.wait()


@pytest.mark.slow
def test_killed_and_resumed(first_run, tmp_path):
    "Same numbers as without a kill; it asks for --resume, and refuses to mix in another kind of training"
    args = ('train', '--seeds', '3', '--epochs', '3', '--out', 'a')
    out = tmp_path/'a'
    def in_second_run(): return any((out/'runs').glob('*.json')) and any((out/'.unfinished').glob('*.pt'))
    killed(tmp_path, *args, when=in_second_run)
    time.sleep(3)  # workers see that their parent is gone
    assert not (out/'result.json').exists()
    assert '--resume' in run(*args, cwd=tmp_path, code=2)
    for more in ((), ('--resume',)):
        one_seed = ('train', '--seed', '0', '--epochs', '3', '--out', 'a')
        assert 'several seeds' in run(*one_seed, *more, cwd=tmp_path, code=2)
    said = run(*args, '--resume', cwd=tmp_path)
    assert 'going on' in said and ' there already.' in said
    keys = ('variant', 'seed', 'accuracy', 'history', 'per_class')
    def numbers(folder): return [{k: o[k] for k in keys} for o in load_results(folder)]
    assert numbers(out) == numbers(first_run[1]) and not any((out/'.unfinished').glob('*'))


@pytest.mark.slow
def test_an_interrupt_says_how_to_resume(tmp_path):
    args = ('train', '--epochs', '300', '--out', 'a')
    p = start_ltrl(*args, cwd=tmp_path, stderr=subprocess.PIPE, new_interpreter=True)
    try:
        end = time.time()+400
        while not any((tmp_path/'a/.unfinished').glob('*.pt')):
            assert p.poll() is None and time.time() < end
            time.sleep(.02)
    finally: p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=100)[1]
    assert p.returncode == 130 and 'Traceback' not in said
    assert 'Interrupted. The same command with --resume goes on' in said


@pytest.mark.slow
def test_force_replaces_a_result_of_another_kind(tmp_path):
    quick = ('--dataset', 'digits-lt', '--epochs', '1', '--out', 'a')
    run('train', *quick, '--seeds', '4,7', cwd=tmp_path)
    assert 'result of other settings' in run('train', *quick, '--seed', '4', cwd=tmp_path, code=2)
    assert 'result of other settings' in run('train', *quick, '--seeds', '4-6', cwd=tmp_path, code=2)
    run('train', *quick, '--seed', '4', '--force', cwd=tmp_path)
    assert sorted(o.name for o in (tmp_path/'a').iterdir()) == ['model', 'per_class.png', 'result.json']
    assert len(load_results(tmp_path/'a')) == 2
    said = run('train', *quick, '--seeds', '4,7', '--no-rl', '--force', cwd=tmp_path)
    assert 'seeds 4, 7' in said and '95% interval' not in said
    assert [o['seed'] for o in load_results(tmp_path/'a')] == [4, 7]


def test_results_of_earlier_versions_are_read_by_their_present_names(tmp_path):
    from ltrl_fastai.cli.train import _measured
    for key in ('worlds', 'test_distributions'):
        (tmp_path/'result.json').write_text(json.dumps({'accuracy': {}, key: []}))
        assert _measured(tmp_path/'result.json') == {'accuracy', 'test_distributions'}


def test_which_seeds():
    from ltrl_fastai.cli.train import _seeds
    assert _seeds('photos-lt', None, None, None, False) == [0, 1, 2, 3, 4]
    of_one_seed = [
        ('digits-lt', None, None, False), ('photos-lt', 0, None, False), ('photos-lt', None, True, False),
        ('photos-lt', None, False, False), ('photos-lt', None, None, True)]
    for dataset, seed, rl, shifted in of_one_seed: assert _seeds(dataset, seed, None, rl, shifted) == [0]
    assert _seeds('digits-lt', 5, None, None, False) == [5]
    assert _seeds('digits-lt', None, '2-4', None, False) == [2, 3, 4]
    for wrong in ((3, '5', False), (None, 'x', False), (None, '5', True)):
        with pytest.raises(ValueError, match='Leave|expected'): _seeds('photos-lt', *wrong[:2], None, wrong[2])


mistakes = [
    (('--seed', '1', '--seeds', '2'), 'Leave out one of the two'), (('--seeds', 'x'), "'5' is 0 to 4"),
    (('--test-distributions', '--seeds', '2'), 'measures a single run'), (('--size', '8'), 'made of features'),
    (('--policy', 'randaugment'), 'digits-lt'), (('--data', '.'), 'part of this package'),
    (('--method', 'paco'), '--dataset digits-lt'), (('--method', 'sade-aggregated'), 'two augmented views')]


@pytest.mark.parametrize('args,text', mistakes)
def test_mistakes_are_reported_before_training(args, text, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from ltrl_fastai.cli.main import app
    monkeypatch.chdir(tmp_path)
    r = CliRunner().invoke(app, ['train', *args])
    assert r.exit_code == 2 and text in r.output, r.output
    assert not list(tmp_path.rglob('*.json'))
