"""``vramkit run``: a prompt to a video file."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
    KeepLatents,
    LastImage,
    Lora,
    LoraWeight,
    ModelName,
    NegativePrompt,
    Offload,
    OffloadBy,
    Quantize,
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
    check_budget,
    check_streaming,
    named_by_option,
    sides,
)
from vramkit.commands.ranks import joined
from vramkit.errors import ConfigError, StoreError

__all__ = ["Wish", "run"]


def run(
    *,
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="What the clip shows.")],
    out: Annotated[Path, typer.Option(help="The video to write (.mp4, .mov, .mkv, .avi).")] = Path("clip.mp4"),
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
    keep_latents: KeepLatents = False,
    trace: Annotated[Path | None, typer.Option(help="Record copies, stalls and memory: .json, .html or .png.")] = None,
) -> None:
    """Generate a clip with a Wan, HunyuanVideo, LTX-Video or CogVideoX checkpoint, of a prompt or of an image and a prompt.

    What is left out is as published with the checkpoint's family. Before the latents are decoded they are written beside
    the video, and removed when that is there: `vramkit decode` makes the video of them where this was interrupted.
    """
    call = {
        "negative_prompt": negative_prompt,
        **sides(size, height=height, width=width),
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    wish = Wish(
        model=model,
        call={"prompt": prompt} | {name: value for name, value in call.items() if value is not None},
        images={name: path for name, path in (("image", image), ("last_image", last_image)) if path is not None},
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
        lora=lora,
        lora_weight=lora_weight,
        vae_tiling=vae_tiling,
        keep_latents=keep_latents,
        trace=trace,
    )
    with named_by_option(), joined(device) as wish.mesh:
        sizes = wish.check()
        typer.echo(wish.fulfil(sizes))


@dataclass(kw_only=True, slots=True)
class Wish:
    """What a command line asks for: one clip, and how its model is loaded."""

    model: str
    call: dict[str, Any]  # arguments of the pipeline that were given
    images: dict[str, Any]  # by argument; paths, and once they are checked pictures
    out: Path
    seed: int
    fps: float | None
    flow_shift: float | None
    dtype: Dtype
    device: str
    budget: dict[str, Any]
    offload: Offload
    streaming: dict[str, Any]
    quantize: Quantize | None
    lora: str | None
    lora_weight: float
    vae_tiling: bool
    keep_latents: bool
    trace: Path | None
    plan: Any = None  # of the budget, once it is made
    mesh: Any = None  # the ranks that make the clip together, where there are several

    @property
    def _writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.mesh is None or bool(self.mesh.is_first)

    def check(self) -> dict[str, Any]:
        """Refuse what cannot be, before a weight is read; return the sizes and counts of the clip."""
        from vramkit.commands.latents import beside  # noqa: PLC0415
        from vramkit.machine import resolve_device  # noqa: PLC0415
        from vramkit.pipelines.calling.video import check_video  # noqa: PLC0415
        from vramkit.tracing.recorder import check_path  # noqa: PLC0415

        self.check_loading()
        if not self.call["prompt"].strip():
            raise ConfigError("--prompt is empty; say what the clip shows")
        self.out = check_video(self.out, fps=1.0 if self.fps is None else self.fps)
        if beside(self.out).exists():
            raise ConfigError(
                f"{beside(self.out)} is there, from a run that did not come to its end: `vramkit decode {beside(self.out)}` "
                "makes its video; or remove it, or choose another --out"
            )
        if self.trace is not None:
            check_path(self.trace)
        self.device = resolve_device(self.device) if self.mesh is None else str(self.mesh.device)
        self.open_images()
        outline = self.outline()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the call itself warns
            return self.sizes(outline)

    def check_loading(self) -> None:
        """Refuse options of loading and placing that cannot be, whatever the checkpoint is."""
        from vramkit.pipelines.calling.inputs import check_finite  # noqa: PLC0415

        check_streaming(self.offload, **self.streaming)
        by_hand = {"vae_tiling": self.vae_tiling, "offload": self.offload is not Offload.block}
        check_budget(**self.budget, by_hand={**by_hand, **self.streaming})
        check_finite(**{"--lora-weight": self.lora_weight})

    def open_images(self) -> None:
        """Put pictures in the place of their paths."""
        from vramkit.pipelines.calling.video import load_image  # noqa: PLC0415

        self.images = {name: load_image(image) for name, image in self.images.items()}

    def outline(self) -> Any:
        """The pipeline without its weights; refuses a checkpoint that this cannot be made with."""
        from vramkit.commands.checkpoints import family_of, outline  # noqa: PLC0415

        pipeline = outline(self.model, family_of(self.model, self.images))
        self._set_shift(pipeline)
        if self.lora is not None:
            pipeline.check_lora_weights(self.lora)
        return pipeline

    def sizes(self, outline: Any) -> dict[str, Any]:
        """The sizes and counts of the clip; refuses what the call would refuse."""
        sizes: dict[str, Any] = outline.check(**self.call, **self.images)
        return sizes

    def fulfil(self, sizes: dict[str, Any]) -> str:
        """Make the clip and return the path of its video; the latents stay if the video does not come to be."""
        from vramkit.commands.latents import beside  # noqa: PLC0415
        from vramkit.commands.progress import Phases, against_budget, say, with_bar  # noqa: PLC0415
        from vramkit.memory import format_bytes  # noqa: PLC0415
        from vramkit.offload.allocator import use_expandable_segments  # noqa: PLC0415
        from vramkit.pipelines.calling.video import export_to_video  # noqa: PLC0415
        from vramkit.timeline import MemoryTimeline  # noqa: PLC0415

        use_expandable_segments(self.device)
        kept = beside(self.out)
        with MemoryTimeline(self.device, interval_s=0.1) as timeline:
            phases = Phases(timeline)
            phases.begin("load")
            pipeline = self.load()
            self._tell(pipeline, sizes)
            try:
                clip = self._traced(pipeline, phases)
                if not self._writes:
                    return ""
                phases.begin("write")
                written = export_to_video(with_bar(clip, "write"), self.out, fps=self.fps or pipeline.fps)
            except BaseException:
                phases.close()
                if kept.exists():
                    say("kept", f"the latents are in {kept}: `vramkit decode {kept}` makes the video of them")
                raise
        if not self.keep_latents:
            kept.unlink(missing_ok=True)
        if self.plan is not None:
            say("budget", *against_budget(self.plan, timeline.trace()))
        say("done", *phases.summary(), f"{written} ({format_bytes(self.out.stat().st_size)})")
        return written

    def load(self) -> Any:
        """The pipeline with its weights, placed."""
        from vramkit.commands.checkpoints import family_of, load, place, resolve_dtype  # noqa: PLC0415
        from vramkit.commands.progress import say  # noqa: PLC0415

        dtype, family = resolve_dtype(self.dtype, self.device), family_of(self.model, self.images)
        pipeline = load(self.model, dtype, family=family, quantize=self.quantize)
        self._set_shift(pipeline)
        if self.lora is not None:
            pipeline.load_lora_weights(self.lora, "lora")
            pipeline.set_adapters("lora", self.lora_weight)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        mesh = self._together(pipeline)
        if self.budget["vram"] is None:
            place(pipeline, self.device, self.offload, **self.streaming, mesh=mesh)
        else:
            from vramkit.planning import fit  # noqa: PLC0415 - a run by hand needs none of it

            fitted = fit(pipeline, device=self.device, mesh=mesh, **self.budget, **self.call, **self.images)
            self.plan = fitted.plan
            say("plan", *fitted.explain().splitlines())
        pipeline.set_progress_bar_config(desc="denoise", disable=not self._writes)
        return pipeline

    def _together(self, pipeline: Any) -> Any:
        """Let all ranks make the calls of `pipeline`, the branches of guidance apart where that is possible."""
        if self.mesh is None:
            return None
        from vramkit.distributed import parallelize  # noqa: PLC0415 - most runs need none of it

        call = inspect.signature(type(pipeline).__call__).parameters
        scale = self.call.get("guidance_scale", call["guidance_scale"].default)
        is_guided = scale > 1 and "true_cfg_scale" not in call  # a scale that the model itself was trained with is none
        mesh = self.mesh.with_branches(2) if is_guided and self.mesh.size % 2 == 0 else self.mesh
        parallelize(pipeline, mesh)
        return mesh

    def generate(self, pipeline: Any, begin: Callable[..., None], **options: Any) -> Any:
        """The frames of the clip; `begin` is told of each phase, as `on_phase` is."""
        import torch  # noqa: PLC0415

        def follow(phase: str, **given: Any) -> None:
            begin(phase, **given)
            if phase == "decode":
                torch.manual_seed(self.seed)  # some decoders draw noise

        pipeline.on_phase = follow
        # On the CPU, whose noise is the same for every device.
        generator = torch.Generator().manual_seed(self.seed)
        return pipeline(**self.call, **self.images, generator=generator, **options).frames[0]

    def _traced(self, pipeline: Any, phases: Any) -> Any:
        """The frames of the clip, recorded if that is asked for; the latents are in their file while they are decoded."""
        from vramkit.commands.progress import say  # noqa: PLC0415
        from vramkit.tracing.recorder import trace  # noqa: PLC0415

        def begin(phase: str, **given: Any) -> None:
            phases.begin(phase)
            if phase == "decode":
                self._keep(pipeline, **given)

        if self.trace is None or not self._writes:
            return self.generate(pipeline, begin)
        with trace(self.trace, device=self.device) as traced:
            clip = self.generate(pipeline, begin)
        say("trace", f"{self.trace}: {traced.recording.summary()}")
        return clip

    def _keep(self, pipeline: Any, *, latents: Any, **decoding: Any) -> None:
        """Write the latents beside the video; a run goes on without."""
        from vramkit.commands.latents import Latents, beside  # noqa: PLC0415
        from vramkit.commands.progress import say  # noqa: PLC0415

        if not self._writes:
            return
        kept = Latents(
            latents=latents,
            decoding=decoding,
            pipeline=type(pipeline).__name__,
            model=str(Path(self.model).absolute()) if Path(self.model).is_dir() else self.model,
            dtype=str(pipeline.dtype).removeprefix("torch."),
            fps=self.fps or pipeline.fps,
            seed=self.seed,
            tiling=self.vae_tiling,
            video=self.out.name,
        )
        try:
            kept.save(beside(self.out))
        except StoreError as error:
            say("warning", f"the latents are not kept: {error}")

    def _set_shift(self, pipeline: Any) -> None:
        if self.flow_shift is not None:
            scheduler = pipeline.scheduler
            pipeline.scheduler = type(scheduler).from_config(scheduler.config, flow_shift=self.flow_shift)

    def _tell(self, pipeline: Any, sizes: dict[str, Any]) -> None:
        """Say what is about to be done, and what of it was not asked for."""
        from vramkit.commands.checkpoints import describe_weights, hint_of_disk  # noqa: PLC0415
        from vramkit.commands.progress import say  # noqa: PLC0415

        defaults = inspect.signature(type(pipeline).__call__).parameters
        guidance = self.call.get("guidance_scale", defaults["guidance_scale"].default)

        def told(text: str, *names: str) -> str:
            return text if self.call.keys() >= set(names) else f"{text} (default)"

        dtype = str(pipeline.dtype).removeprefix("torch.")
        say("model", f"{self.model}: {type(pipeline).__name__} in {dtype} on {self.device}")
        say("weights", *describe_weights(pipeline, self.device))
        if (hint := hint_of_disk(pipeline, self.streaming["store"])) is not None:
            say("hint", hint)
        say(
            "clip",
            ", ".join(
                [
                    told(f"{sizes['width']}x{sizes['height']}", "width", "height"),
                    told(f"{sizes['num_frames']} frames", "num_frames"),
                    told(f"{sizes['num_inference_steps']} steps", "num_inference_steps"),
                    told(f"guidance {guidance:g}", "guidance_scale"),
                    f"seed {self.seed}",
                    f"{self.fps or pipeline.fps:g} frames/s" + ("" if self.fps else " (default)"),
                ]
            ),
        )
