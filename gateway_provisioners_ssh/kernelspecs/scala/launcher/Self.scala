package launcher

import java.io.{File, OutputStream, RandomAccessFile}
import java.lang.management.ManagementFactory
import java.nio.charset.StandardCharsets.{ISO_8859_1, UTF_8}
import java.nio.file.{Files, Path, Paths}
import java.nio.file.attribute.PosixFilePermissions
import java.util.concurrent.atomic.AtomicBoolean
import scala.util.Try

/** Lines for the kernel's log. */
object Log {
  def write(text: String): Unit = System.err.println(s"[launcher ${Self.pid}] ${text.replaceAll("\\s+", " ")}")
}

/** The environment this process was started with. */
object Environment {
  /** Removes a variable and returns its value. Afterwards `System.getenv`, child processes and `/proc/PID/environ` do
    * not show it any more, where the JVM and the system allow that. */
  def take(name: String): Option[String] = {
    val value = Option(System.getenv(name)).filter(_.nonEmpty)
    if (value.isDefined) { Try(forget(name)); Try(blank(name)) }
    value
  }

  private def forget(name: String): Unit = {
    val field = Class.forName("java.lang.ProcessEnvironment").getDeclaredField("theEnvironment")
    field.setAccessible(true)
    field.get(null).asInstanceOf[java.util.Map[AnyRef, AnyRef]].keySet.removeIf(k => k.toString == name)
  }

  /** Overwrites the value where the system put it at exec. */
  private def blank(name: String): Unit = {
    val (start, end) = (Self.stat(47).toLong, Self.stat(48).toLong)
    val mem = new RandomAccessFile("/proc/self/mem", "rw")
    try {
      val block = new Array[Byte]((end - start).toInt)
      mem.seek(start)
      mem.readFully(block)
      val text = "\u0000" + new String(block, ISO_8859_1)
      val at = text.indexOf(s"\u0000$name=")
      if (at >= 0) {
        val from = at + name.length + 1
        mem.seek(start + from)
        mem.write(new Array[Byte](text.indexOf(0, from + 1) - 1 - from))
      }
    } finally mem.close()
  }
}

/** This process. */
object Self {
  private val line = Try(new String(Files.readAllBytes(Paths.get("/proc/self/stat")), ISO_8859_1)).getOrElse("")
  /** The fields of `/proc/self/stat` from the state on (proc(5)); empty where there is no /proc. */
  val stat: Array[String] = line.substring(line.lastIndexOf(')') + 1).trim.split(' ')
  val pid: Long = Try(line.takeWhile(_ != ' ').toLong).getOrElse(
    ManagementFactory.getRuntimeMXBean.getName.takeWhile(_ != '@').toLong)
  val pgid: Long = Try(stat(2).toLong).getOrElse(pid)

  private val failing = new AtomicBoolean()

  /** Logs the reason in one line and ends this process, within five seconds even if a shutdown hook hangs. Failures
    * that follow from the end are not logged. */
  def exit(reason: => String, status: Int = 1): Nothing = {
    if (failing.compareAndSet(false, true)) Log.write(reason)
    val halt = new Thread(() => { Thread.sleep(5000); Runtime.getRuntime.halt(status) })
    halt.setDaemon(true)
    halt.start()
    sys.exit(status)
  }
}

/** Files that must not outlive this process, however it ends. */
object TemporaryFiles {
  private val devNull = new File("/dev/null")
  private val all = new java.util.concurrent.CopyOnWriteArrayList[Path]()
  private val script = "while IFS= read -r p; do set -- \"$@\" \"$p\"; done; rm -rf -- \"$@\""
  private lazy val remover = Try(
    new ProcessBuilder("setsid", "sh", "-c", script, "sh").redirectOutput(devNull).redirectError(devNull).start())

  /** Has `path` removed when this process has ended, even if it was killed: by a shell in a session of its own, which
    * reads from a pipe that only this process holds open. Without `setsid` on the host, an orderly end removes it. */
  def remove(path: Path): Unit = synchronized {
    all.add(path.toAbsolutePath)
    def tell(pipe: OutputStream) = { pipe.write(s"$path\n".getBytes(UTF_8)); pipe.flush() }
    if (!path.toString.contains('\n') && remover.flatMap(r => Try(tell(r.getOutputStream))).isFailure)
      Runtime.getRuntime.addShutdownHook(new Thread(() => delete(path)))
  }

  /** All paths to remove, for the agent. */
  def paths: Seq[String] = all.toArray.toSeq.map(_.toString)

  /** Ends the shell, since the agent removes the files: one process less for each kernel. */
  def leaveToAgent(): Unit = remover.foreach(_.destroy())

  private def delete(path: Path): Unit = Try {
    val all = Files.walk(path)
    try all.sorted(java.util.Comparator.reverseOrder[Path]).forEach(p => { Files.deleteIfExists(p); () })
    finally all.close()
  }

  /** Has the directory removed that spark-submit made before this launcher began. It is among those that Spark would
    * delete at an orderly end. */
  def removeThoseOfSparkSubmit(): Unit = Try {
    val hooks = Class.forName("org.apache.spark.util.ShutdownHookManager")
    val deletes = hooks.getMethod("hasShutdownDeleteDir", classOf[File])
    Option(new File(sys.props("java.io.tmpdir")).listFiles((_, name) => name.startsWith("spark-"))).toList.flatten
      .filter(d => deletes.invoke(null, d) == true).foreach(d => remove(d.toPath))
  }

  /** Makes a directory for all temporary files of this JVM: Spark copies jars there and spills to it. */
  def makeDirectory(): Unit = {
    val configured = Option(System.getenv("TMPDIR")).map(Paths.get(_)).filter(Files.isWritable(_))
    val base = configured.getOrElse(Paths.get(sys.props("java.io.tmpdir")))
    val name = s"toree-${Self.pid}-${Hex.encode(Secrets.bytes(4))}"
    val dir = Files.createDirectory(base.resolve(name), Private.directory)
    remove(dir)
    sys.props("java.io.tmpdir") = dir.toString
  }
}

/** Modes of files that only this user may read. */
object Private {
  private def mode(text: String) = PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString(text))
  val directory = mode("rwx------")
  val file = mode("rw-------")
}
