"""R kernels: IRkernel under launch_IRkernel.R and server_listener.py, both as a kernelspec has them, started by a test
that plays the host application. R, IRkernel and (for Spark) Java must be there: what is missing fails the test that
needs it, by name."""
import asyncio, os, re, shutil, signal, subprocess, sys, uuid
from contextlib import asynccontextmanager
from pathlib import Path
import pytest, zmq
from jupyter_client.asynchronous import AsyncKernelClient
import gateway_provisioners_ssh
from gateway_provisioners_ssh.handshake import LaunchKeys, connection_info
from installed import install, interrupted_within, remote_kernel, run, stopped
from kernels import LaunchFailed, control, interrupting, launched, left_of
from pace import Timer, until, within

PKG = Path(gateway_provisioners_ssh.__file__).parent
LAUNCHER, LISTENER = PKG/'kernelspecs'/'r'/'launch_IRkernel.R', PKG/'launchers'/'server_listener.py'

@pytest.fixture(scope='session', autouse=True)
def irkernel():
    "R with IRkernel, or a failure that names what is missing."
    if not shutil.which('Rscript'): pytest.fail('Rscript is not on PATH: apt-get install r-cran-irkernel')
    got = subprocess.run(['Rscript', '-e', 'loadNamespace("IRkernel")'], capture_output=True, text=True)
    if got.returncode: pytest.fail(f'R cannot load IRkernel: apt-get install r-cran-irkernel\n{got.stderr}')

@pytest.fixture(scope='session')
def scripts(tmp_path_factory):
    "The scripts directory of a kernelspec, in a directory with a blank in its name."
    d = tmp_path_factory.mktemp('spec r')/'scripts'
    d.mkdir()
    for f in (LAUNCHER, LISTENER): shutil.copy(f, d)
    return d

def argv(scripts, launch, response, *extra, spell='--{}', command=('Rscript',)):
    "The command line that the expanded argv of a kernelspec gives."
    opts = {'kernel-id': launch.kernel_id, 'port-range': '0..0', 'response-address': response,
            'public-key': launch.public_key}
    return [*command, str(scripts/LAUNCHER.name), *(o for k,v in opts.items() for o in (spell.format(k), v)), *extra]

@asynccontextmanager
async def r_kernel(server, scripts, *extra, env={}, connection=None, encrypt=False, **kw):
    "A `launched` kernel, and its temporary directory `tmp`."
    launch = LaunchKeys(str(uuid.uuid4()), connection=connection, encrypt=encrypt)
    tmp = scripts.parent.parent/f'tmp-{launch.kernel_id}'
    tmp.mkdir()
    env = dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', HOME=os.environ['HOME'], LANG='C.UTF-8',
               TMPDIR=str(tmp),
               KERNEL_ID=launch.kernel_id, KERNEL_LAUNCH_SECRET=launch.ticket()) | env
    words = argv(scripts, launch, await server.address('127.0.0.1'), *extra, **kw)
    async with launched(server, launch, words, env, tmp.with_suffix('.log')) as k:
        k.tmp = tmp
        yield k

async def test_compute_and_plot(server, scripts):
    async with r_kernel(server, scripts) as k:
        got = await run(k, 'x <- 6 * 7; cat(x); sum(1:10)')
        assert (got.status, got.text, got.data[0]['text/plain'])==('ok', '42', '[1] 55')
        got = await run(k, 'plot(1:10)')
        assert got.status=='ok' and 'image/png' in got.data[0]
        got = await run(k, 'stop("on purpose")')
        assert got.status=='error' and 'on purpose' in got.error
        got = await run(k, 'cat(Sys.getenv("KERNEL_LAUNCH_SECRET"), ls(), Sys.getenv("KERNEL_ID"), "grüezi")')
        assert got.text.split()==['x', k.launch.kernel_id, 'grüezi'], 'the ticket and all else are gone'

async def test_interrupts(server, scripts):
    async with r_kernel(server, scripts) as k:
        assert k.fields['pid']==k.fields['pgid']==k.proc.pid
        await run(k, 'x <- 0')
        for code in ('repeat x <- x + 1', 'Sys.sleep(1000)', 'system("sleep 1000")'):
            async def seconds(): return (await stopped(k, code, interrupting(k))).took
            await within(1, seconds)
        for _ in range(50):   # where no cell runs, and while one begins and ends
            os.killpg(k.fields['pgid'], signal.SIGINT)
            await asyncio.sleep(.005)
        await stopped(k, 'Sys.sleep(1000)', lambda: control(k, {'signum': 2}))
        assert (await run(k, 'cat(x > 0)')).text=='TRUE', 'same R, same variables'
        assert await control(k, {'signum': 0})=={'alive': True}

async def test_shutdown_leaves_nothing(server, scripts):
    async with r_kernel(server, scripts) as k:
        await k.client.shutdown(reply=True, timeout=10)
        assert await asyncio.wait_for(k.exited, 20)==0
        await until(lambda: not left_of(k.launch.kernel_id), 10, 'all gone')
        assert not any(k.tmp.iterdir())

async def test_killed(server, scripts):
    async with r_kernel(server, scripts) as k:
        os.kill(k.fields['pid'], signal.SIGKILL)
        assert await asyncio.wait_for(k.exited, 20)==-9
        await until(lambda: not left_of(k.launch.kernel_id), 10, 'all gone')
        assert not any(k.tmp.iterdir()), 'not even the temporary directory of an R that was killed'

async def test_restart_keeps_ports_and_key(server, scripts):
    async with r_kernel(server, scripts) as k: first = connection_info(k.fields)
    async with r_kernel(server, scripts, connection=first) as k:
        assert connection_info(k.fields)==first
        assert (await run(k, 'cat(exists("x"))')).text=='FALSE'

async def test_encrypted(server, scripts):
    async with r_kernel(server, scripts, encrypt=True) as k:
        assert k.fields['curve_publickey'] and (await run(k, 'cat(1 + 1)')).text=='2'
        plain = AsyncKernelClient()
        plain.load_connection_info({n: v for n,v in connection_info(k.fields).items() if not n.startswith('curve_')})
        # without a peer that accepts it, it could wait for ever to send
        plain.start_channels(hb=False)
        plain.shell_channel.socket.setsockopt(zmq.SNDTIMEO, 500)
        with pytest.raises((RuntimeError, zmq.Again)): await plain.wait_for_ready(timeout=2)
        plain.stop_channels()

async def test_spellings(server, scripts):
    async with r_kernel(server, scripts, '--RemoteProcessProxy.spark-context-initialization-mode', 'none',
                        '--cluster-type=spark',
                        spell='--RemoteProcessProxy.{}') as k:
        assert (await run(k, 'cat(exists("spark"), exists("sc"))')).text=='FALSE FALSE'
    async with r_kernel(server, scripts, '--spark-context-initialization-mode', 'lazy', '--cluster-type=none') as k:
        assert (await run(k, 'cat(exists("spark"), exists("sc"))')).text=='FALSE FALSE'

@pytest.mark.parametrize('extra, env, said', [
    (['--spark-context-initialization-mode', 'soon'], {}, 'lazy, eager or none, not soon'),
    (['--no-such-thing', '1'], {}, 'unknown argument --no-such-thing'),
    (['--port-range'], {}, '--port-range needs a value'),
    ([], {'R_LIBS_SITE': '/nowhere', 'R_LIBS_USER': '/nowhere'}, 'the R package IRkernel is not in an R library'),
    ([], {'PYSPARK_PYTHON': '/no/python'}, 'needs a Python 3.8 or newer, which is neither of /no/python:'),
    ([], {'KERNEL_LAUNCH_SECRET': ''}, 'KERNEL_LAUNCH_SECRET is not set'),
    (['--spark-context-initialization-mode', 'eager'], {'SPARK_HOME': '/opt/none'},
     'the R package SparkR is not in /opt/none/R/lib'),
])
async def test_refusals(server, scripts, extra, env, said):
    async def refused():
        t = Timer()
        with pytest.raises(LaunchFailed) as e:
            async with r_kernel(server, scripts, *extra, env=env): pass
        assert re.match('status (1|-15) ', str(e.value)) and said in str(e.value)
        return float(t)
    await within(10, refused)

async def test_lazy_without_sparkr(server, scripts):
    async with r_kernel(server, scripts, '--spark-context-initialization-mode', 'lazy',
                        env=dict(SPARK_HOME='/opt/none')) as k:
        for name in ('spark', 'sc'):
            got = await run(k, name)
            assert got.status=='error' and 'the R package SparkR is not in /opt/none/R/lib' in got.error
        assert (await run(k, 'sc <- 3; cat(sc + 1)')).text=='4', 'the names are the user\'s to take'

# Over SSH, from kernelspecs that were installed -----------------------------------------------------------------------

async def test_over_ssh(hosts, tmp_path):
    name, spec = install(tmp_path, '--language', 'R')
    assert name=='ssh_r' and spec['argv'][0]=='Rscript'
    with hosts.nothing_left(ignore=[r'kernel-.*\.log']):
        async with remote_kernel(tmp_path, name, hosts.names[:2]) as k:
            assert (await run(k, 'x <- 6 * 7; cat(x, Sys.getenv("GP_TEST_HOST"))')).text==f'42 {hosts.names[0]}'
            assert 'image/png' in (await run(k, 'plot(1:10)')).data[0]
            await interrupted_within(1, k, 'repeat x <- x + 1')
            assert (await run(k, 'cat(x > 42)')).text=='TRUE'
            before = k.km.get_connection_info()
            await k.km.restart_kernel()
            await k.client.wait_for_ready(timeout=30)
            assert k.km.get_connection_info()==before
            assert (await run(k, 'cat(exists("x"))')).text=='FALSE'
            await k.km.shutdown_kernel()
            assert not hosts.kernels(k.id)
