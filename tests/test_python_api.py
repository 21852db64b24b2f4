"""Risk: an evaluation inside a training loop changes the training, mixes two sets of weights, or runs things twice."""

from __future__ import annotations

import io
import random
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

import qlibero
import qlibero.run.evaluate
from qlibero.console import log_to
from qlibero.errors import GuardRefusal, UserError
from qlibero.results.comparison import ArmComparison
from qlibero.results.paired_outcomes import Word
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import read_run

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def surroundings(policy: torch.nn.Module) -> list[object]:
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        [module.training for module in policy.modules()],
    ]


class Loop:
    """The documentation's examples, run once with shorter episodes; what each evaluation found and left around it."""

    def __init__(self) -> None:
        self.before, self.after, self.conditions = [], [], set()
        self.printed, self.logged = io.StringIO(), []
        self.names: dict[str, object] = {}

    def run(self) -> None:
        code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S))
        for shown, run in (("episodes=5", "episodes=1, tasks=[0], max_steps=6"), ("% 500", "% 1000")):
            assert shown in code
            code = code.replace(shown, run)
        exec(compile(code, str(PAGE), "exec"), self.names)

    def evaluate(self, policy, **arguments):
        """`qlibero.evaluate` of a policy that draws from every generator and notes under which conditions."""
        real = type(policy).infer

        def infer(observations, noise):
            modes = any(module.training for module in policy.modules())
            self.conditions.add((torch.is_grad_enabled(), modes, torch.get_num_threads()))
            random.random(), np.random.rand(), torch.rand(1)
            return real(policy, observations, noise)

        policy.infer = infer
        policy.train()
        policy.head.eval()  # frozen, as in fine-tuning
        self.before.append(surroundings(policy))
        with redirect_stdout(self.printed), redirect_stderr(self.printed), log_to(self.logged.append):
            found = qlibero.run.evaluate.evaluate(policy, **arguments)
        self.after.append(surroundings(policy))
        return found


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    found, threads = Loop(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("loop"))
        patch.setattr(qlibero, "evaluate", found.evaluate, raising=False)
        torch.set_num_threads(2)
        try:
            found.run()
            yield found
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def evaluated(loop):
    """(policy, directory, its one episode, the same and one more)."""
    policy, now = loop.names["policy"], loop.names["now"]
    return policy, now.out, now, again(policy, now.out)


def again(policy, out, **changes):
    return qlibero.run.evaluate.evaluate(
        policy, **{"suite": "libero_object", "tasks": [0], "episodes": 2, "max_steps": 6, "out": out} | changes
    )


@pytest.mark.libero
def test_the_examples_run_and_leave_a_training_loop_as_it_was(loop, capsys):
    assert sorted(path.name for path in Path("logs/mine").iterdir()) == ["0", "1000"]
    assert "fewer than 20 pairs carry no verdict" in qlibero.compare(loop.names["before"], loop.names["now"]).sentence
    assert loop.after == loop.before and len(loop.before) == 2
    assert loop.conditions == {(False, False, 1)}, "gradients, training mode, threads while it acts"


@pytest.mark.libero
def test_a_notebook_sees_nothing_that_it_did_not_ask_for(loop):
    assert loop.printed.getvalue() == ""
    assert sum("physics check: " in line for line in loop.logged) == 2
    assert "libero_object/0/0/7: failure after 6 steps" in loop.logged


@pytest.mark.libero
def test_records_are_typed_and_none_is_run_twice(evaluated):
    _, out, first, second = evaluated
    assert all(type(record) is EpisodeRecord for record in second.records)
    assert [str(record.key) for record in second.records] == ["libero_object/0/0/7", "libero_object/0/1/7"]
    assert second.records[0] == first.records[0], "the first was run once"
    assert (second.successes, second.episodes, second.errors, second.success_rate) == (0, 2, 0, 0.0)
    assert second.records[0].steps == 6 and second.records[0].replan_steps == 5
    assert second.interval == pytest.approx((0.0, 0.657620), abs=1e-6)  # Wilson, 0 of 2
    assert read_run(out).planned == {record.key for record in second.records}


@pytest.mark.libero
def test_the_same_call_again_starts_nothing(evaluated):
    policy, out, _, second = evaluated
    files = sorted(path.name for path in (out / "policy").iterdir())
    assert again(policy, out) == second
    assert again(policy, out, episodes=1).records == second.records[:1]
    assert read_run(out).planned == {record.key for record in second.records}, "the second call asked for both"
    assert sorted(path.name for path in (out / "policy").iterdir()) == files


def test_the_directory_is_described_as_all_calls_together_asked_for_it(tmp_path):
    said = {"suite": "libero_object", "seed": 7, "policy": {"type": "python", "name": "mine"}}
    for tasks, episodes in (([3], 2), ([0, 1], 1), ([1], 1), ([3], 1)):
        qlibero.run.evaluate._describe(tmp_path, said | {"tasks": tasks, "episodes_per_task": episodes})
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "episodes-000of001-1.jsonl").write_text("")
    wanted = [(key.task, key.init) for key in sorted(read_run(tmp_path).planned)]
    assert wanted == [(0, 0), (1, 0), (3, 0), (3, 1)]
    qlibero.run.evaluate._describe(tmp_path, said | {"tasks": [0, 1], "episodes_per_task": 2})
    assert "tasks:\n- 0\n- 1\n- 3\nepisodes_per_task: 2\n" in (tmp_path / "experiment.yaml").read_text()


@pytest.mark.libero
def test_other_weights_or_settings_are_refused_and_the_directory_keeps_its_own(evaluated):
    policy, out, _, second = evaluated
    for change in (
        lambda other: other.head.bias.data.add_(0.1),
        lambda other: other.register_buffer("more", torch.ones(1)),
    ):
        other = type(policy)()
        other.load_state_dict(policy.state_dict())
        change(other)
        with pytest.raises(GuardRefusal, match="(?s)weights.*choose another"):
            again(other, out)
    with pytest.raises(GuardRefusal, match="another configuration"):
        again(policy, out, seed=8)
    with pytest.raises(GuardRefusal, match="another configuration"):
        again(policy, out, replan_steps=4)
    assert again(policy, out) == second


@pytest.mark.libero
def test_two_evaluations_have_a_verdict(evaluated, tmp_path):
    _, out, first, second = evaluated
    shutil.copytree(out, tmp_path / "same")
    compared = qlibero.compare(second, tmp_path / "same", margin=0.1)
    assert type(compared) is ArmComparison
    assert (compared.delta, compared.table.pairs, compared.verdict.word) == (0.0, 2, Word.FEW)
    assert "fewer than 20 pairs carry no verdict" in compared.sentence
    with pytest.raises(UserError, match="no such run directory"):
        qlibero.compare(first, tmp_path / "none")


class Still:
    name, noise_shape, batch_size = "still", (10, 7), 4

    def infer(self, observations, noise):
        return qlibero.Chunk(np.zeros((len(observations), 10, 7), np.float32))

    def provenance(self):
        return {"type": "test"}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"suite": "libero_objects"}, "did you mean libero_object"),
        ({"tasks": [10]}, "tasks 0 to 9, not 10"),
        ({"episodes": 51}, "episodes is 51: write an integer from 1 to 50"),
        ({"episodes": 2.0}, "episodes is 2.0"),
        ({"replan_steps": 11}, "replan_steps is 11: write an integer from 1 to 10"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"tasks": []}, "tasks"),
    ],
)
def test_a_wrong_argument_is_named(wrong, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        again(Still(), tmp_path / "out", **wrong)


def test_what_is_no_policy_is_told_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match="a Linear is no policy: it has no name, noise_shape, batch_size, infer, prov"):
        again(torch.nn.Linear(1, 1), tmp_path / "out")


def test_importing_qlibero_imports_nothing_heavy():
    seen = "import sys, qlibero; print([m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("command", [["status"], ["videos"], ["run"]])
def test_commands_that_would_have_to_load_the_policy_say_that_only_evaluate_can(command, tmp_path, capsys):
    (tmp_path / "experiment.yaml").write_text("suite: libero_object\npolicy: {type: python, name: mine}\n")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "episodes-000of001-1.jsonl").write_text("")
    place = tmp_path / "experiment.yaml" if command == ["run"] else tmp_path
    from qlibero.cli import main

    assert main([*command, str(place)]) == 2
    assert "was run by qlibero.evaluate" in capsys.readouterr().err
