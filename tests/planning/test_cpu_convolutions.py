"""What is planned for convolutions on the CPU is what torch's allocator gives for them, kernels' own work included."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from allocated_bytes import AllocatedBytes, is_planned_well
from torch.nn import functional as F

from vramkit.pipelines.wan.vae import AutoencoderKLWan
from vramkit.pipelines.wan.vae_config import AutoencoderKLWanConfig
from vramkit.planning.ledger import Ledger
from vramkit.planning.rehearsal import rehearse

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: its input [B, C, ...], its weight, its options, and whether its channels lie innermost."""

    given: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_innermost: bool = False

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        x, weight = torch.randn(self.given).to(dtype), torch.randn(self.weight).to(dtype)
        channels = self.weight[1] * self.options.get("groups", 1) if self.is_transposed else self.weight[0]
        x = x.contiguous(memory_format=LAYOUTS[x.ndim]) if self.is_innermost else x
        return [x, weight, torch.randn(channels).to(dtype)]

    @property
    def is_transposed(self) -> bool:
        return "output_padding" in self.options

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        name = "conv_transpose" if self.is_transposed else "conv"
        result: torch.Tensor = getattr(F, f"{name}{len(self.given) - 2}d")(*tensors, **self.options)
        return result


CASES = {
    "clip": Case((1, 32, 6, 176, 32), (32, 32, 3, 3, 3), {"padding": (0, 1, 1)}),
    "clip of few rows": Case((1, 32, 6, 46, 96), (32, 32, 3, 3, 3), {"padding": (0, 0, 1)}),
    "clip with channels innermost": Case((1, 32, 6, 176, 32), (32, 32, 3, 3, 3), is_innermost=True),
    "few rows with channels innermost": Case((1, 32, 6, 46, 96), (32, 32, 3, 3, 3), is_innermost=True),
    "clip to three channels": Case((1, 32, 6, 176, 32), (3, 32, 3, 3, 3), {"padding": (0, 1, 1)}),
    "clip of three channels": Case((1, 3, 20, 480, 32), (32, 3, 3, 3, 3), {"padding": (0, 1, 1)}),
    "clip of channels that fill no blocks": Case((1, 20, 20, 64, 64), (40, 20, 3, 3, 3)),
    "positions of a clip": Case((1, 64, 8, 88, 48), (96, 64, 1, 1, 1)),
    "frames of a position": Case((1, 64, 8, 88, 48), (96, 64, 3, 1, 1)),
    "pictures": Case((4, 64, 88, 48), (32, 64, 3, 3), {"padding": 1}),
    "half as large": Case((4, 64, 88, 48), (32, 64, 3, 3), {"padding": 1, "stride": 2}),
    "pictures with channels innermost": Case((4, 64, 88, 48), (32, 64, 3, 3), is_innermost=True),
    "channel by channel": Case((4, 64, 88, 48), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    "groups of channels": Case((4, 64, 88, 48), (64, 16, 3, 3), {"padding": 1, "groups": 4}),
    "patches": Case((1, 3, 512, 512), (96, 3, 16, 16), {"stride": 16}),
    "with gaps": Case((1, 16, 20, 44, 48), (32, 16, 3, 3, 3), {"dilation": 2}),
    "sound": Case((1, 128, 20000), (128, 128, 7), {"padding": 3}),
    "sound by position": Case((1, 64, 20000), (96, 64, 1)),
    "larger pictures": Case((1, 64, 88, 48), (64, 32, 4, 4), {"stride": 2, "output_padding": 0}),
    "longer sound": Case((1, 64, 20000), (64, 64, 8), {"stride": 4, "padding": 2, "output_padding": 0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_convolution_takes_what_its_rehearsal_counts(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = case.tensors(dtype)
    with torch.no_grad():
        case(*tensors)
        with AllocatedBytes() as taken:
            case(*tensors)
        ledger = Ledger({}, {})
        bare = [tensor.to("meta") for tensor in tensors]
        with ledger:
            case(*bare)
    given_bytes = sum(tensor.nbytes for tensor in tensors)
    assert is_planned_well(given_bytes + ledger.peak_bytes, given_bytes + taken.peak_bytes, least=0.98, most=2)
    assert is_planned_well(ledger.peak_bytes - given_bytes // 100, taken.peak_bytes, least=0, most=1.1)


@pytest.mark.parametrize("height", [6, 20])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_decode_in_stripes_takes_what_its_rehearsal_counts(count: int, height: int) -> None:
    vae = AutoencoderKLWan(AutoencoderKLWanConfig(base_dim=16, num_res_blocks=1)).eval()
    if count > 1:
        vae.enable_striping(count)
    z = torch.randn(1, 16, 2, height, 8)
    with torch.no_grad(), AllocatedBytes() as taken:
        vae.decode(z)
    twin, bare = vae.to("meta"), z.to("meta")
    told = rehearse({"vae": twin}, {"vae": ("decode",)}, lambda: twin.decode(bare), device=torch.device("cpu"))
    assert is_planned_well(told.peak_bytes, taken.peak_bytes, least=1, most=1.05)
