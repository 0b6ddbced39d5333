"""What is HunyuanVideo's own in its pipeline, against diffusers': its two texts, its two guidances."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from checkpoints import load_oracle, write_hunyuan_checkpoint
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from families import compare, frames, normal, relative_error
from safetensors.torch import load_file, save_file

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video.prompts import PROMPT_TEMPLATE, encode_clip, encode_llama
from vramkit.pipelines.loading.text_encoders import load_tokenizer

SMALL = {"height": 32, "width": 48, "num_frames": 9}
load, ready = partial(families.load, "HunyuanVideo"), partial(families.ready, "HunyuanVideo")


@pytest.fixture
def family() -> str:
    return "HunyuanVideo"


NO_PROMPT = {"prompt": None}
SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain, with 256 tokens": {},
    "negative prompt without a scale": {"negative_prompt": "blurry, worst quality"},
    "a scale without a negative prompt": {"true_cfg_scale": 4.0},
    "one frame, true guidance": {"num_frames": 1, "negative_prompt": "dark", "true_cfg_scale": 2.0},
    "tiles of frames": {"num_frames": 25, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
    "sigmas": {"sigmas": [1.0, 0.6, 0.25], "num_inference_steps": 3},
    "clips per prompt": {"prompt": ["a cat", "a dog"], "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "ready": ready(),
    "ready, padded on the left": ready() | {"prompt_attention_mask": torch.tensor([[0] * 3 + [1] * 9])},
    "ready, both": ready(lengths=(7, 12))
    | ready("negative_", tokens=9, lengths=(9, 2), seed=4)
    | {"true_cfg_scale": 3.0},
    "prompt with another pooled text": {"pooled_prompt_embeds": ready()["pooled_prompt_embeds"]},
    "another template": {"prompt_template": {"template": "describe a short clip of {} in many words", "crop_start": 9}},
    "latents in double": {"latents": normal(1, 4, 3, 4, 6, seed=9).double()},
}


class TestSameClipAsDiffusers:
    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: Any, oracle: Any) -> None:
        compare(pipeline, oracle, **SMALL | SAME_CLIP[case])

    def test_the_pooled_text_counts(self, pipeline: Any) -> None:
        changed = frames(pipeline, **SMALL, pooled_prompt_embeds=ready()["pooled_prompt_embeds"])
        assert relative_error(changed, frames(pipeline, **SMALL)) > 1e-3

    def test_second_prompts_are_not_used_as_in_diffusers_but_with_a_warning(self, pipeline: Any, oracle: Any) -> None:
        with pytest.warns(UserWarning, match="prompt_2 is not used.*pooled_prompt_embeds") as caught:
            compare(pipeline, oracle, **SMALL, prompt_2="a dog", num_inference_steps=1)
        assert caught[0].filename == families.__file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline("a cat", "a cat", **SMALL, num_inference_steps=1)

    def test_a_model_without_embedded_guidance(self, tmp_path: Path) -> None:
        folder = write_hunyuan_checkpoint(tmp_path, guidance_embeds=False, shift=3.0, seed=1)
        compare(load(folder), load_oracle(folder), **SMALL, negative_prompt="dark", true_cfg_scale=2.0)


class TestPrompts:
    def test_the_template_is_the_published_one(self) -> None:
        assert dict(PROMPT_TEMPLATE) == pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE

    @torch.no_grad()
    def test_encoded_prompts_equal_the_oracles(self, pipeline: Any, oracle: Any) -> None:
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

    def test_encoders_are_run_one_after_the_other(self, pipeline: Any) -> None:
        order = []
        hooks = [
            getattr(pipeline, name).register_forward_hook(lambda *_, name=name: order.append(name))
            for name in ("text_encoder", "text_encoder_2")
        ]
        pipeline("a cat", negative_prompt="dark", true_cfg_scale=2.0, **SMALL, num_inference_steps=1)
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

    def test_a_vocabulary_in_two_files_is_read(self, folder: Path, tmp_path: Path) -> None:
        """As the published tokenizer_2 comes, without tokenizer.json."""
        whole = load_tokenizer(folder / "tokenizer_2")
        shutil.copytree(folder / "tokenizer_2", tmp_path, dirs_exist_ok=True)
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(whole.get_vocab()))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        assert load_tokenizer(tmp_path)("a cat on a log").input_ids == whole("a cat on a log").input_ids

    def test_a_tokenizer_of_another_template_is_named(self, pipeline: Any) -> None:
        with pytest.raises(ConfigError, match="crop_start cuts off 200 tokens"):
            pipeline("a cat", **SMALL, prompt_template=dict(PROMPT_TEMPLATE) | {"crop_start": 200})


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"true_cfg_scale": float("inf")}, "true_cfg_scale is inf; expected a finite number"),
            ({"prompt": None, "prompt_embeds": ready()["prompt_embeds"]}, "without pooled_prompt_embeds: give both"),
            (
                {"negative_prompt_embeds": ready()["prompt_embeds"], "true_cfg_scale": 2.0},
                "without negative_pooled_prompt_embeds: give both",
            ),
            ({"sigmas": []}, r"sigmas is \[\]; expected falling numbers, from 1 at most to 0 at least"),
            ({"sigmas": 3}, "sigmas is 3; expected a list of numbers"),
            ({"sigmas": "even"}, "sigmas is 'even'; expected a list of numbers"),
            ({"sigmas": [1.0, "half"]}, r"sigmas\[1\] is 'half'; expected a finite number"),
            ({"sigmas": [1.0, float("nan")]}, r"sigmas\[1\] is nan"),
            ({"sigmas": torch.tensor([0.5, 1.0])}, r"sigmas is \[0.5, 1.0\]; expected falling numbers"),
            ({"sigmas": [2.0, 1.0]}, "from 1 at most"),
            ({"sigmas": [1.0, -0.5]}, "to 0 at least"),
            (NO_PROMPT | ready() | {"pooled_prompt_embeds": torch.zeros(2, 16)}, r"shape \(2, 16\); expected \(1, "),
            (
                NO_PROMPT | ready() | {"pooled_prompt_embeds": torch.zeros(1, 15)},
                r"shape \(1, 15\); expected \(1, 16\)",
            ),
            (
                {"pooled_prompt_embeds": torch.zeros(1, 16).long()},
                "pooled_prompt_embeds is torch.int64; expected floating",
            ),
            (
                {"pooled_prompt_embeds": torch.zeros(1, 16).numpy()},
                "pooled_prompt_embeds is a ndarray; expected a tensor",
            ),
            (NO_PROMPT | ready() | {"prompt_attention_mask": [[1] * 12]}, "prompt_attention_mask is a list"),
            (
                {"negative_prompt": "x", "negative_pooled_prompt_embeds": torch.zeros(1, 15), "true_cfg_scale": 2.0},
                r"negative_pooled_prompt_embeds has shape \(1, 15\); expected \(1, 16\)",
            ),
            (NO_PROMPT | ready() | {"prompt_attention_mask": torch.ones(1, 5)}, r"mask has shape \(1, 5\).*\(1, 12\)"),
            ({"prompt_attention_mask": torch.ones(1, 5)}, "give both or none"),
            ({"prompt_template": {"crop_start": 3}}, "prompt_template is"),
            ({"prompt_template": {"template": "none", "crop_start": 3}}, "with {} for the prompt"),
        ],
    )
    def test_are_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    def test_a_missing_second_tokenizer(self, idle: Any) -> None:
        idle.tokenizer_2 = None
        with pytest.raises(ConfigError, match="give pooled_prompt_embeds"):
            idle("a cat", **SMALL)


def test_files_with_names_of_older_versions(copied: Path, oracle: Any) -> None:
    """The published CLIP has `text_model.` before every name."""
    file = copied / "text_encoder_2" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    compare(load(copied), oracle, **SMALL)


def test_encoders_put_their_results_where_they_compute(pipeline: Any) -> None:
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
