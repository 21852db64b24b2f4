"""A run's videos: every episode leaves what its policy saw in scratch, and those that are wanted move to their arm.

Which episodes flip between arms is known only when all arms have run them, so all are recorded: frames that the policy
was shown anyway, encoded while it thinks. What can no longer be wanted is deleted at once.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from qlibero import files
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError, WorkFailed, cause
from qlibero.places import SCRATCH, scratch
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import video_path

log = logging.getLogger(__name__)


def scratch_path(scratch: Path, arm: str, key: EpisodeKey) -> Path:
    """Where an episode is recorded until somebody wants it."""
    return scratch / arm / f"{str(key).replace('/', '-')}.mp4"


class Videos:
    """Keeps the videos of `wanted` initial states, the same in every arm: those that flip first.

    A flip is kept as soon as it is one, so that whatever ends the run its video is there. `earlier` are the records
    that the ledgers held before. Use it as a context: the end deletes what was recorded and not kept.
    """

    def __init__(
        self,
        run_dir: Path,
        arms: Sequence[str],
        wanted: int | Literal["all"],
        earlier: Iterable[EpisodeRecord] = (),
    ):
        self.run_dir, self.arms, self.wanted = run_dir, arms, wanted
        self.records: dict[EpisodeKey, dict[str, EpisodeRecord]] = {}
        for record in earlier:
            self._add(record)
        self.kept = {key for key, found in self.records.items() if any(map(self._video, found.values()))}
        self.spare: list[EpisodeKey] = []
        self.directory: Path | None = None

    def __enter__(self) -> Videos:
        """Raises UserError where scratch cannot be written."""
        if self.wanted != 0 and shutil.which("ffmpeg") is None:
            log.warning("no videos: there is no ffmpeg on this machine (`qlibero doctor` says how to get it)")
            self.wanted = 0
        if self.wanted != 0:
            place = scratch()
            try:
                place.mkdir(parents=True, exist_ok=True)
                self.directory = Path(tempfile.mkdtemp(prefix="qlibero-videos-", dir=place))
            except OSError as problem:
                raise UserError(
                    f"{place}: no place for videos ({cause(problem)}); set {SCRATCH} to a directory, or videos to 0"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def finished(self, record: EpisodeRecord) -> None:
        """An episode of this run is in the ledger, and its video in scratch."""
        if self.directory is None or record.outcome == "error":
            return
        self._add(record)
        key = record.key
        if self.wanted == "all" or key in self.kept or (self.flipped(key) and self._flips_kept() < self.wanted):
            self._keep(key)
        elif len(self.records[key]) == len(self.arms):
            if len(self.spare) < self.wanted and not self.flipped(key):
                self.spare.append(key)
            else:
                self._forget(key)

    def fill(self) -> None:
        """The run is over: if fewer flipped than are wanted, others take the rest."""
        while self.directory is not None and self.spare and self.wanted != "all" and len(self.kept) < self.wanted:
            self._keep(self.spare.pop(0))

    def lacking(self) -> list[EpisodeRecord]:
        """Episodes that flipped and are still to be recorded by a replay: an arm ran them in an earlier call."""
        if self.directory is None:
            return []
        flips = [key for key in sorted(self.records) if self.wanted == "all" or self.flipped(key)]
        flips.sort(key=lambda key: key not in self.kept)
        keys = flips if self.wanted == "all" else flips[: self.wanted]
        return [one for key in keys for one in self.records[key].values() if not self._video(one)]

    def flipped(self, key: EpisodeKey) -> bool:
        """Whether arms differ in its outcome."""
        return len({record.outcome for record in self.records[key].values()}) > 1

    def _add(self, record: EpisodeRecord) -> None:
        if record.outcome != "error":
            self.records.setdefault(record.key, {})[record.arm] = record

    def _flips_kept(self) -> int:
        return sum(self.flipped(key) for key in self.kept)

    def _video(self, record: EpisodeRecord) -> bool:
        return video_path(self.run_dir, record).exists()

    def _keep(self, key: EpisodeKey) -> None:
        self.kept.add(key)
        assert self.directory is not None, "nothing was recorded"
        for record in self.records[key].values():
            recorded = scratch_path(self.directory, record.arm, key)
            if recorded.exists():
                try:  # scratch may be another disk
                    files.replace(video_path(self.run_dir, record), recorded.read_bytes())
                except (OSError, WorkFailed) as problem:
                    log.warning(f"a video is lost: {problem}")
                files.remove(recorded)

    def _forget(self, key: EpisodeKey) -> None:
        assert self.directory is not None, "nothing was recorded"
        for arm in self.arms:
            files.remove(scratch_path(self.directory, arm, key))
