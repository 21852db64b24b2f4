#!/usr/bin/env bash
# Everything qlibero needs: system libraries where this may install them, a virtual environment, pinned packages.
# Asks for the things, not for who installed them. Costs half a second when nothing is to be done; may be stopped at any
# moment and started again, and started twice at once.
#   usage: scripts/setup.sh [--test | --login-node | --repair]
#     --test         also what the tests drive       --login-node   episodes run elsewhere: nothing that renders
#     --repair       every installed file is looked at, and what is not whole is installed again
#   TORCH_INDEX      a package index (or a directory of wheels) to take torch from, e.g. one of torch's own for a CUDA release
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$@" >&2; }
stop() { say "$@"; exit 1; }
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }
[[ $(uname -s) == Linux ]] ||
    stop "needs Linux, and this is $(uname -s): there, in a container (containers/build.sh makes the image; it has no GPU on a Mac), or in WSL 2"
locks=(requirements.txt)
case "${1:-}" in
    --test) locks+=(requirements-test.txt) ;;
    --repair) [[ ! -d .venv || -e .venv/.unfinished ]] || echo installing >.venv/.unfinished ;;
    --login-node | "") ;;
    *) say "there is no $1: scripts/setup.sh [--test | --login-node | --repair]"; exit 2 ;;
esac

python=
for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$(command -v "$name"); break; fi
done

# ---- the system's part: what is wanting, and who may install it
missing=() blind=
[[ -n $python ]] || missing+=(python3 python3-venv)
if [[ -n $python && ! -x .venv/bin/python ]] && ! "$python" -c 'import ensurepip' 2>/dev/null; then
    missing+=("$(basename "$(readlink -f "$python")")-venv")
fi
if [[ "${1:-}" != --login-node ]]; then
    if ! blind=$("${python:-false}" -I src/qlibero/sim/egl.py 2>&1 | tail -1); then missing+=(libegl1 libegl-mesa0 libgl1-mesa-dri libgl1); fi
    has ffmpeg || missing+=(ffmpeg)
fi
if [[ "${1:-}" == --test ]]; then                                       # a real browser and a real Slurm
    has chromium || missing+=(chromium)
    has slurmctld || missing+=(slurm-wlm)
    has munged || missing+=(munge)
fi
if ((${#missing[@]})); then
    root=(false)
    if [[ $EUID -eq 0 ]]; then root=(env)
    elif has sudo; then root=(sudo); [[ -t 0 ]] || root+=(-n); fi        # asks for a password only where somebody can type it
    if has apt-get && "${root[@]}" true 2>/dev/null; then
        say "installing system packages: ${missing[*]}"
        log=$(mktemp)
        if "${root[@]}" apt-get update -qq >"$log" 2>&1 && "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then missing=() blind=; else tail -20 "$log" >&2; fi
        rm -f "$log"
    fi
fi
if ((${#missing[@]})); then
    say "not here, and this may not install it: ${missing[*]}"
    [[ -z $blind ]] || say "  $blind. Episodes need that on the machine they run on; plan, sweep, report and a login node do not"
    say "get it in one of three ways (docs/clusters.md, \"Without root\"):" \
        "  whoever administers this machine:  apt-get install ${missing[*]}" \
        "  in a conda environment:            conda install -c conda-forge python=3.11 'mesalib<25.1' ffmpeg" \
        "  in a container:                    containers/build.sh"
fi
[[ -n $python ]] || python=$(command -v python3.11 || command -v python3 || true)
[[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "needs Python 3.11 or newer, found ${python:+$("$python" -V)}${python:-none} (clusters: module load python; conda create -n py311 python=3.11)"

# ---- the packages' part
site=.venv/lib/python3*/site-packages
ready() {
    [[ -x .venv/bin/qlibero && ! -e .venv/.unfinished ]] && cmp -s pyproject.toml .venv/.installed-qlibero || return 1
    for lock in "${locks[@]}"; do cmp -s "$lock" ".venv/.installed-$lock" || return 1; done
}
pip() {   # pip's own words go to a file; every ten seconds, how far it is
    local what=$1 total=$2 began=$SECONDS next=10 pid; shift 2
    # --use-pep517: pip before 23.1, as Debian 12 has it, would run setup.py itself and record no file's hash
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --use-pep517 "$@" >.venv/pip.log 2>&1 & pid=$!
    while kill -0 $pid 2>/dev/null; do
        sleep 0.5
        ((SECONDS - began >= next)) || continue
        ((next += 10))
        if grep -q '^Installing collected' .venv/pip.log; then say "  $what: $(ls -d $site/*.dist-info | wc -l) packages in place, $((SECONDS - began)) s"
        else say "  $what: $(grep -c '^Collecting\|^Requirement already' .venv/pip.log) of $total fetched, $((SECONDS - began)) s"; fi
    done
    wait $pid || { grep -v '^Collecting\|^  Downloading\|^Requirement' .venv/pip.log | tail -30 >&2; stop "pip could not install $what (all it said: .venv/pip.log)"; }
}

if ! ready; then
    owner=$(cat $site/*qlibero*.pth 2>/dev/null || true)                  # linked from another checkout, which would run our code
    [[ ! -L .venv || ! -d $owner || $owner -ef src ]] ||
        stop ".venv is the environment of ${owner%/src}, linked here: run its scripts/setup.sh, or rm .venv for one of your own"
    lockfile=$(readlink -f .venv).lock
    exec 9<>"$lockfile"
    flock -n -E 75 9 || case $? in
        75) say "waiting for another setup of this checkout: $(cat "$lockfile")"; flock 9 ;;
        *) say "this file system has no locks: see that only one setup runs at a time" ;;
    esac
    printf 'process %s on %s since %(%H:%M:%S)T\n' $$ "$HOSTNAME" -1 >"$lockfile"
fi
if ! ready; then                                                        # the one waited for may have done it
    if [[ ! -x .venv/bin/python || "$(cat .venv/.unfinished 2>/dev/null)" == creating ]]; then
        ((${#missing[@]} == 0)) || "$python" -c 'import ensurepip' 2>/dev/null ||
            stop "$python cannot make virtual environments: it lacks ensurepip (see above; conda's Python has it)"
        say "creating .venv with $("$python" -V)"
        mkdir -p .venv && echo creating >.venv/.unfinished
        find -H .venv -mindepth 1 -maxdepth 1 ! -name .unfinished -exec rm -rf {} +
        "$python" -m venv .venv
    elif [[ -e .venv/.unfinished ]]; then
        say "the last setup did not come to its end, or --repair: looking at every file"
        rm -f .venv/.installed-*
        .venv/bin/python -I scripts/damaged.py >&2
    fi
    echo installing >.venv/.unfinished
    rm -rf $site/*.egg-info                                               # what was installed without such a record comes again
    if [[ -n ${TORCH_INDEX:-} ]]; then
        if [[ -d $TORCH_INDEX ]]; then from=(--no-index --find-links "$TORCH_INDEX"); else from=(--index-url "$TORCH_INDEX"); fi
        pip torch 1 --no-deps "${from[@]}" "$(grep '^torch==' requirements.txt)"
    fi
    for lock in "${locks[@]}"; do
        say "installing the $(grep -c == "$lock") pinned packages of $lock"
        # No dependency is looked for: the lock has them all, and has a headless OpenCV where packages ask for one with windows.
        if [[ -d $(echo $site/opencv_python-*.dist-info) ]]; then         # both are the one folder cv2
            .venv/bin/python -m pip uninstall -qy opencv-python opencv-python-headless 2>/dev/null
        fi
        cp "$lock" ".venv/.installing-$lock"                              # a lock that changes meanwhile is not what was installed
        pip "$lock" "$(grep -c == "$lock")" --no-deps --requirement ".venv/.installing-$lock"
    done
    torch=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" $site/torch/version.py 2>/dev/null || true)
    [[ -z $torch ]] || pip "what this build of torch needs" 20 "torch==$torch"    # a CUDA build's libraries depend on the build
    pip qlibero 1 --no-deps --editable .
    cp pyproject.toml .venv/.installed-qlibero
    for lock in "${locks[@]}"; do mv ".venv/.installing-$lock" ".venv/.installed-$lock"; done
    rm .venv/.unfinished
    say "done. The command is ./qlibero (or, in this shell: source .venv/bin/activate)"
fi
