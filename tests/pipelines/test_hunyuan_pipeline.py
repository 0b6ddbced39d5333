"""The whole pipeline against diffusers' HunyuanVideoPipeline, both loaded from the very same folder."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from checkpoints import edit_json, load_oracle, write_hunyuan_checkpoint
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from safetensors.torch import load_file, save_file

from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.offload.disk import span_of
from vramkit.pipelines.hunyuan_video.pipeline import HunyuanVideoPipeline
from vramkit.pipelines.hunyuan_video.prompts import PROMPT_TEMPLATE, encode_clip, encode_llama
from vramkit.pipelines.text_encoders import load_tokenizer

SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hunyuan_checkpoint(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def oracle(hunyuan_folder: Path) -> Any:
    return load_oracle(hunyuan_folder)


@pytest.fixture(scope="module")
def loaded(hunyuan_folder: Path) -> HunyuanVideoPipeline:
    return load(hunyuan_folder)


@pytest.fixture
def pipeline(loaded: HunyuanVideoPipeline) -> HunyuanVideoPipeline:
    """A pipeline of its own for each test, around shared models."""
    fresh = HunyuanVideoPipeline(**loaded.components)
    fresh.scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config)
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.fixture
def copied(hunyuan_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be spoiled."""
    return shutil.copytree(hunyuan_folder, tmp_path / "copy")


def load(folder: Path, **options: Any) -> HunyuanVideoPipeline:
    pipeline = HunyuanVideoPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def ready(name: str = "", tokens: int = 12, lengths: tuple[int, ...] = (7,), seed: int = 3) -> dict[str, torch.Tensor]:
    """Ready embeddings of a text with their mask, as arguments of a call."""
    g, batch = seeded(seed), len(lengths)
    return {
        f"{name}prompt_embeds": torch.randn(batch, tokens, 32, generator=g),
        f"{name}pooled_prompt_embeds": torch.randn(batch, 16, generator=g),
        f"{name}prompt_attention_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long(),
    }


NO_PROMPT = {"prompt": None}
SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative prompt without a scale": {"negative_prompt": "blurry, worst quality"},
    "true guidance": {"negative_prompt": "blurry, worst quality", "true_cfg_scale": 4.0},
    "a scale without a negative prompt": {"true_cfg_scale": 4.0},
    "other guidance": {"guidance_scale": 1.0},
    "one frame": {"num_frames": 1},
    "one frame, true guidance": {"num_frames": 1, "negative_prompt": "dark", "true_cfg_scale": 2.0},
    "tiles of frames": {"num_frames": 25, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
    "other sizes": {"height": 48, "width": 32},
    "sigmas": {"sigmas": [1.0, 0.6, 0.25], "num_inference_steps": 3},
    "long prompt that is cut": {"prompt": "a cat on a log in the water " * 8, "max_sequence_length": 40},
    "prompts of unequal length": {"prompt": ["a cat", "a dog in the deep snow under a tree"]},
    "lists": {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark, grey"], "true_cfg_scale": 3.0},
    "clips per prompt": {"prompt": ["a cat", "a dog"], "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)]},
    "ready": NO_PROMPT | ready(),
    "ready, padded on the left": NO_PROMPT | ready() | {"prompt_attention_mask": torch.tensor([[0] * 3 + [1] * 9])},
    "ready, both": NO_PROMPT | ready(lengths=(7, 12)) | ready("negative_", 9, (9, 2), 4) | {"true_cfg_scale": 3.0},
    "prompt with another pooled text": {"pooled_prompt_embeds": ready()["pooled_prompt_embeds"]},
    "another template": {"prompt_template": {"template": "describe a short clip of {} in many words", "crop_start": 9}},
    "latents": {"latents": torch.randn(1, 4, 3, 4, 6, generator=seeded(9)).double()},
    "latent output": {"output_type": "latent"},
    "tensor output": {"output_type": "pt"},
}


class TestSameClipAsDiffusers:
    def compare(self, pipeline: HunyuanVideoPipeline, oracle: Any, arguments: dict[str, Any]) -> None:
        arguments = {"prompt": "a cat on a log", "generator": seeded, "output_type": "np", **SMALL, **arguments}
        make: Callable[[], Any] = arguments.pop("generator")
        ours = pipeline(**arguments, generator=make()).frames
        theirs = oracle(**arguments, generator=make()).frames
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 1e-4
        assert float(torch.as_tensor(theirs).std()) > 0.02  # a flat picture would prove nothing

    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: HunyuanVideoPipeline, oracle: Any) -> None:
        self.compare(pipeline, oracle, SAME_CLIP[case])

    def test_what_is_compared_depends_on_it(self, pipeline: HunyuanVideoPipeline) -> None:
        def clip(**changes: Any) -> Any:
            return pipeline(
                **{"prompt": "a cat on a log", "output_type": "np", **SMALL, **changes}, generator=seeded()
            )[0]

        plain = clip()
        for changes in (
            {"prompt": "a dog in the snow"},
            {"guidance_scale": 1.0},
            {"negative_prompt": "blurry", "true_cfg_scale": 4.0},
            {"pooled_prompt_embeds": ready()["pooled_prompt_embeds"]},
        ):
            assert relative_error(clip(**changes), plain) > 1e-3

    @pytest.mark.parametrize("num_frames", [2, 4, 8, 10, 12])
    def test_other_numbers_of_frames_are_rounded_alike_with_a_warning(
        self, num_frames: int, pipeline: HunyuanVideoPipeline, oracle: Any
    ) -> None:
        with pytest.warns(UserWarning, match=f"num_frames is {num_frames}.*4 \\* k \\+ 1") as caught:
            self.compare(pipeline, oracle, {"num_frames": num_frames, "num_inference_steps": 1})
        assert caught[0].filename == __file__

    def test_second_prompts_are_not_used_as_in_diffusers_but_with_a_warning(
        self, pipeline: HunyuanVideoPipeline, oracle: Any
    ) -> None:
        with pytest.warns(UserWarning, match="prompt_2 is not used.*pooled_prompt_embeds") as caught:
            self.compare(pipeline, oracle, {"prompt_2": "a dog", "num_inference_steps": 1})
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline("a cat", "a cat", **SMALL | {"num_inference_steps": 1}, generator=seeded())

    def test_a_model_without_embedded_guidance(self, tmp_path: Path) -> None:
        folder = write_hunyuan_checkpoint(tmp_path, guidance_embeds=False, shift=3.0, seed=1, max_shard_size="30KB")
        assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
        self.compare(load(folder), load_oracle(folder), {"negative_prompt": "dark", "true_cfg_scale": 2.0})

    def test_lower_precision(self, hunyuan_folder: Path) -> None:
        dtypes = {"default": torch.bfloat16, "vae": torch.float32}
        ours, theirs = load(hunyuan_folder, torch_dtype=dtypes), load_oracle(hunyuan_folder, torch_dtype=dtypes)
        models = ("text_encoder", "text_encoder_2", "transformer", "vae")
        assert [ours.components[name].dtype for name in models] == [getattr(theirs, name).dtype for name in models]
        arguments = {"prompt": "a cat on a log", **SMALL, "output_type": "latent"}
        clips = [p(**arguments, generator=seeded()).frames for p in (ours, theirs)]
        assert clips[0].dtype == clips[1].dtype
        assert relative_error(*clips) < 0.05  # rounding of 8 bits over five steps

    def test_pictures_are_the_default(self, pipeline: HunyuanVideoPipeline, oracle: Any) -> None:
        (ours,), (theirs,) = (p("a cat", **SMALL, generator=seeded()).frames for p in (pipeline, oracle))
        assert len(ours) == len(theirs) == 9
        assert all(isinstance(frame, PIL.Image.Image) for frame in ours)
        worst = max(np.abs(np.subtract(a, b, dtype=np.int16)).max() for a, b in zip(ours, theirs, strict=True))
        assert worst <= 1  # a value at the border of rounding

    def test_tiled_decode(self, hunyuan_folder: Path, oracle: Any) -> None:
        tiles = {
            "tile_sample_min_height": 32,
            "tile_sample_min_width": 32,
            "tile_sample_stride_height": 16,
            "tile_sample_stride_width": 16,
        }
        ours, theirs = load(hunyuan_folder), load_oracle(hunyuan_folder)
        ours.vae.enable_tiling(**tiles)
        theirs.vae.enable_tiling(**tiles)
        self.compare(ours, theirs, {"num_frames": 21, "num_inference_steps": 1})
        arguments = {**SMALL, "num_frames": 21, "num_inference_steps": 1, "output_type": "np"}
        whole = oracle("a cat", **arguments, generator=seeded()).frames
        assert relative_error(ours("a cat", **arguments, generator=seeded()).frames, whole) > 1e-3

    def test_callback_sees_and_changes_the_same(self, pipeline: HunyuanVideoPipeline, oracle: Any) -> None:
        def run(pipe: Any) -> tuple[list[Any], Any]:
            seen: list[Any] = []

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                assert pipe.current_timestep is not None
                seen.append((step, float(timestep), sorted(tensors), pipe.guidance_scale, pipe.num_timesteps))
                pipe._interrupt = step == 3
                return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] + 0.1}

            clip = pipe(
                prompt="a cat",
                **SMALL,
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

    def test_return_dict(self, pipeline: HunyuanVideoPipeline) -> None:
        arguments = {"prompt": "a cat", **SMALL, "num_inference_steps": 1, "output_type": "np"}
        (clip,) = pipeline(**arguments, generator=seeded(), return_dict=False)
        np.testing.assert_array_equal(clip, pipeline(**arguments, generator=seeded()).frames)


class TestPrompts:
    def test_the_template_is_the_published_one(self) -> None:
        assert dict(PROMPT_TEMPLATE) == pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE

    @torch.no_grad()
    def test_encoded_prompts_equal_the_oracles(self, pipeline: HunyuanVideoPipeline, oracle: Any) -> None:
        prompts = ["a cat", "a dog in the deep snow"]
        ours = pipeline.encode_prompt(prompts, num_videos_per_prompt=2)
        theirs = oracle.encode_prompt(prompts, num_videos_per_prompt=2, device=torch.device("cpu"))
        assert ours[0].shape == (4, 256, 32)
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) <= 1e-6
        again = pipeline.encode_prompt(
            prompt_embeds=ours[0], pooled_prompt_embeds=ours[1], prompt_attention_mask=ours[2]
        )
        assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))

    def test_encoders_are_run_one_after_the_other(self, pipeline: HunyuanVideoPipeline) -> None:
        order = []
        hooks = [
            getattr(pipeline, name).register_forward_hook(lambda *_, name=name: order.append(name))
            for name in ("text_encoder", "text_encoder_2")
        ]
        pipeline("a cat", negative_prompt="dark", true_cfg_scale=2.0, **SMALL | {"num_inference_steps": 1})
        for hook in hooks:
            hook.remove()
        assert order == ["text_encoder"] * 2 + ["text_encoder_2"] * 2

    def test_a_byte_level_tokenizer_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        """Llama 3's, as published, under the class name of Llama's older tokenizers, which would cut texts otherwise."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

        written = Tokenizer(models.BPE())
        written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
        written.train_from_iterator([PROMPT_TEMPLATE["template"]], trainer)
        written.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
        written.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", "bos_token": "<|begin_of_text|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "right"}))
        text = PROMPT_TEMPLATE["template"].format("a cat on a log")
        assert load_tokenizer(tmp_path)(text).input_ids == written.encode(text).ids

    def test_a_vocabulary_in_two_files_is_read(self, hunyuan_folder: Path, tmp_path: Path) -> None:
        """As the published tokenizer_2 comes, without tokenizer.json."""
        whole = load_tokenizer(hunyuan_folder / "tokenizer_2")
        shutil.copytree(hunyuan_folder / "tokenizer_2", tmp_path, dirs_exist_ok=True)
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(whole.get_vocab()))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        assert load_tokenizer(tmp_path)("a cat on a log").input_ids == whole("a cat on a log").input_ids

    def test_a_tokenizer_of_another_template_is_named(self, pipeline: HunyuanVideoPipeline) -> None:
        with pytest.raises(ConfigError, match="crop_start cuts off 200 tokens"):
            pipeline("a cat", **SMALL, prompt_template=dict(PROMPT_TEMPLATE) | {"crop_start": 200})


class TestWrongArguments:
    @pytest.fixture
    def idle(self, pipeline: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> HunyuanVideoPipeline:
        """A pipeline that fails the test when anything is computed."""

        def computed(*arguments: Any, **options: Any) -> Any:
            pytest.fail("a model ran")

        for model in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer, pipeline.vae):
            monkeypatch.setattr(model, "forward", computed)
        return pipeline

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"height": 40}, "height is 40; expected a multiple of 16, for example 32 or 48"),
            ({"width": 8}, "width is 8; expected a multiple of 16, for example 16"),
            ({"num_frames": 0}, "num_frames is 0"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"true_cfg_scale": float("inf")}, "true_cfg_scale is inf; expected a finite number"),
            ({"prompt": None}, "there is no prompt"),
            ({"prompt": ["a", "b"], "negative_prompt": ["x"] * 3}, "2 prompts and 3 negative"),
            (ready(), "both prompt and prompt_embeds"),
            ({"prompt": None, "prompt_embeds": ready()["prompt_embeds"]}, "without pooled_prompt_embeds: give both"),
            (
                {"negative_prompt_embeds": ready()["prompt_embeds"], "true_cfg_scale": 2.0},
                "without negative_pooled_prompt_embeds: give both",
            ),
            ({"sigmas": []}, "got 0 steps"),
            (NO_PROMPT | ready() | {"pooled_prompt_embeds": torch.zeros(2, 16)}, r"shape \(2, 16\); expected \(1, "),
            (NO_PROMPT | ready() | {"prompt_attention_mask": torch.ones(1, 5)}, r"mask has shape \(1, 5\).*\(1, 12\)"),
            ({"prompt_attention_mask": torch.ones(1, 5)}, "give both or none"),
            ({"prompt_template": {"crop_start": 3}}, "prompt_template is"),
            ({"prompt_template": {"template": "none", "crop_start": 3}}, "with {} for the prompt"),
            ({"output_type": "jpg"}, "output_type has 'jpg'"),
            ({"latents": torch.zeros(1, 4, 3, 4, 4)}, r"\(1, 4, 3, 4, 4\).*\(1, 4, 3, 4, 6\)"),
            ({"prompt": ["a"] * 3, "generator": [seeded()]}, "1 generators for 3 clips"),
        ],
    )
    def test_are_refused_before_anything_runs(
        self, arguments: dict[str, Any], message: str, idle: HunyuanVideoPipeline
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    @pytest.mark.parametrize(
        ("missing", "arguments", "message"),
        [
            ("transformer", {}, "no transformer"),
            ("vae", {}, 'output_type="latent"'),
            ("text_encoder", {}, "give prompt_embeds"),
            ("tokenizer_2", {}, "give pooled_prompt_embeds"),
            (
                "tokenizer",
                NO_PROMPT | ready() | {"negative_prompt": "x", "true_cfg_scale": 2.0},
                "negative_prompt_embeds",
            ),
        ],
    )
    def test_missing_components(self, missing: str, arguments: Any, message: str, idle: HunyuanVideoPipeline) -> None:
        setattr(idle, missing, None)
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})


class TestLoading:
    def test_weights_are_mapped_and_tables_computed(self, loaded: HunyuanVideoPipeline, oracle: Any) -> None:
        for name in ("text_encoder", "text_encoder_2"):
            ours, theirs = getattr(loaded, name), getattr(oracle, name)
            assert all(span_of(parameter) is not None for parameter in ours.parameters())  # views of the files
            tables = dict(theirs.named_buffers())
            assert tables.keys() == dict(ours.named_buffers()).keys()
            assert all(torch.equal(table, tables[key]) for key, table in ours.named_buffers())

    def test_files_with_names_of_older_versions(self, copied: Path, oracle: Any) -> None:
        """The published CLIP has `text_model.` before every name."""
        file = copied / "text_encoder_2" / "model.safetensors"
        save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        arguments = {"prompt": "a cat", **SMALL, "output_type": "np"}
        clip = load(copied)(**arguments, generator=seeded()).frames
        assert relative_error(clip, oracle(**arguments, generator=seeded()).frames) <= 1e-4

    def test_null_components_stay_null(self, copied: Path, oracle: Any) -> None:
        absent = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae")
        edit_json(copied / "model_index.json", **{name: [None, None] for name in absent})
        pipeline = load(copied)
        assert [name for name, part in pipeline.components.items() if part is None] == list(absent)
        arguments = ready() | SMALL | {"output_type": "latent"}
        latents = pipeline(**arguments, generator=seeded()).frames
        assert relative_error(latents, oracle(**arguments, generator=seeded()).frames) <= 1e-4

    def test_saved_pipelines_are_read_by_both(self, loaded: HunyuanVideoPipeline, tmp_path: Path, oracle: Any) -> None:
        loaded.save_pretrained(tmp_path)
        arguments = {"prompt": "a cat", **SMALL, "output_type": "np"}
        expected = oracle(**arguments, generator=seeded()).frames
        for again in (load(tmp_path), load_oracle(tmp_path)):
            assert relative_error(again(**arguments, generator=seeded()).frames, expected) <= 1e-4


class TestPlacement:
    def clip(self, pipeline: HunyuanVideoPipeline) -> Any:
        arguments = {"negative_prompt": "dark", "true_cfg_scale": 2.0, "output_type": "np"}
        return pipeline("a cat", **SMALL, **arguments, generator=seeded()).frames

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_streamed_from_disk_is_the_same_clip(
        self, offload_type: str, hunyuan_folder: Path, pipeline: HunyuanVideoPipeline
    ) -> None:
        streamed = load(hunyuan_folder)
        for model in (streamed.text_encoder, streamed.text_encoder_2, streamed.transformer, streamed.vae):
            apply_group_offloading(model, "cpu", offload_type=offload_type, store="disk")
        for _ in range(2):
            np.testing.assert_array_equal(self.clip(streamed), self.clip(pipeline))

    def test_whole_models_on_demand_are_the_same_clip(
        self, hunyuan_folder: Path, pipeline: HunyuanVideoPipeline
    ) -> None:
        streamed = load(hunyuan_folder)
        streamed.enable_model_cpu_offload("cpu")
        np.testing.assert_array_equal(self.clip(streamed), self.clip(pipeline))

    def test_cast_weights_streamed_or_not_are_the_same_clip(
        self, hunyuan_folder: Path, pipeline: HunyuanVideoPipeline
    ) -> None:
        cast = load(hunyuan_folder)
        cast.transformer.enable_layerwise_casting()
        resident = self.clip(cast)
        assert 1e-5 < relative_error(resident, self.clip(pipeline)) < 0.5
        cast.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        np.testing.assert_array_equal(self.clip(cast), resident)

    def test_encoders_put_their_results_where_they_compute(self, pipeline: HunyuanVideoPipeline) -> None:
        states, mask = encode_llama(
            ["a cat"],
            tokenizer=pipeline.tokenizer,
            text_encoder=pipeline.text_encoder,
            template=PROMPT_TEMPLATE,
            max_sequence_length=30,
        )
        pooled = encode_clip(["a cat"], tokenizer=pipeline.tokenizer_2, text_encoder=pipeline.text_encoder_2)
        assert states.shape == (1, 30, 32)
        assert mask.shape == (1, 30)
        assert pooled.shape == (1, 16)
