#!/usr/bin/env bash
# Gathers what tools/gpu_plan.sh needs on a machine without a network: wheels that it lacks and CIFAR-100, in parts
# small enough for one transfer each.
set -euo pipefail

has="accelerate numba pytest scikit-learn tensorboard timm torch torchvision triton"
usage() {
    cat <<USAGE
usage: tools/gpu_bundle.sh [--python 3.12] [--mib 60] [--cifar100 FILE.npz] [--lacks "NAME ..."] OUT

  --python VERSION   of the machine with the GPU (default: 3.12)
  --mib N            that a part may have at most (default: 60)
  --cifar100 FILE    x_train, y_train, x_test, y_test; without it run 3 has no data
  --lacks NAMES      packages to bring, in the versions of requirements.lock (default: what an image lacks that has
                     $has)

There, in a checkout:  tools/gpu_plan.sh receive OUT/part1 (and each further part), then  tools/gpu_plan.sh 1
USAGE
}

root=$(cd "$(dirname "$0")/.." && pwd)
export PATH=$PATH:$root/.venv/bin
version=3.12
mib=60
cifar100=
out=
# typing-extensions it has, but maybe an older one than pydantic needs.
lacks="deepspeed einops hjson msgpack pydantic pydantic-core annotated-types typing-extensions typing-inspection submitit ffcv"
lacks+=" pytorch-metric-learning"
built="deepspeed ffcv" # from source; their wheels serve every Python
extra=(lightly==1.6.0 lightning-utilities==0.15.3) # measured against, and not in requirements.lock

fail() { printf 'gpu_bundle: %s\n' "$*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --python | --mib | --cifar100 | --lacks)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in --python) version=$2 ;; --mib) mib=$2 ;; --cifar100) cifar100=$2 ;; --lacks) lacks=$2 ;; esac
            shift 2
            ;;
        -h | --help) usage; exit 0 ;;
        -*) usage >&2; fail "unknown argument $1" ;;
        *) [ -z "$out" ] || fail "one folder, not both $out and $1"; out=$1; shift ;;
    esac
done
[ -n "$out" ] || { usage >&2; fail "a folder for the parts is needed"; }
[ -z "$cifar100" ] || [ -f "$cifar100" ] || fail "--cifar100 $cifar100: no such file"
! compgen -G "$out/part*" >/dev/null || fail "$out already holds parts; choose another folder, or remove them"
mkdir -p "$out/wheels"

pin() { grep -i "^$1==" "$root/requirements.lock" | head -n 1 | cut -d' ' -f1; }
sources=() wheels=("${extra[@]}")
for name in $lacks; do
    found=$(pin "$name") && [ -n "$found" ] || fail "--lacks $name: not in requirements.lock"
    if [[ " $built " == *" $name "* ]]; then sources+=("$found"); else wheels+=("$found"); fi
done

if [ ${#sources[@]} -gt 0 ]; then
    printf '%s\n' "${sources[@]}" >"$out/sources.txt"
    "$root/tools/build_wheelhouse.sh" --requirements "$out/sources.txt" "$out/built"
    cp "$out"/built/*.whl "$out/wheels"
fi
platforms=()
for glibc in 28 27 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 -d "$out/wheels" "${wheels[@]}" ||
    fail "not all wheels for Python $version could be had (reason above)"

limit=$((mib * 1024 * 1024))
taken=$(cat "$out"/wheels/*.whl | wc -c)
[ "$taken" -lt "$limit" ] || fail "the wheels alone have $((taken / 1048576)) MiB, more than --mib $mib"
mkdir "$out/part1"
mv "$out"/wheels/*.whl "$out/part1"
if [ -n "$cifar100" ]; then
    python3 - "$cifar100" "$out/cifar100.npz" <<'PYTHON' || fail "--cifar100 $cifar100 cannot be used (reason above)"
import sys
import numpy as np
with np.load(sys.argv[1]) as archive:
    np.savez_compressed(sys.argv[2], **{name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")})
PYTHON
    (cd "$out" && sha256sum cifar100.npz >part1/cifar100.sha256)
    size=$(wc -c <"$out/cifar100.npz")
    part=1 start=0 room=$((limit - taken - 4096))
    while [ "$start" -lt "$size" ]; do
        mkdir -p "$out/part$part"
        piece=$out/part$part/cifar100.npz.$(printf %02d "$part")
        tail -c +$((start + 1)) "$out/cifar100.npz" | head -c "$room" >"$piece" || true # head ends tail
        start=$((start + room)) room=$limit part=$((part + 1))
    done
fi
rm -rf "$out/wheels" "$out/built" "$out/sources.txt" "$out/cifar100.npz"
echo "parts, bytes:"
for folder in "$out"/part*; do echo "    $folder $(cat "$folder"/* | wc -c): $(ls "$folder" | xargs)"; done
