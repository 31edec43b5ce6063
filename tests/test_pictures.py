"Pictures show the numbers of reports and callbacks, suit every kind of colour vision, and raise clear errors."
import itertools
import pickle
import time
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import SGD, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn, set_seed
from ltrl_fastai.all import (
    BalancedSoftmaxLoss, Diagnosis, KnowledgeCorrection, ReflectiveLearning, ShotReport, class_counts, create_net,
    digits_lt, feature_similarity, methods, shot_accuracies, shot_groups)
from parts import all_three
from ltrl_fastai.evaluation import pictures as pictures_module
from ltrl_fastai.evaluation.metrics import group_interval
from ltrl_fastai.evaluation.pictures import (
    draw_by_class, draw_classes, draw_conflicts, draw_drift, draw_drift_by_class, draw_per_class, draw_shots,
    draw_similarity, draw_terms, picture_ink, picture_palette, picture_params, picture_style)
from matplotlib.colors import to_rgb
from scipy.stats import binomtest, t


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def train(*cbs, epochs=3, seed=0, data=None):
    set_seed(seed, reproducible=True)
    dls = data or digits_lt(device='cpu')
    counts = class_counts(dls)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, dls.c))
    learn = Learner(dls, net, loss_func=BalancedSoftmaxLoss(counts), opt_func=partial(SGD, mom=.9),
                    metrics=shot_accuracies(counts), cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .1)
    return learn


@pytest.fixture(scope='module')
def learn(): return train(Diagnosis(), all_three())


@pytest.fixture(scope='module')
def plain(): return train(Diagnosis(), seed=1)


class Points(torch.utils.data.Dataset):
    "Random points, `counts[c]` of each class `c`"
    def __init__(self, counts):
        self.targets = [c for c, n in enumerate(counts) for _ in range(n)]
        self.x = torch.randn(len(self.targets), 64, generator=torch.Generator().manual_seed(0))
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return self.x[i], self.targets[i]


def points(counts, bs=64):
    loaders = [DataLoader(Points(counts), bs=bs, shuffle=s, num_workers=0) for s in (True, False)]
    dls = DataLoaders(*loaders, device='cpu')
    dls.c = len(counts)
    return dls


def bars(ax): return [[p.get_height() for p in c.patches] for c in ax.containers if hasattr(c, 'patches')]


def spans(ax):
    "Lower and upper ends of the error bars, a list for each setting"
    return [[tuple(s[:, 1]) for s in c.lines[2][0].get_segments()] for c in ax.containers if hasattr(c, 'has_yerr')]


def texts(items): return [o.get_text() for o in items]


def legend(ax): return texts(ax.get_legend().get_texts())


def report(acc, counts, n=100, **kwargs):
    "A report with `n` test images of each class"
    hits = (torch.as_tensor(acc, dtype=torch.double)*n/100).round().long()
    return ShotReport(hits, torch.full((len(counts),), n), counts, **kwargs)


def heat(ax): return ax.images[0].get_array()


# Content

def test_classes_are_ordered_by_size_and_shots_marked():
    counts = [5, 300, 40, 19, 100, 101, 0]
    ax = draw_classes(counts, vocab=list('abcdefg'))
    assert [b.get_height() for b in ax.patches] == [300, 101, 100, 40, 19, 5, 0]
    assert ax.get_yscale() == 'log'
    assert texts(ax.get_xticklabels()) == list('bfecdag')
    assert legend(ax) == ['Many (2): more than 100', 'Medium (2): 20 to 100', 'Few (3): fewer than 20']
    assert [len(c) for c in ax.containers] == [2, 2, 3]
    assert len({c.patches[0].get_hatch() for c in ax.containers}) == 3
    assert '1 classes have none' in ax.ltrl_alt and 'from 300' in ax.ltrl_alt
    ax = draw_classes([300, 50, 10], many=40, few=20)
    assert [len(c) for c in ax.containers] == [2, 1]


def test_classes_of_a_learner(learn):
    ax = learn.plot_classes()
    assert [b.get_height() for b in ax.patches] == class_counts(learn.dls).sort(descending=True).values.tolist()


def test_bars_by_class_are_those_of_the_reports(learn, plain):
    ax = learn.plot_per_class(plain, dl=learn.dls.test, labels=('a', 'b'))
    expected = [ShotReport.from_learner(o, dl=learn.dls.test).per_class for o in (learn, plain)]
    order = class_counts(learn.dls).argsort(descending=True, stable=True)
    np.testing.assert_allclose(bars(ax), np.array(expected)[:, order])
    assert legend(ax) == ['a', 'b']
    same = learn.plot_per_class(ShotReport.from_learner(plain, dl=learn.dls.test), dl=learn.dls.test)
    np.testing.assert_allclose(bars(same), bars(ax))
    assert 'with RL' in same.ltrl_alt
    assert bars(plain.plot_per_class(dl=learn.dls.test)) == bars(ax)[1:]
    valid = learn.plot_per_class()  # the validation set by default
    np.testing.assert_allclose(bars(valid)[0], np.array(ShotReport.from_learner(learn).per_class)[order])


def test_bars_by_shot_and_intervals_over_test_images(learn, plain):
    ax = plain.plot_shots(learn, dl=learn.dls.test)
    reports = [ShotReport.from_learner(o, dl=learn.dls.test) for o in (plain, learn)]
    np.testing.assert_allclose(bars(ax), [list(o.accuracy.values()) for o in reports])
    np.testing.assert_allclose(spans(ax), [list(o.intervals.values()) for o in reports])
    for b, (lower, upper) in zip(np.ravel(bars(ax)), np.reshape(spans(ax), (-1, 2))):
        assert lower-1e-9 <= b <= upper+1e-9
        assert lower < upper
    assert ax.get_xlabel() == '95% interval over test images'
    assert legend(ax) == ['without RL', 'with RL']
    assert texts(ax.get_xticklabels()) == ['Many\n(1)', 'Medium\n(5)', 'Few\n(4)', 'All\n(10)']


def test_intervals_shrink_with_test_images():
    counts, acc = [300, 50, 10], [90, 70, 40]
    width = [np.array(spans(draw_shots({'': report(acc, counts, n)}))[0]) @ [-1, 1] for n in (10, 40, 160, 640)]
    for a, b in zip(width, width[1:]): assert (b < .65*a).all() and (b > .4*a).all()  # half as wide


def test_interval_is_wilsons_for_the_effective_number_of_images():
    one = torch.tensor([True])
    def wilson(hits, n): return binomtest(hits, n).proportion_ci(method='wilson')
    for h, n in ((0, 5), (5, 5), (7, 9), (180, 200)):
        found = group_interval(torch.tensor([h]), torch.tensor([n]), one)
        np.testing.assert_allclose(found, wilson(h, n), rtol=1e-6, atol=1e-9)
    lower, upper = group_interval(torch.tensor([2, 1000]), torch.tensor([4, 1000]), torch.tensor([True, True]))
    assert lower < .58 and upper > .88  # the class of four images decides, although most images are of the other
    assert upper-lower > 3*np.subtract(*wilson(753, 1004)[::-1])
    assert group_interval(torch.tensor([3]), torch.tensor([0]), one) is None
    def width(level): return abs(np.subtract(*group_interval(torch.tensor([7]), torch.tensor([9]), one, level)))
    assert width(.5) < width(.99)


def test_intervals_over_seeds_are_of_the_paired_gain():
    counts = [300, 50, 10]
    rng = np.random.RandomState(0)
    base = [np.array([80., 60, 40])+d for d in (-8, 0, 8)]  # seeds vary a lot
    better = [o+2+rng.normal(0, .3, 3) for o in base]
    runs = {k: [report(o, counts, 1000) for o in v] for k, v in dict(a=base, b=better).items()}
    ax = draw_shots(runs)
    acc = {k: np.array([list(o.accuracy.values()) for o in v]) for k, v in runs.items()}
    np.testing.assert_allclose(bars(ax), [acc['a'].mean(0), acc['b'].mean(0)])
    d = acc['b']-acc['a']
    half = t.ppf(.975, 2)*d.std(0, ddof=1)/3**.5
    assert len(spans(ax)) == 1  # gains are over the first setting
    np.testing.assert_allclose(spans(ax)[0], np.stack([acc['b'].mean(0)-half, acc['b'].mean(0)+half], 1))
    assert (half < 2).all() and acc['a'].std(0, ddof=1).min() > 5  # unpaired, seeds would hide the gain
    assert ax.get_xlabel() == '95% interval of the paired gain over a'
    assert legend(ax) == ['a (3 runs)', 'b (3 runs)']


def test_runs_by_several_seeds_of_learners(learn, plain):
    plain2 = train(seed=2)
    learn2 = train(ReflectiveLearning(), seed=2)
    ax = plain.plot_shots([learn, learn2], runs=[plain2])
    def accuracies(learners): return [list(ShotReport.from_learner(o).accuracy.values()) for o in learners]
    expected = [np.mean(accuracies(o), 0) for o in ((plain, plain2), (learn, learn2))]
    np.testing.assert_allclose(bars(ax), expected)
    assert ax.get_xlabel().endswith('paired gain over without RL')


def test_similarity_is_ordered_by_size():
    counts = [5, 300, 40]
    m = torch.tensor([[1., .1, .2], [.1, 1., .3], [.2, .3, 1.]])
    ax = draw_similarity(m, counts, vocab=['x', 'y', 'z'])
    np.testing.assert_allclose(heat(ax), [[1, .3, .1], [.3, 1, .2], [.1, .2, 1]], rtol=1e-6)
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == ['y', 'z', 'x']
    assert 'Many and Few 0.10' in ax.ltrl_alt and 'All and All 0.20' in ax.ltrl_alt
    opposed = draw_similarity(torch.tensor([[1., -.5], [-.5, 1.]]), [9, 8])
    assert opposed.images[0].get_clim() == (-.5, 1.)


def test_similarity_is_knowledge_summarys_or_else_computed(learn, plain):
    order = class_counts(learn.dls).argsort(descending=True, stable=True)
    of_summary = learn.knowledge_summary.similarity[order][:, order]
    np.testing.assert_array_equal(heat(learn.plot_similarity()), of_summary)
    np.testing.assert_allclose(heat(plain.plot_similarity()), feature_similarity(plain)[order][:, order], rtol=1e-5)
    dl = learn.dls.train.new(shuffle=False, drop_last=False)
    assert not np.allclose(heat(learn.plot_similarity(dl=dl)), of_summary)


@pytest.mark.parametrize('quantity,times', [('kl', 1), ('train_accuracy', 100)])
def test_drift_by_shot_and_class(learn, plain, quantity, times):
    groups = shot_groups(class_counts(learn.dls))
    ax = learn.plot_drift(plain, quantity=quantity)
    expected = []
    for o in (learn, plain):
        values = times*np.array(getattr(o.diagnosis, quantity))
        expected += [values[:, groups[k].numpy()].mean(1) for k in ('many', 'medium', 'few')]
    np.testing.assert_allclose([o.get_ydata() for o in ax.lines], expected, rtol=1e-6)
    assert [tuple(o.get_xdata()) for o in ax.lines] == [(1, 2, 3)]*6
    assert len({o.get_marker() for o in ax.lines[:3]}) == 3
    assert ax.lines[0].get_linestyle() != ax.lines[3].get_linestyle()
    assert legend(ax) == ['Many', 'Medium', 'Few', 'with RL', 'without RL']
    order = class_counts(learn.dls).argsort(descending=True, stable=True)
    by_class = np.array(getattr(learn.diagnosis, quantity))[:, order]*times
    drawn = heat(learn.plot_drift(by='class', quantity=quantity)).filled(np.nan)
    np.testing.assert_allclose(drawn, by_class, rtol=1e-6)


def test_conflicts_by_layer_tensor_and_epoch(learn):
    rates = learn.knowledge_correction.conflict_rates
    assert rates[0] == {} and rates[-1]
    ax = learn.plot_conflicts(by='tensor')
    np.testing.assert_allclose(bars(ax)[0], [100*v for v in rates[-1].values()])
    assert texts(ax.get_xticklabels()) == list(rates[-1]) == ['1.weight', '1.bias', '3.weight', '3.bias']
    def layers(r): return [100*np.mean([r[f'{i}.weight'], r[f'{i}.bias']]) for i in (1, 3)]
    np.testing.assert_allclose(bars(learn.plot_conflicts(1))[0], layers(rates[1]))
    every = heat(learn.plot_conflicts(epoch=None)).filled(np.nan)
    np.testing.assert_allclose(every[:, 1:].T, [layers(o) for o in rates[1:]])
    assert np.isnan(every[:, 0]).all()


def curves(axs): return {o.get_gid(): o for ax in axs for o in ax.lines}


def test_terms_are_the_history_also_after_predicting(learn):
    history = learn.loss_terms.history
    names, rows = learn.loss_terms.record
    assert len(rows) == 3
    before = curves(learn.plot_terms())
    with learn.no_bar(), learn.no_logging():
        learn.get_preds()
        learn.validate()
    assert len(learn.recorder.values) == 1  # fastai's own table was reset
    after = curves(learn.plot_terms())
    losses = {'base_loss', 'review_loss', 'summary_loss', 'valid_loss'}
    assert set(before) == set(after) == losses | {'right', 'conflicts', 'many', 'medium', 'few', 'all'}
    y = {k: o.get_ydata() for k, o in after.items()}
    for k, o in before.items(): np.testing.assert_array_equal(o.get_ydata(), y[k])
    def expected(k): return np.array([np.nan if o[k] is None else o[k] for o in history])
    for k in ('base_loss', 'review_loss', 'summary_loss'): np.testing.assert_array_equal(y[k], expected(k))
    for k in ('right', 'conflicts'): np.testing.assert_allclose(y[k], 100*expected(k))
    np.testing.assert_array_equal(y['valid_loss'], [r[names.index('valid_loss')] for r in rows])
    np.testing.assert_allclose(y['few'], [100*r[names.index('few')] for r in rows])
    assert before['base_loss'].axes is before['valid_loss'].axes
    assert before['base_loss'].axes is not before['few'].axes


def test_only_the_last_fit_is_drawn(plain):
    learn = train(ReflectiveLearning(), epochs=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(4, .1)
    assert {len(o.get_xdata()) for o in curves(learn.plot_terms()).values()} == {4}
    # with `Diagnosis` alone
    assert set(curves(plain.plot_terms())) == {'base_loss', 'valid_loss', 'many', 'medium', 'few', 'all'}


def test_terms_of_a_pickled_history(learn):
    copied = pickle.loads(pickle.dumps(learn.loss_terms.history))
    assert set(curves(draw_terms(copied))) == {'base_loss', 'review_loss', 'summary_loss', 'right', 'conflicts'}


def test_report_draws_both():
    a = report([90, 70, 40], [300, 50, 10], label='a')
    b = report([80, 75, 60], [300, 50, 10], label='b')
    by_class, by_shot = [o for o in a.plot(b).axes if o.containers][:2]
    np.testing.assert_allclose(bars(by_class), [[90, 70, 40], [80, 75, 60]])
    np.testing.assert_allclose(np.array(bars(by_shot))[:, -1], [200/3, 215/3])


@pytest.mark.parametrize('n', [2, 21, 8142])
def test_any_number_of_classes(n, tmp_path):
    rng = np.random.RandomState(0)
    counts = np.maximum(1, 1000*np.exp(-np.arange(n)/n*6)).astype(int)[rng.permutation(n)]
    acc = rng.uniform(0, 100, n)
    m = np.corrcoef(rng.randn(n, 8)+1).astype(np.float32)
    start = time.process_time()
    a = report(acc, counts, 50, label='a')
    b = report(acc[::-1].copy(), counts, 50, label='b')
    similarity = draw_similarity(m, counts)
    axs = [draw_classes(counts), draw_per_class(a, b), draw_shots(dict(a=a, b=b)), similarity,
           draw_drift_by_class(rng.rand(20, n), counts)]
    figs = [*(ax.figure for ax in axs), a.plot(b)]
    for f in figs: f.savefig(tmp_path/'a.png', dpi=80)
    assert time.process_time()-start < 40
    for ax in (o for f in figs for o in f.axes):
        labels = [o for o in ax.get_xticklabels() if o.get_text()]
        assert len(labels) <= 20
        boxes = sorted((o.get_window_extent() for o in labels), key=lambda o: o.x0)
        if n > 20: assert all(x.x1 <= y.x0+1 for x, y in zip(boxes, boxes[1:])), texts(labels)
    if n <= 500: return
    blocks = heat(similarity)
    order = np.argsort(-counts, kind='stable')
    m = m[order][:, order]
    assert blocks.shape == (500, 500)
    np.testing.assert_allclose(blocks[0, 0], m[:16, :16][~np.eye(16, dtype=bool)].mean(), rtol=1e-4)
    np.testing.assert_allclose(blocks[0, 1], m[:16, 16:32].mean(), rtol=1e-3)


def test_training_with_many_classes_and_with_two():
    for counts in ([40, 4], [max(2, 120//(i+1)) for i in range(300)]):
        learn = train(Diagnosis(), all_three(), epochs=2, data=points(counts))
        n = len(counts)
        assert heat(learn.plot_similarity()).shape == (n, n)
        assert heat(learn.plot_drift(by='class')).shape == (2, n)
        assert learn.plot_drift().lines
        assert learn.plot_conflicts().patches
        assert len(learn.plot_terms()) == 2
        for ax in (learn.plot_classes(), learn.plot_per_class(), learn.plot_shots()): ax.figure.canvas.draw()


@pytest.mark.parametrize('name', ['ride', 'sade', 'paco', 'mislas', 'bbn', 'ncl'])
def test_other_methods(name):
    set_seed(0)
    dls = digits_lt(device='cpu')
    method = methods[name]
    learn = method.learner(dls, create_net('resnet8', 10, n_in=1), cbs=[Diagnosis(), ReflectiveLearning(kc=True)],
                           metrics=shot_accuracies(class_counts(dls)))
    with learn.no_bar(), learn.no_logging(): method.fit(learn, 4, .05)
    assert bars(learn.plot_shots())[0][-1] == ShotReport.from_learner(learn).accuracy['all']
    assert np.shape(bars(learn.plot_per_class())) == (1, 10)
    assert heat(learn.plot_similarity()).shape == (10, 10)
    assert learn.plot_terms()[0].lines
    assert learn.plot_classes().patches
    has_drift = len(learn.diagnosis.kl) > 1  # otherwise the last stage was one epoch
    assert len(learn.plot_drift(quantity='kl' if has_drift else 'train_accuracy').lines) == 3


def test_tensors_that_numpy_does_not_convert():
    m = torch.rand(3, 3, dtype=torch.bfloat16).requires_grad_()  # like a CUDA tensor
    with pytest.raises((TypeError, RuntimeError)): np.asarray(m)
    np.testing.assert_allclose(heat(draw_similarity(m, torch.tensor([3, 2, 1]))), m.detach().float().numpy())
    draw_drift_by_class(m, torch.tensor([3, 2, 1]))


# Axes and style

def test_on_given_axes(learn, plain):
    fig, axs = plt.subplots(2, 4)
    plots = (learn.plot_classes, learn.plot_per_class, learn.plot_shots, learn.plot_similarity, learn.plot_drift,
             learn.plot_conflicts)
    for ax, plot in zip(axs.flat, plots):
        assert plot(ax=ax) is ax
        assert ax.has_data()
        assert to_rgb(ax.xaxis.label.get_color()) == to_rgb(picture_ink)
        assert len(ax.ltrl_alt) > 30
    losses, shares = learn.plot_terms(ax=axs[1, 2:])
    assert losses is axs[1, 2] and shares is axs[1, 3]
    assert 'validation' in shares.ltrl_alt
    assert len(plt.get_fignums()) == 1
    fig.canvas.draw()
    for ax in axs.flat:
        for o in (*ax.get_xticklabels(), *ax.get_yticklabels()): assert to_rgb(o.get_color()) == to_rgb(picture_ink)


def test_style_is_restored():
    before = dict(plt.rcParams)
    with picture_style():
        assert plt.rcParams['text.color'] == picture_ink
        plt.rcParams['font.size'] = 3
    draw_classes([3, 2, 1])
    with pytest.raises(ValueError):
        with picture_style(): raise ValueError
    assert dict(plt.rcParams) == before
    assert draw_classes([3, 2, 1]).figure.get_facecolor()[3] == 0  # transparent


# Readability: WCAG's contrast ratio, and colours without one kind of cone (Machado et al. 2009, severity 1)

def linear(c):
    "Linear RGB"
    c = np.array(to_rgb(c))
    return np.where(c <= .04045, c/12.92, ((c+.055)/1.055)**2.4)


def contrast(a, b):
    "WCAG's contrast ratio"
    lighter, darker = sorted((linear(o) @ [.2126, .7152, .0722] for o in (a, b)), reverse=True)
    return (lighter+.05)/(darker+.05)


vision = dict(
    normal=np.eye(3),
    protanopia=np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
    deuteranopia=np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]),
    tritanopia=np.array([[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]))
rgb_to_xyz = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]])


def lab(c, seen_as):
    "CIELAB coordinates of a colour, for a kind of vision"
    x = rgb_to_xyz @ np.clip(seen_as @ linear(c), 0, 1)/[.95047, 1, 1.08883]
    f = np.where(x > (6/29)**3, np.cbrt(x), x/(3*(6/29)**2)+4/29)
    return np.array([116*f[1]-16, 500*(f[0]-f[1]), 200*(f[1]-f[2])])


def distance(a, b, seen_as): return np.linalg.norm(lab(a, seen_as)-lab(b, seen_as))


def test_the_colour_measures():
    assert contrast('white', 'black') == pytest.approx(21)
    assert contrast('#777777', 'white') == pytest.approx(4.48, abs=.01)
    np.testing.assert_allclose(lab('#ff0000', np.eye(3)), [53.24, 80.09, 67.20], atol=.05)
    red, green = '#c00000', '#4a7a00'  # hard to tell apart with deuteranopia
    assert distance(red, green, vision['deuteranopia']) < .4*distance(red, green, np.eye(3))


@pytest.mark.parametrize('page', ['white', '#1e1e1e'])
def test_contrast_on_white_and_on_dark(page):
    assert contrast(picture_ink, page) >= 4
    for c in picture_palette: assert contrast(c, page) >= 3, c
    colours = [v for k, v in picture_params.items() if k.endswith('color') and isinstance(v, str)]
    colours = [v for v in colours if v not in ('none', 'auto')]
    assert len(colours) >= 7
    assert all(contrast(v, page) >= 3 for v in colours)


@pytest.mark.parametrize('kind', vision)
def test_colours_are_distinct(kind):
    assert distance(*picture_palette[:2], vision[kind]) > 60  # the two colours of nearly every picture
    pairs = itertools.combinations(picture_palette, 2)
    assert min(distance(a, b, vision[kind]) for a, b in pairs) > 15  # markers and lines differ too


def test_the_colour_map_is_ordered_by_brightness():
    for seen_as in vision.values():
        lightness = [lab(plt.get_cmap('cividis')(v)[:3], seen_as)[0] for v in np.linspace(0, 1, 32)]
        assert (np.diff(lightness) > 0).all()


def test_curves_and_bars_do_not_differ_by_colour_alone(learn, plain):
    def style(o): return o.get_marker(), o.get_linestyle(), o.get_markerfacecolor() == 'none'
    for ax in (learn.plot_drift(plain), *learn.plot_terms()):
        styles = [style(o) for o in ax.lines]
        assert len(styles) > 1 and len(set(styles)) == len(styles)
    for ax in (learn.plot_per_class(plain), learn.plot_shots(plain)):
        hatches = [c.patches[0].get_hatch() for c in ax.containers if hasattr(c, 'patches')]
        assert len(set(hatches)) == len(hatches) == 2


# Errors

def linear_learner(dls):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat())


def test_errors_say_which_callback_to_add(learn, plain):
    bare = linear_learner(learn.dls)
    cases = [(bare.plot_drift, r'learn\.add_cbs\(Diagnosis\(\)\)'),
             (bare.plot_conflicts, r'ReflectiveLearning\(kc=True\)'),
             (plain.plot_conflicts, 'no KnowledgeCorrection'),
             (bare.plot_terms, r'learn\.add_cbs\(ReflectiveLearning\(\)\)'),
             (bare.plot_similarity, 'never trained')]
    for plot, text in cases:
        with pytest.raises(ValueError, match=text): plot()
    with pytest.raises(ValueError, match='Diagnosis'): learn.plot_drift(bare)


def test_errors_before_training_and_after_one_epoch():
    learn = linear_learner(digits_lt(device='cpu'))
    learn.add_cbs([Diagnosis(), all_three()])
    cases = [(learn.plot_drift, 'Fit the learner first'), (learn.plot_conflicts, 'fit two epochs'),
             (learn.plot_terms, 'Fit the learner first'), (learn.plot_similarity, 'never trained')]
    for plot, text in cases:
        with pytest.raises(ValueError, match=text): plot()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    with pytest.raises(ValueError, match='only one was trained'): learn.plot_drift()
    assert learn.plot_drift(quantity='train_accuracy').lines
    assert learn.plot_terms()[0].lines
    learn.remove_cbs(ReflectiveLearning)
    learn.add_cbs(KnowledgeCorrection('global'))
    with pytest.raises(ValueError, match="granularity='global'"): learn.plot_conflicts()


@pytest.mark.parametrize('call,error,text', [
    (lambda o: o.plot_drift(by='sample'), ValueError, "expected 'shot' or 'class'"),
    (lambda o: o.plot_drift(quantity='loss'), ValueError, "expected 'kl' or 'train_accuracy'"),
    (lambda o: o.plot_drift(o, by='class'), ValueError, 'shows one learner'),
    (lambda o: o.plot_per_class(3), TypeError, 'expected a Learner or a ShotReport'),
    (lambda o: o.plot_per_class(o, labels=('a',)), ValueError, 'labels: expected 2'),
    (lambda o: o.plot_per_class(report([90, 50], [30, 20])), ValueError, 'same training set'),
    (lambda o: o.plot_shots([o, o]), ValueError, 'as many for each label'),
    (lambda o: o.plot_conflicts(3), ValueError, 'expected -3 to 2'),
    (lambda o: o.plot_conflicts(0), ValueError, 'in epoch 1'),
    (lambda o: o.plot_conflicts(by='net'), ValueError, "expected 'layer' or 'tensor'"),
    (lambda o: o.plot_terms(ax=plt.gca()), ValueError, 'expected two Axes'),
    (lambda o: draw_shots([o]), TypeError, 'expected a dict'),
    (lambda o: draw_similarity(torch.rand(3, 2), [1, 2, 3]), ValueError, r'expected \(3, 3\)'),
    (lambda o: draw_classes([1, 2], vocab=['a']), ValueError, 'a name for each of 2'),
    (lambda o: draw_by_class(dict(a=[1.]), [1, 2]), ValueError, 'expected one for each of 2'),
    (lambda o: draw_drift(dict(a=dict(few=[1.])), 'loss'), ValueError, "expected 'kl' or 'train_accuracy'"),
    (lambda o: draw_drift_by_class([[1., 2.]], [1, 2, 3]), ValueError, 'for each of 3 classes'),
    (lambda o: draw_conflicts([{}]), ValueError, 'no epoch has any'),
    (lambda o: draw_terms([]), ValueError, 'no epoch was trained'),
])
def test_mistakes(learn, call, error, text):
    with pytest.raises(error, match=text): call(learn)


def test_names_in_scripts_without_a_font(tmp_path, monkeypatch):
    "They are drawn as codes, without a warning or a box; with a font they are drawn as they are"
    vocab = ['owl', '\u732b cat', '\U0001f9a9', 'm\u00e9sange', 'x\u732b\u732b']
    monkeypatch.setattr(pictures_module, '_other_scripts', ())
    for cached in (pictures_module._fonts, pictures_module._has_glyph): cached.cache_clear()
    with warnings.catch_warnings(), picture_style():
        warnings.simplefilter('error')
        ax = draw_classes([9, 8, 7, 6, 5], vocab)
        ax.figure.savefig(tmp_path/'a.png')
    shown = [o.get_text() for o in ax.get_xticklabels()]
    assert shown == ['owl', '[U+732B] cat', '[U+1F9A9]', 'm\u00e9sange', 'x[U+732B U+732B]']
    monkeypatch.setattr(pictures_module, '_has_glyph', lambda char: True)
    assert [pictures_module.drawable(o) for o in vocab] == vocab
    for cached in (pictures_module._fonts,): cached.cache_clear()
