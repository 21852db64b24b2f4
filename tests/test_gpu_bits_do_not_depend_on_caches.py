"""Risk: on a GPU, bits that hang on a compiler's cache, a kernel chosen by timing, a graph or a crash (contracts 1, 5).

`test_bits_do_not_depend_on_caches.py` on a GPU, without simulators: each row is a process that loads the arms of two
experiments as a run does (calibrated or found, kernels tried, warmed up, probed) and asks each for actions. Skipped
without a GPU; `python -m pytest tests/test_gpu_bits_do_not_depend_on_caches.py` on a machine that has one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pi05_small import PROMPTS, observations

from qlibero.kernels import cuda_w4a8
from qlibero.places import REPOSITORY
from qlibero.policies.pi05.tokenizer import split_words
from qlibero.quant.observations import write_demonstrations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SUITE = f"""
from qlibero.registry import SuitePlugin
PLUGIN = SuitePlugin("words", "instructions without a simulator", provides="Words", tasks=3, max_steps=20)
class Words:
    language = staticmethod({PROMPTS!r}.__getitem__)
    task_files = staticmethod(lambda task: {{}})
"""
PROCESS = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from pi05_small import noises, observations
from qlibero.config.load import load_experiment
from qlibero.kernels import cuda_w4a8, triton_tiles, triton_w4a8, validation
from qlibero.kernels.cuda_plan import Plan
from qlibero.policies.pi05.sampler import Sampler
from qlibero.run.arms import load_arms

place, how = Path(sys.argv[1]), json.loads(sys.argv[2])
if "without graphs" in how:
    made = Sampler.__init__
    Sampler.__init__ = lambda self, model, steps=None, *, graphs: made(self, model, steps, graphs=False)
if "other tiles" in how:
    def other(tokens, n, k, processors, group_size=None):
        tile = triton_tiles.CANDIDATES[triton_tiles.bucket(tokens)][1]
        return triton_tiles.with_split(tile, tokens, n, k, processors // 3, group_size)
    triton_w4a8.choose_tile = other
    cuda_w4a8.choose = lambda m, n, k, processors: Plan(1, 16, 1)
if "fastest" in how:
    validation._seconds = lambda kernel, layer: float(kernel.name != how["fastest"])
found = {}
for file in sorted(place.parent.glob("*.yaml")):
    experiment = load_experiment(file)
    before = how["resumed"][file.stem] if "resumed" in how else None
    policies, meta = load_arms(experiment, experiment.arms(), before, run_dir=place / "run")
    for name, said in meta.items():
        policy, digest = policies[name], hashlib.sha256()
        for seed, count in ((1, 3), (2, 1)):
            actions = policy.infer(observations(count, seed), noises(count, policy.noise_shape, seed)).actions
            assert np.isfinite(actions).all()
            digest.update(actions.tobytes())
        found.setdefault(file.stem, {})[name] = {
            "actions": digest.hexdigest(), "probe": said["probe"], "identity": said["identity"],
            "artifact": said.get("artifact", {}).get("sha256"), "kernels_hash": said["kernels_hash"],
            "kernels": said.get("kernels", {}), "glue": said["policy"]["execution"]["glue"],
        }
(place / "found.json").write_text(json.dumps(found))
"""
DECIDED = ("actions", "probe", "identity", "artifact", "glue")


@dataclass(frozen=True)
class Row:
    """warm: which of the first row's caches and artifacts it finds. how: see PROCESS."""

    name: str
    warm: tuple[str, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)
    killed: bool = False
    read_only: bool = False


TRITON, OURS, ARTIFACTS = "triton", "ours", "artifacts"
EVERY = (TRITON, OURS, ARTIFACTS)
FIRST = Row("all cold")
BESIDE_IT = (Row("killed while all was cold", killed=True), Row("nothing can be kept", read_only=True))
AFTER_IT = (
    Row("all warm", EVERY),
    Row("only Triton cold", (OURS, ARTIFACTS)),
    Row("only Triton warm, calibrated again", (TRITON,)),
    Row("caches read-only", EVERY, read_only=True),
    Row("without graphs", EVERY, {"without graphs": True}),
    Row("other tiles", EVERY, {"other tiles": True}),
    Row("another kernel fastest", EVERY),
    Row("resumed where another is fastest", EVERY),
)


def command(row: Row) -> list[str]:
    if row.read_only and os.geteuid() == 0 and shutil.which("setpriv"):  # root, too, obeys the modes of files then
        return ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    return []


class Rows:
    """The processes of one device, each in a directory of its own below `base`."""

    def __init__(self, base: Path, device: str):
        self.base, self.device, self.began = base, device, time.monotonic()
        (base / "words.py").write_text(SUITE)
        data = write_demonstrations(base / "calibration.npz", observations(6), "random, for tests")
        words = sorted({*(w for prompt in PROMPTS for w in split_words(prompt)), "task", "state", "action"})
        vocabulary = {"type": "words", "words": [*words, *map(str, range(257))]}
        (base / "tokenizer.json").write_text(json.dumps(vocabulary))
        large = {"num_heads": 4, "head_dim": 128, "depth": 2}
        architecture = {
            "llm": {"width": 512, "mlp_dim": 1024, **large},
            "expert": {"width": 256, "mlp_dim": 512, **large},
            "vision": {"width": 144, "depth": 2, "mlp_dim": 320, "num_heads": 2, "image_size": 56},
            "vocab_size": 300,
        }
        (base / "config.json").write_text(json.dumps({"architecture": architecture, "profile": "openpi-state"}))
        kernels = ["triton_w4a8"] if device == "cuda" else ["cpu_int4"]
        hopper = ["cuda_w4a8"] if device == "cuda" and cuda_w4a8.missing() is None else []
        untrained = {"untrained": {"config": "config.json"}, "flow_steps": 3}
        self.experiment("embedded", {"checkpoint": str(REPOSITORY / "examples/libero/embedded")}, data, kernels)
        self.experiment("like_the_published", untrained, data, kernels + hopper)

    def experiment(self, name: str, policy: dict[str, Any], data: Path, kernels: list[str]) -> None:
        content = {
            "suite": "words",
            "policy": {"type": "pi05", "device": self.device, "batch_size": 2, **policy},
            "quant": {
                "layout": "llm+expert",
                "rotation_steps": 2,
                "block_size": 64,
                "calibration": {"path": str(data), "samples": 4},
            },
            "arms": ["baseline", "fake", *kernels, "auto"],
            "videos": 0,
            "tracking": [],
        }
        (self.base / f"{name}.yaml").write_text(json.dumps(content))

    def place(self, row: Row) -> Path:
        return self.base / row.name.replace(" ", "_")

    def start(self, row: Row, how: dict[str, Any]) -> subprocess.Popen:
        place, first = self.place(row), self.place(FIRST)
        for part in ("tmp", "run"):
            (place / part).mkdir(parents=True, exist_ok=True)
        (place / "no_home").write_text("")  # a file: nothing can be made below it
        at = {part: (first if part in row.warm else place) / part for part in EVERY}
        for part in EVERY:
            at[part].mkdir(exist_ok=True)
        if row.read_only:
            for part in (TRITON, OURS):
                if part in row.warm:
                    at[part] = shutil.copytree(at[part], place / f"{part}_copy")
                    for path in (at[part], *at[part].rglob("*")):
                        path.chmod(0o555 if path.is_dir() else 0o444)
                else:
                    at[part] = place / "no_home" / part
        if at[ARTIFACTS].parent == first != place:
            (place / ARTIFACTS).symlink_to(at[ARTIFACTS])
        mine = {
            "HOME": place / "no_home",
            "TMPDIR": place / "tmp",
            "QLIBERO_HOME": place,
            "TRITON_CACHE_DIR": at[TRITON],
            "XDG_CACHE_HOME": at[OURS],
            "NUMBA_CACHE_DIR": at[OURS] / "numba",
            "CUDA_CACHE_PATH": at[OURS] / "nv",
            "TORCHINDUCTOR_CACHE_DIR": place / "tmp/inductor",  # torch cannot be imported without one
            "PYTHONPATH": os.pathsep.join([str(self.base), *filter(None, sys.path)]),
        }
        environment = {k: v for k, v in os.environ.items() if k != "QLIBERO_CACHE"} | {
            k: str(v) for k, v in mine.items()
        }
        with open(place / "log", "a") as log:
            return subprocess.Popen(
                [*command(row), sys.executable, "-c", PROCESS, place, json.dumps(how)],
                env=environment, cwd=place, start_new_session=True, stdout=log, stderr=log,
            )  # fmt: skip

    def kill_half_way(self, row: Row) -> None:
        """Once something was compiled, and the policy is not yet through."""
        process, deadline = self.start(row, row.how), time.monotonic() + 300
        while not any(path.suffix in (".cubin", ".nbc") for path in self.place(row).rglob("*")):
            assert process.poll() is None and time.monotonic() < deadline, self.log(row)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (self.place(row) / "found.json").exists()

    def log(self, row: Row) -> str:
        return f"{row.name}: {(self.place(row) / 'log').read_text()[-3000:]}"

    def finish(self, row: Row, process: subprocess.Popen) -> dict[str, Any]:
        assert process.wait(timeout=400) == 0, self.log(row)
        print(f"{row.name}: {time.monotonic() - self.began:.0f} s after the first began")
        return json.loads((self.place(row) / "found.json").read_text())

    def all(self) -> dict[str, dict[str, Any] | str]:
        """By row: what its process found, or what became of it. As many at a time as there are cores to spare."""
        found: dict[str, dict[str, Any] | str] = {}
        cold = (FIRST, *(row for row in BESIDE_IT if not row.killed))
        together = [(row, self.start(row, row.how)) for row in cold]
        for row in (row for row in BESIDE_IT if row.killed):
            self.kill_half_way(row)
            together.append((row, self.start(row, row.how)))
        first = self.finish(*together.pop(0))
        found[FIRST.name] = first
        ran = {name: arms["auto"]["kernels"] for name, arms in first.items()}
        slower = {name: self.other_kernel(kernels) for name, kernels in ran.items()}["like_the_published"]
        before = {name: {"auto": {"kernels": kernels}} for name, kernels in ran.items()}
        for row in AFTER_IT:
            how = dict(row.how)
            if "another" in row.name:
                how["fastest"] = slower
            if "resumed" in row.name:
                how["resumed"] = before
            together.append((row, self.start(row, how)))
        for row, process in together:
            try:
                found[row.name] = self.finish(row, process)
            except (AssertionError, subprocess.TimeoutExpired) as problem:
                process.kill()
                found[row.name] = str(problem)
        return found

    def other_kernel(self, kernels: dict[str, Any]) -> str:
        """A kernel that `auto` did not choose."""
        ran = {said["kernel"] for said in kernels.values()}
        return next((name for name in ("triton_w4a8", "cuda_w4a8", "cpu_int4") if name not in ran), "")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any] | str]:
    return Rows(tmp_path_factory.mktemp("rows"), "cuda").all()


def differences(first: dict[str, Any], other: dict[str, Any], keys: tuple[str, ...] = DECIDED) -> list[str]:
    return [
        f"{policy}/{arm}: {key} {first[policy][arm][key]}, here {other[policy][arm][key]}"
        for policy, arms in first.items()
        for arm in arms
        for key in keys
        if first[policy][arm][key] != other[policy][arm][key]
    ]


@pytest.mark.parametrize("row", (*BESIDE_IT, *AFTER_IT), ids=lambda row: row.name)
def test_actions_probes_and_identities_are_equal(found, row):
    assert isinstance(found[row.name], dict), found[row.name]
    assert differences(found[FIRST.name], found[row.name]) == []


def test_what_another_timing_changes_is_the_kernel_and_a_run_that_goes_on_keeps_its_own(found):
    first, other, resumed = (
        found[name]["like_the_published"]["auto"]["kernels_hash"]
        for name in (FIRST.name, "another kernel fastest", "resumed where another is fastest")
    )
    assert resumed == first
    assert other != first or cuda_w4a8.missing()  # then there is one real kernel


def test_kernels_agree_with_fake_and_quantization_and_fused_kernels_took_part(found):
    for arms in found[FIRST.name].values():
        assert {arm["glue"] for arm in arms.values()} == {"triton"}
        real = {name: arm["actions"] for name, arm in arms.items() if name != "baseline"}
        assert len(real) >= 3 and len(set(real.values())) == 1
        assert arms["baseline"]["actions"] not in real.values()
