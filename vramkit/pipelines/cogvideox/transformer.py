"""The CogVideoX transformer, in its sinusoidal (2B) and rotary (5B, 1.5) variants, text-to-video and image-to-video.

Parameter names and config keys are those of the published diffusers checkpoints (zai-org/CogVideoX-2b, CogVideoX-5b,
CogVideoX-5b-I2V, CogVideoX1.5-5B and CogVideoX1.5-5B-I2V); the architecture is that of CogVideoX (arXiv:2408.06072).

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), T text tokens, C channels, P rotated pairs per
head, E channels of the timestep embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.cogvideox.positions import add_sinusoids_, rotary_table
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.networks.attention import AttentionLayers, Stream, self_attention_
from vramkit.pipelines.networks.layers import FeedForward, Modulated, TimestepEmbedding, TokenOps, sinusoidal_embedding
from vramkit.pipelines.networks.video_transformer import Grid, TransformerOutput, VideoTransformer

__all__ = ["CogVideoXBlock", "CogVideoXTransformer3DModel", "CogVideoXTransformerConfig"]

# What all checkpoints have in common.
_FIXED: Mapping[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CogVideoXTransformerConfig(Config):
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
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise ConfigError(
                f"CogVideoXTransformer3DModel: ofs_embed_dim={self.ofs_embed_dim}, expected None or time_embed_dim="
                f"{self.time_embed_dim}, to which it is added"
            )
        if self.use_learned_positional_embeddings and (
            not self.use_rotary_positional_embeddings or self.patch_size_t is not None
        ):
            raise ConfigError(
                "CogVideoXTransformer3DModel: use_learned_positional_embeddings goes with use_rotary_positional_embeddings "
                f"and patch_size_t=None; got {self.use_rotary_positional_embeddings} and {self.patch_size_t}"
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

    @property
    def trained_grid(self) -> Grid:
        """Patches along frames, rows and columns of what the checkpoint was trained on, where each frame has its own."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size


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

    def forward(self, *streams: Modulated, rotary: Tensor | None, ops: TokenOps) -> tuple[Tensor, ...]:
        """Update the tokens of all streams, text and video in turn, in place and return them.

        rotary [S, P, 2] fp32 turns those of a video.
        """
        for text, video in zip(streams[::2], streams[1::2], strict=True):
            samples = zip(text.samples(), video.samples(), strict=True)
            for (words, text_norm, text_gate), (tokens, norm, gate) in samples:
                joint = (
                    Stream(words, text_norm, self.projections, self.adder(ops, text_gate), is_everywhere=True),
                    Stream(tokens, norm, self.projections, self.adder(ops, gate), rotary),
                )
                self_attention_(joint, ops=ops)
        return tuple(stream.tokens for stream in streams)


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
        self, streams: Sequence[Tensor], time: Tensor, rotary: Tensor | None, ops: TokenOps
    ) -> tuple[Tensor, ...]:
        """Update the streams, text [B, T, C] and video [B, S, C] in turn, in place and return them.

        time is [B, E], rotary [S, P, 2] fp32.
        """
        streams = self.attn1(*self._modulated(streams, self.norm1(time), ops), rotary=rotary, ops=ops)
        done: tuple[Tensor, ...] = self.ff(*self._modulated(streams, self.norm2(time), ops), ops=ops)
        return done

    def _modulated(self, streams: Sequence[Tensor], table: list[Tensor], ops: TokenOps) -> list[Modulated]:
        """Text and video in turn with their halves of the table: that of the video comes first."""
        halves = table[3:], table[:3]
        return [
            Modulated(x, ops.layer_norm, self.eps, shift, scale, gate)
            for x, (shift, scale, gate) in zip(streams, itertools.cycle(halves), strict=False)
        ]


class _PatchConvolution(nn.Conv2d):
    """A convolution whose stride is its kernel, as a matrix product on patches that are cut out already."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class CogVideoXPatchEmbed(nn.Module):
    """Video and text states to tokens."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, config: CogVideoXTransformerConfig) -> None:
        super().__init__()
        self.patch, channels, size = config.patch, config.inner_dim, config.patch_size
        self.proj: nn.Module
        if config.patch_size_t is None:
            self.proj = _PatchConvolution(config.in_channels, channels, size, stride=size, bias=config.patch_bias)
        else:  # which has a bias in any case
            self.proj = nn.Linear(config.in_channels * config.patch_size_t * size**2, channels)
        self.text_proj = nn.Linear(config.text_embed_dim, channels)
        self.pos_embedding: nn.Parameter | None = None
        if (
            config.use_learned_positional_embeddings
        ):  # a parameter, although it was published as a buffer: it may be streamed
            tokens = config.max_text_seq_length + math.prod(config.trained_grid)
            self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, channels))

    def forward(self, video: Tensor, *texts: Tensor, learned: bool = False) -> tuple[Tensor, ...]:
        """Video [B, frames, in_channels, height, width] and texts [B, T, text_embed_dim] -> [B, S, C], [B, T, C] each.

        With `learned`, positions are added to all.
        """
        batch, frames, channels, height, width = video.shape
        pf, ph, pw = self.patch
        cut = video.reshape(batch, frames // pf, pf, channels, height // ph, ph, width // pw, pw)
        patches = cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # [B, F R L, in pf ph pw]
        tokens, *words = self.proj(patches), *map(self.text_proj, texts)
        if learned and self.pos_embedding is not None:
            positions = self.pos_embedding.to(tokens.dtype)
            tokens = tokens + positions[:, words[0].shape[1] :]
            words = [each + positions[:, : each.shape[1]] for each in words]
        return tokens, *words


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
        self.ofs_embedding: TimestepEmbedding | None = None
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
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
        ofs: Tensor | None = None,
        others: Sequence[Mapping[str, Any]] = (),
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor, ...]:
        """One prediction.

        Args:
            hidden_states: latents [B, frames, in_channels, height, width], in the dtype of the weights.
            encoder_hidden_states: text states [B, T, text_embed_dim], in the dtype of the weights.
            timestep: [B] or [1], in the range of the training schedule (0 to 999).
            ofs: [B] or [1], a number that checkpoints with `ofs_embed_dim` are told (2.0 in their training).
            others: more texts for the same latents and timestep: encoder_hidden_states, by this name, in each.
            attention_kwargs: None; here because callers of the published model pass it.
            return_dict: False for a plain tuple of the sample and the others.

        Returns:
            `.sample` [B, frames, out_channels, height, width], and `.others` alike, one for each of the other texts.

        Raises:
            ConfigError: sizes that the patches do not divide, or that the checkpoint has no positions for, an ofs that is
                missing or not expected, or attention_kwargs.
        """
        config, batch = self.config, hidden_states.shape[0]
        self._check_inputs(timestep, batch, attention_kwargs)
        if (ofs is None) != (config.ofs_embed_dim is None):
            expected = "one" if ofs is None else "None"
            raise ConfigError(f"ofs: got {ofs}, expected {expected} with ofs_embed_dim={config.ofs_embed_dim}")
        if hidden_states.ndim != 5 or hidden_states.shape[2] != config.in_channels:
            raise ConfigError(
                f"latents: got shape {tuple(hidden_states.shape)}, expected [batch, frames, {config.in_channels}, height, "
                "width]"
            )
        grid = self._grid(hidden_states.transpose(1, 2), config.patch)
        features = sinusoidal_embedding(timestep.expand(batch), config.inner_dim)
        time = self.time_embedding(features.to(hidden_states.dtype))
        if self.ofs_embedding is not None:
            assert ofs is not None
            assert config.ofs_embed_dim is not None
            offset = sinusoidal_embedding(ofs, config.ofs_embed_dim)
            time = time + self.ofs_embedding(offset.to(hidden_states.dtype))
        told = self._texts({"encoder_hidden_states": encoder_hidden_states}, others)
        states = [each["encoder_hidden_states"] for each in told]
        learned = all(self._has_learned(grid, each.shape[1]) for each in states)
        video, *texts = self.patch_embed(hidden_states, *states, learned=learned)
        rotary = self._positions(grid, video, learned=learned)
        ops = self._ops_for(video.shape[1])
        rotary = None if rotary is None else rotary[ops.own]
        videos = self._streams(video, len(texts), ops)
        streams = tuple(x for text_and_video in zip(texts, videos, strict=True) for x in text_and_video)
        for block in self.transformer_blocks:
            streams = block(streams, time, rotary, ops)
        shift, scale = self.norm_out(time)
        samples = []
        for x in streams[1::2]:
            patches = self._head(x, self._final_norm, scale, shift, self.proj_out, ops=ops)
            samples.append(self._unpatchify(patches, grid, config.patch, channels_first=True).transpose(1, 2))
            del patches
        return self._output(samples, return_dict)

    def _first_weight(self) -> Tensor:
        weight: Tensor = self.patch_embed.proj.weight  # type: ignore[assignment] # learned positions may be of any dtype
        return weight

    def _has_learned(self, grid: Grid, text_tokens: int) -> bool:
        """Whether positions were learned for this grid; a checkpoint that has such knows no other pictures than its own."""
        config = self.config
        if not config.use_learned_positional_embeddings:
            return False
        if grid[1:] != config.trained_grid[1:] or text_tokens != config.max_text_seq_length:
            raise ConfigError(
                f"latents: {grid[1]} rows and {grid[2]} columns of patches and {text_tokens} text tokens; this checkpoint "
                f"was trained on {config.trained_grid[1]}, {config.trained_grid[2]} and {config.max_text_seq_length} only"
            )
        return grid == config.trained_grid

    def _positions(self, grid: Grid, video: Tensor, *, learned: bool) -> Tensor | None:
        """Tell the tokens [B, S, C] where they are: by a rotary table, kept until another grid is asked for, or in place."""
        config, device = self.config, video.device
        # As published, a checkpoint with learned positions gets sinusoids for another number of frames.
        if not config.use_rotary_positional_embeddings or (config.use_learned_positional_embeddings and not learned):
            spatial, temporal = config.spatial_interpolation_scale, config.temporal_interpolation_scale
            add_sinusoids_(video, grid, spatial_scale=spatial, temporal_scale=temporal)
        if not config.use_rotary_positional_embeddings:
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
