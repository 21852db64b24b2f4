"""What Slurm's options mean in seconds, GPUs and gigabytes."""

from __future__ import annotations

from qlibero.config.launch import Slurm


def seconds(time: str) -> int:
    """Slurm's time formats in seconds: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = (parts + [0, 0])[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + secs
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def gpus_of(slurm: Slurm) -> float:
    """GPUs of a shard on Slurm, by whichever of the two options asks for them."""
    gpus = slurm.gpus
    return float(gpus.rpartition(":")[2]) if gpus else _gres_gpus(slurm.gres)


def _gres_gpus(gres: str | None) -> float:
    """GPUs in `gpu:1`, `gpu:h100:2`, `gpu`; 0 without."""
    gpus = 0.0
    for item in (gres or "").split(","):
        name, *rest = item.split(":")
        if name == "gpu":
            gpus += float(rest[-1]) if rest and rest[-1].isdecimal() else 1.0
    return gpus


def gigabytes(mem: str) -> float:
    """Slurm's memory formats (48G, 512M, a plain number of MB) in GB of 10^9 bytes."""
    number, unit = (mem[:-1], mem[-1]) if mem[-1] in "KMGT" else (mem, "M")
    return int(number) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit] / 1e9
