#!/usr/bin/env python3
"Makes README.md from nbs/index.ipynb, with nothing but Python: python scripts/readme.py (or --check, to see whether it would change)."
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def directives(src):
    "Names of the `#|` lines that `src` begins with"
    return re.findall(r'^#\|\s*([\w-]+(?::\s*false)?)', src, re.M)

def output(o):
    "One cell output as Markdown"
    data = o.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(o.get('text', data.get('text/plain', [])))
    return re.sub('^(?=.)', '    ', text, flags=re.M).rstrip()

def local(md):
    "The same Markdown with links that lead from the top level, not from nbs/"
    return re.sub(r'(\]\()(?![a-z]+:|[#/])([^)\s]+)', lambda m: m[1] + ('nbs/' + m[2]).replace('nbs/../', ''), md)

def cell(c):
    "One cell as Markdown; '' for what is hidden"
    src = ''.join(c['source'])
    if c['cell_type'] == 'markdown': return local(src)
    flags = directives(src)
    if c['cell_type'] != 'code' or {'hide', 'export', 'exporti', 'default_exp'} & set(flags): return ''
    code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
    parts = [] if 'echo: false' in flags else [f'```python\n{code}\n```']
    return '\n\n'.join(parts + [local(output(o)) for o in c['outputs']])

def readme(nb=ROOT/'nbs/index.ipynb'):
    "The text of README.md"
    cells = [cell(c).strip() for c in json.loads(Path(nb).read_text(encoding='utf-8'))['cells']]
    head = '<!-- Made from nbs/index.ipynb by scripts/readme.py: edit that notebook. -->'
    return '\n\n'.join([head] + [c for c in cells if c]) + '\n'

if __name__ == '__main__':
    f, new = ROOT/'README.md', readme()
    if sys.argv[1:] != ['--check']: f.write_text(new, encoding='utf-8')
    elif f.read_text(encoding='utf-8') != new: sys.exit('README.md is not what nbs/index.ipynb gives: python scripts/readme.py')
