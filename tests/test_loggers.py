"Loggers that write what fastai's table holds write our terms: read back from their own files."
import math

from fastai.vision.all import Learner, set_seed

from ltrl_fastai.all import BalancedSoftmaxLoss, CifarResNet, class_counts, digits_lt, shot_accuracies
from parts import all_three


def fit(cbs):
    set_seed(0)
    dls = digits_lt(device='cpu')
    n = class_counts(dls)
    learn = Learner(dls, CifarResNet(10, depth=8, n_in=1), loss_func=BalancedSoftmaxLoss(n), metrics=shot_accuracies(n), cbs=[all_three(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    return learn


columns = ('base_loss', 'review_loss', 'summary_loss', 'right', 'conflicts')


def test_tensorboard_shows_our_terms(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = fit([TensorBoardCallback(tmp_path, trace_model=True, log_preds=False)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for c in columns:
        if c not in learn.recorder.metric_names: continue
        want = [row[list(learn.recorder.metric_names).index(c)-1] for row in learn.recorder.values]
        got = [o.value for o in events.Scalars(c)]
        assert len(got) == 3 and all(math.isnan(a) and math.isnan(b) or abs(a-b) < 1e-5 for a, b in zip(got, want)), c
    assert {'review_loss', 'right', 'base_loss'} <= set(events.Tags()['scalars'])


def test_wandb_offline_gets_our_terms(tmp_path, monkeypatch):
    import fastai.callback.wandb
    import wandb
    from fastai.callback.wandb import WandbCallback
    # fastai 2.8.12's own formatter of the configuration fails on every learner with fastcore's present `init_args` (`vars()` of a number), whatever its callbacks
    monkeypatch.setattr(fastai.callback.wandb, '_format_config', str)
    monkeypatch.setattr(wandb.Config, 'update', lambda *args, **kwargs: None)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    with wandb.init(project='test', dir=tmp_path, mode='offline') as run:
        learn = fit([WandbCallback(log=None, log_preds=False, log_model=False)])
        kept = {c: run.summary.get(c) for c in columns}
    for c in ('review_loss', 'right', 'base_loss'):
        want = learn.recorder.values[-1][list(learn.recorder.metric_names).index(c)-1]
        assert abs(kept[c]-want) < 1e-5, c
    assert list(tmp_path.rglob('*.wandb'))
