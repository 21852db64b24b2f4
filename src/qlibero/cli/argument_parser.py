"""argparse as qlibero has it: its complaints are errors like every other, its hints name what was meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from qlibero.config.vocabulary import did_you_mean
from qlibero.config.yaml_text import short, shown
from qlibero.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints end like every other error: a UserError, one JSON line, exit status 2.

    A misspelt command or flag gets the nearest one; a command without what it needs shows its help.
    """

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("qlibero").strip()  # the program's own name stands before every message
        lacking = message.startswith("the following arguments are required")
        said = self.format_help() if lacking else self.format_usage()
        raise UserError(f"{command + ': ' if command else ''}{message}\n{said.rstrip()}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            message = f"invalid choice: {shown(value)}; write one of {', '.join(known)}{did_you_mean(value, known)}"
            raise argparse.ArgumentError(action, message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a flag that is not known is the fault of the command it was given to."""
        found, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            flags = [flag for flag in self._option_string_actions if len(flag) > 2]
            hints = [did_you_mean(word.partition("=")[0], flags) if word.startswith("-") else "" for word in rest]
            self.error(f"unrecognized arguments: {short(' '.join(rest), 200)}{''.join(dict.fromkeys(hints))}")
        return found, rest


class Version(argparse.Action):
    """Asks the installed package only when somebody wants to know."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"qlibero {version('qlibero')}")
        parser.exit()
