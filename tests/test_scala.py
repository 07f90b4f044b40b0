"""Scala kernels: Toree under our launcher, compiled for this test's Spark and started by bin/run.sh as a kernelspec has
them, by a test that plays the host application and the agent of the host. Java, pyspark and apache-toree must be there:
what is missing fails the test that needs it, by name."""
import asyncio, base64, fcntl, hashlib, json, os, re, shutil, signal, stat, subprocess, uuid
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
import psutil, pytest
from Cryptodome.Protocol import HPKE
from Cryptodome.Protocol.DH import import_x25519_private_key
from gateway_provisioners_ssh import toree
from gateway_provisioners_ssh.handshake import (PROTOCOL, HandshakeError, LaunchKeys, connection_info, parse_message,
                                                port_names)
from installed import install, run, stopped, stopped_within
from kernels import LaunchFailed, gone, interrupting, launched_alone, taken_ports
from pace import until
from spark import CACHE, Missing, need, spark_home

HERE = Path(__file__).parent
# JVM options of a test: quick to start, and nothing in /tmp/hsperfdata_*
QUICK = '-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData'

@pytest.fixture(scope='session', autouse=True)
def needed():
    "Java, Spark and Toree, or a failure that names what is missing."
    try: return toree.find_java(), toree.find_spark(spark_home()), toree.find_toree_assembly()
    except (Missing, toree.BuildError) as e: pytest.fail(str(e))

@pytest.fixture(scope='session')
def spec(tmp_path_factory, needed):
    "An installed Scala kernelspec for local Spark, in a directory with a blank: `dir` and the content of kernel.json"
    name, spec = install(tmp_path_factory.mktemp('spec scala'), '--language', 'Scala', '--spark', '--spark-master',
                         'local[2]', '--spark-home', spark_home())
    d = Path(spec['argv'][0]).parent.parent
    assert re.fullmatch(r'toree-launcher_\d\.\d+\.jar',
                        next(d.glob('lib/toree-launcher*')).name) and name=='ssh_scala_spark'
    return SimpleNamespace(dir=d, **spec)

# The handshake --------------------------------------------------------------------------------------------------------

def compile_scala(java, jars, out, sources, *options):
    got = subprocess.run([java, '-cp', jars, 'scala.tools.nsc.Main', '-deprecation', *options, '-classpath', jars, '-d',
                          str(out), *map(str, sources)], capture_output=True, text=True)
    assert not got.returncode, got.stdout + got.stderr
    return got.stdout + got.stderr

@pytest.fixture(scope='session')
def answers(spec, needed, tmp_path_factory):
    "What the launcher's code makes of some inputs: a function of dicts to dicts."
    java, spark, _ = needed
    jar, out = next(spec.dir.glob('lib/toree-launcher*')), tmp_path_factory.mktemp('check')/'check.jar'
    compile_scala(java, f'{spark.classpath}:{jar}', out, [HERE/'scala'/'HandshakeCheck.scala'])
    def ask(*inputs):
        got = subprocess.run([java, '-cp', f'{spark.classpath}:{jar}:{out}', 'HandshakeCheck'],
                             input='\n'.join(map(json.dumps, inputs)), capture_output=True, text=True)
        assert not got.returncode, got.stderr
        return [json.loads(o) for o in got.stdout.splitlines()]
    return ask

VECTOR = PROTOCOL['vectors']['rfc9180']

def test_rfc_9180(answers):
    other = {**VECTOR, 'aad': '436f756e742d31', 'pt': '00'*1000}
    first, second, short, weak = answers(VECTOR, other, {**VECTOR, 'psk': '00'*31}, {**VECTOR, 'pkRm': '00'*32})
    assert first=={o: VECTOR[o] for o in ('key', 'base_nonce', 'enc', 'ct')}
    opened = HPKE.new(receiver_key=import_x25519_private_key(bytes.fromhex(VECTOR['skRm'])),
                      aead_id=HPKE.AEAD.AES128_GCM, info=bytes.fromhex(VECTOR['info']),
                      psk=(bytes.fromhex(VECTOR['psk_id']), bytes.fromhex(VECTOR['psk'])),
                      enc=bytes.fromhex(second['enc']))
    assert opened.unseal(bytes.fromhex(second['ct']), b'Count-1')==bytes(1000)
    assert '32 bytes' in short['error'], 'too short a secret'
    assert 'error' in weak, 'a key that leads to a shared secret which is public'

FIELDS = dict(ip='10.0.0.7', transport='tcp', signature_scheme='hmac-sha256', key='k'*64, pid=4711, pgid=4711,
              comm_port=40006, control_key='ab'*32,
              **{n: 40001+i for i,n in enumerate(port_names)})

def test_both_halves(answers):
    launches = [LaunchKeys(f'k-{i}', encrypt=i==1, connection=FIELDS if i==2 else None) for i in range(3)]
    launches.append(LaunchKeys('ключ "x" \\ '))
    got = answers(*(dict(ticket=o.ticket(), kernel_id=o.kernel_id, fields=FIELDS|dict(kernel_id=o.kernel_id))
                    for o in launches))
    for launch, sent in zip(launches, got):
        message = parse_message(sent['message'].encode())
        assert launch.open(message)==FIELDS|dict(kernel_id=launch.kernel_id)
        assert launch.answer(message).decode().strip()==sent['ack']
        with pytest.raises(HandshakeError): LaunchKeys(launch.kernel_id).open(message)
    again, = answers(dict(ticket=launches[0].ticket(), kernel_id='k-0', fields=FIELDS|dict(kernel_id='k-0')))
    assert again['message']!=got[0]['message'], 'each message has a key of its own'

def test_refused_inputs(answers):
    good = json.loads(base64.b64decode(LaunchKeys('k').ticket()))
    def only(**fields): return base64.b64encode(json.dumps(dict(version=2) | fields).encode()).decode()
    def ticket(**changes): return only(**(good|changes))
    bad = ['', 'abc', '!', base64.b64encode(b'[]').decode(), ticket(version=3), ticket(psk=''),
           ticket(psk=base64.b64encode(b'short').decode()),
           ticket(key=None), ticket(key=good['psk']), ticket(version=''),
           only(), only(socket='/s'), only(token='t'), only(socket='/s', token='t', network=True)]
    for o in answers(*(dict(ticket=t, kernel_id='k', fields={}) for t in bad)):
        assert o['error'].startswith('LaunchError: the host application sent ') and good['psk'] not in o['error'], o
    for o in answers(*(dict(range=r) for r in ('9..3', 'abc', '', '1..70000', '1-2', '-1..5', '1..2..3'))):
        assert 'is not LOWER..UPPER' in o['error']
    for o in answers(*(dict(address=a) for a in ('', '10.0.0.1', ':80', '10.0.0.1:0', '10.0.0.1:70000', '::1:80',
                                                 '[::1]', 'a b:80'))): assert '--response-address' in o['error'], o
    assert [o.get('range') or o['address']
            for o in answers(dict(range='0..0'), dict(range='40000..41000'), dict(address='10.0.0.1:80'),
                             dict(address='[::1]:80'))]==[
        'PortRange(0,0)', 'PortRange(40000,41000)', '/10.0.0.1:80', '/[0:0:0:0:0:0:0:1]:80']

def test_compiles_for_scala_2_13(needed, tmp_path):
    "What does not touch Toree, which nobody distributes for 2.13."
    java, spark, _ = needed
    pom = HERE/'scala'/'pom.xml'
    jars = CACHE/f'scala-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}'
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE/'lock-scala', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (jars/'.complete').exists():
            got = subprocess.run([need('mvn', 'maven'), '-B', '-ntp', '-q', '-f', str(pom),
                                  'dependency:copy-dependencies', f'-DoutputDirectory={jars}'],
                                  capture_output=True, text=True)
            assert not got.returncode, f'Scala 2.13 could not be fetched with Maven:\n{got.stdout + got.stderr}'
            (jars/'.complete').touch()
    jackson = ':'.join(map(str, spark.home.glob('jars/jackson-[acd]*-2.*.jar')))
    # old Javas say why they will not do
    said = compile_scala(java, f'{jars}/*:{jackson}', tmp_path/'out.jar',
                         [toree.sources/f'{o}.scala' for o in ('Hpke', 'Handshake', 'Ports', 'Protocol', 'Self')],
                         '-release', '8')
    assert 'warning' not in said

# One kernel, launched by run.sh ---------------------------------------------------------------------------------------

@asynccontextmanager
async def scala_kernel(server, spec, tmp, *extra, env={}, connection=None, encrypt=False, mode='lazy', spell='--{}',
                       response=None, before=(),
                       agent=None, **ticket):
    "A `launched` kernel and its `home`, empty at the end; `agent` gets its report, `ticket` adds to its ticket"
    launch = LaunchKeys(str(uuid.uuid4()), connection=connection, encrypt=encrypt)
    response = response or await server.address('127.0.0.1')
    (home := tmp/launch.kernel_id).mkdir()
    opts = {'kernel-id': launch.kernel_id, 'response-address': response, 'public-key': launch.public_key,
            'port-range': '0..0', 'spark-context-initialization-mode': mode}
    argv = [*before, spec.argv[0], *(o for k,v in opts.items() for o in (spell.format(k), v)), *extra]
    java = f"--driver-java-options '{QUICK} -Djava.io.tmpdir={home}' --conf spark.ui.enabled=false"
    if agent: ticket = dict(socket=str(agent.path), token=agent.token, file=str(agent.file)) | ticket
    given = {k: v for k,v in (json.loads(base64.b64decode(launch.ticket())) | ticket).items() if v is not None}
    secret = base64.b64encode(json.dumps(given).encode()).decode()
    env = {**dict(PATH=os.environ['PATH'], HOME=str(home), TMPDIR=str(home), LANG='C.UTF-8', KERNEL_ID=launch.kernel_id,
                  KERNEL_LAUNCH_SECRET=secret,
        SPARK_HOME=spec.env['SPARK_HOME'], SPARK_LOCAL_IP='127.0.0.1', __TOREE_SPARK_OPTS__=f'--master local[2] {java}',
        __TOREE_OPTS__=spec.env['__TOREE_OPTS__']), **env}
    try:
        async with launched_alone(server, launch, argv, env, tmp/f'{launch.kernel_id}.log', timeout=90,
                                  report=agent and agent.fields) as k:
            k.home, k.ticket = home, secret
            yield k
    finally:
        if agent: agent.tidy()
        await until(lambda: not files(home), 10, 'all files of the kernel gone')

def files(d):  # `os.walk` does not mind directories that go while it looks
    return [Path(at)/o for at,dirs,names in os.walk(d)
            for o in [*names, *(o for o in dirs if o.startswith(('spark-', 'toree', 'blockmgr')))]]

ENDLESS = 'sc.parallelize(1 to 4, 4).map { x => Thread.sleep(1000000); x }.count'

async def test_a_kernel(server, spec, tmp_path):
    async with scala_kernel(server, spec, tmp_path, '--port-range', '40000..42000',
                            spell='--RemoteProcessProxy.{}') as k:
        f = k.fields
        assert f['pid']==f['pgid']==k.proc.pid and f['ip']=='127.0.0.1' and not {'comm_port', 'control_key'} & set(f)
        assert all(40000 <= f[o] <= 42000 for o in port_names)
        connection = k.home/f'.local/share/jupyter/runtime/kernel-{k.launch.kernel_id}-{f["pid"]}.json'
        assert stat.S_IMODE(connection.stat().st_mode)==0o600 and json.loads(connection.read_text())['key']==f['key']

        got = await run(k, 'val x = 6 * 7; println(x)')                      # compute, print, fail
        assert (got.status, got.text.strip())==('ok', '42')
        assert '/ by zero' in (await run(k, '1 / 0')).error
        assert 'lastException' not in str(
            vars(await run(k, '"grüezi"'))), "Toree's housekeeping is not the user's output"
        assert 'not found: value nonsense' in (await run(k, 'nonsense')).error
        assert '<b>' in str((await run(k, '%%html\n<b>bold</b>')).data), 'magics'

        got = await run(k, 'println(Seq(sys.env.get("KERNEL_LAUNCH_SECRET"), System.getenv("KERNEL_LAUNCH_SECRET")))')
        assert got.text.strip()=='List(None, null)', 'the ticket is gone'
        environ = Path(f'/proc/{f["pid"]}/environ').read_bytes()
        assert k.ticket.encode() not in environ and b'\0KERNEL_LAUNCH_SECRET=\0' in b'\0'+environ
        assert k.launch.kernel_id.encode() in environ
        assert (await run(k, 'import sys.process._; println("env".!!)')).text.count('KERNEL_LAUNCH_SECRET=\n')<=1

        got = await run(k, 'import spark.implicits._; println(Seq(1, 2, 3).toDF("a").count, sc.master)')   # Spark
        assert got.text.strip()=='(3,local[2])', got.error
        for code in ('while (true) {}', 'Thread.sleep(1000000)', 'import sys.process._; "sleep 1000".!', ENDLESS):
            got = await stopped_within(1, k, code, interrupting(k), after=1.5)
            total = await run(k, 'println(sc.parallelize(1 to 10, 4).map(_ + x).sum)')
            assert total.text.strip()=='475.0', 'the context is usable, nothing is lost'
        assert re.search('cancelled', got.error)
        # where no cell runs, and while one begins and ends
        for _ in range(30):
            os.killpg(f['pgid'], signal.SIGINT)
            await asyncio.sleep(.01)
        await asyncio.sleep(1)
        assert (await run(k, 'println(x)')).text.strip()=='42'

        await k.client.shutdown(reply=True, timeout=10)
        assert await asyncio.wait_for(k.exited, 20)==0
        await until(lambda: not files(k.home), 10, 'files gone')
        said = k.log.read_text()
        for secret in (f['key'], k.ticket): assert secret not in said

async def test_a_restart_and_a_kill(server, spec, tmp_path):
    async with scala_kernel(server, spec, tmp_path, before=('sh', '-c', 'trap "" INT; exec "$@"', 'sh')) as k:
        first = connection_info(k.fields)
        # whoever started run.sh with SIGINT ignored
        await stopped_within(1, k, 'while (true) {}', interrupting(k), after=1.5)
        os.killpg(k.fields['pgid'], signal.SIGTERM)
        assert await asyncio.wait_for(k.exited, 20)==143
    async with scala_kernel(server, spec, tmp_path, connection=first) as k:
        assert connection_info(k.fields)==first
        assert (await run(k, 'println(1 + 1)')).text.strip()=='2'
        # __TOREE_OPTS__ of Enterprise Gateway's kernelspecs: --alternate-sigint USR2
        os.kill(k.fields['pid'], signal.SIGUSR2)
        async def usr2(): os.kill(k.fields['pid'], signal.SIGUSR2)
        await stopped_within(1, k, 'Thread.sleep(100000)', usr2, after=1.5)
        await run(k, 'sc.parallelize(1 to 10).count')
        os.kill(k.fields['pid'], signal.SIGKILL)
        assert await asyncio.wait_for(k.exited, 20)==-9
        await until(lambda: not files(k.home), 10, 'files gone, those of a killed kernel too')

async def test_interrupted_at_any_time(server, spec, tmp_path):
    "While it is compiled, begun, planned, computed: the cell ends, the next ones work, and no job of it begins later"
    async with scala_kernel(server, spec, tmp_path) as k:
        # until Toree has given a cell to a thread there is nothing to interrupt, and the first takes it longest
        await run(k, '1')
        first = await stopped(k, 'spark.range(1000000000000000L).filter("id % 7 = 0").count', interrupting(k), after=.2)
        assert first.status=='error'
        await run(k, '''def query(rows: Long) = spark.sql(
            Seq.fill(40)(s"select id from range(0, $rows, 1, 1) where id % 7 = 0").mkString(" union all "))
val (endless, short) = (query(1000000000000000L), query(1))''')
        for after in (.2, .4, 1):
            assert (await stopped(k, 'endless.count', interrupting(k), after)).status=='error'
            got = await run(k, 'println(short.count)')
            assert got.text.strip()=='40', f'planned as long, so that the other would have its job first: {got.error}'

async def test_no_context(server, spec, tmp_path):
    async with scala_kernel(server, spec, tmp_path, mode='none') as k:
        for name in ('sc', 'spark'): assert f'not found: value {name}' in (await run(k, name)).error
        await interrupting(k)()
        session = await run(k, 'println(org.apache.spark.sql.SparkSession.getDefaultSession)')
        assert session.text.strip()=='None', 'an interrupt does not make a context'

async def test_context_that_cannot_start(server, spec, tmp_path):
    opts = dict(env=dict(
        SPARK_OPTS=f"--master spark://nowhere --driver-java-options '{QUICK} -Djava.io.tmpdir={tmp_path}'"))
    async with scala_kernel(server, spec, tmp_path, **opts) as k:
        for _ in range(2):
            got = await run(k, 'spark.range(10).count')
            assert got.status=='error' and 'spark://nowhere' in got.error
        assert (await run(k, 'println(1 + 1)')).text.strip()=='2'
    with pytest.raises(LaunchFailed, match='(?s)status 1 .*the kernel did not start.*spark://nowhere'):
        async with scala_kernel(server, spec, tmp_path, mode='eager', **opts): pass

async def test_refusals(server, spec, tmp_path):
    cases = lambda port: [
        (dict(env=dict(KERNEL_LAUNCH_SECRET='')), (), 'status 1 .*KERNEL_LAUNCH_SECRET is not set'),
        (dict(env=dict(KERNEL_LAUNCH_SECRET='abc')), (), 'status 1 .*sent nothing that is a launch ticket'),
        (dict(encrypt=True), (), 'status 1 .*Toree cannot encrypt.*transport_encryption'),
        (dict(), ('--port-range', '9..3'), "status 2 .*--port-range '9..3' is not LOWER..UPPER"),
        (dict(), ('--port-range', f'{port}..{port+3}'), f'status 1 .*fewer than 5 ports are free in {port}..{port+3}'),
        (dict(mode='quick'), (), "status 2 .*lazy, eager or none, not 'quick'"),
        (dict(response='nonsense'), (), "status 2 .*--response-address 'nonsense' is not IP:PORT"),
        (dict(response='127.0.0.1:1'), (), 'status 1 .*cannot be reached at 127.0.0.1 port 1 .*GP_ENABLE_TUNNELING')]
    slots = asyncio.Semaphore(3)
    async def refused(how, extra, reason):
        async with slots:
            with pytest.raises(LaunchFailed) as e:
                async with scala_kernel(server, spec, tmp_path, *extra, **how): pass
        assert re.search(f'(?s){reason}', str(e.value)), (reason, str(e.value))
        assert str(e.value).count('[launcher ')==1, 'one line says why'
    with taken_ports(4) as port: await asyncio.gather(*(refused(*o) for o in cases(port)))

async def test_unwanted(server, spec, tmp_path):
    "A kernel that nobody asked for, and one whose report is not answered as it should be, end themselves."
    def answer(reply):
        async def serve(r, w):
            await r.read()
            w.write(reply)
            w.close()
        return serve
    async def ends(reply):
        liar = await asyncio.start_server(answer(reply), '127.0.0.1', 0)
        with pytest.raises(LaunchFailed, match='(?s)status 1 .*did not confirm this launch'):
            async with scala_kernel(server, spec, tmp_path, response='127.0.0.1:%d' % liar.sockets[0].getsockname()[1]):
                pass
        liar.close()
    await asyncio.gather(ends(b''), ends(b'00'*32 + b'\n'))

# The agent of the host ------------------------------------------------------------------------------------------------

class HostAgent:
    "A launcher's agent: a socket at `path`, the connection `file`. It hears one report, `said`, and answers `answer`"
    def __init__(self, tmp, answer, network=False):
        self.path, self.file, self.token = tmp/'agent', tmp/'connection.json', os.urandom(32).hex()
        self.answer, self.said = answer, {}
        self.fields = None if network else asyncio.get_running_loop().create_future()

    async def __aenter__(self):
        self.server = await asyncio.start_unix_server(self.heard, self.path)
        return self

    async def __aexit__(self, *_): self.server.close()

    async def heard(self, r, w):
        self.said = json.loads(await r.readline())
        w.write(self.answer)
        w.close()
        if self.fields and self.answer: self.fields.set_result(self.said['fields'])

    def tidy(self):
        for o in self.said.get('remove', ()): shutil.rmtree(o, ignore_errors=True)
        self.file.unlink(missing_ok=True)

NO_NETWORK = dict(psk=None, key=None)

async def test_report_to_the_agent(server, spec, tmp_path):
    async with HostAgent(tmp_path, b'{}\n') as agent, scala_kernel(server, spec, tmp_path, mode='none', agent=agent,
            **NO_NETWORK) as k:
        said, f = agent.said, k.fields
        assert set(said)=={'token', 'ip', 'pgid', 'remove', 'fields'} and said['token']==agent.token
        assert said['ip']==f['ip']=='127.0.0.1' and said['pgid']==f['pgid']==f['pid']==k.proc.pid
        assert f['kernel_id']==k.launch.kernel_id
        written = json.loads(agent.file.read_text())
        assert stat.S_IMODE(agent.file.stat().st_mode)==0o600 and written==connection_info(f) | dict(key=f['key'],
            kernel_name='')
        assert set(f)==set(written) | {'kernel_id', 'pid', 'pgid'}

        kernel = psutil.Process(k.proc.pid)
        assert {o.laddr.port for o in kernel.net_connections() if o.status==psutil.CONN_LISTEN}=={f[o]
            for o in port_names}
        await until(lambda: all(gone(o.pid) for o in kernel.children(recursive=True)), 5,
                    'the process that would have removed what is left has ended')
        await stopped_within(1, k, 'while (true) {}', interrupting(k), after=1.5)
        assert (await run(k, 'println(6 * 7)')).text.strip()=='42'

        os.kill(f['pid'], signal.SIGKILL)
        assert await asyncio.wait_for(k.exited, 20)==-9
        left = [Path(o) for o in said['remove']]
        assert all(o.is_absolute() for o in left) and all(any(o.is_relative_to(d) for d in left) for o in files(k.home))
        log = k.log.read_text()
        for secret in (f['key'], agent.token, k.ticket): assert secret not in log

async def test_network_beside_the_agent(server, spec, tmp_path):
    "The agent says where it takes control requests, and the host application hears of that over the network."
    control = dict(comm_port=4711, control_key='ab'*32)
    async with HostAgent(tmp_path, json.dumps(control).encode() + b'\n', network=True) as agent:
        async with scala_kernel(server, spec, tmp_path, mode='none', agent=agent, network=True) as k:
            assert set(agent.said)=={'token', 'ip', 'pgid', 'remove'}
            assert {o: k.fields[o] for o in control}==control

async def test_network_instead_of_the_agent(server, spec, tmp_path):
    agent = HostAgent(tmp_path, b'', network=True)
    async with scala_kernel(server, spec, tmp_path, mode='none', agent=agent) as k:
        assert not {'comm_port', 'control_key'} & set(k.fields)
        said = 'does not answer (No such file or directory), so the kernel is reported over the network'
        assert said in k.log.read_text()
        os.kill(k.fields['pid'], signal.SIGKILL)
        await until(lambda: not files(k.home), 10, 'files gone, which no agent removes')

async def test_no_agent_that_wants_it(server, spec, tmp_path):
    "Without a network report to fall back to, or where the agent knows the launch no more."
    async def ends(tmp, reason, serve, **ticket):
        tmp.mkdir()
        agent = HostAgent(tmp, b'')
        with pytest.raises(LaunchFailed, match=f'(?s)status 1 .*{reason}') as e:
            async with agent if serve else nullcontext(), scala_kernel(server, spec, tmp, mode='none', agent=agent,
                    **ticket): pass
        assert str(e.value).count('[launcher ')==1, 'one line says why'
    await asyncio.gather(ends(tmp_path/'a', 'does not answer .No such file or directory.: start the kernel again',
                              False, **NO_NETWORK),
                         ends(tmp_path/'b', 'does not know this launch: it was given up', True))
