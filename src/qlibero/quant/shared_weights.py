"""What arms have in common is in memory once: full-precision weights that are loaded, artifacts that are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qlibero.config.arms import Arm
from qlibero.config.policies import PolicySettings
from qlibero.policies import load_policy, shares_weights, with_weights_of
from qlibero.policies.base import Policy, QuantizablePolicy
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import Artifact
from qlibero.quant.policy_check import room_for_twin


def full_policies(
    arms: Sequence[Arm], unread: Callable[[Sequence[Arm]], frozenset[str]] = lambda sharing: frozenset()
) -> dict[str, Policy]:
    """The unquantized policy of each arm, by the arm's name. Arms with equal settings have the same object; arms that
    differ in no weight have policies around one network.

    `unread(arms of one checkpoint)`: weights that are not read (`prepare.replaced_in_all`).
    Raises as `policies.load_policy`.
    """
    found: dict[str, Policy] = {}
    for group in sharing(arms):
        loaded: list[tuple[PolicySettings, Policy]] = []
        for arm in group:
            policy = next((known for settings, known in loaded if settings == arm.policy), None)
            if policy is None:
                if loaded:
                    policy = with_weights_of(loaded[0][1], arm.policy)
                else:
                    policy = load_policy(arm.policy, unread(group))
                loaded.append((arm.policy, policy))
            found[arm.name] = policy
    return found


def sharing(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms grouped by the weights that their policies load, in order."""
    groups: list[list[Arm]] = []
    for arm in arms:
        home = next((group for group in groups if shares_weights(group[0].policy, arm.policy)), None)
        if home is None:
            groups.append([arm])
        else:
            home.append(arm)
    return groups


class QuantizedNetworks:
    """Policies around quantized networks: those of one artifact on the same kernels, for one full network, share it."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str, frozenset[tuple[str, str]]], QuantizablePolicy] = {}

    def policy(self, full: QuantizablePolicy, artifact: Artifact, kernels: Mapping[str, str]) -> QuantizablePolicy:
        """`full` with the artifact's linears on these kernels, by linear name. Raises as `quantize_policy`."""
        key = self._key(full, artifact, kernels)
        if key not in self._made:
            self._made[key] = quantize_policy(full, artifact, dict(kernels))
        return full.with_model(self._made[key].model)

    def on_fake(self, full: QuantizablePolicy, artifact: Artifact) -> QuantizablePolicy | None:
        """The same on `fake`, to compare a kernel with; None where the device has no memory for that."""
        kernels = {layer.name: "fake" for layer in artifact.layers}
        if self._key(full, artifact, kernels) not in self._made and not room_for_twin(artifact, full.device):
            return None
        return self.policy(full, artifact, kernels)

    @staticmethod
    def _key(
        full: QuantizablePolicy, artifact: Artifact, kernels: Mapping[str, str]
    ) -> tuple[int, str, frozenset[tuple[str, str]]]:
        return id(full.model), artifact.sha256, frozenset(kernels.items())
