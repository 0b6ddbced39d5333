"""The HunyuanVideo text-to-video transformer.

Parameter names and config keys are those of the published diffusers checkpoint (hunyuanvideo-community/HunyuanVideo); the
architecture is that of HunyuanVideo (arXiv:2412.03603). The image-to-video variants are not covered.

Video and text are two streams that attend to one another: first with weights of their own (double blocks), then with the
same ones (single blocks). Padding behind a text never meets the video: of each sample only the tokens that count take
part, so that the attention needs no mask.

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), T text tokens, C channels, H heads,
D channels per head, P = D / 2 rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video.conditions import ConditionEmbedder, TextLengths, TokenRefiner
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.networks.attention import AttentionLayers, Projections, Stream, self_attention_
from vramkit.pipelines.networks.layers import FeedForward, Modulated, PatchEmbedding, TokenOps
from vramkit.pipelines.networks.video_transformer import TransformerOutput, VideoTransformer

__all__ = ["HunyuanVideoTransformer3DModel", "HunyuanVideoTransformerConfig"]

EPS = 1e-6  # of all norms


@dataclass(frozen=True, kw_only=True, slots=True)
class HunyuanVideoTransformerConfig(Config):
    """The keys of a published config.json, with diffusers' defaults (those of the 13B model)."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head that encode frames, rows and columns
    image_condition_type: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))  # a list in JSON
        name = "HunyuanVideoTransformer3DModel"
        if self.image_condition_type is not None:
            raise ConfigError(
                f"{name}: image_condition_type={self.image_condition_type!r} belongs to image-to-video checkpoints, which "
                "are not supported; use a text-to-video checkpoint"
            )
        if self.qk_norm != "rms_norm":
            raise ConfigError(f"{name}: qk_norm={self.qk_norm!r}, expected 'rms_norm'")
        axes = self.rope_axes_dim
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(width % 2 for width in axes):
            raise ConfigError(
                f"{name}: rope_axes_dim={axes}, expected three even numbers with the sum {self.attention_head_dim}, which "
                "is attention_head_dim"
            )

    @property
    def inner_dim(self) -> int:
        """C."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return self.patch_size_t, self.patch_size, self.patch_size


class Modulation(nn.Module):
    """Shifts, scales and gates of a block, from the embedding of what the model is conditioned on."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, parts * channels)
        self.parts = parts

    def forward(self, *conditions: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """[B, C] -> as many tensors [B, C] fp32 as there are parts, for each condition."""
        return tuple(self.linear(F.silu(each)).float().chunk(self.parts, dim=-1) for each in conditions)


class Context(NamedTuple):
    """What all blocks of a forward are given; the first two have an entry for each text, as the streams have."""

    conditions: tuple[Tensor, ...]  # [B, C], of timestep, guidance and pooled text
    lengths: tuple[TextLengths, ...]
    rotary: Tensor  # [S, P, 2] fp32
    ops: TokenOps

    def modulated(self, streams: Sequence[Tensor], modulations: Sequence[Sequence[Tensor]]) -> list[Modulated]:
        """Streams with shift, scale and gate of each."""
        pairs = zip(streams, modulations, strict=True)
        return [Modulated(x, self.ops.layer_norm, EPS, shift, scale, gate) for x, (shift, scale, gate) in pairs]


def _joint_attention_(
    videos: Sequence[Modulated],
    texts: Sequence[Modulated],
    context: Context,
    make_streams: Callable[..., tuple[Stream, Stream]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Let video and text of each sample attend to one another; `make_streams` is given both samples' tokens, norm, gate."""
    for video, text, lengths in zip(videos, texts, context.lengths, strict=True):
        pairs = zip(video.samples(), text.samples(), strict=True)
        for b, (of_video, (tokens, norm, gate)) in enumerate(pairs):
            streams = make_streams(of_video, (lengths.cut(tokens, b), norm, gate))
            self_attention_(streams, ops=context.ops, mask=lengths.joint_mask(b, streams[0].tokens.shape[0]))
    return [video.tokens for video in videos], [text.tokens for text in texts]


class DoubleAttention(AttentionLayers):
    """Attention over both streams, each with projections of its own."""

    def __init__(self, channels: int, heads: int) -> None:
        norm = partial(nn.RMSNorm, channels // heads, eps=EPS)
        super().__init__(channels, heads, norm=norm)
        self.add_q_proj = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(channels, channels)
        self.add_v_proj = nn.Linear(channels, channels)
        self.to_add_out = nn.Linear(channels, channels)
        self.norm_added_q = norm()
        self.norm_added_k = norm()

    def forward(
        self, videos: Sequence[Modulated], texts: Sequence[Modulated], context: Context
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Update the tokens of videos [B, S, C] and texts [B, T, C] in place and return them."""
        ops = context.ops
        added = Projections(
            self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k, self.heads
        )

        def make_streams(of_video: Sequence[Any], of_text: Sequence[Any]) -> tuple[Stream, Stream]:
            (tokens, norm, gate), (text_tokens, text_norm, text_gate) = of_video, of_text

            def add(part: Tensor, attended: Tensor) -> None:
                ops.gated_add(part, self.to_add_out(attended), text_gate)

            return (
                Stream(tokens, norm, self.projections, self.adder(ops, gate), context.rotary),
                Stream(text_tokens, text_norm, added, add, is_everywhere=True),
            )

        return _joint_attention_(videos, texts, context, make_streams)


class HunyuanVideoTransformerBlock(nn.Module):
    """A double block: joint attention and feed-forward, with weights of their own for video and text.

    The tokens are updated in place. The parts are called once each, so that each can be streamed as a whole.
    """

    def __init__(self, config: HunyuanVideoTransformerConfig) -> None:
        super().__init__()
        channels, inner_channels = config.inner_dim, int(config.inner_dim * config.mlp_ratio)
        self.norm1 = Modulation(channels, 6)
        self.norm1_context = Modulation(channels, 6)
        self.attn = DoubleAttention(channels, config.num_attention_heads)
        self.ff = FeedForward(channels, inner_channels)
        self.ff_context = FeedForward(channels, inner_channels)

    def forward(
        self, videos: Sequence[Tensor], texts: Sequence[Tensor], context: Context
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Update the tokens of videos [B, S, C] and texts [B, T, C] in place and return them."""
        of_videos, of_texts = (
            self.norm1(*context.conditions),
            self.norm1_context(*context.conditions),
        )  # six [B, C] each
        videos, texts = self.attn(
            context.modulated(videos, [each[:3] for each in of_videos]),
            context.modulated(texts, [each[:3] for each in of_texts]),
            context,
        )
        videos = self.ff(*context.modulated(videos, [each[3:] for each in of_videos]), ops=context.ops)
        texts = self.ff_context(*context.modulated(texts, [each[3:] for each in of_texts]), ops=context.ops)
        return videos, texts


class SingleAttention(AttentionLayers):
    """The projections of a single block, which ends in the block's own `proj_out`."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads, norm=partial(nn.RMSNorm, channels // heads, eps=EPS))
        del self.to_out


class HunyuanVideoSingleTransformerBlock(nn.Module):
    """A single block: joint attention and feed-forward side by side, with the same weights for video and text.

    All its layers run once per chunk of tokens, so it is streamed as a whole.
    """

    offload_unit: ClassVar[bool] = True

    def __init__(self, config: HunyuanVideoTransformerConfig) -> None:
        super().__init__()
        channels, inner_channels = config.inner_dim, int(config.inner_dim * config.mlp_ratio)
        self.norm = Modulation(channels, 3)
        self.attn = SingleAttention(channels, config.num_attention_heads)
        self.proj_mlp = nn.Linear(channels, inner_channels)
        self.proj_out = nn.Linear(channels + inner_channels, channels)

    def forward(
        self, videos: Sequence[Tensor], texts: Sequence[Tensor], context: Context
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Update the tokens of videos [B, S, C] and texts [B, T, C] in place and return them."""
        modulations = self.norm(*context.conditions)

        def make_streams(of_video: Sequence[Any], of_text: Sequence[Any]) -> tuple[Stream, Stream]:
            (tokens, norm, gate), (text_tokens, _, _) = of_video, of_text
            add = partial(self._add, norm, gate, context.ops)
            projections = self.attn.projections
            return (
                Stream(tokens, norm, projections, add, context.rotary),
                Stream(text_tokens, norm, projections, add, is_everywhere=True),
            )

        return _joint_attention_(
            context.modulated(videos, modulations), context.modulated(texts, modulations), context, make_streams
        )

    def _add(
        self, norm: Callable[[Tensor], Tensor], gate: Tensor, ops: TokenOps, tokens: Tensor, attended: Tensor
    ) -> None:
        """Add to a chunk of tokens [s, C] what attention and feed-forward make of it.

        Normed again rather than kept through the attention, which would be one more chunk.
        """
        inner = F.gelu(self.proj_mlp(norm(tokens)), approximate="tanh")
        joint = torch.cat((attended, inner), dim=-1)
        del inner
        ops.gated_add(tokens, self.proj_out(joint), gate)


class HunyuanVideoTransformer3DModel(VideoTransformer):
    """Predicts the flow of a latent video from its noisy state, a timestep, text and a guidance scale.

    For inference: gradients are not recorded, since the token streams are updated in place.
    """

    config: HunyuanVideoTransformerConfig
    config_class = HunyuanVideoTransformerConfig
    skip_layerwise_casting: ClassVar[tuple[str, ...]] = ("x_embedder", "context_embedder", "norm")

    def __init__(self, config: HunyuanVideoTransformerConfig) -> None:
        super().__init__(config)
        channels, heads = config.inner_dim, config.num_attention_heads
        self.x_embedder = nn.ModuleDict({"proj": PatchEmbedding(config.in_channels, channels, config.patch)})
        self.context_embedder = TokenRefiner(config.text_embed_dim, channels, heads, layers=config.num_refiner_layers)
        self.time_text_embed = ConditionEmbedder(
            config.pooled_projection_dim, channels, guidance=config.guidance_embeds
        )
        self.transformer_blocks = nn.ModuleList(
            [HunyuanVideoTransformerBlock(config) for _ in range(config.num_layers)]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [HunyuanVideoSingleTransformerBlock(config) for _ in range(config.num_single_layers)]
        )
        self.norm_out = Modulation(channels, 2)
        self.proj_out = nn.Linear(channels, config.out_channels * math.prod(config.patch))

    @torch.no_grad()
    def forward(  # noqa: PLR0917 - the order of the published one
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | Sequence[int],
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        *,
        others: Sequence[Mapping[str, Any]] = (),
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor, ...]:
        """One prediction.

        Args:
            hidden_states: latents [B, in_channels, frames, height, width], in the dtype of the weights.
            timestep: [B] or [1], in the range of the training schedule (0 to 1000).
            encoder_hidden_states: text states [B, T, text_embed_dim], in the dtype of the weights.
            encoder_attention_mask: [B, T], ones for the tokens of a text and zeros for its padding; or, for padding behind
                the texts, the numbers of their tokens. A mask on a device has to be waited for, and in a compiled forward
                it becomes a mask of the attention, since lengths are not known there.
            pooled_projections: pooled text [B, pooled_projection_dim].
            guidance: [B], 1000 times the guidance scale; a model without guidance_embeds does not look at it.
            others: more texts for the same latents, timestep and guidance: encoder_hidden_states, encoder_attention_mask
                and pooled_projections, by these names, in each.
            attention_kwargs: None; here because callers of the published model pass it.
            return_dict: False for a plain tuple of the sample and the others.

        Returns:
            `.sample` [B, out_channels, frames, height, width], and `.others` alike, one for each of the other texts.

        Raises:
            ConfigError: sizes that the patches do not divide, a text without a token, guidance missing, or attention_kwargs.
        """
        config, batch, device = self.config, hidden_states.shape[0], hidden_states.device
        self._check_inputs(timestep, batch, attention_kwargs)
        if config.guidance_embeds and guidance is None:
            raise ConfigError(f"guidance: got none, expected [{batch}], since this model was trained with it")
        grid = self._grid(hidden_states, config.patch)
        text = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "pooled_projections": pooled_projections,
        }
        told = self._texts(text, others)
        states = [each["encoder_hidden_states"] for each in told]
        lengths = tuple(TextLengths.of(each["encoder_attention_mask"], each["encoder_hidden_states"]) for each in told)
        ops = self._ops_for(math.prod(grid))
        rotary = self._rotary_table(grid, config.rope_axes_dim, device, theta=config.rope_theta)[ops.own]
        timestep = timestep.expand(batch)
        cut = [each[:, : of_text.longest] for each, of_text in zip(states, lengths, strict=True)]
        texts = self.context_embedder(cut, timestep, lengths)
        pooled = [each["pooled_projections"] for each in told]
        conditions = self.time_text_embed(timestep, *pooled, guidance=guidance)
        videos = self._streams(self.x_embedder["proj"](hidden_states), len(texts), ops)  # [B, S, C] each
        context = Context(conditions, lengths, rotary, ops)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            videos, texts = block(videos, texts, context)
        norm = partial(ops.layer_norm, eps=EPS)
        samples = []
        for x, (scale, shift) in zip(videos, self.norm_out(*conditions), strict=True):
            patches = self._head(x, norm, scale, shift, self.proj_out, ops=ops)
            samples.append(self._unpatchify(patches, grid, config.patch, channels_first=True))
            del patches
        return self._output(samples, return_dict)
