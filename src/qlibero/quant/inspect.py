"""What an artifact did to each layer, where two artifacts differ, and which layers are worth their full precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError
from qlibero.quant.action_error import ActionError, action_error, arm_error
from qlibero.quant.artifact import Artifact, LayerRecord, load
from qlibero.quant.patterns import short_name

if TYPE_CHECKING:
    from qlibero.policies.base import Observation, QuantizablePolicy

#: column -> whether the worst comes with the largest value (None: names sort upward)
SORTS = {
    "name": None,
    "sqnr_db": False,
    "max_error": True,
    "outlier_before": True,
    "outlier_after": True,
    "bytes": True,
}
HINTS = 5


def inspect_artifact(path: Path, other: Path | None = None, sort: str = "sqnr_db") -> JsonObject:
    """The document of `qlibero inspect ARTIFACT [--diff OTHER] [--sort COLUMN]`.

    Returns {"artifact": facts, "layers": rows, worst first, "hint": rows, "chosen": rows, "diff": …}. Each row: layer,
    shape `N×K`, bits `W4A8`, executed, method, rounding, sqnr_db, max_error, outlier_before, outlier_after, bytes
    (codes and scales), transform_bytes.

    Raises:
        UserError: no such file or column. GuardRefusal: damaged, truncated or altered.
    """
    if sort not in SORTS:
        raise UserError(f"cannot sort by {sort!r}; write one of {', '.join(SORTS)}")
    artifact = load(path)
    document = {
        "artifact": facts(artifact),
        "layers": sorted((row(layer) for layer in artifact.layers), key=lambda r: _sort_key(r, sort)),
        "hint": hint(artifact),
    }
    if choices := chosen(artifact):
        document["chosen"] = choices
    if other is not None:
        document["diff"] = diff(artifact, load(other))
    return document


def facts(artifact: Artifact) -> JsonObject:
    """What the artifact is, in a few JSON-ready values."""
    executed = sum(layer.executed for layer in artifact.layers)
    return {
        "path": str(artifact.path) if artifact.path else None,
        "key": artifact.key,
        "sha256": artifact.sha256,
        "settings": artifact.spec.label,
        "spec": artifact.spec.identity(),
        "checkpoint_sha256": artifact.checkpoint_sha256,
        "calibration": artifact.calibration,
        "layers": len(artifact.layers),
        "executed": executed,
        "corrections": artifact.corrections,
        "weight_bytes": sum(layer.codes_bytes + layer.scales_bytes for layer in artifact.layers),
        "transform_bytes": sum(layer.transform_bytes for layer in artifact.layers),
        "bf16_bytes": sum(2 * layer.out_features * layer.in_features for layer in artifact.layers),
    }


def row(layer: LayerRecord) -> JsonObject:
    """One layer as a table row."""
    return {
        "layer": layer.name,
        "shape": f"{layer.out_features}×{layer.in_features}",
        "bits": f"W{layer.weight_bits}A{layer.activation_bits}",
        "executed": layer.executed,
        "method": layer.method,
        "rounding": layer.rounding,
        "sqnr_db": layer.sqnr_db,
        "max_error": layer.max_error,
        "outlier_before": layer.outlier_before,
        "outlier_after": layer.outlier_after,
        "bytes": layer.codes_bytes + layer.scales_bytes,
        "transform_bytes": layer.transform_bytes,
    }


def chosen(artifact: Artifact) -> list[JsonObject]:
    """Of a method that chooses (`auto`): which transform each input kept, and the dB on held-out tokens of every one
    that was tried."""
    made = artifact.calibration.get(artifact.spec.method, {}) if artifact.spec.transform.chooses else {}
    return [{"input": name, "kept": choice["kept"], **choice["db"]} for name, choice in made.items()]


def hint(artifact: Artifact, count: int = HINTS) -> list[JsonObject]:
    """The layers whose own output carries the most rounding noise, and what each would cost to keep in bf16.

    It looks at each layer alone; what its noise does to the *actions* only a run can tell, see `sensitivity`.
    """
    measured = [(layer.sqnr_db, layer) for layer in artifact.layers if layer.sqnr_db is not None]
    noisiest = sorted(measured, key=lambda pair: pair[0])[:count]
    total = sum(10 ** (-db / 10) for db, _ in measured)
    return [
        {
            "layer": layer.name,
            "sqnr_db": db,
            "share_of_layer_noise": round(10 ** (-db / 10) / total, 4),
            "extra_bytes": _extra_bytes(layer),
        }
        for db, layer in noisiest
    ]


def diff(a: Artifact, b: Artifact) -> JsonObject:
    """Where `b` differs from `a`: settings, layers only one of them has, and per common layer the change in dB."""
    ours, theirs = a.spec.identity(), b.spec.identity()
    left, right = ({layer.name: layer for layer in x.layers} for x in (a, b))
    rows = []
    for name in left.keys() & right.keys():
        x, y = left[name], right[name]
        change = None if x.sqnr_db is None or y.sqnr_db is None else round(y.sqnr_db - x.sqnr_db, 3)
        rows.append(
            {
                "layer": name,
                "sqnr_db": x.sqnr_db,
                "other_sqnr_db": y.sqnr_db,
                "change_db": change,
                "outlier_after": x.outlier_after,
                "other_outlier_after": y.outlier_after,
                "bits": f"W{x.weight_bits}A{x.activation_bits}",
                "other_bits": f"W{y.weight_bits}A{y.activation_bits}",
            }
        )
    return {
        "settings": {key: [ours[key], theirs[key]] for key in ours if ours[key] != theirs[key]},
        "same_checkpoint": a.checkpoint_sha256 == b.checkpoint_sha256,
        "only_here": sorted(left.keys() - right.keys()),
        "only_there": sorted(right.keys() - left.keys()),
        "layers": sorted(rows, key=lambda r: (r["change_db"] is None, r["change_db"] or 0.0, r["layer"])),
    }


def sensitivity(
    policy: QuantizablePolicy, artifact: Artifact, observations: Sequence[Observation], noise: np.ndarray
) -> list[JsonObject]:
    """Which layers' return to full precision would buy most, measured on actions, greatest share first.

    Each executed layer is quantized *alone* and the policy asked: arm_error is the median over observations of the
    root mean square change of its arm actions (in the policy's own action units), with its 95 % interval. Independent
    errors add in squares, so a layer's mean square over the sum of them is its share of what full quantization
    costs. One policy call per layer.
    """
    from qlibero.quant.apply import quantize_policy

    exact = policy.infer(observations, noise).actions.astype(np.float64)
    measured: list[tuple[LayerRecord, ActionError, float]] = []
    for layer in artifact.layers:
        if not layer.executed:
            continue
        alone = quantize_policy(policy, artifact, "fake", only=frozenset([layer.name]))
        found = alone.infer(observations, noise).actions
        measured.append((layer, action_error(exact, found), float(np.mean(arm_error(exact, found) ** 2))))
    if not measured:
        raise GuardRefusal("the artifact holds no executed layer, so none can be measured")
    total = sum(mean_square for _, _, mean_square in measured) or 1.0
    shares = [(round(mean_square / total, 4), layer, change) for layer, change, mean_square in measured]
    return [
        {
            "layer": layer.name,
            "arm_error": change.arm,
            "arm95": change.arm95,
            "gripper_changed": change.gripper_changed,
            "share_of_action_error": share,
            "sqnr_db": layer.sqnr_db,
            "extra_bytes": _extra_bytes(layer),
        }
        for share, layer, change in sorted(shares, key=lambda item: -item[0])
    ]


def _extra_bytes(layer: LayerRecord) -> int:
    return 2 * layer.out_features * layer.in_features - layer.codes_bytes - layer.scales_bytes


def _sort_key(r: JsonObject, column: str) -> tuple[Any, ...]:
    if SORTS[column] is None:
        return (r["layer"],)
    value = r[column]
    # layers that never run have no measures and come last
    return (value is None, 0.0 if value is None else -value if SORTS[column] else value, r["layer"])


def readable(rows: Sequence[JsonObject]) -> list[JsonObject]:
    """The same rows for a terminal: `language_model.3.mlp.up_proj` for a name as wide as a screen, few decimals."""

    def cell(key: str, value: Any) -> Any:
        if key in ("layer", "input"):
            return short_name(value)
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return [{key: cell(key, value) for key, value in r.items()} for r in rows]
