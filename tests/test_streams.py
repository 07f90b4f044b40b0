"""Tunnelled streams over links that are cut, servers that are restarted, laptops that sleep: on each of five channels
no byte is lost, doubled or out of order, by digests at both ends; what is kept is bounded; who may have a stream. `-s`
shows how long things took."""
import asyncio, contextlib, hashlib, json, os, random, re, signal, socket, subprocess, sys, textwrap
from pathlib import Path
from types import SimpleNamespace
import psutil, pytest
from gateway_provisioners_ssh.hosts import Host, Login
from gateway_provisioners_ssh.launchers.agent import WINDOW
from gateway_provisioners_ssh.liveness import Pace
from gateway_provisioners_ssh.mock_ssh import MockHosts
from gateway_provisioners_ssh.remote import spawn
from gateway_provisioners_ssh.ssh import Pool
from gateway_provisioners_ssh.tunnel import Forward, KernelPort
from pace import Timer, slowness, until
from test_server import jupyter

MB = 2**20

# What takes the place of a kernel: five ports, each of which sends what is asked for, and says in the end what it sent
# and what it got

KERNEL = textwrap.dedent('''
    import hashlib, json, random, socket, threading, time
    def serve(c):
        f = c.makefile('rb')
        m = json.loads(f.readline())
        up, down, rng = hashlib.sha256(), hashlib.sha256(), random.Random(m['seed'])
        def read():
            while True:
                data = f.read1(2**16)
                if not data: return
                up.update(data)
        t = threading.Thread(target=read, daemon=True)
        t.start()
        for i in range(m['parts']):
            data = rng.getrandbits(8*m['size']).to_bytes(m['size'], 'little')
            down.update(data)
            c.sendall(data)
            if m.get('say'): print('sent', i, flush=True)
            time.sleep(m['pause'])
        t.join()
        c.sendall(down.digest() + up.digest())
        c.close()
    def accept(s):
        while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
    socks = [socket.create_server(('127.0.0.1', 0)) for _ in range(5)]
    print(json.dumps([o.getsockname()[1] for o in socks]), flush=True)
    for o in socks[1:]: threading.Thread(target=accept, args=(o,), daemon=True).start()
    accept(socks[0])
    ''')

async def start(conn, **bounds):
    "That, on the host of `conn`, with a port here for each of its own"
    log = f'/tmp/kernel-{os.urandom(8).hex()}.log'
    process = await spawn(await conn.session(), conn.wait_connected, log, argv=[sys.executable, '-c', KERNEL], env={},
                          max_bytes=MB)
    async def ports(): return re.search(r'^\[[0-9, ]+\]$', await process.tail(), re.M)
    said = await until(ports, 60, 'its ports')
    forwards = [await Forward(conn.tunnel, KernelPort(port, process.id, **bounds)).start()
                for port in json.loads(said[0])]
    await conn.tunnel.ready()
    return SimpleNamespace(conn=conn, process=process, forwards=forwards)

async def end(kernel):
    for o in kernel.forwards: o.close()
    await kernel.process.release(keep_log=False)

def randoms(seed, parts, size):
    rng = random.Random(seed)
    for _ in range(parts): yield rng.getrandbits(8*size).to_bytes(size, 'little')

async def exchange(forward, seed, parts, size, pause=0., heard=lambda n: None):
    "Send as much as comes, both at once; every byte that comes is the one that is due, and both digests are right"
    reader, writer = await asyncio.open_connection('127.0.0.1', forward.port)
    writer.write(json.dumps(dict(seed=seed, parts=parts, size=size, pause=pause)).encode() + b'\n')
    down, up, n = hashlib.sha256(), hashlib.sha256(), 0
    async def send():
        for data in randoms(seed+1, parts, size):
            up.update(data)
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(pause)
        writer.write_eof()
    sending = asyncio.ensure_future(send())
    try:
        for data in randoms(seed, parts, size):
            assert await reader.readexactly(len(data)) == data, f'after {n} bytes'
            down.update(data)
            heard(n := n + len(data))
        await sending
        assert await reader.read() == down.digest() + up.digest()
    finally:
        sending.cancel()
        writer.close()

async def on_all_five(kernel, fault, parts, size, pause=0.):
    "The same on all channels, while `fault` happens"
    both = [asyncio.ensure_future(o)
            for o in [fault, *(exchange(f, 100*i, parts, size, pause) for i, f in enumerate(kernel.forwards))]]
    try: await asyncio.wait_for(asyncio.gather(*both), 240)
    finally:
        for o in both: o.cancel()

@contextlib.asynccontextmanager
async def connected(config, host, **login):
    pool = Pool()
    conn = await pool.connection(Host.parse(host), Login(config=str(config), **(dict(connect_timeout=3) | login)))
    try: yield conn
    finally: await pool.close()

@contextlib.asynccontextmanager
async def kernel_on(config, host, bounds={}, **login):
    async with connected(config, host, **login) as conn:
        kernel = await start(conn, **bounds)
        try: yield kernel
        finally: await end(kernel)

@pytest.fixture
def mock():
    with MockHosts(1) as mocks: yield mocks

# Cuts

async def twenty_cuts(host, tunnel):
    for _ in range(20):
        await until(lambda: tunnel.session, 60)
        await asyncio.sleep(random.uniform(0, .1))
        host.drop()

async def silence(host, tunnel):
    for seconds in 1, .2, .5:
        await asyncio.sleep(.2)
        host.freeze()
        await asyncio.sleep(seconds)
        host.thaw()

async def restarted(host, tunnel):
    await asyncio.sleep(.3)
    host.refuse()
    host.drop()
    await asyncio.sleep(1)
    host.accept()

@pytest.mark.parametrize('fault', [twenty_cuts, silence, restarted], ids=lambda o: o.__name__)
async def test_cuts(mock, fault):
    async with kernel_on(mock.config, 'mock1') as kernel:
        await on_all_five(kernel, fault(mock[0], kernel.conn.tunnel), 100, 20_000, .03)

async def test_cut_in_the_middle_of_256_mb(hosts):
    "With a real SSH server, which is restarted, and a flood in one direction only"
    async with kernel_on(hosts.client.config, 'host1') as kernel:
        cuts = [64*MB, 128*MB, 192*MB]
        def heard(n):
            if cuts and n >= cuts[0]: cuts.pop(0); hosts[0].restart_sshd() if len(cuts) == 1 else hosts[0].drop()
        reader, writer = await asyncio.open_connection('127.0.0.1', kernel.forwards[1].port)
        writer.write(json.dumps(dict(seed=1, parts=256, size=MB, pause=0)).encode() + b'\n')
        writer.write_eof()
        digest, n = hashlib.sha256(), 0
        while n < 256*MB:
            data = await asyncio.wait_for(reader.read(min(2**18, 256*MB-n)), 30)
            assert data, f'ended after {n} bytes'
            digest.update(data)
            heard(n := n + len(data))
        assert (await reader.read())[:32] == digest.digest() and not cuts

@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(Pace, 'shortest', 1)

async def test_links_cut_for_1_s_and_30_s_and_90_s(net, quick):
    """Three links at once: both ends go on, what they said meanwhile arrives, and the first of it soon after the link
    is back"""
    async def one(host, seconds):
        async with kernel_on(net.client.config, host.name, connect_timeout=2) as kernel:
            arrived, parts, clock = [], 10*(seconds + 10), Timer()
            def heard(n): arrived.append(float(clock))
            async def cut():
                await asyncio.sleep(1)
                host.cut()
                await asyncio.sleep(seconds)
                host.heal()
                healed.append(float(clock))
            healed = []
            watched = asyncio.ensure_future(exchange(kernel.forwards[0], 7, parts, 1000, .1, heard))
            await asyncio.gather(on_all_five(kernel, cut(), parts, 5000, .1), watched)
            first = next(o for o in arrived if o > healed[0])
            print(f'cut for {seconds} s: first byte {first-healed[0]:.2f} s after the link was back')
            return first-healed[0]
    slow = slowness()
    took = await asyncio.gather(*(one(net[i], seconds) for i, seconds in enumerate((1, 30, 90))))
    assert max(took) < 2*max(slow, slowness()), took

async def test_another_address(net, quick):
    """This machine gets another address in the middle of it all, as a laptop does that is carried from one network to
    another"""
    dev, old, new = f'gpt{net.num}', f'{net.addr(1)}/25', f'{net.addr(2)}/25'
    def ip(*args): subprocess.run(['ip', *args, 'dev', dev], check=True)
    async def moved():
        await asyncio.sleep(1)
        ip('addr', 'del', old)   # which would take others of the same network with it
        ip('addr', 'add', new)
    try:
        async with kernel_on(net.client.config, 'node1', connect_timeout=2) as kernel:
            was = kernel.conn.local_address
            await on_all_five(kernel, moved(), 200, 5000, .1)
            assert (was, kernel.conn.local_address) == (net.addr(1), net.addr(2))
    finally:
        ip('-4', 'addr', 'flush')
        ip('addr', 'add', old)

async def test_application_that_sleeps(net):
    "The whole host application stands still, and its connection dies meanwhile"
    for dies in False, True:
        p = subprocess.Popen([sys.executable, __file__, str(net.client.config), 'node1'], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
        assert await asyncio.to_thread(p.stdout.readline) == 'under way\n', p.communicate()
        p.send_signal(signal.SIGSTOP)
        await asyncio.sleep(6)
        if dies: net[0].drop()
        p.send_signal(signal.SIGCONT)
        out, err = await asyncio.to_thread(p.communicate, timeout=120)
        print(err)
        assert out == 'all of it\n'

async def asleep(config, host):
    async with kernel_on(config, host) as kernel:
        async def say():
            await asyncio.sleep(.5)
            print('under way', flush=True)
        await on_all_five(kernel, say(), 100, 20_000, .05)
    print('all of it')

COUNT = 'import time\nfor i in range(150): print(f"<{i}>", "x"*1000, flush=True); time.sleep(.05)'

async def cut_while(host, lines):
    "Kill connections, and restart sshd, each time that ten more lines have come"
    for cut in host.drop, host.drop, host.restart_sshd, host.drop:
        n = await lines() + 10
        async def more(): return await lines() >= n
        await until(more, 60, 'ten more lines')
        cut()

async def test_front_end(remote, hosts, tmp_path):
    """A front end of a Jupyter Server hears every line that a cell prints, in its order, while connections are killed
    and sshd is restarted"""
    async with jupyter(remote, tmp_path, GP_ENABLE_TUNNELING='True') as s:
        k = await s.start()
        async with s.channels(k) as c:
            await c.ready()
            msg, out = await c.start(COUNT), []
            hear = lambda m: m['msg_type'] == 'stream' and out.append(m['content']['text'])
            hearing = asyncio.ensure_future(c.wait(c.end_of(msg, hear), 60))
            async def lines(): return len(out)
            await cut_while(hosts[0], lines)
            await hearing
            assert [int(o) for o in re.findall(r'<(\d+)>', ''.join(out))] == list(range(150))
            assert await c.run('print(i)') == '149\n'
        await s.request('DELETE', f'api/kernels/{k}', 204)

# Bounds

async def flood(forward, parts, size=MB, say=False):
    "A connection from which nobody reads yet, to a kernel that sends as much as it can"
    reader, writer = await asyncio.open_connection('127.0.0.1', forward.port, limit=2**16)
    writer.write(json.dumps(dict(seed=1, parts=parts, size=size, pause=0, say=say)).encode() + b'\n')
    writer.write_eof()
    return reader, writer

def agent_of(kernel): return psutil.Process(kernel.conn.agent.hello['pid'])

async def test_more_than_is_kept(mock, caplog):
    "What was kept arrives, then the connection ends, and the log says why; the next connection is a new one"
    bounds = dict(buffer=2**18, spool=2**20)
    async with kernel_on(mock.config, 'mock1', bounds) as kernel:
        reader, writer = await flood(kernel.forwards[0], 1000)
        got = await reader.readexactly(MB)
        mock[0].refuse(); mock[0].drop()
        agent = agent_of(kernel)
        def connections(): return [o for o in agent.net_connections('tcp') if o.status == 'ESTABLISHED']
        await until(lambda: not connections(), 60, "the agent gives the kernel's connection up")
        mock[0].accept()
        got += await asyncio.wait_for(reader.read(-1), 30)
        assert b''.join(randoms(1, len(got)//MB+1, MB)).startswith(got) and len(got) > MB + bounds['spool']
        assert re.search('mock1: a connection of a client ended: the kernel wrote more than is kept', caplog.text)
        await exchange(kernel.forwards[0], 3, 3, 1000)

async def test_client_that_does_not_read(mock):
    "It stops its own kernel, and nothing grows; others go on"
    bounds = dict(buffer=2**18)
    async with kernel_on(mock.config, 'mock1', bounds) as kernel:
        agent = agent_of(kernel)
        before = agent.memory_info().rss
        reader, writer = await flood(kernel.forwards[0], 400, say=True)
        async def sent(): return max([0, *map(int, re.findall(r'^sent (\d+)$', await kernel.process.tail(), re.M))])
        n = -1
        while n != (n := await sent()) or n < 2: await exchange(kernel.forwards[1], 5, 3, 100_000, .1)
        assert n < 40, f'{n} MiB went into sockets and buffers'
        assert agent.memory_info().rss - before < 12*MB
        held = [o.got - o.passed for o in kernel.conn.tunnel.ends.values()]
        assert max(held) <= WINDOW
        digest, left = hashlib.sha256(), 400*MB
        while left: digest.update(data := await reader.read(min(left, 2**18))); left -= len(data)
        assert (await reader.read())[:32] == digest.digest()

async def test_small_messages_beside_a_flood(hosts):
    "Between a small message and its answer no more of the flood passes than one window and what is on its way"
    async with connected(hosts.client.config, 'host1') as conn:
        one, other = await start(conn), await start(conn)
        reader, writer = await flood(one.forwards[0], 1000)
        count = 0
        async def read():
            nonlocal count
            while data := await reader.read(2**18): count += len(data)
        reading = asyncio.ensure_future(read())
        between, took = [], []
        for i in range(100):
            t, before = Timer(), count
            await exchange(other.forwards[0], i, 1, 200)
            took.append(float(t)); between.append(count-before)
        reading.cancel()
        writer.close()
        print(f'a connection, a message and its answer beside a flood: median {sorted(took)[50]*1e3:.1f} ms, 99th '
              f'percentile {sorted(took)[98]*1e3:.1f} ms')
        assert sorted(between)[50] < 16*MB
        for o in one, other: await end(o)

async def test_requests_while_the_host_is_away(mock):
    "They are kept in memory up to the bound, and beyond it the client waits"
    bounds = dict(buffer=2**18)
    async with kernel_on(mock.config, 'mock1', bounds) as kernel:
        mock[0].refuse(); mock[0].drop()
        await until(lambda: not kernel.conn.is_up, 60)
        reader, writer = await asyncio.open_connection('127.0.0.1', kernel.forwards[0].port)
        writer.write(json.dumps(dict(seed=1, parts=1, size=10, pause=0)).encode() + b'\n')
        data = os.urandom(32*MB)
        writer.write(data)
        writer.write_eof()
        stream = next(iter(kernel.conn.tunnel.ends.values()))
        await until(lambda: not stream.out.room(), 60)
        assert stream.out.held <= 2*bounds['buffer'] and writer.transport.get_write_buffer_size() > 16*MB
        mock[0].accept()
        assert (await asyncio.wait_for(reader.read(), 60))[-32:] == hashlib.sha256(data).digest()

# Ends

async def test_agent_killed(mock):
    "Nobody has the bytes any more, so the connections end, and new ones go through the agent that took over"
    async with kernel_on(mock.config, 'mock1') as kernel:
        reader, writer = await flood(kernel.forwards[0], 100)
        await reader.readexactly(MB)
        agent_of(kernel).kill()
        with contextlib.suppress(ConnectionError):
            while await asyncio.wait_for(reader.read(2**18), 30): pass
        assert kernel.conn.tunnel.count == 1
        while True:
            with contextlib.suppress(AssertionError, OSError, asyncio.IncompleteReadError):
                await exchange(kernel.forwards[0], 3, 3, 1000); break

async def test_kernel_that_ends_while_the_link_is_down(mock):
    "What it said last arrives"
    async with kernel_on(mock.config, 'mock1') as kernel:
        reader, writer = await asyncio.open_connection('127.0.0.1', kernel.forwards[0].port)
        writer.write(json.dumps(dict(seed=1, parts=40, size=1000, pause=.05, say=True)).encode() + b'\n')
        got = await reader.readexactly(1000)
        mock[0].refuse(); mock[0].drop()
        # mock hosts have the files of this machine
        await until(lambda: 'sent 19' in Path(kernel.process.log).read_text(), 60)
        os.kill(kernel.process.pid, signal.SIGKILL)
        mock[0].accept()
        with contextlib.suppress(ConnectionError): got += await asyncio.wait_for(reader.read(), 30)
        assert b''.join(randoms(1, 40, 1000)).startswith(got) and len(got) >= 20_000

async def test_who_may_have_a_stream(mock):
    "Only who knows its secrets; and no port is connected to that is not of a kernel of this agent"
    async with kernel_on(mock.config, 'mock1') as kernel:
        reader, writer = await flood(kernel.forwards[0], 10)
        await reader.readexactly(MB)
        tunnel, (stream,) = kernel.conn.tunnel, kernel.conn.tunnel.ends.values()
        for app, token in ('0'*32, stream.token), (tunnel.app[:-1], stream.token), ('0'*32, ''):
            session = await kernel.conn.stream_session()
            assert await session.request('attach', app=app,
                                         streams=[[token, 1, stream.got, stream.passed]]) == dict(streams=[])
            session.close()
        with socket.create_server(('127.0.0.1', 0)) as other:
            other.settimeout(.5)
            for kernel_id in '0'*16, '../../x', None:
                f = await Forward(tunnel, KernelPort(other.getsockname()[1], kernel_id)).start()
                r, w = await asyncio.open_connection('127.0.0.1', f.port)
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await asyncio.wait_for(r.readexactly(1), 20)
                f.close()
            with pytest.raises(TimeoutError): other.accept()
        got = MB + len(await reader.readexactly(9*MB))
        assert got == 10*MB

async def test_streams_of_an_application_that_is_gone(mock):
    "They are held for it, until another application goes on with the kernel, or the kernel is forgotten"
    async with connected(mock.config, 'mock1') as keeper:
        kernel = await start(keeper)
        def held(): return len([o for o in agent_of(kernel).net_connections('tcp') if o.status == 'ESTABLISHED'])
        async with connected(mock.config, 'mock1') as gone:
            f = await Forward(gone.tunnel, kernel.forwards[0].target).start()
            reader, writer = await asyncio.open_connection('127.0.0.1', f.port)
            writer.write(json.dumps(dict(seed=1, parts=1000, size=100, pause=.1)).encode() + b'\n')
            await reader.readexactly(1000)
            gone.state.on('close')   # as if it had been killed: nobody says goodbye
            mock[0].drop()
            await until(lambda: not (gone.is_up or gone.tunnel.session), 60)
        await keeper.wait_connected()
        assert held() == 1, json.dumps([str(o) for o in agent_of(kernel).net_connections('tcp')])
        await exchange(kernel.forwards[0], 1, 1, 10)
        await until(lambda: not held(), 60)
        writer.close()
        await end(kernel)

if __name__ == '__main__': asyncio.run(asleep(*sys.argv[1:]))
