"The response server among strangers: many at once, slow ones, hostile ones; and its life cycle."
import asyncio, base64, gc, logging, os, resource, socket, statistics, sys
from contextlib import ExitStack
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pace import Timer, slowness, until, within
from launch_messages import b64, encode, report, seal, seal_v1
from gateway_provisioners_ssh.handshake import HandshakeError, LaunchKeys, LegacyKey, parse_message
from gateway_provisioners_ssh.response import Refusals, ResponseServer, listening_socket

@pytest.fixture(autouse=True)
def many_files():
    "Both ends of every connection are in this process"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft < want: resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

@pytest.fixture
async def server(caplog):
    s = ResponseServer()
    yield s
    await s.close()
    await asyncio.sleep(0)
    assert (s._listening, s._open, s._expected) == ({}, {}, {})
    assert not [r for r in caplog.records if r.name == 'asyncio'
                and r.levelno >= logging.ERROR], 'an exception in a callback'

def where(address):
    ip, port = address.rsplit(':', 1)
    return ip.strip('[]'), int(port)

async def send(address, raw, local=None):
    r, w = await asyncio.open_connection(*where(address), local_addr=(local, 0) if local else None)
    try:
        w.write(raw)
        w.write_eof()
        return await r.read()
    except ConnectionError: return b''
    finally: w.close()

async def launch_through(server, address, kernel_id, **kw):
    "A whole launch; gives how long the launcher took to be answered"
    launch = LaunchKeys(kernel_id)
    with server.expect(launch) as expected:
        message = seal(launch.ticket(), kernel_id, report(kernel_id))
        t = Timer()
        assert await send(address, message, **kw) == launch.answer(parse_message(message))
        assert await expected.future == report(kernel_id)
    return float(t)

def held(server): return sum(map(len, server._open.values()))

async def test_many_launches_at_once(server):
    address = await server.address('127.0.0.1')
    launches = [LaunchKeys(f'kernel-{i}') for i in range(64)]
    with ExitStack() as stack:
        expected = [stack.enter_context(server.expect(l)) for l in launches]
        messages = [seal(l.ticket(), l.kernel_id, report(l.kernel_id, pid=100+i)) for i, l in enumerate(launches)]
        order = sorted(range(64), key=lambda i: hash(str(i)))
        answers = dict(zip(order, await asyncio.gather(*(send(address, messages[i]) for i in order))))
        fields = await asyncio.gather(*(e.future for e in expected))
    assert [f['pid'] for f in fields] == list(range(100, 164))
    assert all(answers[i] == l.answer(parse_message(messages[i])) for i, l in enumerate(launches))

async def test_same_message_twice_at_the_same_time(server):
    address, launch = await server.address('127.0.0.1'), LaunchKeys('kernel-1')
    message = seal(launch.ticket(), 'kernel-1', report())
    with server.expect(launch) as expected:
        answers = await asyncio.gather(*(send(address, message) for _ in range(20)))
        await expected.future
    assert sorted(map(len, answers)) == [0]*19 + [65]
    assert server.refusals.total == {'no launch of that kernel is awaited': 19}

blobs = st.lists(st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(base64.b64encode),
    st.dictionaries(st.sampled_from(['version', 'kernel_id', 'enc', 'sealed', 'key', 'conn_info']),
                    st.sampled_from([1, 2, 'kernel-1', b64(bytes(32)), b64(bytes(96)), b64(bytes(256)), None, [],
                                     -1])).map(encode)), max_size=8)

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blobs, st.booleans())
def test_whatever_is_sent(caplog, blobs, legacy):
    async def check():
        s, key = ResponseServer(), LegacyKey() if legacy else None
        address, launch = await s.address('127.0.0.1'), LaunchKeys('kernel-1', legacy=key)
        with s.expect(launch) as expected:
            assert set(await asyncio.gather(*(send(address, b) for b in blobs))) <= {b''}
            assert not expected.future.done()
            assert len(await send(address, seal(launch.ticket(), 'kernel-1', report()))) == 65
        await s.close()
        assert s.refusals.total.total() == len(blobs)
    asyncio.run(check())
    assert not [r for r in caplog.records if r.name == 'asyncio' and r.levelno >= logging.ERROR]

async def test_thousand_silent_and_half_messages(server):
    "Launches go on; what is held is bounded in connections and in bytes"
    address = await server.address('127.0.0.1')
    half = base64.b64encode(os.urandom(45_000))
    conns = await asyncio.gather(*(asyncio.open_connection(*where(address)) for _ in range(1000)))
    for i, (_, w) in enumerate(conns):
        if i % 2: w.write(half)
    took = [await launch_through(server, address, f'kernel-{i}') for i in range(10)]
    assert held(server) <= 512 and statistics.median(took) < 2*await asyncio.to_thread(slowness), took
    assert sum(len(r.buf) for same in server._open.values() for r in same) <= 512*2**16
    for _, w in conns: w.close()
    await until(lambda: held(server) == 0)

@pytest.mark.skipif(sys.platform != 'linux', reason='needs a second loopback address')
async def test_flood_from_one_peer_does_not_push_out_another(server):
    "A launcher far away, that takes its time between connecting and sending"
    address, launch = await server.address('127.0.0.1'), LaunchKeys('kernel-1')
    with server.expect(launch) as expected:
        r, w = await asyncio.open_connection(*where(address), local_addr=('127.0.0.2', 0))
        message = seal(launch.ticket(), 'kernel-1', report())
        w.write(message[:100])
        flood = await asyncio.gather(*(asyncio.open_connection(*where(address)) for _ in range(1200)))
        w.write(message[100:])
        w.write_eof()
        assert len(await r.read()) == 65
        await expected.future
    for _, x in (*flood, (r, w)): x.close()

async def test_endless_streams(server):
    address = await server.address('127.0.0.1')
    def stream():
        sent = 0
        with socket.create_connection(where(address)) as s:
            try:
                while sent < 2**30: sent += s.send(b'A'*2**16)
            except ConnectionError: pass
        return sent
    before, sent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    async def launch_meanwhile():
        streams = [asyncio.to_thread(stream) for _ in range(4)]
        *more, took = await asyncio.gather(*streams, launch_through(server, address, 'kernel-1'))
        sent.extend(more)
        return took
    await within(2, launch_meanwhile)
    assert max(sent) < 2**26
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64*1024  # KiB
    assert server.refusals.total == {'the message is too long': len(sent)}

async def test_dribbling(caplog):
    "A byte now and then does not buy time"
    s = ResponseServer(timeout=0.3)
    address = await s.address('127.0.0.1')
    async def dribble():
        r, w = await asyncio.open_connection(*where(address))
        t = Timer()
        with pytest.raises(ConnectionError):
            while t < 10:
                w.write(b'A')
                await w.drain()
                await asyncio.sleep(0.02)
        return float(t)
    await within(2, dribble)
    await until(lambda: s.refusals.total.total())
    assert set(s.refusals.total) == {'it took too long'}
    await s.close()

async def test_breaking_off(server):
    address = await server.address('127.0.0.1')
    with socket.create_connection(where(address)) as c:
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')  # a reset instead of an end
        c.sendall(b'AAAA')
        await until(lambda: held(server) == 1)
    await until(lambda: server.refusals.total.total())
    assert server.refusals.total == {'it broke off before its end': 1}

async def test_forgeries_with_a_known_kernel_id(server):
    "They cost arithmetic; a launch among them is served all the same"
    address, launch = await server.address('127.0.0.1'), LaunchKeys('kernel-1')
    stranger = LaunchKeys('kernel-1')
    forged = [seal(stranger.ticket(), 'kernel-1', report()) for _ in range(100)]
    with server.expect(launch) as expected:
        flood = [asyncio.ensure_future(send(address, m)) for m in forged]
        await asyncio.sleep(0)
        assert len(await send(address, seal(launch.ticket(), 'kernel-1', report()))) == 65
        await expected.future
        assert set(await asyncio.gather(*flood)) == {b''}

async def test_nothing_secret_is_logged(server, caplog):
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    address = await server.address('127.0.0.1')
    legacy = LegacyKey().make()
    secrets = ['a0436f6c', '5a5a5a']
    for i, bad in enumerate((dict(), dict(pid=0), dict(key=''))):
        launch = LaunchKeys(f'kernel-{i}', legacy=legacy)
        secrets += [launch.ticket(), b64(launch._psk), repr(launch._psk), launch._psk.hex()]
        with server.expect(launch) as expected:
            await send(address, seal_v1(launch.public_key, report(f'kernel-{i+1}')))
            await send(address, seal(launch.ticket(), launch.kernel_id, report(launch.kernel_id, **bad)))
            try: caplog.records.append(logging.makeLogRecord(dict(msg=f'{expected.future!r} {await expected.future}')))
            except HandshakeError: logging.getLogger('test').exception('launch')
    text = '\n'.join(logging.Formatter().format(r) for r in caplog.records)
    assert 'refused' in text and not [s for s in secrets if s in text]

async def test_address_is_shared_and_survives_cancellation(server):
    asked = [asyncio.ensure_future(server.address('127.0.0.1')) for _ in range(10)]
    await asyncio.sleep(0)
    for a in asked[:5]: a.cancel()
    got = await asyncio.gather(*asked, return_exceptions=True)
    assert len({a for a in got if isinstance(a, str)}) == 1
    await launch_through(server, got[-1], 'kernel-1')

async def test_a_failure_to_listen_is_not_kept():
    with listening_socket('0.0.0.0', 0) as busy:
        port = busy.getsockname()[1]
        s = ResponseServer(port, 0, addr_any=True)
        got = await asyncio.gather(*(s.address('192.0.2.1') for _ in range(3)), return_exceptions=True)
        assert all(isinstance(e, OSError) and f'tried {port} to {port}' in str(e) for e in got)
    assert await s.address('192.0.2.1') == f'192.0.2.1:{port}'
    await launch_through(s, f'127.0.0.1:{port}', 'kernel-1')  # the wildcard
    await s.close()

async def test_two_host_applications_take_different_ports():
    first, second = (ResponseServer(port, 10, addr_any=True) for port in [free_run()]*2)
    a, b = await first.address('192.0.2.1'), await second.address('192.0.2.1')
    assert 0 < where(b)[1] - where(a)[1] <= 10
    await first.close(); await second.close()

def free_run():
    with listening_socket('0.0.0.0', 0) as s: return s.getsockname()[1]

async def test_ipv6():
    try: listening_socket('::1', 0).close()
    except OSError: pytest.skip('no IPv6 here')
    s = ResponseServer(free_run(), 10, addr_any=True)
    address = await s.address('0::1')
    assert address.startswith('[::1]:') and where(address)[1] != s.port
    await launch_through(s, address, 'kernel-1')
    everywhere = await s.address('2001:db8::1')
    assert everywhere.startswith('[2001:db8::1]:')
    await launch_through(s, f'[::1]:{where(everywhere)[1]}', 'kernel-1')
    assert where(await s.address('192.0.2.1'))[1]  # beside IPv4's wildcard
    await s.close()

def test_one_after_another_in_loops_of_their_own():
    for _ in range(3):
        async def whole():
            s = ResponseServer()
            await launch_through(s, await s.address('127.0.0.1'), 'kernel-1')
            await s.close()
        asyncio.run(whole())

async def test_no_descriptor_or_expectation_is_left():
    if not os.path.isdir('/proc/self/fd'): pytest.skip('counts descriptors in /proc')
    before = len(os.listdir('/proc/self/fd'))
    s = ResponseServer()
    address = await s.address('127.0.0.1')
    for i in range(50):
        launch = LaunchKeys('kernel-1')
        with s.expect(launch) as e:
            if i % 2: e.future.cancel()
            await send(address, b'x')
    await s.close()
    await until(lambda: gc.collect() is None or len(os.listdir('/proc/self/fd')) <= before)
    assert not s._expected

async def test_close_lets_waiters_go_and_can_be_followed_by_a_new_start(server):
    first = await server.address('127.0.0.1')
    waiting = asyncio.ensure_future(asyncio.wait({server.expect(LaunchKeys('kernel-1')).future}, timeout=5))
    await asyncio.sleep(0)
    await server.close()
    done, pending = await waiting
    assert [f.cancelled() for f in done] == [True] and not pending
    with pytest.raises(OSError): await asyncio.open_connection(*where(first))
    await launch_through(server, await server.address('127.0.0.1'), 'kernel-1')

def test_log_is_bounded_in_lines_and_memory(caplog):
    now = [0.]
    r = Refusals(logging.getLogger('test'), clock=lambda: now[0])
    for second in range(600):
        now[0] = float(second)
        for i in range(100): r.note(f'reason {i % 5}', f'2001:db8::{second:x}:{i:x}')
    lines = [x.getMessage() for x in caplog.records]
    assert len(lines) <= 10*21 and len(r._seen) <= 20 and len(r.total) == 5
    assert sum(int(l.split()[0]) for l in lines if 'not logged' in l) + r._silent + sum('refused:' in l
        for l in lines) == 60_000
