"""The Wan2.1 text-to-video transformer.

Parameter names and config keys are those of the published diffusers checkpoints (Wan-AI/Wan2.1-T2V-1.3B-Diffusers and
-14B-Diffusers); the architecture is that of Wan (arXiv:2503.20314). Image-to-video is not covered.

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), C channels, H heads, D channels per head,
P = D / 2 rotated pairs, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.attention import AttentionLayers, Stream, cross_attention_, self_attention_
from vramkit.pipelines.layers import (
    FeedForward,
    Modulated,
    PatchEmbedding,
    TextProjection,
    TimestepEmbedding,
    TokenOps,
    sinusoidal_embedding,
)
from vramkit.pipelines.video_transformer import TransformerOutput, VideoTransformer

__all__ = ["WanTransformer3DModel", "WanTransformerBlock", "WanTransformerConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WanTransformerConfig:
    """The keys of a published config.json, with diffusers' defaults (those of the 14B model)."""

    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: None = None
    added_kv_proj_dim: None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # a list in JSON
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if getattr(self, key) is not None:
                raise ConfigError(
                    f"WanTransformer3DModel: {key}={getattr(self, key)!r} belongs to image-to-video checkpoints, "
                    "which are not supported yet; use a text-to-video checkpoint"
                )
        if self.qk_norm != "rms_norm_across_heads":
            raise ConfigError(f"WanTransformer3DModel: qk_norm={self.qk_norm!r}, expected 'rms_norm_across_heads'")
        if len(self.patch_size) != 3:
            raise ConfigError(f"WanTransformer3DModel: patch_size={self.patch_size}, expected three numbers")
        if self.attention_head_dim % 2:
            raise ConfigError(f"WanTransformer3DModel: attention_head_dim={self.attention_head_dim} has to be even")

    @property
    def inner_dim(self) -> int:
        """C."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rotary_channels(self) -> tuple[int, int, int]:
        """Channels of a head that encode frames, rows and columns."""
        plane = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * plane, plane, plane


class WanSelfAttention(AttentionLayers):
    """x += gate * attention(norm(x)), in place."""

    def forward(self, x: Modulated, *, rotary: Tensor, ops: TokenOps) -> Tensor:
        """Update the tokens [B, S, C] in place and return them; rotary is [S, P, 2] fp32."""
        for tokens, norm, gate in x.samples():
            self_attention_([Stream(tokens, norm, self.projections, self.adder(ops, gate), rotary)], ops=ops)
        return x.tokens


class WanCrossAttention(AttentionLayers):
    """x += attention(norm(x), text), in place."""

    def forward(self, x: Tensor, *, norm: Callable[[Tensor], Tensor], text: Tensor, ops: TokenOps) -> Tensor:
        """Update the tokens x [B, S, C] in place and return them; text is [B, T, C]."""
        for tokens, states in zip(x, text, strict=True):
            cross_attention_(Stream(tokens, norm, self.projections, self.adder(ops)), states, ops=ops)
        return x


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the timestep.

    The tokens are updated in place. The three parts are called once each, so that each can be streamed as a whole.
    """

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        channels, eps = config.inner_dim, config.eps
        norm = partial(nn.RMSNorm, channels, eps=eps)
        self.eps = eps
        self.attn1 = WanSelfAttention(channels, config.num_attention_heads, norm=norm)
        self.attn2 = WanCrossAttention(channels, config.num_attention_heads, norm=norm)
        self.norm2 = nn.LayerNorm(channels, eps=eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(channels, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, channels) / channels**0.5)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, rotary: Tensor, ops: TokenOps) -> Tensor:
        """Update the tokens x [B, S, C] in place and return them.

        text is [B, T, C], modulation (of the timestep) [B, 6, C], rotary [S, P, 2] fp32.
        """
        table = self.scale_shift_table.float() + modulation.float()
        shift1, scale1, gate1, shift3, scale3, gate3 = table.unbind(dim=1)  # [B, C] each
        norm = ops.layer_norm
        x = self.attn1(Modulated(x, norm, self.eps, shift1, scale1, gate1), rotary=rotary, ops=ops)
        x = self.attn2(x, norm=self._norm2(ops), text=text, ops=ops)
        (x,) = self.ffn(Modulated(x, norm, self.eps, shift3, scale3, gate3), ops=ops)
        return x

    def _norm2(self, ops: TokenOps) -> Callable[[Tensor], Tensor]:
        """The norm before cross-attention, with its weights in fp32."""
        if isinstance(self.norm2, nn.Identity):
            return self.norm2
        return partial(ops.layer_norm, weight=self.norm2.weight.float(), bias=self.norm2.bias.float(), eps=self.eps)


class WanConditionEmbedder(nn.Module):
    """Timestep and text to what the blocks are conditioned on."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        channels = config.inner_dim
        self.freq_dim = config.freq_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, channels)
        self.time_proj = nn.Linear(channels, 6 * channels)
        self.text_embedder = TextProjection(config.text_dim, channels)

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep [B] and text [B, T, text_dim] -> embedding [B, C], modulation [B, 6, C], text [B, T, C]."""
        time = self.time_embedder(sinusoidal_embedding(timestep, self.freq_dim)).to(text.dtype)
        return time, self.time_proj(F.silu(time)).unflatten(-1, (6, -1)), self.text_embedder(text)


class WanTransformer3DModel(VideoTransformer):
    """Predicts the flow of a latent video from its noisy state, a timestep and text.

    For inference: gradients are not recorded, since the token stream is updated in place.
    """

    config: WanTransformerConfig
    config_class = WanTransformerConfig
    _keep_in_fp32: ClassVar[tuple[str, ...]] = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    skip_layerwise_casting: ClassVar[tuple[str, ...]] = ("patch_embedding", "condition_embedder", "norm")

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__(config)
        channels = config.inner_dim
        self.patch_embedding = PatchEmbedding(config.in_channels, channels, config.patch_size)
        self.condition_embedder = WanConditionEmbedder(config)
        self.blocks = nn.ModuleList([WanTransformerBlock(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(channels, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, channels) / channels**0.5)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """One prediction.

        Args:
            hidden_states: latents [B, in_channels, frames, height, width], in the dtype of the weights.
            timestep: [B] or [1], in the range of the training schedule (0 to 1000).
            encoder_hidden_states: text states [B, T, text_dim], in the dtype of the weights.
            attention_kwargs: None; here because callers of the published model pass it.
            return_dict: False for a plain tuple.

        Returns:
            `.sample` [B, out_channels, frames, height, width].

        Raises:
            ConfigError: sizes that the patches do not divide, more positions than `rope_max_seq_len`, timesteps per
                token, or attention_kwargs.
        """
        config, batch, device = self.config, hidden_states.shape[0], hidden_states.device
        self._check_inputs(timestep, batch, attention_kwargs)
        grid = self._grid(hidden_states, config.patch_size)
        if max(grid) > config.rope_max_seq_len:
            raise ConfigError(f"latents: {grid} patches, at most {config.rope_max_seq_len} along an axis")
        rotary, ops = self._rotary_table(grid, config.rotary_channels, device), self._ops
        time, modulation, text = self.condition_embedder(timestep.expand(batch), encoder_hidden_states)
        x = self.patch_embedding(hidden_states)  # [B, S, C]
        for block in self.blocks:
            x = block(x, text, modulation, rotary, ops)
        shift, scale = (self.scale_shift_table.float() + time.float()[:, None]).unbind(dim=1)  # [B, C] each
        patches = self._head(x, partial(ops.layer_norm, eps=config.eps), scale, shift, self.proj_out)
        sample = self._unpatchify(patches, grid, config.patch_size)
        return TransformerOutput(sample) if return_dict else (sample,)
