"`jupyter ssh-spec install` as users run it: what each option writes, what is refused, what a failure leaves behind."
import getpass, json, os, pwd, re, shlex, shutil, signal, stat, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from jupyter_client.kernelspec import KernelSpecManager
from gateway_provisioners_ssh import cli, specs
from gateway_provisioners_ssh.specs import PACKAGE, Spec, cluster, place
from gateway_provisioners_ssh.toree import find_spark
from forks import ssh_spec
from hosts import interruptible
from pace import wait

BIN = Path(sys.executable).parent
COMMAND = [str(BIN/'jupyter-ssh-spec'), 'install']
IDS = ['--kernel-id', '{kernel_id}', '--port-range', '{port_range}', '--response-address', '{response_address}',
    '--public-key', '{public_key}']
SPARK_IDS = ['--kernel-id', '{kernel_id}', '--response-address', '{response_address}', '--public-key', '{public_key}',
    '--port-range', '{port_range}']

class Bench:
    "A prefix of its own, and the command with nothing of the caller's settings"
    def __init__(self, tmp):
        self.tmp, self.prefix, self.kernels = tmp, tmp/'pre fix', tmp/'pre fix/share/jupyter/kernels'
        self.env = {k: v for k,v in os.environ.items() if not k.startswith(
            ('GP_', 'EG_', 'KERNEL_', 'JUPYTER', 'SPARK', 'PYTHON', 'PYSPARK'))}
        self.env |= dict(JUPYTER_DATA_DIR=str(tmp/'data'), JUPYTER_CONFIG_DIR=str(tmp/'config'), HOME=str(tmp),
            PATH=f'{BIN}:{os.environ["PATH"]}')

    def run(self, *argv, command=COMMAND, **env):
        argv = [*command, *map(str, argv)]
        if argv[0] == COMMAND[0]: return ssh_spec(*argv[1:], env=self.env | env)
        return subprocess.run(argv, env=self.env | env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            timeout=300)

    def install(self, *argv, name=None, **env):
        "Install below the prefix; kernel.json"
        r = self.run('--prefix', self.prefix, *argv, **env)
        assert not r.returncode, r.stderr
        self.log, self.out = r.stderr, r.stdout
        if name is None: name, = os.listdir(self.kernels)
        self.dir = self.kernels/name
        return json.loads((self.dir/'kernel.json').read_text())

    def refuse(self, *argv, match, **env):
        "A message, status 1, no traceback, nothing written"
        r = self.run('--prefix', self.prefix, *argv, **env)
        assert r.returncode==1, (r.returncode, r.stderr)
        assert 'Traceback' not in r.stderr and re.search(match, r.stderr), r.stderr
        assert not self.prefix.exists()

@pytest.fixture
def bench(tmp_path): return Bench(tmp_path)

config = lambda k: k['metadata']['kernel_provisioner']['config']
tree = lambda d: sorted(str(o.relative_to(d)) for o in d.rglob('*') if o.is_file())

# --- what is written

def test_python_is_the_documented_kernelspec_to_the_key(bench):
    k = bench.install()
    d = bench.kernels/'ssh_python'
    assert k == {'argv': ['python', f'{d}/scripts/launch_ipykernel.py', *IDS, '--kernel-class-name',
        'ipykernel.ipkernel.IPythonKernel'],
        'env': {}, 'display_name': 'Python SSH', 'language': 'python', 'interrupt_mode': 'signal',
        'metadata': {'debugger': True, 'supported_encryption': ['curve'],
        'kernel_provisioner': {'provisioner_name': 'distributed-provisioner',
            'config': {'launch_timeout': 30, 'tunneling_enabled': 'auto'}}}}
    assert list(k) == ['argv', 'env', 'display_name', 'language', 'interrupt_mode', 'metadata']
    assert tree(d) == ['kernel.json', 'logo-32x32.png', 'logo-64x64.png', 'scripts/ipykernel_app.py',
        'scripts/launch_ipykernel.py', 'scripts/server_listener.py', 'scripts/standby.py']
    for o in ('launch_ipykernel.py', 'ipykernel_app.py', 'server_listener.py'):
        assert (d/'scripts'/o).read_bytes() == (PACKAGE/'launchers'/o).read_bytes()
    lines = bench.log.splitlines()
    assert len(lines) == 2
    stamp = r'\[I \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} SshSpecInstaller\] '
    assert re.fullmatch(stamp+"Installing kernel specification for 'Python SSH'", lines[0])
    assert re.fullmatch(stamp+re.escape(f'Installed kernelspec ssh_python in {d}'), lines[1])
    assert 'jupyter console --kernel ssh_python' in bench.out

def test_jupyter_finds_command_and_kernelspec(bench):
    r = bench.run('--prefix', bench.prefix, command=[str(BIN/'jupyter'), 'ssh-spec', 'install'])
    assert not r.returncode, r.stderr
    spec = KernelSpecManager(kernel_dirs=[str(bench.kernels)]).get_kernel_spec('ssh_python')
    assert (spec.display_name, spec.interrupt_mode, spec.metadata['debugger']) == ('Python SSH', 'signal', True)

def test_python_with_spark(bench):
    k = bench.install('--spark', '--spark-home', '/usr/spark', '--python', '/opt/conda/bin/python')
    d = bench.kernels/'ssh_python_spark'
    assert k['argv'] == [f'{d}/bin/run.sh', *SPARK_IDS, '--spark-context-initialization-mode', 'lazy',
        '--kernel-class-name', 'ipykernel.ipkernel.IPythonKernel']
    assert list(k['env'].items()) == [('SPARK_HOME', '/usr/spark'), ('PYSPARK_PYTHON', '/opt/conda/bin/python'),
        ('PYTHONPATH', '${HOME}/.local/lib/python%d.%d/site-packages:/usr/spark/python' % sys.version_info[:2]),
        ('SPARK_OPTS', '--master yarn --deploy-mode client --name ${KERNEL_ID:-ERROR__NO__KERNEL_ID} '
        '${KERNEL_EXTRA_SPARK_OPTS}'), ('LAUNCH_OPTS', '')]
    assert (k['display_name'], k['language'], k['metadata']['debugger']) == ('Python SSH (with Spark)', 'python', True)
    assert tree(d) == ['bin/run.sh', 'kernel.json', 'logo-32x32.png', 'logo-64x64.png', 'scripts/ipykernel_app.py',
        'scripts/launch_ipykernel.py', 'scripts/server_listener.py', 'scripts/standby.py']
    assert stat.S_IMODE((d/'bin/run.sh').stat().st_mode) == 0o755
    assert 'no Spark at /usr/spark' in bench.log and "'/opt/conda/bin/python' does not run" in bench.log \
        and '--python' not in bench.log

@pytest.mark.parametrize('lang', ['R', 'r'])
def test_r(bench, lang):
    k = bench.install('--language', lang)
    d = bench.kernels/'ssh_r'
    assert (k['argv'], k['env'], k['display_name'], k['language']) == (
        ['Rscript', f'{d}/scripts/launch_IRkernel.R', *IDS], {}, 'R SSH', 'R')
    assert tree(d) == ['kernel.json', 'logo-32x32.png', 'logo-64x64.png', 'scripts/launch_IRkernel.R',
        'scripts/server_listener.py']

def test_r_with_spark_and_an_interpreter_beside_it(bench):
    k = bench.install('--language=R', '--spark', '--spark-master', 'spark://192.168.2.5:7077',
        '--spark-home=/usr/local/spark', '--python=/usr/bin/python3')
    d = bench.kernels/'ssh_r_spark'
    assert k['argv'] == [f'{d}/bin/run.sh', *SPARK_IDS, '--spark-context-initialization-mode', 'lazy']
    assert k['env'] == {'SPARK_HOME': '/usr/local/spark',
        'SPARK_OPTS': '--master spark://192.168.2.5:7077 --name ${KERNEL_ID:-ERROR__NO__KERNEL_ID} '
        '${KERNEL_EXTRA_SPARK_OPTS}',
        'LAUNCH_OPTS': '', 'PYSPARK_PYTHON': '/usr/bin/python3'}
    assert {'bin/run.sh', 'scripts/launch_IRkernel.R'} <= set(tree(d)) and k['display_name'] == 'R SSH (with Spark)'

def test_scala_without_what_it_needs(bench):
    k = bench.install('--language', 'SCALA', '--spark-home', '/usr/spark')
    d = bench.kernels/'ssh_scala'
    assert (k['argv'], k['display_name'], k['language']) == ([f'{d}/bin/run.sh', *SPARK_IDS], 'Scala SSH', 'scala')
    assert k['env'] == {'SPARK_HOME': '/usr/spark',
        '__TOREE_SPARK_OPTS__': '--name ${KERNEL_ID:-ERROR__NO__KERNEL_ID} ${KERNEL_EXTRA_SPARK_OPTS}',
        '__TOREE_OPTS__': '--alternate-sigint USR2', 'LAUNCH_OPTS': '', 'DEFAULT_INTERPRETER': 'Scala'}
    assert {'bin/run.sh', 'kernel.json', 'logo-64x64.png'} <= set(tree(d)) and (d/'lib').is_dir()
    assert 'no Spark at /usr/spark' in bench.log and 'not compiled' in bench.log \
        and 'supported_encryption' not in k['metadata']

def test_scala_compiles_for_the_spark_it_finds(bench):
    pyspark = pytest.importorskip('pyspark')
    if not specs.toree_jars() or not shutil.which('java'): pytest.skip('needs apache-toree and a JVM')
    home = pyspark.__path__[0]
    k = bench.install('--language', 'Scala', '--spark', '--spark_init_mode', 'eager', '--spark-home', home)
    d = bench.kernels/'ssh_scala_spark'
    lib = {o.name for o in (d/'lib').iterdir()}
    assert f'toree-launcher_{find_spark(home).scala}.jar' in lib \
        and any(re.fullmatch(r'toree-assembly-\d.*\.jar', o) for o in lib) and len(lib)==2
    assert k['argv'][-2:] == ['--spark-context-initialization-mode', 'eager'] \
        and '--master yarn --deploy-mode client' in k['env']['__TOREE_SPARK_OPTS__']
    assert len(bench.log.splitlines()) == 3

# --- each option's effect

def test_names(bench):
    k = bench.install('--kernel-name', 'GPU-1.x', '--display-name', 'Python on "GPU" é')
    assert os.listdir(bench.kernels) == ['gpu-1.x'] and k['display_name'] == 'Python on "GPU" é'

@pytest.mark.parametrize('argv', [['--remote-hosts', 'gpu1', '--remote-hosts', 'alice@gpu2:2222'],
    ['--remote-hosts=gpu1,alice@gpu2:2222'], ['--remote_hosts', 'gpu1',
    '--SshSpecInstaller.remote_hosts=alice@gpu2:2222']])
def test_remote_hosts(bench, argv):
    assert config(bench.install(*argv)) == {'remote_hosts': ['gpu1', 'alice@gpu2:2222'], 'launch_timeout': 30,
        'tunneling_enabled': 'auto'}
    assert 'ssh gpu1 ' in bench.out and len(bench.out.splitlines()) == 2

@pytest.mark.parametrize('python,venv', [('~/k/bin/python', 'k'), ('$HOME/a b/bin/python3.9', 'a b'),
    ('${HOME}/$(id)/bin/python3', '$(id)'), ('python', 'k'), ('~/bin/python', None), ('/opt/k/bin/python', None)])
def test_the_command_that_brings_ipykernel(bench, python, venv):
    "As printed, run by a shell here and one on the host: it makes a virtual environment in the home, else runs its pip"
    assert bench.install('--python', python, '--remote-hosts', 'alice@gpu2:2222')['argv'][0] == python
    command, _, then = bench.out.splitlines()[0].partition('To install ipykernel: ')[2].partition(', then ')
    assert ('--python' in then) == (python == 'python')
    home = bench.tmp/'there'
    (home/'bin').mkdir(parents=True)
    (home/'bin/python').symlink_to(bench.tmp/'python3')
    for o, text in (('ssh', f'shift 3; HOME={home} exec sh -c "$1"'),
            ('python3', '[ "$2" != venv ] || { mkdir -p "$3/bin" && ln -s "$0" "$3/bin/pip"; }')):
        (bench.tmp/o).write_text(f'#!/bin/sh\nfor a; do printf "%s\\0" "$a" >> {bench.tmp}/{o}.args; done\n{text}\n')
        (bench.tmp/o).chmod(0o755)
    got = subprocess.run(command, shell=True, env={'PATH': f'{bench.tmp}:/usr/bin:/bin'}, capture_output=True,
        text=True)
    args = lambda o: (bench.tmp/f'{o}.args').read_text().split('\0')[:-1]
    assert args('ssh')[:3] == ['-p', '2222', 'alice@gpu2']
    if python.startswith('/'): assert args('ssh')[3] == f'{python} -m pip install ipykernel' and python in got.stderr
    else:
        assert got.returncode == 0 and args('python3') == (['-m', 'venv', f'{home}/{venv}']
            if venv else ['-m', 'pip']) + ['install', 'ipykernel']

@pytest.mark.parametrize('argv', [[], ['--language=R'], ['--from-kernel=python3'], ['--spark']])
@pytest.mark.parametrize('word', ['--python', '--BaseSpecApp.python'])
def test_the_home_of_the_hosts(bench, argv, word):
    "What means their home is not replaced by the one here; where the shell has done that, it is said"
    text = json.dumps(bench.install(*argv, f'{word}=~/k/bin/python', '--kernel-name=k'))
    assert '"~/k/bin/python"' in text and str(bench.tmp)+'/k' not in text and 'k/bin/python' not in bench.log
    bench.install(*argv, f'{word}={bench.tmp}/k/bin/python', '--kernel-name=k', '--replace')
    assert "--python '~/k/bin/python'" in bench.log
    (bench.tmp/'k/bin').mkdir(parents=True)
    (bench.tmp/'k/bin/python').symlink_to(sys.executable)
    bench.install(*argv, f'{word}={bench.tmp}/k/bin/python', '--kernel-name=k', '--replace')
    assert "'~/k/bin/python'" not in bench.log

@pytest.mark.parametrize('there,words', [('console lab execute', 'jupyter console --kernel k'),
    ('lab notebook', "jupyter lab, and choose 'My K'"), ('notebook execute', "jupyter notebook, and choose 'My K'"),
    ('execute', 'jupyter execute --kernel_name=k NOTEBOOK.ipynb'),
    ('', 'pip install jupyter-console && jupyter console --kernel k')])
def test_what_to_try_is_installed(tmp_path, monkeypatch, there, words):
    for o in there.split():
        (tmp_path/f'jupyter-{o}').write_text('')
        (tmp_path/f'jupyter-{o}').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'a b'))
    assert cli.try_it('k', 'My K', tmp_path/'a b/kernels') == words
    monkeypatch.delenv('JUPYTER_PATH')
    assert f"JUPYTER_PATH='{tmp_path}/a b' jupyter " in cli.try_it('k', 'My K', tmp_path/'a b/kernels')

def test_localhost_given_is_written_and_needs_nothing_more(bench):
    assert config(bench.install('--remote-hosts', 'localhost'))['remote_hosts'] == ['localhost']
    assert len(bench.out.splitlines()) == 1

def test_without_hosts_it_is_said_what_any_host_needs(bench):
    assert 'remote_hosts' not in config(bench.install())
    assert bench.out.startswith('Every host needs ipykernel for python. To install ipykernel: ssh HOST ')
    assert config(bench.install('--replace', GP_REMOTE_HOSTS='gpu1')) == {
        'launch_timeout': 30, 'tunneling_enabled': 'auto'}
    assert 'ssh gpu1 ' in bench.out

@pytest.mark.parametrize('argv,words', [(['--language=R'], 'R with IRkernel'),
    (['--language=Scala'], 'Spark at /opt/spark, Java'), (['--from-kernel=python3'], 'the kernel itself')])
def test_what_hosts_need(bench, argv, words):
    bench.install(*argv)
    assert bench.out.splitlines()[0] == f'Every host needs {words}'

def test_users(bench):
    k = bench.install('--authorized-users', 'bob', '--authorized-users', 'alice', '--unauthorized-users', 'eve,mallory')
    assert config(k) == {'authorized_users': ['alice', 'bob'], 'unauthorized_users': ['eve', 'mallory'],
        'launch_timeout': 30, 'tunneling_enabled': 'auto'}

def test_port_range_and_timeout(bench):
    assert config(bench.install('--port-range', '40000..41000', '--launch-timeout', '75')) == {
        'port_range': '40000..41000', 'launch_timeout': 75, 'tunneling_enabled': 'auto'}

def test_port_range_of_none_given_overrides_the_host_application(bench):
    assert config(bench.install('--port-range=0..0'))['port_range'] == '0..0'

def test_interpreter_and_class(bench):
    k = bench.install('--python', sys.executable, '--ipykernel-subclass-name', 'my_kernels.special.MyKernel')
    assert k['argv'][0] == sys.executable and k['argv'][-1] == 'my_kernels.special.MyKernel'

def test_spark_uses_this_interpreter_unless_told(bench):
    assert Path(bench.install('--spark')['env']['PYSPARK_PYTHON']).resolve() == Path(sys.executable).resolve()

@pytest.mark.parametrize('mode', ['lazy', 'eager', 'none', 'EAGER'])
def test_spark_init_mode(bench, mode):
    argv = bench.install('--spark', '--spark-init-mode', mode)['argv']
    assert argv[argv.index('--spark-context-initialization-mode')+1] == mode.lower()

@pytest.mark.parametrize('master,client', [('yarn', True), ('spark://10.0.0.4:7077', False),
    ('spark://a:7077,b:7077', False), ('spark://[::1]:7077', False), ('local[*]', False), ('local[2,3]', False),
    ('local', False)])
def test_spark_master(bench, master, client):
    opts = bench.install('--spark', '--spark-master', master)['env']['SPARK_OPTS']
    name = '--name ${KERNEL_ID:-ERROR__NO__KERNEL_ID} ${KERNEL_EXTRA_SPARK_OPTS}'
    assert opts == f'--master {master} ' + '--deploy-mode client '*client + name

@pytest.mark.parametrize('form', [['--extra-spark-opts', '--conf spark.a="x y" --jars b'],
    ['--extra-spark-opts=--conf spark.a="x y" --jars b'],
    ['--BaseSpecApp.extra_spark_opts=--conf spark.a="x y" --jars b']])
def test_extra_spark_opts(bench, form):
    assert bench.install('--spark', *form)['env']['SPARK_OPTS'].endswith(
        'ERROR__NO__KERNEL_ID} --conf spark.a="x y" --jars b ${KERNEL_EXTRA_SPARK_OPTS}')

def test_spark_home_from_option_and_environment_with_its_py4j(bench):
    home = bench.tmp/'spark'
    (home/'python/lib').mkdir(parents=True); (home/'bin').mkdir()
    (home/'python/lib/py4j-0.10.9.9-src.zip').write_text('')
    (home/'bin/spark-submit').write_text(''); (home/'bin/spark-submit').chmod(0o755)
    for k in (bench.install('--spark', '--spark-home', home), bench.install('--spark', '--replace',
            SPARK_HOME=str(home))):
        assert k['env']['SPARK_HOME'] == str(home) and k['env']['PYTHONPATH'].endswith(
            f'site-packages:{home}/python:{home}/python/lib/py4j-0.10.9.9-src.zip')
        assert 'no Spark' not in bench.log
    assert bench.install('--spark', '--replace')['env']['SPARK_HOME'] == '/opt/spark'

def test_user_goes_to_the_users_directory(bench):
    r = bench.run('--user')
    assert not r.returncode and (bench.tmp/'data/kernels/ssh_python/kernel.json').exists()

def test_sys_prefix_is_this_environment():
    app = cli.SshSpecInstaller()
    app.initialize(['--sys-prefix'])
    assert app.kernels() == Path(sys.prefix)/'share/jupyter/kernels'

def test_system_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, 'SYSTEM_JUPYTER_PATH', [str(tmp_path/'system')])
    app = cli.SshSpecInstaller()
    app.initialize([]); app.start()
    assert (tmp_path/'system/kernels/ssh_python/kernel.json').exists()
    monkeypatch.undo()
    assert cli.SshSpecInstaller().kernels() == Path('/usr/local/share/jupyter/kernels')

def test_relative_prefix_gives_absolute_paths(bench):
    r = subprocess.run([*COMMAND, '--prefix', 'rel'], cwd=bench.tmp, env=bench.env, capture_output=True, text=True)
    assert not r.returncode, r.stderr
    d = bench.tmp/'rel/share/jupyter/kernels/ssh_python'
    assert json.loads((d/'kernel.json').read_text())['argv'][1] == f'{d}/scripts/launch_ipykernel.py'

def test_log_level_and_debug(bench):
    bench.install('--log-level', 'ERROR')
    assert bench.log == ''
    bench.install('--debug', '--replace')
    assert '[D ' in bench.log
    bench.install('--log-level=40', '--replace')
    assert bench.log == ''

def test_configuration_file_under_every_class_name(bench):
    (bench.tmp/'c.py').write_text(
        'c.SshSpecInstaller.remote_hosts = ["h1"]\nc.SshSpecInstaller.spark_master = "local[*]"\nc.BaseSpecApp.spark '
        '= True\nc.BaseSpecApp.kernel_name = "conf"\n'
        'c.BaseSpecSparkApp.spark_home = "/s"\nc.RemoteProvisionerConfigMixin.port_range = "40000..42000"\n'
        'c.RemoteProvisionerConfigMixin.authorized_users = {"ann"}\nc.BaseSpecApp.launch_timeout = 44\n')
    k = bench.install('--config', bench.tmp/'c.py', '--launch-timeout', '45')
    assert bench.dir.name == 'conf' and k['env']['SPARK_HOME'] == '/s' \
        and '--master local[*] --name' in k['env']['SPARK_OPTS']
    assert config(k) == {'remote_hosts': ['h1'], 'authorized_users': ['ann'], 'port_range': '40000..42000',
        'launch_timeout': 45, 'tunneling_enabled': 'auto'}

def test_configuration_file_in_the_usual_place(bench):
    (bench.tmp/'config').mkdir()
    (bench.tmp/'config/jupyter_ssh_spec_config.py').write_text('c.BaseSpecApp.display_name = "Ours"\n')
    assert bench.install()['display_name'] == 'Ours'

@pytest.mark.parametrize('pre', ['GP', 'EG'])
def test_environment_gives_defaults(bench, pre):
    env = {f'{pre}_REMOTE_HOSTS': 'gpu1,gpu2', f'{pre}_PORT_RANGE': '40000..42000', f'{pre}_LAUNCH_TIMEOUT': '99',
        f'{pre}_AUTHORIZED_USERS': 'ann', f'{pre}_UNAUTHORIZED_USERS': 'eve'}
    assert config(bench.install(**env)) == {'port_range': '40000..42000', 'launch_timeout': 99,
        'tunneling_enabled': 'auto'}
    assert 'ssh gpu1 ' in bench.out
    assert config(bench.install('--replace', '--launch-timeout=5', '--port-range=0..0', **env)) == {
        'port_range': '0..0', 'launch_timeout': 5, 'tunneling_enabled': 'auto'}
    app_env = dict(env, GP_LAUNCH_TIMEOUT='7', EG_LAUNCH_TIMEOUT='8')
    assert config(bench.install('--replace', **app_env))['launch_timeout'] == 7

def test_users_of_the_environment_are_the_options_defaults(monkeypatch):
    monkeypatch.setenv('EG_AUTHORIZED_USERS', 'ann, bob'); monkeypatch.setenv('GP_UNAUTHORIZED_USERS', 'eve')
    app = cli.SshSpecInstaller()
    assert (app.authorized_users, app.unauthorized_users) == ({'ann', 'bob'}, {'eve'})

def test_least_size_of_a_port_range_from_the_environment(bench):
    bench.refuse('--port-range', '40000..41500', match='fewer than 2000', EG_MIN_PORT_RANGE_SIZE='2000')
    assert config(bench.install('--port-range', '40000..40100',
        GP_MIN_PORT_RANGE_SIZE='100'))['port_range'] == '40000..40100'

@pytest.mark.parametrize('argv,what', [(['--spark-master', 'local'], '--spark-master'),
    (['--extra-spark-opts=--x'], '--extra-spark-opts'), (['--spark-init-mode', 'none'], '--spark-init-mode'),
    (['--spark-home', '/s'], '--spark-home'),
    (['--language', 'R', '--ipykernel-subclass-name', 'a.B'], '--ipykernel-subclass-name'),
    (['--language', 'Scala', '--python', 'python3'], '--python')])
def test_options_without_effect_are_pointed_out(bench, argv, what):
    bench.install(*argv)
    assert f'{what} has no effect' in bench.log

# --- help

SEED = {'remote-hosts': 'SshSpecInstaller', 'preload': 'SshSpecInstaller', 'spark-master': 'SshSpecInstaller',
    'from-kernel': 'SshSpecInstaller', 'log-level': 'Application', 'config': 'JupyterApp'} | dict.fromkeys(
    ['prefix', 'kernel-name', 'display-name', 'language', 'spark-home', 'spark-init-mode', 'extra-spark-opts',
    'authorized-users', 'unauthorized-users', 'port-range', 'launch-timeout', 'ipykernel-subclass-name', 'python'],
    'BaseSpecApp')
DEFAULTS = {'remote-hosts': "['localhost']", 'from-kernel': "''", 'spark-master': "'yarn'", 'prefix': "''",
    'kernel-name': "''", 'display-name': "''", 'language': "'Python'", 'spark-home': "'/opt/spark'",
    'spark-init-mode': "'lazy'",
    'extra-spark-opts': "''", 'authorized-users': 'set()', 'unauthorized-users': "{'root'}", 'port-range': "'0..0'",
    'launch-timeout': '30', 'ipykernel-subclass-name': "'ipykernel.ipkernel.IPythonKernel'", 'log-level': '30',
    'config': "''"}

def test_help_names_every_option_its_default_and_its_home(bench):
    r = bench.run('--help')
    assert not r.returncode
    blocks = {m[1]: m[0] for m in re.finditer(r'^--([a-z-]+).*\n(?:    .*\n)+', r.stdout, re.M)}
    assert set(blocks) == set(SEED) | {'user', 'sys-prefix', 'spark', 'debug', 'replace', 'tile-per-host'}
    for o,cls in SEED.items():
        assert f'Equivalent to: [--{cls}.{dict(config="config_file").get(o, o.replace("-", "_"))}]' in blocks[o]
    for o,value in DEFAULTS.items(): assert f'Default: {value}\n' in blocks[o]
    for o,text in {'user': 'BaseSpecApp.user=True', 'sys-prefix': f'BaseSpecApp.prefix={sys.prefix}',
            'spark': 'BaseSpecApp.spark=True', 'debug': 'Application.log_level=10',
            'replace': 'BaseSpecApp.replace=True', 'tile-per-host': 'SshSpecInstaller.tile_per_host=True'}.items():
        assert f'Equivalent to: [--{text}]' in blocks[o]
    assert r.stdout.count('jupyter ssh-spec install') >= 5 and 'c.SshSpecInstaller.remote_hosts' in r.stdout

def test_help_all_and_version(bench):
    assert 'BaseSpecApp(RemoteProvisionerConfigMixin, StrictApp) options' in bench.run('--help-all').stdout
    assert bench.run('--version').stdout.strip() == cli.__version__

def test_examples_of_the_help_work(bench):
    text = bench.run('--help', COLUMNS='80').stdout
    lines = re.findall(r'^ +jupyter ssh-spec (install .*)$', re.sub(r'\\\n +', '', text), re.M)
    assert len(lines) >= 5
    for line in lines:
        app = cli.SshSpecInstaller()
        app.initialize(shlex.split(line)[1:])
        assert app.spec() and not app.without_effect()

COMMANDS = ['demo', 'install', 'import', 'check', 'setup', 'ps', 'logs', 'stop', 'drain', 'undrain']

@pytest.mark.parametrize('argv', [[], *([o] for o in COMMANDS)], ids=lambda o: ' '.join(o))
def test_help_fits_a_terminal(bench, argv):
    r = bench.run(*argv, '--help', command=COMMAND[:1], COLUMNS='80')
    assert not r.returncode and 'Examples' in r.stdout and ('exit status' in ' '.join(r.stdout.split()) or not argv)
    assert [o for o in r.stdout.splitlines() if len(o) > 80 and 'Choices' not in o and 'Equivalent' not in o] == []

def test_command_without_subcommand_helps(bench):
    r = bench.run(command=COMMAND[:1])
    assert (r.returncode, r.stderr)==(1, '') and all(o in r.stdout for o in ('install', 'import', 'demo'))

# --- refusals

@pytest.mark.parametrize('argv,match', [(['instal'], "'instal'; did you mean install"),
    (['isntall', '--user'], 'did you mean install'), (['update'], 'there are demo, install, import'),
    (['--user'], "'--user'"), (['--bogus', 'install'], 'there are'),
    (['demo', '--bogus'], 'no option --bogus; --help'), (['demo', '--host', '4'], 'did you mean --hosts'),
    (['demo', '--hosts'], 'needs a value'), (['demo', '--hosts', 'x'], '--hosts expected an int'),
    (['demo', '--hosts', '1'], '--hosts should not be less than 2'),
    (['demo', 'now'], "'now' is not expected"), (['demo', '--SshDemo.host=3'], 'did you mean --SshDemo.hosts'),
    (['import'], 'which kernelspec'), (['import', '/none'], 'no kernel.json in it'),
    (['import', 'a', 'b'], "'b' is not expected"),
    (['import', '--kernel-nam', 'x'], 'did you mean --kernel-name'),
    (['install', '--debugg'], 'did you mean --debug'), (['install', '--SshSpecInstaler.remote_hosts=gpu1'],
    'did you mean --SshSpecInstaller.remote_hosts'), (['install', '--replace=yes'], '--replace takes no value'),
    (['install', '--python', '--user'], '--python needs a value'),
    (['install', '-prefix', 'x'], 'no option -prefix; did you mean --prefix'),
    (['install', '--launch-timeout', 'soon'], '--launch-timeout expected an int'),
    (['install', '--log-level', 'LOUD'], '--log-level expected any of')])
def test_every_subcommand_refuses_in_one_line(bench, argv, match):
    r = bench.run(*argv, command=COMMAND[:1])
    assert (r.returncode, r.stdout)==(1, '')
    assert re.fullmatch(r'\[E \S+ \S+ Ssh\w+\] .*\n', r.stderr) and re.search(match, r.stderr), r.stderr

def test_output_that_cannot_be_written(bench):
    for argv, end in ((['--help'], '>/dev/full'), (['--prefix', bench.prefix], '>/dev/full'),
            (['--prefix', bench.prefix, '--replace'], '| :'), (['--prefix', bench.prefix, '--replace'], '>&-')):
        r = subprocess.run(['bash', '-c', f'"$@" {end}; exit ${{PIPESTATUS[0]}}', 'bash', *COMMAND, *argv],
            env=bench.env, capture_output=True, text=True)
        assert 'Traceback' not in r.stderr and 'Exception' not in r.stderr
        assert ('full' not in end) or r.returncode==1 and r.stderr.endswith('No space left on device\n')

def test_interrupted(bench):
    python = bench.tmp/'slow'
    python.write_text('#!/bin/sh\necho > "$0.runs"; exec sleep 60\n'); python.chmod(0o755)
    p = subprocess.Popen([*COMMAND, '--prefix', str(bench.prefix), '--python', str(python)], env=bench.env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=interruptible)
    wait(Path(f'{python}.runs').exists, 60)
    p.send_signal(signal.SIGINT)
    assert p.communicate(timeout=20)[0]=='' and p.returncode==130 and not bench.prefix.exists()

@pytest.mark.parametrize('argv,match', [
    (['--language', 'Julia'], "'Julia'.*Python, R, Scala"), (['--language', ''], 'language'),
    (['--port-range', '9..3'], 'greater'), (['--port-range', 'abc'], 'low..high'), (['--port-range', ''], 'low..high'),
    (['--port-range', '1..2..3'], 'low..high'), (['--port-range', '-5..9'], 'low..high'),
    (['--port-range', '40000..40999'], 'fewer than 1000'), (['--port-range', '64000..70000'], '65535'),
    (['--port-range', '80..9000'], '1024'),
    (['--remote-hosts', 'a b'], "host 'a b'"), (['--remote-hosts', 'gpu:99999'], '99999'),
    (['--remote-hosts', ''], 'empty'), (['--remote-hosts', 'ok,-bad'], "'-bad'"),
    (['--remote-hosts', 'h;reboot'], 'h;reboot'),
    (['--kernel-name', 'a/b'], 'a/b'), (['--kernel-name', '../up'], 'up'), (['--kernel-name', 'a b'], 'a b'),
    (['--kernel-name', '.hidden'], 'hidden'), (['--display-name', 'a\nb'], 'one line'),
    (['--launch-timeout', '0'], 'above zero'), (['--launch-timeout', '-3'], 'above zero'),
    (['--launch-timeout', 'soon'], 'launch-timeout'), (['--ipykernel-subclass-name', 'Kernel'], 'package.module.Class'),
    (['--ipykernel-subclass-name', 'os; import x.y'], 'package.module.Class'),
    (['--spark', '--spark-init-mode', 'later'], 'later.*lazy, eager, none'),
    (['--spark', '--spark-master', 'yran'], 'yran.*yarn'),
    (['--spark', '--spark-master', 'spark://h'], 'spark://HOST:PORT'),
    (['--spark', '--spark-master', 'yarn --conf x'], 'not one of'),
    (['--spark', '--extra-spark-opts', '--conf "a'], 'quotation'),
    (['--authorized-users', 'a\tb'], 'authorized_users'), (['--user'], 'two places'),
    (['--sys-prefix', '--user'], 'two places'), (['--remote-host', 'h'], '--remote-hosts'),
    (['--nonsense'], '--nonsense'),
    (['word'], "'word'"), (['--remote-hosts', 'a', 'b'], "'b'.*repeat"), (['--kernel-name'], 'needs a value'),
    (['--python', ''], None), (['--spark', '--spark-home', ' '], 'Spark home'),
    (['--log-level', 'LOUD'], 'log-level'), (['-x'], 'no option -x')])
def test_refused(bench, argv, match):
    if match: bench.refuse(*argv, match=match)
    else: assert bench.install(*argv)['argv'][0] == 'python' # empty is the default

@pytest.mark.parametrize('var,value,match', [('GP_LAUNCH_TIMEOUT', 'x', "'x' is not a number"),
    ('EG_LAUNCH_TIMEOUT', '2.5', 'not a number'), ('EG_PORT_RANGE', '9..3', '9..3'),
    ('GP_PORT_RANGE', 'abc', 'low..high'), ('GP_REMOTE_HOSTS', 'a b', "host 'a b'"), ('EG_REMOTE_HOSTS', '', 'empty'),
    ('GP_MIN_PORT_RANGE_SIZE', 'wide', 'not a number')])
def test_wrong_environment_is_refused(bench, var, value, match): bench.refuse(match=f'{var}: .*{match}', **{var: value})

def test_a_wrong_value_is_refused_with_its_place(bench):
    bench.refuse('--port-range', 'abc', match="--port-range: 'abc' is not a port range", GP_PORT_RANGE='def')
    bench.refuse('--BaseSpecApp.port_range=9..3', match='--port-range: 9..3')
    (bench.tmp/'c.py').write_text('c.SshSpecInstaller.remote_hosts = ["gpu:99999"]\n')
    bench.refuse('--config', bench.tmp/'c.py', match=r'c\.SshSpecInstaller\.remote_hosts: .*99999')

def test_missing_configuration_file(bench):
    bench.refuse('--config', '/nonexistent/specs.py', match='no configuration file /nonexistent/specs.py')

@pytest.mark.parametrize('text', ['c.BaseSpecApp.user = ', 'import nonesuch', 'raise ValueError("bad day")'])
def test_broken_configuration_file(bench, text):
    (bench.tmp/'c.py').write_text(text+'\n')
    bench.refuse('--config', bench.tmp/'c.py', match=r'configuration file.*(SyntaxError|ModuleNotFoundError|bad day)')

def test_unknown_trait_is_refused(bench):
    bench.refuse('--SshSpecInstaller.remote_host=x', match='remote_host')
    (bench.tmp/'c.py').write_text('c.BaseSpecApp.lanugage = "R"\n')
    bench.refuse('--config', bench.tmp/'c.py',
        match=r'c\.py: c\.BaseSpecApp\.lanugage is not an option; did you mean language')
    (bench.tmp/'c.py').write_text('c.RemoteProvisionerConfigMixin.port_rang = "0..0"\n')
    bench.refuse('--config', bench.tmp/'c.py', match='did you mean port_range')

def test_a_misspelt_class_is_pointed_out(bench):
    "Others are none of our business: a file serves many applications"
    (bench.tmp/'config').mkdir()
    (bench.tmp/'config/jupyter_config.py').write_text(
        'c.SSHSpecInstaler.remote_hosts = ["gpu1"]\nc.K8sSpecInstaller.tolerations = True\nc.ServerApp.port = 1\n')
    assert 'remote_hosts' not in config(bench.install())
    assert re.findall(r'c\.\w+ has no effect.*', bench.log) == [
        'c.SSHSpecInstaler has no effect; is c.SshSpecInstaller meant?']

def test_broken_configuration_file_in_the_usual_place(bench):
    (bench.tmp/'config').mkdir()
    (bench.tmp/'config/jupyter_config.py').write_text('c.BaseSpecApp.launch_timeout = "soon"\n')
    bench.refuse(match='config/jupyter_config.py: --launch-timeout expected an int')
    (bench.tmp/'config/jupyter_config.py').write_text('1/0\n')
    bench.refuse(match='config/jupyter_config.py: ZeroDivisionError')
    r = bench.run(command=COMMAND[:1])
    assert (r.returncode, r.stderr)==(1, '')

def test_two_places(bench):
    r = bench.run('--user', '--sys-prefix')
    assert r.returncode==1 and 'two places' in r.stderr and not (bench.tmp/'data').exists()

# --- where one cannot write

def no_rights(r):
    assert r.returncode==1 and 'Traceback' not in r.stderr
    line, = [o for o in r.stderr.splitlines() if 'cannot write' in o]
    assert all(o in line for o in ('--user', '--sys-prefix', '--prefix DIR', 'rights'))

def test_prefix_that_is_a_file(bench):
    (bench.tmp/'file').write_text('')
    no_rights(bench.run('--prefix', bench.tmp/'file'))

def test_directory_of_somebody_else(bench):
    theirs = bench.tmp/'theirs'
    theirs.mkdir(mode=0o555)
    become = ('import os, sys; from gateway_provisioners_ssh import cli; os.getuid() or os.seteuid(65534); '
        'cli.main(sys.argv[1:])')
    no_rights(bench.run('install', '--prefix', theirs, command=[sys.executable, '-c', become]))
    assert os.listdir(theirs) == []

# --- replacing

def test_existing_kernelspec_stays_without_replace(bench):
    bench.install('--display-name', 'first')
    before = {o: o.read_bytes() for o in bench.dir.rglob('*') if o.is_file()}
    r = bench.run('--prefix', bench.prefix, '--display-name', 'second')
    assert r.returncode==1 and str(bench.dir) in r.stderr and '--replace' in r.stderr and 'Traceback' not in r.stderr
    assert before == {o: o.read_bytes() for o in bench.dir.rglob('*') if o.is_file()} \
        and os.listdir(bench.kernels) == ['ssh_python']

def test_replace_leaves_nothing_of_the_old_one(bench):
    bench.install('--spark', '--kernel-name', 'k')
    (bench.dir/'stale.txt').write_text('')
    assert bench.install('--kernel-name', 'k', '--replace', '--display-name', 'new')['display_name'] == 'new'
    assert 'stale.txt' not in tree(bench.dir) and not (bench.dir/'bin').exists() and os.listdir(bench.kernels) == ['k']

@pytest.mark.parametrize('when', ['build', 'rename', 'interrupt'])
def test_failed_replace_restores_the_old_one(tmp_path, monkeypatch, when):
    target, _ = Spec(display_name='old').install(tmp_path)
    old = {o: o.read_bytes() for o in target.rglob('*') if o.is_file()}
    rename = os.rename
    def failing(src, dst):
        if Path(dst)==target and Path(src).name!='old': raise OSError(5, 'no luck')
        rename(src, dst)
    def build(new):
        (new/'kernel.json').write_text('{}')
        if when=='build': raise OSError(28, 'No space left on device')
        if when=='interrupt': raise KeyboardInterrupt
    if when=='rename': monkeypatch.setattr(os, 'rename', failing)
    with pytest.raises((OSError, KeyboardInterrupt)): place(build, target, replace=True)
    assert old == {o: o.read_bytes() for o in target.rglob('*') if o.is_file()} \
        and os.listdir(tmp_path) == ['ssh_python']

def test_half_built_kernelspec_is_never_seen(tmp_path):
    seen = []
    def build(new):
        (new/'kernel.json').write_text('{"argv": [], "display_name": "x", "language": "x"}')
        seen.append(KernelSpecManager(kernel_dirs=[str(tmp_path)], ensure_native_kernel=False).find_kernel_specs())
    place(build, tmp_path/'k')
    assert seen == [{}] and set(KernelSpecManager(kernel_dirs=[str(tmp_path)],
        ensure_native_kernel=False).find_kernel_specs()) == {'k'}

def test_modes_do_not_follow_the_umask(bench):
    for mask in (0o077, 0o000):
        shutil.rmtree(bench.prefix, ignore_errors=True)
        r = subprocess.run([*COMMAND, '--prefix', str(bench.prefix), '--spark'], env=bench.env, umask=mask,
            capture_output=True, text=True)
        assert not r.returncode, r.stderr
        d = bench.kernels/'ssh_python_spark'
        assert {stat.S_IMODE(o.stat().st_mode) for o in [d, *d.rglob('*')] if o.is_dir()} == {0o755}
        assert {o.name: stat.S_IMODE(o.stat().st_mode) for o in d.rglob('*') if o.is_file()
            and stat.S_IMODE(o.stat().st_mode)!=0o644} == {'run.sh': 0o755}

# --- what is missing

def test_missing_pieces_name_the_mending_command(bench, monkeypatch):
    empty = bench.tmp/'bin'; empty.mkdir()
    bench.env['PATH'] = str(empty)
    bench.install()
    assert "'python' does not run on this machine" in bench.log and '--python' in bench.log
    bench.install('--language', 'R', name='ssh_r')
    assert 'apt-get install r-base-core r-cran-irkernel' in bench.log
    bench.env.pop('JAVA_HOME', None)
    bench.install('--spark', '--spark-home', '/nowhere', name='ssh_python_spark')
    assert 'pip install "pyspark<4"' in bench.log and '--spark-home DIR' in bench.log \
        and 'default-jre-headless' in bench.log
    fake = empty/'python'; fake.write_text('#!/bin/sh\necho ipykernel\n'); fake.chmod(0o755)
    bench.install('--replace', name='ssh_python')
    assert f'{fake} lacks ipykernel' in bench.log and 'python -m pip install ipykernel' in bench.log
    monkeypatch.setattr(specs, 'toree_jars', lambda: [])
    assert any('pip install apache-toree' in o for o in Spec('Scala').missing())

def test_nothing_missing_is_nothing_said(bench):
    bench.install('--python', sys.executable)
    assert '[W ' not in bench.log

# --- run.sh

@pytest.fixture
def submit(tmp_path):
    "Runs run.sh with a spark-submit that only reports; its arguments, or what it complains of"
    k, spark = tmp_path/'a kernel', tmp_path/'a spark'
    for o in (k/'bin', k/'scripts', k/'lib', spark/'bin', tmp_path/'path', tmp_path/'jvm/bin'): o.mkdir(parents=True)
    shutil.copy(PACKAGE/'kernelspecs/spark/bin/run.sh', k/'bin')
    for o, text in ((spark/'bin/spark-submit', "#!/bin/sh\nfor o; do printf '%s\\0' \"$o\"; done\n"),
            (tmp_path/'path/sudo', "#!/bin/sh\nprintf '%s\\0' SUDO\nwhile [ \"$1\" != env ]; do printf '%s\\0' "
            "\"$1\"; shift; done\nexec \"$@\"\n"), (tmp_path/'jvm/bin/java', '')):
        o.write_text(text); o.chmod(0o755)
    (k/'scripts/launch_ipykernel.py').write_text('')
    class Submit:
        kernel, spark_home, tmp = k, spark, tmp_path
        def __call__(self, *args, fails=None, **env):
            r = subprocess.run(['bash', k/'bin/run.sh', *args], env={'PATH': f'{tmp_path}/path:/usr/bin:/bin',
                'SPARK_HOME': str(spark), 'JAVA_HOME': str(tmp_path/'jvm')} | env, capture_output=True, text=True)
            if fails:
                assert r.returncode==1 and re.search(fails, r.stderr) and r.stderr.startswith('run.sh: ') \
                    and r.stderr.count('\n')==1, r.stderr
            else: assert not r.returncode, r.stderr
            return r.stdout.split('\0')[:-1]
    return Submit()

def test_arguments_arrive_as_they_are(submit):
    args = ['--kernel-id', 'a b', "it's", '"', '*', '', '$(id)', '`id`', 'ünï\ncode', '--x=\\']
    assert submit(*args) == [f'{submit.kernel}/scripts/launch_ipykernel.py', *args]

def test_options_in_their_places(submit):
    assert submit('--kernel-id', '1', SPARK_OPTS='--master yarn --name "a b"', LAUNCH_OPTS="--more 'c d'") == [
        '--master', 'yarn', '--name', 'a b', f'{submit.kernel}/scripts/launch_ipykernel.py', '--more', 'c d',
        '--kernel-id', '1']

hostile = ['$(touch BAD)', '`touch BAD`', '; touch BAD', '&& touch BAD', '| touch BAD', '> BAD', '${HOME}', '$HOME',
    '*', '~', '!!', '<(touch BAD)', '{a,b}', '\n touch BAD']
@pytest.mark.parametrize('text', hostile)
def test_nothing_in_options_is_expanded_or_run(submit, text):
    got = submit(SPARK_OPTS=f'--conf {text}', LAUNCH_OPTS=f'"{text}"')
    assert got == ['--conf', *text.split(), f'{submit.kernel}/scripts/launch_ipykernel.py', text]
    assert not list(submit.tmp.rglob('BAD')) and not Path('BAD').exists()

def reference(text):
    "Words as a POSIX shell makes them, without expansions; None for what is not closed"
    words, word, i, quote = [], None, 0, ''
    while i < len(text):
        c = text[i]
        if quote=="'":
            if c=="'": quote = ''
            else: word += c
        elif quote=='"':
            if c=='"': quote = ''
            elif c=='\\' and text[i+1:i+2] and text[i+1] in '"\\$`': i += 1; word += text[i]
            else: word += c
        elif c in ' \t\n\v\f\r':
            if word is not None: words.append(word); word = None
        elif c in '\'"': quote, word = c, word or ''
        elif c=='\\':
            i += 1
            if i==len(text): return None
            word = (word or '') + text[i]
        else: word = (word or '') + c
        i += 1
    return None if quote else words + [word]*(word is not None)

def test_splitting_agrees_with_a_reference(submit):
    script = (PACKAGE/'kernelspecs/spark/bin/run.sh').read_text().split('find_one() {')[0] + (
        '\nwhile IFS= read -r -d "" text; do ( split X "$text" 2>/dev/null '
        '&& printf "%s\\0" ${#words[@]} "${words[@]}" ) || printf "%s\\0" bad; done')
    texts = []
    @settings(max_examples=1500, deadline=None, database=None)
    @given(st.text('ab \t\n"\'\\$`*é', max_size=14))
    def collect(text): texts.append(text)
    collect()
    texts += [o for t in texts[:50] for o in [f'{t} {shlex.quote(t)}']]
    r = subprocess.run(['bash', '-c', script], input='\0'.join(texts)+'\0', capture_output=True, text=True, timeout=120)
    out = iter(r.stdout.split('\0'))
    for text in texts:
        n = next(out)
        assert reference(text) == (None if n=='bad' else [next(out) for _ in range(int(n))]), text

def test_long_options(submit):
    long = 'x'*60000
    assert submit(SPARK_OPTS=f'--a "{long}" {long}')[1:3] == [long, long]

def test_scala(submit):
    (submit.kernel/'scripts/launch_ipykernel.py').unlink()
    submit(fails='no launcher')
    (submit.kernel/'lib/toree-launcher_2.12.jar').write_text('')
    submit(fails='no Toree.*apache-toree')
    (submit.kernel/'lib/toree-assembly-0.5.0-incubating.jar').write_text('')
    lib, deft = submit.kernel/'lib', {'__TOREE_SPARK_OPTS__': '--master local',
        '__TOREE_OPTS__': '--alternate-sigint USR2', 'LAUNCH_OPTS': '--l'}
    assert submit('--kernel-id', '1', **deft) == ['--master', 'local', '--jars',
        f'{lib}/toree-assembly-0.5.0-incubating.jar', '--class', 'launcher.ToreeLauncher',
        f'{lib}/toree-launcher_2.12.jar', '--alternate-sigint', 'USR2', '--l', '--kernel-id', '1']
    got = submit(**deft, SPARK_OPTS='--master yarn', TOREE_OPTS='--magic')
    assert got[:2] == ['--master', 'yarn'] and '--magic' in got and 'USR2' not in got
    (lib/'toree-launcher_2.13.jar').write_text('')
    submit(fails='more than one')

def test_r_launcher_is_found(submit):
    (submit.kernel/'scripts/launch_ipykernel.py').rename(submit.kernel/'scripts/launch_IRkernel.R')
    assert submit() == [f'{submit.kernel}/scripts/launch_IRkernel.R']

def test_errors_of_run_sh(submit):
    submit(SPARK_HOME='', fails='SPARK_HOME is not set')
    submit(SPARK_HOME='/nowhere', fails='no Spark on .*/nowhere/bin/spark-submit')
    submit(SPARK_OPTS='--x "y', fails='SPARK_OPTS: a double quote')
    submit(LAUNCH_OPTS="'", fails='LAUNCH_OPTS: a single quote')
    submit(SPARK_OPTS='x\\', fails='backslash')
    for o in ('bash', 'dirname', 'uname'): (submit.tmp/'path'/o).symlink_to(shutil.which(o))
    submit(JAVA_HOME='', PATH=str(submit.tmp/'path'), fails='no Java on .*default-jre-headless')

def test_impersonation(submit):
    app, me = f'{submit.kernel}/scripts/launch_ipykernel.py', getpass.getuser()
    other = next(o.pw_name for o in pwd.getpwall() if o.pw_name != me)
    for on in ('True', 'true', '1'):
        assert submit('-k', GP_IMPERSONATION_ENABLED=on, KERNEL_USERNAME=other) == ['SUDO', '-n', '-H', '-E', '-u',
            other, '--', app, '-k']
    assert submit(EG_IMPERSONATION_ENABLED='True', KERNEL_USERNAME=other)[0] == 'SUDO'
    assert submit(GP_IMPERSONATION_ENABLED='True', KERNEL_USERNAME=me) == [app] # the provisioner has done it already
    assert submit(GP_IMPERSONATION_ENABLED='False', KERNEL_USERNAME=other) == submit(KERNEL_USERNAME=other) == [app]
    for bad in ('', '#0', '-u root', '+1'):
        submit(GP_IMPERSONATION_ENABLED='True', KERNEL_USERNAME=bad, fails='is not a user name')
    for bad in ('nobody-such', 'root x', '$(id)', '../root'):
        submit(GP_IMPERSONATION_ENABLED='True', KERNEL_USERNAME=bad, fails='has no user')

# --- functions

def test_master_is_one_word_without_quotes():
    for bad in ('', 'yarn ', 'spark://h:7077 --x', 'local[*', 'local[a]', 'spark://h:7077/', 'spark://$(id):1',
            'YARN', "local'"):
        with pytest.raises(ValueError, match='not one of'): cluster(bad)

def test_logos_are_images_of_their_size():
    for lang in ('python', 'r', 'scala'):
        for n in (32, 64):
            data = (PACKAGE/f'kernelspecs/{lang}/logo-{n}x{n}.png').read_bytes()
            assert data[:8]==b'\x89PNG\r\n\x1a\n' and int.from_bytes(data[16:20], 'big')==int.from_bytes(data[20:24],
                'big')==n
