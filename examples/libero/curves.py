"""Draw a training's learning curves from its `curves.jsonl`.

python examples/libero/curves.py logs/training/curves.jsonl --to examples/libero/embedded/curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = (
    ("flow-matching loss", {"flow": "training"}, True),
    (
        "pointing at what is meant (pixels of 128)",
        {"pointed_px": "training", "val_pointed_px": "held out"},
        True,
    ),
    ("error of sampled actions, held out", {"val_xyz": "translation", "val_turn": "rotation"}, False),
    ("gripper right, held out", {"val_gripper": "share of steps"}, False),
)


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Four panels over training samples."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
    millions = [row["samples"] / 1e6 for row in rows]
    for axis, (title, lines, logarithmic) in zip(axes.flat, PANELS, strict=True):
        for name, label in lines.items():
            axis.plot(millions, [row[name] for row in rows], marker=".", label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("million samples", fontsize=9)
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale("log")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("curves", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    draw([json.loads(line) for line in arguments.curves.read_text().splitlines()], arguments.to)
