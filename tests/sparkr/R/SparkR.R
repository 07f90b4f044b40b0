# A stand-in for SparkR: a client of the backend that spark-submit starts in its JVM for every R program.
# Requests are framed by their length; values are a type letter and their bytes, numbers big-endian, strings after their length
# (those that we send have a zero byte at the end).

.sparkREnv <- new.env()

int <- function(x) writeBin(as.integer(x), raw(), endian = "big")
string <- function(x) { b <- c(charToRaw(x), as.raw(0)); c(int(length(b)), b) }
value <- function(x) {
  if (is.null(x)) charToRaw("n")
  else if (inherits(x, "jobj")) c(charToRaw("j"), string(unclass(x)))
  else if (is.environment(x)) c(charToRaw("e"), int(0))                  # an empty map
  else if (is.list(x)) c(charToRaw("a"), charToRaw("c"), int(0))         # an empty array of strings
  else if (is.logical(x)) c(charToRaw("b"), int(x))
  else if (is.integer(x)) c(charToRaw("i"), int(x))
  else c(charToRaw("c"), string(x))
}

read_int <- function(con) readBin(con, integer(), 1, endian = "big")
read_string <- function(con) rawToChar(readBin(con, raw(), read_int(con)))
read_value <- function(con) switch(type <- rawToChar(readBin(con, raw(), 1)),
  n = NULL, i = read_int(con), d = readBin(con, double(), 1, endian = "big"), c = read_string(con), b = read_int(con) != 0,
  j = structure(read_string(con), class = "jobj"), stop("values of type ", type, " are beyond this stand-in"))

connection <- function() {
  if (!is.null(.sparkREnv$con)) return(.sparkREnv$con)
  port <- Sys.getenv("EXISTING_SPARKR_BACKEND_PORT")
  if (!nzchar(port)) stop("no R backend: this R was not started by spark-submit")
  con <- socketConnection("localhost", as.integer(port), blocking = TRUE, open = "r+b", timeout = 600)
  writeBin(string(Sys.getenv("SPARKR_BACKEND_AUTH_SECRET")), con)
  if (read_string(con) != "ok") stop("the R backend refused its secret")
  .sparkREnv$con <- con
}

call <- function(static, object, method, args) {
  con <- connection()
  message <- c(int(static), string(object), string(method), int(length(args)), do.call(c, c(list(raw()), lapply(args, value))))
  writeBin(c(int(length(message)), message), con)
  while ((status <- read_int(con)) == 1) NULL         # it says so now and then while it works
  if (status != 0) stop(read_string(con), call. = FALSE)
  read_value(con)
}

sparkR.callJStatic <- function(x, methodName, ...) call(TRUE, x, methodName, list(...))
sparkR.callJMethod <- function(x, methodName, ...) call(FALSE, unclass(x), methodName, list(...))

sparkR.session <- function(master = "", appName = "SparkR", enableHiveSupport = TRUE, ...) {
  if (exists(".sparkRsession", envir = .sparkREnv)) return(get(".sparkRsession", envir = .sparkREnv))
  if (!exists(".sparkRjsc", envir = .sparkREnv))
    assign(".sparkRjsc", sparkR.callJStatic("org.apache.spark.api.r.RRDD", "createSparkContext", master, appName, Sys.getenv("SPARK_HOME"), list(),
                                            new.env(), new.env()), envir = .sparkREnv)
  jsc <- get(".sparkRjsc", envir = .sparkREnv)
  session <- sparkR.callJStatic("org.apache.spark.sql.api.r.SQLUtils", "getOrCreateSparkSession", jsc, new.env(), enableHiveSupport)
  assign(".sparkRsession", session, envir = .sparkREnv)
  session
}

sparkR.session.stop <- function() {
  sparkR.callJMethod(get(".sparkRsession", envir = .sparkREnv), "stop")
  rm(".sparkRsession", ".sparkRjsc", envir = .sparkREnv)
}

# These use the session that was made, or, where its name is bound to something that makes it, is made now.
sql <- function(sqlQuery) {
  if (!exists(".sparkRsession", envir = .sparkREnv)) stop("SparkSession not initialized")
  sparkR.callJMethod(get(".sparkRsession", envir = .sparkREnv), "sql", sqlQuery)
}

count <- function(x) sparkR.callJMethod(x, "count")

setLogLevel <- function(level) {
  if (!exists(".sparkRjsc", envir = .sparkREnv)) stop("SparkR has not been initialized")
  sparkR.callJMethod(get(".sparkRjsc", envir = .sparkREnv), "setLogLevel", level)
}
