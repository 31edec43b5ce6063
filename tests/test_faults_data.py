"Regression tests of faults in data; each has the number of the fault, a small input and the right outcome."
import codecs
import csv
import functools
import json
import os
import struct
import subprocess
import sys
import threading
import types
import unicodedata
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.tabular.all import CategoryBlock, RegressionBlock, TabularPandas
from fastai.vision.all import Datasets, L, Learner, PILImage, nn
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from typer.testing import CliRunner

from ltrl_fastai.data.audit import inspect_images
from ltrl_fastai.all import (
    broken_images, cifar100_frozen_lt, cifar10_lt, class_counts, dataset_targets, digits_lt, frozen_features,
    frozen_loaders, imagenet_lt, inaturalist18, landforms, load_cifar, long_tailed, open_image, own_images,
    unicode_names, CifarResNet, Lite0)
from ltrl_fastai.data import images as images_module
from ltrl_fastai.data.images import UnreadableImage
from ltrl_fastai.data import lists as lists_module
from ltrl_fastai.data.labelled import match_classes
from ltrl_fastai.data.listfiles import read_inat, read_list
from ltrl_fastai.data.lists import DataNote, hold_out, list_sets
from ltrl_fastai.data.own import read_folder
from ltrl_fastai.data.own import read_csv
from ltrl_fastai.deploy.calibration import read_prior
from ltrl_fastai.cli.main import app

pytestmark = pytest.mark.filterwarnings('ignore::ltrl_fastai.data.lists.DataNote')
small = dict(bs=4, size=16, device='cpu')
rng = np.random.RandomState(0)


def picture(file, value=None, mode='RGB'):
    "Save 8 by 8 pixels of noise, or of one level"
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (8, 8, 3) if mode == 'RGB' else (8, 8)
    pixels = rng.randint(0, 255, shape) if value is None else np.full(shape, value)
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def folders(root, counts):
    "A folder of `n` pictures for each name"
    for name, n in counts.items():
        for i in range(n): picture(root/name/f'{i}.png')
    return root


def table(root, rows, header='path,label', name='images.csv', make=True):
    "Write a CSV file, and the pictures that it lists"
    root.mkdir(parents=True, exist_ok=True)
    (root/name).write_text('\n'.join([header, *rows])+'\n')
    for line in rows if make else []: picture(root/line.split(',')[0].strip('"'))
    return root/name


def hundred(label=lambda i: 'ant' if i % 3 else 'bee'): return [f'{i:03}.png,{label(i)}' for i in range(100)]


# 7: nested folders

nested = {'a/apartment/outdoor': 6, 'c/church/outdoor': 5, 'c/church/indoor': 4, 'b/bar': 3}


def test_fault_07_nested_folders(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        dls = own_images(folders(tmp_path, nested), **small)
    assert list(dls.vocab) == ['apartment/outdoor', 'bar', 'church/outdoor', 'indoor']
    total = torch.bincount(torch.tensor([*dls.train_ds.targets, *dls.valid_ds.targets]))
    assert total.tolist() == [6, 3, 5, 4]
    assert not any('left out' in str(o.message) for o in caught)
    for file, y in zip([f for f, _ in dls.train_ds.items], dls.train_ds.targets):
        assert os.path.relpath(file, tmp_path).rsplit('/', 1)[0].endswith(dls.vocab[y])


def test_fault_07_classes_are_the_same_in_all_splits(tmp_path):
    for split in ('train', 'val', 'test'): folders(tmp_path/split, nested)
    lists, vocab = read_folder(tmp_path)
    assert vocab == ['apartment/outdoor', 'bar', 'church/outdoor', 'indoor']
    for images in lists.values():
        for path, y in zip(images.paths, images.labels):
            assert path.split('/', 1)[1].rsplit('/', 1)[0].endswith(vocab[y])
    folders(tmp_path/'test', {'outdoor': 1})
    with pytest.raises(ValueError, match='no training image is of class outdoor.*path below.*apartment/outdoor'):
        read_folder(tmp_path)


def test_fault_07_a_class_in_another_folder_of_the_test_split(tmp_path):
    "The grocery data have Vegetables/Mushroom/Brown-Cap in test, and Vegetables/Brown-Cap in training"
    folders(tmp_path/'train', {'v/cap': 3, 'v/leek': 4, 'f/pear': 3})
    folders(tmp_path/'test', {'v/mushroom/cap': 2, 'v/leek': 1, 'pear': 3})
    with pytest.warns(DataNote, match='test/v/mushroom/cap is taken for train/v/cap'):
        dls = own_images(tmp_path, **small)
    assert list(dls.vocab) == ['cap', 'leek', 'pear'] and dls.test.dataset.targets == [2]*3+[1]+[0]*2
    folders(tmp_path/'test', {'w/cap': 1})
    with pytest.raises(ValueError, match='no training image is of class v/mushroom/cap, w/cap.*there are v/cap'):
        read_folder(tmp_path)


def test_fault_07_parents_that_contradict_each_other_are_not_matched(tmp_path):
    "A test image of an apartment is none of a church"
    folders(tmp_path/'train', {'church/outdoor': 3, 'bar': 3})
    folders(tmp_path/'test', {'apartment/outdoor': 2, 'bar': 1})
    with pytest.raises(ValueError, match='no training image is of class apartment/outdoor.*there are church/outdoor'):
        read_folder(tmp_path)


@pytest.mark.parametrize('names', [
    ['ant/train', 'ant/test', 'bee/train', 'bee/test'], ['images/train/ant', 'images/train/bee', 'images/val/ant']])
def test_fault_07_splits_below_the_top_are_not_classes(tmp_path, names):
    with pytest.raises(ValueError, match='the splits lie below it, in .*Expected the splits first'):
        read_folder(folders(tmp_path, dict.fromkeys(names, 2)))
    assert read_folder(folders(tmp_path/'toys', {'toys/train': 2, 'toys/car': 2}))[1] == ['car', 'train']


def test_fault_07_names_from_a_mac_are_the_same_names(tmp_path):
    "A Mac writes an accent as a character of its own"
    composed, apart = (unicodedata.normalize(o, 'café') for o in ('NFC', 'NFD'))
    assert composed != apart
    folders(tmp_path, {f'train/{composed}': 4, 'train/tea': 4, f'test/{apart}': 2, 'test/tea': 1})
    lists, vocab = read_folder(tmp_path)
    assert vocab == [composed, 'tea'] and lists['test'].labels == [0, 0, 1]
    assert match_classes([composed, apart], [apart, 'tea']) == {composed: 0, apart: 0}
    rows = [f'{i}.png,{o}' for i, o in enumerate([composed, apart, 'tea', 'tea'])]
    lists, vocab = read_csv(table(tmp_path, rows))
    assert vocab == [composed, 'tea'] and lists['train'].labels == [0, 0, 1, 1]
    for other in (apart, f'{composed} '):
        root = folders(tmp_path/repr(other), {composed: 2, other: 2, 'tea': 2})
        with pytest.raises(ValueError, match='two folders have the same name .café., written differently'):
            read_folder(root)


def test_fault_07_a_class_above_a_class_and_names_of_three_parts(tmp_path):
    lists, vocab = read_folder(folders(tmp_path, {'x/y/z': 1, 'w/y/z': 2, 'z': 3, 'x/y': 4}))
    assert vocab == ['w/y/z', 'x/y/z', 'y', 'z']
    assert np.bincount(lists['train'].labels).tolist() == [2, 1, 4, 3]


def test_fault_07_classes_at_different_depths(tmp_path):
    "As in the Grocery Store Dataset: some kinds have varieties, some have none"
    kinds = ['Fruit/Apple/Golden', 'Fruit/Banana', 'Packages/Juice/Bravo', 'Packages/Juice/God/Apple', 'Greens/Leek']
    assert read_folder(folders(tmp_path, dict.fromkeys(kinds, 3)))[1] == ['Apple', 'Banana', 'Bravo', 'Golden', 'Leek']


def test_fault_07_empty_folders_are_named_by_their_path(tmp_path):
    folders(tmp_path, nested)
    (tmp_path/'c/church/crypt').mkdir()
    (tmp_path/'d/dock/inner').mkdir(parents=True)
    (tmp_path/'.cache').mkdir()
    with pytest.warns(DataNote, match=r'No image in 2 folders, left out: c/church/crypt, d\.'):
        own_images(tmp_path, **small)


def test_fault_07_superclasses_of_cifar_are_not_merged(tmp_path):
    for split in ('train', 'test'):
        for i in range(9): picture(tmp_path/split/f'c{i}/0.png')
        picture(tmp_path/split/'above/c0/0.png')
    with pytest.raises(ValueError, match='c0.*above/c0|above/c0.*c0'): load_cifar(10, tmp_path)


# 8: broken CSV files

def test_fault_08_a_quote_that_is_not_closed(tmp_path):
    rows = hundred()
    file = table(tmp_path, rows)
    rows[40] = '040.png,"bee'
    table(tmp_path, rows, make=False)
    with pytest.raises(ValueError, match=r'images\.csv:42: .*quote'): own_images(file, **small)


def quoted(at, line): return lambda rows: [*rows[:at], line, *rows[at+1:]]


@pytest.mark.parametrize('change,message', [
    (quoted(40, '040.png,"bee'), r':42: .*quote'),
    (quoted(99, '099.png,"bee'), r':101: .*quote'),
    (quoted(40, '040.png,bee"'), r':42: .*quote'),
    (quoted(40, '"040.png,bee'), r':42: .*quote'),
    (lambda rows: quoted(60, '060.png,ant"')(quoted(40, '040.png,"bee')(rows)), r':42: .*quote'),
    (lambda rows: quoted(60, '"060.png","ant"')(quoted(40, '040.png,"bee')(rows)), r':42: .*quote'),
    (quoted(40, '040.png'), r':42: expected 2 values \(path, label\), got 1'),
    (quoted(40, '040.png,bee,7'), r':42: expected 2 values \(path, label\), got 3'),
    (quoted(40, '040.png,bee,'), r':42: expected 2 values \(path, label\), got 3'),
    (quoted(40, '040.png,'), r':42: expected a path and a label'),
    (quoted(40, ' ,bee'), r':42: expected a path and a label'),
], ids=['open', 'open in the last line', 'closed only', 'open path', 'closed by another', 'all quoted after it', 'few',
        'many', 'comma at the end', 'no label', 'no path'])
def test_fault_08_the_line_is_named(tmp_path, change, message):
    table(tmp_path, hundred())
    file = table(tmp_path, change(hundred()), make=False)
    with pytest.raises(ValueError, match=r'images\.csv'+message): own_images(file, **small)


def test_fault_08_the_header(tmp_path):
    file = table(tmp_path, ['0.png,ant,bee'], 'path,label,label')
    with pytest.raises(ValueError, match=r"images\.csv:1: .*'label' is there twice"): own_images(file)
    file = table(tmp_path, ['0.png;ant'], 'path;label', make=False)
    with pytest.raises(ValueError, match=r"images\.csv:1: .*separated by ';'"): own_images(file)
    file.write_text('')
    with pytest.raises(ValueError, match=r'images\.csv: .*empty'): own_images(file)
    file.write_text('path,label\n')
    with pytest.raises(ValueError, match='a line for each training image'): own_images(file)


def test_fault_08_valid_files_are_still_read(tmp_path):
    "Quotes, commas, line breaks in an unused column, an index column without a name, and line ends of Windows"
    with open(tmp_path/'a.csv', 'w', newline='') as f:
        writer = csv.writer(f, quoting=csv.QUOTE_ALL, lineterminator='\r\n')
        writer.writerow(['', 'path', 'label', 'note'])
        for i in range(4):
            label = '5" pipe' if i % 2 else 'x,y'
            note = 'first\nsecond' if i == 2 else ''
            writer.writerow([i, f'a, b/{i}.png', label, note])
        f.write('\r\n')
    lists, vocab = read_csv(tmp_path/'a.csv')
    assert vocab == ['5" pipe', 'x,y']
    assert lists['train'].paths == [f'a, b/{i}.png' for i in range(4)]
    assert lists['train'].lines == [2, 3, 4, 6]


def test_fault_08_rows_swallowed_by_an_unused_column(tmp_path):
    rows = [f'{i}.png,{"ab"[i%2]},fine' for i in range(9)]
    rows[3] = '3.png,b,"good'
    rows[6] = '6.png,a,bad"'
    file = table(tmp_path, rows, 'path,label,note', make=False)
    with pytest.raises(ValueError, match=r'images\.csv:5: .*quote'): read_csv(file)


# 10: pixels of more than 8 bits, and of other kinds

levels = [0, 4000, 20000, 50000, 65535]


@pytest.mark.parametrize('ending', ['png', 'tif'])
def test_fault_10_images_of_16_bit(tmp_path, ending):
    for name in 'ab':
        for i, v in enumerate(levels):
            (tmp_path/name).mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8), v, np.uint16)).save(tmp_path/name/f'{i}.{ending}')
    dls = own_images(tmp_path, bs=4, n_valid=1, device='cpu')
    ds = dls.train_ds
    found = {int(np.asarray(ds[i][0].convert('L'))[0, 0]) for i in range(len(ds))}
    assert found <= {round(v/257) for v in levels}
    assert len(found) > 2


@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm'])
def test_fault_10_levels_keep_their_order(tmp_path, ending):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path/f'ramp.{ending}')
    got = np.asarray(open_image(tmp_path/f'ramp.{ending}'))
    assert got.shape == (16, 16, 3)
    assert (got[..., 0].ravel() == np.arange(256)).all()


def test_fault_10_other_kinds_of_pixels(tmp_path):
    rgb = Image.fromarray(rng.randint(0, 255, (8, 8, 3)).astype(np.uint8))
    grey = rgb.convert('L')
    kinds = {
        'rgb.png': (rgb, rgb), 'grey.png': (grey, grey),
        'palette.png': (rgb.quantize(16), rgb.quantize(16).convert('RGB')),
        'one bit.png': (grey.convert('1'), grey.convert('1').convert('L')), 'alpha.png': (rgb.convert('RGBA'), rgb),
        'grey alpha.png': (grey.convert('LA'), grey),
        'one bit.tif': (grey.convert('1'), grey.convert('1').convert('L')),
        'cmyk.tif': (rgb.convert('CMYK'), rgb.convert('CMYK').convert('RGB')),
        'big.tif': (Image.fromarray(np.full((8, 8), 257*9, '>u2')), Image.new('L', (8, 8), 9)),
    }
    for name, (image, right) in kinds.items():
        image.save(tmp_path/name)
        assert (np.asarray(open_image(tmp_path/name)) == np.asarray(right.convert('RGB'))).all(), name


@pytest.mark.parametrize('pixels', [np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8),
                                    np.arange(64, dtype=np.int32).reshape(8, 8)*70000], ids=['float', 'int32'])
def test_fault_10_pixels_whose_range_is_not_known_are_refused_by_name(tmp_path, pixels):
    folders(tmp_path, dict(a=4, b=4))
    Image.fromarray(pixels).save(tmp_path/'a/x.tif')
    with pytest.raises(ValueError, match=r'a/x\.tif.*8 bit'): own_images(tmp_path, **small)


def test_fault_10_white_is_zero(tmp_path):
    info = ImageFileDirectory_v2()
    info[262] = 0
    Image.fromarray(np.full((8, 8), 257*200, np.uint16)).save(tmp_path/'x.tif', tiffinfo=info)
    with Image.open(tmp_path/'x.tif') as im: white_is_zero = im.tag_v2[262] == 0
    assert int(np.asarray(open_image(tmp_path/'x.tif'))[0, 0, 0]) == (55 if white_is_zero else 200)


def test_fault_10_orientation_is_handled_as_fastai_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.randint(0, 255, (8, 16, 3)).astype(np.uint8)).save(tmp_path/'x.jpg', exif=exif)
    assert (np.asarray(open_image(tmp_path/'x.jpg')) == np.asarray(PILImage.create(tmp_path/'x.jpg'))).all()


def test_fault_10_decoded_copies_of_a_folder(tmp_path):
    "The fast path of small images reads 16 bits in the same way"
    for split in ('train', 'test'):
        for c in range(10):
            (tmp_path/split/f'c{c}').mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 257*(10*c+3), np.uint16)).save(tmp_path/split/f'c{c}/0.png')
    (x, y), _, _ = load_cifar(10, tmp_path)
    assert x.shape == (10, 3, 8, 8)
    assert [int(o.unique()) for o in x] == [10*c+3 for c in range(10)]


# 12: caches of other content

class Scaled:
    "Features that depend on an argument and on weights"
    name = 'scaled'
    def __init__(self, factor=1, weights=None):
        self.factor = factor
        self.weights = torch.ones(1) if weights is None else weights
    def __call__(self, x): return x.float().mean((2, 3))*self.factor*self.weights


def features(extract, folder, images=None, **kw):
    x = torch.arange(5*3*4, dtype=torch.uint8).view(5, 3, 2, 2) if images is None else images
    return frozen_features(x, extract, folder, **kw)


def scaled_by(factor): return lambda o: o.float().mean((2, 3))*factor


def calling(net): return lambda o: net(o)


def test_fault_12_features_depend_on_the_extractor(tmp_path):
    x = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2)
    plain = x.float().mean((2, 3))
    assert torch.equal(features(Scaled(1), tmp_path).float(), plain)
    assert torch.equal(features(Scaled(2), tmp_path).float(), 2*plain)
    assert torch.equal(features(Scaled(weights=torch.full((1,), 3.)), tmp_path).float(), 3*plain)
    assert torch.equal(features(functools.partial(Scaled.__call__, Scaled(4)), tmp_path).float(), 4*plain)


def test_fault_12_features_depend_on_functions_and_modules(tmp_path):
    x = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2)
    plain = x.float().mean((2, 3))
    for factor in (1, 2):
        assert torch.equal(features(scaled_by(factor), tmp_path).float(), factor*plain)
    class Net(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(float(w)))
        def forward(self, o): return o.float().mean((2, 3))*self.w
    for w in (1, 2):
        assert torch.equal(features(Net(w), tmp_path).float(), w*plain)
        assert torch.equal(features(calling(Net(w+2)), tmp_path).float(), (w+2)*plain)
    for dims in ((1, 2), (2, 3)):
        assert torch.equal(features(functools.partial(torch.sum, dim=dims), tmp_path).float(), x.sum(dims).float())


def test_fault_12_features_depend_on_globals_of_a_function(tmp_path):
    x = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2)
    for factor in (1, 2):
        space = dict(factor=factor)
        exec('def extract(o): return o.float().mean((2, 3))*factor', space)
        assert torch.equal(features(space['extract'], tmp_path).float(), factor*x.float().mean((2, 3)))


def test_fault_12_cached_features_are_not_computed_again(tmp_path):
    calls = []
    class Counted(Scaled):
        def __call__(self, x):
            calls.append(len(x))
            return super().__call__(x)
    first = features(Counted(2), tmp_path)
    assert sum(calls) == 5
    assert torch.equal(features(Counted(2), tmp_path), first)
    assert sum(calls) == 5


def test_fault_12_other_chunks_and_other_shapes(tmp_path):
    x = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2)
    for chunk in (3, 2, 1, 5):
        assert torch.equal(features(Scaled(), tmp_path, chunk=chunk).float(), x.float().mean((2, 3)))
    assert features(Scaled(), tmp_path, x.view(5, 6, 2, 1)).shape == (5, 6)


def test_fault_12_a_damaged_file_is_computed_again(tmp_path):
    first = features(Scaled(), tmp_path)
    files = [f for f in tmp_path.rglob('*') if f.is_file()]
    assert files and not any(f.name.startswith('.') for f in files)
    for f in files: f.write_bytes(b'half')
    with pytest.warns(UserWarning, match='computed again'): assert torch.equal(features(Scaled(), tmp_path), first)


def test_fault_12_lite0_of_two_sizes(tmp_path):
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    large = features(Lite0(64), tmp_path, x)
    little = features(Lite0(32), tmp_path, x)
    assert not torch.equal(large, little)
    assert torch.equal(little, features(Lite0(32), tmp_path/'other', x))
    assert torch.equal(features(Lite0(64), tmp_path, x), large)


def test_fault_12_a_partial_extractor_of_cifar(tmp_path):
    for split, n in (('train', 4), ('test', 1)):
        for c in range(100):
            for i in range(n): picture(tmp_path/'cifar'/split/f'c{c:02}/{i}.png', c)
    kw = dict(path=tmp_path/'cifar', n_max=3, folder=tmp_path/'kept', echo=lambda o: None, device='cpu')
    by = {f: cifar100_frozen_lt(3, extract=functools.partial(Scaled, f), **kw) for f in (1, 2)}
    assert torch.equal(2*by[1].train_ds.x, by[2].train_ds.x)
    assert torch.equal(cifar100_frozen_lt(3, extract=Scaled(2), **kw).train_ds.x, by[2].train_ds.x)
    assert torch.equal(cifar100_frozen_lt(3, extract=Scaled, **kw).train_ds.x, by[1].train_ds.x)


def test_fault_12_the_decoded_copy_depends_on_names_and_contents(tmp_path):
    for split in ('train', 'test'):
        for c in range(10): picture(tmp_path/split/f'c{c}/0.png', c)
    load_cifar(10, tmp_path)
    for split in ('train', 'test'): (tmp_path/split/'c0').rename(tmp_path/split/'z')
    (x, y), _, vocab = load_cifar(10, tmp_path)
    assert vocab[-1] == 'z' and int(x[y == 9].unique()) == 0


@pytest.fixture
def shades(tmp_path):
    "Dark, light and a few grey pictures, in folders of different depths, with a test split"
    for split, n in (('train', 12), ('test', 3)):
        for name, value, m in (('dark', 10, n), ('other/light', 240, n), ('other/grey', 120, max(2, n//3))):
            for i in range(m): picture(tmp_path/'shades'/split/name/f'{i}.png', value+i)
    return tmp_path/'shades'


def test_fault_12_frozen_loaders_of_a_folder(shades, tmp_path):
    dls = frozen_loaders(shades, Scaled(2), folder=tmp_path/'kept', bs=4, device='cpu')
    assert list(dls.vocab) == ['dark', 'grey', 'light']
    assert class_counts(dls).tolist() == [10, 3, 10]
    x, y = dls.test.one_batch()
    assert x.dtype == torch.float32
    assert x.shape == (8, 3)
    assert y.tolist() == [0]*3+[1]*2+[2]*3
    assert x[:, 0].tolist() == [20., 22., 24., 240., 242., 480., 482., 484.]
    ranges = [(20, 42), (240, 246), (480, 502)]  # by class
    for ds in (dls.train_ds, dls.valid_ds):
        for i in range(len(ds)):
            feature, label = ds[i]
            lower, upper = ranges[int(label)]
            assert lower <= feature[0] <= upper


def test_fault_12_frozen_loaders_of_a_csv_file(tmp_path):
    rows = [f'{i}.png,{"ant" if i < 12 else "bee"},{"test" if i % 4 == 0 else "train"}' for i in range(20)]
    file = table(tmp_path/'mine', rows, 'path,label,split')
    for i in range(20): picture(tmp_path/f'mine/{i}.png', 10*i)
    dls = frozen_loaders(file, Scaled, folder=tmp_path/'kept', device='cpu')
    assert list(dls.vocab) == ['ant', 'bee']
    assert dls.test.dataset.x[:, 0].tolist() == [0., 40., 80., 120., 160.]
    assert dls.name == 'images'
    assert any('validation images were drawn' in o for o in dls.notes)


def test_fault_12_frozen_loaders_compute_only_changed_images(shades, tmp_path):
    seen = []
    class Watched(Scaled):
        def __call__(self, x):
            seen.extend(x[:, 0, 0, 0].tolist())
            return super().__call__(x)
    def load(*args, **kw):
        seen.clear()
        return frozen_loaders(shades, Watched(*args), folder=tmp_path/'kept', device='cpu', **kw)
    load()
    assert len(seen) == 36
    load(data_seed=1)
    assert not seen
    load(2)
    assert len(seen) == 36
    picture(shades/'train/dark/0.png', 77)
    load()
    assert seen == [77]
    load(size=16)
    assert len(seen) == 36
    picture(shades/'test/dark/new.png', 33)
    dls = load()
    assert seen == [33] and dls.test.dataset.x[:, 0].tolist() == [10., 11., 12., 33., 120., 121., 240., 241., 242.]


# 14: validation images of every class

def balanced(n=40, c=5):
    y = torch.arange(c).repeat(n)
    return (torch.arange(n*c)[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8).contiguous(), y), c


def lists_of(dls): return [{int(x[0, 0, 0]) for x in ds.x} for ds in (dls.train_ds, dls.valid_ds)]


def test_fault_14_the_head_has_validation_images():
    train, c = balanced()
    with pytest.warns(DataNote, match='8 images of class a were taken out of training') as caught:
        dls = long_tailed(train, train, list('abcde'), 10, n_valid=10, device='cpu')
    assert class_counts(dls.valid_ds, 5).tolist() == [8, 10, 10, 10, 10]
    assert class_counts(dls).tolist() == [32, 22, 12, 7, 4]
    assert any('8 images of class a' in o for o in dls.notes) and len(caught) == 1
    a, b = lists_of(dls)
    assert not a & b


def test_fault_14_keep_train_keeps_the_published_training_set():
    train, c = balanced()
    with pytest.warns(DataNote, match='No validation image of 1 of 5 classes: a') as caught:
        dls = long_tailed(train, train, list('abcde'), 10, n_valid=10, keep_train=True, device='cpu')
    assert class_counts(dls).tolist() == [40, 22, 12, 7, 4]
    assert class_counts(dls.valid_ds, 5).tolist() == [0, 10, 10, 10, 10]
    assert len(caught) == 1
    more, _ = lists_of(dls)
    fewer, held = lists_of(long_tailed(train, train, list('abcde'), 10, n_valid=10, device='cpu'))
    assert fewer < more
    assert more-fewer < held


def test_fault_14_cifar(tmp_path):
    for split, n in (('train', 50), ('test', 1)):
        for c in range(10):
            for i in range(n): picture(tmp_path/split/f'c{c}/{i:02}.png')
    dls = cifar10_lt(10, tmp_path, device='cpu')
    assert class_counts(dls.valid_ds, 10).min() > 0
    assert class_counts(dls)[0] == 40
    assert class_counts(dls)[1:].tolist() == [38, 29, 23, 17, 13, 10, 8, 6, 5]
    published = cifar10_lt(10, tmp_path, device='cpu', keep_train=True)
    assert class_counts(published).tolist() == [50, 38, 29, 23, 17, 13, 10, 8, 6, 5]
    assert class_counts(published.valid_ds, 10)[0] == 0


def test_fault_14_a_balanced_training_set_has_validation_images_too():
    train, c = balanced()
    dls = long_tailed(train, train, list('abcde'), 1, n_valid=3, device='cpu')
    assert class_counts(dls).tolist() == [37]*5
    assert class_counts(dls.valid_ds).tolist() == [3]*5
    with pytest.raises(ValueError, match='none is left for validation'):
        long_tailed(train, train, list('abcde'), 1, keep_train=True)


def test_fault_14_digits_need_no_note():
    with warnings.catch_warnings():
        warnings.simplefilter('error', DataNote)
        dls = digits_lt(device='cpu')
    assert class_counts(dls.valid_ds).tolist() == [10]*10
    assert class_counts(dls)[0] == 120
    assert not dls.notes


# 16: broken photographs

def cut(file, share=.5):
    "Keep the first half of a file"
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data)*share)])
    return file


@pytest.fixture
def photos(tmp_path):
    for name, n in (('ant', 12), ('bee', 8), ('cat', 6)):
        for i in range(n):
            (tmp_path/name).mkdir(exist_ok=True)
            Image.fromarray(rng.randint(0, 255, (90, 120, 3)).astype(np.uint8)).save(tmp_path/name/f'{i}.jpg')
    return tmp_path


def break_two(photos):
    cut(photos/'ant/3.jpg')
    (photos/'bee/5.jpg').write_bytes(b'no image')
    return photos


def test_fault_16_broken_photographs_are_named_before_training(photos):
    with pytest.raises(ValueError) as e: own_images(break_two(photos), **small)
    message = str(e.value)
    assert message.startswith('2 of 26 images')
    assert 'ant/3.jpg' in message
    assert 'bee/5.jpg' in message
    assert '--skip-broken' in message
    assert '\n' not in message


def test_fault_16_broken_photographs_can_be_left_out(photos):
    with pytest.warns(DataNote, match='2 images can.t be read and are left out: .*ant/3.jpg'):
        dls = own_images(break_two(photos), skip_broken=True, **small)
    assert len(dls.train_ds)+len(dls.valid_ds) == 24
    assert sorted(os.path.relpath(o, photos) for o in dls.skipped) == ['ant/3.jpg', 'bee/5.jpg']
    for batch in dls.train: assert len(batch[0])
    assert own_images(photos, skip_broken=True, **small).listing() == dls.listing()


def test_fault_16_without_the_check_the_loader_names_the_file(photos):
    dls = own_images(cut(photos/'ant/3.jpg').parent.parent, check=False, **small)
    with pytest.raises(ValueError, match=r'ant/3\.jpg'):
        for dl in dls.loaders: list(dl)


@pytest.mark.parametrize('share', [.98, .6, .1, 0])
@pytest.mark.parametrize('ending', ['jpg', 'png', 'bmp', 'tif', 'gif', 'webp'])
def test_fault_16_truncated_files_of_every_format(tmp_path, ending, share):
    files = [tmp_path/f'{i}.{ending}' for i in range(2)]
    for f in files: Image.fromarray(rng.randint(0, 255, (120, 90, 3)).astype(np.uint8)).save(f)
    assert broken_images(files) == {}
    assert list(broken_images([files[0], cut(files[1], share)])) == [files[1]]


def test_fault_16_a_class_whose_images_are_all_broken(photos):
    for f in (photos/'cat').iterdir(): f.write_bytes(b'')
    with pytest.raises(ValueError, match='cat.*none of its .*images can be read'):
        own_images(photos, skip_broken=True, **small)


def test_fault_16_a_csv_file_names_the_line(photos):
    rows = [f'{f.relative_to(photos)},{f.parent.name}' for f in sorted(photos.rglob('*.jpg'))]
    (photos/'x.csv').write_text('\n'.join(['path,label', *rows])+'\n')
    cut(photos/'bee/0.jpg')
    with pytest.raises(ValueError, match=rf'x\.csv:{rows.index("bee/0.jpg,bee")+2}: bee/0\.jpg'):
        own_images(photos/'x.csv', **small)


def test_fault_16_all_broken_small_images_are_named(tmp_path):
    for split in ('train', 'test'):
        for c in range(10): picture(tmp_path/split/f'c{c}/0.png')
    cut(tmp_path/'train/c3/0.png')
    (tmp_path/'train/c7/0.png').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'2 of 10 images.*c3/0\.png.*c7/0\.png'): load_cifar(10, tmp_path)


def test_fault_16_files_are_read_again_only_if_they_change(photos, monkeypatch):
    read = []
    fault_of = images_module._fault_of
    monkeypatch.setattr(images_module, '_fault_of', lambda f: read.append(str(f)) or fault_of(f))
    files = sorted(photos.rglob('*.jpg'))
    images_module._seen_whole.clear()
    kept = photos/'.seen'
    assert images_module.broken_images(files, kept, at_least=1) == {}
    assert len(read) == 26
    images_module._seen_whole.clear()
    assert images_module.broken_images(files, kept, at_least=1) == {}
    assert len(read) == 26
    cut(photos/'cat/0.jpg')
    assert list(images_module.broken_images(files, kept, at_least=1)) == [photos/'cat/0.jpg']
    assert len(read) == 27


def command(monkeypatch, *args):
    monkeypatch.setenv('LTRL_CHECK_IMAGES', '1')
    return CliRunner().invoke(app, [str(o) for o in args])


quick = ('--net', 'resnet8', '--size', '16', '--epochs', '1', '--no-rl', '--out', 'out')


def test_fault_16_the_command_line_names_them(photos, monkeypatch):
    monkeypatch.chdir(break_two(photos))
    result = command(monkeypatch, 'train', '--dataset', photos, *quick)
    assert result.exit_code == 2
    assert result.output.startswith("Error: 2 of 26 images can't be read")
    assert result.output.count('\n') == 1
    result = command(monkeypatch, 'compare', '--dataset', photos, '--out', 'all', '--seeds', '1')
    assert result.exit_code == 2
    assert result.output.startswith("Error: 2 of 26 images can't be read")


def test_fault_16_the_command_line_leaves_them_out(photos, monkeypatch):
    monkeypatch.chdir(break_two(photos))
    result = command(monkeypatch, 'train', '--dataset', photos, *quick, '--skip-broken')
    assert result.exit_code == 0, result.output
    assert "Note: 2 images can't be read and are left out: " in result.output
    saved = json.loads((photos/'out/result.json').read_text())
    assert sorted(saved['skipped']) == ['ant/3.jpg', 'bee/5.jpg']
    assert sum(saved['class_counts']) == 20


def test_fault_16_no_check_on_the_command_line(photos, monkeypatch):
    monkeypatch.setattr(lists_module, 'broken_images', lambda *args: 1/0)
    monkeypatch.chdir(photos)
    result = command(monkeypatch, 'train', '--dataset', photos, *quick, '--no-check')
    assert result.exit_code == 0, result.output
    assert command(monkeypatch, 'train', '--skip-broken').exit_code == 2
    for i in range(12): cut(photos/f'ant/{i}.jpg')
    result = command(monkeypatch, 'train', '--dataset', photos, *quick, '--no-check', '--force')
    assert result.exit_code == 2
    assert 'ant/' in result.output.splitlines()[-1]
    assert "can't be read" in result.output.splitlines()[-1]
    assert 'Traceback' not in result.output


# 17: files from other programs

words = [f'{i}.png,{"ant" if i % 2 else "bee"}' for i in range(12)]


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-8-sig', 'utf-32'])
def test_fault_17_csv_with_a_byte_order_mark(tmp_path, encoding):
    file = table(tmp_path, words)
    file.write_text(file.read_text(), encoding=encoding)
    assert own_images(file, **small).vocab == ['ant', 'bee']


@pytest.mark.parametrize('encoding,message', [
    ('cp1252', r'images\.csv:3: .*cp1252.*café.*UTF-8'), ('utf-16-le', r'images\.csv: .*UTF-16.*UTF-8'),
    ('utf-16-be', r'images\.csv: .*UTF-16.*UTF-8')])
def test_fault_17_csv_in_another_encoding(tmp_path, encoding, message):
    file = table(tmp_path, words)
    file.write_text('path,label\n0.png,bee\n1.png,café\n', encoding=encoding)
    with pytest.raises(ValueError, match=message): own_images(file, **small)


def test_fault_17_a_mark_in_a_list(tmp_path):
    for encoding in ('utf-8-sig', 'utf-16', 'utf-8'):
        (tmp_path/'a.txt').write_text('train/n01/a.JPEG 0\ntrain/n02/é.JPEG 1\n', encoding=encoding)
        assert read_list(tmp_path/'a.txt').paths == ['train/n01/a.JPEG', 'train/n02/é.JPEG']
    (tmp_path/'a.txt').write_bytes(codecs.BOM_UTF8+b'\n')
    with pytest.raises(ValueError, match='is empty'): read_list(tmp_path/'a.txt')


def test_fault_17_a_mark_in_json(tmp_path):
    text = '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 0}]}'
    (tmp_path/'train2018.json').write_text(text, encoding='utf-8-sig')
    assert read_inat(tmp_path/'train2018.json')[0].paths == ['a.jpg']


@pytest.mark.parametrize('yes,no', [('1.0', '0.0'), ('True', 'False'), ('yes', 'no'), ('1', '0'), ('Y', 'N'),
                                    ('TRUE', 'FALSE'), ('t', 'f')])
@pytest.mark.parametrize('name', ['is_valid', 'Is_Valid'])
def test_fault_17_is_valid(tmp_path, yes, no, name):
    rows = [f'{o},{yes if i%4 == 3 else no}' for i, o in enumerate(words)]
    lists, _ = read_csv(table(tmp_path, rows, f'path,label,{name}'))
    assert len(lists['valid']) == 3
    assert len(lists['train']) == 9


def test_fault_17_folds(tmp_path):
    file = table(tmp_path, [f'{o},{i%5}' for i, o in enumerate(words)], 'path,label,fold')
    with pytest.raises(ValueError, match=r"images\.csv:2: .*fold.*'0'.*is_valid"): own_images(file, **small)
    file = table(tmp_path, [f'{o},{i%5}.0' for i, o in enumerate(words)], 'path,label,subset')
    with pytest.raises(ValueError, match=r"images\.csv:2: .*subset.*'0\.0'.*is_valid"): own_images(file, **small)
    file = table(tmp_path, [f'{o},maybe' for o in words], 'path,label,is_valid')
    with pytest.raises(ValueError, match=r"images\.csv:2: expected True or False as is_valid, got 'maybe'"):
        own_images(file, **small)


def test_fault_17_a_class_called_train(tmp_path):
    assert own_images(folders(tmp_path, dict(bus=5, car=6, train=7)), **small).vocab == ['bus', 'car', 'train']
    folders(tmp_path/'train', dict(steam=3))
    with pytest.raises(ValueError, match='train: .* bus, car lie beside it'): own_images(tmp_path, **small)


def test_fault_17_a_class_called_test_or_train_in_a_csv_file(tmp_path):
    file = table(tmp_path, [f'{i}.png,{"train" if i%2 else "test"}' for i in range(12)])
    assert own_images(file, **small).vocab == ['test', 'train']


def test_fault_17_splits_with_classes_of_those_names(tmp_path):
    for split in ('train', 'test'): folders(tmp_path/split, dict(train=5, bus=5))
    assert own_images(tmp_path, **small).vocab == ['bus', 'train']


@pytest.mark.parametrize('name', ['test', 'valid'])
def test_fault_17_a_flat_test_folder(tmp_path, name):
    folders(tmp_path/'train', dict(a=5, b=5))
    for i in range(3): picture(tmp_path/name/f'{i}.png')
    with pytest.raises(ValueError, match=rf'{name}: 3 images .*labels.*test_dl'): own_images(tmp_path, **small)


def test_fault_17_folders_beside_the_splits(tmp_path):
    for split in ('train', 'valid'): folders(tmp_path/split, dict(a=5, b=5))
    folders(tmp_path, dict(unlabelled=2))
    with pytest.warns(DataNote, match='unlabelled.*left out'): assert own_images(tmp_path, **small).vocab == ['a', 'b']


def test_fault_17_a_file_where_a_folder_was_expected(tmp_path):
    file = table(tmp_path, words)
    with pytest.raises(ValueError, match='expected a folder'): read_folder(file)
    with pytest.raises(ValueError, match='expected a CSV file'): read_csv(tmp_path)
    (tmp_path/'kept').write_text('')
    with pytest.raises(ValueError, match='kept.*is a file'): features(Scaled(), tmp_path/'kept')


def test_fault_17_hidden_files_and_other_files(tmp_path):
    folders(tmp_path, dict(a=4, b=4))
    for name in ('a/._0.png', '.git/x.png', 'b/.DS_Store'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(b'x')
    assert len(own_images(tmp_path, **small).listing()) == 8
    (tmp_path/'arrays/a').mkdir(parents=True)
    for i in range(3): (tmp_path/f'arrays/a/{i}.npy').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'found no image.*3 files.*\.npy'): read_folder(tmp_path/'arrays')


# 18: targets that are not class indices

def tabular(block):
    frame = pd.DataFrame(dict(x=range(6), y=[.2, .9, 1.7, 1., 2., 3.]))
    splits = [0, 1, 2, 3], [4, 5]
    return TabularPandas(frame, cont_names=['x'], y_names='y', y_block=block, splits=splits).dataloaders(bs=2)


class Labelled:
    def __init__(self, targets): self.targets = targets
    def __len__(self): return len(self.targets)


def test_fault_18_a_tabular_regression():
    with pytest.raises(TypeError, match='floating.*0.2.*regression'): class_counts(tabular(RegressionBlock()))
    assert class_counts(tabular(CategoryBlock())).sum() == 4


@pytest.mark.parametrize('targets,message', [
    ([.2, .9, 1.7], 'floating.*0.2'), (np.array([.2, .9, 1.7]), 'floating.*0.2'),
    (torch.tensor([.2, .9, 1.7]), 'floating.*0.2'),
    ([0, 1, 1.5], 'floating.*1.5'), ([torch.tensor(.5), torch.tensor(1)], 'floating.*0.5'),
    (['ant', 'bee'], "text.*'ant'"), (np.array(['ant', 'bee']), "text.*'ant'"),
    ([0, None, 1], 'None'), ([0, float('nan')], 'floating.*nan'),
    ([np.float32(1.5)], 'floating.*1.5'), ([{'a': 1}], 'dict'), (pd.Series([.5, 1.5]), 'floating.*0.5'),
], ids=str)
def test_fault_18_targets_that_are_no_class_indices(targets, message):
    with pytest.raises(TypeError, match=message): class_counts(Labelled(targets))


def test_fault_18_pairs_and_data_sets_of_fastai():
    with pytest.raises(TypeError, match='floating.*0.5'): class_counts([(0, .5), (1, 1.5)])
    numbers = Datasets(L(1., 2., 3.), [[lambda o: o], [lambda o: torch.tensor(o)]])
    with pytest.raises(TypeError, match='floating.*1.0'): class_counts(numbers)


@pytest.mark.parametrize('targets', [
    [0, 1, 1], np.array([0, 1, 1], np.uint8), torch.tensor([0, 1, 1]), [torch.tensor(0), torch.tensor(1), np.int32(1)],
    [False, True, True], pd.Series([0, 1, 1]),
    [[0], [1], [1]], torch.tensor([[0], [1], [1]]), np.array([False, True, True])], ids=str)
def test_fault_18_class_indices_are_counted_as_before(targets):
    assert class_counts(Labelled(targets)).tolist() == [1, 2]
    assert dataset_targets(Labelled(targets)) == [0, 1, 1]


# Variants of these faults

def test_fault_07_variants_links_spaces_and_other_letters(tmp_path):
    folders(tmp_path/'train', {'cold drinks/Äpfel saft': 3, 'warm drinks/Äpfel saft': 3, 'tea': 3})
    (tmp_path/'train/linked').symlink_to(tmp_path/'train/tea')
    _, vocab = read_folder(tmp_path)
    assert vocab == ['cold drinks/Äpfel saft', 'linked', 'tea', 'warm drinks/Äpfel saft']


def test_fault_07_variants_validation_part_of_its_own_without_one_class(tmp_path):
    folders(tmp_path/'Training', nested)
    folders(tmp_path/'dev', {'c/church/indoor': 2, 'a/apartment/outdoor': 1})
    lists, vocab = read_folder(tmp_path)
    assert [vocab[y] for y in lists['valid'].labels] == ['apartment/outdoor', 'indoor', 'indoor']
    with pytest.warns(DataNote, match='No validation image of 2 of 4 classes: bar, church/outdoor'):
        own_images(tmp_path, **small)


def test_fault_07_variants_sessions_within_classes(tmp_path):
    "Folders with the same name in two classes are separate classes"
    _, vocab = read_folder(folders(tmp_path, {'cat/2020': 2, 'dog/2020': 2, 'dog/2021': 1}))
    assert vocab == ['2021', 'cat/2020', 'dog/2020']


def test_fault_08_variants_old_line_ends(tmp_path):
    file = table(tmp_path, hundred())
    file.write_bytes(file.read_bytes().replace(b'\n', b'\r'))
    assert len(read_csv(file)[0]['train']) == 100
    file.write_bytes(file.read_bytes().replace(b'\r050.png,', b'\r050.png,"'))
    with pytest.raises(ValueError, match=r'images\.csv:52: .*quote'): read_csv(file)


def test_fault_08_variants_spaces_beside_quotes(tmp_path):
    assert read_csv(table(tmp_path, ['0.png, "bee"', '1.png,bee', '"2.png", ant'], make=False))[1] == ['ant', 'bee']


def test_fault_08_variants_a_broken_header(tmp_path):
    file = table(tmp_path, hundred(), '"path,label', make=False)
    with pytest.raises(ValueError, match=r'images\.csv:1: .*quote'): read_csv(file)
    with pytest.raises(ValueError, match=r'images\.csv:1: expected columns .*tab|images\.csv:1: .*\\t'):
        read_csv(table(tmp_path, ['0.png\tbee'], 'path\tlabel', make=False))


def png_of_16_bit(file, levels):
    "Write an RGB file with 16 bits per channel, which Pillow does not support"
    height, width, _ = levels.shape
    raw = b''.join(b'\0'+row.astype('>u2').tobytes() for row in levels)
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    file.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(raw))+chunk(b'IEND', b''))


def test_fault_10_variants_colours_of_16_bit(tmp_path):
    levels = rng.randint(0, 65536, (6, 5, 3))
    png_of_16_bit(tmp_path/'x.png', levels)
    got = np.asarray(open_image(tmp_path/'x.png')).astype(int)
    assert np.abs(got-levels/257).max() <= 1


def test_fault_10_variants_a_learner_predicts_on_16_bit(tmp_path):
    for name, base in dict(a=0, b=30000).items():
        (tmp_path/name).mkdir()
        for i in range(5): Image.fromarray(np.full((8, 8), base+500*i, np.uint16)).save(tmp_path/name/f'{i}.png')
    dls = own_images(tmp_path, bs=4, device='cpu')
    learn = Learner(dls, CifarResNet(2, depth=8))
    x = dls.test_dl([tmp_path/'b/4.png']).one_batch()[0][0]
    red = x[0, 0, 0]*.229+.485
    assert round(float(red)*255) == round(32000/257)
    with learn.no_bar(): assert learn.predict(tmp_path/'b/4.png')[0] in 'ab'


def test_fault_10_variants_frames_and_transparency(tmp_path):
    frames = [Image.new('RGB', (8, 8), (60*i, 0, 0)) for i in range(3)]
    frames[1].save(tmp_path/'x.gif', save_all=True, append_images=frames[2:])
    assert np.asarray(open_image(tmp_path/'x.gif'))[0, 0].tolist() == [60, 0, 0]
    palette = Image.new('RGB', (8, 8), (10, 20, 30)).quantize(4)
    palette.save(tmp_path/'x.png', transparency=0)
    assert np.asarray(open_image(tmp_path/'x.png'))[0, 0].tolist() == [10, 20, 30]
    assert np.asarray(open_image((tmp_path/'x.png').read_bytes()))[0, 0].tolist() == [10, 20, 30]


def test_fault_12_variants_weights_changed_in_place(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    def extract(o): return net(o.float())
    first = features(extract, tmp_path)
    with torch.no_grad(): net[1].bias += 1
    assert torch.allclose(features(extract, tmp_path).float(), first.float()+1, atol=.2)
    with torch.no_grad(): net[1].bias -= 1


def test_fault_12_variants_counters_do_not_identify_an_extractor(tmp_path):
    class Counting(Scaled):
        calls = 0
        def __call__(self, x):
            self.calls += 1
            return super().__call__(x)
    extract = Counting()
    for _ in range(2): features(extract, tmp_path)
    assert extract.calls == 1


def test_fault_12_variants_class_attributes_and_inherited_code(tmp_path):
    for power in (1, 2):
        class Base:
            factor = power
            def __call__(self, x): return x.float().mean((2, 3))*self.factor
        class Derived(Base): pass
        x = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2)
        assert torch.equal(features(Derived(), tmp_path).float(), power*x.float().mean((2, 3)))


def test_fault_12_variants_an_extractor_that_needs_a_key(tmp_path):
    extract = Scaled(2)
    extract.lock = threading.Lock()
    with pytest.raises(TypeError, match='it holds a lock.*Give `key`'): features(extract, tmp_path)
    assert torch.equal(features(extract, tmp_path, key='two'), features(Scaled(2), tmp_path/'other'))


@pytest.mark.slow
def test_fault_12_variants_another_process_finds_the_features(tmp_path):
    code = ("import torch\nfrom ltrl_fastai.all import frozen_features, Lite0\n"
            "torch.manual_seed(0)\nx = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)\n"
            "letters = {'b', 'a', 'c'}\n"
            "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2))\n"
            "printed = []\n"
            "for e in (Lite0(32), lambda o: net(o.float())*len(letters)):\n"
            f"    frozen_features(x, e, {str(tmp_path)!r}, echo=printed.append)\n"
            "print(len(printed))")
    space = dict(__name__='__main__')
    exec(code, space)
    again = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert len(space['printed']) == 2
    assert again.stdout.strip() == '0'


def test_fault_12_variants_errors_of_frozen_loaders(shades, tmp_path):
    with pytest.raises(ValueError, match='method: expected one of squish'):
        frozen_loaders(shades, Scaled, method='stretch')
    with pytest.raises(ValueError, match=r'extract: expected features \(B, D\)'):
        frozen_loaders(shades, lambda x: x.float(), folder=tmp_path/'kept')
    (shades/'train/dark/0.png').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'1 of \d+ images can.t be read: .*dark/0\.png'):
        frozen_loaders(shades, Scaled(), folder=tmp_path/'kept')
    dls = frozen_loaders(shades, Scaled(), folder=tmp_path/'kept', skip_broken=True, device='cpu')
    assert len(dls.skipped) == 1
    assert [len(o.dataset) for o in dls.loaders][2] == 8


@pytest.mark.parametrize('profile', ['exp', 'pareto', 'step'])
@pytest.mark.parametrize('factor', [1, 2, 10])
@pytest.mark.parametrize('n_valid', [1, 5, 100])
def test_fault_14_variants_every_class_is_validated_and_no_image_is_in_two_splits(profile, factor, n_valid):
    train, c = balanced()
    dls = long_tailed(train, train, list('abcde'), factor, n_valid=n_valid, profile=profile, device='cpu')
    valid = class_counts(dls.valid_ds, 5)
    a, b = lists_of(dls)
    assert valid.min() > 0
    assert valid.max() <= n_valid
    assert not a & b


def test_fault_14_variants_features_and_a_class_of_two():
    x, y = torch.rand(10, 4), torch.tensor([0]*2+[1]*8)
    with pytest.warns(DataNote, match='No validation image of 1 of 2 classes: a'):
        dls = long_tailed((x, y), (x, y), ['a', 'b'], 1, device='cpu')
    assert class_counts(dls).tolist() == [2, 2]


def test_fault_14_variants_classes_without_validation_images_are_noted(tmp_path):
    lines = [f'train_val2018/{c}/{i}.png {y}' for y, (c, n) in enumerate(dict(p=4, q=2).items()) for i in range(n)]
    tests = [f'train_val2018/{c}/t.png {y}' for y, c in enumerate('pq')]
    for line in lines+tests: picture(tmp_path/line.split()[0])
    (tmp_path/'iNaturalist18_train.txt').write_text('\n'.join(lines))
    (tmp_path/'iNaturalist18_val.txt').write_text('\n'.join(tests))
    with pytest.warns(DataNote, match='No validation image of 1 of 2 classes'): inaturalist18(tmp_path, **small)


def test_fault_16_variants_a_folder_and_an_empty_file_in_a_csv_file(photos):
    (photos/'ant/folder.jpg').mkdir()
    (photos/'ant/empty.jpg').write_bytes(b'')
    rows = [f'{f.relative_to(photos)},{f.parent.name}' for f in sorted(photos.rglob('*.jpg'))]
    (photos/'x.csv').write_text('\n'.join(['path,label', *rows])+'\n')
    with pytest.raises(ValueError, match=r'2 of 28 images can.t be read: .*empty\.jpg.*folder\.jpg'):
        own_images(photos/'x.csv', **small)


def test_fault_16_variants_in_lists(tmp_path):
    for split, name in list_sets['imagenet-lt'].lists.items():
        lines = [f'{split}/n0/{i}.jpg 0' for i in range(4)]+[f'{split}/n1/{i}.jpg 1' for i in range(3)]
        for line in lines: picture(tmp_path/line.split()[0])
        (tmp_path/name).write_text('\n'.join(lines))
    cut(tmp_path/'train/n0/2.jpg')
    with pytest.raises(ValueError, match=r'1 of 21 images can.t be read: .*ImageNet_LT_train\.txt:3: train/n0/2\.jpg'):
        imagenet_lt(tmp_path, **small)
    assert len(imagenet_lt(tmp_path, skip_broken=True, **small).train_ds) == 6
    assert len(imagenet_lt(tmp_path, check=False, **small).train_ds) == 7


def test_fault_16_variants_workers_name_the_file(photos):
    dls = own_images(cut(photos/'ant/3.jpg').parent.parent, check=False, num_workers=1, **small)
    with pytest.raises(ValueError, match=r'ant/3\.jpg can.t be read'):
        for dl in dls.loaders: list(dl)


def test_fault_17_variants_bytes_of_no_encoding(tmp_path):
    (tmp_path/'a.csv').write_bytes(b'path,label\n0.png,b\x81e\n')
    with pytest.raises(ValueError, match=r'a\.csv:2: .*0x81'): read_csv(tmp_path/'a.csv')
    (tmp_path/'a.csv').write_bytes(codecs.BOM_UTF16_LE+'path,label\n'.encode('utf-16-le')+b'\x00\xd8')
    with pytest.raises(ValueError, match=r'a\.csv: .*utf-16'): read_csv(tmp_path/'a.csv')
    (tmp_path/'a.csv').write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0')
    with pytest.raises(ValueError, match=r'a\.csv: expected UTF-8'): read_csv(tmp_path/'a.csv')


def test_fault_17_variants_words_of_splits(tmp_path):
    rows = [f'{o},{w}' for o, w in zip(words, ['Train', ' VAL ', 'training', 'Test', 'dev', 'train']*2)]
    lists, _ = read_csv(table(tmp_path, rows, 'path,label,set'))
    assert {k: len(o) for k, o in lists.items()} == dict(train=6, valid=4, test=2)


def test_fault_17_variants_a_class_called_test_beside_others(tmp_path):
    with pytest.raises(ValueError, match='a folder `train`.*got test, and bus, car lie beside it.*class: rename'):
        read_folder(folders(tmp_path, dict(bus=3, car=3, test=3)))


def test_fault_17_variants_a_missing_flag(tmp_path):
    file = table(tmp_path, [f'{o},{"" if i == 3 else "no"}' for i, o in enumerate(words)], 'path,label,is_valid')
    with pytest.raises(ValueError, match=r"images\.csv:5: expected True or False as is_valid, got ''"): read_csv(file)


def test_fault_18_variants():
    numbers = [(torch.zeros(2), .25*i) for i in range(4)]
    with pytest.raises(TypeError, match='floating.*0.0'): class_counts(torch.utils.data.Subset(numbers, [1, 2]))
    with pytest.raises(TypeError, match="text.*'1'"): class_counts(Labelled(np.array(['1', 2], dtype=object)))
    with pytest.raises(TypeError, match='not single class indices'): class_counts(Labelled(torch.eye(3)))
    with pytest.raises(ValueError, match='no items to count'): class_counts(Labelled([]))
    assert class_counts(Labelled(np.array([0, 1, 1], dtype=object))).tolist() == [1, 2]


ramp12 = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)+np.arange(16, dtype=np.uint16)  # not a multiple of 16


def save_bits(pixels, file, bits=None):
    "16 bits a pixel, with a chunk or a tag that says how many of them count"
    chunks, tags = PngInfo(), ImageFileDirectory_v2()
    if bits: chunks.add(b'sBIT', bytes([bits]))
    if bits: tags[281] = 2**bits-1
    Image.fromarray(pixels).save(file, **(dict(pnginfo=chunks) if file.suffix == '.png' else dict(tiffinfo=tags)))
    return file


@pytest.mark.parametrize('ending', ['.png', '.tif'])
def test_significant_bits_are_scaled(ending, tmp_path):
    "12 bits in 16 become 8 bits by their range if the file says so; a PNG that is scaled already stays"
    def read(pixels, bits): return np.asarray(open_image(save_bits(pixels, tmp_path/f'x{ending}', bits)))[..., 0]
    right = np.round(ramp12/4095*255)
    assert (read(ramp12, 12) == right).all() and (read(ramp12, None) == np.round(ramp12/257)).all()
    assert (read(ramp12*8, 12) == np.round(ramp12*8/257)).all()  # more bits than it says: as without it
    if ending == '.png':
        for scaled in (ramp12 << 4, (ramp12 << 4)+(ramp12 >> 8)):
            assert (read(scaled, 12) == np.round(scaled/257)).all()
            assert (read(scaled >> 8 << 4, 12) <= 16).all()  # a dark image is not stretched


def test_dark_images_of_16_bits_are_named(tmp_path):
    folders(tmp_path, dict(a=4, b=4))
    save_bits(ramp12, tmp_path/'a/dim.png')
    save_bits(ramp12, tmp_path/'a/told.png', 12)
    save_bits(ramp12*16, tmp_path/'b/bright.png')
    for _ in range(2):  # also when the images are known to be whole
        notes = [o for o in own_images(tmp_path, **small).notes if 'almost black' in o]
        assert len(notes) == 1 and 'a/dim.png' in notes[0] and 'told' not in notes[0] and '4,095' in notes[0]
    findings = {o.kind: o for o in inspect_images(tmp_path).findings}
    assert findings['dark-16-bit'].files == ['a/dim.png'] and '0 to 4,095' in findings['dark-16-bit'].text
    assert set(findings['16-bit'].files) == {'a/dim.png', 'a/told.png', 'b/bright.png'}
    save_bits(ramp12*4, tmp_path/'b/bright.png')  # 14 bits
    (tmp_path/'a/told.png').unlink()
    dark = next(o for o in inspect_images(tmp_path).findings if o.kind == 'dark-16-bit')
    assert set(dark.files) == {'a/dim.png', 'b/bright.png'}


def test_fault_10_variants_arrays_and_open_images(tmp_path):
    "Sixteen bits without a file: `learn.predict` on an array, or on an image that was opened before"
    levels = np.array([[0, 4000, 20000, 50000, 65535]]*3, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path/'x.tif')
    for source in (levels, Image.fromarray(levels), Image.open(tmp_path/'x.tif')):
        read = open_image(source)
        assert read.mode == 'RGB'
        assert np.array(read)[0].tolist() == [[v]*3 for v in (0, 16, 78, 195, 255)]
    for source in (levels/65535, levels.astype(np.float32), torch.rand(3, 4, 4)):
        with pytest.raises(UnreadableImage, match="can't be read: .*(float|uint8)"): open_image(source)


def test_fault_12_variants_what_is_read_through_a_module(tmp_path, monkeypatch):
    "A constant in the file of one's networks is changed"
    mine = types.ModuleType('my_nets')
    exec('SCALE = 1\ndef features(x): return x.flatten(1).float()[:, :3]*SCALE', vars(mine))
    mine.inner = types.ModuleType('my_nets.inner')
    mine.inner.shift, mine.unread = 0, 0
    monkeypatch.setitem(sys.modules, 'my_nets', mine)
    images = torch.arange(2*3*4*4, dtype=torch.uint8).reshape(2, 3, 4, 4)

    def extract(x): return mine.features(x)+mine.inner.shift
    first = frozen_features(images, extract, tmp_path)
    mine.unread = 1
    frozen_features(images, extract, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # not computed again
    mine.SCALE = 2
    assert torch.equal(frozen_features(images, extract, tmp_path), 2*first)
    mine.inner.shift = 1
    assert torch.equal(frozen_features(images, extract, tmp_path), 2*first+1)


# Variants of another round, made without looking at the code

def names_of(dls): return dict(zip(dls.vocab, class_counts(dls)))


def test_fault_07_variants_a_link_back_adds_no_image(tmp_path):
    folders(tmp_path, dict(ant=4, bee=4))
    for i in range(2): (tmp_path/f'ant/back{i}').symlink_to('..')
    (tmp_path/'other').symlink_to(tmp_path/'nowhere')
    dls = own_images(tmp_path, **small)
    assert names_of(dls) == dict(ant=3, bee=3)
    assert '1 link to what is not there, left out: other.' in dls.notes
    assert len(inspect_images(tmp_path).vocab) == 2


@pytest.mark.parametrize('link,target', [('train/cow', 'train/ant'), ('valid', 'train'), ('valid', 'test')])
def test_fault_07_variants_one_folder_by_two_names(tmp_path, link, target):
    folders(tmp_path, {'train/ant': 4, 'train/bee': 4, 'test/ant': 1, 'test/bee': 1})
    (tmp_path/link).symlink_to(tmp_path/target)
    with pytest.raises(ValueError, match='is the same file as .*(Each image is expected once|can\'t be in)'):
        own_images(tmp_path, **small)


@pytest.mark.parametrize('names', [('train_set', 'test_set'), ('trn', 'tst'), ('train2017', 'val2017'),
                                   ('images_train', 'images_test'), ('data/train_set', 'data/test_set')])
def test_fault_07_variants_splits_by_another_name(tmp_path, names):
    folders(tmp_path, {f'{o}/{c}': 4 for o in names for c in ('ant', 'bee')})
    with pytest.raises(ValueError, match='xpected the splits'): own_images(tmp_path, **small)


def test_fault_07_variants_classes_that_only_resemble_splits(tmp_path):
    folders(tmp_path, {'train station': 4, 'test tube': 4, 'data': 4})
    assert names_of(own_images(tmp_path, **small)) == {'data': 3, 'test tube': 3, 'train station': 3}


def test_fault_07_variants_names_with_characters_that_are_not_seen(tmp_path):
    folders(tmp_path/'images', {'ant': 4, 'a\u200bnt': 4, 'bee': 4})
    with pytest.raises(ValueError, match=r'written differently.*\\u200b'): own_images(tmp_path/'images', **small)
    lines = [f'images/bee/{i}.png,bee' for i in range(4)]+[f'images/ant/{i}.png,bee\ufeff' for i in range(4)]
    (tmp_path/'a.csv').write_text('\n'.join(['path,label', *lines]), encoding='utf-8')
    with pytest.raises(ValueError, match=r'a.csv:6: .*\\ufeff.* line 2'): read_csv(tmp_path/'a.csv')


def test_fault_07_variants_an_ending_that_is_not_read_is_said(tmp_path):
    folders(tmp_path, dict(ant=4, bee=4))
    (tmp_path/'ant/0.png').rename(tmp_path/'ant/0.tga')
    assert any('1 file with an ending that is not read, left out: ant/0.tga' in o
               for o in own_images(tmp_path, **small).notes)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_fault_08_variants_one_image_by_two_paths(tmp_path, split):
    folders(tmp_path, dict(ant=4, bee=4))
    (tmp_path/'link').symlink_to(tmp_path/'ant')
    lines = [f'{c}/{i}.png,{c},train' for c in ('ant', 'bee') for i in range(4)]
    for again in (tmp_path/'ant/0.png', 'link/0.png'):
        (tmp_path/'a.csv').write_text('\n'.join(['path,label,split', *lines, f'{again},bee,{split}']))
        with pytest.raises(ValueError, match=r'a.csv:10: .* is the same file as ant/0.png in .*a.csv:2'):
            own_images(tmp_path/'a.csv', **small)


def test_fault_08_variants_a_byte_0(tmp_path):
    (tmp_path/'a.csv').write_bytes(b'path,label\nant/0.png,ant\nant/1.png,a\0nt\nant/2.png,ant\n')
    with pytest.raises(ValueError, match='a.csv:3: .*byte 0'): read_csv(tmp_path/'a.csv')
    (tmp_path/'b.csv').write_bytes('path,label\nant/0.png,ant\n'.encode('utf-16-le'))
    with pytest.raises(ValueError, match='UTF-16'): read_csv(tmp_path/'b.csv')


def test_fault_08_variants_a_prior(tmp_path):
    file = tmp_path/'prior.csv'
    for text, message in [('ant,1\nbee,1_0\n', 'prior.csv:2: expected a class and its frequency'),
                          ('ant,1\n"bee,2\n', 'prior.csv:2: .*quote'), ('"ant,1\nbee,2"\n', 'prior.csv:1: .*quote')]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message): read_prior(file, ['ant', 'bee'])
    file.write_text('be\u0301,1\na\u2028b,2\n', encoding='utf-8')
    assert read_prior(file, ['b\u00e9', 'a\u2028b']) == [1, 2]


def test_fault_10_variants_signed_pixels_and_a_maximum_that_is_no_number_of_bits(tmp_path):
    file = tmp_path/'a.tif'
    pixels = np.array([[0, 100, 200]], np.uint8)
    tags = ImageFileDirectory_v2()
    tags[339] = 2
    Image.fromarray(pixels).save(file, tiffinfo=tags)
    with pytest.raises(UnreadableImage, match='a.tif .*signed'): open_image(file)
    assert broken_images([file])
    levels = np.array([[0, 1500, 3000]], np.uint16)
    for largest, white in [(4095, 187), (3000, 12)]: # 12 bits; the highest level of this image
        tags = ImageFileDirectory_v2()
        tags[281] = largest
        Image.fromarray(levels).save(file, tiffinfo=tags)
        assert np.asarray(open_image(file)).max() == white


def first_four(x): return x.float().reshape(len(x), -1)[:, :4]


def test_fault_12_variants_features_that_half_precision_cannot_hold(tmp_path):
    x = torch.randint(1, 255, (6, 3, 4, 4)).byte()
    for extract in (lambda x: first_four(x)*1e6, lambda x: first_four(x)/0):
        with pytest.raises(ValueError, match='65,504'): frozen_features(x, extract, tmp_path)
    sizes = iter((4, 5))
    with pytest.raises(ValueError, match='same D for all images, got 4 and 5'):
        frozen_features(x, lambda x: x.float().reshape(len(x), -1)[:, :next(sizes)], tmp_path, chunk=3, key='widths')


def test_fault_12_variants_a_file_of_weights_and_a_file_of_another_part(tmp_path):
    x = torch.randint(1, 255, (6, 3, 4, 4)).byte()
    weights = tmp_path/'weights.pt'
    def extract(x, path=weights): return first_four(x)*torch.load(path)
    for factor in (1., 2.):
        torch.save(torch.tensor(factor), weights)
        assert torch.equal(frozen_features(x, extract, tmp_path/'cache').float(), factor*first_four(x))
    frozen_features(x, first_four, tmp_path/'parts', chunk=4)
    first, second = sorted((tmp_path/'parts').rglob('*.pt'))
    second.write_bytes(first.read_bytes())
    assert torch.equal(frozen_features(x, first_four, tmp_path/'parts', chunk=4).float(), first_four(x))


class Calls:
    "An extractor that counts the images it has seen"
    n = 0
    def __call__(self, x):
        Calls.n += len(x)
        return first_four(x)


def test_fault_12_variants_an_image_that_is_replaced_with_its_size_and_time(tmp_path):
    "The content counts: a replaced image is computed again, one that was moved or touched is not"
    def bitmap(file, level):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file)
        os.utime(file, ns=(10**18, 10**18))
    def features():
        dls = frozen_loaders(tmp_path/'images', Calls(), folder=tmp_path/'cache', key='mine', device='cpu')
        return {o: sorted(dl.dataset.x[:, 0].tolist()) for o, dl in zip(('train', 'valid'), dls.loaders)}
    for split, levels in dict(train=(1, 2, 3), valid=(4,)).items():
        for name in ('ant', 'bee'):
            for i, level in enumerate(levels): bitmap(tmp_path/'images'/split/name/f'{i}.bmp', level)
    assert features()['train'] == [1, 1, 2, 2, 3, 3]
    bitmap(tmp_path/'images/train/ant/0.bmp', 99)
    Calls.n = 0
    assert features()['train'] == [1, 2, 2, 3, 3, 99] and Calls.n == 1
    Calls.n = 0
    for file in (tmp_path/'images').rglob('*.bmp'): os.utime(file)
    (tmp_path/'images/train/ant').rename(tmp_path/'images/train/zebra')
    (tmp_path/'images/valid/ant').rename(tmp_path/'images/valid/zebra')
    assert features()['train'] == [1, 2, 2, 3, 3, 99] and Calls.n == 0


def test_fault_12_variants_other_caches_and_an_image_that_is_replaced_with_its_size_and_time(tmp_path):
    for split in ('train', 'test'):
        for k in range(10):
            file = tmp_path/split/f'c{k}/a.bmp'
            file.parent.mkdir(parents=True)
            Image.fromarray(np.full((32, 32, 3), k, np.uint8)).save(file)
    load_cifar(10, tmp_path)
    file = tmp_path/'train/c0/a.bmp'
    stat = os.stat(file)
    assert not broken_images([file])
    Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (x, _), *_ = load_cifar(10, tmp_path)
    assert (x[0] == 99).all()
    file.write_bytes(b'XX'+file.read_bytes()[2:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert broken_images([file])


@pytest.mark.parametrize('n', [0, -1])
def test_fault_14_variants_no_validation_image_is_asked_for(n):
    for make in (digits_lt, unicode_names, landforms):
        with pytest.raises(ValueError, match='n_valid: '): make(n_valid=n)
    for make in (unicode_names, landforms):
        with pytest.raises(ValueError, match='n_test: '): make(n_test=n)
    if n < 0:
        with pytest.raises(ValueError, match='n_valid: '): hold_out([0]*5+[1]*5, n_valid=n)


def test_fault_14_variants_a_class_without_test_images_is_said():
    x = torch.zeros(40, 3, 8, 8).byte()
    y = torch.arange(4).repeat_interleave(10)
    dls = long_tailed((x, y), (x[:30], y[:30]), list('abcd'), 2, n_valid=2, device='cpu')
    assert any('No test image of 1 of 4 classes: d' in o for o in dls.notes)
