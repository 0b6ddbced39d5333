"""Encoded texts that are kept: the same bits, fewer calls of the encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import Stock

from vramkit import Pipeline
from vramkit.pipelines.calling.texts import TextCache, remember_texts, remembered

CLIP = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "output_type": "pt"}


@contextmanager
def counted(*encoders: torch.nn.Module) -> Iterator[list[str]]:
    calls: list[str] = []
    hooks = [
        each.register_forward_pre_hook(lambda *_, name=str(at): calls.append(name)) for at, each in enumerate(encoders)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["Wan2.1", "LTX-Video", "HunyuanVideo", "CogVideoX"])
def test_clips_are_the_same_and_encoders_rest(family: str, stock: Stock) -> None:
    pipeline = Pipeline.from_pretrained(stock.folder(family))
    pipeline.set_progress_bar_config(disable=True)
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]

    def clip(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, **CLIP, generator=generator).frames[0]

    with counted(*encoders) as calls:
        plain = [clip("a cat"), clip("a dog")]
        alone = len(calls)
    for each in encoders:
        remember_texts(each, 2**24)
    with counted(*encoders) as calls:
        kept = [clip("a cat"), clip("a dog"), clip("a cat")]
    assert torch.equal(kept[0], plain[0])
    assert torch.equal(kept[1], plain[1])
    assert torch.equal(kept[2], plain[0])
    texts = alone // 2 // len(encoders)  # of a call: the prompt, and with guidance the negative one
    assert len(calls) == alone - (texts - 1) * len(encoders)


def test_what_is_kept_cannot_be_written_to() -> None:
    cache = TextCache(64)
    tensor = torch.ones(4)
    cache.put("a", (tensor,))
    tensor.zero_()
    for _ in range(2):
        (found,) = cache.get("a") or ()
        assert found.tolist() == [1] * 4
        found.zero_()


def test_the_longest_unused_goes_first() -> None:
    cache = TextCache(64)
    for key in "abcd":
        cache.put(key, (torch.zeros(4),))  # 16 bytes
    assert cache.get("a") is not None
    cache.put("e", (torch.zeros(8),))
    assert [key for key in "abcde" if cache.get(key) is not None] == ["a", "d", "e"]
    assert cache.used_bytes == 64
    cache.put("f", (torch.zeros(17),))
    assert cache.get("f") is None
    assert cache.used_bytes == 64


def test_other_options_are_other_texts_and_twins_keep_nothing() -> None:
    encoder = torch.nn.Linear(1, 1)
    calls: list[object] = []

    @remembered
    def encode(prompts, *, tokenizer, text_encoder, length):
        calls.append(length)
        return torch.full((1,), length)

    def encoded(length: int, text_encoder: torch.nn.Module = encoder) -> float:
        return encode(["a"], tokenizer=None, text_encoder=text_encoder, length=length).item()

    assert [encoded(2), encoded(2)] == [2, 2]
    assert len(calls) == 2  # nothing is kept unless that is asked for
    cache = remember_texts(encoder, 1024)
    assert remember_texts(encoder, 1024) is cache
    assert [encoded(2), encoded(2), encoded(3), encoded(3)] == [2, 2, 3, 3]
    assert len(calls) == 4
    assert cache.hits == 2
    twin = copy.deepcopy(encoder)
    assert [encoded(2, twin), encoded(2, twin)] == [2, 2]
    assert len(calls) == 6
    assert encoder.state_dict().keys() == {"weight", "bias"}
