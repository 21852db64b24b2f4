"""Flipped episodes side by side: two videos on one clock, started where they part."""

from __future__ import annotations

import base64
from pathlib import Path

from qlibero.registry import SectionPlugin
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData, Video
from qlibero.reporting.html.sections.parts import section

PLUGIN = SectionPlugin("videos", "videos of flipped episodes, side by side", provides="videos", order=50)


def videos(m: ReportData) -> Markup | None:
    chosen, left_out = m.recorded, m.left_out
    if not chosen:
        return None
    many = len({v.key.suite for v in chosen}) > 1

    def place(v: Video) -> str:
        return f"{f'{v.key.suite} ' if many else ''}task {v.key.task}, initial state {v.key.init_name}"

    files = {
        path: f"v{i}" for i, path in enumerate(dict.fromkeys(p for v in chosen for p in (v.reference_file, v.arm_file)))
    }
    options = [
        el(
            "option",
            f"{'Broken' if v.arm_outcome == 'failure' else 'Repaired'}: {place(v)}, {m.arms[v.arm].label}",
            value=i,
            data_key=str(v.key),
            data_arm=v.arm,
            data_left=files[v.reference_file],
            data_right=files[v.arm_file],
            data_left_outcome=v.reference_outcome,
            data_right_outcome=v.arm_outcome,
            data_left_label=m.reference_of(v.arm).label,
            data_right_label=m.arms[v.arm].label,
            data_told=m.instruction(v.key.suite, v.key.task) or None,
            data_actions=v.actions_part,
            data_visible=v.visibly_part,
            data_gripper=v.grippers_part,
        )
        for i, v in enumerate(chosen)
    ]
    sides = [
        el(
            "figure",
            el(
                "video",
                muted=True,
                playsinline=True,
                preload="auto",
                id=f"video-{side}",
                aria_label=f"{side} video",
            ),
            el("figcaption", id=f"caption-{side}"),
        )
        for side in ("left", "right")
    ]
    controls = el(
        "div",
        el("button", "Play", type="button", id="play"),
        el("button", "To divergence", type="button", id="to-divergence"),
        el(
            "input",
            type="range",
            id="scrub",
            min=0,
            max=1000,
            value=0,
            step=1,
            aria_label="position in the episode",
        ),
        el("output", "step 0", id="step", for_="scrub"),
        class_="controls",
    )
    store = el("div", [el("data", id=id_, value=_data_uri(path)) for path, id_ in files.items()], hidden=True)
    return section(
        "videos",
        "Flipped episodes, side by side",
        el("label", "Episode ", el("select", options, id="episode"), class_="pick"),
        el("p", "", id="told", class_="told"),
        el("div", sides, class_="videos"),
        controls,
        el("p", "", id="divergence-text", class_="fine", aria_live="polite"),
        store,
        lead="Both videos share one clock and the same scene and policy noise, so they look the same until they part."
        + (
            f" {left_out} more flipped episode{'s were' if left_out > 1 else ' was'} recorded "
            "but left out to keep this file small."
            if left_out
            else ""
        ),
    )


def _data_uri(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
