"""Python kernels with Spark, as users get them: a kernelspec written by `jupyter ssh-spec install`, started by
spark-submit on a host over SSH, and seen computing on a cluster of tests/spark.py or on the host itself. (R and Scala
with Spark: test_spark_r.py, test_spark_scala.py.)"""
import pytest
from gateway_provisioners_ssh.errors import LaunchError
from installed import install, interrupted, interrupted_within, remote_kernel, run
from pace import Timer

LEFT = [r'kernel-.*\.log', r'/\.ipython/']   # what kernels leave on a host: their logs, and IPython's profile
NAMES = 'spark', 'sc', 'sql', 'sqlContext', 'sqlCtx'
DEFINED = f'print(*[o for o in {NAMES} if o in globals()])'
# which imports nothing
ACTIVE = ('import sys; print(getattr(getattr(sys.modules.get("pyspark"), "SparkContext", None), '
          '"_active_spark_context", None))')
# a Spark job that keeps every core, in Python
SLEEPERS = 'import time; sc.parallelize(range(4), 4).foreach(lambda _: time.sleep(1000))'
# one of some years, in the JVM
ENDLESS = 'spark.range(0, 10**15, 1, 2).filter("id % 7 = 0").count()'
WHERE = '''
import os, psutil
def executor(_):
    words = [a for p in psutil.Process().parents() for a in p.cmdline()]
    return os.environ.get('GP_TEST_HOST'), any('CoarseGrainedExecutorBackend' in a for a in words)
print(set(sc.parallelize(range(4), 4).map(executor).collect()), os.environ['GP_TEST_HOST'])'''

async def said(k, code):
    "What a cell prints, without the white space around it; its error is the test's."
    got = await run(k, code)
    assert got.status=='ok', got.error
    return got.text.strip()

def spark_spec(prefix, master, home, *options):
    "Install a Python kernelspec for this master; its name and kernel.json."
    return install(prefix, '--language', 'Python', '--spark', '--spark-master', master, '--spark-home', home, *options)

# Clusters
# --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['spark_standalone', 'yarn'])
async def test_cluster(kind, request, hosts, tmp_path):
    cluster = request.getfixturevalue(kind)
    name, spec = spark_spec(tmp_path, cluster.master, cluster.spark_home)
    assert name=='ssh_python_spark' and f'--master {cluster.master} ' in spec['env']['SPARK_OPTS']
    assert ('--deploy-mode client' in spec['env']['SPARK_OPTS'])==(kind=='yarn')
    with hosts.nothing_left(timeout=20, ignore=LEFT):
        async with remote_kernel(tmp_path, name, hosts.names[:1]) as k:
            assert ((await said(k, ACTIVE))=='None'
                    and cluster.applications(k.id)==[]), 'lazy: the first reply comes before the context'
            assert (await said(k, DEFINED)).split()==[*NAMES]
            assert (await said(k, 'print(sc.master, spark.range(1000).filter("id % 7 = 0").count())')
                    ==f'{cluster.master} 143'), 'first use waits'
            assert (await said(k, WHERE)
                    ==f'{{(None, True)}} {hosts.names[0]}'), 'executors do the work, not the host of the kernel'
            assert (await said(k,
                               'print(sql("select 1").count(), sqlContext.sql("select 2").count(), sqlCtx is '
                               'sqlContext, type(sc).__name__)'))=='1 1 True SparkContext'
            cluster.wait_state(k.id, 'RUNNING')
            for code in (SLEEPERS, ENDLESS, 'while True: pass'):
                got = await interrupted_within(3, k, code, after=1.5)
                assert 'KeyboardInterrupt' in got.error, (code, got.error)
                assert (await said(k,
                                   'print(len(sc.statusTracker().getActiveJobsIds()), sc.parallelize(range(10), '
                                   '2).sum())'))=='0 45', 'the context is free'
            if kind=='spark_standalone':
                await k.km.restart_kernel()
                await k.client.wait_for_ready(timeout=30)
                cluster.wait_state(k.id, 'FINISHED')
                assert (await said(k, 'print("executor" in globals(), sc.parallelize(range(10), 2).sum())'))=='False 45'
                cluster.wait_state(k.id, 'RUNNING')
            await k.km.shutdown_kernel()
            assert not hosts.kernels(k.id)
            ended = cluster.wait_state(k.id, 'FINISHED')
            assert ended.get('finalStatus', 'SUCCEEDED')=='SUCCEEDED'

async def test_interrupt_while_planning(hosts, tmp_path, spark_standalone):
    "The job of a query that was interrupted before it had one does not begin afterwards, and keep the executors."
    name, _ = spark_spec(tmp_path, spark_standalone.master, spark_standalone.spark_home)
    async with remote_kernel(tmp_path, name, hosts.names[:1]) as k:
        await said(k, '''def query(rows):
    return sql(" union all ".join([f"select id from range(0, {rows}, 1, 1) where id % 7 = 0"]*100))
endless, short = query(10**15), query(1)''')
        for cell in ('endless.count()', '%time endless.count()'):   # %time swallows what its statement raises
            got = await interrupted(k, cell, after=.3)                # planned for some seconds, each time anew
            assert 'KeyboardInterrupt' in got.error + got.text, got
            # planned as long, so that the other would have its job first
            assert (await said(k, 'print(short.count())'))=='100'
        before = await said(k, 'sc.setLocalProperty("note", "mine"); print(sc.getLocalProperty("note"))')
        assert 'KeyboardInterrupt' in (await interrupted(k, 'endless.count()', after=.3)).error
        # what belongs to the connection to the JVM is still there
        assert (await said(k, 'print(sc.getLocalProperty("note"))'))==before=='mine'

async def test_wrong_master(hosts, tmp_path, spark_standalone):
    """A master that there is not: an error in the cell where the context is lazy, of the launch where it is eager, and
    soon."""
    masters = {'lazy': ('spark://no_such_host:7077', 'no Spark master answers at no_such_host:7077: '),
               'eager': ('spark://127.0.0.1:1', 'no Spark master answers at 127.0.0.1:1: Connection refused')}
    for mode, (master, _) in masters.items():
        spark_spec(tmp_path, master, spark_standalone.spark_home, '--spark-init-mode', mode, '--kernel-name', mode)
    t = Timer()
    with hosts.nothing_left(timeout=20, ignore=LEFT):
        async with remote_kernel(tmp_path, 'lazy', hosts.names[:1]) as k:
            for code in ('sc.parallelize([1])', 'spark.range(3)', 'sql("select 1")'):
                got = await run(k, code)
                assert got.status=='error' and 'Spark could not be started: '+masters['lazy'][1] in got.error, got.error
            assert (await said(k,
                               'sc = 3; print(sc + 1)'))=='4', 'the kernel lives, and the names are the user\'s to take'
        with pytest.raises(LaunchError) as e:
            async with remote_kernel(tmp_path, 'eager', hosts.names[:1]): pass
        assert ('Spark could not be started: '+masters['eager'][1] in str(e.value)
                and hosts.names[0] in str(e.value)), e.value
    assert t < 45, 'Spark itself tries for a minute'

# The host itself
# -------------------------------------------------------------------------------------------------------

HOSTILE = {'words': 'two  words', 'both': '''it's "quoted"''',
           'run': '$(touch {0}/a) `touch {0}/b`; touch {0}/c & ${{HOME}} * \\', 'umlaut': 'grüezi'}

async def test_eager_and_hostile_options(hosts, tmp_path, spark_standalone):
    name, spec = spark_spec(tmp_path, 'local[*]', spark_standalone.spark_home, '--spark-init-mode', 'eager',
                            '--extra-spark-opts', '--conf "spark.test.spec=of the spec"')
    assert '--deploy-mode' not in spec['env']['SPARK_OPTS']
    (bait := tmp_path/'bait').mkdir()
    values = {k: v.format(bait) for k,v in HOSTILE.items()}
    quoted = ("'--conf' spark.test.last=a\\ b "
              + ' '.join('--conf "spark.test.{}={}"'.format(k, ''.join('\\'*(c in '\\"$`') + c for c in v))
                         for k,v in values.items()))
    async with remote_kernel(tmp_path, name, hosts.names[:1], KERNEL_EXTRA_SPARK_OPTS=quoted) as k:
        assert (await said(k, ACTIVE)).startswith(
            '<SparkContext master=local[*]'), 'eager: the context is there with the first reply'
        assert (await said(k, 'print(*(type(o).__name__ for o in (spark, sc, sql, sqlContext, sqlCtx)))')
                =='SparkSession SparkContext method SQLContext SQLContext')
        got = await said(k, f'for o in {["spec", "last", *values]}: print(sc.getConf().get("spark.test." + o))')
        assert got.splitlines()==['of the spec', 'a b', *values.values()]
        assert (await said(k, 'import os; print(sc.appName, sc.master, os.environ["KERNEL_EXTRA_SPARK_OPTS"])')
                ==f'{k.id} local[*] {quoted}')
        assert not any(bait.iterdir()), 'nothing was executed'
        assert (await said(k, WHERE))==f'{{({hosts.names[0]!r}, False)}} {hosts.names[0]}', 'the host does the work'
        await interrupted_within(3, k, SLEEPERS, after=1.5)
        assert (await said(k, 'print(sc.parallelize(range(10), 2).sum())'))=='45'

async def test_no_context(hosts, tmp_path, spark_standalone):
    name, _ = spark_spec(tmp_path, 'local[2]', spark_standalone.spark_home, '--spark-init-mode', 'none')
    async with remote_kernel(tmp_path, name, hosts.names[:1]) as k:
        assert (await said(k, DEFINED))==''
        assert (await said(k, ACTIVE))=='None', 'and none is made'
        await run(k,
                  'from pyspark.sql import SparkSession; spark = SparkSession.builder.getOrCreate(); sc = '
                  'spark.sparkContext')
        await interrupted_within(3, k, ENDLESS, after=1.5)   # a context of the user's own is like ours
        assert (await said(k, 'print(sc.master, len(sc.statusTracker().getActiveJobsIds()))'))=='local[2] 0'

# What cannot be launched
# -----------------------------------------------------------------------------------------------

async def test_refused_at_once(hosts, tmp_path, spark_standalone):
    spark_spec(tmp_path, 'local[*]', '/no spark/here', '--kernel-name', 'nowhere')
    spark_spec(tmp_path, 'local[*]', spark_standalone.spark_home, '--kernel-name', 'here')
    spark_spec(tmp_path, 'yarn', spark_standalone.spark_home, '--kernel-name', 'no_yarn')
    cases = [
        ('nowhere', {}, '/no spark/here/bin/spark-submit is not there; install Spark, or correct SPARK_HOME'),
        ('here', dict(KERNEL_EXTRA_SPARK_OPTS='--conf "spark.test=open'),
         'run.sh: SPARK_OPTS: a double quote is not closed'),
        ('no_yarn', {}, 'HADOOP_CONF_DIR or YARN_CONF_DIR must be set')]
    with hosts.nothing_left(timeout=20, ignore=LEFT):
        for name, env, why in cases:
            t = Timer()
            with pytest.raises(LaunchError) as e:
                async with remote_kernel(tmp_path, name, hosts.names[:1], **env): pass
            assert why in str(e.value) and hosts.names[0] in str(e.value), e.value
            assert t < 15, name
