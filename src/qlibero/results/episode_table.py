"""The exported table of episodes: its columns, their types and what they mean. docs/export.md shows it to people.

A column is only ever added, and `VERSION` then rises; a reader of version N reads every table up to N.
"""

from __future__ import annotations

from typing import Any

SCHEMA = "qlibero-episodes"
VERSION = 2

# name: (type, meaning). `list` and `map` are left out of a .csv, which has no such thing.
COLUMNS: dict[str, tuple[str, str]] = {
    "run": ("string", "name of the run; the header says what it was"),
    "arm": ("string", "the arm within its run"),
    "suite": ("string", "LIBERO suite"),
    "task": ("int", "task of the suite, in LIBERO's order"),
    "init": ("int", "initial state of the task"),
    "inits": ("string", "what `init` counts: official states, or fresh ones"),
    "seed": ("int", "seed of scene and policy noise"),
    "instruction": ("string", "what the policy was told"),
    "outcome": ("string", "success, failure, or error (neither: the simulator or the policy broke)"),
    "success": ("int", "1 or 0; empty for an error"),
    "steps": ("int", "control steps executed"),
    "success_step": ("int", "step at which the goal held; empty without success"),
    "replans": ("int", "policy calls"),
    "attempt": ("int", "which try at the episode this is"),
    "error": ("string", "what broke, of an error"),
    "max_steps": ("int", "step cap in force"),
    "replan_steps": ("int", "actions executed of every chunk"),
    "latency_steps": ("int", "control steps before an answer was there; empty where the simulator waited"),
    "protocol": ("string", "pure, or the random stream of a published evaluation"),
    "fingerprint": ("string", "sha256 of the settled scene: equal means the same scene to the last bit"),
    "action_digest": ("string", "hash of all actions: equal means the same episode to the last bit"),
    "config_hash": ("string", "16 hex digits over the settings that decide an episode"),
    "identity": ("string", "16 hex digits over the content of what decides an action (weights, simulator, code)"),
    "probe": ("string", "16 hex digits over the actions of a fixed policy call on this machine"),
    "machine": ("string", "kind of machine"),
    "kernels": ("string", "16 hex digits over which kernel ran in which layer"),
    "path_length_m": ("double", "path of the gripper, metres"),
    "jerk": ("double", "mean jerk of the gripper, m/s³"),
    "gripper_flips": ("int", "times the gripper changed between opening and closing"),
    "policy_ms": ("list", "milliseconds of each policy call, of its whole batch"),
    "batch_sizes": ("list_int", "episodes that shared each call"),
    "phases_ms": ("map", "the same by phase of the call"),
    "policy_ms_p50": ("double", "median of the calls, each by its share of its batch"),
    "policy_ms_p95": ("double", "95th percentile of them"),
    "policy_ms_p99": ("double", "99th percentile of them"),
    "sim_ms": ("double", "simulating, in all"),
    "render_ms": ("double", "rendering, in all"),
    "wall_s": ("double", "from the episode's start to its end, waiting included"),
    "finished_at": ("string", "UTC"),
    "versions": ("map_string", "versions of what computed it"),
}
FLAT = tuple(name for name, (kind, _) in COLUMNS.items() if not kind.startswith(("list", "map")))
ADDED = ("run", "instruction", "success", "policy_ms_p50", "policy_ms_p95", "policy_ms_p99")
"""Columns that are made from the others and the header; the rest are an episode record's own fields."""


def arrow_schema(header: str) -> Any:
    """The columns as Arrow types, with `header` (JSON) in the file's own metadata under the schema's name."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int": pa.int64(),
        "double": pa.float64(),
        "list": pa.list_(pa.float64()),
        "list_int": pa.list_(pa.int64()),
        "map": pa.map_(pa.string(), pa.list_(pa.float64())),
        "map_string": pa.map_(pa.string(), pa.string()),
    }
    fields = [pa.field(name, types[kind], metadata={"about": about}) for name, (kind, about) in COLUMNS.items()]
    return pa.schema(fields, metadata={SCHEMA: header})
