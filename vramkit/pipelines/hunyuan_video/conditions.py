"""What the HunyuanVideo transformer is conditioned on: timestep, guidance and text, and how long each text is.

Shapes: B batch, T text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.pipelines.networks.attention import attention
from vramkit.pipelines.networks.layers import TimestepEmbedding, sinusoidal_embedding
from vramkit.pipelines.networks.text_masks import first_tokens, text_lengths

__all__ = ["ConditionEmbedder", "TextLengths", "TokenRefiner"]

TIME_FEATURES = 256


@dataclass(frozen=True, slots=True)
class TextLengths:
    """How many tokens of each sample's text meet the video, and which of them meet one another before.

    Both are the tokens in front, and those behind are cut off. Where a mask has zeros before ones, as a tokenizer that pads
    on the left makes it, the published model reads the mask in the refiner only and then takes as many tokens from the
    front as the mask has ones. A compiler knows no lengths, so nothing is cut there.
    """

    counts: tuple[int, ...]
    refined: Tensor | None = None  # bool [B, T]: the mask, where cutting does not do
    joined: Tensor | None = None  # bool [B, T]: the tokens in front, where they cannot be cut

    @classmethod
    def of(cls, mask: Tensor | Sequence[int], text: Tensor) -> TextLengths:
        """Lengths of texts [B, T, ...] from a mask [B, T], or from the lengths themselves.

        Raises:
            ConfigError: another shape, or a text without a token.
        """
        batch, tokens = text.shape[:2]
        if isinstance(mask, Tensor):
            if mask.shape != (batch, tokens):
                raise ConfigError(
                    f"encoder_attention_mask: got shape {tuple(mask.shape)}, expected ({batch}, {tokens}), as "
                    "encoder_hidden_states has it"
                )
            if torch.compiler.is_compiling():
                return cls((tokens,) * batch, mask.bool(), first_tokens(mask.bool().sum(dim=1), tokens))
        counts = text_lengths(mask) if isinstance(mask, Tensor) else tuple(mask)
        refined = None
        if counts is None and isinstance(mask, Tensor):
            refined = mask.bool()
            counts = tuple(refined.sum(dim=1).tolist())
        if counts is None or len(counts) != batch or not all(0 < count <= tokens for count in counts):
            raise ConfigError(
                f"encoder_attention_mask: got texts of {counts} tokens, expected {batch} of 1 to {tokens} tokens"
            )
        return cls(counts, refined)

    @property
    def longest(self) -> int:
        """How many tokens there have to be before `cut`."""
        return max(self.counts) if self.refined is None else self.refined.shape[1]

    def cut(self, tokens: Tensor, sample: int) -> Tensor:
        """The tokens [T, ...] of a sample that meet the video."""
        return tokens[: self.counts[sample]]

    def joint_mask(self, sample: int, others: int) -> Tensor | None:
        """What masks the keys of a sample if `cut` could not: bool [S + T], for `others` S and after them its text."""
        return None if self.joined is None else F.pad(self.joined[sample], (others, 0), value=True)

    def mean(self, text: Tensor) -> Tensor:
        """The mean [B, C] of each text [B, T, C] over its tokens, in fp32."""
        if self.refined is None:
            return torch.stack([self.cut(tokens, b).float().mean(dim=0) for b, tokens in enumerate(text)])
        mask = self.refined[..., None].float()  # [B, T, 1]
        return (text.float() * mask).sum(dim=1) / mask.sum(dim=1)

    def refine(self, query: Tensor, key: Tensor, value: Tensor, sample: int) -> Tensor:
        """Attention over a sample's text, [T, H, D] each -> [T, C]; zeros behind its last token where it is cut."""
        if self.refined is None:
            parts = [self.cut(tokens, sample) for tokens in (query, key, value)]
            attended = attention(parts[0], parts[1], parts[2])
            return F.pad(attended, (0, 0, 0, query.shape[0] - attended.shape[0]))
        mask = self.refined[sample]
        pairs = mask[:, None] & mask  # [T, T]
        pairs[:, 0] = True  # so that no token is left without one to attend to
        return attention(query, key, value, pairs)


class TimeTextEmbedder(nn.Module):
    """The sum of a timestep's embedding and a pooled text's."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, text_channels: int, channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, channels)
        self.text_embedder = TimestepEmbedding(text_channels, channels)  # the same two layers

    def forward(self, timestep: Tensor, *pooled: Tensor) -> tuple[Tensor, ...]:
        """Timestep [B] and pooled texts [B, text_channels] -> [B, C] for each text."""
        time: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep, TIME_FEATURES))
        return tuple(time + self.text_embedder(each) for each in pooled)


class ConditionEmbedder(TimeTextEmbedder):
    """The same with an embedding of the guidance scale, for models that were distilled to take it."""

    def __init__(self, text_channels: int, channels: int, *, guidance: bool) -> None:
        super().__init__(text_channels, channels)
        self.guidance_embedder = TimestepEmbedding(TIME_FEATURES, channels) if guidance else None

    def forward(self, timestep: Tensor, *pooled: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, ...]:
        """Timestep [B], pooled texts [B, text_channels] and guidance [B] -> [B, C] for each text."""
        conditions = super().forward(timestep, *pooled)
        if self.guidance_embedder is None or guidance is None:
            return conditions
        embedded: Tensor = self.guidance_embedder(sinusoidal_embedding(guidance, TIME_FEATURES))
        return tuple(condition + embedded for condition in conditions)


class _Silu(nn.Module):
    """The first half of a feed-forward; its own module because checkpoints name it `net.0.proj`."""

    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.proj(x))


class _RefinerAttention(nn.Module):
    """Self-attention of texts, each over its own tokens."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, lengths: TextLengths) -> Tensor:
        """[B, T, C] -> the same."""
        layers = (self.to_q, self.to_k, self.to_v)
        query, key, value = (layer(x).unflatten(-1, (self.heads, -1)) for layer in layers)  # [B, T, H, D]
        attended = torch.stack([lengths.refine(query[b], key[b], value[b], b) for b in range(x.shape[0])])
        out: Tensor = self.to_out[0](attended)
        return out


class _Gates(nn.Module):
    """Two gates from an embedding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 2 * channels)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, C] -> two [B, 1, C]."""
        gates: Tensor = self.linear(F.silu(condition))[:, None]
        return gates.chunk(2, dim=-1)


class _RefinerBlock(nn.Module):
    """Attention and feed-forward over texts, their results gated by the timestep."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = _RefinerAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        # Checkpoints leave index 1 to a dropout.
        feed_forward = nn.Sequential(_Silu(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.ModuleDict({"net": feed_forward})
        self.norm_out = _Gates(channels)

    def forward(
        self, texts: Sequence[Tensor], conditions: Sequence[Tensor], lengths: Sequence[TextLengths]
    ) -> tuple[Tensor, ...]:
        """[B, T, C] each -> the same, one after the other."""
        return tuple(self._refined(*each) for each in zip(texts, conditions, lengths, strict=True))

    def _refined(self, x: Tensor, condition: Tensor, lengths: TextLengths) -> Tensor:
        gate1, gate2 = self.norm_out(condition)
        x = x + self.attn(self.norm1(x), lengths) * gate1
        out: Tensor = x + self.ff["net"](self.norm2(x)) * gate2
        return out


class TokenRefiner(nn.Module):
    """States of the text encoder to text tokens of the transformer."""

    def __init__(self, text_channels: int, channels: int, heads: int, *, layers: int) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedder(text_channels, channels)
        self.proj_in = nn.Linear(text_channels, channels)
        blocks = nn.ModuleList([_RefinerBlock(channels, heads) for _ in range(layers)])
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, texts: Sequence[Tensor], timestep: Tensor, lengths: Sequence[TextLengths]) -> tuple[Tensor, ...]:
        """Texts [B, T, text_channels], of these lengths, and timestep [B] -> [B, T, C] each."""
        means = [each.mean(text).to(text.dtype) for text, each in zip(texts, lengths, strict=True)]
        conditions = self.time_text_embed(timestep, *means)
        refined = tuple(map(self.proj_in, texts))
        for block in self.token_refiner["refiner_blocks"].children():
            refined = block(refined, conditions, lengths)
        return refined
