"""Clips of a batch: how a worker makes them, and what is shown of them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from vramkit.batch import Journal, Prompt
from vramkit.commands.progress import say
from vramkit.commands.run import Wish

__all__ = ["BatchBar", "ClipJob", "wish_of"]

_TEXTS_BYTES = 256 * 2**20  # of encoded texts that a worker keeps; one of Wan takes 4 MiB
# Options that pipelines call otherwise.
_ARGUMENTS = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}
_IMAGES = ("image", "last_image")


def wish_of(prompt: Prompt, common: Wish) -> Wish:
    """What `vramkit run` would be asked for, given what all prompts have in common."""
    call = dict(prompt.settings)
    seed, fps = call.pop("seed"), call.pop("fps", None)
    images = {name: call.pop(name) for name in _IMAGES if name in call}
    call = {_ARGUMENTS.get(name, name): value for name, value in call.items()}
    return dataclasses.replace(common, call=call, images=images, seed=seed, fps=fps)


class ClipJob:
    """Loads a pipeline once and makes clips with it; see `vramkit.batch.Job`.

    Args:
        largest: the wish for the largest clip, which a plan is made for.
        folder: for the clips.
        stage: in that folder, for what is not whole. One that is not there is on another host.
    """

    def __init__(self, largest: Wish, folder: Path, stage: Path) -> None:
        self._wish = largest
        self._folder = folder
        self._stage = stage
        self._pipeline: Any = None
        self._steps = 0

    def load(self) -> str:
        """Load and place the pipeline; say how it holds its weights."""
        from vramkit.commands.checkpoints import describe_weights  # noqa: PLC0415
        from vramkit.errors import ConfigError  # noqa: PLC0415
        from vramkit.machine import resolve_device  # noqa: PLC0415
        from vramkit.offload.allocator import use_expandable_segments  # noqa: PLC0415
        from vramkit.pipelines.calling.texts import remember_texts  # noqa: PLC0415

        if not self._stage.is_dir():
            raise ConfigError(
                f"{self._folder} is another folder here, or none: --out has to be on a disk that all hosts share"
            )
        wish = dataclasses.replace(self._wish, device=resolve_device(self._wish.device))
        wish.open_images()
        use_expandable_segments(wish.device)
        self._pipeline = wish.load()
        self._pipeline.set_progress_bar_config(disable=True)
        for name, part in self._pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                remember_texts(part, _TEXTS_BYTES)
        return "\n".join(describe_weights(self._pipeline, wish.device))

    def make(self, prompt: Prompt, attempt: int) -> None:
        """Generate a clip, as `vramkit run` does, write it, and give it its name."""
        from vramkit.pipelines.calling.video import export_to_video  # noqa: PLC0415

        self._steps = 0
        wish = wish_of(prompt, self._wish)
        wish.open_images()
        frames = wish.generate(self._pipeline, _ignore, callback_on_step_end=self._count)
        whole = self._stage / f"{prompt.name}.{attempt}.mp4"
        export_to_video(frames, whole, fps=wish.fps or self._pipeline.fps)
        whole.replace(self._folder / f"{prompt.name}.mp4")

    def share(self) -> float:
        """Steps that are done of all, the decode counted as one more."""
        return self._steps / (self._pipeline.num_timesteps + 1) if self._steps else 0.0

    def _count(self, _pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        self._steps = step + 1
        return {}


def _ignore(_phase: str, **_given: Any) -> None:
    """Nobody follows the phases of a clip."""


class BatchBar:
    """One bar for all prompts on stderr, lines above it for what happens, and the paths of clips on stdout."""

    def __init__(self, journal: Journal, *, total: int, remaining: int) -> None:
        self._journal = journal
        self._before = total - remaining
        self._ready = 0
        self._bar = tqdm(total=total, initial=self._before, desc="clips", bar_format=_BAR)

    def __enter__(self) -> BatchBar:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def ready(self, worker: int, detail: str) -> None:
        """Say who works; how the weights are held is the same for all."""
        where, *weights = detail.splitlines()
        say("worker", f"{worker}: {where}")
        if not self._ready and weights:
            say("weights", *weights)
        self._ready += 1

    def made(self, prompt: Prompt, seconds: float) -> None:
        """Print the path of the clip."""
        say("made", f"{prompt.name} in {seconds:.1f} s")
        tqdm.write(str(self._journal.video(prompt)), file=sys.stdout)

    def failed(self, prompt: Prompt, error: str) -> None:
        """Say why there is no clip."""
        say("failed", f"{prompt.name} (line {prompt.line}): {error}")

    def lost(self, worker: int, prompt: Prompt | None, why: str) -> None:
        """Say that a worker is gone."""
        say("lost", f"worker {worker}{'' if prompt is None else f', which was at {prompt.name}'}: {why}")

    def progress(self, clips: float) -> None:
        """Move the bar."""
        self._bar.n = self._before + clips
        self._bar.refresh()


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}]"
