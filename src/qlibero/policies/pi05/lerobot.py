"""LeRobot's files: config.json and the two processor pipelines, held against what qlibero does with a pi0.5 or pi0.

LeRobot feeds cameras in the order of `input_features` after the saved steps have run. Every step is known here with the
settings under which it changes nothing that LIBERO sees, or is taken over (rename map, token limit, normalisation);
anything else is refused by its name. Read off LeRobot 0.4.0-0.6.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qlibero.console import count_text
from qlibero.errors import UserError
from qlibero.policies.pi05.declared import AGENT, WRIST, Declared
from qlibero.policies.structured import Open, fit, read_json, short

if TYPE_CHECKING:
    from qlibero.policies.pi05.family import Family

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
_IMAGES = "observation.images."
_NAMES = {
    AGENT: ("image", "agentview", "agentview_image", "agentview_rgb", "base_0_rgb", "front"),
    WRIST: ("image2", "wrist_image", "wrist", "robot0_eye_in_hand", "eye_in_hand_rgb", "left_wrist_0_rgb"),
}
"""Names of LIBERO's cameras in LeRobot's environment, in the LIBERO data sets and in pi0.5's own slots."""
_EMPTY = re.compile(r"empty_camera_\d+|right_wrist_0_rgb")
"""Slots that LIBERO has no camera for: LeRobot feeds them masked, which changes nothing."""
_REFUSED = (
    "use_relative_actions",
    "use_visual_memory",
    "use_proprioceptive_memory",
    "adapt_to_pi_aloha",
    "use_delta_joint_actions_aloha",
)

_Count = Annotated[int, Field(ge=1, le=1000)] | None
_Width = Annotated[int, Field(ge=1, le=4096)]


class Feature(Open):
    type: str
    shape: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(max_length=4)


_TokenLimit = Annotated[int, Field(ge=2, le=4096)] | None


class _Limit(Open):
    max_length: _TokenLimit = None


class _Features(Open):
    features: dict[str, Feature] = Field(max_length=64)


class Config(Open):
    """config.json, the keys that decide what an action is. null is "not said"."""

    chunk_size: _Count = None
    n_action_steps: _Count = None
    num_inference_steps: _Count = None
    n_obs_steps: _Count = None
    tokenizer_max_length: _TokenLimit = None
    max_state_dim: _Width | None = None
    max_action_dim: _Width | None = None
    min_period: Annotated[float, Field(gt=0, le=1e6)] | None = None
    max_period: Annotated[float, Field(gt=0, le=1e6)] | None = None
    empty_cameras: Annotated[int, Field(ge=0, le=16)] | None = None
    input_features: dict[str, Feature] | None = Field(None, max_length=64)
    output_features: dict[str, Feature] | None = Field(None, max_length=64)
    rtc_config: dict[str, Any] | None = None


class Step(Open):
    registry_name: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    state_file: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")] | None = None


class _Pipeline(Open):
    steps: tuple[Step, ...] = Field(max_length=64)


@dataclass(frozen=True)
class LerobotFiles:
    """All that was read of a LeRobot directory, held against what is supported."""

    path: Path
    config: Config
    pre: tuple[Step, ...]
    post: tuple[Step, ...]
    declared: Declared

    def normalizer(self, processor: str) -> Step:
        """The step of `processor` (PRE or POST) that carries the statistics."""
        for step in self.pre if processor == PRE else self.post:
            if step.registry_name in ("normalizer_processor", "unnormalizer_processor"):
                return step
        raise UserError(
            f"{self.path / processor} has no normaliser step; LeRobot checkpoints carry their statistics in "
            f"{processor} and a safetensors file it names"
        )


def read_lerobot(path: Path, raw: dict[str, Any], family: Family) -> LerobotFiles:
    """The directory's files; `raw` is its config.json. UserError for what is declared and not supported."""
    where = f"{path}/config.json"
    config = fit(Config, raw, where)
    for key in _REFUSED:
        if raw.get(key):
            raise UserError(f"{where}: {key} is {short(raw[key])}; policies of that kind are not supported")
    if config.n_obs_steps not in (None, 1):
        raise UserError(
            f"{where}: n_obs_steps is {config.n_obs_steps}; policies that see one observation are supported"
        )
    if (config.rtc_config or {}).get("enabled"):
        raise UserError(f"{where}: rtc_config.enabled is true; real-time chunking is not supported")
    pre, post = _steps(path / PRE), _steps(path / POST)
    for file, steps in ((path / PRE, pre), (path / POST, post)):
        for step in steps:
            _require_known(step, str(file), family.steps)
        _require_once(steps, str(file))
    _require_order(pre, str(path / PRE), family.order)
    tokenizer = next((step for step in pre if step.registry_name == "tokenizer_processor"), Step())
    limit = fit(_Limit, tokenizer.config, f"{path / PRE}: tokenizer_processor").max_length
    limits = {said for said in (limit, config.tokenizer_max_length) if said is not None}
    if len(limits) > 1:
        raise UserError(
            f"{where} says tokenizer_max_length {config.tokenizer_max_length}, {PRE} says max_length "
            f"{', '.join(str(n) for n in sorted(limits - {config.tokenizer_max_length}))}: which was it trained with?"
        )
    _require_width(
        config.input_features, "observation.state", 8, config.max_state_dim or 32, f"{where}: input_features"
    )
    _require_width(config.output_features, "action", 7, config.max_action_dim or 32, f"{where}: output_features")
    for file, steps in ((path / PRE, pre), (path / POST, post)):
        for step in steps:
            _require_features(step, config, f"{file}: {step.registry_name}.features")
    cameras, remarks = _cameras(config, pre, path)
    return LerobotFiles(
        path,
        config,
        pre,
        post,
        Declared(
            "config.json",
            action_horizon=config.chunk_size,
            flow_steps=config.num_inference_steps,
            executed_steps=config.n_action_steps,
            max_token_len=next(iter(limits), None),
            min_period=config.min_period,
            max_period=config.max_period,
            cameras=cameras,
            remarks=remarks,
        ),
    )


def _steps(file: Path) -> tuple[Step, ...]:
    return fit(_Pipeline, read_json(file), str(file)).steps if file.is_file() else ()


def _require_known(step: Step, where: str, steps: Mapping[str, Mapping[str, Any]]) -> None:
    name = step.registry_name or short((step.model_extra or {}).get("class", "a step without a name"))
    if name not in steps:
        raise UserError(
            f"{where}: the step {name} is not supported (known: {', '.join(steps)}); if it changes nothing on "
            "LIBERO, remove it from the file"
        )
    for key, value in step.config.items():
        allowed = steps[name].get(key, _ANYTHING if name in _FREE else ())
        if allowed is not _ANYTHING and not any(value == known and type(value) is type(known) for known in allowed):
            known = ", ".join(str(one) for one in allowed) or "not a known key"
            raise UserError(f"{where}: {name}.{key} is {short(value)}, which is not supported (supported: {known})")


_ANYTHING: Any = object()
SHARED_STEPS: dict[str, dict[str, Any]] = {
    "rename_observations_processor": {"rename_map": _ANYTHING},
    "to_batch_processor": {},
    "relative_actions_processor": {"enabled": (False,), "exclude_joints": _ANYTHING, "action_names": _ANYTHING},
    "delta_actions_processor": {"enabled": (False,), "exclude_joints": _ANYTHING, "action_names": _ANYTHING},
    "absolute_actions_processor": {"enabled": (False,)},
    "normalizer_processor": {
        "eps": (1e-8,),
        "features": _ANYTHING,
        "norm_map": _ANYTHING,
        "normalize_observation_keys": (None, ["observation.state"]),
    },
    "unnormalizer_processor": {"eps": (1e-8,), "features": _ANYTHING, "norm_map": _ANYTHING},
    "tokenizer_processor": {
        "tokenizer_name": _ANYTHING,
        "max_length": _ANYTHING,
        "task_key": ("task",),
        "padding_side": ("right",),
        "padding": ("max_length", "longest"),
        "truncation": (True,),
    },
    "device_processor": {"device": _ANYTHING, "float_dtype": (None, "float32")},
}
"""Steps of LeRobot's pi0.5 and pi0 and, for each key, the values that mean what qlibero does. `_ANYTHING` is read
elsewhere or decides nothing. What only one of the two has stands in its `family.py`."""
_FREE = ("to_batch_processor",)


def _require_once(steps: tuple[Step, ...], where: str) -> None:
    order = [step.registry_name for step in steps]
    if twice := next((name for name in order if order.count(name) > 1), None):
        raise UserError(f"{where}: the step {twice} stands there {order.count(twice)} times")


def _require_order(pre: tuple[Step, ...], where: str, chain: tuple[str, ...]) -> None:
    """The state has to be normalised before it is written into the prompt, names changed before they are looked up."""
    order = [step.registry_name for step in pre]
    chain = tuple(name for name in chain if name in order)
    if tuple(sorted(chain, key=order.index)) != chain:
        raise UserError(f"{where}: the steps run as {', '.join(map(str, order))}; supported is {', '.join(chain)}")


def _require_features(step: Step, config: Config, where: str) -> None:
    """LeRobot normalises what `features` lists; an empty map is what small exports have, and leaves it to the files."""
    said = step.config.get("features")
    if step.registry_name not in ("normalizer_processor", "unnormalizer_processor") or not said:
        return
    features = fit(_Features, {"features": said}, where).features
    key, real, padded = (
        ("observation.state", 8, config.max_state_dim or 32)
        if step.registry_name == "normalizer_processor"
        else ("action", 7, config.max_action_dim or 32)
    )
    if key not in features:
        raise UserError(f"{where} lacks {key}, so LeRobot would leave it as it is; that is not supported")
    _require_width(features, key, real, padded, where)


def _require_width(features: dict[str, Feature] | None, key: str, real: int, padded: int, where: str) -> None:
    shape = features[key].shape if features and key in features else None
    if shape not in (None, (real,), (padded,)):
        raise UserError(
            f"{where}.{key} has shape {list(shape)}; LIBERO's robot has {real} numbers (padded: {padded}): this "
            "checkpoint is for another robot"
        )


def _cameras(config: Config, pre: tuple[Step, ...], path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which of LIBERO's cameras comes first, which second, by the names after the rename map; and what to say of it."""
    visual = [name for name, feature in (config.input_features or {}).items() if feature.type == "VISUAL"]
    where = f"{path}/config.json: input_features"
    if not visual:
        return (AGENT, WRIST), ("config.json names no cameras: the agent's view is fed first, then the wrist's",)
    renamed = _rename_map(pre, path)
    found: list[int] = []
    for name in visual:
        source = renamed.get(name, name).removeprefix(_IMAGES)
        camera = next((camera for camera, names in _NAMES.items() if source in names), None)
        if camera is not None:
            found.append(camera)
        elif not _EMPTY.fullmatch(name.removeprefix(_IMAGES)):
            raise UserError(
                f"{where} names the camera {short(name)}, and nothing says whether that is LIBERO's agent view or "
                f"wrist view; say it in the rename_map of {PRE}: {{{_IMAGES}image: (agent), {_IMAGES}image2: (wrist)}}"
            )
    if sorted(found) != [AGENT, WRIST]:
        raise UserError(
            f"{where} names {count_text(len(visual), 'camera')} ({', '.join(map(short, visual))}); "
            "supported are policies that see "
            "LIBERO's agent view and wrist view, once each"
        )
    turned = found != [AGENT, WRIST]
    return tuple(found), (("the wrist's view is fed first, as config.json lists it",) if turned else ())


def _rename_map(pre: tuple[Step, ...], path: Path) -> dict[str, str]:
    """{the network's name: the environment's}. UserError for a map that is none, or touches more than cameras."""
    step = next((step for step in pre if step.registry_name == "rename_observations_processor"), None)
    said = step.config.get("rename_map") if step else None
    where = f"{path / PRE}: rename_observations_processor.rename_map"
    if not isinstance(said, dict | None) or not all(isinstance(name, str) for name in (said or {}).values()):
        raise UserError(f"{where} is {short(said)}; it is a map of names")
    for source, target in (said or {}).items():
        if source != target and not (source.startswith(_IMAGES) and target.startswith(_IMAGES)):
            raise UserError(f"{where} turns {short(source)} into {short(target)}; only cameras can be renamed")
    turned = {target: source for source, target in (said or {}).items()}
    if len(turned) < len(said or {}):
        raise UserError(f"{where} gives one name to two cameras")
    return turned
