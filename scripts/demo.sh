#!/usr/bin/env bash
# Installs the package into a virtual environment and runs the demo:  bash scripts/demo.sh
# Arguments go to `jupyter ssh-spec demo`. VENV names another directory than .venv-demo, PYTHON another Python than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

VENV=${VENV:-$PWD/.venv-demo}
say "Installing into $VENV"
venv "$VENV"
"$VENV/bin/python" -m pip install --quiet '.[kernel]'
say "jupyter ssh-spec demo" "$@"
PATH=$VENV/bin:$PATH exec jupyter ssh-spec demo "$@"
