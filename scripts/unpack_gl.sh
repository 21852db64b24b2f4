#!/usr/bin/env bash
# Software rendering without root, on a Debian or Ubuntu that has apt: its packages, unpacked into a directory of yours.
#   usage: scripts/unpack_gl.sh DIR     prints the lines to put into your shell's profile (and into launch.slurm.setup)
set -euo pipefail
[[ $# == 1 && $1 != -* ]] || { echo "usage: scripts/unpack_gl.sh DIR" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
wanted=(libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglapi-mesa)
names=$(apt-get install --simulate --no-install-recommends "${wanted[@]}" 2>/dev/null | awk '$1 == "Inst" {print $2}')
[[ -n $names ]] || { echo "apt has nothing to install: the libraries are here, or apt-get update was never run" >&2; exit 1; }
debs=$(mktemp -d)
trap 'rm -rf "$debs"' EXIT
(cd "$debs" && apt-get download -qq -o APT::Sandbox::User=root $names >&2)
for deb in "$debs"/*.deb; do dpkg -x "$deb" "$dir"; done
lib=$dir/usr/lib/$(dpkg --print-architecture | sed 's/amd64/x86_64/; s/arm64/aarch64/')-linux-gnu
echo "export LD_LIBRARY_PATH=$lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
echo "export LIBGL_DRIVERS_PATH=$lib/dri"
echo "export __EGL_VENDOR_LIBRARY_FILENAMES=$dir/usr/share/glvnd/egl_vendor.d/50_mesa.json"
