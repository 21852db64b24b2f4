"""What a policy server says, as far as it is believed: its metadata, and the shape of its answers.

Servers of openpi's protocol serve policies of any robot. An answer for another one can be cut to LIBERO's seven
numbers, and then it fails its episodes as a bad policy would; so it is refused instead, with its key and shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal
from qlibero.policies.wire import short

ACTION_NUMBERS = 7
MAX_ACTION = 20.0
"""LIBERO's controller clips actions to ±1; normalised actions of a policy that overshoots stay within a few."""


def read_metadata(metadata: Any, url: str) -> JsonObject:
    """The server's metadata; {} for one that says nothing.

    Raises GuardRefusal when it declares actions of another robot, or is not of the protocol.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise GuardRefusal(f"{url}: its metadata is {type(metadata).__name__}, openpi's protocol begins with a mapping")
    dim = metadata.get("action_dim")
    if dim is not None and dim != ACTION_NUMBERS:
        raise GuardRefusal(
            f"{url}: its metadata says action_dim {short(repr(dim), 40)}, LIBERO's robot takes {ACTION_NUMBERS} "
            "numbers: this server has a policy for another robot"
        )
    ours = metadata.get("qlibero")
    if ours is None:
        return metadata
    shape = ours.get("noise_shape") if isinstance(ours, dict) else None
    named = isinstance(ours, dict) and isinstance(ours.get("provenance"), dict) and "name" in ours["provenance"]
    whole = isinstance(shape, list | tuple) and len(shape) == 2 and all(type(n) is int and 0 < n <= 4096 for n in shape)
    if not (named and whole):
        raise GuardRefusal(f"{url}: its metadata's key qlibero lacks a noise_shape of two numbers or a provenance.name")
    return metadata


def declared_horizon(metadata: JsonObject) -> int | None:
    """The actions of a chunk as the metadata declares them; None where it does not."""
    horizon = metadata.get("action_horizon")
    if horizon is None and metadata.get("qlibero"):
        horizon = metadata["qlibero"]["noise_shape"][0]
    return horizon if type(horizon) is int else None


def read_actions(answer: Any, url: str, horizon: int | None, first: bool) -> np.ndarray:
    """(H, 7) float32 actions under the key `actions`. After the `first` answer, numbers that are not finite are left to
    the episode that gets them.

    Raises GuardRefusal for any other key, shape or type, for numbers beyond any controller's, and for a chunk that is
    not as long as `horizon` (what the metadata declares, or the first answer had).
    """
    if not isinstance(answer, dict):
        raise GuardRefusal(f"{url}: its answer is {type(answer).__name__}, expected a mapping with the key actions")
    if "actions" not in answer:
        said = answer.get("error")
        why = f"; it says: {short(str(said))}" if said else ""
        keys = short(", ".join(sorted(map(str, answer))) or "none")
        raise GuardRefusal(f"{url}: its answer has no key actions (its keys: {keys}){why}")
    found = answer["actions"]
    if not isinstance(found, np.ndarray | list | tuple):
        raise GuardRefusal(
            f"{url}: actions is {type(found).__name__}, expected an array of shape (H, {ACTION_NUMBERS})"
        )
    try:
        actions = np.asarray(found)
    except ValueError:
        raise GuardRefusal(f"{url}: the rows of actions differ in length, expected (H, {ACTION_NUMBERS})") from None
    if actions.dtype.kind not in "iuf":
        raise GuardRefusal(f"{url}: actions are of type {actions.dtype}, expected numbers")
    if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != ACTION_NUMBERS:
        raise GuardRefusal(
            f"{url}: actions has shape {actions.shape}, expected (H, {ACTION_NUMBERS}) with at least one row: LIBERO's "
            "robot takes 7 numbers (position 3, rotation 3, gripper), and none is cut off or added here"
        )
    if horizon is not None and len(actions) != horizon:
        raise GuardRefusal(
            f"{url}: actions has {count_text(len(actions), 'row')}, but {horizon} were declared or came before"
        )
    if first and not np.isfinite(actions).all():
        raise GuardRefusal(
            f"{url}: actions of shape {actions.shape} holds NaN or infinity in the server's first answer"
        )
    largest = np.abs(actions[np.isfinite(actions)]).max(initial=0.0)
    if largest > MAX_ACTION:
        raise GuardRefusal(
            f"{url}: actions holds {largest:g}; LIBERO's controller takes −1…1: are these joint angles, "
            "or normalised wrongly?"
        )
    return actions.astype(np.float32)
