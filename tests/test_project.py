"""The repository itself: generated files are what their sources give, the distribution is complete and lean, the docs
hold together."""
import ast, contextlib, email, json, os, re, shutil, subprocess, sys, tarfile, zipfile
from collections import Counter
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement
from hosts import REPO
from pace import within

PKG = 'gateway_provisioners_ssh'
CFG = ConfigParser(delimiters=['='], interpolation=None)
CFG.read(REPO/'settings.ini')
CFG = CFG['DEFAULT']
NOTEBOOKS = sorted(p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ids = lambda p: str(p.relative_to(REPO))

def lines(key): return [o.strip() for o in CFG[key].splitlines() if o.strip()]
def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the work tree without what is not in a checkout"
    ignore = shutil.ignore_patterns('.git', '.venv*', 'build', 'dist', '*.egg-info', '__pycache__', '.pytest_cache',
                                    '.hypothesis', '.ipynb_checkpoints')
    return shutil.copytree(REPO, tmp_path_factory.mktemp('copy')/'repo', ignore=ignore, symlinks=True)

def texts(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()
            and '__pycache__' not in p.parts}

# Generated files

def test_export_changes_nothing(copy):
    before = texts(copy)
    r = subprocess.run([Path(sys.prefix)/'bin'/'nbdev-export'], cwd=copy, capture_output=True, text=True)
    assert not r.returncode, r.stderr
    after = texts(copy)
    assert sorted(k for k in before | after if before.get(k) != after.get(k)) == [], 'run nbdev-export'

def test_readme_is_made_from_the_index():
    subprocess.run([sys.executable, REPO/'scripts'/'readme.py', '--check'], check=True)

# Notebooks

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=ids)
def test_notebook(nb):
    cs = cells(nb)
    assert re.match(r'# \S.*\n\n> \S', '\n\n'.join(source(c) for c in cs[:2])), 'begins with a title and a `>` subtitle'
    assert not [source(c) for c in cs for o in c.get('outputs', []) if o['output_type'] == 'error'], 'no error is saved'
    assert not [c['id'] for c in cs if 'execution' in c['metadata']
                or c.get('execution_count')], 'no times or counts are saved: run nbdev-clean'
    exports = [source(c) for c in cs if re.search(r'^#\|\s*default_exp', source(c), re.M)]
    if exports:
        assert 'nbdev_export()' in source(cs[-1]) and '#| hide' in source(cs[-1]), 'ends with a hidden nbdev_export()'

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=ids)
def test_saved_outputs_are_of_no_particular_machine(nb):
    mine = re.compile(r'(?<![\w./~-])/(?!usr/|opt/|home/ada/)[\w.-]+/(?:[\w.-]+/)*(?:site-packages|bin/python)')
    texts = [''.join(o.get('text', o.get('data', {}).get('text/plain', ''))) for c in cells(nb)
             for o in c.get('outputs', [])]
    assert [m[0] for t in texts if (m := mine.search(t))] == []

def test_site():
    conf = {f: yaml.safe_load((REPO/f).read_text()) for f in ('_quarto.yml', 'nbs/_quarto.yml', 'nbs/nbdev.yml',
        'nbs/sidebar.yml')}
    assert (not (REPO/'_quarto.yml').is_symlink()
            and (REPO/'nbs/_quarto.yml').resolve() == (REPO/'_quarto.yml').resolve())
    assert all((REPO/'nbs'/f).exists() for f in [*conf['_quarto.yml']['metadata-files'],
                                                 conf['_quarto.yml']['format']['html']['css']])
    def listed(o):
        if isinstance(o, str):
            yield from [str(p.relative_to(REPO/'nbs')) for p in (REPO/'nbs').glob(o)] if '*' in o else [o]
        elif isinstance(o, list): yield from (x for p in o for x in listed(p))
        else: yield from listed([o[k] for k in ('href', 'contents') if k in o])
    pages = list(listed(conf['nbs/sidebar.yml']['website']['sidebar']['contents']))
    assert sorted(pages) == sorted(str(p.relative_to(REPO/'nbs'))
                                   for p in NOTEBOOKS), 'nbs/sidebar.yml lists every notebook once'

def shown(c):
    "The Markdown that a reader sees of a cell"
    if c['cell_type'] == 'markdown': return source(c)
    return '\n\n'.join(''.join(o['data']['text/markdown']) for o in c.get('outputs', [])
                       if 'text/markdown' in o.get('data', {}))

def prose(page):
    "The Markdown of a page, without code"
    text = '\n\n'.join(map(shown, cells(page))) if page.suffix == '.ipynb' else page.read_text()
    return re.sub(r'```.*?```|`[^`\n]*`(?!\])', '', text, flags=re.S)

LINK = re.compile(r'(?P<image>!)?\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\((?P<to>[^)\s]+)[^)]*\)')
def links(md): return [m for m in LINK.finditer(md) if not re.match('[a-z]+:', m['to'])]
def anchor(title): return re.sub(r'[^\w\- ]', '', title.lower()).strip().replace(' ', '-')
def anchors(page):
    md = page.read_text() if page.suffix != '.ipynb' else '\n\n'.join(map(shown, cells(page)))
    return {anchor(t) for t in re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', md, flags=re.S | re.M), re.M)}

PAGES = [*(REPO/o for o in ('README.md', 'SECURITY.md', 'CHANGELOG.md')), *NOTEBOOKS]

@pytest.mark.parametrize('page', PAGES, ids=ids)
def test_links_lead_somewhere(page):
    "Pages, files, images and headings"
    bad = []
    for link in links(prose(page)):
        path, _, part = link['to'].partition('#')
        to = page.parent/path if path else page
        if not to.exists() or part and part not in anchors(to) or link['image'] and to.suffix not in ('.png', '.svg'):
            bad.append(link['to'])
    assert bad == []

@pytest.mark.parametrize('page', PAGES, ids=ids)
def test_pictures_have_an_alternative_text(page):
    "In Markdown between the brackets, at a cell that draws as `#| fig-alt:`"
    assert [m['to'] for m in links(prose(page)) if m['image'] and len(m['text'].split()) < 3] == []
    assert not re.search(r'<img', prose(page)), 'write ![what it shows](file)'
    drawn = [c for c in cells(page) if any(k.startswith('image/') for o in c.get('outputs', [])
                                           for k in o.get('data', {}))] if page.suffix == '.ipynb' else []
    assert [c['id'] for c in drawn if not re.search(r'^#\| fig-alt: "[^"]+"$', source(c), re.M)] == []

def test_every_picture_is_used():
    used = {(p.parent/m['to']).resolve() for p in PAGES for m in links(prose(p)) if m['image']}
    assert sorted(o.name for o in (REPO/'nbs/images').iterdir() if o.resolve() not in used) == []

def test_site_is_rendered(tmp_path):
    "scripts/site.py: a page for each notebook; each link and picture in its HTML leads to a file of the site"
    subprocess.run([sys.executable, REPO/'scripts/site.py', tmp_path], check=True)
    pages = sorted(tmp_path.rglob('*.html'))
    assert len(pages) == len(NOTEBOOKS) + 3
    bad = []
    for page in pages:
        html = page.read_text()
        for to in re.findall(r'(?:href|src)="?([^"\s>]+)', re.sub(r'<pre>.*?</pre>', '', html, flags=re.S)):
            path, _, part = to.partition('#')
            if re.match('[a-z]+:', to): continue
            f = page.parent/path if path else page
            if not f.exists() or part and f'id="{part}"' not in f.read_text(): bad.append((page.name, to))
    assert bad == []

# README

README = (REPO/'README.md').read_text()

def test_two_commands_stand_first():
    commands = [o.strip().splitlines() for o in re.findall(r'```bash\n(.*?)```', README, re.S)]
    assert commands[:2] == [['bash scripts/demo.sh'], ['bash scripts/test.sh']]
    assert (REPO/'.ci/run').read_text().splitlines()[-1] == 'exec bash scripts/test.sh'
    for o in (REPO/'scripts').glob('*.sh'): subprocess.run(['bash', '-n', o], check=True)

def test_readme_is_short(): assert len(README.splitlines()) <= 120

def test_options_are_all_in_the_reference():
    from gateway_provisioners_ssh.provisioner import DistributedProvisioner
    from gateway_provisioners_ssh.settings import TABLE, reference
    shown = [''.join(o['data']['text/markdown']) for c in cells(REPO/'nbs/reference/options.ipynb')
             for o in c.get('outputs', []) if o.get('data')]
    assert [o for o in map(reference, TABLE.values()) if o not in shown] == [], 'run nbs/reference/options.ipynb'
    rows = {n for o in shown for n in re.findall(r'^\| `(\w+)`', o, re.M)}
    assert rows == {*DistributedProvisioner.class_traits(config=True)}

def test_chapters_that_share_a_module_share_no_names():
    "Several notebooks export into one file; a function that is defined twice may only become a method, at once"
    functions = [o for o in ast.parse((REPO/PKG/'launchers/agent.py').read_text()).body
                 if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    twice = {k for k, n in Counter(o.name for o in functions).items() if n > 1}
    def names(o, kind): return {n.id for n in ast.walk(o) if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}
    def own(o):
        return (names(o, ast.Store) | {a.arg for a in ast.walk(o) if isinstance(a, ast.arg)}
                | {f.name for f in ast.walk(o) if isinstance(f, ast.FunctionDef) and f is not o})
    assert {(o.name, n) for o in functions for n in twice & names(o, ast.Load) - own(o)} == set()

# The distribution

@pytest.fixture(scope='module')
def dist(copy, tmp_path_factory):
    "The directory of an sdist, and of the wheel that was built from it"
    out = tmp_path_factory.mktemp('dist')
    r = subprocess.run([sys.executable, '-m', 'build', '--outdir', out, copy], capture_output=True, text=True)
    assert not r.returncode, r.stderr + r.stdout
    return out

@pytest.fixture(scope='module')
def wheel(dist): return zipfile.ZipFile(next(dist.glob('*.whl')))

def test_wheel_is_complete(wheel, copy):
    names = {o for o in wheel.namelist() if '.dist-info/' not in o}
    data = {o for o in names if '.data/' in o}
    assert names - data == {str(p.relative_to(copy)) for p in (copy/PKG).rglob('*') if p.is_file()
                            and p.suffix != '.pyc'}
    assert [o.partition('.data/')[2]
            for o in data] == ['data/etc/jupyter/jupyter_server_config.d/gateway_provisioners_ssh.json']

def test_sdist_has_what_it_is_built_from(dist):
    with tarfile.open(next(dist.glob('*.tar.gz'))) as f: names = {o.partition('/')[2] for o in f.getnames()}
    tops = ('CHANGELOG.md LICENSE README.md SECURITY.md settings.ini setup.py pyproject.toml '
            'jupyter-config/gateway_provisioners_ssh.json')
    assert set(tops.split()) <= names and not [o for o in names if o.startswith(('nbs/', 'tests/', '.ci'))]

def test_package_index_would_take_it(dist):
    r = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir()], capture_output=True,
                       text=True)
    assert not r.returncode, r.stdout

def test_version_has_its_section_in_the_changelog(dist):
    from gateway_provisioners_ssh import __version__
    assert re.findall(r'^## (.*)$', (REPO/'CHANGELOG.md').read_text(), re.M)[0] == __version__
    assert all(f'-{__version__}' in o.name for o in dist.iterdir())

def test_wheel_metadata(wheel):
    read = lambda what: wheel.read(next(o for o in wheel.namelist() if o.endswith('.dist-info/' + what))).decode()
    meta = email.message_from_string(read('METADATA'))
    needs = [Requirement(o) for o in meta.get_all('Requires-Dist')]
    norm = lambda rs: sorted(re.sub('[-_.]+', '-', Requirement(r).name) for r in rs)
    assert norm(str(r) for r in needs if not r.marker) == norm(lines('requirements'))
    assert (meta['Requires-Python'] == f">={CFG['min_python']}"
            and 'BSD-3-Clause' in (meta['License-Expression'] or meta['License']))
    assert any(o.endswith('/LICENSE') for o in wheel.namelist())
    eps = read('entry_points.txt')
    for o in ('[console_scripts]', 'jupyter-ssh-spec = ', '[jupyter_client.kernel_provisioners]',
              'distributed-provisioner = ', '[gateway_provisioners_ssh.load_balancers]', 'round-robin = ',
              'least-connection = '):
        assert o in eps

def test_plain_install_brings_no_tools():
    "Whatever the requirements lead to, as installed here, is no test, docs or notebook-building tool"
    todo, seen = [Requirement(o) for o in lines('requirements')], set()
    while todo:
        r = todo.pop()
        if r.name.lower() in seen or r.marker and not r.marker.evaluate({'extra': ''}): continue
        seen.add(r.name.lower())
        todo += [Requirement(o) for o in metadata.distribution(r.name).requires or []]
    tools = ('nbdev execnb pytest hypothesis matplotlib nbconvert nbclient jupyter-server ipykernel ipython sphinx '
             'quarto pyspark'.split())
    assert sorted(seen & set(tools)) == []

@pytest.mark.parametrize('group', ['console_scripts', 'kernel_provisioners', 'load_balancers'])
def test_entry_points_load(group):
    name = {'console_scripts': group, 'kernel_provisioners': 'jupyter_client.kernel_provisioners',
            'load_balancers': f'{PKG}.load_balancers'}[group]
    for line in lines(group):
        ep = next(o for o in metadata.entry_points(group=name) if o.name == line.split('=')[0].strip())
        assert callable(ep.load())

# The code

PYTHON = sorted(p for p in REPO.rglob('*.py') if p.is_relative_to(REPO/PKG) or p.is_relative_to(REPO/'tests')
                or p.parent in (REPO, REPO/'scripts'))

@pytest.mark.parametrize('py', PYTHON, ids=ids)
def test_oldest_python_can_read_it(py):
    ast.parse(py.read_text(encoding='utf-8'), feature_version=tuple(map(int, CFG['min_python'].split('.'))))

ROOMS = [m[1] for nb in NOTEBOOKS if nb.parent.name == 'nbs' for c in cells(nb)
         if (m := re.search(r'^#\|\s*default_exp\s+(\w+)$', source(c), re.M))]

def imports(py):
    for o in ast.walk(ast.parse(py.read_text(encoding='utf-8'))):
        if isinstance(o, ast.ImportFrom) and o.level: yield (o.module or o.names[0].name).split('.')[0]
        elif isinstance(o, ast.ImportFrom) and (o.module or '').startswith(PKG + '.'): yield o.module.split('.')[1]
        elif isinstance(o, ast.Import):
            yield from (n.name.split('.')[1] for n in o.names if n.name.startswith(PKG + '.'))

def test_imports_point_downwards():
    """In the order of the notebooks; only the command line may use what comes after it, and nothing uses the command
    line"""
    for py in (REPO/PKG).glob('[!_]*.py'):
        used = set(imports(py)) & set(ROOMS)
        assert (py.stem == 'cli' or 'cli' not in used
                and all(ROOMS.index(o) < ROOMS.index(py.stem) for o in used)), f'{py.name} imports {used}'

def test_launchers_stand_alone():
    for py in [*(REPO/PKG/'launchers').glob('*.py')]:
        assert list(imports(py)) == [] and f'import {PKG}' not in py.read_text(), py.name

def test_nothing_of_this_machine():
    "No file names a directory of the machine it was made on, or a package index"
    index = subprocess.run([sys.executable, '-m', 'pip', 'config', 'list'], capture_output=True, text=True).stdout + \
        ' '.join(v for k, v in os.environ.items() if k.startswith('PIP_'))
    hosts = set(re.findall(r'https?://(?:[^@/\s]*@)?([\w.-]+\.[a-z]\w+)', index))
    dirs = {str(o) for o in (REPO, *([Path(sys.prefix)] if sys.prefix != sys.base_prefix else [])) if len(o.parts) > 2}
    words = [re.compile(rf'(?<![\w.-]){re.escape(o)}(?![\w-])'.encode()) for o in hosts | dirs]
    r = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=REPO, capture_output=True)
    files = ([REPO/o for o in os.fsdecode(r.stdout).split('\0') if o] if not r.returncode
             else [p for d in ('nbs', PKG, 'tests', 'scripts') for p in (REPO/d).rglob('*')])
    bad = [(ids(f), w.pattern) for f in files if f.is_file() for w in words if w.search(f.read_bytes())]
    assert bad == []

# The tests themselves

@pytest.mark.parametrize('took, kept',
                         [([.9], True), ([1e9, .9, .9], True), ([1e9, 1e9, .9], False), ([1e9, .9, 1e9], False)])
async def test_a_bound_in_time_is_kept_at_once_or_in_both_of_two_more_attempts(took, kept):
    attempts = iter(took)
    async def attempt(): return next(attempts)
    with contextlib.nullcontext() if kept else pytest.raises(AssertionError): await within(1, attempt)
    assert not list(attempts)
