"kill -9 at any moment, and the same command again: the result is equal to the last bit."
import random
import signal
import time
from contextlib import suppress

import pytest
import torch
from kill_worker import train
from quick_workers import forked


def start(folder, store):
    "A process that trains, and the batches that it reports"
    folder.mkdir(exist_ok=True)
    return forked(train, folder, store)


def rest(batches):
    "What is reported until the process ends"
    res = []
    with suppress(EOFError):
        while True: res.append(batches.recv())
    return res


@pytest.mark.slow
@pytest.mark.parametrize('store,kills', [('dense', 14), ('disk', 6)])
def test_killed_at_random_moments(tmp_path, store, kills):
    whole, batches = start(tmp_path/'whole', store)
    n = len(rest(batches))
    whole.join()
    assert whole.exitcode == 0
    rng = random.Random(store)
    moments = sorted(rng.sample(range(2, n), kills))
    n_killed = 0
    for batch in moments:
        process, batches = start(tmp_path/'killed', store)
        while batches.recv() < batch: pass
        time.sleep(rng.random()*.01)  # anywhere: in a step, between two, in a write at the end of an epoch
        process.kill()
        process.join()
        n_killed += process.exitcode == -signal.SIGKILL
    process, batches = start(tmp_path/'killed', store)
    rest(batches)
    process.join()
    assert process.exitcode == 0 and n_killed == kills
    a, b = [torch.load(tmp_path/o/'end.pt', weights_only=True) for o in ('whole', 'killed')]
    assert torch.equal(a['losses'], b['losses'])
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path):
    "Between any two steps of `Checkpoint.save` there is a complete file to resume from"
    folder = tmp_path/'a'
    def run():
        process, batches = start(folder, 'dense')
        rest(batches)
        process.join()
        assert process.exitcode == 0
        return torch.load(folder/'end.pt', weights_only=True)['losses']
    expected = run()
    new, old = folder/'fit.pt', folder/'fit.pt.older'
    while_writing = {old: old.read_bytes(), folder/'.fit.1.pt': b'half of a file'}
    truncated = {new: new.read_bytes()[:5000], old: old.read_bytes()}
    for files in (while_writing, truncated):
        for f in (new, old): f.unlink()
        for f, content in files.items(): f.write_bytes(content)
        assert torch.equal(run(), expected)
