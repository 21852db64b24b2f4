#!/usr/bin/env bash
# Methods × layouts as a Slurm array, with a merge job after it. Again: submits only what is missing. --dry-run shows all.
# usage: sweep_slurm.sh [SWEEP.yaml] [--set launch.slurm.partition=gpu …] [--out DIR] [--dry-run]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" --login-node   # the nodes render, this machine only submits
sweep="$here/../configs/sweeps/methods_and_layouts.yaml"
if [[ "${1:-}" == *.yaml ]]; then sweep=$1; shift; fi
exec "$here/../.venv/bin/qlibero" sweep "$sweep" --engine slurm "$@"
