"""What keeps the cost of many hosts down, and must not cost anything else: links that die in silence are noticed by the
system, hosts are asked at a bounded pace, what was read once is read again when it changed. How much it costs is for
bench_scale.py to measure. `-s` shows how long things took."""
import asyncio, base64, hashlib, heapq, hmac, socket
from collections import Counter
from types import SimpleNamespace
import paramiko, psutil, pytest
from hypothesis import given, settings, strategies as st
from jupyter_client.kernelspec import KernelSpec
from traitlets.config import Config
from gateway_provisioners_ssh import hosts as hosts_mod, ssh
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.balance import backing_off_last
from gateway_provisioners_ssh.channels import NonblockingSocket
from gateway_provisioners_ssh.hosts import Host, Login, host_names, parse_hosts
from gateway_provisioners_ssh.liveness import Pace
from gateway_provisioners_ssh.provisioner import DistributedProvisioner
from gateway_provisioners_ssh.settings import SettingError
from gateway_provisioners_ssh.ssh import Pool
from kernels import value
from pace import Timer, until

# Links

async def link_of(remote, monkeypatch, caplog, what):
    "A kernel on node1 and its connection, which no heartbeat watches; `what` happens, and its end is waited for"
    monkeypatch.setattr(Pace, 'shortest', 10_000)
    async with remote.on('node1') as (km, kc):
        conn = km.provisioner.conn
        remote.lab[0].cut()
        t = Timer()
        what(conn)
        await until(lambda: not conn.is_up, 60, 'the link is given up')
        print(f'{what.__name__}: given up after {float(t):.1f} s')
        assert await km.is_alive() and 'host node1 does not answer' in caplog.text
        remote.lab[0].heal()
        assert await value(kc, '6*7') == 42
        await until(lambda: conn.is_up, 60, 'connected again')

def nothing(conn): pass
def a_request(conn): background().loop.call_soon_threadsafe(conn.agent.heartbeat, 60)

@pytest.mark.parametrize('what', [nothing, a_request], ids=lambda o: o.__name__)
async def test_the_system_notices_a_dead_link(net_remote, net, monkeypatch, caplog, what):
    "Whether nothing is under way or something that is never acknowledged; no answer is ever asked for"
    await link_of(net_remote, monkeypatch, caplog, what)

async def test_a_frozen_host_is_noticed_by_heartbeats(fresh_remote, monkeypatch, caplog):
    "Its TCP goes on answering"
    monkeypatch.setattr(Pace, 'shortest', .2)
    async with fresh_remote.on('host1', config=dict(connect_timeout=.5)) as (km, kc):
        conn = km.provisioner.conn
        agent = psutil.Process(conn.agent.hello['pid'])
        agent.suspend()
        try: await until(lambda: not conn.is_up, 60, 'the session is given up')
        finally: agent.resume()
        assert 'host host1 does not answer' in caplog.text
        await until(lambda: conn.is_up, 60, 'connected again')
        assert await value(kc, '6*7') == 42

async def test_a_connection_has_one_descriptor(hosts, client):
    me, pool = psutil.Process(), Pool()
    conns = [await pool.connection(Host.parse(o), Login(config=str(client.config))) for o in hosts.names]
    await conns[0].session()
    before = me.num_fds()
    for c in conns[1:]: await c.session()
    assert me.num_fds() == before + len(conns) - 1
    await pool.close()

async def test_a_link_that_the_system_gave_up_ends_for_its_reader():
    "paramiko would take the system's `TimeoutError` for a pause, and go on"
    for error in TimeoutError(110, 'Connection timed out'), OSError(113, 'No route to host'):
        a, b = socket.socketpair()
        sock = NonblockingSocket(a)
        def recv_into(buffer): raise error
        sock.sock = SimpleNamespace(recv_into=recv_into, shutdown=a.shutdown, close=a.close)
        b.send(b'x')
        assert (await asyncio.to_thread(sock.recv, 1), sock.timed_out) == (b'', True)
        sock.close(); b.close()
    a, b = socket.socketpair()
    sock = NonblockingSocket(a, poll_interval=.01)
    with pytest.raises(TimeoutError): sock.recv(1)   # but a pause is a pause
    assert not sock.timed_out
    sock.close(); b.close()

# Pace

class Clock:
    "Time that passes when it is told to"
    def __init__(self): self.now, self.calls, self.n = 0., [], 0
    def __call__(self): return self.now
    def later(self, seconds, call):
        self.n += 1
        heapq.heappush(self.calls, o := [self.now+seconds, self.n, call])
        return SimpleNamespace(cancel=lambda: o.__setitem__(2, None))
    def run(self, until):
        while self.calls and self.calls[0][0] <= until:
            when, _, call = heapq.heappop(self.calls)
            self.now = max(self.now, when)
            if call: call()
        self.now = until

class Session:
    def __init__(self, clock, log, idle_timeout):
        self.clock, self.log, self.idle_timeout, self.last_received, self.well, self.lost = (clock, log, idle_timeout,
            clock(), True, None)
    def heartbeat(self, idle_timeout):
        if self.well:
            assert self.clock()-self.last_received <= self.idle_timeout, 'the agent would have given the session up'
        self.log.append(self.clock())
        self.idle_timeout = idle_timeout
        if self.well: self.last_received = self.clock()
    def silent(self): assert self.lost is None; self.lost = self.clock()

events = st.lists(st.tuples(st.floats(0, 30), st.sampled_from(['join', 'join', 'die', 'leave', 'hear']),
                            st.integers(1, 300)), min_size=1, max_size=12)

@settings(max_examples=150, deadline=None)
@given(events)
def test_whatever_happens_heartbeats_are_bounded_and_nobody_is_forgotten(events):
    """Hosts come in crowds, die, leave: no agent waits longer than it was told, whoever does not answer is given up
    once, the rest never"""
    clock, log, sessions, died = Clock(), [], [], {}
    pace = Pace(clock, clock.later)
    for pause, what, n in events:
        clock.run(clock.now+pause)
        alive = [s for s in sessions if s.well]
        if what == 'join':
            for _ in range(n):
                sessions.append(s := Session(clock, log, pace.told))
                pace.watch(s, 10, lambda: None, s.silent)
        for s in alive[:n]:
            if what == 'die': s.well, died[s] = False, clock.now
            if what == 'leave': pace.unwatch(s); s.well = False
            if what == 'hear': s.last_received = clock.now
    end = clock.now
    clock.run(end+1000)
    assert {s for s in sessions if s.lost} == set(died)
    assert all(s.lost-at <= 2*max(pace.told, 4*len(sessions)/pace.rate) + 11 for s, at in died.items())
    calm = [t for t in log if t > end+500]
    assert len(calm) <= 500*pace.rate + pace.together
    assert len(pace.due) <= len(pace.watched) + len(sessions) and len(pace.watched) == sum(s.well for s in sessions)

def test_a_sleep_is_not_followed_by_a_burst():
    """All are due at once after a laptop's sleep: asked a few at a time all the same, and not given up for what they
    could not say"""
    clock, log = Clock(), []
    pace = Pace(clock, clock.later)
    sessions = [Session(clock, log, 1000) for _ in range(400)]
    for s in sessions: pace.watch(s, 10, lambda: None, s.silent)
    clock.run(300)
    for s in sessions: s.idle_timeout = 1e6   # the host slept too
    clock.now = 10_000
    log.clear()
    clock.run(10_100)
    assert max(Counter(map(int, log)).values()) <= pace.rate + pace.together
    assert not [s for s in sessions if s.lost]

async def test_attempts_for_hosts_that_are_down_are_bounded(monkeypatch):
    "However many, all together are tried `retries` times a second at most, in the long run"
    pace, n = Pace(), 600
    pace.down.update(range(n))
    assert n/pace.rest(50) <= 1.3*pace.retries and pace.rest(1) <= 1
    pace.down.clear()
    assert pace.rest(10**9) <= pace.max_rest

# What was read once

def provisioner(**config):
    return DistributedProvisioner(kernel_id='k', kernel_spec=KernelSpec(display_name='of a test'),
                                  config=Config(DistributedProvisioner=config))

def test_a_list_is_parsed_once_and_a_changed_one_again(monkeypatch):
    parsed, real = [], Host.parse.__func__
    monkeypatch.setattr(Host, 'parse', classmethod(lambda cls, o: (parsed.append(o), real(cls, o))[1]))
    hosts_mod._parsed.cache_clear()
    entries = [f'u@node{i}' for i in range(50)]
    for _ in range(3): assert provisioner(remote_hosts=entries).remote_hosts == entries
    assert len(parsed) == 50
    entries[7] = 'u@other'
    assert provisioner(remote_hosts=entries).remote_hosts[7] == 'u@other'
    for o in 'a,b', 'a,c', 'a,b':
        monkeypatch.setenv('GP_REMOTE_HOSTS', o)
        assert provisioner().remote_hosts == o.split(',')
    (p := provisioner(remote_hosts=entries)).remote_hosts.clear()
    assert provisioner(remote_hosts=entries).remote_hosts == entries, 'no list is shared'

@pytest.mark.parametrize('bad', [['a', 5], [['a']], [{}], [None], [''], ['a b']], ids=repr)
def test_bad_lists_are_refused_every_time(bad):
    for _ in range(2):
        with pytest.raises(SettingError, match='remote_hosts: .*(host|list of remote hosts)'):
            provisioner(remote_hosts=bad)
    for f in parse_hosts, host_names:
        with pytest.raises(ValueError): f(bad)

def test_the_order_of_hosts():
    "Those that were tried in vain come last, in their order; each is looked at when its turn comes"
    asked, backing_off = [], {'a', 'c'}
    order = backing_off_last('abcd', lambda host: (asked.append(host), host in backing_off)[1])
    assert str(next(order)) == 'b' and asked == ['a', 'b']
    backing_off.add('d')
    assert list(order) == ['a', 'c', 'd']

# Host keys

def key(seed):
    return paramiko.Ed25519Key(data=paramiko.Message(b''.join(len(o).to_bytes(4, 'big') + o
        for o in (b'ssh-ed25519', hashlib.sha256(seed).digest()))).asbytes())
def hashed(name, salt):
    return '|1|' + '|'.join(base64.b64encode(o).decode()
                            for o in (salt, hmac.new(salt, name.encode(), 'sha1').digest()))

lines = st.lists(
    st.one_of(st.sampled_from(['', '# h1', '|1|x|y ssh-ed25519 AAAA', 'h1', 'h1 ssh-ed25519',
                               '@revoked h1 ssh-ed25519 AAAA', 'h1 what AAAA']),
    st.builds(
        lambda names, salt, n, gap: f"{','.join(hashed(o, salt) if salt else o for o in names)}{gap}ssh-ed25519 "
                                    f"{key(n).get_base64()} note",
        st.lists(st.sampled_from(['h1', 'h2', '[h1]:2222', '10.0.0.1']), min_size=1, max_size=3, unique=True),
        st.sampled_from([b'', bytes(20), b'salt'*5]), st.binary(max_size=1), st.sampled_from(' \t'))), max_size=8)

@settings(max_examples=200, deadline=None)
@given(lines, st.sampled_from(['h1', 'h2', '[h1]:2222', '10.0.0.1', 'h3']))
def test_the_same_keys_as_of_the_whole_file(tmp_path_factory, lines, name):
    "What is kept of a file says the same of a host as the file"
    file = tmp_path_factory.mktemp('keys')/'known_hosts'
    file.write_text('\n'.join(lines) + '\n')
    some, whole = paramiko.HostKeys(), paramiko.HostKeys()
    ssh._add_host_keys(some, str(file), name)
    # paramiko fails over what is no hash, and over marks
    file.write_text('\n'.join(o for o in lines if '|1|x' not in o and '@' not in o) + '\n')
    whole.load(str(file))
    said = lambda keys: {k: v.asbytes() for k, v in (keys.lookup(name) or {}).items()}
    assert said(some) == said(whole)
