"""Arguments that several commands share, and the types of arguments: what they refuse, they name."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser as Parser
from pathlib import Path
from typing import Any

from qlibero.config.yaml_text import shown
from qlibero.registry import EnginePlugin, names


def config(command: Parser) -> None:
    config: Any = command.add_argument(
        "config",
        type=experiment_file,
        metavar="CONFIG",
        help="an experiment's YAML file, or a name that `ls experiments` lists, e.g. baseline",
    )
    config.completer = experiments
    sets(command)


def runs(command: Parser) -> None:
    command.add_argument(
        "run_dirs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="a run's directory, or a sweep's for all its cells; DIR/ARM for one arm",
    )


def judged(command: Parser) -> None:
    command.add_argument("--reference", metavar="ARM", help="the arm to compare with (default: baseline)")
    command.add_argument(
        "--margin",
        type=float,
        help="largest acceptable loss of success rate, e.g. 0.02 (default: what the runs declare)",
    )


def labels(command: Parser) -> None:
    command.add_argument(
        "--label",
        action="append",
        default=[],
        type=label,
        metavar="ARM=TEXT",
        help="what to call an arm, by its name here or as DIR/ARM; repeatable",
    )


def label(text: str) -> tuple[str, str]:
    arm, equals, name = text.rpartition("=")
    if not equals or not arm.strip() or not name.strip():
        raise argparse.ArgumentTypeError(f"{shown(text)} should look like ARM=TEXT")
    return arm.strip(), name.strip()


def filters(command: Parser) -> None:
    command.add_argument("--arm", action="append", metavar="NAME", help="only this arm; repeatable")
    command.add_argument("--task", type=int, action="append", metavar="N", help="only this task; repeatable")


def sets(command: Parser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, e.g. --set quant.alpha=0.6; repeatable",
    )


def words(text: str) -> tuple[str, ...]:
    from qlibero.results.paired_outcomes import Word

    words = tuple(word.strip() for word in text.split(","))
    known = [str(word) for word in Word]
    if unknown := [word for word in words if word not in known]:
        raise argparse.ArgumentTypeError(f"no verdict is called {', '.join(unknown)}; they are {', '.join(known)}")
    return words


def experiments(prefix: str, **_: Any) -> list[str]:
    """What a shell completes a CONFIG to."""
    from argcomplete.completers import FilesCompleter

    from qlibero.places import experiment_files

    return [*experiment_files(), *FilesCompleter(("yaml",))(prefix)]


def experiment_file(text: str) -> Path:
    from qlibero.places import experiment_file

    return experiment_file(text)


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return int(text)


def shapes(command: Parser) -> None:
    command.add_argument(
        "config",
        nargs="?",
        type=experiment_file,
        metavar="CONFIG",
        help="an experiment: its quantized arms' layers at the run's token counts, "
        "instead of --shapes and the bits below",
    )
    sets(command)
    command.add_argument(
        "--backend", action="append", metavar="NAME", help="default: all that this machine supports; repeatable"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    command.add_argument(
        "--shapes", choices=("pi05", "compact"), help="whose layers (default: pi05 on a GPU, compact on a CPU)"
    )
    command.add_argument("--weight-bits", type=int, choices=(4, 8), default=4)
    command.add_argument("--activation-bits", type=int, choices=(4, 8), default=8)
    command.add_argument(
        "--group-size", type=int, metavar="K", help="input channels per weight scale (default: a whole row)"
    )


def engine(command: Parser) -> None:
    found: Any = command.add_argument(
        "--engine",
        metavar="NAME",
        help="local, slurm, ray, or a plug-in (`qlibero ls engines`); default: launch.engine of the sweep",
    )
    found.completer = lambda **_: names(EnginePlugin)


def directory(text: str) -> Path:
    path = Path(text)
    try:
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise argparse.ArgumentTypeError(f"{shown(text)} has a part of more than 255 bytes, which no disk takes")
        if not path.is_dir() and (path.exists() or path.is_symlink()):
            raise argparse.ArgumentTypeError(f"{shown(text)} is there and is no directory")
    except (OSError, ValueError) as problem:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {problem}") from None
    return path


def out(command: Parser) -> None:
    command.add_argument("--out", type=directory, metavar="DIR", help="run directory (default: logs/NAME)")
