#!/usr/bin/env bash
# Writes requirements.lock anew from pyproject.toml: exact versions for every platform, no addresses.
set -euo pipefail
cd "$(dirname "$0")/.."

{
    echo "# Exact versions of everything, made by tools/lock.sh; installed by tools/setup.sh."
    uv pip compile --quiet --universal --python-version 3.11 --extra ffcv --extra export --extra test \
        --no-emit-index-url --no-annotate --no-header pyproject.toml \
        <(printf '%s\n' 'torch==2.13.0' 'torchvision==0.28.0' 'setuptools' 'uv')
} >requirements.lock.new
mv requirements.lock.new requirements.lock
