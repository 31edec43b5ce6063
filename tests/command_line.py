"""The `ltrl` command for tests: in this process, or in a process of its own.

A new process spends several seconds on importing PyTorch and fastai. Tests start one where signals, locks or the
environment matter, forked from a process that has imported them; `new_interpreter` starts a new Python, as users do.
"""
import contextlib
import io
import os
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from unittest.mock import patch

from fastai.basics import defaults
from fastcore.xtras import working_directory
from ltrl_fastai.cli.main import main
from quick_workers import ForkedCommand, can_fork

program = str(Path(sys.executable).parent/'ltrl')
wide = {'MPLBACKEND': 'Agg', 'COLUMNS': '200'}


def start_ltrl(*args, cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, new_interpreter=False, **environment):
    "Start `ltrl` in a process of its own"
    command, env = ['ltrl', *map(str, args)], {**os.environ, **wide, **environment}
    if can_fork and not new_interpreter: return ForkedCommand(main, command, cwd, env, stdout, stderr)
    # where tests run in the background, children inherit that interrupts are ignored
    def heed_interrupts(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([program, *command[1:]], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout,
                            stderr=stderr, text=True, preexec_fn=heed_interrupts if os.name == 'posix' else None)


def ltrl_process(*args, cwd, new_interpreter=False, **environment):
    "Run `ltrl` in a process of its own, which has ended when this returns"
    process = start_ltrl(*args, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         new_interpreter=new_interpreter, **environment)
    out, err = process.communicate()
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def ltrl_here(*args, cwd):
    "Run `ltrl` in this process; what it changes in the process is restored"
    args = ['ltrl', *map(str, args)]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(working_directory(cwd))
        stack.enter_context(patch.dict(os.environ, wide))
        stack.enter_context(patch.object(sys, 'argv', args))
        stack.enter_context(patch.object(defaults, 'use_cuda', defaults.use_cuda))  # `--device` changes it
        shown = stack.enter_context(_warnings_of_a_new_process())
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            main()
            code = 0
        except SystemExit as e: code = e.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    texts = [warnings.formatwarning(o.message, o.category, o.filename, o.lineno) for o in shown]
    return subprocess.CompletedProcess(args, code, output.getvalue(), errors.getvalue()+''.join(texts))


@contextlib.contextmanager
def _warnings_of_a_new_process():
    "Record the warnings that Python shows by default"
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        for o in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter('ignore', o)
        yield shown
