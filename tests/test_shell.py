"The scripts that start and watch processes, in each shell that a host may have as its `/bin/sh`; and what other users of the host can do to them."
import asyncio, contextlib, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path
import pytest
from gateway_provisioners_ssh import shell
from conftest import need
from kernels import until

ME, OTHER = 1001, 1002   # users whom nobody else is
LOG = '/tmp/kernel.log'
enter = 'mount --bind "$0" "$(readlink -f /bin/sh)" && mount --bind "$1" /tmp && PATH=$4 exec "$3" --reuid $2 --regid $2 --clear-groups /bin/sh'

class Host:
    "Shells of a user, with `which` as `/bin/sh`, and a `/tmp` of their own, open to all"
    def __init__(self, which, tmp):
        self.which, self.tmp, self.env, self.sh, self.opened, self.started = which, tmp/'tmp', {}, None, [], []
        self.one_at_a_time = asyncio.Lock()
        self.tmp.mkdir()
        self.tmp.chmod(0o1777)
        self.bin, self.path = self.tmp/'bin', '/tmp/bin:' + os.environ['PATH']
        self.bin.mkdir()
        if which == 'busybox': subprocess.run(['busybox', '--install', '-s', self.bin], check=True)   # with its own commands

    async def shells(self):
        async with self.one_at_a_time:
            if self.sh is None or self.sh.closed: self.sh = await asyncio.wait_for(self.open(), 10)
        return self.sh

    async def open(self):
        p = await asyncio.create_subprocess_exec('unshare', '-m', '/bin/sh', '-c', enter, shutil.which(self.which), str(self.tmp), str(ME), shutil.which('setpriv'), self.path,
            start_new_session=True, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=dict(os.environ, **self.env))
        self.opened.append(p)
        return await shell.Shell(p.stdout, p.stdin.write, p.stdin.close, 'here').start()

    async def spawn(self, script, **kw):
        p = await asyncio.wait_for(shell.spawn(self.shells, script, LOG, **kw), 20)
        self.started.append(p)
        return p

    async def close(self):
        for p in self.started:
            p.forget()
            with contextlib.suppress(ProcessLookupError): p.returncode is None and os.killpg(p.pid, 9)
        if self.sh: self.sh.close()
        for p in self.opened: await p.wait()

    def waits(self, p):
        "Whether the one who guards `p` waits for somebody to watch"
        def args(pid):
            with contextlib.suppress(OSError): return open(f'/proc/{pid}/cmdline').read().split('\0')
        return [pid for pid in filter(str.isdigit, os.listdir('/proc')) if f'{p.dir}/watched' in (args(pid) or []) and open(f'/proc/{pid}/wchan').read() == 'wait_for_partner']

    async def left(self, p):
        "What there is of the process `p`, once there is nothing; else TimeoutError"
        name = os.path.basename(p.dir)
        def of(pid):
            with contextlib.suppress(OSError):
                return name in open(f'/proc/{pid}/cmdline').read() + ' '.join(os.readlink(f'/proc/{pid}/fd/{o}') for o in os.listdir(f'/proc/{pid}/fd'))
        gone = lambda: not [*filter(of, filter(str.isdigit, os.listdir('/proc')))] and not (self.tmp/name).exists()
        await until(gone, what=f'nothing left of {p}')
        return sorted(o.name for o in self.tmp.iterdir() if o.name != 'bin')

@pytest.fixture(params=['dash', 'bash', 'busybox'])
async def host(request):
    need(None if os.geteuid() == 0 and shutil.which(request.param) else f'needs root, and {request.param}')
    with tempfile.TemporaryDirectory(prefix='gpt-') as tmp:   # which others can enter, and not only pytest's user
        os.chmod(tmp, 0o755)
        host = Host(request.param, Path(tmp))
        yield host
        await host.close()

@contextlib.contextmanager
def another(host, script):
    "A process of another user, once it has said a word: Python code that finds the host's log at `log`"
    p = subprocess.Popen(['setpriv', '--reuid', str(OTHER), '--regid', str(OTHER), '--clear-groups', sys.executable, '-c',
        f'import os, sys\nlog = {str(host.tmp/"kernel.log")!r}\n{script}'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try: p.stdout.readline(); yield p
    finally: p.kill(); p.communicate()

async def logged(p, *words):
    "The log, once all the words are in it"
    async def seen():
        while not set(words) <= set((said := await p.tail()).splitlines()): await asyncio.sleep(.01)
        return said
    return await asyncio.wait_for(seen(), 10)

async def test_life(host):
    p = await host.spawn("launch /bin/sh -c 'echo ready; sleep 1000; exit 5'", title='a kernel')
    await logged(p, 'ready')
    host.sh.close()
    assert await p.signal(0)
    os.kill(int(open(f'/proc/{p.pid}/task/{p.pid}/children').read()), 15)
    assert await asyncio.wait_for(p.exited, 10) == 5
    first, second, *_, last = (await p.tail()).splitlines() # bash has a word about a process that was killed
    assert (first, second, last) == ('a kernel', 'ready', '[ended with status 5]')
    await p.release(keep_log=False)
    assert await host.left(p) == []

async def test_orphan_timeout_leaves_nothing(host):
    p = await host.spawn('launch true', orphan_timeout=3600)
    assert await asyncio.wait_for(p.exited, 10) == 0
    await until(lambda: host.waits(p), what='waiting for a watcher')
    await p.release(keep_log=False)
    assert await host.left(p) == []

async def test_orphan_timeout_of_less_than_a_second(host):
    p = await host.spawn('launch sleep 1000', orphan_timeout=.5)
    p.forget()
    host.sh.close()
    assert await host.left(p) == ['kernel.log']

async def test_variables_of_the_login(host):
    "Names that the scripts use are set in the login's environment"
    host.env = dict.fromkeys('p e n o s ok lacks guard mask dir log r f x half h i'.split(), '1')
    with pytest.raises(shell.StartFailed, match='nowhere'): await host.spawn('cd /nowhere 2>&1; exit')
    p = await host.spawn('launch sleep 1000')
    assert p.pid > 1 and await p.signal(0)
    await p.signal(9)
    assert await asyncio.wait_for(p.exited, 10) == -9
    assert not await p.signal(0)
    await p.release(keep_log=False)
    assert await host.left(p) == []

async def test_supervisor_killed(host):
    "So that nobody can know how the process ends: it is ended"
    p = await host.spawn('launch sleep 1000')
    await until(lambda: open(f'/proc/{p.pid}/comm').read() == 'sleep\n')
    os.kill(int(re.search(r'^PPid:\s*(\d+)', open(f'/proc/{p.pid}/status').read(), re.M)[1]), 9)
    assert await asyncio.wait_for(p.exited, 10) == shell.GONE and p.lost
    await p.release(keep_log=False)
    assert await host.left(p) == []

async def test_watched_directory_removed(host):
    "Something clears up in `/tmp`: whoever comes to watch finds the process, and learns of its end"
    for rest in [], ['out']:
        p = await host.spawn("launch sleep 1000")
        for o in (host.tmp/os.path.basename(p.dir)).iterdir(): o.name in rest or o.unlink()
        if not rest: os.rmdir(host.tmp/os.path.basename(p.dir))
        host.sh.close()
        p.forget()
        host.started.append(q := shell.RemoteProcess(host.shells, p.dir, p.log, p.pid))
        await asyncio.wait({q.exited}, timeout=1)
        assert not q.exited.done() and await q.signal(0)
        await q.signal(9)
        assert await asyncio.wait_for(q.exited, 10) == (-9 if rest else shell.GONE)
        await q.release(keep_log=False)
        assert await host.left(p) == []

# What others may do

mine = "mine = os.path.basename(log)+'-mine'; os.chdir(os.path.dirname(log)); "
pipe = "os.mkfifo({0}); os.chmod({0}, 0o666); pipe = os.open({0}, os.O_RDWR | os.O_NONBLOCK)"
laid = dict(file="open(mine, 'w').write('of mine'); os.chmod(mine, 0o666); os.link(mine, log)", link="open(mine, 'w').write('of mine'); os.chmod(mine, 0o666); os.symlink(mine, log)",
            dangling_link="os.symlink(mine, log)", device="os.symlink('/dev/null', log)", pipe=pipe.format('log'), link_to_pipe=pipe.format('mine')+"; os.symlink(mine, log)")
laid = {k: mine+v for k,v in laid.items()}
read = """
sys.stdin.readline()
try: print(os.read(pipe, 1000) if 'pipe' in globals() else open(mine).read() if os.path.exists(mine) else '', flush=True)
except BlockingIOError: print(flush=True)
"""

def read_by(p):
    p.stdin.write('\n'); p.stdin.flush()
    return p.stdout.readline().strip()

@pytest.mark.parametrize('what', laid)
async def test_something_in_place_of_the_log(host, what):
    with another(host, f'{laid[what]}\nprint(flush=True)\n{read}') as p:
        with pytest.raises(shell.StartFailed, match='cannot write the log'): await host.spawn('launch echo secret', title='secret')
        assert read_by(p) in ('', 'of mine')

@pytest.mark.parametrize('what', laid)
async def test_something_put_in_place_of_the_log_just_then(host, what):
    "Between the removal of an old log and the making of the new one"
    rm = host.bin/'rm'
    rm.unlink(missing_ok=True)
    rm.write_text('#!/bin/sh\nPATH=${PATH#*:} rm "$@"; : >/tmp/now; until [ -e /tmp/then ]; do sleep .01; done')
    rm.chmod(0o755)
    with another(host, f"""print(flush=True)
dir = os.path.dirname(log)
while not os.path.exists(dir+'/now'): pass
{laid[what]}
open(dir+'/then', 'w')
{read}""") as p:
        with pytest.raises(shell.StartFailed, match='cannot write the log'): await host.spawn('launch echo secret', title='secret')
        assert read_by(p) in ('', 'of mine')

async def test_the_name_of_a_full_log_is_never_free(host):
    take = """
while not os.path.exists(log): pass
print(flush=True)
while True:
    try: os.close(os.open(log, os.O_CREAT | os.O_EXCL | os.O_WRONLY)); break
    except FileExistsError: pass
os.chmod(log, 0o666)
"""
    p = await host.spawn("launch /bin/sh -c 'until [ -e /tmp/go ]; do sleep .01; done; yes secret | head -c 5000000; echo the end'", max_bytes=100_000)
    with another(host, take) as other:
        (host.tmp/'go').touch()
        assert await asyncio.wait_for(p.exited, 60) == 0
        assert other.poll() is None
    assert 'the end' in await p.tail()
    await p.release()
    (host.tmp/'go').unlink()
    assert await host.left(p) == ['kernel.log', 'kernel.log.1']
    for o in 'kernel.log', 'kernel.log.1':
        s = (host.tmp/o).stat()
        assert (s.st_uid, oct(s.st_mode)) == (ME, '0o100600') and 0 < s.st_size <= 50_000

@pytest.mark.parametrize('what', laid)
async def test_the_name_of_the_last_log_is_taken(host, what):
    p = await host.spawn("launch /bin/sh -c 'until [ -e /tmp/go ]; do sleep .01; done; yes secret | head -c 1000000; echo the end'", max_bytes=100_000)
    with another(host, f'log += ".1"; {laid[what]}; print(flush=True)\n{read}') as other:
        (host.tmp/'go').touch()
        assert await asyncio.wait_for(p.exited, 60) == 0
        said = await asyncio.wait_for(p.tail(100_000), 10)
        assert said.endswith('the end\n[ended with status 0]') and 'of mine' not in said
        assert read_by(other) in ('', 'of mine')
    await p.release()
    assert (host.tmp/'kernel.log').stat().st_size <= 50_000 and 'kernel.log.1' in await host.left(p)

@pytest.mark.parametrize('which', ['dash', 'bash', 'busybox sh'])
def test_a_log_that_was_removed_is_not_made_again(which, tmp_path):
    "A start that was given up took its log away before there was anything to write to it"
    need(None if shutil.which(which.split()[0]) else f'needs {which}')
    pump = lambda: subprocess.run([*which.split(), '-c', shell._pump, 'sh', tmp_path/'log', '8192'], input=b'x'*100_000, timeout=20)
    assert pump().returncode == 0 and not [*tmp_path.iterdir()]
    (tmp_path/'log').touch()
    assert pump().returncode == 0 and sorted(o.name for o in tmp_path.iterdir()) == ['log', 'log.1']

# What a host may answer

async def test_no_number_of_a_process():
    "What was due is swept away, if it is there"
    ran = []
    class Odd:
        name = 'odd'
        async def detach(self, script): return shell.Done(0, '1e3')
        async def run(self, script): ran.append(script)
    async def shells(): return Odd()
    with pytest.raises(shell.StartFailed, match="odd answered '1e3'"): await shell.spawn(shells, 'launch true', LOG)
    await until(lambda: ran)
    assert '/tmp/gpssh-' in ran[0] and 'kill -KILL' in ran[0]
