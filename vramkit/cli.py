"""The command line: ``vramkit demo`` and ``vramkit run``.

Heavy libraries are imported by the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vramkit import __version__
from vramkit.errors import CheckpointError, ConfigError, VramkitError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# What typer raises for wrong arguments; it brings its own click or uses the installed one, by version.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Run PyTorch models that are larger than the memory of the device that computes them.",
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Offload(str, Enum):
    """Where weights are while they do not compute."""

    none = "none"
    model = "model"
    block = "block"
    leaf = "leaf"


class Dtype(str, Enum):
    """The dtype that text encoder and transformer compute in."""

    auto = "auto"
    bfloat16 = "bf16"
    float16 = "fp16"
    float32 = "fp32"


class Quantize(str, Enum):
    """What the transformer's large weights are stored in."""

    fp8 = "fp8"
    int8 = "int8"
    nf4 = "nf4"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors of the user's making are one line on stderr."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="vramkit", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except _UsageError as error:
        return _fail(f"error: {error.format_message()}", 2)  # type: ignore[attr-defined]
    except (VramkitError, OSError) as error:
        return _fail(f"error: {error}", 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _fail(
            "error: the device memory is not enough; try --offload leaf, --slots 1, --quantize or --vae-tiling", 1
        )
    if status == INTERRUPTED:  # typer may have turned Ctrl-C into this status by itself
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)  # noqa: T201 - one line, whatever the message was
    return status


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vramkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    *,
    budget: Annotated[str | None, typer.Option(help='Memory for the second run, such as "200MiB".')] = None,
    out: Annotated[Path, typer.Option(help="Folder for the video and the picture.")] = Path(),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Write the checkpoint again.")] = False,
    preset: Annotated[str, typer.Option(hidden=True)] = "small",
) -> None:
    """Write a small checkpoint, generate a clip resident and under a budget, and compare the bytes."""
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
    if not outcome.identical:
        raise VramkitError("the two clips differ: this is a defect of vramkit or of this machine, please report it")
    if not outcome.within_budget:
        raise VramkitError("the second run went above its budget: raise --budget")


@app.command()
def run(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hugging Face repository id.")],
    prompt: Annotated[str, typer.Option(help="What the clip shows.")],
    out: Annotated[Path, typer.Option(help="The video to write (.mp4, .mov, .mkv, .avi).")] = Path("clip.mp4"),
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=2**64 - 1)] = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the video.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of a Wan schedule: 3 for 480p, 5 for 720p.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bf16 on a GPU, fp32 on the CPU. The VAE of Wan stays in fp32.")
    ] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    offload: Annotated[
        Offload, typer.Option(help="Stream weights by block or leaf, whole models, or not.")
    ] = Offload.block,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where streamed weights rest: registered, mapped, pageable or disk; by itself when left out."
        ),
    ] = None,
    resident: Annotated[str, typer.Option(help='Transformer weights that stay on the device, such as "4GiB".')] = "0",
    slots: Annotated[
        int | None, typer.Option(help="Device slots that weights pass through; 2 for blocks, 3 for leaves.", min=1)
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="What the transformer's large weights are stored in."),
    ] = None,
    lora: Annotated[str | None, typer.Option(help="Adapter: a safetensors file, a folder or a repository.")] = None,
    lora_weight: Annotated[float, typer.Option(help="How much the adapter counts.")] = 1.0,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory, more time.")] = False,
) -> None:
    """Generate a clip with a Wan2.1, HunyuanVideo, LTX-Video or CogVideoX checkpoint.

    What is left out is as published with the checkpoint's family.
    """
    from vramkit.demo.job import resolve_device  # noqa: PLC0415
    from vramkit.pipelines.video import check_video, export_to_video  # noqa: PLC0415

    _check_streaming(offload, {"--store": store, "--resident": resident, "--slots": slots})
    check_video(out, fps=1.0 if fps is None else fps)  # before minutes of work, not after them
    device = resolve_device(device)
    pipeline = _load(model, dtype, device, quantize)
    if flow_shift is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=flow_shift)
    if lora is not None:
        pipeline.load_lora_weights(lora, "lora")
        pipeline.set_adapters("lora", lora_weight)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    place(pipeline, device, offload, store=store, resident=resident, slots=slots)
    options = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    given = {name: value for name, value in options.items() if value is not None}
    clip = pipeline(prompt, **given, generator=_generator(seed)).frames[0]
    typer.echo(export_to_video(clip, out, fps=fps or pipeline.fps))


def _check_streaming(offload: Offload, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value not in (None, "0")]
    if given and offload in (Offload.none, Offload.model):
        raise ConfigError(f"{given[0]} was given with --offload {offload.value}; it goes with block or leaf")


def place(pipeline: Any, device: str, offload: Offload, *, store: str | None, resident: str, slots: int | None) -> None:
    """Put the models where ``--offload`` says."""
    from torch import nn  # noqa: PLC0415

    from vramkit.offload import apply_group_offloading  # noqa: PLC0415

    if offload is Offload.none:
        pipeline.to(device)
    elif offload is Offload.model:
        pipeline.enable_model_cpu_offload(device)
    else:
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        for module in modules:
            apply_group_offloading(
                module,
                device,
                offload_type=f"{offload.value}_level",
                store=store,
                slots=slots,
                resident=resident if module is pipeline.transformer else 0,
            )


def _load(model: str, dtype: Dtype, device: str, quantize: Quantize | None) -> Any:
    import torch  # noqa: PLC0415

    from vramkit.pipelines.pipeline import Pipeline  # noqa: PLC0415

    if dtype is Dtype.auto:
        dtype = Dtype.float32 if device == "cpu" else Dtype.bfloat16
    family: Any = Pipeline.class_of(model)
    wanted = getattr(torch, dtype.name)
    pipeline = family.from_pretrained(
        model,
        torch_dtype={"default": wanted, "vae": torch.float32 if family.vae_in_fp32 else wanted},
        quantization_config=None if quantize is None else _quantization(quantize),
    )
    missing = [name for name, part in pipeline.components.items() if part is None and name not in family.optional]
    if missing:
        raise CheckpointError(
            f"{model} has no {' and no '.join(missing)}, without which there is no clip from a prompt"
        )
    pipeline.set_progress_bar_config(desc="denoise")
    return pipeline


def _quantization(quantize: Quantize) -> Any:
    from vramkit.quant import PipelineQuantizationConfig  # noqa: PLC0415

    backend, options = {
        Quantize.fp8: ("fp8", {}),
        Quantize.int8: ("quanto", {"weights": "int8"}),
        Quantize.nf4: ("bitsandbytes_4bit", {"quant_type": "nf4"}),
    }[quantize]
    return PipelineQuantizationConfig(backend, options, components_to_quantize=["transformer"])


def _generator(seed: int) -> Any:
    """Return a generator on the CPU, whose noise is the same for every device."""
    import torch  # noqa: PLC0415

    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
