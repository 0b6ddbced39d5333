"""What kernels take beside their results, as a rehearsal counts it and as the device takes it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from vramkit.planning.device import Device
from vramkit.planning.ledger import Ledger

pytestmark = pytest.mark.gpu

KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], torch.ones_like(x[0, 0]), 1e-6),
    "rms_norm_of_a_view": lambda x: F.rms_norm(x.view(2, -1, 16, 64), (64,), torch.ones_like(x[0, 0, :64]), 1e-6),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], None, None, 1e-6),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(2, -1, 16, 64).transpose(1, 2)] * 3),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_what_its_rehearsal_counts(name: str) -> None:
    kernel, shape = KERNELS[name], (2, 4096, 1024)
    with torch.no_grad():
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        kernel(x)
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kernel(x)
        taken = torch.cuda.max_memory_allocated() - before
        ledger = Ledger({}, {}, on_accelerator=True)
        with ledger, Device(torch.device("cuda"), ledger):
            twin = torch.empty(shape, device="meta", dtype=torch.bfloat16)
            before = ledger.live_bytes
            kernel(twin)
    counted = ledger.peak_bytes - before
    assert 0.95 * counted <= taken <= counted + 2**16  # not every kernel of attention keeps a number per row
