"""One generation of the demo in a process of its own, so that its memory is measured alone.

`main` is given a `Request` as JSON, and writes frames.npy, trace.json and facts.json into its folder.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vramkit.demo.presets import PRESETS, Preset
from vramkit.errors import VramkitError
from vramkit.memory import format_bytes
from vramkit.offload.allocator import use_expandable_segments
from vramkit.pipelines.wan.pipeline import WanPipeline
from vramkit.planning import Fit, Plan, fit, plan
from vramkit.timeline import MemoryTimeline

if TYPE_CHECKING:
    from torch import nn

FRAMES = "frames.npy"
TRACE = "trace.json"
FACTS = "facts.json"  # {"link_s": seconds of what was streamed on the link alone, "decode": how the plan decodes}
# Budgets on the CPU count process memory: this much is kept for what is no tensor, as plans do by themselves on a GPU. Up to
# 33 MiB of it were used on Linux, with one thread.
CPU_MARGIN_BYTES = 48 * 2**20
_PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a worker is asked for."""

    checkpoint: str
    preset: str
    device: str
    folder: str  # where the results go
    budget_bytes: int | None  # None: everything resident

    def to_json(self) -> str:
        """Return the request as one command line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` returned."""
        return cls(**json.loads(text))


def main(argument: str) -> int:
    """Run the request; print one line and return 1 when it fails."""
    request = Request.from_json(argument)
    try:
        generate(request)
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        budget = "" if request.budget_bytes is None else f" of {format_bytes(request.budget_bytes)}"
        print(f"error: the device memory{budget} is not enough; raise --budget", file=sys.stderr)  # noqa: T201
        return 1
    except (VramkitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def plan_clip(checkpoint: str, preset: Preset, budget_bytes: int, device: torch.device) -> Plan:
    """Plan the preset's clip within a budget, from the configs alone."""
    return plan(checkpoint, planned_bytes(budget_bytes, device), device=device, dtype=torch.float32, **preset.clip())


def planned_bytes(budget_bytes: int, device: torch.device) -> int:
    """Return what of a budget is there for tensors to be planned with."""
    # At the least a size that nobody takes for a slip of the pen, for which the planner names the one that fits.
    return max(1024, budget_bytes - (CPU_MARGIN_BYTES if device.type == "cpu" else 0))


def generate(request: Request) -> None:
    """Load the checkpoint, generate the preset's clip, and write frames and memory trace."""
    preset, device, folder = PRESETS[request.preset], torch.device(request.device), Path(request.folder)
    use_expandable_segments(device)
    _warm_up(device)
    fitted: Fit | None = None
    if request.budget_bytes is not None:
        plan_clip(
            request.checkpoint, preset, request.budget_bytes, device
        )  # what the planner loads is not the model's memory
    if device.type == "cuda" and request.budget_bytes is not None:
        # A real cap: an allocation beyond the budget fails, as on a card of that size.
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(request.budget_bytes / total_bytes, device)
    with MemoryTimeline(device) as timeline:
        timeline.mark("load")
        pipeline = WanPipeline.from_pretrained(request.checkpoint)
        if request.budget_bytes is None:
            make_resident(pipeline, device)
        else:
            fitted = fit(pipeline, planned_bytes(request.budget_bytes, device), device=device, **preset.clip())
        frames = _run(pipeline, preset, timeline)
    np.save(folder / FRAMES, frames)
    timeline.save(folder / TRACE)
    facts = {} if fitted is None else {"link_s": _link_s(fitted), "decode": str(fitted.plan.decode)}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def make_resident(pipeline: WanPipeline, device: torch.device) -> None:
    """Bring all weights into the memory of ``device``: copied to a GPU, read in from the mapped files on the CPU."""
    pipeline.to(device)
    if device.type == "cpu":
        for module in _modules(pipeline):
            for parameter in module.parameters():
                parameter.view(-1).view(torch.uint8)[::_PAGE_BYTES].max()  # touching a page is what makes it resident


def _link_s(fitted: Fit) -> float:
    """Seconds that the bytes which were streamed take on the link alone."""
    return sum(stats.loaded_bytes for stats in fitted.stats().values()) / (fitted.plan.link_gbps * 1e9)


def _run(pipeline: WanPipeline, preset: Preset, timeline: MemoryTimeline) -> Any:
    """Generate, with a mark on the timeline where each phase begins."""
    pipeline.set_progress_bar_config(desc="denoise", leave=False)
    pipeline.on_phase = lambda phase, **_: timeline.mark(phase)
    generator = torch.Generator().manual_seed(preset.seed)
    return pipeline(**preset.clip(), generator=generator, output_type="np").frames[0]


def _modules(pipeline: WanPipeline) -> list[nn.Module]:
    return [pipeline.text_encoder, pipeline.transformer, pipeline.vae]


def _warm_up(device: torch.device) -> None:
    """Load what torch loads at first use (kernels, threads, the tokenizer's library), which is not the model's memory."""
    import transformers  # noqa: PLC0415

    _ = transformers.AutoTokenizer, transformers.UMT5EncoderModel, transformers.UMT5Config
    ones = torch.ones(1, 8, 64, 64, device=device)
    torch.nn.functional.scaled_dot_product_attention(ones, ones, ones)
    torch.nn.functional.conv3d(ones[:, :, None], torch.ones(8, 8, 1, 3, 3, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
