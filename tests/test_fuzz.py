"""Whatever people, users and networks may send, made up at random: nothing of it is ever executed, nothing crashes, and
what is no good is refused in words. LaunchKeys messages, tickets and signed replies have theirs in `test_handshake.py`;
here is all the rest.

Some seconds as it is. Longer, 100,000 cases: `FUZZ=1 pytest -s tests/test_fuzz.py` (less than half an hour on two
cores)."""
import asyncio, base64, contextlib, json, os, re, shlex, shutil, signal, socket, struct, subprocess, tempfile, threading
from pathlib import Path
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from jupyter_client.kernelspec import KernelSpec
from gateway_provisioners_ssh import hosts, spec_import, start_request
from gateway_provisioners_ssh.handshake import HandshakeError, LaunchKeys
from gateway_provisioners_ssh.hosts import Host, parse_hosts
from gateway_provisioners_ssh.launchers import agent, server_listener as listener
from gateway_provisioners_ssh.provisioner import DistributedProvisioner
from gateway_provisioners_ssh.remote import AgentClosed, AgentSession, Refusal, RemoteProcess, local_session, spawn
from gateway_provisioners_ssh.errors import LaunchError
from gateway_provisioners_ssh.settings import parse_port_range, settings as options
from gateway_provisioners_ssh.tunnel import StreamSession
from kernels import ticket_of
from pace import until, wait
from test_handshake import bitten, changed, changes, jsons, odd

counted = dict(n=0)
def budget(n):
    "At most `n` times FUZZ cases"
    return settings(max_examples=max(5, int(n*float(os.environ.get('FUZZ', 0.03)))), deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture,
                                           HealthCheck.data_too_large])
def case(): counted['n'] += 1

# Texts that would do something if anybody evaluated them

CANARY = Path(f'/tmp/gp-canary-{os.getpid()}')
touch = f'touch {CANARY}'
fragments = st.sampled_from(["'", '"', '\\', '\n', '\r\n', '$', ';', '&', '|', '#', '~', '*', '{', '}', '(', ')', '!',
    '%s', '{}', '-', '--', '=', ',', ':', '@', '[', ']', f'$({touch})', f'`{touch}`', f';{touch};', f"';{touch};'",
    f'";{touch};"', f'\n{touch}\n', f'${{X:-$({touch})}}', f'${{X:-`{touch}`}}', f'>{CANARY}', f'&{touch}&',
    f'\n}}\n{touch}\n', f'\nr\n{touch}\n', f'\nEOF\n{touch}\n', f'$(({touch}))', '${HOME}', '${HOME:-x}',
    '${NONE:-d e}', '${NONE}', '$HOME', '${HOME:=x}', '${#HOME}', '{kernel_id}', '{connection_file}',
    '{response_address}', '\udcff', '\x1b[2J', '\u202e', '\x7f', '\x81', '\x88', 'ünï', '\ufeff', ' ', '\t', 'x'*300])
hostile = st.lists(fragments | st.text(max_size=6) | st.sampled_from('ab/.-_'), max_size=7).map(''.join)
NUL = st.just('a\0b')

@pytest.fixture(autouse=True)
def canary():
    CANARY.unlink(missing_ok=True)
    yield
    assert not CANARY.exists(), 'something was executed'

@pytest.fixture(scope='module', autouse=True)
def cases():
    yield
    print(f"\n{counted['n']} cases")

# Settings and hosts

@budget(20_000)
@given(hostile | st.from_regex(r'[A-Za-z0-9@:\[\].%_\\-]{0,30}', fullmatch=True))
def test_host_entries(text):
    case()
    try: h = Host.parse(text)
    except ValueError as e: assert 'host' in str(e); return
    assert (Host.parse(str(h)) == h and not re.search(r'''[\s'"`;&<>|(){}$\x00-\x1f]''', str(h))
            and not str(h).startswith('-'))

@budget(10_000)
@given(hostile | st.lists(hostile, max_size=3) | st.from_regex(r'[a-c@:,0-9 ]{0,20}', fullmatch=True))
def test_lists_of_hosts(entries):
    case()
    with contextlib.suppress(ValueError): assert all(Host.parse(str(h)) == h for h in parse_hosts(entries))

@budget(1_000)
@given(st.from_regex(r'[a-c~*?#!=^+%/.\\-]{1,5}@[a-z%~*_.-]{1,8}(:[0-9]{1,5})?', fullmatch=True) | hostile)
def test_entries_in_a_proxy_command(tmp_path_factory, text):
    "Name, user and port are put into a ProxyCommand, which a shell runs: it may take them for anything but a command"
    case()
    try: h = Host.parse(text)
    except ValueError: return
    (conf := tmp_path_factory.getbasetemp()/'ssh_config').write_text('Host *\n ProxyCommand printf %%%%s %h %n %r %p\n')
    try: r = hosts.route(h, 'ada', 22, str(conf))
    except ValueError: return
    subprocess.run(['/bin/sh', '-c', r.proxy_command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, timeout=30)
    assert not CANARY.exists()

@budget(15_000)
@given(st.from_regex(r'\s?[0-9]{0,7}\.{0,3}[0-9]{0,7}\s?', fullmatch=True) | hostile, st.integers(0, 70_000))
def test_port_ranges(text, least):
    case()
    try: r = parse_port_range(text, least)
    except ValueError: return
    lo, hi = map(int, r.split('..'))
    assert (lo, hi) == (0, 0) or 1024 <= lo < hi <= 65535 and hi-lo >= least
    assert listener.parse_port_range(r) == (range(lo, hi+1) if hi else None)

@budget(10_000)
@given(st.from_regex(r'\[?[0-9a-f.:]{0,12}\]?:?[0-9]{0,6}', fullmatch=True)
       | st.from_regex(r'[0-9]{0,7}\.\.[0-9]{0,7}', fullmatch=True) | hostile)
def test_arguments_of_launchers(text):
    case()
    with contextlib.suppress(listener.LauncherError):
        ip, port = listener.parse_address(text)
        assert ip and 0 < port < 65536
    with contextlib.suppress(listener.LauncherError):
        assert (r := listener.parse_port_range(text)) is None or 0 <= r[0] < r[-1] < 65536

@budget(5_000)
@given(st.dictionaries(st.sampled_from([*options, 'x']), jsons | hostile | odd | st.lists(hostile, max_size=2),
                       max_size=3))
def test_options_of_kernelspecs(config):
    case()
    for k in config:
        if isinstance(config[k], float) and config[k] != config[k]: return
    try: p = DistributedProvisioner(kernel_id='42', kernel_spec=KernelSpec(display_name='K'), **config)
    except LaunchError as e: assert re.match(r"(\w+) of kernelspec 'K': ", str(e))[1] in config; return
    assert ('root' in p.unauthorized_users and p.load_balancing_algorithm == 'round-robin'
            and p.impersonation_enabled is False)
    assert p.remote_hosts and all(Host.parse(o) for o in p.remote_hosts)

# Start requests

names = st.sampled_from(['KERNEL_A', 'KERNEL_B', 'KERNEL_USERNAME', 'KERNEL_WORKING_DIR', 'KERNEL_REMOTE_HOST',
                         'KERNEL_LAUNCH_TIMEOUT', 'KERNEL_ID', 'KERNEL_PATH', 'KERNEL_EXTRA_SPARK_OPTS',
                         'KERNEL_LAUNCH_SECRET']) | hostile.map('KERNEL_{}'.format) | hostile
environments = st.dictionaries(names, hostile | NUL | st.just('\ud800') | odd.map(str), max_size=5)
argvs = st.lists(hostile | st.sampled_from(['{kernel_id}', '{public_key}', '{response_address}', '{port_range}',
                                            '{resource_dir}', 'python']), max_size=5)
kernelspec_envs = st.dictionaries(st.sampled_from(['A', 'B', 'KERNEL_A', 'SPARK_HOME', 'PYTHONPATH']) | hostile,
                                  hostile, max_size=4)

def kernelspec(argv, env, name='K'): return KernelSpec(argv=argv, env=env, display_name=name, language='x', metadata={})

@budget(20_000)
@given(environments, argvs, kernelspec_envs, hostile | st.just('42'), st.booleans(), hostile | st.none())
def test_start_requests(env, argv, spec_env, kernel_id, impersonate, cwd):
    "A request is refused with a status and words, or can be sent"
    case()
    p = DistributedProvisioner(kernel_id=kernel_id, kernel_spec=kernelspec(argv, spec_env),
                               remote_hosts=['a', 'ada@b:23'])
    p.impersonation_enabled = impersonate
    try: r = p.checked_request(dict(KERNEL_USERNAME='ada') | env | dict(SERVER_SECRET='x'), argv, cwd)
    except LaunchError as e:
        assert e.status_code in (400, 403) and len(str(e)) < 20_000
        return
    assert (r.pinned in (None, 'a', 'ada@b:23') and 'SERVER_SECRET' not in r.env and r.env['KERNEL_ID'] == kernel_id
            and 0 < r.timeout < 1e7)
    assert not impersonate or shlex.quote(r.user) == r.user or re.fullmatch(r'[\w.@$-]+', r.user)
    start_request.check_request(r.argv, r.env, spec_env, r.cwds)
    agent.encode(dict(argv=r.argv, env=r.env, spec_env=spec_env, cwds=r.cwds))

REF = re.compile(r'\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}')

def becomes(env, spec_env, given):
    "The environment that a kernel is to have, worked out without a shell"
    now = given | env
    for k, v in spec_env.items():
        if not (k.startswith('KERNEL_') and k in env): now[k] = REF.sub(lambda m: now.get(m[1]) or m[2] or '', v)
    return now

# The agent of this machine, with what nobody should ask of it

class Place:
    "A login of its own and the agent there, whose session is in a thread of its own; `run` is for coroutines"
    def __init__(self):
        self.dir = Path(tempfile.mkdtemp(prefix='gpf-'))
        (self.dir/'t').mkdir()
        self.env = dict(PATH=os.environ['PATH'], HOME=str(self.dir), TMPDIR=str(self.dir/'t'), X='remote')
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.session = self.run(self.open())
        self.pid, self.socket = (self.session.hello['pid'],
                                 str(self.dir/f't/gpssh-{os.getuid()}/agent-{self.session.hello["version"]}'))

    async def open(self):
        s = await local_session(self.env)
        await s.ping()
        return s

    def run(self, coro, timeout=60):
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coro, timeout), self.loop).result()
    async def sessions(self): return self.session
    def ping(self): self.run(self.session.ping())
    def fds(self): return len(os.listdir(f'/proc/{self.pid}/fd'))

    def no_more(self, fds):
        "That many descriptors, once the agent is done with what was there; it must be in good health"
        self.ping()
        wait(lambda: self.fds() <= fds, 60, f'no more than {fds} descriptors')
        assert (agent.start_time(self.pid)
                and not os.path.exists(os.path.dirname(self.socket) + '/errors')), open(os.path.dirname(self.socket)
                    + '/errors').read()

    def close(self):
        self.loop.call_soon_threadsafe(self.session.close)
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)
        self.loop.call_soon_threadsafe(self.loop.stop)
        shutil.rmtree(self.dir, ignore_errors=True)

@pytest.fixture(scope='module')
def place():
    p = Place()
    yield p
    p.close()

shell_names = st.sampled_from(['KERNEL_A', 'KERNEL_B', 'KERNEL_USERNAME', 'KERNEL_X'])
@settings(budget(1_000), phases=[Phase.generate])   # a smaller case that fails is not worth the wait for its processes
@given(st.lists(st.tuples(st.dictionaries(shell_names, hostile, max_size=3),
       st.dictionaries(st.sampled_from(['A', 'B', 'KERNEL_A', 'NONE']), hostile, max_size=3),
       st.lists(hostile, max_size=4), st.lists(hostile, max_size=2), hostile, hostile), min_size=5, max_size=5))
def test_what_a_kernel_gets(place, cases):
    "Words, environment and directory are exactly what was asked for, and the title is in the log"
    async def one(env, spec_env, words, cwds, title, name):
        case()
        out = place.dir/f'out{os.urandom(4).hex()}'
        log = f'{out}{name.replace("/", "")[:30]}.log'
        argv = ['/bin/sh', '-c',
                'pwd -P >"$0"; for o; do printf "%s\\0" "$o"; done >>"$0"; printf "\\1\\0" >>"$0"; exec env -0 >>"$0"',
                str(out), *words]
        try: start_request.check_request(argv, env, spec_env, cwds)
        except ValueError as e: assert 'NUL' in str(e) or 'name' in str(e); return
        p = await spawn(place.session, place.sessions, log, argv=argv, env=env, spec_env=spec_env, cwds=cwds,
                        title=title, max_bytes=65536)
        assert await asyncio.wait_for(p.exited, 60) == 0, await p.tail()
        said = (await p.tail(1000))
        await p.release(keep_log=False)
        where, _, rest = out.read_bytes().decode('utf-8', 'surrogateescape').partition('\n')
        got, _, got_env = rest.partition('\1\0') if not any('\1' in o for o in words) else (None, None, None)
        out.unlink()
        if got is None: return
        got_env = dict(o.split('=', 1) for o in got_env.split('\0') if '=' in o)
        want = becomes(env, spec_env, place.env)
        assert (got.split('\0')[:-1] == words and {k: got_env.get(k) for k in want} == want
                and set(got_env) - set(want) <= {'PWD', 'SHLVL', '_', 'OLDPWD'})
        assert where == str(next(Path(o).resolve() for o in (*(os.path.join(place.dir, c) for c in cwds), place.dir)
                                 if os.path.isdir(o)))
        assert said.startswith(title.encode('utf-8', 'surrogateescape')[:900].decode('utf-8',
            'ignore' if len(title) > 200 else 'replace'))
        assert not os.path.exists(log) and not CANARY.exists()
    async def several(): await asyncio.gather(*(one(*c) for c in cases))
    place.run(several(), 120)

OPS = [*agent.OPERATIONS, 'none']
anything = (jsons | odd | hostile | st.integers() | st.floats() | st.lists(hostile, max_size=2)
            | st.dictionaries(hostile, hostile, max_size=2))
IDS = st.sampled_from(['ab'*8, 'cd'*32, '../..', 'ab'*8 + '\n', ''])
STANDBY = st.fixed_dictionaries({},
                                optional=dict(script=st.sampled_from([0, 1, 1, 2, -1, 10**9, True]) | anything,
                                              preload=st.just([]) | st.lists(hostile, max_size=2) | anything,
                                              timeout=st.sampled_from([1, 0, -1, 1e308, float('nan')])
                                              | anything)) | anything
ARGUMENTS = st.fixed_dictionaries({},
                                  optional=dict(id=IDS | anything, tree=IDS | anything, path=hostile | anything,
    mode=anything, done=anything, argv=st.sampled_from([['true'], ['true', 'x'], ['true', '/no/x', 'y']])
    | st.lists(hostile, max_size=3) | anything, standby=st.just(dict(script=1, preload=[], timeout=5)) | STANDBY,
    env=st.just({}) | anything, spec_env=st.just({}) | anything, cwds=anything, max_bytes=st.just(65536) | anything,
    title=anything, orphan_timeout=anything, ticket=st.just({}) | anything, ports=anything, lines=st.just(5) | anything,
    pgid=st.sampled_from([10**19, 2**31, 0, -1, 1, True, 1.5]), signum=st.sampled_from([0, 65, 10**9, -1, 1.5, '9']),
    idle_timeout=st.just(None) | anything, keep_log=anything, user=st.sampled_from(['-u', '']) | odd, x=anything))

@budget(3_000)
@given(st.lists(st.tuples(st.sampled_from(OPS) | anything, ARGUMENTS, st.booleans(), st.binary(max_size=20)),
                min_size=1, max_size=10))
def test_requests_of_any_kind(place, requests):
    "Each is answered, with a result or an error; the agent survives all, and keeps no descriptor of it"
    was = place.fds()
    async def several():
        s = await place.open()
        try:
            for op, arguments, good, data in requests:
                case()
                if op == 'impersonate': arguments = dict(arguments, user='-u')
                arguments = dict(arguments, log=str(place.dir/'kernel.log'))
                if good: arguments['id'] = 'ab'*8
                try: list(agent.Decoder().feed(agent.encode(dict(arguments, op=op), data)))
                except ValueError: continue   # no frame: see the next test
                with contextlib.suppress(Refusal): await asyncio.wait_for(s._request(op, data, '', arguments), 30)
                assert not s.closed
            for k in (await s.request('list'))['kernels']: await s.request('forget', id=k['id'], keep_log=False)
        finally: s.close()
    place.run(several(), 120)
    place.no_more(was)

# Templates, which are processes of the user: they may say anything

TEMPLATE = """
import base64, json, os, socket, sys
greeting, said, stays = json.loads(sys.argv[1])['preload']
agent, kept = socket.socket(fileno=os.dup(0)), []
agent.sendall(base64.b64decode(greeting))
while True:
    got, fds, _, _ = socket.recv_fds(agent, 1, 2)
    if not got: os._exit(0)
    os.close(fds[0])
    s = socket.socket(fileno=fds[1])
    text, me = base64.b64decode(said), b'%d' % os.getpid()
    text = text.replace(b'{agent}', b'%d' % os.getppid()).replace(b'{self}', me).replace(b'{group}', b'-' + me)
    try: s.sendall(text)
    except OSError: pass
    kept.append(s)
    if not stays: kept.pop().close()
"""
GREETINGS = (st.just(b'{"cold": ""}\n') | st.binary(max_size=60) | st.fixed_dictionaries({},
    optional=dict(cold=st.just('') | anything, passes=anything.filter(lambda o: o is not True))).map(
        lambda o: json.dumps(o).encode()) | st.sampled_from([b'['*60_000, b'1'*5000]))
BIRTHS = st.lists(st.sampled_from([b'{agent}', b'{self}', b'{group}', b'-1', b'0', b'1', b'9'*30, b'\n', b'\nok\n',
                                   b'\nnot here: x\n', b'ok\n', b'x'*9000, b'\xff']) | st.binary(max_size=9),
                  max_size=6).map(b''.join)

@settings(budget(500), phases=[Phase.generate])
@given(GREETINGS, BIRTHS, st.booleans())
def test_what_a_template_says(place, greeting, said, stays):
    "Whatever it is, one process is started, cold; it is no other one that the agent takes for the kernel, and signals"
    case()
    (place.dir/'standby.py').write_text(TEMPLATE)
    (place.dir/'launch.py').write_text('import time; time.sleep(1000)')
    was, argv = place.fds(), [shutil.which('python3'), '-SE', str(place.dir/'launch.py'), os.urandom(4).hex()]
    standby = dict(script=2, preload=[base64.b64encode(greeting).decode(), base64.b64encode(said).decode(),
                                      'yes'*stays], timeout=1)
    async def one():
        await place.session.request('standby', argv=argv, env={}, standby=standby)
        p = await spawn(place.session, place.sessions, str(place.dir/'a.log'), argv=argv, env={}, max_bytes=65536,
                        standby=standby)
        assert Path(f'/proc/{p.pid}/cmdline').read_bytes().split(b'\0')[:-1] == [o.encode() for o in argv]
        await p.release(keep_log=False)
        await until(lambda: not agent.start_time(p.pid), 60)
        await until(lambda: not [*Path(os.path.dirname(place.socket)).glob('k-*')], 60)
    place.run(one())
    place.no_more(was + 1)   # a template that is ready is waited for

@budget(5_000)
@given(st.lists(st.binary(max_size=60) | jsons.map(lambda o: json.dumps(o).encode() + b'\n')
                | st.fixed_dictionaries({},
                                        optional=dict(n=anything, op=st.sampled_from(OPS) | anything, size=anything,
                                                      **{'as': anything})).map(
    lambda o: json.dumps(o).encode() + b'\n') | st.integers(1, 3000).map(lambda n: b'['*n + b'\n'), min_size=1,
                max_size=5))
def test_bytes_from_a_client(place, parts):
    "What is no frame ends that connection only"
    case()
    was = place.fds()
    with handed_over(place) as c:
        for o in parts:
            with contextlib.suppress(OSError): c.sendall(o)
        place.ping()
    place.no_more(was)

@contextlib.contextmanager
def handed_over(place, line=b'{"env": {}}\n'):
    "A connection that speaks frames, handed over as another login does"
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as c:
        c.connect(place.socket)
        c.sendmsg([line],
                  [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack('2i', theirs.fileno(), theirs.fileno()))])
        theirs.close()
        ours.settimeout(30)
        yield ours

KINDS = st.sampled_from(['null', 'file', 'pipe', 'directory', 'socket', 'socket'])
VISITS = st.binary(max_size=60) | jsons.map(json.dumps).map(str.encode) | st.just(
    b'{"env": {}}') | st.fixed_dictionaries({}, optional=dict(env=anything, token=anything, fields=anything)).map(
    lambda o: json.dumps(o).encode()) | st.just(b'x'*100_000) | st.just(b'['*3000)
@budget(10_000)
@given(st.lists(st.tuples(VISITS, st.lists(KINDS, max_size=6), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_bytes_at_the_agents_socket(place, visits):
    "With and without descriptors of any kind: nobody is disturbed, and no descriptor stays"
    was = place.fds()
    for line, kinds, end, patient in visits:
        case()
        fds = []
        with socket.socket(socket.AF_UNIX) as c, contextlib.suppress(OSError):
            c.settimeout(30)
            c.connect(place.socket)
            for o in kinds:
                pair = dict(null=lambda: [os.open('/dev/null', os.O_RDWR)],
                            file=lambda: [os.open(__file__, os.O_RDONLY)], pipe=os.pipe,
                            directory=lambda: [os.open('/', os.O_RDONLY)],
                            socket=lambda: [o.detach() for o in socket.socketpair()])[o]()
                fds += pair[:1]
                for o in pair[1:]: os.close(o)
            try:
                c.sendmsg([line + b'\n'*end],
                          [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f'{len(fds)}i', *fds))] if fds else [])
            finally:
                for o in fds: os.close(o)
            if patient: c.shutdown(socket.SHUT_WR); c.recv(1000)
    place.no_more(was)

REPORTS = st.fixed_dictionaries({},
                                optional=dict(pgid=st.sampled_from([10**19, 2**31, -1, 0, 1, True]) | jsons,
    remove=st.lists(hostile.map('/tmp/{}'.format) | hostile, max_size=3) | anything,
    ip=st.sampled_from(['127.0.0.1', '::1', '127.0.0.2', '0.0.0', 'localhost'])
    | anything, fields=st.dictionaries(hostile, anything, max_size=3) | anything, control=anything))
@settings(budget(500), phases=[Phase.generate])
@given(REPORTS)
def test_reports_of_any_kind(place, said):
    case()
    async def one():
        log = str(place.dir/f'{os.urandom(4).hex()}.log')
        p = await spawn(place.session, place.sessions, log,
                        argv=['/bin/sh', '-c', 'echo "$KERNEL_LAUNCH_SECRET"; sleep 1000'], env={}, ticket={},
                        max_bytes=65536)
        ticket = await ticket_of(p)
        r, w = await asyncio.open_unix_connection(place.socket)
        try: line = json.dumps(dict(said, token=ticket['token'])).encode() + b'\n'
        except ValueError: line = b'\n'
        w.write(line)
        assert line == b'\n' or isinstance(json.loads(await r.readline()), dict)
        w.close()
        assert await p.signal(9) and await p.exited == -9
        await p.release(False)
    place.run(one())
    assert not os.path.exists(os.path.dirname(place.socket) + '/errors')

# What hosts say

EVENTS = st.fixed_dictionaries({},
                               optional=dict(event=st.sampled_from(['hello', 'ended', 'report', 'left', 'x'])
    | anything, id=st.sampled_from(['p', 'q']) | anything,
    status=st.sampled_from([0, 1, -9, 255, 256, -256, True, 1.5]) | anything, fields=anything, why=anything,
    home=st.just('/h') | anything, cache=st.just('/c') | anything, trees=st.just([]) | anything, pid=anything,
    python=anything, version=anything, n=st.integers(0, 4) | anything, ok=st.just({}) | anything, error=anything,
    running=anything, sent=anything, text=anything, report=anything,
    size=st.sampled_from([0, 1, 5, -1, 2**20, 2**20+1]) | anything, **{'as': st.sampled_from(['ada', '']) | anything}))
FRAMES = (EVENTS.map(lambda o: json.dumps(o).encode() + b'\n') | jsons.map(lambda o: json.dumps(o).encode() + b'\n')
          | st.binary(max_size=60)
          | st.integers(1, 3000).map(lambda n: b'{"n": 1, "error": ' + b'['*n + b']'*n + b'}\n'))
GOOD_HELLO = b'{"event": "hello", "home": "/h", "cache": "/c", "trees": []}\n'

@budget(30_000)
@given(st.binary(max_size=40), st.booleans(), st.lists(FRAMES, max_size=8), st.integers(1, 400))
def test_frames_from_a_host(noise, greets, frames, step):
    """The host may say anything: it is understood, ignored, or the end of that session; never an exception, and never
    more than what it has to remember"""
    case()
    async def listen():
        closed = []
        s = AgentSession(lambda data: None, lambda: closed.append(1), 'h')
        async def sessions(): return s
        start = asyncio.ensure_future(s.start())
        await asyncio.sleep(0)
        text = noise + s.token.encode() + b'\n' + GOOD_HELLO*greets
        s.feed(text)
        ps = [RemoteProcess(sessions, 'p', '/log'), RemoteProcess(sessions, 'q', '/log', 'ada')]
        for p in ps: s.processes[p.user, p.id] = p
        asked = [asyncio.ensure_future(s._request('x', b'', user, {})) for user in ('', 'ada', '')]
        await asyncio.sleep(0)
        text = b''.join(frames)
        for i in range(0, len(text), step): s.feed(text[i:i+step])
        assert len(s.decoder.buffer if s.decoder else s.login_output) <= 2**21 + 2**18 and len(s.pending) <= 3
        s.eof()
        assert closed == [1] and s.closed and isinstance(s.error, AgentClosed)
        for o in await asyncio.gather(start, *asked, return_exceptions=True):
            assert isinstance(o, (dict, AgentSession, AgentClosed, Refusal)), repr(o)
        for p in ps:
            assert p.returncode is None or type(p.returncode) is int and -256 < p.returncode < 256
            if p.report.done():
                try: fields = LaunchKeys('42').accept(p.report.result())
                except HandshakeError as e: assert len(str(e)) < 20_000
                else: assert fields['kernel_id'] == '42'
    asyncio.run(listen())

@budget(500)
@given(st.integers(0, 2**16), st.sampled_from([b'x', b'\n', b'[', b'{"n": 1}\n', b' ']), st.booleans())
def test_a_host_without_end(step, word, greets):
    "However much a host sends, what is kept of it is bounded"
    case()
    async def listen():
        s = AgentSession(lambda data: None, lambda: None, 'h')
        if greets: s.feed(s.token.encode() + b'\n' + GOOD_HELLO)
        for _ in range(40):
            s.feed(word*(step + 1))
            assert len(s.login_output) + len(s.decoder.buffer if s.decoder else b'') < 2**21 + 2**20
            if s.closed: break
    asyncio.run(listen())

# Reports through SSH

FIELDS = st.fixed_dictionaries({}, optional=dict(kernel_id=st.just('42') | anything, ip=st.just('127.0.0.1') | anything,
    pid=anything, pgid=anything, key=anything, shell_port=st.integers(-1, 70_000) | anything, iopub_port=anything,
    stdin_port=anything, control_port=anything, hb_port=anything, comm_port=anything, control_key=anything,
    transport=anything, signature_scheme=anything, x=anything))
@budget(10_000)
@given(FIELDS | st.dictionaries(hostile, anything, max_size=4))
def test_fields_of_reports(fields):
    case()
    try: LaunchKeys('42').accept(fields)
    except HandshakeError as e: assert len(str(e)) < 20_000

# Control requests

KEY, NONCE = bytes(range(32)), bytes(range(32))
def signed(text, key=KEY, nonce=NONCE):
    return json.dumps(dict(request=text,
                           mac=agent._mac(key, b'request', nonce, text.encode('utf-8', 'replace')))).encode()
GOOD = signed('{"signum": 0}')

class Asked:
    "An agent with two kernels, of which one can be asked with `KEY`; what it `did`"
    def __init__(self):
        self.did, self.kernels = [], {}
        for name, control in ('a', dict(key=os.urandom(32).hex())), ('b', dict(key=KEY.hex())), ('c', None):
            class Kernel:
                record, ended, id = dict(control=control), False, name
                def signal(k, n): self.did.append((k.id, n))
                def terminate(k): self.did.append((k.id, 'end'))
            self.kernels[name] = Kernel()
    def ask(self, line, nonce=NONCE):
        class Connection: pass
        c = Connection(); c.nonce = nonce
        return agent.Agent.control_request(self, c, line)

@budget(5_000)
@given(st.binary(max_size=200) | bitten(GOOD) | jsons.map(lambda o: json.dumps(o).encode())
    | changes(['request', 'mac']).map(
    lambda c: json.dumps(changed(json.loads(GOOD), c)).encode()) | st.integers(1, 3000).map(lambda n: b'['*n)
    | st.binary(min_size=32, max_size=32).map(lambda k: signed('{"signum": 9}', k))
    | st.binary(min_size=32, max_size=32).filter(lambda n: n != NONCE).map(lambda n: signed('{"signum": 9}', nonce=n)))
def test_requests_that_are_not_signed(line):
    "Nor with another key, nor for another connection's nonce"
    case()
    a = Asked()
    reply = a.ask(line)
    assert not a.did
    if reply: assert json.loads(line)['request'] == json.loads(GOOD)['request']

@budget(3_000)
@given(st.text(max_size=60) | jsons.map(json.dumps) | st.dictionaries(st.sampled_from(['signum', 'shutdown', 'x']),
    odd | jsons | st.integers(-1, 70), max_size=3).map(json.dumps))
def test_signed_requests_of_any_kind(text):
    "One who holds the key may ask for anything, and gets a signed reply or none; it concerns that kernel only"
    case()
    a = Asked()
    try: line = signed(text)
    except UnicodeEncodeError: return
    reply = a.ask(line)
    assert all(id == 'b' and (n == 'end' or 0 < n < 65) for id, n in a.did) and len(a.did) < 2
    if not reply: assert not a.did; return
    m = json.loads(reply)
    assert (set(json.loads(m['reply'])) <= {'alive', 'error'}
            and m['mac'] == agent._mac(KEY, b'reply', NONCE, m['reply'].encode()))

@pytest.fixture(scope='module')
def control(place):
    "A kernel that is controlled by a port: that port and the key"
    async def asking():
        p = await spawn(place.session, place.sessions, str(place.dir/'controlled.log'),
                        argv=['/bin/sh', '-c', 'echo "$KERNEL_LAUNCH_SECRET"; while :; do sleep 1000; done'], env={},
                        ticket={}, max_bytes=65536)
        ticket = await ticket_of(p)
        r, w = await asyncio.open_unix_connection(place.socket)
        w.write(json.dumps(dict(token=ticket['token'], ip='0.0.0.0')).encode() + b'\n')
        said = json.loads(await r.readline())
        return p, said['comm_port'], bytes.fromhex(said['control_key'])
    p, port, key = place.run(asking())
    yield p, port, key
    place.run(p.release(False))

def test_one_request_for_one_connection(place, control):
    "A request that was overheard is worth nothing; a second one on the same connection is not read"
    p, port, key = control
    def ask(c, line): c.sendall(line + b'\n'); return c.makefile('rb').readline()
    with socket.create_connection(('127.0.0.1', port), 30) as c:
        nonce = bytes.fromhex(json.loads(c.makefile('rb').readline())['nonce'])
        line = signed('{"signum": 0}', key, nonce)
        assert json.loads(json.loads(ask(c, line))['reply']) == dict(alive=True)
        with contextlib.suppress(OSError): assert ask(c, line) == b''
    with socket.create_connection(('127.0.0.1', port), 30) as c:
        assert json.loads(c.makefile('rb').readline())['nonce'] != nonce.hex() and ask(c, line) == b''

@budget(2_000)
@given(st.lists(st.binary(max_size=40) | st.just(b'x'*3000) | st.just(b'\n') | st.just(GOOD + b'\n'), max_size=4),
       st.booleans())
def test_bytes_at_the_control_port(place, control, parts, close):
    "Anything may come in any pieces: at most one line is taken, at most so long, and nothing stays open after it"
    case()
    was = place.fds()
    with socket.create_connection(('127.0.0.1', control[1]), 30) as s, contextlib.suppress(OSError):
        for o in parts: s.sendall(o)
        if close: s.shutdown(socket.SHUT_WR)
        if close or b'\n' in b''.join(parts) or len(b''.join(parts)) > 4096:
            with s.makefile('rb') as f: assert len(f.read()) < 300
    place.no_more(was)

# Streams

numbers = st.integers(-3, 40) | st.sampled_from([agent.WINDOW, 2**40, 10**19]) | odd
stream_frames = st.dictionaries(st.sampled_from(['s', 'at', 'got', 'fin', 'end', 'why', 'op', 'probe', 'n', 'ok',
                                                 'token', 'port', 'id', 'buffer', 'spool']), numbers | hostile,
                                max_size=5)
datas = st.binary(max_size=30) | st.just(b'x'*agent.MAX_DATA)

@budget(10_000)
@given(st.lists(st.tuples(stream_frames, st.binary(max_size=30)), max_size=4), st.binary(max_size=20),
       st.integers(1, 50))
def test_frames_of_streams_in_any_pieces(frames, noise, size):
    "Bytes come as they are, whatever pieces they arrive in; anything else is a ValueError"
    case()
    frames = [(dict({k: v for k, v in m.items() if k != 'size'}, s=1, at=7), d) for m, d in frames]
    raw, got = b''.join(agent.encode(*o) for o in frames) + noise, []
    d = agent.StreamDecoder()
    with contextlib.suppress(ValueError):
        for i in range(0, len(raw), size): got += [bytes(o) for m, o in d.feed(raw[i:i+size])]
    sent, got = b''.join(d for _, d in frames), b''.join(got)
    assert sent.startswith(got) or got.startswith(sent)
    assert len(d.buffer) <= agent.MAX_LINE

class Taken(agent.End):
    "An end whose socket takes nothing"
    def __init__(self): super().__init__(1, agent.Sender(100)); self.data = bytearray()
    def pass_on(self, data): self.data += data
    def finish(self, why): pass
    def settle(self): pass
    def end(self, why): self.out.close()

@budget(20_000)
@given(st.lists(st.tuples(stream_frames, datas), max_size=12))
def test_what_the_far_end_of_a_stream_may_say(frames):
    """In order, and no more than the window; nothing it says makes this end forget what was not passed on, or hold more
    than it may"""
    case()
    end = Taken()
    end.out.add(b'0123456789')
    end.frame()
    for m, data in frames:
        try: end.received(m, data if 'at' in m else b'')
        except ValueError: break
    assert end.got == len(end.data) <= agent.WINDOW and end.passed == 0
    assert 0 <= end.out.base <= end.out.sent <= 10

@budget(5_000)
@given(st.lists(st.tuples(stream_frames, datas), max_size=8))
def test_what_a_host_may_say_to_the_streams_of_an_application(frames):
    "The session goes on or ends; what it holds is bounded"
    case()
    async def say():
        written, closed = [], []
        session = StreamSession(written.append, lambda: closed.append(1), 'a host')
        end = Taken()
        session.mux.add(end)
        session.resume = lambda streams: [None for number, got, passed in streams if end.go_on(got, passed)]
        session.feed(session.token.encode() + b'\n')
        for m, data in frames: session.feed(agent.encode(m, data if 'at' in m else b''))
        assert (len(end.data) <= agent.WINDOW and len(session.decoder.buffer) <= agent.MAX_LINE
                and sum(map(len, written)) < 20_000)
        session.close()
    asyncio.run(say())

# Kernelspecs from elsewhere

STANZAS = st.fixed_dictionaries({},
                                optional=dict(
    class_name=st.sampled_from(['enterprise_gateway.services.processproxies.distributed.DistributedProcessProxy', 'X',
                                1]) | hostile,
    provisioner_name=st.sampled_from(['distributed-provisioner', 'local-provisioner']) | hostile,
    config=odd | st.dictionaries(st.sampled_from([*options, 'x']),
                                 odd | jsons | hostile | st.lists(hostile, max_size=2), max_size=3)))
KERNELS = st.fixed_dictionaries(
    dict(argv=st.lists(hostile
                       | st.sampled_from(['{connection_file}', '{response_address}', 'python',
        '/a/scripts/launch_ipykernel.py', 'bin/run.sh', '-f', 'launch_IRkernel.R', '--RemoteProcessProxy.kernel-id',
        '{kernel_id}']), max_size=6) | odd),
    optional=dict(env=kernelspec_envs | odd, display_name=hostile | odd,
        language=hostile | odd | st.sampled_from(['python', 'Scala', 'R']), interrupt_mode=odd,
        metadata=st.fixed_dictionaries({},
                                       optional=dict(process_proxy=STANZAS | odd, kernel_provisioner=STANZAS | odd,
                                                     supported_encryption=odd | st.just(['curve']))) | odd | jsons))

@budget(3_000)
@given(KERNELS | jsons, hostile | st.just(''), st.booleans())
def test_kernelspecs_to_adopt(tmp_path_factory, kernel, name, python):
    "A kernelspec from elsewhere becomes one that our provisioner takes, or is refused with a ValueError"
    case()
    base = tmp_path_factory.getbasetemp()/'imported'
    shutil.rmtree(base, ignore_errors=True)
    source, target = base/'some kernel', base/'place'
    source.mkdir(parents=True); target.mkdir()
    try: text = json.dumps(kernel)
    except ValueError: return
    (source/'kernel.json').write_text(text, encoding='utf-8', errors='surrogatepass')
    try:
        k = spec_import.read_kernel(source)
        spec = spec_import.ImportedSpec(source=source, kernel=k, display_name=name, python='python3' if python else '')
        spec.write(target, '/opt/kernels/x')
    except ValueError: return
    made = json.loads((target/'kernel.json').read_text(encoding='utf-8'))
    spec_import.check_kernel(made)
    conf = made['metadata']['kernel_provisioner']
    assert conf['provisioner_name'] == 'distributed-provisioner' and not CANARY.exists()

@budget(1_000)
@given(st.binary(max_size=100)
       | bitten(b'{"argv": ["python", "-m", "k", "{connection_file}"], "env": {"A": "b"}, "metadata": '
                b'{"process_proxy": {"class_name": "DistributedProcessProxy"}}}'))
def test_files_that_are_no_kernelspec(tmp_path_factory, raw):
    case()
    (dir := tmp_path_factory.getbasetemp()/'raw').mkdir(exist_ok=True)
    (dir/'kernel.json').write_bytes(raw)
    with contextlib.suppress(ValueError): spec_import.check_kernel(spec_import.read_kernel(dir))
