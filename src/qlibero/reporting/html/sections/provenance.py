"""Tables to copy, and where every number comes from: environment, configuration, hashes, the ledger's state."""

from __future__ import annotations

from typing import Any

import yaml

from qlibero.console import count_text
from qlibero.registry import SectionPlugin
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections.parts import numbers, section, table
from qlibero.reporting.html.sections.tradeoff import is_unpacked
from qlibero.reporting.tables import Row, latex, markdown
from qlibero.results.arm_meta import ArmMeta, PolicyMeta
from qlibero.results.machines import mix_in_words
from qlibero.results.summary import summarize_arm

PLUGINS = (
    SectionPlugin("copyable", "tables to copy", provides="copyable", order=800),
    SectionPlugin("provenance", "where every number comes from", provides="provenance", order=801),
)


def copyable(m: ReportData) -> Markup:
    rows = [
        Row(arm.label, summarize_arm(m.records(name)), m.compared.get(name), _memory_text(arm.meta))
        for name, arm in m.arms.items()
    ]
    caption = f"{m.name}: paired comparison, margin {m.margins}." if m.compared else m.name
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


def _memory_text(meta: ArmMeta) -> str:
    """Megabytes of the quantized linears; not those of `fake`, which are no kernel's and would be quoted as if."""
    if not meta.memory:
        return ""
    return "unpacked (fake)" if is_unpacked(meta) else f"{meta.memory.kept / 1e6:.1f}"


def provenance(m: ReportData) -> Markup:
    parts = [table(["what", "value"], _software(m), caption="Software and hardware")]
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
    hidden = {"kernels", "layers", "memory", "label", "schema", "arm", "control", "warmup_ms"}
    settings = [_flat(arm.meta.model_dump(exclude_unset=True, exclude=hidden)) for arm in m.arms.values()]
    shared = [row for row in settings[0] if all(row in of for of in settings)] if len(settings) > 1 else []
    if shared:
        parts.append(numbers("Hashes and settings that all arms share", ["what", "value"], shared))
    for arm, of in zip(m.arms.values(), settings, strict=True):
        if rows := [row for row in of if row not in shared]:
            parts.append(numbers(f"Hashes and settings of {arm.label}", ["what", "value"], rows))
    ledgers = [(run, a) for run in m.runs for a in run.arms.values()]
    torn, repeated = sum(a.torn for _, a in ledgers), sum(a.repeated for _, a in ledgers)
    conflicts = [f"{a.arm} {key}" for _, a in ledgers for key in a.conflicts]
    episodes = sum(len(a.records) for _, a in ledgers)
    state = (
        f"{count_text(episodes, 'episode')} in the ledger, {count_text(repeated, 'superseded line')}, "
        f"{count_text(torn, 'torn line')}"
    )
    warning = (
        el(
            "p",
            f"Ran twice with different results: {', '.join(conflicts)}. "
            "Pure episodes never do; look for the cause first.",
            class_="fine warn",
        )
        if conflicts
        else None
    )
    return section(
        "provenance",
        "Environment and hashes",
        warning,
        *_mixes(m),
        *parts,
        lead=f"{state}. Everything on this page is computed from it.",
    )


def _mixes(m: ReportData) -> list[Markup]:
    """A sentence for each arm whose episodes come from machines that answer differently."""
    told = {arm.label: mix_in_words(m.records(name)) for name, arm in m.arms.items()}
    return [
        el("p", f"{label}: {mix}, which answer differently.", class_="fine warn") for label, mix in told.items() if mix
    ]


def _software(m: ReportData) -> list[list[Any]]:
    """What a reader asks first. A version that differs between runs, or between episodes, is told as all of them."""
    seen: dict[str, dict[str, None]] = {}
    for run in m.runs:
        of, git = run.environment, run.environment.get("git") or {}
        host, gl = of.get("host") or {}, of.get("gl") or {}
        changed = " with uncommitted changes" if git.get("modified") else ""
        found = {
            "git commit": git.get("commit", "") and f"{git['commit'][:12]}{changed}",
            "processor": ", ".join(
                str(x) for x in (host.get("cpu"), host.get("cores") and count_text(host["cores"], "core")) if x
            ),
            "GPU": ", ".join(f"{gpu.get('name')} (driver {gpu.get('driver')})" for gpu in of.get("gpus") or []),
            "rendering": gl.get("renderer", ""),
            **(of.get("versions") or {}),
        }
        for arm in run.arms.values():
            found["policy"] = _policy(arm.meta.policy)
            for record in arm.records[:1]:
                found |= record.versions
        for what, value in found.items():
            if value:
                seen.setdefault(what, {})[str(value)] = None
    first = ("policy", "git commit", "qlibero", "torch")
    order = [what for what in first if what in seen] + [what for what in seen if what not in first]
    missing = [[what, "not recorded by this run"] for what in ("git commit", "torch") if what not in seen]
    return [[what, "; ".join(seen[what])] for what in order] + missing


def _policy(policy: PolicyMeta) -> str:
    weights = f"weights {policy.sha256[:12]}…" if policy.sha256 else None
    return ", ".join(filter(None, (policy.type, policy.name, policy.dtype, policy.device, weights)))


def _flat(data: Any, prefix: str = "") -> list[list[Any]]:
    """Nested mappings as rows `a.b`, lists in one line."""
    rows = []
    for key, value in (data or {}).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):  # a GPU is a mapping of its own
                rows += _flat(item, f"{name}.{i}.") if isinstance(item, dict) else []
            if plain := [str(item) for item in value if not isinstance(item, dict)]:
                rows.append([name, ", ".join(plain)])
        elif value is not None and value != "":
            rows.append([name, str(value)])
    return rows
