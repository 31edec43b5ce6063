"What is public: every name in the `__all__` of a module, the public methods and properties of its classes, and what is patched onto other classes."
import ast
import dataclasses
import importlib
import inspect
import io
import pkgutil
import textwrap
import tokenize
from functools import cached_property

from fastai.callback.core import _events

import ltrl_fastai

fastais = {*map(str, _events), 'after_crash', 'encodes', 'decodes', 'setups'} # names of which fastai says when they are called
modules = [importlib.import_module(o.name) for o in pkgutil.walk_packages(ltrl_fastai.__path__, 'ltrl_fastai.')
           if not o.ispkg and o.name.rpartition('.')[2] not in ('_modidx','__main__')]


def ours(o): return (getattr(o, '__module__', None) or '').startswith('ltrl_fastai.')


@dataclasses.dataclass
class Public:
    "A public function, class, method or property"
    name: str
    of: object # What it is
    f: object=None # The function of which arguments and result are; None for a class without `__init__`

    def __str__(self): return self.name

    @cached_property
    def node(self): return ast.parse(textwrap.dedent(inspect.getsource(self.f or self.of))).body[0]

    @cached_property
    def commented(self):
        "Lines with a comment; that which ends a signature tells of the result, not of an argument"
        depth,end,res = 0,None,set()
        for t in tokenize.generate_tokens(io.StringIO(textwrap.dedent(inspect.getsource(self.f or self.of))).readline):
            if t.type==tokenize.OP: depth += (t.string in '([{')-(t.string in ')]}')
            if t.string==':' and depth==0 and end is None and t.start[0]>=self.node.lineno: end = t.start[0]
            if t.type==tokenize.COMMENT and t.start[0]!=end: res.add(t.start[0])
        return res

    @property
    def args(self):
        "Arguments, or the fields of a dataclass; none of a lambda"
        if isinstance(self.node, ast.ClassDef): return [o for o in self.node.body if isinstance(o, ast.AnnAssign)] if dataclasses.is_dataclass(self.of) else []
        if not isinstance(self.node, ast.FunctionDef): return []
        a = self.node.args
        return [o for o in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if o and o.arg not in ('self','cls')]

    @property
    def within(self):
        "What stands in the function itself, and not in one within it"
        def walk(node):
            for o in ast.iter_child_nodes(node):
                if isinstance(o, (ast.FunctionDef,ast.Lambda,ast.ClassDef)): continue
                yield o
                yield from walk(o)
        return walk(self.node) if isinstance(self.node, ast.FunctionDef) else ()

    @property
    def gives(self):
        "Does it return or yield something?"
        return any(isinstance(o, (ast.Yield,ast.YieldFrom)) or isinstance(o, ast.Return) and o.value is not None for o in self.within)


def is_command(o): return o.name.startswith('ltrl_fastai.experiments.cli') # options carry their help, and a command's text is that of `--help`
def name_of(arg): return arg.arg if isinstance(arg, ast.arg) else arg.target.id


def of_class(name, cls):
    init = vars(cls).get('__init__')
    yield Public(name, cls, inspect.unwrap(init) if init and not dataclasses.is_dataclass(cls) else None)
    fields = getattr(cls, '__dataclass_fields__', {})
    for k,o in vars(cls).items():
        if k.startswith('_') or k in fastais or k in fields or any(k in vars(base) for base in cls.__mro__[1:]): continue # its base says what it is
        f = o.fget if isinstance(o, property) else inspect.unwrap(getattr(o, '__func__', o))
        if inspect.isfunction(f) and ours(f): yield Public(f'{name}.{k}', o, f)


def public():
    for m in modules:
        for k in getattr(m, '__all__', []):
            o = getattr(m, k)
            if isinstance(o, type): yield from of_class(f'{m.__name__}.{k}', o)
            elif callable(o) and hasattr(o, '__code__') or hasattr(o, '__wrapped__'): yield Public(f'{m.__name__}.{k}', o, inspect.unwrap(o))
    from fastai.learner import Learner
    for k,o in vars(Learner).items():
        if ours(o) and inspect.isfunction(o): yield Public(f'{o.__module__}.Learner.{k}', o, o)


def data():
    "Public names that are no functions or classes: module, names, and the comment that says what they are, or what they say of themselves"
    for m in modules:
        source = inspect.getsource(m)
        comments = {t.start[0]: t.string[1:].strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type==tokenize.COMMENT}
        for node in ast.parse(source).body:
            names = [o.id for t in getattr(node, 'targets', []) for o in ast.walk(t) if isinstance(o, ast.Name) and o.id in getattr(m, '__all__', ())]
            if names: yield m,names,comments.get(node.lineno) or comments.get(node.end_lineno) or getattr(getattr(m, names[0]), 'about', None)


everything = list(public())
