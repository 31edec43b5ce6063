"Annotations: everything public has them, a type checker agrees with them, finds the types that users are promised, and the mistakes that they make."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from public import Public, everything, name_of

root = Path(__file__).parent.parent
promises,mistakes = root/'tests/typing_api.py',root/'tests/typing_mistakes.py'


def unannotated(o):
    a = o.node.args if isinstance(o.node, ast.FunctionDef) else None
    return [name_of(arg) for arg in o.args if arg.annotation is None and arg not in (a.vararg, a.kwarg)]


def not_optional(o):
    "Arguments that are None by default, which their type does not allow"
    if not isinstance(o.node, ast.FunctionDef): pairs = [(arg, arg.value) for arg in o.args]
    else:
        a = o.node.args
        given = [*a.posonlyargs, *a.args]
        pairs = [*zip(given[len(given)-len(a.defaults):], a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    none = [arg for arg,v in pairs if isinstance(v, ast.Constant) and v.value is None and arg.annotation is not None]
    return [name_of(arg) for arg in none if not re.search(r'\bNone\b|^Any$', ast.unparse(arg.annotation))]


def test_every_argument_has_a_type():
    assert not {str(o): names for o in everything if (names := unannotated(o))}
    assert not {str(o): names for o in everything if (names := not_optional(o))}


def _bad(a, b:int=None, c:int|None=None, *args, d:str=None, **kwargs): pass


def test_what_is_missing_is_found():
    bad = Public('_bad', _bad, _bad)
    assert unannotated(bad)==['a'] and not_optional(bad)==['b','d']


@pytest.fixture(scope='module')
def errors():
    "Of package, promises and mistakes in one run, whose cache the next one begins with: (file, line, kind)"
    r = subprocess.run([sys.executable, '-m', 'mypy', '--no-pretty', 'ltrl_fastai', promises, mistakes], cwd=root, capture_output=True, text=True)
    found = [re.match(r'(.+?):(\d+): error: .*\[([a-z-]+)\]$', line) for line in r.stdout.splitlines() if ': error: ' in line]
    assert r.returncode==1 and found and all(found), r.stdout+r.stderr
    return [((root/m[1]).resolve(), int(m[2]), m[3], m[0]) for m in found]


def test_a_type_checker_finds_no_fault_and_what_is_promised(errors): assert not [line for file,*_,line in errors if file!=mistakes]


def test_a_type_checker_finds_mistakes_of_users(errors):
    marked = {(i,m[1]) for i,line in enumerate(mistakes.read_text().splitlines(), 1) if (m := re.search(r'# E: ([a-z-]+)$', line))}
    assert len(marked)>12 and {(line,kind) for file,line,kind,_ in errors if file==mistakes}==marked


def test_a_promise_that_is_not_kept_is_found(tmp_path):
    f = tmp_path/'broken.py'
    f.write_text('from typing_extensions import assert_type\nfrom ltrl_fastai.all import class_counts\nassert_type(class_counts([(0, 1)]), int)\n')
    r = subprocess.run([sys.executable, '-m', 'mypy', f], cwd=root, capture_output=True, text=True)
    assert r.returncode==1 and 'Expression is of type "Tensor", not "int"' in r.stdout, r.stdout+r.stderr
