"""`main`, which turns every ending of a command into one JSON line and an exit status.

Human text goes to stderr. While a command runs, standard output itself points at stderr, so that no library's print
can come after, or between, the one JSON line that programs read.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn

from qlibero.cli.outcomes import Document, Incomplete, Refused
from qlibero.cli.parser import build_parser
from qlibero.console import log_to, print_line
from qlibero.errors import QliberoError, UserError
from qlibero.places import pasteable

log = logging.getLogger(__name__)

INTERRUPTED = 130


@contextmanager
def _stdout_kept_for_json(asked: bool) -> Iterator[Callable[[Document], None]]:
    stdout = sys.stdout
    quiet = stdout.isatty() and not asked  # people have read it all already
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)  # for C libraries and child processes

    def emit(document: Document) -> None:
        if quiet:
            return
        os.dup2(kept, 1)
        with suppress(BrokenPipeError):  # the reader has gone; nobody is left to tell
            print(json.dumps(document, default=str), file=stdout, flush=True)
        os.dup2(2, 1)

    try:
        with redirect_stdout(sys.stderr):
            yield emit
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _terminated(signal_number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    with log_to(print_line):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    previous = signal.signal(signal.SIGTERM, _terminated)  # a batch system's way of saying Ctrl-C
    args, wrong = None, None
    try:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
            import argcomplete

            argcomplete.autocomplete(parser)  # answers and ends here
        args = parser.parse_args(argv)  # `--help` prints on stdout and leaves from here
    except UserError as error:
        wrong = error
    if args is not None and args.policy and argv is None:
        from qlibero.machine.environment import enter_policy_environment

        enter_policy_environment()  # may start this process again, so before stdout is put aside
    try:
        asked = "--json" in (sys.argv[1:] if argv is None else argv)
        with _stdout_kept_for_json(asked) as emit:
            try:
                if wrong:
                    raise wrong
                assert args is not None, "parsed or wrong"
                emit(args.call(args))
                return 0
            except Incomplete as error:
                log.error(str(error))
                emit(error.document)
                return error.exit_status
            except Refused as error:
                return _failed(emit, error.exit_status, str(error), "GuardRefusal", error.document)
            except QliberoError as error:
                return _failed(emit, error.exit_status, str(error), type(error).__name__)
            except KeyboardInterrupt:
                return _failed(
                    emit,
                    INTERRUPTED,
                    "interrupted; everything finished is kept, the same command continues",
                    "Interrupted",
                )
            except OSError as error:
                traceback.print_exc()
                where = f": {error.filename}" if error.filename else ""
                return _failed(emit, 1, f"{error.strerror or error}{where}", type(error).__name__)
            except Exception as error:
                traceback.print_exc()
                return _failed(
                    emit, 1, f"{error} (this is a defect of qlibero: the lines above say where)", type(error).__name__
                )
    finally:
        signal.signal(signal.SIGTERM, previous)


def _failed(
    emit: Callable[[Document], None], status: int, message: str, kind: str, found: Document | None = None
) -> int:
    message = pasteable(message)
    log.error(message)
    emit({**(found or {}), "error": {"kind": kind, "message": message, "exit_status": status}})
    return status
