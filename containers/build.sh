#!/usr/bin/env bash
# Builds the container image from the files that git tracks here, and writes it as an OCI archive where asked.
#   usage: containers/build.sh [--base IMAGE] [--torch cpu|cu130|URL|DIRECTORY] [--oci FILE] [-- BUILDER'S OPTIONS…]
#     --base    what it stands on, Debian or Ubuntu (debian:12-slim)     --torch  torch's index; a DIRECTORY holds wheels
#     --oci     for Apptainer: --oci qlibero.oci.tar, then apptainer build qlibero.sif containers/qlibero.def
#     after --  e.g. --volume /etc/pip.conf:/etc/pip.conf:ro, for a site's own mirror (podman and buildah)
# Takes docker where its daemon answers, else podman, else buildah, which needs neither a daemon nor (in its chroot) privileges.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stop() { printf 'build: %s\n' "$*" >&2; exit 2; }

base=debian:12-slim torch=cpu oci= options=()
while (($#)); do
    [[ $1 == -- ]] && { shift; options+=("$@"); break; }
    case $1 in --base | --torch | --oci) [[ -n ${2:-} ]] || stop "$1 wants a value" ;; *) stop "there is no $1: --base, --torch, --oci, --" ;; esac
    declare "${1#--}=$2"
    shift 2
done
if docker info >/dev/null 2>&1; then builder=(docker build)
elif command -v podman >/dev/null; then builder=(podman build)
elif command -v buildah >/dev/null; then builder=(buildah build --isolation chroot)
else stop "needs docker (with its daemon), podman or buildah (apt-get install buildah)"; fi
case $torch in
    *://*) index=$torch ;;
    */*)
        [[ -d $torch && ${builder[0]} != docker ]] || stop "--torch $torch: a directory that is there, and podman or buildah, which can mount it"
        index=/torch options+=(--volume "$(readlink -f "$torch"):/torch:ro") ;;
    *) index=https://download.pytorch.org/whl/$torch ;;
esac

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git ls-files -z | grep -zv '^tests/\|^docs/\|^examples/report/' | tar --null --files-from - -cf - | tar -xf - -C "$context"
mkdir -p "$context/logs"
SECONDS=0
"${builder[@]}" -f containers/Dockerfile -t qlibero --build-arg "BASE=$base" --build-arg "TORCH_INDEX=$index" "${options[@]}" "$context" >&2
echo "build: image qlibero in $SECONDS s" >&2
if [[ -n $oci ]]; then
    case ${builder[0]} in
        docker) docker save qlibero -o "$oci" ;;
        podman) podman save --format oci-archive -o "$oci" qlibero ;;
        buildah) buildah push -q qlibero "oci-archive:$oci:qlibero" ;;
    esac
    echo "build: $oci, $(stat -c %s "$oci" | numfmt --to=iec)" >&2
fi
