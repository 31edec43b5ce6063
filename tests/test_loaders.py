"Sample ids are right, by content: in every kind of loader each row of a batch is the dataset item that its id names, and the memory keeps what that item got last."
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
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, GrandparentSplitter, ImageBlock, ImageDataLoaders, Lambda, Learner, Resize,
                               get_image_files, nn, parent_label, set_seed)
from ltrl_fastai.all import ReflectiveLearning, WithIds, digits_lt
from parts import all_three
from ltrl_fastai.reflective import samples
from PIL import Image
from torch.utils.data import DataLoader as TorchDL, IterableDataset, WeightedRandomSampler

N, bs, n_epoch = 47, 6, 3


class Rows:
    "Items of random numbers, in three classes that do not follow their order"
    def __init__(self, n=N):
        g = torch.Generator().manual_seed(n)
        self.x, self.y = torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


class Skips:
    "A transform that skips some items, until it is mended"
    def __init__(self, skipped): self.bad, self.mended = [row(Rows().x[i]) for i in skipped], False
    def __call__(self, o):
        if not self.mended and row(o[0]) in self.bad: raise SkipItemException
        return o


class Probe(Callback):
    "Finds out by its content which item a row is, holds that against its id, and notes what the item was last predicted to be"
    order, run_valid = 5, False
    def __init__(self, read, look): self.read, self.look = read, look  # a batch's content, a tuple per row; that of a dataset item, and its class

    def before_fit(self):
        ds = self.dls.train_ds
        items, self.targets = zip(*[self.look(ds, i) for i in range(len(ds))])
        self.index, self.epochs, self.last = {o: i for i, o in enumerate(items)}, [], {}
        assert len(self.index) == len(ds), 'items are not all different, so that they could not be told apart'

    def before_train(self): self.epochs.append([])
    def before_batch(self): self.epochs[-1] += self.check()
    def after_pred(self): self.last.update(zip(self.check(), self.pred.detach().clone()))

    def check(self):
        met, mine = [self.index[o] for o in self.read(self.learn)], self.learn.sample_ids
        assert mine.ids.tolist() == mine.all_ids.tolist() == met and mine.host_ids in (None, met)
        assert self.y.flatten().tolist() == [self.targets[i] for i in met]
        return met


def holds(learn):
    "Does the memory hold what the probe saw, and nothing else?"
    memory, last = learn.knowledge_review.teachers, learn.probe.last
    assert len(memory) == len(learn.dls.train_ds) and memory.seen.nonzero().flatten().tolist() == sorted(last)
    torch.testing.assert_close(memory.store.logits[sorted(last)], torch.stack([last[i] for i in sorted(last)]), rtol=1e-5, atol=1e-5)
    assert all(memory.targets[i] == learn.probe.targets[i] for i in last)
    assert len({tuple(o.tolist()) for o in memory.store.logits[sorted(last)]}) > len(last)//2  # a memory of equal rows would prove nothing
    assert all(np.isfinite(learn.loss_terms.history[-1][f'{k}_loss']) for k in ('base', 'review', 'summary'))


def train(case, n=n_epoch, lr=.05, probe=True):
    "Train with all three, watched"
    set_seed(1, reproducible=True)
    cbs = [all_three(), *([Probe(case.read, case.look)] if probe else [])]
    learn = getattr(case, 'learner', partial(Learner, loss_func=CrossEntropyLossFlat()))(case.dls, case.net, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr)
    if probe: holds(learn)
    return learn


def row(x): return tuple(x.flatten().tolist())
def rows(dl, valid=None):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    def look(ds, i): return row(ds[i][0]), int(ds[i][1])
    return SimpleNamespace(dls=DataLoaders(dl, valid or DataLoader(Rows(9), bs=bs)), net=net, read=lambda learn: map(row, learn.x), look=look)


def orders(learn, n, shuffle, distinct=True):
    "As many items as expected in every epoch, none of them twice, in an order of its own if shuffled"
    epochs = learn.probe.epochs
    assert [len(o) for o in epochs] == [n]*len(epochs)
    assert all((len(set(o)) == n) == distinct for o in epochs)
    assert len(set(map(tuple, epochs))) == (len(epochs) if shuffle else 1)


@pytest.mark.parametrize('broken', [lambda ids: random.Random(0).sample(ids, len(ids)), lambda ids: [*ids[1:], ids[0]], lambda ids: [*ids[:-2], ids[-1], ids[-2]]],
                         ids=['shuffled', 'shifted', 'two swapped'])
def test_the_probe_notices_wrong_ids(broken, monkeypatch):
    right = samples.epoch_ids
    monkeypatch.setattr(samples, 'epoch_ids', lambda dl: broken(right(dl)))
    with pytest.raises(AssertionError): train(rows(DataLoader(Rows(), bs=bs, shuffle=True)))


# fastai's own loaders

both = pytest.mark.parametrize('workers', [0, 2])


@both
@pytest.mark.parametrize('drop_last', [False, True], ids=['all', 'drop last'])
@pytest.mark.parametrize('shuffle', [False, True], ids=['ordered', 'shuffled'])
def test_fastai(shuffle, drop_last, workers):
    learn = train(rows(DataLoader(Rows(), bs=bs, shuffle=shuffle, drop_last=drop_last, num_workers=workers)))
    orders(learn, N//bs*bs if drop_last else N, shuffle)


def test_persistent_workers():
    orders(train(rows(DataLoader(Rows(), bs=bs, shuffle=True, num_workers=2, persistent_workers=True))), N, True)


@pytest.mark.parametrize('size', [1, 46, 47, 48])  # a batch of one item, one that is left over, all at once
def test_batch_sizes(size):
    orders(train(rows(DataLoader(Rows(), bs=size, shuffle=True)), lr=.01), N, True)


@both
@pytest.mark.parametrize('new', [False, True], ids=['made', 'new'])
def test_the_first_n(new, workers):
    dl = DataLoader(Rows(), bs=bs, shuffle=True, num_workers=workers, n=None if new else 20)
    learn = train(rows(dl.new(n=20) if new else dl))
    orders(learn, 20, True)
    assert set(learn.probe.last) == set(range(20))


@both
def test_a_new_loader_between_fits(workers):
    "The same dataset: the memory stays, whatever the loader's order and batch size"
    dl = DataLoader(Rows(), bs=bs, shuffle=True, num_workers=workers)
    learn = train(rows(dl))
    for kw, n in ((dict(bs=10), N), (dict(shuffle=False, drop_last=True), 42), (dict(n=20), 20), (dict(num_workers=2-workers), N)):
        learn.dls, before = DataLoaders(dl.new(**kw), learn.dls.valid), dict(learn.probe.last)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
        assert learn.loss_terms.history[0]['review_loss'] is not None  # there were teachers from the first batch on
        orders(learn, n, kw.get('shuffle', True))
        learn.probe.last = {**before, **learn.probe.last}
        holds(learn)


@both
@pytest.mark.parametrize('cls', [WeightedDL, PartialDL])
def test_drawn_at_random(cls, workers):
    "Of items that come twice the last visit counts"
    learn = train(rows(cls(Rows(), bs=bs, shuffle=True, num_workers=workers, **(dict(wgts=np.arange(N)+1.) if cls is WeightedDL else dict(partial_n=20)))))
    orders(learn, N if cls is WeightedDL else 20, True, distinct=cls is PartialDL)


def test_an_order_of_ones_own():
    learn = train(rows(DataLoader(Rows(), bs=bs, get_idxs=lambda: [5, 3, 3, *range(40, 20, -2)])))
    assert learn.probe.epochs == [[5, 3, 3, *range(40, 20, -2)]]*n_epoch


@both
def test_items_that_bring_their_ids(workers):
    "`WithIds` in fastai's loader, too: items may be skipped"
    learn = train(rows(DataLoader(WithIds(Rows()), bs=bs, shuffle=True, num_workers=workers, after_item=Skips((3, 30)))))
    orders(learn, N-2, True)
    assert not {3, 30} & set(learn.probe.last)


# Images

def shade(x): return tuple((x*255).round().int().tolist())  # of a pixel
photo = dict(read=lambda learn: map(shade, learn.x[:, :, 0, 0]), look=lambda ds, i: (shade(torch.tensor(np.array(ds[i][0]))[0, 0]/255), int(ds[i][1])))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pictures of one colour each, which no resizing changes, of sizes of their own"
    path = tmp_path_factory.mktemp('photos')
    for i in range(60):
        where = path/('train' if i % 5 else 'valid')/'abc'[random.Random(i).randrange(3)]
        where.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8+i % 3, 8+i % 4), (4*i, 255-i, i % 7*30)).save(where/f'{i*37 % 60:02}.png')
    return path


@both
@pytest.mark.parametrize('make', [
    lambda path, **kw: ImageDataLoaders.from_folder(path, item_tfms=Resize(8), **kw),
    lambda path, **kw: ImageDataLoaders.from_folder(path, train=None, valid_pct=.2, seed=2, item_tfms=Resize(8), shuffle=False, **kw),
    lambda path, **kw: DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=GrandparentSplitter(valid_name='valid'),
                                 item_tfms=Resize(8)).dataloaders(path, drop_last=False, **kw)], ids=['from_folder', 'split at random', 'DataBlock'])
def test_images(folder, make, workers, request):
    dls = make(folder, bs=bs, num_workers=workers, device='cpu')
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    at_once = 'split at random' in request.node.name
    orders(train(SimpleNamespace(dls=dls, net=net, **photo)), 48, not at_once)


def test_fast_loaders():
    def digit(x): return row((x.float().sub(x.min())/x.max().sub(x.min()).clamp(min=1e-6)*16).round().int())  # the same before and after normalisation
    for kw in (dict(tfms=dict(crop=0, flip=False)), dict(tfms=dict(crop=0, flip=False), bs=25)):
        dls = digits_lt(device='cpu', n_max=30, **kw)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        case = SimpleNamespace(dls=dls, net=net, read=lambda learn: map(digit, learn.x), look=lambda ds, i: (digit(ds.images[i]), int(ds.targets[i])))
        n = len(dls.train_ds)
        orders(train(case, lr=.01), n//dls.train.bs*dls.train.bs if dls.train.drop_last else n, True)


# Tables and texts

def table_row(cats, conts): return tuple(map(int, cats)), tuple(round(float(o), 4) for o in conts)


@both
@pytest.mark.parametrize('cls', [TabDataLoader, TabWeightedDL])
@pytest.mark.parametrize('kw', [{}, dict(shuffle=False), dict(drop_last=False)], ids=['shuffled', 'ordered', 'all'])
def test_tables(kw, cls, workers):
    "fastai's `from_df` makes a `TabWeightedDL`, which draws with replacement, all with the same weight"
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(name=rng.permutation([f'name{i}' for i in range(63)]), size=rng.randn(63), weight=rng.randn(63), label=rng.choice(list('abc'), 63)))
    df.loc[7, 'size'] = np.nan
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['name'], cont_names=['size', 'weight'], y_names='label', y_block=CategoryBlock(),
                                     valid_idx=list(range(0, 63, 5)), bs=bs, device='cpu', num_workers=workers)
    assert isinstance(dls.train, TabDataLoader) and dls.train.drop_last
    if cls is TabDataLoader or kw: dls = DataLoaders(cls(dls.train_ds, bs=bs, num_workers=workers, **{'shuffle': True, 'drop_last': True, **kw}), dls.valid)
    def learner(dls, net, cbs): return tabular_learner(dls, layers=[8], cbs=cbs, config=dict(ps=0.))
    def look(ds, i): return table_row(ds.cats.iloc[i], ds.conts.iloc[i]), int(ds.y.iloc[i])
    learn = train(SimpleNamespace(dls=dls, net=None, learner=learner, read=lambda learn: map(table_row, *learn.xb), look=look), lr=.01)
    shuffle = kw.get('shuffle', True)
    orders(learn, 50 if 'drop_last' in kw else 48, shuffle, distinct=cls is TabDataLoader or not shuffle)


def words(x): return tuple(o for o in x.tolist() if o != 1)  # without padding


def texts(**kw):
    "Sorted by length, padded"
    rng = random.Random(0)
    df = pd.DataFrame(dict(text=[' '.join(f'bit{i >> b & 1} at{b}' for b in range(6))+' so it'*rng.randrange(6) for i in range(60)], label=[rng.choice('abc') for _ in range(60)]))
    dls = TextDataLoaders.from_df(df, seed=0, bs=bs, device='cpu', **kw)
    assert isinstance(dls.train, SortedDL)
    net = nn.Sequential(nn.Embedding(len(dls.vocab[0]), 8, padding_idx=1), Lambda(lambda x: x.sum(1)), nn.Linear(8, 3))
    return SimpleNamespace(dls=dls, net=net, read=lambda learn: map(words, learn.x), look=lambda ds, i: (words(ds[i][0]), int(ds[i][1])))


@both
@pytest.mark.parametrize('kw', [{}, dict(shuffle=False)], ids=['shuffled', 'ordered'])
def test_texts(kw, workers): orders(train(texts(num_workers=workers, **kw)), 48, bool(not kw))


def test_a_language_model_that_classifies_texts():
    case = texts(num_workers=0)
    case.learner = lambda dls, net, cbs: text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=dict(awd_lstm_clas_config, emb_sz=8, n_hid=8, n_layers=2), cbs=cbs)
    orders(train(case, lr=.01), 48, True)


# PyTorch's loader

@both
@pytest.mark.parametrize('kw', [dict(shuffle=True), dict(shuffle=True, drop_last=True), {}, 'weighted'], ids=['shuffled', 'drop last', 'ordered', 'weighted'])
def test_pytorch(kw, workers):
    weighted = kw == 'weighted'
    if weighted: kw = dict(sampler=WeightedRandomSampler(torch.arange(N)+1., N))
    orders(train(rows(TorchDL(WithIds(Rows()), bs, num_workers=workers, **kw))), N//bs*bs if 'drop_last' in kw else N, bool(kw), distinct=not weighted)


def test_pytorch_persistent_workers():
    valid = TorchDL(Rows(9), bs, num_workers=2, persistent_workers=True)
    orders(train(rows(TorchDL(WithIds(Rows()), bs, shuffle=True, num_workers=2, persistent_workers=True), valid)), N, True)


@pytest.mark.parametrize('kw', [dict(kr=False), dict(kr=False, ks=True, kc=True), dict(ks=True)], ids=str)
def test_pytorch_without_review(kw):
    "Ids are taken off whether they are wanted or not, also once the review is switched off"
    case = rows(TorchDL(WithIds(Rows()), bs, shuffle=True))
    learn = Learner(case.dls, case.net, loss_func=CrossEntropyLossFlat(), cbs=ReflectiveLearning(**kw))
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
        learn.reflective_learning.kr = False
    learn.remove_cbs(ReflectiveLearning)
    assert not any('ltrl_fastai' in type(cb).__module__ for cb in learn.cbs)


# What is refused

class Stream(IterableDataset):
    def __iter__(self): return iter(Rows())


class Sized(Stream):
    def __len__(self): return N


@pytest.mark.parametrize('make,said', [
    (lambda: DataLoader(Stream(), bs=bs), 'is iterable'),
    (lambda: DataLoader(Sized(), bs=bs), 'is iterable'),
    (lambda: TorchDL(Stream(), bs), 'does not tell'),
    (lambda: TorchDL(WithIds(Stream()), bs), '__len__ and __getitem__'),
    (lambda: TorchDL(WithIds(Sized()), bs), '__len__ and __getitem__'),
    (lambda: TorchDL(Rows(), bs), 'does not tell'),
    (lambda: DataLoader(Rows(), bs=bs, get_idxs=lambda: iter(range(N))), 'can be read only once'),
    (lambda: DataLoader(Rows(), bs=None), 'bs=None'),
], ids=['stream', 'sized stream', 'stream in PyTorch', 'stream with ids', 'sized stream with ids', 'PyTorch without ids', 'order read once', 'no batches'])
def test_refused(make, said):
    with pytest.raises((TypeError, ValueError), match=said): train(rows(make()), probe=False)


class Wrong(Callback):
    "Counts rows whose id is that of another item"
    order, run_valid, n = 5, False, 0
    def before_batch(self): self.n += int((self.dls.train_ds.x[self.learn.sample_ids.ids] != self.x).any(1).sum())


def skipping(skipped, **kw):
    "Train an epoch with a transform that skips items; was that refused?"
    set_seed(1, reproducible=True)
    case = rows(DataLoader(Rows(), bs=bs, after_item=Skips(skipped), **kw))
    learn, refused = Learner(case.dls, case.net, loss_func=CrossEntropyLossFlat(), cbs=[all_three(), Wrong()]), False
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, .05)
        except ValueError as e: refused = 'SkipItemException' in str(e)
    return learn, refused


@both
@pytest.mark.parametrize('drop_last', [False, True], ids=['all', 'drop last'])
@pytest.mark.parametrize('shuffle', [False, True], ids=['ordered', 'shuffled'])
@pytest.mark.parametrize('skipped', [(3,), (46,), (3, 30), range(12)], ids=['early', 'last', 'two', 'two batches'])
def test_skipped_items_are_refused(skipped, shuffle, drop_last, workers):
    "In the epoch in which it happens, unless all ids were right all the same"
    learn, refused = skipping(skipped, shuffle=shuffle, drop_last=drop_last, num_workers=workers)
    assert refused or not learn.wrong.n


def test_training_goes_on_after_skipped_items():
    "The item that is skipped is refused before any batch is mixed up, so that nothing is left to complain about once the transform is mended"
    learn, refused = skipping((3,), shuffle=True)
    assert refused and not learn.wrong.n
    learn.dls.train.after_item.mended = True
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    assert not learn.wrong.n and learn.knowledge_review.teachers.seen.all()
