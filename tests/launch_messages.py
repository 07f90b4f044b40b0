"What launchers send, written independently of the package, for the tests of the handshake and the response server."
import base64, json, os
from Cryptodome.Cipher import AES, PKCS1_v1_5
from Cryptodome.Protocol import HPKE
from Cryptodome.PublicKey import ECC, RSA
from Cryptodome.Util.Padding import pad

def b64(b): return base64.b64encode(b).decode()
def encode(obj): return b64(json.dumps(obj).encode()).encode()

def report(kernel_id='kernel-1', **kw):
    "What a launcher tells of its kernel"
    ports = dict(shell_port=50001, iopub_port=50002, stdin_port=50003, hb_port=50004, control_port=50005, comm_port=50006)
    return dict(ip='192.0.2.7', transport='tcp', signature_scheme='hmac-sha256', key='a0436f6c-1916-498b', **ports,
                kernel_name='', kernel_id=kernel_id, pid=4711, pgid=4711, control_key='5a'*32) | kw

def seal(ticket, kernel_id, plain):
    "The version 2 message with `plain` (bytes, or an object for JSON) sealed by the launcher that holds `ticket`"
    ticket, kid = json.loads(base64.b64decode(ticket)), kernel_id.encode()
    hpke = HPKE.new(receiver_key=ECC.import_key(base64.b64decode(ticket['key'])), aead_id=HPKE.AEAD.AES128_GCM,
                    psk=(kid, base64.b64decode(ticket['psk'])), info=b'gateway_provisioners_ssh launch v2')
    sealed = hpke.seal(plain if isinstance(plain, bytes) else json.dumps(plain).encode(), b'2:' + kid)
    return encode(dict(version=2, kernel_id=kernel_id, enc=b64(hpke.enc), sealed=b64(sealed)))

def seal_v1(public_key, plain):
    "The version 1 message with `plain` (bytes, or an object for JSON)"
    key = os.urandom(16)
    under_rsa = PKCS1_v1_5.new(RSA.import_key(base64.b64decode(public_key))).encrypt(key)
    plain = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    return encode(dict(version=1, key=b64(under_rsa), conn_info=b64(AES.new(key, AES.MODE_ECB).encrypt(pad(plain, 16)))))
