#!/usr/bin/env python3
"""Renders the documentation to HTML, one page for each notebook, with the sidebar of nbs/sidebar.yml, into _docs
or the directory named:
    python scripts/site.py [DIRECTORY]

Needs nbconvert, which comes with JupyterLab. It shows the saved outputs and executes nothing."""
import html, os, re, shutil, sys
from pathlib import Path
import nbformat, yaml
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
DOCUMENTS = 'SECURITY.md', 'CHANGELOG.md', 'LICENSE'   # of the top level, which pages link to

def directives(source):
    "The `#|` lines of a cell, and what follows them"
    lines = source.splitlines()
    n = next((i for i, o in enumerate(lines) if not o.startswith('#|')), len(lines))
    return ' '.join(o[2:].strip() for o in lines[:n]), '\n'.join(lines[n:])

def prepare(nb):
    "The cells that a reader sees, without directives"
    out = []
    for c in nb.cells:
        if c.cell_type == 'code':
            flags, c.source = directives(c.source)
            if re.search(r'\bhide\b|default_exp', flags): continue
            if 'echo: false' in flags: c.metadata['transient'] = dict(remove_source=True)
            alt = re.search(r'fig-alt: "([^"]*)"', flags)
            for o in c.outputs:
                if alt and 'image/png' in o.get('data', {}): o.metadata.setdefault('image/png', {})['alt'] = alt[1]
                if 'text' in o: o.text = re.sub(r'\x1b\[[0-9;]*m', '', o.text)
        out.append(c)
    nb.cells = out
    return nb

def anchor(title):
    "The name by which links lead to a heading"
    return re.sub(r'[^\w\- ]', '', html.unescape(title).lower()).strip().replace(' ', '-')

def headings(body):
    "The same HTML with the names of headings that the links use, and without signs at them"
    def named(m):
        text = re.sub(r'<a class="anchor-link".*?</a>', '', m[3], flags=re.S)
        return f'<h{m[1]} id="{anchor(re.sub("<[^>]*>", "", text))}">{text}</h{m[1]}>'
    return re.sub(r'<h([1-6])([^>]*)>(.*?)</h\1>', named, body, flags=re.S)

def target(page, link):
    "Where a link of the page at `page` (below nbs/) leads in the site"
    path, sep, part = link.partition('#')
    if re.match('[a-z]+:', link) or not path: return link
    to = Path(os.path.normpath((NBS/page).parent/path))
    if to.is_relative_to(NBS): to = to.relative_to(NBS)
    elif to.name in DOCUMENTS: to = Path(to.name)
    else: return link
    if to.suffix == '.ipynb' or to.name in DOCUMENTS: to = to.with_suffix('.html')
    return os.path.relpath(to, Path(page).parent) + sep + part

def breaks(body):
    "The same HTML, where long names in text may be broken behind `_`, `.` and `/`, and short words not at all"
    def word(m):
        if len(m[0]) > 26: return re.sub(r'(?<=\w\w\w)([_./,=])(?=\w\w\w)', r'\1<wbr>', m[0])
        return f'<span>{m[0]}</span>' if '-' in m[0] else m[0]
    def within(m): return m[0] if '\n' in m[0] else m[1] + re.sub(r'[^\s<>]+', word, m[2])
    return re.sub(r'((?<!<pre>)<code>|<h1[^>]*>)([^<]*)', within, body)

def columns(body):
    "The same HTML, where output in columns scrolls instead of being wrapped"
    def is_table(text): return len(re.findall(r'^\S+(?: \S+)* {2,}\S+.* {2,}\S', text, re.M)) > 1
    return re.sub(r'<pre>([^<]*)', lambda m: '<pre class=columns>' + m[1] if is_table(m[1]) else m[0], body)

def pictures(body):
    "The same HTML, where a picture has the width that Markdown gives, and leads to its full size"
    body = re.sub(r'(<img [^>]*[^/>])\s*/?>\{width=(\d+)\}', r'\1 width=\2>', body)
    return re.sub(r'<img [^>]*src="([^":]*)"[^>]*>', r'<a href="\1">\g<0></a>', body)

def tables(body):
    "The same HTML, where cells of sentences have the title of their column, so that a phone can show one below the other"
    def table(m):
        heads = re.findall(r'<th\b[^>]*>(.*?)</th>', m[0], re.S)
        rows = [re.findall(r'<td\b.*?</td>', o, re.S) for o in m[0].split('</tr>') if '<td' in o]
        words = re.sub('<[^>]*>', '', ''.join(map(''.join, rows)))
        if len(heads) < 3 or len(words) < 60*len(rows): return m[0]
        label = iter([re.sub('<[^>]*>', '', h) for _ in rows for h in heads])
        return '<table class=sentences' + re.sub(r'<td\b', lambda _: f'<td data-label="{next(label)}"', m[0][6:])
    return re.sub(r'<table.*?</table>', table, body, flags=re.S)

def links(page, body): return re.sub(r'\b(href|src)="([^"]*)"', lambda m: f'{m[1]}="{target(page, m[2])}"', body)

def polished(page, body):
    for f in headings, breaks, columns, pictures, tables: body = f(body)
    return links(page, body)

def title(page):
    first = nbformat.read(NBS/page, 4).cells[0].source
    return re.match(r'# (.*)', first)[1]

def sections():
    "The sidebar: `(section or None, pages)`"
    for o in yaml.safe_load((NBS/'sidebar.yml').read_text())['website']['sidebar']['contents']:
        if isinstance(o, str): yield None, [o]; continue
        listed = [o['contents']] if isinstance(o['contents'], str) else o['contents']
        yield o['section'], [str(p.relative_to(NBS)) for g in listed for p in sorted(NBS.glob(g))]

def sidebar(page, titles):
    out = []
    for name, pages in sections():
        def item(p):
            to = target(page, os.path.relpath(p, Path(page).parent))
            return f'<li{" class=here" if p == page else ""}><a href="{to}">{html.escape(titles[p])}</a>'
        items = ''.join(map(item, pages))
        is_open = ' open' if page in pages or not name else ''
        items = f'<ul>{items}</ul>'
        out.append(f'<details{is_open}><summary>{name}</summary>{items}</details>' if name else items)
    return ''.join(out)

CSS = '''
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: #222; display: flex; align-items: flex-start; }
nav { width: 15rem; flex: none; padding: 1rem; font-size: .9rem; box-sizing: border-box; }
nav { position: sticky; top: 0; max-height: 100vh; overflow: auto; }
nav ul { list-style: none; margin: .2rem 0 .6rem; padding-left: .6rem; }
nav .here a { font-weight: bold; } nav summary { cursor: pointer; }
nav > input, nav > label { display: none; }
main { flex: 1; min-width: 0; max-width: 62rem; padding: 1rem 1.5rem; }
main p, main li { max-width: 50rem; } main p, main li, blockquote { overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: break-word; } h2 { margin-top: 2.2rem; }
a { color: #1b6ca8; }
pre { background: #f6f6f6; padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
code { font-size: .9em; } code span { white-space: nowrap; } pre code { font-size: 1em; }
pre code span { white-space: inherit; }
.output pre { background: none; border-left: 2px solid lightsalmon; margin-left: .8rem; }
.output pre:not(.columns) { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .92rem; }
td, th { border: 1px solid #ddd; padding: .3rem .6rem; vertical-align: top; text-align: left; }
th { background: #f6f6f6; }
img, svg { max-width: 100%; height: auto; }
blockquote { margin: 0; padding-left: 1rem; border-left: 3px solid #ccc; color: #555; }
.prompt { display: none; }
@media (max-width: 50rem) {
  body { display: block; } main { padding: .5rem 1rem; }
  nav { width: auto; position: static; max-height: none; padding: .6rem 1rem; border-bottom: 1px solid #ddd; }
  nav > label { display: block; cursor: pointer; } nav > label::before { content: '☰ '; }
  nav > input { display: block; position: absolute; opacity: 0; }
  nav > input:focus-visible + label { outline: 2px solid; }
  nav > input:not(:checked) ~ div { display: none; }
  nav li { padding: .25rem 0; } nav summary { padding: .3rem 0; }
  .sentences, .sentences tbody, .sentences tr, .sentences td { display: block; } .sentences thead { display: none; }
  .sentences tr { border-bottom: 2px solid #999; } .sentences td { border-bottom: 0; }
  .sentences td:empty { display: none; }
  .sentences td:not(:first-child)::before { content: attr(data-label) ': '; color: #777; }
  .sentences td:first-child { background: #f6f6f6; font-weight: bold; }
  .output_png { overflow-x: auto; } .output_png img { min-width: 30rem; }
  h1 { font-size: 1.6rem; } table { font-size: .9rem; } td, th { padding: .25rem .4rem; }
}
'''

def write(out, page, body, titles, heading):
    to = (out/page).with_suffix('.html')
    to.parent.mkdir(parents=True, exist_ok=True)
    style = os.path.relpath(out/'site.css', to.parent)
    to.write_text(f'''<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{html.escape(heading)}</title><link rel=stylesheet href="{style}">
<nav><input type=checkbox id=menu><label for=menu>All pages</label><div>{sidebar(page, titles)}</div></nav>
<main>{polished(page, body)}</main></html>''')

def main(out):
    "Write the site to the directory `out`"
    out.mkdir(parents=True, exist_ok=True)
    (out/'site.css').write_text(CSS + HtmlFormatter().get_style_defs('.highlight'))
    shutil.copytree(NBS/'images', out/'images', dirs_exist_ok=True)
    titles = {p: title(p) for _, pages in sections() for p in pages}
    exporter = HTMLExporter(template_name='basic')
    for page, heading in titles.items():
        body, _ = exporter.from_notebook_node(prepare(nbformat.read(NBS/page, 4)))
        write(out, page, body, titles, heading)
    for name in DOCUMENTS:
        text = (ROOT/name).read_text()
        body = markdown2html(text) if name.endswith('.md') else f'<h1>Licence</h1><pre>{html.escape(text)}</pre>'
        def below_nbs(m): return m[0].replace('"nbs/', '"').replace('README.md', 'index.ipynb')
        body = re.sub(r'href="(?!\w+:)[^"#]*', below_nbs, body)
        write(out, name, body, titles, name)

if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs'))
