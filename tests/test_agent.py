"""The agent of a host: what it starts, watches and leaves behind, on each Python that a host may have; and what
crashes, full disks and other users can do to it."""
import ast, asyncio, contextlib, contextvars, hashlib, json, os, random, re, shutil, signal, socket, subprocess
import sys, tempfile, zlib
from pathlib import Path
import pytest
from gateway_provisioners_ssh import remote
from gateway_provisioners_ssh.launchers import agent
from gateway_provisioners_ssh.remote import EXIT_UNKNOWN, AgentClosed, AgentSession, NoPython, Refusal, RemoteProcess
from gateway_provisioners_ssh.remote import spawn, tree_of
from conftest import need
from kernels import ticket_of
from pace import Timer, until

ME, OTHER = 1001, 1002   # users whom nobody else is
PYTHON = os.path.realpath(sys.executable)
SOURCE = Path(agent.__file__).read_text()
# what it does now and then, sooner
QUICK = (('self.idle_timeout if self.clients else 1, self.end_if_idle', '.1, self.end_if_idle'),
    ('self.loop.call_later(30, self.maintain)', 'self.loop.call_later(.3, self.maintain)'))

def changed(*changes):
    "What `agent_source` gives for an agent in whose source each `(old, new)` was replaced"
    text = SOURCE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return zlib.compress(text.encode()), hashlib.sha256(text.encode()).hexdigest()[:12]

COMPRESSED, VERSION = changed(*QUICK)

source = contextvars.ContextVar('source')   # what is sent

@pytest.fixture(autouse=True)
def sources(monkeypatch, real=remote.agent_source):
    monkeypatch.setattr(remote, 'agent_source', lambda: source.get(None) or real())

class Host:
    """Logins of one user: `open` is what an SSH session does, `sessions` gives a live one; `shell` is the login shell,
    `prefix` what makes it that user's"""
    def __init__(self, dir, *prefix):
        self.dir, self.tmp, self.home = dir, dir/'t', dir/'home'
        self.prefix, self.shell, self.pythons, self.uid, self.changes = prefix, '/bin/sh', (PYTHON,), os.getuid(), QUICK
        for o in self.tmp, self.home: o.mkdir()
        self.env = dict(PATH=os.environ['PATH'], HOME=str(self.home), TMPDIR=str(self.tmp))
        self.log, self.sh, self.one_at_a_time = str(self.tmp/'kernel.log'), None, asyncio.Lock()
        self.opened, self.agents, self.started = [], set(), []

    async def open(self, *changes, idle_timeout=0, **env):
        "A session with the agent, or with one of another version: `changes` are `(old, new)` in its source"
        p = await asyncio.create_subprocess_exec(*self.prefix, self.shell, '-c', agent.COMMAND,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, env=self.env | env, start_new_session=True)
        s = AgentSession(p.stdin.write, p.stdin.close, 'here', idle_timeout)
        s.process = p
        async def read():
            with contextlib.suppress(OSError):
                while data := await p.stdout.read(2**16): s.feed(data)
            s.eof()
        s.reading = asyncio.create_task(read())
        self.opened.append(s)
        source.set(changed(*self.changes, *changes))
        await asyncio.wait_for(s.start(self.pythons), 60)
        self.agents.add(s.hello['pid'])
        await asyncio.wait_for(s.ping(), 60)   # its socket is there
        return s

    async def sessions(self):
        async with self.one_at_a_time:
            if self.sh is None or self.sh.closed: self.sh = await self.open()
        return self.sh

    async def start(self, script, session=None, **kw):
        kw = dict(env={}, max_bytes=65536, log=self.log) | kw
        async def given(): return session
        p = await asyncio.wait_for(spawn(session or await self.sessions(), given if session else self.sessions,
            argv=['/bin/sh', '-c', script], **kw), 60)
        self.started.append(p)
        return p

    @property
    def private(self): return self.tmp/f'gpssh-{self.uid}'

    def close_sessions(self):
        for o in self.opened: o.close()

    async def kill(self, pid, signum=9):
        "End an agent so that its sessions notice"
        os.kill(pid, signum)
        await until(lambda: not agent.start_time(pid), what='the end of the agent')
        for o in self.opened:
            if o.hello and o.hello['pid'] == pid: await asyncio.wait_for(o.over, 20)

    async def left(self):
        "The files in the end, once every agent has ended by itself"
        self.close_sessions()
        await until(lambda: not any(map(agent.start_time, self.agents)), 30, 'the end of all agents')
        return sorted(o for o in (str(o.relative_to(self.tmp)) for o in self.tmp.rglob('*'))
            if o.split('/')[0] != 'bin')

    async def close(self):
        for p in self.started:
            p.forget()
            with contextlib.suppress(ProcessLookupError): p.returncode is None and p.pid > 1 and os.killpg(p.pid, 9)
        self.close_sessions()
        for o in self.agents:
            with contextlib.suppress(OSError):
                if Path(f'/proc/{o}/comm').read_text() == 'gpssh-agent\n': os.kill(o, 9)
        for o in self.opened:
            with contextlib.suppress(ProcessLookupError): o.process.returncode is None and o.process.kill()
            await o.process.wait()
            await asyncio.wait([o.reading])

OTHER_VERSION = ('"""What runs on a host:', '"""What a host runs, in another version:')

@contextlib.asynccontextmanager
async def host_of(*prefix):
    dir = Path(tempfile.mkdtemp(prefix='gpt-'))   # a short path, which others can enter, and not only pytest's user
    dir.chmod(0o755)
    host = Host(dir, *prefix)
    try: yield host
    finally:
        await host.close()
        shutil.rmtree(dir, ignore_errors=True)

@pytest.fixture
async def host():
    async with host_of() as host: yield host

async def logged(p, *words):
    "The log, once all the words are lines of it"
    async def seen(): return set(words) <= set((said := await p.tail(1000)).splitlines()) and said
    return await until(seen, 60, f'{words} in the log')

async def exited(p): return await asyncio.wait_for(asyncio.shield(p.exited), 60)
def fds(pid): return len(os.listdir(f'/proc/{pid}/fd'))
def group_ended(pgid):
    try: os.killpg(pgid, 0)
    except ProcessLookupError: return True

def fifo(host):
    "The environment of a kernel that reads from a pipe of its own"
    os.mkfifo(host.dir/'in')
    return dict(FIFO=str(host.dir/'in'))

async def write(host, line): await asyncio.wait_for(asyncio.to_thread((host.dir/'in').write_text, line + '\n'), 60)

# A process's life

async def test_life(host):
    p = await host.start('echo ready; sleep 1000; exit 5', title='a kernel')
    await logged(p, 'ready')
    host.sh.close()
    assert await p.signal(0)
    os.kill(int(open(f'/proc/{p.pid}/task/{p.pid}/children').read()), 15)
    assert await exited(p) == 5 and not p.lost and not await p.signal(0)
    first, second, *_, last = (await p.tail()).splitlines()   # bash has a word about a process that was killed
    assert (first, second, last) == ('a kernel', 'ready', '[ended with status 5]')
    await p.release(keep_log=False)
    assert await host.left() == []

@pytest.mark.parametrize('script, status',
    [('exit 0', 0), ('exit 255', 255), ('kill -KILL $$', -9), ('kill -TERM $$', -15), ('exec >&- 2>&-; exit 3', 3),
        ('sleep 1000 & exit 4', 4)])
async def test_exit_statuses(host, script, status):
    "Also of one that closed its output, and of one whose child keeps that open"
    p = await host.start(script)
    assert await exited(p) == status and not p.lost
    await p.release()
    with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, 9)
    assert await host.left() == ['kernel.log']

async def test_what_cannot_be_started(host):
    s, was = await host.sessions(), None
    for _ in range(3):
        for kw, why in [
                (dict(argv=['/no/such']), '/no/such: not found'), (dict(argv=['/tmp']), 'Permission denied'),
                (dict(argv=[]), 'list index out of range'), (dict(argv=['sh'], env={'a=b': 'c'}), 'environment'),
                (dict(argv=['sh', 'a\0b']), 'null'),
                (dict(argv=['sh'], log='/no/such/log'), 'cannot write the log /no/such/log: No such'),
                (dict(argv=['sh'], max_bytes='x'), 'TypeError'), (dict(argv=['sh'], orphan_timeout='x'), 'ValueError')]:
            with pytest.raises(Refusal, match=why):
                await spawn(s, host.sessions, **dict(dict(log=host.log, env={}, max_bytes=65536, ticket={}), **kw))
        was = was or fds(s.hello['pid'])
    assert fds(s.hello['pid']) == was and not s.processes
    assert (await s.request('list'))['kernels'] == []
    assert await host.left() == []

@pytest.mark.parametrize('timeout', [.2, 1.5])
async def test_orphan_timeout_leaves_only_the_log(host, timeout):
    p = await host.start('sleep 1000', orphan_timeout=timeout)
    p.forget()
    assert await host.left() == ['kernel.log']
    await until(lambda: group_ended(p.pid))

async def test_orphan_timeout_does_not_count_while_it_is_watched(host):
    p, q = [await host.start('sleep 1000', orphan_timeout=.2, log=f'{host.log}{i}') for i in range(2)]
    second = await host.open()
    await second.request('watch', id=p.id)
    q.forget()
    p.forget()
    host.sh.close()
    await until(lambda: group_ended(q.pid), what='the end of the one that nobody watches')
    assert await p.signal(0)

@pytest.mark.parametrize('timeout', [40*86400, 1e300])
async def test_a_very_long_orphan_timeout(host, timeout):
    "No system call takes that many milliseconds"
    p = await host.start('sleep 1000', orphan_timeout=timeout)
    p.forget()
    pid = host.sh.hello['pid']
    host.sh.close()
    assert (await host.sessions()).hello['pid'] == pid
    await p.signal(9)
    await p.release(False)
    assert await host.left() == []

async def test_variables_of_the_login(host):
    "A kernel gets what the login has, whatever the agent's own start uses"
    names = 'p l n e s r x f IFS OLD ENV BASH_ENV PYTHONHOME PYTHONPATH PYTHONSTARTUP LD_DEBUG_OUTPUT CDPATH LC_ALL'
    odd = dict.fromkeys([*names.split(), 'LANG'], '1') | {'A': 'ünï \n two', 'BASH_FUNC_f%%': '() { echo f; }'}
    (host.home/'json.py').write_text('raise SystemExit("the home is no place for modules")')
    (host.home/'os.py').write_text('raise SystemExit("the home is no place for modules")')
    host.env |= odd
    out = host.dir/'env'
    p = await spawn(await host.sessions(), host.sessions, host.log, argv=['env', '-0'], env=dict(KERNEL_X='y'),
        max_bytes=65536)
    assert await exited(p) == 0
    got = dict(o.split('=', 1) for o in (await p.tail(1000)).split('\n[ended')[0].split('\n', 1)[1].split('\0')
        if '=' in o)
    want = {k: v for k, v in host.env.items() if k not in ('IFS', 'BASH_FUNC_f%%')}
    want |= dict(KERNEL_X='y', PWD=str(host.home))
    assert {k: got.get(k) for k in want} == want
    assert not [k for k in got if k.startswith('GPSSH')] and len(got) <= len(want) + 4, (set(got) - set(want))

async def test_a_relative_cache_and_no_home(host):
    s = await host.open(XDG_CACHE_HOME='cache', HOME='')
    assert s.hello['cache'].startswith('/') and s.hello['home'].startswith('/')

# Agents that are killed

@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGTERM])
async def test_agent_killed(host, signum):
    "Its kernel goes on, also while it writes a lot; the next agent has it"
    script = 'while :; do read x <"$FIFO" && { yes | head -c 300000; echo done $x; }; done'
    p = await host.start('trap "echo interrupted" INT; ' + script, env=fifo(host), max_bytes=200_000)
    await write(host, 'a')
    await logged(p, 'done a')
    was = host.sh.hello['pid']
    await host.kill(was, signum)
    await write(host, 'b')   # it writes more than a pipe holds, to nobody
    await logged(p, 'done b')
    assert (await host.sessions()).hello['pid'] != was
    await p.signal(2)
    await logged(p, 'interrupted')
    await write(host, 'c')
    await logged(p, 'done c')
    await p.signal(9)
    assert await exited(p) == EXIT_UNKNOWN and p.lost
    await p.release(keep_log=False)
    assert await host.left() == []

async def test_hangup_of_the_session(host):
    "An SSH server hangs up when a session ends"
    p = await host.start('sleep 1000')
    pid = host.sh.hello['pid']
    os.killpg(os.getpgid(pid), 1)
    host.sh.close()
    assert (await host.sessions()).hello['pid'] == pid and await p.signal(0)

async def test_ended_while_no_agent_was_there(host):
    p = await host.start('sleep 1000')
    await host.kill(host.sh.hello['pid'])
    os.killpg(p.pid, 9)
    assert await exited(p) == EXIT_UNKNOWN and p.lost
    await p.release(False)
    assert await host.left() == []

async def test_the_number_of_a_killed_agents_kernel_is_another_process(host):
    p = await host.start('sleep 1000')
    await host.kill(host.sh.hello['pid'])
    record = json.loads((file := host.private/f'k-{p.id}/record').read_text())
    other = subprocess.Popen(['sleep', '1000'], start_new_session=True)
    try:
        file.write_text(json.dumps(record | dict(pid=other.pid, groups=[other.pid])))
        assert await exited(p) == EXIT_UNKNOWN
        assert not await p.signal(9)
        await p.release(False)
        assert other.poll() is None
    finally: other.kill(); other.wait(); os.killpg(p.pid, 9)

async def test_a_process_that_ended_before_its_time_was_noted(host):
    "A record without one means no process at all"
    p = await host.start('sleep 1000')
    await host.kill(host.sh.hello['pid'])
    record = json.loads((file := host.private/f'k-{p.id}/record').read_text())
    os.killpg(p.pid, 9)
    await until(lambda: not agent.start_time(p.pid))
    file.write_text(json.dumps(record | dict(start='')))
    assert await exited(p) == EXIT_UNKNOWN
    await p.release(False)
    assert await host.left() == []

async def test_ended_kernels_wait_for_their_host_application(host):
    p = await host.start('sleep 1000')
    p.forget()
    host.sh.close()
    os.utime(host.private/f'k-{p.id}/record', (0, 0))   # it began long ago
    os.killpg(p.pid, 9)
    await until(lambda: not any(map(agent.start_time, host.agents)), 30)
    q = RemoteProcess(host.sessions, p.id, p.log, '', p.pid).follow()
    assert await exited(q) == -9 and not q.lost
    await q.release(False)
    assert await host.left() == []

# Someone clears up

async def test_directory_removed(host):
    "By a cleaner of /tmp: the kernel goes on, the agent makes its directory anew, and the next session finds both"
    p = await host.start('while :; do read x <"$FIFO"; echo $x; done', env=fifo(host))
    pid = host.sh.hello['pid']
    shutil.rmtree(host.private)
    await host.sh.request('watch', id=p.id, pgid=p.pid)
    await write(host, 'still')
    await logged(p, 'still')
    await until((host.private/f'agent-{VERSION}').exists, 30, 'the directory made anew')
    host.sh.close()
    assert (await host.sessions()).hello['pid'] == pid and await p.signal(0)
    await host.kill(pid)   # and the next agent opens the pipe without its name
    await write(host, 'again')
    await logged(p, 'again')
    await p.signal(9)
    assert await exited(p) == EXIT_UNKNOWN
    await p.release(False)
    assert await host.left() == []

async def test_directory_removed_from_under_an_end(host):
    p = await host.start('sleep 1000')
    await host.sh.request('watch', id=p.id, pgid=p.pid)
    shutil.rmtree(host.private)
    await p.signal(15)
    assert await exited(p) == -15
    assert not await p.signal(15)
    await p.release(False)
    assert await host.left() == []

async def test_directory_removed_from_an_idle_agent(host):
    await host.sessions()
    shutil.rmtree(host.private)
    assert await host.left() == []

async def test_socket_removed(host):
    "The next session finds the kernels: with the agent, which has put its socket back, or with another of its version"
    p = await host.start('sleep 1000')
    pid = host.sh.hello['pid']
    os.unlink(host.private/f'agent-{VERSION}')
    second = await host.open()
    assert (await second.request('watch', id=p.id))['running']
    host.sh.close()
    os.killpg(p.pid, 15)
    assert await exited(p) == -15 and not p.lost
    await p.release(False)
    assert await host.left() == []

async def test_pipe_removed(host):
    p = await host.start('while :; do read x <"$FIFO"; echo $x; done', env=fifo(host))
    os.unlink(host.private/f'k-{p.id}/out')
    await host.kill(host.sh.hello['pid'])
    await write(host, 'still')
    await logged(p, 'still')

# Several host applications, several versions

async def test_two_host_applications(host):
    "One agent for both: each may learn of the other's kernel, and stays when the other goes"
    p, second = await host.start('sleep 1000'), await host.open()
    assert second.hello['pid'] == host.sh.hello['pid']
    async def sessions(): return second
    q = RemoteProcess(sessions, p.id, p.log, '', p.pid).follow()
    assert await q.signal(0) and [o['id'] for o in (await second.request('list'))['kernels']] == [p.id]
    host.sh.close()
    p.forget()
    await q.signal(15)
    assert await exited(q) == -15 and not q.lost
    await q.release(False)
    assert await host.left() == []

async def test_forgotten_twice(host):
    p, second = await host.start('trap "" TERM; sleep 1000; sleep 1000'), await host.open()
    forget = [asyncio.ensure_future(o.request('forget', id=p.id, log=p.log, keep_log=False))
        for o in (host.sh, second, host.sh)]
    await asyncio.wait_for(asyncio.gather(*forget), 60)
    await second.request('forget', id=p.id, log=p.log, keep_log=False)
    assert await host.left() == []

async def test_another_version(host):
    "Kernels stay with theirs; both know the end, and how"
    a = await host.sessions()
    b = await host.open(OTHER_VERSION)
    assert a.hello['pid'] != b.hello['pid'] and a.hello['version'] != b.hello['version']
    async def of_a(): return a
    async def of_b(): return b
    for session, signum in (a, 15), (b, 9), (a, 0):
        p = await host.start('sleep 1000' if signum else 'sleep .1; exit 7', session)
        q = RemoteProcess(of_b if session is a else of_a, p.id, p.log, '', p.pid).follow()
        if signum: assert await q.signal(signum)
        assert [await exited(p), await exited(q)] == [-signum or 7]*2 and not p.lost and not q.lost
        await q.release(False)
        p.forget()
    for o in a, b: assert [k for k in (await o.request('list'))['kernels'] if k['running']] == []
    assert await host.left() == []

async def test_another_versions_orphans(host):
    "A kernel that is watched through either agent is no orphan to the other"
    async def orphaned(session):
        "Start another one with such a time, and wait until that has made its agent end it"
        pid = (await session.request('start', id=os.urandom(8).hex(), argv=['sleep', '1000'], env={}, max_bytes=65536,
            log=host.log + '2', orphan_timeout=.5))['pid']
        for o in host.opened: o is keep or o.close()
        await until(lambda: group_ended(pid), what='the end of an orphan')
    keep, b = await host.sessions(), await host.open(OTHER_VERSION)
    p = await host.start('sleep 1000', orphan_timeout=.3)
    await b.request('list')   # has seen it, but does not watch it
    await orphaned(b)
    assert await p.signal(0), 'watched by its agent, ended by the other'
    keep = await host.open(OTHER_VERSION)
    async def other(): return keep
    q = RemoteProcess(other, p.id, p.log, '', p.pid).follow()
    assert await q.signal(0)
    p.forget()
    await orphaned(host.sh)
    assert await q.signal(0), 'watched by the other one, ended by its agent'
    q.forget()
    assert await host.left() == ['kernel.log', 'kernel.log2']
    await until(lambda: group_ended(p.pid))

async def test_another_version_takes_over(host):
    "What a killed agent had, one of another version that runs already takes over, so that each kernel's output is read"
    p = await host.start('while :; do read x <"$FIFO"; yes | head -c 300000; echo $x; done', env=fifo(host))
    b = await host.open(OTHER_VERSION)
    async def of_b(): return b
    q = RemoteProcess(of_b, p.id, p.log, '', p.pid).follow()
    assert await q.signal(0)
    p.forget()
    await host.kill(host.sh.hello['pid'])
    await write(host, 'still')
    await logged(q, 'still')
    assert json.loads((host.private/f'k-{p.id}/record').read_text())['agent'][0] == b.hello['pid']

async def test_adopted_by_one_of_two(host):
    "Agents of two versions come at once, after the one before them was killed: one pipe has one reader"
    p = await host.start('read x <"$FIFO"; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; done; sleep 1000',
        env=fifo(host), max_bytes=2**20)
    await host.kill(host.sh.hello['pid'])
    p.forget()
    pair = await asyncio.gather(host.open(OTHER_VERSION), host.open())
    links = lambda pid: [os.readlink(f'/proc/{pid}/fd/{fd}') for fd in os.listdir(f'/proc/{pid}/fd')]
    assert sorted(sum(o.endswith('/out') for o in links(s.hello['pid'])) for s in pair) == [0, 1]
    await write(host, 'go')
    await until(lambda: Path(host.log).read_text().endswith('line 20000\n'))
    assert Path(host.log).read_text() == '\n' + ''.join(f'line {i}\n' for i in range(1, 20001))

# Pythons and shells

VERSIONS = '3.6 3.7 3.8 3.9 3.10 3.11 3.12 3.13'.split()
def interpreter(version):
    for root in Path(os.environ.get('PYENV_ROOT') or '/root/.pyenv')/'versions', Path('/root/.pyenv/versions'):
        for o in sorted(root.glob(version + '.*/bin/python')): return str(o)

@pytest.mark.parametrize('version', VERSIONS)
async def test_every_python(host, version):
    python = interpreter(version)
    if not python: pytest.fail(f'pyenv has no Python {version}')
    host.pythons = (python,)
    host.env['PATH'] = '/usr/bin:/bin'
    s = await host.sessions()
    assert s.hello['python'].startswith(version + '.')
    p = await host.start('echo "$KERNEL_LAUNCH_SECRET"; trap "exit 6" INT; while :; do sleep .05; done',
        ticket=dict(kernel_id='k'), title='ein kernel: ü')
    await until(lambda: (host.private/f'k-{p.id}/record').exists())
    ticket = await ticket_of(p)
    title = (await p.tail(1000)).splitlines()[0]
    with socket.socket(socket.AF_UNIX) as c:
        c.connect(ticket['socket'])
        c.sendall(json.dumps(dict(token=ticket['token'], ip='127.0.0.1', pgid=p.pid,
            fields=dict(a=1))).encode() + b'\n')
        assert c.recv(1000) == b'{}\n'
    assert await asyncio.wait_for(p.report, 20) == dict(a=1)
    assert await p.signal(2) and await exited(p) == 6
    assert (await p.tail(1)) == '[ended with status 6]\n' and title == 'ein kernel: ü'
    await p.release(False)
    p = await host.start('trap "exit 6" INT; while :; do sleep .05; echo x; done')
    await host.kill(s.hello['pid'])
    assert await p.signal(2) and await exited(p) == EXIT_UNKNOWN and p.lost
    await p.release(False)
    assert await host.left() == []

def test_syntax_floor():
    "Nothing newer than Python 3.6, but for what is used only where it is"
    vermin = Path(sys.executable).parent/'vermin'
    need(None if vermin.exists() else 'needs vermin')
    r = subprocess.run([vermin, '-t=3.6-', '--no-tips', '--exclude', 'os.pidfd_open', '--violations', agent.__file__],
        capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr

def arguments_of(operation):
    "The keys of a request that an operation reads, itself or in what it calls with the request"
    functions, found, seen = {}, set(), set()
    top = ast.parse(SOURCE).body
    for o in (*top, *(f for o in top if isinstance(o, ast.ClassDef) for f in o.body)):
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)): functions.setdefault(o.name, []).append(o)
    def is_request(o): return isinstance(o, ast.Name) and o.id == 'm' or isinstance(o, ast.Attribute) and o.attr == 'm'
    def read(name):
        if name in seen: return
        seen.add(name)
        for o in (o for f in functions.get(name, ()) for o in ast.walk(f)):
            if isinstance(o, ast.Subscript) and is_request(o.value): found.add(o.slice.value)
            elif isinstance(o, ast.Compare) and is_request(o.comparators[0]): found.add(o.left.value)
            elif isinstance(o, ast.Call) and getattr(o.func, 'attr', '') == 'get' and is_request(o.func.value):
                found.add(o.args[0].value)
            elif isinstance(o, ast.Call) and any(map(is_request, o.args)):
                read(getattr(o.func, 'attr', getattr(o.func, 'id', '')))
    hooks = dict(start=['admit', 'spawn'], forget=['forget']).get(operation, ())
    for f in agent.OPERATIONS[operation], *(f for o in hooks for f in agent.HOOKS[o].values()): read(f.__name__)
    # a template has no ticket
    return found - {'n', 'op', 'as', 'size', 'event'} - ({'ticket', 'ports'} if operation == 'standby' else set())

def test_the_table_of_operations():
    "Lists every operation, with the arguments that it reads"
    cells = json.loads((Path(agent.__file__).parents[2]/'nbs/08_agent.ipynb').read_text())['cells']
    table = ''.join(next(o['source'] for o in cells
        if '| request | arguments |' in ''.join(o['source']))).split('| request | arguments |')[1].split('\n\n')[0]
    rows = {re.findall(r'`(\w+)`', o.split('|')[1])[0]: set(re.findall(r'`(\w+)`', o.split('|')[2]))
        for o in table.splitlines() if o.startswith('| `')}
    assert rows == {o: arguments_of(o) for o in agent.OPERATIONS}

def empty_path(host, **links):
    (bin := host.dir/'bin').mkdir()
    for name, to in links.items(): (bin/name).symlink_to(to)
    host.pythons, host.env['PATH'] = (), str(bin)

async def test_no_python(host):
    empty_path(host)
    with pytest.raises(NoPython, match='no agent could be started on here: no Python 3.6 or newer'): await host.open()

@pytest.mark.parametrize('name', ['python', 'python3'])
async def test_only_python_2(host, name):
    need(None if interpreter('2.7') else 'needs Python 2.7')
    empty_path(host, **{name: interpreter('2.7')})
    with pytest.raises(NoPython, match='no agent could be started on here: no Python 3.6 or newer$'): await host.open()

async def test_python_2_before_python_3(host):
    need(None if interpreter('2.7') else 'needs Python 2.7')
    empty_path(host, python3=interpreter('2.7'), python=interpreter('3.6'))
    host.pythons = ('~/no/such', interpreter('2.7'), "it's not there")
    assert (await host.open()).hello['python'].startswith('3.6')

@pytest.mark.parametrize('shell', ['/bin/sh', 'bash', 'dash', 'busybox sh', 'csh', 'tcsh', 'fish', 'zsh', 'ksh'])
async def test_login_shells(host, shell):
    name, *rest = shell.split()
    need(None if shutil.which(name) else f'needs {name}')
    host.prefix, host.shell = ((shutil.which(name),), rest[0]) if rest else ((), shutil.which(name))
    p = await host.start('exit 5')
    assert await exited(p) == 5

def login_shell(host, script):
    host.shell = str(host.dir/'login')
    Path(host.shell).write_text(script)
    os.chmod(host.shell, 0o755)

@pytest.mark.parametrize('banner', ['echo "Welcome to $0"; echo "no Python 3.6 or newer is fun"',
    'printf "no newline at the end of a banner"', 'yes banner | head -c 60000', 'printf "\\377\\000\\033[2J"'])
async def test_login_that_prints(host, banner):
    login_shell(host, f'#!/bin/sh\n{banner}\nexec /bin/sh "$@"\n')
    p = await host.start('exit 5')
    assert await exited(p) == 5

async def test_login_that_prints_without_end(host):
    login_shell(host, '#!/bin/sh\nyes banner | head -c 1000000\nexec /bin/sh "$@"\n')
    with pytest.raises(AgentClosed, match='it wrote too much.*banner'): await host.open()
    assert len(host.opened[0].login_output) < 2**18

async def test_no_login(host):
    host.shell = '/bin/false'
    with pytest.raises(AgentClosed, match='^no agent could be started on here$'): await host.open()
    login_shell(host, '#!/bin/sh\necho This account is not available. >&2\nexit 1\n')
    with pytest.raises(AgentClosed, match='no agent could be started on here: This account is not available.'):
        await host.open()

# Places that are full, read-only, or far down

def namespace(*mounts): return ('unshare', '-m', '/bin/sh', '-c', ' && '.join([*mounts, 'exec "$@"']), 'sh')
def root(): need(None if os.geteuid() == 0 else 'needs root')

async def test_read_only_home(host):
    root()
    host.prefix = namespace(f'mount -t tmpfs -o ro none {host.home}')
    host.env.pop('XDG_CACHE_HOME', None)
    s = await host.open()
    assert s.hello['cache'] == f'{host.tmp}/gpssh-0/files'
    (spec := host.dir/'spec').mkdir()
    (spec/'a.sh').write_text('exit 5')
    assert Path(f'{await s.ship(tree_of(str(spec)))}/a.sh').read_text() == 'exit 5'

async def test_full_tmp(host):
    "Nothing is started that could not be recorded, and a clear error says why; when there is room again all is well"
    root()
    host.prefix = namespace(f'mount -t tmpfs -o size=256k none {host.tmp}',
        f'(head -c 1000000 /dev/zero >{host.tmp}/big 2>/dev/null || :)')
    s = await host.sessions()
    for log in host.log, str(host.dir/'kernel.log'):
        with pytest.raises(Refusal, match='No space left on device'): await host.start('sleep 1000', log=log)
    assert (await s.request('list'))['kernels'] == []
    inside = Path(f'/proc/{s.hello["pid"]}/root{host.tmp}')
    assert sorted(o.name for o in inside.iterdir()) == ['big', 'gpssh-0']
    assert [o.name for o in (inside/'gpssh-0').iterdir()] == [f'agent-{VERSION}']
    os.unlink(inside/'big')
    # more than there is room for
    p = await host.start('yes | head -c 1000000; echo the end; sleep 1000', log=str(host.tmp/'kernel.log'),
        max_bytes=2**20)
    await until(lambda: os.stat(inside/'kernel.log').st_size > 100_000)
    assert await p.signal(15) and await exited(p) == -15

async def test_no_inodes_left(host):
    root()
    host.prefix = namespace(f'mount -t tmpfs -o nr_inodes=4 none {host.tmp}')
    s = await host.sessions()   # root, directory, socket: one more
    with pytest.raises(Refusal, match='No space left on device'): await host.start('sleep 1000')
    assert [o.name for o in Path(f'/proc/{s.hello["pid"]}/root{host.private}').iterdir()] == [f'agent-{VERSION}']

async def test_adopting_when_tmp_is_full(host):
    root()
    (mount := host.dir/'m').mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', mount], check=True)
    try:
        host.env['TMPDIR'] = str(mount)
        p = await host.start('sleep 1000')
        await host.kill(host.sh.hello['pid'])
        with contextlib.suppress(OSError): (mount/'big').write_bytes(bytes(2**20))
        assert await p.signal(15) and await exited(p) == EXIT_UNKNOWN
        await p.release(False)
        (mount/'big').unlink()
        await host.left()
        assert [*mount.iterdir()] == []
    finally: await host.close(); subprocess.run(['umount', '-l', mount])

async def test_very_long_tmpdir(host):
    "A socket's path has to be short"
    long = host.tmp/('x'*200)
    long.mkdir()
    host.env['TMPDIR'] = str(long)
    # what is in the way of no other test
    if os.geteuid() == 0: host.prefix = namespace(f'mount --bind {host.tmp} /tmp')
    p = await host.start('exit 5', log='/tmp/kernel.log' if host.prefix else host.log)
    assert await exited(p) == 5
    await p.release(False)
    assert [*long.iterdir()] == []

# Many, and slow ones

async def test_200_kernels(host):
    s, n = await host.sessions(), 200
    was = fds(s.hello['pid'])
    ps = await asyncio.gather(*(spawn(s, host.sessions, f'{host.log}-{i}', argv=['sleep', '1000'], env={},
        max_bytes=65536) for i in range(n)))
    host.started += ps
    assert len((await s.request('list'))['kernels']) == n
    for p in ps: os.killpg(p.pid, 9)   # all at once
    assert await asyncio.gather(*map(exited, ps)) == [-9]*n and not any(p.lost for p in ps)
    await asyncio.gather(*(p.release(False) for p in ps))
    assert (await s.request('list'))['kernels'] == []
    await until(lambda: fds(s.hello['pid']) == was, what='no descriptor more than before')
    assert await host.left() == []

async def test_ends_by_itself(host):
    "Soon after its last kernel and its last connection, and leaves no file"
    host.changes = ()
    p = await host.start('sleep 1000')
    s, second = host.sh, await host.open()
    await p.release(False)
    assert [o.name for o in host.private.iterdir()] == [f'agent-{changed()[1]}']
    s.close()
    await second.ping()
    t = Timer()
    assert await host.left() == []
    print(t)

class Raw:
    "A client that does as it likes: `send` and `received` frames"
    def __init__(self, host, token=''):
        self.p = subprocess.Popen(['/bin/sh', '-c', agent.COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=host.env, start_new_session=True)
        self.send(agent.bootstrap((PYTHON,), COMPRESSED, VERSION))
        self.hello = json.loads(self.p.stdout.readline())
        host.agents.add(self.hello['pid'])
    def send(self, data): self.p.stdin.write(data); self.p.stdin.flush()
    def ask(self, data, n):
        self.send(data)
        while (m := json.loads(self.p.stdout.readline())).get('n') != n: pass
        return m
    def close(self):
        for o in self.p.stdin, self.p.stdout:
            with contextlib.suppress(OSError): o.close()
        self.p.wait()

async def test_a_client_that_never_reads(host):
    "What waits for it is bounded; then it is dropped, and nobody else notices"
    await host.sessions()
    Path(host.log).write_text('x'*65535 + '\n')
    c = await asyncio.to_thread(Raw, host)
    assert c.hello['pid'] == host.sh.hello['pid']
    def ask():
        for i in range(2000): c.send(agent.encode(dict(n=i, op='log', path=host.log, lines=1)))
    with pytest.raises(BrokenPipeError): await asyncio.wait_for(asyncio.to_thread(ask), 60)
    await host.sh.ping()
    most = int(next(o for o in open(f'/proc/{c.hello["pid"]}/status') if o.startswith('VmHWM')).split()[1])
    assert most < 120_000, f'{most} kB'
    await asyncio.to_thread(c.close)
    os.unlink(host.log)
    assert await host.left() == []

async def test_a_silent_client(host):
    "Is dropped after the time that it named; one that speaks is not"
    await host.sessions()
    silent, other = await host.open(idle_timeout=.3), await host.open(idle_timeout=.3)
    async def beat():
        while True: await other.ping(); await asyncio.sleep(.02)
    beating = asyncio.create_task(beat())
    await asyncio.wait_for(silent.over, 60)
    assert not other.closed and not host.sh.closed
    beating.cancel()

@pytest.mark.parametrize('idle_timeout', [1e300, float('inf'), float('nan'), -1, 'x', 10**19, 3e6])
async def test_odd_idle_timeout(host, idle_timeout):
    s = await host.sessions()
    with contextlib.suppress(Refusal): await s.request('ping', idle_timeout=idle_timeout)
    await asyncio.gather(*(s.ping() for _ in range(3)))
    assert not (host.private/'errors').exists()

# Files

def put(tree, path, data=b'x', **kw): return dict(op='put', tree=tree, path=path, **kw), data
TREE = 'ab'*32

async def parts(host, s): return [o for o in os.listdir(s.hello['cache']) if o.startswith('.')]

@pytest.mark.parametrize('path', ['../x', '/etc/x', 'a/../../x', '.', '', '..', 'a\0b', 5, None, '\ud800', 'a'*300,
    'dir/..', '/', '//x'])
async def test_bad_paths(host, path):
    s = await host.sessions()
    with pytest.raises(Refusal): await s.request('put', b'x', tree=TREE, path=path, mode=0)
    await s.ping()
    s.close()
    second = await host.open()
    assert os.listdir(second.hello['cache']) == [] and not [*host.dir.rglob('x')]

@pytest.mark.parametrize('tree', ['..', 'ab'*32 + '\n', 'AB'*32, 5, ''])
async def test_bad_trees(host, tree):
    s = await host.sessions()
    for kw in dict(path='x'), dict(done=True):
        with pytest.raises(Refusal): await s.request('put', b'x', tree=tree, **kw)
    assert os.listdir(s.hello['cache']) == []

async def test_done_without_files(host):
    s = await host.sessions()
    with pytest.raises(Refusal, match='cannot write the files'): await s.request('put', tree=TREE, done=True)
    assert os.listdir(s.hello['cache']) == []

async def test_links_are_not_followed(host):
    s = await host.sessions()
    await s.request('put', b'x', tree=TREE, path='a', mode=0)
    part = Path(s.hello['cache'])/next(o for o in os.listdir(s.hello['cache']))
    (part/'link').symlink_to(host.dir/'elsewhere')
    with pytest.raises(Refusal): await s.request('put', b'x', tree=TREE, path='link', mode=0)
    assert not (host.dir/'elsewhere').exists()

async def test_interrupted_put(host):
    "What a client began to send and left is removed, and adds nothing to what the next one sends"
    await host.sessions()
    for _ in range(3):
        s = await host.open()
        await s.request('put', b'half', tree=TREE, path='a', mode=0)
        s.close()
        await until(lambda: os.listdir(s.hello['cache']) == [], what='what was begun is removed')
    s = await host.open()
    await host.sh.request('put', b'first ', tree=TREE, path='d/a', mode=0o700)
    await s.request('put', b'another', tree=TREE, path='d/a', mode=0o600)
    await host.sh.request('put', b'second', tree=TREE, path='d/a', mode=0o700)
    for o in host.sh, s: await o.request('put', tree=TREE, done=True)
    for o in host.sh, s:
        await o.request('put', b'once more', tree=TREE, path='d/a', mode=0)
        await o.request('put', tree=TREE, done=True)
    assert os.listdir(s.hello['cache']) == [TREE]
    file = Path(s.hello['cache'])/TREE/'d/a'
    assert file.read_text() == 'first second' and oct(file.stat().st_mode) == '0o100700'

async def test_two_clients_send_one_tree(host):
    spec = host.dir/'spec'
    for i in range(20):
        (file := spec/f'd{i%3}/{i}.py').parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(1000*i))
    (spec/'large.jar').write_bytes(large := os.urandom(3*2**20 + 5))
    tree, ss = tree_of(str(spec)), [await host.sessions(), await host.open(), await host.open(OTHER_VERSION)]
    assert len(places := {*await asyncio.gather(*(s.ship(tree) for s in ss))}) == 1
    place = Path(places.pop())
    assert os.listdir(place.parent) == [tree.name]
    files = sorted(str(o.relative_to(place)) for o in place.rglob('*') if o.is_file())
    assert files == sorted(o for o, _ in tree.files)
    assert (place/'large.jar').read_bytes() == large
    assert tree.name in (await host.open()).hello['trees']

# Hand-overs

async def test_sessions_while_the_agent_leaves(host):
    "30 sessions that come and go about the moment in which an agent ends by itself"
    soon = ('self.idle_timeout if self.clients else 1, self.end_if_idle', '.02, self.end_if_idle')
    host.changes = ()
    async def one(seed):
        r = random.Random(seed)
        for _ in range(5):
            s = await host.open(soon)
            await s.ping()
            s.close()
            await asyncio.sleep(r.random()*.05)
    await asyncio.wait_for(asyncio.gather(*map(one, range(6))), 200)
    assert await host.left() == []

async def test_a_large_environment_while_the_agent_leaves(host):
    "More than a socket holds, so that whoever hands it over waits for an agent that wants to leave"
    soon = ('self.idle_timeout if self.clients else 1, self.end_if_idle', '0, self.end_if_idle')
    host.changes = ()
    first = await host.open(soon)
    pid = first.hello['pid']
    os.kill(pid, signal.SIGSTOP)
    first.close()
    host.env |= {f'LARGE_{i}': 'x'*100_000 for i in range(6)}
    second = asyncio.ensure_future(host.open(soon))
    def waiting():
        locks = [o.split() for o in open('/proc/locks')]
        inode = os.stat(host.private).st_ino
        return any(o[1] == 'FLOCK' and o[5].endswith(f':{inode}') for o in locks if '->' not in o)
    await until(waiting, 30, 'the lock of whoever comes')
    await asyncio.sleep(.3)   # so that it has filled the socket; else this shows nothing
    os.kill(pid, signal.SIGCONT)
    await asyncio.wait_for(second, 30)

async def test_a_killed_agents_socket(host):
    await host.sessions()
    pid = host.sh.hello['pid']
    await host.kill(pid)
    assert (host.private/f'agent-{VERSION}').is_socket()
    await asyncio.gather(*(host.open() for _ in range(4)))
    assert len(host.agents - {pid}) == 1 and await host.left() == []

# Reports

def tell(host, line):
    "What the agent answers to a line at its socket"
    with socket.socket(socket.AF_UNIX) as c:
        c.settimeout(30)
        c.connect(str(host.private/f'agent-{VERSION}'))
        c.sendall(line)
        with contextlib.suppress(OSError): return c.recv(65536)

async def reporting(host, script='sleep 1000', **kw):
    p = await host.start(f'echo "$KERNEL_LAUNCH_SECRET"; {script}', ticket={}, **kw)
    return p, (await ticket_of(p))['token']

def report(host, token, **said): return tell(host, json.dumps(dict(token=token, **said)).encode() + b'\n')

async def test_a_report_is_taken_once(host):
    p, token = await reporting(host)
    assert report(host, 'another', fields={}) == b''
    assert report(host, token, ip='127.0.0.1', fields=dict(a=1)) == b'{}\n'
    assert report(host, token, ip='127.0.0.1', fields=dict(a=2)) == b''
    assert await asyncio.wait_for(p.report, 20) == dict(a=1)

@pytest.mark.parametrize('said', [dict(pgid=10**19), dict(pgid=2**31), dict(ip='x'*300), dict(ip='\0'),
    dict(ip='a.b.c.invalid'), dict(ip='256.1.1.1'),
    dict(remove=['/tmp/', '/tmp/.', '/tmp//x', '/tmp/x/../..', 5, '/etc']),
    dict(ip='0.0.0.0'), dict(ip=5), dict(fields=5), dict(remove={})], ids=str)
async def test_odd_reports(host, said):
    "Are taken as far as they make sense, and the kernel's end is told all the same"
    (precious := host.tmp/'precious').touch()
    s = await host.sessions()
    was = fds(s.hello['pid'])
    p, token = await reporting(host)
    assert (await asyncio.to_thread(report, host, token, **said)).endswith(b'}\n')
    record = json.loads((host.private/f'k-{p.id}/record').read_text())
    assert not set(record['remove']) - {'/tmp//x'} and all(0 < o < 2**31 for o in record['groups'])
    assert await p.signal(15) and await exited(p) == -15
    assert precious.exists()
    await p.release(False)
    await until(lambda: fds(s.hello['pid']) <= was + ('ip' in said))

async def test_a_report_too_large_to_pass_on(host):
    "A frame has a bound; a launcher cannot make its host useless for all others"
    p, token = await reporting(host)
    await asyncio.to_thread(report, host, token, fields=dict(a='x'*3_000_000))
    await host.sh.ping()
    assert await p.signal(15) and await exited(p) == -15

async def test_groups_of_others(host):
    "A launcher names a process group that this user may not signal: the end of the kernel is told all the same"
    root()
    stranger = subprocess.Popen(['sleep', '1000'], start_new_session=True)
    host.tmp.chmod(0o777), host.home.chmod(0o777)
    host.prefix, host.pythons = ('setpriv', '--reuid', str(ME), '--regid', str(ME), '--clear-groups'), ()
    try:
        p = await host.start('sleep 1000')
        await host.sh.request('watch', id=p.id, pgid=stranger.pid)
        os.killpg(p.pid, 9)
        assert await exited(p) == -9
    finally: stranger.kill(); stranger.wait()

async def test_ended_together(host):
    "One that cannot be tidied up keeps nobody from hearing of the others"
    root()
    stranger = subprocess.Popen(['sleep', '1000'], start_new_session=True)
    host.tmp.chmod(0o777), host.home.chmod(0o777)
    host.prefix, host.pythons = ('setpriv', '--reuid', str(ME), '--regid', str(ME), '--clear-groups'), ()
    try:
        ps = [await host.start('sleep 1000', log=f'{host.log}{i}') for i in range(5)]
        for p in ps: await host.sh.request('watch', id=p.id, pgid=stranger.pid)
        os.kill(host.sh.hello['pid'], signal.SIGSTOP)
        for p in ps: os.killpg(p.pid, 9)
        os.kill(host.sh.hello['pid'], signal.SIGCONT)
        assert [await exited(p) for p in ps] == [-9]*5
    finally: stranger.kill(); stranger.wait()

# The agent of another user

@pytest.fixture
async def sudo(host):
    "Commands in place of sudo: what `host.sudo` holds is done with the rest of the command in `$@`"
    (bin := host.dir/'bin').mkdir()
    (bin/'sudo').write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do [ "$1" = -u ] && u=$2; shift; done; shift\n'
        f'export HOME={host.dir}/$u TMPDIR={host.dir}/$u/t; . {host.dir}/rule\nexec "$@"\n')
    (bin/'sudo').chmod(0o755)
    for o in 'ada', 'eve': (host.dir/o/'t').mkdir(parents=True)
    (host.dir/'rule').write_text('')
    host.env['PATH'] = f'{bin}:{host.env["PATH"]}'
    return lambda text: (host.dir/'rule').write_text(text)

async def as_user(host, user, script='sleep 1000', session=None):
    p = await host.start(script, session, user=user, log=f'{host.dir}/{user}/t/kernel.log')
    host.agents.add((await (session or host.sh).greeting(user))['pid'])
    return p

async def test_agents_of_other_users(host, sudo):
    await host.sessions()
    was = fds(host.sh.hello['pid'])
    ps = await asyncio.gather(as_user(host, 'ada'), as_user(host, 'eve'), as_user(host, 'ada'))
    assert ps[0].user == 'ada' and len(host.agents) == 3
    assert (await host.sh.greeting('ada'))['home'] == f'{host.dir}/ada'
    assert await ps[0].signal(15) and await exited(ps[0]) == -15
    for p in ps: await p.release(False)
    second = await host.open()
    q = await as_user(host, 'ada', session=second)   # the same agent, by another application
    assert (await second.greeting('ada'))['pid'] == (await host.sh.greeting('ada'))['pid']
    await q.release(False)
    second.close()
    host.sh.close()
    assert await host.left() == [] and not [*host.dir.glob('*/t/*')]

@pytest.mark.parametrize('rule, why', [('echo "sudo: a password is required" >&2; exit 1', 'a password is required'),
    ('exit 1', 'the agent of ada ended'), ('exec >/dev/null 2>&1; sleep .1; exit 1', 'the agent of ada ended'),
    ('echo no frame; exec sleep 3', 'ended'),
    ('head -c 3000000 /dev/zero 2>/dev/null; exec sleep 3', 'the agent of ada ended'), ('kill -9 $$', 'ended')])
async def test_sudo_fails(host, sudo, rule, why):
    s, was = await host.sessions(), None
    sudo(rule)
    for _ in range(3):
        with pytest.raises(Refusal, match=why): await asyncio.wait_for(host.start('true', user='ada'), 60)
        await s.ping()
        was = was or fds(s.hello['pid'])
    await until(lambda: fds(s.hello['pid']) <= was)
    sudo('')
    assert await exited(await as_user(host, 'ada', 'exit 5')) == 5

async def test_no_sudo(host):
    (bin := host.dir/'bin').mkdir()
    for o in 'sh', 'cat', 'rm': (bin/o).symlink_to(shutil.which(o))
    host.env['PATH'] = str(bin)
    s = await host.sessions()
    was = None
    for _ in range(3):
        with pytest.raises(Refusal, match='sudo: not found'): await host.start('true', user='ada')
        was = was or fds(s.hello['pid'])
    assert fds(s.hello['pid']) == was
    for user in '-x', 5, None, '', ['ada']:
        with pytest.raises(Refusal, match='no name of a user|not found'):
            await s._request('impersonate', b'', '', dict(user=user))

async def test_agent_of_another_user_killed(host, sudo):
    p = await as_user(host, 'ada')
    was = (await host.sh.greeting('ada'))['pid']
    os.kill(was, 9)
    await until(lambda: not agent.start_time(was))
    assert await p.signal(15) and await exited(p) == EXIT_UNKNOWN
    host.agents.add((await host.sh.greeting('ada'))['pid'])
    await p.release(False)
    assert await host.left() == [] and not [*host.dir.glob('*/t/*')]

async def test_agent_of_the_login_killed(host, sudo):
    p = await as_user(host, 'ada')
    await host.kill(host.sh.hello['pid'])
    assert await p.signal(15) and await exited(p) == -15
    await p.release(False)
    assert await host.left() == [] and not [*host.dir.glob('*/t/*')]

async def test_a_user_cannot_answer_for_others(host, sudo):
    "Whatever the agent of a user says concerns that user's requests only"
    sudo('echo \'{"event": "hello", "cache": "/c", "home": "/h", "trees": []}\'; while sleep .01; do '
        'for n in 1 2 3 4 5 6 7 8 9; do echo "{\\"n\\": $n, \\"ok\\": {\\"forged\\": 1}}"; done; done')
    s = await host.sessions()
    await s.greeting('eve')
    os.kill(s.hello['pid'], signal.SIGSTOP)
    asked = [asyncio.ensure_future(s.request('log', path='/no/such', lines=1)) for _ in range(3)]
    os.kill(s.hello['pid'], signal.SIGCONT)
    assert await asyncio.gather(*asked) == [dict(text='')]*3
    s.last_number = 0
    for _ in range(9):
        os.kill(s.hello['pid'], signal.SIGSTOP)
        s._received(dict(n=s.last_number + 1, ok=dict(forged=1), **{'as': 'eve'}))
        fut = asyncio.ensure_future(s.request('log', path='/no/such', lines=1))
        await asyncio.sleep(0)
        s._received(dict(n=s.last_number, ok=dict(forged=1), **{'as': 'eve'}))
        os.kill(s.hello['pid'], signal.SIGCONT)
        assert await fut == dict(text='')

# What others may do: a user of this host's own, with a /tmp that is open to all

@pytest.fixture
async def mine():
    need(None if os.geteuid() == 0 and os.path.exists('/usr/bin/python3') else 'needs root, and /usr/bin/python3')
    async with host_of() as host:
        host.tmp.chmod(0o1777)
        (host.tmp/'bin').mkdir()
        os.chown(host.home, ME, ME)
        host.prefix = ('unshare', '-m', '/bin/sh', '-c',
            f'mount --bind {host.home} /mnt && mount --bind {host.tmp} /tmp && '
            'mount -t tmpfs -o mode=1777 none /var/tmp && mount -t tmpfs -o mode=1777 none /dev/shm && '
            f'exec setpriv --reuid {ME} --regid {ME} --clear-groups "$@"', 'sh')
        host.pythons, host.log, host.uid = (), '/tmp/kernel.log', ME
        del host.env['TMPDIR']
        host.env['HOME'] = '/mnt'   # what is in /tmp is out of sight
        yield host

@contextlib.contextmanager
def another(host, script):
    "A process of another user, once it has said a word: Python code that finds the host's log at `log`"
    p = subprocess.Popen(['setpriv', '--reuid', str(OTHER), '--regid', str(OTHER), '--clear-groups',
        '/usr/bin/python3', '-c',
        f'import os, sys\nlog = {str(host.tmp/"kernel.log")!r}\n{script}'], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    try: p.stdout.readline(); yield p
    finally: p.kill(); p.communicate()

lay = "mine = os.path.basename(log)+'-mine'; os.chdir(os.path.dirname(log)); "
pipe = "os.mkfifo({0}); os.chmod({0}, 0o666); pipe = os.open({0}, os.O_RDWR | os.O_NONBLOCK)"
laid = dict(
    file="open(mine, 'w').write('of mine'); os.chmod(mine, 0o666); os.link(mine, log)",
    link="open(mine, 'w').write('of mine'); os.chmod(mine, 0o666); os.symlink(mine, log)",
    dangling_link="os.symlink(mine, log)", device="os.symlink('/dev/null', log)",
    pipe=pipe.format('log'), link_to_pipe=pipe.format('mine')+"; os.symlink(mine, log)",
    directory="os.mkdir(log, 0o777)")
laid = {k: lay+v for k,v in laid.items()}
read = """
sys.stdin.readline()
try:
    if 'pipe' in globals(): print(os.read(pipe, 1000), flush=True)
    else: print(open(mine).read() if os.path.exists(mine) else '', flush=True)
except BlockingIOError: print(flush=True)
"""

def read_by(p):
    p.stdin.write('\n'); p.stdin.flush()
    return p.stdout.readline().strip()

@pytest.mark.parametrize('what', laid)
async def test_something_in_place_of_the_log(mine, what):
    with another(mine, f'{laid[what]}\nprint(flush=True)\n{read}') as p:
        with pytest.raises(Refusal, match='cannot write the log'): await mine.start('echo secret', title='secret')
        assert read_by(p) in ('', 'of mine')

@pytest.mark.parametrize('what', laid)
async def test_something_put_in_place_of_the_log_just_then(mine, what):
    "Between the removal of an old log and the making of the new one"
    wait = ('self.fd = self._create(self.path)\n',
        'open("/tmp/now", "w")\n            while not os.path.exists("/tmp/then"): time.sleep(.01)\n'
        '            self.fd = self._create(self.path)\n')
    with another(mine, f"""print(flush=True)
import time
dir = os.path.dirname(log)
while not os.path.exists(dir+'/now'): time.sleep(.01)
{laid[what]}
open(dir+'/then', 'w')
{read}""") as p:
        s = await mine.open(wait)
        with pytest.raises(Refusal, match='cannot write the log'): await mine.start('echo secret', s, title='secret')
        assert read_by(p) in ('', 'of mine')

writes = 'until [ -e /tmp/go ]; do sleep .01; done; yes secret | head -c {}; echo the end'

async def test_the_name_of_a_full_log_is_never_free(mine):
    take = """
while not os.path.exists(log): pass
print(flush=True)
while True:
    try: os.close(os.open(log, os.O_CREAT | os.O_EXCL | os.O_WRONLY)); break
    except FileExistsError: pass
os.chmod(log, 0o666)
"""
    p = await mine.start(writes.format(2_000_000), max_bytes=100_000)
    with another(mine, take) as other:
        (mine.tmp/'go').touch()
        assert await exited(p) == 0
        assert other.poll() is None
    assert 'the end' in await p.tail()
    await p.release()
    (mine.tmp/'go').unlink()
    assert await mine.left() == ['kernel.log', 'kernel.log.1']
    for o in 'kernel.log', 'kernel.log.1':
        s = (mine.tmp/o).stat()
        assert (s.st_uid, oct(s.st_mode)) == (ME, '0o100600') and 0 < s.st_size <= 50_000

@pytest.mark.parametrize('what', laid)
async def test_the_name_of_the_last_log_is_taken(mine, what):
    p = await mine.start(writes.format(1_000_000), max_bytes=100_000)
    with another(mine, f'log += ".1"; {laid[what]}; print(flush=True)\n{read}') as other:
        (mine.tmp/'go').touch()
        assert await exited(p) == 0
        said = await asyncio.wait_for(p.tail(100_000), 10)
        assert said.endswith('the end\n[ended with status 0]\n') and 'of mine' not in said
        assert read_by(other) in ('', 'of mine')
    await p.release()
    assert (mine.tmp/'kernel.log').stat().st_size <= 50_000 and 'kernel.log.1' in await mine.left()

async def test_a_log_that_was_removed_is_not_made_again(mine):
    p = await mine.start(writes.format(1_000_000), max_bytes=100_000)
    (mine.tmp/'kernel.log').unlink()
    (mine.tmp/'go').touch()
    assert await exited(p) == 0
    await p.release()
    (mine.tmp/'go').unlink()
    assert await mine.left() == []

async def test_a_request_that_is_too_long(host):
    "Is refused here: at the host it would end the session of all kernels"
    s = await host.sessions()
    with pytest.raises(Refusal, match='too long'): await host.start('exit 0', env=dict(X='x'*2**20))
    assert not s.closed and not s.processes and not s.pending

async def test_a_long_title(host):
    p = await host.start('exit 0', title='ü'*100_000, max_bytes=100_000)
    await exited(p)
    await p.release()
    assert sum(o.stat().st_size for o in host.tmp.glob('kernel.log*')) <= 100_000

places = dict(
    directory="os.mkdir(dir, 0o777); os.chmod(dir, 0o777)", closed="os.mkdir(dir, 0o700)",
    link="os.symlink('/var', dir)", dangling_link="os.symlink(dir+'x', dir)", file="open(dir, 'w')",
    link_to_ours="os.symlink('/tmp/ours', dir)")

@pytest.mark.parametrize('what', places)
async def test_something_in_place_of_the_private_directory(mine, what):
    "The next name is taken; and kept, when the first is free again"
    (ours := mine.tmp/'ours').mkdir(0o700)
    os.chown(ours, ME, ME)
    with another(mine, f"""
dir = os.path.dirname(log) + '/gpssh-{ME}'
{places[what]}
print(flush=True)
sys.stdin.readline()
os.rename(dir, dir + '-gone')
print(flush=True)
sys.stdin.readline()
""") as p:
        q = await mine.start('sleep 1000')
        pid = mine.sh.hello['pid']
        assert (mine.tmp/f'gpssh-{ME}-1/agent-{VERSION}').is_socket() and not [*ours.iterdir()]
        read_by(p)
        mine.sh.close()
        assert (await mine.sessions()).hello['pid'] == pid and await q.signal(0)

async def test_every_name_of_the_private_directory_is_taken(mine):
    with another(mine, f"""
for o in '', '-1', '-2': os.mkdir(os.path.dirname(log) + '/gpssh-{ME}' + o)
print(flush=True)
sys.stdin.readline()
"""):
        for o in '/var/tmp', '/dev/shm':
            mine.prefix = (*mine.prefix[:4], mine.prefix[4].replace(f'mode=1777 none {o}', f'ro none {o}'),
                *mine.prefix[5:])
        s = await mine.open()
        assert (mine.home/f'.cache/gpssh-{socket.gethostname()[:20]}/agent-{VERSION}').is_socket()
        shutil.rmtree(mine.home/'.cache')
        s.close()
        os.chown(mine.home, 0, 0)
        why = 'no directory for sockets and records can be made .*belongs to another user'
        with pytest.raises(AgentClosed, match=why):
            await mine.open()

async def test_others_may_not_enter(mine):
    p = await mine.start('sleep 1000')
    with another(mine, f"""
import socket
print(flush=True)
try: print(os.listdir({str(mine.private)!r}), flush=True)
except PermissionError:
    try: socket.socket(socket.AF_UNIX).connect({str(mine.private/f'agent-{VERSION}')!r}); print('connected', flush=True)
    except PermissionError: print('refused', flush=True)
""") as q: assert q.stdout.readline() == 'refused\n'
    assert oct((mine.tmp/'kernel.log').stat().st_mode) == '0o100600'

# What a host may answer

async def test_no_number_of_a_process():
    "What was due is ended and removed, if it is there"
    sent = []
    s = AgentSession(sent.append, lambda: None, 'odd')
    s.hello = {}
    async def sessions(): return s
    starting = asyncio.ensure_future(spawn(s, sessions, '/tmp/kernel.log', argv=['true'], env={}, max_bytes=1))
    await asyncio.sleep(0)
    s._received(dict(n=1, ok=dict(pid='1e3')))
    with pytest.raises(Refusal, match="odd answered .*'1e3'"): await starting
    await until(lambda: len(sent) == 2)
    assert b'"forget"' in sent[1] and b'"keep_log": false' in sent[1] and not s.processes
