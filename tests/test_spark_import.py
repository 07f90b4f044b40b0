"""Kernelspecs of Enterprise Gateway for YARN in client mode, imported, on a real YARN. (The import itself:
test_import.py.)"""
import sys
import pytest
from installed import remote_kernel, run
from test_import import FOUR, bench
from test_spark_r import sparkr_home

SUMS = dict(
    spark_python_yarn_client='import os; print(sc.parallelize(range(1000), 2).filter(lambda o: o % 7 == 0).count(), '
                             'sc.master, os.environ["GP_TEST_HOST"])',
    spark_scala_yarn_client='println(Seq(sc.parallelize(0 to 999, 2).filter(_ % 7 == 0).count, sc.master, '
                            'sys.env("GP_TEST_HOST")).mkString(" "))',
    spark_R_yarn_client='cat(count(sql("select id from range(1000) where id % 7 = 0")), sparkR.callJMethod(sc, '
                        '"master"), Sys.getenv("GP_TEST_HOST"))')

@pytest.mark.parametrize('name', SUMS)
async def test_the_yarn_client_kernelspecs_run(bench, hosts, yarn, name):
    "On a real YARN; the hosts' Spark and interpreters are in other places than the gateway's were"
    home = sparkr_home(yarn) if 'R' in name else yarn.spark_home
    k = bench.take(bench.old(name, FOUR[name]), '--spark-home', home, '--python', sys.executable, '--remote-hosts',
                   hosts.names[0])
    async with remote_kernel(bench.prefix, name, hosts.names[:1], timeout=90,
                             KERNEL_EXTRA_SPARK_OPTS='--conf spark.sparkr.r.command=Rscript') as k:
        got = await run(k, SUMS[name], timeout=90)
        assert got.text.strip().splitlines()[-1] == f'143 yarn {hosts.names[0]}', got.error
        yarn.wait_state(k.id, 'RUNNING')
        await k.km.shutdown_kernel()
        yarn.wait_state(k.id, 'FINISHED')
