"""Risk: one diverging episode ends an overnight run, and the same command dies at the same place for ever."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pi05_small import noises, observations
from test_fake_equals_kernel import made, small_policy

from qlibero.episode_key import EpisodeKey
from qlibero.kernels.contract import quantize_activations
from qlibero.machine.environment import simulator_environment
from qlibero.policies.base import Chunk, blank_observation
from qlibero.quant.apply import quantize_policy
from qlibero.results.ledger import Ledger, read_ledger
from qlibero.run.episode import PlannedEpisode
from qlibero.run.rollout import RolloutSettings, run_episodes
from qlibero.sim.pool import SimulatorPool


class Diverging:
    """Rests; in the call whose noise begins with `first_noise` it answers `what` from row `row` on."""

    name, noise_shape, batch_size, model = "diverging", (10, 7), 2, None

    def __init__(self, first_noise: float, row: int, what: float):
        self.first_noise, self.row, self.what = first_noise, row, what

    def infer(self, observations, noise):
        actions = np.zeros((len(observations), 10, 7), np.float32)
        actions[..., 6] = -1.0
        for i, z in enumerate(noise):
            if float(z[0, 0]) == self.first_noise:
                actions[i, self.row :, 2] = self.what
        return Chunk(actions)

    def warmup_observations(self, prompts):
        return [blank_observation(prompt) for prompt in prompts]

    def provenance(self):
        return {"type": "diverging"}


@pytest.mark.libero
@pytest.mark.parametrize(
    ("call", "row", "what", "steps"), [(0, 0, np.nan, 0), (1, 2, np.inf, 7), (2, 4, -np.inf, 14)], ids=str
)
def test_only_its_own_episode_ends_and_as_a_failure(tmp_path, call, row, what, steps):
    from qlibero.run.noise import call_noise

    bad, good = EpisodeKey("libero_object", 0, 0, 0), EpisodeKey("libero_object", 0, 1, 0)
    policy = Diverging(float(call_noise(bad, call, (10, 7))[0, 0]), row, what)
    settings = RolloutSettings(protocol="pure", max_steps=15, replan_steps=5, retries=1)
    with SimulatorPool(1, environment=simulator_environment()) as pool, Ledger(tmp_path, "arm", "000of001") as ledger:
        plan = [PlannedEpisode("arm", bad), PlannedEpisode("arm", good)]
        run_episodes(plan, {"arm": policy}, pool, settings, ledger.append)
    records = {record.key: record for record in read_ledger(tmp_path, "arm")}
    assert (records[bad].outcome, records[bad].steps, records[bad].replans) == ("failure", steps, call + 1)
    assert records[bad].fingerprint and records[bad].action_digest and records[bad].attempt == 1
    assert (records[good].outcome, records[good].steps) == ("failure", 15)
    line = json.loads(next((tmp_path / "arm").glob("episodes-*.jsonl")).read_text().splitlines()[0])
    assert line["outcome"] == "failure" and line["error"] is None


@pytest.mark.parametrize("backend", ["full precision", "fake", "cpu_int4", "int_ref"])
def test_weights_that_overflow_give_actions_that_say_so_and_raise_nothing(backend):
    """As a diverging W4A4 arm does it: non-finite activations inside, on a CPU too, end in non-finite actions."""
    policy = small_policy()
    if backend != "full precision":
        policy = quantize_policy(policy, made(policy, layout="llm+expert", method="rtn"), backend)
    before = policy.infer(observations(2), noises(2, policy.noise_shape)).actions
    assert np.isfinite(before).all()
    seen = observations(2)
    object.__setattr__(seen[1], "state", np.full(8, np.nan, np.float32))
    actions = policy.infer(seen, noises(2, policy.noise_shape)).actions
    assert not np.isfinite(actions[1]).all() and np.array_equal(actions[0], before[0])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_that_is_not_finite_keeps_a_scale_that_is_none(odd, bits):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    clean_codes, clean_scales = quantize_activations(x, bits)
    x[1, 5] = odd
    codes, scales = quantize_activations(x, bits)
    assert not torch.isfinite(scales[1])
    for row in (0, 2):
        assert torch.equal(codes[row], clean_codes[row]) and scales[row] == clean_scales[row]


def test_a_server_s_answer_that_is_not_finite_is_one_episode_s_failure_across_the_wire():
    """Our server never sends it, as it may go to a robot, and says so in words that our client understands."""
    import asyncio
    import threading

    from qlibero.policies.listening import ServerSettings
    from qlibero.policies.remote import RemotePolicy
    from qlibero.policies.server import PolicyServer

    policy = small_policy()
    plain = policy.infer

    def infer(seen, noise):
        chunk = plain(seen, noise)
        chunk.actions[[bool(np.isnan(z).any()) or z[0, 0] > 5 for z in noise]] = np.nan
        return chunk

    policy.infer = infer
    ports, stop, loop = [], asyncio.Event(), asyncio.new_event_loop()
    ready = threading.Event()

    def serve():
        asyncio.set_event_loop(loop)
        server = PolicyServer(policy, ServerSettings("127.0.0.1", 0, seed=0))
        loop.run_until_complete(server.run(lambda port: (ports.append(port), ready.set()), stop))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(60)
        client = RemotePolicy(f"ws://127.0.0.1:{ports[0]}", batch_size=2, timeout_s=30)
        z = noises(2, policy.noise_shape)
        good = client.infer(observations(2), z).actions
        z[1, 0, 0] = 6.0
        actions = client.infer(observations(2), z).actions
        assert np.array_equal(actions[0], good[0]) and np.isnan(actions[1]).all()
        assert np.array_equal(client.infer(observations(2), noises(2, policy.noise_shape)).actions, good)
        client.close()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
