#!/usr/bin/env bash
# The whole way from nothing to a policy that acts, small: one task, a few minutes on one CPU core.
#   examples/libero/tutorial.sh [OUT] [EPISODES] [STEPS]      (defaults: logs/tutorial 6 120)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-logs/tutorial} episodes=${2:-6} steps=${3:-120}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} LP_NUM_THREADS=${LP_NUM_THREADS:-0}

step() { echo; echo "== $1"; shift; "$python" "$@"; }
step "1. An expert makes demonstrations (physics only)" examples/libero/demonstrations.py \
    --suite libero_object --tasks 2 --episodes "$episodes" --out "$out/demonstrations"
step "2. They get their pixels" examples/libero/frames.py \
    --suite libero_object --tasks 2 --demonstrations "$out/demonstrations" --out "$out/frames"
step "3. A tiny pi0.5 is trained on them" examples/libero/train.py \
    --frames "$out/frames" --out "$out/training" --size tiny --steps "$steps" --batch 16 --capacity 2000 --evaluate-every 15
step "4. It becomes a checkpoint, with calibration data" examples/libero/export.py \
    --snapshot "$out/training/snapshot" --to "$out/checkpoint" --suites libero_object --tasks 2
step "5. It acts (so little training solves nothing yet)" examples/libero/controls.py \
    --checkpoint "$out/checkpoint" --suite libero_object --tasks 2 --episodes 1
