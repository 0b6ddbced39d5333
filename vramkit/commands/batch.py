"""``vramkit batch``: a file of prompts to a folder of clips, on as many GPUs as there are."""

from __future__ import annotations

import dataclasses
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramkit.commands.options import (
    Allow,
    ComputeDtype,
    Device,
    Dtype,
    FirstImage,
    FlowShift,
    Fps,
    Frames,
    Guidance,
    Height,
    LastImage,
    Lora,
    LoraWeight,
    ModelName,
    NegativePrompt,
    Offload,
    OffloadBy,
    QuantizeTo,
    Ram,
    Resident,
    Seed,
    Size,
    Slots,
    Steps,
    Store,
    Tiling,
    Vram,
    Width,
    named_by_option,
    sides,
)
from vramkit.commands.run import Wish
from vramkit.errors import ConfigError, VramkitError

if TYPE_CHECKING:
    from vramkit.batch import Journal, Prompt

__all__ = ["batch"]

_UNCHECKED = ("prompt", "negative_prompt", "seed")  # of a line: what a call does not refuse by its value


def batch(
    prompts: Annotated[
        Path,
        typer.Argument(help='A file with a line such as {"prompt": "a cat", "seed": 3, "name": "cat"} for each clip.'),
    ],
    *,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The folder for the clips and the journal of what was made.")],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Clips that are made at once; one for each GPU, or for each host without, when left out.", min=1
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster that is there, such as 192.0.2.1:6379 or auto; this host when left out."),
    ] = None,
    retries: Annotated[int, typer.Option(help="How often a prompt is tried again when its worker died.", min=0)] = 2,
    negative_prompt: NegativePrompt = None,
    image: FirstImage = None,
    last_image: LastImage = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    fps: Fps = None,
    flow_shift: FlowShift = None,
    dtype: ComputeDtype = Dtype.auto,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    allow: Allow = "exact",
    offload: OffloadBy = Offload.block,
    store: Store = None,
    resident: Resident = "0",
    slots: Slots = None,
    quantize: QuantizeTo = None,
    lora: Lora = None,
    lora_weight: LoraWeight = 1.0,
    vae_tiling: Tiling = False,
) -> None:
    """Generate a clip for each line of a file, as `vramkit run` would, over all GPUs of this host or of a Ray cluster.

    A line has a prompt, and may have a name for its file and its own image, last_image, negative_prompt, height, width,
    frames, steps, guidance, seed and fps. The same command again goes on where it ended, and tries again what failed.
    """
    from vramkit.batch import read_prompts  # noqa: PLC0415
    from vramkit.batch.ray_workers import check_installed  # noqa: PLC0415

    check_installed()
    for_all = {
        "negative_prompt": negative_prompt,
        "image": _findable(image),
        "last_image": _findable(last_image),
        **sides(size, height=height, width=width),
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "fps": fps,
    }
    wanted = read_prompts(prompts, {name: value for name, value in for_all.items() if value is not None})
    wish = Wish(
        model=_findable(model) or model,
        call={},
        images={},
        out=out,
        seed=seed,
        fps=fps,
        flow_shift=flow_shift,
        dtype=dtype,
        device=device,
        budget={"vram": vram, "ram": ram, "allow": allow},
        offload=offload,
        streaming={"store": store, "resident": resident, "slots": slots},
        quantize=quantize,
        lora=_findable(lora),
        lora_weight=lora_weight,
        vae_tiling=vae_tiling,
        keep_latents=False,
        trace=None,
    )
    _Batch(prompts, wanted, wish).make(workers=workers, address=address, retries=retries)


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """What a command line asks for."""

    source: Path
    prompts: list[Prompt]
    wish: Wish  # what all have in common

    def make(self, *, workers: int | None, address: str | None, retries: int) -> None:
        """Check everything, make what is not there, and say what was made."""
        from vramkit.batch import Journal  # noqa: PLC0415
        from vramkit.commands.progress import say  # noqa: PLC0415

        with named_by_option():
            largest = self._check()
        folder = _made_folder(self.wish.out)
        with Journal(folder, self._shared()) as journal:
            remaining = journal.remaining(self.prompts)
            before = len(self.prompts) - len(remaining)
            say("batch", f"{len(self.prompts)} prompts, {before} of them made before, in {folder}")
            if not remaining:
                return
            begun_s = time.monotonic()
            failed = self._dispatch(remaining, journal, largest, workers=workers, address=address, retries=retries)
        made, seconds = len(remaining) - len(failed), time.monotonic() - begun_s
        say("done", f"{made} clips in {seconds:.1f} s, workers being started included, in {folder}")
        if failed:
            raise VramkitError(
                f"{len(failed)} of {len(self.prompts)} prompts have no clip ({', '.join(failed[:5])}"
                f"{', ...' if len(failed) > 5 else ''}): the same command tries them again"
            )

    def _check(self) -> Prompt:
        """Refuse what cannot be, before a weight is read; return the prompt whose clip is the largest."""
        from vramkit.commands.clips import wish_of  # noqa: PLC0415
        from vramkit.commands.progress import say  # noqa: PLC0415

        self.wish.check_loading()
        first = self.prompts[0]
        outline = wish_of(first, self.wish).outline()
        sizes: dict[str, int] = {}  # height * width * frames, by all that a check looks at
        for prompt in self.prompts:
            wish = wish_of(prompt, self.wish)
            if (likeness := _likeness(prompt)) in sizes:
                continue
            try:
                if wish.images.keys() != wish_of(first, self.wish).images.keys():
                    raise ConfigError(
                        f"it has {' and '.join(wish.images) or 'no image'}, unlike line {first.line}: a batch is for one "
                        "pipeline, which takes images or does not; make two files of them"
                    )
                wish.open_images()
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    found = wish.sizes(outline)
            except ConfigError as error:
                raise ConfigError(f"{self.source}, line {prompt.line}: {error}") from error
            for warning in told:
                say("warning", f"line {prompt.line}: {warning.message}")
            sizes[likeness] = found["height"] * found["width"] * found["num_frames"]
        return max(self.prompts, key=lambda prompt: sizes[_likeness(prompt)])

    def _dispatch(
        self,
        remaining: list[Prompt],
        journal: Journal,
        largest: Prompt,
        *,
        workers: int | None,
        address: str | None,
        retries: int,
    ) -> list[str]:
        """Make clips; return the names of those that there are none of."""
        from vramkit.batch import Dispatch  # noqa: PLC0415
        from vramkit.batch.ray_workers import RayWorkers, connected, share_out  # noqa: PLC0415
        from vramkit.commands.clips import BatchBar, ClipJob, wish_of  # noqa: PLC0415

        with connected(address, cpus=workers or 1):
            device, count, cpus = share_out(self.wish.device, workers)
            wish = dataclasses.replace(wish_of(largest, self.wish), device=device)
            job = ClipJob(wish, journal.folder, journal.stage)
            bar = BatchBar(journal, total=len(self.prompts), remaining=len(remaining))
            with bar, RayWorkers(job, gpus=int(device == "cuda"), cpus=cpus) as hands:
                dispatch = Dispatch(remaining, hands, journal, count=count, retries=retries, watcher=bar)
                dispatch.run()
        return list(dispatch.failures)

    def _shared(self) -> dict[str, Any]:
        """What all clips are made with, as far as another value of it makes another clip."""
        wish = self.wish
        shared = {
            "model": wish.model,
            "dtype": wish.dtype.value,
            "flow_shift": wish.flow_shift,
            "quantize": wish.quantize and wish.quantize.value,
            "allow": wish.budget["allow"],
            "lora": wish.lora,
            "lora_weight": wish.lora_weight,
            "vae_tiling": wish.vae_tiling,
        }
        return {name: value for name, value in shared.items() if value is not None}


def _likeness(prompt: Prompt) -> str:
    """What a check of a call looks at."""
    return repr(sorted(item for item in prompt.settings.items() if item[0] not in _UNCHECKED))


def _findable(path: str | None) -> str | None:
    """The same from every folder, where it is a path that is there; names and addresses stay."""
    if path is not None and Path(path).expanduser().exists():
        return str(Path(path).expanduser().absolute())
    return path


def _made_folder(folder: Path) -> Path:
    """The folder for the clips, made if it is not there."""
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror or error}; choose another folder") from error
    return folder
