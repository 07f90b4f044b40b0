"""Starts that the host application gives up when `launch_kernel` has returned already, by way of the real
`jupyter_client`: in each case the kernel, which nobody has then, ends and leaves nothing, and the host application goes
on as after any start that failed."""
import asyncio, gc, subprocess, sys
import psutil, pytest, zmq, zmq.asyncio
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from gateway_provisioners_ssh.provisioner import DistributedProvisioner
from pace import until, wait
from kernels import client_of, running, value

class Stages:
    "For managers: note the kernel that was launched, in `launched`"
    async def _async_launch_kernel(self, *args, **kw):
        await super()._async_launch_kernel(*args, **kw)
        self.launched = self.provisioner.fields['pid']

class Manager(Stages, AsyncIOLoopKernelManager): "As servers use it, with a restarter"

async def never_restarted(km):
    "A restarter that still runs takes a kernel that was ended for one that died"
    assert not (km._restarter and km._restarter._pcallback and km._restarter._pcallback.is_running())
    assert not km.has_kernel and not await km.is_alive()

def directory_in_the_way(remote, tmp_path):
    "The manager cannot write its connection file"
    return remote.manager(manager=Manager, connection_file=str(tmp_path)), IsADirectoryError

def file_of_another(remote, tmp_path):
    "The launcher has written the manager's own file, as launchers of old did where the home is shared"
    old = """import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import server_listener
real = server_listener.write_private
server_listener.write_private = lambda path, fields: (real(path, fields), real('{file}', fields))
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name='__main__')""".format(file=tmp_path/'kernel.json')
    name = remote.spec('of_old', lambda argv: [argv[0], '-c', old, *argv[1:]])
    return remote.manager(name, Manager, connection_file=str(tmp_path/'kernel.json')), ValueError

def no_sockets(remote, tmp_path):
    "The manager has as many sockets as it may have"
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, 1)
    km = remote.manager(manager=Manager, context=context)
    km.other = context.socket(zmq.PUSH)   # closed by the test, for a context waits for its sockets when it is collected
    return km, zmq.ZMQError

def tunnelled(remote, tmp_path):
    km, error = no_sockets(remote, tmp_path)
    km.config.DistributedProvisioner.tunneling_enabled = True
    return km, error

def no_restarter(remote, tmp_path):
    class NoRestarter(Manager):
        def start_restarter(self): raise RuntimeError('no restarter')
    return remote.manager(manager=NoRestarter), RuntimeError

@pytest.mark.parametrize('manager', [directory_in_the_way, file_of_another, no_sockets, tunnelled, no_restarter])
async def test_the_manager_fails(remote, tmp_path, manager):
    with remote.nothing_left():
        km, error = manager(remote, tmp_path)
        with pytest.raises(error): await km.start_kernel()
        with pytest.raises(error): await km.ready
        assert km.provisioner.fields['pid']
        await until(lambda: not km.has_kernel)
        await never_restarted(km)
        if hasattr(km, 'other'): km.other.close()

async def test_after_the_launch_of_a_provisioner_derived_from_ours(remote, monkeypatch):
    async def post_launch(self, **kw): raise RuntimeError('no licence left')
    monkeypatch.setattr(DistributedProvisioner, 'post_launch', post_launch)
    with remote.nothing_left():
        km = remote.manager(manager=Manager)
        with pytest.raises(RuntimeError, match='no licence left'): await km.start_kernel()
        await until(lambda: not km.has_kernel)
        await never_restarted(km)

async def test_a_restart(remote, tmp_path):
    "It fails like a start, and the next one works"
    km, file = remote.manager(manager=Manager), tmp_path/'kernel.json'
    km.connection_file = str(file)
    with remote.nothing_left():
        async with running(km) as (_, kc):
            before = km.provisioner.fields['pid']
            file.unlink()
            file.mkdir()
            with pytest.raises(OSError): await km.restart_kernel(now=True)
            await until(lambda: not km.has_kernel)
            await never_restarted(km)
            file.rmdir()
            await km.restart_kernel(now=True)
            await kc.wait_for_ready(timeout=60)
            assert await value(kc, '__import__("os").getpid()') == km.launched != before

@pytest.fixture
def context():
    """One that managers share, as in servers: one of its own would wait, when it is collected with its manager, for
    sockets that are collected after it"""
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)

class Cancelling(Manager):
    "Cancelled when all is done but to say so"
    async def _async_post_start_kernel(self, **kw):
        await super()._async_post_start_kernel(**kw)
        asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)

async def test_cancelled_in_the_next_step(remote):
    with remote.nothing_left():
        km = remote.manager(manager=Cancelling)
        task = asyncio.ensure_future(km.start_kernel())
        with pytest.raises(asyncio.CancelledError): await task
        assert km.launched
        await until(lambda: not km.has_kernel)
        await never_restarted(km)

async def test_cancelled_and_dropped_by_a_task_that_goes_on(remote, context):
    with remote.nothing_left():
        km = remote.manager(manager=type('Plain', (Cancelling, AsyncKernelManager),
                                         dict(start_restarter=lambda self: None)), context=context)
        with pytest.raises(asyncio.CancelledError): await km.start_kernel()
        pid = km.launched
        assert psutil.pid_exists(pid) and await km.is_alive()   # whoever has the manager may still want it
        del km
        await asyncio.sleep(0)   # the event loop keeps the exception, and with it the manager, until the task goes on
        gc.collect()

def test_dropped_with_its_event_loop(remote, context):
    with remote.nothing_left():
        loop, km = asyncio.new_event_loop(), remote.manager(context=context)
        async def start():
            starting = asyncio.ensure_future(km.start_kernel())
            while not km._control_socket: await asyncio.sleep(0)
            return starting
        starting = loop.run_until_complete(start())
        assert not starting.done() and km.has_kernel
        starting._log_destroy_pending = False
        loop.close()
        del loop, km, starting, start
        gc.collect()

def test_a_manager_that_is_no_coroutine(remote, tmp_path):
    with remote.nothing_left():
        km = remote.manager(manager=KernelManager, connection_file=str(tmp_path))
        with pytest.raises(IsADirectoryError): km.start_kernel()
        wait(lambda: not km.has_kernel)

# Those with a MultiKernelManager

class Several(AsyncMultiKernelManager):
    @property
    def everything(self): return {**self._kernels, **self._pending_kernels}

def several(remote, kind):
    remote.runtime.mkdir(exist_ok=True)   # as every Jupyter application does
    m = Several(kernel_spec_manager=KernelSpecManager(), connection_dir=str(remote.runtime))
    m.kernel_manager_factory = lambda **kw: (Manager if kw['kernel_name'] == 'ssh_python'
                                             else kind)(**kw | dict(kernel_name='ssh_python'))
    return m

class FailsLater(Manager):
    "A manager of somebody's, with something to do when the kernel is up"
    async def start_kernel(self, **kw):
        await super().start_kernel(**kw)
        raise RuntimeError('it could not be registered')

@pytest.mark.parametrize('kind', [FailsLater, Cancelling])
async def test_the_multi_kernel_manager_does_not_get_it(remote, kind):
    "Another kernel goes on, and all can be shut down"
    with remote.nothing_left():
        m = several(remote, kind)
        other = await m.start_kernel(kernel_name='ssh_python')
        with pytest.raises((KeyError, asyncio.CancelledError)):
            m.get_kernel(await m.start_kernel(kernel_name='other'))
        await until(lambda: set(m.everything) == {other})
        async with client_of(m.get_kernel(other)) as kc: assert await value(kc, '6*7') == 42
        await m.shutdown_all(now=True)
        assert not m.everything

async def test_one_that_was_cancelled_from_above(remote):
    "As a web server does when the browser goes away"
    with remote.nothing_left():
        m = several(remote, Cancelling)
        task = asyncio.ensure_future(m.start_kernel(kernel_name='ssh_python'))
        await until(lambda: any(getattr(o, 'launched', None) for o in gc.get_objects() if isinstance(o, Manager)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        await until(lambda: not m.everything)

# The end of the process

SCRIPT = """
import sys
from jupyter_client.manager import KernelManager
class Manager(KernelManager):
    async def _async_post_start_kernel(self, **kw):
        await super()._async_post_start_kernel(**kw)
        print('kernel', self.provisioner.fields['pid'], flush=True)
        {what}
km = Manager(kernel_name='ssh_python')
km.start_kernel()
"""

@pytest.mark.parametrize('what', ['raise KeyboardInterrupt', 'sys.exit(3)', 'raise MemoryError'])
def test_the_process_ends(remote, what):
    with remote.nothing_left(), remote.lab.nothing_left():
        p = subprocess.run([sys.executable, '-c', SCRIPT.format(what=what)], capture_output=True, text=True,
                           timeout=120)
        assert p.stdout and p.returncode
