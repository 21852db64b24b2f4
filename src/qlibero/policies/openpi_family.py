"""The families whose checkpoints have openpi's names: what a `PolicyFamily` has, heavy parts imported when called."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlibero.documents import JsonObject
from qlibero.policies.settings import CheckpointSettings

if TYPE_CHECKING:
    from qlibero.policies.pi05.family import Family
    from qlibero.policies.pi05.policy import Pi05Policy


def _loaded(settings: CheckpointSettings) -> tuple[Any, ...]:
    """What decides the tensors in memory. A hash only checks them."""
    checkpoint = settings.checkpoint and Path(settings.checkpoint).resolve()
    return checkpoint, settings.untrained, settings.device, settings.dtype, settings.action_horizon


class OpenpiFamily:
    """See `base.PolicyFamily`. The network, its profiles and files are `policies/<name>/family.py:FAMILY`."""

    def __init__(self, name: str, settings: type[CheckpointSettings]):
        self.name, self.Settings = name, settings

    @property
    def _network(self) -> Family:
        found: Family = import_module(f"qlibero.policies.{self.name}.family").FAMILY
        return found

    def load(self, settings: CheckpointSettings, skip: frozenset[str] = frozenset()) -> Pi05Policy:
        from qlibero.policies.pi05.load import load_policy

        return load_policy(settings, skip, self._network)

    def shares_weights(self, one: CheckpointSettings, other: CheckpointSettings) -> bool:
        """Whether both load the same tensors to the same place: preprocessing and flow steps may differ."""
        return _loaded(one) == _loaded(other)

    def with_weights_of(self, loaded: Pi05Policy, settings: CheckpointSettings) -> Pi05Policy:
        from qlibero.policies.pi05.load import load_policy

        return load_policy(settings, family=self._network, loaded=loaded)

    def files(self, settings: CheckpointSettings) -> list[Path]:
        from qlibero.policies.pi05.load import files_of

        return files_of(settings, self._network)

    def weights_sha256(self, settings: CheckpointSettings) -> str | None:
        from qlibero.policies.pi05.load import weights_sha256

        return weights_sha256(settings, self._network)

    def calibration_inputs(self, settings: CheckpointSettings) -> dict[str, str] | None:
        from qlibero.policies.pi05.load import inputs_of

        return inputs_of(settings, self._network)

    def claims(self, path: Path) -> bool:
        """Whether a checkpoint directory says that it is one of these; one that says nothing is tried as a pi0.5."""
        from qlibero.policies.pi05.unreadable import declared_type

        return declared_type(path) == self.name

    def verify(self, path: Path) -> JsonObject:
        from qlibero.policies.pi05.verify import verify_checkpoint

        return verify_checkpoint(path, self._network)
