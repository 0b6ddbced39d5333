"""Flux and who took after it: HunyuanVideo 1 and 1.5, FramePack, and the blocks of Open-Sora 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from originals.parts import WIDTH, Original, Put, RMSNorm, attend, mlp, ones, rotated, rotations

__all__ = ["MODELS", "SelfAttention"]


class QKNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm("scale"), RMSNorm("scale")

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    """Never called: others call what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), QKNorm(), nn.Linear(WIDTH, WIDTH)


class Modulation(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.lin = count, nn.Linear(WIDTH, count * WIDTH)

    def forward(self, vec: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(vec))[:, None, :].chunk(self.count, dim=-1)


class DoubleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(6))
            setattr(self, f"{stream}_norm1", nn.LayerNorm(WIDTH, elementwise_affine=False))
            setattr(self, f"{stream}_attn", SelfAttention())
            setattr(self, f"{stream}_norm2", nn.LayerNorm(WIDTH, elementwise_affine=False))
            setattr(self, f"{stream}_mlp", mlp())
        self.processor: Callable[..., Any] = processed

    def forward(self, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> Any:
        return self.processor(self, img, txt, vec, pe)


def processed(block: Any, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> Any:
    """Open-Sora's processor, and what Flux does inline: children of the attention are called past it."""
    mods, found = {}, {}
    for stream, x in (("txt", txt), ("img", img)):
        mod, norm1, attn = (getattr(block, f"{stream}_{part}") for part in ("mod", "norm1", "attn"))
        mods[stream] = mod(vec)
        q, k, v = attn.qkv((1 + mods[stream][1]) * norm1(x) + mods[stream][0]).chunk(3, -1)
        found[stream] = (*attn.norm(q, k, v), v)
    q, k, v = (torch.cat(pair, 1) for pair in zip(found["txt"], found["img"], strict=True))
    both = attend(rotated(q, pe), rotated(k, pe), v).split([txt.shape[1], img.shape[1]], 1)
    out = []
    for stream, x, y in (("txt", txt, both[0]), ("img", img, both[1])):
        mod = mods[stream]
        h = x + mod[2] * getattr(block, f"{stream}_attn").proj(y)
        out.append(
            h + mod[5] * getattr(block, f"{stream}_mlp")((1 + mod[4]) * getattr(block, f"{stream}_norm2")(h) + mod[3])
        )
    return out[1], out[0]


class SingleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm, self.pre_norm = QKNorm(), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = Modulation(3)

    def forward(self, x: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = torch.split(self.linear1((1 + scale) * self.pre_norm(x) + shift), [3 * WIDTH, 2 * WIDTH], -1)
        q, k, v = qkv.chunk(3, -1)
        q, k = self.norm(q, k, v)
        y = attend(rotated(q, pe), rotated(k, pe), v)
        return x + gate * self.linear2(torch.cat((y, F.gelu(hidden, approximate="tanh")), 2))


class Flux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(16, WIDTH), nn.Linear(24, WIDTH)
        self.time_in, self.vector_in = (
            nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)) for _ in "ab"
        )
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(3))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": Modulation(2), "linear": nn.Linear(WIDTH, 16)})

    def blocks(self, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        for block in self.double_blocks:
            img, txt = block(*[img, txt, vec, pe])
        x = torch.cat((txt, img), 1)
        for _, block in enumerate(self.single_blocks):
            x = block(x, vec, pe)
        return x[:, txt.shape[1] :, ...]

    def inputs(
        self, img: torch.Tensor, txt: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wave = t[:, None].float() * torch.arange(1, 9, device=t.device)
        vec = self.time_in(torch.cat([wave.cos(), wave.sin()], -1).to(self.img_in.weight.dtype)) + self.vector_in(y)
        pe = rotations(img.shape[1] + txt.shape[1]).to(img.device)
        return self.img_in(img), self.txt_in(txt), vec, pe

    def forward(self, img: torch.Tensor, txt: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        img, txt, vec, pe = self.inputs(img, txt, t, y)
        img = self.blocks(img, txt, vec, pe)
        shift, scale = self.final_layer["adaLN_modulation"](vec)
        return self.final_layer["linear"](img * (1 + scale) + shift)


def call_flux(model: nn.Module, put: Put, calls: int = 1) -> list[torch.Tensor]:
    t = torch.tensor([0.5, 0.1])
    return [model(*map(put, (ones(2, 8, 16), ones(2, 5, 24), t / (1 + n), ones(2, 16)))) for n in range(calls)]


class Hunyuan(Flux):
    """TeaCache: parts of the first block tell whether the others run; what they did last time is kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.txt_in = TokenRefiner()
        self.enable_teacache, self.cnt = True, 0
        self.previous_modulated: torch.Tensor | None = None
        self.previous_residual: torch.Tensor | None = None

    def blocks(self, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        shift, scale, *_ = self.double_blocks[0].img_mod(vec.clone())
        modulated = self.double_blocks[0].img_norm1(img.clone()) * (1 + scale) + shift
        previous, self.previous_modulated = self.previous_modulated, modulated
        self.cnt += 1
        if previous is not None and self.previous_residual is not None and self.cnt % 3:
            return img + self.previous_residual + (modulated - previous).abs().mean()
        start = img.clone()
        img = super().blocks(img, txt, vec, pe)
        self.previous_residual = img - start
        return img


class TokenRefiner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(24, WIDTH)
        self.individual_token_refiner = nn.ModuleDict({"blocks": nn.ModuleList(SingleBlock() for _ in range(2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input_embedder(x)
        for block in self.individual_token_refiner["blocks"]:
            x = block(x, x.mean(1), rotations(x.shape[1]).to(x.device))
        return x


class Hunyuan15(Flux):
    """Embeddings of the kind of condition are looked up for zeros and added; tokens are put in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.cond_type_embedding = nn.Embedding(3, WIDTH)
        self.byt5_in = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.register_buffer("null_text", torch.zeros(1, 2, 24), persistent=False)

    def blocks(self, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        extra = self.byt5_in(self.null_text.expand(img.shape[0], -1, -1))
        kinds = [torch.zeros_like(x[:, :, 0], dtype=torch.int) + kind for kind, x in enumerate((txt, extra))]
        txt, extra = (x + self.cond_type_embedding(kind) for x, kind in zip((txt, extra), kinds, strict=True))
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=txt.device)
        parts = [torch.cat([e, u[m], torch.zeros_like(u[~m])]) for u, e, m in zip(txt, extra, mask, strict=True)]
        return super().blocks(img, torch.stack(parts), vec, rotations(img.shape[1] + 7).to(img.device))


class CleanEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.proj_2x = nn.Linear(16, WIDTH), nn.Linear(32, WIDTH)


class FramePack(Flux):
    """Everything goes through one method for checkpoints; embedders of history are parts of modules that are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.clean_x_embedder = CleanEmbedder()
        self.use_gradient_checkpointing = True

    def gradient_checkpointing_method(self, block: Callable[..., Any], *args: Any) -> Any:
        if self.use_gradient_checkpointing:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def blocks(self, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        history = img[:, :, :16]
        clean = self.gradient_checkpointing_method(self.clean_x_embedder.proj, history)
        twice = self.gradient_checkpointing_method(self.clean_x_embedder.proj_2x, history.reshape(img.shape[0], -1, 32))
        img, length = torch.cat([twice, clean, img], 1), img.shape[1]
        pe = rotations(img.shape[1] + txt.shape[1]).to(img.device)
        for block in self.double_blocks:
            img, txt = self.gradient_checkpointing_method(block, img, txt, vec, pe)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = self.gradient_checkpointing_method(block, x, vec, pe)
        return x[:, -length:]


MODELS: dict[str, Original] = {
    "Flux": (Flux, call_flux),
    "HunyuanVideo": (Hunyuan, partial(call_flux, calls=4)),
    "HunyuanVideo 1.5": (Hunyuan15, call_flux),
    "FramePack": (FramePack, call_flux),
}
