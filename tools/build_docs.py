"""Build the docs site from the notebooks into _docs/: `python tools/build_docs.py`. Needs no Quarto and no network.

nbdev makes pages of the notebooks, smalldocs makes HTML of the pages. Three things are added on the way: methods and public data, of which nbdev documents functions and
classes alone; pages under the names that nbdev's links have; and pages of code, to which "source" leads. And no page asks for anything that is not on the site: formulas
become MathML, fonts are those of the reader.
"""
import argparse
import ast
import dataclasses
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
numbered = re.compile(r'\b\d+[a-z]?_(?=\w+\.ipynb\b)')  # nbdev leaves it off: 07_review.ipynb becomes review.html


def processed(workers):
    "What nbdev makes of the notebooks, in a folder that it keeps for the next time"
    from nbdev.config import get_config
    from nbdev.doclinks import nbdev_export
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(root)
    nbdev_export()  # links to names need an index that is fresh
    refresh_quarto_yml()
    return proc_nbs(get_config().nbs_path, n_workers=workers)


def source_link(module, line):
    return f'[source](/blob/main/{Path(module.__file__).relative_to(root).as_posix()}#L{line}){{target="_blank" style="float:right; font-size:smaller"}}'


def comments(source):
    "What is said behind a line, by its number"
    return {t.start[0]: t.string[1:].strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def signature(cls):
    "Of a class of which Python knows no telling one: the fields of a dataclass, each with its comment; nothing for a callback that takes nothing. None for others"
    if dataclasses.is_dataclass(cls):
        source = inspect.cleandoc('\n'+inspect.getsource(cls))
        said, node = comments(source), ast.parse(source).body[0]
        fields = [(ast.get_source_segment(source, o), said.get(o.end_lineno, '')) for o in node.body if isinstance(o, ast.AnnAssign)]
        return '\n'.join([f'def {cls.__name__}(', *(f'    {field}, # {about}'.removesuffix(', # ') for field, about in fields), '):'])
    if '__init__' not in set().union(*(vars(o) for o in cls.__mro__ if o.__module__.startswith('ltrl_fastai'))) and hasattr(cls, 'run_valid'): return f'def {cls.__name__}():'


def methods(module, name, cls):
    "What nbdev would show of the public methods and properties that a class has of its own"
    from fastai.callback.core import _events
    from nbdev.showdoc import BasicMarkdownRenderer
    fields = getattr(cls, '__dataclass_fields__', {})
    for k, o in vars(cls).items():
        f = inspect.unwrap(o.fget if isinstance(o, property) else getattr(o, '__func__', o))
        of_others = k.startswith('_') or k in fields or k in map(str, _events) or any(k in vars(base) for base in cls.__mro__[1:])
        if of_others or not inspect.isfunction(f) or not inspect.getdoc(o): continue
        line = inspect.getsourcelines(f)[1]
        if isinstance(o, property): yield f'{source_link(module, line)}\n\n#### {name}.{k}\n\n*{inspect.getdoc(o)}*'
        else: yield BasicMarkdownRenderer(f, name=f'{name}.{k}', title_level=4)._repr_markdown_().removeprefix('---\n').replace('#LNone', f'#L{line}')


def command(module, name):
    "The help of a command"
    from typer.testing import CliRunner
    text = CliRunner().invoke(module.app, [name, '--help'], prog_name='ltrl', terminal_width=80, max_content_width=80).output
    line = inspect.getsourcelines(inspect.unwrap(getattr(module, name)))[1]
    return f'{source_link(module, line)}\n\n### {name}\n\n```\n{text.strip()}\n```'


def data(module):
    "What the public names of a module are that are no functions or classes, and the code that assigns them, without what is long in it"
    source = inspect.getsource(module)
    said = comments(source)
    for node in ast.parse(source).body:
        names = [o.id for t in getattr(node, 'targets', []) for o in ast.walk(t) if isinstance(o, ast.Name) and o.id in module.__all__]
        if not names: continue
        lines = ast.get_source_segment(source, node).split('\n')
        code = '\n'.join(lines if len(lines) <= 12 else [*lines[:10], '    ...'])
        about = said.get(node.lineno) or said.get(node.end_lineno) or getattr(getattr(module, names[0]), 'about', '')
        yield '\n\n'.join([source_link(module, node.lineno), *(f'### {o}' for o in names), about[:1].upper()+about[1:]+'.', f'```python\n{code}\n```'])


def completed(page, module):
    "A page of nbdev's, as JSON, with signatures that tell something, the methods of each class, the help of commands, and with data at its end"
    nb = json.loads(page)
    commands = [o.callback.__name__ for o in module.app.registered_commands] if hasattr(module, 'app') else []
    for cell in nb['cells']:
        if not (m := re.search(r'^show_doc\((\w+)\)', ''.join(cell['source']), re.M)): continue
        o = getattr(module, m[1], None)
        extra = list(methods(module, m[1], o)) if inspect.isclass(o) else [command(module, m[1])] if m[1] in commands else []
        if inspect.isclass(o) and (better := signature(o)):
            for out in cell['outputs']:
                text = ''.join(out['data']['text/markdown'])
                out['data'] = {'text/markdown': re.sub(r'```python\n.*?```', lambda _: f'```python\n{better}\n```', text, count=1, flags=re.S)}
        if m[1] in commands: cell['outputs'] = []
        if extra: cell['outputs'].append(dict(output_type='display_data', metadata={}, data={'text/markdown': '\n\n'.join(extra)}))
    if more := '\n\n'.join(data(module)): nb['cells'].append(dict(cell_type='markdown', metadata={}, source=f'## Data\n\n{more}'))
    return json.dumps(nb)


def staged(pages, to):
    "The pages, completed, under the names that links have"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(pages, to/'pages', ignore=shutil.ignore_patterns('_docs', '__pycache__'))
    for o in ('images', 'styles.css', 'sidebar.yml', 'nbdev.yml'):
        src, dst = root/'nbs'/o, to/'pages'/o
        if src.is_dir(): shutil.copytree(src, dst, dirs_exist_ok=True)
        else: shutil.copy(src, dst)
    for p in sorted((to/'pages').rglob('*')):
        if p.suffix not in ('.ipynb', '.qmd', '.md', '.yml'): continue
        text, named = numbered.sub('', p.read_text(encoding='utf-8')), p.with_name(numbered.sub('', p.name))
        if p.suffix == '.ipynb' and (root/'ltrl_fastai'/p.parent.name/named.with_suffix('.py').name).exists():
            text = completed(text, importlib.import_module(f'ltrl_fastai.{p.parent.name}.{named.stem}'))
        p.write_text(text, encoding='utf-8')
        p.rename(named)
    return to/'pages'


def rendered(pages):
    "The site that smalldocs makes of the pages; raises `SystemExit` if it warns of anything but what is for Quarto alone, and links to code"
    from smalldocs.site import build
    site = build(pages, quiet=True)
    for_quarto = ('output-file is not read', 'unknown key format-links', 'format commonmark is not built', 'html-math-method is ignored', 'broken link /blob/')
    if faults := [o for o in site.warnings if not any(k in o for k in for_quarto)]: sys.exit('\n'.join(['The docs have faults:', *faults]))
    return site.out


def with_mathml(text):
    "Formulas that a browser draws by itself"
    from latex2mathml.converter import convert
    def formula(m): return convert(html.unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, text, flags=re.S)
    return re.sub(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', '', text)


def of_source(text, depth, wanted):
    "Links to code, which have no address on the network, as links to pages of the site; takes note of the lines that are `wanted`"
    def link(m):
        wanted.setdefault(m[1], set()).add(int(m[2]))
        return f'href="{"../"*depth}source/{m[1].removesuffix(".py")}.html#L{m[2]}"'
    return re.sub(r'href="[./]*/blob/[^/"]+/([^"#]+\.py)#L(\d+)" target="_blank"', link, text)


def source_page(file, template, depth):
    "A page of code, within the frame that `template`, a page at the top of the site, has"
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    code = highlight((root/file).read_text(encoding='utf-8'), PythonLexer(), HtmlFormatter(nowrap=True))
    lines = '\n'.join(f'<span id="L{i}">{line}</span>' for i, line in enumerate(code.rstrip('\n').split('\n'), 1))
    up = '../'*depth
    page = re.sub(r'(href|src)="(?!#|[a-z]+:|/)', rf'\1="{up}', template)
    page = re.sub(r'<title>.*?</title>', f'<title>{file}</title>', page, flags=re.S)
    main = f'<h1 class="title">{file}</h1>\n<div class="sourceCode"><pre class="sourceCode python sourceview"><code>{lines}\n</code></pre></div>'
    page, n = re.subn(r'(<main\b[^>]*>).*(</main>)', lambda m: f'{m[1]}\n{main}\n{m[2]}', page, flags=re.S)
    if n != 1: sys.exit(f'{file}: the frame of a page was not found')
    return re.sub(r'<nav[^>]*id="TOC".*?</nav>', '', page, flags=re.S)


def finished(site):
    "Formulas, code and fonts, and a look at each page for what is not on the site"
    wanted = {}
    shutil.copytree(root/'nbs'/'images', site/'images', dirs_exist_ok=True)
    template = (site/'citing.html').read_text(encoding='utf-8')
    for p in sorted(site.rglob('*.html')):
        text = with_mathml(p.read_text(encoding='utf-8'))
        p.write_text(of_source(text, len(p.relative_to(site).parts)-1, wanted), encoding='utf-8')
    for file in sorted(wanted):
        to = site/'source'/file.replace('.py', '.html')
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(source_page(file, template, len(to.relative_to(site).parts)-1), encoding='utf-8')
    for p in site.rglob('*.css'):
        p.write_text(re.sub(r'@import\s+url\("?https?:[^)]*\)[^;]*;', '', p.read_text(encoding='utf-8')), encoding='utf-8')
    asks = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    away = [(p.relative_to(site), m) for p in sorted(site.rglob('*.html')) for m in asks.findall(p.read_text(encoding='utf-8'))]
    if away: sys.exit('\n'.join(f'{p} asks for what is not on the site: {m}' for p, m in away))
    raw = [p.relative_to(site) for p in sorted(site.rglob('*.html')) if re.search(r'class="math (?:inline|display)"', p.read_text(encoding='utf-8'))]
    if raw: sys.exit(f'formulas are left as they were in {", ".join(map(str, raw))}')


def main():
    parser = argparse.ArgumentParser(description='Build the docs site from the notebooks.')
    parser.add_argument('--out', type=Path, default=root/'_docs', help='folder of the site; default: _docs')
    parser.add_argument('--workers', type=int, default=2, help='processes; default: 2')
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore::FutureWarning')  # of torch to fastai, in other processes
    warnings.filterwarnings('ignore', category=FutureWarning)  # and in this
    stage = root/'_proc'/'_stage'
    site = rendered(staged(processed(args.workers), stage))
    finished(site)
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.move(site, args.out)
    shutil.rmtree(stage)
    print(f"{sum(1 for _ in args.out.rglob('*.html'))} pages: {args.out/'index.html'}")


if __name__ == '__main__': main()
