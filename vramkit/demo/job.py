"""The demo: one clip resident, the same clip under a budget, and the proof that they are the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import Preset
from vramkit.demo.worker import FRAMES, TRACE, Request
from vramkit.errors import ConfigError, VramkitError
from vramkit.memory import format_bytes
from vramkit.pipelines.video import export_to_video
from vramkit.trace import Trace, plot

if TYPE_CHECKING:
    from rich.console import Console

VIDEO = "demo.mp4"
PICTURE = "demo-memory.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One generation: its frames float32 [F, H, W, 3] and its memory over time."""

    frames: Any
    trace: Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Both generations and what they show."""

    weights_bytes: int
    budget_bytes: int
    resident: Run
    budgeted: Run

    @property
    def identical(self) -> bool:
        """Whether both clips are the same bytes (and numbers at all: a clip of NaN proves nothing)."""
        same = self.resident.frames.tobytes() == self.budgeted.frames.tobytes()
        return same and bool(np.isfinite(self.resident.frames).all())

    @property
    def within_budget(self) -> bool:
        """Whether the second run stayed below the budget."""
        return self.budgeted.trace.peak_bytes <= self.budget_bytes


def run_demo(
    preset: Preset,
    *,
    out: Path,
    device: str = "auto",
    budget_bytes: int | None = None,
    fresh: bool = False,
    console: Console,
) -> Outcome:
    """Write the checkpoint if needed, generate twice, write video and picture to ``out``, and print what was measured.

    Args:
        preset: sizes of the checkpoint and the clip.
        out: folder for the video and the picture, made when it is missing.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for the GPU if there is one.
        budget_bytes: memory that the second run may take; by default the preset's.
        fresh: write the checkpoint again.
        console: where progress and the table are printed.

    Raises:
        VramkitError: a run failed. A budget that was missed is not an error here: see the outcome.
    """
    device = resolve_device(device)
    if budget_bytes is None:
        budget_bytes = preset.cuda_budget_bytes if device.startswith("cuda") else preset.cpu_budget_bytes
    _make_folder(out)
    console.print(f"checkpoint: {preset.name}, random weights in the published Wan2.1 layout ...")
    checkpoint = cached_checkpoint(preset, fresh=fresh)
    weights_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    console.print(f"            {checkpoint} ({format_bytes(weights_bytes)})", soft_wrap=True)
    console.print("run 1 of 2: everything resident ...")
    resident = _run_worker(checkpoint, preset, device, budget_bytes=None)
    console.print(f"run 2 of 2: weights streamed through {format_bytes(budget_bytes)} ...")
    budgeted = _run_worker(checkpoint, preset, device, budget_bytes=budget_bytes)
    outcome = Outcome(weights_bytes=weights_bytes, budget_bytes=budget_bytes, resident=resident, budgeted=budgeted)
    export_to_video(budgeted.frames, out / VIDEO, fps=16)
    plot(
        {"resident": resident.trace, "under the budget": budgeted.trace},
        out / PICTURE,
        budget_bytes=budget_bytes,
        title=f"{format_bytes(weights_bytes)} of weights, one clip, {resident.trace.kind} on {device}",
    )
    print_outcome(outcome, console)
    console.print(f"video:   {out / VIDEO}\npicture: {out / PICTURE}", soft_wrap=True)
    return outcome


def _make_folder(out: Path) -> None:
    """Make the output folder and see that it takes files, before minutes of work and not after them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"--out is {str(out)!r}, a folder that cannot be written to: {error.strerror}") from error


def resolve_device(device: str) -> str:
    """Return ``"cpu"`` or a CUDA device with its number, which memory limits ask for; ConfigError when it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda was given, but torch sees no CUDA device: use --device cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise ConfigError(f"--device is {device!r}; expected auto, cpu or cuda")
    return "cuda:0" if device == "cuda" else device


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print the table of both runs."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"{format_bytes(outcome.weights_bytes)} of weights")
    for column in ("run", "budget", "peak", "seconds", "same clip"):
        table.add_column(column, justify="left" if column == "run" else "right")
    resident, budgeted = outcome.resident.trace, outcome.budgeted.trace
    table.add_row("resident", "-", format_bytes(resident.peak_bytes), f"{resident.seconds:.1f}", "-")
    table.add_row(
        "under the budget",
        format_bytes(outcome.budget_bytes),
        format_bytes(budgeted.peak_bytes) + ("" if outcome.within_budget else " (above)"),
        f"{budgeted.seconds:.1f}",
        "yes, every byte" if outcome.identical else "NO",
    )
    console.print(table)
    console.print(
        f"peak: {resident.kind} that the run added, largest value; seconds: from opening the checkpoint to frames"
    )


def _run_worker(checkpoint: Path, preset: Preset, device: str, *, budget_bytes: int | None) -> Run:
    with tempfile.TemporaryDirectory(prefix="vramkit-demo-") as folder:
        request = Request(
            checkpoint=str(checkpoint), preset=preset.name, device=device, folder=folder, budget_bytes=budget_bytes
        )
        command = [sys.executable, "-m", "vramkit.demo.worker", request.to_json()]
        status = subprocess.run(command, env=os.environ | _WORKER_SETTINGS, check=False).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status != 0:
            raise VramkitError(f"the generation failed (exit status {status}); its own message is above")
        return Run(frames=np.load(Path(folder) / FRAMES), trace=Trace.load(Path(folder) / TRACE))


_WORKER_SETTINGS = {
    # glibc hands memory of freed tensors back to the system at once only above this size; it raises the limit by itself
    # otherwise, and what the process keeps for later would be measured as if the model held it.
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    # MKL picks a kernel by the alignment of its operands, and weights in a file are aligned otherwise than in a slot.
    "MKL_CBWR": "AUTO,STRICT",
}
