"""One task's simulator in this process, made pure: an episode depends on (suite, task, init, seed) and nothing else.

Why each line is as it is (contract 1):
- LIBERO draws fixture poses from numpy's global stream at every reset and they are not in the init state, so the
  stream is seeded before each reset.
- `object_property_initializers` grows at every reset and is never cleared, which shifts the stream: it is cleared.
- The solver starts from its last solution, so every `mj_forward` that robosuite makes shows in the last bits, down to
  the one in the constructor of the renderer that each of its hard resets makes anew (`libero.py`).
- The step is robosuite's own with the waste removed (one dynamics pass a substep instead of three, look-ups done once,
  sensors and cameras only when asked). The settled scene and every step after it equal those of LIBERO with its
  renderer, bit for bit, on every scene that tests/test_purity.py compares: positions and velocities on at least one of
  each of the 40 tasks, success, proprioception and pixels on a few. Sensors are read at substep 23 of 25, where
  robosuite samples them, though the step goes on.
- `protocol="openpi"` replays the random stream of the published evaluation instead: one seed a task, then one reset
  an episode, the growing list included. The stream's state before each reset is remembered, so episodes may come in
  any order.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import math
import time
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlibero.episode_key import BASE, FRESH, OFFICIAL, EpisodeKey
from qlibero.errors import UserError
from qlibero.registry import FolderSuite, SuitePlugin, get
from qlibero.sim import libero, suites
from qlibero.sim.control import ArmControl

# Part of what a fresh state is drawn from: a change of how must change this name, or equal keys had other scenes.
FRESH_RECIPE = "qlibero-fresh-1"


@dataclass(frozen=True)
class SimObservation:
    """What the policy gets to see: two upright frames (R, R, 3) uint8 and the (8,) float32 proprioceptive state."""

    image: np.ndarray
    wrist_image: np.ndarray
    state: np.ndarray


class Scene:
    """One task's simulator. `reset` before anything else. Several may live in one process; each holds about 2 GB.

    `env` is the robosuite-level environment (privileged state for scripted experts). `render_s` is the time spent
    rendering since construction, in seconds.
    """

    def __init__(self, suite: str, task: int, *, resolution: int = 256, protocol: str = "pure") -> None:
        suites.check_task(suite, task)
        if protocol not in suites.PROTOCOLS:
            raise UserError(f"protocol {protocol!r}: write one of {', '.join(suites.PROTOCOLS)}")
        self.suite, self.task, self.resolution, self.protocol = suite, task, resolution, protocol
        self.language = suites.task_language(suite, task)
        self.perturbation = suites.perturbation(suite, task)
        self.env = libero.make_environment(suite, task, resolution, self.perturbation)
        self._seen: SimObservation | None = None
        self.render_s = 0.0
        self._inits = suites.init_states(suite, task)
        self._check_states()
        self._initializers = list(self.env.object_property_initializers)
        self._streams: dict[int, list[Any]] = {}
        self._fingerprint = self._episode = ""
        # before EGL's own exit handler, which would make freeing the context an error
        atexit.register(_close_at_exit, weakref.ref(self))

    def reset(self, init: int | None, seed: int, inits: str = OFFICIAL) -> None:
        """Begin the episode of that initial state and seed, objects settled, `observation` showing its first frame.

        `inits` says what `init` counts: official states, those of the base suite, or fresh ones. `init=None`
        keeps the placement that LIBERO draws from `seed` (scenes for demonstrations).
        """
        if inits == FRESH and self.protocol != "pure":
            raise UserError(f"fresh initial states have no place in protocol {self.protocol!r}; write protocol: pure")
        self._episode = f"{inits}/{init}/{seed}"
        states = self._base_inits if inits == BASE else self._inits
        if init is not None and inits != FRESH and not 0 <= init < len(states):
            raise UserError(f"{self.suite} task {self.task} has initial states 0 to {len(states) - 1}, not {init}")
        with libero.private_numpy_stream():
            state = None if init is None else self._draw(init, seed) if inits == FRESH else states[init]
            if self.protocol == "openpi":
                self._replay_stream(init or 0, seed)
            else:
                self.env.object_property_initializers = []
                self.env.seed(seed)
            self._hard_reset()
        if state is not None:
            # a fresh one was drawn about the perturbed pose
            self.enter(state if inits == FRESH else self.perturbation.with_arm(state, self.env))
        done = False
        for index in range(suites.SETTLE_STEPS):
            done = self.step(suites.SETTLE_ACTION, observe=index == suites.SETTLE_STEPS - 1)
        if done and init is not None and isinstance(get(SuitePlugin, self.suite), FolderSuite):
            goal = libero.task_files(self.suite, self.task)["goal"]
            raise UserError(f"{goal}: the goal holds before anybody has moved ({inits} initial state {init})")
        self._fingerprint = self._hash_scene()

    def _check_states(self) -> None:
        size = self.env.sim.get_state().flatten().size
        if len(self._inits) and self._inits.shape[1] != size:
            files = libero.task_files(self.suite, self.task)
            raise UserError(
                f"{files['states']}: states of {self._inits.shape[1]} numbers, but {files['goal']} makes a scene of "
                f"{size}: these are initial states of another scene"
            )

    def enter(self, state: np.ndarray) -> None:
        """Put everything where an initial state, (n,) float64, has it: set_init_state without its rendering."""
        self.env.sim.set_state_from_flattened(state)
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()

    def step(self, action: Any, *, observe: bool = False) -> bool:
        """One control step (50 ms) of a (7,) action; returns the BDDL success predicate.

        With `observe`, `observation` is renewed from this step's own sensors, sampled when robosuite samples them.
        """
        import mujoco

        env, sim = self.env, self.env.sim
        model, data = sim.model._model, sim.data._data
        action = np.asarray(action, dtype=np.float64)
        substeps = int(env.control_timestep / env.model_timestep)
        env.timestep += 1
        for substep in range(substeps):
            mujoco.mj_step1(model, data)
            _solve(model, data)
            if substep == 0:
                self._first_substep(action)
            else:
                _solve(model, data)
                self._control.substep(action)
            mujoco.mj_step2(model, data)
            if observe and substep == substeps - 2:
                self._seen = self._observe()
        env.cur_time += env.control_timestep
        env._post_process()
        return bool(env._check_success())

    def look(self) -> SimObservation:
        """What is to be seen now, for a video's last frame: rendering it leaves the solver where it is."""
        return self._observe()

    @property
    def observation(self) -> SimObservation:
        """What was seen last. Raises RuntimeError before the first `reset`."""
        if self._seen is None:
            raise RuntimeError(f"{self.suite} task {self.task}: no episode has begun")
        return self._seen

    def eef_position(self) -> np.ndarray:
        """Where the gripper is, (3,) float64 metres in the world frame."""
        return np.array(self.env.sim.data.site_xpos[self.env.robots[0].eef_site_id])

    def fingerprint(self) -> str:
        """sha256 (hex) of the settled scene: qpos, qvel, body_pos, body_quat and the first frames and state."""
        return self._fingerprint

    def renderer(self) -> str:
        """What OpenGL calls itself here, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)"."""
        from OpenGL import GL

        self._make_current()
        return str(GL.glGetString(GL.GL_RENDERER).decode())

    def close(self) -> None:
        """Free the model and the GL context; afterwards the scene is of no use. Safe to call twice."""
        if self.env is not None:
            self._make_current()  # the context's objects are freed by number: in another's context that frees its
            self.env.close()
            self.env = None

    def _first_substep(self, action: np.ndarray) -> None:
        """robosuite's own control, which sets the goal; its forward() only has the solver left to run.

        (It calls it once, but not at all in an episode's very first substep.)
        """
        sim, forward = self.env.sim, self.env.sim.forward
        sim.forward = functools.partial(_solve, sim.model._model, sim.data._data)
        try:
            self.env._pre_action(action, True)
        finally:
            sim.forward = forward

    @functools.cached_property
    def _base_inits(self) -> np.ndarray:
        """The initial states of the suite that this one perturbs, (50, n) float64."""
        suite = suites.get_suite(self.suite)
        if not suite.has_scenes_of_base:
            raise UserError(f"{self.suite} has no scenes of another suite; write inits: official")
        states = suites.init_states(suite.base, self.task)
        if states.shape[1] != self._inits.shape[1]:
            raise UserError(f"{self.suite} task {self.task}: the states of {suite.base} are of another scene")
        return states

    def _draw(self, init: int, seed: int) -> np.ndarray:
        """A fresh initial state, drawn as the official ones were: objects in the regions of the task's BDDL file, the
        arm's joints around their rest. Returns (n,) float64: time, qpos, qvel.

        A function of the episode's key alone. It is entered like an official one, over fixtures that `seed` places.
        """
        text = f"{FRESH_RECIPE}/{EpisodeKey(self.suite, self.task, init, seed, FRESH)}"
        stream = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        self.env.object_property_initializers = []
        self.env.seed(stream | 1 << 31)  # the upper half: demonstrations draw theirs from seeds below it
        with libero.noisy_arm(self.env):
            self._hard_reset()
        drawn: np.ndarray = self.env.sim.get_state().flatten()
        return drawn

    def _hard_reset(self) -> None:
        """robosuite's `reset()` with hard_reset, less the observables (0.7 s), which nothing here uses."""
        env = self.env
        while True:
            try:
                env._load_model()
                env._initialize_sim()
                env._reset_internal()
                break
            except libero.placement_failure():  # LIBERO's own reset draws on from where the stream stands, too
                continue
        env.sim.forward()
        env.visualize(vis_settings={name: False for name in env._visualizations})
        self._control = ArmControl(env)

    def _replay_stream(self, episode: int, seed: int) -> None:
        """Bring numpy's stream, and the list LIBERO lets grow, to where the published evaluation has them.

        It constructs the environment, seeds once, and resets before episode 0, 1, 2, …: before episode k the stream
        has served k resets, and the list holds the constructor's entries and those of k resets.
        """
        env = self.env
        streams = self._streams.setdefault(seed, [])
        if not streams:
            env.seed(seed)
            streams.append(np.random.get_state())
        for done in range(len(streams) - 1, episode):
            env.object_property_initializers = self._initializers * (done + 1)
            np.random.set_state(streams[done])
            self._hard_reset()
            streams.append(np.random.get_state())
        env.object_property_initializers = self._initializers * (episode + 1)
        np.random.set_state(streams[episode])

    def _observe(self) -> SimObservation:
        env, data, started = self.env, self.env.sim.data, time.perf_counter()
        robot = env.robots[0]
        w, x, y, z = data.get_body_xquat(robot.robot_model.eef_name)
        state = np.concatenate(
            (
                data.site_xpos[robot.eef_site_id],
                axis_angle(np.array((x, y, z, w))),
                data.qpos[robot._ref_gripper_joint_pos_indexes],
            )
        ).astype(np.float32)
        self._make_current()
        frames = [env.sim.render(self.resolution, self.resolution, camera_name=name) for name in libero.CAMERAS]
        frames[0] = self.perturbation.noisy(frames[0], f"{self._episode}/{env.timestep}")
        # LIBERO's frames come upside down and policies are trained on them turned by 180 degrees
        image, wrist_image = (np.ascontiguousarray(frame[::-1, ::-1]) for frame in frames)
        self.render_s += time.perf_counter() - started
        return SimObservation(image, wrist_image, state)

    def _make_current(self) -> None:
        """Another scene of this process may have been the last to use OpenGL."""
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def _hash_scene(self) -> str:
        sim, seen = self.env.sim, self.observation
        digest = hashlib.sha256()
        for array in (
            sim.data.qpos,
            sim.data.qvel,
            sim.model.body_pos,
            sim.model.body_quat,
            seen.image,
            seen.wrist_image,
            seen.state,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _close_at_exit(scene: weakref.ref[Scene]) -> None:
    if (alive := scene()) is not None:
        alive.close()


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector (3,) of an xyzw quaternion, angle in [0, 2π): openpi's formula, no antipodal flip.

    The flip that looks like an obvious improvement costs a trained policy 14 to 40 points of success.
    """
    w = min(1.0, max(-1.0, float(quaternion[3])))
    norm = math.sqrt(1.0 - w * w)
    if math.isclose(norm, 0.0):
        return np.zeros(3)
    return quaternion[:3] * 2.0 * math.acos(w) / norm


def _solve(model: Any, data: Any) -> None:
    """All that a further `mj_forward` changes when nothing has moved: the constraint solver's warm start.

    robosuite calls `mj_forward` twice before a substep's `mj_step`. Each solves the constraints anew from the last
    solution, with the last substep's control, and where the solver has not converged to the last bit the warm start
    moves (by 1e-15, which contacts amplify). Positions and velocities, the dear part, come out the same every time.
    """
    import mujoco

    mujoco.mj_fwdActuation(model, data)
    mujoco.mj_fwdAcceleration(model, data)
    mujoco.mj_fwdConstraint(model, data)
