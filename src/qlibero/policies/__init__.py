"""Policies, by family: pi0.5 (`pi05/`), any openpi-protocol server (`remote.py`), or a plug-in's; our server.

A family is found by its settings' `type` and declares itself in its own room: `base.PolicyFamily` says what it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qlibero.registry import PolicyPlugin, every, get

if TYPE_CHECKING:
    from qlibero.config.policies import PolicySettings
    from qlibero.documents import JsonObject
    from qlibero.policies.base import Policy, PolicyFamily


def family_of(settings: PolicySettings) -> PolicyFamily:
    """The family of such a policy. UserError for one that is not there or does not load."""
    return cast("PolicyFamily", get(PolicyPlugin, settings.type).load())


def load_policy(settings: PolicySettings, skip: frozenset[str] = frozenset()) -> Policy:
    """The policy that `settings` describes.

    `skip` names linear weights to leave unread, because an artifact will replace them: that is how a full-size
    quantized policy loads without its full-precision language model ever being on the GPU.

    Raises:
        UserError: it does not exist, or does not fit; the message says what to write. GuardRefusal: the weights' sha256
            is not the expected one.
    """
    return family_of(settings).load(settings, skip)


def shares_weights(one: PolicySettings, other: PolicySettings) -> bool:
    """Whether one loaded network serves both: they differ in nothing, or in nothing that is loaded."""
    if one == other:
        return True
    same = getattr(family_of(one), "shares_weights", None)
    return one.type == other.type and same is not None and bool(same(one, other))


def with_weights_of(loaded: Policy, settings: PolicySettings) -> Policy:
    """The policy of `settings` around the network of `loaded`, with which they share their weights."""
    return cast("Policy", cast(Any, family_of(settings)).with_weights_of(loaded, settings))


def files_of(settings: PolicySettings) -> list[Path]:
    """Every file that the policy reads, in a fixed order: what is in them decides every action, beside the settings."""
    files = getattr(family_of(settings), "files", None)
    return files(settings) if files else []


def weights_sha256(settings: PolicySettings) -> str | None:
    """The sha256 that the policy's provenance will name, without loading it; None where there is no checkpoint."""
    digest = getattr(family_of(settings), "weights_sha256", None)
    return digest(settings) if digest else None


def verify(path: Path) -> JsonObject:
    """A report on a checkpoint directory, by the family that takes it for its own; by the first where none does, which
    says what it is instead. UserError when there is no checkpoint to speak of."""
    families = [family for plugin in every(PolicyPlugin) if hasattr(family := plugin.load(), "verify")]
    report: JsonObject = next((f for f in families if f.claims(path)), families[0]).verify(path)
    return report
