"Loggers that write fastai's table also write the loss terms: compared with their own files."
import math

from fastai.vision.all import Learner, set_seed
from ltrl_fastai.all import BalancedSoftmaxLoss, CifarResNet, class_counts, digits_lt, shot_accuracies
from parts import all_three

columns = ('base_loss', 'review_loss', 'summary_loss', 'right', 'conflicts')


def fit(cbs):
    set_seed(0)
    dls = digits_lt(device='cpu')
    n = class_counts(dls)
    net = CifarResNet(10, depth=8, n_in=1)
    learn = Learner(dls, net, loss_func=BalancedSoftmaxLoss(n), metrics=shot_accuracies(n), cbs=[all_three(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    return learn


def recorded(learn, column):
    "The values of a column of fastai's table, one per epoch"
    i = list(learn.recorder.metric_names).index(column)-1
    return [row[i] for row in learn.recorder.values]


def same(a, b): return math.isnan(a) and math.isnan(b) or abs(a-b) < 1e-5


def test_tensorboard_has_the_loss_terms(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = fit([TensorBoardCallback(tmp_path, trace_model=True, log_preds=False)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for column in columns:
        if column not in learn.recorder.metric_names: continue
        got = [o.value for o in events.Scalars(column)]
        assert len(got) == 3
        assert all(same(a, b) for a, b in zip(got, recorded(learn, column))), column
    assert {'review_loss', 'right', 'base_loss'} <= set(events.Tags()['scalars'])


def test_wandb_offline_has_the_loss_terms(tmp_path, monkeypatch):
    import fastai.callback.wandb
    import wandb
    from fastai.callback.wandb import WandbCallback
    # The configuration formatter of fastai 2.8.12 fails on every learner with the `init_args` of the current fastcore
    monkeypatch.setattr(fastai.callback.wandb, '_format_config', str)
    monkeypatch.setattr(wandb.Config, 'update', lambda *args, **kwargs: None)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    with wandb.init(project='test', dir=tmp_path, mode='offline') as run:
        learn = fit([WandbCallback(log=None, log_preds=False, log_model=False)])
        summary = {column: run.summary.get(column) for column in columns}
    for column in ('review_loss', 'right', 'base_loss'):
        assert abs(summary[column]-recorded(learn, column)[-1]) < 1e-5, column
    assert list(tmp_path.rglob('*.wandb'))
