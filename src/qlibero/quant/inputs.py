"""What decides an artifact beside settings, weights and data: how the policy is fed and computed, and plugged-in code.

It stands in an artifact, is part of its key, and an artifact that was made from something else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlibero.config.quantization import Quant
from qlibero.identity import file_sha256
from qlibero.policies import family_of
from qlibero.registry import BUILT_IN, CorrectionPlugin, MethodPlugin, Plugin, get

if TYPE_CHECKING:
    from qlibero.config.policies import PolicySettings
    from qlibero.policies.base import Policy

ARITHMETIC = ("dtype", "device")
"""What may differ where an artifact is named by its path: calibrated where there is a GPU, say, and run elsewhere."""
_OF_PROVENANCE = ("type", "profile", "action_horizon", "action_dim", "dtype", "device")


def inputs_of(policy: Policy, spec: Quant) -> dict[str, str]:
    """In words. Of a policy that has no `calibration_inputs`, what its provenance says."""
    says = getattr(policy, "calibration_inputs", None)
    if says is not None:
        return {**says(), **_plugged_in(spec)}
    about = policy.provenance()
    return {key.replace("_", " "): str(about[key]) for key in _OF_PROVENANCE if key in about} | _plugged_in(spec)


def inputs_of_settings(settings: PolicySettings, spec: Quant) -> dict[str, str] | None:
    """What `inputs_of` will say of the policy, without loading its weights; None where its family cannot tell."""
    says = getattr(family_of(settings), "calibration_inputs", None)
    found = says(settings) if says is not None else None
    return None if found is None else {**found, **_plugged_in(spec)}


def differences(there: Mapping[str, str], here: Mapping[str, str], but: tuple[str, ...] = ()) -> list[str]:
    """`profile: openpi there, openpi-state asked`, hashes cut short."""
    return [
        f"{name}: {there.get(name, 'nothing')[:24]} there, {here.get(name, 'nothing')[:24]} asked"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in but
    ]


def _plugged_in(spec: Quant) -> dict[str, str]:
    """The source that declares each method and correction that did not come with qlibero."""
    plugins: list[Plugin] = [get(MethodPlugin, name) for name in (spec.method, *spec.transform.chooses)]
    plugins += [get(CorrectionPlugin, name) for name in spec.corrections]
    return {f"{p.kind} {p.name}": file_sha256(p.file) for p in plugins if p.origin != BUILT_IN}
