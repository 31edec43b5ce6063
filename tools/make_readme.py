"Make README.md from nbs/index.ipynb, and the changelog page of the docs from CHANGELOG.md. Needs no Quarto."
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def directives_and_source(cell):
    "The directives of a code cell (`#| hide`, ...), and its source without them"
    lines = ''.join(cell['source']).splitlines()
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    directives = {line[2:].strip() for line in lines[:n]}
    return directives, '\n'.join(lines[n:]).strip()


def outputs(cell):
    "Yield the outputs of a cell: Markdown as it is, plain text between fences"
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        text = o.get('text') if o['output_type'] == 'stream' and o.get('name') == 'stdout' else data.get('text/plain')
        if 'text/markdown' in data: yield ''.join(data['text/markdown']).rstrip()
        elif text: yield f"```\n{''.join(text).rstrip()}\n```"


def links_from_root(text):
    "Make links that are relative to the notebook relative to the README"
    def link(m): return m[1]+(root/'nbs'/m[2]).resolve().relative_to(root).as_posix()
    return re.sub(r'(\]\(|src=")(?![a-z]+:|#)([^)#"]+)', link, text)


def readme(notebook):
    "Convert the notebook at path `notebook` to Markdown"
    parts = ['<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit that. -->']
    for cell in json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown':
            parts.append(links_from_root(''.join(cell['source']).strip('\n')))
            continue
        directives, source = directives_and_source(cell)
        if 'hide' in directives: continue
        if 'echo: false' not in directives: parts.append(f'```python\n{source}\n```')
        parts += outputs(cell)
    return '\n\n'.join(parts)+'\n'


def changelog(file):
    "The changelog at path `file` as a page of the docs; Quarto's `include` can't read files outside nbs/"
    text = Path(file).read_text(encoding='utf-8').removeprefix('# Changelog\n').strip()
    header = '---\ntitle: Changelog\ndescription: What is new, by version.\n---'
    source = '<!-- Made from CHANGELOG.md by tools/make_readme.py: edit that. -->'
    return f'{header}\n\n{source}\n\n{text}\n'


if __name__ == '__main__':
    made = {'README.md': readme(root/'nbs/index.ipynb'), 'nbs/changelog.qmd': changelog(root/'CHANGELOG.md')}
    for name, text in made.items():
        path = root/name
        if '--check' not in sys.argv[1:]: path.write_text(text, encoding='utf-8')
        elif not path.exists() or path.read_text(encoding='utf-8') != text:
            sys.exit(f'{name} is stale: run python tools/make_readme.py')
