"""A replacement for Quarto that `nbdev-docs` can call, with the same commands, to test how Quarto would read the docs.

Quarto converts a notebook to Markdown, calls pandoc, and adds the frame of a website. This program does the first two
in the same way, with the pandoc of PyPI, but has no navigation, no search and no theme. It is as strict as Quarto about
settings, and stricter about pages: a missing file that is included, listed in a sidebar or linked to is an error.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pypandoc
import yaml

# Settings of a website that this project or nbdev uses; Quarto refuses unknown ones in `website` and `project`
known = {
    'project': {'type', 'output-dir'},
    'website': {'title', 'site-url', 'description', 'repo-branch', 'repo-url', 'favicon', 'navbar', 'sidebar'},
    'website.navbar': {'background', 'search', 'left'},
    'website.sidebar': {'style', 'collapse-level', 'contents'},
    '': {'project', 'format', 'website', 'metadata-files', 'format-links'}}


def merged(a, b):
    "Settings `a`, updated by `b` at every level"
    res = dict(a)
    for k, v in b.items(): res[k] = merged(a[k], v) if isinstance(a.get(k), dict) and isinstance(v, dict) else v
    return res


def settings(folder):
    "The settings of the website; exits if there are unknown ones"
    res = yaml.safe_load((folder/'_quarto.yml').read_text(encoding='utf-8'))
    for o in res.get('metadata-files', []): res = merged(res, yaml.safe_load((folder/o).read_text(encoding='utf-8')))
    for where, keys in known.items():
        part = res
        for k in filter(None, where.split('.')): part = part[k]
        unknown = set(part)-keys
        if unknown: sys.exit(f'unknown in {where or "the settings"}: {unknown}')
    if res['project']['type'] != 'website': sys.exit('no website')
    return res


def inputs(folder):
    "All pages: files whose path has no part that begins with a dot or an underline"
    found = (p.relative_to(folder) for k in ('*.ipynb', '*.qmd', '*.md') for p in folder.rglob(k))
    return sorted(p for p in found if p.name != 'README.md' and not any(o[0] in '._' for o in p.parts))


def listed(folder, contents):
    "The pages of a sidebar: paths, patterns, and sections of either"
    for o in [contents] if isinstance(contents, str) else contents:
        if isinstance(o, dict): yield from listed(folder, o['contents'])
        else: yield from sorted(folder.glob(o)) or sys.exit(f'the sidebar names {o}, which is not there')


def joined(o): return o if isinstance(o, str) else ''.join(o)


def fenced(text, attr=''):
    marks = '`'*max([3, *(len(o)+1 for o in re.findall('`{3,}', text))])
    return f'{marks}{attr}\n{text.rstrip()}\n{marks}'


def shown(output, asis, alt):
    "Markdown of an output in its best format"
    def div(kind, text): return f"::: {{.cell-output .cell-output-{kind}}}\n{text}\n:::"
    if output['output_type'] == 'stream': return div(output['name'], fenced(joined(output['text'])))
    if output['output_type'] == 'error': return fenced(f"{output['ename']}: {output['evalue']}")
    data = {k: joined(v) for k, v in output['data'].items() if isinstance(v, (str, list))}
    if 'text/markdown' in data: return data['text/markdown'] if asis else div('display', data['text/markdown'])
    if 'image/png' in data: return f"![{alt}](data:image/png;base64,{data['image/png'].strip()})"
    if 'image/svg+xml' in data: return fenced(data['image/svg+xml'], '{=html}')
    if 'text/html' in data: return fenced(data['text/html'], '{=html}')
    return div('display', fenced(data['text/plain']))


def cell(c):
    "Markdown of a cell"
    source = joined(c['source'])
    if c['cell_type'] != 'code': return source
    lines = source.split('\n')
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    options = yaml.safe_load('\n'.join(line[2:] for line in lines[:n])) or {}
    if options.get('include') is False: return ''
    code = '\n'.join(lines[n:]).strip()
    asis = options.get('output') == 'asis'
    parts = [fenced(code, '{.python .cell-code}')] if code and options.get('echo') is not False else []
    parts += [shown(o, asis, options.get('fig-alt', '')) for o in c.get('outputs', [])]
    return '\n\n'.join(parts) if asis else '\n\n'.join(['::: {.cell}', *parts, ':::'])


def markdown(file):
    "Front matter and Markdown of a page"
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        if cells[0]['cell_type'] != 'raw': sys.exit(f'{file}: has no title')
        head = joined(cells[0]['source']).strip().strip('-')
        text = '\n\n'.join(cell(c) for c in cells[1:])
    else:
        _, head, text = re.split(r'^---\n', text, maxsplit=2, flags=re.M)
        text = re.sub(r'\{\{< include (\S+) >\}\}', lambda m: (file.parent/m[1]).read_text(encoding='utf-8'), text)
    shortcode = re.search(r'\{\{<.*', text)
    if shortcode: sys.exit(f'{file}: {shortcode[0]}: not supported')
    return yaml.safe_load(head), text


pandoc = ('-f', 'markdown', '-t', 'html5', '--mathml', '--wrap=none', '--fail-if-warnings',
          '--syntax-highlighting=none')


def render_page(folder, page, names, to):
    "Write a page; links to source files become links to the `names` of their pages"
    def link(m):
        path, hash_sign, anchor = m[2].partition('#')
        if not path or re.match(r'[a-z]+:', path): return m[0]
        target = Path(os.path.normpath(path[1:] if path[0] == '/' else page.parent/unquote(path)))
        address = os.path.relpath(names.get(target, target), page.parent)
        return f'{m[1]}="{address}{hash_sign if anchor else ""}{anchor}"'
    head, text = markdown(folder/page)
    r = subprocess.run([pypandoc.get_pandoc_path(), *pandoc], input=text, capture_output=True, text=True)
    if r.returncode: sys.exit(f'{page}: {r.stderr}')
    body = re.sub(r'\b(href|src)="([^"]*)"', link, r.stdout)
    to.parent.mkdir(parents=True, exist_ok=True)
    title = head['title']
    html = f'<!DOCTYPE html>\n<title>{title}</title>\n<main>\n<h1>{title}</h1>\n{body}</main>\n'
    to.write_text(html, encoding='utf-8')


def render(folder, pages, to):
    "Write pages and copy pictures and styles"
    config = settings(folder)
    nav = [folder/o['href'] for o in config['website']['navbar']['left']]+[folder/config['website']['favicon']]
    for p in [*nav, *listed(folder, config['website']['sidebar']['contents'])]:
        if not p.exists(): sys.exit(f'the settings name {p}, which is not there')
    heads = {p: markdown(folder/p)[0] for p in inputs(folder)}
    names = {p: p.parent/head.get('output-file', p.with_suffix('.html').name) for p, head in heads.items()}
    for p in pages: render_page(folder, p, names, to/names[p])
    for o in list(folder.rglob('*')):  # a list, since copies may lie below the same folder
        if o.suffix in ('.svg', '.png', '.css'):
            (to/o.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to/o.relative_to(folder)).write_bytes(o.read_bytes())


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('command', choices=['inspect', 'render'])
    parser.add_argument('pages', nargs='*', type=Path)
    parser.add_argument('--output-dir', type=Path)
    parser.add_argument('--no-cache', action='store_true')
    parser.add_argument('--no-clean', action='store_true')
    args = parser.parse_args()
    folder = Path.cwd()
    if args.command == 'inspect':
        files = [str(folder/p) for p in inputs(folder)]
        print(json.dumps(dict(config=settings(folder), files=dict(input=files))))
    else: render(folder, args.pages or inputs(folder), args.output_dir)
