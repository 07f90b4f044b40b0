"Scala kernels on a cluster, over SSH, from kernelspecs that were installed. (What needs no cluster: test_scala.py.)"
import pytest
from hosts import NetLab
from installed import install, interrupted_within, remote_kernel, run
from pace import until
from test_scala import ENDLESS, needed

@pytest.mark.parametrize('kind', ['spark_standalone', 'yarn'])
async def test_spark_over_ssh(kind, request, tmp_path):
    """Standalone from hosts with addresses of their own, where that can be had (root), so that nothing works by being
    on loopback."""
    hosts = request.getfixturevalue('net' if kind=='spark_standalone' and not NetLab.missing() else 'hosts')
    cluster = request.getfixturevalue(kind)
    name, spec = install(tmp_path, '--language', 'Scala', '--spark', '--spark-master', cluster.master, '--spark-home',
                         cluster.spark_home)
    assert ('--deploy-mode client' in spec['env']['__TOREE_SPARK_OPTS__'])==(kind=='yarn')
    with hosts.nothing_left(timeout=20, ignore=[r'kernel-.*\.log']):
        async with remote_kernel(tmp_path, name, hosts.names[:1]) as k:
            got = await run(k,
                            'println(spark.range(1000).filter("id % 7 = 0").count, sc.master, sys.env("GP_TEST_HOST"))')
            assert got.text.strip()==f'(143,{cluster.master},{hosts.names[0]})', got.error
            where = ('println(sc.parallelize(1 to 2, 2).map(_ => '
                     'java.lang.ProcessHandle.current.pid).collect.contains(java.lang.ProcessHandle.current.pid))')
            assert (await run(k, where)).text.strip()=='false', 'executors do the work'
            cluster.wait_state(k.id, 'RUNNING')
            for code in (ENDLESS, 'while (true) {}'): await interrupted_within(1.5, k, code, after=1.5)
            assert (await run(k, 'println(sc.parallelize(1 to 10, 2).sum)')).text.strip()=='55.0'
            before = k.km.get_connection_info()
            await k.km.restart_kernel()
            await k.client.wait_for_ready(timeout=60)
            assert k.km.get_connection_info()==before
            assert (await run(k, 'println(sc.parallelize(1 to 10, 2).sum)')).text.strip()=='55.0'
            await k.km.shutdown_kernel()
            assert not hosts.kernels(k.id)
            await until(lambda: [a['state'] for a in cluster.applications(k.id)]==['FINISHED']*2, 20,
                        'both applications finished')
