#!/usr/bin/env bash
# DuQuant W4A8 through a real packed int4 kernel, beside fake quantization and full precision.
# Sets the machine up if needed, then runs; every argument is handed on (--set suite=libero_spatial, --out DIR, …).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
exec "$here/../.venv/bin/qlibero" run "$here/../configs/experiments/llm_w4a8.yaml" "$@"
