#!/usr/bin/env bash
# Sets up what the tests need and runs all of them, notebooks first:  bash scripts/test.sh
# Arguments go to pytest. VENV names another directory than .venv-test, PYTHON another Python than python3, WORKERS another number of
# notebooks at a time than there are cores. With CI=true nothing may be missing; otherwise what cannot be had is said and left out.
# shellcheck disable=SC2317
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

VENV=${VENV:-$PWD/.venv-test}
stage() {  # stage TITLE COMMAND...: run it, and say how long it took
    local t=$SECONDS; say "$1"; shift
    "$@" || return
    printf '   %d s\n' $((SECONDS - t))
}

programs() {
    local ok=0
    packages openssh-server/sshd openssh-client/ssh                             || ok=1   # hosts
    packages iproute2/ip nftables/nft procps/ps sudo/sudo faketime/faketime     || ok=1   # links, firewalls, other users, clocks
    packages r-cran-irkernel                                                    || ok=1   # R kernels
    packages default-jdk-headless/javac maven/mvn                               || ok=1   # Spark, YARN and Scala kernels
    return $ok
}
environment() {
    local made
    made=$VENV/installed-$(cat settings.ini setup.py pyproject.toml | cksum | tr ' ' -)
    [ ! -e "$made" ] || return 0
    venv "$VENV" && "$VENV/bin/python" -m pip install --quiet -e '.[dev,spark]' && touch "$made"
}
notebooks() {  # each from top to bottom, in a home of its own
    mkdir -p "$work/home"
    env HOME="$work/home" XDG_CACHE_HOME="${XDG_CACHE_HOME:-$HOME/.cache}" MPLBACKEND=agg nbdev-test --n_workers "${WORKERS:-$(nproc)}" --timing
}

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
failed=
stage "Programs" programs || { [ "${CI:-}" != true ] || exit 1; left=1; }
stage "Python packages, in $VENV" environment
export PATH=$VENV/bin:$PATH
stage "Notebooks" notebooks || failed=1
[ -z "${left:-}" ] || loud "Programs are missing (above): the tests that need them are skipped, and listed as such"
[ -z "$failed" ]   || loud "A notebook failed (above)"
say "Tests"
python -m pytest tests "$@" || failed=1
[ -z "$failed" ]
