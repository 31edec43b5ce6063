"Multi-label data: the learner around its losses, metrics and the review by label."
import numpy as np
import pytest
import torch
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, Learner, MixUp, MultiCategory, SaveModelCallback, nn,
                               set_seed)

from ltrl_fastai.data.multilabel import MultiLabelTensors, digit_scenes, label_counts, label_matrix
from ltrl_fastai.evaluation.multilabel import label_precisions, shot_precisions
from ltrl_fastai.experiments.checkpoint import Checkpoint
from ltrl_fastai.methods.multilabel import AsymmetricLoss, DistributionBalancedLoss
from ltrl_fastai.reflective.labels import LabelReview, correct_labels, label_review_loss
from ltrl_fastai.reflective.learning import ReflectiveLearning

losses = {'bce': lambda dls: BCEWithLogitsLossFlat(), 'asymmetric': lambda dls: AsymmetricLoss(),
          'balanced': lambda dls: DistributionBalancedLoss(label_counts(dls), len(dls.train_ds), gamma=2.)}


def learner(loss='bce', cbs=(), bs=64, **kwargs):
    set_seed(0)
    dls = digit_scenes(n_train=200, n_valid=60, n_test=40, bs=bs)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    return Learner(dls, net, loss_func=losses[loss](dls), metrics=shot_precisions(label_counts(dls)), cbs=list(cbs),
                   **kwargs)


def fit(learn, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, .005)
    return learn


def weights(learn): return learn.model[1].weight.detach().clone()


@pytest.mark.parametrize('loss', losses)
@pytest.mark.parametrize('review', [False, True])
def test_a_learner_trains_predicts_and_is_exported(loss, review, tmp_path):
    learn = fit(learner(loss, [LabelReview()] if review else [], path=tmp_path), 3)
    values = learn.recorder.values
    base = [o['base_loss'] for o in learn.loss_terms.history] if review else [o[0] for o in values]
    assert np.isfinite(values[-1][:2]).all() and base[-1] < base[0]
    p, y = learn.get_preds()
    assert p.shape == y.shape == (60, 10) and (0 <= p).all() and (p <= 1).all()
    names = learn.recorder.metric_names
    found = values[-1][names.index('map')-1]
    assert found == pytest.approx(label_precisions(p, y).nanmean().item(), abs=1e-5)
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size < 100_000  # no images and no teachers


def test_mixup_and_trackers_work(tmp_path):
    fit(learner('asymmetric', [MixUp(), SaveModelCallback(monitor='map')], path=tmp_path))
    assert (tmp_path/'models/model.pth').exists()
    with pytest.raises(ValueError, match='MixUp'): fit(learner('asymmetric', [MixUp(), LabelReview()]))


def test_what_is_reviewed_is_what_was_right_and_only_that():
    "The gradient of the review is zero for every label whose teacher was wrong"
    torch.manual_seed(0)
    teacher, y = torch.randn(9, 5), torch.rand(9, 5) < .5
    reviewed = correct_labels(teacher, y.float())
    z = torch.randn(9, 5, requires_grad=True)
    label_review_loss(z, teacher, reviewed).backward()
    assert ((z.grad != 0) == reviewed).all()
    assert (torch.sign(z.grad) == torch.sign(z.detach()-teacher))[reviewed].all()  # it pulls to the teacher
    total = 0.
    for i in range(9):  # each image adds its own part
        alone = label_review_loss(z[i:i+1], teacher[i:i+1], reviewed[i:i+1], n_reviewed=torch.tensor(1))
        assert alone >= 0
        total += alone
    torch.testing.assert_close(total/reviewed.sum(), label_review_loss(z, teacher, reviewed))


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    whole = fit(learner('balanced', [LabelReview()]), 4)
    first = learner('balanced', [LabelReview(), Checkpoint(tmp_path/'c')])
    first.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(first, 4)
    again = fit(learner('balanced', [LabelReview(), Checkpoint(tmp_path/'c')]), 4)
    torch.testing.assert_close(weights(again), weights(whole))


def test_items_of_another_image_are_found():
    "Ids and labels that do not belong together are reported, as by Knowledge Review"
    class Shuffled(Callback):
        order, run_valid = -1, False
        def before_batch(self):
            if self.epoch: self.learn.yb = (self.y.roll(1, 0),)
    with pytest.raises(ValueError, match='another target'): fit(learner(cbs=[LabelReview(), Shuffled()]))


def test_single_label_parts_name_the_review_by_label():
    for part in ('kr', 'ks'):
        only = ReflectiveLearning(**{o: o == part for o in ('kr', 'ks', 'kc')})
        with pytest.raises(ValueError, match='LabelReview'): fit(learner(cbs=[only]))


def test_the_bed_is_long_tailed_and_its_splits_share_no_digit():
    dls = digit_scenes(imbalance_factor=20, data_seed=3)
    counts = label_counts(dls)
    assert (counts[:-1]*1.3 > counts[1:]).all() and 8 < dls.imbalance_factor < 40
    def cells(dl):
        x = dl.dataset.x
        parts = [x[:, 0, i:i+8, j:j+8].flatten(1) for i in (0, 8) for j in (0, 8)]
        return {tuple(o) for o in torch.cat(parts).tolist() if any(o)}
    train, valid, test = map(cells, dls.loaders)
    assert not train & test and not valid & test and not train & valid
    assert (label_matrix(dls.test.dataset).sum(1) >= 1).all()
    x, y = dls.test.dataset[0]
    assert isinstance(dls.test.dataset.decode((x, y))[1], MultiCategory) and isinstance(dls.train_ds, MultiLabelTensors)
