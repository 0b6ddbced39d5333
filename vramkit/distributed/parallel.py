"""A pipeline whose calls several ranks make together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from vramkit.distributed.agreement import describe, fingerprint
from vramkit.distributed.branches import GuidanceBranches
from vramkit.distributed.mesh import Mesh
from vramkit.distributed.sequence import SequenceRanks
from vramkit.distributed.tiles import TileRanks, has_exact_tiles
from vramkit.errors import ConfigError, ConflictError
from vramkit.pipelines.calling.text_to_video import TextToVideoPipeline
from vramkit.pipelines.networks.video_autoencoder import VideoAutoencoder
from vramkit.pipelines.networks.video_transformer import VideoTransformer
from vramkit.uncopied import Uncopied

__all__ = ["Parallel", "parallelize"]


def parallelize(pipeline: Any, mesh: Mesh) -> Parallel:
    """Let all ranks of `mesh` make the calls of `pipeline` together; each has loaded the same one, and gets the same clip.

    The branches of guidance run on different ranks where the mesh has two, with the same bytes as in turn. The ranks of a
    branch share the tokens of the video: equal to one rank within rounding, and the same bytes in every run. What the
    autoencoder computes in tiles, ranks compute some of each: the same bytes. Of pictures that it decodes whole or in
    stripes each rank computes a part of the rows, where stripes are possible (`enable_striping`): as exact as these. Weights
    stay where they are; offload the models with ``apply_group_offloading(..., mesh=mesh)``, or the pipeline with
    ``fit(..., mesh=mesh)``, to share their loading.

    All ranks have to make the same calls, with the same arguments; the first one's random numbers are those of all. When
    one raises, dies or hangs, the call ends on all of them with a RankError.

    Raises:
        ConfigError: not a text- or image-to-video pipeline of vramkit, or ranks differ in its class, options or weights.
        ConflictError: it is parallel already.
    """
    if not isinstance(pipeline, TextToVideoPipeline):
        raise ConfigError(
            f"a {type(pipeline).__name__} was given; expected a video pipeline of vramkit, such as WanPipeline (its "
            "from_pretrained reads the same folders as that of diffusers)"
        )
    if pipeline.together is not None:
        raise ConflictError(f"this {type(pipeline).__name__} is parallel already; call remove() on that handle first")
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    scheduler = pipeline.scheduler
    mesh.agree(
        {
            "class of the pipeline": type(pipeline).__name__,
            "scheduler": f"{type(scheduler).__name__} {dict(getattr(scheduler, 'config', {}))}",
            "guidance of the pipeline": pipeline.guidance,
            **{f"weights of {name}": fingerprint(module) for name, module in modules.items()},
            **{f"settings of {name}": _settings(module) for name, module in modules.items()},
        }
    )
    return Parallel(pipeline, mesh, modules)


class Parallel:
    """A pipeline that ranks run together, until `remove`."""

    def __init__(self, pipeline: TextToVideoPipeline, mesh: Mesh, modules: Mapping[str, nn.Module]) -> None:
        self.pipeline, self.mesh = pipeline, mesh
        self._transformers = [module for module in modules.values() if isinstance(module, VideoTransformer)]
        found = [module for module in modules.values() if isinstance(module, VideoAutoencoder)]
        self._autoencoders = [autoencoder for autoencoder in found if has_exact_tiles(autoencoder)]
        for transformer in self._transformers if mesh.sequence > 1 else ():
            transformer.set_token_ranks(SequenceRanks(mesh.in_sequence))
        for autoencoder in self._autoencoders if mesh.size > 1 else ():
            autoencoder.tile_ranks = TileRanks(mesh.all)
        pipeline.branches = GuidanceBranches(mesh.in_guidance) if mesh.guidance > 1 else None
        pipeline.together = self._together = _Together(mesh)
        self._bar = dict(pipeline._progress_bar_config)  # noqa: SLF001 (there is a setter alone, as in diffusers)
        if not mesh.is_first:
            pipeline.set_progress_bar_config(**{**self._bar, "disable": True})

    def remove(self) -> None:
        """Let the pipeline's calls be those of one process again. Later calls do nothing."""
        if self.pipeline.together is not self._together:
            return
        for transformer in self._transformers:
            transformer.set_token_ranks(None)
        for autoencoder in self._autoencoders:
            autoencoder.tile_ranks = None
        self.pipeline.branches = self.pipeline.together = None
        self.pipeline.set_progress_bar_config(**self._bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {type(self.pipeline).__name__} on {self.mesh!r}>"


class _Together(Uncopied):
    """Calls that all ranks of a mesh make."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    @contextlib.contextmanager
    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """One call of the pipeline on all ranks."""
        with self._mesh.call():
            given = {str(at): value for at, value in enumerate(args)} | dict(kwargs)
            self._mesh.agree({f"argument {name} of the call": describe(value) for name, value in given.items()})
            self._mesh.share_randomness()
            yield


def _settings(module: nn.Module) -> dict[str, Any]:
    """What changes how a model computes, beside its weights."""
    names = ["use_tiling", "use_slicing", "use_striping", "stripes", "tiling", "frame_tiling"]
    names += ["use_framewise_decoding", "use_framewise_encoding"]
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    parameter = next(module.parameters(), torch.empty(0))
    chunk = module._ops.chunk_tokens if isinstance(module, VideoTransformer) else None  # noqa: SLF001 (a setter alone)
    return found | {"dtype": parameter.dtype, "chunk": chunk, "training": module.training}
