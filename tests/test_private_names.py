"Private names of fastai, PyTorch and torchvision that the package reads: each is known, still there, and honestly missed."
import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest
import torch
from fastai.vision.all import Callback, DataLoader, DataLoaders, Datasets, Learner, TfmdLists, nn
from fastcore.all import Stateful
from ltrl_fastai.reflective import samples

root = Path(__file__).parent.parent/'ltrl_fastai'
remedy = 'Look at the places below and at its new name; until then users need fastai 2.8.x (or the PyTorch that it admits). Read in: '


def private(name): return name.startswith('_') and not (name.startswith('__') and name.endswith('__')) and name != '_'


def read_in(tree):
    "(name, line) of every private name that is read by attribute, by `getattr` or `hasattr`, by import, or as a text of that form"
    for o in ast.walk(tree):
        if isinstance(o, ast.Attribute) and private(o.attr): yield o.attr, o.lineno
        if isinstance(o, ast.Call) and getattr(o.func, 'id', '') in ('getattr', 'hasattr', 'setattr') and len(o.args) > 1:
            if isinstance(o.args[1], ast.Constant) and private(str(o.args[1].value)): yield o.args[1].value, o.lineno
        if isinstance(o, (ast.Import, ast.ImportFrom)):
            words = [*(getattr(o, 'module', None) or '').split('.'), *(w for a in o.names for w in a.name.split('.'))]
            for w in words:
                if private(w) and not getattr(o, 'level', 0): yield w, o.lineno


def made_in(tree):
    "Private names that the package itself defines or sets: they are its own"
    for o in ast.walk(tree):
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)): yield o.name
        if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store): yield o.id
        if isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Store): yield o.attr
        if isinstance(o, ast.Subscript) and isinstance(o.slice, ast.Constant): yield str(o.slice.value)  # of `__dict__`
        if isinstance(o, ast.arg): yield o.arg


def found(folder=root):
    "By name: where it is read"
    trees = {f: ast.parse(f.read_text()) for f in sorted(folder.rglob('*.py')) if f.name != '_modidx.py'}
    own = {k for t in trees.values() for k in made_in(t)}
    res = {}
    for f, tree in trees.items():
        for name, line in read_in(tree):
            if name not in own or name in known: res.setdefault(name, []).append(f'{f.relative_to(folder)}:{line}')
    return res


# By name: what must hold of it, and what it is for


def order_is_kept():
    dl = DataLoader(list(range(10)), bs=4, shuffle=True)
    for _, _ in zip(dl, range(1)): return sorted(dl._DataLoader__idxs) == list(range(10))


def callbacks_are_found():
    dls = DataLoaders(DataLoader([(torch.ones(2), 0)]*4, bs=2))
    cb = Callback()
    learn = Learner(dls, nn.Linear(2, 2), loss_func=nn.CrossEntropyLoss(), cbs=cb)
    return cb in learn._grab_cbs(Callback) and not learn._grab_cbs(types.SimpleNamespace().__class__)


def lists_are_made_anew():
    old = Datasets([1, 2, 3], [[], []]).tls[0]
    new = old._new([4, 5], split_idx=1)
    return isinstance(new, TfmdLists) and list(new.items) == [4, 5] and new.split_idx == 1


def state_is_left_out():
    class Forgets(Callback): _stateattrs = ('large',)
    cb = Forgets()
    cb.large = 1
    return 'large' not in cb.__getstate__() and issubclass(Callback, Stateful)


def layers_are_made():
    from torchvision.models.resnet import BasicBlock, ResNet
    return {'block', 'planes', 'blocks', 'stride'} <= set(inspect.signature(ResNet._make_layer).parameters) and BasicBlock


def order_is_shared():
    from fastai.distributed import DistributedDL
    return list(inspect.signature(DistributedDL._broadcast).parameters) == ['self', 't', 'rank']


def donation_can_be_switched():
    config, inductor, dynamo = (importlib.import_module(o) for o in ('torch._functorch.config', 'torch._inductor.config', 'torch._dynamo'))
    return isinstance(config.donated_buffer, bool) and isinstance(inductor.force_disable_caches, bool) and callable(dynamo.reset)


def compiled_modules_keep_theirs():
    net = nn.Linear(2, 2)
    wrapped = torch.compile(net)
    own = nn.Linear(2, 2)
    before = own._compiled_call_impl
    own.compile()
    return wrapped._orig_mod is net and before is None and own._compiled_call_impl is not None


def norms_have_one_base():
    base = nn.modules.batchnorm._BatchNorm
    return all(issubclass(o, base) for o in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))


def frames_can_be_looked_at():
    frame = __import__('sys')._getframe()
    return frame.f_code is frames_can_be_looked_at.__code__ and hasattr(frame, 'f_back') and hasattr(frame, 'f_locals')


def events_have_a_type():
    return list(inspect.signature(Learner._with_events).parameters)[:3] == ['self', 'f', 'event_type']


def first_look_is_kept():
    data = Datasets([1, 2, 3], [[lambda o: torch.tensor(float(o))], [lambda o: torch.tensor(o)]])
    dl = data.dataloaders(bs=2).train
    new = dl.new()
    return hasattr(new, '_n_inp') and hasattr(new, '_types') and callable(new._one_pass)


def sparse_parts_are_there():
    t = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1., 2.]), (4,))
    return t._indices().tolist() == [[0, 2]] and t._values().tolist() == [1., 2.]


def quantized_tensors_are_made():
    ints, scales, zeros = torch.ones(2, 2, dtype=torch.int8), torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    a, b = torch._make_per_tensor_quantized_tensor(ints, 2., 0), torch._make_per_channel_quantized_tensor(ints, scales, zeros, 0)
    return a.dequantize().eq(2).all().item() and b.dequantize().eq(1).all().item()


known = {
    '_getframe': (frames_can_be_looked_at, 'which call an event belongs to'),
    '_with_events': (events_have_a_type, 'whether an event belongs to a fit'),
    '_n_inp': (first_look_is_kept, 'whether a loader has looked at an item'),
    '_types': (first_look_is_kept, 'whether a loader has looked at an item'),
    '_one_pass': (first_look_is_kept, 'the look of a loader at an item'),
    '_indices': (sparse_parts_are_there, 'sparse tensors in a checkpoint'),
    '_values': (sparse_parts_are_there, 'sparse tensors in a checkpoint'),
    '_make_per_tensor_quantized_tensor': (quantized_tensors_are_made, 'quantized tensors in a checkpoint'),
    '_make_per_channel_quantized_tensor': (quantized_tensors_are_made, 'quantized tensors in a checkpoint'),
    '_DataLoader__idxs': (order_is_kept, 'the order of an epoch'),
    '_grab_cbs': (callbacks_are_found, 'callbacks of a class'),
    '_new': (lists_are_made_anew, 'the same transforms on other items'),
    '_stateattrs': (state_is_left_out, 'what a pickled callback leaves out'),
    '_make_layer': (layers_are_made, 'the layers of a torchvision ResNet'),
    '_broadcast': (order_is_shared, 'the order that ranks share'),
    '_dynamo': (donation_can_be_switched, 'backward twice through a compiled model'),
    '_functorch': (donation_can_be_switched, 'backward twice through a compiled model'),
    '_inductor': (donation_can_be_switched, 'backward twice through a compiled model'),
    '_orig_mod': (compiled_modules_keep_theirs, 'the model inside of a compiled one'),
    '_compiled_call_impl': (compiled_modules_keep_theirs, 'whether a module is compiled'),
    '_BatchNorm': (norms_have_one_base, 'BatchNorm of any kind'),
    '_exit': (lambda: callable(__import__('os')._exit), 'a worker that ends with its parent'),
}


def test_fault_21_every_private_name_is_known():
    new = {k: v for k, v in found().items() if k not in known}
    assert not new, f'private names without a canary: give each a check in `known` of this file. {new}'


@pytest.mark.parametrize('name', known)
def test_fault_21_private_names_are_still_there(name):
    check, what = known[name]
    places = ', '.join(found().get(name, ['nowhere any more']))
    try: fine = check()
    except (AttributeError, ImportError, TypeError) as e: fine, what = False, f'{what} ({e})'
    assert fine, f'{name}: {what} is not to be had from it any more. {remedy}{places}'


def test_fault_21_a_private_name_that_is_new_is_found(tmp_path):
    (tmp_path/'x.py').write_text('import a._b\n_own = 1\ndef f(o): return o._theirs, getattr(o, "_too"), o._own, o.__dict__, _own\n')
    assert set(found(tmp_path)) == {'_b', '_theirs', '_too'}


# What a user reads


def renamed(monkeypatch):
    "A fastai whose loaders keep their order under another name"
    def __iter__(self):
        self.randomize()
        self._order = self.get_idxs()
        yield from self.create_batches(self._order)
    monkeypatch.setattr(DataLoader, '__iter__', __iter__)


def test_fault_21_a_fastai_without_the_name_is_named(monkeypatch):
    renamed(monkeypatch)
    dl = DataLoader(list(range(10)), bs=4)
    with pytest.raises(RuntimeError) as e: samples.epoch_ids(dl)
    said = str(e.value)
    assert 'version of fastai (' in said and 'no longer has `DataLoader.__idxs`' in said and 'epoch_ids' in said
    assert 'use fastai 2.8.x' in said and 'get_idxs' not in said


def test_fault_21_in_a_fit_too(monkeypatch):
    from ltrl_fastai.all import ReflectiveLearning
    dls = DataLoaders(*[DataLoader([(torch.randn(3), i % 2) for i in range(12)], bs=4) for _ in range(2)])
    learn = Learner(dls, nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss(), cbs=ReflectiveLearning(kc=False))
    monkeypatch.setattr(samples, 'epoch_ids', lambda dl: samples._no_order(dl))
    monkeypatch.setattr(DataLoader, '__iter__', lambda self: DataLoader.create_batches(self, self.get_idxs()))
    with learn.no_bar(), learn.no_logging(), pytest.raises(RuntimeError, match='Nothing is wrong with your loaders'): learn.fit(1)


def test_fault_21_a_loader_that_is_iterated_in_its_own_way_is_blamed_itself():
    class Own(DataLoader):
        def __iter__(self): return self.create_batches(range(10))
    with pytest.raises(ValueError, match='`Own` does not keep the order that it draws'): samples.epoch_ids(Own(list(range(10)), bs=4))


def test_fault_21_an_order_that_is_read_once_is_still_said_to_be_that():
    dl = DataLoader(list(range(10)), bs=4, get_idxs=lambda: iter(range(10)))
    next(iter(dl))
    with pytest.raises(ValueError, match='get_idxs` gave a range_iterator'): samples.epoch_ids(dl)
