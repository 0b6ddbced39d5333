"""Folders of quantized models with parts missing, empty, cut, of other dtypes, and notes that are damaged: named errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.configs import CONFIGS
from safetensors.torch import load_file, save_file
from torch import nn

from vramkit.errors import CheckpointError
from vramkit.quant import load_quantized, quantize, save_quantized

# The formats in which packed bits are widened by a compiled extension are described like the others, and slow to begin with.
KINDS = [kind for kind in CONFIGS if kind not in ("quanto_int2", "fp4", "int8_no_outliers")]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 32, 64))


class Net(nn.Module):
    """A matrix whose rows no block divides, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(200, 96)
        self.experts = Experts()


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = Net().eval()
    quantize(net, CONFIGS[request.param])
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_quantized(net, folder)
    return folder


def parts_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def notes_of(folder: Path) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return notes


def load(path: Path, notes: Any) -> Net:
    with torch.device("meta"):
        net = Net().eval()
    return load_quantized(net, path, notes)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda part: None,
    "empty": lambda part: part.new_empty(0),
    "cut": lambda part: part[: part.shape[0] // 2].clone() if part.ndim and part.shape[0] > 1 else part.new_empty(0),
    "one row": lambda part: part[:1].clone() if part.ndim and part.shape[0] > 1 else None,
    "longer": lambda part: torch.cat([part, part]) if part.ndim else part.reshape(1),
    "flat": lambda part: part.reshape(-1) if part.ndim > 1 else part[None],
    "another dtype": lambda part: part.to(torch.float64),
    "the same bytes": lambda part: (
        part.view(torch.uint8)
        if part.dtype == torch.int8
        else part.view(torch.int8)
        if part.element_size() == 1
        else part.view(torch.int32)
        if part.element_size() == 4
        else None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_does_not_fit_is_an_error_that_names_it(change: str, saved: Path, tmp_path: Path) -> None:
    notes, whole = notes_of(saved), parts_of(saved)
    stored = [key for key in whole if key.rpartition(".")[0] in notes["tensors"]]
    assert len(stored) >= 4
    for key in stored:
        part = CHANGES[change](whole[key])
        changed = {**whole, key: part} if part is not None else {k: v for k, v in whole.items() if k != key}
        path = tmp_path / f"{key}.safetensors"
        save_file(changed, path)
        name, _, which = key.rpartition(".")
        with pytest.raises(CheckpointError, match=rf"{key}\.safetensors: {name}: part '{which}' is .*expected"):
            load(path, notes)


def test_a_part_too_many_is_an_error(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.safetensors"
    save_file({**parts_of(saved), "inner.weight.more": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"inner\.weight: part 'more' is .*expected none"):
        load(path, notes_of(saved))


def test_a_vector_that_the_notes_call_quantized_is_an_error(saved: Path, tmp_path: Path) -> None:
    notes, path = notes_of(saved), tmp_path / "more.safetensors"
    notes["tensors"]["inner.bias"] = {**notes["tensors"]["inner.weight"], "shape": [96]}
    save_file({**parts_of(saved), "inner.bias.stored": torch.ones(96)}, path)
    with pytest.raises(CheckpointError, match=r"inner\.bias: .*only matrices are quantized"):
        load(path, notes)


def test_what_was_not_changed_loads(saved: Path) -> None:
    assert load(saved / "model.safetensors", notes_of(saved)).experts.weight.shape == (2, 32, 64)


ODD = [None, True, 5, -1, 2.5, "x", "load", [], [3], [0, 0], [2**40, 2**40], {}, {"a": 1}]


def test_damaged_notes_are_errors_or_mean_the_same(saved: Path) -> None:
    """Each entry taken away, and each made something else: an error, or the numbers that were saved."""
    notes, path = notes_of(saved), saved / "model.safetensors"
    expected = load(path, notes)
    free = {
        "skipped",
        "shape",
        "is_given",
        "skip_modules",
        "storage",
        "compute_dtype",
        "compute",
        "threshold",
        "activations",
    }
    for owner, key in places(notes):
        for odd in ("missing", *ODD):
            damaged = copy.deepcopy(notes)
            at = damaged
            for step in owner:
                at = at[step]
            if odd == "missing":
                del at[key]
            elif at[key] == odd:
                continue
            else:
                at[key] = odd
            try:
                loaded = load(path, damaged)
            except CheckpointError:
                continue
            else:
                assert key in free, f"{owner}: {key}={odd!r} was taken"
                same = zip(loaded.parameters(), expected.parameters(), strict=True)
                assert all(torch.equal(*map(values, pair)) for pair in same), f"{owner}: {key}={odd!r}: other numbers"
    for odd in ODD[1:]:
        with pytest.raises(CheckpointError):
            load(path, odd)


def places(notes: Any, owner: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    found = []
    for key, value in notes.items():
        found.append((owner, key))
        if isinstance(value, dict):
            found += places(value, (*owner, key))
    return found


def values(parameter: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.detach().reshape(-1).view(torch.uint8) for part in parts(parameter)])


def parts(parameter: Any) -> list[torch.Tensor]:
    return list(parameter.parts().values()) if hasattr(parameter, "parts") else [parameter]


def test_a_lost_option_is_not_replaced_by_its_default(tmp_path: Path) -> None:
    net = Net().eval()
    quantize(net, CONFIGS["nf4"])
    save_quantized(net, tmp_path)
    notes = notes_of(tmp_path)
    del notes["quant_type"]
    with pytest.raises(CheckpointError, match="lacks quant_type"):
        load(tmp_path / "model.safetensors", notes)
