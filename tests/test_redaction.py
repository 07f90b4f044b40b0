"""Secrets stay where they belong. Everything that this package does is done once with all logging at DEBUG, paramiko's
packets included, while argument vectors are watched; then everything that was written anywhere is searched for every
secret there was."""
import asyncio, contextlib, io, os, re, subprocess, sys, traceback
from pathlib import Path
import psutil, pytest
from gateway_provisioners_ssh.provisioner import shared
from gateway_provisioners_ssh.errors import LaunchError
from kernels import LEGACY, forget, printed, running, value
from pace import until
from redact import ArgumentVectors, everything_logged, noted

PASSWORD = 'Xyzzy-Plugh-1797-plover'

@pytest.fixture
def logged():
    with everything_logged(out := io.StringIO()): yield out

@pytest.fixture
def secrets():
    with noted() as all: yield all

async def test_no_secret_is_told(net_remote, net, logged, secrets, monkeypatch):
    host, said, texts = net[3], [], {}
    host.add_user('willow', password=PASSWORD, key=False)
    host.options = dict(UsePAM='no')
    host.restart_sshd()
    c = net.client
    c.alias('by-password', HostName=host.address, User='willow', UserKnownHostsFile=c.known_hosts)
    monkeypatch.setenv('GP_REMOTE_PWD', PASSWORD)

    @contextlib.asynccontextmanager
    async def heard(*hosts, encryption='disabled', argv=None, **config):
        "A kernel, with what is known and written of it noted"
        name = net_remote.spec('_'.join(['told', *hosts, *(['odd'] if argv else [])]), argv, list(hosts))
        async with running(net_remote.manager(name, config=config, transport_encryption=encryption)) as (km, kc):
            p = km.provisioner
            said.extend(map(repr, [km, p, p.login, p.conn, p.process, p.fields, shared(), shared().pool,
                                   p.conn.routes, p.claim]))
            said.extend(map(str, [p.login, p.conn, p.process, p.fields]))
            try: yield km, kc
            finally:
                for h in net:
                    for f in h.tmp.glob('kernel-*.log*'): texts[f'log of {h.name} {f.name}'] = f.read_bytes()

    async def start(*args, **kw):
        async with heard(*args, **kw): pass

    async def fails(start, error, words=None):
        with pytest.raises(error, match=words) as e: await start
        said.extend([str(e.value), repr(e.value), ''.join(traceback.format_exception(e.value))])

    with ArgumentVectors(.02) as vectors:
        for encryption, config in ('disabled', {}), ('required', {}), ('required', dict(tunneling_enabled=True)):
            async with heard('by-password', encryption=encryption, **config) as (km, kc):
                assert await value(kc, '__import__("getpass").getuser()') == 'willow'
                await printed(kc, 'import os; os.system("env"); 1/0')
                texts['environment of the kernel'] = (await printed(kc,
                    'import os; print(dict(os.environ))'))[0].encode()
                await km.interrupt_kernel()
                await km.restart_kernel()
                await kc.wait_for_ready(timeout=60)
        for _ in range(2):   # cold, and forked
            async with heard('node1', standby=True) as (km, kc):
                shown = await printed(kc, 'import gc, os; forked = gc.get_freeze_count()\n'
                    'print(forked, dict(os.environ), open("/proc/self/environ").read() if forked else "")')
                texts[f'a kernel of a template {len(texts)}'] = shown[0].encode()
                agent = psutil.Process(psutil.Process(km.provisioner.fields['pid']).ppid())
                template, = await until(lambda: [o for o in agent.children() if o.name() == 'gpssh-standby'],
                                        60, 'a template')
        assert [k for k, text in texts.items() if k.startswith('a kernel of') and not text.startswith(b'0')]
        texts['a template'] = b''.join(Path(f'/proc/{template.pid}/{o}').read_bytes() for o in ('cmdline', 'environ'))
        template.kill()
        await start('node1', argv=lambda _: LEGACY, allow_legacy_launchers=True)
        # failures of every kind
        await fails(start('by-password', argv=lambda a: ['no-such-interpreter', *a[1:]]), LaunchError,
                    'no-such-interpreter: not found')
        await fails(start('by-password', argv=lambda a: ['sh', '-c', 'echo giving up; exit 3']), LaunchError,
                    'status 3(?s:.*)giving up')
        await fails(start('by-password', argv=lambda a: [a[0], '-c', 'raise SystemExit("crashed")']), LaunchError,
                    'status 1(?s:.*)crashed')
        await fails(start('by-password', kernel_log_dir='/no/such/directory'), LaunchError,
                    'cannot write the log /no/such/directory')
        net[1].refuse_keys()
        await fails(start('node2'), LaunchError, 'refused the login')
        monkeypatch.setenv('GP_REMOTE_PWD', PASSWORD+'-wrong')
        await asyncio.to_thread(forget)
        await fails(start('by-password'), LaunchError, 'refused the login')
        before, starting = len(secrets), asyncio.create_task(start('node3', response_ip=net.address))
        await until(lambda: len(secrets) > before, what='a ticket')
        starting.cancel()
        await fails(starting, asyncio.CancelledError)
    await asyncio.to_thread(forget)
    texts |= {'logging': logged.getvalue().encode(errors='replace'),
              'messages and reprs': '\n'.join(said).encode(errors='replace'),
              'argument vectors': b'\n'.join(vectors.seen),
              **{f'sshd of {h.name}': h.logfile.read_bytes() for h in net}}
    host.options = {}
    print({k: len(v) for k, v in texts.items() if not k.startswith('log of')}, len(secrets), 'forms of secrets,',
          vectors.rounds, 'looks at argument vectors')
    assert {'password', 'psk', 'key', 'version 1 key', 'control_key', 'curve_secretkey'} == set(secrets.values())
    assert len(texts['logging']) > 20_000 and b'launch_ipykernel.py' in texts['argument vectors'] and any(
        k.startswith('log of') for k in texts)
    assert {k: found for k, text in texts.items() if (found := secrets.found_in(text))} == {}

# The same as a plugin, for any tests

TOLD = """
import base64, json, logging, subprocess, time
import pytest
from Cryptodome.Cipher import AES, PKCS1_v1_5
from Cryptodome.PublicKey import RSA
from Cryptodome.Util.Padding import pad
from gateway_provisioners_ssh.handshake import PROTOCOL, LegacyKey, LaunchKeys, connection_info
from gateway_provisioners_ssh.hosts import Login

log = logging.getLogger('somebody')
def version_1():
    key, fields = LegacyKey(), PROTOCOL['vectors']['launch']['fields'] | dict(key='6f1d2c3b4a59', kernel_id='k')
    rsa, aes = RSA.import_key(base64.b64decode(key.public_key)), b'0123456789abcdef'
    sealed = AES.new(aes, AES.MODE_ECB).encrypt(pad(json.dumps(fields).encode(), 16))
    return key.open(dict(version=1, key=PKCS1_v1_5.new(rsa).encrypt(aes), conn_info=sealed))

def test_quiet(): LaunchKeys('k').ticket()
def test_nothing(): log.info('nothing')
def test_ticket(): log.debug('in a word: %s', LaunchKeys('k').ticket())
def test_psk(): (launch := LaunchKeys('k')).ticket(); log.debug(launch._psk.hex())
def test_password(): log.warning(Login(password='Xyzzy-Plugh').password)
def test_version_1(): log.info(version_1()['key'])
def test_argument(): subprocess.run(['sh', '-c', 'sleep 2; true', LaunchKeys('k').ticket()])
def test_report():
    ticket = LaunchKeys('k').ticket()
    assert not ticket
"""

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('tests, status, words', [('quiet', 0, ['none found']), ('nothing', 1,
    ['there was nothing to look for']),
    ('', 1, ['ticket in argument vectors', 'ticket in the report of test_told.py::test_report',
             *(rf'{o} in /\S+/redact-\S+\.log' for o in ('ticket', 'psk', 'password', 'version 1 key'))])])
def test_plugin(tmp_path, workers, tests, status, words):
    (tmp_path/'test_told.py').write_text(TOLD)
    r = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'redact', '-p', 'no:cacheprovider', '-n', str(workers),
                        '-k', tests, 'test_told.py'],
                       cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent), TMPDIR=str(tmp_path)),
                       capture_output=True, text=True)
    assert r.returncode == status and all(re.search(o, r.stdout) for o in words), r.stdout + r.stderr
