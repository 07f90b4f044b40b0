package launcher

import com.fasterxml.jackson.databind.JsonNode
import com.fasterxml.jackson.databind.node.ObjectNode
import java.io.IOException
import java.net.{InetAddress, InetSocketAddress}
import java.nio.file.{Files, Path, Paths}
import java.util.concurrent.CountDownLatch
import java.util.concurrent.atomic.AtomicBoolean
import scala.util.Try
import scala.util.matching.Regex

/** The command line. Every option is also understood as `--RemoteProcessProxy.NAME`, as kernelspecs of Enterprise
  * Gateway spell it, and as `--NAME=VALUE`; all other arguments are Toree's. */
final case class Options(kernelId: String, response: InetSocketAddress, range: PortRange, mode: String,
                         altSigint: Option[String], toree: List[String])

object Options {
  private val known = Protocol.options ++
    Set(Protocol.sparkOption, "kernel-class-name", "cluster-type", "alternate-sigint", "profile")
  private val name = s"--(?:${Regex.quote(Protocol.optionPrefix)})?([a-z-]+)(?:=(.*))?".r

  def parse(args: List[String]): Options = {
    type Values = Map[String, String]
    def walk(rest: List[String], values: Values, toree: List[String]): (Values, List[String]) = rest match {
      case Nil => (values, toree.reverse)
      case "--" :: more => (values, toree.reverse ++ rest)
      case "--nosparkcontext" :: more => walk(more, values + (Protocol.sparkOption -> "none"), toree)
      case name(key, null) :: value :: more if known(key) => walk(more, values + (key -> value), toree)
      case name(key, null) :: _ if known(key) => throw new LaunchError(s"--$key: a value is missing", 2)
      case name(key, value) :: more if known(key) => walk(more, values + (key -> value), toree)
      case other :: more => walk(more, values, other :: toree)
    }
    val (values, toree) = walk(args, Map(), Nil)
    def need(key: String) =
      values.getOrElse(key, throw new LaunchError(s"--$key is missing from kernel.json's argv", 2))
    val mode = values.getOrElse(Protocol.sparkOption, "lazy")
    if (!Protocol.sparkModes(mode))
      throw new LaunchError(s"--${Protocol.sparkOption}: lazy, eager or none, not '$mode'", 2)
    Options(need("kernel-id"), Address.parse(need("response-address")),
      PortRange.parse(values.getOrElse("port-range", "0..0")), mode, values.get("alternate-sigint"), toree)
  }
}

/** Starts Toree in this JVM for a remote host application: reserves its ports, runs it, and reports it once it
  * listens. */
object ToreeLauncher {
  /** The connection file's fields without the ports. */
  private def connection(ip: InetAddress, before: Option[JsonNode]): ObjectNode = {
    val key = before.map(_.path("key").asText("")).filter(_.nonEmpty).getOrElse(Hex.encode(Secrets.bytes(32)))
    val name = before.map(_.path("kernel_name").asText("")).getOrElse("")
    Json.obj().put("ip", ip.getHostAddress).put("transport", "tcp").put("signature_scheme", "hmac-sha256")
      .put("key", key).put("kernel_name", name)
  }

  private def reserve(ip: InetAddress, range: PortRange, before: Option[JsonNode]): Map[String, Reservation] =
    Protocol.portNames.map { name =>
      val former = before.flatMap(b => Reservation.former(ip, b.path(name).asInt(0)))
      name -> former.getOrElse(Reservation.fresh(ip, range))
    }.toMap

  /** A path where Jupyter on this host looks for connection files. The name has this process' id: hosts may share a
    * home with each other and with the host application, and a restarted kernel keeps its kernel id. */
  private def connectionFile(kernelId: String): Path = {
    def env(n: String) = Option(System.getenv(n)).filter(_.nonEmpty)
    def home = env("HOME").getOrElse(sys.props("user.home"))
    val data = env("JUPYTER_DATA_DIR").getOrElse(env("XDG_DATA_HOME").getOrElse(s"$home/.local/share") + "/jupyter")
    val dir = Paths.get(env("JUPYTER_RUNTIME_DIR").getOrElse(data + "/runtime"))
    Try(Files.createDirectories(dir))
    dir.resolve(s"kernel-${kernelId.replace('/', '_')}-${Self.pid}.json").toAbsolutePath
  }

  /** Writes the connection file, readable by this user only. Toree does not need it, so a full disk is no failure. */
  private def write(file: Path, json: ObjectNode): Unit = try {
    Files.deleteIfExists(file)
    Files.createFile(file, Private.file)
    Files.write(file, Json.mapper.writeValueAsBytes(json))
  } catch { case e: Exception => Log.write(s"no connection file, the kernel runs without it: $e") }

  /** Interrupts the running cell; does nothing until the kernel is ready. */
  @volatile private var interruptCell: () => Unit = () => ()
  private val interrupting = new AtomicBoolean()
  private def interrupt(): Unit =
    if (interrupting.compareAndSet(false, true)) try { Try(interruptCell()); () } finally interrupting.set(false)

  /** Has signals interrupt the running cell. A JVM that was started with one of them ignored keeps ignoring it. */
  private def onSignals(names: Seq[String]): Unit = names.foreach { name =>
    Try(sun.misc.Signal.handle(new sun.misc.Signal(name.stripPrefix("SIG")), _ => interrupt()))
      .failed.foreach(e => Log.write(s"no handler for signal $name: ${e.getMessage}"))
  }

  private def checkJvm(): Unit = {
    val version = sys.props("java.specification.version")
    val major = Try(version.stripPrefix("1.").toInt).getOrElse(17)
    if (major < 11) throw new LaunchError(
      s"Java $version can report a kernel neither to the agent of this host nor over the network: " +
      "set JAVA_HOME to Java 17 on this host")
    if (major > 17 && sys.props.get("java.security.manager") != Some("allow") || major > 23)
      throw new LaunchError(s"Toree does not run on Java $version: set JAVA_HOME to Java 17 on this host")
  }

  private def checkTicket(ticket: Ticket): Unit = {
    val keys = ticket.connection.exists(c => Protocol.curveFields.exists(c.hasNonNull(_)))
    if (ticket.encrypt || keys) throw new LaunchError(
      "encrypted channels were asked for, and Toree cannot encrypt: set KernelManager.transport_encryption to " +
      "'disabled' or 'auto', or let kernels be tunnelled (GP_ENABLE_TUNNELING=true)")
    if (ticket.application.isEmpty && !Agent.supported) throw new LaunchError(
      s"Java ${sys.props("java.specification.version")} cannot reach the agent of this host, which takes Java 16 or " +
      "newer: set JAVA_HOME to Java 17 on this host")
  }

  /** Reports to the agent that the kernel listens; and to the host application over the network if the ticket says
    * so, or if the agent cannot be reached. */
  private def report(ticket: Ticket, options: Options, fields: ObjectNode): Unit = {
    val message = Json.obj().put("ip", fields.path("ip").asText).put("pgid", Self.pgid)
    if (!ticket.network) message.putPOJO("fields", fields)
    val remove = message.putArray("remove")
    TemporaryFiles.paths.foreach(remove.add(_))
    val answer = ticket.agent.filter(_ => Agent.supported).flatMap { agent =>
      try Some(agent.tell(message)) catch { case e: IOException =>
        val why = s"the agent of this host does not answer (${e.getMessage})"
        if (ticket.application.isEmpty) throw new LaunchError(s"$why: start the kernel again")
        Log.write(s"$why, so the kernel is reported over the network")
        None
      }
    }
    answer.foreach { reply =>
      TemporaryFiles.leaveToAgent()
      Protocol.controlFields.filter(reply.has(_)).foreach(name => fields.replace(name, reply.get(name)))
    }
    if (ticket.network || answer.isEmpty) ticket.application.foreach(_.tell(options.response, options.kernelId, fields))
  }

  private def launch(args: Array[String]): Unit = {
    val secret = Environment.take(Protocol.ticketVariable)
    checkJvm()
    val options = Options.parse(args.toList)
    val signals = "INT" +: options.altSigint.toSeq
    onSignals(signals)
    val ticket = Ticket.parse(secret.getOrElse(throw new LaunchError(
      s"${Protocol.ticketVariable} is not set: this launcher needs a host application that speaks version " +
      s"${Protocol.version} of the launch message, such as gateway_provisioners_ssh")))
    checkTicket(ticket)
    val ip = BindAddress.choose(options.response.getAddress, Option(System.getenv("SSH_CONNECTION")))
    val info = connection(ip, ticket.connection)
    val ports = reserve(ip, options.range, ticket.connection)
    ports.foreach { case (name, r) => info.put(name, r.port) }
    // only on Linux can two sockets share a port
    if (!sys.props("os.name").startsWith("Linux")) ports.values.foreach(_.release())
    TemporaryFiles.removeThoseOfSparkSubmit()
    TemporaryFiles.makeDirectory()
    val file = ticket.file.getOrElse(connectionFile(options.kernelId))
    if (ticket.file.isEmpty) TemporaryFiles.remove(file)
    write(file, info)

    val ready = new CountDownLatch(if (options.mode == "eager") 1 else 0)  // without its context the launch fails
    def reportOnceReady(): Unit = {
      ready.await()
      while (!ports.values.forall(_.listening(ip))) Thread.sleep(10)
      ports.values.foreach(_.release())
      val process = info.deepCopy().put("kernel_id", options.kernelId).put("pid", Self.pid).put("pgid", Self.pgid)
      report(ticket, options, process)
    }
    val reporter = new Thread(() => try reportOnceReady() catch {
      case e: Throwable => Self.exit(Option(e.getMessage).getOrElse(e.toString))
    }, "report")
    reporter.setDaemon(true)
    reporter.start()

    ToreeKernel.run(ToreeKernel.config(Json.mapper.writeValueAsString(info), options.toree, options.mode)) { act =>
      interruptCell = act
      ready.countDown()
      onSignals(signals)  // again: Spark has replaced them by its own handler, which only cancels jobs
    }
  }

  def main(args: Array[String]): Unit =
    try { launch(args); sys.exit(0) } catch {
      case e: LaunchError => Self.exit(e.getMessage, e.status)
      case e: NoClassDefFoundError if e.getMessage != null && e.getMessage.contains("toree") =>
        Self.exit(s"Toree is not on the class path (${e.getMessage}): " +
          "is toree-assembly-*.jar in the kernelspec's lib directory?")
      case e: Throwable => Self.exit { e.printStackTrace(); s"the kernel did not start: $e" }
    }
}
