"""Build the docs site from the notebooks into _docs/: `python tools/build_docs.py`. Needs no Quarto and no network.

nbdev converts the notebooks to pages, and smalldocs converts the pages to HTML. Three things are added on the way:
methods and public data, since nbdev documents functions and classes only; pages under the names that nbdev's links
use; and pages of code, the targets of "source" links. No page requests anything from outside the site: formulas become
MathML, and fonts are those of the reader.
"""
import argparse
import ast
import dataclasses
import functools
import html
import importlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import tokenize
import warnings
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# nbdev's links have no number: 07_review.ipynb becomes review.html
number = re.compile(r'\b\d+[a-z]?_(?=\w+\.ipynb\b)')


def processed(workers):
    "Let nbdev process the notebooks; returns its folder, which is a cache for the next time"
    from nbdev import config
    # nbdev reads pyproject.toml again for each cell, which would take a quarter of the time
    config._load_toml = functools.cache(config._load_toml)
    from nbdev.config import get_config
    from nbdev.doclinks import nbdev_export
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(root)
    nbdev_export()  # links to names need an up-to-date index
    refresh_quarto_yml()
    return proc_nbs(get_config().nbs_path, n_workers=workers)


def source_link(module, line):
    file = Path(module.__file__).relative_to(root).as_posix()
    return f'[source](/blob/main/{file}#L{line}){{target="_blank" style="float:right; font-size:smaller"}}'


def comments(source):
    "The comment at the end of each line, by line number"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}


def signature(cls):
    "A signature where Python's own explains nothing: of a dataclass with comments, or of a callback without arguments"
    if dataclasses.is_dataclass(cls): return dataclass_signature(cls)
    ours = [o for o in cls.__mro__ if o.__module__.startswith('ltrl_fastai')]
    has_init = any('__init__' in vars(o) for o in ours)
    is_callback = hasattr(cls, 'run_valid')
    return f'def {cls.__name__}():' if is_callback and not has_init else None


def dataclass_signature(cls):
    "The fields of a dataclass with their comments, in the form of a signature"
    source = inspect.cleandoc('\n'+inspect.getsource(cls))
    comment_of, node = comments(source), ast.parse(source).body[0]
    lines = []
    for o in node.body:
        if not isinstance(o, ast.AnnAssign): continue
        field, comment = ast.get_source_segment(source, o), comment_of.get(o.end_lineno, '')
        lines.append(f'    {field}, # {comment}'.removesuffix(', # '))
    return '\n'.join([f'def {cls.__name__}(', *lines, '):'])


def methods(module, name, cls):
    "Yield documentation in nbdev's form of the public methods and properties that a class does not inherit"
    from fastai.callback.core import _events
    from nbdev.showdoc import BasicMarkdownRenderer
    documented_elsewhere = {*getattr(cls, '__dataclass_fields__', {}), *map(str, _events)}
    for base in cls.__mro__[1:]: documented_elsewhere |= {*vars(base)}
    for k, o in vars(cls).items():
        if k.startswith('_') or k in documented_elsewhere: continue
        f = inspect.unwrap(o.fget if isinstance(o, property) else getattr(o, '__func__', o))
        if not inspect.isfunction(f) or not inspect.getdoc(o): continue
        line = inspect.getsourcelines(f)[1]
        if isinstance(o, property): yield f'{source_link(module, line)}\n\n#### {name}.{k}\n\n*{inspect.getdoc(o)}*'
        else:
            text = BasicMarkdownRenderer(f, name=f'{name}.{k}', title_level=4)._repr_markdown_()
            yield text.removeprefix('---\n').replace('#LNone', f'#L{line}')


def command(module, name):
    "The help of a command"
    from typer.testing import CliRunner
    size = dict(terminal_width=80, max_content_width=80)
    text = CliRunner().invoke(module.app, [name, '--help'], prog_name='ltrl', **size).output
    line = inspect.getsourcelines(inspect.unwrap(getattr(module, name)))[1]
    return f'{source_link(module, line)}\n\n### {name}\n\n```\n{text.strip()}\n```'


def data(module):
    "Yield the public data of a module: names, description, and the beginning of the code that assigns them"
    source = inspect.getsource(module)
    comment_of = comments(source)
    for node in ast.parse(source).body:
        targets = [o for target in getattr(node, 'targets', []) for o in ast.walk(target)]
        names = [o.id for o in targets if isinstance(o, ast.Name) and o.id in module.__all__]
        if not names: continue
        lines = ast.get_source_segment(source, node).split('\n')
        code = '\n'.join(lines if len(lines) <= 12 else [*lines[:10], '    ...'])
        about = comment_of.get(node.lineno) or comment_of.get(node.end_lineno)
        about = about or getattr(getattr(module, names[0]), 'about', '')
        headings = [f'### {name}' for name in names]
        description = f'{about[:1].upper()}{about[1:]}.'
        yield '\n\n'.join([source_link(module, node.lineno), *headings, description, f'```python\n{code}\n```'])


def completed(page, module):
    "Add signatures, methods, the help of commands, and data to a page of nbdev's, given as JSON"
    nb = json.loads(page)
    commands = [o.callback.__name__ for o in module.app.registered_commands] if hasattr(module, 'app') else []
    for cell in nb['cells']:
        shown = re.search(r'^show_doc\((\w+)\)', ''.join(cell['source']), re.M)
        if not shown: continue
        name, extra = shown[1], []
        o = getattr(module, name, None)
        if inspect.isclass(o):
            replace_signature(cell, signature(o))
            extra = list(methods(module, name, o))
        elif name in commands: extra = [command(module, name)]
        if name in commands: cell['outputs'] = []
        if extra: cell['outputs'].append(markdown_output('\n\n'.join(extra)))
    data_text = '\n\n'.join(data(module))
    if data_text: nb['cells'].append(dict(cell_type='markdown', metadata={}, source=f'## Data\n\n{data_text}'))
    return json.dumps(nb)


def replace_signature(cell, text):
    "Put a signature in place of the one in the outputs of a cell, if there is one"
    if text is None: return
    code = f'```python\n{text}\n```'
    for output in cell['outputs']:
        markdown = ''.join(output['data']['text/markdown'])
        output['data'] = {'text/markdown': re.sub(r'```python\n.*?```', lambda _: code, markdown, count=1, flags=re.S)}


def markdown_output(text): return dict(output_type='display_data', metadata={}, data={'text/markdown': text})


def staged(pages, to):
    "Complete the pages, and copy them to the names that links use"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(pages, to/'pages', ignore=shutil.ignore_patterns('_docs', '__pycache__'))
    for o in ('images', 'styles.css', 'sidebar.yml', 'nbdev.yml'):
        src, dst = root/'nbs'/o, to/'pages'/o
        if src.is_dir(): shutil.copytree(src, dst, dirs_exist_ok=True)
        else: shutil.copy(src, dst)
    for p in sorted((to/'pages').rglob('*')):
        if p.suffix not in ('.ipynb', '.qmd', '.md', '.yml'): continue
        text = number.sub('', p.read_text(encoding='utf-8'))
        target = p.with_name(number.sub('', p.name))
        has_module = (root/'ltrl_fastai'/p.parent.name/f'{target.stem}.py').exists()
        if p.suffix == '.ipynb' and has_module:
            text = completed(text, importlib.import_module(f'ltrl_fastai.{p.parent.name}.{target.stem}'))
        p.write_text(text, encoding='utf-8')
        p.rename(target)
    return to/'pages'


def rendered(pages):
    "Let smalldocs build the site; exits if it warns of anything but links to code, and keys that only Quarto reads"
    from smalldocs.site import build
    site = build(pages, quiet=True)
    expected = (
        'output-file is not read', 'unknown key format-links', 'format commonmark is not built',
        'html-math-method is ignored', 'broken link /blob/')
    faults = [o for o in site.warnings if not any(text in o for text in expected)]
    if faults: sys.exit('\n'.join(['The docs have faults:', *faults]))
    return site.out


def with_mathml(text):
    "Convert formulas to MathML, which browsers draw without a script"
    from latex2mathml.converter import convert
    def formula(m): return convert(html.unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, text, flags=re.S)
    return re.sub(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', '', text)


def with_source_pages(text, depth, files):
    "Make links to code point to pages of the site; adds the linked files to `files`"
    def link(m):
        files.add(m[1])
        return f'href="{"../"*depth}source/{m[1].removesuffix(".py")}.html#L{m[2]}"'
    return re.sub(r'href="[./]*/blob/[^/"]+/([^"#]+\.py)#L(\d+)" target="_blank"', link, text)


def source_page(file, template, depth):
    "A page of code, in the frame of `template`, a page at the top of the site"
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    code = highlight((root/file).read_text(encoding='utf-8'), PythonLexer(), HtmlFormatter(nowrap=True))
    lines = '\n'.join(f'<span id="L{i}">{line}</span>' for i, line in enumerate(code.rstrip('\n').split('\n'), 1))
    up = '../'*depth
    page = re.sub(r'(href|src)="(?!#|[a-z]+:|/)', rf'\1="{up}', template)
    page = re.sub(r'<title>.*?</title>', f'<title>{file}</title>', page, flags=re.S)
    code = f'<pre class="sourceCode python sourceview"><code>{lines}\n</code></pre>'
    main = f'<h1 class="title">{file}</h1>\n<div class="sourceCode">{code}</div>'
    page, n = re.subn(r'(<main\b[^>]*>).*(</main>)', lambda m: f'{m[1]}\n{main}\n{m[2]}', page, flags=re.S)
    if n != 1: sys.exit(f'{file}: the frame of a page was not found')
    return re.sub(r'<nav[^>]*id="TOC".*?</nav>', '', page, flags=re.S)


def finished(site):
    "Add formulas and pages of code, remove web fonts, and check that no page requests anything from outside the site"
    files = set()
    shutil.copytree(root/'nbs'/'images', site/'images', dirs_exist_ok=True)
    template = (site/'citing.html').read_text(encoding='utf-8')
    for p in sorted(site.rglob('*.html')):
        text = with_mathml(p.read_text(encoding='utf-8'))
        depth = len(p.relative_to(site).parts)-1
        p.write_text(with_source_pages(text, depth, files), encoding='utf-8')
    for file in sorted(files):
        to = site/'source'/file.replace('.py', '.html')
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(source_page(file, template, len(to.relative_to(site).parts)-1), encoding='utf-8')
    for p in site.rglob('*.css'):
        without_fonts = re.sub(r'@import\s+url\("?https?:[^)]*\)[^;]*;', '', p.read_text(encoding='utf-8'))
        p.write_text(without_fonts, encoding='utf-8')
    check_pages(site)


def check_pages(site):
    "Exit if a page requests anything from outside the site, or has a formula that was not converted"
    request = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    formula = re.compile(r'class="math (?:inline|display)"')
    faults = []
    for p in sorted(site.rglob('*.html')):
        text, name = p.read_text(encoding='utf-8'), p.relative_to(site)
        faults += [f'{name} requests what is not on the site: {m}' for m in request.findall(text)]
        if formula.search(text): faults.append(f'{name} has a formula that was not converted')
    if faults: sys.exit('\n'.join(faults))


def main():
    parser = argparse.ArgumentParser(description='Build the docs site from the notebooks.')
    parser.add_argument('--out', type=Path, default=root/'_docs', help='folder of the site; default: _docs')
    parser.add_argument('--workers', type=int, default=2, help='processes; 0 for this one alone; default: 2')
    args = parser.parse_args()
    # torch's warnings of fastai, in worker processes and in this one
    os.environ.update(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore::FutureWarning')
    warnings.filterwarnings('ignore', category=FutureWarning)
    stage = root/'_proc'/'_stage'
    site = rendered(staged(processed(args.workers), stage))
    finished(site)
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.move(site, args.out)
    shutil.rmtree(stage)
    print(f"{sum(1 for _ in args.out.rglob('*.html'))} pages: {args.out/'index.html'}")


if __name__ == '__main__': main()
