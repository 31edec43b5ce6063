"In every kind of loader, sample ids match the content of a batch, and the memory keeps each item's last prediction."
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.load import SkipItemException
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.tabular.core import TabDataLoader, TabWeightedDL
from fastai.text.all import AWD_LSTM, SortedDL, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from fastai.vision.all import (
    Callback, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, GrandparentSplitter, ImageBlock,
    ImageDataLoaders, Lambda, Learner, Resize, get_image_files, nn, parent_label, set_seed)
from ltrl_fastai.all import ReflectiveLearning, WithIds, digits_lt
from parts import all_three
from ltrl_fastai.reflective import samples
from PIL import Image
from torch.utils.data import DataLoader as TorchDL, IterableDataset, WeightedRandomSampler

N, bs, n_epoch = 47, 6, 3


class Rows:
    "Items of random numbers, in three classes that do not depend on their order"
    def __init__(self, n=N):
        g = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, 4, generator=g)
        self.y = torch.randint(0, 3, (n,), generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


class Skips:
    "A transform that skips some items, until it is repaired"
    def __init__(self, skipped):
        self.skipped = [row(Rows().x[i]) for i in skipped]
        self.repaired = False
    def __call__(self, o):
        if not self.repaired and row(o[0]) in self.skipped: raise SkipItemException
        return o


class Probe(Callback):
    "Identify the items of a batch by content, compare them with the sample ids, and keep the last prediction of each"
    order, run_valid = 5, False
    def __init__(self,
        batch_content,  # function of a learner: a tuple for each row of its batch
        item_content  # function of a dataset and an index: the tuple of that item, and its class
    ):
        self.batch_content = batch_content
        self.item_content = item_content

    def before_fit(self):
        ds = self.dls.train_ds
        items, self.targets = zip(*[self.item_content(ds, i) for i in range(len(ds))])
        self.index = {o: i for i, o in enumerate(items)}
        self.epochs = []
        self.last = {}
        assert len(self.index) == len(ds), 'some items have the same content'

    def before_train(self): self.epochs.append([])
    def before_batch(self): self.epochs[-1] += self.check()
    def after_pred(self): self.last.update(zip(self.check(), self.pred.detach().clone()))

    def check(self):
        "Indices of the items of the batch, which must be its sample ids"
        expected = [self.index[o] for o in self.batch_content(self.learn)]
        found = self.learn.sample_ids
        assert found.ids.tolist() == found.all_ids.tolist() == expected
        assert found.host_ids in (None, expected)
        assert self.y.flatten().tolist() == [self.targets[i] for i in expected]
        return expected


def check_memory(learn):
    "The memory contains the last predictions that the probe has seen, and nothing else"
    memory, last = learn.knowledge_review.teachers, learn.probe.last
    ids = sorted(last)
    logits = memory.store.logits[ids]
    assert len(memory) == len(learn.dls.train_ds)
    assert memory.seen.nonzero().flatten().tolist() == ids
    torch.testing.assert_close(logits, torch.stack([last[i] for i in ids]), rtol=1e-5, atol=1e-5)
    assert all(memory.targets[i] == learn.probe.targets[i] for i in ids)
    assert len({tuple(o.tolist()) for o in logits}) > len(ids)//2  # equal rows would prove nothing
    assert all(np.isfinite(learn.loss_terms.history[-1][f'{k}_loss']) for k in ('base', 'review', 'summary'))


def train(case, n=n_epoch, lr=.05, probe=True):
    "Train with all parts of Reflective Learning, and check sample ids and memory"
    set_seed(1, reproducible=True)
    cbs = [all_three()]
    if probe: cbs.append(Probe(case.batch_content, case.item_content))
    make_learner = getattr(case, 'learner', partial(Learner, loss_func=CrossEntropyLossFlat()))
    learn = make_learner(case.dls, case.net, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr)
    if probe: check_memory(learn)
    return learn


def row(x): return tuple(x.flatten().tolist())


def rows(dl, valid=None):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    dls = DataLoaders(dl, valid or DataLoader(Rows(9), bs=bs))
    def batch_content(learn): return map(row, learn.x)
    def item_content(ds, i): return row(ds[i][0]), int(ds[i][1])
    return SimpleNamespace(dls=dls, net=net, batch_content=batch_content, item_content=item_content)


def check_order(learn, n, shuffle, distinct=True):
    "Each epoch has `n` items, none of them twice if `distinct`; the order differs between epochs if `shuffle`"
    epochs = learn.probe.epochs
    assert [len(o) for o in epochs] == [n]*len(epochs)
    assert all((len(set(o)) == n) == distinct for o in epochs)
    assert len(set(map(tuple, epochs))) == (len(epochs) if shuffle else 1)


def shuffled(ids): return random.Random(0).sample(ids, len(ids))
def shifted(ids): return [*ids[1:], ids[0]]
def two_swapped(ids): return [*ids[:-2], ids[-1], ids[-2]]


@pytest.mark.parametrize('broken', [shuffled, shifted, two_swapped])
def test_the_probe_notices_wrong_ids(broken, monkeypatch):
    epoch_ids = samples.epoch_ids
    monkeypatch.setattr(samples, 'epoch_ids', lambda dl: broken(epoch_ids(dl)))
    with pytest.raises(AssertionError): train(rows(DataLoader(Rows(), bs=bs, shuffle=True)))


# fastai's own loaders

both = pytest.mark.parametrize('workers', [0, 2])


@both
@pytest.mark.parametrize('drop_last', [False, True], ids=['all', 'drop last'])
@pytest.mark.parametrize('shuffle', [False, True], ids=['ordered', 'shuffled'])
def test_fastai(shuffle, drop_last, workers):
    learn = train(rows(DataLoader(Rows(), bs=bs, shuffle=shuffle, drop_last=drop_last, num_workers=workers)))
    check_order(learn, N//bs*bs if drop_last else N, shuffle)


def test_persistent_workers():
    check_order(train(rows(DataLoader(Rows(), bs=bs, shuffle=True, num_workers=2, persistent_workers=True))), N, True)


@pytest.mark.parametrize('size', [1, 46, 47, 48])  # a batch of one item, one that is left over, all at once
def test_batch_sizes(size):
    check_order(train(rows(DataLoader(Rows(), bs=size, shuffle=True)), lr=.01), N, True)


@both
@pytest.mark.parametrize('new', [False, True], ids=['made', 'new'])
def test_the_first_n(new, workers):
    dl = DataLoader(Rows(), bs=bs, shuffle=True, num_workers=workers, n=None if new else 20)
    learn = train(rows(dl.new(n=20) if new else dl))
    check_order(learn, 20, True)
    assert set(learn.probe.last) == set(range(20))


@both
def test_a_new_loader_between_fits(workers):
    "With the same dataset the memory is kept, whatever the loader's order and batch size"
    dl = DataLoader(Rows(), bs=bs, shuffle=True, num_workers=workers)
    learn = train(rows(dl))
    cases = [(dict(bs=10), N), (dict(shuffle=False, drop_last=True), 42), (dict(n=20), 20),
             (dict(num_workers=2-workers), N)]
    for kw, n in cases:
        before = dict(learn.probe.last)
        learn.dls = DataLoaders(dl.new(**kw), learn.dls.valid)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
        assert learn.loss_terms.history[0]['review_loss'] is not None  # there are teachers from the first batch on
        check_order(learn, n, kw.get('shuffle', True))
        learn.probe.last = {**before, **learn.probe.last}
        check_memory(learn)


@both
@pytest.mark.parametrize('cls', [WeightedDL, PartialDL])
def test_drawn_at_random(cls, workers):
    "If an item is drawn twice, its last prediction counts"
    is_weighted = cls is WeightedDL
    kw = dict(wgts=np.arange(N)+1.) if is_weighted else dict(partial_n=20)
    learn = train(rows(cls(Rows(), bs=bs, shuffle=True, num_workers=workers, **kw)))
    check_order(learn, N if is_weighted else 20, True, distinct=not is_weighted)


def test_a_custom_order():
    learn = train(rows(DataLoader(Rows(), bs=bs, get_idxs=lambda: [5, 3, 3, *range(40, 20, -2)])))
    assert learn.probe.epochs == [[5, 3, 3, *range(40, 20, -2)]]*n_epoch


@both
def test_items_that_bring_their_ids(workers):
    "`WithIds` in fastai's loader: items may be skipped"
    dl = DataLoader(WithIds(Rows()), bs=bs, shuffle=True, num_workers=workers, after_item=Skips((3, 30)))
    learn = train(rows(dl))
    check_order(learn, N-2, True)
    assert not {3, 30} & set(learn.probe.last)


# Images

def pixel(x): return tuple((x*255).round().int().tolist())


def image_batch(learn): return map(pixel, learn.x[:, :, 0, 0])


def image_item(ds, i): return pixel(torch.tensor(np.array(ds[i][0]))[0, 0]/255), int(ds[i][1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pictures of one colour each, which resizing does not change, of several sizes"
    path = tmp_path_factory.mktemp('photos')
    for i in range(60):
        where = path/('train' if i % 5 else 'valid')/'abc'[random.Random(i).randrange(3)]
        where.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8+i % 3, 8+i % 4), (4*i, 255-i, i % 7*30)).save(where/f'{i*37 % 60:02}.png')
    return path


def from_folder(path, **kw): return ImageDataLoaders.from_folder(path, item_tfms=Resize(8), **kw)


def ordered_random_split(path, **kw):
    return from_folder(path, train=None, valid_pct=.2, seed=2, shuffle=False, **kw)


def data_block(path, **kw):
    splitter = GrandparentSplitter(valid_name='valid')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=splitter,
                      item_tfms=Resize(8))
    return block.dataloaders(path, drop_last=False, **kw)


@both
@pytest.mark.parametrize('make', [from_folder, ordered_random_split, data_block])
def test_images(folder, make, workers):
    dls = make(folder, bs=bs, num_workers=workers, device='cpu')
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    case = SimpleNamespace(dls=dls, net=net, batch_content=image_batch, item_content=image_item)
    check_order(train(case), 48, make is not ordered_random_split)


def test_fast_loaders():
    def digit(x):
        "Pixels from 0 to 16, the same before and after normalisation"
        scaled = x.float().sub(x.min())/x.max().sub(x.min()).clamp(min=1e-6)
        return row((scaled*16).round().int())
    for kw in ({}, dict(bs=25)):
        dls = digits_lt(device='cpu', n_max=30, tfms=dict(crop=0, flip=False), **kw)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        case = SimpleNamespace(dls=dls, net=net, batch_content=lambda learn: map(digit, learn.x),
                               item_content=lambda ds, i: (digit(ds.images[i]), int(ds.targets[i])))
        n, size = len(dls.train_ds), dls.train.bs
        check_order(train(case, lr=.01), n//size*size if dls.train.drop_last else n, True)


# Tables and texts

def table_row(cats, conts): return tuple(map(int, cats)), tuple(round(float(o), 4) for o in conts)


def table():
    "A table with a category, two numbers, one of them missing, and a label"
    rng = np.random.RandomState(0)
    names = rng.permutation([f'name{i}' for i in range(63)])
    df = pd.DataFrame(dict(name=names, size=rng.randn(63), weight=rng.randn(63), label=rng.choice(list('abc'), 63)))
    df.loc[7, 'size'] = np.nan
    return df


@both
@pytest.mark.parametrize('cls', [TabDataLoader, TabWeightedDL])
@pytest.mark.parametrize('kw', [{}, dict(shuffle=False), dict(drop_last=False)], ids=['shuffled', 'ordered', 'all'])
def test_tables(kw, cls, workers):
    "fastai's `from_df` makes a `TabWeightedDL`, which draws with replacement and equal weights"
    dls = TabularDataLoaders.from_df(
        table(), procs=[Categorify, FillMissing, Normalize], cat_names=['name'], cont_names=['size', 'weight'],
        y_names='label', y_block=CategoryBlock(), valid_idx=list(range(0, 63, 5)), bs=bs, device='cpu',
        num_workers=workers)
    assert isinstance(dls.train, TabDataLoader) and dls.train.drop_last
    if cls is TabDataLoader or kw:
        options = {'shuffle': True, 'drop_last': True, **kw}
        dls = DataLoaders(cls(dls.train_ds, bs=bs, num_workers=workers, **options), dls.valid)
    def learner(dls, net, cbs): return tabular_learner(dls, layers=[8], cbs=cbs, config=dict(ps=0.))
    def batch_content(learn): return map(table_row, *learn.xb)
    def item_content(ds, i): return table_row(ds.cats.iloc[i], ds.conts.iloc[i]), int(ds.y.iloc[i])
    case = SimpleNamespace(dls=dls, net=None, learner=learner, batch_content=batch_content, item_content=item_content)
    learn = train(case, lr=.01)
    shuffle = kw.get('shuffle', True)
    check_order(learn, 50 if 'drop_last' in kw else 48, shuffle, distinct=cls is TabDataLoader or not shuffle)


def words(x): return tuple(o for o in x.tolist() if o != 1)  # without padding


def texts(**kw):
    "Texts in batches that are sorted by length and padded"
    rng = random.Random(0)
    sentences = [' '.join(f'bit{i >> b & 1} at{b}' for b in range(6))+' so it'*rng.randrange(6) for i in range(60)]
    df = pd.DataFrame(dict(text=sentences, label=[rng.choice('abc') for _ in range(60)]))
    dls = TextDataLoaders.from_df(df, seed=0, bs=bs, device='cpu', **kw)
    assert isinstance(dls.train, SortedDL)
    embedding = nn.Embedding(len(dls.vocab[0]), 8, padding_idx=1)
    net = nn.Sequential(embedding, Lambda(lambda x: x.sum(1)), nn.Linear(8, 3))
    def batch_content(learn): return map(words, learn.x)
    def item_content(ds, i): return words(ds[i][0]), int(ds[i][1])
    return SimpleNamespace(dls=dls, net=net, batch_content=batch_content, item_content=item_content)


@pytest.mark.slow
@both
@pytest.mark.parametrize('kw', [{}, dict(shuffle=False)], ids=['shuffled', 'ordered'])
def test_texts(kw, workers): check_order(train(texts(num_workers=workers, **kw)), 48, bool(not kw))


def test_a_language_model_that_classifies_texts():
    case = texts(num_workers=0)
    config = dict(awd_lstm_clas_config, emb_sz=8, n_hid=8, n_layers=2)
    def learner(dls, net, cbs): return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, cbs=cbs)
    case.learner = learner
    check_order(train(case, lr=.01), 48, True)


# PyTorch's loader

@both
@pytest.mark.parametrize('kw', [dict(shuffle=True), dict(shuffle=True, drop_last=True), {}, 'weighted'],
                         ids=['shuffled', 'drop last', 'ordered', 'weighted'])
def test_pytorch(kw, workers):
    weighted = kw == 'weighted'
    if weighted: kw = dict(sampler=WeightedRandomSampler(torch.arange(N)+1., N))
    learn = train(rows(TorchDL(WithIds(Rows()), bs, num_workers=workers, **kw)))
    check_order(learn, N//bs*bs if 'drop_last' in kw else N, bool(kw), distinct=not weighted)


def test_pytorch_persistent_workers():
    kw = dict(num_workers=2, persistent_workers=True)
    learn = train(rows(TorchDL(WithIds(Rows()), bs, shuffle=True, **kw), TorchDL(Rows(9), bs, **kw)))
    check_order(learn, N, True)


@pytest.mark.parametrize('kw', [dict(kr=False), dict(kr=False, ks=True, kc=True), dict(ks=True)], ids=str)
def test_pytorch_without_review(kw):
    "Ids are removed from batches whether they are used or not, also after review is switched off"
    case = rows(TorchDL(WithIds(Rows()), bs, shuffle=True))
    learn = Learner(case.dls, case.net, loss_func=CrossEntropyLossFlat(), cbs=ReflectiveLearning(**kw))
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
        learn.reflective_learning.kr = False
    learn.remove_cbs(ReflectiveLearning)
    assert not any('ltrl_fastai' in type(cb).__module__ for cb in learn.cbs)


# Refused loaders

class Stream(IterableDataset):
    def __iter__(self): return iter(Rows())


class Sized(Stream):
    def __len__(self): return N


@pytest.mark.parametrize('make,message', [
    (lambda: DataLoader(Stream(), bs=bs), 'is iterable'),
    (lambda: DataLoader(Sized(), bs=bs), 'is iterable'),
    (lambda: TorchDL(Stream(), bs), 'does not tell'),
    (lambda: TorchDL(WithIds(Stream()), bs), '__len__ and __getitem__'),
    (lambda: TorchDL(WithIds(Sized()), bs), '__len__ and __getitem__'),
    (lambda: TorchDL(Rows(), bs), 'does not tell'),
    (lambda: DataLoader(Rows(), bs=bs, get_idxs=lambda: iter(range(N))), 'can be read only once'),
    (lambda: DataLoader(Rows(), bs=None), 'bs=None'),
], ids=['stream', 'sized stream', 'stream in PyTorch', 'stream with ids', 'sized stream with ids',
        'PyTorch without ids', 'order read once', 'no batches'])
def test_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message): train(rows(make()), probe=False)


class WrongIds(Callback):
    "Count rows with the id of another item"
    order, run_valid, n = 5, False, 0
    def before_batch(self):
        expected = self.dls.train_ds.x[self.learn.sample_ids.ids]
        self.n += int((expected != self.x).any(1).sum())


def train_skipping(skipped, **kw):
    "A learner trained for an epoch with a transform that skips items, and whether that was refused"
    set_seed(1, reproducible=True)
    case = rows(DataLoader(Rows(), bs=bs, after_item=Skips(skipped), **kw))
    learn = Learner(case.dls, case.net, loss_func=CrossEntropyLossFlat(), cbs=[all_three(), WrongIds()])
    refused = False
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, .05)
        except ValueError as e: refused = 'SkipItemException' in str(e)
    return learn, refused


# Workers, which take long to start, get the items that one process gets: with them, half of the combinations
of_loaders = [(shuffle, drop_last, 0) for shuffle in (False, True) for drop_last in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize('shuffle,drop_last,workers', [*of_loaders, (False, True, 2), (True, False, 2)])
@pytest.mark.parametrize('skipped', [(3,), (46,), (3, 30), range(12)], ids=['early', 'last', 'two', 'two batches'])
def test_skipped_items_are_refused(skipped, shuffle, drop_last, workers):
    "In the epoch in which it happens, unless all ids are right nevertheless"
    learn, refused = train_skipping(skipped, shuffle=shuffle, drop_last=drop_last, num_workers=workers)
    assert refused or not learn.wrong_ids.n


def test_training_continues_after_skipped_items():
    "A skipped item is refused before any batch has wrong ids, so that training works once the transform is repaired"
    learn, refused = train_skipping((3,), shuffle=True)
    assert refused and not learn.wrong_ids.n
    learn.dls.train.after_item.repaired = True
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    assert not learn.wrong_ids.n
    assert learn.knowledge_review.teachers.seen.all()
