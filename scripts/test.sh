#!/usr/bin/env bash
# Sets the machine up (the tests' components too), then runs the tests; every argument is handed on to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" --test
cd "$here/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
# Two processes, the tests of a file together. Purity fills both cores by itself and would starve tests that watch a clock.
.venv/bin/python -m pytest -n 2 --dist loadfile --ignore tests/test_purity.py
exec .venv/bin/python -m pytest tests/test_purity.py
