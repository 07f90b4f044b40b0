"""Real OpenSSH servers to test against: on loopback addresses as any user, in network namespaces as root.

`with LoopbackLab(4) as lab` starts sshd with its default settings four times, as host1 to host4; `NetLab(4)` makes
node1 to node4, each a network namespace with its own address, port 22, host name, users, home and /tmp, on a switch
whose links can be cut, slowed and filtered. `lab.client` is the client's side: a home with `.ssh/config`,
`.ssh/known_hosts` and a key.

Whatever a lab starts ends with it: a small process of its own clears up when the lab is closed or its owner dies, and a
new lab first clears up what a crash of both left. Addresses, names and processes are unique to a lab, so test runs may
share a machine."""
import contextlib, ctypes, fcntl, heapq, os, pwd, random, re, secrets, select, shutil, signal, socket, struct
import subprocess, sys, time
from collections import namedtuple
from pathlib import Path
from shlex import quote
from pace import wait

BASE = Path(f'/tmp/gpt-hosts-{os.getuid()}')   # of all labs of this user; short, for the sake of Unix sockets below it
REPO = Path(__file__).resolve().parents[1]
SBIN = os.environ.get('PATH', '') + ':/usr/local/sbin:/usr/sbin:/sbin'
# its socket, and kernelspecs' files, which stay
AGENT = re.compile(r'/gpssh-\d+/agent-[0-9a-f]+$|/\.cache/gateway_provisioners_ssh/[0-9a-f]{64}/')
# a process; `kernel_id` is its environment's KERNEL_ID, or ''
Proc = namedtuple('Proc', 'pid ppid name cmdline kernel_id')

# Processes, as /proc shows them

def _read(pid, what):
    try:
        with open(f'/proc/{pid}/{what}', 'rb') as f: return f.read()
    except OSError: return b''

def _pids(): return [int(o) for o in os.listdir('/proc') if o.isdigit()]
def _environ(pid): return dict(o.split('=', 1) for o in os.fsdecode(_read(pid, 'environ')).split('\0') if '=' in o)
# from the state on: state ppid pgrp ... starttime is 19
def _stat(pid): return _read(pid, 'stat').rpartition(b')')[2].split()

def _proc(pid):
    st = _stat(pid)
    if not st or st[0] == b'Z': return None
    cmd = os.fsdecode(_read(pid, 'cmdline')).replace('\0', ' ').strip()
    return Proc(pid, int(st[1]), os.fsdecode(_read(pid, 'comm')).strip(), cmd, _environ(pid).get('KERNEL_ID', ''))

def _same(pid, start): return (st := _stat(pid)) and st[0] != b'Z' and st[19].decode() == start

def _kill_all(pids, timeout=10):
    "SIGKILL to everything the function `pids` returns until it returns nothing"
    def killed():
        for o in (left := [o for o in map(_proc, pids()) if o]):
            with contextlib.suppress(ProcessLookupError): os.kill(o.pid, signal.SIGKILL)
        return not left
    try: wait(killed, timeout)
    except TimeoutError as e:
        raise TimeoutError(f'still there after SIGKILL: {[*filter(None, map(_proc, pids()))]}') from e

def _sshd_tree(master):
    ppid = {o: int(st[1]) for o in _pids() if (st := _stat(o))}
    def up(o):
        while o := ppid.get(o, 0): yield o
    return [o for o in ppid if (o == master or master in up(o)) and (p := _proc(o)) and p.name.startswith('sshd')]

def sh(*args, check=True, **kw):
    "Run a command; its standard output. RuntimeError with its own words if it fails."
    r = subprocess.run([str(o) for o in args], capture_output=True, text=True,
                       stdin=None if 'input' in kw else subprocess.DEVNULL, **kw)
    if check and r.returncode:
        raise RuntimeError(f"{' '.join(map(str, args))}: status {r.returncode}: {r.stderr.strip()}")
    return r.stdout

def interruptible():
    """As `preexec_fn`: SIGINT has its default effect in the new process, also where this one ignores it, as a shell's
    background commands do"""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# The client's side

class Client:
    """The user's side of SSH: `home` with an OpenSSH configuration of aliases, known hosts, and a key that every host
    accepts"""
    def __init__(self, home):
        self.home = Path(home)
        self.ssh = self.home/'.ssh'
        self.ssh.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.config, self.known_hosts, self.key = (self.ssh/o for o in ('config', 'known_hosts', 'key_of_tests'))
        self.aliases, self.known = {}, {}
        if not self.key.exists(): sh('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'test', '-f', self.key)
        self.write()

    def alias(self, name, **options):
        "Define or change (only what is given) one `Host` block; `None` removes an option"
        self.aliases[name] = {k: v for k, v in (self.aliases.get(name, {}) | options).items() if v is not None}
        self.write()

    def know(self, address, port, key):
        "Put the host key `key` (`type base64`) of `address` in known_hosts, in place of an earlier one"
        self.known[address if port == 22 else f'[{address}]:{port}'] = key
        self.write()

    def write(self):
        block = lambda name, o: f'Host {name}\n' + ''.join(f'    {k} {v}\n' for k, v in o.items())
        self.config.write_text('\n'.join(block(*o) for o in self.aliases.items()))
        self.known_hosts.write_text(''.join(f'{k} {v}\n' for k, v in self.known.items()))

    def environ(self):
        """An environment for a host application: this home, and nothing of the caller's own Jupyter, SSH agent or
        gateway settings"""
        drop = re.compile(r'(GP_|EG_|KERNEL_|JUPYTER|IPYTHON|XDG_|SSH_|MPLBACKEND$|PYTHONSTARTUP$)')
        # with it, hosts keep processes after the last kernel
        return {k: v for k, v in os.environ.items() if not drop.match(k)} | dict(HOME=str(self.home), GP_STANDBY='off')

# Hosts

class SSHHost:
    """One host: an sshd with default settings, and the ways to disturb it that need no root. `env`, `options`: see
    `start`."""
    def __init__(self, lab, i):
        self.lab, self.name = lab, f'{lab.prefix}{i}'
        self.dir = lab.base/self.name
        self.home, self.tmp, self.keys = (self.dir/o for o in ('home', 'tmp', 'keys'))
        for d in (self.dir, self.home, self.tmp, self.keys): d.mkdir()
        self.env, self.options, self.proc, self._old = {}, {}, None, []
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.conf, self.logfile = self.dir/'sshd_config', self.dir/'sshd.log'
        self.accept_keys()
        self.make_host_key()

    def __repr__(self): return f'{self.name} ({self.address}:{self.port})'

    def make_host_key(self, name='host_key'):
        "Use the host key `name`, made if need be; the client is not told: `publish` does that"
        self.host_key = self.dir/name
        if not self.host_key.exists():
            sh('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', self.name, '-f', self.host_key)

    def publish(self):
        "Give the client an alias and the host key of this host"
        c, key = self.lab.client, ' '.join(self.host_key.with_suffix('.pub').read_text().split()[:2])
        c.alias(self.name, HostName=self.address, Port=self.port, User=self.user, IdentityFile=c.key,
                UserKnownHostsFile=c.known_hosts)
        for a in self.addresses: c.know(a, self.port, key)

    def marks(self): return dict(GP_TEST_LAB=str(self.lab.base), GP_TEST_MARK=self.lab.mark, GP_TEST_HOST=self.name)
    def session_env(self): return dict(HOME=str(self.home), TMPDIR=str(self.tmp))

    def write_config(self):
        env = (dict(PATH=f'{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin') | self.marks()
               | self.session_env() | self.env)
        opts = dict(HostKey=self.host_key, PidFile=self.dir/'sshd.pid', StrictModes='no', UsePAM='no',
                    AuthorizedKeysFile=f'{self.keys}/%u', Subsystem='sftp internal-sftp') | self.listen() | self.options
        lines = [f'{k} {v}' for k, v in opts.items()] + ['SetEnv ' + ' '.join(f'"{k}={v}"' for k, v in env.items())]
        self.conf.write_text('\n'.join(lines) + '\n')

    def start(self):
        """Start sshd, with `options` (a dict of sshd_config lines) and `env` (for its sessions) as they are now;
        returns when it listens"""
        self.write_config()
        at = self.logfile.stat().st_size if self.logfile.exists() else 0
        with open(self.logfile, 'ab') as f:
            self.proc = subprocess.Popen(self.wrap([self.lab.sshd, '-D', '-e', '-f', str(self.conf)]),
                                         stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True)
        def listening():
            if self.proc.poll() is not None: raise RuntimeError(f'sshd of {self.name} ended: {self.log()[-2000:]}')
            return b'Server listening' in self.logfile.read_bytes()[at:]
        wait(listening, 20, f'sshd of {self.name} listening')

    def stop(self, drop=True):
        "Stop sshd, so that connections are refused, and end its sessions if `drop`; what the sessions started lives on"
        mine = self._sshd() + self._old
        if self.proc:
            self.proc.kill(); self.proc.wait(); self.proc = None
        self._old = [o for o in mine if (p := _proc(o)) and p.name.startswith('sshd')]
        if drop: self.drop()

    def restart_sshd(self, drop=True): self.stop(drop); self.start()

    def drop(self):
        "End all SSH connections of this host, at its end and at once; sshd goes on"
        master = self.proc.pid if self.proc else None
        _kill_all(lambda: [o for o in set(self._sshd() + self._old) if o != master and (p := _proc(o))
                           and p.name.startswith('sshd')])
        self._old = []

    def hang(self):
        "Let sshd accept connections and say nothing"
        os.kill(self.proc.pid, signal.SIGSTOP)
    def unhang(self): os.kill(self.proc.pid, signal.SIGCONT)

    def refuse_keys(self): (self.keys/self.user).write_text('')
    def accept_keys(self, user=None):
        (f := self.keys/(user or self.user)).write_text(self.lab.client.key.with_suffix('.pub').read_text())
        f.chmod(0o644)

    def change_host_key(self, name='other_host_key'):
        "Restart sshd with another host key than the client knows"
        self.make_host_key(name); self.restart_sshd()

    def repair(self):
        "Undo whatever the methods of this class did"
        self.accept_keys(); self.unhang() if self.proc else None
        if (self.host_key.name != 'host_key' or self.env or self.options or not self.proc
            or self.proc.poll() is not None):
            self.make_host_key(); self.env, self.options = {}, {}
            self.restart_sshd()

    # What is on the host

    def log(self): return self.logfile.read_text(errors='replace')
    def wrap(self, argv): return argv
    def pids(self):
        "All processes of this host, those of sshd included"
        ours, marks = set(self._sshd() + self._old), [f'\0{k}={v}\0'.encode() for k, v in self.marks().items()]
        def marked(pid): return all(o in b'\0' + env for o in marks) if (env := _read(pid, 'environ')) else False
        return [o for o in _pids() if o in ours or marked(o)]

    def _sshd(self): return _sshd_tree(self.proc.pid) if self.proc else []

    def processes(self):
        "What runs on this host but sshd, as a list of `Proc`"
        return [p for o in self.pids() if (p := _proc(o)) and not p.name.startswith('sshd')]

    def shells(self, processes=None):
        "The processes that sshd itself started for its sessions"
        return [p for p in (self.processes() if processes is None else processes) if (q := _proc(p.ppid))
                and q.name.startswith('sshd')]

    def kernels(self, kernel_id=None):
        """Processes of kernels (their KERNEL_ID is in the environment), of all or of one: the kernel, and what it or
        its launcher started"""
        return [p for p in self.processes() if p.kernel_id and kernel_id in (None, p.kernel_id)]

    def connections(self):
        "How many SSH connections sshd holds"
        return sum(1 for o in self._sshd() if self.proc and (p := _proc(o)) and p.ppid == self.proc.pid)

    def ports(self, processes=None):
        "TCP ports that processes of this host listen on, without those of sshd"
        socks = set()
        for p in (self.processes() if processes is None else processes):
            with contextlib.suppress(OSError):
                socks |= {m[1] for o in os.scandir(f'/proc/{p.pid}/fd')
                          if (m := re.match(r'socket:\[(\d+)\]', os.readlink(o.path)))}
        return sorted({port for port, inode in self._listening() if inode in socks})

    def _listening(self):
        # many others, at times
        rows = [o.split() for f in ('tcp', 'tcp6') for o in self._proc_net(f).splitlines() if ' 0A ' in o]
        return [(int(o[1].rpartition(':')[2], 16), o[9]) for o in rows if o[3] == '0A']
    def _proc_net(self, f): return Path(f'/proc/net/{f}').read_text()

    def files(self):
        "Paths of all files in the home and temporary directories of this host"
        return sorted(str(p) for d in self.dirs() for p in d.rglob('*') if not p.is_dir() and not AGENT.search(str(p)))
    def dirs(self): return [self.home, self.tmp]

    def inventory(self):
        "Processes (without those of sessions, and agents), ports and files of now"
        found = self.processes()
        agents = {o.pid for o in found if o.name == 'gpssh-agent'}
        ours = ({o.pid for o in self.shells(found)} | agents
                | {o.pid for o in found if o.name == 'sudo' and o.ppid in agents})
        return dict(processes=[o for o in found if o.pid not in ours], ports=self.ports(found), files=self.files())

    @contextlib.contextmanager
    def nothing_left(self, timeout=10, ignore=()):
        """Fail unless, within `timeout` seconds of the block's end, nothing is on the host that was not there before;
        `ignore`: file name regexes"""
        was = self.inventory()
        yield
        def new():
            now = self.inventory()
            pids = {o.pid for o in was['processes']}
            r = dict(processes=[o for o in now['processes'] if o.pid not in pids],
                     ports=[o for o in now['ports'] if o not in was['ports']],
                     files=[o for o in now['files'] if o not in was['files']
                            and not any(re.search(p, o) for p in ignore)])
            return {k: v for k, v in r.items() if v}
        try: wait(lambda: not new(), timeout, 'clean host', 0.1)
        except TimeoutError: raise AssertionError(f'left on {self}: {new()}') from None

    def run(self, *argv, user=None, check=True, **kw):
        "Run a command on the host without SSH, in the environment of a session; its output"
        env = dict(PATH=f'{sys.prefix}/bin:{SBIN}') | self.marks() | self.session_env()
        return sh(*self.inside(argv, user), check=check, env=env, **kw)
    def inside(self, argv, user=None):
        if user not in (None, self.user): raise ValueError('another user needs a host of NetLab')
        return argv

class LoopbackHost(SSHHost):
    "An sshd of this user on a loopback address of its own, with a home and TMPDIR of its own; /tmp is everybody's"
    def __init__(self, lab, i):
        self.address = f'127.0.0.{10 + i}'
        self.addresses = [self.address]
        with socket.socket() as s: s.bind((self.address, 0)); self.port = s.getsockname()[1]
        super().__init__(lab, i)
    def listen(self): return dict(ListenAddress=self.address, Port=self.port)

class Namespace:
    "A network namespace, and how to run things in it"
    def __init__(self, name, make=True):
        self.name = name
        if make:
            sh('ip', 'netns', 'add', name)
            self.ip('link', 'set', 'lo', 'up')
    def ip(self, *args): return sh('ip', '-n', self.name, *args)
    @contextlib.contextmanager
    def entered(self):
        "What this thread opens, and the processes that it starts, are in this network namespace until the block ends"
        def go(f):
            # CLONE_NEWNET
            if ctypes.CDLL(None, use_errno=True).setns(f.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), 'setns')
        with open('/proc/thread-self/ns/net') as back, open(f'/run/netns/{self.name}') as there:
            go(there)
            try: yield
            finally: go(back)
    def exec(self, argv): return ['ip', 'netns', 'exec', self.name, *map(str, argv)]
    def run(self, *argv, **kw): return sh(*self.exec(argv), **kw)
    def popen(self, *argv, **kw): return subprocess.Popen(self.exec(argv), **kw)
    def nft(self, rules):
        "Put these rules in place of all there are"
        self.run('nft', '-f', '-', input='flush ruleset\n' + rules)
    def pids(self):
        try: ino = os.stat(f'/run/netns/{self.name}').st_ino
        except FileNotFoundError: return []
        def of(o):
            with contextlib.suppress(OSError): return os.stat(f'/proc/{o}/ns/net').st_ino
        return [o for o in _pids() if of(o) == ino]
    def kill(self): _kill_all(self.pids)
    def delete(self):
        self.kill()
        sh('ip', 'netns', 'del', self.name, check=False)

def _accept(ports): return f"tcp dport {{ {', '.join(map(str, ports))} }} accept;" if ports else ''

class NetHost(SSHHost):
    """A host with a network namespace, address and port 22, host name, /root, /home, /tmp, users and sudoers of its
    own. The rest of the file system is this machine's, the tests' Python and this repository included wherever
    they are."""
    port = 22
    def __init__(self, lab, i):
        self.i, self.link = i, f'h{i}'
        self.address, self.address6 = lab.addr(10 + i), lab.addr6(10 + i)
        self.addresses = [self.address, self.address6]
        super().__init__(lab, i)
        self.ns = lab.plug(f'h{i}', 10 + i)
        self.homes = self.dir/'homes'
        self.homes.mkdir()
        self.tmp.chmod(0o1777)
        for o in 'passwd group shadow'.split(): shutil.copy(f'/etc/{o}', self.dir/o)
        (self.dir/'shadow').chmod(0o600)
        (self.dir/'sudoers.d').mkdir()
        self.users, self._slow = {}, None

    def listen(self): return {}
    def session_env(self): return {}
    def dirs(self): return [self.home, self.tmp, self.homes]

    def wrap(self, argv):
        private = [(self.home, Path(pwd.getpwuid(0).pw_dir)), (self.tmp, Path('/tmp')), (self.homes, Path('/home'))]
        steps = [f'hostname {self.name}']
        for src, target in private:
            for keep in self.lab.keep:
                if target not in keep.parents: continue
                (at := src/keep.relative_to(target)).mkdir(parents=True, exist_ok=True)
                steps.append(f'mount --bind {quote(str(keep))} {quote(str(at))}')
        steps += [f'mount --rbind {src} {target}' for src, target in private if target.is_dir()]
        steps += [f'mount --bind {self.dir/o} /etc/{o}' for o in 'passwd group shadow sudoers.d'.split()
                  if os.path.exists(f'/etc/{o}')]
        steps += [f'mount --bind {self.lab.base}/hosts /etc/hosts', 'exec "$@"']
        return self.ns.exec(['unshare', '--mount', '--uts', '--propagation', 'private', 'sh', '-c', ' && '.join(steps),
                             'sh', *argv])

    def inside(self, argv, user=None):
        if user not in (None, 'root'):
            argv = ['setpriv', f'--reuid={self.users[user]}', f'--regid={self.users[user]}', '--clear-groups', '--',
                    *argv]
        return ['nsenter', '-t', self.proc.pid, '-m', '-n', '-u', '-r', '--', *argv]

    # Users

    def add_user(self, name, shell='/bin/sh', password=None, key=True):
        "An OS user of this host only, with a home in /home and, if `key`, access with the client's key; its user id"
        uid = 23000 + 100*self.lab.num + 10*self.i + len(self.users)
        hashed = sh('openssl', 'passwd', '-6', '-stdin', input=password).strip() if password else '*'
        entries = dict(passwd=f'x:{uid}:{uid}::/home/{name}:{shell}', group=f'x:{uid}:',
                       shadow=f'{hashed}:19000:0:99999:7:::')
        for f, line in entries.items():
            with open(self.dir/f, 'a') as o: o.write(f'{name}:{line}\n')
        (home := self.homes/name).mkdir(mode=0o700)
        os.chown(home, uid, uid)
        if key: self.accept_keys(name)
        self.users[name] = uid
        return uid

    def share_homes(self, other):
        "From now on this host has the users and homes of the host `other`, as where homes are on a file server"
        self.stop()
        self.home, self.homes, self.users = other.home, other.homes, other.users
        for o in 'passwd group shadow'.split(): shutil.copyfile(other.dir/o, self.dir/o)
        for o in self.users: shutil.copy(other.keys/o, self.keys/o)
        self.start()

    def sudoers(self, text):
        "Rules for sudo on this host only"
        (self.dir/'sudoers.d'/'tests').write_text(text.rstrip() + '\n')
        (self.dir/'sudoers.d'/'tests').chmod(0o440)

    # Power and links

    def power_off(self):
        "As when the plug is pulled: silence first, then every process gone; `power_on` starts sshd again"
        self.cut(); self.ns.kill()
        if self.proc: self.proc.wait()
        self.proc = None
    def power_on(self): self.start(); self.heal()

    def _port(self, state):
        self.lab.switch.run('bridge', 'link', 'set', 'dev', 'r' + self.link if self._slow else self.link, 'state',
                            state)
    def cut(self):
        "From now on everything to and from this host vanishes; nobody is told"
        self._port(0)
    def heal(self): self._port(3)

    def slow(self, ms=0, loss=0.0, mbit=None):
        """Delay every packet `ms` each way, lose the share `loss` of them, limit the rate to `mbit` each way; `slow()`
        ends it"""
        sw, me = self.lab.switch, self.ns
        for ns, dev in ((sw, self.link), (me, 'eth0')):
            sh('tc', '-n', ns.name, 'qdisc', 'del', 'dev', dev, 'root', check=False)
        if self._slow:
            self._slow.kill(); self._slow.wait(); self._slow = None
            sw.ip('link', 'del', f'r{self.link}')
            sw.ip('link', 'set', self.link, 'master', 'br0')
        if mbit:
            tbf = f'root tbf rate {mbit}mbit burst 64kb latency 200ms'.split()
            for ns, dev in ((sw, self.link), (me, 'eth0')): sh('tc', '-n', ns.name, 'qdisc', 'add', 'dev', dev, *tbf)
        if ms or loss:   # by a process of ours between host and switch: netem is not on every kernel
            sw.ip('link', 'add', f'r{self.link}', 'type', 'veth', 'peer', 'name', f'q{self.link}')
            for o in 'rq': sw.ip('link', 'set', o + self.link, 'up')
            self._slow = sw.popen(sys.executable, __file__, 'relay', self.link, f'q{self.link}', ms, loss,
                                  stdout=subprocess.PIPE)
            self._slow.stdout.readline()
            sw.ip('link', 'set', self.link, 'nomaster')
            sw.ip('link', 'set', f'r{self.link}', 'master', 'br0')

    def firewall(self, incoming=(22,), outgoing=()):
        "Let only these TCP ports in and out (None: all of them); what belongs to an accepted connection always passes"
        def chain(name, way, dev, ports):
            return (f'chain {name} {{ type filter hook {name} priority 0; policy drop; {dev} "lo" accept; '
                    'ct state established,related accept; meta l4proto 58 accept; '
                    f'{way if ports is None else _accept(ports)} }}\n')
        self.ns.nft('table inet fw {\n' + chain('input', 'accept;', 'iifname', incoming)
                    + chain('output', 'accept;', 'oifname', outgoing) + '}\n')
    def no_firewall(self): self.ns.nft('')

    def fill_disk(self, path, kb=64):
        "Mount a file system of `kb` KiB on `path` of the host and fill it up"
        self.run('sh', '-c', 'mkdir -p "$0" && mount -t tmpfs -o size=$1k,mode=1777 none "$0"', path, kb)
        self.run('dd', 'if=/dev/zero', f'of={path}/full', 'bs=1k', check=False)
    def free_disk(self, path): self.run('umount', '-l', path, check=False)

    def skew(self, seconds):
        "Let the clock of new sessions be `seconds` off (needs Debian's faketime)"
        lib = next(iter(Path('/usr/lib').glob('*/faketime/libfaketime.so.1')), None)
        if not lib: raise FileNotFoundError('libfaketime.so.1: install Debian package faketime')
        # not DONT_FAKE_MONOTONIC: with that, time.sleep fails
        self.env |= dict(LD_PRELOAD=str(lib), FAKETIME=f'{seconds:+d}')
        self.restart_sshd()

    @contextlib.contextmanager
    def capture(self):
        "Path of a file that gets every packet to and from this host (pcap format, complete when the block ends)"
        f = self.dir/f'capture-{time.monotonic_ns()}.pcap'
        p = self.ns.popen(sys.executable, __file__, 'capture', 'eth0', f, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        p.stdout.readline()
        try: yield f
        finally:
            time.sleep(0.1)
            p.stdin.close(); p.wait(); p.stdout.close()

    def repair(self):
        if self._slow or self.lab.switch.run('tc', 'qdisc', 'show', 'dev', self.link).count('tbf'): self.slow()
        self.heal(); self.no_firewall()
        super().repair()

    def _proc_net(self, f): return self.ns.run('cat', f'/proc/net/{f}')
    def _sshd(self): return [o for o in self.ns.pids() if (p := _proc(o)) and p.name.startswith('sshd')]
    def pids(self): return self.ns.pids()

# Labs

class Lab:
    """Some hosts and the client that can reach them; a context manager. `lab[0]`, `lab['host1']`, `lab.names`,
    `lab.client`."""
    def __init__(self,
        n=4,            # how many hosts
        client=None,    # a `Client` to use and extend; by default a new one
        # more directories that hosts of a `NetLab` share with this machine although they are below /tmp, /home or /root
        keep=(),
    ):
        if reason := self.missing(): raise RuntimeError(reason)
        self.sshd = shutil.which('sshd', path=SBIN)
        if os.getuid() == 0: Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
        self.keep = [REPO, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), *map(Path, keep)]
        mask = os.umask(0o022)   # users of the hosts are not always this one
        try:
            self._claim()
            self.client = client or Client(self.base/'client')
            self.setup(n)
            for h in self.hosts: h.start(); h.publish()
        except BaseException:
            if hasattr(self, '_reaper'): self.close()
            raise
        finally: os.umask(mask)

    @classmethod
    def missing(cls):
        "What stops this kind of lab on this machine, in words; None if nothing does"
        tools = [o for o in cls.tools if not shutil.which(o, path=SBIN)]
        if tools:
            return (f"not installed: {', '.join(tools)} (Debian packages openssh-server, openssh-client, iproute2, "
                    f"nftables)")

    def _claim(self):
        BASE.mkdir(exist_ok=True)
        with open(BASE/'lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for o in BASE.glob('*-*'):
                if not _owned(o): destroy(o)
            self.num = next(i for i in range(1, 250) if not (BASE/f'{self.kind}-{i}').exists() and self.free(i))
            self.base, self.mark = BASE/f'{self.kind}-{self.num}', secrets.token_hex(8)
            self.base.mkdir()
            (self.base/'owner').write_text(f'{os.getpid()} {_stat(os.getpid())[19].decode()} {self.mark}')
        self.keep.append(self.base)
        self._reaper = subprocess.Popen([sys.executable, __file__, 'reap', self.base], stdin=subprocess.PIPE,
                                        start_new_session=True)

    def free(self, num): return True
    def setup(self, n): self.hosts = [self.host(self, i + 1) for i in range(n)]
    def close(self):
        "End and remove everything of this lab"
        self._reaper.stdin.close()
        if self._reaper.wait(60): raise RuntimeError(f'could not clear up {self.base}')
        for h in getattr(self, 'hosts', ()):
            if h.proc: h.proc.wait()
    def repair(self):
        "Make all hosts reachable and default again, and end agents that keep templates, which are made again later"
        for h in self.hosts: h.repair()
        for pid in _pids():
            if _read(pid, 'comm') == b'gpssh-standby\n' and _environ(pid).get('GP_TEST_LAB') == str(self.base):
                with contextlib.suppress(ProcessLookupError, IndexError):
                    for o in int(_stat(pid)[1]), pid: os.kill(o, signal.SIGKILL)

    def __enter__(self): return self
    def __exit__(self, *exc): self.close()
    def __iter__(self): return iter(self.hosts)
    def __len__(self): return len(self.hosts)
    def __getitem__(self, i): return self.hosts[i] if isinstance(i, int) else next(h for h in self.hosts if h.name == i)
    @property
    def names(self): return [h.name for h in self.hosts]
    def kernels(self, kernel_id=None): return [p for h in self.hosts for p in h.kernels(kernel_id)]

    @contextlib.contextmanager
    def nothing_left(self, timeout=10, ignore=()):
        "`SSHHost.nothing_left` for all hosts"
        with contextlib.ExitStack() as stack:
            for h in self.hosts: stack.enter_context(h.nothing_left(timeout, ignore))
            yield

class LoopbackLab(Lab):
    "Hosts on 127.0.0.11 and on, high ports, for any user"
    kind, prefix, host, tools = 'lo', 'host', LoopbackHost, ('sshd', 'ssh-keygen')

class NetLab(Lab):
    """Hosts in network namespaces on one switch; this machine has the address `self.address` in that network. Needs
    root."""
    kind, prefix, host, tools = ('net', 'node', NetHost,
                                 ('sshd', 'ssh-keygen', 'ip', 'bridge', 'tc', 'nft', 'unshare', 'nsenter'))

    @classmethod
    def missing(cls):
        if os.getuid(): return 'network namespaces need root'
        if r := super().missing(): return r
        probe = 'unshare --net --mount --uts ip link add gptprobe type bridge'.split()
        if (probe := subprocess.run(probe, capture_output=True, text=True)).returncode:
            return f'no network namespaces here: {probe.stderr.strip()}'

    def free(self, num): return not Path(f'/sys/class/net/gpt{num}').exists()   # one of a container or chroot, say
    def addr(self, i): return f'10.231.{self.num}.{i}'
    def addr6(self, i): return f'fd31:{self.num:x}::{i:x}'
    def mac(self, i): return f'02:00:0a:e7:{self.num:02x}:{i:02x}'

    def setup(self, n):
        self.address, self._plugged = self.addr(1), [1]
        self.switch = Namespace(f'gpt{self.num}')
        self.switch.ip('link', 'add', 'br0', 'type', 'bridge')
        self.switch.ip('link', 'set', 'br0', 'up')
        self._cable(None, f'gpt{self.num}', 'up0', 1)
        (self.base/'hosts').write_text('127.0.0.1 localhost\n::1 localhost\n'
                                       + ''.join(f'{self.addr(11+i)} {self.prefix}{i+1}\n' for i in range(n)))
        super().setup(n)

    def _cable(self, ns, dev, port, i):
        "Link `dev` (in `ns` or here) to `port` of the switch, with the addresses number `i`"
        sw, at = self.switch.name, ns.name if ns else str(os.getpid())
        sh('ip', '-n', sw, 'link', 'add', port, 'type', 'veth', 'peer', 'name', dev, 'netns', at)
        self.switch.ip('link', 'set', port, 'master', 'br0', 'up')
        ip = ns.ip if ns else lambda *a: sh('ip', *a)
        ip('link', 'set', dev, 'address', self.mac(i), 'up')
        ip('addr', 'add', f'{self.addr(i)}/25', 'dev', dev)
        with contextlib.suppress(RuntimeError): ip('addr', 'add', f'{self.addr6(i)}/64', 'dev', dev, 'nodad')

    def plug(self, name, i):
        "A new namespace with the addresses number `i` on the switch"
        ns = Namespace(f'gpt{self.num}-{name}')
        self._cable(ns, 'eth0', name, i)
        # everybody knows everybody's hardware address for good, so that a cut link is silence and not 'no route to
        # host'
        for j in self._plugged:
            other = (lambda *a: sh('ip', *a)) if j == 1 else Namespace(f'gpt{self.num}-h{j-10}', make=False).ip
            for ip, dev, k in ((ns.ip, 'eth0', j), (other, f'gpt{self.num}' if j == 1 else 'eth0', i)):
                for a in (self.addr(k), self.addr6(k)):
                    with contextlib.suppress(RuntimeError):
                        ip('neigh', 'replace', a, 'lladdr', self.mac(k), 'dev', dev, 'nud', 'permanent')
        if name.startswith('h'): self._plugged.append(i)
        return ns

    def laptop(self, ports=(22,)):
        """A namespace for a host application behind a NAT router that lets it open TCP connections to `ports` only
        (None: all) and nothing in: `run(*argv)` and `popen(*argv)`, best with `env=lab.client.environ()`. The same one
        at every call."""
        if not hasattr(self, '_laptop'):
            self._router, self._laptop = self.plug('nat', 100), Namespace(f'gpt{self.num}-app')
            self._router.ip('link', 'add', 'in0', 'type', 'veth', 'peer', 'name', 'eth0', 'netns', self._laptop.name)
            for ns, dev, a in ((self._router, 'in0', 129), (self._laptop, 'eth0', 130)):
                ns.ip('addr', 'add', f'{self.addr(a)}/25', 'dev', dev)
                ns.ip('link', 'set', dev, 'up')
            self._laptop.ip('route', 'add', 'default', 'via', self.addr(129))
            self._router.run('sh', '-c', 'echo 1 > /proc/sys/net/ipv4/ip_forward')
        self._router.nft(f'''table ip gw {{
            chain forward {{ type filter hook forward priority 0; policy drop; ct state established,related accept;
                             iifname "in0" {'accept;' if ports is None else _accept(ports)} }}
            chain input {{ type filter hook input priority 0; policy drop; }}
            chain nat {{ type nat hook postrouting priority 100; oifname "eth0" masquerade; }}
        }}''')
        return self._laptop

# Clearing up

def _owner(base):
    try: return (base/'owner').read_text().split()
    except OSError: return []
def _owned(base): return len(o := _owner(base)) == 3 and _same(int(o[0]), o[1])

def destroy(base):
    "End and remove everything of the lab with the directory `base`, knowing no more than that"
    base = Path(base)
    kind, _, num = base.name.partition('-')
    if kind == 'net':
        for o in sh('ip', 'netns', 'list', check=False).splitlines():
            if re.fullmatch(rf'gpt{num}(-.*)?', name := o.split()[0]): Namespace(name, make=False).delete()
        sh('ip', 'link', 'del', f'gpt{num}', check=False)
    masters = [int(o) for f in base.glob('*/sshd.pid') if (o := f.read_text().strip()).isdigit()]
    sshds = [o for m in masters if str(base) in os.fsdecode(_read(m, 'cmdline')) for o in _sshd_tree(m)]
    mark = _owner(base)[2:]
    _kill_all(lambda: [o for o in _pids() if o in sshds or mark and _environ(o).get('GP_TEST_MARK') == mark[0]])
    def removed():
        shutil.rmtree(base, ignore_errors=True)
        return not base.exists()
    with contextlib.suppress(TimeoutError): wait(removed, 5, pause=.1)

def reap(base):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    base = Path(base)
    while not select.select([sys.stdin], [], [], 1)[0] and _owned(base): pass
    destroy(base)

# Packets

def _packets(dev):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.setsockopt(263, 15, 1)    # SOL_PACKET, PACKET_VNET_HDR: big frames and unfinished checksums go over as they are
    s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)    # SO_RCVBUFFORCE
    s.bind((dev, 3))            # ETH_P_ALL
    # PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC
    s.setsockopt(263, 1, struct.pack('iHH8s', socket.if_nametoindex(dev), 1, 0, b''))
    return s

def relay(a, b, ms, loss):
    "Carry frames between two interfaces, `ms` late, and lose some"
    a, b = map(_packets, (a, b))
    for s in (a, b): s.setsockopt(263, 23, 1)       # PACKET_IGNORE_OUTGOING
    to, late, seq, ms, loss, parent = {a: b, b: a}, [], 0, float(ms)/1000, float(loss), os.getppid()
    print('ready', flush=True)
    while os.getppid() == parent:
        now = time.monotonic()
        while late and late[0][0] <= now:
            with contextlib.suppress(OSError): late[0][2].send(late[0][3])
            heapq.heappop(late)
        for s in select.select([a, b], [], [], min(1, late[0][0] - now) if late else 1)[0]:
            frame = s.recv(1 << 17)
            seq += 1
            if random.random() >= loss: heapq.heappush(late, (time.monotonic() + ms, seq, to[s], frame))

def capture(dev, path):
    "Write frames to a pcap file until standard input ends"
    s = _packets(dev)
    with open(path, 'wb') as f:
        f.write(struct.pack('<IHHiIII', 0xa1b2c3d4, 2, 4, 0, 0, 1 << 18, 1))
        print('ready', flush=True)
        while s in (ready := select.select([s, sys.stdin], [], [])[0]) or not ready:
            frame, t = s.recv(1 << 17)[10:], time.time()
            f.write(struct.pack('<IIII', int(t), int(t % 1 * 1e6), len(frame), len(frame)) + frame)

if __name__ == '__main__': dict(reap=reap, relay=relay, capture=capture)[sys.argv[1]](*sys.argv[2:])
