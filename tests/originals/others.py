"""CogVideo, Mochi, Open-Sora."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from originals.flux import SelfAttention
from originals.parts import WIDTH, Original, RMSNorm, attend, mlp, rotated, tokens_and
from originals.wan import WanAttention

__all__ = ["MODELS"]


class SatLayer(nn.Module):
    """Not called by anybody: mixins do what a layer does, with its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(WIDTH, 3 * WIDTH), "dense": nn.Linear(WIDTH, WIDTH)}
        )
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(WIDTH, 4 * WIDTH), "out": nn.Linear(4 * WIDTH, WIDTH)})


class SatTransformer(nn.Module):
    """CogVideo: layers are run by a table of functions, which mixins fill with methods of their own."""

    def __init__(self, handlers: dict[str, Callable[..., torch.Tensor]]) -> None:
        super().__init__()
        self.hooks = handlers
        self.layers = nn.ModuleList(SatLayer() for _ in range(4))
        self.final_layernorm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.hooks["position_embedding_forward"](x, **kwargs)
        for layer_id in range(len(self.layers)):
            run = partial(self.hooks["layer_forward"], layer_id=layer_id, **kwargs)
            x = checkpoint(run, x, use_reentrant=False)
        return self.final_layernorm(x)


class AdaLnMixin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adaLN_modulations = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 4 * WIDTH)) for _ in range(4))
        self.query_layernorm_list = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.transformer: Any = None

    def layer_forward(self, x: torch.Tensor, *, layer_id: int, emb: torch.Tensor) -> torch.Tensor:
        layer = self.transformer.layers[layer_id]
        shift, scale, gate, gate2 = self.adaLN_modulations[layer_id](emb)[:, None].chunk(4, -1)
        attention_input = layer.input_layernorm(x) * (1 + scale) + shift
        x = x + gate * self.transformer.hooks["attention_forward"](attention_input, layer_id=layer_id)
        return x + gate2 * self.transformer.hooks["mlp_forward"](layer.post_attention_layernorm(x), layer_id=layer_id)

    def attention_forward(self, x: torch.Tensor, *, layer_id: int) -> torch.Tensor:
        attention = self.transformer.layers[layer_id].attention
        q, k, v = attention["query_key_value"](x).chunk(3, -1)
        return attention["dense"](attend(self.query_layernorm_list[layer_id](q), k, v))

    def mlp_forward(self, x: torch.Tensor, *, layer_id: int) -> torch.Tensor:
        layer = self.transformer.layers[layer_id].mlp
        return layer["out"](F.gelu(layer["dense_h_to_4h"](x)))


class PositionMixin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, 64, WIDTH), requires_grad=False)
        self.register_buffer("freqs_sin", torch.randn(64, WIDTH))

    def position_embedding_forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x + self.pos_embedding[:, : x.shape[1]].to(x.dtype) + self.freqs_sin[: x.shape[1]].sin()


class CogVideo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixins = nn.ModuleDict({"adaln_layer": AdaLnMixin(), "pos_embed": PositionMixin()})
        names = ("layer_forward", "attention_forward", "mlp_forward", "position_embedding_forward")
        found = {name: getattr(mixin, name) for mixin in self.mixins.values() for name in names if hasattr(mixin, name)}
        self.transformer = SatTransformer(found)
        # A reference, and no child, of the mixin.
        self.mixins["adaln_layer"].__dict__["transformer"] = self.transformer
        self.time_embed = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.transformer(x, emb=self.time_embed(t[:, None].expand(-1, 16)))
        return y


class MochiAttention(nn.Module):
    def __init__(self, *, update_y: bool) -> None:
        super().__init__()
        self.qkv_x, self.qkv_y = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj_x, self.proj_y = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH) if update_y else nn.Identity()
        self.q_norm_x = RMSNorm()

    def run_qkv_y(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(y, self.qkv_y.weight).chunk(3, -1)

    def prepare_qkv(self, x: torch.Tensor, y: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.qkv_x(x).chunk(3, -1)
        q, k = rotated(self.q_norm_x(q), rope), rotated(k, rope)
        return tuple(torch.cat(pair, 1) for pair in zip((q, k, v), self.run_qkv_y(y), strict=True))

    def forward(self, x: torch.Tensor, y: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = attend(*self.prepare_qkv(x, y, rope)).split([x.shape[1], y.shape[1]], 1)
        return self.proj_x(a), self.proj_y(b)


class MochiBlock(nn.Module):
    def __init__(self, *, update_y: bool) -> None:
        super().__init__()
        self.update_y = update_y
        self.mod_x, self.mod_y = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, (4 if update_y else 1) * WIDTH)
        self.attn, self.mlp_x = MochiAttention(update_y=update_y), mlp()
        if update_y:
            self.mlp_y = mlp()

    def ff_block_x(self, x: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x + self.mlp_x(x * (1 + scale)) * torch.tanh(gate)

    def forward(self, x: torch.Tensor, c: torch.Tensor, y: torch.Tensor, rope: torch.Tensor) -> Any:
        c = F.silu(c)[:, None]
        scale, gate, scale2, gate2 = self.mod_x(c).chunk(4, -1)
        mods = self.mod_y(c).chunk(4, -1) if self.update_y else [self.mod_y(c)]
        a, b = self.attn(x * (1 + scale), y * (1 + mods[0]), rope)
        x = self.ff_block_x(x + a * torch.tanh(gate), scale2, gate2)
        return x, y + b * torch.tanh(mods[1]) + self.mlp_y(y * (1 + mods[2])) * mods[3] if self.update_y else y


class Mochi(nn.Module):
    """Frequencies are learned, a pool attends to the prompt, and the last block does not write the text."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_frequencies = nn.Parameter(torch.randn(3, WIDTH // 2))
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.blocks = nn.ModuleList(MochiBlock(update_y=index < 3) for index in range(4))

    def prepare(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            position = torch.ones(x.shape[1], 3, device=x.device).cumsum(0)
            angles = torch.einsum("nd,df->nf", position, self.pos_frequencies.to(torch.float32))
        k, v = self.to_kv(y).chunk(2, -1)
        return attend(self.to_q(y.mean(1, keepdim=True)), k, v)[:, 0], torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c, rope = self.prepare(x, y)
        for block in self.blocks:
            x, y = block(x, c, y, rope=rope)
        return x


class Rotary(nn.Module):
    """Asked by method, and never called: its frequencies are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.randn(WIDTH // 2), requires_grad=False)

    def rotate_queries_or_keys(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(x.shape[1], device=self.freqs.device), self.freqs.float())
        return rotated(x, torch.polar(torch.ones_like(angles), angles))


class StditBlock(nn.Module):
    def __init__(self, rotate: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)
        self.attn, self.cross_attn, self.mlp = SelfAttention(), WanAttention(), mlp()
        self.rotate = rotate

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table[None] + t.reshape(-1, 6, WIDTH)).chunk(6, 1)
        q, k, v = self.attn.qkv(x * (1 + scale) + shift).chunk(3, -1)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        x = x + gate * self.attn.proj(attend(q, k, v))
        x = x + self.cross_attn(x, None, y)
        return x + gate2 * self.mlp(x * (1 + scale2) + shift2)


class OpenSora(nn.Module):
    """Blocks of space and of time in turn; a null prompt that is a buffer of the embedder."""

    def __init__(self) -> None:
        super().__init__()
        self.rope = Rotary()
        self.y_embedder = nn.Linear(24, WIDTH)
        self.y_embedder.register_buffer("y_embedding", torch.randn(2, 24))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.spatial_blocks = nn.ModuleList(StditBlock(None) for _ in range(3))
        self.temporal_blocks = nn.ModuleList(StditBlock(self.rope.rotate_queries_or_keys) for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = self.y_embedder(self.y_embedder.y_embedding[None].expand(x.shape[0], -1, -1))
        times = self.t_block(t)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in (spatial, temporal):
                x = checkpoint(block, x, y, times, use_reentrant=False)
        return x


MODELS: dict[str, Original] = {
    "CogVideo": (CogVideo, tokens_and((2,))),
    "Mochi": (Mochi, tokens_and((2, 5, WIDTH))),
    "Open-Sora": (OpenSora, tokens_and((2, WIDTH))),
}
