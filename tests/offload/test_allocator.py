"""Settings of the process are made only where nobody made them: with a device made of paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vramkit.offload import allocator
from vramkit.offload.allocator import use_expandable_segments


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, answer in {"is_available": True, "get_allocator_backend": "native"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(allocator, "_set", made.append)
    return made


def test_segments_grow_by_pages(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_expandable_segments("cuda")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert use_expandable_segments("cuda:0")
    assert settings == ["expandable_segments:True,large_segment_size_mb:12"] * 2
    assert not use_expandable_segments("cpu")


def test_where_torch_knows_pages_of_one_size_alone(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def set_few(setting: str) -> None:
        if "large_segment" in setting:
            raise RuntimeError("Unrecognized key 'large_segment_size_mb' in CachingAllocator config.")
        settings.append(setting)

    monkeypatch.setattr(allocator, "_set", set_few)
    assert use_expandable_segments("cuda")
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize(
    ("holder", "name", "answer"),
    [
        (torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync"),
        (torch.cuda, "is_available", lambda: False),
        (torch.version, "cuda", None),
    ],
)
def test_otherwise_nothing_is_changed(
    settings: list[str], holder: Any, name: str, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, name, answer)
    assert not use_expandable_segments("cuda:0")
    assert settings == []


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_has_set_stands(settings: list[str], variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:128")
    assert not use_expandable_segments("cuda")
    monkeypatch.setenv(variable, "expandable_segments:True,max_split_size_mb:128")
    assert use_expandable_segments("cuda")
    assert settings == []
