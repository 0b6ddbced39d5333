"""One forward of a subject under a peer: the figures that every case about forwards tells."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.measure import digest, peaks, release_memory, reset_peaks, seconds_of
from benchmarks.rows import Row
from benchmarks.subjects import Subject
from vramkit.quant import sqnr_db

__all__ = ["measured_pass"]


def measured_pass(
    subject: Subject, way: str, bench: Bench, *, budget_bytes: int | None = None, link_gbps: float | None = None,
    keep: str | None = None, compare: str | None = None, repeats: int | None = None,
) -> Row:  # fmt: skip
    """Load, apply, run the first pass and time the next ones.

    Args:
        budget_bytes: what the card has, for peers that ask.
        link_gbps: an emulated rate in place of the measured one.
        keep: a name under which the result is kept in the folder of the checkpoints.
        compare: such a name; told are the decibels between that result and this one.
        repeats: timed passes, other than the bench has.

    Returns:
        load_s, setup_s (applying, with passes that the peer measures), first_s and the peaks of these two, the figures of
        `Measurement`, moved_bytes, gbps, link_gbps, link_share, digest, is_finite, and what the peer tells.
    """
    row: Row = {}
    subject.prepare(bench)
    with torch.no_grad():
        with seconds_of(row, "load_s"):
            model = subject.load(bench)
        peers.importable(way)
        given = subject.inputs(bench)
        reset_peaks()
        more = {"example": given} if way == "vramkit fit" else {}
        with seconds_of(row, "setup_s"):
            applied = peers.apply(way, model, bench.device, budget_bytes=budget_bytes, **more)
            for _ in range(applied.passes):
                applied.call(**given)
        with seconds_of(row, "first_s"):
            applied.call(**given)
        row |= peaks("setup_")
        release_memory()
        figures, result = bench.measure(lambda: applied.call(**given), repeats=repeats)
    row |= figures.row()
    row |= _moved(applied.moved_bytes(), figures.s, link_gbps or bench.link_gbps)
    row |= _told(applied, result, bench, keep, compare)
    return row


def _moved(moved_bytes: int, seconds: float, link_gbps: float | None) -> Row:
    rate = moved_bytes / seconds / 1e9
    share = None if link_gbps is None else round(rate / link_gbps, 3)
    link = None if link_gbps is None else round(link_gbps, 2)
    return {"moved_bytes": moved_bytes, "gbps": round(rate, 3), "link_gbps": link, "link_share": share}


def _told(applied: peers.Applied, result: Any, bench: Bench, keep: str | None, compare: str | None) -> Row:
    out = _first(result)
    row: Row = {"digest": digest(out), "is_finite": bool(out.isfinite().all()), "peer": applied.notes()}
    folder = bench.folder / "results"
    if keep is not None:
        folder.mkdir(exist_ok=True)
        torch.save(out.cpu(), folder / f"{keep}.pt")
    if compare is not None and (folder / f"{compare}.pt").exists():
        row["db"] = round(sqnr_db(torch.load(folder / f"{compare}.pt", weights_only=True), out.cpu()), 1)
    return row


def _first(result: Any) -> torch.Tensor:
    while not isinstance(result, torch.Tensor):
        result = result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))
    return result
