"""Words that are added to a text encoder while it is offloaded: by diffusers' textual inversion, and by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_pipelines import PIPELINES
from language_models import llama
from torch import nn

from vramkit.errors import ConflictError
from vramkit.offload import apply_group_offloading, load_mapped, partition
from vramkit.offload.checkpoint import write_checkpoint

WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 3000},
    "model": {"offload_type": "model_level"},
    "resident": {"resident": "1GiB"},
    "table": {},
    "disk": {},
    "mapped": {},
}


def picture(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    sizes = {"height": 16, "width": 16, "num_inference_steps": 2}
    images: torch.Tensor = pipe("a <thing> swims", generator=generator, output_type="pt", **sizes).images
    return images


def load(pipe: Any) -> None:
    torch.manual_seed(5)
    pipe.load_textual_inversion({"<thing>": torch.randn(2, 16)})


def resize(pipe: Any) -> None:
    torch.manual_seed(6)
    pipe.text_encoder.resize_token_embeddings(40)


STEPS: dict[str, Callable[[Any], None]] = {
    "load": load,
    "unload": lambda pipe: pipe.unload_textual_inversion(),
    "load again": load,
    "resize": resize,
}


@pytest.mark.parametrize("way", WAYS)
def test_textual_inversion_is_taken_in_by_edit(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "StableDiffusionPipeline"
    pipe, resident = (PIPELINES[name].make(name) for _ in range(2))
    encoder, options = pipe.text_encoder, dict(WAYS[way])
    if way == "table":
        monkeypatch.setattr(partition, "_TABLE_BYTES", 1)
    if way == "disk":
        options["offload_to_disk_path"] = tmp_path
    if way == "mapped":
        write_checkpoint(tmp_path / "encoder.safetensors", encoder.state_dict())
        load_mapped(encoder, tmp_path / "encoder.safetensors")
    offload = apply_group_offloading(encoder, "cpu", **options)
    found = [picture(pipe)]
    for step, take in STEPS.items():
        take(resident)
        with offload.edit():
            take(pipe)
        assert (offload.stats().table_bytes > 0) == (way == "table")
        found.append(picture(pipe))
        assert torch.equal(found[-1], picture(resident)), step
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[3])
    offload.remove()
    assert torch.equal(picture(pipe), picture(resident))
    assert encoder.get_input_embeddings().weight.shape == (40, 16)


@pytest.mark.parametrize("way", ["block", "resident"])
def test_textual_inversion_outside_edit_is_refused(way: str) -> None:
    name = "StableDiffusionPipeline"
    pipe, resident = (PIPELINES[name].make(name) for _ in range(2))
    offload = apply_group_offloading(pipe.text_encoder, "cpu", **WAYS[way])
    picture(pipe)
    with pytest.raises(ConflictError, match=r"given (other )?memory.*offload_of\(module\)\.edit\(\)"):
        load(pipe)
    offload.remove()
    load(pipe)
    load(resident)
    assert torch.equal(picture(pipe), picture(resident))


@pytest.mark.parametrize("size", [500, 60])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["block", "leaf", "model", "resident", "table"])
def test_a_language_model_is_resized(way: str, tied: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, resident = llama(tied=tied), llama(tied=tied)
    if way == "table":
        monkeypatch.setattr(partition, "_TABLE_BYTES", 1)
    offload = apply_group_offloading(model, "cpu", **WAYS[way])
    ids = torch.arange(9)[None]
    with torch.no_grad():
        model(ids)
        for each in (model, resident):
            torch.manual_seed(3)
            with offload.edit():
                each.resize_token_embeddings(size)
        for _ in range(2):
            logits = model(ids).logits
            assert logits.shape[-1] == size
            assert torch.equal(logits, resident(ids).logits)
        offload.remove()
        assert torch.equal(model(ids).logits, resident(ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_memory_of_another_kind_is_refused_for_what_stays_on_the_device() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)).eval()
    ids = torch.arange(3)
    with torch.no_grad():
        expected = model(ids)
        offload = apply_group_offloading(model, "cpu", resident="1GiB")
        model(ids)
        weight = model[0].weight
        with pytest.raises(ConflictError, match=r"weight of \[8, 4\], torch.float32, was given memory of \[12, 4\]"):
            weight.data = torch.ones(12, 4)
        with pytest.raises(ConflictError, match=r"given memory of \[8, 4\], torch.bfloat16"):
            weight.data = torch.ones(8, 4, dtype=torch.bfloat16)
        with pytest.raises(ConflictError, match=r"given memory of \[12, 4\]"):
            weight.set_(torch.ones(12, 4))
        assert torch.equal(model(ids), expected)
        offload.remove()
        assert torch.equal(model(ids), expected)
