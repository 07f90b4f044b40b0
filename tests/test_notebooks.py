"Every notebook, from top to bottom, in a process and a home of its own."
import pytest
from conftest import CALLER
from forks import Forks
from hosts import REPO
from kernels import BIN
from spark import CACHE

NOTEBOOKS = sorted(o for o in (REPO/'nbs').rglob('*.ipynb') if '/.' not in str(o.relative_to(REPO)))

@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    "A process that has imported what nbdev needs to run any notebook, plots included"
    env = CALLER | dict(HOME=str(tmp_path_factory.mktemp('home')), XDG_CACHE_HOME=str(CACHE.parent), MPLBACKEND='agg')
    with Forks('nbdev.test', 'execnb.shell', 'matplotlib_inline.backend_inline', env=env) as f: yield f

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda o: str(o.relative_to(REPO/'nbs')))
def test_notebook(forks, tmp_path, notebook):
    env = forks.env | dict(HOME=str(tmp_path))
    with open(tmp_path/'log', 'w+') as log:
        r = forks.run(BIN/'nbdev-test', notebook, env=env, cwd=REPO, stdout=log, timeout=600)
        log.seek(0)
        assert not r.returncode, log.read()
