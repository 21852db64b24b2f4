#!/usr/bin/env bash
# The way without root (docs/clusters.md), tried where it is bare: a root file system of Debian's base packages and Python, in it
# an unprivileged user, no sudo, no OpenGL, no ffmpeg. About ten minutes, 4 GB, debootstrap and root; nothing is left behind.
#   usage: tests/rootless.sh [MIRROR]       PIP_* variables and a directory in PIP_FIND_LINKS are taken along
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v debootstrap >/dev/null && [[ $EUID == 0 ]] || { echo "rootless: not tried: needs debootstrap, and root to make the file system"; exit 77; }
if [[ -z ${ROOTLESS:-} ]]; then      # mounts live in a namespace of their own, and are gone before the folder is
    ROOTLESS=$(mktemp -d)
    export ROOTLESS
    trap 'rm -rf --one-file-system "$ROOTLESS"' EXIT
    unshare --mount --propagation private "${BASH_SOURCE[0]}" "$@"
    exit
fi
root=$ROOTLESS
say() { printf 'rootless: %s (%s s)\n' "$*" "$SECONDS"; }

if [[ -n ${ROOTLESS_BASE:-} ]]; then cp -a "$ROOTLESS_BASE/." "$root"
else debootstrap --variant=minbase --include=ca-certificates bookworm "$root" ${1:+"$1"} >/dev/null; fi
cp /etc/resolv.conf "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
if [[ -d ${PIP_FIND_LINKS:-} ]]; then mkdir -p "$root$PIP_FIND_LINKS"; cp "$PIP_FIND_LINKS"/* "$root$PIP_FIND_LINKS"; fi
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/shm" && chmod 1777 "$root/dev/shm" "$root/tmp"
for node in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9"; do
    read -r name major minor <<<"$node"
    [[ -e $root/dev/$name ]] || mknod -m 666 "$root/dev/$name" c "$major" "$minor"
done
chroot "$root" apt-get update -qq
chroot "$root" apt-get install -y -qq --no-install-recommends python3 python3-venv git >/dev/null
chroot "$root" useradd -m somebody
git clone -q "$checkout" "$root/home/somebody/qlibero"
chroot "$root" chown -R somebody: /home/somebody
as() { chroot --userspec=somebody "$root" env -i HOME=/home/somebody PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 \
    $(env | grep '^PIP_' || true) bash -c "cd ~/qlibero && $1"; }
must() { grep -q -- "$1" "$root/home/somebody/said" || { cat "$root/home/somebody/said"; echo "rootless: nothing said of: $1"; exit 1; }; }

say "a bare Debian with Python, and somebody without rights"
as 'id -u; ! command -v sudo; ! command -v ffmpeg; ! python3 -I src/qlibero/sim/egl.py' >/dev/null
as 'scripts/setup.sh 2>~/said'
must 'whoever administers this machine:  apt-get install libegl1'; must conda-forge; must containers/build.sh
say "setup went on without OpenGL and ffmpeg, and said three ways to get them"
as './qlibero plan llm_w4a8_fake >/dev/null 2>&1 && ./qlibero sweep configs/sweeps/methods_and_layouts.yaml --engine slurm --dry-run >/dev/null 2>&1'
say "plan and sweep --dry-run work"
as './qlibero doctor --json >~/said 2>&1 || true'
must 'the loader finds no libEGL.so.1'
as 'scripts/unpack_gl.sh ~/gl >~/gl.sh'
as '. ~/gl.sh && scripts/setup.sh 2>~/said'
! grep -q libegl1 "$root/home/somebody/said"
say "unpacked Mesa is found"
as '. ~/gl.sh && ./qlibero run baseline --set tasks=[0] --set episodes_per_task=1 --set max_steps=20 --set videos=0 --set tracking=[] \
    2>~/said >~/result' || { tail -30 "$root/home/somebody/said"; exit 1; }
grep -q '"complete": true' "$root/home/somebody/result"
say "an episode ran"
