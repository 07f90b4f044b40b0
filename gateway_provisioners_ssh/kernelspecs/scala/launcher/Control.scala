package launcher

import com.fasterxml.jackson.databind.JsonNode
import java.nio.ByteBuffer
import java.nio.channels.{SelectionKey, Selector, ServerSocketChannel, SocketChannel}
import java.nio.charset.StandardCharsets.UTF_8
import scala.util.Try

/** Serves the requests of the host application, and of nobody else, on one thread.
  *
  * A connection is: our nonce, one signed request, one signed reply. Nothing is done for a request that is not signed
  * with the launch's control key over this connection's nonce, so a request can be neither forged nor replayed.
  * Connections are few and short: beyond `maxOpen` the oldest from the address that has most gives way, and after
  * `seconds` each is closed, so peers that connect and say nothing cost the kernel nothing and keep nobody else out. */
final class Control(server: ServerSocketChannel, key: Array[Byte], act: JsonNode => JsonNode, maxOpen: Int = 64, seconds: Int = 5)
    extends Thread("control-listener") {
  setDaemon(true)

  private final class Peer(val channel: SocketChannel) {
    val ip = channel.socket.getInetAddress
    val nonce = Secrets.bytes(32)
    val deadline = System.nanoTime + seconds * 1000000000L
    val in = ByteBuffer.allocate(8192)
    var out = line(Json.obj().put("version", 2).put("nonce", Hex.encode(nonce)))
    var replied = false
    def expired = System.nanoTime - deadline > 0
  }

  private val open = new java.util.ArrayDeque[Peer]()
  private val selector = Selector.open()

  private def line(json: JsonNode) = ByteBuffer.wrap(Json.mapper.writeValueAsBytes(json) :+ '\n'.toByte)
  private def mac(kind: String, nonce: Array[Byte], text: String) = Hpke.hmac(key, Hpke.bytes(kind), nonce, Hpke.bytes(text))

  override def run(): Unit = {
    server.configureBlocking(false)
    server.register(selector, SelectionKey.OP_ACCEPT)
    while (server.isOpen) {
      if (open.isEmpty) selector.select() else selector.select(200)
      val ready = selector.selectedKeys.iterator
      while (ready.hasNext) { val k = ready.next(); ready.remove(); handle(k) }
      while (!open.isEmpty && open.peekFirst.expired) close(open.peekFirst)
    }
  }

  private def handle(k: SelectionKey): Unit = k.attachment match {
    case null => if (Try(accept()).isFailure) Thread.sleep(50)  // out of descriptors: let some connections expire
    case p => val peer = p.asInstanceOf[Peer]
              if (Try(progress(k, peer)).isFailure) close(peer)
  }

  private def accept(): Unit = Option(server.accept()).foreach { channel =>
    channel.configureBlocking(false)
    if (open.size >= maxOpen) close(oldestOfTheGreediest())
    val peer = new Peer(channel)
    open.addLast(peer)
    progress(channel.register(selector, SelectionKey.OP_READ, peer), peer)
  }

  private def oldestOfTheGreediest(): Peer = {
    val peers = open.toArray(Array.empty[Peer])
    val greediest = peers.groupBy(_.ip).maxBy(_._2.length)._1
    peers.find(_.ip == greediest).get
  }

  private def close(peer: Peer): Unit = { open.remove(peer); Try(peer.channel.close()) }

  private def progress(k: SelectionKey, peer: Peer): Unit = {
    peer.channel.write(peer.out)
    if (peer.replied) {
      if (!peer.out.hasRemaining) close(peer)
    } else {
      val ended = peer.channel.read(peer.in) < 0
      received(peer) match {
        case Some(text) => reply(peer, text)
        case None => if (ended || !peer.in.hasRemaining) { close(peer); return }
      }
    }
    if (k.isValid) k.interestOps(if (peer.out.hasRemaining) SelectionKey.OP_READ | SelectionKey.OP_WRITE else SelectionKey.OP_READ)
  }

  private def received(peer: Peer): Option[String] = {
    val text = new String(peer.in.array, 0, peer.in.position(), UTF_8)
    val end = text.indexOf('\n')
    if (end < 0) None else Some(text.substring(0, end))
  }

  private def reply(peer: Peer, text: String): Unit = {
    val request = for {
      message <- Json.parse(text)
      request = message.path("request").asText
      if Secrets.matches(message.path("mac").asText, mac("request", peer.nonce, request))
      json <- Json.parse(request)
    } yield json
    request match {
      case None => Log.rarely("control", "refused a request that is not signed with this kernel's control key")
                   close(peer)
      case Some(json) =>
        val answer = Json.mapper.writeValueAsString(Try(act(json)).getOrElse(Json.obj().put("error", "the request failed")))
        peer.out = line(Json.obj().put("reply", answer).put("mac", Hex.encode(mac("reply", peer.nonce, answer))))
        peer.replied = true
        peer.channel.write(peer.out)
        if (!peer.out.hasRemaining) close(peer)
    }
  }
}
