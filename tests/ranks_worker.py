"Training by several processes, and the same by one. test_ranks.py starts it: `torch.distributed.run --nproc_per_node=2 ranks_worker.py FOLDER [NAMES]`."
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
first = dict(preset='v0.0.1')
variants = {
    'everything': dict(rl=dict(first, kr=True, ks=True, kc=True)),
    'global': dict(rl=dict(first, kr=True, ks=dict(mode='add'), kc=dict(granularity='global'))),
    'published': dict(rl=dict(preset='published')),
    'topk': dict(rl=dict(first, kr=dict(store=dict(kind='topk', k=3)), kc=True)),
    'accumulated': dict(rl=dict(first, kr=True, ks=True, kc=True), accumulate=2),
    'repeats': dict(rl=dict(first, kr=True, kc=True), repeats=True),
    'carried': dict(rl=dict(first, kr=True, kc=True), carried=True),
    'disk': dict(rl=dict(first, kr=dict(store='disk'), kc=True), repeats=True),
    'disk, carried': dict(rl=dict(first, kr=dict(store='disk'), kc=True), carried=True),
    'memory': dict(rl=dict(kr=dict(weight=1., adapt=0.), ks=dict(adapt=0.))),
    'resumed': dict(rl=dict(first, kr=True, ks=True, kc=True), accumulate=1.5, resumed=True),
}


def drawn(passes, epoch):
    "A function that draws the next epoch's order: every item as often as there are passes; with one for each rank, each is two batches ahead of the one before"
    def draw():
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3+epoch())).tolist()
        return [i for k in range(passes) for i in order[2*bs*k:]+order[:2*bs*k]]
    return draw


def together(draw, world):
    "The order in which one process has to see what `world` ranks see at a time"
    def _draw():
        ids = draw()
        ids += ids[:-len(ids) % world]
        parts = [ids[i*len(ids)//world:(i+1)*len(ids)//world] for i in range(world)]
        return [i for t in range(0, len(parts[0]), bs) for o in parts for i in o[t:t+bs]]
    return _draw


def learner(name, world):
    "A float64 learner; `world` ranks in one process, or, with 0, as many as there are"
    v = variants[name]
    set_seed(0, reproducible=True)
    y = (torch.rand(n)**2*n_classes).long()
    x = torch.randn(n_classes, 12, dtype=torch.float64)[y] + torch.randn(n, 12, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, n_classes)).double()
    counts = torch.bincount(y, minlength=n_classes).clamp(min=1)
    ds = TensorDataset(x, y)
    draw = drawn((world or int(os.environ['WORLD_SIZE'])) if v.get('repeats') else 1, lambda: getattr(learn, 'epoch', 0))
    train = DataLoader(WithIds(ds) if v.get('carried') else ds, bs=bs*(world or 1), get_idxs=together(draw, world) if world else draw)
    cbs = [GradientAccumulation(v['accumulate']*bs*(world or 1))] if 'accumulate' in v else []
    learn = Learner(DataLoaders(train, DataLoader(ds, bs=64), device='cpu'), net, loss_func=BalancedSoftmaxLoss(counts), opt_func=partial(SGD, mom=.9), lr=.1,
                    cbs=[ReflectiveLearning(**v['rl']), *cbs])
    return learn


def outcome(learn):
    "All that has to be the same"
    res = {f'model.{k}': v for k, v in learn.model.state_dict().items()}
    for cb in learn.cbs:
        if cb.name == 'knowledge_review':
            res.update(seen=cb.teachers.seen, right=cb.teachers.right, share=cb.teachers.share_right, teachers=cb.teachers.store.get(torch.arange(n))[0].double())
        if cb.name == 'knowledge_summary': res.update(shared=cb.predictions if cb.centers is None else cb.centers, learned=torch.as_tensor(cb.learned))
        if cb.name == 'knowledge_correction': res.update({f'conflicts.{k}': torch.tensor([o[k] for o in cb.conflict_rates[1:]]) for k in cb.conflict_rates[-1]})
    res.update({f'history.{k}': torch.tensor([float('nan') if o[k] is None else o[k] for o in learn.loss_terms.history]) for k in learn.loss_terms.history[0]})
    return res


class Crash(Callback):
    "In the middle of the third epoch"
    order = -100
    def before_batch(self):
        if self.training and self.epoch == 2 and self.iter == 1: raise InterruptedError('crash')


def fit(learn, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=cbs)
    return outcome(learn)


def apart(folder):
    "What a rank is told that has a disk of its own: a file is on that of the first alone, or is another one"
    rank, first = int(os.environ['RANK']), folder/'disk-0'
    mine, told = folder/f'disk-{rank}', []
    def copied(name): mine.mkdir(exist_ok=True); shutil.copy(first/name, mine/'fit.ckpt')
    def shortened(): (mine/'fit.ckpt').write_bytes((mine/'fit.ckpt').read_bytes()[:1000])
    def train(*cbs):
        learn = learner('everything', 0)
        with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, [Checkpoint(mine/'fit.ckpt'), *cbs])
    with suppress(InterruptedError): train(Crash())
    for change in (lambda: None, lambda: copied('fit.ckpt.older'), shortened, lambda: copied('fit.ckpt')):
        if rank: change()
        try: train()
        except UnreadableCheckpoint as e: told.append(str(e))
        else: told.append('went on')
    (folder/f'told-{rank}.json').write_text(json.dumps(told))


if __name__ == '__main__':
    with allow_cpu_ranks():
        for name in sys.argv[2:] or variants:
            cbs = [Checkpoint(f'{sys.argv[1]}/{name}.ckpt')] if variants[name].get('resumed') else []
            if cbs:
                learn = learner(name, 0)
                with suppress(InterruptedError), learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, [*cbs, Crash()])
                assert len(learn.recorder.values) == 2, learn.recorder.values
            learn = learner(name, 0)
            with learn.distrib_ctx(sync_bn=False, cpu=True): res = fit(learn, cbs)
            torch.save(res, f"{sys.argv[1]}/{name}-{os.environ['RANK']}.pt")
        if not sys.argv[2:]: apart(Path(sys.argv[1]))
        torch.distributed.destroy_process_group()
