"""Latency, memory and phases of a pi0.5 policy call, from eager bf16 to CUDA-graphed W4A8, with the physical
floor beside it.

    python benchmarks/policy_latency.py                      # full size on a GPU, reduced size on a CPU
    python benchmarks/policy_latency.py --quick --json out.json

Random weights: time and memory do not depend on their values, and no checkpoint is needed. Every variant is
the same sampler on the same shapes (10 flow steps, 32 text positions of which 24 are live); W4A8 stands
beside *graphed* bf16, so that what graphs gain is never sold as what fewer bits gain. The quantized variants
have DuQuant's whole online work: two block rotations and a permutation before every quantized input. The last
line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from qlibero.kernels import load as load_kernel
from qlibero.kernels.contract import GemmShape
from qlibero.policies.pi05.config import PI05_FULL, GemmaConfig, Pi05Config, SiglipConfig
from qlibero.policies.pi05.glue import TorchGlue
from qlibero.policies.pi05.model import Pi05Model, is_float32_island
from qlibero.policies.pi05.sampler import Sampler
from qlibero.quant.layout import select
from qlibero.quant.linear import Weights, assemble
from qlibero.quant.spec import QuantSpec
from qlibero.quant.surgery import exchange
from qlibero.quant.transform import InputTransform, Transform

REDUCED = Pi05Config(
    llm=GemmaConfig(128, 3, 256, 8, 32),
    expert=GemmaConfig(64, 3, 128, 8, 32),
    vision=SiglipConfig(64, 2, 128, 4, 14, 56),
    vocab_size=512,
)
TEXT, LIVE = 32, 24
BLOCK = 64
# (bytes/s, bf16 FLOP/s, int8 OP/s), dense, from the vendors' data sheets: the floor is what these allow, not
# what is reached
PEAKS = {
    "H100 80GB HBM3": (3.35e12, 989e12, 1979e12), "H200": (4.8e12, 989e12, 1979e12), "A100": (2.04e12, 312e12, 624e12),
    "A40": (0.696e12, 150e12, 299e12), "L40S": (0.864e12, 362e12, 733e12), "4090": (1.008e12, 165e12, 660e12),
    "5090": (1.792e12, 209e12, 838e12), "B200": (8.0e12, 2250e12, 4500e12),
}  # fmt: skip


@dataclass
class Row:
    """One measured variant and shape; times in ms, memory in GiB."""

    variant: str
    cameras: int
    batch: int
    p50_ms: float
    p95_ms: float
    phases_ms: dict[str, float]
    peak_gib: float | None
    static_gib: float | None
    floor_ms: float | None
    kernels: str = ""
    prepare_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def random_model(
    config: Pi05Config, device: torch.device, dtype: torch.dtype, skip: frozenset[str] = frozenset()
) -> Pi05Model:
    """The network with random weights, made on the device tensor by tensor; linears in `skip` stay on the
    meta device."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Pi05Model(config)
    for name, parameter in list(model.named_parameters()):
        if name.removesuffix(".weight") in skip:
            continue
        value = torch.empty(
            parameter.shape, dtype=torch.float32 if is_float32_island(name) else dtype, device=device
        )
        value.normal_(0, 0.02, generator=generator)
        if name.endswith("norm.weight") and "layer_norm" in name:
            value.add_(1.0)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def quantized(model: Pi05Model, layout: str, backend: str, device: torch.device) -> Pi05Model:
    """`model` with random int4 codes on `backend` in the linears of `layout`, behind DuQuant-shaped
    transforms."""
    generator = torch.Generator(device).manual_seed(1)
    spec = QuantSpec(method="duquant", layout=layout, block_size=min(BLOCK, model.config.expert.width))
    kernel, modules = load_kernel(backend), {}

    once = torch.randn(
        spec.block_size, spec.block_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    base = torch.linalg.qr(once)[0].to(device, torch.bfloat16)

    def rotations(width: int) -> torch.Tensor:
        """(G, B, B): one random rotation with other signs in every block, which is a rotation again."""
        signs = (
            torch.randint(
                0, 2, (width // spec.block_size, 1, spec.block_size), generator=generator, device=device
            )
            * 2
            - 1
        )
        return base * signs.bfloat16()

    for choices in select(model, spec).groups().values():
        width = model.get_submodule(choices[0].name).in_features
        order = torch.randperm(width, generator=generator, device=device, dtype=torch.int32)
        shared = InputTransform(Transform(None, rotations(width), order, rotations(width)), width)
        for executed in (
            True,
            False,
        ):  # as quantize_policy does: what is never run is no part of the common product
            together = [choice for choice in choices if choice.executed == executed]
            if not together:
                continue
            parts, dtype = [], None
            for choice in together:
                rows, dtype = (
                    model.get_submodule(choice.name).out_features,
                    model.get_submodule(choice.name).weight.dtype,
                )
                codes = torch.randint(
                    -8, 8, (rows, width), generator=generator, device=device, dtype=torch.int8
                )
                parts.append(
                    Weights(codes, torch.full((rows,), 0.02 / 4.6, device=device).bfloat16().float())
                )
            support = kernel.supports(
                GemmShape(sum(len(part.codes) for part in parts), width, 4, 8, None, device.type)
            )
            if not support.ok:
                raise RuntimeError(f"{backend}: {support.reason}")
            made = assemble(
                kernel, shared, parts, weight_bits=4, activation_bits=8, activation_clip=1.0, dtype=dtype
            )
            modules |= dict(zip((choice.name for choice in together), made, strict=True))
    return exchange(model, modules)


def quantized_sampler(model: Pi05Model, layout: str, backend: str, device: torch.device) -> Sampler:
    """With CUDA graphs where there is CUDA."""
    return Sampler(quantized(model, layout, backend, device), graphs=device.type == "cuda")


def compiled(sampler: Sampler) -> Sampler:
    """The sampler with its phases through torch.compile, which does the fusing itself; the flow one Euler
    step at a time."""
    sampler.glue, sampler.glue_reason = TorchGlue(), "torch glue, fused by the compiler"
    sampler._vision = torch.compile(sampler._vision)
    sampler._prefix = torch.compile(sampler._prefix)
    sampler.step = torch.compile(sampler.step)
    return sampler


def inputs(config: Pi05Config, cameras: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Pinned host tensors, as a policy call has them."""
    g = torch.Generator().manual_seed(2)
    size = config.vision.image_size
    made = {
        "images": torch.rand(batch, cameras, 3, size, size, generator=g) * 2 - 1,
        "tokens": torch.randint(1, config.vocab_size, (batch, TEXT), generator=g),
        "noise": torch.randn(batch, config.action_horizon, config.action_dim, generator=g),
        "token_mask": (torch.arange(TEXT) < LIVE).expand(batch, TEXT).contiguous(),
    }
    return {k: v.pin_memory() for k, v in made.items()} if device.type == "cuda" else made


def floor_ms(
    config: Pi05Config,
    cameras: int,
    batch: int,
    weight_bits: dict[str, int],
    peaks: tuple[float, float, float],
) -> float:
    """max(bytes, operations) of each phase at the data sheet's peaks, summed. `weight_bits`: {"llm": 4 or 16,
    "expert_mlp": …}.

    Matrix products only: live weights are read once a phase (the expert's once a step), activations are free.
    """
    memory, bf16, int8 = peaks
    v, llm, e = config.vision, config.llm, config.expert
    vision_weights = v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + v.width * llm.width
    attention = 2 * llm.num_heads * llm.head_dim * llm.width + 2 * llm.head_dim * llm.width
    llm_weights = (llm.depth - 1) * (attention + 3 * llm.width * llm.mlp_dim) + 2 * llm.head_dim * llm.width
    e_attention = e.depth * (2 * e.num_heads * e.head_dim * e.width + 2 * e.head_dim * e.width)
    e_mlp = e.depth * 3 * e.width * e.mlp_dim
    image, prefix, horizon = cameras * v.tokens, cameras * v.tokens + TEXT, config.action_horizon

    def phase(parts: list[tuple[float, int]], tokens: int, extra: float, times: int = 1) -> float:
        read = sum(weights * bits / 8 for weights, bits in parts) / memory
        work = (
            sum(2 * weights * tokens * batch / (int8 if bits <= 8 else bf16) for weights, bits in parts)
            + extra * batch / bf16
        )
        return times * max(read, work) * 1e3

    vit_attention = v.depth * cameras * 4 * v.tokens**2 * v.width
    llm_attention = (llm.depth - 1) * 4 * prefix**2 * llm.num_heads * llm.head_dim
    flow_attention = e.depth * 4 * horizon * (prefix + horizon) * e.num_heads * e.head_dim
    return (
        phase([(vision_weights, 16)], image, vit_attention)
        + phase([(llm_weights, weight_bits["llm"])], prefix, llm_attention)
        + phase(
            [(e_attention, 16), (e_mlp, weight_bits["expert_mlp"])],
            horizon,
            flow_attention,
            config.flow_steps,
        )
    )


def measure(
    name: str,
    sampler: Sampler,
    config: Pi05Config,
    cameras: int,
    batch: int,
    device: torch.device,
    repeats: int,
    bits: dict[str, int],
    kernels: str = "",
) -> tuple[Row, torch.Tensor]:
    """Time one variant at one shape: the median call from host tensors to host tensors, and each phase's
    median."""
    cuda = device.type == "cuda"
    started = time.perf_counter()
    given = inputs(config, cameras, batch, device)
    noise = given.pop("noise")
    for _ in range(3):
        out, _ = sampler(given["images"], given["tokens"], noise, token_mask=given["token_mask"])
    prepare_s = time.perf_counter() - started
    static = torch.cuda.memory_allocated() / 2**30 if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, phases = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        out, split = sampler(given["images"], given["tokens"], noise, token_mask=given["token_mask"])
        times.append((time.perf_counter() - started) * 1e3)
        phases.append(split)
    times.sort()
    peaks = next((p for key, p in PEAKS.items() if cuda and key in torch.cuda.get_device_name()), None)
    row = Row(
        name,
        cameras,
        batch,
        round(statistics.median(times), 3),
        round(times[min(len(times) - 1, int(0.95 * len(times)))], 3),
        {key: round(statistics.median(p[key] for p in phases), 3) for key in phases[0]},
        round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        static and round(static, 2),
        peaks and round(floor_ms(config, cameras, batch, bits, peaks), 2),
        kernels,
        round(prepare_s, 1),
    )
    return row, out


def show(row: Row) -> None:
    phases = " ".join(f"{k} {v:.2f}" for k, v in row.phases_ms.items())
    memory = "" if row.peak_gib is None else f"  static {row.static_gib:.2f} peak {row.peak_gib:.2f} GiB"
    floor = "" if row.floor_ms is None else f"  floor {row.floor_ms:.2f}"
    print(
        f"{row.variant:<34} {row.cameras} cam  B={row.batch:<2}  p50 {row.p50_ms:8.2f}  p95 {row.p95_ms:8.2f} ms  ({phases}){floor}"
        f"{memory}  [{row.prepare_s:.0f} s to prepare]  {'; '.join(row.notes)}",
        file=sys.stderr,
        flush=True,
    )


class Bench:
    """The variants in their order, and what they answered."""

    def __init__(self, device: torch.device, repeats: int, shapes: list[tuple[int, int]]):
        self.device, self.repeats, self.shapes = device, repeats, shapes
        self.cuda = device.type == "cuda"
        self.config, self.dtype = (PI05_FULL, torch.bfloat16) if self.cuda else (REDUCED, torch.float32)
        self.word = "bf16" if self.cuda else "float32"
        self.rows: list[Row] = []
        self.answers: dict[tuple[str, int, int], torch.Tensor] = {}

    def run(
        self,
        name: str,
        make: Callable[[], Sampler],
        shapes: list[tuple[int, int]],
        bits: dict[str, int],
        kernels: str = "",
    ) -> None:
        """Measure one variant; a variant that cannot run here says why and the rest goes on."""
        self.clean()
        try:
            sampler = make()
            for cameras, batch in shapes:
                row, out = measure(
                    name, sampler, self.config, cameras, batch, self.device, self.repeats, bits, kernels
                )
                row.notes.append(sampler.glue_reason)
                if not bool(torch.isfinite(out).all()):
                    row.notes.append("ANSWER NOT FINITE")
                self.answers[name, cameras, batch] = out
                self.rows.append(row)
                show(row)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}"[:400], file=sys.stderr, flush=True)
            self.rows.append(
                Row(
                    name,
                    0,
                    0,
                    0.0,
                    0.0,
                    {},
                    None,
                    None,
                    None,
                    kernels,
                    0.0,
                    [f"{type(error).__name__}: {error}"[:400]],
                )
            )

    def compare(self, one: str, other: str) -> None:
        """Whether two variants answered the same at every shape both ran."""
        for (name, cameras, batch), answer in self.answers.items():
            twin = self.answers.get((other, cameras, batch))
            if name == one and twin is not None:
                worst = float((answer - twin).abs().max())
                said = (
                    "EQUAL"
                    if worst == 0
                    else f"differ by at most {worst:.2e} (largest value {float(twin.abs().max()):.2f})"
                )
                text = f"answers of {one} and {other}, {cameras} cameras, batch {batch}: {said}"
                next(
                    r for r in self.rows if (r.variant, r.cameras, r.batch) == (one, cameras, batch)
                ).notes.append(text)
                print(f"  {text}", file=sys.stderr, flush=True)

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backends",
        default=None,
        help="comma-separated; default: triton_w4a8,w8a8,fake on a GPU, fake on a CPU",
    )
    parser.add_argument("--layouts", default="llm,llm+expert_mlp")
    parser.add_argument("--quick", action="store_true", help="2 cameras, batch 1 only")
    parser.add_argument("--compile", action="store_true", help="torch.compile variants too (adds minutes)")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="also write the document here")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    shapes = [(c, b) for b in (1, 8, 16) for c in (2, 1, 3)] if cuda else [(2, 1), (2, 2)]
    bench = Bench(device, args.repeats or (30 if cuda else 5), shapes[:1] if args.quick else shapes)
    backends = (args.backends or ("triton_w4a8,w8a8,fake" if cuda else "fake")).split(",")
    with torch.inference_mode():
        variants(bench, args.layouts.split(","), backends, args.compile)
    document = {
        "benchmark": "policy_latency",
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "driver_cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "horizon": bench.config.action_horizon,
        "flow_steps": bench.config.flow_steps,
        "text_positions": TEXT,
        "rows": [asdict(row) for row in bench.rows],
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def variants(bench: Bench, layouts: list[str], backends: list[str], compile_too: bool) -> None:
    """Everything, in the order in which it is told: full precision, W4A8 beside it, then W4A8 with nothing
    else in memory."""
    one, full, cuda = bench.shapes[:1], {"llm": 16, "expert_mlp": 16}, bench.cuda
    prefix = "graphed " if cuda else ""
    model = random_model(bench.config, bench.device, bench.dtype)
    eager = f"eager {bench.word}"
    bench.run(eager, lambda: Sampler(model), one, full)
    if compile_too:
        bench.run(f"compiled {bench.word}", lambda: compiled(Sampler(model)), one, full)
        if cuda:
            bench.run("compiled and graphed bf16", lambda: compiled(Sampler(model, graphs=True)), one, full)
    if cuda:
        bench.run("graphed bf16", lambda: Sampler(model, graphs=True), bench.shapes, full)
        bench.compare("graphed bf16", eager)
    for layout in layouts:
        bits = {"llm": 4, "expert_mlp": 4 if "expert" in layout else 16}
        for i, backend in enumerate(backends):
            make = partial(quantized_sampler, model, layout, backend, bench.device)
            bench.run(
                f"{prefix}W4A8 {layout} {backend}", make, bench.shapes if i == 0 else one, bits, backend
            )
        for backend in backends:
            if backend != "fake":
                bench.compare(f"{prefix}W4A8 {layout} {backend}", f"{prefix}W4A8 {layout} fake")
    if cuda:
        names = frozenset(
            c.name for c in select(model, QuantSpec(method="duquant", layout=layouts[-1])).choices
        )
        del model
        bench.clean()
        torch.cuda.reset_peak_memory_stats()

        def alone() -> Sampler:
            bare = random_model(bench.config, bench.device, bench.dtype, names)
            sampler = quantized_sampler(bare, layouts[-1], backends[0], bench.device)
            print(
                f"  loaded alone: peak while loading {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB",
                file=sys.stderr,
            )
            return sampler

        bits = {"llm": 4, "expert_mlp": 4 if "expert" in layouts[-1] else 16}
        bench.run(f"graphed W4A8 {layouts[-1]} {backends[0]}, alone in memory", alone, one, bits, backends[0])


if __name__ == "__main__":
    main()
