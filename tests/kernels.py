"""Kernels on test hosts as host applications start them: a kernelspec that `jupyter ssh-spec install` wrote, found by whatever application is
asked to use it, and a look at what a kernel left behind, here and on its host."""
import asyncio, contextlib, json, os, re, subprocess, sys, time, uuid
from pathlib import Path
from types import SimpleNamespace
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from gateway_provisioners_ssh import provisioner, shell
from gateway_provisioners_ssh.background import background
from hosts import wait

BIN = Path(sys.executable).parent
HABITS = [r'/\.ipython/', r'/\.cache/', r'/\.jupyter/', r'/__pycache__/']   # files that programs make once in a home

class Remote:
    """A prefix with kernelspecs for the hosts of `lab`, and an environment in which every Jupyter application finds them. It records the
    directories that supervisors of this process get in /tmp, which loopback hosts share with everybody."""
    def __init__(self, lab, prefix, patch):
        self.lab, self.prefix, self.dirs = lab, Path(prefix), []
        self.specs_dir, self.runtime = self.prefix/'share/jupyter/kernels', self.prefix/'runtime'
        for k in ('GP_', 'EG_', 'KERNEL_'):
            for o in [o for o in os.environ if o.startswith(k)]: patch.delenv(o)
        for k, v in dict(JUPYTER_PATH=str(self.prefix/'share/jupyter'), JUPYTER_RUNTIME_DIR=str(self.runtime), JUPYTER_CONFIG_DIR=str(self.prefix/'config'),
                         IPYTHONDIR=str(self.prefix/'ipython'), JUPYTER_PREFER_ENV_PATH='0', KERNEL_USERNAME='ada',
                         PATH=f'{BIN}:{os.environ["PATH"]}').items(): patch.setenv(k, v)
        def token_hex(n):
            self.dirs.append(f'/tmp/gpssh-{(t := os.urandom(n).hex())}')
            return t
        patch.setattr(shell, 'secrets', SimpleNamespace(token_hex=token_hex))
        self.install()

    def install(self, *options, hosts=None, name='ssh_python'):
        subprocess.run([BIN/'jupyter-ssh-spec', 'install', '--prefix', self.prefix, '--remote-hosts', ','.join(hosts or self.lab.names),
                        '--kernel-name', name, *options], check=True, capture_output=True, timeout=120)

    def spec(self, name, argv=None, hosts=None, env={}, **config):
        "A variation of ssh_python: `argv` changes the command (a function of it), `config` what concerns the provisioner"
        k = json.loads((self.specs_dir/'ssh_python/kernel.json').read_text())
        k['argv'] = argv(k['argv']) if argv else k['argv']
        k['display_name'], k['env'] = name, env
        k['metadata']['kernel_provisioner']['config'] |= config | (dict(remote_hosts=hosts) if hosts else {})
        (self.specs_dir/name).mkdir(exist_ok=True)
        (self.specs_dir/name/'kernel.json').write_text(json.dumps(k))
        return name

    @property
    def scripts(self): return self.specs_dir/'ssh_python/scripts'
    def manager(self, kernel_name='ssh_python', **kw):
        return AsyncKernelManager(kernel_name=kernel_name, kernel_spec_manager=KernelSpecManager(), **kw)

    def provisioner(self, kernel_name='ssh_python'):
        "A provisioner without a manager around it"
        spec = KernelSpecManager().get_kernel_spec(kernel_name)
        return provisioner.DistributedProvisioner(kernel_id=str(uuid.uuid4()), kernel_spec=spec, **spec.metadata['kernel_provisioner']['config'])

    @contextlib.asynccontextmanager
    async def kernel(self, name='ssh_python', **kw):
        "A started kernel that answered: `km`, `kc`; shut down at the end"
        km = self.manager(name)
        await km.start_kernel(**kw)
        kc = km.client()
        kc.start_channels()
        try:
            await kc.wait_for_ready(timeout=60)
            yield km, kc
        finally:
            kc.stop_channels()
            await km.shutdown_kernel(now=True)

    def host(self, km): return self.lab[str(km.provisioner.conn.host)]

    # What is left

    def leftovers(self):
        "Supervisors' directories and logs on hosts (loopback: in everybody's /tmp), connection files here"
        dirs = [o for o in self.dirs if os.path.exists(o)]
        return dirs + [str(o) for o in self.runtime.glob('kernel-*')]

    @contextlib.contextmanager
    def nothing_left(self, timeout=15, ignore=(), logs=()):
        "Nothing remains of the kernels that start and end in this block: processes, ports, files, on hosts and here, nor a place in the ledger"
        was, before = self.leftovers(), set(listening())
        logs_was = set(Path('/tmp').glob('kernel-*.log*'))
        started = []
        with watch_ids(started), self.lab.nothing_left(timeout, [*HABITS, *ignore]): yield
        def left():
            mine = [str(o) for o in set(Path('/tmp').glob('kernel-*.log*')) - logs_was if any(i in o.name for i in started) and o.name not in logs]
            ports = set(listening()) - before - response_ports()
            return [o for o in self.leftovers() if o not in was] + mine + sorted(ports) + list(shared_load().items())
        try: wait(lambda: not left(), timeout, 'nothing left', 0.1)
        except TimeoutError: raise AssertionError(f'left: {left()}') from None

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
    for s in [s for sh in provisioner._shared.values() for s in sh.servers.values()]:
        for task in s._listening.values():
            if task.done() and not task.cancelled() and not task.exception(): out |= {o.getsockname()[1] for o in task.result().sockets}
    return out

def shared_load(): return {k: v for sh in provisioner._shared.values() for k, v in sh.ledger.load.items()}

def forget():
    "Close all connections of this process, so that the next test starts as a new process does"
    for sh in list(provisioner._shared.values()): asyncio.run(asyncio.wait_for(background().run(sh.close()), 30))
    provisioner._shared.clear()

# What clients do

async def value(kc, expr, timeout=30):
    "What `expr` is in the kernel"
    while True:   # a request may come just in time to be aborted together with an interrupted one
        reply = await kc.execute_interactive('', user_expressions=dict(v=expr), silent=True, timeout=timeout, allow_stdin=False)
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
    msg_id = kc.execute(code, allow_stdin=False)
    while True:
        m = await kc.get_iopub_msg(timeout=30)
        if m['msg_type'] == 'stream' and m['parent_header'].get('msg_id') == msg_id: return msg_id

async def reply_to(kc, msg_id, timeout=30):
    while True:
        m = await kc.get_shell_msg(timeout=timeout)
        if m['parent_header'].get('msg_id') == msg_id: return m['content']

class Timer:
    "Seconds since it was made: `float(timer)`, or compared"
    def __init__(self): self.start = time.monotonic()
    def __float__(self): return time.monotonic() - self.start
    def __lt__(self, o): return float(self) < o
    def __gt__(self, o): return float(self) > o
    def __repr__(self): return f'{float(self):.2f} s'
