"""The families that the tests run on: a small checkpoint and a small clip of each, and how diffusers makes that clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import checkpoints
import PIL.Image
import pytest
import torch

import vramkit

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Family:
    pipeline: str
    write: Callable[..., Path]
    layout: dict[str, Any] = field(default_factory=dict)  # arguments of it
    clip: dict[str, Any]
    latents: tuple[int, ...]  # their shape in that clip
    multiple: int = 16  # of heights and widths
    embeds: tuple[str, ...] = ("prompt_embeds",)  # what stands for a text
    guided: dict[str, Any]  # what makes a negative prompt count
    tiles: dict[str, Any]  # arguments of enable_tiling
    is_variant: bool = (
        False  # the call of another family with other conditions: what they share is tried on that one alone
    )


def picture(width: int = 70, height: int = 50, *, seed: int = 7) -> PIL.Image.Image:
    """Coloured noise, coarse enough to survive resizing."""
    pixels = torch.randint(0, 256, (6, 9, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy()).resize((width, height), PIL.Image.Resampling.BICUBIC)


_SMALL = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16}
_TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 32,
    "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 16,
}
FAMILIES = {
    "Wan2.1": Family(
        pipeline="WanPipeline",
        write=checkpoints.write_wan_checkpoint,
        clip=_SMALL,
        latents=(1, 16, 2, 4, 6),
        guided={},
        tiles=_TILES,
    ),
    "Wan2.2 A14B": Family(
        pipeline="WanPipeline",
        write=checkpoints.write_wan_checkpoint,
        layout={"options": {"boundary_ratio": 0.875}},
        clip=_SMALL | {"guidance_scale_2": 3.0},
        latents=(1, 16, 2, 4, 6),
        guided={},
        tiles=_TILES,
        is_variant=True,
    ),
    "Wan2.1 image-to-video": Family(
        pipeline="WanImageToVideoPipeline",
        write=checkpoints.write_wan_checkpoint,
        layout={
            "pipeline": "WanImageToVideoPipeline",
            "transformer": {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 48},
        },
        clip=_SMALL | {"image": picture(), "max_sequence_length": 512},  # which diffusers counts on
        latents=(1, 16, 2, 4, 6),
        guided={},
        tiles=_TILES,
        is_variant=True,
    ),
    "Wan2.2 5B": Family(
        pipeline="WanImageToVideoPipeline",  # its folder names the other, which it serves as well
        write=checkpoints.write_wan_checkpoint,
        layout=checkpoints.WAN_5B,
        clip=_SMALL | {"height": 64, "width": 96, "image": picture()},
        latents=(1, 8, 2, 4, 6),
        multiple=32,
        guided={},
        tiles={name: 2 * size for name, size in _TILES.items()},
        is_variant=True,
    ),
    "HunyuanVideo": Family(
        pipeline="HunyuanVideoPipeline",
        write=checkpoints.write_hunyuan_checkpoint,
        clip=_SMALL,
        latents=(1, 4, 2, 4, 6),
        embeds=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        guided={"true_cfg_scale": 3.0},
        tiles=_TILES,
    ),
    "LTX-Video": Family(
        pipeline="LTXPipeline",
        write=checkpoints.write_ltx_checkpoint,
        clip=_SMALL | {"height": 64, "width": 96, "num_frames": 9},
        latents=(1, 12, 8),
        multiple=32,
        embeds=("prompt_embeds", "prompt_attention_mask"),
        guided={},
        tiles={name: 2 * size for name, size in _TILES.items()},
    ),
    "LTX-Video image-to-video": Family(
        pipeline="LTXImageToVideoPipeline",
        write=checkpoints.write_ltx_checkpoint,
        clip=_SMALL | {"height": 64, "width": 96, "num_frames": 9, "image": picture()},
        latents=(1, 12, 8),
        multiple=32,
        embeds=("prompt_embeds", "prompt_attention_mask"),
        guided={},
        tiles={name: 2 * size for name, size in _TILES.items()},
        is_variant=True,
    ),
    "LTX-Video conditions": Family(
        pipeline="LTXConditionPipeline",
        write=checkpoints.write_ltx_checkpoint,
        layout={"pipeline": "LTXConditionPipeline", "version": "0.9.5", "scheduler": {"shift": 1.0}},
        clip=_SMALL
        | {"height": 64, "width": 96, "num_frames": 9, "decode_timestep": 0.05}
        | {
            "conditions": [
                vramkit.LTXVideoCondition(image=picture()),
                vramkit.LTXVideoCondition(image=picture(seed=8), frame_index=5, strength=0.7),
            ]
        },
        latents=(1, 8, 2, 2, 3),
        multiple=32,
        embeds=("prompt_embeds", "prompt_attention_mask"),
        guided={},
        tiles={name: 2 * size for name, size in _TILES.items()},
        is_variant=True,
    ),
    "CogVideoX": Family(
        pipeline="CogVideoXPipeline",
        write=checkpoints.write_cogvideox_checkpoint,
        clip=_SMALL | {"num_frames": 9},
        latents=(1, 3, 4, 4, 6),
        guided={},
        tiles={
            "tile_sample_min_height": 32,
            "tile_sample_min_width": 32,
            "tile_overlap_factor_height": 0.25,
            "tile_overlap_factor_width": 0.25,
        },
    ),
    "CogVideoX image-to-video": Family(
        pipeline="CogVideoXImageToVideoPipeline",
        write=checkpoints.write_cogvideox_checkpoint,
        layout={
            "pipeline": "CogVideoXImageToVideoPipeline",
            "scheduler": "dpm",
            "transformer": {
                "in_channels": 8,
                "use_rotary_positional_embeddings": True,
                "use_learned_positional_embeddings": True,
            },
        },
        clip=_SMALL | {"num_frames": 9, "image": picture()},
        latents=(1, 3, 4, 4, 6),
        guided={},
        tiles={
            "tile_sample_min_height": 32,
            "tile_sample_min_width": 32,
            "tile_overlap_factor_height": 0.25,
            "tile_overlap_factor_width": 0.25,
        },
        is_variant=True,
    ),
}
# Those whose calls have arguments of their own.
WHOLE = [name for name, family in FAMILIES.items() if not family.is_variant]


class Stock:
    """Checkpoints and what was loaded from them, each made once for all tests: to be read, not changed.

    Options are those of the family's writer; dictionaries are added to those of its layout.
    """

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[str, Any] = {}

    def folder(self, family: str, **options: Any) -> Path:
        def write() -> Path:
            layout = FAMILIES[family].layout
            both = {
                name: layout[name] | given if isinstance(given, dict) and name in layout else given
                for name, given in options.items()
            }
            return FAMILIES[family].write(self._folders.mktemp("checkpoint"), **layout | both)

        return self.once(f"folder {family} {options}", write)

    def oracle(self, family: str, **options: Any) -> Any:
        kind = FAMILIES[family].pipeline
        make = partial(checkpoints.load_oracle, self.folder(family, **options), kind)
        return self.once(f"oracle {family} {options}", make)

    def pipeline(self, family: str, **options: Any) -> Any:
        """A pipeline of one's own, around shared models."""
        shared = self.once(f"pipeline {family} {options}", lambda: load(family, self.folder(family, **options)))
        pipeline = type(shared)(**shared.components, **shared.config)
        pipeline.scheduler = type(shared.scheduler).from_config(shared.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def once(self, key: str, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def load(family: str, folder: Path, **options: Any) -> Any:
    pipeline = getattr(vramkit, FAMILIES[family].pipeline).from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def ready(
    family: str, name: str = "", *, tokens: int = 12, lengths: tuple[int, ...] = (7,), seed: int = 3
) -> dict[str, torch.Tensor]:
    """Ready embeddings of a text for each length, as arguments of a call; name is "negative_" or nothing."""
    g, batch = seeded(seed), len(lengths)
    every = {
        "prompt_embeds": torch.randn(batch, tokens, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(batch, 16, generator=g),
        "prompt_attention_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long(),
    }
    return {name + key: every[key] for key in FAMILIES[family].embeds}


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest difference in units of the largest number."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def frames(pipeline: Any, **arguments: Any) -> Any:
    """What a call makes of a seed; a generator is given as a function that makes one."""
    arguments = {"output_type": "np", "num_inference_steps": 5, "generator": seeded} | arguments
    if not {"prompt", "prompt_embeds"} & arguments.keys():
        arguments["prompt"] = "a cat on a log"
    torch.manual_seed(5)  # some decoders draw from the global generator
    return pipeline(**arguments | {"generator": arguments["generator"]()}).frames


def compare(ours: Any, oracle: Any, **arguments: Any) -> None:
    """Assert that a call makes the same clip with both pipelines."""
    clip, expected = (frames(pipeline, **arguments) for pipeline in (ours, oracle))
    assert type(clip) is type(expected)
    assert clip.dtype == expected.dtype
    assert relative_error(clip, expected) <= 1e-4
    assert float(torch.as_tensor(expected).std()) > 0.02  # a flat picture would prove nothing
