"""The whole pipeline against diffusers' WanPipeline, both loaded from the very same folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from checkpoints import edit_json, load_oracle, write_wan_checkpoint

from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading, offload_of
from vramkit.offload.disk import span_of
from vramkit.pipelines.wan.pipeline import WanPipeline

SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 5}


@pytest.fixture(scope="session")
def oracle(wan_folder: Path) -> Any:
    return load_oracle(wan_folder)


@pytest.fixture(scope="session")
def loaded(wan_folder: Path) -> WanPipeline:
    return load(wan_folder)


@pytest.fixture
def pipeline(loaded: WanPipeline) -> WanPipeline:
    """A pipeline of its own for each test, around shared models."""
    fresh = WanPipeline(**loaded.components)
    fresh.scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config)
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.fixture
def copied(wan_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be spoiled."""
    return shutil.copytree(wan_folder, tmp_path / "copy")


def load(folder: Path, **options: Any) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def embeds(tokens: int = 12, batch: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, generator=seeded(seed))


SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative prompt": {"negative_prompt": "blurry, worst quality"},
    "no guidance": {"guidance_scale": 1.0},
    "strong guidance": {"guidance_scale": 9.5},
    "one frame": {"num_frames": 1},
    "many frames": {"num_frames": 25, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
    "other sizes": {"height": 48, "width": 32},
    "prompt to be cleaned": {"prompt": " a  cat &amp; a\n\u00e2\u20ac\u0153dog\u00e2\u20ac\x9d "},
    "prompt that is cut": {"prompt": "a cat on a log in the water " * 8, "max_sequence_length": 16},
    "prompt list": {"prompt": ["a cat", "a dog in the snow"]},
    "prompt and negative lists": {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark, low quality"]},
    "clips per prompt": {"prompt": ["a cat", "a dog"], "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)]},
    "generator list of one": {"generator": lambda: [seeded(4)]},
    "ready embeds": {"prompt": None, "prompt_embeds": embeds(), "negative_prompt_embeds": embeds(9, seed=4)},
    "ready embeds, negative text": {"prompt": None, "prompt_embeds": embeds(512), "negative_prompt": "blurry"},
    "ready embeds, no guidance": {"prompt": None, "prompt_embeds": embeds(5, 2), "guidance_scale": 0.0},
    "latents": {"latents": torch.randn(1, 16, 3, 4, 6, generator=seeded(9))},
    "latents in double": {"latents": torch.randn(1, 16, 3, 4, 6, generator=seeded(9)).double()},
    "latent output": {"output_type": "latent"},
    "tensor output": {"output_type": "pt"},
}


class TestSameClipAsDiffusers:
    def compare(self, pipeline: WanPipeline, oracle: Any, arguments: dict[str, Any]) -> None:
        arguments = {"prompt": "a cat on a log", "generator": seeded, **SMALL, **arguments}
        make: Callable[[], Any] = arguments.pop("generator")
        ours = pipeline(**arguments, generator=make()).frames
        theirs = oracle(**arguments, generator=make()).frames
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 1e-4
        assert float(torch.as_tensor(theirs).std()) > 0.05  # a flat picture would prove nothing

    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: WanPipeline, oracle: Any) -> None:
        self.compare(pipeline, oracle, SAME_CLIP[case])

    @pytest.mark.parametrize("num_frames", [2, 3, 4, 8, 10])
    def test_other_numbers_of_frames_are_rounded_alike_with_a_warning(
        self, num_frames: int, pipeline: WanPipeline, oracle: Any
    ) -> None:
        with pytest.warns(UserWarning, match=f"num_frames is {num_frames}.*4 \\* k \\+ 1") as caught:
            self.compare(pipeline, oracle, {"num_frames": num_frames, "num_inference_steps": 1})
        assert caught[0].filename == __file__

    def test_euler_schedule(self, tmp_path: Path) -> None:
        folder = write_wan_checkpoint(tmp_path, scheduler="euler", seed=1)
        self.compare(load(folder), load_oracle(folder), {"negative_prompt": "dark"})

    def test_flow_shift_of_the_seed_scripts(self, pipeline: WanPipeline, oracle: Any, wan_folder: Path) -> None:
        other = load_oracle(wan_folder)
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config, flow_shift=5.0)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=5.0)
        self.compare(pipeline, other, {})

    def test_lower_precision(self, wan_folder: Path) -> None:
        dtypes = {"default": torch.bfloat16, "vae": torch.float32}
        ours, theirs = load(wan_folder, torch_dtype=dtypes), load_oracle(wan_folder, torch_dtype=dtypes)
        assert {name: ours.components[name].dtype for name in ("text_encoder", "transformer", "vae")} == {
            name: getattr(theirs, name).dtype for name in ("text_encoder", "transformer", "vae")
        }
        arguments = {"prompt": "a cat on a log", **SMALL, "output_type": "latent"}
        clips = [p(**arguments, generator=seeded()).frames for p in (ours, theirs)]
        assert clips[0].dtype == clips[1].dtype == torch.float32
        assert relative_error(*clips) < 0.05  # rounding of 8 bits over five steps

    def test_pictures(self, pipeline: WanPipeline, oracle: Any) -> None:
        arguments = {"prompt": "a cat", **SMALL, "output_type": "pil"}
        (ours,), (theirs,) = (p(**arguments, generator=seeded()).frames for p in (pipeline, oracle))
        assert len(ours) == len(theirs) == 9
        assert all(isinstance(frame, PIL.Image.Image) for frame in ours)
        worst = max(np.abs(np.subtract(a, b, dtype=np.int16)).max() for a, b in zip(ours, theirs, strict=True))
        assert worst <= 1  # a value at the border of rounding

    def test_callback_sees_and_changes_the_same(self, pipeline: WanPipeline, oracle: Any) -> None:
        def run(pipe: Any) -> tuple[list[Any], Any]:
            seen: list[Any] = []

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                assert pipe.current_timestep is not None
                seen.append((step, float(timestep), sorted(tensors), pipe.guidance_scale, pipe.num_timesteps))
                return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] + 0.1}

            clip = pipe(
                prompt="a cat",
                **SMALL,
                generator=seeded(),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"],
            ).frames
            return seen, clip

        ours, theirs = run(pipeline), run(oracle)
        assert ours[0] == theirs[0]
        assert len(ours[0]) == 5
        assert relative_error(ours[1], theirs[1]) <= 1e-4

    def test_interrupting_skips_the_remaining_steps(self, pipeline: WanPipeline, oracle: Any) -> None:
        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == 1
            return {}

        clips = [
            pipe(prompt="a cat", **SMALL, generator=seeded(), callback_on_step_end=stop).frames
            for pipe in (pipeline, oracle)
        ]
        assert relative_error(*clips) <= 1e-4
        again = pipeline(prompt="a cat", **SMALL, generator=seeded()).frames  # the next call is not interrupted
        assert relative_error(again, oracle(prompt="a cat", **SMALL, generator=seeded()).frames) <= 1e-4

    def test_return_dict(self, pipeline: WanPipeline) -> None:
        arguments = {"prompt": "a cat", **SMALL, "num_inference_steps": 1}
        (clip,) = pipeline(**arguments, generator=seeded(), return_dict=False)
        np.testing.assert_array_equal(clip, pipeline(**arguments, generator=seeded()).frames)


class TestWrongArguments:
    @pytest.fixture
    def idle(self, pipeline: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> WanPipeline:
        """A pipeline that fails the test when anything is computed."""

        def computed(*arguments: Any, **options: Any) -> Any:
            pytest.fail("a model ran")

        for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
            monkeypatch.setattr(model, "forward", computed)
        return pipeline

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"height": 40}, "height is 40; expected a multiple of 16, for example 32 or 48"),
            ({"width": 8}, "width is 8; expected a multiple of 16, for example 16"),
            ({"width": 0}, "width is 0"),
            ({"height": 32.0}, "height is 32.0"),
            ({"num_frames": 0}, "num_frames is 0"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"num_inference_steps": True}, "num_inference_steps is True"),
            ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite number"),
            ({"guidance_scale": "5"}, "guidance_scale is '5'"),
            ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
            ({"max_sequence_length": 0}, "max_sequence_length is 0"),
            ({"prompt": None}, "there is no prompt"),
            ({"prompt": 3}, "prompt is 3"),
            ({"prompt": []}, "prompt is \\[\\]"),
            ({"prompt": ["a", None]}, "prompt is"),
            ({"prompt_embeds": embeds()}, "both prompt and prompt_embeds"),
            ({"negative_prompt": "x", "negative_prompt_embeds": embeds()}, "both negative_prompt"),
            ({"prompt": None, "prompt_embeds": embeds()[0]}, "prompt_embeds is .*12, 32"),
            ({"prompt": None, "prompt_embeds": "x"}, "prompt_embeds is str"),
            ({"prompt": ["a", "b"], "negative_prompt": ["x", "y", "z"]}, "2 prompts and 3 negative"),
            ({"negative_prompt_embeds": embeds(batch=2)}, "1 prompts and 2 negative"),
            (
                {"prompt": None, "prompt_embeds": embeds(), "negative_prompt_embeds": embeds()[..., :16]},
                "32 channels, negative_prompt_embeds 16",
            ),
            ({"output_type": "jpg"}, "output_type has 'jpg'; expected some of np, pt, pil, latent"),
            ({"callback_on_step_end_tensor_inputs": ["latents", "noise"]}, "'noise'"),
            ({"latents": torch.zeros(1, 16, 3, 4, 4)}, r"\(1, 16, 3, 4, 4\).*\(1, 16, 3, 4, 6\)"),
            ({"prompt": ["a"] * 3, "generator": [seeded(), seeded()]}, "2 generators for 3 clips"),
            ({"prompt": ["a"] * 3, "generator": [seeded()]}, "1 generators for 3 clips"),
        ],
    )
    def test_are_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: WanPipeline) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    @pytest.mark.parametrize(
        ("missing", "arguments", "message"),
        [
            ("transformer", {}, "no transformer"),
            ("scheduler", {}, "no scheduler"),
            ("vae", {}, 'output_type="latent"'),
            ("text_encoder", {}, "prompt_embeds"),
            ("tokenizer", {"prompt": None, "prompt_embeds": embeds()}, "negative_prompt_embeds"),
        ],
    )
    def test_missing_components(self, missing: str, arguments: Any, message: str, idle: WanPipeline) -> None:
        setattr(idle, missing, None)
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})


class TestLoading:
    def test_weights_are_mapped_and_frozen(self, loaded: WanPipeline) -> None:
        for model in (loaded.text_encoder, loaded.transformer, loaded.vae):
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
            assert all(span_of(parameter) is not None for parameter in model.parameters())  # views of the files

    def test_text_encoder_equals_its_own_class(self, loaded: WanPipeline, oracle: Any) -> None:
        ours, theirs = loaded.text_encoder, oracle.text_encoder
        assert type(ours) is type(theirs)
        assert ours.shared.weight is ours.encoder.embed_tokens.weight
        theirs_by_name = theirs.state_dict()
        assert ours.state_dict().keys() == theirs_by_name.keys()
        assert all(torch.equal(tensor, theirs_by_name[name]) for name, tensor in ours.state_dict().items())

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

    @pytest.mark.parametrize(
        "layout", [{"max_shard_size": "100KB"}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "100KB"}]
    )
    def test_shards_and_variants(self, layout: dict[str, str], tmp_path: Path, oracle: Any) -> None:
        write_wan_checkpoint(tmp_path, **layout)
        shards = [len(list((tmp_path / part).glob("*-of-*.safetensors"))) for part in ("transformer", "text_encoder")]
        assert all(count > 1 for count in shards) == ("max_shard_size" in layout)
        if "variant" in layout:
            with pytest.raises(CheckpointError, match="safetensors"):
                load(tmp_path)
        clip = load(tmp_path, variant=layout.get("variant"))("a cat", **SMALL, generator=seeded()).frames
        assert relative_error(clip, oracle("a cat", **SMALL, generator=seeded()).frames) <= 1e-4

    def test_ready_components_are_used_and_not_loaded(self, copied: Path, loaded: WanPipeline) -> None:
        shutil.rmtree(copied / "vae")
        shutil.rmtree(copied / "transformer")
        pipeline = load(copied, vae=loaded.vae, transformer=None)
        assert pipeline.vae is loaded.vae
        assert pipeline.transformer is None
        assert pipeline.text_encoder is not None

    def test_null_components_stay_null(self, copied: Path, oracle: Any) -> None:
        edit_json(copied / "model_index.json", text_encoder=[None, None], tokenizer=[None, None], vae=[None, None])
        pipeline = load(copied)
        assert [name for name, part in pipeline.components.items() if part is None] == [
            "tokenizer",
            "text_encoder",
            "transformer_2",
            "vae",
        ]
        arguments = {
            "prompt_embeds": embeds(),
            "negative_prompt_embeds": embeds(seed=5),
            "output_type": "latent",
            **SMALL,
        }
        latents = pipeline(**arguments, generator=seeded()).frames
        assert relative_error(latents, oracle(**arguments, generator=seeded()).frames) <= 1e-4

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
            ({"boundary_ratio": 0.875}, "Wan2.2"),
            ({"expand_timesteps": True}, "Wan2.2"),
            ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2 is missing|Wan2.2"),
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

    def test_saved_pipelines_are_read_by_both(self, loaded: WanPipeline, tmp_path: Path, oracle: Any) -> None:
        loaded.save_pretrained(tmp_path)
        clips = [pipe("a cat", **SMALL, generator=seeded()).frames for pipe in (load(tmp_path), load_oracle(tmp_path))]
        expected = oracle("a cat", **SMALL, generator=seeded()).frames
        assert relative_error(clips[0], expected) <= 1e-4
        assert relative_error(clips[1], expected) <= 1e-6


class TestPlacement:
    def test_to(self, wan_folder: Path) -> None:
        pipeline = load(wan_folder).to(torch.float64)
        assert pipeline.transformer.dtype == pipeline.dtype == torch.float64
        assert pipeline.vae.dtype == torch.float64
        assert pipeline.device == torch.device("cpu")

    def test_offloaded_models_keep_their_place(self, wan_folder: Path) -> None:
        pipeline = load(wan_folder)
        handle = apply_group_offloading(pipeline.transformer, "cpu", offload_type="leaf_level", store="disk")
        pipeline.to("meta")  # anything that moved has lost its weights
        assert pipeline.vae.device.type == "meta"
        assert pipeline.transformer.device.type == "cpu"
        handle.remove()

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_streamed_from_disk_is_the_same_clip(
        self, offload_type: str, wan_folder: Path, pipeline: WanPipeline
    ) -> None:
        streamed = load(wan_folder)
        for model in (streamed.text_encoder, streamed.transformer, streamed.vae):
            apply_group_offloading(model, "cpu", offload_type=offload_type, store="disk")
        for _ in range(2):
            clips = [p("a cat", **SMALL, generator=seeded()).frames for p in (pipeline, streamed)]
            np.testing.assert_array_equal(*clips)

    def test_whole_models_on_demand_are_the_same_clip(self, wan_folder: Path, pipeline: WanPipeline) -> None:
        streamed = load(wan_folder)
        streamed.enable_model_cpu_offload("cpu")
        streamed.enable_model_cpu_offload("cpu")  # again is harmless
        assert offload_of(streamed.vae) is not None
        clips = [p("a cat", **SMALL, generator=seeded()).frames for p in (pipeline, streamed)]
        np.testing.assert_array_equal(*clips)

    def test_model_offload_needs_a_device(self, loaded: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="no GPU"):
            loaded.enable_model_cpu_offload()

    def test_progress_bar(self, pipeline: WanPipeline, capsys: pytest.CaptureFixture[str]) -> None:
        pipeline.set_progress_bar_config(desc="denoising")
        pipeline("a cat", **SMALL, generator=seeded())
        shown = capsys.readouterr().err
        assert "denoising: 100%" in shown
        assert "5/5" in shown

    def test_is_quiet_otherwise(self, pipeline: WanPipeline) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline("a cat", **SMALL, generator=seeded())
