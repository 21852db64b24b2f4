"""Codes to multiply and the comparison that kernel tests share: equality of integers, and of output bits."""

from __future__ import annotations

import torch

from qlibero.kernels.contract import activation_limit, epilogue, weight_range
from qlibero.kernels.int_ref import IntRef


def codes_for(n, k, bits, seed, kind="random"):
    low, high = weight_range(bits)
    generator = torch.Generator().manual_seed(seed)
    if kind == "low":
        return torch.full((n, k), low, dtype=torch.int8)
    if kind == "alternating":
        return torch.tensor([low, high], dtype=torch.int8).repeat(n * k // 2 + 1)[: n * k].reshape(n, k)
    return torch.randint(low, high + 1, (n, k), generator=generator, dtype=torch.int8)


def tokens_for(m, k, bits, seed, kind="random"):
    limit = activation_limit(bits)
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "low":
        return torch.full((m, k), limit, dtype=torch.int8)
    if kind == "alternating":
        return (torch.arange(m * k) % 2 * 2 * limit - limit).reshape(m, k).to(torch.int8)
    return torch.randint(-limit, limit + 1, (m, k), generator=generator, dtype=torch.int8)


def assert_same(kernels, x, codes, bits, group_size, seed=0):
    """Accumulators as integers and outputs as bits, with and without bias, in fp32 and bf16."""
    generator = torch.Generator().manual_seed(seed)
    (n, k), m = codes.shape, x.shape[0]
    s_x = torch.rand(m, generator=generator) + 0.01
    s_w = torch.rand((n,) if group_size is None else (n, k // group_size), generator=generator).bfloat16().float()
    bias = torch.randn(n, generator=generator)
    reference = IntRef().pack(codes, bits, group_size)
    acc = IntRef().accumulate(x, reference)
    assert acc.dtype == torch.int32
    for kernel in kernels:
        packed = kernel.pack(codes, bits, group_size)
        found = kernel.accumulate(x, packed)
        assert found.shape == acc.shape and torch.equal(found.double(), acc.double()), kernel.name
        for b in (None, bias):
            for dtype in (torch.float32, torch.bfloat16):
                expected = epilogue(acc, s_x, s_w, b).to(dtype)
                assert torch.equal(kernel.matmul(x, s_x, packed, s_w, b, dtype), expected), (
                    kernel.name,
                    b is None,
                    dtype,
                )
