"""A kernel's whole life on real hosts, as host applications lead it: notebooks, consoles, managers of every kind, forty at once, every way in
which a launch can fail or be given up, and what is left afterwards, which is nothing."""
import asyncio, json, os, re, signal, socket, subprocess, sys, textwrap, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import jupyter_kernel_test, nbformat, psutil, pytest
from jupyter_client import AsyncKernelManager, AsyncMultiKernelManager, KernelManager, MultiKernelManager
from nbclient import NotebookClient
from gateway_provisioners_ssh import background as bg
from gateway_provisioners_ssh.settings import LaunchError
from hosts import wait
from kernels import BIN, Remote, Timer, busy, forget, printed, reply_to, value

@pytest.fixture(scope='module')
def installed(_loopback, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch: yield Remote(_loopback, tmp_path_factory.mktemp('spec'), patch)

@pytest.fixture
def remote(installed, hosts):
    "Kernelspec ssh_python on four hosts; every test begins without connections"
    yield installed
    forget()

cell, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell

# Host applications

NOTEBOOK = ['import os, sys, math\nprint("on", os.environ["GP_TEST_HOST"], "for", os.environ["KERNEL_USERNAME"])',
            'from IPython.display import HTML, display\ndisplay(HTML("<b>bold</b>"))\nsum(range(10**6))',
            'for i in range(3): print(i, flush=True)',
            'print("careful", file=sys.stderr)',
            '%%bash\necho "$((6*7))"',
            'import asyncio\nawait asyncio.sleep(.01)\nmath.comb(50, 25)',
            '1/0']

def notebook(): return nbformat.v4.new_notebook(cells=[text('# A notebook'), *map(cell, NOTEBOOK)])

def shown(o): return o.get('text') or o.get('ename') or o['data'].get('text/html') or o['data']['text/plain']
def outputs(nb): return [''.join(map(shown, c.outputs)) for c in nb.cells if c.cell_type == 'code']

def check_outputs(nb, host):
    assert outputs(nb) == [f'on {host} for ada\n', '<b>bold</b>499999500000', '0\n1\n2\n', 'careful\n', '42\n', '126410606437752', 'ZeroDivisionError']

async def test_notebook_on_every_host(remote):
    async def execute(host):
        nb = notebook()
        await NotebookClient(nb, kernel_name='ssh_python', allow_errors=True, timeout=60).async_execute(env=os.environ | dict(KERNEL_REMOTE_HOST=host))
        check_outputs(nb, host)
    with remote.nothing_left(): await asyncio.gather(*map(execute, remote.lab.names))

def run(*argv, timeout=120, **kw):
    return subprocess.run([str(o) for o in argv], capture_output=True, text=True, timeout=timeout, **kw)

def test_jupyter_execute(remote, tmp_path):
    nbformat.write(notebook(), f := tmp_path/'a notebook.ipynb')
    with remote.nothing_left():
        r = run(BIN/'jupyter', 'execute', '--kernel_name=ssh_python', '--allow-errors', '--output=done', f)
        assert r.returncode == 0, r.stderr
        assert 'Traceback' not in r.stderr and 'never retrieved' not in r.stderr, r.stderr
    check_outputs(nbformat.read(tmp_path/'done.ipynb', 4), 'host1')

def test_jupyter_console(remote):
    "Also the blocking `KernelManager` of an application that has no event loop of its own"
    code = 'import os\nx = 6*7\nprint("on", os.environ["GP_TEST_HOST"], x)\nprint("pid", os.getpid())\n'
    with remote.nothing_left():
        r = run(BIN/'jupyter', 'console', '--kernel=ssh_python', '--simple-prompt', '--ZMQTerminalInteractiveShell.confirm_exit=False', input=code)
        assert r.returncode == 0, r.stderr
        assert 'on host1 42' in r.stdout and 'Traceback' not in r.stdout+r.stderr, (r.stdout, r.stderr)
        pid = int(re.search(r'pid (\d+)', r.stdout)[1])
        assert not psutil.pid_exists(pid)
