"""Encoders of texts and pictures."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from originals.parts import WIDTH, Original, Put, RMSNorm, attend, given, ones

__all__ = ["MODELS"]


class T5Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.type_as(self.weight)
        return self.weight * x


class RelativeBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 4)

    def forward(self, count: int) -> torch.Tensor:
        device = self.embedding.weight.device
        distance = torch.arange(count, device=device)[None] - torch.arange(count, device=device)[:, None]
        return self.embedding(distance.clamp(-15, 15) + 15).permute(2, 0, 1)[None].contiguous()


class T5Block(nn.Module):
    def __init__(self, *, has_own: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = T5Norm(), T5Norm()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.fc = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)
        self.pos_embedding = RelativeBias() if has_own else None

    def forward(self, x: torch.Tensor, pos_bias: torch.Tensor | None) -> torch.Tensor:
        bias = pos_bias if self.pos_embedding is None else self.pos_embedding(x.shape[1])
        q, k, v = (y.unflatten(-1, (4, -1)) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        scores = torch.einsum("binc,bjnc->bnij", q, k) + bias
        x = x + self.o(torch.einsum("bnij,bjnc->binc", scores.float().softmax(-1).type_as(scores), v).flatten(2))
        y = self.norm2(x)
        return x + self.out(self.fc(y) * self.gate(y))


class T5(nn.Module):
    """Relative positions are shared by all blocks, or each has its own (UMT5)."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(100, WIDTH)
        self.pos_embedding = RelativeBias() if shared else None
        self.blocks = nn.ModuleList(T5Block(has_own=not shared) for _ in range(4))
        self.norm = T5Norm()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(ids)
        bias = None if self.pos_embedding is None else self.pos_embedding(x.shape[1])
        for block in self.blocks:
            x = block(x, pos_bias=bias)
        return self.norm(x)


class Vision(nn.Module):
    """Wan's CLIP: the layers are a Sequential, of which all but the last run; text is told by the weight of the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.transformer = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True) for _ in range(4))
        )
        self.head = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: torch.Tensor, use_31_block: bool = False) -> torch.Tensor:
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(x.shape[0], -1, -1), x], 1) + self.pos_embedding[:, : x.shape[1] + 1]
        if use_31_block:
            return self.transformer[:-1](x)
        return self.transformer(x) @ self.head


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Vision()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x.to(self.visual.head.dtype)) * self.log_scale.exp()


class StepLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 96), nn.SiLU(), nn.Linear(96, WIDTH))
        self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.wqkv(self.attention_norm(x)).chunk(3, -1)
        x = x + self.wo.forward(attend(q, k, v))
        return x + self.feed_forward.forward(self.ffn_norm(x))


class StepEncoder(nn.Module):
    """Words are looked up by a function; layers are called by their ``forward``; the head is the table, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(128, WIDTH)
        self.layers = nn.ModuleList(StepLayer() for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.tok_embeddings.weight)
        for layer in self.layers:
            x = layer.forward(x)
        return x @ self.tok_embeddings.weight[:64].T


def call_clip(model: Clip, put: Put) -> list[torch.Tensor]:
    picture = put(ones(2, 3, 16, 16))
    return [model.visual(picture, use_31_block=True), model(picture)]


IDS = torch.tensor([[5, 9, 2, 44, 5], [1, 0, 63, 7, 7]])
MODELS: dict[str, Original] = {
    "T5, shared positions": (lambda: T5(shared=True), given(IDS)),
    "T5, own positions, bf16": (lambda: T5(shared=False).to(torch.bfloat16), given(IDS)),
    "CLIP": (Clip, call_clip),
    "Step-Video's encoder": (StepEncoder, given(IDS)),
}
