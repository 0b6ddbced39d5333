"""GGUF files: the numbers of its own package, streamed as they are stored, and what is damaged refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import FORMATS, random_blocks, write_gguf
from torch import Tensor, nn

from vramkit import apply_group_offloading, load_mapped
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.disk import span_of
from vramkit.quant import GgufConfig, gguf, quantize
from vramkit.quant.gguf import GgufTensor, widened


@pytest.mark.parametrize("form", FORMATS)
def test_values_are_those_of_the_package(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, values = random_blocks(form, 6, 512)
    for at_once in (2**23, 512):  # whole, and block by block
        monkeypatch.setattr(gguf, "_AT_ONCE", at_once)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = widened(torch.from_numpy(blocks), form, dtype)
            assert torch.equal(got, values.to(dtype))
    assert values.isfinite().all()
    assert values.unique().numel() > 100


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(256, 256) for _ in range(3)])
        self.conv = nn.Conv3d(4, 8, (1, 2, 2))
        self.norm = nn.LayerNorm(256)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        out: Tensor = self.norm(x)
        return out


@pytest.fixture
def stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is written, and the values of it."""
    torch.manual_seed(0)
    written: dict[str, Any] = {name: tensor.detach() for name, tensor in Net().state_dict().items()}
    values = dict(written)
    for at, form in enumerate(("Q4_K", "Q8_0", "Q6_K")):
        blocks, wide = random_blocks(form, 256, 256, seed=at)
        written[f"blocks.{at}.weight"], values[f"blocks.{at}.weight"] = (form, blocks), wide
    written["norm.weight"] = written["norm.weight"].bfloat16()
    written["conv.weight"] = values["conv.weight"] = written["conv.weight"].half()
    return written, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stream_as_they_are_stored(
    dtype: torch.dtype, stored: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    with torch.device("meta"):
        net = Net()
    load_mapped(net, write_gguf(tmp_path / "net.gguf", stored[0]), dtype=dtype).eval()
    expected = Net().to(dtype)
    expected.load_state_dict({name: value.to(dtype) for name, value in stored[1].items()})
    x = torch.randn(2, 256, dtype=dtype)
    weight = net.blocks[0].weight
    assert isinstance(weight, GgufTensor)
    assert span_of(weight.blocks) is not None
    with torch.no_grad():
        out = net(x)
        assert torch.equal(out, expected.eval()(x))
        assert torch.equal(net.conv.weight, expected.conv.weight)
        offload = apply_group_offloading(net, "cpu", offload_type="block_level")
        assert torch.equal(net(x), out)
    sizes = sum(256 * 256 * bits // 8 for bits in (5, 9, 7))
    assert offload.stats().streamed_bytes < sizes + 4 * 1024


def test_flattened_tensors_get_their_shape_back_and_rows_are_split(tmp_path: Path) -> None:
    blocks, values = random_blocks("Q4_K", 6, 256)
    kernel = torch.randn(8, 4, 1, 2, 2)
    file = write_gguf(
        tmp_path / "x.gguf",
        {"qkv": ("Q4_K", blocks), "kernel": kernel.view(8, 16)},
        metadata={"comfy.gguf.orig_shape.kernel": [8, 4, 1, 2, 2]},
    )
    entries = read_checkpoint(file)
    assert torch.equal(entries["kernel"].tensor(), kernel)
    for parts in (((2, 4),), ((4, 6), (0, 2))):
        part = entries["qkv"].rows(*parts).stored(torch.float32)
        assert torch.equal(part.dequantize(), torch.cat([values[start:stop] for start, stop in parts]))


def test_layers_compile_whole() -> None:
    blocks, _ = random_blocks("Q5_K", 8, 256)
    layer = nn.Linear(256, 8, device="meta")
    layer.bias = nn.Parameter(torch.zeros(8))
    weight = GgufTensor({"blocks": torch.from_numpy(blocks)}, (8, 256), torch.float32, ("Q5_K",))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(2, 256)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    torch._dynamo.reset()


def test_nothing_is_quantized_into_it() -> None:
    with pytest.raises(ConfigError, match=r"only read: load a \.gguf file by from_single_file"):
        quantize(nn.Sequential(nn.Linear(256, 256)), GgufConfig())
    with pytest.raises(ConfigError, match="compute_dtype='int8'"):
        GgufConfig(compute_dtype="int8")


class TestDamage:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> bytes:
        blocks, _ = random_blocks("Q8_0", 4, 64)
        file = write_gguf(tmp_path / "x.gguf", {"first": ("Q8_0", blocks), "second": torch.ones(8, 8)})
        return file.read_bytes()

    @staticmethod
    def info(data: bytes, name: bytes) -> int:
        """Where the number of dimensions of a tensor stands."""
        return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)

    def write(self, data: bytes, tmp_path: Path) -> Path:
        (tmp_path / "bad.gguf").write_bytes(data)
        return tmp_path / "bad.gguf"

    @pytest.mark.parametrize(
        ("at", "form", "value", "message"),
        [
            (0, "<I", 9, "'first' has 9 dimensions"),
            (4, "<Q", 33, "'first' is of Q8_0, whose blocks of 32 do not fill rows"),
            (4, "<Q", 2**62, "'first' has shape .* which no file could hold"),
            (20, "<I", 16, "'first' is of GGUF type 16, which is not known; known are F32"),
            (20, "<I", 999, "'first' is of GGUF type 999"),
            (20, "<I", 30, "tensor 'second' overlaps the tensor before it"),
            (24, "<Q", 2**40, "'first' ends at byte .*truncated"),
            (24, "<Q", 7, "'first' is not aligned"),
            (24, "<Q", 256, "overlaps the tensor before it"),
        ],
    )
    def test_a_tensor_that_is_wrong_is_named(
        self, at: int, form: str, value: int, message: str, whole: bytes, tmp_path: Path
    ) -> None:
        data = bytearray(whole)
        struct.pack_into(form, data, self.info(whole, b"first") + at, value)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(self.write(bytes(data), tmp_path))
        assert "bad.gguf" in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data[:-40], "'second' ends at byte .*truncated"),
            (lambda data: data[:30], "header"),
            (lambda data: data[:3], "header ends at byte 3"),
            (lambda data: b"\0\1\2\3" + data[4:], "no GGUF header"),
            (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1, expected 2 or 3"),
            (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "truncated or damaged"),
            (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], "truncated or damaged"),
            (lambda data: data.replace(b"second", b"f\xffcond"), "not UTF-8"),
        ],
    )
    def test_a_file_that_is_wrong_is_named(
        self, change: Callable[[bytes], bytes], message: str, whole: bytes, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(self.write(change(whole), tmp_path))

    def test_every_cut_is_an_error_of_ours(self, whole: bytes, tmp_path: Path) -> None:
        for length in range(0, len(whole), 7):
            with pytest.raises(CheckpointError):
                read_checkpoint(self.write(whole[:length], tmp_path))

    def test_what_does_not_fit_the_module_is_named(self, whole: bytes, tmp_path: Path) -> None:
        path = self.write(whole, tmp_path)
        with torch.device("meta"):
            net = nn.ParameterDict({"first": torch.zeros(4, 32), "second": torch.zeros(8, 8)})
        with pytest.raises(CheckpointError, match=r"'first' has shape \[4, 64\], the module expects \[4, 32\]"):
            load_mapped(net, path)
