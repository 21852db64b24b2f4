"""An episode's frames straight into an .mp4 while it runs: an ffmpeg pipe, written aside and renamed when whole."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import numpy as np

from qlibero import files
from qlibero.errors import WorkFailed, cause
from qlibero.sim.suites import CONTROL_HZ


class VideoWriter:
    """Both cameras side by side, (R, 2R, 3) uint8 a frame, at the control rate: frame n shows control step n.

    What was seen last stands still until the next is seen, so an episode that is seen at its policy calls only costs no
    rendering beyond its own, and 3 ms of CPU a step to encode; 130 steps of 256 px are about 40 kB. A file of the final
    name is always a whole video: `finish` renames it into place, `discard` leaves none.
    """

    def __init__(self, path: Path, resolution: int) -> None:
        ffmpeg = shutil.which("ffmpeg")
        if ffmpeg is None:
            raise WorkFailed("videos need ffmpeg: apt-get install -y ffmpeg, or set videos off")
        self.path = path
        self._last: tuple[int, bytes] | None = None
        for leftover in path.parent.glob(f".{path.name[:40]}-*{files.PART}"):  # of a worker that died
            files.remove(leftover)
        try:
            self._part = files.beside(path)
        except OSError as problem:
            raise WorkFailed(f"cannot write {path}: {cause(problem)}") from problem
        self._process = subprocess.Popen(
            [
                ffmpeg,
                "-loglevel",
                "error",
                "-y",
                "-f",
                "rawvideo",
                "-pix_fmt",
                "rgb24",
                "-s",
                f"{2 * resolution}x{resolution}",
                "-r",
                str(CONTROL_HZ),
                "-i",
                "-",
                "-c:v",
                "libx264",
                "-preset",
                "veryfast",
                "-crf",
                "26",
                "-pix_fmt",
                "yuv420p",
                "-threads",
                "1",
                "-movflags",
                "+faststart",
                "-f",
                "mp4",
                str(self._part),
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the launcher; the pipe's end stops ffmpeg
        )
        assert self._process.stdin is not None, "a pipe was asked for"
        self._pipe = self._process.stdin

    def add(self, step: int, image: np.ndarray, wrist_image: np.ndarray) -> None:
        """What was seen at control step `step`, two (R, R, 3) uint8 images; steps come in ascending order."""
        self._hold(step)
        self._last = step, np.concatenate((image, wrist_image), axis=1).tobytes()

    def finish(self) -> None:
        """Close the file and give it its name."""
        if self._last is not None:
            self._hold(self._last[0] + 1)
        with contextlib.suppress(BrokenPipeError):  # its status says it
            self._pipe.close()
        if self._process.wait() != 0:
            files.remove(self._part)
            raise WorkFailed(f"ffmpeg could not write {self.path} (status {self._process.returncode})")
        try:
            files.settle(self._part, self.path)
        except OSError as problem:
            files.remove(self._part)
            raise WorkFailed(f"cannot write {self.path}: {cause(problem)}") from problem

    def _hold(self, until: int) -> None:
        if self._last is None:
            return
        since, frame = self._last
        try:
            for _ in range(since, until):
                self._pipe.write(frame)
        except BrokenPipeError:
            raise WorkFailed(f"ffmpeg stopped while writing {self.path} (disk full?)") from None

    def discard(self) -> None:
        """Stop and leave nothing."""
        self._process.kill()
        self._process.wait()
        files.remove(self._part)
