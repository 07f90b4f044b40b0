#!/usr/bin/env bash
# Installs the package into a virtual environment and runs the demo:  bash scripts/demo.sh
# Arguments go to `jupyter ssh-spec demo`. VENV names another directory than .venv-demo, PYTHON another Python than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

VENV=${VENV:-$PWD/.venv-demo}
say "Installing into $VENV"
venv "$VENV"
rm -rf build   # what an earlier build left there would be installed too
"$VENV/bin/python" -m pip install --quiet '.[kernel]'
say "jupyter ssh-spec demo" "$@"
PATH=$VENV/bin:$PATH exec jupyter ssh-spec demo "$@"
