"""Everything there is to know about the kernels on this machine: are they right, how fast, could they be faster.

    python benchmarks/kernels.py                          the times, on the GPU if there is one
    python benchmarks/kernels.py --check --prologue       first validation on every pi0.5 layer, and the fused prologue
    python benchmarks/kernels.py --tune 60                and 60 seconds of trying other tiles (says, changes nothing)
    python benchmarks/kernels.py --no-timing --prologue --layer-ops    only the parts that are named

Needs torch and triton, nothing else. Results as Markdown on the way, as JSON in --out and, shortened, in the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlibero.kernels import validation
from qlibero.kernels.benchmark import bench, graph_seconds, markdown, measure_ceilings
from qlibero.kernels.shapes import Layer, compact_layers, pi05_layers

TOKENS = (1, 10, 16, 50, 128, 542, 968, 4336)


def say(text: str) -> None:
    print(text, flush=True)


def judge(layers: list[Layer], backends: list[str]) -> dict[str, Any]:
    """Validation, at every token count, without the cache."""
    verdicts: dict[str, Any] = {}
    for backend in backends:
        start = time.perf_counter()
        found = validation.check([replace(layer, tokens=TOKENS) for layer in layers], backend, remember=False)
        verdicts[backend] = [v.to_json() for v in found]
        passed = sum(v.verdict == "pass" for v in found)
        say(f"check: {backend:<12} {passed} of {len(found)} layers pass, {time.perf_counter() - start:.1f} s")
        for reason in dict.fromkeys(f"{v.shape}: {v.reason}" for v in found if v.verdict != "pass"):
            say(f"    {reason}")
    return verdicts


def try_prologue(repeats: int = 50) -> list[dict[str, Any]]:
    """The fused transforms and quantizers against torch's, their repeatability, and both times. `fused` writes codes in
    rows, `tiled` in the layout of `cuda_w4a8`; `gated` is the transform of gelu(gate)·up, with the gelu in it."""
    from qlibero.kernels.contract import quantize_activations
    from qlibero.kernels.hadamard import fold
    from qlibero.quant.transform import InputTransform, Transform

    def factors(method: str, k: int, block: int = 64) -> Transform:
        if method == "duquant":
            first, second = (torch.linalg.qr(torch.randn(k // block, block, block))[0].bfloat16() for _ in range(2))
            return Transform(first=first, order=torch.randperm(k).int(), second=second)
        signs = torch.randint(0, 2, (k,)) * 2 - 1
        return (
            Transform(hadamard=fold(torch.exp(torch.randn(k)), signs)) if method == "smooth_hadamard" else Transform()
        )

    rows = []
    for method in ("rtn", "duquant", "smooth_hadamard"):
        for k in (1024, 2048, 4096, 16384):
            transform = factors(method, k).to(torch.device("cuda"))
            fused = InputTransform(transform, k).cuda()
            for m in (10, 50, 542, 968, 4336):
                x = (torch.randn(m, k) * torch.exp(torch.randn(k))).bfloat16().cuda()
                both = torch.randn(m, 2 * k, device="cuda").bfloat16()
                gate, up = both.split(k, 1)

                def plain(x=x, transform=transform):
                    return quantize_activations(transform.forward(x.float()))

                def quantize(x=x, fused=fused, in_tiles=False):
                    return fused.quantize(x, 8, 1.0, in_tiles=in_tiles)

                def gated(gate=gate, up=up, fused=fused):
                    return fused.quantize_gated(gate, up, 8, 1.0, in_tiles=True)

                (expected, s_x), (codes, scales) = plain(), quantize()
                same = all(
                    torch.equal(codes, again[0]) and torch.equal(scales, again[1])
                    for again in (quantize() for _ in range(repeats))
                )
                difference = (codes.int() - expected.int()).abs()
                rows.append(
                    {
                        "method": method,
                        "k": k,
                        "tokens": m,
                        "repeats_identical": same,
                        "scale_error": float(((scales - s_x).abs() / s_x).max()),
                        "largest_code_difference": int(difference.max()),
                        "codes_different_per_million": float((difference > 0).double().mean()) * 1e6,
                        "torch_us": graph_seconds([plain] * 20) * 1e6,
                        "fused_us": graph_seconds([quantize] * 20) * 1e6,
                        "tiled_us": graph_seconds([partial(quantize, in_tiles=True)] * 20) * 1e6,
                        "gated_us": graph_seconds([gated] * 20) * 1e6 if fused.takes_gated(x.device) else None,
                    }
                )
                say(
                    "prologue: "
                    + "  ".join(
                        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in rows[-1].items()
                    )
                )
    return rows


def time_layer_ops() -> list[dict[str, Any]]:
    """The pieces of a flow step of full-size pi0.5 (10 tokens a row), fused and in torch; weights of more layers than
    the cache holds, in turn."""
    from torch import nn

    from qlibero.policies.pi05.fast.fused_ops import EagerOps
    from qlibero.policies.pi05.fast.triton_fused_ops import TritonOps
    from qlibero.policies.pi05.layers import fuse

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    def linears(k: int, *outputs: int) -> tuple[nn.Linear, ...]:
        made = tuple(
            nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False) for n in outputs
        )
        if len(made) > 1:
            fuse(*made)
        return made

    def pieces(batch: int, keys: int) -> dict[str, Callable[[Any, Any], torch.Tensor]]:
        h, delta, gate = random(batch, 10, 1024), random(batch, 10, 1024), random(1, 1, 1024)
        scale, shift = random(1, 1, 1024, dtype=torch.float32), random(1, 1, 1024, dtype=torch.float32)
        q, cos, sin = random(batch, 10, 8, 256), random(batch, 10, 1, 256), random(batch, 10, 1, 256)
        long, wide = random(batch, keys - 10, 8, 256), random(batch, 10, 4096)
        k, v, mask = random(batch, keys, 256), random(batch, keys, 256), torch.zeros_like(random(batch, 1, keys))
        own, there = (k.clone()[:, -10:], v.clone()[:, -10:]), (k[:, :-10], v[:, :-10], mask[..., :-10])
        return {
            "residual_norm": lambda ops, _: ops.residual_norm(h, delta, gate, scale, shift)[1],
            "rotated q, k, v": lambda ops, layer: ops.rotated(h, layer[0], cos, sin, *own),
            "attend, flow": lambda ops, _: ops.attend(q, k, v, mask),
            "attend, prefix": lambda ops, _: ops.attend(long, *there),
            "o": lambda ops, layer: ops.parts(q.flatten(2), *layer[1]),
            "gated": lambda ops, layer: ops.gated(h, *layer[2]),
            "down": lambda ops, layer: ops.parts(wide, *layer[3]),
        }

    layers = [
        (linears(1024, 2048, 256, 256), linears(2048, 1024), linears(1024, 4096, 4096), linears(4096, 1024))
        for _ in range(8)
    ]
    rows = []
    for batch, keys in ((1, 298), (1, 554), (1, 810), (8, 554)):
        for name, call in pieces(batch, keys).items():
            both = (EagerOps(), TritonOps())
            expected, found = (call(ops, layers[0]).float() for ops in both)
            found = found.sum(0) if found.dim() > expected.dim() else found
            rows.append(
                {
                    "batch": batch,
                    "keys": keys,
                    "function": name,
                    "worst": float((expected - found).abs().max() / expected.abs().max()),
                    **{
                        f"{ops.name}_us": graph_seconds([lambda g=ops, c=call, x=x: c(g, x) for x in layers]) * 1e6
                        for ops in both
                    },
                }
            )
            say(
                "layer ops: "
                + "  ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in rows[-1].items()
                )
            )
    return rows


def tune(limit_s: float) -> list[dict[str, Any]]:
    """Other tiles at the shapes where the time goes, until the time is up."""
    from qlibero.kernels import triton_gemm
    from qlibero.kernels.packing import pack_khalf
    from qlibero.kernels.triton_tiles import CANDIDATES, bucket, choose_tile, with_split

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    start, rows = time.perf_counter(), []
    for m, n, k in (
        (10, 1024, 4096),
        (10, 4096, 1024),
        (968, 16384, 2048),
        (968, 2048, 16384),
        (968, 2048, 2048),
        (50, 2048, 2048),
        (10, 2048, 2048),
        (128, 2048, 2048),
        (542, 2048, 2048),
    ):
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
        weights = [
            pack_khalf(torch.randint(-8, 8, (n, k), dtype=torch.int8)).cuda()
            for _ in range(max(2, min(48, (80 << 20) // (n * k // 2))))
        ]
        s_x, s_w, default = torch.rand(m, device="cuda"), torch.rand(n, device="cuda"), choose_tile(m, n, k, processors)
        tiles = [default]
        for candidate in CANDIDATES[bucket(m)]:
            split = with_split(candidate, m, n, k, processors)
            tiles += [split] + [
                replace(split, split_k=s) for s in {split.split_k * 2, max(1, split.split_k // 2)} if s <= 16
            ]
        for tile in dict.fromkeys(tiles):
            if time.perf_counter() - start > limit_s:
                say(f"tune: stopped after {limit_s:.0f} s")
                return rows
            try:
                products = [partial(triton_gemm.gemm, x, w, s_x, s_w, None, torch.bfloat16, tile) for w in weights]
                took = graph_seconds(products) * 1e6
            except Exception as error:  # a tile may not fit this GPU: that is an answer too
                took = None
                say(f"tune: {tile}: {type(error).__name__}: {str(error)[:100]}")
            rows.append({"tokens": m, "n": n, "k": k, "us": took, "default": tile == default, "tile": asdict(tile)})
        timed = sorted(
            (r for r in rows if (r["tokens"], r["n"], r["k"]) == (m, n, k) and r["us"]), key=lambda r: r["us"]
        )
        used = next(r["us"] for r in timed if r["default"])
        say(f"tune: {m:>4} tokens {n}x{k}: default {used:.1f} µs, best {timed[0]['us']:.1f} µs with {timed[0]['tile']}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backends", default=None, help="comma-separated; default: fake and every real kernel that runs here"
    )
    parser.add_argument("--check", "--court", action="store_true", help="validate every layer first")
    parser.add_argument("--prologue", action="store_true", help="CUDA: the fused transform and quantizer")
    parser.add_argument("--layer-ops", "--glue", action="store_true", help="CUDA: the pieces of a flow step")
    parser.add_argument("--no-timing", "--no-stopwatch", action="store_true", help="leave the products' times out")
    parser.add_argument("--tune", type=float, default=0, metavar="SECONDS", help="CUDA: try other tiles that long")
    parser.add_argument("--out", type=Path, default=None, help="where the whole JSON goes")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    torch.manual_seed(0)
    if not cuda:
        torch.set_num_threads(1)
    layers = pi05_layers() if cuda else [layer for layer in compact_layers() if layer.name.startswith("M.")]
    backends = args.backends.split(",") if args.backends else None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "ceilings": asdict(measure_ceilings(args.device)),
    }
    if cuda:
        import triton

        result["triton"] = triton.__version__
    say(json.dumps(result))

    def stage(name: str, work: Callable[[], Any]) -> None:
        """Run a part; if it fails, say so and go on: time on a GPU is too dear to lose the other parts to one."""
        start = time.perf_counter()
        try:
            result[name] = work()
        except Exception:
            result[name] = {"failed": traceback.format_exc()}
            say(result[name]["failed"])
        say(f"{name}: {time.perf_counter() - start:.1f} s")
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1))

    def timing() -> dict[str, Any]:
        timings = bench(layers, TOKENS if cuda else None, backends)
        say(markdown(timings))
        return {"markdown": markdown(timings), "timings": [asdict(t) for t in timings]}

    if args.check:
        stage(
            "check",
            lambda: judge(
                layers, backends or (["fake", "cuda_w4a8", "triton_w4a8", "w8a8"] if cuda else ["fake", "cpu_int4"])
            ),
        )
    if not args.no_timing:
        stage("timing", timing)
    if args.prologue and cuda:
        stage("prologue", try_prologue)
    if args.layer_ops and cuda:
        stage("layer_ops", time_layer_ops)
    if args.tune and cuda:
        stage("tune", lambda: tune(args.tune))
    short = {
        key: value for key, value in result.items() if key not in ("timing", "check", "prologue", "layer_ops", "tune")
    }
    short["failed"] = [key for key, value in result.items() if isinstance(value, dict) and "failed" in value]
    if args.check and "check" not in short["failed"]:
        short["verdicts"] = {name: sorted({v["verdict"] for v in found}) for name, found in result["check"].items()}
    print(json.dumps(short))


if __name__ == "__main__":
    main()
