"""Latents in a file: what a run has computed before it decodes, with all that the decode needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vramkit import __version__
from vramkit.errors import CheckpointError
from vramkit.offload.disk import atomic_write

__all__ = ["Latents", "beside"]

_FORMAT = "vramkit latents 1"
_STATE = "generator_state"


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Latents of a clip, as `decode_latents` of its pipeline takes them, and how the clip is to be made of them."""

    latents: Tensor
    decoding: Mapping[str, Any]  # what else `decode_latents` is given
    pipeline: str  # its class
    model: str  # the checkpoint: a repository, or the whole path of a folder
    dtype: str  # of the transformer, such as "bfloat16"
    fps: float
    seed: int
    tiling: bool
    video: str  # the name of the file that was to be written

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save  # noqa: PLC0415

        tensors = {"latents": self.latents.detach().cpu().contiguous()}
        options = dict(self.decoding)
        generator = options.pop("generator", None)
        if isinstance(generator, torch.Generator):
            tensors[_STATE] = generator.get_state()
        settings = {name: getattr(self, name) for name in _SETTINGS}
        metadata = {
            "format": _FORMAT,
            "vramkit": __version__,
            "decoding": json.dumps(options),
            "settings": json.dumps(settings),
        }
        with atomic_write(path) as file:
            file.write(save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> Latents:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} holds no latents of `vramkit run`")
        try:
            decoding, settings = dict(json.loads(metadata["decoding"])), dict(json.loads(metadata["settings"]))
            if _STATE in tensors:
                decoding["generator"] = torch.Generator()
                decoding["generator"].set_state(tensors[_STATE])
            found = cls(latents=tensors["latents"], decoding=decoding, **settings)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {type(error).__name__}: {error}; run `vramkit run` again"
            ) from error
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        """Refuse what no run writes."""
        for name, kind in _SETTINGS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
                raise CheckpointError(f"{path} is damaged: {name} is {value!r}; run `vramkit run` again")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise CheckpointError(f"{path} is damaged: dtype is {self.dtype!r}; run `vramkit run` again")
        if not self.latents.is_floating_point():
            raise CheckpointError(f"{path} is damaged: latents of {self.latents.dtype}; run `vramkit run` again")


def beside(video: Path) -> Path:
    """Where the latents of a video are kept until it is written."""
    return video.with_name(f"{video.stem}.latents.safetensors")


_SETTINGS: dict[str, Any] = {
    "pipeline": str,
    "model": str,
    "dtype": str,
    "fps": int | float,
    "seed": int,
    "tiling": bool,
    "video": str,
}
