"Faults of the benchmarks' settings, by number: each test holds the right value."
import inspect
from functools import partial

import pytest
import torch
from fastai.vision.all import SGD, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn, params, set_seed
from ltrl_fastai.experiments.plan import Variant, hash_of, make_plan
from ltrl_fastai.experiments.recipes import recipes
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.catalogue import methods
from ltrl_fastai.methods.optimizer import benchmark_sgd

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
    ours = steps_of(lambda net: benchmark_sgd(list(net.parameters()), lr=.1, wd=wd, nesterov=nesterov), lrs=(.1, .01, .001))
    theirs = steps_of(lambda net: torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=wd, nesterov=nesterov), lrs=(.1, .01, .001))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_fault_15_nesterov_where_the_authors_have_it():
    without = {'mixup', 'ldam', 'ldam-drw', 'lade', 'paco', 'crt', 'lws', 'tau-norm', 'ncm', 'oltr', 'mislas', 'weight-balancing'}
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
    assert {k: opt.hypers[0][k] for k in ('mom', 'wd')} == {k: as_before.opt.hypers[0][k] for k in ('mom', 'wd')} | {'wd': 5e-4}
    res, _ = train_run(old, bar=False)
    assert res['settings']['decouple_wd'] is True and res['settings']['nesterov'] is False
    plan = make_plan(['bsce'], [Variant('')], [0])+make_plan(['bsce'], [Variant('', settings=dict(decouple_wd=True))], [0])
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
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=16)]*2, device='cpu'), net_of(), loss_func=CrossEntropyLossFlat(), opt_func=benchmark_sgd, wd=.01,
                    wd_bn_bias=True, splitter=lambda m: [params(m[:2]), params(m[2:])])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(.01, .1))
    assert [h['lr'] for h in learn.opt.hypers] == [pytest.approx(.01), pytest.approx(.1)]
    with pytest.raises(ValueError, match='needs a momentum above 0'): benchmark_sgd(params(net_of()), lr=.1, mom=0.)
    learn = Learner(learn.dls, net_of(), opt_func=partial(benchmark_sgd, nesterov=False), loss_func=CrossEntropyLossFlat())
    learn.create_opt()
    assert learn.opt.hypers[0]['wd'] == 0. and 'wd' in inspect.signature(benchmark_sgd).parameters


def test_fault_25_constants_of_a_method():
    "A run's settings reach the loss and the stages; a constant that a method lacks is refused before training"
    counts = [100, 10, 1]
    of = lambda name, **args: RunSettings(method=name, method_args=args).made_method()
    assert of('sade', tau=1.).loss(counts).tau == 1. and of('sade').loss(counts).tau == 2.
    ride = of('ride', diversity=.2, spread=.02).loss(counts)
    assert ride.diversity == .2 and ride.temperature.max() == 1. and of('ride').loss(counts).diversity == .45
    lade = of('lade', lam=.5, alpha=.05).loss(counts).func
    assert (lade.lam, lade.alpha) == (.5, .05)
    stage, = of('mislas', head=.3, tail=0., factor=.05).then
    assert stage.lr(.1) == pytest.approx(.005) and stage.prepare.keywords == dict(head=.3, tail=0.)
    for name, args, said in (('sade', dict(tua=1.), "Did you mean 'tau'"), ('softmax', dict(tau=1.), 'none that can be changed')):
        with pytest.raises(ValueError, match=said): RunSettings(method=name, method_args=args)
    with pytest.raises(ValueError, match='method_args: expected names and values'): RunSettings(method='sade', method_args=3)
    res, _ = train_run(RunSettings(method='mislas', method_args=dict(head=.3, tail=0., factor=.05, mixup=.2), **small), bar=False, test=False)
    assert res['settings']['method_args']['factor'] == .05


class Rates(Callback):
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])


@pytest.mark.parametrize('schedule,at', [('thirds', {.1: 1., .5: .1, .9: .01}), ('steps-60-80', {.4: 1., .7: .1, .9: .01}),
                                         ('steps-hundredth', {.5: 1., .85: .01, .95: 1e-4}), ('steps-60-80-hundredth', {.5: 1., .7: .01, .9: 1e-4})])
def test_fault_25_schedules_and_a_slower_body(schedule, at):
    rates = Rates()
    train_run(RunSettings(method='ride', epochs=20, n_max=20, schedule=schedule, lr=.01, body_lr=.001), bar=False, cbs=rates, test=False)
    for share, factor in at.items():
        body, head = rates.seen[int(share*len(rates.seen))]
        assert head == pytest.approx(.01*factor, rel=1e-5) and body == pytest.approx(.1*head), share
