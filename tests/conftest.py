"Fixtures: real SSH hosts, and a home of the tests' own for the host application."
import os, shutil
from pathlib import Path
import pytest
from gateway_provisioners_ssh import balance
from gateway_provisioners_ssh.response import ResponseServer
from hosts import Client, LoopbackLab, NetLab
from kernels import Remote, forget
from spark import cluster_network, spark_standalone, yarn

CALLER = dict(os.environ)   # of pytest, before `client` takes its place

def need(reason):
    "Skip for `reason`, if there is one; under CI a missing piece is a failure"
    if reason: (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)

LONGEST = ('test_spark', 'test_matrix', 'test_scala', 'test_page', 'test_operators', 'test_lifecycle', 'test_standby',
           'test_faults', 'test_launchers', 'test_streams', 'test_reality', 'test_impersonation', 'test_options',
           'test_network', 'test_specs_cli', 'test_tutorial', 'test_anykernel', 'test_project', 'test_server',
           'test_hosts', 'test_redaction', 'test_demo', 'explanation/faults.ipynb', 'how-to/spark_standalone.ipynb',
           'how-to/yarn_client.ipynb', 'how-to/scala.ipynb', 'how-to/from_enterprise_gateway.ipynb', 'how-to/r.ipynb')

def group(nodeid):
    """What runs in one process: the files test_spark*.py, so that each cluster is started once, each other file, and
    each notebook"""
    file, _, test = nodeid.partition('::')
    if (name := Path(file).stem) == 'test_notebooks': return test.partition('[')[2].rstrip(']')
    return 'test_spark' if name.startswith('test_spark') else name

def pytest_collection_modifyitems(items):
    "What takes longest comes first, so that no process is at it alone in the end"
    items.sort(key=lambda o: [*LONGEST, group(o.nodeid)].index(group(o.nodeid)))

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling
    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid): return group(nodeid)
    return Groups(config, log)

@pytest.fixture(scope='session', autouse=True)
def client(tmp_path_factory):
    """The client's side of SSH; its home is HOME for all tests, and no gateway, Jupyter or agent setting of the
    caller's reaches them"""
    client = Client(tmp_path_factory.mktemp('client'))
    old, env = dict(os.environ), client.environ()
    os.environ.clear(); os.environ.update(env)
    yield client
    os.environ.clear(); os.environ.update(old)

@pytest.fixture(scope='session')
def _loopback(client):
    need(LoopbackLab.missing())
    with LoopbackLab(4, client) as lab: yield lab

@pytest.fixture(scope='session')
def _net(client, tmp_path_factory):
    need(NetLab.missing())
    with NetLab(4, client, keep=[tmp_path_factory.getbasetemp()]) as lab: yield lab

@pytest.fixture
def hosts(_loopback):
    """Four hosts on loopback addresses, host1 to host4, made whole after every test; the first kernel of each is for
    the first of its hosts"""
    balance.load_balancer.cache_clear()
    yield _loopback
    _loopback.repair()

@pytest.fixture
def net(_net):
    """Four hosts in network namespaces, node1 to node4, made whole after every test; the first kernel of each is for
    the first of its hosts"""
    balance.load_balancer.cache_clear()
    yield _net
    _net.repair()

@pytest.fixture(scope='module')
def _remote(_loopback, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch: yield Remote(_loopback, tmp_path_factory.mktemp('spec'), patch)

@pytest.fixture
def remote(_remote, hosts):
    "Kernelspec ssh_python for the hosts of `hosts`; every test begins without connections"
    yield _remote
    forget()

@pytest.fixture
def fresh_remote(hosts, tmp_path, monkeypatch):
    "The same in a prefix and an environment of the test's own, beside which `net_remote` may be used in the same file"
    yield Remote(hosts, tmp_path, monkeypatch)
    forget()

@pytest.fixture(scope='module')
def _net_remote(_net, request):
    with pytest.MonkeyPatch.context() as patch: yield Remote(_net, _net.base/request.module.__name__, patch)

@pytest.fixture
def net_remote(_net_remote, net):
    "Kernelspec ssh_python for the hosts of `net`; every test begins without connections"
    yield _net_remote
    forget()

@pytest.fixture
async def server():
    "A response server, as host applications have one"
    s = ResponseServer()
    yield s
    await s.close()

def machines_of(kind, client):
    "`matrix.Machines`, or machines derived from them; for a fixture"
    need(NetLab.missing() or (None if shutil.which('chromium') else 'chromium is not installed'))
    with kind(client) as m:
        need(m.unreadable())
        yield m

@pytest.fixture(scope='module')
def machines(client):
    "Machines on which people start applications, with a browser"
    from matrix import Machines
    yield from machines_of(Machines, client)
