"""Clips with their channels innermost, as CUDA computes them: the same numbers, no copies and no bytes more."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from autoencoders import AUTOENCODERS, decoded, encoded
from families import normal, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import vramkit
from vramkit.pipelines.ltx.vae_layers import depth_to_space, patchify, space_to_depth, unpatchify
from vramkit.pipelines.networks import layout
from vramkit.planning.device import Device
from vramkit.planning.ledger import Ledger

_CONVOLUTION = torch.ops.aten.convolution.default
_COPIES = {getattr(torch.ops.aten, name) for name in ("clone", "_to_copy", "cat", "copy_")}


class Kernels(TorchDispatchMode):
    """Lays results of convolutions as cuDNN does, and notes how their inputs lie and how many numbers others copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COPIES:
            self.copied += result.numel()
        if func is _CONVOLUTION:
            self.inputs.append((args[0].to("meta"), args[1].to("meta")))
            if is_innermost(args[0]):
                result = result.contiguous(memory_format=format_of(result))
        return result


def format_of(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def is_innermost(x: torch.Tensor) -> bool:
    """Whether torch would take `x` for one with its channels innermost: what it makes like it lies so."""
    strides = [x.stride(dim) for dim in (1, *reversed(range(2, x.ndim)), 0)]
    return strides == sorted(strides) and x.stride(1) == 1 and x.stride(-1) == x.shape[1]


def build(name: str, way: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """An autoencoder of random weights, a clip and latents of several parts."""
    torch.manual_seed(0)
    known = AUTOENCODERS[name]
    vae = getattr(vramkit, known.kind).from_config(known.tiny | ({"num_res_blocks": 1} if "Wan" in name else {})).eval()
    ratio = 32 if "LTX" in name else 16 if "5B" in name else 8
    height, width = (8, 2) if way == "stripes" and ratio == 8 else (3, 2)
    if way == "stripes":
        vae.enable_striping(2)
    elif name == "CogVideoX" and way == "tiles":
        vae.enable_tiling(2 * ratio, 2 * ratio, 1 / 2, 1 / 2)
    elif way == "tiles":
        sides = dict.fromkeys(("min_height", "min_width", "stride_height", "stride_width"), 2 * ratio)
        vae.enable_tiling(**{f"tile_sample_{name}": size for name, size in sides.items()})
    frames, latents = (5, 2) if "Wan" in name else (9, 2 if "LTX" in name else 3)
    return vae, normal(1, 3, frames, height * ratio, width * ratio), normal(1, 4, latents, height, width)


WAYS = [
    ("Wan2.1", "stripes"),
    ("Wan2.2 5B", "whole"),
    ("LTX-Video 0.9.1", "stripes"),
    ("CogVideoX", "whole"),
    *(
        pytest.param(name, "tiles", marks=pytest.mark.thorough)
        for name in ("Wan2.1", "Wan2.2 5B", "LTX-Video 0.9.0", "LTX-Video 0.9.5", "CogVideoX")
    ),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_every_convolution_reads_what_it_takes_without_a_copy(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, x, z = build(name, way)
    for call in (partial(encoded, vae, x), partial(decoded, vae, z)):
        monkeypatch.setattr(layout, "channels_innermost", lambda x: False)
        with Kernels() as before:
            expected = call()
        monkeypatch.setattr(layout, "channels_innermost", lambda x: True)
        with Kernels() as after:
            result = call()
        assert relative_error(result, expected) <= 1e-5
        assert result.stride() == expected.stride()
        assert all(is_innermost(read) for read, _ in after.inputs)
        strided = [weight for read, weight in after.inputs if not read.is_contiguous(memory_format=format_of(read))]
        assert all(
            weight.shape[2:].numel() == 1 for weight in strided
        )  # of rows, shortcuts alone read some as they are
        assert after.copied <= 1.02 * before.copied


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_rehearsals_for_cuda_lay_clips_as_cuda_does_and_count_no_more_bytes(name: str, way: str) -> None:
    vae, x, z = build(name, way)
    vae, x, z = (each.to(device="meta", dtype=torch.bfloat16) for each in (vae, x, z))
    owners = {p.untyped_storage()._cdata: "vae" for p in (*vae.parameters(), *vae.buffers())}
    weight_bytes = max(p.nbytes for p in vae.parameters())
    for call in (partial(encoded, vae, x), partial(decoded, vae, z)):
        peaks = []
        for device in ("cpu", "cuda"):
            ledger = Ledger(owners, {}, on_accelerator=device == "cuda")
            with torch.no_grad(), ledger, Device(torch.device(device), ledger), Kernels() as kernels:
                call()
            clips = [read for read, _ in kernels.inputs if read.ndim == 5]
            assert all(is_innermost(clip) == (device == "cuda") for clip in clips)
            peaks.append(ledger.peak_bytes)
        assert peaks[1] <= 1.02 * peaks[0] + 2 * weight_bytes


@pytest.mark.parametrize("innermost", [False, True])
def test_positions_and_channels_change_places_in_either_layout(
    innermost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "channels_innermost", lambda x: innermost)
    x = layout.laid_out(normal(2, 16, 2, 3, 4))
    rows = torch.einsum("bcxyzfhw->bcfxhywz", x.reshape(2, 2, 2, 2, 2, 2, 3, 4)).reshape(2, 2, 4, 6, 8)
    assert torch.equal(depth_to_space(x, (2, 2, 2)), rows)
    assert torch.equal(space_to_depth(rows, (2, 2, 2)), x)
    columns_first = torch.einsum("bczyfhw->bcfhywz", x.reshape(2, 4, 2, 2, 2, 3, 4)).reshape(2, 4, 2, 6, 8)
    assert torch.equal(unpatchify(x, 2), columns_first)
    assert torch.equal(patchify(columns_first, 2), x)
    assert all(is_innermost(y) == innermost for y in (depth_to_space(x, (2, 2, 2)), patchify(columns_first, 2)))


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 3), (2, 3)])
def test_pictures_and_clips_are_views_that_keep_their_layout(batch: int, frames: int) -> None:
    x = normal(batch, 4, frames, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    images = layout.pictures(x)
    assert torch.equal(images, x.transpose(1, 2).flatten(0, 1))
    assert is_innermost(images)
    clip = layout.clip_of(images, batch)
    assert torch.equal(clip, x)
    assert is_innermost(clip)
    assert clip.data_ptr() == images.data_ptr() == x.data_ptr()


def test_the_device_says_how_clips_lie_and_doubles_lie_as_ever() -> None:
    ledger = Ledger({}, {})
    for device, dtype, is_so in (
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float64, False),
        ("cpu", torch.float32, False),
    ):
        with ledger, Device(torch.device(device), ledger):
            x = torch.empty(1, 8, 4, 128, 128, dtype=dtype, device="meta")
            assert layout.channels_innermost(x) is is_so
            assert is_innermost(layout.new_frames(x, *x.shape)) is is_so
            assert is_innermost(layout.laid_out(x)) is is_so
