#!/usr/bin/env bash
# Sets up, then runs the linters, the layering contracts and the whole test suite, two files at a time: many a test waits
# more than it computes. Arguments go to pytest (-n 0: one test after the other).
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh --with-slurm
export PATH=$PWD/.venv/bin:$PATH

ruff check .
ruff format --check .
lint-imports
pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
