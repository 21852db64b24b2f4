"""What of a policy, beside its weights, decides what calibration sees: by content, for an artifact's key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from qlibero.identity import text_sha256
from qlibero.policies.pi05.config import Pi05Config
from qlibero.policies.pi05.declared import AGENT
from qlibero.policies.pi05.normalize import Statistics
from qlibero.policies.pi05.profiles import Profile

OF_THEIR_OWN = ("action_horizon", "max_token_len")
"""Of the architecture, told by name."""
DECIDE_NOTHING = ("flow_steps",)
"""Of the architecture: calibration takes steps of its own, see `policy.CALIBRATION_STEPS`."""


def calibration_inputs(
    policy_type: str,
    config: Pi05Config,
    profile: Profile,
    statistics: Mapping[str, Statistics],
    tokenizer_sha256: str,
    cameras: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, str]:
    """See `policies.base.QuantizablePolicy`; no paths. Batch, flow steps and executed steps are not among it."""
    network = config.to_dict()
    rest = {key: value for key, value in network.items() if key not in (*OF_THEIR_OWN, *DECIDE_NOTHING)}
    return {
        "policy type": policy_type,
        "profile": profile.name,
        **{f"statistics of {name}": _digest(statistics[name]) for name in sorted(statistics)},
        "tokenizer": tokenizer_sha256,
        "cameras": ", ".join("agentview" if camera == AGENT else "wrist" for camera in cameras),
        **{key.replace("_", " "): str(network[key]) for key in OF_THEIR_OWN},
        "architecture": text_sha256(json.dumps(rest, sort_keys=True)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }


def _digest(of: Statistics) -> str:
    digest = hashlib.sha256(json.dumps([of.mode, of.epsilon, of.epsilon_inverse]).encode())
    for values in (of.low, of.high):
        digest.update(values.astype("<f8").tobytes())
    return digest.hexdigest()
