"""What `qlibero ls` lists: all that can be plugged in, and suites, policies, backends, experiments and artifacts more
closely, each as plain rows for a table and for JSON."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qlibero.config.schema import Experiment
from qlibero.config.yaml_text import short
from qlibero.documents import JsonObject
from qlibero.errors import QliberoError
from qlibero.places import CHECKOUT, CONFIGS
from qlibero.registry import BUILT_IN, KINDS, KernelPlugin, SuitePlugin, every, get, problems

if TYPE_CHECKING:
    from qlibero.kernels.contract import GemmShape

Rows = list[JsonObject]
# of the others there is more to say than they declare
KINDS_ONLY = (
    "methods",
    "corrections",
    "engines",
    "trackers",
    "sections",
)


def plugins() -> Rows:
    """Every plug-in of every kind, with where it comes from; and those that cannot be used, with the reason."""
    return [row for kind in KINDS for row in of_kind(kind)]


def of_kind(kinds: str) -> Rows:
    """The plug-ins of one kind (`methods`, `engines`, …). Nothing of them is imported."""
    kind = KINDS[kinds]
    rows: Rows = []
    for plugin in every(kind):
        missing = f" (needs {', '.join(plugin.missing)}, which is not installed)" if plugin.missing else ""
        about = plugin.about + missing
        rows.append(
            {"kind": kind.kind, "name": plugin.name, "here": not missing, "from": plugin.origin, "about": about}
        )
    rows += [{"kind": kind.kind, "name": "", "here": False, "from": "", "about": wrong} for wrong in problems(kind)]
    return rows


def suites() -> Rows:
    """The LIBERO suites with the constants of their published protocol, and what is installed under their names."""
    from qlibero.sim.libero_plus import INSTALL
    from qlibero.sim.physics_check import references
    from qlibero.sim.provenance import content
    from qlibero.sim.suites import SUITES

    known = references()
    missing = {name: ", ".join(f"needs {package}" for package in get(SuitePlugin, name).missing) for name in SUITES}
    return [
        {
            "suite": s.name,
            "tasks": s.tasks,
            "initial_states": s.inits,
            "max_steps": s.max_steps,
            "perturbs": s.base or s.variants_of or None,
            "instructions": s.instructions,
            "content": None if missing[s.name] or not find_spec("libero") else content(s.name),
            "reference": s.name in known,
            "from": f"{missing[s.name]}: {INSTALL}" if missing[s.name] else "built in",
        }
        for s in SUITES.values()
    ] + [
        {"suite": s.name, "tasks": s.tasks, "initial_states": s.inits, "max_steps": s.max_steps, "from": s.origin}
        for s in every(SuitePlugin)
        if s.origin != BUILT_IN
    ]


def protocols() -> Rows:
    """The published protocols that `explain-gap` knows."""
    from qlibero.results.protocols import protocols as published

    shown = ("replan_steps", "max_steps", "resolution", "mujoco", "seed")
    return [
        {
            "protocol": p.name,
            "of": p.about,
            **{name: p.constants[name].value if name in p.constants else None for name in shown},
        }
        for p in published().values()
    ]


def policies() -> Rows:
    """The policies under configs/policies, and whether their files are here."""
    from qlibero.config.yaml_source import read

    rows = []
    for path in sorted((CONFIGS / "policies").glob("*.yaml")):
        policy = read(path).data.get("policy", {})
        untrained = policy.get("untrained") or {}
        source = policy.get("url") or policy.get("checkpoint") or untrained.get("config") or ""
        here = "://" in source or (path.parent / source).exists()
        rows.append(
            {"policy": path.stem, "type": policy.get("type"), "here": here, "about": about(path), "file": _shown(path)}
        )
    return rows


def backends() -> Rows:
    """Every arm an experiment can list, and whether this machine can run it as W4A8 (else W8A8), with the reason."""
    devices = "cpu, cuda" if has_cuda() else "cpu"
    rows: Rows = [
        {
            "backend": "baseline",
            "runs_on": devices,
            "here": True,
            "about": "the policy unquantized: bf16 on a GPU, float32 on a CPU",
        },
        {
            "backend": "aa",
            "runs_on": devices,
            "here": True,
            "about": "baseline again, its sums in another order: the noise floor of every difference",
        },
        {
            "backend": "auto",
            "runs_on": devices,
            "here": True,
            "about": "the fastest real kernel that passes validation",
        },
    ]
    return rows + [_backend(plugin) for plugin in every(KernelPlugin)]


def _backend(plugin: KernelPlugin) -> JsonObject:
    from qlibero.kernels import load, passes
    from qlibero.kernels.contract import GemmShape

    try:
        kernel = load(plugin.name)
    except ImportError as error:
        return {"backend": plugin.name, "runs_on": "", "here": False, "about": f"cannot be loaded: {error}"}
    found = {
        device: [kernel.supports(GemmShape(2048, 2048, bits, 8, None, device)) for bits in (4, 8)]
        for device in ("cpu", "cuda")
    }
    runs_on = [device for device, supports in found.items() if any(s.ok for s in supports)]
    says = plugin.about
    if not runs_on:
        says += f" ({found['cuda'][0].reason or found['cpu'][0].reason})"
    return {
        "backend": plugin.name,
        "runs_on": ", ".join(runs_on),
        "here": bool(runs_on),
        "validation": passes.validation_status(plugin.name),
        "from": plugin.origin,
        "about": says,
    }


def supports(name: str, shape: GemmShape) -> bool:
    """Whether the kernel can be loaded here and takes such a layer."""
    from qlibero.kernels import load

    try:
        return load(name).supports(shape).ok
    except ImportError:
        return False


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def experiments() -> Rows:
    """The experiments and sweeps under configs/, with their arms and number of episodes."""
    from qlibero.config.sweep import load_sweep

    rows: Rows = []
    for path in sorted((CONFIGS / "experiments").glob("*.yaml")) + sorted((CONFIGS / "sweeps").glob("*.yaml")):
        try:
            cells = load_sweep(path, environ={}, check_files=False).cells
        except QliberoError as error:
            rows.append(
                {"experiment": path.stem, "file": _shown(path), "about": f"does not load: {str(error).splitlines()[0]}"}
            )
            continue
        first = cells[0].experiment
        rows.append(
            {
                "experiment": path.stem,
                "file": _shown(path),
                "suites": sorted({suite for cell in cells for suite in cell.experiment.suites}),
                "arms": [arm.name for arm in first.arms()],
                "cells": len(cells),
                "episodes": sum(episodes(cell.experiment) for cell in cells),
                "about": about(path),
            }
        )
    return rows


def artifacts() -> Rows:
    """The artifacts where `run` and `quantize` look for them."""
    import json

    from safetensors import SafetensorError, safe_open

    from qlibero.config.quantization import Quant
    from qlibero.quant.prepare import artifact_places

    rows: Rows = []
    for path in (path for place in artifact_places() for path in sorted(place.glob("*/artifact.safetensors"))):
        row = {"artifact": path.parent.name[:12], "file": str(path), "MB": round(path.stat().st_size / 1e6, 1)}
        try:
            with safe_open(path, "numpy") as file:
                meta = json.loads((file.metadata() or {})["qlibero"])
            row["settings"] = Quant.of_identity(meta["spec"]).label
        except (SafetensorError, QliberoError, OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
            row["settings"] = f"cannot be read: {short(problem)}"
        rows.append(row)
    return rows


def episodes(experiment: Experiment) -> int:
    """Episodes of all arms together."""
    each = experiment.initial_states()[1] * len(experiment.all_seeds()) * len(experiment.arms())
    return len(experiment.all_tasks()) * each


def about(path: Path) -> str:
    """The whole sentences of a YAML file's first comment line: every file of configs/ opens with what it is for."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# yaml-language-server"):
            continue
        said = line.removeprefix("#").strip() if line.startswith("#") else ""
        return whole[0] if (whole := re.match(r".*[.?!](?=\s|$)", said)) else said
    return ""


def _shown(path: Path) -> str:
    return str(path.relative_to(CHECKOUT) if CHECKOUT else path)
