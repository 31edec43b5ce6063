"A checkpoint in the calls of a `Learner`, beside a loss scale, and where what lies there can't be used."
from functools import partial

import pytest
import torch
from fastai.vision.all import SGD, Callback, Learner, nn, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, Checkpoint, ReflectiveLearning, digits_lt


def learner(*cbs, n_max=40, hidden=16):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu', n_max=n_max)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return Learner(dls, net, loss_func=BalancedSoftmaxLoss(dls.class_counts), opt_func=partial(SGD, mom=.9), cbs=[ReflectiveLearning(ks=True, kc=True), *cbs])


def weights(learn): return torch.cat([o.flatten().double() for o in learn.model.state_dict().values()])


@pytest.mark.parametrize('call', [lambda o: o.validate(), lambda o: o.get_preds(), lambda o: o.predict(o.dls.valid.dataset.images[0]),
                                  lambda o: o.lr_find(num_it=3*len(o.dls.train)-1, show_plot=False)], ids=['validate', 'get_preds', 'predict', 'lr_find'])
def test_one_that_stays_on_a_learner_is_for_fits_alone(call, tmp_path):
    "Nothing else writes a checkpoint, or takes one for its own; `lr_find` has as many epochs here as the fit"
    f, ended = tmp_path/'fit.pt', []
    for cbs in ([], [Checkpoint(f)]):
        learn = learner(*cbs)
        with learn.no_bar(), learn.no_logging():
            call(learn)
            assert not f.exists()
            learn.fit(3, .05)
        ended.append(weights(learn))
    kept, n = f.read_bytes(), len(learn.cbs)
    with learn.no_bar(), learn.no_logging(): call(learn)
    assert f.read_bytes() == kept and len(learn.cbs) == n and torch.equal(*ended)
