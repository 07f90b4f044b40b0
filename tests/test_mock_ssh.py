"Mock SSH hosts under load, under abuse, and after they have gone."
import asyncio, gc, hashlib, logging, os, random, shlex, shutil, socket, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import paramiko, pytest
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.mock_ssh import MockHost, MockHosts
from pace import Timer, slowness, wait

logging.getLogger('paramiko').setLevel(logging.CRITICAL)
MB = 1 << 20

def run(client, command, data=b''):
    "Standard output, standard error, status."
    chan = client.get_transport().open_session()
    chan.exec_command(command)
    def write():
        try:
            for i in range(0, len(data), MB//4): chan.sendall(data[i:i+MB//4])
            chan.shutdown_write()
        except (OSError, EOFError): pass  # the command has ended
    threading.Thread(target=write, daemon=True).start()
    err = []
    reader = threading.Thread(target=lambda: err.append(chan.makefile_stderr('rb').read()))
    reader.start()
    out = chan.makefile('rb').read()
    reader.join()
    status = chan.recv_exit_status()
    chan.close()
    return out, err[0], status

def fds(): return len(os.listdir('/proc/self/fd'))
def mine(): return sorted(o.name for o in threading.enumerate() if o.name.startswith('mock-ssh'))

def settled(cond, before):
    "Wait for `cond`, which compares threads and descriptors with `before`."
    try: wait(cond, 20)
    except TimeoutError: raise AssertionError((threading.active_count(), fds(), before)) from None

@pytest.fixture
def host():
    with MockHost() as host: yield host

@pytest.fixture
def conn(host):
    with host.client() as conn: yield conn

def test_bytes_arrive_whole(conn):
    data = random.randbytes(8*MB)
    for command, i in ('cat', 0), ('cat >&2', 1):
        res = run(conn, command, data)
        assert (res[i] == data, res[1-i], res[2]) == (True, b'', 0)

def test_early_exit_keeps_output(conn):
    "A command that ends without reading its input still has its say, and a conn that writes on is not cut off."
    for _ in range(20):
        out, _, status = run(conn, 'head -c 10; echo end; exit 7', b'x'*MB)
        assert (out, status) == (b'x'*10 + b'end\n', 7)

def test_status_before_holder_ends(conn):
    """As with sshd: the status comes when the command ends, the end of the channel when the last holder of its output
    has ended."""
    chan = conn.get_transport().open_session()
    holder = 5*slowness()   # seconds; the status comes long before that
    t = Timer()
    chan.exec_command(f'sleep {holder} & echo started; exit 4')
    assert chan.recv_exit_status() == 4 and float(t) < .8*holder
    assert (chan.makefile('rb').read(), chan.closed or t > .9*holder) == (b'started\n', True)

def test_login(host, conn, monkeypatch):
    monkeypatch.setenv('SECRET_OF_THE_SERVER', 'x')
    chan = conn.get_transport().open_session()
    chan.update_environment({'LC_TIME': 'C'})
    chan.update_environment({'LD_PRELOAD': '/x'})  # answered with a refusal, which paramiko does not wait for
    out, _, _ = run(conn, 'env; pwd; ps -o sid= -o pgid= -o pid= -p $$')
    lines = out.decode().splitlines()
    env = dict(o.split('=', 1) for o in lines if '=' in o)
    peer = conn.get_transport().sock.getsockname()
    assert env['SSH_CONNECTION'] == f'{peer[0]} {peer[1]} 127.0.0.1 {host.port}'
    assert (env['HOME'], env['USER'], lines[-2]) == (host.home, host.user, host.home)
    assert 'SECRET_OF_THE_SERVER' not in env and len(set(lines[-1].split())) == 1
    assert run(conn, 'python -c "import sys; print(sys.prefix)"')[0].decode().strip() == sys.prefix

def test_login_shell(conn):
    chan = conn.invoke_shell  # needs a terminal, which is refused
    with pytest.raises(paramiko.SSHException): chan()
    chan = conn.get_transport().open_session()
    chan.invoke_shell()
    chan.sendall(b'echo $0; exit 5\n')
    assert (chan.makefile('rb').read(), chan.recv_exit_status()) == (b'-sh\n', 5)

def test_rekey_under_load(conn):
    "Keys change in the middle of traffic in both directions, and again."
    data, tr = random.randbytes(24*MB), conn.get_transport()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, conn, 'cat', data)
        for _ in range(5):
            time.sleep(.05)
            tr.renegotiate_keys()
        assert job.result(60)[0] == data

def test_freeze_loses_nothing(host, conn):
    data = random.randbytes(16*MB)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, conn, 'cat', data)
        for _ in range(5):
            time.sleep(.02)
            host.freeze()
            time.sleep(.1)
            host.thaw()
        assert job.result(60)[0] == data

def test_frozen_host_does_not_hold_others():
    with MockHosts(2) as hosts, hosts[0].client() as a, hosts[1].client() as b:
        hosts[0].freeze()
        chan = threading.Thread(target=run, args=(a, 'cat; yes | head -c 10000000', b'x'*4*MB), daemon=True)
        chan.start()
        t = Timer()
        for _ in range(10): assert run(b, 'echo hi')[0] == b'hi\n'
        assert t < 15 and chan.is_alive()
        hosts[0].thaw()
        chan.join(30)
        assert not chan.is_alive()

def test_latency_is_not_bandwidth(host, conn):
    "Bursts are delayed side by side: much data takes hardly longer than little."
    host.delay(.1)
    def seconds():
        t = Timer()
        assert len(run(conn, 'head -c 4000000 /dev/zero')[0]) == 4000000
        return float(t)
    assert .5 < min(seconds() for _ in range(3)) < 4*slowness()

def test_hung_and_frozen_arrivals_are_served_later(host):
    for stop, go in (host.hang, host.accept), (host.freeze, host.thaw):
        stop()
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(host.client, timeout=10)
            time.sleep(.2)
            assert not job.done()
            go()
            with job.result(10) as client: assert run(client, 'echo hi')[0] == b'hi\n'

def test_startups(host):
    "Ten strangers may knock; the next is sent away; who has logged in does not count."
    with host.client(), host.client():
        knocking = [socket.create_connection((host.address, host.port)) for _ in range(10)]
        wait(lambda: host.connections == 12, 20)
        with socket.create_connection((host.address, host.port)) as sock:
            assert sock.makefile('rb').read() == b'Exceeded MaxStartups\r\n'
        for o in knocking: o.close()
        wait(lambda: host.connections == 2, 20)
        assert host.seen['dropped startups'] == 1

def test_who_may_log_in():
    with MockHost(users={'ada'}, password='pw', user='ada') as host:
        with host.client(), host.client(pkey=None, password='pw'): pass
        for kw in dict(username='bob'), dict(pkey=None, password='no'), dict(pkey=MockHost().client_key):
            with pytest.raises(paramiko.AuthenticationException): host.client(**kw)
        assert 'pw' not in repr(host)

def test_forwarding_switched_off():
    with MockHost(forwarding=False) as host, host.client() as client:
        with pytest.raises(paramiko.ChannelException, match='prohibited'):
            client.get_transport().open_channel('direct-tcpip', ('127.0.0.1', 9), ('', 0))
        with pytest.raises(paramiko.SSHException): client.get_transport().request_port_forward('', 0)

def test_forwards_go_with_their_connection(host):
    client = host.client()
    ports = [client.get_transport().request_port_forward('', 0) for _ in range(3)]
    client.get_transport().cancel_port_forward('', ports[0])
    with pytest.raises(ConnectionRefusedError): socket.create_connection(('127.0.0.1', ports[0]))
    with socket.create_connection(('127.0.0.1', ports[1])): pass
    with pytest.raises(paramiko.SSHException): client.get_transport().request_port_forward('', ports[2])
    host.drop()
    wait(lambda: not host.connections, 20)
    for o in ports[1:]:
        with pytest.raises(ConnectionRefusedError): socket.create_connection(('127.0.0.1', o))

def sink(n):
    "A TCP server that answers each connection with its hash once it has read to its end; its port."
    server = socket.create_server(('127.0.0.1', 0))
    def serve():
        with server:
            for _ in range(n):
                conn, _ = server.accept()
                with conn:
                    conn.sendall(hashlib.file_digest(conn.makefile('rb'), 'sha256').digest()
                    if sys.version_info >= (3, 11)
                    else hashlib.sha256(conn.makefile('rb').read()).digest())
    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]

def test_forward_throughput(conn):
    "Not a benchmark: it says that nothing crawls. A half-close passes through."
    data, tr = random.randbytes(32*MB), conn.get_transport()
    want = hashlib.sha256(data).digest()
    chan = tr.open_channel('direct-tcpip', ('127.0.0.1', sink(1)), ('', 0))
    t = Timer()
    for i in range(0, len(data), MB//4): chan.sendall(data[i:i+MB//4])
    chan.shutdown_write()
    assert chan.makefile('rb').read() == want
    print(f'-L {32/float(t):.0f} MB/s')
    port, t = tr.request_port_forward('', 0), Timer()
    near = socket.create_connection(('127.0.0.1', port))
    far = tr.accept(5)
    def send():
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
    assert hashlib.sha256(far.makefile('rb').read()).digest() == want
    print(f'-R {32/float(t):.0f} MB/s')
    assert t < 20
    near.close()

def test_200_sessions_on_20_hosts():
    "One thread a connection and that of the background loop for all the rest, whatever runs through them."
    background()
    before = threading.active_count(), fds()
    with MockHosts(20) as hosts, ThreadPoolExecutor(20) as pool:
        clients = list(pool.map(lambda h: h.client(timeout=30), hosts))
        base, base_fds = mine(), fds()
        def start(i):
            files = clients[i%20].exec_command('echo $$; exec cat')
            return files, int(files[1].readline())
        begun = list(pool.map(start, range(200)))
        assert (len(base), len(mine())) == (20, 20), mine()
        assert [o.name for o in threading.enumerate() if o.name.startswith('gpssh')] == ['gpssh-background']
        assert {o.channels for o in hosts} == {10} and sum(len(o.processes()) for o in hosts) == 200
        print(f'{len(mine())} threads and {(fds()-base_fds)/200} descriptors a session on the hosts\' side')
        cpu, t = time.process_time(), Timer()
        time.sleep(2)
        print(f'idle: {100*(time.process_time()-cpu)/float(t):.1f}% of a core, the 20 plain clients included')
        with pytest.raises(paramiko.ChannelException): clients[3].get_transport().open_session()
        for o in clients: o.close()
        wait(lambda: not any(o.processes() for o in hosts), 20)  # they read the end of their input
    gc.collect()
    settled(lambda: (threading.active_count(), fds()) <= before, before)

def test_stop_finds_everything(tmp_path):
    """Daemons, grandchildren in sessions of their own, processes that fork while they are hunted, and without an
    environment."""
    with MockHost() as host, host.client() as client:
        for cmd in ('setsid sh -c "setsid sleep 300 & sleep 300" >/dev/null 2>&1 & exit',
            'nohup sleep 300 >/dev/null 2>&1 &', 'while :; do sleep .001 & done >/dev/null 2>&1', 'env -i sleep 300',
            'trap "" TERM HUP INT; sleep 300 & wait', '''python -c "
import os, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
time.sleep(300)"'''):
            chan = client.get_transport().open_session()
            chan.exec_command(cmd)
        def six(): return sum('sleep 300' in o or 'sleep(300)' in o for o in host.processes().values()) >= 6
        wait(six, 20, 'six processes that sleep')
        home = host.home
    assert (host.processes(), Path(home).exists(), mine()) == ({}, False, [])

def test_power_off_and_back(host):
    with host.client() as client: client.exec_command('setsid sleep 300')
    wait(host.processes, 20)
    host.power_off()
    assert not host.processes()
    host.heal()
    with host.client() as client: assert run(client, 'echo back')[0] == b'back\n'

def test_host_within_a_host():
    "A mock host that is started through a mock host goes with it."
    code = """
from gateway_provisioners_ssh.mock_ssh import *
import time
with MockHost() as host:
    _, out, _ = host.client().exec_command('setsid sleep 300 & echo ok; wait')
    print(out.readline(), flush=True)
    time.sleep(300)"""
    with MockHost(env=dict(PYTHONPATH=os.pathsep.join(sys.path))) as host, host.client() as client:
        _, out, err = client.exec_command(f'export TMPDIR=$HOME; exec python -c {shlex.quote(code)}')
        assert out.readline() == 'ok\n', err.read()
        assert any('sleep 300' in o for o in host.processes().values())
    assert not host.processes()

def test_nothing_leaks(tmp_path, monkeypatch):
    "A hundred lives of a host, each ended in the middle of things."
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    def life(i):
        with MockHost() as host:
            client = host.client()
            chan = client.get_transport().open_session()
            chan.exec_command('setsid sleep 300 & yes')
            port = client.get_transport().request_port_forward('', 0)
            near = socket.create_connection(('127.0.0.1', port))
            if i % 3 == 0: host.freeze()
            if i % 3 == 1: host.drop()
            if i % 2: client.close()
        near.close()
        client.close()
        return host
    for i in range(3): life(i)
    gc.collect()
    before, t = (threading.active_count(), fds()), Timer()
    for i in range(100): assert not life(i).processes()
    gc.collect()
    print(f'{10*float(t):.0f} ms a life')
    settled(lambda: (threading.active_count(), fds()) == before, before)
    assert list(tmp_path.iterdir()) == []

def test_drops_at_any_moment(host):
    "Connections cut while they connect, log in, start commands and talk."
    with host.client(): pass
    wait(lambda: not host.connections, 20)
    before = fds()
    def life(i):
        rnd = random.Random(i)
        try:
            with host.client() as client:
                for _ in range(10): run(client, 'cat; yes | head -c 100000', rnd.randbytes(rnd.randrange(100000)))
        except (paramiko.SSHException, OSError, EOFError): return 1
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(life, i) for i in range(40)]
        while not all(o.done() for o in jobs):
            time.sleep(random.random()*.1)
            host.drop()
        assert sum(o.result() or 0 for o in jobs) > 10
    with host.client() as client: assert run(client, 'echo well')[0] == b'well\n'
    wait(lambda: not (host.connections or host.sessions), 20)
    gc.collect()
    settled(lambda: fds() <= before, before)

async def test_async_and_concurrent():
    "Hosts start and stop side by side, without holding the loop."
    async def life(i):
        async with MockHosts(2, base=20+2*i) as hosts:
            def talk():
                with hosts[1].client() as client: return run(client, 'echo hi')[0]
            lives.extend(hosts)
            return await asyncio.to_thread(talk)
    lives = []
    assert await asyncio.gather(*(life(i) for i in range(5))) == [b'hi\n']*5
    assert ([o.connections for o in lives], mine()) == ([0]*10, [])

@pytest.mark.skipif(not shutil.which('ssh'), reason='no OpenSSH client here')
class TestOpenSSH:
    @pytest.fixture
    def hosts(self):
        with MockHosts(2) as hosts: yield hosts

    def ssh(self, hosts, *args, **kw):
        return subprocess.run(['ssh', '-F', str(hosts.config), '-o', 'GlobalKnownHostsFile=/dev/null', *args],
                              capture_output=True, timeout=30, **kw)

    def test_run(self, hosts):
        res = self.ssh(hosts, 'mock2', 'tr a-z A-Z; echo err >&2; exit 9', input=b'hello'*100000)
        assert (res.stdout, res.stderr, res.returncode) == (b'HELLO'*100000, b'err\n', 9)
        assert self.ssh(hosts, 'mock1', 'kill -TERM $$').returncode == 255

    def test_background_holder(self, hosts):
        t = Timer()
        assert self.ssh(hosts, 'mock1', 'sleep 1 & exit 3').returncode == 3
        assert t > .9

    def test_many_on_one_connection(self, hosts):
        "A control master: sessions side by side on one connection."
        path = hosts.dir/'ctl'
        master = subprocess.Popen(['ssh', '-F', hosts.config, '-o', 'GlobalKnownHostsFile=/dev/null', '-MNS', path,
                                   'mock1'])
        try:
            wait(path.exists, 20)
            with ThreadPoolExecutor(8) as pool:
                res = list(pool.map(lambda i: self.ssh(hosts, '-S', str(path), 'mock1', f'sleep .2; echo {i}').stdout,
                                    range(8)))
            assert res == [b'%d\n' % i for i in range(8)] and hosts[0].connections == 1
        finally:
            master.terminate()
            master.wait(10)

    def test_forwards_and_jump(self, hosts):
        "Of a socket in the file system, since a port that is free now may be another's when it is used."
        data, path = random.randbytes(4*MB), hosts.dir/'forward'
        proc = subprocess.Popen(['ssh', '-F', hosts.config, '-o', 'GlobalKnownHostsFile=/dev/null', '-o',
            'ExitOnForwardFailure=yes', '-J', 'mock2', '-NL', f'{path}:127.0.0.1:{sink(1)}', 'mock1'])
        try:
            wait(path.exists, 20)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert sock.makefile('rb').read() == hashlib.sha256(data).digest()
            assert [o.connections for o in hosts] == [1, 1]
        finally:
            proc.terminate()
            proc.wait(10)

    def test_wrong_key_is_noticed(self, hosts):
        hosts[0].wrong_key()
        res = self.ssh(hosts, 'mock1', 'echo no')
        hosts[0].heal()
        assert res.returncode == 255 and b'REMOTE HOST IDENTIFICATION HAS CHANGED' in res.stderr
