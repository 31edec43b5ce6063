"The docs site: it builds with one command, its links work, and a real browser displays it."
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from public import everything, modules

pytestmark = pytest.mark.slow
root = Path(__file__).parent.parent
sources = ('nbs', 'ltrl_fastai', 'tools', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md', 'CHANGELOG.md',
           'LICENSE')


def copy_sources(names, folder, to):
    for o in names:
        if (folder/o).is_dir(): shutil.copytree(folder/o, to/o)
        else: shutil.copy2(folder/o, to/o)


def page_name(notebook):
    "The page of a notebook or another source, below the folder of the site"
    return re.sub(r'\d+_', '', str(notebook.relative_to(root/'nbs').with_suffix('.html')))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site of a copy of this checkout, so that other tests can read the notebooks meanwhile"
    folder = tmp_path_factory.mktemp('docs')
    copy_sources(sources, root, folder)
    # each worker would import PyTorch, and share one core
    command = [sys.executable, folder/'tools/build_docs.py', '--workers', '0']
    r = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                       env={**os.environ, 'PYTHONPATH': str(folder)})
    assert r.returncode == 0, r.stdout+r.stderr
    assert not r.stderr.strip(), r.stderr
    return folder/'_docs'


class Page(HTMLParser):
    "Links, anchors, pictures and text of a page"
    def __init__(self, file):
        super().__init__()
        self.links = []
        self.ids = set()
        self.images = []
        self.text = ''
        self.hidden = 0
        self.feed(file.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if 'id' in d: self.ids.add(d['id'])
        for k in ('href', 'src'):
            if d.get(k): self.links.append(d[k])
        if tag == 'img': self.images.append(d.get('alt'))
        self.hidden += tag in ('script', 'style')
    def handle_endtag(self, tag): self.hidden -= tag in ('script', 'style')
    def handle_data(self, data): self.text += '' if self.hidden else data


@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}


def test_every_notebook_and_its_code_have_a_page(site, pages):
    names = [page_name(p) for p in root.glob('nbs/**/*.ipynb')]
    assert set(names) <= set(pages) and len(names) > 60
    assert {'source/ltrl_fastai/reflective/review.html', 'changelog.html', 'citing.html'} <= set(pages)


def plain_lines(cell):
    "Lines of a markdown cell that are prose without any markup"
    if cell['cell_type'] != 'markdown': return []
    return [line for line in ''.join(cell['source']).split('\n') if re.fullmatch(r'[A-Za-z][A-Za-z ,;:.]{40,}', line)]


def test_the_prose_of_a_notebook_is_on_its_page(pages):
    "nbdev takes title and description from the first cell, and drops everything else in it"
    n = 0
    for p in root.glob('nbs/**/*.ipynb'):
        cells = json.loads(p.read_text())['cells']
        title, *description = ''.join(cells[0]['source']).strip().split('\n')
        only_head = title.startswith('# ') and all(line.startswith('>') for line in description)
        assert only_head, f'{p}: its first cell may hold a title and a description, and nothing else'
        text = ' '.join(pages[page_name(p)].text.split())
        for cell in cells[1:]:
            for line in plain_lines(cell):
                n += 1
                assert ' '.join(line.split()) in text, f'{p}: {line}'
    assert n > 20


def broken(site, pages):
    "Links to missing files and missing anchors of the site"
    for name, page in pages.items():
        for link in page.links:
            u = urlparse(link)
            if u.scheme in ('data', 'mailto', 'javascript', 'http', 'https'): continue
            target = (site/name).parent/unquote(u.path) if u.path else site/name
            if target.is_dir(): target /= 'index.html'
            file = os.path.relpath(target, site)
            if not target.exists(): yield name, link
            elif u.fragment and file in pages:
                if unquote(u.fragment) not in pages[file].ids: yield name, f'{link} (no such anchor)'


def test_links_and_anchors_are_not_broken(site, pages): assert not sorted(set(broken(site, pages)))


def test_words_are_not_linked_by_accident(pages):
    "nbdev links every name in backticks, for instance the folder `train` to the command"
    commands = '|'.join(('train', 'run', 'methods', 'report', 'compare', 'bench'))
    prose = {name: p for name, p in pages.items() if not name.startswith(('experiments/', 'source/'))}
    links = [(name, o) for name, p in prose.items() for o in p.links]
    assert not [(name, o) for name, o in links if re.search(rf'cli\.html#({commands})$', o)]


def test_links_to_code_lead_to_the_named_code(site, pages):
    source = (site/'source/ltrl_fastai/reflective/review.html').read_text()
    page = (site/'reflective/review.html').read_text()
    line = re.search(r'source/ltrl_fastai/reflective/review\.html#(L\d+)', page)[1]
    assert 'KnowledgeReview' in re.search(rf'<span id="{line}">(.*)</span>\n', source)[1]


def test_every_public_name_has_a_heading(pages):
    "Functions, classes, their methods, patches of other classes, and data"
    ids = set().union(*(page.ids for name, page in pages.items() if not name.startswith('source/')))
    names = {re.sub(r'^ltrl_fastai\.(\w+\.)?\w+\.', '', o.name) for o in everything}
    names |= {n for m in modules for n in getattr(m, '__all__', ())}
    assert len(names) > 400
    assert not [o for o in sorted(names) if o.lower() not in ids]


def test_every_public_name_links_to_its_code(site):
    n = 0
    without = []
    for m in modules:
        page = site/f"{m.__name__.removeprefix('ltrl_fastai.').replace('.', '/')}.html"
        if not page.exists(): continue
        text = page.read_text(encoding='utf-8')
        prefix = m.__name__+'.'
        members = [o.name.removeprefix(prefix) for o in everything if o.name.startswith(prefix)]
        for name in [*members, *getattr(m, '__all__', ())]:
            found = [o.start() for o in re.finditer(f'id="{re.escape(name.lower())}(-\\d+)?"', text)]
            n += bool(found)
            has_link = any('>source</a>' in text[max(0, at-900):at] for at in found)
            if found and not has_link: without.append(f'{m.__name__}: {name}')
    assert n > 800
    assert not without


def test_signatures_explain_their_arguments(pages):
    "Including fields of a dataclass, but not those that every callback has"
    assert re.search(r'about:str, # \w+', pages['methods/method.html'].text)
    assert 'def Diagnosis():' in pages['evaluation/diagnosis.html'].text
    assert not [name for name, p in pages.items() if 'after_create:NoneType' in p.text]


def test_pictures_have_descriptions(pages):
    without = {name: len(page.images)-sum(map(bool, page.images)) for name, page in pages.items()}
    without = [f'{name}: {n}' for name, n in without.items() if n]
    assert not without, 'give these pictures a `#| fig-alt:` ' + ', '.join(without)
    assert sum(len(p.images) for p in pages.values()) > 40


def test_there_are_no_warnings_and_no_paths_of_this_machine(pages):
    unwanted = ('site-packages', str(root), str(Path.home())+'/', 'UserWarning', 'FutureWarning',
                'DeprecationWarning:', 'Traceback (most recent')
    for name, page in pages.items():
        if name.startswith('source/'): continue
        for o in unwanted: assert o not in page.text, f'{name}: {o}'


def test_formulas_are_for_a_browser(pages):
    for name, page in pages.items():
        if name.startswith('source/'): continue
        assert '\\frac' not in page.text and '\\mathrm' not in page.text, name


# With nbdev's own command

class Outline(HTMLParser):
    "Headings in the main part of a page, and the number of each tag"
    def __init__(self, text):
        super().__init__()
        self.n = Counter()
        self.headings = []
        self.in_heading = False
        self.feed(re.sub(r'<nav.*?</nav>', '', re.search(r'<main.*</main>', text, re.S)[0], flags=re.S))
    def handle_starttag(self, tag, attrs):
        self.n[tag] += 1
        if re.fullmatch('h[1-6]', tag):
            self.in_heading = True
            self.headings.append(tag+' ')
    def handle_endtag(self, tag):
        if re.fullmatch('h[1-6]', tag): self.in_heading = False
    def handle_data(self, data):
        if self.in_heading: self.headings[-1] += ''.join(re.findall(r'\w', data))


@pytest.fixture(scope='module')
def by_nbdev(site, tmp_path_factory):
    "The site that `nbdev-docs` makes, with Quarto or with the program in `quarto_by_pandoc.py`"
    folder = tmp_path_factory.mktemp('quarto')
    copy_sources((*sources, '_proc'), site.parent, folder)
    bin = folder/'bin'
    bin.mkdir()
    if not shutil.which('quarto'):
        (bin/'quarto').write_text(f'#!/bin/sh\nexec "{sys.executable}" "{root}/tests/quarto_by_pandoc.py" "$@"\n')
        (bin/'quarto').chmod(0o755)
    env = {**os.environ, 'PYTHONPATH': str(folder), 'PATH': f'{bin}:{os.environ["PATH"]}'}
    # it reads pyproject.toml thousands of times, and finds the processed notebooks of the other site
    code = ('import functools; from nbdev import config; config._load_toml = functools.cache(config._load_toml); '
            'from nbdev.quarto import nbdev_docs; nbdev_docs()')
    command = [sys.executable, '-c', code]
    r = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stdout+r.stderr
    return folder/'_docs'


def test_nbdev_docs_makes_a_site_of_the_same_sources(by_nbdev):
    "Every page; only links to code, which has no address yet, and to methods, which nbdev does not show, are broken"
    pages = {p.relative_to(by_nbdev).as_posix(): Page(p) for p in sorted(by_nbdev.rglob('*.html'))}
    names = {page_name(p) for k in ('ipynb', 'qmd') for p in root.glob(f'nbs/**/*.{k}')}
    assert set(pages) == names and len(names) > 60
    def is_expected(link): return '/blob/main/' in link or re.search(r'#\w+\.\w+ \(no such anchor\)$', link)
    assert not [o for o in sorted(set(broken(by_nbdev, pages))) if not is_expected(o[1])]


def test_quarto_reads_the_pages_in_the_same_way(site, by_nbdev):
    "Both sites have the same headings, lists, tables, pictures and formulas; our reference pages have more headings"
    for p in sorted(by_nbdev.rglob('*.html')):
        theirs, ours = [Outline((o/p.relative_to(by_nbdev)).read_text(encoding='utf-8')) for o in (by_nbdev, site)]
        more = Counter(ours.headings)-Counter(theirs.headings)
        is_prose = p.parent.name in ('', 'tutorials', 'explanations', 'benchmarks')
        assert not Counter(theirs.headings)-Counter(ours.headings), p
        assert not (more and is_prose), p
        for tag in ('table', 'li', 'img', 'math', 'blockquote'): assert theirs.n[tag] == ours.n[tag], f'{p}: {tag}'


# In a browser

@pytest.fixture(scope='module')
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(autouse=True)
def reset_screen(request):
    "Reset the size and the colour scheme of the screen after each test"
    yield
    if 'browser' in request.fixturenames:
        b = request.getfixturevalue('browser')
        for o in ('Emulation.clearDeviceMetricsOverride', 'Emulation.setEmulatedMedia'): b.execute_cdp_cmd(o, {})


def set_phone_screen(browser):
    screen = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)


def wait_for(f, seconds=10):
    "The first true value of `f()`"
    end = time.time()+seconds
    while True:
        with contextlib.suppress(Exception):
            if v := f(): return v
        assert time.time() < end, f'no result within {seconds} seconds'
        time.sleep(.05)


def requests(browser):
    "Addresses that the browser has requested"
    for o in browser.get_log('performance'):
        m = json.loads(o['message'])['message']
        if m['method'] == 'Network.requestWillBeSent': yield m['params']['request']['url']


def test_pages_load_without_errors_and_other_hosts(address, browser, pages):
    """All pages of prose, and some of the others, which have one frame and no script of their own. The build refuses a
    page that names another host, and the links of all pages are checked above."""
    errors = []
    external = []
    of_code = [o for o in pages if o.startswith('source/')]
    prose = [o for o in pages if '/' not in o or o.startswith(('tutorials/', 'explanations/', 'benchmarks/'))]
    others = [o for o in pages if o not in (*of_code, *prose)]
    for name in [*prose, *others[::4], *of_code[::20]]:
        browser.get(address+name)
        errors += [f"{name}: {o['message']}" for o in browser.get_log('browser') if o['level'] == 'SEVERE']
        external += [f'{name}: {u}' for u in requests(browser) if not u.startswith((address, 'data:'))]
    assert not errors, '\n'.join(errors)
    assert not external, '\n'.join(external)


def test_maths_is_drawn(address, browser):
    browser.get(address+'explanations/knowledge_review.html')
    boxes = browser.execute_script("""return [...document.querySelectorAll("math")].map(o => {
        const r = o.getBoundingClientRect(); return [r.width, r.height, o.getAttribute("display")] })""")
    assert len(boxes) >= 5 and all(w > 3 and h > 3 for w, h, _ in boxes)
    assert max(h for _, h, display in boxes if display == 'block') > 30  # a fraction has two lines
    above, below = browser.execute_script("""return [...document.querySelector("mfrac").children].map(o => {
        const r = o.getBoundingClientRect(); return [r.top, r.bottom] })""")
    assert above[1] <= below[0]+2


def test_search_finds_a_name(address, browser):
    from selenium.webdriver.common.by import By
    browser.get(address)
    browser.find_element(By.CSS_SELECTOR, 'input[type=search]').send_keys('KnowledgeReview')
    def hits():
        links = browser.find_elements(By.CSS_SELECTOR, 'a[href*="reflective/review.html"]')
        return [o.get_attribute('href') for o in links if o.is_displayed()]
    found = wait_for(hits)
    browser.get(found[0])
    assert 'KnowledgeReview' in browser.find_element(By.TAG_NAME, 'main').text


def test_on_a_phone(address, browser):
    "The sidebar opens, and its links work; nothing is wider than the screen"
    from selenium.webdriver.common.by import By
    set_phone_screen(browser)
    browser.get(address+'tutorials/resuming.html')
    bar = browser.find_element(By.ID, 'quarto-sidebar')
    assert not bar.is_displayed()
    browser.find_element(By.CSS_SELECTOR, '.quarto-btn-toggle').click()
    wait_for(bar.is_displayed)
    link = next(o for o in bar.find_elements(By.CSS_SELECTOR, 'a[href*="several_gpus"]'))
    wait_for(link.is_displayed)
    browser.execute_script('arguments[0].click()', link)
    wait_for(lambda: browser.current_url.endswith('several_gpus.html'))
    names = ('index.html', 'reflective/review.html', 'benchmarks/does_it_help.html',
             'explanations/slides_and_code.html')
    for name in names:
        browser.get(address+name)
        width, screen = browser.execute_script('return [document.scrollingElement.scrollWidth, window.innerWidth]')
        assert width <= screen, f'{name}: {width} pixels wide on a screen of {screen}'


def luminance(colour):
    "Relative luminance of a CSS colour (WCAG 2)"
    v = [int(o)/255 for o in re.findall(r'\d+', colour)[:3]]
    return sum(w*(c/12.92 if c <= .04045 else ((c+.055)/1.055)**2.4) for w, c in zip((.2126, .7152, .0722), v))


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_is_readable_in_light_and_dark(address, browser, scheme):
    media = dict(name='prefers-color-scheme', value=scheme)
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[media]))
    browser.get(address+'explanations/knowledge_review.html')
    background, text, code = browser.execute_script('''const c = (o, k) => getComputedStyle(o)[k];
        return [c(document.body, "backgroundColor"), c(document.querySelector("main p"), "color"),
                c(document.querySelector("main p code"), "color")]''')
    assert (luminance(background) > .5) == (scheme == 'light')
    for o in (text, code):
        darker, lighter = sorted((luminance(o), luminance(background)))
        assert (lighter+.05)/(darker+.05) > 4.5, f'{o} on {background}'
