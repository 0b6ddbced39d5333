"""Wan 2.1 and 2.2, VACE, SkyReels V2."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from originals.parts import WIDTH, Original, Put, RMSNorm, attend, mlp, ones, rotated, rotations

__all__ = ["MODELS", "WanAttention"]


class WanLayerNorm(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(WIDTH, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).type_as(x)


class WanAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(), RMSNorm()

    def forward(self, x: torch.Tensor, freqs: torch.Tensor | None, context: torch.Tensor | None = None) -> torch.Tensor:
        source = x if context is None else context

        def qkv() -> tuple[torch.Tensor, ...]:
            return self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)

        q, k, v = qkv()
        if freqs is not None:
            q, k = rotated(q, freqs), rotated(k, freqs)
        return self.o(attend(q, k, v))


class WanBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = WanLayerNorm(), WanLayerNorm()
        self.self_attn, self.cross_attn = WanAttention(), WanAttention()
        self.norm3 = nn.LayerNorm(WIDTH)
        self.ffn = mlp()
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor, freqs: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        assert e.dtype == torch.float32
        with torch.autocast(x.device.type, enabled=False):
            e0, e1, e2, e3, e4, e5 = (self.modulation.float().unsqueeze(0) + e).unbind(2)
        y = self.self_attn((self.norm1(x).float() * (1 + e1) + e0).type_as(x), freqs)
        x = x + (y * e2).type_as(x)
        x = x + self.cross_attn(self.norm3(x), None, context)
        return x + (self.ffn((self.norm2(x).float() * (1 + e4) + e3).type_as(x)) * e5).type_as(x)


class WanHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = WanLayerNorm()
        self.head = nn.Linear(WIDTH, 16)
        self.modulation = nn.Parameter(torch.randn(1, 2, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        assert e.dtype == torch.float32
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = (self.modulation.float().unsqueeze(0) + e.unsqueeze(2)).unbind(2)
            return self.head((self.norm(x) * (1 + scale) + shift).to(self.head.weight.dtype))


class Wan(nn.Module):
    """Lists of clips, and frequencies in a plain attribute that goes where the patch embedder is."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(24, WIDTH), nn.GELU(approximate="tanh"), nn.Linear(WIDTH, WIDTH))
        self.time_embedding = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(WanBlock() for _ in range(layers))
        self.head = WanHead()
        self.freqs = rotations(64)

    def times(self, t: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One embedding for each token (2.2 and diffusion forcing); 2.1 has one for all."""
        with torch.autocast(t.device.type, enabled=False):
            wave = torch.outer(t.flatten().float(), 2.0 ** torch.arange(8, device=t.device).float())
            weight = self.time_embedding[0].weight
            e = self.time_embedding(torch.cat([wave.cos(), wave.sin()], -1).to(weight.dtype)).float()
            e0 = self.time_projection(e.to(weight.dtype)).float().unflatten(1, (1, 6, WIDTH))
        e, e0 = e.view(t.shape[0], -1, WIDTH), e0.view(t.shape[0], -1, 6, WIDTH)
        return e.expand(-1, length, -1), e0.expand(-1, length, -1, -1)

    def embedded(self, clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Size]:
        device = self.patch_embedding.weight.device
        if self.freqs.device != device:
            self.freqs = self.freqs.to(device)
        found = [self.patch_embedding(clip.unsqueeze(0)) for clip in clips]
        return torch.cat([x.flatten(2).transpose(1, 2) for x in found]), found[0].shape[2:]

    def through(self, x: torch.Tensor, clips: list[torch.Tensor], **kwargs: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, **kwargs)
        return x

    def forward(
        self, clips: list[torch.Tensor], t: torch.Tensor, context: list[torch.Tensor], **more: Any
    ) -> list[torch.Tensor]:
        x, grid = self.embedded(clips)
        e, e0 = self.times(t, x.shape[1])
        text = self.text_embedding(torch.stack([F.pad(u, (0, 0, 0, 8 - u.shape[0])) for u in context]))
        x = self.through(x, clips, e=e0, freqs=self.freqs[: x.shape[1]], context=text, **more)
        return [self.unpatchify(u, grid) for u in self.head(x, e)]

    def unpatchify(self, u: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        u = u.view(*grid, 1, 2, 2, 4)
        return torch.einsum("fhwpqrc->cfphqwr", u).reshape(4, grid[0], 2 * grid[1], 2 * grid[2]).float()


def call_wan(model: Wan, put: Put, *, per_frame: bool = False, dtype: torch.dtype | None = None, **more: Any) -> Any:
    clips = [put(ones(4, 2, 4, 4, seed=seed)) for seed in range(2)]
    t = put(ones(2, 8) * 500) if per_frame else put(torch.tensor([700.0, 20.0]))
    texts = [put(ones(5, 24)), put(ones(3, 24, seed=4))]
    with torch.autocast(clips[0].device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        return model(clips, t, texts, **more)


class VaceBlock(WanBlock):
    def __init__(self, *, is_first: bool) -> None:
        super().__init__()
        if is_first:
            self.before_proj = nn.Linear(WIDTH, WIDTH)
        self.after_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, c: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        *done, c = torch.unbind(c) if hasattr(self, "after_proj") and c.ndim == 4 else [self.before_proj(c) + x]
        c = super().forward(c, **kwargs)
        return torch.stack([*done, self.after_proj(c), c])


class Vace(Wan):
    """A second list of blocks runs first and leaves hints for some of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.vace_layers_mapping = {0: 0, 2: 1}
        self.vace_patch_embedding = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.vace_blocks = nn.ModuleList(VaceBlock(is_first=index == 0) for index in range(2))

    def through(self, x: torch.Tensor, clips: list[torch.Tensor], **kwargs: Any) -> torch.Tensor:
        c = torch.cat([self.vace_patch_embedding(clip[None]).flatten(2).transpose(1, 2) for clip in clips])
        for block in self.vace_blocks:
            c = block(c, x=x, **kwargs)
        hints = torch.unbind(c)[:-1]
        for index, block in enumerate(self.blocks):
            x = block(x, **kwargs)
            if index in self.vace_layers_mapping:
                x = x + hints[self.vace_layers_mapping[index]] * 0.7
        return x


class SkyReels(Wan):
    """Diffusion forcing, an embedding of the frame rate, and TeaCache: residuals of a pass are kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.fps_embedding = nn.Embedding(2, WIDTH)
        self.fps_projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.cnt = 0
        self.previous_residual: torch.Tensor | None = None

    def through(
        self, x: torch.Tensor, clips: list[torch.Tensor], *, e: torch.Tensor, fps: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        e = e + self.fps_projection(self.fps_embedding(fps)).float().unflatten(1, (1, 6, WIDTH))
        self.cnt += 1
        if self.cnt % 2 == 0 and self.previous_residual is not None:
            return x + self.previous_residual
        start = x.clone()
        x = super().through(x, clips, e=e, **kwargs)
        self.previous_residual = x - start
        return x


def call_sky(model: SkyReels, put: Put) -> list[torch.Tensor]:
    return list(
        itertools.chain(*(call_wan(model, put, per_frame=True, fps=put(torch.tensor([1, 0]))) for _ in range(3)))
    )


MODELS: dict[str, Original] = {
    "Wan 2.1": (Wan, call_wan),
    "Wan 2.1 in bf16": (lambda: Wan().to(torch.bfloat16), partial(call_wan, dtype=torch.bfloat16)),
    "Wan 2.1 under autocast": (Wan, partial(call_wan, dtype=torch.bfloat16)),
    "Wan 2.2": (Wan, partial(call_wan, per_frame=True)),
    "VACE": (Vace, call_wan),
    "SkyReels V2": (SkyReels, call_sky),
}
