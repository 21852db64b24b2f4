"""Sampling a chunk with only the work there is: the same mathematics as `model.prefix` + `model.velocity`, less of it.

Exact in mathematics (float32 differs in the last bits, because products are grouped differently):

- a camera that is not there and padding that no bucket asks for are not computed at all;
- the last language-model layer stops after its keys and values (already so in the model);
- AdaRMS modulations depend on weights and step only: all are computed once a model, not once a step;
- keys and values live in preallocated buffers of which a flow step writes the last H rows;
- q/k/v and gate/up are one matmul each; rotary tables and masks are built once a chunk.

On CUDA each phase (vision, prefix, flow) is one CUDA graph per (batch, text length), see `graphs.py`. Nothing
here allocates in a replayed region: inputs and outputs are the fixed tensors of a `Workspace`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlibero.cache import numba_cache
from qlibero.policies.pi05.fast.fused_ops import choose_layer_ops
from qlibero.policies.pi05.fast.graphs import Stopwatch, graphed
from qlibero.policies.pi05.images import as_floats
from qlibero.policies.pi05.layers import MASKED, fuse, rope_tables
from qlibero.policies.pi05.model import Pi05Model, Prefix
from qlibero.policies.pi05.vision import SiglipAttention

if TYPE_CHECKING:
    from qlibero.policies.pi05.fast.cpu_flow import CpuFlow

MAX_WORKSPACES = 8
"""Shapes kept warm (buffers, graphs); the least recently used one goes first."""


@dataclass
class Workspace:
    """Fixed buffers of one shape: `batch` rows, `text` token positions, masked or not."""

    images: Tensor
    """(B, cameras, 3, S, S) float32 in [-1, 1]."""
    tokens: Tensor
    """(B, T) int64."""
    live: Tensor | None
    """(B, P) bool, or None when every position is live."""
    state: Tensor | None
    """(B, state_dim) float32 normalised."""
    x: Tensor
    """(B, H, D) float32: noise in, actions out."""
    image_tokens: Tensor
    """(B, cameras · tokens, width): between vision and prefix."""
    keys: list[Tensor]
    """A layer: (B, P + H, head_dim)."""
    values: list[Tensor]
    cos: Tensor
    """(B, H, 1, head_dim): rotary tables of the action tokens."""
    sin: Tensor
    mask: Tensor | None
    """(B, 1, P + H) additive, or None."""
    phases: dict[str, Callable[[Workspace], object]]
    """What runs each phase: the plain method, or its captured graph."""


class Sampling:
    """A chunk that a device may still be working on."""

    def __init__(self, out: Tensor, watch: Stopwatch, done: torch.cuda.Event | None):
        self._out, self._watch, self._done = out, watch, done

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._done is None or self._done.query()

    def result(self) -> tuple[Tensor, dict[str, float]]:
        """Actions in the network's own units, (B, H, D) float32 on the CPU, and each phase's milliseconds."""
        if self._done is not None:
            self._done.synchronize()
        return self._out, self._watch.read_ms()


def _cpu_flow(model: Pi05Model, modulations: list[list[tuple[Tensor, Tensor, Tensor]]]) -> tuple[CpuFlow | None, str]:
    """The compiled flow where there can be one, and why or why not."""
    if model.action_in_proj.weight.device.type != "cpu":
        return None, "the model is on a GPU"
    numba_cache()
    try:
        from qlibero.policies.pi05.fast.cpu_flow import CpuFlow
    except ImportError as error:  # the same in torch, slower
        return None, f"numba cannot be imported: {error}"
    unfit = CpuFlow.unfit(model)
    if unfit:
        return None, unfit
    return CpuFlow.of(model, modulations), "float32 on a CPU, the whole expert in full precision"


class Sampler:
    """Samples chunks from a model that is on its device, in its dtype, and will not change any more.

    `graphs` captures CUDA graphs; it needs a CUDA model. Fuses the model's plain linears in place (names are
    kept).
    """

    @torch.inference_mode()
    def __init__(self, model: Pi05Model, flow_steps: int | None = None, *, graphs: bool = False):
        self.model = model.eval()
        self.steps = flow_steps or model.config.flow_steps
        self.graphs = graphs
        self.device = model.action_in_proj.weight.device
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._workspaces: OrderedDict[tuple[int, int, int, bool], Workspace] = OrderedDict()
        for stack in (model.llm, model.expert):
            for layer in stack.layers:
                a, m = layer.self_attn, layer.mlp
                if layer is model.llm.layers[-1]:
                    fuse(a.k_proj, a.v_proj)
                else:
                    fuse(a.q_proj, a.k_proj, a.v_proj)
                fuse(m.gate_proj, m.up_proj)
        for attention in model.vision.modules():
            if isinstance(attention, SiglipAttention):
                fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.layer_ops, self.layer_ops_reason = choose_layer_ops(
            self.device, model.stream_dtype, model.config.llm.head_dim
        )
        self.conditions = [
            model.time_condition(torch.full((1,), 1.0 - step / self.steps, device=self.device))
            for step in range(self.steps)
        ]
        self.modulations = self._modulations()
        self.cpu_flow, self.cpu_flow_reason = _cpu_flow(model, self.modulations)
        self.llm_scales = [
            1.0 + norm.weight.float()
            for layer in model.llm.layers
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]

    def _modulations(self) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """[step][norm] → 1 + scale, shift (float32) and gate (stream dtype), (1, 1, width); norms in order met."""
        table = []
        for condition in self.conditions:
            norms = [
                norm
                for layer in self.model.expert.layers
                for norm in (layer.input_layernorm, layer.post_attention_layernorm)
            ] + [self.model.expert.norm]
            row = []
            for norm in norms:
                scale, shift, gate = (part.float().contiguous() for part in norm.modulation(condition))
                row.append((scale, shift, gate.to(self.model.stream_dtype)))
            table.append(row)
        return table

    def execution(self) -> dict[str, str]:
        """Which implementations run, and why: they differ in last bits and in speed, so results record them."""
        flow = "numba" if self.cpu_flow is not None else "torch in CUDA graphs" if self.graphs else "torch"
        return {
            "flow": flow,
            **({} if self.cpu_flow is None else {"flow_code": self.cpu_flow.code}),
            "flow_reason": self.cpu_flow_reason,
            "glue": self.layer_ops.name,
            "glue_reason": self.layer_ops_reason,
        }

    def workspace(self, batch: int, cameras: int, text: int, masked: bool) -> Workspace:
        """The buffers of one shape, made or found."""
        key = (batch, cameras, text, masked)
        if key in self._workspaces:
            self._workspaces.move_to_end(key)
            return self._workspaces[key]
        if len(self._workspaces) >= MAX_WORKSPACES:
            self._workspaces.popitem(last=False)
        config, device, dtype = self.model.config, self.device, self.model.stream_dtype
        images = cameras * config.vision.tokens
        length = images + config.prefix_state_tokens + text
        total, size = length + config.suffix_state_tokens + config.action_horizon, config.vision.image_size
        llm = config.llm

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        made = Workspace(
            images=new(batch, cameras, 3, size, size, dtype=torch.float32),
            tokens=new(batch, text, dtype=torch.int64),
            live=torch.ones(batch, length, dtype=torch.bool, device=device) if masked else None,
            state=new(batch, config.state_dim, dtype=torch.float32) if config.state_dim else None,
            x=new(batch, config.action_horizon, config.action_dim, dtype=torch.float32),
            image_tokens=new(batch, images, llm.width),
            keys=[new(batch, total, llm.head_dim) for _ in range(llm.depth)],
            values=[new(batch, total, llm.head_dim) for _ in range(llm.depth)],
            cos=new(batch, config.action_horizon, 1, llm.head_dim),
            sin=new(batch, config.action_horizon, 1, llm.head_dim),
            mask=new(batch, 1, total) if masked else None,
            phases={},
        )
        # Calibration listens with forward hooks, which a replayed graph would not call and one path need not
        # know.
        listened = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        prefix = self._prefix_by_model if listened or device.type == "cpu" else self._prefix
        flow = self._flow if listened or self.cpu_flow is None else self._flow_compiled
        for name, phase in (("vision", self._vision), ("prefix", prefix), ("flow", flow)):
            made.phases[name] = graphed(phase, made, self._pool) if self.graphs and not listened else phase
        self._workspaces[key] = made
        return made

    @torch.inference_mode()
    def __call__(
        self,
        images: Tensor,
        tokens: Tensor,
        noise: Tensor,
        *,
        token_mask: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """`begin`, and its result."""
        return self.begin(images, tokens, noise, token_mask=token_mask, state=state).result()

    @torch.inference_mode()
    def begin(
        self,
        images: Tensor,
        tokens: Tensor,
        noise: Tensor,
        *,
        token_mask: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Sampling:
        """Start sampling; a device may still be at an earlier call.

        images (B, cameras, 3, S, S) float32 in [-1, 1], or (B, cameras, S, S, 3) uint8 pixels; tokens (B, T) int64;
        noise (B, H, D) float32; token_mask (B, T) bool or None (all live); state (B, state_dim) normalised. All on
        the CPU or on the device.
        """
        w = self.workspace(images.shape[0], images.shape[1], tokens.shape[1], token_mask is not None)
        watch = Stopwatch(self.device)
        w.images.copy_(as_floats(self._uploaded(images)))
        w.tokens.copy_(self._uploaded(tokens))
        w.x.copy_(self._uploaded(noise))
        if token_mask is not None and w.live is not None:
            w.live[:, w.live.shape[1] - tokens.shape[1] :].copy_(self._uploaded(token_mask))
        if w.state is not None:
            if state is None:
                raise ValueError("this network has a state token; pass state (B, state_dim)")
            w.state.copy_(self._uploaded(state))
        watch.mark("upload")
        for name, phase in w.phases.items():
            phase(w)
            watch.mark(name)
        if self.device.type == "cpu":
            return Sampling(w.x.clone(), watch, None)
        out = torch.empty(w.x.shape, dtype=w.x.dtype, pin_memory=True)
        out.copy_(w.x, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Sampling(out, watch, done)

    def _uploaded(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for what it is at: a copy from pageable memory would."""
        if self.device.type == "cpu" or tensor.device.type != "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    # -- the three phases: from workspace to workspace -------------------------------------------------------------
    def _vision(self, w: Workspace) -> None:
        w.image_tokens.copy_(self.model.embed_images(w.images, self.layer_ops.vision)[0])

    def _prefix_by_model(self, w: Workspace) -> None:
        model, horizon = self.model, w.x.shape[1]
        prefix = model.run_llm(model.embed_prefix(w.image_tokens, w.tokens, w.state), w.live, None)
        prefix = model.add_state(prefix, w.state)
        for (k, v), keys, values in zip(prefix.kv, w.keys, w.values, strict=True):
            keys[:, :-horizon].copy_(k)
            values[:, :-horizon].copy_(v)
        self._prepare_flow(w, prefix.length)

    def _prefix(self, w: Workspace) -> None:
        """`model.run_llm` with fused ops, writing keys and values where the flow reads them."""
        model, ops = self.model, self.layer_ops
        x = model.embed_prefix(w.image_tokens, w.tokens, w.state)
        batch, count, _ = x.shape
        if w.live is None:
            positions = torch.arange(count, device=self.device).expand(batch, count)
            length, mask = positions[:, -1] + 1, None
        else:
            positions, length = w.live.cumsum(1) - 1, w.live.sum(1)
            mask = torch.where(w.live, 0.0, MASKED)[:, None].to(x.dtype)
        cos, sin = rope_tables(positions, model.config.llm.head_dim, x.dtype)
        delta, layers = None, model.llm.layers
        for i, layer in enumerate(layers):
            a, m = layer.self_attn, layer.mlp
            keys, values = w.keys[i][:, :count], w.values[i][:, :count]
            x, y = ops.residual_norm(x, delta, None, self.llm_scales[2 * i], None)
            if i == len(layers) - 1:
                ops.rotated(y, (a.k_proj, a.v_proj), cos, sin, keys, values)
                break
            q = ops.rotated(y, (a.q_proj, a.k_proj, a.v_proj), cos, sin, keys, values)
            delta = ops.parts(ops.attend(q, keys, values, mask), a.o_proj)
            x, y = ops.residual_norm(x, delta, None, self.llm_scales[2 * i + 1], None)
            delta = ops.mlp(y, m.gate_proj, m.up_proj, m.down_proj)
        if model.config.suffix_state_tokens:
            kv = [(keys[:, :count], values[:, :count]) for keys, values in zip(w.keys, w.values, strict=True)]
            with_state = model.add_state(Prefix(kv, mask, length, None, None), w.state)
            for (k, v), keys, values in zip(with_state.kv, w.keys, w.values, strict=True):
                keys[:, count].copy_(k[:, -1])
                values[:, count].copy_(v[:, -1])
            length = with_state.length
        self._prepare_flow(w, length)

    def _prepare_flow(self, w: Workspace, length: Tensor) -> None:
        horizon = w.x.shape[1]
        positions = length[:, None] + torch.arange(horizon, device=self.device)[None]
        cos, sin = rope_tables(positions, self.model.config.llm.head_dim, w.cos.dtype)
        w.cos.copy_(cos)
        w.sin.copy_(sin)
        if w.mask is not None and w.live is not None:
            w.mask[..., : w.live.shape[1]].copy_(torch.where(w.live, 0.0, MASKED)[:, None])

    def _flow(self, w: Workspace) -> None:
        for condition, modulations in zip(self.conditions, self.modulations, strict=True):
            self.step(w, condition, modulations)

    def _flow_compiled(self, w: Workspace) -> None:
        assert self.cpu_flow is not None
        self.cpu_flow.run(w.x, w.keys, w.values, w.cos, w.sin, w.mask)

    def step(self, w: Workspace, condition: Tensor, modulations: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """One Euler step of `w.x`, in place."""
        model, ops, horizon, out = self.model, self.layer_ops, w.x.shape[1], self.model.action_out_proj
        h, delta, gate = model.embed_actions(w.x, condition), None, None
        for i, layer in enumerate(model.expert.layers):
            a, m = layer.self_attn, layer.mlp
            scale, shift, next_gate = modulations[2 * i]
            h, y = ops.residual_norm(h, delta, gate, scale, shift)
            own = w.keys[i][:, -horizon:], w.values[i][:, -horizon:]
            q = ops.rotated(y, (a.q_proj, a.k_proj, a.v_proj), w.cos, w.sin, *own)
            delta = ops.parts(ops.attend(q, w.keys[i], w.values[i], w.mask), a.o_proj)
            scale, shift, gate = modulations[2 * i + 1]
            h, y = ops.residual_norm(h, delta, next_gate, scale, shift)
            delta = ops.mlp(y, m.gate_proj, m.up_proj, m.down_proj)
        scale, shift, _ = modulations[-1]
        _, y = ops.residual_norm(h, delta, gate, scale, shift)
        w.x.sub_(out(y.to(out.weight.dtype)).float(), alpha=1.0 / self.steps)
