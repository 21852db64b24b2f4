"""Omega-QVLA's rotation (arXiv 2605.28803): R = U·H in each block, the axes of the weights mixed evenly.

`weight_pca`'s permutation and axes U (both codes descend from one) concentrate a block's energy in its first
coefficients; H, the Hadamard matrix over sqrt(B), deals it to all again. The paper's recipe is this at W4A4, `rounding:
gptq` on the language model and nearest on the expert, with one activation scale per flow step; here each token has its
own.
"""

from __future__ import annotations

from qlibero.config.quantization import Quant
from qlibero.quant.methods import GroupData, weight_pca
from qlibero.quant.methods.hadamard import normalized
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin(
    "svd_hadamard",
    "principal axes of the weights times a Hadamard block (Omega-QVLA, arXiv 2605.28803)",
    data_free=True,
    factors=("order", "second"),
    blocks=True,
    rotates_outputs=True,
    order=5,
)

output_rotation = weight_pca.output_rotation


def fit(data: GroupData, spec: Quant) -> Transform:
    """`weight_pca`'s permutation, and its axes times H."""
    axes = weight_pca.fit(data, spec).tensors()
    mixing = normalized(spec).to(data.peak.device)
    return Transform(order=axes["order"], second=(axes["second"].double() @ mixing).float())
