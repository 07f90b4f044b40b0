"After `jupyter ssh-spec setup` a host that had no ipykernel runs a kernel: from a package index, and without one."
import functools, re, shlex, shutil, sysconfig, threading, zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import pytest
from kernels import running, value
from test_operators import as_json, command, remote as _remote, sh

@pytest.fixture
def remote(_remote):
    "The environments that `setup` makes are removed again"
    yield _remote
    for h in _remote.lab: shutil.rmtree(h.home/'k', ignore_errors=True)

@pytest.fixture
def index(tmp_path):
    """A package index on loopback. Its wheel of ipykernel only adds the packages of these tests to the path: the real
    one needs dozens of other wheels."""
    files = tmp_path/'index/ipykernel'
    files.mkdir(parents=True)
    with zipfile.ZipFile(files/'ipykernel-6.99-py3-none-any.whl', 'w') as z:
        info = 'ipykernel-6.99.dist-info'
        z.writestr('ipykernel.pth', sysconfig.get_path('purelib') + '\n')
        z.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: ipykernel\nVersion: 6.99\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', '')
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=tmp_path/'index'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield dict(PIP_INDEX_URL=f'http://127.0.0.1:{server.server_port}', PIP_TRUSTED_HOST='127.0.0.1',
        PIP_CONFIG_FILE='/dev/null')
    server.shutdown()
    server.server_close()

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@pytest.mark.parametrize('name, offline', [('host1', False), ('host3', True)])
async def test_a_host_without_ipykernel_runs_a_kernel(remote, index, name, offline):
    host = remote.lab[name]
    here, there = (index, dict(PIP_NO_INDEX='1')) if offline else (dict(PIP_NO_INDEX='1'), index)
    host.env = there
    host.restart_sshd()
    out = await command('check', name, '--python', '~/k/bin/python', status=1)
    remedy = re.search(r'jupyter ssh-spec (setup .*)', out)[1]
    out = await command(*shlex.split(remedy), *['--offline']*offline, **here)
    install = re.search(r'Kernels there: jupyter ssh-spec (install .*)', out)[1]
    await command(*shlex.split(install.replace('--user', '')), '--prefix', remote.prefix, '--kernel-name',
                  f'made_{name}')
    async with running(remote.manager(f'made_{name}')) as (km, kc):
        assert await value(kc, '__import__("sys").prefix') == str(host.home/'k')

async def test_json_of_commands_that_act(remote, index):
    host = remote.lab[1]
    host.env = index
    host.restart_sshd()
    made = await as_json('setup', 'host2')
    assert [(o['host'], o['usable']) for o in made['hosts']] == [('host2', True)] and made['failed'] == []
    async with remote.on('host2') as k:
        where = '--remote-hosts', 'host2'
        log = await as_json('logs', k.km.kernel_id, *where)
        assert (log['kernel'], log['host'], log['running']) == (k.km.kernel_id, 'host2', True) \
            and k.km.kernel_id in log['text']
        await command('logs', k.km.kernel_id, *where, '--json', '--follow', status=1)
        assert 'not both' in sh.err
        assert (await as_json('stop', k.km.kernel_id, *where))['kernels'] == [
            dict(id=k.km.kernel_id, host='host2', ended=True, what=None)]
    for verb, mark in ('drain', True), ('undrain', False):
        assert [(o['host'], o['drained']) for o in (await as_json(verb, 'host2'))['hosts']] == [('host2', mark)]
