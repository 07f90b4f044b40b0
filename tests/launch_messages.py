"""What launchers send, written independently of the package but for its constants: for the handshake and the response
server."""
import base64, json, os
from Cryptodome.Cipher import AES, PKCS1_v1_5
from Cryptodome.Protocol import HPKE
from Cryptodome.PublicKey import ECC, RSA
from Cryptodome.Util.Padding import pad
from gateway_provisioners_ssh.handshake import PROTOCOL

def b64(b): return base64.b64encode(b).decode()
def encode(obj): return b64(json.dumps(obj).encode()).encode()

def report(kernel_id='kernel-1', **kw):
    "What a launcher tells of its kernel"
    return PROTOCOL['vectors']['launch']['fields'] | dict(kernel_id=kernel_id) | kw

def seal(ticket, kernel_id, plain):
    "The version 2 message with `plain` (bytes, or an object for JSON) sealed by the launcher that holds `ticket`"
    ticket, kid = json.loads(base64.b64decode(ticket)), kernel_id.encode()
    hpke = HPKE.new(receiver_key=ECC.import_key(base64.b64decode(ticket['key'])), aead_id=HPKE.AEAD.AES128_GCM,
                    psk=(kid, base64.b64decode(ticket['psk'])), info=PROTOCOL['hpke_info'].encode())
    plain = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    sealed = hpke.seal(plain, PROTOCOL['aad_prefix'].encode() + kid)
    return encode(dict(version=2, kernel_id=kernel_id, enc=b64(hpke.enc), sealed=b64(sealed)))

def seal_v1(public_key, plain):
    "The version 1 message with `plain` (bytes, or an object for JSON)"
    key = os.urandom(16)
    under_rsa = PKCS1_v1_5.new(RSA.import_key(base64.b64decode(public_key))).encrypt(key)
    plain = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    return encode(dict(version=1, key=b64(under_rsa),
                       conn_info=b64(AES.new(key, AES.MODE_ECB).encrypt(pad(plain, 16)))))
