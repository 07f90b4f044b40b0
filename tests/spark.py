"""A real Spark standalone cluster and a real YARN, small enough for two cores, each started once per test session.

`Standalone` and `Yarn` are context managers for scripts and notebooks; the fixtures at the end are what tests use.
Every port is ephemeral, every file is under one directory, and nothing of it outlives the session. What is missing on
the machine is an error that names it."""
import fcntl, hashlib, json, os, re, shutil, signal, socket, subprocess, sys, tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.request import ProxyHandler, build_opener
from shlex import quote
from xml.sax.saxutils import escape

import psutil, pytest
from hosts import NetLab
from pace import wait

HERE = Path(__file__).parent
# as it is before tests get a home of their own
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'gateway_provisioners_ssh'
JVM = ['-XX:+UseSerialGC', '-XX:TieredStopAtLevel=1', '-Xss512k']  # a daemon of a test: quick to start, small

class Missing(RuntimeError):
    "Something these clusters need is not on this machine; the text says what and how to get it."

def need(command:str, package:str) -> str:
    "The path of `command`, or `Missing` with the Debian `package` that has it."
    found = shutil.which(command)
    if not found: raise Missing(f'{command} is not on PATH: apt-get install {package}')
    return found

def java_home() -> str:
    "Where the JVM that `java` starts lives; `JAVA_HOME` wins."
    return os.environ.get('JAVA_HOME') or str(Path(need('java', 'default-jdk-headless')).resolve().parent.parent)

def spark_home() -> str:
    "The Spark that pip's pyspark carries: all of Spark but the R library, and without any configuration."
    spec = find_spec('pyspark')
    if not spec: raise Missing("pyspark is not installed: pip install '.[spark]'")
    return str(Path(spec.origin).parent)

def yarn_jars() -> Path:
    "The directory with Hadoop's jars, fetched with Maven the first time (about 70 MB) and kept in the user's cache."
    pom = HERE/'yarn'/'pom.xml'
    jars = CACHE/f'yarn-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}'
    done = jars/'.complete'
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE/'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists(): return jars
        got = subprocess.run([need('mvn', 'maven'), '-B', '-ntp', '-q', '-f', str(pom), 'dependency:copy-dependencies',
                              f'-DoutputDirectory={jars}'],
                             capture_output=True, text=True, timeout=600)
        if got.returncode:
            raise Missing(f"Hadoop's jars could not be fetched with Maven:\n{(got.stdout + got.stderr)[-2000:]}")
        done.touch()
    return jars

def get_json(url:str):
    "The JSON document at `url`, past any HTTP proxy."
    with build_opener(ProxyHandler({})).open(url, timeout=10) as r: return json.load(r)

def free_ports(address:str, n:int) -> list[int]:
    "`n` different ports that were free on `address` a moment ago."
    socks = [socket.create_server((address, 0)) for _ in range(n)]
    try: return [s.getsockname()[1] for s in socks]
    finally:
        for s in socks: s.close()

class Daemon:
    "One JVM in a session of its own that ends with this process; its output goes to `log`."
    def __init__(self, name:str, argv:list[str], env:dict[str, str], log:Path):
        self.name, self.log = name, log
        with open(log, 'wb') as out:
            self.proc = subprocess.Popen(['setpriv', '--pdeathsig', 'TERM', *argv], env=env, stdin=subprocess.DEVNULL,
                                         stdout=out, stderr=out, start_new_session=True)

    def output(self) -> str: return self.log.read_text(errors='replace')

    def wait_for(self, what:str, check, timeout:float=60):
        "What `check()` gives as soon as that is true; the daemon's death is an error at once, with its last lines."
        def look():
            if got := check(): return got
            if self.proc.poll() is not None:
                raise RuntimeError(f'{self.name} ended with status {self.proc.returncode}:\n{self.output()[-3000:]}')
        try: return wait(look, timeout, f'{self.name}: {what}', pause=.05)
        except TimeoutError as e: raise TimeoutError(f'{e}:\n{self.output()[-3000:]}') from None

    def says(self, pattern:str, timeout:float=60) -> str:
        "The first group of the first line that matches `pattern`."
        return self.wait_for(f'no line like {pattern!r}', lambda: re.search(pattern, self.output()), timeout)[1]

    def stop(self):
        if self.proc.poll() is None:
            self.proc.terminate()
            try: self.proc.wait(3)
            except subprocess.TimeoutExpired: pass
        try: os.killpg(self.proc.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.proc.wait()

class Cluster:
    """What both kinds share: a directory, daemons, and an end that leaves nothing. `master` is for `--spark-master`,
    `spark_home` for `--spark-home`: a Spark that is configured for this cluster, as an administrator would have it on
    the hosts of kernels."""
    master: str
    defaults = {'spark.ui.enabled': 'false', 'spark.driver.memory': '512m', 'spark.executor.memory': '512m',
                'spark.executor.cores': '1', 'spark.sql.shuffle.partitions': '4', 'spark.log.level': 'WARN',
                **{f'spark.{o}.extraJavaOptions': ' '.join(JVM) for o in ('driver', 'executor', 'yarn.am')}}

    def __init__(self,
        address:str='127.0.0.1',                # bound by all daemons; drivers must be able to reach it, and it them
        # for logs, work and configuration; default: a new one, removed at the end
        directory:str|os.PathLike|None=None,
        # more for the daemons' /etc/hosts: the names of the drivers' hosts; needs root
        hosts_file:str|os.PathLike|None=None):
        self.address, self.java, self.hosts_file = address, java_home(), hosts_file
        self._given, self.pip_spark, self.daemons = directory, spark_home(), []

    def __enter__(self):
        self.dir = Path(self._given or tempfile.mkdtemp(prefix='gpssh-spark-'))
        self.dir.mkdir(parents=True, exist_ok=True)
        self.dir.chmod(0o755)  # kernels of other users read the configuration
        self.conf = self.dir/'conf'
        self.conf.mkdir()
        self.spark_home = self.make_home('spark')
        if self.hosts_file:
            (self.dir/'hosts').write_text(Path('/etc/hosts').read_text() + '\n' + Path(self.hosts_file).read_text())
        try: self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_): self.stop()

    def write_conf(self, **more):
        """What drivers need to know: Spark's two files of settings. Jars come before the settings in the class path, as
        in the JVM whose classes `quick_java` of scripts/test.sh has kept."""
        more |= {f'spark.{o}.extraClassPath': f'{self.pip_spark}/jars/*' for o in ('driver', 'executor')}
        (self.conf/'spark-defaults.conf').write_text(''.join(f'{k} {v}\n' for k,v in {**self.defaults, **more}.items()))
        (self.conf/'spark-env.sh').write_text(''.join(f'export {k}={quote(v)}\n' for k,v in self.spark_env.items()))

    @property
    def spark_env(self) -> dict[str, str]:
        return (dict(JAVA_HOME=self.java)
                | (dict(SPARK_LOCAL_IP=self.address) if self.address.startswith('127.') else {}))

    def make_home(self, name:str) -> Path:
        "Another `SPARK_HOME` for this cluster: pip's Spark, with this cluster's configuration."
        home = self.dir/name
        home.mkdir()
        for o in Path(self.pip_spark).iterdir(): (home/o.name).symlink_to(o)
        (home/'conf').unlink(missing_ok=True)
        (home/'conf').symlink_to(self.conf)
        return home

    @property
    def env(self) -> dict[str, str]:
        "For the environment of a script (kernelspecs have all this in them)."
        return dict(SPARK_HOME=str(self.spark_home), PYSPARK_PYTHON=sys.executable)

    def daemon(self, name:str, argv:list[str], **env) -> Daemon:
        clean = {k: v for k,v in os.environ.items() if not k.startswith(('SPARK_', 'PYSPARK_', 'HADOOP_', 'YARN_'))}
        if self.hosts_file:
            argv = ['unshare', '--mount', 'sh', '-c',
                    f'mount --bind {quote(str(self.dir))}/hosts /etc/hosts && exec "$@"', 'sh', *argv]
        d = Daemon(name, argv, {**clean, 'JAVA_HOME': self.java, **env}, self.dir/f'{name}.log')
        self.daemons.append(d)
        return d

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this cluster: whatever has its directory in the command line (executors and
        containers too)."""
        return [p for p in psutil.process_iter(['cmdline']) if p.pid!=os.getpid()
                and any(str(self.dir) in a for a in p.info['cmdline'] or ())]

    def memory(self) -> dict[str, int]:
        "Resident MB of each daemon."
        return {d.name: psutil.Process(d.proc.pid).memory_info().rss >> 20 for d in self.daemons
                if d.proc.poll() is None}

    def wait_state(self, name:str, state:str, timeout:float=30) -> dict:
        """The application of that name once its state is `state`: WAITING (YARN says ACCEPTED), RUNNING, FINISHED,
        FAILED, KILLED."""
        return wait(lambda: next((a for a in self.applications(name) if a['state']==state), None), timeout,
                    f'application {name} {state}', pause=.05)

    def stop(self):
        "Daemons in the reverse order of their start, then whatever they left behind, then the directory."
        while self.daemons: self.daemons.pop().stop()
        for p in self.processes():
            try: p.kill()
            except psutil.NoSuchProcess: pass
        if not self._given: shutil.rmtree(self.dir, ignore_errors=True)

class Standalone(Cluster):
    "A Spark standalone master and one worker. An application takes one core, so several run side by side."
    def __init__(self, *args, cores:int=8, memory:str='6g', **kw):
        super().__init__(*args, **kw)
        self.cores, self.worker_memory = cores, memory

    def start(self):
        self.write_conf(**{'spark.cores.max': '1'})
        (self.dir/'work').mkdir()
        cls = [f'{self.pip_spark}/bin/spark-class']
        common = dict(SPARK_HOME=self.pip_spark, SPARK_CONF_DIR=str(self.dir/'none'), SPARK_DAEMON_MEMORY='128m',
                      SPARK_DAEMON_JAVA_OPTS=' '.join(JVM))
        at = ['--host', self.address, '--port', '0', '--webui-port', '0']
        m = self.daemon('spark-master', [*cls, 'org.apache.spark.deploy.master.Master', *at], **common)
        self.master = m.says(r'Starting Spark master at (\S+)')
        ui_port = m.says(r"Successfully started service 'MasterUI' on port (\d+)")
        self.ui = f'http://{self.address}:{ui_port}'
        w = self.daemon('spark-worker',
                        [*cls, 'org.apache.spark.deploy.worker.Worker', *at, '--cores', str(self.cores), '--memory',
                                         self.worker_memory, '--work-dir', str(self.dir/'work'), self.master], **common,
                        SPARK_LOCAL_DIRS=str(self.dir/'work'))
        w.says(r'(Successfully registered with master)')

    def applications(self, name:str|None=None) -> list[dict]:
        "The master's applications, newest first, running and ended (`state`), of that name or all."
        d = get_json(f'{self.ui}/json/')
        return [a for a in d['activeapps'] + d['completedapps'] if name in (None, a['name'])]

class Yarn(Cluster):
    "A YARN ResourceManager and one NodeManager over the local file system, with the capacity scheduler."
    master = 'yarn'
    def __init__(self, *args, memory_mb:int=8192, **kw):
        super().__init__(*args, **kw)
        self.memory_mb, self.jars = memory_mb, yarn_jars()

    @property
    def spark_env(self): return super().spark_env | dict(HADOOP_CONF_DIR=str(self.conf), YARN_CONF_DIR=str(self.conf))

    def site(self, name:str, values:dict):
        "One of Hadoop's XML files."
        rows = ''.join(f'<property><name>{k}</name><value>{escape(str(v))}</value></property>\n'
                       for k,v in values.items())
        (self.conf/name).write_text(f'<?xml version="1.0"?>\n<configuration>\n{rows}</configuration>\n')

    def configure(self):
        rm, nm = 'yarn.resourcemanager', 'yarn.nodemanager'
        ports = dict(zip(('', 'scheduler.', 'resource-tracker.', 'admin.', 'webapp.'), free_ports(self.address, 5)))
        self.rest = f'http://{self.address}:{ports["webapp."]}/ws/v1/cluster'
        for d in ('staging', 'local', 'logs'): (self.dir/d).mkdir(exist_ok=True)
        (self.dir/'staging').chmod(0o1777)
        self.site('core-site.xml', {'fs.defaultFS': 'file:///', 'hadoop.tmp.dir': self.dir/'tmp',
                                    'ipc.client.connect.max.retries': 3})
        self.site('yarn-site.xml', {
            f'{rm}.hostname': self.address, **{f'{rm}.{k}address': f'{self.address}:{p}' for k,p in ports.items()},
            f'{rm}.scheduler.class':
                'org.apache.hadoop.yarn.server.resourcemanager.scheduler.capacity.CapacityScheduler',
            f'{rm}.am.max-attempts': 1, f'{rm}.nodemanagers.heartbeat-interval-ms': 100,
            'yarn.scheduler.minimum-allocation-mb': 64, 'yarn.scheduler.maximum-allocation-mb': self.memory_mb,
            f'{nm}.hostname': self.address,
            **{f'{nm}.{k}address': f'{self.address}:0' for k in ('', 'localizer.', 'webapp.')},
            f'{nm}.resource.memory-mb': self.memory_mb, f'{nm}.resource.cpu-vcores': 32,
            f'{nm}.pmem-check-enabled': 'false', f'{nm}.vmem-check-enabled': 'false',
            f'{nm}.disk-health-checker.enable': 'false', f'{nm}.local-dirs': self.dir/'local',
            f'{nm}.log-dirs': self.dir/'logs', f'{nm}.process-kill-wait.ms': 2000})
        cap = 'yarn.scheduler.capacity'
        self.site('capacity-scheduler.xml', {
            f'{cap}.root.queues': 'default', f'{cap}.root.default.capacity': 100,
            f'{cap}.maximum-am-resource-percent': '1.0',
            f'{cap}.resource-calculator': 'org.apache.hadoop.yarn.util.resource.DefaultResourceCalculator'})
        (self.conf/'log4j.properties').write_text(
            'log4j.rootLogger=INFO,A\nlog4j.appender.A=org.apache.log4j.ConsoleAppender\n'
            'log4j.appender.A.target=System.err\nlog4j.appender.A.layout=org.apache.log4j.PatternLayout\n'
            'log4j.appender.A.layout.ConversionPattern=%d{ISO8601} %p %c{1}: %m%n\n')
        self.write_conf(**{'spark.yarn.jars': f'local:{self.pip_spark}/jars/*',
            'spark.yarn.stagingDir': f'file://{self.dir}/staging', 'spark.yarn.am.memory': '256m',
            'spark.yarn.am.memoryOverhead': '128m', 'spark.executor.memoryOverhead': '128m',
            'spark.executor.instances': '1', 'spark.yarn.report.interval': '200ms',
            'spark.scheduler.minRegisteredResourcesRatio': '0'})

    def start(self):
        for left in (2, 1, 0):  # the ports were free when chosen; another process may have been quicker
            self.configure()
            try: return self.start_daemons()
            except RuntimeError as e:
                if not left or 'BindException' not in str(e) + self.daemons[-1].output(): raise
                while self.daemons: self.daemons.pop().stop()

    def start_daemons(self):
        java = [f'{self.java}/bin/java', *JVM, '-Xmx256m', '--add-opens=java.base/java.lang=ALL-UNNAMED',
                f'-Dhadoop.log.dir={self.dir}', f'-Dyarn.log.dir={self.dir}', '-cp', f'{self.conf}:{self.jars}/*']
        server = 'org.apache.hadoop.yarn.server'
        r = self.daemon('yarn-resourcemanager', [*java, f'{server}.resourcemanager.ResourceManager'])
        n = self.daemon('yarn-nodemanager', [*java, f'{server}.nodemanager.NodeManager'])
        def node_running():
            if n.proc.poll() is not None:
                raise RuntimeError(f'{n.name} ended with status {n.proc.returncode}:\n{n.output()[-3000:]}')
            try: return get_json(f'{self.rest}/metrics')['clusterMetrics']['activeNodes']
            except OSError: return False
        r.wait_for('no active node', node_running)

    def applications(self, name:str|None=None) -> list[dict]:
        """The ResourceManager's applications (REST API), of that name or all: `id`, `name`, `user`, `state`,
        `finalStatus` and more."""
        found = (get_json(f'{self.rest}/apps')['apps'] or {}).get('app', [])
        return [a for a in found if name in (None, a['name'])]

@pytest.fixture(scope='session')
def cluster_network(request) -> dict:
    """Where the clusters are, so that hosts of both kinds reach them and are reached: in the network of `net` as root,
    else on loopback."""
    if NetLab.missing(): return {}
    lab = request.getfixturevalue('_net')
    return dict(address=lab.address, hosts_file=lab.base/'hosts')

@pytest.fixture(scope='session')
def spark_standalone(cluster_network, tmp_path_factory):
    "A `Standalone`, the same one for all tests."
    with Standalone(directory=tmp_path_factory.mktemp('standalone'), **cluster_network) as s: yield s

@pytest.fixture(scope='session')
def yarn(cluster_network, tmp_path_factory):
    "A `Yarn`, the same one for all tests."
    with Yarn(directory=tmp_path_factory.mktemp('yarn'), **cluster_network) as y: yield y
