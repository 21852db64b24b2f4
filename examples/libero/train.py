"""Train the compact pi0.5 on rendered demonstrations. The same command continues after an interruption.

    python examples/libero/train.py --out logs/training --minutes 120       # CPU or GPU
    python examples/libero/train.py --out logs/blind --steps 6000 --blind   # the blind control

`--out` receives `state.pt` (everything needed to continue), `snapshot/` (a loadable checkpoint of the
averaged weights, renewed with every save), `curves.jsonl`, and an offline wandb run when wandb is
installed. New files below `--frames` are picked up while training runs, so demonstrations may still be in
the making.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from dataset import Examples, augment
from network import FLOW_SAMPLES, Learner, architecture, vocabulary

from qlibero.policies.pi05.checkpoint import load_model, open_checkpoint, write_checkpoint
from qlibero.policies.pi05.statistics import statistics_file

WARMUP_STEPS = 100
FLAT = 0.4  # of the budget at the full learning rate, then a cosine to 2 %
EMA = 0.999


@dataclass
class Progress:
    """What has to survive an interruption beside the tensors."""

    step: int = 0
    seconds: float = 0.0
    statistics: dict = field(default_factory=dict)


class Trainer:
    """Owns the learner, its average, the optimiser and the clock."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = vocabulary()
        self.config = architecture(arguments.size, self.tokenizer.vocab_size)
        self.learner = Learner(self.config, arguments.seed).to(self.device)
        self.progress = Progress()
        if arguments.init:
            self._begin_from(arguments.init)
        self.average = copy.deepcopy(self.learner).requires_grad_(False)
        decayed = [p for p in self.learner.parameters() if p.ndim > 1]
        plain = [p for p in self.learner.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            arguments.learning_rate,
            betas=(0.9, 0.95),
            fused=self.device == "cuda",
        )
        self.generator = torch.Generator(self.device).manual_seed(arguments.seed)
        self.examples = Examples(arguments.frames, self.tokenizer, self.device, arguments.capacity)
        arguments.out.mkdir(parents=True, exist_ok=True)
        self._state_file = arguments.out / "state.pt"
        if self._state_file.exists():
            self._load()
        self._forward = torch.compile(self.learner) if arguments.compile else self.learner
        self._log = open_log(arguments)

    # ---- the loop
    def run(self) -> None:
        self._wait_for_examples()
        started, before = time.monotonic(), self.progress.seconds
        saved = evaluated = refreshed = started
        sums: dict[str, torch.Tensor] = {}
        count = 0
        while self._fraction() < 1:
            for name, value in self._step().items():
                sums[name] = sums.get(name, 0) + value.detach()
            count += 1
            now = time.monotonic()
            self.progress.seconds = before + now - started
            if now - refreshed > 15:
                self.examples.refresh(limit_s=4)
                refreshed = time.monotonic()
            if now - evaluated > self.arguments.evaluate_every or self._fraction() >= 1:
                means = {name: round(float(value) / count, 4) for name, value in sums.items()}
                self._log(
                    {
                        "step": self.progress.step,
                        "seconds": round(self.progress.seconds, 1),
                        "samples": self.progress.step * self.arguments.batch,
                        "examples": self.examples.count,
                        "learning_rate": self.optimizer.param_groups[0]["lr"],
                        **means,
                        **self.validate(),
                    }
                )
                sums, count, evaluated = {}, 0, time.monotonic()
            if now - saved > self.arguments.save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _step(self) -> dict[str, torch.Tensor]:
        arguments, device = self.arguments, self.device
        for group in self.optimizer.param_groups:
            group["lr"] = arguments.learning_rate * self._schedule()
        rows = self.examples.sample(arguments.batch, self.generator)
        batch = self.examples.batch(rows, self.progress.statistics, arguments.blind)
        batch = augment(batch, self.generator, arguments.blind)
        shape = (arguments.batch, FLOW_SAMPLES)
        noise = torch.randn(*shape, *batch["chunks"].shape[1:], device=device, generator=self.generator)
        # Beta(1.5, 1) is a power of a uniform number
        flow_time = torch.rand(shape, device=device, generator=self.generator) ** (1 / 1.5) * 0.999 + 0.001
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = self._forward(batch, noise, flow_time)
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.progress.step += 1
        decay = min(EMA, self.progress.step / (self.progress.step + 20))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.learner.parameters()), 1 - decay)
        return losses

    def _fraction(self) -> float:
        if self.arguments.steps:
            return self.progress.step / self.arguments.steps
        return self.progress.seconds / (60 * self.arguments.minutes)

    def _schedule(self) -> float:
        falling = min(1.0, max(0.0, (self._fraction() - FLAT) / (1 - FLAT)))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(falling * torch.pi)).item())
        return min(1.0, (self.progress.step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)

    def _wait_for_examples(self) -> None:
        while True:
            self.examples.refresh()
            if len(self.examples.read_files) >= self.arguments.wait_for and len(self.examples.validation):
                break
            time.sleep(3)
        self.progress.statistics = {**self.examples.statistics(), **self.progress.statistics}

    # ---- looking and keeping
    @torch.no_grad()
    def validate(self, rows: int = 512) -> dict[str, float]:
        """Errors of the averaged weights on held-out episodes: sampled chunks against the expert's."""
        learner, device = self.average.eval(), self.device
        generator = torch.Generator(device).manual_seed(0)
        pick = torch.randperm(len(self.examples.validation), device=device, generator=generator)[:rows]
        batch = self.examples.batch(self.examples.validation[pick], self.progress.statistics, self.arguments.blind)
        x = torch.randn(batch["chunks"].shape, device=device, generator=generator)
        policy, steps = learner.policy, self.config.flow_steps
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            prefix = policy.prefix(batch["images"], batch["tokens"], batch["token_mask"], state=batch["states"])
            _, pointed = learner._pointer_losses(prefix.hidden, batch["aim_pixels"])
            for i in range(steps):
                x = x - policy.velocity(prefix, x, torch.full((len(x),), 1 - i / steps, device=device)) / steps
        error = (x - batch["chunks"]).abs() * torch.tensor(self.progress.statistics["actions"]["std"], device=device)
        gripper = torch.tensor(self.progress.statistics["actions"]["mean"][6], device=device)
        std = torch.tensor(self.progress.statistics["actions"]["std"][6], device=device)
        same = ((x[..., 6] * std + gripper) > 0) == ((batch["chunks"][..., 6] * std + gripper) > 0)
        return {
            "val_xyz": round(error[..., :3].mean().item(), 4),
            "val_turn": round(error[..., 3:6].mean().item(), 4),
            "val_gripper": round(same.float().mean().item(), 4),
            "val_pointed_px": round(pointed.item() * 64, 3),
        }

    def save(self) -> None:
        """`state.pt`, then `snapshot/`; both whole or as they were."""
        temporary = self._state_file.with_suffix(".tmp")
        torch.save(
            {
                "learner": self.learner.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": vars(self.progress),
            },
            temporary,
        )
        os.replace(temporary, self._state_file)
        export(self, self.arguments.out / "snapshot")

    def _begin_from(self, path: Path) -> None:
        """Weights and statistics of an exported checkpoint; the auxiliary heads, which it lacks, begin anew."""
        checkpoint = open_checkpoint(path)
        weights = load_model(checkpoint, torch.float32, torch.device(self.device)).state_dict()
        self.learner.policy.load_state_dict(weights)
        norm_stats = json.loads(statistics_file(checkpoint).read_text())["norm_stats"]
        self.progress.statistics = {name: norm_stats[name] for name in ("state", "actions")}

    def _load(self) -> None:
        state = torch.load(self._state_file, map_location=self.device, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def export(trainer: Trainer, path: Path) -> str:
    """The averaged weights, without training's extra heads, as a checkpoint directory that qlibero loads."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    statistics = {name: trainer.progress.statistics[name] for name in ("state", "actions")}
    digest = write_checkpoint(
        temporary,
        trainer.average.policy,
        name="embedded",
        statistics=statistics,
        tokenizer=trainer.tokenizer.to_json(),
        normalization="mean_std",
    )
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    return digest


def open_log(arguments: argparse.Namespace):
    """A function that takes one row of numbers: to `curves.jsonl`, to the terminal, and to wandb if it is installed."""
    run = None
    try:
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        run = wandb.init(
            project="qlibero",
            name=f"train-{arguments.out.name}",
            dir=str(arguments.out),
            resume="allow",
            id=f"train-{arguments.out.name}",
            config={k: str(v) for k, v in vars(arguments).items()},
        )
    except ImportError:
        pass

    def log(row: dict) -> None:
        print(json.dumps(row), flush=True)
        with open(arguments.out / "curves.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if run is not None:
            run.log(row, step=row["step"])

    return log


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=Path, nargs="+", default=[Path("logs/frames")])
    parser.add_argument("--out", type=Path, default=Path("logs/training"))
    parser.add_argument("--size", default="small", choices=("small", "tiny"))
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of training, interruptions not counted")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=64, help="64 on a CPU, 512 to 1024 on a GPU")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--init", type=Path, help="checkpoint directory to begin from, such as another run's snapshot/")
    parser.add_argument("--blind", action="store_true", help="black images: the control that shows whether it must see")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="torch.compile: worth it for long runs on a GPU")
    parser.add_argument(
        "--capacity", type=int, default=20_000, help="examples that memory is set aside for (0.1 MB each)"
    )
    parser.add_argument("--wait-for", type=int, default=1, help="episodes that must be there before training starts")
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    parser.add_argument("--evaluate-every", type=float, default=60, help="seconds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    Trainer(parse()).run()
