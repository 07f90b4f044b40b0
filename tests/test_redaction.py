"""Secrets stay where they belong. Everything that this package does is done once with all logging at DEBUG, paramiko's packets included, while
argument vectors are watched; then everything that was written anywhere is searched for every secret there was."""
import asyncio, base64, contextlib, io, json, logging, os, threading, traceback
from pathlib import Path
import pytest
from gateway_provisioners_ssh import handshake
from gateway_provisioners_ssh.provisioner import DistributedProvisioner, shared
from kernels import forget, printed, running, value

PASSWORD = 'Xyzzy-Plugh-1797-plover'

@pytest.fixture
def everything_logged(monkeypatch):
    "What all loggers say at DEBUG"
    out, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter('%(name)s %(levelname)s %(message)s'))
    old = {}
    for o in root, *(o for o in logging.Logger.manager.loggerDict.values() if isinstance(o, logging.Logger)): old[o] = o.level; o.setLevel(logging.DEBUG)
    level, propagate = logging.getLogger('paramiko').level, []
    for name in 'paramiko', 'gateway_provisioners_ssh', 'gateway_provisioners_ssh.paramiko', 'traitlets', 'asyncio': logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield out
    root.removeHandler(handler)
    for o, level in old.items(): o.setLevel(level)
    logging.getLogger('gateway_provisioners_ssh.paramiko').setLevel(logging.CRITICAL)

class ArgumentVectors(threading.Thread):
    "Every argument vector on this machine, hosts included, as `ps` shows them, several times a second"
    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.rounds, self.ended = set(), 0, threading.Event()
    def run(self):
        while not self.ended.wait(.02):
            self.rounds += 1
            for pid in filter(str.isdigit, os.listdir('/proc')):
                with contextlib.suppress(OSError): self.seen.add(Path(f'/proc/{pid}/cmdline').read_bytes())
    def __enter__(self): self.start(); return self
    def __exit__(self, *a): self.ended.set(); self.join()

class Secrets(dict):
    "Every secret of a run, as texts that would give it away"
    def add(self, name, value):
        value = value if isinstance(value, bytes) else value.encode()
        if len(value) < 8: return
        for form in value, base64.b64encode(value), value.hex().encode(), base64.b64encode(value).rstrip(b'='): self[form] = name
    def found_in(self, text): return sorted({name for s, name in self.items() if s in text})

@pytest.fixture
def secrets(monkeypatch):
    "Collects the secrets of launches and kernels where they are made"
    all = Secrets()
    all.add('password', PASSWORD)
    ticket, adopt = handshake.Launch.ticket, DistributedProvisioner._adopt
    def of_ticket(self):
        text = ticket(self)
        fields = json.loads(base64.b64decode(text))
        all.add('ticket', text); all.add('psk', base64.b64decode(fields['psk'])); all.add('psk', fields['psk'])
        for k in 'key', 'curve_secretkey':
            if v := (fields.get('connection') or {}).get(k): all.add(k, v)
        return text
    async def of_kernel(self, *args, **kw):
        res = await adopt(self, *args, **kw)
        for k in 'key', 'control_key', 'curve_secretkey':
            if v := self.fields.get(k): all.add(k, v)
        all.add('control_key', bytes.fromhex(self.fields['control_key']))
        return res
    monkeypatch.setattr(handshake.Launch, 'ticket', of_ticket)
    monkeypatch.setattr(DistributedProvisioner, '_adopt', of_kernel)
    return all

async def test_no_secret_is_told(net_remote, net, everything_logged, secrets, monkeypatch):
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
            said.extend(map(repr, [km, p, p.login, p.conn, p.process, p.fields, shared(), shared().pool, p.conn.routes, p.claim]))
            said.extend(map(str, [p.login, p.conn, p.process, p.fields]))
            try: yield km, kc
            finally:
                for h in net:
                    for f in h.tmp.glob('kernel-*.log*'): texts[f'log of {h.name} {f.name}'] = f.read_bytes()

    async def refused(*args, **kw):
        with pytest.raises(Exception) as e:
            async with heard(*args, **kw): pass
        said.extend([str(e.value), repr(e.value), ''.join(traceback.format_exception(e.value))])
        return e.value

    with ArgumentVectors() as vectors:
        for encryption, config in ('disabled', {}), ('required', {}), ('required', dict(tunneling_enabled=True)):
            async with heard('by-password', encryption=encryption, **config) as (km, kc):
                assert await value(kc, '__import__("getpass").getuser()') == 'willow'
                await printed(kc, 'import os; os.system("env"); 1/0')
                texts['environment of the kernel'] = (await printed(kc, 'import os; print(dict(os.environ))'))[0].encode()
                await km.interrupt_kernel()
                await km.restart_kernel()
                await kc.wait_for_ready(timeout=60)
        async with heard('node1', allow_legacy_launchers=True): pass
        # failures of every kind
        await refused('by-password', argv=lambda a: ['no-such-interpreter', *a[1:]])
        await refused('by-password', argv=lambda a: ['sh', '-c', 'echo giving up; exit 3'])
        await refused('by-password', argv=lambda a: [a[0], '-c', 'raise SystemExit("crashed")'])
        await refused('by-password', kernel_log_dir='/no/such/directory')
        net[1].refuse_keys()
        e = await refused('node2')
        assert 'refused the login' in str(e)
        monkeypatch.setenv('GP_REMOTE_PWD', PASSWORD+'-wrong')
        await asyncio.to_thread(forget)
        e = await refused('by-password')
        assert 'refused the login' in str(e)
        starting = asyncio.create_task(refused('node3'))
        await asyncio.sleep(.3)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    await asyncio.to_thread(forget)
    texts |= {'logging': everything_logged.getvalue().encode(errors='replace'), 'messages and reprs': '\n'.join(said).encode(errors='replace'),
              'argument vectors': b'\n'.join(vectors.seen), **{f'sshd of {h.name}': h.logfile.read_bytes() for h in net}}
    host.options = {}
    print({k: len(v) for k, v in texts.items() if not k.startswith('log of')}, len(secrets), 'forms of secrets,', vectors.rounds, 'looks at argument vectors')
    assert {'password', 'ticket', 'psk', 'key', 'control_key', 'curve_secretkey'} <= set(secrets.values())
    assert len(texts['logging']) > 20_000 and b'launch_ipykernel.py' in texts['argument vectors'] and any(k.startswith('log of') for k in texts)
    assert {k: found for k, text in texts.items() if (found := secrets.found_in(text))} == {}
