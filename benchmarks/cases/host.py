"""What a group costs the host: a stack of small layers with copies left out, less the same stack with all on the device.

Results of such a run are wrong, so its rows have no digest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.emulation import without_copies
from benchmarks.measure import digest, host_memory, seconds_of
from benchmarks.rows import Row, Setting
from vramkit.offload import apply_group_offloading
from vramkit.quant import BitsAndBytes4bitConfig, Fp8Config, quantize

_WIDTH = 64  # a block of bitsandbytes
_GROUPS = 200
_WEIGHTS = ("bf16", "fp8", "nf4")


class Stack(nn.Module):
    """Layers one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape (batch, 64) after all layers."""
        for block in self.blocks:
            x = block(x)
        return x


@dataclasses.dataclass(frozen=True)
class Built:
    """A stack, and what it is given."""

    model: Stack
    x: Tensor


def settings(scale: str) -> Iterator[Setting]:
    """Weights of each kind."""
    groups = 12 if scale == "smoke" else _GROUPS
    for weights in _WEIGHTS:
        for way in ("vramkit block", "vramkit leaf"):
            options = {"weights": weights, "groups": groups}
            yield Setting(case="host", subject=f"{groups} linear layers {weights}", way=way, options=options)


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one."""
    built = stack_of(setting.options["groups"], bench, setting.options["weights"])
    yield setting.row(**overhead(built, setting.way, bench))


def stack_of(count: int, bench: Bench, weights: str = "bf16") -> Built:
    """Make a stack of `count` layers with weights of a kind, in host memory."""
    torch.manual_seed(0)
    model = Stack(count).to(torch.bfloat16).eval().requires_grad_(False)
    configs: dict[str, Any] = {"fp8": Fp8Config(), "nf4": BitsAndBytes4bitConfig(quant_type="nf4")}
    if weights in configs:
        quantize(model, configs[weights])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, _WIDTH, dtype=torch.bfloat16, generator=generator)
    return Built(model, x.to(bench.device))


def overhead(built: Built, way: str, bench: Bench) -> Row:
    """Return s (microseconds are in ``per_group_us``) of a pass without copies, and of the resident one."""
    call = unloaded(built, way, bench)
    with torch.no_grad():
        streamed = _fastest(call.run, bench)
        stats = call.told()
        call.remove()
        built.model.to(bench.device)
        resident = _fastest(lambda: built.model(built.x), bench)
    groups = stats["groups"]
    per_group_us = round((streamed - resident) / groups * 1e6, 2) if groups else None
    return {"s": streamed, "resident_s": resident, "groups": groups, "per_group_us": per_group_us, **host_memory()}


@dataclasses.dataclass(frozen=True)
class Unloaded:
    """A stack that is offloaded without copies: a pass, what the engine tells, and the way back."""

    run: Callable[[], Any]
    told: Callable[[], dict[str, Any]]
    remove: Callable[[], Any]


def unloaded(built: Built, way: str, bench: Bench) -> Unloaded:
    """Offload a stack with copies left out, after the passes that form its units."""
    level = way.removeprefix("vramkit ")
    with without_copies(), torch.no_grad():
        apart = 1 if level == "block" else None  # as many groups as layers, also of small ones
        offload = apply_group_offloading(
            built.model, bench.device, offload_type=f"{level}_level", num_blocks_per_group=apart
        )
        for _ in range(3):
            built.model(built.x)
    return Unloaded(lambda: built.model(built.x), lambda: {"groups": offload.stats().groups}, offload.remove)


def timed_stack(built: Built, way: str, bench: Bench) -> Row:
    """Return the figures of a pass through a stack, copies and all, with the seconds to apply."""
    row: Row = {}
    with torch.no_grad():
        with seconds_of(row, "setup_s"):
            applied = peers.apply(way, built.model, bench.device)
        with seconds_of(row, "first_s"):
            applied.call(built.x)
        figures, result = bench.measure(lambda: applied.call(built.x))
    row |= figures.row() | {"moved_bytes": applied.moved_bytes(), "link_gbps": bench.link_gbps}
    return row | {"digest": digest(result), "peer": applied.notes()}


def _fastest(call: Callable[[], Any], bench: Bench) -> float:
    """Return the seconds of the fastest of several calls, issued and waited for: what disturbs only adds."""
    best = float("inf")
    for _ in range(3 if bench.is_smoke else 30):
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
