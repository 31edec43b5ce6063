"Faults of the benchmarks' settings, by number: each test holds the right value."
import dataclasses
import inspect
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastai.vision.all import (SGD, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MixUp, first, nn,
                               params, set_seed)
from ltrl_fastai.data.fast import BatchAug, cutout
from ltrl_fastai.evaluation.metrics import shot_groups
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.plan import Variant, hash_of, make_plan
from ltrl_fastai.experiments.recipes import matching, published_settings, recipe, recipes
from ltrl_fastai.experiments.summary import slides_row
from ltrl_fastai.experiments.training import RunSettings, schedules, train_run
from ltrl_fastai.methods.balancing import BinaryBalancedLoss, WeightDecay
from ltrl_fastai.methods.catalogue import methods
from ltrl_fastai.methods.experts import expert_net
from ltrl_fastai.methods.heads import ClassAwareSampling
from ltrl_fastai.methods.nets import CosineHead, create_net
from ltrl_fastai.methods.optimizer import benchmark_sgd
from typer.testing import CliRunner

small = dict(epochs=1, n_max=20)


def opt_of(settings):
    "The optimizer that a run trains by, and its net"
    learn = settings.learner()
    learn.create_opt()
    return learn.opt, learn.model


def decayed(opt, model, steps=1000, lr=.1, wd=5e-4):
    "What is left of each parameter, begun at 1, after steps whose gradient is zero"
    opt.set_hypers(lr=lr, wd=wd)
    with torch.no_grad():
        for p in params(model): p.fill_(1.)
    for _ in range(steps):
        for p in params(model): p.grad = torch.zeros_like(p)
        opt.step()
    return {name: p.detach().mean().item() for name, p in model.named_parameters() if p.requires_grad}


def test_fault_15_decay_of_a_thousand_steps():
    "lr .1, wd 5e-4, 1,000 steps without gradient from p=1, momentum 0.9: 0.608, and not 0.951"
    opt, model = opt_of(RunSettings(**small))
    left = decayed(opt, model)
    assert left['fc.weight'] == pytest.approx(.608, abs=1e-3)
    assert set(round(v, 3) for v in left.values()) == {.608}  # biases and batch normalisation too


def net_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def steps_of(make, n=200, lrs=(.1,)):
    "Parameters after steps on random data, at learning rates that change in turn"
    net, gen = net_of(), torch.Generator().manual_seed(1)
    opt = make(net)
    for i in range(n):
        lr = lrs[i*len(lrs)//n]
        if hasattr(opt, 'set_hyper'): opt.set_hyper('lr', lr)
        else: opt.param_groups[0]['lr'] = lr
        x, y = torch.randn(32, 5, generator=gen), torch.randint(0, 3, (32,), generator=gen)
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize('nesterov', (False, True))
@pytest.mark.parametrize('wd', (0., 5e-4, 1e-2))
def test_fault_15_steps_are_those_of_pytorch(nesterov, wd):
    def ours(net): return benchmark_sgd(list(net.parameters()), lr=.1, wd=wd, nesterov=nesterov)
    def theirs(net):
        return torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=wd, nesterov=nesterov)
    ours, theirs = (steps_of(make, lrs=(.1, .01, .001)) for make in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_fault_15_nesterov_where_the_authors_have_it():
    without = set('ce-drw cb-drs vs los gcl mixup ldam ldam-drw lade paco crt lws tau-norm ncm oltr mislas '
                  'weight-balancing bcl proco glmc lift'.split())
    assert {o for o in methods if not RunSettings(method=o).nesterov} == without
    for name in ('bsce', 'ldam-drw'):
        opt, model = opt_of(RunSettings(method=name, **small))
        p = next(iter(params(model)))
        with torch.no_grad(): p.zero_()
        opt.set_hypers(lr=1., wd=0.)
        for q in params(model): q.grad = torch.ones_like(q)
        opt.step()
        assert p.mean().item() == pytest.approx(-1. if name == 'ldam-drw' else -1.9)


def test_fault_15_recipes_and_their_runs():
    for o in recipes.values():
        s = o.settings()
        assert (s.decouple_wd, s.wd_bn_bias, s.nesterov) == (False, True, o.nesterov), o.name
    assert recipes['table1/RIDE/100'].nesterov and not recipes['table6/LDAM'].nesterov


@pytest.mark.parametrize('method', ('ride', 'crt', 'paco'))
def test_fault_15_every_parameter_of_every_net(method):
    "Variant: experts, a stage to come, a momentum encoder; only what has a gradient decays, and all of that alike"
    opt, model = opt_of(RunSettings(method=method, **small))
    left = decayed(opt, model)
    assert all(v == pytest.approx(.608, abs=2e-3) for v in left.values()), left


def test_fault_15_a_second_stage():
    "Variant: the stage after the first fit makes another optimizer, of the same kind"
    settings, seen = RunSettings(method='crt', **small), []

    class Look(Callback):
        def before_fit(self): seen.append([o.__name__ for o in self.opt.cbs])
    train_run(settings, bar=False, cbs=Look(), test=False)
    assert seen[0] == seen[-1] == ['l2_reg', 'average_grad', 'momentum_step'] and len(seen) >= 2


def test_fault_15_old_results_can_be_made_again():
    "Variant: fastai's decoupled decay by name, step for step as before"
    old = RunSettings(decouple_wd=True, wd_bn_bias=False, nesterov=False, epochs=2, n_max=20)
    opt, model = opt_of(old)
    left = decayed(opt, model)
    assert left['fc.weight'] == pytest.approx(.951, abs=1e-3) and left['fc.bias'] == 1.
    as_before = Learner(old.dls(), net_of(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), wd=5e-4)
    as_before.create_opt()
    assert [o.__name__ for o in as_before.opt.cbs] == [o.__name__ for o in opt.cbs]
    assert opt.hypers[0]['mom'] == as_before.opt.hypers[0]['mom']
    assert opt.hypers[0]['wd'] == 5e-4
    res, _ = train_run(old, bar=False)
    assert res['settings']['decouple_wd'] is True and res['settings']['nesterov'] is False
    ways = [Variant(''), Variant('', settings=dict(decouple_wd=True))]
    plan = make_plan(['bsce'], ways, [0])
    assert len({hash_of(o.identity) for o in plan}) == 2  # a run of the old decay is another run
    with pytest.raises(ValueError, match='decouple_wd: expected true or false'): RunSettings(decouple_wd=1)


class Stop(Callback):
    def after_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


@pytest.mark.parametrize('method', ('bsce', 'ldam-drw'))
def test_fault_15_a_stopped_run_goes_on(method, tmp_path):
    settings = RunSettings(method=method, epochs=4, n_max=20)
    whole, _ = train_run(settings, bar=False)
    Stop.order = 300  # behind Checkpoint
    with pytest.raises(KeyboardInterrupt): train_run(settings, bar=False, checkpoint=tmp_path/'fit', cbs=Stop())
    again, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit')
    assert again['history'] == whole['history'] and again['accuracy'] == whole['accuracy']


def test_fault_15_in_a_learner_of_your_own():
    "Variant: groups of parameters with their own rates, as discriminative learning rates make them"
    set_seed(0)
    ds = [(torch.randn(5), i % 3) for i in range(64)]
    dls = DataLoaders(*[DataLoader(ds, bs=16)]*2, device='cpu')
    learn = Learner(dls, net_of(), loss_func=CrossEntropyLossFlat(), opt_func=benchmark_sgd, wd=.01, wd_bn_bias=True,
                    splitter=lambda m: [params(m[:2]), params(m[2:])])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(.01, .1))
    assert [h['lr'] for h in learn.opt.hypers] == [pytest.approx(.01), pytest.approx(.1)]
    with pytest.raises(ValueError, match='needs a momentum above 0'): benchmark_sgd(params(net_of()), lr=.1, mom=0.)
    no_nesterov = partial(benchmark_sgd, nesterov=False)
    learn = Learner(dls, net_of(), opt_func=no_nesterov, loss_func=CrossEntropyLossFlat())
    learn.create_opt()
    assert learn.opt.hypers[0]['wd'] == 0. and 'wd' in inspect.signature(benchmark_sgd).parameters


def test_fault_25_constants_of_a_method():
    "A run's settings reach the loss and the stages; a constant that a method lacks is refused before training"
    counts = [100, 10, 1]
    def of(name, **args): return RunSettings(method=name, method_args=args).create_method()
    assert of('sade', tau=1.).loss(counts).tau == 1. and of('sade').loss(counts).tau == 2.
    ride = of('ride', diversity=.2, spread=.02).loss(counts)
    assert ride.diversity == .2 and ride.temperature.max() == 1. and of('ride').loss(counts).diversity == .45
    lade = of('lade', lam=.5, alpha=.05).loss(counts).func
    assert (lade.lam, lade.alpha) == (.5, .05)
    stage, = of('mislas', head=.3, tail=0., factor=.05).later_stages
    assert stage.lr(.1) == pytest.approx(.005) and stage.prepare.keywords == dict(head=.3, tail=0., own=False)
    mistakes = [('sade', dict(tua=1.), "Did you mean 'tau'"), ('softmax', dict(tau=1.), 'none that can be changed')]
    for name, args, said in mistakes:
        with pytest.raises(ValueError, match=said): RunSettings(method=name, method_args=args)
    with pytest.raises(ValueError, match='method_args: expected names and values'):
        RunSettings(method='sade', method_args=3)
    constants = dict(head=.3, tail=0., factor=.05, mixup=.2)
    res, _ = train_run(RunSettings(method='mislas', method_args=constants, **small), bar=False, test=False)
    assert res['settings']['method_args']['factor'] == .05


class Rates(Callback):
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])


@pytest.mark.parametrize('schedule,at', [
    ('thirds', {.1: 1., .5: .1, .9: .01}),
    ('steps-60-80', {.4: 1., .7: .1, .9: .01}),
    ('steps-hundredth', {.5: 1., .85: .01, .95: 1e-4}),
    ('steps-60-80-hundredth', {.5: 1., .7: .01, .9: 1e-4}),
])
def test_fault_25_schedules_and_a_slower_body(schedule, at):
    rates = Rates()
    settings = RunSettings(method='ride', epochs=20, n_max=20, schedule=schedule, lr=.01, body_lr=.001)
    train_run(settings, bar=False, cbs=rates, test=False)
    for share, factor in at.items():
        body, head = rates.seen[int(share*len(rates.seen))]
        assert head == pytest.approx(.01*factor, rel=1e-5) and body == pytest.approx(.1*head), share


# What each table's rows take from the authors' code: typed from their configuration files, which the chapter
# "Where the recipes differ from the authors' code" names
of_authors = {
    # CIFAR-100-LT
    'table1/Softmax/100': dict(net='resnet32', schedule='steps', epochs=200, lr=.1, bs=128, wd=5e-4, nesterov=True),
    'table1/BSCE+RL/10': dict(schedule='steps', epochs=200, lr=.1, bs=128, wd=5e-4, nesterov=True, method_args=None),
    'table1/SADE/50': dict(schedule='steps', epochs=200, lr=.1, bs=128, wd=5e-4, nesterov=True, method_args=None),
    'table1/RIDE/100': dict(schedule='steps-hundredth', wd=5e-4, lr=.1, method_args=dict(diversity=.45)),
    'table6/RIDE+RL': dict(schedule='steps-hundredth', wd=5e-4, method_args=dict(diversity=.45)),
    'table6/LDAM': dict(schedule='steps-hundredth', wd=2e-4, lr=.1, nesterov=False),
    'table1/BBN/50': dict(schedule='steps-60-80-hundredth', wd=2e-4, nesterov=True),
    'table7/Mixup/CIFAR100-LT': dict(schedule='steps', wd=2e-4, nesterov=False),
    'table7/MiSLAS/CIFAR100-LT': dict(schedule='steps', wd=2e-4, lr=.1, bs=128, method_args=dict(own=True)),
    'table1/MDCS+RandAugment/100': dict(bs=64, schedule='steps-50-80-95', epochs=400, lr=.1, wd=5e-4, nesterov=True),
    'table1/PaCo+RL+RandAugment/10': dict(
        lr=.05, schedule='steps-warm-10', epochs=400, bs=128, wd=5e-4, nesterov=False, method_args=None
    ),
    'table1/SADE+RandAugment/100': dict(schedule='steps-50-80-90', epochs=400, lr=.1, bs=128),
    'table7/WD+Max/CIFAR100-LT': dict(
        net='resnet34-3x3', schedule='cosine', epochs=320, lr=.01, bs=64, wd=5e-3, method_args=dict(published=True)
    ),
    # ImageNet-LT
    'table2/Softmax': dict(
        net='resnext50_32x4d', schedule='cosine', epochs=180, lr=.025, bs=64, wd=5e-4, nesterov=True
    ),
    'table2/BSCE+RL': dict(schedule='cosine', epochs=180, lr=.025, bs=64, wd=5e-4),
    'table2/SADE': dict(schedule='cosine', epochs=180, lr=.025, bs=64, wd=5e-4, method_args=None),
    'table2/SADE+RL+RandAugment': dict(schedule='cosine', epochs=400, lr=.025, bs=64, wd=5e-4),
    'table8/SADE+KR/ImageNet-LT': dict(lr=.025, bs=64),
    'table2/RIDE': dict(
        schedule='steps-60-80', epochs=100, lr=.1, bs=256, wd=2e-4, method_args=dict(diversity=.2, spread=.02)
    ),
    'table5/RIDE/ResNet-50': dict(
        net='resnet50', schedule='steps-60-80', epochs=100, wd=2e-4, method_args=dict(diversity=.2, spread=.02)
    ),
    'table2/LADE': dict(
        schedule='cosine',
        epochs=180,
        lr=.05,
        bs=256,
        wd=5e-4,
        nesterov=False,
        method_args=dict(alpha=.1, lam=.1, of='logit'),
    ),
    'table7/MiSLAS/ImageNet-LT': dict(
        net='resnet50',
        schedule='cosine',
        epochs=180,
        lr=.1,
        bs=256,
        wd=5e-4,
        nesterov=False,
        method_args=dict(head=.3, tail=.0, factor=.05, mixup=.2, own=True),
    ),
    'table7/Mixup/ImageNet-LT': dict(net='resnet50', method_args=dict(mixup=.2)),
    'table2/PaCo+RandAugment': dict(
        lr=.02,
        bs=128,
        epochs=400,
        schedule='warm-cosine',
        wd=5e-4,
        method_args=dict(alpha=.05, temperature=.07, dims=128, size=8192),
    ),
    'table2/PaCo+RL': dict(lr=.02, bs=128, epochs=180, schedule='warm-cosine'),
    'table2/MDCS+RL+RandAugment': dict(schedule='cosine', epochs=400, lr=.1, bs=256, wd=5e-4),
    'table2/Decouple-LWS': dict(schedule='cosine', epochs=90, lr=.2, bs=512, wd=5e-4, nesterov=False),
    'table5/cRT/ResNet-50': dict(schedule='cosine', epochs=90, lr=.2, bs=512, wd=5e-4),
    'table5/LWS+RL/ResNeXt-50': dict(schedule='cosine', epochs=90, lr=.2, bs=512),
    'table5/tau-norm/ResNeXt-50': dict(schedule='cosine', epochs=90, lr=.2, bs=512),
    'table5/Softmax/ResNeXt-50': dict(schedule='cosine', epochs=90, lr=.2, bs=512, nesterov=False),
    # Places-LT
    'table3/Softmax': dict(
        net='resnet152', pretrained=True, schedule='thirds', epochs=30, lr=.01, body_lr=.001, bs=128, wd=4e-4
    ),
    'table3/BLS+RL': dict(schedule='thirds', epochs=30, lr=.01, body_lr=.001, bs=128, wd=4e-4, nesterov=True),
    'table3/SADE': dict(schedule='thirds', lr=.01, body_lr=.001, wd=4e-4, method_args=dict(tau=1.)),
    'table3/RIDE': dict(schedule='thirds', lr=.01, body_lr=.001, wd=4e-4, method_args=dict(diversity=.2)),
    'table3/LADE+RL': dict(
        schedule='thirds',
        lr=.1,
        body_lr=.001,
        wd=5e-4,
        bs=128,
        nesterov=False,
        method_args=dict(alpha=.1, lam=.1, of='logit'),
    ),
    'table3/PaCo+RandAugment': dict(
        lr=.02,
        body_lr=None,
        wd=5e-4,
        bs=128,
        schedule='warm-cosine',
        method_args=dict(alpha=.05, temperature=.2, dims=128, size=8192),
    ),
    # iNaturalist 2018
    'table4/Softmax': dict(net='resnet50', schedule='steps-60-80', epochs=100, lr=.2, bs=512, wd=2e-4, nesterov=True),
    'table4/BLS+RL': dict(schedule='steps-60-80', epochs=100, lr=.2, bs=512, wd=2e-4),
    'table4/SADE': dict(schedule='steps-60-80', epochs=100, lr=.2, bs=512, wd=2e-4, method_args=dict(tau=1.)),
    'table8/SADE+KR+KS/iNaturalist2018': dict(epochs=100, method_args=dict(tau=1.)),
    'table4/SADE+RL+RandAugment': dict(
        schedule='steps-60-80-90', epochs=400, lr=.2, bs=512, method_args=dict(tau=1.)
    ),
    'table4/RIDE+RL': dict(
        schedule='steps-60-80', epochs=100, lr=.2, bs=512, wd=2e-4, method_args=dict(diversity=.2, spread=.015)
    ),
    'table4/LADE': dict(
        schedule='cosine', epochs=200, lr=.1, bs=256, wd=1e-4, method_args=dict(alpha=.05, lam=.5, of='logit')
    ),
    'table4/MiSLAS': dict(
        schedule='cosine',
        epochs=200,
        lr=.1,
        bs=256,
        wd=1e-4,
        method_args=dict(head=.3, tail=.0, factor=.05, mixup=.2, own=True),
    ),
    'table4/NCL+RandAugment': dict(
        schedule='cosine', epochs=400, lr=.2, bs=64, wd=2e-4, method_args=dict(cosine=True, scale=32., hard=2442)
    ),
    'table4/PaCo+RL+RandAugment': dict(
        schedule='warm-cosine',
        epochs=400,
        lr=.02,
        bs=128,
        wd=1e-4,
        method_args=dict(alpha=.05, temperature=.2, dims=128, size=8192),
    ),
    'table7/Decouple/iNaturalist2018': dict(
        schedule='cosine', epochs=90, lr=.2, bs=512, wd=1e-4, method_args=dict(stage_epochs=30)
    ),
}


@pytest.mark.parametrize('name', of_authors)
def test_fault_25_recipes_take_the_authors_values(name):
    settings = recipe(name).settings()
    assert {k: getattr(settings, k) for k in of_authors[name]} == of_authors[name]
    assert {k: getattr(recipe(name), k) for k in of_authors[name]} == of_authors[name]


def test_fault_25_constants_reach_what_is_built():
    "Not only the settings: the loss, the net and the stages of the method that a recipe trains"
    counts = torch.linspace(100, 2, 40).long()
    def of(name): return recipe(name).settings().create_method()
    def net(): return create_net('resnet8', 40)
    def loss(name): return of(name).loss(counts)
    for name in ('table3/SADE', 'table3/SADE+RL', 'table4/SADE', 'table4/SADE+RL+RandAugment'):
        assert loss(name).tau == 1.
    for name in ('table1/SADE/100', 'table2/SADE', 'table2/SADE+RL+RandAugment'):
        assert loss(name).tau == 2.
    n = counts.float()
    for name, diversity, spread in (
        ('table1/RIDE/100', .45, .05),
        ('table2/RIDE+RL', .2, .02),
        ('table5/RIDE/Swin-T', .2, .02),
        ('table3/RIDE', .2, .05),
        ('table4/RIDE', .2, .015),
    ):
        t = spread * 40 * n / n.sum() + 1 - spread
        assert loss(name).diversity == diversity
        torch.testing.assert_close(loss(name).temperature, t / t.max())
    for name, alpha, lam in (('table2/LADE', .1, .1), ('table3/LADE', .1, .1), ('table4/LADE+RL', .05, .5)):
        lade = loss(name).func
        assert (lade.alpha, lade.lam, lade.of) == (alpha, lam, 'logit')
    for name, alpha, temperature, dims, size in (
        ('table1/PaCo+RandAugment/100', .01, .05, 32, 1024),
        ('table2/PaCo', .05, .07, 128, 8192),
        ('table3/PaCo+RandAugment', .05, .2, 128, 8192),
        ('table4/PaCo+RandAugment', .05, .2, 128, 8192),
    ):
        assert (loss(name).alpha, loss(name).temperature) == (alpha, temperature)
        assert of(name).net(net(), counts).queue.shape == (size, dims)
    ncl = of('table4/NCL+RL+RandAugment')
    assert {o.scale for o in ncl.net(net(), counts).heads.heads} == {32.} and ncl.loss(counts).n_hard == 2442


def mixing(method):
    "The parameter of MixUp's Beta distribution"
    (mixup,) = [o for o in method.cbs([9, 1]) if isinstance(o, MixUp)]
    return mixup.distrib.concentration1.item(), mixup.distrib.concentration0.item()


def test_fault_25_constants_reach_the_stages():
    def of(name): return recipe(name).settings().create_method()
    for name, head, tail, rate in (
        ('table7/MiSLAS/CIFAR100-LT', .4, .1, .02),
        ('table7/MiSLAS+RL/ImageNet-LT', .3, .0, .005),
        ('table4/MiSLAS', .3, .0, .005),
    ):
        (stage,) = of(name).later_stages
        learn = SimpleNamespace(model=net_of(), opt=object())
        stage.prepare(learn, [100, 10, 1])
        loss = learn.loss_func
        assert (loss.eps.max().item(), loss.eps.min().item()) == (pytest.approx(head), pytest.approx(tail)) and loss.own
        assert stage.lr(.1) == pytest.approx(rate)
    assert mixing(of('table7/MiSLAS/CIFAR100-LT')) == (1., 1.)
    for name in (
        'table7/MiSLAS/ImageNet-LT',
        'table7/Mixup/ImageNet-LT',
        'table4/MiSLAS',
        'table7/Mixup/iNaturalist2018',
    ):
        assert mixing(of(name)) == (pytest.approx(.2),) * 2
    (stage,) = of('table7/WD+Max+RL/CIFAR100-LT').later_stages
    learn = SimpleNamespace(model=net_of(), opt=object())
    stage.prepare(learn, [100, 10, 1])
    assert isinstance(learn.loss_func, BinaryBalancedLoss)
    assert [o.in_gradient for o in stage.cbs([100, 10, 1]) if isinstance(o, WeightDecay)] == [True]
    for name, epochs in (
        ('table7/Decouple/iNaturalist2018', 30),
        ('table5/cRT/ResNet-50', 10),
        ('table6/cRT', 10),
        ('table2/Decouple-LWS', 5),
    ):
        (stage,) = of(name).later_stages
        assert (stage.epochs, stage.lr) == (epochs, .2), name


def test_fault_25_methods_without_a_row():
    "What authors give for stages that no table has, and for data that none of a method's rows are on"
    def made(method, dataset): return RunSettings(**published_settings(method, dataset)).create_method()
    counts = torch.linspace(100, 2, 40).long()
    for dataset, top in (('cifar100-lt', 30), ('imagenet-lt', 50), ('inaturalist18', 50)):
        (stage,) = made('ride-assigned', dataset).later_stages
        learn = SimpleNamespace(model=expert_net(create_net('resnet8', 40), 3), opt=object())
        stage.prepare(learn, counts)
        assert {o.top for o in learn.model.gates} == {top}
        assert [o.bs for o in stage.cbs(counts) if isinstance(o, ClassAwareSampling)] == [512]
        assert (stage.lr, stage.epochs) == (.01, 5)
        assert made('ride-assigned', dataset).loss(counts).diversity == (.45 if dataset == 'cifar100-lt' else .2)
    for dataset, lr in (('cifar100-lt', .1), ('imagenet-lt', .025), ('places-lt', .01), ('inaturalist18', .2)):
        (stage,) = made('sade-aggregated', dataset).later_stages
        assert inspect.signature(stage.adapt).parameters['lr'].default == lr
        assert made('sade-aggregated', dataset).loss(counts).tau == (
            1. if dataset in ('places-lt', 'inaturalist18') else 2.
        )
    ncl = made('ncl', 'imagenet-lt')
    assert {o.scale for o in ncl.net(create_net('resnet8', 40), counts).heads.heads} == {16.} and ncl.loss(
        torch.arange(1, 1001)
    ).n_hard == 300
    ncl = made('ncl', 'places-lt')
    assert {type(o) for o in ncl.net(create_net('resnet8', 40), counts).heads.heads} == {CosineHead} and ncl.loss(
        torch.arange(1, 366)
    ).n_hard == 122
    assert made('ncl', 'cifar100-lt').loss(torch.arange(1, 101)).n_hard == 30
    assert made('ride-distilled', 'imagenet-lt').loss(counts).diversity == .2
    with pytest.raises(ValueError, match="dataset: got 'imagenet'.*Did you mean 'imagenet-lt'"):
        published_settings('ride', 'imagenet')
    with pytest.raises(ValueError, match='Did you mean .ride'):
        published_settings('rdie', 'imagenet-lt')


def test_fault_25_stages_train_with_their_constants():
    "The rate of the aggregation reaches its optimizer, and the rate of the second stage its fit"
    rates = Rates()
    train_run(
        RunSettings(method='crt', method_args=dict(stage_lr=.07, stage_epochs=1), **small),
        bar=False,
        cbs=rates,
        test=False,
    )
    assert max(o[0] for o in rates.seen[len(rates.seen) // 2 :]) == pytest.approx(.07)
    res, _ = train_run(RunSettings(method='sade-aggregated', method_args=dict(aggregation_lr=1e-9), **small), bar=False)
    assert res['settings']['method_args'] == dict(aggregation_lr=1e-9)
    for name, args in (
        ('ride-assigned', dict(top=5, gate_bs=4)),
        ('weight-balancing', dict(published=True)),
        ('ride-distilled', dict(published=True)),
        ('lws', dict(stage_lr=.1, stage_epochs=1)),
        ('mislas', dict(own=True)),
    ):
        res, _ = train_run(RunSettings(method=name, method_args=args, **small), bar=False, test=False)
        assert res['settings']['method_args'] == args
    with pytest.raises(ValueError, match="crt has no 'stage_lrs'.*Did you mean 'stage_lr'"):
        RunSettings(method='crt', method_args=dict(stage_lrs=.1))


def test_fault_25_a_resnet_for_small_images():
    "Weight balancing's net: torchvision's ResNet-34, its first layer 3x3 without stride, and no pooling behind it"
    net = create_net('resnet34-3x3', 100)
    sizes = []
    hook = net.layer1.register_forward_hook(lambda m, x, y: sizes.append(tuple(y.shape)))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 100) and sizes == [(2, 64, 32, 32)]
    hook.remove()
    assert sum(p.numel() for p in net.parameters()) == sum(
        p.numel() for p in create_net('resnet34', 100).parameters()
    ) - 64 * 3 * (49 - 9)
    with pytest.raises(ValueError, match='expected a CIFAR ResNet'):
        create_net('swin_t-3x3', 10)


def test_fault_29_autoaugment_and_cutout():
    "What LTRL's loader does with CIFAR unless told otherwise: a recipe beside each row of its code, and a note"
    for name, other in (
        ('table1/BSCE+RL/100', 'table1/BSCE+RL+AutoAugment/100'),
        ('table1/SADE/10', 'table1/SADE+AutoAugment/10'),
        ('table6/RIDE+RL', 'table6/RIDE+RL+AutoAugment'),
        ('table6/Softmax', 'table6/Softmax+AutoAugment'),
    ):
        row, strong = recipe(name), recipe(other)
        assert (row.policy, row.cut) == (None, None) and (strong.policy, strong.cut) == ('autoaugment', 16)
        differs = {k for k in (o.name for o in dataclasses.fields(row)) if getattr(row, k) != getattr(strong, k)}
        assert differs == {'name', 'policy', 'cut', 'notes'}
        assert any(other in o and 'Cutout' in o for o in row.notes) and any(
            name in o and 'Cutout' in o for o in strong.notes
        )
    ours = {
        o.name
        for o in recipes.values()
        if o.dataset == 'cifar100-lt'
        and o.table in ('table1', 'table6', 'table7')
        and o.policy is None
        and o.method in ('softmax', 'bsce', 'ride', 'sade')
    }
    beside = {o.name.replace('+AutoAugment', '') for o in recipes.values() if o.policy == 'autoaugment'}
    assert ours == beside and len(ours) == 3 * 8 + 6
    assert not any('Cutout' in n for o in recipes.values() if o.dataset != 'cifar100-lt' for n in o.notes)


def test_fault_29_batches_are_augmented_so():
    "A square of 16 pixels is cut out of training images, a policy is drawn, and validation images stay as they are"
    strong = recipe('table1/BSCE+AutoAugment/100').settings(
        dataset='digits-lt', net='resnet8', imbalance_factor=20., keep_train=False
    )
    dls = strong.dls()
    done = [o.f for o in dls.train.after_batch.fs if isinstance(o, BatchAug)]
    assert [o.keywords.get('size') for o in done if o.func is cutout] == [16]
    (policy,) = [o.keywords['tfm'] for o in done if 'tfm' in o.keywords]
    assert type(policy).__name__ == 'AutoAugment' and policy.policy.name == 'CIFAR10'
    plain = (
        recipe('table1/BSCE/100')
        .settings(dataset='digits-lt', net='resnet8', imbalance_factor=20., keep_train=False)
        .dls()
    )
    assert not any(o.f.func is cutout for o in plain.train.after_batch.fs if isinstance(o, BatchAug))
    assert torch.equal(first(dls.valid)[0], first(plain.valid)[0])


def test_fault_25_schedules_of_the_authors():
    "PaCo warms up for 10 epochs on CIFAR, MDCS for 20: the rate of their first epochs"
    for schedule, warm, steps in (('steps-warm-10', 10, (.8, .9)), ('steps-50-80-95', 20, (.5, .8, .95))):
        kept = []
        learn = SimpleNamespace(fit=lambda epochs, cbs, kept=kept: kept.extend(cbs))
        schedules[schedule](learn, 400, 1., [])
        rate = kept[0].scheds['lr']
        assert rate(warm / 2 / 400) == pytest.approx(.5) and rate(warm / 400 + 1e-6) == 1.
        assert [rate(o + 1e-6) for o in steps] == [pytest.approx(.1 ** (i + 1)) for i in range(len(steps))]


digits = dict(dataset='digits-lt', net='resnet8', imbalance_factor=20., pretrained=False, keep_train=False)


def kinds():
    "A recipe for each way to train: what decides it, data, net and Reflective Learning aside"
    decides = 'method method_args schedule body_lr nesterov policy cut'.split()
    return {str([getattr(o, k) for k in decides]): o for o in recipes.values()}.values()


@pytest.mark.parametrize('name', [o.name for o in kinds()])
def test_fault_25_variants_every_way_to_train_is_trained(name):
    "On digits, with ten classes where constants were chosen for thousands; all stages"
    settings = recipe(name).settings(**digits, epochs=1, n_max=20, bs=16)
    res, _ = train_run(settings, bar=False, test=False)
    assert res['settings']['method_args'] == recipe(name).method_args
    assert all(torch.tensor([o for o in res['history']['train_loss'] if o is not None]).isfinite())
    assert len(res.get('stages', ())) == len(settings.create_method().later_stages)


class StopIn(Callback):
    "Ends the run after two epochs of a stage, from 0"
    order = 300  # behind Checkpoint
    def __init__(self, stage): self.stage = stage
    def after_epoch(self):
        if self.epoch == 1 and getattr(self.learn, 'stage_begun', 0) == self.stage: raise KeyboardInterrupt


@pytest.mark.parametrize('name', ['table3/SADE+RL', 'table7/WD+Max/CIFAR100-LT', 'table7/MiSLAS/ImageNet-LT'])
def test_fault_25_variants_a_stopped_run_goes_on(name, tmp_path):
    "With a slower body and constants; in the second stage too"
    settings = recipe(name).settings(**digits, epochs=3, n_max=20, bs=16)
    whole, _ = train_run(settings, bar=False)
    for stage in range(1+len(settings.create_method().later_stages)):
        kept = dict(bar=False, checkpoint=tmp_path/str(stage)/'fit')
        with pytest.raises(KeyboardInterrupt): train_run(settings, cbs=StopIn(stage), **kept)
        again, _ = train_run(settings, **kept)
        assert again['history'] == whole['history'] and again['accuracy'] == whole['accuracy']
        assert again.get('stages') == whole.get('stages')


def test_fault_25_variants_settings_of_a_result():
    "What a result keeps makes the same run again, and constants tell runs apart"
    settings = recipe('table4/RIDE').settings(**digits, epochs=1, n_max=20, bs=16)
    res, _ = train_run(settings, bar=False)
    again = RunSettings(**json.loads(json.dumps(res['settings'])))
    assert again == settings and again.create_method().loss([9, 4, 1]).diversity == .2
    changes = (None, dict(spread=.02), dict(spread=.015), dict(diversity=.2))
    plans = [make_plan(['ride'], [Variant('', settings=dict(method_args=o))], [0]) for o in changes]
    assert len({hash_of(o.identity) for plan in plans for o in plan}) == len(changes)


def test_fault_25_variants_nobody_changes_a_recipe():
    "Settings are copies, of recipes as of what is published"
    def of_recipe(): return recipe('table3/SADE').settings().method_args
    def as_published(): return published_settings('sade', 'places-lt')['method_args']
    for make in (of_recipe, as_published):
        make()['tau'] = 9.
        assert make() == dict(tau=1.) and recipe('table3/SADE').method_args == dict(tau=1.)
    shared = published_settings('mislas', 'imagenet-lt')
    shared['method_args']['head'] = .9
    assert published_settings('mislas', 'inaturalist18')['method_args']['head'] == .3


def test_fault_25_variants_on_the_command_line(tmp_path, monkeypatch):
    "Constants and the body's rate are the recipe's, and can be set; one that there is not is refused before training"
    monkeypatch.chdir(tmp_path)
    small_data = dict(dataset='digits-lt', net='resnet8', imbalance_factor=20, pretrained='false')
    sets = [o for k, v in small_data.items() for o in ('--set', f'{k}={v}')]
    def call(*args): return CliRunner().invoke(app, ['run', 'table3/SADE', *sets, '--budget', '.04', *args])
    changes = ('--set', 'body_lr=null', '--set', 'method_args={"tau": 1.5}')
    for args, body_lr, constants in (((), .001, {'tau': 1.}), (changes, None, {'tau': 1.5})):
        said = call('--out', f'a{len(args)}', *args)
        assert said.exit_code == 0, said.output
        assert 'a tenth after each third from 0.01 (the body at 0.001)' in ' '.join(said.output.split())
        res = json.loads((tmp_path/f'a{len(args)}/result.json').read_text())
        assert (res['settings']['body_lr'], res['settings']['method_args']) == (body_lr, constants)
    said = call('--out', 'b', '--set', 'method_args={"tua": 1}')
    assert said.exit_code == 2 and "Did you mean 'tau'" in said.output and not (tmp_path/'b/result.json').exists()


def test_fault_29_variants():
    "They are listed, train with Reflective Learning, change no number that the slides report, and refuse photographs"
    strong = matching('autoaugment')
    assert len(strong) == 30 and all(recipe(o.name.replace('+AutoAugment', '')).reported == o.reported for o in strong)
    said = CliRunner().invoke(app, ['recipes', 'table6/*AutoAugment']).output
    assert said.count('autoaugment') == 6 and 'table6/SADE+RL+AutoAugment' in said
    assert slides_row('cifar100-lt IF 100 bsce', 'bsce + RL') == dict(all=47.9, gain=1.8)
    res, _ = train_run(recipe('table1/SADE+RL+AutoAugment/50').settings(**digits, epochs=1, n_max=20, bs=16), bar=False)
    assert (res['settings']['policy'], res['settings']['cut']) == ('autoaugment', 16)
    assert res['reflective']['preset'] == 'paper'
    with pytest.raises(ValueError, match='cut: Cutout is not supported'):
        recipe('table1/BSCE+AutoAugment/100').settings(dataset='imagenet-lt', imbalance_factor=None, keep_train=False)


def test_fault_30_classes_of_inaturalist():
    "Many, Medium and Few: more than 100 training images, 20 to 100, fewer than 20; All follows from them"
    from ltrl_fastai.experiments.recipes import _classes, _implied
    assert _classes['inaturalist18'] == (842, 4076, 3224) and sum(_classes['inaturalist18']) == 8142
    n_classes = {'cifar100-lt': 100, 'imagenet-lt': 1000, 'places-lt': 365, 'inaturalist18': 8142}
    assert {k: sum(v) for k, v in _classes.items()} == n_classes
    assert _implied('inaturalist18', dict(many=100., medium=0., few=0.)) == pytest.approx(100*842/8142)
    assert _implied('inaturalist18', recipe('table4/BLS+RL').reported) == pytest.approx(73.46, abs=.01)
    edges = {k: m.tolist() for k, m in shot_groups(torch.tensor([101, 100, 20, 19, 2])).items()}
    assert edges['many'] == [True]+[False]*4 and edges['few'] == [False]*3+[True]*2
    assert edges['medium'] == [False, True, True, False, False]
