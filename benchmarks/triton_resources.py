"""What the Triton kernels cost in registers, shared memory and instructions, for GPUs that are not here.

    python benchmarks/triton_resources.py [--sm 80,86,89,90,100,120]

Triton compiles for a target without a GPU and brings ptxas along, so spills, a shared-memory tile too large for a card,
a contracted (FMA) epilogue or a product that missed the int8 tensor cores show up on any machine. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlibero.kernels import triton_gemm, triton_hadamard, triton_prologue, triton_prologue_kernels
from qlibero.kernels.triton_tiles import BUCKETS, GROUPED, NARROW, Tile
from qlibero.policies.pi05.fast import triton_attention, triton_skinny_gemm
from qlibero.policies.pi05.fast.triton_skinny_gemm import DEEP, GATED, TURNED

INT8_MMA = r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*(?:s32\.s8\.s8|kind::i8)"
SHARED_LIMIT_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments divisible by 16, as Triton finds out at launch
    warps: int = 4
    stages: int = 3
    contract: bool = True  # whether multiply-adds may be fused


def cases() -> Iterator[Case]:
    """Every kernel in the forms that pi0.5 uses."""
    gemm = dict(
        x_ptr="*i8",
        w_ptr="*i8",
        sx_ptr="*fp32",
        sw_ptr="*fp32",
        bias_ptr="*fp32",
        out_ptr="*bf16",
        M="i32",
        N="i32",
        K2="i32",
        STEPS="i32",
    )
    pointers = ("x_ptr", "w_ptr", "sx_ptr", "sw_ptr", "bias_ptr", "out_ptr", "N", "K2")
    for tile in (*(tile for _, tile in BUCKETS), NARROW, GROUPED):
        sizes = dict(BM=tile.tokens, BN=tile.outputs, BK=tile.depth, SWIZZLE=8, USE_ASM=True)
        for scale in (True, False):
            signature = gemm if scale else gemm | {"out_ptr": "*i32"}
            constants = sizes | dict(SCALE=scale, HAS_BIAS=scale, EVEN_K=True)
            yield Case(
                f"gemm {_name(tile)}{'' if scale else ' partial'}",
                triton_gemm.gemm_kernel,
                signature,
                constants,
                pointers,
                tile.warps,
                tile.stages,
                contract=False,
            )
        if tile in (BUCKETS[-1][1], NARROW):
            continue  # which K-groups do not use
        constants = sizes | dict(BK=min(tile.depth, 64), HALF=64, SCALE=True, HAS_BIAS=False)
        yield Case(
            f"grouped {_name(tile)}",
            triton_gemm.grouped_gemm_kernel,
            gemm,
            constants,
            pointers,
            tile.warps,
            tile.stages,
            contract=False,
        )
    yield Case(
        "scale",
        triton_gemm.scale_kernel,
        dict(
            partial_ptr="*i32",
            sx_ptr="*fp32",
            sw_ptr="*fp32",
            bias_ptr="*fp32",
            out_ptr="*bf16",
            M="i32",
            N="i32",
            SLICES="i32",
        ),
        dict(HAS_BIAS=True, BLOCK=1024),
        ("partial_ptr", "sw_ptr", "out_ptr", "N"),
        contract=False,
    )
    floats = dict(
        x_ptr="*bf16",
        scale_ptr="*fp32",
        first_ptr="*bf16",
        order_ptr="*i32",
        inverse_ptr="*i32",
        second_ptr="*bf16",
        y_ptr="*fp32",
        z_ptr="*fp32",
        peak_ptr="*i32",
        arrived_ptr="*i32",
        codes_ptr="*i8",
        s_ptr="*fp32",
        M="i32",
        K="i32",
        groups="i32",
        STRIDE="i32",
        STRIDE_M="i32",
        STRIDE_K="i32",
        clip="fp32",
        limit="fp32",
    )
    aligned = tuple(name for name, kind in floats.items() if kind.startswith("*")) + ("K", "STRIDE", "STRIDE_K")
    flags = dict(
        HAS_SCALE=False,
        HAS_FIRST=True,
        FIRST_SHARED=False,
        HAS_ORDER=True,
        HAS_SECOND=True,
        SECOND_SHARED=False,
        TILED=False,
    )
    for width in (2048, 16384):
        yield Case(
            f"plain {width}",
            triton_prologue_kernels.plain_kernel,
            floats,
            flags | dict(WIDTH=width, HAS_ORDER=False),
            aligned,
            4 if width <= 4096 else 8,
        )
    hadamard = dict(
        x_ptr="*bf16",
        up_ptr="*bf16",
        s_ptr="*bf16",
        codes_ptr="*i8",
        scales_ptr="*fp32",
        **dict.fromkeys(("K", "groups", "x_stride", "up_stride"), "i32"),
        clip="fp32",
        limit="fp32",
    )
    for width in (2048, 16384):
        sizes = dict(B=width, WIDTH=width, STAGES=width.bit_length() - 1, GATED=width > 2048, TILED=False)
        yield Case(
            f"hadamard {width}",
            triton_hadamard.hadamard_kernel,
            hadamard,
            sizes,
            tuple(name for name in hadamard if name.endswith("ptr")) + ("K", "x_stride", "up_stride"),
            triton_hadamard.warps(width),
            contract=False,
        )
    for block in (64, 128):
        warps = 4 if block <= 64 else 8
        yield Case(
            f"small_m B={block}",
            triton_prologue_kernels.fused_small_m_kernel,
            floats,
            flags | dict(B=block, CHUNK=2048),
            aligned,
            warps,
        )
        large_m = flags | dict(BM=triton_prologue.TILE_ROWS, B=block, DEPTH=4096 // block, STRIDE_M=1, WHOLE=True)
        for name, dtype in (("first", "*bf16"), ("first of fp32", "*fp32")):
            yield Case(
                f"{name} B={block}",
                triton_prologue_kernels.first_kernel,
                floats | {"x_ptr": dtype},
                large_m,
                aligned,
                warps,
                contract=False,
            )
        yield Case(
            f"second B={block}", triton_prologue_kernels.second_kernel, floats, large_m, aligned, warps, contract=False
        )
    few = dict(
        x_ptr="*bf16",
        w_ptr="*bf16",
        cos_ptr="*bf16",
        sin_ptr="*bf16",
        q_ptr="*bf16",
        k_ptr="*bf16",
        v_ptr="*bf16",
        mask_ptr="*bf16",
        out_ptr="*bf16",
        parts_ptr="*fp32",
        sums_ptr="*fp32",
        scale="fp32",
        **dict.fromkeys(
            ("rows", "outputs", "k", "keys", "length", "heads", "cb", "ct", "sb", "st", "kb", "kt", "vb", "vt", "mb"),
            "i32",
        ),
    )
    aligned_few = tuple(few.keys() - {"rows", "length", "heads", "keys", "mb", "scale"})
    for name, shape, pair in (("gated", GATED, True), ("parts", DEEP, False), ("rotated", TURNED, True)):
        sizes = dict(
            SPAN=1024, ROWS=16, OUTPUTS=shape.outputs, STEP=shape.step, LANES=shape.warps, GATED=pair, HALF=128
        )
        kernel = triton_skinny_gemm.rotated_kernel if name == "rotated" else triton_skinny_gemm.skinny_gemm_kernel
        yield Case(
            f"few {name}",
            kernel,
            few | ({} if pair else {"out_ptr": "*fp32"}),
            sizes,
            aligned_few,
            shape.warps,
            shape.stages,
        )
    sizes = dict(DIM=256, KEYS=64, MASK=True)
    yield Case("attend few", triton_attention._attend_part, few, sizes | dict(ROWS=16), aligned_few)
    for rows, keys, warps in ((64, 32, 4), (64, 64, 4), (128, 64, 8)):
        sizes |= dict(ROWS=rows, KEYS=keys)
        yield Case(f"attend {rows}x{keys}", triton_attention._attend, few, dict(sizes), aligned_few, warps, stages=2)
    yield Case("quantize", triton_prologue_kernels.quantize_kernel, floats, dict(CHUNK=1024, TILED=False), aligned)


def compile_case(case: Case, sm: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the instructions that matter, of one kernel on one architecture."""
    names = case.kernel.arg_names
    constants = {(names.index(k),): v for k, v in (case.constants | {"OVERLAP": False}).items() if k in names}
    signature = {n: "constexpr" if (i,) in constants else case.signature[n] for i, n in enumerate(names)}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible if n in names}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=case.warps, num_stages=case.stages, enable_fp_fusion=case.contract)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = _ptxas(ptx)
    return {
        "kernel": case.name,
        "sm": sm,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_kib": round(compiled.metadata.shared / 1024, 1),
        "fits": compiled.metadata.shared <= SHARED_LIMIT_KIB[sm] * 1024,
        "int8_mma": sorted(set(re.findall(INT8_MMA, ptx))),
        "fma": len(re.findall(r"\bfma\.rn", ptx)),
        "async_16_byte_loads": ptx.count("cp.async.cg.shared.global"),
    }


def _ptxas(ptx: str) -> tuple[int, int]:
    target = re.search(r"\.target (\S+)", ptx).group(1).split(",")[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        for ptxas in sorted(
            (Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")
        ):  # the first may be too old
            command = [ptxas, "-v", f"--gpu-name={target}", path, "-o", path.with_suffix(".cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        log = done.stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return int(re.search(r"Used (\d+) registers", log).group(1)), spilled


def _name(tile: Tile) -> str:
    return f"{tile.tokens}x{tile.outputs}x{tile.depth} w{tile.warps} s{tile.stages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", default="80,86,89,90,100,120", help="architectures, comma-separated")
    parser.add_argument("--only", default="", help="kernels whose names begin so, comma-separated")
    args = parser.parse_args()
    rows = []
    for sm in map(int, args.sm.split(",")):
        for case in cases():
            if not case.name.startswith(tuple(args.only.split(","))):
                continue
            rows.append(compile_case(case, sm))
            row = rows[-1]
            print(
                f"sm{sm:<4}{row['kernel']:<32} regs {row['registers']:>3}  spilled {row['spilled_bytes']:>3}  "
                f"shared {row['shared_kib']:>5} KiB  "
                f"fma {row['fma']:>4}  cp.async {row['async_16_byte_loads']:>3}  {','.join(row['int8_mma'])}",
                flush=True,
            )
    print(json.dumps({"triton": triton.__version__, "kernels": rows}))


if __name__ == "__main__":
    main()
