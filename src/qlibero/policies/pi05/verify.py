"""Everything that can be said of a checkpoint directory before trusting a number it produces.

Behind `qlibero checkpoint verify`. Reads every tensor, builds no network and returns none.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlibero.errors import UserError
from qlibero.policies.pi05.checkpoint import (
    Checkpoint,
    TensorTable,
    file_hashes,
    open_checkpoint,
    tensor_table,
)
from qlibero.policies.pi05.policy import require_match
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.statistics import load_statistics, normalization
from qlibero.policies.pi05.tokenizer import load_tokenizer


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """A JSON-ready report on a checkpoint directory.

    Keys: path, kind, ok, problems (list of sentences, empty when ok), conditions (what a config has to say so that
    it loads; empty when nothing), notes, parameters, tensors, dtypes, architecture, missing, extra, misshapen,
    non_finite (lists of names), statistics ({"state": {"mode", "why", "dimensions"}, …} or None), profile ({"guess",
    "proven", "why", "means"}), sha256 ({file: digest}).

    Raises `UserError` only when there is no checkpoint to speak of (no directory, no readable safetensors).
    """
    checkpoint = open_checkpoint(Path(path))
    table = tensor_table(checkpoint)
    non_finite = _non_finite(checkpoint, table)
    problems = list(table.problems)
    if non_finite:
        problems.append(f"{len(non_finite)} tensors hold NaN or infinity: {', '.join(non_finite[:8])}")
    statistics, conditions = None, []
    try:
        why = {name: reason for name, (_, reason) in normalization(checkpoint).items()}
        statistics = {
            name: {"mode": s.mode, "why": why[name], "dimensions": len(s.low)}
            for name, s in load_statistics(checkpoint).items()
        }
    except UserError as error:
        problems.append(str(error))
    if checkpoint.profile is None:
        conditions.append(f"profile: {checkpoint.guess}   (likely, not proven by the files; see docs/checkpoints.md)")
    tokenizer = checkpoint.path / "tokenizer.json"
    if checkpoint.kind != "qlibero" and not tokenizer.exists():
        conditions.append(
            "tokenizer: PATH   (of paligemma_tokenizer.model or a tokenizer.json; the directory has none)"
        )
    else:
        try:
            require_match(checkpoint.config, PROFILES[checkpoint.guess], load_tokenizer(tokenizer))
        except UserError as error:
            problems.append(str(error))
    shapes = checkpoint.shapes
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "ok": not problems,
        "problems": problems,
        "conditions": conditions,
        "notes": table.notes,
        "parameters": sum(torch.Size(shapes[source]).numel() for source in table.source.values()),
        "tensors": len(shapes),
        "dtypes": dict(Counter(checkpoint.dtypes.values())),
        "architecture": checkpoint.config.to_dict(),
        "missing": table.missing,
        "extra": table.extra,
        "misshapen": table.misshapen,
        "non_finite": non_finite,
        "statistics": statistics,
        "profile": {
            "guess": checkpoint.guess,
            "proven": checkpoint.profile is not None,
            "why": checkpoint.profile_reason,
            "means": PROFILES[checkpoint.guess].why,
        },
        "sha256": file_hashes(checkpoint.path),
    }


def _non_finite(checkpoint: Checkpoint, table: TensorTable) -> list[str]:
    used = set(table.source.values())
    with safe_open(checkpoint.weights, framework="pt") as file:
        return [name for name in sorted(used) if not bool(torch.isfinite(file.get_tensor(name)).all())]
