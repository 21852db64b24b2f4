"""The command line: the parser, what each subcommand does, and what is shown while it works."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. The console script `qlibero` starts here."""
    from qlibero.cli.app import main as run

    return run(argv)
