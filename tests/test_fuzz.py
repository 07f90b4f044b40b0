"""Whatever people, users and networks may send, made up at random: nothing of it is ever executed, nothing crashes, and what is no good is refused
in words. Launch messages, tickets and signed replies have theirs in `test_handshake.py`; here is all the rest.

Some seconds as it is. Longer, 100,000 cases: `FUZZ=1 pytest -s tests/test_fuzz.py` (less than half an hour on two cores)."""
import asyncio, contextlib, json, os, re, shutil, socket, string, subprocess
from pathlib import Path
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from jupyter_client.kernelspec import KernelSpec
from gateway_provisioners_ssh import adopt, hosts, launch, provisioner, shell
from gateway_provisioners_ssh.hosts import Host, parse_hosts
from gateway_provisioners_ssh.launchers import server_listener as listener
from gateway_provisioners_ssh.provisioner import DistributedProvisioner
from gateway_provisioners_ssh.settings import HostSettings, LaunchError, parse_port_range, settings as options
from test_handshake import bitten, changed, changes, jsons, odd

counted = dict(n=0)
def budget(n):
    "At most `n` times FUZZ cases"
    return settings(max_examples=max(5, int(n*float(os.environ.get('FUZZ', 0.03)))), deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
def case(): counted['n'] += 1

# Texts that would do something if anybody evaluated them

CANARY = Path(f'/tmp/gp-canary-{os.getpid()}')
touch = f'touch {CANARY}'
fragments = st.sampled_from(["'", '"', '\\', '\n', '\r\n', '$', ';', '&', '|', '#', '~', '*', '{', '}', '(', ')', '!', '%s', '{}', '-', '--', '=', ',', ':', '@', '[', ']',
    f'$({touch})', f'`{touch}`', f';{touch};', f"';{touch};'", f'";{touch};"', f'\n{touch}\n', f'${{X:-$({touch})}}', f'${{X:-`{touch}`}}', f'>{CANARY}', f'&{touch}&',
    f'\n}}\n{touch}\n', f'\nr\n{touch}\n', f'\nEOF\n{touch}\n', f'$(({touch}))', '${HOME}', '${HOME:-x}', '${NONE:-d e}', '${NONE}', '$HOME', '${HOME:=x}', '${#HOME}',
    '{kernel_id}', '{connection_file}', '{response_address}', '\udcff', '\x1b[2J', '\u202e', '\x7f', '\x81', '\x88', 'ünï', '\ufeff', ' ', '\t', 'x'*300])
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
    assert Host.parse(str(h)) == h and not re.search(r'''[\s'"`;&<>|(){}$\x00-\x1f]''', str(h)) and not str(h).startswith('-')

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
    subprocess.run(['/bin/sh', '-c', r.proxy_command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)
    assert not CANARY.exists()

@budget(15_000)
@given(st.from_regex(r'\s?[0-9]{0,7}\.{0,3}[0-9]{0,7}\s?', fullmatch=True) | hostile, st.integers(0, 70_000))
def test_port_ranges(text, least):
    case()
    try: r = parse_port_range(text, least)
    except ValueError: return
    lo, hi = map(int, r.split('..'))
    assert (lo, hi) == (0, 0) or 1024 <= lo < hi <= 65535 and hi-lo >= least
    assert listener.port_range(r) == (range(lo, hi+1) if hi else None)

@budget(10_000)
@given(st.from_regex(r'\[?[0-9a-f.:]{0,12}\]?:?[0-9]{0,6}', fullmatch=True) | st.from_regex(r'[0-9]{0,7}\.\.[0-9]{0,7}', fullmatch=True) | hostile)
def test_arguments_of_launchers(text):
    case()
    with contextlib.suppress(listener.LaunchError):
        ip, port = listener.address(text)
        assert ip and 0 < port < 65536
    with contextlib.suppress(listener.LaunchError):
        assert (r := listener.port_range(text)) is None or 0 <= r[0] < r[-1] < 65536

@budget(5_000)
@given(st.dictionaries(st.sampled_from([*options, 'x']), jsons | hostile | odd | st.lists(hostile, max_size=2), max_size=3))
def test_options_of_kernelspecs(config):
    case()
    for k in config:
        if isinstance(config[k], float) and config[k] != config[k]: return
    try: p = DistributedProvisioner(kernel_id='42', kernel_spec=KernelSpec(display_name='K'), **config)
    except LaunchError as e: assert re.match(r"(\w+) of kernelspec 'K': ", str(e))[1] in config; return
    assert 'root' in p.unauthorized_users and p.load_balancing_algorithm == 'round-robin' and p.impersonation_enabled is False
    assert p.remote_hosts and all(Host.parse(o) for o in p.remote_hosts)

# Start requests

names = st.sampled_from(['KERNEL_A', 'KERNEL_B', 'KERNEL_USERNAME', 'KERNEL_WORKING_DIR', 'KERNEL_REMOTE_HOST', 'KERNEL_LAUNCH_TIMEOUT', 'KERNEL_ID', 'KERNEL_PATH',
                         'KERNEL_EXTRA_SPARK_OPTS', 'KERNEL_LAUNCH_SECRET']) | hostile.map('KERNEL_{}'.format) | hostile
environments = st.dictionaries(names, hostile | NUL | st.just('\ud800') | odd.map(str), max_size=5)
argvs = st.lists(hostile | st.sampled_from(['{kernel_id}', '{public_key}', '{response_address}', '{port_range}', '{resource_dir}', 'python']), max_size=5)
kernelspec_envs = st.dictionaries(st.sampled_from(['A', 'B', 'KERNEL_A', 'SPARK_HOME', 'PYTHONPATH']) | hostile, hostile, max_size=4)

def kernelspec(argv, env, name='K'): return KernelSpec(argv=argv, env=env, display_name=name, language='x', metadata={})

@budget(20_000)
@given(environments, argvs, kernelspec_envs, hostile | st.just('42'), st.booleans(), hostile | st.none())
def test_start_requests(env, argv, spec_env, kernel_id, impersonate, cwd):
    "A request is refused with a status and words, or is a script that can be sent"
    case()
    p = DistributedProvisioner(kernel_id=kernel_id, kernel_spec=kernelspec(argv, spec_env), remote_hosts=['a', 'ada@b:23'])
    p.impersonation_enabled = impersonate
    try: r = p._check(dict(KERNEL_USERNAME='ada') | env | dict(SERVER_SECRET='x'), argv, cwd)
    except LaunchError as e:
        assert e.status_code in (400, 403) and len(str(e)) < 20_000
        return
    assert r.pinned in (None, 'a', 'ada@b:23') and 'SERVER_SECRET' not in r.env and r.env['KERNEL_ID'] == kernel_id and 0 < r.timeout < 1e7
    assert not impersonate or shell.shlex.quote(r.user) == r.user or re.fullmatch(r'[\w.@$-]+', r.user)
    launch.start_script(r.argv, r.env, spec_env, r.cwds).encode('utf-8', 'surrogateescape')

REF = re.compile(r'\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}')

def becomes(env, spec_env, given):
    "The environment that a kernel is to have, worked out without a shell"
    now = given | env
    for k, v in spec_env.items():
        if not (k.startswith('KERNEL_') and k in env): now[k] = REF.sub(lambda m: now.get(m[1]) or m[2] or '', v)
    return now

def listed(dir, script):
    "The words and the environment that a real shell starts, for a script in a here-document, as on a host"
    text = "/bin/sh <<'end_1'\nr() {\nlaunch() { printf '%s\\0' \"$@\"; printf '\\1\\0'; exec env -0; }\n" + script + '\n}\nr\nend_1\n'
    env = dict(PATH=os.environ['PATH'], HOME=str(dir), X='remote')
    r = subprocess.run(['/bin/sh'], input=text.encode('utf-8', 'surrogateescape'), env=env, capture_output=True, timeout=60, cwd=dir)
    words, _, rest = r.stdout.decode('utf-8', 'surrogateescape').partition('\1\0')
    assert not r.stderr, r.stderr
    return words.split('\0')[:-1], dict(o.split('=', 1) for o in rest.split('\0') if '=' in o), env

shell_names = st.sampled_from(['KERNEL_A', 'KERNEL_B', 'KERNEL_USERNAME', 'KERNEL_X'])
@budget(10_000)
@given(st.dictionaries(shell_names, hostile, max_size=3), st.dictionaries(st.sampled_from(['A', 'B', 'KERNEL_A', 'NONE']), hostile, max_size=3),
       st.lists(hostile, min_size=1, max_size=4), st.lists(hostile, max_size=2))
def test_scripts_in_a_real_shell(tmp_path_factory, env, spec_env, argv, cwds):
    "Every value arrives as it is, in a here-document within a here-document, as on a host"
    case()
    dir = tmp_path_factory.getbasetemp()
    try: script = launch.start_script(argv, env, spec_env, cwds)
    except ValueError as e: assert 'NUL' in str(e) or 'name' in str(e); return
    if any('\1' in o for o in argv): return
    words, got, given_env = listed(dir, script)
    assert words == argv
    want = becomes(env, spec_env, given_env)
    assert {k: got.get(k) for k in (*env, *spec_env)} == {k: want.get(k) for k in (*env, *spec_env)}
    assert not CANARY.exists()

@settings(budget(300), phases=[Phase.generate])   # a smaller case that fails is not worth the wait for its processes
@given(st.lists(st.tuples(hostile, hostile, st.lists(hostile, max_size=3), hostile), min_size=5, max_size=5))
def test_supervised_processes(tmp_path_factory, cases):
    "All of it as on a host: the persistent shell, the supervisor, the log; with hostile titles, paths and values"
    dir = tmp_path_factory.getbasetemp()
    async def one(sh, title, value, words, name):
        case()
        async def shells(): return sh
        tag = os.urandom(4).hex()
        log, out = f"{dir}/log{tag}{name.replace('/', '')[:30]}", dir/f'out{tag}'
        argv = ['/bin/sh', '-c', 'printf "%s\\0" "$KERNEL_A" "$@" >"$0"', str(out), *words]
        p = await shell.spawn(shells, launch.start_script(argv, dict(KERNEL_A=value)), log, title)
        assert await asyncio.wait_for(p.exited, 30) == 0
        assert out.read_bytes().decode('utf-8', 'surrogateescape').split('\0')[:-1] == [value, *words]
        await p.release(keep_log=False)
        out.unlink()
        assert not os.path.exists(p.dir) and not CANARY.exists()
    async def several():
        sh = await shell.local_shell(dict(PATH=os.environ['PATH'], HOME=str(dir)))
        try: await asyncio.gather(*(one(sh, *map(clean, c)) for c in cases))
        finally: sh.close()
    asyncio.run(several())

def clean(o): return [clean(x) for x in o] if isinstance(o, list) else o.replace('\0', '')

# What hosts say

@budget(5_000)
@given(st.lists(st.tuples(st.sampled_from(['', 'T ', 'T o ', 'T x ', 'T hello', 'T pong', 'T o 1 ', 'T x 1 ', 'T o 2 ']), st.text(max_size=12) | st.sampled_from(['0', '00 ff', 'zz', '256', '-1', '²']),
                                st.text(max_size=5)), max_size=6))
def test_lines_from_a_host(lines):
    "The shell at the other end may say anything: it is understood, ignored, or the end of that shell"
    case()
    async def listen():
        reader = asyncio.StreamReader()
        sh = shell.Shell(reader, lambda b: None, lambda: None, 'h')
        sh.token = 'T'
        reader.feed_data(''.join(map(''.join, lines)).encode() + b'\n')
        reader.feed_data('\n'.join(map(''.join, lines)).encode('utf-8', 'replace'))
        reader.feed_eof()
        with contextlib.suppress(shell.ShellClosed): await asyncio.wait_for(sh.start(), 10)
        await asyncio.gather(sh.task, return_exceptions=False)
    asyncio.run(listen())

# Control requests

KEY, NONCE = bytes(32), bytes(range(32))
def signed(text): return json.dumps(dict(request=text, mac=listener.mac(KEY, b'request', NONCE, text.encode('utf-8', 'replace')))).encode()
GOOD = signed('{"signum": 0}')

@budget(5_000)
@given(st.binary(max_size=200) | bitten(GOOD) | jsons.map(lambda o: json.dumps(o).encode()) | changes(['request', 'mac']).map(
    lambda c: json.dumps(changed(json.loads(GOOD), c)).encode()) | st.integers(1, 3000).map(lambda n: b'['*n))
def test_requests_that_are_not_signed(line):
    case()
    did = []
    reply = listener.respond(KEY, NONCE, line, lambda r: did.append(r) or {})
    assert (reply is None) == (not did)
    if did: assert did == [dict(signum=0)] and json.loads(line)['request'] == json.loads(GOOD)['request']

@budget(3_000)
@given(st.text(max_size=60) | jsons.map(json.dumps) | st.dictionaries(st.sampled_from(['signum', 'shutdown', 'x']), odd | jsons, max_size=3).map(json.dumps))
def test_signed_requests_of_any_kind(text):
    "One who holds the key may ask for anything, and gets a signed reply or none"
    case()
    sent = []
    class Kernel:
        pid = 1
        def alive(self): return True
        def group_alive(self): return True
        def leads(self): return True
        def signal(self, n): sent.append(n)
    me = listener.Listener.__new__(listener.Listener)
    me.kernel, me.key = Kernel(), KEY
    try: line = signed(text)
    except UnicodeEncodeError: return
    me.kill_at = 1
    reply = listener.respond(KEY, NONCE, line, lambda r: listener.act(me, r))
    assert reply is None or set(json.loads(json.loads(reply)['reply'])) <= {'alive', 'error'}
    assert all(0 <= int(n) < 65 for n in sent)

@pytest.fixture(scope='module')
def lines():
    "A `Lines` that answers with what it got, and its port"
    comm = socket.socket(); comm.bind(('127.0.0.1', 0))
    class Echo(listener.Lines):
        def reply(self, c, line): return b'got %d\n' % len(line)
    echo = Echo(comm)
    yield echo, comm.getsockname()[1]
    for c in list(echo.open.values()): echo.drop(c)
    comm.close()

@budget(2_000)
@given(st.lists(st.binary(max_size=40) | st.just(b'x'*3000) | st.just(b'\n'), max_size=4), st.booleans())
def test_bytes_at_the_listener(lines, parts, close):
    "Anything may come in any pieces: at most one line is taken, at most so long, and nothing stays open after it"
    case()
    echo, port = lines
    def turn():
        for key, _ in echo.sel.select(0): key.data(key.fileobj)
    with socket.create_connection(('127.0.0.1', port)) as s:
        for _ in range(3): turn()
        for o in parts:
            with contextlib.suppress(OSError): s.sendall(o)
            for _ in range(2): turn()
        if close:
            with contextlib.suppress(OSError): s.shutdown(socket.SHUT_WR)
    for _ in range(6): turn()
    whole = b''.join(parts)
    assert not echo.open and len(whole) >= 0

# Kernelspecs from elsewhere

STANZAS = st.fixed_dictionaries({}, optional=dict(class_name=st.sampled_from(['enterprise_gateway.services.processproxies.distributed.DistributedProcessProxy', 'X', 1]) | hostile,
    provisioner_name=st.sampled_from(['distributed-provisioner', 'local-provisioner']) | hostile,
    config=odd | st.dictionaries(st.sampled_from([*options, 'x']), odd | jsons | hostile | st.lists(hostile, max_size=2), max_size=3)))
KERNELS = st.fixed_dictionaries(dict(argv=st.lists(hostile | st.sampled_from(['{connection_file}', '{response_address}', 'python', '/a/scripts/launch_ipykernel.py', 'bin/run.sh', '-f',
        'launch_IRkernel.R', '--RemoteProcessProxy.kernel-id', '{kernel_id}']), max_size=6) | odd),
    optional=dict(env=kernelspec_envs | odd, display_name=hostile | odd, language=hostile | odd | st.sampled_from(['python', 'Scala', 'R']), interrupt_mode=odd,
        metadata=st.fixed_dictionaries({}, optional=dict(process_proxy=STANZAS | odd, kernel_provisioner=STANZAS | odd, supported_encryption=odd | st.just(['curve']))) | odd | jsons))

@budget(3_000)
@given(KERNELS | jsons, hostile | st.just(''), st.booleans())
def test_kernelspecs_to_adopt(tmp_path_factory, kernel, name, python):
    "A kernelspec from elsewhere becomes one that our provisioner takes, or is refused with a ValueError"
    case()
    base = tmp_path_factory.getbasetemp()/'adopt'
    shutil.rmtree(base, ignore_errors=True)
    source, target = base/'some kernel', base/'place'
    source.mkdir(parents=True); target.mkdir()
    try: text = json.dumps(kernel)
    except ValueError: return
    (source/'kernel.json').write_text(text, encoding='utf-8', errors='surrogatepass')
    try:
        k = adopt.read_kernel(source)
        spec = adopt.Adopted(source=source, kernel=k, display_name=name, python='python3' if python else '')
        spec.write(target, '/opt/kernels/x')
    except ValueError: return
    made = json.loads((target/'kernel.json').read_text(encoding='utf-8'))
    adopt.check_kernel(made)
    conf = made['metadata']['kernel_provisioner']
    assert conf['provisioner_name'] == 'distributed-provisioner' and not CANARY.exists()

@budget(1_000)
@given(st.binary(max_size=100) | bitten(b'{"argv": ["python", "-m", "k", "{connection_file}"], "env": {"A": "b"}, "metadata": {"process_proxy": {"class_name": "DistributedProcessProxy"}}}'))
def test_files_that_are_no_kernelspec(tmp_path_factory, raw):
    case()
    (dir := tmp_path_factory.getbasetemp()/'raw').mkdir(exist_ok=True)
    (dir/'kernel.json').write_bytes(raw)
    with contextlib.suppress(ValueError): adopt.check_kernel(adopt.read_kernel(dir))
