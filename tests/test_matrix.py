"""Every application in its default settings, in every place: `GP_MATRIX=all pytest tests/test_matrix.py` runs all cells and writes down what happened;
otherwise those run that have every pair of values between them."""
import os
import pytest
from conftest import need
from hosts import NetLab
import matrix

ALL = os.environ.get('GP_MATRIX') == 'all'
CELLS = matrix.cells() if ALL else matrix.covering(matrix.cells())
RUNS = matrix.runs(CELLS)

@pytest.fixture(scope='module')
def machines(client):
    need(NetLab.missing())
    with matrix.Machines(client) as m:
        need(m.unreadable())
        yield m

@pytest.mark.parametrize('run', RUNS, ids=lambda r: '-'.join(r).replace(' ', '_'))
async def test_application(machines, run):
    await matrix.run(machines, run, RUNS[run])

def test_the_selection_has_every_pair():
    def pairs(cells): return set().union(*map(matrix.pairs, cells))
    assert pairs(CELLS) == pairs(matrix.cells())
