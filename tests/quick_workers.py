"Processes that start at once: they are forked from a server that has imported PyTorch and fastai."
import contextlib
import multiprocessing
import os
import types
from unittest.mock import patch

import pytest
from ltrl_fastai.experiments import runner

_can_fork = 'forkserver' in multiprocessing.get_all_start_methods()


def _server():
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['ltrl_fastai.all', runner.__name__])
    return server


def _work_in(environment, target, args):
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def forked(target, *args):
    "Start `target(*args, connection)` in a process; returns it and our end of the connection"
    if not _can_fork: pytest.skip('this system has no fork')
    server = _server()
    ours, theirs = server.Pipe()
    process = server.Process(target=_work_in, args=(dict(os.environ), target, (*args, theirs)))
    process.start()
    theirs.close()
    return process, ours


@contextlib.contextmanager
def quick_workers():
    "Let `run_plan` fork its workers, where the system can; they have what spawned ones have, and nothing else"
    if not _can_fork:
        yield
        return
    server = _server()
    def process(target, args): return server.Process(target=_work_in, args=(dict(os.environ), target, args))
    def get_context(method):
        assert method == 'spawn'
        return types.SimpleNamespace(Pipe=server.Pipe, Process=process)
    replaced = types.SimpleNamespace(get_context=get_context, parent_process=multiprocessing.parent_process)
    with patch.object(runner, 'multiprocessing', replaced): yield
