"Every notebook runs, is clean, and is exported; the code is linted."
import json
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltrl_fastai.cli.main import app

root = Path(__file__).parent.parent
notebooks = sorted(root.glob('nbs/**/*.ipynb'))
# Chapters that take more than ten seconds: they train several networks, or start several processes
slow = {
    'core/03_ranks', 'deploy/04_evaluate', 'deploy/06_suspects', 'experiments/31_html_report',
    'explanations/00_knowledge_review', 'explanations/01_knowledge_summary',
    'explanations/02_knowledge_correction', 'experiments/00_checkpoint', 'experiments/03_runner',
    'experiments/05_summary',
    'experiments/06_bench', 'experiments/10_tuning', 'experiments/11_seeds', 'cli/03_train',
    'cli/08_compare', 'methods/09_decouple',
    'methods/10_mislas', 'methods/11_balancing', 'methods/12_oltr', 'methods/13_experts', 'methods/14_ride',
    'methods/15_sade', 'methods/16_mdcs', 'methods/17_ncl', 'methods/18_paco', 'methods/20_mixup',
    'methods/25_sampling', 'methods/35_balpoe', 'methods/37_proco', 'methods/38_glmc', 'methods/39_car',
    'reflective/02_samples',
    'tutorials/00_first_run', 'tutorials/01_your_own_images', 'tutorials/03_ablations', 'tutorials/04_several_gpus',
    'tutorials/05_resuming', 'tutorials/06_reading_the_plots', 'tutorials/07_a_method_of_your_own',
}


def tool(name): return str(Path(sys.executable).parent/name)


def copied(tmp_path):
    "A copy of what the tools read, so that they don't change the checkout"
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for o in ('nbs', 'ltrl_fastai'): shutil.copytree(root/o, tmp_path/o, ignore=ignore)
    for o in ('pyproject.toml', 'settings.ini', 'setup.py'): shutil.copy(root/o, tmp_path/o)
    return tmp_path


def changed(a, b, pattern):
    "Files that differ between two folders, or are in one of them only"
    def is_cached(p): return {'__pycache__', '.ipynb_checkpoints'} & {*p.parts}
    def is_equal(f): return (a/f).exists() and (b/f).exists() and filecmp.cmp(a/f, b/f, shallow=False)
    files = {p.relative_to(folder) for folder in (a, b) for p in folder.rglob(pattern) if not is_cached(p)}
    return sorted(str(f) for f in files if not is_equal(f))


def chapter(nb):
    "A notebook as a parameter, slow if it is on the list"
    name = nb.relative_to(root/'nbs').with_suffix('').as_posix()
    return pytest.param(nb, id=f'{name}.ipynb', marks=[pytest.mark.slow] if name in slow else [])


def test_slow_chapters_exist():
    assert slow <= {nb.relative_to(root/'nbs').with_suffix('').as_posix() for nb in notebooks}


@pytest.fixture
def _commands_as_before():
    "The cells of a command's chapter add it to the application once more: other tests must not find it there"
    before = list(app.registered_commands)
    yield
    app.registered_commands[:] = before


@pytest.mark.parametrize('nb', map(chapter, notebooks))
def test_notebook(nb, _commands_as_before):
    from nbdev.test import test_nb as run
    folder, handler = os.getcwd(), signal.getsignal(signal.SIGINT)
    try: ok, _ = run(nb, skip_flags=['notest'], basepath=root)
    finally:
        os.chdir(folder)
        signal.signal(signal.SIGINT, handler)
    assert ok, f'{nb.relative_to(root)} failed: its traceback is in the captured standard error'


def test_export_is_fresh(tmp_path):
    there = copied(tmp_path)
    subprocess.run([tool('nbdev-export')], cwd=there, check=True, capture_output=True)
    assert not changed(root/'ltrl_fastai', there/'ltrl_fastai', '*.py'), 'run nbdev-export and commit what it changes'


def test_notebooks_are_clean(tmp_path):
    there = copied(tmp_path)
    subprocess.run([tool('nbdev-clean')], cwd=there, check=True, capture_output=True)
    assert not changed(root/'nbs', there/'nbs', '*.ipynb'), 'run nbdev-clean and commit what it changes'


def test_no_traces_of_a_machine_in_outputs():
    for nb in notebooks:
        text = nb.read_text()
        outputs = str([cell.get('outputs') for cell in json.loads(text)['cells']])
        assert str(root) not in text and str(Path.home()) not in text and 'site-packages' not in outputs, nb.name


def test_descriptions_of_pictures_are_yaml():
    "A description with a colon has to be quoted, or it is missing on the page"
    import yaml
    for nb in notebooks:
        for cell in json.loads(nb.read_text())['cells']:
            for line in cell['source']:
                if not line.startswith('#| fig-alt:'): continue
                assert isinstance(yaml.safe_load(line[2:])['fig-alt'], str), f'{nb.name}: {line}'


def test_pictures_are_for_dark_pages_too():
    "Pictures are drawn inside `picture_style()`: their background is transparent"
    import base64
    import io
    from PIL import Image
    for nb in notebooks:
        for i, cell in enumerate(json.loads(nb.read_text())['cells']):
            data = [o['data'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
            for o in data:
                picture = Image.open(io.BytesIO(base64.b64decode(''.join(o['image/png'])))).convert('RGBA')
                where = f'{nb.relative_to(root)}, cell {i}'
                assert picture.getpixel((0, 0))[3] == 0, f'{where}: draw it `with picture_style():`'


def test_lint():
    r = subprocess.run([tool('ruff'), 'check', '.'], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


def long_lines(path, source):
    "Lines of more than 120 columns, apart from descriptions of pictures, which are one line, and nbdev's `__all__`"
    source = re.sub(r'^__all__ = \[.*?\]', '', source, flags=re.DOTALL | re.MULTILINE)
    return [f'{path}: {line}' for line in source.splitlines() if len(line) > 120 and not line.startswith('#| fig-alt')]


def test_lines_have_at_most_120_columns():
    found = []
    for nb in notebooks:
        for cell in json.loads(nb.read_text())['cells']:
            if cell['cell_type'] == 'code': found += long_lines(nb.name, ''.join(cell['source']))
    folders = ('ltrl_fastai', 'tests', 'tools', 'results')
    for module in (o for folder in folders for o in (root/folder).rglob('*.py') if o.name != '_modidx.py'):
        found += long_lines(module.relative_to(root), module.read_text())
    assert not found
    long = 'x'*121
    assert long_lines('one', long)
    assert not long_lines('one', f"#| fig-alt: {long}\n__all__ = ['{long}',\n 'y']")
