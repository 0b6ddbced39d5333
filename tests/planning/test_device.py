"""What kernels of a device make beside their results, of tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vramkit import plan
from vramkit.planning import device as planned
from vramkit.planning.device import Device
from vramkit.planning.ledger import Ledger

ROWS, WIDTH = 4096, 256
WIDE = ROWS * WIDTH * 4  # bytes of the numbers in fp32


def peak(kind: str, weight_dtype: torch.dtype, norm: Any) -> int:
    """The bytes beside an input in bf16 that a norm needs on a device."""
    ledger = Ledger({}, {}, on_accelerator=kind != "cpu")
    with torch.no_grad(), ledger, Device(torch.device(kind), ledger):
        x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta")
        before = ledger.live_bytes
        y = norm(x, torch.ones(WIDTH, dtype=weight_dtype, device="meta"))
        assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    return ledger.peak_bytes - before


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, weight: F.rms_norm(x, (WIDTH,), weight, 1e-6),
        lambda x, weight: torch.rms_norm(x, (WIDTH,), weight, 1e-6),
        lambda x, weight: F.rms_norm(x, normalized_shape=[WIDTH], weight=weight),
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # which is torch's way to say that it has no kernel for it
def test_a_norm_by_the_root_mean_square_is_one_kernel_on_cuda(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, small = torch.bfloat16, WIDTH * 4 + ROWS * 4
    assert WIDE // 2 + ROWS * 4 <= peak("cuda", narrow, norm) <= WIDE // 2 + small
    # In steps, of which some are in fp32: on a CPU, with a weight of another dtype, and in a torch without the kernel.
    assert peak("cpu", narrow, norm) >= 2 * WIDE
    assert peak("cuda", torch.float32, norm) >= 2 * WIDE
    monkeypatch.setattr(planned, "_is_fused", lambda: False)
    assert peak("cuda", narrow, norm) >= 2 * WIDE


def test_values_of_norms_are_made_where_there_are_some() -> None:
    x, layer = torch.randn(8, 16), nn.RMSNorm(16)
    ledger = Ledger({}, {}, on_accelerator=True)
    expected = layer(x)
    with torch.no_grad(), ledger, Device(torch.device("cuda"), ledger):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_attention_inside_layers_of_torch_keeps_no_scores(kind: str) -> None:
    tokens, width = 512, 256
    make = nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer
    layer, x = make(width, 8, width, batch_first=True).eval(), torch.randn(1, tokens, width)
    given = (x,) if kind == "encoder" else (x, x[:, 1:])
    activations = plan(layer, "1GiB", device="cpu", example=given).phases[0].activation_bytes
    assert activations < 8 * x.nbytes  # the scores of all heads would be sixteen of them
    scored = nn.MultiheadAttention(width, 8, batch_first=True).eval()
    activations = plan(scored, "1GiB", device="cpu", example=(x, x, x)).phases[0].activation_bytes
    assert activations > 8 * tokens * tokens * 4  # which somebody asks for here
