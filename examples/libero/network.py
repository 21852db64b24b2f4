"""The compact pi0.5: its size, its vocabulary, and the losses that train it.

Besides the flow-matching loss there are auxiliary ones with privileged targets. A network of this size
gets almost no localisation signal from actions alone; where objects are, which one the instruction means
and where it should go is what it has to learn first. Their heads are dropped at export.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlibero.policies.pi05.config import ConvConfig, GemmaConfig, Pi05Config
from qlibero.policies.pi05.model import Pi05Model, initialize
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.sim import suites

SIZE = 128  # pixels of a camera frame
HORIZON = 10  # actions of a chunk
KINDS = (
    "alphabet_soup",
    "basket",
    "bbq_sauce",
    "butter",
    "chocolate_pudding",
    "cream_cheese",
    "ketchup",
    "milk",
    "orange_juice",
    "salad_dressing",
    "tomato_sauce",
    "akita_black_bowl",
    "cookies",
    "glazed_rim_porcelain_ramekin",
    "plate",
    "wine_bottle",
    "flat_stove",
    "wooden_cabinet",
    "wine_rack",
    "gripper",
)
FLOW_SAMPLES = 4  # noise/time draws per observation: spreads the cost of the prefix
MAX_WORDS = 24


def vocabulary() -> WordTokenizer:
    """Every word of every LIBERO instruction, sorted: closed, and the same for whoever trains."""
    words = {
        word
        for suite in suites.SUITES.values()
        for task in range(suite.tasks)
        for word in split_words(suites.task_language(suite.name, task))
    }
    return WordTokenizer(sorted(words))


def architecture(size: str, vocab_size: int) -> Pi05Config:
    """ "small" (6 M parameters) is the shipped policy's size, "tiny" (0.4 M) is for tutorials and tests."""
    width, depth, mlp, expert, expert_mlp, heads, channels, vision = {
        "small": (256, 6, 768, 192, 512, 8, (32, 64, 128), 256),
        "tiny": (64, 2, 128, 64, 128, 4, (16, 24, 32), 64),
    }[size]
    return Pi05Config(
        llm=GemmaConfig(width, depth, mlp, num_heads=heads, head_dim=32),
        expert=GemmaConfig(expert, depth, expert_mlp, num_heads=heads, head_dim=32),
        vision=ConvConfig(channels=channels, width=vision, image_size=SIZE, keypoints=len(KINDS)),
        vocab_size=vocab_size,
        action_dim=7,
        action_horizon=HORIZON,
        max_token_len=MAX_WORDS + 1,
        state_dim=8,
    )


class Learner(nn.Module):
    """The network with its auxiliary heads; `forward` gives the losses of a batch."""

    def __init__(self, config: Pi05Config, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.policy = initialize(Pi05Model(config), seed)
        width = config.llm.width
        self.side = config.vision.image_size // 16
        self.pointer = nn.Linear(width, 2 * 3)  # for each aim: a logit and an offset at every image token
        self.reader = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 12))

    def forward(self, batch: dict[str, Tensor], noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Scalar losses by name, for augmented `batch` (see `dataset.py`), noise (B, K, H, 7) and time (B, K)."""
        prefix = self.policy.prefix(batch["images"], batch["tokens"], batch["token_mask"], state=batch["states"])
        actions = batch["chunks"][:, None]
        x_t = time[..., None, None] * noise + (1 - time[..., None, None]) * actions
        velocity = self.policy.velocity(prefix, x_t.flatten(0, 1), time.flatten())
        flow = F.mse_loss(velocity, (noise - actions).flatten(0, 1))
        pointer, pointed = self._pointer_losses(prefix.hidden, batch["aim_pixels"])
        return {
            "flow": flow,
            "heat": _heat_loss(prefix.vision.heat, batch["keypoints"]),
            "pointer": pointer,
            "pointed_px": pointed * 64,  # mean error in pixels of a 128 px frame
            "reader": F.smooth_l1_loss(
                self.reader(self._state_token(prefix.hidden)).float(), batch["reading"], beta=0.2
            ),
        }

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """What is minimised."""
        return losses["flow"] + 0.1 * losses["heat"] + 0.1 * losses["pointer"] + 0.5 * losses["reader"]

    def _state_token(self, hidden: Tensor) -> Tensor:
        return hidden[:, 2 * self.policy.config.vision.tokens]

    def _pointer_losses(self, hidden: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
        """Which image token shows each aim, and where in it. aims (B, cameras, aims, 2), NaN = not in view."""
        count, tokens = self.side**2, self.policy.config.vision.tokens
        cameras = torch.stack([hidden[:, i * tokens : i * tokens + count] for i in range(2)], 1)
        out = self.pointer(cameras).float().unflatten(-1, (2, 3)).transpose(2, 3)  # (B, cameras, aims, count, 3)
        grid = _grid(self.side, hidden.device)
        visible = aims.isfinite().all(-1)
        aims = aims.nan_to_num()
        spread = 1.0 / self.side
        target = (-((aims[..., None, :] - grid) ** 2).sum(-1) / (2 * spread**2)).softmax(-1)
        cross_entropy = -(target * out[..., 0].log_softmax(-1)).sum(-1)
        point = (out[..., 0].softmax(-1)[..., None] * (grid + out[..., 1:] / self.side)).sum(-2)
        error = (point - aims).norm(dim=-1)
        weight = visible.float() / visible.sum().clamp_min(1)
        return ((cross_entropy + 4 * error) * weight).sum(), (error * weight).sum().detach()


def _grid(side: int, device) -> Tensor:
    """Centres (side², 2) of a square grid in [-1, 1], (row, column)."""
    axis = (torch.arange(side, device=device) + 0.5) * (2 / side) - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)


def _heat_loss(heat: Tensor, keypoints: Tensor) -> Tensor:
    """Cross-entropy of heat maps (B, cameras, K, h, w) with Gaussians (1.2 cells) at (B, cameras, K, I, 2)."""
    grid = _grid(heat.shape[-1], heat.device)
    there = keypoints.isfinite().all(-1)
    squared = ((keypoints.nan_to_num()[..., None, :] - grid) ** 2).sum(-1)
    bumps = torch.exp(-squared / (2 * (2.4 / heat.shape[-1]) ** 2)) * there[..., None]
    target = bumps.sum(-2)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-6)
    loss = -(target * heat.float().flatten(-2).log_softmax(-1)).sum(-1)
    seen = there.any(-1).float()
    return (loss * seen).sum() / seen.sum().clamp_min(1)
