"""Secrets of a run, and where they must not show. `test_redaction` looks for them in one long run of everything; as a
plugin, this looks in any tests:

    PYTHONPATH=tests python -m pytest tests -p redact -n 3

Noted are passwords, and as they are made or received every launch's ticket and secret, every kernel's key, control key
and CURVE secret. They are searched for in what is logged at DEBUG, in the reports of failed tests with their
tracebacks, and in the argument vectors of all processes. A run in which one is found, or none was noted, fails; with
pytest-xdist that is up to the process that has the others do the work."""
import base64, contextlib, logging, os, tempfile, threading
from pathlib import Path
import pytest
from gateway_provisioners_ssh.handshake import LegacyKey, LaunchKeys
from gateway_provisioners_ssh.hosts import Login

class Secrets(dict):
    "The names of secrets, by the texts that would give one away"
    def add(self, name, value):
        value = value if isinstance(value, bytes) else value.encode()
        if len(value) < 8: return
        for form in value, base64.b64encode(value), value.hex().encode(), base64.b64encode(value).rstrip(b'='):
            self[form] = name
    def add_fields(self, fields, kind=''):
        for k in 'key', 'control_key', 'curve_secretkey':
            if v := fields.get(k): self.add(kind + k, v)
        if v := fields.get('control_key'): self.add('control_key', bytes.fromhex(v))
    def found_in(self, text): return sorted({name for s, name in self.items() if s in text})

@contextlib.contextmanager
def noted():
    "The secrets of passwords, launches and kernels, collected where they come into being"
    all = Secrets()
    login, ticket, parts = Login.__init__, LaunchKeys.ticket, LaunchKeys.ticket_fields
    opened, accepted, opened_v1 = LaunchKeys.open, LaunchKeys.accept, LegacyKey.open
    def of_login(self, *args, **kw):
        login(self, *args, **kw)
        if self.password: all.add('password', self.password)
    def of_ticket(self):
        text = ticket(self)
        all.add('ticket', text)
        return text
    def of_ticket_fields(self, by_network):
        fields = parts(self, by_network)
        if 'psk' in fields: all.add('psk', base64.b64decode(fields['psk']))
        all.add_fields(fields.get('connection') or {})
        return fields
    def of_report(self, fields):
        fields = accepted(self, fields)
        all.add_fields(fields)
        return fields
    def of_message(self, message):
        fields = opened(self, message)
        all.add_fields(fields)
        return fields
    def of_message_v1(self, message):
        fields = opened_v1(self, message)
        all.add_fields(fields, 'version 1 ')
        return fields
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Login, '__init__', of_login)
        patch.setattr(LaunchKeys, 'ticket', of_ticket)
        patch.setattr(LaunchKeys, 'ticket_fields', of_ticket_fields)
        patch.setattr(LaunchKeys, 'accept', of_report)
        patch.setattr(LaunchKeys, 'open', of_message)
        patch.setattr(LegacyKey, 'open', of_message_v1)
        yield all

@contextlib.contextmanager
def everything_logged(out):
    "What all loggers say at DEBUG, paramiko's packets included, goes to the file `out`"
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter('%(name)s %(levelname)s %(message)s'))
    root, known = logging.getLogger(), [o for o in logging.Logger.manager.loggerDict.values()
                                        if isinstance(o, logging.Logger)]
    loggers = {root, *known, *map(logging.getLogger, ('paramiko', 'gateway_provisioners_ssh',
                                                      'gateway_provisioners_ssh.paramiko', 'traitlets', 'asyncio'))}
    levels = {o: o.level for o in loggers}
    for o in loggers: o.setLevel(logging.DEBUG)
    root.addHandler(handler)
    try: yield
    finally:
        root.removeHandler(handler)
        for o, level in levels.items(): o.setLevel(level)

class ArgumentVectors(threading.Thread):
    "Every argument vector on this machine, hosts included, as `ps` shows them, looked at every so many seconds"
    def __init__(self, seconds):
        super().__init__(daemon=True)
        self.seconds, self.seen, self.rounds, self.ended = seconds, set(), 0, threading.Event()
    def run(self):
        while not self.ended.wait(self.seconds):
            self.rounds += 1
            for pid in filter(str.isdigit, os.listdir('/proc')):
                with contextlib.suppress(OSError): self.seen.add(Path(f'/proc/{pid}/cmdline').read_bytes())
    def __enter__(self): self.start(); return self
    def __exit__(self, *a): self.ended.set(); self.join()

class Redaction:
    "The plugin, in a process that runs tests and in one that has others run them"
    def __init__(self, config):
        self.config, self.reports, self.forms, self.found, self.stack = config, {}, 0, [], contextlib.ExitStack()
        self.log = self.stack.enter_context(tempfile.NamedTemporaryFile('w+', prefix='redact-', suffix='.log',
            errors='backslashreplace', delete=False))
        self.secrets = self.stack.enter_context(noted())
        self.stack.enter_context(everything_logged(self.log))
        self.vectors = self.stack.enter_context(ArgumentVectors(.5))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reports[f'the report of {report.nodeid}'] = f'{report.longrepr}{report.sections}'.encode()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        "What a process found that did the work, unless it broke down, which is a failure by itself"
        self.add(*getattr(node, 'workeroutput', {}).get('redaction', (0, [])))

    def add(self, forms, found):
        self.forms += forms
        self.found += found

    def look(self):
        "How many forms of secrets there were here, and which were found where; the log stays if there are any in it"
        self.stack.close()
        log = Path(self.log.name)
        texts = {str(log): log.read_bytes(), 'argument vectors': b'\n'.join(self.vectors.seen)} | self.reports
        found = [f'{name} in {where}' for where, text in texts.items() for name in self.secrets.found_in(text)]
        if not self.secrets.found_in(texts[str(log)]): log.unlink()
        return len(self.secrets), found

    def pytest_sessionfinish(self, session):
        if hasattr(self.config, 'workeroutput'): self.config.workeroutput['redaction'] = self.look(); return
        self.add(*self.look())
        if self.found or not self.forms: session.exitstatus = session.exitstatus or 1

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section('redaction')
        terminalreporter.line(f'{self.forms} forms of secrets; '
                              + ('found: ' + ', '.join(self.found) if self.found else 'none found' if self.forms
                                 else 'there was nothing to look for'))

def pytest_configure(config): config.pluginmanager.register(Redaction(config), 'redaction')
