"""Where things lie: what comes with qlibero (configs, the embedded policy), and where runs are written.

In a checkout both lie in it. Installed from a wheel, the package carries its own copy of configs/ and of the embedded
policy, and runs go below the current directory: nothing is ever written beside the installed code. `QLIBERO_HOME`
moves logs/ in both cases, e.g. off a home directory with a quota.
"""

from __future__ import annotations

import os
import tempfile
from difflib import get_close_matches
from pathlib import Path

from qlibero.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_ABOVE = _PACKAGE.parent.parent

CHECKOUT: Path | None = (
    _ABOVE if (_PACKAGE.parent.name, (_ABOVE / "pyproject.toml").is_file()) == ("src", True) else None
)
"""The checkout of an editable install; None for an installed wheel."""
REPOSITORY = CHECKOUT or _PACKAGE / "repository"
"""Holds configs/ and examples/libero/embedded/: the checkout, or the wheel's copy of them."""
CONFIGS = REPOSITORY / "configs"
RUNS = Path(os.environ.get("QLIBERO_HOME") or CHECKOUT or Path.cwd()).expanduser().absolute() / "logs"
"""Run directories without --out."""

SCRATCH = "QLIBERO_SCRATCH"
"""Variable that names a directory of the node's own for what only this process needs (a run's films until it ends)."""


def scratch() -> Path:
    """Where temporary files of size go: $QLIBERO_SCRATCH, or what Slurm's prolog made for the job, or $TMPDIR."""
    for name in (SCRATCH, "SLURM_TMPDIR"):
        if directory := os.environ.get(name):
            return Path(directory)
    return Path(tempfile.gettempdir())


def experiment_files() -> dict[str, Path]:
    """The YAML files of the experiments and sweeps that come with qlibero, by name."""
    return {file.stem: file for folder in ("experiments", "sweeps") for file in (CONFIGS / folder).glob("*.yaml")}


def experiment_file(text: str) -> Path:
    """The YAML file that a command's CONFIG means: a path, or a name that `qlibero ls experiments` lists.

    Raises UserError for a bare name that is neither.
    """
    path = Path(text)
    if path.suffix or path.name != text or path.exists():
        return path
    known = experiment_files()
    if text in known:
        return known[text]
    close = get_close_matches(text, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`qlibero ls experiments` lists the names"
    raise UserError(f"{text}: neither a file nor an experiment that comes with qlibero; {hint}")
