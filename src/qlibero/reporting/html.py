"""`qlibero report`: one HTML file that opens anywhere, from a disk, without a network, and says what the runs
showed.

Everything visible is written here as HTML and inline SVG; the script only adds comfort (sorting, the map's
tooltip, two videos on one clock, copying). No chart library: the page without videos is a few hundred
kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlibero.errors import UserError, WorkFailed
from qlibero.reporting.markup import Markup, el, join, script_json
from qlibero.reporting.material import Material, Video, flipped_videos, gather
from qlibero.reporting.sections.differences import differences
from qlibero.reporting.sections.execution import execution
from qlibero.reporting.sections.flips import flip_columns, flip_rows, flips
from qlibero.reporting.sections.latency import latency
from qlibero.reporting.sections.layers import kernels, layers
from qlibero.reporting.sections.parts import section
from qlibero.reporting.sections.provenance import copyable, provenance
from qlibero.reporting.sections.success import success
from qlibero.reporting.sections.tradeoff import memory, pareto
from qlibero.reporting.sections.verdicts import verdicts
from qlibero.reporting.sections.videos import videos
from qlibero.results.judgement import check_margin
from qlibero.results.runs import common_margin, read_runs

VIDEO_MEGABYTES = 8.0


def write_report(
    paths: Sequence[Path | str],
    out: Path | str | None = None,
    reference: str | None = None,
    margin: float | None = None,
    video_megabytes: float = VIDEO_MEGABYTES,
) -> dict[str, Any]:
    """Write the report of one or several runs; `out` defaults to report.html in the first run directory.

    `reference` defaults to the baseline, without which a report has no verdicts; `margin` to the one the runs
    declare. Flipped episodes' videos are embedded up to `video_megabytes`. Returns {"report", "bytes", "video_bytes", "arms", "verdicts"}. Raises UserError
    for directories without a ledger, WorkFailed if the file cannot be written.
    """
    if not paths:
        raise UserError("report: name at least one run directory")
    runs = read_runs(paths)
    material = gather(runs, reference, check_margin(common_margin(runs) if margin is None else margin))
    filmed = flipped_videos(material)
    chosen = _within(filmed, video_megabytes * 1e6)
    page = render(material, chosen, len(filmed) - len(chosen))
    out = Path(out) if out is not None else runs[0].run_dir / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise WorkFailed(f"cannot write {out}: {problem.strerror}; choose another -o") from problem
    return {
        "report": str(out),
        "bytes": len(page.encode()),
        "video_bytes": sum(
            path.stat().st_size for path in {p for v in chosen for p in (v.reference_file, v.arm_file)}
        ),
        "arms": list(material.arms),
        "verdicts": {name: r["verdict"] for name, r in material.compared.items()},
    }


def _within(filmed: list[Video], budget: float) -> list[Video]:
    """As many as fit, in order; a file shared by two entries counts once."""
    chosen, paid = [], set()
    for video in filmed:
        new = {video.reference_file, video.arm_file} - paid
        cost = sum(path.stat().st_size for path in new) * 4 / 3
        if cost <= budget:
            budget -= cost
            paid |= new
            chosen.append(video)
    return chosen


def render(m: Material, filmed: list[Video], left_out: int = 0) -> str:
    """The whole page as text."""
    parts = [
        verdicts(m),
        success(m),
        differences(m),
        flips(m),
        videos(m, filmed, left_out),
        execution(m),
        latency(m),
        pareto(m),
        memory(m),
        kernels(m),
        layers(m),
        copyable(m),
        provenance(m),
        _reading(m),
    ]
    kept = [part for part in parts if part is not None]
    assets = files("qlibero.reporting")
    data = {
        "flips": {name: flip_rows(m, name) for name in m.compared},
        "columns": flip_columns(m) if m.compared else [],
        "tasks": [f"{suite} task {task}" for suite, task in m.tasks],
        "keys": [[suite, task] for suite, task in m.tasks],
        "labels": {name: arm.label for name, arm in m.arms.items()},
    }
    head = join(
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{m.name}: qlibero report"),
        el("style", Markup(assets.joinpath("report.css").read_text())),
    )
    body = join(
        el("a", "Skip to the result", href="#verdicts", class_="skip"),
        _header(m),
        _navigation(kept),
        el("main", kept),
        el(
            "footer",
            f"Written by qlibero on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {', '.join(r.run_dir.resolve().name for r in m.runs)}",
        ),
        script_json(data, "data"),
        el("script", Markup(assets.joinpath("report.js").read_text())),
    )
    return "<!doctype html>\n" + el("html", el("head", head), el("body", body), lang="en")


def _header(m: Material) -> Markup:
    suites = list(dict.fromkeys(suite for suite, _ in m.tasks))
    episodes = sum(len(arm.records) for arm in m.arms.values())
    steps = sum(r.steps for arm in m.arms.values() for r in arm.records.values())
    facts = f"{', '.join(suites)} · {len(m.tasks)} tasks · {len(m.arms)} arms · {episodes:,} episodes · {steps:,} control steps"
    return el(
        "header",
        el("p", "qlibero report", class_="eyebrow"),
        el("h1", m.name),
        el("p", facts, class_="facts-line"),
        el("button", "Light or dark", type="button", id="theme", class_="theme"),
        class_="top",
    )


def _navigation(parts: list[Markup]) -> Markup:
    ids = [part.split('id="', 1)[1].split('"', 1)[0] for part in parts]
    return el(
        "nav",
        el("ul", [el("li", el("a", id_.capitalize(), href=f"#{id_}")) for id_ in ids]),
        aria_label="Sections",
    )


def _reading(m: Material) -> Markup:
    terms = [
        (
            "pair",
            "The same suite, task, initial state and seed in both arms, with equal scene fingerprints and the same policy noise.",
        ),
        (
            "broken, repaired",
            "The reference succeeds and the arm fails; the reverse. Everything the comparison knows is in these two counts.",
        ),
        ("Δ", "(repaired − broken) / pairs, in percentage points. Negative: the arm loses."),
        (
            "non-inferior",
            f"The whole 95 % Tango interval of Δ lies above −{100 * m.margin:g} pp. “Not significant” is not non-inferior.",
        ),
        (
            "inferior",
            f"The whole interval lies below −{100 * m.margin:g} pp. Otherwise the result is inconclusive, and the power line says why.",
        ),
        (
            "McNemar",
            "Exact two-sided test that breaking and repairing are equally likely; Holm-adjusted over arms × suites.",
        ),
        (
            "tasks like these",
            "t interval over per-task differences: whole tasks are the units. Wider, and the one that generalises.",
        ),
        (
            "A/A",
            "The reference run again with another batch composition. What it flips is noise that no kernel is to blame for.",
        ),
        (
            "error",
            "A simulator or transport failed. Neither success nor failure; a verdict that errors could change is inconclusive.",
        ),
        (
            "jerk, path, flips",
            "Mean third difference of the gripper position × 20³ m/s³ up to the pair's earlier end; metres travelled; open-close changes.",
        ),
    ]
    return section(
        "reading",
        "How to read this",
        el("dl", [join(el("dt", t), el("dd", d)) for t, d in terms], class_="terms"),
    )
