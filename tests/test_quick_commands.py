"Commands that train nothing import neither PyTorch nor fastai, so that they answer in less than a second."
import json
import os
import subprocess
import sys

import pytest
from ltrl_fastai.cli.main import app
from ltrl_fastai.data.listfiles import list_sets
from ltrl_fastai.experiments.recipes import later_recipes, recipes
from ltrl_fastai.methods.facts import method_facts

commands = [o.name or o.callback.__name__ for o in app.registered_commands]
slow = ('torch', 'torchvision', 'fastai')

program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {slow}: raise AssertionError(f'{{name}} is imported')

sys.meta_path.insert(0, Refuse())
from ltrl_fastai.cli.main import main
main()
"""


def run_without_torch(*args, cwd, code=0):
    "What `ltrl` prints in a process that can't import PyTorch or fastai"
    env = {**os.environ, 'COLUMNS': '200', 'FASTAI_HOME': str(cwd/'home')}
    command = [sys.executable, '-c', program, *map(str, args)]
    r = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode == code and 'Traceback' not in r.stderr, r.stdout+r.stderr
    return r.stdout+r.stderr


@pytest.mark.parametrize('command', commands)
def test_help(command, tmp_path):
    said = run_without_torch(command, '--help', cwd=tmp_path)
    assert f'{command} ' in said and '--help' in said


def test_help_of_all(tmp_path):
    said = run_without_torch('--help', cwd=tmp_path)
    assert all(f'\n  {o} ' in said for o in commands)
    assert '...' not in said.partition('Commands:')[2]  # no description is cut short


def test_methods(tmp_path):
    said = run_without_torch('methods', cwd=tmp_path)
    assert all(k in said for k in method_facts)
    facts = json.loads(run_without_torch('methods', '--json', cwd=tmp_path))
    keys = ('about', 'reference', 'year', 'stages', 'views')
    for (name, expected), row in zip(method_facts.items(), facts, strict=True):
        assert row['name'] == name and all(row[k] == getattr(expected, k) for k in keys)
    bsce = next(row['reported'] for row in facts if row['name'] == 'bsce')
    assert bsce['cifar100-lt'] == {'all': 46.1, 'source': 'slides, table1, resnet32'}
    assert {'imagenet-lt', 'places-lt', 'inaturalist18'} <= set(bsce)


def test_recipes(tmp_path):
    assert run_without_torch('recipes', cwd=tmp_path).count('\ntable1/') == 69
    assert len(json.loads(run_without_torch('recipes', '--json', cwd=tmp_path))) == len(recipes)+len(later_recipes)
    assert 'Used here' in run_without_torch('recipes', 'table1/BSCE+RL/100', cwd=tmp_path)
    assert "Did you mean 'table1/RIDE/100'" in run_without_torch('recipes', 'table1/RIED/100', cwd=tmp_path, code=2)


def test_datasets_that_are_missing(tmp_path):
    said = run_without_torch('datasets', cwd=tmp_path)
    assert said.count('Missing: ') == 8 and f"{tmp_path/'home'}" in said
    said = run_without_torch('datasets', '--data', 'nowhere', cwd=tmp_path, code=2)
    assert 'is not there, where a folder was expected' in said


def test_datasets_that_are_there(tmp_path):
    "Lists are read, and all of their images are looked for"
    lists = list_sets['imagenet-lt'].lists
    for i, file in enumerate(lists.values()):
        image = f'train/n0144076{i}/a.JPEG'
        (tmp_path/image).parent.mkdir(parents=True)
        (tmp_path/image).touch()
        (tmp_path/file).write_text(f'{image} 0\n')
    for part in ('train', 'test'): (tmp_path/'magnetic'/part/'free').mkdir(parents=True)
    (tmp_path/'cifar-100-python').mkdir()
    listed = json.loads(run_without_torch('datasets', '--json', '--data', tmp_path, cwd=tmp_path))
    found = {o['name']: o for o in listed}
    assert [found[o]['state'] for o in ('imagenet-lt', 'magnetic', 'cifar100-lt')] == ['there']*3
    assert 'all 3 images' in found['imagenet-lt']['found'] and 'not the published' in found['imagenet-lt']['notes'][0]
    (tmp_path/image).unlink()
    said = run_without_torch('datasets', '--data', tmp_path, cwd=tmp_path)
    assert '1 of 1 images in test' in said and 'in part' in said
