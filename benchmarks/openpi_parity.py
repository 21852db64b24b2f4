r"""Our network beside openpi's own PyTorch code, same random weights, same inputs: how far apart are the
actions?

    git clone https://github.com/Physical-Intelligence/openpi           # 15a9616
    python -m venv parity && parity/bin/pip install torch transformers==4.53.2 safetensors numpy
    cp -r openpi/src/openpi/models_pytorch/transformers_replace/* \
        parity/lib/python3*/site-packages/transformers/
    PYTHONPATH=src parity/bin/python benchmarks/openpi_parity.py --openpi openpi/src [--dtype bfloat16]

Their model files are used unchanged; only sizes are made small (two vision layers, three transformer layers)
so that it runs in seconds. JAX, flax and the rest of openpi are not needed: what the model files import from
there is replaced by two-line stand-ins. Three cameras of which one is masked, ragged prompts padded to 200,
batch 2. Last line: JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

import torch
from safetensors.torch import save_model

from qlibero.policies.pi05.checkpoint import load_model, open_checkpoint, tensor_table
from qlibero.policies.pi05.config import GemmaConfig, Pi05Config, SiglipConfig
from qlibero.policies.pi05.model import Pi05Model, cast, initialize
from qlibero.policies.pi05.sampler import Sampler

CONFIG = Pi05Config(
    llm=GemmaConfig(64, 3, 96, 8, 32),
    expert=GemmaConfig(48, 3, 64, 8, 32),
    vision=SiglipConfig(64, 2, 96, 16, 14, 56),
    vocab_size=300,
)
LIVE = (23, 9)


def upstream(source: Path, precision: str) -> torch.nn.Module:
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
        spec = importlib.util.spec_from_file_location(
            full, source / "openpi" / "models_pytorch" / f"{name}.py"
        )
        loaded[name] = sys.modules[full] = importlib.util.module_from_spec(spec)
        setattr(modules["openpi.models_pytorch"], name, loaded[name])
        spec.loader.exec_module(loaded[name])

    def small_paligemma(config):
        v = config.vision_config
        v.hidden_size, v.num_hidden_layers, v.num_attention_heads = (
            CONFIG.vision.width,
            CONFIG.vision.depth,
            CONFIG.vision.num_heads,
        )
        v.intermediate_size, v.image_size, v.projection_dim = (
            CONFIG.vision.mlp_dim,
            CONFIG.vision.image_size,
            CONFIG.llm.width,
        )
        config.text_config.vocab_size = config._vocab_size = config.image_token_index = CONFIG.vocab_size
        return paligemma(config=config)

    def small_gemma(config):
        config.vocab_size = CONFIG.vocab_size
        return causal(config=config)

    module = loaded["gemma_pytorch"]
    paligemma, causal = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM
    module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM = small_paligemma, small_gemma
    settings = types.SimpleNamespace(
        pi05=True,
        paligemma_variant="llm",
        action_expert_variant="expert",
        dtype=precision,
        action_dim=CONFIG.action_dim,
        action_horizon=CONFIG.action_horizon,
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
    return model


def through_a_file(theirs: torch.nn.Module, ours: Pi05Model) -> bool:
    """Save as openpi's converter does (safetensors.torch.save_model, tied weights once), read with our strict
    loader."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(theirs, str(Path(folder) / "model.safetensors"))
        (Path(folder) / "config.json").write_text(json.dumps({"action_horizon": CONFIG.action_horizon}))
        checkpoint = open_checkpoint(Path(folder))
        print(
            f"tensors as openpi saves them: {len(checkpoint.shapes)}; {'; '.join(tensor_table(checkpoint).notes)}",
            file=sys.stderr,
        )
        read = load_model(checkpoint, torch.float32, torch.device("cpu")).state_dict()
    precise = {name: t.float() for name, t in theirs.state_dict().items()}
    return checkpoint.config == CONFIG and all(
        torch.equal(read[name], precise[name]) for name in ours.state_dict()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openpi", type=Path, required=True, help="the src directory of an openpi checkout")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    theirs = upstream(args.openpi, args.dtype)
    ours = initialize(Pi05Model(CONFIG), 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.ndim == 1 or "dense" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    wanted = theirs.state_dict()
    unused = {name for name in wanted if "lm_head" in name}
    mismatch = {n for n in ours.state_dict() if n not in wanted} | {
        n for n in wanted if n not in ours.state_dict()
    } - unused
    theirs.load_state_dict(ours.state_dict(), strict=False)
    loaded_exactly = through_a_file(theirs, ours)
    cast(ours, getattr(torch, args.dtype))

    batch, size, padded = 2, CONFIG.vision.image_size, 200
    images = torch.rand(batch, 3, 3, size, size, generator=g) * 2 - 1
    images[:, 2] = -1.0
    tokens = torch.randint(1, CONFIG.vocab_size, (batch, padded), generator=g)
    token_mask = torch.arange(padded)[None] < torch.tensor(LIVE)[:, None]
    noise = torch.randn(batch, CONFIG.action_horizon, CONFIG.action_dim, generator=g)
    actions = torch.randn(noise.shape, generator=g)
    time = torch.tensor([0.3, 0.85])
    cameras = torch.tensor([[True, True, False]] * batch)
    observation = types.SimpleNamespace(
        images=list(images.unbind(1)),
        image_masks=list(cameras.unbind(1)),
        tokens=tokens,
        token_mask=token_mask,
        state=torch.zeros(batch, 32),
    )
    with torch.no_grad():
        expected = theirs.sample_actions("cpu", observation, noise=noise.clone(), num_steps=10)
        loss = theirs.forward(observation, actions, noise=noise.clone(), time=time).float()
        prefix = ours.prefix(images, tokens, token_mask, camera_mask=cameras)
        t = time[:, None, None]
        velocity = ours.velocity(prefix, t * noise + (1 - t) * actions, time)
        our_loss = (velocity - (noise - actions)).square()
    sampler = Sampler(ours)
    got, _ = sampler(images[:, :2], tokens[:, :32], noise, token_mask=token_mask[:, :32])
    result = {
        "openpi": str(args.openpi), "torch": torch.__version__, "dtype": args.dtype, "names_that_differ": sorted(mismatch),
        "their_file_loads_exactly": loaded_exactly,
        "sample_max_abs_difference": float((got - expected).abs().max()), "sample_largest": float(expected.abs().max()),
        "loss_max_abs_difference": float((our_loss - loss).abs().max()), "loss_largest": float(loss.abs().max()),
    }  # fmt: skip
    for key, value in result.items():
        print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
