"""What an agent tells of its host and does for operators: figures, kernels and orphans, logs, an end, drained hosts,
room and GPUs; and balancing by that, exactly."""
import asyncio, contextlib, os, subprocess, sys, time
from collections import Counter
from pathlib import Path
import pytest
from gateway_provisioners_ssh.balance import HostReport, HostReports, LeastLoad, Ledger, LoadBalancer, Need
from gateway_provisioners_ssh.hosts import parse_hosts
from gateway_provisioners_ssh.launchers import agent
from gateway_provisioners_ssh.remote import Refusal, RemoteProcess, spawn
from pace import until
from test_agent import OTHER_VERSION, VERSIONS, fifo, group_ended, host, host_of, interpreter, logged, sources, write

async def listed(session, **kw): return (await session.request('list', **kw))['kernels']
async def orphans(session): return [o['id'] for o in await listed(session) if o['orphan']]
async def orphaned(session, p):
    "Once `p` is the only orphan of its host"
    async def alone(): return await orphans(session) == [p.id]
    await until(alone, 60, 'orphaned')

@contextlib.contextmanager
def nvidia_smi(host, text='0, GPU-a, L4, 23034, 100, 0\n1, GPU-b, L4, 23034, 100, 0\n2, GPU-c, L4, 23034, 9000, 99\n',
               seconds=0):
    "A host with GPUs, the last of which some other program uses"
    (bin := host.tmp/'bin').mkdir(exist_ok=True)
    (bin/'nvidia-smi').write_text(f'#!/bin/sh\nsleep {seconds}\ncat <<E\n{text}E\n')
    (bin/'nvidia-smi').chmod(0o755)
    host.env['PATH'] = f'{bin}:{host.env["PATH"]}'
    yield

class Reports:
    "Takes the event `load` of a session"
    def __init__(self, session): session.processes['', 'load'], self.all = self, []
    def on_event(self, event, m): self.all.append(m)
    def on_agent_end(self): pass

# Figures

async def test_stats(host):
    s = await host.sessions()
    said = await s.request('stats', log_dir=str(host.tmp), ports=[40000, 60000], command='python', is_python=True,
                           gpus=True)
    assert (said['cores'] >= .1 and 0 < said['memory']['available'] <= said['memory']['total']
            and abs(said['clock'] - time.time()) < 60)
    assert (said['log_dir']['writable'] and said['log_dir']['free'] > 0
            and 0 < said['ports']['free'] <= said['ports']['tried'] <= 64)
    assert (said['command']['python'] == '%d.%d.%d' % sys.version_info[:3] and said['command']['ipykernel']
            and said['gpus'] == [] and said['kernels'] == 0)
    assert await host.left() == []

@pytest.mark.parametrize('limit, used, expected',
                         [('1073741824', '536870912', (2**30, 2**29 + 1000)), ('max', '5', None), ('', '', None)])
def test_memory_of_a_control_group(tmp_path, limit, used, expected):
    (tmp_path/'memory.max').write_text(limit)
    (tmp_path/'memory.current').write_text(used); (tmp_path/'memory.stat').write_text('anon 5\ninactive_file 1000\n')
    got = agent.memory([(str(tmp_path), 2)])
    assert (got['total'], got['available']) == (expected
                                                or tuple(agent.memory([])[o]
                                                         for o in ('total',
                                                             'available'))) or not expected and got[
                                                                 'total'] == agent.memory([])['total']

def test_cores_of_a_control_group(tmp_path):
    (tmp_path/'cpu.max').write_text('50000 100000')
    assert agent.cores([(str(tmp_path), 2)]) == .5
    (tmp_path/'cpu.max').write_text('max 100000')
    assert agent.cores([(str(tmp_path), 2)]) == agent.cores([])

async def test_the_agent_goes_on_while_a_look_hangs(host):
    "A child does what may take long, is ended when it takes too long, and leaves neither process nor descriptor"
    with nvidia_smi(host, seconds=1000):
        s = await host.open(("ChildTask(agent, work, answer, 30)", "ChildTask(agent, work, answer, 1)"))
        fds = len(os.listdir(f'/proc/{s.hello["pid"]}/fd'))
        looks = [asyncio.ensure_future(s.request('stats', gpus=True)) for _ in range(3)]
        for _ in range(20): await s.ping()
        assert not any(o.done() for o in looks)
        for o in looks:
            with pytest.raises(Refusal, match='did not say how it is'): await o
        await until(lambda: len(os.listdir(f'/proc/{s.hello["pid"]}/fd')) == fds, what='descriptors closed')
        mine = Path(f'/proc/{s.hello["pid"]}/task/{s.hello["pid"]}/children')
        await until(lambda: not mine.read_text().split(), what='no child left')

@pytest.mark.parametrize('version', VERSIONS)
async def test_every_python(host, version):
    "All that operators ask, on each Python that a host may have"
    python = interpreter(version)
    if not python: pytest.fail(f'pyenv has no Python {version}')
    host.pythons = (python,)
    with nvidia_smi(host):
        s = await host.open()
        heard, out = Reports(s), Output(s, 'follow-1')
        assert s.hello['python'].startswith(version + '.')
        said = await s.request('stats', log_dir=str(host.tmp), ports=[40000, 50000], command=python, is_python=True,
                               gpus=True, connect=['127.0.0.1', 1])
        assert (said['command']['python'].startswith(version + '.') and len(said['gpus']) == 3
                and said['memory']['total'] and 'refused' in said['connect'].lower())
        p = await host.start('echo "<$CUDA_VISIBLE_DEVICES>"; sleep 1000', s,
                             room=dict(max_kernels=1, memory=1, gpus=2))
        await s.request('follow', id=p.id, name='follow-1')
        await logged(p, '<0,1>')
        k, = await listed(s, measure=True)
        assert k['gpus'] == ['GPU-a', 'GPU-b'] and k['rss'] and k['started']
        await s.request('observe', seconds=100)
        await until(lambda: heard.all and HostReport.of(heard.all[-1])
                    and heard.all[-1]['gpus'] == dict(total=3, free=0))
        await s.request('drain', on=True)
        await s.request('drain', on=False)
        await s.request('stop', id=p.id)
        await asyncio.wait_for(out.over.wait(), 60)
        await p.release(False)

# Kernels

async def test_list_says_what_each_uses(host):
    s = await host.sessions()
    p = await host.start('x=$(head -c 20000000 /dev/zero | tr "\\0" x); echo ready; while :; do :; done',
                         about=dict(kernel='k1', user='ada', spec='Python SSH', gpus=7, n=5))
    await logged(p, 'ready')
    k, = await listed(s, measure=True)
    assert (k['about'] == dict(kernel='k1', user='ada', spec='Python SSH') and k['watched'] and not k['orphan']
            and k['running'])
    assert (k['now'] > .2 and k['cpu'] > 0 and k['rss'] > 20_000_000 and k['pss'] > 15_000_000
            and abs(k['started'] - time.time()) < 120)
    await p.signal(9)
    await asyncio.wait_for(asyncio.shield(p.exited), 60)
    k, = await listed(s)
    assert (k['running'], k['status'], k['orphan']) == (False, -9, False)
    await p.release(False)
    assert await host.left() == []

async def test_orphans_are_those_that_nobody_watches(host):
    a, b = await host.open(), await host.open()
    p, q = await host.start('sleep 1000', a), await host.start('sleep 1000', b, log=host.log + '2')
    assert await orphans(b) == []
    p.forget(); a.close()
    await orphaned(b, p)
    k = next(o for o in await listed(b) if o['id'] == p.id)
    assert abs(k['since'] - time.time()) < 120
    with pytest.raises(Refusal, match='no orphan'): await b.request('stop', id=q.id, orphan=True)
    await b.request('stop', id=p.id, orphan=True)
    await until(lambda: group_ended(p.pid), what='its end')
    assert not group_ended(q.pid) and [o['id'] for o in await listed(b)] == [q.id]
    await q.release(False)
    assert await host.left() == ['kernel.log']

async def test_since_survives_the_agent(host):
    a = await host.open()
    p = await host.start('sleep 1000', a)
    p.forget(); a.close()
    b = await host.open()
    async def an_orphan(): return (o := (await listed(b))[0])['orphan'] and o
    k = await until(an_orphan, 60)
    await host.kill(b.hello['pid'])
    c = await host.open()
    again, = await listed(c)
    assert (again['orphan'], again['since']) == (True, k['since'])
    await c.request('stop', id=p.id, orphan=True)
    await until(lambda: group_ended(p.pid), what='its end')

async def test_orphans_of_another_versions_agent(host):
    "Each of the two agents knows of the other's watchers, and of the other's orphans"
    a, b = await host.open(), await host.open(OTHER_VERSION)
    p = await host.start('sleep 1000', a)
    assert await orphans(b) == []   # watched by its own agent's client
    async def of_b(): return b
    q = RemoteProcess(of_b, p.id, p.log, '', p.pid).follow()
    assert await q.signal(0)
    keep = await host.open()
    p.forget(); a.close()
    async def unwatched(): return not any(o['watched'] for o in await listed(keep))
    await until(unwatched, 60)
    assert await orphans(keep) == []   # watched through the other
    with pytest.raises(Refusal): await keep.request('stop', id=p.id, orphan=True)
    q.forget(); b.close()
    await orphaned(keep, p)
    c = await host.open(OTHER_VERSION)
    await orphaned(c, p)
    await c.request('stop', id=p.id, orphan=True)
    await until(lambda: group_ended(p.pid), what='its end')

async def test_who_watches_a_stopped_kernel_is_told(host):
    a, b = await host.open(), await host.open()
    p = await host.start('trap "" TERM; echo ready; while :; do sleep .1; done', a)
    await logged(p, 'ready')
    await b.request('stop', id=p.id, by='ada on gateway')
    assert await asyncio.wait_for(p.exited, 60) == -9 and p.stopped
    assert await b.request('stop', id=p.id) == dict(running=False)
    await p.release(False)
    assert await host.left() == []

# Logs

class Output:
    def __init__(self, session, name): session.processes['', name], self.text, self.over = self, '', asyncio.Event()
    def on_event(self, event, m): self.text += m['text']; m.get('over') and self.over.set()
    def on_agent_end(self): self.over.set()

async def test_follow_through_rotation_and_to_the_end(host):
    s = await host.open()
    p = await host.start('read x <"$FIFO"; i=0; while [ $i -lt 3000 ]; do echo "line $i é"; i=$((i+1)); [ $((i % 100)) '
                         '= 0 ] && sleep .05; done; exit 3', s, env=fifo(host), max_bytes=40_000)
    out = Output(s, 'follow-1')
    await s.request('follow', id=p.id, name='follow-1')
    await write(host, 'go')
    await asyncio.wait_for(out.over.wait(), 60)
    got = [o for o in out.text.splitlines() if o.startswith('line')]
    assert got == [f'line {i} é' for i in range(3000)] and '[ended with status 3]' in out.text and '�' not in out.text
    await p.release(True)
    found = (await s.request('logs', dir=str(host.tmp)))['logs']
    assert found == []   # its name is no kernel's

async def test_logs_of_this_user_only(host):
    for o in 'a', 'b': (host.tmp/f'kernel-{o}.log').write_text('x')
    os.symlink('/etc/passwd', host.tmp/'kernel-c.log')
    os.utime(host.tmp/'kernel-a.log', (1, 1))
    s = await host.open()
    assert [o['kernel'] for o in (await s.request('logs', dir=str(host.tmp)))['logs']] == ['b', 'a']
    assert (await s.request('logs', dir='/no/such'))['logs'] == []

# Drained

KERNEL = dict(argv=['sleep', '1000'], env={}, max_bytes=65536, ticket={})

async def test_drained_for_all_and_after_the_agent(host):
    a, b = await host.open(), await host.open()
    heard = Reports(b)
    assert a.hello['drained'] is False
    await a.request('drain', on=True, by='ada')
    await until(lambda: heard.all)
    assert heard.all[-1]['drained']['by'] == 'ada' and HostReport.of(heard.all[-1]).drained
    for s in a, b:
        with pytest.raises(Refusal, match='no room for a kernel: the host is drained by ada'):
            await s.request('start', id='0'*16, log=host.log, **KERNEL)
    p = await host.start('true', a)   # what is no kernel may run
    await p.release(False)
    await host.kill(a.hello['pid'])
    c = await host.open()
    assert c.hello['drained'] is True
    with pytest.raises(Refusal, match='drained'): await c.request('start', id='0'*16, log=host.log, **KERNEL)
    assert (await c.request('drain', on=False))['drained'] is None and (await host.open()).hello['drained'] is False
    assert (await c.request('start', id='0'*16, log=host.log, **KERNEL))['pid']
    await c.request('forget', id='0'*16, keep_log=False)

async def test_a_mark_of_another_host_in_a_shared_home(host):
    s = await host.open()
    Path(s.hello['cache'], 'drained-some-other-host').write_text('{}')
    assert (await host.open()).hello['drained'] is False
    Path(s.hello['cache'], 'drained-' + os.uname().nodename).write_text('[not json')
    assert (await host.open()).hello['drained'] is True

# Room

async def test_at_most_so_many(host):
    a, b = await host.open(), await host.open()
    heard = Reports(b)
    p = await host.start('sleep 1000', a)
    with pytest.raises(Refusal, match='no room for a kernel: 1 kernels run there already'):
        await b.request('start', id='0'*16, log=host.log, room=dict(max_kernels=1), **KERNEL)
    assert (heard.all[-1]['kernels'], heard.all[-1]['mine']) == (1, 0)   # told before it was refused
    q = await host.start('sleep 1000', b, log=host.log + '2', room=dict(max_kernels=2))
    for o in p, q: await o.release(False)

async def test_gpus_are_reserved_across_applications_and_crashes(host):
    with nvidia_smi(host):
        a, b = await host.open(), await host.open()
        p = await host.start('echo "<$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER>"; sleep 1000', a, room=dict(gpus=1))
        await logged(p, '<0 PCI_BUS_ID>')
        with pytest.raises(Refusal, match='1 of 3 GPUs are free, 2 wanted'):
            await host.start('true', b, log=host.log + '2', room=dict(gpus=2))
        await host.kill(a.hello['pid'])
        c = await host.open()
        async def of_c(): return c
        q = await spawn(c, of_c, host.log + '3', argv=['/bin/sh', '-c', 'echo "<$CUDA_VISIBLE_DEVICES>"; sleep 1000'],
                        env={}, max_bytes=65536, room=dict(gpus=1))
        await logged(q, '<1>')
        assert sorted(g for o in await listed(c) for g in o['gpus']) == ['GPU-a', 'GPU-b']
        with pytest.raises(Refusal, match='0 of 3 GPUs'):
            await spawn(c, of_c, host.log + '4', argv=['true'], env={}, max_bytes=65536, room=dict(gpus=1))
        await q.release(False)
        r = await spawn(c, of_c, host.log + '5', argv=['/bin/sh', '-c', 'echo "<$CUDA_VISIBLE_DEVICES>"'], env={},
                        max_bytes=65536, room=dict(gpus=1))
        await logged(r, '<1>')
        await r.release(False)

async def test_gpus_of_starts_at_once(host):
    with nvidia_smi(host, seconds=.2):
        s = await host.open()
        async def one(i):
            try: return await host.start('sleep 1000', s, log=f'{host.log}{i}', room=dict(gpus=1))
            except Refusal as e: return str(e)
        got = await asyncio.gather(*map(one, range(5)))
        assert sum(isinstance(o, str) for o in got) == 3
        for o in got: not isinstance(o, str) and await o.release(False)

async def test_a_start_that_is_called_off_while_it_waits_for_gpus(host):
    with nvidia_smi(host, seconds=.5):
        s = await host.open()
        start = asyncio.ensure_future(host.start('sleep 1000', s, room=dict(gpus=1)))
        await s.ping()
        start.cancel()
        await asyncio.wait([start])
        await s.request('stats', gpus=True)   # is over later than that of the start
        assert await listed(s) == []
    host.close_sessions()

async def test_reports_come_by_themselves(host):
    often = 'LOAD_INTERVAL = 5', 'LOAD_INTERVAL = .1'
    a, b = await host.open(often), await host.open(often)
    heard = Reports(b)
    await b.request('observe', seconds=100)
    await until(lambda: len(heard.all) > 3)
    p = await host.start('sleep 1000', a)
    await until(lambda: heard.all[-1]['kernels'] == 1)
    assert HostReport.of(heard.all[-1]).others == 1 and heard.all[-1]['mine'] == 0
    await p.release(False)
    await until(lambda: heard.all[-1]['kernels'] == 0)
    await b.request('observe', seconds=0)
    await asyncio.sleep(0)
    await b.ping()
    n = len(heard.all)
    for _ in range(5): await b.request('stats')
    assert len(heard.all) <= n + 1

# Balancing

@pytest.mark.parametrize('weights', [(1, 1, 1), (2, 1, 1)], ids=['equal', 'weighted'])
async def test_two_applications_at_once_are_exact(weights):
    """Forty starts each, at the same time, on the same three hosts: no host gets more than its share and one more. The
    agents are real"""
    names = [o for i, w in enumerate(weights) for o in [f'h{i}']*w]
    async with contextlib.AsyncExitStack() as stack:
        hosts = {o: await stack.enter_async_context(host_of()) for o in dict.fromkeys(names)}
        # all on one machine
        calm = (('load=load, cores=cores(groups)', 'load=[0, 0, 0], cores=4'),
                ('memory=memory(groups), clock', 'memory={}, clock'))
        async def application(i):
            ledger, known, rule, refused = Ledger(), HostReports(), LeastLoad(), 0
            sessions = {k: await v.open(*calm) for k, v in hosts.items()}
            for k, s in sessions.items(): known.attach(k, s)
            async def start(n):
                nonlocal refused
                while True:
                    claim = ledger.pick(rule, names, known.current())
                    h = claim.host
                    most = ledger.load[h] + known.current()[h].others
                    try:
                        return await hosts[h].start('sleep 1000', sessions[h], log=f'{hosts[h].log}-{i}-{n}',
                                                    room=dict(max_kernels=most))
                    except Refusal as e:
                        assert agent.CROWDED in str(e)
                        claim.release(); refused += 1
            await asyncio.gather(*map(start, range(40)))
            return refused
        refused = await asyncio.gather(application(0), application(1))
        counts = {k: len(await listed(v.opened[0])) for k, v in hosts.items()}
        assert sum(counts.values()) == 80
        for k, n in counts.items(): assert n <= 80*names.count(k)/len(names) + 1, (counts, refused)

RUNNABLE = """load=[float(sum(_text_of('/proc/%s/stat' % p).rpartition(')')[2].split()[:1] == ['R'] and
    ('TMPDIR=%s\\0' % os.environ['TMPDIR']) in _text_of('/proc/%s/environ' % p)
    for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()))]*3, cores=4"""

async def test_a_host_under_load_gets_no_kernels_while_others_are_idle():
    """The load is real: programs that compute. All hosts are this machine, so each counts its own runnable processes,
    as its load average would"""
    apart = (('load=load, cores=cores(groups)', RUNNABLE), ('memory=memory(groups), clock', 'memory={}, clock'),
             ('LOAD_INTERVAL = 5', 'LOAD_INTERVAL = .1'))
    async with contextlib.AsyncExitStack() as stack:
        hosts = {f'h{i}': await stack.enter_async_context(host_of()) for i in range(3)}
        ledger, known, rule = Ledger(), HostReports(), LeastLoad()
        sessions = {k: await v.open(*apart) for k, v in hosts.items()}
        for k, s in sessions.items():
            known.attach(k, s)
            await s.request('observe', seconds=600)
        def load(k): return known.current()[k].load or 0
        async def started(n):
            for _ in range(n):
                claim = ledger.pick(rule, list(hosts), known.current())
                await hosts[claim.host].start('sleep 1000', sessions[claim.host],
                                              log=f'{hosts[claim.host].log}-{ledger.load[claim.host]}')
            return Counter(ledger.load)
        computing = [subprocess.Popen(['sh', '-c', 'while :; do :; done'], env=hosts['h1'].env) for _ in range(6)]
        try:
            await until(lambda: load('h1') > 1, what='the load of h1')
            assert await started(12) == dict(h0=6, h2=6)
        finally:
            for o in computing: o.kill(); o.wait()
        await until(lambda: load('h1') == 0, what='the end of the load of h1')
        assert await started(6) == dict(h0=6, h1=6, h2=6)

def test_two_connections_that_come_first_at_once_find_one_directory(tmp_path, monkeypatch, mkdir=os.mkdir):
    def late(name, mode):
        mkdir(name, mode)   # by the other one, just before
        raise FileExistsError(name)
    monkeypatch.setattr(os, 'mkdir', late)
    assert (agent.private_directory([[f'{tmp_path}/a', f'{tmp_path}/b']]) == f'{tmp_path}/a'
            and os.listdir(tmp_path) == ['a'])

def test_lists_in_files(tmp_path):
    (f := tmp_path/'hosts').write_text('fire*2 # a comment\n\n# water\nada@water:2222, earth\n')
    assert [str(o) for o in parse_hosts(f'@{f}')] == ['fire', 'fire', 'ada@water:2222', 'earth']
    f.write_text('wind\n')
    assert [str(o) for o in parse_hosts([f'@{f}', 'x'])] == ['wind', 'x']
    for text, why in ('a b\n', 'a b'), ('@other\n', 'another list'), ('# none\n', 'empty'), ('fire*0',
        'weight'), ('fire*', 'weight'), ('fire*101', 'weight'):
        f.write_text(text)
        with pytest.raises(ValueError, match=why): parse_hosts(f'@{f}')
    with pytest.raises(ValueError, match='cannot be read: No such file'): parse_hosts(f'@{tmp_path}/none')

def test_balancers_of_others_get_reports_if_they_want_them():
    class Most(LoadBalancer):
        def order(self, hosts, load, reports): return sorted(hosts, key=lambda o: -reports[o].available)
    class Old(LoadBalancer):
        def order(self, hosts, load): return list(hosts)
    reports = dict(a=HostReport(available=5), b=HostReport(available=7))
    assert [Ledger().pick(o(), ['a', 'b'], reports).host for o in (Most, Old)] == ['b', 'a']

def test_whatever_a_host_says_is_a_report():
    for o in ({}, dict(load=1), dict(load=[None]), dict(load=[1e999], cores=0),
              dict(memory=5, gpus=[], kernels=-5, mine=10**9), dict(kernels=[], gpus=dict(free='x'))):
        r = HostReport.of(o)
        assert (r.others == 0 and r.gpus is None and LeastLoad().order(['a', 'b'], {}, dict(a=r)) == ['a', 'b']
                and Need(1, 1).lacking(r) == '')
