# A stand-in for SparkR: a client of the backend that spark-submit starts in its JVM for every R program. What a launcher touches has
# the names that it has in SparkR, those that are not exported included.
#
# Requests are framed by their length; values are a type letter and their bytes, numbers big-endian, strings after their length (those
# that we send have a zero byte at the end).

.sparkREnv <- new.env()

int <- function(x) writeBin(as.integer(x), raw(), endian = "big")
string <- function(x) { b <- c(charToRaw(x), as.raw(0)); c(int(length(b)), b) }
value <- function(x) {
  if (is.null(x)) charToRaw("n")
  else if (inherits(x, "jobj")) c(charToRaw("j"), string(x$id))
  else if (is.environment(x)) c(charToRaw("e"), int(0))                  # an empty map
  else if (is.list(x)) c(charToRaw("a"), charToRaw("c"), int(0))         # an empty array of strings
  else if (is.logical(x)) c(charToRaw("b"), int(x))
  else if (is.integer(x)) c(charToRaw("i"), int(x))
  else c(charToRaw("c"), string(x))
}

jobj <- function(id) { o <- structure(new.env(), class = "jobj"); o$id <- id; o }

readInt <- function(con) readBin(con, integer(), 1, endian = "big")
readString <- function(con) rawToChar(readBin(con, raw(), readInt(con)))
readObject <- function(con) switch(type <- rawToChar(readBin(con, raw(), 1)),
  n = NULL, i = readInt(con), d = readBin(con, double(), 1, endian = "big"), c = readString(con), b = readInt(con) != 0,
  j = jobj(readString(con)), stop("values of type ", type, " are beyond this stand-in"))

connectBackend <- function() {
  port <- Sys.getenv("EXISTING_SPARKR_BACKEND_PORT")
  if (!nzchar(port)) stop("no R backend: this R was not started by spark-submit")
  con <- socketConnection("localhost", as.integer(port), blocking = TRUE, open = "r+b", timeout = 600)
  writeBin(string(Sys.getenv("SPARKR_BACKEND_AUTH_SECRET")), con)
  if (readString(con) != "ok") stop("the R backend refused its secret")
  assign(".sparkRCon", con, envir = .sparkREnv)
}

invokeJava <- function(isStatic, objId, methodName, ...) {
  con <- get(".sparkRCon", envir = .sparkREnv)
  args <- list(...)
  message <- c(int(isStatic), string(objId), string(methodName), int(length(args)), do.call(c, c(list(raw()), lapply(args, value))))
  writeBin(c(int(length(message)), message), con)
  while ((status <- readInt(con)) == 1) NULL         # it says so now and then while it works
  if (status != 0) stop(readString(con), call. = FALSE)
  readObject(con)
}

sparkR.callJStatic <- function(x, methodName, ...) invokeJava(TRUE, x, methodName, ...)
sparkR.callJMethod <- function(x, methodName, ...) { force(x); invokeJava(FALSE, x$id, methodName, ...) }

sparkR.session <- function(master = "", appName = "SparkR", enableHiveSupport = TRUE, ...) {
  if (!exists(".sparkRCon", envir = .sparkREnv)) connectBackend()
  if (!exists(".sparkRjsc", envir = .sparkREnv))
    assign(".sparkRjsc", sparkR.callJStatic("org.apache.spark.api.r.RRDD", "createSparkContext", master, appName, Sys.getenv("SPARK_HOME"), list(),
                                            new.env(), new.env()), envir = .sparkREnv)
  if (!exists(".sparkRsession", envir = .sparkREnv))
    assign(".sparkRsession", sparkR.callJStatic("org.apache.spark.sql.api.r.SQLUtils", "getOrCreateSparkSession", get(".sparkRjsc", envir = .sparkREnv),
                                                new.env(), enableHiveSupport), envir = .sparkREnv)
  get(".sparkRsession", envir = .sparkREnv)
}

# These use what was made, or what is made now where its name is bound to something that makes it.
sql <- function(sqlQuery) {
  if (!exists(".sparkRsession", envir = .sparkREnv)) stop("SparkSession not initialized")
  sparkR.callJMethod(get(".sparkRsession", envir = .sparkREnv), "sql", sqlQuery)
}

setLogLevel <- function(level) {
  if (!exists(".sparkRjsc", envir = .sparkREnv)) stop("SparkR has not been initialized")
  sparkR.callJMethod(get(".sparkRjsc", envir = .sparkREnv), "setLogLevel", level)
}

count <- function(x) sparkR.callJMethod(x, "count")
