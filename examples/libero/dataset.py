"""Training examples in memory (on the GPU when there is one), growing while demonstrations are still being made."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from network import MAX_WORDS
from torch import Tensor

from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer

PROFILE = PROFILES["qlibero"]
_FIELDS = {
    "images": torch.uint8,
    "states": torch.float32,
    "chunks": torch.float32,
    "keypoints": torch.float16,
    "aims": torch.float32,
    "aim_pixels": torch.float16,
}
_VALIDATION = 8  # every eighth seed, the first of each task among them, is never trained on


class Examples:
    """All examples below `roots` (npz files of `frames.py`); `refresh` picks up new files.

    `training` and `validation` are the row indices of the two parts, `weights` the training rows' sampling
    weights: every task counts the same, however many demonstrations it has.
    """

    def __init__(self, roots: list[Path], tokenizer: WordTokenizer, device: str, capacity: int):
        self.roots, self.tokenizer, self.device, self.capacity = roots, tokenizer, device, capacity
        self.count, self.read_files = 0, set()
        self.store: dict[str, Tensor] = {}
        self.tokens = torch.zeros(capacity, MAX_WORDS + 1, dtype=torch.long, device=device)
        self.task = torch.zeros(capacity, dtype=torch.long, device=device)
        self.held_out = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._tasks: dict[str, int] = {}

    def refresh(self, limit_s: float = 1e9) -> int:
        """Read files that have come since; returns the number of new episodes."""
        new, started = 0, time.monotonic()
        for path in sorted(p for root in self.roots for p in root.glob("*/*/*.npz")):
            if path in self.read_files or time.monotonic() - started > limit_s:
                continue
            self.read_files.add(path)
            with np.load(path) as file:
                rows = {name: torch.from_numpy(file[name]) for name in _FIELDS}
                language = str(file["language"])
            begin, end = self.count, self.count + len(rows["states"])
            if end > self.capacity:
                break
            for name, values in rows.items():
                if name not in self.store:
                    shape = (self.capacity, *values.shape[1:])
                    self.store[name] = torch.empty(shape, dtype=_FIELDS[name], device=self.device)
                self.store[name][begin:end] = values.to(self.device)
            ids = self.tokenizer.encode(PROFILE.text(language, np.zeros(8)))[: MAX_WORDS + 1]
            self.tokens[begin:end, : len(ids)] = torch.tensor(ids, device=self.device)
            name = "/".join(path.parts[-3:-1])
            self.task[begin:end] = self._tasks.setdefault(name, len(self._tasks))
            self.held_out[begin:end] = int(path.stem) % _VALIDATION == 0
            self.count, new = end, new + 1
        if new:
            held = self.held_out[: self.count]
            self.training, self.validation = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
            per_task = torch.bincount(self.task[self.training], minlength=len(self._tasks)).float()
            self.weights = 1 / per_task[self.task[self.training]]
            self._cumulative = self.weights.double().cumsum(0)
        return new

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """What `norm_stats.json` holds of states and actions: mean, std, and the 1st and 99th percentile."""
        out = {}
        for name, field in (("state", "states"), ("actions", "chunks")):
            x = self.store[field][: self.count].flatten(0, -2).double().cpu().numpy()
            q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
            std = np.maximum(x.std(0), 0.02 if name == "actions" else 1e-3)
            out[name] = {
                "mean": x.mean(0).tolist(),
                "std": std.tolist(),
                "q01": q01.tolist(),
                "q99": q99.tolist(),
            }
        aims, eef = self.store["aims"][: self.count], self.store["states"][: self.count, None, :3]
        reading = torch.cat([aims, aims - eef], 1).flatten(1)
        out["reading"] = {"mean": reading.mean(0).tolist(), "std": reading.std(0).clamp_min(0.01).tolist()}
        return out

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """Training rows, tasks equally likely."""
        u = torch.rand(size, device=self.device, generator=generator, dtype=torch.float64) * self._cumulative[-1]
        return self.training[torch.searchsorted(self._cumulative, u).clamp_max(len(self.training) - 1)]

    def batch(self, rows: Tensor, statistics: dict, blind: bool) -> dict[str, Tensor]:
        """Normalised examples; images float (B, 2, 3, S, S) in [-1, 1], or all -1 (black) when `blind`."""

        def normalized(x: Tensor, name: str) -> Tensor:
            mean, std = (torch.tensor(statistics[name][key], device=self.device) for key in ("mean", "std"))
            return (x - mean) / (std + 1e-6)

        images = self.store["images"][rows].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        states, aims = self.store["states"][rows], self.store["aims"][rows]
        reading = torch.cat([aims, aims - states[:, None, :3]], 1).flatten(1)
        tokens = self.tokens[rows]
        return {
            "images": torch.full_like(images, -1.0) if blind else images,
            "tokens": tokens,
            "token_mask": tokens > 0,
            "states": normalized(states, "state"),
            "chunks": normalized(self.store["chunks"][rows], "actions"),
            "keypoints": self.store["keypoints"][rows].float(),
            "aim_pixels": self.store["aim_pixels"][rows].float(),
            "reading": normalized(reading, "reading"),
        }


def augment(batch: dict[str, Tensor], generator: torch.Generator, blind: bool) -> dict[str, Tensor]:
    """Colour gain and offset, blur, pixel noise; state noise. No shifts: a pixel is 7 mm, coordinates stay true."""
    images, states = batch["images"], batch["states"]
    size, device = images.shape[:2], images.device

    def draw(*shape):
        return torch.rand(*shape, device=device, generator=generator)

    batch = {**batch, "states": states + 0.02 * torch.randn(states.shape, device=device, generator=generator)}
    if blind:
        return batch
    gain = 1 + 0.25 * (draw(*size, 1, 1, 1) * 2 - 1) + 0.08 * (draw(*size, 3, 1, 1) * 2 - 1)
    offset = 0.15 * (draw(*size, 1, 1, 1) * 2 - 1) + 0.05 * (draw(*size, 3, 1, 1) * 2 - 1)
    flat = images.flatten(0, 1)
    blurred = torch.nn.functional.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).view_as(images)
    images = torch.lerp(images, blurred, 0.6 * draw(*size, 1, 1, 1))
    noise = 0.03 * torch.randn(images.shape, device=device, generator=generator) * draw(*size, 1, 1, 1)
    return {**batch, "images": (images * gain + offset + noise).clamp(-1.2, 1.2)}


def write_statistics(path: Path, statistics: dict) -> None:
    path.write_text(json.dumps({"norm_stats": statistics}, indent=1) + "\n")
