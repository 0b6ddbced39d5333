"""Files that are cut, overwritten or replaced while weights rest in them: an error by name, never other bytes or a signal.

A file that was renamed over is still there for who has it open, so the weights stay right. Each case is a process of its
own, for a page that is gone ends the process that touches it.
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._cases import LEVELS, Case, environ_of_forks, prepare
from benchmarks.faults._graphs import same
from vramkit.errors import StoreError

__all__ = ["COUNT", "run"]

COUNT = 600
_PLACES = ("mapped", "mapped, direct", "mapped, pageable", "mapped by others", "spilled")
_WAYS = ("cut", "cut to nothing", "overwritten", "replaced")
_ACTS = (
    "pass",
    "pass after a rest",
    "pass in which it happens",
    "state_dict",
    "copy",
    "edit",
    "adapt",
    "read",
    "remove",
)


class _Net(nn.Module):
    """An embedding that is looked up where it rests, blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(ids)
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        return x


def run(count: int, seed: int) -> dict[str, int]:
    """Try `count` cases, in a process that has no threads and so can fork one for each."""
    program = f"from benchmarks.faults import files; files.try_all({count}, {seed})"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environ_of_forks(), stdout=subprocess.PIPE, text=True, check=True)
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        counts[line] += 1
    return dict(counts)


def try_all(count: int, seed: int) -> None:
    """Print how each case ended, a line for each."""
    torch.set_num_threads(1)
    prepare()
    for at in range(count):
        draw = random.Random(f"{seed}/{at}")
        what = tuple(draw.choice(choices) for choices in (LEVELS, _PLACES, _WAYS, _ACTS))
        child = os.fork()
        if child == 0:
            _end_with(what, at)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcome = {0: "the same bytes", 1: "a StoreError"}.get(status, BROKEN)
        if outcome is BROKEN:
            tell("files", f"{at}, {', '.join(what)}", f"ended with {status}")
        print(BROKEN if outcome is BROKEN else f"{what[2]}: {outcome}", flush=True)


def _end_with(what: tuple[str, ...], at: int) -> None:
    code = 3
    try:
        with tempfile.TemporaryDirectory() as folder:
            code = _outcome(what, Path(folder))
    except BaseException:  # noqa: BLE001 (told)
        tell("files", f"{at}, {', '.join(what)}", traceback.format_exc()[-400:])
    os._exit(code)


def _outcome(what: tuple[str, ...], folder: Path) -> int:
    """0: the bytes are the right ones; 1: a StoreError said what happened; 2: neither."""
    level, place, way, act = what
    torch.manual_seed(0)
    case = Case(_Net().eval(), folder, level=level, place="mapped" if place == "mapped by others" else place)
    if place == "mapped by others":
        from safetensors.torch import load_file

        case.module.load_state_dict(load_file(folder / "weights.safetensors"), assign=True)
    offload, ids = case.apply(), torch.randint(0, 600, (2, 6))
    assert case.is_right(ids)
    (file,) = [*folder.glob("*.safetensors"), *folder.glob("spill/*/*")]

    def happens(*_: object) -> None:
        _damage(file, way)

    if act == "pass after a rest":
        offload.rest()
    if act == "pass in which it happens":
        case.module.blocks[2][1].register_forward_hook(happens)  # type: ignore[index,union-attr]
    else:
        happens()
    try:
        return 0 if _act(act, case, offload, ids) else 2
    except StoreError as error:
        if file.name not in str(error):
            raise
    try:
        offload.remove()  # is always possible
    except StoreError:
        offload.remove()
    assert not offload.is_active
    return 1 if way != "replaced" else 2


def _damage(file: Path, way: str) -> None:
    size = file.stat().st_size
    if way.startswith("cut"):
        os.truncate(file, 0 if way == "cut to nothing" else 4096)
    elif way == "overwritten":
        with file.open("r+b") as opened:
            opened.seek(size // 3)
            opened.write(os.urandom(size - size // 3))
    else:
        other = file.with_suffix(".new")
        other.write_bytes(os.urandom(size))
        other.replace(file)


def _act(act: str, case: Case, offload: Any, ids: torch.Tensor) -> bool:
    module: Any = case.module
    if act in ("edit", "adapt"):
        if act == "adapt":
            offload.adapt(slots=3)
        else:
            with offload.edit():
                pass
    ways: dict[str, Callable[[], bool]] = {
        "state_dict": lambda: same(case.resident, module),
        "copy": lambda: same(case.resident, copy.deepcopy(module)),
        "read": lambda: torch.equal(module.blocks[2][0].weight + 0, case.resident.blocks[2][0].weight + 0),  # type: ignore[index,union-attr]
        "remove": lambda: offload.remove() or same(case.resident, module),
    }
    return ways.get(act, lambda: case.is_right(ids) and case.is_right(ids))()
