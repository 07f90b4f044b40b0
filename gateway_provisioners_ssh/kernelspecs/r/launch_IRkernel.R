# Launches IRkernel, the R kernel of Jupyter, on the host of a kernel.
#
#   Rscript launch_IRkernel.R --kernel-id ID --response-address IP:PORT --public-key KEY [--port-range LOW..HIGH]
#       [--spark-context-initialization-mode lazy|eager|none]
#
# Every option may also be spelled --RemoteProcessProxy.NAME. The one-time ticket of the launch is in the environment
# (KERNEL_LAUNCH_SECRET). server_listener.py beside this file takes it, chooses the ports, reports the kernel when it is
# up, and ends; R runs the kernel and nothing else. The host needs base R and the package IRkernel; for
# server_listener.py a Python 3; for Spark the package SparkR, which is in Spark's own download.

local({

fail <- function(...) {
  message("launch_IRkernel.R: ", ...)
  quit("no", 1L, runLast = FALSE)
}

# Arguments ------------------------------------------------------------------------------------------------------------

listener_options <- c("kernel-id", "response-address", "port-range", "public-key")
spark_modes <- c("lazy", "eager", "none")
known <- c(listener_options, "spark-context-initialization-mode", "cluster-type", "customAppName",
           "kernel-class-name", "connection-file")   # without effect here, but some kernelspecs have them

parse_args <- function(argv) {
  opts <- list("port-range" = "0..0", "spark-context-initialization-mode" = "none")
  while (length(argv)) {
    arg <- argv[1]; argv <- argv[-1]
    if (!startsWith(arg, "--")) next               # old kernelspecs name a connection file, which is not used
    name <- sub("=.*", "", sub("^--(RemoteProcessProxy[.])?", "", arg))
    if (!name %in% known) fail("unknown argument ", sub("=.*", "", arg))
    if (grepl("=", arg, fixed = TRUE)) opts[[name]] <- sub("^[^=]*=", "", arg)
    else {
      if (!length(argv)) fail("argument ", arg, " needs a value")
      opts[[name]] <- argv[1]; argv <- argv[-1]
    }
  }
  for (name in c("kernel-id", "response-address", "public-key"))
    if (is.null(opts[[name]])) fail("argument --", name, " is missing")
  mode <- opts[["spark-context-initialization-mode"]]
  if (!mode %in% spark_modes) fail("--spark-context-initialization-mode is lazy, eager or none, not ", mode)
  opts
}

here <- sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)[1])
here <- dirname(normalizePath(gsub("~+~", " ", here, fixed = TRUE)))   # Rscript writes ~+~ for a blank

# The report -----------------------------------------------------------------------------------------------------------
# server_listener.py runs beside R, in a session of its own, until it has reported the kernel; if the launch cannot go
# on, it logs the reason and ends R. The agent of this host removes R's temporary directory, which R itself does not do
# when it is killed.

reporter_script <- '
for p in "${PYSPARK_PYTHON:-python3}" "${PYSPARK_PYTHON:-python}"; do
  "$p" -c "import sys; sys.exit(sys.version_info < (3, 8))" 2>/dev/null && exec "$p" "$@"
done
tried=${PYSPARK_PYTHON:-python3, python}
missing="server_listener.py needs a Python 3.8 or newer, which is neither of $tried"
echo "launch_IRkernel.R: $missing: set PYSPARK_PYTHON to one" >&2
kill -TERM $R_PID'

start_reporter <- function(opts, file) {
  vars <- c(R_PID = Sys.getpid())
  argv <- c("setsid", "sh", "-c", reporter_script, "sh", file.path(here, "server_listener.py"),
            "--parent-pid", Sys.getpid(), "--connection-file", file, "--remove", tempdir(), "--curve",
            rbind(paste0("--", listener_options), unlist(opts[listener_options])))
  system(paste(c(paste0(names(vars), "=", shQuote(vars)), shQuote(argv), "</dev/null"), collapse = " "), wait = FALSE)
}

# A process group of its own -------------------------------------------------------------------------------------------
# Interrupts go to the kernel's process group. Under spark-submit that group is the JVM's, which an interrupt would end,
# so R leaves it by calling the C library, which is loaded already: R has no function for that.

lead_process_group <- function() {
  group <- function() strsplit(sub(".*[)] ", "", readLines("/proc/self/stat", 1)), " ")[[1]][3]
  if (!file.exists("/proc/self/stat") || group() == Sys.getpid()) return()
  libc <- sub(".* ", "", grep("/(libc[.-]|ld-musl)[^ ]*$", readLines("/proc/self/maps"), value = TRUE)[1])
  .C(getNativeSymbolInfo("setsid", dyn.load(libc)))
}

# Spark ----------------------------------------------------------------------------------------------------------------

app_name <- function(opts) if (is.null(opts$customAppName)) opts[["kernel-id"]] else opts$customAppName

attach_sparkr <- function() {
  home <- Sys.getenv("SPARK_HOME")
  lib <- file.path(home, "R", "lib")
  if (nzchar(home) && dir.exists(lib)) .libPaths(c(lib, .libPaths()))
  if (!requireNamespace("SparkR", quietly = TRUE))
    stop("the R package SparkR is not in ", if (nzchar(home)) lib else "SPARK_HOME/R/lib (SPARK_HOME is not set)",
         ", nor in another R library (", paste(.libPaths(), collapse = ", "), "). It is part of Spark's download; ",
         "pip's pyspark leaves it out. Point SPARK_HOME at a Spark that has R/lib/SparkR", call. = FALSE)
  suppressPackageStartupMessages(library(SparkR))
}

spark_session <- function(name) suspendInterrupts({
  session <- SparkR::sparkR.session(appName = name, enableHiveSupport = FALSE)
  sc <- SparkR::sparkR.callJStatic("org.apache.spark.sql.api.r.SQLUtils", "getJavaSparkContext", session)
  cancel_on_interrupt()
  list(spark = session, sc = sc)
})

# SparkR waits for the JVM's answer to each call. An interrupt would break off the wait; the jobs would go on, and their
# answer would be read as that of the next call. So an interrupt cancels the jobs, over a second connection to the
# backend in the JVM, and the answer of the interrupted call, which is an error then, is read before R goes on.

cancel_on_interrupt <- function() {
  port <- Sys.getenv("EXISTING_SPARKR_BACKEND_PORT")
  if (!nzchar(port)) return()                     # SparkR has started the JVM itself, and does not tell the port
  sparkr <- asNamespace("SparkR")
  int <- function(x) writeBin(as.integer(x), raw(), endian = "big")
  string <- function(x) c(int(nchar(x, "bytes") + 1), charToRaw(x), as.raw(0))
  second <- socketConnection("localhost", as.integer(port), blocking = TRUE, open = "r+b", timeout = 6000)
  writeBin(string(Sys.getenv("SPARKR_BACKEND_AUTH_SECRET")), second)
  if (sparkr$readString(second) != "ok") stop("the JVM's R backend refused a second connection")
  answer <- function(con, meanwhile = function() NULL) {
    repeat {
      while (!socketSelect(list(con), timeout = 0.1)) meanwhile()
      if (!identical(status <- sparkr$readInt(con), 1L)) break            # 1 is a heartbeat
    }
    if (identical(status, 0L)) sparkr$readObject(con) else sparkr$readString(con)
  }
  cancel <- function() {
    if (is.null(sc <- sparkr$.sparkREnv$.sparkRjsc)) return()
    request <- c(int(0), string(sc$id), string("cancelAllJobs"), int(0))   # not static, object, method, no arguments
    writeBin(c(int(length(request)), request), second)
    answer(second)
  }
  call <- sparkr$invokeJava
  unlockBinding("invokeJava", sparkr)
  assign("invokeJava", function(...) tryCatch(call(...), interrupt = function(e) {
    suspendInterrupts({
      cancel()
      answer(sparkr$.sparkREnv$.sparkRCon, meanwhile = cancel)            # a job that was planned may begin only now
    })
    signalCondition(e)
  }), envir = sparkr)
}

# `spark` and `sc`, and the two names under which SparkR's own functions look them up, make the context when first
# used. A context that cannot be made is an error of the cell that used it; the next use tries again.

define_lazily <- function(init) {
  places <- list(spark = globalenv(), sc = globalenv())
  if (isNamespaceLoaded("SparkR"))
    places[c(".sparkRsession", ".sparkRjsc")] <- list(get(".sparkREnv", asNamespace("SparkR")))
  bound <- function(name) exists(name, places[[name]], inherits = FALSE)
  unbind <- function() for (name in Filter(bound, names(places)))
    if (bindingIsActive(name, places[[name]])) rm(list = name, envir = places[[name]])
  make <- function() {
    unbind()
    on.exit(bind())       # after an error or an interrupt, what is missing stays to be made
    failed <- function(e) stop("the Spark context could not be made: ", conditionMessage(e), call. = FALSE)
    made <- tryCatch(init(), error = failed)
    for (name in c("spark", "sc")) if (!bound(name)) assign(name, made[[name]], envir = globalenv())
    on.exit()
    made
  }
  bind <- function() for (name in Filter(Negate(bound), names(places))) local({
    name <- name
    makeActiveBinding(name, function(value) {
      if (missing(value)) return(make()[[if (name %in% c("sc", ".sparkRjsc")) "sc" else "spark"]])
      rm(list = name, envir = places[[name]])     # the user's own `sc <- 1`
      assign(name, value, envir = places[[name]])
    }, places[[name]])
  })
  bind()
}

init_spark <- function(opts) {
  mode <- opts[["spark-context-initialization-mode"]]
  if (mode == "none" || identical(opts[["cluster-type"]], "none")) return()
  init <- function() spark_session(app_name(opts))
  missing <- tryCatch({ attach_sparkr(); NULL }, error = conditionMessage)
  if (!is.null(missing)) {
    if (mode == "eager") fail(missing)
    message("launch_IRkernel.R: ", missing)
    init <- function() stop(missing)
  }
  if (mode == "lazy") return(define_lazily(init))
  made <- tryCatch(init(), error = function(e) fail("the Spark context could not be made: ", conditionMessage(e)))
  for (n in names(made)) assign(n, made[[n]], envir = globalenv())
}

# The kernel -----------------------------------------------------------------------------------------------------------

# IRkernel has no encryption, but its sockets have: the function that it calls to bind them sets the key first.
encrypt_sockets <- function(secretkey) {
  so <- pbdZMQ::ZMQ.SO()
  imports <- parent.env(asNamespace("IRkernel"))
  bind <- get("zmq.bind", imports)
  unlockBinding("zmq.bind", imports)
  assign("zmq.bind", function(socket, ...) {
    pbdZMQ::zmq.setsockopt(socket, so$CURVE_SERVER, 1L)
    pbdZMQ::zmq.setsockopt(socket, so$CURVE_SECRETKEY, secretkey)
    bind(socket, ...)
  }, envir = imports)
}

make_kernel <- function(file) {
  secretkey <- jsonlite::fromJSON(file)$curve_secretkey
  if (!is.null(secretkey)) encrypt_sockets(secretkey)
  get("Kernel", asNamespace("IRkernel"))$new(connection_file = file)
}

# An interrupt while no cell runs would end R, since this R is not interactive.
run <- function(kernel) repeat tryCatch(kernel$run(), interrupt = function(e) NULL)

opts <- parse_args(commandArgs(TRUE))
file <- file.path(tempdir(), paste0("kernel-", opts[["kernel-id"]], ".json"))
start_reporter(opts, file)
Sys.unsetenv("KERNEL_LAUNCH_SECRET")
if (!requireNamespace("IRkernel", quietly = TRUE))
  fail("the R package IRkernel is not in an R library of this host (", paste(.libPaths(), collapse = ", "),
       "): apt-get install r-cran-irkernel, or in R: install.packages('IRkernel')")
init_spark(opts)
while (!file.exists(file)) Sys.sleep(.01)
lead_process_group()
run(tryCatch(make_kernel(file), error = function(e) fail("IRkernel could not be started: ", conditionMessage(e))))

})
