"R kernels with Spark, on clusters. (What needs no cluster: test_r.py.)"
import asyncio, os, shutil, signal, subprocess
from pathlib import Path
import pytest
from installed import install, interrupted_within, remote_kernel, run, stopped, stopped_within
from kernels import LaunchFailed, interrupting, left_of
from pace import until
from test_r import irkernel, r_kernel, scripts

def sparkr_home(cluster):
    """The cluster's Spark with the R library that pip's Spark lacks: a stand-in of ours (tests/sparkr), for Spark's own
    is in no package registry."""
    home = cluster.dir/'spark-with-r'
    if home.exists(): return home
    lib = cluster.make_home(home.name)/'R'/'lib'
    lib.mkdir(parents=True)
    got = subprocess.run(['R', 'CMD', 'INSTALL', '--no-docs', '--no-test-load', '-l', lib,
                          Path(__file__).parent/'sparkr'], capture_output=True, text=True)
    if got.returncode: pytest.fail(got.stderr)
    shutil.make_archive(lib/'sparkr', 'zip', lib, 'SparkR')
    return home

def submit(cluster, home, mode, master=None):
    "Arguments of `r_kernel` for a launch by spark-submit, as bin/run.sh does it."
    return dict(command=(f'{home}/bin/spark-submit', '--master', master or cluster.master, '--deploy-mode', 'client',
                         '--name', 'R kernel'),
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
            await stopped_within(1, k, code, interrupting(k), after=1)
            assert (await run(k,
                              'cat(count(sql("select 1")))')).text=='1', 'R, JVM and context are still there, and free'
        await run(k,
                  'query <- function(n) sql(paste(rep(paste("select id from range(0,", n, ", 1, 1) where id % 7 = 0"), '
                  '40), collapse = " union all "))')
        await run(k, 'endless <- query("1000000000000000"); short <- query("1")')
        assert (await stopped(k, 'count(endless)', interrupting(k), after=.2)).status=='abort'
        # the job of what was interrupted before it had one does not begin afterwards
        assert (await run(k, 'cat(count(short))')).text=='40'
        await k.client.shutdown(reply=True, timeout=10)
        assert await asyncio.wait_for(k.exited, 20)==0
        spark_standalone.wait_state(app, 'FINISHED')

async def test_context_that_cannot_start(server, scripts, spark_standalone):
    how, args = submit(spark_standalone, sparkr_home(spark_standalone), 'lazy', master='spark://nowhere')
    async with r_kernel(server, scripts, *args, **how) as k:
        for _ in range(2):
            got = await run(k, 'sql("select 1")')
            assert (got.status=='error' and 'the Spark context could not be made' in got.error
                    and 'spark://nowhere' in got.error)
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
        assert (got.status=='error'
                and f'the R package SparkR is not in {spark_standalone.spark_home}/R/lib' in got.error)
    how, args = submit(yarn, yarn.spark_home, 'lazy')
    with pytest.raises(LaunchFailed, match='sparkr.zip does not exist for R application in YARN mode'):
        async with r_kernel(server, scripts, *args, **how): pass

@pytest.mark.parametrize('kind', ['spark_standalone', 'yarn'])
async def test_spark_over_ssh(kind, request, hosts, tmp_path):
    cluster = request.getfixturevalue(kind)
    name, spec = install(tmp_path, '--language', 'R', '--spark', '--spark-master', cluster.master, '--spark-home',
                         sparkr_home(cluster))
    with hosts.nothing_left(timeout=20, ignore=[r'kernel-.*\.log']):
        async with remote_kernel(tmp_path, name, hosts.names[:1]) as k:
            assert cluster.applications(k.id)==[], 'lazy: not before first use'
            await run(k, 'setLogLevel("ERROR")')      # which wants a context, not a session
            got = await run(k,
                            'cat(count(sql("select id from range(1000) where id % 7 = 0")), sparkR.callJMethod(sc, '
                            '"master"))')
            assert got.text==f'143 {cluster.master}', got.error
            cluster.wait_state(k.id, 'RUNNING')
            await interrupted_within(1, k, ENDLESS, after=1)
            assert (await run(k, 'cat(count(sql("select 1")))')).text=='1'
            await k.km.shutdown_kernel()
            cluster.wait_state(k.id, 'FINISHED')
