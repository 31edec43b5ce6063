"Shared by the tests: a picture-free, quiet environment that is the same every time."
import os
import warnings

import pytest

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # two files of tests run side by side, and threads that wait for each other's cores are slow
warnings.filterwarnings('ignore', category=FutureWarning, module='torch')

from fastai.vision.all import nn, set_seed  # noqa: E402
from ltrl_fastai.all import digits_lt  # noqa: E402


@pytest.fixture
def dls():
    "digits-LT on the CPU, seeded"
    set_seed(0, reproducible=True)
    return digits_lt(device='cpu')


@pytest.fixture
def quick_fit():
    "Fit without a bar and without a table"
    def _fit(learn, n=1, lr=1e-2, **kwargs):
        with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
        return learn
    return _fit


@pytest.fixture
def mlp():
    "A net with a dropout before its head"
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.1), nn.Linear(32, 10))
