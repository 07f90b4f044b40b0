"""A kernel's whole life on real hosts, as host applications lead it: notebooks, consoles, managers of every kind, forty
at once, every way in which a launch can fail or be given up, and what is left afterwards, which is nothing."""
import asyncio, contextlib, gc, logging, os, re, shutil, signal, subprocess, sys, textwrap, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import jupyter_kernel_test, nbformat, psutil, pytest
from jupyter_client import AsyncMultiKernelManager, KernelManager, MultiKernelManager
from nbclient import NotebookClient
from gateway_provisioners_ssh import background as bg
from gateway_provisioners_ssh.hosts import Host
from gateway_provisioners_ssh.provisioner import DistributedProvisioner, shared
from gateway_provisioners_ssh.errors import LaunchError
from hosts import interruptible
from kernels import BIN, client_of, ended, forget, interrupt, kill, printed, taken_ports, value
from pace import Timer, until, wait, within

@pytest.fixture
def remote(remote, caplog):
    "The same, and a test leaves no task to complain of"
    yield remote
    forget()
    gc.collect()
    for when in ('setup', 'call'):
        assert not [o.getMessage() for o in caplog.get_records(when) if o.name == 'asyncio'
                    and o.levelno >= logging.ERROR]

cell, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell

# Host applications

NOTEBOOK = ['import os, sys, math\nprint("on", os.environ["GP_TEST_HOST"], "for", os.environ["KERNEL_USERNAME"])',
            'from IPython.display import HTML, display\ndisplay(HTML("<b>bold</b>"))\nsum(range(10**6))',
            'for i in range(3): print(i, flush=True)',
            'print("careful", file=sys.stderr)',
            '%%bash\necho "$((6*7))"',
            'import asyncio\nawait asyncio.sleep(.01)\nmath.comb(50, 25)',
            '1/0']

def notebook(): return nbformat.v4.new_notebook(cells=[text('# A notebook'), *map(cell, NOTEBOOK)])

def shown(o): return o.get('text') or o.get('ename') or o['data'].get('text/html') or o['data']['text/plain']
def outputs(nb): return [''.join(map(shown, c.outputs)) for c in nb.cells if c.cell_type == 'code']

def check_outputs(nb, host):
    assert outputs(nb) == [f'on {host} for ada\n', '<b>bold</b>499999500000', '0\n1\n2\n', 'careful\n', '42\n',
                           '126410606437752', 'ZeroDivisionError']

async def test_notebook_on_every_host(remote):
    async def execute(host):
        nb = notebook()
        await NotebookClient(nb, kernel_name='ssh_python', allow_errors=True,
                             timeout=60).async_execute(env=os.environ | dict(KERNEL_REMOTE_HOST=host))
        check_outputs(nb, host)
    with remote.nothing_left(): await asyncio.gather(*map(execute, remote.lab.names))

def run(*argv, timeout=120, **kw):
    return subprocess.run([str(o) for o in argv], capture_output=True, text=True, timeout=timeout, **kw)

def test_jupyter_execute(remote, tmp_path):
    nbformat.write(notebook(), f := tmp_path/'a notebook.ipynb')
    with remote.nothing_left():
        r = run(BIN/'jupyter', 'execute', '--kernel_name=ssh_python', '--allow-errors', '--output=done', f)
        assert r.returncode == 0, r.stderr
        assert 'Traceback' not in r.stderr and 'never retrieved' not in r.stderr, r.stderr
    check_outputs(nbformat.read(tmp_path/'done.ipynb', 4), 'host1')

def test_jupyter_console(remote):
    """Also the blocking `KernelManager` of an application without an event loop; it asks its kernel to end and exits
    without waiting"""
    code = 'import os\nx = 6*7\nprint("on", os.environ["GP_TEST_HOST"], x)\nprint("pid", os.getpid())\n'
    with remote.nothing_left():
        r = run(BIN/'jupyter', 'console', '--kernel=ssh_python', '--simple-prompt',
                '--ZMQTerminalInteractiveShell.confirm_exit=False', input=code)
        assert r.returncode == 0, r.stderr
        assert 'on host1 42' in r.stdout and 'Traceback' not in r.stdout+r.stderr, (r.stdout, r.stderr)
        wait(lambda: not psutil.pid_exists(int(re.search(r'pid (\d+)', r.stdout)[1])))

def test_jupyter_run_and_kernel(remote, tmp_path):
    "Each ends its kernel in a way of its own; the first also passes arguments on to it"
    (tmp_path/'script.py').write_text('print(6*7)')
    with remote.nothing_left():
        r = run(BIN/'jupyter', 'run', '--kernel=ssh_python', tmp_path/'script.py')
        assert r.returncode == 0 and '42' in r.stdout, (r.stdout, r.stderr)
        p = subprocess.Popen([BIN/'jupyter', 'kernel', '--kernel=ssh_python'], stderr=subprocess.PIPE, text=True)
        kernel_id = next(m[1] for line in p.stderr if (m := re.search(r'kernel (\S+) runs on host host1', line)))
        wait(lambda: 'To connect a client' in p.stderr.readline())
        p.send_signal(signal.SIGTERM)
        p.communicate(timeout=30)
        assert (p.returncode == 0 and not remote.lab.kernels(kernel_id)
                and not list(Path('/tmp').glob(f'kernel-{kernel_id}.log*')))

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_jupyter_execute_stopped(remote, tmp_path, sig):
    "In the middle of a cell"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[cell('import time; open("running", "w").close(); time.sleep(1000)')]),
        tmp_path/'long.ipynb')
    with remote.nothing_left(ignore=['/running$']):
        p = subprocess.Popen([BIN/'jupyter', 'execute', '--kernel_name=ssh_python', 'long.ipynb'], cwd=tmp_path,
                             stderr=subprocess.DEVNULL, preexec_fn=interruptible)
        wait(lambda: (tmp_path/'running').exists(), 30)
        p.send_signal(sig)
        p.wait(30)

@pytest.mark.parametrize('first', [True, False], ids=['registered before', 'registered after'])
def test_exit_handler(remote, first):
    "Exit handlers run in the reverse order of their registration, so some run after ours"
    script = f"""
import atexit
from jupyter_client import KernelManager
km = KernelManager(kernel_name='ssh_python')
if {first}: atexit.register(lambda: km.shutdown_kernel(now=True))
km.start_kernel()
kc = km.client()
kc.start_channels()
kc.wait_for_ready(timeout=60)
kc.execute_interactive('6*7')
kc.stop_channels()
if not {first}: atexit.register(lambda: km.shutdown_kernel(now=True))
"""
    with remote.nothing_left():
        r = run(sys.executable, '-c', script)
        assert r.returncode == 0 and not r.stderr, r.stderr

def test_gone_without_a_word(remote):
    "A host application that leaves its kernel alone leaves it running, and says nothing about it"
    script = ("from jupyter_client import KernelManager; km = KernelManager(kernel_name='ssh_python'); "
              "km.start_kernel(); print(km.provisioner.process.pid, km.provisioner.process.id, km.kernel_id)")
    r = run(sys.executable, '-c', script)
    pid, id, kernel_id = r.stdout.split()
    dir, = [d for h in remote.lab for d in h.tmp.glob(f'gpssh-*/k-{id}')]
    try: assert not r.stderr and psutil.pid_exists(int(pid))
    finally:
        os.killpg(int(pid), signal.SIGKILL)
        wait(lambda: not remote.lab.kernels())
        wait(lambda: os.path.exists(f'{dir}/status'))
        shutil.rmtree(dir)
        for f in [*Path('/tmp').glob(f'kernel-{kernel_id}.log*'), *remote.runtime.glob(f'kernel-{kernel_id}*')]:
            f.unlink()

@pytest.fixture(scope='class')
def standard_kernel(request, _remote):
    suite = super(TestStandard, request.cls)
    suite.setUpClass()
    yield
    suite.tearDownClass()
    forget()

@pytest.mark.usefixtures('standard_kernel')
class TestStandard(jupyter_kernel_test.KernelTests):
    "The suite by which kernels are judged, on a kernel that runs elsewhere"
    kernel_name, language_name, file_extension = 'ssh_python', 'python', '.py'
    code_hello_world = 'print("hello, world")'
    code_stderr = 'import sys; print("test", file=sys.stderr)'
    completion_samples = [dict(text='zi', matches={'zip'})]
    complete_code_samples, incomplete_code_samples = (['1', "print('hello, world')", 'def f(x):\n  return x*2\n\n\n'],
                                                      ["print('''hello", 'def f(x):\n  x*2'])
    invalid_code_samples = ['import = 7q']
    code_page_something = 'zip?'
    code_generate_error = '1/0'
    code_execute_result = [dict(code='1+2+3', result='6'), dict(code='[n*n for n in range(1, 4)]', result='[1, 4, 9]')]
    code_display_data = [dict(code='from IPython.display import HTML, display; display(HTML("<b>test</b>"))',
                              mime='text/html')]
    code_history_pattern = '1?2*'
    supported_history_operations = ('tail', 'search')
    code_inspect_sample = 'zip'
    code_clear_output = 'from IPython.display import clear_output; clear_output()'

    setUpClass = tearDownClass = classmethod(lambda cls: None)   # not before the hosts are there

# Managers, threads, loops and processes

def compute(km):
    "Use a kernel as a blocking application does"
    kc = km.client()
    kc.start_channels()
    try:
        kc.wait_for_ready(timeout=60)
        r = kc.execute_interactive('', user_expressions=dict(v='6*7'), silent=True, timeout=30)
        return r['content']['user_expressions']['v']['data']['text/plain']
    finally: kc.stop_channels()

def test_blocking_managers_in_threads(remote):
    def life(_):
        km = KernelManager(kernel_name='ssh_python')
        km.start_kernel()
        try: assert compute(km) == '42' and km.is_alive()
        finally: km.shutdown_kernel()
        return remote.host(km).name, km.is_alive()
    with remote.nothing_left(), ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(life, range(4))) == [(o, False) for o in remote.lab.names]

def test_one_loop_after_another(remote):
    "Each `asyncio.run` is a loop of its own, and the kernel outlives them"
    km = remote.manager()
    async def use(expr):
        async with client_of(km) as kc: return await value(kc, expr)
    with remote.nothing_left():
        asyncio.run(km.start_kernel())
        pid = asyncio.run(use('__import__("os").getpid()'))
        assert asyncio.run(km.is_alive())
        asyncio.run(km.restart_kernel())
        assert asyncio.run(use('__import__("os").getpid()')) != pid
        os.kill(asyncio.run(use('__import__("os").getpid()')), signal.SIGKILL)
        assert asyncio.run(asyncio.wait_for(km.provisioner.wait(), 20)) == -9
        asyncio.run(km.shutdown_kernel())
        for o in Path('/tmp').glob(f'kernel-{km.kernel_id}.log*'): o.unlink()   # it ended by itself, so its log stayed

def test_multi_kernel_manager(remote):
    with remote.nothing_left():
        mkm = MultiKernelManager(default_kernel_name='ssh_python')
        ids = [mkm.start_kernel() for _ in range(3)]
        assert [compute(mkm.get_kernel(i)) for i in ids] == ['42']*3
        mkm.restart_kernel(ids[0])
        mkm.interrupt_kernel(ids[1])
        assert compute(mkm.get_kernel(ids[0])) == '42' and all(mkm.is_alive(i) for i in ids)
        mkm.shutdown_all()
        assert mkm.list_kernel_ids() == []

async def test_async_multi_kernel_manager(remote):
    with remote.nothing_left():
        mkm = AsyncMultiKernelManager(default_kernel_name='ssh_python')
        ids = await asyncio.gather(*(mkm.start_kernel() for _ in range(4)))
        assert sorted(remote.host(mkm.get_kernel(i)).name for i in ids) == remote.lab.names
        await asyncio.gather(*(mkm.restart_kernel(i, now=True) for i in ids))
        assert all([await mkm.is_alive(i) for i in ids])
        await mkm.shutdown_all(now=True)

def test_fork(remote, tmp_path):
    """A process with threads that forks: the child starts kernels of its own, and what is the parent's stays the
    parent's"""
    with remote.nothing_left():
        km = KernelManager(kernel_name=remote.spec('first', hosts=['host1']))
        km.start_kernel()
        assert compute(km) == '42'
        conn, agent = km.provisioner.conn, km.provisioner.conn.agent
        r, w = os.pipe()
        if not (pid := os.fork()):
            out = b'failed'
            try:
                os.dup2(os.open(tmp_path/'stderr', os.O_CREAT|os.O_WRONLY), 2)
                logging.getLogger().handlers[:] = [logging.StreamHandler(open(2, 'w', closefd=False))]
                kid = KernelManager(kernel_name='first')
                kid.start_kernel()
                out = b'%s %d' % (compute(kid).encode(), remote.lab[0].connections())
                kid.shutdown_kernel()
                gc.collect()
            except BaseException as e: out = repr(e).encode()
            finally:
                os.write(w, out)
                os._exit(0)
        os.close(w)
        with open(r) as f: assert f.read() == '42 2'
        os.waitpid(pid, 0)
        assert 'Task' not in (said := (tmp_path/'stderr').read_text()) and 'Error' not in said, said
        assert conn.is_up and conn.agent is agent and compute(km) == '42'
        km.shutdown_kernel()

async def test_forty_at_once(remote):
    "Far more than an sshd with default settings takes as connections (10) or as sessions (10 a connection)"
    kms = [remote.manager() for _ in range(40)]
    async def start(km):
        await km.start_kernel()
        async with client_of(km, 120) as kc: return await value(kc, '__import__("os").environ["GP_TEST_HOST"]')
    with remote.nothing_left(30):
        where = await asyncio.gather(*map(start, kms))
        assert sorted(where) == sorted(remote.lab.names*10)
        assert [h.connections() for h in remote.lab] == [1]*4
        await asyncio.gather(*(km.shutdown_kernel() for km in kms))
        assert not any([await km.is_alive() for km in kms])

async def test_pending_kernels(remote):
    "A manager that does not wait for its kernels learns all the same how their starts went"
    remote.spec('broken', lambda a: ['/opt/no/python', *a[1:]])
    with remote.nothing_left():
        mkm = AsyncMultiKernelManager(default_kernel_name='ssh_python', use_pending_kernels=True)
        good, bad, unready = [await mkm.start_kernel(kernel_name=o) for o in ('ssh_python', 'broken', 'ssh_python')]
        with pytest.raises(LaunchError, match='/opt/no/python: not found'):
            await asyncio.wait_for(mkm.get_kernel(bad).ready, 20)
        await asyncio.wait_for(mkm.get_kernel(good).ready, 20)
        await mkm.shutdown_kernel(bad)
        await mkm.shutdown_all(now=True)
        await asyncio.wait_for(asyncio.gather(*mkm._pending_kernels.values()), 20)
        assert not mkm.list_kernel_ids()

async def test_working_directory(remote):
    "The request's, else the host application's, else home: the first that the host has"
    home = str(remote.lab[0].home)
    spec = remote.spec('one', hosts=['host1'])
    with remote.nothing_left():
        for env, cwd, want in ((dict(KERNEL_WORKING_DIR='/usr/lib'), '/tmp', '/usr/lib'), ({}, '/usr', '/usr'),
                               (dict(KERNEL_WORKING_DIR='/no where'), '/nor here', home)):
            async with remote.kernel(spec, env=os.environ|env, cwd=cwd) as (km, kc):
                assert await value(kc, '__import__("os").getcwd()') == want

async def test_this_machine(remote):
    "A kernel on localhost lives as one elsewhere does, without SSH"
    spec = remote.spec('here', hosts=['localhost'])
    with remote.nothing_left():
        async with remote.kernel(spec) as (km, kc):
            pid = await value(kc, '__import__("os").getpid()')
            assert (km.provisioner.conn.local
                    and await value(kc, '"SSH_CONNECTION" in __import__("os").environ') is False)
            await within(1, lambda: interrupt(km, kc, STUCK['sleep']))
            await km.restart_kernel()
            await kc.wait_for_ready(timeout=60)
            os.kill(again := await value(kc, '__import__("os").getpid()'), signal.SIGKILL)
            assert again != pid and await asyncio.wait_for(km.provisioner.wait(), 20) == -9
    await refused(remote, remote.spec('nowhere', lambda a: ['/opt/no/python', *a[1:]], hosts=['localhost']),
                  'host localhost', '/opt/no/python: not found')

async def test_files_that_were_removed_from_a_host_go_there_again(remote):
    "Somebody cleared the cache while the host application was connected"
    async with remote.on('host1') as (km, kc):
        shutil.rmtree(remote.host(km).home/'.cache/gateway_provisioners_ssh')
        await km.restart_kernel()
        await kc.wait_for_ready(timeout=30)
        assert await value(kc, '6*7') == 42

# Interrupts and ends

STUCK = dict(loop='while True: pass', sleep='import time; time.sleep(1000)',
             child='import subprocess; subprocess.run(["sleep", "1000"])')

@pytest.mark.parametrize('what', STUCK)
async def test_interrupt(remote, what):
    with remote.nothing_left():
        async with remote.kernel() as (km, kc):
            await within(1, lambda: interrupt(km, kc, STUCK[what]))
            assert await value(kc, '1+1') == 2
            assert not [p for p in remote.host(km).kernels() if p.name == 'sleep']

async def test_killed_on_its_host(remote):
    with remote.nothing_left():
        async with remote.kernel() as (km, kc):
            host = remote.host(km)
            assert await value(kc, '__import__("os").getpid()') == km.provisioner.fields['pid']
            waiting = asyncio.ensure_future(km.provisioner.wait())
            await within(1, lambda: kill(km, kc))
            assert await asyncio.wait_for(waiting, 20) == -9
            assert await km.provisioner.poll() == -9 and not await km.is_alive()
            log = Path(f'/tmp/kernel-{km.kernel_id}.log')
            wait(lambda: '[ended with status -9]' in log.read_text())
            await km.restart_kernel(now=True)
            await kc.wait_for_ready(timeout=60)
            assert await value(kc, '6*7') == 42 and remote.host(km) is host
            kc.execute('import os; os._exit(3)')
            assert await asyncio.wait_for(km.provisioner.wait(), 20) == 3

async def test_exit_status_of_255(remote):
    "It is the kernel's own, and no sign that the host lost it"
    with remote.nothing_left():
        async with remote.kernel() as (km, kc):
            info, host = km.get_connection_info(), remote.host(km)
            kc.execute('import os; os._exit(-1)')
            assert await asyncio.wait_for(km.provisioner.wait(), 20) == 255
            await km.restart_kernel(now=True)
            await kc.wait_for_ready(timeout=60)
            assert await value(kc, '6*7') == 42 and km.get_connection_info() == info and remote.host(km) is host

async def test_restart_keeps_ports_and_clients(remote):
    with remote.nothing_left():
        async with remote.kernel() as (km, kc):
            info, host = km.get_connection_info(), remote.host(km)
            assert (await printed(kc, 'x = 1; print(x)')) == ('1\n', 'ok')
            for now in (False, True):
                await km.restart_kernel(now=now)
                await kc.wait_for_ready(timeout=60)
                assert (await value(kc, '"x" in globals()') is False and km.get_connection_info() == info
                        and remote.host(km) is host)

async def test_ends_what_it_started(remote):
    "What a kernel started goes with it, also what ignores signals"
    with remote.nothing_left():
        async with remote.kernel() as (km, kc):
            await printed(kc,
                          'import subprocess; p = [subprocess.Popen(["sh", "-c", "trap \'\' INT TERM HUP; sleep 1000; '
                          'true"]) for _ in range(3)]')
            assert len([p for p in remote.host(km).kernels() if p.name == 'sleep']) == 3

# Launches that fail

async def refused(remote, spec, *words, **env):
    "A start that fails at once, with these words in the message; leaves nothing on the hosts"
    async def start():
        km, t = remote.manager(spec), Timer()
        with remote.nothing_left(), pytest.raises(LaunchError) as e:
            try: await asyncio.wait_for(km.start_kernel(env=os.environ|env), 60)
            finally: took = float(t)
        for o in words: assert re.search(o, str(e.value), re.S), (o, str(e.value))
        assert not await km.is_alive()
        return took
    await within(8, start)

LAUNCHER = lambda argv: next(o for o in argv if o.endswith('.py'))
def script(remote, name, source):
    "A launcher beside ours"
    (f := remote.scripts/name).write_text(textwrap.dedent(source))
    return lambda argv: [str(f) if o == LAUNCHER(argv) else o for o in argv]

async def test_host_down(remote):
    remote.lab[0].stop()
    await refused(remote, remote.spec('down', hosts=['host1']), 'host host1 ', r'\(user ',
                  'nothing listens on 127.0.0.11 port', 'Is sshd running')
    remote.lab[0].start()
    async with remote.kernel('down') as (km, kc): assert await value(kc, '1+1') == 2

async def test_host_silent(remote, monkeypatch):
    monkeypatch.setenv('GP_CONNECT_TIMEOUT', '1')
    remote.lab[0].hang()
    await refused(remote, remote.spec('silent', hosts=['host1']), 'host host1 ', 'Is that an SSH server|no answer')

async def test_login_refused(remote):
    remote.lab[0].refuse_keys()
    await refused(remote, remote.spec('refused', hosts=['host1']), 'host host1 ', 'refused the login', 'ssh-copy-id -p')

async def test_host_key_unknown(remote):
    c, h = remote.lab.client, remote.lab[0]
    key = c.known.pop(f'[{h.address}]:{h.port}')
    c.write()
    try:
        await refused(remote, remote.spec('stranger', hosts=['host1']), 'the host key of 127.0.0.11 port .* is unknown',
                      'whether to trust it: ssh host1$')
    finally: c.know(h.address, h.port, key)

async def test_host_key_changed(remote):
    remote.lab[0].change_host_key()
    await refused(remote, remote.spec('changed', hosts=['host1']), 'the host key has changed',
                  'now shows ssh-ed25519 SHA256:', 'old key is to be removed: ssh host1;')

async def test_no_host_left(remote):
    "Every host's own reason in one message"
    lab = remote.lab
    lab[0].stop(); lab[1].refuse_keys(); lab[2].change_host_key()
    try:
        await refused(remote, remote.spec('none', hosts=['host1', 'host2', 'host3']), 'no host could start',
                      'host1.*nothing listens', 'host2.*refused the login', 'host3.*host key has changed')
    finally: lab.repair()

async def test_next_host(remote):
    "Or the next one that can"
    remote.lab[0].stop(); remote.lab[1].refuse_keys()
    spec = remote.spec('next', hosts=['host2', 'host1', 'host3'])
    async def start():
        t = Timer()
        async with remote.kernel(spec) as (km, kc):
            assert remote.host(km).name == 'host3'
            return float(t)
    with remote.nothing_left(): await within(8, start)

async def test_launcher_errors(remote, monkeypatch):
    "What the launcher said last is in the message, with what to do about it"
    remote.spec('interpreter', lambda a: ['/opt/no/python', *a[1:]])
    remote.spec('module', lambda a: [a[0], '-I', '-S', *a[1:]])
    remote.spec('crash', script(remote, 'crash.py', 'print("about to")\nraise RuntimeError("boom at import")'))
    remote.spec('missing', lambda a: [a[0], '/nowhere/launch.py'])
    remote.spec('silent', lambda a: ['true'])
    remote.spec('class', lambda a: [*a[:-1], 'no.such.Kernel'])
    (remote.prefix/'poor/Cryptodome').mkdir(parents=True, exist_ok=True)
    (remote.prefix/'poor/Cryptodome/__init__.py').write_text('raise ImportError("No module named \'Cryptodome\'")')
    remote.spec('crypto', env=dict(PYTHONPATH=str(remote.prefix/'poor')))
    end = 'launcher ended with status {}'.format
    await refused(remote, 'interpreter', r'host host\d ', '/opt/no/python: not found', 'must be on the host')
    for words in (('module', end(1), 'Install ipykernel ', 'pip install'),
                  ('crash', end(1), 'about to', 'RuntimeError: boom at import'),
                  ('missing', end(2), "can't open file", 'must be on the host'),
                  ('silent', end(0), r'\[ended with status 0\]'),
                  ('class', end(1), 'no.such.Kernel'),
                  ('crypto', r'launcher ended with status (1|-15) ', 'Install pycryptodomex', 'No module named')):
        if words[0] == 'crypto':
            async with remote.kernel('crypto') as (km, kc):
                assert await value(kc, '1+1') == 2, 'through SSH no report needs it'
            monkeypatch.setenv('GP_RESPONSE_IP', '127.0.0.1')
        # which is gone
        await refused(remote, *words, r'host host\d ', r'What it wrote last on that host:\n(?!\(empty)',
                      r'\A(?!.*/tmp/kernel-[^/]*\.log)')

async def test_ports_exhausted(remote, monkeypatch):
    monkeypatch.setenv('GP_MIN_PORT_RANGE_SIZE', '10')
    with taken_ports(11) as base:
        await refused(remote, remote.spec('ports', port_range=f'{base}..{base+10}'),
                      f'fewer than 5 ports are free in {base}..{base+10}', 'widen the port range')

async def test_no_room_for_the_log(remote, net, monkeypatch):
    node = net[0]
    node.fill_disk('/var/tmp/full')
    monkeypatch.setenv('GP_KERNEL_LOG_DIR', '/var/tmp/full')
    try:
        with net.nothing_left():
            await refused(remote, remote.spec('full', hosts=['node1']), 'host node1',
                          'cannot write the log /var/tmp/full/kernel-', 'No space left',
                          'Choose a directory.*GP_KERNEL_LOG_DIR')
        assert node.run('ls', '/var/tmp/full').split() == ['full']
    finally: node.free_disk('/var/tmp/full')
    monkeypatch.setenv('GP_KERNEL_LOG_DIR', '/nowhere')
    await refused(remote, 'full', 'cannot write the log /nowhere', 'No such file|nonexistent|cannot create')

async def test_too_late(remote):
    "A launch that hangs is ended at the timeout, which may be a start's own; what the launcher printed is told"
    remote.spec('hang', script(remote, 'hang.py',
                               'import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint("thinking", '
                               'flush=True)\ntime.sleep(1000)'))
    t = Timer()
    await refused(remote, 'hang', 'did not start within 3.5 s', 'thinking', KERNEL_LAUNCH_TIMEOUT='3.5')
    assert 3.5 < t
    await refused(remote, remote.spec('hang2', lambda a: ['sleep', '1000'], launch_timeout=1),
                  'did not start within 1 s', r'\(KERNEL_LAUNCH_TIMEOUT, or launch_timeout')

@pytest.mark.parametrize('warm', [True, False])
async def test_cancelled_start(remote, warm):
    "Given up at any moment, a start leaves nothing"
    if warm: await asyncio.gather(*(km.shutdown_kernel(now=True) for km in [await started(remote) for _ in range(4)]))
    moments = [.002, .02, .05, .1, .2, .3, .4, .5, .6, .7, .8, 1]
    with remote.nothing_left():
        kms = [remote.manager() for _ in moments]
        tasks = [asyncio.ensure_future(km.start_kernel()) for km in kms]
        ends = []
        for t, at, prev in zip(tasks, moments, [0, *moments]):
            await asyncio.sleep(at-prev)
            ends.append(t.done() or t.cancel() and None)
        t = Timer()
        await asyncio.wait(tasks, timeout=20)
        assert t < 8
        for o, km in zip(tasks, kms):
            if not o.cancelled(): o.result()
            # also one that was there before the manager noticed that it was cancelled
            if km.has_kernel: await km.shutdown_kernel(now=True)
        assert sum(o.cancelled() for o in tasks) >= 5

async def test_cancelled_as_it_succeeds(remote, monkeypatch):
    "The host application gives up in the very moment in which the kernel is there"
    loop, real = asyncio.get_running_loop(), DistributedProvisioner._adopt
    async def adopt(self, *a):
        r = await real(self, *a)
        loop.call_soon_threadsafe(task.cancel)
        return r
    monkeypatch.setattr(DistributedProvisioner, '_adopt', adopt)
    with remote.nothing_left():
        task = asyncio.ensure_future(remote.manager().start_kernel())
        with pytest.raises(asyncio.CancelledError): await asyncio.wait_for(task, 20)

async def test_cancelled_in_a_tunnel(remote, monkeypatch):
    "The kernel reported, and the way to it is not there yet"
    monkeypatch.setenv('GP_ENABLE_TUNNELING', 'True')
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()
    async def aim(self, *a):
        loop.call_soon_threadsafe(reached.set)
        await asyncio.sleep(60)
    with remote.nothing_left(), monkeypatch.context() as m:
        m.setattr(DistributedProvisioner, '_retarget_forwards', aim)
        task = asyncio.ensure_future(remote.manager().start_kernel())
        await asyncio.wait_for(reached.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await asyncio.wait_for(task, 20)
    with remote.nothing_left():
        async with remote.kernel() as (km, kc):
            assert await value(kc, '1+1') == 2 and km.get_connection_info()['ip'] == '127.0.0.1'

async def started(remote, *a):
    km = remote.manager(*a)
    await km.start_kernel()
    return km

async def test_default_executor_full(remote):
    "Nothing of ours waits in the loop's own pool of threads"
    loop, blocked, stop = asyncio.get_running_loop(), [], threading.Event()
    for where in (loop, bg.background().loop):
        def fill(): blocked.extend(where.run_in_executor(None, stop.wait, 60) for _ in range(64))
        where.call_soon_threadsafe(fill)
    try:
        with remote.nothing_left():
            async with remote.kernel() as (km, kc): assert await value(kc, '1+1') == 2
    finally: stop.set()

# What hosts and kernels cost the host application

FAKE = """
    import os
    from server_listener import Arguments, LaunchContext, report
    launch = LaunchContext(Arguments('Reports a kernel that is none').parse_known_args()[0])
    fields = launch.write(os.getpid())
    report(launch, fields, os.getpid())
    os.execvp('sleep', ['sleep', '1000'])
"""

def cost():
    "Threads, descriptors, and how often a thread of this process has gone to sleep"
    p, waits = psutil.Process(), 0
    for f in Path('/proc/self/task').glob('*/status'):
        with contextlib.suppress(OSError):
            waits += int(re.search(r'\nvoluntary_ctxt_switches:\s+(\d+)', f.read_text())[1])
    return dict(threads=p.num_threads(), fds=p.num_fds(), waits=waits)

async def settled(timeout=20):
    "The cost, once it has been the same in threads and descriptors for half a second"
    t, was, now = Timer(), None, cost()
    while (was is None or per(1, was, now) != dict(threads=0, fds=0)) and t < timeout:
        await asyncio.sleep(.5)
        was, now = now, cost()
    return now

async def least_wakes(limit, window=2, timeout=30):
    """How often threads go to sleep, a second: the first of several windows in which that is below `limit`, for noise
    and unfinished work can only add"""
    t, seen = Timer(), []
    while not seen or min(seen) >= limit and t < timeout:
        was = cost()['waits']
        await asyncio.sleep(window)
        seen.append((cost()['waits']-was)/window)
    return min(seen)

def per(n, was, now): return {k: (now[k]-was[k])/n for k in ('threads', 'fds')}

@pytest.mark.parametrize('tunnel', [False, True], ids=['direct', 'tunnel'])
async def test_cost(remote, monkeypatch, tunnel):
    """200 kernels on 20 hosts, which live in another process: one thread a host, none a kernel, and nobody who wakes to
    look around"""
    n_hosts, n = 20, 40 if tunnel else 200
    mocks = subprocess.Popen([sys.executable, '-c',
                              f'from gateway_provisioners_ssh.mock_ssh import MockHosts; h = '
                              f'MockHosts({n_hosts}).start(); '
                              'print(h.config, flush=True); input(); h.stop()'], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    try:
        monkeypatch.setenv('GP_SSH_CONFIG', mocks.stdout.readline().strip())
        monkeypatch.setenv('GP_ENABLE_TUNNELING', str(tunnel))
        names = [f'mock{i+1}' for i in range(n_hosts)]
        spec = remote.spec('fake', script(remote, 'fake.py', FAKE), hosts=names)
        ps = [remote.provisioner(spec) for _ in range(n)]
        bg.background(); await started_by(ps[0]); await ended(ps[:1]); was = await settled()
        await asyncio.gather(*(background_session(ps[0], o) for o in names))
        idle = await settled()
        per_host = per(n_hosts-1, was, idle)
        await asyncio.gather(*map(started_by, ps))
        per_kernel = per(n, idle, await settled())
        wakes = await least_wakes(4*n_hosts)
        await ended(ps)
        print(f'a host: {per_host}, a kernel: {per_kernel}, wakes: {wakes:.0f}/s')
        assert per_host['threads'] <= 1.1 and per_host['fds'] <= 4
        assert per_kernel['threads'] <= .02 and per_kernel['fds'] <= (5.1 if tunnel else .1)
        assert wakes < 4*n_hosts   # each second; paramiko by itself wakes ten times for each
    finally:
        mocks.communicate('\n', timeout=60)

async def background_session(p, name):
    async def session(): return await (await shared().pool.connection(Host.parse(name), p.login)).session()
    return await bg.background().run(session())

async def started_by(p):
    return await p.launch_kernel(**await p.pre_launch(env=dict(KERNEL_USERNAME='ada', KERNEL_LAUNCH_TIMEOUT='120')))

@pytest.mark.parametrize('stop', ['shutdown_kernel', 'restart_kernel'])
async def test_shutdown_and_restart_while_starting(remote, stop):
    """A start that is not wanted any more is called off, says so to whoever asked for it or waits for it, and leaves
    nothing"""
    async def stopped(i):
        km = remote.manager()
        start = asyncio.ensure_future(km.start_kernel())
        await asyncio.sleep(i/100)
        ready = km.ready
        await getattr(km, stop)(now=bool(i%2))
        for answer in start, ready:
            with pytest.raises(LaunchError, match='was shut down while it was starting'): await answer
        assert await km.is_alive() == (stop == 'restart_kernel')
        await km.shutdown_kernel(now=True)
    with remote.nothing_left(): await asyncio.gather(*map(stopped, range(15)))

async def test_shutdown_as_it_succeeds(remote, monkeypatch):
    "The kernel is there, and whoever started it does not know yet"
    loop, real, stops = asyncio.get_running_loop(), DistributedProvisioner._adopt, []
    async def adopt(self, *a):
        r = await real(self, *a)
        asyncio.run_coroutine_threadsafe(stop(), loop)
        await asyncio.sleep(.2)
        return r
    async def stop(): stops.append(asyncio.ensure_future(km.shutdown_kernel()))
    monkeypatch.setattr(DistributedProvisioner, '_adopt', adopt)
    with remote.nothing_left():
        km = remote.manager()
        with pytest.raises(LaunchError, match='was shut down while it was starting'): await km.start_kernel()
        await stops[0]
        assert not await km.is_alive()

async def test_shutdown_before_the_start_got_a_turn(remote):
    """The background loop is busy, so the start is asked for and has not begun; a shutdown waits for its end all the
    same"""
    p = remote.provisioner()
    with remote.nothing_left():
        for _ in range(2):   # the second time there was a start before
            bg.background().loop.call_soon_threadsafe((turn := threading.Event()).wait, 30)
            start = asyncio.ensure_future(started_by(p))
            starting = await until(lambda: p.starting)
            stop = asyncio.ensure_future(p.cleanup())
            await until(lambda: starting.cancelled)
            assert starting.task is None and not stop.done()
            turn.set()
            await stop
            assert p.starting is None
            with pytest.raises(LaunchError, match='was shut down while it was starting'): await start
        await started_by(p)
        await ended([p])
