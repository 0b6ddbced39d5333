"""Emulated links: each piece travels several times, so that weights come as slowly as on a smaller machine.

The emulation is checked first: a piece of 256 MiB through the slowed store against the rate that was asked for, and against
the link as it is. Only our engine has a store to slow down; no peer is in this case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.bench import Bench
from benchmarks.emulation import SlowStore, slowed
from benchmarks.measure import synchronize
from benchmarks.passes import measured_pass
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject
from vramkit.memory import MIB
from vramkit.offload.stores import PinnedStore

# What 16 lanes reach from page-locked memory, and what laptops with 8 lanes have.
LINKS_GBPS = {"PCIe 4 x16": 25.0, "PCIe 4 x8": 12.5, "PCIe 3 x16": 12.5, "PCIe 3 x8": 6.2}
_SMOKE_LINK_GBPS = 50.0  # of the CPU, which has none: for tests
_PROBES = 5


def settings(scale: str) -> Iterator[Setting]:
    """The check, and Wan 14B and LTX-Video over each link."""
    links = dict(list(LINKS_GBPS.items())[:1]) if scale == "smoke" else LINKS_GBPS
    for name, gbps in links.items():
        machine = f"link {name}"
        yield Setting(case="links", subject="check", way="copy", machine=machine, options={"gbps": gbps})
        for network, frames in (("wan-14b", 5), ("wan-14b", 81), ("ltx", None)):
            if scale == "smoke" and frames != 5:
                continue
            library = "vramkit" if network == "wan-14b" else "diffusers"
            subject = Subject.of(network, scale, frames=frames, library=library)
            for way in ("vramkit block", "vramkit leaf"):
                yield Setting(
                    case="links",
                    subject=str(subject),
                    way=way,
                    machine=machine,
                    options={"subject": subject.to_json(), "gbps": gbps},
                    reference={"case": "forward"},
                )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one."""
    link, gbps = bench.link_gbps or _SMOKE_LINK_GBPS, setting.options["gbps"]
    times = link / gbps
    if setting.subject == "check":
        yield setting.row(**_checked(bench, times, gbps, link))
        return
    subject = Subject.from_json(setting.options["subject"])
    with slowed(times):
        row = measured_pass(subject, setting.way, bench, link_gbps=gbps)
    yield setting.row(times=round(times, 4), **row)


def _checked(bench: Bench, times: float, asked_gbps: float, link_gbps: float) -> Row:
    """Time copies through a store as it is and slowed, of the same bytes."""
    size = (4 if bench.is_smoke else 256) * MIB
    host = torch.ones(size, dtype=torch.uint8, device="cpu", pin_memory=bench.device.type == "cuda")
    target = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    plain = PinnedStore(host, "registered")
    rates = {name: _rate(store, target) for name, store in (("plain", plain), ("slow", SlowStore(plain, times)))}
    return {
        "s": size / rates["slow"] / 1e9,
        "asked_gbps": asked_gbps,
        "link_gbps": round(link_gbps, 2),
        "plain_gbps": round(rates["plain"], 2),
        "gbps": round(rates["slow"], 2),
        "off_by": round(rates["slow"] * times / rates["plain"] - 1, 4),
        "same_bytes": bool((target == 1).all()),
    }


def _rate(store: PinnedStore | SlowStore, target: torch.Tensor) -> float:
    seconds = []
    for _ in range(_PROBES):
        synchronize()
        start = time.perf_counter()
        store.fill(target)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return target.numel() / statistics.median(seconds) / 1e9
