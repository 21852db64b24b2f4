"""Result files of other tools, recognised and read as far as they go: one reader a tool, asked in turn.

None of them records what the scene was, and LeRobot not even which initial state an episode started from. So what is
read is a `ExternalArm`: outcomes under the best key that the file has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qlibero.errors import UserError
from qlibero.results.importers import lerobot, openpi_fork, openvla, rlinf, vla_eval, vlaquantbench
from qlibero.results.importers.columns import TABLES, read_table
from qlibero.results.importers.file import ResultFile
from qlibero.results.imports import ExternalArm

READERS = (vla_eval.read, vlaquantbench.read, lerobot.read, openpi_fork.read, openvla.read, rlinf.read)
"""Each answers None for a file that is not its tool's; the first one that knows it reads it."""


def read_external(path: Path | str, columns: Mapping[str, str] | None = None) -> list[ExternalArm]:
    """The results in a file of another tool: one, or several where `columns` (see `columns.py`) name an arm.

    Raises UserError naming the file, and the line or key, for anything else, for one without episodes, and for one in
    which an episode stands twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    file = ResultFile(path)
    try:
        arms = read_table(file, columns) if columns and path.suffix in TABLES else _recognised(file)
        if not arms:
            raise ValueError("a file without a single episode: nothing to compare")
        for arm in arms:
            _check(arm)
    except UserError as problem:
        raise UserError(str(problem) if str(problem).startswith(str(path)) else f"{path}: {problem}") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from None
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path}: looks like a known result file but lacks {problem}") from None
    return arms


def _recognised(file: ResultFile) -> list[ExternalArm]:
    if not file.head.strip():
        return []
    with suppress(UnicodeDecodeError):  # no text: none of theirs
        for read in READERS:
            if (found := read(file)) is not None:
                return [found]
    hint = "; say what its columns are with --columns task=…,success=…,init=…" if file.path.suffix in TABLES else ""
    raise UserError(
        f"{file.path}: not a result file of LeRobot (eval_info.json), VLAQuantBench (a cell's .jsonl), vla-eval "
        "(.json, recording-….sqlite), RLinf (its log), OpenVLA or openpi (their text logs), nor of the openpi fork "
        f"(<suite>_results.json, .jsonl or .csv){hint}; totals alone are for --counts; for a run of qlibero give its "
        "directory"
    )


def _check(arm: ExternalArm) -> None:
    if not arm.episodes:
        raise UserError(f"a result file of {arm.tool} without a single episode: nothing to compare")
    counts = Counter(key for key, _ in arm.episodes if key is not None)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        suite, task, init, _ = twice[0]
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise UserError(f"{suite} task {task}, episode {init} stands there more than once{more}; which one counts?")
