"""The transformer of Wan2.1 and Wan2.2, text-to-video and image-to-video.

Parameter names and config keys are those of the published diffusers checkpoints (Wan-AI/Wan2.1-T2V-14B-Diffusers,
-I2V-14B-480P-Diffusers, -FLF2V-14B-720P-diffusers, Wan2.2-T2V-A14B-Diffusers, -TI2V-5B-Diffusers and their siblings); the
architecture is that of Wan (arXiv:2503.20314).

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), C channels, H heads, D channels per head,
P = D / 2 rotated pairs, T text tokens, I image tokens, N runs of video tokens that have one timestep each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.networks.attention import AttentionLayers, Stream, cross_attention_, self_attention_
from vramkit.pipelines.networks.layers import (
    FeedForward,
    Modulated,
    PatchEmbedding,
    TextProjection,
    TimestepEmbedding,
    TokenOps,
    layer_norm,
    sinusoidal_embedding,
)
from vramkit.pipelines.networks.video_transformer import TransformerOutput, VideoTransformer

__all__ = ["WanTransformer3DModel", "WanTransformerBlock", "WanTransformerConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WanTransformerConfig(Config):
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
    image_dim: int | None = None  # channels of the image tokens of Wan2.1 image-to-video
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None  # image tokens of the first and the last frame together

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # a list in JSON
        if self.added_kv_proj_dim not in (None, self.inner_dim) or (self.added_kv_proj_dim is None) != (
            self.image_dim is None
        ):
            raise ConfigError(
                f"WanTransformer3DModel: image_dim={self.image_dim}, added_kv_proj_dim={self.added_kv_proj_dim}; expected "
                f"neither, or both, the second {self.inner_dim} (num_attention_heads * attention_head_dim)"
            )
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ConfigError(
                f"WanTransformer3DModel: pos_embed_seq_len={self.pos_embed_seq_len} is for image tokens, and image_dim=None"
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

    def forward(self, *streams: Modulated, rotary: Tensor, ops: TokenOps) -> tuple[Tensor, ...]:
        """Update the tokens [B, S, C] of each stream in place and return them; rotary is [S, P, 2] fp32."""
        for runs in (runs for x in streams for runs in x.runs()):
            joint = [
                Stream(run.tokens, run.norm, self.projections, self.adder(ops, run.gate), rotary[run.span])
                for run in runs
            ]
            self_attention_(joint, ops=ops)
        return tuple(x.tokens for x in streams)


class WanCrossAttention(AttentionLayers):
    """x += attention(norm(x), text), in place, and where there are image tokens attention(norm(x), image) beside it."""

    def __init__(self, channels: int, heads: int, *, norm: Callable[[], nn.Module], image_channels: int | None) -> None:
        super().__init__(channels, heads, norm=norm)
        if image_channels is not None:
            self.add_k_proj = nn.Linear(image_channels, channels)
            self.add_v_proj = nn.Linear(image_channels, channels)
            self.norm_added_k = norm()

    def forward(
        self,
        *streams: Tensor,
        norm: Callable[[Tensor], Tensor],
        texts: Sequence[Tensor],
        image: Tensor | None,
        ops: TokenOps,
    ) -> tuple[Tensor, ...]:
        """Update the tokens [B, S, C] of each stream in place and return them.

        Each has a text [B, T, C]; image is [B, I, C] or None.
        """
        for x, text in zip(streams, texts, strict=True):
            for b, tokens in enumerate(x):
                beside = None if image is None else self._keys_and_values(image[b], ops)
                stream = Stream(tokens, norm, self.projections, self.adder(ops))
                cross_attention_(stream, text[b], ops=ops, beside=beside)
        return streams

    def _keys_and_values(self, image: Tensor, ops: TokenOps) -> tuple[Tensor, Tensor]:
        added = replace(self.projections, to_k=self.add_k_proj, to_v=self.add_v_proj, norm_k=self.norm_added_k)
        return added.key_value(image, None, ops)


class WanConditions(NamedTuple):
    """What the blocks are told: a text for each stream, an image if there is one, and the modulation by the timesteps."""

    texts: tuple[Tensor, ...]  # [B, T, C] each
    image: Tensor | None  # [B, I, C]
    modulation: Tensor  # [B, N, 6, C]
    lengths: tuple[int, ...] | None  # video tokens in each of N runs; None for a single one


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
        self.attn2 = WanCrossAttention(
            channels, config.num_attention_heads, norm=norm, image_channels=config.added_kv_proj_dim
        )
        self.norm2 = nn.LayerNorm(channels, eps=eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(channels, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, channels) / channels**0.5)

    def forward(
        self, streams: Sequence[Tensor], told: WanConditions, rotary: Tensor, ops: TokenOps
    ) -> tuple[Tensor, ...]:
        """Update the tokens [B, S, C] of each stream in place and return them; rotary is [S, P, 2] fp32."""
        table = self.scale_shift_table.float() + told.modulation.float()
        shift1, scale1, gate1, shift3, scale3, gate3 = table.unbind(dim=2)  # [B, N, C] each
        norm, lengths = ops.layer_norm, told.lengths
        streams = self.attn1(
            *(Modulated(x, norm, self.eps, shift1, scale1, gate1, lengths) for x in streams), rotary=rotary, ops=ops
        )
        streams = self.attn2(*streams, norm=self._norm2(ops), texts=told.texts, image=told.image, ops=ops)
        done: tuple[Tensor, ...] = self.ffn(
            *(Modulated(x, norm, self.eps, shift3, scale3, gate3, lengths) for x in streams), ops=ops
        )
        return done

    def _norm2(self, ops: TokenOps) -> Callable[[Tensor], Tensor]:
        """The norm before cross-attention, with its weights in fp32."""
        if isinstance(self.norm2, nn.Identity):
            return self.norm2
        return partial(ops.layer_norm, weight=self.norm2.weight.float(), bias=self.norm2.bias.float(), eps=self.eps)


class WanImageEmbedding(nn.Module):
    """Image tokens to the channels of the model, between two norms."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        assert config.image_dim is not None
        self.norm1 = nn.LayerNorm(config.image_dim)
        self.ff = _ImageFeedForward(config.image_dim, config.inner_dim)
        self.norm2 = nn.LayerNorm(config.inner_dim)
        self.pos_embed: nn.Parameter | None = None
        if config.pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_seq_len, config.image_dim))

    def forward(self, image: Tensor) -> Tensor:
        """[B, I, image_dim], or the frames of a clip one behind the other [2 B, I / 2, image_dim] -> [B, I, C]."""
        if self.pos_embed is not None:
            image = image.reshape(-1, *self.pos_embed.shape[1:]) + self.pos_embed
        return self._normed(self.norm2, self.ff(self._normed(self.norm1, image)))

    @staticmethod
    def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x, norm.weight.float(), norm.bias.float(), norm.eps)


class _ImageFeedForward(nn.Module):
    """Two layers with a GELU between; checkpoints name them `net.0.proj` and `net.2`."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(in_channels, in_channels)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(in_channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](F.gelu(self.net[0].proj(x)))  # type: ignore[operator]
        return out


class WanConditionEmbedder(nn.Module):
    """Timesteps, texts and image to what the blocks are conditioned on."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        channels = config.inner_dim
        self.freq_dim = config.freq_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, channels)
        self.time_proj = nn.Linear(channels, 6 * channels)
        self.text_embedder = TextProjection(config.text_dim, channels)
        self.image_embedder = None if config.image_dim is None else WanImageEmbedding(config)

    def forward(
        self, timestep: Tensor, lengths: tuple[int, ...] | None, *texts: Tensor, image: Tensor | None
    ) -> tuple[Tensor, WanConditions]:
        """Timesteps [B, N], texts [B, T, text_dim] and image tokens -> embedding [B, N, C], and the rest."""
        features = sinusoidal_embedding(timestep.flatten(), self.freq_dim)
        time = self.time_embedder(features).to(texts[0].dtype).view(*timestep.shape, -1)
        modulation = self.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        embedded = self.image_embedder(image) if self.image_embedder is not None else None
        return time, WanConditions(self.text_embedder(*texts), embedded, modulation, lengths)


class WanTransformer3DModel(VideoTransformer):
    """Predicts the flow of a latent video from its noisy state, a timestep, text and what else the checkpoint is told.

    For inference: gradients are not recorded, since the token stream is updated in place.
    """

    config: WanTransformerConfig
    config_class = WanTransformerConfig
    takes_timestep_runs: ClassVar[bool] = True
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
        encoder_hidden_states_image: Tensor | None = None,
        *,
        timestep_tokens: Sequence[int] | None = None,
        others: Sequence[Mapping[str, Any]] = (),
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor, ...]:
        """One prediction.

        Args:
            hidden_states: latents [B, in_channels, frames, height, width], in the dtype of the weights.
            timestep: [B] or [1], in the range of the training schedule (0 to 1000). Or one for each token [B, S], which is
                waited for, since neighbours with one timestep are computed together; `timestep_tokens` spares that.
            encoder_hidden_states: text states [B, T, text_dim], in the dtype of the weights.
            encoder_hidden_states_image: image tokens [B, I, image_dim] of a checkpoint with `image_dim`; of one with
                `pos_embed_seq_len`, also those of two frames one behind the other [2 B, I / 2, image_dim].
            timestep_tokens: how many tokens each of the timesteps [B, N] is for, one behind the other.
            others: more texts for the same latents, timesteps and image: encoder_hidden_states, by this name, in each.
            attention_kwargs: None; here because callers of the published model pass it.
            return_dict: False for a plain tuple of the sample and the others.

        Returns:
            `.sample` [B, out_channels, frames, height, width], and `.others` alike, one for each of the other texts.

        Raises:
            ConfigError: sizes that the patches do not divide, more positions than `rope_max_seq_len`, timesteps that are
                not as many as clips or tokens, image tokens that are missing or not expected, or attention_kwargs.
        """
        config, batch, device = self.config, hidden_states.shape[0], hidden_states.device
        self._check_attention_kwargs(attention_kwargs)
        self._check_image(encoder_hidden_states_image, batch)
        grid = self._grid(hidden_states, config.patch_size)
        if max(grid) > config.rope_max_seq_len:
            raise ConfigError(f"latents: {grid} patches, at most {config.rope_max_seq_len} along an axis")
        ops = self._ops_for(math.prod(grid))
        rotary = self._rotary_table(grid, config.rotary_channels, device)[ops.own]
        timestep, lengths = self._timestep_runs(timestep, timestep_tokens, batch, math.prod(grid))
        lengths = self._own_lengths(lengths, ops)
        texts = self._texts({"encoder_hidden_states": encoder_hidden_states}, others)
        states = [each["encoder_hidden_states"] for each in texts]
        time, told = self.condition_embedder(timestep, lengths, *states, image=encoder_hidden_states_image)
        streams = self._streams(self.patch_embedding(hidden_states), len(texts), ops)  # [B, S, C] each
        for block in self.blocks:
            streams = block(streams, told, rotary, ops)
        shift, scale = (self.scale_shift_table.float() + time.float()[:, :, None]).unbind(dim=2)  # [B, N, C] each
        norm, samples = partial(ops.layer_norm, eps=config.eps), []
        for x in streams:
            patches = self._head(x, norm, scale, shift, self.proj_out, lengths, ops=ops)
            samples.append(self._unpatchify(patches, grid, config.patch_size))
            del patches
        return self._output(samples, return_dict)

    def _check_image(self, image: Tensor | None, batch: int) -> None:
        """Refuse image tokens where the checkpoint has no place for them, and where it has that they are missing."""
        channels, tokens = self.config.image_dim, self.config.pos_embed_seq_len
        given = None if image is None else tuple(image.shape)
        expected: list[Any] = []
        if channels is not None and tokens is None:
            expected = [(batch, given[1] if given and len(given) > 1 else "tokens", channels)]
        elif channels is not None and tokens is not None:
            expected = [(batch, tokens, channels), (2 * batch, tokens // 2, channels)]
        if given not in (expected or [None]):
            raise ConfigError(
                f"encoder_hidden_states_image: got {given}, expected {' or '.join(map(str, expected)) or None} for this "
                "checkpoint"
            )
