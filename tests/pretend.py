"""A device that is not there, to see without a GPU whether code would run on one, and where it would wait for it.

Its tensors say that they are elsewhere. What is done with them is computed on the CPU, to the bit. But who mixes them with tensors of the host gets an error, as from a GPU,
and what makes the host wait for a device is counted: taking values to the host, results whose size depends on values, and sending without `non_blocking`. Into pinned memory
values can be taken without waiting; there is rubbish, until an event has been asked for a few times.

The name `lazy` is one that PyTorch knows and does nothing with.
"""
import sys
from collections import Counter

import torch
from fastai.vision.all import default_device
from ltrl_fastai.reflective import stores
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
there = torch.device('lazy', 0)
waits = Counter()
on_their_way = []  # to pinned memory: tensors there, and their values
sized_by_values = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
                   aten.bincount.default, aten.repeat_interleave.Tensor}
reads_values = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.allclose.default, aten.multinomial.default,
                aten.linalg_inv_ex.default, aten.linalg_cholesky_ex.default}
indexing = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
takes_scalars = {*indexing, aten.where.self, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor}  # of the host
plain_as_subclass = torch.Tensor.as_subclass


def is_there(device): return device is not None and torch.device(device).type == there.type


class There(torch.Tensor):
    "A tensor of that device; `here` is what it holds"
    @staticmethod
    def __new__(cls, here):
        res = torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=there)
        res.here = here
        return res
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})
    def __repr__(self): return f'There({self.here!r})'
    def tolist(self):
        waits['tolist'] += 1
        return self.here.tolist()
    def numpy(self, *args): raise TypeError(f"can't convert {there} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    def __array__(self, *args): return self.numpy()
    def __reduce_ex__(self, protocol): return self.here.__reduce_ex__(protocol)
    def set_meta(self, x, as_copy=False): self.__dict__ = {**getattr(x, '__dict__', {}), 'here': self.here}  # fastai's


def here(o): return o.here if isinstance(o, There) else o


def run(func, args, kwargs):
    "What PyTorch is about to do: on the CPU, if a device could"
    tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
    theirs, ours = [o for o in tensors if isinstance(o, There)], [o for o in tensors if not isinstance(o, There)]
    device = kwargs.get('device')
    to_there = bool(theirs) if device is None else is_there(device)
    if func in (aten._to_copy.default, aten.copy_.default):
        source, to_there = (args[0], to_there) if func is aten._to_copy.default else (args[1], isinstance(args[0], There))
        non_blocking = kwargs.get('non_blocking') or len(args) > 2 and args[2]
        free = non_blocking and (hasattr(source, 'pinned') or source.nbytes <= 2**14)  # what is small is sent at once; more of it from pinned memory only
        if not to_there and isinstance(source, There) and non_blocking and hasattr(args[0], 'pinned'):
            on_their_way.append((args[0], source.here.clone()))
            return args[0].fill_(-77)
        if to_there != isinstance(source, There) and not (to_there and free): waits['sent' if to_there else 'fetched'] += 1
    elif theirs:
        others = [o for o in ours if o.dim()]
        scalars = len(others) < len(ours)
        wrong = [others and func not in indexing, scalars and torch.Tag.pointwise not in func.tags and func not in takes_scalars,
                 (func in indexing or func._schema.is_mutable) and not isinstance(args[0], There), func in indexing and len(args) > 2 and any(args[2] is o for o in others)]
        if any(wrong): raise RuntimeError(f'{func}: Expected all tensors to be on the same device, but found at least two devices, {there} and cpu!')
        masks = func in indexing and any(o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1])
        if func in sized_by_values | reads_values or masks or others: waits[str(func)] += 1
    there_by_id = {id(o.here): o for o in theirs}  # of what is changed in place
    args, kwargs = tree_map(here, (args, {**kwargs, **({} if device is None else dict(device='cpu'))}))
    pin = kwargs.pop('pin_memory', False)
    res = func(*args, **kwargs)
    if pin: res.pinned = True
    def sent(o): return o if not isinstance(o, torch.Tensor) else there_by_id[id(o)] if id(o) in there_by_id else There(o)
    return tree_map(sent, res) if to_there else res


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    "What is made of Python's numbers does not come by `Dispatch`"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            res = args[0].clone()
            res.pinned = True
            return res
        if func is torch.Tensor.new_tensor and isinstance(args[0], There): return torch.tensor(args[1], **{'dtype': args[0].dtype, 'device': there, **kwargs})
        if func not in (torch.tensor, torch.as_tensor) or not is_there(kwargs.get('device')) or isinstance(args[0], There): return func(*args, **kwargs)
        return func(*args, **{**kwargs, 'device': 'cpu'}).to(there)


class Event:
    "Of a stream: what was on its way then has come when events have been asked four times since, or when it is waited for"
    asked = 0
    def __init__(self): self.copies, self.due = on_their_way[:], Event.asked+4
    def query(self):
        Event.asked += 1
        if Event.asked >= self.due: self._come()
        return Event.asked >= self.due
    def synchronize(self):
        waits['synchronize'] += 1
        self.due = 0
        self._come()
    def _come(self):
        for to, values in self.copies: to.copy_(values)
        on_their_way[:] = [o for o in on_their_way if not any(o is c for c in self.copies)]
        self.copies = []


class Stream:
    def record_event(self): return Event()


kinds = {}


def as_subclass(self, cls):
    "Of a tensor, be it there or here; one with a gradient stays what it is"
    if issubclass(cls, There): cls = next((o for o in cls.__mro__ if not issubclass(o, There)), torch.Tensor)
    if not isinstance(self, There): return plain_as_subclass(self, cls)
    if isinstance(self, cls) or self.requires_grad: return self
    if cls not in kinds: kinds[cls] = type(f'There{cls.__name__}', (There, cls), dict(__new__=There.__new__, __torch_function__=There.__torch_function__))
    res = kinds[cls](self.here)
    res.__dict__.update({k: v for k, v in vars(self).items() if k != 'here'})
    return res


class PretendDevice:
    "A context in which fastai's default device is the one that is not there; gives the counts of waiting"
    def __enter__(self):
        waits.clear()
        on_their_way.clear()
        autocast, load = torch.autocast, torch.load
        self.old = [(o, k, getattr(o, k)) for o, k in ((torch.Tensor, 'as_subclass'), (torch, 'autocast'), (torch, 'load'), (torch.cuda, 'current_stream'), (stores, '_pins'))]
        self.old += [(o, 'default_device', default_device) for o in list(sys.modules.values()) if getattr(o, '__dict__', {}).get('default_device') is default_device]
        torch.Tensor.as_subclass = as_subclass
        torch.autocast = lambda device_type, *args, **kwargs: autocast('cpu' if device_type == there.type else device_type, *args, **kwargs)
        def sent(o): return o.to(there) if isinstance(o, torch.Tensor) else o
        torch.load = lambda f, map_location=None, **kwargs: tree_map(sent, load(f, 'cpu', **kwargs)) if is_there(map_location) else load(f, map_location, **kwargs)
        torch.cuda.current_stream, stores._pins = lambda device: Stream(), is_there
        for o, k, _ in self.old[5:]: setattr(o, k, lambda *args: there)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the object that an optimizer knows
        self.modes = Dispatch(), Functions()
        for o in self.modes: o.__enter__()
        return waits
    def __exit__(self, *exc):
        for o in reversed(self.modes): o.__exit__(*exc)
        for o, k, v in self.old: setattr(o, k, v)
        torch.__future__.set_swap_module_params_on_conversion(False)
