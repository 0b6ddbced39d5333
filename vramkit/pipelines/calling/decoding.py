"""The decode at the end of a call: what was denoised is not lost when it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.errors import VramkitError
from vramkit.offload import offload_of
from vramkit.pipelines.calling.inputs import Generators, warn_caller

__all__ = ["DecodeMemoryError", "decode_in_memory"]


class DecodeMemoryError(VramkitError, torch.OutOfMemoryError):
    """A device without the memory to decode a clip.

    Attributes:
        latents: what was denoised, as `decode_latents` of the pipeline takes it.
    """

    def __init__(self, message: str, latents: Tensor) -> None:
        super().__init__(message)
        self.latents = latents


def decode_in_memory(decode: Callable[[], Tensor], latents: Tensor, *, vae: Any, generator: Generators) -> Tensor:
    """What `decode` makes of `latents` [..., h, w]; on a device without the memory, once more, then in smaller pieces.

    Once more, if `vae` is offloaded: what is has let go of what it could, here and of the other models. The pieces are those
    of `vae.smaller_ways`. Each try has the random numbers of the first. Afterwards the autoencoder decodes as it did before.

    Raises:
        DecodeMemoryError: the smallest pieces are too large as well, or there are none.
    """
    states = [(each, each.get_state()) for each in _generators(generator)]
    clip, reason = _try(decode)
    if clip is None and _has_let_go(vae):
        clip, reason = _try(decode, states)
    for way in vae.smaller_ways(latents.shape[-2]) if clip is None and hasattr(vae, "smaller_ways") else ():
        with _set(vae, way.settings):
            clip, again = _try(decode, states)
        if clip is not None:
            warn_caller(
                f"The device ran out of memory in the decode ({reason}). It was done again {way.words}. "
                f"To begin with that in the next call: {way.call}"
            )
            break
        reason = again
    if clip is not None:
        return clip
    raise DecodeMemoryError(
        f"The device ran out of memory in the decode, and there is no smaller way to do it ({reason}). What was denoised is "
        "not lost: free memory, then decode what this error holds with pipeline.decode_latents(error.latents).",
        latents,
    )


def _has_let_go(vae: Any) -> bool:
    """Whether a decode that ran out of memory made room for another try; of several ranks, one alone tries nothing again."""
    is_alone = getattr(vae, "tile_ranks", None) is None
    return is_alone and isinstance(vae, nn.Module) and offload_of(vae) is not None


def _try(
    decode: Callable[[], Tensor], states: Iterable[tuple[torch.Generator, Tensor]] = ()
) -> tuple[Tensor | None, str]:
    """The clip, or what the device said; the exception, whose frames hold the tensors of the failed decode, is let go of."""
    for generator, state in states:
        generator.set_state(state)
    try:
        return decode(), ""
    except torch.OutOfMemoryError as error:
        return None, str(error).partition(". ")[0]


@contextmanager
def _set(vae: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Give attributes of `vae` these values for a while."""
    before = {name: getattr(vae, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _generators(given: Generators) -> list[torch.Generator]:
    """All that a decode may draw from."""
    found = [torch.default_generator]
    if torch.cuda.is_available():
        found += torch.cuda.default_generators
    if given is not None:
        found += given if isinstance(given, list) else [given]
    return found
