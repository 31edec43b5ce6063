"Runs and results identify their data and classes; empty texts are refused; two processes never share a folder."
import json
import re
import subprocess
import threading
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from command_line import ltrl_here, start_ltrl
from fastai.tabular.all import Categorify, CategoryBlock, TabularDataLoaders, tabular_learner
from fastai.vision.all import (
    SGD, Callback, DataBlock, DataLoaders, ImageBlock, Learner, get_image_files, nn, parent_label, set_seed)
from fastai.vision.all import DataLoader as FastaiDL
from ltrl_fastai.all import Checkpoint, ReflectiveLearning, WithIds, digits_lt, own_images
from ltrl_fastai.experiments.checkpoint import ForeignCheckpoint
from ltrl_fastai.experiments.identity import data_changes, data_listing, listing_digest
from ltrl_fastai.experiments.plan import make_plan, parse_setting, variants
from ltrl_fastai.experiments.runner import cores, plan_status, read_result, run_file, run_plan
from ltrl_fastai.experiments.summary import class_table, load_results
from ltrl_fastai.experiments.training import RunSettings, locked_folder, train_run
from PIL import Image



def run(*args, cwd, code=0):
    r = ltrl_here(*args, cwd=cwd)
    assert r.returncode == code and 'Traceback' not in r.stderr, r.stdout+r.stderr
    return r.stdout+r.stderr


def paint(file, colour):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (16, 16), colour).save(file)  # one colour each: all files have nearly the same size


def photographs(root, classes=('ant', 'bee', 'cat'), n=8):
    for k, name in enumerate(classes):
        for i in range(n): paint(root/name/f'{i}.png', (70*k+i, 10*i, 200-20*k))
    return root


def exchange(a, b):
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


# Fault 9: listings


def rename(root): (root/'ant').rename(root/'zebra')
def rename_last(root): (root/'cat').rename(root/'wasp')
def add_class(root): photographs(root, ('dog',))
def drop_class(root): (root/'bee').rename(root.parent/'gone')
def swap(root): exchange(root/'bee/1.png', root/'bee/2.png')
def swap_across(root): exchange(root/'bee/1.png', root/'cat/2.png')
def replace(root): paint(root/'bee/3.png', 'red')
def move(root): (root/'bee/3.png').rename(root/'cat/33.png')


file_changes = {
    rename: 'class ant is missing, zebra is new', rename_last: 'class cat is missing, wasp is new',
    add_class: 'class dog is new', drop_class: 'class bee is missing',
    swap: '2 training images differ, first: bee/[12].png', swap_across: 'images? differs?, first: ',
    replace: 'image differs, first: bee/3.png', move: 'missing, first: bee/3.png',
}


def block_loaders(root):
    "All images train, so that no random split interferes"
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=lambda items: (list(range(len(items))), [0]))
    return block.dataloaders(root, bs=4, device='cpu', num_workers=0)


@pytest.mark.parametrize('change', file_changes, ids=lambda o: o.__name__)
def test_fault_09_files_are_named(change, tmp_path):
    root = photographs(tmp_path/'data')
    before = data_listing(block_loaders(root))
    assert data_changes(before, data_listing(block_loaders(root))) == ''
    change(root)
    now = data_listing(block_loaders(root))
    said = data_changes(before, now)
    assert re.search(file_changes[change], said), said
    assert listing_digest(now) != listing_digest(before)


def test_fault_09_data_may_be_moved(tmp_path):
    "Paths are relative to the folder of the data"
    a, b = (photographs(tmp_path/o) for o in ('here', 'there/and/deeper'))
    for load in (block_loaders, partial(own_images, device='cpu')):
        assert data_changes(data_listing(load(a)), data_listing(load(b))) == ''


def test_fault_09_a_label_in_a_table(tmp_path):
    photographs(tmp_path)
    rows = [(f'{c}/{i}.png', c, 'valid' if i < 2 else 'train') for c in ('ant', 'bee', 'cat') for i in range(8)]
    table = tmp_path/'labels.csv'
    pd.DataFrame(rows, columns=['path', 'label', 'split']).to_csv(table, index=False)
    before = data_listing(own_images(table, device='cpu'))
    rows[5] = (*rows[5][:1], 'bee', rows[5][2])
    pd.DataFrame(rows, columns=['path', 'label', 'split']).to_csv(table, index=False)
    said = data_changes(before, data_listing(own_images(table, device='cpu')))
    assert said == '1 training image has another label, first: ant/5.png (class ant there, class bee here)'
    pd.DataFrame(rows[::-1], columns=['path', 'label', 'split']).to_csv(table, index=False)
    rows[5] = (*rows[5][:1], 'ant', rows[5][2])
    pd.DataFrame(rows[::-1], columns=['path', 'label', 'split']).to_csv(table, index=False)
    assert 'are in other places' in data_changes(before, data_listing(own_images(table, device='cpu')))


# Kinds of datasets: each is made from numbers `(n, 4)` and labels `(n,)`


class OfMyOwn(torch.utils.data.Dataset):
    def __init__(self, x, y): self.features, self.answers = x, y
    def __len__(self): return len(self.answers)
    def __getitem__(self, i): return torch.rand(4), int(self.answers[i])  # reading an item twice gives two values


class Sparse:
    def __init__(self, x, y): self.matrix, self.targets = scipy.sparse.csr_matrix(x), y.tolist()
    def __len__(self): return self.matrix.shape[0]
    def __getitem__(self, i): return torch.tensor(self.matrix[i].toarray()[0]), self.targets[i]


class Hidden(Sparse):
    "Its items are out of sight, so it lists them"
    def __init__(self, x, y): self.get = (lambda: (x, y))
    def __len__(self): return len(self.get()[1])
    def listing(self): return [f'{x.tolist()} {y}' for x, y in zip(*self.get())]


def pairs(x, y): return [(torch.tensor(a), int(b)) for a, b in zip(x, y)]


kinds = {
    'list of pairs': pairs,
    'tensor dataset': lambda x, y: torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)),
    'subset': lambda x, y: torch.utils.data.Subset(kinds['tensor dataset'](x, y), range(len(y))),
    'concatenated': lambda x, y: torch.utils.data.ConcatDataset([OfMyOwn(x[:6], y[:6]), OfMyOwn(x[6:], y[6:])]),
    'of my own': OfMyOwn, 'bfloat16': lambda x, y: OfMyOwn(torch.tensor(x).bfloat16(), y),
    'bool': lambda x, y: OfMyOwn(x > .5, y), 'memory map': lambda x, y: OfMyOwn(np.asfortranarray(x), y),
    'texts': lambda x, y: OfMyOwn([str(o) for o in x], y), 'sparse': Sparse, 'hidden': Hidden,
    'ids': lambda x, y: WithIds(pairs(x, y)), 'wrapped': lambda x, y: Wrapped(OfMyOwn(x, y)),
    'sparse tensor': lambda x, y: OfMyOwn(torch.tensor(x).to_sparse(), y),
}


class Wrapped(torch.utils.data.Dataset):
    def __init__(self, inner): self.inner = inner
    def __len__(self): return len(self.inner)
    def __getitem__(self, i): return self.inner[i]


def numbers(): return np.random.RandomState(0).rand(12, 4).astype(np.float32), np.arange(12) % 3
def loaders(ds): return DataLoaders(*[torch.utils.data.DataLoader(ds, batch_size=4)]*2)


@pytest.mark.parametrize('kind', kinds)
def test_fault_09_samples_permuted_within_their_class(kind):
    x, y = numbers()
    before = data_listing(loaders(kinds[kind](x, y)))
    assert before['items']['train']['n'] == 12
    assert data_changes(before, data_listing(loaders(kinds[kind](*numbers())))) == ''
    x[[0, 3]] = x[[3, 0]]
    assert y[0] == y[3]
    changes = data_changes(before, data_listing(loaders(kinds[kind](x, y))))
    assert '2 of 12 training items are in other places, first: item 0' in changes


@pytest.mark.parametrize('kind', kinds)
def test_fault_09_a_changed_item_and_one_more(kind):
    x, y = numbers()
    before = data_listing(loaders(kinds[kind](x, y)))
    x[5] = 1-x[5]
    changes = data_changes(before, data_listing(loaders(kinds[kind](x, y))))
    assert changes.startswith('1 training item differs, first: item 5')
    x, y = (np.concatenate([o, o[:1]]) for o in numbers())
    assert '12 training items there, 13 here' in data_changes(before, data_listing(loaders(kinds[kind](x, y))))


def tabular_loaders(df, **kwargs):
    return TabularDataLoaders.from_df(
        df, procs=[Categorify], cat_names=['a'], cont_names=['b'], y_names='c', y_block=CategoryBlock(),
        device=torch.device('cpu'), **kwargs)


def test_fault_09_a_table():
    df = pd.DataFrame(dict(a=list('xyzxyz'), b=np.arange(6.), c=['no', 'yes']*3))
    def listing(df):
        return data_listing(tabular_loaders(df, valid_idx=[0, 1], bs=2))
    before = listing(df)
    assert before['classes'] == ['no', 'yes'] and data_changes(before, listing(df.copy())) == ''
    swapped = df.assign(b=[0, 1, 4, 3, 2, 5.])  # 2 and 4 are of one class
    assert '2 training items differ' in data_changes(before, listing(swapped))
    assert data_changes(before, listing(df.replace('no', 'nay'))) == 'class no is missing, nay is new'


def test_fault_09_a_listing_says_what_it_has_seen():
    "If a dataset keeps its items elsewhere, only their number is known; of a stream, not even that"
    class Elsewhere:
        def __len__(self): return 7
        def __getitem__(self, i): return torch.rand(2), 0
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([(torch.rand(2), 0)]*4)
    elsewhere, stream = (data_listing(loaders(o))['items']['train'] for o in (Elsewhere(), Stream()))
    assert (elsewhere['n'], elsewhere['seen']) == (7, []) and (stream['n'], stream['seen']) == (None, [])


def test_fault_09_a_cache_that_fills_is_no_change():
    x, y = numbers()
    class Cached(OfMyOwn):
        def __init__(self, x, y):
            super().__init__(x, y)
            self.cache, self._reads = [None]*len(y), np.zeros(len(y))
        def __getitem__(self, i):
            self.cache[i] = self.features[i]
            self._reads[i] += 1
            return self.features[i], self.answers[i]
    ds = Cached(x, y)
    before = data_listing(loaders(ds))
    ds[3]
    assert data_changes(before, data_listing(loaders(ds))) == ''


def test_fault_09_a_change_in_the_middle_of_a_large_file(tmp_path):
    "A large file of the same size is read at both ends and in the middle"
    for position in (10, 150_000, 299_999):
        f = tmp_path/'x.bin'
        content = bytearray(300_000)
        f.write_bytes(content)
        before = data_listing(loaders([(f, 0)]*3))
        content[position] = 1
        f.write_bytes(content)
        assert '3 training items differ' in data_changes(before, data_listing(loaders([(f, 0)]*3)))


# Fault 9: in Python


class Crash(Callback):
    order = -100
    def before_batch(self):
        if self.training and self.epoch == 2 and self.iter == 1: raise InterruptedError('crash')


def fit(make, file, crash=False, rl=True):
    set_seed(0, reproducible=True)
    dls = make()
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 10))
    net(dls.one_batch()[0][:1].float())
    cbs = [ReflectiveLearning(kc=False)] if rl else []
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), cbs=cbs)
    cbs = [Checkpoint(file), *([Crash()] if crash else [])]
    with learn.no_bar(), learn.no_logging(): learn.fit(4, .05, cbs=cbs)
    return torch.cat([o.flatten() for o in learn.model.state_dict().values()])


def permuted(dls):
    ds = dls.train_ds
    i, j = (ds.targets == 2).nonzero()[:2, 0].tolist()
    ds.x[[i, j]] = ds.x[[j, i]]
    return dls


@pytest.mark.parametrize('rl', [True, False])
def test_fault_09_a_fit_is_not_resumed_on_permuted_samples(rl, tmp_path):
    make = partial(digits_lt, device='cpu', n_max=40)
    expected = fit(make, tmp_path/'whole.pt', rl=rl)
    with pytest.raises(InterruptedError): fit(make, tmp_path/'fit.pt', crash=True, rl=rl)
    content = (tmp_path/'fit.pt').read_bytes()
    with pytest.raises(ForeignCheckpoint, match='other data: 2 of .* training items are in other places'):
        fit(lambda: permuted(make()), tmp_path/'fit.pt', rl=rl)
    assert (tmp_path/'fit.pt').read_bytes() == content
    assert torch.equal(fit(make, tmp_path/'fit.pt', rl=rl), expected)


def test_fault_09_a_fit_is_not_resumed_on_other_validation_images(tmp_path):
    def make(change=False):
        dls = digits_lt(device='cpu', n_max=40)
        if change: dls.valid_ds.x[3] = 16-dls.valid_ds.x[3]
        return dls
    with pytest.raises(InterruptedError): fit(make, tmp_path/'fit.pt', crash=True)
    with pytest.raises(ForeignCheckpoint, match='other data: 1 validation item differs, first: item 3'):
        fit(partial(make, True), tmp_path/'fit.pt')


def test_fault_09_one_more_image_is_reported_with_their_number(tmp_path):
    x, y = numbers()
    def make(n): return DataLoaders(FastaiDL(pairs(x, y)[:n], bs=4), FastaiDL(pairs(x, y)[:4], bs=4), device='cpu')
    with pytest.raises(InterruptedError): fit(partial(make, 10), tmp_path/'fit.pt', crash=True, rl=False)
    with pytest.raises(ForeignCheckpoint, match='number of training samples: 10 training items there, 12 here'):
        fit(partial(make, 12), tmp_path/'fit.pt', rl=False)


def test_fault_09_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    make = partial(digits_lt, device='cpu', n_max=40)
    expected, f = fit(make, tmp_path/'whole.pt'), tmp_path/'fit.pt'
    with pytest.raises(InterruptedError): fit(make, f, crash=True)
    kept = torch.load(f, weights_only=True)
    kept.pop('data')
    torch.save(kept, f)
    assert torch.equal(fit(make, f), expected)


def test_fault_09_an_exported_learner_does_not_carry_the_listing(tmp_path):
    import pickle
    cp = Checkpoint(tmp_path/'fit.pt')
    cp._data = 'something large'
    assert b'something large' not in pickle.dumps(cp)


def test_fault_09_tabular_learner(tmp_path):
    df = pd.DataFrame(dict(a=list('xyz')*20, b=np.arange(60.), c=['no', 'yes']*30))
    def train(df, crash):
        set_seed(0, reproducible=True)
        learn = tabular_learner(tabular_loaders(df, valid_idx=list(range(20)), bs=8), layers=[8])
        cbs = [Checkpoint(tmp_path/'fit.pt'), *([Crash()] if crash else [])]
        with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=cbs)
    with pytest.raises(InterruptedError): train(df, True)
    other = df.copy()
    other.loc[[30, 32], 'b'] = [32., 30.]
    with pytest.raises(ForeignCheckpoint, match='2 training items differ'): train(other, False)
    train(df, False)


# Fault 9: on the command line


def in_process(*args):
    "Exit status and output"
    from ltrl_fastai.cli.main import app
    from typer.testing import CliRunner
    r = CliRunner().invoke(app, list(args))
    assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
    return r.exit_code, r.output


def interrupted(root, cwd, *args):
    "`ltrl train` on these images, killed after a checkpoint"
    options = ['--epochs', '60', '--bs', '4', '--net', 'resnet8', '--out', 'a']
    command = ['train', '--dataset', str(root), *options, *args]
    p = start_ltrl(*command, cwd=cwd)
    end = time.time()+200
    while not (cwd/'a/.fit-0.pt').exists():
        assert p.poll() is None and time.time() < end
        time.sleep(.02)
    p.kill()
    p.wait()
    return command


@pytest.mark.slow
@pytest.mark.parametrize('rl', ['--no-rl', '--rl'])
def test_fault_09_a_renamed_class_is_named(rl, tmp_path):
    root = photographs(tmp_path/'data')
    command = interrupted(root, tmp_path, rl)
    def check_refused(text):
        said = run(*command, '--resume', cwd=tmp_path, code=2)
        assert text in said and '--force instead of --resume' in said and 'SkipItemException' not in said
    rename(root)
    check_refused('class ant is missing, zebra is new')
    (root/'zebra').rename(root/'ant')
    paint(root/'bee/new.png', 'red')
    check_refused('image is new, first: bee/new.png')
    assert (tmp_path/'a/.fit-0.pt').exists()


def test_fault_09_a_finished_result_knows_its_data(tmp_path):
    root, file = photographs(tmp_path/'data'), tmp_path/'a/result.json'
    options = ('--epochs', '1', '--bs', '4', '--net', 'resnet8', '--no-rl')
    command = ('train', '--dataset', str(root), '--out', str(tmp_path/'a'), *options)
    assert in_process(*command)[0] == 0
    content = file.read_text()
    assert 'is complete' in in_process(*command, '--resume')[1]
    replace(root)
    for more in ((), ('--resume',)):
        code, said = in_process(*command, *more)
        assert code == 2 and 'result of other data: the' in said and 'class bee' in said
    rename(root)
    code, said = in_process(*command, '--resume')
    assert code == 2 and 'class ant is missing, zebra is new' in said and file.read_text() == content
    assert in_process(*command, '--force')[0] == 0
    assert json.loads(file.read_text())['classes'] == ['bee', 'cat', 'zebra']


@pytest.mark.slow
def test_fault_09_compare_computes_again_and_says_what_changed(tmp_path):
    root = photographs(tmp_path/'data')
    plan = partial(make_plan, ['softmax'], variants('off'), [0], dataset=str(root), epochs=1, bs=4, net='resnet8')
    run_plan(plan(), tmp_path/'a', jobs=1)
    look_again = partial(plan_status, folder=tmp_path/'a', threads=cores())
    assert look_again(plan())[0].done
    for change, text in ((replace, 'first: bee/3.png'), (rename, 'class ant is missing, zebra is new')):
        change(root)
        todo = look_again(plan())[0]
        assert not todo.done and todo.why.startswith('the data changed (') and text in todo.why
    events = []
    run_plan(plan(), tmp_path/'a', jobs=1, watch=lambda what, todo, *rest: events.append((what, *rest)))
    assert events[0] == ('again', todo.why) and look_again(plan())[0].done


def test_fault_09_data_that_change_while_runs_are_computed(tmp_path):
    "The result is not saved as one of the data at the beginning"
    from ltrl_fastai.experiments.runner import compute_run
    root = photographs(tmp_path/'data')
    plan = make_plan(['softmax'], variants('off'), [0], dataset=str(root), epochs=1, bs=4, net='resnet8')
    todo = plan_status(plan, tmp_path/'a')[0]
    replace(root)
    with pytest.raises(RuntimeError, match='data changed after the comparison had begun'):
        compute_run(todo, tmp_path/'a')
    assert read_result(run_file(tmp_path/'a', plan[0])) is None


# Fault 11


@pytest.mark.slow
def test_fault_11_results_name_their_classes(tmp_path):
    "Folders 0 to 11 are classes 0, 1, 10, 11, 2, ..."
    names = [str(i) for i in range(12)]
    photographs(tmp_path/'data', names, n=5)
    for i in range(3): paint(tmp_path/f'data/10/more{i}.png', (9, i, 9))
    run('train', '--dataset', 'data', '--epochs', '1', '--bs', '4', '--net', 'resnet8', '--out', 'a', cwd=tmp_path)
    res = json.loads((tmp_path/'a/result.json').read_text())
    assert res['classes'] == sorted(names) and len(res['per_class']) == len(res['class_counts']) == 12
    assert dict(zip(res['classes'], res['class_counts'])) == {o: 7 if o == '10' else 4 for o in names}
    table = class_table(load_results(tmp_path/'a'))
    assert set(table['class']) == set(names) and set(table.variant) == {'bsce', 'bsce + RL'}
    mine = table[table.variant == 'bsce + RL'].set_index('class')
    accuracy = res['per_class'][res['classes'].index('10')]
    assert mine.images['10'] == 7 and mine.accuracy['10'] == pytest.approx(accuracy, abs=1e-4)
    lines = [o for o in run('report', 'a', '--classes', cwd=tmp_path).splitlines() if o.startswith('| 10 ')]
    assert len(lines) == 1 and lines[0].split('|')[2].strip() == '7'


@pytest.mark.slow
def test_fault_11_old_results_are_read_without_names(tmp_path):
    res, _ = train_run(RunSettings(epochs=1, n_max=20), bar=False)
    assert res['classes'] == [str(i) for i in range(10)]
    old = {k: v for k, v in res.items() if k not in ('classes', 'data')}
    (tmp_path/'old').mkdir()
    (tmp_path/'old/result.json').write_text(json.dumps(old))
    table = class_table(load_results(tmp_path/'old'))
    assert list(table['class']) == [f'class {i}' for i in range(10)] and list(table.images) == res['class_counts']
    assert '| class 3 ' in run('report', 'old', '--classes', cwd=tmp_path)
    assert 'bsce' in run('report', 'old', cwd=tmp_path)


# Fault 18: the command line


options = dict(
    train='dataset out data method net preset policy epochs', run='out set',
    compare='methods dataset protocol ablate imbalance-factor seeds rl sweep out', bench='only out folder',
    report='evidence', datasets='data')
empty = [(command, f'--{name}') for command, names in options.items() for name in names.split()]


@pytest.mark.parametrize('command,option', empty)
def test_fault_18_empty_options_are_refused(command, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path/'here', n=5)  # the current folder could be trained on
    there = sorted(tmp_path.rglob('*'))
    for given in ([option, ''], [option, ' '], [f'{option}='], [f'{option}=\t']):
        code, said = in_process(command, *given)
        assert code == 2 and f'{option}: expected a value, got an empty text' in said, said
    assert sorted(tmp_path.rglob('*')) == there


@pytest.mark.parametrize('command,name', [('run', 'NAME'), ('recipes', 'PATTERN'), ('report', 'FOLDER')])
def test_fault_18_empty_arguments_are_refused(command, name):
    assert in_process(command, '') == (2, f"Error: {name}: expected a value, got an empty text ''. Give one.\n")


compare = ['compare', '--out', 'a']
empty_lists = [
    ['bench', '--only', ','], [*compare, '--methods', ' , '], [*compare, '--ablate', ','],
    [*compare, '--imbalance-factor', ','], [*compare, '--seeds', ','], [*compare, '--set', 'net='],
    [*compare, '--set', 'net= '], [*compare, '--sweep', 'tau=1,,2'],
    ['run', 'table1/BSCE+RL/100', '--set', 'epochs=']]


@pytest.mark.parametrize('args', empty_lists, ids=' '.join)
def test_fault_18_lists_of_nothing_are_refused(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = in_process(*args)
    assert code == 2 and 'expected' in said and not list(tmp_path.iterdir())


def test_fault_18_empty_texts_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(photographs(tmp_path))
    for field in ('dataset', 'method', 'net', 'policy', 'data', 'schedule'):
        for value in ('', '  '):
            with pytest.raises(ValueError, match=f'{field}: expected'):
                RunSettings(**{'dataset': 'cifar10-lt', field: value})
    with pytest.raises(ValueError, match='expected name=value'): parse_setting('net=')
    assert RunSettings(dataset='.').dataset == '.'


# Two processes, one folder


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(tmp_path):
    args = ('train', '--dataset', 'digits-lt', '--epochs', '400', '--no-rl', '--out', 'a')
    first = start_ltrl(*args, cwd=tmp_path)
    try:
        end = time.time()+200
        while not (tmp_path/'a/.fit-0.pt').exists():
            assert first.poll() is None and time.time() < end
            time.sleep(.02)
        for more in (['--resume'], ['--force']):
            assert 'another process is training in this folder' in run(*args, *more, cwd=tmp_path, code=2)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    # at once: a killed process locks nothing
    run('train', '--dataset', 'digits-lt', '--epochs', '1', '--no-rl', '--out', 'a', '--force', cwd=tmp_path)
    assert sorted(o.name for o in (tmp_path/'a').iterdir()) == ['model', 'per_class.png', 'result.json']


@pytest.mark.slow
def test_two_processes_with_one_plan(tmp_path):
    "No run is computed twice: one process reports the other, and the results are complete"
    args = ('compare', '--set', 'epochs=2', '--seeds', '2', '--jobs', '1', '--out', 'a')
    def start(): return start_ltrl(*args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    both = [start(), start()]
    said = [o.communicate()[0] for o in both]
    assert sorted(o.returncode for o in both) == [0, 2], said
    assert any('another process is computing runs' in o for o in said)
    files = list((tmp_path/'a/runs').iterdir())
    assert len(files) == 4 and all(f.suffix == '.json' and read_result(f) for f in files)


def test_two_threads_with_one_plan(tmp_path):
    plan = make_plan(['softmax'], variants('off'), [0, 1], epochs=1, n_max=20)
    errors, events = [], []
    def compute():
        try: run_plan(plan, tmp_path, jobs=1, watch=lambda what, *_: events.append(what))
        except RuntimeError as e: errors.append(str(e))
    threads = [threading.Thread(target=compute) for _ in range(2)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert events.count('start') == events.count('done') == 2 and len(errors)+events.count('known')//2 == 1


def test_a_folder_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked_folder(tmp_path, patience=0): raise ZeroDivisionError
    with locked_folder(tmp_path):
        with pytest.raises(BlockingIOError, match='another process is training'):
            with locked_folder(tmp_path, patience=.1): pass
    assert not list(tmp_path.iterdir())
