"""Policies: pi0.5 in this process (`pi05/`), any openpi-protocol server (`remote.py`), our own (`server.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlibero.policies.base import Policy


def load_policy(config: Any, skip: frozenset[str] = frozenset()) -> Policy:
    """See `load.load_policy`. Imported here so that naming the package does not import torch."""
    from qlibero.policies.load import load_policy as load

    return load(config, skip)


def weights_sha256(config: Any) -> str | None:
    """See `load.weights_sha256`."""
    from qlibero.policies.load import weights_sha256 as digest

    return digest(config)


def files_of(config: Any) -> list[Path]:
    """See `load.files_of`."""
    from qlibero.policies.load import files_of as files

    return files(config)
