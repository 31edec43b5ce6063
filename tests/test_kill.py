"kill -9 at any moment, and the same command again: the result is equal to the last bit."
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

program = '''
import sys
import torch
from functools import partial
from fastai.vision.all import Callback, Learner, SGD, nn, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, ReflectiveLearning, class_counts, digits_lt
folder = sys.argv[1]
store = dict(kind='disk', folder=folder) if sys.argv[2]=='disk' else sys.argv[2]
class PrintBatches(Callback):
    "Report each batch, which leaves time for a kill between two batches"
    def after_batch(self):
        if self.training: print(self.learn.train_iter, flush=True)
set_seed(0, reproducible=True)
dls = digits_lt(device='cpu', n_max=60)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))
learn = Learner(dls, net, loss_func=BalancedSoftmaxLoss(class_counts(dls)), opt_func=partial(SGD, mom=.9),
                cbs=[ReflectiveLearning(kr=dict(store=store), ks=True, kc=dict(every=3)), PrintBatches()])
with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, .05, cbs=Checkpoint(folder+'/fit.pt'))
losses = torch.stack(learn.recorder.losses).as_subclass(torch.Tensor)
torch.save(dict(model=learn.model.state_dict(), losses=losses), folder+'/end.pt')
'''


def start(folder, store):
    folder.mkdir(exist_ok=True)
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', program, str(folder), store]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
@pytest.mark.parametrize('store,kills', [('dense', 14), ('disk', 6)])
def test_killed_at_random_moments(tmp_path, store, kills):
    whole = start(tmp_path/'whole', store)
    n = len(whole.communicate()[0].split())
    assert whole.returncode == 0
    rng = random.Random(store)
    moments = sorted(rng.sample(range(2, n), kills))
    p, n_killed = start(tmp_path/'killed', store), 0
    for batch in moments:
        for line in p.stdout:
            if int(line) >= batch: break
        time.sleep(rng.random()*.01)  # anywhere: in a step, between two, in a write at the end of an epoch
        p.send_signal(signal.SIGKILL)
        n_killed += p.wait() == -signal.SIGKILL
        p = start(tmp_path/'killed', store)
    p.communicate()
    assert p.returncode == 0 and n_killed == kills
    a, b = [torch.load(tmp_path/o/'end.pt', weights_only=True) for o in ('whole', 'killed')]
    assert torch.equal(a['losses'], b['losses'])
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path):
    "Between any two steps of `Checkpoint.save` there is a complete file to resume from"
    folder = tmp_path/'a'
    def run():
        process = start(folder, 'dense')
        process.communicate()
        assert process.returncode == 0
        return torch.load(folder/'end.pt', weights_only=True)['losses']
    expected = run()
    new, old = folder/'fit.pt', folder/'fit.pt.older'
    while_writing = {old: old.read_bytes(), folder/'.fit.1.pt': b'half of a file'}
    truncated = {new: new.read_bytes()[:5000], old: old.read_bytes()}
    for files in (while_writing, truncated):
        for f in (new, old): f.unlink()
        for f, content in files.items(): f.write_bytes(content)
        assert torch.equal(run(), expected)
