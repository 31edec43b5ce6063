"The guide for contributors is correct: commands and files exist, the workflow runs .ci/run, forms are valid."
import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parent.parent
text = (root/'CONTRIBUTING.md').read_text()


def test_commands_and_files_exist():
    commands = re.search(r'(?:^ {4}.*\n)+', text, re.M).group().splitlines()
    assert len(commands) == 5
    for line in commands:
        program = line.split()[0]
        assert (Path(sys.executable).parent/program).exists() or shutil.which(program), line
    files = {o for o in re.findall(r'(?:nbs|tests|tools|ltrl_fastai)/[\w/.]+\w', text) if 'NN_' not in o}
    assert len(files) > 8 and not [o for o in files if not (root/o).exists()]


def test_the_notebook_in_the_example_is_tested():
    from test_notebooks import notebooks
    name = re.search(r'test_notebook\[(.*?)\]', text)[1]
    assert name in {str(o.relative_to(root/'nbs')) for o in notebooks}


def source(path):
    "The lines of a module, or of all code cells of a notebook"
    content = (root/path).read_text()
    if not path.endswith('.ipynb'): return content.splitlines()
    cells = [''.join(o['source']) for o in json.loads(content)['cells'] if o['cell_type'] == 'code']
    return '\n'.join(cells).splitlines()


def changes(diff):
    "The lines of a diff by file"
    res = {}
    for line in diff.splitlines():
        if line.startswith('# '): lines = res.setdefault(line[2:], [])
        else: lines.append(line)
    return res


def changed(lines, change):
    "`lines` after a change: lines that are kept or removed stand there, in this order"
    done, left = [], list(lines)
    for line in change:
        mark, content = line[:1], line[1:]
        if mark == '+':
            done.append(content)
            continue
        assert mark in ' -' and content in left, f'there is no line {content!r} here'
        at = left.index(content)
        done += left[:at]
        if mark == ' ': done.append(content)
        left = left[at+1:]
    return done+left


examples = re.findall(r'^\*\*(?:A|An) ([^*]+)\*\*.*?^```diff\n(.*?)^```', text, re.M | re.S)


def test_there_is_an_example_of_each_kind():
    words = ('loss', 'method', 'data set', 'part of Reflective Learning', 'option of `ltrl train`')
    assert [name for name, _ in examples] == [*words]


@pytest.mark.parametrize('name,diff', examples)
def test_an_example_touches_two_places_at_most_and_fits_the_code(name, diff):
    files = changes(diff)
    assert 1 <= len(files) <= 2
    for path, change in files.items():
        before = source(path)
        after = changed(before, change)
        added = [o[1:] for o in change if o[:1] == '+']
        assert added and not set(added) <= set(before)
        assert max(map(len, added)) <= 120
        ast.parse('\n'.join(o for o in after if not o.startswith(('%', '!'))))


def test_the_workflow_runs_what_ci_runs():
    steps = yaml.safe_load((root/'.github/workflows/ci.yml').read_text())['jobs']['test']['steps']
    assert [o['run'] for o in steps if 'run' in o] == ['bash .ci/run']


def test_forms_have_required_fields():
    forms = sorted((root/'.github/ISSUE_TEMPLATE').glob('*.yml'))
    for f in forms:
        form = yaml.safe_load(f.read_text())
        if f.name == 'config.yml': continue
        fields = form['body']
        assert form['name'] and form['description']
        assert any(o.get('validations', {}).get('required') for o in fields)
        assert len({o['id'] for o in fields}) == len(fields) and all(o['attributes']['label'] for o in fields)
    assert len(forms) == 4
