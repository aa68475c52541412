#!/usr/bin/env bash
# Sets up, then runs the linters, the layering contracts and the test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh --with-slurm
export PATH=$PWD/.venv/bin:$PATH
# Two losses are compared with lightly's; without its many dependencies, and where it cannot be had those tests skip.
VIRTUAL_ENV=$PWD/.venv uv pip install --quiet --no-deps lightly==1.6.0 lightning-utilities==0.15.3 || true

ruff check .
ruff format --check .
lint-imports
pytest "$@"
