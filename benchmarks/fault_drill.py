"""Does anything get lost, doubled or changed when things break? A real LIBERO sweep, hurt a hundred times.

    python benchmarks/fault_drill.py [--faults 100] [--out logs/fault_drill] [--seed 0]
    python benchmarks/fault_drill.py --quota "Slurm node killed=6" --out DIR      only what is named

First the sweep runs undisturbed. Then it is run again and again, each time hurt at random moments until it is done, on
the local engine and, where Slurm is installed, on a real two-node Slurm; at last the same command is given once more,
in peace. At the end of every round the record sets must *equal* the undisturbed run's (keys, outcomes, steps,
fingerprints, action digests), the verdict must be the same, wandb's offline files must hold every row once, no log may
show a defect, and no process may be left. Stopped itself, the drill continues where it was.

A fault is counted only when it hit something: a living process of the run, the last complete line of a ledger, a write
that failed. So that work goes on between the blows, few of those that undo it may fall before another episode is
finished. Needs root (a small disk to fill is mounted); the last lines it prints are the table in docs/clusters.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from qlibero.results.compare import compare_runs  # noqa: E402
from qlibero.results.ledger import arms_of, read_arm, read_ledger  # noqa: E402

MARK = "QLIBERO_DRILL"  # in the environment of everything the drill starts: how it finds its own processes
DISK_MB = 96
A_ROUND = 25  # faults at most, then it is left to finish
HANG_S = 600  # without a new episode for so long, something hangs
IDLE_ROUNDS = 4  # without a single fault: the kinds that are left never find their moment
CONFIG = """
extends: {repository}/configs/policies/untrained.yaml
policy: {{flow_steps: 2, replan_steps: 10}}
suite: libero_object
tasks: {tasks}
episodes_per_task: {episodes}
max_steps: 20
videos: 0
workers: {workers}
quant: {{method: rtn, layout: llm}}
backends: [baseline, fake]
grid: {{seed: {seeds}}}
tracking: [wandb]
launch:
  shard_episodes: {shard}
  slurm: {{partition: gpu, cpus_per_task: 4, time: "02:00:00"}}
"""
WORKER_KILLED, WORKER_STOPPED = "simulator worker killed", "simulator worker stopped (SIGSTOP)"
POLICY_KILLED, LAUNCHER_KILLED = "policy process killed", "launcher killed"
SERVICE_KILLED, MIRROR_KILLED = "wandb service process killed", "wandb mirror killed"
TORN, FULL, FLIPPED = "ledger tail torn", "disk full", "artifact byte flipped"
SLURMD, TASK, NODE = "slurmd killed", "Slurm task killed", "Slurm node killed"
QUOTA = {
    WORKER_KILLED: 30,
    WORKER_STOPPED: 2,
    POLICY_KILLED: 6,
    LAUNCHER_KILLED: 6,
    SERVICE_KILLED: 14,
    MIRROR_KILLED: 5,
    TORN: 9,
    FULL: 4,
    FLIPPED: 3,
    SLURMD: 14,
    TASK: 4,
    NODE: 3,
}
# Kinds after which work has to start anew: {kind: blows of its sort that may fall before another episode is finished}
WITHOUT_PROGRESS = {POLICY_KILLED: 1, LAUNCHER_KILLED: 1, FULL: 1, TASK: 1, NODE: 1, WORKER_KILLED: 2}
ON_SLURM = (SLURMD, TASK, NODE)
PROCESS = {
    WORKER_KILLED: "qlibero.sim.worker",
    WORKER_STOPPED: "qlibero.sim.worker",
    POLICY_KILLED: "qlibero.cli run-shard",
    SERVICE_KILLED: "wandb-core",
    MIRROR_KILLED: "qlibero.tracking.wandb_mirror",
}
SHARD = "--index"  # on the command line of a shard, and of nothing else


class Drill:
    """`quota`: how often which kind; `tasks`, `episodes` of each and `seeds` size the sweep that is hurt."""

    def __init__(self, out: Path, quota: dict[str, int], seed: int = 0, tasks=(0, 3), episodes: int = 4, seeds=(7, 8)):
        self.out, self.quota = out.resolve(), Counter(quota)
        self.disk = self.out / "disk"
        self.disk.mkdir(parents=True, exist_ok=True)
        self.faults_path, self.rounds_path = self.out / "faults.jsonl", self.out / "rounds.json"
        self.rounds = json.loads(self.rounds_path.read_text()) if self.rounds_path.exists() else []
        # faults of a round count when the round has been examined, or when it is still there to be continued
        counted = {r["round"] for r in self.rounds} | {
            path.name for path in (*self.out.glob("round-*"), *self.disk.glob("round-*"))
        }
        noted = (
            [json.loads(line) for line in self.faults_path.read_text().splitlines()]
            if self.faults_path.exists()
            else []
        )
        self.injected = Counter(fault["kind"] for fault in noted if fault["round"] in counted)
        self.rng = random.Random(f"{seed}/{sum(self.injected.values())}")
        self.environment = dict(os.environ, **{MARK: str(self.out), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"})
        self.configs = {}
        # on the local engine a cell is one shard, which has a mirror; on Slurm a cell is two shards, one fills a node
        for engine, workers, shard in (("local", 2, 100), ("slurm", 1, len(tasks) * episodes // 2)):
            self.configs[engine] = self.out / f"drill-{engine}.yaml"
            self.configs[engine].write_text(
                CONFIG.format(
                    repository=REPOSITORY,
                    tasks=list(tasks),
                    episodes=episodes,
                    seeds=list(seeds),
                    workers=workers,
                    shard=max(1, shard),
                )
            )
        self.begin_round()

    def begin_round(self) -> None:
        self.round = f"round-{len(self.rounds) + 1:02d}"
        self.log = self.out / f"{self.round}.log"
        self.started = self.moved = time.monotonic()
        self.faults = self.finished = 0
        self.blows: Counter[bool] = Counter()  # since then, by whether a simulator was hit or more
        self.stopped = 0

    # ------------------------------------------------------------------------------------------------ the rounds
    def run(self) -> bool:
        """All rounds; True when every fault was injected. Raises SystemExit at the first claim that does not hold."""
        for pid in self.processes(""):  # of a drill that was stopped
            send(pid, signal.SIGKILL)
        self.undisturbed()
        slurm = self.slurm_ready()
        while True:
            self.begin_round()
            local = any(self.remaining(kind) for kind in self.quota if kind not in ON_SLURM)
            of_slurm = not local and slurm and any(self.remaining(kind) for kind in ON_SLURM)
            if not local and not of_slurm:
                break
            before = sum(r["faults"] for r in self.rounds)
            found = self.slurm_round() if of_slurm else self.local_round()
            faults, minutes = sum(self.injected.values()) - before, (time.monotonic() - self.started) / 60
            self.rounds.append(
                {
                    "round": self.round,
                    "engine": "slurm" if of_slurm else "local",
                    "faults": faults,
                    **found,
                    "minutes": round(minutes, 1),
                }
            )
            self.rounds_path.write_text(json.dumps(self.rounds, indent=1))
            say(json.dumps(self.rounds[-1]))
            if not any(r["faults"] for r in self.rounds[-IDLE_ROUNDS:]) and len(self.rounds) >= IDLE_ROUNDS:
                left = [kind for kind in self.quota if self.quota[kind] > self.injected[kind]]
                raise SystemExit(f"{IDLE_ROUNDS} rounds without an occasion for: {', '.join(left)}")
        self.report()
        return self.injected.total() >= self.quota.total()

    def undisturbed(self) -> None:
        say("undisturbed run")
        self.reference = self.out / "reference"
        self.log = self.out / "reference.log"
        if self.artifact() and (self.out / "artifact").exists():  # stopped while a byte was flipped
            shutil.copyfile(self.out / "artifact", self.artifact())
        if self.sweep(self.reference, "local").wait():
            raise SystemExit(f"the undisturbed run failed, see {self.log}")
        shutil.copyfile(self.artifact(), self.out / "artifact")
        self.expected, self.verdicts = record_sets(self.reference), verdicts(self.reference)
        say(f"{sum(map(len, self.expected.values()))} episodes in {len(self.expected)} arms")

    def local_round(self) -> dict:
        with SmallDisk(self.disk) if self.quota[FULL] else nullcontext(self.disk) as disk:
            out, launcher = disk / self.round, None
            while True:
                if launcher is None or launcher.poll() is not None:
                    self.wait_for_quiet()
                    self.watch(out)
                    self.tear_a_tail(out)
                    if complete(out):
                        break
                    self.flip_a_byte(out)
                    launcher = self.sweep(out, "local")
                self.wait_a_while()
                self.watch(out)
                victims = self.victims(launcher, out)
                if kind := self.choose(victims):
                    self.strike(kind, self.rng.choice(victims[kind]), launcher, out)
            found = self.examine(out, "local")
            shutil.copytree(out, self.out / self.round, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(out)
        return found

    def slurm_round(self) -> dict:
        import slurm_cluster

        out = self.out / self.round
        with (
            tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as directory,
            slurm_cluster.slurm(Path(directory)) as cluster,
        ):
            self.environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
            try:
                while not complete(out):
                    if self.sweep(out, "slurm").wait():
                        raise SystemExit(f"{self.round}: could not be submitted, see {self.log}")
                    while slurm_cluster.queue():
                        time.sleep(self.rng.uniform(3.0, 8.0))
                        self.watch(out)
                        shards = self.processes(SHARD)
                        if kind := self.choose({kind: shards for kind in ON_SLURM}):
                            self.strike_slurm(kind, self.rng.choice(shards), cluster)
                found = self.examine(out, "slurm")
            except BaseException:  # the cluster is gone with this block; what it said is all there is to go by
                self.keep_slurms_word(cluster)
                raise
            del self.environment["SLURM_CONF"]
        return found

    def keep_slurms_word(self, cluster: Path) -> None:
        """The daemons' logs and the controller's view of jobs and nodes, into ROUND-slurm."""
        kept = self.out / f"{self.round}-slurm"
        shutil.copytree(cluster / "log", kept, dirs_exist_ok=True)
        for name in ("job", "node"):
            shown = subprocess.run(["scontrol", "show", name], capture_output=True, text=True, timeout=30)
            (kept / f"{name}s.txt").write_text(shown.stdout + shown.stderr)
        say(f"     Slurm's logs: {kept}")

    # ------------------------------------------------------------------------------------------------ the faults
    def wait_a_while(self) -> None:
        """2 to 6 s, or until wandb's service is there: where nothing disturbs it, it lives less than two seconds."""
        until = time.monotonic() + self.rng.uniform(2.0, 6.0)
        while time.monotonic() < until:
            if self.remaining(SERVICE_KILLED) and self.processes(PROCESS[SERVICE_KILLED]):
                time.sleep(self.rng.uniform(0.0, 0.3))
                return
            time.sleep(0.05)

    def victims(self, launcher: subprocess.Popen, out: Path) -> dict[str, list[int]]:
        """Per kind the processes that can be hit right now. Nothing that would end a stopped worker before the run
        has noticed that it hangs."""
        found = {kind: self.processes(pattern) for kind, pattern in PROCESS.items()}
        found[POLICY_KILLED] = self.processes(SHARD)
        found[LAUNCHER_KILLED] = found[FULL] = (
            [launcher.pid] if found[WORKER_KILLED] and launcher.poll() is None else []
        )
        found[WORKER_STOPPED] = (
            [pid for pid in found[WORKER_STOPPED] if busy(pid)] if self.remaining(WORKER_STOPPED) else []
        )
        if self.stopped and alive(self.stopped):
            found |= {kind: [] for kind in (POLICY_KILLED, LAUNCHER_KILLED, FULL, WORKER_STOPPED)}
            found[WORKER_KILLED] = [pid for pid in found[WORKER_KILLED] if pid != self.stopped]
        return found

    def choose(self, victims: dict[str, list[int]]) -> str | None:
        def may_fall(kind: str) -> bool:
            return self.blows[kind == WORKER_KILLED] < WITHOUT_PROGRESS.get(kind, self.quota[kind] + 1)

        kinds = [kind for kind, pids in victims.items() if pids and self.remaining(kind) and may_fall(kind)]
        kind = self.rng.choices(kinds, [self.remaining(kind) for kind in kinds])[0] if kinds else None
        self.blows[kind == WORKER_KILLED] += kind in WITHOUT_PROGRESS
        return kind

    def strike(self, kind: str, victim: int, launcher: subprocess.Popen, out: Path) -> None:
        if kind == FULL:
            self.fill_the_disk(launcher, out)
        elif send(victim, signal.SIGSTOP if kind == WORKER_STOPPED else signal.SIGKILL):
            self.note(kind, f"process {victim}")
        if kind == WORKER_STOPPED:
            self.stopped = victim
        if kind == LAUNCHER_KILLED:
            launcher.wait()

    def fill_the_disk(self, launcher: subprocess.Popen, out: Path) -> None:
        """Until a shard has given up because of it, or for 90 s; counted when one has."""

        def complaints() -> int:
            logs = [self.log, *out.glob("sweep/submission-*/logs/*.log")]
            return sum(read(str(path)).count(words) for path in logs for words in (" is full", "No space left"))

        before, deadline, filler = complaints(), time.monotonic() + 90, self.disk / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 65536):
                    pass
            except OSError:
                pass
        try:
            while launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
            if complaints() > before:
                self.note(FULL, f"{filler.stat().st_size >> 20} MB of filler")
            else:
                say(f"     {FULL}: nobody said so, not counted; launcher's status {launcher.poll()}")
        finally:
            filler.unlink()

    def tear_a_tail(self, out: Path) -> None:
        """Cut the last line of a ledger nobody writes to, as a power loss may. Also after the last episode."""
        whole = [path for path in sorted(out.glob("*/*/episodes-*.jsonl")) if path.read_bytes().endswith(b"\n")]
        if whole and self.remaining(TORN) and self.rng.random() < 0.7:
            path = self.rng.choice(whole)
            cut = self.rng.randrange(1, len(path.read_bytes().splitlines(keepends=True)[-1]))
            os.truncate(path, path.stat().st_size - cut)
            self.note(TORN, f"{cut} bytes off {path.relative_to(out)}")

    def flip_a_byte(self, out: Path) -> None:
        """A sweep with a corrupted artifact must be refused, without a new record of the arm that needs it."""

        def of_fake() -> dict[Path, bytes]:
            return {path: data for path, data in contents(out).items() if path.parent.name == "fake"}

        done = sum(record.outcome != "error" for cell in cells(out) for record in read_ledger(cell, "fake"))
        if not 0 < done < sum(len(records) for name, records in self.expected.items() if name.endswith("/fake")):
            return  # nobody would load it
        if not self.remaining(FLIPPED):
            return
        path, before = self.artifact(), of_fake()
        byte = self.rng.randrange(path.stat().st_size)
        said = len(read(str(self.log)))
        self.note(FLIPPED, f"byte {byte} of {path.name}")
        flip(path, byte)
        try:
            status = self.sweep(out, "local").wait()
        finally:
            flip(path, byte)
        refused = [
            line
            for line in read(str(self.log))[said:].splitlines()
            if "ended with status 3" in line and path.name in line
        ]
        if status == 0 or of_fake() != before or not refused:
            raise SystemExit(f"{self.round}: a corrupted artifact was not refused: status {status}, see {self.log}")
        say(f"     {refused[0][:160]}")
        self.wait_for_quiet()

    def strike_slurm(self, kind: str, victim: int, cluster: Path) -> None:
        import slurm_cluster

        node = environment(victim).partition("SLURMD_NODENAME=")[2].partition("\0")[0]
        daemon = cluster / f"slurmd.{node}.pid"
        if kind == TASK:
            if send(victim, signal.SIGKILL):
                self.note(kind, f"process {victim}")
            return
        if not node or not slurm_cluster.kill(daemon, signal.SIGKILL):
            return
        if kind == NODE:
            here = [pid for pid in self.processes("") if f"SLURMD_NODENAME={node}\0" in environment(pid)]
            steps = {parent(pid) for pid in here if "slurmstepd" in read(f"/proc/{parent(pid)}/comm")}
            for pid in (*steps, *here):  # the step first: it must not live to report how its task ended
                send(pid, signal.SIGKILL)
            self.note(kind, f"{node} with {len(here)} processes")
        else:
            self.note(kind, node)
        time.sleep(
            35.0 if kind == NODE else 2.0
        )  # Slurm declares it down after 15 s and gives its tasks to the other node
        slurm_cluster.start_node(node)

    # ------------------------------------------------------------------------------------------------ the verdict
    def examine(self, out: Path, engine: str) -> dict:
        """Everything the drill claims, checked; raises SystemExit at the first claim that does not hold."""
        if self.sweep(out, engine).wait():  # the same command, in peace: does what a killed merge has left undone
            raise SystemExit(f"{self.round}: the finished sweep cannot be repeated, see {self.log}")
        orphans = self.wait_for_quiet()
        if orphans:
            raise SystemExit(
                f"{self.round}: processes left behind: {[read(f'/proc/{pid}/cmdline') for pid in orphans]}"
            )
        found = record_sets(out)
        state = [read_arm(cell, arm) for cell in cells(out) for arm in arms_of(cell)]
        for name, records in self.expected.items():
            if found.get(name) != records:
                raise SystemExit(f"{self.round}: the records of {name} differ from the undisturbed run")
        if found.keys() != self.expected.keys() or any(ledger.conflicts for ledger in state):
            raise SystemExit(f"{self.round}: arms {sorted(found)}, conflicts {[ledger.conflicts for ledger in state]}")
        if verdicts(out) != self.verdicts:
            raise SystemExit(f"{self.round}: another verdict than the undisturbed run's")
        logs = [self.log, *out.glob("sweep/submission-*/logs/*.log")]
        if defects := [str(path) for path in logs if "defect of qlibero" in read(str(path))]:
            raise SystemExit(f"{self.round}: a fault showed as a defect in {defects}")
        self.check_wandb(out)
        return {
            "episodes": sum(map(len, found.values())),
            "sweeps": len(list(out.glob("sweep/submission-*"))),
            "superseded": sum(ledger.repeated for ledger in state),
        }

    def check_wandb(self, out: Path) -> None:
        """Every finished episode once in the arm's one offline run, as the sweep has left it."""
        from wandb_offline import read_offline_run

        for cell in cells(out):
            for arm in arms_of(cell):
                runs = [read_offline_run(path) for path in (cell / arm / "wandb").glob("*run-*/*.wandb")]
                rows = [sorted(row["key"] for row in run.history if "key" in row) for run in runs]
                if rows != [sorted(str(record.key) for record in read_ledger(cell, arm))] or not runs[0].finished:
                    raise SystemExit(f"{self.round}: {cell.name}/{arm}: wandb's rows are not the ledger's: {rows}")

    def report(self) -> None:
        episodes, minutes = self.rounds[0]["episodes"], sum(r["minutes"] for r in self.rounds)
        print(
            f"\n{self.injected.total()} faults in {len(self.rounds)} rounds of {episodes} episodes, "
            f"{minutes:.0f} minutes\n"
        )
        print("| fault | injected |\n|---|---|")
        for kind in self.quota:
            print(f"| {kind} | {self.injected[kind]} |")
        print(
            "\n| round | engine | faults | episodes, equal records | sweeps submitted "
            "| lines superseded | wandb rows | processes left | minutes |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for r in self.rounds:  # a round that is not so is never noted: the drill ends there
            print(
                f"| {r['round']} | {r['engine']} | {r['faults']} | {r['episodes']} | {r['sweeps']} | {r['superseded']} "
                f"| {r['episodes']}, each once | 0 | {r['minutes']} |"
            )

    # ------------------------------------------------------------------------------------------------ small things
    def sweep(self, out: Path, engine: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "qlibero.cli",
            "sweep",
            str(self.configs[engine]),
            "--out",
            str(out),
            "--engine",
            engine,
        ]
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def artifact(self) -> Path | None:
        """The artifact of the `fake` arm, which all rounds share."""
        metas = [json.loads(path.read_text()) for path in self.reference.glob("*/fake/meta.json")]
        return next((Path(meta["artifact"]["path"]) for meta in metas if "artifact" in meta), None)

    def slurm_ready(self) -> bool:
        import slurm_cluster

        missing = slurm_cluster.missing_programs() if any(self.quota[kind] for kind in ON_SLURM) else ()
        if missing:
            say(f"without Slurm's faults: {', '.join(missing)} not installed")
        return not missing

    def remaining(self, kind: str) -> int:
        return max(0, self.quota[kind] - self.injected[kind]) if self.faults < A_ROUND else 0

    def note(self, kind: str, what: str) -> None:
        self.injected[kind] += 1
        self.faults += 1
        with open(self.faults_path, "a") as file:
            file.write(
                json.dumps({"round": self.round, "kind": kind, "what": what, "at": time.strftime("%H:%M:%S")}) + "\n"
            )
        say(f"{self.injected.total():3d}  {time.strftime('%H:%M:%S')}  {kind}: {what}")

    def watch(self, out: Path) -> None:
        """Notice what has been finished. Raises SystemExit when nothing has for longer than any fault takes."""
        if (now := finished(out)) != self.finished:
            self.finished, self.moved = now, time.monotonic()
            self.blows.clear()
        if time.monotonic() - self.moved > HANG_S:
            running = [read(f"/proc/{p}/cmdline") for p in self.processes("")]
            raise SystemExit(f"{self.round}: no progress for {HANG_S} s; running: {running}")

    def processes(self, pattern: str) -> list[int]:
        """Living processes of this drill whose command line holds `pattern`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            command = read(f"/proc/{pid}/cmdline").replace("\0", " ")
            if command and pattern in command and f"{MARK}={self.out}\0" in environment(pid) and alive(pid):
                found.append(pid)
        return sorted(found)

    def wait_for_quiet(self, timeout_s: float = 240.0) -> list[int]:
        """Wait until none of the drill's processes is left; returns those that are."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes("")) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


class SmallDisk:
    """A file system of DISK_MB that can be filled without harm (needs the right to mount)."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Path:
        if not os.path.ismount(self.path):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.path)], check=True)
        return self.path

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:  # otherwise the round lies there to be looked at, or continued
            subprocess.run(["umount", "--lazy", str(self.path)], check=False)


def cells(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/experiment.yaml"))


def complete(out: Path) -> bool:
    from qlibero.launch.status import status

    return (
        (out / "sweep").is_dir() and bool(list(out.glob("sweep/submission-*/manifest.json"))) and status(out).complete
    )


def record_sets(out: Path) -> dict[str, list[tuple]]:
    """{cell/arm: (key, outcome, steps, fingerprint, action digest) of every episode, in key order}."""
    return {
        f"{cell.name}/{arm}": [
            (str(r.key), r.outcome, r.steps, r.fingerprint, r.action_digest) for r in read_ledger(cell, arm)
        ]
        for cell in cells(out)
        for arm in arms_of(cell)
    }


def verdicts(out: Path) -> dict[str, tuple]:
    """What `compare` concludes per cell and arm."""
    found = {}
    for cell in cells(out):
        for name, arm in compare_runs([cell])["arms"].items():
            found[f"{cell.name}/{name}"] = tuple(arm[key] for key in ("pairs", "broken", "repaired", "verdict"))
    return found


def flip(path: Path, byte: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0] ^ 0x10
        file.seek(byte)
        file.write(bytes([value]))


def finished(out: Path) -> int:
    """Episodes in all ledgers that did not end in an error; superseded ones too."""
    return sum(b'"outcome":"error"' not in line for data in contents(out).values() for line in data.splitlines())


def contents(out: Path) -> dict[Path, bytes]:
    """The complete lines of a sweep's ledgers."""
    files = {path: path.read_bytes() for path in out.glob("*/*/episodes-*.jsonl")}
    return {path: whole for path, data in files.items() if (whole := data[: data.rfind(b"\n") + 1])}


def busy(pid: int) -> bool:
    """Whether it computes: a worker that is stopped while nothing is asked of it hangs nobody up."""

    def ticks() -> list[str]:
        return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13]

    before = ticks()
    time.sleep(0.3)
    return ticks() != before


def send(pid: int, number: int) -> bool:
    """Whether there was anything to send it to."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def parent(pid: int) -> int:
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def alive(pid: int) -> bool:
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] != "Z"


def environment(pid: int) -> str:
    return read(f"/proc/{pid}/environ")


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quota_of(text: str) -> dict[str, int]:
    """ "Slurm node killed=6,slurmd killed=2" as a quota."""
    quota = {kind.strip(): number for kind, _, number in (part.partition("=") for part in text.split(","))}
    if bad := [f"{kind}={number}" for kind, number in quota.items() if kind not in QUOTA or not number.isdecimal()]:
        raise argparse.ArgumentTypeError(f"{', '.join(bad)}: write KIND=NUMBER, the kind one of {', '.join(QUOTA)}")
    return {kind: int(number) for kind, number in quota.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument(
        "--quota", type=quota_of, default=None, metavar="KIND=N,…", help=f"only these faults; kinds: {', '.join(QUOTA)}"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "logs" / "fault_drill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the Slurm daemons end with it
    shares = {kind: max(1, round(share * arguments.faults / 100)) for kind, share in QUOTA.items()}
    return 0 if Drill(arguments.out, arguments.quota or shares, arguments.seed).run() else 1


if __name__ == "__main__":
    sys.exit(main())
