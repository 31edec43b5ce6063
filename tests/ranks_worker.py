"""Training in several processes, and the same training in one process. test_ranks.py forks the processes, or starts
them: `torch.distributed.run --nproc_per_node=2 ranks_worker.py FOLDER [NAMES]`."""
import json
import os
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from fastai.basics import SGD, Callback, DataLoader, DataLoaders, Learner, nn, set_seed
from fastai.callback.training import GradientAccumulation
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, ReflectiveLearning, WithIds, allow_cpu_ranks
from ltrl_fastai.experiments.checkpoint import UnreadableCheckpoint
from torch.utils.data import TensorDataset

n, n_classes, bs = 50, 6, 8
v001 = dict(preset='v0.0.1')
variants = {
    'everything': dict(rl=dict(v001, kr=True, ks=True, kc=True)),
    'global': dict(rl=dict(v001, kr=True, ks=dict(mode='add'), kc=dict(granularity='global'))),
    'published': dict(rl=dict(preset='published')),
    'accumulated': dict(rl=dict(v001, kr=True, ks=True, kc=True), accumulate=2),
    'repeats': dict(rl=dict(v001, kr=True, kc=True), repeats=True),
    'carried': dict(rl=dict(v001, kr=True, kc=True), carried=True),
    'half': dict(rl=dict(v001, kr=dict(store='half'), kc=True)),
    'disk': dict(rl=dict(v001, kr=dict(store='disk'), kc=True), repeats=True),
    'disk, carried': dict(rl=dict(v001, kr=dict(store='disk'), kc=True), carried=True),
    'memory': dict(rl=dict(kr=dict(weight=1., adapt=0.), ks=dict(adapt=0.))),
    'resumed': dict(rl=dict(v001, kr=True, ks=True, kc=True), accumulate=1.5, resumed=True),
}


def make_get_ids(passes, epoch):
    """A function that draws the order of the next epoch, with every item `passes` times; with one pass for each rank,
    each rank is two batches ahead of the previous one"""
    def get_ids():
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3+epoch())).tolist()
        return [i for k in range(passes) for i in order[2*bs*k:]+order[:2*bs*k]]
    return get_ids


def interleaved(get_ids, world):
    "The order in which one process has to see what `world` ranks see at the same time"
    def get_interleaved():
        ids = get_ids()
        ids += ids[:-len(ids) % world]
        parts = [ids[i*len(ids)//world:(i+1)*len(ids)//world] for i in range(world)]
        return [i for start in range(0, len(parts[0]), bs) for part in parts for i in part[start:start+bs]]
    return get_interleaved


def learner(name, world):
    "A float64 learner; one process does the work of `world` ranks, or, if that is 0, of its own rank"
    variant = variants[name]
    set_seed(0, reproducible=True)
    y = (torch.rand(n)**2*n_classes).long()
    x = torch.randn(n_classes, 12, dtype=torch.float64)[y] + torch.randn(n, 12, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, n_classes)).double()
    counts = torch.bincount(y, minlength=n_classes).clamp(min=1)
    ds = TensorDataset(x, y)
    passes = (world or int(os.environ['WORLD_SIZE'])) if variant.get('repeats') else 1
    get_ids = make_get_ids(passes, lambda: getattr(learn, 'epoch', 0))
    if world: get_ids = interleaved(get_ids, world)
    total_bs = bs*(world or 1)
    train = DataLoader(WithIds(ds) if variant.get('carried') else ds, bs=total_bs, get_idxs=get_ids)
    dls = DataLoaders(train, DataLoader(ds, bs=64), device='cpu')
    cbs = [ReflectiveLearning(**variant['rl'])]
    if 'accumulate' in variant: cbs.append(GradientAccumulation(variant['accumulate']*total_bs))
    learn = Learner(dls, net, loss_func=BalancedSoftmaxLoss(counts), opt_func=partial(SGD, mom=.9), lr=.1, cbs=cbs)
    return learn


def outcome(learn):
    "Everything that has to be the same"
    res = {f'model.{k}': v for k, v in learn.model.state_dict().items()}
    for cb in learn.cbs:
        if cb.name == 'knowledge_review':
            teachers = cb.teachers.store.get(torch.arange(n)).double()
            res.update(seen=cb.teachers.seen, right=cb.teachers.right, share=cb.teachers.share_right, teachers=teachers)
        if cb.name == 'knowledge_summary':
            shared = cb.predictions if cb.centers is None else cb.centers
            res.update(shared=shared, train_accuracy=torch.as_tensor(cb.train_accuracy))
        if cb.name == 'knowledge_correction':
            rates = cb.conflict_rates[1:]
            res.update({f'conflicts.{k}': torch.tensor([o[k] for o in rates]) for k in rates[-1]})
    history = learn.loss_terms.history
    for k in history[0]:
        res[f'history.{k}'] = torch.tensor([float('nan') if o[k] is None else o[k] for o in history])
    return res


class Crash(Callback):
    "Crash in the middle of the third epoch"
    order = -100
    def before_batch(self):
        if self.training and self.epoch == 2 and self.iter == 1: raise InterruptedError('crash')


def fit(learn, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=cbs)
    return outcome(learn)


def fit_on_separate_disks(folder):
    "Write what each rank reports if its disk has no checkpoint, an older one, a truncated one or the same one"
    rank = int(os.environ['RANK'])
    first, own = folder/'disk-0', folder/f'disk-{rank}'
    file = own/'fit.ckpt'
    reports = []
    def keep_none(): pass
    def copy_older():
        own.mkdir(exist_ok=True)
        shutil.copy(first/'fit.ckpt.older', file)
    def truncate(): file.write_bytes(file.read_bytes()[:1000])
    def copy_same(): shutil.copy(first/'fit.ckpt', file)
    def train(*cbs):
        learn = learner('everything', 0)
        with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, [Checkpoint(file), *cbs])
    with suppress(InterruptedError): train(Crash())
    for change in (keep_none, copy_older, truncate, copy_same):
        if rank: change()
        try: train()
        except UnreadableCheckpoint as e: reports.append(str(e))
        else: reports.append('went on')
    (folder/f'told-{rank}.json').write_text(json.dumps(reports))


def train_variant(name, folder):
    "Train one variant in all ranks, if it says so in two parts, and save the outcome of this rank"
    cbs = []
    if variants[name].get('resumed'):
        cbs = [Checkpoint(folder/f'{name}.ckpt')]
        learn = learner(name, 0)
        with suppress(InterruptedError), learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, [*cbs, Crash()])
        assert len(learn.recorder.values) == 2, learn.recorder.values
    learn = learner(name, 0)
    with learn.distrib_ctx(sync_bn=False, cpu=True): res = fit(learn, cbs)
    torch.save(res, folder/f"{name}-{os.environ['RANK']}.pt")


def in_rank(folder, names):
    "Train these variants in this rank; without names, fit on separate disks"
    with allow_cpu_ranks():
        for name in names: train_variant(name, folder)
        if not names: fit_on_separate_disks(folder)
        torch.distributed.destroy_process_group()


if __name__ == '__main__': in_rank(Path(sys.argv[1]), sys.argv[2:])
