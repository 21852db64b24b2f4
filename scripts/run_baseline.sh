#!/usr/bin/env bash
# The unquantized policy alone.
# Sets the machine up if needed, then runs; every argument is handed on (--set suite=libero_spatial, --out DIR, …).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
exec "$here/../.venv/bin/qlibero" run "$here/../configs/experiments/baseline.yaml" "$@"
