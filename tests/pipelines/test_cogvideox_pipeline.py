"""The whole pipeline against diffusers' CogVideoXPipeline, both loaded from the very same folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from checkpoints import edit_json, load_oracle, write_cogvideox_checkpoint

from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.pipelines.cogvideox.pipeline import CogVideoXPipeline
from vramkit.pipelines.schedulers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

SMALL: dict[str, Any] = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 5,
    "max_sequence_length": 16,
    "output_type": "np",
}
ROTARY = {"use_rotary_positional_embeddings": True}
# 2B, 5B and 1.5 as far as their positions, schedulers and patches go.
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"scheduler": "dpm", "transformer": ROTARY},
    "1.5": {
        "transformer": ROTARY | {"patch_size_t": 2, "patch_bias": False, "sample_height": 30, "sample_width": 30},
        "vae": {"invert_scale_latents": True, "scaling_factor": 0.7},
    },
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def find(variant: str) -> Path:
        if variant not in written:
            written[variant] = write_cogvideox_checkpoint(tmp_path_factory.mktemp("cogvideox"), **VARIANTS[variant])
        return written[variant]

    return find


@pytest.fixture(scope="module")
def pair_of(folder_of: Callable[[str], Path]) -> Callable[[str], tuple[CogVideoXPipeline, Any]]:
    """Our pipeline and diffusers', each variant loaded once."""
    loaded: dict[str, tuple[CogVideoXPipeline, Any]] = {}

    def find(variant: str) -> tuple[CogVideoXPipeline, Any]:
        if variant not in loaded:
            loaded[variant] = load(folder_of(variant)), load_oracle(folder_of(variant))
        return loaded[variant]

    return find


@pytest.fixture
def pipeline(pair_of: Callable[[str], Any]) -> CogVideoXPipeline:
    """A pipeline of its own for each test, around shared models."""
    loaded, _ = pair_of("2b")
    fresh = CogVideoXPipeline(**loaded.components)
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.fixture
def oracle(pair_of: Callable[[str], Any]) -> Any:
    return pair_of("2b")[1]


def load(folder: Path, **options: Any) -> CogVideoXPipeline:
    pipeline = CogVideoXPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(ours: Any, theirs: Any) -> float:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def embeds(tokens: int = 16, batch: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, generator=seeded(seed))


SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative prompt": {"negative_prompt": "blurry, worst quality"},
    "no guidance": {"guidance_scale": 1.0},
    "dynamic guidance": {"use_dynamic_cfg": True, "negative_prompt": "dark"},
    "dynamic guidance without any": {"use_dynamic_cfg": True, "guidance_scale": 1.0},
    "one frame": {"num_frames": 1},
    "an even number of frames": {"num_frames": 16},
    "many frames": {"num_frames": 25, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
    "other sizes": {"height": 48, "width": 32},
    "trained sizes": {"height": None, "width": None, "num_frames": None},
    "eta": {"eta": 0.7},
}
MORE: dict[str, dict[str, Any]] = {
    "prompt that is cut": {"prompt": "a cat on a log in the water " * 8},
    "prompt that is not cleaned": {"prompt": " a  cat &amp; a\n dog "},
    "prompt list": {"prompt": ["a cat", "a dog in the snow"]},
    "prompt and negative lists": {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark, low quality"]},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)]},
    "ready embeds": {"prompt": None, "prompt_embeds": embeds(), "negative_prompt_embeds": embeds(seed=4)},
    "ready embeds, no guidance": {"prompt": None, "prompt_embeds": embeds(batch=2), "guidance_scale": 0.0},
    "latents": {"latents": torch.randn(1, 3, 4, 4, 6, generator=seeded(9))},
    "latent output": {"output_type": "latent"},
    "tensor output": {"output_type": "pt"},
}


class TestSameClipAsDiffusers:
    def compare(self, pipeline: CogVideoXPipeline, oracle: Any, arguments: dict[str, Any]) -> None:
        arguments = {"prompt": "a cat on a log", "generator": seeded, **SMALL, **arguments}
        make: Callable[[], Any] = arguments.pop("generator")
        ours = pipeline(**arguments, generator=make()).frames
        theirs = oracle(**arguments, generator=make()).frames
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) <= 1e-4
        assert float(torch.as_tensor(theirs).std()) > 0.05  # a flat picture would prove nothing

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_variants(self, case: str, variant: str, pair_of: Callable[[str], Any]) -> None:
        arguments = SAME_CLIP[case]
        if variant == "1.5" and case == "trained sizes":
            arguments = {"num_frames": None}  # 240 x 240 pixels would take long
        self.compare(*pair_of(variant), arguments)

    @pytest.mark.parametrize("case", MORE)
    def test_arguments(self, case: str, pipeline: CogVideoXPipeline, oracle: Any) -> None:
        self.compare(pipeline, oracle, MORE[case])

    @pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
    def test_other_schedules(self, kind: Any, pipeline: CogVideoXPipeline, oracle: Any, folder_of: Any) -> None:
        import diffusers

        other = load_oracle(folder_of("2b"))
        changes = {"timestep_spacing": "linspace", "snr_shift_scale": 3.0}
        other.scheduler = getattr(diffusers, kind.__name__).from_config(other.scheduler.config, **changes)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
        self.compare(pipeline, other, {"num_inference_steps": 7})

    @pytest.mark.parametrize(("num_frames", "made"), [(4, 1), (5, 8), (12, 9), (13, 16)])
    def test_other_multiples_of_four_make_what_diffusers_makes(
        self, num_frames: int, made: int, pipeline: CogVideoXPipeline, oracle: Any
    ) -> None:
        with pytest.warns(UserWarning, match=f"num_frames is {num_frames},.*Making {made} frames") as caught:
            self.compare(pipeline, oracle, {"num_frames": num_frames, "num_inference_steps": 1})
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("num_videos_per_prompt", [1, 2])
    def test_clips_per_prompt_are_those_of_a_repeated_prompt(
        self, num_videos_per_prompt: int, pipeline: CogVideoXPipeline, oracle: Any
    ) -> None:
        """Diffusers reads the argument and makes one clip of each prompt."""
        prompts = ["a cat", "a dog"]
        ours = pipeline(prompts, **SMALL, generator=seeded(), num_videos_per_prompt=num_videos_per_prompt).frames
        repeated = [prompt for prompt in prompts for _ in range(num_videos_per_prompt)]
        assert error(ours, oracle(repeated, **SMALL, generator=seeded()).frames) <= 1e-4

    def test_latents_of_another_dtype(self, pipeline: CogVideoXPipeline) -> None:
        latents = torch.randn(1, 3, 4, 4, 6, generator=seeded(9))
        clips = [pipeline("a cat", **SMALL, latents=noise).frames for noise in (latents, latents.double())]
        assert error(*clips) <= 1e-5

    @pytest.mark.parametrize("variant", ["2b", "5b"])
    def test_lower_precision(self, variant: str, folder_of: Callable[[str], Path]) -> None:
        pipelines = [make(folder_of(variant), torch_dtype=torch.bfloat16) for make in (load, load_oracle)]
        arguments = {"prompt": "a cat on a log", **SMALL, "output_type": "latent"}
        clips = [p(**arguments, generator=seeded()).frames for p in pipelines]
        assert clips[0].dtype == clips[1].dtype == torch.bfloat16
        assert (clips[0] - clips[1]).norm() < 0.05 * clips[1].norm()  # rounding of 8 bits over five steps

    def test_pictures(self, pipeline: CogVideoXPipeline, oracle: Any) -> None:
        arguments = {"prompt": "a cat", **{k: v for k, v in SMALL.items() if k != "output_type"}}
        (ours,), (theirs,) = (p(**arguments, generator=seeded()).frames for p in (pipeline, oracle))
        assert len(ours) == len(theirs) == 9
        assert all(isinstance(frame, PIL.Image.Image) for frame in ours)
        worst = max(np.abs(np.subtract(a, b, dtype=np.int16)).max() for a, b in zip(ours, theirs, strict=True))
        assert worst <= 1  # a value at the border of rounding

    def test_callback_sees_and_changes_the_same(self, pipeline: CogVideoXPipeline, oracle: Any) -> None:
        def run(pipe: Any) -> tuple[list[Any], Any]:
            seen: list[Any] = []

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                seen.append((step, float(timestep), sorted(tensors), round(pipe.guidance_scale, 9), pipe.num_timesteps))
                return {"latents": tensors["latents"] * 0.9}

            return seen, pipe(
                "a cat", **SMALL, generator=seeded(), use_dynamic_cfg=True, callback_on_step_end=callback
            ).frames

        ours, theirs = run(pipeline), run(oracle)
        assert ours[0] == theirs[0]
        assert len({scale for *_, scale, _ in ours[0]}) > 1  # it varied
        assert error(ours[1], theirs[1]) <= 1e-4

    def test_interrupting_skips_the_remaining_steps(self, pipeline: CogVideoXPipeline, oracle: Any) -> None:
        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == 1
            return {}

        clips = [p("a cat", **SMALL, generator=seeded(), callback_on_step_end=stop).frames for p in (pipeline, oracle)]
        assert error(*clips) <= 1e-4

    def test_tiled_decode(self, folder_of: Callable[[str], Path]) -> None:
        pipelines = load(folder_of("2b")), load_oracle(folder_of("2b"))
        for each in pipelines:
            each.vae.enable_tiling()
            each.vae.enable_slicing()
        self.compare(*pipelines, {"height": 80, "width": 64, "num_inference_steps": 2, "prompt": ["a cat", "a dog"]})


class TestWrongArguments:
    @pytest.fixture
    def idle(self, pipeline: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> CogVideoXPipeline:
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
            ({"height": 0}, "height is 0"),
            ({"num_frames": 50}, r"num_frames is 50; CogVideoX makes 8 \* k or 8 \* k \+ 1 .* 49 or 56"),
            ({"num_frames": 3}, "for example 1 or 8"),
            ({"num_frames": 0}, "num_frames is 0"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"timesteps": [999, 500]}, r"timesteps is \[999, 500\].*num_inference_steps"),
            ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
            ({"eta": "much"}, "eta is 'much'"),
            ({"prompt": None}, "there is no prompt"),
            ({"prompt_embeds": embeds()}, "both prompt and prompt_embeds"),
            ({"negative_prompt_embeds": embeds(batch=2)}, "1 prompts and 2 negative"),
            ({"output_type": "jpg"}, "output_type has 'jpg'"),
            ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
            ({"latents": torch.zeros(1, 4, 3, 4, 6)}, r"\(1, 4, 3, 4, 6\).*\(1, 3, 4, 4, 6\)"),
            ({"prompt": ["a"] * 3, "generator": [seeded(), seeded()]}, "2 generators for 3 clips"),
        ],
    )
    def test_are_refused_before_anything_runs(
        self, arguments: dict[str, Any], message: str, idle: CogVideoXPipeline
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    def test_pictures_that_have_no_positions(self, pair_of: Callable[[str], Any]) -> None:
        with pytest.raises(ConfigError, match="width is 256; this checkpoint has positions for at most 240 pixels"):
            pair_of("1.5")[0]("a cat", **SMALL | {"width": 256})

    @pytest.mark.parametrize(
        ("missing", "arguments", "message"),
        [
            ("transformer", {"height": None}, "no transformer"),
            ("scheduler", {}, "no scheduler"),
            ("vae", {}, 'output_type="latent"'),
            ("text_encoder", {}, "prompt_embeds"),
            ("tokenizer", {"prompt": None, "prompt_embeds": embeds()}, "negative_prompt_embeds"),
        ],
    )
    def test_missing_components(self, missing: str, arguments: Any, message: str, idle: CogVideoXPipeline) -> None:
        setattr(idle, missing, None)
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})


class TestLoading:
    def test_null_components_stay_null(self, tmp_path: Path, oracle: Any) -> None:
        folder = write_cogvideox_checkpoint(tmp_path)
        edit_json(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None], vae=[None, None])
        pipeline = load(folder)
        assert [name for name, part in pipeline.components.items() if part is None] == [
            "tokenizer",
            "text_encoder",
            "vae",
        ]
        ready = {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(seed=5), **SMALL, "output_type": "latent"}
        latents = [p(**ready, generator=seeded()).frames for p in (pipeline, oracle)]
        assert error(*latents) <= 1e-4

    @pytest.mark.parametrize("layout", [{"max_shard_size": "100KB"}, {"variant": "fp16"}])
    def test_shards_and_variants(self, layout: dict[str, str], tmp_path: Path, oracle: Any) -> None:
        folder = write_cogvideox_checkpoint(tmp_path, **layout)
        clip = load(folder, variant=layout.get("variant"))("a cat", **SMALL, generator=seeded()).frames
        assert error(clip, oracle("a cat", **SMALL, generator=seeded()).frames) <= 1e-4

    def test_saved_pipelines_are_read_by_both(self, pipeline: CogVideoXPipeline, tmp_path: Path, oracle: Any) -> None:
        pipeline.save_pretrained(tmp_path)
        expected = oracle("a cat", **SMALL, generator=seeded()).frames
        for again in (load(tmp_path), load_oracle(tmp_path)):
            assert error(again("a cat", **SMALL, generator=seeded()).frames, expected) <= 1e-4

    def test_image_to_video_checkpoints_are_refused_by_name(self, tmp_path: Path) -> None:
        folder = write_cogvideox_checkpoint(tmp_path)
        edit_json(folder / "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
        with pytest.raises(CheckpointError, match="CogVideoXImageToVideoPipeline, not of CogVideoXPipeline"):
            load(folder)


class TestPlacement:
    @pytest.mark.parametrize("variant", ["2b", "1.5"])
    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_streamed_is_the_same_clip(self, offload_type: str, variant: str, folder_of: Callable[[str], Path]) -> None:
        resident, streamed = load(folder_of(variant)), load(folder_of(variant))
        for model in (streamed.text_encoder, streamed.transformer, streamed.vae):
            apply_group_offloading(model, "cpu", offload_type=offload_type)
        for _ in range(2):
            clips = [p("a cat", **SMALL, generator=seeded()).frames for p in (resident, streamed)]
            np.testing.assert_array_equal(*clips)

    def test_whole_models_on_demand_are_the_same_clip(self, pipeline: CogVideoXPipeline, folder_of: Any) -> None:
        streamed = load(folder_of("2b"))
        streamed.enable_model_cpu_offload("cpu")
        clips = [p("a cat", **SMALL, generator=seeded()).frames for p in (pipeline, streamed)]
        np.testing.assert_array_equal(*clips)

    def test_cast_and_streamed_is_the_same_clip(self, pipeline: CogVideoXPipeline, folder_of: Any) -> None:
        clips = []
        for is_streamed in (False, True):
            cast = load(folder_of("2b"))
            cast.transformer.enable_layerwise_casting()
            if is_streamed:
                cast.transformer.enable_group_offload("cpu", offload_type="leaf_level")
            clips.append(cast("a cat", **SMALL, generator=seeded()).frames)
        np.testing.assert_array_equal(*clips)
        assert not np.array_equal(clips[0], pipeline("a cat", **SMALL, generator=seeded()).frames)

    def test_a_compiled_transformer_makes_the_same_clip(self, pipeline: CogVideoXPipeline) -> None:
        expected = pipeline("a cat", **SMALL, generator=seeded()).frames
        torch._dynamo.reset()
        pipeline.transformer.to(memory_format=torch.channels_last)
        pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, backend="eager")
        assert error(pipeline("a cat", **SMALL, generator=seeded()).frames, expected) <= 1e-5
        torch._dynamo.reset()

    def test_is_quiet(self, pipeline: CogVideoXPipeline) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline("a cat", **SMALL, generator=seeded())
