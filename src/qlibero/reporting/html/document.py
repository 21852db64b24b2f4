"""`qlibero report`: one HTML file that opens anywhere, from a disk, without a network, and says what the runs showed.

Everything visible is written here as HTML and inline SVG; the script only adds comfort (sorting, the map's
tooltip, two videos on one clock, copying). No chart library: the page without videos is a few hundred
kilobytes.
"""

from __future__ import annotations

import dataclasses
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.files import replace
from qlibero.registry import BUILT_IN, SectionPlugin, every
from qlibero.reporting.html.markup import Markup, breakable, el, join, script_json
from qlibero.reporting.html.report_data import ReportData, Video, flipped_videos, gather, planned_episodes
from qlibero.reporting.html.sections.flips import flip_data
from qlibero.reporting.html.sections.parts import section
from qlibero.results.arm_equality import arithmetic, refusal
from qlibero.results.paired_outcomes import check_margin
from qlibero.results.selection import select

MEGABYTES = 10.0


def write_report(
    paths: Sequence[Path | str],
    out: Path | str | None = None,
    reference: str | None = None,
    margin: float | None = None,
    megabytes: float = MEGABYTES,
    labels: Mapping[str, str] | None = None,
) -> JsonObject:
    """Write the report of one or several runs; `out` defaults to report.html in the first run directory.

    `reference` defaults to the baseline, without which a report has no verdicts; `margin` to the one that each cell's
    runs declare. Flipped episodes' videos are embedded as long as the whole file stays within `megabytes`. A sweep's
    directory stands for its cells, DIR/ARM for that arm; `labels` as `selection.select` takes them. Returns {"report",
    "bytes", "video_bytes", "videos", "videos_left_out", "arms", "verdicts"}. Raises UserError for directories without a
    ledger, WorkFailed if the file cannot be written.
    """
    if not paths:
        raise UserError("report: name at least one run directory")
    runs = select(paths, labels)
    material = gather(runs, reference, None if margin is None else check_margin(margin))
    recorded = flipped_videos(material)
    page, chosen = fitting(material, recorded, megabytes * 1e6)
    out = Path(out) if out is not None else runs[0].run_dir / "report.html"
    replace(out, page, "Choose another -o")
    return {
        "report": str(out),
        "bytes": len(page),
        "video_bytes": sum(path.stat().st_size for path in {p for v in chosen for p in (v.reference_file, v.arm_file)}),
        "videos": len(chosen),
        "videos_left_out": len(recorded) - len(chosen),
        "arms": list(material.arms),
        "verdicts": {name: str(r.verdict.word) for name, r in material.compared.items()},
    }


def fitting(m: ReportData, recorded: list[Video], limit: float, state: str | None = None) -> tuple[bytes, list[Video]]:
    """The page as bytes with as many of the videos as keep it within `limit`. Without videos it is as long as it is."""
    page = render(m, [], len(recorded), state).encode()
    chosen: list[Video] = []
    wanted = _within(recorded, limit - len(page))
    while wanted and not chosen:
        full = render(m, wanted, len(recorded) - len(wanted), state).encode()
        if len(full) <= limit:
            page, chosen = full, wanted
        wanted = wanted[:-1]  # what the page says about its videos takes room too
    return page, chosen


def _within(recorded: list[Video], budget: float) -> list[Video]:
    """As many as fit, in order; a file shared by two entries counts once."""
    chosen: list[Video] = []
    paid: set[Path] = set()
    for video in recorded:
        new = {video.reference_file, video.arm_file} - paid
        cost = sum(path.stat().st_size for path in new) * 4 / 3
        if cost <= budget:
            budget -= cost
            paid |= new
            chosen.append(video)
    return chosen


def render(m: ReportData, recorded: list[Video], left_out: int = 0, state: str | None = None) -> str:
    """The whole page as text. With a `state` it follows its server (`live`): that is what it shows."""
    m = dataclasses.replace(m, recorded=tuple(recorded), left_out=left_out)
    parts = [_section(plugin, m) for plugin in every(SectionPlugin)]
    kept = [part for part in parts if part is not None]
    data = {"flips": flip_data(m), "labels": {id_: arm.label for id_, arm in m.arms.items()}}
    body = join(
        el("a", "Skip to the result", href="#verdicts", class_="skip"),
        _header(m),
        _navigation(kept),
        el("main", kept),
        el(
            "footer",
            f"Written by qlibero on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC "
            f"from {', '.join(r.run_dir.resolve().name for r in m.runs)}",
        ),
    )
    return document(m.name, body, data, state)


def _section(plugin: SectionPlugin, m: ReportData) -> Markup | None:
    """Markup of one part. A plug-in's that fails says so in its place: the page is not its to lose."""
    try:
        part: Markup | None = plugin.load()(m)
        return part
    except Exception as problem:
        if plugin.origin == BUILT_IN:
            raise
        said = f"{plugin.origin} ({plugin.module}) failed: {type(problem).__name__}: {problem}"
        return section(plugin.name, plugin.about, el("p", said, class_="lead"))


def document(title: str, body: Markup, data: JsonObject, state: str | None = None) -> str:
    """A page with the report's style and script. Nothing else may run in it, be loaded by it, or be sent from it."""
    assets = files("qlibero.reporting.html")
    style = assets.joinpath("report.css").read_text()
    scripts = [assets.joinpath(name).read_text() for name in ("report.js", "live.js")[: 1 if state is None else 2]]
    policy = {
        "default-src": ["'none'"],
        "style-src": [_hash(style)],
        "style-src-attr": ["'unsafe-inline'"],
        "script-src": list(map(_hash, scripts)),
        "img-src": ["data:"],
        "media-src": ["data:"],
        "connect-src": ["'none'" if state is None else "'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    head = join(
        el("meta", charset="utf-8"),
        el(
            "meta",
            http_equiv="Content-Security-Policy",
            content="; ".join(f"{k} {' '.join(v)}" for k, v in policy.items()),
        ),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title}: qlibero report"),
        el("style", Markup(style)),
    )
    page = join(
        el("div", body, id="page"),
        script_json(data | ({} if state is None else {"state": state}), "data"),
        [el("script", Markup(script)) for script in scripts],
    )
    return "<!doctype html>\n" + el("html", el("head", head), el("body", page), lang="en")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _header(m: ReportData) -> Markup:
    suites = list(dict.fromkeys(suite for suite, _ in m.tasks))
    steps = sum(r.steps for arm in m.arms.values() for r in arm.records.values())
    facts = [
        ", ".join(suites),
        count_text(len(m.tasks), "task"),
        count_text(len(m.parts), "cell") if len(m.parts) > 1 else None,
        count_text(len(m.arms), "arm"),
        _episodes(m),
        f"{steps:,} control steps",
    ]
    return el(
        "header",
        el("p", "qlibero report", class_="eyebrow"),
        el("h1", breakable(m.name)),
        el("p", " · ".join(filter(None, facts)), class_="facts-line"),
        _not_one_arithmetic(m),
        el("button", "Light or dark", type="button", id="theme", class_="theme"),
        class_="top",
    )


def _not_one_arithmetic(m: ReportData) -> Markup | None:
    """At the top: a page whose kernels were found wrong must not be read without it."""
    found = [refusal(arithmetic(run.run_dir, run.arms).problems) for run in m.runs]
    return el("pre", "\n".join(filter(None, found)), class_="refused", role="alert") if any(found) else None


def _episodes(m: ReportData) -> str:
    """Finished of planned, so that a run that is not done, or lost an episode, cannot pass for a whole one."""
    done = [key in arm.planned for arm in m.arms.values() for key, r in arm.records.items() if r.outcome != "error"]
    planned = [(planned_episodes(run) or 0) * len(run.arms) for run in m.runs]
    if 0 in planned:
        return count_text(len(done), "episode")
    return f"{sum(done):,} of {count_text(sum(planned), 'planned episode')}"


def _navigation(parts: list[Markup]) -> Markup:
    ids = [part.split('id="', 1)[1].split('"', 1)[0] for part in parts]
    return el(
        "nav",
        el("ul", [el("li", el("a", id_.capitalize(), href=f"#{id_}")) for id_ in ids]),
        aria_label="Sections",
    )
