"Make README.md from nbs/index.ipynb: its prose, its code, and what the code printed; and the page of the docs from CHANGELOG.md. Needs no Quarto."
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def shown(cell):
    "Directives of a code cell (`#| hide`, ...) and its source without them"
    lines = ''.join(cell['source']).splitlines()
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    return {line[2:].strip() for line in lines[:n]}, '\n'.join(lines[n:]).strip()


def outputs(cell):
    "A cell's outputs: Markdown as it is, plain text between fences"
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        text = o.get('text') if o['output_type'] == 'stream' and o.get('name') == 'stdout' else data.get('text/plain')
        if 'text/markdown' in data: yield ''.join(data['text/markdown']).rstrip()
        elif text: yield f"```\n{''.join(text).rstrip()}\n```"


def from_root(text):
    "Links, which are relative to the notebook, as the README has them"
    return re.sub(r'(\]\(|src=")(?![a-z]+:|#)([^)#"]+)', lambda m: m[1]+(root/'nbs'/m[2]).resolve().relative_to(root).as_posix(), text)


def readme(notebook):
    "The notebook at path `notebook` as Markdown."
    parts = ['<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit that. -->']
    for cell in json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown': parts.append(from_root(''.join(cell['source']).strip('\n')))
        else:
            flags, source = shown(cell)
            if 'hide' in flags: continue
            if 'echo: false' not in flags: parts.append(f'```python\n{source}\n```')
            parts += outputs(cell)
    return '\n\n'.join(parts)+'\n'


def changelog(file):
    "The page of the docs that shows the changelog at path `file`; Quarto's `include` reaches no file outside of nbs/"
    text = Path(file).read_text(encoding='utf-8').removeprefix('# Changelog\n').strip()
    return f'---\ntitle: Changelog\ndescription: What is new, by version.\n---\n\n<!-- Made from CHANGELOG.md by tools/make_readme.py: edit that. -->\n\n{text}\n'


if __name__ == '__main__':
    made = {'README.md': readme(root/'nbs/index.ipynb'), 'nbs/changelog.qmd': changelog(root/'CHANGELOG.md')}
    for name, text in made.items():
        path = root/name
        if '--check' not in sys.argv[1:]: path.write_text(text, encoding='utf-8')
        elif not path.exists() or path.read_text(encoding='utf-8') != text: sys.exit(f'{name} is stale: run python tools/make_readme.py')
