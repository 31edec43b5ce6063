"`ltrl inspect`: what is found in folders and CSV files, against naive references, and the page in a browser."
import collections
import json
import os
import re
import shutil
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest
from command_line import start_ltrl
from PIL import Image
from ltrl_fastai.data import audit as audit_module
from ltrl_fastai.data.audit import difference_hash, image_facts, inspect_images, near_pairs, shot_bounds
from ltrl_fastai.data.audit_page import audit_html, audit_text
from ltrl_fastai.data.own import own_images
from ltrl_fastai.evaluation.metrics import shot_groups
from ltrl_fastai.cli.main import app
from typer.testing import CliRunner

rng = np.random.default_rng(0)


def photograph(seed, width=96, height=72):
    "A smooth picture: coarse noise, enlarged"
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(im, file, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    im.save(file, **kwargs)
    return file


def folders(root, sizes):
    "A folder of different photographs for each path in `sizes`"
    seed = 0
    for name, n in sizes.items():
        for i in range(n):
            save(photograph(seed), root/name/f'{i}.jpg', quality=90)
            seed += 1
    return root


def whole(root):
    "Two classes in three splits, without a fault"
    return folders(root, {f'{split}/{name}': n for split, n in dict(train=6, valid=2, test=2).items()
                          for name in ('cat', 'dog')})


def found(audit, kind):
    "The only finding of a kind"
    res = [o for o in audit.findings if o.kind == kind]
    assert len(res) == 1, [(o.kind, o.text) for o in audit.findings]
    return res[0]


def kinds(audit): return {o.kind for o in audit.findings}


def pairs_of(finding): return {frozenset(o.path for o in places) for places in finding.groups}


# Bounds of the groups


@pytest.mark.parametrize('seed', range(30))
def test_bounds_make_three_groups_if_any_do(seed):
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 10**generator.integers(1, 5), generator.integers(1, 40))
    many, few, _ = shot_bounds(counts)
    sizes = [int(m.sum()) for k, m in shot_groups(counts, many, few).items() if k != 'all']
    assert all(sizes) == (len(set(counts.tolist())) >= 3)
    usual = [int(m.sum()) for k, m in shot_groups(counts).items() if k != 'all']
    if all(usual): assert (many, few) == (100, 20)


def test_bounds_that_are_given():
    counts = [30, 20, 10]
    assert shot_bounds(counts, 25, 15)[:2] == (25, 15)
    assert shot_bounds(counts, many=10)[:2] == (10, 10)
    assert shot_bounds(counts, few=200)[:2] == (200, 200)
    assert 'of two sizes' in shot_bounds([5, 5, 3])[2] and 'the same size' in shot_bounds([5, 5])[2]
    for many, few in ((5, 10), (5, 0), (-1, None)):
        with pytest.raises(ValueError, match='expected `few`'): shot_bounds(counts, many, few)


@pytest.mark.parametrize('has_valid', [False, True])
def test_groups_are_those_of_the_training(tmp_path, has_valid):
    "The classes that `ltrl train` calls Many, Medium and Few with the bounds that are proposed"
    sizes = {f'train/{name}': n for name, n in dict(a=30, b=13, c=11, d=10, e=6, f=2).items()}
    if has_valid: sizes.update({'valid/a': 2, 'valid/b': 2})
    root = folders(tmp_path, sizes)
    audit = inspect_images(root, duplicates=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = own_images(root, size=16, check=False)
    counts = np.bincount([int(o) for o in dls.train_ds.targets])
    assert audit.train_sizes == counts.tolist()
    groups = {k: m.nonzero().squeeze(1).tolist() for k, m in shot_groups(counts, audit.many, audit.few).items()}
    del groups['all']
    assert audit.groups == groups and all(groups.values())


# Duplicates


def naive_pairs(bits):
    "Pairs of nearly equal hashes, one after the other"
    for i in range(len(bits)):
        for j in range(i+1, len(bits)):
            rarer = min(*(min(bits[k].sum(), (~bits[k]).sum()) for k in (i, j)))
            differing = int((bits[i] != bits[j]).sum())
            if rarer >= 48 and differing*128 <= 12*rarer: yield i, j, differing


@pytest.mark.parametrize('rows', [2**24, 70])
def test_near_pairs_are_those_of_a_comparison_of_each_pair(rows, monkeypatch):
    "In one block of rows, and in several"
    base = rng.random((40, 256)) < rng.choice([.1, .3, .5], (40, 1))
    near = [row ^ (rng.random(256) < share) for row in base for share in (0, .02, .04, .06)]
    bits = rng.permutation(np.concatenate([base, near]))
    monkeypatch.setattr(audit_module, '_block', rows)
    i, j, distance = near_pairs(bits)
    expected = sorted(naive_pairs(bits))
    assert sorted(zip(i.tolist(), j.tolist(), distance.tolist())) == expected and len(expected) > 50


@pytest.mark.parametrize('n', [0, 1])
def test_no_pairs_of_one_image(n): assert not len(near_pairs(np.zeros((n, 256), dtype=bool))[0])


def test_a_hash_compares_neighbours():
    im = photograph(3)
    grey = np.asarray(im.convert('L').resize((17, 16), Image.Resampling.BOX)).astype(int)
    expected = [grey[y, x+1] > grey[y, x] for y in range(16) for x in range(16)]
    assert difference_hash(im).tolist() == expected


@pytest.fixture
def copies(tmp_path):
    "Identical and similar images in all relations of split and class"
    root = whole(tmp_path/'pets')
    def at(o): return root/o
    shutil.copy(at('train/cat/0.jpg'), at('test/cat/same.jpg'))  # identical across splits
    decoded = Image.open(at('train/cat/1.jpg'))
    save(decoded, at('train/dog/same.png'))  # identical pixels in another file, across classes
    shutil.copy(at('train/dog/2.jpg'), at('train/dog/again.jpg'))  # identical in one class
    save(Image.open(at('train/dog/3.jpg')).resize((150, 112)), at('valid/dog/larger.jpg'), quality=60)
    save(Image.open(at('test/cat/0.jpg')).point(lambda v: 30+v//2), at('test/cat/pale.jpg'), quality=80)
    return root


def test_duplicates_by_split_and_class(copies):
    audit = inspect_images(copies)
    expected = {
        'leak': {('test/cat/same.jpg', 'train/cat/0.jpg')}, 'conflict': {('train/dog/same.png', 'train/cat/1.jpg')},
        'copies': {('train/dog/2.jpg', 'train/dog/again.jpg')},
        'near-leak': {('valid/dog/larger.jpg', 'train/dog/3.jpg')},
        'near-copies': {('test/cat/0.jpg', 'test/cat/pale.jpg')}}
    assert {k: pairs_of(found(audit, k)) for k in expected} == {k: set(map(frozenset, v)) for k, v in expected.items()}
    assert [o.severity for o in audit.findings if o.kind in ('leak', 'conflict')] == ['error']*2
    assert not kinds(inspect_images(copies, duplicates=False)) & set(expected)


def test_duplicates_are_those_of_a_comparison_of_each_pair(copies):
    "All pairs of files, compared by bytes, by pixels and by hash"
    files = sorted(o for o in copies.rglob('*') if o.is_file())
    pixels = [np.asarray(Image.open(o).convert('RGB')) for o in files]
    hashes = np.stack([image_facts(o).bits for o in files])
    exact = {frozenset((i, j)) for i in range(len(files)) for j in range(i) if np.array_equal(pixels[i], pixels[j])}
    near = {frozenset(o[:2]) for o in naive_pairs(hashes)}-exact
    def named(pairs): return {frozenset(str(files[i].relative_to(copies)) for i in o) for o in pairs}
    audit = inspect_images(copies)
    def reported(*names): return set().union(*(pairs_of(o) for o in audit.findings if o.kind in names))
    assert reported('leak', 'conflict', 'copies') == named(exact) and len(exact) == 3
    assert reported('near-leak', 'near-conflict', 'near-copies') == named(near) and len(near) == 2


def test_similar_images_of_several_classes(tmp_path):
    "Each image is shown with the most similar one of another class"
    root = whole(tmp_path)
    im = Image.open(root/'train/cat/0.jpg')
    save(im.resize((150, 112)), root/'train/dog/larger.png')
    save(im.resize((60, 45)), root/'train/dog/smaller.png')
    shutil.copy(root/'train/cat/0.jpg', root/'train/cat/twin.jpg')
    audit = inspect_images(root)
    finding = found(audit, 'near-conflict')
    expected = {frozenset(('train/cat/0.jpg', f'train/dog/{o}.png')) for o in ('larger', 'smaller')}
    assert pairs_of(finding) == expected and '3 images' in finding.text and 'conflict' not in kinds(audit)
    save(im, root/'test/dog/same.png')
    same = found(inspect_images(root), 'conflict')
    assert {o.path for o in same.groups[0]} == {'train/cat/0.jpg', 'train/cat/twin.jpg', 'test/dog/same.png'}
    assert 'train/cat/0.jpg (cat) and test/dog/same.png (dog).' in same.text


def test_an_exact_leak_is_no_near_leak_too(tmp_path):
    "A test image whose copy and whose smaller version are both in training is reported once"
    root = whole(tmp_path)
    shutil.copy(root/'train/cat/0.jpg', root/'test/cat/copy.jpg')
    save(Image.open(root/'train/cat/0.jpg').resize((48, 36)), root/'train/cat/small.png')
    audit = inspect_images(root)
    assert pairs_of(found(audit, 'leak')) == {frozenset(('test/cat/copy.jpg', 'train/cat/0.jpg'))}
    assert 'near-leak' not in kinds(audit) and found(audit, 'near-copies').severity == 'note'


def test_tiny_and_flat_images_are_compared_by_their_pixels(tmp_path):
    "Too small or too smooth for a hash, and saved in two ways"
    root = whole(tmp_path)
    for name, im in dict(tiny=photograph(80, 12, 9), flat=Image.linear_gradient('L').resize((64, 64))).items():
        save(im, root/f'train/cat/{name}.png', compress_level=0)
        save(im, root/f'test/cat/{name}.bmp')
    expected = {frozenset((f'test/cat/{o}.bmp', f'train/cat/{o}.png')) for o in ('tiny', 'flat')}
    assert pairs_of(found(inspect_images(root), 'leak')) == expected


def test_drawings_and_blank_images_are_not_taken_for_each_other(tmp_path):
    "Strokes on a white page, and pages of different colours"
    for i in range(8):
        page = np.full((64, 64), 255, dtype=np.uint8)
        page[8:56, 10+5*i:13+5*i] = 0
        save(Image.fromarray(page), tmp_path/'line'/f'{i}.png')
        save(Image.new('L', (64, 64), 20*i), tmp_path/'empty'/f'{i}.png')
    audit = inspect_images(tmp_path)
    assert not kinds(audit) & {'copies', 'near-copies', 'near-conflict'}
    assert len(found(audit, 'blank').files) == 8


# Files


def bad_files(root):
    "One file for each fault, in a data set that has no other, and the kind of finding that it belongs to"
    root = whole(root)
    cat = root/'train/cat'
    (cat/'half.jpg').write_bytes((cat/'0.jpg').read_bytes()[:900])
    (cat/'empty.png').touch()
    (cat/'text.jpg').write_text('no image')
    save(Image.fromarray(rng.random((40, 40)).astype(np.float32)), cat/'float.tif')
    ramp = np.add.outer(np.arange(64), np.arange(64))
    save(Image.fromarray((ramp*500).astype(np.uint16)), cat/'deep.png')
    save(photograph(70).convert('L'), cat/'grey.jpg')
    save(photograph(71).convert('P'), cat/'palette.png')
    save(photograph(72).convert('CMYK'), cat/'print.jpg')
    save(photograph(73, 40, 20), cat/'thumb.png')
    save(photograph(74, 400, 90), cat/'strip.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6
    save(photograph(75), cat/'sideways.jpg', exif=exif)
    save(Image.new('RGB', (90, 90)), cat/'black.png')
    (cat/'notes.txt').write_text('about cats')
    return root, {'broken': ['half.jpg', 'empty.png', 'text.jpg', 'float.tif'], '16-bit': ['deep.png'],
                  'greyscale': ['grey.jpg'], 'palette': ['palette.png'], 'cmyk': ['print.jpg'], 'tiny': ['thumb.png'],
                  'extreme-shape': ['strip.jpg'], 'rotated': ['sideways.jpg'], 'blank': ['black.png'],
                  'other-files': ['notes.txt']}


def test_bad_files(tmp_path):
    "Each is found, and nothing else is"
    root, expected = bad_files(tmp_path)
    audit = inspect_images(root)
    for kind, names in expected.items():
        assert set(found(audit, kind).files) == {f'train/cat/{o}' for o in names}
    assert kinds(audit) == set(expected) | {'small'}
    assert 'truncated' in found(audit, 'broken').text and '--skip-broken' in found(audit, 'broken').advice


def test_a_class_without_a_readable_image(tmp_path):
    root = whole(tmp_path)
    for o in (root/'train/dog').iterdir(): o.write_bytes(b'')
    assert 'images of dog can' in found(inspect_images(root), 'class-lost').text


def test_a_kind_of_file_that_gives_the_class_away(tmp_path):
    root = whole(tmp_path)
    for o in (root/'train/cat').iterdir(): Image.open(o).convert('L').save(o)
    finding = found(inspect_images(root), 'greyscale')
    assert finding.severity == 'warning' and 'of class cat' in finding.text


def test_all_greyscale_or_all_small_is_no_fault(tmp_path):
    for i in range(8): save(photograph(i, 20, 20).convert('L'), tmp_path/f'{i%2}'/f'{i}.png')
    assert not kinds(inspect_images(tmp_path)) & {'greyscale', 'tiny', 'small', 'extreme-shape'}


# Classes


def naive_counts(root):
    "Images of each class and split, by walking over the folders"
    res = collections.defaultdict(collections.Counter)
    for folder, _, files in os.walk(root):
        parts = os.path.relpath(folder, root).split(os.sep)
        for o in files:
            if o.endswith('.jpg'): res[parts[0]][parts[1]] += 1
    return {k: dict(v) for k, v in res.items()}


def test_counts_are_those_of_a_walk(tmp_path):
    sizes = {'train/a': 9, 'train/b': 5, 'train/c d': 2, 'valid/a': 2, 'test/b': 3, 'test/c d': 1, 'test/ü': 0}
    root = folders(tmp_path, sizes)
    audit = inspect_images(root, many=6, few=4)
    counts = {k: {audit.vocab[i]: n for i, n in enumerate(v) if n} for k, v in audit.counts.items()}
    assert counts == naive_counts(root)
    assert audit.n_images == sum(sizes.values()) and audit.imbalance_factor == 4.5
    groups = {k: [audit.vocab[i] for i in v] for k, v in audit.groups.items()}
    assert groups == dict(many=['a'], medium=['b'], few=['c d'])
    assert 'b, c d' in found(audit, 'no-valid').text and ': a.' in found(audit, 'no-test').text
    assert 'c d (2)' in found(audit, 'very-few').text


def test_notes_of_own_images_are_findings_with_advice(tmp_path):
    train = {'train/birds/owl': 6, 'train/dog': 6}
    root = folders(tmp_path, {**train, 'test/birds/owl': 2, 'test/pets/dog': 2, 'spare/x': 1})
    (root/'train/empty').mkdir()
    notes = [o for o in inspect_images(root).findings if o.kind == 'note']
    assert len(notes) == 4 and all(o.advice in audit_module._note_advice.values() for o in notes)
    texts = ' '.join(o.text for o in notes)
    for o in ('spare', 'is taken for', 'train/empty', 'were drawn from training'): assert o in texts
    alone = inspect_images(folders(tmp_path/'alone', dict(a=6, b=6)))
    assert any('no test set' in o.text and 'test_share' in o.advice for o in alone.findings)


def test_balanced_classes(tmp_path):
    assert found(inspect_images(folders(tmp_path/'a', dict(cat=6, dog=5))), 'balanced').severity == 'note'
    assert 'balanced' not in kinds(inspect_images(folders(tmp_path/'b', dict(cat=9, dog=5))))


def test_names_that_differ_in_form_only(tmp_path):
    root = folders(tmp_path, {'Guinea pig': 3, 'guinea_pig': 3, 'caf\u00e9': 3, 'cafe\u0301': 3, 'cat': 3})
    text = found(inspect_images(root), 'similar-names').text
    assert "'Guinea pig' and 'guinea_pig'" in text and text.count(' and ') == 2 and "'cat'" not in text


# Data that `own_images` refuses


refused = {
    'no image': ({}, 'found no image'), 'one class': ({'cat': 5}, 'two classes or more'),
    'pairs': ({'cat': 1, 'dog': 1}, 'three images or more'),
    'unknown class': ({'train/cat': 4, 'train/dog': 4, 'test/owl': 2}, 'no training image is of class owl'),
    'no training': ({'valid/cat': 4, 'valid/dog': 4, 'test/cat': 2}, 'expected a folder `train`'),
    'no folders': ({'.': 3}, 'is in no folder of a class'),
    'flat test': ({'train/cat': 4, 'train/dog': 4, 'test': 2}, 'are in no folder of a class')}


@pytest.mark.parametrize('name', refused)
def test_refused_folders(name, tmp_path):
    "The error is a finding, and all images are still read"
    sizes, text = refused[name]
    root = folders(tmp_path, sizes)
    files = sorted(root.rglob('*.jpg'))
    if files: files[-1].write_bytes(b'')
    audit = inspect_images(root)
    assert text in found(audit, 'refused').text and found(audit, 'refused').severity == 'error'
    assert audit.n_images == len(files)
    if files: assert found(audit, 'broken').files == [str(files[-1].relative_to(root))]
    assert text.split()[0] in audit_text(audit) and audit_html(audit).endswith('</html>')


def test_a_class_of_one_image(tmp_path):
    "It can be trained, and is pointed out"
    audit = inspect_images(folders(tmp_path, dict(cat=5, dog=4, owl=1)))
    assert 'owl (1)' in found(audit, 'very-few').text and 'refused' not in kinds(audit)


def test_images_of_a_class_without_training_images(tmp_path):
    root = folders(tmp_path, refused['unknown class'][0])
    assert found(inspect_images(root), 'untrained-class').files == ['test/owl/0.jpg', 'test/owl/1.jpg']


def table(root, rows, header='path,label,split', encoding='utf-8'):
    "A CSV file beside photographs"
    folders(root, {'images': 8})
    (root/'images.csv').write_text('\n'.join([header, *rows])+'\n', encoding=encoding)
    return root/'images.csv'


rows = [f'images/{i}.jpg,{"cat" if i < 4 else "dog"},{"test" if i in (3, 7) else "train"}' for i in range(8)]


def test_csv(tmp_path):
    audit = inspect_images(table(tmp_path, rows))
    assert audit.counts == dict(train=[3, 3], test=[1, 1]) and audit.root == tmp_path
    assert not audit.number_of('error')
    (tmp_path/'other.csv').write_text((tmp_path/'images.csv').read_text().replace('path,label', 'where,what'))
    same = inspect_images(tmp_path/'other.csv', path_col='where', label_col='what', split_col='split')
    assert same.counts == audit.counts


bad_csv = {
    'quote': ([*rows[:2], 'images/2.jpg,"cat,train', *rows[3:]], 'images.csv:4: this line', 0),
    'values': ([*rows[:2], 'images/2.jpg,cat', *rows[3:]], 'images.csv:4: expected 3 values', 0),
    'split': ([*rows[:2], 'images/2.jpg,cat,trial', *rows[3:]], 'images.csv:4: expected train, valid or test', 0),
    'class': ([*rows, 'images/0.jpg,owl,test'], 'images.csv:10: class', 9),
    'twice': ([*rows, rows[0]], 'listed in', 9),
    'one class': (rows[:4], 'two classes or more', 4),
    'empty': ([], 'found none', 0)}


@pytest.mark.parametrize('name', bad_csv)
def test_bad_csv(name, tmp_path):
    lines, text, n_images = bad_csv[name]
    audit = inspect_images(table(tmp_path, lines))
    assert text in found(audit, 'refused').text and audit.n_images == n_images
    assert audit_html(audit).endswith('</html>')


def test_missing_images_of_a_csv(tmp_path):
    "They are one finding, and not broken"
    file = table(tmp_path, rows)
    for i in (1, 3): (tmp_path/f'images/{i}.jpg').unlink()
    audit = inspect_images(file)
    finding = found(audit, 'missing')
    assert finding.files == ['images/1.jpg', 'images/3.jpg'] and 'images.csv:3' in finding.text
    assert not kinds(audit) & {'refused', 'broken'}


def test_a_listed_image_of_two_classes(tmp_path):
    audit = inspect_images(table(tmp_path, [*rows, 'images/0.jpg,dog,train']))
    assert {o.name for o in found(audit, 'conflict').groups[0]} == {'cat', 'dog'}


def test_paths_that_are_no_data(tmp_path):
    (tmp_path/'notes.txt').touch()
    with pytest.raises(FileNotFoundError, match='no folder or file'): inspect_images(tmp_path/'nothing')
    with pytest.raises(ValueError, match='ends in .csv'): inspect_images(tmp_path/'notes.txt')


# Reports


def odd_names(root):
    "Names with markup, accents, a line break, and bytes that are no UTF-8"
    names = ['<b>"x"&\'', '[red]y[bold]', 'ünï-çødé 猫', 'a\nb', os.fsdecode(b'caf\xe9'), '{{ 7*7 }}']
    root = folders(root, {f'{split}/{name}': n for split, n in dict(train=3, test=1).items() for name in names})
    for o in names: shutil.copy(root/'train'/o/'0.jpg', root/'test'/o/'copy.jpg')
    return root


def test_reports_show_any_name(tmp_path):
    audit = inspect_images(odd_names(tmp_path))
    assert len(found(audit, 'leak').groups) == 6
    text = audit_text(audit, width=200)
    page = audit_html(audit)
    for o in (text, page): o.encode('utf-8')
    for o in ('<b>"x"&\'', '[red]y[bold]', 'ünï-çødé 猫', 'a?b', 'caf?', '{{ 7*7 }}'): assert f'\n{o}' in text
    assert '&lt;b&gt;' in page and '<b>"' not in page and '猫' in page and '>{{ 7*7 }}<' in page


def references(page):
    "What a page refers to"
    return re.findall(r'(?:src|href|action|data|poster|srcset)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import\s+([^;]*)', page)


def test_the_page_is_self_contained(copies):
    page = audit_html(inspect_images(copies))
    refs = [''.join(o) for o in references(page)]
    assert len(refs) >= 10 and all(o.startswith('data:image/jpeg;base64,') for o in refs)
    assert not re.search(r'https?:|//\w|<script|<link|<iframe', re.sub(r'base64,[\w+/=]*', '', page))
    assert references('<img src="http://x">') and references('a {background: url(http://x)}')


def test_the_page_shows_as_many_bars_as_classes_and_limits_pictures(tmp_path, monkeypatch):
    root = folders(tmp_path, {f'{split}/{name}': 2 for split in ('train', 'test') for name in 'abcdefghij'})
    for o in 'abcdefghij': shutil.copy(root/'train'/o/'0.jpg', root/'test'/o/'copy.jpg')
    monkeypatch.setattr('ltrl_fastai.data.audit_page._most_groups', 4)
    monkeypatch.setattr('ltrl_fastai.data.audit_page._most_files', 15)
    audit = inspect_images(root)
    page = audit_html(audit)
    leak = page.partition('identical to')[2].partition('</article>')[0]
    assert leak.count('<img') == 8 and '4 of 10 are' in leak and leak.count('<li>') == 15 and 'And 5 more' in leak
    assert len(re.findall('<rect class="(?:Many|Medium|Few)" x=', page)) == 10 == page.count('<title>')-1


def test_the_text_leaves_out_the_middle_of_many_classes(tmp_path):
    root = folders(tmp_path, {f'class{i:02}': 1+i%3 for i in range(40)})
    text = audit_text(inspect_images(root))
    assert '... 16 more' in text and len(re.findall(r'^class\d\d +(?:Many|Medium|Few) ', text, re.M)) == 24
    assert max(map(len, text.splitlines())) <= 100 and '\x1b' not in text
    assert '\x1b[' in audit_text(inspect_images(root), colour=True)
    assert '0 error' in str(inspect_images(root))


# The command


runner = CliRunner()


def test_command(copies, tmp_path):
    page = tmp_path/'reports/pets.html'
    r = runner.invoke(app, ['inspect', str(copies), '--out', str(page), '--many', '5', '--few', '3'])
    assert r.exit_code == 0 and f'Written: {page}' in r.output and 'error: 1 test image is identical' in r.output
    assert 'more than 5' in r.output and 'mend the errors' in r.output
    assert page.read_text(encoding='utf-8') == audit_html(inspect_images(copies, many=5, few=3))
    r = runner.invoke(app, ['inspect', str(copies), '--out', str(page), '--no-duplicates'])
    assert r.exit_code == 0 and 'identical' not in r.output+page.read_text(encoding='utf-8')


def test_default_page_and_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole(tmp_path/'my pets')
    r = runner.invoke(app, ['inspect', 'my pets'])
    assert r.exit_code == 0 and "`ltrl train --dataset 'my pets'" in r.output
    assert {o.name for o in tmp_path.iterdir()} == {'my pets', 'ltrl-inspect.html'}


def test_an_audit_with_errors_exits_with_0(tmp_path):
    r = runner.invoke(app, ['inspect', str(tmp_path), '--out', str(tmp_path/'a.html')])
    assert r.exit_code == 0 and 'found no image' in r.output and (tmp_path/'a.html').exists()


def test_mistakes_exit_with_2(tmp_path):
    whole(tmp_path/'pets')
    (tmp_path/'file').touch()
    (tmp_path/'mine.html').write_text('<html>my page</html>')
    data, out = str(tmp_path/'pets'), str(tmp_path/'a.html')
    for text, args in {
            'no folder or file': [str(tmp_path/'nothing'), '--out', out],
            'ends in .csv': [str(tmp_path/'file'), '--out', out],
            'is a folder': [data, '--out', data], 'ends in .html': [data, '--out', str(tmp_path/'a.csv')],
            'file is a file and no folder': [data, '--out', str(tmp_path/'file/deeper/a.html')],
            'is not replaced': [data, '--out', str(tmp_path/'mine.html')],
            'expected `few`': [data, '--out', out, '--many', '3', '--few', '8']}.items():
        r = runner.invoke(app, ['inspect', *args])
        assert r.exit_code == 2 and text in r.output, (args, r.output)
    assert not (tmp_path/'a.html').exists() and (tmp_path/'mine.html').read_text() == '<html>my page</html>'


def test_a_page_that_cant_be_written(tmp_path, monkeypatch):
    "A full disk, after the audit"
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.replace', full)
    r = runner.invoke(app, ['inspect', str(whole(tmp_path/'pets')), '--out', str(tmp_path/'a.html')])
    assert r.exit_code == 2 and "a.html can't be written (No space left on device)" in r.output
    assert [o.name for o in tmp_path.iterdir()] == ['pets']


def test_a_named_data_set(tmp_path, monkeypatch):
    "`grocery` and `magnetic` are found where training finds them"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ltrl_fastai.data.facts.data_folder', lambda path=None: tmp_path/'data')
    r = runner.invoke(app, ['inspect', 'magnetic'])
    assert r.exit_code == 2 and 'The package downloads none of it' in r.output
    folders(tmp_path/'data/magnetic', {'train/free': 4, 'train/crack': 3, 'test/free': 1, 'test/crack': 1})
    r = runner.invoke(app, ['inspect', 'magnetic'])
    assert r.exit_code == 0 and '9 images of 2 classes' in ' '.join(r.output.split())


def test_an_old_terminal(tmp_path):
    "Without Unicode, and with a name that is no UTF-8"
    args = ['inspect', str(odd_names(tmp_path/'data')), '--out', str(tmp_path/'a.html')]
    r = CliRunner(charset='ascii').invoke(app, args)
    assert r.exit_code == 0 and 'caf?' in r.output and '=====' in r.output
    assert '█████' in runner.invoke(app, args).output


def test_interrupt(tmp_path, monkeypatch):
    def interrupted(file): raise KeyboardInterrupt
    monkeypatch.setattr(audit_module, 'image_facts', interrupted)
    r = runner.invoke(app, ['inspect', str(whole(tmp_path/'pets')), '--out', str(tmp_path/'a.html')])
    assert r.exit_code == 130 and r.output == '\nInterrupted. Nothing was written.\n'
    assert not (tmp_path/'a.html').exists()


@pytest.mark.slow
def test_interrupt_of_a_process(tmp_path):
    "Ctrl-C while files are read: those that are not begun are not read"
    root = folders(tmp_path/'data', dict(cat=300, dog=3))
    os.mkfifo(root/'cat/00.jpg')  # the first file, and reading it waits for a writer
    p = start_ltrl('inspect', root, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        with open(root/'cat/00.jpg', 'wb'):
            time.sleep(.2)
            p.send_signal(signal.SIGINT)
            time.sleep(.2)
        out, err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 130 and err == '\nInterrupted. Nothing was written.\n', (out, err)
    assert not (tmp_path/'ltrl-inspect.html').exists()


# In a browser


def luminance(colour):
    "Relative luminance of a CSS colour (WCAG 2)"
    v = [int(o)/255 for o in re.findall(r'\d+', colour)[:3]]
    return sum(w*(c/12.92 if c <= .04045 else ((c+.055)/1.055)**2.4) for w, c in zip((.2126, .7152, .0722), v))


def contrast(a, b):
    darker, lighter = sorted(map(luminance, (a, b)))
    return (lighter+.05)/(darker+.05)


@pytest.mark.slow
@pytest.mark.parametrize('width', [1300, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_in_a_browser(copies, tmp_path, browser, scheme, width):
    "It loads nothing else, shows all pictures, is readable, and is not wider than the screen"
    shutil.copytree(odd_names(tmp_path/'odd')/'train', copies/'train', dirs_exist_ok=True)
    page = tmp_path/'page.html'
    page.write_text(audit_html(inspect_images(copies)), encoding='utf-8')
    media = dict(name='prefers-color-scheme', value=scheme)
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[media]))
    screen = dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    browser.get_log('performance')
    browser.get(page.as_uri())
    assert not [o for o in browser.get_log('browser') if o['level'] == 'SEVERE']
    messages = [json.loads(o['message'])['message'] for o in browser.get_log('performance')]
    urls = [o['params']['request']['url'] for o in messages if o['method'] == 'Network.requestWillBeSent']
    assert page.as_uri() in urls and all(o.startswith(('data:', 'file:')) for o in urls)
    pictures = browser.execute_script('return [...document.images].map(o => o.naturalWidth)')
    assert len(pictures) >= 10 and all(pictures)
    wide, screen = browser.execute_script('return [document.scrollingElement.scrollWidth, window.innerWidth]')
    assert wide <= screen
    colours = browser.execute_script('''const c = o => getComputedStyle(document.querySelector(o));
        return [c("body").backgroundColor, c("article").backgroundColor, c("body").color, c(".soft").color,
                ...[...document.querySelectorAll(".badge")].map(o => getComputedStyle(o).color)]''')
    body, card, *texts = colours
    assert (luminance(body) > .5) == (scheme == 'light')
    assert len(texts) > 4 and all(contrast(o, back) > 4.5 for o in texts for back in (body, card))
    bars = browser.execute_script('''return [...document.querySelectorAll("figure.chart rect")].map(
        o => o.getBoundingClientRect()).map(o => [o.width, o.height])''')
    assert len(bars) == 8 and all(w > 3 and h > 3 for w, h in bars)


def test_the_page_tells_no_folder_above_the_data(tmp_path):
    "Also for a list of images that lie elsewhere"
    photos = tmp_path/'photos'
    rows = ['path,label']
    for i, name in enumerate(['owl', 'owl', 'bee', 'bee', 'bee']):
        save(photograph(min(i, 3)), photos/name/f'{i}.png')
        rows.append(f'{photos/name}/{i}.png,{name}')
    (tmp_path/'list').mkdir()
    (tmp_path/'list/birds.csv').write_text('\n'.join(rows))
    (photos/'bee/4.png').write_bytes(b'no image')
    for data in (photos, tmp_path/'list/birds.csv'):
        page = audit_html(inspect_images(data))
        assert str(tmp_path) not in page and 'bee/4.png' in page
