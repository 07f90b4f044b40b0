"The demo as a user runs it: on a terminal, into a pipe, interrupted, and where something is wrong."
import io, os, pty, re, select, signal, subprocess, sys, threading
from pathlib import Path
import pytest
from gateway_provisioners_ssh import demo as D
from hosts import interruptible
from pace import Timer, wait

ARGV = [sys.executable, '-c', 'import sys; from gateway_provisioners_ssh.demo import demo; sys.exit(demo())']

@pytest.fixture
def places(tmp_path):
    "An environment in which all temporary files are in one place, and that place"
    (tmp_path/'home').mkdir()
    (tmp_path/'tmp').mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(('GP_', 'JUPYTER'))} | dict(
        HOME=str(tmp_path/'home'), TMPDIR=str(tmp_path/'tmp'))
    return env, tmp_path

def with_env(place):
    "Processes that have `place` in their environment: the demo, its hosts, their kernels"
    def has(o):
        try: return str(place).encode() in (o/'environ').read_bytes()
        except OSError: return False
    return [(o/'cmdline').read_bytes().decode().replace('\0', ' ') for o in Path('/proc').glob('[0-9]*') if has(o)]

def check_nothing_left(place):
    try: wait(lambda: not with_env(place), 10)
    except TimeoutError: raise AssertionError(with_env(place)) from None
    assert [str(o) for o in place.rglob('*') if o.is_file()] == [] and list((place/'tmp').iterdir()) == []

def test_into_a_pipe(places):
    env, place = places
    env |= dict(GP_REMOTE_HOSTS='nowhere.invalid', GP_AUTHORIZED_USERS='nobody',
        KERNEL_REMOTE_HOST='nowhere.invalid')  # the user's own settings do not matter
    t = Timer()
    r = subprocess.run(ARGV, env=env, capture_output=True, text=True, timeout=120, cwd=place)
    assert (r.returncode, r.stderr) == (0, ''), r.stdout + r.stderr
    assert t < 60
    out = r.stdout
    assert '\x1b' not in out and out.count(' 3/3 cells') >= 3 and len(
        set(re.findall(r'^k\d +(mock\d)', out, re.M))) == 3
    for o in 'interrupted in `while True: pass`', 'restarted on mock', 'no process, no file, no port', 'Done in':
        assert o in out, out
    check_nothing_left(place)

def test_on_a_terminal(places):
    "One table, drawn again in place, no line wider than the terminal"
    env, place = places
    main, side = pty.openpty()
    p = subprocess.Popen(ARGV, env=env | dict(TERM='xterm', COLUMNS='60'), stdout=side, stderr=side,
        stdin=subprocess.DEVNULL, cwd=place)
    os.close(side)
    out = b''
    while select.select([main], [], [], 60)[0]:
        try: data = os.read(main, 1<<16)
        except OSError: break
        out += data
    os.close(main)
    assert p.wait(10) == 0, out.decode()
    out = out.decode().replace('\r', '')
    tables = re.findall(r'\x1b\[5A\x1b\[J',
        out)     # a table is a blank line, a header and three rows once all kernels are in it
    assert len(tables) > 20
    assert max(len(o) for o in out.splitlines() if re.match(r'k\d ', o) or o.startswith('kernel ')) < 60
    assert 'Done in' in out.rpartition('\x1b[J')[2]
    check_nothing_left(place)

def test_a_table_that_does_not_fit_is_not_drawn_again(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('LINES', '24')
    assert D.Board(Terminal(), n=20).live and not D.Board(Terminal(), n=21).live

def test_no_reader(places):
    "Whoever ends the reading ends the demo, cleaned up and without a word"
    env, place = places
    argv = [sys.executable, '-c', 'from gateway_provisioners_ssh.cli import main; main(["demo", "--hosts", "2"])']
    p = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place)
    p.stdout.readline()
    p.stdout.close()
    assert p.stderr.read() == '' and p.wait(30) == 1
    check_nothing_left(place)

@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('after', [r'k\d +starting', '3 kernels', r'k\d.* 2/3 cells', r'k\d.* restarting'],
    ids=['a', 'b', 'c', 'd'])
def test_broken_off(places, signum, after):
    env, place = places
    p = subprocess.Popen(ARGV, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place,
        preexec_fn=interruptible)
    for line in p.stdout:
        if re.match(after, line): break
    p.send_signal(signum)
    rest = p.stdout.read()
    assert p.wait(30) == 130, rest
    assert 'Traceback' not in rest and 'never retrieved' not in rest, rest
    check_nothing_left(place)

async def test_without_ipykernel(monkeypatch):
    monkeypatch.setattr(D.Spec, 'missing', lambda self: ['python3 lacks ipykernel: python3 -m pip install ipykernel'])
    out = io.StringIO()
    assert await D.show(out) == 1 and 'pip install ipykernel' in out.getvalue()

async def test_what_goes_wrong_is_said(monkeypatch):
    "A wrong output, a kernel that cannot start, something left behind: status 1, the reason, and all is cleaned up"
    async def fails(reason):
        out = io.StringIO()
        assert await D.show(out) == 1
        assert re.search(f'^Failed: .*{reason}', out.getvalue(), re.M | re.S), out.getvalue()
        assert not [o.name for o in threading.enumerate() if o.name.startswith('mock-ssh')]
    before = D.listening()
    with monkeypatch.context() as m:
        m.setattr(D, 'NOTEBOOK', [('1+1', '3')])
        await fails("cell 1 on mock. said '2'")
    with monkeypatch.context() as m:
        m.setattr(D.Spec, 'kernel_json', lambda self, target, real=D.Spec.kernel_json: real(self, target)
            | dict(argv=['no-such-python']))
        await fails('no-such-python')
    with monkeypatch.context() as m:
        async def play(board, kernels, addresses):
            import socket
            m.extra = socket.create_server(('127.0.0.1', 0))
        async def remains(hosts, logs, ports, real=D.remains):
            "What ends by itself has all the time it needs, so that the port alone is left"
            assert await real(hosts, logs, ports | {m.extra.getsockname()[1]}) == []
            return await real(hosts, logs, ports, cleanup_timeout=.1)
        m.setattr(D, 'play', play)
        m.setattr(D, 'remains', remains)
        await fails('left behind: port')
        m.extra.close()
    assert not D.listening() - before

def test_a_package_is_missing(places):
    env, place = places
    code = ('import sys; sys.modules["paramiko"] = None; sys.argv = ["jupyter-ssh-spec", "demo"]; '
        'from gateway_provisioners_ssh.cli import main; main()')
    r = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=60)
    assert r.returncode == 1 and 'paramiko' in r.stderr and f'{sys.executable} -m pip install' in r.stderr \
        and 'Traceback' not in r.stderr, r.stderr
