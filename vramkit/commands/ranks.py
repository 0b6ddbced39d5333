"""Commands that ``torchrun`` starts several times: the first rank alone prints and writes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vramkit.distributed.mesh import Mesh

__all__ = ["is_later_rank", "joined"]

_HEARD_S = 3.0  # what others leave the first one to say why all end, before their launcher ends all that are left


def is_later_rank() -> bool:
    """Whether another rank says what there is to be said."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK") != "0"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Mesh | None]:
    """The ranks that run this command, or None where there is one; those after the first say nothing.

    On the `device` that is asked for each computes; with ``"auto"`` and ``"cuda"`` each has a card of its own.

    Raises:
        typer.Exit: instead of any error, on ranks that are not to say it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    from vramkit.distributed.mesh import connect  # noqa: PLC0415 - most runs need none of it
    from vramkit.machine import resolve_device  # noqa: PLC0415

    is_first = not is_later_rank()
    with contextlib.ExitStack() as quiet:
        if not is_first:
            nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        mesh: Mesh | None = None
        try:
            given = resolve_device(device)  # refuses what is not there
            with connect(device=None if device in ("auto", "cuda") else given) as mesh:
                yield mesh
        except BaseException as error:
            lost_first = mesh is not None and mesh.rank == 1 and (mesh.failure or "").startswith("rank 0 failed: its")
            if is_first or lost_first:
                raise
            time.sleep(_HEARD_S)
            raise typer.Exit(1 if not isinstance(error, KeyboardInterrupt) else 130) from error
        finally:
            sys.stdout.flush()
