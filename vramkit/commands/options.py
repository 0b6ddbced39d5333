"""Choices and options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Annotated

import typer

from vramkit.errors import ConfigError

__all__ = [
    "Allow",
    "ComputeDtype",
    "Device",
    "Dtype",
    "FirstImage",
    "FlowShift",
    "Fps",
    "Frames",
    "Guidance",
    "Height",
    "KeepLatents",
    "LastImage",
    "Lora",
    "LoraWeight",
    "ModelName",
    "NegativePrompt",
    "Offload",
    "OffloadBy",
    "Quantize",
    "QuantizeTo",
    "Ram",
    "Resident",
    "Seed",
    "Size",
    "Slots",
    "Steps",
    "Store",
    "Tiling",
    "Vram",
    "Width",
    "check_budget",
    "check_streaming",
    "named_by_option",
    "sides",
]


class Offload(str, Enum):
    """Where weights are while they do not compute."""

    none = "none"
    model = "model"
    block = "block"
    leaf = "leaf"


class Dtype(str, Enum):
    """The dtype that text encoder and transformer compute in."""

    auto = "auto"
    bfloat16 = "bf16"
    float16 = "fp16"
    float32 = "fp32"


class Quantize(str, Enum):
    """What the transformer's large weights are stored in."""

    fp8 = "fp8"
    int8 = "int8"
    nf4 = "nf4"


ModelName = Annotated[str, typer.Option(help="Checkpoint folder or Hugging Face repository id.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What it should not show.")]
FirstImage = Annotated[
    str | None, typer.Option("--image", help="The picture that the clip begins with: a path or an address.")
]
LastImage = Annotated[str | None, typer.Option(help="The one that it ends with, for a checkpoint trained so.")]
Size = Annotated[str | None, typer.Option(help='Width and height in pixels at once, such as "832x480".')]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=2**64 - 1)]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the video.")]
FlowShift = Annotated[float | None, typer.Option(help="Shift of a Wan schedule: 3 for 480p, 5 for 720p.")]
ComputeDtype = Annotated[
    Dtype, typer.Option("--dtype", help="auto: bf16 on a GPU, fp32 on the CPU. The VAE of Wan stays in fp32.")
]
Vram = Annotated[
    str | None, typer.Option(help='Device memory to stay within, such as "6GiB"; the rest is worked out by itself.')
]
Ram = Annotated[str | None, typer.Option(help='Bound on host memory, with --vram, such as "32GiB".')]
Allow = Annotated[str, typer.Option(help="With --vram: exact, bounded (weights in fewer bits) or any.")]
OffloadBy = Annotated[Offload, typer.Option("--offload", help="Stream weights by block or leaf, whole models, or not.")]
Store = Annotated[
    str | None,
    typer.Option(help="Where streamed weights rest: registered, mapped, pageable or disk; by itself when left out."),
]
Resident = Annotated[str, typer.Option(help='Transformer weights that stay on the device, such as "4GiB".')]
Slots = Annotated[
    int | None, typer.Option(help="Device slots that weights pass through; 2 for blocks, 3 for leaves.", min=1)
]
QuantizeTo = Annotated[
    Quantize | None, typer.Option("--quantize", help="What the transformer's large weights are stored in.")
]
Lora = Annotated[str | None, typer.Option(help="Adapter: a safetensors file, a folder or a repository.")]
LoraWeight = Annotated[float, typer.Option(help="How much the adapter counts.")]
Tiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory, more time.")]
KeepLatents = Annotated[
    bool, typer.Option("--keep-latents", help="Leave the latents beside the video when it is written.")
]

# Arguments of pipelines and of offloading, by what the command line calls them.
_OPTIONS = {
    "height": "--height",
    "width": "--width",
    "num_frames": "--frames",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "flow_shift": "--flow-shift",
    "fps": "--fps",
}


@contextmanager
def named_by_option() -> Iterator[None]:
    """Let errors name the options, where they name the arguments that they became: "height is 40" -> "--height is 40"."""
    try:
        yield
    except ConfigError as error:
        arguments = rf"(?<![\w-])({'|'.join(_OPTIONS)})(?= is|=)"
        raise ConfigError(re.sub(arguments, lambda match: _OPTIONS[match[1]], str(error))) from error


def sides(size: str | None, *, height: int | None, width: int | None) -> dict[str, int | None]:
    """Return height and width, of text such as ``"832x480"`` (width first) where that was given.

    Raises:
        ConfigError: it is of another form, or was given with one of them.
    """
    if size is None:
        return {"height": height, "width": width}
    match = re.fullmatch(r"(\d+)[x*](\d+)", size.strip().lower())
    if match is None:
        raise ConfigError(f'--size {size!r}; expected width and height in pixels, such as "832x480"')
    if height is not None or width is not None:
        raise ConfigError(f"--size {size} was given with --height or --width; leave one of them out")
    return {"height": int(match[2]), "width": int(match[1])}


def check_budget(*, vram: str | None, ram: str | None, allow: str = "exact", by_hand: Mapping[str, object]) -> None:
    """Refuse a budget that is none, and what is given in vain, or beside it `by_hand`."""
    if vram is None:
        if ram is not None or allow != "exact":
            raise ConfigError("--ram and --allow go with --vram, which was not given")
        return
    if given := [name for name, value in by_hand.items() if value not in (None, False, "0")]:
        option = given[0].replace("_", "-")
        raise ConfigError(f"--{option} was given with --vram, which chooses that by itself; leave one of them out")
    from vramkit.planning.planner import Budget  # noqa: PLC0415 - a run by hand needs none of it

    Budget(vram, ram, allow)


def check_streaming(offload: Offload, *, store: str | None, resident: str, slots: int | None) -> None:
    """Refuse options of streaming that cannot be used, or not with this offloading."""
    from typing import get_args  # noqa: PLC0415

    from vramkit.memory import parse_bytes  # noqa: PLC0415
    from vramkit.offload.stores import StoreKind  # noqa: PLC0415

    options = {"--store": store, "--resident": resident, "--slots": slots}
    given = [name for name, value in options.items() if value not in (None, "0")]
    if given and offload in (Offload.none, Offload.model):
        raise ConfigError(f"{given[0]} was given with --offload {offload.value}; it goes with block or leaf")
    if store is not None and store not in get_args(StoreKind):
        raise ConfigError(f"--store is {store!r}; expected one of {', '.join(get_args(StoreKind))}")
    try:
        parse_bytes(resident)
    except ConfigError as error:
        raise ConfigError(f"--resident: {error}") from error
