package launcher

import com.fasterxml.jackson.databind.{JsonNode, ObjectMapper}
import com.fasterxml.jackson.databind.node.ObjectNode
import java.io.{Closeable, InputStream, IOException}
import java.net.{InetAddress, InetSocketAddress, ProtocolFamily, Socket, SocketAddress, StandardProtocolFamily}
import java.nio.channels.{Channels, SocketChannel}
import java.nio.charset.StandardCharsets.UTF_8
import java.nio.file.{Path, Paths}
import java.security.{MessageDigest, SecureRandom}
import java.util.{Base64, Timer, TimerTask}
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
    if (s.length % 2 != 0 || s.exists(c => Character.digit(c, 16) < 0)) None
    else Some(s.grouped(2).map(Integer.parseInt(_, 16).toByte).toArray)
}

object Secrets {
  private val random = new SecureRandom()
  def bytes(n: Int): Array[Byte] = { val b = new Array[Byte](n); random.nextBytes(b); b }
  /** Whether `hex` spells `expected`; compared in constant time. */
  def matches(hex: String, expected: Array[Byte]): Boolean =
    Hex.decode(hex.trim).exists(MessageDigest.isEqual(_, expected))
}

/** One request and its reply. */
object Exchange {
  /** The first line of the stream that `ask` returns, cut after `Protocol.maxLine` bytes. `connection` is closed then,
    * and after `seconds` in any case, also if bytes still arrive. */
  def apply(connection: Closeable, seconds: Int = 30)(ask: => InputStream): String = {
    @volatile var late = false
    val timer = new Timer("deadline", true)
    timer.schedule(new TimerTask { def run(): Unit = { late = true; connection.close() } }, seconds * 1000L)
    try {
      val in = ask
      val line = Iterator.continually(in.read()).takeWhile(b => b >= 0 && b != '\n').take(Protocol.maxLine)
      new String(line.map(_.toByte).toArray, UTF_8)
    } catch { case _: IOException if late => throw new IOException("no answer in time") }
    finally { timer.cancel(); connection.close() }
  }
}

/** The agent that started this launcher, reached by a Unix domain socket. Java has those since version 16; by
  * reflection this compiles with older versions, and runs on them. */
final class Agent(socket: String, token: String) {
  override def toString = "Agent(...)"

  /** The answer to a report; a `LaunchError` if the launch was given up, an `IOException` if there is no answer. */
  def tell(report: ObjectNode): JsonNode = {
    val line = Json.mapper.writeValueAsBytes(report.put("token", token)) :+ '\n'.toByte
    val of = Class.forName(Agent.addressClass).getMethod("of", classOf[String])
    val address = of.invoke(null, socket).asInstanceOf[SocketAddress]
    val open = classOf[SocketChannel].getMethod("open", classOf[ProtocolFamily])
    val channel = open.invoke(null, StandardProtocolFamily.valueOf("UNIX")).asInstanceOf[SocketChannel]
    val answer = Exchange(channel) {
      channel.connect(address)
      Channels.newOutputStream(channel).write(line)
      Channels.newInputStream(channel)
    }
    Json.parse(answer).getOrElse(
      throw new LaunchError("the agent of this host does not know this launch: it was given up meanwhile"))
  }
}

object Agent {
  private val addressClass = "java.net.UnixDomainSocketAddress"
  /** Whether this JVM has Unix domain sockets. */
  def supported: Boolean = Try(Class.forName(addressClass)).isSuccess
}

/** The host application, reached over the network: its one-time public key, and the one-time secret of this launch. */
final class HostApplication(psk: Array[Byte], key: Array[Byte]) {
  override def toString = "HostApplication(...)"

  /** The launch message around `fields`, and the answer by which the host application confirms it. */
  def message(kernelId: String, fields: ObjectNode): (Array[Byte], Array[Byte]) = {
    val Seq(id, info, aad, label) =
      Seq(kernelId, Protocol.hpkeInfo, Protocol.aadPrefix + kernelId, Protocol.answerLabel).map(Hpke.bytes)
    val box = Hpke.seal(Hpke.publicKey(key), psk, id, info, aad, Json.mapper.writeValueAsBytes(fields))
    val b64 = Base64.getEncoder
    val out = Json.obj().put("version", Protocol.version).put("kernel_id", kernelId)
      .put("enc", b64.encodeToString(box.enc)).put("sealed", b64.encodeToString(box.ciphertext))
    (b64.encode(Json.mapper.writeValueAsBytes(out)), Hpke.hmac(psk, label, box.enc))
  }

  /** Sends the launch message; a `LaunchError` unless the host application confirms it. */
  def tell(address: InetSocketAddress, kernelId: String, fields: ObjectNode): Unit = {
    val (message, ack) = this.message(kernelId, fields)
    val socket = new Socket()
    val answer = try Exchange(socket) {
      socket.connect(address)
      socket.getOutputStream.write(message)
      socket.shutdownOutput()
      socket.getInputStream
    } catch {
      case e: IOException => throw new LaunchError("the host application cannot be reached at " +
        s"${address.getAddress.getHostAddress} port ${address.getPort} (${e.getMessage}): " +
        "open that port in its direction, or let kernels be tunnelled (GP_ENABLE_TUNNELING=true)")
    }
    if (!Secrets.matches(answer, ack))
      throw new LaunchError("the host application did not confirm this launch: it has given it up, or is another one")
  }
}

/** What one launch is given in an environment variable: where to report, and after a restart the former ports and
  * key. */
final class Ticket private (json: JsonNode, val application: Option[HostApplication]) {
  override def toString = "Ticket(...)"
  private def text(field: String) = Option(json.path(field).asText(null)).filter(_.nonEmpty)

  val agent: Option[Agent] = for (socket <- text("socket"); token <- text("token")) yield new Agent(socket, token)
  /** Where the connection file goes, if the agent says so. */
  val file: Option[Path] = text("file").map(Paths.get(_))
  val connection: Option[JsonNode] = Option(json.get("connection")).filter(_.isObject)
  val encrypt: Boolean = json.path("encrypt").asBoolean(false)
  /** Whether to report over the network besides the agent. */
  val network: Boolean = json.path("network").asBoolean(false)
}

object Ticket {
  private def base64(text: String) = Try(Base64.getDecoder.decode(text)).toOption

  def parse(text: String): Ticket = {
    def wrong(what: String) = throw new LaunchError(s"the host application sent $what in ${Protocol.ticketVariable}: " +
      "is its version the one this kernelspec was installed with?")
    val json = base64(text.trim).flatMap(b => Json.parse(new String(b, UTF_8)))
      .getOrElse(wrong("nothing that is a launch ticket"))
    if (json.path("version").asInt != Protocol.version) wrong("a launch ticket of another version")
    def bytes(field: String) =
      base64(json.path(field).asText).filter(_.length >= 32).getOrElse(wrong(s"a launch ticket without $field"))
    def application = {
      val key = bytes("key")
      if (Try(Hpke.publicKey(key)).isFailure) wrong("a launch ticket whose key is none")
      new HostApplication(bytes("psk"), key)
    }
    val needed = Seq("socket", "token").exists(!json.hasNonNull(_)) || json.path("network").asBoolean(false)
    new Ticket(json, if (needed || json.has("psk") || json.has("key")) Some(application) else None)
  }
}

object Address {
  private val form = """(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):(\d{1,5})""".r
  /** `IP:PORT`, an IPv6 address in brackets. */
  def parse(text: String): InetSocketAddress = text match {
    case form(v6, v4, port) if port.toInt >= 1 && port.toInt <= 65535 =>
      val ip = Try(InetAddress.getByName(Option(v6).getOrElse(v4))).getOrElse(
        throw new LaunchError(s"--response-address '$text': no such host", 2))
      new InetSocketAddress(ip, port.toInt)
    case _ => throw new LaunchError(s"--response-address '$text' is not IP:PORT", 2)
  }
}
