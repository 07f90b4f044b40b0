package launcher

import java.io.IOException
import java.net.{DatagramSocket, InetAddress, InetSocketAddress, StandardSocketOptions}
import java.nio.channels.{NetworkChannel, SocketChannel}
import java.util.concurrent.ThreadLocalRandom
import scala.util.Try

/** `LOWER..UPPER` as given by `--port-range`; equal bounds mean any port. */
final case class PortRange(lower: Int, upper: Int) {
  /** The ports to try: each once, from a random one on; 0, which is any, without a range. */
  def candidates: Iterator[Int] =
    if (lower == upper) Iterator(0)
    else {
      val n = upper - lower + 1
      val start = ThreadLocalRandom.current.nextInt(n)
      (0 until n).iterator.map(i => lower + (start + i) % n)
    }
}

object PortRange {
  private val form = """(\d{1,5})\.\.(\d{1,5})""".r
  def parse(text: String): PortRange = text match {
    case form(a, b) if a.toInt <= b.toInt && b.toInt <= 65535 => PortRange(a.toInt, b.toInt)
    case _ => throw new LaunchError(s"--port-range '$text' is not LOWER..UPPER with 0 <= LOWER <= UPPER <= 65535", 2)
  }
}

/** A port that is reserved until Toree listens on it.
  *
  * The socket is bound but never listens. It is bound without SO_REUSEADDR, so the port was free; then SO_REUSEADDR is
  * set, and the port can be bound again only by sockets that have it too. ZeroMQ's listener does; the reservations of
  * other launchers, when they bind, do not. So no other launcher on this host can take the port in between. */
final class Reservation private (channel: SocketChannel, val port: Int) {
  /** Whether a socket listens on the port: then, and only then, another cannot be bound to it. Nothing is sent. */
  def listening(ip: InetAddress): Boolean = {
    val probe = SocketChannel.open()
    try { Reservation.reusable(probe, true); probe.bind(new InetSocketAddress(ip, port)); false }
    catch { case _: IOException => true } finally probe.close()
  }
  def release(): Unit = { Try(channel.close()); () }
}

object Reservation {
  private def reusable(channel: NetworkChannel, yes: Boolean): Unit = {
    channel.setOption[java.lang.Boolean](StandardSocketOptions.SO_REUSEADDR, yes); ()
  }

  private def bind(ip: InetAddress, port: Int, exclusive: Boolean): Option[Reservation] = {
    val channel = SocketChannel.open()
    try {
      reusable(channel, !exclusive)
      channel.bind(new InetSocketAddress(ip, port))
      reusable(channel, true)
      Some(new Reservation(channel, channel.getLocalAddress.asInstanceOf[InetSocketAddress].getPort))
    } catch { case _: IOException => channel.close(); None }
  }

  /** The port that the kernel had before a restart, if it is free. Its former connections may still be in TIME_WAIT. */
  def former(ip: InetAddress, port: Int): Option[Reservation] =
    if (port < 1 || port > 65535) None else bind(ip, port, exclusive = true).orElse(bind(ip, port, exclusive = false))

  def fresh(ip: InetAddress, range: PortRange): Reservation =
    range.candidates.map(bind(ip, _, exclusive = true)).collectFirst { case Some(x) => x }.getOrElse {
      val at = ip.getHostAddress
      throw new LaunchError(
        if (bind(ip, 0, exclusive = true).isEmpty)
          s"cannot bind to $at: is it an address of this host? " +
            "Let kernels be tunnelled (GP_ENABLE_TUNNELING=true) if not"
        else s"fewer than 5 ports are free in ${range.lower}..${range.upper} on $at: " +
          "widen the port range (port_range, GP_PORT_RANGE) or end what uses it")
    }
}

object BindAddress {
  private def unmapped(ip: String) = ip.stripPrefix("::ffff:")
  private def usable(ip: String) = Some(unmapped(ip)).filter(o => o.nonEmpty && !o.contains(':'))

  /** The address that a kernel listens on which reports to `response`: loopback if it is tunnelled or local; else the
    * address at which the host application reached this host, or that from which this host reaches it. */
  def choose(response: InetAddress, sshConnection: Option[String]): InetAddress = {
    val sshd = sshConnection.toList.map(_.trim.split("\\s+")).collect { case Array(_, _, ip, _) => ip }
      .filterNot(ip => Try(InetAddress.getByName(unmapped(ip)).isLoopbackAddress).getOrElse(true))
    if (response.isLoopbackAddress) InetAddress.getByName("127.0.0.1")
    else (sshd ++ routed(response)).flatMap(usable(_)).headOption.map(InetAddress.getByName).getOrElse(
      throw new LaunchError(s"no IPv4 address of this host reaches ${response.getHostAddress}: " +
        "let kernels be tunnelled (GP_ENABLE_TUNNELING=true) or set an IPv4 response address (GP_RESPONSE_IP)"))
  }

  private def routed(to: InetAddress): Option[String] = Try {
    val socket = new DatagramSocket()
    try { socket.connect(to, 9); socket.getLocalAddress } finally socket.close()
  }.toOption.filterNot(_.isAnyLocalAddress).map(_.getHostAddress)
}
