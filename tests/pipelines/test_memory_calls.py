"""The calls that place the models of a pipeline, by the names that they have in diffusers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, frames, load, models_of

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload import offload_of

CLIP = FAMILIES["Wan2.1"].clip | {"num_inference_steps": 2}
CPU = torch.device("cpu")


@pytest.fixture
def family() -> str:
    return "Wan2.1"


@pytest.fixture
def own(folder: Path) -> Any:
    """A pipeline with models of its own, to be moved and offloaded."""
    return load("Wan2.1", folder)


def offloaded(pipeline: Any) -> set[str]:
    return {name for name, model in models_of(pipeline).items() if offload_of(model) is not None}


class TestGroupOffload:
    def test_every_model_with_the_arguments_of_diffusers(self, own: Any) -> None:
        expected = frames(own, **CLIP)
        options = {"non_blocking": True, "use_stream": False, "record_stream": False, "low_cpu_mem_usage": True}
        handles = own.enable_group_offload(CPU, CPU, "leaf_level", None, **options)
        assert handles.keys() == offloaded(own) == models_of(own).keys()
        assert {(handle.config.granularity, handle.config.slots) for handle in handles.values()} == {("leaf_level", 1)}
        assert (frames(own, **CLIP) == expected).all()
        assert own.enable_group_offload(CPU, CPU, "leaf_level", None, **options) == handles  # the same again
        own.remove_all_hooks()
        assert not offloaded(own)
        assert (frames(own, **CLIP) == expected).all()

    def test_exclude_modules(self, own: Any, tmp_path: Path) -> None:
        own.enable_group_offload(onload_device=CPU, offload_to_disk_path=tmp_path, exclude_modules="vae")
        assert offloaded(own) == {"transformer", "text_encoder"}
        with pytest.warns(UserWarning, match="exclude_modules names image_encoder"):
            own.enable_group_offload(CPU, offload_to_disk_path=tmp_path, exclude_modules=["vae", "image_encoder"])

    def test_nothing_is_left_where_a_model_cannot_be_offloaded(self, own: Any) -> None:
        own.transformer.enable_group_offload(CPU, CPU, "block_level", 1)
        with pytest.raises(ConflictError, match="offloaded already"):
            own.enable_group_offload(CPU, offload_type="leaf_level")
        assert offloaded(own) == {"transformer"}


class TestModelOffload:
    def test_devices(self, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen: list[Any] = []
        monkeypatch.setattr(
            "vramkit.pipelines.calling.memory.apply_model_offload",
            lambda pipe, device: chosen.append(torch.device(device)),
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for arguments in ((), (1,), ("cuda:1",), (None, "cuda"), (1, "cuda"), (1, "cuda:1"), (0, "xpu")):
            own.enable_model_cpu_offload(*arguments)
        own.enable_model_cpu_offload(device="cpu")
        assert list(map(str, chosen)) == ["cuda", "cuda:1", "cuda:1", "cuda", "cuda:1", "cuda:1", "xpu:0", "cpu"]
        for arguments in ((1, "cuda:0"), ("cpu", "cuda")):
            with pytest.raises(ConfigError, match="two devices"):
                own.enable_model_cpu_offload(*arguments)

    def test_models_leave_and_hooks_are_removed(self, own: Any) -> None:
        expected = frames(own, **CLIP)
        own.enable_model_cpu_offload(device="cpu")
        assert offloaded(own) == models_of(own).keys()
        assert (frames(own, **CLIP) == expected).all()
        for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert not offloaded(copied)
            assert (frames(copied, **CLIP) == expected).all()
        own.maybe_free_model_hooks()
        own.remove_all_hooks()
        assert not offloaded(own)
        own.enable_group_offload(CPU, offload_type="leaf_level")


class TestTo:
    def test_devices_and_dtypes(self, own: Any) -> None:
        for arguments, named in (
            ((torch.bfloat16,), {"silence_dtype_warnings": True}),
            (("cpu", torch.float32), {}),
            ((), {"device": "cpu", "dtype": torch.float64}),
        ):
            assert own.to(*arguments, **named) is own
            dtype = named.get("dtype", next((each for each in arguments if isinstance(each, torch.dtype)), None))
            assert {model.dtype for model in models_of(own).values()} == {own.dtype} == {dtype}
        assert own._execution_device == own.device == CPU
        assert own.to() is own.to(None) is own

    @pytest.mark.parametrize(
        ("arguments", "named", "message"),
        [
            (("cpu", "cuda"), {}, "two of device"),
            ((torch.float32,), {"dtype": torch.float64}, "two of dtype"),
            ((), {"dtype": "float32"}, "dtype='float32'"),
            ((), {"nonsense": 1}, "nonsense=1"),
            ((torch.int8,), {}, "dtype=torch.int8; expected a device, a floating torch.dtype"),
            (("nowhere",), {}, "'nowhere' is not a device"),
            (("cuda:99",), {}, r"device='cuda:99', but this machine has \d+ such devices"),
        ],
    )
    def test_wrong_ones(self, arguments: Any, named: Any, message: str, pipeline: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            pipeline.to(*arguments, **named)

    def test_what_is_offloaded_is_not_cast(self, own: Any) -> None:
        own.transformer.enable_group_offload(CPU, offload_type="leaf_level")
        with pytest.raises(ConflictError, match="transformer: offloaded, so the weights cannot be cast"):
            own.to(torch.float64)
        assert {model.dtype for model in models_of(own).values()} == {torch.float32}  # nothing was
        own.to("cpu", torch.float32)  # as it is


def test_the_switches_of_the_vae(own: Any) -> None:
    own.enable_vae_tiling(tile_sample_min_height=32, tile_sample_stride_height=16)
    own.enable_vae_slicing()
    assert own.vae.use_tiling
    assert own.vae.use_slicing
    assert (own.vae.tiling.height, own.vae.tiling.stride_height) == (32, 16)
    own.disable_vae_tiling()
    own.disable_vae_slicing()
    assert not own.vae.use_tiling
    assert not own.vae.use_slicing
    own.vae = None
    with pytest.raises(ConfigError, match="no vae"):
        own.enable_vae_tiling()
