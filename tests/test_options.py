"Every option and variable of the provisioner, on real SSH hosts: set, and its effect seen."
import asyncio, contextlib, json, os, re, signal, socket, subprocess, sys, threading
from pathlib import Path
import psutil, pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets.config import Config
from gateway_provisioners_ssh import balance
from gateway_provisioners_ssh.provisioner import DistributedProvisioner, shared
from gateway_provisioners_ssh.errors import LaunchError
from gateway_provisioners_ssh.settings import settings
from forks import ssh_spec
from kernels import HABITS, LEGACY, forget, interrupt, value
from pace import Timer, until
import kernels

@pytest.fixture
def spec(hosts, tmp_path, monkeypatch):
    "Writes a kernelspec for the hosts, with changes to kernel.json; returns its manager"
    monkeypatch.setenv('KERNEL_USERNAME', 'ada')
    monkeypatch.setenv('GP_SSH_CONFIG', str(hosts.client.config))
    def make(env={}, remote_hosts=None, **config):
        ssh_spec('install', '--prefix', tmp_path, '--replace',
            *(f'--remote-hosts={h}' for h in remote_hosts or hosts.names)).check_returncode()
        path = tmp_path/'share/jupyter/kernels/ssh_python/kernel.json'
        kernel = json.loads(path.read_text())
        if remote_hosts == []: del kernel['metadata']['kernel_provisioner']['config']['remote_hosts']
        kernel['env'] |= env
        kernel['metadata']['kernel_provisioner']['config'] |= config
        path.write_text(json.dumps(kernel))
        return KernelSpecManager(kernel_dirs=[str(path.parents[1])])
    yield make
    forget()

def running(specs, env={}, config={}):
    "A kernel of a host application with that configuration, and a client"
    km = AsyncKernelManager(kernel_name='ssh_python', kernel_spec_manager=specs,
        config=Config(DistributedProvisioner=config))
    return kernels.running(km, env=os.environ | env)

def host_of(km): return str(km.provisioner.conn.host)

def change_argv(specs, change):
    path = Path(specs.kernel_dirs[0])/'ssh_python/kernel.json'
    kernel = json.loads(path.read_text())
    path.write_text(json.dumps(kernel|dict(argv=change(kernel['argv']))))

# Hosts and balancing

async def test_remote_hosts_of_the_kernelspec_win(spec, hosts):
    async with running(spec(remote_hosts=['host2']), config=dict(remote_hosts=['host1'])) as (km, kc):
        assert host_of(km) == 'host2'
        assert await value(kc, '__import__("os").environ["GP_TEST_HOST"]') == 'host2'

async def test_remote_hosts_from_config_and_variable(spec, monkeypatch):
    specs = spec(remote_hosts=[])
    async with running(specs, config=dict(remote_hosts=['host3'])) as (km, _): assert host_of(km) == 'host3'
    monkeypatch.setenv('EG_REMOTE_HOSTS', 'host1')
    async with running(specs) as (km, _): assert host_of(km) == 'host1'
    monkeypatch.setenv('GP_REMOTE_HOSTS', 'host2,host2')
    async with running(specs) as (km, _): assert host_of(km) == 'host2'

async def test_localhost_needs_no_ssh(spec, hosts):
    def connections(): return sum(h.connections() for h in hosts)
    await asyncio.to_thread(forget)
    await until(lambda: not connections(), what='connections of other tests ended')
    async with running(spec(remote_hosts=[])) as (km, kc):
        assert km.provisioner.conn.local and not connections()
        assert await value(kc, '__import__("sys").executable') == sys.executable
        assert await value(kc, '__import__("os").environ.get("GP_SSH_CONFIG")') is None

@pytest.fixture
def slow_names(monkeypatch):
    "The name service does not answer for names that begin with slow until the test ends; a list of the names asked for"
    asked, real, over = [], socket.getaddrinfo, threading.Event()
    def getaddrinfo(name, *a, **kw):
        if not str(name).startswith('slow'): return real(name, *a, **kw)
        asked.append(name)
        over.wait()
        raise socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution')
    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    yield asked
    over.set()

SLOW = [f'slow{i}.invalid' for i in range(10)]

async def test_a_slow_name_service_has_no_more_time_than_the_launch(spec, hosts, slow_names):
    with pytest.raises(LaunchError,
            match=r'^host slow0.invalid \(user \w+\): not reached within the 3 s \(KERNEL_LAUNCH_TIMEOUT') as e:
        async with running(spec(remote_hosts=SLOW), dict(KERNEL_LAUNCH_TIMEOUT='3')): pass
    assert set(slow_names) == {'slow0.invalid'} and 'slow1' not in str(
        e.value)   # the time was up before the others' turn

async def test_only_the_hosts_that_are_tried_are_looked_up(spec, hosts, slow_names):
    async with running(spec(remote_hosts=['host1', *SLOW])) as (km, _): assert host_of(km) == 'host1' and not slow_names

async def test_an_entry_that_cannot_be_read_is_one_host_less(spec, hosts):
    hosts.client.alias('wrong', Port='lots')
    try:
        balance.load_balancer.cache_clear()
        async with running(spec(remote_hosts=['wrong', 'host2'])) as (km, _): assert host_of(km) == 'host2'
        with pytest.raises(LaunchError,
                match=r"host wrong \(user \w+\): OpenSSH configuration for wrong: .*'lots' is not a number"):
            async with running(spec(remote_hosts=['wrong', 'host2']), dict(KERNEL_REMOTE_HOST='wrong')): pass
    finally:
        del hosts.client.aliases['wrong']
        hosts.client.write()

async def test_entry_with_user_and_port(spec, hosts, monkeypatch):
    h = hosts[0]
    hosts.client.alias(h.address, IdentityFile=hosts.client.key, UserKnownHostsFile=hosts.client.known_hosts)
    async with running(spec(remote_hosts=[f'{h.user}@{h.address}:{h.port}'])) as (km, _):
        assert not km.provisioner.conn.local

async def test_ssh_port_and_remote_user(spec, hosts, monkeypatch):
    h = hosts[0]
    hosts.client.alias('plain', HostName=h.address, IdentityFile=hosts.client.key,
        UserKnownHostsFile=hosts.client.known_hosts)
    monkeypatch.setenv('GP_SSH_PORT', str(h.port))
    async with running(spec(remote_hosts=['plain'])) as (km, _): assert km.provisioner.conn.routes[-1].port == h.port
    monkeypatch.setenv('GP_REMOTE_USER', 'nobody-of-that-name')
    with pytest.raises(LaunchError, match='(?s)user nobody-of-that-name.*refused the login.*ssh-copy-id'):
        async with running(spec(remote_hosts=['plain'])): pass

async def test_round_robin_is_exact_when_many_start_at_once(spec, hosts):
    async with contextlib.AsyncExitStack() as stack:
        specs = spec()
        kernels = await asyncio.gather(*(stack.enter_async_context(running(specs)) for _ in range(8)))
        assert sorted(host_of(km) for km, _ in kernels) == sorted(hosts.names*2)

async def test_least_connection_counts_starts_ends_and_pins(spec, hosts):
    specs, conf = spec(), dict(load_balancing_algorithm='least-connection')
    async with contextlib.AsyncExitStack() as stack:
        start = lambda **env: stack.enter_async_context(running(specs, env, conf))
        pinned = [await start(KERNEL_REMOTE_HOST='host1') for _ in range(2)]
        assert {host_of(km) for km, _ in pinned} == {'host1'}
        rest = await asyncio.gather(*(start() for _ in range(3)))
        assert sorted(host_of(km) for km, _ in rest) == ['host2', 'host3', 'host4']
        victim = next(km for km, _ in rest if host_of(km) == 'host3')
        os.kill(victim.provisioner.fields['pid'], signal.SIGKILL)
        await victim.provisioner.wait()
        assert host_of((await start())[0]) == 'host3'
    assert not shared().ledger.load

async def test_a_kernelspec_cannot_choose_the_algorithm(spec, caplog):
    p = DistributedProvisioner(kernel_id='42', load_balancing_algorithm='least-connection')
    assert p.load_balancing_algorithm == 'round-robin' and 'load_balancing_algorithm' in caplog.text

async def test_a_pin_must_be_one_of_the_hosts(spec):
    with pytest.raises(LaunchError, match="KERNEL_REMOTE_HOST='localhost' is not among the hosts") as e:
        async with running(spec(), dict(KERNEL_REMOTE_HOST='localhost')): pass
    assert e.value.status_code == 400

# Users

@pytest.mark.parametrize('config, user, why', [
    (dict(), 'root', 'unauthorized_users'), (dict(authorized_users={'grace'}), 'ada', 'authorized_users'),
    (dict(unauthorized_users={'ada'}, authorized_users={'ada'}), 'ada', 'unauthorized_users')])
async def test_users_are_refused_before_anything_runs(spec, hosts, config, user, why):
    with hosts.nothing_left():
        with pytest.raises(LaunchError, match=f"'{user}'.*'Python SSH'.*{why}") as e:
            async with running(spec(), dict(KERNEL_USERNAME=user), config): pass
        assert e.value.status_code == 403

async def test_a_kernelspec_adds_to_unauthorized_users(spec):
    for user in 'root', 'eve':
        with pytest.raises(LaunchError, match='unauthorized_users'):
            async with running(spec(unauthorized_users=['eve']), dict(KERNEL_USERNAME=user)): pass

@pytest.mark.parametrize('config, var, own, lists', [
    (dict(), None, None, 'the default; GP_UNAUTHORIZED_USERS= empties it'),
    (dict(), 'root,eve', None, 'GP_UNAUTHORIZED_USERS'),
    (dict(), '', ['root'], 'kernel.json'),
    (dict(unauthorized_users={'root'}), '', ['root'], 'c.DistributedProvisioner.unauthorized_users; kernel.json')])
async def test_root_learns_which_lists_it_stands_on(spec, monkeypatch, config, var, own, lists):
    if var is not None: monkeypatch.setenv('GP_UNAUTHORIZED_USERS', var)
    with pytest.raises(LaunchError,
            match=re.escape(f'in unauthorized_users ({lists}). Set KERNEL_USERNAME to the name of the person, or '
            f'take root off')):
        async with running(spec(**dict(unauthorized_users=own) if own else {}), dict(KERNEL_USERNAME='root'), config):
            pass

async def test_root_is_told_what_to_do_and_others_are_not(spec, monkeypatch):
    remedies = 'Set KERNEL_USERNAME to the name of the person', 'GP_UNAUTHORIZED_USERS= '
    for user in 'root', 'eve':
        with pytest.raises(LaunchError, match='unauthorized_users') as e:
            async with running(spec(unauthorized_users=['eve']), dict(KERNEL_USERNAME=user)): pass
        assert [o in str(e.value) for o in remedies] == [user == 'root']*2
    monkeypatch.setenv('GP_UNAUTHORIZED_USERS', '')
    async with running(spec(unauthorized_users=['eve']), dict(KERNEL_USERNAME='root')) as (km, kc):
        assert await value(kc, '__import__("os").environ["KERNEL_USERNAME"]') == 'root'

# Ports

async def test_port_range(spec):
    async with running(spec(port_range='41000..42000')) as (km, _):
        assert all(41000 <= p <= 42000 for p in [*km.ports, km.provisioner.fields.get('comm_port', 41000)])

@pytest.mark.parametrize('bad', ['9..3', 'abc', '40000..40100', '80..2000', '60000..70000'])
async def test_bad_port_ranges(bad):
    with pytest.raises(LaunchError, match='port_range'): DistributedProvisioner(kernel_id='42', port_range=bad)

async def test_min_port_range_size(monkeypatch):
    monkeypatch.setenv('GP_MIN_PORT_RANGE_SIZE', '100')
    assert DistributedProvisioner(kernel_id='42', port_range='40000..40100').port_range == '40000..40100'

# Time

async def hang(specs, hosts, **env):
    "A launch that never reports fails after the 3 s that it is given"
    change_argv(specs, lambda _: ['sh', '-c', 'echo waiting for Godot; sleep 1000'])
    t = Timer()
    with hosts.nothing_left():
        with pytest.raises(LaunchError, match='(?s)did not start within 3 s.*waiting for Godot'):
            async with running(specs, env): pass
    assert 3 < t < 17

async def test_launch_timeout(spec, hosts, monkeypatch):
    monkeypatch.setenv('GP_LAUNCH_TIMEOUT', '3')
    await hang(spec(launch_timeout=None), hosts)

async def test_kernel_launch_timeout(spec, hosts): await hang(spec(), hosts, KERNEL_LAUNCH_TIMEOUT='3')

@pytest.mark.parametrize('bad', ['soon', '-1', '0', 'nan', 'inf'])
async def test_bad_kernel_launch_timeout(spec, bad):
    with pytest.raises(LaunchError, match='start request'):
        async with running(spec(), dict(KERNEL_LAUNCH_TIMEOUT=bad)): pass

async def test_connect_timeout_moves_on_to_the_next_host(spec, hosts, monkeypatch):
    monkeypatch.setenv('GP_CONNECT_TIMEOUT', '1')
    hosts.client.alias('silent', HostName=hosts[0].address, Port=hosts[0].port, User=hosts[0].user,
        IdentityFile=hosts.client.key,
        UserKnownHostsFile=hosts.client.known_hosts)
    hosts[0].hang()
    t = Timer()
    async with running(spec(remote_hosts=['silent', 'host2'])) as (km, _): assert host_of(km) == 'host2' and t < 20
    with pytest.raises(LaunchError, match='no answer|closed the connection'):
        async with running(spec(remote_hosts=['silent', 'host2']), dict(KERNEL_REMOTE_HOST='silent')): pass

async def test_unreachable_timeout(spec, hosts, caplog):
    async with running(spec(remote_hosts=['host4']), config=dict(unreachable_timeout=5, connect_timeout=1)) as (km, _):
        hosts['host4'].stop()
        await asyncio.sleep(1)
        assert await km.is_alive()
        assert await asyncio.wait_for(km.provisioner.wait(), 20) == 255
        assert not await km.is_alive() and 'is lost' in caplog.text
        hosts['host4'].start()
    await until(lambda: not hosts['host4'].kernels(), 30, 'the lost kernel ended')

async def test_orphan_timeout(spec, hosts):
    code = f'''
import asyncio, os
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
async def main():
    specs = KernelSpecManager(kernel_dirs=[{str(spec(remote_hosts=['host1']).kernel_dirs[0])!r}])
    km = AsyncKernelManager(kernel_name='ssh_python', kernel_spec_manager=specs)
    await km.start_kernel()
    print(km.provisioner.fields['pid'], flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())'''
    with hosts.nothing_left(30, HABITS):
        out = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, GP_ORPHAN_TIMEOUT='2'),
            capture_output=True, text=True, timeout=60)
        pid = int(out.stdout)
        assert psutil.pid_exists(pid)
        await until(lambda: not psutil.pid_exists(pid), 20, 'the orphan ends')

# The way of the launch message

async def test_response_port_and_retries(spec, hosts, monkeypatch):
    own = [a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        if not a[4][0].startswith('127.')]
    if not own:
        own = [a.address for i in psutil.net_if_addrs().values() for a in i if a.family == socket.AF_INET
            and not a.address.startswith('127.')]
    ip = own[0]
    with socket.socket() as taken, socket.socket() as taken2:
        for s in (taken, taken2): s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((ip, 0)); taken.listen()
        port = taken.getsockname()[1]
        async with running(spec(remote_hosts=['host1']), config=dict(response_ip=ip, response_port=port)) as (km, _):
            assert [c.laddr.port for c in psutil.Process().net_connections() if c.status == 'LISTEN'
                and c.laddr.ip == ip and port < c.laddr.port <= port+10]
        with pytest.raises(LaunchError, match='GP_RESPONSE_PORT_RETRIES'):
            async with running(spec(remote_hosts=['host1']), config=dict(response_ip=ip, response_port=port,
                    response_port_retries=0)):
                pass
    with pytest.raises(LaunchError, match='GP_PROHIBITED_LOCAL_IPS'):
        async with running(spec(remote_hosts=['host1']), config=dict(response_ip=ip,
                prohibited_local_ips=[ip.replace('.', r'\.')])):
            pass
    async with running(spec(remote_hosts=['host1']), config=dict(response_ip=ip, response_addr_any=True,
            response_port=port+50)):
        assert [c for c in psutil.Process().net_connections() if c.status == 'LISTEN' and c.laddr.ip == '0.0.0.0'
            and c.laddr.port >= port+50]

async def test_tunneling(spec, hosts):
    await asyncio.to_thread(forget)   # connections that other tests made with other logins
    async with running(spec(remote_hosts=['host1']), config=dict(tunneling_enabled=True)) as (km, kc):
        info = km.get_connection_info()
        assert info['ip'] == '127.0.0.1' and not set(km.ports) & {km.provisioner.fields[k]
            for k in ('shell_port', 'iopub_port')}
        assert hosts[0].connections() == 1
        assert await value(kc, '1+1') == 2
        before = km.ports
        await km.restart_kernel(now=True)
        await kc.wait_for_ready(timeout=60)
        assert km.ports == before

async def test_tunneling_where_the_server_does_not_forward(spec, hosts):
    "The bytes go through the session, so nothing has to be forwarded"
    await asyncio.to_thread(forget)
    hosts[0].options = dict(AllowTcpForwarding='no')
    hosts[0].restart_sshd()
    async with running(spec(remote_hosts=['host1']), config=dict(tunneling_enabled=True)) as (km, kc):
        assert await value(kc, '1+1') == 2

async def test_tunneling_where_there_is_one_session(spec, hosts):
    "Another host takes over; without one, the message says what to change; once that is done, it works"
    await asyncio.to_thread(forget)
    words = r"host host1 \(user \S+\): a second session on the connection cannot be had \(.+\)\. " \
        "Tunnelling needs two sessions on a connection: MaxSessions"
    hosts[0].options = dict(MaxSessions=1)
    hosts[0].restart_sshd()
    config = dict(tunneling_enabled=True)
    with hosts.nothing_left(ignore=HABITS):
        with pytest.raises(LaunchError, match=words):
            async with running(spec(remote_hosts=['host1']), config=config): pass
    async with running(spec(remote_hosts=['host1', 'host2']), config=config) as (km, _): assert host_of(km) == 'host2'
    hosts[0].options = {}
    hosts[0].restart_sshd()
    async with running(spec(remote_hosts=['host1']), config=config) as (km, kc): assert await value(kc, '1+1') == 2

async def test_gss_auth_names_the_extra(spec):
    with pytest.raises(LaunchError, match=r'gateway_provisioners_ssh\[gssapi\]'):
        async with running(spec(remote_hosts=['host1']), config=dict(gss_auth=True)): pass

async def test_remote_password(spec, tmp_path, monkeypatch):
    from gateway_provisioners_ssh.mock_ssh import MockHosts
    with MockHosts(1, password='open sesame') as mocks:
        known = mocks.config.read_text().replace('IdentityFile', '#IdentityFile')
        (tmp_path/'config').write_text(known)
        conf = dict(ssh_config=str(tmp_path/'config'))
        specs = spec(remote_hosts=['mock1'])
        with pytest.raises(LaunchError, match='no key, agent or password'):
            async with running(specs, config=conf): pass
        monkeypatch.setenv('GP_REMOTE_PWD', 'open sesame')
        async with running(specs, config=conf) as (km, kc):
            assert await value(kc, '1+1') == 2
            assert 'open sesame' not in repr(km.provisioner.login)

# Logs

async def test_kernel_log(spec, hosts, tmp_path):
    specs, conf = spec(remote_hosts=['host1']), dict(kernel_log_dir=str(tmp_path), kernel_log_max_bytes=16384)
    change_argv(specs, lambda argv: ['sh', '-c', 'yes flood | head -c 3000000; exec "$@"', 'sh', *argv])
    async with running(specs, config=conf) as (km, kc):
        log = tmp_path/f'kernel-{km.kernel_id}.log'
        assert log.stat().st_mode & 0o777 == 0o600
        assert 4096 <= sum(f.stat().st_size for f in tmp_path.glob('kernel-*.log*')) <= 16384
    assert not list(tmp_path.glob('kernel-*.log*'))
    with pytest.raises(LaunchError, match='cannot write the log /no/such/dir'):
        async with running(specs, config=dict(kernel_log_dir='/no/such/dir')): pass

# The kernel's environment

NASTY = ['"; touch {f}; "', '$(touch {f})', '`touch {f}`', "'; touch {f}; '", 'a\nb\n; touch {f}\n', 'ünï ☃ 漢', '\\',
    '${{HOME}} $HOME ~ * ?', 'x'*100_000, '', ' ', '\x01\x7f\t\r']

async def test_values_arrive_as_they_are_and_execute_nothing(spec, hosts, tmp_path):
    trap = tmp_path/'executed'
    values = {f'KERNEL_N{i}': o.format(f=trap) for i, o in enumerate(NASTY)} | dict(
        KERNEL_USERNAME=NASTY[0].format(f=trap))
    specs = spec(env=dict(PLAIN='$(touch ' + str(trap) + ')', HOMELIKE='${HOME}/x', DEFAULTED='${NO_SUCH:-`touch '
        + str(trap) + '`}', KERNEL_N0='spec'))
    async with running(specs, values) as (km, kc):
        env = await value(kc, 'dict(__import__("os").environ)')
        assert {k: env.get(k) for k in values} == values
        assert env['PLAIN'] == f'$(touch {trap})' and env['HOMELIKE'].startswith(str(hosts[0].lab.base)) \
            and env['DEFAULTED'] == f'`touch {trap}`'
        assert 'KERNEL_LAUNCH_SECRET' not in env and env['KERNEL_ID'] == km.kernel_id
    assert not trap.exists()

async def test_nothing_else_of_the_servers_environment(spec, monkeypatch):
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'x')
    monkeypatch.setenv('PROXY_URL', 'http://p')
    async with running(spec(), dict(JPY_SESSION_NAME='a.ipynb'),
            dict(inherited_envs=['PROXY_.*', 'JPY_SESSION_NAME'])) as (_, kc):
        env = await value(kc, 'dict(__import__("os").environ)')
        assert 'AWS_SECRET_ACCESS_KEY' not in env and env['PROXY_URL'] == 'http://p' \
            and env['JPY_SESSION_NAME'] == 'a.ipynb'

async def test_working_directory(spec, tmp_path, hosts):
    (d := tmp_path/"o'clock $(x)").mkdir()
    specs = spec(remote_hosts=['host1'])
    async with running(specs, dict(KERNEL_WORKING_DIR=str(d))) as (_, kc):
        assert await value(kc, '__import__("os").getcwd()') == str(d)
    async with running(specs, dict(KERNEL_WORKING_DIR='/no/such')) as (_, kc):
        assert await value(kc, '__import__("os").getcwd()') == str(hosts[0].home)

async def test_hostile_argv_in_a_kernelspec(spec, tmp_path, hosts):
    trap, specs = tmp_path/'executed', spec(remote_hosts=['host1'])
    words = [o.format(f=trap) for o in NASTY][:8]
    change_argv(specs, lambda _: [sys.executable, '-c',
        'import sys, json; print(json.dumps(sys.argv[1:])); sys.exit(3)', *words])
    with pytest.raises(LaunchError) as e:
        async with running(specs): pass
    assert json.dumps(words) in str(e.value) and not trap.exists()

# Every variable has its Enterprise Gateway name

@pytest.mark.parametrize('name', settings)
def test_variables_and_their_fall_back(name, monkeypatch):
    s = settings[name]
    monkeypatch.delenv(f'GP_{s.variable}', raising=False)
    plain = getattr(DistributedProvisioner(kernel_id='42'), name)
    monkeypatch.setenv(f'EG_{s.variable}', s.example)
    got = getattr(DistributedProvisioner(kernel_id='42'), name)
    assert got == s.kind(s.example) != plain
    monkeypatch.setenv(f'GP_{s.variable}', str(s.default))
    assert getattr(DistributedProvisioner(kernel_id='42'), name) == plain
    conf = DistributedProvisioner(kernel_id='42', config=Config(DistributedProvisioner={name: got}))
    assert getattr(conf, name) == got

@pytest.mark.parametrize('bad', ['a b', 'gpu1:99999', '', ',', '-oProxyCommand=x', 'a@', 'user@host:22:33'])
def test_bad_hosts(bad):
    with pytest.raises(LaunchError, match='remote_hosts'):
        DistributedProvisioner(kernel_id='42', config=Config(DistributedProvisioner=dict(remote_hosts=[bad])))

def test_a_misspelt_class_is_pointed_out(caplog):
    DistributedProvisioner(kernel_id='42', config=Config(DistributedProvsioner=dict(remote_hosts=['gpu1']),
        RemoteProvisionerBase=dict(a=1)))
    assert [o.getMessage() for o in caplog.records] == [
        'c.DistributedProvsioner has no effect; did you mean c.DistributedProvisioner?']

# Launchers of old

@pytest.mark.parametrize('tunnel', [False, True])
async def test_legacy_launchers_where_allowed(spec, hosts, tunnel, caplog):
    specs = spec(remote_hosts=['host1'])
    change_argv(specs, lambda _: LEGACY)
    async with running(specs, config=dict(allow_legacy_launchers=True, tunneling_enabled=tunnel)) as (km, kc):
        assert await value(kc, '6*7') == 42
        assert min([await interrupt(km, kc) for _ in range(3)]) < 4
    assert 'version 1' in caplog.text

async def test_new_launchers_work_where_legacy_ones_are_allowed(spec, hosts):
    async with running(spec(), config=dict(allow_legacy_launchers=True)) as (km, kc):
        assert await value(kc, '6*7') == 42 and 'pgid' in km.provisioner.fields

async def test_legacy_launchers_are_refused_by_default(spec, hosts):
    specs = spec(remote_hosts=['host1'])
    change_argv(specs, lambda _: LEGACY)
    with hosts.nothing_left():
        with pytest.raises(LaunchError, match='launcher ended|GP_ALLOW_LEGACY'):
            async with running(specs): pass
