"""Host applications as people start them: a home in which nothing has ever been set, and no variable but those that a
login has.

What the other tests, the notebooks (`nbs`), `scripts/test.sh` and the demo put in the place of the real thing, and
where the real thing runs. A test without a file is one of this file.

| redirected | by | the real thing |
|---|---|---|
| HOME | conftest.py, test_notebooks.py | a fresh home is all that every test here has; that of another user: test_an_ordinary_user_who_sets_nothing |
| JUPYTER_RUNTIME_DIR, JUPYTER_DATA_DIR, JUPYTER_CONFIG_DIR, JUPYTER_PATH, JUPYTER_PREFER_ENV_PATH, `--prefix` | kernels.py, howto.py, notebooks, demo | test_jupyter_server: `install --user`, and Jupyter's defaults on both sides |
| IPYTHONDIR | kernels.py | test_jupyter_server |
| XDG_CACHE_HOME, MPLBACKEND | test_notebooks.py | unset in all tests with pytest |
| KERNEL_USERNAME | kernels.py, howto.py, notebooks, demo | unset: test_an_ordinary_user_who_sets_nothing |
| PATH, with the environment's Python first | kernels.py, howto.py, notebooks | without it: test_jupyter_server[by its path]; on the host: test_ssh_without_any_configuration |
| token, port and address of the server | test_server.py | test_jupyter_server: those that the server chooses itself |
| GP_SSH_CONFIG | test_options.py, howto.py, notebooks, demo | ~/.ssh/config: all tests with `Remote`; none at all: test_ssh_without_any_configuration |
| IdentityFile, UserKnownHostsFile | hosts.py, in ~/.ssh/config | ~/.ssh/id_ed25519, ~/.ssh/known_hosts: test_ssh_without_any_configuration |
| SSH_AUTH_SOCK removed | conftest.py | a real agent: test_network.py::test_key_with_a_passphrase_in_an_agent |
| hosts inside the process | notebooks, demo | real sshd: everything that uses hosts.py |
| sshd's port, StrictModes, UsePAM, HOME and TMPDIR of sessions | hosts.py, for hosts on loopback | port 22 and homes of their own: hosts of `net`; StrictModes and UsePAM stay off, since home and key are the tests' |
| getaddrinfo, the resolution of names | test_options.py, test_hosts_balance.py | test_a_name_service_that_does_not_answer; names of /etc/hosts: hosts of `net` |
| entry points of load balancers | test_hosts_balance.py | test_a_load_balancer_of_another_package |
| GP_STANDBY=off | hosts.py, kernels.py | test_standby.py, all tests here, test_matrix.py |
| GP_KERNEL_LOG_DIR | howto.py, notebooks | /tmp: all tests with `Remote`, and those here |
| GP_RESPONSE_PORT and its retries | test_response.py, notebooks on loopback | 8877 and up: hosts of `net` that are not tunnelled |
| GP_LAUNCH_TIMEOUT, KERNEL_LAUNCH_TIMEOUT, GP_CONNECT_TIMEOUT, all shorter | test_options.py, test_lifecycle.py, test_hosts.py | the defaults: test_jupyter_server, where they are not reached |
| `unreachable_timeout`, `orphan_timeout`: seconds in the place of minutes and days | test_options.py, test_faults.py | the same code runs with a larger number; no test waits that long |
| names of supervisors' directories recorded (`shell.secrets`) | kernels.py | here |
| methods of ours wrapped to come in at a certain moment (`_adopt`, `_retarget_forwards`, `_judge`, `ticket`) | test_lifecycle.py, test_faults.py, redact.py | the wrapped method runs, too |
| `post_launch`, cells and kernelspec of the demo, `os.rename`, Toree's jars: made to fail | test_given_up.py, test_demo.py, test_specs_cli.py | unchanged in every other test |
| system directories of Jupyter and SSH (`SYSTEM_JUPYTER_PATH`, `SYSTEM_CONFIG`) | test_specs_cli.py, test_hosts_balance.py | those of this machine: test_jupyter_server, test_ssh_without_any_configuration |
| `java` that optimizes less, and has its classes from a file | test.sh | `pytest tests/test_scala.py` in another environment than that of test.sh |
| `jupyter ssh-spec` in a process that is forked and has imported packages of others | forks.py | a new process: all tests here, test_matrix.py, test_page.py |
| SIGINT with its default effect | hosts.py (`interruptible`) | a terminal's: nothing else can be interrupted |
"""
import json, os, pwd, re, shutil, signal, subprocess, sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
import nbformat, psutil, pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect
from conftest import need
from pace import until, wait
from kernels import BIN, HABITS
from test_server import Channels

class Home:
    "A fresh home of a person called `me`, what runs in it, and what of that is left on this machine"
    def __init__(self, path):
        self.path, self.dirs = Path(path), set()
        self.env = dict(HOME=str(path), PATH=f'{BIN}:/usr/local/bin:/usr/bin:/bin')

    def run(self, *argv, stderr=subprocess.PIPE, **env):
        return subprocess.run(argv, env=self.env | env, cwd=self.path, check=True, stdout=subprocess.PIPE,
            stderr=stderr, text=True, timeout=120).stdout

    def install(self, *options):
        return self.run(BIN/'jupyter-ssh-spec', 'install', '--user', '--kernel-name', 'mine', *options)

    def all_processes(self):
        def here(p):
            with suppress(psutil.Error):
                return p.status() != psutil.STATUS_ZOMBIE and p.environ().get('HOME') == str(self.path)
        return filter(here, psutil.process_iter())

    def templates(self):
        def name(p):
            with suppress(psutil.Error): return p.name()
        return [p for p in self.all_processes() if name(p) == 'gpssh-standby']

    def processes(self):
        """All processes with this home, but the agent of this machine, which other tests use, too, and its templates,
        which stay for the next start; in `dirs` what it keeps of their kernels"""
        def other(p):
            with suppress(psutil.Error): return p.name() not in ('gpssh-agent', 'gpssh-standby')
        found = [p for p in self.all_processes() if other(p)]
        for p in found:
            with suppress(OSError):
                self.dirs |= {m[0] for f in os.scandir(f'/proc/{p.pid}/fd')
                    if (m := re.match(r'/tmp/gpssh-\w+/k-\w+', os.readlink(f.path)))}
        return found

    @property
    def runtime(self): return self.path/'.local/share/jupyter/runtime'

    def left(self, kernels):
        "Processes with this home, and files of `kernels` (their ids) here and in /tmp"
        files = [o for k in kernels for at in (self.runtime, Path('/tmp')) for o in at.glob(f'kernel-{k}*')]
        return self.processes() + files + [o for o in self.dirs if os.path.exists(o)]

    def nothing_left(self, kernels):
        try: wait(lambda: not self.left(kernels), 20)
        except TimeoutError: raise AssertionError(f'left: {self.left(kernels)}') from None

@pytest.fixture
def home(tmp_path):
    h = Home(tmp_path/'home')
    h.path.mkdir()
    yield h
    for p in [*h.processes(), *h.templates()]:
        with suppress(psutil.Error): p.kill()

class Application:
    "A Jupyter Server in its own default settings; it says itself where it is and what its token is"
    def __init__(self, home, *options, **env):
        self.home, self.ids, self.log = home, [], home.path.parent/'server.log'
        as_root = ['--allow-root'] if os.getuid() == 0 else []
        with open(self.log, 'wb') as f:
            self.proc = subprocess.Popen(['jupyter', 'server', '--no-browser', *as_root, *options],
                executable=BIN/'jupyter', cwd=home.path,
                                         env=home.env | env, stdin=subprocess.DEVNULL, stdout=f, stderr=f)

    def text(self): return self.log.read_text(errors='replace')

    async def ready(self):
        where = self.home.runtime/f'jpserver-{self.proc.pid}.json'
        def told():
            assert self.proc.poll() is None, self.text()
            with suppress(OSError, ValueError): return json.loads(where.read_text())
        self.at = await until(told, 60, 'the server up')
        async def answer():   # it writes that file a moment before it listens
            with suppress(ConnectionRefusedError): return await self.request('GET', 'api', 200)
        try: return await until(answer, 60)
        except TimeoutError: raise AssertionError(self.text()) from None

    async def request(self, method, path, expect, /, **body):
        r = await AsyncHTTPClient().fetch(HTTPRequest(f'{self.at["url"]}{path}', method,
            dict(Authorization=f'token {self.at["token"]}'),
            json.dumps(body) if method == 'POST' else None, request_timeout=60, connect_timeout=60), raise_error=False)
        assert r.code == expect, (r.code, r.body, self.text()[-3000:])
        return json.loads(r.body) if r.body else None

    async def start(self, name='mine'):
        k = await self.request('POST', 'api/kernels', 201, name=name)
        self.ids.append(k['id'])
        self.home.processes()
        return k['id']

    @asynccontextmanager
    async def channels(self, kernel_id):
        url = f'{self.at["url"].replace("http", "ws", 1)}api/kernels/{kernel_id}/channels?session_id=s-{kernel_id}'
        c = Channels(await websocket_connect(HTTPRequest(url, headers=dict(Authorization=f'token {self.at["token"]}'))))
        try: yield c
        finally: c.reading.cancel(); c.ws.close()

    def stop(self):
        self.home.processes()
        self.proc.send_signal(signal.SIGTERM)
        return self.proc.wait(30)

@pytest.mark.parametrize('path', [f'{BIN}:/usr/bin:/bin', '/usr/bin:/bin'],
    ids=['in an active environment', 'by its path'])
async def test_jupyter_server(home, path):
    "Start, compute, restart, shut down; the server ends at SIGTERM, and its kernels with it"
    home.env['PATH'] = path
    home.install()
    s = Application(home, KERNEL_USERNAME='me')
    await s.ready()
    k = await s.start()
    async with s.channels(k) as c:
        assert await c.run('x = 6*7; print(x)') == '42\n'
        await s.request('POST', f'api/kernels/{k}/restart', 200)
        await c.ready()
        assert await c.run('print("x" in globals())') == 'False\n'
    other = await s.start()
    await s.request('DELETE', f'api/kernels/{k}', 204)
    assert [o['id'] for o in await s.request('GET', 'api/kernels', 200)] == [other]
    async with s.channels(other) as c: assert await c.run('print(1)') == '1\n'
    s.stop()
    home.nothing_left(s.ids)

async def test_prewarm(home):
    """The first start is a fork of a template that the host has already; it stays for the next server until its time is
    over"""
    home.install('--preload', 'statistics')
    s = Application(home, KERNEL_USERNAME='me', GP_PREWARM='True', GP_STANDBY_TIMEOUT='20')
    await s.ready()
    template = await until(home.templates, 60, 'the template')
    k = await s.start()
    async with s.channels(k) as c: assert await c.run('import sys; print("statistics" in sys.modules)') == 'True\n'
    s.stop()
    home.nothing_left(s.ids)
    assert home.templates() == template
    await until(lambda: not home.templates(), 60, 'the end of the template')

def notebook(path, source):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return path

def printed(path): return ''.join(o.get('text', '') for c in nbformat.read(path, 4).cells for o in c.outputs)

def test_ssh_without_any_configuration(home, hosts):
    """No ~/.ssh/config: key and known host are in ssh's usual places, and the host's search path has no Python of the
    tests"""
    h = hosts[0]
    h.env = dict(PATH='/usr/bin:/bin')
    h.restart_sshd()
    (ssh := home.path/'.ssh').mkdir(mode=0o700)
    shutil.copy(hosts.client.key, ssh/'id_ed25519')
    (ssh/'known_hosts').write_text(
        f'[{h.address}]:{h.port} {" ".join(h.host_key.with_suffix(".pub").read_text().split()[:2])}\n')
    home.install('--remote-hosts', f'{h.user}@{h.address}:{h.port}', '--python', sys.executable)
    nb = notebook(home.path/'a.ipynb', 'import os; print(os.environ["GP_TEST_HOST"], os.environ["HOME"])')
    with h.nothing_left(20, HABITS):   # a template, too, if it is made before the application ends
        home.run(BIN/'jupyter', 'execute', '--inplace', '--kernel_name=mine', str(nb), KERNEL_USERNAME='me',
                 GP_STANDBY_TIMEOUT='5')
        assert printed(nb) == f'host1 {h.home}\n'
    home.nothing_left([])

def test_an_ordinary_user_who_sets_nothing(home):
    "The kernel is for the login's own user, where no KERNEL_USERNAME names another"
    me, become = pwd.getpwuid(os.getuid()), []
    if os.getuid() == 0:   # `nobody`, who may read, and only read, the Python of the tests wherever it is
        me = pwd.getpwnam('nobody')
        become = ['setpriv', f'--reuid={me.pw_uid}', f'--regid={me.pw_gid}', '--clear-groups',
            '--inh-caps=+dac_read_search', '--ambient-caps=+dac_read_search']
        os.chown(home.path, me.pw_uid, me.pw_gid)
    def run(*argv): return home.run(*become, *argv)
    run(BIN/'jupyter-ssh-spec', 'install', '--user', '--kernel-name', 'mine')
    nb = notebook(home.path/'a.ipynb', 'import os, getpass; print(os.getuid(), os.environ["KERNEL_USERNAME"])')
    os.chown(nb, me.pw_uid, me.pw_gid)
    run(BIN/'jupyter', 'execute', '--inplace', '--kernel_name=mine', str(nb))
    assert printed(nb) == f'{me.pw_uid} {me.pw_name}\n'
    home.nothing_left([])

def test_a_load_balancer_of_another_package(home):
    "Found by its entry point, as pip leaves it"
    info = home.path/'site/of_mine-1.0.dist-info'
    info.mkdir(parents=True)
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: of-mine\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[gateway_provisioners_ssh.load_balancers]\nlast = of_mine:Last\n')
    (info.parent/'of_mine.py').write_text('class Last:\n    def order(self, hosts, load): return list(hosts)[::-1]\n')
    home.install('--remote-hosts', 'gpu.invalid,localhost')
    nb = notebook(home.path/'a.ipynb', 'print(6*7)')
    r = home.run(BIN/'jupyter', 'execute', '--inplace', '--kernel_name=mine', str(nb), KERNEL_USERNAME='me',
        PYTHONPATH=str(info.parent),
                 GP_LOAD_BALANCING_ALGORITHM='last', stderr=subprocess.STDOUT)
    assert printed(nb) == '42\n' and 'gpu.invalid' not in r
    home.nothing_left([])

SILENT = """
import socket, subprocess, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('127.0.0.153', 53))
open(sys.argv[1], 'w').write('nameserver 127.0.0.153\\noptions timeout:30 attempts:1\\n')
subprocess.run(['mount', '--bind', sys.argv[1], '/etc/resolv.conf'], check=True)
p = subprocess.run(sys.argv[2:])
s.setblocking(False)
print('asked', len(s.recv(512)) > 0)
sys.exit(p.returncode)
"""

def test_a_name_service_that_does_not_answer(home):
    "The resolver of the C library waits for it longer than the launch may take"
    need(None if os.getuid() == 0 else 'only root can give a process a name service of its own')
    home.install('--remote-hosts', 'gpu.example', '--launch-timeout', '3')
    nb = notebook(home.path/'a.ipynb', '1')
    r = subprocess.run(['unshare', '--mount', '--net', 'sh', '-c', 'ip link set lo up && exec "$@"', 'sh',
        sys.executable, '-c', SILENT, home.path/'resolv.conf',
                        BIN/'jupyter', 'execute', '--kernel_name=mine', nb], env=home.env
                        | dict(KERNEL_USERNAME='me'), cwd=home.path, capture_output=True, text=True, timeout=120)
    assert r.returncode and 'host gpu.example (user root): not reached within the 3 s' in r.stderr \
        and r.stdout == 'asked True\n', r
    home.nothing_left([])
