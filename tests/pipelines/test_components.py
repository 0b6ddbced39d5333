"""Folders as they are published: mixed variants, more than is needed, and what a newer version wrote."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import edit_json
from families import FAMILIES, Stock, load, seeded
from safetensors.torch import load_file, save_file

from vramkit.casting import NarrowTensor
from vramkit.errors import CheckpointError
from vramkit.pipelines.wan.transformer import WanTransformer3DModel

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(stock: Stock, tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(stock.folder(family), tmp_path / "copy"))


class TestVariants:
    @pytest.fixture
    def mixed(self, copy: Callable[[str], Path]) -> Path:
        """A checkpoint whose transformer alone has a variant, in half precision."""
        folder = copy("Wan2.1")
        narrow = {name: weight.half() for name, weight in load_file(folder / TRANSFORMER).items()}
        save_file(narrow, folder / TRANSFORMER.replace(".safe", ".fp16.safe"))
        return folder

    def test_models_without_the_variant_are_read_as_they_are(self, mixed: Path) -> None:
        pipeline = load("Wan2.1", mixed, variant="fp16")
        assert pipeline.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float16
        assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}

    def test_one_that_no_model_has_is_named(self, mixed: Path) -> None:
        with pytest.raises(CheckpointError, match="no weights of variant 'bf16' in text_encoder, transformer, vae"):
            load("Wan2.1", mixed, variant="bf16")

    def test_plain_files_are_asked_of_the_hub_only_where_there_is_no_variant(
        self, mixed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def snapshot_download(repo: str, *, allow_patterns: list[str], **options: Any) -> str:
            asked.extend(allow_patterns)
            return str(mixed)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        load("Wan2.1", Path("owner/name").as_posix(), variant="fp16")  # type: ignore[arg-type]
        assert [part for part in ("transformer", "vae") if _matches(f"{part}/{Path(TRANSFORMER).name}", asked)] == [
            "vae"
        ]
        assert _matches("transformer/diffusion_pytorch_model.fp16.safetensors", asked)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _change(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(change({name: weight.clone() for name, weight in load_file(file).items()}), file)


class TestTextEncoders:
    @pytest.mark.parametrize(
        ("family", "part", "change"),
        [
            pytest.param(
                "LTX-Video",
                "text_encoder",
                lambda w: w | {"decoder.final_layer_norm.weight": torch.ones(32), "lm_head.weight": torch.ones(4, 32)},
                id="T5 with its decoder",
            ),
            pytest.param(
                "HunyuanVideo",
                "text_encoder_2",
                lambda w: (
                    {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in w.items()}
                    | {"logit_scale": torch.ones(()), "vision_model.post_layernorm.weight": torch.ones(16)}
                ),
                id="whole CLIP",
            ),
            pytest.param(
                "HunyuanVideo",
                "text_encoder",
                lambda w: (
                    {f"language_model.model.{name}": weight for name, weight in w.items()}
                    | {"language_model.lm_head.weight": torch.ones(4, 32), "vision_tower.x": torch.ones(1)}
                ),
                id="language model with eyes",
            ),
        ],
    )
    def test_files_may_hold_more_than_is_needed(
        self, family: str, part: str, change: Any, stock: Stock, copy: Callable[[str], Path]
    ) -> None:
        folder = copy(family)
        _change(folder / part / "model.safetensors", change)
        got, expected = (getattr(each, part).state_dict() for each in (load(family, folder), stock.pipeline(family)))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], weight) for name, weight in expected.items())

    def test_what_nobody_knows_is_one_warning_and_what_lacks_an_error(self, copy: Callable[[str], Path]) -> None:
        folder = copy("LTX-Video")
        _change(folder / "text_encoder" / "model.safetensors", lambda w: w | {"other.weight": torch.ones(2)})
        with pytest.warns(UserWarning, match=r"T5EncoderModel has no place for other\.weight"):
            load("LTX-Video", folder)
        _change(folder / "text_encoder" / "model.safetensors", lambda w: {n: x for n, x in w.items() if "0" not in n})
        with pytest.raises(CheckpointError, match="lacks tensors of the module"):
            load("LTX-Video", folder)

    def test_scales_of_fp8_are_neither_unknown_nor_left_out(self, copy: Callable[[str], Path]) -> None:
        def narrow(weights: dict[str, Any]) -> dict[str, Any]:
            stored = {f"model.{name}": weight for name, weight in weights.items()}
            for name in [name for name in stored if "mlp" in name]:
                stored[name] = (stored[name] * 4).to(torch.float8_e4m3fn)
                stored[name.replace("weight", "scale_weight")] = torch.tensor(0.25)
            return stored | {"model.scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}

        folder = copy("HunyuanVideo")
        file = folder / "text_encoder" / "model.safetensors"
        before = load_file(file)["layers.0.mlp.up_proj.weight"]
        _change(file, narrow)
        weight = load("HunyuanVideo", folder, torch_dtype=torch.bfloat16).text_encoder.layers[0].mlp.up_proj.weight
        assert isinstance(weight, NarrowTensor)
        assert torch.equal(weight.dequantize(), (before * 4).to(torch.float8_e4m3fn).bfloat16() / 4)

    @pytest.mark.parametrize("family", ["HunyuanVideo"])
    def test_a_folder_in_fp8_gives_the_clip_of_its_wide_weights(
        self, family: str, copy: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder = copy(family)
        clips = []
        for dtype in (torch.float8_e4m3fn, torch.float32):
            for file in folder.rglob("*.safetensors"):
                _change(file, lambda w, to=dtype: {n: x.to(to) if x.is_floating_point() else x for n, x in w.items()})
            pipeline = load(family, folder, torch_dtype=torch.float32)
            call = {**FAMILIES[family].clip, "num_inference_steps": 2, "output_type": "pt"}
            clips.append(torch.as_tensor(pipeline("a cat", generator=seeded(), **call).frames))
            kept = [isinstance(weight, NarrowTensor) for weight in pipeline.transformer.parameters()]
            assert any(kept) == (dtype == torch.float8_e4m3fn)
        assert torch.equal(*clips)

    @pytest.mark.parametrize(("family", "part"), [("Wan2.1", "tokenizer"), ("HunyuanVideo", "tokenizer_2")])
    def test_a_tokenizer_without_its_config(
        self, family: str, part: str, stock: Stock, copy: Callable[[str], Path]
    ) -> None:
        folder = copy(family)
        (folder / part / "tokenizer_config.json").unlink()
        (ours, whole) = (getattr(each, part) for each in (load(family, folder), stock.pipeline(family)))
        assert type(ours) is type(whole)
        assert ours("a Cat, on the  mat").input_ids == whole("a Cat, on the  mat").input_ids


class TestNewerVersions:
    def test_keys_of_a_config_that_are_not_known_are_one_warning(self, copy: Callable[[str], Path]) -> None:
        folder = copy("Wan2.1")
        edit_json(folder / "transformer" / "config.json", some_new_key=None, another=3)
        with pytest.warns(UserWarning, match="does not know .*some_new_key=None") as caught:
            model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        assert len(caught) == 1
        assert "another=3" in str(caught[0].message)
        assert not hasattr(model.config, "another")

    def test_null_components_and_options_of_a_pipeline(self, copy: Callable[[str], Path]) -> None:
        folder = copy("Wan2.1")
        edit_json(folder / "model_index.json", new_encoder=[None, None], some_option=False)
        with pytest.warns(UserWarning, match=r"does not know new_encoder=\[None, None\], some_option=False") as caught:
            load("Wan2.1", folder)
        assert len(caught) == 1

    def test_a_component_that_is_there_and_not_known_is_refused(self, copy: Callable[[str], Path]) -> None:
        folder = copy("Wan2.1")
        edit_json(folder / "model_index.json", new_encoder=["transformers", "CLIPTextModel"])
        with pytest.raises(CheckpointError, match="new_encoder, which WanPipeline does not have"):
            load("Wan2.1", folder)
