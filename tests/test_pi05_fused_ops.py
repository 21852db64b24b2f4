"""Risk: the fused kernels between the matrix products compute something else than the torch they replace.

Run under Triton's interpreter, in a process of its own, because the variable must be set before triton is
imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import torch
from qlibero.policies.pi05.fast import fused_ops
from qlibero.policies.pi05.fast.triton_fused_ops import TritonOps
torch.set_num_threads(1)
cpu = torch.device("cpu")
worst = {dim: fused_ops._compare(TritonOps(), fused_ops.EagerOps(), cpu, torch.float32, dim) for dim in (32, 256)}
print(worst)
assert max(worst.values()) < 2e-6, worst
# most keys masked, a whole stretch of them and the odd ones at the end included
k, v = torch.randn(2, 101, 32), torch.randn(2, 101, 32)
mask = torch.where(torch.arange(101) % 64 < 5, 0.0, -2.3819763e38).expand(2, 1, 101).contiguous()
for length in (10, 91):
    q = torch.randn(2, length, 8, 32)
    eager = fused_ops.EagerOps().attend(q, k, v, mask)
    assert torch.allclose(TritonOps().attend(q, k, v, mask), eager, atol=2e-6), length
# widths that no cut fits are left to torch
x = torch.randn(1, 10, 1152)
linears = [torch.nn.Linear(1152, 64, bias=False).requires_grad_(False) for _ in range(2)]
fused_ops.fuse(*linears)
one, other = (made.gated(x, *linears) for made in (TritonOps(), fused_ops.EagerOps()))
assert torch.allclose(one, other, atol=2e-6)
"""


def test_fused_ops_are_the_torch_they_replace():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
