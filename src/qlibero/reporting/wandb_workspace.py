"""The comparison workspace on Weights & Biases, defined in code, so that every experiment gets the same one.

It shows what `tracking.wandb_mirror` logs: success by arm with its interval, latency, the trade-off of both, flips
against the baseline, tasks, videos, and the run comparer. Needs the optional wandb-workspaces; building it needs no
network, and `spec` is what would be sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlibero.documents import JsonObject
from qlibero.errors import UserError, WorkFailed
from qlibero.results.axes import axis_of, task_name
from qlibero.results.runs import RunResults

RATE = ("success_rate", "success_rate_low95", "success_rate_high95")
PERCENTILES = tuple(f"latency_ms/{p}" for p in ("p50", "p95", "p99"))
COLUMNS = (
    "arm",
    "episodes",
    "successes",
    "errors",
    *RATE,
    "versus_baseline/verdict",
    "versus_baseline/delta",
    "latency_ms/p50",
)
READ_ME = """\
**Success** counts finished episodes; errors are a third outcome and are in no rate. `low95`, `high95` are Wilson's
interval. **Broken**: the baseline succeeds and this arm fails on the same episode; **repaired**: the other way round.
A difference is evidence only as a paired verdict: `qlibero compare` prints it, `versus_baseline/verdict` shows it."""


def metrics_of(runs: Iterable[RunResults]) -> tuple[list[str], list[str]]:
    """What tasks are called in these runs' summaries (SUITE/TASK where a run has several suites), and their axes."""
    tasks: dict[str, None] = {}
    axes: set[str] = set()
    for run in runs:
        seen = sorted({(r.suite, r.task) for arm in run.arms.values() for r in arm.records})
        tasks |= dict.fromkeys(task_name(suite, task, {suite for suite, _ in seen}) for suite, task in seen)
        axes |= {axis_of(suite) for suite, _ in seen}
    return list(tasks), sorted(axes) if len(axes) > 1 else []


def workspace(
    project: str,
    entity: str,
    experiments: Mapping[str, Sequence[str] | None],
    tasks: Sequence[str],
    axes: Sequence[str] = (),
) -> Any:
    """A `wandb_workspaces` workspace over the runs of `experiments`, with the arms to show of each (None: all), and
    panels for these tasks and perturbation axes. Without experiments it is over all runs of the project."""
    ws, wr = _libraries()
    name = "qlibero: " + (", ".join(experiments) or "all experiments")

    def bars(title: str, *metrics: str) -> Any:
        return wr.BarPlot(title=title, metrics=list(metrics), orientation="h", max_runs_to_show=50)

    def lines(title: str, *metrics: str, **more: Any) -> Any:
        return wr.LinePlot(
            title=title, x="episode", y=list(metrics), title_x="finished episodes", max_runs_to_show=50, **more
        )

    trade_off = wr.ScatterPlot(
        title="Success against latency",
        x=wr.SummaryMetric("latency_ms/p50"),
        y=wr.SummaryMetric("success_rate"),
        range_y=(0, 1),
    )
    numbers = dict.fromkeys(task.rpartition("/")[2] for task in tasks)
    videos = [f"rollout/task{task}/{outcome}" for task in numbers for outcome in ("success", "failure")]
    by_axis = [
        bars(
            f"Difference in success, {axis}",
            *(f"versus_baseline/axis/{axis}/{n}" for n in ("delta", "low95", "high95")),
        )
        for axis in axes
    ]
    sections = [
        ws.Section(
            "Verdict",
            [wr.MarkdownPanel(READ_ME), bars("Success rate, with its 95 % interval", *RATE), trade_off],
            is_open=True,
        ),
        ws.Section(
            "Flips against the baseline",
            [
                bars("Broken and repaired pairs", "versus_baseline/broken", "versus_baseline/repaired"),
                bars(
                    "Difference in success, with its 95 % interval",
                    "versus_baseline/delta",
                    "versus_baseline/low95",
                    "versus_baseline/high95",
                ),
            ],
            is_open=True,
        ),
        *([ws.Section("By perturbation axis", by_axis, is_open=True)] if axes else []),
        ws.Section(
            "Latency of a policy call",
            [
                bars("p50, p95 and p99 in ms", *PERCENTILES),
                lines("Median of each episode in ms", "latency_ms/episode_median"),
            ],
            is_open=True,
        ),
        ws.Section(
            "Success while it runs", [lines("Success rate so far, with its 95 % interval", *RATE, range_y=(0, 1))]
        ),
        ws.Section(
            "Tasks", [bars(f"Task {task}", f"task/{task}/successes", f"task/{task}/episodes") for task in tasks]
        ),
        ws.Section("How it moves", [lines(n, f"quality/{n}") for n in ("path_length_m", "jerk", "gripper_flips")]),
        ws.Section("Videos", [wr.MediaBrowser(title="Rollouts", media_keys=videos, num_columns=4)]),
        ws.Section("Configurations", [wr.RunComparer(diff_only="split")]),
    ]
    filters = [ws.Metric("group").isin(list(experiments))] if experiments else []
    if some := {name: arms for name, arms in experiments.items() if arms is not None}:
        # mirrors call a run EXPERIMENT/ARM; the group alone cannot leave arms out
        filters = [ws.Metric("displayName").isin([f"{name}/{arm}" for name, arms in some.items() for arm in arms])]
    runs = ws.RunsetSettings(filters=filters, pinned_columns=[f"summary:{column}" for column in COLUMNS])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        runset_settings=runs,
        settings=ws.WorkspaceSettings(x_axis="episode", max_runs=50, sort_panels_alphabetically=False),
    )


def spec(made: Any) -> JsonObject:
    """The workspace as it would be stored: plain data, the same each time."""
    found: JsonObject = _without_ids(made._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True))
    return found


def push(made: Any) -> str:
    """Save the workspace on the server of the user's environment and return its name there. Raises WorkFailed."""
    try:
        made.save()
    except Exception as problem:  # the client raises whatever its transport does
        raise WorkFailed(f"the workspace could not be saved: {type(problem).__name__}: {problem}") from problem
    return str(made.name)


def _libraries() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("dashboard: wandb-workspaces is not installed; pip install 'qlibero[dashboard]'") from None
    return ws, wr


def _without_ids(value: Any) -> Any:
    """The client draws random ids for panels and sections; they say nothing and would make every spec another."""
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("__id__", "id", "ref", "viewID")}
    return [_without_ids(v) for v in value] if isinstance(value, list) else value
