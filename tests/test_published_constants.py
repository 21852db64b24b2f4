"""Risk: what a paper would quote (step caps, settle steps, actions a plan, the noise, the arithmetic) changes and every
test still agrees, because ours is compared with ours.

All expected values here are literals, or computed by NumPy without a line of qlibero.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from qlibero.episode_key import EpisodeKey
from qlibero.kernels import load
from qlibero.policies.base import Chunk, Observation, blank_observation
from qlibero.policies.pi05 import Pi05
from qlibero.policies.remote_family import Remote
from qlibero.run.noise import call_noise
from qlibero.sim import suites


# ---------------------------------------------------------------------------------------------- openpi's protocol
def test_the_suites_are_the_published_ones():
    """openpi, examples/libero/main.py: caps from the longest demonstration; LIBERO: 10 (90) tasks × 50 states."""
    assert {s.name: (s.tasks, s.inits, s.max_steps) for s in suites.BASE_SUITES} == {
        "libero_spatial": (10, 50, 220),
        "libero_object": (10, 50, 280),
        "libero_goal": (10, 50, 300),
        "libero_10": (10, 50, 520),
        "libero_90": (90, 50, 400),
    }


def test_settle_steps_and_rates():
    assert suites.SETTLE_STEPS == 10
    assert suites.SETTLE_ACTION == (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    assert suites.CONTROL_HZ == 20


def test_defaults_of_a_policy_call():
    assert Pi05.model_fields["replan_steps"].default == 5
    assert Remote.model_fields["replan_steps"].default == 5
    assert Pi05.model_fields["flow_steps"].default == 10


@dataclass
class Resting:
    """A policy that does not move and keeps the noise it is given: what the engine really hands out."""

    name: str = "resting"
    noise_shape: tuple[int, int] = (10, 32)
    batch_size: int = 1
    model: None = None
    noise: list[str] = field(default_factory=list)

    def infer(self, observations, noise):
        self.noise += [hashlib.sha256(z.astype("<f4").tobytes()).hexdigest()[:32] for z in noise]
        actions = np.zeros((len(observations), 10, 7), np.float32)
        actions[..., 6] = -1.0
        return Chunk(actions)

    def warmup_observations(self, prompts) -> list[Observation]:
        return [blank_observation(prompt) for prompt in prompts]

    def provenance(self):
        return {"type": "resting"}


@pytest.mark.libero
def test_an_episode_of_libero_under_the_default_protocol():
    """A real episode: simulated time after settling, plans of 5 actions, and each call's own noise."""
    from qlibero.machine.environment import simulator_environment
    from qlibero.run.episode import PlannedEpisode
    from qlibero.run.rollout import RolloutSettings, run_episodes
    from qlibero.sim.pool import SimulatorPool

    policy, records = Resting(), []
    replan_steps = Pi05.model_fields["replan_steps"].default
    settings = RolloutSettings(protocol="pure", max_steps=21, replan_steps=replan_steps, retries=0)
    with SimulatorPool(1, environment=simulator_environment()) as pool:
        plan = [PlannedEpisode("resting", EpisodeKey("libero_spatial", 0, 0, 0))]
        run_episodes(plan, {"resting": policy}, pool, settings, lambda record, rows: records.append((record, rows)))
    ((record, rows),) = records
    assert (record.outcome, record.steps, record.replans) == ("failure", 21, 5)  # 5 + 5 + 5 + 5 + 1
    assert rows.shape == (21, 10)
    assert policy.noise[0] == "bd0a2aff2f456cb306042f8077d0a1a0"
    assert policy.noise[1] == "d2a32b702a9749fec54d88aeaf944f3a"
    assert len(set(policy.noise)) == 5


@pytest.mark.libero
def test_a_scene_settles_for_half_a_second():
    """Ten control steps of 1/20 s lie between the official initial state and the policy's first frame."""
    code = (
        "from qlibero.sim.scene import Scene; from qlibero.sim.suites import init_states\n"
        "scene = Scene('libero_spatial', 0); scene.reset(0, 0)\n"
        "print(float(scene.env.sim.data.time - init_states('libero_spatial', 0)[0][0]))"
    )
    from qlibero.machine.environment import simulator_environment

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **simulator_environment()}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(0.5, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- one noise
@pytest.mark.parametrize(
    ("key", "call", "shape", "first", "sha256"),
    [
        (
            ("libero_spatial", 0, 0, 0),
            0,
            (10, 32),
            (-0.2675339877605438, 1.2837072610855103, -0.49883943796157837),
            "bd0a2aff2f456cb306042f8077d0a1a0",
        ),
        (
            ("libero_spatial", 0, 0, 0),
            1,
            (10, 32),
            (0.4121769666671753, -0.380582720041275, 0.5208951234817505),
            "d2a32b702a9749fec54d88aeaf944f3a",
        ),
        (
            ("libero_10", 9, 49, 7),
            13,
            (10, 7),
            (0.36839523911476135, -1.488084077835083, -0.2014908641576767),
            "fb1843b2b29ba79a0094d88ed6cb94a4",
        ),
        (
            ("libero_object", 3, 1, 0),
            0,
            (2, 2),
            (1.1570847034454346, -0.13119801878929138, -0.2297372668981552),
            "34ce50659895c7c026f4d25a4dc1dd8e",
        ),
    ],
)
def test_noise_of_a_call(key, call, shape, first, sha256):
    z = call_noise(EpisodeKey(*key), call, shape)
    assert z.dtype == np.float32 and z.shape == shape
    assert tuple(map(float, z.ravel()[:3])) == first
    assert hashlib.sha256(z.astype("<f4").tobytes()).hexdigest()[:32] == sha256
    # the recipe, spelled out: Philox keyed by the first 16 bytes of the sha256 of its name, the key and the call
    text = f"qlibero-noise-1/{key[0]}/{key[1]}/{key[2]}/{key[3]}/{call}"
    philox = np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))
    assert np.array_equal(z, np.random.Generator(philox).standard_normal(shape, dtype=np.float32))


# -------------------------------------------------------------------------------------- the order of the epilogue
M, N, K, GROUP = 3, 16, 128, 32
S_X = np.array([0.1, 0.0037, 1 / 3], np.float32)
# bfloat16 numbers, by hand: 1.something with seven bits behind the point
S_W = np.array([(1 + (29 * i % 128) / 128) * 2.0 ** -(6 + i % 3) for i in range(N)], np.float32)
S_W_GROUPS = np.stack([S_W, S_W[::-1] / 512, np.roll(S_W, 3) * 128, np.roll(S_W, 5) / 64], 1)
BIAS = np.array([0.3 * i - 2.1 for i in range(N)], np.float32)
CODES_X = np.array([[(37 * i + 11 * j + 5 * i * j) % 255 - 127 for j in range(K)] for i in range(M)], np.int64)
CODES_W = np.array([[(7 * i + 3 * j + i * j) % 16 - 8 for j in range(K)] for i in range(N)], np.int64)


def in_order(acc: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """(acc · s_x) · s_w + bias in float32, one rounding a step."""
    y = (acc.astype(np.float32) * S_X[:, None]) * S_W
    return y if bias is None else y + bias


def grouped(accs: list[np.ndarray], bias: np.ndarray | None) -> np.ndarray:
    """s_x · (((s_w0·acc0 + s_w1·acc1) + s_w2·acc2) + s_w3·acc3) + bias, groups ascending."""
    total = accs[0].astype(np.float32) * S_W_GROUPS[:, 0]
    for g in range(1, K // GROUP):
        total = total + accs[g].astype(np.float32) * S_W_GROUPS[:, g]
    y = total * S_X[:, None]
    return y if bias is None else y + bias


def test_the_example_tells_every_order_apart():
    acc = CODES_X @ CODES_W.T
    right = in_order(acc, None)
    other_associations = (
        acc.astype(np.float32) * (S_X[:, None] * S_W),
        (acc.astype(np.float32) * S_W) * S_X[:, None],
        acc.astype(np.float32) * S_X[:, None],
        acc.astype(np.float32) * S_W,
    )
    assert all((right != other).any() for other in other_associations)
    # and in literals, for whoever doubts NumPy
    assert [int(x) for x in acc[0, :4]] == [784, -1186, 108, -294]
    assert [float(x).hex() for x in right[0, :4]] == [
        "0x1.39999a0000000p+0",
        "-0x1.22f0cc0000000p+0",
        "0x1.f633340000000p-5",
        "-0x1.8b10000000000p-1",
    ]
    parts = [CODES_X[:, g : g + GROUP] @ CODES_W[:, g : g + GROUP].T for g in range(0, K, GROUP)]
    terms = [part.astype(np.float32) * S_W_GROUPS[:, g] for g, part in enumerate(parts)]
    descending = ((terms[3] + terms[2]) + terms[1]) + terms[0]
    pairwise = (terms[0] + terms[1]) + (terms[2] + terms[3])
    for total in (descending, pairwise):
        assert (grouped(parts, None) != total * S_X[:, None]).any()


def check_epilogue(name: str) -> None:
    """Every way a kernel is asked: with and without bias, in fp32 and bf16, one scale a row and one a group."""
    kernel = load(name)
    x, w = torch.from_numpy(CODES_X).to(torch.int8), torch.from_numpy(CODES_W).to(torch.int8)
    s_x, s_w = torch.from_numpy(S_X), torch.from_numpy(S_W)
    acc = CODES_X @ CODES_W.T
    parts = [CODES_X[:, g : g + GROUP] @ CODES_W[:, g : g + GROUP].T for g in range(0, K, GROUP)]
    cases = [(None, s_w, lambda bias: in_order(acc, bias))]
    if kernel.grouped:
        cases.append((GROUP, torch.from_numpy(S_W_GROUPS), lambda bias: grouped(parts, bias)))
    for group, scales, expected in cases:
        packed = kernel.pack(w, 4, group)
        for bias in (None, BIAS):
            for dtype in (torch.float32, torch.bfloat16):
                found = kernel.matmul(x, s_x, packed, scales, None if bias is None else torch.from_numpy(bias), dtype)
                right = torch.from_numpy(expected(bias)).to(dtype)
                assert torch.equal(found, right), (name, group, bias is not None, dtype)


@pytest.mark.parametrize("name", ["int_ref", "fake", "cpu_int4"])
def test_the_epilogue_s_order_on_a_cpu(name):
    check_epilogue(name)


@pytest.mark.slow
def test_the_epilogue_s_order_in_triton():
    """In a process of its own: whether Triton interprets is decided when its kernels are imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["triton_w4a8"]


if __name__ == "__main__":
    check_epilogue("triton_w4a8")
    print("triton_w4a8")
