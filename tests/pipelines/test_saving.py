"""save_pretrained: of what is offloaded, whole or not at all, and readable by whom the umask lets."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import load_oracle, write_lora
from families import Stock, load, models_of
from torch import nn

from vramkit import apply_group_offloading, apply_model_offload
from vramkit.casting import NarrowTensor
from vramkit.errors import CheckpointError, ConfigError, ConflictError, StoreError
from vramkit.offload import offload_of
from vramkit.offload.disk import staged_folder
from vramkit.pipelines.wan.transformer import WanTransformer3DModel
from vramkit.quant import Fp8Config, quantize

LEVELS = ("block_level", "leaf_level", "model_level")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rests", ["file", "RAM", "disk"])
def test_a_model_is_saved_while_it_is_offloaded(level: str, rests: str, stock: Stock, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(stock.folder("Wan2.1"), subfolder="transformer")
    if rests == "RAM":
        model = copy.deepcopy(model)
    expected = copy.deepcopy(model)
    options = {"offload_to_disk_path": tmp_path / "weights"} if rests == "disk" else {}
    offload = apply_group_offloading(model, "cpu", offload_type=level, **options)
    model.save_pretrained(tmp_path / "saved")
    assert offload.is_active
    assert_same(WanTransformer3DModel.from_pretrained(tmp_path / "saved"), expected)


def test_it_is_saved_over_the_files_that_it_streams_from(stock: Stock, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    WanTransformer3DModel.from_pretrained(stock.folder("Wan2.1"), subfolder="transformer").save_pretrained(folder)
    model = WanTransformer3DModel.from_pretrained(folder)
    expected = copy.deepcopy(model)
    offload = apply_group_offloading(model, "cpu", offload_type="leaf_level")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert not (folder / "diffusion_pytorch_model.safetensors").exists()  # which would be read before the shards
    assert_same(WanTransformer3DModel.from_pretrained(folder), expected)
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    offload.remove()
    assert_same(model, expected)


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ARGUMENTS = {"variant": "fp16", "max_shard_size": "60KB", "safe_serialization": True, "push_to_hub": False}


class TestArgumentsOfDiffusers:
    def test_a_pipeline_goes_there_and_back(self, stock: Stock, tmp_path: Path) -> None:
        pipeline, theirs = stock.pipeline("Wan2.1"), stock.oracle("Wan2.1")
        pipeline.save_pretrained(tmp_path / "ours", **ARGUMENTS)
        theirs.save_pretrained(tmp_path / "theirs", **ARGUMENTS)
        for name, model in models_of(pipeline).items():
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            names = [set(names_of(tmp_path / who / name)) for who in ("ours", "theirs")]
            assert f"{stem}.safetensors.index.fp16.json" in names[0] & names[1]
            assert all(name.startswith((f"{stem}.fp16-0", f"{stem}.safetensors.index", "config")) for name in names[0])
            assert_same(getattr(load_oracle(tmp_path / "ours", variant="fp16"), name), model)
            assert_same(getattr(load("Wan2.1", tmp_path / "theirs", variant="fp16"), name), model)
            assert_same(getattr(load("Wan2.1", tmp_path / "ours", variant="fp16"), name), model)
        with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
            load("Wan2.1", tmp_path / "ours")

    def test_an_offloaded_model_over_the_variant_that_it_streams_from(self, stock: Stock, tmp_path: Path) -> None:
        original = WanTransformer3DModel.from_pretrained(stock.folder("Wan2.1"), subfolder="transformer")
        original.save_pretrained(tmp_path)
        plain = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
        original.save_pretrained(tmp_path, variant="fp16")
        model = WanTransformer3DModel.from_pretrained(tmp_path, variant="fp16")
        apply_group_offloading(model, "cpu", offload_type="leaf_level")
        for size in ("100KB", 60_000, "5GB"):
            model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
            assert_same(WanTransformer3DModel.from_pretrained(tmp_path, variant="fp16"), original)
            assert_same(diffusers.WanTransformer3DModel.from_pretrained(tmp_path, variant="fp16"), original)
        kept = ["config.json", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
        assert names_of(tmp_path) == kept
        assert (tmp_path / kept[-1]).stat().st_mtime_ns == plain

    def test_a_quantized_model_as_a_variant(self, stock: Stock, tmp_path: Path) -> None:
        model = WanTransformer3DModel.from_pretrained(stock.folder("Wan2.1"), subfolder="transformer")
        quantize(model, Fp8Config())
        model.save_pretrained(tmp_path, variant="fp8", max_shard_size="60KB")
        saved = dict(WanTransformer3DModel.from_pretrained(tmp_path, variant="fp8").named_parameters())
        assert all(torch.equal(wide(saved[name]), wide(weight)) for name, weight in model.named_parameters())

    def test_a_shard_that_is_missing_is_named(self, stock: Stock, tmp_path: Path) -> None:
        stock.pipeline("Wan2.1").transformer.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
        (shard := next(tmp_path.glob("*-00002-of-*"))).unlink()
        with pytest.raises(CheckpointError, match=rf"index\.fp16\.json: shard {shard.name} is missing"):
            WanTransformer3DModel.from_pretrained(tmp_path, variant="fp16")

    @pytest.mark.parametrize("whose", ["pipeline", "transformer", "scheduler"])
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"safe_serialization": False}, "safe_serialization=False is not taken; only safetensors are written"),
            ({"push_to_hub": True}, "hf upload"),
            ({"is_main_process": False}, "on one rank"),
            ({"nonsense": 1}, "has no argument 'nonsense'"),
            ({"variant": "a/b"}, "variant is 'a/b'"),
            ({"max_shard_size": "much"}, "a size was given as 'much'"),
        ],
    )
    def test_what_is_not_done_is_refused(
        self, given: dict[str, Any], message: str, whose: str, stock: Stock, tmp_path: Path
    ) -> None:
        pipeline = stock.pipeline("Wan2.1")
        if whose == "scheduler" and given.keys() & {"variant", "max_shard_size"}:
            message = "has no argument"
        with pytest.raises(ConfigError, match=message):
            getattr(pipeline, whose, pipeline).save_pretrained(tmp_path / "saved", **given)
        assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("whose", ["pipeline", "transformer", "scheduler"])
def test_an_empty_path_is_not_the_folder_that_one_is_in(
    whose: str, stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = stock.pipeline("Wan2.1")
    with pytest.raises(ConfigError, match="an empty path was given, expected that of a folder"):
        getattr(pipeline, whose, pipeline).save_pretrained("")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", ["cast", "quantized"])
def test_what_is_stored_in_fewer_bits_is_saved_while_it_is_offloaded(stored: str, stock: Stock, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(stock.folder("Wan2.1"), subfolder="transformer")
    if stored == "cast":
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    else:
        quantize(model, Fp8Config())
    expected = copy.deepcopy(model)
    apply_group_offloading(model, "cpu", offload_type="leaf_level")
    model.save_pretrained(tmp_path / "saved")
    saved = dict(WanTransformer3DModel.from_pretrained(tmp_path / "saved").named_parameters())
    for name, weight in expected.named_parameters():
        assert type(saved[name]) is type(weight)
        assert torch.equal(wide(saved[name]), wide(weight)), name


def wide(weight: torch.Tensor) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, NarrowTensor) else weight


@pytest.mark.parametrize("family", ["Wan2.1", "HunyuanVideo", "LTX-Video", "CogVideoX"])
def test_a_pipeline_is_saved_while_it_is_offloaded(family: str, stock: Stock, tmp_path: Path) -> None:
    pipeline = load(family, stock.folder(family))
    for model, level in zip(models_of(pipeline).values(), ("leaf_level", "block_level", "leaf_level"), strict=False):
        apply_group_offloading(model, "cpu", offload_type=level)
    pipeline.save_pretrained(tmp_path / "saved")
    expected = models_of(stock.pipeline(family))
    for name, model in models_of(load(family, tmp_path / "saved")).items():
        assert_same(model, expected[name])
    saved = load_oracle(tmp_path / "saved")
    assert_same(saved.text_encoder, expected["text_encoder"])


def test_a_compiled_model_is_saved_as_what_it_wraps(stock: Stock, tmp_path: Path) -> None:
    pipeline = stock.pipeline("Wan2.1")
    model = pipeline.transformer
    pipeline.transformer = torch.compile(model, backend="eager")
    pipeline.save_pretrained(tmp_path)
    assert_same(load("Wan2.1", tmp_path).transformer, model)
    assert_same(load_oracle(tmp_path).transformer, model)


def test_adapters_are_refused_and_fused_ones_are_saved(stock: Stock, tmp_path: Path) -> None:
    pipeline = load("Wan2.1", stock.folder("Wan2.1"), text_encoder=None, tokenizer=None)
    apply_model_offload(pipeline, "cpu")
    before = copy.deepcopy(pipeline.transformer)
    pipeline.load_lora_weights(str(write_lora(pipeline.transformer, tmp_path)), adapter_name="a")
    with pytest.raises(ConflictError, match="unload_lora_weights"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "saved", subfolder="transformer")
    assert_same(saved, copy.deepcopy(pipeline.transformer))
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(saved.get_parameter(name), before.get_parameter(name))


def test_a_part_of_an_offloaded_module_is_refused(stock: Stock, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(stock.folder("Wan2.1"), subfolder="transformer")
    apply_group_offloading(nn.Sequential(model), "cpu")
    with pytest.raises(ConflictError, match="larger module"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class TestWholeOrAbsent:
    def fail(self, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    @pytest.mark.parametrize("target", ["new", "deep/er/new"])
    def test_a_new_folder_is_not_left_half_written(self, target: str, stock: Stock, tmp_path: Path) -> None:
        pipeline = load("Wan2.1", stock.folder("Wan2.1"))
        pipeline.vae.save_pretrained = self.fail
        apply_group_offloading(pipeline.transformer, "cpu")
        with pytest.raises(StoreError, match=r"new failed: No space left.*nothing was kept"):
            pipeline.save_pretrained(tmp_path / target)
        assert list(tmp_path.iterdir()) == []
        assert offload_of(pipeline.transformer) is not None

    def test_an_old_folder_is_as_it_was(self, stock: Stock, tmp_path: Path) -> None:
        pipeline = load("Wan2.1", stock.folder("Wan2.1"))
        pipeline.save_pretrained(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        pipeline.transformer.proj_out.bias.data.add_(1)
        pipeline.vae.save_pretrained = self.fail
        with pytest.raises(StoreError):
            pipeline.save_pretrained(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert sum(1 for _ in tmp_path.iterdir()) == 6

    def test_a_disk_that_is_full_at_a_tokenizer(self, stock: Stock, tmp_path: Path) -> None:
        """Its library raises an Exception of no other kind."""

        def fail(*arguments: Any, **options: Any) -> None:
            raise Exception("No space left on device (os error 28)")

        pipeline = load("Wan2.1", stock.folder("Wan2.1"))
        pipeline.save_pretrained(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        pipeline.tokenizer.save_pretrained = fail
        with pytest.raises(StoreError, match=r"writing tokenizer failed: No space left.*nothing was kept"):
            pipeline.save_pretrained(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_files_have_the_permissions_of_the_umask(self, umask: None, stock: Stock, tmp_path: Path) -> None:
        pipeline = load("Wan2.1", stock.folder("Wan2.1"))
        pipeline.save_pretrained(tmp_path / "saved")
        modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*")}
        assert len(modes) > 10
        assert {oct(mode) for path, mode in modes.items() if path.is_file()} == {"0o640"}
        assert {oct(mode) for path, mode in modes.items() if path.is_dir()} == {"0o750"}

    def test_other_files_stay(self, tmp_path: Path) -> None:
        for name in ("model.safetensors", "model.fp16.safetensors", "models.safetensors", "notes.txt"):
            (tmp_path / name).write_text("old")
        with staged_folder(tmp_path) as stage:
            (stage / "model-00001-of-00001.safetensors").write_text("new")
            (stage / "part").mkdir()
            (stage / "part" / "config.json").write_text("{}")
        assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
            "model-00001-of-00001.safetensors",
            "model.fp16.safetensors",
            "models.safetensors",
            "notes.txt",
            "part/config.json",
        ]
