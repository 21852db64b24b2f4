"""What the command line understands: every subcommand with its arguments, and what it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlibero.cli import arguments
from qlibero.cli.argument_parser import Parser, Version
from qlibero.cli.commands import episodes, installation, models, results
from qlibero.cli.outcomes import Document


def build_parser() -> Parser:
    parser = Parser(
        prog="qlibero",
        description="Run a vision-language-action policy on LIBERO under several quantization backends, "
        "and say what each costs in success and gives in latency and memory.",
        epilog="Every command ends with one JSON line on stdout (in a terminal only with --json); everything for "
        "people goes to stderr. "
        "Exit status: 0 done, 1 the work failed, 2 the request was wrong, 3 refused by a guard, "
        "4 `compare --fail-on` found a verdict it names, 130 interrupted.",
    )
    parser.add_argument("--version", action=Version, help="print qlibero's version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str,
        call: Callable[[argparse.Namespace], Document],
        help: str,
        parent: Any = commands,
        policy: bool = False,
        aliases: Sequence[str] = (),
    ) -> Parser:
        """`policy`: it may load a policy, so it runs in the policy process's environment."""
        command: Parser = parent.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", aliases=aliases
        )
        command.set_defaults(call=call, policy=policy)
        command.add_argument("--json", action="store_true", help="print the JSON line in a terminal too")
        return command

    command = add("run", episodes.run, "run, or continue, an experiment", policy=True)
    arguments.config(command)
    arguments.out(command)

    command = add(
        "compare", results.compare, "pair the arms of a run, or results of other tools, and give each a verdict"
    )
    command.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULT",
        help="run directories, single arms as DIR/ARM, exported tables, or result files of LeRobot, VLAQuantBench, "
        "vla-eval, RLinf, OpenVLA, "
        "openpi and its fork (docs/other_tools.md)",
    )
    command.add_argument(
        "--reference",
        metavar="ARM",
        help="the arm to compare with (default: baseline; among files, and arms as DIR/ARM, the first)",
    )
    arguments.labels(command)
    command.add_argument(
        "--margin",
        type=float,
        help="largest acceptable loss of success rate, e.g. 0.02 (default: what the runs declare)",
    )
    command.add_argument(
        "--estimand",
        metavar="QUESTION",
        help="what verdicts are about: these, new_inits or new_tasks (default: what the runs declare)",
    )
    command.add_argument(
        "--columns",
        metavar="FIELD=COLUMN,…",
        help="what the columns of a .csv, .tsv, .jsonl or .parquet are: task, success; init, seed, suite, arm if there",
    )
    command.add_argument(
        "--counts",
        nargs="+",
        metavar="NAME=K/N",
        help="instead of results: published successes, the reference first; bounds over all pairings",
    )
    command.add_argument(
        "--fail-on",
        type=arguments.words,
        default=(),
        metavar="VERDICTS",
        help="exit with status 4 if an arm has one of these, e.g. inferior,worse",
    )

    command = add(
        "explain-gap",
        results.explain_gap,
        "say in which constants a run differs from a published protocol or another result, most likely cause first",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN", help="a run's directory or an exported table")
    command.add_argument(
        "other",
        metavar="OTHER",
        help="a protocol that `ls protocols` lists, e.g. openpi; a result file of another tool; or another run",
    )
    command.add_argument("--arm", metavar="NAME", help="which arm (default: baseline)")

    command = add("export", results.export, "write the episodes of runs as one table, to analyse or to publish")
    arguments.runs(command)
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("episodes.csv"),
        metavar="FILE",
        help=".jsonl or .parquet (everything; compare and report read it), or .csv (default: episodes.csv)",
    )
    command.add_argument(
        "--card", type=Path, metavar="FILE", help="write a dataset card too, e.g. README.md beside the table"
    )
    arguments.filters(command)

    command = add(
        "videos",
        episodes.videos,
        "replay episodes of a run onto video in every arm, those that flipped between arms first",
        aliases=("film",),
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    command.add_argument("--episodes", type=arguments.count, default=4, metavar="N", help="how many (default: 4)")
    arguments.filters(command)
    command.add_argument("--init", type=int, action="append", metavar="N", help="only this initial state; repeatable")

    command = add(
        "plan",
        episodes.plan,
        "what a sweep or experiment would run, how long it takes, what difference it could detect",
        policy=True,
    )
    arguments.config(command)
    arguments.out(command)
    command.add_argument(
        "--calibrate", action="store_true", help="run one episode of each arm that has no known cost (they count)"
    )

    command = add(
        "sweep", episodes.sweep, "run the cells of a sweep, or one experiment, in shards; again: what is missing"
    )
    arguments.config(command)
    arguments.out(command)
    arguments.engine(command)
    command.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be submitted, and submit nothing"
    )

    command = add(
        "run-shard", episodes.run_shard, "what a job of a sweep executes: run, or continue, one shard", policy=True
    )
    command.add_argument("--manifest", type=Path, required=True, help="manifest.json of a submission")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--index", type=int, help="which shard")
    what.add_argument(
        "--merge", action="store_true", help="after all shards: mirror the ledgers, write sweep/result.json"
    )

    command = add("status", episodes.status, "how far a sweep or a run is, from its result files and the queue")
    command.add_argument("dir", type=Path, metavar="DIR", help="a sweep's or a run's directory")
    command.add_argument(
        "--follow",
        action="store_true",
        help="say it again every ten seconds until everything is done, or nothing is under way any more",
    )
    arguments.filters(command)

    command = add("report", results.report, "write one self-contained HTML file about one or several runs")
    arguments.runs(command)
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: report.html in the first run directory"
    )
    arguments.judged(command)
    arguments.labels(command)
    command.add_argument(
        "--max-mb",
        type=float,
        default=10.0,
        metavar="MB",
        help="embed videos of flipped episodes as long as the file stays below this (default: 10; 0: no videos)",
    )

    command = add(
        "open", results.open_report, "show the report of one or several runs in the browser, live while they run"
    )
    arguments.runs(command)
    arguments.judged(command)
    arguments.labels(command)

    command = add(
        "dashboard", results.dashboard, "save the comparison workspace of one or several runs on Weights & Biases"
    )
    command.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="runs whose mirrors are, or will be, on the server"
    )
    command.add_argument("--project", default="qlibero", help="W&B project (default: qlibero)")
    command.add_argument("--entity", help="W&B team or user (default: yours)")
    command.add_argument("--offline", action="store_true", help="only print the workspace's definition")

    command = add(
        "quantize",
        models.quantize,
        "make the artifacts of an experiment's quantized arms, without running it",
        policy=True,
    )
    arguments.config(command)
    command.add_argument("--out", type=Path, metavar="DIR", help="where artifacts are kept (default: logs/artifacts)")

    command = add(
        "probe",
        models.probe,
        "say what each arm does to the actions along demonstrations, before any rollout",
        policy=True,
    )
    arguments.config(command)
    command.add_argument(
        "--run",
        type=Path,
        metavar="RUN_DIR",
        help="ask along recorded episodes of this run's baseline, replayed, and say which flips that foretold",
    )
    command.add_argument(
        "--episodes", type=arguments.count, default=20, metavar="N", help="with --run: how many (default: 20)"
    )

    command = add(
        "allocate",
        models.allocate,
        "give every linear bits by what its rounding does to the actions, under a budget",
        policy=True,
    )
    arguments.config(command)
    budget = command.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-mb", type=float, metavar="N", help="most 10^6 bytes of weight codes")
    budget.add_argument("--mean-bits", type=float, metavar="B", help="most bits a weight, on average")
    command.add_argument(
        "--bits",
        default="4,8",
        metavar="B,B",
        help="bits that a linear may get (default: 4,8, which real kernels pack)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write quant.per_layer_bits here, for `extends:`")

    command = add(
        "inspect",
        models.inspect,
        "show a quantization artifact layer by layer, and which layers cost most",
        policy=True,
    )
    command.add_argument("artifact", type=Path, metavar="ARTIFACT")
    command.add_argument("--diff", type=Path, metavar="OTHER", help="another artifact to compare with")
    command.add_argument(
        "--measure",
        type=arguments.experiment_file,
        metavar="CONFIG",
        help="ask this experiment's policy, layer by layer, what each does to the actions (some seconds a layer)",
    )
    command.add_argument(
        "--sort", default="sqnr_db", metavar="COLUMN", help="column to sort by, worst first (default: sqnr_db)"
    )

    kernels = commands.add_parser("kernels", help="try and time the integer kernels").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = add(
        "check",
        models.kernels_check,
        "hold every kernel against the integer reference, on this machine",
        kernels,
        policy=True,
    )
    arguments.shapes(command)
    command.add_argument("--forget", action="store_true", help="test again what has passed before")

    command = add(
        "bench",
        models.kernels_bench,
        "time every kernel against the unquantized product and the hardware's limit",
        kernels,
        policy=True,
    )
    arguments.shapes(command)

    command = add("serve", models.serve, "put an arm's policy behind openpi's websocket protocol", policy=True)
    arguments.config(command)
    command.add_argument("--arm", default="baseline", help="which arm of the config (default: baseline)")
    command.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; elsewhere a token is required")
    command.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    command.add_argument("--token-env", metavar="NAME", help="environment variable that holds the clients' token")
    command.add_argument(
        "--ready-file", type=Path, metavar="FILE", help="written (JSON: host, port, pid) once connections are accepted"
    )

    checkpoint = commands.add_parser("checkpoint", help="look at a checkpoint").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = add(
        "verify",
        models.checkpoint_verify,
        "check names, shapes, values, statistics, profile and hash of a checkpoint",
        checkpoint,
    )
    command.add_argument("checkpoint", type=Path, metavar="PATH", help="an openpi or LeRobot checkpoint directory")

    command = add("lint", installation.lint, "say what is wrong with tasks: BDDL files of your own, or a suite's")
    command.add_argument(
        "tasks",
        nargs="+",
        type=Path,
        metavar="TASKS",
        help=".bddl files, directories of them, or names of suites, whose words are held against their goals",
    )
    command.add_argument(
        "--settle",
        action="store_true",
        help="settle every initial state of these suites in a simulator, about 15 s a task: what is thrown apart?",
    )

    command = add("doctor", installation.doctor, "say what is wrong with this machine, and the command that mends it")

    config = commands.add_parser("config", help="look at a configuration").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = add(
        "show", installation.config_show, "print the experiment with everything it extends and every default", config
    )
    command.add_argument(
        "config", nargs="?", type=arguments.experiment_file, metavar="CONFIG", help="an experiment's YAML file or name"
    )
    arguments.sets(command)
    command.add_argument("--schema", action="store_true", help="print the JSON Schema for editors instead")

    command = add("ls", installation.ls, "list what there is to choose from")
    lists = (
        "suites protocols policies backends methods corrections engines trackers sections experiments artifacts".split()
    )
    command.add_argument(
        "what",
        nargs="?",
        choices=("plugins", *lists),
        default="plugins",
        metavar="WHAT",
        help=f"{', '.join(lists)} (default: all that can be plugged in, with where it comes from)",
    )
    return parser
