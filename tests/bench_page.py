"""How responsive a Jupyter server stays while kernels start: its event loop, and the page of hosts and kernels.

    python tests/bench_page.py                  # three rounds, with the page open and without, 16 kernels each
    python tests/bench_page.py --kernels 32 --rounds 5

The server is a process of its own with four real hosts. As in tests/bench.py the machine's cores are divided in two,
half for the hosts and half for the server and for what asks it. A ticker in the server's loop wakes every 2 ms and
notes how late; an idle process beside it tells how much of that is the machine's. With the page open, this process
reads its stream as a browser does, and asks for the page again and again; how long an answer takes, and how long after
a kernel's start its row is there, is noted too.
"""
import argparse, asyncio, json, os, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from bench import halves, lab, pin
from bench_driver import Bystander, read

TOKEN, here, there = "of-the-benchmark", *halves()

TICKER = """import json
from bench_driver import Ticker
from jupyter_server.base.handlers import APIHandler
class Handler(APIHandler):
    async def post(self):
        Handler.ticker = await Ticker().__aenter__()
        self.finish()
    async def get(self):
        await Handler.ticker.__aexit__()
        self.finish(json.dumps(Handler.ticker.held()))
def _load_jupyter_server_extension(app): app.web_app.add_handlers(".*$", [(app.base_url + "ticker", Handler)])
def _jupyter_server_extension_points(): return [dict(module="bench_ticker")]
"""


class Server:
    "A Jupyter server for these hosts, on this side's cores"
    def __init__(self, hosts, dir):
        self.dir = dir
        (dir/"bench_ticker.py").write_text(TICKER)
        extensions = {"bench_ticker": True, "gateway_provisioners_ssh.extension": True}
        config = dict(token=TOKEN, allow_root=True, open_browser=False, jpserver_extensions=extensions)
        (dir/"jupyter_server_config.json").write_text(json.dumps(dict(ServerApp=config)))
        self.env = hosts.client.environ() | dict(JUPYTER_CONFIG_DIR=str(dir), JUPYTER_DATA_DIR=str(dir/"data"),
            JUPYTER_RUNTIME_DIR=str(dir/"runtime"), KERNEL_USERNAME="bench", GP_STANDBY="on", GP_PREWARM="on",
            PYTHONPATH=f"{dir}:{Path(__file__).parent}")
        install = [Path(sys.executable).parent/"jupyter-ssh-spec", "install", "--user", "--python", sys.executable]
        names = ["--kernel-name", "hosts", "--remote-hosts", ",".join(hosts.names)]
        subprocess.run(install + names, env=self.env, check=True, capture_output=True)
        server = [sys.executable, "-m", "jupyter_server"]
        with open(dir/"log", "w") as f: self.proc = subprocess.Popen(server, env=self.env, cwd=dir, stdout=f, stderr=f)
        pin(self.proc.pid, here)

    async def ready(self):
        file = self.dir/f"runtime/jpserver-{self.proc.pid}.json"
        while not file.exists() or not file.read_text().endswith("}"): await asyncio.sleep(.1)
        self.url = json.loads(file.read_text())["url"].rstrip("/")

    async def ask(self, method, path, body=None):
        headers = dict(Authorization=f"token {TOKEN}")
        r = await AsyncHTTPClient().fetch(HTTPRequest(f"{self.url}/{path}", method, headers, body, request_timeout=120))
        return json.loads(r.body) if r.body.startswith(b"{") else r.body


class Page:
    "What a browser with the page does, and when it saw a kernel's row first"
    def __init__(self): self.seen, self.took, self.tasks = {}, [], []
    async def __aenter__(self): return self
    async def __aexit__(self, *exc):
        for o in self.tasks: o.cancel()
        await asyncio.wait(self.tasks or [asyncio.ensure_future(asyncio.sleep(0))])

    def open(self, server): self.tasks = [asyncio.ensure_future(o) for o in (self.read(server), self.look(server))]

    async def read(self, server):
        host, port = server.url.removeprefix("http://").split(":")
        r, w = await asyncio.open_connection(host, port, limit=2**24)
        try:
            headers = f"Host: {host}:{port}\r\nAuthorization: token {TOKEN}\r\n\r\n"
            w.write(f"GET /ssh-hosts/events HTTP/1.1\r\n{headers}".encode())
            async for line in r:
                if not line.startswith(b"data: "): continue
                for row in json.loads(line[6:])["rows"].values():
                    if row["kind"] == "kernel": self.seen.setdefault(row["id"], time.perf_counter())
        finally: w.close()

    async def look(self, server):
        while True:
            t = time.perf_counter()
            await server.ask("GET", "ssh-hosts")
            self.took.append(time.perf_counter() - t)
            await asyncio.sleep(.02)


def p99(values): return sorted(values)[int(len(values)*.99)]


async def measure(server, n, with_page):
    "Start `n` kernels 10 ms apart; the numbers of this round"
    async with Page() as page:
        if with_page: page.open(server)
        await asyncio.sleep(2)
        page.took.clear()
        started = {}
        async def start(i):
            await asyncio.sleep(i*.01)
            id = (await server.ask("POST", "api/kernels", json.dumps(dict(name="hosts"))))["id"]
            started[id] = time.perf_counter()
        await server.ask("POST", "ticker", b"")
        async with Bystander() as other:
            t = time.perf_counter()
            await asyncio.gather(*map(start, range(n)))
            took = time.perf_counter() - t
        res = dict(await server.ask("GET", "ticker"), bystander_p99=other.late["loop_p99"], all_started=took)
        if with_page:
            answers = list(page.took)
            while not set(started) <= set(page.seen): await asyncio.sleep(.05)
            late = max(page.seen[k] - v for k, v in started.items())
            res |= dict(answer_median=statistics.median(answers), answer_p99=p99(answers), row_after=late)
        await asyncio.gather(*(server.ask("DELETE", f"api/kernels/{o}") for o in started))
    return res


async def run(args, hosts, dir):
    server, rounds = Server(hosts, dir), {True: [], False: []}
    try:
        await server.ready()
        await measure(server, 4, True)   # the hosts make their templates meanwhile
        await asyncio.sleep(5)
        for _ in range(args.rounds):
            for with_page in True, False: rounds[with_page].append(await measure(server, args.kernels, with_page))
    finally:
        server.proc.send_signal(signal.SIGTERM)
        server.proc.wait(60)
    print(f"{args.kernels} kernels at once, {args.rounds} rounds, {len(here)} + {len(there)} cores; medians, in ms")
    for key in rounds[True][0]:
        medians = [1000*statistics.median(o[key] for o in rounds[w]) for w in (True, False) if key in rounds[w][0]]
        print(f"{key:15}", *(f"{words} {m:8.1f}" for words, m in zip(("page open", "  no page"), medians)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kernels", type=int, default=16, help="how many start at once (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = p.parse_args()
    os.sched_setaffinity(0, here)
    AsyncHTTPClient.configure(None, max_clients=1000)
    with tempfile.TemporaryDirectory(prefix="bench-") as d, lab(4, [Path(d)]) as hosts:
        Path(d).chmod(0o755)
        for h in hosts: pin(h.proc.pid, there)
        asyncio.run(run(args, hosts, Path(d)))


if __name__ == "__main__": main()
