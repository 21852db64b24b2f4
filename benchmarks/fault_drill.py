"""Does anything get lost, doubled or changed when things break? A real LIBERO sweep, hurt a hundred times.

    python benchmarks/fault_drill.py [--faults 100] [--out logs/fault_drill] [--seed 0]

First the sweep runs undisturbed. Then it is run again and again, each time hurt at random moments until it is done, on
the local engine and, where Slurm is installed, on a real two-node Slurm. At the end of every round the record sets must
*equal* the undisturbed run's (keys, outcomes, steps, fingerprints, action digests), the verdict must be the same, wandb's
offline files must hold every row once, and no process may be left. Stopped itself, the drill continues where it was.
The last lines it prints are the table in docs/clusters.md.
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
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from qlibero.results.compare import compare_runs  # noqa: E402
from qlibero.results.ledger import arms_of, read_arm, read_ledger  # noqa: E402

MARK = "QLIBERO_DRILL"   # in the environment of everything the drill starts: how it finds its own processes
DISK_MB = 96
CONFIG = """
extends: {repository}/configs/policies/untrained.yaml
policy: {{flow_steps: 2, replan_steps: 20}}
suite: libero_object
tasks: [0, 3]
episodes_per_task: 3
max_steps: {steps}
videos: 0
workers: 2
quant: {{method: rtn, layout: llm}}
backends: [baseline, fake]
grid: {{seed: [7, 8]}}
tracking: [wandb]
launch:
  shard_episodes: {shard}
  slurm: {{partition: gpu, cpus_per_task: 2, time: "02:00:00"}}
"""
# What is injected, its share of the whole, and whether the run must be over or under way for it.
KINDS = {
    "simulator worker killed": 32,
    "simulator worker stopped (SIGSTOP)": 3,
    "policy process killed": 8,
    "launcher killed": 8,
    "wandb service process killed": 14,
    "wandb mirror killed": 6,
    "ledger tail torn": 10,
    "disk full": 5,
    "artifact byte flipped": 4,
    "slurmd killed": 6,
    "Slurm task killed": 2,
    "Slurm node killed": 2,
}
ON_SLURM = ("slurmd killed", "Slurm task killed", "Slurm node killed")


class Drill:
    def __init__(self, out: Path, faults: int, seed: int, steps: int):
        self.out, self.faults = out.resolve(), faults
        self.disk = self.out / "disk"
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_path = self.out / "faults.jsonl"
        self.rounds_path = self.out / "rounds.json"
        self.rounds = json.loads(self.rounds_path.read_text()) if self.rounds_path.exists() else []
        self.round = f"round-{len(self.rounds) + 1:02d}"
        # faults of a round count when the round has been examined, or when it is still there to be continued
        counted = {r["round"] for r in self.rounds}
        counted |= {self.round} if (self.disk / self.round).exists() or (self.out / self.round).exists() else set()
        done = [json.loads(line) for line in self.log_path.read_text().splitlines()] if self.log_path.exists() else []
        self.injected = Counter(entry["kind"] for entry in done if entry["round"] in counted)
        self.rng = random.Random(f"{seed}/{sum(self.injected.values())}")
        self.token = f"{os.getpid()}-{time.time_ns()}"
        self.environment = dict(os.environ, **{MARK: self.token, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"})
        self.configs = {}
        for name, shard in (("local", 100), ("slurm", 3)):   # a cell in one shard has a mirror; on Slurm two shards a cell
            path = self.out / f"drill-{name}.yaml"
            path.write_text(CONFIG.format(repository=REPOSITORY, steps=steps, shard=shard))
            self.configs[name] = path
        self.quota = {kind: round(share * faults / sum(KINDS.values())) for kind, share in KINDS.items()}

    # ------------------------------------------------------------------------------------------------ the rounds
    def run(self) -> bool:
        say("undisturbed run")
        self.reference = self.out / "reference"
        self.sweep(self.reference, "local").wait()
        self.expected = record_sets(self.reference)
        self.verdicts = verdicts(self.reference)
        say(f"{sum(map(len, self.expected.values()))} episodes in {len(self.expected)} arms")
        slurm_ready = self.slurm_ready()
        while self.left(lambda kind: kind not in ON_SLURM) or (slurm_ready and self.left(lambda kind: kind in ON_SLURM)):
            engine = "local" if self.left(lambda kind: kind not in ON_SLURM) else "slurm"
            name = self.round = f"round-{len(self.rounds) + 1:02d}"
            before = sum(r["faults"] for r in self.rounds)
            found = self.local_round(name) if engine == "local" else self.slurm_round(name)
            self.rounds.append({"round": name, "engine": engine, "faults": sum(self.injected.values()) - before, **found})
            self.rounds_path.write_text(json.dumps(self.rounds, indent=1))
            say(json.dumps(self.rounds[-1]))
        return self.report(self.rounds)

    def local_round(self, name: str) -> dict:
        with self.small_disk() as disk:
            out = disk / name
            process = None
            while True:
                if process is None or process.poll() is not None:
                    if process is not None and complete(out):
                        break
                    self.between_runs(out)
                    process = self.sweep(out, "local")
                time.sleep(self.rng.uniform(3.0, 12.0))
                if kind := self.choose(self.possible(out)):
                    self.strike(kind, process, out)
            found = self.examine(out)
            shutil.copytree(out, self.out / name, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(out)
        return found

    def slurm_round(self, name: str) -> dict:
        import slurm_cluster

        out = self.out / name
        self.environment["SLURM_CONF"] = ""
        with slurm_cluster.slurm(Path("/tmp") / f"drill-{self.token}") as cluster:
            self.environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
            while not complete(out):
                self.sweep(out, "slurm").wait()
                while slurm_cluster.queue():
                    time.sleep(self.rng.uniform(3.0, 10.0))
                    kinds = [kind for kind in ON_SLURM if self.remaining(kind)] if self.processes("run-shard") else []
                    if kind := self.choose(kinds):
                        self.strike_slurm(kind, cluster)
            found = self.examine(out)
        del self.environment["SLURM_CONF"]
        return found

    # ------------------------------------------------------------------------------------------------ the faults
    def possible(self, out: Path) -> list[str]:
        """Kinds still wanted that have something to hurt right now; nothing is counted that hits nothing."""
        targets: dict[str, Callable[[], bool]] = {
            "simulator worker killed": lambda: bool(self.processes("qlibero.sim.worker")),
            "simulator worker stopped (SIGSTOP)": lambda: bool(self.processes("qlibero.sim.worker")),
            "policy process killed": lambda: bool(self.processes("qlibero.sim.worker")),
            "launcher killed": lambda: bool(self.processes("qlibero.sim.worker")),
            "wandb service process killed": lambda: bool(self.processes("wandb-core")),
            "wandb mirror killed": lambda: bool(self.processes("qlibero.tracking.wandb_mirror")),
            "disk full": lambda: bool(self.processes("qlibero.sim.worker")),
        }
        return [kind for kind, there in targets.items() if self.remaining(kind) and there()]

    def choose(self, kinds: list[str]) -> str | None:
        return self.rng.choices(kinds, [self.remaining(kind) for kind in kinds])[0] if kinds else None

    def strike(self, kind: str, launcher: subprocess.Popen, out: Path) -> None:
        patterns = {
            "simulator worker killed": "qlibero.sim.worker",
            "simulator worker stopped (SIGSTOP)": "qlibero.sim.worker",
            "policy process killed": "run-shard --manifest",
            "wandb service process killed": "wandb-core",
            "wandb mirror killed": "qlibero.tracking.wandb_mirror",
        }
        if kind == "launcher killed":
            launcher.kill()
            launcher.wait()
            self.note(kind, f"process {launcher.pid}")
            self.wait_for_quiet()
        elif kind == "disk full":
            filler = self.disk / "filler"
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(b"\0" * 65536):
                        pass
                except OSError:
                    pass
            self.note(kind, f"{filler.stat().st_size >> 20} MB of filler")
            deadline = time.monotonic() + 60
            log = self.out / "sweep.log"
            before = log.read_text(errors="replace").count("the disk is full")
            while log.read_text(errors="replace").count("the disk is full") == before and time.monotonic() < deadline:
                time.sleep(0.5)
            filler.unlink()
        else:
            victims = self.processes(patterns[kind])
            if victims:
                victim = self.rng.choice(victims)
                send(victim, signal.SIGSTOP if "SIGSTOP" in kind else signal.SIGKILL)
                self.note(kind, f"process {victim}")

    def between_runs(self, out: Path) -> None:
        """What can only be hurt while nobody writes: the ledger's tail, and the artifact a new run would load."""
        self.wait_for_quiet()
        ledgers = [path for path in sorted(out.glob("*/*/episodes-*.jsonl")) if path.stat().st_size]
        if ledgers and self.remaining("ledger tail torn"):
            path = self.rng.choice(ledgers)
            lines = path.read_bytes().splitlines(keepends=True)
            cut = self.rng.randrange(1, len(lines[-1]))
            os.truncate(path, path.stat().st_size - cut)
            self.note("ledger tail torn", f"{cut} bytes off {path.relative_to(out)}")
        artifacts = [json.loads(path.read_text()).get("artifact") for path in out.glob("*/fake/meta.json")]
        artifacts = [Path(a["path"]) for a in artifacts if a and Path(a["path"]).is_file()]
        if artifacts and self.remaining("artifact byte flipped") and not complete(out):
            path, byte = artifacts[0], self.rng.randrange(artifacts[0].stat().st_size)
            flip(path, byte)
            self.note("artifact byte flipped", f"byte {byte} of {path.name}")
            try:
                before = {p: p.read_bytes() for p in out.glob("*/fake/episodes-*.jsonl") if p.stat().st_size}
                process = self.sweep(out, "local")
                status = process.wait()
                after = {p: p.read_bytes() for p in out.glob("*/fake/episodes-*.jsonl") if p.stat().st_size}
                logs = "".join(p.read_text(errors="replace") for p in sorted(out.glob("sweep/submission-*/logs/*.log"))[-2:])
                if status == 0 or before != after:
                    raise SystemExit(f"a corrupted artifact produced records: {logs[-2000:]}")
                say("  refused: " + next((line for line in reversed(logs.splitlines()) if line.startswith("qlibero: ")), "?")[:160])
            finally:
                flip(path, byte)

    def strike_slurm(self, kind: str, cluster: Path) -> None:
        import slurm_cluster

        node = self.rng.choice(("n1", "n2"))
        if kind == "slurmd killed":
            slurm_cluster.kill(cluster / f"slurmd.{node}.pid", signal.SIGKILL)
            self.note(kind, node)
            time.sleep(2.0)
            slurm_cluster.start_node(node)
        elif kind == "Slurm task killed":
            victim = self.rng.choice(self.processes("run-shard --manifest"))
            send(victim, signal.SIGKILL)
            self.note(kind, f"process {victim}")
        else:
            here = [pid for pid in self.processes("") if f"SLURMD_NODENAME={node}\0" in environment(pid)]
            steps = {parent(pid) for pid in here if "slurmstepd" in read(f"/proc/{parent(pid)}/comm")}
            if not here:
                return
            slurm_cluster.kill(cluster / f"slurmd.{node}.pid", signal.SIGKILL)
            for pid in (*steps, *here):   # the step first: it must not live to report how its task ended
                send(pid, signal.SIGKILL)
            self.note(kind, f"{node} with {len(here)} processes")
            time.sleep(35.0)   # Slurm declares it down after 15 s and gives its tasks to the other node
            slurm_cluster.start_node(node)

    # ------------------------------------------------------------------------------------------------ the verdict
    def examine(self, out: Path) -> dict:
        """Everything the drill claims, checked; raises SystemExit at the first claim that does not hold."""
        orphans = self.wait_for_quiet()
        found = record_sets(out)
        state = [read_arm(cell, arm) for cell in cells(out) for arm in arms_of(cell)]
        for name, records in self.expected.items():
            if found.get(name) != records:
                raise SystemExit(f"{out.name}: the records of {name} differ from the undisturbed run")
        if found.keys() != self.expected.keys() or any(ledger.conflicts for ledger in state):
            raise SystemExit(f"{out.name}: arms {sorted(found)}, conflicts {[ledger.conflicts for ledger in state]}")
        if verdicts(out) != self.verdicts:
            raise SystemExit(f"{out.name}: another verdict than the undisturbed run's")
        if orphans:
            raise SystemExit(f"{out.name}: processes left behind: {[read(f'/proc/{p}/cmdline') for p in orphans]}")
        return {
            "episodes": sum(map(len, found.values())),
            "equal": True,
            "torn_lines_read": sum(ledger.torn for ledger in state),
            "lines_superseded": sum(ledger.repeated for ledger in state),
            "orphans": 0,
            "wandb_rows_equal": self.wandb_rows(out),
        }

    def wandb_rows(self, out: Path) -> bool:
        """Replay once more (what the launcher tells the user to do after a mirror was killed) and count every row."""
        from wandb_offline import read_offline_run

        for cell in cells(out):
            mirror = [sys.executable, "-m", "qlibero.tracking.wandb_mirror", str(cell)]
            if subprocess.run(mirror, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=300).returncode:
                raise SystemExit(f"{cell}: the wandb mirror failed: {(cell / 'wandb-mirror.log').read_text()[-1000:]}")
            for arm in arms_of(cell):
                (path,) = (cell / arm / "wandb").glob("offline-run-*/*.wandb")
                rows = sorted(row["key"] for row in read_offline_run(path).history if "key" in row)
                if rows != sorted(str(record.key) for record in read_ledger(cell, arm)):
                    raise SystemExit(f"{path}: the rows are not the ledger's")
        return True

    def report(self, rounds: list[dict]) -> bool:
        total = sum(self.injected.values())
        print(f"\n{total} faults in {len(rounds)} rounds of {rounds[0]['episodes']} episodes\n")
        print("| fault | injected |\n|---|---|")
        for kind in KINDS:
            print(f"| {kind} | {self.injected[kind]} |")
        print("\n| round | engine | faults | episodes | records equal | torn lines | superseded lines | wandb rows equal | processes left |")
        print("|---|---|---|---|---|---|---|---|---|")
        for r in rounds:
            print(f"| {r['round']} | {r['engine']} | {r['faults']} | {r['episodes']} | {'yes' if r['equal'] else 'NO'} | {r['torn_lines_read']} "
                  f"| {r['lines_superseded']} | {'yes' if r['wandb_rows_equal'] else 'NO'} | {r['orphans']} |")  # fmt: skip
        return total >= self.faults

    # ------------------------------------------------------------------------------------------------ small things
    def sweep(self, out: Path, engine: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "qlibero.cli", "sweep", str(self.configs[engine]), "--out", str(out), "--engine", engine]
        with open(self.out / "sweep.log", "ab") as log:
            return subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def small_disk(self):
        return SmallDisk(self.disk)

    def slurm_ready(self) -> bool:
        import slurm_cluster

        missing = slurm_cluster.missing_programs()
        if missing:
            say(f"without Slurm's faults: {', '.join(missing)} not installed")
        return not missing

    def remaining(self, kind: str) -> int:
        return max(0, self.quota[kind] - self.injected[kind])

    def left(self, which: Callable[[str], bool]) -> int:
        return sum(self.remaining(kind) for kind in KINDS if which(kind))

    def note(self, kind: str, what: str) -> None:
        self.injected[kind] += 1
        with open(self.log_path, "a") as file:
            file.write(json.dumps({"round": self.round, "kind": kind, "what": what, "at": time.strftime("%H:%M:%S")}) + "\n")
        say(f"{sum(self.injected.values()):3d}  {kind}: {what}")

    def processes(self, pattern: str) -> list[int]:
        """Living processes of this drill whose command line holds `pattern`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            command = read(f"/proc/{pid}/cmdline").replace("\0", " ")
            if command and pattern in command and f"{MARK}={self.token}" in environment(pid) and alive(pid):
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
        self.path.mkdir(exist_ok=True)
        if not os.path.ismount(self.path):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.path)], check=True)
        return self.path

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=False)


def cells(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/experiment.yaml"))


def complete(out: Path) -> bool:
    from qlibero.launch.status import status

    return (out / "sweep").is_dir() and bool(list(out.glob("sweep/submission-*/manifest.json"))) and status(out)["complete"]


def record_sets(out: Path) -> dict[str, list[tuple]]:
    """{cell/arm: (key, outcome, steps, fingerprint, action digest) of every episode, in key order}."""
    return {
        f"{cell.name}/{arm}": [(str(r.key), r.outcome, r.steps, r.fingerprint, r.action_digest) for r in read_ledger(cell, arm)]
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


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "logs" / "fault_drill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="step cap of an episode")
    arguments = parser.parse_args()
    return 0 if Drill(arguments.out, arguments.faults, arguments.seed, arguments.steps).run() else 1


if __name__ == "__main__":
    sys.exit(main())
