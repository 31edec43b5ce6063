"Evaluation of saved models: laws, references, and the command as a user has it."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import noop
from ltrl_fastai.core.files import place_mark
from ltrl_fastai.data.images import UnreadableImage
from ltrl_fastai.data.labelled import labelled_images, match_classes
from ltrl_fastai.deploy.calibration import Calibration
from ltrl_fastai.deploy.evaluate import _image_weights, evaluate, evaluate_logits
from ltrl_fastai.deploy.model_files import load_classifier, save_classifier
from ltrl_fastai.evaluation.mistakes import (
    calibration_error, draw_confusion, draw_losses, draw_reliability, reliability)
from ltrl_fastai.evaluation.report import ShotReport
from ltrl_fastai.cli.main import app
from PIL import Image
from sklearn import metrics
from typer.testing import CliRunner

counts = [500, 120, 90, 60, 30, 10, 4, 2]
names = [f'class {i}' for i in range(8)]


@pytest.fixture(scope='module')
def draw():
    "Logits and targets of 8 classes, with 5 to 30 images of each"
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(8), [30, 5, 12, 25, 8, 9, 11, 20]))
    logits = rng.normal(size=(len(y), 8))+2*np.eye(8)[y]+np.linspace(1, -1, 8)
    return torch.tensor(logits).float(), torch.tensor(y)


@pytest.fixture(scope='module')
def calibration():
    return Calibration(1.4, .8, tuple(counts), (30, 20, 15, 10, 5, 2, 1, 1))


def numbers(e):
    "All numbers that could be measured, without intervals"
    every = dict(e.groups, plain=e.plain, **{f'top5 {k}': o for k, o in (e.top5 or {}).items()})
    every |= {f'{a} {k}': o for a, means in e.averages.items() for k, o in means.items()}
    every |= {f'{a} {k}': o[k] for a, o in e.probabilities.items() for k in ('ece', 'nll', 'brier')}
    return {k: o.value for k, o in every.items() if o.value is not None}


def quick(*args, **kwargs): return evaluate_logits(*args, vocab=names, class_counts=counts, resamples=0, **kwargs)


def test_metrics_are_those_of_scikit_learn(draw):
    z, y = draw
    e = quick(z, y)
    p = z.double().softmax(1).numpy()
    predicted = p.argmax(1)
    for k, average in (('macro', 'macro'), ('weighted', 'weighted')):
        *theirs, _ = metrics.precision_recall_fscore_support(y, predicted, average=average)
        found = [e.averages[k][o].value for o in ('precision', 'recall', 'f1')]
        assert found == pytest.approx([100*o for o in theirs])
    theirs = metrics.precision_recall_fscore_support(y, predicted)
    percent = [100*o for o in theirs[:3]]
    for k, values in zip(('precision', 'recall', 'f1', 'images'), (*percent, theirs[3])):
        assert e.per_class[k].tolist() == pytest.approx(values.tolist(), abs=1e-5)
    assert e.plain.value == pytest.approx(100*metrics.accuracy_score(y, predicted))
    assert e.groups['all'].value == pytest.approx(100*metrics.balanced_accuracy_score(y, predicted))
    found = e.probabilities['softmax']
    assert found['nll'].value == pytest.approx(metrics.log_loss(y, p))
    one_hot = np.eye(8)[y]
    of_classes = [metrics.brier_score_loss(one_hot[:, i], p[:, i]) for i in range(8)]
    assert found['brier'].value == pytest.approx(sum(of_classes))
    assert (e.confusion == metrics.confusion_matrix(y, predicted)).all()


def naive_ece(confidence, hits, w, n_bins):
    total = 0
    for i in range(n_bins):
        inside = [j for j, c in enumerate(confidence) if i/n_bins < c <= (i+1)/n_bins]
        share = sum(w[j] for j in inside)/sum(w)
        if share: total += share*abs(sum(w[j]*(hits[j]-confidence[j]) for j in inside)/sum(w[j] for j in inside))
    return total


@pytest.mark.parametrize('n_bins', [1, 7, 15])
def test_calibration_error_is_that_of_a_loop(n_bins):
    rng = np.random.default_rng(n_bins)
    confidence, w = rng.random(60), rng.random(60)
    hits = rng.random(60) < confidence**2
    assert calibration_error(confidence, hits, w, n_bins) == pytest.approx(naive_ece(confidence, hits, w, n_bins))
    table = reliability(confidence, hits, w, n_bins)
    assert table.share.sum() == pytest.approx(1) and table.images.sum() == 60
    assert (table.share*table.accuracy).sum() == pytest.approx(np.average(hits, weights=w))


def test_a_perfect_predictor(draw):
    _, y = draw
    e = evaluate_logits(1e4*torch.eye(8)[y], y, names, counts, resamples=20)
    found = numbers(e)
    errors = {k: v for k, v in found.items() if k.split()[-1] in ('ece', 'nll', 'brier')}
    assert set(errors.values()) == {0} and {v for k, v in found.items() if k not in errors} == {100}
    assert e.plain.lower < 100 and e.groups['all'].lower < 100  # Wilson's interval has a width
    assert e.averages['macro']['f1'].lower == 100 and e.probabilities['softmax']['ece'].lower == 0
    assert not len(e.confused) and 'Most confused' not in e.summary()


def test_a_constant_predictor(draw):
    _, y = draw
    z = torch.zeros(len(y), 8)
    z[:, 3] = 1.
    e = quick(z, y)
    assert e.groups['all'].value == pytest.approx(100/8)
    share = (y == 3).double().mean().item()
    assert e.plain.value == pytest.approx(100*share)
    confidence = z[0].softmax(0)[3].item()
    assert e.probabilities['softmax']['ece'].value == pytest.approx(100*abs(share-confidence), abs=1e-4)
    assert e.per_class.precision.isna().tolist() == [i != 3 for i in range(8)]  # the others are never predicted
    assert e.averages['macro']['precision'].value == pytest.approx(100*share/8)
    assert set(e.confused.predicted) == {'class 3'} and e.confused.images.sum() == (y != 3).sum()


@pytest.mark.parametrize('prior', [None, 'train', 'balanced', [3, 1, 2, 5, 1, 0, 1, 4]])
def test_order_of_images_and_of_classes_means_nothing(draw, calibration, prior):
    z, y = draw
    before = numbers(quick(z, y, calibration=calibration, prior=prior))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    assert numbers(quick(z[order], y[order], calibration=calibration, prior=prior)) == pytest.approx(before)
    classes = rng.permutation(8)
    where = torch.tensor(np.argsort(classes))
    def taken(values): return [values[i] for i in classes]
    other = Calibration(calibration.temperature, calibration.tau, taken(counts), taken(calibration.valid_counts))
    e = evaluate_logits(z[:, classes], where[y], taken(names), taken(counts), other,
                        prior=taken(prior) if isinstance(prior, list) else prior, resamples=0)
    assert numbers(e) == pytest.approx(before)


def test_the_frequencies_of_the_images_as_prior_weight_nothing(draw):
    z, y = draw
    own = np.bincount(y)
    assert _image_weights(y.numpy(), own/own.sum()) == pytest.approx(np.ones(len(y)))
    calibration = Calibration(1., 0., counts, own)
    without, with_prior = [quick(z, y, calibration=calibration, prior=o) for o in (None, own+.5)]
    found, expected = numbers(with_prior), numbers(without)
    assert (with_prior.predicted == without.predicted).all()
    assert found['calibrated nll'] == pytest.approx(expected['calibrated nll'], rel=.02)  # half an image is smoothed
    weighted = np.average(with_prior.loss, weights=with_prior.weights)
    assert with_prior.probabilities['calibrated']['nll'].value == pytest.approx(weighted)


def test_weights_are_repetitions_of_images(draw):
    "Weights of a prior give what as many copies of each image as the prior says give without one"
    z, y = draw
    copies = np.array([1, 6, 1, 2, 3, 1, 2, 1])
    own = np.bincount(y)
    calibration = Calibration(1., 0., counts, [10**6]*8)  # only the prior moves probabilities
    prior = (copies*own).tolist()
    e = quick(z, y, calibration=calibration, prior=prior)
    z_shifted = z+torch.tensor(prior).log()
    repeated = torch.arange(len(y)).repeat_interleave(torch.tensor(copies)[y])
    expected = quick(z_shifted[repeated], y[repeated])
    found, expected = numbers(e), numbers(expected)
    for k in ('ece', 'nll', 'brier'):
        assert found[f'calibrated {k}'] == pytest.approx(expected[f'softmax {k}'], rel=1e-5)
    same = [k for k in found if 'calibrated' not in k and 'softmax' not in k]
    assert {k: found[k] for k in same} == pytest.approx({k: expected[k] for k in same})


def test_classes_that_a_prior_leaves_out(draw, calibration):
    z, y = draw
    prior = [1, 1, 1, 1, 1, 1, 1, 0]
    e = quick(z, y, calibration=calibration, prior=prior, files=[f'{i}.png' for i in range(len(y))])
    assert len(e.targets) == (y < 7).sum() and 7 not in e.predicted and np.isfinite(e.loss).all()
    assert [int(o.removesuffix('.png')) for o in e.files] == (y < 7).nonzero().flatten().tolist()
    assert any('class 7' in o for o in e.notes)
    no_first = y > 0
    e = quick(z[no_first], y[no_first], calibration=calibration, prior='balanced')
    assert any(o.startswith('The prior gives 12.5% to classes without images (class 0)') for o in e.notes)
    with pytest.raises(ValueError, match='no class of a frequency above 0 has an image'):
        quick(z[no_first], y[no_first], calibration=calibration, prior=[1]+[0]*7)


def test_accuracies_are_those_of_shot_report(draw, calibration):
    z, y = draw
    for prior in (None, 'balanced'):
        e = quick(z, y, calibration=calibration, prior=prior)
        report = ShotReport.from_preds(calibration.probabilities(z, prior), y, counts)
        assert {k: o.value for k, o in e.groups.items()} == pytest.approx(report.accuracy)
        bounds = {k: (o.lower, o.upper) for k, o in e.groups.items()}
        assert all(bounds[k] == pytest.approx(v) for k, v in report.intervals.items())
        assert e.report.accuracy == pytest.approx(report.accuracy)
        assert e.per_class.recall.tolist() == pytest.approx(report.per_class, abs=1e-5)
    again = quick(z, y, calibration=calibration, many=20, few=3)
    assert again.groups['few'].value == pytest.approx(report.from_preds(z, y, counts, many=20, few=3).accuracy['few'])


def test_probabilities_are_those_of_the_calibration(draw, calibration):
    z, y = draw
    for prior in (None, 'train', 'balanced', [1, 2, 3, 4, 5, 6, 7, 8]):
        p = calibration.probabilities(z, prior)
        e = quick(z, y, calibration=calibration, prior=prior)
        assert e.probability == pytest.approx(p.max(1).values.numpy(), rel=1e-4)
        assert e.loss == pytest.approx(-p[range(len(y)), y].log().numpy(), rel=1e-3, abs=1e-5)
        assert (e.predicted == p.argmax(1).numpy()).all()
    plain = quick(z, y)
    assert list(plain.probabilities) == ['softmax'] and any('no calibration' in o for o in plain.notes)
    assert numbers(plain)['softmax nll'] == numbers(quick(z, y, calibration=calibration))['softmax nll']
    with pytest.raises(ValueError, match='not calibrated'): quick(z, y, prior='train')


def test_intervals_hold_the_number_and_shrink_with_images(draw, calibration):
    z, y = draw
    def repeated(n): return evaluate_logits(z.repeat(n, 1), y.repeat(n), names, counts, calibration, resamples=100)
    small, large = repeated(1), repeated(8)

    def every(e):
        return [e.plain, *e.groups.values(), *(o for a in e.averages.values() for o in a.values()),
                *(o[k] for o in e.probabilities.values() for k in ('ece', 'nll', 'brier'))]
    for a, b in zip(every(small), every(large)):
        assert a.lower <= a.value <= a.upper and b.lower <= b.value <= b.upper
        assert b.upper-b.lower < a.upper-a.lower and a.value == pytest.approx(b.value)
    again = evaluate_logits(z, y, names, counts, calibration, resamples=100)
    assert again.as_dict() == small.as_dict()  # the same numbers each time
    table = small.per_class
    for k in ('recall', 'precision', 'f1'):
        assert (table[f'{k}_lower'] <= table[k]).all() and (table[k] <= table[f'{k}_upper']).all()


def test_classes_without_images_and_unknown_training_images(draw):
    z, y = draw
    some = (y != 2) & (y != 5)
    e = evaluate_logits(z[some], y[some], names, None, resamples=10)
    assert list(e.groups) == ['all'] and e.report is None
    assert e.groups['all'].value == pytest.approx(100*np.mean(
        [(z[y == c].argmax(1) == c).double().mean() for c in (0, 1, 3, 4, 6, 7)]))
    table = e.per_class
    assert table.f1.isna().tolist() == [i in (2, 5) for i in range(8)]
    assert e.averages['macro']['f1'].value == pytest.approx(table.f1.mean(), abs=1e-5)
    assert 'Many' not in e.summary() and json.dumps(e.as_dict(), allow_nan=False)


def test_what_does_not_fit(draw):
    z, y = draw
    with pytest.raises(ValueError, match='a row of 8 classes for each'): quick(z[:, :7], y)
    with pytest.raises(ValueError, match='a row of 8 classes for each'): quick(z[:9], y)
    with pytest.raises(ValueError, match='class indices from 0 to 7'): quick(z, y+1)
    with pytest.raises(ValueError, match='got none'): quick(z[:0], y[:0])
    with pytest.raises(ValueError, match='has diverged'): quick(z*float('nan'), y)


@pytest.mark.parametrize('n', [2, 6, 19, 20, 40])
def test_few_classes_have_no_top5(n):
    "Among six classes, five guesses are nearly always right"
    z = torch.randn(60, n, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % n
    e = evaluate_logits(z, y, [str(i) for i in range(n)], [9]*n, resamples=5)
    assert ('top 5' in e.summary()) == (n >= 20)
    if n < 20: assert e.top5 is None and e.as_dict()['top5_accuracy'] is None
    else: assert e.top5['plain'].value == pytest.approx(100*metrics.top_k_accuracy_score(y, z, k=5))


# A model and images


@pytest.fixture(scope='module')
def loaded(digits_model): return load_classifier(digits_model[1], device='cpu')


@pytest.fixture(scope='module')
def evaluated(digits_model, loaded): return evaluate(loaded, digits_model[0], resamples=20)


def test_numbers_are_those_of_the_loaders_of_training(digits_model, evaluated, loaded):
    "The test loader of training gives the same, with fastai's own loop and with a fastai metric"
    from ltrl_fastai.data.own import own_images
    images, _ = digits_model
    dls = own_images(images, flip=False, device='cpu')
    assert list(dls.vocab) == evaluated.vocab
    with loaded.no_bar(): z, y = loaded.get_preds(dl=dls.test, act=noop)
    assert evaluated.targets.tolist() == y.tolist() and evaluated.about['split'] == 'test'
    right = (z.argmax(1) == y)
    assert evaluated.plain.value == pytest.approx(100*right.double().mean().item())
    loss = torch.nn.functional.cross_entropy(z.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)).item()
    assert evaluated.probabilities['softmax']['nll'].value == pytest.approx(loss, rel=1e-3)
    report = ShotReport.from_preds(z, y, loaded.facts['class_counts'])
    assert evaluated.groups['all'].value == pytest.approx(report.accuracy['all'])
    worst = evaluated.worst(3)
    i = int(evaluated.loss.argmax())
    assert worst.file[0] == evaluated.files[i] and worst.true[0] == Path(worst.file[0]).parent.name
    assert worst.loss.is_monotonic_decreasing


@pytest.mark.parametrize('options', [dict(bs=7), dict(num_workers=2)])
def test_batches_and_processes_change_nothing(digits_model, loaded, evaluated, options):
    again = evaluate(loaded, digits_model[0], resamples=0, **options)
    assert numbers(again) == pytest.approx(numbers(evaluated), rel=1e-4)


def test_a_folder_of_classes_and_csv_files(digits_model, loaded, evaluated, tmp_path):
    "The same images, however they are given"
    images, _ = digits_model
    test = images/'test'
    assert numbers(evaluate(loaded, test, resamples=0)) == pytest.approx(numbers(evaluated))
    files = sorted(test.rglob('*.png'))
    table = pd.DataFrame(dict(path=[os.path.relpath(o, tmp_path) for o in files], label=[o.parent.name for o in files]))
    table.to_csv(tmp_path/'plain.csv', index=False)
    e = evaluate(loaded, tmp_path/'plain.csv', resamples=0)
    assert numbers(e) == pytest.approx(numbers(evaluated)) and e.about['split'] is None
    extra = pd.DataFrame(dict(path='missing.png', label='unknown to the model', split=['train', 'valid']))
    every = pd.concat([table.assign(split='test'), extra])
    every.rename(columns=dict(path='where')).to_csv(tmp_path/'splits.csv', index=False)
    e = evaluate(loaded, tmp_path/'splits.csv', resamples=0, path_col='where')
    assert numbers(e) == pytest.approx(numbers(evaluated)) and e.about['split'] == 'test'
    with pytest.raises(FileNotFoundError, match='Images are missing: 1 of 1 images in valid'):
        evaluate(loaded, tmp_path/'splits.csv', split='val', path_col='where')


def one_image(*files):
    for o in files:
        o.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (24, 24)).save(o)


def test_splits(tmp_path):
    def split_of(path, split=None):
        found = labelled_images(path, ['a', 'b'], split)
        return found.split, found.images.paths, found.notes
    one_image(tmp_path/'two/valid/a/1.png', tmp_path/'two/train/a/2.png', tmp_path/'two/train/b/3.png')
    split, paths, notes = split_of(tmp_path/'two')
    assert split == 'valid' and paths == [os.path.join('valid', 'a', '1.png')]
    assert 'chosen its best epoch' in notes[0] and "No valid image of 1 of 2 classes: b" in notes[1]
    assert 'say nothing about new images' in split_of(tmp_path/'two', 'train')[2][0]
    with pytest.raises(ValueError, match="has no 'test', but train, valid"): split_of(tmp_path/'two', 'test')
    with pytest.raises(ValueError, match='expected test, valid or train'): split_of(tmp_path/'two', 'best')
    one_image(tmp_path/'one/train/a/1.png')
    with pytest.raises(ValueError, match='got train only.*--split train'): split_of(tmp_path/'one')
    with pytest.raises(ValueError, match='has no splits'): split_of(tmp_path/'one/train', 'test')
    one_image(tmp_path/'three/test/a/1.png', tmp_path/'three/b/2.png')
    with pytest.raises(ValueError, match='expected a folder `train`'): split_of(tmp_path/'three')
    with pytest.raises(FileNotFoundError, match='There is no folder or file'): split_of(tmp_path/'nothing')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='found no image'): split_of(tmp_path/'empty')
    (tmp_path/'list.txt').touch()
    with pytest.raises(ValueError, match='ends in .csv'): split_of(tmp_path/'list.txt')


def test_unknown_classes(digits_model, loaded, evaluated, tmp_path):
    images, _ = digits_model
    shutil.copytree(images/'test', tmp_path/'digits')
    one_image(tmp_path/'digits/ninee/1.png', tmp_path/'digits/ten/2.png')
    words = r"does not know 'ninee', 'ten' \(2 of 142 images\). Did you mean 'nine'.*--ignore-unknown"
    with pytest.raises(ValueError, match=words): evaluate(loaded, tmp_path/'digits')
    e = evaluate(loaded, tmp_path/'digits', ignore_unknown=True, resamples=0)
    assert numbers(e) == pytest.approx(numbers(evaluated))
    assert any('2 of 142 images are of classes that' in o and 'left out: ninee, ten' in o for o in e.notes)
    shutil.rmtree(tmp_path/'digits/five')
    e = evaluate(loaded, tmp_path/'digits', ignore_unknown=True, resamples=0)
    assert any('No labelled image of 1 of 7 classes: five' in o for o in e.notes)
    assert e.groups['all'].value == pytest.approx(evaluated.per_class.recall[1:].mean(), abs=1e-5)
    one_image(tmp_path/'other/cat/1.png')
    with pytest.raises(ValueError, match='knows none of its classes'):
        evaluate(loaded, tmp_path/'other', ignore_unknown=True)


def test_nested_names(tmp_path):
    assert match_classes(['x/a', 'b'], ['a', 'b']) == {'x/a': 0, 'b': 1}
    assert match_classes(['a'], ['x/a', 'x/b']) == {'a': 0}
    assert match_classes(['xa'], ['a']) == {'xa': None}
    assert match_classes([], ['a']) == {}
    with pytest.raises(ValueError, match='could both be'): match_classes(['x/a', 'y/a'], ['a'])
    one_image(tmp_path/'x/a/1.png')
    found = labelled_images(tmp_path, ['a'])
    assert found.images.labels == [0] and 'x/a is a' in found.notes[0]


def test_broken_images(digits_model, loaded, tmp_path):
    images, _ = digits_model
    shutil.copytree(images/'test', tmp_path/'digits')
    broken = tmp_path/'digits/five/broken.png'
    broken.write_bytes(next((tmp_path/'digits/five').glob('*.png')).read_bytes()[:60])
    with pytest.raises(UnreadableImage, match="1 of 141 images can't be read.*broken.png.*--skip-broken"):
        evaluate(loaded, tmp_path/'digits')
    with pytest.raises(UnreadableImage, match="broken.png can't be read"):
        evaluate(loaded, tmp_path/'digits', check=False)
    e = evaluate(loaded, tmp_path/'digits', skip_broken=True, resamples=0)
    assert len(e.targets) == 140 and e.about['skipped'] == [str(broken)]
    assert any("1 image can't be read and is left out" in o for o in e.notes)
    for o in (tmp_path/'digits').rglob('*.png'): o.write_bytes(b'')
    with pytest.raises(UnreadableImage, match='None of the 141 images'):
        evaluate(loaded, tmp_path/'digits', skip_broken=True)


def test_other_learners(dls, mlp, digits_model, tmp_path):
    "A model of something else than image files; one that was trained on a folder without splits"
    from fastai.vision.all import Learner
    learn = Learner(dls, mlp())
    one_image(tmp_path/'images/3/1.png')
    with pytest.raises(ValueError, match='does not take image files'): evaluate(learn, tmp_path/'images')
    images, model = digits_model
    learn = load_classifier(model, device='cpu')
    learn.facts['place'] = place_mark(images/'test')
    notes = evaluate(learn, images/'test', resamples=0).notes
    assert 'most images are training images' in notes[0]
    assert not evaluate(learn, images, resamples=0).notes
    learn.calibration = learn.facts['calibration'] = None
    save_classifier(learn, tmp_path/'model')
    e = evaluate(load_classifier(tmp_path/'model', trust=True, device='cpu'), images, resamples=0)
    assert list(e.probabilities) == ['softmax']


def test_saved_files(evaluated, tmp_path):
    written = evaluated.save(tmp_path/'out', n_worst=6)
    assert {o.name for o in written} == {o.name for o in (tmp_path/'out').iterdir()}
    res = json.loads((tmp_path/'out/evaluation.json').read_text())
    assert res['accuracy']['all']['value'] == pytest.approx(evaluated.groups['all'].value, abs=1e-5)
    confusion = np.zeros((7, 7), int)
    for i, j, n in res['confusion']: confusion[i, j] = n
    assert (confusion == evaluated.confusion).all() and len(res['top_losses']) == 6
    table = pd.read_csv(tmp_path/'out/per_class.csv')
    assert table['class'].tolist() == res['classes']
    assert table.f1.tolist() == pytest.approx(evaluated.per_class.f1.tolist())
    for o in (tmp_path/'out').glob('*.png'): assert min(Image.open(o).size) > 300
    evaluated.files, files = None, evaluated.files
    try: assert 'top_losses.png' not in {o.name for o in evaluated.save(tmp_path/'without')}
    finally: evaluated.files = files


def test_pictures(draw):
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgba
    rng = np.random.default_rng(0)
    for n in (2, 6, 20, 81, 300):
        m = rng.integers(0, 3, (n, n))
        m[0] = 0  # a class without images
        ax = draw_confusion(m, rng.permutation(n)+1, [f'a class of number {i}' for i in range(n)])
        ax.figure.canvas.draw()
        labels = [o.get_text() for o in ax.get_yticklabels()]
        assert (len(labels) == n and all(labels)) == (n <= 120)
        assert len(ax.texts) == (np.count_nonzero(m) if n <= 20 else 0)
        boxes = [o.get_window_extent() for o in ax.get_yticklabels() if o.get_text()]
        boxes.sort(key=lambda o: o.y0)
        overlaps = [a.y1-b.y0 for a, b in zip(boxes, boxes[1:])]
        assert max(overlaps, default=0) < 2  # pixels, of a box that is higher than its letters
        assert ax.figure.get_facecolor() == to_rgba('none') and ax.ltrl_alt
        plt.close(ax.figure)
    p = rng.random(50)
    fig = draw_reliability({'one': reliability(p, p > .5), 'two': reliability(p, p > .2)})
    assert len(fig.axes) == 4 and 'ECE' in fig.axes[0].get_title()
    plt.close(fig)


def test_no_more_thumbnails_than_images(tmp_path):
    import matplotlib.pyplot as plt
    one_image(tmp_path/'1.png')
    fig = draw_losses([tmp_path/'1.png'], ['a'], ['b'], [.9], [2.3])
    assert sum(bool(o.images) for o in fig.axes) == 1
    plt.close(fig)


# The command


def ltrl(*args, code=0):
    r = CliRunner().invoke(app, ['evaluate', *map(str, args)])
    assert r.exit_code == code, (r.output, r.exception)
    return r.output


@pytest.fixture
def copied(digits_model, tmp_path):
    "The model, and images, in a folder of their own"
    images, model = digits_model
    return shutil.copytree(images, tmp_path/'digits'), shutil.copytree(model, tmp_path/'run/model')


def test_command(copied, evaluated):
    images, model = copied
    said = ltrl(model, images, '--device', 'cpu', '--few', 5, '--many', 30)
    out = model.parent/'evaluation'
    res = json.loads((out/'evaluation.json').read_text())
    assert res['accuracy']['all']['value'] == pytest.approx(evaluated.groups['all'].value, abs=1e-4)
    assert f"140 test images of {images}" in said and f'{evaluated.plain.value:.1f}' in said
    assert sorted(o.name for o in out.iterdir()) == [
        'confusion.png', 'evaluation.json', 'per_class.csv', 'reliability.png', 'top_losses.png']
    assert res['many'] == 30 and res['few'] == 5 and res['asked']['split'] is None
    before = (out/'evaluation.json').stat().st_mtime_ns
    ltrl(model.parent, images, '--few', 5, '--many', 30)  # the same again, by the parent of the model
    assert (out/'evaluation.json').stat().st_mtime_ns != before
    said = ltrl(model, images, '--prior', 'balanced', code=2)
    assert 'holds an evaluation of other prior, many, few' in said and '--force' in said
    said = ltrl(model, images, '--prior', 'balanced', '--force')
    assert 'under other class frequencies: balanced' in said and 'Under the prior' in said
    (out/'evaluation.json').write_text('[]')
    assert 'is not a result of `ltrl evaluate`' in ltrl(model, images, code=2)


def test_command_with_files(copied, tmp_path):
    images, model = copied
    prior = tmp_path/'prior.csv'
    words = 'five four nine one seven two zero'.split()
    prior.write_text('class,share\n'+''.join(f'{o},{i}\n' for i, o in enumerate(words, 1)))
    said = ltrl(model/'model.safetensors', images/'test', '--prior', prior, '--out', tmp_path/'out', '--workers', 0)
    assert 'from a file' in said
    res = json.loads((tmp_path/'out/evaluation.json').read_text())
    assert res['prior'] == [1, 2, 3, 4, 5, 6, 7]
    frequencies = [o['frequency'] for o in res['per_class']]
    assert frequencies == pytest.approx([i/28 for i in range(1, 8)], abs=1e-5)
    other = model.rename(model.parent/'birds')
    ltrl(other, images/'test')
    assert (model.parent/'birds-evaluation/evaluation.json').exists()


@pytest.mark.parametrize('args, words', [
    (['--bs', '0'], '--bs: expected a number of images at least 1'),
    (['--workers', '-1'], '--workers: expected a number of processes at least 0'),
    (['--many', '5', '--few', '9'], 'expected at least `few`'),
    (['--prior', 'trian'], "expected 'train', 'balanced' or a CSV file"),
    (['--split', 'valid'], "has no 'valid', but test, train"),
    (['--device', 'quantum'], "--device: expected cpu, cuda"),
    (['--out', 'README.txt'], 'is a file, where a folder was expected')])
def test_errors(digits_model, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    Path('README.txt').touch()
    images, model = digits_model
    said = ltrl(model, images, '--out', tmp_path/'out', *args, code=2)
    assert words in said and said.startswith('Error: ') and said.count('\n') == 1
    assert not (tmp_path/'out').exists()


def test_errors_of_models_and_images(copied, tmp_path):
    images, model = copied
    assert 'expected a model, but it is not there' in ltrl(tmp_path/'nothing', images, code=2)
    assert '--trust' in ltrl(model/'model.pkl', images, code=2)
    assert 'There is no folder or file' in ltrl(model, tmp_path/'nothing', code=2)
    (images/'test/five/broken.png').write_bytes(b'no image')
    assert '--skip-broken' in ltrl(model, images, code=2)
    said = ltrl(model, images, '--no-check', '--workers', 1, code=2)
    assert said.startswith('Error: ') and "broken.png can't be read" in said and 'Traceback' not in said
    said = ltrl(model/'model.pkl', images, '--trust', '--skip-broken')
    assert "Note: 1 image can't be read and is left out" in said


@pytest.mark.parametrize('error', [torch.cuda.OutOfMemoryError('out of memory'), RuntimeError('MPS out of memory')])
def test_too_little_memory(digits_model, tmp_path, monkeypatch, error):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr('ltrl_fastai.deploy.evaluate.evaluate', fails)
    images, model = digits_model
    assert '--bs 16.' in ltrl(model, images, '--out', tmp_path/'out', code=2)
    assert 'Add --device cpu.' in ltrl(model, images, '--out', tmp_path/'out', '--bs', 1, code=2)
