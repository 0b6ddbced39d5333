"""``vramkit demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vramkit.commands.options import Device
from vramkit.errors import ConfigError, VramkitError
from vramkit.extras import extra

__all__ = ["demo"]


def demo(
    *,
    budget: Annotated[
        str | None, typer.Option(help='Memory for the second run, such as "200MiB"; the further ones take parts of it.')
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the video and the pictures.")] = Path("vramkit-demo"),
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Write the checkpoint again.")] = False,
    preset: Annotated[str, typer.Option(hidden=True)] = "small",
) -> None:
    """Write a small checkpoint, generate a clip resident and under budgets, and compare the bytes."""
    with extra("all", needed_for="the demo"):  # before it begins, and not when it draws
        import imageio_ffmpeg  # noqa: F401, PLC0415
        import matplotlib  # noqa: F401, ICN001, PLC0415
        import transformers  # noqa: F401, PLC0415
        from rich.console import Console  # noqa: PLC0415

    from vramkit.demo.job import run_demo  # noqa: PLC0415
    from vramkit.demo.presets import PRESETS  # noqa: PLC0415
    from vramkit.memory import parse_bytes  # noqa: PLC0415

    if preset not in PRESETS:
        raise ConfigError(f"--preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    outcome = run_demo(
        PRESETS[preset],
        out=out,
        device=device,
        budget_bytes=None if budget is None else parse_bytes(budget),
        fresh=fresh,
        console=Console(),
    )
    if not outcome.is_right:
        raise VramkitError("the clips differ: this is a defect of vramkit or of this machine, please report it")
    if not outcome.within_budget:
        raise VramkitError("a run went above its budget, as the table says: raise --budget")
