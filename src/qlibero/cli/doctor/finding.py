"""What a check of `qlibero doctor` answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

SETUP = "./scripts/setup.sh"


@dataclass(frozen=True)
class Finding:
    """One answer. `hint` is a command or an action, empty when nothing is to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self) | {"cure": self.hint}  # the key's name before
