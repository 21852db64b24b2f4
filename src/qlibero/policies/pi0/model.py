"""pi0 in plain PyTorch, of pi0.5's parts. State-dict names equal openpi's `PI0Pytorch(pi05=False)`.

The state token sees the images, the text and itself, and neither the actions nor the flow time: so it goes through the
action expert once a chunk, and its keys and values join the prefix. To a flow step a pi0 then looks like a pi0.5 with
one more live position; its mask need not be block-causal, as upstream's is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from qlibero.policies.pi05.config import GemmaConfig, Pi05Config, SiglipConfig
from qlibero.policies.pi05.layers import project, rope_tables
from qlibero.policies.pi05.model import Pi05Model, Prefix


@dataclass(frozen=True)
class Pi0Config(Pi05Config):
    """A whole pi0. The state, padded with zeros to `state_dim`, is one token of the action expert's."""

    suffix_state_tokens: ClassVar[int] = 1
    action_horizon: Annotated[int, Field(ge=0, le=1000)] = 50
    max_token_len: Annotated[int, Field(ge=2, le=4096)] = 48
    state_dim: Annotated[int, Field(ge=1, le=1024)] = 32

    @property
    def prefix_state_tokens(self) -> int:
        """State tokens among the language model's."""
        return 0


PI0_FULL = Pi0Config(
    llm=GemmaConfig(2048, 18, 16384),
    expert=GemmaConfig(1024, 18, 4096),
    vision=SiglipConfig(),
    vocab_size=257152,
)
"""The published pi0: 3,238.0 M parameters, 776 tensors, 420 linear layers."""


class Pi0Model(Pi05Model):
    """See the module's docstring."""

    adaptive = False

    def make_heads(self) -> None:
        width = self.config.expert.width
        self.state_proj = nn.Linear(self.config.state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def time_condition(self, t: Tensor) -> Tensor:
        """The sinusoids themselves: they meet the actions in `embed_actions`."""
        return self.time_embedding(t).to(self.action_time_mlp_in.weight.dtype)

    def embed_actions(self, x_t: Tensor, condition: Tensor) -> Tensor:
        """Noisy actions (N, H, D) and the flow time's sinusoids (N or 1, width) as the expert's tokens."""
        actions = self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype))
        time = condition[:, None].expand(actions.shape[0], actions.shape[1], -1)
        joined = self.action_time_mlp_in(torch.cat([actions, time], -1))
        tokens: Tensor = self.action_time_mlp_out(F.silu(joined))
        return tokens.to(self.stream_dtype)

    def prefix(
        self,
        images: Tensor,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        *,
        state: Tensor | None = None,
        camera_mask: Tensor | None = None,
    ) -> Prefix:
        """See `Pi05Model.prefix`; state (B, state_dim), normalised, then padded with zeros."""
        return self.add_state(super().prefix(images, tokens, token_mask, camera_mask=camera_mask), state)

    def add_state(self, prefix: Prefix, state: Tensor | None) -> Prefix:
        """The prefix with the state token's keys and values behind it, in every layer.

        The last layer stops after them, as the language model's does: nothing else of the token is ever read.
        """
        if state is None:
            raise ValueError("this network has a state token; pass state (B, state_dim)")
        x = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None].to(self.stream_dtype)
        mask = None if prefix.mask is None else F.pad(prefix.mask, (0, 1))
        cos, sin = rope_tables(prefix.length[:, None], self.config.expert.head_dim, x.dtype)
        kv = []
        last = len(self.expert.layers) - 1
        for i, ((prefix_k, prefix_v), layer) in enumerate(zip(prefix.kv, self.expert.layers, strict=True)):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            if i == last:
                k, v = attention.kv(y, cos, sin)
            else:
                q, k, v = attention.qkv(y, cos, sin)
            k, v = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
            kv.append((k, v))
            if i < last:
                x = x + project(self.attend(q, k, v, mask), attention.o_proj)[0]
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        return replace(prefix, kv=kv, mask=mask, length=prefix.length + 1)
