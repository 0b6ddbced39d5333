from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vramkit.errors import CheckpointError
from vramkit.pipelines import WanPipeline
from vramkit.pipelines.loading.folders import has_variant, listing, read_json, weights_files


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


class TestReadJson:
    def test_reads_an_object(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text('{"name": "\u00fc"}', encoding="utf-8")
        assert read_json(path) == {"name": "\u00fc"}

    def test_a_missing_file_is_named_beside_what_is_there(self, tmp_path: Path) -> None:
        touch(tmp_path, "readme.txt")
        with pytest.raises(CheckpointError, match=r"no config\.json; it holds readme\.txt"):
            read_json(tmp_path / "config.json")

    @pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe", b"null"])
    def test_damage_is_named(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_json(path)


class TestWeightsFiles:
    @pytest.mark.parametrize(
        ("names", "found"),
        [
            (["model.safetensors"], ["model.safetensors"]),
            (["model.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
            (
                ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
                ["model.safetensors.index.json"],
            ),
        ],
    )
    def test_one_file_or_an_index(self, names: list[str], found: list[str], tmp_path: Path) -> None:
        touch(tmp_path, *names, "other.safetensors")
        assert weights_files(tmp_path, stem="model") == [tmp_path / name for name in found]

    def test_of_two_saves_the_one_that_the_library_reads(self, tmp_path: Path) -> None:
        """Neither library removes the one file where it writes shards, and each begins with another of the two."""
        for stem in ("model", "diffusion_pytorch_model"):
            one, index = touch(tmp_path, f"{stem}.safetensors", f"{stem}.safetensors.index.json")
            assert weights_files(tmp_path, stem=stem) == [one if stem == "model" else index]

    def test_variant(self, tmp_path: Path) -> None:
        touch(tmp_path, "model.safetensors")
        shards = touch(tmp_path, "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
        assert weights_files(tmp_path, stem="model", variant="fp16") == shards
        (whole,) = touch(tmp_path, "model.fp16.safetensors")
        assert weights_files(tmp_path, stem="model", variant="fp16") == [whole]

    def test_shards_of_a_variant_as_older_versions_named_them(self, tmp_path: Path) -> None:
        touch(tmp_path, "model-00001-of-00002.safetensors", "model.safetensors.index.fp16.json")
        shards = touch(tmp_path, "model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors")
        assert has_variant(tmp_path, "fp16")
        index = tmp_path / "model.safetensors.index.fp16.json"
        assert weights_files(tmp_path, stem="model", variant="fp16") == [index]
        index.unlink()
        assert weights_files(tmp_path, stem="model", variant="fp16") == shards
        assert not has_variant(tmp_path, "f16")

    def test_missing_weights_say_what_is_there(self, tmp_path: Path) -> None:
        touch(tmp_path, "pytorch_model.bin", "config.json")
        with pytest.raises(
            CheckpointError, match=r"no model\.safetensors.*config\.json.*'pytorch_model\.bin'.*pickles"
        ):
            weights_files(tmp_path, stem="model")
        with pytest.raises(CheckpointError, match=r"no model\.fp16\.safetensors"):
            weights_files(tmp_path, stem="model", variant="fp16")


def test_listing(tmp_path: Path) -> None:
    assert listing(tmp_path) == "nothing"
    assert "no such folder" in listing(tmp_path / "missing")
    touch(tmp_path, *"dcba")
    assert listing(tmp_path) == "a, b, c, d"
    assert listing(tmp_path, limit=2) == "a, b ..."


def test_what_only_looks_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob that is gone")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(a link to nothing, or no file\)"):
        weights_files(tmp_path, stem="model")
    with pytest.raises(CheckpointError, match=r"no config\.json; it holds config\.json \(a folder\)"):
        read_json(tmp_path / "config.json")


def test_a_pipeline_says_where_it_is_from(wan_folder: Path) -> None:
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": None, "transformer": None}
    assert WanPipeline.from_pretrained(wan_folder, **parts).name_or_path == str(wan_folder)
    assert WanPipeline.name_or_path is None
