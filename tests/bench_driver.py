"""One measured host application: `python bench_driver.py JOB` with JOB a JSON object; prints one JSON object of
numbers.

Runs in the environment of the provisioner under test, so it imports nothing but the standard library and
jupyter_client. The manager is the one that Jupyter Server uses (its restarter asks each kernel every three seconds
whether it lives). JOB: kernels: kernelspec names, used in turn. phase: "one" (a kernel: start, restart, round trip,
output), "first" (a fresh application's first start, where hosts stand by for it if they can), "imports" (start until
`job["module"]` is imported) or "many" (`count` at once). standby: have hosts make their templates before what is
measured. sides: how to tell the processes of this side from those of the hosts, see `Sides`."""
import asyncio, json, os, statistics, sys, time

clock, tick, apart = time.perf_counter, 0.002, 0.01
quiet = dict(silent=False, store_history=False, allow_stdin=False)


def read(path):
    try:
        with open(path, "rb") as f: return f.read()
    except OSError: return b""


# --- what runs, and what it costs ---
def processes():
    "Every process that can be seen: pid -> (ppid, CPU seconds of its reaped children)."
    res, hz = {}, os.sysconf("SC_CLK_TCK")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        stat = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        if len(stat) > 14: res[int(pid)] = int(stat[1]), (int(stat[13])+int(stat[14]))/hz
    return res


def below(roots, procs):
    "`roots` and their descendants."
    res, more = set(), set(roots)
    while more:
        res |= more
        more = {p for p, (parent, _) in procs.items() if parent in more} - res
    return res


def netns(pid):
    try: return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError: return None


class Sides:
    """Sorts processes into this side's and the hosts'. A host has what descends from its sshd (`sshds`, pids), runs in
    its network namespace (`spaces`, inodes) or carries the environment entry `there`; this side has its descendants and
    what carries `here`."""
    def __init__(self, sshds, spaces, there, here):
        self.sshds, self.spaces, self.marks = set(sshds), set(spaces), (there.encode(), here.encode())

    def sort(self, kernels=()):
        "`(here, there)` without `kernels`; `there` includes the sshd daemons, the reapers of their sessions."
        procs = processes()
        envs = {p: read(f"/proc/{p}/environ").split(b"\0") for p in procs}
        there = (below(self.sshds, procs)
                 | {p for p in procs if self.marks[0] in envs[p] or (self.spaces and netns(p) in self.spaces)})
        here = (below({os.getpid()}, procs) | {p for p in procs if self.marks[1] in envs[p]}) - there
        return here - set(kernels), there - set(kernels)


def cpu(pids):
    "CPU seconds so far of `pids`, with their reaped children."
    procs, ns = processes(), 0
    for p in pids:
        try: tasks = os.listdir(f"/proc/{p}/task")
        except OSError: continue
        ns += sum(int((read(f"/proc/{p}/task/{t}/schedstat").split() or [0])[0]) for t in tasks)
    return ns/1e9 + sum(procs[p][1] for p in pids if p in procs)


def pss(pids):
    "Proportional memory of `pids`, MB."
    lines = [l.split() for p in pids for l in read(f"/proc/{p}/smaps_rollup").splitlines() if l.startswith(b"Pss:")]
    return sum(int(l[1]) for l in lines)/1000


# --- the event loop ---
class Ticker:
    "Wakes every 2 ms on the loop under test and notes how late."
    async def __aenter__(self):
        self.late, self.task = [], asyncio.create_task(self.run())
        return self

    async def run(self):
        while True:
            due = clock() + tick
            await asyncio.sleep(tick)
            self.late.append(max(0., clock()-due))

    async def __aexit__(self, *_):
        await asyncio.sleep(0)
        self.task.cancel()

    def held(self):
        """Worst and 99th percentile, seconds. A tick that comes 1 s late stands for the 500 that it kept from
        happening: they are counted too, each with the wait it would have had, so the percentile is that of a moment in
        time."""
        late, ticks = sorted(x for l in self.late for x in _steps(l)), sorted(self.late)
        return dict(loop_worst=late[-1], loop_p99=late[int(len(late)*.99)], loop_p99_ticks=ticks[int(len(ticks)*.99)])


class Bystander:
    "A process with an event loop and nothing to do: how late it wakes is the machine's doing, not the provisioner's."
    async def __aenter__(self):
        self.proc = await asyncio.create_subprocess_exec(sys.executable, __file__, "bystander", stdin=-1, stdout=-1)
        await self.proc.stdout.readline()
        return self

    async def __aexit__(self, *_): self.late = json.loads((await self.proc.communicate(b""))[0])


async def bystander():
    async with Ticker() as ticker:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(json.dumps(ticker.held()))


def _steps(late):
    yield late
    while (late := late-tick) > 0: yield late


# --- kernels ---
class Kernel:
    def __init__(self, name, env): self.km, self.env = Manager(kernel_name=name), env

    async def start(self, after=0, code=""):
        "Seconds from the request, made `after` seconds from now, to the reply of a first cell; also leaves `pid`."
        await asyncio.sleep(after)
        t = clock()
        await self.km.start_kernel(env={**os.environ, **self.env})
        return await self.first_cell(code)-t

    async def restart(self):
        "Seconds from the request to the reply of a first cell in the new process."
        self.kc.stop_channels()
        t = clock()
        await self.km.restart_kernel()
        return await self.first_cell()-t

    async def first_cell(self, code=""):
        "When a new client has the reply of its first cell."
        self.kc = self.km.client()
        self.kc.start_channels(hb=False, stdin=False)
        reply = await self.reply(self.kc.execute(code, user_expressions={"pid": "__import__('os').getpid()"}, **quiet))
        t, content = clock(), reply["content"]
        if content["status"] != "ok": raise RuntimeError(f"{code}: {content.get('evalue')}")
        self.pid = int(content["user_expressions"]["pid"]["data"]["text/plain"])
        return t

    async def ready(self):
        "Returns when the kernel's output reaches us: the subscription takes its time, through a tunnel above all."
        while True:
            self.kc.kernel_info()
            try: return await self.kc.get_iopub_msg(timeout=.2)
            except Exception as e:
                if type(e).__name__ != "Empty": raise

    async def reply(self, msg_id):
        while True:
            msg = await self.kc.get_shell_msg(timeout=120)
            if msg["parent_header"].get("msg_id") == msg_id: return msg

    async def idle(self, msg_id):
        "Characters that the cell wrote, once it is done."
        n = 0
        while True:
            msg = await self.kc.get_iopub_msg(timeout=60)
            if msg["parent_header"].get("msg_id") != msg_id: continue
            if msg["msg_type"] == "stream": n += len(msg["content"]["text"])
            if msg["content"].get("execution_state") == "idle": return n

    async def cell(self, code):
        "Seconds and characters written of one cell, from sending it to its reply and its last output."
        t, msg_id = clock(), self.kc.execute(code, **quiet)
        await self.reply(msg_id)
        n = await self.idle(msg_id)
        return clock()-t, n

    async def stop(self):
        if hasattr(self, "kc"): self.kc.stop_channels()
        if self.km.has_kernel: await asyncio.wait_for(self.km.shutdown_kernel(), 90)


async def stand_by(job):
    """Have the hosts of all kernelspecs make their templates, and wait until they have; nothing where the job does not
    say so."""
    for name in job["kernels"] if job.get("standby") else ():
        from gateway_provisioners_ssh.background import background
        km = Manager(kernel_name=name)
        p = _provisioner(km)
        request = p.checked_request({**os.environ, **job["env"]}, km.kernel_spec.argv)
        async def make(host):
            attempt = await p.reach(host, request, time.monotonic()+30)
            said = await attempt.start_message(await attempt.make_keys())
            return await attempt.target.agent.request("standby",
                                                      **{k: said[k] for k in ("argv", "env", "spec_env", "standby")})
        for host in p.remote_hosts:
            if why := (await background().run(make(host)))["cold"]: raise RuntimeError(f"{host} cannot stand by: {why}")


def _provisioner(km):
    from jupyter_client.provisioning import KernelProvisionerFactory
    return KernelProvisionerFactory.instance(parent=km.parent).create_provisioner_instance("standby", km.kernel_spec,
        parent=km)


async def first(job, side):
    "A fresh host application's first kernel."
    await stand_by(job)
    k = Kernel(job["kernels"][0], job["env"])
    res = dict(first_reply_ready=await k.start())
    await k.stop()
    return res


async def imports(job, side):
    "Start until a module is imported; its files were read before, as on a host that is in use."
    await stand_by(job)
    res = []
    for i in range(job["more"]+1):
        k = Kernel(job["kernels"][0], job["env"])
        res.append(await k.start(code=f"import {job['module']}"))
        await k.stop()
    return dict(imported=statistics.median(res[1:]))


async def one(job, side):
    """A fresh host application: a first kernel, further ones on the same host, a restart, then round trips and output
    of the last."""
    res, k = dict(first_reply=[], restart=[]), Kernel(job["kernels"][0], job["env"])
    res["first_reply_cold"] = await k.start()
    await stand_by(job)
    for _ in range(job["more"]):
        await k.stop()
        k = Kernel(job["kernels"][0], job["env"])
        res["first_reply"].append(await k.start())
    for _ in range(job["more"]): res["restart"].append(await k.restart())
    await k.ready()
    for _ in range(5): await k.cell("1+1")
    trips, end = [], clock()+4
    while len(trips) < job["trips"] and (clock() < end or len(trips) < 20): trips.append((await k.cell("1+1"))[0])
    res["round_trip"] = statistics.median(trips)
    block = "block = ('x'*99+'\\n') * 10_000"
    await k.cell(block)
    secs, n = await k.cell(f"for _ in range({job['megabytes']}): print(block, end='', flush=True)")
    if n != job["megabytes"]*1_000_000: raise RuntimeError(f"{n} of {job['megabytes']} MB arrived")
    res["output"] = job["megabytes"]/secs
    res |= {k: statistics.median(res[k]) for k in ("first_reply", "restart")}
    await k.stop()
    return res


async def many(job, side):
    """`count` starts at once in a host application that has had one kernel so far, then all of them idle. The requests
    come 10 ms apart, as requests do: in one turn of the loop, even jupyter_client's own work for each would add up to
    one long hold."""
    names = job["kernels"]
    before = Kernel(names[0], job["env"])
    await before.start()
    await before.stop()
    await stand_by(job)
    ks = [Kernel(names[i % len(names)], job["env"]) for i in range(job["count"])]
    await asyncio.sleep(.5)
    async with Bystander() as other, Ticker() as ticker:
        t = clock()
        got = await asyncio.gather(*(k.start(i*apart) for i, k in enumerate(ks)), return_exceptions=True)
        t = clock()-t
    good = [t for t in got if isinstance(t, float)]
    res = dict(replied=len(good), errors=[f"{type(e).__name__}: {e}"[:300] for e in got if not isinstance(e, float)],
               **ticker.held(), loop_p99_bystander=other.late["loop_p99"])
    if good: res |= dict(start_median=statistics.median(good), start_all=t)
    if job["idle"] and good:
        for k in ks: getattr(k, "kc", None) and k.kc.stop_channels()
        res |= await idle(job, side, [k.pid for k in ks if hasattr(k, "pid")])
    t = clock()
    stops = await asyncio.gather(*(k.stop() for k in ks), return_exceptions=True)
    res["stop_all"] = clock()-t
    res["errors"] += [f"stop: {type(e).__name__}: {e}"[:300] for e in stops if e]
    return res


async def idle(job, side, kernels):
    """CPU over some seconds, in percent of one core, and memory per kernel, of idle `kernels`; `mem_all` is that of all
    on the hosts."""
    await asyncio.sleep(3)
    here, there = side.sort(kernels)
    groups, t = dict(here=here, there=there, kernels=kernels), clock()
    before = {g: cpu(p) for g, p in groups.items()}
    await asyncio.sleep(job["idle"])
    res = {f"cpu_{g}": (cpu(p)-before[g])/(clock()-t)*100 for g, p in groups.items()}
    beside, n = there-side.sshds, len(kernels)
    return res | dict(cpu=sum(res.values()), mem_all=pss(beside | set(kernels)), mem_beside=pss(beside)/n,
                      mem_kernel=pss(kernels)/n, mem_here=pss(here), mem_there=pss(beside | set(kernels))/n,
                      processes_there=len(beside)/n, processes_here=len(here)/n,
                      threads_here=len(os.listdir("/proc/self/task")), files_here=len(os.listdir("/proc/self/fd")))


if __name__ == "__main__":
    from jupyter_client.ioloop import AsyncIOLoopKernelManager as Manager
    from jupyter_core.paths import jupyter_runtime_dir
    os.makedirs(jupyter_runtime_dir(), 0o700, exist_ok=True)  # as every Jupyter application does
    if sys.argv[1] == "bystander": sys.exit(asyncio.run(bystander()))
    job = json.loads(sys.argv[1])
    result = asyncio.run(dict(one=one, first=first, imports=imports, many=many)[job["phase"]](job,
        Sides(**job["sides"])))
    print(json.dumps(result), flush=True)
    os._exit(0)  # how long a provisioner's threads take to end is not the matter here
