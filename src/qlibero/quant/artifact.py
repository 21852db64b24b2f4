"""A quantization on disk: one safetensors file that says what it is, from what it was made, and proves it is whole.

Tensors: `<linear>.codes` (uint8, two codes of at most 4 bits a byte, low nibble first; int8; or float8_e4m3fn),
`<linear>.scales` (bfloat16, exact), `<linear>.output_rotation`; `<group>.scale|first|order|second|hadamard` (the
input's transform), `<group>.importance` (mean x'^2 of each channel, by which scales were searched; nothing runs it).

Metadata: format version, the spec and its hash, the checkpoint's sha256, where the calibration data came
from, one record per linear with what was measured on held-out tokens, and a sha256 over all of it.

Nothing is trusted because of its name or place: an artifact that is damaged, of another format, made with
other settings (stale) or for another checkpoint (foreign) is refused with the command that mends it, never
repaired in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlibero import files
from qlibero.config.quantization import Quant
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError, WorkFailed, cause
from qlibero.policies.structured import parse_json, short
from qlibero.quant.artifact_schema import require_consistent, require_schema
from qlibero.quant.inputs import ARITHMETIC, differences
from qlibero.quant.nibbles import unpack_nibbles
from qlibero.quant.transform import FACTORS, Transform

#: raised whenever the meaning of a stored number changes, including through a change of the quantizing code
FORMAT = 2
HINT = "make it again with `qlibero quantize CONFIG`"


@dataclass(frozen=True)
class LayerRecord:
    """One quantized linear. The measures are over held-out tokens; they are None where the layer never ran.

    method: whose transform its input has; rounding: how its weights were rounded, and `tried`: rounding -> dB of every
    one that was; sqnr_db: signal to quantization noise of the layer's output; max_error: greatest |error| relative to
    the greatest |output|; outlier_before, outlier_after: mean over tokens of max|x| / rms(x), before and after the
    transform; codes_bytes, scales_bytes: as stored.
    """

    name: str
    group: str
    out_features: int
    in_features: int
    weight_bits: int
    activation_bits: int
    executed: bool
    method: str
    rounding: str
    tried: dict[str, float]
    sqnr_db: float | None
    max_error: float | None
    outlier_before: float | None
    outlier_after: float | None
    codes_bytes: int
    scales_bytes: int
    transform_bytes: int
    """of the whole group's transform, carried by the group's first linear (0 in the others)"""


@dataclass(frozen=True)
class Artifact:
    """A loaded or freshly calibrated artifact. Tensors of a loaded one are read from the file when asked for,
    so that a full-size policy is built layer by layer."""

    spec: Quant
    checkpoint_sha256: str
    calibration: JsonObject
    layers: tuple[LayerRecord, ...]
    corrections: dict[str, list[float]]
    """output factors by linear name, one value per head (attention temperature, on q_proj) or one for all
    (output head)"""
    sha256: str
    tensors: dict[str, Tensor] | None = None
    path: Path | None = None

    @property
    def key(self) -> str:
        """What the artifact was made from: spec, checkpoint, data and inputs. Known before it is made."""
        return artifact_key(self.spec, self.checkpoint_sha256, self.calibration["data_sha256"], self.inputs)

    @property
    def inputs(self) -> dict[str, str] | None:
        """See `quant/inputs.py`; None in artifacts that were made before those were recorded."""
        return self.calibration.get("inputs")

    def layer(self, name: str) -> LayerRecord:
        """The record of the linear called `name`."""
        return next(record for record in self.layers if record.name == name)

    def tensor(self, name: str) -> Tensor | None:
        """One stored tensor on the CPU, or None if the artifact has no such tensor."""
        if self.tensors is not None:
            return self.tensors.get(name)
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (not a dict)

    def stored(self, name: str) -> Tensor:
        """`tensor` of a name that an artifact that was checked has."""
        tensor = self.tensor(name)
        if tensor is None:
            raise KeyError(f"the artifact holds no tensor {name}")
        return tensor

    def in_memory(self) -> dict[str, Tensor]:
        """All tensors of an artifact that was just made. ValueError for one that lies on disk."""
        if self.tensors is None:
            raise ValueError(f"the tensors of {self.path} are read one by one")
        return self.tensors

    def transform(self, group: str) -> Transform:
        """The online transform of one shared input."""
        return Transform(**{factor: self.tensor(f"{group}.{factor}") for factor in FACTORS})

    def codes(self, name: str) -> Tensor:
        """Weight codes of a linear, int8 or float8_e4m3fn (N, K)."""
        stored = self.stored(f"{name}.codes")
        return unpack_nibbles(stored) if stored.dtype == torch.uint8 else stored

    def scales(self, name: str) -> Tensor:
        """Weight scales of a linear, float32 (N,) or (N, G)."""
        return self.stored(f"{name}.scales").float()


def artifact_key(spec: Quant, checkpoint_sha256: str, data_sha256: str, inputs: Mapping[str, str] | None) -> str:
    """16 hex digits that name an artifact before it exists: same settings, checkpoint, data, inputs and code, same
    key."""
    made_from = [FORMAT, spec.hash, checkpoint_sha256, data_sha256]
    text = json.dumps(made_from if inputs is None else [*made_from, sorted(inputs.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_hash(meta: JsonObject, names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """sha256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(names):
        value = tensor(name).contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def build(
    spec: Quant,
    checkpoint_sha256: str,
    calibration: JsonObject,
    layers: tuple[LayerRecord, ...],
    corrections: dict[str, list[float]],
    tensors: dict[str, Tensor],
) -> Artifact:
    """An artifact in memory, with its hash."""
    artifact = Artifact(spec, checkpoint_sha256, calibration, layers, corrections, "", tensors)
    sha256 = content_hash(_meta(artifact), tensors, tensors.__getitem__)
    return Artifact(spec, checkpoint_sha256, calibration, layers, corrections, sha256, tensors)


def save(artifact: Artifact, path: Path, over: bool = True) -> Path:
    """Write atomically: a reader sees the whole file or none. `over` False: not over one that is there by now."""
    path, partial = Path(path), None
    # not sorted: later patterns of per_layer_bits win, so their order is part of the settings
    meta = {"qlibero": json.dumps(_meta(artifact)), "sha256": artifact.sha256}
    try:
        partial = files.beside(path)
        save_file({name: t.contiguous() for name, t in artifact.in_memory().items()}, partial, metadata=meta)
        files.settle(partial, path, over)
    except (OSError, SafetensorError) as error:
        if partial is not None:
            files.remove(partial)
        reason = cause(error) if isinstance(error, OSError) else error
        raise WorkFailed(
            f"cannot write the artifact to {path}: {reason}; `quant.artifact_dir` names another place"
        ) from None
    return path


def load(path: Path) -> Artifact:
    """Open and verify an artifact; every byte is read once.

    Raises:
        UserError: no such file. GuardRefusal: not an artifact, another format version, truncated or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no artifact at {path}: {HINT}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "qlibero" not in header or "sha256" not in header:
                raise GuardRefusal(f"{path} is a safetensors file but not a quantization artifact: {HINT}")
            try:
                meta = parse_json(header["qlibero"], f"{path}: its metadata")
            except UserError as error:
                raise GuardRefusal(f"{error}: delete it and {HINT}") from None
            if meta.get("format") != FORMAT or meta["format"] is True:
                raise GuardRefusal(
                    f"{path} has artifact format {short(meta.get('format'))}, this version reads {FORMAT}: {HINT}"
                )
            found = content_hash(meta, file.keys(), file.get_tensor)
    except (SafetensorError, OSError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise GuardRefusal(f"{path} is damaged or truncated ({error}): delete it and {HINT}") from None
    if found != header["sha256"]:
        raise GuardRefusal(
            f"{path} was altered after it was written (content {found[:12]}…, "
            f"recorded {header['sha256'][:12]}…): delete it and {HINT}"
        )
    spec = require_schema(meta, str(path), HINT)
    layers = tuple(LayerRecord(**layer) for layer in meta["layers"])
    with safe_open(path, framework="pt") as file:
        require_consistent(spec, layers, meta["corrections"], file.keys(), file.get_tensor, str(path), HINT)
    return Artifact(
        spec=spec,
        checkpoint_sha256=meta["checkpoint_sha256"],
        calibration=meta["calibration"],
        layers=layers,
        corrections=meta["corrections"],
        sha256=found,
        path=path,
    )


def require(
    artifact: Artifact, spec: Quant | None, checkpoint_sha256: str, inputs: Mapping[str, str] | None = None
) -> None:
    """Refuse an artifact made with other settings, for another checkpoint or from other inputs but for the arithmetic.
    What is None is not checked, nor inputs of an artifact that names none.

    Raises:
        GuardRefusal: what differs, value by value, and the hint.
    """
    where = artifact.path or "the artifact"
    if spec is not None and artifact.spec.hash != spec.hash:
        have, want = artifact.spec.identity(), spec.identity()
        different = ", ".join(f"{k}: {have[k]!r} there, {want[k]!r} asked" for k in want if have[k] != want[k])
        raise GuardRefusal(f"{where} is stale: {different}. {HINT[0].upper()}{HINT[1:]}, or ask for its settings")
    if artifact.checkpoint_sha256 != checkpoint_sha256:
        raise GuardRefusal(
            f"{where} is foreign: made for checkpoint {artifact.checkpoint_sha256[:12]}…, this policy is "
            f"{checkpoint_sha256[:12]}…. {HINT[0].upper()}{HINT[1:]}, or load that checkpoint"
        )
    if inputs is not None and artifact.inputs is not None:
        if others := differences(artifact.inputs, inputs, but=ARITHMETIC):
            raise GuardRefusal(
                f"{where} was calibrated on other inputs: {'; '.join(others)}. {HINT[0].upper()}{HINT[1:]}"
            )


def _meta(artifact: Artifact) -> JsonObject:
    return {
        "format": FORMAT,
        "spec": artifact.spec.identity(),
        "spec_hash": artifact.spec.hash,
        "checkpoint_sha256": artifact.checkpoint_sha256,
        "calibration": artifact.calibration,
        "layers": [asdict(layer) for layer in artifact.layers],
        "corrections": artifact.corrections,
    }
