"""Standby: a kernel that a template forked cannot be told from one that started cold, is never of another state of the
host than that, and whatever goes wrong with a template costs a start half a second at most. Kernels run on this
machine, without SSH, with an agent of the tests' own."""
import asyncio, base64, contextlib, json, logging, os, re, shutil, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import psutil, pytest
import test_lifecycle
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.launchers import agent
from kernels import Remote, busy, forget, gone, interrupt, left_of, printed, reply_to, running, value
from pace import Timer, until, within

class Place:
    "Kernels of this machine, with an agent, a home and temporary files of the tests' own"
    def __init__(self, dir, patch):
        self.dir, self.cwd, self.patch, self.n, self.tmp = dir, dir/'work', patch, 0, None
        self.cwd.mkdir()
        self.remote = Remote(SimpleNamespace(names=['localhost']), dir/'prefix', patch)
        patch.delenv('IPYTHONDIR')
        for k, v in dict(HOME=self.dir, GP_STANDBY='on', KERNEL_WORKING_DIR=self.cwd).items(): patch.setenv(k, str(v))
        self.move()

    def move(self):
        "From now on, another agent"
        self.close()
        self.tmp = Path(tempfile.mkdtemp(prefix='gps-'))
        for o in 'TMPDIR', 'GP_KERNEL_LOG_DIR': self.patch.setenv(o, str(self.tmp))

    def close(self):
        forget()
        if self.tmp is None: return
        for p, *_ in self.processes():
            with contextlib.suppress(psutil.Error): p.kill()
        shutil.rmtree(self.tmp, ignore_errors=True)

    def spec(self, python=sys.executable, flags=(), more=(), **kw):
        "A kernelspec of a new name; `flags` of the interpreter, `more` arguments of the launcher, `kw`: `env`, options"
        self.n += 1
        return self.remote.spec(f'standby{self.n}', lambda a: [str(python), *flags, *a[1:], *more], ['localhost'], **kw)

    def kernel(self, name, config={}, **kw): return running(self.remote.manager(name, config=config), **kw)

    # What is on the host

    def processes(self):
        "Each with its name and its parent's number"
        found = []
        for p in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if p.environ().get('TMPDIR') == str(self.tmp): found.append((p, p.name(), p.ppid()))
        return found

    def agent(self): return next((p for p, name, _ in self.processes() if name == 'gpssh-agent'), None)

    def templates(self):
        "The processes from which kernels can be forked"
        found = self.processes()
        agents = {p.pid for p, name, _ in found if name == 'gpssh-agent'}
        return [p for p, name, parent in found if name == 'gpssh-standby' and parent in agents]

    def mishaps(self):
        f = self.tmp/f'gpssh-{os.getuid()}/errors'
        return f.read_text() if f.exists() else ''

    # Requests

    async def request(self, name):
        "A start request as the provisioner makes it for that kernelspec, without a ticket"
        async def made():
            p = self.remote.provisioner(name)
            request = p.checked_request(dict(os.environ), list(p.kernel_spec.argv))
            attempt = await p.reach('localhost', request, time.monotonic() + 60)
            m = await attempt.start_message(await attempt.make_keys())
            self.session = attempt.target.agent
            return {k: m[k] for k in ('argv', 'env', 'spec_env', 'standby')}
        return await background().run(made())

    async def tell(self, op, m): return await background().run(self.session.request(op, **m))

    async def warm(self, name):
        "Have a template for that kernelspec, or hear why that cannot be"
        return (await asyncio.wait_for(self.tell('standby', await self.request(name)), 120))['cold']

@pytest.fixture(scope='module')
def _place(client, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp('standby'), patch)
        yield place
        place.close()

@pytest.fixture
def place(_place):
    "Nothing that should not have happened did"
    yield _place
    assert not _place.mishaps()

@pytest.fixture(scope='module')
def plain(_place): return _place.spec()

async def is_forked(kc): return await value(kc, '__import__("gc").get_freeze_count() > 0')

@contextlib.asynccontextmanager
async def kernel_of_kind(place, name, kind):
    "A kernel that is known to have been forked, or to have started cold"
    if kind == 'forked': assert await place.warm(name) == ''
    async with place.kernel(name, dict(standby=kind == 'forked')) as k:
        assert await is_forked(k.client) == (kind == 'forked')
        yield k

kinds = pytest.mark.parametrize('kind', ['cold', 'forked'])

# It cannot be told from a cold one

FACTS = r'''
import gc, json, locale, multiprocessing, os, re, resource, signal, sys, threading, time, warnings
def kind(fd):
    try: return re.sub(r'k-[0-9a-f]+|\d+(?=\])', '*', os.readlink(f'/proc/self/fd/{fd}'))
    except OSError: return 'the listing'
def unix():
    return len({o.split()[6] for o in open('/proc/net/unix').read().split('\n')[1:]
                if o} & {os.readlink(f'/proc/self/fd/{o}')[8:-1] for o in os.listdir('/proc/self/fd')
                         if kind(o).startswith('socket')})
def lines(name, *keys): return [o for o in open(f'/proc/self/{name}').read().split('\n') if o.split(':')[0] in keys]
mask = os.umask(0); os.umask(mask)
fds = {o: kind(o) for o in os.listdir('/proc/self/fd')}
# not of the history
fds = {o: k for o, k in fds.items() if not re.search('-journal|/profile_default$|^the listing', k)}
print(json.dumps(dict(sockets_of_this_machine=unix(), flags=sys.flags, path=sys.path, argv=sys.argv,
    orig_argv=sys.orig_argv, warnoptions=sys.warnoptions, xoptions=sys._xoptions, executable=sys.executable,
    prefix=sys.prefix, environ=dict(os.environ),
    proc_environ=sorted(o for o in open('/proc/self/environ').read().split('\0') if o
                        and not o.startswith('KERNEL_LAUNCH_SECRET=')),
    cmdline=open('/proc/self/cmdline').read().strip('\0').split('\0'), comm=open('/proc/self/comm').read(),
    cwd=os.getcwd(), umask=mask, limits=[resource.getrlimit(i) for i in range(16)],
    locale=[locale.setlocale(i) for i in range(6)],
    encodings=[sys.getdefaultencoding(), sys.getfilesystemencoding(), locale.getpreferredencoding()],
    time_zone=[time.tzname, time.timezone], signals=[str(signal.getsignal(i)) for i in range(1, 65)],
    mask=list(signal.pthread_sigmask(0, [])),
    status=lines('status', 'SigBlk', 'SigIgn', 'SigCgt', 'NoNewPrivs', 'CapEff', 'Cpus_allowed', 'Uid', 'Groups',
                 'Threads'),
    descriptors=sorted(set(fds.values())), inheritable=sorted(k for o, k in fds.items() if os.get_inheritable(int(o))),
    threads=sorted(re.sub(r'-\d+', '', o.name) for o in threading.enumerate()),
    main_thread=[threading.main_thread().name, threading.main_thread().native_id == os.getpid(),
                 threading.main_thread() is threading.current_thread()],
    session=os.getsid(0) == os.getpid(), group=os.getpgrp() == os.getpid(),
    parent=open(f'/proc/{os.getppid()}/comm').read(), nice=os.nice(0), scheduler=os.sched_getscheduler(0),
    oom=open('/proc/self/oom_score_adj').read(),
    streams=[[o.name, o.mode, o.encoding, o.errors, o.line_buffering]
             for o in (sys.__stdin__, sys.__stdout__, sys.__stderr__)], filters=[str(o) for o in warnings.filters],
    gc=[gc.isenabled(), gc.get_threshold(), gc.get_debug()],
    limits_of_python=[sys.getrecursionlimit(), sys.getswitchinterval(), sys.dont_write_bytecode, sys.gettrace(),
                      sys.getprofile()],
    main=[__name__, sys.modules['__main__'].__dict__ is globals(), getattr(sys.modules['__main__'], '__spec__', 0)],
    process=[multiprocessing.current_process().name, multiprocessing.get_start_method(True),
             multiprocessing.active_children()], dumpable=open('/proc/self/coredump_filter').read(),
    group_of_control=open('/proc/self/cgroup').read(),
    hooks=[re.sub(' at 0x.*', '', str(o)) for o in (*sys.meta_path, *sys.path_hooks, sys.excepthook, sys.displayhook)]),
                 default=str))
'''

def blurred(facts, km):
    "Without what differs from kernel to kernel, cold or not"
    text = facts.replace(km.kernel_id, 'ID')
    return json.loads(re.sub(r'/k-[0-9a-f]{16}/', '/K/', re.sub(r'MCowBQYDK2VuAyEA[\w+/=]+', 'PUBLIC_KEY', text)))

VARIABLES = dict(LANG='C.UTF-8', TZ='Pacific/Chatham', PYTHONWARNINGS='error::BytesWarning', PYTHONHASHSEED='7',
    PYTHONUTF8='1',
                 PYTHONDONTWRITEBYTECODE='1', PYTHONOPTIMIZE='1')

@pytest.mark.parametrize('env, flags', [({}, ()), (VARIABLES, ()), ({}, ('-Xutf8=0', '-Werror::BytesWarning', '-bO'))],
                         ids=['plain', 'variables', 'flags'])
async def test_it_is_a_process_like_a_cold_one(place, env, flags):
    name, facts = place.spec(env=env, flags=flags), {}
    for kind in 'cold', 'forked':
        async with kernel_of_kind(place, name, kind) as (km, kc):
            facts[kind] = blurred((await printed(kc, FACTS))[0], km)
    def only(a, b): return [o for o in a if a.count(o) > b.count(o)] if isinstance(a, list) else a
    assert {k: (only(v, w), only(w, v)) for (k, v), w in zip(facts['cold'].items(), facts['forked'].values())
        if v != w} == {} and len(facts['cold']) > 40

DRAWS = ('random.random()', 'secrets.token_hex()', 'str(uuid.uuid1())', 'str(uuid.uuid4())',
    'os.path.basename(tempfile.mkdtemp())', 'bytes(multiprocessing.current_process().authkey)',
         'numpy.random.random()', 'numpy.random.default_rng().random()', 'os.urandom(9)',
    'next(tempfile._get_candidate_names())', 'random.SystemRandom().random()')

async def test_what_is_drawn_is_never_drawn_twice(place):
    name = place.spec(preload=['numpy', 'random', 'uuid', 'tempfile', 'secrets', 'multiprocessing'])
    assert await place.warm(name) == ''
    async def draw():
        async with place.kernel(name) as (km, kc):
            assert await is_forked(kc)
            await printed(kc, 'import random, secrets, uuid, tempfile, multiprocessing, numpy, os')
            return await value(kc, '[%s]' % ', '.join(DRAWS))
    drawn = await asyncio.gather(*(draw() for _ in range(3)))
    assert [len(set(o)) for o in zip(*drawn)] == [3]*len(DRAWS)

async def test_hash_seed(place, plain):
    "All that one template forks hash alike, which two cold kernels do not; PYTHONHASHSEED is respected"
    async def hashes(name, kind):
        async with kernel_of_kind(place, name, kind) as (_, kc): return await value(kc, 'hash("seed")')
    assert len({await hashes(plain, 'forked') for _ in range(2)}) == 1
    fixed = place.spec(env=dict(PYTHONHASHSEED='42'))
    assert len({await hashes(fixed, kind) for kind in ('cold', 'forked')}) == 1

WORKER = "def double(x): return 2*x\ndef ask(q): q.put(__import__('os').getppid())\n"
CELLS = [('%run script.py one', 'script.py one __main__\n'),
         ('import asyncio\nprint(await asyncio.sleep(.01, 42))', '42\n'),
         ('import multiprocessing as mp, worker, os\nwith mp.get_context("fork").Pool(2) as p: '
          'print(p.map(worker.double, [1, 2]))', '[2, 4]\n'),
         ('with mp.get_context("spawn").Pool(1) as p: print(p.map(worker.double, [1, 2]))', '[2, 4]\n'),
         ('c = mp.get_context("forkserver"); q = c.Queue(); p = c.Process(target=worker.double, args=(1,)); p.start(); '
          'p.join(); print(p.exitcode)', '0\n'),
         ('pid = os.fork()\nif not pid: os._exit(7)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))', '7\n'),
         ('import subprocess; print(subprocess.run(["sh", "-c", "exit 5"]).returncode)', '5\n'),
         ('!echo shell', 'shell\r\n'), ('%%bash\necho magic', 'magic\n'),
         ('import threading\nt = threading.Thread(target=print, args=("thread",)); t.start(); t.join()', 'thread\n'),
         ('print(startup)', 'read\n'), ('1/0', 'ZeroDivisionError'),
         ('import warnings; warnings.warn("careful", stacklevel=1)', None)]

@kinds
async def test_what_users_do(place, plain, kind):
    (place.cwd/'script.py').write_text('import sys; print(*sys.argv, __name__)')
    (place.cwd/'worker.py').write_text(WORKER)
    (startup := place.dir/'.ipython/profile_default/startup').mkdir(parents=True, exist_ok=True)
    (startup/'00.py').write_text('startup = "read"')
    async with kernel_of_kind(place, plain, kind) as (km, kc):
        for code, want in CELLS:
            got = (await printed(kc, code, 60))[0]
            assert got == want if want else 'UserWarning: careful' in got, code
        mark = f'"{km.kernel_id}"'
        await kc.execute_interactive(mark, store_history=True, timeout=30)
        await km.shutdown_kernel()
    # history is common to kernels of both kinds
    async with place.kernel(plain, dict(standby=kind != 'forked')) as (_, kc):
        assert mark in {o[2] for o in (await kc.history(hist_access_type='search', pattern='"*"', n=100, reply=True,
            timeout=30))['content']['history']}

async def test_pictures(place):
    "With the library imported by the template, or by the kernel; ipykernel sets variables first that it reads"
    states = []
    for kind, name in ('cold', place.spec()), ('forked', place.spec(preload=['matplotlib.pyplot'])), ('forked',
        place.spec(preload=['matplotlib'])):
        async with kernel_of_kind(place, name, kind) as (_, kc):
            for first in '', '%matplotlib inline\n':
                seen = []
                await kc.execute_interactive(f'{first}import matplotlib.pyplot as plt\nplt.plot([1, 2]);', timeout=90,
                    allow_stdin=False, output_hook=lambda m: seen.append(m['content'].get('data', {})))
                assert [o for o in seen if base64.b64decode(o.get('image/png', '')).startswith(b'\x89PNG')], (kind,
                    first)
                states.append(await value(kc,
                    '(plt.get_backend(), plt.rcParams["backend"], plt.isinteractive(), '
                    '__import__("os").environ["MPLBACKEND"])'))
    assert states[::2] == states[:1]*3 and states[1::2] == states[1:2]*3

async def control(kc, kind, content, **more):
    msg = kc.session.msg(kind, content)
    msg['header'].update(more)
    kc.control_channel.send(msg)
    while True:
        m = await kc.get_control_msg(timeout=30)
        if m['parent_header'].get('msg_id') == msg['header']['msg_id']: return m['content']

@kinds
async def test_debugger_and_subshells(place, plain, kind):
    async with kernel_of_kind(place, plain, kind) as (_, kc):
        def debug(n, command, **arguments):
            return control(kc, 'debug_request', dict(type='request', seq=n, command=command, arguments=arguments))
        said = await debug(1, 'initialize', clientID='t', adapterID='', pathFormat='path', linesStartAt1=True,
            columnsStartAt1=True)
        assert said['success'] and said['body']['supportsSetVariable']
        assert (await debug(2, 'attach'))['success']
        assert (await debug(3, 'debugInfo'))['body']['isStarted']
        assert (await printed(kc, 'def f():\n  return 6*7\nprint(f())'))[0] == '42\n'
        assert (await debug(4, 'disconnect', restart=False, terminateDebuggee=False))['success']
        shell = (await control(kc, 'create_subshell_request', {}))['subshell_id']
        await busy(kc, 'import time; print("busy", flush=True); time.sleep(1000)')
        msg = kc.session.msg('execute_request',
            dict(code='', silent=True, store_history=False, user_expressions=dict(v='6*7'), allow_stdin=False))
        msg['header']['subshell_id'] = shell
        kc.shell_channel.send(msg)
        assert (await reply_to(kc, msg['header']['msg_id']))['user_expressions']['v']['data']['text/plain'] == '42'

@kinds
async def test_input(place, plain, kind):
    async with kernel_of_kind(place, plain, kind) as (_, kc):
        out = []
        await kc.execute_interactive('print(input("name? "))', stdin_hook=lambda m: kc.input('Ada'), allow_stdin=True,
            timeout=30, output_hook=lambda m: out.append(m['content'].get('text', '')))
        assert ''.join(out) == 'Ada\n'

@kinds
@pytest.mark.parametrize('code, status', [('import os; os._exit(3)', 3),
    ('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)', -11),
    ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', -9)])
async def test_how_it_ends(place, plain, kind, code, status):
    async with kernel_of_kind(place, plain, kind) as (km, kc):
        kc.execute(code)
        assert await asyncio.wait_for(km.provisioner.wait(), 30) == status
        km.provisioner.requested = True   # its log is not wanted

@pytest.fixture(scope='class')
def standard_kernel(request, _place, plain):
    suite = super(test_lifecycle.TestStandard, request.cls)
    request.cls.kernel_name = plain
    asyncio.run(_place.warm(plain))
    suite.setUpClass()
    yield
    suite.tearDownClass()

class TestForked(test_lifecycle.TestStandard):
    "The suite by which kernels are judged"
    def test_it_was_forked(self):
        "A cold one has its ticket there"
        assert b'KERNEL_LAUNCH_SECRET' not in Path(f'/proc/{self.km.provisioner.fields["pid"]}/environ').read_bytes()

# It is never of another state of the host than a cold one

@pytest.fixture(scope='module')
def venv(tmp_path_factory):
    "A virtual environment with what this one has, whose packages a test may change"
    dir = tmp_path_factory.mktemp('venv')/'k'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', dir], check=True)
    site = next(dir.glob('lib/python*/site-packages'))
    (site/'more.pth').write_text('\n'.join([sysconfig.get_path('purelib'), str(editable := dir/'editable')]))
    editable.mkdir()
    (editable/'gpt_edited.py').write_text('VALUE = 1')
    (site/'gpt_package.py').write_text('VALUE = 1')
    (site/'gpt_gone.py').write_text('')
    return SimpleNamespace(python=dir/'bin/python', site=site, editable=editable, dir=dir)

def replaced(path, text):
    "As installers do it"
    (new := path.with_name(path.name + '.new')).write_text(text)
    os.replace(new, path)

def edited_in_place(path, text):
    "By an editor that keeps size and inode as they were; later than the second in which it was compiled"
    st = path.stat()
    assert st.st_size == len(text)
    path.write_text(text)
    os.utime(path, (st.st_atime, st.st_mtime + 10))

def another_interpreter(venv):
    real = venv.python.resolve()
    venv.python.unlink()
    shutil.copy(real, venv.python)

def linked(venv):
    (other := venv.dir/'other').mkdir()
    (other/'gpt_linked.py').write_text('')
    (venv.site/'linked.pth').write_text(str(other))

has = "__import__('importlib.util').util.find_spec(%r) is not None"
CHANGES = dict(
    installed=(lambda v: (v.site/'gpt_new.py').write_text(''), has % 'gpt_new', True),
    upgraded=(lambda v: replaced(v.site/'gpt_package.py', 'VALUE = 2'), "__import__('gpt_package').VALUE", 2),
    edited=(lambda v: edited_in_place(v.editable/'gpt_edited.py', 'VALUE = 3'), "__import__('gpt_edited').VALUE", 3),
    removed=(lambda v: (v.site/'gpt_gone.py').unlink(), has % 'gpt_gone', False),
    linked=(linked, has % 'gpt_linked', True),
    interpreter=(another_interpreter, "__import__('os').path.islink(__import__('sys').executable)", False))

async def test_what_has_changed(place, venv):
    "The next start is right, and cold; once there is a new template kernels are forked again, and right"
    name = place.spec(venv.python, preload=['gpt_package', 'gpt_edited'])
    for change, expr, want in CHANGES.values():
        assert await place.warm(name) == ''
        async with place.kernel(name) as (km, kc):
            assert await is_forked(kc) and await value(kc, expr) != want, expr
        change(venv)
        async with place.kernel(name) as (km, kc):
            assert not await is_forked(kc) and await value(kc,
                expr) == want and 'has changed' in km.provisioner.process.cold, expr
    assert await place.warm(name) == ''
    async with place.kernel(name) as (km, kc):
        assert await is_forked(kc) and [await value(kc, expr) for _, expr, _ in CHANGES.values()] == [want for *_,
            want in CHANGES.values()]

async def test_what_changes_while_it_is_imported(place, venv):
    "Nobody can tell which state a process has that imported it meanwhile: another attempt is made"
    (venv.site/'gpt_slow.py').write_text('VALUE = 1')
    (venv.site/'gpt_upgrader.py').write_text("""import gpt_slow, os
if gpt_slow.VALUE == 1:
    with open(gpt_slow.__file__, 'w') as f: f.write('VALUE = 2')""")
    name = place.spec(venv.python, preload=['gpt_upgrader'])
    assert await place.warm(name) == ''
    async with place.kernel(name) as (_, kc):
        assert await is_forked(kc) and await value(kc, "__import__('gpt_slow').VALUE") == 2

async def test_the_interpreter_that_the_command_means_now(place, plain, tmp_path):
    "PATH may lead to another one than it did"
    python, path = 'python3.%d' % sys.version_info[1], f'{tmp_path}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    async def start(op, **more):
        m = await place.request(plain)
        return (await place.tell(op, m | dict(argv=[python, *m['argv'][1:]], env=m['env'] | dict(PATH=path),
            **more)))['cold']
    async def started():
        try: return await start('start', id='ab'*8, log=str(tmp_path/'log'), max_bytes=9999)
        finally: await place.tell('forget', dict(id='ab'*8))
    assert await start('standby') == '' and await started() == ''
    (tmp_path/python).symlink_to(sys.executable)
    assert await started() == f'{python} has changed'

@pytest.mark.parametrize('variable', ['PYTHONPATH', 'LD_LIBRARY_PATH', 'PYTHONWARNINGS', 'LC_ALL'])
async def test_variables_that_change_what_an_interpreter_does(place, plain, variable):
    assert await place.warm(plain) == ''
    other = place.spec(env={variable: 'C' if variable == 'LC_ALL' else '/nowhere' if 'PATH' in variable else 'ignore'})
    async with place.kernel(other) as (_, kc):
        assert not await is_forked(kc) and await value(kc, f'__import__("os").environ[{variable!r}]')
    async with place.kernel(plain) as (_, kc):
        assert await is_forked(kc) and not await value(kc, f'__import__("os").environ.get({variable!r})')

async def test_another_kernel_class(place, plain, venv):
    "The same template serves it, for the class is imported by each kernel"
    (venv.site/'gpt_kernel.py').write_text('from ipykernel.ipkernel import IPythonKernel\nclass Mine(IPythonKernel): '
                                           'banner = "mine"')
    plain, mine = (place.spec(venv.python, more=['--kernel-class-name', o])
        for o in ('ipykernel.ipkernel.IPythonKernel', 'gpt_kernel.Mine'))
    for kind in 'cold', 'forked':
        async with kernel_of_kind(place, mine, kind) as (_, kc):
            assert await value(kc, 'get_ipython().kernel.banner') == 'mine'

async def test_modules_in_the_kernels_directory(place):
    "They come before those installed, which the template has imported; elsewhere the template goes on to serve"
    name = place.spec(preload=['numpy'])
    (place.cwd/'sub').mkdir()
    (place.cwd/'sub/numpy.py').write_text('MINE = True')
    (place.cwd/'sub/difflib.py').write_text('MINE = True')   # IPython finds the standard library's first
    assert await place.warm(name) == ''
    async with place.kernel(name, env=os.environ | dict(KERNEL_WORKING_DIR=str(place.cwd/'sub'))) as (km, kc):
        assert not await is_forked(kc) and await value(kc,
            '__import__("numpy").MINE') and km.provisioner.process.cold.endswith('has its own numpy.py')
        assert not await value(kc, 'hasattr(__import__("difflib"), "MINE")')
    async with place.kernel(name) as (_, kc): assert await is_forked(kc) and await value(kc, '__import__("numpy").pi')

# Templates that do not do what they should

async def one_kernel(place, km):
    "One process has the kernel's id, and its parent is the agent"
    await until(lambda: len(left_of(km.kernel_id)) == 1, what='one process')
    p, = left_of(km.kernel_id)
    assert p.pid == km.provisioner.fields['pid'] and p.ppid() == place.agent().pid

async def template_of(place, name):
    "The process of that kernelspec's template, and no other one"
    killed = place.templates()
    for p in killed: p.kill()
    await until(lambda: not any(psutil.pid_exists(p.pid) for p in killed), what='the agent to know of their ends')
    assert await place.warm(name) == ''
    return (await until(place.templates, what='a template'))[0]   # it has its name just after it is ready

@pytest.mark.parametrize('how', ['stopped', 'killed', 'killed meanwhile', 'grown'])
async def test_a_template_that_fails(place, tmp_path, how):
    grow = place.dir/'grow'
    (tmp_path/'gpt_grows.py').write_text(f'import os\nkept = []\nos.register_at_fork(after_in_parent=lambda: '
                                         f'os.path.exists({str(grow)!r}) and kept.append(b"x"*200*2**20))')
    name = place.spec(preload=['gpt_grows'], env=dict(PYTHONPATH=str(tmp_path)))
    t = await template_of(place, name)
    if how in ('stopped', 'killed meanwhile'): t.suspend()
    if how == 'killed meanwhile': asyncio.get_running_loop().call_later(.2, t.kill)
    if how == 'killed':
        t.kill()
        await until(lambda: gone(t.pid))
    if how == 'grown':
        grow.touch()
        async with place.kernel(name) as (_, kc): assert await is_forked(kc)
        grow.unlink()
    async with place.kernel(name) as (km, kc):
        assert not await is_forked(kc)
        await one_kernel(place, km)
        assert gone(t.pid)
        if how == 'stopped': assert km.provisioner.process.cold == 'its template did not fork within 0.5 s'
    assert await place.warm(name) == ''
    async with place.kernel(name) as (km, kc):
        assert await is_forked(kc)
        await one_kernel(place, km)

async def test_a_template_that_is_always_late(place, tmp_path):
    "After two times it is not tried again for a while, or it would make each start slower"
    (tmp_path/'gpt_late.py').write_text('import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(1.5))')
    name = place.spec(preload=['gpt_late'], env=dict(PYTHONPATH=str(tmp_path)))
    for _ in range(2):
        assert await place.warm(name) == ''
        async with place.kernel(name) as (km, kc):
            assert not await is_forked(kc) and 'did not fork within' in km.provisioner.process.cold
            await one_kernel(place, km)
    assert 'did not fork within' in await place.warm(name)
    async with place.kernel(name) as (_, kc): assert not await is_forked(kc)

NO_TEMPLATES = dict(
    fails=('1/0', 'preload of gpt_bad fails: ZeroDivisionError: division by zero'),
    exits=('raise SystemExit(3)', 'preload of gpt_bad fails: SystemExit: 3'),
    ends=('import os; os._exit(0)', 'it ended while it imported'),
    prints=('print("hello")', 'what is imported prints: hello'),
    complains=('import os; os.write(2, b"oh")', 'what is imported prints: oh'),
    threads=('import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True, '
             'name="worker").start()', 'what is imported starts a thread: worker'),
    file=('f = open(__file__)', 'what is imported opens .*/gpt_bad.py'),
    socket=('import socket; s = socket.socket()', r'what is imported opens socket:'),
    gpu=('import os\nf, real = open(__file__), os.readlink\nos.readlink = lambda p: "/dev/nvidia0" if '
         'p.endswith(f"/{f.fileno()}") else real(p)   # a stand-in for a GPU',
         'what is imported opens CUDA: /dev/nvidia0'),
    shared=('import mmap; m = mmap.mmap(-1, 4096)', 'what is imported shares memory: /dev/zero'),
    garbage=('import os, sys\nfor o in os.listdir("/proc/self/fd"):\n  if int(o) > 2 and '
             'os.readlink(f"/proc/self/fd/{o}").startswith("socket"): os.write(int(o), b"["*50000)\nos._exit(0)',
             'it ended while it imported'))

@pytest.mark.parametrize('kind', NO_TEMPLATES)
async def test_what_no_template_can_import(place, tmp_path, caplog, kind):
    "Kernels start cold, and can import it; the host application hears of it once"
    code, why = NO_TEMPLATES[kind]
    (tmp_path/'gpt_bad.py').write_text(code)
    name = place.spec(preload=['gpt_bad'], env=dict(PYTHONPATH=str(tmp_path)))
    assert re.search(why, await place.warm(name))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            async with place.kernel(name) as (_, kc): assert not await is_forked(kc)
    assert len([o for o in caplog.messages
        if re.search(f'started cold, without a template: {why}', o)]) <= 1 and caplog.text.count('started cold') <= 1
    if kind != 'ends' and kind != 'garbage': assert caplog.text.count('started cold') == 1

# Its life

async def test_interrupt_restart_and_shutdown(place, plain):
    assert await place.warm(plain) == ''
    async with place.kernel(plain) as (km, kc):
        for now in None, False, True:
            if now is not None:
                old, ports = km.provisioner.fields['pid'], km.get_connection_info()
                await km.restart_kernel(now=now)
                await kc.wait_for_ready(timeout=60)
                assert gone(old) and km.get_connection_info() == ports
            assert await is_forked(kc)
            await one_kernel(place, km)
            await interrupt(km, kc)
            await interrupt(km, kc, 'import time; time.sleep(1000)')
        pid = km.provisioner.fields['pid']
        await km.shutdown_kernel()
        assert gone(pid) and not left_of(km.kernel_id)

async def test_the_agent_is_killed_while_a_forked_kernel_computes(place, plain):
    "The kernel goes on; the next agent interrupts and ends it; templates end with their agent, and come back"
    assert await place.warm(plain) == ''
    async with place.kernel(plain) as (km, kc):
        assert await is_forked(kc)
        computing = await busy(kc, 'print("on it", flush=True)\nwhile True: pass')
        (old := place.agent()).kill()
        await until(lambda: gone(old.pid))
        await until(lambda: 'gpssh-standby' not in [name for _, name, _ in place.processes()], what='no template')
        await asyncio.wait_for(km.interrupt_kernel(), 60)
        assert (await reply_to(kc, computing))['ename'] == 'KeyboardInterrupt' and place.agent().pid != old.pid
        assert await km.is_alive() and await value(kc, '6*7') == 42
        pid = km.provisioner.fields['pid']
    assert gone(pid)
    async with kernel_of_kind(place, plain, 'forked'): pass

async def test_a_start_given_up_at_any_moment_leaves_nothing(place, plain):
    "Also one whose template is about to fork"
    assert await place.warm(plain) == ''
    ids, given_up = [], 0
    for after in (0, .001, .002, .004, .006, .008, .01, .013, .016, .02, .025, .03, .04, .06, .08, .1):
        km = place.remote.manager(plain)
        if after == .1: (await template_of(place, plain)).suspend()
        task = asyncio.ensure_future(km.start_kernel())
        await asyncio.sleep(after)
        task.cancel()
        try: await task
        except asyncio.CancelledError: given_up += 1
        else: await km.shutdown_kernel(now=True)
        ids.append(km.kernel_id)
    assert given_up > 3
    def left():
        return [p for p, name, _ in place.processes() if name not in ('gpssh-agent', 'gpssh-standby', 'cat')] + [o
            for o in place.tmp.rglob('*') if 'k-' in str(o) or 'kernel-' in o.name]
    await until(lambda: not left(), 30, 'nothing left')
    async with kernel_of_kind(place, plain, 'forked'): pass

async def test_forty_at_once(place, plain):
    "Each has ports and a key of its own; the template forks for one at a time, and for all"
    assert await place.warm(plain) == ''
    async with contextlib.AsyncExitStack() as stack:
        kernels = await asyncio.gather(*(stack.enter_async_context(place.kernel(plain)) for _ in range(40)))
        infos = [km.get_connection_info() for km, _ in kernels]
        assert len({o['key'] for o in infos}) == 40 and len({v for o in infos for k, v in o.items()
            if k.endswith('_port')}) == 200
        pids = await asyncio.gather(*(value(kc, '__import__("os").getpid()') for _, kc in kernels))
        assert pids == [km.provisioner.fields['pid'] for km, _ in kernels] and len(set(pids)) == 40
        forked = await asyncio.gather(*(is_forked(kc) for _, kc in kernels))
        print(sum(forked), 'of 40 were forked')

async def test_a_template_that_nobody_uses_ends_and_then_the_agent(place, plain):
    await asyncio.to_thread(place.move)
    async with place.kernel(plain, dict(standby_timeout=20)): await until(place.templates, 60, 'a template')
    await asyncio.to_thread(forget)
    await until(lambda: not place.processes(), 60, 'nothing left')
    assert list(place.tmp.iterdir()) == []

async def test_off(place, plain):
    "Nothing is left soon after the last kernel"
    async def left():
        await asyncio.to_thread(place.move)
        async with place.kernel(plain, dict(standby=False)) as (_, kc): assert not await is_forked(kc)
        await asyncio.to_thread(forget)
        t = Timer()
        await until(lambda: not place.processes(), 30, 'nothing left')
        return float(t)
    await within(2, left)

async def test_no_more_templates_than_that(place):
    names = [place.spec(env=dict(GPT=str(i))) for i in range(agent.MAX_TEMPLATES + 2)]
    for o in names: assert await place.warm(o) == ''
    await until(lambda: len(place.templates()) == agent.MAX_TEMPLATES)
    for o, forked in (names[-1], True), (names[0], False):
        async with place.kernel(o) as (_, kc): assert await is_forked(kc) == forked

# Secrets

def memory_of(pid):
    "All that a process of this user has in memory"
    with open(f'/proc/{pid}/maps') as maps, open(f'/proc/{pid}/mem', 'rb', 0) as mem:
        for line in maps:
            span, access, *_, = line.split()
            first, last = (int(o, 16) for o in span.split('-'))
            if access[0] != 'r' or '[v' in line: continue
            with contextlib.suppress(OSError, OverflowError):
                mem.seek(first)
                yield mem.read(last - first)

def secrets_in(pid, secrets):
    return sorted({name for part in memory_of(pid) for name, text in secrets.items() if text in part})

async def test_no_kernel_has_a_secret_of_another(place, plain):
    """Neither a template nor what it forks has seen any; what is searched for would be found: the kernels themselves
    have it"""
    async with kernel_of_kind(place, plain, 'cold') as (cold, _), kernel_of_kind(place, plain, 'forked') as (first,
        _), place.kernel(plain) as (last, kc):
        assert await is_forked(kc)
        ticket = dict(o.split('=', 1)
                      for o in Path(f'/proc/{cold.provisioner.fields["pid"]}/environ').read_text().split('\0')
                      if '=' in o)['KERNEL_LAUNCH_SECRET']
        secrets = dict(ticket=ticket.encode(), token=json.loads(base64.b64decode(ticket))['token'].encode(),
            key_of_first=first.session.key, key_of_cold=cold.session.key)
        try: assert secrets_in(cold.provisioner.fields['pid'], secrets)[0] == 'key_of_cold'
        except PermissionError: pytest.skip('this system does not let a process of the same user be read')
        assert secrets_in(first.provisioner.fields['pid'], secrets) == ['key_of_first']
        assert secrets_in(last.provisioner.fields['pid'], secrets) == []
        assert [secrets_in(p.pid, secrets) for p in place.templates()] == [[]]*len(place.templates())
        assert secrets_in(last.provisioner.fields['pid'], dict(key=last.session.key)) == ['key']
