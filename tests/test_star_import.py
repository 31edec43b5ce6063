"`from ltrl_fastai.all import *` imports all public names but a few, and shadows none of fastai, fastcore or PyTorch."
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

others = '''
    fastai.vision.all fastai.basics fastai.tabular.all fastai.text.all fastai.callback.all fastai.collab
    fastai.data.all fastai.distributed fastai.learner fastai.data.external fastai.losses fastai.metrics fastai.optimizer
    fastcore.all fastcore.basics fastcore.foundation fastcore.utils fastcore.xtras fastcore.test fastcore.script
    fastcore.meta fasttransform torch torch.nn torch.nn.functional torch.nn.utils torch.optim torch.utils.data
    torch.distributed torchvision torchvision.transforms torchvision.models numpy pandas builtins'''.split()
left_out = set('''
    fastai_path follow interval locate smooth as_listed dealt did_you_mean few_of flat_val read_csv shrink where_to_put
    with_targets alone_and_even scales_alone_and_even shifted_and_even'''.split())


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
    from ltrl_fastai.data.benchmarks import fastai_path
    assert shadowed({'fastai_path': fastai_path}, starred('fastai.basics')) == ['fastai_path']


def test_fault_13_every_exported_name_is_there_or_left_out_on_purpose():
    "Each exported name of the package is in `ltrl_fastai.all`, or on the list above"
    mine = starred('ltrl_fastai.all')
    every = {}
    for line in (Path(__file__).parent.parent/'ltrl_fastai/all.py').read_text().splitlines():
        if line.startswith('from ltrl_fastai.') and line.endswith('import *'): every.update(starred(line.split()[1]))
    assert len(every) > 200
    assert set(every)-set(mine) == left_out
    assert all(mine[k] is v for k, v in every.items() if k in mine)


def test_fault_13_common_words_are_not_exported():
    "Words that users are likely to use as names themselves"
    assert not left_out & set(starred('ltrl_fastai.all'))


def test_fault_13_both_star_imports_keep_all_names():
    "In a new process, in either order"
    for first, second in (('fastai.vision.all', 'ltrl_fastai.all'), ('ltrl_fastai.all', 'fastai.vision.all')):
        code = (f'from {first} import *\nfrom {second} import *\n'
                'import fastai.vision.all as f, ltrl_fastai.all as l\n'
                'lost = [k for k, v in vars(f).items() if k[0]!="_" and globals().get(k) is not v]\n'
                'mine = [k for k, v in vars(l).items() if k[0]!="_" and globals().get(k) is not v]\n'
                'print(lost, mine)')
        r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
        assert r.stdout.strip() == '[] []', r.stdout+r.stderr
