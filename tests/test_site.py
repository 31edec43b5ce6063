"The docs site: built by its one command, whole in itself, and looked at in a real browser."
import contextlib
import functools
import http.server
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

root = Path(__file__).parent.parent
copied = ('nbs', 'ltrl_fastai', 'tools', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md', 'CHANGELOG.md', 'LICENSE')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A site of a copy of this checkout, so that other tests can go on reading the notebooks"
    there = tmp_path_factory.mktemp('docs')
    for o in copied: (shutil.copytree if (root/o).is_dir() else shutil.copy)(root/o, there/o)
    r = subprocess.run([sys.executable, there/'tools/build_docs.py'], cwd=there, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(there)})
    assert r.returncode == 0, r.stdout+r.stderr
    assert not r.stderr.strip(), r.stderr
    return there/'_docs'


class Page(HTMLParser):
    "Links, anchors, pictures and text of a page"
    def __init__(self, file):
        super().__init__()
        self.links, self.ids, self.images, self.text, self.hidden = [], set(), [], '', 0
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


def test_there_is_a_page_of_every_notebook_and_of_its_code(site, pages):
    names = [re.sub(r'\d+_', '', str(p.relative_to(root/'nbs').with_suffix('.html'))) for p in root.glob('nbs/**/*.ipynb')]
    assert set(names) <= set(pages) and len(names) > 60
    assert 'source/ltrl_fastai/reflective/review.html' in pages and 'changelog.html' in pages and 'citing.html' in pages


def test_the_prose_of_a_notebook_is_on_its_page(pages):
    "nbdev takes the first cell for title and description, and drops what else is in it"
    import json
    for p in root.glob('nbs/**/*.ipynb'):
        first = ''.join(json.loads(p.read_text())['cells'][0]['source']).strip().split('\n')
        assert first[0].startswith('# ') and all(line.startswith('>') for line in first[1:]), f'{p}: its first cell may hold a title and a description, and nothing else'
    assert 'Few images hold the predictions of tail classes in place' in pages['reflective/review.html'].text


def broken(site, pages):
    "Links to what is not on the site, and to anchors that are not on their page"
    for name, page in pages.items():
        for link in page.links:
            u = urlparse(link)
            if u.scheme in ('data', 'mailto', 'javascript', 'http', 'https'): continue
            target = (site/name).parent/unquote(u.path) if u.path else site/name
            if target.is_dir(): target /= 'index.html'
            file = os.path.relpath(target, site)
            if not target.exists(): yield name, link
            elif u.fragment and file in pages and unquote(u.fragment) not in pages[file].ids: yield name, f'{link} (no such anchor)'


def test_links_and_anchors_lead_somewhere(site, pages): assert not sorted(set(broken(site, pages)))


def test_words_are_no_links_by_accident(pages):
    "In backticks nbdev makes a link of whatever is a name, be it the folder `train` or the command"
    commands = ('train', 'run', 'methods', 'report', 'compare', 'bench')
    assert not [(name, o) for name, p in pages.items() if not name.startswith(('experiments/', 'source/')) for o in p.links if re.search(rf'cli\.html#({"|".join(commands)})$', o)]


def test_links_to_code_lead_to_what_they_name(site, pages):
    text = (site/'source/ltrl_fastai/reflective/review.html').read_text()
    line = re.search(r'source/ltrl_fastai/reflective/review\.html#(L\d+)', (site/'reflective/review.html').read_text())[1]
    assert 'KnowledgeReview' in re.search(rf'<span id="{line}">(.*)</span>\n', text)[1]


def test_every_public_name_has_a_heading(pages):
    "Functions, classes, their methods, what is patched onto other classes, and data"
    from public import everything, modules
    ids = set().union(*(page.ids for name, page in pages.items() if not name.startswith('source/')))
    names = {re.sub(r'^ltrl_fastai\.(\w+\.)?\w+\.', '', o.name) for o in everything} | {n for m in modules for n in getattr(m, '__all__', ())}
    assert len(names) > 400 and not [o for o in sorted(names) if o.lower() not in ids]


def test_every_public_name_leads_to_its_code(site):
    from public import everything, modules
    without, n = [], 0
    for m in modules:
        page = site/f"{m.__name__.removeprefix('ltrl_fastai.').replace('.', '/')}.html"
        if not page.exists(): continue
        text = page.read_text(encoding='utf-8')
        for name in [*(o.name.removeprefix(m.__name__+'.') for o in everything if o.name.startswith(m.__name__+'.')), *getattr(m, '__all__', ())]:
            found = [o.start() for o in re.finditer(f'id="{re.escape(name.lower())}(-\\d+)?"', text)]
            n += bool(found)
            if found and not any('>source</a>' in text[max(0, at-900):at] for at in found): without.append(f'{m.__name__}: {name}')
    assert n > 800 and not without


def test_signatures_explain_their_arguments(pages):
    "The fields of a dataclass as well, and none of those that every callback has"
    assert 'about:str, # In a line' in pages['methods/method.html'].text and 'def Diagnosis():' in pages['evaluation/diagnosis.html'].text
    assert not [name for name, p in pages.items() if 'after_create:NoneType' in p.text]


def test_pictures_have_descriptions(pages):
    without = [f'{name}: {page.images.count(None)+page.images.count("")}' for name, page in pages.items() if not all(page.images)]
    assert not without, 'give these pictures a `#| fig-alt:` ' + ', '.join(without)
    assert sum(len(p.images) for p in pages.values()) > 40


def test_no_warning_and_no_trace_of_a_machine(pages):
    for name, page in pages.items():
        for o in ('site-packages', str(root), str(Path.home())+'/', 'UserWarning', 'FutureWarning', 'DeprecationWarning:', 'Traceback (most recent'):
            assert o not in page.text or name.startswith('source/'), f'{name}: {o}'


def test_formulas_are_for_a_browser(pages):
    for name, page in pages.items(): assert '\\frac' not in page.text and '\\mathrm' not in page.text or name.startswith('source/'), name


# With nbdev's own command

class Shape(HTMLParser):
    "Headings of a page's main part, and how many of other things there are"
    def __init__(self, text):
        super().__init__()
        self.n, self.headings, self.within = Counter(), [], False
        self.feed(re.sub(r'<nav.*?</nav>', '', re.search(r'<main.*</main>', text, re.S)[0], flags=re.S))
    def handle_starttag(self, tag, attrs):
        self.n[tag] += 1
        if re.fullmatch('h[1-6]', tag): self.within = True; self.headings.append(tag+' ')
    def handle_endtag(self, tag):
        if re.fullmatch('h[1-6]', tag): self.within = False
    def handle_data(self, data):
        if self.within: self.headings[-1] += ''.join(re.findall(r'\w', data))


@pytest.fixture(scope='module')
def by_nbdev(site, tmp_path_factory):
    "The site that `nbdev-docs` makes: with Quarto, or with what reads pages as Quarto does"
    there = tmp_path_factory.mktemp('quarto')
    for o in (*copied, '_proc'): (shutil.copytree if (site.parent/o).is_dir() else shutil.copy2)(site.parent/o, there/o)
    bin = there/'bin'
    bin.mkdir()
    if not shutil.which('quarto'):
        (bin/'quarto').write_text(f'#!/bin/sh\nexec "{sys.executable}" "{root}/tests/quarto_by_pandoc.py" "$@"\n')
        (bin/'quarto').chmod(0o755)
    r = subprocess.run([sys.executable, '-c', 'from nbdev.quarto import nbdev_docs; nbdev_docs()'], cwd=there, capture_output=True, text=True,
                       env={**os.environ, 'PYTHONPATH': str(there), 'PATH': f'{bin}:{os.environ["PATH"]}'})
    assert r.returncode == 0, r.stdout+r.stderr
    return there/'_docs'


def test_nbdev_docs_makes_a_site_of_the_same_sources(by_nbdev):
    "Every page, and no link that leads nowhere but to code, which has no address yet, and to methods, which nbdev does not document"
    pages = {p.relative_to(by_nbdev).as_posix(): Page(p) for p in sorted(by_nbdev.rglob('*.html'))}
    names = {re.sub(r'\d+_', '', str(p.relative_to(root/'nbs').with_suffix('.html'))) for k in ('ipynb', 'qmd') for p in root.glob(f'nbs/**/*.{k}')}
    assert set(pages) == names and len(names) > 60
    assert not [o for o in sorted(set(broken(by_nbdev, pages))) if '/blob/main/' not in o[1] and not re.search(r'#\w+\.\w+ \(no such anchor\)$', o[1])]


def test_quarto_reads_the_pages_as_they_are_meant(site, by_nbdev):
    "Both sites have the same headings, lists, tables, pictures and formulas; what ours adds to pages of the reference comes on top"
    for p in sorted(by_nbdev.rglob('*.html')):
        theirs, ours = [Shape((o/p.relative_to(by_nbdev)).read_text(encoding='utf-8')) for o in (by_nbdev, site)]
        more = Counter(ours.headings)-Counter(theirs.headings)
        assert not Counter(theirs.headings)-Counter(ours.headings) and not (more and p.parent.name in ('', 'tutorials', 'explanations', 'benchmarks')), p
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


@pytest.fixture(scope='module')
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    driver = shutil.which('chromedriver')
    if not driver:
        if os.environ.get('CI'): pytest.fail('a browser is needed: install chromium and chromedriver')
        pytest.skip('no chromedriver: install chromium and chromedriver to see the site in a browser')
    options = webdriver.ChromeOptions()
    for o in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--window-size=1300,1000'): options.add_argument(o)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    b = webdriver.Chrome(options=options, service=Service(driver))
    yield b
    b.quit()


@pytest.fixture(autouse=True)
def wide(request):
    "Each test begins with a wide page"
    yield
    if 'browser' in request.fixturenames:
        b = request.getfixturevalue('browser')
        for o in ('Emulation.clearDeviceMetricsOverride', 'Emulation.setEmulatedMedia'): b.execute_cdp_cmd(o, {})


def phone(browser): browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=390, height=844, deviceScaleFactor=1, mobile=True))


def wait_for(f, seconds=10):
    "The first true value of `f()`"
    end = time.time()+seconds
    while True:
        with contextlib.suppress(Exception):
            if v := f(): return v
        assert time.time() < end, 'waited in vain'
        time.sleep(.05)


def requests(browser):
    import json
    for o in browser.get_log('performance'):
        m = json.loads(o['message'])['message']
        if m['method'] == 'Network.requestWillBeSent': yield m['params']['request']['url']


def test_every_page_loads_by_itself(address, browser, pages):
    "Without an error in the console, and without a request off the machine"
    errors, away = [], []
    for name in pages:
        browser.get(address+name)
        errors += [f"{name}: {o['message']}" for o in browser.get_log('browser') if o['level'] == 'SEVERE']
        away += [f'{name}: {u}' for u in requests(browser) if not u.startswith((address, 'data:'))]
    assert not errors, '\n'.join(errors)
    assert not away, '\n'.join(away)


def test_maths_is_drawn(address, browser):
    browser.get(address+'explanations/knowledge_review.html')
    boxes = browser.execute_script("""return [...document.querySelectorAll("math")].map(o => {
        const r = o.getBoundingClientRect(); return [r.width, r.height, o.getAttribute("display")] })""")
    assert len(boxes) >= 5 and all(w > 3 and h > 3 for w, h, _ in boxes)
    assert max(h for *_, h in [(w, h) for w, h, kind in boxes if kind == 'block']) > 30  # a fraction has a line above another
    above, below = browser.execute_script('return [...document.querySelector("mfrac").children].map(o => o.getBoundingClientRect()).map(r => [r.top, r.bottom])')
    assert above[1] <= below[0]+2


def test_search_finds_a_name(address, browser):
    from selenium.webdriver.common.by import By
    browser.get(address)
    browser.find_element(By.CSS_SELECTOR, 'input[type=search]').send_keys('KnowledgeReview')
    def hits(): return [o.get_attribute('href') for o in browser.find_elements(By.CSS_SELECTOR, 'a[href*="reflective/review.html"]') if o.is_displayed()]
    found = wait_for(hits)
    browser.get(found[0])
    assert 'KnowledgeReview' in browser.find_element(By.TAG_NAME, 'main').text


def test_on_a_phone(address, browser):
    "The sidebar opens, leads on and closes; nothing is wider than the screen"
    from selenium.webdriver.common.by import By
    phone(browser)
    browser.get(address+'tutorials/resuming.html')
    bar = browser.find_element(By.ID, 'quarto-sidebar')
    assert not bar.is_displayed()
    browser.find_element(By.CSS_SELECTOR, '.quarto-btn-toggle').click()
    wait_for(bar.is_displayed)
    link = next(o for o in bar.find_elements(By.CSS_SELECTOR, 'a[href*="several_gpus"]'))
    wait_for(link.is_displayed)
    browser.execute_script('arguments[0].click()', link)
    wait_for(lambda: browser.current_url.endswith('several_gpus.html'))
    for name in ('index.html', 'reflective/review.html', 'benchmarks/does_it_help.html', 'explanations/slides_and_code.html'):
        browser.get(address+name)
        wide, screen = browser.execute_script('return [document.scrollingElement.scrollWidth, window.innerWidth]')
        assert wide <= screen, f'{name}: {wide} pixels wide on a screen of {screen}'


def luminance(colour):
    v = [int(o)/255 for o in re.findall(r'\d+', colour)[:3]]
    return sum(w*(c/12.92 if c <= .04045 else ((c+.055)/1.055)**2.4) for w, c in zip((.2126, .7152, .0722), v))


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(address, browser, scheme):
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=scheme)]))
    browser.get(address+'explanations/knowledge_review.html')
    back, ink, code = browser.execute_script('''const c = (o, k) => getComputedStyle(o)[k];
        return [c(document.body, "backgroundColor"), c(document.querySelector("main p"), "color"), c(document.querySelector("main p code"), "color")]''')
    assert (luminance(back) > .5) == (scheme == 'light')
    for o in (ink, code):
        a, b = sorted((luminance(o), luminance(back)))
        assert (b+.05)/(a+.05) > 4.5, f'{o} on {back}'
