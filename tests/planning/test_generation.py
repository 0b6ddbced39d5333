"""Language models within a budget: the cache counts at the length that it will have."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from language_models import llama
from live_bytes import LiveBytes
from sweeps import sweep
from torch import nn

from vramkit import PlanInfeasible, fit, plan
from vramkit.errors import ConfigError
from vramkit.memory import GIB, MIB

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def qwen(**options: Any) -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=16, **options)).eval()


MODELS = {
    "llama": lambda: llama(tied=False),
    "qwen3": qwen,
    "qwen3, a window": lambda: qwen(use_sliding_window=True, sliding_window=64, max_window_layers=1),
}
CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}
IDS = torch.arange(3, 35).repeat(2, 1)


def generated(model: Any, new_tokens: int, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        IDS, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **options
    )
    return found


def peak_of(model: nn.Module, new_tokens: int, **options: Any) -> int:
    with LiveBytes([*model.parameters(), *model.buffers()]) as count:
        generated(model, new_tokens, **options)
    return count.peak_bytes


@sweep("cache name", product(CACHES, MODELS), together=1)
def test_the_peak_of_a_generation_contains_its_cache(name: str, cache: str) -> None:
    options = CACHES[cache]
    real = peak_of(MODELS[name](), 200, **options)
    model = MODELS[name]()  # one that has generated keeps its static cache
    found = plan(model, GIB, device="cpu", example=IDS, max_new_tokens=200, **options).phases[0].activation_bytes
    assert real <= found <= real * 1.05 + 40_000  # what is small, and known, is held twice in a rehearsal
    shorter = plan(model, GIB, device="cpu", example=IDS, max_new_tokens=100, **options).phases[0].activation_bytes
    assert found > shorter


def test_a_generation_within_its_budget() -> None:
    model = MODELS["llama"]()
    expected = {tokens: generated(model, tokens) for tokens in (50, 400)}
    floor = plan(model, GIB, device="cpu", example=IDS, max_new_tokens=400).floor_bytes
    with fit(model, floor + 100_000, device="cpu", example=IDS, max_new_tokens=50) as fitted:
        before = fitted.plan
        assert torch.equal(generated(model, 50), expected[50])
        assert fitted.plan is before
        assert torch.equal(generated(model, 400), expected[400])  # longer than was said: planned for before it begins
        assert fitted.plan.call["LlamaForCausalLM.generate.length"] == 432
        assert fitted.stats()["LlamaForCausalLM"].loads > 0
        with pytest.raises(PlanInfeasible):
            generated(model, 4000)
        assert torch.equal(generated(model, 50), expected[50])
    assert torch.equal(generated(model, 50), expected[50])


def test_what_was_not_said_is_planned_for_when_it_comes() -> None:
    model = MODELS["llama"]()
    expected = generated(model, 50)
    with fit(model, 4 * MIB, device="cpu") as fitted:
        assert torch.equal(generated(model, 50), expected)
        assert fitted.plan.call["LlamaForCausalLM.generate.length"] == 82


def test_the_first_token_of_a_decoder_may_be_said_by_the_call_alone() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=300, eos_token_id=None
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    expected = generated(model, 20, decoder_start_token_id=7)
    for example in (None, IDS):
        said = {} if example is None else {"example": example, "max_new_tokens": 20}
        with fit(model, 4 * MIB, device="cpu", **said) as fitted:
            assert torch.equal(generated(model, 20, decoder_start_token_id=7), expected)
            assert not any("cannot be rehearsed" in note for note in fitted.plan.notes)
    assert model.generation_config.decoder_start_token_id is None


def test_lengths_alone_are_enough() -> None:
    model = MODELS["llama"]()
    found = plan(model, GIB, device="cpu", batch=2, max_length=232, max_new_tokens=200)
    same = plan(model, GIB, device="cpu", example=IDS, max_new_tokens=200)
    assert found.phases == same.phases
    assert plan(model, GIB, device="cpu", max_length=64).call["LlamaForCausalLM.generate.prompt"] == 63


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 2}, "no length of what is generated"),
        ({"max_length": 0}, "max_length=0; expected a whole number"),
        ({"max_length": 8, "num_beams": 2}, "num_beams= is no argument of a generation that is planned"),
        ({"max_length": 8, "example": torch.ones(3)}, "expected token ids"),
    ],
)
def test_lengths_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    model = MODELS["llama"]()
    with pytest.raises(ConfigError, match=said):
        fit(model, GIB, device="cpu", **options)
