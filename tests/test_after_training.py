"What a model keeps after training: calibration by class, thresholds, and class frequencies where it is used."
import json
import shutil

import numpy as np
import pytest
import torch
from fastai.vision.all import noop
from typer.testing import CliRunner

from ltrl_fastai.deploy.calibration import Calibration, calibration_kinds, fit_calibration
from ltrl_fastai.deploy.evaluate import evaluate, evaluate_logits
from ltrl_fastai.deploy.export import serving_net
from ltrl_fastai.deploy.model_files import load_classifier, read_facts, save_classifier
from ltrl_fastai.deploy.predict import predict_files, prediction_row
from ltrl_fastai.deploy.priors import estimate_prior, implied_prior
from ltrl_fastai.deploy.thresholds import ClassThresholds, fit_thresholds
from ltrl_fastai.cli.main import app

names = ['a', 'b', 'c', 'd']
counts = [400, 100, 30, 10]


def drawn(n, shares, seed=0, sharpness=2.):
    "Logits of a perfect net after cross-entropy on `counts`, and targets of these frequencies"
    rng = np.random.default_rng(seed)
    y = rng.choice(4, n, p=np.array(shares)/sum(shares))
    x = rng.normal(size=(n, 4))+sharpness*np.eye(4)[y]
    return torch.tensor(sharpness*x+np.log(counts)).float(), torch.tensor(y)


@pytest.fixture(scope='module')
def calibration(): return fit_calibration(*drawn(1500, counts), counts)


def by_class(calibration):
    "A calibration with two numbers for each class of the digits"
    n = len(calibration.class_counts)
    return Calibration(1.3, .7, calibration.class_counts, calibration.valid_counts, kind='vector',
                       temperatures=np.linspace(.8, 2, n).tolist(), biases=np.linspace(-.5, .5, n).tolist())


@pytest.fixture(scope='module')
def vector_model(digits_model, tmp_path_factory):
    "A copy of the model of digits, with a calibration by class and thresholds: images and folder"
    images, model = digits_model
    folder = tmp_path_factory.mktemp('vector')/'model'
    learn = load_classifier(model, device='cpu')
    n = len(learn.facts['classes'])
    thresholds = ClassThresholds([1.001, *[0.]*(n-1)], 'precision', .9, [5]*n)
    learn.class_counts = learn.facts['class_counts']
    shutil.copytree(model, folder)
    facts = read_facts(folder)
    facts['calibration'] = by_class(learn.calibration).as_dict()
    facts['thresholds'] = thresholds.as_dict()
    (folder/'model.json').write_text(json.dumps(facts))
    return images, folder


def ltrl(*args, code=0):
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result


def test_a_calibration_by_class_is_that_of_each_image_alone():
    "And with one temperature for all classes and no bias it is the plain one"
    z, _ = drawn(30, counts)
    c = Calibration(1.3, .7, counts, [9, 9, 9, 9], kind='vector', temperatures=[1, 2, 3, 4], biases=[0, 1, 0, -1])
    expected = torch.stack([(o.double()/torch.tensor([1, 2, 3, 4])+torch.tensor([0, 1, 0, -1])).softmax(0) for o in z])
    torch.testing.assert_close(c.probabilities(z).double(), expected, rtol=1e-5, atol=1e-6)
    same = Calibration(1.3, .7, counts, [9]*4, kind='vector', temperatures=[1.3]*4, biases=[0]*4)
    plain = Calibration(1.3, .7, counts, [9]*4)
    for prior in (None, 'train', 'balanced', [1, 2, 3, 4]):
        torch.testing.assert_close(same.probabilities(z, prior), plain.probabilities(z, prior))


@pytest.mark.parametrize('kind', calibration_kinds)
def test_the_order_of_classes_and_images_changes_no_calibration(kind):
    z, y = drawn(600, [1, 1, 1, 1])
    order, images = torch.tensor([2, 0, 3, 1]), torch.randperm(600)
    a = fit_calibration(z, y, counts, kind=kind)
    b = fit_calibration(z[images][:, order], order.argsort()[y[images]], np.array(counts)[order.numpy()], kind=kind)
    if a.kind == b.kind: torch.testing.assert_close(b.probabilities(z[:, order]), a.probabilities(z)[:, order],
                                                    rtol=.02, atol=.01)
    else: assert 'temperature' in (a.kind, b.kind)  # other folds may decide otherwise


def test_an_old_model_folder_loads(digits_model, tmp_path):
    "Without the entries that are new"
    folder = shutil.copytree(digits_model[1], tmp_path/'model')
    facts = read_facts(folder)
    assert 'thresholds' not in facts
    assert set(facts['calibration']) == {'temperature', 'tau', 'class_counts', 'valid_counts'}
    learn = load_classifier(folder, device='cpu')
    assert learn.thresholds is None and learn.calibration.kind == 'temperature'


def test_a_model_keeps_its_calibration_and_thresholds(digits_model, tmp_path):
    from ltrl_fastai.experiments.settings import RunSettings
    images, _ = digits_model
    learn = RunSettings(str(images), net='resnet8', epochs=1, bs=16).learner()
    with learn.no_bar(): z, y = learn.get_preds(act=noop)
    n = z.shape[1]
    calibration = by_class(fit_calibration(z, y, learn.dls.class_counts))
    thresholds = fit_thresholds(calibration.probabilities(z), y)
    save_classifier(learn, tmp_path/'model', calibration=calibration, thresholds=thresholds)
    loaded = load_classifier(tmp_path/'model/model.pkl', trust=True, device='cpu')
    assert loaded.calibration == calibration and loaded.thresholds == thresholds and len(thresholds.values) == n


@pytest.mark.parametrize('entry, value, words', [
    ('calibration', dict(temperatures=[1.]), 'calibration.temperatures has 1 numbers'),
    ('calibration', dict(kind='magic'), "calibration.kind is 'magic'"),
    ('calibration', dict(biases='none'), "calibration.biases is 'none'"),
    ('thresholds', dict(values=[.5]), 'thresholds.values has 1 numbers'),
    ('thresholds', dict(goal=3), 'thresholds.goal is 3')])
def test_a_damaged_model_is_named(vector_model, tmp_path, entry, value, words):
    folder = shutil.copytree(vector_model[1], tmp_path/'model')
    facts = read_facts(folder)
    facts[entry] |= value
    (folder/'model.json').write_text(json.dumps(facts))
    with pytest.raises(ValueError, match='model.json') as e: load_classifier(folder)
    assert words in str(e.value)


def test_the_serving_net_has_temperatures_and_biases(vector_model):
    images, folder = vector_model
    learn = load_classifier(folder, device='cpu')
    files = sorted(map(str, (images/'test').rglob('*.png')))[:20]
    with learn.no_bar(): z = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0), act=noop)[0]
    from PIL import Image
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(o).convert('RGB'))) for o in files])
    for prior in (None, 'balanced'):
        p = serving_net(learn, prior=prior)(pixels)
        torch.testing.assert_close(p, learn.calibration.probabilities(z, prior), rtol=1e-3, atol=1e-4)


def test_an_estimate_does_not_depend_on_order_or_batches(calibration):
    z, _ = drawn(800, [1, 1, 1, 1], seed=1)
    a = estimate_prior(z, calibration)
    b = estimate_prior(z[torch.randperm(800)][:, :], calibration)
    assert a.is_used and np.allclose(a.frequencies, b.frequencies, atol=1e-5)
    assert np.isclose(sum(a.frequencies), 1) and min(a.frequencies) > 0
    doubled = estimate_prior(torch.cat([z, z]), calibration)
    assert np.abs(np.array(doubled.frequencies)-a.frequencies).max() < .02  # only the pull differs


def test_an_estimate_beats_the_training_prior_after_a_shift(calibration):
    shares = [1, 2, 3, 4]
    z, y = drawn(1500, shares, seed=2)
    estimate = estimate_prior(z, calibration)
    true = np.bincount(y)/len(y)
    start = implied_prior(calibration).numpy()
    assert np.abs(np.array(estimate.frequencies)-true).sum() < .3*np.abs(start-true).sum()
    def nll(prior): return torch.nn.functional.nll_loss(calibration.probabilities(z, prior).log(), y).item()
    assert nll(estimate.frequencies) < nll(None)
    assert nll(estimate.frequencies) < nll(list(true))+.01


def test_evaluation_with_an_estimate(calibration):
    "Images are not weighted, probabilities are those of the estimate, and labels are not used for it"
    z, y = drawn(900, [1, 1, 1, 1], seed=3)
    options = dict(vocab=names, class_counts=counts, calibration=calibration, resamples=0)
    e = evaluate_logits(z, y, prior='estimate', **options)
    estimate = estimate_prior(z, calibration)
    assert e.about['estimate'] == estimate.as_dict() and (e.weights == 1).all()
    assert list(e.probabilities) == ['calibrated', 'trained', 'softmax'] == list(e.by_shot)
    p = calibration.probabilities(z, estimate.frequencies)
    assert np.allclose(e.probability, p.max(1).values, atol=1e-6) and (e.predicted == p.argmax(1).numpy()).all()
    plain = evaluate_logits(z, y, **options)
    assert e.probabilities['trained']['nll'] == plain.probabilities['calibrated']['nll']
    assert e.probabilities['calibrated']['nll'].value < e.probabilities['trained']['nll'].value
    shuffled = evaluate_logits(z, y[torch.randperm(900)], prior='estimate', **options)
    assert shuffled.about['estimate'] == e.about['estimate']
    assert any('without their labels' in o for o in e.notes) and 'As trained' not in plain.summary()


def test_probabilities_by_shot(calibration):
    "A group of all classes has the measures of all images; groups of one class those of the class"
    z, y = drawn(900, [1, 1, 1, 1], seed=4)
    e = evaluate_logits(z, y, names, counts, calibration, resamples=0, many=50, few=20)
    table = e.by_shot['calibrated'].set_index('group')
    measured = e.probabilities['calibrated']
    assert np.isclose(table.ece['all'], measured['ece'].value)
    for k in ('nll', 'brier'): assert np.isclose(table[k]['all'], measured[k].value)
    few = e.per_class.iloc[3]  # the only class with fewer than 20 training images
    assert np.isclose(table.ece['few'], few.ece) and np.isclose(table.classwise_ece['few'], few.classwise_ece)
    assert table.predictions['few'] == few.predicted
    assert np.isclose(table.classwise_ece['all'], e.per_class.classwise_ece.mean())
    assert table.predictions[['many', 'medium', 'few']].sum() == 900


def test_files_are_predicted_under_an_estimate(digits_model):
    images, model = digits_model
    learn = load_classifier(model, device='cpu')
    files = sorted(map(str, (images/'test').rglob('*.png')))
    seen = []
    found = list(predict_files(learn, [*files, 'gone.png'], prior='estimate', workers=0, on_estimate=seen.append))
    estimate, = seen
    assert [o.file for o in found] == [*files, 'gone.png'] and found[-1].problem == 'it is not there'
    expected = predict_files(learn, files, prior=estimate.frequencies, workers=0)
    for a, b in zip(found, expected): torch.testing.assert_close(a.probabilities, b.probabilities)
    assert estimate.images == len(files)
    few = list(predict_files(learn, files[:5], prior='estimate', workers=0, on_estimate=seen.append))
    assert 'there are 5' in seen[1].note
    for a, b in zip(few, predict_files(learn, files[:5], workers=0)):
        torch.testing.assert_close(a.probabilities, b.probabilities)
    none = list(predict_files(learn, ['gone.png'], prior='estimate', workers=0))
    assert none[0].problem == 'it is not there'


def test_commands_estimate_class_frequencies(digits_model, tmp_path):
    images, model = digits_model
    said = ltrl('predict', model, images/'test', '--prior', 'estimate', '--out', tmp_path/'a.json').output
    assert 'stimated' in said or 'no clear difference' in said
    written = json.loads((tmp_path/'a.json').read_text())
    assert written['prior'] == 'estimate' and written['estimated_prior']['images'] == len(written['predictions'])
    said = ltrl('evaluate', model, images, '--prior', 'estimate', '--out', tmp_path/'out').output
    assert 'under other class frequencies: estimate' in said and 'as trained' in said
    measured = json.loads((tmp_path/'out/evaluation.json').read_text())
    assert measured['prior'] == 'estimate'
    found, again = measured['estimate']['found'], written['estimated_prior']['found']
    assert np.allclose(found, again, atol=1e-3)
    assert set(measured['probabilities_by_shot']) == {'calibrated', 'trained', 'softmax'}
    said = ltrl('export', model, '--prior', 'estimate', code=2).output
    assert "needs images" in said


def test_classes_are_rejected_by_their_own_thresholds(vector_model, digits_model, tmp_path):
    images, folder = vector_model
    never = read_facts(folder)['classes'][0]
    plain = ltrl('predict', folder, images/'test').stdout.splitlines()
    rejected = ltrl('predict', folder, images/'test', '--reject-by-class').stdout.splitlines()
    assert any(f',{never},' in o for o in plain)
    assert rejected == [o.replace(f',{never},', ',,') for o in plain]
    said = ltrl('predict', digits_model[1], images/'test', '--reject-by-class', code=2).output
    assert '--reject-by-class: this model has no thresholds' in said


def test_a_row_of_a_rejected_prediction_keeps_its_probabilities():
    from ltrl_fastai.deploy.predict import Prediction
    o = Prediction('x.png', torch.tensor([.7, .3]))
    strict = ClassThresholds([.8, .1], 'precision', .9, [5, 5])
    assert prediction_row(o, ['a', 'b'], top_k=2, reject_below=strict) == {
        'file': 'x.png', 'class': '', 'probability': .7, 'class_2': 'b', 'probability_2': .3}
    assert prediction_row(o, ['a', 'b'], reject_below=ClassThresholds([.7, 1], 'f1', None, [5, 5]))['class'] == 'a'


def test_evaluate_takes_an_estimate_from_python(digits_model):
    images, model = digits_model
    learn = load_classifier(model, device='cpu')
    e = evaluate(learn, images, prior='estimate', resamples=0, num_workers=0)
    assert e.about['prior'] == 'estimate' and e.about['estimate']['images'] == len(e.targets)
    learn.calibration = None
    with pytest.raises(ValueError, match='not calibrated'): evaluate(learn, images, prior='estimate', num_workers=0)
