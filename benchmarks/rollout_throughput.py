"""Episodes per hour of a whole run: the engine, real LIBERO simulators and policies of embedded and of full size.

    python benchmarks/rollout_throughput.py                               # 16 cores and an H100: three minutes
    python benchmarks/rollout_throughput.py --rows none:2,embedded:2:1,bf16:16:8 --seconds 20

Each row is one policy over the first so many of the same simulator processes, at one batch size (POLICY:WORKERS:BATCH),
in a window of `--seconds` after everything runs:
`none` (random actions at once: what simulators and renderer do alone), `embedded` (the policy of this repository),
`bf16` and `w4a8` (full-size pi0.5 of random weights on a GPU; elsewhere a reduced one). Random weights never succeed,
so episodes end at a cap drawn evenly from half to one and a half times `--mean-steps` (130 is what the embedded
policy's successes take on libero_object), and resets come spread out as in a run. Episodes per hour are steps per
second over that mean.

`GPU busy` is the time of the policy's phases over wall time (rendering on the same GPU makes phases longer), beside
what the driver reports for the whole card. Tables on stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
from policy_latency import REDUCED, random_artifact, random_model

from qlibero.config.load import load_experiment
from qlibero.episode_key import EpisodeKey
from qlibero.machine.environment import simulator_environment
from qlibero.policies import load_policy
from qlibero.policies.base import Chunk, Observation, Policy
from qlibero.policies.pi05.config import PI05_FULL
from qlibero.policies.pi05.normalize import Statistics
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.apply import quantize_policy
from qlibero.run.episode import PlannedEpisode
from qlibero.run.noise import call_noise
from qlibero.run.rollout import RolloutSettings, run_episodes
from qlibero.sim.pool import Assignment, Died, Event, Finished, Observed, SimulatorPool
from qlibero.sim.suites import task_language

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
TICKS = os.sysconf("SC_CLK_TCK")
REPLAN = 5
SHA256 = "0" * 64  # of weights that are in no file
COLUMNS = ("policy", "workers", "batch", "episodes/h", "steps/s", "calls/s", "rows/call", "GPU busy", "card busy %",
           "simulator cores", "main core", "ms/call")  # fmt: skip


class Over(Exception):
    """The window has closed."""


class Nothing:
    """No policy: small random actions, at once."""

    name, noise_shape, batch_size = "none", (10, 32), 64

    def infer(self, observations: Sequence[Observation], noise: np.ndarray) -> Chunk:
        return Chunk(np.clip(noise[:, :, :7] * 0.3, -1, 1).astype(np.float32), {})


class Counted:
    """A policy as the engine sees it, and how long its calls took."""

    def __init__(self, policy: Any, counts: Counter[str]):
        self.policy, self.counts = policy, counts
        self.name, self.noise_shape, self.batch_size = policy.name, policy.noise_shape, policy.batch_size
        self.frame_format = getattr(policy, "frame_format", None)
        if hasattr(policy, "begin"):
            self.begin = self._begin

    def infer(self, observations: Sequence[Observation], noise: np.ndarray) -> Chunk:
        started = time.perf_counter()
        chunk = self.policy.infer(observations, noise)
        self.counts["policy_s"] += time.perf_counter() - started
        return self._count(len(observations), chunk)

    def _begin(self, observations: Sequence[Observation], noise: np.ndarray) -> Any:
        started = time.perf_counter()
        begun = self.policy.begin(observations, noise)
        self.counts["policy_s"] += time.perf_counter() - started
        return Begun(begun, self, len(observations))

    def _count(self, rows: int, chunk: Chunk) -> Chunk:
        self.counts["calls"] += 1
        self.counts["rows"] += rows
        for phase, ms in chunk.phases_ms.items():
            self.counts[f"ms {phase}"] += ms
        return chunk


class Begun:
    """A call under way, and the time that collecting it takes."""

    def __init__(self, begun: Any, counted: Counted, rows: int):
        self.begun, self.counted, self.rows, self.ready = begun, counted, rows, begun.ready

    def chunk(self) -> Chunk:
        started = time.perf_counter()
        chunk = self.begun.chunk()
        self.counted.counts["policy_s"] += time.perf_counter() - started
        return self.counted._count(self.rows, chunk)


class Window:
    """The first workers of a pool, as the engine sees a pool: counts what passes between two moments, then ends it."""

    def __init__(self, pool: SimulatorPool, workers: int, mean_steps: int, settle_s: float, seconds: float):
        self.pool, self.workers, self.mean_steps = pool, workers, mean_steps
        self.settle_s, self.seconds = settle_s, seconds
        self.counts: Counter[str] = Counter()
        self.asked: set[int] = set()  # workers that owe an answer
        self.before = {worker: (0, 0.0, 0.0) for worker in range(workers)}
        self.caps = np.random.default_rng(0)
        self.seen: set[int] = set()
        self.began: float | None = None
        self.opened: tuple[float, Counter[str]] | None = None
        self.closed: tuple[float, Counter[str]] | None = None

    def start(self, worker: int, assignment: Assignment) -> None:
        cap = int(self.caps.integers(self.mean_steps // 2, self.mean_steps + self.mean_steps // 2 + 1))
        self.asked.add(worker)
        self.before[worker] = (0, 0.0, 0.0)
        self.pool.start(worker, replace(assignment, max_steps=cap))

    def act(self, worker: int, actions: np.ndarray) -> None:
        self.asked.add(worker)
        started = time.perf_counter()
        self.pool.act(worker, actions)
        self.counts["sending_s"] += time.perf_counter() - started

    def wait(self, timeout_s: float) -> list[Event]:
        self._look_at_the_clock()
        started = time.perf_counter()
        events = self.pool.wait(timeout_s)
        self.counts["waiting_s"] += time.perf_counter() - started
        for event in events:
            self._count(event)
        return events

    def _count(self, event: Event) -> None:
        self.asked.discard(event.worker)
        self.seen.add(event.worker)
        if isinstance(event, Died):
            self.counts["died"] += 1
            say(f"worker {event.worker} died: {event.reason}")
            return
        steps = event.step if isinstance(event, Observed) else event.steps
        now, last = (steps, event.sim_ms, event.render_ms), self.before[event.worker]
        for name, new, old in zip(("steps", "stepping_ms", "rendering_ms"), now, last, strict=True):
            self.counts[name] += new - old
        self.before[event.worker] = now
        self.counts["episodes"] += isinstance(event, Finished)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self.began is None:
            self.began = now if len(self.seen) == self.workers else None
        elif self.opened is None:
            if now >= self.began + self.settle_s:
                self.opened = self._now()
        elif now >= self.opened[0] + self.seconds:
            self.closed = self._now()
            raise Over

    def _now(self) -> tuple[float, Counter[str]]:
        counts = Counter(self.counts)
        counts["simulators_cpu_s"] = sum(map(cpu_s, self.pool.pids()[: self.workers]))
        counts["main_cpu_s"] = cpu_s(os.getpid())
        return time.monotonic(), counts

    def drain(self) -> None:
        """Hear the last answers, so that the next row starts with workers at rest."""
        until = time.monotonic() + 120
        while self.asked and time.monotonic() < until:
            for event in self.pool.wait(1.0):
                self.asked.discard(event.worker)


class Card:
    """What the driver says of the GPU, sampled beside the run."""

    def __init__(self) -> None:
        self.file = tempfile.NamedTemporaryFile("w+")
        command = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "-lms",
            "200",
            "-i",
            "0",
        ]
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.DEVNULL) if CUDA else None

    def position(self) -> int:
        return os.path.getsize(self.file.name)

    def mean_since(self, position: int) -> float | None:
        """Mean utilisation in % of the samples after `position`."""
        with open(self.file.name) as file:
            file.seek(position)
            found = [float(line) for line in file.read().splitlines() if line.strip().isdigit()]
        return round(sum(found) / len(found), 1) if found else None

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(name: str, policy: Any, window: Window, card: Card, suite: str, task: int) -> dict[str, Any]:
    """One row: run the engine until the window closes."""
    counted = Counted(policy, window.counts)
    plan = [PlannedEpisode(name, EpisodeKey(suite, task, i % 50, 1000 + i // 50)) for i in range(20_000)]
    settings = RolloutSettings("pure", 2 * window.mean_steps, REPLAN, 0)
    position = card.position()
    try:
        run_episodes(plan, {name: counted}, window, settings, lambda record, trajectory: None)
    except Over:
        pass
    used = card.mean_since(position)
    window.drain()
    (opened, before), (closed, after) = window.opened, window.closed
    wall, c = closed - opened, after - before
    calls = max(1, c["calls"])
    on_gpu = sum(c[f"ms {phase}"] for phase in ("vision", "prefix", "flow")) / 1e3
    steps_s = c["steps"] / wall
    return {
        "policy": name,
        "workers": window.workers,
        "batch": policy.batch_size,
        "episodes_per_hour": round(steps_s / window.mean_steps * 3600),
        "steps_s": round(steps_s, 1),
        "calls_s": round(c["calls"] / wall, 2),
        "rows_per_call": round(c["rows"] / calls, 2),
        "gpu_busy": round(on_gpu / wall, 3) if CUDA and on_gpu else None,
        "card_busy_percent": used,
        "simulator_cores": round(c["simulators_cpu_s"] / wall, 2),
        "main_core": round(c["main_cpu_s"] / wall, 2),
        "ms_per_call": {
            phase.removeprefix("ms "): round(ms / calls, 2) for phase, ms in c.items() if phase.startswith("ms ")
        },
        "main_thread": {
            "policy": round(c["policy_s"] / wall, 3),
            "waiting for simulators": round(c["waiting_s"] / wall, 3),
            "sending": round(c["sending_s"] / wall, 3),
        },
        "worker": {
            "stepping": round(c["stepping_ms"] / 1e3 / wall / window.workers, 3),
            "rendering": round(c["rendering_ms"] / 1e3 / wall / window.workers, 3),
            "cpu_ms_per_step": round(c["simulators_cpu_s"] / max(1, c["steps"]) * 1e3, 2),
        },
        "episodes_finished": c["episodes"],
        "died": c["died"],
        "seconds": round(wall, 2),
    }


# ----------------------------------------------------------------------------------------------------- the policies
def full_size(suite: str, w4a8: str | None, folder: Path) -> dict[str, Pi05Policy]:
    """`bf16` and, by METHOD/BACKEND, `w4a8` around the same random weights; reduced and in float32 without a GPU."""
    device = torch.device("cuda" if CUDA else "cpu")
    config, dtype = (PI05_FULL, torch.bfloat16) if CUDA else (REDUCED, torch.float32)
    words = sorted({word for task in range(10) for word in split_words(task_language(suite, task))})
    statistics = {
        name: Statistics("quantile", -np.full(n, most), np.full(n, most), 1e-6, 1e-6)
        for name, n, most in (("state", 8, 1.0), ("actions", 7, 0.3))
    }
    full = Pi05Policy(
        "random",
        random_model(config, device, dtype),
        PROFILES["openpi"],
        statistics,
        WordTokenizer(words),
        batch_size=1,
        flow_steps=10,
        identity={"sha256": SHA256},
    )
    made = {"bf16": full}
    if w4a8:
        method, backend = w4a8.split("/")
        artifact = random_artifact(config, "llm", device, folder / "random.safetensors", method)
        made["w4a8"] = quantize_policy(full, artifact, backend)
    return made


def embedded(suite: str) -> Policy:
    return load_policy(
        load_experiment(ROOT / "configs/policies/embedded.yaml", [f"suite={suite}", "backends=[baseline]"]).policy
    )


def warm_up(policy: Any, prompt: str) -> None:
    """Compile and capture what the row will use."""
    for observation in policy.warmup_observations([prompt]):
        for call in range(3):
            noise = call_noise(EpisodeKey("warmup", 0, 0, 7), call, policy.noise_shape)
            policy.infer([observation], noise[None])


# ------------------------------------------------------------------------------------------------------- simulators
def build_scenes(pool: SimulatorPool, suite: str, task: int) -> None:
    """Ask every worker for an episode of one step; `finish_scenes` hears the answers."""
    for worker in range(pool.workers):
        pool.start(worker, Assignment(EpisodeKey(suite, task, worker % 50, 1), "pure", 1))


def finish_scenes(pool: SimulatorPool) -> dict[str, float]:
    """Wait for all; their memory in MiB."""
    unfinished = pool.workers
    while unfinished:
        for event in pool.wait(600.0):
            if isinstance(event, Observed):
                pool.act(event.worker, np.zeros((1, 7)))
            elif isinstance(event, Finished):
                unfinished -= 1
            else:
                raise SystemExit(f"a simulator died: {event.reason}")
    sizes = [resident_mib(pid) for pid in pool.pids()]
    return {"mean": round(sum(sizes) / len(sizes)), "most": round(max(sizes))}


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def default_rows(cores: int) -> str:
    if not CUDA:
        return f"none:1,none:{cores},embedded:1:1,embedded:{cores}:1"
    full = ",".join(f"{kind}:{workers}:8" for kind in ("bf16", "w4a8") for workers in (cores, 2 * cores))
    return f"none:{cores},none:{2 * cores},embedded:{2 * cores}:8,{full}"


def read_row(text: str) -> tuple[str, int, int]:
    kind, *numbers = text.split(":")
    if kind not in ("none", "embedded", "bf16", "w4a8") or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"{text!r} is no row; write none:WORKERS, or embedded, bf16 or w4a8:WORKERS:BATCH")
    if len(numbers) != (1 if kind == "none" else 2):
        raise ValueError(f"{text!r} needs {'WORKERS' if kind == 'none' else 'WORKERS:BATCH'}")
    return kind, int(numbers[0]), int(numbers[-1]) if kind != "none" else Nothing.batch_size


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--rows", default=default_rows(cores), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--w4a8",
        default="smooth_hadamard/cuda_w4a8" if CUDA else "smooth_hadamard/cpu_int4",
        help="METHOD/BACKEND of the rows w4a8 (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row's window (default: %(default)g)")
    parser.add_argument("--settle", type=float, default=3.0, help="before each window (default: %(default)g)")
    parser.add_argument("--mean-steps", type=int, default=130, help="of an episode (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="begin no row after so many seconds")
    parser.add_argument("--json", type=Path, help="also write the document here, after every row")
    arguments = parser.parse_args()
    try:
        rows = [read_row(text) for text in arguments.rows.split(",")]
    except ValueError as problem:
        parser.error(f"--rows: {problem}")
    kinds = list(dict.fromkeys(kind for kind, _, _ in rows))

    started = time.monotonic()
    torch.set_num_threads(1)
    card = Card()
    document: dict[str, Any] = {
        "benchmark": "rollout_throughput",
        "suite": arguments.suite,
        "task": arguments.task,
        "mean_steps": arguments.mean_steps,
        "cores": cores,
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "torch": torch.__version__,
        "rows": [],
    }
    most = max(workers for _, workers, _ in rows)
    with SimulatorPool(most, environment=simulator_environment()) as pool, tempfile.TemporaryDirectory() as tmp:
        build_scenes(pool, arguments.suite, arguments.task)  # while policies load
        policies: dict[str, Any] = {"none": Nothing()} if "none" in kinds else {}
        if {"bf16", "w4a8"} & set(kinds):
            made = full_size(arguments.suite, arguments.w4a8 if "w4a8" in kinds else None, Path(tmp))
            policies |= {kind: made[kind] for kind in ("bf16", "w4a8") if kind in kinds}
        if "embedded" in kinds:
            policies["embedded"] = embedded(arguments.suite)
        document["policies_s"] = round(time.monotonic() - started, 1)
        document["worker_mib"] = finish_scenes(pool)
        document["start_s"] = round(time.monotonic() - started, 1)
        say(f"policies after {document['policies_s']} s, {pool.workers} simulators after {document['start_s']} s, "
            f"{document['worker_mib']['mean']} MiB each")  # fmt: skip
        show(COLUMNS)
        show("---" for _ in COLUMNS)
        for kind, workers, batch in rows:
            if time.monotonic() - started > arguments.deadline:
                say(f"deadline: no row for {kind}, {workers} workers, batch {batch}")
                continue
            policy = policies[kind]
            if kind != "none":
                policy = policy.with_batch_size(batch)
                warm_up(policy, task_language(arguments.suite, arguments.task))
            window = Window(pool, workers, arguments.mean_steps, arguments.settle, arguments.seconds)
            document["rows"].append(measure(kind, policy, window, card, arguments.suite, arguments.task))
            show_row(document["rows"][-1])
            if arguments.json:
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    card.close()
    print(json.dumps(document))


def show_row(row: dict[str, Any]) -> None:
    keys = ("policy", "workers", "batch", "episodes_per_hour", "steps_s", "calls_s", "rows_per_call", "gpu_busy",
            "card_busy_percent", "simulator_cores", "main_core")  # fmt: skip
    phases = " + ".join(f"{name} {ms:g}" for name, ms in row["ms_per_call"].items())
    show([*("–" if row[key] is None else row[key] for key in keys), phases or "–"])
    for who in ("main_thread", "worker"):
        say(f"    {who.replace('_', ' ')}: " + ", ".join(f"{name} {value:g}" for name, value in row[who].items()))


def show(cells: Any) -> None:
    say(f"| {' | '.join(map(str, cells))} |")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
