"""What a card's data sheet allows a pi0.5 policy call to take, bf16 and with the language model in W4A8:

    PYTHONPATH=src python benchmarks/floors.py [--cameras 2] [--text 32] [--batches 1,8]

Bytes or operations of the matrix products, whichever takes longer, a phase at a time. Nothing is measured and no GPU
is needed; `policy_latency.py` prints the floor of its own card beside what that takes.
"""

from __future__ import annotations

import argparse

from qlibero.policies.pi05.config import PI05_FULL, Pi05Config

# (bytes/s, bf16 FLOP/s, int8 OP/s), dense, from the vendors' data sheets; Thor's rates are assumed
PEAKS = {
    "H100 80GB HBM3": (3.35e12, 989e12, 1979e12),
    "H200": (4.8e12, 989e12, 1979e12),
    "A100": (2.04e12, 312e12, 624e12),
    "A40": (0.696e12, 150e12, 299e12),
    "L40S": (0.864e12, 362e12, 733e12),
    "4090": (1.008e12, 165e12, 660e12),
    "5090": (1.792e12, 209e12, 838e12),
    "B200": (8.0e12, 2250e12, 4500e12),
    "Thor": (0.273e12, 258e12, 517e12),
}


def floor_ms(
    config: Pi05Config,
    cameras: int,
    batch: int,
    text: int,
    weight_bits: dict[str, int],
    peaks: tuple[float, float, float],
) -> float:
    """max(bytes, operations) of each phase at the data sheet's peaks, summed. `weight_bits`: {"llm": 4 or 16, …}.

    Matrix products only: live weights are read once a phase (the expert's once a step), activations are free.
    """
    memory, bf16, int8 = peaks
    v, llm, e = config.vision, config.llm, config.expert
    vision_weights = v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + v.width * llm.width
    attention = 2 * llm.num_heads * llm.head_dim * llm.width + 2 * llm.head_dim * llm.width
    llm_weights = (llm.depth - 1) * (attention + 3 * llm.width * llm.mlp_dim) + 2 * llm.head_dim * llm.width
    e_attention = e.depth * (2 * e.num_heads * e.head_dim * e.width + 2 * e.head_dim * e.width)
    e_mlp = e.depth * 3 * e.width * e.mlp_dim
    image, prefix, horizon = cameras * v.tokens, cameras * v.tokens + text, config.action_horizon

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
        phase([(vision_weights, weight_bits.get("vision", 16))], image, vit_attention)
        + phase([(llm_weights, weight_bits["llm"])], prefix, llm_attention)
        + phase(
            [(e_attention, 16), (e_mlp, weight_bits["expert_mlp"])],
            horizon,
            flow_attention,
            config.flow_steps,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cameras", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--text", type=int, default=32, help="text positions (default: %(default)s)")
    parser.add_argument("--batches", default="1,8", help="comma-separated (default: %(default)s)")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    columns = [name for b in batches for name in (f"bf16, batch {b}", "W4A8", ": bf16")]
    print(f"| card | int8 : bf16 | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for card, peaks in PEAKS.items():
        cells = [card, f"{peaks[2] / peaks[1]:.0f}"]
        for batch in batches:
            full, quantized = (
                floor_ms(PI05_FULL, args.cameras, batch, args.text, {"llm": bits, "expert_mlp": 16}, peaks)
                for bits in (16, 4)
            )
            cells += [f"{full:.3g}", f"{quantized:.3g}", f"{quantized / full:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
