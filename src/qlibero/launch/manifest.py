"""What stands in a submission's manifest.json: typed before a job believes it, whoever wrote or edited it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from qlibero.documents import checked, read_json
from qlibero.errors import UserError, WorkFailed

SCHEMA = 1


class CellEntry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[^/\x00]{1,255}$")]
    run_dir: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]
    axes: dict[str, str]


class Document(BaseModel):
    """The whole file. `shards` are [cell, index, count]."""

    model_config = ConfigDict(strict=True, extra="forbid")

    schema_: Annotated[int, Field(alias="schema")]
    sweep: str
    directory: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]
    cells: Annotated[list[CellEntry], Field(min_length=1)]
    shards: Annotated[list[Annotated[tuple[str, NonNegativeInt, int], Field(strict=False)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Document:
        known = [cell.id for cell in self.cells]
        if len(set(known)) != len(known) or {".", ".."} & set(known):
            raise ValueError("cells: ids must be names of directories, each once")
        for number, (cell, index, count) in enumerate(self.shards):
            if index >= count or cell not in known:
                raise ValueError(f"shards.{number}: shard {index} of {count} of {cell[:80]!r}, which there is not")
        return self


def read_document(path: Path) -> Document:
    """Raises UserError for a file that cannot be read or is no manifest, naming the key."""
    try:
        document = read_json(path)
    except (FileNotFoundError, WorkFailed) as problem:
        raise UserError(f"{path} cannot be read ({problem}); `qlibero sweep` writes manifests") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise UserError(f"{path}: manifest schema {str(found)[:40]!r}, this qlibero reads {SCHEMA}")
    return checked(Document, document, path)
