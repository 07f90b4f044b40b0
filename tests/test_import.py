"""`jupyter ssh-spec import`: kernelspecs of Enterprise Gateway and Gateway Provisioners, with the kernel.json of those
projects, become ones for SSH hosts; each change is logged, and nothing else changes."""
import contextlib, json, os, re, shutil, subprocess
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from gateway_provisioners_ssh.spec_import import ImportedSpec, read_kernel
from gateway_provisioners_ssh.specs import PACKAGE
from forks import ssh_spec
from kernels import BIN, interrupt
from pace import within
from installed import remote_kernel, run

PROXY = 'enterprise_gateway.services.processproxies.{}ProcessProxy'
PLACE = '/usr/local/share/jupyter/kernels'   # where both projects' documents install to
HDP = '/usr/hdp/current/spark2-client'
NAMES = '--name ${KERNEL_ID:-ERROR__NO__KERNEL_ID}'

def arguments(*more, prefix='--RemoteProcessProxy.', public_key=True):
    "The words behind the launcher, in the order of Enterprise Gateway's kernelspecs"
    words = dict(kernel_id='{kernel_id}', response_address='{response_address}') | (dict(public_key='{public_key}')
        if public_key else {}) | dict(port_range='{port_range}')
    return [o for k, v in words.items() for o in (prefix + k.replace('_', '-'), v)] + [*more]

def mode(how, prefix='--RemoteProcessProxy.'): return [f'{prefix}spark-context-initialization-mode', how]

def gateway(name, display, language, argv, env=None, config=None, proxy='distributed.Distributed', **metadata):
    "A kernel.json of Enterprise Gateway 3"
    stanza = dict(class_name=PROXY.format(proxy)) | (dict(config=config) if config else {})
    return dict(display_name=display, language=language, metadata=dict(process_proxy=stanza, **metadata),
        **(dict(env=env) if env else {}),
                argv=[o.replace('<dir>', f'{PLACE}/{name}') for o in argv])

PYTHON = gateway('python_distributed', 'Python 3 (distributed)', 'python',
    ['python', '<dir>/scripts/launch_ipykernel.py', *arguments(*mode('none'))], debugger=True)
SPARK_PYTHON = gateway('spark_python_yarn_client', 'Spark - Python (YARN Client Mode)', 'python',
    ['<dir>/bin/run.sh', *arguments(*mode('lazy'))], debugger=True, env=dict(
    SPARK_HOME=HDP, PYSPARK_PYTHON='/opt/conda/bin/python',
    PYTHONPATH=f'${{HOME}}/.local/lib/python3.7/site-packages:{HDP}/python:{HDP}/python/lib/py4j-0.10.6-src.zip',
    SPARK_YARN_USER_ENV=f'PYTHONUSERBASE=/home/yarn/.local,'
    f'PYTHONPATH=${{HOME}}/.local/lib/python3.7/site-packages:{HDP}/python,PATH=/opt/conda/bin:$PATH',
    SPARK_OPTS=f'--master yarn --deploy-mode client {NAMES} --conf spark.yarn.submit.waitAppCompletion=false '
    f'${{KERNEL_EXTRA_SPARK_OPTS}}', LAUNCH_OPTS=''))
SPARK_R = gateway('spark_R_yarn_client', 'Spark - R (YARN Client Mode)', 'R',
    ['<dir>/bin/run.sh', *arguments(*mode('lazy'))], env=dict(
    SPARK_HOME=HDP, SPARK_OPTS=f'--master yarn --deploy-mode client {NAMES} --conf '
    f'spark.sparkr.r.command=/opt/conda/lib/R/bin/Rscript ${{KERNEL_EXTRA_SPARK_OPTS}}', LAUNCH_OPTS=''))
SPARK_SCALA = gateway('spark_scala_yarn_client', 'Spark - Scala (YARN Client Mode)', 'scala',
    ['<dir>/bin/run.sh', *arguments(*mode('lazy'))], env={
    'SPARK_HOME': HDP, '__TOREE_SPARK_OPTS__': f'--master yarn --deploy-mode client {NAMES} '
    f'${{KERNEL_EXTRA_SPARK_OPTS}}',
    '__TOREE_OPTS__': '--alternate-sigint USR2', 'LAUNCH_OPTS': '', 'DEFAULT_INTERPRETER': 'Scala'})
FILES = {'python_distributed': ['scripts/launch_ipykernel.py', 'scripts/server_listener.py'],
    'spark_python_yarn_client': ['bin/run.sh', 'scripts/launch_ipykernel.py', 'scripts/server_listener.py'],
    'spark_R_yarn_client': ['bin/run.sh', 'scripts/launch_IRkernel.R', 'scripts/server_listener.py'],
    'spark_scala_yarn_client': ['bin/run.sh', 'lib/toree-launcher_2.11.jar', 'lib/toree-assembly-0.3.0.jar']}
FOUR = dict(python_distributed=PYTHON, spark_python_yarn_client=SPARK_PYTHON, spark_R_yarn_client=SPARK_R,
    spark_scala_yarn_client=SPARK_SCALA)

class Bench:
    "A directory with the old kernelspecs, and the command"
    def __init__(self, tmp):
        self.tmp, self.prefix, self.kernels = tmp, tmp/'prefix', tmp/'prefix/share/jupyter/kernels'
        drop = ('GP_', 'EG_', 'KERNEL_', 'SPARK')
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | dict(
            PATH=f'{BIN}:{os.environ["PATH"]}')

    def old(self, name, kernel, files=()):
        d = self.tmp/'old'/name
        for o in [*files, *FILES.get(name, ()), 'logo-64x64.png']:
            (d/o).parent.mkdir(parents=True, exist_ok=True)
            (d/o).write_text(f'{o} of the gateway')
        (d/'kernel.json').write_text(kernel if isinstance(kernel, str) else json.dumps(kernel))
        return d

    def take(self, d, *options, ok=True):
        "Import the kernelspec in `d`; kernel.json"
        got = ssh_spec('import', d, '--prefix', self.prefix, *options, env=self.env)
        self.said = got.stderr + got.stdout
        assert (got.returncode == 0) == ok and 'Traceback' not in self.said, self.said
        if ok: return json.loads((self.where()/'kernel.json').read_text())

    def where(self): return Path(re.search(r'Installed kernelspec \S+ in (.*)', self.said)[1])

@pytest.fixture
def bench(tmp_path): return Bench(tmp_path)

files = lambda d: {str(o.relative_to(d)) for o in d.rglob('*') if o.is_file()}
config = lambda k: k['metadata']['kernel_provisioner']['config']

# What is written

@pytest.mark.parametrize('name', FOUR)
def test_the_four_of_enterprise_gateway(bench, name):
    old = FOUR[name]
    d = bench.old(name, old, ['kernel.js'])
    before = {o: (d/o).read_bytes() for o in files(d)}
    k = bench.take(d)
    new = bench.kernels/name.lower()   # as Jupyter looks it up
    assert new == bench.where() and (k['display_name'], k['language']) == (old['display_name'], old['language'])
    assert k['argv'] == [o.replace(f'{PLACE}/{name}', str(new))
        for o in old['argv']], 'arguments as they are, and the launcher where it is now'
    assert k.get('env', {}) == {n: v.replace('$PATH', '${PATH}') for n, v in old.get('env', {}).items()}
    assert k['metadata'] == {n: v for n, v in old['metadata'].items() if n != 'process_proxy'} | dict(
        kernel_provisioner=dict(provisioner_name='distributed-provisioner', config={}))
    ours = {o: PACKAGE/at for o, at in (('bin/run.sh', 'kernelspecs/spark/bin/run.sh'),
        ('scripts/launch_ipykernel.py', 'launchers/launch_ipykernel.py'),
        ('scripts/server_listener.py', 'launchers/server_listener.py'),
        ('scripts/launch_IRkernel.R', 'kernelspecs/r/launch_IRkernel.R')) if o in FILES[name]}
    for o, source in ours.items(): assert (new/o).read_bytes() == source.read_bytes()
    assert os.access(new/'bin/run.sh', os.X_OK) == ('bin/run.sh' in FILES[name])
    for o in ('kernel.js', 'logo-64x64.png'): assert (new/o).read_text() == f'{o} of the gateway'
    assert not [o for o in files(new) - set(ours) if 'toree' in o
        and 'of the gateway' in (new/o).read_bytes()[:100].decode('latin1')]
    assert {o: (d/o).read_bytes() for o in files(d)} == before, 'the original is left as it is'
    assert 'DistributedProcessProxy became distributed-provisioner' in bench.said \
        and f'argv: {PLACE}/{name}' in bench.said
    assert ('env.SPARK_YARN_USER_ENV' in bench.said) == (name == 'spark_python_yarn_client')

def test_configuration_of_the_stanza(bench):
    conf = dict(remote_hosts='node1, node2', authorized_users=['ada', 'grace'], unauthorized_users='eve',
        port_range='40000..42000', launch_timeout='45', yarn_endpoint='http://rm:8088')
    d = bench.old('python_distributed', gateway('python_distributed', 'P', 'python', PYTHON['argv'], config=conf))
    k = bench.take(d)
    assert config(k) == dict(remote_hosts=['node1', 'node2'], authorized_users=['ada', 'grace'],
        unauthorized_users=['eve'], port_range='40000..42000', launch_timeout=45)
    assert 'config.yarn_endpoint of DistributedProcessProxy was left out' in bench.said and 'ssh node1 ' in bench.said
    k = bench.take(d, '--replace', '--remote-hosts=gpu1', '--authorized-users=bob', '--launch-timeout=5',
        '--port-range=0..0')
    assert config(k) == dict(remote_hosts=['gpu1'], authorized_users=['bob'], unauthorized_users=['eve'],
        port_range='0..0', launch_timeout=5)

def test_names_places_and_no_overwriting(bench):
    d = bench.old('python_distributed', PYTHON)
    k = bench.take(d, '--kernel-name', 'other', '--display-name', 'Other', '--python', '/opt/conda/bin/python')
    assert (bench.where(), k['display_name'], k['argv'][0]) == (bench.kernels/'other', 'Other', '/opt/conda/bin/python')
    (bench.kernels/'other/mine').write_text('x')
    bench.take(d, '--kernel-name', 'other', ok=False)
    assert '--replace' in bench.said and (bench.kernels/'other/mine').exists()
    bench.take(d, '--kernel-name', 'other', '--replace')
    assert not (bench.kernels/'other/mine').exists()
    shutil.copytree(d, bench.kernels/'python_distributed')   # where it is used from: in its own place
    bench.take(bench.kernels/'python_distributed', ok=False)
    k = bench.take(bench.kernels/'python_distributed', '--replace')
    assert k['argv'][1] == f'{bench.kernels}/python_distributed/scripts/launch_ipykernel.py'
    again = bench.take(bench.kernels/'python_distributed', '--replace')
    assert again == k, 'what was imported can be imported'

def test_all_of_a_gateway_as_the_help_has_it(bench):
    "Kernelspecs that do not run on hosts stay as they are, and so does the copy of all of them"
    from gateway_provisioners_ssh.cli import SshSpecImporter
    for name, kernel in FOUR.items(): bench.old(name, kernel)
    bench.old('bash', dict(argv=['bash_kernel', '{connection_file}']), ['logo-32x32.png'])
    bench.old('k8s', gateway('k8s', 'K', 'python', ['python', '<dir>/scripts/launch_kubernetes.py'],
        proxy='k8s.Kubernetes'))
    bench.kernels.parent.mkdir(parents=True)
    (bench.tmp/'old').rename(bench.kernels)
    everything = lambda d: {o: (d/o).read_bytes() for o in files(d)}
    before = everything(bench.kernels)
    loop = next(o for o in SshSpecImporter.examples.split('\n\n') if 'for f in' in o).replace(PLACE,
        str(bench.kernels)).replace('ssh-spec import', f'ssh-spec import --prefix {bench.prefix}')
    got = subprocess.run(['bash', '-ec', loop], env=bench.env | dict(HOME=str(bench.tmp)), capture_output=True,
        text=True, stdin=subprocess.DEVNULL)
    assert got.returncode == 0, got.stderr
    assert everything(bench.tmp/'kernels.old') == before
    now = everything(bench.kernels)
    for name in ('bash', 'k8s'):
        assert {o for o in now if o.startswith(f'{name}/') and now[o] == before[o]} == {o for o in before
            if o.startswith(f'{name}/')}
    for name in FOUR:
        k = read_kernel(bench.kernels/name.lower())
        assert list(k['metadata']['kernel_provisioner'])[0] == 'provisioner_name' \
            and f'{bench.kernels}/{name.lower()}/' in ' '.join(k['argv'])

def test_spark_that_is_elsewhere(bench):
    k = bench.take(bench.old('spark_python_yarn_client', SPARK_PYTHON), '--spark-home', '/opt/spark', '--python',
        '/opt/py/bin/python')
    assert HDP not in json.dumps(k['env']) and k['env']['SPARK_HOME'] == '/opt/spark' \
        and k['env']['PYSPARK_PYTHON'] == '/opt/py/bin/python'
    assert k['env']['PYTHONPATH'].startswith('${HOME}/.local/lib/python3.7/site-packages:/opt/spark/python:')
    assert k['env']['SPARK_OPTS'] == SPARK_PYTHON['env']['SPARK_OPTS'] \
        and 'there is no Spark at /opt/spark' in bench.said

def test_paths_into_the_kernelspec_follow(bench):
    k = PYTHON | dict(env=dict(A=f'{PLACE}/python_distributed/data:/usr/x', B=f'{PLACE}/python_distributed2/x'))
    env = bench.take(bench.old('python_distributed', k))['env']
    assert env == dict(A=f'{bench.kernels}/python_distributed/data:/usr/x', B=f'{PLACE}/python_distributed2/x')

OLD = [('spark_python_yarn_client', SPARK_PYTHON | dict(metadata={},
    process_proxy=SPARK_PYTHON['metadata']['process_proxy'],
            argv=[f'{PLACE}/spark_python_yarn_client/bin/run.sh', '{connection_file}',
            '--RemoteProcessProxy.response-address', '{response_address}', *mode('lazy')])),
       ('spark_scala_yarn_client', SPARK_SCALA | dict(argv=[f'{PLACE}/spark_scala_yarn_client/bin/run.sh',
       '--profile', '{connection_file}', '--RemoteProcessProxy.response-address', '{response_address}']))]

@pytest.mark.parametrize('name, old', OLD, ids=[o for o, _ in OLD])
def test_before_version_3_there_were_connection_files(bench, name, old):
    k = bench.take(bench.old(name, old))
    given = k['argv'][1:]
    assert '{connection_file}' not in given and '--profile' not in given and 'process_proxy' not in k
    assert dict(zip(given[::2], given[1::2])).items() >= dict(zip(*[iter(arguments())]*2)).items() \
        and 'was taken out' in bench.said and 'was added' in bench.said

GP = dict(argv=['python', f'{PLACE}/ssh_python/scripts/launch_ipykernel.py', '--kernel-id', '{kernel_id}',
    '--port-range', '{port_range}', '--response-address', '{response_address}',
        '--public-key', '{public_key}', '--kernel-class-name', 'ipykernel.ipkernel.IPythonKernel'], env={},
        display_name='Python SSH', language='python', interrupt_mode='signal',
    metadata=dict(debugger=True, kernel_provisioner=dict(provisioner_name='distributed-provisioner',
    config=dict(launch_timeout=30))))
GP_STANDALONE = dict(argv=[f'{PLACE}/ssh_python_spark/bin/run.sh', '--kernel-id', '{kernel_id}', '--response-address',
    '{response_address}', '--public-key', '{public_key}'], language='python',
    env=dict(SPARK_HOME='/opt/spark', PYSPARK_PYTHON='/opt/conda/bin/python',
    SPARK_OPTS=f'--master spark://127.0.0.1:7077  {NAMES}', LAUNCH_OPTS=''),
    display_name='Python SSH (with Spark Standalone)',
    metadata=dict(kernel_provisioner=dict(provisioner_name='distributed-provisioner')))

def test_gateway_provisioners(bench):
    k = bench.take(bench.old('ssh_python', GP, FILES['python_distributed']))
    assert k == GP | dict(argv=[o.replace(PLACE, str(bench.kernels)) for o in GP['argv']]) and list(k) == list(GP)
    assert (bench.where()/'scripts/server_listener.py').read_bytes() == (
        PACKAGE/'launchers/server_listener.py').read_bytes()
    k = bench.take(bench.old('ssh_python_spark', GP_STANDALONE, FILES['spark_python_yarn_client']))
    assert k['argv'] == [o.replace(PLACE, str(bench.kernels)) for o in GP_STANDALONE['argv']] + ['--port-range',
        '{port_range}'] and k['env'] == GP_STANDALONE['env']

# What is refused

@pytest.mark.parametrize('kernel, words', [
    (gateway('x', 'X', 'python', ['python', 'a/launch_kubernetes.py'], proxy='k8s.Kubernetes'),
    'KubernetesProcessProxy, not on hosts'), (gateway('x', 'X', 'python', ['b/run.sh'], proxy='yarn.YarnCluster'),
    'YarnClusterProcessProxy'),
    (dict(GP, metadata=dict(kernel_provisioner=dict(provisioner_name='docker-provisioner'))), 'docker-provisioner'),
    (dict(PYTHON, argv=['python', 'launch_other.py', '--x', '{response_address}']), 'nor one of the launchers'),
    ('not json', 'not JSON'), ('[]', 'not hold an object'), ('{"argv": "x"}', 'not a list of words'),
    (dict(PYTHON, env=dict(A=1)), 'env'), (dict(PYTHON, env=[]), None),
    (dict(PYTHON, metadata=dict(process_proxy='x')), 'process_proxy'),
    (gateway('x', 'X', 'python', PYTHON['argv'], config=dict(remote_hosts='a b')), "host 'a b'"),
    (gateway('x', 'X', 'python', PYTHON['argv'], config=dict(remote_hosts=5)), 'not a list'),
    (gateway('x', 'X', 'python', PYTHON['argv'], config=dict(port_range='9..3')), 'greater'),
    (gateway('x', 'X', 'python', PYTHON['argv'], config=dict(launch_timeout='soon')), 'launch_timeout'),
    (dict(SPARK_PYTHON, language='julia'), "'julia' is not one of"), (dict(PYTHON, display_name='a\nb'), 'one line'),
    (dict(PYTHON, display_name=['x']), 'display_name')])
def test_refused(bench, kernel, words):
    bench.take(bench.old('x', kernel), ok=words is None)
    assert words is None or re.search(words, bench.said) and not bench.kernels.exists()

def test_refused_arguments(bench):
    for argv, words in ([], 'which kernelspec'), ([bench.tmp/'none'], 'not a kernelspec'), ([bench.tmp, bench.tmp],
            'repeat the option'), ([bench.tmp, '--spark'], 'no option --spark'):
        got = ssh_spec('import', *argv, env=bench.env)
        assert got.returncode == 1 and words in got.stderr and 'Traceback' not in got.stderr

def test_unknown_options_of_a_launcher_are_pointed_out(bench):
    bench.take(bench.old('python_distributed', dict(PYTHON, argv=PYTHON['argv']
        + ['--RemoteProcessProxy.color', 'red'])))
    assert 'the launcher does not know the option --color' in bench.said

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    | st.sampled_from(['{connection_file}', '{response_address}', 'run.sh', 'launch_ipykernel.py', 'python']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(['argv', 'env', 'metadata', 'process_proxy', 'kernel_provisioner', 'config', 'class_name',
    'provisioner_name', 'remote_hosts',
        'launch_timeout', 'port_range', 'authorized_users', 'language', 'display_name', 'SPARK_HOME']), inner,
        max_size=6), max_leaves=25)

@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(base=st.sampled_from([{}, PYTHON, SPARK_SCALA, GP]), changes=st.dictionaries(
    st.sampled_from(['argv', 'env', 'metadata', 'process_proxy', 'language', 'display_name', 'interrupt_mode']),
    json_values, max_size=3))
def test_whatever_is_in_it(tmp_path_factory, base, changes):
    "Any JSON is imported or refused with a ValueError"
    d = tmp_path_factory.getbasetemp()/'any'
    d.mkdir(exist_ok=True)
    (d/'kernel.json').write_text(json.dumps({**base, **changes}))
    with contextlib.suppress(ValueError):
        json.dumps(ImportedSpec(source=d, kernel=read_kernel(d)).kernel_json('/k/any'))

# They run

async def test_the_distributed_kernelspec_runs(bench, hosts):
    d = bench.old('python_distributed', gateway('python_distributed', 'Python 3 (distributed)', 'python',
        PYTHON['argv'], config=dict(remote_hosts='host3')))
    bench.take(d)
    with hosts.nothing_left(ignore=[r'kernel-.*\.log', r'/\.ipython/', r'/\.cache/']):
        async with remote_kernel(bench.prefix, 'python_distributed', ['host1', 'host2']) as k:
            code = 'import os; print(6*7, os.environ["GP_TEST_HOST"], "spark" in globals())'
            assert (await run(k, code)).text == '42 host3 False\n'
            await within(1, lambda: interrupt(k.km, k.client))
            await k.km.restart_kernel()
            await k.client.wait_for_ready(timeout=60)
            assert (await run(k, 'print(1)')).text == '1\n'
