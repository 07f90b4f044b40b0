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
    if (s.length % 2 == 0 && s.forall(c => Character.digit(c, 16) >= 0)) Some(s.grouped(2).map(Integer.parseInt(_, 16).toByte).toArray)
    else None
}

object Secrets {
  private val random = new SecureRandom()
  def bytes(n: Int): Array[Byte] = { val b = new Array[Byte](n); random.nextBytes(b); b }
  /** Whether `hex` spells `expected`, in a time that tells nothing about where they differ. */
  def matches(hex: String, expected: Array[Byte]): Boolean = Hex.decode(hex.trim).exists(MessageDigest.isEqual(_, expected))
}

/** One question and its answer. */
object Exchange {
  /** The first line of the stream that `ask` gives, of at most 4096 bytes. `connection` is closed then, and after `seconds`
    * in any case: slow bytes do not stretch them. */
  def apply(connection: Closeable, seconds: Int = 30)(ask: => InputStream): String = {
    @volatile var late = false
    val timer = new Timer("deadline", true)
    timer.schedule(new TimerTask { def run(): Unit = { late = true; connection.close() } }, seconds * 1000L)
    try {
      val in = ask
      new String(Iterator.continually(in.read()).takeWhile(b => b >= 0 && b != '\n').take(4096).map(_.toByte).toArray, UTF_8)
    } catch { case _: IOException if late => throw new IOException("no answer in time") }
    finally { timer.cancel(); connection.close() }
  }
}

/** The agent that has started this launcher, behind a Unix domain socket. Java has had those since version 16, hence the
  * reflection: this compiles with, and runs on, older ones. */
final class Agent(socket: String, token: String) {
  override def toString = "Agent(...)"

  /** The answer to a report; a `LaunchError` if the kernel is not wanted any more, an `IOException` if nobody answers. */
  def tell(report: ObjectNode): JsonNode = {
    val line = Json.mapper.writeValueAsBytes(report.put("token", token)) :+ '\n'.toByte
    val address = Class.forName(Agent.addresses).getMethod("of", classOf[String]).invoke(null, socket).asInstanceOf[SocketAddress]
    val channel = classOf[SocketChannel].getMethod("open", classOf[ProtocolFamily])
      .invoke(null, StandardProtocolFamily.valueOf("UNIX")).asInstanceOf[SocketChannel]
    val answer = Exchange(channel) {
      channel.connect(address)
      Channels.newOutputStream(channel).write(line)
      Channels.newInputStream(channel)
    }
    Json.parse(answer).getOrElse(throw new LaunchError("the agent of this host does not know this launch: it was given up meanwhile"))
  }
}

object Agent {
  private val addresses = "java.net.UnixDomainSocketAddress"
  /** Whether this JVM can talk to an agent. */
  def reachable: Boolean = Try(Class.forName(addresses)).isSuccess
}

/** The host application, reached over the network: its one-time public key, and a one-time secret that it shares with this
  * launch only. */
final class HostApplication(psk: Array[Byte], key: Array[Byte]) {
  override def toString = "HostApplication(...)"
  private def tag(text: String) = Hpke.bytes(text)

  /** The launch message around `fields` and the answer that proves its receipt by the host application. */
  def message(kernelId: String, fields: ObjectNode): (Array[Byte], Array[Byte]) = {
    val box = Hpke.seal(Hpke.publicKey(key), psk, tag(kernelId), tag("gateway_provisioners_ssh launch v2"), tag("2:" + kernelId),
      Json.mapper.writeValueAsBytes(fields))
    val b64 = Base64.getEncoder
    val out = Json.obj().put("version", 2).put("kernel_id", kernelId)
      .put("enc", b64.encodeToString(box.enc)).put("sealed", b64.encodeToString(box.ciphertext))
    (b64.encode(Json.mapper.writeValueAsBytes(out)), Hpke.hmac(psk, tag("ack"), box.enc))
  }

  /** Sends the launch message; a `LaunchError` unless the host application answers that it was waiting for just this. */
  def tell(address: InetSocketAddress, kernelId: String, fields: ObjectNode): Unit = {
    val (message, ack) = this.message(kernelId, fields)
    val socket = new Socket()
    val answer = try Exchange(socket) {
      socket.connect(address)
      socket.getOutputStream.write(message)
      socket.shutdownOutput()
      socket.getInputStream
    } catch {
      case e: IOException => throw new LaunchError(s"the host application cannot be reached at ${address.getAddress.getHostAddress} port " +
        s"${address.getPort} (${e.getMessage}): open that port in its direction, or let kernels be tunnelled (GP_ENABLE_TUNNELING=true)")
    }
    if (!Secrets.matches(answer, ack)) throw new LaunchError("the host application did not confirm this launch: it has given it up, or is another one")
  }
}

/** What this launch is handed, and nobody else, in one environment variable: who is to hear of it, and for a restart the
  * ports and key to take up again. */
final class Ticket private (json: JsonNode, val application: Option[HostApplication]) {
  override def toString = "Ticket(...)"
  private def text(field: String) = Option(json.path(field).asText(null)).filter(_.nonEmpty)

  val agent: Option[Agent] = for (socket <- text("socket"); token <- text("token")) yield new Agent(socket, token)
  /** Where the connection file goes, if that is not left to us. */
  val file: Option[Path] = text("file").map(Paths.get(_))
  val connection: Option[JsonNode] = Option(json.get("connection")).filter(_.isObject)
  val encrypt: Boolean = json.path("encrypt").asBoolean(false)
  /** Whether the host application hears of the kernel over the network although there is an agent. */
  val network: Boolean = json.path("network").asBoolean(false)
}

object Ticket {
  val variable = "KERNEL_LAUNCH_SECRET"

  def parse(text: String): Ticket = {
    def wrong(what: String) = throw new LaunchError(s"the host application sent $what in $variable: is its version the one this kernelspec was installed with?")
    val json = Try(new String(Base64.getDecoder.decode(text.trim), UTF_8)).toOption.flatMap(Json.parse).getOrElse(wrong("nothing that is a launch ticket"))
    if (json.path("version").asInt != 2) wrong("a launch ticket of another version")
    def bytes(field: String) = Try(Base64.getDecoder.decode(json.path(field).asText)).toOption.filter(_.length >= 32).getOrElse(wrong(s"a launch ticket without $field"))
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
      val ip = Try(InetAddress.getByName(Option(v6).getOrElse(v4))).getOrElse(throw new LaunchError(s"--response-address '$text': no such host", 2))
      new InetSocketAddress(ip, port.toInt)
    case _ => throw new LaunchError(s"--response-address '$text' is not IP:PORT", 2)
  }
}
