"""What runs on a kernel's host: launch_ipykernel.py and server_listener.py as loose files, in a Python that is told to
ignore its surroundings, started by a host application written here, independently of the package's; without an agent,
so that they report by the network. And the control port of an agent."""
import asyncio, base64, hashlib, hmac, json, os, shutil, signal, socket, subprocess, sys, threading, time, uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
import psutil, pytest, zmq
from Cryptodome.Protocol import HPKE
from Cryptodome.PublicKey import ECC
from jupyter_client import BlockingKernelClient
import gateway_provisioners_ssh
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.handshake import PROTOCOL, port_names
from gateway_provisioners_ssh.remote import local_session, spawn
from kernels import gone, left_of, taken_ports
from pace import Timer, slowness, wait

LAUNCHERS = Path(gateway_provisioners_ssh.__file__).parent/'launchers'
LIGHT = '''import socket, sys, json, time, signal, os
info = json.load(open(sys.argv[1]))
for k in ('shell', 'iopub', 'stdin', 'control', 'hb'):
    s = globals()[k] = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((info['ip'], info[k + '_port'])); s.listen()
signal.signal(signal.SIGINT, lambda *_: os.write(1, b'interrupted\\n'))
while True: time.sleep(100)''' # a kernel as far as ports and signals go

INFO, AAD, ANSWER, REQUEST, REPLY = (PROTOCOL[o].encode() for o in ('hpke_info', 'aad_prefix', 'answer_label',
    'request_label', 'reply_label'))

def b64(b): return base64.b64encode(b).decode()

class Host:
    "A host application: one launch, one response port"
    def __init__(self, kernel_id=None, version=2, **ticket):
        self.kernel_id, self.psk, self.key = kernel_id or str(uuid.uuid4()), os.urandom(32), ECC.generate(
            curve='Curve25519')
        self.public = b64(self.key.public_key().export_key(format='DER'))
        self.secret = b64(json.dumps(dict(version=version, psk=b64(self.psk), key=self.public, **ticket)).encode())
        self.server = socket.create_server(('127.0.0.1', 0), backlog=256)
        self.server.settimeout(180)
        self.address = '127.0.0.1:%d' % self.server.getsockname()[1]

    def argv(self, *args):
        return ['--kernel-id', self.kernel_id, '--response-address', self.address, '--public-key', self.public, *args]

    def receive(self, answer=None):
        "Take the launch message, answer it (rightly, or with `answer`), and return what it says"
        conn, _ = self.server.accept()
        with conn:
            conn.settimeout(20)
            raw = b''
            while part := conn.recv(9999): raw += part
            msg = json.loads(base64.b64decode(raw))
            assert (msg['version'], msg['kernel_id'], sorted(msg)) == (2, self.kernel_id,
                ['enc', 'kernel_id', 'sealed', 'version'])
            enc, kid = base64.b64decode(msg['enc']), self.kernel_id.encode()
            opener = HPKE.new(receiver_key=self.key, aead_id=HPKE.AEAD.AES128_GCM, enc=enc,
                              psk=(kid, self.psk), info=INFO)
            plain = opener.unseal(base64.b64decode(msg['sealed']), AAD + kid)
            right = hmac.new(self.psk, ANSWER + enc, hashlib.sha256).hexdigest().encode() + b'\n'
            conn.sendall(right if answer is None else answer)
        return json.loads(plain)

def sign(key, *parts): return hmac.new(key, b''.join(parts), hashlib.sha256).hexdigest()

@contextmanager
def control(info):
    with socket.create_connection((info['ip'], info['comm_port']), 10) as s, s.makefile('rb') as f:
        hello = json.loads(f.readline())
        assert hello['version'] == 2
        yield s, f, bytes.fromhex(hello['nonce'])

def signed(info, nonce, request):
    text = request if isinstance(request, str) else json.dumps(request)
    return json.dumps(dict(request=text, mac=sign(bytes.fromhex(info['control_key']), REQUEST, nonce,
                                                  text.encode()))).encode() + b'\n'

def ask(info, request):
    "The answer of the agent's control port to a proper request"
    with control(info) as (s, f, nonce):
        s.sendall(signed(info, nonce, request))
        got = json.loads(f.readline())
        assert hmac.compare_digest(got['mac'], sign(bytes.fromhex(info['control_key']), REPLY, nonce,
                                                    got['reply'].encode()))
        return json.loads(got['reply'])

REPORTED = """
import base64, json, os, socket, sys, time
t = json.loads(base64.b64decode(os.environ['KERNEL_LAUNCH_SECRET']))
with socket.socket(socket.AF_UNIX) as s:
    s.connect(t['socket'])
    said = dict(token=t['token'], ip='127.0.0.1', control=True, pgid=os.getpid(), fields={})
    s.sendall(json.dumps(said).encode() + b'\\n')
    s.recv(4096)
while True: time.sleep(100)"""

@pytest.fixture
def answering(tmp_path):
    "A process that an agent started and that has reported: `info` for control requests, its `pid`, the `agent`'s pid"
    async def start():
        session = await local_session(dict(PATH=os.environ['PATH'], HOME=str(tmp_path), TMPDIR=str(tmp_path)))
        async def sessions(): return session
        p = await spawn(session, sessions, str(tmp_path/'log'), argv=[sys.executable, '-c', REPORTED], env={},
                        max_bytes=65536, ticket={})
        return session, p, await asyncio.wait_for(asyncio.shield(p.report), 60)
    session, p, said = asyncio.run_coroutine_threadsafe(start(), background().loop).result(90)
    yield SimpleNamespace(info=dict(said, ip='127.0.0.1'), pid=p.pid, agent=session.hello['pid'], process=p)
    async def end(): await p.release(); session.close()
    asyncio.run_coroutine_threadsafe(end(), background().loop).result(30)

@pytest.fixture
def spec(tmp_path):
    "A kernelspec's scripts directory, elsewhere"
    d = tmp_path/'a spec'/'scripts'
    d.mkdir(parents=True)
    for o in ('launch_ipykernel.py', 'ipykernel_app.py', 'launch_kernel.py', 'server_listener.py'):
        shutil.copy(LAUNCHERS/o, d)
    return d

def members(pgid):
    "Live processes of a process group"
    def is_one(p):
        try: return os.getpgid(p.pid) == pgid and not gone(p.pid)
        except OSError: return False
    return [p for p in psutil.process_iter() if is_one(p)]

class Launched:
    "A launcher process, its log, and what it reported"
    def __init__(self, spec, host, *args, script='launch_ipykernel.py', command=(), env={}, wrap=(), flags=('-I',),
                 python=sys.executable, **kw):
        self.host, self.runtime = host, spec.parent/'runtime'
        self.log = spec.parent/f'{host.kernel_id}.log'
        env = {k: v for k, v in os.environ.items() if k != 'SSH_CONNECTION'} | dict(KERNEL_LAUNCH_SECRET=host.secret,
            JUPYTER_RUNTIME_DIR=str(self.runtime)) | env
        with open(self.log, 'wb') as out:
            self.proc = subprocess.Popen([*wrap, str(python), *flags, str(spec/script), *host.argv(*args),
                                          *(['--', *command] if command else [])],
                                         cwd='/', env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                         start_new_session=True, **kw)

    def text(self): return self.log.read_text()
    def signal(self, signum): os.killpg(self.info['pgid'], signum)
    def files(self): return sorted(self.runtime.glob(f'kernel-{self.host.kernel_id}-*.json'))
    def up(self, **kw):
        self.info = self.host.receive(**kw)
        return self

    def end(self):
        for pgid in {self.proc.pid, getattr(self, 'info', {}).get('pgid', self.proc.pid)}:
            try: os.killpg(pgid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.proc.wait()

    def left(self):
        "Processes that should not be there once the launch is over"
        return left_of(self.host.kernel_id) + members(self.proc.pid)

@pytest.fixture
def launch(spec):
    "Start launchers; at the end nothing of any is left"
    made = []
    def start(host=None, *args, **kw):
        made.append(Launched(spec, host or Host(), *args, **kw))
        return made[-1]
    yield start
    for k in made: k.end()
    wait(lambda: not any(k.left() for k in made), 15, 'nothing left')
    for k in made: k.host.server.close()

def light(start, *args, host=None, **kw):
    "A launch of the small stand-in for a kernel, by way of launch_kernel.py"
    return start(host, *args, script='launch_kernel.py',
                 command=[sys.executable, '-c', LIGHT, '{connection_file}'], **kw)

@contextmanager
def client(info):
    c = BlockingKernelClient()
    c.load_connection_info(dict(info))
    c.start_channels()
    try:
        c.wait_for_ready(timeout=90)
        yield c
    finally: c.stop_channels()

def run(c, code, timeout=90, begun=lambda: None):
    "Status, text and errors of a cell; `begun` is called with the first that the kernel says of it"
    got = SimpleNamespace(text='', error='')
    def hook(m):
        begun()
        o = m['content']
        got.text += o.get('text', '') if m['msg_type'] == 'stream' else o['data'].get('text/plain',
            '') if 'data' in o else ''
        if m['msg_type'] == 'error': got.error += f'{o["ename"]}: {o["evalue"]}'
    got.status = c.execute_interactive(code, timeout=timeout, output_hook=hook)['content']['status']
    return got

def interrupted(c, code, interrupt):
    "Run a cell that does not end by itself; `interrupt()` is called in a thread once it has begun"
    def begun():
        if not thread.ident: thread.start()
    thread = threading.Thread(target=interrupt)
    got = run(c, code, begun=begun)
    thread.join()
    return got

# A kernel like a local one --------------------------------------------------------------------------------------------

def test_user_code_finds_what_a_local_kernel_has(launch, tmp_path):
    from jupyter_client.manager import start_new_kernel
    look = ('import os, sys, threading; '
            'print([sys.path, os.getpgrp() == os.getpid(), "KERNEL_LAUNCH_SECRET" in os.environ])')
    threads = 'print({o.name for o in threading.enumerate()})'
    tricky = '"; touch /tmp/x; "\n$(id) `id` é'
    k = launch(None, '--kernel-class-name', 'ipykernel.ipkernel.IPythonKernel', env=dict(KERNEL_USERNAME=tricky),
               flags=()).up()
    km, local = start_new_kernel(cwd='/')
    try:
        with client(k.info) as c:
            assert eval(run(c, look).text) == eval(run(local, look).text)
            assert eval(run(c, threads).text) <= eval(run(local, threads).text) # without one that looks for its parent
            assert eval(run(c, 'print([os.environ["KERNEL_USERNAME"], sys.argv[1:]])').text) == [tricky,
                ['-f', str(k.runtime/f'kernel-{k.host.kernel_id}-{k.proc.pid}.json')]]
            children = run(c, 'try: os.waitpid(-1, os.WNOHANG)\nexcept ChildProcessError: print("childless")')
            assert children.text == 'childless\n'
            assert k.runtime.joinpath(f'kernel-{k.host.kernel_id}-{k.proc.pid}.json').stat().st_mode & 0o777 == 0o600
            assert k.host.secret not in ''.join(psutil.Process(k.proc.pid).cmdline())
            assert 'Cryptodome' not in Path(f'/proc/{k.proc.pid}/maps').read_text()
            alone = [psutil.Process(k.proc.pid)]
            wait(lambda: members(k.proc.pid) == left_of(k.host.kernel_id) == alone, 10, 'no process beside the kernel')
            c.shutdown()
            assert k.proc.wait(20) == 0
    finally:
        local.stop_channels(); km.shutdown_kernel(now=True)
    for secret in (k.host.secret, k.info['key']): assert secret not in k.text()

def test_interrupts_reach_busy_kernels_within_a_second(launch):
    k = launch().up()
    with client(k.info) as c:
        def seconds(code):
            sent = []
            def interrupt():
                time.sleep(.5)
                sent.append(Timer())
                k.signal(signal.SIGINT)
            assert interrupted(c, code, interrupt).error.startswith('KeyboardInterrupt')
            return float(sent[0])
        for code in ('while True: pass', 'import time; time.sleep(1000)',
                     'import subprocess; subprocess.run(["sleep", "1000"])'):
            assert min(seconds(code) for _ in range(3)) < slowness(), code
        assert run(c, 'print(6*7)').text == '42\n'

def test_a_stopped_process_is_continued(answering):
    assert ask(answering.info, dict(signum=signal.SIGSTOP)) == dict(alive=True)
    wait(lambda: psutil.Process(answering.pid).status() == psutil.STATUS_STOPPED, 30, 'stopped')
    assert ask(answering.info, dict(signum=signal.SIGCONT)) == dict(alive=True)
    wait(lambda: psutil.Process(answering.pid).status() != psutil.STATUS_STOPPED, 30, 'running')

def test_kernel_classes(launch, spec, tmp_path):
    d = tmp_path/'more'
    d.mkdir()
    (d/'mine.py').write_text(
        'from ipykernel.ipkernel import IPythonKernel\n'
        'class Mine(IPythonKernel): banner = "mine"\nclass NoKernel: pass\n')
    wrap = ['env', f'PYTHONPATH={d}', sys.executable, str(spec/'launch_ipykernel.py')]
    def start(name, host):
        return subprocess.Popen([*wrap, *host.argv('--kernel-class-name', name)],
                                env=dict(os.environ, KERNEL_LAUNCH_SECRET=host.secret, JUPYTER_RUNTIME_DIR=str(d/'r')),
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    host = Host()
    proc = start('mine.Mine', host)
    info = host.receive()
    with client(info) as c: assert run(c, 'print(get_ipython().kernel.banner)').text == 'mine\n'
    os.killpg(info['pgid'], signal.SIGTERM)
    assert proc.wait(10) == -signal.SIGTERM
    for name in ('mine.NoKernel', 'mine.Nobody', 'nowhere.Kernel'):
        proc = start(name, Host())
        said = proc.communicate(timeout=30)[1]
        assert proc.returncode == 1 and f'--kernel-class-name {name}' in said and 'Traceback' not in said

def test_encrypted_channels(launch):
    public, secret = map(bytes.decode, zmq.curve_keypair())
    k = launch(Host(encrypt=True, connection=dict(curve_publickey=public, curve_secretkey=secret))).up()
    with client(k.info) as c: assert run(c, 'print(6*7)').text == '42\n'
    plain = BlockingKernelClient()
    plain.load_connection_info({o: v for o, v in k.info.items() if not o.startswith('curve_')})
    plain.start_channels()
    # without a peer that accepts it, it could wait for ever to send
    plain.shell_channel.socket.setsockopt(zmq.SNDTIMEO, 500)
    with pytest.raises((RuntimeError, zmq.Again)): plain.wait_for_ready(timeout=2)
    plain.stop_channels()
    again = light(launch, '--curve', host=Host(encrypt=True, connection={o: k.info[o]
        for o in ('curve_publickey', 'curve_secretkey', 'key')})).up()
    assert all(again.info[o] == k.info[o] for o in ('curve_publickey', 'curve_secretkey', 'key'))

# Ports ----------------------------------------------------------------------------------------------------------------

def free_range(n):
    "The first and the last of `n` ports in a row that nobody uses"
    with taken_ports(n) as lo: return lo, lo+n-1

def ports(info): return [info[o] for o in port_names]

def test_forty_kernels_at_once_fill_a_range_exactly(launch):
    lo, hi = free_range(200)
    kernels = [launch(None, '--port-range', f'{lo}..{hi}') for _ in range(40)]
    with ThreadPoolExecutor(40) as pool: list(pool.map(lambda k: k.up(), kernels))
    assert sorted(p for k in kernels for p in ports(k.info)) == list(range(lo, hi+1))
    def hello(k):
        with client(k.info) as c: return run(c, 'import os; print(os.getpid())', 180).text == f'{k.proc.pid}\n'
    with ThreadPoolExecutor(10) as pool: assert all(pool.map(hello, kernels))
    one_more = launch(None, '--port-range', f'{lo}..{hi}')
    assert one_more.proc.wait(20) == 1
    assert f'fewer than 5 ports are free in {lo}..{hi}' in one_more.text() and one_more.text().count('\n') == 1

def test_many_at_once_on_any_ports(launch):
    kernels = [light(launch) for _ in range(60)]
    with ThreadPoolExecutor(60) as pool: list(pool.map(lambda k: k.up(), kernels))
    used = [p for k in kernels for p in ports(k.info)]
    assert len(set(used)) == 300

def test_a_restart_keeps_ports_and_key_past_time_wait(launch):
    k = launch().up()
    with client(k.info) as c: assert run(c, 'print(1)').text == '1\n'
    os.killpg(k.proc.pid, signal.SIGKILL)
    connection = {o: k.info[o] for o in (*port_names, 'key')}
    again = launch(Host(k.host.kernel_id, connection=connection)).up()
    assert {o: again.info[o] for o in connection} == connection
    with client(again.info) as c: assert run(c, 'print(2)').text == '2\n'

def test_ports_that_others_took_are_replaced(launch):
    with socket.create_server(('127.0.0.1', 0)) as other:
        taken = other.getsockname()[1]
        k = light(launch, host=Host(connection=dict(shell_port=taken, iopub_port=0, hb_port='x', key='same'))).up()
        assert taken not in ports(k.info) and k.info['key'] == 'same'

@pytest.mark.parametrize('text', ['9..3', 'abc', '1..', '1..70000', '-1..5', '10-20', '٣..٩'])
def test_wrong_port_ranges(launch, text):
    k = light(launch, f'--port-range={text}')
    assert k.proc.wait(10) == 2 and 'is not LOWER..UPPER' in k.text()

def test_addresses(spec):
    code = ('import sys, json; sys.path.insert(0, sys.argv[1]); import server_listener as s; peer, ssh = sys.argv[2:]\n'
            'try: print(s.bind_ip(peer, dict(SSH_CONNECTION=ssh)))\nexcept s.LauncherError as e: print(e)')
    def bind_ip(peer, ssh=''):
        return subprocess.run([sys.executable, '-I', '-c', code, spec, peer, ssh], capture_output=True, text=True,
                              check=True).stdout.strip()
    assert bind_ip('127.0.0.1', '10.0.0.1 1 10.0.0.2 22') == bind_ip('::1') == bind_ip('127.0.5.5') == '127.0.0.1'
    assert bind_ip('10.0.0.1', '10.0.0.1 1 10.0.0.2 22') == bind_ip('10.0.0.1',
        '::ffff:10.0.0.1 1 ::ffff:10.0.0.2 22') == '10.0.0.2'
    here = bind_ip('127.0.0.1')
    assert bind_ip('2001:db8::1', '2001:db8::1 1 2001:db8::2 22').startswith(
        'no IPv4 address of this host reaches 2001:db8::1') and here

# Launches that must not stand -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('answer', [b'', b'0'*64 + b'\n', b'\xff'*2000], ids=['none', 'wrong', 'long'])
def test_an_unconfirmed_launch_leaves_nothing(launch, answer):
    k = launch()
    k.up(answer=answer)
    assert k.proc.wait(10) == -signal.SIGTERM
    wait(lambda: not k.left(), 10, 'nothing left')
    assert 'the host application did not confirm this launch' in k.text()

def test_an_unconfirmed_kernel_that_ignores_sigterm_is_killed(launch):
    stubborn = LIGHT.replace(
        'signal.signal(', 'signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork(); signal.signal(', 1)
    k = launch(None, script='launch_kernel.py',
               command=[sys.executable, '-c', stubborn, '{connection_file}']).up(answer=b'no')
    assert k.proc.wait(10) == -signal.SIGKILL
    wait(lambda: not k.left(), 10, 'nothing left')

def test_a_host_application_that_is_gone(launch):
    host = Host()
    host.server.close()
    k = launch(host)
    assert k.proc.wait(10) == -signal.SIGTERM and f'cannot be reached at 127.0.0.1 port {host.address[10:]}' in k.text()

def test_a_kernel_that_cannot_start(launch):
    k = launch(None, script='launch_kernel.py', command=['/no/such/kernel', '{connection_file}'])
    assert k.proc.wait(
        10) == 127 and 'there is no /no/such/kernel on this host' in k.text() and 'Traceback' not in k.text()
    k = launch(None, script='launch_kernel.py',
               command=[sys.executable, '-c', 'raise SystemExit(7)', '{connection_file}'])
    assert k.proc.wait(10) == 7

def test_a_launch_cancelled_at_any_moment_leaves_nothing(launch):
    def cancel(i):
        k = launch()
        time.sleep(i/50)
        os.killpg(k.proc.pid, (signal.SIGTERM, signal.SIGKILL)[i % 2])
        assert k.proc.wait(10) < 0
        return k
    with ThreadPoolExecutor(4) as pool: kernels = list(pool.map(cancel, range(40)))
    wait(lambda: not any(k.left() for k in kernels), 10, 'nothing left')

@pytest.mark.parametrize('secret,words', [('', 'needs a host application that speaks version 2'),
                                          ('AAAA', 'nothing that is a launch ticket'),
    (b64(b'{"version": 3}'), 'install the kernelspec again'), (b64(b'[1]'), 'nothing that is a launch ticket'),
    (b64(b'{"version": 2}'), 'nothing that is'),
    (b64(b'{"version": 2, "psk": "AAAA", "key": "AAAA"}'), 'holds no key')],
    ids=['empty', 'no json', 'version 3', 'no object', 'incomplete', 'no key'])
def test_tickets_that_are_none(launch, secret, words):
    k = launch(None, env=dict(KERNEL_LAUNCH_SECRET=secret))
    assert k.proc.wait(20) in (1, -signal.SIGTERM) and words in k.text() and 'Traceback' not in k.text()

def test_arguments(launch, spec):
    for args, words in ((['--spark-context-initialization-mode', 'later'], 'invalid choice'),
                        (['--response-address', 'nowhere'], "'nowhere' is not IP:PORT")):
        k = launch(None, *args)
        assert k.proc.wait(10) == 2 and words in k.text() and k.text().count('\n') == 1
    host = Host()
    spelt = [o.replace('--', '--RemoteProcessProxy.') for o in host.argv('--port-range', '0..0')]
    proc = subprocess.Popen([sys.executable, spec/'launch_ipykernel.py', *spelt],
                            env=dict(os.environ, KERNEL_LAUNCH_SECRET=host.secret), start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert host.receive()['pid'] == proc.pid
    os.killpg(proc.pid, signal.SIGKILL); proc.wait()

def test_missing_packages_are_named(launch, tmp_path):
    bare = tmp_path/'bare'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', bare], check=True)
    python = str(bare/'bin'/'python')
    host = Host()
    got = subprocess.run([python, LAUNCHERS/'launch_ipykernel.py', *host.argv()],
                         env=dict(os.environ, KERNEL_LAUNCH_SECRET=host.secret), capture_output=True, text=True)
    assert got.returncode == 1 and f'{python} -m pip install ipykernel' in got.stderr
    got = subprocess.run([python, LAUNCHERS/'launch_kernel.py', *host.argv(), '--', 'sh', '-c', 'sleep 100',
                          '{connection_file}'], capture_output=True, text=True, start_new_session=True,
                         env=dict(os.environ, KERNEL_LAUNCH_SECRET=host.secret, JUPYTER_RUNTIME_DIR=str(tmp_path)))
    assert got.returncode == -signal.SIGTERM and f'{python} -m pip install "pycryptodomex>=3.22"' in got.stderr

def test_a_place_that_cannot_be_written(launch, tmp_path):
    (tmp_path/'file').write_text('')
    k = light(launch, env=dict(JUPYTER_RUNTIME_DIR=str(tmp_path/'file'/'below')))
    assert k.proc.wait(10) == 1 and 'set JUPYTER_RUNTIME_DIR' in k.text()

# Ends -----------------------------------------------------------------------------------------------------------------

def test_a_group_ends_with_its_kernel(answering, tmp_path):
    "Also what the kernel started, when a shutdown is asked for"
    assert set(ask(answering.info, dict(shutdown=1))) == {'alive'}   # it may have ended by now
    assert asyncio.run_coroutine_threadsafe(asyncio.wait_for(asyncio.shield(answering.process.exited), 20),
                                            background().loop).result(30) == -signal.SIGTERM

def test_a_kernel_leads_a_group_of_its_own(launch):
    k = launch(None, wrap=['sh', '-c', '"$@" & wait', 'sh']).up()
    assert k.info['pid'] != k.proc.pid and k.info['pgid'] == k.info['pid']

def test_the_form_for_launchers_that_are_not_python(launch, spec, tmp_path):
    file = tmp_path/'deep'/'k.json'
    script = f'''import os, subprocess, sys, time
ticket, argv = os.environ, sys.argv[1:]
subprocess.Popen([sys.executable, {str(spec/"server_listener.py")!r}, *argv,
                  '--connection-file', {str(file)!r}, '--parent-pid', str(os.getpid())])
del os.environ['KERNEL_LAUNCH_SECRET']
while not os.path.exists({str(file)!r}): time.sleep(.01)
sys.argv[1:] = [{str(file)!r}]
''' + LIGHT
    def start(host, *args):
        return subprocess.Popen([sys.executable, '-c', script, *host.argv(*args)],
                                env=dict(os.environ, KERNEL_LAUNCH_SECRET=host.secret), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, start_new_session=True)
    host = Host()
    proc = start(host)
    info = host.receive()
    assert (info['pid'], info['pgid']) == (proc.pid, proc.pid) and file.exists()
    os.killpg(info['pgid'], signal.SIGINT)
    assert proc.stdout.readline() == b'interrupted\n'
    proc.kill(); proc.wait()
    wait(lambda: not left_of(host.kernel_id), 10, 'all gone')
    proc = start(Host(), '--port-range', '5..8')
    assert proc.wait(10) == -signal.SIGTERM and b'fewer than 5 ports' in proc.stderr.read()

# Strangers at the control port ----------------------------------------------------------------------------------------

def silent(f):
    "Nothing comes but the end of the connection"
    try: return f.readline() == b''
    except ConnectionError: return True

def test_forged_replayed_and_malformed_requests(answering):
    k = answering
    key = bytes.fromhex(k.info['control_key'])
    with control(k.info) as (s, f, nonce):
        line = signed(k.info, nonce, dict(signum=0))
        s.sendall(line)
        assert f.readline()
    def refused(line):
        with control(k.info) as (s, f, nonce):
            s.sendall(line(nonce) if callable(line) else line)
            return silent(f)
    kill = json.dumps(dict(signum=9))
    text = lambda mac: lambda nonce: json.dumps(dict(request=kill, mac=mac(nonce))).encode() + b'\n'
    assert refused(line) # the same request again
    assert refused(text(lambda n: sign(bytes(32), REQUEST, n, kill.encode())))
    assert refused(text(lambda n: sign(key, REPLY, n, kill.encode())))
    assert refused(text(lambda n: sign(key, REQUEST, n, kill.encode())[:-1]))
    assert refused(text(lambda n: sign(key, REQUEST, n, kill.encode()).upper().replace('0', '٠')))
    for junk in (b'\n', b'{}\n', b'[' * 4000 + b'\n', b'\xff\xfe\n', b'{"request": 1, "mac": 2}\n', b'{"signum": 9}\n',
                 b'"\n', b'null\n', b'x' * 5000, os.urandom(4000) + b'\n'):
        assert refused(junk)
    for odd in ('null', '[]', '{"signum": true}', '{"signum": -1}', '{"signum": 65}', '{"signum": "9"}',
                '{"signum": 9.0}', '{}', '{"shutdown": 0}'):
        assert 'error' in ask(k.info, odd)
    assert ask(k.info, dict(signum=0)) == dict(alive=True)

def test_ten_thousand_connections(answering):
    k = answering
    agent = psutil.Process(k.agent)
    ask(k.info, dict(signum=0))
    before = agent.memory_info().rss
    peer, most = (k.info['ip'], k.info['comm_port']), 0
    def junk(i):
        with socket.create_connection(peer, 30, source_address=('127.0.0.66', 0)) as s:
            try: s.sendall((b'', b'{"request"', b'x\n', os.urandom(3000))[i % 4])
            except OSError: pass
    with ThreadPoolExecutor(16) as pool:
        todo = [pool.submit(junk, i) for i in range(10000)]
        while not todo[-1].done():
            assert ask(k.info, dict(signum=0)) == dict(alive=True) # answered while they come
            most = max(most, agent.num_fds())
    for o in todo: o.result()
    assert most < 64 + 32 and agent.memory_info().rss < before + 4*2**20
    assert ask(k.info, dict(signum=0)) == dict(alive=True) and gone(k.pid) is False

def test_slow_connections_do_not_hold_up_others(answering):
    k = answering
    def seconds():
        with ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection((k.info['ip'], k.info['comm_port']), 20))
                    for _ in range(100)]
            for s in slow[-60:]: s.sendall(b'{')
            started = Timer()
            assert ask(k.info, dict(signum=0)) == dict(alive=True)
            answered = float(started)
            for s in slow: # 36 gave way, the others ran out of time
                with s.makefile('rb') as f: f.readline(); assert silent(f)
            return answered, float(started)
    took = []
    while not any(answered < 1 and ended < 7 for answered, ended in took):
        if len(took) == 3:
            slow = slowness()
            assert any(answered < slow and ended < 7*slow for answered, ended in took), took
            break
        took.append(seconds())

def test_an_idle_agent_does_nothing(answering):
    k = answering
    ask(k.info, dict(signum=0))
    p = Path(f'/proc/{k.agent}/status')
    def switches(): return [o for o in p.read_text().splitlines() if 'ctxt_switches' in o]
    def idle():
        before = switches()
        time.sleep(3)
        return switches() == before
    wait(idle, 20, 'nothing done in 3 s') # once its last connection is gone

# Spark ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def spark_env():
    pytest.importorskip('pyspark')
    if not shutil.which('java'): pytest.skip('no java')
    return lambda master: dict(
        SPARK_LOCAL_IP='127.0.0.1',
        PYSPARK_SUBMIT_ARGS=f'--master {master} --conf spark.ui.enabled=false pyspark-shell')

LONG = ('import pathlib, time; '
        'sc.parallelize(range(4), 4).map(lambda x: pathlib.Path("{}").touch() or time.sleep(300)).count()')
ACTIVE = 'print(list(sc.statusTracker().getActiveJobsIds()))'

def test_spark_lazy(launch, spark_env, tmp_path):
    k = launch(None, '--spark-context-initialization-mode', 'lazy', env=spark_env('local[2]')).up()
    with client(k.info) as c:
        # the first reply is there before Spark is
        assert run(c, 'print(type(sc).__name__); sqlCtx = "mine"').text == 'LazySparkProxy\n'
        proxy = ('import pyspark; '
                 'print(isinstance(sc, pyspark.SparkContext), "parallelize" in dir(sc), type(sc).__name__)')
        assert run(c, proxy).text == 'True True LazySparkProxy\n'
        assert "'local[2]'" in run(c, 'sc.master').text
        assert 'Row(two=2)' in run(c, 'sql("select 1+1 as two").collect()').text
        names = 'print(type(sc).__name__, type(spark).__name__, type(sqlContext).__name__)'
        wait(lambda: run(c, names).text == 'SparkContext SparkSession SQLContext\n', 30, 'the real ones')
        assert run(c, 'print(sqlCtx)').text == 'mine\n' # the user's own names win
        for i, code in enumerate((LONG, '%%time\n' + LONG)): # %%time swallows the exception that a cell ends with
            begun = tmp_path/f'begun{i}'
            def interrupt():
                wait(begun.exists, 60, 'the job has begun')
                k.signal(signal.SIGINT)
            assert interrupted(c, code.format(begun), interrupt).status == 'error' or '%%time' in code
            assert run(c, ACTIVE).text.endswith('[]\n')
            assert '10' in run(c, 'spark.range(10).count()').text
        jvms = [p for p in psutil.Process(k.proc.pid).children() if p.name() == 'java']
        assert len(jvms) == 1
        k.signal(signal.SIGTERM)
    wait(lambda: gone(jvms[0].pid) and gone(k.proc.pid), 10, 'the JVM gone')

def test_spark_that_cannot_start(launch, spark_env):
    k = launch(None, '--spark-context-initialization-mode', 'lazy', env=spark_env('nonsense')).up()
    with client(k.info) as c:
        got = run(c, 'sc.master')
        assert got.status == 'error' and got.error.startswith('SparkUnavailable: Spark could not be started: ')
        assert run(c, 'print(6*7)').text == '42\n'
        assert run(c, 'sc').error.startswith('SparkUnavailable') and run(c,
            'del sc; sc').error == "NameError: name 'sc' is not defined"
    k = launch(None, '--spark-context-initialization-mode', 'eager', env=spark_env('nonsense'))
    assert k.proc.wait(60) == 1 and 'Spark could not be started: ' in k.text().splitlines()[-1]

def test_spark_eager_and_none(launch, spark_env, tmp_path):
    k = launch(None, '--spark-context-initialization-mode', 'eager', env=spark_env('local[1]')).up()
    with client(k.info) as c:
        assert run(c, 'print(type(sc).__name__, sc.master)').text == 'SparkContext local[1]\n'
        assert run(c, '%who').text == 'Interactive namespace is empty.\n'
        begun = tmp_path/'begun'
        def interrupt():
            wait(begun.exists, 60, 'the cell has begun')
            for seconds in (.5, 2.5): # until it is in the JVM; until its user has been told
                time.sleep(seconds)
                k.signal(signal.SIGINT)
        # which is no job, and so not cancelled
        got = interrupted(c, f'open({str(begun)!r}, "w").close(); sc._jvm.java.lang.Thread.sleep(10**9)', interrupt)
        assert got.error.startswith('KeyboardInterrupt') and 'Interrupt once more to leave it' in got.text
        assert run(c, 'print(sc.parallelize(range(10)).sum())').text == '45\n'
    k.end()
    for args in (['--spark-context-initialization-mode', 'none'],
                 ['--spark-context-initialization-mode', 'lazy', '--cluster-type', 'none'], []):
        k = launch(None, *args, env=spark_env('local[1]')).up()
        with client(k.info) as c:
            assert run(c, 'print({"spark", "sc", "sql", "sqlContext", "sqlCtx"} & set(globals()))').text == 'set()\n'

def test_spark_without_pyspark(launch, tmp_path):
    import ipykernel # in a Python that has the kernel's packages and no pyspark
    bare = tmp_path/'bare'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', bare], check=True)
    site = next(bare.glob('lib/python*/site-packages'))
    for o in Path(ipykernel.__file__).parent.parent.iterdir():
        if not o.name.startswith(('pyspark', '_', '__editable__', 'gateway')) : (site/o.name).symlink_to(o)
    k = launch(None, '--spark-context-initialization-mode', 'lazy', python=bare/'bin'/'python').up()
    with client(k.info) as c: assert run(c, 'print("sc" in globals())').text == 'False\n'
    assert 'has no pyspark: the kernel starts without Spark names' in k.text()
