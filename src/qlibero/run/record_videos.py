"""`qlibero videos`: videos of episodes that are in a run's ledger, made by replaying their actions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlibero.config.schema import Experiment
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError, WorkFailed
from qlibero.results.ledger import read_ledger, read_trajectory
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import video_path


def record_videos(
    run_dir: Path,
    episodes: int,
    tasks: Sequence[int] | None = None,
    inits: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> JsonObject:
    """Videos of a run's episodes, the same in every arm, flipped ones first; what has a video already stays.

    `tasks`, `inits`, `arms`: only these. The document lists the `videos` that were made, those that were `there`, and
    the `missing`: of episodes whose actions were not kept, or whose simulator died. Raises UserError where no episode
    fits, and `WorkFailed` for a replay that differs from its record: it needs the simulator and renderer that the
    records came from. GuardRefusal for packages that are not the published ones.
    """
    import shutil

    from qlibero.config.load import load_experiment
    from qlibero.run.replay import replay
    from qlibero.run.simulators import start_pool
    from qlibero.sim.provenance import enforce

    if not (run_dir / "experiment.yaml").is_file():
        raise UserError(
            f"{run_dir}: no run directory (it has no experiment.yaml); `qlibero run` prints the one it writes"
        )
    experiment = load_experiment(run_dir / "experiment.yaml", environ={}, check_files=False)
    enforce()
    chosen = [(video_path(run_dir, r), r) for r in wanted_episodes(experiment, run_dir, episodes, tasks, inits, arms)]
    there = [path for path, _ in chosen if path.exists()]
    wanted = [r for path, r in chosen if path not in there and read_trajectory(run_dir, r) is not None]
    videos: list[Path] = []
    if wanted:
        if shutil.which("ffmpeg") is None:
            raise WorkFailed("videos need ffmpeg, and this machine has none; `qlibero doctor` says how to get it")
        with start_pool(experiment, len(wanted)) as pool:
            videos = replay(run_dir, wanted, pool, experiment.protocol)
    missing = [path for path, _ in chosen if path not in there and path not in videos]
    found = {"videos": videos, "there": there, "missing": missing}
    return {"run_dir": str(run_dir), **{key: [str(path) for path in paths] for key, paths in found.items()}}


def wanted_episodes(
    experiment: Experiment,
    run_dir: Path,
    episodes: int,
    tasks: Sequence[int] | None = None,
    inits: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> list[EpisodeRecord]:
    """Which records should have a video: so many initial states that any of `arms` (default: all) has finished, flipped
    first.

    What flips is judged over all arms. Raises UserError for an arm
    that the run does not have, and where nothing finished fits the filters.
    """
    names = [arm.name for arm in experiment.arms()]
    if unknown := [arm for arm in arms or () if arm not in names]:
        raise UserError(f"--arm {unknown[0]}: {run_dir} has the arms {', '.join(names)}")
    found: dict[EpisodeKey, list[EpisodeRecord]] = {}
    for name in names:
        for record in read_ledger(run_dir, name):
            fits = (not tasks or record.task in tasks) and (not inits or record.init in inits)
            if fits and record.outcome != "error":
                found.setdefault(record.key, []).append(record)
    flips = {key for key, records in found.items() if len({record.outcome for record in records}) > 1}
    mine = {key: [r for r in records if not arms or r.arm in arms] for key, records in found.items()}
    keys = sorted((key for key, records in mine.items() if records), key=lambda key: (key not in flips, key))
    if not keys:
        asked = [f"--{name} {value}" for name, given in (("task", tasks), ("init", inits), ("arm", arms))
                 for value in given or ()]  # fmt: skip
        raise UserError(f"{run_dir}: no finished episode" + (f" fits {' '.join(asked)}" if asked else " yet"))
    return [one for key in keys[:episodes] for one in mine[key]]
