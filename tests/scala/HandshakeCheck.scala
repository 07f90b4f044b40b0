import com.fasterxml.jackson.databind.JsonNode
import java.math.BigInteger
import java.security.{KeyFactory, KeyPair}
import java.security.spec.{NamedParameterSpec, XECPrivateKeySpec, XECPublicKeySpec}
import launcher._
import scala.util.{Failure, Success, Try}

/** Answers a JSON object a line on standard input with one on standard output, for tests in another language. */
object HandshakeCheck {
  private val keys = KeyFactory.getInstance("X25519")
  private def hex(json: JsonNode, name: String): Array[Byte] = Hex.decode(json.path(name).asText).get
  private def publicKey(raw: Array[Byte]) = keys.generatePublic(new XECPublicKeySpec(NamedParameterSpec.X25519, new BigInteger(1, raw.reverse)))
  private def privateKey(raw: Array[Byte]) = keys.generatePrivate(new XECPrivateKeySpec(NamedParameterSpec.X25519, raw))

  /** Key, nonce and sealed message for given keys, the ephemeral one included, as test vectors have them. */
  private def vector(in: JsonNode) = {
    val ephemeral = new KeyPair(publicKey(hex(in, "enc")), privateKey(hex(in, "skEm")))
    val to = publicKey(hex(in, "pkRm"))
    val (key, nonce) = Hpke.schedule(to, hex(in, "psk"), hex(in, "psk_id"), hex(in, "info"), ephemeral)
    val box = Hpke.seal(to, hex(in, "psk"), hex(in, "psk_id"), hex(in, "info"), hex(in, "aad"), hex(in, "pt"), ephemeral)
    Json.obj().put("key", Hex.encode(key)).put("base_nonce", Hex.encode(nonce)).put("enc", Hex.encode(box.enc)).put("ct", Hex.encode(box.ciphertext))
  }

  private def message(in: JsonNode) = {
    val (message, ack) = Ticket.parse(in.path("ticket").asText).application.get.message(in.path("kernel_id").asText, in.get("fields").deepCopy())
    Json.obj().put("message", new String(message)).put("ack", Hex.encode(ack))
  }

  def main(args: Array[String]): Unit = Iterator.continually(scala.io.StdIn.readLine()).takeWhile(_ != null).foreach { line =>
    val in = Json.parse(line).get
    val out = Try(if (in.has("ticket")) message(in) else if (in.has("range")) Json.obj().put("range", PortRange.parse(in.path("range").asText).toString)
      else if (in.has("address")) Json.obj().put("address", Address.parse(in.path("address").asText).toString) else vector(in))
    println(out match { case Success(o) => o; case Failure(e) => Json.obj().put("error", s"${e.getClass.getSimpleName}: ${e.getMessage}") })
  }
}
