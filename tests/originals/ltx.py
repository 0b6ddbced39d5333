"""LTX-Video, LTX-2, Step-Video."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from originals.parts import WIDTH, Original, Put, mlp, ones, rotations, tokens_and
from originals.wan import WanAttention

__all__ = ["MODELS"]


class LtxBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)
        self.attn1, self.attn2, self.ff = WanAttention(), WanAttention(), mlp()

    def forward(self, x: torch.Tensor, times: torch.Tensor, text: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        ada = self.scale_shift_table[None, None] + times.reshape(x.shape[0], -1, 6, WIDTH)
        shift, scale, gate, shift2, scale2, gate2 = ada.unbind(2)
        x = x + self.attn1(F.rms_norm(x, (WIDTH,)) * (1 + scale) + shift, freqs) * gate
        x = x + self.attn2(x, None, text)
        return x + self.ff(F.rms_norm(x, (WIDTH,)) * (1 + scale2) + shift2) * gate2


class Ltx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patchify_proj, self.proj_out = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.adaln_single = nn.ModuleDict({"emb": mlp(16), "linear": nn.Linear(WIDTH, 6 * WIDTH)})
        self.caption_projection = mlp(24)
        self.scale_shift_table = nn.Parameter(torch.randn(2, WIDTH) / WIDTH**0.5)
        self.transformer_blocks = nn.ModuleList(LtxBlock() for _ in range(4))

    def forward(self, x: torch.Tensor, text: torch.Tensor, t: torch.Tensor, skip: int | None = None) -> torch.Tensor:
        x, text = self.patchify_proj(x), self.caption_projection(text)
        emb = self.adaln_single["emb"](t[..., None].expand(*t.shape, 16))
        times = self.adaln_single["linear"](F.silu(emb))
        freqs = rotations(x.shape[1]).to(x.device)
        for index, block in enumerate(self.transformer_blocks):
            if index != skip:
                x = checkpoint(block, x, times, text, freqs, use_reentrant=False)
        shift, scale = (self.scale_shift_table[None, None] + emb[:, :, None]).unbind(2)
        return self.proj_out(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)


def call_ltx(model: Ltx, put: Put) -> list[torch.Tensor]:
    given = [put(ones(2, 8, 16)), put(ones(2, 5, 24)), put(ones(2, 8))]
    return [model(*given), model(*given, skip=2)]  # guidance that perturbs one block


@dataclasses.dataclass(frozen=True)
class Stream:
    x: torch.Tensor
    times: torch.Tensor
    freqs: torch.Tensor


class Ltx2Block(nn.Module):
    """Two streams in dataclasses that are replaced; tables of weights are cut into slices where they are used."""

    def __init__(self) -> None:
        super().__init__()
        for kind in ("video", "audio"):
            setattr(self, f"{kind}_attn", WanAttention())
            setattr(self, f"{kind}_cross", WanAttention())
            setattr(self, f"{kind}_ff", mlp())
            setattr(self, f"scale_shift_table_{kind}", nn.Parameter(torch.randn(9, WIDTH) / WIDTH**0.5))

    def get_ada_values(self, table: nn.Parameter, times: torch.Tensor, which: slice) -> tuple[torch.Tensor, ...]:
        return (table[which].unsqueeze(0).unsqueeze(0).to(times.dtype) + times[:, :, which]).unbind(2)

    def forward(self, video: Stream, audio: Stream) -> tuple[Stream, Stream]:
        streams = {"video": video, "audio": audio}
        for kind, stream in streams.items():
            shift, scale, gate = self.get_ada_values(self.table(kind), stream.times, slice(0, 3))
            y = getattr(self, f"{kind}_attn")(F.rms_norm(stream.x, (WIDTH,)) * (1 + scale) + shift, stream.freqs)
            streams[kind] = dataclasses.replace(stream, x=stream.x + y * gate)
        for kind, other in (("video", "audio"), ("audio", "video")):
            gate = self.table(kind)[6:7, :] + self.table(kind)[-1]
            y = getattr(self, f"{kind}_cross")(streams[kind].x, None, streams[other].x)
            streams[kind] = dataclasses.replace(streams[kind], x=streams[kind].x + y * gate)
        for kind, stream in streams.items():
            shift, scale, gate = self.get_ada_values(self.table(kind), stream.times, slice(3, 6))
            y = getattr(self, f"{kind}_ff")(stream.x * (1 + scale) + shift)
            streams[kind] = dataclasses.replace(stream, x=stream.x + y * gate)
        return streams["video"], streams["audio"]

    def table(self, kind: str) -> nn.Parameter:
        found: nn.Parameter = getattr(self, f"scale_shift_table_{kind}")
        return found


class Ltx2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adaln = nn.ModuleDict({kind: nn.Linear(16, 9 * WIDTH) for kind in ("video", "audio")})
        self.transformer_blocks = nn.ModuleList(Ltx2Block() for _ in range(3))

    def forward(self, video: torch.Tensor, audio: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def prepared(kind: str, x: torch.Tensor) -> Stream:
            times = self.adaln[kind](t[..., None].expand(*t.shape, 16)).unflatten(-1, (9, WIDTH))
            return Stream(x, times, rotations(x.shape[1]).to(x.device))

        streams = prepared("video", video), prepared("audio", audio)
        for block in self.transformer_blocks:
            streams = block(*streams)
        return streams[0].x, streams[1].x


class StepVideo(nn.Module):
    """A method runs the blocks, each by its ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.adaln_single, self.proj_out = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.transformer_blocks = nn.ModuleList(LtxBlock() for _ in range(4))

    def block_forward(self, x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            x = block.forward(x, *args)
        return x

    @torch.inference_mode()
    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        times = self.adaln_single(text.mean(1, keepdim=True))
        return self.proj_out(self.block_forward(x, times, text, rotations(x.shape[1]).to(x.device)))


MODELS: dict[str, Original] = {
    "LTX-Video": (Ltx, call_ltx),
    "LTX-2": (Ltx2, tokens_and((2, 4, WIDTH), (2, 1))),
    "Step-Video": (StepVideo, tokens_and((2, 5, WIDTH))),
}
