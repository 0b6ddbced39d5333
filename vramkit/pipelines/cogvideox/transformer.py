"""The CogVideoX text-to-video transformer, in its sinusoidal (2B) and rotary (5B, 1.5) variants.

Parameter names and config keys are those of the published diffusers checkpoints (zai-org/CogVideoX-2b, CogVideoX-5b and
CogVideoX1.5-5B); the architecture is that of CogVideoX (arXiv:2408.06072). Image-to-video is not covered.

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), T text tokens, C channels, P rotated pairs per
head, E channels of the timestep embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.attention import AttentionLayers, Stream, self_attention_
from vramkit.pipelines.cogvideox.positions import add_sinusoids_, rotary_table
from vramkit.pipelines.layers import FeedForward, Modulated, TimestepEmbedding, TokenOps, sinusoidal_embedding
from vramkit.pipelines.video_transformer import Grid, TransformerOutput, VideoTransformer

__all__ = ["CogVideoXBlock", "CogVideoXTransformer3DModel", "CogVideoXTransformerConfig"]

# What all text-to-video checkpoints have in common.
_FIXED: Mapping[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CogVideoXTransformerConfig:
    """The keys of a published config.json, with diffusers' defaults (those of the 2B model).

    `dropout` is read and has no effect. `sample_height`, `sample_width` and `sample_frames` are what the checkpoint was
    trained on, in latents and in frames.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int | None = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None  # frames per patch in 1.5
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self) -> None:
        for key, value in _FIXED.items():
            if getattr(self, key) != value:
                raise ConfigError(f"CogVideoXTransformer3DModel: {key}={getattr(self, key)!r}, expected {value!r}")
        if self.ofs_embed_dim is not None or self.use_learned_positional_embeddings:
            raise ConfigError(
                f"CogVideoXTransformer3DModel: ofs_embed_dim={self.ofs_embed_dim}, use_learned_positional_embeddings="
                f"{self.use_learned_positional_embeddings} belong to image-to-video checkpoints, which are not supported; "
                "use a text-to-video checkpoint"
            )
        if self.out_channels is None:
            raise ConfigError("CogVideoXTransformer3DModel: out_channels=None, expected a number")
        if self.attention_head_dim % 16 and self.use_rotary_positional_embeddings:
            raise ConfigError(
                f"CogVideoXTransformer3DModel: attention_head_dim={self.attention_head_dim}, expected a multiple of 16 "
                "for rotary positions"
            )

    @property
    def inner_dim(self) -> int:
        """C."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Grid:
        """Frames, rows and columns of latents in a patch."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size


class AdaptiveNorm(nn.Module):
    """The modulation of a layer norm by the timestep, which takes the weights of the norm in as well.

    n w + b is scaled by 1 + s and shifted by t: that is n scaled by w (1 + s) and shifted by b (1 + s) + t, so that each
    token passes one norm and no more.
    """

    offload_unit: ClassVar[bool] = True

    def __init__(self, config: CogVideoXTransformerConfig, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.linear = nn.Linear(config.time_embed_dim, outputs * config.inner_dim)
        self.norm = nn.LayerNorm(config.inner_dim, config.norm_eps, config.norm_elementwise_affine)

    def forward(self, time: Tensor) -> list[Tensor]:
        """Time embedding [B, E] -> shift, scale and what else there is, [B, C] fp32 each; per stream if there are six."""
        table = list(self.linear(F.silu(time)).float().chunk(self.outputs, dim=1))
        if self.norm.elementwise_affine:
            weight, bias = self.norm.weight.float(), self.norm.bias.float()
            for at in range(0, self.outputs, 3):
                shift, scale = table[at], 1 + table[at + 1]
                table[at : at + 2] = bias * scale + shift, weight * scale - 1
        return table


class CogVideoXAttention(AttentionLayers):
    """Text and video attend to one another: tokens += gate * attention(norm(tokens)) in both, in place."""

    def forward(
        self, text: Modulated, video: Modulated, *, rotary: Tensor | None, ops: TokenOps
    ) -> tuple[Tensor, Tensor]:
        """Update the tokens of both streams in place and return them; rotary [S, P, 2] fp32 turns those of the video."""
        for (words, text_norm, text_gate), (tokens, norm, gate) in zip(text.samples(), video.samples(), strict=True):
            streams = (
                Stream(words, text_norm, self.projections, self.adder(ops, text_gate)),
                Stream(tokens, norm, self.projections, self.adder(ops, gate), rotary),
            )
            self_attention_(streams, ops=ops)
        return text.tokens, video.tokens


class CogVideoXBlock(nn.Module):
    """Joint attention and a joint feed-forward, both modulated by the timestep, text and video differently.

    The tokens are updated in place. The parts are called once each, so that each can be streamed as a whole.
    """

    def __init__(self, config: CogVideoXTransformerConfig) -> None:
        super().__init__()
        channels = config.inner_dim
        self.eps = config.norm_eps
        self.norm1 = AdaptiveNorm(config, 6)
        self.attn1 = CogVideoXAttention(
            channels,
            config.num_attention_heads,
            norm=partial(nn.LayerNorm, config.attention_head_dim, eps=1e-6),
            bias=config.attention_bias,
        )
        self.norm2 = AdaptiveNorm(config, 6)
        self.ff = FeedForward(channels, 4 * channels)

    def forward(
        self, text: Tensor, video: Tensor, time: Tensor, rotary: Tensor | None, ops: TokenOps
    ) -> tuple[Tensor, Tensor]:
        """Update text [B, T, C] and video [B, S, C] in place and return them; time is [B, E], rotary [S, P, 2] fp32."""
        text, video = self.attn1(*self._modulated(text, video, self.norm1(time), ops), rotary=rotary, ops=ops)
        text, video = self.ff(*self._modulated(text, video, self.norm2(time), ops), ops=ops)
        return text, video

    def _modulated(
        self, text: Tensor, video: Tensor, table: list[Tensor], ops: TokenOps
    ) -> tuple[Modulated, Modulated]:
        """Text and video with their halves of the table: that of the video comes first."""
        return (
            Modulated(text, ops.layer_norm, self.eps, *table[3:]),
            Modulated(video, ops.layer_norm, self.eps, *table[:3]),
        )


class _PatchConvolution(nn.Conv2d):
    """A convolution whose stride is its kernel, as a matrix product on patches that are cut out already."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class CogVideoXPatchEmbed(nn.Module):
    """Video and text states to tokens."""

    def __init__(self, config: CogVideoXTransformerConfig) -> None:
        super().__init__()
        self.patch, channels, size = config.patch, config.inner_dim, config.patch_size
        self.proj: nn.Module
        if config.patch_size_t is None:
            self.proj = _PatchConvolution(config.in_channels, channels, size, stride=size, bias=config.patch_bias)
        else:  # which has a bias in any case
            self.proj = nn.Linear(config.in_channels * config.patch_size_t * size**2, channels)
        self.text_proj = nn.Linear(config.text_embed_dim, channels)

    def forward(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Text [B, T, text_embed_dim] and video [B, frames, in_channels, height, width] -> [B, T, C], [B, S, C]."""
        batch, frames, channels, height, width = video.shape
        pf, ph, pw = self.patch
        cut = video.reshape(batch, frames // pf, pf, channels, height // ph, ph, width // pw, pw)
        patches = cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # [B, F R L, in pf ph pw]
        return self.text_proj(text), self.proj(patches)


class CogVideoXTransformer3DModel(VideoTransformer):
    """Predicts, from the noisy state of a latent video, a timestep and text, what leads to the clean one.

    For inference: gradients are not recorded, since the tokens are updated in place.
    """

    config: CogVideoXTransformerConfig
    config_class = CogVideoXTransformerConfig
    skip_layerwise_casting: ClassVar[tuple[str, ...]] = ("patch_embed", "norm")

    def __init__(self, config: CogVideoXTransformerConfig) -> None:
        super().__init__(config)
        channels = config.inner_dim
        self.patch_embed = CogVideoXPatchEmbed(config)
        self.time_embedding = TimestepEmbedding(channels, config.time_embed_dim)
        self.transformer_blocks = nn.ModuleList([CogVideoXBlock(config) for _ in range(config.num_layers)])
        self.norm_final = nn.LayerNorm(channels, config.norm_eps, config.norm_elementwise_affine)
        self.norm_out = AdaptiveNorm(config, 2)
        assert config.out_channels is not None
        pf, ph, pw = config.patch
        self.proj_out = nn.Linear(channels, pf * ph * pw * config.out_channels)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        *,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """One prediction.

        Args:
            hidden_states: latents [B, frames, in_channels, height, width], in the dtype of the weights.
            encoder_hidden_states: text states [B, T, text_embed_dim], in the dtype of the weights.
            timestep: [B] or [1], in the range of the training schedule (0 to 999).
            attention_kwargs: None; here because callers of the published model pass it.
            return_dict: False for a plain tuple.

        Returns:
            `.sample` [B, frames, out_channels, height, width].

        Raises:
            ConfigError: sizes that the patches do not divide, or that 1.5 has no positions for, or attention_kwargs.
        """
        config, batch, ops = self.config, hidden_states.shape[0], self._ops
        self._check_inputs(timestep, batch, attention_kwargs)
        if hidden_states.ndim != 5 or hidden_states.shape[2] != config.in_channels:
            raise ConfigError(
                f"latents: got shape {tuple(hidden_states.shape)}, expected [batch, frames, {config.in_channels}, height, "
                "width]"
            )
        grid = self._grid(hidden_states.transpose(1, 2), config.patch)
        features = sinusoidal_embedding(timestep.expand(batch), config.inner_dim)
        time = self.time_embedding(features.to(hidden_states.dtype))
        text, video = self.patch_embed(encoder_hidden_states, hidden_states)
        rotary = self._positions(grid, video)
        for block in self.transformer_blocks:
            text, video = block(text, video, time, rotary, ops)
        shift, scale = self.norm_out(time)
        patches = self._head(video, self._final_norm, scale, shift, self.proj_out)
        sample = self._unpatchify(patches, grid, config.patch, channels_first=True).transpose(1, 2)
        return TransformerOutput(sample) if return_dict else (sample,)

    def _positions(self, grid: Grid, video: Tensor) -> Tensor | None:
        """Tell the tokens [B, S, C] where they are: by a rotary table, kept until another grid is asked for, or in place."""
        config, device = self.config, video.device
        if not config.use_rotary_positional_embeddings:
            spatial, temporal = config.spatial_interpolation_scale, config.temporal_interpolation_scale
            add_sinusoids_(video, grid, spatial_scale=spatial, temporal_scale=temporal)
            return None
        trained = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        if config.patch_size_t is not None and (grid[1] > trained[0] or grid[2] > trained[1]):
            raise ConfigError(
                f"latents: {grid[1]} rows and {grid[2]} columns of patches, at most {trained[0]} and {trained[1]} are "
                "supported by this checkpoint"
            )
        if self._rotary is None or self._rotary[0] != (grid, device):
            fitted = trained if config.patch_size_t is None else None
            table = rotary_table(grid, config.attention_head_dim, trained=fitted, device=device)
            self._rotary = (grid, device), table
        return self._rotary[1]

    def _final_norm(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The two norms before the head."""
        return self._ops.layer_norm(self.norm_final(tokens), weight, bias, self.config.norm_eps)
