package launcher

import com.typesafe.config.{Config, ConfigFactory, ConfigValueFactory}
import java.io.{File, OutputStream}
import java.lang.reflect.Modifier
import java.net.URLClassLoader
import java.nio.file.Paths
import java.util.concurrent.ConcurrentHashMap
import java.util.jar.JarFile
import org.apache.toree.boot.{CommandLineOptions, KernelBootstrap}
import org.apache.toree.boot.layer._
import org.apache.toree.interpreter.{ExecuteError, Interpreter, Results}
import org.apache.toree.kernel.api.Kernel
import org.apache.toree.kernel.interpreter.scala.ScalaInterpreter
import org.apache.toree.kernel.protocol.v5.MessageType
import org.apache.toree.kernel.protocol.v5.kernel.ActorLoader
import org.apache.toree.plugins.{Plugin, PluginManager}
import org.apache.toree.utils.{FileUtils, TaskManager}
import org.slf4j.Logger
import org.slf4j.helpers.NOPLogger
import scala.concurrent.{Await, ExecutionException, Future, Promise}
import scala.concurrent.duration._
import scala.util.Try
import scala.util.control.NonFatal

/** Toree, put together from its own layers with other hooks.
  *
  * Toree's bootstrap logs the connection profile, key included, hence a logger that writes nothing; and its hooks
  * end the kernel at a second SIGINT within three seconds, which is not what a second click on "interrupt" means in
  * Jupyter. */
final class ToreeKernel(config: Config, ready: (() => Unit) => Unit) extends KernelBootstrap(config)
    with StandardBareInitialization with StandardComponentInitialization
    with StandardHandlerInitialization with StandardHookInitialization {
  override val logger: Logger = NOPLogger.NOP_LOGGER

  override protected def createActorSystem(name: String) = InOrder.during(super.createActorSystem(name))

  override def initializeComponents(config: Config, actorLoader: ActorLoader) = {
    val made = super.initializeComponents(config, actorLoader)
    Magics.load(made._8)
    made
  }

  /** In eager mode, makes the context before the kernel; a failure is the kernel's. */
  override def initializeSparkContext(config: Config, kernel: Kernel): Any =
    if (config.getString("spark_context_initialization_mode") == "eager") Await.result(Spark.begin(), Duration.Inf)

  override def initializeHooks(config: Config, interpreter: Interpreter): Unit = ready(() => interpreter.interrupt())
}

object ToreeKernel {
  private val stock = "org.apache.toree.kernel.interpreter.scala.ScalaInterpreter"

  /** Toree's configuration: the connection, then Toree's own options, then its defaults; with `CellInterpreter` in
    * place of the stock Scala interpreter. */
  def config(connection: String, args: List[String], mode: String): Config = {
    val base = ConfigFactory.parseString(connection).withFallback(new CommandLineOptions(args).toConfig)
    val key = "default_interpreter_plugin"
    val plugins = new java.util.ArrayList[String](base.getStringList(key))
    plugins.replaceAll(p => if (p.endsWith(":" + stock)) p.stripSuffix(stock) + classOf[CellInterpreter].getName else p)
    base.withValue(key, ConfigValueFactory.fromIterable(plugins))
      .withValue("spark_context_initialization_mode", ConfigValueFactory.fromAnyRef(mode))
  }

  /** Runs a kernel until it is shut down. `ready` is called with a function that interrupts the running cell. */
  def run(config: Config)(ready: (() => Unit) => Unit): Unit = {
    TemporaryFiles.remove(FileUtils.createManagedTempDirectory("launcher").getParentFile.toPath)
    Magics.silenceSearch()
    new ToreeKernel(config, ready).initialize().waitForTermination().shutdown()
  }
}

/** Has the actors that pass messages on to the sockets run in one thread. Toree has one such actor for each type of
  * message, and one may overtake another: on a busy machine the result of a cell, or its error, came after the status
  * "idle", after which a client expects nothing more. The threads of an actor system are set by its configuration. */
object InOrder {
  private val dispatcher = Map("type" -> "Dispatcher", "executor" -> "thread-pool-executor",
    "thread-pool-executor.fixed-pool-size" -> "1", "throughput" -> "1000000").map { case (k, v) => s"in-order.$k" -> v }
  private def deployment = for {
    library <- Seq("akka", "pekko")
    message <- MessageType.values.toList.map(_.toString)
    if !message.endsWith("_request") && !message.startsWith("incoming")
  } yield s"$library.actor.deployment./$message.dispatcher" -> "in-order"

  /** Calls `make` while this configuration is in effect. */
  def during[T](make: => T): T = {
    val properties = deployment ++ dispatcher
    properties.foreach { case (k, v) => sys.props(k) = v }
    ConfigFactory.invalidateCaches()
    try make finally properties.foreach { case (k, _) => sys.props -= k }
  }
}

/** Toree's own magics. Toree finds them by reading every class of its jar, which takes seconds and which Java 17
  * forbids (then there are none, and a stack trace in the log). Their packages are known, so they are loaded from
  * there. */
object Magics {
  private val pattern = "org/apache/toree/(?:magic/builtin|utils)/[^$/]+[.]class"
  private val searcher = "org.apache.toree.plugins.PluginSearcher"

  def load(manager: PluginManager): Unit = {
    val classes = names().map(n => Class.forName(n, false, classOf[Plugin].getClassLoader))
      .filter(c => classOf[Plugin].isAssignableFrom(c) && !Modifier.isAbstract(c.getModifiers))
      .filterNot(c => manager.isActive(c.getName))
    manager.initializePlugins(classes.flatMap(c => manager.loadPlugin(c.getName, c).toOption))
    ()
  }

  private def names(): List[String] = {
    val jar = new JarFile(new File(classOf[Plugin].getProtectionDomain.getCodeSource.getLocation.toURI))
    val files = try jar.stream.toArray.toList.map(_.toString) finally jar.close()
    files.filter(_.matches(pattern)).map(_.stripSuffix(".class").replace('/', '.'))
  }

  /** Has Toree's search not log its failure (log4j 2, which Spark has from 3.3 on). */
  def silenceSearch(): Unit = Try {
    val level = Class.forName("org.apache.logging.log4j.Level")
    Class.forName("org.apache.logging.log4j.core.config.Configurator").getMethod("setLevel", classOf[String], level)
      .invoke(null, searcher, level.getField("OFF").get(null))
  }
}

/** Toree's Scala interpreter, with cells that can be interrupted and a Spark context that is made in the background. */
class CellInterpreter(config: Config) extends ScalaInterpreter(config) {
  private lazy val cells = new Cells(Try(config.getInt("max_interpreter_threads")).getOrElse(4))
  private val mode = config.getString("spark_context_initialization_mode")

  override def newTaskManager(): TaskManager = cells

  /** The compiler's class path, made of paths: Toree makes it of URLs, in which a blank is %20. */
  override def buildClasspath(classLoader: ClassLoader): String =
    Iterator.iterate(classLoader)(_.getParent).takeWhile(_ != null)
      .collect { case l: URLClassLoader => l.getURLs.toList }.flatten
      .map(url => Try(Paths.get(url.toURI).toString).getOrElse(url.getPath)).mkString(File.pathSeparator)

  override def interrupt(): Interpreter = {
    cells.interrupt()
    this
  }

  /** A cell always has a reply: an error around it, such as an interrupt in the compiler, is the cell's error. */
  override def interpret(code: String, silent: Boolean, output: Option[OutputStream]) =
    try super.interpret(code, silent, output)
    catch { case NonFatal(e) =>
      (Results.Error, Right(ExecuteError(e.getClass.getName, Option(e.getMessage).getOrElse(""), Nil)))
    }

  /** The error for the user: "interrupted" in place of the JVM's `ThreadDeath`; and an empty text where an exception
    * has none, since the protocol requires one. */
  override def interpretConstructExecuteError(output: String): ExecuteError = {
    val error = super.interpretConstructExecuteError(output)
    lastResultOut.reset()  // it holds "lastException = null", from Toree's own housekeeping
    val interrupted = "java.lang.InterruptedException"
    if (output.contains("java.lang.ThreadDeath") || error.name == interrupted)
      ExecuteError(interrupted, "the cell was interrupted", Nil)
    else if (error.value == null) error.copy(value = "")
    else error
  }

  /** `spark` is a value, so that `import spark.implicits._` works; `sc` is that of the current session. */
  override def bindSparkSession(): Unit = if (mode != "none") doQuietly { interpret(
    """@transient lazy val spark: org.apache.spark.sql.SparkSession = launcher.Spark.session(kernel)
      |def sc: org.apache.spark.SparkContext = launcher.Spark.session(kernel).sparkContext""".stripMargin) }
  override def bindSparkContext(): Unit = ()
  override def defineImplicits(): Unit = if (mode != "none") super.defineImplicits()

  override def postInit(): Unit = if (mode == "lazy") Spark.begin()
}

/** Runs cells and keeps track of their threads, so that an interrupt ends the cell itself.
  *
  * Toree's own task manager gives up a cell that does not end within a tenth of a second: its thread runs on for ever
  * and its reply never comes, so the kernel stays busy. Here an interrupt has these steps: wait for the compiler to
  * finish, which an interrupt would break; cancel the cell's Spark jobs and wait for the cell to notice;
  * `Thread.interrupt`, for what waits or sleeps; 0.3 seconds later `Thread.stop`, for loops; and on a JVM without that
  * (from Java 20 on), the cell is declared aborted and the next one gets a new thread.
  *
  * A query is planned for seconds before it has a job. So jobs are cancelled until the cell has ended, and once more
  * then. */
final class Cells(workers: Int) extends TaskManager(maximumWorkers = workers) {
  private final class Cell {
    @volatile var thread: Thread = _
    @volatile var interrupted = false
    val ended = Promise[Any]()
  }
  private val running = ConcurrentHashMap.newKeySet[Cell]()

  override def add[T](taskFunction: => T): Future[T] = {
    val cell = new Cell
    def enter() = cell.synchronized { cell.thread = Thread.currentThread; running.add(cell); () }
    def leave() = {
      cell.synchronized { running.remove(cell); cell.thread = null; Thread.interrupted() }
      if (cell.interrupted) Spark.cancelJobs()
      ()
    }
    val result = super.add { enter(); try { Spark.markThread(); taskFunction } finally leave() }
    result.onComplete(cell.ended.tryComplete)(scala.concurrent.ExecutionContext.global)
    cell.ended.future.asInstanceOf[Future[T]]
  }

  /** Calls `act` with the cell's thread, only while it runs the cell: threads are reused. */
  private def onThread(cell: Cell)(act: Thread => Any): Unit =
    cell.synchronized { if (cell.thread != null) Try(act(cell.thread)) }

  /** Cancels Spark's jobs while the cell runs, so that none of the next cell is; returns whether there were any. */
  private def cancel(cell: Cell): Boolean = { var busy = false; onThread(cell)(_ => busy = Spark.cancelJobs()); busy }

  private def frames(cell: Cell): Array[StackTraceElement] =
    Option(cell.thread).map(_.getStackTrace).getOrElse(Array.empty)

  /** Stops the cell's thread if that is safe where it is; returns whether it did. The thread is suspended while its
    * stack is examined. It may hold a class loader's lock, so no class may be loaded meanwhile: hence the first
    * call. */
  private def stop(cell: Cell): Boolean = Cells.stoppable(frames(cell)) && {
    var done = false
    onThread(cell) { thread =>
      def call(method: String) = Try(classOf[Thread].getMethod(method).invoke(thread))
      call("suspend")
      try { done = Cells.stoppable(thread.getStackTrace); if (done) call("stop") } finally call("resume")
    }
    done
  }

  private def waitFor(time: Duration, every: Duration = 5.millis)(done: => Boolean): Unit = {
    val end = System.nanoTime + time.toNanos
    while (!done && System.nanoTime < end) Thread.sleep(every.toMillis)
  }

  def interrupt(grace: Duration = 300.millis, timeout: Duration = 1.minute): Unit = {
    val cells = running.toArray(Array.empty[Cell])
    cells.foreach(_.interrupted = true)
    def left = cells.filter(_.thread != null)
    waitFor(timeout)(!left.exists(c => Cells.compiling(frames(c))))
    waitFor(if (left.exists(cancel)) 200.millis else 0.millis)(left.isEmpty)
    left.foreach(onThread(_)(_.interrupt()))
    waitFor(grace)(left.isEmpty)
    waitFor(timeout, every = 50.millis)(left.forall { c => cancel(c); stop(c) })
    waitFor(grace)(left.isEmpty)
    if (left.nonEmpty) {
      left.foreach { c => running.remove(c); c.ended.tryFailure(new ExecutionException("interrupted", null)) }
      restart()
    }
  }
}

/** Where a thread is, by its stack, the innermost frame first. */
object Cells {
  private def ofCompiler(name: String) = name.startsWith("scala.tools.") || name.startsWith("scala.reflect.")
  private def ofLibrary(name: String) =
    Seq("java.", "jdk.", "sun.", "scala.").exists(o => name.startsWith(o)) && !ofCompiler(name)

  def compiling(stack: Array[StackTraceElement]): Boolean = {
    var i = 0
    while (i < stack.length && ofLibrary(stack(i).getClassName)) i += 1
    i < stack.length && ofCompiler(stack(i).getClassName)
  }

  /** Whether the thread is in a cell's code or in what that has called, and not in Spark, the compiler, or the
    * loading or initialization of a class: what is stopped there stays broken for all cells that follow. */
  def stoppable(stack: Array[StackTraceElement]): Boolean = {
    var i = 0
    while (i < stack.length && !stack(i).getClassName.startsWith("$line")) {
      val name = stack(i).getClassName
      if (stack(i).getMethodName == "<clinit>" || name.startsWith("org.apache.spark.") || ofCompiler(name) ||
        name.startsWith("java.lang.invoke.") || name.startsWith("java.lang.ClassLoader")) return false
      i += 1
    }
    i < stack.length
  }
}
