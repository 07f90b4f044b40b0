"""The clusters of tests/spark.py do what the tests of kernels take for granted: a driver in client mode gets executors,
and its states are seen."""
import os, subprocess
import pytest
from spark import Missing, need

JOB = '''
import os, sys, time
from pyspark import SparkContext
sc = SparkContext()
print('master', sc.master)
print('sum', sc.parallelize(range(1000), 2).map(lambda x: x*x).sum())
print('elsewhere', os.getpid() not in sc.parallelize(range(2), 2).map(lambda _: os.getppid()).collect())
sys.stdout.flush()
while not os.path.exists(sys.argv[1]): time.sleep(.1)
sc.stop()
'''

@pytest.mark.parametrize('kind', ['spark_standalone', 'yarn'])
def test_client_mode(kind, request, tmp_path):
    cluster, name = request.getfixturevalue(kind), f'job {kind}'
    job = tmp_path/'job.py'
    job.write_text(JOB)
    with open(tmp_path/'err', 'w+') as err:
        p = subprocess.Popen([f'{cluster.spark_home}/bin/spark-submit', '--master', cluster.master, '--deploy-mode',
                              'client', '--name', name, str(job), str(tmp_path/'seen')],
                             env={**os.environ, **cluster.env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=err, text=True)
        try:
            got = [p.stdout.readline().strip() for _ in range(3)]
            assert got==[f'master {cluster.master}', 'sum 332833500',
                         'elsewhere True'], (tmp_path/'err').read_text()[-3000:]
            cluster.wait_state(name, 'RUNNING')
            (tmp_path/'seen').touch()
            p.wait(60)
        finally:
            p.kill()
            p.communicate()
    assert p.returncode==0
    ended = cluster.wait_state(name, 'FINISHED')
    assert ended.get('finalStatus', 'SUCCEEDED')=='SUCCEEDED'
    assert cluster.applications('no such job')==[]

def test_missing_is_named():
    with pytest.raises(Missing, match='no-such-command is not on PATH: apt-get install its-package'):
        need('no-such-command', 'its-package')
