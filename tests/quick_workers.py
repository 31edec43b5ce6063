"Processes that start at once: they are forked from a server that has imported PyTorch and fastai."
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import types
from multiprocessing import forkserver, reduction
from unittest.mock import patch

import pytest
from ltrl_fastai.experiments import runner

can_fork = 'forkserver' in multiprocessing.get_all_start_methods()


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
    if not can_fork: pytest.skip('this system has no fork')
    server = _server()
    ours, theirs = server.Pipe()
    process = server.Process(target=_work_in, args=(dict(os.environ), target, (*args, theirs)))
    process.start()
    theirs.close()
    return process, ours


@contextlib.contextmanager
def quick_workers():
    "Let `run_plan` fork its workers, where the system can; they have what spawned ones have, and nothing else"
    if not can_fork:
        yield
        return
    server = _server()
    def process(target, args): return server.Process(target=_work_in, args=(dict(os.environ), target, args))
    def get_context(method):
        assert method == 'spawn'
        return types.SimpleNamespace(Pipe=server.Pipe, Process=process)
    replaced = types.SimpleNamespace(get_context=get_context, parent_process=multiprocessing.parent_process)
    with patch.object(runner, 'multiprocessing', replaced): yield


class ForkedCommand:
    """A command in a process of its own that is forked from the server, used as `subprocess.Popen` is.

    It has its own environment, folder, arguments, standard streams and signal handlers, and is killed, interrupted and
    waited for like any process. Its own workers come from the same server: they start at once, inherit nothing of it,
    and see when it is gone. What only a new interpreter has is missing: the imports.
    """
    def __init__(self, function, args, cwd, env, stdout, stderr):
        server = _server()
        opened = []
        def stream(wanted, at_stdout=None):
            "Our end, and the file descriptor for the process"
            if wanted == subprocess.PIPE:
                ours, theirs = os.pipe()
                opened.append(theirs)
                return open(ours, encoding='utf-8'), theirs
            if wanted == subprocess.STDOUT: return None, at_stdout
            theirs = os.open(os.devnull, os.O_RDWR)
            opened.append(theirs)
            return None, theirs
        self.args = args
        self.stdout, out = stream(stdout)
        self.stderr, err = stream(stderr, at_stdout=out)
        forkserver.ensure_running()
        address = forkserver._forkserver._forkserver_address
        streams = _Streams(out, err)
        self.process = server.Process(target=_work_as_command, args=(address, streams, env, str(cwd), function, args))
        self.process.start()
        for fd in opened: os.close(fd)
        self.pid = self.process.pid
        self._texts, self._readers = {}, None

    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.process.exitcode
    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)
    def kill(self): self.send_signal(signal.SIGKILL)
    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout=None):
        "What it writes until it ends: standard output and error, None where there is no pipe"
        self.start_reading()
        self.wait(timeout)
        for o in self._readers: o.join()
        return self._texts.get('out'), self._texts.get('err')

    def start_reading(self):
        "Read its pipes in the background: a pipe that nobody reads is full after 64 KiB, and the process would wait"
        if self._readers is not None: return
        def read(name, file):
            with file: self._texts[name] = file.read()
        files = dict(out=self.stdout, err=self.stderr)
        self._readers = [threading.Thread(target=read, args=o, daemon=True) for o in files.items() if o[1]]
        for o in self._readers: o.start()


class _Streams:
    "File descriptors of standard output and error, on their way to a process"
    def __init__(self, *fds): self.fds = fds
    def __reduce__(self): return _streams_there, tuple(reduction.DupFd(fd) for fd in self.fds)


def _streams_there(*fds): return [o.detach() for o in fds]


def _work_as_command(address, streams, environment, cwd, function, args):
    "In the forked process: take over what belongs to a process of its own, then call `function`"
    for i, fd in enumerate(streams, 1):
        os.dup2(fd, i)
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # as in any command; a forked process inherits `forkserver`
    # the server is not started again for the workers of this process
    forkserver._forkserver._forkserver_address = address
    forkserver._forkserver.ensure_running = lambda: None
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(args)
    with quick_workers(): function()
