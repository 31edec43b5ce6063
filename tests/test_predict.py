"`ltrl predict` and its functions: `learn.get_preds` is the reference, and files, batches and formats change nothing."
import csv
import io
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import ImageDataLoaders, Learner, PILImage, Resize, noop
from PIL import Image
from typer.testing import CliRunner

from command_line import ltrl_here
from ltrl_fastai.data.benchmarks import digits_lt
from ltrl_fastai.data.fast import FeatureTensors, tensor_dataloaders
from ltrl_fastai.data.images import open_image
from ltrl_fastai.deploy import predict as module
from ltrl_fastai.deploy.model_files import load_classifier, save_classifier
from ltrl_fastai.deploy.predict import Prediction, image_files, predict_files, prediction_columns, prediction_row
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.settings import RunSettings
from ltrl_fastai.methods.nets import create_net


@pytest.fixture(scope='module')
def learn(digits_model): return load_classifier(digits_model[1], device='cpu')


@pytest.fixture(scope='module')
def files(digits_model):
    "Test images in an order that is not sorted"
    found = sorted(map(str, (digits_model[0]/'test').rglob('*.png')))
    return random.Random(0).sample(found, 30)


@pytest.fixture
def some(files, tmp_path):
    "Copies of three images"
    for i, file in enumerate(files[:3]): shutil.copy(file, tmp_path/f'{i}.png')
    return [str(tmp_path/f'{i}.png') for i in range(3)]


def logits_of(learn, files):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0), act=noop)[0]


def table(predictions): return torch.stack([o.probabilities for o in predictions])


def predicted(learn, files, **kwargs): return table(predict_files(learn, files, **{'workers': 0, **kwargs}))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def ltrl(*args, code=0, stdin=None):
    "What `ltrl predict` prints: standard output and standard error"
    r = CliRunner().invoke(app, ['predict', *map(str, args), '--device', 'cpu'], input=stdin)
    assert r.exit_code == code, (r.stdout, r.stderr, r.exception)
    return r.stdout, r.stderr


def rows_of(text): return list(csv.DictReader(io.StringIO(text, newline='')))


# Probabilities

def test_predictions_are_those_of_get_preds(learn, files):
    logits = logits_of(learn, files)
    found = list(predict_files(learn, files))
    assert [o.file for o in found] == files and not any(o.problem for o in found)
    close(table(found), learn.calibration.probabilities(logits))
    assert table(found).argmax(1).equal(logits.argmax(1))
    close(table(found).sum(1), torch.ones(len(files)))


@pytest.mark.parametrize('options', [dict(bs=1), dict(bs=7), dict(bs=1000), dict(bs=7, workers=2)], ids=str)
def test_batches_and_workers_change_nothing(learn, files, options):
    found = list(predict_files(learn, files, **{'workers': 0, **options}))
    assert [o.file for o in found] == files
    close(table(found), predicted(learn, files))


@pytest.mark.parametrize('bs', [1, 4, 64])
def test_broken_files_change_nothing_for_others(learn, files, tmp_path, bs):
    contents = dict(text=b'no image', empty=b'', cut=Path(files[0]).read_bytes()[:60])
    broken = [str(tmp_path/f'{name}.png') for name in contents]
    for file, content in zip(broken, contents.values()): Path(file).write_bytes(content)
    broken += [str(tmp_path/'nowhere.png'), str(tmp_path)]
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path/'float.tif')
    broken.append(str(tmp_path/'float.tif'))
    mixed = [*files[:10], *broken[:3], *files[10:], *broken[3:]]
    found = list(predict_files(learn, mixed, bs=bs))
    assert [o.file for o in found] == mixed
    assert [o.file for o in found if o.problem] == broken
    assert all(o.probabilities is None for o in found if o.problem)
    close(table([o for o in found if not o.problem]), predicted(learn, files))


def test_files_are_read_as_they_are_needed(learn, files):
    "An endless list has a beginning"
    found = list(itertools.islice(predict_files(learn, itertools.cycle(files[:3]), bs=2), 7))
    assert [o.file for o in found] == [files[i % 3] for i in range(7)]
    close(table(found[:3]), table(found[3:6]))


def test_priors_follow_from_the_rule_of_bayes(learn, files):
    calibration = learn.calibration
    def shares(counts): return (np.array(counts)+.5)/(np.array(counts)+.5).sum()
    def times(probabilities, factors):
        product = probabilities*factors
        return product/product.sum(1, keepdims=True)
    as_trained = predicted(learn, files).double().numpy()
    train, valid = shares(calibration.class_counts), shares(calibration.valid_counts)
    balanced = times(as_trained, train**calibration.tau/valid)
    own = np.array([5, 0, 1, 2, 1, 8, 3.])
    expected = dict(balanced=balanced, train=times(balanced, train), own=times(balanced, own))
    for prior, p in expected.items():
        found = predicted(learn, files, prior=own if prior == 'own' else prior)
        np.testing.assert_allclose(found.numpy(), p, rtol=1e-3, atol=1e-5)
    assert (predicted(learn, files, prior=own)[:, 1] == 0).all()


def test_mirrored_images_are_predicted_too(learn, files, tmp_path):
    mirrored = [str(tmp_path/f'{i}.png') for i in range(len(files))]
    for file, to in zip(files, mirrored): Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(to)
    plain, mirror = predicted(learn, files, tta=True), predicted(learn, mirrored, tta=True)
    close(plain, mirror)
    logits = (logits_of(learn, files)+logits_of(learn, mirrored))/2
    close(plain, learn.calibration.probabilities(logits))
    assert not torch.allclose(plain, predicted(learn, files), atol=1e-3)


def test_images_are_not_mirrored_if_training_did_not(digits_model):
    learn = load_classifier(digits_model[1], device='cpu')
    learn.facts['settings'] = dict(flip=False)
    with pytest.raises(ValueError, match='without mirrored'): predict_files(learn, ['a.png'], tta=True)


def test_an_image_without_finite_logits_has_no_prediction(digits_model, files):
    learn = load_classifier(digits_model[1], device='cpu')
    bad = logits_of(learn, files[:3])
    bad[1, 2] = float('nan')
    one = bad[:1]
    outputs = iter([one, bad])  # the first is that of the trial
    learn.model.register_forward_hook(lambda *_: next(outputs))
    found = list(predict_files(learn, files[:3]))
    assert [bool(o.problem) for o in found] == [False, True, False]


# Images of all kinds

def test_other_sizes_are_resized_as_images_of_that_size(learn, files, tmp_path):
    large, resized = [], []
    for i, (file, size) in enumerate(zip(files, [(300, 200), (25, 24), (7, 90), (24, 24)])):
        large.append(tmp_path/f'large{i}.png')
        resized.append(tmp_path/f'resized{i}.png')
        Image.open(file).resize(size).save(large[-1])
        Resize(learn.dls.image_size, method='squish')(PILImage.create(large[-1])).save(resized[-1])
    close(predicted(learn, large), predicted(learn, resized))
    close(predicted(learn, large[3:]), predicted(learn, files[3:4]))


def test_sixteen_bits_cmyk_and_grey(learn, files, tmp_path):
    for i, file in enumerate(files[:4]):
        rgb = Image.open(file).convert('RGB')
        grey = rgb.convert('L')
        grey.save(tmp_path/f'grey{i}.png')
        Image.fromarray(np.asarray(grey).astype(np.uint16)*257).save(tmp_path/f'sixteen{i}.png')
        rgb.convert('CMYK').save(tmp_path/f'cmyk{i}.tif')
        open_image(tmp_path/f'cmyk{i}.tif').save(tmp_path/f'converted{i}.png')
    def of(kind, ending='png'): return predicted(learn, [tmp_path/f'{kind}{i}.{ending}' for i in range(4)])
    close(of('sixteen'), of('grey'))
    close(of('cmyk', 'tif'), of('converted'))


def test_photographs_of_any_size(digits_model, files, tmp_path):
    learn = RunSettings(str(digits_model[0]), net='resnet8', size=32, epochs=1, pretrained=False).learner()
    photos = []
    for i, size in enumerate([(90, 30), (64, 64), (40, 200), (500, 3)]):
        photos.append(str(tmp_path/f'{i}.jpg'))
        Image.open(files[i]).convert('RGB').resize(size).save(photos[-1])
    assert not learn.dls.small
    close(predicted(learn, photos, bs=3), logits_of(learn, photos).softmax(1))


def test_images_of_odd_sizes_and_kinds(digits_model, tmp_path, monkeypatch):
    "One pixel, more pixels than Pillow warns of, several frames (the first counts), grey with transparency"
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2500)  # an error above twice as many
    Image.new('RGB', (1, 1), 'white').save(tmp_path/'one.png')
    Image.new('RGB', (60, 50), 'white').save(tmp_path/'large.png')
    Image.new('LA', (40, 30), (255, 255)).save(tmp_path/'alpha.png')
    frames = [Image.new('RGB', (24, 24), colour) for colour in ('white', 'black')]
    frames[0].save(tmp_path/'frames.gif', save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path/'black.png')
    names = [tmp_path/o for o in ('one.png', 'alpha.png', 'frames.gif', 'large.png', 'black.png')]
    out, said = ltrl(digits_model[1], *names, '--all-classes')
    assert 'Warning' not in said
    white, *others, black = [[float(v) for k, v in row.items() if k.startswith('p(')] for row in rows_of(out)]
    for row in others: assert row == pytest.approx(white, abs=1e-4)
    assert black != pytest.approx(white, abs=1e-4)


def test_a_model_of_images_in_memory(tmp_path):
    learn = Learner(digits_lt(device='cpu'), create_net('resnet8', 10, n_in=1))
    dataset = learn.dls.valid.dataset
    files = [tmp_path/f'{i}.png' for i in range(12)]
    for file, pixels in zip(files, dataset.images): Image.fromarray(pixels[0].numpy()).save(file)
    with learn.no_bar(): expected = learn.get_preds()[0][:12]
    close(predicted(learn, files, bs=5), expected)
    with pytest.raises(ValueError, match='without mirrored'): predict_files(learn, files, tta=True)


def test_a_learner_of_fastai_alone(digits_model, files):
    "Without a calibration, probabilities are those of `get_preds`; its items are of the type Path"
    dls = ImageDataLoaders.from_folder(digits_model[0], train='train', valid='test', bs=8, device='cpu', num_workers=0)
    learn = Learner(dls, create_net('resnet8', dls.c))
    with learn.no_bar(): expected = learn.get_preds(dl=dls.test_dl([Path(o) for o in files]))[0]
    close(predicted(learn, files), expected)
    with pytest.raises(ValueError, match='not calibrated'): predict_files(learn, files, prior='balanced')


def test_models_of_other_things_are_refused():
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    dls = tensor_dataloaders(FeatureTensors(x, y), FeatureTensors(x, y), bs=4, device='cpu')
    learn = Learner(dls, torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match='feature vectors'): predict_files(learn, ['a.png'])


def test_networks_that_do_not_classify_are_refused(digits_model):
    learn = load_classifier(digits_model[1], device='cpu')
    learn.model = torch.nn.Sequential(learn.model, torch.nn.Linear(7, 3))
    with pytest.raises(ValueError, match='expected a classifier'): predict_files(learn, ['a.png'])


# Rows

def test_the_k_most_likely_classes(learn, files):
    classes = learn.facts['classes']
    for o in predict_files(learn, files):
        p = dict(zip(classes, o.probabilities.tolist()))
        row = prediction_row(o, classes, top_k=3, all_classes=True)
        assert list(row) == prediction_columns(classes, top_k=3, all_classes=True)
        ranked = [(row['class'], row['probability']), (row['class_2'], row['probability_2']),
                  (row['class_3'], row['probability_3'])]
        assert [name for name, _ in ranked] == sorted(p, key=p.get, reverse=True)[:3]
        assert [value for _, value in ranked] == pytest.approx([p[name] for name, _ in ranked], rel=1e-5)
        assert {name: row[f'p({name})'] for name in classes} == pytest.approx(p, rel=1e-5)


@pytest.mark.parametrize('threshold', [0., .3, .6, .99, 1.])
def test_a_class_is_named_if_it_is_likely_enough(learn, files, threshold):
    classes = learn.facts['classes']
    for o in predict_files(learn, files):
        plain, row = prediction_row(o, classes), prediction_row(o, classes, reject_below=threshold)
        assert row['class'] == (plain['class'] if o.probabilities.max() >= threshold else '')
        assert row['probability'] == plain['probability']


def test_equally_likely_classes_are_in_their_order():
    row = prediction_row(Prediction('a', torch.tensor([.25]*4)), 'abcd', top_k=4)
    assert [row[k] for k in ('class', 'class_2', 'class_3', 'class_4')] == list('abcd')
    with pytest.raises(ValueError, match='expected 1 to 4'): prediction_columns('abcd', 5)


# Which files

@pytest.fixture
def tree(tmp_path):
    for name in ('b/img10.jpg', 'b/img2.JPG', 'b/c/x.png', 'b/.hidden.jpg', '.git/y.png', 'b/notes.txt', 'a.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    return tmp_path


def test_folders_are_searched_in_natural_order(tree):
    everything = [str(tree/o) for o in ('a.png', 'b/c/x.png', 'b/img2.JPG', 'b/img10.jpg')]
    assert image_files(tree) == image_files([tree, str(tree), tree/'b', tree/'b'/'..'/'a.png']) == everything
    os.symlink(tree, tree/'b'/'loop')
    assert image_files(tree) == everything


def test_the_order_of_arguments_is_kept(tree):
    names = ['b/notes.txt', 'b/img10.jpg', 'a.png', 'b/img2.JPG']
    given = [str(tree/o) for o in names]
    assert image_files(given) == image_files(given+given[::-1]) == given
    assert image_files([given[1], tree])[:2] == [given[1], given[2]]
    assert image_files('-', listed=[f'{o}\n' for o in given]) == given


def test_patterns(tree):
    assert image_files(f'{tree}/b/img*') == [str(tree/'b'/o) for o in ('img2.JPG', 'img10.jpg')]
    assert image_files(f'{tree}/**/*.png') == [str(tree/o) for o in ('a.png', 'b/c/x.png')]
    (tree/'img[1].png').touch()
    assert image_files(tree/'img[1].png') == [str(tree/'img[1].png')]


def test_paths_that_lead_to_no_image(tree):
    (tree/'none').mkdir()
    for path, reason in {'none': 'there is no image', 'nowhere': 'not there', '*.gif': 'no file matches'}.items():
        with pytest.raises(FileNotFoundError, match=reason): image_files([tree/'a.png', tree/path])
    with pytest.raises(FileNotFoundError, match='there is none'): image_files('-', listed=['\n'])


# The command

def test_standard_output_is_csv_and_nothing_else(digits_model, learn, files):
    out, said = ltrl(digits_model[1], *files)
    found = rows_of(out)
    assert [o['file'] for o in found] == files
    expected = [prediction_row(o, learn.facts['classes']) for o in predict_files(learn, files)]
    assert [o['class'] for o in found] == [o['class'] for o in expected]
    assert [float(o['probability']) for o in found] == pytest.approx([o['probability'] for o in expected], rel=1e-3)
    assert 'Digits: 7 classes, 30 files' in said


def test_a_moved_model_gives_the_same(digits_model, files, tmp_path):
    shutil.copytree(digits_model[1], tmp_path/'a'/'model')
    expected = ltrl(digits_model[1], *files)
    (tmp_path/'a').rename(tmp_path/'moved')
    for place in ('moved', 'moved/model', 'moved/model/model.safetensors'):
        assert ltrl(tmp_path/place, *files) == expected


def test_odd_names_in_csv_and_json(digits_model, some, tmp_path):
    names = ['comma, "quote".png', 'new\nline.png', "apostrophe's.png", 'ünï 漢字 🙂.png', ' spaces .png']
    names.append(os.fsdecode(b'latin-\xe9.png'))
    (tmp_path/'odd').mkdir()
    for name in names: shutil.copy(some[0], tmp_path/'odd'/name)
    expected = {str(tmp_path/'odd'/name) for name in names}
    ltrl(digits_model[1], tmp_path/'odd', '--out', tmp_path/'a.csv', '--all-classes', '--top-k', 2)
    ltrl(digits_model[1], tmp_path/'odd', '--out', tmp_path/'a.json', '--all-classes', '--top-k', 2)
    with open(tmp_path/'a.csv', encoding='utf-8', errors='surrogateescape', newline='') as f:
        rows = list(csv.DictReader(f))
    content = json.loads((tmp_path/'a.json').read_text())
    assert {o['file'] for o in rows} == expected and len(rows) == len(names)
    assert rows == [{k: str(v) for k, v in o.items()} for o in content['predictions']]
    assert content['complete'] and content['unreadable'] == []
    assert sum(v for k, v in content['predictions'][0].items() if k.startswith('p(')) == pytest.approx(1, abs=1e-4)


def test_a_list_on_standard_input(digits_model, some, tmp_path):
    listed = '\n'.join([some[2], '', some[0], str(tmp_path/'gone.png'), some[1]])
    for text in (listed, listed.replace('\n', '\r\n'), '\ufeff'+listed):
        out, said = ltrl(digits_model[1], '-', stdin=text.encode(), code=1)
        assert [o['file'] for o in rows_of(out)] == [some[2], some[0], some[1]]
        assert 'gone.png: it is not there' in said


def test_unreadable_files_are_listed(digits_model, some, tmp_path):
    (tmp_path/'broken.png').write_text('no image')
    out, said = ltrl(digits_model[1], tmp_path, code=1)
    assert [o['file'] for o in rows_of(out)] == some
    assert '1 of 4 files could not be read' in said and 'broken.png: it is no image' in said
    ltrl(digits_model[1], tmp_path, '--out', tmp_path/'a.json', code=1)
    content = json.loads((tmp_path/'a.json').read_text())
    assert [o['file'] for o in content['unreadable']] == [str(tmp_path/'broken.png')]
    assert [o['file'] for o in content['predictions']] == some
    (tmp_path/'only').mkdir()
    (tmp_path/'broken.png').rename(tmp_path/'only'/'broken.png')
    out, _ = ltrl(digits_model[1], tmp_path/'only', code=1)
    assert out == 'file,class,probability\n'


def test_priors_of_the_command(digits_model, learn, some, tmp_path):
    classes = learn.facts['classes']
    frequencies = {name: i for i, name in enumerate(classes)}
    lines = [f'{name},{frequency}\n' for name, frequency in reversed(frequencies.items())]
    (tmp_path/'prior.csv').write_text('class,frequency\n'+''.join(lines))
    priors = {'train': 'train', 'balanced': 'balanced', str(tmp_path/'prior.csv'): list(range(7))}
    for option, prior in priors.items():
        out, _ = ltrl(digits_model[1], *some, '--prior', option, '--all-classes')
        found = [[float(o[f'p({name})']) for name in classes] for o in rows_of(out)]
        close(torch.tensor(found), predicted(learn, some, prior=prior))


def test_options_of_the_command(digits_model, learn, some, tmp_path):
    plain, _ = ltrl(digits_model[1], *some)
    one_by_one, _ = ltrl(digits_model[1], *some, '--bs', 1, '--workers', 1)
    assert [o['class'] for o in rows_of(one_by_one)] == [o['class'] for o in rows_of(plain)]
    for one, other in zip(rows_of(one_by_one), rows_of(plain), strict=True):  # the last digit may be rounded otherwise
        assert float(one['probability']) == pytest.approx(float(other['probability']), abs=2e-6)
    rejected, _ = ltrl(digits_model[1], *some, '--reject-below', 1)
    assert [o['class'] for o in rows_of(rejected)] == ['']*3
    assert [o['probability'] for o in rows_of(rejected)] == [o['probability'] for o in rows_of(plain)]
    out, _ = ltrl(digits_model[1], *some, '--tta', '--format', 'json', '--all-classes')
    found = [[o[f'p({name})'] for name in learn.facts['classes']] for o in json.loads(out)['predictions']]
    close(torch.tensor(found), predicted(learn, some, tta=True))
    ltrl(digits_model[1], *some, '--out', tmp_path/'a.txt', '--format', 'CSV')
    assert (tmp_path/'a.txt').read_text() == plain


@pytest.mark.parametrize('args, reason', [
    (['nowhere.png'], 'it is not there'), (['*.gif'], 'no file matches'),
    (['0.png', '--top-k', '8'], '--top-k: expected 1 to 7'), (['0.png', '--top-k', '0'], '--top-k'),
    (['0.png', '--reject-below', '1.5'], '--reject-below'),
    (['0.png', '--bs', '0'], '--bs'), (['0.png', '--workers', '-1'], '--workers'),
    (['0.png', '--out', 'a.txt'], '.csv or .json'), (['0.png', '--format', 'xml'], '--format'),
    (['0.png', '--out', '.', '--format', 'csv'], 'is a folder'),
    (['0.png', '--out', '0.png/a.csv'], "can't be made"),
    (['0.png', '--prior', 'blanced'], "expected 'train', 'balanced' or a CSV file"),
], ids=str)
def test_wrong_use(digits_model, some, tmp_path, monkeypatch, args, reason):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    out, said = ltrl(digits_model[1], *args, code=2)
    assert reason in said and out == '' and sorted(tmp_path.iterdir()) == before


def test_wrong_devices(digits_model, some):
    for device in ('gpu', 'cuda:99'):
        r = CliRunner().invoke(app, ['predict', str(digits_model[1]), some[0], '--device', device])
        assert r.exit_code == 2 and '--device' in r.stderr


def test_wrong_models(digits_model, some, tmp_path):
    assert 'model.json' in ltrl(tmp_path, *some, code=2)[1]
    assert 'model.json' in ltrl(some[0], *some, code=2)[1]
    assert 'not there' in ltrl(tmp_path/'nowhere', *some, code=2)[1]
    pickle = digits_model[1]/'model.pkl'
    assert '--trust' in ltrl(pickle, *some, code=2)[1]
    torch.save({'weight': torch.ones(3)}, tmp_path/'weights.pkl')
    (tmp_path/'text.pkl').write_text('no pickle')
    for name, reason in {'weights.pkl': 'it holds no Learner', 'text.pkl': "can't be loaded"}.items():
        said = ltrl(tmp_path/name, *some, '--trust', code=2)[1]
        assert reason in said and 'Expected model.pkl of `ltrl train`' in said
    assert ltrl(pickle, *some, '--trust') == ltrl(digits_model[1], *some)


def test_a_model_of_features(some, tmp_path):
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    dls = tensor_dataloaders(FeatureTensors(x, y), FeatureTensors(x, y), bs=4, device='cpu')
    save_classifier(Learner(dls, torch.nn.Linear(4, 2), path=tmp_path), tmp_path/'model')
    said = ltrl(tmp_path/'model', *some, '--trust', code=2)[1]
    assert 'MODEL: expected a model of images' in said


def test_a_model_without_calibration(digits_model, some, tmp_path):
    shutil.copytree(digits_model[1], tmp_path/'model')
    file = tmp_path/'model'/'model.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'calibration': None}))
    out, said = ltrl(tmp_path/'model', *some, '--all-classes')
    learn = load_classifier(tmp_path/'model', device='cpu')
    found = [[float(o[f'p({name})']) for name in learn.facts['classes']] for o in rows_of(out)]
    close(torch.tensor(found), logits_of(learn, some).softmax(1))
    assert 'not calibrated' in said
    assert '--prior: this model was not calibrated' in ltrl(tmp_path/'model', *some, '--prior', 'train', code=2)[1]


def failing_after(n, error):
    "Stands in for `prediction_row`: it raises an error for the row after the first `n`"
    count = itertools.count()
    def f(*args, **kwargs):
        if next(count) == n: raise error
        return prediction_row(*args, **kwargs)
    return f


@pytest.mark.parametrize('error, code', [
    (KeyboardInterrupt(), 130), (torch.OutOfMemoryError('CUDA out of memory'), 2),
    (OSError('No space left on device'), 2), (RuntimeError('DataLoader worker (pid 1) is killed'), 2),
], ids=lambda o: type(o).__name__)
def test_rows_so_far_are_kept(digits_model, some, tmp_path, monkeypatch, error, code):
    plain, _ = ltrl(digits_model[1], *some)
    (tmp_path/'a.csv').write_text('an earlier result')
    for ending in ('csv', 'json'):
        monkeypatch.setattr(module, 'prediction_row', failing_after(2, error))
        _, said = ltrl(digits_model[1], *some, '--out', tmp_path/f'a.{ending}', code=code)
        assert f'a.partial.{ending}' in said
    assert rows_of((tmp_path/'a.partial.csv').read_text()) == rows_of(plain)[:2]
    content = json.loads((tmp_path/'a.partial.json').read_text())
    assert [o['file'] for o in content['predictions']] == some[:2] and content['complete'] is False
    assert (tmp_path/'a.csv').read_text() == 'an earlier result' and not (tmp_path/'a.json').exists()
    if isinstance(error, torch.OutOfMemoryError): assert 'fewer: --bs' in said
    monkeypatch.undo()
    ltrl(digits_model[1], *some, '--out', tmp_path/'a.csv')
    assert (tmp_path/'a.csv').read_text() == plain and not (tmp_path/'a.partial.csv').exists()


def test_a_disk_that_is_full_when_the_output_is_closed(digits_model, files, tmp_path, monkeypatch):
    "What is left in the buffer can't be written either: one error, no traceback"
    if not os.path.exists('/dev/full'): pytest.skip('needs /dev/full')
    monkeypatch.setattr('ltrl_fastai.cli.predict._partial', lambda out: Path('/dev/full'))
    r = ltrl_here('predict', digits_model[1], files[0], '--out', 'a.csv', cwd=tmp_path)
    assert r.returncode == 2 and 'No space left on device' in r.stderr and 'Traceback' not in r.stderr, r.stderr
