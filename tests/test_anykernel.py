"""Any installed kernelspec as it is: kernels of several languages, made for this machine and none for any other, run on
SSH hosts after `jupyter ssh-spec install --from-kernel NAME`."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import psutil, pytest
from conftest import need
from gateway_provisioners_ssh.errors import LaunchError
from forks import ssh_spec
from kernels import Remote, forget, interrupt, kill, running, value
from pace import Timer, until, within
from installed import interrupted, run

IPYKERNEL = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']

@pytest.fixture
def remote(hosts, tmp_path, monkeypatch):
    "Kernelspecs of this machine in `r.local`, and what is made of them for the hosts"
    r = Remote(hosts, tmp_path/'prefix', monkeypatch)
    r.local = tmp_path/'local/share/jupyter'
    monkeypatch.setenv('JUPYTER_PATH', f'{r.prefix}/share/jupyter:{r.local}')
    def local(name, argv, files={}, **more):
        (d := r.local/'kernels'/name).mkdir(parents=True)
        (d/'kernel.json').write_text(json.dumps(dict(argv=argv, display_name=name.title(), language=name) | more))
        for f, text in files.items():
            (d/f).parent.mkdir(parents=True, exist_ok=True)
            (d/f).write_text(text)
            (d/f).chmod(0o755 if text.startswith('#!') else 0o644)
        return d
    def take(name, *options, hosts=()):
        where = [f'--remote-hosts={o}' for o in hosts or r.lab.names[:2]]
        got = ssh_spec('install', '--prefix', r.prefix, '--from-kernel', name, *where, *options)
        r.said, r.status = got.stderr+got.stdout, got.returncode
        r.taken = r.specs_dir/f'ssh_{name}'
        return json.loads((r.taken/'kernel.json').read_text()) if not got.returncode else None
    r.make, r.take = local, take
    yield r
    forget()

async def lives(r, name, code, answer, endless, took=1.5, **kw):
    "On a host: compute, be interrupted, restart on the same ports, die by a signal, known at once, leave nothing"
    with r.nothing_left(ignore=[r'/\.(npm|node|config|bash_history)'], timeout=20):
        async with r.kernel(name, **kw) as k:
            km, kc = k
            f = km.provisioner.fields
            assert (await run(k, code)).text.strip() == answer
            kernel = psutil.Process(f['pid'])
            assert kernel.environ()['GP_TEST_HOST'] == r.host(
                km).name and 'KERNEL_LAUNCH_SECRET' not in kernel.environ()
            assert os.getpgid(kernel.pid) == kernel.pid
            cf, = [o for o in kernel.cmdline() if o.endswith('.json')]
            assert os.stat(cf).st_mode & 0o777 == 0o600
            async def seconds():
                stop = await interrupted(k, endless, after=1)
                assert stop.status != 'ok'
                async def answered(): return not (got := await run(k, code)).status.startswith('abort') and got
                # as some answer what comes right after an interrupt
                got = await until(answered, 60, 'no more aborted')
                assert got.text.strip() == answer
                return stop.took
            await within(took, seconds)
            before = km.get_connection_info()
            await km.restart_kernel()
            await kc.wait_for_ready(timeout=60)
            assert km.get_connection_info() == before
            assert (await run(k, code)).text.strip() == answer
            await within(1, lambda: kill(km, kc))
            await until(lambda: not os.path.exists(cf), 10, 'connection file removed')
            km.provisioner.requested = True # its log is not wanted

async def test_bash(remote):
    "From the package index: written in Python, but a shell to its users"
    subprocess.run([sys.executable, '-m', 'bash_kernel.install', '--prefix', remote.local.parents[1]], check=True,
                   capture_output=True)
    local = json.loads((remote.local/'kernels/bash/kernel.json').read_text())
    k = remote.take('bash')
    assert (k['language'], k['env'], k['display_name']) == (
        'bash', local['env'], 'Bash SSH') and k['argv'][-len(local['argv']):] == local['argv']
    assert {o.name for o in (remote.local/'kernels/bash').glob('logo*')} == {o.name
        for o in remote.taken.glob('logo*')} != set()
    await lives(remote, 'ssh_bash', 'yes "$((6*7)) on $GP_TEST_HOST" | head -1', '42 on host1', 'while :; do :; done')

async def test_javascript(remote):
    "From npm: neither the kernel nor anything below it is Python"
    tslab = next((o for o in (Path(sys.prefix)/'node/node_modules/.bin/tslab', shutil.which('tslab')) if o
                  and Path(o).exists()), None)
    need(None if tslab else f'tslab is not installed: npm install --prefix {sys.prefix}/node tslab')
    remote.make('javascript', [str(tslab), 'kernel', '--config-path', '{connection_file}', '--js'])
    remote.take('javascript')
    await lives(remote, 'ssh_javascript', '[6, 7].reduce((a, b) => a * b)', '42', 'while (true) {}')

async def test_plain_ipykernel(remote):
    "What `python -m ipykernel install` writes; by way of a tunnel, in which a busy loop is interrupted as well"
    subprocess.run([sys.executable, '-m', 'ipykernel', 'install', '--prefix', remote.local.parents[1], '--name', 'mine',
                    '--env', 'WHERE', '${HOME}/x'], check=True, capture_output=True)
    k = remote.take('mine')
    assert k['metadata']['debugger'] and '--curve' in k['argv'] and k['env'] == {'WHERE': '${HOME}/x'}
    assert sorted(o.name for o in remote.taken.glob('logo*')) == sorted(o.name
        for o in (remote.local/'kernels/mine').glob('logo*'))
    await lives(remote, 'ssh_mine', 'print(6*7)', '42', 'while True: pass', took=1)
    os.environ['GP_ENABLE_TUNNELING'] = 'True'
    try:
        async with remote.kernel('ssh_mine') as (km, kc):
            assert (await value(kc, '__import__("os").environ["WHERE"]')).startswith(str(remote.host(km).home))
            await within(1, lambda: interrupt(km, kc, 'import time; time.sleep(1000)'))
    finally: del os.environ['GP_ENABLE_TUNNELING']

async def test_encryption_where_the_kernel_can(remote):
    remote.make('enc', IPYKERNEL, metadata=dict(supported_encryption=['curve']))
    remote.make('plain', IPYKERNEL)
    remote.take('enc'), remote.take('plain')
    async with running(remote.manager('ssh_enc', transport_encryption='required')) as (km, kc):
        assert await value(kc, '6*7') == 42 and km.get_connection_info()['curve_publickey']
    km = remote.manager('ssh_plain', transport_encryption='required')
    with pytest.raises(Exception, match='(?i)encrypt'): await km.start_kernel()

SCRIPT = f'#!/bin/sh\nMINE=$(cat "${{0%/*}}/data/word") exec {sys.executable} -m ipykernel_launcher -f "$1"\n'

async def test_files_of_the_kernelspec_come_along_and_interrupts_by_message_stay(remote):
    d = remote.make('scripted', ['{resource_dir}/start.sh', '{connection_file}'],
                    {'start.sh': SCRIPT, 'data/word': 'from a file', 'kernel.js': '// js', 'logo-svg.svg': '<svg/>'},
        interrupt_mode='message', env=dict(DATA='${HOME}', WORDS=f'{remote.local}/kernels/scripted/data:$HOME'),
        metadata=dict(nothing='lost'), codemirror_mode='shell')
    k = remote.take('scripted')
    files = lambda d: {str(o.relative_to(d)) for o in d.rglob('*') if o.is_file()}
    assert files(remote.taken) == files(d) | {'scripts/launch_kernel.py', 'scripts/server_listener.py'} and os.access(
        remote.taken/'start.sh', os.X_OK)
    assert (k['interrupt_mode'], k['codemirror_mode'], k['metadata']['nothing'], k['env']['WORDS']) == ('message',
        'shell', 'lost', f'{remote.taken}/data:${{HOME}}')
    shutil.rmtree(d)
    async with remote.kernel('ssh_scripted') as (km, kc):
        assert await value(kc, '__import__("os").environ["MINE"]') == 'from a file'
        await within(2, lambda: interrupt(km, kc, 'import time\nfor _ in range(10000): time.sleep(.1)'))

# What fails is told at once, and leaves nothing

@pytest.mark.parametrize('argv, words', [
    (['sh', '-c', 'echo "no licence for this" >&2; exit 3', '{connection_file}'],
     '(?s)ended with status 3 before the kernel was ready.*no licence for this'),
    (['/opt/no-such/kernel', '{connection_file}'],
     '(?s)status 127.*there is no /opt/no-such/kernel on this host: install the kernel here'),
    ([sys.executable, '-c', 'raise ImportError("libkernel")', '{connection_file}'],
     '(?s)status 1 .*ImportError: libkernel')])
async def test_a_kernel_that_dies_at_its_start(remote, argv, words):
    remote.make('bad', argv)
    remote.take('bad')
    async def refused():
        t = Timer()
        with pytest.raises(LaunchError, match=words): await remote.manager('ssh_bad').start_kernel()
        return float(t)
    with remote.nothing_left(): await within(10, refused)

async def test_a_kernel_that_never_listens(remote):
    remote.make('deaf', ['sh', '-c', 'echo thinking; sleep 1000', '{connection_file}'])
    remote.take('deaf')
    with remote.nothing_left():
        with pytest.raises(LaunchError, match='(?s)did not start within 4 s.*thinking'):
            await remote.manager('ssh_deaf').start_kernel(env=dict(os.environ, KERNEL_LAUNCH_TIMEOUT='4'))

async def test_without_a_launcher_a_plain_kernelspec_is_refused(remote):
    remote.make('plain', IPYKERNEL, metadata=dict(kernel_provisioner=dict(provisioner_name='distributed-provisioner',
        config=dict(remote_hosts=['host1']))))
    with pytest.raises(LaunchError, match='install --from-kernel'): await remote.manager('plain').start_kernel()

# The command

def test_what_is_written(remote):
    remote.make('tiny', ['tiny-kernel', '{connection_file}'])
    k = remote.take('tiny', '--python=/opt/py/bin/python', '--port-range=40000..42000', '--display-name=Tiny there',
                    '--authorized-users=ada', '--launch-timeout=7')
    assert k == dict(argv=['/opt/py/bin/python', f'{remote.taken}/scripts/launch_kernel.py', '--kernel-id',
                           '{kernel_id}', '--port-range', '{port_range}',
        '--response-address', '{response_address}', '--public-key', '{public_key}', '--', 'tiny-kernel',
        '{connection_file}'], env={}, display_name='Tiny there', language='tiny',
        interrupt_mode='signal', metadata=dict(kernel_provisioner=dict(provisioner_name='distributed-provisioner',
            config=dict(remote_hosts=['host1', 'host2'], authorized_users=['ada'], port_range='40000..42000',
                        launch_timeout=7))))
    assert 'there is no tiny-kernel on this machine' in remote.said
    assert '--python' not in remote.said, 'it was given'
    assert remote.take('tiny') is None and '--replace' in remote.said
    assert remote.take('tiny', '--replace')['argv'][0] == 'python'

@pytest.mark.parametrize('own', [sys.executable, '/home/you/lab/bin/python3.12', 'python'])
def test_the_interpreter_of_a_kernel_that_is_run_by_python(remote, own):
    "An installer writes its own path, which hosts seldom have: --python runs launcher and kernel; else a warning"
    argv = [own, '-m', 'its_kernel', '--python', own, '-f', '{connection_file}']
    remote.make('its', argv)
    k = remote.take('its', '--python=/opt/py/bin/python')
    assert (k['argv'][0], k['argv'][k['argv'].index('--')+1:]) == ('/opt/py/bin/python',
        ['/opt/py/bin/python', *argv[1:]]) and '--python' not in remote.said
    k = remote.take('its', '--replace')
    assert k['argv'][k['argv'].index('--')+1:] == argv
    warning = f'the kernel runs in {own}, which every host needs at that path; --python PATH names another'
    assert (warning in remote.said) == own.startswith('/')

@pytest.mark.parametrize('argv, words', [(['tiny', '-x'], 'neither a kernel with'), ([], 'not a list of words'),
                                         ('tiny {connection_file}', 'not a list of words')])
def test_what_cannot_be_taken(remote, argv, words):
    remote.make('odd', argv)
    assert remote.take('odd') is None and re.search(words, remote.said) and 'Traceback' not in remote.said

def test_names(remote):
    remote.make('tiny', ['tiny', '{connection_file}'])
    assert remote.take('tinny') is None and re.search(r"no kernelspec 'tinny' here; there are: .*tiny", remote.said)
    assert remote.take('tiny', '--language', 'R')['language'] == 'tiny'
    assert '--language has no effect: the kernel is taken as it is' in remote.said
