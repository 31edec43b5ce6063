"Second stages: on fastai's own learners, refused and left as they were, saved and loaded, resumed; what they hold, step by step."
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import (SGD, Callback, CrossEntropyLossFlat, DataLoaders, GradientAccumulation,
                               ImageDataLoaders, L, Learner, RandomResizedCrop, ShortEpochCallback,
                               aug_transforms, deepcopy, nn, partial, resnet18, set_seed, vision_learner)
from test_methods import Crash, same

from ltrl_fastai.all import (Method, RIDELoss, aggregation, assignment, class_counts, digits_lt, distil_net,
                             distillation, expert_net,
                             methods)
from parts import all_three
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.balancing import MaxNorm, WeightDecay, balancing_stage
from ltrl_fastai.methods.decouple import (MeanHead, ScaledHead, TauNormHead, class_means, crt, features_of, lws,
                                          mean_head, ncm, scaled_head, tau_norm, tau_normed,
                                          unaugmented)
from ltrl_fastai.methods.heads import head_of
from ltrl_fastai.methods.mislas import LabelAwareSmoothing, mislas_stage
from ltrl_fastai.methods.nets import create_net
from ltrl_fastai.methods.oltr import MemoryHead, OLTRLoss, oltr_stage

stages = dict(crt=crt, lws=lws, tau_norm=tau_norm, ncm=ncm, mislas=mislas_stage, balancing=balancing_stage,
              oltr=oltr_stage)
every_stage = pytest.mark.parametrize('stage', stages.values(), ids=stages)


def begun(learn):
    "After a first stage of one batch"
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=ShortEpochCallback(0))
    return learn


def then(learn, stage):
    "The second stage, of a learner whose first is done"
    with learn.no_bar(), learn.no_logging(): Method('', '', then=(stage,)).fit(learn, 2, .01, first=lambda *args: None)
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
    "A learner of files as a newcomer makes it: folders, a random crop of each item, augmented batches, a pretrained net's layout"
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for c, n in dict(cat=12, dog=7, lynx=5).items():
        (folder/c).mkdir()
        for i in range(n):
            PIL.Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder/c/f'{i}.png')
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=1, item_tfms=RandomResizedCrop(32),
                                       batch_tfms=aug_transforms(), bs=4, device='cpu')
    return vision_learner(dls, resnet18, pretrained=False, opt_func=SGD)


@pytest.mark.parametrize('stage', [*stages.values(), assignment, distillation, aggregation],
                         ids=[*stages, 'assignment', 'distillation', 'aggregation'])
def test_a_second_stage_without_its_first_is_refused(dls, stage):
    "Before anything is changed; a learner that was fitted, that has loaded weights, or a net that was trained elsewhere will do"
    def fresh():
        net = create_net('resnet8', 10, n_in=1)
        return Learner(dls, expert_net(net) if stage in (assignment,
                                                         aggregation) else distil_net(net,
                                                             None) if stage is distillation else net,
                       loss_func=RIDELoss(class_counts(dls)) if stage is distillation else CrossEntropyLossFlat())

    def prepare(learn):
        stage.prepare(learn, class_counts(dls))
        if stage.adapt: stage.adapt(learn, dls.valid)
    learn = fresh()
    net, loss, layers = learn.model, learn.loss_func, [type(o) for o in learn.model.modules()]
    with pytest.raises(ValueError, match="this learner's net has not been trained. Fit the learner first"):
        prepare(learn)
    assert learn.model is net and learn.loss_func is loss and [type(o) for o in net.modules()] == layers
    with pytest.raises(ValueError, match='second stage'): then(learn, stage)
    trained = fresh()
    trained.model.train()(dls.one_batch()[0])
    elsewhere = Learner(dls, deepcopy(trained.model), loss_func=trained.loss_func)
    loaded = fresh()
    file = loaded.save('trained', with_opt=False)
    try: loaded.load('trained')
    finally: file.unlink()
    for o in (trained, elsewhere, loaded): prepare(o)


@every_stage
def test_a_learner_of_files(images, stage):
    "All of them work on fastai's vision_learner, and the training images are augmented as before"
    learn = vision_learner(images.dls, resnet18, pretrained=False, opt_func=SGD)
    learn.model.load_state_dict(images.model.state_dict())
    then(begun(learn), stage)
    with learn.no_bar(): preds, _ = learn.get_preds()
    assert preds.shape == (len(learn.dls.valid_ds), 3) and preds.isfinite().all()
    assert head_of(learn.model)[1].out_features == 3 and learn.dls.train_ds.split_idx == 0


def test_features_are_seen_without_augmentation(images):
    n = len(images.dls.train_ds)
    (a, y), (b, _) = features_of(images, unaugmented(images)), features_of(images, unaugmented(images))
    assert a.equal(b) and len(a) == n and torch.bincount(y, minlength=3).equal(class_counts(images.dls))
    augmented = [torch.cat([x for x, _ in images.dls.train.new(shuffle=False, drop_last=False)]) for _ in range(2)]
    assert not augmented[0].equal(augmented[1]), 'the learner has lost its augmentation'


@pytest.mark.parametrize('bs', [1, 7, 400])
def test_class_means_batch_by_batch(dls, bs):
    "The same as of all features at once, however they come"
    learn = learner(DataLoaders(dls.train, dls.valid.new(bs=bs)))
    means, n = class_means(learn, 10)
    f, y = features_of(learn, unaugmented(learn))
    torch.testing.assert_close(means, torch.stack([f[y == c].mean(0) for c in range(10)]), rtol=1e-4, atol=1e-5)
    assert n.equal(torch.bincount(y))


def test_a_class_without_images_is_never_the_nearest():
    x, y = torch.randn(40, 6), [0, 1, 3]*13+[0]
    dl = list(zip(x, y))
    learn = Learner(DataLoaders.from_dsets(L(dl), L(dl), bs=8, device='cpu'),
                    nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), loss_func=F.cross_entropy)
    mean_head(begun(learn))
    with learn.no_bar(): preds, _ = learn.get_preds()
    assert preds.isfinite().all() and (preds.argmax(1) != 2).all()


def test_tau_is_chosen_on_the_classes_that_there_are(dls):
    "Some classes have no validation image: the others decide, each by the same weight"
    learn = begun(learner(with_valid(dls, (dls.valid_ds.targets < 4).nonzero().flatten())))
    old, scores = deepcopy(learn.model.fc), []
    f, y = features_of(learn, learn.dls.valid)
    assert set(y.tolist()) == set(range(4))
    for tau in (0., 1., 2.):
        hits = (TauNormHead(old, tau)(f).argmax(1) == y).float()
        scores.append(torch.stack([hits[y == c].mean() for c in range(4)]).mean().item())
    assert tau_normed(learn, taus=[0., 1., 2.]) == [0., 1., 2.][int(np.argmax(scores))]


def test_tau_without_validation_images_leaves_the_net_as_it_was(dls):
    learn = begun(learner(with_valid(dls, [0, 0])))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='chosen on validation images'): tau_normed(learn)
    assert isinstance(learn.model.fc, nn.Linear)
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())


@every_stage
def test_weights_tell_all(dls, stage):
    "What a stage has found is in the state of the net, the power of tau-norm too: another net of this layout predicts the same with it"
    learn = then(begun(learner(dls)), stage)
    with torch.no_grad():
        if isinstance(learn.model.fc, TauNormHead): learn.model.fc.tau.fill_(.7)
        x = dls.valid.one_batch()[0]
        want = learn.model.eval()(x)
        other = create_net('resnet8', 10, n_in=1)
        made = {ScaledHead: ScaledHead, TauNormHead: TauNormHead,
                MeanHead: lambda old: MeanHead(torch.rand(10, 64), torch.ones(10, dtype=torch.bool)),
                MemoryHead: lambda old: MemoryHead(torch.rand(10, 64))}
        if type(learn.model.fc) in made: other.fc = made[type(learn.model.fc)](other.fc)
        other.load_state_dict(learn.model.state_dict())
        torch.testing.assert_close(other.eval()(x), want, rtol=0, atol=0)


def test_scales_begin_where_the_head_was(dls):
    learn = begun(learner(dls))
    x = dls.valid.one_batch()[0]
    with torch.no_grad():
        before = learn.model.eval()(x)
        scaled_head(learn)
        torch.testing.assert_close(learn.model.eval()(x), before, rtol=1e-5, atol=1e-5)


@every_stage
def test_a_body_that_stands_still(dls, stage):
    "No stage moves a weight of the body but OLTR, which trains it; MiSLAS, cRT and LWS move its statistics, and no other does; all may learn again afterwards"
    learn = begun(learner(dls))
    body = {k: v.clone() for k, v in learn.model.state_dict().items() if not k.startswith('fc')}
    then(learn, stage)
    moved = {k.rpartition('.')[2] for k, v in learn.model.state_dict().items() if k in body and not v.equal(body[k])}
    stats = {'running_mean', 'running_var', 'num_batches_tracked'}
    assert moved == (stats if stage in (mislas_stage, crt,
                                        lws) else stats | {'weight', 'bias'} if stage is oltr_stage else set())
    assert all(p.requires_grad for p in learn.model.parameters())


class Norms(Callback):
    "Lengths of class vectors after each step and after each epoch, and the weight decay in force"
    order = 9
    def __init__(self): self.steps, self.epochs, self.wd = [], [], set()
    def lengths(self): return self.model.fc.weight.detach().norm(dim=1)
    def before_step(self): self.wd.add(self.opt.hypers[0]['wd'])
    def after_step(self): self.steps.append(self.lengths())
    def after_train(self): self.epochs.append(self.lengths())


@pytest.mark.parametrize('every_epoch', [False, True])
def test_a_bound_on_lengths(dls, quick_fit, every_epoch):
    "Per step it holds after each; per epoch it is passed in between, and holds at the ends"
    learn = learner(dls)
    lengths = learn.model.fc.weight.detach().norm(dim=1)
    radius = lengths.min()+.1*(lengths.max()-lengths.min())
    quick_fit(learn, 2, .1, cbs=[MaxNorm(every_epoch=every_epoch), norms := Norms()])
    steps, epochs = torch.stack(norms.steps), torch.stack(norms.epochs)
    assert (epochs <= radius*(1+1e-5)).all() and len(steps) == 2*len(dls.train)
    assert bool((steps > radius*(1+1e-5)).any()) == every_epoch


def test_weight_decay_of_one_fit(dls, quick_fit):
    "It is there in the fit, gone afterwards and after a crash, and no hindrance to a learner that has not been fitted"
    learn = learner(dls)
    with learn.added_cbs(WeightDecay(.1)), learn.no_bar(), learn.no_logging(): learn.validate()
    quick_fit(learn, 1, cbs=[WeightDecay(.1), norms := Norms()])
    assert norms.wd == {.1} and {h['wd'] for h in learn.opt.hypers} != {.1}
    quick_fit(learn, 1, cbs=[norms := Norms()])
    assert .1 not in norms.wd
    with pytest.raises(KeyboardInterrupt): quick_fit(learn, 2, cbs=[WeightDecay(.1), Crash(0, 0)])
    quick_fit(learn, 1, cbs=[norms := Norms()])
    assert .1 not in norms.wd


@pytest.mark.parametrize('skipping', [False, True], ids=['each', 'accumulated'])
def test_weight_decay_of_real_steps(quick_fit, skipping):
    "The same weights as in a fit that has it all along, and others than without; nothing is left of it between steps"
    def fitted(wd, *cbs):
        set_seed(0, reproducible=True)  # before the loader, which draws the seed of its order
        learn = learner(digits_lt(device='cpu'), wd=wd)
        quick_fit(learn, 2, .05, cbs=[*cbs, *([GradientAccumulation(64)] if skipping else [])])
        assert {h['wd'] for h in learn.opt.hypers} == {wd}
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert fitted(0., WeightDecay(.1)).equal(fitted(.1)) and not fitted(.1).equal(fitted(0.))


@pytest.mark.parametrize('own', [False, True])
def test_label_aware_smoothing_is_cross_entropy_of_its_labels(own):
    "Over the other classes, as in the paper, or over all, as in the published code; a batch of one, and classes that a batch lacks"
    torch.manual_seed(0)
    loss = LabelAwareSmoothing([90, 20, 5, 1], own=own).double()
    for y in ([2], [0, 0, 3], [1]*5):
        z, y = torch.randn(len(y), 4, dtype=torch.float64), torch.tensor(y)
        eps = loss.eps[y][:, None]
        hot = F.one_hot(y, 4).double()
        soft = hot*(1-eps) + (eps/4 if own else (1-hot)*eps/3)
        torch.testing.assert_close(soft.sum(1), torch.ones(len(y), dtype=torch.float64))
        torch.testing.assert_close(loss(z, y), F.cross_entropy(z, soft))


@pytest.mark.parametrize('loss', [LabelAwareSmoothing([40, 12, 9, 8, 7, 6, 5, 4, 3, 1]), CrossEntropyLossFlat()],
                         ids=['smoothed', 'plain'])
def test_a_small_batch_by_heart(loss):
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
def staged():
    "The stages as methods that settings know"
    made = {f'staged-{k}': Method(k, 'this test', then=(o,)) for k, o in stages.items()}
    methods.update(made)
    yield made
    for k in made: del methods[k]


@pytest.mark.parametrize('name', stages)
def test_runs_are_resumed_within_the_second_stage(name, staged, tmp_path):
    "The same numbers as without an interruption; of a stage that trains nothing, in the first"
    settings = RunSettings(method=f'staged-{name}', epochs=2, reflective=dict(ks=True, kc=True))
    whole, _ = train_run(settings, bar=False)
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt',
                  cbs=[Crash(0 if stages[name].epochs == 0 else 1, 0)])
    resumed, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt')
    same(whole, resumed)


@every_stage
def test_reflective_learning_is_of_the_first_stage(dls, stage):
    "Its parts are away in the second, and back afterwards"
    on = []

    class See(Callback):
        def before_train(self): on.append(any(type(o).__name__ == 'KnowledgeReview' for o in self.learn.cbs))
    learn = learner(dls, cbs=[all_three(), See()])
    with learn.no_bar(), learn.no_logging(): Method('', '', then=(stage,)).fit(learn, 2, .05)
    assert on == [True]*2+[False]*(2 if stage.epochs is None else min(2, stage.epochs))
    assert learn.knowledge_review in learn.cbs


def test_memory_under_mixed_precision_and_review(dls, quick_fit):
    "Logits outside of training and in the weights' precision; Reflective Learning by hand in the second stage reviews the logits and summarises what goes into the head"
    learn = then(begun(learner(dls)), oltr_stage)
    x = dls.valid.one_batch()[0]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert learn.model.eval()(x).shape == (len(x), 10) and learn.model(x).dtype == torch.float32
        logits, features, centroids = learn.model.train()(x)
        assert logits.dtype == features.dtype == torch.float32 and centroids is learn.model.fc.centroids
    learn.opt = None
    quick_fit(learn, 2, cbs=all_three())
    assert isinstance(learn.loss_func, OLTRLoss) and np.isfinite(learn.recorder.values[-1]).all()
    assert Method('', '').learner(dls, learn.model)  # its head has as many outputs as there are classes
