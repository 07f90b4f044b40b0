#!/usr/bin/env bash
# Starts the launcher of the kernelspec that this file belongs to, through spark-submit.
#
#   SPARK_HOME                where Spark is on this host
#   SPARK_OPTS                options of spark-submit
#   LAUNCH_OPTS               options of the launcher, put before the arguments of this script
#   TOREE_OPTS                options of Toree (Scala), put before those
#   GP_IMPERSONATION_ENABLED  true: run as KERNEL_USERNAME, by sudo
#
# Scala kernelspecs give defaults for SPARK_OPTS and TOREE_OPTS as __TOREE_SPARK_OPTS__ and __TOREE_OPTS__.
# Options are one string each: white space separates them, quotes and backslashes group as in a shell. They may come
# from a start request, so nothing else in them is interpreted: nothing is expanded or run here.
set -f

die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }

words=()
plain=$'^[^ \t\n\v\f\r\'"\\\\]+' single="^'([^']*)'" double='^[^"\\]+'
split() { # puts the words of the string $2 into the array `words`; $1 is its name
  local LC_ALL=C name=$1 rest=$2 word='' some=''
  words=()
  while [ -n "$rest" ]; do
    if [[ $rest =~ $plain ]]; then word+=${BASH_REMATCH[0]}; rest=${rest:${#BASH_REMATCH[0]}}; some=1; continue; fi
    case $rest in
      \'*) [[ $rest =~ $single ]] || die "$name: a single quote is not closed"
        word+=${BASH_REMATCH[1]}; rest=${rest:${#BASH_REMATCH[0]}}; some=1 ;;
      \"*) rest=${rest:1}; some=1
        while :; do
          if [[ $rest =~ $double ]]; then word+=${BASH_REMATCH[0]}; rest=${rest:${#BASH_REMATCH[0]}}; fi
          case $rest in
            \"*) rest=${rest:1}; break ;;
            \\[\"\\\$\`]*) word+=${rest:1:1}; rest=${rest:2} ;;
            \\*) word+=\\; rest=${rest:1} ;;
            *) die "$name: a double quote is not closed" ;;
          esac
        done ;;
      \\?*) word+=${rest:1:1}; rest=${rest:2}; some=1 ;;
      \\) die "$name: nothing follows the last backslash" ;;
      *) rest=${rest:1}; [ -z "$some" ] || words+=("$word"); word='' some='' ;;
    esac
  done
  [ -z "$some" ] || words+=("$word")
}

find_one() { # puts the one file that matches the pattern $1 into `file`
  local found
  set +f; found=("$here"/$1); set -f
  [ -f "${found[0]}" ] || return 1
  [ ${#found[@]} = 1 ] || die "more than one file matches $here/$1: keep the one to use"
  file=${found[0]}
}

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || die "cannot find the kernelspec's directory"
machine=$(uname -n)

spec="the env of its kernel.json (jupyter kernelspec list shows where it is)"
[ -n "$SPARK_HOME" ] || die "SPARK_HOME is not set: name Spark's directory in $spec"
submit=$SPARK_HOME/bin/spark-submit
[ -x "$submit" ] ||
  die "no Spark on $machine: $submit is not there; install Spark, or correct SPARK_HOME in $spec"
{ [ -n "$JAVA_HOME" ] && [ -x "$JAVA_HOME/bin/java" ]; } || command -v java >/dev/null ||
  die "no Java on $machine: install a Java runtime (Debian: apt-get install default-jre-headless), or set JAVA_HOME"

front=() toree=()
if find_one scripts/launch_ipykernel.py || find_one scripts/launch_IRkernel.R; then app=$file
elif find_one 'lib/toree-launcher_*.jar'; then
  app=$file
  find_one 'lib/toree-assembly-*.jar' ||
    die "no Toree in $here/lib: pip install apache-toree, then repeat jupyter ssh-spec install --replace"
  front=(--jars "$file" --class launcher.ToreeLauncher)
  SPARK_OPTS=${SPARK_OPTS:-$__TOREE_SPARK_OPTS__}
  split TOREE_OPTS "${TOREE_OPTS:-$__TOREE_OPTS__}"; toree=("${words[@]}")
else die "no launcher in $here/scripts or $here/lib: repeat jupyter ssh-spec install --replace"
fi
split LAUNCH_OPTS "$LAUNCH_OPTS"; launch=("${words[@]}")
split SPARK_OPTS "$SPARK_OPTS"

sudo_prefix=()
case ${GP_IMPERSONATION_ENABLED:-$EG_IMPERSONATION_ENABLED} in [Tt][Rr][Uu][Ee]|1)
  case $KERNEL_USERNAME in
    ''|[-+#]*) die "impersonation: '$KERNEL_USERNAME' in KERNEL_USERNAME is not a user name" ;;
  esac
  if [ "$KERNEL_USERNAME" != "$(id -un)" ]; then
    id -u -- "$KERNEL_USERNAME" >/dev/null 2>&1 || die "impersonation: $machine has no user '$KERNEL_USERNAME'"
    sudo_prefix=(sudo -n -H -E -u "$KERNEL_USERNAME" -- env "PATH=$PATH")
  fi
esac

# a JVM decodes its arguments by the locale; without one, characters other than ASCII would be lost
[ -n "$LC_ALL$LC_CTYPE$LANG" ] || export LC_CTYPE=C.UTF-8

# a JVM that is started with SIGINT ignored, as background jobs are, could not be interrupted by it
default_signal=()
env --default-signal=INT true 2>/dev/null && default_signal=(env --default-signal=INT)

exec "${sudo_prefix[@]}" "${default_signal[@]}" "$submit" \
  "${words[@]}" "${front[@]}" "$app" "${toree[@]}" "${launch[@]}" "$@"
