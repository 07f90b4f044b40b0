package launcher

import org.apache.spark.SparkConf
import org.apache.spark.sql.SparkSession
import org.apache.toree.kernel.api.KernelLike
import scala.concurrent.{Await, Future, Promise, TimeoutException}
import scala.concurrent.duration._
import scala.util.Try

/** The Spark session of this kernel: made once, at its first use, on a thread of its own. */
object Spark {
  private var attempt: Future[SparkSession] = _

  /** The session if it is there and alive; never makes one. */
  def current: Option[SparkSession] = SparkSession.getDefaultSession.filterNot(_.sparkContext.isStopped)

  /** The session that is being made; begins unless that has been done. */
  def begin(): Future[SparkSession] = synchronized {
    val stopped = attempt != null && attempt.value.exists(_.toOption.exists(_.sparkContext.isStopped))
    if (attempt == null || stopped) {
      val made = Promise[SparkSession]()
      attempt = made.future
      def complete() = try made.success(make()) catch { case e: Throwable => made.failure(e) }
      val thread = new Thread(() => complete(), "spark-start")
      thread.setDaemon(true)
      thread.start()
    }
    attempt
  }

  private def make(): SparkSession = {
    val conf = new SparkConf().setIfMissing("spark.submit.deployMode", "client")
    val session = SparkSession.builder.config(conf).getOrCreate()
    val sc = session.sparkContext
    // a standalone master that does not answer ends the context in the background, just after it was made
    if (sc.master.startsWith("spark://")) Thread.sleep(500)
    if (sc.isStopped) throw new IllegalStateException(
      s"Spark stopped as soon as it was started: is ${sc.master} reachable from this host? " +
      "The kernel's log has the reason")
    session
  }

  /** Waits for the session that a cell uses. If it could not be made, the reason is thrown in that cell only, and the
    * next cell that uses it tries again. */
  def session(kernel: KernelLike): SparkSession = {
    val pending = begin()
    try {
      if (Try(Await.ready(pending, 2.seconds)).failed.toOption.exists(_.isInstanceOf[TimeoutException]))
        Try(kernel.display.content("text/plain", "Waiting for the Spark context to start ..."))
      Await.ready(pending, Duration.Inf)
    } finally if (pending.value.exists(_.isFailure)) synchronized { if (attempt eq pending) attempt = null }
    markThread(pending.value.get.get)
  }

  /** Has the tasks of a cancelled job of this thread interrupted, so that one that sleeps does not keep its slot. */
  private def markThread(session: SparkSession): SparkSession = {
    val (sc, property) = (session.sparkContext, "spark.job.interruptOnCancel")
    if (sc.getLocalProperty(property) == null) sc.setLocalProperty(property, "true")
    session
  }
  def markThread(): Unit = current.foreach(markThread)

  /** Cancels all jobs of this kernel; returns whether there were any. The context stays usable. */
  def cancelJobs(): Boolean = current.exists { s =>
    val busy = s.sparkContext.statusTracker.getActiveJobIds().nonEmpty
    s.sparkContext.cancelAllJobs()
    busy
  }
}
