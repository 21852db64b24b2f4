"""Risk: a fresh initial state is no function of its key, is an official one after all, or passes for one somewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qlibero.config.config_hash import config_hash
from qlibero.config.load import load_experiment
from qlibero.episode_key import FRESH, EpisodeKey
from qlibero.errors import UserError
from qlibero.results.export import export_episodes
from qlibero.results.imports import from_run
from qlibero.results.ledger import Ledger, read_ledger
from qlibero.results.pairing import collect_arms, pair_arms
from qlibero.results.records import EpisodeRecord, record_from_dict
from qlibero.results.runs import read_run, video_path
from qlibero.run.noise import call_noise
from qlibero.run.planned import episode_keys
from qlibero.sim.pool import Assignment, Finished, Observed, SimulatorPool
from qlibero.sim.scene import Scene
from qlibero.sim.suites import init_states

pytestmark = pytest.mark.libero

KEYS = [
    EpisodeKey(suite, task, init, seed, FRESH)
    for suite, task in (("libero_spatial", 4), ("libero_goal", 0))
    for init, seed in ((0, 7), (1, 7), (0, 8))
]


def record(arm: str, inits: str) -> EpisodeRecord:
    return EpisodeRecord(
        suite="libero_goal",
        task=0,
        init=3,
        inits=inits,
        seed=7,
        arm=arm,
        outcome="success",
        success_step=50,
        steps=50,
        replans=10,
        fingerprint=inits,
        action_digest="cd",
    )


def fingerprints(keys: list[EpisodeKey], workers: int) -> dict[EpisodeKey, str]:
    """Each episode's first five steps, without a policy, in so many simulators, in this order."""
    waiting, running, found = list(keys), {}, {}
    with SimulatorPool(workers) as pool:
        for worker in range(workers):
            running[worker] = waiting.pop(0)
            pool.start(worker, Assignment(running[worker], "pure", 5))
        while running:
            for event in pool.wait(1.0):
                if isinstance(event, Observed):
                    pool.act(event.worker, np.zeros((5, 7), np.float32))
                    continue
                assert isinstance(event, Finished), event
                found[running.pop(event.worker)] = event.fingerprint
                if waiting:
                    running[event.worker] = waiting.pop(0)
                    pool.start(event.worker, Assignment(running[event.worker], "pure", 5))
    return found


def test_a_fresh_scene_depends_on_its_key_alone():
    """One simulator in order; two in another order, official episodes between: the same six scenes, all different."""
    official = [EpisodeKey("libero_goal", 0, 0, 7), EpisodeKey("libero_spatial", 4, 0, 7)]
    alone = fingerprints(KEYS, workers=1)
    among = fingerprints([KEYS[5], official[0], *KEYS[:3], official[1], KEYS[4], KEYS[3]], workers=2)
    assert {key: among[key] for key in KEYS} == alone
    assert len(set(among.values())) == len(KEYS) + len(official)


@pytest.mark.parametrize(("suite", "task"), [("libero_spatial", 4), ("libero_object", 1), ("libero_10", 2)])
def test_fresh_states_are_like_the_official_ones_and_none_of_them(suite, task):
    """As states: within the range the official ones span and a little, never equal; the goal is not reached."""
    official = init_states(suite, task)
    scene = Scene(suite, task, resolution=16)
    drawn = []
    for init in range(8):
        scene.reset(init, 7, FRESH)
        assert not scene.step([0, 0, 0, 0, 0, 0, -1]), "the goal is reached before the policy has moved"
        drawn.append(scene._draw(init, 7))
    again = scene._draw(3, 7)
    positions = slice(1, 1 + scene.env.sim.model.nq)
    joints, objects = slice(1, 8), slice(10, 1 + scene.env.sim.model.nq)
    scene.close()
    drawn = np.array(drawn)
    assert np.array_equal(again, drawn[3])
    assert drawn.shape[1] == official.shape[1] and len({state.tobytes() for state in drawn}) == len(drawn)
    for state in drawn:
        assert np.abs(official[:, objects] - state[objects]).max(axis=1).min() > 1e-4
    spread = (drawn[:, joints] - official[:, joints].mean(axis=0)).std()
    assert 0.014 < spread < 0.027, "robosuite's joint noise is 0.02 rad, as in the official states"
    # quaternions may be any; positions lie where the official ones do, give or take their own width
    low, high = official[:, positions].min(axis=0), official[:, positions].max(axis=0)
    beyond = np.maximum(low - drawn[:, positions], drawn[:, positions] - high).max(axis=0)
    assert (beyond[9:12] < 0.03).all(), "the first object is placed elsewhere than officially"


def test_what_cannot_be_drawn_is_refused():
    scene = Scene("libero_object", 0, resolution=16, protocol="openpi")
    with pytest.raises(UserError, match="protocol: pure"):
        scene.reset(0, 7, FRESH)
    scene.close()


def test_names_do_not_collide():
    fresh, official = EpisodeKey("libero_goal", 0, 3, 7, FRESH), EpisodeKey("libero_goal", 0, 3, 7)
    assert (str(fresh), str(official)) == ("libero_goal/0/fresh-3/7", "libero_goal/0/3/7")
    assert [EpisodeKey.parse(str(key)) for key in (fresh, official)] == [fresh, official]
    assert not np.array_equal(call_noise(fresh, 0, (4, 4)), call_noise(official, 0, (4, 4)))
    assert fresh.initial_state != EpisodeKey("libero_goal", 0, 3, 8, FRESH).initial_state
    assert official.initial_state == EpisodeKey("libero_goal", 0, 3, 8).initial_state
    for text in ("libero_goal/0/stale-3/7", "libero_goal/0/-3/7", "libero_goal/0/3", "libero_goal/0/fresh-/7"):
        with pytest.raises(ValueError, match="no episode key"):
            EpisodeKey.parse(text)


def test_ledger_pairing_export_and_videos_keep_fresh_and_official_apart(tmp_path):
    """The same numbers in both kinds: two episodes, never one; and old lines, which name no kind, are official."""
    for arm in ("baseline", "fake"):
        with Ledger(tmp_path, arm) as ledger:
            for inits in ("official", FRESH):
                ledger.append(record(arm, inits))
    found = read_ledger(tmp_path, "fake")
    assert [r.key.init_name for r in found] == ["fresh-3", "3"]
    run = read_run(tmp_path)
    arms = collect_arms([run])
    assert len(pair_arms(arms["baseline"], arms["fake"]).pairs) == 2
    assert len({video_path(tmp_path, r) for r in found}) == 2
    export_episodes([tmp_path], tmp_path / "episodes.csv")
    rows = (tmp_path / "episodes.csv").read_text().splitlines()
    where = rows[0].split(",").index("inits")
    assert sorted(row.split(",")[where] for row in rows[1:]) == ["fresh", "fresh", "official", "official"]
    assert len({key for key, _ in from_run(arms["fake"], "run", {}).episodes}) == 2
    line = json.loads(found[1].to_json())
    del line["inits"]
    assert record_from_dict(line).key == found[1].key


def written(tmp_path, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "suite: libero_object\ntasks: [1]\nepisodes_per_task: 3\nbackends: [baseline]\n"
        f"policy: {{type: remote, url: 'ws://localhost:1'}}\n{text}\n"
    )
    return path


@pytest.mark.parametrize("text", ["inits: fresh(2)", "inits: {fresh: 2}", "inits: 'fresh ( 2 )'"])
def test_fresh_states_and_seeds_are_configured(tmp_path, text):
    keys = episode_keys(load_experiment(written(tmp_path, f"{text}\nseeds: [7, 8, 9]")))
    assert [(key.init, key.seed, key.inits) for key in keys] == [
        (init, seed, FRESH) for init in (0, 1) for seed in (7, 8, 9)
    ]
    single = load_experiment(written(tmp_path, "seed: 11"))
    assert {key.seed for key in episode_keys(single)} == {11} and {key.inits for key in episode_keys(single)} == {
        "official"
    }
    assert load_experiment(written(tmp_path, "seeds: [8, 7]")).seed == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("inits: fresh", "inits"),
        ("inits: fresh(0)", "greater than or equal to 1"),
        ("inits: {fresh: 2, official: 3}", "inits"),
        ("inits: fresh(2)\nprotocol: openpi", "write protocol: pure"),
        ("seeds: []", "no seed is listed"),
        ("seeds: [7, 7]", "listed twice"),
        ("seeds: [7, 8]\nseed: 9", "write one of the two keys"),
        ("seeds: [-1]", "seeds"),
    ],
)
def test_what_makes_no_episodes_is_named(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        load_experiment(written(tmp_path, text))


def test_a_run_directory_holds_one_kind_of_initial_states_and_may_grow(tmp_path):
    def hashed(text: str) -> str:
        experiment = load_experiment(written(tmp_path, text))
        return config_hash(experiment, experiment.arms()[0])

    assert hashed("inits: fresh(2)") == hashed("inits: fresh(20)") != hashed("") == hashed("inits: official")
    assert hashed("seeds: [7, 8]") == hashed("seed: 7") != hashed("seeds: [8, 7]")
