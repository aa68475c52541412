#!/usr/bin/env bash
# Sets up all that varscale needs: system packages, a .venv with the exact versions of requirements.lock, an FFCV build.
# Run it as often as you like: what is already there is left alone.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: tools/setup.sh [--wheelhouse DIR] [--with-slurm] [--check]

  --wheelhouse DIR  install from a folder made by tools/build_wheelhouse.sh, without network, compiler or root
  --with-slurm      install Slurm, too, for its tests (as root, on Debian or Ubuntu; otherwise say what is missing)
  --check           say what is missing, change nothing (exit 2 if anything is)

environment: PYTHON  the interpreter to build .venv with (3.11 or later)
USAGE
}

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
venv=$root/.venv
stamp=$venv/.varscale-setup
lock=requirements.lock
disk_needed_gib=8
packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
slurm_packages=(slurm-wlm munge)
wheelhouse=
with_slurm=
check=

fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }
say() { printf '\033[1msetup:\033[0m %s\n' "$*"; }

while [ $# -gt 0 ]; do
    case $1 in
        --wheelhouse) [ $# -gt 1 ] || fail "--wheelhouse needs a folder"; wheelhouse=$2; shift 2 ;;
        --with-slurm) with_slurm=1; shift ;;
        --check) check=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown argument $1" ;;
    esac
done
if [ -n "$wheelhouse" ]; then
    [ -d "$wheelhouse" ] || fail "--wheelhouse $wheelhouse: no such folder"
    wheelhouse=$(cd "$wheelhouse" && pwd)
fi

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
install_packages() {
    say "installing system packages: $*"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Only tests need Slurm, and they say so where it is missing: nothing else waits for it.
have_slurm() { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null
if [ -n "$with_slurm" ] && [ -z "$check" ] && ! have_slurm; then
    can_install && install_packages "${slurm_packages[@]}" ||
        say "Slurm is not installed: its tests will be skipped. As root: apt-get install ${slurm_packages[*]}" >&2
fi

# What .venv was made from. A changed lock, interpreter or checkout location makes it stale.
fingerprint() { { sha256sum <"$lock"; echo "$root"; "$venv/bin/python" -V; } 2>/dev/null | sha256sum | cut -d' ' -f1; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
    exit 0
fi

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

# The library alone, as varscale does: `import ffcv` imports OpenCV too, which wants X11 and OpenGL of the system.
load_ffcv() {
    "$venv/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$venv"/lib/python3*/site-packages/ffcv/_libffcv*.so
}
have_ffcv() { load_ffcv 2>/dev/null; }
ffcv_wheel() { [ -n "$wheelhouse" ] && compgen -G "$wheelhouse/ffcv-*.whl" >/dev/null; }

# FFCV is compiled here unless it is installed or comes as a wheel: that takes a compiler, OpenCV and TurboJPEG.
missing_packages() {
    have_ffcv || ffcv_wheel && return
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || { echo pkg-config libopencv-dev libturbojpeg0-dev; return; }
    pkg-config --exists opencv4 || echo libopencv-dev
    pkg-config --exists libturbojpeg || echo libturbojpeg0-dev
}

free_gib() { df -Pk "$root" | awk 'NR == 2 {print int($4 / 1048576)}'; }

python=$(find_python)
missing=$(missing_packages | xargs)

if [ -n "$check" ]; then
    [ -n "$python" ] || echo "missing: python 3.11 or later"
    [ -z "$missing" ] || echo "missing system packages: $missing"
    [ -z "$with_slurm" ] || have_slurm || echo "missing for the tests of Slurm: ${slurm_packages[*]}"
    echo "missing or out of date: $venv"
    exit 2
fi

[ -n "$python" ] || fail "python 3.11 or later is needed; install one (Debian: apt-get install python3 python3-venv) or set PYTHON"

if [ -n "$missing" ]; then
    if can_install; then
        # shellcheck disable=SC2086
        install_packages $missing
    else
        cat >&2 <<MISSING
setup: FFCV is compiled on this machine, and these system packages are missing: $missing
setup: either  have an administrator run:  apt-get install ${packages[*]}
setup: or      with conda, no administrator:  conda install -c conda-forge cxx-compiler pkg-config opencv libjpeg-turbo
setup: or      on another machine run tools/build_wheelhouse.sh DIR, and here:  tools/setup.sh --wheelhouse DIR
MISSING
        exit 2
    fi
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    free=$(free_gib)
    [ "$free" -ge "$disk_needed_gib" ] || fail "$free GiB free on the disk of $root, but $disk_needed_gib GiB are needed"
fi

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "making .venv with $python"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python cannot make a virtual environment (Debian: apt-get install python3-venv)"
fi

# uv, not pip: it resolves torch and torchvision to builds of one kind, and takes seconds.
source_options=()
[ -z "$wheelhouse" ] || source_options=(--no-index --find-links "$wheelhouse")
if ! "$venv/bin/uv" --version >/dev/null 2>&1; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${source_options[@]}" "$(grep '^uv==' "$lock")" \
        || fail "uv could not be installed${wheelhouse:+; $wheelhouse must hold wheels of all of $lock, see --help} (reason above)"
fi
uv() { VIRTUAL_ENV=$venv "$venv/bin/uv" "$@"; }

say "installing the packages of $lock into .venv (about 5 GB)"
uv pip install --quiet "${source_options[@]}" "$(grep '^setuptools==' "$lock" | cut -d' ' -f1)"
uv pip install "${source_options[@]}" -r "$lock" || fail "the packages could not be installed (see above)"
uv pip install --quiet --no-deps --no-build-isolation "${source_options[@]}" -e . || fail "varscale itself could not be installed"

have_ffcv || fail "FFCV was installed but does not load: $(load_ffcv 2>&1 | tail -n 1)"
fingerprint >"$stamp"
say "ready: .venv/bin/python"
