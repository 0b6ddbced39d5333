"""The first block of the video guide of diffusers, with our function for group offloading beside their own.

The block as it is written: `from_pretrained` of transformers and diffusers, the text encoder by four blocks, the transformer
by leaves with a stream, `pipeline.to("cuda")`, one call. Random weights of Wan2.1-14B at the published shapes (UMT5-XXL, VAE
in fp32) come from a local folder. Everything on the device needs 64 GiB there, the others 16.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.checkpoints import write_wan
from benchmarks.measure import digest, host_memory, peaks, release_memory, reset_peaks, synchronize
from benchmarks.networks import Clip
from benchmarks.rows import Row, Setting
from vramkit.offload import apply_group_offloading, offload_of

_PROMPT = "A white ferret on a log plays, leaps into the water and emerges; low angle, close up, soft light"
_NEGATIVE = "bright tones, blurred, static, worst quality"
_STEPS = 3
_CLIPS = {"full": Clip(480, 832, 81), "smoke": Clip(32, 32, 5)}


def settings(scale: str) -> Iterator[Setting]:
    """Everything on the device, ours, theirs."""
    for way in ("resident", "vramkit guide", "diffusers guide"):
        yield Setting(case="guide", subject=f"wan-14b {_CLIPS[scale]}", way=way)


class _Phases:
    """Seconds and allocator peaks of the phases of a clip, one after the other."""

    def __init__(self) -> None:
        self.row: Row = {}
        self._start = 0.0

    def begin(self) -> None:
        release_memory()
        reset_peaks()
        self._start = time.perf_counter()

    def end(self, name: str) -> None:
        synchronize()
        self.row |= {f"{name}_s": round(time.perf_counter() - self._start, 6), **peaks(f"{name}_")}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            result = call(*args, **kwargs)
            self.end(name)
            return result

        return timed


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Set up and make one clip."""
    # Several seconds, which are not those of the set-up.
    from diffusers import AutoencoderKLWan, AutoModel, WanPipeline, WanTransformer3DModel  # noqa: F401
    from transformers import T5TokenizerFast, UMT5EncoderModel  # noqa: F401

    folder = write_wan(bench.folder, bench.scale, bench.device)
    torch.zeros(1, device=bench.device)  # the context of the device is nobody's set-up either
    before = host_memory()["available_bytes"]
    phases = _Phases()
    phases.begin()
    pipeline = _pipeline(setting.way, str(folder), bench.device)
    phases.end("setup")
    row = phases.row | {"ram_taken_bytes": before - host_memory()["available_bytes"]}
    row |= _made(pipeline, _CLIPS[bench.scale])
    row |= host_memory() | {"link_gbps": bench.link_gbps}
    for name in ("text_encoder", "transformer"):
        offload = offload_of(getattr(pipeline, name))
        if offload is not None:
            stats = offload.stats()
            row |= {f"{name}_stores": stats.stores, f"{name}_stall_s": round(stats.stall_s, 3)}
    yield setting.row(**row)


def _pipeline(way: str, name: str, device: torch.device) -> Any:
    """Do what the block does before the call; `name` is in the place of "Wan-AI/Wan2.1-T2V-14B-Diffusers"."""
    from diffusers import AutoModel, WanPipeline
    from diffusers.hooks.group_offloading import apply_group_offloading as theirs
    from transformers import UMT5EncoderModel

    text_encoder = UMT5EncoderModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.bfloat16)
    vae = AutoModel.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32)
    transformer = AutoModel.from_pretrained(name, subfolder="transformer", torch_dtype=torch.bfloat16)
    devices: dict[str, Any] = {"onload_device": device, "offload_device": torch.device("cpu")}
    by_block: dict[str, Any] = {**devices, "offload_type": "block_level", "num_blocks_per_group": 4}
    by_leaf: dict[str, Any] = {**devices, "offload_type": "leaf_level", "use_stream": True}
    if way == "vramkit guide":
        apply_group_offloading(text_encoder, **by_block)
        apply_group_offloading(transformer, **by_leaf)
    elif way == "diffusers guide":
        theirs(text_encoder, **by_block)
        transformer.enable_group_offload(**by_leaf | {"use_stream": device.type == "cuda"})  # refused on the CPU
    else:  # weights that ask for gradients may take other kernels, and streamed ones never do
        for model in (text_encoder, transformer):
            model.requires_grad_(False)
    pipeline = WanPipeline.from_pretrained(
        name, vae=vae, transformer=transformer, text_encoder=text_encoder, torch_dtype=torch.bfloat16
    )
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _made(pipeline: Any, clip: Clip) -> Row:
    """Call the pipeline as the block does, with a clock at its seams: encode, steps, decode."""
    phases = _Phases()
    stamps: list[float] = []
    digests: dict[str, str] = {}
    encode, decode = phases.around("encode", pipeline.encode_prompt), phases.around("decode", pipeline.vae.decode)

    def encoded(*args: Any, **kwargs: Any) -> Any:
        states = encode(*args, **kwargs)
        digests["embeds"] = digest(states)
        phases.begin()
        stamps.append(time.perf_counter())
        return states

    def stepped(_pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronize()
        stamps.append(time.perf_counter())
        if step == _STEPS - 1:
            phases.end("steps")
            digests["latents"] = digest(tensors["latents"])
        return {}

    pipeline.encode_prompt, pipeline.vae.decode = encoded, decode
    video = pipeline(
        prompt=_PROMPT, negative_prompt=_NEGATIVE, height=clip.height, width=clip.width, num_frames=clip.frames,
        num_inference_steps=_STEPS, guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
        callback_on_step_end=stepped,
    ).frames[0]  # fmt: skip
    found = torch.as_tensor(video)
    seconds = [round(after - before, 6) for before, after in itertools.pairwise(stamps)]
    return phases.row | {
        "s": statistics.median(seconds[1:]),
        "slowest_s": max(seconds[1:]),
        "first_s": seconds[0],
        "repeats": _STEPS - 1,
        "is_finite": bool(found.isfinite().all()),
        "digest": digest(found),
        "digests": digests,
        "allocated_bytes": phases.row["steps_allocated_bytes"],
        "reserved_bytes": phases.row["steps_reserved_bytes"],
    }
