"What several processes learn is what one learns that sees all their batches."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')
import methods_worker
import ranks_worker as worker

here = Path(__file__).parent


def start(world, folder):
    "Three processes by torchrun, or two 'machines', both of them this one, by tools/launch.sh"
    if world == 3: return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}'], {}
    (folder/'hosts').write_text('localhost 1\n# a comment\nme@localhost\n')
    (folder/'remote').write_text('#!/bin/sh\nshift; exec sh -c "$*"\n'); (folder/'remote').chmod(0o755)
    with socket.socket() as o: o.bind(('localhost', 0)); port = o.getsockname()[1]
    return ['bash', str(here.parent/'tools/launch.sh'), str(folder/'hosts')], dict(REMOTE=str(folder/'remote'), PORT=str(port), PYTHON=sys.executable)


@pytest.fixture(scope='module', params=[2, 3])
def trained(request, tmp_path_factory):
    "What `world` processes have learned"
    folder = tmp_path_factory.mktemp(f'ranks{request.param}')
    command, more = start(request.param, folder)
    r = subprocess.run([*command, str(here/'ranks_worker.py'), str(folder)], capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1', **more})
    assert r.returncode == 0, r.stderr[-5000:]
    return request.param, folder


def test_the_launcher_ends_all_if_one_fails(tmp_path):
    command, more = start(2, tmp_path)
    code = 'import os, sys, time; os.environ["RANK"] == "1" and sys.exit(3); time.sleep(300)'
    assert subprocess.run([*command, '-c', code], env={**os.environ, **more}, timeout=100).returncode == 3
    r = subprocess.run(['bash', command[1], 'nowhere', 'train.py'], capture_output=True, text=True)
    assert r.returncode == 2 and 'nowhere: expected a file' in r.stderr


def as_one(folder, name, world):
    "All ranks have learned what one process learns"
    want = worker.fit(worker.learner(name, world))
    for rank in range(world):
        got = torch.load(folder/f'{name}-{rank}.pt', weights_only=True)
        assert got.keys() == want.keys()
        for k, v in want.items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6, equal_nan=True, check_dtype=False, msg=lambda m, k=k: f'{k}: {m}')
    assert want['history.review_loss'][1:].gt(0).all()


@pytest.mark.parametrize('name', worker.variants)
def test_ranks_learn_what_one_process_learns(trained, name):
    world, folder = trained
    as_one(folder, name, world)


def test_started_by_accelerate(tmp_path):
    with socket.socket() as o: o.bind(('localhost', 0)); port = o.getsockname()[1]
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no']
    r = subprocess.run([*command, '--main_process_port', str(port), str(here/'ranks_worker.py'), str(tmp_path), 'everything'], capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HOME': str(tmp_path)})  # not the settings of whoever runs the tests
    assert r.returncode == 0, r.stderr[-5000:]
    as_one(tmp_path, 'everything', 2)


def test_ranks_that_find_other_checkpoints_stop_together(trained):
    world, folder = trained
    for rank in range(world):
        none, older, short, same = json.loads((folder/f'told-{rank}.json').read_text())
        for o, said in ((none, 'finds none'), (older, 'goes on after 1 epochs')):
            assert 'rank 0 goes on after 2 epochs' in o and f'rank 1 {said}' in o and 'a disk that all machines share' in o
        assert 'no checkpoint that can be read' in short if rank else 'rank 1 refuses what there is' in short
        assert same == 'went on'


@pytest.fixture(scope='module')
def methods_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('methods')
    command, more = start(2, folder)
    r = subprocess.run([*command, str(here/'methods_worker.py'), str(folder)], capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1', **more})
    assert r.returncode == 0, r.stderr[-5000:]
    return folder


@pytest.mark.parametrize('name', methods_worker.names)
def test_methods_stay_one_over_ranks(methods_trained, name):
    "The same weights on all ranks, queue and slow copy too; even classes are even over all ranks together"
    a, b = [torch.load(methods_trained/f'{name}-{rank}.pt', weights_only=True) for rank in range(2)]
    for k, v in a['state'].items():
        assert v.isfinite().all()
        if 'running_' not in k: torch.testing.assert_close(b['state'][k], v, rtol=1e-5, atol=1e-6)
    n = torch.bincount(torch.tensor(a['seen'][-1]+b['seen'][-1]), minlength=10)
    if name in ('crt', 'mislas'): assert n.max()-n.min() <= 2  # one more is to make ranks equally long
    if name == 'paco': assert a['state']['at'] == sum(len(o) for r in (a, b) for o in r['seen']) % len(a['state']['queue'])
