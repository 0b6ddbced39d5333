"""fp8 products: against a plain emulation of what the kernel is asked to do, and as a layer among others."""

from __future__ import annotations

import copy

import pytest
import torch
from quant.emulation import emulated
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vramkit.casting import narrowed
from vramkit.casting.narrow import row_scales
from vramkit.quant import scaled_linear, sqnr_db
from vramkit.quant.scaled_linear import ScaledLinear, narrow_rows, scaled_mm_problem

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Calls(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def layer(dtype: torch.dtype = torch.bfloat16, *, bias: bool = True, inputs: int = 64, outputs: int = 48) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    made.weight = nn.Parameter(narrowed(made.weight, E4M3, dtype), requires_grad=False)
    return made


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", emulated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 2, 3, 64)])
def test_products_are_those_of_the_narrow_numbers(emulation, dtype, bias, shape):
    stored = layer(dtype, bias=bias)
    x = torch.randn(shape, dtype=dtype)
    out = ScaledLinear.of(stored, "cpu")(x)
    narrow, scale = narrow_rows(x.reshape(-1, 64))
    expected = F.linear(narrow.float() * scale, stored.weight.dequantize().float())
    expected = expected + stored.bias.float() if bias else expected
    assert out.dtype == dtype
    assert out.shape == (*shape[:-1], 48)
    assert sqnr_db(expected.view_as(out), out) > 45  # one rounding to bfloat16
    assert sqnr_db(F.linear(x, stored.weight, stored.bias), out) > 27


def test_the_kernel_of_this_machine_agrees_with_the_emulation(monkeypatch):
    if scaled_mm_problem(torch.device("cpu")) is not None:  # an older torch: the emulation is all there is
        return
    scaled, x = ScaledLinear.of(layer(), "cpu"), torch.randn(7, 64, dtype=torch.bfloat16)
    kernel = scaled(x)
    monkeypatch.setattr(torch, "_scaled_mm", emulated)
    assert sqnr_db(scaled(x), kernel) > 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_activations_keep_their_precision_at_any_size(dtype, size):
    x = (torch.randn(40, 64) * torch.logspace(-2, 0, 40)[:, None] * size).to(dtype)
    stored, scale = narrow_rows(x)
    floor = 31 if dtype != torch.float16 or size > 1e-6 else 0  # fp16 itself has lost the small ones
    assert sqnr_db(x, stored.float() * scale) > floor
    assert torch.equal(scale.log2(), scale.log2().round())


def test_pieces_do_not_change_the_numbers(monkeypatch):
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    whole = narrow_rows(x)
    monkeypatch.setattr(scaled_linear, "_PIECE", 64 * 5)
    pieces = narrow_rows(x)
    assert torch.equal(whole[0].float(), pieces[0].float())
    assert torch.equal(whole[1], pieces[1])


def test_zeros_and_nothing_and_what_is_not_finite():
    scaled = ScaledLinear.of(layer(), "cpu")
    assert torch.equal(scaled(torch.zeros(3, 64).bfloat16()), scaled.bias.expand(3, 48))
    assert scaled(torch.randn(2, 0, 64).bfloat16()).shape == (2, 0, 48)
    x = torch.randn(2, 64).bfloat16()
    x[1, 5] = float("inf")
    out = scaled(x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_scale_is_the_power_of_two_above_the_largest_quotient(dtype, storage):
    most = torch.finfo(storage).max
    peaks = torch.tensor([most, most * 1.01, most / 2, 1.0, 2.0**-20, 0.0, float("inf"), -float("inf"), float("nan")])
    rows = (torch.eye(9) * peaks.nan_to_num(posinf=0, neginf=0)[:, None]).to(dtype)
    rows[6:, 0] = peaks[6:].to(dtype)
    scale = row_scales(rows, storage).squeeze(1)
    quotient = rows.double().abs().amax(1) / most
    assert scale.dtype == torch.float32
    assert scale[6:].isnan().all()
    assert scale[5] == 2.0**-126
    assert (quotient[:5] < scale[:5]).all()
    assert (scale[:5] <= 2 * quotient[:5]).all()
    assert torch.equal(scale[:6].log2(), scale[:6].log2().round())


def test_activations_are_narrowed_by_few_kernels():
    """With few tokens the host is the limit, and each costs it as much as a large one."""
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    with Calls() as calls:
        narrow_rows(x)
    kernels = [name for name in calls.names if not any(word in name for word in ("view", "detach"))]
    assert len(kernels) <= 9, kernels


def test_other_devices_and_wide_weights_multiply_plainly():
    stored, x = layer(torch.float32), torch.randn(3, 64)
    assert torch.equal(ScaledLinear.of(stored, "cuda")(x), stored(x))
    scaled = ScaledLinear.of(stored, "cpu")
    scaled.weight = nn.Parameter(stored.weight.dequantize(), requires_grad=False)
    assert torch.equal(scaled(x), stored(x))


def test_it_shares_the_parameters_and_copies_as_a_layer():
    stored = layer()
    scaled = ScaledLinear.of(stored.eval(), "cpu")
    assert scaled.weight is stored.weight
    assert scaled.bias is stored.bias
    assert not scaled.training
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(copy.deepcopy(scaled)(x), scaled(x))
    assert "fp8 products on cpu" in repr(scaled)


def test_it_compiles_whole_and_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    scaled, x = ScaledLinear.of(layer(), "cpu"), torch.randn(3, 64).bfloat16()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), scaled(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_why_a_device_cannot_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such kernel here\nwith a long trace")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert scaled_mm_problem(torch.device("cpu")) == "no such kernel here"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    problem = scaled_mm_problem(torch.device("cuda"))
    assert problem == "compute capability 8.6, at least 8.9 is needed"
