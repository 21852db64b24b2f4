"""What the WANDB_* variables of a shell or a job script mean for a run: honoured, or named as unused, never ignored.

A key of `tracking:` goes before a variable. Two variables may only make a run more careful than its file: offline, or
no tracking at all; `online` has to be written, because it sends data away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlibero.documents import JsonObject

if TYPE_CHECKING:
    from qlibero.config.schema import Tracking

OF_A_KEY = {
    "WANDB_TAGS": "tags",
    "WANDB_RUN_GROUP": "group",
    "WANDB_NOTES": "notes",
    "WANDB_JOB_TYPE": "job_type",
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
}
UNUSED = {
    "WANDB_NAME": "every arm's run is called EXPERIMENT/ARM",
    "WANDB_RUN_ID": "every arm has an id of its own, kept in its directory",
    "WANDB_RESUME": "the ledger says where an arm's run goes on",
    "WANDB_DIR": "an arm's wandb directory lies in the run directory; --out moves it",
    "WANDB_SWEEP_ID": "`qlibero sweep` expands its own cells",
}
TAKEN = ("WANDB_MODE", "WANDB_DISABLED", *OF_A_KEY, *UNUSED)
"""Every variable that is decided here; wandb itself must not see them again."""


def apply(tracking: Tracking, environ: Mapping[str, str]) -> tuple[Tracking, list[str]]:
    """`tracking` with what the variables add to it, and one sentence for each that changes or would change something.

    Raises pydantic's ValidationError for a value that the key of the same meaning would refuse.
    """
    if "wandb" not in tracking.trackers or tracking.mode == "disabled":
        return tracking, []
    changes: JsonObject = {}
    notes = []
    mode = environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        changes["trackers"] = tuple(name for name in tracking.trackers if name != "wandb")
        return tracking.model_copy(update=changes), ["WANDB_MODE: no wandb mirror; the ledger can be replayed later"]
    if mode in ("offline", "dryrun") and tracking.mode == "online":
        changes["mode"] = "offline"
        notes.append(f"WANDB_MODE={mode}: wandb stays offline, although tracking.mode is online")
    elif mode and mode not in ("dryrun", tracking.mode):
        notes.append(f"WANDB_MODE is not used: tracking.mode is {tracking.mode}, and only that may send data away")
    fresh = type(tracking)()
    for variable, key in OF_A_KEY.items():
        if not (text := environ.get(variable, "").strip()):
            continue
        if getattr(tracking, key) != getattr(fresh, key):
            notes.append(f"{variable} is not used: the experiment sets tracking.{key}")
            continue
        changes[key] = tuple(tag.strip() for tag in text.split(",") if tag.strip()) if key == "tags" else text
        notes.append(f"{variable} sets tracking.{key}")
    notes += [f"{name} is not used: {why}" for name, why in UNUSED.items() if environ.get(name)]
    return type(tracking).model_validate({**tracking.model_dump(), **changes}), notes
