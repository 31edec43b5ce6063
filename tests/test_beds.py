"The test beds: folders as frozen features, named data sets, text, table, digits, fine-tuning, and rows of evidence."
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from command_line import ltrl_process
from fastai.vision.all import Callback, CancelFitException, Image
from ltrl_fastai.data import beds, frozen
from ltrl_fastai.data.beds import (
    digits_folder, folder_data, folder_sets, geomorphons, grocery, hashed_ngrams, images_in_memory, landforms,
    unicode_names)
from ltrl_fastai.data.benchmarks import DataNote
from ltrl_fastai.data.catalogue import catalogue
from ltrl_fastai.data.frozen import Lite0, TorchFeatures, extractor_of, frozen_loaders
from ltrl_fastai.data.images import UnreadableImage
from ltrl_fastai.data.own import own_images
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.plan import make_plan, protocols, variants
from ltrl_fastai.experiments.runner import Identities, run_plan
from ltrl_fastai.experiments.summary import evidence
from ltrl_fastai.core.files import write_json
from ltrl_fastai.experiments.training import RunSettings, datasets, spec_of, train_run
from ltrl_fastai.methods.finetuning import HeadFirst, finetuned_net
from ltrl_fastai.methods.optimizer import body_and_head
from sklearn.datasets import load_digits
from typer.testing import CliRunner

pytestmark = pytest.mark.filterwarnings('ignore::ltrl_fastai.data.benchmarks.DataNote')


BATCHES = []  # sizes of the batches of the extractor below


class Colours:
    "A fast extractor that counts its images"
    name, size = 'colours', 8

    def __call__(self, x):
        BATCHES.append(len(x))
        return torch.cat([x.float().mean((2, 3)), x.float().std((2, 3))], 1)


@pytest.fixture
def colours(monkeypatch, tmp_path):
    "`extract=colours`, with a cache of the test's own; returns a function that counts the images it has processed"
    monkeypatch.setitem(frozen.extractors, 'colours', Colours)
    monkeypatch.setattr(frozen, 'default_features', lambda: tmp_path/'features')
    BATCHES.clear()
    return lambda: sum(BATCHES)


def folder(path, n=(24, 12, 6), parts=('train',), shape=(20, 14)):
    "Images of three classes with different colours; no two images are the same"
    rng = np.random.default_rng(len(str(path)))
    for part in parts:
        for c, k in enumerate(n):
            class_folder = path/part/f'class{c}' if parts != ('train',) else path/f'class{c}'
            class_folder.mkdir(parents=True)
            for i in range(k if part == 'train' else max(2, k//3)):
                pixels = rng.integers(0, 60, (*shape, 3))
                pixels[..., c] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(class_folder/f'{part}{i}.png')
    return path


def rows(dls): return [[tuple(o.tolist()) for o in dl.dataset.x.float()] for dl in dls.loaders]


def sizes(dls): return [np.bincount(dl.dataset.targets, minlength=dls.c).tolist() for dl in dls.loaders]


def file_names(dls): return [[Path(f).name for f, _ in dl.dataset.items] for dl in dls.loaders]


# A folder as frozen features in a run

def test_a_folder_is_trained_on_as_features(tmp_path, colours):
    s = RunSettings(dataset=str(folder(tmp_path/'mine')), extract='colours', epochs=8, bs=8)
    assert (s.net, s.lr, s.data_name) == ('mlp256', .1, 'mine-colours')
    usual = RunSettings(dataset=str(tmp_path/'mine'), extract='colours')
    of_cifar = RunSettings(dataset='cifar100-frozen-lt')
    same = ('net', 'epochs', 'bs', 'lr', 'wd', 'nesterov', 'schedule')
    for k in same: assert getattr(usual, k) == getattr(of_cifar, k)
    res, _ = train_run(s, bar=False)
    assert res['accuracy']['all'] > 90  # on a drawn test split
    assert res['settings']['extract'] == 'colours'


def test_a_test_split_is_drawn_if_there_is_none(tmp_path, colours):
    dls = RunSettings(dataset=str(folder(tmp_path/'mine')), extract='colours').dls()
    assert sizes(dls) == [[15, 8, 4], [3, 1, 1], [6, 3, 1]]
    assert any('10 test images were drawn from training, 25% of each class' in o for o in dls.notes)
    assert not {o for part in rows(dls)[:2] for o in part} & set(rows(dls)[2])
    with pytest.raises(ValueError, match='test_share: expected a share between 0 and 1'):
        frozen_loaders(tmp_path/'mine', Colours, test_share=1.5)


def test_a_csv_file_gives_the_same_features(tmp_path, colours):
    where = folder(tmp_path/'mine')
    lines = [f'{f.relative_to(tmp_path)},{f.parent.name}\n' for f in sorted(where.rglob('*.png'))]
    (tmp_path/'mine.csv').write_text('path,label\n' + ''.join(lines))
    a, b = [RunSettings(dataset=str(tmp_path/o), extract='colours').dls() for o in ('mine', 'mine.csv')]
    assert [sorted(o) for o in rows(a)] == [sorted(o) for o in rows(b)]


def test_features_are_reused(tmp_path, colours):
    where = folder(tmp_path/'mine')
    make = RunSettings(dataset=str(where), extract='colours').dls
    first = rows(make())
    assert colours() == 42
    assert rows(make()) == first
    assert colours() == 42
    RunSettings(dataset=str(where), extract='colours', data_seed=5).dls()  # other draws of the same images
    assert colours() == 42
    RunSettings(dataset=str(where), extract='colours', size=10).dls()  # other pixels
    assert colours() == 84
    Image.new('RGB', (20, 14), (9, 9, 9)).save(where/'class0'/'train0.png')
    make()
    assert colours() == 85  # only the replaced image


# Redrawing

@pytest.mark.parametrize('parts', [('train',), ('train', 'test'), ('train', 'val'), ('train', 'val', 'test')])
def test_redraw_draws_other_images(parts, tmp_path, colours):
    where = folder(tmp_path/'mine', parts=parts)

    def draw(seed): return RunSettings(dataset=str(where), extract='colours', data_seed=seed).dls()
    zero, one, again, two = [draw(o) for o in (0, 1, 1, 2)]
    assert rows(one) == rows(again)
    assert sizes(zero) == sizes(one) == sizes(two)
    for a, b in ((zero, one), (one, two), (zero, two)):
        for i, fixed in enumerate((False, False, 'test' in parts)):
            assert (sorted(rows(a)[i]) == sorted(rows(b)[i])) == fixed
    for o in (zero, one, two):
        flat = [row for part in rows(o) for row in part]
        assert len(set(flat)) == len(flat)  # no image in two parts
    assert {row for part in rows(zero) for row in part} == {row for part in rows(two) for row in part}


def test_redraw_of_a_comparison_reads_other_data_for_each_seed(tmp_path, colours):
    where = folder(tmp_path/'mine', parts=('train', 'val'))
    plan = make_plan(['bsce'], variants(), [0, 1, 2], paired_data=True, dataset=str(where), extract='colours', epochs=1)
    assert [o.settings.data_seed for o in plan] == [0, 0, 1, 1, 2, 2]
    known = Identities()
    digests = [known(o, True)['data'] for o in plan]
    assert len(set(digests)) == 3
    assert digests[::2] == digests[1::2]  # the same images with and without Reflective Learning
    without_redraw = make_plan(['bsce'], variants(), [0, 1], dataset=str(where), extract='colours', epochs=1)
    assert len({known(o, True)['data'] for o in without_redraw}) == 1


def test_runs_of_different_extractors_differ(tmp_path, colours, monkeypatch):
    class Darker(Colours):
        name = 'darker'

        def __call__(self, x): return super().__call__(x)/2
    monkeypatch.setitem(frozen.extractors, 'darker', Darker)
    where = str(folder(tmp_path/'mine'))
    known = Identities()
    extractors = ('colours', 'darker', None)
    plan = [make_plan(['bsce'], variants('off'), [0], dataset=where, extract=o)[0] for o in extractors]
    assert len({known(o, True)['data'] for o in plan}) == 3
    assert len({o.name for o in plan}) == 3


def test_images_are_redrawn_too(tmp_path):
    where = folder(tmp_path/'mine', parts=('train', 'val', 'test'))
    on_disk = file_names(folder_data(where, device='cpu'))
    redrawn = file_names(folder_data(where, device='cpu', data_seed=1))
    assert on_disk[1] != redrawn[1]
    assert on_disk[2] == redrawn[2]
    assert file_names(own_images(where, data_seed=3, device='cpu')) == on_disk  # without `redraw`


# Errors

@pytest.mark.parametrize('kwargs, message', [
    (dict(dataset='no/where', extract='lite0'), 'no/where is not there'),
    (dict(dataset='x.csv', extract='lite0'), 'x.csv is not there'),
    (dict(dataset='digits-lt', extract='lite0'), 'own, got digits-lt'),
    (dict(dataset='cifar100-lt', extract='lite0'), 'features of CIFAR-100-LT are cifar100-frozen-lt'),
    (dict(dataset='grocery', extract='lite1'), "Did you mean 'lite0'"),
    (dict(dataset='.', extract='resnet51'), "Did you mean 'resnet50'"),
    (dict(dataset='.', extract=3), 'extract: expected a text'),
    (dict(dataset='magnetic', extract='lite0', flip=True), 'flip: vectors are not augmented'),
    (dict(dataset='magnetic', extract='lite0', policy='randaugment'), 'policy: vectors are not augmented'),
    (dict(dataset='magnetic', extract='lite0', crop=4), 'crop: vectors are not augmented'),
    (dict(dataset='magnetic', crop=4, policy='randaugment'), 'Leave out crop, or policy'),
    (dict(dataset='magnetic', n_max=4), 'n_max: magnetic is long-tailed already'),
    (dict(dataset='unicode-names', size=8), 'size: unicode-names has no images'),
    (dict(dataset='landforms', data='here'), 'data: landforms is made by this package'),
    (dict(dataset='landforms', skip_broken=True), 'landforms has no broken images to skip'),
    (dict(dataset='landforms', imbalance_factor=10.), "imbalance factor can't be chosen"),
    (dict(dataset='grocry'), "Did you mean 'grocery'"),
])
def test_inapplicable_settings_are_refused(kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): RunSettings(**kwargs)


@pytest.mark.parametrize('name', folder_sets)
def test_a_missing_folder_says_what_to_put_where(name, tmp_path):
    with pytest.raises(FileNotFoundError) as e: RunSettings(dataset=name, data=str(tmp_path), extract='lite0').dls()
    message = str(e.value)
    assert message.startswith(f'{name}: {tmp_path/name} is not there. Expected there: the ')
    assert '`train`' in message and '--data' in message
    (tmp_path/name/'train').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='has no folders `train` and `test`'): beds.find_folder(name, tmp_path)
    args = ['compare', '--protocol', f'frozen-{name}', '--data', str(tmp_path), '--out', str(tmp_path/'out')]
    res = CliRunner().invoke(app, args)
    assert res.exit_code == 2 and 'Expected there: the' in res.output


def test_an_empty_class_is_named_and_left_out(tmp_path, colours):
    where = folder(tmp_path/'mine')
    (where/'nothing').mkdir()
    dls = RunSettings(dataset=str(where), extract='colours').dls()
    assert dls.c == 3
    assert any('No image in 1 folder, left out: nothing' in o for o in dls.notes)


def test_a_class_too_small_for_a_test_image_is_named(tmp_path, colours):
    where = folder(tmp_path/'mine', n=(12, 8, 2))
    in_a_run = RunSettings(dataset=str(where), extract='colours').dls()
    for dls in (in_a_run, folder_data(where, 'colours', data_seed=3)):
        assert sizes(dls)[0][2] == 2
        assert sizes(dls)[2][2] == 0
        assert any('No test image of 1 of 3 classes: class2' in o for o in dls.notes)


def test_broken_images_are_refused_or_left_out(tmp_path, colours):
    where = folder(tmp_path/'mine')
    (where/'class0'/'train0.png').write_bytes(b'half a download')
    for kwargs in (dict(extract='colours'), dict(crop=2, size=8)):
        with pytest.raises(UnreadableImage, match='train0.png'): RunSettings(dataset=str(where), **kwargs).dls()
        dls = RunSettings(dataset=str(where), skip_broken=True, **kwargs).dls()
        assert sum(map(sum, sizes(dls))) == 41
        assert [Path(o).name for o in dls.skipped] == ['train0.png']


# Other nets by name

def test_features_of_a_torchvision_net(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    weights = torchvision.models.get_model_weights('shufflenet_v2_x0_5').DEFAULT
    torch.manual_seed(0)
    net = torchvision.models.get_model('shufflenet_v2_x0_5').eval()
    (tmp_path/'hub/checkpoints').mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path/'hub/checkpoints'/Path(weights.url).name)
    extract = extractor_of('shufflenet_v2_x0_5')()
    assert isinstance(extract, TorchFeatures)
    assert (extract.size, extract.name) == (224, 'shufflenet_v2_x0_5')
    x = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        feats = extract(x)
        assert feats.shape == (2, 1024)
        assert torch.allclose(net.fc(feats), net(normalised(x, weights)), atol=1e-4)


def normalised(x, weights):
    preset = weights.transforms()
    return (x/255-torch.tensor(preset.mean)[:, None, None])/torch.tensor(preset.std)[:, None, None]


def test_weights_that_can_not_be_downloaded(monkeypatch):
    def offline(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(torchvision.models, 'get_model', offline)
    message = 'extract: the ImageNet weights of resnet18 could not be downloaded'
    with pytest.raises(OSError, match=message): extractor_of('resnet18')()
    assert extractor_of('lite0') is Lite0


# Text, table, digits

def test_text_depends_on_the_seed_alone():
    a, b, c = [unicode_names(o, device='cpu') for o in (0, 0, 1)]
    assert rows(a) == rows(b)
    assert all(x != y for x, y in zip(rows(a), rows(c)))  # test rows are drawn too
    assert sizes(a) == sizes(c)
    train, valid, test = sizes(a)
    assert a.c == 20
    assert min(test) >= 6 and min(valid) >= 1
    assert max(train)/min(train) > 100
    assert train == sorted(train, reverse=True)


def test_hashed_ngrams():
    x = hashed_ngrams(['LATIN SMALL LETTER A', 'LATIN SMALL LETTER B', 'SNOWMAN'])
    assert x.shape == (3, 512)
    assert np.allclose(np.linalg.norm(x, axis=1), 8)
    assert x[0]@x[1] > 3*(x[0]@x[2])
    assert np.array_equal(x[2], hashed_ngrams(['SNOWMAN'])[0])


def test_the_terrain_has_a_fixed_test_split():
    a, b, c = [landforms(o, device='cpu') for o in (0, 0, 1)]
    assert rows(a) == rows(b)
    assert [x == y for x, y in zip(rows(a), rows(c))] == [False, False, True]
    train, *others = sizes(a)
    assert others == [[20]*10, [100]*10]
    assert sum(train) == 5000
    assert max(train)/min(train) > 100
    assert not set(rows(a)[0]) & set(rows(a)[2])


def test_a_single_last_row_is_dropped():
    "BatchNorm can't train on it"
    dls = landforms(n_train=513, bs=128, device='cpu')
    assert len(dls.train_ds) % 128 == 1
    assert [len(y) for _, y in dls.train] == [128]*4


@pytest.mark.parametrize('make', [unicode_names, landforms])
def test_too_many_or_few_rows_are_refused(make):
    for n in (3, 10**6):
        with pytest.raises(ValueError, match='n_train: expected'): make(n_train=n)


def test_landforms_of_simple_surfaces():
    "A cone has a peak, upside down a pit; a ramp is a slope; a ridge falls on both sides; all forms are in the table"
    y, x = np.mgrid[-12:13, -12:13].astype(float)
    def middle(z, **kwargs): return geomorphons(z, (1, 1), **kwargs)[2, 2]
    assert middle(-np.hypot(x, y)) == 'PK'
    assert middle(np.hypot(x, y)) == 'PT'
    assert set(geomorphons(x, (1, 1)).flat) == {'SL'}
    assert set(geomorphons(0*x, (1, 1)).flat) == {'FL'}
    assert middle(-np.abs(x)) == 'RI'
    assert middle(np.abs(x)) == 'VL'
    assert middle(x/100) == 'FL'  # level up to 3 degrees
    assert middle(x/100, level=.1) == 'SL'
    rough = np.random.default_rng(0).normal(size=(60, 60))
    assert set(geomorphons(rough, (1, 1), reach=3).flat) <= set(beds._form_names)


@pytest.mark.parametrize('dataset, least', [('unicode-names', 60), ('landforms', 35)])
def test_rows_of_numbers_are_learned(dataset, least):
    res, _ = train_run(RunSettings(dataset=dataset, epochs=4), bar=False)
    chance = 100/len(res['classes'])
    assert res['accuracy']['all'] > least > 3*chance
    assert res['class_counts'] == sorted(res['class_counts'], reverse=True) or dataset == 'landforms'


def test_the_folder_of_digits_is_the_one_of_the_tutorial(tmp_path):
    dls = digits_folder(0, tmp_path, device='cpu')
    counts = dict(zip(dls.vocab, dls.class_counts.tolist()))
    assert counts == dict(five=2, four=20, nine=12, one=56, seven=32, two=2, zero=7)
    assert len(dls.test.dataset) == 140
    assert len(dls.valid_ds) == 30
    ones = np.flatnonzero(load_digits().target == 1)  # the first digit of the tutorial
    drawn = np.random.default_rng(0).permutation(ones)[:70]
    assert {int(Path(f).stem) for f in (tmp_path/'0/digits/train/one').iterdir()} == set(drawn.tolist())


def test_the_folder_of_digits_is_written_once(tmp_path):
    def times(): return {f: f.stat().st_mtime_ns for f in (tmp_path/'0').rglob('*.png')}
    dls = digits_folder(0, tmp_path, device='cpu')
    before = times()
    digits_folder(0, tmp_path, device='cpu')
    assert before == times()
    assert not list(tmp_path.glob('0/tmp*'))
    other = digits_folder(1, tmp_path, device='cpu')
    assert set(file_names(other)[0]) != set(file_names(dls)[0])
    assert other.class_counts.tolist() == dls.class_counts.tolist()


# Fine-tuning

def test_images_in_memory(tmp_path):
    where = folder(tmp_path/'mine', parts=('train', 'test'))
    dls = images_in_memory(where, crop=2, size=16, bs=8, device='cpu')
    x, _ = dls.one_batch()
    assert x.shape == (8, 3, 16, 16)
    assert dls.n_in == 3
    assert sizes(dls)[2] == [8, 4, 2]
    means = dls.valid.one_batch()[0].mean((2, 3))
    assert means.min() > -2.2 and means.max() < 2.7  # normalised by the statistics of ImageNet
    not_augmented = images_in_memory(where, crop=0, size=16, flip=False, device='cpu')
    assert torch.equal(dls.valid_ds.x, not_augmented.valid_ds.x)
    s = RunSettings(dataset=str(where), net='resnet8', crop=2, size=16, flip=False, epochs=6, bs=8)
    assert train_run(s, bar=False)[0]['accuracy']['all'] > 60


def finetuning(where, **kwargs):
    small = dict(dataset=str(where), size=32, crop=2, bs=8, epochs=3)
    return RunSettings(**{**protocols['finetune-magnetic'], **small, **kwargs})


def test_the_head_learns_first(tmp_path):
    where = folder(tmp_path/'mine', parts=('train', 'test'))
    weights, rates = {}, {}

    class Keep(Callback):
        def after_epoch(self):
            weights[self.epoch] = [[p.detach().clone() for p in o] for o in body_and_head(self.model)]
            rates[self.epoch] = [h['lr'] for h in self.opt.hypers]
    s = finetuning(where)
    body, head = body_and_head(s.learner().model)
    train_run(s, bar=False, cbs=Keep())
    body0, head0 = weights[0]
    assert all(torch.equal(a, b) for a, b in zip(body, body0))
    assert not torch.equal(head[0], head0[0])
    assert not any(torch.equal(a, b) for a, b in zip(body[:5], weights[1][0]))
    for e in (1, 2): assert rates[e][0] == pytest.approx(rates[e][1]/10)  # body_lr/lr


def test_fine_tuning_resumes(tmp_path):
    s = finetuning(folder(tmp_path/'mine', parts=('train', 'test')), reflective={})
    uninterrupted, _ = train_run(s, bar=False)

    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_run(s, bar=False, checkpoint=tmp_path/'fit.pt', cbs=Stop())
    resumed, _ = train_run(s, bar=False, checkpoint=tmp_path/'fit.pt')
    assert resumed['per_class'] == uninterrupted['per_class']
    assert resumed['history'] == uninterrupted['history']


def test_layers_that_were_frozen_before_stay_frozen(tmp_path):
    s = finetuning(folder(tmp_path/'mine'), epochs=2)
    learn = s.learner()
    body, _ = body_and_head(learn.model)
    body[0].requires_grad_(False)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01, cbs=HeadFirst(1))
    assert not body[0].requires_grad and all(p.requires_grad for p in body[1:])

    class Crash(Callback):
        def before_batch(self): raise CancelFitException
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=[HeadFirst(1), Crash()])
    assert all(p.requires_grad for p in body[1:])


def test_a_pretrained_net_has_a_new_head():
    net = finetuned_net('efficientnet-lite0', 7).eval()
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert net.pretrained
    body, head = body_and_head(net)
    assert {id(p) for p in head} == {id(p) for p in net.get_classifier().parameters()}
    assert len(body) > 100
    with pytest.raises(ValueError, match='has no pretrained weights'): finetuned_net('resnet8', 7)


# Names

def test_every_bed_is_a_protocol_of_a_known_data_set():
    assert list(protocols) == [
        'frozen', 'overfit', 'underfit', 'frozen-grocery', 'frozen-magnetic', 'finetune-grocery', 'finetune-magnetic',
        'text', 'tabular', 'digits', 'folder']
    for o in protocols.values(): assert RunSettings(**o).dataset in datasets
    for o in (10., 100.): assert RunSettings(**{**protocols['frozen'], 'imbalance_factor': o}).imbalance_factor == o
    assert spec_of('grocery')['make'] is grocery
    assert spec_of('grocery', 'lite0')['defaults']['net'] == 'mlp256'


def test_named_data_sets_are_listed(tmp_path):
    found = {o['name']: o for o in catalogue(tmp_path)}
    assert [found[o]['state'] for o in ('unicode-names', 'landforms', 'digits-folder')] == ['there']*3
    assert [found[o]['state'] for o in folder_sets] == ['missing']*2
    assert 'Expected there' in found['grocery']['missing']
    for o in ('train', 'test'): (tmp_path/'magnetic'/o/'free').mkdir(parents=True)
    assert {o['name']: o['state'] for o in catalogue(tmp_path)}['magnetic'] == 'there'
    for name, make in (('unicode-names', unicode_names), ('landforms', landforms)):
        dls = make(device='cpu')
        sizes = [found[name][k] for k in ('classes', 'train', 'test')]
        assert sizes == [dls.c, len(dls.train_ds), len(dls.test.dataset)]


@pytest.mark.parametrize('name', folder_sets)
def test_the_catalogue_agrees_with_the_data(name):
    "If the photographs are installed; otherwise, loading them fails too"
    row = next(o for o in catalogue() if o['name'] == name)
    if row['state'] == 'missing':
        with pytest.raises(FileNotFoundError): beds.find_folder(name)
        return
    dls = RunSettings(dataset=name, size=16, crop=0).dls()
    assert dls.c == row['classes']
    assert len(dls.test.dataset) == row['test']
    assert not row['notes']
    assert len(dls.train_ds)+len(dls.valid_ds) == row['train']+folder_sets[name].valid


@pytest.mark.slow
def test_evidence_names_the_bed(tmp_path):
    def plan_of(command): return dict(command=f'ltrl compare {command}', test=True, versions={})
    plan = make_plan(['bsce'], variants(), [0], paired_data=True, dataset='unicode-names', epochs=1)
    run_plan(plan, tmp_path/'a', 1, about=plan_of('--protocol text --redraw --out a'))
    about = json.loads((tmp_path/'a/compare.json').read_text())
    commands = dict(b='--protocol=frozen-magnetic --out b', c='--protocol underfit', d='--protocol digits --set tau=2')
    for name, command in commands.items():
        shutil.copytree(tmp_path/'a', tmp_path/name)
        write_json({**about, **plan_of(command)}, tmp_path/name/'compare.json')
    found = [(o['protocol'], o['bed'], o['rl']) for o in evidence(tmp_path)]
    # without the comparison whose settings differ from the protocol
    expected = [('text', 'text'), ('frozen-magnetic', 'frozen-magnetic'), ('P2u', 'underfit')]
    assert found == [(*o, rl) for o in expected for rl in (None, 'default')]


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    where = folder(tmp_path/'mine')
    options = ('--set extract=lite0 --set epochs=2 --set size=32 --methods bsce --rl off --seeds 2 --redraw --jobs 1 '
               f'--dataset {where} --out {tmp_path}/out')
    environment = {'FASTAI_HOME': str(tmp_path/'home'), 'PYTHONWARNINGS': 'ignore'}
    res = ltrl_process('compare', *options.split(), cwd=tmp_path, new_interpreter=True, **environment)
    assert res.returncode == 0, res.stderr
    for o in ('10 test images were drawn', '2 computed', 'mine-lite0'): assert o in res.stdout
    assert len(list((tmp_path/'home/data/ltrl-features').rglob('*.pt'))) == 1  # one file for all draws


def test_each_note_gives_one_warning(tmp_path, colours):
    where = folder(tmp_path/'mine')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', DataNote)
        dls = folder_data(where, 'colours', echo=lambda o: None)
    assert [str(o.message) for o in caught if o.category is DataNote] == list(dls.notes)
