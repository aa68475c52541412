#!/usr/bin/env bash
# Measures on a machine with a GPU and without a network, in runs of at most ten minutes: benchmarks/gpu.md.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: tools/gpu_plan.sh [--toy] first|1|2|3
       tools/gpu_plan.sh receive PART

  first         what is worth the most, in seven minutes and a half: our step beside two others, its profile, GPU tests
  1, 2, 3       kernels and loaders; the training step; CIFAR-100
  --toy         the same stages in small, on any machine
  receive PART  take over a part of what tools/gpu_bundle.sh made: wheels, and a piece of the data

environment: OUT      for the results: three files a run (default: gpu-results)
             WORK     for wheels, data and checkpoints (default: varscale-gpu in the folder for temporary files)
             PYTHON   with torch, torchvision, triton and what else the bundle leaves out (default: python3)
             LIMIT    seconds that all of this may take (default: 580); what does not fit is left out
             MINUTES  that run 3 trains (default: 5)
             CIFAR100 an .npz for run 3 that is there already (default: the bundle's)
USAGE
}

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(realpath -m "${WORK:-${TMPDIR:-/tmp}/varscale-gpu}")
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-gpu-results}")
fail() { printf 'gpu_plan: %s\n' "$*" >&2; exit 2; }

if [ "${1:-}" = receive ]; then
    [ $# = 2 ] && [ -d "$2" ] || { usage >&2; fail "receive needs the folder of one part"; }
    mkdir -p "$work/bundle"
    cp "$2"/* "$work/bundle"
    echo "$work/bundle holds $(find "$work/bundle" -type f | wc -l) files, $(du -sh "$work/bundle" | cut -f1)"
    exit 0
fi

options=()
if [ "${1:-}" = --toy ]; then options+=(--toy); shift; fi
case "${1:-}" in
    first | 1 | 2 | 3) run=$1 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "which run: first, 1, 2 or 3" ;;
esac

# Beside the machine's own packages, of which none is replaced.
if compgen -G "$work/bundle/*.whl" >/dev/null; then
    if [ ! -f "$work/site/complete" ] || [ -n "$(find "$work/bundle" -name '*.whl' -newer "$work/site/complete")" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site" "$work"/bundle/*.whl ||
            fail "the wheels in $work/bundle could not be installed (reason above)"
        touch "$work/site/complete"
    fi
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi

if [ "$run" = 3 ] && [ ${#options[@]} = 0 ]; then
    cifar100=$(realpath -m "${CIFAR100:-$work/cifar100.npz}")
    if [ -z "${CIFAR100:-}" ]; then
        [ -f "$work/bundle/cifar100.sha256" ] ||
            fail "run 3 needs CIFAR-100: tools/gpu_bundle.sh --cifar100 FILE.npz OUT, then receive each part"
        cat "$work"/bundle/cifar100.npz.* >"$cifar100"
        (cd "$work" && sha256sum --quiet -c bundle/cifar100.sha256) ||
            fail "CIFAR-100 is incomplete: receive every part of the bundle"
    fi
    options+=(--cifar100 "$cifar100")
fi

cd "$root"
options+=(--minutes "${MINUTES:-5}" --seconds $((${LIMIT:-580} - SECONDS))) # SECONDS: since this began
exec "$python" tools/gpu_plan.py "$run" "${options[@]}" --out "$out" --work "$work/run-$run"
