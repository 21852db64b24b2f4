r"""Our network beside LeRobot's own PyTorch code, same random weights, same inputs: how far apart are the actions?

    git clone https://github.com/huggingface/lerobot && git -C lerobot checkout v0.6.1
    python -m venv parity && parity/bin/pip install torch transformers==5.5.4 safetensors numpy
    PYTHONPATH=src parity/bin/python benchmarks/lerobot_parity.py --lerobot lerobot/src [--family pi0]

Their model files are used unchanged, in small sizes; the rest of LeRobot is not needed: what the model files
import from there is replaced by stand-ins. float32 only: in bfloat16 LeRobot keeps the whole vision tower in
float32, and we keep what openpi keeps. Last line: JSON.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from parity import CONFIG, CONFIGS, Inputs, Upstream, compare, shrink_paligemma

THEIRS = (
    "lerobot.policies.pi05.modeling_pi05",
    "lerobot.policies.pi0.modeling_pi0",
    "lerobot.policies.pi_gemma",
    "lerobot.policies.common.flow_matching",
    "lerobot.policies.common.vla_utils",
)
ELSEWHERE = {
    "OPENPI_ATTENTION_MASK_VALUE": -2.3819763e38,
    "_transformers_available": True,
    "require_package": lambda *_, **__: None,
    "get_safe_dtype": lambda dtype, device: dtype,  # a CPU has float64
}
"""What the model files import from the rest of LeRobot and really use."""


class StandIn(types.ModuleType):
    """A module of LeRobot that is not needed: whatever is asked of it is there, in name only."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return ELSEWHERE.get(name, type(name, (torch.nn.Module,), {}))


class Finder:
    """The modules of THEIRS from the checkout, a `StandIn` for every other."""

    def __init__(self, source: Path):
        self.source = source

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] != "lerobot":
            return None
        if name in THEIRS:
            file = self.source / f"{name.replace('.', '/')}.py"
            return importlib.util.spec_from_file_location(name, file)
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def upstream(source: Path, family: str) -> Upstream:
    """LeRobot's PI05Pytorch or PI0Pytorch in the sizes of CONFIG."""
    sys.meta_path.insert(0, Finder(source))
    module = importlib.import_module(f"lerobot.policies.{family}.modeling_{family}")
    horizon = CONFIGS[family].action_horizon
    paligemma, causal = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def small_gemma(config):
        config.vocab_size = CONFIG.vocab_size
        return causal(config=config)

    sizes = {
        name: module.GemmaConfig(c.width, c.depth, c.mlp_dim, c.num_heads, 1, c.head_dim)
        for name, c in (("llm", CONFIG.llm), ("expert", CONFIG.expert))
    }
    module.get_gemma_config = sizes.__getitem__
    module.PaliGemmaForConditionalGenerationWithPiGemma = lambda config: paligemma(shrink_paligemma(config))
    module.PiGemmaForCausalLM = small_gemma
    settings = types.SimpleNamespace(
        paligemma_variant="llm",
        action_expert_variant="expert",
        image_resolution=(CONFIG.vision.image_size,) * 2,
        dtype="float32",
        freeze_vision_encoder=False,
        train_expert_only=False,
        max_action_dim=CONFIG.action_dim,
        max_state_dim=32,
        chunk_size=horizon,
        num_inference_steps=10,
        min_period=CONFIG.min_period,
        max_period=CONFIG.max_period,
        compile_model=False,
        rtc_config=None,
    )
    model = getattr(module, f"{family.upper()}Pytorch")(settings).eval()

    def seen(i: Inputs) -> tuple:
        return i.images, i.cameras, i.tokens, i.token_mask, *([i.state] if family == "pi0" else [])

    def sample(i: Inputs) -> torch.Tensor:
        return model.sample_actions(*seen(i), noise=i.noise.clone(), num_steps=10)

    def loss(i: Inputs) -> torch.Tensor:
        return model.forward(*seen(i), i.actions, i.noise, i.time)

    policy = torch.nn.Module()
    policy.model = model
    return Upstream(model, sample, loss, policy, {"type": family, "chunk_size": horizon})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lerobot", type=Path, required=True, help="the src directory of a LeRobot checkout")
    parser.add_argument("--family", choices=("pi05", "pi0"), default="pi05")
    args = parser.parse_args()
    import transformers

    about = {"lerobot": str(args.lerobot), "transformers": transformers.__version__}
    compare(upstream(args.lerobot, args.family), "float32", about, args.family)


if __name__ == "__main__":
    main()
