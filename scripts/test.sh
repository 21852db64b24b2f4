#!/usr/bin/env bash
# Sets the machine up (the tests' components too), then runs the tests; every argument is handed on to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" --test
cd "$here/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"   # two processes; the tests of a file stay together
