"""Models that others wrote run unchanged: transformers' language models and encoders, through their own entry points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from language_models import llama
from torch import nn

from vramkit.casting import apply_layerwise_casting
from vramkit.errors import ConflictError
from vramkit.offload import apply_group_offloading, apply_model_offload, load_mapped

WAYS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "two_blocks": {"offload_type": "block_level", "num_blocks_per_group": 2, "slots": 1},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 20_000},
    "model": {"offload_type": "model_level"},
}


def generate(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 12)[None]
    out: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_generate_gives_the_same_tokens(way: str, tied: bool) -> None:
    model = llama(tied=tied)
    expected, logits = generate(model), model(torch.arange(9)[None]).logits
    offload = apply_group_offloading(model, "cpu", **WAYS[way])
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(generate(model), expected)
            assert torch.equal(model(torch.arange(9)[None]).logits, logits)
    assert offload.stats().loaded_bytes > 0
    offload.remove()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(generate(model), expected)


def test_a_saved_language_model_is_mapped_and_read_from_disk(tmp_path: Path) -> None:
    model = llama(tied=True)
    expected = generate(model)
    model.save_pretrained(tmp_path)
    mapped = llama(tied=True)
    for parameter in mapped.parameters():
        parameter.data.zero_()
    load_mapped(mapped, tmp_path / "model.safetensors")
    offload = apply_group_offloading(mapped, "cpu")
    assert torch.equal(generate(mapped), expected)
    assert set(offload.stats().stores) == {"disk"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_encoders_give_the_same_states(way: str, kind: str) -> None:
    config_class, model_class = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    }[kind]
    torch.manual_seed(0)
    config = config_class(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
    model = model_class(config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        apply_group_offloading(model, "cpu", **WAYS[way])
        for _ in range(3):
            assert torch.equal(model(input_ids=ids).last_hidden_state, expected)


def test_an_encoder_that_reads_weight_dtype_computes_in_fp8_storage() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = transformers.T5EncoderModel(config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exact = model(ids).last_hidden_state
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
        resident = model(ids).last_hidden_state
        apply_group_offloading(model, "cpu")
        assert torch.equal(model(ids).last_hidden_state, resident)
    assert 0 < (resident - exact).norm() / exact.norm() < 0.1


def test_components_of_different_libraries_take_turns() -> None:
    parts = {"text": llama(tied=False), "head": nn.Sequential(nn.Linear(300, 8), nn.GELU(), nn.Linear(8, 4)).eval()}
    with torch.no_grad():
        ids = torch.arange(9)[None]
        expected = parts["head"](parts["text"](ids).logits)
        turns = apply_model_offload(parts, "cpu")
        for _ in range(2):
            assert torch.equal(parts["head"](parts["text"](ids).logits), expected)
    turns.remove()


ACCELERATES: dict[str, Callable[[nn.Module], object]] = {
    "cpu_offload": lambda model: accelerate.cpu_offload(model, "cpu"),
    "cpu_offload_with_hook": lambda model: accelerate.cpu_offload_with_hook(model, "cpu"),
    "dispatch_model": lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


class Located(nn.Sequential):
    """Says where it is, as models of transformers and diffusers do."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@pytest.mark.parametrize("way", ACCELERATES)
def test_accelerate_is_refused_over_an_offloaded_module(way: str) -> None:
    torch.manual_seed(0)
    model = Located(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    x = torch.ones(1, 8)
    with torch.no_grad():
        expected = model(x)
        offload = apply_group_offloading(model, "cpu")
        with pytest.raises(ConflictError, match=r"CPU offloading to Located.*remove\(\)"):
            ACCELERATES[way](model)
        assert not any(vars(part).keys() & {"_hf_hook", "_old_forward"} for part in model.modules())
        assert torch.equal(model(x), expected)
        offload.remove()
        assert type(model) is Located
        ACCELERATES[way](model)
        assert torch.equal(model(x), expected)


def test_a_module_that_does_not_say_where_it_is_keeps_its_class() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    apply_group_offloading(model, "cpu")
    assert type(model) is nn.Sequential
