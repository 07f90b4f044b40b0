"What the test hosts promise, checked with OpenSSH's own client."
import os, socket, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import need
from hosts import REPO, LoopbackLab, NetLab, _proc, sh
from kernels import forget
from pace import Timer, slowness, wait

def ssh(lab, name, *cmd, timeout=10, **kw):
    return sh('ssh', '-F', lab.client.config, '-o', 'BatchMode=yes', '-o', f'ConnectTimeout={timeout}', name, *cmd,
              **kw)

@pytest.fixture(params=['hosts', 'net'])
def lab(request):
    "Hosts of either kind, to which this process has no connection, whatever tests were before"
    lab = request.getfixturevalue(request.param)
    forget()
    wait(lambda: not any(h.connections() for h in lab), what='connections of other tests ended')
    return lab

def fails(lab, name, word, timeout=2):
    t = Timer()
    with pytest.raises(RuntimeError, match=word): ssh(lab, name, 'true', timeout=timeout)
    return float(t)

def test_session(lab):
    for h in lab:
        home, where, python = ssh(lab, h.name, 'echo $HOME; echo $GP_TEST_HOST; command -v python').split()
        assert where == h.name and python == f'{sys.prefix}/bin/python'
        ssh(lab, h.name, f'touch {home}/mark-{h.name}; python -c "import ipykernel, Cryptodome"')
        assert [n for o in h.files() if (n := Path(o).name).startswith('mark-')] == [f'mark-{h.name}']
    conf = lab[0].conf.read_text()
    assert 'MaxS' not in conf

def test_inventory(lab):
    h = lab[1]
    wait(lambda: not h.processes(), 20, 'processes of other tests ended')
    before = h.inventory()
    server = ('import socket,sys; s=socket.socket(); s.bind(("127.0.0.1",0)); s.listen(); '
              'print(s.getsockname()[1],flush=True); s.accept()')
    p = subprocess.Popen(['ssh', '-F', lab.client.config, h.name, f"KERNEL_ID=abc exec python -c '{server}'"],
                         stdout=subprocess.PIPE, text=True)
    port = int(p.stdout.readline())
    assert h.connections() == 1 and h.ports() == [port] and port not in lab[0].ports()
    assert [o.kernel_id for o in h.kernels('abc')] == ['abc'] and not h.kernels('other') and not lab[0].kernels()
    assert [o.pid for o in h.shells()] == [o.pid for o in h.processes()]
    h.drop(); p.wait(); p.stdout.close()
    with pytest.raises(AssertionError, match='left on'):
        with h.nothing_left(0.5): ssh(lab, h.name, 'setsid -f sleep 100 >/dev/null 2>&1 </dev/null')
    for o in h.processes(): os.kill(o.pid, 9)
    wait(lambda: h.inventory() == before)

def test_disturb_sshd(lab):
    h = lab[0]
    h.stop();            assert min(fails(lab, h.name, 'refused') for _ in range(3)) < slowness()
    h.start();           ssh(lab, h.name, 'true')
    h.hang();            assert fails(lab, h.name, 'timed out') > 1.5
    h.unhang();          ssh(lab, h.name, 'true')
    h.refuse_keys();     fails(lab, h.name, 'Permission denied')
    h.accept_keys();     ssh(lab, h.name, 'true')
    h.change_host_key(); fails(lab, h.name, 'HOST IDENTIFICATION HAS CHANGED')
    h.repair();          ssh(lab, h.name, 'true')

@pytest.mark.parametrize('drop', [True, False])
def test_restart_sshd(lab, drop):
    h = lab[2]
    p = subprocess.Popen(['ssh', '-F', lab.client.config, h.name,
                          'setsid -f sleep 123 >/dev/null 2>&1 </dev/null; echo on; exec sleep 124'],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    h.restart_sshd(drop)
    if drop: p.wait(20)
    else:
        with pytest.raises(subprocess.TimeoutExpired): p.wait(0.5)
        h.drop(); p.wait(20)
    ssh(lab, h.name, 'true')
    left = [o for o in h.processes() if o.cmdline == 'sleep 123']
    assert len(left) == 1
    os.kill(left[0].pid, 9)
    p.stdout.close(); p.stderr.close()

def test_environment(lab):
    h = lab[3]
    h.env['NOTE'], h.options['MaxSessions'] = 'a b', 1
    h.restart_sshd()
    assert ssh(lab, h.name, 'echo $NOTE') == 'a b\n'
    h.repair()
    assert ssh(lab, h.name, 'echo $NOTE') == '\n' and 'MaxSessions' not in h.conf.read_text()

# Network namespaces only

def rtt(h, below):
    "The round trip time: the first below this, or the shortest of a few"
    seen = []
    while not seen or min(seen) >= below and len(seen) < 6:   # sshd takes ten who do not log in
        t = Timer()
        with socket.create_connection((h.address, 22), 5): seen.append(float(t))
        time.sleep(.05)
    return min(seen)

def test_cut_and_heal(net):
    h = net[0]
    p = subprocess.Popen(['ssh', '-F', net.client.config, h.name, 'echo on; sleep 1; echo during; read x; echo $x'],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'on\n'
    h.cut()
    assert fails(net, h.name, 'timed out', 2) > 1.5, 'silence, not a refusal'
    ssh(net, net[1].name, 'true')
    p.stdin.write('later\n'); p.stdin.flush()
    h.heal()
    assert [p.stdout.readline(), p.stdout.readline()] == ['during\n', 'later\n']
    p.stdin.close(); p.stdout.close(); p.wait()

def test_power(net):
    h = net[1]
    ssh(net, h.name, 'setsid -f sleep 125 >/dev/null 2>&1 </dev/null')
    h.power_off()
    assert not h.pids() and fails(net, h.name, 'timed out', 1) > 0.5
    h.power_on()
    assert not h.processes() and ssh(net, h.name, 'hostname') == 'node2\n'

def test_slow(net):
    h = net[2]
    p = subprocess.Popen(['ssh', '-F', net.client.config, h.name, 'read x; echo $x; head -c 5000000 /dev/zero'],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rtt(h, .05) < .05*slowness()
    h.slow(ms=40)
    assert .08 < rtt(h, .3) < .3*slowness()
    p.stdin.write(b'on\n'); p.stdin.flush()
    assert len(p.communicate()[0]) == 5000003, 'connections survive the change of wires'
    h.slow(mbit=8)
    t = Timer()
    ssh(net, h.name, 'head -c 1000000 /dev/zero')
    assert t > 0.8
    h.slow(ms=1, loss=0.4)
    def lost():
        try: socket.create_connection((h.address, 22), 0.5).close()
        except TimeoutError: return True
        return False
    seen = set()
    wait(lambda: seen.add(lost()) or seen == {True, False}, 30, 'some packets lost, and some not')
    h.slow()
    assert rtt(h, .05) < .05*slowness()

def listen(where, port=0):
    "A process that accepts connections, by default at any port, and that port"
    s = ('import socket,sys; s=socket.create_server(("",%d)); print(s.getsockname()[1],flush=True)\nwhile 1: '
         's.accept()[0].close()' % port)
    p = subprocess.Popen([*map(str, where), sys.executable, '-c', s], stdout=subprocess.PIPE)
    return p, int(p.stdout.readline())

def can(where, address, port):
    s = f'import socket; socket.create_connection(({address!r}, {port}), 0.7)'
    return subprocess.run([*map(str, where), sys.executable, '-c', s], stderr=subprocess.DEVNULL).returncode == 0

def test_firewall(net):
    h = net[0]
    (here, port), (there, _) = listen([]), listen(h.ns.exec([]), 40001)
    assert can([], h.address, 40001) and can(h.ns.exec([]), net.address, port)
    h.firewall()
    assert not can([], h.address, 40001) and not can(h.ns.exec([]), net.address, port) and can([], h.address, 22)
    h.firewall(incoming=(22, 40001), outgoing=None)
    assert can([], h.address, 40001) and can(h.ns.exec([]), net.address, port)
    h.no_firewall()
    for p in (here, there): p.kill(); p.wait(); p.stdout.close()

def test_laptop(net):
    h, app = net[0], net.laptop()
    assert app.run('ssh', '-F', net.client.config, h.name, 'echo $SSH_CONNECTION').split()[0] == net.addr(100)
    (there, _), (mine, _) = listen(h.ns.exec([]), 40002), listen(app.exec([]), 8877)
    assert not can(app.exec([]), h.address, 40002)
    assert not can(h.ns.exec([]), net.addr(100), 8877) and not can(h.ns.exec([]), net.addr(130), 8877)
    net.laptop(ports=None)
    assert can(app.exec([]), h.address, 40002) and not can(h.ns.exec([]), net.addr(100), 8877)
    net.laptop()
    for p in (there, mine): p.kill(); p.wait(); p.stdout.close()

def test_users(net):
    h = net[3]
    uid = h.add_user('alice', password='correct horse')
    h.add_user('bob', key=False)
    net.client.alias('alice4', **net.client.aliases['node4'] | dict(User='alice'))
    assert (ssh(net, 'alice4', 'id -un; pwd; python -c "import ipykernel, Cryptodome, os; print(os.getuid())"')
            == f'alice\n/home/alice\n{uid}\n')
    assert h.run('id', '-un', user='bob') == 'bob\n' and h.run('id', '-un') == 'root\n'
    with pytest.raises(RuntimeError, match='ermission'): h.run('ls', '/home/alice', user='bob')
    assert 'alice' not in Path('/etc/passwd').read_text() and not Path('/home/alice').exists()
    need(None if Path('/etc/sudoers.d').exists() else 'sudo is not installed')
    h.sudoers('alice ALL=(bob) NOPASSWD: ALL')
    assert ssh(net, 'alice4', 'sudo -n -H -u bob sh -c "id -un; echo \\$HOME"') == 'bob\n/home/bob\n'
    with pytest.raises(RuntimeError): ssh(net, 'alice4', 'sudo -n id')

def test_full_disk(net):
    h = net[0]
    h.fill_disk('/tmp/logs')
    with pytest.raises(RuntimeError, match='No space'): ssh(net, h.name, 'head -c 9000 /dev/zero >/tmp/logs/more')
    ssh(net, net[1].name, 'test ! -e /tmp/logs')
    h.free_disk('/tmp/logs')
    ssh(net, h.name, 'head -c 9000 /dev/zero >/tmp/logs/more && rm -r /tmp/logs')

def test_skew(net):
    need(None if next(Path('/usr/lib').glob('*/faketime'), None) else 'Debian package faketime is not installed')
    h = net[1]
    h.skew(3600)
    assert 3500 < int(ssh(net, h.name, 'date +%s')) - time.time() < 3700

def test_capture(net):
    h = net[2]
    with h.capture() as f:
        ssh(net, h.name, 'echo kept secret')
        here, port = listen([])
        s = f'import socket; s=socket.create_connection(("{net.address}",{port})); s.sendall(b"plain words")'
        h.run('python', '-c', s)
    here.kill(); here.wait(); here.stdout.close()
    assert b'plain words' in f.read_bytes() and b'SSH-2.0' in f.read_bytes() and b'kept secret' not in f.read_bytes()

def test_ipv6(net):
    h = net[0]
    with socket.create_connection((h.address6, 22), 5) as s: assert s.recv(4) == b'SSH-'

# The end of a lab

crash = '''
import sys, os, subprocess; sys.path.insert(0, {tests!r})
import hosts
lab = hosts.{kind}(2)
for h in lab:
    ssh = ['ssh', '-F', lab.client.config, h.name]
    subprocess.run([*ssh, 'setsid -f sleep 126 >/dev/null 2>&1 </dev/null'], check=True)
print(lab.base, *[p.pid for h in lab for p in h.processes()], flush=True)
if {reaper}: lab._reaper.kill()
os.kill(os.getpid(), 9)
'''

@pytest.mark.parametrize('kind', [LoopbackLab, NetLab])
@pytest.mark.parametrize('reaper', [False, True], ids=['owner killed', 'all killed'])
def test_nothing_survives_a_crash(kind, reaper):
    need(kind.missing())
    r = subprocess.run([sys.executable, '-c', crash.format(tests=str(REPO/'tests'), kind=kind.__name__, reaper=reaper)],
                       stdout=subprocess.PIPE, text=True)
    base, *pids = r.stdout.split()
    gone = lambda: not Path(base).exists() and not any(_proc(o) for o in pids)
    assert len(pids) == 2
    if reaper:
        assert not gone()
        with kind(1): assert not any(_proc(o) for o in pids), 'a new lab clears up first'
    wait(gone, 20)
    names = sh('ip', 'netns', 'list', check=False) + sh('ip', 'link', check=False) if kind is NetLab else ''
    assert not any(o.startswith(f"gpt{base.rpartition('-')[2]}-h") for o in names.split()) or reaper
