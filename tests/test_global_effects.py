"Importing the package changes nothing of PyTorch, fastai or the process for good."
import gc
import json
import subprocess
import sys
from contextlib import suppress

import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from ltrl_fastai.all import ReflectiveLearning, WithIds, allow_cpu_ranks
from ltrl_fastai.experiments.training import RunSettings, train_run

program = '''
import json, os, random, signal, sys, warnings
import numpy as np, torch, matplotlib
from fastai.vision.all import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.callback.all import *
import fastai.distributed
import torch._dynamo, torch._functorch.config, torch._inductor.config, torch.distributed, torch.multiprocessing
import torchvision, torchvision.models, torchvision.transforms.v2, sklearn.datasets, scipy.stats, PIL.Image, pandas, rich.console, rich.live, rich.table, filelock
from torch.utils.data._utils.collate import default_collate_fn_map

def classes():
    "Every attribute of every class of fastai, fastcore and PyTorch that is loaded now"
    res = {}
    for name, m in list(sys.modules.items()):
        if name.split('.')[0] not in ('fastai', 'fastcore', 'fasttransform', 'torchvision') and name not in ('torch.nn', 'torch.utils.data', 'torch.optim'): continue
        for k, v in list(vars(m).items()):
            if not k.startswith('__'): res[f'{name}.{k}'] = id(v)
            if isinstance(v, type):
                for a, o in list(vars(v).items()):
                    if a not in ('__doc__', '__abstractmethods__', '_abc_impl', '__annotations__', '__annotate__'): res[f'{v.__module__}.{v.__qualname__}.{a}'] = id(o)
    return res

def state():
    return dict(collate=sorted(map(repr, default_collate_fn_map)), dtype=str(torch.get_default_dtype()), threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(), deterministic=torch.are_deterministic_algorithms_enabled(),
        cudnn=[torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark], torch_random=torch.get_rng_state().sum().item(),
        python_random=hash(random.getstate()), numpy_random=int(np.random.get_state()[1].sum()), sharing=torch.multiprocessing.get_sharing_strategy(),
        start=torch.multiprocessing.get_start_method(allow_none=True), inductor=torch._inductor.config.force_disable_caches,
        donated=torch._functorch.config.donated_buffer, filters=len(warnings.filters), backend=matplotlib.rcParams['backend'],
        style=hash(str({k: v for k, v in matplotlib.rcParams.items() if k != 'backend'})), environ=sorted(os.environ), interrupt=repr(signal.getsignal(signal.SIGINT)),
        hook=repr(sys.excepthook), defaults=repr(vars(defaults)), threads_of_fastai=repr(defaults.cpus), recursion=sys.getrecursionlimit())

keep = [o for m in list(sys.modules.values()) for o in list(getattr(m, '__dict__', {}).values())]  # no id is given away
before, were = state(), classes()
import ltrl_fastai.all, ltrl_fastai.experiments.cli, ltrl_fastai.experiments.runner, ltrl_fastai.experiments.summary, ltrl_fastai.experiments.bench
import ltrl_fastai.experiments.progress, ltrl_fastai.data.catalogue
after, are = state(), classes()
print(json.dumps(dict(changed={k: [v, after[k]] for k, v in before.items() if after[k] != v}, replaced=[k for k, v in were.items() if are.get(k) != v])))
'''


def test_an_import_changes_nothing():
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout.splitlines()[-1]) == dict(changed={}, replaced=[])


def test_ids_survive_collation_in_the_main_process_and_in_workers():
    "Without an entry of our own in PyTorch's table of collate functions"
    ds = WithIds([(torch.tensor([float(i)]), i % 2) for i in range(10)])
    for workers in (0, 2):
        for dl in (torch.utils.data.DataLoader(ds, batch_size=4, num_workers=workers), DataLoader(ds, bs=4, num_workers=workers)):
            ids = [b[-1] for b in dl]
            assert [i for o in ids for i in o.tolist()] == list(range(10)) and ids[0].dtype == torch.int64
            assert ids[0].to('meta').on_host.tolist() == [0, 1, 2, 3]


def test_a_run_puts_back_what_it_sets():
    "Threads, flags of cuDNN, and the switch for deterministic algorithms"
    def flags(): return (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.get_num_threads(),
                         torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    try:
        before = flags()
        train_run(RunSettings(epochs=1, n_max=20, reflective={}), bar=False)
        assert flags() == before
        assert ReflectiveLearning() and flags() == before
    finally: torch.backends.cudnn.benchmark = False


def test_ranks_on_cpus_are_allowed_for_a_while():
    "fastai's loader is as it was after a `with` statement, also after an error; a call alone holds for good"
    from fastai.distributed import DistributedDL
    its_own = DistributedDL._broadcast
    with allow_cpu_ranks():
        assert DistributedDL._broadcast is not its_own
        with allow_cpu_ranks(): pass
        assert DistributedDL._broadcast is not its_own
    assert DistributedDL._broadcast is its_own
    with suppress(InterruptedError), allow_cpu_ranks(): raise InterruptedError
    assert DistributedDL._broadcast is its_own
    try:
        allow_cpu_ranks()
        gc.collect()
        assert DistributedDL._broadcast is not its_own
    finally: DistributedDL._broadcast = its_own


class Crash(Callback):
    def after_step(self): raise InterruptedError('as of a crash')


class Looks(Callback):
    "What PyTorch's compiler is told, within a fit"
    def before_fit(self): self.seen = set()
    def after_step(self): self.seen.add(compiler_settings())


def compiler_settings():
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    return functorch.donated_buffer, inductor.force_disable_caches


def test_a_fit_of_a_compiled_model_puts_back_what_it_tells_the_compiler():
    "Buffers are kept and caches off during a fit alone; a second fit trains as an uncompiled model does"
    before = compiler_settings()
    assert before == (True, False)
    learners = {}
    for backend in (None, 'aot_eager'):
        learn = learners[backend] = small_learner([ReflectiveLearning(preset='v0.0.1', kc=True), Looks()])
        if backend: learn.model = torch.compile(learn.model, backend=backend)
        for _ in range(2):
            with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
            assert compiler_settings() == before
            assert learn.looks.seen == {(False, True) if backend else before}
    plain, compiled = [list(o.model.parameters()) for o in learners.values()]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    with suppress(InterruptedError), learn.no_bar(), learn.no_logging(): learn.fit(1, .05, cbs=Crash())
    assert compiler_settings() == before


def small_learner(cbs):
    torch.manual_seed(0)
    ds = [(torch.randn(6), i % 3) for i in range(48)]
    dls = DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=16), device='cpu')
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=cbs)
