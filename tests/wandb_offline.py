"""Reads a `run-<id>.wandb` file: what an offline run really holds, independent of the client that wrote it.

The file is a LevelDB log (32 KiB blocks, fragments with a 7-byte header) behind a 7-byte wandb header; each entry is a
`wandb_internal_pb2.Record`. A tail cut by a kill ends the reading quietly.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    run_id: str = ""
    group: str = ""
    history: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    """Files of each artifact, by its type."""
    finished: bool = False


def read_offline_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for data in _entries(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.group = record.run.run_id, record.run.run_group
            run.config |= _items(record.run.config.update)
            run.tags = list(record.run.tags)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "artifact":
            run.artifacts[record.artifact.type] = sorted(file.path for file in record.artifact.manifest.contents)
        elif kind == "exit":
            run.finished = True
    return run


def _items(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _entries(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", data[:7]
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 and length == 0:  # padding to the end of the block
            position += left
            continue
        fragment = data[position + 7 : position + 7 + length]
        if len(fragment) < length:
            return
        position += 7 + length
        if kind == FULL:
            yield fragment
        elif kind == FIRST:
            parts = fragment
        else:
            parts += fragment
            if kind == LAST:
                yield parts
