"""Every parser of outside bytes under fuzz: whatever arrives gives well-typed values or a `HandshakeError` with a fixed
reason.

A few seconds as it is; `FUZZ=100 pytest tests/test_handshake.py` tries 250 times as many cases."""
import base64, hashlib, hmac, json, os, re
from pathlib import Path
from types import SimpleNamespace
import pytest
from Cryptodome.Protocol import DH
from hypothesis import given, settings, strategies as st
from launch_messages import b64, encode, report, seal, seal_v1
import gateway_provisioners_ssh
from gateway_provisioners_ssh.handshake import (PROTOCOL, ControlKey, HandshakeError, LaunchKeys,
                                                LegacyKey, RedactedDict,
                                                connection_info, control_nonce, max_message, parse_message, port_names)
from gateway_provisioners_ssh.launchers import agent, server_listener as listener

PKG = Path(gateway_provisioners_ssh.__file__).parent

def budget(n): return settings(max_examples=int(n*float(os.environ.get('FUZZ', 0.4))), deadline=None)

odd = st.sampled_from([None, True, False, 0, 1, 2, -1, 1.0, 1e999, 2**31, 2**63, 10**400, '', '1', '2', 'a', 'QQ==',
                       '\ud800', '\x1b[2J',
                       '\u202e', [], [[]], {}, {'version': 2}, b64(bytes(32)), b64(bytes(256)), '5a'*32, '127.0.0.1',
                       '::1%0', 'x'*5000])
jsons = st.recursive(odd | st.integers() | st.text(max_size=40) | st.floats(), lambda s: st.lists(s, max_size=4)
                     | st.dictionaries(st.text(max_size=10), s, max_size=4), max_leaves=8)
reason = re.compile(r'[A-Za-z0-9_ ,()]{5,100}')

def refused(f, *args):
    "What `f(*args)` gives, or None if it was refused as it should be"
    try: return f(*args)
    except HandshakeError as e:
        assert reason.fullmatch(str(e)) and e.__context__ is None and e.__cause__ is None
        reasons.add(str(e))
reasons = set()

def changed(obj, change):
    "A copy of the dict `obj` with `change` made, where a value of `...` deletes the key"
    return {k: v for k, v in (obj | change).items() if v is not ...}
def changes(names):
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=5), odd | jsons | st.just(...), max_size=3)

@st.composite
def bitten(draw, raw):
    "`raw` with bytes flipped, cut out, doubled or put in"
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        i, j = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
        kind = draw(st.sampled_from(['flip', 'cut', 'double', 'insert', 'truncate']))
        if kind == 'flip' and i < len(raw): raw[i] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'cut': del raw[i:j]
        elif kind == 'double': raw[j:j] = raw[i:j]
        elif kind == 'insert': raw[i:i] = draw(st.binary(max_size=8))
        elif kind == 'truncate': del raw[i:]
    return bytes(raw)

launch = LaunchKeys('kernel-1')
good = seal(launch.ticket(), 'kernel-1', report())

@pytest.fixture(scope='module')
def legacy(): return LegacyKey().make()

# launch messages ----------------------------------------------------------------------------------------------------

v2 = dict(version=2, kernel_id='kernel-1', enc=b64(bytes(range(32))), sealed=b64(bytes(100)))
v1 = dict(version=1, key=b64(bytes(256)), conn_info=b64(bytes(480)))

def well_typed(message):
    if message is None: return
    if message['version'] == 2:
        assert list(map(type, message.values())) == [int, str, bytes, bytes]
        assert len(message['enc']) == 32 and 0 < len(message['kernel_id']) <= 128
        message['kernel_id'].encode()
    else:
        assert list(map(type, message.values())) == [int, bytes, bytes] and len(message['conn_info']) % 16 == 0

@budget(300)
@given(st.binary(max_size=300))
def test_any_bytes(raw):
    well_typed(refused(parse_message, raw)); well_typed(refused(parse_message, base64.b64encode(raw)))

@budget(300)
@given(jsons)
def test_any_json(obj): well_typed(refused(parse_message, encode(obj)))

@budget(600)
@given(st.sampled_from([v1, v2]), changes(['version', 'kernel_id', 'enc', 'sealed', 'key', 'conn_info']))
def test_nearly_messages(msg, change): well_typed(refused(parse_message, encode(changed(msg, change))))

@budget(300)
@given(st.sampled_from([b'[', b'{"a":', b'[{"":', b'1', b'"\\ud800', b'-', b' ', b'\x00']), st.integers(1, 49_000))
def test_pathological_json(piece, n):
    raw = base64.b64encode(piece*(n//len(piece)))
    assert refused(parse_message, raw) is None

def test_size_is_bounded():
    assert refused(parse_message, b'A'*(max_message+1)) is None
    big = seal(launch.ticket(), 'kernel-1', report() | dict(more='x'*20_000))
    assert launch.open(parse_message(big)) == report()

@budget(400)
@given(bitten(good))
def test_a_changed_message_never_opens(raw):
    message = refused(parse_message, raw)
    well_typed(message)
    if message and message != parse_message(good): assert refused(launch.open, message) is None

@budget(300)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=17, max_size=600))
def test_any_ephemeral_key(enc, sealed):
    assert refused(launch.open, dict(version=2, kernel_id='kernel-1', enc=enc, sealed=sealed)) is None

@pytest.mark.parametrize('u', [0, 1, 2**255-19, 2**255-20, 2**255-18, 2**256-1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823])
def test_points_of_small_order(u):
    "They give the same shared secret to everybody; PSK mode would hold, but the library refuses them"
    assert refused(launch.open, dict(version=2, kernel_id='kernel-1', enc=u.to_bytes(32, 'little'),
                                     sealed=bytes(100))) is None

@budget(250)
@given(changes(list(report())) | st.just({}))
def test_whatever_our_launcher_reports(change):
    fields = changed(report(), change)
    message = parse_message(seal(launch.ticket(), 'kernel-1', fields))
    try: opened = launch.open(message)
    except HandshakeError as e:
        assert e.authenticated and reason.fullmatch(str(e))
        reasons.add(str(e))
    else:
        assert type(opened) is RedactedDict and opened.items() <= fields.items()
        assert opened['kernel_id'] == 'kernel-1' and opened['pgid'] > 1 and re.fullmatch('[0-9a-f]{64}',
            opened.get('control_key', '0'*64))

@budget(100)
@given(st.binary(max_size=200))
def test_whatever_our_launcher_seals(plain):
    message = parse_message(seal(launch.ticket(), 'kernel-1', plain or b'0'))
    with pytest.raises(HandshakeError) as e: launch.open(message)
    assert e.value.authenticated

def test_version_1_under_fuzz(legacy):
    old = LaunchKeys('kernel-1', legacy=legacy)
    @budget(150)
    @given(changes(list(report())))
    def check(change):
        fields = changed(report(), change)
        opened = refused(old.open, parse_message(seal_v1(legacy.public_key, fields)))
        if opened is not None:
            assert opened['kernel_id'] == 'kernel-1' and 'control_key' not in opened and connection_info(opened)
            assert all(type(opened.get(k, 2)) is int and opened.get(k, 2) > 1 for k in ('pid', 'pgid'))
    check()
    whole = seal_v1(legacy.public_key, report())
    opened = []
    @budget(150)
    @given(bitten(whole))
    def check(raw):
        message = refused(parse_message, raw)
        well_typed(message)
        if message: opened.append(refused(old.open, message))
    check()
    # ECB does not notice every change; the RSA part is accepted once all the same
    assert len([o for o in opened if o]) <= 1
    @budget(100)
    @given(st.binary(max_size=200))
    def check(plain): assert refused(old.open, parse_message(seal_v1(legacy.public_key, plain))) is None
    check()

def test_version_1_remembers_a_bounded_number():
    key = LegacyKey().make()
    raw = seal_v1(key.public_key, report())
    key._used = dict.fromkeys(map(str, range(10_000)))
    key.open(parse_message(raw))
    assert len(key._used) == 10_000
    assert refused(key.open, parse_message(raw)) is None

def test_reasons_are_a_small_fixed_set():
    "Whatever the tests above sent; so a table of reasons cannot grow and a log line cannot carry content"
    assert len(reasons) < 60

# fields -------------------------------------------------------------------------------------------------------------

@budget(800)
@given(changes([*report(), 'curve_publickey', 'curve_secretkey']))
def test_connection_info(change):
    fields = changed(report(), change)
    info = refused(connection_info, fields)
    if info is None: return
    assert type(info['key']) is bytes and info['transport'] == 'tcp'
    assert all(type(info[p]) is int and 0 < info[p] < 65536 for p in port_names)
    assert set(info) <= {*port_names, 'ip', 'key', 'transport', 'signature_scheme', 'curve_publickey',
                         'curve_secretkey'}
    assert connection_info(info) == info

@budget(300)
@given(st.dictionaries(st.text(max_size=12), jsons, max_size=6))
def test_connection_info_of_anything(fields): assert refused(connection_info, fields) is None

def test_keys_that_are_no_text():
    for f in (lambda k: connection_info(report(key=k)), lambda k: LaunchKeys('k', connection=report(key=k))):
        with pytest.raises(HandshakeError, match='field key is missing or malformed') as e: f(b'\xff\xfe'*8)
        assert e.value.__context__ is None and 'xff' not in str(e.value)

def test_unset_connection_fields_are_left_out():
    "A `KernelManager` that has not started anything yet has ports 0 and an empty key"
    ticket = json.loads(base64.b64decode(LaunchKeys('k', connection=dict(shell_port=0, key=b'',
        ip='127.0.0.1')).ticket()))
    assert 'connection' not in ticket

def test_no_secret_is_shown():
    fields = RedactedDict(report(curve_secretkey='s'*40, curve_publickey='p'*40))
    again = LaunchKeys('kernel-1', connection=fields)
    for o in (fields, fields | {}, fields.copy(), connection_info(fields), again, again.__dict__['connection'],
              ControlKey('5a'*32)):
        for text in (str(o), repr(o), f'{o}', '%s' % (o,), repr([o])):
            assert not any(s in text for s in ('a0436f6c', 'ssss', 'pppp', '5a5a', b64(again._psk)[:10]))
    assert json.loads(json.dumps(fields)) == fields

# control requests ---------------------------------------------------------------------------------------------------

key, nonce = ControlKey('5a'*32), bytes(range(32))
def mac(*parts): return hmac.new(bytes.fromhex('5a'*32), b''.join(parts), hashlib.sha256).hexdigest()
def reply(text): return json.dumps(dict(reply=text, mac=mac(b'reply', nonce, text.encode('utf-8', 'replace')))).encode()

@budget(400)
@given(st.binary(max_size=200) | jsons.map(lambda o: json.dumps(o).encode())
       | changes(['reply', 'mac']).map(lambda c: json.dumps(changed(dict(reply='{"alive":true}', mac=mac(b'x')),
       c)).encode()))
def test_open_reply_of_strangers(line): assert refused(key.open_reply, nonce, line) is None

@budget(300)
@given(bitten(reply('{"alive": true}')))
def test_open_reply_changed(line): assert refused(key.open_reply, nonce, line) in (None, dict(alive=True))

@budget(300)
@given(jsons.map(json.dumps) | st.text(max_size=50)
       | changes(['alive', 'error']).map(lambda c: json.dumps(changed({}, c))))
def test_open_reply_of_the_listener(text):
    said = refused(key.open_reply, nonce, reply(text))
    assert said is None or said in (dict(alive=True), dict(alive=False)) or (list(said) == ['error']
        and len(said['error']) <= 500)

@budget(300)
@given(st.binary(max_size=200) | jsons.map(lambda o: json.dumps(o).encode())
       | changes(['version', 'nonce']).map(lambda c: json.dumps(changed(dict(version=2, nonce='5a'*32), c)).encode()))
def test_greetings(line):
    got = refused(control_nonce, line)
    assert got is None or type(got) is bytes and len(got) == 32

@budget(100)
@given(st.dictionaries(st.text(max_size=10), jsons, max_size=3), st.binary(min_size=32, max_size=32))
def test_requests_are_one_signed_line(request_, nonce):
    line = ControlKey('5a'*32).request(nonce, request_)
    assert line.count(b'\n') == 1 and line.endswith(b'\n')
    asked = json.loads(line)
    assert asked['mac'] == mac(b'request', nonce, asked['request'].encode())

# vectors and constants that all implementations have in common --------------------------------------------------------

VECTORS = PROTOCOL['vectors']

def recorded_launch():
    "A launch with the keys of the recorded message, and what the message must give"
    vector = VECTORS['launch']
    launch = LaunchKeys(vector['kernel_id'])
    launch._psk = bytes.fromhex(vector['psk'])
    launch._key = DH.import_x25519_private_key(bytes.fromhex(vector['private_key']))
    return launch, vector

def test_recorded_message():
    launch, vector = recorded_launch()
    message = parse_message(vector['message'].encode())
    assert launch.open(message) == vector['fields']
    assert launch.answer(message).decode() == vector['answer'] + '\n'

def test_the_python_launcher_seals_for_the_recorded_keys():
    launch, vector = recorded_launch()
    ticket = listener.Ticket.take({PROTOCOL['ticket_variable']: launch.ticket()})
    raw, enc = listener.seal(ticket, launch.kernel_id, vector['fields'])
    message = parse_message(raw)
    assert launch.open(message) == vector['fields']
    assert listener.is_confirmed(ticket, enc, launch.answer(message))
    assert listener.is_confirmed(ticket, parse_message(vector['message'].encode())['enc'], vector['answer'].encode())

def test_recorded_control_request():
    "The host application makes that request of that greeting, and the agent answers it with that reply"
    vector, signals = VECTORS['control'], []
    nonce, key = control_nonce(vector['greeting'].encode()), ControlKey(vector['key'])
    assert key.request(nonce, dict(signum=2)).decode() == vector['request'] + '\n'
    kernel = SimpleNamespace(record=dict(control=dict(key=vector['key'])), ended=False, signal=signals.append)
    asked = SimpleNamespace(kernels=dict(k=kernel))
    reply = agent.Agent.control_request(asked, SimpleNamespace(nonce=nonce), vector['request'].encode())
    assert reply.decode() == vector['reply'] + '\n' and signals == [2]
    assert key.open_reply(nonce, reply) == dict(alive=True)

def test_scripts_repeat_the_constants_as_they_are():
    "Scripts on hosts cannot read the file; the Scala launcher can, which test_scala puts to these vectors"
    p, R = PROTOCOL, (PKG/'kernelspecs/r/launch_IRkernel.R').read_text()
    assert (listener.VERSION, listener.TICKET) == (p['version'], p['ticket_variable'])
    labels = [p[k].encode() for k in ('hpke_info', 'aad_prefix', 'answer_label')]
    assert [listener.INFO, listener.AAD, listener.ANSWER] == labels
    assert [*listener.CHANNELS] == p['channels'] and [*listener.CURVE] == p['curve_fields']
    assert [*listener.OPTIONS] == re.findall('"(.*?)"', re.search(r'listener_options <- c\((.*?)\)',
        R)[1]) == p['options']
    assert re.findall('"(.*?)"', re.search(r'spark_modes <- c\((.*?)\)', R)[1]) == p['spark_modes']
    python = (PKG/'launchers/ipykernel_app.py').read_text()
    option, modes = p['spark_option'].replace('-', '_'), tuple(p['spark_modes'])
    assert f'{option}=dict(choices={modes!r}' in python and f'"{p["spark_option"]}"' in R

def test_nothing_of_it_is_written_twice():
    "Each source has the name of the variable right, and only those that cannot read the file have the other constants"
    sources = {str(o.relative_to(PKG)): o.read_text() for o in PKG.rglob('*')
               if o.suffix in ('.py', '.R', '.scala', '.sh')}
    assert {v for o in sources.values() for v in re.findall(r'KERNEL_LAUNCH_(?!TIMEOUT)\w+',
                                                            o)} == {PROTOCOL['ticket_variable']}
    assert {k: o.count(PROTOCOL['hpke_info']) for k,
            o in sources.items() if PROTOCOL['hpke_info'] in o} == {'launchers/server_listener.py': 1}
    assert not [k for k, o in sources.items() if 'iopub' in o and k.endswith('.scala')]
