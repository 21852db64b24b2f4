"""Risk: a thing that somebody adds from outside is not found, is found and not run, or breaks without saying where.

One file, `toys.py`, installed like a package but outside this one, declares one of each kind; each is really run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from qlibero import registry
from qlibero.cli import catalogue
from qlibero.errors import UserError
from qlibero.plugin_source import BrokenPlugin
from qlibero.registry import MethodPlugin, UnknownPlugin

TOYS = '''
import json
import sys
from typing import Literal

import numpy as np
import torch

from qlibero.config.policies import PolicySettings
from qlibero.kernels.contract import Kernel, PackedWeight, Support
from qlibero.launch import cells
from qlibero.launch.engine import Engine, Submitted
from qlibero.policies.base import Chunk, blank_observation
from qlibero.quant.transform import Transform
from qlibero.registry import (
    CorrectionPlugin, EnginePlugin, KernelPlugin, MethodPlugin, PolicyPlugin, SectionPlugin, SuitePlugin, TrackerPlugin
)
from qlibero.reporting.html.markup import el
from qlibero.reporting.html.sections.parts import section
from qlibero.sim.libero import GOAL
from qlibero.tracking import replay

PLUGINS = (
    KernelPlugin("loops", "one output channel after the other", provides="Loops"),
    MethodPlugin("shuffle", "a random order of the channels", data_free=True, factors=("order",), provides="Shuffle"),
    CorrectionPlugin("louder", "outputs by a half larger", scales="output", provides="Louder"),
    PolicyPlugin("still", "a policy that never moves", provides="Still"),
    EnginePlugin("inline", "shards in this very process", provides="INLINE"),
    TrackerPlugin("lines", "a JSON line for each row"),
    SectionPlugin("motto", "what the author has to say", provides="motto"),
    SuitePlugin("one_goal", "the stove of LIBERO-Goal, again", provides="STOVE", tasks=1, max_steps=40),
)


class Loops(Kernel):
    name, real = "loops", False

    def supports(self, shape):
        return Support(shape.device == "cpu", "on a CPU")

    def pack(self, codes, weight_bits=4, group_size=None):
        return PackedWeight(*codes.shape, weight_bits, group_size, codes=codes.to(torch.int32))

    def accumulate(self, codes_x, packed):
        x, w, group = codes_x.to(torch.int32), packed.codes, packed.group_size
        if group is None:
            return torch.stack([x @ row for row in w], 1)
        return torch.stack([x[:, k : k + group] @ w[:, k : k + group].T for k in range(0, packed.k, group)])


class Shuffle:
    @staticmethod
    def fit(data, spec):
        order = torch.randperm(data.weights[0].shape[1], generator=torch.Generator().manual_seed(data.seed))
        return Transform(order=order.int())


class Louder:
    @staticmethod
    def factors(teacher, student):
        assert teacher.calls == student.calls > 0 and teacher.output_rms > 0 and min(teacher.logit_std) > 0
        return [1.5]


class StillPolicy:
    name, noise_shape, batch_size = "still", (5, 7), 2

    def infer(self, observations, noise):
        return Chunk(np.zeros((len(observations), *self.noise_shape), np.float32))

    def warmup_observations(self, prompts):
        return [blank_observation(prompts[0])]

    def provenance(self):
        return {"type": "still", "name": self.name, "action_horizon": 5}


class StillSettings(PolicySettings):
    """Nothing to say."""

    type: Literal["still"]


class Still:
    Settings = StillSettings

    @staticmethod
    def load(settings, skip=frozenset()):
        return StillPolicy()


class Inline(Engine):
    here = True

    def describe(self, submission):
        return f"{len(submission.indices)} shards here"

    def submit(self, submission):
        manifest = cells.read_manifest(submission.manifest)
        for index in submission.indices:
            cells.run_shard(manifest, index)
        cells.merge(manifest)
        return Submitted(finished=True)


INLINE = Inline()


class Lines:
    have = 0

    def __init__(self, run_dir, arm, ledger):
        self.file = open(run_dir / f"{arm}-lines.jsonl", "w")

    def log(self, row, step):
        print(json.dumps(row), file=self.file)

    def log_video(self, key, path, row, step):
        self.log(row, step)

    def summarize(self, summary):
        self.log({"summary": summary}, -1)

    def finish(self, rows):
        self.file.close()


def motto(m):
    return section("motto", "Motto", el("p", f"{len(m.arms)} arms, and none moved"))


class Stove:
    def language(self, task):
        return GOAL.language(7)

    def task_files(self, task):
        return GOAL.task_files(7)


STOVE = Stove()

if __name__ == "__main__":
    sys.exit(replay.program("lines", Lines))
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Iterator[Path]:
    """The folder with toys.py and what pip writes beside it."""
    site = tmp_path_factory.mktemp("site")
    (site / "toys.py").write_text(TOYS)
    about = site / "toys-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("".join(f"[qlibero.{kinds}]\nt = toys\n" for kinds in registry.KINDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path[1:2], os.environ.get("PYTHONPATH", "")]))
        registry.forget()
        yield site
    sys.modules.pop("toys", None)
    registry.forget()


def test_all_are_listed_with_where_they_come_from_and_none_is_imported(installed):
    ours = {(row["kind"], row["name"]) for row in catalogue.plugins() if row["from"] == "toys 1.0"}
    names = "loops shuffle louder still inline lines motto one_goal".split()
    assert ours == {(kind.kind, name) for kind, name in zip(registry.KINDS.values(), names, strict=True)}
    code = "import sys; from qlibero.cli import catalogue; catalogue.plugins(); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "qlibero.registry" in loaded and not {"toys", "torch", "numpy", "scipy"} & set(loaded)


def test_the_method_goes_through_calibration_and_comes_back_from_disk(installed, tmp_path):
    from test_fake_equals_kernel import asked, made, small_policy

    from qlibero.quant.apply import quantize_policy
    from qlibero.quant.artifact import load, save

    policy = small_policy()
    artifact = load(save(made(policy, method="shuffle", layout="llm+expert"), tmp_path / "artifact.safetensors"))
    group = artifact.layers[0].group
    order = artifact.transform(group).order
    assert sorted(order.tolist()) == list(range(len(order))) != order.tolist()
    with pytest.raises(BaseException, match="tensors? missing that shuffle makes"):
        from qlibero.quant.artifact import build

        lost = {name: artifact.tensor(name) for name in map(str, _names(tmp_path)) if not name.endswith(".order")}
        load(save(build(artifact.spec, "1" * 64, artifact.calibration, artifact.layers, {}, lost), tmp_path / "lost"))
    exact, rounded = asked(policy), asked(quantize_policy(policy, artifact, "fake"))
    assert 0 < np.abs(rounded - exact).max() < 0.5


def test_the_correction_is_fitted_and_stays_in_what_it_declared(installed, tmp_path):
    from test_fake_equals_kernel import made, small_policy

    from qlibero.quant.artifact import build, load, save

    artifact = made(small_policy(), method="rtn", layout="llm+expert", corrections=["louder"])
    linears = {layer.name: layer for layer in artifact.layers if layer.executed and layer.name.endswith("o_proj")}
    assert linears and all(artifact.corrections[name] == [1.5] for name in linears)
    assert load(save(artifact, tmp_path / "artifact.safetensors")).spec.corrections == ("louder",)
    beyond = {name: [2.5] for name in artifact.corrections}
    wrong = build(artifact.spec, "1" * 64, artifact.calibration, artifact.layers, beyond, artifact.tensors)
    with pytest.raises(Exception, match="are none that its settings can make"):
        load(save(wrong, tmp_path / "wrong.safetensors"))


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "artifact.safetensors", "pt") as file:
        return list(file.keys())


def test_the_kernel_is_checked_and_gives_what_fake_gives(installed, tiny_experiment, tmp_path, monkeypatch, capfd):
    from test_fake_equals_kernel import asked, made, small_policy

    from qlibero import cli
    from qlibero.quant import prepare
    from qlibero.quant.apply import quantize_policy

    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path)
    assert cli.main(["kernels", "check", str(tiny_experiment), "--backend", "loops"]) == 0
    found = json.loads(capfd.readouterr().out)["verdicts"]
    assert found and {v["verdict"] for v in found} == {"pass"} and {v["executed"] for v in found} == {"loops"}
    policy = small_policy()
    artifact = made(policy, method="rtn", group_size=16)
    on_loops, on_fake = (asked(quantize_policy(policy, artifact, name)) for name in ("loops", "fake"))
    assert (on_loops == on_fake).all()


@pytest.mark.libero
def test_policy_suite_engine_tracker_and_section_share_one_sweep(installed, tmp_path, monkeypatch, said):
    """A real episode in LIBERO's simulator."""
    from qlibero.config.sweep import load_sweep
    from qlibero.launch.sweep import run_sweep
    from qlibero.reporting.html.document import write_report
    from qlibero.results.ledger import read_ledger

    config = {
        "suite": "one_goal",
        "tasks": [0],
        "episodes_per_task": 1,
        "max_steps": 8,
        "policy": {"type": "still"},
        "backends": ["baseline"],
        "videos": 0,
        "workers": 1,
        "tracking": ["lines"],
        "launch": {"engine": "inline"},
    }
    (tmp_path / "still.yaml").write_text(yaml.safe_dump(config))
    planned = run_sweep(load_sweep(tmp_path / "still.yaml"), None, tmp_path / "out", True)
    assert planned.engine == "inline" and said[-1] == "1 shards here"
    done = run_sweep(load_sweep(tmp_path / "still.yaml"), None, tmp_path / "out", False)
    assert done.state.complete and done.finished, said
    (record,) = read_ledger(tmp_path / "out", "baseline")
    assert (record.suite, record.outcome, record.steps) == ("one_goal", "failure", 8)
    lines = [json.loads(line) for line in (tmp_path / "out" / "baseline-lines.jsonl").read_text().splitlines()]
    assert lines[0]["key"] == str(record.key) and lines[-1]["summary"]["episodes"] == 1
    page = Path(write_report([tmp_path / "out"])["report"]).read_text()
    assert "1 arms, and none moved" in page and 'href="#motto"' in page and "turn on the stove" in page


def test_a_module_is_known_by_its_own_name_where_it_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text("raise RuntimeError('packages around a declaration are not run')")
    declared = 'PLUGINS = (\n    MethodPlugin("one", "1"),\n    MethodPlugin("two", "2"),\n)\n'
    (tmp_path / "house" / "methods.py").write_text(BEGIN + declared)
    monkeypatch.syspath_prepend(tmp_path)
    found = registry.get(MethodPlugin, "house.methods:two")
    assert (found.about, found.name, found.origin) == ("2", "house.methods:two", str(tmp_path / "house" / "methods.py"))
    with pytest.raises(BrokenPlugin, match="write one of house.methods:one, house.methods:two"):
        registry.get(MethodPlugin, "house.methods")


def test_the_method_that_the_page_shows_is_one(tmp_path, monkeypatch):
    """As a reader does it: the page's code into a file, its module's name into a configuration."""
    import torch

    from qlibero.config.quantization import Quant
    from qlibero.quant.methods import GroupData, fit

    page = (Path(__file__).parents[1] / "docs" / "plug_ins.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "from_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    x, w, nothing = torch.randn(5, 32), torch.randn(4, 32), torch.zeros(32)
    made = fit(GroupData((w,), *(nothing,) * 3, x, 3), Quant(layout="llm", method="from_the_page"))
    assert list(made.tensors()) == ["order"] and not torch.equal(made.forward(x), x)
    assert torch.allclose(made.forward(x).double() @ made.weights(w).T, x.double() @ w.double().T)


BEGIN = "from qlibero.registry import MethodPlugin\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BEGIN + "import not_there\nPLUGIN = MethodPlugin('x', 'y')\n", r"line 2: it needs the package not_there"),
        (BEGIN + "PLUGIN = MethodPlugin('x', 'y')\n1 / 0\n", r"line 3: ZeroDivisionError: division by zero"),
        (BEGIN + "PLUGIN = MethodPlugin('x', 'y')\ndef fit(:\n", r"line 3: invalid syntax"),
        (BEGIN + "NAME = 'x'\nPLUGIN = MethodPlugin(NAME, 'y')\n", r"line 3: a declaration is read without being run"),
        (BEGIN + "PLUGIN = MethodPlugin('x')\n", r"line 2: .*about.*; a MethodPlugin says name, about, needs"),
        (BEGIN + "PLUGIN = MethodPlugin('x', 'y', datafree=True)\n", r"line 2: .*datafree.*; a MethodPlugin says"),
        (BEGIN + "PLUGIN = MethodPlugin('x', 'y', data_free='no')\n", r"line 2: data_free is 'no'; it should be"),
        (BEGIN + "PLUGIN = {'name': 'x'}\n", r"line 2: PLUGIN is one of KernelPlugin, MethodPlugin"),
        (BEGIN + "PLUGIN = MethodPlugin('x', 'y')\n", r"lacks fit: a method has fit"),
        (
            BEGIN + "PLUGIN = MethodPlugin('x', 'y', rotates_outputs=True)\n\n\ndef fit(data, spec):\n    pass\n",
            r"lacks output_rotation: a method has fit, output_rotation",
        ),
        (BEGIN + "PLUGIN = MethodPlugin('x', 'y', provides='Best')\n", r"provides Best, which is not in the file"),
        ("", r"declares no method"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plug_in_is_said_with_its_file_and_line(tmp_path, monkeypatch, text, says):
    (tmp_path / "broken_house").mkdir()
    (tmp_path / "broken_house" / "__init__.py").touch()
    file = tmp_path / "broken_house" / "part.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_house", "broken_house.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BrokenPlugin, match=says) as caught:
        registry.get(MethodPlugin, "broken_house.part").load()
    assert str(file) in str(caught.value) and caught.value.exit_status == 2


def test_a_name_that_is_not_there_gets_the_nearest_and_where_it_was_looked_for(installed):
    with pytest.raises(
        UnknownPlugin, match=r"no method 'shufle'; did you mean shuffle\?.*entry points qlibero.methods"
    ):
        registry.get(MethodPlugin, "shufle")


def test_an_installed_plug_in_that_is_broken_is_listed_as_that_and_breaks_nothing(installed, monkeypatch):
    toys = (installed / "toys.py").read_text()
    try:
        (installed / "toys.py").write_text(toys.replace('"shuffle"', '"duquant"').replace('"lines"', "0", 1))
        registry.forget()
        rows = {row["about"] for row in catalogue.plugins() if not row["name"]}
        assert "toys 1.0: a method duquant is there already (built in)" in rows
        assert any("name is 0; it should be a str" in about for about in rows)
        assert registry.get(MethodPlugin, "duquant").origin == "built in"
        with pytest.raises(UserError, match="name is 0"):
            registry.get(registry.TrackerPlugin, "lines")
    finally:
        (installed / "toys.py").write_text(toys)
        registry.forget()
