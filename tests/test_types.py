"Annotations: all public functions have them, and a type checker finds the promised types, and mistakes of users."
import ast
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from ltrl_fastai.cli import common
from public import Public, everything, name_of

root = Path(__file__).parent.parent
promises = root/'tests/typing_api.py'
mistakes = root/'tests/typing_mistakes.py'


def unannotated(o):
    a = o.node.args if isinstance(o.node, ast.FunctionDef) else None
    return [name_of(arg) for arg in o.args if arg.annotation is None and arg not in (a.vararg, a.kwarg)]


def with_defaults(o):
    "Arguments and their defaults"
    if not isinstance(o.node, ast.FunctionDef): return [(arg, arg.value) for arg in o.args]
    a = o.node.args
    positional = [*a.posonlyargs, *a.args]
    return [*zip(positional[len(positional)-len(a.defaults):], a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]


def not_optional(o):
    "Arguments that are None by default, although their type does not allow it"
    def is_none(v): return isinstance(v, ast.Constant) and v.value is None
    none = [arg for arg,v in with_defaults(o) if is_none(v) and arg.annotation is not None]
    return [name_of(arg) for arg in none if not allows_none(ast.unparse(arg.annotation))]


def allows_none(annotation):
    "May a value be None? Options that several commands share have a name for their type"
    shared = getattr(common, annotation, None)
    if typing.get_origin(shared) is typing.Annotated: annotation = str(typing.get_args(shared)[0])
    return bool(re.search(r'\bNone\b|^Any$', annotation))


def test_every_argument_has_a_type():
    assert not {str(o): names for o in everything if (names := unannotated(o))}
    assert not {str(o): names for o in everything if (names := not_optional(o))}


def _bad(a, b:int=None, c:int|None=None, *args, d:str=None, **kwargs): pass


def test_what_is_missing_is_found():
    bad = Public('_bad', _bad, _bad)
    assert unannotated(bad)==['a'] and not_optional(bad)==['b','d']


@pytest.fixture(scope='module')
def broken_promise(tmp_path_factory):
    file = tmp_path_factory.mktemp('types').resolve()/'broken.py'
    file.write_text('from typing_extensions import assert_type\n'
                    'from ltrl_fastai.all import class_counts\n'
                    'assert_type(class_counts([(0, 1)]), int)\n')
    return file


@pytest.fixture(scope='module')
def errors(broken_promise):
    "File, line, kind and text of each error in the package, the promises and the mistakes, which are read at once"
    command = [sys.executable, '-m', 'mypy', '--no-pretty', 'ltrl_fastai', promises, mistakes, broken_promise]
    r = subprocess.run(command, cwd=root, capture_output=True, text=True)
    lines = [line for line in r.stdout.splitlines() if ': error: ' in line]
    found = [re.match(r'(.+?):(\d+): error: .*\[([a-z-]+)\]$', line) for line in lines]
    assert r.returncode==1 and found and all(found), r.stdout+r.stderr
    return [((root/m[1]).resolve(), int(m[2]), m[3], m[0]) for m in found]


@pytest.mark.slow
def test_a_type_checker_finds_no_error_and_the_promised_types(errors, broken_promise):
    assert not [line for file,*_,line in errors if file not in (mistakes, broken_promise)]


@pytest.mark.slow
def test_a_type_checker_finds_mistakes_of_users(errors):
    lines = enumerate(mistakes.read_text().splitlines(), 1)
    marked = {(i,m[1]) for i,line in lines if (m := re.search(r'# E: ([a-z-]+)$', line))}
    assert len(marked)>12
    assert {(line,kind) for file,line,kind,_ in errors if file==mistakes}==marked


@pytest.mark.slow
def test_a_broken_promise_is_found(errors, broken_promise):
    found, = [(line, text) for file, line, _, text in errors if file==broken_promise]
    assert found[0]==3 and 'Expression is of type "Tensor", not "int"' in found[1]
