"""The `ltrl` command for tests: in this process, or in a process of its own.

A new process spends several seconds on importing PyTorch and fastai. Tests start one where signals, locks or the
environment matter, and for one example of each command.
"""
import contextlib
import io
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from unittest.mock import patch

from fastai.basics import defaults
from fastcore.xtras import working_directory
from ltrl_fastai.cli.main import main

program = str(Path(sys.executable).parent/'ltrl')
wide = {'MPLBACKEND': 'Agg', 'COLUMNS': '200'}


def start_ltrl(*args, cwd, **kwargs):
    "Start `ltrl` in a process of its own"
    options = dict(cwd=cwd, env={**os.environ, **wide}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return subprocess.Popen([program, *map(str, args)], **{**options, **kwargs})


def ltrl_process(*args, cwd, **environment):
    "Run `ltrl` in a process of its own, which has ended when this returns"
    env = {**os.environ, **wide, **environment}
    command = [program, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


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
