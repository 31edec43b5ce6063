"Private names of fastai, PyTorch and torchvision that the package reads: all are known and still exist."
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
remedy = ('Find its new name and change the places below; until then users need fastai 2.8.x (or the PyTorch that it '
          'admits). Read in: ')


def is_private(name):
    is_dunder = name.startswith('__') and name.endswith('__')
    return name.startswith('_') and name != '_' and not is_dunder


def names_in(node):
    "Names that a node reads by attribute, by `getattr` or the like, or by import"
    if isinstance(node, ast.Attribute): yield node.attr
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('getattr', 'hasattr', 'setattr'):
        if len(node.args) > 1 and isinstance(node.args[1], ast.Constant): yield str(node.args[1].value)
    if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, 'level', 0):
        yield from (getattr(node, 'module', None) or '').split('.')
        for alias in node.names: yield from alias.name.split('.')


def read_in(tree):
    "Each private name that is read, and its line"
    for node in ast.walk(tree):
        for name in names_in(node):
            if is_private(name): yield name, node.lineno


def defined_in(tree):
    "Names that the package itself defines or sets"
    for o in ast.walk(tree):
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)): yield o.name
        if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store): yield o.id
        if isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Store): yield o.attr
        if isinstance(o, ast.Subscript) and isinstance(o.slice, ast.Constant): yield str(o.slice.value)  # of `__dict__`
        if isinstance(o, ast.arg): yield o.arg


def private_names(folder=root):
    "The places that read a private name of another package, by name"
    trees = {f: ast.parse(f.read_text()) for f in sorted(folder.rglob('*.py')) if f.name != '_modidx.py'}
    own = {name for tree in trees.values() for name in defined_in(tree)}
    res = {}
    for f, tree in trees.items():
        for name, line in read_in(tree):
            if name not in own or name in known: res.setdefault(name, []).append(f'{f.relative_to(folder)}:{line}')
    return res


# Checks that a name still has the meaning that the package relies on


def order_is_kept():
    dl = DataLoader(list(range(10)), bs=4, shuffle=True)
    next(iter(dl))
    return sorted(dl._DataLoader__idxs) == list(range(10))


def callbacks_are_found():
    dls = DataLoaders(DataLoader([(torch.ones(2), 0)]*4, bs=2))
    cb = Callback()
    learn = Learner(dls, nn.Linear(2, 2), loss_func=nn.CrossEntropyLoss(), cbs=cb)
    return cb in learn._grab_cbs(Callback) and not learn._grab_cbs(types.SimpleNamespace().__class__)


def lists_are_copied_with_other_items():
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
    parameters = inspect.signature(ResNet._make_layer).parameters
    return {'block', 'planes', 'blocks', 'stride'} <= set(parameters) and BasicBlock


def order_is_shared():
    from fastai.distributed import DistributedDL
    return list(inspect.signature(DistributedDL._broadcast).parameters) == ['self', 't', 'rank']


def donation_can_be_switched():
    functorch = importlib.import_module('torch._functorch.config')
    inductor = importlib.import_module('torch._inductor.config')
    dynamo = importlib.import_module('torch._dynamo')
    settings = (functorch.donated_buffer, inductor.force_disable_caches)
    return all(isinstance(o, bool) for o in settings) and callable(dynamo.reset)


def compiled_modules_keep_the_original():
    net = nn.Linear(2, 2)
    wrapped = torch.compile(net)
    own = nn.Linear(2, 2)
    before = own._compiled_call_impl
    own.compile()
    return wrapped._orig_mod is net and before is None and own._compiled_call_impl is not None


def norms_have_one_base():
    base = nn.modules.batchnorm._BatchNorm
    return all(issubclass(o, base) for o in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))


def frames_can_be_inspected():
    frame = __import__('sys')._getframe()
    return frame.f_code is frames_can_be_inspected.__code__ and hasattr(frame, 'f_back') and hasattr(frame, 'f_locals')


def events_have_a_type():
    return list(inspect.signature(Learner._with_events).parameters)[:3] == ['self', 'f', 'event_type']


def inspection_of_an_item_is_kept():
    data = Datasets([1, 2, 3], [[lambda o: torch.tensor(float(o))], [lambda o: torch.tensor(o)]])
    dl = data.dataloaders(bs=2).train
    new = dl.new()
    return hasattr(new, '_n_inp') and hasattr(new, '_types') and callable(new._one_pass)


def sparse_parts_are_there():
    t = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1., 2.]), (4,))
    return t._indices().tolist() == [[0, 2]] and t._values().tolist() == [1., 2.]


def quantized_tensors_are_made():
    ints = torch.ones(2, 2, dtype=torch.int8)
    scales, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    by_tensor = torch._make_per_tensor_quantized_tensor(ints, 2., 0)
    by_channel = torch._make_per_channel_quantized_tensor(ints, scales, zeros, 0)
    return by_tensor.dequantize().eq(2).all().item() and by_channel.dequantize().eq(1).all().item()


def writing_to_a_tensor_is_counted():
    t = torch.zeros(2)
    before = t._version
    t.add_(1)
    return t._version > before


known = {  # a check of each name, and its purpose
    '_version': (writing_to_a_tensor_is_counted, 'whether the items of a data set were changed in place'),
    '_getframe': (frames_can_be_inspected, 'which call an event belongs to'),
    '_with_events': (events_have_a_type, 'whether an event belongs to a fit'),
    '_n_inp': (inspection_of_an_item_is_kept, 'whether a loader has inspected an item'),
    '_types': (inspection_of_an_item_is_kept, 'whether a loader has inspected an item'),
    '_one_pass': (inspection_of_an_item_is_kept, 'how a loader inspects an item'),
    '_indices': (sparse_parts_are_there, 'sparse tensors in a checkpoint'),
    '_values': (sparse_parts_are_there, 'sparse tensors in a checkpoint'),
    '_make_per_tensor_quantized_tensor': (quantized_tensors_are_made, 'quantized tensors in a checkpoint'),
    '_make_per_channel_quantized_tensor': (quantized_tensors_are_made, 'quantized tensors in a checkpoint'),
    '_DataLoader__idxs': (order_is_kept, 'the order of an epoch'),
    '_grab_cbs': (callbacks_are_found, 'callbacks of a class'),
    '_new': (lists_are_copied_with_other_items, 'the same transforms on other items'),
    '_stateattrs': (state_is_left_out, 'what a pickled callback leaves out'),
    '_make_layer': (layers_are_made, 'the layers of a torchvision ResNet'),
    '_broadcast': (order_is_shared, 'the order that ranks share'),
    '_dynamo': (donation_can_be_switched, 'backward twice through a compiled model'),
    '_functorch': (donation_can_be_switched, 'backward twice through a compiled model'),
    '_inductor': (donation_can_be_switched, 'backward twice through a compiled model'),
    '_orig_mod': (compiled_modules_keep_the_original, 'the model inside of a compiled one'),
    '_compiled_call_impl': (compiled_modules_keep_the_original, 'whether a module is compiled'),
    '_BatchNorm': (norms_have_one_base, 'BatchNorm of any kind'),
    '_exit': (lambda: callable(__import__('os')._exit), 'a worker that ends with its parent'),
}


def test_fault_21_every_private_name_is_known():
    new = {k: v for k, v in private_names().items() if k not in known}
    assert not new, f'private names without a check: add one to `known` in this file. {new}'


@pytest.mark.slow
@pytest.mark.parametrize('name', known)
def test_fault_21_private_names_still_exist(name):
    check, purpose = known[name]
    places = ', '.join(private_names().get(name, ['nowhere any more']))
    try: works = check()
    except (AttributeError, ImportError, TypeError) as e:
        works = False
        purpose = f'{purpose} ({e})'
    assert works, f'{name} no longer gives {purpose}. {remedy}{places}'


def test_fault_21_new_private_names_are_found(tmp_path):
    code = 'import a._b\n_own = 1\ndef f(o): return o._theirs, getattr(o, "_too"), o._own, o.__dict__, _own\n'
    (tmp_path/'x.py').write_text(code)
    assert set(private_names(tmp_path)) == {'_b', '_theirs', '_too'}


# Error messages


def rename_order(monkeypatch):
    "Let fastai's loaders keep their order under another name"
    def __iter__(self):
        self.randomize()
        self._order = self.get_idxs()
        yield from self.create_batches(self._order)
    monkeypatch.setattr(DataLoader, '__iter__', __iter__)


def test_fault_21_a_fastai_without_the_name_is_reported(monkeypatch):
    rename_order(monkeypatch)
    dl = DataLoader(list(range(10)), bs=4)
    with pytest.raises(RuntimeError) as e: samples.epoch_ids(dl)
    message = str(e.value)
    for text in ('version of fastai (', 'no longer has `DataLoader.__idxs`', 'epoch_ids', 'use fastai 2.8.x'):
        assert text in message
    assert 'get_idxs' not in message


def test_fault_21_a_fit_reports_it_too(monkeypatch):
    from ltrl_fastai.all import ReflectiveLearning
    dls = DataLoaders(*[DataLoader([(torch.randn(3), i % 2) for i in range(12)], bs=4) for _ in range(2)])
    learn = Learner(dls, nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss(), cbs=ReflectiveLearning(kc=False))
    monkeypatch.setattr(samples, 'epoch_ids', samples._no_order)
    monkeypatch.setattr(DataLoader, '__iter__', lambda self: DataLoader.create_batches(self, self.get_idxs()))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(RuntimeError, match='Nothing is wrong with your loaders'): learn.fit(1)


def test_fault_21_a_loader_with_its_own_iteration_is_named():
    class Own(DataLoader):
        def __iter__(self): return self.create_batches(range(10))
    dl = Own(list(range(10)), bs=4)
    with pytest.raises(ValueError, match='`Own` does not keep the order that it draws'): samples.epoch_ids(dl)


def test_fault_21_an_order_that_can_be_read_only_once_is_named():
    dl = DataLoader(list(range(10)), bs=4, get_idxs=lambda: iter(range(10)))
    next(iter(dl))
    with pytest.raises(ValueError, match='get_idxs` gave a range_iterator'): samples.epoch_ids(dl)
