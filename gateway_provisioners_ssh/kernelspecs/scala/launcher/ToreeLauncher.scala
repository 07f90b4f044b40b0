package launcher

import com.fasterxml.jackson.databind.JsonNode
import com.fasterxml.jackson.databind.node.ObjectNode
import java.net.{InetAddress, InetSocketAddress}
import java.nio.file.{Files, Path, Paths}
import java.util.concurrent.{CountDownLatch, Executors}
import java.util.concurrent.atomic.AtomicBoolean
import scala.util.Try

/** What the command line says. Every name is also understood as `--RemoteProcessProxy.NAME`, as kernelspecs of
  * Enterprise Gateway spell it, and as `--NAME=VALUE`; whatever is not ours goes to Toree. */
final case class Options(kernelId: String, response: InetSocketAddress, range: PortRange, mode: String, altSigint: Option[String], toree: List[String])

object Options {
  private val ours = Set("kernel-id", "response-address", "port-range", "public-key", "spark-context-initialization-mode",
    "kernel-class-name", "cluster-type", "alternate-sigint", "profile")
  private val name = """--(?:RemoteProcessProxy\.)?([a-z-]+)(?:=(.*))?""".r

  def parse(args: List[String]): Options = {
    def walk(rest: List[String], got: Map[String, String], toree: List[String]): (Map[String, String], List[String]) = rest match {
      case Nil => (got, toree.reverse)
      case "--" :: more => (got, toree.reverse ++ rest)
      case "--nosparkcontext" :: more => walk(more, got + ("spark-context-initialization-mode" -> "none"), toree)
      case name(key, null) :: value :: more if ours(key) => walk(more, got + (key -> value), toree)
      case name(key, value) :: more if ours(key) =>
        if (value == null) throw new LaunchError(s"--$key: a value is missing", 2) else walk(more, got + (key -> value), toree)
      case other :: more => walk(more, got, other :: toree)
    }
    val (got, toree) = walk(args, Map(), Nil)
    def need(key: String) = got.getOrElse(key, throw new LaunchError(s"--$key is missing from kernel.json's argv", 2))
    val mode = got.getOrElse("spark-context-initialization-mode", "lazy")
    if (!Set("lazy", "eager", "none")(mode)) throw new LaunchError(s"--spark-context-initialization-mode: lazy, eager or none, not '$mode'", 2)
    Options(need("kernel-id"), Address.parse(need("response-address")), PortRange.parse(got.getOrElse("port-range", "0..0")), mode,
      got.get("alternate-sigint"), toree)
  }
}

/** Starts Toree in this JVM for a host application elsewhere: reserves its ports, runs it, reports it once it listens,
  * and then does what the host application asks for. */
object ToreeLauncher {
  private val portNames = Seq("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")

  /** The connection info but for the ports, as Jupyter writes it. */
  private def connection(ip: InetAddress, before: Option[JsonNode]): ObjectNode = {
    val key = before.map(_.path("key").asText("")).filter(_.nonEmpty).getOrElse(Hex.encode(Secrets.bytes(32)))
    Json.obj().put("ip", ip.getHostAddress).put("transport", "tcp").put("signature_scheme", "hmac-sha256").put("key", key)
      .put("kernel_name", before.map(_.path("kernel_name").asText("")).getOrElse(""))
  }

  private def reserve(ip: InetAddress, range: PortRange, before: Option[JsonNode]): Map[String, Reservation] =
    portNames.map(name => name -> before.flatMap(b => Reservation.again(ip, b.path(name).asInt(0))).getOrElse(Reservation.fresh(ip, range))).toMap

  /** A new connection file where Jupyter on this host looks for them. Where the home is shared, `kernel-ID.json` is the host application's own. */
  private def connectionFile(kernelId: String): Path = {
    def env(n: String) = Option(System.getenv(n)).filter(_.nonEmpty)
    val data = env("JUPYTER_DATA_DIR").getOrElse(env("XDG_DATA_HOME").getOrElse(env("HOME").getOrElse(sys.props("user.home")) + "/.local/share") + "/jupyter")
    Paths.get(env("JUPYTER_RUNTIME_DIR").getOrElse(data + "/runtime")).resolve(s"kernel-${kernelId.replace('/', '_')}-${Hex.encode(Secrets.bytes(4))}.json").toAbsolutePath
  }

  /** Writes the connection file for this user only. Toree does not need it, so a full disk is not a reason to fail. */
  private def write(file: Path, json: ObjectNode): Unit = try {
    Files.createDirectories(file.getParent)
    Files.deleteIfExists(file)
    Files.createFile(file, Private.file)
    Files.write(file, Json.mapper.writeValueAsBytes(json))
  } catch { case e: Exception => Log.say(s"no connection file, the kernel runs without it: $e") }

  private val worker = Executors.newSingleThreadExecutor { r => val t = new Thread(r, "control-worker"); t.setDaemon(true); t }
  private def later(act: => Unit): Unit = worker.execute(() => Try(act))

  /** Interrupts the running cell, once the kernel is there: until then there is nothing to interrupt. */
  @volatile private var interruptCell: () => Unit = () => ()
  private val interrupting = new AtomicBoolean()
  private def interrupt(): Unit = if (interrupting.compareAndSet(false, true)) later { try interruptCell() finally interrupting.set(false) }

  /** Does what the host application asks, behind the reply. */
  private def request(json: JsonNode): JsonNode = {
    val signum = json.path("signum")
    if (json.path("shutdown").asInt == 1) later { Thread.sleep(50); Self.signal(15); Thread.sleep(5000); Self.signal(9) }
    else if (!signum.isInt || signum.asInt < 0 || signum.asInt > 64) return Json.obj().put("error", "neither a signum from 0 to 64 nor a shutdown")
    else if (signum.asInt == 2) interrupt()
    else if (signum.asInt > 0) later { Thread.sleep(50); Self.signal(signum.asInt) }
    Json.obj().put("alive", true)
  }

  /** Makes signals interrupt the running cell. A JVM started with one of them ignored goes on to ignore it. */
  private def onSignals(names: Seq[String]): Unit = names.foreach { name =>
    Try(sun.misc.Signal.handle(new sun.misc.Signal(name.stripPrefix("SIG")), _ => interrupt()))
      .failed.foreach(e => Log.say(s"no handler for signal $name: ${e.getMessage}"))
  }

  private def checkJvm(): Unit = {
    val version = sys.props("java.specification.version")
    val major = Try(version.stripPrefix("1.").toInt).getOrElse(17)
    if (major < 11) throw new LaunchError(s"Java $version is too old for the encrypted launch message: set JAVA_HOME to Java 11 or 17 on this host")
    if (major > 17 && sys.props.get("java.security.manager") != Some("allow") || major > 23)
      throw new LaunchError(s"Toree does not run on Java $version: set JAVA_HOME to Java 11 or 17 on this host")
  }

  private def launch(args: Array[String]): Unit = {
    val secret = Environment.take(Ticket.variable)
    checkJvm()
    val options = Options.parse(args.toList)
    val signals = "INT" +: options.altSigint.toSeq
    onSignals(signals)
    val ticket = Ticket.parse(secret.getOrElse(throw new LaunchError(
      s"${Ticket.variable} is not set: this launcher needs a host application that speaks version 2 of the launch message, such as gateway_provisioners_ssh")))
    if (ticket.encrypt || ticket.connection.exists(_.hasNonNull("curve_publickey"))) throw new LaunchError(
      "encrypted channels were asked for, and Toree cannot encrypt: set KernelManager.transport_encryption to 'disabled' or 'auto', or let kernels be tunnelled (GP_ENABLE_TUNNELING=true)")
    val ip = BindAddress.choose(options.response.getAddress, Option(System.getenv("SSH_CONNECTION")))
    val info = connection(ip, ticket.connection)
    val ports = reserve(ip, options.range, ticket.connection)
    ports.foreach { case (name, r) => info.put(name, r.port) }
    val requestsChannel = Reservation.listener(ip, options.range)
    if (!sys.props("os.name").startsWith("Linux")) ports.values.foreach(_.release())  // elsewhere two sockets cannot share a port
    val file = connectionFile(options.kernelId)
    Leftovers.ofSparkSubmit()
    Leftovers.temporaryDirectory()
    Leftovers.remove(file)
    write(file, info)
    val controlKey = Secrets.bytes(32)

    val ready = new CountDownLatch(if (options.mode == "eager") 1 else 0)  // a context that cannot be made is a failed launch
    def report(): Unit = {
      ready.await()
      while (!ports.values.forall(_.listening(ip))) Thread.sleep(10)
      ports.values.foreach(_.release())
      val fields = info.deepCopy().put("pid", Self.pid).put("pgid", Self.pgid).put("listener_pid", Self.pid).put("kernel_id", options.kernelId)
        .put("comm_port", requestsChannel.socket.getLocalPort).put("control_key", Hex.encode(controlKey))
      ticket.send(options.response, options.kernelId, fields)
      new Control(requestsChannel, controlKey, request).start()
    }
    val reporter = new Thread(() => try report() catch { case e: Throwable => Self.fail(Option(e.getMessage).getOrElse(e.toString)) }, "report")
    reporter.setDaemon(true)
    reporter.start()

    ToreeKernel.run(ToreeKernel.config(Json.mapper.writeValueAsString(info), options.toree, options.mode)) { act =>
      interruptCell = act
      ready.countDown()
      onSignals(signals)  // again, for Spark has put its own on top, which cancels jobs and leaves the cell
    }
  }

  def main(args: Array[String]): Unit =
    try { launch(args); sys.exit(0) } catch {
      case e: LaunchError => Self.fail(e.getMessage, e.status)
      case e: NoClassDefFoundError if e.getMessage != null && e.getMessage.contains("toree") =>
        Self.fail(s"Toree is not on the class path (${e.getMessage}): is toree-assembly-*.jar in the kernelspec's lib directory?")
      case e: Throwable => Self.fail { e.printStackTrace(); s"the kernel did not start: $e" }
    }
}
