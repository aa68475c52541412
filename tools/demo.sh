#!/usr/bin/env bash
# From nothing to two measured encoders: sets up, converts the digits, trains with VarCon and with VSSL, evaluates both
# beside honest baselines, prints one table and writes a report. Minutes on two cores; run it again and it goes on where
# it stands.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") ;;
    --fresh) rm -rf runs/demo data/digits ;;
    *) echo "usage: tools/demo.sh [--fresh]   (--fresh: delete data/digits and runs/demo first)" >&2; exit 2 ;;
esac

tools/setup.sh
export PATH=$PWD/.venv/bin:$PATH
started=$SECONDS
step() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - started)) "$*"; }

if [ ! -f data/digits/dataset.json ]; then
    step "converting scikit-learn's handwritten digits to FFCV"
    python tools/convert_dataset.py digits data/digits
fi

for objective in varcon vssl; do
    step "training with $objective"
    deepspeed varscale/train.py --config "digits-$objective" "output_dir=runs/demo/$objective" --resume auto
done

step "evaluating both, and the baselines"
python -m varscale.evaluate --checkpoint runs/demo/varcon --data data/digits knn linear_cached --baselines >/dev/null
python -m varscale.evaluate --checkpoint runs/demo/vssl --data data/digits knn linear_cached >/dev/null

step "result"
python -m varscale.report runs/demo/varcon runs/demo/vssl --out runs/demo/report
