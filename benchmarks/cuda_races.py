"""Small instances of every CUDA kernel, once each, for compute-sanitizer:

    PYTHONPATH=src compute-sanitizer --tool racecheck python benchmarks/cuda_races.py      # and --tool memcheck

One and two warpgroups, K cut by clusters of one, two and four, K shorter than the pipeline, several tiles a CTA, tokens
that fill no group of eight; the Hadamard quantizers with several tokens a CTA. Every result is compared with int_ref or
torch. The tool's last line says how many hazards it found; this program's status says whether the numbers were right.
"""

from __future__ import annotations

import sys

import torch

from qlibero.kernels import cuda_hadamard, cuda_w4a8, load
from qlibero.kernels.contract import quantize_activations
from qlibero.kernels.cuda_plan import Plan
from qlibero.kernels.hadamard import fold
from qlibero.kernels.tiled import untile
from qlibero.quant.transform import Transform


def products() -> None:
    """Plans forced upon small products, on a pretended GPU of 3 multiprocessors so that each CTA has several tiles."""
    kernel = load("cuda_w4a8")
    cuda_w4a8._processors = lambda _: 3
    for plan, m, n, k in (
        (Plan(1, 16, 1), 41, 512, 256),
        (Plan(2, 48, 1), 110, 1024, 512),
        (Plan(2, 112, 1), 230, 512, 1536),
        (Plan(1, 80, 2), 70, 256, 1408),
        (Plan(2, 32, 2), 60, 512, 256),
        (Plan(1, 16, 4), 10, 256, 2048),
    ):
        cuda_w4a8.choose = lambda *_, plan=plan: plan
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        w = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        acc = kernel.accumulate(x.cuda(), kernel.pack(w.cuda())).cpu()
        check(f"{plan} {m}x{n}x{k}", torch.equal(acc.long(), x.long() @ w.long().T))


def transforms() -> None:
    """Every width, gated too; a grid of one for the widest, so that its CTA has several tokens."""
    cuda_hadamard._processors = lambda _: 1
    for k in (*cuda_hadamard.SMALL, cuda_hadamard.WIDE):
        m, s = 7, fold(torch.ones(k), torch.where(torch.arange(k) % 3 == 0, -1.0, 1.0))
        x = torch.randn(m, 2 * k).bfloat16()
        gate, up = x.cuda().split(k, 1)
        for given, value in ((None, x[:, :k].float()), (up, None)):
            if value is None:
                value = (torch.nn.functional.gelu(gate, approximate="tanh") * up).float().cpu()
            expected, scales = quantize_activations(Transform(hadamard=s).forward(value))
            for in_tiles in (False, True):
                codes, found = cuda_hadamard.smooth_hadamard(gate, s.cuda(), up=given, in_tiles=in_tiles)
                codes = untile(codes, m) if in_tiles else codes
                same = torch.equal(codes.cpu(), expected) and torch.equal(found.cpu(), scales)
                check(f"hadamard {k}{'' if given is None else ' gated'}{' in tiles' if in_tiles else ''}", same)


def check(name: str, same: bool) -> None:
    print(f"{name}: {'right' if same else 'WRONG'}", flush=True)
    wrong.append(name) if not same else None


if __name__ == "__main__":
    wrong: list[str] = []
    torch.manual_seed(0)
    products()
    transforms()
    sys.exit(bool(wrong))
