#!/usr/bin/env bash
# Sets up, then runs the linters, the layering contracts and the whole test suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh --with-slurm
export PATH=$PWD/.venv/bin:$PATH

ruff check .
ruff format --check .
lint-imports
pytest "$@"
