"From training to a model in use, where something goes wrong: kills, full disks, damaged files, odd names."
import contextlib
import copy
import io
import json
import os
import shutil
import signal
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from command_line import ltrl_here
from fastai.vision.all import Callback, MixedPrecision, noop
from ltrl_fastai.core.files import named_disk_errors
from ltrl_fastai.data.beds import write_digits_folder
from ltrl_fastai.deploy.model_files import load_classifier, save_classifier
from ltrl_fastai.evaluation.mistakes import draw_confusion, draw_losses
from ltrl_fastai.evaluation.pictures import draw_classes
from ltrl_fastai.experiments.settings import RunSettings
from ltrl_fastai.experiments.training import train_run
from quick_workers import forked

resource = pytest.importorskip('resource')  # not on Windows


# Kills

options = '--net resnet8 --no-rl --epochs 1 --bs 16 --workers 0 --device cpu'.split()


def killed_at(event, part, args, cwd, connection):
    "Run `ltrl`, and kill this process when Python is about to do `event` to a path with this part"
    def watch(name, values):
        if name == event and part in str(values[0]): os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    ltrl_here(*args, cwd=cwd)


def files_of(folder): return sorted(str(o.relative_to(folder)) for o in folder.rglob('*'))


def numbers_of(folder):
    "What does not depend on the moment in a result"
    res = json.loads((folder/'result.json').read_text())
    return {k: v for k, v in res.items() if k not in ('seconds', 'command')}


@pytest.fixture(scope='module')
def digits(tmp_path_factory): return write_digits_folder(tmp_path_factory.mktemp('data')/'digits')


@pytest.fixture(scope='module')
def whole(digits, tmp_path_factory):
    "A run that was not interrupted"
    folder = tmp_path_factory.mktemp('whole')
    done = ltrl_here('train', '--dataset', digits, *options, '--out', folder/'run', cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder/'run'


@pytest.mark.parametrize('event, part', [
    ('os.rename', '.model.'),  # of model.json, in the middle of saving the model
    pytest.param('os.rename', '.result.', marks=pytest.mark.slow),
    pytest.param('os.rename', '.per_class.', marks=pytest.mark.slow),
    pytest.param('os.remove', '.fit-0.pt', marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_and_leaves_nothing_else(digits, whole, tmp_path, event, part):
    out = tmp_path/'run'
    args = ['train', '--dataset', digits, *options, '--out', out]
    process, _ = forked(killed_at, event, part, args, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = ltrl_here(*args, '--resume', cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert files_of(out) == files_of(whole)
    assert numbers_of(out) == numbers_of(whole)
    assert (out/'model/model.safetensors').read_bytes() == (whole/'model/model.safetensors').read_bytes()


def test_force_and_resume_replace_the_result_of_other_settings(digits, whole, tmp_path):
    "After a kill in the first epoch of a run with --force, there is nothing to resume but the old result"
    out = tmp_path/'run'
    out.mkdir()
    (out/'result.json').write_text('{"identity": "another"}')
    args = ['train', '--dataset', digits, *options, '--out', out, '--resume']
    refused = ltrl_here(*args, cwd=tmp_path)
    assert refused.returncode == 2 and '--force' in refused.stderr
    done = ltrl_here(*args, '--force', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert numbers_of(out) == numbers_of(whole)


# Folders that are there already

def test_folders_of_other_things_are_never_replaced(digits_model, tmp_path):
    images, model = digits_model
    learn = load_classifier(model, device='cpu')
    mine = tmp_path/'run/model/notes.txt'
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    with pytest.raises(FileExistsError, match='no model'): save_classifier(learn, mine.parent)
    with pytest.raises(FileExistsError, match='no model'): save_classifier(learn, mine)
    args = ['train', '--dataset', images, *options, '--out', tmp_path/'run']
    for more in ([], ['--force']):
        done = ltrl_here(*args, *more, cwd=tmp_path)
        assert done.returncode == 2 and 'is no model' in done.stderr
    assert files_of(tmp_path) == ['run', 'run/model', 'run/model/notes.txt'] and mine.read_text() == 'mine'
    mine.unlink()
    save_classifier(learn, mine.parent)  # an empty folder is filled
    save_classifier(learn, mine.parent)  # and a model is replaced
    assert load_classifier(mine.parent, trust=True, device='cpu').facts['classes'] == learn.facts['classes']


# Full disks

@contextlib.contextmanager
def no_file_above(size):
    "Refuse to write more than `size` bytes to a file, as a full disk does"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('file', ['model.safetensors', 'model.pkl'])
def test_a_full_disk_keeps_the_model_that_was_there(digits_model, tmp_path, file):
    learn = load_classifier(digits_model[1], device='cpu')
    model = save_classifier(learn, tmp_path/'model')
    before = {o.name: o.read_bytes() for o in model.iterdir()}
    sizes = {name: len(content) for name, content in before.items()}
    assert sizes['model.safetensors'] < sizes['model.pkl']
    with no_file_above(sizes[file]-10_000), pytest.raises(OSError): save_classifier(learn, model)
    assert {o.name: o.read_bytes() for o in model.iterdir()} == before
    assert list(tmp_path.iterdir()) == [model]


def test_a_training_on_a_full_disk_can_be_repeated(digits, whole, tmp_path):
    args = ['train', '--dataset', digits, *options, '--out', tmp_path/'run']
    with no_file_above(100_000): full = ltrl_here(*args, cwd=tmp_path)  # less than a checkpoint
    assert full.returncode == 2 and "can't be written" in full.stderr and 'Traceback' not in full.stderr
    assert 'the same command starts over: no epoch was done' in full.stderr
    done = ltrl_here(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert numbers_of(tmp_path/'run') == numbers_of(whole)


def test_other_errors_are_not_named_disk_errors():
    for error in (ValueError('x'), RuntimeError('shapes differ'), KeyError(1)):
        with pytest.raises(type(error)) as raised, named_disk_errors('file'): raise error
        assert raised.value is error


# Damaged files

def changed(value):
    "Copies of nested dicts in which one entry is missing, or is something else"
    for key in value:
        for other in ('x', -1, None, [], {}):
            yield {**value, key: other}
        yield {k: v for k, v in value.items() if k != key}
        if isinstance(value[key], dict): yield from ({**value, key: o} for o in changed(value[key]))


def test_a_damaged_description_is_named(digits_model, tmp_path):
    "Whatever is wrong with model.json, there is a model or a `ValueError`, and no other error"
    model = shutil.copytree(digits_model[1], tmp_path/'model')
    file = model/'model.json'
    facts = json.loads(file.read_text())
    n_refused = 0
    for entries in changed(facts):
        file.write_text(json.dumps(entries))
        try: load_classifier(model, device='cpu')
        except ValueError: n_refused += 1
    assert n_refused > 50
    for name in ('classes', 'class_counts', 'input', 'build', 'calibration'):
        file.write_text(json.dumps({k: v for k, v in facts.items() if k != name}))
        with pytest.raises(ValueError, match=f'model.json: {name} is missing'): load_classifier(model, device='cpu')
    for name in ('class_counts', 'classes'):
        file.write_text(json.dumps({**facts, name: facts[name][:-1]}))
        with pytest.raises(ValueError, match='model.json: .* has 7|model.json: .* has 6'):
            load_classifier(model, device='cpu')
    twice = copy.deepcopy(facts)
    twice['classes'][0] = twice['classes'][1]
    file.write_text(json.dumps(twice))
    with pytest.raises(ValueError, match='model.json: a class is there twice'): load_classifier(model, device='cpu')
    file.write_text(json.dumps(facts))
    (model/'model.safetensors').unlink()
    (model/'model.safetensors').mkdir()
    with pytest.raises(FileNotFoundError, match='expected weights'): load_classifier(model, device='cpu')


# Trainings that diverge

class Spoil(Callback):
    "Make the net useless after its last epoch"
    def after_fit(self):
        for p in self.learn.model.parameters(): p.data.fill_(float('nan'))


def test_a_net_that_has_diverged_is_not_saved(digits, tmp_path):
    settings = RunSettings(str(digits), net='resnet8', epochs=1, bs=16, lr=.05)
    with pytest.raises(FloatingPointError, match=r'diverged.*lr=0\.05'):
        train_run(settings, bar=False, cbs=Spoil(), model=tmp_path/'model')
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_without_internet_access(digits, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    done = ltrl_here('train', '--dataset', digits, *options, '--log', 'wandb', '--out', tmp_path/'run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wandb.finish()  # as the end of a process does
    assert list((tmp_path/'run/logs').rglob('*.wandb'))


def test_a_net_with_weights_of_its_own_is_kept_without_a_warning(digits, tmp_path):
    "SADE's net has an attribute `weights`, which a callback would hide"
    args = ['train', '--dataset', digits, *options, '--method', 'sade', '--out', tmp_path/'run']
    done = ltrl_here(*args, cwd=tmp_path)
    assert done.returncode == 0 and 'shadowing' not in done.stderr, done.stderr


# Odd names

def test_pictures_show_names_as_they_are(digits):
    "Matplotlib would take what is between two dollar signs for mathematics, and stop at mistakes in it"
    names = [r'$\frac$', r'a$\b$', '$', '_under', 'two\nlines', '{x}', '<b>']
    counts = torch.arange(len(names), 0, -1)
    confusion = torch.eye(len(names)).long()
    axes = [draw_classes(counts, names), draw_confusion(confusion, vocab=names, counts=counts)]
    for ax in axes:
        ax.figure.savefig(io.BytesIO())
        shown = [o.get_text() for o in ax.get_xticklabels()]
        assert shown == names
    many = [f'{o}{i}' for i in range(4) for o in names]
    draw_confusion(torch.eye(len(many)).long(), vocab=many).figure.savefig(io.BytesIO())
    file = next(digits.rglob('*.png'))
    draw_losses([file], [names[0]], [names[1]], [.5], [1.]).savefig(io.BytesIO())


# Weights of a pretrained net

def photographs(folder):
    "Three classes of photographs that are too large to be trained from scratch by default"
    rng = np.random.default_rng(0)
    for name, n in dict(ant=8, bee=6, cat=5).items():
        (folder/name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 255, (80, 100, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder/name/f'{i}.png')
    return folder


def test_weights_that_can_not_be_downloaded(tmp_path, monkeypatch):
    for name in ('http_proxy', 'https_proxy'): monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    photographs(tmp_path/'photos')
    r = ltrl_here('train', '--dataset', 'photos', '--out', 'a', cwd=tmp_path)
    assert r.returncode == 2 and 'Traceback' not in r.stderr
    assert 'could not be downloaded' in r.stderr and str(tmp_path/'torch') in r.stderr
    assert all(o in r.stderr for o in ('--weights FILE', '--from-scratch', 'efficientnet-lite0'))


def test_weights_from_a_file(tmp_path):
    photographs(tmp_path/'photos')
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'resnet18.pth')
    options = '--net resnet18 --size 32 --bs 8 --epochs 2 --no-rl --workers 0 --out a'.split()
    r = ltrl_here('train', '--dataset', 'photos', '--weights', 'resnet18.pth', *options, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert 'pretrained resnet18' in r.stdout
    model = load_classifier(tmp_path/'a'/'model', device='cpu')  # needs neither the network nor the file
    assert model.facts['build']['pretrained'] and model.dls.vocab == ['ant', 'bee', 'cat']
    r = ltrl_here('train', '--dataset', 'photos', '--weights', 'resnet18.pth', '--net', 'resnet34', '--out', 'b',
                  cwd=tmp_path)
    assert r.returncode == 2 and 'weights of another net than resnet34' in r.stderr


# Everything that changes a net or its predictions is saved

@pytest.mark.parametrize('settings', [
    dict(dropout=.3), dict(mixup=.4), dict(label_smoothing=.1), dict(posthoc=1.), dict(method='logit-adjustment'),
    dict(method='ride')], ids=str)
def test_a_model_predicts_the_same_after_loading(digits, tmp_path, settings):
    settings = RunSettings(str(digits), net='resnet8', bs=16, epochs=1, **settings)

    class Keep(Callback):
        def after_fit(self): learners.append(self.learn)
    learners = []
    train_run(settings, bar=False, model=tmp_path/'model', cbs=Keep())
    loaded = load_classifier(tmp_path/'model', device='cpu')
    files = [str(file) for file, _ in learners[0].dls.test.dataset.items]
    logits = []
    for learn in (learners[0], loaded):
        with learn.no_bar(): logits.append(learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0), act=noop)[0])
    assert torch.allclose(*logits, atol=1e-4)


def test_the_last_epoch_is_kept_beside_the_best(digits_model, tmp_path):
    images, model = digits_model
    learn = load_classifier(model, device='cpu')
    last = {name: o.clone() for name, o in learn.model.state_dict().items()}
    name = [o for o in last if o.endswith('.bias')][-1]
    last[name] += torch.arange(len(last[name]))
    folder = save_classifier(learn, tmp_path/'model', build=learn.facts['build'], last=last)
    for file, expected in {'model.safetensors': learn.model.state_dict(), 'last.safetensors': last}.items():
        found = load_classifier(folder/file, device='cpu').model.state_dict()
        assert found.keys() == expected.keys() and all(found[o].equal(expected[o]) for o in found)


def test_half_precision_of_training_is_not_saved(digits, tmp_path):
    settings = RunSettings(str(digits), net='resnet8', bs=16, epochs=1)
    learn = settings.learner().to_fp16()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    save_classifier(learn, tmp_path/'model', build=settings.build_facts(learn))
    assert learn._grab_cbs(MixedPrecision)  # the learner keeps it
    loaded = load_classifier(tmp_path/'model'/'model.pkl', trust=True, device='cpu')
    assert not loaded._grab_cbs(MixedPrecision)
