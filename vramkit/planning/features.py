"""How a call may be made with the same models: guidance in turn or paired, chunks of tokens, how the VAE decodes.

The one place that knows by which calls those are chosen. What a pipeline or a model does not offer is not chosen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from vramkit.planning.plans import Decode, Plan

__all__ = ["Features", "Settings"]

_UNTOLD_STRIPES = 8  # what an autoencoder counts as that chooses by itself
_CHUNKS = (2048, 1024, 512)
_STRIPES = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One choice of each; None where there is none to make."""

    guidance: Literal["in turn", "paired"] | None = None
    chunk_tokens: int | None = None
    decode: Decode | None = None

    @classmethod
    def of(cls, plan: Plan) -> Settings:
        """Return what a plan chose."""
        return cls(guidance=plan.guidance, chunk_tokens=plan.chunk_tokens, decode=plan.decode)


class Features:
    """What a pipeline and its models offer to choose from."""

    def __init__(self, pipeline: Any, modules: Mapping[str, nn.Module]) -> None:
        self._pipeline = pipeline
        self._vaes = {name: module for name, module in modules.items() if _can_tile(module)}
        self._transformers: dict[str, Any] = {
            name: module for name, module in modules.items() if hasattr(module, "set_chunk_size")
        }
        self.before = Settings(guidance=getattr(pipeline, "guidance", None), decode=self._decode_now())
        self._now: Settings | None = self.before

    def settings(self, chunk_tokens: int | None = None) -> Iterator[Settings]:
        """Yield what may be chosen beside `chunk_tokens`; the first is the simplest."""
        guidances = ("in turn", "paired") if self.before.guidance is not None else (None,)
        for guidance, decode in itertools.product(guidances, self._decodes()):
            yield Settings(guidance=guidance, chunk_tokens=chunk_tokens, decode=decode)  # type: ignore[arg-type]

    def smaller_chunks(self) -> tuple[int, ...]:
        """Return how few tokens transformers may compute at a time where memory is short."""
        return _CHUNKS if self._transformers else ()

    def set(self, settings: Settings) -> None:
        """Choose `settings`."""
        before, self._now = self._now, None  # where this is cut short, the next one sets all
        if self.before.guidance is not None and (before is None or settings.guidance != before.guidance):
            self._pipeline.guidance = settings.guidance
        if before is None or settings.chunk_tokens != before.chunk_tokens:
            for transformer in self._transformers.values():
                transformer.set_chunk_size(settings.chunk_tokens)
        if settings.decode is not None and (before is None or settings.decode != before.decode):
            for vae in self._vaes.values():
                _set_decode(vae, settings.decode)
        self._now = settings

    def of_components(self, settings: Settings) -> dict[str, Any]:
        """Return by name what components do otherwise with `settings`; pairs are another call of the same."""
        chunks: dict[str, Any] = dict.fromkeys(self._transformers, settings.chunk_tokens)
        return chunks | dict.fromkeys(self._vaes, settings.decode)

    def reset(self) -> None:
        """Choose what was chosen before."""
        self.set(self.before)

    def _decodes(self) -> Iterator[Decode | None]:
        if not self._vaes or self.before.decode is None:
            yield None
            return
        yield self.before.decode
        if self.before.decode.mode != "whole":
            return  # the user's own choice
        if all(map(_can_stripe, self._vaes.values())):
            yield from (Decode(mode="stripes", count=count) for count in _STRIPES)
        yield Decode(mode="tiles")

    def _decode_now(self) -> Decode | None:
        if not self._vaes:
            return None
        if any(getattr(vae, "use_tiling", False) for vae in self._vaes.values()):
            return Decode(mode="tiles")
        striped = [vae for vae in self._vaes.values() if getattr(vae, "use_striping", False)]
        counts = [getattr(vae, "stripes", None) or _UNTOLD_STRIPES for vae in striped]
        return Decode(mode="stripes", count=max(counts)) if counts else Decode()


def _can_tile(module: nn.Module) -> bool:
    return all(callable(getattr(module, name, None)) for name in ("decode", "enable_tiling", "disable_tiling"))


def _can_stripe(vae: Any) -> bool:
    return hasattr(vae, "enable_striping") and getattr(vae, "has_stripes", True)


def _set_decode(vae: Any, decode: Decode) -> None:
    if _can_stripe(vae):
        vae.disable_striping()
    vae.disable_tiling()
    if decode.mode == "tiles":
        vae.enable_tiling()
    elif decode.mode == "stripes":
        vae.enable_striping(decode.count)
