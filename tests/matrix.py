"""Applications as people run them: each a process of its own in a fresh home, with no setting but those of its cell,
and kernels that `jupyter ssh-spec install --user` described. A cell of the matrix is an application, where its kernel
runs, which way their bytes go, and who starts it.

The machines are namespaces (`hosts.NetLab`): applications and the browser are on node1; node2 has the homes of node1;
on node3 only grace can log in. So ports are the default ones, /tmp has nothing of others, and whatever is left on a
machine was left by the cell."""
import asyncio, contextlib, itertools, json, os, re, shutil, signal, subprocess, sys, time
from collections import namedtuple
from pathlib import Path
import nbformat, pexpect
from playwright.async_api import TimeoutError as LateError, async_playwright
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect
from hosts import NetLab, REPO, interruptible, sh
from kernels import BIN, gone
from pace import Timer, until, wait
from test_server import Channels

APPLICATIONS = ('Jupyter Server', 'JupyterLab', 'Notebook', 'Kernel Gateway', 'jupyter console', 'jupyter execute',
                'nbclient', 'papermill')
# by the name of the kernelspec
PLACES = dict(here='localhost', shared='a host with the same home', foreign='a host with another user and home')
WAYS = 'direct', 'tunnel'
USERS = 'root', 'ada'   # root, and an ordinary user
ENTRIES = dict(here='localhost', shared='node2', foreign='grace@node3')
TITLES = {o: f'Python on {e}' for o, e in ENTRIES.items()}
RESULTS, SCREENSHOT = REPO/'nbs/explanation/applications.json', REPO/'nbs/images/jupyterlab.png'
ALL, SHOOT = os.environ.get('GP_MATRIX') == 'all', os.environ.get('GP_SCREENSHOTS') == '1'
Cell = namedtuple('Cell', 'application place way user')

def cells():
    "All cells that can be: on localhost there is no SSH, hence no tunnel"
    return [c for c in map(Cell._make, itertools.product(APPLICATIONS, PLACES, WAYS, USERS))
            if (c.place, c.way) != ('here', 'tunnel')]

def pairs(cell): return set(itertools.combinations(enumerate(cell), 2))

def covering(cells):
    """Some of `cells` that have every pair of values that any of them has: always the one with the most new pairs;
    where many have, the one whose application runs already"""
    missing, chosen = set().union(*map(pairs, cells)), []
    while missing:
        best = max(cells, key=lambda c: (len(pairs(c) & missing), run_of(c) in map(run_of, chosen)))
        missing -= pairs(best)
        chosen.append(best)
    return chosen

def run_of(cell): return cell.application, cell.way, cell.user
def runs(cells):
    "Cells by the run of an application that they share: `{(application, way, user): [place, ...]}`"
    return {r: [c.place for c in cells if run_of(c) == r]
            for r in sorted(set(map(run_of, cells)), key=lambda r: (APPLICATIONS.index(r[0]), r[1:]))}

CHROMIUM = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
            '--disable-component-update --disable-sync'.split())

# Machines

# what programs make once in a home, and the work of the user; and not what belongs to a kernel or an application that
# runs
HABITS = re.compile(r'/\.(ipython|cache|config|jupyter|npm|ssh)/|/__pycache__/|/work/'
                    r'|/share/jupyter/(kernels/|nbsignatures|notebook_secret|runtime/jupyter_cookie_secret|'
                    r'file_id_manager)')

class Machines:
    "node1, node2 and node3, and the homes of root and ada on node1"
    def __init__(self, client, lab=NetLab):
        self.lab = lab(3, client)
        self.here, self.shared, self.foreign = self.nodes = list(self.lab)
        try:
            self.here.add_user('ada')
            self.shared.share_homes(self.here)
            self.foreign.add_user('grace')
            self.foreign.keys.joinpath('root').write_text('')
            self.foreign.home.chmod(0o755)
        except BaseException: self.lab.close(); raise
    def __enter__(self): return self
    def __exit__(self, *exc): self.lab.close()

    def unreadable(self):
        "What stops ada from using the Python of the tests, in words"
        for node, user in ((self.here, 'ada'), (self.foreign, 'grace')):
            if node.run('sh', '-c', f'test -x {sys.executable} -a -r {REPO}/tests/matrix.py || echo no', user=user):
                return f'other users cannot read {REPO}, {sys.prefix}'

    def node(self, place): return getattr(self, place)
    def login(self, place, user): return 'grace' if place == 'foreign' else user
    def seen(self, user): return Path('/root' if user == 'root' else f'/home/{user}')
    def home(self, user): return self.here.home if user == 'root' else self.here.homes/user

    def environ(self, user, **env):
        "The whole environment of an application: a home, a search path, and `env`, which the cell is about"
        if user == 'root': env['KERNEL_USERNAME'] = 'me'   # root's own kernels are refused by default
        return dict(HOME=str(self.seen(user)), PATH=f'{BIN}:/usr/local/bin:/usr/bin:/bin', **env)

    def argv(self, user, *argv):
        "That command on node1, as `user` and in the directory ~/work"
        return [str(o) for o in self.here.inside(['env', '-C', self.seen(user)/'work', *argv], user)]

    def fresh(self, user):
        """Empty the home of `user`, but for what OpenSSH needs, a directory to work in, and kernelspecs as `jupyter
        ssh-spec install` writes them"""
        home, uid, saved = self.home(user), self.here.users.get(user, 0), self.lab.base/f'home-{user}'
        mounts = {o.relative_to(self.seen(user)).parts[0] for o in self.lab.keep if self.seen(user) in o.parents}
        for o in [o for o in home.iterdir() if o.name not in mounts]:
            shutil.rmtree(o) if o.is_dir() and not o.is_symlink() else o.unlink()
        (ssh := home/'.ssh').mkdir(mode=0o700)
        (home/'work').mkdir()
        shutil.copy(self.lab.client.key, ssh/'id_ed25519')
        (ssh/'known_hosts').write_text(''.join(f'{h.name},{h.address} {h.host_key.with_suffix(".pub").read_text()}'
                                               for h in self.nodes))
        for o in (ssh, ssh/'id_ed25519', ssh/'known_hosts', home/'work'): os.chown(o, uid, uid)
        if saved.exists(): sh('cp', '-a', saved, home/'.local')   # it writes the same each time
        else:
            for place, entry in ENTRIES.items():
                hosts = [] if place == 'here' else ['--remote-hosts', entry]   # the default is localhost
                sh(*self.argv(user, 'jupyter', 'ssh-spec', 'install', '--user', '--kernel-name', place,
                              '--display-name', TITLES[place], '--python', sys.executable, *hosts),
                   env=self.environ(user))
            sh('cp', '-a', home/'.local', saved)

    def inventory(self):
        "What is on the machines, but for the browser"
        out = set()
        for h in self.nodes:
            found = [p for p in h.processes() if not p.name.startswith('chrom')]
            out |= ({(h.name, 'process', p.pid, p.cmdline) for p in found}
                    | {(h.name, 'port', o) for o in h.ports(found)})
            out |= {(h.name, 'connection', o) for o in range(h.connections())}
            out |= {(h.name, 'file', o) for o in h.files() if not HABITS.search(o)}
        return out

    @contextlib.contextmanager
    def nothing_left(self, timeout=30):
        "Fail unless the machines are, in the end, as they were"
        before = self.inventory()
        yield
        def made_whole():
            for h in self.nodes:   # what stays for the next start
                for p in h.processes():
                    if p.name == 'gpssh-standby': os.kill(p.pid, signal.SIGKILL)
            return not self.inventory() - before
        with contextlib.suppress(TimeoutError): wait(made_whole, timeout, pause=.2)
        assert not (left := self.inventory() - before), f'left: {sorted(left, key=str)}'

# What is asked of every kernel

WHERE = 'import os, pwd, socket; print("at", socket.gethostname(), pwd.getpwuid(os.getuid()).pw_name, os.getpid(), 6*7)'
PLOT = ('import matplotlib.pyplot as plt\nplt.figure(figsize=(5, 2.2)); plt.plot([n**2 for n in range(10)]); '
        'plt.title("squares"); plt.show()')
def busy(tag):
    "Code that does not end by itself, and gives its process the name `tag` when it is at it"
    return f'open("/proc/self/comm", "w").write("{tag}"); import time\nwhile True: time.sleep(.01)'

# applications that handle no SIGTERM, like any application at SIGKILL, can end nothing; `GP_ORPHAN_TIMEOUT` does
LIVES_ON = 'it ends; its kernel lives on'

class Steps:
    "What happened in one cell, and the seconds that it took"
    def __init__(self, machines, cell): self.machines, self.cell, self.done = machines, cell, {}
    @contextlib.contextmanager
    def __call__(self, name, what='yes'):
        t = Timer()
        try: yield
        except BaseException as e:
            e.add_note(f'{self.cell}: {name}') if hasattr(e, 'add_note') else None
            raise
        self.done[name] = what, round(float(t), 1)
    def none(self, name, what): self.done[name] = what, None   # the application has nothing of the kind

    def check(self, printed):
        "That `WHERE` printed what it should; the kernel's process"
        node, user = self.machines.node(self.cell.place).name, self.machines.login(self.cell.place, self.cell.user)
        m = re.search(r'at (\S+) (\S+) (\d+) 42', printed)
        assert m and m.groups()[:2] == (node, user), (printed, node, user)
        return int(m[3])

    async def at(self, tag):
        "The kernel's process that has the name `tag`"
        def found(): return next((p.pid for p in self.machines.node(self.cell.place).kernels() if p.name == tag), None)
        return await until(found, 90, f'busy {tag}')
    def log(self, pid):
        "The log of that kernel, on its host"
        kernel_id, = {p.kernel_id for p in self.machines.node(self.cell.place).kernels() if p.pid == pid}
        return self.machines.node(self.cell.place).tmp/f'kernel-{kernel_id}.log'
    async def abandoned(self, pid):
        "End a kernel that lives on without its application, and remove what there is of it"
        assert not gone(pid)
        log = self.log(pid)
        os.kill(pid, signal.SIGKILL)
        await self.gone(pid)
        await self.remove(pid, log)

    async def remove(self, pid, log):
        "Remove the log of a kernel that has ended, and what its agent kept of it for the application that is gone"
        node = self.machines.node(self.cell.place)
        def mine(d):
            with contextlib.suppress(OSError, ValueError): return json.loads((d/'record').read_text())['pid'] == pid
        for d in filter(mine, node.tmp.glob('gpssh-*/k-*')):
            await until(lambda: (d/'status').exists(), 90, 'that the agent notes the end')
            shutil.rmtree(d, ignore_errors=True)
            with contextlib.suppress(OSError): d.parent.rmdir()
        log.unlink(missing_ok=True)
        self.output_kept = True
    # in a tunnel, the agent keeps for an hour what that kernel printed last, should its application come back
    output_kept = False
    def forget_output(self):
        "End the agent, once no kernel of the run needs it"
        for p in self.machines.node(self.cell.place).processes():
            if self.output_kept and p.name == 'gpssh-agent': os.kill(p.pid, signal.SIGKILL)

    async def gone(self, pid): await until(lambda: gone(pid), 60, f'end of kernel {pid}')

# Applications

class Application:
    "A process of an application for a run of cells, and the steps of its cells"
    def __init__(self, machines, run, places):
        self.machines, (self.name, self.way, self.user) = machines, run
        self.steps = {o: Steps(machines, Cell(self.name, o, self.way, self.user)) for o in places}
        self.env = machines.environ(self.user, **(dict(GP_ENABLE_TUNNELING='True') if self.way == 'tunnel' else {}))
        self.work, self.logs, self.procs = machines.home(self.user)/'work', [], []

    def start(self, *argv):
        "A process of the application"
        self.logs.append(self.machines.lab.base/f'app-{time.monotonic_ns()}.log')
        with open(self.logs[-1], 'wb') as f:
            p = subprocess.Popen(self.machines.argv(self.user, *argv), env=self.env, stdin=subprocess.DEVNULL, stdout=f,
                                 stderr=f, start_new_session=True, preexec_fn=interruptible)
        self.procs.append(p)
        p.log = self.logs[-1]
        return p

    async def ended(self, p):
        await until(lambda: p.poll() is not None, 90, 'end of the application'); return p.returncode
    def text(self): return '\n'.join(f'{o}:\n{o.read_text(errors="replace")[-6000:]}' for o in self.logs)

    async def run(self):
        try:
            with self.machines.here.ns.entered(), self.machines.nothing_left():
                try: await self.all()
                finally:
                    for p in [p for p in self.procs if p.poll() is None]: p.kill(); p.wait()
                for s in self.steps.values(): s.forget_output()
        except BaseException:
            print(self.text())
            raise
        for s in self.steps.values(): s.done['nothing left'] = 'yes', None
        return {s.cell: s.done for s in self.steps.values()}

    async def all(self): await asyncio.gather(*(self.one(o, s) for o, s in self.steps.items()))

    async def sigterm(self, p, pids):
        t = Timer()
        p.terminate()
        code = await self.ended(p)
        for o in pids: await self.steps[next(iter(self.steps))].gone(o)
        for s in self.steps.values(): s.done['SIGTERM'] = f'it ends ({code}), and its kernels', round(float(t), 1)

class Server(Application):
    "Over REST and websocket, as front ends use it"
    @property
    def argv(self): return ['jupyter', 'server', '--no-browser', *(['--allow-root'] if self.user == 'root' else [])]

    async def all(self):
        self.proc = self.start(*self.argv)
        await self.ready()
        await super().all()
        await self.sigterm(self.proc, self.pids)
    pids = ()

    async def ready(self):
        "It has told where it is, as `jupyter server list` reads it, and answers"
        file = self.machines.home(self.user)/f'.local/share/jupyter/runtime/jpserver-{self.proc.pid}.json'
        def told():
            assert self.proc.poll() is None, 'ended'
            with contextlib.suppress(OSError, ValueError): return json.loads(file.read_text())
        info = await until(told, 90, 'the server has started')
        self.url, self.token = info['url'].rstrip('/'), info['token']
        await self.answers()
    async def answers(self):
        async def answer():
            with contextlib.suppress(OSError): return await self.request('GET', 'api', 200)
            assert self.proc.poll() is None, 'ended'
        await until(answer, 60, 'its first answer')

    token = ''
    @property
    def headers(self): return dict(Authorization=f'token {self.token}') if self.token else {}
    async def request(self, method, path, expect, **body):
        r = await AsyncHTTPClient().fetch(HTTPRequest(f'{self.url}/{path}', method, self.headers,
                                                      json.dumps(body) if body or method == 'POST' else None,
                                                      request_timeout=120, connect_timeout=60), raise_error=False)
        assert r.code == expect, (r.code, r.body)
        return json.loads(r.body) if r.body else None

    @contextlib.asynccontextmanager
    async def channels(self, kernel):
        ws = await websocket_connect(HTTPRequest(f'{self.url.replace("http", "ws", 1)}/api/kernels/{kernel}/channels',
                                                 headers=self.headers))
        c = Channels(ws)
        try: yield c
        finally: c.reading.cancel(); ws.close()

    async def one(self, place, step):
        with step('start'):
            k = (await self.request('POST', 'api/kernels', 201, name=place))['id']
        async with self.channels(k) as c:
            with step('compute'):
                await c.ready()
                pid = step.check(await c.run(WHERE, 90))
            with step('plot'):
                shown = []
                await c.wait(c.end_of(await c.start(PLOT),
                                      lambda m: shown.append(m['content'].get('data', {}).get('image/png'))), 120)
                assert any(shown), shown
            with step('interrupt'):
                msg = await c.start(busy(f'i-{place}'))
                await step.at(f'i-{place}')
                await self.request('POST', f'api/kernels/{k}/interrupt', 204)
                assert (await c.reply(msg, 90))['ename'] == 'KeyboardInterrupt'
            with step('restart'):
                await self.request('POST', f'api/kernels/{k}/restart', 200)
                await c.ready()
                before, pid = pid, step.check(await c.run(WHERE, 90))
                assert pid != before and gone(before)
            with step('kill -9', 'it is started again'):
                os.kill(pid, signal.SIGKILL)
                await c.wait(lambda m: m['msg_type'] == 'status' and 'restarting' in m['content']['execution_state'],
                             90)
                await c.ready()
                before, pid = pid, step.check(await c.run(WHERE, 90))
                assert pid != before
        with step('shutdown'):
            await self.request('DELETE', f'api/kernels/{k}', 204)
            await step.gone(pid)
        k = (await self.request('POST', 'api/kernels', 201, name=place))['id']
        async with self.channels(k) as c:
            await c.ready()
            self.pids = *self.pids, step.check(await c.run(WHERE, 90))

class KernelGateway(Server):
    argv = ['jupyter', 'kernelgateway']
    async def ready(self):
        self.url = 'http://127.0.0.1:8888'
        await self.answers()

def png(file): return file.exists() and file.read_bytes().startswith(b'\x89PNG')

class Console(Application):
    "In a terminal"
    def terminal(self, place):
        viewer = self.work/place/'xdg-open'
        viewer.parent.mkdir(exist_ok=True)
        viewer.write_text(f'#!/bin/sh\nmv "$1" ../work/{place}.png\n')
        viewer.chmod(0o755)
        argv = self.machines.argv(self.user, 'jupyter', 'console', '--kernel', place)
        self.logs.append(self.machines.lab.base/f'app-{time.monotonic_ns()}.log')
        # a terminal and a desktop
        env = self.env | dict(TERM='xterm', PATH=f'{self.machines.seen(self.user)}/work/{place}:{self.env["PATH"]}')
        c = pexpect.spawn(argv[0], argv[1:], env=env, dimensions=(40, 200), timeout=120, encoding='utf-8',
                          codec_errors='replace')
        c.logfile_read = open(self.logs[-1], 'w')
        self.terminals.append(c)
        return c

    async def all(self):
        self.terminals = []
        try: await super().all()
        finally:
            for c in self.terminals: c.close(force=True)

    async def ended(self, c): await until(lambda: not c.isalive(), 90, 'end of the console')

    async def prompt(self, c, n=1):
        "Its prompt number `n`, which a line that is being typed draws anew"
        color = r'(?:\x1b\[[\d;]*m)*'
        await c.expect(rf'In \[{color}{n}{color}\]: ', async_=True)
    async def enter(self, c, code, answer):
        "Type a line, and return what matches `answer`, which is not in the line"
        c.send(code + '\r')
        await c.expect(answer, async_=True)
        return c.match.group()

    async def started(self, place):
        c = self.terminal(place)
        await self.prompt(c)
        return c

    async def busy(self, c, step, tag):
        "The kernel's process, when it computes"
        c.send(f'open("/proc/self/comm", "w").write("{tag}"); import time; print("on", "it"); time.sleep(1000)\r')
        await c.expect('on it', async_=True)
        return await step.at(tag)

    async def one(self, place, step):
        await asyncio.gather(self.used(place, step), self.killed(place, step), self.stopped(place, step))
        step.none('restart', 'it has none')

    async def used(self, place, step):
        with step('start'): c = await self.started(place)
        with step('compute'): pid = step.check(await self.enter(c, WHERE, r'at \w+ \w+ \d+ 42'))
        await self.prompt(c, 2)
        with step('plot', 'it opens the picture with xdg-open'):
            c.send('import matplotlib.pyplot as plt; plt.plot([1, 4, 9]); plt.show()\r')
            await until(lambda: png(self.work/f'{place}.png'), 90, 'the picture')
        await self.prompt(c, 3)
        with step('interrupt'):
            await self.busy(c, step, f'i-{place}')
            c.sendintr()
            await c.expect('KeyboardInterrupt', async_=True)
        await self.prompt(c, 4)
        log = step.log(pid)
        # the console does not wait for its kernel
        with step('shutdown', 'by exit; a log is left if the kernel takes longer to end'):
            c.send('exit\r')
            await self.ended(c)
            await step.gone(pid)
        assert c.exitstatus == 0, c.signalstatus
        await step.remove(pid, log)

    async def killed(self, place, step):
        c = await self.started(place)
        pid = await self.busy(c, step, f'k-{place}')
        log = step.log(pid)
        with step('kill -9', 'it prompts again, and can be left; the log on the host stays'):
            os.kill(pid, signal.SIGKILL)
            await self.prompt(c, 2)
            c.sendeof()
            await c.expect('really want to exit', async_=True)
            c.send('y\r')
            await self.ended(c)
        log.unlink()

    async def stopped(self, place, step):
        c = await self.started(place)
        pid = await self.busy(c, step, f's-{place}')
        with step('SIGTERM', LIVES_ON):
            os.kill(c.pid, signal.SIGTERM)
            await self.ended(c)
            await step.abandoned(pid)
        # also with a local kernel
        (self.machines.home(self.user)/f'.local/share/jupyter/runtime/kernel-{c.pid}.json').unlink()

class Notebooks(Application):
    "What runs a notebook from top to bottom"
    at_sigterm = 'it ends, and its kernel'

    async def one(self, place, step):
        await asyncio.gather(self.whole(place, step), self.killed(place, step),
                             self.stopped(place, step, signal.SIGINT, 'interrupt', 'Ctrl-C ends it, and its kernel'),
                             self.stopped(place, step, signal.SIGTERM, 'SIGTERM', self.at_sigterm))
        step.none('restart', 'it has none')

    def notebook(self, name, *codes):
        f = self.work/f'{name}.ipynb'
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in codes])
        nbformat.write(nb, f)
        shutil.chown(f, self.machines.here.users.get(self.user, 0), self.machines.here.users.get(self.user, 0))
        return f

    async def whole(self, place, step):
        f = self.notebook(f'whole-{place}', WHERE, PLOT)
        t = Timer()
        p = self.start(*self.argv(f.name, place))
        assert not await self.ended(p), p.log.read_text()
        took = round(float(t), 1)
        where, plot = nbformat.read(self.output(f), 4).cells[-2:]
        pid = step.check(where.outputs[0].text)
        assert any('image/png' in o.get('data', {}) for o in plot.outputs), plot.outputs
        await step.gone(pid)
        for o in 'start', 'compute', 'plot', 'shutdown': step.done[o] = 'yes', took

    async def killed(self, place, step):
        p = self.start(*self.argv(self.notebook(f'killed-{place}', busy(f'k-{place}')).name, place))
        pid = await step.at(f'k-{place}')
        log = step.log(pid)
        with step('kill -9', 'it ends, and says "Kernel died"; the log on the host stays'):
            os.kill(pid, signal.SIGKILL)
            assert await self.ended(p) and 'Kernel died' in p.log.read_text()
        log.unlink()

    async def stopped(self, place, step, sig, name, what):
        p = self.start(*self.argv(self.notebook(f'{name}-{place}', busy(f'{name[0]}-{place}')).name, place))
        pid = await step.at(f'{name[0]}-{place}')
        with step(name, what):
            p.send_signal(sig)
            await self.ended(p)
            await (step.abandoned if what == LIVES_ON else step.gone)(pid)

    def output(self, f): return f

class Execute(Notebooks):
    def argv(self, file, kernel): return ['jupyter', 'execute', '--inplace', f'--kernel_name={kernel}', file]

class NBClient(Notebooks):
    def argv(self, file, kernel):
        return [sys.executable, '-c',
                'import nbformat, nbclient, sys\nf, kernel = sys.argv[1:]\nnb = nbformat.read(f, 4)\n'
                'nbclient.execute(nb, kernel_name=kernel)\nnbformat.write(nb, f)', file, kernel]

class Papermill(Notebooks):
    at_sigterm = LIVES_ON

    async def all(self):
        await super().all()
        # connection files, which it leaves at SIGTERM, also with local kernels
        files = list(self.machines.here.tmp.glob('tmp*.json'))
        assert len(files) == len(self.steps), files
        for o in files: o.unlink()

    def argv(self, file, kernel): return ['papermill', '-k', kernel, file, f'out-{file}']
    def output(self, f): return f.with_name(f'out-{f.name}')

class Browser(Server):
    "In Chromium, with mouse and keyboard"
    async def all(self):
        async with async_playwright() as p:
            b = await p.chromium.launch(executable_path=shutil.which('chromium'), headless=True, args=CHROMIUM)
            try:
                self.context = await b.new_context(viewport=dict(width=1100, height=720))
                self.context.set_default_timeout(120_000)
                await super().all()
            finally: await b.close()

    async def one(self, place, step):
        with step('start'): page = await self.open(await self.context.new_page(), place)
        await self.idle(page)
        with step('compute'): pid = step.check(await self.enter(page, WHERE))
        with step('plot'):
            await self.type(page, PLOT)
            await page.wait_for_function('[...document.querySelectorAll(".jp-OutputArea img")]'
                                         '.some(o => o.src.startsWith("data:image/png") && o.naturalWidth > 99)')
        await self.shoot(page, place)
        with step('interrupt'):
            await self.type(page, busy(f'i-{place}'))
            await step.at(f'i-{place}')
            await self.menu(page, 'Interrupt Kernel')
            await page.locator('.jp-OutputArea', has_text='KeyboardInterrupt').first.wait_for()
        with step('restart'):
            await self.menu(page, 'Restart Kernel…')
            await page.locator('.jp-Dialog .jp-mod-accept').click()
            await step.gone(pid)
            await self.idle(page)
            pid = step.check(await self.enter(page, WHERE))
        with step('kill -9', 'it is started again'):
            os.kill(pid, signal.SIGKILL)
            await page.locator('.jp-Dialog', has_text='appears to have died').wait_for()
            await page.locator('.jp-Dialog .jp-mod-accept').click()
            before, pid = pid, step.check(await self.enter(page, WHERE, again=True))
            assert pid != before
        with step('shutdown'):
            await self.menu(page, 'Shut Down Kernel')
            await step.gone(pid)
            await page.locator('.jp-Toolbar-kernelName, .jp-KernelName', has_text='No Kernel').first.wait_for()
        await self.menu(page, 'Restart Kernel…')   # which starts one, where there is none
        await self.idle(page)
        self.pids = *self.pids, step.check(await self.enter(page, WHERE))

    async def idle(self, page):
        "The notebook shows that its kernel waits; what is entered earlier is not executed, as with local kernels"
        await page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()

    async def type(self, page, code):
        "Run code in the last cell, which an execution leaves empty"
        cell = page.locator('.jp-Notebook .jp-CodeCell').last.locator('.cm-content')
        await cell.click()
        await page.keyboard.insert_text(code)
        await page.keyboard.press('Shift+Enter')

    async def enter(self, page, code, again=False):
        """What `code` prints. `again`: it may be lost, and is entered again then; after a kernel died JupyterLab does
        not show when the next one is ready"""
        out = page.locator('.jp-OutputArea-output').nth(await page.locator('.jp-OutputArea-output').count())
        for _ in range(8 if again else 1):
            await self.type(page, code)
            with contextlib.suppress(LateError):
                await out.wait_for(**(dict(timeout=15_000) if again else {}))
                return await out.inner_text()
        raise TimeoutError(f'no output of {code}')

    async def menu(self, page, item):
        await page.locator('.lm-MenuBar-itemLabel', has_text=re.compile('^Kernel$')).click()
        await page.locator('.lm-Menu-itemLabel', has_text=re.compile(f'^{re.escape(item)}$')).click()

    async def shoot(self, page, place): pass

class Lab(Browser):
    @property
    def argv(self): return ['jupyter', 'lab', '--no-browser', *(['--allow-root'] if self.user == 'root' else [])]

    async def open(self, page, place):
        await page.goto(f'{self.url}/lab?token={self.token}')
        news = page.get_by_role('button', name='No', exact=True)
        await page.add_locator_handler(news, news.click)
        await page.locator('.jp-LauncherCard[data-category="Notebook"]', has_text=TITLES[place]).click()
        await page.locator('.jp-Toolbar-kernelName', has_text=TITLES[place]).wait_for()
        return page

    async def shoot(self, page, place):
        if SHOOT and place == 'foreign': await page.screenshot(path=SCREENSHOT)

class Notebook(Browser):
    @property
    def argv(self): return ['jupyter', 'notebook', '--no-browser', *(['--allow-root'] if self.user == 'root' else [])]

    async def open(self, page, place):
        await page.goto(f'{self.url}/tree?token={self.token}')
        await page.locator('.jp-DropdownMenu, .jp-FileBrowser-toolbar',
                           has_text='New').first.locator('text=New').first.click()
        async with page.expect_popup() as other:
            await page.locator('.lm-Menu-itemLabel', has_text=TITLES[place]).click()
        page = await other.value
        # which it asks where its list of sessions is not there yet
        select = page.locator('.jp-Dialog', has_text='Select Kernel')
        async def choose():
            await select.locator('select').select_option(label=TITLES[place])
            await select.locator('.jp-mod-accept').click()
        await page.add_locator_handler(select, choose)
        await page.locator('.jp-Toolbar-kernelName, .jp-KernelName', has_text=TITLES[place]).first.wait_for()
        return page

KINDS = dict(zip(APPLICATIONS, (Server, Lab, Notebook, KernelGateway, Console, Execute, NBClient, Papermill)))

async def run(machines, run, places):
    "One run of an application, in a fresh home: what happened, and how long it took, by cell and step"
    machines.fresh(run[2])
    return await KINDS[run[0]](machines, run, places).run()

def write(results):
    "Write down what happened in these cells, for the documentation"
    old = {Cell(o['application'], o['place'], o['way'], o['user']): o['steps']
           for o in (json.loads(RESULTS.read_text()) if RESULTS.exists() else ())}
    rows = [dict(c._asdict(), steps=steps) for c in cells() if (steps := results.get(c) or old.get(c))]
    RESULTS.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
