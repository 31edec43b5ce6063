"Where last predictions go if nobody says: what is free, what is a disk, and what is told."
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.data import WeightedDL
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from ltrl_fastai.all import KnowledgeReview, ReflectiveLearning, digits_lt
from ltrl_fastai.core import memory
from ltrl_fastai.reflective import stores

GB = 2**30
docker = '/docker/4f2a'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    "A machine with 64 GB free, of which the files that it is asked for are made up"
    for module in (memory, stores): monkeypatch.setattr(module, '_root', tmp_path)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    def write(files):
        for k, v in {'proc/meminfo': f'MemTotal: {128*GB//1024} kB\nMemAvailable: {64*GB//1024} kB\n', **files}.items():
            (tmp_path/k).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/k).write_text(str(v))
    return write


def v2(limit, used=3*GB, cached=GB, at=''):
    d = f'sys/fs/cgroup{at}'
    return {f'{d}/memory.max': limit, f'{d}/memory.current': used, f'{d}/memory.stat': f'anon 5\ninactive_file {cached}\nactive_file 7\n'}


def v1(limit, used=3*GB, cached=GB, at=''):
    d = f'sys/fs/cgroup/memory{at}'
    return {f'{d}/memory.limit_in_bytes': limit, f'{d}/memory.usage_in_bytes': used, f'{d}/memory.stat': f'inactive_file 1\ntotal_inactive_file {cached}\n'}


own2, own1 = {'proc/self/cgroup': '0::/\n'}, {'proc/self/cgroup': f'5:cpu,cpuacct:/\n4:memory:{docker}\n0::/\n'}


@pytest.mark.parametrize('files,free', [
    ({}, 64), ({**own2, **v2('max\n')}, 64), ({**own2, **v2(8*GB)}, 6), ({**own2, **v2(200*GB)}, 64), ({**own2, **v2(2*GB, cached=0)}, 0),
    ({'proc/self/cgroup': '0::/job/step\n', **v2(8*GB, at='/job'), **v2('max', at='/job/step')}, 6),
    ({'proc/self/cgroup': '0::/../job\n', **v2(8*GB)}, 6),
    ({**own1, **v1(8*GB)}, 6), ({**own1, **v1(8*GB, at=docker), **v1(2**63-4096)}, 6), ({**own1, **v1(2**63-4096)}, 64),
], ids=['no container', 'no limit', 'limit', 'more than there is', 'used up', 'of an outer group', 'outside of what is seen', 'v1', 'v1, as the host sees it', 'v1, no limit'])
def test_free_memory_is_what_is_left_of_a_limit(files, free, machine, monkeypatch):
    machine(files)
    assert memory.free_memory() == free*GB
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert memory.free_memory() == free*GB//4


def test_a_container_decides_which_store(machine):
    "ImageNet-LT in half precision is 0.22 GB"
    for limit, kind in ((4*GB, 'DenseStore'), (GB//2, 'DiskStore')):
        machine({**own2, **v2(limit, used=0, cached=0)})
        assert type(stores.make_store('auto', 115_846, 1000)).__name__ == kind


disk, tmp, var = '/dev/sda1 / ext4 rw 0 0', 'tmpfs /tmp tmpfs rw,nosuid 0 0', 'tmpfs /var/tmp tmpfs rw 0 0'


@pytest.mark.parametrize('mounts,usual,chosen', [
    ([disk], '/tmp', '/tmp'), (None, '/tmp', '/tmp'), ([disk, tmp], '/tmp', '/var/tmp'), ([disk, tmp, var], '/tmp', '/'),
    ([disk, tmp, '/dev/sdb1 /tmp xfs rw 0 0'], '/tmp', '/tmp'),
    (['overlay / overlay rw 0 0', tmp], '/tmp', '/var/tmp'), ([disk, tmp], '/var', '/var'),
], ids=['on a disk', 'nobody can tell', 'in memory', 'both in memory', 'a disk over it', 'a container', 'a folder that was named'])
def test_a_temporary_folder_is_on_a_disk(mounts, usual, chosen, machine, monkeypatch, tmp_path):
    monkeypatch.setattr(stores.tempfile, 'gettempdir', lambda: usual)
    monkeypatch.setattr(stores.os, 'getcwd', lambda: '/')
    monkeypatch.setattr(stores.os, 'access', lambda *args: True)
    machine({} if mounts is None else {'proc/mounts': '\n'.join(mounts)})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert stores._disk_folder() == chosen


def test_no_disk_at_all_is_said(machine):
    machine({'proc/mounts': 'none / ramfs rw 0 0'})
    with pytest.warns(UserWarning, match='is kept in memory.*Name a folder'): stores._disk_folder()


def test_names_with_a_space(machine, tmp_path):
    (tmp_path/'a b/c').mkdir(parents=True)
    machine({'proc/mounts': f'{disk}\ntmpfs {os.path.realpath(tmp_path)}/a\\040b tmpfs rw 0 0'})
    assert stores._in_memory(tmp_path/'a b/c') and not stores._in_memory(tmp_path)


def test_a_store_is_where_the_disk_is(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, '_disk_folder', lambda: str(tmp_path))
    s = stores.DiskStore(5, 3)
    assert s.folder.parent == tmp_path
    s.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('n,free,said', [(10_847, 64*GB, ''), (40_000, 64*GB, ' 40,000 samples, 1,000 classes: 152.6 MiB of torch.float32.'),
                                         (70_000, 64*GB, ' 70,000 samples, 1,000 classes: 133.5 MiB of torch.float16.'),
                                         (70_000, GB//2, ' 70,000 samples, 1,000 classes: 133.5 MiB of torch.float16 on disk.')], ids=['small', 'dense', 'half', 'disk'])
def test_what_was_chosen_is_said_in_a_line(n, free, said, monkeypatch, capsys):
    "On the first rank, and only if nobody has chosen"
    monkeypatch.setattr(stores, 'free_memory', lambda device: free)
    logits = torch.zeros(1, 1000 if said else 100)
    for rank, store in ((0, 'auto'), (1, 'auto'), (0, 'half')):
        learn = SimpleNamespace(cbs=[], sample_ids=SimpleNamespace(n_items=n), loss_terms=SimpleNamespace(ranks=SimpleNamespace(rank=rank)))
        memory = KnowledgeReview._new_memory(SimpleNamespace(learn=learn, store_args=KnowledgeReview(store=store).store_args), logits)
        if isinstance(memory.store, stores.DiskStore): memory.store.close()
        out = capsys.readouterr().out
        assert out == (f'Knowledge Review keeps the last predictions of{said}\n' if said and (rank, store) == (0, 'auto') else '')


class Late(stores._Coming):
    "As from a GPU that is late: the host sees rubbish until it has asked `after` times for whatever, or waited"
    after, waited, asked = 3, 0, 0
    def __init__(self, ids, rows):
        self.ids, self.rows, self.due = ids, rows, Late.asked+self.after
        self.host = ids*0, rows*torch.nan
    def here(self, wait=False):
        Late.asked += 1
        Late.waited += wait
        there = wait or Late.asked > self.due
        if there: self.host = self.ids, self.rows
        return there


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(stores, '_Coming', Late)
    monkeypatch.setattr(Late, 'waited', 0)
    return Late


@pytest.mark.parametrize('after', [0, 1, 4, 99])
def test_what_a_gpu_sends_late_is_read_as_if_it_had_come(after, late, monkeypatch, tmp_path):
    "A hundred batches with repeated items, a frozen file now and then: always what a store in memory has"
    monkeypatch.setattr(Late, 'after', after)
    torch.manual_seed(after)
    s, want = stores.DiskStore(12, 5, tmp_path), stores.DenseStore(12, 5, torch.float16)
    for step in range(100):
        ids = torch.randint(0, 12, (4,))
        for o in (s, want): assert torch.equal(o.get(ids, ids.tolist())[0], want.get(ids)[0])
        last = {i: k for k, i in enumerate(ids.tolist())}  # the last visit wins, whatever the device makes of two at once
        z = torch.randn(4, 5)
        s.put(ids, s.pack(z))
        want.put(torch.tensor([*last]), want.pack(z[[*last.values()]]))
        if step % 9 == 8:
            state = s.state_dict()
            assert not s._coming
            if step % 2: s.close(); s = stores.DiskStore.from_state(state)
    assert torch.equal(s.get(torch.arange(12))[0], want.logits) and late.waited >= (after > 2)
    s.close()


def fitted(store, repeated):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=60)
    if repeated:
        items = [(x.float()/256, y) for x, y in dls.train_ds]
        dls = DataLoaders(WeightedDL(items, wgts=[1+100*(i < 30) for i in range(len(items))], bs=16, shuffle=True), dls.valid)
    rl = ReflectiveLearning(kr=dict(store=store, adapt=0., memory=0.), ks=False)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=CrossEntropyLossFlat(), cbs=rl)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize('repeated', [False, True])
def test_a_fit_is_the_same_however_late_rows_come(repeated, late, monkeypatch):
    got = []
    for after in (0, 5):
        monkeypatch.setattr(Late, 'after', after)
        got.append(fitted('disk', repeated))
    assert torch.equal(*got) and torch.isfinite(got[0]).all() and not late.waited
    assert not torch.equal(got[0], fitted(dict(kind='topk', k=1), repeated))  # teachers matter here


def test_a_full_disk_is_said_when_rows_have_come(late, monkeypatch, tmp_path):
    s = stores.DiskStore(12, 5, tmp_path)
    monkeypatch.setattr(Late, 'after', 1)
    ids = torch.arange(4)
    s.put(ids, s.pack(torch.ones(4, 5)))
    write = os.pwrite
    monkeypatch.setattr(os, 'pwrite', lambda *a: 0)
    with pytest.raises(OSError, match='disk with the last predictions is full'): s.get(ids)
    monkeypatch.setattr(os, 'pwrite', write)
    assert s.get(ids)[0].eq(1).all()  # once there is room: nothing was lost
    s.close()
