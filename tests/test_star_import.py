"`from ltrl_fastai.all import *` brings public names, and shadows none of fastai, fastcore or PyTorch."
import importlib
import subprocess
import sys

import pytest
from public import modules

others = '''
    fastai.vision.all fastai.basics fastai.tabular.all fastai.text.all fastai.callback.all fastai.collab
    fastai.data.all fastai.distributed fastai.learner fastai.data.external fastai.losses fastai.metrics fastai.optimizer
    fastcore.all fastcore.basics fastcore.foundation fastcore.utils fastcore.xtras fastcore.test fastcore.script
    fastcore.meta fasttransform torch torch.nn torch.nn.functional torch.nn.utils torch.optim torch.utils.data
    torch.distributed torchvision torchvision.transforms torchvision.models numpy pandas builtins'''.split()


def starred(module):
    "The names of a star import of this module, and their objects"
    module = importlib.import_module(module)
    names = getattr(module, '__all__', None) or [k for k in vars(module) if not k.startswith('_')]
    return {k: getattr(module, k) for k in names}


def shadowed(ours, theirs): return sorted(k for k in ours if k in theirs and ours[k] is not theirs[k])


@pytest.mark.parametrize('module', others)
def test_fault_13_nothing_is_shadowed(module):
    mine = starred('ltrl_fastai.all')
    public = {k: v for k, v in vars(importlib.import_module(module)).items() if k[0] != '_'}
    assert not shadowed(mine, starred(module))
    assert not shadowed(mine, public)


def test_fault_13_a_shadow_is_found():
    def fastai_path(url): return url
    assert shadowed({'fastai_path': fastai_path}, starred('fastai.basics')) == ['fastai_path']


@pytest.mark.parametrize('module', [o for o in modules if '.cli' not in o.__name__], ids=lambda o: o.__name__)
def test_fault_13_no_chapter_shadows_fastai(module):
    "Variant: `from ltrl_fastai.data.benchmarks import *`, as a reader of that chapter may write"
    mine = {k: getattr(module, k) for k in module.__all__}
    for other in ('fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'torch', 'torch.nn', 'builtins'):
        assert not shadowed(mine, starred(other))


def test_all_lists_each_name_once_and_only_what_modules_export():
    names = importlib.import_module('ltrl_fastai.all').__all__
    assert len(names) > 200 and len(set(names)) == len(names)
    exported = {id(o) for module in modules for o in starred(module.__name__).values()}
    assert not [name for name, o in starred('ltrl_fastai.all').items() if id(o) not in exported]


def test_old_names_warn_and_still_work():
    package = importlib.import_module('ltrl_fastai.all')
    for old, new in package._renamed.items():
        with pytest.warns(FutureWarning, match=f'{old} is now called {new}'):
            assert getattr(package, old) is getattr(package, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): getattr(package, 'nothing')  # noqa: B009


def test_fault_13_common_words_are_not_exported():
    "Words that users are likely to use as names themselves"
    words = {'distil', 'interval', 'locate', 'smooth', 'shrink', 'read_csv', 'abbreviated', 'one_of', 'upcast'}
    assert not words & set(starred('ltrl_fastai.all'))


def two_star_imports(first, second):
    "Code that imports all names of two modules, and prints which of either it has not"
    return (f'from {first} import *\nfrom {second} import *\n'
            'import fastai.vision.all as f, ltrl_fastai.all as l\n'
            'lost = [k for k, v in vars(f).items() if k[0]!="_" and globals().get(k) is not v]\n'
            'mine = [k for k, v in vars(l).items() if k[0]!="_" and globals().get(k) is not v]\n'
            'print(lost, mine)')


def test_fault_13_both_star_imports_keep_all_names(capsys):
    "Of modules that are loaded, in either order"
    exec(two_star_imports('fastai.vision.all', 'ltrl_fastai.all'), {})
    exec(two_star_imports('ltrl_fastai.all', 'fastai.vision.all'), {})
    assert capsys.readouterr().out == '[] []\n[] []\n'


@pytest.mark.slow
def test_fault_13_both_star_imports_keep_all_names_in_a_new_process():
    "Where `ltrl_fastai.all` is imported first"
    code = two_star_imports('ltrl_fastai.all', 'fastai.vision.all')
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.stdout.strip() == '[] []', r.stdout+r.stderr
