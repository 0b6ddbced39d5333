"""``vramkit verify``: the same clip with weights resident and streamed, compared bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vramkit.commands.options import (
    Device,
    Dtype,
    Offload,
    Ram,
    Resident,
    Slots,
    Store,
    Vram,
    check_budget,
    check_streaming,
    named_by_option,
)
from vramkit.errors import ConfigError, VramkitError

__all__ = ["verify"]


def verify(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face repository id.")],
    *,
    prompt: Annotated[str, typer.Option(help="What the clip shows.")] = "A red bird flies low above the sea",
    height: Annotated[int, typer.Option(help="Pixels.")] = 128,
    width: Annotated[int, typer.Option(help="Pixels.")] = 128,
    frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 9,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 on a GPU, fp32 on the CPU.")] = Dtype.auto,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    offload: Annotated[
        Offload, typer.Option(help="What is compared with resident: block, leaf or model.")
    ] = Offload.leaf,
    store: Store = None,
    resident: Resident = "0",
    slots: Slots = None,
) -> None:
    """Make a short clip twice, with all weights on the device and with weights streamed, and compare every bit.

    Succeeds (exit status 0) if latents and frames are the same. Weights that do not fit the device together come to it
    model by model, whole. With --vram the clip is made within that budget, and compared with one whose autoencoder decodes
    as the plan says.
    """
    # Read by MKL when torch is imported: otherwise it picks kernels by the alignment of weights.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    if offload is Offload.none:
        raise ConfigError(
            "--offload is 'none', which is what the others are compared with; expected block, leaf or model"
        )
    call = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
    }
    with named_by_option():
        streaming: dict[str, Any] = {"store": store, "resident": resident, "slots": slots}
        check_streaming(offload, store=store, resident=resident, slots=slots)
        check_budget(vram=vram, ram=ram, by_hand={"offload": offload is not Offload.leaf, **streaming})
        budget = None if vram is None else {"vram": vram, "ram": ram}
        _compare(model, call, dtype, device, offload, streaming, budget)
    typer.echo("the same, bit by bit: latents and frames")


def _compare(  # noqa: PLR0917
    model: str,
    call: dict[str, Any],
    dtype: Dtype,
    device: str,
    offload: Offload,
    streaming: dict[str, Any],
    budget: dict[str, Any] | None,
) -> None:
    import numpy as np  # noqa: PLC0415

    from vramkit.commands.checkpoints import load, outline, place, resolve_dtype  # noqa: PLC0415
    from vramkit.commands.progress import say  # noqa: PLC0415
    from vramkit.machine import resolve_device  # noqa: PLC0415

    device = resolve_device(device)
    outline(model).check(**call)
    made, settle = {}, None
    for is_resident in (False, True):  # resident after the other one, whose plan says how the autoencoder decodes
        name = "resident" if is_resident else "planned" if budget else offload.value
        pipeline = load(model, resolve_dtype(dtype, device))
        if is_resident:
            place(pipeline, device, _resident(model, device))
            if settle is not None:
                settle(pipeline)
        elif budget is None:
            place(pipeline, device, offload, **streaming)
        else:
            settle = _fitted(pipeline, call, device, budget)
        pipeline.set_progress_bar_config(desc=f"{name:<8}")
        made[is_resident] = _clip(pipeline, call)
        say(name, _sums(*made[is_resident]))
        del pipeline
    (latents, clip), (streamed_latents, streamed_clip) = made[True], made[False]
    if not np.isfinite(clip).all():
        raise VramkitError("the clip is not all numbers (NaN or infinity), so it proves nothing; try --dtype fp32")
    if latents.tobytes() != streamed_latents.tobytes():
        raise VramkitError(_difference("latents", latents, streamed_latents))
    if clip.tobytes() != streamed_clip.tobytes():
        raise VramkitError(_difference("frames", clip, streamed_clip) + "; the latents are the same")


def _fitted(pipeline: Any, call: dict[str, Any], device: str, budget: dict[str, Any]) -> Callable[[Any], None]:
    """Fit a pipeline into the budget; return what lets another one be called in the same way."""
    from vramkit.commands.progress import say  # noqa: PLC0415
    from vramkit.planning import fit  # noqa: PLC0415
    from vramkit.planning.components import components_of  # noqa: PLC0415
    from vramkit.planning.features import Features, Settings  # noqa: PLC0415

    fitted = fit(pipeline, device=device, **budget, **call)
    say("plan", *fitted.explain().splitlines())

    def settle(other: Any) -> None:
        modules = {name: component.module for name, component in components_of(other).items()}
        Features(other, modules).set(Settings.of(fitted.plan))

    return settle


def _resident(model: str, device: str) -> Offload:
    """How all weights are on the device: together if they fit, else one model after the other."""
    if device == "cpu":
        return Offload.none
    import torch  # noqa: PLC0415

    from vramkit.commands.checkpoints import models_of, outline  # noqa: PLC0415
    from vramkit.memory import module_bytes  # noqa: PLC0415

    weights_bytes = sum(map(module_bytes, models_of(outline(model)).values()))
    # The outline has no text encoders, which are the larger half of most checkpoints.
    return Offload.none if 3 * weights_bytes < torch.cuda.mem_get_info(device)[0] else Offload.model


def _clip(pipeline: Any, call: dict[str, Any]) -> tuple[Any, Any]:
    """Latents and frames as arrays."""
    import torch  # noqa: PLC0415

    kept: list[Any] = []

    def follow(phase: str, **given: Any) -> None:
        if phase == "decode":
            kept.append(given["latents"].float().cpu().numpy())  # float holds every number of a smaller dtype
            torch.manual_seed(0)  # some decoders draw noise

    pipeline.on_phase = follow
    frames = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
    return kept[0], frames


def _sums(latents: Any, frames: Any) -> str:
    import zlib  # noqa: PLC0415

    return f"latents {zlib.crc32(latents.tobytes()):08x}, frames {zlib.crc32(frames.tobytes()):08x}"


def _difference(what: str, resident: Any, streamed: Any) -> str:
    import numpy as np  # noqa: PLC0415

    differing = int(np.count_nonzero(resident != streamed))
    largest = float(np.abs(resident - streamed).max())
    return f"the {what} differ in {differing} of {resident.size} numbers, by up to {largest:.3g}: please report it"
