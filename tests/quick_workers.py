"Workers of comparisons that start at once: they are forked from a server that has imported PyTorch and fastai."
import contextlib
import multiprocessing
import os
import types
from unittest.mock import patch

from ltrl_fastai.experiments import runner


def _work_in(environment, target, args):
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


@contextlib.contextmanager
def quick_workers():
    "Let `run_plan` fork its workers, where the system can; they have what spawned ones have, and nothing else"
    if 'forkserver' not in multiprocessing.get_all_start_methods():
        yield
        return
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload([runner.__name__])
    def process(target, args): return server.Process(target=_work_in, args=(dict(os.environ), target, args))
    def get_context(method):
        assert method == 'spawn'
        return types.SimpleNamespace(Pipe=server.Pipe, Process=process)
    replaced = types.SimpleNamespace(get_context=get_context, parent_process=multiprocessing.parent_process)
    with patch.object(runner, 'multiprocessing', replaced): yield
