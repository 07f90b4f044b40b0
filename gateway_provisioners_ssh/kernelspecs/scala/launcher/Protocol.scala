package launcher

/** The constants that all implementations of the protocol share: `protocol.json`, which is in this jar. */
object Protocol {
  private val json = Json.mapper.readTree(getClass.getResource("/protocol.json"))
  private def text(name: String) = json.get(name).asText
  private def texts(name: String) = (0 until json.get(name).size).map(json.get(name).get(_).asText)

  val version: Int = json.get("version").asInt
  val ticketVariable: String = text("ticket_variable")
  val hpkeInfo: String = text("hpke_info")
  val aadPrefix: String = text("aad_prefix")
  val answerLabel: String = text("answer_label")
  val maxLine: Int = json.get("max_control_line").asInt
  val portNames: Seq[String] = texts("channels").map(_ + "_port")
  val curveFields: Seq[String] = texts("curve_fields")
  val controlFields: Seq[String] = texts("control_fields")
  val options: Set[String] = texts("options").toSet
  val optionPrefix: String = text("option_prefix")
  val sparkOption: String = text("spark_option")
  val sparkModes: Set[String] = texts("spark_modes").toSet
}
