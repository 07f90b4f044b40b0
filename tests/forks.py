"""Commands that are scripts of Python, without the time that it takes to import what many of them need: a server has
imported it, and forks for each. It is to import packages of others; what is tested every command imports itself."""
import atexit, functools, gc, json, os, runpy, select, signal, socket, subprocess, sys, tempfile
from importlib import import_module
from pathlib import Path

class Forks:
    "A server that has imported `modules`; a context manager"
    def __init__(self, *modules, env=None): self.modules, self.env = modules, env

    def __enter__(self):
        self.dir = tempfile.TemporaryDirectory(prefix='gpt-forks-')
        self.path = f'{self.dir.name}/socket'
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(self.path)
        listening.listen(64)
        with listening:
            self.proc = subprocess.Popen([sys.executable, __file__, str(listening.fileno()), *self.modules],
                env=self.env, stdin=subprocess.PIPE, pass_fds=[listening.fileno()])
        return self

    def __exit__(self, *_):
        self.proc.stdin.close()
        self.proc.wait()
        self.dir.cleanup()

    def run(self, *argv, env=None, cwd=None, stdout=None, timeout=300):
        """What `subprocess.run` would give of a command that is a Python script, with its output captured, unless a
        file `stdout` is to have all of it"""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as null, \
                socket.socket(socket.AF_UNIX) as s:
            s.connect(self.path)
            given = dict(argv=[*map(str, argv)], env=dict(os.environ if env is None else env),
                         cwd=str(cwd or os.getcwd()))
            outputs = (stdout, stdout) if stdout else (out, err)
            socket.send_fds(s, [b'.'], [o.fileno() for o in (null, *outputs)])
            s.sendall(json.dumps(given).encode() + b'\n')
            said = s.makefile()
            pid = int(said.readline())
            s.settimeout(timeout)
            try: status = int(said.readline())
            except TimeoutError:
                os.killpg(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, timeout) from None
            def text(f):
                f.seek(0)
                return f.read().decode(errors='replace')
            return subprocess.CompletedProcess(argv, status, *([None]*2 if stdout else map(text, (out, err))))

@functools.cache
def commands():
    "The server for `ssh_spec`, which is started when it is first asked"
    forks = Forks('jupyter_client.kernelspec', 'jupyter_core.application', 'tornado.web', 'fastcore.basics', 'paramiko',
                  'rich.console', 'rich.table', 'rich.progress').__enter__()
    atexit.register(forks.__exit__)
    return forks

def ssh_spec(*argv, **kw):
    "What `subprocess.run` would give of `jupyter ssh-spec` with these arguments"
    return commands().run(Path(sys.executable).parent/'jupyter-ssh-spec', *argv, **kw)

def become(argv, env, cwd):
    "Be the process that was asked for"
    os.environ.clear(); os.environ.update(env)
    os.chdir(cwd)
    sys.argv[:] = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')

def answer(conn):
    "Fork for one request, and say how the process ended"
    _, fds, _, _ = socket.recv_fds(conn, 1, 3)
    said = conn.makefile('rw')
    request = json.loads(said.readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        said.close(); conn.close()
        os.setsid()
        for i, o in enumerate(fds): os.dup2(o, i)
        for o in fds: os.close(o)
        return request
    said.write(f'{pid}\n'); said.flush()
    said.write(f'{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n'); said.flush()
    os._exit(0)

def serve(listening):
    "A request, once in the process that is to do it; the server itself ends with its owner"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listening in (ready := select.select([listening, sys.stdin], [], [])[0]) or not ready:
        conn, _ = listening.accept()
        if not os.fork():
            listening.close()
            return answer(conn)
        conn.close()

if __name__ == '__main__':
    fd, *modules = sys.argv[1:]
    del sys.path[0]   # no command finds the tests
    for o in modules: import_module(o)
    gc.freeze()   # else the first collection in each process would copy all that was imported
    listening = socket.socket(fileno=int(fd))
    if request := serve(listening): become(**request)
