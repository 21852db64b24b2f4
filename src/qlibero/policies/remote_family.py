"""The family `remote`: any server that speaks openpi's websocket protocol, see `remote.py`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qlibero.config.fields import Address, Float, Int, Word
from qlibero.config.policies import PolicySettings
from qlibero.registry import PolicyPlugin

if TYPE_CHECKING:
    from qlibero.policies.remote import RemotePolicy

PLUGIN = PolicyPlugin("remote", "a server that speaks openpi's websocket protocol", order=90)


class Remote(PolicySettings):
    """Any server that speaks openpi's websocket protocol. It can be neither quantized nor verified from here."""

    type: Literal["remote"]
    url: Address = Field(description="ws://host:port of the policy server")
    batch_size: Int = Field(4, ge=1, le=1024, description="requests in flight at once")
    timeout_s: Float = Field(60.0, ge=0.1, le=86_400, description="seconds to wait for one answer, and for a reconnect")
    api_key_env: Word | None = Field(None, description="environment variable that holds the server's API key")


Settings = Remote


def load(settings: Remote, skip: frozenset[str] = frozenset()) -> RemotePolicy:
    """Connected. WorkFailed where nobody answers."""
    from qlibero.policies.remote import RemotePolicy

    key = os.environ.get(settings.api_key_env) if settings.api_key_env else None
    return RemotePolicy(settings.url, batch_size=settings.batch_size, timeout_s=settings.timeout_s, api_key=key)
