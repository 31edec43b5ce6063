"The guide for contributors is correct: commands and files exist, the workflow runs .ci/run, forms are valid."
import re
import shutil
import sys
from pathlib import Path

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
