"Several processes learn what one process learns that sees all their batches."
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')
import methods_worker
import ranks_worker as worker
from quick_workers import ForkedCommand, can_fork

here = Path(__file__).parent


def free_port():
    with socket.socket() as o:
        o.bind(('localhost', 0))
        return o.getsockname()[1]


def launcher(folder):
    "Command and environment of tools/launch.sh for two 'machines', both this one"
    hosts, remote = folder/'hosts', folder/'remote'
    hosts.write_text('localhost 1\n# a comment\nme@localhost\n')
    remote.write_text('#!/bin/sh\nshift; exec sh -c "$*"\n')
    remote.chmod(0o755)
    env = dict(REMOTE=str(remote), PORT=str(free_port()), PYTHON=sys.executable)
    return ['bash', str(here.parent/'tools/launch.sh'), str(hosts)], env


def run(command, timeout=600, **env):
    r = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', **env})
    assert r.returncode == 0, r.stderr[-5000:]


def fork_ranks(world, folder, function, *args):
    "Call a function in `world` forked ranks, with the environment that launchers give them"
    if not can_fork: pytest.skip('this system has no fork')
    group = dict(MASTER_ADDR='localhost', MASTER_PORT=str(free_port()), WORLD_SIZE=str(world),
                 LOCAL_WORLD_SIZE=str(world))
    def start(rank):
        env = {**os.environ, **group, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        return ForkedCommand(partial(function, *args), [function.__name__], cwd=folder, env=env,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ranks = [start(rank) for rank in range(world)]
    end = time.monotonic()+600  # ranks that wait for each other would wait for ever
    try:
        for o in ranks: o.start_reading()
        while None in (codes := [o.poll() for o in ranks]):
            if any(codes) or time.monotonic() > end: break  # one has failed, and the others wait for it
            time.sleep(.05)
    finally:
        for o in ranks: o.kill()
    said = [o.communicate()[1] for o in ranks]
    assert codes == [0]*world, '\n'.join(said)[-5000:]


@pytest.fixture(scope='module', params=[2, 3])
def trained(request, tmp_path_factory):
    "Number of processes, and the folder of their results"
    folder = tmp_path_factory.mktemp(f'ranks{request.param}')
    fork_ranks(request.param, folder, worker.in_rank, folder, list(worker.variants))
    return request.param, folder


def test_the_launcher_ends_all_processes_if_one_fails(tmp_path):
    command, env = launcher(tmp_path)
    code = 'import os, sys, time; os.environ["RANK"] == "1" and sys.exit(3); time.sleep(300)'
    assert subprocess.run([*command, '-c', code], env={**os.environ, **env}, timeout=100).returncode == 3


def test_the_launcher_names_a_missing_file_of_hosts(tmp_path):
    command, _ = launcher(tmp_path)
    r = subprocess.run(['bash', command[1], 'nowhere', 'train.py'], capture_output=True, text=True)
    assert r.returncode == 2
    assert 'nowhere: expected a file' in r.stderr


def assert_same_as_one_process(folder, name, world):
    want = worker.fit(worker.learner(name, world))
    for rank in range(world):
        got = torch.load(folder/f'{name}-{rank}.pt', weights_only=True)
        assert got.keys() == want.keys()
        for k, v in want.items():
            torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6, equal_nan=True, check_dtype=False,
                                       msg=lambda m, k=k: f'{k}: {m}')
    assert want['history.review_loss'][1:].gt(0).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', worker.variants)
def test_ranks_learn_what_one_process_learns(trained, name):
    world, folder = trained
    assert_same_as_one_process(folder, name, world)


@pytest.mark.slow
def test_started_by_the_launcher(tmp_path):
    "Chapters start processes by torchrun"
    command, env = launcher(tmp_path)
    run([*command, str(here/'ranks_worker.py'), str(tmp_path), 'everything'], **env)
    assert_same_as_one_process(tmp_path, 'everything', 2)


@pytest.mark.slow
def test_started_by_accelerate(tmp_path):
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
              '--num_machines', '1', '--mixed_precision', 'no', '--main_process_port', str(free_port())]
    # HF_HOME: without the settings of the user who runs the tests
    run([*launch, str(here/'ranks_worker.py'), str(tmp_path), 'everything'], timeout=300, HF_HOME=str(tmp_path))
    assert_same_as_one_process(tmp_path, 'everything', 2)


@pytest.mark.parametrize('world', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_with_different_checkpoints_stop_together(world, tmp_path):
    fork_ranks(world, tmp_path, worker.in_rank, tmp_path, [])
    for rank in range(world):
        none, older, short, same = json.loads((tmp_path/f'told-{rank}.json').read_text())
        for report, found in ((none, 'finds none'), (older, 'goes on after 1 epochs')):
            assert 'rank 0 goes on after 2 epochs' in report
            assert f'rank 1 {found}' in report
            assert 'a disk that all machines share' in report
        assert ('no checkpoint that can be read' if rank else 'rank 1 refuses what there is') in short
        assert same == 'went on'


@pytest.fixture(scope='module')
def methods_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('methods')
    fork_ranks(2, folder, methods_worker.in_rank, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', methods_worker.names)
def test_methods_have_one_state_on_all_ranks(methods_trained, name):
    "Equal weights, also of the queue and the slow copy; class-aware sampling balances classes over all ranks together"
    a, b = [torch.load(methods_trained/f'{name}-{rank}.pt', weights_only=True) for rank in range(2)]
    for k, v in a['state'].items():
        assert v.isfinite().all()
        if 'running_' not in k: torch.testing.assert_close(b['state'][k], v, rtol=1e-5, atol=1e-6)
    counts = torch.bincount(torch.tensor(a['seen'][-1]+b['seen'][-1]), minlength=10)
    if name in ('crt', 'mislas') or name.endswith('-sampling'):
        assert counts.max()-counts.min() <= 2  # one more makes ranks equally long
    if name == 'paco':
        n_seen = sum(len(o) for r in (a, b) for o in r['seen'])
        assert a['state']['oldest'] == n_seen % len(a['state']['queue'])
