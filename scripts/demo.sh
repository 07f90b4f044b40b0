#!/usr/bin/env bash
# Installs the package into a virtual environment and runs the demo:  bash scripts/demo.sh
# Arguments go to `jupyter ssh-spec demo`. VENV names another directory than .venv-demo, PYTHON another Python than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

VENV=${VENV:-$PWD/.venv-demo}
say "Installing into $VENV"
venv "$VENV"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT   # where it is built, so that nothing stays here, and nothing of an earlier build is installed
printf '[build]\nbuild_base=%s\n[egg_info]\negg_base=%s\n' "$work" "$work" >"$work/setup.cfg"
DIST_EXTRA_CONFIG=$work/setup.cfg "$VENV/bin/python" -m pip install --quiet '.[kernel]'
rm -rf "$work"
say "jupyter ssh-spec demo" "$@"
PATH=$VENV/bin:$PATH exec jupyter ssh-spec demo "$@"
