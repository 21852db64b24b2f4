"""Tables to copy, and where every number comes from: environment, configuration, hashes, the ledger's state."""

from __future__ import annotations

from typing import Any

import yaml

from qlibero.reporting.markup import Markup, el
from qlibero.reporting.material import Material
from qlibero.reporting.sections.parts import numbers, section
from qlibero.reporting.sections.tradeoff import linear_bytes
from qlibero.reporting.tables import Row, latex, markdown
from qlibero.results.phrases import margin_text
from qlibero.results.summary import summarize_arm


def copyable(m: Material) -> Markup:
    rows = [
        Row(arm.label, summarize_arm(m.records(name)), m.compared.get(name), linear_bytes(arm.meta))
        for name, arm in m.arms.items()
    ]
    caption = f"{m.name}: paired comparison, margin {margin_text(m.margin)}." if m.comparison else m.name
    blocks = [
        el(
            "figure",
            el("figcaption", title, el("button", "Copy", type="button", data_copy=id_)),
            el("pre", text, id=id_, tabindex="0"),
        )
        for title, id_, text in (
            ("Markdown", "as-markdown", markdown(rows)),
            ("LaTeX", "as-latex", latex(rows, caption)),
        )
    ]
    return section("tables", "Tables to copy", el("div", blocks, class_="copyable"))


def provenance(m: Material) -> Markup:
    parts = []
    for run in m.runs:
        rows = _flat(run.environment)
        if rows:
            parts.append(numbers(f"Environment of {run.name}", ["what", "value"], rows))
        if run.experiment:
            text = yaml.safe_dump(run.experiment, sort_keys=False, allow_unicode=True)
            parts.append(
                el(
                    "details",
                    el("summary", f"Configuration of {run.name}"),
                    el("pre", text, tabindex="0"),
                    class_="numbers",
                )
            )
    for arm in m.arms.values():
        hidden = ("kernels", "layers", "memory", "label", "schema", "arm", "control", "warmup_ms")
        rows = _flat({k: v for k, v in arm.meta.items() if k not in hidden})
        if rows:
            parts.append(numbers(f"Hashes and settings of {arm.label}", ["what", "value"], rows))
    ledgers = [(run, a) for run in m.runs for a in run.arms.values()]
    torn, repeated = sum(a.torn for _, a in ledgers), sum(a.repeated for _, a in ledgers)
    conflicts = [f"{a.arm} {key}" for _, a in ledgers for key in a.conflicts]
    state = f"{sum(len(a.records) for _, a in ledgers):,} episodes in the ledger, {repeated} superseded lines, {torn} torn lines"
    warning = (
        el(
            "p",
            f"Ran twice with different results: {', '.join(conflicts)}. Pure episodes never do; look for the cause first.",
            class_="fine warn",
        )
        if conflicts
        else None
    )
    return section(
        "provenance",
        "Environment and hashes",
        warning,
        *parts,
        lead=f"{state}. Everything on this page is computed from it.",
    )


def _flat(data: Any, prefix: str = "") -> list[list[Any]]:
    """Nested mappings as rows `a.b`, lists in one line."""
    rows = []
    for key, value in (data or {}).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append([name, ", ".join(map(str, value)) or "–"])
        elif value is not None and value != "":
            rows.append([name, str(value)])
    return rows
