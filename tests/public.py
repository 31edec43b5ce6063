"The public names: `__all__` of each module, public methods and properties of classes, and patches of other classes."
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

# Methods that fastai calls, and documents
fastai_names = {*map(str, _events), 'after_crash', 'encodes', 'decodes', 'setups'}
modules = [importlib.import_module(o.name) for o in pkgutil.walk_packages(ltrl_fastai.__path__, 'ltrl_fastai.')
           if not o.ispkg and o.name.rpartition('.')[2] not in ('_modidx','__main__','all')]


def ours(o): return (getattr(o, '__module__', None) or '').startswith('ltrl_fastai.')


@dataclasses.dataclass
class Public:
    "A public function, class, method or property"
    name: str
    of: object # The object
    f: object=None # The function with the arguments and the result; None for a class without `__init__`

    def __str__(self): return self.name

    @cached_property
    def node(self): return ast.parse(textwrap.dedent(inspect.getsource(self.f or self.of))).body[0]

    @cached_property
    def commented(self):
        "Lines with a comment, except the line that ends the signature, whose comment is about the result"
        depth = 0
        end = None
        lines = set()
        source = textwrap.dedent(inspect.getsource(self.f or self.of))
        for t in tokenize.generate_tokens(io.StringIO(source).readline):
            if t.type==tokenize.OP: depth += (t.string in '([{')-(t.string in ')]}')
            if t.string==':' and depth==0 and end is None and t.start[0]>=self.node.lineno: end = t.start[0]
            if t.type==tokenize.COMMENT and t.start[0]!=end: lines.add(t.start[0])
        return lines

    @property
    def args(self):
        "Arguments, or the fields of a dataclass; none for a lambda"
        if isinstance(self.node, ast.ClassDef):
            if not dataclasses.is_dataclass(self.of): return []
            return [o for o in self.node.body if isinstance(o, ast.AnnAssign)]
        if not isinstance(self.node, ast.FunctionDef): return []
        a = self.node.args
        every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        return [o for o in every if o and o.arg not in ('self','cls')]

    @property
    def within(self):
        "Nodes of the function without those of nested functions"
        def walk(node):
            for o in ast.iter_child_nodes(node):
                if isinstance(o, (ast.FunctionDef,ast.Lambda,ast.ClassDef)): continue
                yield o
                yield from walk(o)
        return walk(self.node) if isinstance(self.node, ast.FunctionDef) else ()

    @property
    def has_result(self):
        "Does it return or yield something?"
        def is_result(o):
            if isinstance(o, ast.Return): return o.value is not None
            return isinstance(o, (ast.Yield,ast.YieldFrom))
        return any(map(is_result, self.within))


def is_command(o):
    "Is it a command, whose options have their own help, and whose docstring is the text of `--help`?"
    return o.name.startswith('ltrl_fastai.cli.')


def name_of(arg): return arg.arg if isinstance(arg, ast.arg) else arg.target.id


def of_class(name, cls):
    init = vars(cls).get('__init__')
    yield Public(name, cls, inspect.unwrap(init) if init and not dataclasses.is_dataclass(cls) else None)
    fields = getattr(cls, '__dataclass_fields__', {})
    for k,o in vars(cls).items():
        if k.startswith('_') or k in fastai_names or k in fields: continue
        if any(k in vars(base) for base in cls.__mro__[1:]): continue # documented in the base class
        f = o.fget if isinstance(o, property) else inspect.unwrap(getattr(o, '__func__', o))
        if inspect.isfunction(f) and ours(f): yield Public(f'{name}.{k}', o, f)


def public():
    for m in modules:
        for k in getattr(m, '__all__', []):
            o = getattr(m, k)
            is_function = callable(o) and hasattr(o, '__code__')
            if isinstance(o, type): yield from of_class(f'{m.__name__}.{k}', o)
            elif is_function or hasattr(o, '__wrapped__'): yield Public(f'{m.__name__}.{k}', o, inspect.unwrap(o))
    from fastai.learner import Learner
    for k,o in vars(Learner).items():
        if ours(o) and inspect.isfunction(o): yield Public(f'{o.__module__}.Learner.{k}', o, o)


def assigned(node):
    "Names that a statement assigns"
    return [o.id for t in getattr(node, 'targets', []) for o in ast.walk(t) if isinstance(o, ast.Name)]


def data():
    "Public names that are no functions or classes: module, names, and the comment in or above their line, or `about`"
    for m in modules:
        source = inspect.getsource(m)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type==tokenize.COMMENT}
        for node in ast.parse(source).body:
            names = [o for o in assigned(node) if o in getattr(m, '__all__', ())]
            if not names: continue
            lines = (node.lineno, node.end_lineno, node.lineno-1)
            comment = next((comments[i] for i in lines if i in comments), None)
            yield m,names,comment or getattr(getattr(m, names[0]), 'about', None)


everything = list(public())
