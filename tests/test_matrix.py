"""Every application in its default settings, in every place: `GP_MATRIX=all pytest tests/test_matrix.py` runs all cells
and writes down what happened; otherwise those run that have every pair of values between them."""
import pytest
import matrix

CELLS = matrix.cells() if matrix.ALL else matrix.covering(matrix.cells())
RUNS, RESULTS = matrix.runs(CELLS), {}

@pytest.fixture(scope='module', autouse=True)
def results():
    yield
    if matrix.ALL: matrix.write(RESULTS)

@pytest.mark.parametrize('run', RUNS, ids=lambda r: '-'.join(r).replace(' ', '_'))
async def test_application(machines, run):
    RESULTS.update(await matrix.run(machines, run, RUNS[run]))

def test_the_selection_has_every_pair():
    def pairs(cells): return set().union(*map(matrix.pairs, cells))
    assert pairs(CELLS) == pairs(matrix.cells())
