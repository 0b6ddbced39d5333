"""``vramkit plan``: how a model would run within a budget, without its weights and without a GPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vramkit.commands.options import Height, Size, Width, sides

__all__ = ["plan"]


def plan(
    model: Annotated[
        str, typer.Argument(help='A known name such as "wan2.1-14b", a checkpoint folder, or a repository id.')
    ],
    *,
    vram: Annotated[str, typer.Option(help='Device memory, such as "6GiB".')],
    ram: Annotated[str | None, typer.Option(help='Bound on host memory, such as "32GiB".')] = None,
    allow: Annotated[str, typer.Option(help="exact, bounded (weights in int8, fp8 or nf4, too) or any.")] = "exact",
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    batch: Annotated[int | None, typer.Option(help="Clips at once.")] = None,
    image: Annotated[
        str | None, typer.Option(help="The picture that the clip begins with: a path or an address.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off.")] = None,
    device: Annotated[str, typer.Option(help="Where it will compute; it need not be there.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how a model would run within a budget; no weights are read, and no GPU is needed.

    What is left out is as published with the model's family.
    """
    from vramkit import planning  # noqa: PLC0415 - so that --help answers at once
    from vramkit.planning.explain import explain  # noqa: PLC0415
    from vramkit.planning.planner import Budget  # noqa: PLC0415

    Budget(vram, ram, allow)  # refused before anything is read
    options: dict[str, Any] = {
        **sides(size, height=height, width=width),
        "num_frames": frames,
        "batch": batch,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    if image is not None:
        from vramkit.pipelines.calling.video import load_image  # noqa: PLC0415 - few calls need one

        options["image"] = load_image(image)
    given = {name: value for name, value in options.items() if value is not None}
    found = planning.plan(model, vram, ram=ram, allow=allow, device=device, **given)
    typer.echo(found.to_json() if as_json else explain(found))
