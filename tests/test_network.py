"""What travels between a host application and its hosts, and by which ways: encrypted or not, in one SSH connection out
of a network that lets nothing in, over jump hosts and proxy commands, with keys of an agent, a password, or a Kerberos
ticket. `-s` shows what was measured."""
import asyncio, contextlib, functools, json, os, re, shutil, socket, subprocess, sys, textwrap
from pathlib import Path
from types import SimpleNamespace
import psutil, pytest
from traitlets.config import Config
from gateway_provisioners_ssh import ssh
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.operators import check, site
from gateway_provisioners_ssh.errors import LaunchError
from conftest import need
from hosts import SBIN, sh
from kernels import LEGACY, client_of, forget, interrupt, printed, running, value
from pace import slowness, until, wait

HERE = Path(__file__).parent

@pytest.fixture
def remote(net_remote): return net_remote

async def after_a_break(kc, expr, timeout=60):
    "What `expr` is, asked again for as long as requests get lost in a connection that has ended"
    async def asked():
        with contextlib.suppress(TimeoutError): return [await value(kc, expr, timeout=3)]
    return (await until(asked, timeout, 'an answer'))[0]

# Encryption of the channels

CURVE = 'curve_publickey', 'curve_secretkey'

def encryption_of(remote, name, offered):
    "Let the kernelspec `name` offer this encryption"
    path = remote.specs_dir/name/'kernel.json'
    kernel = json.loads(path.read_text())
    kernel['metadata'].pop('supported_encryption', None)
    if offered: kernel['metadata']['supported_encryption'] = offered
    path.write_text(json.dumps(kernel))
    return name

@pytest.mark.parametrize('tunnel', [False, True], ids=['direct', 'tunnel'])
@pytest.mark.parametrize('policy', ['disabled', 'auto', 'required'])
async def test_transport_encryption(remote, net, policy, tunnel):
    """Who captures every packet of a host reads a cell and its output only if nothing encrypts them; a restart keeps
    the keys"""
    cell, output = 'cell seen by nobody 1797', 'output seen by nobody 3594'
    with net[0].capture() as packets:
        async with remote.on('node1', transport_encryption=policy, config=dict(tunneling_enabled=tunnel)) as (km, kc):
            async def ask():
                assert (await printed(kc, f'# {cell}\nprint("output", "seen by nobody", 2*1797)'))[0] == output+'\n'
            await ask()
            info, fields = km.get_connection_info(), dict(km.provisioner.fields)
            assert info['ip'] == ('127.0.0.1' if tunnel else net[0].address)
            assert all(k in info for k in CURVE) == (policy != 'disabled')
            await km.restart_kernel()
            await kc.wait_for_ready(timeout=60)
            await ask()
            assert km.get_connection_info() == info
            assert {k: km.provisioner.fields.get(k) for k in (*CURVE, 'key', 'shell_port')} == {k: fields.get(k)
                for k in (*CURVE, 'key', 'shell_port')}
    seen = packets.read_bytes()
    assert len(seen) > 50_000, 'there was something to see'
    plain = policy == 'disabled' and not tunnel
    assert [o.encode() in seen for o in (cell, output)] == [plain, plain]
    # tunnelled kernels have none
    secrets = [info['key'], *(info[k] for k in CURVE[1:] if k in info),
               *(fields[k] for k in ('control_key',) if k in fields)]
    assert not [o for o in secrets if (o if isinstance(o, bytes) else o.encode()) in seen], 'a key is in no packet'

async def test_encryption_that_a_kernel_does_not_offer(remote):
    name = encryption_of(remote, remote.spec('plain', hosts=['node1']), None)
    with pytest.raises(RuntimeError, match='does not declare'):
        async with running(remote.manager(name, transport_encryption='required')): pass
    async with running(remote.manager(name, transport_encryption='auto')) as (km, kc):
        assert not set(CURVE) & set(km.get_connection_info()) and await value(kc, '6*7') == 42

@pytest.mark.parametrize('policy', ['auto', 'required'])
async def test_encryption_that_a_launcher_does_not_give(remote, net, policy):
    "A kernelspec may promise what its launcher cannot do: then there is no kernel, and no plaintext"
    name = encryption_of(remote, remote.spec('promise', argv=lambda _: LEGACY, hosts=['node1']), ['curve'])
    with net[0].nothing_left(ignore=['/kernel-.*log', '/tmp.*json', r'/\.']):
        with pytest.raises(LaunchError, match='encrypt'):
            async with running(remote.manager(name, transport_encryption=policy,
                                              config=dict(allow_legacy_launchers=True))):
                pass

# One connection, outwards

SOURCE = textwrap.dedent('''
    import os, socket
    s = socket.create_server(("127.0.0.1", 0))
    print(s.getsockname()[1], flush=True)
    data = os.urandom(2**20)
    while True:
        c, _ = s.accept()
        try:
            for _ in range(int(c.makefile().readline())): c.sendall(data)
        except OSError: pass
        c.close()''')

def test_behind_nat(remote, net):
    "All there is to have of kernels, through one connection to port 22 of each host"
    source = subprocess.Popen([str(o) for o in net[0].inside([sys.executable, '-c', SOURCE])], stdout=subprocess.PIPE,
                              text=True)
    env = net.client.environ() | {k: v for k, v in os.environ.items()
                                  if k.startswith(('JUPYTER', 'IPYTHON', 'KERNEL_'))} | dict(
        PATH=os.environ['PATH'], GP_ENABLE_TUNNELING='True')
    with remote.lab.nothing_left(15, [r'/\.ipython/', r'/\.cache/', r'/__pycache__/']):
        app = net.laptop().popen(sys.executable, HERE/'laptop.py', source.stdout.readline().strip(), net.client.config,
                                 env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert app.stdout.readline() == 'cut\n'
            assert [h.connections() for h in net] == [1, 1, 0, 0], 'one connection a host, however many kernels'
            net[0].cut()
            assert app.stdout.readline() == 'given up\n'
            net[0].heal()
            app.stdin.write('\n'); app.stdin.flush()
            assert app.stdout.readline() == 'count\n'
            counts = [h.connections() for h in net]
            app.stdin.write('\n'); app.stdin.flush()
            out, _ = app.communicate(timeout=60)
        finally:
            app.kill(); app.wait()
            source.kill(); source.wait(); source.stdout.close()
    res = json.loads(out)
    print(json.dumps(res), f"ratio to ssh -L: {res['mib_s']/res['openssh_mib_s']:.2f}", counts)
    assert res['output'] == 200*100_001
    assert res['interrupt_s'] < 3*slowness()
    assert res['restarted'] == [True, False]
    assert res['after the cut'] == [42, True] and res['others'] == [42]*3
    assert res['noticed_s'] < 10*slowness()
    assert res['mib_s'] > 0.5*res['openssh_mib_s']
    assert counts[1] == 1

# Ways to a host

def only_from(host, other):
    "Let `host` answer `other` only"
    host.ns.nft(
        f'''table inet fw {{ chain input {{ type filter hook input priority 0; policy drop; iifname "lo" accept;
        meta l4proto 58 accept;
        ct state established,related accept; ip saddr {other.address} tcp dport 22 accept; }}
    }}\n''')

WHENCE = '__import__("os").environ["SSH_CONNECTION"].split()[0]'

@pytest.fixture
def far(net):
    "node3, which can be reached from node2 only, which can be reached from node1 only"
    only_from(net[2], net[1]); only_from(net[1], net[0])
    c = net.client
    yield lambda **options: c.alias('far', HostName=net[2].address, User='root', IdentityFile=c.key,
                                    UserKnownHostsFile=c.known_hosts, **options)
    for o in 'far', 'behind':
        if o in c.aliases: del c.aliases[o]
    c.write()

async def test_two_jump_hosts(remote, net, far):
    "Everything goes over one connection to each host on the way, restarts, interrupts and other kernels included"
    far(ProxyJump='node1,node2')
    for h in net: h.drop()   # a host that was cut off keeps a connection for a while after the other side gave it up
    with pytest.raises(LaunchError, match='no answer'):
        async with remote.on('node3', config=dict(connect_timeout=1)): pass
    with net.nothing_left(15, [r'/\.ipython/', r'/\.cache/', r'/__pycache__/']):
        async with remote.on('far') as (km, kc), remote.on('far') as (_, other):
            assert await value(kc, WHENCE) == net[1].address
            assert [h.connections() for h in net] == [1, 1, 1, 0]
            assert km.get_connection_info()['ip'] == '127.0.0.1', 'a host behind another is tunnelled to'
            await interrupt(km, kc, 'import time; time.sleep(1000)')
            await km.restart_kernel()
            await kc.wait_for_ready(timeout=60)
            net[1].drop()
            assert [await after_a_break(o, '6*7') for o in (kc, other)] == [42, 42]

async def test_jump_hosts_that_jump(remote, net, far):
    "The chain is spread over the configuration: far is behind node2, which is behind node1"
    c = net.client
    c.alias('behind', HostName=net[1].address, User='root', IdentityFile=c.key, UserKnownHostsFile=c.known_hosts,
            ProxyJump='node1')
    far(ProxyJump='behind')
    async with remote.on('far') as (_, kc): assert await value(kc, WHENCE) == net[1].address

async def test_a_jump_host_that_is_down(remote, net, far):
    far(ProxyJump='node1,node2')
    net[0].stop()
    with pytest.raises(LaunchError, match='host far .*nothing listens'):
        async with remote.on('far'): pass
    async with remote.on('far', 'node4') as (km, _): assert str(km.provisioner.conn.host) == 'node4'

async def test_a_jump_host_that_comes_no_further(remote, net, far):
    far(ProxyJump='node1,node2')
    net[2].stop()
    with pytest.raises(LaunchError,
                       match=f'host far .*cannot connect to {net[2].address} port .*: the jump host {net[1].address} '
                             f'says: '):
        async with remote.on('far'): pass

async def test_proxy_command(remote, net, far):
    "OpenSSH's own client carries the bytes, in a chain of its own"
    far(ProxyCommand=f'ssh -F {net.client.config} -J node1 -W %h:%p node2')
    async with remote.on('far') as (km, kc):
        assert await value(kc, WHENCE) == net[1].address
        net[0].drop()
        assert await after_a_break(kc, '6*7') == 42
    await asyncio.to_thread(forget)
    wait(lambda: not [h for h in net if h.connections()], what='the proxy command ended')

# Direct where that works

AUTO = dict(tunneling_enabled='auto')

def way_of(km): return 'direct' if km.get_connection_info()['ip'] != '127.0.0.1' else 'tunnel'

def asked_of(p):
    """What the connection of a provisioner is asked to find out: the ports that kernels may have, and where launchers
    report"""
    lowest, highest = map(int, p.port_range.split('..'))
    return (lowest, highest) if lowest < highest else None, p.response_ip

async def found(km):
    "Why kernels' ports on the host of this kernel cannot be reached, once that is known"
    p = km.provisioner
    async def ask(): return await p.conn.port_finding(*asked_of(p))
    return await asyncio.wait_for(background().run(ask()), 60)

async def way_found(remote, *hosts, **config):
    "The way to a second kernel, when what stands in the way to the first is known; and that"
    async with remote.on(*hosts, config=AUTO | config) as (km, kc):
        assert await value(kc, '6*7') == 42
        why = await found(km)
        async with remote.on(*hosts, config=AUTO | config) as (other, client):
            assert await value(client, '6*7') == 42
            return way_of(other), why

def filtered(host, verdict):
    "Let the host do this with packets to TCP ports other than 22"
    host.ns.nft(f'table inet fw {{ chain input {{ type filter hook input priority 0; '
                f'ct state established,related accept; iifname "lo" accept; '
                f'tcp dport 22 accept; meta l4proto tcp {verdict}; }}\n}}\n')

@pytest.mark.parametrize('verdict, why', [('drop', 'timed out'), ('reject with tcp reset', 'connection refused'),
    ('reject with icmpx type admin-prohibited', 'no route to host')], ids=['dropped', 'reset', 'prohibited'])
async def test_auto_behind_a_firewall(remote, net, caplog, verdict, why):
    caplog.set_level('INFO')
    filtered(net[0], verdict)
    with remote.nothing_left(): assert await way_found(remote, 'node1') == ('tunnel', why)
    assert f'host node1: kernel ports cannot be reached ({why}), so connections go through SSH' in caplog.text

async def test_auto_without_a_firewall(remote, net):
    with remote.nothing_left(): assert await way_found(remote, 'node1') == ('direct', '')

async def test_auto_tries_the_ports_that_kernels_get(remote, net):
    "A firewall lets the ports of a range pass, and no others"
    net[0].firewall((22, '41000-42000'))
    assert await way_found(remote, 'node1', port_range='41000..42000') == ('direct', '')
    assert await way_found(remote, 'node1', port_range='43000..44000') == ('tunnel', 'timed out')
    assert await way_found(remote, 'node1') == ('tunnel', 'timed out')

ECHO = """import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self): self.wfile.write(self.rfile.readline())
print('there', flush=True)
socketserver.ThreadingTCPServer(('', 7777), Echo).serve_forever()"""

@pytest.fixture
def front(net):
    "node2, whose port 22 leads to node1: what answers on all of its other ports is not node1"
    c, ns = net.client, net[1].ns
    ns.run('sh', '-c', 'echo 1 > /proc/sys/net/ipv4/ip_forward')
    ns.nft(f"""table ip gw {{
        chain pre {{ type nat hook prerouting priority -100; tcp dport 22 dnat to {net[0].address};
                     meta l4proto tcp redirect to :7777; }}
        chain post {{ type nat hook postrouting priority 100; ip daddr {net[0].address} masquerade; }}
    }}\n""")
    echo = ns.popen(sys.executable, '-c', ECHO, stdout=subprocess.PIPE)
    assert echo.stdout.readline() == b'there\n'
    c.alias('front', HostName=net[1].address, HostKeyAlias=net[0].address, User='root', IdentityFile=c.key,
            UserKnownHostsFile=c.known_hosts)
    yield
    echo.kill(); echo.wait(); echo.stdout.close()
    del c.aliases['front']
    c.write()

async def test_auto_where_another_machine_answers(remote, net, front):
    assert await way_found(remote, 'front') == ('tunnel', f'another machine answers at {net[1].address}')

BEHIND_NAT = """import asyncio, json, os, sys
from kernels import forget, value
from laptop import kernel_on
async def main():
    ways = []
    for _ in range(2):
        async with kernel_on('node1') as (km, kc):
            p = km.provisioner
            assert await value(kc, '6*7') == 42
            ways.append(km.get_connection_info()['ip'])
            why = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ask(p), background().loop))
    print(json.dumps([ways[1], why]))
async def ask(p): return await p.conn.port_finding(None, p.response_ip)
from gateway_provisioners_ssh.background import background
asyncio.run(main())
forget()"""

@pytest.mark.parametrize('ports, why', [((22,), 'timed out'), (None, '')], ids=['to port 22 only', 'to all ports'])
def test_auto_behind_nat(remote, net, ports, why):
    env = net.client.environ() | {k: v for k, v in os.environ.items()
                                  if k.startswith(('JUPYTER', 'IPYTHON', 'KERNEL_'))}
    env |= dict(PATH=os.environ['PATH'], PYTHONPATH=str(HERE), GP_ENABLE_TUNNELING='auto')
    app = net.laptop(ports).popen(sys.executable, '-c', BEHIND_NAT, env=env, stdout=subprocess.PIPE, text=True)
    assert json.loads(app.communicate(timeout=120)[0]) == ['127.0.0.1' if why else net[0].address, why]

async def test_auto_after_a_reconnection(remote, net):
    """What was found holds for one connection: the next may be in another network. Kernels keep their way, also when
    restarted, unless their ports are known to be out of reach by then"""
    async with remote.on('node1', config=AUTO | dict(connect_timeout=2)) as (km, kc):
        assert await found(km) == ''
        async with remote.on('node1', config=AUTO | dict(connect_timeout=2)) as (direct, _):
            assert way_of(direct) == 'direct'
            filtered(net[0], 'reject with tcp reset')
            net[0].drop()
            assert await found_again(direct) == 'connection refused'
            async with remote.on('node1', config=AUTO | dict(connect_timeout=2)) as (tunnelled, client):
                assert (way_of(tunnelled), way_of(direct)) == ('tunnel', 'direct')
                net[0].no_firewall()
                net[0].drop()
                assert await found_again(direct) == ''
                for o in tunnelled, direct: await o.restart_kernel(now=True)
                assert (way_of(tunnelled), way_of(direct)) == ('tunnel', 'direct')
                await client.wait_for_ready(timeout=60)
                assert await value(client, '6*7') == 42
            filtered(net[0], 'reject with tcp reset')
            net[0].drop()
            assert await found_again(direct) == 'connection refused'
            await direct.restart_kernel(now=True)
            assert way_of(direct) == 'tunnel'
            async with client_of(direct) as client: assert await value(client, '6*7') == 42

async def found_again(km):
    "The same as `found`, over the next connection"
    p = km.provisioner
    async def ask(old):
        await until(lambda: p.conn.port_findings.get(asked_of(p)) is not old and p.conn.is_up, 60)
        return await p.conn.port_finding(*asked_of(p))
    return await asyncio.wait_for(background().run(ask(p.conn.port_findings[asked_of(p)])), 60)

async def test_auto_does_not_delay_the_first_start(remote, net, monkeypatch):
    "Behind a firewall that drops packets the first kernel is there while it is still being tried"
    monkeypatch.setattr(ssh, 'why_unreachable', functools.partial(ssh.why_unreachable, timeout=120))
    filtered(net[0], 'drop')
    async with remote.on('node1', config=AUTO) as (km, kc):
        p = km.provisioner
        assert not p.conn.port_findings[asked_of(p)].done()
        assert way_of(km) == 'tunnel' and await value(kc, '6*7') == 42

async def test_check_says_whether_ports_can_be_reached(net):
    "A firewall in the way is a fault of the host only where there is to be no tunnel"
    filtered(net[0], 'reject with tcp reset')
    async def said(host, way):
        config = Config(DistributedProvisioner=dict(tunneling_enabled=way))
        async with site([host], config, python=sys.executable) as s: report, = await check(s)
        return [(o.state, o.text) for o in report.findings if o.what in ('kernel ports', 'tunnel')]
    refused = 'cannot be reached (connection refused)'
    assert await said('node1', 'auto') == [('ok', refused + ', so connections go through SSH'), ('ok', 'ok')]
    assert await said('node1', False) == [('failed', refused)]
    assert await said('node1', True) == [('ok', 'ok')]
    assert await said('node2', 'auto') == await said('node2', False) == [('ok', 'can be reached')]

async def test_auto_behind_a_jump_host(remote, net, far):
    far(ProxyJump='node1,node2')
    async with remote.on('far', config=AUTO) as (km, kc):
        assert way_of(km) == 'tunnel' and list(km.provisioner.conn.port_findings.values()) == [None]
        assert await value(kc, WHENCE) == net[1].address

# Ways in

@pytest.fixture
def agent(tmp_path_factory):
    "A running ssh-agent: its socket, and a function that adds a key with a passphrase"
    sock = tmp_path_factory.mktemp('agent')/'socket'
    p = subprocess.Popen(['ssh-agent', '-D', '-a', sock], stdout=subprocess.DEVNULL)
    def add(key, passphrase):
        (ask := sock.with_name('ask')).write_text(f'#!/bin/sh\necho {passphrase}\n')
        ask.chmod(0o700)
        sh('ssh-add', key, env=os.environ | dict(SSH_AUTH_SOCK=str(sock), SSH_ASKPASS=str(ask),
                                                 SSH_ASKPASS_REQUIRE='force'))
    wait(sock.exists)
    yield sock, add
    p.kill(); p.wait()

@pytest.fixture
def alias(net):
    "Define aliases of node4 for one test, without a key of their own"
    made, base = [], dict(HostName=net[3].address, UserKnownHostsFile=net.client.known_hosts)
    def make(name, **options):
        made.append(name)
        net.client.alias(name, **base, **options)
        return name
    yield make
    for o in made: del net.client.aliases[o]
    net.client.write()

def locked_key(net, user, passphrase):
    "A key with a passphrase, which lets `user` of node4 in, and no other key does"
    key = net.client.ssh/f'locked-{user}'
    sh('ssh-keygen', '-q', '-t', 'ed25519', '-N', passphrase, '-C', user, '-f', key)
    net[3].add_user(user, key=False)
    (f := net[3].keys/user).write_text(key.with_suffix('.pub').read_text())
    f.chmod(0o644)
    return key

WHO = '__import__("getpass").getuser()'

async def test_key_with_a_passphrase_in_an_agent(remote, net, alias, agent, monkeypatch):
    key, (sock, add) = locked_key(net, 'grace', 'correct horse'), agent
    name = alias('locked', User='grace', IdentityFile=key)
    with pytest.raises(LaunchError, match='protected by a passphrase.*ssh-add'):
        async with remote.on(name): pass
    add(key, "'correct horse'")
    monkeypatch.setenv('SSH_AUTH_SOCK', str(sock))
    await asyncio.to_thread(forget)
    for options in dict(), dict(IdentitiesOnly='yes'):
        async with remote.on(alias('locked-'+'only'*len(options), User='grace', IdentityFile=key, **options)) as (_,
            kc):
            assert await value(kc, WHO) == 'grace'
    with pytest.raises(LaunchError, match='refused the login|no key'):   # the agent's key is not the one named
        async with remote.on(alias('other', User='grace', IdentityFile=net.client.key, IdentitiesOnly='yes')): pass
    monkeypatch.delenv('SSH_AUTH_SOCK')
    async with remote.on(alias('named', User='grace', IdentityAgent=sock)) as (_, kc):
        assert await value(kc, WHO) == 'grace'

@pytest.mark.parametrize('options',
                         [dict(UsePAM='no'), dict(UsePAM='yes'),
                          dict(UsePAM='yes', PasswordAuthentication='no', KbdInteractiveAuthentication='yes')],
                         ids=['password', 'PAM', 'keyboard-interactive'])
async def test_password(remote, net, alias, monkeypatch, caplog, options):
    host, password = net[3], 'sesame & "open" $HOME'
    if (user := f'pat{len(options)}') not in host.users: host.add_user(user, password=password, key=False)
    host.options = options
    host.restart_sshd()
    try:
        name = alias(f'by-{user}', User=user)
        monkeypatch.setenv('GP_REMOTE_PWD', password)
        async with remote.on(name) as (_, kc): assert await value(kc, WHO) == user
        monkeypatch.setenv('GP_REMOTE_PWD', 'sesame, close')
        await asyncio.to_thread(forget)
        with pytest.raises(LaunchError, match='refused the login') as e:
            async with remote.on(name): pass
        assert 'sesame' not in str(e.value)+caplog.text
    finally: host.options = {}; host.restart_sshd()

# Kerberos

KRB5 = '''[libdefaults]
 default_realm = HOSTS.TEST
 dns_lookup_kdc = false
 dns_canonicalize_hostname = false
 rdns = false
[realms]
 HOSTS.TEST = {{
  kdc = 127.0.0.1:{port}
 }}
'''
KDC = '''[kdcdefaults]
 kdc_ports = {port}
 kdc_tcp_ports = {port}
[realms]
 HOSTS.TEST = {{
  database_name = {dir}/principal
  key_stash_file = {dir}/stash
  max_life = 1h
 }}
'''

class Realm:
    "A Kerberos realm with a key distribution centre on this machine; `env` is what its clients need"
    def __init__(self, dir):
        self.dir = dir
        self.env = dict(KRB5_CONFIG=str(dir/'krb5.conf'), KRB5CCNAME=f'FILE:{dir}/tickets')
        self.log = open(dir/'kdc.log', 'w')
        while not self.start(): pass

    def start(self):
        "Start the centre on a port that was free a moment ago; false if another process was quicker to take it"
        with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
        for f, text in ('krb5.conf', KRB5), ('kdc.conf', KDC):
            (self.dir/f).write_text(text.format(dir=self.dir, port=port))
        if not (self.dir/'principal').exists(): self.run('kdb5_util', 'create', '-s', '-P', 'master')
        self.kdc = subprocess.Popen([shutil.which('krb5kdc', path=SBIN), '-n'], env=self.all, stdout=self.log,
                                    stderr=self.log)
        def listening():
            with contextlib.suppress(psutil.Error):
                return any(c.laddr.port == port for c in psutil.Process(self.kdc.pid).net_connections('tcp')
                           if c.status == 'LISTEN')
        wait(lambda: self.kdc.poll() is not None or listening(), 20, 'KDC')
        if (ended := self.kdc.poll()) is not None and 'in use' not in (said := (self.dir/'kdc.log').read_text()):
            raise RuntimeError(said)
        return ended is None

    @property
    def all(self): return os.environ | self.env | dict(KRB5_KDC_PROFILE=str(self.dir/'kdc.conf'), PATH=SBIN)
    def run(self, *argv, **kw): return sh(*argv, env=self.all, **kw)
    def user(self, name, password): self.run('kadmin.local', 'addprinc', '-pw', password, name)
    def host(self, address):
        "The file with the keys of an SSH server"
        self.run('kadmin.local', 'addprinc', '-randkey', f'host/{address}')
        self.run('kadmin.local', 'ktadd', '-k', self.dir/'keytab', f'host/{address}')
        return str(self.dir/'keytab')
    def close(self): self.kdc.kill(); self.kdc.wait(); self.log.close()

TICKET_KERNEL = '''
import asyncio, sys
from jupyter_client import AsyncKernelManager
async def main():
    km = AsyncKernelManager(kernel_name=sys.argv[1])
    try: await km.start_kernel()
    except Exception as e: return print('refused:', e)
    kc = km.client()
    kc.start_channels()
    await kc.wait_for_ready(timeout=60)
    reply = await kc.execute_interactive('', user_expressions=dict(v='__import__("getpass").getuser()'), silent=True,
        timeout=30)
    print('runs as', reply['content']['user_expressions']['v']['data']['text/plain'])
    kc.stop_channels()
    await km.shutdown_kernel()
asyncio.run(main())
'''

def test_kerberos(remote, net, alias, tmp_path, monkeypatch):
    """A ticket is all there is to log in with; in an environment with the extra `gssapi`, since paramiko 5 has none of
    it"""
    python = Path(sys.prefix)/'gssapi/bin/python'
    need(None if python.exists()
         else f'no environment with the extra gssapi in {python.parents[1]} (scripts/test.sh makes it)')
    need(None if shutil.which('krb5kdc', path=SBIN) and shutil.which('kinit')
         else 'not installed: krb5kdc, kinit (Debian packages krb5-kdc, krb5-user)')
    host, realm = net[3], Realm(tmp_path)
    try:
        if 'lise' not in host.users: host.add_user('lise', key=False)
        realm.user('lise', 'fission')
        monkeypatch.setenv('KRB5_KTNAME', realm.host(host.address))
        monkeypatch.setenv('KRB5_CONFIG', realm.env['KRB5_CONFIG'])
        host.options = dict(GSSAPIAuthentication='yes', GSSAPIStrictAcceptorCheck='no', PasswordAuthentication='no',
                            PubkeyAuthentication='no')
        host.restart_sshd()
        name = remote.spec('ticket', hosts=[alias('by-ticket', User='lise')])
        start = lambda **env: sh(python, '-c', TICKET_KERNEL, name,
                                 env=os.environ | realm.env | dict(GP_REMOTE_GSS_SSH='True') | env, timeout=120)
        with net.nothing_left(15, [r'/\.ipython/', r'/\.cache/', r'/__pycache__/']):
            assert start().startswith('refused: host by-ticket (user lise)')
            realm.run('kinit', 'lise', input='fission\n')
            assert start() == "runs as 'lise'\n"
            assert 'Accepted gssapi-with-mic for lise' in host.log()
            assert start(GP_REMOTE_GSS_SSH='False').startswith('refused: host by-ticket (user lise)')
    finally:
        host.options = {}
        host.restart_sshd()
        realm.close()

async def test_kerberos_without_the_extra(remote, net):
    import paramiko
    if int(paramiko.__version__.split('.')[0]) < 5: pytest.skip('this paramiko has GSSAPI')
    with pytest.raises(LaunchError, match=r'no GSSAPI; install gateway_provisioners_ssh\[gssapi\]'):
        async with remote.on('node4', config=dict(gss_auth=True)): pass

# Why a start failed

@pytest.fixture
def ned(net, remote, tmp_path_factory):
    "A login of node1 that is nobody special, and can read the kernelspec; a function that gives it another login shell"
    node, passwd = net['node1'], net['node1'].dir/'passwd'
    for o in (tmp_path_factory.getbasetemp(), remote.prefix): o.chmod(0o755)
    if 'ned' not in node.users: node.add_user('ned')
    need(node.run('sh', '-c',
                  f'test -x {sys.executable} -a -r {remote.scripts} || echo other users cannot read {sys.prefix}',
                  user='ned').strip())
    def shell(path): passwd.write_text(re.sub(r'(?m)^(ned:.*:)[^:\n]*$', rf'\1{path}', passwd.read_text()))
    remote.spec('ned', hosts=['ned@node1'])
    yield SimpleNamespace(node=node, home=node.dir/'homes/ned', shell=shell)
    shell('/bin/sh')

async def why(remote, name='ned'):
    "What the start of that kernel fails with"
    with pytest.raises(LaunchError) as e: await remote.manager(name).start_kernel()
    return str(e.value)

@pytest.mark.parametrize('path', ['/bin/false', '/usr/sbin/nologin'])
async def test_a_login_shell_that_runs_no_commands(remote, ned, path):
    ned.shell(path)
    said = await why(remote)
    assert re.search(r'See what this says: ssh ned@\S+ /bin/sh', said), said
    assert ('account is currently not available' if 'nologin' in path else 'as /bin/false is') in said

async def test_a_log_that_may_not_be_written(remote, ned):
    mode = ned.node.tmp.stat().st_mode & 0o7777
    ned.node.tmp.chmod(0o755)
    try: said = await why(remote)
    finally: ned.node.tmp.chmod(mode)
    assert 'cannot write the log' in said and 'Permission denied' in said and 'GP_KERNEL_LOG_DIR' in said, said

@pytest.mark.parametrize('where', ['home', 'script'])
async def test_what_need_not_be_written_or_read_on_the_host(remote, ned, where):
    "A home that is read-only; a kernelspec that only the host application's user may read"
    path = dict(home=ned.home, script=remote.scripts/'launch_ipykernel.py')[where]
    mode = path.stat().st_mode & 0o7777
    path.chmod(dict(home=0o555, script=0o600)[where])
    try:
        async with remote.kernel('ned') as (km, kc): assert await value(kc, '6*7') == 42
    finally: path.chmod(mode)

FLOODED = """
import os, select, socket, sys
from server_listener import Arguments, LaunchContext, LauncherError, exit_with, report_by_network
launch = LaunchContext(Arguments('A launcher whose connection is one of too many').parse_known_args()[0])
first = socket.create_connection(launch.peer)
flood = [socket.create_connection(launch.peer) for _ in range(600)]
select.select([first], [], [])
socket.create_connection = lambda *args: first
try: report_by_network(launch.ticket, launch.kernel_id, launch.peer, {})
except LauncherError as e: exit_with(e)
"""

async def test_a_flood_is_not_taken_for_a_firewall(remote, net, monkeypatch):
    "A launch whose report was dropped for newer connections says so"
    monkeypatch.setenv('GP_RESPONSE_IP', net.address)   # by the network
    (remote.scripts/'flooded.py').write_text(FLOODED)
    remote.spec('flooded', lambda argv: [argv[0], *(o.replace('launch_ipykernel', 'flooded') for o in argv[1:])],
                hosts=['node1'])
    said = await why(remote, 'flooded')
    assert (re.search(r'The response port was flooded: \d+ connections were dropped', said)
            and 'firewall' not in said.splitlines()[1]), said
