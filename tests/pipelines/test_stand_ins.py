"""Files that were never downloaded, or are others than their names say: one clear error of every loader."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Stock
from torch import nn

import vramkit
from vramkit import AutoModel, WanPipeline, load_mapped
from vramkit.errors import CheckpointError
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.pipelines.loading.text_encoders import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2147483648\n"
LFS = r"git-lfs pointer and not the file \(2 GiB\).*git lfs pull"


def zipped(folder: Path) -> bytes:
    torch.save({"a": torch.ones(1)}, folder / "x")
    return (folder / "x").read_bytes()


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "x.gguf"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, LFS),
        (b"", "is empty: download it again"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"is a web page.*/resolve/ for /blob/"),
        (b"\xef\xbb\xbf\r\n <HTML lang='en'>", "is a web page"),
        (pickle.dumps({"a": 1}), "is a pickle, which can run code"),
        (zipped, "is a zip archive. If torch.save wrote it, it is a pickle"),
        (b"\x1f\x8b\x08" + bytes(20), "compressed by gzip"),
        (b'{"error":"Invalid credentials"}', r"is text that begins with '\{\"error"),
        (b"Entry not found", "is text that begins with 'Entry not found'"),
    ],
)
def test_contents_are_told(content: bytes | Callable[[Path], bytes], message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_formats_under_names_of_one_another(tmp_path: Path) -> None:
    vramkit.offload.checkpoint.write_checkpoint(tmp_path / "x.gguf", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"is a safetensors file: give it a name that ends in \.safetensors"):
        read_checkpoint(tmp_path / "x.gguf")
    (tmp_path / "x.safetensors").write_bytes(b"GGUF" + b"\3\0\0\0" + bytes(16))
    with pytest.raises(CheckpointError, match=r"is a GGUF file: give it a name that ends in \.gguf"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_cut_file_is_not_told_to_take_the_name_that_it_has(tmp_path: Path) -> None:
    vramkit.offload.checkpoint.write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"no safetensors header \(40 bytes in all\); it is truncated"):
        read_checkpoint(tmp_path / "x.safetensors")


class TestLoaders:
    @pytest.fixture
    def folder(self, stock: Stock, tmp_path: Path) -> Path:
        return Path(shutil.copytree(stock.folder("Wan2.1"), tmp_path / "wan"))

    @pytest.mark.parametrize(
        "file",
        [
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder/config.json",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "scheduler/scheduler_config.json",
            "model_index.json",
        ],
    )
    def test_from_pretrained(self, file: str, folder: Path) -> None:
        (folder / file).write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=f"{file} is a git-lfs pointer"):
            WanPipeline.from_pretrained(folder)

    @pytest.mark.parametrize("load", [AutoModel.from_single_file, vramkit.AutoencoderKLWan.from_single_file])
    def test_from_single_file(self, load: Callable[[Path], Any], tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=LFS):
            load(tmp_path / "x.safetensors")

    def test_components_that_are_files(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(POINTER)
        for name in ("transformer", "vae", "text_encoder"):
            with pytest.raises(CheckpointError, match=LFS):
                WanPipeline.from_pretrained(folder, **{name: tmp_path / "x.safetensors"})

    def test_adapters(self, stock: Stock, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(POINTER)
        pipeline = stock.pipeline("Wan2.1")
        for source in (tmp_path, tmp_path / "x.safetensors"):
            with pytest.raises(CheckpointError, match=LFS):
                pipeline.load_lora_weights(source)
        assert not any(hasattr(part, "base_layer") for part in pipeline.transformer.modules())

    def test_load_mapped(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(POINTER)
        (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"weight": "x.safetensors"}}')
        (tmp_path / "y.safetensors.index.json").write_bytes(POINTER)
        for name in ("x.safetensors", "x.safetensors.index.json", "y.safetensors.index.json"):
            with pytest.raises(CheckpointError, match="git lfs pull"):
                load_mapped(nn.Linear(2, 2, device="meta"), tmp_path / name)

    def test_parts_of_vocabularies(self, folder: Path, tmp_path: Path) -> None:
        """Merges are lines of text, and a pointer is three of them."""
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=r"merges\.txt is a git-lfs pointer"):
            load_tokenizer(tmp_path, class_name="CLIPTokenizer")
        (folder / "tokenizer" / "spiece.model").write_bytes(POINTER)  # beside the tokenizer.json that all is read from
        assert load_tokenizer(folder / "tokenizer").vocab_size > 0
