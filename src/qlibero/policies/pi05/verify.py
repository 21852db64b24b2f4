"""Everything that can be said of a checkpoint directory before trusting a number it produces.

Behind `qlibero checkpoint verify`. Reads every tensor, builds no network and returns none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.policies.pi05.checkpoint import Checkpoint, file_hashes, open_checkpoint, tensors
from qlibero.policies.pi05.declared import differences
from qlibero.policies.pi05.family import FAMILY, Family
from qlibero.policies.pi05.match import require_match
from qlibero.policies.pi05.statistics import asset_ids, load_statistics, normalization
from qlibero.policies.pi05.tensor_table import faulty, listed, tensor_table
from qlibero.policies.pi05.tokenizer import load_tokenizer
from qlibero.policies.pi05.weights import fault_of
from qlibero.policies.settings import CheckpointSettings


def verify_checkpoint(path: Path, family: Family = FAMILY) -> JsonObject:
    """A JSON-ready report on a checkpoint directory.

    Keys: path, family, kind, ok, problems (list of sentences, empty when ok), conditions (what a config has to say
    so that it loads; empty when nothing), notes (what is worth knowing: renamed tensors, numbers that the files
    declare and a run with the default settings does otherwise), declared (what the files say about how to run it,
    null where they are silent), parameters, tensors, dtypes, architecture (action_horizon null where no file says
    it), missing, extra, misshapen, non_finite, faults ({name: what is wrong with its numbers}), statistics
    ({"state": {"mode", "why", "dimensions"}, …} or None), profile ({"guess", "proven", "why", "means"}), sha256
    ({file: digest}).

    Raises `UserError` only when there is no checkpoint to speak of (no directory, no readable safetensors, another
    policy, settings that are not supported).
    """
    checkpoint = open_checkpoint(Path(path), family)
    table = tensor_table(checkpoint)
    faults, zeros = {}, []
    for name, tensor in tensors(checkpoint, table):
        if fault := fault_of(tensor):
            faults[name] = fault
        elif not tensor.any():
            zeros.append(name)
    problems = [*table.problems, *([faulty(faults)] if faults else [])]
    notes = [*table.notes, *checkpoint.declared.remarks, *_differences(checkpoint)]
    if zeros:
        notes.append(f"{count_text(len(zeros), 'vector')} of zeros alone, as if never trained: {listed(zeros)}")
    conditions = _conditions(checkpoint)
    statistics = None
    try:
        why = {name: reason for name, (_, reason) in normalization(checkpoint).items()}
        if not any(condition.startswith("asset_id") for condition in conditions):
            statistics = {
                name: {"mode": s.mode, "why": why[name], "dimensions": len(s.low)}
                for name, s in load_statistics(checkpoint).items()
            }
    except UserError as error:
        problems.append(str(error))
    tokenizer = checkpoint.path / "tokenizer.json"
    if checkpoint.kind == "qlibero" or tokenizer.exists():
        try:
            require_match(checkpoint.config, family.profiles[checkpoint.guess], load_tokenizer(tokenizer))
        except UserError as error:
            problems.append(str(error))
    shapes = checkpoint.shapes
    return {
        "path": str(checkpoint.path),
        "family": family.name,
        "kind": checkpoint.kind,
        "ok": not problems,
        "problems": problems,
        "conditions": conditions,
        "notes": notes,
        "declared": {
            key: value for key, value in asdict(checkpoint.declared).items() if key not in ("where", "remarks")
        },
        "parameters": sum(torch.Size(shapes[source]).numel() for source in table.source.values()),
        "tensors": len(shapes),
        "dtypes": dict(Counter(checkpoint.weights.dtypes.values())),
        "architecture": checkpoint.config.to_dict() | {"action_horizon": checkpoint.config.action_horizon or None},
        "missing": table.missing,
        "extra": table.extra,
        "misshapen": table.misshapen,
        "non_finite": sorted(name for name, fault in faults.items() if fault == "NaN or infinity"),
        "faults": faults,
        "statistics": statistics,
        "profile": {
            "guess": checkpoint.guess,
            "proven": checkpoint.profile is not None,
            "why": checkpoint.profile_reason,
            "means": family.profiles[checkpoint.guess].why,
        },
        "sha256": file_hashes(checkpoint.path),
    }


def _conditions(checkpoint: Checkpoint) -> list[str]:
    """What a config's `policy` has to say, one `key: value   (why)` a line."""
    found = []
    if checkpoint.profile is None:
        found.append(f"profile: {checkpoint.guess}   (likely, not proven by the files; see docs/checkpoints.md)")
    if not checkpoint.config.action_horizon:
        found.append(
            "action_horizon: N   (actions of a chunk; no file says it. The published pi05_libero has 10, LeRobot's "
            "default is 50)"
        )
    if checkpoint.lerobot is None and not checkpoint.raw.get("asset_id") and len(asset_ids(checkpoint.path)) > 1:
        ids = " | ".join(name or "(none)" for name in asset_ids(checkpoint.path))
        found.append(f"asset_id: {ids}   (the directory has statistics of several)")
    if checkpoint.kind != "qlibero" and not (checkpoint.path / "tokenizer.json").exists():
        found.append("tokenizer: PATH   (of paligemma_tokenizer.model or a tokenizer.json; the directory has none)")
    return found


def _differences(checkpoint: Checkpoint) -> list[str]:
    """What the files declare and a run with default settings does otherwise."""
    defaults = {name: CheckpointSettings.model_fields[name].default for name in ("flow_steps", "replan_steps")}
    return differences(checkpoint.declared, **defaults)
