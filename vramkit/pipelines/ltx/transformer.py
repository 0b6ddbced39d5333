"""The LTX-Video transformer.

Parameter names and config keys are those of the published diffusers checkpoint (Lightricks/LTX-Video); the architecture is
that of LTX-Video (arXiv:2501.00103): latents are tokens as they are, and rotary positions, in seconds and pixels, turn all
channels before they are split into heads.

Shapes: B batch, S = F R L video tokens (latent frames, rows, columns), C channels, H heads, D channels per head, P = D / 2
rotated pairs, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.networks.attention import AttentionLayers, Stream, cross_attention_, self_attention_
from vramkit.pipelines.networks.layers import (
    FeedForward,
    Modulated,
    TextProjection,
    TimestepEmbedding,
    TokenOps,
    sinusoidal_embedding,
)
from vramkit.pipelines.networks.text_masks import text_lengths
from vramkit.pipelines.networks.video_transformer import Grid, TransformerOutput, VideoTransformer

__all__ = ["LTXVideoTransformer3DModel", "LTXVideoTransformerBlock", "LTXVideoTransformerConfig"]

TIME_FEATURES = 256
# What rotary positions are shares of: seconds, rows and columns of pixels.
BASE_SIZES = (20, 2048, 2048)
_FIXED = {
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LTXVideoTransformerConfig(Config):
    """The keys of a published config.json, with diffusers' defaults (those of the 2B model).

    Raises:
        ConfigError: options of no published checkpoint, or sizes that contradict each other.
    """

    in_channels: int = 128
    out_channels: int | None = 128  # None for as many as in_channels
    patch_size: int = 1  # rows and columns of latents in a token, which the caller packs; counts for the positions here
    patch_size_t: int = 1
    num_attention_heads: int = 32
    attention_head_dim: int = 64
    cross_attention_dim: int = 2048
    num_layers: int = 28
    activation_fn: str = "gelu-approximate"
    qk_norm: str = "rms_norm_across_heads"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int = 4096
    attention_bias: bool = True
    attention_out_bias: bool = True

    def __post_init__(self) -> None:
        for key, value in _FIXED.items():
            if getattr(self, key) != value:
                raise ConfigError(f"LTXVideoTransformer3DModel: {key}={getattr(self, key)!r}, expected {value!r}")
        if self.attention_head_dim % 2:
            raise ConfigError(
                f"LTXVideoTransformer3DModel: attention_head_dim={self.attention_head_dim} has to be even"
            )
        if self.cross_attention_dim != self.inner_dim:
            raise ConfigError(
                f"LTXVideoTransformer3DModel: cross_attention_dim={self.cross_attention_dim}, expected {self.inner_dim} "
                "(num_attention_heads * attention_head_dim), the channels of the projected text"
            )

    @property
    def inner_dim(self) -> int:
        """C."""
        return self.num_attention_heads * self.attention_head_dim


# -- positions ---------------------------------------------------------------------------------------------------------


def grid_coordinates(
    grid: Grid, config: LTXVideoTransformerConfig, scale: Sequence[float] | None, device: torch.device
) -> list[Tensor]:
    """Where the tokens of a grid lie along frames [F, 1, 1], rows [1, R, 1] and columns [1, 1, L], fp32.

    With `scale`, the seconds, rows and columns of video per latent, these are shares of `BASE_SIZES`; without it latents are
    counted.
    """
    coordinates = []
    for axis, length in enumerate(grid):
        places = torch.arange(length, dtype=torch.float32, device=device)
        if scale is not None:
            patch = config.patch_size if axis else config.patch_size_t
            # In this order: at the highest frequency the last bit of a position is a thousandth of a radian.
            places = places * scale[axis] * patch / BASE_SIZES[axis]
        coordinates.append(places.view([-1 if other == axis else 1 for other in range(3)]))
    return coordinates


def rotary_table(coordinates: Sequence[Tensor], channels: int) -> Tensor:
    """Cos and sin for every pair of channels, [..., channels / 2, 2] fp32.

    `coordinates` are three tensors that broadcast to [...]. The pairs go through the axes, then through the frequencies;
    those in front that are left over are not turned.
    """
    count, device = channels // 6, coordinates[0].device
    frequencies = 10000.0 ** torch.linspace(0.0, 1.0, count, dtype=torch.float32, device=device) * math.pi / 2.0
    frames, rows, columns = coordinates
    shape = (frames + rows + columns).shape
    table = torch.empty(*shape, channels // 2, 2, device=device)
    unturned = channels // 2 - 3 * count
    table[..., :unturned, 0], table[..., :unturned, 1] = 1.0, 0.0
    turned = torch.unflatten(table[..., unturned:, :], -2, (count, 3))
    for axis, places in enumerate(coordinates):
        angles = frequencies * (places[..., None] * 2 - 1)
        turned[..., axis, 0], turned[..., axis, 1] = angles.cos(), angles.sin()
    return table


# -- blocks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """The projected texts of a batch: those tokens that count, or all of them and which count."""

    states: list[Tensor]  # [T, C] each
    masks: list[Tensor] | None = None  # bool [T] each

    @classmethod
    def of(cls, states: Tensor, mask: Tensor | Sequence[int] | None) -> Texts:
        """Texts [B, T, C] cut to their lengths, or masked where a mask is not a length.

        Raises:
            ConfigError: a mask of another shape, or lengths that are none.
        """
        batch, tokens = states.shape[:2]
        if mask is None:
            return cls(list(states))
        if isinstance(mask, Tensor):
            if mask.shape != (batch, tokens):
                raise ConfigError(
                    f"encoder_attention_mask: got shape {tuple(mask.shape)}, expected ({batch}, {tokens}), as "
                    "encoder_hidden_states has it"
                )
            lengths = None if torch.compiler.is_compiling() else text_lengths(mask)  # a compiler knows no lengths
            if lengths is None:
                given = mask.bool()
                # As published: a text without a token that counts is attended to as a whole.
                return cls(list(states), list(given | ~given.any(dim=1, keepdim=True)))
            mask = lengths
        if len(mask) != batch or not all(0 <= length <= tokens for length in mask):
            raise ConfigError(
                f"encoder_attention_mask: got texts of {tuple(mask)} tokens, expected {batch} of at most {tokens}"
            )
        return cls([text[: length or tokens] for text, length in zip(states, mask, strict=True)])


class LTXSelfAttention(AttentionLayers):
    """x += gate * attention(norm(x)), in place."""

    def forward(self, *streams: Modulated, rotary: Tensor, ops: TokenOps) -> tuple[Tensor, ...]:
        """Update the tokens [B, S, C] of each stream in place and return them; rotary is [1 or B, S, H, P, 2] fp32."""
        for x in streams:
            for runs, table in zip(x.runs(), rotary.expand(len(x.tokens), -1, -1, -1, -1), strict=True):
                joint = [
                    Stream(run.tokens, run.norm, self.projections, self.adder(ops, run.gate), table[run.span])
                    for run in runs
                ]
                self_attention_(joint, ops=ops)
        return tuple(x.tokens for x in streams)


class LTXCrossAttention(AttentionLayers):
    """x += attention(x, text), in place."""

    def forward(self, *streams: Tensor, texts: Sequence[Texts], ops: TokenOps) -> tuple[Tensor, ...]:
        """Update the tokens [B, S, C] of each stream in place and return them; each has the texts of its batch."""
        for x, of_batch in zip(streams, texts, strict=True):
            for b, tokens in enumerate(x):
                stream = Stream(tokens, nn.Identity(), self.projections, self.adder(ops))
                mask = None if of_batch.masks is None else of_batch.masks[b]
                cross_attention_(stream, of_batch.states[b], ops=ops, mask=mask)
        return streams


class LTXVideoTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the timestep.

    The tokens are updated in place. The three parts are called once each, so that each can be streamed as a whole.
    """

    def __init__(self, config: LTXVideoTransformerConfig) -> None:
        super().__init__()
        channels = config.inner_dim
        self.eps = config.norm_eps
        attention: dict[str, Any] = {
            "channels": channels,
            "heads": config.num_attention_heads,
            "norm": partial(nn.RMSNorm, channels, eps=1e-5),
            "bias": config.attention_bias,
            "out_bias": config.attention_out_bias,
        }
        self.attn1 = LTXSelfAttention(**attention)
        self.attn2 = LTXCrossAttention(**attention)
        self.ff = FeedForward(channels, 4 * channels)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)

    def forward(
        self,
        streams: Sequence[Tensor],
        texts: Sequence[Texts],
        modulation: Tensor,
        lengths: tuple[int, ...] | None,
        rotary: Tensor,
        *,
        ops: TokenOps,
    ) -> tuple[Tensor, ...]:
        """Update the tokens [B, S, C] of each stream in place and return them.

        Each stream has texts; modulation (of the timesteps) is [B, N, 6, C] for N runs of so many tokens, rotary
        [1 or B, S, H, P, 2] fp32.
        """
        table = self.scale_shift_table.float() + modulation.float()
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(dim=2)  # [B, N, C] each
        norm = ops.rms_norm
        streams = self.attn1(
            *(Modulated(x, norm, self.eps, shift1, scale1, gate1, lengths) for x in streams), rotary=rotary, ops=ops
        )
        streams = self.attn2(*streams, texts=texts, ops=ops)
        done: tuple[Tensor, ...] = self.ff(
            *(Modulated(x, norm, self.eps, shift2, scale2, gate2, lengths) for x in streams), ops=ops
        )
        return done


# -- model -------------------------------------------------------------------------------------------------------------


class _TimestepFeatures(nn.Module):
    """Its own module because checkpoints name it `emb.timestep_embedder`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, channels)

    def forward(self, timestep: Tensor) -> Tensor:
        out: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep, TIME_FEATURES))
        return out


class TimeEmbedding(nn.Module):
    """A timestep to what blocks and head are modulated by."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.emb = _TimestepFeatures(channels)
        self.linear = nn.Linear(channels, 6 * channels)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] -> embedding [B, N, C], modulation [B, N, 6, C]."""
        embedded = self.emb(timestep.flatten()).view(*timestep.shape, -1)
        return embedded, self.linear(F.silu(embedded)).unflatten(-1, (6, -1))


class LTXVideoTransformer3DModel(VideoTransformer):
    """Predicts the flow of a latent video from its noisy state, a timestep and text.

    For inference: gradients are not recorded, since the token stream is updated in place.
    """

    config: LTXVideoTransformerConfig
    config_class = LTXVideoTransformerConfig
    takes_timestep_runs: ClassVar[bool] = True
    skip_layerwise_casting: ClassVar[tuple[str, ...]] = ("norm",)

    def __init__(self, config: LTXVideoTransformerConfig) -> None:
        super().__init__(config)
        self._placed: tuple[Tensor, int, Tensor] | None = None  # the last coordinates, their version, and their table
        channels = config.inner_dim
        self.proj_in = nn.Linear(config.in_channels, channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.time_embed = TimeEmbedding(channels)
        self.caption_projection = TextProjection(config.caption_channels, channels)
        self.transformer_blocks = nn.ModuleList([LTXVideoTransformerBlock(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(channels, config.out_channels or config.in_channels)

    @torch.no_grad()
    def forward(  # noqa: PLR0917 - the order of the published one
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | Sequence[int] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: Sequence[float] | Tensor | None = None,
        video_coords: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        *,
        timestep_tokens: Sequence[int] | None = None,
        others: Sequence[Mapping[str, Any]] = (),
    ) -> TransformerOutput | tuple[Tensor, ...]:
        """One prediction.

        Args:
            hidden_states: latents as tokens [B, S, in_channels], frame by frame and row by row, in the dtype of the weights.
            encoder_hidden_states: text states [B, T, caption_channels], in the dtype of the weights.
            timestep: [B] or [1], in the range of the training schedule (0 to 1000). Or one for each token [B, S], which is
                waited for, since neighbours with one timestep are computed together; `timestep_tokens` spares that.
            encoder_attention_mask: [B, T], ones for the tokens of a text and zeros for its padding; or, for padding behind
                the texts, the numbers of their tokens; None for no padding. A mask on a device has to be waited for, and in
                a compiled forward it becomes a mask of the attention, since lengths are not known there.
            num_frames: F, latent frames.
            height: R, rows of latents.
            width: L, columns of latents.
            rope_interpolation_scale: seconds of video per latent frame (frames per latent frame over the frame rate), and
                rows and columns of pixels per latent; None counts latents.
            video_coords: in place of the last four, where each token lies [B, 3, S]: seconds, rows and columns of pixels.
            attention_kwargs: None; here because callers of the published model pass it.
            return_dict: False for a plain tuple of the sample and the others.
            timestep_tokens: how many tokens each of the timesteps [B, N] is for, one behind the other.
            others: more texts for the same latents and timesteps: encoder_hidden_states and encoder_attention_mask, by these
                names, in each.

        Returns:
            `.sample` [B, S, out_channels], and `.others` alike, one for each of the other texts.

        Raises:
            ConfigError: sizes that are not those of the tokens, timesteps that are not as many as clips or tokens, or
                attention_kwargs.
        """
        config = self.config
        self._check_attention_kwargs(attention_kwargs)
        text = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        told = self._texts(text, others)
        if hidden_states.ndim != 3 or hidden_states.shape[2] != config.in_channels:
            raise ConfigError(
                f"latents: got shape {tuple(hidden_states.shape)}, expected [batch, tokens, {config.in_channels}]"
            )
        if video_coords is None:
            grid = self._token_grid(hidden_states, (num_frames, height, width))
            rotary = self._grid_table(grid, rope_interpolation_scale, hidden_states.device)[None]
        else:
            rotary = self._coordinates_table(video_coords, hidden_states)
        timestep, lengths = self._timestep_runs(timestep, timestep_tokens, *hidden_states.shape[:2])
        ops = self._ops_for(hidden_states.shape[1])
        rotary, lengths = rotary[:, ops.own], self._own_lengths(lengths, ops)
        time, modulation = self.time_embed(timestep)
        states = self.caption_projection(*(each["encoder_hidden_states"] for each in told))
        masks = [each["encoder_attention_mask"] for each in told]
        texts = [Texts.of(*each) for each in zip(states, masks, strict=True)]
        streams = self._streams(self.proj_in(hidden_states), len(texts), ops)  # [B, S, C] each
        for block in self.transformer_blocks:
            streams = block(streams, texts, modulation, lengths, rotary, ops=ops)
        shift, scale = (self.scale_shift_table.float() + time.float()[:, :, None]).unbind(dim=2)  # [B, N, C] each
        norm = partial(ops.layer_norm, eps=1e-6)
        samples = [self._head(x, norm, scale, shift, self.proj_out, lengths, ops=ops) for x in streams]
        return self._output(samples, return_dict)

    def _token_grid(self, tokens: Tensor, sizes: tuple[int | None, int | None, int | None]) -> Grid:
        frames, rows, columns = sizes
        if frames is None or rows is None or columns is None or frames * rows * columns != tokens.shape[1]:
            raise ConfigError(
                f"num_frames={frames}, height={rows}, width={columns}: expected sizes in latents whose product is the "
                f"number of tokens, {tokens.shape[1]}; or give video_coords"
            )
        return frames, rows, columns

    def _grid_table(self, grid: Grid, scale: Sequence[float] | Tensor | None, device: torch.device) -> Tensor:
        """The table [S, H, P, 2] of a grid, kept until another is asked for."""
        if scale is not None:
            if len(scale) != 3 or any(isinstance(each, Tensor) and each.numel() != 1 for each in scale):
                raise ConfigError(f"rope_interpolation_scale: got {scale}, expected three numbers")
            scale = tuple(float(each) for each in scale)
        key = grid, scale, device
        if self._rotary is None or self._rotary[0] != key:
            table = rotary_table(grid_coordinates(grid, self.config, scale, device), self.config.inner_dim)
            self._rotary = key, self._by_heads(table.flatten(0, 2))
        return self._rotary[1]

    def _coordinates_table(self, coordinates: Tensor, tokens: Tensor) -> Tensor:
        """The table [B, S, H, P, 2] of tokens whose coordinates are given."""
        if coordinates.shape != (tokens.shape[0], 3, tokens.shape[1]):
            raise ConfigError(
                f"video_coords: got shape {tuple(coordinates.shape)}, expected ({tokens.shape[0]}, 3, {tokens.shape[1]})"
            )
        # That of the same tensor is kept, as that of a grid is, where versions are counted.
        is_counted = not (torch.compiler.is_compiling() or coordinates.is_inference())
        version = coordinates._version if is_counted else None  # noqa: SLF001 (torch has no public reader)
        if version is not None and self._placed is not None:
            placed, placed_version, table = self._placed
            if placed is coordinates and placed_version == version:
                return table
        shares = [coordinates[:, axis].float() / size for axis, size in enumerate(BASE_SIZES)]
        table = self._by_heads(rotary_table(shares, self.config.inner_dim))
        self._placed = None if version is None else (coordinates, version, table)
        return table

    def _by_heads(self, table: Tensor) -> Tensor:
        return torch.unflatten(table, -2, (self.config.num_attention_heads, -1))
