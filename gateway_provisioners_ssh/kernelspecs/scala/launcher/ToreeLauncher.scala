package launcher

import com.fasterxml.jackson.databind.JsonNode
import com.fasterxml.jackson.databind.node.ObjectNode
import java.io.IOException
import java.net.{InetAddress, InetSocketAddress}
import java.nio.file.{Files, Path, Paths}
import java.util.concurrent.CountDownLatch
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

/** Starts Toree in this JVM for a host application elsewhere: reserves its ports, runs it, and reports it once it listens. */
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

  /** Where Jupyter on this host looks for connection files. The name is of this launch only: hosts may share a home, with
    * each other and with the host application, and a restarted kernel has the id of the one before. */
  private def connectionFile(kernelId: String): Path = {
    def env(n: String) = Option(System.getenv(n)).filter(_.nonEmpty)
    val data = env("JUPYTER_DATA_DIR").getOrElse(env("XDG_DATA_HOME").getOrElse(env("HOME").getOrElse(sys.props("user.home")) + "/.local/share") + "/jupyter")
    val dir = Paths.get(env("JUPYTER_RUNTIME_DIR").getOrElse(data + "/runtime"))
    Try(Files.createDirectories(dir))
    dir.resolve(s"kernel-${kernelId.replace('/', '_')}-${Self.pid}.json").toAbsolutePath
  }

  /** Writes the connection file for this user only. Toree does not need it, so a full disk is not a reason to fail. */
  private def write(file: Path, json: ObjectNode): Unit = try {
    Files.deleteIfExists(file)
    Files.createFile(file, Private.file)
    Files.write(file, Json.mapper.writeValueAsBytes(json))
  } catch { case e: Exception => Log.say(s"no connection file, the kernel runs without it: $e") }

  /** Interrupts the running cell, once the kernel is there: until then there is nothing to interrupt. */
  @volatile private var interruptCell: () => Unit = () => ()
  private val interrupting = new AtomicBoolean()
  private def interrupt(): Unit = if (interrupting.compareAndSet(false, true)) try { Try(interruptCell()); () } finally interrupting.set(false)

  /** Makes signals interrupt the running cell. A JVM started with one of them ignored goes on to ignore it. */
  private def onSignals(names: Seq[String]): Unit = names.foreach { name =>
    Try(sun.misc.Signal.handle(new sun.misc.Signal(name.stripPrefix("SIG")), _ => interrupt()))
      .failed.foreach(e => Log.say(s"no handler for signal $name: ${e.getMessage}"))
  }

  private def checkJvm(): Unit = {
    val version = sys.props("java.specification.version")
    val major = Try(version.stripPrefix("1.").toInt).getOrElse(17)
    if (major < 11) throw new LaunchError(s"Java $version can report a kernel neither to the agent of this host nor over the network: set JAVA_HOME to Java 17 on this host")
    if (major > 17 && sys.props.get("java.security.manager") != Some("allow") || major > 23)
      throw new LaunchError(s"Toree does not run on Java $version: set JAVA_HOME to Java 17 on this host")
  }

  private def checkTicket(ticket: Ticket): Unit = {
    if (ticket.encrypt || ticket.connection.exists(_.hasNonNull("curve_publickey"))) throw new LaunchError(
      "encrypted channels were asked for, and Toree cannot encrypt: set KernelManager.transport_encryption to 'disabled' or 'auto', or let kernels be tunnelled (GP_ENABLE_TUNNELING=true)")
    if (ticket.application.isEmpty && !Agent.reachable) throw new LaunchError(
      s"Java ${sys.props("java.specification.version")} cannot reach the agent of this host, which takes Java 16 or newer: set JAVA_HOME to Java 17 on this host")
  }

  /** Tells the agent that the kernel listens; and the host application over the network if it wants that, or if the agent
    * cannot be reached. */
  private def report(ticket: Ticket, options: Options, fields: ObjectNode): Unit = {
    val told = Json.obj().put("ip", fields.path("ip").asText).put("pgid", Self.pgid)
    if (!ticket.network) told.putPOJO("fields", fields)
    val remove = told.putArray("remove")
    Leftovers.paths.foreach(remove.add(_))
    val answer = ticket.agent.filter(_ => Agent.reachable).flatMap { agent =>
      try Some(agent.tell(told)) catch { case e: IOException =>
        val why = s"the agent of this host does not answer (${e.getMessage})"
        if (ticket.application.isEmpty) throw new LaunchError(s"$why: start the kernel again")
        Log.say(s"$why, so the kernel is reported over the network")
        None
      }
    }
    answer.foreach { said =>
      Leftovers.handOver()
      if (said.has("comm_port")) fields.put("comm_port", said.path("comm_port").asInt).put("control_key", said.path("control_key").asText)
    }
    if (ticket.network || answer.isEmpty) ticket.application.foreach(_.tell(options.response, options.kernelId, fields))
  }

  private def launch(args: Array[String]): Unit = {
    val secret = Environment.take(Ticket.variable)
    checkJvm()
    val options = Options.parse(args.toList)
    val signals = "INT" +: options.altSigint.toSeq
    onSignals(signals)
    val ticket = Ticket.parse(secret.getOrElse(throw new LaunchError(
      s"${Ticket.variable} is not set: this launcher needs a host application that speaks version 2 of the launch message, such as gateway_provisioners_ssh")))
    checkTicket(ticket)
    val ip = BindAddress.choose(options.response.getAddress, Option(System.getenv("SSH_CONNECTION")))
    val info = connection(ip, ticket.connection)
    val ports = reserve(ip, options.range, ticket.connection)
    ports.foreach { case (name, r) => info.put(name, r.port) }
    if (!sys.props("os.name").startsWith("Linux")) ports.values.foreach(_.release())  // elsewhere two sockets cannot share a port
    Leftovers.ofSparkSubmit()
    Leftovers.temporaryDirectory()
    val file = ticket.file.getOrElse(connectionFile(options.kernelId))
    if (ticket.file.isEmpty) Leftovers.remove(file)
    write(file, info)

    val ready = new CountDownLatch(if (options.mode == "eager") 1 else 0)  // a context that cannot be made is a failed launch
    def reportOnceReady(): Unit = {
      ready.await()
      while (!ports.values.forall(_.listening(ip))) Thread.sleep(10)
      ports.values.foreach(_.release())
      report(ticket, options, info.deepCopy().put("kernel_id", options.kernelId).put("pid", Self.pid).put("pgid", Self.pgid))
    }
    val reporter = new Thread(() => try reportOnceReady() catch { case e: Throwable => Self.fail(Option(e.getMessage).getOrElse(e.toString)) }, "report")
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
