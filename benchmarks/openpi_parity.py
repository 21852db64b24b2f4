r"""Our network beside openpi's own PyTorch code, same random weights, same inputs: how far apart are the actions?

    git clone https://github.com/Physical-Intelligence/openpi           # 15a9616
    python -m venv parity && parity/bin/pip install torch transformers==4.53.2 safetensors numpy
    cp -r openpi/src/openpi/models_pytorch/transformers_replace/* \
        parity/lib/python3*/site-packages/transformers/
    PYTHONPATH=src parity/bin/python benchmarks/openpi_parity.py --openpi openpi/src [--dtype bfloat16]

Their model files are used unchanged, in small sizes. JAX, flax and the rest of openpi are not needed: what the
model files import from there is replaced by two-line stand-ins. Last line: JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import torch
from parity import CONFIG, CONFIGS, Inputs, Upstream, compare, shrink_paligemma


def upstream(source: Path, precision: str, family: str) -> Upstream:
    """openpi's PI0Pytorch(pi05=True) in the sizes of CONFIG."""
    sizes = {"llm": CONFIG.llm, "expert": CONFIG.expert}
    gemma = types.ModuleType("openpi.models.gemma")
    gemma.get_config = lambda name: types.SimpleNamespace(**sizes[name].__dict__, num_kv_heads=1)
    tools = types.ModuleType("openpi.shared.image_tools")
    modules = {
        "openpi": types.ModuleType("openpi"),
        "openpi.models": types.ModuleType("openpi.models"),
        "openpi.models.gemma": gemma,
        "openpi.shared": types.ModuleType("openpi.shared"),
        "openpi.shared.image_tools": tools,
        "openpi.models_pytorch": types.ModuleType("openpi.models_pytorch"),
    }
    modules["openpi.models"].gemma, modules["openpi.shared"].image_tools = gemma, tools
    sys.modules.update(modules)
    loaded = {}
    for name in ("gemma_pytorch", "preprocessing_pytorch", "pi0_pytorch"):
        full = f"openpi.models_pytorch.{name}"
        spec = importlib.util.spec_from_file_location(full, source / "openpi" / "models_pytorch" / f"{name}.py")
        loaded[name] = sys.modules[full] = importlib.util.module_from_spec(spec)
        setattr(modules["openpi.models_pytorch"], name, loaded[name])
        spec.loader.exec_module(loaded[name])

    def small_gemma(config):
        config.vocab_size = CONFIG.vocab_size
        return causal(config=config)

    module = loaded["gemma_pytorch"]
    paligemma, causal = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM
    module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM = (
        lambda config: paligemma(config=shrink_paligemma(config)),
        small_gemma,
    )
    settings = types.SimpleNamespace(
        pi05=family == "pi05",
        paligemma_variant="llm",
        action_expert_variant="expert",
        dtype=precision,
        action_dim=CONFIG.action_dim,
        action_horizon=CONFIGS[family].action_horizon,
        pytorch_compile_mode=None,
    )
    model = loaded["pi0_pytorch"].PI0Pytorch(settings).eval()
    model._preprocess_observation = lambda o, train=False: (
        o.images,
        o.image_masks,
        o.tokens,
        o.token_mask,
        o.state,
    )
    model.paligemma_with_expert.gemma_expert.model.config._attn_implementation = "eager"

    def observation(i: Inputs) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            images=i.images,
            image_masks=i.cameras,
            tokens=i.tokens,
            token_mask=i.token_mask,
            state=i.state,
        )

    def sample(i: Inputs) -> torch.Tensor:
        return model.sample_actions("cpu", observation(i), noise=i.noise.clone(), num_steps=10)

    def loss(i: Inputs) -> torch.Tensor:
        return model.forward(observation(i), i.actions, noise=i.noise.clone(), time=i.time)

    return Upstream(model, sample, loss, model, {"action_horizon": CONFIGS[family].action_horizon})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openpi", type=Path, required=True, help="the src directory of an openpi checkout")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--family", choices=("pi05", "pi0"), default="pi05")
    args = parser.parse_args()
    compare(upstream(args.openpi, args.dtype, args.family), args.dtype, {"openpi": str(args.openpi)}, args.family)


if __name__ == "__main__":
    main()
