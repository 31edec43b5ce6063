"""What Quarto would make of the docs, where there is no Quarto: a program of the same commands, for `nbdev-docs` to call.

Quarto turns a notebook into Markdown, has pandoc read it, and puts the page into the frame of a website. This does the first and the second in the same way, with the
pandoc of PyPI, and leaves the third away: there is no navigation, no search, no theme. It is as strict as Quarto is about settings, and more so about pages: what is not
there, be it included, listed in a sidebar or linked to, is an error.
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

known = {  # keys of the settings that a website may have, of those that ours or nbdev's use; Quarto refuses others within `website` and `project`
    'project': {'type', 'output-dir'},
    'website': {'title', 'site-url', 'description', 'repo-branch', 'repo-url', 'favicon', 'navbar', 'sidebar'},
    'website.navbar': {'background', 'search', 'left'},
    'website.sidebar': {'style', 'collapse-level', 'contents'},
    '': {'project', 'format', 'website', 'metadata-files', 'format-links'}}


def merged(a, b):
    "Settings `a`, with those of `b` beside or above them"
    return {**a, **{k: merged(a[k], v) if isinstance(a.get(k), dict) and isinstance(v, dict) else v for k, v in b.items()}}


def settings(folder):
    res = yaml.safe_load((folder/'_quarto.yml').read_text(encoding='utf-8'))
    for o in res.get('metadata-files', []): res = merged(res, yaml.safe_load((folder/o).read_text(encoding='utf-8')))
    for where, keys in known.items():
        part = res
        for k in filter(None, where.split('.')): part = part[k]
        if unknown := set(part)-keys: sys.exit(f'unknown in {where or "the settings"}: {unknown}')
    if res['project']['type'] != 'website': sys.exit('no website')
    return res


def inputs(folder):
    "All pages: what begins with a dot or an underline is none"
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


def shown(output, asis):
    "An output of a cell: the best of what there is"
    if output['output_type'] == 'stream': return f"::: {{.cell-output .cell-output-{output['name']}}}\n{fenced(joined(output['text']))}\n:::"
    if output['output_type'] == 'error': return fenced(f"{output['ename']}: {output['evalue']}")
    data = {k: joined(v) for k, v in output['data'].items() if isinstance(v, (str, list))}
    if 'text/markdown' in data: return data['text/markdown'] if asis else f"::: {{.cell-output .cell-output-display}}\n{data['text/markdown']}\n:::"
    if 'image/png' in data: return None, f"data:image/png;base64,{data['image/png'].strip()}"
    if 'image/svg+xml' in data: return fenced(data['image/svg+xml'], '{=html}')
    if 'text/html' in data: return fenced(data['text/html'], '{=html}')
    return f"::: {{.cell-output .cell-output-display}}\n{fenced(data['text/plain'])}\n:::"


def cell(c):
    source = joined(c['source'])
    if c['cell_type'] != 'code': return source
    lines = source.split('\n')
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    options = yaml.safe_load('\n'.join(line[2:] for line in lines[:n])) or {}
    if options.get('include') is False: return ''
    code, asis = '\n'.join(lines[n:]).strip(), options.get('output') == 'asis'
    parts = [fenced(code, '{.python .cell-code}')] if code and options.get('echo') is not False else []
    for o in c.get('outputs', []):
        text = shown(o, asis)
        parts.append(text if isinstance(text, str) else f'![{options.get("fig-alt", "")}]({text[1]})')
    return '\n\n'.join(parts) if asis else '\n\n'.join(['::: {.cell}', *parts, ':::'])


def markdown(file):
    "A page as Markdown, and what stands before its first line"
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        if cells[0]['cell_type'] != 'raw': sys.exit(f'{file}: has no title')
        head = joined(cells[0]['source']).strip().strip('-')
        text = '\n\n'.join(cell(c) for c in cells[1:])
    else:
        _, head, text = re.split(r'^---\n', text, maxsplit=2, flags=re.M)
        text = re.sub(r'\{\{< include (\S+) >\}\}', lambda m: (file.parent/m[1]).read_text(encoding='utf-8'), text)
    if m := re.search(r'\{\{<.*', text): sys.exit(f'{file}: {m[0]}: not known here')
    return yaml.safe_load(head), text


pandoc = ('-f', 'markdown', '-t', 'html5', '--mathml', '--wrap=none', '--fail-if-warnings')


def render_page(folder, page, names, to):
    "Write a page, whose links to pages are by the `names` that these have on the site"
    def link(m):
        path, _, anchor = m[2].partition('#')
        if not path or re.match(r'[a-z]+:', path): return m[0]
        target = Path(os.path.normpath(path[1:] if path[0] == '/' else page.parent/unquote(path)))
        return f'{m[1]}="{os.path.relpath(names.get(target, target), page.parent)}{"#"*bool(anchor)}{anchor}"'
    head, text = markdown(folder/page)
    r = subprocess.run([pypandoc.get_pandoc_path(), *pandoc], input=text, capture_output=True, text=True)
    if r.returncode: sys.exit(f'{page}: {r.stderr}')
    body = re.sub(r'\b(href|src)="([^"]*)"', link, r.stdout)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(f'<!DOCTYPE html>\n<title>{head["title"]}</title>\n<main>\n<h1>{head["title"]}</h1>\n{body}</main>\n', encoding='utf-8')


def render(folder, pages, to):
    config = settings(folder)
    nav = [folder/o['href'] for o in config['website']['navbar']['left']]+[folder/config['website']['favicon']]
    for p in [*nav, *listed(folder, config['website']['sidebar']['contents'])]:
        if not p.exists(): sys.exit(f'the settings name {p}, which is not there')
    heads = {p: markdown(folder/p)[0] for p in inputs(folder)}
    names = {p: p.parent/head.get('output-file', p.with_suffix('.html').name) for p, head in heads.items()}
    for p in pages: render_page(folder, p, names, to/names[p])
    for o in folder.rglob('*'):
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
    args, folder = parser.parse_args(), Path.cwd()
    if args.command == 'inspect': print(json.dumps(dict(config=settings(folder), files=dict(input=[str(folder/p) for p in inputs(folder)]))))
    else: render(folder, args.pages or inputs(folder), args.output_dir)
