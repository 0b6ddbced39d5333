"""Models of transformers and diffusers, loaded in every ordinary way: the bytes of a resident run, and files stay files.

At real widths on a CUDA device, and tiny on the CPU tier.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vramkit.offload import apply_group_offloading, load_mapped, parameters_on_meta
from vramkit.offload.pinning import Pins

transformers = pytest.importorskip("transformers")

DTYPE = torch.bfloat16
LEVELS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "leaf": {"offload_type": "leaf_level"},
    "model": {"offload_type": "model_level"},
}


def layers(is_wide: bool) -> int:
    return 2 if is_wide else 3  # each wide one has weights of 32 MiB and more, and takes up to 0.7 GB


def t5(is_wide: bool, vocabulary: int = 200) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=4096 if is_wide else 64,
        d_kv=64 if is_wide else 16,
        d_ff=10240 if is_wide else 160,
        num_heads=64 if is_wide else 4,
        num_layers=layers(is_wide),
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def t5_with_a_table(is_wide: bool) -> nn.Module:
    return t5(is_wide, vocabulary=4000)  # 32 MiB: looked up where it rests


def llama(is_wide: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=4096 if is_wide else 64,
        intermediate_size=14336 if is_wide else 224,
        num_attention_heads=32 if is_wide else 4,
        num_key_value_heads=8 if is_wide else 2,
        num_hidden_layers=layers(is_wide),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def wan(is_wide: bool) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        num_attention_heads=40 if is_wide else 4,
        attention_head_dim=128 if is_wide else 16,
        ffn_dim=13824 if is_wide else 176,
        text_dim=4096 if is_wide else 48,
        num_layers=layers(is_wide),
    )


FAMILIES: dict[str, Callable[[bool], nn.Module]] = {f.__name__: f for f in (t5, t5_with_a_table, llama, wan)}


def inputs(family: str, is_wide: bool, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if family != "wan":
        return {"input_ids": torch.randint(3, 200, (2, 17), generator=generator).to(device)}
    x = torch.randn(1, 16, 2, 8, 8, generator=generator).to(device, DTYPE)
    text = torch.randn(1, 9, 4096 if is_wide else 48, generator=generator).to(device, DTYPE)
    return {"hidden_states": x, "timestep": torch.tensor([500], device=device), "encoder_hidden_states": text}


def output(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        first = model(**given, return_dict=False)[0]
    assert isinstance(first, torch.Tensor)
    return first.cpu()


@dataclasses.dataclass
class Checkpoint:
    """One model and its files. Whatever is large and must be there for every case is on the device."""

    family: str
    device: str
    folder: Path
    skeleton: nn.Module  # as it is constructed, with parameters on the meta device
    values: dict[str, torch.Tensor]  # of all parameters, on the device
    given: dict[str, Any]
    expected: dict[Callable[[Checkpoint], nn.Module], torch.Tensor] = dataclasses.field(default_factory=dict)

    def resident_output(self, model: nn.Module) -> torch.Tensor:
        """Run a copy of `model` that is on the device."""
        memo: dict[int, Any] = {id(p): frozen(p.to(self.device)) for p in model.parameters()}
        resident = copy.deepcopy(model, memo).to(self.device)
        expected = output(resident, self.given)
        assert torch.equal(output(resident, self.given), expected)
        return expected

    def loaded(self, load: Callable[[Checkpoint], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
        """Return a model and what a resident run gives (loaders differ in buffers: rotary tables are rounded or not)."""
        model = load(self)
        if load not in self.expected:
            self.expected[load] = self.resident_output(model)
        return model, self.expected[load]

    @property
    def weights(self) -> Path:
        (path,) = self.folder.glob("*.safetensors")
        return path

    def model_on(self, device: str) -> nn.Module:
        """Return the model with its values in allocations of `device`; buffers and plain attributes where they were made."""
        return self._with({name: value.to(device, copy=True) for name, value in self.values.items()})

    def shell(self, device: str) -> nn.Module:
        """Return the model without values, parameters on `device`."""
        return self._with({name: torch.empty_like(value, device=device) for name, value in self.values.items()})

    def _with(self, values: dict[str, torch.Tensor]) -> nn.Module:
        memo: dict[int, Any] = {id(p): frozen(values[name]) for name, p in self.skeleton.named_parameters()}
        return copy.deepcopy(self.skeleton, memo)  # ties are kept

    def filled(self, state: dict[str, torch.Tensor], *, assign: bool) -> nn.Module:
        model = self.shell("meta" if assign else "cpu")
        unknown = model.load_state_dict(state, assign=assign, strict=False).unexpected_keys
        assert not unknown
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return model


def frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def skeleton_of(family: str, is_wide: bool) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with parameters_on_meta():
            return FAMILIES[family](is_wide).to(DTYPE).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_values(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    """Make values for the parameters of `model` on `device`, where that takes no time: around 1 for norms, else around 0."""
    generator = torch.Generator(device).manual_seed(0)
    values: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        mean = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
        values[name] = torch.empty(p.shape, dtype=p.dtype, device=device).normal_(mean, 0.02, generator=generator)
    return values


SCALES = [pytest.param("cpu", id="cpu_tiny"), pytest.param("cuda", id="cuda_wide", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=SCALES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    if request.param == "cuda":
        torch.set_num_threads(min(8, os.cpu_count() or 1))  # gigabytes are copied in host memory
    yield str(request.param)
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkpoint]:
    family, is_wide = request.param, device == "cuda"
    folder = tmp_path_factory.mktemp(family)
    skeleton = skeleton_of(family, is_wide)
    point = Checkpoint(
        family, device, folder, skeleton, random_values(skeleton, device), inputs(family, is_wide, device)
    )
    model = point.model_on("cpu")
    model.save_pretrained(folder, max_shard_size="100GB")
    torch.save(model.state_dict(), folder / "model.pt")
    del model
    yield point
    shutil.rmtree(folder)


def constructed(point: Checkpoint) -> nn.Module:
    return point.model_on("cpu")


def from_pretrained(point: Checkpoint) -> nn.Module:
    is_old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
    name = "torch_dtype" if point.family == "wan" or is_old else "dtype"
    model: nn.Module = type(point.skeleton).from_pretrained(point.folder, **{name: DTYPE})
    return model.eval().requires_grad_(False)


def load_file_assigned(point: Checkpoint) -> nn.Module:
    return point.filled(load_file(point.weights), assign=True)


def load_file_copied(point: Checkpoint) -> nn.Module:
    return point.filled(load_file(point.weights), assign=False)


def torch_load_mapped(point: Checkpoint) -> nn.Module:
    return point.filled(torch.load(point.folder / "model.pt", mmap=True, weights_only=True), assign=True)


def torch_load(point: Checkpoint) -> nn.Module:
    return point.filled(torch.load(point.folder / "model.pt", weights_only=True), assign=True)


def mapped(point: Checkpoint) -> nn.Module:
    return load_mapped(point.shell("meta"), point.weights)


def moved_and_back(point: Checkpoint) -> nn.Module:
    return moved(point).to("cpu")


def moved(point: Checkpoint) -> nn.Module:
    return point.model_on(point.device).to(point.device)


FROM_FILES = (from_pretrained, load_file_assigned, torch_load_mapped, mapped)
IN_MEMORY = (constructed, load_file_copied, torch_load, moved_and_back, moved)
READ_ONLY_IS_SUPPORTED = torch.cuda.is_available() and Pins(torch.device("cuda", 0), 0)._read_only_is_supported()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the libraries, about themselves
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("load", [*FROM_FILES, *IN_MEMORY], ids=lambda load: load.__name__)
def test_loaded_models_stream_from_where_they_lie(
    load: Callable[[Checkpoint], nn.Module], level: str, checkpoint: Checkpoint, device: str
) -> None:
    model, expected = checkpoint.loaded(load)
    offload = apply_group_offloading(model, device, slots=1, **LEVELS[level])
    stores = offload.stats().stores
    in_files = "disk" if device == "cpu" else "mapped" if READ_ONLY_IS_SUPPORTED else "pageable"
    kind = in_files if load in FROM_FILES else "pageable" if device == "cpu" else "registered"
    share = 0.8 if load is from_pretrained else 0.99  # diffusers casts a few layers of Wan to float32, in memory
    assert stores.get(kind, 0) >= share * sum(stores.values()) > 0
    for _ in range(2):
        assert torch.equal(output(model, checkpoint.given), expected)
    offload.remove()
    restored = model.state_dict()
    for name, value in checkpoint.values.items():
        assert restored[name].device.type in ("cpu", device)
        now = restored[name].to(device)
        assert torch.equal(now, value.to(now.dtype)), name


def test_weights_that_were_written_since_they_were_loaded_are_those_that_count(
    checkpoint: Checkpoint, device: str
) -> None:
    model = load_file_assigned(checkpoint)
    name = max((tensor.nbytes, name) for name, tensor in model.named_parameters())[1]
    model.get_parameter(name).data.mul_(1.5)
    expected = checkpoint.resident_output(model)
    offload = apply_group_offloading(model, device, slots=1)
    assert torch.equal(output(model, checkpoint.given), expected)
    offload.remove()
    assert torch.equal(output(model.to(device), checkpoint.given), expected)
