package launcher

import com.fasterxml.jackson.databind.{JsonNode, ObjectMapper}
import com.fasterxml.jackson.databind.node.ObjectNode
import java.io.ByteArrayOutputStream
import java.net.{InetAddress, InetSocketAddress, Socket, SocketTimeoutException}
import java.nio.charset.StandardCharsets.UTF_8
import java.security.{MessageDigest, SecureRandom}
import java.util.Base64
import scala.util.Try

/** A reason to give up, in words for the person who reads the kernel's log. Never holds a secret. */
class LaunchError(message: String, val status: Int = 1) extends Exception(message)

object Json {
  val mapper = new ObjectMapper()
  def obj(): ObjectNode = mapper.createObjectNode()
  /** The JSON object in `text`, or nothing if it holds anything else. */
  def parse(text: String): Option[JsonNode] = Try(mapper.readTree(text)).toOption.filter(n => n != null && n.isObject)
}

object Hex {
  def encode(b: Array[Byte]): String = b.map(x => f"${x & 0xff}%02x").mkString
  def decode(s: String): Option[Array[Byte]] =
    if (s.length % 2 == 0 && s.forall(c => Character.digit(c, 16) >= 0)) Some(s.grouped(2).map(Integer.parseInt(_, 16).toByte).toArray)
    else None
}

object Secrets {
  private val random = new SecureRandom()
  def bytes(n: Int): Array[Byte] = { val b = new Array[Byte](n); random.nextBytes(b); b }
  /** Whether `hex` spells `expected`, in a time that tells nothing about where they differ. */
  def matches(hex: String, expected: Array[Byte]): Boolean = Hex.decode(hex.trim).exists(MessageDigest.isEqual(_, expected))
}

/** What the host application hands this launch and nobody else, in one environment variable: its one-time public key,
  * a one-time secret, and for a restart the ports and key to take up again. */
final class Ticket private (psk: Array[Byte], hostKey: Array[Byte], val connection: Option[JsonNode], val encrypt: Boolean) {
  override def toString = "Ticket(...)"
  private def tag(text: String) = Hpke.bytes(text)

  /** The launch message around `fields` and the answer that proves its receipt by the host application. */
  def message(kernelId: String, fields: ObjectNode): (Array[Byte], Array[Byte]) = {
    val box = Hpke.seal(Hpke.publicKey(hostKey), psk, tag(kernelId), tag("gateway_provisioners_ssh launch v2"), tag("2:" + kernelId),
      Json.mapper.writeValueAsBytes(fields))
    val b64 = Base64.getEncoder
    val out = Json.obj().put("version", 2).put("kernel_id", kernelId)
      .put("enc", b64.encodeToString(box.enc)).put("sealed", b64.encodeToString(box.ciphertext))
    (b64.encode(Json.mapper.writeValueAsBytes(out)), Hpke.hmac(psk, tag("ack"), box.enc))
  }

  /** Sends the launch message; a `LaunchError` unless the host application answers that it was waiting for just this. */
  def send(address: InetSocketAddress, kernelId: String, fields: ObjectNode, seconds: Int = 30): Unit = {
    val (message, ack) = this.message(kernelId, fields)
    val socket = new Socket()
    val answer = try {
      socket.connect(address, seconds * 1000)
      socket.getOutputStream.write(message)
      socket.shutdownOutput()
      Lines.first(socket, 1024, seconds)
    } catch {
      case e: java.io.IOException => throw new LaunchError(s"the host application cannot be reached at ${address.getAddress.getHostAddress} port " +
        s"${address.getPort} (${e.getMessage}): open that port in its direction, or let kernels be tunnelled (GP_ENABLE_TUNNELING=true)")
    } finally socket.close()
    if (!Secrets.matches(answer, ack)) throw new LaunchError("the host application did not confirm this launch: it has given it up, or is another one")
  }
}

object Ticket {
  val variable = "KERNEL_LAUNCH_SECRET"

  def parse(text: String): Ticket = {
    def wrong(what: String) = throw new LaunchError(s"the host application sent $what in $variable: is its version the one this kernelspec was installed with?")
    val json = Try(new String(Base64.getDecoder.decode(text.trim), UTF_8)).toOption.flatMap(Json.parse).getOrElse(wrong("nothing that is a launch ticket"))
    if (json.path("version").asInt != 2) wrong("a launch ticket of another version")
    def bytes(field: String) = Try(Base64.getDecoder.decode(json.path(field).asText)).toOption.filter(_.length >= 32).getOrElse(wrong(s"a launch ticket without $field"))
    val key = bytes("key")
    if (Try(Hpke.publicKey(key)).isFailure) wrong("a launch ticket whose key is none")
    val connection = Option(json.get("connection")).filter(_.isObject)
    new Ticket(bytes("psk"), key, connection, json.path("encrypt").asBoolean(false))
  }
}

object Lines {
  /** The first line a peer sends, of at most `max` bytes, within `seconds` in all: slow bytes do not stretch it. */
  def first(socket: Socket, max: Int, seconds: Int): String = {
    val deadline = System.nanoTime + seconds * 1000000000L
    val in = socket.getInputStream
    val line = new ByteArrayOutputStream()
    var b = 0
    do {
      val left = ((deadline - System.nanoTime) / 1000000).toInt
      if (left <= 0) throw new SocketTimeoutException("no answer in time")
      socket.setSoTimeout(left)
      b = in.read()
      if (b >= 0) line.write(b)
    } while (b >= 0 && b != '\n' && line.size < max)
    new String(line.toByteArray, UTF_8)
  }
}

object Address {
  private val form = """(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):(\d{1,5})""".r
  /** `IP:PORT`, an IPv6 address in brackets. */
  def parse(text: String): InetSocketAddress = text match {
    case form(v6, v4, port) if port.toInt >= 1 && port.toInt <= 65535 =>
      val ip = Try(InetAddress.getByName(Option(v6).getOrElse(v4))).getOrElse(throw new LaunchError(s"--response-address '$text': no such host", 2))
      new InetSocketAddress(ip, port.toInt)
    case _ => throw new LaunchError(s"--response-address '$text' is not IP:PORT", 2)
  }
}
