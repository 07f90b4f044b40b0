"""A pytest plugin that runs tests with everything logged at DEBUG and then looks for the secrets of that run:

    PYTHONPATH=tests python -m pytest tests -p redact

Every launch's one-time secret and ticket, every kernel's key, control key and CURVE secret are noted as they are made or received; they are searched for in
all log records, in the reports of failed tests with their tracebacks, and in the argument vectors of all processes, which are looked at twice a second."""
import base64, logging, os, tempfile, threading
from pathlib import Path

secrets, seen, handler, done = set(), [], None, threading.Event()

def note(value):
    "Remember a secret in the forms in which it could show"
    raw = value if isinstance(value, bytes) else str(value).encode()
    forms = {raw, raw.hex().encode(), base64.b64encode(raw)} if isinstance(value, bytes) else {raw, base64.b64encode(raw)}
    secrets.update(o for o in forms if len(o) >= 16)

def watch():
    "Keep the argument vectors of all processes"
    while not done.wait(.5):
        for p in os.listdir('/proc'):
            if not p.isdigit(): continue
            try: line = Path(f'/proc/{p}/cmdline').read_bytes()
            except OSError: continue
            if line and line not in lines: lines.add(line)

lines = set()

def pytest_configure(config):
    global handler
    from gateway_provisioners_ssh import handshake
    handler = logging.FileHandler(tempfile.mkstemp(prefix='redact-', suffix='.log')[1])
    handler.setFormatter(logging.Formatter('%(name)s %(message)s'))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    ticket, opened = handshake.Launch.ticket, handshake.Launch.open
    def noted_ticket(self):
        t = ticket(self)
        note(self._psk); note(t)
        return t
    def noted_open(self, message):
        fields = opened(self, message)
        for k in ('key', 'control_key', 'curve_secretkey'):
            if k in fields: note(fields[k])
        return fields
    handshake.Launch.ticket, handshake.Launch.open = noted_ticket, noted_open
    threading.Thread(target=watch, daemon=True).start()

def pytest_runtest_logreport(report):
    if report.failed: seen.append((report.nodeid, f'{report.longrepr}{report.sections}'.encode()))

def pytest_sessionfinish(session, exitstatus):
    done.set()
    logging.getLogger().removeHandler(handler)
    handler.close()
    log = Path(handler.baseFilename).read_bytes()
    where = [('the log', log), *((f'the report of {n}', t) for n, t in seen), *(('an argument vector', o) for o in lines)]
    found = {what for what, text in where for s in list(secrets) if s in text}
    who = os.environ.get('PYTEST_XDIST_WORKER', 'this process')
    text = f'{who}: {len(secrets)} forms of secrets, {len(log)} bytes of log, {len(lines)} argument vectors: {", ".join(sorted(found)) or "none found"}'
    if out := os.environ.get('REDACT_REPORT'):
        with open(out, 'a') as f: f.write(text + '\n')
    print(f'\nredaction: {text}')
    if found: session.exitstatus = 1
    else: os.unlink(handler.baseFilename)
