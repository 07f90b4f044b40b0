"""Kernels as users get them: a kernelspec written by `jupyter ssh-spec install`, started by jupyter_client on a host of
the tests, and run cell by cell."""
import asyncio, json, os
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from traitlets.config import Config
from forks import ssh_spec
from kernels import running
from pace import Timer, until, within

def install(prefix, *options):
    "Write a kernelspec below `prefix`; its name, and kernel.json as it was written."
    before = set(Path(prefix).glob('share/jupyter/kernels/*'))
    got = ssh_spec('install', '--prefix', prefix, *options)
    assert not got.returncode, got.stderr
    made, = set(Path(prefix).glob('share/jupyter/kernels/*')) - before
    return made.name, json.loads((made/'kernel.json').read_text())

@asynccontextmanager
async def remote_kernel(prefix, name, hosts, timeout=60, **env):
    """The kernelspec `name` started on one of `hosts` by the real provisioner: `km`, `client`, `id`, `fields` of its
    report. Ends with the block."""
    config = Config()
    config.DistributedProvisioner.remote_hosts = list(hosts)
    specs = KernelSpecManager(kernel_dirs=[str(Path(prefix)/'share'/'jupyter'/'kernels')], ensure_native_kernel=False)
    km = AsyncKernelManager(kernel_name=name, kernel_spec_manager=specs, config=config)
    env = {**os.environ, 'KERNEL_USERNAME': 'ada', 'KERNEL_LAUNCH_TIMEOUT': str(timeout), **env}
    async with running(km, env=env) as (_, client):
        yield SimpleNamespace(km=km, client=client, id=km.kernel_id, fields=km.provisioner.fields,
                              provisioner=km.provisioner)

async def run(k, code, timeout=60, begun=lambda: None):
    """Run a cell of the kernel whose `client` `k` has; the status of its reply, streamed text, errors with their
    traceback, and displayed data. `begun` is called with the first that the kernel says of it, which is that it is
    busy."""
    got = SimpleNamespace(text='', error='', data=[], types=[])
    def hook(msg):
        begun()
        c = msg['content']
        got.types.append(msg['msg_type'])
        if msg['msg_type']=='stream': got.text += c['text']
        elif msg['msg_type']=='error': got.error += '\n'.join([c['evalue'], *c['traceback']])
        elif 'data' in c: got.data.append(c['data'])
    reply = await k.client.execute_interactive(code, timeout=timeout, output_hook=hook, allow_stdin=False)
    got.status = reply['content']['status']
    print(f'{code[:80]!r}: {got}')   # pytest shows it where a test fails
    return got

async def stopped(k, code, interrupt, after=.5):
    """Run a cell that does not end by itself, and `await interrupt()` once it has run for `after` seconds; what `run`
    gives, and the seconds that its end took in `took`."""
    begun = asyncio.Event()
    cell = asyncio.ensure_future(run(k, code, begun=begun.set))
    await asyncio.wait_for(begun.wait(), 60)
    await asyncio.sleep(after)
    assert not cell.done(), cell.result()
    t = Timer()
    await interrupt()
    got = await cell
    got.took = float(t)
    return got

async def interrupted(k, code, after=.5):
    "`stopped`, as a user does it: by the kernel's manager."
    return await stopped(k, code, k.km.interrupt_kernel, after)

async def stopped_within(limit, k, code, interrupt, after=.5):
    "`stopped`, `within` so many seconds; what the last attempt gives."
    # right after an interrupt some kernels abort what comes
    async def answers(): return (await run(k, '0')).status == 'ok'
    async def seconds():
        nonlocal got
        await until(answers, 60, 'an answer')
        got = await stopped(k, code, interrupt, after)
        return got.took
    got = None
    await within(limit, seconds)
    return got

async def interrupted_within(limit, k, code, after=.5):
    "`stopped_within`, as a user does it: by the kernel's manager."
    return await stopped_within(limit, k, code, k.km.interrupt_kernel, after)
