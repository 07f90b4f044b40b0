"""A version 1 launcher, as the contract of Gateway Provisioners and Enterprise Gateway has it: RSA, AES-ECB, one
unanswered message."""
import argparse, base64, json, os, signal, socket, subprocess, sys, tempfile, uuid
from Cryptodome.Cipher import AES, PKCS1_v1_5
from Cryptodome.PublicKey import RSA
from Cryptodome.Random import get_random_bytes
from Cryptodome.Util.Padding import pad

ap = argparse.ArgumentParser()
for o in 'kernel-id', 'port-range', 'response-address', 'public-key':
    ap.add_argument(f'--RemoteProcessProxy.{o}', dest=o.replace('-', '_'))
args, _ = ap.parse_known_args()
rsa = RSA.import_key(base64.b64decode(args.public_key))

def reserved():
    """A port that the system gives to nobody else while this socket is open, and that the kernel can listen on all the
    same"""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(('', 0))
    return s
socks = [*(reserved() for _ in range(5)), socket.create_server(('', 0))]
ports = [s.getsockname()[1] for s in socks]
info = dict(zip(('shell_port', 'iopub_port', 'stdin_port', 'hb_port', 'control_port'), ports), ip='0.0.0.0',
            transport='tcp', key=str(uuid.uuid4()), signature_scheme='hmac-sha256', kernel_name='')
file = tempfile.NamedTemporaryFile('w', suffix='.json', delete=False)
json.dump(info, file); file.close()
kernel = subprocess.Popen([sys.executable, '-m', 'ipykernel_launcher', '-f', file.name])
full = info|dict(pid=kernel.pid, pgid=os.getpgid(kernel.pid), comm_port=ports[5], kernel_id=args.kernel_id)
aes = get_random_bytes(16)
message = dict(version=1, key=base64.b64encode(PKCS1_v1_5.new(rsa).encrypt(aes)).decode(),
               conn_info=base64.b64encode(AES.new(aes,
                                                  AES.MODE_ECB).encrypt(pad(json.dumps(full).encode(), 16))).decode())
ip, port = args.response_address.rsplit(':', 1)
with socket.create_connection((ip, int(port))) as s: s.sendall(base64.b64encode(json.dumps(message).encode()))
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(kernel.wait() and 1)
