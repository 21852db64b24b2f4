"""Risk: a kernel is right when it is tried, and wrong while the episodes run that the success rate is made of."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from pi05_small import noises, observations
from test_fake_equals_kernel import made, small_policy

from qlibero import registry
from qlibero.errors import UserError
from qlibero.kernels.cpu_int4 import CpuInt4
from qlibero.quant.apply import quantize_policy
from qlibero.quant.recheck import EVERY, PRODUCTS, Recheck
from qlibero.registry import KernelPlugin

pytestmark = pytest.mark.slow


class Lying(CpuInt4):
    """An int4 kernel that is right, but for the products that a subclass says. Counts all its products."""

    name = "lying"
    products = 0

    def lies(self, packed, m: int) -> bool:
        return False

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        y = super().matmul(codes_x, s_x, packed, s_w, bias, out_dtype)
        type(self).products += 1
        if self.lies(packed, codes_x.shape[0]):
            y[0, 0] += 1.0
        return y


class OnceInTwoThousand(Lying):
    def lies(self, packed, m):
        return type(self).products % 2000 == 0


class OnceInTwoThousandAtRandom(Lying):
    chance = np.random.default_rng(5)

    def lies(self, packed, m):
        return self.chance.random() < 1 / 2000


class RightForItsFirstCalls(Lying):
    """Per weight, as a cache that overflows or a counter that wraps would have it."""

    first = 20

    def lies(self, packed, m):
        packed.calls = getattr(packed, "calls", 0) + 1
        return packed.calls > self.first


class RightForItsFirstHundred(RightForItsFirstCalls):
    first = 100


class OneLayerDrifts(Lying):
    """Only one weight, only for many tokens, only after a while."""

    def lies(self, packed, m):
        packed.calls = getattr(packed, "calls", 0) + 1
        return packed.k == 96 and m > 16 and packed.calls > 60


LIES = [OnceInTwoThousand, OnceInTwoThousandAtRandom, RightForItsFirstCalls, RightForItsFirstHundred, OneLayerDrifts]


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(scope="module")
def artifact(policy):
    return made(policy, layout="llm+expert")


@pytest.fixture
def registered(monkeypatch):
    def register(kind: type[Lying]) -> str:
        kind.products = 0
        plugin = KernelPlugin("lying", "what a buggy kernel does", provides=kind.__name__, module=kind.__module__)
        monkeypatch.setitem(registry._installed(KernelPlugin)[0], "lying", plugin)
        monkeypatch.setitem(sys.modules, kind.__module__, sys.modules[__name__])
        return "lying"

    return register


def ran(policy, artifact, backend: str, calls: int) -> Recheck:
    quantized = quantize_policy(policy, artifact, backend)
    watch = Recheck(quantized, artifact, quantize_policy(policy, artifact, "fake"))
    z = noises(1, policy.noise_shape)
    for i in range(calls):
        seen = observations(1, seed=i % 7)
        watch.call(seen, z, quantized.infer(seen, z).actions, 0.01)
    return watch


@pytest.mark.parametrize("kind", LIES, ids=lambda kind: kind.__name__)
def test_the_end_of_a_short_run_finds_it(policy, artifact, registered, kind):
    watch = ran(policy, artifact, registered(kind), calls=3)
    found = watch.finish()
    assert found.wrong and found.products >= PRODUCTS and found.layers == sum(x.executed for x in artifact.layers)
    assert "products of paligemma_with_expert." in found.wrong[-1]


def test_a_call_is_put_to_the_twin_and_what_was_executed_counts(policy, artifact):
    """Not the kernel asked again, which may be right by then: the actions that the robot was given."""
    quantized = quantize_policy(policy, artifact, "cpu_int4")
    watch = Recheck(quantized, artifact, quantize_policy(policy, artifact, "fake"))
    z = noises(1, policy.noise_shape)
    for i in range(1, 2 * EVERY + 1):
        seen = observations(1)
        actions = quantized.infer(seen, z).actions if i == 1 or i % EVERY == EVERY // 2 else np.zeros((1, 10, 7))
        watch.call(seen, z, actions + np.float32(1e-6) * (i == EVERY + EVERY // 2), 0.01)
    assert watch.repeated == 2 and watch.calls == 200
    assert len(watch.wrong) == 1 and watch.wrong[0].startswith("policy call 150: actions differ from `fake`")


@pytest.mark.parametrize(
    "changes",
    [{}, {"layout": "llm+expert", "group_size": 16}, {"method": "weight_pca", "row_rotation": True}],
    ids=str,
)
def test_an_honest_kernel_is_left_alone(policy, changes):
    watch = ran(policy, made(policy, **changes), "cpu_int4", calls=EVERY // 2)
    found = watch.finish()
    assert not found.wrong and (found.calls, found.repeated) == (EVERY // 2, 1)
    assert found.products > PRODUCTS // 5  # a loaded machine may end it by its time


def test_an_arm_that_was_not_asked_has_nothing_to_say(policy, artifact):
    assert Recheck(quantize_policy(policy, artifact, "cpu_int4"), artifact, None).finish() is None


@pytest.mark.parametrize("kind", [OnceInTwoThousand, RightForItsFirstHundred], ids=lambda kind: kind.__name__)
def test_a_run_without_fake_ends_with_status_3_and_every_view_says_so(
    tiny_experiment, tmp_path, registered, capsys, kind
):
    """Real LIBERO, one episode: refused, kept, marked, and refused again by the same command."""
    from qlibero import cli
    from qlibero.reporting.html.document import write_report
    from qlibero.tracking.rows import arithmetic_summary

    out = tmp_path / "run"
    sets = ["backends=[baseline,lying]", "tasks=[0]", "episodes_per_task=1", "quant.layout=llm+expert"]
    command = ["run", str(tiny_experiment), "--out", str(out), *(f"--set={one}" for one in sets)]
    registered(kind)
    for again in (False, True):
        assert cli.main(command) == 3, again
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["arms"]["lying"]["episodes"] == 1 and document["complete"]
        assert document["error"]["kind"] == "GuardRefusal" and "lying" in document["error"]["message"]
        assert not document["arithmetic"]["ok"] and document["arithmetic"]["rechecks"]["lying"]["wrong"]
    assert cli.main(["compare", str(out)]) == 0
    shown = capsys.readouterr()
    assert not json.loads(shown.out.splitlines()[-1])["arithmetic"]["ok"]
    assert "NOT THE SAME ARITHMETIC" in " ".join(shown.err.split())
    page = open(write_report([out])["report"]).read()
    assert "not one arithmetic" in page
    summary = arithmetic_summary(out, "lying")
    assert summary["arithmetic/ok"] is False and arithmetic_summary(out, "baseline")["arithmetic/ok"] is True


def test_arms_that_differ_end_with_status_3(tiny_experiment, tmp_path, registered, capsys):
    """As in the audit: `fake` beside a kernel that lies; found by the ledger alone, with the rechecks taken away."""
    from qlibero import cli

    out = tmp_path / "run"
    sets = ["backends=[baseline,fake,lying]", "tasks=[0]", "episodes_per_task=1", "quant.layout=llm+expert"]
    command = ["run", str(tiny_experiment), "--out", str(out), *(f"--set={one}" for one in sets)]
    registered(RightForItsFirstHundred)
    assert cli.main(command) == 3
    capsys.readouterr()
    for path in (out / "lying").glob("recheck-*.json"):
        path.unlink()
    lines = (out / "lying").glob("episodes-*.jsonl")
    differ = json.loads(next(lines).read_text())["action_digest"]
    same = json.loads(next((out / "fake").glob("episodes-*.jsonl")).read_text())["action_digest"]
    assert cli.main(command) == (3 if differ != same else 0)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (pair,) = document["arithmetic"]["same"]
    assert (pair["arm"], pair["other"], pair["episodes"]) == ("fake", "lying", 1)
    assert pair["equal"] == (differ == same) and document["arithmetic"]["ok"] == (differ == same)


def test_a_recheck_file_that_is_none_is_named(tmp_path):
    from qlibero.results.arm_equality import Rechecks, rechecks

    (tmp_path / "arm").mkdir()
    assert rechecks(tmp_path, "arm") is None
    path = tmp_path / "arm" / "recheck-000of001-1.json"
    good = {"calls": 1, "repeated": 0, "not_repeated": "", "layers": 2, "products": 3, "wrong": []}
    for key, value in (("calls", "x"), ("calls", -1), ("layers", 2.5), ("products", 10**30), ("wrong", None)):
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(UserError, match=f"recheck-000of001-1.json: {key}: "):
            rechecks(tmp_path, "arm")
    for text in ("", "[" * 10**5, '{"calls": 1e999}', "null"):
        path.write_text(text)
        with pytest.raises(UserError, match="recheck-000of001-1.json: "):
            rechecks(tmp_path, "arm")
    path.write_text(json.dumps(good))
    assert rechecks(tmp_path, "arm") == Rechecks(processes=1, calls=1, repeated=0, layers=2, products=3, wrong=())


@pytest.mark.parametrize("found", [{}, {"layers_consuming_int8": -1, "action_difference": 0.0}, [], "fine"], ids=str)
def test_a_record_of_the_policy_check_that_is_none_is_named(tmp_path, found):
    from qlibero.results.meta import read_meta, write_meta

    write_meta(tmp_path, "arm", {"witness": {"layers_consuming_int8": 37, "action_difference": None}})
    said = read_meta(tmp_path, "arm").witness
    assert said is not None and said.layers_consuming_int8 == 37
    (tmp_path / "arm" / "meta.json").write_text(json.dumps({"schema": 1, "witness": found}))
    with pytest.raises(UserError, match="meta.json: witness"):
        read_meta(tmp_path, "arm")


def test_a_served_kernel_that_changes_ends_the_server(policy, artifact, registered, monkeypatch):
    """The client whose actions were wrong never gets them, nor does the next one, and `serve` ends with status 3."""
    import threading

    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    from qlibero.errors import GuardRefusal
    from qlibero.policies.listening import ServerSettings
    from qlibero.policies.server import serve
    from qlibero.policies.wire import pack

    monkeypatch.setattr("qlibero.quant.recheck.EVERY", 2)
    quantized = quantize_policy(policy, artifact, registered(RightForItsFirstCalls))
    watch = Recheck(quantized, artifact, quantize_policy(policy, artifact, "fake"))
    ready, port, ended = threading.Event(), [], []

    def serving():
        try:
            serve(quantized, ServerSettings(port=0), lambda found: (port.append(found), ready.set()), watch.guard)
        except GuardRefusal as refusal:
            ended.append(refusal)

    server = threading.Thread(target=serving, daemon=True)
    server.start()
    assert ready.wait(20)
    seen = observations(1)[0]
    request = {"observation/image": seen.image, "observation/wrist_image": seen.wrist_image}
    request |= {"observation/state": seen.state, "prompt": seen.prompt}
    answers = []
    with connect(f"ws://127.0.0.1:{port[0]}", max_size=None) as wire:
        wire.recv()
        try:
            for _ in range(8):
                wire.send(pack(request))
                answers.append(wire.recv(timeout=30))
        except ConnectionClosed:
            pass
    server.join(20)
    assert not server.is_alive() and ended[0].exit_status == 3 and "actions differ from `fake`" in str(ended[0])
    assert "actions differ from `fake`" in answers[-1] and all(isinstance(one, bytes) for one in answers[:-1])
