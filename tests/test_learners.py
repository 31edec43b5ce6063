"Reflective Learning inside fastai's own machinery."
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import timm
import torch
from fastai.callback.all import (CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, SaveModelCallback, TerminateOnNaNCallback)
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import (Adam, Callback, CancelBatchException, CancelFitException, CancelStepException, CancelTrainException, CrossEntropyLossFlat, DataBlock, DataLoader,
                               DataLoaders, F, Learner, RandomSplitter, SGD, TrainEvalCallback, TransformBlock, CategoryBlock, accuracy, load_learner, nn, params,
                               set_seed, vision_learner)
from ltrl_fastai.all import (BalancedSoftmaxLoss, CifarResNet, KnowledgeCorrection, KnowledgeReview, KnowledgeSummary, LossTerms, ReflectiveLearning, SampleIds,
                             class_counts, create_net, digits_lt, shot_accuracies)
from parts import all_three
from torchvision.models import mobilenet_v3_small, resnet18

ours = (ReflectiveLearning, KnowledgeReview, KnowledgeSummary, KnowledgeCorrection, LossTerms, SampleIds)


def hooks(model): return sum(len(m._forward_pre_hooks)+len(m._forward_hooks) for m in model.modules())


def learner(dls, model, cbs=None, **kwargs):
    return Learner(dls, model, loss_func=kwargs.pop('loss_func', BalancedSoftmaxLoss(dls.class_counts)), metrics=shot_accuracies(dls.class_counts), cbs=cbs, **kwargs)


@pytest.fixture(scope='module')
def photos():
    "A few colour images of 32 by 32 pixels, through fastai's item pipeline"
    rng = np.random.RandomState(0)
    images = torch.tensor(rng.rand(48, 3, 32, 32), dtype=torch.float)
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda i: images[i], get_y=lambda i: 'abc'[i % 3], splitter=RandomSplitter(seed=0))
    return block.dataloaders(list(range(48)), bs=12, num_workers=0, device='cpu')


@pytest.mark.parametrize('arch', [resnet18, mobilenet_v3_small, 'resnet10t'], ids=lambda o: o if isinstance(o, str) else o.__name__)
def test_vision_learner(photos, quick_fit, arch):
    learn = vision_learner(photos, arch, pretrained=False, normalize=False, loss_func=BalancedSoftmaxLoss(class_counts(photos)), metrics=accuracy)
    learn.add_cbs(all_three())
    quick_fit(learn, 2, 1e-3)
    assert learn.loss_terms.history[1]['summary_loss'] > 0 and learn.knowledge_summary.centers.shape == (3, 512)
    assert learn.knowledge_review.teachers.visited.all() or photos.train.drop_last
    assert hooks(learn.model) == 0


@pytest.mark.parametrize('make', [lambda: create_net('resnet18', 3), lambda: timm.create_model('resnet10t', num_classes=3), lambda: CifarResNet(3, 8, head='cosine')],
                         ids=['torchvision', 'timm', 'cifar'])
def test_plain_learner(photos, quick_fit, make):
    learn = Learner(photos, make(), loss_func=CrossEntropyLossFlat(), cbs=all_three())
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
    learn = quick_fit(learner(dls, mlp(), ReflectiveLearning(ks=True, kc=True, preset=preset)), 4)
    h = learn.loss_terms.history[-1]
    assert all(np.isfinite(v) for v in h.values())
    assert 'conflicts' in learn.recorder.metric_names and dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['all'] > .4


@pytest.mark.parametrize('cbs', [[MixUp()], [GradientAccumulation(64)], [GradientClip(.1)], [GradientAccumulation(64), GradientClip(.1), MixUp()]],
                         ids=['mixup', 'accumulate', 'clip', 'all'])
@pytest.mark.parametrize('first', [True, False], ids=['ours first', 'ours last'])
def test_beside_other_callbacks(dls, mlp, quick_fit, cbs, first):
    cbs = [all_three(), *cbs] if first else [*cbs, ReflectiveLearning(ks=True, kc=True)]
    learn = quick_fit(learner(dls, mlp(), cbs), 3)
    assert np.isfinite(learn.recorder.values[-1][0])
    assert isinstance(learn.loss_func, BalancedSoftmaxLoss)


def test_adding_order_does_not_matter(quick_fit, mlp):
    def weights(*cbs):
        set_seed(0, reproducible=True)
        dls = digits_lt(device='cpu')
        return torch.cat([p.flatten() for p in quick_fit(learner(dls, mlp(), list(cbs)), 3).model.parameters()])
    a = weights(KnowledgeReview(adapt=0., memory=0.), KnowledgeSummary(adapt=6., resemblance='features'), KnowledgeCorrection(), GradientAccumulation(64), GradientClip(.5))
    b = weights(GradientClip(.5), GradientAccumulation(64), KnowledgeCorrection(), KnowledgeSummary(adapt=6., resemblance='features'), KnowledgeReview(adapt=0., memory=0.))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class CpuAMP(MixedPrecision):
    "fastai's MixedPrecision is for CUDA alone; this is the same on a CPU"
    def before_fit(self):
        super().before_fit()
        dtype = torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16
        self.autocast, self.learn.scaler = torch.autocast('cpu', dtype=dtype), torch.amp.GradScaler('cpu', **{**self.kwargs, 'enabled': dtype == torch.float16})


@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision_drops_nothing(dls, mlp, quick_fit, mode):
    learn = quick_fit(learner(dls, mlp(), [all_three(), CpuAMP(mode)]), 3)
    h = learn.loss_terms.history[-1]
    assert h['review_loss'] > 0 and h['summary_loss'] > 0 and np.isfinite(h['base_loss'])
    assert learn.knowledge_review.teachers.store.logits.dtype == torch.float32


def test_mixed_precision_corrects_as_full_precision_does(quick_fit, mlp):
    "The scaled step equals the unscaled one"
    class Bf16(CpuAMP):
        "A loss scale without low precision"
        def before_fit(self):
            super().before_fit()
            self.autocast, self.learn.scaler = torch.autocast('cpu', enabled=False), torch.amp.GradScaler('cpu', init_scale=4096.)
    def weights(*cbs):
        set_seed(0, reproducible=True)
        dls = digits_lt(device='cpu')
        return torch.cat([p.flatten() for p in quick_fit(learner(dls, mlp(), [all_three(), *cbs], opt_func=SGD), 3, 1e-1).model.parameters()])
    torch.testing.assert_close(weights(), weights(Bf16()), rtol=1e-4, atol=1e-5)


def test_an_overflow_leaves_no_teacher(dls, mlp, quick_fit):
    class Overflow(Callback):
        order, run_valid = 1, False
        def after_pred(self):
            if self.iter == 2 and self.epoch == 0: self.learn.pred = self.pred*float('inf')
        def before_step(self):
            if self.iter == 2 and self.epoch == 0: raise CancelStepException
    learn = learner(dls, mlp(), [KnowledgeReview(adapt=0., memory=0.), Overflow()])
    quick_fit(learn, 1)
    assert (~learn.knowledge_review.teachers.seen).sum() == 32
    quick_fit(learn, 2)
    assert learn.knowledge_review.teachers.seen.all() and np.isfinite(learn.loss_terms.history[-1]['review_loss'])


@contextmanager
def stops(kind):
    if kind is None: yield
    else:
        with pytest.raises(kind): yield


events = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step']
ends = [(o, e) for o in (KeyboardInterrupt, RuntimeError, CancelFitException) for e in (*events, 'after_batch', 'after_train')]
ends += [(CancelBatchException, e) for e in events] + [(CancelTrainException, e) for e in (*events, 'after_batch')]


@pytest.mark.parametrize('exc,event', ends, ids=lambda o: o if isinstance(o, str) else o.__name__)
def test_an_end_in_the_middle_leaves_nothing_and_training_goes_on(dls, mlp, quick_fit, event, exc):
    class Stop(Callback):
        order, run_valid, armed = -50, False, True
    def stop(self):
        if self.armed and self.epoch == 1 and (self.iter == 3 or event == 'after_train'):
            self.armed = False
            raise exc('stop')
    setattr(Stop, event, stop)
    learn = learner(dls, mlp(), [all_three(), Stop()])
    with stops(exc if exc in (KeyboardInterrupt, RuntimeError) else None): quick_fit(learn, 3)
    if learn.opt: learn.opt.zero_grad()
    preds = learn.get_preds(dl=dls.test)[0]
    assert hooks(learn.model) == 0 and 'get_idxs' not in vars(dls.train)
    with learn.removed_cbs(learn.reflective_learning): assert (learn.get_preds(dl=dls.test)[0] == preds).all()
    quick_fit(learn, 2)
    assert np.isfinite(learn.loss_terms.history[-1]['review_loss']) and hooks(learn.model) == 0
    learn.remove_cbs(ReflectiveLearning)
    assert not any(isinstance(cb, ours) for cb in learn.cbs)


def test_predictions_are_those_without_our_callbacks(mlp, quick_fit):
    dls = digits_lt(device='cpu', tfms=dict(crop=0, flip=False))  # fastai augments whatever comes from the training set
    learn = quick_fit(learner(dls, mlp(), all_three()), 2)
    memory = learn.knowledge_review.teachers.store.logits.clone()
    def everything(): return [*learn.get_preds(ds_idx=0), *learn.get_preds(dl=dls.test), torch.tensor([0. if o is None else o for o in learn.validate()]),
                              learn.predict(dls.test.dataset.images[0])[2]]
    ours = everything()
    with learn.removed_cbs(learn.reflective_learning): theirs = everything()
    assert all((a == b).all() for a, b in zip(ours, theirs))
    assert (learn.knowledge_review.teachers.store.logits == memory).all()


def test_export_carries_no_memories(dls, mlp, quick_fit, tmp_path):
    sizes = []
    for cbs in (None, all_three()):
        learn = quick_fit(learner(dls, mlp(), cbs, path=tmp_path), 2)
        learn.export(f'{len(sizes)}.pkl')
        sizes.append((tmp_path/f'{len(sizes)}.pkl').stat().st_size)
        loaded = load_learner(tmp_path/f'{len(sizes)-1}.pkl')
        x = dls.test.dataset.images[3]
        assert (loaded.predict(x)[2] == learn.predict(x)[2]).all()
    assert sizes[1]-sizes[0] < 20_000, sizes
    assert learn.knowledge_review.teachers is not None  # this learner still has them


def test_the_table_stays_in_line(dls, mlp, quick_fit, tmp_path):
    for train_metrics in (False, True):
        learn = learner(dls, mlp(), [all_three(), CSVLogger('log.csv'), SaveModelCallback(monitor='valid_all' if train_metrics else 'all')],
                        path=tmp_path)
        learn.recorder.train_metrics = train_metrics
        quick_fit(learn, 3)
        names, values = learn.recorder.metric_names, learn.recorder.values
        assert all(len(v) == len(names)-2 for v in values)
        row = dict(zip(names[1:], values[-1]))
        means = learn.loss_terms.history[-1]
        assert all(row[k] == means[k] for k in means) and row['train_loss'] > 0
        learn.recorder.plot_loss()
        header, *lines = (tmp_path/'log.csv').read_text().splitlines()
        assert all(line.count(',') == header.count(',') for line in lines)


def test_stopping_callbacks(dls, mlp, quick_fit, tmp_path):
    learn = learner(dls, mlp(), [all_three(), EarlyStoppingCallback(monitor='all', patience=1, min_delta=2.), TerminateOnNaNCallback()], path=tmp_path)
    quick_fit(learn, 6)
    assert len(learn.recorder.values) == 2


def test_parameter_groups(dls, mlp, quick_fit):
    split = lambda m: [params(m[:4]), params(m[4:])]
    learn = quick_fit(learner(dls, mlp(), all_three(), splitter=split, opt_func=partial(Adam, wd=0)), 2, slice(1e-4, 1e-2))
    assert np.isfinite(learn.recorder.values[-1][0])


def test_another_data_set_starts_a_new_memory(mlp, quick_fit):
    a, b = digits_lt(device='cpu'), digits_lt(device='cpu', n_max=100)
    learn = quick_fit(learner(a, mlp(), all_three()), 2)
    n = len(learn.knowledge_review.teachers)
    learn.dls = b
    quick_fit(learn, 1)
    assert len(learn.knowledge_review.teachers) == len(b.train_ds) != n
    assert learn.loss_terms.history[0]['review_loss'] is None


def test_correction_of_a_term_of_ones_own(dls, mlp, quick_fit):
    "Knowledge Correction alone: it corrects whatever was added as a term"
    class Opposite(Callback):
        order, run_valid = 4, False
        def after_loss(self): self.learn.loss_terms.add('opposite', -.5*F.cross_entropy(self.pred, self.y))
    kw = dict(loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    learn = quick_fit(learner(dls, mlp(), [KnowledgeCorrection(), Opposite()], **kw), 3)
    assert learn.loss_terms.history[-1]['conflicts'] == 1.
    free = quick_fit(learner(dls, mlp(), [LossTerms(), Opposite()], **kw), 3)
    assert learn.loss_terms.history[-1]['base_loss'] < free.loss_terms.history[-1]['base_loss']  # the opposite term holds back only the net that is not corrected


@pytest.mark.parametrize('bad,said', [
    (lambda dls, net: dict(dls=DataLoaders(torch.utils.data.DataLoader(list(zip(torch.rand(20, 1, 8, 8), range(20))), 5), dls.valid)), 'ReflectiveLearning\\(kr=False\\)'),
    (lambda dls, net: dict(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Unflatten(1, (12, 1)))), 'expected floating point|no layer with 10'),
    (lambda dls, net: dict(loss_func=CrossEntropyLossFlat(reduction='none')), "reduction='mean'"),
    (lambda dls, net: dict(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 7))), 'expected 10 classes|no layer with 10'),
], ids=['loader', 'logits', 'loss', 'classes'])
def test_bad_input_is_named(dls, mlp, quick_fit, bad, said):
    kw = dict(dls=dls, model=mlp(), loss_func=BalancedSoftmaxLoss(dls.class_counts))
    before = {**kw, **bad(dls, mlp)}
    weights = [p.detach().clone() for p in before['model'].parameters()]
    with pytest.raises((ValueError, TypeError), match=said):
        learn = Learner(before['dls'], before['model'], loss_func=before['loss_func'], cbs=all_three())
        quick_fit(learn, 2)
    assert all((a == b).all() for a, b in zip(weights, before['model'].parameters()))  # no step was made


def test_a_float64_model(dls, mlp, quick_fit):
    class Double(Callback):
        def before_batch(self): self.learn.xb = (self.x.double(),)
    learn = quick_fit(learner(dls, mlp().double(), [all_three(), Double()]), 3)
    assert learn.knowledge_review.teachers.store.logits.dtype == torch.float64 and learn.loss_terms.history[-1]['review_loss'] > 0


def test_without_fastais_default_callbacks(dls, mlp, quick_fit):
    "No CastToTensor: predictions and targets are fastai's tensor subclasses; no Recorder: no table"
    learn = Learner(dls, mlp(), loss_func=BalancedSoftmaxLoss(dls.class_counts), cbs=[TrainEvalCallback, all_three()], default_cbs=False)
    quick_fit(learn, 3)
    assert learn.loss_terms.history[-1]['review_loss'] > 0


def test_trackers_loggers_and_graphs_find_numbers_where_they_look(mlp, quick_fit, tmp_path):
    dls = digits_lt(device='cpu', imbalance_factor=2, bs=50)  # no Few
    learn = learner(dls, mlp(), [all_three(), EarlyStoppingCallback(monitor='review_loss', patience=2),
                                 SaveModelCallback(monitor='summary_loss')], path=tmp_path)
    quick_fit(learn, 3)
    names = list(learn.recorder.metric_names)
    assert 'few' not in names and names.index('valid_loss') == 2 and names[-1] == 'time'  # ShowGraphCallback takes the second value for valid_loss
    assert all(isinstance(o, float) for row in learn.recorder.values for o in row)


def test_an_alignment_error_ends_with_its_cause(quick_fit):
    class Labelled:
        y = [i % 5 for i in range(103)]
        def __len__(self): return len(self.y)
        def __getitem__(self, i): return torch.tensor([float(i)]), torch.tensor(self.y[i])
    ds = Labelled()
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=16)]*2), nn.Linear(1, 5), loss_func=CrossEntropyLossFlat(), cbs=KnowledgeReview(adapt=0., memory=0.))
    quick_fit(learn)
    ds.y[3] = 1
    with pytest.raises(ValueError, match='another target'): quick_fit(learn)
    quick_fit(learn, 2)
    ds.y.append(0)  # a data set that grows starts a new memory
    learn.dls = DataLoaders(*[DataLoader(ds, bs=16)]*2)
    quick_fit(learn)
    assert len(learn.knowledge_review.teachers) == 104


def test_a_loss_that_is_swapped_in_is_the_one_that_is_reviewed(dls, mlp, quick_fit):
    class Deferred(Callback):
        def before_epoch(self):
            if self.epoch == 1: self.learn.loss_func = BalancedSoftmaxLoss(self.dls.class_counts)
    learn = quick_fit(Learner(dls, mlp(), loss_func=CrossEntropyLossFlat(), cbs=[KnowledgeReview(adapt=0., memory=0.), Deferred(), MixUp()]), 2)
    torch.testing.assert_close(learn.loss_terms.trained_logits(torch.zeros(1, 10))[0], dls.class_counts.log())


def test_another_data_set_has_other_centres(mlp, quick_fit):
    learn = quick_fit(learner(digits_lt(device='cpu'), mlp(), KnowledgeSummary(adapt=6., resemblance='features')), 1)
    learn.dls = digits_lt(device='cpu', data_seed=1)
    quick_fit(learn, 1)
    assert learn.loss_terms.history[0]['summary_loss'] is None


def test_a_head_that_sees_parts_of_a_batch_is_named(dls, quick_fit):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)
        def forward(self, x): return torch.cat([self.fc(input=o) for o in x.flatten(1).tensor_split(2)])
    with pytest.raises(ValueError, match='Linear was given 16 features for a batch of 32'): quick_fit(learner(dls, Halves(), KnowledgeSummary(adapt=6., resemblance='features')))


def test_sorted_batches_of_text_have_ids(quick_fit):
    from fastai.text.data import SortedDL
    ds = [(torch.tensor([float(i)]), i % 2) for i in range(50)]
    class Match(Callback):
        run_valid = False
        def before_batch(self): assert (self.learn.sample_ids.ids == self.x[:, 0]).all()
    for shuffle in (False, True):
        dl = SortedDL(ds, bs=8, shuffle=shuffle, sort_func=lambda o: float(o[0]), num_workers=0)
        quick_fit(Learner(DataLoaders(dl, dl), nn.Linear(1, 2), loss_func=CrossEntropyLossFlat(), cbs=[KnowledgeReview(adapt=0., memory=0.), Match()]), 2)
        assert 'shuffle_fn' not in vars(dl)


def test_target_values_are_looked_at_once_a_fit(dls, mlp, quick_fit, monkeypatch):
    "On a CPU always, on a device in the first batch: the rest of the fit waits for nothing"
    import ltrl_fastai.reflective.terms as terms
    reads, check = [], terms.check_targets
    monkeypatch.setattr(terms, 'check_targets', lambda *args, read=None: reads.append(read) or check(*args, read=read))
    learn = learner(dls, mlp(), KnowledgeReview(adapt=0., memory=0.))
    for n in (1, 2): quick_fit(learn, n)
    batches = 2*len(dls.train)+len(dls.valid)  # by the review and by the gap
    assert [i for i, o in enumerate(reads) if o] == [0, batches] and len(reads) == 3*batches


def test_two_bookkeepers_are_refused(dls, mlp, quick_fit):
    with pytest.raises(ValueError, match='two LossTerms'): quick_fit(learner(dls, mlp(), [KnowledgeReview(adapt=0., memory=0.), LossTerms()]))


class Late(Callback):
    "Cancels every third batch after the correction was made"
    order, run_valid = 20, False
    def before_step(self):
        if self.iter % 3 == 1: raise CancelBatchException


def test_a_cancel_after_the_correction_counts_no_term_twice(quick_fit):
    def weights(*cbs):
        set_seed(0, reproducible=True)
        dls = digits_lt(device='cpu', tfms=dict(crop=0, flip=False))
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        learn = learner(dls, net, [KnowledgeReview(adapt=0., memory=0., weight=3.), Late(), *cbs], opt_func=SGD)
        return torch.cat([p.detach().flatten() for p in quick_fit(learn, 4, .05).model.parameters()])
    torch.testing.assert_close(weights(), weights(KeepTerms()), rtol=1e-4, atol=1e-5)


class KeepTerms(KnowledgeCorrection):
    "Splits the gradient and puts it back unprojected: must train as no correction at all"
    def before_step(self):
        for p, g in (self.learn.loss_terms.grads or {}).items(): p.grad.add_(g)
        self.learn.loss_terms.grads = None


@pytest.mark.parametrize('n_acc', [81, 108], ids=['fits the epoch', 'reaches over it'])
def test_splitting_the_gradient_loses_nothing_under_accumulation(quick_fit, n_acc):
    def weights(*cbs):
        set_seed(0, reproducible=True)
        dls = digits_lt(device='cpu', bs=27, tfms=dict(crop=0, flip=False))
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        cbs = [KnowledgeReview(adapt=0., memory=0., weight=5.), GradientAccumulation(n_acc), *cbs]
        return torch.cat([p.detach().flatten() for p in quick_fit(learner(dls, net, cbs, opt_func=SGD), 5, .05).model.parameters()])
    torch.testing.assert_close(weights(), weights(KeepTerms()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('ks', [dict(), dict(mode='replace')], ids=['add', 'replace'])
def test_an_overflow_does_not_spoil_the_summary(dls, quick_fit, ks):
    class Overflow(Callback):
        order, run_valid, skipped = 1, False, 0
        def before_batch(self):
            if self.iter == 2 and self.epoch == 0: self.learn.xb = (self.x*float('inf'),)
        def before_step(self):
            if not all(p.grad.isfinite().all() for p in self.model.parameters()):
                self.skipped += 1
                raise CancelStepException
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    assert quick_fit(learner(dls, net, [KnowledgeSummary(**ks), Overflow()]), 3).overflow.skipped == 1


def test_global_correction_reaches_parameters_of_the_main_loss_alone(quick_fit):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, bias=False), nn.Parameter(torch.ones(3))
        def forward(self, x): return self.a(x)
    class Terms(Callback):
        order, run_valid = 4, False
        def after_loss(self):
            self.learn.loss_grad = self.learn.loss_grad + 3*self.model.b.square().sum()
            self.learn.loss_terms.add('opposite', -.5*F.cross_entropy(self.pred, self.y))
    class Check(Callback):
        order, run_valid = 20, False
        def before_step(self):
            g = torch.autograd.grad(F.cross_entropy(self.model.a(self.x), self.y), self.model.a.weight)[0]
            c = -.5*(g*g).sum()/((g*g).sum()+3*36)  # of all parameters: the main gradient of b is (6, 6, 6)
            torch.testing.assert_close(self.model.b.grad, torch.full((3,), 6.)*(1-c))
            torch.testing.assert_close(self.model.a.weight.grad, g*(1-c)-.5*g)
    ds = [(torch.randn(4), i % 3) for i in range(16)]
    quick_fit(Learner(DataLoaders(*[DataLoader(ds, bs=16)]*2), Net(), loss_func=CrossEntropyLossFlat(), cbs=[KnowledgeCorrection('global'), Terms(), Check()]))


def test_targets_out_of_range(quick_fit):
    ds = [(torch.rand(4), i % 5) for i in range(40)]
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=8)]*2), nn.Linear(4, 3), loss_func=lambda p, y: p.sum(), cbs=all_three())
    with pytest.raises(ValueError, match='from 0 to 2, got 0 to 4'): quick_fit(learn)
