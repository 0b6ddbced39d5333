"""Autoencoders: caches in lists, caches on each layer, functions that are given layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from originals.parts import Original, Put, given, ones

__all__ = ["MODELS"]

CHANNELS = 16

Cache = list[Any]


# --- Wan's autoencoder: a cache in lists on the module, handed down with a counter


class CausalConv(nn.Conv3d):
    def __init__(self, into: int, out: int, kernel: int = 3) -> None:
        super().__init__(into, out, kernel, padding=(0, kernel // 2, kernel // 2))
        self.reach = kernel - 1

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        missing = self.reach
        if cache is not None and missing:
            x = torch.cat([cache.to(x.device), x], 2)
            missing -= cache.shape[2]
        return super().forward(F.pad(x, (0, 0, 0, 0, missing, 0)))


class ChannelNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = CHANNELS**0.5, 0.0
        self.gamma = nn.Parameter(torch.rand(CHANNELS, 1, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma + self.bias


class WanResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(),
            nn.SiLU(),
            CausalConv(CHANNELS, CHANNELS),
            ChannelNorm(),
            nn.SiLU(),
            CausalConv(CHANNELS, CHANNELS),
        )
        self.shortcut = CausalConv(CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor, cache: Cache, at: list[int]) -> torch.Tensor:
        h = self.shortcut(x)
        for layer in self.residual:
            x = cached(layer, x, cache, at)
        return x + h


def cached(layer: nn.Module, x: torch.Tensor, cache: Cache, at: list[int]) -> torch.Tensor:
    """Every model file of Wan's repeats this: the last frames before a convolution are kept for the next call."""
    if not isinstance(layer, CausalConv):
        return layer(x)
    index = at[0]
    recent = x[:, :, -2:].clone()
    if recent.shape[2] < 2 and cache[index] is not None:
        recent = torch.cat([cache[index][:, :, -1:], recent], 2)
    x = layer(x, cache[index])
    cache[index] = recent
    at[0] += 1
    return x


class WanCoder(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(into, CHANNELS)
        self.middle = nn.Sequential(WanResidual(), WanResidual(), WanResidual())
        self.head = nn.Sequential(ChannelNorm(), nn.SiLU(), CausalConv(CHANNELS, out))

    def forward(self, x: torch.Tensor, feat_cache: Cache, feat_idx: list[int]) -> torch.Tensor:
        x = cached(self.conv1, x, feat_cache, feat_idx)
        for layer in self.middle:
            x = layer(x, feat_cache, feat_idx) if isinstance(layer, WanResidual) else layer(x)
        for layer in self.head:
            x = cached(layer, x, feat_cache, feat_idx)
        return x


class WanVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.conv1 = WanCoder(3, 8), CausalConv(8, 8, 1)
        self.conv2, self.decoder = CausalConv(4, 4, 1), WanCoder(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mu, log_var = self.encode(x, [0.5, 2.0])
        return self.decode(mu + torch.exp(0.5 * log_var), [0.5, 2.0])

    def encode(self, x: torch.Tensor, scale: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        self.clear_cache()
        found = []
        for at in range(x.shape[2]):
            self._enc_conv_idx = [0]
            found.append(self.encoder(x[:, :, at : at + 1], feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
        mu, log_var = self.conv1(torch.cat(found, 2)).chunk(2, dim=1)
        self.clear_cache()
        return (mu - scale[0]) * scale[1], log_var

    def decode(self, z: torch.Tensor, scale: list[float]) -> torch.Tensor:
        self.clear_cache()
        x = self.conv2(z / scale[1] + scale[0])
        out: list[torch.Tensor] = []
        for at in range(x.shape[2]):
            self._conv_idx = [0]
            out.append(self.decoder(x[:, :, at : at + 1], feat_cache=self._feat_map, feat_idx=self._conv_idx))
        self.clear_cache()
        return torch.cat(out, 2)

    def clear_cache(self) -> None:
        def count(part: nn.Module) -> int:
            return sum(isinstance(module, CausalConv) for module in part.modules())

        self._conv_idx, self._feat_map = [0], [None] * count(self.decoder)
        self._enc_conv_idx, self._enc_feat_map = [0], [None] * count(self.encoder)


def call_wan_vae(model: WanVAE, put: Put) -> list[torch.Tensor]:
    video = put(ones(1, 3, 3, 6, 6))
    mu, _ = model.encode(video, [0.5, 2.0])
    return [mu, model.decode(mu, [0.5, 2.0]), model(video)]


# --- CogVideo's: each convolution keeps its own frames, on the host, until somebody says that it is the last piece


class CachingConv(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(into, out, 3, padding=(0, 1, 1))
        self.cache_padding: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, clear_cache: bool = True) -> torch.Tensor:
        before = (
            x[:, :, :1].expand(-1, -1, 2, -1, -1) if self.cache_padding is None else self.cache_padding.to(x.device)
        )
        x = torch.cat([before.to(x.dtype), x], 2)
        del self.cache_padding
        self.cache_padding = None if clear_cache else x[:, :, -2:].contiguous().detach().clone().cpu()
        return self.conv(x)


class SpatialNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(4, CHANNELS)
        self.conv_y, self.conv_b = nn.Conv3d(4, CHANNELS, 1), nn.Conv3d(4, CHANNELS, 1)

    def forward(self, f: torch.Tensor, zq: torch.Tensor) -> torch.Tensor:
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)


class CogDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = CachingConv(4, CHANNELS), CachingConv(CHANNELS, 3)
        self.up = nn.ModuleList()
        for _ in range(3):
            level = nn.Module()
            level.block = nn.ModuleList([CachingConv(CHANNELS, CHANNELS)])
            level.norm = SpatialNorm()
            level.upsample = nn.Conv3d(CHANNELS, CHANNELS, 1)
            self.up.insert(0, level)

    def forward(self, z: torch.Tensor, clear_cache: bool) -> torch.Tensor:
        h = self.conv_in(z, clear_cache)
        for at in reversed(range(3)):
            level = self.up[at]
            h = h + level.block[0](F.silu(level.norm(h, z)), clear_cache)
            h = level.upsample(h)
        return self.conv_out(h, clear_cache)


class CogVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = CogDecoder()
        self.register_buffer("scale_factor", torch.tensor(1.5))

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        pieces = (z / self.scale_factor).split([2, 1, 1], 2)
        return torch.cat([self.decoder(piece, at == len(pieces) - 1) for at, piece in enumerate(pieces)], 2)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.decode(z)


# --- Step-Video's: functions of the repository read the weights of layers that they are given


def norm_by(x: torch.Tensor, norm: nn.GroupNorm, *, act_silu: bool = False) -> torch.Tensor:
    y = F.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if act_silu else y


def conv_by(x: torch.Tensor, conv: nn.Conv3d, residual: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.cat([F.conv3d(part, conv.weight[:, at], None, padding=1) for at, part in halves(x)], 1)
    out = out + conv.bias[None, :, None, None, None]
    return out if residual is None else out + residual


def halves(x: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """One group of channels: the published code cuts frames and channels to fit memory."""
    return [(slice(None), x)]


class StepResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, CHANNELS), nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, CHANNELS), nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor, is_init_image: bool) -> torch.Tensor:
        h = conv_by(norm_by(x, self.norm1, act_silu=True), self.conv1)
        if is_init_image:
            h = torch.cat([h[:, :, :1] * 0.5, h[:, :, 1:]], 2)
        return conv_by(norm_by(h, self.norm2, act_silu=True), self.conv2, residual=x)


class StepVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(4, CHANNELS, 3, padding=1)
        self.block = nn.ModuleList(StepResidual() for _ in range(4))
        self.norm_out, self.conv_out = nn.GroupNorm(4, CHANNELS), nn.Conv3d(CHANNELS, 3, 3, padding=1)

    def decode(self, z: torch.Tensor, is_init_image: bool = True) -> torch.Tensor:
        x = conv_by(z, self.conv_in)
        for block in self.block:
            x = block(x, is_init_image)
        return conv_by(norm_by(x, self.norm_out, act_silu=True), self.conv_out)


# --- LTX-Video's and HunyuanVideo's


class HunyuanVAE(nn.Module):
    """Attention between the residual blocks, in lists that are run together; the first frame goes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.per_channel_statistics = nn.Module()
        self.per_channel_statistics.register_buffer("std-of-means", torch.rand(4) + 0.5)
        self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
        self.conv_in, self.conv_out = CachingConv(4, CHANNELS), CachingConv(CHANNELS, 3)
        self.attentions = nn.ModuleList(nn.Conv3d(CHANNELS, CHANNELS, 1) for _ in range(3))
        self.resnets = nn.ModuleList(CachingConv(CHANNELS, CHANNELS) for _ in range(4))
        self.last_scale_shift_table = nn.Parameter(torch.randn(2, CHANNELS))

    def first_frame_and_rest(self, x: torch.Tensor) -> torch.Tensor:
        first, rest = x.split((1, x.shape[2] - 1), 2)
        return torch.cat((self.conv_in(first), self.conv_in(rest)), 2)

    def decode(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        std = getattr(self.per_channel_statistics, "std-of-means").view(1, -1, 1, 1, 1).to(z.dtype)
        x = self.resnets[0](self.first_frame_and_rest(z * std))
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(x + attention(x))
        shift, scale = (self.last_scale_shift_table[None] + (timestep * self.timestep_scale_multiplier).sin()).unbind(1)
        return self.conv_out(x * (1 + scale[..., None, None, None]) + shift[..., None, None, None])


LATENTS = ones(1, 4, 4, 6, 6)
MODELS: dict[str, Original] = {
    "Wan's autoencoder": (WanVAE, call_wan_vae),
    "CogVideo's autoencoder": (CogVAE, given(LATENTS, method="decode")),
    "Step-Video's autoencoder": (StepVAE, given(LATENTS, method="decode")),
    "HunyuanVideo's autoencoder": (HunyuanVAE, given(LATENTS, torch.tensor([[0.3]]), method="decode")),
}
