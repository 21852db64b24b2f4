#!/usr/bin/env bash
# Sets the machine up (the tests' components too), then the linter, the types and the tests; arguments go to pytest alone.
# --fast: only what starts no simulator and is not slow. With further arguments pytest alone again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" --test
cd "$here/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
tier=()
if [[ ${1:-} == --fast ]]; then
    tier=(-m "not libero and not slow")
    shift
fi
if (($#)); then
    exec .venv/bin/python -m pytest "${tier[@]}" "$@"
fi
builder=$(command -v podman || command -v buildah || command -v docker || true)
echo "test: the container image is not built here, for it takes minutes; containers/build.sh does, with ${builder:-docker, podman or buildah: none is here}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python scripts/check_types.py
if ((${#tier[@]})); then
    exec .venv/bin/python -m pytest -q -n 2 --dist loadfile "${tier[@]}"
fi
# Two processes, the tests of a file together. Purity fills both cores by itself and would starve tests that watch a clock.
.venv/bin/python -m pytest -n 2 --dist loadfile --ignore tests/test_purity.py
exec .venv/bin/python -m pytest tests/test_purity.py
