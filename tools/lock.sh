#!/usr/bin/env bash
# Writes requirements.lock from pyproject.toml: exact versions for every platform, no addresses. What is pinned stays at
# its version; with --upgrade, or --upgrade-package NAME, it does not.
set -euo pipefail
cd "$(dirname "$0")/.."

uv pip compile --quiet --universal --python-version 3.11 --extra ffcv --extra export --extra test \
    --no-emit-index-url --no-annotate --no-header --output-file requirements.lock "$@" pyproject.toml \
    <(printf '%s\n' 'torch==2.13.0' 'torchvision==0.28.0' 'setuptools' 'uv')
sed -i '1i # Exact versions of everything, made by tools/lock.sh; installed by tools/setup.sh.' requirements.lock
