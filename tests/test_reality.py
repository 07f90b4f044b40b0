"""Host applications as people start them: a home in which nothing has ever been set, and no variable but those that a login has."""
import json, os, re, signal, subprocess
from contextlib import asynccontextmanager, suppress
from pathlib import Path
import psutil, pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect
from hosts import wait
from kernels import BIN, until
from test_server import Channels

class Home:
    "A fresh home of a person called `me`, what runs in it, and what of that is left on this machine"
    def __init__(self, path):
        self.path, self.dirs = Path(path), set()
        self.env = dict(HOME=str(path), PATH=f'{BIN}:/usr/local/bin:/usr/bin:/bin')

    def run(self, *argv, **env):
        return subprocess.run(argv, env=self.env | env, cwd=self.path, check=True, capture_output=True, text=True, timeout=120).stdout

    def processes(self):
        "All processes with this home, and in `dirs` what supervisors among them have in /tmp"
        def here(p):
            with suppress(psutil.Error): return p.status() != psutil.STATUS_ZOMBIE and p.environ().get('HOME') == str(self.path)
        found = [p for p in psutil.process_iter() if here(p)]
        for p in found:
            with suppress(OSError): self.dirs |= {m[0] for f in os.scandir(f'/proc/{p.pid}/fd') if (m := re.match(r'/tmp/gpssh-\w+', os.readlink(f.path)))}
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
    for p in h.processes():
        with suppress(psutil.Error): p.kill()

class Application:
    "A Jupyter Server in its own default settings; it says itself where it is and what its token is"
    def __init__(self, home, *options, **env):
        self.home, self.ids, self.log = home, [], home.path.parent/'server.log'
        as_root = ['--allow-root'] if os.getuid() == 0 else []
        with open(self.log, 'wb') as f:
            self.proc = subprocess.Popen(['jupyter', 'server', '--no-browser', *as_root, *options], executable=BIN/'jupyter', cwd=home.path,
                                         env=home.env | env, stdin=subprocess.DEVNULL, stdout=f, stderr=f)

    def text(self): return self.log.read_text(errors='replace')

    async def ready(self):
        where = self.home.runtime/f'jpserver-{self.proc.pid}.json'
        def told():
            assert self.proc.poll() is None, self.text()
            with suppress(OSError, ValueError): return json.loads(where.read_text())
        self.at = await until(told, 60, 'the server up')
        await self.request('GET', 'api', 200)

    async def request(self, method, path, expect, /, **body):
        r = await AsyncHTTPClient().fetch(HTTPRequest(f'{self.at["url"]}{path}', method, dict(Authorization=f'token {self.at["token"]}'),
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

async def test_jupyter_server(home):
    "Start, compute, restart, shut down; the server ends at SIGTERM, and its kernels with it"
    home.run('jupyter-ssh-spec', 'install', '--user', '--kernel-name', 'mine')
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
