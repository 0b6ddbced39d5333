"""What is Wan's own in its pipeline, against diffusers', and how checkpoints are read that are not as they should be."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from checkpoints import edit_json, load_oracle, write_wan_checkpoint
from families import compare

from vramkit.errors import CheckpointError, ConfigError

SMALL = {"height": 32, "width": 48, "num_frames": 9}
load, ready = partial(families.load, "Wan2.1"), partial(families.ready, "Wan2.1")
NEGATIVE = ready("negative_", seed=4)


@pytest.fixture
def family() -> str:
    return "Wan2.1"


SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain, with 512 tokens": {},
    "strong guidance": {"guidance_scale": 9.5},
    "many frames": {"num_frames": 25, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
    "prompt to be cleaned": {"prompt": " a  cat &amp; a\n\u00e2\u20ac\u0153dog\u00e2\u20ac\x9d "},
    "clips per prompt": {"prompt": ["a cat", "a dog"], "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "ready embeds": ready() | ready("negative_", tokens=9, seed=4),
    "ready embeds, negative text": ready(tokens=512) | {"negative_prompt": "blurry"},
    "ready embeds, no guidance": ready(tokens=5, lengths=(5, 5)) | {"guidance_scale": 0.0},
    "latents in double": {"latents": families.normal(1, 16, 3, 4, 6, seed=9).double()},
}


class TestSameClipAsDiffusers:
    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: Any, oracle: Any) -> None:
        compare(pipeline, oracle, **SMALL | SAME_CLIP[case])

    def test_euler_schedule(self, tmp_path: Path) -> None:
        folder = write_wan_checkpoint(tmp_path, scheduler="euler", seed=1)
        compare(load(folder), load_oracle(folder), **SMALL, negative_prompt="dark")

    def test_flow_shift_of_the_seed_scripts(self, pipeline: Any, wan_folder: Path) -> None:
        other = load_oracle(wan_folder)
        for pipe in (pipeline, other):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
        compare(pipeline, other, **SMALL)

    def test_callback_changes_the_texts_of_guidance(self, pipeline: Any, oracle: Any) -> None:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] + 0.1}

        watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        compare(pipeline, oracle, **SMALL, **watched)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (NEGATIVE | {"negative_prompt": "x"}, "both negative_prompt"),
            (
                {"prompt": None, "prompt_embeds": ready()["prompt_embeds"][0]},
                r"has shape \(12, 32\); expected \(prompts, ",
            ),
            ({"prompt": None, "prompt_embeds": "x"}, "prompt_embeds is a str"),
            (ready("negative_", lengths=(7, 7)), "1 prompts and 2 negative"),
            (
                {"prompt": None, **ready(), "negative_prompt_embeds": NEGATIVE["negative_prompt_embeds"][..., :16]},
                "negative_prompt_embeds has 16 channels; the transformer takes 32",
            ),
        ],
    )
    def test_are_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})


class TestLoading:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_text_encoder_keeps_the_wide_parts_that_transformers_keeps(
        self, dtype: torch.dtype, wan_folder: Path
    ) -> None:
        from transformers import UMT5EncoderModel

        theirs = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder", dtype=dtype)
        ours = load(wan_folder, torch_dtype=dtype, transformer=None, vae=None).text_encoder
        assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
        wide = [name for name, parameter in ours.named_parameters() if parameter.dtype == torch.float32]
        assert bool(wide) == (dtype == torch.float16)

    @pytest.mark.parametrize("layout", [{"max_shard_size": "100KB"}, {"variant": "fp16"}])
    def test_shards_and_variants(self, layout: dict[str, str], tmp_path: Path, oracle: Any) -> None:
        write_wan_checkpoint(tmp_path, **layout)
        shards = [len(list((tmp_path / part).glob("*-of-*.safetensors"))) for part in ("transformer", "text_encoder")]
        assert all(count > 1 for count in shards) == ("max_shard_size" in layout)
        compare(load(tmp_path, variant=layout.get("variant")), oracle, **SMALL)

    def test_ready_components_are_used_and_not_loaded(self, copied: Path, pipeline: Any) -> None:
        shutil.rmtree(copied / "vae")
        shutil.rmtree(copied / "transformer")
        partly = load(copied, vae=pipeline.vae, transformer=None)
        assert partly.vae is pipeline.vae
        assert partly.transformer is None
        assert partly.text_encoder is not None

    def test_components_missing_from_the_index_are_null(self, copied: Path) -> None:
        index = copied / "model_index.json"
        index.write_text(index.read_text().replace('"transformer_2"', '"_transformer_2"'))
        assert load(copied).transformer_2 is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vae": ["diffusers", "AutoencoderKLMochi"]}, "diffusers.AutoencoderKLMochi as 'vae'.*pass vae="),
            ({"vae": ["evil", "AutoencoderKLWan"]}, "evil.AutoencoderKLWan"),
            ({"vae": 3}, r"vae is 3, expected \[library, class\]"),
            ({"_class_name": "WanImageToVideoPipeline"}, "WanImageToVideoPipeline, not of WanPipeline"),
            ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "image_encoder"),
            ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2 is missing"),
        ],
    )
    def test_other_checkpoints_are_refused_by_name(self, changes: Any, message: str, copied: Path) -> None:
        edit_json(copied / "model_index.json", **changes)
        with pytest.raises(CheckpointError, match=message):
            load(copied)

    @pytest.mark.parametrize("text", ["{", "[]", "\x00"])
    def test_damaged_index(self, text: str, copied: Path) -> None:
        (copied / "model_index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"model_index\.json"):
            load(copied)

    def test_missing_parts(self, copied: Path) -> None:
        (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="vae"):
            load(copied)
        shutil.rmtree(copied / "vae")
        with pytest.raises(CheckpointError, match=r"vae is missing.*pass vae="):
            load(copied)
        shutil.rmtree(copied / "tokenizer")
        with pytest.raises(CheckpointError, match="tokenizer"):
            load(copied)
        (copied / "model_index.json").unlink()
        with pytest.raises(CheckpointError, match=r"no model_index\.json"):
            load(copied)

    def test_damaged_tokenizer(self, copied: Path) -> None:
        (copied / "tokenizer" / "tokenizer.json").write_text("{}")
        with pytest.raises(CheckpointError, match="tokenizer"):
            load(copied)
        (copied / "tokenizer" / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json or .*; it holds tokenizer_config"):
            load(copied)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not JSON"),
            ("[]", "expected a JSON object"),
            ('{"d_ff": "many"}', "does not describe a UMT5EncoderModel: .*d_ff"),
            ('{"d_ff": -3}', "does not describe a UMT5EncoderModel"),
        ],
    )
    def test_damaged_config_of_the_text_encoder(self, text: str, message: str, copied: Path) -> None:
        path = copied / "text_encoder" / "config.json"
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(copied)
        path.unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json"):  # and not the defaults of the class
            load(copied)

    def test_pickled_weights_are_not_read(self, copied: Path) -> None:
        weights = copied / "text_encoder" / "model.safetensors"
        torch.save({}, weights.with_name("pytorch_model.bin"))
        weights.unlink()
        with pytest.raises(CheckpointError, match="safetensors"):
            load(copied)

    def test_wrong_names_are_refused(self, wan_folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"unknown component unet.*transformer"):
            load(wan_folder, unet=None)
        with pytest.raises(ConfigError, match=r"unknown torch_dtype for unet.*default"):
            load(wan_folder, torch_dtype={"unet": torch.float16})
