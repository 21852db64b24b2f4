"""What an arm's meta.json says, as fields. `meta.py` reads and writes the file.

Every field may be missing, as it is in what earlier versions wrote; whatever else stands there is kept
(`model_dump(exclude_unset=True)` is the file's content again, but for its nulls).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from qlibero.documents import JsonObject


class _Said(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, coerce_numbers_to_str=True)


class Machine(_Said):
    """What gave an answer to the probe."""

    kind: str
    facts: dict[str, str] = {}


class PolicyMeta(_Said):
    """What the policy says of itself (`Policy.provenance`)."""

    type: str | None = None
    name: str | None = None
    sha256: str | None = None
    profile: str | None = None
    dtype: str | None = None
    device: str | None = None
    flow_steps: int | None = None
    batch_size: int | None = None
    action_horizon: int | None = None
    url: str | None = None


class QuantMeta(_Said):
    """The settings of the arm's artifact, those that are shown (`Quant.identity` has them all)."""

    method: str | None = None
    layout: str | None = None
    number_format: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    group_size: int | None = None
    rounding: str | None = None
    per_layer_bits: JsonObject | None = None


class ArtifactMeta(_Said):
    sha256: str | None = None
    key: str | None = None
    path: str | None = None


class KernelMeta(_Said):
    """What validation found for one layer: the kernel that runs (None: nothing does), and why."""

    kernel: str | None = None
    requested: str | None = None
    verdict: str = ""
    reason: str = ""
    shape: str = ""


class LayerMeta(_Said):
    """One quantized layer's signal to quantization noise on calibration inputs, dB; None where it was not measured."""

    name: str = ""
    sqnr_db: float | None = None


class ActionError(_Said):
    """Median root mean square change of an action on held-out demonstrations, with its 95 % interval."""

    observations: Annotated[int, Field(ge=1)]
    arm: Annotated[float, Field(ge=0)]
    arm95: tuple[float, float] | None


class MemoryMeta(_Said):
    """Live bytes of the quantized linears, and of the same linears in bf16."""

    weight_bytes: int = 0
    scale_bytes: int = 0
    transform_bytes: int = 0
    bf16_bytes: int = 0

    @property
    def kept(self) -> int:
        """All that the arm holds for them."""
        return self.weight_bytes + self.scale_bytes + self.transform_bytes


class PolicyCheckMeta(_Said):
    layers_consuming_int8: Annotated[int, Strict(), Field(ge=0)]
    action_difference: Annotated[float, Field(ge=0)] | None


class ExecutionMeta(_Said):
    """How late an asynchronous arm's answers are."""

    mode: str
    latency_ms: int | float
    latency_steps: int


class ArmMeta(_Said):
    """The whole file."""

    arm: str | None = None
    label: str | None = None
    backend: str | None = None
    control: bool | None = None
    exact: bool | None = None
    kernels_hash: str | None = None
    config_hash: Annotated[str, Strict(), Field(max_length=500)] | None = None
    identity: dict[str, str] = {}
    probe: str = ""
    probes: dict[str, Machine] = {}
    policy: PolicyMeta = PolicyMeta()
    quant: QuantMeta | None = None
    artifact: ArtifactMeta | str | None = None
    kernels: dict[str, KernelMeta] = {}
    layers: tuple[LayerMeta, ...] = ()
    action_error: ActionError | None = None
    memory: MemoryMeta | None = None
    witness: PolicyCheckMeta | None = None
    passport: JsonObject | None = None
    execution: ExecutionMeta | None = None
    warmup_ms: tuple[float, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Null is as good as nothing."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def executed(self) -> list[str]:
        """The kernel of every layer that has one."""
        return [layer.kernel for layer in self.kernels.values() if layer.kernel is not None]

    def labelled(self, label: str) -> ArmMeta:
        return self.model_copy(update={"label": label})
