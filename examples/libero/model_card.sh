#!/usr/bin/env bash
# Every measured number of the model card, again: success, quantization, sight. Continues where it stopped.
#   examples/libero/model_card.sh [OUT] [PROCESSES]      (defaults: logs/model_card, and one per core)
# Some 9,000 episodes: days of a laptop; an earlier 5,700 took 20 minutes of 60 cores beside GPUs that render.
# The blind twin's rows need its checkpoint in BLIND (default logs/blind/snapshot; examples/libero/README.md trains it).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-logs/model_card} processes=${2:-$(nproc)} blind=${BLIND:-logs/blind/snapshot}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=1

sweep() { "$python" -m qlibero.cli sweep "$1" --engine local --out "$2" --set policy.device=cpu --set workers=1 --set launch.processes="$processes" "${@:3}"; }
controls() {   # a process per task
    seq 0 9 | xargs -P "$processes" -I TASK "$python" examples/libero/controls.py --out "$out/controls.jsonl" --tasks TASK "$@"
}
sweep configs/sweeps/model_card.yaml "$out/success" --set launch.shard_episodes=25
sweep configs/experiments/cliff.yaml "$out/quantization" --set launch.shard_episodes=4
for suite in libero_object libero_spatial; do
    controls --checkpoint examples/libero/embedded --suite $suite
    controls --checkpoint examples/libero/embedded --suite $suite --displaced 0.03 0.08
    if [[ -d $blind ]]; then
        controls --checkpoint "$blind" --blind --suite $suite
        controls --checkpoint "$blind" --blind --suite $suite --displaced 0.03 0.08
    fi
done
"$python" examples/libero/card.py "$out"
