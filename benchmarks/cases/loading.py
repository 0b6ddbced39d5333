"""From files to the first step: a transformer of diffusers loaded in every ordinary way, then streamed.

Told are the seconds to load and to apply, where the weights rest, how much anonymous memory the process has grown by,
and the first pass beside the next ones. The reference is the resident row of the case "forward".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.checkpoints import empty, write_network
from benchmarks.measure import digest, host_memory, release_memory, seconds_of
from benchmarks.networks import NETWORKS
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject
from vramkit.offload import load_mapped

_NETWORK = "wan-14b"


def settings(scale: str) -> Iterator[Setting]:
    """Each loader."""
    subject = Subject.of(_NETWORK, scale, frames=5)
    for name in LOADERS:
        yield Setting(
            case="loading",
            subject=f"{subject} by {name}",
            way="vramkit block",
            options={"loader": name},
            reference={"case": "forward", "subject": str(subject)},
        )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Load, apply, run."""
    subject = Subject.of(_NETWORK, bench.scale, frames=5)
    subject.prepare(bench)
    folder = write_network(bench.folder, _NETWORK, bench.scale, bench.device)
    load = LOADERS[setting.options["loader"]]
    if load is torch_load:
        _write_pickle(folder, bench)
    release_memory()
    before = host_memory()["anonymous_bytes"]
    row: Row = {}
    with torch.no_grad():
        with seconds_of(row, "load_s"):
            model = load(folder, bench).eval().requires_grad_(False)
        with seconds_of(row, "setup_s"):
            applied = peers.apply(setting.way, model, bench.device)
        grown = None if before is None else host_memory()["anonymous_bytes"] - before
        given = subject.inputs(bench)
        with seconds_of(row, "first_s"):
            applied.call(**given)
        figures, result = bench.measure(lambda: applied.call(**given)[0])
    row |= figures.row() | {"moved_bytes": applied.moved_bytes(), "link_gbps": bench.link_gbps}
    yield setting.row(**row, grown_bytes=grown, digest=digest(result), peer=applied.notes())


def from_pretrained(folder: Path, _bench: Bench) -> nn.Module:
    """Load as users of diffusers do."""
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return model


def load_file_assigned(folder: Path, bench: Bench) -> nn.Module:
    """Load as many research repositories do."""
    state = {name: values for path in _files(folder) for name, values in load_file(path).items()}
    return _assigned(bench, state)


def mapped(folder: Path, bench: Bench) -> nn.Module:
    """Load by our own function."""
    return load_mapped(empty(NETWORKS[_NETWORK], bench.scale), _files(folder))


def torch_load(folder: Path, bench: Bench) -> nn.Module:
    """Load a file of `torch.save`, mapped."""
    return _assigned(bench, torch.load(folder / "model.pt", mmap=True, weights_only=True))


def constructed(folder: Path, bench: Bench) -> nn.Module:
    """Have an allocation in RAM for each parameter, as a constructor and loaders that copy leave it."""
    state = {name: values.clone() for path in _files(folder) for name, values in load_file(path).items()}
    return _assigned(bench, state)


LOADERS: dict[str, Callable[[Path, Bench], nn.Module]] = {
    "from_pretrained": from_pretrained,
    "load_file assigned": load_file_assigned,
    "load_mapped": mapped,
    "constructed": constructed,
    "torch.load mapped": torch_load,
}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _assigned(bench: Bench, state: dict[str, torch.Tensor]) -> nn.Module:
    model = empty(NETWORKS[_NETWORK], bench.scale)
    model.load_state_dict(state, assign=True)
    return model


def _write_pickle(folder: Path, bench: Bench) -> None:
    """Write the same weights by `torch.save`; two copies of the files are there then."""
    if not (folder / "model.pt").exists():
        torch.serialization.set_crc32_options(False)  # a sum over 28 GB takes longer than to write them
        part = folder / "model.pt.part"
        torch.save(constructed(folder, bench).state_dict(), part)
        part.replace(folder / "model.pt")
