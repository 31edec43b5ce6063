"Importing the package has no lasting effect on PyTorch, fastai or the process."
import gc
import json
import subprocess
import sys
from contextlib import suppress

import torch
import pytest
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from ltrl_fastai.all import ReflectiveLearning, WithIds, allow_cpu_ranks
from ltrl_fastai.experiments.training import RunSettings, train_run

program = '''
import json
import os
import random
import signal
import sys
import warnings
import matplotlib
import numpy as np
import torch
from fastai.vision.all import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.callback.all import *
import fastai.distributed
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.distributed
import torch.multiprocessing
import filelock, pandas, PIL.Image, rich.console, rich.live, rich.table, scipy.stats, sklearn.datasets
import torchvision, torchvision.models, torchvision.transforms.v2
from torch.utils.data._utils.collate import default_collate_fn_map

packages = ('fastai', 'fastcore', 'fasttransform', 'torchvision')
torch_modules = ('torch.nn', 'torch.utils.data', 'torch.optim')
ignored = ('__doc__', '__abstractmethods__', '_abc_impl', '__annotations__', '__annotate__')

def attributes():
    "Ids of all attributes of the loaded modules of fastai and PyTorch, and of their classes"
    res = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] not in packages and name not in torch_modules: continue
        for k, v in list(vars(module).items()):
            if not k.startswith('__'): res[f'{name}.{k}'] = id(v)
            if not isinstance(v, type): continue
            for a, o in list(vars(v).items()):
                if a not in ignored: res[f'{v.__module__}.{v.__qualname__}.{a}'] = id(o)
    return res

def state():
    return dict(
        collate=sorted(map(repr, default_collate_fn_map)),
        dtype=str(torch.get_default_dtype()),
        threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        cudnn=[torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
        torch_random=torch.get_rng_state().sum().item(),
        python_random=hash(random.getstate()),
        numpy_random=int(np.random.get_state()[1].sum()),
        sharing=torch.multiprocessing.get_sharing_strategy(),
        start=torch.multiprocessing.get_start_method(allow_none=True),
        inductor=torch._inductor.config.force_disable_caches,
        donated=torch._functorch.config.donated_buffer,
        filters=len(warnings.filters),
        backend=matplotlib.rcParams['backend'],
        style=hash(str({k: v for k, v in matplotlib.rcParams.items() if k != 'backend'})),
        environ=sorted(os.environ),
        interrupt=repr(signal.getsignal(signal.SIGINT)),
        hook=repr(sys.excepthook),
        defaults=repr(vars(defaults)),
        threads_of_fastai=repr(defaults.cpus),
        recursion=sys.getrecursionlimit())

# keep all objects alive, so that no id is used again
alive = [o for module in list(sys.modules.values()) for o in list(getattr(module, '__dict__', {}).values())]
state_before, attributes_before = state(), attributes()
import ltrl_fastai.all
import ltrl_fastai.data.catalogue
import ltrl_fastai.experiments.bench
import ltrl_fastai.cli.main
import ltrl_fastai.experiments.progress
import ltrl_fastai.experiments.runner
import ltrl_fastai.experiments.summary
state_after, attributes_after = state(), attributes()
print(json.dumps(dict(
    changed={k: [v, state_after[k]] for k, v in state_before.items() if state_after[k] != v},
    replaced=[k for k, v in attributes_before.items() if attributes_after.get(k) != v])))
'''


@pytest.mark.slow
def test_an_import_changes_nothing():
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout.splitlines()[-1]) == dict(changed={}, replaced=[])


def test_ids_survive_collation_in_the_main_process_and_in_workers():
    "Without an entry in PyTorch's table of collate functions"
    ds = WithIds([(torch.tensor([float(i)]), i % 2) for i in range(10)])
    for workers in (0, 2):
        loaders = (torch.utils.data.DataLoader(ds, batch_size=4, num_workers=workers),
                   DataLoader(ds, bs=4, num_workers=workers))
        for dl in loaders:
            ids = [batch[-1] for batch in dl]
            assert torch.cat(ids).tolist() == list(range(10))
            assert ids[0].dtype == torch.int64
            assert ids[0].to('meta').on_host.tolist() == [0, 1, 2, 3]


def torch_settings():
    cudnn = torch.backends.cudnn
    return dict(deterministic=cudnn.deterministic, benchmark=cudnn.benchmark, threads=torch.get_num_threads(),
                algorithms=torch.are_deterministic_algorithms_enabled(), grad=torch.is_grad_enabled(),
                dtype=torch.get_default_dtype())


def test_a_run_restores_the_settings_of_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    before = torch_settings()
    train_run(RunSettings(epochs=1, n_max=20, reflective={}), bar=False)
    assert torch_settings() == before
    ReflectiveLearning()
    assert torch_settings() == before


def test_ranks_on_cpus_are_allowed_in_a_with_statement(monkeypatch):
    "The patch of fastai's loader is undone at its end, also after an error; after a plain call it stays"
    from fastai.distributed import DistributedDL
    original = DistributedDL._broadcast
    monkeypatch.setattr(DistributedDL, '_broadcast', original)  # restored after the test
    with allow_cpu_ranks():
        assert DistributedDL._broadcast is not original
        with allow_cpu_ranks(): pass
        assert DistributedDL._broadcast is not original
    assert DistributedDL._broadcast is original
    with suppress(InterruptedError), allow_cpu_ranks(): raise InterruptedError
    assert DistributedDL._broadcast is original
    allow_cpu_ranks()
    gc.collect()
    assert DistributedDL._broadcast is not original


class Crash(Callback):
    def after_step(self): raise InterruptedError('a crash')


class RecordsCompilerSettings(Callback):
    "Keep the compiler settings during a fit"
    def before_fit(self): self.settings = set()
    def after_step(self): self.settings.add(compiler_settings())


def compiler_settings():
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    return functorch.donated_buffer, inductor.force_disable_caches


def test_a_fit_of_a_compiled_model_restores_the_compiler_settings():
    "Buffers are kept and caches are off only during a fit; a second fit trains as an uncompiled model does"
    before = compiler_settings()
    assert before == (True, False)
    learners = {}
    for backend in (None, 'aot_eager'):
        cbs = [ReflectiveLearning(preset='v0.0.1', kc=True), RecordsCompilerSettings()]
        learn = learners[backend] = small_learner(cbs)
        if backend: learn.model = torch.compile(learn.model, backend=backend)
        for _ in range(2):
            with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
            assert compiler_settings() == before
            assert learn.records_compiler_settings.settings == {(False, True) if backend else before}
    uncompiled, compiled = [list(o.model.parameters()) for o in learners.values()]
    torch.testing.assert_close(compiled, uncompiled, rtol=1e-5, atol=1e-6)
    with suppress(InterruptedError), learn.no_bar(), learn.no_logging(): learn.fit(1, .05, cbs=Crash())
    assert compiler_settings() == before


def small_learner(cbs):
    torch.manual_seed(0)
    ds = [(torch.randn(6), i % 3) for i in range(48)]
    dls = DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=16), device='cpu')
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=cbs)
