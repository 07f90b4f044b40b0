#!/usr/bin/env bash
# Sets up what the tests need and runs all of them, notebooks among them:  bash scripts/test.sh
# Arguments go to pytest. VENV names another directory than .venv-test, PYTHON another Python than python3, WORKERS how many notebooks or
# files of tests run at a time: two more than there are cores unless it says so, since they wait as well as compute. With CI=true nothing
# may be missing; otherwise what cannot be had is said and left out. With GP_MATRIX=all, every application is tried in every place
# (tests/test_matrix.py), and nbs/explanation/applications.json is written anew; otherwise in those that have every pair.
# shellcheck disable=SC2317,SC2016
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

VENV=${VENV:-$PWD/.venv-test}
unset PYTHONDONTWRITEBYTECODE   # hundreds of processes import the package
stage() {  # stage TITLE COMMAND...: run it, and say how long it took
    local t=$SECONDS; say "$1"; shift
    "$@" || return
    printf '   %d s\n' $((SECONDS - t))
}

programs() {
    local ok=0
    packages openssh-server/sshd openssh-client/ssh busybox/busybox             || ok=1   # hosts
    packages iproute2/ip nftables/nft procps/ps sudo/sudo faketime/faketime     || ok=1   # links, firewalls, other users, clocks
    packages chromium/chromium                                                  || ok=1   # JupyterLab and Notebook
    packages tcsh/csh fish/fish zsh/zsh ksh/ksh dash/dash                       || ok=1   # login shells
    packages r-cran-irkernel                                                    || ok=1   # R kernels
    packages default-jdk-headless/javac maven/mvn                               || ok=1   # Spark, YARN and Scala kernels
    packages nodejs/node npm/npm                                                || ok=1   # JavaScript kernels
    packages krb5-kdc/krb5kdc krb5-admin-server/kadmin.local krb5-user/kinit    || ok=1   # Kerberos,
    packages libkrb5-dev gcc/gcc python3-dev                                    || ok=1   # and what its Python package is built with
    return $ok
}
environment() {
    local made
    made=$VENV/installed-$(cat settings.ini setup.py pyproject.toml scripts/test.sh | cksum | tr ' ' -)
    [ ! -e "$made" ] || return 0
    # editable by a path alone: the other kind has each start of Python import a finder
    venv "$VENV" && "$VENV/bin/python" -m pip install --quiet --config-settings editable_mode=compat -e '.[dev,spark]' &&
        server_extension && npm_packages && kerberos && quick_java && touch "$made"
}
server_extension() {  # what an installation that is not editable brings as a data file
    mkdir -p "$VENV/etc/jupyter/jupyter_server_config.d" && cp jupyter-config/gateway_provisioners_ssh.json "$VENV/etc/jupyter/jupyter_server_config.d"
}
npm_packages() {  # those that settings.ini names, into $VENV/node; without npm there are none, as `programs` has said
    local names
    mapfile -t names < <(sed -n '/^test_npm_requirements/,/^[a-z_]* *=/s/^ \+//p' settings.ini)
    ! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --prefix "$VENV/node" "${names[@]}" </dev/null
}
kerberos() {  # an environment with the extra `gssapi`, which needs an older paramiko than all others
    { venv "$VENV/gssapi" && "$VENV/gssapi/bin/python" -m pip install --quiet -e '.[gssapi]'; } ||
        loud "No environment with the extra gssapi: the tests of Kerberos are skipped"
}
quick_java() {  # what `java` is here and on the hosts of the tests: for the many JVMs that live for seconds, and so are not worth optimizing for
    local java classes=$VENV/java_classes.jsa
    java=$(PATH=${PATH//$VENV\/bin:/} command -v java) || return 0
    rm -f "$classes"
    java_command "$java"
    PATH=$VENV/bin:$PATH timeout -k 5 600 "$VENV/bin/python" scripts/java_classes.py "$classes" >"$work/java" 2>&1 || cat "$work/java"
    # a JVM whose class path begins otherwise goes without
    [ ! -e "$classes" ] || java_command "$java" "-XX:SharedArchiveFile=$classes"
}
java_command() {  # java_command JAVA [OPTION]: what `java` is, and what Spark's own first JVM starts, if nothing says otherwise
    local options='-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData -Xlog:disable'
    printf '#!/bin/sh\n[ -n "$JAVA_HOME" ] || export JAVA_HOME="%s"\nexec "%s" %s "$@"\n' \
        "$VENV" "$(readlink -f "$1")" "$options ${2:+\"$2\"}" >"$VENV/bin/java" && chmod +x "$VENV/bin/java"
}

again() {  # what failed beside other tests may have been short of time; what fails alone, too, is broken
    local test bad=
    loud "Tests failed (above). Each is tried once more, alone on this machine and in a process of its own"
    (cd tests && python -m pytest --last-failed --last-failed-no-failures none --collect-only -q) | grep '::' >"$work/failed" || return 1
    while read -r test; do (cd tests && python -m pytest "$test" </dev/null) || bad=1; done <"$work/failed"
    [ -z "$bad" ]
}

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
stage "Programs" programs || { [ "${CI:-}" != true ] || exit 1; left=1; }
stage "Python packages, in $VENV" environment
export PATH=$VENV/bin:$PATH
[ -z "${left:-}" ] || loud "Programs are missing (above): the tests that need them are skipped, and listed as such"
say "Tests"
python -m pytest tests --durations=25 -n "${WORKERS:-$(($(nproc) + 2))}" --dist loadfile --no-loadscope-reorder "$@" || again
