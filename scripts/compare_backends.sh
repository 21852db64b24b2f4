#!/usr/bin/env bash
# Every backend this machine can run, on the same episodes, and a verdict for each.
# Sets the machine up if needed, then runs; every argument is handed on (--set suite=libero_spatial, --out DIR, …).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
exec "$here/../.venv/bin/qlibero" run "$here/../configs/experiments/compare_backends.yaml" "$@"
