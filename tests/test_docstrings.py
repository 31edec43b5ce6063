"Every public function and class has a docstring of one line, and a comment for every argument."
import ast
import inspect
import re

import pytest

from public import Public, data, everything, is_command, modules, name_of


def undocumented(o):
    doc = inspect.getdoc(o.of) if not isinstance(o.of, type) else o.of.__doc__
    if not doc: return 'no docstring'
    first,*rest = doc.splitlines()
    if rest and not is_command(o): return 'a docstring of more than one line'
    if not first.endswith(('.','?')): return f'{first!r} is no sentence'
    has_asterisk = '*' in re.sub('`[^`]*`', '', doc)
    if has_asterisk and not is_command(o): return 'a bare asterisk: the site sets docstrings between two, in italics'


def unexplained(o):
    "Arguments without a comment"
    has_help = is_command(o) and 'Annotated' in inspect.getsource(o.f or o.of)
    return [name_of(a) for a in o.args if a.lineno not in o.commented and not shares_comment(o, a) and not has_help]


def undocumented_errors(o):
    "Errors that a function raises itself, and its docstring does not name"
    if is_command(o): return [] # commands print errors
    doc = o.of.__doc__ if isinstance(o.of, type) else inspect.getdoc(o.of)
    calls = [r.exc for r in o.within if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)]
    raised = {getattr(call.func, 'id', None) for call in calls}
    return sorted(e for e in raised if e and not e.startswith('_') and f'`{e}`' not in (doc or ''))


def shares_comment(o, arg):
    "Is there a comment for all arguments in the line of `arg`?"
    return any(a.lineno==arg.lineno and a.end_lineno in o.commented for a in o.args)


def test_all_public_names_are_found():
    names = {str(o).removeprefix('ltrl_fastai.') for o in everything}
    assert {'reflective.learning.ReflectiveLearning', 'reflective.learning.ReflectiveLearning.switch',
            'methods.losses.BalancedSoftmaxLoss', 'evaluation.report.ShotReport.plot',
            'evaluation.pictures.Learner.plot_shots', 'experiments.plan.PlannedRun',
            'core.ranks.Ranks.of', 'data.fast.TensorItems.set_split_idx'} <= names
    assert len(everything)>400


@pytest.mark.parametrize('m', modules, ids=lambda o: o.__name__.removeprefix('ltrl_fastai.'))
def test_module(m):
    assert (m.__doc__ or '').strip().endswith('.')
    mine = [o for o in everything if o.name.startswith(m.__name__+'.')]
    assert not {o.name: why for o in mine if (why := undocumented(o))}
    assert not {o.name: names for o in mine if (names := unexplained(o))}
    errors = {o.name: names for o in mine if (names := undocumented_errors(o))}
    assert not errors, 'their docstrings have to say: ...; raises `ValueError` if ...'
    unannotated = [o.name for o in mine if o.has_result and o.node.returns is None and not is_command(o)]
    assert not unannotated, 'these have no type of the result'


def test_public_data_have_a_comment():
    found = list(data())
    assert len(found)>20
    assert not [(m.__name__, names) for m,names,about in found if not about]


def _bad(a, b=1): return a


def _half(a, # Explained
          b=1): # The result
    "Something"
    return a


def _good(a, # Explained
          b:int, c:int=1, # Together
          *args, # More
          **kwargs # Others
         ) -> int: # The result
    "Something."
    return a


def _starred():
    "Something * something of `*args`."


def _raises():
    "Something."
    def inner(): raise KeyError('not its own')
    raise ValueError('if anything')


def test_what_is_missing_is_found():
    assert undocumented_errors(Public('_raises', _raises, _raises)) == ['ValueError']
    assert undocumented(Public('_starred', _starred, _starred)).startswith('a bare asterisk')
    bad,half,good = (Public(f.__name__, f, f) for f in (_bad, _half, _good))
    assert undocumented(bad)=='no docstring'
    assert unexplained(bad)==['a','b']
    assert bad.has_result and bad.node.returns is None
    assert undocumented(half)=="'Something' is no sentence"
    assert unexplained(half)==['b']
    assert undocumented(good) is None
    assert unexplained(good)==[]
    assert good.node.returns is not None
