"""How much a remote kernel costs over a local one: this provisioner, its peers and a local kernel, on the same hosts,
in one run.

python tests/bench.py # three rounds or so of everything, in about fifteen minutes python tests/bench.py --quick # one
small round: does it all work? python tests/bench.py --subjects local ours --rounds 7 # only these, exactly so many
rounds python tests/bench.py --subjects local gp gp-tuned gp-tunnel sshpyk python tests/bench.py --output
nbs/explanation/benchmark.json # what the notebook beside it shows

Every subject runs in a virtual environment of its own, made once and kept in --cache (all with the same ipykernel,
jupyter_client and pyzmq), as a host application that Jupyter Server's kernel manager drives (tests/bench_driver.py).
The hosts are real OpenSSH servers of the current user with sshd's defaults: in network namespaces if this is root, else
on loopback addresses, so all on one machine. While many kernels start at once, that machine's cores are divided in two,
half for the hosts and half for the host application, as different machines would have it: otherwise thirty interpreters
that start would keep the application's loop from running, and the loop would seem held (--share-cores lets them). Local
kernels share all cores with their application; so bursts of this provisioner are timed once more with all cores for
both. Rounds are interleaved (A B C, B C A, ...); a ratio is the median of each round's ratio to the local kernel of
that round, so what else the machine does falls on all of them."""
import argparse, hashlib, json, os, platform, shutil, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from bench_driver import Sides, netns, read
from hosts import LoopbackHost, LoopbackLab, NetLab

repo, driver = Path(__file__).parent.parent, Path(__file__).with_name("bench_driver.py")


def sh(*args, **kw):
    "Output of a command; its error output in the exception if it fails."
    p = subprocess.run([str(a) for a in args], text=True, capture_output=True, **kw)
    if p.returncode: raise RuntimeError(f"{' '.join(map(str, args))} failed:\n{p.stdout[-2000:]}{p.stderr[-4000:]}")
    return p.stdout


# --- environments ---
same = "ipykernel ipython jupyter_client numpy pandas pyzmq tornado traitlets".split()
source = [repo/f for f in "setup.py settings.ini pyproject.toml README.md MANIFEST.in LICENSE "
                          "gateway_provisioners_ssh".split()]
requirements = dict(local=["jupyter_client", "ipykernel", "pandas"], ours=["{source}[kernel]", "pandas"],
                    gp=["gateway_provisioners==0.5.0", "ipykernel", "pandas"],
                    sshpyk=["sshpyk==1.25", "ipykernel", "pandas"])


def fingerprint(name):
    files = [f for s in source for f in ([s] if s.is_file() else sorted(s.rglob("*"))) if f.is_file()
             and f.suffix != ".pyc"] if name == "ours" else []
    return hashlib.sha256(repr([requirements[name], [(str(f), f.read_bytes()) for f in files]]).encode()).hexdigest()


def environment(name, cache):
    "The Python of environment `name`, made or brought up to date."
    path, constraints = cache/name, cache/"constraints.txt"
    python, stamp, now = path/"bin"/"python", path/"stamp", fingerprint(name)
    if stamp.exists() and stamp.read_text() == now: return python
    print(f"environment {name}: {path}", file=sys.stderr)
    if not python.exists(): sh(sys.executable, "-m", "venv", path)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if name != "local": pip += ["-c", constraints]
    with tempfile.TemporaryDirectory() as tmp:
        if name == "ours":  # from a copy: a build leaves things where it happens
            for f in source: shutil.copytree(f, f"{tmp}/{f.name}") if f.is_dir() else shutil.copy(f, tmp)
            if stamp.exists(): pip += ["--force-reinstall", "--no-deps"]
        sh(*pip, *(r.format(source=tmp) for r in requirements[name]))
    if name == "local": constraints.write_text("".join(f"{k}=={v}\n" for k, v in versions(python).items() if k in same))
    stamp.write_text(now)
    return python


def versions(python):
    return {d["name"].lower().replace("-", "_"): d["version"] for d in
            json.loads(sh(python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"))}


# --- hosts ---
class Host(LoopbackHost):
    "Gateway Provisioners know one SSH port for all hosts: here it is one."
    def __init__(self, lab, i):
        super().__init__(lab, i)
        self.port = vars(lab).setdefault("port", self.port)


class Loopback(LoopbackLab): host, address = Host, "127.0.0.1"


def lab(count, keep, loopback=False):
    "Hosts in network namespaces where that can be had, else on loopback addresses."
    return (Loopback if loopback or NetLab.missing() else NetLab)(count, keep=keep)


# --- cores ---
def halves():
    "The cores of the host application and those of the hosts; where there is but one, both have it"
    cores = sorted(os.sched_getaffinity(0))
    return (cores[:len(cores)//2], cores[len(cores)//2:]) if len(cores) > 1 else (cores, cores)


def pin(pid, cores):
    "Lets all threads of process `pid`, and all its future children, run on `cores` only."
    for task in os.listdir(f"/proc/{pid}/task"): os.sched_setaffinity(int(task), cores)


# --- subjects ---
def spec(prefix, name): return prefix/"share"/"jupyter"/"kernels"/name/"kernel.json"


def write_spec(prefix, name, **content):
    spec(prefix, name).parent.mkdir(parents=True)
    spec(prefix, name).write_text(json.dumps(content))


def installed(prefix, python, hosts, entry):
    "Kernelspecs `one` and `many` by `jupyter ssh-spec install`, for the hosts' entries and this environment's Python."
    own = {"imports": ["--preload=pandas"]} if entry(hosts[0]) == hosts[0].name else {}
    for name, hs in dict(one=list(hosts)[:1], many=hosts, imports=list(hosts)[:1]).items():
        sh(python.parent/"jupyter-ssh-spec", "install", "--prefix", prefix, "--kernel-name", name, *own.get(name, []),
           *(f"--remote-hosts={entry(h)}" for h in hs))
        d = json.loads(spec(prefix, name).read_text())
        spec(prefix, name).write_text(json.dumps(d | dict(argv=[str(python), *d["argv"][1:]])))
    return dict(one=["one"], many=["many"], imports=["imports"])


def local(run, prefix, python): return dict.fromkeys(("one", "many", "imports"), ["python3"]), {}


def ours(run, prefix, python, **env):
    return (installed(prefix, python, run.lab, lambda h: h.name),
            dict(GP_KERNEL_LOG_DIR=str(run.dir), GP_STANDBY="on") | env)


def ours_tunnel(run, prefix, python): return ours(run, prefix, python, GP_ENABLE_TUNNELING="True")


def ours_cold(run, prefix, python): return ours(run, prefix, python, GP_STANDBY="off")


def gp(run, prefix, python, **env):
    """Gateway Provisioners know no aliases, one SSH port for all hosts, and one response address, which every host must
    reach."""
    return installed(prefix, python, run.lab, lambda h: h.address), dict(GP_SSH_PORT=str(run.lab[0].port),
                                                                         GP_RESPONSE_IP=run.lab.address,
                                                                         GP_KERNEL_LOG_DIR=str(run.dir), **env)


def gp_tuned(run, prefix, python):
    "Polling ten times as often as by default, and without the blocking sockets that hold the event loop."
    return gp(run, prefix, python, GP_POLL_INTERVAL="0.05", GP_SOCKET_TIMEOUT="0")


def gp_tunnel(run, prefix, python):
    "Its tunnels are commands `ssh -L`, which look for keys and hosts not where HOME says."
    ssh = run.dir/"bin"/"ssh"
    ssh.parent.mkdir(exist_ok=True)
    ssh.write_text(f"#!/bin/sh\nexec {shutil.which('ssh')} -F {run.dir}/ssh_config -o ControlMaster=no \"$@\"\n")
    ssh.chmod(0o755)
    return gp(run, prefix, python, GP_ENABLE_TUNNELING="True", GP_TUNNEL_MAX_KEEP_ALIVE="30",
              PATH=f"{ssh.parent}:{python.parent}:{os.environ['PATH']}")


def sshpyk(run, prefix, python):
    "sshpyk has one host a kernelspec; it wants a shared connection in the OpenSSH client's configuration."
    for h in run.lab:
        config = dict(ssh_host_alias=h.name, ssh_config=str(run.dir/"ssh_config"), remote_python=str(python),
                      remote_kernel_name="python3")
        write_spec(prefix, h.name, argv=["sshpyk-kernel"], display_name=h.name, language="python",
                   interrupt_mode="message",
                   metadata=dict(kernel_provisioner=dict(provisioner_name="sshpyk-provisioner", config=config)))
    return dict(one=run.lab.names[:1], many=run.lab.names, imports=run.lab.names[:1]), {}


subjects = {"local": ("local", "local kernel", local), "ours": ("ours", "this provisioner", ours),
            "ours-tunnel": ("ours", "this provisioner, tunnel", ours_tunnel),
            "ours-cold": ("ours", "this provisioner, no standby", ours_cold),
            "gp": ("gp", "Gateway Provisioners 0.5.0", gp), "sshpyk": ("sshpyk", "sshpyk 1.25", sshpyk),
            "gp-tuned": ("gp", "Gateway Provisioners, tuned", gp_tuned),
            "gp-tunnel": ("gp", "Gateway Provisioners, tunnel", gp_tunnel)}
default, in_bursts = ["local", "ours", "ours-tunnel", "gp", "sshpyk"], ("local", "ours", "ours-cold")
per_kernel = "cpu", "mem", "processes", "threads", "files"


# --- measuring ---
class Run:
    def __init__(self, args, dir, lab):
        self.args, self.dir, self.lab, self.jobs, self.rounds, self.versions = args, dir, lab, {}, [], {}
        self.pythons = dict(local=environment("local", args.cache))
        c = lab.client
        (c.ssh/"id_ed25519").symlink_to(c.key)
        (dir/"ssh_config").write_text(c.config.read_text() + f"""
Host *
    IdentityFile {c.key}
    UserKnownHostsFile {c.known_hosts}
    BatchMode yes
    ControlMaster auto
    ControlPersist 10m
    ControlPath {dir}/%n
""")

    def sides(self, marker):
        spaces = [netns(h.proc.pid) for h in self.lab] if isinstance(self.lab, NetLab) else []
        return dict(sshds=[h.proc.pid for h in self.lab], spaces=spaces, there=f"GP_TEST_LAB={self.lab.base}",
                    here=marker)

    def prepare(self, name):
        env, title, make = subjects[name]
        if env not in self.pythons: self.pythons[env] = environment(env, self.args.cache)
        python, prefix = self.pythons[env], self.dir/name
        kernels, variables = make(self, prefix, python)
        environ = {k: v for k, v in self.lab.client.environ().items() if not k.startswith("PYTHON")}
        environ |= (dict(JUPYTER_PATH=str(prefix/"share"/"jupyter"), PATH=f"{python.parent}:{os.environ['PATH']}")
                    | variables)
        self.jobs[name] = python, environ, kernels
        self.versions[name] = {k: v for k, v in versions(python).items() if k in same
                               or k in ("gateway_provisioners", "sshpyk", "paramiko")}
        warm = self.drive(python, environ, phase="many", kernels=kernels["many"], count=len(self.lab), idle=0)
        if trouble := warm.get("failed") or warm["errors"]: print(f"{name}, first try: {trouble}", file=sys.stderr)

    def measure(self, name):
        "One round of one subject: a dict of numbers."
        (python, environ, kernels), a, res = self.jobs[name], self.args, dict(left=0)
        def drive(phase, **job):
            got = self.drive(python, environ, phase=phase, kernels=kernels[dict(first="one").get(phase, phase)],
                             standby=environ.get("GP_STANDBY") == "on", **job)
            res["left"] += got.pop("left")
            return got
        res |= drive("one", more=a.more, trips=a.trips, megabytes=a.megabytes)
        for phase in ("first", "imports"):
            res |= {f"{k}_{phase}" if k == "failed" else k: v
                    for k, v in drive(phase, more=a.more, module="pandas").items()}
        for n in a.counts + [a.burst] * (a.burst and name in in_bursts):
            got = drive("many", count=n, idle=a.idle)
            res |= {k if k.startswith(per_kernel) and n == a.counts[-1] else f"{k}_{n}": v for k, v in got.items()}
            if name not in in_bursts or n == a.counts[0]: continue
            every = got if name == "local" else drive("many", count=n, idle=0, every=True)
            res |= {f"{k}_every_{n}": every[k] for k in ("start_all", "start_median", "failed", "errors") if k in every}
        if len(held := [(n, res[k]) for n in (*a.counts, a.burst)
                        if (k := "mem_all" if n == a.counts[-1] else f"mem_all_{n}") in res]) > 1:
            res["mem_further"] = (held[-1][1]-held[0][1])/(held[-1][0]-held[0][0])
        return res

    def drive(self, python, environ, every=False, **job):
        marker, (here, there) = f"BENCH_SIDE={os.urandom(8).hex()}", halves()
        apart = job["phase"] == "many" and python != self.pythons["local"] and not (every or self.args.share_cores)
        for h in self.lab: pin(h.proc.pid, there if apart else here+there)
        job |= dict(sides=self.sides(marker), env=dict(KERNEL_USERNAME="bench"))
        p = subprocess.Popen([str(python), str(driver), json.dumps(job)], env=environ | dict([marker.split("=")]),
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.lab.client.home,
                             start_new_session=True)
        pin(p.pid, here if apart else here+there)
        try: out, err = p.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            p.kill()
            out, err = p.communicate()
        with open(self.dir/"log", "a") as f: f.write(err)
        left = self.clean(marker)
        if p.returncode or not out.strip(): return dict(failed=err.strip()[-1500:] or "no answer in 240 s", left=left)
        return json.loads(out.strip().splitlines()[-1]) | dict(left=left)

    def clean(self, marker):
        """Ends what is left on both sides, the peers' kept connections included; number of processes left on the hosts
        after two seconds."""
        for p in (p for p in map(int, filter(str.isdigit, os.listdir("/proc")))
                  if marker.encode() in read(f"/proc/{p}/environ").split(b"\0")):
            self.kill(p)
        side, name, end = Sides(**self.sides(marker)), lambda p: read(f"/proc/{p}/comm").strip(), time.time()+2
        # an agent with its templates is there to stay a while
        def left_of(there): return [p for p in there if name(p) and not name(p).startswith((b"sshd", b"gpssh-"))]
        while left_of(there := side.sort()[1] - side.sshds) and time.time() < end: time.sleep(.1)
        left = left_of(there)
        with open(self.dir/"log", "a") as f:
            for p in left: f.write(f"left: {read(f'/proc/{p}/stat')[:60]} {read(f'/proc/{p}/cmdline')!r}\n")
        for p in there: self.kill(p)
        return len(left)

    def kill(self, pid):
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass


# --- results ---
def rows(n, burst):
    "What the table shows: (key, words, unit, factor to that unit, digits)."
    return [("first_reply", "start to first reply", "s", 1, 2),
            ("first_reply_ready", "… the first of an application", "s", 1, 2),
            ("first_reply_cold", "… the first on a host", "s", 1, 2), ("restart", "restart to first reply", "s", 1, 2),
            ("imported", "start until pandas is imported", "s", 1, 2),
            *[row for m in (*n, burst) if m for row in ((f"start_all_{m}", f"{m} at once, all", "s", 1, 2),
                *[(f"start_all_every_{m}", "… with all cores", "s", 1, 2)]*(m > n[0]),
                (f"start_median_{m}", "… median", "s", 1, 2), (f"replied_{m}", "… replies", "", 1, 0))],
            ("round_trip", "1+1, round trip", "ms", 1000, 1), ("output", "output", "MB/s", 1, 0),
            (f"loop_p99_{n[-1]}", f"loop held, {n[-1]} starts, 99 %", "ms", 1000, 1),
            (f"loop_p99_ticks_{n[-1]}", "… 99 % of ticks", "ms", 1000, 1),
            (f"loop_p99_bystander_{n[-1]}", "… 99 %, an idle process", "ms", 1000, 1),
            (f"loop_worst_{n[-1]}", "… worst", "ms", 1000, 0), ("cpu", f"idle CPU, {n[-1]} kernels", "%", 1, 1),
            ("cpu_here", "… this side", "%", 1, 1), ("cpu_there", "… hosts, not kernels", "%", 1, 1),
            ("mem_further", "memory of a further kernel", "MB", 1, 1),
            ("mem_there", f"memory on the host a kernel, {n[-1]} kernels", "MB", 1, 1),
            ("mem_beside", "… beside the kernel", "MB", 1, 1),
            ("mem_here", "memory of the host application", "MB", 1, 0),
            (f"stop_all_{n[-1]}", f"stop {n[-1]} at once", "s", 1, 2), ("left", "processes left behind", "", 1, 0)]


def summary(rounds, names):
    """Of every subject and number: median value, and median over rounds of the ratio to the local kernel of the same
    round."""
    res = {}
    for name in names:
        res[name] = {}
        for key in sorted({k for r in rounds for k, v in r.get(name, {}).items() if isinstance(v, (int, float))}):
            got = [(r[name][key], r.get("local", {}).get(key)) for r in rounds if r.get(name, {}).get(key) is not None]
            ratios = [v/base for v, base in got if base]
            res[name][key] = dict(value=statistics.median(v for v, _ in got),
                                  ratio=statistics.median(ratios) if ratios else None, low=min(v for v, _ in got),
                                  high=max(v for v, _ in got))
    return res


def table(sums, rows):
    lines = [["", *(subjects[s][1] for s in sums)]]
    for key, words, unit, factor, digits in rows:
        cells = []
        for s in sums:
            c = sums[s].get(key)
            ratio = f" ({c['ratio']:.2f})" if c and c["ratio"] is not None and s != "local" and unit else ""
            cells.append(f"{c['value']*factor:.{digits}f} {unit}{ratio}".strip() if c else "-")
        lines.append([words, *cells])
    widths = [max(len(l[i]) for l in lines) for i in range(len(lines[0]))]
    out = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(l, widths))) + " |"
           for l in lines]
    return "\n".join([out[0], "|" + "|".join("-"*(w+1) + (":" if i else "-") for i, w in enumerate(widths)) + "|",
                      *out[1:]])


def goals(sums, n):
    "The project's goals against what was measured: (words, subject, value, reached)."
    ratio, value, over = ((lambda k, s: sums[s][k]["ratio"]), (lambda k, s: sums[s][k]["value"]),
                          (lambda k, s: sums[s][k]["value"]-sums["local"][k]["value"]))
    below = lambda key, most, words: (key, f"{words}, ratio <= {most}", ratio, lambda v: v <= most)
    checks = [below("first_reply", .3, "start to first reply"), below("restart", .3, "restart"),
              below("first_reply_ready", .35, "first start of an application"),
              below(f"start_all_{n[-1]}", .25, f"{n[-1]} at once"),
              below(f"start_all_every_{n[-1]}", .25, f"{n[-1]} at once with all cores"),
              below("imported", .15, "start until pandas is imported"),
              below("mem_further", .5, "memory of a further kernel"),
              ("round_trip", "round trip, ratio <= 1.3", ratio, lambda v: v <= 1.3),
              ("output", "output, ratio >= 0.6", ratio, lambda v: v >= .6),
              (f"loop_p99_{n[-1]}", "loop held, 99 %, s <= 0.020", value, lambda v: v <= .02),
              ("cpu", "idle CPU, percent of a core above local <= 0.3", over, lambda v: v <= .3)]
    for s in sums:
        for key, words, of, test in checks if s.startswith("ours") and "local" in sums else []:
            v = of(key, s) if key in sums[s] else None
            yield words, s, v, v is not None and test(v)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--subjects", nargs="+", choices=subjects, default=default,
                   help=f"what to measure (default: {' '.join(default)})")
    p.add_argument("--rounds", type=int,
                   help="exactly so many rounds (default: as many as fit in --minutes, at least three)")
    p.add_argument("--minutes", type=float, default=12,
                   help="time for all rounds, environments not counted (default: %(default)s)")
    p.add_argument("--counts", type=int, nargs="+", default=[8, 32],
                   help="kernels to start at once, and to leave idle (default: 8 32)")
    p.add_argument("--burst", type=int, default=100,
                   help="more kernels to start at once, local and of this provisioner only; 0: no more (default: "
                        "%(default)s)")
    p.add_argument("--hosts", type=int, default=4, help="sshd servers (default: %(default)s)")
    p.add_argument("--loopback", action="store_true", help="hosts on loopback addresses, for root too")
    p.add_argument("--share-cores", action="store_true", help="let hosts and host application compete for all cores")
    p.add_argument("--quick", action="store_true", help="one round of small numbers")
    p.add_argument("--cache", type=Path, default=Path("~/.cache/gateway_provisioners_ssh/bench").expanduser(),
                   help="keeps the environments (default: %(default)s)")
    p.add_argument("--output", type=Path, help="write the results there as JSON")
    p.add_argument("--keep", action="store_true", help="keep the temporary directory: logs, specs, configuration")
    args = p.parse_args()
    args.more, args.trips, args.megabytes, args.idle = (1, 30, 20, 2) if args.quick else (4, 150, 100, 3)
    if args.quick: args.counts, args.burst, args.rounds = [2, 6], 12, 1
    args.cache.mkdir(parents=True, exist_ok=True)
    args.counts.sort()
    if not (repo/"gateway_provisioners_ssh"/"provisioner.py").exists():
        args.subjects = [s for s in args.subjects if not s.startswith("ours")]
    dir = Path(tempfile.mkdtemp(prefix="bench-"))
    dir.chmod(0o755)
    try:
        with lab(args.hosts, [args.cache, dir], args.loopback) as hosts: measure(Run(args, dir, hosts))
    finally:
        if args.keep: print(dir, file=sys.stderr)
        else: shutil.rmtree(dir, ignore_errors=True)
    return 0


def measure(run):
    args, names = run.args, run.args.subjects
    for name in names: run.prepare(name)
    start, n = time.time(), args.counts
    def more(done):
        return done < args.rounds if args.rounds else done < 3 or (time.time()-start)*(1+1/done) < args.minutes*60
    while more(len(run.rounds)):
        shift, got = len(run.rounds) % len(names), {}
        for name in names[shift:]+names[:shift]:
            t, got[name] = time.time(), run.measure(name)
            trouble = {k: v for k, v in got[name].items() if k.startswith(("failed", "errors")) and v}
            print(f"round {len(run.rounds)+1} {name}: {time.time()-t:.0f} s",
                  *[f"\n  {k}: {v}" for k, v in trouble.items()], file=sys.stderr)
        run.rounds.append(got)
        # after each round, so that a run can be ended early
        if args.output: args.output.write_text(json.dumps(results(run), indent=1, sort_keys=True)+"\n")
    sums = summary(run.rounds, names)
    print(table(sums, rows(n, args.burst)), f"\n{len(run.rounds)} rounds; in brackets: ratio to the local kernel",
          sep="\n")
    for words, s, v, ok in goals(sums, n):
        print(f"{'reached' if ok else 'MISSED '} {words}: {s} {v if v is None else round(v, 4)}")


def results(run):
    "What is written as JSON."
    args, names = run.args, run.args.subjects
    return dict(rounds=run.rounds, summary=summary(run.rounds, names), versions=run.versions, counts=args.counts,
                burst=args.burst, rows=rows(args.counts, args.burst), titles={s: subjects[s][1] for s in names},
                machine=dict(cores=os.cpu_count(), python=platform.python_version(),
                             hosts=f"{len(run.lab)}, "
                             + ("network namespaces" if isinstance(run.lab, NetLab) else "loopback addresses")))


if __name__ == "__main__": sys.exit(main())
