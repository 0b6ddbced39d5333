"""The demo's checkpoint: random weights in the published folder layout, kept in a cache folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from vramkit.demo.tokenizer import write_tokenizer
from vramkit.errors import StoreError

if TYPE_CHECKING:
    from torch import nn

    from vramkit.demo.presets import Preset

MANIFEST = "manifest.json"
# Part of the manifest: raise it when the same preset gives other bytes, and old caches are rewritten.
FORMAT = 1


def cache_folder() -> Path:
    """Return the folder for files that can be made again: ``VRAMKIT_CACHE``, else the platform's cache folder."""
    if chosen := os.environ.get("VRAMKIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vramkit"


def cached_checkpoint(preset: Preset, *, cache: Path | None = None, fresh: bool = False) -> Path:
    """Return the folder of the preset's checkpoint, writing it when it is missing, old or damaged.

    Args:
        preset: what to write.
        cache: the folder that holds it; by default ``cache_folder()``.
        fresh: write it again in any case.

    Raises:
        StoreError: it cannot be written, for example because the disk is full. Nothing half-written stays behind.
    """
    cache = cache_folder() if cache is None else cache
    target = cache / f"demo-{preset.name}"
    if not fresh and is_whole(target, preset):
        return target
    part = cache / f".{target.name}.{os.getpid()}.part"
    _remove_abandoned(cache, target.name)
    try:
        part.mkdir(parents=True)
        write_checkpoint(part, preset)
        write_manifest(part, preset)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    except OSError as error:
        raise StoreError(f"the demo's checkpoint cannot be written to {target}: {error}; set VRAMKIT_CACHE") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _remove_abandoned(cache: Path, name: str) -> None:
    """Remove what processes that were killed while writing have left."""
    for part in cache.glob(f".{name}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(part, ignore_errors=True)


def write_manifest(folder: Path, preset: Preset) -> None:
    """Note what the folder holds, for `is_whole`."""
    manifest = {"format": FORMAT, "preset": preset.shape(), "files": _file_sums(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def is_whole(folder: Path, preset: Preset) -> bool:
    """Say whether the folder holds this preset's checkpoint, every byte as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {"format": FORMAT, "preset": json.loads(json.dumps(preset.shape())), "files": _file_sums(folder)}
    except (OSError, ValueError):
        return False
    return bool(manifest == expected)


def write_checkpoint(folder: Path, preset: Preset) -> None:
    """Write a Wan2.1 checkpoint with random float32 weights, fixed by the preset alone, into ``folder``."""
    from transformers import UMT5Config, UMT5EncoderModel  # noqa: PLC0415 - a few seconds to import

    from vramkit.pipelines.loading.text_encoders import load_tokenizer  # noqa: PLC0415
    from vramkit.pipelines.schedulers import UniPCMultistepScheduler  # noqa: PLC0415
    from vramkit.pipelines.wan.pipeline import WanPipeline  # noqa: PLC0415
    from vramkit.pipelines.wan.transformer import WanTransformer3DModel  # noqa: PLC0415
    from vramkit.pipelines.wan.vae import AutoencoderKLWan  # noqa: PLC0415

    write_tokenizer(folder / "tokenizer")
    generator = torch.Generator().manual_seed(preset.seed)
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(preset.transformer)
        vae = AutoencoderKLWan.from_config(preset.vae)
        text_encoder = UMT5EncoderModel(UMT5Config(**preset.text_encoder))
    models = [_randomized(model, generator) for model in (text_encoder, transformer, vae)]
    text_encoder.tie_weights()  # to_empty gave the shared embedding a tensor for each of its names
    # The published 1.3B and 14B checkpoints carry these settings.
    scheduler: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    WanPipeline(
        tokenizer=load_tokenizer(folder / "tokenizer"),
        text_encoder=models[0],
        transformer=models[1],
        vae=models[2],
        scheduler=UniPCMultistepScheduler.from_config(scheduler | {"flow_shift": preset.flow_shift}),
    ).save_pretrained(folder)


def _randomized(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give a model on the meta device random weights that keep the size of what flows through them."""
    model.to_empty(device="cpu").requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        if fan_in == 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith(("weight", "gamma")) and parameter.numel() == parameter.shape[0]:
            parameter.add_(1.0)  # the scale of a norm
    return model.eval()


def _file_sums(folder: Path) -> dict[str, list[int]]:
    """Return size and CRC-32 of each file below ``folder``, the manifest aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)] for path in files}


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total
