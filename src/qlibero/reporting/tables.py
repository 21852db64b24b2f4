"""The comparison as a table to paste: Markdown and LaTeX, with counts, for percentages alone cannot be checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlibero import quoting
from qlibero.reporting.html.sections.standing import standing
from qlibero.results.comparison import ArmComparison
from qlibero.results.summary import ArmSummary
from qlibero.results.wording import delta_text, interval_text


@dataclass(frozen=True)
class Row:
    """One arm: `comparison` is None for the reference; `memory`: the quantized linears in MB, as text."""

    label: str
    summary: ArmSummary
    comparison: ArmComparison | None
    memory: str


HEAD = (
    "arm",
    "success",
    "95 % CI",
    "Δ (pp)",
    "95 % CI",
    "broken / repaired",
    "verdict",
    "p50 (ms)",
    "linears (MB)",
)


def cells(row: Row) -> list[str]:
    s, c = row.summary, row.comparison
    control = c is not None and c.control
    errors = f", {s.errors} err." if s.errors else ""
    paired = ["reference", "", "", ""]
    if c is not None:
        paired = ["", "", "0 pairs", str(c.verdict.word)]
        if c.estimate is not None:
            flips = f"{c.table.broken} / {c.table.repaired} of {c.table.pairs}"
            margin = c.question.margin
            shown = delta_text(*c.estimate, margin), interval_text(c.estimate.interval, margin)
            paired = [*shown, flips, standing(c).word]
    wilson = s.wilson95
    return [
        row.label,
        f"{s.successes}/{s.episodes}{errors}",
        f"[{100 * wilson[0]:.1f}, {100 * wilson[1]:.1f}]" if wilson else "",
        *paired,
        # a control runs in batches of another size: its latency beside the others would be read as a backend's
        f"{s.latency_ms.p50:.1f}" if s.latency_ms and not control else "",
        row.memory,
    ]


def markdown(rows: Sequence[Row]) -> str:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(quoting.markdown(v) for v in values) + " |"

    align = ["---"] + ["---:"] * (len(HEAD) - 1)
    return "\n".join([line(HEAD), line(align), *(line(cells(row)) for row in rows)])


def latex(rows: Sequence[Row], caption: str) -> str:
    """A booktabs table."""

    def line(values: Sequence[str]) -> str:
        return " & ".join(quoting.latex(v) for v in values) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(HEAD) - 1)}}}",
            r"\toprule",
            line(HEAD),
            r"\midrule",
            *(line(cells(row)) for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{quoting.latex(caption)}}}",
            r"\end{table}",
        ]
    )
