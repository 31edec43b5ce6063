"Review and summary follow the generalization gap; they are off if it cannot be measured or the loss is uneven."
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from ltrl_fastai.all import (BalancedSoftmaxLoss, Checkpoint, DeferredWeights, KnowledgeReview, KnowledgeSummary,
                             LDAMLoss, ReflectiveLearning, class_counts, create_net, digits_lt, methods)
from ltrl_fastai.reflective import review
from ltrl_fastai.reflective.gap import GeneralizationGap, balanced_accuracies, unevenness
from ltrl_fastai.reflective.review import review_risks

epochs = 25


def small_counts(): return class_counts(digits_lt(device='cpu', n_max=40))


def learner(cbs, loss=None, dls=None, seed=1):
    set_seed(seed, reproducible=True)
    dls = dls or digits_lt(device='cpu', n_max=40, bs=16)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return Learner(dls, net, loss_func=loss or BalancedSoftmaxLoss(small_counts()), cbs=cbs)


def fit(learn, n=epochs, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 5e-3, **kwargs)
    return learn


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def accuracy(outcomes): return sum(outcomes)/len(outcomes)


class Reference(Callback):
    "Compute the expected strength from accuracies by class in training and validation"
    order, run_valid = 20, True
    def __init__(self):
        self.train_outcomes, self.valid_outcomes = [], []  # (class, whether correct) of each sample
        self.train_accuracies = []
        self.best_valid = 0.
        self.strengths, self.expected = [], [None]
    def before_train(self):
        strength = self.learn.generalization_gap.strength
        self.strengths.append(None if strength is None else strength.item())
        self.train_outcomes = []
    def before_validate(self): self.valid_outcomes = []
    def after_loss(self):
        outcomes = self.train_outcomes if self.training else self.valid_outcomes
        outcomes += zip(self.y.tolist(), (self.pred.argmax(1) == self.y).tolist())
    def after_epoch(self):
        by_class = []
        for c in range(10):
            train, valid = [[right for y, right in o if y == c] for o in (self.train_outcomes, self.valid_outcomes)]
            if train and len(valid) >= 3: by_class.append((accuracy(train), accuracy(valid)))
        train, valid = [accuracy(o) for o in zip(*by_class)]
        self.train_accuracies.append(train)
        self.best_valid = max(self.best_valid, valid)
        self.expected.append(max(0., train-self.best_valid))


def test_strength_is_the_gap_of_the_last_epoch():
    learn = fit(learner([ReflectiveLearning(), Reference()]))
    reference = learn.reference
    assert reference.strengths[0] is None
    assert reference.strengths[1:] == pytest.approx(reference.expected[1:-1], abs=1e-6)
    assert max(reference.strengths[1:]) > .05
    weight = [o['review_weight'] for o in learn.loss_terms.history]
    want = [4*s*a**4 for s, a in zip(reference.strengths[1:], reference.train_accuracies)]
    assert weight == pytest.approx([0., *want], abs=1e-5)


uneven = dict(
    softmax=CrossEntropyLossFlat,
    tau=lambda: BalancedSoftmaxLoss(class_counts(digits_lt(device='cpu')), tau=2.),
    ldam=lambda: LDAMLoss(class_counts(digits_lt(device='cpu'))),
    inverted=lambda: CrossEntropyLossFlat(weight=torch.linspace(1, 60, 10)**2),
)


@pytest.mark.parametrize('loss', uneven)
def test_an_uneven_loss_leaves_training_unchanged_to_the_bit(loss, capsys):
    loss = uneven[loss]()
    with_rl = fit(learner(ReflectiveLearning(), loss), 4)
    printed = capsys.readouterr().out
    assert torch.equal(weights(with_rl), weights(fit(learner(None, loss), 4)))
    assert printed.count('Reflective Learning is off') == 1
    assert 'does not treat classes evenly' in printed


even = dict(bsce=lambda: None, weighted=lambda: CrossEntropyLossFlat(weight=1/small_counts().float()))


@pytest.mark.parametrize('loss', even)
def test_the_parts_act_under_an_even_loss(loss, capsys):
    loss = even[loss]()
    acting = fit(learner(ReflectiveLearning(), loss))
    assert not torch.equal(weights(acting), weights(fit(learner(None, loss))))
    assert 'is off' not in capsys.readouterr().out


def test_the_parts_rest_without_validation_images(capsys):
    train_only = digits_lt(device='cpu', n_max=40, bs=16)
    train_only = DataLoaders(train_only.train, device='cpu')
    learn = learner(ReflectiveLearning(), dls=train_only)
    with pytest.raises(IndexError): _ = learn.dls.valid
    learn._do_epoch_validate = lambda *args, **kwargs: None
    fit(learn, 3)
    assert 'no validation images' in capsys.readouterr().out
    assert [o['review_weight'] for o in learn.loss_terms.history] == [0., 0., 0.]


def test_a_fixed_strength_acts_and_prints_nothing(capsys):
    rl = ReflectiveLearning(kr=dict(weight=1., adapt=0.), ks=dict(adapt=0.))
    learn = fit(learner(rl, CrossEntropyLossFlat()), 3)
    assert 'is off' not in capsys.readouterr().out
    assert learn.loss_terms.history[1]['review_loss'] > 0


class ValidatesElsewhere(Callback):
    "Validate with another learner, in the middle of each epoch and at its end"
    def after_batch(self):
        if self.training and self.iter == 3: self.validate_elsewhere()
    def after_epoch(self): self.validate_elsewhere()
    def validate_elsewhere(self):
        state = torch.get_rng_state()
        learn = Learner(self.learn.dls, self.learn.model, loss_func=self.learn.loss_func)
        with learn.no_bar(), learn.no_logging(): learn.validate()
        self.learn.model.train()
        torch.set_rng_state(state)


def test_validation_elsewhere_changes_nothing():
    a, b = [fit(learner([ReflectiveLearning(), *cbs])) for cbs in ([], [ValidatesElsewhere()])]
    assert torch.equal(weights(a), weights(b))


class Interrupt(Callback):
    "Interrupt the fit before epoch 20"
    def before_epoch(self):
        if self.epoch == 20: raise KeyboardInterrupt


def test_an_interrupted_fit_resumes_with_the_same_result(tmp_path):
    whole = fit(learner(ReflectiveLearning()))
    file = tmp_path/'checkpoint.pth'
    with pytest.raises(KeyboardInterrupt): fit(learner([ReflectiveLearning(), Checkpoint(file), Interrupt()]))
    resumed = fit(learner([ReflectiveLearning(), Checkpoint(file)]))
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.loss_terms.history[-1] == resumed.loss_terms.history[-1]


class ComparesSummary(Callback):
    "Compare the summary with soft labels computed here"
    order, run_valid = 20, False
    n_softened = 0
    def after_loss(self):
        terms = self.learn.loss_terms.terms
        if 'summary' not in terms: return
        share = min(.3, 2*self.learn.generalization_gap.strength.item())
        onehot = F.one_hot(self.y, 10).float()
        soft = (1-share)*onehot+share*self.learn.knowledge_summary.predictions[self.y]
        logits = self.learn.loss_func.trained_logits(self.pred)
        want = -((soft-onehot)*F.log_softmax(logits, 1)).sum(1).mean()
        torch.testing.assert_close(terms['summary'], want, rtol=1e-4, atol=1e-6)
        self.n_softened += share > 0


def test_the_summary_softens_by_twice_the_gap():
    learn = fit(learner([KnowledgeSummary(), ComparesSummary()]))
    assert learn.compares_summary.n_softened > 20


@pytest.mark.parametrize('part', [KnowledgeReview, KnowledgeSummary])
def test_each_part_adds_the_gap_and_removes_it(part):
    learn = learner(part())
    assert len(learn._grab_cbs(GeneralizationGap)) == 1
    learn.remove_cbs(part)
    assert not learn._grab_cbs(GeneralizationGap)


def test_accuracies_of_counts():
    train = torch.tensor([[5., 4.], [5., 4.]])
    valid = torch.tensor([[3., 1.], [4., 2.]])
    assert balanced_accuracies(train, valid).tolist() == [1., .75]
    assert balanced_accuracies(train, valid, min_images=1).tolist() == [1., .625]
    assert balanced_accuracies(torch.zeros(2, 2), valid).tolist() == [0., 0.]


class SpoilsValidation(Callback):
    "Invert validation predictions from epoch 10 on"
    order, run_valid = -30, True
    def after_pred(self):
        if not self.training and self.epoch >= 10: self.learn.pred = -self.pred


def test_a_falling_validation_accuracy_does_not_strengthen_the_parts():
    learn = fit(learner([ReflectiveLearning(), SpoilsValidation(), Reference()]))
    n_right, n_all = learn.generalization_gap.valid_counts.sum(1)
    assert n_right < .2*n_all
    assert 0 < max(learn.reference.strengths[12:]) < .5


def test_unevenness_leaves_out_classes_without_images():
    counts = torch.tensor([100., 10., 0.])
    assert unevenness(counts, CrossEntropyLossFlat()) == pytest.approx(counts[:2].log().std(unbiased=False).item())


class RecordsSummary(Callback):
    "Keep the summary term, prediction and targets of each batch after the first epoch"
    order, run_valid = 20, False
    def before_fit(self): self.batches = []
    def before_train(self): self.similarity = self.learn.knowledge_summary.similarity
    def after_loss(self):
        if self.epoch: self.batches.append((self.learn.loss_terms.terms.get('summary'), self.learn.pred, self.y))


def published_summary(method):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=40)
    cbs = [ReflectiveLearning(preset='published', kc=False), RecordsSummary()]
    learn = methods[method].learner(dls, create_net('resnet8', 10, n_in=1), cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert learn.records_summary.batches
    return learn


def test_fault_26_published_softens_the_label_of_each_expert_of_sade():
    learn = published_summary('sade')
    for summary, pred, y in learn.records_summary.batches:
        onehot = F.one_hot(y, 10).float()
        soft = .99*onehot+.01*learn.records_summary.similarity.softmax(1)[y]
        of_experts = learn.loss_func.summary_logits(pred)
        assert len(of_experts) == 3
        want = sum(-((soft-onehot)*z.log_softmax(1)).sum(1).mean() for z in of_experts)
        torch.testing.assert_close(summary, want, rtol=1e-4, atol=1e-6)


def test_fault_26_published_softens_nothing_of_ride():
    batches = published_summary('ride').records_summary.batches
    assert all(summary is None for summary, _, _ in batches)


def log_frequency(counts):
    counts = torch.tensor(counts)
    return (counts/counts.mean()).log()


@pytest.mark.parametrize('tau,prior', [(1.5, 1.), (1., 1.5)])
def test_a_prior_that_adds_to_the_one_of_the_loss_is_a_risk(tau, prior):
    counts = [100., 30., 10., 3.]
    loss = BalancedSoftmaxLoss(counts, tau=tau)
    risk, = review_risks(log_frequency(counts), loss, prior=prior, adapt='auto', n_steps=10_000)
    assert f'{prior:g} times more' in risk
    assert f'adds {tau:.2g} times' in risk


@pytest.mark.parametrize('tau,prior', [(1., 1.), (1.5, .5), (3., 0.)])
def test_a_small_prior_is_no_risk(tau, prior):
    counts = [100., 30., 10., 3.]
    loss = BalancedSoftmaxLoss(counts, tau=tau)
    assert review_risks(log_frequency(counts), loss, prior=prior, adapt='auto', n_steps=10_000) == []


@pytest.mark.parametrize('counts,adapt,n_steps,texts', [
    ([80., 10., 10.], 6., 1000, ['80% of the training images']),
    ([80., 10., 10.], 'auto', 1000, []),
    ([80., 10., 10.], 0., 1000, []),
    ([40., 30., 30.], 6., 60, ['fewer than 150 steps']),
    ([40., 30., 30.], 6., 1000, []),
])
def test_risks_of_a_fixed_strength(counts, adapt, n_steps, texts):
    risks = review_risks(log_frequency(counts), BalancedSoftmaxLoss(counts), prior=0., adapt=adapt, n_steps=n_steps)
    assert len(risks) == len(texts)
    for text, risk in zip(texts, risks): assert text in risk


def review_warnings(recorded): return [str(o.message) for o in recorded if 'Knowledge Review' in str(o.message)]


def test_a_risk_is_warned_of_once(recwarn):
    learn = fit(learner(ReflectiveLearning(preset='v0.0.1')), 4)
    fit(learn, 3)
    warning, = review_warnings(recwarn)
    assert 'fewer than 150 steps' in warning


def test_risks_are_checked_once_a_fit(monkeypatch):
    "Since that reads from the device"
    n_steps = []
    monkeypatch.setattr(review, 'review_risks', lambda *args: n_steps.append(args[-1]) or [])
    learn = learner(ReflectiveLearning(preset='v0.0.1'))
    for n in (4, 3): fit(learn, n)
    assert n_steps == [n*len(learn.dls.train) for n in (4, 3)]


def test_the_default_causes_no_warning(recwarn):
    fit(learner(ReflectiveLearning()), 4)
    assert review_warnings(recwarn) == []


def with_deferred_weights(cbs):
    "A learner whose cross-entropy treats classes evenly from the second half of a fit on"
    return learner([DeferredWeights(small_counts(), start=.5), *cbs], loss=CrossEntropyLossFlat())


def test_a_fit_that_begins_under_an_uneven_loss_is_left_alone():
    "Bit for bit, although class weights make the loss even later; a fit with an even loss begins with new teachers"
    plain = fit(with_deferred_weights([]), 16)
    learn = fit(with_deferred_weights([ReflectiveLearning()]), 16)
    assert weights(learn).equal(weights(plain))
    assert 'did not treat classes evenly' in learn.generalization_gap.why_off
    of_uneven_loss = learn.knowledge_review.teachers
    learn.remove_cbs(DeferredWeights)
    learn.loss_func = BalancedSoftmaxLoss(small_counts())
    fit(learn, 16)
    assert learn.generalization_gap.why_off is None
    assert learn.knowledge_review.teachers is not of_uneven_loss
    review_weights = [o['review_weight'] for o in learn.loss_terms.history]
    assert review_weights[0] == 0 and any(review_weights)


def test_a_fit_is_resumed_at_the_turn_to_an_even_loss(tmp_path):
    "What the last epoch's loss was is in the checkpoint"
    class StopAfter(Callback):
        def __init__(self, epoch): self.last = epoch
        def after_epoch(self):
            if self.epoch == self.last: raise KeyboardInterrupt
    whole = fit(with_deferred_weights([ReflectiveLearning()]), 16)
    file = tmp_path/'fit.pt'
    with pytest.raises(KeyboardInterrupt):
        fit(with_deferred_weights([ReflectiveLearning(), Checkpoint(file), StopAfter(8)]), 16)
    again = fit(with_deferred_weights([ReflectiveLearning(), Checkpoint(file)]), 16)
    assert weights(again).equal(weights(whole))
