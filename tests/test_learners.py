"Reflective Learning in fastai's learners, with its callbacks, mixed precision, loggers and loaders."
import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import timm
import torch
from fastai.callback.all import (CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp,
                                 SaveModelCallback, TerminateOnNaNCallback)
from fastai.callback.fp16 import MixedPrecision
from fastai.text.data import SortedDL
from fastai.vision.all import (Adam, Callback, CancelBatchException, CancelFitException, CancelStepException,
                               CancelTrainException, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader,
                               DataLoaders, F, Learner, RandomSplitter, SGD, TrainEvalCallback, TransformBlock,
                               accuracy, load_learner, nn, params, set_seed, vision_learner)
from ltrl_fastai.all import (BalancedSoftmaxLoss, CifarResNet, KnowledgeCorrection, KnowledgeReview, KnowledgeSummary,
                             LossTerms, ReflectiveLearning, SampleIds, class_counts, create_net, digits_lt,
                             shot_accuracies)
from ltrl_fastai.reflective import terms
from parts import all_three
from torchvision.models import mobilenet_v3_small, resnet18

ours = (ReflectiveLearning, KnowledgeReview, KnowledgeSummary, KnowledgeCorrection, LossTerms, SampleIds)


def constant_review(**kwargs): return KnowledgeReview(adapt=0., memory=0., **kwargs)


def feature_summary(): return KnowledgeSummary(adapt=6., resemblance='features')


def hooks(model): return sum(len(m._forward_pre_hooks)+len(m._forward_hooks) for m in model.modules())


def learner(dls, model, cbs=None, **kwargs):
    loss = kwargs.pop('loss_func', BalancedSoftmaxLoss(dls.class_counts))
    return Learner(dls, model, loss_func=loss, metrics=shot_accuracies(dls.class_counts), cbs=cbs, **kwargs)


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def small_net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope='module')
def photos():
    "A few colour images of 32 by 32 pixels, through fastai's item pipeline"
    rng = np.random.RandomState(0)
    images = torch.tensor(rng.rand(48, 3, 32, 32), dtype=torch.float)
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda i: images[i], get_y=lambda i: 'abc'[i % 3],
                      splitter=RandomSplitter(seed=0))
    return block.dataloaders(list(range(48)), bs=12, num_workers=0, device='cpu')


def name_of(o): return getattr(o, '__name__', o)


@pytest.mark.parametrize('arch', [resnet18, mobilenet_v3_small, 'resnet10t'], ids=name_of)
def test_vision_learner(photos, quick_fit, arch):
    set_seed(0, reproducible=True)
    loss = BalancedSoftmaxLoss(class_counts(photos))
    learn = vision_learner(photos, arch, pretrained=False, normalize=False, loss_func=loss, metrics=accuracy)
    learn.add_cbs(all_three())
    quick_fit(learn, 2, 1e-3)
    assert learn.loss_terms.history[1]['summary_loss'] > 0
    assert learn.knowledge_summary.centers.shape == (3, 512)
    assert learn.knowledge_review.teachers.visited.all() or photos.train.drop_last
    assert hooks(learn.model) == 0


nets = dict(torchvision=lambda: create_net('resnet18', 3), timm=lambda: timm.create_model('resnet10t', num_classes=3),
            cifar=lambda: CifarResNet(3, 8, head='cosine'))


@pytest.mark.parametrize('net', nets)
def test_learner_with_any_net(photos, quick_fit, net):
    learn = Learner(photos, nets[net](), loss_func=CrossEntropyLossFlat(), cbs=all_three())
    quick_fit(learn, 2, 1e-3)
    assert len(learn.knowledge_summary.similarity) == 3


def test_fine_tune_with_frozen_parameters(photos):
    learn = vision_learner(photos, resnet18, pretrained=False, normalize=False, cbs=all_three())
    frozen = [p.detach().clone() for p in learn.model[0][0].parameters()]
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        assert all((a == b).all() for a, b in zip(frozen, learn.model[0][0].parameters()))
        learn.fine_tune(1, 1e-3)
    assert not all((a == b).all() for a, b in zip(frozen, learn.model[0][0].parameters()))


@pytest.mark.parametrize('preset', ['default', 'paper', 'published'])
def test_presets_train(dls, mlp, quick_fit, preset):
    learn = quick_fit(learner(dls, mlp(), ReflectiveLearning(ks=True, kc=True, preset=preset)), 8)
    assert all(np.isfinite(v) for v in learn.loss_terms.history[-1].values())
    assert 'conflicts' in learn.recorder.metric_names
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['all'] > .4


others = dict(
    mixup=lambda: [MixUp()],
    accumulate=lambda: [GradientAccumulation(64)],
    clip=lambda: [GradientClip(.1)],
    all=lambda: [GradientAccumulation(64), GradientClip(.1), MixUp()],
)


@pytest.mark.parametrize('cbs', others.values(), ids=others)
@pytest.mark.parametrize('first', [True, False], ids=['ours first', 'ours last'])
def test_with_other_callbacks(dls, mlp, quick_fit, cbs, first):
    cbs = [all_three(), *cbs()] if first else [*cbs(), ReflectiveLearning(ks=True, kc=True)]
    learn = quick_fit(learner(dls, mlp(), cbs), 3)
    assert np.isfinite(learn.recorder.values[-1][0])
    assert isinstance(learn.loss_func, BalancedSoftmaxLoss)


def test_adding_order_does_not_matter(quick_fit, mlp):
    results = []
    for step in (1, -1):
        set_seed(0, reproducible=True)
        dls = digits_lt(device='cpu')
        cbs = [constant_review(), feature_summary(), KnowledgeCorrection(), GradientAccumulation(64), GradientClip(.5)]
        results.append(weights(quick_fit(learner(dls, mlp(), cbs[::step]), 3)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class CpuAMP(MixedPrecision):
    "fastai's MixedPrecision, which is only for CUDA, on a CPU"
    def before_fit(self):
        super().before_fit()
        dtype = torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16
        self.autocast = torch.autocast('cpu', dtype=dtype)
        self.learn.scaler = torch.amp.GradScaler('cpu', **{**self.kwargs, 'enabled': dtype == torch.float16})


class ScaledFloat32(CpuAMP):
    "A loss scale without low precision"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', enabled=False)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=4096.)


@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision_drops_nothing(dls, mlp, quick_fit, mode):
    learn = quick_fit(learner(dls, mlp(), [all_three(), CpuAMP(mode)]), 3)
    means = learn.loss_terms.history[-1]
    assert means['review_loss'] > 0
    assert means['summary_loss'] > 0
    assert np.isfinite(means['base_loss'])
    assert learn.knowledge_review.teachers.store.logits.dtype == torch.float32


def test_a_loss_scale_does_not_change_the_correction(quick_fit, mlp):
    results = []
    for cbs in ([], [ScaledFloat32()]):
        set_seed(0, reproducible=True)
        learn = learner(digits_lt(device='cpu'), mlp(), [all_three(), *cbs], opt_func=SGD)
        results.append(weights(quick_fit(learn, 3, 1e-1)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class OverflowOnce(Callback):
    "Let the predictions of one batch overflow, and skip its step"
    order, run_valid = 1, False
    @property
    def is_due(self): return (self.epoch, self.iter) == (0, 2)
    def after_pred(self):
        if self.is_due: self.learn.pred = self.pred*float('inf')
    def before_step(self):
        if self.is_due: raise CancelStepException


def test_an_overflow_leaves_no_teacher(dls, mlp, quick_fit):
    learn = learner(dls, mlp(), [constant_review(), OverflowOnce()])
    quick_fit(learn, 1)
    assert (~learn.knowledge_review.teachers.seen).sum() == 32
    quick_fit(learn, 2)
    assert learn.knowledge_review.teachers.seen.all()
    assert np.isfinite(learn.loss_terms.history[-1]['review_loss'])


events = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step']
errors = (KeyboardInterrupt, RuntimeError)
ends = [(exc, event) for exc in (*errors, CancelFitException) for event in (*events, 'after_batch', 'after_train')]
ends += [(CancelBatchException, event) for event in events]
ends += [(CancelTrainException, event) for event in (*events, 'after_batch')]


class Stop(Callback):
    "Raise `exc` once at an event of the second epoch"
    order, run_valid = -50, False
    def __init__(self, exc, event):
        self.exc = exc
        self.at = event
        setattr(self, event, self.stop)
    def stop(self):
        is_due = self.epoch == 1 and (self.iter == 3 or self.at == 'after_train')
        if not self.exc or not is_due: return
        exc, self.exc = self.exc, None
        raise exc('stop')


@pytest.mark.parametrize('exc,event', ends, ids=name_of)
def test_an_end_in_the_middle_leaves_nothing_and_training_goes_on(dls, mlp, quick_fit, event, exc):
    learn = learner(dls, mlp(), [all_three(), Stop(exc, event)])
    with pytest.raises(exc) if exc in errors else nullcontext(): quick_fit(learn, 3)
    if learn.opt: learn.opt.zero_grad()
    preds = learn.get_preds(dl=dls.test)[0]
    assert hooks(learn.model) == 0
    assert 'get_idxs' not in vars(dls.train)
    with learn.removed_cbs(learn.reflective_learning): assert (learn.get_preds(dl=dls.test)[0] == preds).all()
    quick_fit(learn, 2)
    assert np.isfinite(learn.loss_terms.history[-1]['review_loss'])
    assert hooks(learn.model) == 0
    learn.remove_cbs(ReflectiveLearning)
    assert not any(isinstance(cb, ours) for cb in learn.cbs)


def all_predictions(learn):
    "Results of every kind of inference"
    metrics = torch.tensor([0. if o is None else o for o in learn.validate()])
    single = learn.predict(learn.dls.test.dataset.images[0])[2]
    return [*learn.get_preds(ds_idx=0), *learn.get_preds(dl=learn.dls.test), metrics, single]


def test_predictions_are_those_without_our_callbacks(mlp, quick_fit):
    dls = digits_lt(device='cpu', tfms=dict(crop=0, flip=False))  # since fastai augments the training set in inference
    learn = quick_fit(learner(dls, mlp(), all_three()), 2)
    memory = learn.knowledge_review.teachers.store.logits.clone()
    with_ours = all_predictions(learn)
    with learn.removed_cbs(learn.reflective_learning): without = all_predictions(learn)
    assert all((a == b).all() for a, b in zip(with_ours, without))
    assert (learn.knowledge_review.teachers.store.logits == memory).all()


def test_export_leaves_out_memories(dls, mlp, quick_fit, tmp_path):
    sizes = {}
    for name, cbs in (('without.pkl', None), ('with.pkl', all_three())):
        learn = quick_fit(learner(dls, mlp(), cbs, path=tmp_path), 2)
        learn.export(name)
        sizes[name] = (tmp_path/name).stat().st_size
        loaded = load_learner(tmp_path/name)
        x = dls.test.dataset.images[3]
        assert (loaded.predict(x)[2] == learn.predict(x)[2]).all()
    assert sizes['with.pkl']-sizes['without.pkl'] < 20_000, sizes
    assert learn.knowledge_review.teachers is not None  # this learner still has them


@pytest.mark.parametrize('train_metrics', [False, True])
def test_columns_and_values_of_the_table_match(dls, mlp, quick_fit, tmp_path, train_metrics):
    save = SaveModelCallback(monitor='valid_all' if train_metrics else 'all')
    learn = learner(dls, mlp(), [all_three(), CSVLogger('log.csv'), save], path=tmp_path)
    learn.recorder.train_metrics = train_metrics
    quick_fit(learn, 3)
    names, values = learn.recorder.metric_names, learn.recorder.values
    assert all(len(v) == len(names)-2 for v in values)
    row = dict(zip(names[1:], values[-1]))
    means = learn.loss_terms.history[-1]
    assert all(row[k] == means[k] for k in means)
    assert row['train_loss'] > 0
    learn.recorder.plot_loss()
    header, *lines = (tmp_path/'log.csv').read_text().splitlines()
    assert all(line.count(',') == header.count(',') for line in lines)


def test_stopping_callbacks(dls, mlp, quick_fit, tmp_path):
    stopping = [EarlyStoppingCallback(monitor='all', patience=1, min_delta=2.), TerminateOnNaNCallback()]
    learn = quick_fit(learner(dls, mlp(), [all_three(), *stopping], path=tmp_path), 6)
    assert len(learn.recorder.values) == 2


def test_parameter_groups(dls, mlp, quick_fit):
    def split(m): return [params(m[:4]), params(m[4:])]
    learn = learner(dls, mlp(), all_three(), splitter=split, opt_func=partial(Adam, wd=0))
    quick_fit(learn, 2, slice(1e-4, 1e-2))
    assert np.isfinite(learn.recorder.values[-1][0])


def test_another_data_set_starts_a_new_memory(mlp, quick_fit):
    a, b = digits_lt(device='cpu'), digits_lt(device='cpu', n_max=100)
    learn = quick_fit(learner(a, mlp(), all_three()), 2)
    n = len(learn.knowledge_review.teachers)
    learn.dls = b
    quick_fit(learn, 1)
    assert len(learn.knowledge_review.teachers) == len(b.train_ds) != n
    assert learn.loss_terms.history[0]['review_loss'] is None


class Opposite(Callback):
    "Add a term that opposes the loss"
    order, run_valid = 4, False
    def after_loss(self): self.learn.loss_terms.add('opposite', -.5*F.cross_entropy(self.pred, self.y))


def test_correction_of_a_term_of_the_user(dls, mlp, quick_fit):
    kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    corrected = quick_fit(learner(dls, mlp(), [KnowledgeCorrection(), Opposite()], **kwargs), 8)
    assert corrected.loss_terms.history[-1]['conflicts'] == 1.
    uncorrected = quick_fit(learner(dls, mlp(), [LossTerms(), Opposite()], **kwargs), 8)
    base_losses = [o.loss_terms.history[-1]['base_loss'] for o in (corrected, uncorrected)]
    assert base_losses[0] < base_losses[1]  # the opposite term slows down training only without correction


def torch_loader(dls):
    ds = list(zip(torch.rand(20, 1, 8, 8), range(20)))
    return dict(dls=DataLoaders(torch.utils.data.DataLoader(ds, 5), dls.valid))


def three_dimensions(dls):
    return dict(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Unflatten(1, (12, 1))))


def unreduced_loss(dls): return dict(loss_func=CrossEntropyLossFlat(reduction='none'))


def seven_outputs(dls): return dict(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))


@pytest.mark.parametrize('invalid,message', [
    (torch_loader, r'ReflectiveLearning\(kr=False\)'),
    (three_dimensions, 'expected floating point|no layer with 10'),
    (unreduced_loss, "reduction='mean'"),
    (seven_outputs, 'expected 10 classes|no layer with 10'),
], ids=name_of)
def test_invalid_input_is_named_before_the_first_step(dls, mlp, quick_fit, invalid, message):
    args = dict(dls=dls, model=mlp(), loss_func=BalancedSoftmaxLoss(dls.class_counts), cbs=all_three())
    args.update(invalid(dls))
    before = [p.detach().clone() for p in args['model'].parameters()]
    with pytest.raises((ValueError, TypeError), match=message): quick_fit(Learner(**args), 2)
    assert all((a == b).all() for a, b in zip(before, args['model'].parameters()))


class Double(Callback):
    "Convert inputs to float64"
    def before_batch(self): self.learn.xb = (self.x.double(),)


def test_a_float64_model(dls, mlp, quick_fit):
    learn = quick_fit(learner(dls, mlp().double(), [all_three(), Double()]), 3)
    assert learn.knowledge_review.teachers.store.logits.dtype == torch.float64
    assert learn.loss_terms.history[-1]['review_loss'] > 0


def test_without_fastais_default_callbacks(dls, mlp, quick_fit):
    "No CastToTensor: predictions and targets are fastai's tensor subclasses; no Recorder: no table"
    loss = BalancedSoftmaxLoss(dls.class_counts)
    learn = Learner(dls, mlp(), loss_func=loss, cbs=[TrainEvalCallback, all_three()], default_cbs=False)
    quick_fit(learn, 3)
    assert learn.loss_terms.history[-1]['review_loss'] > 0


def test_columns_suit_trackers_loggers_and_graphs(mlp, quick_fit, tmp_path):
    dls = digits_lt(device='cpu', imbalance_factor=2, bs=50)  # without Few
    trackers = [EarlyStoppingCallback(monitor='review_loss', patience=2), SaveModelCallback(monitor='summary_loss')]
    learn = quick_fit(learner(dls, mlp(), [all_three(), *trackers], path=tmp_path), 3)
    names = list(learn.recorder.metric_names)
    assert 'few' not in names
    assert names.index('valid_loss') == 2  # where ShowGraphCallback expects it
    assert names[-1] == 'time'
    assert all(isinstance(o, float) for row in learn.recorder.values for o in row)


class Labelled:
    "A data set whose targets can be changed"
    def __init__(self): self.y = [i % 5 for i in range(103)]
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return torch.tensor([float(i)]), torch.tensor(self.y[i])


def test_training_continues_after_an_alignment_error_is_fixed(quick_fit):
    ds = Labelled()
    def loaders(): return DataLoaders(*[DataLoader(ds, bs=16)]*2)
    learn = Learner(loaders(), nn.Linear(1, 5), loss_func=CrossEntropyLossFlat(), cbs=constant_review())
    quick_fit(learn)
    ds.y[3] = 1
    with pytest.raises(ValueError, match='another target'): quick_fit(learn)
    quick_fit(learn, 2)
    ds.y.append(0)  # a data set that grows starts a new memory
    learn.dls = loaders()
    quick_fit(learn)
    assert len(learn.knowledge_review.teachers) == 104


class ReplacesLoss(Callback):
    "Train with Balanced Softmax from the second epoch on"
    def before_epoch(self):
        if self.epoch == 1: self.learn.loss_func = BalancedSoftmaxLoss(self.dls.class_counts)


def test_the_reviewed_loss_is_the_current_one(dls, mlp, quick_fit):
    cbs = [constant_review(), ReplacesLoss(), MixUp()]
    learn = quick_fit(Learner(dls, mlp(), loss_func=CrossEntropyLossFlat(), cbs=cbs), 2)
    torch.testing.assert_close(learn.loss_terms.trained_logits(torch.zeros(1, 10))[0], dls.class_counts.log())


def test_another_data_set_has_other_centres(mlp, quick_fit):
    learn = quick_fit(learner(digits_lt(device='cpu'), mlp(), feature_summary()), 1)
    learn.dls = digits_lt(device='cpu', data_seed=1)
    quick_fit(learn, 1)
    assert learn.loss_terms.history[0]['summary_loss'] is None


class Halves(nn.Module):
    "A model that calls its head twice, with half of the batch each"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, x): return torch.cat([self.fc(input=o) for o in x.flatten(1).tensor_split(2)])


def test_a_head_that_sees_parts_of_a_batch_is_named(dls, quick_fit):
    learn = learner(dls, Halves(), feature_summary())
    with pytest.raises(ValueError, match='Linear was given 16 features for a batch of 32'): quick_fit(learn)


class Match(Callback):
    "Compare ids with inputs that are their own index"
    run_valid = False
    def before_batch(self): assert (self.learn.sample_ids.ids == self.x[:, 0]).all()


@pytest.mark.parametrize('shuffle', [False, True])
def test_sorted_batches_of_text_have_ids(quick_fit, shuffle):
    ds = [(torch.tensor([float(i)]), i % 2) for i in range(50)]
    dl = SortedDL(ds, bs=8, shuffle=shuffle, sort_func=lambda o: float(o[0]), num_workers=0)
    cbs = [constant_review(), Match()]
    quick_fit(Learner(DataLoaders(dl, dl), nn.Linear(1, 2), loss_func=CrossEntropyLossFlat(), cbs=cbs), 2)
    assert 'shuffle_fn' not in vars(dl)


def test_target_values_are_read_once_a_fit(dls, mlp, quick_fit, monkeypatch):
    "Always on a CPU, and on a device in the first batch; the rest of the fit does not synchronise"
    reads = []
    original = terms.check_targets
    def check_targets(*args, read=None):
        reads.append(read)
        return original(*args, read=read)
    monkeypatch.setattr(terms, 'check_targets', check_targets)
    learn = learner(dls, mlp(), constant_review())
    for n_epoch in (1, 2): quick_fit(learn, n_epoch)
    n_calls = 2*len(dls.train)+len(dls.valid)  # of an epoch, by the review and by the gap
    assert [i for i, o in enumerate(reads) if o] == [0, n_calls]
    assert len(reads) == 3*n_calls


def test_two_loss_terms_are_refused(dls, mlp, quick_fit):
    learn = learner(dls, mlp(), [constant_review(), LossTerms()])
    with pytest.raises(ValueError, match='two LossTerms'): quick_fit(learn)


class KeepTerms(KnowledgeCorrection):
    "Split the gradient and add it back unprojected, which must train like no correction"
    def before_step(self):
        for p, g in (self.learn.loss_terms.grads or {}).items(): p.grad.add_(g)
        self.learn.loss_terms.grads = None


class CancelsLate(Callback):
    "Cancel every third batch after the correction"
    order, run_valid = 20, False
    def before_step(self):
        if self.iter % 3 == 1: raise CancelBatchException


def assert_splitting_changes_nothing(fit, cbs, **kwargs):
    results = []
    for correction in ([], [KeepTerms()]):
        set_seed(0, reproducible=True)
        dls = digits_lt(device='cpu', tfms=dict(crop=0, flip=False), **kwargs)
        results.append(weights(fit(learner(dls, small_net(), [*cbs(), *correction], opt_func=SGD))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_cancel_after_the_correction_counts_no_term_twice(quick_fit):
    assert_splitting_changes_nothing(lambda learn: quick_fit(learn, 4, .05),
                                     lambda: [constant_review(weight=3.), CancelsLate()])


@pytest.mark.parametrize('n_acc', [81, 108], ids=['within an epoch', 'across epochs'])
def test_splitting_the_gradient_loses_nothing_under_accumulation(quick_fit, n_acc):
    assert_splitting_changes_nothing(lambda learn: quick_fit(learn, 5, .05),
                                     lambda: [constant_review(weight=5.), GradientAccumulation(n_acc)], bs=27)


class OverflowingInput(Callback):
    "Let the input of one batch overflow, and skip steps with gradients that are not finite"
    order, run_valid = 1, False
    skipped = 0
    def before_batch(self):
        if (self.epoch, self.iter) == (0, 2): self.learn.xb = (self.x*float('inf'),)
    def before_step(self):
        if all(p.grad.isfinite().all() for p in self.model.parameters()): return
        self.skipped += 1
        raise CancelStepException


@pytest.mark.parametrize('mode', ['add', 'replace'])
def test_an_overflow_does_not_spoil_the_summary(dls, quick_fit, mode):
    learn = quick_fit(learner(dls, small_net(), [KnowledgeSummary(mode=mode), OverflowingInput()]), 3)
    assert learn.overflowing_input.skipped == 1


class LinearWithUnused(nn.Module):
    "A linear layer, and a parameter that only a regulariser uses"
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3, bias=False)
        self.b = nn.Parameter(torch.ones(3))
    def forward(self, x): return self.a(x)


class Regularised(Opposite):
    "Add a penalty on `b` to the main loss, and an opposite term"
    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad + 3*self.model.b.square().sum()
        super().after_loss()


class ChecksGlobal(Callback):
    "Compare gradients with a global projection; the main gradient of `b` is (6, 6, 6)"
    order, run_valid = 20, False
    def before_step(self):
        g = torch.autograd.grad(F.cross_entropy(self.model.a(self.x), self.y), self.model.a.weight)[0]
        norm2 = (g*g).sum()
        coef = -.5*norm2/(norm2+3*36)
        torch.testing.assert_close(self.model.b.grad, torch.full((3,), 6.)*(1-coef))
        torch.testing.assert_close(self.model.a.weight.grad, g*(1-coef)-.5*g)


def test_global_correction_includes_parameters_of_the_main_loss_alone(quick_fit):
    ds = [(torch.randn(4), i % 3) for i in range(16)]
    dls = DataLoaders(*[DataLoader(ds, bs=16)]*2)
    cbs = [KnowledgeCorrection('global'), Regularised(), ChecksGlobal()]
    quick_fit(Learner(dls, LinearWithUnused(), loss_func=CrossEntropyLossFlat(), cbs=cbs))


def test_targets_out_of_range(quick_fit):
    ds = [(torch.rand(4), i % 5) for i in range(40)]
    dls = DataLoaders(*[DataLoader(ds, bs=8)]*2)
    learn = Learner(dls, nn.Linear(4, 3), loss_func=lambda p, y: p.sum(), cbs=all_three())
    with pytest.raises(ValueError, match='from 0 to 2, got 0 to 4'): quick_fit(learn)


def test_a_network_with_usual_names_of_attributes():
    "fastai warns of a callback that sets an attribute which the model has, such as the pixel shift of a pretrained one"
    dls = digits_lt(device='cpu')
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, dls.c))
    for name in ('shift', 'scale', 'mean', 'std', 'net'): setattr(net, name, 0.)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=ReflectiveLearning(kr=dict(prior=1.)))
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error')
        learn.fit(2, .1)
