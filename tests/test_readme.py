"The README is correct, and is made from its notebook."
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parent.parent
text = (root/'README.md').read_text()


def test_made_from_the_notebook():
    r = subprocess.run([sys.executable, root/'tools/make_readme.py', '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_first_block_is_the_two_commands():
    block = re.search(r'(?:^ {4}.*\n)+', text, re.M).group().splitlines()
    commands = [line.split('#')[0].strip() for line in block]
    assert commands == ['pip install . && ltrl train', "pip install -e '.[dev]' && pytest"]


def test_ci_calls_the_readmes_test_command():
    assert "pip install -q -e '.[dev]' && pytest" in (root/'.ci/run').read_text()


def test_options_in_the_readme_exist():
    from typer.testing import CliRunner
    from ltrl_fastai.cli.main import app
    known = CliRunner().invoke(app, ['train', '--help']).output
    for command in re.findall(r'`(ltrl train [^`]*)`', text):
        for option in re.findall(r'--[a-z-]+', command): assert option in known or option == '--help', option


def test_every_promised_name_is_in_all():
    import ltrl_fastai.all as lib

    names = """
        review_loss class_centers class_similarity soft_labels soft_cross_entropy project_conflict SampleIds
        TeacherMemory FeatureBank KnowledgeReview KnowledgeSummary KnowledgeCorrection ReflectiveLearning
        imbalanced_counts long_tail_subset class_counts digits_lt cifar10_lt cifar100_lt CifarResNet CosineHead
        create_net BalancedSoftmaxLoss shot_accuracies ShotReport""".split()
    assert not [n for n in names if not hasattr(lib, n)]


def test_the_number_of_methods():
    "Where a page says how many there are beside softmax, it is as many"
    from ltrl_fastai.methods.facts import method_facts
    n = len(method_facts)-1
    page = (root/'nbs/explanations/06_beside_other_tools.ipynb').read_text()
    assert f'brings {n} other long-tail methods' in text
    assert f'| Methods for uneven classes | {n}, Balanced Softmax by default |' in page
