"""The wheel, built from the sdist, in an empty virtual environment and home of each Python that the package is for:
every module is imported, and the demo runs kernels on mock hosts. The Python of the tests is left out, as it runs all
other tests."""
import os, pwd, shutil, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from hosts import REPO
from test_project import copy, dist   # fixtures

PYTHONS = [f'3.{n}' for n in (10, 12, 13, 14) if n != sys.version_info.minor]
HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)   # HOME is that of the tests
IMPORT_ALL = '''
import importlib, pkgutil, sys, gateway_provisioners_ssh as package
names = [o.name for o in pkgutil.walk_packages(package.__path__, package.__name__ + '.')]
names.remove('gateway_provisioners_ssh.extension') # for the process of a Jupyter Server, which is not installed here
for o in names: importlib.import_module(o)
print(len(names), package.__file__.startswith(sys.prefix))'''

def interpreter(version):
    "A Python of that version: one in the search path, one of pyenv's, or one of uv's; None if there is none"
    kept = HOME/'.pyenv/versions', HOME/'.local/share/uv/python'
    found = [shutil.which(f'python{version}'), *(p for d in kept for p in d.glob(f'*{version}*/bin/python{version}'))]
    for o in filter(None, found):
        what = 'import sys, venv; print("%d.%d" % sys.version_info[:2])'
        r = subprocess.run([o, '-c', what], capture_output=True, text=True)
        if r.stdout.strip() == version: return str(o)

@pytest.fixture
def away():
    "An empty directory, and an environment that has it as home and nothing of the tests' own packages"
    with tempfile.TemporaryDirectory(prefix='empty-') as tmp:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'VIRTUAL_ENV', 'GP_', 'JUPYTER'))}
        cache = os.environ.get('PIP_CACHE_DIR', HOME/'.cache/pip')
        yield Path(tmp), keep | dict(HOME=tmp, PIP_CACHE_DIR=str(cache), PATH='/usr/local/bin:/usr/bin:/bin')

def run(env, *argv, cwd):
    r = subprocess.run(list(map(str, argv)), env=env, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not r.returncode, r.stdout + r.stderr
    return r.stdout

@pytest.mark.parametrize('version', PYTHONS)
def test_installed_in_an_empty_environment(version, dist, away):
    if not (python := interpreter(version)):
        pytest.skip(f'THERE IS NO PYTHON {version} HERE, so it was not tried. To have it: pyenv install {version}')
    home, env = away
    run(env, python, '-m', 'venv', '--without-pip', home/'venv', cwd=home)
    bin = home/'venv/bin'
    wheel, = dist.glob('*.whl')
    pip = sys.executable, '-m', 'pip', '--python', bin/'python'
    run(env, *pip, 'install', '--quiet', '--no-compile', f'{wheel}[kernel]', cwd=home)
    modules, own = run(env, bin/'python', '-W', 'error::SyntaxWarning', '-c', IMPORT_ALL, cwd=home).split()
    assert int(modules) > 25 and own == 'True'
    out = run(env | dict(PATH=f'{bin}:{env["PATH"]}'), bin/'jupyter-ssh-spec', 'demo', '--hosts', 2, cwd=home)
    assert 'no process, no file, no port' in out and 'Done in' in out

def test_oldest_and_newest_python_are_tried():
    "The floor of settings.ini, and what is newer than the Python of the tests"
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(REPO/'settings.ini')
    assert cfg['DEFAULT']['min_python'] in [*PYTHONS, f'3.{sys.version_info.minor}']
