package launcher

import java.nio.charset.StandardCharsets.UTF_8
import java.security.{KeyFactory, KeyPair, KeyPairGenerator, PublicKey}
import java.security.spec.X509EncodedKeySpec
import javax.crypto.{Cipher, KeyAgreement, Mac}
import javax.crypto.spec.{GCMParameterSpec, SecretKeySpec}

/** What `Hpke.seal` returns: the ephemeral public key of the sender, and the sealed bytes. */
final class Sealed(val enc: Array[Byte], val ciphertext: Array[Byte])

/** Hybrid public key encryption (RFC 9180), the sending half of one suite and one mode:
  * DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM, with a pre-shared key.
  * The JDK (11 and later) has the primitives; they are combined as in the RFC's pseudocode. */
object Hpke {
  private val kem   = Array[Byte](0, 0x20)
  private val suite = bytes("HPKE") ++ kem ++ Array[Byte](0, 1, 0, 1)
  private val modePsk = Array[Byte](1)

  def bytes(s: String): Array[Byte] = s.getBytes(UTF_8)

  def hmac(key: Array[Byte], data: Array[Byte]*): Array[Byte] = {
    val mac = Mac.getInstance("HmacSHA256")
    // HMAC pads its key with zeros, so 32 of them stand for the empty key, which the JDK refuses
    mac.init(new SecretKeySpec(if (key.isEmpty) new Array[Byte](32) else key, "HmacSHA256"))
    data.foreach(d => mac.update(d))
    mac.doFinal()
  }

  private def extract(salt: Array[Byte], suiteId: Array[Byte], label: String, ikm: Array[Byte]) =
    hmac(salt, bytes("HPKE-v1"), suiteId, bytes(label), ikm)

  /** HKDF-Expand of at most 32 bytes, which is all that this suite needs. */
  private def expand(prk: Array[Byte], suiteId: Array[Byte], label: String, info: Array[Byte], n: Int) =
    hmac(prk, Array[Byte](0, n.toByte), bytes("HPKE-v1"), suiteId, bytes(label), info, Array[Byte](1)).take(n)

  def freshKey(): KeyPair = KeyPairGenerator.getInstance("X25519").generateKeyPair()

  /** An X25519 public key from its SubjectPublicKeyInfo in DER. */
  def publicKey(spki: Array[Byte]): PublicKey =
    KeyFactory.getInstance("X25519").generatePublic(new X509EncodedKeySpec(spki))

  /** The 32 bytes that RFC 7748 calls the u-coordinate: the tail of the SubjectPublicKeyInfo. */
  private def raw(key: PublicKey): Array[Byte] = key.getEncoded.takeRight(32)

  private def sharedSecret(to: PublicKey, ephemeral: KeyPair): Array[Byte] = {
    val agreement = KeyAgreement.getInstance("X25519")
    agreement.init(ephemeral.getPrivate)
    agreement.doPhase(to, true)
    val suiteId = bytes("KEM") ++ kem
    val prk = extract(Array.empty, suiteId, "eae_prk", agreement.generateSecret())
    expand(prk, suiteId, "shared_secret", raw(ephemeral.getPublic) ++ raw(to), 32)
  }

  /** AES-128-GCM key and base nonce for a message to `to` (RFC 9180, section 5.1, mode_psk). */
  def schedule(to: PublicKey, psk: Array[Byte], pskId: Array[Byte], info: Array[Byte],
               ephemeral: KeyPair): (Array[Byte], Array[Byte]) = {
    require(psk.length >= 32, "the one-time secret must have 32 bytes or more")
    val none = Array.empty[Byte]
    val context = modePsk ++ extract(none, suite, "psk_id_hash", pskId) ++ extract(none, suite, "info_hash", info)
    val secret = extract(sharedSecret(to, ephemeral), suite, "secret", psk)
    (expand(secret, suite, "key", context, 16), expand(secret, suite, "base_nonce", context, 12))
  }

  /** Seals one message, the only one of its context: it opens with `to`'s private key and `psk`, and so proves to the
    * receiver that the sender has `psk`. */
  def seal(to: PublicKey, psk: Array[Byte], pskId: Array[Byte], info: Array[Byte], aad: Array[Byte], plain: Array[Byte],
           ephemeral: KeyPair = freshKey()): Sealed = {
    val (key, nonce) = schedule(to, psk, pskId, info, ephemeral)
    val cipher = Cipher.getInstance("AES/GCM/NoPadding")
    cipher.init(Cipher.ENCRYPT_MODE, new SecretKeySpec(key, "AES"), new GCMParameterSpec(128, nonce))
    cipher.updateAAD(aad)
    new Sealed(raw(ephemeral.getPublic), cipher.doFinal(plain))
  }
}
