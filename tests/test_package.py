"The source archive and the wheel: they are complete, contain nothing else, install, and work without a checkout."
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
root = Path(__file__).parent.parent
without_path = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'} # which might find the checkout
not_copied = shutil.ignore_patterns('.git', '__pycache__', '*.egg-info', 'build', 'dist', '_docs', '_proc', '.venv',
                                    'ltrl-runs', '.*_cache')


def run(*args, **kwargs):
    r = subprocess.run([str(o) for o in args], capture_output=True, text=True, env=without_path, **kwargs)
    assert r.returncode==0, r.stdout+r.stderr
    return r.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The two archives; the wheel is built from the source archive, which shows that it is complete"
    folder = tmp_path_factory.mktemp('package')
    shutil.copytree(root, folder/'src', ignore=not_copied)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder/'dist', folder/'src', cwd=folder)
    return folder/'dist'


@pytest.fixture(scope='module')
def wheel(built): return next(built.glob('*.whl'))


@pytest.fixture(scope='module')
def sdist(built): return next(built.glob('*.tar.gz'))


@pytest.fixture(scope='module')
def venv(wheel, tmp_path_factory):
    "An environment with the wheel, and the other packages of this environment"
    folder = tmp_path_factory.mktemp('venv')
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    site = next(folder.glob('lib/python*/site-packages'))
    # .pth files in these folders, as of an editable install, are not read
    (site/'others.pth').write_text('\n'.join(o for o in sys.path if Path(o).name in ('site-packages','dist-packages')))
    pip = [sys.executable, '-m', 'pip', '--python', folder/'bin/python']
    run(*pip, 'install', '--no-deps', '--no-index', '--quiet', wheel)
    return folder


def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        name = next(o for o in z.namelist() if o.endswith('/METADATA'))
        return Parser().parsestr(z.read(name).decode())


def test_twine_finds_no_error(built): run(sys.executable, '-m', 'twine', 'check', '--strict', *sorted(built.iterdir()))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z: names = set(z.namelist())
    ours = {o for o in names if '.dist-info/' not in o}
    modules = {str(o.relative_to(root)) for o in (root/'ltrl_fastai').rglob('*.py')}
    data = {'py.typed', 'data/photos_lt.npz', 'experiments/report.html.jinja'}
    assert ours == modules | {f'ltrl_fastai/{o}' for o in data}
    assert any(o.endswith('.dist-info/licenses/LICENSE') for o in names)


def test_the_source_archive_is_enough_to_build_and_small(sdist):
    with tarfile.open(sdist) as t: names = {o.name.split('/', 1)[1] for o in t if o.isfile()}
    assert {'README.md','LICENSE','CHANGELOG.md','pyproject.toml','setup.py','settings.ini','ltrl_fastai/py.typed',
            'ltrl_fastai/__main__.py'} <= names
    top = {o.split('/')[0] for o in names if '/' in o}
    assert top=={'ltrl_fastai','ltrl_fastai.egg-info'}, 'tests, notebooks and results stay in the repository'
    assert sdist.stat().st_size < 3e6


def test_metadata(wheel):
    from ltrl_fastai import __version__
    m = metadata(wheel)
    assert (m['Name'],m['Version']) == ('ltrl_fastai', __version__)
    assert (m['Requires-Python'],m['License-Expression']) == ('>=3.10', 'Apache-2.0')
    assert m['Summary'] and m['Author'] and m['Maintainer'] and len(m['Keywords'].split(','))>3
    assert m['Description-Content-Type']=='text/markdown'
    assert m.get_payload().strip()==(root/'README.md').read_text().strip()
    pythons = {f'Programming Language :: Python :: 3.{i}' for i in range(10, 14)}
    assert pythons | {'Typing :: Typed','Operating System :: OS Independent'} <= set(m.get_all('Classifier'))


def test_requirements_and_extras_are_those_of_settings_ini(wheel):
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini')
    expected = {}
    for k,v in ini['DEFAULT'].items():
        if k.endswith('requirements'): expected[k.removesuffix('requirements').rstrip('_')] = set(v.split())
    found = {k: set() for k in ['', *metadata(wheel).get_all('Provides-Extra')]}
    for o in metadata(wheel).get_all('Requires-Dist'):
        requirement,_,extra = o.partition('; extra == ')
        found[extra.strip('"')].add(requirement)
    assert found==expected
    assert set(expected)>{'','dev'}


def test_syntax_that_the_oldest_python_lacks_is_found():
    command = [Path(sys.executable).parent/'ruff', 'check', '--stdin-filename', 'ltrl_fastai/x.py', '-']
    r = subprocess.run(command, input='x = f"{"a"}"\n', capture_output=True, text=True, cwd=root)
    assert r.returncode==1 and 'Python 3.10' in r.stdout


def test_installed_and_imported_outside_the_checkout(venv, tmp_path):
    code = ('import ltrl_fastai.all as lib, pathlib\n'
            'print(lib.__file__)\n'
            'print((pathlib.Path(lib.__file__).parent/"py.typed").exists(), lib.ReflectiveLearning())')
    file,rest = run(venv/'bin/python', '-c', code, cwd=tmp_path).splitlines()[-2:]
    assert Path(file).is_relative_to(venv) and rest.startswith('True ReflectiveLearning')


def test_the_command_and_the_module_are_the_same(venv, tmp_path):
    module = run(venv/'bin/python', '-m', 'ltrl_fastai', '--help', cwd=tmp_path)
    assert 'Usage: python -m ltrl_fastai [OPTIONS] COMMAND' in module
    assert run(venv/'bin/ltrl', '--help', cwd=tmp_path)==module.replace('python -m ltrl_fastai', 'ltrl')


def test_the_command_works(venv, tmp_path):
    from ltrl_fastai.methods.catalogue import methods
    listed = json.loads(run(venv/'bin/ltrl', 'methods', '--json', cwd=tmp_path))
    assert {o['name'] for o in listed}==set(methods)
