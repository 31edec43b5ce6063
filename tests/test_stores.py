"The choice of a store by free memory, temporary folders on a disk, and rows that arrive late from a GPU."
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.data import WeightedDL
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from ltrl_fastai.all import KnowledgeReview, ReflectiveLearning, TeacherMemory, digits_lt
from ltrl_fastai.core import memory
from ltrl_fastai.reflective import stores

GB = 2**30
docker = '/docker/4f2a'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    "A machine with 64 GB of free memory, whose system files are simulated"
    for module in (memory, stores): monkeypatch.setattr(module, '_root', tmp_path)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    meminfo = f'MemTotal: {128*GB//1024} kB\nMemAvailable: {64*GB//1024} kB\n'
    def write(files):
        for name, text in {'proc/meminfo': meminfo, **files}.items():
            file = tmp_path/name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(text))
    return write


def cgroup_v2(limit, used=3*GB, cached=GB, group=''):
    folder = f'sys/fs/cgroup{group}'
    return {f'{folder}/memory.max': limit,
            f'{folder}/memory.current': used,
            f'{folder}/memory.stat': f'anon 5\ninactive_file {cached}\nactive_file 7\n'}


def cgroup_v1(limit, used=3*GB, cached=GB, group=''):
    folder = f'sys/fs/cgroup/memory{group}'
    return {f'{folder}/memory.limit_in_bytes': limit,
            f'{folder}/memory.usage_in_bytes': used,
            f'{folder}/memory.stat': f'inactive_file 1\ntotal_inactive_file {cached}\n'}


own_v2 = {'proc/self/cgroup': '0::/\n'}
own_v1 = {'proc/self/cgroup': f'5:cpu,cpuacct:/\n4:memory:{docker}\n0::/\n'}
outer_group = {'proc/self/cgroup': '0::/job/step\n', **cgroup_v2(8*GB, group='/job'),
               **cgroup_v2('max', group='/job/step')}
free_gigabytes = {
    'no container': ({}, 64),
    'no limit': ({**own_v2, **cgroup_v2('max\n')}, 64),
    'limit': ({**own_v2, **cgroup_v2(8*GB)}, 6),
    'limit above the memory': ({**own_v2, **cgroup_v2(200*GB)}, 64),
    'used up': ({**own_v2, **cgroup_v2(2*GB, cached=0)}, 0),
    'limit of an outer group': (outer_group, 6),
    'group outside of the container': ({'proc/self/cgroup': '0::/../job\n', **cgroup_v2(8*GB)}, 6),
    'v1': ({**own_v1, **cgroup_v1(8*GB)}, 6),
    'v1 on the host': ({**own_v1, **cgroup_v1(8*GB, group=docker), **cgroup_v1(2**63-4096)}, 6),
    'v1 without limit': ({**own_v1, **cgroup_v1(2**63-4096)}, 64),
}


@pytest.mark.parametrize('files,free', free_gigabytes.values(), ids=free_gigabytes)
def test_free_memory_is_what_is_left_of_a_limit(files, free, machine, monkeypatch):
    machine(files)
    assert memory.free_memory() == free*GB
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert memory.free_memory() == free*GB//4


@pytest.mark.parametrize('limit,kind', [(4*GB, stores.DenseStore), (GB//2, stores.DiskStore)])
def test_the_limit_of_a_container_decides_the_store(limit, kind, machine):
    "ImageNet-LT takes 0.22 GB in half precision"
    machine({**own_v2, **cgroup_v2(limit, used=0, cached=0)})
    assert type(stores.make_store('auto', 115_846, 1000)) is kind


disk = '/dev/sda1 / ext4 rw 0 0'
tmp_in_memory = 'tmpfs /tmp tmpfs rw,nosuid 0 0'
var_in_memory = 'tmpfs /var/tmp tmpfs rw 0 0'
temporary_folders = {
    'on a disk': ([disk], '/tmp', '/tmp'),
    'unknown': (None, '/tmp', '/tmp'),
    'in memory': ([disk, tmp_in_memory], '/tmp', '/var/tmp'),
    'both in memory': ([disk, tmp_in_memory, var_in_memory], '/tmp', '/'),
    'a disk mounted over it': ([disk, tmp_in_memory, '/dev/sdb1 /tmp xfs rw 0 0'], '/tmp', '/tmp'),
    'a container': (['overlay / overlay rw 0 0', tmp_in_memory], '/tmp', '/var/tmp'),
    'another default': ([disk, tmp_in_memory], '/var', '/var'),
}


@pytest.mark.parametrize('mounts,default,chosen', temporary_folders.values(), ids=temporary_folders)
def test_a_temporary_folder_is_on_a_disk(mounts, default, chosen, machine, monkeypatch):
    monkeypatch.setattr(stores.tempfile, 'gettempdir', lambda: default)
    monkeypatch.setattr(stores.os, 'getcwd', lambda: '/')
    monkeypatch.setattr(stores.os, 'access', lambda *args: True)
    machine({} if mounts is None else {'proc/mounts': '\n'.join(mounts)})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert stores._disk_folder() == chosen


def test_a_warning_if_there_is_no_disk(machine):
    machine({'proc/mounts': 'none / ramfs rw 0 0'})
    with pytest.warns(UserWarning, match='is kept in memory.*Name a folder'): stores._disk_folder()


def test_folder_names_with_a_space(machine, tmp_path):
    (tmp_path/'a b/c').mkdir(parents=True)
    machine({'proc/mounts': f'{disk}\ntmpfs {os.path.realpath(tmp_path)}/a\\040b tmpfs rw 0 0'})
    assert stores._in_memory(tmp_path/'a b/c')
    assert not stores._in_memory(tmp_path)


def test_a_disk_store_is_in_the_disk_folder_and_removed_at_its_end(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, '_disk_folder', lambda: str(tmp_path))
    store = stores.DiskStore(5, 3)
    assert store.folder.parent == tmp_path
    store.close()
    assert not list(tmp_path.iterdir())


choices = {
    'small': (10_847, 64*GB, ''),
    'dense': (40_000, 64*GB, ' 40,000 samples, 1,000 classes: 152.6 MiB of torch.float32.'),
    'half': (70_000, 64*GB, ' 70,000 samples, 1,000 classes: 133.5 MiB of torch.float16.'),
    'disk': (70_000, GB//2, ' 70,000 samples, 1,000 classes: 133.5 MiB of torch.float16 on disk.'),
}


@pytest.mark.parametrize('n,free,printed', choices.values(), ids=choices)
def test_the_choice_of_auto_is_printed_in_one_line(n, free, printed, monkeypatch, capsys):
    "On the first rank, and only with 'auto'"
    monkeypatch.setattr(stores, 'free_memory', lambda device: free)
    logits = torch.zeros(1, 1000 if printed else 100)
    for rank, kind in ((0, 'auto'), (1, 'auto'), (0, 'half')):
        loss_terms = SimpleNamespace(ranks=SimpleNamespace(rank=rank))
        learn = SimpleNamespace(cbs=[], sample_ids=SimpleNamespace(n_items=n), loss_terms=loss_terms)
        review = SimpleNamespace(learn=learn, store_args=KnowledgeReview(store=kind).store_args)
        teachers = KnowledgeReview._new_memory(review, logits)
        if isinstance(teachers.store, stores.DiskStore): teachers.store.close()
        is_printed = printed and (rank, kind) == (0, 'auto')
        line = f'Knowledge Review keeps the last predictions of{printed}\n' if is_printed else ''
        assert capsys.readouterr().out == line


def test_a_memory_saved_by_the_first_version_is_read():
    teachers = TeacherMemory(3, 2)
    teachers.remember(torch.tensor([1]), torch.ones(1, 2), torch.tensor([0]), torch.tensor([True]), [1])
    state = teachers.state_dict()
    state['strays'] = state.pop('mismatches')
    restored = TeacherMemory.from_state(state)
    assert restored.mismatches == 0
    assert restored.seen.tolist() == [False, True, False]


def test_a_store_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind 'topk', which this version cannot read"):
        stores.store_from_state(dict(kind='topk', n_classes=10, k=3, parts=()))


class LateRows(stores._PendingRows):
    "Rows from a slow GPU: invalid on the host until it has asked `after` times for any rows, or waited"
    after, waited, asked = 3, 0, 0
    def __init__(self, ids, rows):
        self.ids = ids
        self.rows = rows
        self.due = LateRows.asked+self.after
        self.host = ids*0, rows*torch.nan
    def has_arrived(self, wait=False):
        LateRows.asked += 1
        LateRows.waited += wait
        here = wait or LateRows.asked > self.due
        if here: self.host = self.ids, self.rows
        return here


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(stores, '_PendingRows', LateRows)
    monkeypatch.setattr(LateRows, 'waited', 0)
    return LateRows


@pytest.mark.parametrize('after', [0, 1, 4, 99])
def test_late_rows_are_read_like_rows_in_memory(after, late, monkeypatch, tmp_path):
    "A hundred batches with repeated items, and a frozen file now and then"
    monkeypatch.setattr(late, 'after', after)
    torch.manual_seed(after)
    store, want = stores.DiskStore(12, 5, tmp_path), stores.DenseStore(12, 5, torch.float16)
    for step in range(100):
        ids = torch.randint(0, 12, (4,))
        assert torch.equal(store.get(ids, ids.tolist()), want.get(ids))
        last = {i: k for k, i in enumerate(ids.tolist())}  # of repeated items the last one counts
        z = torch.randn(4, 5)
        store.put(ids, store.pack(z))
        want.put(torch.tensor([*last]), want.pack(z[[*last.values()]]))
        if step % 9 != 8: continue
        state = store.state_dict()
        assert not store._pending
        if step % 2:
            store.close()
            store = stores.DiskStore.from_state(state)
    assert torch.equal(store.get(torch.arange(12)), want.logits)
    assert late.waited >= (after > 2)
    store.close()


def fitted_weights(store, repeated=False, weight=1.):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=60)
    if repeated:
        items = [(x.float()/256, y) for x, y in dls.train_ds]
        item_weights = [101 if i < 30 else 1 for i in range(len(items))]
        dls = DataLoaders(WeightedDL(items, wgts=item_weights, bs=16, shuffle=True), dls.valid)
    rl = ReflectiveLearning(kr=dict(store=store, adapt=0., memory=0., weight=weight), ks=False)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=CrossEntropyLossFlat(), cbs=rl)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize('repeated', [False, True])
def test_a_fit_is_the_same_however_late_rows_arrive(repeated, late, monkeypatch):
    results = []
    for after in (0, 5):
        monkeypatch.setattr(late, 'after', after)
        results.append(fitted_weights('disk', repeated))
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()
    assert not late.waited
    assert not torch.equal(results[0], fitted_weights('disk', repeated, weight=0.))  # teachers matter here


def test_a_full_disk_is_reported_when_rows_arrive(late, monkeypatch, tmp_path):
    store = stores.DiskStore(12, 5, tmp_path)
    monkeypatch.setattr(late, 'after', 1)
    ids = torch.arange(4)
    store.put(ids, store.pack(torch.ones(4, 5)))
    with monkeypatch.context() as full:
        full.setattr(os, 'pwrite', lambda *args: 0)
        with pytest.raises(OSError, match='disk with the last predictions is full'): store.get(ids)
    assert store.get(ids).eq(1).all()  # nothing was lost
    store.close()
