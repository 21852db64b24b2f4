#!/usr/bin/env bash
# Everything qlibero needs on a fresh Debian or Ubuntu machine: system libraries, a virtual environment, pinned packages.
# Idempotent, asks nothing, costs a fraction of a second when nothing is to be done.   usage: scripts/setup.sh [--test]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

locks=(requirements.txt)
apt_packages=(libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 ffmpeg)   # headless rendering and rollout videos
if [[ "${1:-}" == --test ]]; then
    locks+=(requirements-test.txt)
    apt_packages+=(chromium slurm-wlm munge)                        # the tests drive a real browser and a real Slurm
fi
say() { printf 'setup: %s\n' "$*" >&2; }
as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi; }
installed() { dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }

missing=()
for package in "${apt_packages[@]}"; do installed "$package" || missing+=("$package"); done
python=$(command -v python3.11 || command -v python3 || true)
[[ -n $python ]] || missing+=(python3 python3-venv)
if [[ -n $python && ! -x .venv/bin/python ]] && ! "$python" -c 'import ensurepip' 2>/dev/null; then
    missing+=("$(basename "$(readlink -f "$python")")-venv")
fi
if ((${#missing[@]})); then
    command -v apt-get >/dev/null || { say "needs ${missing[*]}, and there is no apt-get here: install them and run again"; exit 1; }
    say "installing system packages: ${missing[*]}"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

python=$(command -v python3.11 || command -v python3)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "needs Python 3.11 or newer, found $("$python" -V)"; exit 1; }
[[ -x .venv/bin/python ]] || { say "creating .venv with $("$python" -V)"; "$python" -m venv .venv; }
for lock in "${locks[@]}"; do
    stamp=.venv/.installed-$lock
    cmp -s "$lock" "$stamp" && continue
    say "installing $(grep -c == "$lock") pinned packages of $lock"
    .venv/bin/pip install --quiet --disable-pip-version-check --requirement "$lock" 2>.venv/pip.log ||
        { cat .venv/pip.log >&2; exit 1; }
    cp "$lock" "$stamp"
done
site=$(echo .venv/lib/python3.*/site-packages)
if grep -q "^cuda.*= *'" "$site/torch/version.py" 2>/dev/null && [[ ! -d $site/nvidia ]]; then   # a CUDA build's libraries depend on the build
    say "installing the CUDA libraries of this torch"
    .venv/bin/pip install --quiet --disable-pip-version-check "torch==$(sed -n "s/^__version__ = '\(.*\)'/\1/p" "$site/torch/version.py")"
fi
if ! cmp -s pyproject.toml .venv/.installed-qlibero; then
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable . 2>.venv/pip.log || { cat .venv/pip.log >&2; exit 1; }
    cp pyproject.toml .venv/.installed-qlibero
fi
