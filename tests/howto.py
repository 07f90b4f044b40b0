"""What the how-to notebooks need and do not show: SSH hosts in this process, and readers' names for what has other
names here.

A page says `fire`, `spark://master:7077` and `/opt/spark`, as its reader would. `Stage` puts what these are on this
machine into commands and code on their way in, and the names of the page back into everything on its way out."""
import atexit, getpass, os, re, subprocess, sys, tempfile
from base64 import b64decode
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from IPython import get_ipython
from IPython.display import Image, display
from gateway_provisioners_ssh.mock_ssh import MockHosts
from spark import Missing, need

class Hosts(MockHosts):
    "Two mock hosts with names for readers."
    def new_host(self, i, address):
        host = super().new_host(i, address)
        host.name = ('fire', 'water')[i]
        if i: host.env = {**host.env, **self.water}
        return host

class Stage:
    "Hosts `fire` and `water`, a Jupyter of one's own, and names; all is gone when the notebook ends."
    def __init__(self,
        **water          # environment of the second host alone: what is wrong with it
    ):
        self.stack, self.names = ExitStack(), {}
        atexit.register(self.stack.close)
        self.dir = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix='how-to-')))
        self.hosts = Hosts(2)
        self.hosts.water = water
        self.use(self.hosts)
        (self.dir/'logs').mkdir()
        for k in [k for k in os.environ if k.startswith(('GP_', 'EG_', 'KERNEL_', 'SPARK_', 'PYSPARK_', 'JUPYTER'))]:
            del os.environ[k]
        os.environ |= dict(JUPYTER_DATA_DIR=str(self.dir/'jupyter'), JUPYTER_RUNTIME_DIR=str(self.dir/'runtime'),
            JUPYTER_CONFIG_DIR=str(self.dir/'config'), GP_SSH_CONFIG=str(self.hosts.config),
            GP_KERNEL_LOG_DIR=str(self.dir/'logs'), KERNEL_USERNAME='ada', KERNEL_LAUNCH_TIMEOUT='120',
            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
        self.call(f'{self.dir}/jupyter', '~/.local/share/jupyter')
        self.call(Path(sys.executable).parent, '/opt/lab/bin')
        self.call(f'{self.dir}/logs', '/tmp')
        self.call(f'on {os.uname().nodename}:', 'on fire:')
        self.call(f'user {getpass.getuser()})', 'user ada)')

    def call(self,
        real,            # here
        name:str         # on the page
    ): self.names[str(real)] = name

    def use(self, context):
        "Enter a context manager that ends with the notebook; what it lacks on this machine ends the page here."
        try: return self.stack.enter_context(context() if isinstance(context, type) else context)
        except Missing as e: self.missing(e)

    def need(self, command:str, package:str):  # Debian's
        try: need(command, package)
        except Missing as e: self.missing(e)

    def missing(self, why):
        "Under CI an error. Else it is said, and the cells that follow do nothing."
        if os.environ.get('CI')=='true': raise Missing(str(why)) from None
        for out in (None, sys.__stderr__): print(f'{why}. What follows needs it, and was not run.', file=out)
        get_ipython().input_transformers_cleanup.append(lambda lines: [])

    def real(self, text:str) -> str:
        for real,name in self.names.items():
            text = re.sub(rf'(?<![\w-]){re.escape(name)}(?![\w-])', lambda _: real, text) if name!='/tmp' else text
        return text

    def told(self, text:str) -> str:
        for real in sorted(self.names, key=len, reverse=True): text = text.replace(real, self.names[real])
        # this machine's, and all but the last line of Java's stack
        text = re.sub(r'^.* WARN Utils: .*\n|^\tat .*\n(?=\tat )', '', text, flags=re.M)
        text = re.sub(r'\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b', 'KERNEL_ID', text)
        return re.sub(r'^\[(\w) \S+ \S+ \w+\] ', r'[\1] ', text, flags=re.M)

    def say(self, text:str):
        self.last += (text := self.told(text))
        print(text, end='')

    def sh(self, command:str):
        "Run a command line as its reader would, and show what it says; what it said is then in `last`."
        got, self.last = subprocess.run(['bash', '-c', self.real(command)], capture_output=True, text=True,
                                        stdin=subprocess.DEVNULL), ''
        self.say(got.stderr + got.stdout)
        assert not got.returncode, got

    def run(self,
        kc,              # client of a kernel
        code:str,        # a cell
        interrupt=None,  # a kernel manager, to interrupt the cell after
        after:float=2.,  # seconds
        fails=False      # whether an error is what is to be shown; it is where there is an interrupt
    ):
        "Run a cell, and show what comes back: text, pictures, and of an error the line that matters."
        error, self.last = None, ''
        def show(msg):
            nonlocal error
            kind, c = msg['msg_type'], msg['content']
            if kind=='stream': self.say(c['text'])
            elif kind=='error':
                error = c
                self.say(f"{c['ename']}: {c['evalue']}".strip(': ').splitlines()[0] + '\n')
            elif 'image/png' in c.get('data', {}): display(Image(data=b64decode(c['data']['image/png']), format='png'))
            elif 'data' in c: self.say(c['data'].get('text/plain', '') + '\n')
        if interrupt: Timer(after, interrupt.interrupt_kernel).start()
        reply = kc.execute_interactive(self.real(code), timeout=120, allow_stdin=False, output_hook=show)
        assert (reply['content']['status']!='ok')==(fails or bool(interrupt)), error

    def failing(self, f, *args, **kw):
        "Call what will raise, and show with which words."
        self.last = ''
        try: f(*args, **kw)
        except Exception as e: return self.say(f'{e}\n')
        raise AssertionError('it did not fail')
