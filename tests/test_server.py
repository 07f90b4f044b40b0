"""A real Jupyter Server and a real Kernel Gateway, each a process of its own, with kernels on real hosts: over REST and
websocket, as front ends use them."""
import asyncio, json, os, re, signal, socket, subprocess, sys, uuid
from contextlib import asynccontextmanager, suppress
from pathlib import Path
import psutil
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect
from pace import Timer, until, wait, within
from kernels import HABITS

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

class Server:
    "A server in a process of its own; `dirs` are those that supervisors on hosts have in /tmp for its kernels"
    token = 'of-tests'
    def __init__(self, remote, dir, module, *options, **env):
        self.remote, self.port, self.log = remote, free_port(), dir/f'{module}.log'
        self.url, self.dirs, self.ids = f'http://127.0.0.1:{self.port}', set(), set()
        with open(self.log, 'wb') as f:
            self.proc = subprocess.Popen([sys.executable, '-m', module, '--debug',
                                          *(o.format(port=self.port) for o in options)], cwd=dir,
                                         stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                         env=os.environ | dict(PYTHONUNBUFFERED='1') | env)

    async def request(self, method, path, expect=None, /, **body):
        r = await AsyncHTTPClient().fetch(HTTPRequest(f'{self.url}/{path}', method,
            dict(Authorization=f'token {self.token}'), json.dumps(body) if body or method == 'POST' else None,
            request_timeout=60, connect_timeout=60), raise_error=False)
        assert expect is None or r.code == expect, (r.code, r.body, self.text()[-3000:])
        return json.loads(r.body) if r.body else None

    async def ready(self):
        "Whether it answers; false if another process was quicker to take its port"
        try: await until(lambda: self.proc.poll() is not None or self.listens(), 60, 'the server listens')
        except TimeoutError as e: raise TimeoutError(f'{e}\n{self.text()}') from None
        if self.proc.poll() is None:
            await self.request('GET', 'api', 200)
            return True
        assert 'in use' in self.text(), self.text()
        return False

    def listens(self):
        with suppress(psutil.Error):
            return any(o.laddr.port == self.port for o in psutil.Process(self.proc.pid).net_connections('tcp')
                       if o.status == 'LISTEN')

    def text(self): return self.log.read_text(errors='replace')

    async def start(self, name='ssh_python', **body):
        k = await self.request('POST', 'api/kernels', 201, name=name, **body)
        self.ids.add(k['id'])
        self.look()
        return k['id']

    def look(self):
        for p in self.remote.lab.hosts and [p for h in self.remote.lab for p in h.processes()]:
            with suppress(OSError):
                self.dirs |= {m[0] for o in os.scandir(f'/proc/{p.pid}/fd')
                              if (m := re.match(r'/tmp/gpssh-\w+', os.readlink(o.path)))}

    @asynccontextmanager
    async def channels(self, kernel_id):
        ws = await websocket_connect(
            HTTPRequest(f'{self.url.replace("http", "ws")}/api/kernels/{kernel_id}/channels?session_id=s-{kernel_id}',
                                                 headers=dict(Authorization=f'token {self.token}')))
        c = Channels(ws)
        try: yield c
        finally: c.reading.cancel(); ws.close()

    def left(self):
        files = [str(f) for i in self.ids for f in [*Path('/tmp').glob(f'kernel-{i}.log*'),
                                                    *self.remote.runtime.glob(f'kernel-{i}*')]]
        return [o for o in self.dirs if os.path.exists(o)] + files

class Channels:
    "One websocket to one kernel, as a front end has it"
    def __init__(self, ws):
        self.ws, self.session, self.messages, self.reading = (ws, uuid.uuid4().hex, [],
                                                              asyncio.ensure_future(self.read()))

    async def read(self):
        while (m := await self.ws.read_message()) is not None: self.messages.append(json.loads(m))
        self.messages.append(dict(msg_type='closed', parent_header={}, content={}))

    async def send(self, msg_type, **content):
        msg_id = uuid.uuid4().hex
        await self.ws.write_message(json.dumps(dict(channel='shell', parent_header={}, metadata={}, content=content,
            buffers=[], header=dict(msg_id=msg_id, username='ada', session=self.session, msg_type=msg_type,
                                    version='5.3'))))
        return msg_id

    async def wait(self, found, timeout=40):
        "The first message, of those to come or not looked at yet, for which `found` is true"
        def look():
            while self.messages:
                if found(m := self.messages.pop(0)): return m
        return await until(look, timeout, 'such a message')

    async def start(self, code):
        return await self.send('execute_request', code=code, silent=False, store_history=True, user_expressions={},
                               allow_stdin=False, stop_on_error=True)
    async def reply(self, msg_id, timeout=40):
        return (await self.wait(lambda m: m['msg_type'] == 'execute_reply'
                                and m['parent_header'].get('msg_id') == msg_id, timeout))['content']

    def end_of(self, msg_id, hear=lambda m: None):
        """For `wait`: the request has its reply, and the kernel is idle again; `hear` gets all messages that belong to
        it"""
        missing = {'reply', 'idle'}
        def found(m):
            if m['parent_header'].get('msg_id') != msg_id: return False
            hear(m)
            if m['msg_type'].endswith('_reply'): missing.discard('reply')
            if m['msg_type'] == 'status': missing.discard(m['content']['execution_state'])
            return not missing
        return found

    async def ready(self):
        """Return when a kernel that was started again is heard: what is sent or said just after its start may be lost,
        as with local kernels"""
        for _ in range(30):
            with suppress(TimeoutError): return await self.wait(self.end_of(await self.send('kernel_info_request')), 2)
        raise TimeoutError('no answer')

    async def run(self, code, timeout=40):
        "What `code` prints"
        out = []
        def hear(m):
            if m['msg_type'] == 'stream': out.append(m['content']['text'])
            if m['msg_type'] == 'error': out.append(m['content']['ename'])
        await self.wait(self.end_of(await self.start(code), hear), timeout)
        return ''.join(out)

@asynccontextmanager
async def server(remote, dir, module, *options, stop=signal.SIGTERM, **env):
    "A server that answers; stopped by a signal at the end, when nothing of its kernels is left"
    with remote.lab.nothing_left(20, HABITS):
        s = Server(remote, dir, module, *options, **env)
        try:
            while not await s.ready(): s = Server(remote, dir, module, *options, **env)
            yield s
        except BaseException:
            print(s.text()[-5000:])
            raise
        finally:   # also for the sake of the next test, which kernels that live on would disturb
            s.look()
            s.proc.send_signal(stop)
            try: s.proc.wait(30)
            except subprocess.TimeoutExpired:
                s.proc.kill(); s.proc.wait()
                raise
    wait(lambda: not s.left(), 10, f'nothing left but {s.left()}')
    for o in ('Task was destroyed', 'never retrieved', 'never awaited', 'Logging error'):
        assert o not in s.text(), s.text()
    for o in ('KERNEL_LAUNCH_SECRET=', 'curve_secretkey'): assert o not in s.text()

JUPYTER = ('--no-browser', '--allow-root', '--ServerApp.port={port}', '--ServerApp.port_retries=0',
           '--IdentityProvider.token=of-tests', '--ServerApp.ip=127.0.0.1', '--ServerApp.disable_check_xsrf=True')

def jupyter(remote, dir, *options, **env): return server(remote, dir, 'jupyter_server', *JUPYTER, *options, **env)

async def test_rest_and_websocket(remote, tmp_path):
    async with jupyter(remote, tmp_path, KERNEL_COLOR='$(id) `id` "green"', SECRET_OF_THE_SERVER='1') as s:
        k = await s.start()
        assert [o['id'] for o in await s.request('GET', 'api/kernels', 200)] == [k]
        async with s.channels(k) as c:
            assert await c.run('import os; print(os.environ["GP_TEST_HOST"], os.environ["KERNEL_COLOR"], '
                               'os.environ["KERNEL_ID"], "SECRET_OF_THE_SERVER" in os.environ)') \
                == f'host1 $(id) `id` "green" {k} False\n'
            async def interrupt():
                msg = await c.start('print("on it", flush=True)\nwhile True: pass')
                await c.wait(lambda m: m['msg_type'] == 'stream')
                t = Timer()
                await s.request('POST', f'api/kernels/{k}/interrupt', 204)
                assert (await c.reply(msg))['ename'] == 'KeyboardInterrupt'
                return float(t)
            await within(1, interrupt)
            assert await c.run('x = 42; print(x, os.getpid())') != ''
            await s.request('POST', f'api/kernels/{k}/restart', 200)
            s.look()
            await c.ready()
            assert await c.run('print("x" in globals())') == 'False\n'
            await c.start('import time; print("on it", flush=True); time.sleep(1000)')
            await c.wait(lambda m: m['msg_type'] == 'stream')
            await s.request('POST', f'api/kernels/{k}/restart', 200)
            s.look()
            await c.ready()
            assert await c.run('print(6*7)') == '42\n'
        async with s.channels(k) as c: assert await c.run('print(2*6*7)') == '84\n'
        await s.request('DELETE', f'api/kernels/{k}', 204)
        assert await s.request('GET', 'api/kernels', 200) == [] and not remote.lab.kernels(k)
        await asyncio.gather(*(s.start() for _ in range(4)))
        assert [len({p.kernel_id for p in h.kernels()}) for h in remote.lab] == [1]*4   # these end with the server

async def test_refusals(remote, tmp_path):
    "Each with its reason in JSON, and at once"
    remote.spec('Private GPU', authorized_users=['grace'])
    remote.spec('Barred', unauthorized_users=['ada'])
    remote.spec('Broken', lambda a: ['/opt/no/python', *a[1:]], hosts=['host2'])
    remote.spec('Down', hosts=['host3'])
    remote.lab[2].stop()
    async with jupyter(remote, tmp_path) as s:
        r = await s.request('POST', 'api/kernels', 403, name='Private GPU')
        assert r['message'] == "user 'ada' may not start kernel 'Private GPU': the name is not in authorized_users"
        r = await s.request('POST', 'api/kernels', 403, name='Barred')
        assert r[
            'message'] == "user 'ada' may not start kernel 'Barred': the name is in unauthorized_users (kernel.json)"
        async def refused(name, *words):
            t = Timer()
            r = await s.request('POST', 'api/kernels', 500, name=name)
            assert all(re.search(o, r['message']) for o in words), r
            return float(t)
        await within(8, lambda: refused('Broken', r'host host2 \(user ', '/opt/no/python: not found',
                                        'must be on the host'))
        await within(8, lambda: refused('Down', 'host host3', 'nothing listens'))
        # as JupyterLab does
        r = await s.request('POST', 'api/sessions', name='a', path='a.ipynb', type='notebook',
                            kernel=dict(name='Private GPU'))
        assert 'not in authorized_users' in r['message'], r
        assert await s.request('GET', 'api/kernels', 200) == []
        k = await s.request('POST', 'api/sessions', 201, name='b', path='b.ipynb', type='notebook',
                            kernel=dict(name='ssh_python'))
        async with s.channels(k['kernel']['id']) as c: assert await c.run('print(1)') == '1\n'

async def test_autorestart(remote, tmp_path):
    "A kernel killed on its host is started again, and whoever was connected stays so"
    async with jupyter(remote, tmp_path) as s:
        k = await s.start()
        async with s.channels(k) as c:
            pid = int(await c.run('import os; print(os.getpid())'))
            host, = [h for h in remote.lab if h.kernels(k)]
            t = Timer()
            os.kill(pid, signal.SIGKILL)
            await c.wait(lambda m: m['msg_type'] == 'status' and 'restarting' in m['content']['execution_state'])
            assert t < 8   # the restarter looks every 3 s
            wait(lambda: [p for p in host.kernels(k) if p.name == 'python'], 20)
            s.look()
            await c.ready()
            assert int(await c.run('import os; print(os.getpid())')) != pid

async def test_cull(remote, tmp_path):
    async with jupyter(remote, tmp_path, '--MappingKernelManager.cull_idle_timeout=2',
                       '--MappingKernelManager.cull_interval=1', '--MappingKernelManager.cull_connected=True') as s:
        idle, busy = await asyncio.gather(s.start(), s.start())
        async with s.channels(busy) as c, s.channels(idle) as d:
            await d.run('1')
            await c.start('import time; time.sleep(1000)')
            async def culled(): return [o['id'] for o in await s.request('GET', 'api/kernels', 200)] == [busy]
            await until(culled, 20, 'one kernel culled')
        wait(lambda: not remote.lab.kernels(idle), 10)

async def test_kernel_gateway(remote, tmp_path):
    "A host application whose start requests carry an environment"
    hostile = '"; touch /tmp/gpt-hostile; " $(touch /tmp/gpt-hostile) `touch /tmp/gpt-hostile`\nü \''
    options = ('--KernelGatewayApp.port={port}', '--KernelGatewayApp.port_retries=0',
               '--KernelGatewayApp.auth_token=of-tests', '--KernelGatewayApp.ip=127.0.0.1',
               '--JupyterWebsocketPersonality.list_kernels=True')
    async with server(remote, tmp_path, 'kernel_gateway', *options) as s:
        r = await s.request('POST', 'api/kernels', 403, name='ssh_python', env=dict(KERNEL_USERNAME='root'))
        assert "user 'root' may not start kernel 'Python SSH': the name is in unauthorized_users" in r['message']
        r = await s.request('POST', 'api/kernels', 400, name='ssh_python',
                            env=dict(KERNEL_USERNAME='ada', KERNEL_REMOTE_HOST='elsewhere'))
        assert "KERNEL_REMOTE_HOST='elsewhere' is not among the hosts" in r['message']
        k = await s.start(env=dict(KERNEL_USERNAME=hostile, KERNEL_REMOTE_HOST='host3', KERNEL_BIG='x'*100_000))
        async with s.channels(k) as c:
            assert await c.run('import os; print([os.environ[f"KERNEL_{o}"] for o in ("USERNAME", "REMOTE_HOST")] + '
                               '[len(os.environ["KERNEL_BIG"]), os.environ["GP_TEST_HOST"]])') \
                == f'{[hostile, "host3", 100_000, "host3"]}\n'
            await s.request('POST', f'api/kernels/{k}/restart', 200)
            s.look()
            await c.ready()
            assert await c.run('import os; print(os.environ["KERNEL_USERNAME"])') == hostile + '\n'
        assert not os.path.exists('/tmp/gpt-hostile')
