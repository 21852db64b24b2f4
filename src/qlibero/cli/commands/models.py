"""Commands about policies: their artifacts, kernels and checkpoints, and serving one."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING, Any

from qlibero.cli.outcomes import Document, Incomplete, Refused
from qlibero.console import count_text, table
from qlibero.errors import UserError

if TYPE_CHECKING:
    from qlibero.quant.recheck import Recheck

log = logging.getLogger(__name__)


def quantize(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import PhaseProgress
    from qlibero.config.load import load_experiment
    from qlibero.quant.prepare import quantize as make_artifacts
    from qlibero.quant.prepare import readable

    with PhaseProgress():
        document = make_artifacts(load_experiment(args.config, args.set), args.out)
    table(readable(document), title="artifacts")
    for made in document["artifacts"]:  # a path is as wide as a table
        log.info(f"{made['settings']}: {made['path']}")
    return document


def probe(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import PhaseProgress
    from qlibero.config.load import load_experiment
    from qlibero.quant.probe import probe as ask
    from qlibero.quant.probe import readable
    from qlibero.run.probe_run import probe_along

    experiment = load_experiment(args.config, args.set)
    with PhaseProgress():
        found = ask(experiment) if args.run is None else probe_along(experiment, args.run, args.episodes)
    seen = "that no arm was fitted on" if found.unseen else "some of which arms were fitted on"
    table(
        readable(found),
        title=f"change of the arm's actions (their size: {found.arm_action:.3f}), median of "
        f"{count_text(found.observations, 'observation')} {seen}",
    )
    return found.to_json()


def allocate(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import PhaseProgress
    from qlibero.config.load import load_experiment
    from qlibero.quant.allocate import allocate as choose
    from qlibero.quant.allocate import bits_of, readable

    bits = bits_of(args.bits)
    with PhaseProgress():
        document = choose(
            load_experiment(args.config, args.set),
            budget_mb=args.budget_mb,
            mean_bits=args.mean_bits,
            bits=bits,
            out=args.out,
        )
    table(readable(document), title=f"{document['mean_bits']:g} bits a weight, {document['weight_mb']:g} MB of codes")
    for name, said in (("together", document["together"]), ("evenly", document["evenly"])):
        log.info(f"{name}: arm error {said['arm']:.4g}, 95 % {said['arm95']}, gripper {said['gripper_changed']}")
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
    if "chosen" in document:
        table(
            readable(document["chosen"]), title="each input's transform, and the dB on held-out tokens it was chosen by"
        )
    if "diff" in document:
        table(readable(document["diff"]["layers"]), title=f"change in {args.diff}")
    if "sensitivity" in document:
        table(readable(document["sensitivity"]), title="each layer quantized alone: what it does to the actions")
    return document


def kernels_check(args: argparse.Namespace) -> Document:
    from qlibero.cli import catalogue
    from qlibero.kernels import names as kernel_names
    from qlibero.kernels import validation

    policy, layers = _layers(args)
    names = args.backend or [name for name in kernel_names() if catalogue.supports(name, layers[0].shape)]
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

    from qlibero.kernels import names as kernel_names
    from qlibero.kernels.benchmark import bench, left_out

    policy, layers = _layers(args)
    names = args.backend or list(kernel_names())
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
        title=f"benchmark: {policy} shapes on {layers[0].shape.device}, "
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
        return experiment.name, layers_of_arms(experiment)
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
    from qlibero.policies import verify

    document = verify(args.checkpoint)
    table([{"about": key, "found": _brief(value)} for key, value in document.items()], title=str(args.checkpoint))
    if not document["ok"]:
        raise Incomplete(f"{args.checkpoint}: {count_text(len(document['problems']), 'problem')}, see above", document)
    for condition in document["conditions"]:
        log.info(f"loads when the config's policy says {condition}")
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

    from qlibero.policies.listening import ServerSettings
    from qlibero.policies.server import serve as listen
    from qlibero.run.arms import load_arms

    settings = ServerSettings(args.host, args.port, token, args.ready_file, seed=experiment.seed)
    settings.require_possible()
    rechecks: dict[str, Recheck] = {}
    policies, meta = load_arms(experiment, [arms[args.arm]], rechecks=rechecks)
    recheck = rechecks.get(args.arm)
    listen(
        policies[args.arm],
        settings,
        lambda port: log.info(f"serving {args.arm} on ws://{args.host}:{port}; Ctrl-C ends it"),
        recheck.guard if recheck else None,
    )
    return {"served": args.arm, "policy": meta[args.arm]["policy"]}
