"""Mutated headers of safetensors and GGUF files: accepted where the reference reader accepts them, with its bytes.

A safetensors file that the reference cannot open is refused by a named error. One that it opens and makes tensors of is
opened here, and its tensors are the same bytes. So are those of a GGUF file that is accepted here, as far as the reference
reads it (which does not check what it reads).
"""

from __future__ import annotations

import random
import struct
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._mutations import drawn_stand_in, mutated_bytes, mutated_json
from vramkit.errors import CheckpointError
from vramkit.offload import read_checkpoint

COUNT = 25_000  # a fifth of it GGUF
MOST_MESSAGE = 1_000

_GOOD: dict[str, dict[str, Any]] = {
    "__metadata__": {"format": "pt", "note": "x"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [2, 1, 4], "data_offsets": [32, 40]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [40, 48]},
    "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [48, 48]},
    "packed": {"dtype": "F4", "shape": [2, 4], "data_offsets": [48, 52]},
    "narrow": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [52, 56]},
}
_DATA = bytes(range(56))


def run(count: int, seed: int) -> dict[str, int]:
    """Try `count` files."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter({BROKEN: 0})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in range(count):
            kind, path = (_gguf if case % 5 == 4 else _safetensors)(rng, Path(folder))
            if rng.random() < 0.03:
                kind = f"instead of {kind}"
                path.write_bytes(drawn_stand_in(rng, path.read_bytes()))
            try:
                outcomes[f"{kind}, {_compared(path)}"] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is: that is what is looked for
                outcomes[BROKEN] += 1
                tell("headers", case, f"{type(error).__name__}: {error}\n{path.read_bytes()[:600]!r}")
    return dict(outcomes)


def _safetensors(rng: random.Random, folder: Path) -> tuple[str, Path]:
    header = mutated_json(rng, _GOOD if rng.random() < 0.7 else _with_more(rng))
    length = (
        len(header)
        if rng.random() < 0.97
        else rng.choice((0, 1, 2, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1))
    )
    data = _DATA if rng.random() < 0.95 else _DATA[: rng.randrange(len(_DATA))] + bytes(rng.randrange(3))
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return "safetensors", path


def _with_more(rng: random.Random) -> dict[str, Any]:
    """The good header with fields that nobody asks for, of which most changes are harmless."""
    more: dict[str, Any] = {"x": [1, {"y": [[], "z"]}, 1e5], "note": "x", "": None}
    kept = rng.sample(sorted(more), 2)
    return {name: {**{key: more[key] for key in kept if name[0] != "_"}, **entry} for name, entry in _GOOD.items()}


def _gguf(rng: random.Random, folder: Path) -> tuple[str, Path]:
    path = folder / "x.gguf"
    path.write_bytes(mutated_bytes(rng, _good_gguf(rng)))
    return "gguf", path


def _good_gguf(rng: random.Random) -> bytes:
    """A small file of several formats, its numbers now and then odd ones."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(value: int) -> int:
        return rng.choice((0, 1, 31, value + 1, value * 2, 2**31, 2**63, 2**64 - 1)) if rng.random() < 0.03 else value

    tensors = [("a.weight", (32, 2), 8, 68), ("b", (4,), 0, 16), ("c", (256, 1), 12, 144), ("d", (3, 2), 1, 12)]
    made = b"GGUF" + struct.pack("<IQQ", number(3) % 2**32, number(len(tensors)), number(3))
    made += text("general.alignment") + struct.pack("<II", 4, number(32) % 2**32)
    made += text("name") + struct.pack("<I", 8) + text("model")
    made += text("comfy.gguf.orig_shape.d") + struct.pack("<IIQ", 9, 5, number(3)) + struct.pack("<3i", 2, 1, 3)
    offset, data = 0, b""
    for name, dims, kind, size in tensors:
        made += text(name) + struct.pack(f"<I{len(dims)}Q", number(len(dims)) % 2**32, *map(number, dims))
        made += struct.pack("<IQ", number(kind) % 2**32, number(offset))
        data += bytes(range(size)) + bytes(-size % 32)
        offset = len(data)
    return made + bytes(-len(made) % 32) + data


def _compared(path: Path) -> str:
    """Read a file here and by the reference; AssertionError where they differ."""
    refusal, ours = _read(path)
    if refusal is not None:
        assert len(refusal) <= MOST_MESSAGE, f"a message of {len(refusal)} characters"
        # The reference reader of GGUF files counts for hours what a file speaks of, so it is asked for what is accepted.
        assert path.suffix == ".gguf" or _reference(path) is None, f"refused ({refusal}), and the reference reads it"
        return "refused"
    theirs = _reference(path)
    if path.suffix == ".gguf":
        for name, tensor in (theirs or {}).items():
            assert _bytes(ours[name]) == _bytes(tensor), f"{name!r} has other bytes"
        return "accepted" if theirs is None else "accepted, same bytes"
    assert theirs is not None, "accepted, and the reference refuses it"
    assert ours.keys() == theirs.keys(), f"names {list(ours)} and {list(theirs)}"
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), f"{name!r} differs"
        assert _bytes(tensor) == _bytes(ours[name]), f"{name!r} has other bytes"
    return "accepted, same bytes"


def _read(path: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """Return why a file is refused, or its tensors."""
    try:
        return None, {name: entry.tensor() for name, entry in read_checkpoint(path).items() if _is_known(entry)}
    except CheckpointError as error:
        return str(error), {}


def _is_known(entry: Any) -> bool:
    return entry.dtype_name not in ("F6_E2M3", "F6_E3M2")  # which torch cannot show


def _bytes(tensor: torch.Tensor) -> list[int]:
    found: list[int] = tensor.reshape(-1).view(torch.uint8).tolist()
    return found


def _reference(path: Path) -> dict[str, torch.Tensor] | None:
    """What the reference makes of a file, None if nothing."""
    try:
        return _by_gguf(path) if path.suffix == ".gguf" else _by_safetensors(path)
    except Exception:  # noqa: BLE001 - its errors have no common base
        return None


def _by_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if file.get_slice(name).get_dtype() not in ("F6_E2M3", "F6_E3M2"):
                found[name] = file.get_tensor(name)
    return found


def _by_gguf(path: Path) -> dict[str, torch.Tensor]:
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: torch.from_numpy(tensor.data.copy()).reshape(-1).view(torch.uint8) for tensor in tensors}
