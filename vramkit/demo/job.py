"""The demo: one clip resident, the same clip under budgets, and the proof that they are the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import vramkit
from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import Preset
from vramkit.demo.sweep import Point, plot_sweep
from vramkit.demo.worker import CPU_MARGIN_BYTES, FACTS, FRAMES, TRACE, Request, plan_clip
from vramkit.errors import ConfigError, PlanInfeasible, VramkitError
from vramkit.machine import resolve_device
from vramkit.memory import format_apart, format_bytes
from vramkit.pipelines.calling.video import export_to_video
from vramkit.timeline import MIB, Trace, plot

if TYPE_CHECKING:
    from rich.console import Console

VIDEO = "demo.mp4"
PICTURE = "demo-memory.png"
SWEEP = "demo-budgets.png"
_ROUNDING = 1e-3  # of frames from 0 to 1: what kernels of another size may differ by


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One generation: its frames float32 [F, H, W, 3] and its memory over time."""

    budget_bytes: int | None  # None: everything resident
    frames: Any
    trace: Trace
    link_s: float = 0.0  # that its streamed bytes take on the link alone
    decode: str = "whole"  # how its plan decodes

    @property
    def clip_s(self) -> float:
        """Seconds of the clip, without loading."""
        return self.trace.seconds - next(mark.time_s for mark in self.trace.marks if mark.name == "encode")

    @property
    def within_budget(self) -> bool:
        """Whether the run stayed below its budget."""
        return self.budget_bytes is None or self.trace.peak_bytes <= self.budget_bytes

    def is_same_clip(self, other: Run) -> bool:
        """Whether both clips are the same bytes (and numbers at all: a clip of NaN proves nothing)."""
        return self.frames.tobytes() == other.frames.tobytes() and bool(np.isfinite(self.frames).all())

    def likeness(self, other: Run) -> str | None:
        """Say how like the clips are, as the way of decoding lets them be; None where they should be more."""
        if self.is_same_clip(other):
            return "yes, every byte"
        if self.decode == "whole" or not np.isfinite(self.frames).all():
            return None
        if self.decode == "tiles":
            return "blended: tiles"
        return f"rounded: {self.decode}" if np.abs(self.frames - other.frames).max() < _ROUNDING else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """All generations and what they show."""

    weights_bytes: int
    floor_bytes: int  # the least budget that a plan fits into
    resident: Run
    budgeted: list[Run]  # the first one's budget is the one that was asked for

    @property
    def is_right(self) -> bool:
        """Whether all clips are the same bytes, or those decoded in parts as like as that lets them be."""
        return all(run.likeness(self.resident) is not None for run in self.budgeted)

    @property
    def within_budget(self) -> bool:
        """Whether every run stayed below its budget."""
        return all(run.within_budget for run in self.budgeted)


def run_demo(
    preset: Preset,
    *,
    out: Path,
    device: str = "auto",
    budget_bytes: int | None = None,
    fresh: bool = False,
    console: Console,
) -> Outcome:
    """Write the checkpoint if needed, generate, write video and pictures to ``out``, and print what was measured.

    Args:
        preset: sizes of the checkpoint and the clip.
        out: folder for the video and the pictures, made when it is missing.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for the GPU if there is one.
        budget_bytes: memory that the second run may take; by default the preset's. Further runs take parts of it.
        fresh: write the checkpoint again.
        console: where progress and the table are printed.

    Raises:
        PlanInfeasible: the budget is too small; nothing was generated.
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
    floor_bytes = _floor(checkpoint, preset, budget_bytes, device)
    others = [int(part * budget_bytes) for part in preset.sweep if part * budget_bytes >= floor_bytes]
    budgets = [None, budget_bytes, *others]
    runs = []
    for at, budget in enumerate(budgets, 1):
        how = "everything resident" if budget is None else f"within {format_bytes(budget)}, as `--vram` does it"
        console.print(f"run {at} of {len(budgets)}: {how} ...")
        runs.append(_run_worker(checkpoint, preset, device, budget_bytes=budget))
    outcome = Outcome(weights_bytes=weights_bytes, floor_bytes=floor_bytes, resident=runs[0], budgeted=runs[1:])
    export_to_video(runs[1].frames, out / VIDEO, fps=16)
    _draw(outcome, out, device)
    print_outcome(outcome, console)
    size = f"--width {preset.width} --height {preset.height} --frames {preset.num_frames}"
    for line in (
        f"video:    {out / VIDEO} (noise, as it should be: the weights are random)",
        f"pictures: {out / PICTURE}, {out / SWEEP}",
        f'your own: vramkit run --model {checkpoint} {size} --prompt "A red bird" --vram {budget_bytes // MIB}MiB',
    ):
        console.print(line, soft_wrap=True)
    return outcome


def _floor(checkpoint: Path, preset: Preset, budget_bytes: int, device: str) -> int:
    """Return the least budget for the clip; refuse a smaller one before anything is computed."""
    there = torch.device(device)
    try:
        least_bytes = plan_clip(str(checkpoint), preset, 0, there).floor_bytes
    except PlanInfeasible as error:  # of all ways; a plan that fits tells of those that were looked at
        least_bytes = error.nearest_bytes
    least_bytes += CPU_MARGIN_BYTES if there.type == "cpu" else 0
    if budget_bytes < least_bytes:
        given, least = format_apart(budget_bytes, least_bytes)
        raise ConfigError(f"--budget is {given}; the least that fits is {least}")
    return least_bytes


def _draw(outcome: Outcome, out: Path, device: str) -> None:
    """Write both pictures."""
    resident, first = outcome.resident, outcome.budgeted[0]
    weights, kind = format_bytes(outcome.weights_bytes), resident.trace.kind
    plot(
        {"resident": resident.trace, "under the budget": first.trace},
        out / PICTURE,
        budget_bytes=first.budget_bytes,
        title=f"{weights} of weights, one clip, {kind} on {device}",
    )
    plot_sweep(
        [
            Point(
                budget_bytes=run.budget_bytes or 0,
                peak_bytes=run.trace.peak_bytes,
                seconds=run.clip_s,
                link_s=run.link_s,
            )
            for run in outcome.budgeted
        ],
        out / SWEEP,
        floor_bytes=outcome.floor_bytes,
        resident_bytes=resident.trace.peak_bytes,
        resident_s=resident.clip_s,
        title=f"{weights} of weights, one clip under {len(outcome.budgeted)} budgets, {kind} on {device}",
    )


def _make_folder(out: Path) -> None:
    """Make the output folder and see that it takes files, before minutes of work and not after them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"--out is {str(out)!r}, a folder that cannot be written to: {error.strerror}") from error


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print the table of all runs."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"{format_bytes(outcome.weights_bytes)} of weights")
    for column in ("run", "budget", "peak", "seconds", "same clip"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in (outcome.resident, *outcome.budgeted):
        is_resident = run.budget_bytes is None
        table.add_row(
            "resident" if is_resident else "under a budget",
            "-" if run.budget_bytes is None else format_bytes(run.budget_bytes),
            format_bytes(run.trace.peak_bytes) + ("" if run.within_budget else " (above)"),
            f"{run.clip_s:.1f}",
            "-" if is_resident else run.likeness(outcome.resident) or "NO",
        )
    console.print(table)
    console.print(
        f"peak: {outcome.resident.trace.kind} that the run added, largest value; seconds: from the prompt to frames, "
        f"without loading; the least budget that would do: {format_bytes(outcome.floor_bytes)}"
    )


def _run_worker(checkpoint: Path, preset: Preset, device: str, *, budget_bytes: int | None) -> Run:
    with tempfile.TemporaryDirectory(prefix="vramkit-demo-") as folder:
        request = Request(
            checkpoint=str(checkpoint), preset=preset.name, device=device, folder=folder, budget_bytes=budget_bytes
        )
        # Not by -m, which puts the working folder first on the path, whatever lies there under the name of vramkit.
        command = [sys.executable, "-c", _START, _IMPORTED_FROM, request.to_json()]
        status = subprocess.run(command, env=os.environ | _WORKER_SETTINGS, check=False).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status != 0:
            raise VramkitError(f"the generation failed (exit status {status}); its own message is above")
        return Run(
            budget_bytes=budget_bytes,
            frames=np.load(Path(folder) / FRAMES),
            trace=Trace.load(Path(folder) / TRACE),
            **json.loads((Path(folder) / FACTS).read_text(encoding="utf-8")),
        )


_START = """
import sys
sys.path = [sys.argv[1], *filter(None, sys.path)]
from vramkit.demo.worker import main
sys.exit(main(sys.argv[2]))
"""
_IMPORTED_FROM = str(Path(vramkit.__file__).absolute().parents[1])
_WORKER_SETTINGS = {
    # glibc hands memory of freed tensors back to the system at once only above this size; it raises the limit by itself
    # otherwise, and what the process keeps for later would be measured as if the model held it.
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    # MKL picks a kernel by the alignment of its operands, and weights in a file are aligned otherwise than in a slot.
    "MKL_CBWR": "AUTO,STRICT",
}
