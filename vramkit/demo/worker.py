"""One generation of the demo in a process of its own, so that its memory is measured alone.

``python -m vramkit.demo.worker REQUEST`` with a `Request` as JSON; writes frames.npy and trace.json into its folder.
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
from vramkit.offload import apply_group_offloading
from vramkit.pipelines.video import postprocess_video
from vramkit.pipelines.wan.pipeline import WanPipeline
from vramkit.trace import MemoryTimeline

if TYPE_CHECKING:
    from torch import nn

FRAMES = "frames.npy"
TRACE = "trace.json"
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


def generate(request: Request) -> None:
    """Load the checkpoint, generate the preset's clip, and write frames and memory trace."""
    preset, device, folder = PRESETS[request.preset], torch.device(request.device), Path(request.folder)
    _warm_up(device)
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
            stream_weights(pipeline, device)
        frames = _run(pipeline, preset, timeline)
    np.save(folder / FRAMES, frames)
    timeline.save(folder / TRACE)


def make_resident(pipeline: WanPipeline, device: torch.device) -> None:
    """Bring all weights into the memory of ``device``: copied to a GPU, read in from the mapped files on the CPU."""
    pipeline.to(device)
    if device.type == "cpu":
        for module in _modules(pipeline):
            for parameter in module.parameters():
                parameter.view(-1).view(torch.uint8)[::_PAGE_BYTES].max()  # touching a page is what makes it resident


def stream_weights(pipeline: WanPipeline, device: torch.device) -> None:
    """Leave all weights in the checkpoint's files and send them through small rings of slots in ``device``'s memory."""
    store = "disk" if device.type == "cpu" else None
    for module in _modules(pipeline):
        apply_group_offloading(module, device, offload_type="leaf_level", store=store, slots=2)


def _run(pipeline: WanPipeline, preset: Preset, timeline: MemoryTimeline) -> Any:
    """Generate in the pipeline's three steps, so that the timeline can mark where each begins."""
    pipeline.set_progress_bar_config(desc="denoise", leave=False)
    with torch.no_grad():
        timeline.mark("encode")
        embeds, negative_embeds = pipeline.encode_prompt(
            preset.prompt, preset.negative_prompt, max_sequence_length=preset.max_sequence_length
        )
        timeline.mark("denoise")
        latents = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            height=preset.height,
            width=preset.width,
            num_frames=preset.num_frames,
            num_inference_steps=preset.num_inference_steps,
            guidance_scale=preset.guidance_scale,
            generator=torch.Generator().manual_seed(preset.seed),
            output_type="latent",
        ).frames
        timeline.mark("decode")
        return postprocess_video(pipeline.decode_latents(latents), "np")[0]


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
