"Pages on runs: complete, self-contained, escaped, accessible, and readable in a browser; without what is missing."
import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from fastai.vision.all import noop, torch
from ltrl_fastai.core.files import write_json
from ltrl_fastai.experiments.html_report import _open_data, write_report
from ltrl_fastai.deploy.evaluate import evaluate
from ltrl_fastai.deploy.model_files import load_classifier
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.settings import RunSettings
from ltrl_fastai.experiments.training import train_run
from sklearn.metrics import confusion_matrix
from test_site import luminance, requests, set_phone_screen
from typer.testing import CliRunner

root = Path(__file__).parent.parent
void = {'meta', 'img', 'br', 'link', 'input', 'hr'}


class Page(HTMLParser):
    "What a page holds: elements with their attributes, texts, cells of tables, and elements that are not closed"
    def __init__(self, text):
        super().__init__()
        self.source = text
        self.elements = []
        self.open = []
        self.texts = []
        self.tables = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in void: self.open.append(tag)
        if tag == 'table': self.tables.append([])
        if tag == 'tr': self.tables[-1].append([])
        if tag in ('td', 'th'): self.tables[-1][-1].append('')

    def handle_startendtag(self, tag, attrs): self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'{tag} is closed inside {self.open[-3:]}'
        self.open.pop()

    def handle_data(self, data):
        if 'style' in self.open: return
        self.texts.append(data)
        if {'td', 'th'} & {*self.open}: self.tables[-1][-1][-1] += data

    @property
    def text(self): return ' '.join(' '.join(self.texts).split())

    def table(self, *headers):
        "The rows of the first table whose header has all of these cells"
        found = [rows for rows in self.tables if rows and {*headers} <= {cell.strip() for cell in rows[0]}]
        return [[cell.strip() for cell in row] for row in found[0]]


def page_of(folder): return Page(write_report(folder).read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def run(digits_model, tmp_path_factory):
    "A run of digits with and without Reflective Learning, with model and suspects; read only"
    images, model = digits_model
    folder = tmp_path_factory.mktemp('report')/'run'
    settings = dict(dataset=str(images), net='resnet8', epochs=2, bs=32, lr=.05)
    res, _ = train_run(RunSettings(**settings, reflective=dict(preset='default')), bar=False)
    base, _ = train_run(RunSettings(**settings), bar=False)
    res['baseline'] = {k: base[k] for k in ('accuracy', 'valid_accuracy', 'train_accuracy', 'per_class', 'history')}
    gains = {k: None if v is None else v-base['accuracy'][k] for k, v in res['accuracy'].items()}
    res['gain'] = gains
    file = next((images/'train'/'one').iterdir()).relative_to(images).as_posix()
    res['suspects'] = [dict(item=3, file=file, label='one', suggested='seven', right=.25, probability=.1,
                            suggested_probability=.7, doubt=.8)]
    write_json(res, folder/'result.json')
    shutil.copytree(model, folder/'model', dirs_exist_ok=True)
    return folder


@pytest.fixture
def changed(run, tmp_path):
    "Make a copy of the run, without its model, whose result was changed by a function"
    def make(change=noop):
        res = json.loads((run/'result.json').read_text())
        change(res)
        write_json(res, tmp_path/'changed'/'result.json')
        return tmp_path/'changed'
    return make


def check_self_contained(page):
    for tag, attrs in page.elements:
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed', 'base', 'form'), tag
        for name, value in attrs.items():
            if name in ('src', 'href', 'xlink:href', 'srcset', 'poster'):
                assert value.startswith(('data:', '#')), f'{tag} {name}={value[:80]}'
            assert not name.startswith('on'), f'{tag} has a handler: {name}'
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"', '', page.source)
    assert 'http:' not in rest and 'https:' not in rest and '@import' not in rest
    assert all(o.startswith(('#', '"#')) for o in re.findall(r'url\(([^)]*)', rest))


def check_accessible(page):
    ids = [attrs['id'] for _, attrs in page.elements if 'id' in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        if tag == 'img': assert attrs.get('alt')
        if tag == 'svg': assert attrs['role'] == 'img' and len(attrs['aria-label']) > 20
        if tag == 'th': assert attrs.get('scope') in ('row', 'col')
        if 'aria-labelledby' in attrs: assert attrs['aria-labelledby'] in ids
        if tag == 'a': assert attrs['href'][1:] in ids
        if tag in ('use', 'image') and attrs.get('href', '#')[0] == '#': assert attrs['href'][1:] in ids
    assert set(re.findall(r'url\(#([^)]*)\)', page.source)) <= set(ids)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch('h[1-6]', tag)]
    assert headings[0] == 1 and headings.count(1) == 1 and all(b-a <= 1 for a, b in zip(headings, headings[1:]))
    n_tables = sum(tag == 'table' for tag, _ in page.elements)
    assert sum(tag == 'caption' for tag, _ in page.elements) == n_tables
    assert not page.open
    assert ('html', {'lang': 'en'}) in page.elements


def test_a_run(run):
    "The numbers are those of the result, and nothing is loaded"
    page = page_of(run)
    check_self_contained(page)
    check_accessible(page)
    assert len(page.source) < 5e6
    res = json.loads((run/'result.json').read_text())
    rows = {row[0]: row[1:] for row in page.table('Class', 'Training images')}
    assert rows['Class'] == ['Training images', 'Test Images', 'bsce (%)', 'bsce + RL (%)', 'Difference']
    for i, name in enumerate(res['classes']):
        without, with_rl = res['baseline']['per_class'][i], res['per_class'][i]
        assert rows[name] == [str(res['class_counts'][i]), '20', f'{without:.1f}', f'{with_rl:.1f}',
                              f'{with_rl-without:+.1f}']
    assert list(rows)[1:] == sorted(res['classes'], key=lambda o: -res['class_counts'][res['classes'].index(o)])
    shots = {row[0]: row[1:] for row in page.table('Run')}
    assert shots['bsce + RL'][-1].startswith(f"{res['accuracy']['all']:.1f}") and ' to ' in shots['bsce + RL'][-1]
    for o in (res['versions']['torch'], 'Reflective Learning', 'label predicted in 25 % of epochs', 'resnet8'):
        assert o in page.text


def test_no_path_of_this_machine(run, changed, tmp_path):
    "Pages and model cards are sent to others: they name the data and its files, and no folder above"
    images = json.loads((run/'result.json').read_text())['settings']['dataset']
    def change(res):
        res['command'] = f'ltrl train --dataset {images} --out {tmp_path}/run'
        res['settings']['weights'] = '/home/ann/w.pth'
    def check(text): assert not [o for o in (str(tmp_path), str(Path(images).parent), '/home/ann') if o in text]
    page = page_of(changed(change))
    check(page.source)
    assert f'ltrl train --dataset {Path(images).name} --out run' in page.text and 'w.pth' in page.text
    def move(res):
        change(res)
        res['settings']['dataset'] = f'{tmp_path}/moved'
    moved = page_of(changed(move))
    check(moved.source)
    assert 'could not be opened' in moved.text
    shutil.copytree(run, tmp_path/'several/a')
    check(page_of(tmp_path/'several').source)


def test_the_files_of_a_model_tell_no_path(digits_model, tmp_path, monkeypatch):
    images, _ = digits_model
    monkeypatch.setattr(sys, 'argv', ['ltrl', 'train', '--dataset', str(images)])
    train_run(RunSettings(str(images), net='resnet8', epochs=1, bs=32), bar=False, model=tmp_path/'model')
    texts = [file.read_text() for file in (tmp_path/'model').iterdir() if file.suffix in ('.json', '.md')]
    assert len(texts) >= 2 and not any(str(images.parent) in o for o in texts)
    assert any(f'ltrl train --dataset {images.name}' in o for o in texts)
    noted = evaluate(load_classifier(tmp_path/'model'), images/'train', resamples=2).notes
    assert not noted  # trained on the folder above it
    shutil.copytree(images/'train', tmp_path/'alone')
    train_run(RunSettings(str(tmp_path/'alone'), net='resnet8', epochs=1, bs=32), bar=False, model=tmp_path/'other')
    noted = evaluate(load_classifier(tmp_path/'other'), tmp_path/'alone', resamples=2).notes
    assert 'was trained on these data' in noted[0]


def test_confusions_are_those_of_the_model(run):
    res, page = json.loads((run/'result.json').read_text()), page_of(run)
    learn = load_classifier(run/'model')
    files = sorted(Path(res['dataset']).glob('test/*/*'))
    with learn.no_bar(): logits = learn.get_preds(dl=learn.dls.test_dl(files), act=noop)[0]
    predicted = [res['classes'][i] for i in logits.argmax(1)]
    true = [o.parent.name for o in files]
    head, *rows = page.table('true', 'all')
    names = head[1:-1]
    expected = confusion_matrix(true, predicted, labels=names)
    assert [row[0] for row in rows] == names
    assert [[int(o) for o in row[1:-1]] for row in rows] == expected.tolist()
    assert [int(row[-1]) for row in rows] == expected.sum(1).tolist()
    for name, other, n, _ in page.table('True class', 'Predicted as')[1:]:
        assert expected[names.index(name), names.index(other)] == int(n) and name != other


def test_worst_images_have_the_highest_loss(run):
    res, page = json.loads((run/'result.json').read_text()), page_of(run)
    learn = load_classifier(run/'model')
    settings = {k: v for k, v in res['settings'].items() if k not in ('amp', 'weights')}
    valid = RunSettings(**settings).dls().valid_ds
    with learn.no_bar():
        logits = learn.get_preds(dl=learn.dls.test_dl([file for file, _ in valid.items]), act=noop)[0]
    targets = torch.tensor(valid.targets)
    p = learn.calibration.probabilities(logits)
    wrong = p.argmax(1) != targets
    order = [i for i in p[torch.arange(len(p)), targets].argsort(stable=True).tolist() if wrong[i]]
    shown = [attrs['alt'] for tag, attrs in page.elements if tag == 'img' and attrs['alt'].startswith('Image of')]
    names = res['classes']
    assert shown == [f'Image of {names[targets[i]]}, predicted as {names[p[i].argmax()]}' for i in order[:24]]


names = ['<b>bold</b>', 'a & b', '"quoted"', "it's", '数字・١٢٣', '{{ 7*7 }}', '$x_1$ </script><script>alert(1)']


def test_names_are_escaped(changed):
    def rename(res): res.update(classes=names, dataset='none/<i>here</i>', command='ltrl train "<u>"')
    page = page_of(changed(rename))
    check_self_contained(page)
    check_accessible(page)
    assert {row[0] for row in page.table('Class')[1:]} == set(names)
    tags = {tag for tag, attrs in page.elements if attrs.get('class') is None}
    assert not tags & {'b', 'u', 'script'}
    assert "ltrl train '<u>'" in page.text
    labels = [name if len(name) <= 24 else name[:23] for name in names]  # of the chart
    assert all(any(label in text for text in page.texts) for label in labels)


def test_without_a_model(changed):
    page = page_of(changed())
    assert 'holds no model' in page.text and not any(rows[0][-1:] == ['all'] for rows in page.tables if rows)
    assert page.table('Class', 'Test Images')
    images = [attrs for tag, attrs in page.elements if tag == 'img']
    assert len(images) == 1 and images[0]['alt'].startswith('Training image labelled one')


def test_without_data(run, changed):
    def move(res):
        res['settings']['dataset'] = 'moved/away'
        del res['per_class_images']  # as in results of earlier versions
    folder = changed(move)
    shutil.copytree(run/'model', folder/'model')
    page = page_of(folder)
    check_self_contained(page)
    check_accessible(page)
    assert 'moved/away is not there' in page.text and 'Intervals need the number of images' in page.text
    assert not any(tag == 'img' for tag, _ in page.elements)
    assert page.table('Class', 'Difference') and 'looks like seven' in page.text


def test_other_data_are_not_taken_for_those_of_the_training(run, tmp_path, changed):
    images = Path(json.loads((run/'result.json').read_text())['dataset'])
    shutil.copytree(images, tmp_path/'digits')
    next((tmp_path/'digits/train/one').iterdir()).unlink()
    folder = changed(lambda res: res['settings'].update(dataset=str(tmp_path/'digits')))
    shutil.copytree(run/'model', folder/'model')
    page = page_of(folder)
    assert 'no longer those of the training' in page.text and 'predicted by the saved model' not in page.text


def test_data_of_a_pretrained_net_are_opened(run):
    result = json.loads((run/'result.json').read_text())
    settings = RunSettings(result['dataset'], net='resnet18', pretrained=True, frozen_stats=True, size=16)
    dls, reason = _open_data({**result, 'settings': dataclasses.asdict(settings)})
    assert dls is not None, reason


def test_without_a_test_set(run, tmp_path):
    images = Path(json.loads((run/'result.json').read_text())['dataset'])
    shutil.copytree(images/'train', tmp_path/'digits')
    res, _ = train_run(RunSettings(str(tmp_path/'digits'), net='resnet8', epochs=1, bs=32), bar=False)
    write_json(res, tmp_path/'run/result.json')
    shutil.copytree(run/'model', tmp_path/'run/model')
    page = page_of(tmp_path/'run')
    assert 'accuracy' not in res and 'and no test set' in page.text
    assert re.search(r'\d+ validation images, predicted by the saved model', page.text)
    assert page.table('Class', 'Validation Images') and 'did not record' in page.text


def test_a_class_without_images(changed):
    def empty(res):
        for o in (res, res['baseline']): o['per_class'][2] = None
        res['class_counts'][2] = res['per_class_images'][2] = 0
        res['settings']['dataset'] = 'away/from/here'
    folder = changed(empty)
    name = json.loads((folder/'result.json').read_text())['classes'][2]
    page = page_of(folder)
    assert page.table('Class')[-1] == [name, '0', '0', '-', '-', '-']
    check_accessible(page)


def test_one_side_alone_and_no_epochs(changed):
    def alone(res):
        for key in ('baseline', 'gain', 'suspects'): del res[key]
        res['history'] = {}
        res['suspects'] = []
    page = page_of(changed(alone))
    assert 'no curves' in page.text and 'No training image' in page.text
    assert 'Difference' not in page.text and 'Gain' not in page.text


def test_an_interrupted_run(run, tmp_path, changed):
    (tmp_path/'begun').mkdir()
    (tmp_path/'begun/.fit-0.pt').touch()
    with pytest.raises(ValueError, match='interrupted run without a result.*--resume'): write_report(tmp_path/'begun')
    folder = changed(lambda res: res.pop('baseline') and res.pop('gain'))
    (folder/'.fit-1.pt').touch()
    assert 'the other side of the comparison is missing' in page_of(folder).text


def test_broken_results(tmp_path, changed):
    with pytest.raises(FileNotFoundError, match='does not exist'): write_report(tmp_path/'nowhere')
    folder = changed(lambda res: res.pop('per_class'))
    with pytest.raises(ValueError, match='lacks: per_class'): write_report(folder)
    (folder/'result.json').write_text('{"half": ')
    with pytest.raises(ValueError, match='no result of a run'): write_report(folder)


def test_many_classes_fit_into_a_page(changed):
    n = 8142
    def grow(res):
        res.update(classes=[f'species {i}' for i in range(n)], class_counts=[1+1000//(i+1) for i in range(n)],
                   per_class=[i % 101. for i in range(n)], per_class_images=[20]*n)
        res['baseline']['per_class'] = [None if i == 5 else 50. for i in range(n)]
        res['settings']['dataset'] = 'away/from/here'
    page = page_of(changed(grow))
    check_self_contained(page)
    assert len(page.source) < 5e6
    assert len(page.table('Class')) == 1001 and '7,142 between them are left out' in page.text


def check_comparison(folder):
    "The table is that of summary.csv"
    page = page_of(folder)
    check_self_contained(page)
    check_accessible(page)
    summary = pd.read_csv(folder/'summary.csv')
    tables = [rows for rows in page.tables if rows[0][0].strip() == 'Variant']
    rows = [[cell.strip() for cell in row] for table in tables for row in table[1:]]
    assert len(tables) == summary.group.nunique() and len(rows) == len(summary)
    for row, (_, o) in zip(rows, summary.iterrows()):
        spread = '' if pd.isna(o.all_sd) else f' ± {o.all_sd:.1f}'
        assert row[:2] == [o.variant, str(o.runs)] and row[5] == f"{o['all']:.1f}{spread}"


def test_comparisons_as_a_page(tmp_path):
    for name in ('bed-magnetic', 'tuned-text'): shutil.copytree(root/'results'/name, tmp_path/name)
    for name in ('bed-magnetic', 'tuned-text'): check_comparison(tmp_path/name)
    both = page_of(tmp_path)
    assert {f'{tmp_path.name}/{o}' for o in ('bed-magnetic', 'tuned-text')} <= {*map(str.strip, both.texts)}


def test_on_the_command_line(changed, tmp_path):
    folder = changed()
    printed = CliRunner().invoke(app, ['report', str(folder), '--no-html'])
    assert printed.exit_code == 0 and [o.name for o in folder.iterdir()] == ['result.json']
    said = CliRunner().invoke(app, ['report', str(folder), '--html', str(tmp_path/'there/page.html')])
    assert said.output.startswith(printed.output) and (tmp_path/'there/page.html').exists()
    default = CliRunner().invoke(app, ['report', str(folder)])
    assert default.exit_code == 0
    assert (folder/'report.html').read_text() == (tmp_path/'there/page.html').read_text()
    for wrong in (['--html', 'x', '--no-html'], ['--html', 'x', '--evidence', 'y'], ['--html', str(tmp_path)]):
        assert CliRunner().invoke(app, ['report', str(folder), *wrong]).exit_code == 2


# In a browser

colours = '''const opaque = o => { for (; o; o = o.parentElement) {
    const c = getComputedStyle(o).backgroundColor; if (c.startsWith("rgb(")) return c } };
const texts = "h1,h2,p,dt,dd,th,td,caption,small,summary,a,figcaption,li,strong,span,code,svg text";
return [...document.querySelectorAll(texts)]
    .filter(o => o.textContent.trim()).map(o => { const s = getComputedStyle(o); return [
        o.tagName, o.textContent.trim().slice(0, 40), o.tagName == "text" ? s.fill : s.color, opaque(o)] })'''


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_in_a_browser(run, browser, scheme):
    file = write_report(run).as_uri()
    media = dict(name='prefers-color-scheme', value=scheme)
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[media]))
    browser.get(file)
    assert [u for u in requests(browser) if not u.startswith(('data:', 'chrome'))] == [file]
    assert not [o for o in browser.get_log('browser') if o['level'] == 'SEVERE']
    found = browser.execute_script(colours)
    assert len(found) > 200 and {o[0] for o in found} >= {'H1', 'P', 'TD', 'TH', 'CAPTION', 'text'}
    for tag, text, colour, background in found:
        assert (luminance(background) > .5) == (scheme == 'light')
        darker, lighter = sorted((luminance(colour), luminance(background)))
        assert (lighter+.05)/(darker+.05) >= 4.5, f'{tag} {text!r}: {colour} on {background}'
    images = browser.execute_script('return [...document.images].map(o => [o.complete, o.naturalWidth])')
    assert images and all(complete and width > 0 for complete, width in images)
    boxes = browser.execute_script('''return [...document.querySelectorAll("svg")].map(o => {
        const r = o.getBoundingClientRect(); return [r.width, r.height] })''')
    assert len(boxes) == 4 and all(w > 200 and h > 100 for w, h in boxes)


@pytest.mark.slow
def test_on_a_phone_and_on_paper(run, browser):
    set_phone_screen(browser)
    browser.get(write_report(run).as_uri())
    width, screen = browser.execute_script('return [document.scrollingElement.scrollWidth, window.innerWidth]')
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    assert width <= screen
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(media='print', features=[
        dict(name='prefers-color-scheme', value='dark')]))
    background = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    assert luminance(background) == 1
    assert not browser.execute_script('return document.querySelector("nav").offsetHeight')
