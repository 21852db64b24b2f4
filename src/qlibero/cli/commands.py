"""What each subcommand does: call a room, print for people, return the document that becomes the JSON line.

Rooms are imported inside the functions, because `qlibero --help` must answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlibero.console import table
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.places import pasteable
from qlibero.quoting import visible

Document = dict[str, Any]


class Incomplete(WorkFailed):
    """The command did what it could and has a result to show, but the work is not all done."""

    def __init__(self, message: str, document: Document):
        super().__init__(message)
        self.document = document


class Unwanted(Incomplete):
    """The work is done, and `compare --fail-on` names a verdict that was found."""

    exit_status = 4


class Refused(GuardRefusal):
    """A guard said no, and `document` holds all that it looked at."""

    def __init__(self, message: str, document: Document):
        super().__init__(message)
        self.document = document


def run(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import RunProgress
    from qlibero.config.load import load_experiment
    from qlibero.run.experiment import run_experiment

    experiment = load_experiment(args.config, args.set)
    with RunProgress(experiment) as progress:

        def verdict(run_dir: Path) -> None:
            from qlibero.reporting.terminal import print_run  # SciPy takes a second; the simulators start without it

            progress.stop()
            print_run(run_dir)

        document = run_experiment(
            experiment,
            args.out,
            on_start=progress.start,
            on_episode=progress.episode,
            say=progress.say,
            on_result=verdict,
        )
    _one_arithmetic(document, [document])
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def _one_arithmetic(document: Document, cells: Iterable[Document]) -> None:
    """Raises Refused, with the whole document, when an arm's kernels were found to compute something else."""
    from qlibero.results.arm_equality import refusal

    if said := "\n".join(filter(None, (refusal(cell["arithmetic"]) for cell in cells))):
        raise Refused(said, document)


def compare(args: argparse.Namespace) -> Document:
    from qlibero.reporting.terminal import print_comparison
    from qlibero.results.compare import as_document, compare_paths

    if bool(args.results) == bool(args.counts):
        raise UserError("compare: name run directories or result files, or --counts NAME=K/N NAME=K/N, and not both")
    if args.counts:
        from qlibero.results.published import compare_counts

        if args.reference or args.estimand or args.columns:
            raise UserError(
                "compare: --counts take the first as reference and know no estimand or column; leave those flags out"
            )
        cells = {"": compare_counts(args.counts, args.margin)}
    else:
        from qlibero.results.importers.columns import parse_columns

        columns = parse_columns(args.columns) if args.columns else None
        cells = compare_paths(args.results, args.reference, args.margin, args.estimand, columns)
    print_comparison(cells)
    document = as_document(cells)
    found = set().union(*(cell.words() for cell in cells.values())) & set(args.fail_on)
    if found:
        raise Unwanted(f"--fail-on {','.join(args.fail_on)}: found {', '.join(sorted(found))}", document)
    return document


def export(args: argparse.Namespace) -> Document:
    from qlibero.results.export import export_episodes

    document = export_episodes(args.run_dirs, args.output, args.arm, args.task, args.card)
    explain(f"{document['rows']} episodes: {document['file']}")
    if document["card"]:
        explain(f"dataset card: {document['card']}")
    return document


def explain_gap(args: argparse.Namespace) -> Document:
    from qlibero.results.explain_gap import explain_gap as explained

    found = explained(args.run_dir, args.other, args.arm)
    rows = [
        {"": d.likely, "constant": d.constant, "here": d.here, "there": d.there, "known of it": d.known}
        for d in found.differences
    ]
    rate = f", {found.other_rate[0]}/{found.other_rate[1]} there" if found.other_rate else ""
    table(rows, title=f"{found.arm} ({found.rate[0]}/{found.rate[1]}{rate}) against {found.other}, likeliest first")
    if found.unknown:
        explain(f"not known of one side: {', '.join(found.unknown)}")
    explain(f"equal: {', '.join(found.equal) or 'nothing that both say'}")
    return found.to_json()


def film(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import PhaseProgress
    from qlibero.run.filming import film_run

    with PhaseProgress():
        document = film_run(args.run_dir, args.episodes, explain, args.task, args.init, args.arm)
    explain(f"{len(document['videos'])} videos in {args.run_dir}/<arm>/videos")
    return document


def plan(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch import cells
    from qlibero.launch.plan import plan as make_plan
    from qlibero.launch.plan_tables import readable

    document = make_plan(cells.make_manifest(load_sweep(args.config, args.set), args.out), explain, args.calibrate)
    for title, rows in readable(document):
        table(rows, title)
    if document["without_cost"]:
        explain(
            "no episode like these has been run yet, so no time can be told; "
            "--calibrate runs one of each (and keeps it)"
        )
    return document


def sweep(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch.sweep import run_sweep

    document = run_sweep(load_sweep(args.config, args.set), args.engine, args.out, args.dry_run, explain)
    if document["finished"] and not document["complete"] and not args.dry_run:
        raise Incomplete("not everything is done; the same command runs what is missing", document)
    if document["merge_status"] and not document["finished"]:
        raise Incomplete("the shards are queued, the merge job after them is not: see above", document)
    if document["merge_status"]:
        raise Incomplete(
            "every episode is there, but the merge after them failed; the same command does it again", document
        )
    return document


def run_shard(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import RunProgress
    from qlibero.launch import cells

    manifest = cells.read_manifest(args.manifest)
    if args.merge:
        document = cells.merge(manifest, explain)
        _one_arithmetic(document, document["cells"].values())
        return document
    with RunProgress(manifest.experiment_of(args.index)) as progress:
        document = cells.run_shard(
            manifest, args.index, on_start=progress.start, on_episode=progress.episode, say=progress.say
        )
    _one_arithmetic(document, [document])
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def dashboard(args: argparse.Namespace) -> Document:
    from qlibero.reporting import wandb_workspace
    from qlibero.results.runs import read_runs

    runs = read_runs(args.run_dirs)
    tasks = sorted({record.task for run in runs for arm in run.arms.values() for record in arm.records})
    made = wandb_workspace.workspace(args.project, args.entity or "", [run.name for run in runs], tasks)
    document = {"workspace": made.name, "project": args.project, "entity": args.entity, "saved": not args.offline}
    if args.offline:
        return {**document, "spec": wandb_workspace.spec(made)}
    return {**document, "workspace": wandb_workspace.push(made)}


def status(args: argparse.Namespace) -> Document:
    from qlibero.launch import status as watch

    document = (
        watch.follow(args.dir, lambda found: explain(watch.headline(found)), args.task, args.arm)
        if args.follow
        else watch.status(args.dir, args.task, args.arm)
    )
    cells = [{key: value for key, value in cell.items() if key != "machines"} for cell in document["cells"]]
    table(cells, title=watch.headline(document))
    for line in watch.mixes(document):
        explain(line)
    if args.follow and not document["complete"]:
        raise Incomplete(
            "nothing has been under way for two minutes; `qlibero sweep` (or `run`) again runs what is missing",
            document,
        )
    return document


def report(args: argparse.Namespace) -> Document:
    from qlibero.reporting.html.document import write_report

    document = write_report(args.run_dirs, args.output, args.reference, args.margin, args.max_mb)
    left = f", {document['videos_left_out']} left out for its size" if document["videos_left_out"] else ""
    explain(
        f"report: {document['report']} ({document['bytes'] / 1e6:.1f} MB, {document['videos']} pairs of videos{left})"
    )
    return document


def open_report(args: argparse.Namespace) -> Document:
    import webbrowser
    from contextlib import suppress

    from qlibero.reporting.html.live import LiveReport, require_directories, serve

    require_directories(args.run_dirs)
    document: Document = {}

    def ready(url: str) -> None:
        document["url"] = url
        explain(f"{url} shows {', '.join(map(str, args.run_dirs))} as it grows, to this machine only; Ctrl-C ends it")
        if any(
            map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
        ):  # else it might start one in the terminal
            webbrowser.open(url)

    with suppress(KeyboardInterrupt):
        serve(LiveReport(args.run_dirs, args.reference, args.margin), ready)
    return document


def quantize(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import PhaseProgress
    from qlibero.config.load import load_experiment
    from qlibero.quant.prepare import quantize as make_artifacts
    from qlibero.quant.prepare import readable

    with PhaseProgress():
        document = make_artifacts(load_experiment(args.config, args.set), args.out)
    table(readable(document), title="artifacts")
    for made in document["artifacts"]:  # a path is as wide as a table
        explain(f"{made['settings']}: {made['path']}")
    return document


def inspect(args: argparse.Namespace) -> Document:
    from qlibero.quant.inspect import inspect_artifact, readable

    document = inspect_artifact(args.artifact, args.diff, args.sort)
    if args.measure:
        from qlibero.config.load import load_experiment
        from qlibero.quant.prepare import measured_sensitivity

        document["sensitivity"] = measured_sensitivity(load_experiment(args.measure), args.artifact)
    if args.json:
        return document
    table(readable(document["layers"]), title=f"{document['artifact']['settings']}: {args.artifact}")
    table(readable(document["hint"]), title="the noisiest layers: what their return to full precision would cost")
    if "diff" in document:
        table(readable(document["diff"]["layers"]), title=f"change in {args.diff}")
    if "sensitivity" in document:
        table(readable(document["sensitivity"]), title="each layer quantized alone: what it does to the actions")
    return document


def kernels_check(args: argparse.Namespace) -> Document:
    from qlibero.cli import catalogue
    from qlibero.kernels import validation

    policy, layers = _layers(args)
    names = args.backend or [name for name in catalogue.kernel_names() if catalogue.supports(name, layers[0].shape)]
    verdicts = [verdict for name in names for verdict in validation.check(layers, name, remember=not args.forget)]
    document = {
        "device": layers[0].shape.device,
        "shapes": policy,
        "verdicts": [verdict.to_json() for verdict in verdicts],
    }
    rows = validation.table(verdicts)
    title = f"kernel check: {policy} shapes on {layers[0].shape.device}"
    table([_tried(name, [row for row in rows if row["backend"] == name]) for name in names], title=title)
    if refused := [row for row in rows if row["verdict"] != "pass"]:
        table(refused, title="not passed")
        raise Refused(validation.refusals(verdicts), document)
    return document


def kernels_bench(args: argparse.Namespace) -> Document:
    from dataclasses import asdict

    from qlibero.cli import catalogue
    from qlibero.kernels.benchmark import bench, left_out

    policy, layers = _layers(args)
    names = args.backend or list(catalogue.kernel_names())
    impossible = left_out(layers, names)
    if args.backend and len(impossible) == len(names):
        raise UserError("nothing to time: " + "; ".join(f"{name}: {why}" for name, why in impossible.items()))
    timings = bench(layers, backends=args.backend)
    rows = [
        {
            "layer": t.layer,
            "shape": f"{t.n}×{t.k}",
            "tokens": t.tokens,
            "backend": t.backend,
            "µs": f"{t.us:.1f}",
            "speed-up": f"{t.speedup:.2f}×",
            "of limit": f"{t.of_limit:.0%}",
        }
        for t in timings
    ]
    table(
        rows,
        title=f"stopwatch: {policy} shapes on {layers[0].shape.device}, "
        "against the unquantized product and the hardware's limit",
    )
    if impossible:
        table([{"backend": name, "why": why} for name, why in impossible.items()], title="not timed here")
    return {
        "device": layers[0].shape.device,
        "shapes": policy,
        "timings": [asdict(t) for t in timings],
        "left_out": impossible,
    }


def _layers(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """Which policy's layers to try, as `kernels check` and `kernels bench` were asked."""
    if args.config is not None:
        from qlibero.config.load import load_experiment
        from qlibero.run.arms import layers_of_arms

        experiment = load_experiment(args.config, args.set)
        return experiment.name, layers_of_arms(experiment, explain)
    from qlibero.cli import catalogue
    from qlibero.kernels.shapes import compact_layers, pi05_layers

    if args.device == "cuda" and not catalogue.has_cuda():
        raise UserError("--device cuda: torch sees no GPU on this machine; leave it out, or see `qlibero doctor`")
    device = args.device or ("cuda" if catalogue.has_cuda() else "cpu")
    policy = args.shapes or ("pi05" if device == "cuda" else "compact")
    make = {"pi05": pi05_layers, "compact": compact_layers}[policy]
    return policy, make(args.weight_bits, args.activation_bits, device, args.group_size)


def _tried(name: str, rows: list[Document]) -> Document:
    passed = sum(row["layers"] for row in rows if row["verdict"] == "pass")
    return {
        "backend": name,
        "executed": sorted({row["executed"] for row in rows if row["executed"]}) or None,
        "layers": sum(row["layers"] for row in rows),
        "passed": passed,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "why": rows[0]["reason"] if rows else "",
    }


def checkpoint_verify(args: argparse.Namespace) -> Document:
    from qlibero.policies.pi05.verify import verify_checkpoint

    document = verify_checkpoint(args.checkpoint)
    table([{"about": key, "found": _brief(value)} for key, value in document.items()], title=str(args.checkpoint))
    if not document["ok"]:
        raise Incomplete(f"{args.checkpoint}: {len(document['problems'])} problems, see above", document)
    for condition in document["conditions"]:
        explain(f"loads when the config's policy says {condition}")
    return document


def _brief(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:6])) + (f" and {len(value) - 6} more" if len(value) > 6 else "") or "none"
    return value


def serve(args: argparse.Namespace) -> Document:
    from qlibero.config.load import load_experiment

    experiment = load_experiment(args.config, args.set)
    arms = {arm.name: arm for arm in experiment.arms()}
    if args.arm not in arms:
        raise UserError(f"--arm {args.arm}: {args.config} has the arms {', '.join(arms)}")
    token = os.environ.get(args.token_env) if args.token_env else None
    if args.token_env and not token:
        raise UserError(f"--token-env {args.token_env}: no such variable in the environment")

    from qlibero.policies.server import ServerSettings
    from qlibero.policies.server import serve as listen
    from qlibero.run.arms import load_arms

    settings = ServerSettings(args.host, args.port, token, args.ready_file, seed=experiment.seed)
    settings.require_possible()
    policies, meta = load_arms(experiment, [arms[args.arm]], explain)
    listen(
        policies[args.arm],
        settings,
        lambda port: explain(f"serving {args.arm} on ws://{args.host}:{port}; Ctrl-C ends it"),
    )
    return {"served": args.arm, "policy": meta[args.arm]["policy"]}


def doctor(args: argparse.Namespace) -> Document:
    from qlibero.cli.doctor import diagnose

    findings = [finding.to_json() for finding in diagnose()]
    if not args.json:
        table(findings, title="doctor")
    document = {"ok": all(f["status"] != "fail" for f in findings), "findings": findings}
    if not document["ok"]:
        raise Incomplete("something here will not work; each finding names the command that mends it", document)
    return document


def config_show(args: argparse.Namespace) -> Document:
    from qlibero.config.dump import dump_resolved, editor_schema
    from qlibero.config.load import load_experiment

    if args.schema:
        return editor_schema()
    if args.config is None:
        raise UserError("config show: name a CONFIG, or ask for --schema")
    experiment = load_experiment(args.config, args.set, check_files=False)
    print(dump_resolved(experiment), end="", file=sys.stderr)
    return experiment.model_dump(mode="json")


def ls(args: argparse.Namespace) -> Document:
    from qlibero.cli import catalogue

    rows = getattr(catalogue, args.what)()
    table(rows, title=args.what)
    for row in rows:
        if "validation" in row:
            row["court"] = row["validation"]  # the key's name before
    return {args.what: rows}


# --------------------------------------------------------------------------------------------------- printing
def explain(message: str) -> None:
    print("\n".join(f"qlibero: {visible(pasteable(message))}".splitlines()), file=sys.stderr)
