"""The command line: parse, call, print. What a command does lives in its room; what it returns is printed as JSON.

Human text goes to stderr. While a command runs, standard output itself points at stderr, so that no library's print
can come after, or between, the one JSON line that programs read. Heavy rooms are imported inside the commands:
`qlibero --help` must answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

from qlibero.errors import QliberoError, UserError, WorkFailed

Document = dict[str, Any]
INTERRUPTED = 130


class Incomplete(WorkFailed):
    """The command did what it could and has a result to show, but the work is not all done."""

    def __init__(self, message: str, document: Document):
        super().__init__(message)
        self.document = document


# ------------------------------------------------------------------------------------------------------ commands
def run(args: argparse.Namespace) -> Document:
    from qlibero.config.load import load_experiment
    from qlibero.experiment import run_experiment
    from qlibero.launch.environment import enter_policy_environment, toolkit_warning
    from qlibero.progress import RunProgress

    enter_policy_environment()
    experiment = load_experiment(args.config, args.set)
    with RunProgress(experiment) as progress:
        if warning := toolkit_warning():
            progress.say(warning)
        document = run_experiment(
            experiment, args.out, on_start=progress.start, on_episode=progress.episode, say=progress.say
        )
    from qlibero.reporting.terminal import print_run   # SciPy takes a second to import; the simulators start without it

    print_run(document["run_dir"])
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def compare(args: argparse.Namespace) -> Document:
    from qlibero.reporting.terminal import print_comparison
    from qlibero.results.compare import compare_runs

    document = compare_runs(args.run_dirs, args.reference, args.margin)
    print_comparison(document)
    return document


def plan(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch import cells
    from qlibero.launch.environment import enter_policy_environment
    from qlibero.launch.plan import plan as make_plan

    if args.calibrate:
        enter_policy_environment()
    document = make_plan(cells.make_manifest(load_sweep(args.config, args.set), args.out), _explain, args.calibrate)
    _table(document["cells"], title=f"{document['sweep']}: {document['done']} of {document['episodes']} episodes are in the ledger")
    if document["engines"]:
        _table([{"engine": name, **cost} for name, cost in document["engines"].items()], title="what is missing, on each engine")
    elif document["without_cost"]:
        _explain("no episode like these has been run yet, so no time can be told; --calibrate runs one of each (and keeps it)")
    return document


def sweep(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch.sweep import run_sweep

    document = run_sweep(load_sweep(args.config, args.set), args.engine, args.out, args.dry_run, _explain)
    if document["finished"] and not document["complete"] and not args.dry_run:
        raise Incomplete("not everything is done; the same command runs what is missing", document)
    return document


def run_shard(args: argparse.Namespace) -> Document:
    from qlibero.launch import cells
    from qlibero.launch.environment import enter_policy_environment
    from qlibero.progress import RunProgress

    if args.merge:
        return cells.merge(args.manifest, _explain)
    enter_policy_environment()
    manifest = cells.read_manifest(args.manifest)
    with RunProgress(manifest.experiment_of(args.index)) as progress:
        document = cells.run_shard(
            manifest, args.index, on_start=progress.start, on_episode=progress.episode, say=progress.say
        )
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def dashboard(args: argparse.Namespace) -> Document:
    from qlibero.reporting import wandb_workspace
    from qlibero.results.runs import read_run

    runs = [read_run(directory) for directory in args.run_dirs]
    tasks = sorted({record.task for run in runs for arm in run.arms.values() for record in arm.records})
    made = wandb_workspace.workspace(args.project, args.entity or "", [run.name for run in runs], tasks)
    document = {"workspace": made.name, "project": args.project, "entity": args.entity, "saved": not args.offline}
    if args.offline:
        return {**document, "spec": wandb_workspace.spec(made)}
    return {**document, "workspace": wandb_workspace.push(made)}


def status(args: argparse.Namespace) -> Document:
    from qlibero.launch import status as watch

    document = watch.follow(args.dir, lambda found: _explain(watch.headline(found))) if args.follow else watch.status(args.dir)
    _table(document["cells"], title=watch.headline(document))
    return document


def report(args: argparse.Namespace) -> Document:
    from qlibero.reporting.html import write_report

    document = write_report(args.run_dirs, args.output, args.reference, args.margin)
    _explain(f"report: {document['report']}")
    return document


def quantize(args: argparse.Namespace) -> Document:
    from qlibero.config.load import load_experiment
    from qlibero.launch.environment import enter_policy_environment

    enter_policy_environment()
    from qlibero.quant.prepare import quantize as make_artifacts

    document = make_artifacts(load_experiment(args.config, args.set), args.out, _counter("input groups"))
    _table(document["artifacts"], title="artifacts")
    return document


def inspect(args: argparse.Namespace) -> Document:
    from qlibero.quant.inspect import inspect_artifact

    document = inspect_artifact(args.artifact, args.diff, args.sort)
    _table(document["layers"], title=f"{document['artifact']['settings']}: {args.artifact}")
    _table(document["hint"], title="the noisiest layers: what their return to full precision would cost")
    if "diff" in document:
        _table(document["diff"]["layers"], title=f"change in {args.diff}")
    if args.measure:
        from qlibero.config.load import load_experiment
        from qlibero.quant.prepare import measured_sensitivity

        document["sensitivity"] = measured_sensitivity(load_experiment(args.measure), args.artifact)
        _table(document["sensitivity"], title="each layer quantized alone: what it does to the actions")
    return document


def kernels_check(args: argparse.Namespace) -> Document:
    from qlibero.launch.environment import enter_policy_environment

    enter_policy_environment()
    from qlibero import catalogue
    from qlibero.kernels import court, shapes

    device = args.device or ("cuda" if catalogue.has_cuda() else "cpu")
    policy = args.shapes or ("pi05" if device == "cuda" else "compact")
    layers = {"pi05": shapes.pi05_layers, "compact": shapes.compact_layers}[policy](
        args.weight_bits, args.activation_bits, device, args.group_size
    )
    names = args.backend or [name for name in catalogue.kernel_names() if catalogue.supports(name, layers[0].shape)]
    verdicts = [verdict for name in names for verdict in court.check(layers, name, remember=not args.forget)]
    document = {"device": device, "shapes": policy, "verdicts": [verdict.to_json() for verdict in verdicts]}
    rows = court.table(verdicts)
    _table([_tried(name, [row for row in rows if row["backend"] == name]) for name in names], title=f"court: {policy} shapes on {device}")
    if refused := [row for row in rows if row["verdict"] != "pass"]:
        _table(refused, title="not passed")
    court.enforce(verdicts)
    return document


def _tried(name: str, rows: list[Document]) -> Document:
    passed = [row for row in rows if row["verdict"] == "pass"]
    return {"backend": name, "shapes": len(rows), "passed": len(passed), "seconds": round(sum(row["seconds"] for row in rows), 1),
            "why": rows[0]["reason"] if rows else ""}  # fmt: skip


def checkpoint_verify(args: argparse.Namespace) -> Document:
    from qlibero.policies.pi05.verify import verify_checkpoint

    document = verify_checkpoint(args.checkpoint)
    for key, value in document.items():
        _explain(f"{key}: {value}")
    if not document["ok"]:
        raise Incomplete(f"{args.checkpoint}: {len(document['problems'])} problems, see above", document)
    return document


def doctor(args: argparse.Namespace) -> Document:
    from qlibero.doctor import diagnose

    findings = [finding.to_json() for finding in diagnose()]
    if not args.json:
        _table(findings, title="doctor")
    document = {"ok": all(f["status"] != "fail" for f in findings), "findings": findings}
    if not document["ok"]:
        raise Incomplete("something here will not work; each finding names the command that mends it", document)
    return document


def config_show(args: argparse.Namespace) -> Document:
    from qlibero.config.load import dump_resolved, editor_schema, load_experiment

    if args.schema:
        return editor_schema()
    if args.config is None:
        raise UserError("config show: name a CONFIG, or ask for --schema")
    experiment = load_experiment(args.config, args.set, check_files=False)
    print(dump_resolved(experiment), end="", file=sys.stderr)
    return experiment.model_dump(mode="json")


def ls(args: argparse.Namespace) -> Document:
    from qlibero import catalogue

    rows = getattr(catalogue, args.what)()
    _table(rows, title=args.what)
    return {args.what: rows}


# --------------------------------------------------------------------------------------------------------- parser
class Parser(argparse.ArgumentParser):
    """argparse whose complaints end like every other error: a UserError, one JSON line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}\n{self.format_usage().rstrip()}")


def build_parser() -> Parser:
    parser = Parser(
        prog="qlibero",
        description="Run a vision-language-action policy on LIBERO under several quantization backends, "
        "and say what each costs in success and gives in latency and memory.",
        epilog="Every command ends with one JSON line on stdout; everything for people goes to stderr. "
        "Exit status: 0 done, 1 the work failed, 2 the request was wrong, 3 refused by a guard, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, call: Callable[[argparse.Namespace], Document], help: str, parent: Any = commands) -> Parser:
        command = parent.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(call=call)
        return command

    command = add("run", run, "run, or continue, an experiment")
    _config(command)
    _out(command)

    command = add("compare", compare, "pair the arms of a run and give each a verdict")
    command.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="a run directory, or several to be read together")
    command.add_argument("--reference", default="baseline", metavar="ARM", help="the arm to compare with (default: baseline)")
    command.add_argument("--margin", type=float, default=0.02, help="largest acceptable loss of success rate (default: 0.02, 2 points)")

    command = add("plan", plan, "what a sweep or experiment would run, how long it takes, what difference it could detect")
    _config(command)
    _out(command)
    command.add_argument("--calibrate", action="store_true", help="run one episode of each arm that has no known cost (they count)")

    command = add("sweep", sweep, "run the cells of a sweep, or one experiment, in shards; again: what is missing")
    _config(command)
    _out(command)
    command.add_argument("--engine", choices=("local", "slurm", "ray"), help="default: launch.engine of the sweep")
    command.add_argument("--dry-run", action="store_true", help="print exactly what would be submitted, and submit nothing")

    command = add("run-shard", run_shard, "what a job of a sweep executes: run, or continue, one shard")
    command.add_argument("--manifest", type=Path, required=True, help="manifest.json of a submission")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--index", type=int, help="which shard")
    what.add_argument("--merge", action="store_true", help="after all shards: mirror the ledgers, write sweep/result.json")

    command = add("status", status, "how far a sweep or a run is, from its result files and the queue")
    command.add_argument("dir", type=Path, metavar="DIR", help="a sweep's or a run's directory")
    command.add_argument("--follow", action="store_true", help="say it again every ten seconds until everything is done")

    command = add("report", report, "write one self-contained HTML file about one or several runs")
    command.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the first run directory")
    command.add_argument("--reference", default="baseline", metavar="ARM", help="the arm to compare with (default: baseline)")
    command.add_argument("--margin", type=float, help="default: the experiment's stop.margin, or 0.02")

    command = add("dashboard", dashboard, "save the comparison workspace of one or several runs on Weights & Biases")
    command.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="runs whose mirrors are, or will be, on the server")
    command.add_argument("--project", default="qlibero", help="W&B project (default: qlibero)")
    command.add_argument("--entity", help="W&B team or user (default: yours)")
    command.add_argument("--offline", action="store_true", help="only print the workspace's definition")

    command = add("quantize", quantize, "make the artifacts of an experiment's quantized arms, without running it")
    _config(command)
    command.add_argument("--out", type=Path, metavar="DIR", help="where artifacts are kept (default: logs/artifacts)")

    command = add("inspect", inspect, "show a quantization artifact layer by layer, and which layers cost most")
    command.add_argument("artifact", type=Path, metavar="ARTIFACT")
    command.add_argument("--diff", type=Path, metavar="OTHER", help="another artifact to compare with")
    command.add_argument("--measure", type=Path, metavar="CONFIG",
                         help="ask this experiment's policy, layer by layer, what each does to the actions (a few seconds a layer)")
    command.add_argument("--sort", default="sqnr_db", metavar="COLUMN", help="column to sort by, worst first (default: sqnr_db)")

    kernels = commands.add_parser("kernels", help="try and time the integer kernels").add_subparsers(metavar="COMMAND", required=True)
    command = add("check", kernels_check, "hold every kernel against the integer reference, on this machine", kernels)
    command.add_argument("--backend", action="append", metavar="NAME", help="default: all that this machine supports; repeatable")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    command.add_argument("--shapes", choices=("pi05", "compact"), help="whose layers (default: pi05 on a GPU, compact on a CPU)")
    command.add_argument("--weight-bits", type=int, choices=(4, 8), default=4)
    command.add_argument("--activation-bits", type=int, choices=(4, 8, 16), default=8)
    command.add_argument("--group-size", type=int, metavar="K", help="input channels per weight scale (default: a whole row)")
    command.add_argument("--forget", action="store_true", help="try again what is known from earlier trials")

    checkpoint = commands.add_parser("checkpoint", help="look at a checkpoint").add_subparsers(metavar="COMMAND", required=True)
    command = add("verify", checkpoint_verify, "check names, shapes, values, statistics, profile and hash of a checkpoint", checkpoint)
    command.add_argument("checkpoint", type=Path, metavar="PATH", help="an openpi or LeRobot checkpoint directory")

    command = add("doctor", doctor, "say what is wrong with this machine, and the command that mends it")
    command.add_argument("--json", action="store_true", help="only the JSON line")

    config = commands.add_parser("config", help="look at a configuration").add_subparsers(metavar="COMMAND", required=True)
    command = add("show", config_show, "print the experiment with everything it extends and every default", config)
    command.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="an experiment's YAML file")
    _sets(command)
    command.add_argument("--schema", action="store_true", help="print the JSON Schema for editors instead")

    command = add("ls", ls, "list what there is to choose from")
    command.add_argument("what", choices=("suites", "policies", "backends", "experiments"))
    return parser


def _config(command: Parser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="an experiment's YAML file, e.g. configs/experiments/baseline.yaml")
    _sets(command)


def _sets(command: Parser) -> None:
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key, e.g. --set quant.alpha=0.6; repeatable")


def _out(command: Parser) -> None:
    command.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: logs/NAME)")


# ------------------------------------------------------------------------------------------------------- printing
def _table(rows: list[Document], title: str) -> None:
    from rich.table import Table

    from qlibero.progress import console

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column in (columns[0], "file"))
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console().print(table)


def _counter(what: str) -> Callable[[int, int], None]:
    def count(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} {what}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    return count


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def _stdout_kept_for_json() -> Iterator[Callable[[Document], None]]:
    stdout = sys.stdout
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)   # for C libraries and child processes

    def emit(document: Document) -> None:
        os.dup2(kept, 1)
        with suppress(BrokenPipeError):   # the reader has gone; nobody is left to tell
            print(json.dumps(document, default=str), file=stdout, flush=True)
        os.dup2(2, 1)

    try:
        with redirect_stdout(sys.stderr):
            yield emit
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _explain(message: str) -> None:
    print("\n".join(f"qlibero: {line}" if i == 0 else line for i, line in enumerate(message.splitlines())), file=sys.stderr)


def _terminated(signal_number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    previous = signal.signal(signal.SIGTERM, _terminated)   # a batch system's way of saying Ctrl-C
    args, wrong = None, None
    try:
        args = build_parser().parse_args(argv)   # `--help` prints on stdout and leaves from here
    except UserError as error:
        wrong = error
    try:
        with _stdout_kept_for_json() as emit:
            try:
                if wrong:
                    raise wrong
                emit(args.call(args))
                return 0
            except Incomplete as error:
                _explain(str(error))
                emit(error.document)
                return error.exit_status
            except QliberoError as error:
                return _failed(emit, error.exit_status, str(error), type(error).__name__)
            except KeyboardInterrupt:
                return _failed(emit, INTERRUPTED, "interrupted; everything finished is kept, the same command continues", "Interrupted")
            except OSError as error:
                traceback.print_exc()
                where = f": {error.filename}" if error.filename else ""
                return _failed(emit, 1, f"{error.strerror or error}{where}", type(error).__name__)
            except Exception as error:
                traceback.print_exc()
                return _failed(emit, 1, f"{error} (this is a defect of qlibero: the lines above say where)", type(error).__name__)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _failed(emit: Callable[[Document], None], status: int, message: str, kind: str) -> int:
    _explain(message)
    emit({"error": {"kind": kind, "message": message, "exit_status": status}})
    return status


if __name__ == "__main__":
    sys.exit(main())
