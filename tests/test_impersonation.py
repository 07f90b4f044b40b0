"""Impersonation, with OS users and sudo on a real sshd host: the host application logs in as one user (`gateway`), and
each kernel is the process of the user it was started for. Hosts of their own /home and sudoers need root; so do these
tests."""
import asyncio, json, os, re, shutil, signal, sys
from contextlib import AsyncExitStack
import psutil, pytest
from conftest import need
from jupyter_client.kernelspec import KernelSpecManager
from gateway_provisioners_ssh.provisioner import DistributedProvisioner
from gateway_provisioners_ssh.errors import LaunchError
from installed import interrupted, run
from kernels import Remote, busy, forget, gone, interrupt, kill, printed, reply_to, value
from pace import Timer, until, within

RULE = 'gateway ALL=(ada, grace) NOPASSWD:SETENV: ALL'
HABITS = [r'/home.*/\.(ipython|cache|config|local/share/jupyter/runtime$)', r'/nbsignatures', r'/homes/[^/]*/\.']

@pytest.fixture
def remote(net, tmp_path, tmp_path_factory, monkeypatch):
    "Kernelspecs for the login `gateway` on node1, with sudo for ada and grace, readable by them"
    need(None if shutil.which('sudo') else 'sudo is not installed')
    node = net['node1']
    for user in ('gateway', 'ada', 'grace', 'eve'):
        if user not in node.users: node.add_user(user, key=user == 'gateway')
    node.sudoers(RULE)
    for o in (tmp_path_factory.getbasetemp(), *tmp_path.parents, tmp_path):
        if o.is_relative_to(tmp_path_factory.getbasetemp()): o.chmod(0o755)
    for user in ('ada', 'grace'):
        need(node.run('sh', '-c',
                      f'test -x {sys.executable} -a -r {tmp_path} || echo other users cannot read {sys.prefix}',
                      user=user).strip())
    r = Remote(net, tmp_path/'prefix', monkeypatch)
    monkeypatch.setenv('GP_IMPERSONATION_ENABLED', 'True')
    r.node, r.users = node, node.users
    r.install('--replace', hosts=['gateway@node1'])
    yield r
    node.sudoers('')
    forget()

def uid_of(pid): return psutil.Process(pid).uids().effective
def at(node, path):
    return (node.dir/'homes'/path.removeprefix('/home/') if path.startswith('/home/')
            else node.tmp/path.removeprefix('/tmp/'))
def owner(node, path): return (s := at(node, path).stat()).st_uid, s.st_mode & 0o777
# what the user's agent has of a kernel
def kept(remote, user, km): return f'/tmp/gpssh-{remote.users[user]}/k-{km.provisioner.process.id}'
def kernel_of(remote, user, name='ssh_python'): return remote.kernel(name, env=dict(os.environ, KERNEL_USERNAME=user))

async def test_the_kernel_is_the_users(remote):
    node, ada = remote.node, remote.users['ada']
    with remote.nothing_left(ignore=HABITS):
        async with kernel_of(remote, 'ada') as (km, kc):
            p = km.provisioner
            assert (await value(kc, '[getattr(__import__("os"), o)() for o in ("getuid", "getgid", "getgroups")]')
                    == [ada, ada, [ada]])
            env = await value(kc, 'dict(__import__("os").environ)')
            assert (env['HOME'], env['USER'], env['KERNEL_USERNAME'],
                    await value(kc, '__import__("os").getcwd()')) == ('/home/ada', 'ada', 'ada', '/home/ada')
            assert env['PATH'].startswith(f'{sys.prefix}/bin:') and 'KERNEL_LAUNCH_SECRET' not in env
            # log, connection file and agent are the user's, and nobody else's
            assert uid_of(p.fields['pid']) == uid_of(psutil.Process(p.fields['pid']).ppid()) == ada
            assert owner(node, f'/tmp/kernel-{km.kernel_id}.log') == (ada, 0o600)
            assert owner(node, kept(remote, 'ada', km)+'/connection.json') == (ada, 0o600)
            assert owner(node, kept(remote, 'ada', km)) == (ada, 0o700)
            # it is interrupted, in whatever it does
            await within(1, lambda: interrupt(km, kc))
            await within(1, lambda: interrupt(km, kc, 'import subprocess; subprocess.run(["sleep", "1000"])'))
            # it is restarted, and killed: its end is known at once, with the status
            before = km.get_connection_info()
            await km.restart_kernel()
            await kc.wait_for_ready(timeout=60)
            assert km.get_connection_info() == before and uid_of(km.provisioner.fields['pid']) == ada
            await within(1, lambda: kill(km, kc))
            assert owner(node, f'/tmp/kernel-{km.kernel_id}.log') == (ada, 0o600)
            km.provisioner.requested = True # its log is not wanted

async def test_tunnelled(remote, monkeypatch):
    """The agent of the login holds the streams to the kernel of another user: what that prints while connections are
    killed arrives"""
    monkeypatch.setenv('GP_ENABLE_TUNNELING', 'True')
    with remote.nothing_left(ignore=HABITS):
        async with kernel_of(remote, 'ada') as (km, kc):
            assert uid_of(km.provisioner.fields['pid']) == remote.users['ada']
            printing = asyncio.ensure_future(printed(kc,
                                                     'import time\nfor i in range(60): print(i, flush=True); '
                                                     'time.sleep(.05)', 60))
            for _ in range(3):
                await asyncio.sleep(.6)
                remote.node.drop()
            assert await printing == (''.join(f'{i}\n' for i in range(60)), 'ok')

async def test_kill_and_shutdown(remote):
    for how in ('kill', 'terminate', 'shutdown'):
        with remote.nothing_left(ignore=HABITS):
            async with kernel_of(remote, 'ada') as (km, kc):
                pid = km.provisioner.fields['pid']
                child = await value(kc, '__import__("subprocess").Popen(["sleep", "1000"]).pid')
                if how == 'shutdown': await km.shutdown_kernel()
                else: await getattr(km.provisioner, how)()
                await until(lambda: gone(pid), 10, how)
                if how == 'kill': await until(lambda: gone(child), 10, 'what it started')
                elif not gone(child): os.kill(child, signal.SIGKILL)

@pytest.mark.parametrize('user, impersonation', [('ada', 'True'), ('gateway', 'False')])
async def test_files_that_a_kernel_writes_have_the_modes_of_the_login(remote, monkeypatch, user, impersonation):
    monkeypatch.setenv('GP_IMPERSONATION_ENABLED', impersonation)
    async with kernel_of(remote, 'ada') as k:
        assert (await run(k, 'open("report.txt", "w").close(); import os; os.mkdir("shared")')).status == 'ok'
        assert owner(remote.node, f'/home/{user}/report.txt') == (remote.users[user], 0o644)
        assert owner(remote.node, f'/home/{user}/shared') == (remote.users[user], 0o755)

async def test_users_have_nothing_of_each_other(remote):
    async with AsyncExitStack() as stack:
        (a, _), g = await asyncio.gather(*(stack.enter_async_context(kernel_of(remote, o)) for o in ('ada', 'grace')))
        assert (await value(g.client, '__import__("getpass").getuser()') == 'grace'
                and owner(remote.node, f'/tmp/kernel-{g.km.kernel_id}.log')[0] == remote.users['grace'])
        pid = a.provisioner.fields['pid']
        for path in (f'/tmp/kernel-{a.kernel_id}.log', f'{kept(remote, "ada", a)}/connection.json',
                     f'/proc/{pid}/environ', f'{kept(remote, "ada", a)}/record'):
            assert (await run(g, f'open({path!r})')).error.startswith('[Errno 13] Permission denied'), path
        assert (await run(g, f'import os; os.kill({pid}, 2)')).error.startswith('[Errno 1] Operation not permitted')

async def test_users_have_templates_of_their_own(remote, monkeypatch):
    "A kernel is forked from a process of its user, which nobody else's is forked from"
    monkeypatch.setenv('GP_STANDBY', 'True')
    parents, forked = {}, '__import__("gc").get_freeze_count() > 0'
    def ready(agent): return [o for o in psutil.Process(agent).children() if o.name() == 'gpssh-standby']
    for user in 'ada', 'grace':
        async with kernel_of(remote, user) as (km, kc):
            assert not await value(kc, forked)
            parents[user] = psutil.Process(km.provisioner.fields['pid']).ppid()
            template, = await until(lambda: ready(parents[user]), 60, 'a template')
            assert uid_of(template.pid) == remote.users[user]
            async with kernel_of(remote, user) as (second, kc):
                assert await value(kc, forked) and await value(kc, '__import__("os").getuid()') == remote.users[user]
                assert psutil.Process(second.provisioner.fields['pid']).ppid() == parents[user]
    assert parents['ada'] != parents['grace']
    for pid in parents.values():
        for o in ready(pid): o.kill()

async def test_r_kernel(remote):
    need(None if shutil.which('Rscript') else 'Rscript is not installed')
    remote.install('--language', 'R', hosts=['gateway@node1'], name='ssh_r')
    with remote.nothing_left(ignore=HABITS):
        async with kernel_of(remote, 'ada', 'ssh_r') as k:
            assert (await run(k, 'cat(Sys.info()[["effective_user"]], Sys.getenv("HOME"))')).text == 'ada /home/ada'
            async def seconds(): return (await interrupted(k, 'repeat x <- 1')).took
            await within(1, seconds)
            assert owner(remote.node, f'/tmp/kernel-{k.km.kernel_id}.log') == (remote.users['ada'], 0o600)

async def test_another_host_application_takes_over(remote):
    with remote.nothing_left(ignore=HABITS):
        async with kernel_of(remote, 'ada') as (km, kc):
            info = json.loads(json.dumps(await km.provisioner.get_provisioner_info()))
            other = DistributedProvisioner(kernel_id=km.kernel_id,
                                           kernel_spec=KernelSpecManager().get_kernel_spec('ssh_python'))
            await other.load_provisioner_info(info)
            msg_id = await busy(kc, 'print("on it", flush=True)\nwhile True: pass')
            await other.send_signal(signal.SIGINT)
            assert (await reply_to(kc, msg_id))['status'] == 'error'
            await other.kill()
            assert await asyncio.wait_for(other.wait(), 20) == -9
            await other.cleanup()

async def test_a_start_given_up_leaves_nothing(remote):
    with remote.nothing_left(ignore=HABITS):
        given_up = 0
        for after in (.01, .05, .1, .2, .3):
            km = remote.manager()
            task = asyncio.ensure_future(km.start_kernel(env=dict(os.environ, KERNEL_USERNAME='ada')))
            await asyncio.sleep(after)
            task.cancel()
            try: await task
            except asyncio.CancelledError: given_up += 1
            else: await km.shutdown_kernel(now=True)
        assert given_up > 1

# Refusals: before anything runs, or at once, and with nothing left

async def refused(remote, user, words, status=500):
    async def start():
        t = Timer()
        with pytest.raises(LaunchError) as e:
            async with kernel_of(remote, user): pass
        assert re.search(words, str(e.value)) and e.value.status_code == status, str(e.value)
        return float(t)
    with remote.nothing_left(ignore=HABITS): await within(5, start)

@pytest.mark.parametrize('user', ['"; touch /tmp/x; "', '-g root', '#0', '%sudo', 'a b', 'ada;id', '../ada', 'ada\n',
                                  'ünï', ''])
async def test_what_cannot_be_a_user(remote, user):
    await refused(remote, user, "cannot be the name of a user to run it as", 403)

async def test_a_user_whom_the_host_does_not_know(remote):
    await refused(remote, 'nobody-of-that-name',
                  '(?s)host gateway@node1.*unknown user.*KERNEL_USERNAME, who must be a user of the host', 403)

async def test_a_user_who_is_not_authorized(remote): await refused(remote, 'root', 'unauthorized_users', 403)

@pytest.mark.parametrize('rule, words',
                         [('', 'a password is required'),
    (RULE.replace('SETENV: ALL', '/bin/true'), 'a password is required'),
    (RULE.replace('SETENV: ALL', ' /bin/sh'), 'not allowed to (preserve the environment|set the following)')])
async def test_sudo_that_does_not_permit_it(remote, rule, words):
    remote.node.sudoers(rule)
    await refused(remote, 'ada',
                  f'(?s)host gateway@node1 .user gateway.: sudo: .*{words}'
                  '.*sudoers rule on the host.*NOPASSWD:SETENV: ALL')

async def test_sudo_that_permits_another_user_only(remote): await refused(remote, 'eve', '(?s)sudo: .*sudoers rule')
