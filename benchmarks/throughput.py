"""Episodes per hour of qlibero's engine against the two usual ways to evaluate, on the same policy and episodes.

    python benchmarks/throughput.py [--suite libero_object] [--task 0] [--episodes 4] [--workers 2] [--policy CONFIG]

(a) `sequential`: LIBERO as in openpi's main.py: one episode at a time, every sensor and both cameras at every step.
(b) `lockstep`: as LeRobot's vector environments: as many processes as workers, stepped together, policy calls batched,
    a batch of episodes ends with its longest. Kinder than the original: an environment that is done rests.
(c) `engine`: qlibero as it runs experiments.

All three seed purely, so their episodes must be equal (success, steps, every action); the benchmark fails otherwise.
Scenes are built before the clock starts (a task's scene serves its 50 episodes). Wall time depends on what else the
host does, CPU time much less: both are shown. Prints tables on stderr and one JSON document as the last line of stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the same stock LIBERO that the tests hold the simulator to
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402

from qlibero.config.load import load_experiment  # noqa: E402
from qlibero.episode_key import EpisodeKey  # noqa: E402
from qlibero.policies.base import Observation, Policy  # noqa: E402
from qlibero.run.episode import PlannedEpisode, action_digest  # noqa: E402
from qlibero.run.noise import call_noise  # noqa: E402
from qlibero.run.rollout import RolloutSettings, run_episodes  # noqa: E402
from qlibero.sim import suites  # noqa: E402
from qlibero.sim.pool import Assignment, Finished, Observed, SimulatorPool, worker_environment  # noqa: E402

REPLAN = 5
Results = dict[EpisodeKey, tuple[bool, int, str]]
"""Episode to (success, steps, digest of its executed actions): what must be equal."""


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of this process and of `pids` so far, in seconds."""
    ticks = 0
    for pid in (os.getpid(), *pids):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], Results], pids: Sequence[int] = ()) -> tuple[Results, float, float]:
    """Results, wall seconds and CPU seconds of `work`."""
    cpu, wall = cpu_seconds(pids), time.perf_counter()
    results = work()
    return results, time.perf_counter() - wall, cpu_seconds(pids) - cpu


def as_observation(sensors: dict[str, np.ndarray], prompt: str) -> Observation:
    from stock_libero import frames

    from qlibero.sim.scene import axis_angle

    image, wrist_image = (np.ascontiguousarray(frame) for frame in frames(sensors))
    state = np.concatenate(
        (sensors["robot0_eef_pos"], axis_angle(sensors["robot0_eef_quat"]), sensors["robot0_gripper_qpos"])
    )
    return Observation(image, wrist_image, state.astype(np.float32), prompt)


def infer(policy: Policy, seen: Sequence[Observation], noise: np.ndarray) -> np.ndarray:
    """Actions (B, H, 7) for any number of observations, in calls of the size the policy takes."""
    size = policy.batch_size
    parts = [policy.infer(seen[i : i + size], noise[i : i + size]).actions for i in range(0, len(seen), size)]
    return np.concatenate(parts)


def sequential(policy: Policy, keys: Sequence[EpisodeKey], max_steps: int) -> tuple[Results, float, float]:
    from stock_libero import StockEpisodes

    stock = StockEpisodes(keys[0].suite, keys[0].task)
    prompt = suites.task_language(keys[0].suite, keys[0].task)

    def work() -> Results:
        results: Results = {}
        for key in keys:
            sensors, done, executed, calls = stock.reset_pure(key.init, key.seed), False, [], 0
            plan: list[np.ndarray] = []
            while not done and len(executed) < max_steps:
                if not plan:
                    noise = call_noise(key, calls, policy.noise_shape)[None]
                    plan = list(policy.infer([as_observation(sensors, prompt)], noise).actions[0, :REPLAN])
                    calls += 1
                action = plan.pop(0)
                sensors, _, done, _ = stock.control.step(action.astype(np.float64))
                executed.append(action)
            results[key] = (bool(done), len(executed), action_digest(np.stack(executed)))
        return results

    outcome = timed(work)
    stock.close()
    return outcome


def _vector_worker(connection: Any, suite: str, task: int) -> None:
    """One environment of a lock-step vector: reset and step on demand, always with its whole observation."""
    from stock_libero import StockEpisodes

    stock = StockEpisodes(suite, task)
    prompt = suites.task_language(suite, task)
    connection.send("ready")
    while (message := connection.recv()) is not None:
        if message[0] == "reset":
            connection.send((as_observation(stock.reset_pure(*message[1:]), prompt), False))
        else:
            sensors, _, done, _ = stock.control.step(message[1].astype(np.float64))
            connection.send((as_observation(sensors, prompt), bool(done)))
    os._exit(0)


def lockstep(policy: Policy, keys: Sequence[EpisodeKey], max_steps: int, size: int) -> tuple[Results, float, float]:
    os.environ.update(worker_environment())
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_vector_worker, args=(theirs, keys[0].suite, keys[0].task), daemon=True)
        for _, theirs in pairs
    ]
    for process in processes:
        process.start()
    environments = [ours for ours, _ in pairs]
    assert all(environment.recv() == "ready" for environment in environments)

    def work() -> Results:
        results: Results = {}
        for first in range(0, len(keys), size):
            batch = keys[first : first + size]
            for environment, key in zip(environments, batch, strict=False):
                environment.send(("reset", key.init, key.seed))
            seen = [environment.recv()[0] for environment, _ in zip(environments, batch, strict=False)]
            executed: list[list[np.ndarray]] = [[] for _ in batch]
            done = [False] * len(batch)
            plans: np.ndarray = np.empty(0)
            for step in range(max_steps):
                if step % REPLAN == 0:
                    noise = np.stack([call_noise(key, step // REPLAN, policy.noise_shape) for key in batch])
                    plans = infer(policy, seen, noise)
                going = [index for index in range(len(batch)) if not done[index]]
                if not going:
                    break
                for index in going:
                    environments[index].send(("step", plans[index, step % REPLAN]))
                for index in going:
                    seen[index], done[index] = environments[index].recv()
                    executed[index].append(plans[index, step % REPLAN])
            for index, key in enumerate(batch):
                results[key] = (done[index], len(executed[index]), action_digest(np.stack(executed[index])))
        return results

    outcome = timed(work, [process.pid for process in processes])
    for environment, process in zip(environments, processes, strict=True):
        environment.send(None)
        process.join()
    return outcome


def engine(
    policy: Policy, keys: Sequence[EpisodeKey], max_steps: int, workers: int
) -> tuple[Results, float, float, dict[str, float]]:
    """The engine's outcome, and where its workers' time went: ms of simulation, rendering, policy and transport."""
    records = []
    with SimulatorPool(workers) as pool:
        _build_scenes(pool, keys[0])
        transport_ms = _transport_ms(pool, keys[0])
        plan = [PlannedEpisode("baseline", key) for key in keys]
        settings = RolloutSettings("pure", max_steps, REPLAN, 0)

        def work() -> Results:
            run_episodes(plan, {"baseline": policy}, pool, settings, lambda record, _: records.append(record))
            return {r.key: (r.outcome == "success", r.steps, r.action_digest) for r in records}

        results, wall, cpu = timed(work, pool.pids())
    spent = {
        "rendering": sum(record.render_ms for record in records),
        "simulation": sum(record.sim_ms for record in records),
        "policy": sum(sum(record.policy_ms) for record in records),
        "transport": transport_ms * sum(record.replans for record in records),
    }
    return results, wall, cpu, spent


def _build_scenes(pool: SimulatorPool, key: EpisodeKey) -> None:
    for worker in range(pool.workers):
        pool.start(worker, Assignment(key, "pure", 1))
    unfinished = pool.workers
    while unfinished:
        for event in pool.wait(600.0):
            if isinstance(event, Observed):
                pool.act(event.worker, np.zeros((1, 7)))
            else:
                assert isinstance(event, Finished), event
                unfinished -= 1


def _transport_ms(pool: SimulatorPool, key: EpisodeKey) -> float:
    """Median cost of one exchange with an otherwise idle worker beyond its own work: sockets, frames, wake-ups."""
    pool.start(0, Assignment(key, "pure", 1000))
    (event,) = pool.wait(600.0)
    costs = []
    for _ in range(30):
        busy, started = event.sim_ms + event.render_ms, time.perf_counter()
        pool.act(0, np.array([suites.SETTLE_ACTION]))
        (event,) = pool.wait(600.0)
        costs.append((time.perf_counter() - started) * 1e3 - (event.sim_ms + event.render_ms - busy))
    return statistics.median(costs)


def step_costs(key: EpisodeKey, steps: int = 200) -> dict[str, float]:
    """CPU ms per control step: MuJoCo's 25 substeps that nobody can do without, the solver's warm start as robosuite
    has it, the controller, and the rest (success predicate, loop)."""
    import mujoco

    from qlibero.sim import scene as scene_module
    from qlibero.sim.scene import Scene

    scene = Scene(key.suite, key.task)
    scene.reset(key.init, key.seed)
    actions = np.random.RandomState(0).uniform(-0.4, 0.4, (steps, 7))
    spent = {"controller": 0.0, "warm start": 0.0}

    def stopwatch(function: Callable, name: str) -> Callable:
        def wrapped(*arguments: Any) -> None:
            started = time.process_time()
            function(*arguments)
            spent[name] += time.process_time() - started

        return wrapped

    solve = scene_module._solve
    scene_module._solve = stopwatch(solve, "warm start")
    scene._control.substep = stopwatch(scene._control.substep, "controller")
    scene._first_substep = stopwatch(scene._first_substep, "controller")
    started = time.process_time()
    for action in actions:
        scene.step(action)
    total = time.process_time() - started
    scene_module._solve = solve
    model, data = scene.env.sim.model._model, scene.env.sim.data._data
    scene.reset(key.init, key.seed)
    started = time.process_time()
    for _ in range(25 * steps):
        mujoco.mj_step1(model, data)
        mujoco.mj_step2(model, data)
    physics = time.process_time() - started
    scene.close()
    rest = max(0.0, total - physics - sum(spent.values()))
    costs = {"physics": physics, **spent, "rest of the step": rest}
    return {name: seconds / steps * 1e3 for name, seconds in costs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=4, help="initial states 0 to N-1")
    parser.add_argument("--max-steps", type=int, help="default: the suite's cap")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--policy", type=Path, default=ROOT / "configs/policies/embedded.yaml")
    arguments = parser.parse_args()

    import torch

    from qlibero.policies.load import load_policy

    torch.set_num_threads(1)
    experiment = load_experiment(arguments.policy, [f"suite={arguments.suite}", "backends=[baseline]"])
    policy = load_policy(experiment.policy)
    max_steps = arguments.max_steps or suites.get_suite(arguments.suite).max_steps
    keys = [EpisodeKey(arguments.suite, arguments.task, init, 7) for init in range(arguments.episodes)]

    ours, wall_c, cpu_c, spent = engine(policy, keys, max_steps, arguments.workers)
    say(f"engine: {wall_c:.0f} s wall, {cpu_c:.0f} s CPU")
    costs = step_costs(keys[0])
    vector, wall_b, cpu_b = lockstep(policy, keys, max_steps, arguments.workers)
    say(f"lock step: {wall_b:.0f} s wall, {cpu_b:.0f} s CPU")
    plain, wall_a, cpu_a = sequential(policy, keys, max_steps)
    say(f"sequential: {wall_a:.0f} s wall, {cpu_a:.0f} s CPU")
    if not ours == vector == plain:
        raise SystemExit(f"episodes differ:\n{ours}\n{vector}\n{plain}")

    steps = sum(row[1] for row in ours.values())
    rows = {}
    for name, wall, cpu in (("sequential", wall_a, cpu_a), ("lockstep", wall_b, cpu_b), ("engine", wall_c, cpu_c)):
        rows[name] = {
            "episodes_per_hour": round(len(keys) / wall * 3600, 1),
            "wall_s": round(wall, 1),
            "cpu_s": round(cpu, 1),
            "cpu_ms_per_step": round(cpu / steps * 1e3, 1),
            "engine_is_faster_wall": round(wall / wall_c, 2),
            "engine_is_faster_cpu": round(cpu / cpu_c, 2),
        }
    in_step = sum(costs.values())
    parts = {name: spent["simulation"] * ms / in_step for name, ms in costs.items()}
    parts |= {name: spent[name] for name in ("rendering", "policy", "transport")}
    total = sum(parts.values())
    physics_s = steps * costs["physics"] / 1e3
    document = {
        "suite": arguments.suite,
        "task": arguments.task,
        "episodes": len(keys),
        "steps": steps,
        "successes": sum(row[0] for row in ours.values()),
        "workers": arguments.workers,
        "policy": policy.name,
        "identical": True,
        "loops": rows,
        "shares": {name: round(ms / total, 3) for name, ms in parts.items()},
        "step_cpu_ms": {name: round(ms, 2) for name, ms in costs.items()},
        "physics_only_cpu_s": round(physics_s, 2),
        "engine_over_physics_only": round(cpu_c / physics_s, 1),
        "load_average": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }
    say(f"\n{len(keys)} episodes, {steps} steps, equal in all three loops")
    for name, row in rows.items():
        say(
            f"{name:11s} {row['episodes_per_hour']:8.1f} episodes/h  {row['cpu_ms_per_step']:7.1f} CPU ms/step   "
            f"engine is {row['engine_is_faster_wall']:.2f}x faster (wall), {row['engine_is_faster_cpu']:.2f}x (CPU)"
        )
    say("engine's time: " + ", ".join(f"{name} {100 * ms / total:.0f} %" for name, ms in parts.items()))
    say(
        f"bare physics of these steps: {physics_s:.1f} CPU s; the engine, with resets, settling, frames and policy, "
        f"takes {cpu_c / physics_s:.1f} times that"
    )
    print(json.dumps(document))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
