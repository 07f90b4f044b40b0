"""What can go wrong between a host application and its hosts, done for real: links cut and healed, servers restarted,
plugs pulled, connections killed at the worst moment, applications killed, floods, skewed clocks, full disks, other
users. `-s` shows how long things took."""
import asyncio, contextlib, json, os, queue, random, re, signal, socket, statistics, subprocess, sys, textwrap, time
import psutil, pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
from gateway_provisioners_ssh import response
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.handshake import ControlKey
from gateway_provisioners_ssh.hosts import Host
from gateway_provisioners_ssh.provisioner import _control, shared
from gateway_provisioners_ssh.errors import LaunchError
from gateway_provisioners_ssh.ssh import HostError
from kernels import busy, client_of, ended, forget, interrupt, kill, printed, reply_to, value
from pace import Deadline, Timer, slowness, until, within

def said(what, timer): print(f'{what}: {float(timer):.1f} s')

def run_dirs(host): return [str(o) for o in host.tmp.glob('gpssh-*/k-*')]

async def stream(kc, msg_id, until, timeout):
    "What the cell `msg_id` prints, up to and including `until`"
    out, deadline = '', Deadline(timeout)
    while until not in out:
        assert not deadline.passed(), out
        try: m = await kc.get_iopub_msg(timeout=1)
        except queue.Empty: continue
        if m['msg_type'] == 'stream' and m['parent_header'].get('msg_id') == msg_id: out += m['content']['text']
    return out

def count_to(n): return f'import time\nfor i in range({n}):\n    print(f"<{{i}}>", flush=True)\n    time.sleep(1)'

# The link

async def test_link_cut_and_healed_or_not(net_remote, net, caplog):
    """Two links are cut. One is healed after 30 s, and nobody need have noticed; the other is not, and its kernel is
    reported lost, restarted elsewhere, and ended once its host is back. A third host goes on as if nothing had
    happened."""
    node1, node2 = net[0], net[1]
    async with contextlib.AsyncExitStack() as stack:
        start = lambda *a, **kw: stack.enter_async_context(net_remote.on(*a, **kw))
        (direct, dc), (tunnel, tc), (lost, _), (other, oc) = await asyncio.gather(start('node1', 'node3'),
            start('node1', config=dict(tunneling_enabled=True)),
            start('node2', 'node4', config=dict(unreachable_timeout=15)), start('node3'))
        for kc in dc, tc: await kc.execute_interactive('x = 41', timeout=30)
        pids = [km.provisioner.fields['pid'] for km in (direct, tunnel)]
        zombie = lost.provisioner.fields['pid']
        cells = [await busy(kc, count_to(48)) for kc in (dc, tc)]
        node1.cut(); node2.cut()
        cut = Timer()
        watch = asyncio.ensure_future(lost.provisioner.wait())
        watch.add_done_callback(lambda _: said('reported lost', cut))
        async def seconds_of_answers():
            took = []
            while float(cut) < 30:
                t = Timer()
                assert await value(oc, '6*7') == 42
                took.append(float(t))
                assert await direct.is_alive() and await tunnel.is_alive()
                await asyncio.sleep(1)
            return took
        others = asyncio.ensure_future(seconds_of_answers())

        elsewhere, t = await start('node1', 'node3'), Timer()
        said('start while the first choice is cut off', cut)
        assert elsewhere[0].provisioner.conn.host.name == 'node3' and cut < 15
        t = Timer()
        elsewhere = await start('node1', 'node3')
        said('another one', t)
        assert elsewhere[0].provisioner.conn.host.name == 'node3' and t < 15
        with pytest.raises(HostError, match='out of reach'): await direct.interrupt_kernel()
        took = await others
        slow = await asyncio.to_thread(slowness)
        # to wait for a link that is cut takes longer
        assert statistics.median(took) < slow and max(took) < 10*slow, took
        node1.heal()
        healed = Timer()
        async def finishes(kc, msg_id, how):
            reply = asyncio.ensure_future(reply_to(kc, msg_id, 60))
            out = await stream(kc, msg_id, '<47>', 60)
            assert re.findall(r'<(\d+)>', out) == [str(i) for i in range(1,
                48)], f'{how}: all that was printed arrives, in its order'
            said(f'{how}: last output after the link was healed', healed)
            assert (await reply)['status'] == 'ok'
        await asyncio.gather(finishes(dc, cells[0], 'direct'), finishes(tc, cells[1], 'tunnel'))
        assert [await value(kc, 'x+1') for kc in (dc, tc)] == [42, 42]
        assert [await value(kc, '__import__("os").getpid()') for kc in (dc, tc)] == pids
        for km, kc in (direct, dc), (tunnel, tc): await interrupt(km, kc)

        assert await asyncio.wait_for(watch, 30) == 255
        assert re.search(f'kernel {lost.kernel_id} is lost', caplog.text) and not await lost.is_alive()
        await lost.restart_kernel(now=True)
        await stack.enter_async_context(client_of(lost))
        assert lost.provisioner.conn.host.name == 'node4'
        assert psutil.pid_exists(zombie)
        node2.heal()
        t = Timer()
        await until(lambda: not psutil.pid_exists(zombie) and not node2.kernels() and not run_dirs(node2), 45,
                    'the lost kernel is ended')
        said('a lost kernel ended after its host was back', t)

async def test_sshd_restarted(net_remote, net):
    "Kernels live, compute on, can be interrupted, and their end is noticed, without anybody's help"
    with net_remote.nothing_left():
        async with net_remote.on('node1') as (direct, dc), net_remote.on('node1',
            config=dict(tunneling_enabled=True)) as (tunnel, tc):
            cells = [await busy(kc, 'x = 1\n' + count_to(1000)) for kc in (dc, tc)]
            net[0].restart_sshd()
            t = Timer()
            assert await direct.is_alive() and await tunnel.is_alive()
            for km in direct, tunnel: await km.interrupt_kernel()
            for km, kc in (direct, dc), (tunnel, tc): assert await value(kc, 'x') == 1
            said('interrupted and answering after a restart of sshd', t)
            net[0].stop()
            await asyncio.sleep(1)
            os.kill(tunnel.provisioner.fields['pid'], signal.SIGKILL)
            await asyncio.sleep(2)
            assert await tunnel.is_alive()
            net[0].start()
            t = Timer()
            assert await asyncio.wait_for(tunnel.provisioner.wait(), 20) == -9
            said('end noticed after sshd was back', t)
            await within(1, lambda: kill(direct, dc))

async def test_host_powered_off(net_remote, net):
    """A host without power is out of reach; when it is back its kernels are known to be dead, and the application
    restarts them elsewhere"""
    kw = dict(manager=AsyncIOLoopKernelManager)
    async with net_remote.on('node3', 'node4', **kw) as (direct, dc), \
               net_remote.on('node3', 'node4', config=dict(tunneling_enabled=True), **kw) as (tunnel, tc):
        assert {km.provisioner.conn.host.name for km in (direct, tunnel)} == {'node3'}
        net[2].power_off()
        await asyncio.sleep(3)
        assert await direct.is_alive() and await tunnel.is_alive()
        dead = [asyncio.ensure_future(km.provisioner.wait()) for km in (direct, tunnel)]
        net[2].power_on()
        t = Timer()
        assert await asyncio.wait_for(asyncio.gather(*dead), 30) == [255, 255]
        said('known to be dead after the host was back', t)
        await until(lambda: all(km.provisioner and km.provisioner.conn.host.name == 'node4'
                                and km.provisioner.fields['pid'] in net[3].pids() for km in (direct, tunnel)), 30,
                    'restarted')
        said('restarted on the other host', t)
        await tc.wait_for_ready(timeout=60)
        assert await value(tc, '__import__("socket").gethostname()',
                           60) == 'node4', 'in tunnel mode the same client goes on'
        async with client_of(direct) as kc: assert await value(kc, '__import__("socket").gethostname()') == 'node4'

# Launches

async def test_connection_killed_in_the_middle_of_a_launch(net_remote, net):
    "At any moment: the launch ends well, here or elsewhere, or fails with a reason; nothing stays that nobody has"
    ok = failed = 0
    with net_remote.nothing_left(30):
        async def start(i):
            nonlocal ok, failed
            config = dict(tunneling_enabled=bool(i % 2))
            try:
                async with net_remote.on(*(['node1', 'node2'] if i % 3 else ['node1']), config=config): ok += 1
            except LaunchError as e:
                failed += 1
                assert i % 3 == 0 and re.search(r'host node1 \(user root\)', str(e)), e
        async def disturb():
            for pause in .2, .35, .3, .5, .4, .7:
                await asyncio.sleep(pause)
                await asyncio.to_thread(net[0].drop)
        t = Timer()
        ends = await asyncio.gather(disturb(), *(start(i) for i in range(9)), return_exceptions=True)
        assert not [repr(o) for o in ends if isinstance(o, BaseException)]
        said(f'{ok} started, {failed} said why not', t)
        assert ok >= 6
        await until(lambda: not run_dirs(net[0]) and not run_dirs(net[1]), 30, 'run directories')

async def test_link_cut_in_the_middle_of_a_launch(net_remote, net):
    "The launch goes on elsewhere; what the first host started ends once it is back"
    with net_remote.nothing_left(30):
        async with net_remote.on('node1'): pass   # a connection
        task = asyncio.ensure_future((cm := net_remote.on('node1', 'node2')).__aenter__())
        await until(lambda: net[0].kernels(), 30, 'something started')
        net[0].cut()
        t = Timer()
        km, kc = await asyncio.wait_for(task, 40)
        said('on another host after a cut', t)
        assert km.provisioner.conn.host.name == 'node2'
        net[0].heal()
        await cm.__aexit__(None, None, None)
        await until(lambda: not run_dirs(net[0]) and not net[0].kernels(), 40, 'nothing on the host where it began')

def down(h): h.stop()
def hangs(h): h.drop(); h.hang()
def refuses_the_key(h): h.refuse_keys(); h.drop()
def has_another_host_key(h): h.change_host_key()

@pytest.mark.parametrize('fault, words',
                         [(down, 'nothing listens'), (hangs, 'no answer|closed the connection'),
                                          (refuses_the_key, 'refused the login'),
                                          (has_another_host_key, 'the host key has changed')],
                         ids=lambda o: getattr(o, '__name__', ''))
async def test_first_choice_of_host_is_of_no_use(fresh_remote, hosts, fault, words):
    conf, conn = dict(connect_timeout=2), None
    with fresh_remote.nothing_left():
        fault(hosts[0])
        t = Timer()
        async with fresh_remote.on('host1', 'host2', config=conf) as (km, kc):
            said(f'first host {fault.__name__}: ready on the next', t)
            assert km.provisioner.conn.host.name == 'host2' and t < 12
            conn = await background().run(shared().pool.connection(Host.parse('host1'), km.provisioner.login))
            assert conn.backoff.failures == 1 and conn.backoff.until > 0
            with pytest.raises(LaunchError, match=f'(?s)host host1.*({words})'):
                async with fresh_remote.on('host1', 'host2', config=conf, env=dict(KERNEL_REMOTE_HOST='host1')): pass
            assert conn.backoff.failures == 2 and conn.backoff.until - time.monotonic() > 1, 'pauses grow'
            fault(hosts[2])
            with pytest.raises(LaunchError, match='no host could start the kernel') as e:
                async with fresh_remote.on('host1', 'host3', config=conf): pass
            for h in 'host1', 'host3': assert re.search(f'^- host {h} .*({words})', str(e.value), re.M), e.value
        for h in hosts[0], hosts[2]: h.repair()
        await until(lambda: not conn.backing_off, 10, 'the pause is over')
        async with fresh_remote.on('host1', 'host4', config=conf) as (km, _):
            assert km.provisioner.conn.host.name == 'host1', 'it is tried again'

LIGHT = textwrap.dedent('''
    import os, signal, sys
    sys.path.insert(0, sys.argv.pop(1))
    import server_listener as L
    try:
        args = L.Arguments('A process that takes the place of a kernel and computes nothing').parse_args()
        launch = L.LaunchContext(args)
        L.report_listening(launch, launch.write(os.getpid()), os.getpid())
        signal.pause()
    except L.LauncherError as e: L.exit_with(e)
    ''')

OPTIONS = ('--kernel-id {kernel_id} --response-address {response_address} --port-range {port_range} --public-key '
           '{public_key}'.split())

async def test_64_starts_at_once_half_of_them_cancelled(fresh_remote, hosts):
    "On one host with sshd's default settings, on which everything starts from nothing: no connection yet"
    fresh_remote.spec('light', argv=lambda argv: [argv[0], '-c', LIGHT, str(fresh_remote.scripts), *OPTIONS],
                      hosts=['host1'])
    rng, me = random.Random(7), psutil.Process()
    async with fresh_remote.on('host1'): pass
    await asyncio.to_thread(forget)
    before = me.num_fds()
    with fresh_remote.nothing_left(30):
        t = Timer()
        provisioners = [fresh_remote.provisioner('light') for _ in range(64)]
        async def start(p, i):
            task = asyncio.ensure_future(
                p.launch_kernel(**await p.pre_launch(env=dict(os.environ, KERNEL_LAUNCH_TIMEOUT='90'))))
            if i % 2:
                await asyncio.sleep(rng.uniform(0, 4))
                task.cancel()
            return await task
        got = await asyncio.gather(*(start(p, i) for i, p in enumerate(provisioners)), return_exceptions=True)
        said('64 starts, half of them cancelled', t)
        assert not [str(o) for o in got[::2] if isinstance(o, BaseException)]
        assert all(isinstance(o, (dict, asyncio.CancelledError)) for o in got[1::2]), got[1::2]
        assert sum(isinstance(o, dict) for o in got[1::2]) < 24, 'too many came before they were cancelled'
        assert len({o['shell_port'] for o in got if isinstance(o, dict)}) == sum(isinstance(o, dict) for o in got)
        for p, o in zip(provisioners, got): assert await p.poll() is None or not isinstance(o, dict)
        assert hosts[0].connections() == 1
        await ended(provisioners)
    assert not shared().ledger.load
    await asyncio.to_thread(forget)
    await until(lambda: me.num_fds() <= before + 2, 10, f'{me.num_fds()} descriptors, {before} before')

# The host application

APP = '''
import asyncio, json, os, sys
from jupyter_client.manager import AsyncKernelManager
from traitlets.config import Config
from gateway_provisioners_ssh.liveness import Pace
patience, beat, kernels = json.loads(sys.argv[1])
Pace.patience, Pace.shortest = patience, beat
async def one(name, config):
    km = AsyncKernelManager(kernel_name=name, config=Config(DistributedProvisioner=config))
    await km.start_kernel()
    kc = km.client()
    kc.start_channels()
    await kc.wait_for_ready(timeout=60)
    await kc.execute_interactive('x = 41', timeout=30)
    kc.stop_channels()
    return km
async def main():
    kms = await asyncio.gather(*(one(*o) for o in kernels))
    infos = [dict(id=km.kernel_id, info=await km.provisioner.get_provisioner_info()) for km in kms]
    print(json.dumps(infos), flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
'''

@contextlib.contextmanager
def application(*kernels, patience=60, beat=5):
    "Another host application; yields the process and what it knows of its kernels"
    p = subprocess.Popen([sys.executable, '-c', APP, json.dumps([patience, beat, kernels])], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    try:
        line = p.stdout.readline()
        assert line, p.stderr.read()
        yield p, json.loads(line)
    finally:
        p.kill(); p.wait(); p.stdout.close(); p.stderr.close()

async def resume(remote, name, kernel, config={}):
    "A kernel manager that goes on with the kernel of another process"
    km = remote.manager(name, config=config)
    km.kernel_id = kernel['id']
    km.provisioner = KernelProvisionerFactory.instance(parent=km.parent).create_provisioner_instance(km.kernel_id,
        km.kernel_spec, parent=km)
    await km.provisioner.load_provisioner_info(kernel['info'])
    km.load_connection_info(km.provisioner.connection_info)
    return km

async def test_host_application_killed_and_started_again(net_remote, net):
    specs = [net_remote.spec(f'resumed_{h}', hosts=[h]) for h in ('node1', 'node2')]
    modes = dict(), dict(tunneling_enabled=True)
    with net_remote.nothing_left(30, ignore=[r'/kernel-.*\.log']):   # of a kernel that ended by itself, the log remains
        kernels = [(s, m) for s in specs for m in modes]
        with application(*kernels) as (p, known):
            p.send_signal(signal.SIGKILL); p.wait()
            t = Timer()
            os.kill(known[0]['info']['fields']['pid'], signal.SIGKILL)      # one ends while nobody looks
            kms = await asyncio.gather(*(resume(net_remote, *k[:1], o, k[1]) for k, o in zip(kernels, known)))
            assert await asyncio.wait_for(kms[0].provisioner.wait(), 20) == -9 and not await kms[0].is_alive()
            for km in kms[1:]:
                async with client_of(km) as kc:
                    assert await value(kc, 'x+1') == 42
                    await interrupt(km, kc)
            said('resumed, executed, interrupted', t)
            assert sum(shared().ledger.load.values()) == 3
            os.kill(known[3]['info']['fields']['pid'], signal.SIGKILL)
            assert await asyncio.wait_for(kms[3].provisioner.wait(), 20) == -9
            for km in kms: await asyncio.wait_for(km.shutdown_kernel(), 30)

async def test_resume_while_the_host_cannot_be_reached(net_remote, net):
    "Taking over needs no host: what is known is used, and the rest is seen when the host is back"
    spec = net_remote.spec('resumed_node1', hosts=['node1'])
    with application((spec, {})) as (p, [known]):
        p.send_signal(signal.SIGKILL); p.wait()
        net[0].cut()
        km = await asyncio.wait_for(resume(net_remote, spec, known, dict(connect_timeout=1)), 10)
        assert await km.is_alive()
        net[0].heal()
        async with client_of(km) as kc: assert await value(kc, 'x+1') == 42
        await asyncio.wait_for(km.shutdown_kernel(now=True), 30)
    await until(lambda: not net[0].kernels() and not run_dirs(net[0]), 20, 'nothing left')

async def test_orphans_end_by_themselves(net_remote, net):
    "Also behind a link that was cut for good, where the host's SSH server does not notice that nobody listens any more"
    specs = [(net_remote.spec(f'orphan_{h}', hosts=[h]), dict(orphan_timeout=2)) for h in ('node1', 'node2')]
    with application(*specs, patience=6, beat=1) as (p, known):
        pids = [o['info']['fields']['pid'] for o in known]
        await asyncio.sleep(9)
        assert all(map(psutil.pid_exists, pids)), 'watched kernels live'
        net[1].cut()
        p.send_signal(signal.SIGKILL); p.wait()
        t = Timer()
        await until(lambda: not psutil.pid_exists(pids[0]), 15, 'an orphan ends')
        said('an orphan ended', t)
        await until(lambda: not psutil.pid_exists(pids[1]), 25, 'an orphan behind a cut link ends')
        said('an orphan behind a cut link ended', t)
    await until(lambda: not any(h.kernels() or run_dirs(h) for h in net), 20, 'nothing left')

async def test_two_host_applications_share_hosts(net_remote, net):
    """One starts, computes and ends kernels; the kernels of the other do not notice, and keep their ports, files and
    names"""
    specs = [net_remote.spec(f'shared_{h}', hosts=[h]) for h in ('node1', 'node2')]
    with application(*((s, {}) for s in specs for _ in range(2))) as (p, known):
        before = {h.name: {o.pid for o in h.kernels()} for h in net}
        name = net_remote.spec('shared', hosts=['node1', 'node2'])
        async with contextlib.AsyncExitStack() as stack:
            mine = await asyncio.gather(*(stack.enter_async_context(net_remote.kernel(name)) for _ in range(4)))
            assert (sorted(km.provisioner.conn.host.name for km, _ in mine) == ['node1']*2
                    + ['node2']*2), 'each balances its own'
            assert {km.provisioner.fields['shell_port'] for km, _ in mine} & {o['info']['fields']['shell_port']
                for o in known} == set()
            for km, kc in mine: assert await value(kc, '"x" in globals()') is False
            await mine[0][0].restart_kernel(now=True)
            assert await mine[0][1].wait_for_ready(timeout=60) is None
        await until(lambda: {h.name: {o.pid for o in h.kernels()} for h in net} == before, 15, 'as before')
        p.send_signal(signal.SIGKILL); p.wait()
        for o, s in zip(known, [s for s in specs for _ in range(2)]):
            km = await resume(net_remote, s, o)
            async with client_of(km) as kc: assert await value(kc, 'x+1') == 42
            await km.shutdown_kernel(now=True)

# Strangers

FLOOD = textwrap.dedent('''
    import os, random, resource, socket, sys, time
    ip, port, much, replays = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [bytes.fromhex(o) for o in sys.argv[4:]]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    silent, sent = [], 0
    def connection():
        s = socket.socket(); s.settimeout(3)
        s.connect((ip, port))
        return s
    def attempt(f):
        try: f()
        except OSError: pass
    def quiet():
        silent.append(connection())
        if len(silent) > 1000: silent.pop(0).close()
    def say(*parts, pause=0):
        with connection() as s:
            for o in parts: s.sendall(o); time.sleep(pause)
            s.shutdown(socket.SHUT_WR)
            while s.recv(4096): pass
    def endless():
        with connection() as s:
            for _ in range(1024): s.sendall(bytes(2**20))
    print('go', flush=True)
    for i in range(much):
        attempt(quiet)
        if i % 10 == 0: attempt(lambda: say(os.urandom(random.randrange(1, 5000)) + b'\\n'))
        if i % 25 == 0 and replays: attempt(lambda: say(random.choice(replays)))
        if i % 25 == 5 and replays: attempt(lambda: say(random.choice(replays)[:300]))
        if i % 500 == 7: attempt(endless)
    print('done', flush=True)
    ''')

def flood(host, ip, port, much, *replays):
    return host.ns.popen(sys.executable, '-c', FLOOD, ip, port, much, *(o.hex() for o in replays),
                         stdout=subprocess.PIPE, text=True)

async def test_floods_of_the_response_port(net_remote, net, caplog):
    """Silence, noise, endless streams, halves and replays of real messages, from a host with kernels and from another,
    while kernels start"""
    heard, me, conf = [], psutil.Process(), dict(response_ip=net.address)   # so that launchers report there
    real = response.ResponseServer._judge
    def judge(self, raw, peer): heard.append(raw); return real(self, raw, peer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response.ResponseServer, '_judge', judge)
        async with net_remote.on('node1', config=conf): pass
    recorded = [o for o in heard if o]
    assert len(recorded) == 1
    server = next(s for s in shared().servers.values())
    port = next(o.getsockname()[1] for t in server._listening.values() for o in t.result().sockets)
    memory, lines = me.memory_info().rss, len(caplog.records)
    attackers = [flood(h, net.address, port, 4000, *recorded) for h in (net[0], net[1])]
    for p in attackers: assert await asyncio.to_thread(p.stdout.readline) == 'go\n'
    try:
        for i in range(3):
            t = Timer()
            async with net_remote.on('node1', config=conf) as (km, kc): assert await value(kc, '6*7') == 42
            said('start, answer and end in a flood of the response port', t)
            assert t < 20
        assert sum(map(len, server._open.values())) <= server.max_open
        assert me.memory_info().rss - memory < 100*2**20
        refused = [r for r in caplog.records[lines:] if 'refused' in r.getMessage()]
        assert 1 <= len(refused) <= 60, 'each kind once a minute'
        assert server.refusals.total.total() > 100
        print(dict(server.refusals.total))
    finally:
        for p in attackers: p.kill(); p.wait(); p.stdout.close()

async def test_floods_of_the_control_port(net_remote, net):
    """Ten thousand connections, noise, forgeries and replays of signed requests: the kernel is unharmed, and signed
    requests still count"""
    async with net_remote.on('node1') as (km, kc):
        f = km.provisioner.fields
        key, address = ControlKey(f['control_key']), (net[0].address, f['comm_port'])
        def ask(line):
            with socket.create_connection(address, timeout=10) as s, s.makefile('rb') as r:
                nonce = bytes.fromhex(json.loads(r.readline())['nonce'])
                s.sendall(line(nonce) if callable(line) else line)
                return nonce, r.readline()
        recorded = []
        def sign(nonce): recorded.append(key.request(nonce, dict(signum=0))); return recorded[-1]
        assert key.open_reply(*await asyncio.to_thread(ask, sign)) == dict(alive=True)
        kill = json.dumps(dict(signum=9))
        forged = [b'{"signum": 9}\n', b'{"shutdown": 1}\n', json.dumps(dict(request=kill, mac='0'*64)).encode()+b'\n',
                  json.dumps(dict(request=kill)).encode()+b'\n',
                  ControlKey('00'*32).request(os.urandom(32), dict(signum=9)),
                  key.request(os.urandom(32), dict(signum=9)), *recorded]
        for line in forged: assert (await asyncio.to_thread(ask, line))[1] == b'', line
        msg_id = await busy(kc, 'import time\nprint("go", flush=True)\nwhile True: time.sleep(.01)')
        attackers = [flood(net[i], *address, 5000, *forged) for i in (1, 2)]
        for p in attackers: assert await asyncio.to_thread(p.stdout.readline) == 'go\n'
        try:
            took = []
            for _ in range(3):
                t = Timer()
                assert await background().run(_control(*address, key, dict(signum=0))) == dict(alive=True)
                said('a signed request in a flood of the control port', t)
                took.append(float(t))
                await asyncio.sleep(1)
            assert statistics.median(took) < 5*await asyncio.to_thread(slowness), took
            for p in attackers: assert await asyncio.to_thread(p.stdout.readline) == 'done\n'
        finally:
            for p in attackers: p.kill(); p.wait(); p.stdout.close()
        agent = psutil.Process(km.provisioner.conn.agent.hello['pid'])
        print('agent:', agent.memory_info().rss >> 20, 'MiB,', agent.num_fds(), 'descriptors')
        assert agent.memory_info().rss < 64*2**20 and agent.num_fds() < 100
        await background().run(_control(*address, key, dict(signum=2)))
        assert (await reply_to(kc, msg_id))['status'] == 'error'
        assert await value(kc, '6*7') == 42

async def test_another_user_of_the_host(net_remote, net):
    """While a kernel of ada's starts and runs, mallory reads whatever the host lets her read, and finds no secret; nor
    does the agent obey her"""
    host = net[3]
    host.add_user('ada'); host.add_user('mallory', key=False)
    net.client.alias('node4', User='ada')
    spy = textwrap.dedent('''
        import os, select, sys
        seen, names = set(), set()
        last = False   # once she is asked for what she saw, she looks a last time
        while not last:
            last = bool(select.select([sys.stdin], [], [], .01)[0])
            for pid in filter(str.isdigit, os.listdir('/proc')):
                for what in 'cmdline', 'environ', 'maps', 'fd', 'cwd', 'mem':
                    p = f'/proc/{pid}/{what}'
                    try:
                        if what == 'fd': text = ' '.join(os.readlink(f'{p}/{o}') for o in os.listdir(p))
                        else: text = open(p, 'rb').read().decode('latin1')
                        seen.add(what+': '+text)
                    except OSError: pass
            for top in '/tmp', '/home':
                for d, ds, fs in os.walk(top):
                    if len(d) > 200 or not d.startswith(('/tmp/kernel', '/tmp/gpssh', '/home')) and d != '/tmp':
                        ds.clear()
                        continue
                    for o in fs:
                        p = os.path.join(d, o)
                        names.add(p)
                        try:
                            if os.path.isfile(p): seen.add(p+': '+open(p, 'rb').read(100_000).decode('latin1'))
                        except OSError: pass
        print('\\n'.join(sorted(seen | names)))''')
    try:
        p = subprocess.Popen([str(o) for o in host.inside([sys.executable, '-c', spy], 'mallory')],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding='utf-8',
                             errors='replace')
        secrets = []
        with contextlib.nullcontext():
            async with net_remote.on('node4') as (km, kc):
                assert await value(kc, '__import__("getpass").getuser()') == 'ada'
                f, info = km.provisioner.fields, km.get_connection_info()
                secrets += [f['control_key'], info['key'].decode() if isinstance(info['key'], bytes) else info['key']]
                await asyncio.sleep(1)
                out = await asyncio.to_thread(lambda: p.communicate(timeout=60)[0])
                assert km.kernel_id in out, 'she did look'
                assert len(secrets) == 2 and not [s for s in secrets if s in out]
                assert not re.search(r'KERNEL_LAUNCH_SECRET=', out)
                poke = f'''
import json, os, signal, socket
for pid in {f['pid']}, {km.provisioner.conn.agent.hello['pid']}:
    for s in 0, 2, 9:
        try: os.kill(pid, s); print('killed')
        except PermissionError: pass
for line in b'{{"signum": 9}}\\n', b'{{"shutdown": 1}}\\n':
    with socket.create_connection(('{f['ip']}', {f['comm_port']})) as s:
        s.recv(4096); s.sendall(line); print(s.recv(4096).decode())
import glob
for o in glob.glob('/tmp/gpssh-*') + glob.glob('/tmp/kernel-*.log'):
    try: print(open(o).read(), os.listdir(o))
    except OSError: pass
'''
                assert host.run(sys.executable, '-c', poke, user='mallory').strip() == ''
                assert await value(kc, '6*7') == 42
    finally: net.client.alias('node4', User='root')

# Clocks and disks

async def test_clock_skew_of_an_hour(net_remote, net):
    try: net[1].skew(3600)
    except FileNotFoundError as e: pytest.skip(str(e))
    for tunnel in False, True:
        async with net_remote.on('node2', config=dict(tunneling_enabled=tunnel, orphan_timeout=5)) as (km, kc):
            assert 3500 < await value(kc, '__import__("time").time()') - time.time() < 3700
            await interrupt(km, kc)
            await km.restart_kernel(now=True)
            await kc.wait_for_ready(timeout=60)
            f, conn = km.provisioner.fields, km.provisioner.conn
            assert await background().run(_control(conn.address, f['comm_port'], ControlKey(f['control_key']),
                                                   dict(signum=0))) == dict(alive=True) if not tunnel else True
            await within(2, lambda: kill(km, kc))
    assert not net[1].kernels()

async def test_log_flood_and_full_disk(net_remote, net):
    "A kernel writes a hundred megabytes to its log; then the log's disk is full; it computes on"
    logs = '/tmp/logs'
    net[0].run('mkdir', '-p', logs)
    conf = dict(kernel_log_dir=logs, kernel_log_max_bytes=2**20)
    async with net_remote.on('node1', config=conf) as (km, kc):
        flood = ('import os, sys\nlog = sys.stderr._original_stdstream_copy\nfor _ in range({n}): os.write(log, '
                 'b"x"*65535 + b"\\n")')
        t = Timer()
        assert (await printed(kc, flood.format(n=1600), 90))[1] == 'ok'
        said('a hundred megabytes to the log', t)
        def size(): # of each file once, whatever it is called just now
            found = {}
            for o in (net[0].tmp/'logs').glob('kernel-*'):
                with contextlib.suppress(FileNotFoundError):
                    s = o.stat()
                    found[s.st_ino] = s.st_size
            return sum(found.values())
        assert size() <= 2**20
    net[0].run('mount', '-t', 'tmpfs', '-o', 'size=64k,mode=1777', 'none', logs)
    try:
        async with net_remote.on('node1', config=conf | dict(kernel_log_max_bytes=2**20)) as (km, kc):
            net[0].run('dd', 'if=/dev/zero', f'of={logs}/full', 'bs=1k', check=False)
            assert (await printed(kc, flood.format(n=200), 60))[1] == 'ok'
            assert await value(kc, '6*7') == 42
            await interrupt(km, kc)
    finally: net[0].free_disk(logs)
    assert not net[0].kernels() and not run_dirs(net[0])
