"""Fused experts: stacks of matrices that are quantized one by one, picked as they are stored, and multiplied in any way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.configs import ALIKE_COMPILED, CONFIGS
from sweeps import sweep
from torch import nn
from torch.nn import functional as F

from vramkit.casting import NarrowTensor, apply_layerwise_casting
from vramkit.errors import UnsupportedTensorError
from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading
from vramkit.quant import dequantize, load_quantized, quantize, report, save_quantized, sqnr_db
from vramkit.wrapper import WrapperTensor

LEAST_DB = {"nf4": 20, "nf4_double": 20, "fp4": 17, "int8": 40, "int8_no_outliers": 40}
LEAST_DB |= {"quanto_int8": 40, "quanto_int4": 20, "quanto_int2": 6, "quanto_float8": 31, "fp8": 31}
COUNT = 4
MIXTURES = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3"]
MULTIPLIED = ["eager", "grouped_mm", "batched_mm"]


class Experts(nn.Module):
    """[n, out, in] and [n, in, out], as the fused experts of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(COUNT, 96, 64) * 0.1)
        self.down = nn.Parameter(torch.randn(COUNT, 96, 64) * 0.1)
        self.shift = nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.shift.to(x.dtype).expand_as(x).clone()
        for expert in range(COUNT):
            rows = x[expert::COUNT]
            out[expert::COUNT] += F.linear(rows, self.up[expert]) @ self.down[expert]
        return out


USES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "loop": lambda m, x: sum(F.linear(x, m.up[i]) @ m.down[i] for i in range(COUNT)),
    "iterate": lambda m, x: sum(F.linear(x, up) for up in m.up),
    "last": lambda m, x: x @ m.up[-1].t(),
    "tensor": lambda m, x: F.linear(x, m.up[torch.tensor(2)]),
    "some": lambda m, x: torch.bmm(m.up[torch.tensor([2, 0, 2])], x.t().expand(3, -1, -1)),
    "index_select": lambda m, x: m.up.index_select(0, torch.tensor([1, 3])) @ x.t(),
    "mask": lambda m, x: m.up[torch.tensor([True, False, True, False])] @ x.t(),
    "slice": lambda m, x: m.up[1:3] @ x.t(),
    "narrow": lambda m, x: m.up.narrow(0, 1, 2) @ x.t(),
    "chunk": lambda m, x: m.up.chunk(2)[1] @ x.t(),
    "split": lambda m, x: m.up.split([1, 3])[1] @ x.t(),
    "rows": lambda m, x: m.up[:, :16] @ x.t(),
    "rows of one": lambda m, x: m.up[1, :16] @ x.t(),
    "pairs": lambda m, x: m.up[torch.tensor([1, 2]), torch.tensor([3, 4])] @ x.t(),
    "bmm": lambda m, x: torch.bmm(x.expand(COUNT, -1, -1), m.up.transpose(1, 2)),
    "einsum": lambda m, x: torch.einsum("tc,erc->etr", x, m.up),
}
PICKING = (
    "loop",
    "iterate",
    "last",
    "tensor",
    "some",
    "index_select",
    "slice",
    "narrow",
    "chunk",
    "split",
    "rows of one",
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The original, a quantized copy, and a plain one with the values of that."""
    original = Experts().to(dtype).requires_grad_(False)
    own, plain = copy.deepcopy(original), copy.deepcopy(original)
    done = quantize(own, CONFIGS[kind])
    assert done.quantized == ("up", "down")
    for key in ("up", "down"):
        setattr(plain, key, nn.Parameter(getattr(own, key).dequantize(), requires_grad=False))
    return original, own, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_near_the_exact_ones_and_small(kind: str, dtype: torch.dtype) -> None:
    original, own, plain = quantized(kind, dtype)
    for key in ("up", "down"):
        exact, stored = getattr(original, key), getattr(own, key)
        assert isinstance(stored, nn.Parameter)
        assert (stored.shape, stored.dtype) == (exact.shape, dtype)
        assert sqnr_db(exact, stored) >= LEAST_DB[kind]
    assert module_bytes(own) < 0.62 * module_bytes(original)
    x = torch.randn(8, 64, dtype=dtype)
    assert sqnr_db(plain(x), own(x)) >= (30 if "int8" in kind else 38)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_expert_is_what_it_would_be_alone(kind: str) -> None:
    original, own, _ = quantized(kind)
    x = torch.randn(3, 64)
    for i in range(COUNT):
        alone = nn.Sequential(nn.Linear(64, 96, bias=False)).requires_grad_(False)
        alone[0].weight = nn.Parameter(original.up[i].clone(), requires_grad=False)
        quantize(alone, CONFIGS[kind])
        assert type(own.up[i]) is type(alone[0].weight)
        assert torch.equal(own.up[i].dequantize(), alone[0].weight.dequantize())
        assert torch.equal(own.up.dequantize()[i], alone[0].weight.dequantize())
        assert torch.equal(F.linear(x, own.up[i]), alone(x))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=pytest.mark.thorough if way == "compiled" and kind in ALIKE_COMPILED else ())
        for kind in CONFIGS
        for way in ("eager", "inference", "compiled")
    ],
)
def test_every_way_of_use_gives_the_values(kind: str, way: str) -> None:
    _, own, plain = quantized(kind)
    x = torch.randn(8, 64)
    for name, use in USES.items():
        if way == "compiled" and name == "mask":  # the number of experts depends on data
            continue
        found = torch.compile(use, fullgraph=True, backend="aot_eager") if way == "compiled" else use
        with torch.inference_mode(way == "inference"):
            out = found(own, x)
        products = name in ("loop", "iterate", "tensor")
        assert sqnr_db(use(plain, x), out) >= (30 if products and "int8" in kind else 100), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_not_picked_stays_narrow(kind: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, own, _ = quantized(kind)
    widened: list[torch.Size] = []
    kind_of_tensor = type(own.up)
    original = kind_of_tensor.dequantize

    def watched(self: Any) -> torch.Tensor:
        widened.append(self.shape)
        wide: torch.Tensor = original(self)
        return wide

    monkeypatch.setattr(kind_of_tensor, "dequantize", watched)
    x = torch.randn(8, 64)
    with mode():
        for name in PICKING:
            widened.clear()
            USES[name](own, x)
            assert all(len(shape) == 2 or shape[0] < COUNT for shape in widened), name


def test_a_picked_expert_is_a_view_that_can_be_written_where_that_is_possible() -> None:
    _, own, _ = quantized("fp8")
    new = torch.randn(96, 64)
    others = own.up.dequantize()[1:]
    own.up[0].copy_(new)
    assert sqnr_db(new, own.up[0].dequantize()) >= 30.5
    assert torch.equal(own.up.dequantize()[1:], others)
    with pytest.raises(UnsupportedTensorError, match="would be lost"):
        own.up[0].add_(1)
    _, own, _ = quantized("nf4")
    with pytest.raises(UnsupportedTensorError, match="would be lost"):
        own.up[0].copy_(new)


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_loaded_reported_and_dequantized(kind: str, tmp_path: Path) -> None:
    original, own, plain = quantized(kind)
    x = torch.randn(8, 64)
    expected = own(x)
    save_quantized(own, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    with torch.device("meta"):
        again = Experts()
    load_quantized(again, tmp_path / "model.safetensors", saved)
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(again)(x), expected)
    measured = report(own, x, reference=original)
    assert measured == report(original, x, config=CONFIGS[kind])
    assert measured.layers[0].weight_db >= LEAST_DB[kind]
    dequantize(own)
    assert torch.equal(own.up, plain.up)
    assert type(own.up) is nn.Parameter


def language_models() -> dict[str, Callable[[], nn.Module]]:
    import transformers as t

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
    groups = {
        "n_routed_experts": 8,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    }
    qwen = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    return {
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**sizes, **qwen)),
        "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**sizes, num_local_experts=8, head_dim=16)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_local_experts=8)),
        "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(**sizes, **latent, **groups, num_experts_per_tok=2)
        ),
    }


@sweep("name kind experts", product(MIXTURES, ["fp8", "int8", "nf4", "quanto_int8", "cast"], MULTIPLIED))
def test_mixtures_of_experts_of_transformers(name: str, kind: str, experts: str) -> None:
    model = language_models()[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.06)
    model.config._experts_implementation = experts
    ids, own = torch.randint(0, 64, (2, 12)), copy.deepcopy(model)
    if kind == "cast":
        covered = apply_layerwise_casting(own, torch.float8_e4m3fn, torch.float32).coverage
    else:
        covered = quantize(own, CONFIGS[kind]).coverage
    assert covered.share > 0.9
    assert any("experts" in name for name in covered.covered)
    for key, exact in model.named_parameters():  # routes differ where logits do, so the plain model has the same values
        stored = own.get_parameter(key)
        if isinstance(stored, WrapperTensor):
            exact.copy_(stored.dequantize())
    resident = own(ids, use_cache=False).logits
    exactly = kind in ("fp8", "cast", "nf4")
    assert sqnr_db(model(ids, use_cache=False).logits, resident) > (90 if exactly else 10)
    for level in ("block_level", "leaf_level"):
        offload = apply_group_offloading(own, "cpu", offload_type=level)
        for _ in range(2):
            assert torch.equal(own(ids, use_cache=False).logits, resident)
        offload.remove()


@pytest.mark.parametrize("scaled", [True, False])
def test_casting_and_taking_it_back(scaled: bool) -> None:
    original = Experts().requires_grad_(False)
    own = copy.deepcopy(original)
    casting = apply_layerwise_casting(own, torch.float8_e4m3fn, torch.float32, scaled=scaled)
    assert isinstance(own.up, NarrowTensor)
    assert own.up.scale is None or own.up.scale.shape == (COUNT, 96, 1)
    assert sqnr_db(original.up, own.up) >= (31 if scaled else 25)
    out = own(torch.ones(8, 64))
    casting.remove()
    assert type(own.up) is nn.Parameter
    assert torch.equal(own(torch.ones(8, 64)), out)


def test_what_is_no_stack_of_matrices_is_left() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 64, 64))
            self.kernel = nn.Parameter(torch.randn(64, 64, 3))
            self.bilinear = nn.Bilinear(16, 16, 16)
            self.conv = nn.Conv1d(16, 16, 31)
            self.lin = nn.Linear(256, 256)

    assert quantize(Odd(), CONFIGS["fp8"]).quantized == ("lin",)


def test_names_of_parameters_are_skipped_too() -> None:
    assert quantize(Experts(), CONFIGS["fp8"], skip_modules=["up$"]).quantized == ("down",)
