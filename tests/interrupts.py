"""Send real signals into the engine at random moments, and check after each that nothing is broken. Run by itself:

    python tests/interrupts.py [seconds] [seed]

The signal comes from the kernel's timer and its handler is that of Ctrl-C, so it hits any instruction of the main thread. A
hang ends the process with the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
from modules import BlockNet, mapped_copy, tokens, traces

from vramkit.offload import Offload, apply_group_offloading, offload_of

HANG_SECONDS = 60  # a hang is for ever, and a busy machine may let a process wait for longer than it takes to notice


def tasks() -> list[Path]:
    """All threads of this process, also those that Python does not know."""
    return list(Path("/proc/self/task").iterdir())


def was_interrupted(work: Callable[[], object], delay_s: float) -> bool:
    """Run `work` and interrupt it after `delay_s`; tell if that was before its end."""
    try:
        signal.setitimer(signal.ITIMER_REAL, delay_s)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


class Case:
    """One way of offloading one module, with what the module was before."""

    def __init__(self, folder: Path, *, mapped: bool, spill: bool = False, **options: Any) -> None:
        self.options = options | ({"offload_to_disk_path": folder / "spill"} if spill else {})
        self.spill = folder / "spill"
        self.model = BlockNet(blocks=5).eval()
        if mapped:
            self.module = mapped_copy(self.model, folder)
        else:
            self.module = BlockNet(blocks=5).eval()
            self.module.load_state_dict(self.model.state_dict())
        self.input = tokens(8)
        with torch.no_grad():
            self.expected = self.model(self.input)
        self.before = traces(self.module)
        self.offload: Offload | None = None

    def apply(self) -> None:
        self.offload = apply_group_offloading(self.module, "cpu", **self.options)

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.module(self.input)

    def edit(self) -> None:
        assert self.offload is not None
        with self.offload.edit():
            pass

    def remove(self) -> None:
        assert self.offload is not None
        self.offload.remove()

    def check_forward(self) -> None:
        assert torch.equal(self.forward(), self.expected), "wrong numbers"

    def check_plain(self) -> None:
        """Nothing of the offloading is left."""
        after = traces(self.module)
        changed = {key: (self.before[key], after.get(key)) for key in self.before if after.get(key) != self.before[key]}
        assert after == self.before, changed
        state = self.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in self.module.state_dict().items())
        assert not self.spill.exists() or not list(self.spill.iterdir()), list(self.spill.iterdir())
        for _ in range(200):  # a thread that was started when the interrupt came ends by itself
            threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
            if not threads and len(tasks()) == TASKS:
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"threads are left: {threads}; {len(tasks())} tasks instead of {TASKS}")

    def finish(self) -> None:
        """remove() after whatever happened, once more, and look."""
        if self.offload is not None:
            self.offload.remove()
            self.offload.remove()
            self.offload = None
        self.check_plain()
        self.check_forward()


def duration(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tries(case: Case, seconds: float, counts: Counter[str]) -> Iterator[str]:
    """Interrupt every step again and again; yields what was tried."""
    case.apply()
    typical = {"forward": min(duration(case.forward) for _ in range(3)), "edit": duration(case.edit)}
    typical["remove"] = duration(case.remove)
    typical["apply"] = duration(case.apply)
    case.finish()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        step = random.choice(["forward", "forward", "forward", "edit", "remove", "apply"])
        yield step
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        delay = random.uniform(1e-6, 1.1 * typical[step])
        if step == "apply":
            hit = was_interrupted(case.apply, delay)
            if hit and offload_of(case.module) is not None:  # it was done, and only the handle got lost
                counts["apply hit after its end"] += 1
                case.offload = offload_of(case.module)
                case.check_forward()
                case.finish()
            elif hit:
                case.offload = None
                case.check_plain()
                case.check_forward()
            case.finish()
        else:
            case.apply()
            assert case.offload is not None
            for _ in range(4 if step == "forward" else 1):
                hit = was_interrupted(getattr(case, step), delay)
                case.check_forward()
                delay = random.uniform(1e-6, 1.1 * typical[step])
                counts[f"{step} {'interrupted' if hit else 'whole'}"] += 1
            case.finish()
        if step == "apply":
            counts[f"{step} {'interrupted' if hit else 'whole'}"] += 1


CASES: dict[str, dict[str, Any]] = {
    "block level from a file": {"mapped": True},
    "leaf level from a file": {"mapped": True, "offload_type": "leaf_level"},
    "model level pageable": {"mapped": False, "offload_type": "model_level", "store": "pageable"},
    "block level pageable": {"mapped": False, "store": "pageable"},
    "block level, written to disk": {"mapped": False, "spill": True},
}


def main() -> None:
    global TASKS  # noqa: PLW0603
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    warm = BlockNet().eval()
    apply_group_offloading(warm, "cpu", store="pageable").remove()
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)  # has a thread of its own
    time.sleep(1)  # the system counts the thread of the warm-up for a moment after it was joined
    TASKS = len(tasks())
    failures = 0
    for name, options in CASES.items():
        counts: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder), **options)
            step = "start"
            try:
                for step in tries(case, seconds / len(CASES), counts):  # noqa: B007
                    pass
            except Exception:  # noqa: BLE001 (printed, and counted)
                failures += 1
                print(f"FAILED {name}, {step}, seed {seed}", flush=True)  # noqa: T201
                traceback.print_exc()
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"{name}: {dict(sorted(counts.items()))}", flush=True)  # noqa: T201
    faulthandler.cancel_dump_traceback_later()  # a busy machine takes its time to end a process
    sys.exit(bool(failures))


TASKS = 0

if __name__ == "__main__":
    main()
