"""A host application behind a NAT router that lets it open connections to port 22, and nothing in. `python laptop.py
SOURCE CONFIG`: SOURCE is a port on node1's loopback interface that sends as many MiB as a first line asks for. Waits
for a line when it says so; prints JSON at the end."""
import asyncio, json, os, socket, subprocess, sys
from contextlib import AsyncExitStack
import psutil
from jupyter_client import AsyncKernelManager
from gateway_provisioners_ssh.background import background
from gateway_provisioners_ssh.remote import spawn
from gateway_provisioners_ssh.tunnel import Forward, KernelPort
from kernels import forget, interrupt, printed, running, value
from pace import Timer, until

FETCH = """import socket, sys, time
port, mib = map(int, sys.argv[1:])
start, n, buf = time.monotonic(), 0, bytearray(2**20)
with socket.create_connection(('127.0.0.1', port)) as s:
    s.sendall(b'%d\\n' % mib)
    while got := s.recv_into(buf): n += got
assert n == mib*2**20, n
print(mib/(time.monotonic()-start))"""

def fetch(port, mib):
    """MiB a second that come from the source through `port` of this machine, in a process of its own, as a front end's
    connections are read by threads that run no Python"""
    return float(subprocess.run([sys.executable, '-c', FETCH, str(port), str(mib)], check=True, text=True,
                                capture_output=True).stdout)

async def openssh(config, port):
    "`ssh -L` to the source, and its local port"
    with socket.create_server(('127.0.0.1', 0)) as s: local = s.getsockname()[1]
    p = subprocess.Popen(['ssh', '-F', config, '-N', '-L', f'{local}:127.0.0.1:{port}', 'node1'],
                         stdin=subprocess.DEVNULL)
    def listening():
        return [o for o in psutil.Process(p.pid).net_connections('tcp') if o.status == 'LISTEN'
                and o.laddr.port == local]
    await until(listening, 10, 'ssh -L')
    return p, local

async def forwarded(conn, port):
    """A port here that leads to `port` of the host as to that of a kernel, for which a process stands that reports no
    ports"""
    process = await spawn(await conn.session(), conn.wait_connected, f'/tmp/kernel-{os.urandom(8).hex()}.log',
                          argv=['sleep', '600'], env={}, max_bytes=8192)
    fwd = await Forward(conn.tunnel, KernelPort(port, process.id)).start()
    fwd.process = process
    return fwd

async def compared(km, source, config, mib=64, rounds=3):
    "The same bytes through a forwarded port and through `ssh -L`, in turn; the best of each"
    fwd = await background().run(forwarded(km.provisioner.conn, source))
    p, local = await openssh(config, source)
    try: both = [[await asyncio.to_thread(fetch, port, mib) for port in (fwd.port, local)] for _ in range(rounds)]
    finally: p.kill(); p.wait(); await background().run(fwd.process.release(keep_log=False)); fwd.close()
    return [max(o) for o in zip(*both)]

def kernel_on(host):
    return running(AsyncKernelManager(kernel_name='ssh_python'), env=os.environ | dict(KERNEL_REMOTE_HOST=host))

async def used(kernels, source, config):
    "What there is to have of the first kernel, and of the others while its link is cut"
    res, (km, kc) = {}, kernels[0]
    t = Timer()
    text, status = await printed(kc, 'for i in range(200): print(chr(97+i%26)*100_000)', timeout=60)
    res['output'], res['output_s'] = len(text), float(t)
    res['interrupt_s'] = min([await interrupt(km, kc) for _ in range(3)])
    before = km.get_connection_info()
    await printed(kc, 'x = 1')
    await km.restart_kernel()
    await kc.wait_for_ready(timeout=60)
    res['restarted'] = [km.get_connection_info() == before, await value(kc, '"x" in globals()')]
    await printed(kc, 'import os; x = 41')
    print('cut', flush=True)
    t = Timer()
    await until(lambda: not km.provisioner.conn.is_up, 60, 'the connection is given up')
    res['noticed_s'] = float(t)
    print('given up', flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    t = Timer()
    await kc.wait_for_ready(timeout=120)
    res['after the cut'] = [await value(kc, 'x + 1', timeout=60), await km.is_alive()]
    res['reconnect_s'] = float(t)
    res['others'] = [await value(o, '6*7', timeout=60) for _, o in kernels[1:]]
    res['mib_s'], res['openssh_mib_s'] = await compared(km, source, config)
    print('count', flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    return res

async def main(source, config):
    async with AsyncExitStack() as stack:
        kernels = await asyncio.gather(*(stack.enter_async_context(kernel_on(o))
                                         for o in ('node1', 'node1', 'node1', 'node2')))
        res = await used(kernels, source, config)
    print(json.dumps(res), flush=True)
    await asyncio.to_thread(forget)

if __name__ == '__main__': asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
