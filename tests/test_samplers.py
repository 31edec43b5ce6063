"Samplers, and the losses VS, Seesaw and GCL: what is drawn, resumption, export, smoothed labels."
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, Learner, load_learner
from ltrl_fastai.all import (
    DeferredSampling, PowerSampling, ProgressiveSampling, WeightedSampling, create_net, digits_lt, draws_per_image,
    methods, power_shares, smooth_labels, weighted_order)
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.heads import class_aware_order
from test_methods import Crash, same

sampling = ['square-root-sampling', 'class-aware-sampling', 'progressive-sampling', 'cb-drs']
counts = torch.tensor([50, 10, 2])


@pytest.mark.parametrize('name', ['progressive-sampling', 'cb-drs'])
def test_a_sampler_is_resumed_where_it_was(name, tmp_path):
    "A run interrupted after its second of three epochs gives the same numbers as an uninterrupted one"
    settings = RunSettings(method=name, epochs=3, reflective={})
    whole, _ = train_run(settings, bar=False)
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt', cbs=[Crash(0, 1)])
    resumed, _ = train_run(settings, bar=False, checkpoint=tmp_path/'fit.pt')
    same(whole, resumed)


@pytest.mark.parametrize('sampler', [
    PowerSampling, ProgressiveSampling, DeferredSampling, lambda: WeightedSampling(torch.ones(405))])
def test_a_learner_with_a_sampler_is_exported(sampler, tmp_path, capsys):
    "Its file holds neither a loader nor the classes of the training images; the note is printed once"
    dls = digits_lt(device='cpu')
    cb = sampler()
    learn = Learner(dls, create_net('resnet8', 10, n_in=1), cbs=cb, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, .01)  # with one epoch, deferred sampling never begins
        learn.fit(2, .01)
    assert capsys.readouterr().out.count('leaves out') == 1
    learn.export('model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    cb, = loaded._grab_cbs(type(cb))
    assert cb._dl is None and cb._targets is None and cb._counts is None
    assert loaded.dls.train.n == 0


class Interrupt(Callback):
    "Raise `KeyboardInterrupt` in the second epoch"
    def before_batch(self):
        if self.training and self.epoch == 1: raise KeyboardInterrupt


def test_a_crash_leaves_the_loader_of_the_user():
    dls = digits_lt(device='cpu')
    learn = Learner(dls, create_net('resnet8', 10, n_in=1), cbs=PowerSampling(note=False))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(2, .01, cbs=Interrupt())
        assert learn.dls.train is dls.train
        assert dls.train.get_idxs.__func__ is type(dls.train).get_idxs  # no order of the sampler is left
        learn.remove_cb(PowerSampling)
        learn.fit(1, .01)
    order = dls.train._DataLoader__idxs
    assert sorted(order) == list(range(len(dls.train_ds)))


@pytest.mark.parametrize('power', [0., .5, 1.])
def test_draws_are_those_expected(power):
    "Over an epoch, each class is drawn its share up to rounding, and images of a class equally often up to one"
    torch.manual_seed(0)
    targets = torch.arange(3).repeat_interleave(counts)
    shares = power_shares(counts, power)
    expected = draws_per_image(counts, shares)
    for _ in range(20):
        drawn = torch.bincount(torch.tensor(class_aware_order(targets, share=shares)), minlength=62)
        for c in range(3):
            of_class = drawn[targets == c]
            assert of_class.max()-of_class.min() <= 1
            assert abs(of_class.sum()-expected[c]*counts[c]) < 1+1e-9


def test_weighted_order_draws_the_expected_number_rounded():
    torch.manual_seed(0)
    for n_images, n in ((1, 7), (5, 5), (40, 13), (13, 40)):
        weights = torch.rand(n_images)
        expected = weights.double()/weights.double().sum()*n
        drawn = torch.bincount(torch.tensor(weighted_order(weights, n)), minlength=n_images)
        assert drawn.sum() == n
        assert ((drawn-expected).abs() < 1+1e-9).all()


def test_images_of_weight_zero_are_never_drawn():
    torch.manual_seed(0)
    weights = torch.tensor([0., 1., 0., 2., 0.])
    for _ in range(200): assert set(weighted_order(weights)) <= {1, 3}


@pytest.mark.parametrize('method', ['vs', 'seesaw', 'gcl'])
def test_smoothed_labels_by_hand(method):
    "The mean over classes of the distribution of each image takes the share of the label that is spread"
    eps = .2
    torch.manual_seed(0)
    z, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    loss = methods[method].loss(counts)
    if method == 'seesaw': trained = z+loss.func.log_factors(z, y)
    else: trained = z if method == 'gcl' else loss.trained_logits(z)  # without gradient, GCL has no clouds
    logp = F.log_softmax(trained, 1)
    by_hand = -((1-eps)*logp[range(6), y]+eps*logp.mean(1)).mean()
    assert float(smooth_labels(loss, eps)(z, y)) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(smooth_labels(loss, 0.)(z, y)) == pytest.approx(float(-logp[range(6), y].mean()), rel=1e-5)


@pytest.mark.parametrize('method', ['vs', 'seesaw', 'gcl'])
def test_half_precision_logits(method):
    "Losses of float16 logits are computed in float32, and agree with those of the same values in float32"
    torch.manual_seed(0)
    z, y = (torch.randn(6, 3)*20).half(), torch.tensor([0, 0, 1, 1, 2, 2])
    loss = methods[method].loss(counts)
    half = loss(z, y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.as_subclass(torch.Tensor), loss(z.float(), y).as_subclass(torch.Tensor))
