"""Clips of the reference families at their published sizes, from random weights of the published shapes.

    python -m benchmarks.families --out results/families --families hunyuan,ltx --folder /dev/shm

Each family runs twice in one process: with its transformer on the device, then with transformer and VAE streamed under a
memory cap and the clip decoded in tiles. Told are the seconds of a step against the floor max(resident seconds, streamed
bytes / link), the peak of the steps against the size activations + slots, and seconds and peak of the decode. Activations
are what the resident peak has beside the weights; slots are those of transformer and VAE. Needs a CUDA device that holds the
transformer (HunyuanVideo: 24 GiB of weights), 64 GiB of RAM, and room for the weights in `--folder`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vramkit
from benchmarks.measure import GIB, Row, environment, release_memory, table, write_json
from vramkit.memory import module_bytes, probe_link_gbps
from vramkit.offload import OffloadStats, apply_group_offloading, load_mapped
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.pipelines.modeling import AutoModel
from vramkit.pipelines.schedulers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from vramkit.pipelines.text_to_video import TextToVideoPipeline

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
STEPS = 2  # the first warms up, the last is measured
COLUMNS = (
    "family", "case", "clip", "step_s", "floor_s", "ratio", "step_gib", "size_gib", "decode_s", "decode_gib",
    "reserved_gib", "cap_gib", "same_bytes", "error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family is made of, the clip that it makes and the memory that it may use for it."""

    pipeline: str  # its class
    transformer: dict[str, Any]  # config.json
    vae: dict[str, Any]
    scheduler: Callable[[], Any]
    text: Callable[[], dict[str, torch.Tensor]]  # ready embeddings
    clip: dict[str, int]
    passes: int  # forwards per step
    cap_gib: float
    absent: tuple[str, ...] = ("tokenizer", "text_encoder")
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator)


def _t5(tokens: int, *, masks: bool) -> Callable[[], dict[str, torch.Tensor]]:
    def make() -> dict[str, torch.Tensor]:
        given = {f"{name}_embeds": _normal(1, tokens, 4096) for name in ("prompt", "negative_prompt")}
        if masks:
            ones = torch.ones(1, tokens, device=DEVICE, dtype=torch.bool)
            given |= {f"{name}_attention_mask": ones for name in ("prompt", "negative_prompt")}
        return given

    return make


def _llama_and_clip() -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": _normal(1, 256, 4096),
        "pooled_prompt_embeds": _normal(1, 768),
        "prompt_attention_mask": torch.ones(1, 256, device=DEVICE, dtype=torch.bool),
    }


_COG = {"_class_name": "CogVideoXTransformer3DModel"}
_COG_CLIP = {"height": 480, "width": 720, "num_frames": 49}
FAMILIES = {
    "hunyuan": Family(
        pipeline="HunyuanVideoPipeline",
        transformer={"_class_name": "HunyuanVideoTransformer3DModel"},
        vae={"_class_name": "AutoencoderKLHunyuanVideo"},
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(shift=7.0),
        text=_llama_and_clip,
        clip={"height": 720, "width": 1280, "num_frames": 129},
        passes=1,  # the guidance is a number that the model is told
        cap_gib=5.0,
        absent=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    ),
    "ltx": Family(
        pipeline="LTXPipeline",
        transformer={"_class_name": "LTXVideoTransformer3DModel"},
        vae={"_class_name": "AutoencoderKLLTXVideo"},
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        text=_t5(128, masks=True),
        clip={"height": 512, "width": 768, "num_frames": 161},
        passes=2,
        cap_gib=2.0,
    ),
    "cogvideox-2b": Family(
        pipeline="CogVideoXPipeline",
        transformer=_COG,
        vae={"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 1.15258426},
        scheduler=CogVideoXDDIMScheduler,
        text=_t5(226, masks=False),
        clip=_COG_CLIP,
        passes=2,
        cap_gib=3.0,
    ),
    "cogvideox-5b": Family(
        pipeline="CogVideoXPipeline",
        transformer=_COG | {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        vae={"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7},
        scheduler=CogVideoXDDIMScheduler,
        text=_t5(226, masks=False),
        clip=_COG_CLIP,
        passes=2,
        cap_gib=3.0,
    ),
}


def empty_model(config: dict[str, Any]) -> nn.Module:
    """Build a model without weights."""
    with torch.device("meta"):
        return AutoModel.class_named(config["_class_name"]).from_config(config).eval()


def random_checkpoint(path: Path, config: dict[str, Any]) -> Path:
    """Write random weights at the published shapes in bf16, unless the file is there."""
    if path.exists():
        return path
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    weights = {}
    for name, tensor in empty_model(config).state_dict().items():
        values = torch.empty(tensor.shape, device=DEVICE, dtype=DTYPE)
        weights[name] = values.normal_(0, 0.02, generator=generator).cpu()
    write_checkpoint(path, weights)
    return path


def load(family: Family, name: str, folder: Path) -> TextToVideoPipeline:
    """Build the pipeline, its weights mapped from files."""
    models = {
        part: load_mapped(empty_model(config), random_checkpoint(folder / f"{name}-{part}.safetensors", config))
        for part, config in (("transformer", family.transformer), ("vae", family.vae))
    }
    pipeline_class = getattr(vramkit, family.pipeline)
    pipeline: TextToVideoPipeline = pipeline_class(
        **models, scheduler=family.scheduler(), **dict.fromkeys(family.absent)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclasses.dataclass
class Watch:
    """A step callback that notes seconds, the peak of the steps, and what they gave."""

    since: float = 0.0
    step_s: float = 0.0
    step_bytes: int = 0
    latents: torch.Tensor | None = None

    def __call__(self, _pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.step_s, self.since = now - self.since, now
        self.step_bytes = max(self.step_bytes, torch.cuda.max_memory_allocated())
        self.latents = tensors["latents"].cpu()
        torch.cuda.reset_peak_memory_stats()


def generate(pipeline: TextToVideoPipeline, family: Family, output_type: str) -> tuple[Row, Watch]:
    """Make a clip; the peaks of steps and decode are kept apart."""
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    watch = Watch()
    pipeline(  # type: ignore[operator]
        **family.clip,
        **family.text(),
        **family.options,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        callback_on_step_end=watch,
    )
    torch.cuda.synchronize()
    row: Row = {"step_s": round(watch.step_s, 3), "step_gib": round(watch.step_bytes / GIB, 3)}
    if output_type != "latent":
        row["decode_s"] = round(time.perf_counter() - watch.since, 2)
        row["decode_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return row, watch


def run_resident(family: Family, name: str, folder: Path) -> tuple[Row, Watch, int]:
    """Denoise with the transformer on the device; also returns the bytes of activations."""
    pipeline = load(family, name, folder)
    pipeline.transformer.to(DEVICE)
    weights = module_bytes(pipeline.transformer)
    row, watch = generate(pipeline, family, "latent")
    return row | {"weights_gib": round(weights / GIB, 2)}, watch, watch.step_bytes - weights


def run_streamed(family: Family, name: str, folder: Path) -> tuple[Row, Watch, list[OffloadStats]]:
    """Denoise with transformer and VAE streamed under the cap, and decode in tiles; also returns their stats."""
    pipeline = load(family, name, folder)
    pipeline.vae.enable_tiling()
    offloads = [
        apply_group_offloading(module, DEVICE, offload_type="leaf_level")
        for module in (pipeline.transformer, pipeline.vae)
    ]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(family.cap_gib * GIB / total)
    try:
        row, watch = generate(pipeline, family, "pt")
        return row, watch, [offload.stats() for offload in offloads]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        for offload in offloads:
            offload.remove()


def run_family(name: str, folder: Path, link_gbps: float) -> list[Row]:
    """Both runs of a family, the second against the first."""
    family = FAMILIES[name]
    clip = "{height} x {width} x {num_frames}".format(**family.clip)
    row, resident, activations = run_resident(family, name, folder)
    rows = [{"family": name, "case": "transformer resident", "clip": clip} | row]
    print(rows[-1], flush=True)
    release_memory()
    streamed: Row = {"family": name, "case": "streamed, tiled decode", "clip": clip, "cap_gib": family.cap_gib}
    rows.append(streamed)
    try:
        row, watch, stats = run_streamed(family, name, folder)
    except torch.cuda.OutOfMemoryError as error:
        streamed["error"] = str(error).split(".")[0]
        return rows
    moved_bytes = stats[0].streamed_bytes * family.passes
    held_bytes = sum(each.slots * each.slot_bytes + each.resident_bytes for each in stats)
    floor = max(resident.step_s, moved_bytes / link_gbps / 1e9)
    assert watch.latents is not None
    assert resident.latents is not None
    streamed |= row | {
        "floor_s": round(floor, 3),
        "ratio": round(watch.step_s / floor, 3),
        "size_gib": round((activations + held_bytes) / GIB, 3),
        "same_bytes": torch.equal(watch.latents, resident.latents),
        "streamed_bytes": moved_bytes,
    }
    print(streamed, flush=True)
    return rows


def kept_rows(path: Path, *, without: list[str]) -> list[Row]:
    """Rows of other families that were measured on the same day, device and versions: a run may be done in parts."""
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("environment") != environment():
        return []
    return [row for row in found["rows"] if row["family"] not in without]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families"), help="path without an ending")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of: " + ", ".join(FAMILIES))
    parser.add_argument("--folder", type=Path, help="where to keep the weights (default: a temporary one)")
    args = parser.parse_args()
    rows = kept_rows(args.out.with_suffix(".json"), without=args.families.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        link_gbps = probe_link_gbps(DEVICE)
        notes = {"link_gbps": round(link_gbps, 2), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
        print(environment() | notes, flush=True)
        for name in args.families.split(","):
            start = time.perf_counter()
            rows += run_family(name, args.folder or Path(temporary), link_gbps)
            release_memory()
            torch._C._host_emptyCache()
            print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
            write_json(args.out.with_suffix(".json"), "families", rows, **notes)
            facts = "".join(f"- {key}: {value}\n" for key, value in (environment() | notes).items())
            report = f"# Clips of the reference families at their published sizes\n\n{facts}\n{table(rows, COLUMNS)}\n"
            args.out.with_suffix(".md").write_text(report)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
