"""A device that runs out of memory in the decode: once more in smaller pieces, and the latents are never lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autoencoders import build_pair
from families import FAMILIES, frames, normal, seeded

import vramkit
from vramkit.errors import ConfigError
from vramkit.pipelines.calling.decoding import DecodeMemoryError, decode_in_memory


@pytest.fixture(params=["Wan2.1", "HunyuanVideo"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def settings(vae: Any) -> tuple[Any, ...]:
    return vae.use_striping, vae.stripes, vae.use_tiling, vae.tiling


def failing(vae: Any, monkeypatch: pytest.MonkeyPatch, *, until: Callable[[Any], bool]) -> list[tuple[Any, ...]]:
    """A decode for which there is memory only when `until` says so; returns the settings of each try."""
    tries, decode = [], type(vae).decode

    def try_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        tries.append(settings(self))
        if not until(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(vae), "decode", try_to)
    return tries


def smaller(vae: Any) -> bool:
    return vae.use_striping and (vae.stripes or 1) >= 4 if vae.has_stripes else vae.use_tiling


def test_a_call_is_finished_in_smaller_pieces_with_one_warning(
    family: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = FAMILIES[family].clip
    expected, before = frames(pipeline, **clip), settings(pipeline.vae)
    tries = failing(pipeline.vae, monkeypatch, until=smaller)
    with pytest.warns(UserWarning, match="out of memory in the decode.*(enable_striping|enable_tiling)") as caught:
        result = frames(pipeline, **clip)
    assert len(caught) == 1
    assert len(tries) == 2
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected))  # a picture of few rows is one piece
    assert settings(pipeline.vae) == before


def test_latents_are_in_the_error_and_can_be_decoded_later(
    family: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = FAMILIES[family].clip
    before = settings(pipeline.vae)
    latents = frames(pipeline, **clip, output_type="latent")
    with monkeypatch.context() as patched:
        failing(pipeline.vae, patched, until=lambda vae: False)
        with pytest.raises(DecodeMemoryError, match=r"not lost.*decode_latents") as caught:
            frames(pipeline, **clip)
    assert isinstance(caught.value, torch.OutOfMemoryError)  # as whoever waits for it knows it
    assert torch.equal(caught.value.latents, latents)
    assert settings(pipeline.vae) == before
    assert torch.equal(pipeline.decode_latents(caught.value.latents), pipeline.decode_latents(latents))


def test_a_failed_try_keeps_no_memory(pipeline: Any, family: str) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def decode() -> torch.Tensor:
        assert all(each() is None for each in held)
        large = torch.empty(4)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no memory")

    gc.disable()
    try:
        with pytest.raises(DecodeMemoryError) as caught:
            decode_in_memory(decode, torch.zeros(1, 4, 1, 8, 8), vae=pipeline.vae, generator=None)
        assert all(each() is None for each in held)
        assert caught.value.__context__ is None
    finally:
        gc.enable()


@pytest.mark.parametrize("is_tiled", [False, True])
def test_what_is_offloaded_lets_go_and_decodes_once_more_in_the_same_way(*, is_tiled: bool) -> None:
    vae: Any = build_pair("Wan2.1")[0].eval()
    if is_tiled:
        vae.enable_tiling()
    latents = normal(1, 4, 1, 8, 8)
    with torch.inference_mode():
        expected, before, failed = vae.decode(latents).sample, settings(vae), []
        offload = vramkit.apply_group_offloading(vae, "cpu", offload_type="leaf_level", resident="64KiB")

        def fail_once(*_: Any) -> None:
            if not failed:
                failed.append(offload.stats().resident_bytes)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

        vae.decoder.norm_out.register_forward_pre_hook(fail_once)
        with pytest.warns(RuntimeWarning, match="Let go of"):
            clip = decode_in_memory(lambda: vae.decode(latents).sample, latents, vae=vae, generator=None)
        assert offload.stats().resident_bytes < failed[0]
    assert torch.equal(clip, expected)
    assert settings(vae) == before


def test_random_numbers_are_those_of_the_first_try() -> None:
    vae, generator = build_pair("Wan2.1")[0], seeded(3)
    drawn = []

    def decode() -> torch.Tensor:
        drawn.append((torch.rand(3, generator=generator), torch.rand(3)))
        if len(drawn) < 3:
            raise torch.OutOfMemoryError("no memory")
        return drawn[-1][0]

    with pytest.warns(UserWarning, match="8 stripes"):
        decode_in_memory(decode, torch.zeros(1, 4, 1, 8, 8), vae=vae, generator=[generator])
    assert all(torch.equal(a, b) for again in drawn[1:] for a, b in zip(again, drawn[0], strict=True))


@pytest.mark.parametrize(
    ("enable", "calls"),
    [
        (lambda vae: None, [4, 8, 16]),
        (lambda vae: vae.enable_striping(4), [8, 16]),
        (lambda vae: vae.enable_striping(), [16]),
        (lambda vae: vae.enable_tiling(), []),
    ],
)
def test_smaller_ways_begin_behind_what_is_done_already(enable: Callable[[Any], None], calls: list[int]) -> None:
    vae, _ = build_pair("Wan2.1")
    enable(vae)
    assert [way.call for way in vae.smaller_ways(60)] == [f"vae.enable_striping({count})" for count in calls]
    assert [way.settings["stripes"] for way in vae.smaller_ways(7)] == [count for count in calls if count <= 7]


def test_other_errors_are_not_tried_again(pipeline: Any, family: str) -> None:
    calls = []

    def decode() -> torch.Tensor:
        calls.append(1)
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        decode_in_memory(decode, normal(1, 4, 1, 8, 8), vae=pipeline.vae, generator=None)
    assert len(calls) == 1


def test_an_autoencoder_of_others_is_asked_once() -> None:
    with pytest.raises(vramkit.DecodeMemoryError) as caught:
        decode_in_memory(_out_of_memory, torch.ones(1, 4, 1, 8, 8), vae=object(), generator=None)
    assert caught.value.latents.sum() == 256


def _out_of_memory() -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory")
