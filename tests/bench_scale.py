"""What many hosts cost the host application: 1 to 1,000 hosts, each connected and with one small process.

    python tests/bench_scale.py                                       # all sizes, in about a quarter of an hour
    python tests/bench_scale.py --counts 1 10 --idle 5                # does it all work?
    python tests/bench_scale.py --output nbs/explanation/scale.json   # what the notebook beside it shows

The hosts are addresses of the loopback network (127.0.0.0/8), so Linux is needed, and one real OpenSSH server listens
on all of them; to the host application they are as many hosts as there are addresses. Each has a process of its own to
watch, a `sleep`. For every number of hosts two processes are measured, one after the other: one that has this package's
connections, and one that has as many bare connections of paramiko with one session channel each and nothing of this
package. What the first has more than the second is the package's own. Memory is what the process has grown by since
before the first connection, in KB."""
import argparse, asyncio, json, os, platform, resource, shutil, socket, statistics, subprocess, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from hosts import SBIN, sh
from pace import wait


def address(i): return f"127.7.{i//250}.{i%250+1}"


# --- the hosts ---
class Sshd:
    "One SSH server on every loopback address; a context manager. `dir` has what a client needs."
    def __init__(self, count):
        self.count, self.dir = count, Path(tempfile.mkdtemp(prefix="bench-scale-"))
        for o in "host_key", "key": sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", self.dir/o)
        shutil.copy(self.dir/"key.pub", self.dir/"authorized")
        with socket.socket() as s: s.bind(("0.0.0.0", 0)); self.port = s.getsockname()[1]
        public = " ".join((self.dir/"host_key.pub").read_text().split()[:2])
        (self.dir/"known_hosts").write_text("".join(f"[{address(i)}]:{self.port} {public}\n" for i in range(count)))
        (self.dir/"config").write_text(f"Host *\n IdentityFile {self.dir}/key\n UserKnownHostsFile "
                                       f"{self.dir}/known_hosts\n IdentityAgent none\n")
        options = dict(ListenAddress="0.0.0.0", Port=self.port, HostKey=self.dir/"host_key", PidFile="none",
                       StrictModes="no", UsePAM="no", AuthorizedKeysFile=self.dir/"authorized", MaxStartups=200,
                       SetEnv=f'"TMPDIR={self.dir}" "HOME={self.dir}" '
                              f'"PATH={Path(sys.executable).parent}:/usr/bin:/bin"')
        (self.dir/"sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))

    def __enter__(self):
        # one agent serves all
        def many_files():
            resource.setrlimit(resource.RLIMIT_NOFILE, [max(resource.getrlimit(resource.RLIMIT_NOFILE))]*2)
        Path("/run/sshd").mkdir(exist_ok=True) if os.getuid() == 0 else None
        self.log = open(self.dir/"log", "wb")
        self.proc = subprocess.Popen([shutil.which("sshd", path=SBIN), "-D", "-e", "-f", self.dir/"sshd_config"],
                                     stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True,
                                     preexec_fn=many_files)
        wait(lambda: b"Server listening" in (self.dir/"log").read_bytes(), what="sshd listening")
        return self

    def __exit__(self, *_):
        self.proc.kill()
        self.proc.wait()
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)


# --- what a process costs ---
def pss():
    "This process's proportional memory, KB"
    with open("/proc/self/smaps_rollup") as f: return sum(int(l.split()[1]) for l in f if l.startswith("Pss:"))


def threads(): return os.listdir("/proc/self/task")


def wake_ups():
    "How often threads of this process have gone to sleep so far"
    lines = [l for t in threads() for l in open(f"/proc/self/task/{t}/status") if l.startswith("voluntary_ctxt")]
    return sum(int(l.split()[1]) for l in lines)


def cost(seconds):
    "What this process needs to do nothing for `seconds`"
    t, cpu, wakes = time.monotonic(), time.process_time(), wake_ups()
    time.sleep(seconds)
    took = time.monotonic()-t
    return dict(cpu=100*(time.process_time()-cpu)/took, wakes=(wake_ups()-wakes)/took, threads=len(threads()),
                files=len(os.listdir("/proc/self/fd")))


# --- paramiko alone ---
def bare(job):
    import paramiko
    paramiko.util.logging.getLogger("paramiko").setLevel("CRITICAL")
    key, host_key = (paramiko.Ed25519Key(filename=f"{job['dir']}/key"),
                     paramiko.Ed25519Key(filename=f"{job['dir']}/host_key"))
    def connect(i):
        client = paramiko.SSHClient()
        client.get_host_keys().add(f"[{address(i)}]:{job['port']}", host_key.get_name(), host_key)
        client.connect(address(i), job["port"], pkey=key, allow_agent=False, look_for_keys=False)
        chan = client.get_transport().open_session()
        chan.exec_command("exec cat")
        return client, chan
    before = pss()
    kept = [connect(i) for i in range(job["count"])]
    res = dict(memory=pss()-before) | cost(job["idle"])
    for client, _ in kept: client.close()
    return res


# --- this package ---
async def connected(job):
    "As many connections as there are hosts, with a process on each"
    from gateway_provisioners_ssh.hosts import Host, Login
    from gateway_provisioners_ssh.remote import spawn
    from gateway_provisioners_ssh.ssh import Pool
    pool, login, few = (Pool(), Login(port=job["port"], connect_timeout=5, config=f"{job['dir']}/config"),
                        asyncio.Semaphore(8))
    async def start(i):
        async with few:
            conn = await pool.connection(Host(address(i), port=job["port"]), login)
            conn.pythons = (sys.executable,)
            return await spawn(await conn.session(), conn.wait_connected, f"{job['dir']}/log-{i}", title="sleep",
                               max_bytes=8192, argv=["sleep", "3600"], env={}, orphan_timeout=30)
    return pool, await asyncio.gather(*(start(i) for i in range(job["count"])))


def ours(job):
    from gateway_provisioners_ssh.background import background
    import gateway_provisioners_ssh.ssh
    do = lambda coro: asyncio.run_coroutine_threadsafe(coro, background().loop).result()
    background()
    before = pss()
    pool, processes = do(connected(job))
    res = dict(memory=pss()-before) | cost(job["idle"])
    async def end():
        await asyncio.gather(*(p.release(False) for p in processes))
        await pool.close()
    do(end())
    return res | dict(start=start_cost(job["count"]))


def start_cost(count, times=200):
    "Milliseconds on event loops for a start with so many entries, until the first host is asked"
    from jupyter_client.kernelspec import KernelSpec
    from traitlets.config import Config
    from gateway_provisioners_ssh.provisioner import DistributedProvisioner
    config = Config(DistributedProvisioner=dict(remote_hosts=[f"user@node{i}:2222" for i in range(count)],
                                                load_balancing_algorithm="least-connection"))
    spec, took = KernelSpec(argv=["python3", "{response_address}"]), []
    for i in range(times):
        t = time.perf_counter()
        p = DistributedProvisioner(kernel_id=f"k{i}", kernel_spec=spec, config=config)
        choice = p.choose_hosts(p.checked_request(dict(KERNEL_USERNAME="bench"), spec.argv))
        choice.next()
        took.append(time.perf_counter()-t)
        choice.claim.release()
    return 1000*statistics.median(took)


def drive(job): print(json.dumps(dict(bare=bare, ours=ours)[job["subject"]](job)))


# --- all of it ---
def run(subject, sshd, count, idle):
    job = dict(subject=subject, dir=str(sshd.dir), port=sshd.port, count=count, idle=idle)
    p = subprocess.run([sys.executable, __file__, "drive", json.dumps(job)], text=True, capture_output=True,
                       timeout=1800)
    if p.returncode: raise RuntimeError(p.stderr[-4000:])
    return json.loads(p.stdout.strip().splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 300, 1000],
                   help="numbers of hosts (default: 1 10 100 300 1000)")
    p.add_argument("--idle", type=float, default=60, help="seconds that each is left idle (default: %(default)s)")
    p.add_argument("--output", type=Path, help="write the results there as JSON")
    args = p.parse_args()
    machine = dict(cores=os.cpu_count(), python=platform.python_version(), idle=args.idle)
    results = dict(machine=machine, ours={}, bare={})
    with Sshd(max(args.counts)) as sshd:
        for n in sorted(args.counts):
            for subject in "bare", "ours":
                results[subject][n] = got = run(subject, sshd, n, args.idle)
                print(f"{n:5} hosts, {subject}: " + ", ".join(f"{k} {v:.4g}" for k, v in got.items()), flush=True)
    if args.output: args.output.write_text(json.dumps(results, indent=1, sort_keys=True)+"\n")


if __name__ == "__main__": drive(json.loads(sys.argv[2])) if sys.argv[1:2] == ["drive"] else main()
