"Data sets that are lists of files, and the user's own images: their formats, errors in them, and training on them."
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, Learner, SGD, load_learner
from PIL import Image
from typer.testing import CliRunner

from ltrl_fastai.all import (
    CifarResNet, class_counts, imagenet_lt, inaturalist18, own_images, places_lt, shot_groups)
from command_line import ltrl_here, ltrl_process
from parts import all_three
from ltrl_fastai.data.catalogue import catalogue
from ltrl_fastai.data.imbalance import without_augmentation
from ltrl_fastai.data.listfiles import check_images, check_lists, compare_published, read_list
from ltrl_fastai.data.lists import hold_out
from ltrl_fastai.data.own import has_small_images
from ltrl_fastai.data.lists import DataNote, ImageList, class_names, flat_val256, from_easy, list_sets, to_easy
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.runner import data_identity
from ltrl_fastai.experiments.training import RunSettings, datasets, train_run

pytestmark = pytest.mark.filterwarnings('ignore::ltrl_fastai.data.lists.DataNote')
counts = [25, 20, 8, 4, 2]
wnids = ['n01440764', 'n01443537', 'n01484850', 'n01491361', 'n01494475']
rng = np.random.RandomState(0)


def jpeg(f, value=None):
    "40 by 40 pixels of noise, or of one grey value"
    f.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.randint(0, 255, (40, 40, 3)) if value is None else np.full((40, 40, 3), value)
    Image.fromarray(pixels.astype(np.uint8)).save(f)


def as_listed(p): return p


def write_lists(root, names, lines, put=as_listed):
    "Write the list of each split, and its images to the paths that `put` returns"
    root.mkdir(parents=True, exist_ok=True)
    for split, name in names.items():
        (root/name).write_text(''.join(f'{p} {y}\n' for p, y in lines[split]))
        for p, _ in lines[split]: jpeg(root/put(p))
    return lines


def imagenet(root, put=as_listed):
    lines = dict(
        train=[(f'train/{w}/{w}_{i}.JPEG', c) for c, w in enumerate(wnids) for i in range(counts[c])],
        valid=[(f'train/{w}/{w}_{900+i}.JPEG', c) for c, w in enumerate(wnids) for i in range(2)],
        test=[(f'val/{w}/ILSVRC2012_val_{100*c+i:08}.JPEG', c) for c, w in enumerate(wnids) for i in range(3)])
    return write_lists(root, list_sets['imagenet-lt'].lists, lines, put)


easy_folders = ['airfield', 'apartment_building-outdoor', 'bar', 'zen_garden', 'zoo']
letter_folders = ['a/airfield', 'a/apartment_building/outdoor', 'b/bar', 'z/zen_garden', 'z/zoo']


def places(root, easy, put=as_listed):
    folders = easy_folders if easy else letter_folders
    top = 'train' if easy else 'data_256'
    lines = dict(train=[], valid=[], test=[])
    for c, w in enumerate(folders):
        lines['train'] += [(f'{top}/{w}/{i:08}.jpg', c) for i in range(counts[c])]
        lines['valid'] += [(f'{top}/{w}/{900+i:08}.jpg', c) for i in range(2)]
        test_folder = f'val/{w}' if easy else 'val_256'
        lines['test'] += [(f'{test_folder}/Places365_val_{100*c+i:08}.jpg', c) for i in range(3)]
    return write_lists(root, list_sets['places-lt'].lists, lines, put)


inat_folders = ['Plantae/0', 'Plantae/1', 'Aves/2', 'Fungi/3', 'Insecta/4']


def inat_lines():
    lines = dict(train=[], test=[])
    for c, w in enumerate(inat_folders):
        lines['train'] += [(f'train_val2018/{w}/{c}{i:031x}.jpg', c) for i in range(counts[c])]
        lines['test'] += [(f'train_val2018/{w}/f{c}{i:030x}.jpg', c) for i in range(3)]
    return lines


def inat(root): return write_lists(root, list_sets['inaturalist18'].lists, inat_lines())


def inat_json(root, change=lambda split, d: d):
    lines = inat_lines()
    root.mkdir(parents=True, exist_ok=True)
    categories = [dict(id=c, name=f'species {c}', supercategory=w.split('/')[0]) for c, w in enumerate(inat_folders)]
    for split, name in list_sets['inaturalist18'].json.items():
        images = []
        annotations = []
        for n, (path, y) in enumerate(lines[split]):
            i = 7*n+3
            images.append(dict(id=i, file_name=path, width=40, height=40, license=0, rights_holder=''))
            annotations.append(dict(id=i, image_id=i, category_id=y))
            jpeg(root/path)
        d = dict(info=dict(year=2018), licenses=[], images=images, categories=categories,
                 annotations=annotations[::-1])
        (root/name).write_text(json.dumps(change(split, d)))
    return lines


kw = dict(bs=8, size=16, device='cpu')


def files_of(dl): return [f for f, _ in dl.dataset.items]


def sizes(dls): return [len(dl.dataset) for dl in dls.loaders]


def folders_of(dl): return [Path(f).parent.name for f in files_of(dl)]


def flat_val(p): return re.sub(r'^val/[^/]+/', 'val/', p)


def as_on_kaggle(p): return 'ILSVRC/Data/CLS-LOC/'+p


@pytest.mark.parametrize('put', [as_listed, flat_val, as_on_kaggle])
@pytest.mark.parametrize('where', ['', 'ImageNet_LT'], ids=['itself', 'parent'])
def test_imagenet_lt(tmp_path, put, where):
    lines = imagenet(tmp_path/where, put)
    dls = imagenet_lt(tmp_path, **kw)
    assert dls.vocab == wnids
    assert class_counts(dls).tolist() == counts
    assert sizes(dls) == [59, 10, 15]
    assert dls.imbalance_factor == 12.5
    for dl, split in zip(dls.loaders, lines):
        found = [(os.path.basename(f), y) for f, y in zip(files_of(dl), dl.dataset.targets)]
        assert found == [(os.path.basename(p), y) for p, y in lines[split]]
    assert {k: int(m.sum()) for k, m in shot_groups(dls.class_counts).items()} == dict(many=0, medium=2, few=3, all=5)
    x, y = dls.test.one_batch()
    assert x.shape == (15, 3, 16, 16) and y.tolist() == [y for _, y in lines['test']]
    assert dls.train.one_batch()[0].shape == (8, 3, 16, 16)


@pytest.mark.parametrize('easy', [True, False], ids=['easy lists', 'lists of data_256'])
@pytest.mark.parametrize('moved', [False, True], ids=['as listed', 'in the other format'])
def test_places_lt(tmp_path, easy, moved):
    def other_format(p): return flat_val256(from_easy(p)) if easy else to_easy(p)
    places(tmp_path/'Places_LT', easy, other_format if moved else as_listed)
    dls = places_lt(tmp_path, **kw)
    assert dls.vocab == [o.replace('-', '-' if easy else '/') for o in easy_folders]
    assert class_counts(dls).tolist() == counts
    assert sizes(dls) == [59, 10, 15]


@pytest.mark.parametrize('make', [inat, inat_json])
def test_inaturalist(tmp_path, make):
    lines = make(tmp_path)
    dls = inaturalist18(tmp_path, **kw)
    assert class_counts(dls).tolist() == [24, 19, 7, 3, 2]
    assert np.bincount(dls.valid_ds.targets).tolist() == [1, 1, 1, 1]
    train, valid, test = [set(files_of(dl)) for dl in dls.loaders]
    listed = {split: {str(tmp_path/p) for p, _ in lines[split]} for split in lines}
    assert test == listed['test']
    assert not valid & listed['test'], 'a model must not be chosen on the test set'
    assert train | valid == listed['train'] and not train & valid
    assert dls.vocab == (inat_folders if make is inat else [f'species {c}' for c in range(5)])
    assert any('4 were taken out of training, and 55 are left. Its `val` is the test set' in o for o in dls.notes)
    assert files_of(inaturalist18(tmp_path, data_seed=1, **kw).valid) != files_of(dls.valid)
    by_file = dict((str(tmp_path/p), y) for o in lines.values() for p, y in o)
    for dl in dls.loaders: assert [by_file[f] for f in files_of(dl)] == list(dl.dataset.targets)
    (tmp_path/'categories.json').write_text(json.dumps([dict(id=c, name=f'Real {c}') for c in range(5)]))
    assert inaturalist18(tmp_path, **kw).vocab[3] == 'Real 3'


def broken(root, name, at, line):
    "Replace a line of a list, or remove it"
    f = root/name
    lines = f.read_text().splitlines()
    lines[at-1:at] = [line] if line is not None else []
    f.write_text('\n'.join(lines)+'\n')


faults = {
    'no label': (
        'ImageNet_LT_train.txt', 3, 'train/n01440764/n01440764_2.JPEG',
        r'ImageNet_LT_train.txt:3: expected `path label`'),
    'no number': (
        'ImageNet_LT_val.txt', 2, 'train/n01440764/n01440764_901.JPEG tench',
        r"ImageNet_LT_val.txt:2: expected a class index after the path, got 'tench'"),
    'a fraction': (
        'ImageNet_LT_train.txt', 1, 'train/n01440764/n01440764_0.JPEG 0.0',
        r"ImageNet_LT_train.txt:1: .*got '0.0'"),
    'negative': (
        'ImageNet_LT_test.txt', 1, 'val/n01440764/ILSVRC2012_val_00000000.JPEG -1',
        r'ImageNet_LT_test.txt:1: expected a class index of 0 or more, got -1'),
    'a gap': (
        'ImageNet_LT_train.txt', 59, 'train/n01494475/n01494475_1.JPEG 7',
        r'ImageNet_LT_train.txt:59: class 7, but there is no training image of class 5, 6\.'),
    'an unknown class': (
        'ImageNet_LT_val.txt', 10, 'train/n01494475/n01494475_901.JPEG 5',
        r'ImageNet_LT_val.txt:10: class 5, but the training images are of classes 0 to 4'),
    'twice': (
        'ImageNet_LT_train.txt', 9, 'train/n01440764/n01440764_2.JPEG 0',
        r'ImageNet_LT_train.txt:9: train/n01440764/n01440764_2.JPEG is listed in .*ImageNet_LT_train.txt:3 too. '
        r'Each image is expected once'),
    'twice, written differently': (
        'ImageNet_LT_train.txt', 9, './train//n01440764/n01440764_2.JPEG 0',
        r'ImageNet_LT_train.txt:9: .*ImageNet_LT_train.txt:3 too'),
    'of two classes': (
        'ImageNet_LT_train.txt', 30, 'train/n01440764/n01440764_2.JPEG 1',
        r'ImageNet_LT_train.txt:30: .*ImageNet_LT_train.txt:3 too'),
    'in training and in test': (
        'ImageNet_LT_test.txt', 4, 'train/n01440764/n01440764_2.JPEG 0',
        r'ImageNet_LT_test.txt:4: .*ImageNet_LT_train.txt:3 too. An image that is in train can.t be in test'),
    'in training and in validation': (
        'ImageNet_LT_val.txt', 1, 'train/n01440764/n01440764_2.JPEG 0',
        r'ImageNet_LT_val.txt:1: .*can.t be in valid'),
    'in validation and in test': (
        'ImageNet_LT_test.txt', 4, 'train/n01440764/n01440764_901.JPEG 0',
        r'ImageNet_LT_test.txt:4: .*ImageNet_LT_val.txt:2 too. An image that is in valid can.t be in test'),
}


@pytest.mark.parametrize('fault', faults)
def test_broken_lists(tmp_path, fault):
    name, at, line, message = faults[fault]
    imagenet(tmp_path)
    broken(tmp_path, name, at, line)
    with pytest.raises(ValueError, match=message): imagenet_lt(tmp_path, **kw)


def test_empty_lines_count_and_an_empty_list_is_refused(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'\r\na/b.jpg 0\r\n\r\na/c d.jpg 1\r\n')
    o = read_list(tmp_path/'a.txt')
    assert o.paths == ['a/b.jpg', 'a/c d.jpg'] and o.lines == [2, 4] and o.where(1) == f"{tmp_path/'a.txt'}:4"
    (tmp_path/'a.txt').write_text('\n')
    with pytest.raises(ValueError, match='is empty'): read_list(tmp_path/'a.txt')


def test_missing_images_are_counted_and_named_before_training(tmp_path):
    lines = imagenet(tmp_path)
    for i in (0, 5, 6, 7): (tmp_path/lines['train'][i][0]).unlink()
    (tmp_path/lines['test'][14][0]).unlink()
    with pytest.raises(FileNotFoundError) as e: imagenet_lt(tmp_path, **kw)
    message = str(e.value)
    for part in ('4 of 59 images in train', 'ImageNet_LT_train.txt:1: train/n01440764/n01440764_0.JPEG', 'and 1 more',
                 '1 of 15 images in test', f'below {tmp_path}.'): assert part in message
    assert 'in valid' not in message
    for o in ('train', 'val'): shutil.rmtree(tmp_path/o)
    message = r'59 of 59 images in train.*10 of 10 images in valid.*looked for below .*, .*ILSVRC2012'
    with pytest.raises(FileNotFoundError, match=message): imagenet_lt(tmp_path, **kw)


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda f: listed.append(f) or scandir(f))
    files = [f'a/{i}.jpg' for i in range(50)]
    for f in files[:49]: jpeg(tmp_path/f)
    o = ImageList(tmp_path/'x.txt', files, [0]*50)
    o.root, o.files = str(tmp_path), [str(tmp_path/f) for f in files]
    with pytest.raises(FileNotFoundError, match='1 of 50 images in train .*a/49.jpg'): check_images(dict(train=o))
    assert len(listed) == 1


def test_errors_say_what_is_missing_and_where_to_put_it(tmp_path):
    for make, name in ((imagenet_lt, 'imagenet-lt'), (places_lt, 'places-lt'), (inaturalist18, 'inaturalist18')):
        spec = list_sets[name]
        with pytest.raises(FileNotFoundError) as e: make(tmp_path)
        wanted = [*spec.lists.values(), str(tmp_path/spec.folder), '--data', spec.title, 'train']
        assert all(o in str(e.value) for o in wanted)
    imagenet(tmp_path)
    (tmp_path/'ImageNet_LT_val.txt').unlink()
    with pytest.raises(FileNotFoundError, match='lacks ImageNet_LT_val.txt. Expected in'): imagenet_lt(tmp_path)


json_faults = {  # changed images and annotations, and the message
    'no annotations': (
        lambda images, annotations: (images, None), 'there is no annotations. The test images'),
    'no image': (
        lambda images, annotations: (images, [*annotations[:2], dict(id=1, image_id=1, category_id=0)]),
        'annotation 2: there is no image with the id 1'),
    'no category': (
        lambda images, annotations: (images, [dict(id=3, image_id=3)]),
        'annotation 0: expected `image_id` and `category_id`'),
    'negative': (
        lambda images, annotations: (images, [dict(id=3, image_id=3, category_id=-2)]),
        'annotation 0: expected a class index of 0 or more, got -2'),
    'twice': (
        lambda images, annotations: (images, [*annotations, annotations[0]]),
        r'train2018.json, annotation 59: .* is listed in .*train2018.json, annotation 0 too'),
    'the same id': (
        lambda images, annotations: ([*images, images[0]], annotations), 'image 59: another image has the id 3 too'),
    'not annotated': (
        lambda images, annotations: (images, annotations[2:]), '2 of 59 images have no annotation'),
}


@pytest.mark.parametrize('fault', json_faults)
def test_broken_json(tmp_path, fault):
    change, message = json_faults[fault]
    def change_train(split, d):
        if split != 'train': return d
        images, annotations = change(d['images'], d['annotations'])
        changed = dict(d, images=images, annotations=annotations)
        return {k: v for k, v in changed.items() if v is not None}
    inat_json(tmp_path, change_train)
    with pytest.raises(ValueError, match=message): inaturalist18(tmp_path, **kw)


def test_a_truncated_json_file(tmp_path):
    inat_json(tmp_path)
    (tmp_path/'train2018.json').write_text('{"images": [')
    with pytest.raises(ValueError, match='train2018.json is not valid JSON'): inaturalist18(tmp_path, **kw)


def published(name):
    "Lists with as many images and classes as the published ones, with numbers for paths"
    spec = list_sets[name]
    n = np.full(spec.classes, spec.n_min)
    n[0] = spec.n_max
    for i in range(1, len(n)): n[i] += min(spec.n_max-spec.n_min, spec.train-n.sum())
    lists = dict(train=ImageList(Path('x'), list(range(spec.train)), np.repeat(np.arange(len(n)), n)))
    for split, size in dict(valid=spec.valid, test=spec.test).items():
        if size: lists[split] = ImageList(Path('x'), list(range(size)), np.arange(size) % spec.classes)
    return lists


@pytest.mark.parametrize('name', list_sets)
def test_lists_are_compared_with_the_published_figures(name):
    lists = published(name)
    assert compare_published(name, lists) == []
    lists['train'].labels[-1] = 0
    lists['test'].paths.pop()
    message, = compare_published(name, lists)
    n, test = list_sets[name].n_max, list_sets[name].test
    assert f'{n+1:,} images of the largest class ({n:,})' in message
    assert f'{test-1:,} test images' in message
    assert 'training images' not in message


def test_a_list_that_differs_gives_a_warning(tmp_path):
    imagenet(tmp_path)
    message = r'is not the published ImageNet-LT: there are 5 classes \(1,000\)'
    with pytest.warns(DataNote, match=message): imagenet_lt(tmp_path, **kw)


def test_names_of_imagenet_classes():
    folders = [f'n{i:08}' for i in range(1000)]
    o = ImageList(Path('x'), [f'train/{w}/{w}_0.JPEG' for w in folders], list(range(1000)))
    names = class_names(o, 1000)
    assert names[:2] == ['n00000000 tench', 'n00000001 goldfish']
    assert len(set(names)) == 1000
    flat = ImageList(Path('x'), ['images/a.jpg', 'images/b.jpg'], [0, 1])
    assert class_names(flat, 2) == ['0', '1']


def test_hold_out_spares_the_rarest():
    y = np.repeat(np.arange(6), [100, 14, 5, 3, 2, 1])
    train, valid = hold_out(y)
    assert np.bincount(y[valid], minlength=6).tolist() == [20, 2, 1, 1, 0, 0]
    assert sorted(train+valid) == list(range(len(y)))
    assert hold_out(y) == (train, valid)
    assert hold_out(y, seed=1)[1] != valid
    with pytest.raises(ValueError, match='No class has three images'): hold_out([0, 0, 1, 1])


def test_as_large_as_inaturalist(tmp_path):
    "Lists of 461,939 images are read and checked in seconds"
    n_train = np.r_[np.full(8141, 53), 437513-53*8141]
    for split, n in (('train', n_train), ('val', np.full(8142, 3))):
        lines = [f'train_val2018/P/{c}/{split}{i}.jpg {c}\n' for c, k in enumerate(n) for i in range(k)]
        (tmp_path/f'{split}.txt').write_text(''.join(lines))
    start = time.process_time()
    assert check_lists(dict(train=read_list(tmp_path/'train.txt'), test=read_list(tmp_path/'val.txt'))) == 8142
    assert time.process_time()-start < 60


# The user's own images

discs = dict(blue=40, green=15, red=5, yellow=2)


def own_folder(root, splits=('',), each=None):
    for s in splits:
        for c, n in (each or discs).items():
            for i in range(n): jpeg(root/s/c/f'{i}.jpg')
    return root


def own_csv(root, split=True):
    own_folder(root)
    rows = [(f'{c}/{i}.jpg', c, 'test' if i < n//5 else 'train') for c, n in discs.items() for i in range(n)]
    lines = [','.join(row[:2+split]) for row in (('image', 'label', 'split'), *rows)]
    (root/'images.csv').write_text('\n'.join(lines)+'\n')
    return root/'images.csv'


def test_a_folder(tmp_path):
    dls = own_images(own_folder(tmp_path/'a'), **kw)
    assert dls.vocab == ['blue', 'green', 'red', 'yellow']
    assert class_counts(dls).tolist() == [32, 12, 4, 2]
    assert dls.test is None
    assert dls.imbalance_factor == 16
    assert np.bincount(dls.valid_ds.targets, minlength=4).tolist() == [8, 3, 1, 0]
    assert any('No validation image of 1 of 4 classes: yellow.' in o for o in dls.notes)
    assert 'There is no test set: reports are of validation images.' in dls.notes
    for dl in dls.loaders: assert folders_of(dl) == [dls.vocab[i] for i in dl.dataset.targets]
    assert own_images(tmp_path/'a', n_valid=2, **kw).valid_ds.targets.count(0) == 2


def test_a_folder_with_splits(tmp_path):
    own_folder(tmp_path, ('train', 'val', 'test'))
    dls = own_images(tmp_path, **kw)
    def tops(dl): return {Path(f).parent.parent.name for f in files_of(dl)}
    assert sizes(dls) == [62]*3
    assert not dls.notes
    assert tops(dls.test) == {'test'} and tops(dls.valid) == {'val'}
    shutil.rmtree(tmp_path/'val')
    dls = own_images(tmp_path, **kw)
    assert sizes(dls) == [50, 12, 62] and tops(dls.valid) == {'train'}
    jpeg(tmp_path/'test/pink/0.jpg')
    with pytest.raises(ValueError, match='no training image is of class pink'): own_images(tmp_path, **kw)


def test_a_folder_without_the_expected_structure(tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no folder or file'): own_images(tmp_path/'x')
    with pytest.raises(ValueError, match='found no image'): own_images(tmp_path)
    jpeg(tmp_path/'a/0.jpg')
    said = "expected two classes or more, got 'a' alone. Give the folder that holds a folder for each class."
    with pytest.raises(ValueError, match=said): own_images(tmp_path)
    jpeg(tmp_path/'b/0.jpg')
    with pytest.raises(ValueError, match='No class has three images'): own_images(tmp_path)
    jpeg(tmp_path/'0.jpg')
    with pytest.raises(ValueError, match='0.jpg is in no folder of a class'): own_images(tmp_path)
    jpeg(tmp_path/'test/a/0.jpg')
    with pytest.raises(ValueError, match='expected a folder `train`'): own_images(tmp_path)
    (tmp_path/'x.tsv').write_text('')
    with pytest.raises(ValueError, match='ends in .csv'): own_images(tmp_path/'x.tsv')


def test_size(tmp_path):
    own_folder(tmp_path)
    def shape(**kwargs): return own_images(tmp_path, device='cpu', bs=4, **kwargs).one_batch()[0].shape[2:]
    assert shape() == (40, 40)
    assert shape(size=24) == (24, 24)
    Image.new('RGB', (90, 60)).save(tmp_path/'blue/large.jpg')
    assert shape() == (224, 224)
    Image.new('L', (40, 40)).save(tmp_path/'blue/large.jpg')  # grey becomes RGB
    assert shape() == (40, 40)


def test_a_csv_file(tmp_path):
    dls = own_images(own_csv(tmp_path), **kw)
    assert sizes(dls) == [41, 9, 12]
    assert dls.imbalance_factor == 13
    assert class_counts(dls).tolist() == [26, 10, 3, 2]
    for dl in dls.loaders: assert folders_of(dl) == [dls.vocab[i] for i in dl.dataset.targets]
    assert own_images(own_csv(tmp_path, split=False), **kw).test is None
    f = tmp_path/'images.csv'
    text = f.read_text().replace('image,label', 'where it is,species')
    f.write_text('\ufeff'+text, encoding='utf-8')  # as spreadsheets write it
    message = 'expected a header with one column of paths.*got where it is, species.*path_col'
    with pytest.raises(ValueError, match=message): own_images(f, **kw)
    assert sizes(own_images(f, path_col='where it is', label_col='species', **kw)) == [50, 12]
    with pytest.raises(ValueError, match="there is no column 'x', but where it is, species"):
        own_images(f, path_col='x', label_col='species')


csv_faults = {
    'no label': ('blue/20.jpg,,train', 'images.csv:22: expected a path and a label'),
    'another split': ('blue/20.jpg,blue,eval', "images.csv:22: expected train, valid or test as split, got 'eval'"),
    'too many': ('blue/20.jpg,blue,train,x', r'images.csv:22: expected 3 values \(image, label, split\), got 4'),
    'too few': ('blue/20.jpg,blue', r'images.csv:22: expected 3 values \(image, label, split\), got 2'),
    'twice': ('blue/19.jpg,blue,train', 'images.csv:22: blue/19.jpg is listed in .*images.csv:21 too. Each'),
    'in training and in test': ('blue/19.jpg,blue,test', "images.csv:22: .*can't be in test"),
    'missing': ('blue/x.jpg,blue,train', '1 of 50 images in train .*images.csv:22: blue/x.jpg'),
    'only in test': ('blue/20.jpg,pink,test', "images.csv:22: class 'pink' is in test, but no training image"),
}


@pytest.mark.parametrize('fault', csv_faults)
def test_broken_csv(tmp_path, fault):
    line, message = csv_faults[fault]
    f = own_csv(tmp_path)
    broken(tmp_path, 'images.csv', 22, line)
    with pytest.raises((ValueError, FileNotFoundError), match=message): own_images(f, **kw)


# Training

class Probe(Callback):
    "Compare sample ids with the content of the batch; each image has a unique grey value"
    order = 0
    def before_fit(self): self.all_ids = []
    def before_batch(self):
        if not self.training: return
        ids, ds = self.learn.sample_ids.ids.tolist(), self.learn.dls.train_ds
        mean = torch.tensor([.485, .456, .406]).view(3, 1, 1)
        std = torch.tensor([.229, .224, .225]).view(3, 1, 1)
        pixels = (self.x.as_subclass(torch.Tensor)*std+mean)*255
        grey = pixels.round().amax((1, 2, 3)).int().tolist()  # the padding is zero
        assert [int(Path(ds.items[i][0]).stem) for i in ids] == grey
        assert [ds.targets[i] for i in ids] == self.y.tolist()
        self.all_ids += ids


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('csv', [False, True], ids=['folder', 'csv'])
def test_samples_and_predictions_stay_aligned(tmp_path, workers, csv, quick_fit):
    value = iter(range(100, 200))
    files = [tmp_path/c/f'{next(value)}.png' for c, n in dict(a=30, b=11, c=4).items() for _ in range(n)]
    for f in files: jpeg(f, int(f.stem))
    if csv:
        rows = [f'{f.relative_to(tmp_path)},{f.parent.name}' for f in files[::-1]]
        (tmp_path/'x.csv').write_text('\n'.join(['path,label', *rows])+'\n')
    dls = own_images(tmp_path/'x.csv' if csv else tmp_path, bs=8, num_workers=workers, device='cpu')
    learn = Learner(dls, CifarResNet(3, depth=8), opt_func=SGD, cbs=[all_three(), Probe()])
    quick_fit(learn, 2)
    assert sorted(learn.probe.all_ids) == sorted(list(range(36))*2)


def test_a_single_image_is_not_left_over_for_batch_norm(tmp_path, quick_fit):
    dls = own_images(own_folder(tmp_path, each=dict(a=16, b=6)), bs=17, size=16, device='cpu')  # 18 to train on
    assert len(dls.train_ds) == 18 and [len(b[1]) for b in dls.train] == [17]
    assert [len(b[1]) for b in own_images(tmp_path, bs=99, size=16, device='cpu').train] == [18]


tiny = dict(net='resnet8', size=16, epochs=1, bs=16)


def settings(path, **kwargs): return RunSettings(str(path), **tiny, reflective=dict(ks=True, kc=True), **kwargs)


def test_a_run_on_a_folder_has_no_test_accuracy_and_one_on_a_csv_file_has(tmp_path):
    res, report = train_run(settings(own_folder(tmp_path/'a')), bar=False)
    assert 'accuracy' not in res
    assert res['imbalance_factor'] == 16
    assert res['class_counts'] == [32, 12, 4, 2]
    assert res['valid_accuracy']['few'] is not None
    assert report.totals.tolist() == [8, 3, 1, 0]
    assert res['per_class'][3] is None
    assert report.vocab == ['blue', 'green', 'red', 'yellow']
    assert {'base_loss', 'review_loss', 'summary_loss', 'conflicts'} <= set(res['history'])
    res, report = train_run(settings(own_csv(tmp_path/'b'), diagnose=True), bar=False)
    assert report.totals.tolist() == [8, 3, 1, 0]
    assert 'accuracy' in res
    assert res['class_counts'] == [26, 10, 3, 2]
    assert len(res['diagnosis']['similarity']) == 4
    again, _ = train_run(settings(tmp_path/'b/images.csv', diagnose=True), bar=False)
    assert again['history'] == res['history']
    assert again['accuracy'] == res['accuracy']


def test_a_run_on_lists(tmp_path):
    imagenet(tmp_path)
    s = RunSettings('imagenet-lt', **tiny, data=str(tmp_path), policy='randaugment', flip=False, reflective={})
    assert any('is not the published' in o for o in s.check())
    res, report = train_run(s, bar=False)
    assert report.totals.tolist() == [3]*5
    assert res['class_counts'] == counts
    assert res['accuracy']['many'] is None
    assert res['settings']['imbalance_factor'] is None
    inat(tmp_path)
    s = RunSettings('inaturalist18', **tiny, data=str(tmp_path), n_valid=2)
    res, report = train_run(s, bar=False, test=False)
    assert 'accuracy' not in res
    assert report.totals.tolist() == [2, 2, 1, 1, 0]


def test_training_accuracy_is_measured_without_augmentation(tmp_path):
    dls = own_images(own_folder(tmp_path), **kw)
    dl = dls.valid.new(without_augmentation(dls.train_ds))
    (a, y), (b, _) = dl.one_batch(), dl.one_batch()
    assert torch.equal(a, b)
    assert y.tolist() == dls.train_ds.targets[:16]
    assert dls.train_ds.split_idx == 0
    def train_batch(): return dls.train.new(shuffle=False).one_batch()[0]
    assert not torch.equal(train_batch(), train_batch())


def test_inapplicable_settings_are_refused(tmp_path):
    own_folder(tmp_path/'a')
    cases = {
        'imbalance_factor: .* is long-tailed already': dict(imbalance_factor=10),
        'n_max: .* all its images': dict(n_max=5),
        'cut: Cutout is not supported': dict(cut=4),
        'data: the path': dict(data='x')}
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message): settings(tmp_path/'a', **bad)
    message = 'n_valid: imagenet-lt has a list of validation images'
    with pytest.raises(ValueError, match=message): RunSettings('imagenet-lt', n_valid=3)
    with pytest.raises(ValueError, match='crop: photographs'): RunSettings('imagenet-lt', crop=4)
    with pytest.raises(FileNotFoundError, match='is not there'): settings(tmp_path/'b')
    with pytest.raises(ValueError, match="Did you mean 'imagenet-lt'"): RunSettings('imagenet')
    on_images = RunSettings(str(tmp_path/'a'), net='mlp8', size=16)
    with pytest.raises(ValueError, match="net: mlp8 can't take images"): on_images.check()


def test_the_identity_of_data_depends_on_its_lists(tmp_path):
    own_csv(tmp_path)
    s = settings(tmp_path/'images.csv')
    first = data_identity(s)
    os.utime(tmp_path/'blue/7.jpg', (1, 1))
    assert data_identity(s) == first
    Image.new('RGB', (40, 40)).save(tmp_path/'blue/9.jpg')
    assert data_identity(s) != first
    jpeg(tmp_path/'blue/9.jpg')
    first = data_identity(s)
    broken(tmp_path, 'images.csv', 22, 'blue/20.jpg,green,train')
    assert data_identity(s) != first
    assert data_identity(settings(tmp_path/'images.csv', data_seed=1)) != data_identity(s)


# The command line


def run(*args, cwd, check=True, **more):
    r = ltrl_process(*args, cwd=cwd, **more) if more else ltrl_here(*args, cwd=cwd)
    assert not check or r.returncode == 0, r.stdout+r.stderr
    assert 'Traceback' not in r.stderr and 'Warning' not in r.stderr, r.stderr
    return r.stdout+r.stderr


@pytest.mark.parametrize('method', ['paco', 'mdcs', 'mislas', 'ncm'])
def test_methods_on_photographs(method, tmp_path):
    "Methods with two views, with stages and with class means, on images that are transformed one by one"
    own_folder(tmp_path/'mine')
    s = RunSettings(str(tmp_path/'mine'), net='resnet18', size=32, bs=8, epochs=1, method=method,
                    policy='randaugment', reflective={})
    res, _ = train_run(s, bar=False)
    assert res['valid_accuracy']['all'] is not None
    assert len(res.get('stages', [])) == (method in ('mislas', 'ncm'))


@pytest.mark.slow
def test_train_on_a_folder(tmp_path):
    own_folder(tmp_path/'mine')
    message = run('train', '--dataset', 'mine', '--net', 'resnet18', '--size', '32', '--epochs', '1', cwd=tmp_path)
    assert 'Note: No validation image of 1 of 4 classes: yellow.' in message and 'mine: resnet18, ' in message
    assert 'Accuracy on validation images, since there is no test set' in message
    out, = (tmp_path/'ltrl-runs').iterdir()
    res = json.loads((out/'result.json').read_text())
    assert out.name.startswith('mine-bsce-rl-and-without-1ep-seed0') and res['gain']['many'] is None
    gain = res['valid_accuracy']['all']-res['baseline']['valid_accuracy']['all']
    assert res['gain']['all'] == pytest.approx(gain, abs=1e-5)
    assert '| bsce + RL * |' in run('report', 'ltrl-runs', cwd=tmp_path)  # one epoch: it does nothing


small = ('--set', 'net=resnet8', '--set', 'epochs=1', '--seeds', '1', '--jobs', '1')


@pytest.mark.slow
def test_train_and_compare_on_a_csv_file(tmp_path):
    own_csv(tmp_path)
    message = run('train', '--dataset', 'images.csv', '--net', 'resnet8', '--size', '16', '--epochs', '1', '--no-rl',
               '--out', 'a', cwd=tmp_path)
    assert 'Accuracy on the test set, in percent' in message
    assert json.loads((tmp_path/'a/result.json').read_text())['dataset'] == 'images.csv'
    args = ('compare', '--dataset', 'images.csv', *small, '--set', 'size=16', '--out', 'b')
    assert '2 computed, 0 were there already' in run(*args, cwd=tmp_path)
    assert '0 computed, 2 were there already' in run(*args, cwd=tmp_path)
    jpeg(tmp_path/'blue/0.jpg', 3)
    message = run(*args, cwd=tmp_path)
    assert 'the data changed' in message and '2 computed' in message


@pytest.mark.slow
def test_compare_loads_images_in_processes(tmp_path):
    "Runs of a comparison are processes that may start loader processes, as they do for a thousand images or more"
    own_folder(tmp_path/'mine', each=dict(a=900, b=400))
    message = run('compare', '--dataset', 'mine', *small, '--set', 'size=8', '--set', 'bs=256', '--rl', 'on',
                  '--out', 'b', cwd=tmp_path)
    assert '1 computed' in message


@pytest.mark.parametrize('args,message', [
    (('--dataset', 'mine', '--imbalance-factor', '10'), 'is long-tailed already'),
    (('--dataset', 'nowhere/mine'), 'nowhere/mine is not there'),
    (('--dataset', 'mine', '--data', '.'), 'the path of your images is the data set itself'),
    (('--dataset', 'imagenet-lt', '--data', '.'), 'ImageNet_LT_train.txt:3: expected `path label`'),
    (('--dataset', 'places-lt', '--data', '.'), 'Places-LT was not found at .'),
    (('--dataset', 'mine', '--net', 'mlp8', '--size', '16'), "can't take images")])
def test_errors_are_one_line(tmp_path, monkeypatch, args, message):
    own_folder(tmp_path/'mine')
    imagenet(tmp_path)
    broken(tmp_path, 'ImageNet_LT_train.txt', 3, 'train/n01440764/n01440764_2.JPEG')
    monkeypatch.chdir(tmp_path)
    r = CliRunner().invoke(app, ['train', *args, '--epochs', '1'])
    assert r.exit_code == 2
    assert r.output.startswith('Error: ') and message in r.output
    assert r.output.count('\n') == 1


def test_datasets(tmp_path, monkeypatch):
    imagenet(tmp_path/'data/ImageNet_LT')
    places(tmp_path/'data', easy=True)
    (tmp_path/'data/val/zoo/Places365_val_00000401.jpg').unlink()
    out = run('datasets', '--data', 'data', cwd=tmp_path)
    state = dict(re.findall(r'^(\S+) +[\d,]+ +[\d,]+ +[\d,]+ +(.+)$', out, re.M))
    installed = ('digits-lt', 'photos-lt', 'unicode-names', 'landforms', 'digits-folder')
    missing = ('cifar10-lt', 'cifar100-lt', 'cifar100-frozen-lt', 'inaturalist18', 'grocery', 'magnetic')
    assert state == {**dict.fromkeys(installed, 'there'), **dict.fromkeys(missing, 'missing'),
                     'imagenet-lt': 'there', 'places-lt': 'in part'}
    assert 'all 84 images below data/ImageNet_LT' in out
    assert 'train2018.json' in out
    assert '1 of 15 images in test (data/Places_LT_test.txt:14: val/zoo/Places365_val_00000401.jpg)' in out
    assert 'imagenet-lt is not the published ImageNet-LT' in out
    assert re.search(r'inaturalist18 +8,142 +437,513 +24,426', out)
    monkeypatch.chdir(tmp_path)
    def here(*args): return CliRunner().invoke(app, ['datasets', *args]).output
    rows = {o['name']: o for o in json.loads(here('--json', '--data', 'data'))}
    assert rows['cifar100-lt']['train'] == 10847 and rows['places-lt']['missing'].startswith('Images are missing')
    assert rows['imagenet-lt']['state'] == 'there' and not rows['imagenet-lt']['missing']
    assert 'x is not there, where a folder was expected' in here('--data', 'x')
    home = run('datasets', cwd=tmp_path, FASTAI_HOME=str(tmp_path/'home'))
    assert str(tmp_path/'home/data/iNaturalist18') in home and 'untar_data(URLs.CIFAR_100)' in home


def test_every_data_set_is_in_the_catalogue():
    assert [o['name'] for o in catalogue('nowhere')] == list(datasets)


def test_exported_learners_predict(tmp_path, quick_fit):
    dls = own_images(own_folder(tmp_path/'a'), **kw)
    learn = quick_fit(Learner(dls, CifarResNet(4, depth=8), opt_func=SGD, path=tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.export('m.pkl')
        loaded = load_learner(tmp_path/'m.pkl')
    with loaded.no_bar(): word, i, p = loaded.predict(tmp_path/'a/blue/3.jpg')
    assert word == dls.vocab[int(i)]
    assert p.shape == (4,)
    assert (tmp_path/'m.pkl').stat().st_size < 2e6


def two_classes(root, n):
    "A folder of `n` black images of two classes"
    for i in range(n):
        (root/f'{i%2}').mkdir(exist_ok=True)
        Image.new('RGB', (8, 8)).save(root/f'{i%2}/{i}.png')


def test_a_broken_image_is_named(tmp_path):
    two_classes(tmp_path, 8)
    (tmp_path/'1/half.png').write_bytes(b'half a download')
    message = '1 of 9 images can.t be read: .*half.png .it is no image.*--skip-broken'
    with pytest.raises(ValueError, match=message): own_images(tmp_path)


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    "Pillow refuses it when it is opened, with an error of its own kind"
    for name, size in dict(a=30, b=8).items():
        (tmp_path/name).mkdir()
        for i in range(3): Image.new('RGB', (size, size)).save(tmp_path/name/f'{i}.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200)
    assert has_small_images(tmp_path)  # by those that can be opened
    with pytest.raises(ValueError, match='3 of 6 images can.t be read: .*exceeds limit'): own_images(tmp_path)
    with pytest.raises(ValueError, match='png: the image is too large .*remove it'): own_images(tmp_path, check=False)


def test_a_folder_without_images_is_noted(tmp_path):
    two_classes(tmp_path, 12)
    (tmp_path/'pentagon').mkdir()
    with pytest.warns(DataNote, match='No image in 1 folder, left out: pentagon'): assert own_images(tmp_path).c == 2


# Lines of the lists in public repositories: classifier-balancing (Kang et al.), SADE, LADE and MiSLAS
as_published = {
    'places-lt': {
        'train': ('train/apartment_building-outdoor/00000794.jpg 8',
                  'data_256/a/apartment_building/outdoor/00000794.jpg 8'),
        'valid': ('train/airfield/00002049.jpg 0', 'data_256/a/airfield/00002049.jpg 0'),
        'test': ('val/airfield/Places365_val_00003597.jpg 0', 'val_256/Places365_val_00003597.jpg 0'),
    },
    'imagenet-lt': {
        'train': ('train/n01440764/n01440764_10026.JPEG 0',),
        'valid': ('train/n15075141/n15075141_10125.JPEG 999',),
        'test': ('val/n01440764/ILSVRC2012_val_00029930.JPEG 0', 'val/ILSVRC2012_val_00007556.JPEG 999'),
    },
    'inaturalist18': {'test': ('train_val2018/Plantae/7291/9f8ecb39e5f767e39e9b28e34488f179.jpg 7291',)},
}


@pytest.mark.parametrize('last', ['\n', '', '\r\n'], ids=['a line feed', 'nothing', 'Windows'])
def test_lines_of_public_lists(tmp_path, last):
    "Lines of the lists in public repositories; one of the lists does not end its last line"
    for lists in as_published.values():
        for lines in lists.values():
            for line in lines:
                (tmp_path/'list.txt').write_bytes((f'{line}\n{line}{last}').encode())
                images = read_list(tmp_path/'list.txt')
                path, label = line.split()
                assert images.paths == [path]*2
                assert images.labels == [int(label)]*2
                assert images.lines == [1, 2]


def flat(root, name):
    "List test images without class folders, as SADE, LADE and MiSLAS do"
    f = root/list_sets[name].lists['test']
    folder = 'val_256/' if name == 'places-lt' else 'val/'
    f.write_text(re.sub(r'^val(_256)?/(.*/)?', folder, f.read_text(), flags=re.M))


@pytest.mark.parametrize('name', ['imagenet-lt', 'places-lt'])
@pytest.mark.parametrize('easy', [True, False], ids=['easy lists', 'lists of data_256'])
def test_flat_test_lists_of_images_in_folders(tmp_path, name, easy):
    "Lists of data_256 with images in Places365's easy format, and LADE's list with ImageNet's images in class folders"
    load = imagenet_lt if name == 'imagenet-lt' else places_lt
    if name == 'imagenet-lt': lines = imagenet(tmp_path)
    else:
        lines = places(tmp_path, easy, to_easy)
        if not easy:
            for p, y in lines['test']:
                class_folder = tmp_path/'val'/easy_folders[y]
                class_folder.mkdir(parents=True, exist_ok=True)
                os.replace(tmp_path/p, class_folder/os.path.basename(p))
    flat(tmp_path, name)
    dls = load(tmp_path, **kw)
    assert sizes(dls) == [59, 10, 15]
    assert list(dls.test.dataset.targets) == [y for _, y in lines['test']]
    assert 'val' not in folders_of(dls.test)
    os.remove(files_of(dls.test)[4])
    with pytest.raises(FileNotFoundError, match='1 of 15 images in test'): load(tmp_path, **kw)


@pytest.mark.parametrize('folder', ['data_txt/Places_LT_v2', 'data/Places_LT', 'data/Places_LT_v2', 'Places_LT_v2',
                                    'data_txt/Places_LT', 'Places_LT', '.'])
def test_lists_in_the_folders_of_repositories(tmp_path, folder):
    "A checkout of SADE, LADE, MDCS or classifier-balancing next to the images"
    places(tmp_path, True)
    (tmp_path/folder).mkdir(parents=True, exist_ok=True)
    for o in list_sets['places-lt'].lists.values():
        if folder != '.': os.replace(tmp_path/o, tmp_path/folder/o)
    assert sizes(places_lt(tmp_path, **kw)) == [59, 10, 15]
