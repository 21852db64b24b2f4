"""Risk: an arm is charged for what is nobody's: a scene's building, a host's drift, the other rows of its batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qlibero.config.load import load_experiment
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.places import REPOSITORY
from qlibero.policies.base import Chunk
from qlibero.results.summary import policy_calls
from qlibero.run.episode import PlannedEpisode
from qlibero.run.noise import call_noise
from qlibero.run.planned import missing_episodes
from qlibero.run.rollout import RolloutSettings, run_episodes
from qlibero.sim.pool import Died, Finished, Observed
from qlibero.sim.scene import SimObservation


def experiment(tmp_path, backends: str, more: str = ""):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"suite: libero_goal\nbackends: {backends}\npolicy: {{type: remote, url: 'ws://localhost:1'}}\n{more}\n"
    )
    return load_experiment(path)


def test_every_arm_comes_first_equally_often_and_a_scene_keeps_its_order(tmp_path):
    """500 scenes, three arms: each first in a third (± 4 standard deviations); the same after an interruption."""
    three = experiment(tmp_path, "[baseline, {backend: aa, replicates: 2}]")
    planned = missing_episodes(three, tmp_path / "run")
    scenes = [planned[i : i + 3] for i in range(0, len(planned), 3)]
    assert all(len({key for _, key in scene}) == 1 for scene in scenes), "the arms of a scene follow each other"
    first = Counter(scene[0][0] for scene in scenes)
    assert set(first) == {"baseline", "aa-1", "aa-2"} and sum(first.values()) == 500
    assert all(abs(count - 500 / 3) < 4 * np.sqrt(500 * 2 / 9) for count in first.values())
    fewer = experiment(tmp_path, "[baseline, {backend: aa, replicates: 2}]", "episodes_per_task: 10")
    assert set(missing_episodes(fewer, tmp_path / "run")) < set(planned)
    order = {key: [arm for arm, k in planned if k == key] for _, key in planned[::60]}
    again = missing_episodes(fewer, tmp_path / "run")
    assert all(order[key] == [arm for arm, k in again if k == key] for key in order if any(k == key for _, k in again))


class Simulators:
    """The pool's side of the engine without a simulator: every episode asks twice, then ends."""

    def __init__(self, workers: int):
        self.workers, self._events, self._asked = workers, [], {}

    def start(self, worker, assignment):
        self._asked[worker] = 0
        self._observe(worker)

    def _observe(self, worker):
        self._asked[worker] += 1
        grey = np.zeros((2, 2, 3), np.uint8)
        seen = SimObservation(grey, grey, np.zeros(8, np.float32))
        self._events.append(Observed(worker, seen, "go", 5 * self._asked[worker], 1.0, 1.0))

    def wait(self, timeout):
        events, self._events = self._events, []
        return events

    def act(self, worker, actions):
        if self._asked[worker] < 2:
            self._observe(worker)
        else:
            rows = np.zeros((10, 10), np.float32)
            self._events.append(Finished(worker, False, 10, "scene", rows, 1.0, 1.0))


class Counting:
    """A policy that counts its calls."""

    batch_size, noise_shape = 3, (2, 7)

    def __init__(self):
        self.calls = 0

    def infer(self, observations, noise):
        self.calls += 1
        return Chunk(np.zeros((len(observations), 2, 7), np.float32), {})


def test_a_batch_counts_once(tmp_path):
    keys = dict.fromkeys(key for _, key in missing_episodes(experiment(tmp_path, "[baseline]"), tmp_path / "run"))
    policy, records = Counting(), []
    run_episodes(
        [PlannedEpisode("baseline", key) for key in list(keys)[:7]],
        {"baseline": policy},
        Simulators(4),
        RolloutSettings("pure", 10, 5, 0),
        lambda record, trajectory: records.append(record),
    )
    assert len(records) == 7 and max(max(record.batch_sizes) for record in records) == 3
    assert sum(len(record.policy_ms) for record in records) == 14 > policy.calls
    assert policy_calls(records).count == pytest.approx(policy.calls)


class OnADevice(Counting):
    """A policy whose calls are begun, and ready when they have been asked three times; actions tell rows apart."""

    def __init__(self):
        super().__init__()
        self.under_way, self.sizes = [], []

    def begin(self, observations, noise):
        assert len(self.under_way) < 2, "a third call has nothing to wait for"
        assert not self.under_way or len(observations) == self.batch_size, "only a whole batch waits behind another"
        begun = BegunOnADevice(self, noise)
        self.under_way.append(begun)
        self.sizes.append(len(self.under_way))
        return begun


class BegunOnADevice:
    def __init__(self, policy, noise):
        self.policy, self.noise, self.asked = policy, noise, 0

    def ready(self):
        first = self.policy.under_way[0] is self  # a device answers in order
        self.asked += first
        return first and self.asked > 3

    def chunk(self):
        assert self.policy.under_way.pop(0) is self
        self.policy.calls += 1
        return Chunk(self.noise, {})


class Dying(Simulators):
    """One simulator dies while its episode's row is on the device, and its successor asks at once."""

    def __init__(self, workers):
        super().__init__(workers)
        self.acted, self.started, self.dead = [], [], False

    def start(self, worker, assignment):
        self.started.append((worker, assignment.key))
        super().start(worker, assignment)

    def wait(self, timeout):
        events = super().wait(timeout)
        if not events and not self.dead:  # all that waited has been begun
            self.dead = True
            return [Died(1, "killed")]
        return events

    def act(self, worker, actions):
        key = [key for other, key in self.started if other == worker][-1]
        self.acted.append((key, self._asked[worker], actions.copy()))
        super().act(worker, actions)


def test_answers_of_begun_calls_reach_their_own_episode_and_nobody_else(tmp_path):
    """Against the noise that each episode's calls must have, drawn here by key and call."""
    keys = list(dict.fromkeys(key for _, key in missing_episodes(experiment(tmp_path, "[baseline]"), tmp_path / "run")))
    policy, pool, records = OnADevice(), Dying(8), []
    run_episodes(
        [PlannedEpisode("baseline", key) for key in keys[:12]],
        {"baseline": policy},
        pool,
        RolloutSettings("pure", 10, 5, 1),
        lambda record, trajectory: records.append(record),
    )
    assert len(records) == 12 and {record.outcome for record in records} == {"failure"}
    assert sum(record.attempt for record in records) == 13, "the one that died was run again"
    assert max(policy.sizes) == 2, "a whole batch that waits is begun behind the first"
    assert len(pool.acted) == 24
    for key, call, actions in pool.acted:
        assert np.array_equal(actions, call_noise(key, call - 1, (2, 7)))


def test_an_infer_put_in_front_of_begin_is_asked(tmp_path):
    keys = list(dict.fromkeys(key for _, key in missing_episodes(experiment(tmp_path, "[baseline]"), tmp_path / "run")))

    class Derived(OnADevice):
        def infer(self, observations, noise):
            return super().infer(observations, noise)

    patched = OnADevice()
    patched.infer = Counting().infer
    for policy in (Derived(), patched):
        settings, records = RolloutSettings("pure", 10, 5, 0), []
        plan = [PlannedEpisode("baseline", key) for key in keys[:3]]
        run_episodes(
            plan, {"baseline": policy}, Simulators(2), settings, lambda record, _, to=records: to.append(record)
        )
        assert len(records) == 3 and not policy.sizes


def test_an_arm_that_is_decided_starts_no_further_episode(tmp_path):
    planned = missing_episodes(experiment(tmp_path, "[baseline, aa]"), tmp_path / "run")[:40]
    records = []
    run_episodes(
        [PlannedEpisode(arm, key) for arm, key in planned],
        {"baseline": Counting(), "aa": Counting()},
        Simulators(2),
        RolloutSettings("pure", 10, 5, 0),
        lambda record, trajectory: records.append(record),
        needs=lambda arm: arm == "baseline" or len(records) < 10,
    )
    ran = Counter(record.arm for record in records)
    assert ran["baseline"] == 20 and 1 <= ran["aa"] < 10


@pytest.mark.parametrize(
    ("backends", "says"),
    [
        ("[baseline, {backend: fake, replicates: 2}]", "belongs to aa|only baseline and aa"),
        ("[baseline, {backend: baseline, name: again, replicates: 2}]", "belongs to aa"),
        ("[baseline, {backend: aa, replicates: 0}]", "greater than or equal to 1"),
        ("[baseline, {backend: aa, name: aa-2}, {backend: aa, replicates: 2}]", "two arms are called aa-2"),
    ],
)
def test_replicates_that_mean_nothing_are_named(tmp_path, backends, says):
    with pytest.raises(UserError, match=says):
        experiment(tmp_path, backends)


@pytest.mark.slow
def test_replicates_are_the_same_policy_up_to_rounding_and_not_copies_of_it():
    """The embedded policy in five arrangements, on frames of noise: other bits every time, equal to 1e-4. What makes
    them differ must not be the library's doing: it holds at one batch size and padding too."""
    import torch

    from qlibero.policies import load_policy
    from qlibero.policies.base import Observation
    from qlibero.run.noise import call_noise

    torch.set_num_threads(1)
    settings = load_experiment(REPOSITORY / "configs/experiments/aa_replicates.yaml")
    baseline, *again = settings.arms()
    assert [arm.name for arm in again] == ["aa-1", "aa-2", "aa-3", "aa-4", "aa-5"]
    policy, rng = load_policy(settings.policy, frozenset()), np.random.default_rng(0)
    replicates = [policy.rearranged(arm.replicate) for arm in again]
    alike = [replicate.with_batch_size(1) for replicate in replicates]
    for one in alike:
        one._padding = 0
    assert len({one.provenance()["arrangement"] for one in replicates}) == 5, "an identity names its arrangement"
    for call in range(4):
        frames, state = rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8), rng.standard_normal(8) * 0.1
        text = "pick up the black bowl on the stove and place it on the plate"
        seen = Observation(*frames, state.astype(np.float32), text)
        noise = call_noise(EpisodeKey("libero_spatial", 0, 0, 7), call, policy.noise_shape)[None]
        actions = policy.infer([seen], noise).actions
        for policies in (replicates, alike):
            found = [one.infer([seen], noise).actions for one in policies]
            assert all(np.abs(one - actions).max() < 1e-4 for one in found)
            assert len({one.tobytes() for one in (actions, *found)}) == 6
        assert np.array_equal(policy.infer([seen], noise).actions, actions), "an arrangement must not change the policy"
    mine = {t.data_ptr() for t in policy.model.state_dict().values()}
    for one in (replicates[0], replicates[4]):
        own = [name for name, t in one.model.state_dict().items() if t.data_ptr() not in mine]
        assert len(own) == 3 and all(".gemma_expert.model.layers.0.mlp." in name for name in own)
