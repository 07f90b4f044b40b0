"""The commands for people who run hosts, on real SSH servers: every fault that `check` must name with its remedy,
kernels of other and of killed applications, logs after the end, drained hosts."""
import asyncio, contextlib, json, os, pty, re, shutil, subprocess, sys, zipfile
import pytest
from jupyter_client import AsyncMultiKernelManager
from traitlets.config import Config
from gateway_provisioners_ssh import operators
from gateway_provisioners_ssh.operators import check, drain, site
from gateway_provisioners_ssh.provisioner import HostApplication, shared
from gateway_provisioners_ssh.remote import spawn
from gateway_provisioners_ssh.errors import LaunchError
from forks import ssh_spec
from test_impersonation import kernel_of, remote as impersonated
from kernels import BIN, client_of, taken_ports, value
from pace import Timer, until

@pytest.fixture
def remote(remote, tmp_path, monkeypatch):
    monkeypatch.setenv('GP_KERNEL_LOG_DIR', str(tmp_path))
    monkeypatch.setenv('JUPYTER_PATH', str(remote.prefix/'share/jupyter'))
    return remote

def sh(*argv, status=0, **env):
    "What a command says on standard output; standard error is in `sh.err`"
    r = ssh_spec(*argv, env=os.environ | env, timeout=120)
    assert r.returncode == status and 'Traceback' not in r.stderr, (r.returncode, r.stdout, r.stderr)
    sh.err = r.stderr
    return r.stdout

async def command(*argv, **kw): return await asyncio.to_thread(sh, *argv, **kw)
async def as_json(*argv, **kw): return json.loads(await command(*argv, '--json', **kw))

def problems(report): return {o.what: o for o in report.findings if o.state != 'ok'}

async def checked(*hosts, python=sys.executable, **settings):
    settings.setdefault('connect_timeout', 2)
    async with site(hosts, Config(DistributedProvisioner=settings), python=python) as s: return await check(s)

# check

async def test_hosts_that_are_fine(remote):
    reports = await checked(*remote.lab.names)
    assert all(o.usable and not (set(problems(o)) - {'cores', 'memory'}) for o in reports), [problems(o)
        for o in reports]
    assert [o.host for o in reports] == remote.lab.names
    for o in 'latency', 'interpreter', 'ipykernel', 'log directory', 'clock', 'cores', 'memory':
        assert o in [f.what for f in reports[0].findings]

def broken_name(lab): lab.client.alias('host1', HostName='no-such-host.invalid')
def broken_sshd(lab): lab[0].stop()
def broken_silence(lab): lab[0].hang()
def broken_new_key(lab): lab[0].change_host_key()
def broken_unknown_key(lab):
    for a in lab[0].addresses: lab.client.known.pop(f'[{a}]:{lab[0].port}')
    lab.client.write()
def broken_login(lab): lab[0].refuse_keys()

@pytest.mark.parametrize('breaks, what, said, remedy', [
    (broken_name, 'name', 'no-such-host.invalid is not known', 'HostName in ~/.ssh/config'),
    (broken_sshd, 'reachable', 'nothing listens', 'Is sshd running there'),
    (broken_silence, 'reachable', 'no answer from', 'Is the host up'),
    (broken_new_key, 'host key', 'host key has changed', 'the old key is to be removed'),
    (broken_unknown_key, 'host key', 'is unknown', 'Log in by hand'),
    (broken_login, 'login', 'refused the login', 'ssh-copy-id')], ids=lambda o: o.__name__ if callable(o) else '')
async def test_what_keeps_a_host_from_being_reached(remote, breaks, what, said, remedy):
    lab = remote.lab
    breaks(lab)
    try: bad, good = await checked('host1', 'host2', connect_timeout=.7)
    finally:
        lab[0].repair()
        lab[0].publish()
    assert good.usable and not bad.usable
    last = bad.findings[-1]
    assert (last.what, last.state) == (what, 'failed') and said in last.text and remedy in last.remedy, last
    assert all(o.state == 'ok' for o in bad.findings[:-1])

async def test_no_python_for_the_agent(remote, tmp_path):
    for o in 'sh', 'cat': (tmp_path/o).symlink_to(shutil.which(o))
    h = remote.lab[0]
    h.env = dict(PATH=str(tmp_path))
    h.restart_sshd()
    report, = await checked('host1', python='python')
    assert (problems(report)['Python'].state == 'failed'
            and 'apt-get install python3' in problems(report)['Python'].remedy)

async def test_interpreters(remote, tmp_path):
    (bare := tmp_path/'bare').mkdir()
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', bare], check=True)
    for python, what, said, remedy in [('~/k/bin/python', 'interpreter', 'not found',
                                        "jupyter ssh-spec setup host1 --venv '~/k'"),
                               ('no-such-python', 'interpreter', 'not found in', 'jupyter ssh-spec setup host1'),
                               (f'{bare}/bin/python', 'ipykernel', "No module named 'ipykernel'",
                                f"ssh host1 '{bare}/bin/python -m pip install ipykernel'")]:
        report, = await checked('host1', python=python)
        found = problems(report)[what]
        assert found.state == 'failed' and said in found.text and remedy in found.remedy, found

@pytest.mark.parametrize('path, why', [('/no/such', 'No such file'), ('/proc/1', '')])
async def test_log_directory(remote, path, why):
    report, = await checked('host1', kernel_log_dir=path)
    found = problems(report)['log directory']
    assert (found.state == 'failed' and why in found.text and 'GP_KERNEL_LOG_DIR' in found.remedy
            and path in found.remedy)

async def test_log_directory_that_is_full(net_remote):
    h = net_remote.lab[0]
    h.fill_disk('/tmp/full')
    try: report, = await checked('node1', kernel_log_dir='/tmp/full')
    finally: h.free_disk('/tmp/full')
    found = problems(report)['log directory']
    assert (found.state == 'failed' and ('full' in found.text or 'No space' in found.text)
            and 'GP_KERNEL_LOG_DIR' in found.remedy)

async def test_ports(remote, monkeypatch):
    monkeypatch.setenv('GP_MIN_PORT_RANGE_SIZE', '5')
    with taken_ports(20, '') as lowest:
        report, = await checked('host1', port_range=f'{lowest}..{lowest+19}')
        found = problems(report)['ports']
        assert found.state == 'failed' and '0 of 20 tried' in found.text and 'GP_PORT_RANGE' in found.remedy
    report, = await checked('host1', port_range=f'{lowest}..{lowest+19}')
    assert 'ports' not in problems(report) and 'ports' in [o.what for o in report.findings]

async def test_the_way_back(net_remote):
    h = net_remote.lab[0]
    way = dict(response_ip=net_remote.lab.address)
    report, = await checked('node1', **way)
    assert 'way back' not in problems(report) and 'way back' in [o.what for o in report.findings]
    h.firewall(incoming=(22,))
    report, = await checked('node1', **way)
    h.no_firewall()
    found = problems(report)['way back']
    assert (found.state == 'failed' and 'GP_ENABLE_TUNNELING=True' in found.remedy
            and net_remote.lab.address in found.remedy)
    report, = await checked('node1')
    assert 'way back' not in [o.what for o in report.findings]   # where nothing goes that way

async def test_a_tunnel_that_cannot_be(remote):
    h = remote.lab[0]
    h.options = dict(MaxSessions='1')
    h.restart_sshd()
    report, = await checked('host1', tunneling_enabled=True)
    assert problems(report)['tunnel'].state == 'failed' and 'MaxSessions' in problems(report)['tunnel'].remedy

async def test_clock(net_remote):
    h = net_remote.lab[0]
    try: h.skew(3600)
    except FileNotFoundError as e: pytest.skip(str(e))
    await until(lambda: not [o for o in h.processes() if o.name == 'gpssh-agent'],
                what='the end of the agent of before')
    report, = await checked('node1')
    found = problems(report)['clock']
    assert found.state == 'warning' and 'ahead' in found.text and 'timedatectl' in found.remedy and report.usable

async def test_gpus_and_drained(remote, tmp_path):
    (bin := tmp_path/'bin').mkdir()
    (bin/'nvidia-smi').write_text('#!/bin/sh\nprintf "0, GPU-a, NVIDIA L4, 23034, 100, 0\\n1, GPU-b, NVIDIA L4, 23034, '
                                  '100, 0\\n"\n')
    (bin/'nvidia-smi').chmod(0o755)
    h = remote.lab[0]
    h.env = dict(PATH=f'{bin}:{BIN}:/usr/bin:/bin')
    h.restart_sshd()
    async with site(['host1']) as s: await drain(s)
    try: report, = await checked('host1')
    finally:
        async with site(['host1']) as s: await drain(s, False)
    assert [o.text for o in report.findings if o.what == 'GPUs'] == ['2 x NVIDIA L4']
    assert 'jupyter ssh-spec undrain host1' in problems(report)['drained'].remedy and report.usable

async def test_dead_hosts_do_not_add_up(remote):
    "Fifty hosts, of which ten say nothing: as long as one dead host takes, not ten"
    lab = remote.lab
    lab[0].hang()
    for i in range(40): lab.client.alias(f'alive{i}', **lab.client.aliases[lab[1 + i % 3].name])
    for i in range(10): lab.client.alias(f'dead{i}', **lab.client.aliases['host1'])
    async def took(hosts):
        t = Timer()
        reports = await checked(*hosts, connect_timeout=3)
        return float(t), reports
    try:
        alive, _ = await took([f'alive{i}' for i in range(40)])
        one, _ = await took(['dead0'])
        both, reports = await took([f'{k}{i}' for k, n in (('alive', 40), ('dead', 10)) for i in range(n)])
    finally:
        lab[0].unhang()
        for o in [o for o in lab.client.aliases if o.startswith(('alive', 'dead'))]: lab.client.aliases.pop(o)
        lab.client.write()
    assert [o.host for o in reports if not o.usable] == [f'dead{i}' for i in range(10)]
    assert both < alive + 3*one, (alive, one, both)   # each dead one after the other would be 10*one

async def test_command_check(remote):
    said = await as_json('check', 'host1', 'host2', '--kernel', 'ssh_python')
    assert said['usable'] == 2 and all(o['usable'] and o['figures']['cores'] for o in said['hosts'])
    out = await command('check', '--kernel', 'ssh_python')
    assert [o.split()[0] for o in out.splitlines()[1:5]] == remote.lab.names and '\x1b' not in out
    remote.lab[1].refuse_keys()
    out = await command('check', '--kernel', 'ssh_python', status=1)
    assert re.search(r'host2: login: .* refused the login\n    .*ssh-copy-id', out)
    assert 'host1: latency' in await command('check', 'host1', '--verbose')

@pytest.mark.parametrize('argv, why', [(['check', '--kernel', 'none'], "no kernelspec 'none'"),
    (['check', 'a b'], 'host name'), (['check', '--no'], 'no option'), (['ps', '--python', 'x'], 'no option'),
    (['logs'], 'which kernel'), (['logs', 'a', 'b'], 'one kernel'), (['logs', 'a', '-n', 'x'], 'lines'),
    (['stop'], 'name kernels'), (['stop', 'a', '--orphans'], 'not both'), (['drain'], 'which hosts'),
    (['setup'], 'which hosts'), (['setup', 'host1', '--package=--index-url'], 'is no package')])
def test_mistakes(remote, argv, why):
    sh(*argv, status=1)
    assert len(sh.err.splitlines()) == 1 and why in sh.err, sh.err

def test_hosts_of_the_configuration_and_the_environment(remote, tmp_path):
    hosts = lambda **env: [o['host'] for o in json.loads(sh('check', '--json', status=1, **env))['hosts']]
    dead = '127.0.0.99:1'
    assert hosts(GP_REMOTE_HOSTS=f'ada@{dead}') == [f'ada@{dead}']
    (conf := tmp_path/'config').mkdir()
    (conf/'jupyter_server_config.py').write_text(f'c.DistributedProvisioner.remote_hosts = '
                                                 f'["bob@{dead}"]\nc.ServerApp.port = 5\n')
    assert hosts(GP_REMOTE_HOSTS=f'ada@{dead}', JUPYTER_CONFIG_DIR=str(conf)) == [f'bob@{dead}']

# Kernels of other applications

APPLICATION = '''
import os, sys
from jupyter_client import KernelManager
km = KernelManager(kernel_name='ssh_python')
km.start_kernel(env=os.environ | dict(KERNEL_REMOTE_HOST=sys.argv[1]))
kc = km.client(); kc.start_channels(); kc.wait_for_ready(timeout=60)
print(km.provisioner.kernel_id, flush=True)
sys.stdin.read()
'''

@contextlib.asynccontextmanager
async def application(host):
    "Another host application with a kernel on `host`: the process, and the kernel's id"
    p = await asyncio.create_subprocess_exec(sys.executable, '-c', APPLICATION, host, stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE)
    try: yield p, (await asyncio.wait_for(p.stdout.readline(), 90)).decode().strip()
    finally:
        if p.returncode is None: p.kill()
        await p.wait()

async def orphaned(kernel_id):
    async def found(): return [o for o in (await as_json('ps'))['kernels'] if o['orphan'] and o['id'] == kernel_id]
    for _ in range(100):
        if await found(): return
    raise AssertionError('no orphan')

async def test_ps_logs_and_stop_of_killed_and_living_applications(remote, monkeypatch):
    monkeypatch.setenv('GP_REMOTE_HOSTS', ','.join(remote.lab.names))
    async with application('host1') as (a, first), application('host2') as (b, second):
        found = {o['id']: o for o in (await as_json('ps'))['kernels']}
        assert {first: 'host1', second: 'host2'} == {k: o['host'] for k, o in found.items()}
        k = found[first]
        assert (k['user'], k['spec'], k['watched'], k['orphan'], k['running']) == ('ada', 'Python SSH', True, False,
            True)
        assert k['rss'] > 10_000_000 and k['cpu'] > 0 and k['age'] is not None and 'pid' in k['application']
        assert 'there are no orphans' in await command('stop', '--orphans')
        a.kill(); await a.wait()
        await orphaned(first)
        out = await command('ps')
        assert re.search(rf'{first} .* orphan', out) and re.search(rf'{second} .* watched', out)
        assert 'kernel' in await command('logs', first[:9])
        assert f'kernel {first} on host1 has ended' in await command('stop', '--orphans', '--yes')
        assert [o['id'] for o in (await as_json('ps'))['kernels']] == [second] and b.returncode is None
        assert '[ended with status' in await command('logs', first[:9], '-n', '1')   # also after it has ended
        assert f'kernel {second} on host2 has ended' in await command('stop', second[:9])
        assert (await as_json('ps'))['kernels'] == []

async def test_ps_without_one_of_the_hosts(remote):
    remote.lab[1].stop()
    said = await as_json('ps', 'host1', 'host2', status=1)
    assert [o['host'] for o in said['unreachable']] == ['host2'] and 'sshd' in said['unreachable'][0]['remedy']
    await command('ps', 'host1', 'host2', status=1)
    assert 'host2: nothing listens' in sh.err

async def test_logs_follow(remote, monkeypatch):
    monkeypatch.setenv('GP_REMOTE_HOSTS', 'host1')
    async with remote.kernel() as k:
        p = await asyncio.create_subprocess_exec(BIN/'jupyter-ssh-spec', 'logs', k.km.provisioner.kernel_id, '-f',
                                                 '-n0', stdout=subprocess.PIPE)
        async def write():   # what it writes before it is followed is not seen
            while p.returncode is None:
                await k.client.execute_interactive('import os; os.write(1, b"to the log\\n")', timeout=30)
        writing = asyncio.ensure_future(write())
        assert await asyncio.wait_for(p.stdout.readline(), 60) == b'to the log\n'
        writing.cancel()
        await asyncio.wait([writing])
        os.kill(k.km.provisioner.fields['pid'], 9)
        rest = await asyncio.wait_for(p.stdout.read(), 60)
        assert b'[ended with status -9]' in rest and await p.wait() == 0

async def test_a_stopped_kernel_is_not_restarted(remote, monkeypatch):
    "Not by what restarts kernels that died; by its user it is"
    monkeypatch.setenv('GP_REMOTE_HOSTS', 'host1')
    mkm = AsyncMultiKernelManager(kernel_manager_class='jupyter_client.ioloop.AsyncIOLoopKernelManager',
                                  config=Config(DistributedProvisioner=dict(remote_hosts=['host1'])))
    kid = await mkm.start_kernel(kernel_name='ssh_python')
    km, dead = mkm.get_kernel(kid), asyncio.Event()
    try:
        async with client_of(km): pass
        km._restarter.time_to_dead = km._restarter.poll_interval = .2
        km.stop_restarter(); km.start_restarter()
        km.add_restart_callback(dead.set, 'dead')
        restarted = []
        km.add_restart_callback(lambda: restarted.append(1), 'restart')
        await command('stop', kid)
        await asyncio.wait_for(dead.wait(), 60)
        assert not restarted and not await km.is_alive()
        await mkm.restart_kernel(kid)
        async with client_of(km) as kc: assert await value(kc, '6*7') == 42
        assert km._restarter.restart_limit > 0
    finally: await mkm.shutdown_kernel(kid, now=True)

def test_stop_asks_first_on_a_terminal(remote, monkeypatch):
    async def make():
        async with site(['host1']) as s:
            conn = await s.pool.connection(s.hosts[0], s.login)
            p = await spawn(await conn.session(), conn.wait_connected,
                            f'{os.environ["GP_KERNEL_LOG_DIR"]}/kernel-asked.log', argv=['sleep', '1000'], env={},
                            max_bytes=10000, title='kernel asked of ada')
            p.forget()
            return p.pid
    pid = asyncio.run(make())
    def answer(word):
        "What a terminal shows, and the exit status"
        child, fd = pty.fork()
        if not child:
            try: os.execv(BIN/'jupyter-ssh-spec', ['jupyter-ssh-spec', 'stop', 'asked', '--remote-hosts', 'host1'])
            finally: os._exit(99)
        out = b''
        with contextlib.suppress(OSError):
            while part := os.read(fd, 4096):
                out += part
                if b'[y/N]' in part: os.write(fd, word.encode() + b'\n')
        return out.decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, status = answer('n')
    assert 'End this kernel? [y/N]' in out and status == 1 and os.kill(pid, 0) is None
    out, status = answer('y')
    assert 'has ended' in out and status == 0
    with pytest.raises(ProcessLookupError): os.kill(pid, 0)

async def test_kernels_that_run_as_their_users(impersonated, monkeypatch):
    monkeypatch.setenv('GP_REMOTE_HOSTS', 'gateway@node1')
    async with kernel_of(impersonated, 'ada') as (km, kc):
        assert (await as_json('ps'))['kernels'] == []
        k, = (await as_json('ps', '--as', 'ada'))['kernels']
        assert (k['id'], k['user'], k['runs_as'], k['watched']) == (km.kernel_id, 'ada', 'ada', True)
        assert f'kernel {km.kernel_id} of ada' in await command('logs', km.kernel_id, '--as', 'ada', '-n', '100')
        await command('drain', 'gateway@node1')
        try:
            with pytest.raises(LaunchError, match='drained'):
                async with kernel_of(impersonated, 'grace'): pass
        finally: await command('undrain', 'gateway@node1')
        assert 'has ended' in await command('stop', km.kernel_id, '--as', 'ada')
        assert not await km.is_alive()

# drain

async def test_drained_hosts_get_no_kernels(remote):
    await command('drain', 'host1')
    try:
        async with remote.on('host1', 'host2') as a, remote.on('host1', 'host2') as b:
            assert [str(o.km.provisioner.conn.host) for o in (a, b)] == ['host2', 'host2']
            await command('drain', 'host2')
            try:
                with pytest.raises(LaunchError,
                                   match=r'(?s)no host could start the kernel:.*host1 .*is drained.*undrain '
                                         r'host1.*host2 .*is drained') as e:
                    async with remote.on('host1', 'host2'): pass
                assert e.value.status_code == 503
                with pytest.raises(LaunchError, match='host host1 .*drained.*jupyter ssh-spec undrain host1'):
                    async with remote.on('host1', 'host2', env=dict(KERNEL_REMOTE_HOST='host1')): pass
                assert await value(a.client, '6*7') == 42   # what runs goes on
            finally: await command('undrain', 'host2')
    finally: await command('undrain', 'host1')
    async with remote.on('host1', env=dict(KERNEL_REMOTE_HOST='host1')) as k:
        assert str(k.km.provisioner.conn.host) == 'host1'

async def test_a_restart_leaves_a_drained_host(remote):
    async with remote.on('host1', 'host2') as k:
        assert str(k.km.provisioner.conn.host) == 'host1'
        await command('drain', 'host1')
        try:
            await k.km.restart_kernel(now=True)
            assert str(k.km.provisioner.conn.host) == 'host2'
        finally: await command('undrain', 'host1')

async def test_drain_says_which_host_is_not_marked(remote):
    remote.lab[1].stop()
    said = await as_json('drain', 'host1', 'host2', status=1)
    assert [o['drained'] for o in said['hosts']] == [True, None]
    await command('undrain', 'host1')

# Room

async def test_memory_that_no_host_has(remote):
    with pytest.raises(LaunchError, match='GiB of memory are available, 102400.0 wanted'):
        async with remote.on('host1', 'host2', env=dict(KERNEL_MIN_MEMORY='100T')): pass
    for bad in dict(KERNEL_MIN_MEMORY='much'), dict(KERNEL_GPUS='all'):
        with pytest.raises(LaunchError, match=next(iter(bad))) as e:
            async with remote.on('host1', env=bad): pass
        assert e.value.status_code == 400

async def test_gpus_choose_the_host(remote, tmp_path):
    (bin := tmp_path/'bin').mkdir()
    (bin/'nvidia-smi').write_text('#!/bin/sh\necho 0, GPU-a, NVIDIA L4, 23034, 100, 0\n')
    (bin/'nvidia-smi').chmod(0o755)
    remote.lab[1].env = dict(PATH=f'{bin}:{BIN}:/usr/bin:/bin')
    remote.lab[1].restart_sshd()
    async with remote.on('host1', 'host2', env=dict(KERNEL_GPUS='1')) as k:
        assert (str(k.km.provisioner.conn.host) == 'host2'
                and await value(k.client, '__import__("os").environ["CUDA_VISIBLE_DEVICES"]') == '0')
        with pytest.raises(LaunchError, match='0 of 1 GPUs are free, 1 wanted'):
            async with remote.on('host1', 'host2', env=dict(KERNEL_GPUS='1')): pass
    # what host2 said last is that it has none; it is asked all the same, as the only one there is
    async with remote.on('host2', env=dict(KERNEL_GPUS='1')): pass

async def test_least_load_counts_kernels_of_other_applications(remote):
    "As soon as the hosts have said so; no start waits for it"
    config = dict(load_balancing_algorithm='least-load')
    async with application('host1'), application('host1'):
        async with remote.on('host1', 'host2', config=config) as a, remote.on('host1', 'host2', config=config) as b:
            assert [str(o.km.provisioner.conn.host) for o in (a, b)] == ['host2', 'host2']
            await until(lambda: shared().reports.current().get('host1')
                        and shared().reports.current()['host1'].others == 2, what='the report of host1')

async def test_no_start_waits_for_figures(remote, monkeypatch):
    asked = []
    async def never_told(self, host, login, pythons):
        asked.append(host)
        await asyncio.Event().wait()
    monkeypatch.setattr(HostApplication, '_ask_report', never_told)
    async with remote.on('host1', 'host2', config=dict(load_balancing_algorithm='least-load')): pass
    assert set(asked) == {'host1', 'host2'}

# setup

def wheel(directory, name, version, text=''):
    "A wheel of one module"
    with zipfile.ZipFile(directory/f'{name}-{version}-py3-none-any.whl', 'w') as z:
        z.writestr(f'{name}/__init__.py', f'__version__ = {version!r}\n{text}')
        z.writestr(f'{name}-{version}.dist-info/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        z.writestr(f'{name}-{version}.dist-info/WHEEL',
                   'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{name}-{version}.dist-info/RECORD', '')

@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index of two wheels, of this machine alone"
    (tmp_path/'index').mkdir()
    wheel(tmp_path/'index', 'ipykernel', '6.99')
    wheel(tmp_path/'index', 'extra', '1.0')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path/'index'))
    return tmp_path/'index'

def test_setup_offline(remote, index):
    "On two hosts, whose environment is made and checked; nothing else stays there"
    out = sh('setup', 'host1', 'host2', '--offline', '--package', 'extra', '--venv', '~/off')
    assert "--remote-hosts host1,host2 --python '~/off/bin/python'" in out and out.count('ipykernel 6.99') == 2
    for o in 'host1', 'host2':
        h = remote.lab[o]
        assert subprocess.run([h.home/'off/bin/python', '-c', 'import ipykernel, extra'], env={}).returncode == 0
        assert (not [f for f in h.files() if f.endswith('.whl') and '/off/' not in f]
                and not list((h.home/'.cache').rglob('*.whl')))
    # again, in the environment that is there
    assert 'ipykernel 6.99' in sh('setup', 'host1', '--offline', '--venv', '~/off')
    sh('setup', 'host1', '--offline', '--venv', '~/off', '--package', 'nowhere', status=1)
    assert 'pip here cannot download ipykernel nowhere' in sh.err and 'wheel' in sh.err

def test_setup_where_the_host_has_no_index(remote):
    remote.lab[2].env = dict(PIP_NO_INDEX='1')
    remote.lab[2].restart_sshd()
    sh('setup', 'host3', '--package', 'extra', status=1)
    assert 'host3: pip on the host cannot install ipykernel extra' in sh.err and '--offline' in sh.err

def test_setup_where_python_lacks_venv(remote, index, tmp_path, monkeypatch):
    "pip goes there from here; without one here, the remedy is said"
    (bin := tmp_path/'bin').mkdir()
    (bin/'python3').write_text(f'#!/bin/sh\ncase "$*" in *-m\\ venv*--without-pip*) ;; *-m\\ venv*) mkdir -p "$3"; '
                               f'echo "ensurepip is not available" >&2; exit 1;; esac\nexec {sys.executable} "$@"\n')
    (bin/'python3').chmod(0o755)
    h = remote.lab[3]
    h.env = dict(PATH=f'{bin}:/usr/bin:/bin')
    h.restart_sshd()
    if operators.bundled_pip(): assert 'ipykernel 6.99' in sh('setup', 'host4', '--offline', '--venv', '~/bare')
    async def without():
        monkeypatch.setattr(operators, 'bundled_pip', lambda: '')
        async with site(['host4']) as s: return await operators.setup(s, '~/other', offline=True)
    done, = asyncio.run(without()).values()
    assert 'ensurepip is not available' in done.what and 'apt-get install python3-venv' in done.remedy

def test_progress_and_colours_on_a_terminal(remote):
    child, fd = pty.fork()
    if not child:
        os.environ['TERM'] = 'xterm-256color'
        try: os.execv(BIN/'jupyter-ssh-spec', ['jupyter-ssh-spec', 'check', 'host1', 'host2'])
        finally: os._exit(99)
    out = b''
    with contextlib.suppress(OSError):
        while part := os.read(fd, 4096): out += part
    os.waitpid(child, 0)
    assert b'checking 2 hosts' in out and b'\x1b[32m' in out

def test_a_tile_for_each_host(tmp_path):
    env = dict(GP_REMOTE_HOSTS='fire, ada@Water:2222, fire')
    sh('install', '--prefix', tmp_path, '--tile-per-host', **env)
    kernels = tmp_path/'share/jupyter/kernels'
    of = {o.parent.name: json.loads(o.read_text()) for o in kernels.glob('*/kernel.json')}
    pinned = {k: (o['display_name'], o['metadata']['kernel_provisioner']['config'].get('remote_hosts'))
              for k, o in of.items()}
    assert pinned == {'ssh_python': ('Python SSH', None), 'ssh_python_fire': ('Python SSH on fire', ['fire']),
                      'ssh_python_ada-water-2222': ('Python SSH on ada@Water:2222', ['ada@Water:2222'])}
    shutil.rmtree(kernels/'ssh_python')
    sh('install', '--prefix', tmp_path, '--tile-per-host', status=1, **env)
    assert 'ssh_python_fire already; --replace' in sh.err and not (kernels/'ssh_python').exists()

def test_lists_and_weights_stay_in_a_kernelspec_as_they_were_given(tmp_path):
    (tmp_path/'hosts').write_text('fire\n')
    sh('install', '--prefix', tmp_path, '--remote-hosts', f'@{tmp_path}/hosts', '--remote-hosts', 'water*4')
    k = json.loads((tmp_path/'share/jupyter/kernels/ssh_python/kernel.json').read_text())
    assert k['metadata']['kernel_provisioner']['config']['remote_hosts'] == [f'@{tmp_path}/hosts', 'water*4']
    sh('install', '--prefix', tmp_path/'other', '--remote-hosts', f'@{tmp_path}/none', status=1)
    assert 'cannot be read: No such file' in sh.err
