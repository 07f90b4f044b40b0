"Host entries under fuzz, routes against OpenSSH's own reading of the same files, balancing under threads."
import getpass, os, pwd, re, shutil, socket, string, subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from gateway_provisioners_ssh import balance, hosts as hosts_mod
from gateway_provisioners_ssh.balance import LeastConnection, Ledger, RoundRobin, load_balancer, load_balancers
from gateway_provisioners_ssh.hosts import Host, hops, parse_hosts, route

quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.one_of(st.text(string.ascii_letters+string.digits+'_', min_size=1, max_size=1).flatmap(
    lambda c: st.text(string.ascii_letters+string.digits+'._-', max_size=30).map(lambda o: c+o)),
                  st.ip_addresses().map(str))
# that is a list of hosts
users = st.one_of(st.none(), st.text(string.ascii_letters+string.digits+'._+@#%', min_size=1,
                                     max_size=20).filter(lambda o: o[0] != '@'))
ports = st.one_of(st.none(), st.integers(1, 65535))

@quick
@given(names, users, ports)
def test_string_form_round_trips(name, user, port):
    host = Host(name, user, port)
    assert Host.parse(str(host)) == host
    assert parse_hosts(f' {host} ,{host}') == [host, host]

@settings(max_examples=3000, deadline=None)
@given(st.one_of(st.text(max_size=40), st.text('ab@:[].-_$;`\'"\\ \n\t,%{}()1290', max_size=16)))
def test_whatever_is_typed_gives_a_host_or_a_clear_refusal(entry):
    try: host = Host.parse(entry)
    except ValueError as e:
        assert repr(entry) in str(e)
        return
    assert Host.parse(str(host)) == host
    assert not set(str(host)) & set(' \t\n\r\'"`;&<>|(){}$,') and not host.name.startswith('-')
    assert host.port is None or 0 < host.port < 65536

def test_one_address_one_key():
    assert {str(Host.parse(o)) for o in ('[2001:DB8:0::1]:22', '[2001:db8::1]:22')} == {'[2001:db8::1]:22'}

def test_empty_lists():
    for o in ('', ' , ', [], [''], ['', ' ']):
        with pytest.raises(ValueError, match='empty'): parse_hosts(o)

def test_bad_entry_is_named():
    with pytest.raises(ValueError, match="'a b'"): parse_hosts('ok,a b,c d')

# --- this machine

def test_local_names_and_addresses():
    own = socket.gethostname()
    assert all(Host.parse(o).is_local() for o in ('localhost', 'LocalHost', '127.0.0.1', '127.9.9.9', '::1', own,
                                                  own.upper()))
    assert not any(Host.parse(o).is_local() for o in (f'{getpass.getuser()}@localhost', 'localhost:22', '0.0.0.0', '::',
                                                      '224.0.0.1', '255.255.255.255', '192.0.2.1', 'x.invalid'))

def test_own_interface_address_is_local():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try: s.connect(('192.0.2.1', 9))
        except OSError: pytest.skip('no route')
        addr = s.getsockname()[0]
    assert Host.parse(addr).is_local()

def test_resolving_name_is_local_unless_the_configuration_sends_it_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts_mod, '_resolve',
                        lambda name: {'box': {'127.0.0.1'}, 'split': {'127.0.0.1', '192.0.2.1'}}.get(name, set()))
    cfg = tmp_path/'config'
    for text, local in (('', True), ('Host box\n Port 2222', False), ('Host box\n HostName other', False),
                        ('Host box\n ProxyJump j', False), ('Host other\n Port 2222', True), ('User bob', True)):
        cfg.write_text(text)
        assert Host('box').is_local(str(cfg)) is local, text
    assert not Host('split').is_local(str(cfg))

# --- routes against `ssh -G`

hostpats = st.lists(st.sampled_from(['*', 'a*', 'alpha', '!alpha', 'beta', '*.lab', '!*.lab', '?eta', 'gamma.lab']),
                    min_size=1, max_size=3)
sections = st.one_of(hostpats.map(lambda o: 'Host '+' '.join(o)),
    st.sampled_from(['Match all', 'Match user bob', 'Match !user bob', 'Match host alpha,gamma.lab',
                     'Match originalhost a*', 'Match Host alpha user bob', f'Match localuser {getpass.getuser()}',
                     'Match final', 'Match final host *.lab', 'Match final originalhost b*',
                     'Match exec "test %p = 2222"', 'Match exec true', 'Match exec false', 'Match host=alpha']))
options = st.lists(st.sampled_from(['HostName %h.example', 'HostName=10.0.0.9', 'Port 2222', 'port = 2200',
    'Port 2201 # a note', 'User bob', 'User alice', 'IdentityFile /k/one', 'IdentityFile /k/two_%r',
    'IdentityFile ~/three', 'IdentitiesOnly yes', 'ProxyJump j1,bob@j2:2200', 'ProxyJump none', 'ProxyCommand nc %h %p',
    'ProxyCommand none', 'UserKnownHostsFile /k/a /k/b', 'HostKeyAlias al', 'StrictHostKeyChecking no',
    'StrictHostKeyChecking accept-new', 'AddressFamily inet', 'ConnectTimeout 7', 'Compression yes',
    'IdentityFile "/k/a b"', 'HostName gamma.lab', '# nothing', '']), max_size=4)
blocks = st.lists(st.tuples(st.one_of(st.none(), sections), options),
                  max_size=4).map(lambda bs: '\n'.join('\n  '.join(([h] if h else [])+o) for h,o in bs)+'\n')

@pytest.fixture
def passwd_home(monkeypatch):
    "The home directory of the user database, the one OpenSSH uses"
    monkeypatch.setenv('HOME', pwd.getpwuid(os.getuid()).pw_dir)

def openssh(cfg, host):
    extra = (['-l', host.user] if host.user else []) + (['-p', str(host.port)] if host.port else [])
    p = subprocess.run(['ssh', '-G', '-F', str(cfg), *extra, host.name], capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    out = {}
    for line in p.stdout.splitlines():
        k, _, v = line.partition(' ')
        out.setdefault(k, []).append(v)
    return out

@pytest.mark.skipif(not shutil.which('ssh'), reason='needs the OpenSSH client')
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks, blocks, blocks, st.sampled_from(['alpha', 'beta', 'gamma.lab', 'x']), st.sampled_from([None, 'bob']),
       st.sampled_from([None, 2222]))
def test_routes_agree_with_openssh(passwd_home, tmp_path, top, included, rest, name, user, port):
    cfg, inc = tmp_path/'config', tmp_path/'inc'
    cfg.write_text(f'{top}Include {inc}\n{rest}'); inc.write_text(included)
    os.chmod(cfg, 0o600); os.chmod(inc, 0o600)
    host = Host(name, user, port)
    ssh, ours = openssh(cfg, host), route(host, config=str(cfg))
    one = lambda k, d=None: ssh.get(k, [d])[0]
    home = os.path.expanduser('~')
    assert (ours.hostname, ours.port, ours.user or getpass.getuser()) == (one('hostname'), int(one('port')),
        one('user')), cfg.read_text()
    expand = lambda o: o.replace('~', home, 1).replace('%r', one('user')).replace('%h', one('hostname')).replace('%p',
        one('port'))
    if ours.identity_files:
        assert list(ours.identity_files) == list(dict.fromkeys(expand(o) for o in ssh['identityfile'])), cfg.read_text()
    assert ours.identities_only == (one('identitiesonly')=='yes')
    assert ','.join(map(str, ours.proxy_jump)) == one('proxyjump', ''), cfg.read_text()
    assert (ours.proxy_command or 'none') == expand(one('proxycommand', 'none')), cfg.read_text()
    assert list(ours.known_hosts) == [expand(o) for o in one('userknownhostsfile').split()
                                      +one('globalknownhostsfile').split()]
    assert ours.host_key_alias == one('hostkeyalias')
    assert (ours.address_family, ours.compression) == (one('addressfamily'), one('compression')=='yes')

def write(tmp_path, text, name='config'): (tmp_path/name).write_text(text); return str(tmp_path/name)

def test_include_within_a_section_keeps_to_it(tmp_path):
    inc = write(tmp_path, 'Host b*\n Port 1\nMatch all\n User u\n', 'inc')
    cfg = write(tmp_path, f'Host *.lab\n Include {inc}\n Compression yes\n')
    seen = {o: (r.port, r.user, r.compression) for o in ('b.lab', 'a.lab', 'b') for r in [route(Host(o), config=cfg)]}
    assert seen == {'b.lab': (1, 'u', True), 'a.lab': (22, 'u', True), 'b': (22, None, False)}
    if shutil.which('ssh'):
        for o, (port, user, comp) in seen.items():
            ssh = openssh(cfg, Host(o))
            assert (ssh['port'], ssh['user'], ssh['compression']) == ([str(port)], [user or getpass.getuser()],
                ['yes' if comp else 'no'])

def test_include_globs_missing_files_and_circles(tmp_path):
    for i in (2, 1): write(tmp_path, f'Port 220{i}\n', f'part{i}.conf')
    assert route(Host('h'), config=write(tmp_path, f'Include {tmp_path}/nothing {tmp_path}/part*.conf\n')).port == 2201
    with pytest.raises(ValueError, match='itself'):
        route(Host('h'), config=write(tmp_path, f'Include {tmp_path}/config\n'))

def test_criteria_we_cannot_evaluate_never_match(tmp_path):
    assert route(Host('h'), config=write(tmp_path,
                                         'Match tagged vpn\n Port 1\nTag x\nMatch host h localnetwork 10.0.0.0/8\n '
                                         'Port 2\nMatch all\n Port 3\n')).port == 3

@pytest.mark.parametrize('text', ['Host "a', 'Port abc', 'Port 99999', 'Match host', 'Match nonsense',
                                  'CanonicalizeHostname yes', 'Port', 'ProxyJump a b'])
def test_broken_configuration_is_an_error_or_harmless(tmp_path, text):
    cfg = write(tmp_path, text+'\n')
    try: assert route(Host('h'), config=cfg).hostname == 'h'
    except ValueError as e: assert re.search('OpenSSH configuration|host .*port|user', str(e))

def test_missing_file_is_empty(tmp_path):
    r = route(Host('h'), 'bob', 2022, str(tmp_path/'none'))
    assert (r.hostname, r.port, r.user, r.identity_files, r.proxy_jump, r.proxy_command) == ('h', 2022, 'bob', (), (),
        None)
    assert r.known_hosts[0] == os.path.expanduser('~/.ssh/known_hosts')

def test_user_configuration_comes_before_the_system_one(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts_mod, 'USER_CONFIG', write(tmp_path, 'Host a\n Port 1\n', 'u'))
    monkeypatch.setattr(hosts_mod, 'SYSTEM_CONFIG', write(tmp_path, 'Port 2\nUser sys\n', 's'))
    assert [(r.port, r.user) for r in (route(Host('a')), route(Host('b')), route(Host('b', 'me', 9)))] == [(1, 'sys'),
        (2, 'sys'), (9, 'me')]

def test_tokens_see_the_values_used(tmp_path):
    cfg = write(tmp_path,
                'Host a\n HostName real\n ProxyCommand nc %h %p %r\n UserKnownHostsFile ~/kh_%h ${NOPE}/x\n '
                'IdentityAgent %d/agent\n CertificateFile /c/%n\n')
    r = route(Host('a', port=9), 'deft', config=cfg)
    home = os.path.expanduser('~')
    assert (r.proxy_command, r.known_hosts[:2], r.identity_agent, r.certificate_files) == ('nc real 9 deft',
        (f'{home}/kh_real', '/x'), f'{home}/agent', ('/c/a',))

@pytest.mark.parametrize('agent,want',
                         [('none', ''), ('SSH_AUTH_SOCK', None), ('$MY_AGENT', '/run/agent'), ('~/a', '~/a')])
def test_identity_agent(tmp_path, monkeypatch, agent, want):
    monkeypatch.setenv('MY_AGENT', '/run/agent')
    assert route(Host('h'), config=write(tmp_path, f'IdentityAgent {agent}\n')).identity_agent == (want
        and os.path.expanduser(want))

def test_default_user_cannot_inject_configuration(tmp_path):
    for user in ('bob\nPort 1', 'bob;x', '-l', 'a b'):
        with pytest.raises(ValueError, match='user name'): route(Host('h'), user, config=str(tmp_path/'none'))

def test_hops(tmp_path):
    cfg = write(tmp_path,
                'Host c\n ProxyJump a,ssh://bob@b:2200\nHost a\n ProxyCommand nc gate %p\n Port 2201\nHost b\n '
                'ProxyJump elsewhere\n')
    way = hops(Host('c'), 'me', 2022, cfg)
    assert [(o.hostname, o.port, o.user, o.proxy_command) for o in way] == [('a', 2201, None, 'nc gate 2201'),
        ('b', 2200, 'bob', None), ('c', 2022, 'me', None)]
    with pytest.raises(ValueError, match='circle'):
        hops(Host('x'), config=write(tmp_path, 'Host x\n ProxyJump y\nHost y\n ProxyJump x\n'))

# --- balancing

@quick
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 5))
def test_round_robin_is_exact_per_list(n, k, others):
    rr, hosts = RoundRobin(), [f'h{i}' for i in range(n)]
    for _ in range(others): rr.order(hosts+['more'], {})
    assert [rr.order(hosts, {})[0] for _ in range(n*k)] == hosts*k

@pytest.mark.parametrize('cls', [RoundRobin, LeastConnection])
def test_exact_under_threads(cls):
    rule, ledger, a, b = cls(), Ledger(), [f'a{i}' for i in range(4)], [f'b{i}' for i in range(3)]
    with ThreadPoolExecutor(32) as ex: claims = list(ex.map(lambda i: ledger.pick(rule, a if i%2 else b), range(1200)))
    assert ledger.load == dict.fromkeys(a, 150) | dict.fromkeys(b, 200)
    with ThreadPoolExecutor(32) as ex:
        list(ex.map(lambda o: (o.move('z'), o.release(), o.release(), o.move('q')), claims))
    assert ledger.load == {}

@quick
@given(st.lists(st.tuples(st.sampled_from(['pick', 'pin', 'move', 'release']), st.integers(0, 30),
                          st.sampled_from('abc')), max_size=60))
def test_ledger_counts_what_is_claimed(steps):
    ledger, rule, claims, alive = Ledger(), LeastConnection(), [], {}
    for what, i, host in steps:
        if what=='pick':
            before = Counter(alive.values()); claims.append(c := ledger.pick(rule, list('abc')))
            assert (before[c.host] == min(before[o] for o in 'abc') and sorted(c.order) == list('abc')
                    and c.order[0]==c.host)
            alive[id(c)] = c.host
        elif what=='pin': claims.append(c := ledger.claim(host)); alive[id(c)] = host
        elif claims:
            c = claims[i % len(claims)]
            if what=='move':
                c.move(host)
                if id(c) in alive: alive[id(c)] = host
            else: c.release(); alive.pop(id(c), None)
        assert ledger.load == dict(Counter(alive.values()))

def test_weights():
    ledger, hosts = Ledger(), ['big', 'big', 'small']
    for _ in range(30): ledger.pick(LeastConnection(), hosts)
    assert ledger.load == {'big': 20, 'small': 10}

def test_order_of_a_plug_in_is_checked_and_completed():
    ledger = Ledger()
    assert ledger.pick(SimpleNamespace(order=lambda h, l: h[-1:]), ['a', 'b', 'c']).order == ['c', 'a', 'b']
    for bad in ([], ['x'], ['a', 'x']):
        with pytest.raises(ValueError, match='not among'):
            ledger.pick(SimpleNamespace(order=lambda h, l: bad), ['a', 'b'])
    with pytest.raises(ValueError, match='no hosts'): ledger.pick(RoundRobin(), [])
    assert ledger.load == {'c': 1}

class Reverse(RoundRobin):
    def order(self, hosts, load): return list(hosts)[::-1]

def test_plug_ins_by_name(monkeypatch):
    class EP(SimpleNamespace):
        def load(self):
            if isinstance(self.obj, Exception): raise self.obj
            return self.obj
    eps = [EP(name='reverse', value='p:Reverse', obj=Reverse),
           EP(name='broken', value='p:Gone', obj=ImportError('no p')), EP(name='odd', value='p:dict', obj=dict),
           EP(name='round-robin', value='p:Evil', obj=Reverse)]
    for f in (balance.load_balancers, balance.load_balancer): f.cache_clear()
    monkeypatch.setattr(balance, 'entry_points', lambda group: eps if group=='gateway_provisioners_ssh.load_balancers'
                        else [])
    assert set(load_balancers()) == {'reverse', 'broken', 'odd', 'round-robin', 'least-connection', 'least-load'}
    assert (load_balancer('reverse').order(['a', 'b'], {}) == ['b', 'a']
            and load_balancer('reverse') is load_balancer('reverse'))
    assert type(load_balancer('round-robin')) is RoundRobin
    with pytest.raises(ValueError, match='broken.*p:Gone.*no p'): load_balancer('broken')
    with pytest.raises(ValueError, match='odd.*no method'): load_balancer('odd')
    with pytest.raises(ValueError, match='broken, least-connection, least-load, odd, reverse, round-robin'):
        load_balancer('nope')
    for f in (balance.load_balancers, balance.load_balancer): f.cache_clear()

def test_built_in_rules_are_declared_as_entry_points():
    assert {o.name: o.load() for o in balance.entry_points(group=balance.GROUP)
            if o.name in balance.BUILT_IN} == balance.BUILT_IN
