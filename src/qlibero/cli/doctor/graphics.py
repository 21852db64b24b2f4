"""Do the GPU, its driver and toolkit, the renderer and the kernels work?"""

from __future__ import annotations

import os
from collections.abc import Mapping

from qlibero.cli.doctor.finding import Finding
from qlibero.errors import GL_HINT
from qlibero.machine import environment, record
from qlibero.machine.cuda_toolkit import site_packages, torch_cuda

CUDA_TORCH = "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}  # NVIDIA's minimum driver for each CUDA major


def driver(gpus: list[dict[str, str]] | None = None, cuda: str | None = None) -> list[Finding]:
    """Driver against torch's CUDA. `gpus`, `cuda`: as `find_gpus` and `torch_cuda` say."""
    if gpus is None:
        gpus, cuda = environment.find_gpus(), torch_cuda(site_packages())
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
        return Finding("CUDA toolkit", "fail", agreed.problem, agreed.hint or "")
    if chosen.home is None:
        return Finding("CUDA toolkit", "ok", chosen.why)
    cuda = torch_cuda(site_packages())
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
    gl = record.gl_renderer(own) if gl is None else gl
    if "problem" in gl:
        return [
            Finding(
                "rendering",
                "fail",
                f"{own['MUJOCO_GL']}: {gl['problem']}",
                f"{GL_HINT}; or MUJOCO_GL=osmesa, where that is installed",
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
