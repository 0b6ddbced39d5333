"""The files of a component's folder: its JSON config and its safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vramkit.errors import CheckpointError

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "has_variant", "listed", "listing", "read_json", "weights_files"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"  # of diffusers' models, without an ending


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name}; it holds {listing(path.parent)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        from vramkit.offload.stand_ins import stand_in  # noqa: PLC0415 - reading a config needs no engine

        what = stand_in(path, is_text=True)
        raise CheckpointError(f"{path} {what}" if what else f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def weights_files(folder: Path, *, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors file of a folder, or the index of its shards, or the shards of a variant.

    Where both are there, one of them is of an earlier save: diffusers reads the index then, transformers the file.

    Args:
        folder: holds the weights.
        stem: their name without an ending, such as "model".
        variant: as in model.<variant>.safetensors.

    Raises:
        CheckpointError: none of them is there.
    """
    from vramkit.offload.checkpoint import index_name  # noqa: PLC0415 - reading a config needs no engine

    plain, stem = stem, stem if variant is None else f"{stem}.{variant}"
    known = [f"{stem}.safetensors", index_name(plain, variant)]
    if plain == WEIGHTS_NAME:
        known.reverse()
    for name in known:
        if (folder / name).is_file():
            return [folder / name]
    # Older variants have an index of another name, or none. The shards are there.
    if variant is not None:
        for pattern in (f"{stem}-*-of-*.safetensors", f"{plain}-*-of-*.{variant}.safetensors"):
            if shards := sorted(folder.glob(pattern)):
                return shards
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    reason = f"; {pickles} are pickles, which can run code when read: convert them to safetensors" if pickles else ""
    raise CheckpointError(f"{folder}: no {stem}.safetensors and no index of it; it holds {listing(folder)}{reason}")


def has_variant(folder: Path, variant: str) -> bool:
    """Say whether a folder holds weights of a variant."""
    return any(folder.glob(f"*.{variant}.safetensors")) or any(folder.glob(f"*.{variant}-*-of-*.safetensors"))


def listing(folder: Path, *, limit: int = 12) -> str:
    """The names in a folder, for an error message; it tells of links to nothing, as caches have them, and of folders."""
    if not folder.is_dir():
        return "nothing: there is no such folder"
    names = [
        p.name if p.is_file() else f"{p.name} (a folder)" if p.is_dir() else f"{p.name} (a link to nothing, or no file)"
        for p in sorted(folder.iterdir())
    ]
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "") if names else "nothing"


def listed(names: Sequence[str], *, limit: int = 4) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
