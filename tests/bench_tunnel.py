"""What a tunnel of this provisioner carries, and how soon it answers, beside `ssh -L` to the same host and a direct
connection, in one run.

python tests/bench_tunnel.py             # five rounds, in about a minute
python tests/bench_tunnel.py --rounds 9 --mib 1024

The host is a real OpenSSH server of the current user on a loopback address; what stands for a kernel sends, reads and
echoes; the client is a process of its own, as the connections of a Jupyter Server are read by threads that run no
Python. Rounds are interleaved, and a ratio is the median of each round's ratio, so what else the machine does falls on
all of them."""
import argparse, asyncio, os, socket, statistics, subprocess, sys, tempfile
from contextlib import contextmanager
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.hosts import Host, Login
from gateway_provisioners_ssh.remote import spawn
from gateway_provisioners_ssh.ssh import Pool
from gateway_provisioners_ssh.tunnel import Forward, KernelPort
from hosts import Client, LoopbackLab
from pace import wait

KERNEL = """import socket, threading
def serve(c):
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line = c.makefile('rb', buffering=0).readline()
    if not line: return c.close() # only to see whether this can be reached
    what, n = line.split()
    n, buf = int(n), bytearray(2**20)
    if what == b'send':
        for _ in range(n): c.sendall(buf)
    elif what == b'read':
        left = n*2**20
        while left: left -= c.recv_into(buf)
        c.sendall(b'!')
    else:
        while data := c.recv(4096): c.sendall(data)
    c.close()
s = socket.create_server(('127.0.0.1', 0))
print(s.getsockname()[1], flush=True)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()"""

CLIENT = """import socket, statistics, sys, time
what, port, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.create_connection(('127.0.0.1', port)) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.sendall(f'{what} {n}\\n'.encode())
    buf, message = bytearray(2**20), bytes(300)
    start = time.perf_counter()
    if what == 'send':
        while s.recv_into(buf): pass
    elif what == 'read':
        for _ in range(n): s.sendall(buf)
        s.recv(1)
    else:
        took = []
        for _ in range(n):
            t, left = time.perf_counter(), len(message)
            s.sendall(message)
            while left: left -= s.recv_into(buf, left)
            took.append(time.perf_counter() - t)
print(statistics.median(took)*1e6 if what == 'echo' else n/(time.perf_counter() - start))"""

def run(what, port, n):
    argv = [sys.executable, '-c', CLIENT, what, str(port), str(n)]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300).stdout)

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]

@contextmanager
def openssh(client, host, port):
    "The local port of an `ssh -L`"
    argv = ['ssh', '-F', client.config, '-N', '-L', f'{(near := free_port())}:127.0.0.1:{port}', host]
    p = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    def listens():
        with socket.socket() as s: return s.connect_ex(('127.0.0.1', near)) == 0
    try:
        wait(listens, 20, 'ssh -L')
        yield near
    finally: p.kill(); p.wait()

async def forwarded(host, port):
    "A forward to `port`, and the process that stands for the kernel, which reports no ports"
    conn = await Pool().connection(Host(host), Login())
    log = f'/tmp/kernel-{os.urandom(8).hex()}.log'
    process = await spawn(await conn.session(), conn.wait_connected, log, argv=['sleep', '600'], env={}, max_bytes=8192)
    return await Forward(conn.tunnel, KernelPort(port, process.id)).start(), process

def measured(ways, what, n, rounds):
    "Results by way, one a round"
    res = {o: [] for o in ways}
    for i in range(rounds):
        for o in sorted(ways, reverse=i % 2): res[o].append(run(what, ways[o], n))
    return res

def show(title, unit, res, base):
    print(title)
    for way, values in res.items():
        ratio = statistics.median(a/b for a, b in zip(values, res[base]))
        print(f'  {way:10} {statistics.median(values):8.0f} {unit}   {ratio:5.2f} x {base}', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--mib', type=int, default=512, help='MiB in each transfer')
    parser.add_argument('--messages', type=int, default=2000, help='messages of 300 bytes in each echo')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        client = Client(Path(tmp))
        os.environ.update(client.environ())
        with LoopbackLab(1, client) as lab, \
             subprocess.Popen([sys.executable, '-c', KERNEL], stdout=subprocess.PIPE, text=True) as kernel:
            port = int(kernel.stdout.readline())
            forward, process = asyncio.run(background().run(forwarded(lab[0].name, port)))
            with openssh(client, lab[0].name, port) as near:
                ways = dict(tunnel=forward.port) | {'ssh -L': near}
                show('from the kernel', 'MiB/s', measured(ways, 'send', args.mib, args.rounds), 'ssh -L')
                show('to the kernel', 'MiB/s', measured(ways, 'read', args.mib, args.rounds), 'ssh -L')
                ways['direct'] = port
                show('a message and its echo', 'us', measured(ways, 'echo', args.messages, args.rounds), 'direct')
            asyncio.run(background().run(process.release(keep_log=False)))
            kernel.kill()

if __name__ == '__main__': main()
