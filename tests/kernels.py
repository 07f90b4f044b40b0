"""Kernels on test hosts as host applications start them: a kernelspec that `jupyter ssh-spec install` wrote, found by
whatever application is asked to use it, and a look at what a kernel left behind, here and on its host. Also launchers
that a test itself starts, and what clients do."""
import asyncio, base64, contextlib, json, os, shutil, signal, socket, subprocess, sys, uuid
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
import psutil
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets.config import Config
from gateway_provisioners_ssh import balance, provisioner
from gateway_provisioners_ssh.handshake import connection_info
from gateway_provisioners_ssh.remote import Refusal, local_session, spawn
from forks import ssh_spec
from pace import Timer, until, wait

BIN = Path(sys.executable).parent
# argv of a kernelspec with a launcher of old
LEGACY = [sys.executable, str(Path(__file__).parent/'legacy_launcher.py'), '--RemoteProcessProxy.kernel-id',
          '{kernel_id}', '--RemoteProcessProxy.response-address', '{response_address}',
          '--RemoteProcessProxy.public-key', '{public_key}']
HABITS = [r'/\.ipython/', r'/\.cache/', r'/\.jupyter/', r'/__pycache__/']   # files that programs make once in a home

class Remote:
    "A prefix with kernelspecs for the hosts of `lab`, and an environment in which every Jupyter application finds them"
    def __init__(self, lab, prefix, patch):
        self.lab, self.prefix = lab, Path(prefix)
        self.specs_dir, self.runtime = self.prefix/'share/jupyter/kernels', self.prefix/'runtime'
        for k in ('GP_', 'EG_', 'KERNEL_'):
            for o in [o for o in os.environ if o.startswith(k)]: patch.delenv(o)
        for k, v in dict(JUPYTER_PATH=str(self.prefix/'share/jupyter'), JUPYTER_RUNTIME_DIR=str(self.runtime),
                         JUPYTER_CONFIG_DIR=str(self.prefix/'config'), IPYTHONDIR=str(self.prefix/'ipython'),
                         JUPYTER_PREFER_ENV_PATH='0', KERNEL_USERNAME='ada', GP_STANDBY='off',
                         PATH=f'{BIN}:{os.environ["PATH"]}').items():
            patch.setenv(k, v)
        self.install()

    def install(self, *options, hosts=None, name='ssh_python'):
        ssh_spec('install', '--prefix', self.prefix, '--remote-hosts', ','.join(hosts or self.lab.names),
                 '--kernel-name', name, *options, timeout=120).check_returncode()

    def spec(self, name, argv=None, hosts=None, env={}, **config):
        """A variation of ssh_python: `argv` changes the command (a function of it), `config` what concerns the
        provisioner"""
        shutil.copytree(self.specs_dir/'ssh_python', self.specs_dir/name, dirs_exist_ok=True)
        k = json.loads((self.specs_dir/'ssh_python/kernel.json').read_text().replace(f'{self.specs_dir}/ssh_python/',
            f'{self.specs_dir}/{name}/'))
        k['argv'] = argv(k['argv']) if argv else k['argv']
        k['display_name'], k['env'] = name, env
        k['metadata']['kernel_provisioner']['config'] |= config | (dict(remote_hosts=hosts) if hosts else {})
        (self.specs_dir/name/'kernel.json').write_text(json.dumps(k))
        return name

    @property
    def scripts(self): return self.specs_dir/'ssh_python/scripts'
    def manager(self, kernel_name='ssh_python', manager=AsyncKernelManager, config={}, **kw):
        "A manager for that kernelspec; `config` is what the host application configures of its provisioner"
        return manager(kernel_name=kernel_name, kernel_spec_manager=KernelSpecManager(),
                       config=Config(DistributedProvisioner=config), **kw)

    def provisioner(self, kernel_name='ssh_python'):
        "A provisioner without a manager around it"
        spec = KernelSpecManager().get_kernel_spec(kernel_name)
        return provisioner.DistributedProvisioner(kernel_id=str(uuid.uuid4()), kernel_spec=spec,
                                                  **spec.metadata['kernel_provisioner']['config'])

    def kernel(self, name='ssh_python', **kw):
        "A kernel of that kernelspec, and its client; `kw` is for its start"
        return running(self.manager(name), **kw)

    def on(self, *hosts, env={}, **kw):
        """A kernel on the first of `hosts` that will have it, and its client; `env` adds to the environment of its
        start, `kw` is for its manager"""
        balance.load_balancer.cache_clear()
        return running(self.manager(self.spec('_'.join(['on', *hosts]), hosts=list(hosts)), **kw), env=os.environ | env)

    def host(self, km): return self.lab[str(km.provisioner.conn.host)]

    # What is left

    def leftovers(self):
        "What agents keep for kernels on hosts; connection files here"
        return ([str(o) for h in self.lab for o in h.tmp.glob('gpssh-*/k-*')]
                + [str(o) for o in self.runtime.glob('kernel-*')])

    @contextlib.contextmanager
    def nothing_left(self, timeout=15, ignore=(), logs=()):
        """Nothing remains of the kernels that start and end in this block: processes, ports, files, on hosts and here,
        nor a place in the ledger"""
        was, before = self.leftovers(), set(listening())
        logs_was = set(Path('/tmp').glob('kernel-*.log*'))
        started = []
        with watch_ids(started), self.lab.nothing_left(timeout, [*HABITS, *ignore]): yield
        def left():
            mine = ([d for i in started for d in kept_here(i)]
                    + [str(o) for o in set(Path('/tmp').glob('kernel-*.log*')) - logs_was
                       if any(i in o.name for i in started) and o.name not in logs])
            ports = set(listening()) - before - response_ports()
            return [o for o in self.leftovers() if o not in was] + mine + sorted(ports) + list(shared_load().items())
        try: wait(lambda: not left(), timeout, 'nothing left', 0.1)
        except TimeoutError: raise AssertionError(f'left: {left()}') from None

def kept_here(kernel_id):
    "What the agent of this machine keeps of that kernel, beside those of others"
    def has(d):
        with contextlib.suppress(OSError): return kernel_id in (d/'record').read_text()
    return [str(d) for d in Path(os.environ.get('TMPDIR', '/tmp')).glob('gpssh-*/k-*') if has(d)]

@contextlib.contextmanager
def watch_ids(seen):
    "Collect in `seen` the ids of kernels that provisioners of this process are asked for"
    real = provisioner.DistributedProvisioner.pre_launch
    async def pre_launch(self, **kw):
        seen.append(self.kernel_id)
        return await real(self, **kw)
    provisioner.DistributedProvisioner.pre_launch = pre_launch
    try: yield
    finally: provisioner.DistributedProvisioner.pre_launch = real

def listening():
    "Ports that this process listens on"
    return [c.laddr.port for c in psutil.Process().net_connections('tcp') if c.status == psutil.CONN_LISTEN]

def response_ports():
    "Those of them that wait for launch messages, which last as long as the process"
    out = set()
    for s in provisioner.shared().servers.values():
        for task in s._listening.values():
            if task.done() and not task.cancelled() and not task.exception():
                out |= {o.getsockname()[1] for o in task.result().sockets}
    return out

def shared_load(): return provisioner.shared().ledger.load

def forget():
    "Close all connections of this process, so that the next test starts as a new process does"
    asyncio.run(asyncio.wait_for(provisioner.close_shared(), 30))

# Kernels and clients

Running = namedtuple('Running', 'km client')

@contextlib.asynccontextmanager
async def client_of(km, timeout=60):
    "A client of a started kernel, that the kernel has answered"
    kc = km.client()
    kc.start_channels()
    try:
        await kc.wait_for_ready(timeout=timeout)
        yield kc
    finally: kc.stop_channels()

@contextlib.asynccontextmanager
async def running(km, **kw):
    "`km`, started with `kw`, and a client that it answered; shut down at the end"
    await km.start_kernel(**kw)
    try:
        async with client_of(km) as kc: yield Running(km, kc)
    finally: await km.shutdown_kernel(now=True)

async def value(kc, expr, timeout=30):
    "What `expr` is in the kernel"
    while True:   # a request may come just in time to be aborted together with an interrupted one
        reply = await kc.execute_interactive('', user_expressions=dict(v=expr), silent=True, timeout=timeout,
                                             allow_stdin=False)
        if reply['content']['status'] != 'aborted': break
    v = reply['content']['user_expressions']['v']
    assert v['status'] == 'ok', v
    return eval(v['data']['text/plain'])

async def printed(kc, code, timeout=30):
    "What `code` prints, and how it ended"
    out = []
    def hook(m):
        if m['msg_type'] == 'stream': out.append(m['content']['text'])
        elif m['msg_type'] == 'error': out.append(m['content']['ename'])
    reply = await kc.execute_interactive(code, output_hook=hook, timeout=timeout, allow_stdin=False)
    return ''.join(out), reply['content']['status']

async def busy(kc, code):
    "Run `code` without waiting for its end; returns its message id once it has printed something"
    await value(kc, '0')   # a kernel that was interrupted just now may abort what comes next
    msg_id = kc.execute(code, allow_stdin=False)
    while True:
        m = await kc.get_iopub_msg(timeout=30)
        if m['msg_type'] == 'stream' and m['parent_header'].get('msg_id') == msg_id: return msg_id

async def reply_to(kc, msg_id, timeout=30):
    "The content of the reply to that request"
    while True:
        m = await kc.get_shell_msg(timeout=timeout)
        if m['parent_header'].get('msg_id') == msg_id: return m['content']

async def interrupt(km, kc, code='while True: pass'):
    "Interrupt Python code that does not end by itself while it runs; the seconds until its reply"
    msg_id = await busy(kc, f'print("on it", flush=True)\n{code}')
    await asyncio.sleep(.2)
    t = Timer()
    await km.interrupt_kernel()
    r = await reply_to(kc, msg_id)
    took = float(t)
    assert (r['status'], r['ename']) == ('error', 'KeyboardInterrupt')
    return took

async def kill(km, kc):
    """Kill the kernel on its host, having restarted one that is dead already; the seconds until its end, and how it
    came, are known here"""
    if not await km.is_alive():
        await km.restart_kernel(now=True)
        await kc.wait_for_ready(timeout=60)
    t = Timer()
    os.kill(km.provisioner.fields['pid'], signal.SIGKILL)
    assert await asyncio.wait_for(km.provisioner.wait(), 30) == -9
    return float(t)

async def ended(provisioners):
    "Kill the kernels of provisioners without managers, and do for each what a manager does then"
    async def end(p):
        await p.kill()
        await asyncio.wait_for(p.wait(), 30)
        await p.cleanup()
    await asyncio.gather(*map(end, provisioners))

# Processes and ports

def gone(pid):
    "Has the process ended? A zombie has"
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True

def left_of(kernel_id):
    "Live processes with that kernel's id in their environment or command line"
    def has(p):
        try:
            return (p.pid != os.getpid() and not gone(p.pid)
                    and (p.environ().get('KERNEL_ID') == kernel_id or any(kernel_id in o for o in p.cmdline())))
        except psutil.Error: return False
    return [p for p in psutil.process_iter() if has(p)]

@contextlib.contextmanager
def taken_ports(n, ip='127.0.0.1'):
    """`n` ports in a row, the first of which this gives, that nobody else can have; below those that the system chooses
    from"""
    for lo in range(20000, 32000, n):
        with contextlib.ExitStack() as stack:
            try:
                for p in range(lo, lo+n): stack.enter_context(socket.socket()).bind((ip, p))
            except OSError: continue
            yield lo
            return
    raise RuntimeError(f'nowhere are {n} ports in a row free')

# Launchers that a test starts itself, by the agent of this machine, in the place of a provisioner

class LaunchFailed(Exception): "A launcher ended, or was silent for too long; how, and what it said"

@contextlib.asynccontextmanager
async def launched(server, launch, argv, env, log, timeout=60):
    """The launcher `argv`, once its kernel has been reported: its `process`, `proc` with its pid, its end `exited`, the
    `fields` reported, a `client`. The report comes by the agent, or to the response `server` where the launcher cannot
    reach that. The log is the file `log`. The kernel is killed at the end, and then no process of it is left."""
    ticket, env = (launch.ticket_fields(True) if env.get('KERNEL_LAUNCH_SECRET') else None,
                   {k: v for k, v in env.items() if k != 'KERNEL_LAUNCH_SECRET'})
    # a login; the agent is not the kernel's
    session = await local_session({k: env[k] for k in ('HOME', 'PATH', 'LANG') if k in env})
    async def sessions():
        if session.closed: await asyncio.sleep(3600)
        return session
    with server.expect(launch) as told:
        t = Timer()
        try:
            p = await spawn(session, sessions, str(log), argv=[str(o) for o in argv], env=env, max_bytes=10*2**20,
                            ticket=ticket, title='a launcher')
        except Refusal as e: raise LaunchFailed(str(e)) from None
        try:
            await asyncio.wait([told.future, p.report, p.exited], timeout=timeout, return_when='FIRST_COMPLETED')
            if not told.future.done() and not p.report.done():
                # who is left may say more
                with contextlib.suppress(TimeoutError):
                    await until(lambda: not p.exited.done() or not left_of(launch.kernel_id), 5)
                raise LaunchFailed(f'status {p.returncode} after {t}: {await p.tail(1000)}')
            fields = told.future.result() if told.future.done() else launch.accept(p.report.result())
            async with reported_client(fields) as kc:
                yield SimpleNamespace(process=p, proc=SimpleNamespace(pid=p.pid), exited=p.exited, fields=fields,
                                      client=kc, log=log, launch=launch)
        finally:
            await p.release(keep_log=True)
            session.close()
            await until(lambda: not left_of(launch.kernel_id), 10, 'all processes of the kernel gone')

@contextlib.asynccontextmanager
async def launched_alone(server, launch, argv, env, log, timeout=60, report=None):
    """The launcher `argv`, once its kernel has reported to the response server: the process `proc`, its end `exited`,
    the `fields` reported, a `client`. One that reports otherwise has its fields in the future `report`. What it says
    goes to the file `log`. It is killed at the end, and then no process of it is left."""
    pgids = set()
    with server.expect(launch) as told, open(log, 'wb') as out:
        report = report or told.future
        t = Timer()
        proc = await asyncio.create_subprocess_exec(*argv, env=env, start_new_session=True,
                                                    stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out)
        exited = asyncio.ensure_future(proc.wait())
        pgids.add(proc.pid)
        try:
            await asyncio.wait([report, exited], timeout=timeout, return_when='FIRST_COMPLETED')
            if not report.done():
                # who is left may say more
                with contextlib.suppress(TimeoutError):
                    await until(lambda: not exited.done() or not left_of(launch.kernel_id), 5)
                raise LaunchFailed(f'status {proc.returncode} after {t}: {log.read_text(errors="replace")[-6000:]}')
            fields = report.result()
            pgids.add(fields['pgid'])
            async with reported_client(fields) as kc:
                yield SimpleNamespace(proc=proc, exited=exited, fields=fields, client=kc, log=log, launch=launch)
        finally:
            for pgid in pgids:
                with contextlib.suppress(ProcessLookupError): os.killpg(pgid, signal.SIGKILL)
            await exited
            await until(lambda: not left_of(launch.kernel_id), 10, 'all processes of the kernel gone')

@contextlib.asynccontextmanager
async def reported_client(fields):
    "A client of the kernel that reported `fields`, which it answered"
    kc = AsyncKernelClient()
    kc.load_connection_info(connection_info(fields))
    kc.start_channels(hb=False)   # a kernel on a busy machine is not dead
    try:
        await kc.wait_for_ready(timeout=90)
        yield kc
    finally: kc.stop_channels()

def interrupting(k):
    "What interrupts all processes of a `launched` kernel, as an agent does"
    async def interrupt(): os.killpg(k.fields['pgid'], signal.SIGINT)
    return interrupt

async def ticket_of(process):
    """What a process that an agent started was given as its ticket, where it prints `KERNEL_LAUNCH_SECRET` after the
    title of its log"""
    async def printed(): return len(lines := (await process.tail(1000)).splitlines()) > 1 and lines
    return json.loads(base64.b64decode((await until(printed, 60, 'its ticket'))[1]))

async def control(k, request):
    """What a host application asks of a `launched` kernel: `{'signum': N}`, 0 to know whether it lives, or
    `{'shutdown': 1}`"""
    if signum := request.get('signum', signal.SIGTERM): await k.process.signal(signum)
    return {'alive': not k.exited.done()}
