"""Latency, memory and phases of a pi0.5 policy call, from eager bf16 to CUDA-graphed W4A8, beside the physical floor.

    python benchmarks/policy_latency.py                      # full size on a GPU, reduced size on a CPU
    python benchmarks/policy_latency.py --variants llm/smooth_hadamard/cuda_w4a8 --cameras 2 --batches 1 --json out.json

Random weights: time and memory do not depend on their values, and no checkpoint is needed. Every variant is
the same sampler on the same shapes (unless asked otherwise 10 flow steps, 10 action tokens, 32 text positions of
which three quarters are live); W4A8 stands beside *graphed* bf16, so that what graphs gain is never sold as what fewer
bits gain. `--extra` adds 1, 2 and 4 flow steps, each with graphs of its own, and the shape that flash-vla publishes
(3 views, 200 text positions, 50 action tokens). LAYOUT/rtn/fp8 is FP8 W8A8 in the same graphs (`fp8_linears.py`,
layouts llm, vision, llm+vision), and `+fp8_vision` behind another layout puts the vision tower in FP8 beside it. The
quantized variants are made as a run makes them, from an artifact file (of random numbers, in a temporary folder: 1.2 GB
at full size), and have their method's whole online work before every quantized input: DuQuant's two block rotations
and a permutation, smooth_hadamard's one transform, nothing for rtn.

Beside the call from host tensors to host tensors ("p50"), at two cameras: a call as a run makes it, from frames that
simulators have resized to actions in the robot's units ("a run's"), and one from whole camera frames, as a server's
clients send them ("a server's").

Memory: "static" is what is allocated when calls are over, "peak" the most during a call, "loading" the most
while the variant was made. The variants beside full precision share the card with it. The one that is made
"straight from its artifact" has the card to itself: the linears that the artifact replaces never exist in
bf16, the rest is made tensor by tensor.

Rows are Markdown on stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch
from floors import PEAKS, floor_ms

from qlibero.config.quantization import Quant
from qlibero.kernels.hadamard import fold
from qlibero.policies.base import Observation
from qlibero.policies.pi05.config import PI05_FULL, GemmaConfig, Pi05Config, SiglipConfig
from qlibero.policies.pi05.fast.fused_ops import EagerOps
from qlibero.policies.pi05.linears import Network
from qlibero.policies.pi05.model import Pi05Model, is_float32_island
from qlibero.policies.pi05.normalize import Statistics
from qlibero.policies.pi05.policy import CAMERAS, Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.sampler import Sampler
from qlibero.policies.pi05.tokenizer import WordTokenizer
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import Artifact, LayerRecord, build, load, save
from qlibero.quant.layout import select

REDUCED = Pi05Config(
    llm=GemmaConfig(128, 3, 256, 8, 32),
    expert=GemmaConfig(64, 3, 128, 8, 32),
    vision=SiglipConfig(64, 2, 128, 4, 14, 56),
    vocab_size=512,
)
TEXT = 32
BLOCK = 64
SPOKEN = {"state": 8, "actions": 7}
ON_GPU = ",".join(
    (
        "llm/duquant/triton_w4a8",
        "llm/rtn/cuda_w4a8",
        "llm/smooth_hadamard/triton_w4a8",
        "llm/smooth_hadamard/cuda_w4a8",
        "llm+expert_mlp/smooth_hadamard/cuda_w4a8",
    )
)
Made = tuple[str, str]  # layout, method: what an artifact is made for
Variant = tuple[str, str, str]  # layout, method, backend
SHA256 = "0" * 64  # of weights that are in no file


@dataclass(frozen=True)
class Shape:
    """What a call is given, and how many flow steps it takes."""

    cameras: int
    batch: int
    text: int
    horizon: int
    steps: int


FLASH_VLA = Shape(cameras=3, batch=1, text=200, horizon=50, steps=10)
OTHER_STEPS = (1, 2, 4)


@dataclass
class Row:
    """One measured variant and shape; times in ms, memory in GiB."""

    variant: str
    cameras: int
    batch: int
    text: int
    horizon: int
    steps: int
    p50_ms: float
    p95_ms: float
    p99_less_min_ms: float
    phases_ms: dict[str, float]
    floor_ms: float | None
    static_gib: float | None
    peak_gib: float | None
    loading_gib: float | None = None
    run_ms: float | None = None
    server_ms: float | None = None
    kernels: str = ""
    prepare_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def random_model(
    config: Pi05Config, device: torch.device, dtype: torch.dtype, skip: frozenset[str] = frozenset()
) -> Pi05Model:
    """The network with random weights, made on the device tensor by tensor; linears in `skip` stay on meta."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Pi05Model(config)
    for name, parameter in list(model.named_parameters()):
        if name.removesuffix(".weight") in skip:
            continue
        value = torch.empty(parameter.shape, dtype=torch.float32 if is_float32_island(name) else dtype, device=device)
        value.normal_(0, 0.02, generator=generator)
        if name.endswith("norm.weight") and "layer_norm" in name:
            value.add_(1.0)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def random_artifact(
    config: Pi05Config, layout: str, device: torch.device, path: Path, method: str = "duquant"
) -> Artifact:
    """A W4A8 artifact of random numbers for the linears of `layout`, written, and opened as a run opens it;
    `method` duquant, smooth_hadamard, or rtn, which has nothing to do before its quantizer."""
    generator = torch.Generator(device).manual_seed(1)
    spec = Quant(method=method, layout=layout, block_size=min(BLOCK, config.expert.width))
    with torch.device("meta"):
        model = Pi05Model(config)
    once = torch.randn(
        spec.block_size, spec.block_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    base = torch.linalg.qr(once)[0].to(device, torch.bfloat16)

    def rotations(width: int) -> torch.Tensor:
        """(G, B, B): one random rotation with other signs in every block, which is a rotation again."""
        shape = (width // spec.block_size, 1, spec.block_size)
        return base * (torch.randint(0, 2, shape, generator=generator, device=device) * 2 - 1).bfloat16()

    tensors: dict[str, torch.Tensor] = {}
    records = []
    for group, choices in select(Network(model), spec).groups().items():
        width = model.get_submodule(choices[0].name).in_features
        order = torch.randperm(width, generator=generator, device=device, dtype=torch.int32)
        factors = {}
        if method == "duquant":
            factors = {"first": rotations(width), "order": order, "second": rotations(width)}
        elif method == "smooth_hadamard":
            factors = {"hadamard": fold(torch.ones(width, device=device), order % 2 * 2 - 1)}
        tensors |= {f"{group}.{factor}": value.cpu() for factor, value in factors.items()}
        for choice in choices:
            rows = model.get_submodule(choice.name).out_features
            packed = torch.randint(0, 256, (rows, width // 2), generator=generator, device=device, dtype=torch.uint8)
            tensors[f"{choice.name}.codes"] = packed.cpu()
            tensors[f"{choice.name}.scales"] = torch.full((rows,), 0.02 / 4.6).bfloat16()
            records.append(
                LayerRecord(
                    choice.name,
                    group,
                    out_features=rows,
                    in_features=width,
                    weight_bits=4,
                    activation_bits=8,
                    executed=choice.executed,
                    method=method,
                    rounding="nearest",
                    tried={},
                    sqnr_db=None,
                    max_error=None,
                    outlier_before=None,
                    outlier_after=None,
                    codes_bytes=packed.nbytes,
                    scales_bytes=2 * rows,
                    transform_bytes=0,
                )
            )
    about = {"data_sha256": "random", "kept_in_full_precision": []}
    return load(save(build(spec, SHA256, about, tuple(records), {}, tensors), path))


def quantized_sampler(
    model: Pi05Model, artifact: Artifact, backend: str, graphs: bool, fp8_vision: bool = False
) -> Sampler:
    """The sampler of `model` with the artifact's linears on `backend`, put together by the code of a run."""
    full = Pi05Policy(
        "random",
        model,
        PROFILES["openpi"],
        {},
        WordTokenizer([]),
        batch_size=1,
        flow_steps=model.config.flow_steps,
        identity={"sha256": SHA256},
    )
    quantized = quantize_policy(full, artifact, backend).model
    return fp8_sampler(quantized, "vision", graphs) if fp8_vision else Sampler(quantized, graphs=graphs)


def compiled(sampler: Sampler) -> Sampler:
    """The sampler with its phases through torch.compile, which fuses by itself; the flow one Euler step at a time."""
    sampler.layer_ops, sampler.layer_ops_reason = EagerOps(), "torch ops, fused by the compiler"
    sampler._vision = torch.compile(sampler._vision)
    sampler._prefix = torch.compile(sampler._prefix)
    sampler.step = torch.compile(sampler.step)
    return sampler


def at(sampler: Sampler, shape: Shape) -> Sampler:
    """The sampler of the same network for that many action tokens and flow steps."""
    if (sampler.model.config.action_horizon, sampler.steps) == (shape.horizon, shape.steps):
        return sampler
    twin = copy.copy(sampler.model)  # shares every module
    twin.config = replace(twin.config, action_horizon=shape.horizon)
    return Sampler(twin, shape.steps, graphs=sampler.graphs)


def inputs(config: Pi05Config, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Pinned host tensors, as a policy call has them."""
    cameras, batch, text = shape.cameras, shape.batch, shape.text
    g = torch.Generator().manual_seed(2)
    size = config.vision.image_size
    made = {
        "images": torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=g),
        "tokens": torch.randint(1, config.vocab_size, (batch, text), generator=g),
        "noise": torch.randn(batch, config.action_horizon, config.action_dim, generator=g),
        "token_mask": (torch.arange(text) < text * 3 // 4).expand(batch, text).contiguous(),
    }
    return {k: v.pin_memory() for k, v in made.items()} if device.type == "cuda" else made


def measure(
    name: str,
    sampler: Sampler,
    shape: Shape,
    device: torch.device,
    repeats: int,
    bits: dict[str, int],
    kernels: str = "",
) -> tuple[Row, torch.Tensor]:
    """Time one variant at one shape: the median call from host tensors to host tensors, and each phase's median."""
    cuda = device.type == "cuda"
    started = time.perf_counter()
    config = replace(sampler.model.config, flow_steps=shape.steps)
    given = inputs(config, shape, device)
    noise = given.pop("noise")
    for _ in range(3):
        out, _ = sampler(given["images"], given["tokens"], noise, token_mask=given["token_mask"])
    prepare_s = time.perf_counter() - started
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
        *astuple(shape),
        round(statistics.median(times), 3),
        round(times[min(len(times) - 1, int(0.95 * len(times)))], 3),
        round(times[min(len(times) - 1, int(0.99 * len(times)))] - times[0], 3),
        {key: round(statistics.median(p[key] for p in phases), 3) for key in phases[0]},
        peaks and round(floor_ms(config, shape.cameras, shape.batch, shape.text, bits, peaks), 2),
        gib(torch.cuda.memory_allocated) if cuda else None,
        gib(torch.cuda.max_memory_allocated) if cuda else None,
        kernels=kernels,
        prepare_s=round(prepare_s, 1),
    )
    return row, out


def from_frames(sampler: Sampler, batch: int, text: int, repeats: int) -> tuple[float, float]:
    """Median ms of a call from frames that are resized already, and from camera frames, to the robot's actions."""
    config = sampler.model.config
    words = [f"w{i}" for i in range(text * 3 // 4 - 1)]
    units = {name: Statistics("quantile", -np.ones(n), np.ones(n), 1e-6, 1e-6) for name, n in SPOKEN.items()}
    policy = Pi05Policy(
        "random",
        sampler.model,
        PROFILES["openpi"],
        units,
        WordTokenizer(words),
        batch_size=batch,
        flow_steps=config.flow_steps,
        identity={"sha256": SHA256},
    )
    policy._sampler = sampler
    rng, found = np.random.default_rng(2), []
    noise = rng.standard_normal((batch, *policy.noise_shape), dtype=np.float32)
    whole = [
        Observation(*rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8), np.zeros(8, np.float32), " ".join(words))
        for _ in range(batch)
    ]
    wanted = policy.frame_format
    resized = [replace(o, image=wanted.of(o.image), wrist_image=wanted.of(o.wrist_image)) for o in whole]
    for seen in (resized, whole):
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            policy.infer(seen, noise)
            times.append((time.perf_counter() - started) * 1e3)
        found.append(round(statistics.median(times[1:]), 3))
    return found[0], found[1]


def gib(measure: Callable[[], int]) -> float:
    return round(measure() / 2**30, 2)


COLUMNS = (
    "variant", "cameras", "batch", "text", "actions", "steps", "p50", "p95", "p99 - min", "a run's", "a server's",
    "vision", "prefix", "flow",
    "floor", "static GiB", "peak GiB", "loading GiB", "notes",
)  # fmt: skip


def show(cells: Iterable[Any]) -> None:
    """One line of the table."""
    print(f"| {' | '.join('–' if cell is None else str(cell) for cell in cells)} |", file=sys.stderr, flush=True)


def cells(row: Row) -> list[Any]:
    phases = [row.phases_ms.get(name) for name in ("vision", "prefix", "flow")]
    return [
        row.variant,
        row.cameras,
        row.batch,
        row.text,
        row.horizon,
        row.steps,
        row.p50_ms,
        row.p95_ms,
        row.p99_less_min_ms,
        row.run_ms,
        row.server_ms,
        *phases,
        row.floor_ms,
        row.static_gib,
        row.peak_gib,
        row.loading_gib,
        "; ".join(row.notes),
    ]


class Bench:
    """The variants in their order, and what they answered."""

    def __init__(self, config: Pi05Config, device: torch.device, repeats: int, shapes: list[Shape], extra: list[Shape]):
        self.config, self.device, self.repeats, self.shapes, self.extra = config, device, repeats, shapes, extra
        self.cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.word = "bf16" if self.cuda else "float32"
        self.rows: list[Row] = []
        self.answers: dict[tuple[str, Shape], torch.Tensor] = {}

    def run(
        self,
        name: str,
        make: Callable[[], Sampler],
        shapes: list[Shape],
        bits: dict[str, int],
        kernels: str = "",
    ) -> None:
        """Measure one variant; a variant that cannot run here says why and the rest goes on."""
        self.clean()
        try:
            sampler = make()
            loading = gib(torch.cuda.max_memory_allocated) if self.cuda else None
            for shape in shapes:
                row, out = measure(name, at(sampler, shape), shape, self.device, self.repeats, bits, kernels)
                row.loading_gib = loading
                if shape.cameras == CAMERAS and shape in self.shapes:
                    row.run_ms, row.server_ms = from_frames(sampler, shape.batch, shape.text, self.repeats)
                row.notes.append(sampler.layer_ops_reason)
                if not bool(torch.isfinite(out).all()):
                    row.notes.append("ANSWER NOT FINITE")
                self.answers[name, shape] = out
                self.rows.append(row)
                show(cells(row))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}"[:400], file=sys.stderr, flush=True)
            self.rows.append(
                Row(
                    name,
                    *(0, 0, 0, 0, 0),
                    *(0.0, 0.0, 0.0),
                    {},
                    *(None, None, None),
                    kernels=kernels,
                    notes=[f"{type(error).__name__}: {error}"[:400]],
                )
            )

    def compare(self, one: str, other: str) -> None:
        """Whether two variants answered the same at every shape both ran."""
        for (name, shape), answer in self.answers.items():
            twin = self.answers.get((other, shape))
            if name == one and twin is not None:
                worst = float((answer - twin).abs().max())
                said = (
                    "EQUAL"
                    if worst == 0
                    else f"differ by at most {worst:.2e} (largest value {float(twin.abs().max()):.2f})"
                )
                text = f"answers of {one} and {other}, {shape.cameras} cameras, batch {shape.batch}: {said}"
                where = (one, *astuple(shape))
                row = next(r for r in self.rows if (r.variant, r.cameras, r.batch, r.text, r.horizon, r.steps) == where)
                row.notes.append(text)
                print(text, file=sys.stderr, flush=True)

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", default=None, help=f"LAYOUT/METHOD/BACKEND, comma-separated; default {ON_GPU}")
    parser.add_argument("--cameras", default="2,1,3", help="comma-separated (default: %(default)s)")
    parser.add_argument("--batches", default=None, help="comma-separated (default: 1,8,16 on a GPU, 1,2 on a CPU)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compiled full precision too, last because it compiles for minutes (default: on a GPU)",
    )
    parser.add_argument("--steps", type=int, default=10, help="flow steps (default: %(default)s)")
    parser.add_argument("--horizon", type=int, default=10, help="action tokens (default: %(default)s)")
    parser.add_argument("--text", type=int, default=TEXT, help="text positions (default: %(default)s)")
    parser.add_argument(
        "--extra",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rows of 1, 2 and 4 flow steps, and of flash-vla's shape (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="also write the document here")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    cameras, batches = args.cameras if cuda else "2", args.batches or ("1,8,16" if cuda else "1,2")
    shapes = [
        Shape(int(c), int(b), args.text, args.horizon, args.steps)
        for b in batches.split(",")
        for c in cameras.split(",")
    ]
    extra = [replace(shapes[0], steps=steps) for steps in OTHER_STEPS if steps != args.steps] + [FLASH_VLA]
    config = replace(PI05_FULL if cuda else REDUCED, flow_steps=args.steps, action_horizon=args.horizon)
    bench = Bench(config, device, args.repeats or (30 if cuda else 5), shapes, extra if args.extra else [])
    asked = (args.variants or (ON_GPU if cuda else "llm/duquant/fake,llm+expert_mlp/duquant/fake")).split(",")
    variants = [tuple(variant.split("/")) for variant in asked]
    if any(len(variant) != 3 for variant in variants):
        parser.error(f"--variants {args.variants}: write LAYOUT/METHOD/BACKEND, such as llm/smooth_hadamard/cuda_w4a8")
    show(COLUMNS)
    show("---" for _ in COLUMNS)
    with torch.inference_mode(), TemporaryDirectory(prefix="policy_latency") as folder:
        artifacts = {
            made: random_artifact(
                bench.config,
                made[0].removesuffix(FP8_VISION),
                device,
                Path(folder) / f"{'.'.join(made)}.safetensors",
                made[1],
            )
            for made in dict.fromkeys(variant[:2] for variant in variants if variant[2] != "fp8")
        }
        if variants[-1][:2] in artifacts:
            straight_from_its_artifact(bench, artifacts, variants[-1])
        beside_full_precision(bench, artifacts, variants)
        if cuda if args.compile is None else args.compile:
            compiled_full_precision(bench)
    document = {
        "benchmark": "policy_latency",
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "driver_cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "horizon": bench.config.action_horizon,
        "flow_steps": bench.config.flow_steps,
        "text_positions": args.text,
        "rows": [asdict(row) for row in bench.rows],
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


FULL = {"llm": 16, "expert_mlp": 16}


def w4(layout: str) -> dict[str, int]:
    """Weight bits for the floor."""
    return {"llm": 4, "expert_mlp": 4 if "expert" in layout else 16, "vision": 8 if FP8_VISION in layout else 16}


FP8_VISION = "+fp8_vision"  # behind a layout: the vision tower in FP8 beside it


def fp8_sampler(model: Pi05Model, layout: str, graphs: bool) -> Sampler:
    """The sampler of `model` with the language model, the vision tower or both in FP8."""
    from fp8_linears import fp8_model

    return Sampler(fp8_model(model, llm="llm" in layout, vision="vision" in layout), graphs=graphs)


def beside_full_precision(bench: Bench, artifacts: dict[Made, Artifact], variants: list[Variant]) -> None:
    """Full precision eager and graphed, and every variant while it stays in memory, as in a run. Each variant's answer
    is held against its `fake` twin's at the first shape."""
    one, cuda = bench.shapes[:1], bench.cuda
    model = random_model(bench.config, bench.device, bench.dtype)
    eager = f"eager {bench.word}"
    bench.run(eager, lambda: Sampler(model), one, FULL)
    if cuda:
        bench.run("graphed bf16", lambda: Sampler(model, graphs=True), [*bench.shapes, *bench.extra], FULL)
        bench.compare("graphed bf16", eager)

    def run(variant: Variant, shapes: list[Shape]) -> None:
        layout, method, backend = variant
        if backend == "fp8":
            bits = {"llm": 8 if "llm" in layout else 16, "expert_mlp": 16, "vision": 8 if "vision" in layout else 16}
            bench.run(
                called(bench, variant), lambda: fp8_sampler(model, layout, cuda), shapes, bits, "torch._scaled_mm"
            )
            return
        bench.run(
            called(bench, variant),
            lambda: quantized_sampler(model, artifacts[layout, method], backend, cuda, FP8_VISION in layout),
            shapes,
            w4(layout),
            backend,
        )

    for variant in variants:
        run(variant, [*bench.shapes, *bench.extra])
    for made in artifacts:
        real = [variant for variant in variants if variant[:2] == made and variant[2] != "fake"]
        twin = (*made, "fake")
        if real and twin not in variants:
            run(twin, one)
        for variant in real:
            bench.compare(called(bench, variant), called(bench, twin))


def called(bench: Bench, variant: Variant) -> str:
    """The row's name."""
    layout, method, backend = variant
    bits = "W8A8" if backend == "fp8" else "W4A8"
    return f"{'graphed ' if bench.cuda else ''}{bits} {layout} {method} {backend}"


def straight_from_its_artifact(bench: Bench, artifacts: dict[Made, Artifact], variant: Variant) -> None:
    """W4A8 with the card to itself, before all else: what the artifact replaces never exists in full precision."""
    layout, method, backend = variant
    artifact = artifacts[layout, method]
    replaced = frozenset(layer.name for layer in artifact.layers)

    def make() -> Sampler:
        rest = random_model(bench.config, bench.device, bench.dtype, replaced)
        return quantized_sampler(rest, artifact, backend, bench.cuda, FP8_VISION in layout)

    bench.run(f"{called(bench, variant)}, straight from its artifact", make, bench.shapes[:1], w4(layout), backend)


def compiled_full_precision(bench: Bench) -> None:
    """Full precision through torch.compile, alone and inside the same CUDA graphs as the others."""

    def make(graphs: bool) -> Sampler:
        return compiled(Sampler(random_model(bench.config, bench.device, bench.dtype), graphs=graphs))

    bench.run(f"compiled {bench.word}", lambda: make(False), bench.shapes[:1], FULL)
    if bench.cuda:
        bench.run("compiled and graphed bf16", lambda: make(True), bench.shapes[:1], FULL)


if __name__ == "__main__":
    main()
