"""A simulated device, to test without a GPU whether code would run on one, and where it would wait for it.

Its tensors claim to be on another device, but are computed on the CPU, bit by bit the same. Mixing them with tensors
of the host raises an error, as on a GPU.
Everything that makes the host wait for the device is counted: copying values to the host, results whose size depends
on values, and sending without `non_blocking`.
Copying to pinned memory needs no waiting; the memory contains garbage until an event has been queried a few times.

PyTorch knows a device type `lazy`, but does not use it.
"""
import sys
from collections import Counter

import torch
from fastai.vision.all import default_device
from ltrl_fastai.reflective import stores
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
there = torch.device('lazy', 0)
waits = Counter()
pending = []  # copies to pinned memory: target tensors, and their values
sized_by_values = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.bincount.default, aten.repeat_interleave.Tensor}
reads_values = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.allclose.default,
    aten.multinomial.default, aten.linalg_inv_ex.default, aten.linalg_cholesky_ex.default}
indexing = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
takes_host_scalars = {
    *indexing, aten.where.self, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor,
    aten.fill_.Tensor}
torch_as_subclass = torch.Tensor.as_subclass


def is_there(device): return device is not None and torch.device(device).type == there.type


class There(torch.Tensor):
    "A tensor of the simulated device; `here` is the tensor on the CPU with its values"
    @staticmethod
    def __new__(cls, here):
        res = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=there)
        res.here = here
        return res
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})
    def __repr__(self): return f'There({self.here!r})'
    def tolist(self):
        waits['tolist'] += 1
        return self.here.tolist()
    def numpy(self, *args):
        raise TypeError(f"can't convert {there} device type tensor to numpy. "
                        "Use Tensor.cpu() to copy the tensor to host memory first.")
    def __array__(self, *args): return self.numpy()
    def __reduce_ex__(self, protocol): return self.here.__reduce_ex__(protocol)
    def set_meta(self, x, as_copy=False):  # a method of fastai's tensors
        self.__dict__ = {**getattr(x, '__dict__', {}), 'here': self.here}


def here(o): return o.here if isinstance(o, There) else o


def tensors_in(args):
    "Tensors among arguments, also within lists; PyTorch's `tree_leaves` takes as long as many of the operations"
    for o in args:
        if isinstance(o, torch.Tensor): yield o
        elif isinstance(o, (list, tuple)): yield from tensors_in(o)


def mapped(f, o):
    "`f` of arguments or of a result, which are in lists and tuples"
    return type(o)(mapped(f, item) for item in o) if isinstance(o, (list, tuple)) else f(o)


def is_copy(func): return func in (aten._to_copy.default, aten.copy_.default)


def count_copy(func, args, kwargs, to_there):
    "Count a copy that waits; returns True for one to pinned memory, which is only begun"
    source = args[0] if func is aten._to_copy.default else args[1]
    from_there = isinstance(source, There)
    non_blocking = kwargs.get('non_blocking') or (len(args) > 2 and args[2])
    if from_there and not to_there and non_blocking and hasattr(args[0], 'pinned'):
        pending.append((args[0], source.here.clone()))
        return True
    # small tensors are sent at once, larger ones without waiting only from pinned memory
    is_free = to_there and non_blocking and (hasattr(source, 'pinned') or source.nbytes <= 2**14)
    if to_there != from_there and not is_free: waits['sent' if to_there else 'fetched'] += 1
    return False


def check_devices(func, args, on_host):
    "Refuse tensors of the host where a GPU would, and count a wait if values are needed"
    arrays = [o for o in on_host if o.dim()]
    has_scalars = len(arrays) < len(on_host)
    is_indexing = func in indexing
    wrong = [
        arrays and not is_indexing,
        has_scalars and torch.Tag.pointwise not in func.tags and func not in takes_host_scalars,
        (is_indexing or func._schema.is_mutable) and not isinstance(args[0], There),
        is_indexing and len(args) > 2 and any(args[2] is o for o in arrays)]
    if any(wrong): raise RuntimeError(
        f'{func}: Expected all tensors to be on the same device, but found at least two devices, {there} and cpu!')
    has_masks = is_indexing and any(o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1])
    if func in sized_by_values | reads_values or has_masks or arrays: waits[str(func)] += 1


def run(func, args, kwargs):
    "Run an operation of PyTorch on the CPU, if it would be possible on a device"
    tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
    on_device = [o for o in tensors if isinstance(o, There)]
    on_host = [o for o in tensors if not isinstance(o, There)]
    device = kwargs.get('device')
    if func is aten.copy_.default: to_there = isinstance(args[0], There)
    else: to_there = bool(on_device) if device is None else is_there(device)
    if is_copy(func):
        if count_copy(func, args, kwargs, to_there): return args[0].fill_(-77)
    elif on_device: check_devices(func, args, on_host)
    there_by_id = {id(o.here): o for o in on_device}  # for results that are arguments changed in place
    if device is not None: kwargs = {**kwargs, 'device': 'cpu'}
    args, kwargs = mapped(here, args), {k: mapped(here, o) for k, o in kwargs.items()}
    pin = kwargs.pop('pin_memory', False)
    res = func(*args, **kwargs)
    if pin: res.pinned = True
    def sent(o):
        if not isinstance(o, torch.Tensor): return o
        return there_by_id[id(o)] if id(o) in there_by_id else There(o)
    return mapped(sent, res) if to_there else res


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    "Functions that make tensors of Python's numbers, which do not reach `Dispatch`"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            res = args[0].clone()
            res.pinned = True
            return res
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], **{'dtype': args[0].dtype, 'device': there, **kwargs})
        makes_tensor = func in (torch.tensor, torch.as_tensor) and is_there(kwargs.get('device'))
        if not makes_tensor or isinstance(args[0], There): return func(*args, **kwargs)
        return func(*args, **{**kwargs, 'device': 'cpu'}).to(there)


class Event:
    "An event of a stream: copies pending then are complete after four more queries of any event, or on `synchronize`"
    n_queries = 0
    def __init__(self):
        self.copies = pending[:]
        self.due = Event.n_queries+4
    def query(self):
        Event.n_queries += 1
        if Event.n_queries >= self.due: self._complete()
        return Event.n_queries >= self.due
    def synchronize(self):
        waits['synchronize'] += 1
        self.due = 0
        self._complete()
    def _complete(self):
        for to, values in self.copies: to.copy_(values)
        pending[:] = [o for o in pending if not any(o is c for c in self.copies)]
        self.copies = []


class Stream:
    def record_event(self): return Event()


subclasses = {}  # of `There`, by class


def as_subclass(self, cls):
    "`Tensor.as_subclass` for tensors of the host and of the simulated device; one with a gradient is returned as it is"
    if issubclass(cls, There): cls = next((o for o in cls.__mro__ if not issubclass(o, There)), torch.Tensor)
    if not isinstance(self, There): return torch_as_subclass(self, cls)
    if isinstance(self, cls) or self.requires_grad: return self
    if cls not in subclasses:
        methods = dict(__new__=There.__new__, __torch_function__=There.__torch_function__)
        subclasses[cls] = type(f'There{cls.__name__}', (There, cls), methods)
    res = subclasses[cls](self.here)
    res.__dict__.update({k: v for k, v in vars(self).items() if k != 'here'})
    return res


class PretendDevice:
    "A context in which fastai's default device is the simulated one; yields the number of waits by operation"
    def __enter__(self):
        waits.clear()
        pending.clear()
        self.old = []
        self._replace(torch.Tensor, 'as_subclass', as_subclass)
        self._replace(torch, 'autocast', self._autocast(torch.autocast))
        self._replace(torch, 'load', self._load(torch.load))
        self._replace(torch.cuda, 'current_stream', lambda device: Stream())
        self._replace(stores, '_uses_pinned_memory', is_there)
        original = default_device  # this module's name is replaced too
        for o in list(sys.modules.values()):
            if getattr(o, '__dict__', {}).get('default_device') is original:
                self._replace(o, 'default_device', lambda *args: there)
        # a parameter stays the object that an optimizer knows
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.modes = Dispatch(), Functions()
        for o in self.modes: o.__enter__()
        return waits
    def __exit__(self, *exc):
        for o in reversed(self.modes): o.__exit__(*exc)
        for o, k, v in self.old: setattr(o, k, v)
        torch.__future__.set_swap_module_params_on_conversion(False)
    def _replace(self, o, k, v):
        self.old.append((o, k, getattr(o, k)))
        setattr(o, k, v)
    @staticmethod
    def _autocast(autocast):
        def _inner(device_type, *args, **kwargs):
            return autocast('cpu' if device_type == there.type else device_type, *args, **kwargs)
        return _inner
    @staticmethod
    def _load(load):
        def sent(o): return o.to(there) if isinstance(o, torch.Tensor) else o
        def _inner(f, map_location=None, **kwargs):
            if not is_there(map_location): return load(f, map_location, **kwargs)
            return tree_map(sent, load(f, 'cpu', **kwargs))
        return _inner
