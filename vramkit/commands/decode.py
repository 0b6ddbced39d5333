"""``vramkit decode``: latents that an interrupted run left, to a video file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vramkit.commands.options import (
    Device,
    KeepLatents,
    Offload,
    Ram,
    Slots,
    Store,
    Tiling,
    Vram,
    check_budget,
    check_streaming,
    named_by_option,
)
from vramkit.errors import ConfigError

__all__ = ["decode"]


def decode(
    latents: Annotated[Path, typer.Argument(help="The file that `vramkit run` left beside its video.")],
    *,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that they were made with; as named then, when left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "--out", help="The video to write; the one of the run when left out.")
    ] = None,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    offload: Annotated[Offload, typer.Option(help="Stream weights by block or leaf, or not.")] = Offload.block,
    store: Store = None,
    slots: Slots = None,
    vae_tiling: Tiling = False,
    keep_latents: KeepLatents = False,
) -> None:
    """Make the video of a run that was interrupted after its last step, or ran out of memory while it decoded.

    The latents are removed when the video is written. Decoded as the run would have (in tiles if it was told so), the video
    is the same.
    """
    with named_by_option():
        check_streaming(offload, store=store, resident="0", slots=slots)
        by_hand = {"vae_tiling": vae_tiling, "offload": offload is not Offload.block, "store": store, "slots": slots}
        check_budget(vram=vram, ram=ram, by_hand=by_hand)
        place = None if vram is None else {"vram": vram, "ram": ram}
        typer.echo(_decode(latents, model, out, device, offload, vae_tiling, place, store=store, slots=slots))
    if not keep_latents:
        latents.unlink()


def _decode(  # noqa: PLR0917
    path: Path,
    model: str | None,
    out: Path | None,
    device: str,
    offload: Offload,
    vae_tiling: bool,
    budget: dict[str, Any] | None,
    *,
    store: str | None,
    slots: int | None,
) -> str:
    import torch  # noqa: PLC0415

    from vramkit.commands.checkpoints import describe_weights, load, place  # noqa: PLC0415
    from vramkit.commands.latents import Latents  # noqa: PLC0415
    from vramkit.commands.progress import Phases, say, with_bar  # noqa: PLC0415
    from vramkit.machine import resolve_device  # noqa: PLC0415
    from vramkit.pipelines.calling.pipeline import Pipeline  # noqa: PLC0415
    from vramkit.pipelines.calling.video import check_video, export_to_video, postprocess_video  # noqa: PLC0415
    from vramkit.timeline import MemoryTimeline  # noqa: PLC0415

    kept, device = Latents.load(path), resolve_device(device)
    video = check_video(path.with_name(kept.video) if out is None else out, fps=kept.fps)
    family = Pipeline.class_of(model or kept.model)
    if kept.pipeline not in (family.__name__, family.with_image().__name__):
        raise ConfigError(
            f"--model {model or kept.model} is a checkpoint of {family.__name__}, and {path} holds latents of "
            f"{kept.pipeline}: name the checkpoint that they were made with"
        )
    with MemoryTimeline(device, interval_s=0.1) as timeline, torch.no_grad():
        phases = Phases(timeline)
        phases.begin("load")
        pipeline = load(model or kept.model, getattr(torch, kept.dtype), only=("vae",))
        if vae_tiling or kept.tiling:
            pipeline.vae.enable_tiling()
        if budget is None:
            place(pipeline, device, offload, store=store, slots=slots)
        else:
            from vramkit.planning.fitting import fit_decode  # noqa: PLC0415 - a decode by hand needs none of it

            fitted = fit_decode(pipeline, kept.latents, kept.decoding, device=device, **budget)
            say("plan", *fitted.explain().splitlines())
        say("weights", *describe_weights(pipeline, device))
        phases.begin("decode")
        torch.manual_seed(kept.seed)
        try:
            frames = postprocess_video(pipeline.decode_latents(kept.latents, **kept.decoding), "np")[0]
        finally:
            phases.close()
        phases.begin("write")
        written = export_to_video(with_bar(frames, "write"), video, fps=kept.fps)
    say("done", *phases.summary(), written)
    return written
