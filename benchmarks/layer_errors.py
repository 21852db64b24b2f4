"""Signal over noise of quantized layers on held-out observations, by method and rounding: docs/quantization.md's table.

    python benchmarks/layer_errors.py                      # minutes a row on one core; finds what was made before
    python benchmarks/layer_errors.py --recipes rtn "duquant smoothing=rms" --samples 9 --layers 'layers\\.0\\.mlp'

Of the embedded policy, W4A8 unless a recipe says otherwise. Each recipe is calibrated once, with `rounding: gptq`: as
every linear tries the other roundings too, its artifact holds them all. `language model / expert`, each a mean over its
executed linears.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
import yaml

from qlibero.config.load import load_experiment
from qlibero.config.quantization import ROUNDINGS, Quant
from qlibero.policies import load_policy
from qlibero.policies.base import quantizable
from qlibero.quant.artifact import LayerRecord
from qlibero.quant.prepare import ensure_artifact

ROOT = Path(__file__).parents[1]
RECIPES = ("rtn", "duquant", "duquant smoothing=rms", "smooth_hadamard")


def quant_of(recipe: str, samples: int, layers: str | None) -> Quant:
    """`duquant smoothing=rms` as settings."""
    method, *rest = recipe.split()
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in rest)}
    where = {"include": (layers,)} if layers else {"layout": "llm+expert"}
    data = {"path": ROOT / "examples/libero/embedded/calibration.npz", "samples": samples}
    return Quant(**{"method": method, "rounding": "gptq", "calibration": data, **where, **settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE", help="'METHOD [KEY=VALUE …]' each")
    parser.add_argument("--samples", type=int, default=96, help="observations, a third held out (default: %(default)s)")
    parser.add_argument("--layers", metavar="REGEX", help="these linears instead of all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = quantizable(load_policy(load_experiment(ROOT / "configs/experiments/llm_w4a8_fake.yaml").policy))
    llm = frozenset(policy.layout("llm"))

    def cell(layers: list[LayerRecord], rounding: str) -> str:
        parts = ([x.tried[rounding] for x in layers if (x.name in llm) == of_llm] for of_llm in (True, False))
        return " / ".join(f"{fmean(part):.1f}" if part else "–" for part in parts)

    for number, recipe in enumerate(args.recipes):
        found = ensure_artifact(policy, quant_of(recipe, args.samples, args.layers))
        layers = [layer for layer in found.artifact.layers if layer.tried]
        if number == 0:
            about, of_llm = found.artifact.calibration, sum(layer.name in llm for layer in layers)
            fitted = about["observations"] - about["held_out"]
            print(
                f"{of_llm} linears of the language model / {len(layers) - of_llm} of the expert, {fitted} observations"
            )
            print(f"fitted, {about['held_out']} held out\n")
            print(f"| `method` | {' | '.join(f'`{rounding}`' for rounding in ROUNDINGS)} |\n{'|---' * 4}|")
        method, *rest = recipe.split()
        name = ", ".join([f"`{method}`", *(f"`{word.replace('=', ': ')}`" for word in rest)])
        print(f"| {name} | {' | '.join(cell(layers, rounding) for rounding in ROUNDINGS)} |", flush=True)
        print(f"{recipe}: {f'{found.seconds:.0f} s' if found.made else found.path}", file=sys.stderr)


if __name__ == "__main__":
    main()
