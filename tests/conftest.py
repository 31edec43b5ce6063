"Shared by the tests: a quiet, reproducible environment without windows."
import functools
import gc
import os
import shutil
import sys
import warnings
from unittest.mock import patch

import pytest

os.environ.setdefault('MPLBACKEND', 'Agg')
# Two test files run side by side: more threads would wait for each other's cores
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning, module='torch')

# fastai and the library are imported below, where they are used: the process that only shares out tests needs neither


# Two workers share the files: a long one at the end would leave the other worker without work
long_files = ['test_site.py', 'test_methods.py', 'test_device.py', 'test_faults_checkpoint.py', 'test_ranks.py',
              'test_faults_identity.py', 'test_cli.py', 'test_first_run.py', 'test_compare.py', 'test_recommend.py',
              'test_loaders.py', 'test_loops.py', 'test_recipes.py', 'test_lists.py', 'test_package.py']


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run the slow tests too')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: left out unless --all is given or the test is named')
    worker = getattr(config, 'workerinput', {}).get('workerid')
    if worker: keep_to_one_core(int(worker.removeprefix('gw')))
    elif not config.getoption('numprocesses', None): keep_to_one_core(0)


def keep_to_one_core(worker):
    """Keep this process, and those that it starts, to a core of its own.

    `ltrl compare --jobs 1` would compute with a thread for each core. Such threads wait for each other, busily, while
    the tests of another worker use their core: a step then takes up to a hundred times as long.
    """
    if not hasattr(os, 'sched_setaffinity'): return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file is the work of one worker, which makes its fixtures once; the chapters are shared one by one"
    from xdist.scheduler import LoadFileScheduling
    if config.getoption('dist') != 'loadfile': return None
    class ByFileAndChapter(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if is_chapter(nodeid) else super()._split_scope(nodeid)
    return ByFileAndChapter(config, log)


def is_chapter(nodeid): return 'test_notebooks.py::test_notebook[' in nodeid


def place(item):
    "Where a test comes in the order of all: long files, other files, then chapters, the slow ones first"
    if is_chapter(item.nodeid): return len(long_files)+1+(item.get_closest_marker('slow') is None)
    return long_files.index(item.path.name) if item.path.name in long_files else len(long_files)


def pytest_collection_modifyitems(config, items):
    "Sort tests; leave slow ones out, unless all are wanted or a test is named: `tests/test_x.py::test_y`"
    items.sort(key=place)
    if config.getoption('--all') or any('::' in o for o in config.args): return
    slow = [o for o in items if o.get_closest_marker('slow')]
    config.hook.pytest_deselected(items=slow)
    items[:] = [o for o in items if not o.get_closest_marker('slow')]


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    "A million objects that imports make are no garbage: a full collection would look at them for half a second"
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope='session')
def _quick_workers():
    "Comparisons start their workers at once, also those of `ltrl` as a process, unless it is a new interpreter"
    from quick_workers import quick_workers
    with quick_workers(): yield


@pytest.fixture(autouse=True, scope='session')
def _quick_digits():
    "Reading scikit-learn's digits from their file takes as long as some fits with them"
    from sklearn import datasets
    with patch.object(datasets, 'load_digits', functools.cache(datasets.load_digits)): yield


@pytest.fixture(autouse=True)
def _choices_of_a_command():
    "What a command chooses for its process, such as `--no-check`, ends with the test"
    from fastai.basics import defaults
    names = ('LTRL_CHECK_IMAGES', 'LTRL_DEVICE', 'LTRL_WORKERS')
    before = {name: os.environ.get(name) for name in names}
    use_cuda = defaults.use_cuda
    yield
    defaults.use_cuda = use_cuda
    for name, value in before.items():
        if value is None: os.environ.pop(name, None)
        else: os.environ[name] = value


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    "Matplotlib warns of many open figures, and some tests expect no warning"
    yield
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


@pytest.fixture
def dls():
    "digits-LT on the CPU, seeded, with five batches of training images"
    from fastai.basics import set_seed
    from ltrl_fastai.all import digits_lt
    set_seed(0, reproducible=True)
    return digits_lt(device='cpu', n_max=48)


@pytest.fixture
def few_test_digits(monkeypatch):
    "Ten test images of each digit instead of forty, for tests that compare runs and don't judge them"
    from ltrl_fastai.data import benchmarks
    original = benchmarks.long_tail_indices
    def fewer(y, counts, seed): return original(y, [10]*10 if list(counts) == [40]*10 else counts, seed)
    monkeypatch.setattr(benchmarks, 'long_tail_indices', fewer)


@pytest.fixture
def quick_fit():
    "Fit without a progress bar and without a table"
    def _fit(learn, n=1, lr=1e-2, **kwargs):
        with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
        return learn
    return _fit


@pytest.fixture
def mlp():
    "Make a net with dropout before its head"
    from torch import nn
    def make():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.1), nn.Linear(32, 10))
    return make


@pytest.fixture(scope='session')
def digits_model(tmp_path_factory):
    "A folder of digits as images (train, test) and a small model of them that was saved: two paths; read only"
    from fastai.vision.all import noop
    from ltrl_fastai.data.beds import write_digits_folder
    from ltrl_fastai.deploy.calibration import fit_calibration
    from ltrl_fastai.deploy.model_files import save_classifier
    from ltrl_fastai.experiments.settings import RunSettings
    folder = tmp_path_factory.mktemp('digits')
    images = write_digits_folder(folder/'digits')
    settings = RunSettings(str(images), net='resnet8', epochs=8, bs=16, lr=.05, method='bsce')
    learn = settings.learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(settings.epochs, settings.lr)
        logits, targets = learn.get_preds(act=noop)
    calibration = fit_calibration(logits, targets, learn.dls.class_counts)
    build = settings.build_facts(learn)
    model = save_classifier(learn, folder/'model', build=build, calibration=calibration, name='Digits')
    return images, model


@pytest.fixture(scope='module')
def browser():
    "Chromium without a window; the test is skipped without it"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    driver = shutil.which('chromedriver')
    if not driver:
        if os.environ.get('CI'): pytest.fail('a browser is needed: install chromium and chromedriver')
        pytest.skip('no chromedriver: install chromium and chromedriver to see pages in a browser')
    options = webdriver.ChromeOptions()
    arguments = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                 '--window-size=1300,1000')
    for o in arguments: options.add_argument(o)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    b = webdriver.Chrome(options=options, service=Service(driver))
    yield b
    b.quit()
