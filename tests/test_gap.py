"Review and summary follow the generalization gap, and rest where it can't be measured or the loss is uneven."
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from ltrl_fastai.all import (BalancedSoftmaxLoss, Checkpoint, KnowledgeReview, KnowledgeSummary, LDAMLoss, ReflectiveLearning, class_counts,
                             digits_lt, methods)
from ltrl_fastai.reflective.gap import GeneralizationGap, balanced_accuracies, unevenness
from ltrl_fastai.reflective.review import review_risks

epochs = 25


def learner(cbs, loss=None, dls=None, seed=1):
    set_seed(seed, reproducible=True)
    dls = dls or digits_lt(device='cpu', n_max=40, bs=16)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return Learner(dls, net, loss_func=loss or BalancedSoftmaxLoss(class_counts(digits_lt(device='cpu', n_max=40))), cbs=cbs)


def fit(learn, n=epochs, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 5e-3, **kwargs)
    return learn


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


class Notes(Callback):
    "Accuracies by class, counted here: of the training passes, and of validation"
    run_valid, order, best, fitted = True, 20, 0., ()
    def __init__(self): self.train, self.valid, self.strengths, self.expected = [], [], [], [None]
    def before_train(self):
        s = self.learn.generalization_gap.strength
        self.strengths.append(None if s is None else s.item())
        self.train = []
    def before_validate(self): self.valid = []
    def after_loss(self):
        kept = self.train if self.training else self.valid
        kept += list(zip(self.y.tolist(), (self.pred.argmax(1) == self.y).tolist()))
    def after_epoch(self):
        both = []
        for c in range(10):
            train, valid = [[right for y, right in o if y == c] for o in (self.train, self.valid)]
            if train and len(valid) >= 3: both.append((sum(train)/len(train), sum(valid)/len(valid)))
        train, valid = [sum(o)/len(o) for o in zip(*both)]
        self.fitted = [*self.fitted, train]
        self.best = max(self.best, valid)
        self.expected.append(max(0., train-self.best))


def test_strength_is_the_gap_of_the_last_epoch():
    learn = fit(learner([ReflectiveLearning(), Notes()]))
    assert learn.notes.strengths[0] is None and learn.notes.strengths[1:] == pytest.approx(learn.notes.expected[1:-1], abs=1e-6)
    assert max(learn.notes.strengths[1:]) > .05
    weight = [o['review_weight'] for o in learn.loss_terms.history]
    assert weight == pytest.approx([4*(o or 0.)*a**4 for o, a in zip(learn.notes.strengths, [0., *learn.notes.fitted])], abs=1e-5)


def uneven(): return dict(softmax=CrossEntropyLossFlat(), tau=BalancedSoftmaxLoss(class_counts(digits_lt(device='cpu')), tau=2.),
                          ldam=LDAMLoss(class_counts(digits_lt(device='cpu'))), inverted=CrossEntropyLossFlat(weight=torch.linspace(1, 60, 10)**2))


@pytest.mark.parametrize('loss', uneven())
def test_rests_to_the_bit_under_an_uneven_loss(loss, capsys):
    loss = uneven()[loss]
    rested = fit(learner(ReflectiveLearning(), loss), 4)
    said = capsys.readouterr().out
    assert torch.equal(weights(rested), weights(fit(learner(None, loss), 4)))
    assert said.count('Reflective Learning rests') == 1 and 'does not treat classes evenly' in said


def even(): return dict(bsce=None, weighted=CrossEntropyLossFlat(weight=1/class_counts(digits_lt(device='cpu', n_max=40)).float()))


@pytest.mark.parametrize('loss', even())
def test_acts_under_an_even_loss(loss, capsys):
    loss = even()[loss]
    acts = fit(learner(ReflectiveLearning(), loss))
    assert not torch.equal(weights(acts), weights(fit(learner(None, loss)))) and 'rests' not in capsys.readouterr().out


def test_rests_without_validation_images(capsys):
    def dls():
        made = digits_lt(device='cpu', n_max=40, bs=16)
        return DataLoaders(made.train, made.valid.new(shuffle=False), device='cpu'), made
    both, _ = dls()
    both.loaders = both.loaders[:1]
    learn = learner(ReflectiveLearning(), dls=both)
    class NoValidation(Callback):
        def before_validate(self): self.learn.dl = []
    learn.add_cb(NoValidation())
    with pytest.raises(IndexError): _ = learn.dls.valid
    with learn.no_bar(), learn.no_logging():
        learn._do_epoch_validate = lambda *args, **kwargs: None
        learn.fit(3, 5e-3)
    assert 'no validation images' in capsys.readouterr().out
    assert [o['review_weight'] for o in learn.loss_terms.history] == [0., 0., 0.]


def test_a_fixed_strength_acts_and_says_nothing(capsys):
    learn = fit(learner(ReflectiveLearning(kr=dict(weight=1., adapt=0.), ks=dict(adapt=0.)), CrossEntropyLossFlat()), 3)
    assert 'rests' not in capsys.readouterr().out and learn.loss_terms.history[1]['review_loss'] > 0


class LooksElsewhere(Callback):
    "Predicts for training images and validates, in the middle of each epoch and at its end"
    def after_batch(self):
        if self.training and self.iter == 3: self.look()
    def after_epoch(self): self.look()
    def look(self):
        state = torch.get_rng_state()
        learn = Learner(self.learn.dls, self.learn.model, loss_func=self.learn.loss_func)
        with learn.no_bar(), learn.no_logging(): learn.validate()
        self.learn.model.train()
        torch.set_rng_state(state)


def test_looking_elsewhere_changes_nothing():
    a, b = [fit(learner([ReflectiveLearning(), *more])) for more in ([], [LooksElsewhere()])]
    assert torch.equal(weights(a), weights(b))


class Dies(Callback):
    def before_epoch(self):
        if self.epoch == 20: raise KeyboardInterrupt


def test_a_killed_fit_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = fit(learner(ReflectiveLearning()))
    file = tmp_path/'checkpoint.pth'
    with pytest.raises(KeyboardInterrupt): fit(learner([ReflectiveLearning(), Checkpoint(file), Dies()]))
    resumed = fit(learner([ReflectiveLearning(), Checkpoint(file)]))
    assert torch.equal(weights(whole), weights(resumed)) and whole.loss_terms.history[-1] == resumed.loss_terms.history[-1]


class SoftensBy(Callback):
    "Checks the summary against soft labels made here"
    order, run_valid, seen = 20, False, 0
    def after_loss(self):
        summary, strength = self.learn.knowledge_summary, self.learn.generalization_gap.strength
        if 'summary' not in self.learn.loss_terms.terms: return
        share = min(.3, 2*strength.item())
        onehot = F.one_hot(self.y, 10).float()
        soft = (1-share)*onehot+share*summary.predictions[self.y]
        logits = self.learn.loss_func.trained_logits(self.pred)
        want = -((soft-onehot)*F.log_softmax(logits, 1)).sum(1).mean()
        torch.testing.assert_close(self.learn.loss_terms.terms['summary'], want, rtol=1e-4, atol=1e-6)
        self.seen += share > 0


def test_the_summary_softens_by_twice_the_gap():
    learn = fit(learner([KnowledgeSummary(), SoftensBy()]))
    assert learn.softens_by.seen > 20


@pytest.mark.parametrize('part', [KnowledgeReview, KnowledgeSummary])
def test_each_part_brings_the_gap_and_takes_it_away(part):
    learn = learner(part())
    assert len(learn._grab_cbs(GeneralizationGap)) == 1
    learn.remove_cbs(part)
    assert not learn._grab_cbs(GeneralizationGap)


def test_accuracies_of_counts():
    train, valid = torch.tensor([[5., 4.], [5., 4.]]), torch.tensor([[3., 1.], [4., 2.]])
    assert balanced_accuracies(train, valid).tolist() == [1., .75]
    assert balanced_accuracies(train, valid, least=1).tolist() == [1., .625]
    assert balanced_accuracies(torch.zeros(2, 2), valid).tolist() == [0., 0.]


class Forgets(Callback):
    "Spoils validation predictions from an epoch on"
    order, run_valid = -30, True
    def after_pred(self):
        if not self.training and self.epoch >= 10: self.learn.pred = -self.pred


def test_what_validation_loses_does_not_strengthen_the_parts():
    learn = fit(learner([ReflectiveLearning(), Forgets(), Notes()]))
    strengths = learn.notes.strengths[12:]
    assert learn.generalization_gap.valid_counts[0].sum() < .2*learn.generalization_gap.valid_counts[1].sum()
    assert 0 < max(strengths) < .5


def test_unevenness_leaves_out_classes_without_images():
    counts = torch.tensor([100., 10., 0.])
    assert unevenness(counts, CrossEntropyLossFlat()) == pytest.approx(counts[:2].log().std(unbiased=False).item())


def published_summary(method):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=40)
    from ltrl_fastai.all import create_net
    learn = methods[method].learner(dls, create_net('resnet8', 10, n_in=1), cbs=ReflectiveLearning(preset='published', kc=False))
    kept = []
    class Keeps(Callback):
        order, run_valid = 20, False
        def after_loss(self):
            if self.epoch: kept.append((self.learn.loss_terms.terms.get('summary'), self.learn.pred, self.y))
    learn.add_cb(Keeps())
    before = {}
    class Similarity(Callback):
        order, run_valid = 21, False
        def before_train(self): before['similarity'] = self.learn.knowledge_summary.similarity
    learn.add_cb(Similarity())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn, kept, before['similarity']


def test_fault_26_published_softens_the_label_of_each_expert_of_sade():
    learn, kept, similarity = published_summary('sade')
    assert kept
    for summary, pred, y in kept:
        onehot = F.one_hot(y, 10).float()
        soft = .99*onehot+.01*similarity.softmax(1)[y]
        want = sum(-((soft-onehot)*z.log_softmax(1)).sum(1).mean() for z in learn.loss_func.summary_logits(pred))
        torch.testing.assert_close(summary, want, rtol=1e-4, atol=1e-6)
    assert len(learn.loss_func.summary_logits(kept[0][1])) == 3


def test_fault_26_published_softens_nothing_of_ride():
    _, kept, _ = published_summary('ride')
    assert kept and all(summary is None for summary, _, _ in kept)


def _counts_to_log(counts):
    return (torch.tensor(counts)/torch.tensor(counts).mean()).log()


@pytest.mark.parametrize('tau,prior,said', [(1., 1., False), (1.5, 1., True), (1., 1.5, True), (1.5, .5, False), (3., 0., False)])
def test_a_prior_that_adds_up_with_the_loss_is_named(tau, prior, said):
    counts = [100., 30., 10., 3.]
    risks = review_risks(_counts_to_log(counts), BalancedSoftmaxLoss(counts, tau=tau), prior=prior, adapt='auto', n_steps=10_000)
    assert bool(risks) is said
    assert not said or f'{prior:g} times more' in risks[0] and f'adds {tau:.2g} times' in risks[0]


@pytest.mark.parametrize('counts,adapt,steps,words', [
    ([80., 10., 10.], 6., 1000, ['80% of the training images']), ([80., 10., 10.], 'auto', 1000, []),
    ([80., 10., 10.], 0., 1000, []), ([40., 30., 30.], 6., 60, ['fewer than 150 steps']), ([40., 30., 30.], 6., 1000, [])])
def test_a_fixed_strength_has_risks_that_the_measured_one_has_not(counts, adapt, steps, words):
    risks = review_risks(_counts_to_log(counts), BalancedSoftmaxLoss(counts), prior=0., adapt=adapt, n_steps=steps)
    assert len(risks)==len(words) and all(w in r for w,r in zip(words, risks))


def test_a_risk_is_said_once(recwarn):
    learn = fit(learner(ReflectiveLearning(preset='v0.0.1')), 4)
    fit(learn, 3)
    said = [str(o.message) for o in recwarn if 'Knowledge Review' in str(o.message)]
    assert len(said)==1 and 'fewer than 150 steps' in said[0]


def test_the_default_has_nothing_to_warn_of(recwarn):
    fit(learner(ReflectiveLearning()), 4)
    assert not [o for o in recwarn if 'Knowledge Review' in str(o.message)]
