"Second stages: on fastai's own learners, rejected if untrained, saved and loaded, resumed, within their limits."
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import (SGD, Callback, CrossEntropyLossFlat, DataLoaders, GradientAccumulation,
                               ImageDataLoaders, L, Learner, RandomResizedCrop, ShortEpochCallback, aug_transforms,
                               deepcopy, nn, partial, resnet18, set_seed, vision_learner)
from test_methods import Crash, same

from ltrl_fastai.all import (Method, RIDELoss, aggregation, assignment, class_counts, digits_lt, distil_net,
                             distillation, expert_net, methods)
from parts import all_three
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.balancing import MaxNorm, WeightDecay, balancing_stage
from ltrl_fastai.methods.decouple import (MeanHead, ScaledHead, TauNormHead, class_means, crt, features_of, lws,
                                          mean_head, ncm, scaled_head, tau_norm, tau_norm_head, unaugmented)
from ltrl_fastai.methods.heads import head_of
from ltrl_fastai.methods.mislas import LabelAwareSmoothing, mislas_stage
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.methods.oltr import MemoryHead, OLTRLoss, oltr_stage

stages = dict(crt=crt, lws=lws, tau_norm=tau_norm, ncm=ncm, mislas=mislas_stage, balancing=balancing_stage,
              oltr=oltr_stage)
of_experts = dict(assignment=assignment, distillation=distillation, aggregation=aggregation)
every_stage = pytest.mark.parametrize('stage', stages.values(), ids=stages)


def after_first_stage(learn):
    "The learner, after a first stage of one batch"
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=ShortEpochCallback(0))
    return learn


def after_second_stage(learn, stage):
    "The learner, after a second stage alone"
    with learn.no_bar(), learn.no_logging():
        Method('', '', later_stages=(stage,)).fit(learn, 2, .01, first=lambda *args: None)
    return learn


def learner(dls, **kwargs):
    set_seed(0, reproducible=True)
    return Learner(dls, create_net('resnet8', 10, n_in=1), loss_func=CrossEntropyLossFlat(),
                   opt_func=partial(SGD, mom=.9), **kwargs)


def with_valid(dls, ids):
    "The same data with some of the validation images"
    ds = dls.valid_ds
    return DataLoaders(dls.train, dls.valid.new(type(ds)(ds.x[ids], ds.targets[ids], ds.vocab, 1)))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A `vision_learner` on image folders, with item and batch transforms"
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for c, n in dict(cat=12, dog=7, lynx=5).items():
        (folder/c).mkdir()
        for i in range(n):
            PIL.Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder/c/f'{i}.png')
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=1, item_tfms=RandomResizedCrop(32),
                                       batch_tfms=aug_transforms(), bs=4, device='cpu')
    return vision_learner(dls, resnet18, pretrained=False, opt_func=SGD)


def untrained_for(stage, dls):
    "An untrained learner with the net and the loss that a stage needs"
    net = create_net('resnet8', 10, n_in=1)
    loss = CrossEntropyLossFlat()
    if stage is distillation:
        net = distil_net(net, None)
        loss = RIDELoss(class_counts(dls))
    elif stage in (assignment, aggregation): net = expert_net(net)
    return Learner(dls, net, loss_func=loss)


@pytest.mark.parametrize('stage', [*stages.values(), *of_experts.values()], ids=[*stages, *of_experts])
def test_a_second_stage_on_an_untrained_net_is_rejected(dls, stage):
    "Before it changes anything; a fitted learner, loaded weights, or a net trained elsewhere are accepted"
    def prepare(learn):
        stage.prepare(learn, class_counts(dls))
        if stage.adapt: stage.adapt(learn, dls.valid)
    learn = untrained_for(stage, dls)
    net = learn.model
    loss = learn.loss_func
    layers = [type(o) for o in net.modules()]
    with pytest.raises(ValueError, match="this learner's net has not been trained. Fit the learner first"):
        prepare(learn)
    assert learn.model is net
    assert learn.loss_func is loss
    assert [type(o) for o in net.modules()] == layers
    with pytest.raises(ValueError, match='second stage'): after_second_stage(learn, stage)
    trained = untrained_for(stage, dls)
    trained.model.train()(dls.one_batch()[0])
    elsewhere = Learner(dls, deepcopy(trained.model), loss_func=trained.loss_func)
    loaded = untrained_for(stage, dls)
    file = loaded.save('trained', with_opt=False)
    try: loaded.load('trained')
    finally: file.unlink()
    for o in (trained, elsewhere, loaded): prepare(o)


@pytest.mark.slow
@every_stage
def test_a_learner_on_image_files(images, stage):
    "Stages work on fastai's `vision_learner`, and the training images are augmented as before"
    learn = vision_learner(images.dls, resnet18, pretrained=False, opt_func=SGD)
    learn.model.load_state_dict(images.model.state_dict())
    after_second_stage(after_first_stage(learn), stage)
    with learn.no_bar(): preds, _ = learn.get_preds()
    assert preds.shape == (len(learn.dls.valid_ds), 3)
    assert preds.isfinite().all()
    assert head_of(learn.model)[1].out_features == 3
    assert learn.dls.train_ds.split_idx == 0


def test_features_are_computed_without_augmentation(images):
    (a, y), (b, _) = [features_of(images, unaugmented(images)) for _ in range(2)]
    assert a.equal(b)
    assert len(a) == len(images.dls.train_ds)
    assert torch.bincount(y, minlength=3).equal(class_counts(images.dls))
    augmented = [torch.cat([x for x, _ in images.dls.train.new(shuffle=False, drop_last=False)]) for _ in range(2)]
    assert not augmented[0].equal(augmented[1]), 'the learner has lost its augmentation'


@pytest.mark.parametrize('bs', [1, 7, 400])
def test_class_means_do_not_depend_on_the_batch_size(dls, bs):
    learn = learner(DataLoaders(dls.train, dls.valid.new(bs=bs)))
    means, n = class_means(learn, 10)
    feats, targets = features_of(learn, unaugmented(learn))
    expected = torch.stack([feats[targets == c].mean(0) for c in range(10)])
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-5)
    assert n.equal(torch.bincount(targets))


def test_a_class_without_images_is_never_the_nearest():
    x = torch.randn(40, 6)
    y = [0, 1, 3]*13+[0]
    dl = list(zip(x, y))
    learn = Learner(DataLoaders.from_dsets(L(dl), L(dl), bs=8, device='cpu'),
                    nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), loss_func=F.cross_entropy)
    mean_head(after_first_stage(learn))
    with learn.no_bar(): preds, _ = learn.get_preds()
    assert preds.isfinite().all()
    assert (preds.argmax(1) != 2).all()


def test_tau_is_chosen_on_the_classes_with_validation_images(dls):
    "Each of them with the same weight"
    learn = after_first_stage(learner(with_valid(dls, (dls.valid_ds.targets < 4).nonzero().flatten())))
    head = deepcopy(learn.model.fc)
    feats, targets = features_of(learn, learn.dls.valid)
    assert set(targets.tolist()) == set(range(4))
    taus = [0., 1., 2.]
    scores = []
    for tau in taus:
        is_right = (TauNormHead(head, tau)(feats).argmax(1) == targets).float()
        scores.append(torch.stack([is_right[targets == c].mean() for c in range(4)]).mean().item())
    assert tau_norm_head(learn, taus=taus) == taus[int(np.argmax(scores))]


def test_without_validation_images_tau_norm_leaves_the_net_unchanged(dls):
    learn = after_first_stage(learner(with_valid(dls, [0, 0])))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='chosen on validation images'): tau_norm_head(learn)
    assert isinstance(learn.model.fc, nn.Linear)
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())


@every_stage
def test_the_state_is_complete(dls, stage):
    "A net with the same layout predicts the same with the state of the trained one; tau is part of it"
    learn = after_second_stage(after_first_stage(learner(dls)), stage)
    make = {
        ScaledHead: ScaledHead,
        TauNormHead: TauNormHead,
        MeanHead: lambda old: MeanHead(torch.rand(10, 64), torch.ones(10, dtype=torch.bool)),
        MemoryHead: lambda old: MemoryHead(torch.rand(10, 64)),
    }
    head = learn.model.fc
    with torch.no_grad():
        if isinstance(head, TauNormHead): head.tau.fill_(.7)
        x = dls.valid.one_batch()[0]
        expected = learn.model.eval()(x)
        other = create_net('resnet8', 10, n_in=1)
        if type(head) in make: other.fc = make[type(head)](other.fc)
        other.load_state_dict(learn.model.state_dict())
        torch.testing.assert_close(other.eval()(x), expected, rtol=0, atol=0)


def test_new_scales_do_not_change_the_logits(dls):
    learn = after_first_stage(learner(dls))
    x = dls.valid.one_batch()[0]
    with torch.no_grad():
        before = learn.model.eval()(x)
        scaled_head(learn)
        torch.testing.assert_close(learn.model.eval()(x), before, rtol=1e-5, atol=1e-5)


@every_stage
def test_what_changes_in_the_body(dls, stage):
    "OLTR trains the body; MiSLAS, cRT and LWS update its statistics; the others change nothing"
    learn = after_first_stage(learner(dls))
    body = {k: v.clone() for k, v in learn.model.state_dict().items() if not k.startswith('fc')}
    after_second_stage(learn, stage)
    changed = {k.rpartition('.')[2] for k, v in learn.model.state_dict().items() if k in body and not v.equal(body[k])}
    expected = set()
    if stage in (mislas_stage, crt, lws, oltr_stage): expected |= {'running_mean', 'running_var', 'num_batches_tracked'}
    if stage is oltr_stage: expected |= {'weight', 'bias'}
    assert changed == expected
    assert all(p.requires_grad for p in learn.model.parameters())


class Norms(Callback):
    "Records the lengths of class vectors after each step and each epoch, and all weight decays"
    order = 9
    def __init__(self):
        self.steps = []
        self.epochs = []
        self.wd = set()
    def lengths(self): return self.model.fc.weight.detach().norm(dim=1)
    def before_step(self): self.wd.add(self.opt.hypers[0]['wd'])
    def after_step(self): self.steps.append(self.lengths())
    def after_train(self): self.epochs.append(self.lengths())


@pytest.mark.parametrize('every_epoch', [False, True])
def test_class_vectors_are_limited_in_length(dls, quick_fit, every_epoch):
    "After each step, or with `every_epoch` only at the end of an epoch"
    learn = learner(dls)
    lengths = learn.model.fc.weight.detach().norm(dim=1)
    radius = lengths.min()+.1*(lengths.max()-lengths.min())
    norms = Norms()
    quick_fit(learn, 2, .1, cbs=[MaxNorm(every_epoch=every_epoch), norms])
    steps, epochs = torch.stack(norms.steps), torch.stack(norms.epochs)
    assert len(steps) == 2*len(dls.train)
    assert (epochs <= radius*(1+1e-5)).all()
    assert bool((steps > radius*(1+1e-5)).any()) == every_epoch


def test_weight_decay_of_one_fit(dls, quick_fit):
    "It applies during the fit, not afterwards or after a crash, and an unfitted learner can be validated"
    def decays_of(*cbs):
        norms = Norms()
        quick_fit(learn, 1, cbs=[*cbs, norms])
        return norms.wd
    learn = learner(dls)
    with learn.added_cbs(WeightDecay(.1)), learn.no_bar(), learn.no_logging(): learn.validate()
    assert decays_of(WeightDecay(.1)) == {.1}
    assert {h['wd'] for h in learn.opt.hypers} != {.1}
    assert .1 not in decays_of()
    with pytest.raises(KeyboardInterrupt): quick_fit(learn, 2, cbs=[WeightDecay(.1), Crash(0, 0)])
    assert .1 not in decays_of()


@pytest.mark.parametrize('accumulate', [False, True], ids=['each', 'accumulated'])
def test_weight_decay_of_one_fit_equals_that_of_the_learner(quick_fit, accumulate):
    "The weights are those of a fit with this weight decay, and not those without; it is restored between steps"
    def fitted(wd, *cbs):
        set_seed(0, reproducible=True)  # before the loader, which draws the seed of its order
        learn = learner(digits_lt(device='cpu'), wd=wd)
        quick_fit(learn, 2, .05, cbs=[*cbs, *([GradientAccumulation(64)] if accumulate else [])])
        assert {h['wd'] for h in learn.opt.hypers} == {wd}
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert fitted(0., WeightDecay(.1)).equal(fitted(.1))
    assert not fitted(.1).equal(fitted(0.))


@pytest.mark.parametrize('own', [False, True])
def test_label_aware_smoothing_is_cross_entropy_of_its_labels(own):
    "Smoothed over the other classes (paper) or over all (code); for one image, and for batches that lack classes"
    torch.manual_seed(0)
    loss = LabelAwareSmoothing([90, 20, 5, 1], own=own).double()
    for targets in ([2], [0, 0, 3], [1]*5):
        y = torch.tensor(targets)
        z = torch.randn(len(y), 4, dtype=torch.float64)
        eps = loss.eps[y][:, None]
        hot = F.one_hot(y, 4).double()
        soft = hot*(1-eps) + (eps/4 if own else (1-hot)*eps/3)
        torch.testing.assert_close(soft.sum(1), torch.ones(len(y), dtype=torch.float64))
        torch.testing.assert_close(loss(z, y), F.cross_entropy(z, soft))


@pytest.mark.parametrize('loss', [LabelAwareSmoothing([40, 12, 9, 8, 7, 6, 5, 4, 3, 1]), CrossEntropyLossFlat()],
                         ids=['smoothed', 'cross-entropy'])
def test_a_small_batch_is_overfitted(loss):
    dls = digits_lt(device='cpu')
    x, y = [o.as_subclass(torch.Tensor) for o in dls.train.after_batch(dls.train_ds.batch(range(16)))]
    torch.manual_seed(0)
    net = create_net('resnet8', 10, n_in=1)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        opt.zero_grad()
        loss(net(x), y).backward()
        opt.step()
    assert net(x).argmax(1).equal(y)


@pytest.fixture
def staged_methods():
    "Each stage as a method that settings know, `staged-...`"
    made = {f'staged-{k}': Method(k, 'this test', later_stages=(o,)) for k, o in stages.items()}
    methods.update(made)
    yield
    for k in made: del methods[k]


@pytest.mark.slow
@pytest.mark.parametrize('name', stages)
def test_runs_are_resumed_within_the_second_stage(name, staged_methods, tmp_path):
    "With the same numbers as without an interruption; if a stage trains nothing, within the first"
    settings = RunSettings(method=f'staged-{name}', epochs=2, n_max=40, reflective=dict(ks=True, kc=True))
    whole, _ = train_run(settings, bar=False)
    fit = 0 if stages[name].epochs == 0 else 1
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt', cbs=[Crash(fit, 0)])
    resumed, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt')
    same(whole, resumed)


@every_stage
def test_reflective_learning_takes_part_in_the_first_stage(dls, stage):
    "It is removed during the second, and added again afterwards"
    present = []

    class PresenceLog(Callback):
        def before_train(self):
            present.append(any(type(o).__name__ == 'KnowledgeReview' for o in self.learn.cbs))
    learn = learner(dls, cbs=[all_three(), PresenceLog()])
    with learn.no_bar(), learn.no_logging(): Method('', '', later_stages=(stage,)).fit(learn, 2, .05)
    n_second = 2 if stage.epochs is None else min(2, stage.epochs)
    assert present == [True]*2+[False]*n_second
    assert learn.knowledge_review in learn.cbs


def test_memory_head_with_mixed_precision_and_reflective_learning(dls, quick_fit):
    "Logits have the precision of the weights; added by hand in the second stage, Reflective Learning works"
    learn = after_second_stage(after_first_stage(learner(dls)), oltr_stage)
    x = dls.valid.one_batch()[0]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        outside = learn.model.eval()(x)
        logits, features, centroids = learn.model.train()(x)
    assert outside.shape == (len(x), 10)
    assert outside.dtype == logits.dtype == features.dtype == torch.float32
    assert centroids is learn.model.fc.centroids
    learn.opt = None
    quick_fit(learn, 2, cbs=all_three())
    assert isinstance(learn.loss_func, OLTRLoss)
    assert np.isfinite(learn.recorder.values[-1]).all()
    assert Method('', '').learner(dls, learn.model)  # its head has one output per class
