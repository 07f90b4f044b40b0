"""R kernels: IRkernel under launch_IRkernel.R and server_listener.py, both as a kernelspec has them, started by a test that plays the host
application. R, IRkernel and (for Spark) Java must be there: what is missing fails the test that needs it, by name."""
import asyncio, os, re, shutil, signal, subprocess, sys, uuid
from contextlib import asynccontextmanager
from pathlib import Path
import pytest, zmq
from jupyter_client.asynchronous import AsyncKernelClient
import gateway_provisioners_ssh
from gateway_provisioners_ssh.handshake import Launch, connection_info
from installed import install, interrupted_within, remote_kernel, run, stopped, stopped_within
from kernels import LaunchFailed, Timer, control, launched, left_of, until, within

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
    opts = {'kernel-id': launch.kernel_id, 'port-range': '0..0', 'response-address': response, 'public-key': launch.public_key}
    return [*command, str(scripts/LAUNCHER.name), *(o for k,v in opts.items() for o in (spell.format(k), v)), *extra]

@asynccontextmanager
async def r_kernel(server, scripts, *extra, env={}, connection=None, encrypt=False, **kw):
    "A `launched` kernel, and its temporary directory `tmp`."
    launch = Launch(str(uuid.uuid4()), connection=connection, encrypt=encrypt)
    tmp = scripts.parent.parent/f'tmp-{launch.kernel_id}'
    tmp.mkdir()
    env = dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', HOME=os.environ['HOME'], LANG='C.UTF-8', TMPDIR=str(tmp),
               KERNEL_ID=launch.kernel_id, KERNEL_LAUNCH_SECRET=launch.ticket()) | env
    words = argv(scripts, launch, await server.address('127.0.0.1'), *extra, **kw)
    async with launched(server, launch, words, env, tmp.with_suffix('.log')) as k:
        k.tmp = tmp
        yield k

def interrupt(k):
    "What interrupts all processes of the kernel, as a supervisor does."
    async def kill(): os.killpg(k.fields['pgid'], signal.SIGINT)
    return kill

async def test_compute_and_plot(server, scripts):
    async with r_kernel(server, scripts) as k:
        got = await run(k, 'x <- 6 * 7; cat(x); sum(1:10)')
        assert (got.status, got.text, got.data[0]['text/plain'])==('ok', '42', '[1] 55')
        got = await run(k, 'plot(1:10)')
        assert got.status=='ok' and 'image/png' in got.data[0]
        got = await run(k, 'stop("on purpose")')
        assert got.status=='error' and 'on purpose' in got.error
        got = await run(k, 'cat(Sys.getenv("KERNEL_LAUNCH_SECRET"), ls(), Sys.getenv("KERNEL_ID"), "grüezi")')
        assert got.text.split()==['x', k.launch.kernel_id, 'grüezi'], 'the ticket is gone, and nothing of ours is in the workspace'

async def test_interrupts(server, scripts):
    async with r_kernel(server, scripts) as k:
        assert k.fields['pid']==k.fields['pgid']==k.proc.pid
        await run(k, 'x <- 0')
        for code in ('repeat x <- x + 1', 'Sys.sleep(1000)', 'system("sleep 1000")'):
            async def seconds(): return (await stopped(k, code, interrupt(k))).took
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
        await until(lambda: not left_of(k.launch.kernel_id), 10, 'listener gone')
        assert not any(k.tmp.iterdir())

async def test_killed(server, scripts):
    async with r_kernel(server, scripts) as k:
        os.kill(k.fields['pid'], signal.SIGKILL)
        assert await asyncio.wait_for(k.exited, 20)==-9
        await until(lambda: not left_of(k.launch.kernel_id), 10, 'listener gone')
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
        plain.start_channels()
        plain.shell_channel.socket.setsockopt(zmq.SNDTIMEO, 500)   # without a peer that accepts it, it could wait for ever to send
        with pytest.raises((RuntimeError, zmq.Again)): await plain.wait_for_ready(timeout=2)
        plain.stop_channels()

async def test_spellings(server, scripts):
    async with r_kernel(server, scripts, '--RemoteProcessProxy.spark-context-initialization-mode', 'none', '--cluster-type=spark',
                        spell='--RemoteProcessProxy.{}') as k:
        assert (await run(k, 'cat(exists("spark"), exists("sc"))')).text=='FALSE FALSE'
    async with r_kernel(server, scripts, '--spark-context-initialization-mode', 'lazy', '--cluster-type=none') as k:
        assert (await run(k, 'cat(exists("spark"), exists("sc"))')).text=='FALSE FALSE'

@pytest.mark.parametrize('extra, env, said', [
    (['--spark-context-initialization-mode', 'soon'], {}, 'lazy, eager or none, not soon'),
    (['--no-such-thing', '1'], {}, 'unknown argument --no-such-thing'),
    (['--port-range'], {}, '--port-range needs a value'),
    ([], {'R_LIBS_SITE': '/nowhere', 'R_LIBS_USER': '/nowhere'}, 'the R package IRkernel is not in an R library'),
    ([], {'PYSPARK_PYTHON': '/no/python'}, 'needs a Python with pycryptodomex 3.22 or later, which is neither of /no/python:'),
    ([], {'KERNEL_LAUNCH_SECRET': ''}, 'KERNEL_LAUNCH_SECRET is not set'),
    (['--spark-context-initialization-mode', 'eager'], {'SPARK_HOME': '/opt/none'}, 'the R package SparkR is not in /opt/none/R/lib'),
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
    async with r_kernel(server, scripts, '--spark-context-initialization-mode', 'lazy', env=dict(SPARK_HOME='/opt/none')) as k:
        for name in ('spark', 'sc'):
            got = await run(k, name)
            assert got.status=='error' and 'the R package SparkR is not in /opt/none/R/lib' in got.error
        assert (await run(k, 'sc <- 3; cat(sc + 1)')).text=='4', 'the names are the user\'s to take'

# Spark ---------------------------------------------------------------------------------------------------------------

def sparkr_home(cluster):
    "The cluster's Spark with the R library that pip's Spark lacks: a stand-in of ours (tests/sparkr), for Spark's own is in no package registry."
    home = cluster.dir/'spark-with-r'
    if home.exists(): return home
    lib = cluster.make_home(home.name)/'R'/'lib'
    lib.mkdir(parents=True)
    got = subprocess.run(['R', 'CMD', 'INSTALL', '--no-docs', '--no-test-load', '-l', lib, Path(__file__).parent/'sparkr'], capture_output=True, text=True)
    if got.returncode: pytest.fail(got.stderr)
    shutil.make_archive(lib/'sparkr', 'zip', lib, 'SparkR')
    return home

def submit(cluster, home, mode, master=None):
    "Arguments of `r_kernel` for a launch by spark-submit, as bin/run.sh does it."
    return dict(command=(f'{home}/bin/spark-submit', '--master', master or cluster.master, '--deploy-mode', 'client', '--name', 'R kernel'),
                env={**cluster.env, 'SPARK_HOME': str(home)}), ('--spark-context-initialization-mode', mode)

ENDLESS = 'count(sql("select id from range(0, 1000000000000000, 1, 2) where id % 7 = 0"))'   # a Spark job of some years

async def test_eager(server, scripts, spark_standalone):
    how, args = submit(spark_standalone, sparkr_home(spark_standalone), 'eager')
    async with r_kernel(server, scripts, *args, **how) as k:
        app = k.launch.kernel_id
        assert spark_standalone.applications(app), 'before the kernel is ready'
        assert (await run(k, 'cat(count(sql("select id from range(1000) where id % 7 = 0")))')).text=='143'
        assert k.fields['pgid']==k.fields['pid']!=k.proc.pid, 'a group apart from the JVM'
        for code in ('Sys.sleep(1000)', ENDLESS, ENDLESS):
            await stopped_within(1, k, code, interrupt(k), after=1)
            assert (await run(k, 'cat(count(sql("select 1")))')).text=='1', 'R, JVM and context are still there, and free'
        await k.client.shutdown(reply=True, timeout=10)
        assert await asyncio.wait_for(k.exited, 20)==0
        spark_standalone.wait_state(app, 'FINISHED')

async def test_context_that_cannot_start(server, scripts, spark_standalone):
    how, args = submit(spark_standalone, sparkr_home(spark_standalone), 'lazy', master='spark://nowhere')
    async with r_kernel(server, scripts, *args, **how) as k:
        for _ in range(2):
            got = await run(k, 'sql("select 1")')
            assert got.status=='error' and 'the Spark context could not be made' in got.error and 'spark://nowhere' in got.error
        assert (await run(k, 'cat(1 + 1)')).text=='2'
    how, args = submit(spark_standalone, sparkr_home(spark_standalone), 'eager', master='spark://nowhere')
    with pytest.raises(LaunchFailed, match='(?s)the Spark context could not be made.*spark://nowhere'):
        async with r_kernel(server, scripts, *args, **how): pass

async def test_no_context(server, scripts, spark_standalone):
    how, args = submit(spark_standalone, sparkr_home(spark_standalone), 'none')
    async with r_kernel(server, scripts, *args, **how) as k:
        assert (await run(k, 'cat(ls(), "SparkR" %in% loadedNamespaces())')).text.split()==['FALSE']
        os.kill(k.proc.pid, signal.SIGKILL)
        await until(lambda: not left_of(k.launch.kernel_id), 10, 'R ends with the JVM that led its launch')

async def test_spark_without_its_r_library(server, scripts, spark_standalone, yarn):
    how, args = submit(spark_standalone, spark_standalone.spark_home, 'lazy')
    async with r_kernel(server, scripts, *args, **how) as k:
        got = await run(k, 'spark')
        assert got.status=='error' and f'the R package SparkR is not in {spark_standalone.spark_home}/R/lib' in got.error
    how, args = submit(yarn, yarn.spark_home, 'lazy')
    with pytest.raises(LaunchFailed, match='sparkr.zip does not exist for R application in YARN mode'):
        async with r_kernel(server, scripts, *args, **how): pass

# Over SSH, from kernelspecs that were installed ------------------------------------------------------------------------

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

@pytest.mark.parametrize('kind', ['spark_standalone', 'yarn'])
async def test_spark_over_ssh(kind, request, hosts, tmp_path):
    cluster = request.getfixturevalue(kind)
    name, spec = install(tmp_path, '--language', 'R', '--spark', '--spark-master', cluster.master, '--spark-home', sparkr_home(cluster))
    with hosts.nothing_left(timeout=20, ignore=[r'kernel-.*\.log']):
        async with remote_kernel(tmp_path, name, hosts.names[:1]) as k:
            assert cluster.applications(k.id)==[], 'lazy: not before first use'
            await run(k, 'setLogLevel("ERROR")')      # which wants a context, not a session
            got = await run(k, 'cat(count(sql("select id from range(1000) where id % 7 = 0")), sparkR.callJMethod(sc, "master"))')
            assert got.text==f'143 {cluster.master}', got.error
            cluster.wait_state(k.id, 'RUNNING')
            await interrupted_within(1, k, ENDLESS, after=1)
            assert (await run(k, 'cat(count(sql("select 1")))')).text=='1'
            await k.km.shutdown_kernel()
            cluster.wait_state(k.id, 'FINISHED')
