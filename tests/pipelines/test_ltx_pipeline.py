"""The whole pipeline against diffusers' LTXPipeline, both loaded from the very same folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from checkpoints import LTX_VAES, edit_json, load_oracle, write_ltx_checkpoint

from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.offload.disk import span_of
from vramkit.pipelines.ltx.pipeline import LTXPipeline

SMALL = {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 5, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each version."""
    return {v: write_ltx_checkpoint(tmp_path_factory.mktemp("ltx"), version=v) for v in LTX_VAES}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["0.9.0"]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return load_oracle(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LTXPipeline:
    return load(folder)


@pytest.fixture
def pipeline(loaded: LTXPipeline) -> LTXPipeline:
    """A pipeline of its own for each test, around shared models."""
    fresh = LTXPipeline(**loaded.components)
    fresh.scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def load(folder: Path, **options: Any) -> LTXPipeline:
    pipeline = LTXPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def ready(name: str = "", lengths: tuple[int, ...] = (7,), seed: int = 3) -> dict[str, torch.Tensor]:
    """Ready embeddings of a text with their mask, as arguments of a call."""
    return {
        f"{name}prompt_embeds": torch.randn(len(lengths), 12, 32, generator=seeded(seed)),
        f"{name}prompt_attention_mask": (torch.arange(12) < torch.tensor(lengths)[:, None]).long(),
    }


NO_PROMPT = {"prompt": None}
HOLES = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]])
SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative prompt": {"negative_prompt": "blurry, worst quality"},
    "no guidance": {"guidance_scale": 1.0},
    "rescaled guidance": {"guidance_scale": 5.0, "guidance_rescale": 0.7},
    "one frame": {"num_frames": 1},
    "one frame, no guidance": {"num_frames": 1, "guidance_scale": 1.0},
    "two steps": {"num_inference_steps": 2},
    "other sizes": {"height": 96, "width": 32, "num_frames": 25},
    "other frame rate": {"frame_rate": 30},
    "long prompt that is cut": {"prompt": "a cat on a log in the water " * 8, "max_sequence_length": 12},
    "prompts of unequal length": {"prompt": ["a cat", "a dog in the deep snow under a tree"]},
    "lists": {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark, grey"]},
    "clips per prompt": {"prompt": "a cat", "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)]},
    "ready": NO_PROMPT | ready() | {"guidance_scale": 1.0},
    "ready, with a negative text": NO_PROMPT | ready(lengths=(7, 12)) | ready("negative_", (9, 2), 4),
    "ready, with holes": NO_PROMPT | ready() | {"guidance_scale": 1.0, "prompt_attention_mask": HOLES},
    "latents": {"latents": torch.randn(1, 18, 8, generator=seeded(9)).double()},
    "latent output": {"output_type": "latent"},
    "tensor output": {"output_type": "pt"},
}
TIMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "as in the model card": {"decode_timestep": 0.05, "decode_noise_scale": 0.025, "negative_prompt": "dark"},
    "timestep alone, one frame": {"decode_timestep": 0.3, "num_frames": 1, "guidance_scale": 1.0},
    "one for each clip": {"prompt": ["a cat", "a dog"], "decode_timestep": [0.1, 0.4], "decode_noise_scale": [0.3, 0]},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)], "decode_timestep": 0.2},
}  # fmt: skip


class TestSameClipAsDiffusers:
    def compare(self, pipeline: LTXPipeline, oracle: Any, arguments: dict[str, Any]) -> None:
        arguments = {"prompt": "a cat on a log", "generator": seeded, "output_type": "np", **SMALL, **arguments}
        make: Callable[[], Any] = arguments.pop("generator")
        clips = []
        for pipe in (pipeline, oracle):
            torch.manual_seed(5)  # the decoder of 0.9.1 draws from the global generator
            clips.append(pipe(**arguments, generator=make()).frames)
        ours, theirs = clips
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 1e-4
        assert float(torch.as_tensor(theirs).std()) > 0.02  # a flat picture would prove nothing

    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: LTXPipeline, oracle: Any) -> None:
        self.compare(pipeline, oracle, SAME_CLIP[case])

    @pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
    def test_decoders_that_are_told_a_timestep(self, version: str, folders: dict[str, Path]) -> None:
        ours, theirs = load(folders[version]), load_oracle(folders[version])
        for arguments in TIMED.values():
            self.compare(ours, theirs, arguments)
        clips = []
        for value in (0.0, 0.3):
            torch.manual_seed(5)
            clips.append(ours("a cat", **SMALL, decode_timestep=value, output_type="np", generator=seeded()).frames)
        assert relative_error(*clips) > 1e-2

    def test_what_is_compared_depends_on_it(self, pipeline: LTXPipeline) -> None:
        def clip(**changes: Any) -> Any:
            arguments = {"prompt": "a cat on a log", "output_type": "latent", **SMALL, **changes}
            return pipeline(**arguments, generator=seeded()).frames

        plain = clip()
        for changes in (
            {"prompt": "a dog in the snow"},
            {"negative_prompt": "blurry"},
            {"guidance_scale": 1.0},
            {"guidance_rescale": 0.7},
            {"frame_rate": 30},
            {"prompt": None, **ready()},
        ):
            assert relative_error(clip(**changes), plain) > 1e-3

    @pytest.mark.parametrize("num_frames", [2, 8, 10, 16])
    def test_other_numbers_of_frames_are_rounded_alike_with_a_warning(
        self, num_frames: int, pipeline: LTXPipeline, oracle: Any
    ) -> None:
        with pytest.warns(UserWarning, match=f"num_frames is {num_frames}.*8 \\* k \\+ 1") as caught:
            self.compare(pipeline, oracle, {"num_frames": num_frames, "num_inference_steps": 2})
        assert caught[0].filename == __file__

    def test_clips_of_several_prompts_are_those_of_each(self, pipeline: LTXPipeline) -> None:
        """diffusers mixes up the masks of prompts here, and cannot give several clips to ready embeddings."""
        few = {**SMALL, "num_inference_steps": 2, "output_type": "np"}
        noise = torch.randn(4, 18, 8, generator=seeded(1))
        prompts = ["a cat", "a dog in the deep snow under a tree"]
        together = pipeline(prompts, **few, num_videos_per_prompt=2, latents=noise).frames
        for index in range(4):
            alone = pipeline(prompts[index // 2], **few, latents=noise[index : index + 1]).frames
            assert relative_error(together[index], alone[0]) <= 1e-4
        text, negative = ready(), ready("negative_", seed=4)
        twice = pipeline(**text, **negative, **few, num_videos_per_prompt=2, latents=noise[:2]).frames
        alone = pipeline(**text, **negative, **few, latents=noise[1:2]).frames
        assert relative_error(twice[1], alone[0]) <= 1e-4

    def test_timesteps_take_the_place_of_even_ones(self, pipeline: LTXPipeline) -> None:
        arguments = {"prompt": "a cat", **SMALL, "output_type": "latent"}
        even = pipeline(**arguments, generator=seeded()).frames
        given = pipeline(**arguments, timesteps=[1000, 800, 600, 400, 200], generator=seeded()).frames
        assert relative_error(given, even) <= 1e-6
        other = pipeline(**arguments, timesteps=[1000, 993.5, 700], generator=seeded()).frames
        assert pipeline.num_timesteps == 3
        assert relative_error(other, even) > 1e-2

    def test_one_step_goes_from_noise_to_a_clip(self, pipeline: LTXPipeline) -> None:
        """The published schedule stretches to its last level and divides by zero when that is the first one too."""
        clip = pipeline("a cat", **SMALL | {"num_inference_steps": 1}, output_type="np", generator=seeded()).frames
        assert np.isfinite(clip).all()
        assert clip.std() > 0.02

    def test_shards(self, tmp_path: Path) -> None:
        folder = write_ltx_checkpoint(tmp_path, seed=1, max_shard_size="30KB")
        assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
        self.compare(load(folder), load_oracle(folder), {"negative_prompt": "dark"})

    @pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
    def test_lower_precision(self, version: str, folders: dict[str, Path]) -> None:
        pipelines = [make(folders[version], torch_dtype=torch.bfloat16) for make in (load, load_oracle)]
        for name in ("text_encoder", "transformer", "vae"):
            assert {getattr(pipe, name).dtype for pipe in pipelines} == {torch.bfloat16}
        arguments = {"prompt": "a cat on a log", **SMALL, "decode_timestep": 0.05}
        for output_type in ("latent", "pt"):
            clips = [pipe(**arguments, output_type=output_type, generator=seeded()).frames for pipe in pipelines]
            assert clips[0].dtype == clips[1].dtype
            assert relative_error(*clips) < 0.05  # rounding of 8 bits over five steps

    def test_pictures_are_the_default(self, pipeline: LTXPipeline, oracle: Any) -> None:
        (ours,), (theirs,) = (p("a cat", **SMALL, generator=seeded()).frames for p in (pipeline, oracle))
        assert len(ours) == len(theirs) == 17
        assert all(isinstance(frame, PIL.Image.Image) for frame in ours)
        worst = max(np.abs(np.subtract(a, b, dtype=np.int16)).max() for a, b in zip(ours, theirs, strict=True))
        assert worst <= 1  # a value at the border of rounding

    def test_tiled_decode(self, folder: Path, oracle: Any) -> None:
        tiles = {
            "tile_sample_min_height": 64,
            "tile_sample_min_width": 64,
            "tile_sample_stride_height": 32,
            "tile_sample_stride_width": 32,
        }
        arguments = {"height": 96, "width": 96, "num_frames": 33, "num_inference_steps": 2}
        ours, theirs = load(folder), load_oracle(folder)
        for pipe in (ours, theirs):
            pipe.vae.enable_tiling(**tiles)
            pipe.vae.use_framewise_decoding = True
        self.compare(ours, theirs, arguments)
        clips = [p("a cat", **arguments, output_type="np", generator=seeded()).frames for p in (ours, oracle)]
        assert relative_error(*clips) > 1e-3

    def test_callback_sees_and_changes_the_same(self, pipeline: LTXPipeline, oracle: Any) -> None:
        def run(pipe: Any) -> tuple[list[Any], Any]:
            seen: list[Any] = []

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                assert pipe.current_timestep is not None
                state = pipe.guidance_scale, pipe.guidance_rescale, pipe.num_timesteps
                seen.append((step, float(timestep), sorted(tensors), *state))
                pipe._interrupt = step == 3
                return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] + 0.1}

            clip = pipe(
                prompt="a cat",
                **SMALL,
                guidance_scale=1.0,
                output_type="np",
                generator=seeded(),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            ).frames
            return seen, clip

        ours, theirs = run(pipeline), run(oracle)
        assert ours[0] == theirs[0]
        assert len(ours[0]) == 4
        assert relative_error(ours[1], theirs[1]) <= 1e-4

    def test_return_dict(self, pipeline: LTXPipeline) -> None:
        arguments = {"prompt": "a cat", **SMALL, "num_inference_steps": 1, "output_type": "np"}
        (clip,) = pipeline(**arguments, generator=seeded(), return_dict=False)
        np.testing.assert_array_equal(clip, pipeline(**arguments, generator=seeded()).frames)

    @torch.no_grad()
    def test_encoded_prompts_equal_the_oracles(self, pipeline: LTXPipeline, oracle: Any) -> None:
        given = {"prompt": ["a cat", "a dog in the snow"], "negative_prompt": ["", "dark"], "max_sequence_length": 20}
        ours = pipeline.encode_prompt(**given)
        theirs = oracle.encode_prompt(**given, device=torch.device("cpu"))
        assert ours[0].shape == (2, 20, 32)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert relative_error(a, b) <= 1e-6
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        again = pipeline.encode_prompt(None, **dict(zip(names, ours, strict=True)), num_videos_per_prompt=2)
        assert all(torch.equal(a, b.repeat_interleave(2, dim=0)) for a, b in zip(again, ours, strict=True))
        assert pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)[2:] == (None, None)


class TestWrongArguments:
    @pytest.fixture
    def idle(self, pipeline: LTXPipeline, monkeypatch: pytest.MonkeyPatch) -> LTXPipeline:
        """A pipeline that fails the test when anything is computed."""

        def computed(*arguments: Any, **options: Any) -> Any:
            pytest.fail("a model ran")

        for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
            monkeypatch.setattr(model, "forward", computed)
        return pipeline

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"height": 80}, "height is 80; expected a multiple of 32, for example 64 or 96"),
            ({"width": 16}, "width is 16; expected a multiple of 32, for example 32"),
            ({"num_frames": 0}, "num_frames is 0"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"frame_rate": 0}, "frame_rate is 0; expected frames per second, above 0"),
            ({"guidance_scale": float("inf")}, "guidance_scale is inf; expected a finite number"),
            ({"guidance_rescale": "much"}, "guidance_rescale is 'much'"),
            ({"timesteps": []}, "expected falling numbers"),
            ({"timesteps": [500, 500, 100]}, r"timesteps is \[500, 500, 100\]; expected falling numbers"),
            ({"timesteps": [1001, 100]}, "from 1000 at most to above 0"),
            ({"timesteps": [900, 0]}, "from 1000 at most to above 0"),
            ({"decode_timestep": 1.5}, "decode_timestep is 1.5; expected a number from 0 to 1"),
            ({"decode_noise_scale": [0.1, 0.2]}, "decode_noise_scale has 2 entries; .* one for each of the 1 clips"),
            ({"decode_timestep": "early"}, "decode_timestep"),
            ({"prompt": None}, "there is no prompt"),
            ({"prompt": ["a", "b"], "negative_prompt": ["x"] * 3}, "2 prompts and 3 negative"),
            (ready(), "both prompt and prompt_embeds"),
            (
                NO_PROMPT | ready() | {"prompt_attention_mask": None},
                r"prompt_attention_mask is None; expected \(1, 12\)",
            ),
            (NO_PROMPT | ready() | {"prompt_attention_mask": torch.ones(1, 5)}, r"is \(1, 5\); expected \(1, 12\)"),
            ({"negative_prompt_embeds": torch.zeros(1, 12, 32)}, "negative_prompt_attention_mask is None"),
            ({"prompt_attention_mask": torch.ones(1, 5)}, "give both or none"),
            ({"output_type": "jpg"}, "output_type has 'jpg'"),
            ({"latents": torch.zeros(1, 8, 3, 2, 3)}, r"\(1, 8, 3, 2, 3\).*\(1, 18, 8\)"),
            ({"prompt": ["a"] * 3, "generator": [seeded()]}, "1 generators for 3 clips"),
        ],
    )
    def test_are_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: LTXPipeline) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    @pytest.mark.parametrize(
        ("missing", "arguments", "message"),
        [
            ("transformer", {}, "no transformer"),
            ("scheduler", {}, "no scheduler"),
            ("vae", {}, 'output_type="latent"'),
            ("text_encoder", {}, "give prompt_embeds"),
            ("tokenizer", NO_PROMPT | ready(), "give negative_prompt_embeds"),
        ],
    )
    def test_missing_components(self, missing: str, arguments: Any, message: str, idle: LTXPipeline) -> None:
        setattr(idle, missing, None)
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    def test_tokens_of_several_latents(self, loaded: LTXPipeline) -> None:
        config = {**{key: getattr(loaded.transformer.config, key) for key in loaded.transformer.config.__slots__}}
        transformer = type(loaded.transformer).from_config(config | {"patch_size": 2})
        with pytest.raises(ConfigError, match="patch_size=2, patch_size_t=1; expected 1 and 1"):
            LTXPipeline(**loaded.components | {"transformer": transformer})("a cat", **SMALL)


class TestLoading:
    def test_weights_are_mapped(self, loaded: LTXPipeline) -> None:
        for model in (loaded.text_encoder, loaded.transformer, loaded.vae):
            assert all(span_of(parameter) is not None for parameter in model.parameters())  # views of the files
        assert torch.equal(loaded.vae.latents_mean, load_oracle_vae(loaded).latents_mean)

    def test_null_components_stay_null(self, folder: Path, tmp_path: Path, oracle: Any) -> None:
        copied = shutil.copytree(folder, tmp_path / "copy")
        absent = ("tokenizer", "text_encoder", "vae")
        edit_json(copied / "model_index.json", **{name: [None, None] for name in absent})
        pipeline = load(copied)
        assert [name for name, part in pipeline.components.items() if part is None] == list(absent)
        arguments = ready() | ready("negative_") | SMALL | {"output_type": "latent"}
        latents = pipeline(**arguments, generator=seeded()).frames
        assert relative_error(latents, oracle(**arguments, generator=seeded()).frames) <= 1e-4

    @pytest.mark.parametrize("version", LTX_VAES)
    def test_saved_pipelines_are_read_by_both(self, version: str, folders: dict[str, Path], tmp_path: Path) -> None:
        pipeline = load(folders[version])
        pipeline.save_pretrained(tmp_path)
        arguments = {"prompt": "a cat", **SMALL, "output_type": "np"}
        clips = []
        for each in (pipeline, load(tmp_path), load_oracle(tmp_path)):
            torch.manual_seed(5)
            clips.append(each(**arguments, generator=seeded()).frames)
        np.testing.assert_array_equal(clips[0], clips[1])
        assert relative_error(clips[0], clips[2]) <= 1e-4


def load_oracle_vae(pipeline: LTXPipeline) -> Any:
    """diffusers' autoencoder, filled from ours by name."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(latent_channels=8, **LTX_VAES["0.9.0"])
    vae.load_state_dict(pipeline.vae.state_dict())
    return vae


class TestPlacement:
    def clip(self, pipeline: LTXPipeline) -> Any:
        torch.manual_seed(5)
        arguments = {"negative_prompt": "dark", "decode_timestep": 0.05, "output_type": "np"}
        return pipeline("a cat", **SMALL | {"num_inference_steps": 2}, **arguments, generator=seeded()).frames

    @pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_streamed_from_disk_is_the_same_clip(
        self, offload_type: str, version: str, folders: dict[str, Path]
    ) -> None:
        resident, streamed = load(folders[version]), load(folders[version])
        for model in (streamed.text_encoder, streamed.transformer, streamed.vae):
            apply_group_offloading(model, "cpu", offload_type=offload_type, store="disk")
        for _ in range(2):
            np.testing.assert_array_equal(self.clip(streamed), self.clip(resident))

    def test_whole_models_on_demand_are_the_same_clip(self, folders: dict[str, Path]) -> None:
        resident, streamed = load(folders["0.9.1"]), load(folders["0.9.1"])
        streamed.enable_model_cpu_offload("cpu")
        np.testing.assert_array_equal(self.clip(streamed), self.clip(resident))

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_cast_weights_streamed_or_not_are_the_same_clip(
        self, offload_type: str, folder: Path, pipeline: LTXPipeline
    ) -> None:
        cast = load(folder)
        cast.transformer.enable_layerwise_casting()
        cast.vae.enable_layerwise_casting()
        resident = self.clip(cast)
        assert 1e-5 < relative_error(resident, self.clip(pipeline)) < 0.5
        cast.transformer.enable_group_offload("cpu", offload_type=offload_type)
        cast.vae.enable_group_offload("cpu", offload_type=offload_type)
        np.testing.assert_array_equal(self.clip(cast), resident)
