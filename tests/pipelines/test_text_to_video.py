"""What the pipelines of all families have in common, against diffusers' own loaded from the very same folder."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import families
import numpy as np
import PIL.Image
import pytest
import torch
from checkpoints import edit_json, load_oracle
from families import FAMILIES, WHOLE, Stock, compare, frames, load, models_of, normal, ready, relative_error, seeded

import vramkit
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.offload.disk import span_of


@pytest.fixture(params=WHOLE)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def clip(family: str) -> dict[str, Any]:
    """Arguments of a small clip."""
    return FAMILIES[family].clip


SAME_CLIP: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "one frame": {"num_frames": 1},
    "other sizes": {"height": 96, "width": 32},
    "long prompt that is cut": {"prompt": "a cat on a log in the water " * 8},
    "prompts of unequal length": {"prompt": ["a cat", "a dog in the deep snow under a tree"]},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)]},
    "generator list of one": {"generator": lambda: [seeded(4)]},
    "latent output": {"output_type": "latent"},
    "tensor output": {"output_type": "pt"},
}


def _set(scale: float, *, half: bool = False) -> Any:
    def change(pipe: Any, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = scale
            if half:
                tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    return change


def _in_place(pipe: Any, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["prompt_embeds"].add_(0.1)
    tensors["latents"].mul_(0.9)
    return {}


# What callbacks do to guidance and text: (pipeline, step, tensors) -> what they give back.
GUIDANCE: dict[str, Any] = {
    "ended": _set(0.0),
    "ended, the prompt alone given back": _set(0.0, half=True),
    "changed": _set(2.0),
    "text": lambda pipe, step, tensors: {"prompt_embeds": tensors["prompt_embeds"] * 1.5},
    "text in place": _in_place,
    "negative text": lambda pipe, step, tensors: {
        name: tensor * 1.5 for name, tensor in tensors.items() if name == "negative_prompt_embeds"
    },
}
REFUSED_GUIDANCE = {("CogVideoX", "ended, the prompt alone given back")}
OWN_GUIDANCE = {("LTX-Video", "ended"), ("LTX-Video", "ended, the prompt alone given back")}
NOTED_GUIDANCE = {
    ("Wan2.1", "changed"),
    ("CogVideoX", "ended"),
    ("HunyuanVideo", "ended"),
    ("HunyuanVideo", "ended, the prompt alone given back"),
    ("HunyuanVideo", "changed"),
}


class TestSameClipAsDiffusers:
    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: Any, oracle: Any, clip: dict[str, Any]) -> None:
        compare(pipeline, oracle, **clip | SAME_CLIP[case])

    def test_negative_prompts(self, pipeline: Any, oracle: Any, family: str, clip: dict[str, Any]) -> None:
        guided = clip | FAMILIES[family].guided
        compare(pipeline, oracle, **guided, negative_prompt="blurry, worst quality")
        lists = {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark, low quality"]}
        compare(pipeline, oracle, **guided | lists)

    def test_ready_latents_of_any_dtype(self, pipeline: Any, oracle: Any, family: str, clip: dict[str, Any]) -> None:
        latents = normal(*FAMILIES[family].latents, seed=9)
        compare(pipeline, oracle, **clip, latents=latents)
        given = [frames(pipeline, **clip, latents=each) for each in (latents, latents.double())]
        assert relative_error(*given) <= 1e-5

    def test_what_is_compared_depends_on_it(self, pipeline: Any, family: str, clip: dict[str, Any]) -> None:
        plain = frames(pipeline, **clip)
        changes: list[dict[str, Any]] = [
            {"prompt": "a dog in the snow"},
            {"guidance_scale": 1.0},
            {"negative_prompt": "blurry"} | FAMILIES[family].guided,
            ready(family, tokens=16),
        ]
        for change in changes:
            assert relative_error(frames(pipeline, **clip | change), plain) > 1e-3

    @pytest.mark.parametrize(
        ("family", "num_frames", "ratio"),
        [("Wan2.1", n, 4) for n in (2, 4, 8, 10)]
        + [("HunyuanVideo", n, 4) for n in (2, 4, 8, 10)]
        + [("LTX-Video", n, 8) for n in (2, 8, 10, 16)],
    )
    def test_other_numbers_of_frames_are_rounded_alike_with_a_warning(
        self, num_frames: int, ratio: int, pipeline: Any, oracle: Any, clip: dict[str, Any]
    ) -> None:
        with pytest.warns(UserWarning, match=f"num_frames is {num_frames}.*{ratio} \\* k \\+ 1") as caught:
            compare(pipeline, oracle, **clip | {"num_frames": num_frames, "num_inference_steps": 2})
        assert caught[0].filename == families.__file__

    @pytest.mark.parametrize("dtypes", [torch.bfloat16, {"default": torch.bfloat16, "vae": torch.float32}])
    def test_lower_precision(self, dtypes: Any, family: str, folder: Path, clip: dict[str, Any]) -> None:
        ours, theirs = load(family, folder, torch_dtype=dtypes), load_oracle(folder, torch_dtype=dtypes)
        for name, model in models_of(ours).items():
            assert model.dtype == getattr(theirs, name).dtype
        # Diffusers' CogVideoX decodes in the dtype of its latents alone.
        for output_type in ("latent", "pt") if dtypes == torch.bfloat16 else ("latent",):
            made, expected = (frames(pipeline, **clip, output_type=output_type) for pipeline in (ours, theirs))
            assert made.dtype == expected.dtype
            assert (made - expected).norm() < 0.05 * expected.norm()  # rounding of 8 bits over five steps

    def test_arguments_and_defaults_are_those_of_diffusers(self, pipeline: Any, oracle: Any) -> None:
        def defaults(pipe: Any) -> list[tuple[str, Any, Any]]:
            parameters = inspect.signature(type(pipe).__call__).parameters.values()
            return [
                (each.name, each.kind, [*each.default] if isinstance(each.default, tuple) else each.default)
                for each in parameters
            ]

        assert defaults(pipeline) == defaults(oracle)  # in this order: all of them may be given by position
        constructors = [inspect.signature(type(pipe)).parameters.values() for pipe in (pipeline, oracle)]
        ours, theirs = ([(each.name, each.kind, each.default) for each in values] for values in constructors)
        assert ours == theirs

    def test_configs_are_read_as_those_of_diffusers(self, pipeline: Any, oracle: Any) -> None:
        for name in ("transformer", "vae", "scheduler"):
            ours, theirs = getattr(pipeline, name).config, getattr(oracle, name).config
            for key in dict(ours).keys() & dict(theirs).keys() - {"_class_name"}:
                assert ours[key] is ours.get(key) is getattr(ours, key)
                assert json.dumps(ours[key]) == json.dumps(theirs[key])  # where tuples are lists
            assert ours.get("nonsense", 3) == 3
            assert "nonsense" not in ours
            with pytest.raises(KeyError):
                ours["nonsense"]
        assert dict(pipeline.config) == {name: getattr(oracle.config, name) for name in pipeline.config}
        assert (
            type(pipeline.transformer).from_config(dict(pipeline.transformer.config)).config
            == pipeline.transformer.config
        )

    def test_encode_prompt(self, family: str, stock: Stock, oracle: Any) -> None:
        ours, device = stock.pipeline(family), torch.device("cpu")
        calls: list[dict[str, Any]] = [
            {"prompt": "a cat", "device": device},
            {"prompt": ["a cat", "a dog"], "device": device, "dtype": torch.bfloat16, "max_sequence_length": 12},
            {"prompt": "a cat", "device": device, "num_videos_per_prompt": 2, "max_sequence_length": 12},
        ]
        if family != "HunyuanVideo":
            calls += [
                {"prompt": "a cat", "do_classifier_free_guidance": False, "max_sequence_length": 12},
                {"prompt": ["a cat", "a dog"], "negative_prompt": ["dark", "blurry"], "max_sequence_length": 12},
            ]
        for call in calls:
            with torch.no_grad():
                expected = oracle.encode_prompt(**call)
            for mine, theirs in zip(ours.encode_prompt(**call), expected, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert mine.dtype == theirs.dtype
                    assert relative_error(mine, theirs) <= (1e-5 if theirs.dtype == torch.float32 else 1e-2)
        parameters = [inspect.signature(type(pipe).encode_prompt).parameters.values() for pipe in (ours, oracle)]
        names, theirs = ([(each.name, each.kind) for each in values] for values in parameters)
        assert names == theirs

    def test_pictures(self, pipeline: Any, oracle: Any, clip: dict[str, Any]) -> None:
        (ours,), (theirs,) = (frames(each, **clip, output_type="pil") for each in (pipeline, oracle))
        assert len(ours) == len(theirs) == clip["num_frames"]
        assert all(isinstance(frame, PIL.Image.Image) for frame in ours)
        worst = max(np.abs(np.subtract(a, b, dtype=np.int16)).max() for a, b in zip(ours, theirs, strict=True))
        assert worst <= 1  # a value at the border of rounding

    def test_callback_sees_and_changes_the_same_and_may_interrupt(
        self, pipeline: Any, oracle: Any, clip: dict[str, Any]
    ) -> None:
        def run(pipe: Any) -> tuple[list[Any], Any]:
            seen: list[Any] = []

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                assert pipe.current_timestep is not None
                state = pipe.guidance_scale, getattr(pipe, "guidance_rescale", None), pipe.num_timesteps
                seen.append((step, float(timestep), sorted(tensors), *state))
                pipe._interrupt = step == 3
                return {"latents": tensors["latents"] * 0.9}

            watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
            return seen, frames(pipe, **clip, **watched)

        names = oracle._callback_tensor_inputs
        ours, theirs = run(pipeline), run(oracle)
        assert ours[0] == theirs[0]
        assert len(ours[0]) == 4
        assert relative_error(ours[1], theirs[1]) <= 1e-4
        compare(pipeline, oracle, **clip)  # the next call is not interrupted

    def test_callback_changes_the_text(self, pipeline: Any, oracle: Any, clip: dict[str, Any]) -> None:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"prompt_embeds": tensors["prompt_embeds"] + 0.1}

        watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        compare(pipeline, oracle, **clip, **watched, guidance_scale=1.0)

    @pytest.mark.parametrize("case", GUIDANCE)
    def test_guidance_in_callbacks(
        self, case: str, pipeline: Any, oracle: Any, family: str, clip: dict[str, Any]
    ) -> None:
        def run(pipe: Any) -> tuple[int, Any]:
            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                return GUIDANCE[case](pipe, step, tensors)

            rows = []
            with pipe.transformer.register_forward_hook(
                lambda module, args, kwargs, output: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
            ):
                made = frames(
                    pipe,
                    **clip | {"output_type": "latent", "guidance_scale": 4.0},
                    prompt="a cat on a log",
                    negative_prompt="blurry and a little dark",
                    callback_on_step_end=callback,
                    callback_on_step_end_tensor_inputs=oracle._callback_tensor_inputs,
                )
            return sum(rows), made

        if (family, case) in REFUSED_GUIDANCE:
            with pytest.raises((ConfigError, RuntimeError)):
                run(oracle)
            with (
                pytest.warns(UserWarning, match="_guidance_scale was set to"),
                pytest.raises(ConfigError, match="there is no negative prompt"),
            ):
                run(pipeline)
            return
        noted = (family, case) in NOTED_GUIDANCE
        with pytest.warns(UserWarning, match="_guidance_scale was set to") if noted else nullcontext():
            ours = run(pipeline)
        if (family, case) in OWN_GUIDANCE:  # where diffusers mixes up both texts, or dies
            assert ours[0] == 7
            assert bool(torch.isfinite(ours[1]).all())
            return
        theirs = run(oracle)
        assert ours[0] == theirs[0]
        assert relative_error(ours[1], theirs[1]) <= 1e-4

    def test_callback_gives_back_texts_of_another_dtype(self, pipeline: Any, clip: dict[str, Any]) -> None:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"prompt_embeds": tensors["prompt_embeds"].double()}

        watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        np.testing.assert_array_equal(frames(pipeline, **clip, **watched), frames(pipeline, **clip))

    @pytest.mark.parametrize("answer", ["latents", [1], torch.zeros(2)])
    def test_callback_gives_back_no_dict(self, answer: Any, pipeline: Any, clip: dict[str, Any]) -> None:
        expected = frames(pipeline, **clip)
        with pytest.raises(ConfigError, match=f"a callback gave back a {type(answer).__name__}; expected a dict"):
            frames(pipeline, **clip, callback_on_step_end=lambda *given: answer)
        assert pipeline.current_timestep is None
        np.testing.assert_array_equal(frames(pipeline, **clip), expected)

    def test_callback_with_texts_of_two_lengths(self, pipeline: Any, family: str, clip: dict[str, Any]) -> None:
        texts = ready(family) | ready(family, "negative_", tokens=16, seed=5) | FAMILIES[family].guided
        watched = {"callback_on_step_end": lambda pipe, step, timestep, tensors: tensors}
        np.testing.assert_array_equal(frames(pipeline, **clip, **texts, **watched), frames(pipeline, **clip, **texts))
        names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        frames(pipeline, **clip, **texts, **names)  # for nobody
        if not pipeline.joins_texts:
            frames(pipeline, **clip, **texts, **watched, **names)
            return
        with (
            pipeline.transformer.register_forward_hook(lambda *given: pytest.fail("a step was made")),
            pytest.raises(ConfigError, match="both texts as one tensor, and these have 12 and 16 tokens: pad them"),
        ):
            frames(pipeline, **clip, **texts, **watched, **names)

    def test_return_dict(self, pipeline: Any, clip: dict[str, Any]) -> None:
        arguments = {"prompt": "a cat", "output_type": "np", **clip, "num_inference_steps": 2}
        (result,) = pipeline(**arguments, generator=seeded(), return_dict=False)
        np.testing.assert_array_equal(result, pipeline(**arguments, generator=seeded()).frames)

    def test_progress_bar(self, pipeline: Any, clip: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        pipeline.set_progress_bar_config(desc="denoising")
        frames(pipeline, **clip)
        shown = capsys.readouterr().err
        assert "denoising: 100%" in shown
        assert "5/5" in shown


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
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
    ({"prompt": ["a", "b"], "negative_prompt": ["x", "y", "z"]}, "2 prompts and 3 negative"),
    ({"output_type": "jpg"}, "output_type has 'jpg'; expected some of np, pt, pil, latent"),
    ({"callback_on_step_end_tensor_inputs": ["latents", "noise"]}, "'noise'"),
    ({"prompt": ["a"] * 3, "generator": [seeded(), seeded()]}, "2 generators for 3 clips"),
    ({"prompt": ["a"] * 3, "generator": [seeded()]}, "1 generators for 3 clips"),
    ({"generator": 42}, r"generator is a int; expected a torch\.Generator"),
    ({"generator": [None]}, r"generator is a NoneType; expected a torch\.Generator"),
    ({"latents": np.zeros(3)}, "latents is a ndarray; expected a tensor"),
    ({"latents": torch.zeros(3, dtype=torch.complex64)}, "latents is torch.complex64; expected floating values"),
    ({"latents": torch.zeros(3, dtype=torch.int64)}, "latents is torch.int64; expected floating values"),
    ({"latents": torch.zeros(3).to_sparse()}, "latents is torch.sparse_coo; expected a dense tensor"),
    ({"attention_kwargs": ["scale"]}, "attention_kwargs is a list; expected a dict or None"),
    ({"callback_on_step_end": 3}, "callback_on_step_end is a int; expected a function"),
]


class TestPairedGuidance:
    def test_moves_half_the_bytes_to_the_same_clip(self, family: str, folder: Path, clip: dict[str, Any]) -> None:
        guided = clip | FAMILIES[family].guided | {"negative_prompt": "dark, blurry, of low quality"}
        pipeline = load(family, folder)
        resident = frames(pipeline, **guided)
        offload = pipeline.transformer.enable_group_offload("cpu", offload_type="block_level")
        moved = {}
        for way in ("in turn", "paired"):
            pipeline.guidance = way
            before = offload.stats()
            np.testing.assert_array_equal(frames(pipeline, **guided), resident)
            moved[way] = offload.stats().passes - before.passes
        assert moved == {"in turn": 10, "paired": 5}

    @pytest.mark.filterwarnings("ignore:_guidance_scale was set:UserWarning")  # where a family keeps what it was given
    def test_follows_callbacks(self, pipeline: Any, family: str, clip: dict[str, Any]) -> None:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert set(tensors) == set(texts)
            scale = (4.0, 2.5, 1.0, 1.0, 1.0)[step]  # stronger, weaker, none
            pipe._guidance_scale = pipe._true_cfg_scale = scale
            return {name: text * 0.9 if text is not None else None for name, text in tensors.items()}

        texts = ["prompt_embeds", "negative_prompt_embeds"]
        watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": texts}
        guided = clip | FAMILIES[family].guided | {"negative_prompt": "blurry", **watched}
        in_turn = frames(pipeline, **guided)
        pipeline.guidance = "paired"
        ran: list[int] = []
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda _, args, given: ran.append(1 + len(given.get("others", ()))), with_kwargs=True
        )
        np.testing.assert_array_equal(frames(pipeline, **guided), in_turn)
        hook.remove()
        assert ran == ([2, 2, 2, 2, 2] if family == "CogVideoX" else [2, 2, 2, 1, 1])

    def test_ends_where_a_callback_ends_it_as_in_diffusers(self, stock: families.Stock) -> None:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = 1.0 if step == 1 else pipe._guidance_scale
            return {}

        watched = {"callback_on_step_end": callback, "negative_prompt": "blurry", **FAMILIES["Wan2.1"].clip}
        compare(stock.pipeline("Wan2.1"), stock.oracle("Wan2.1"), **watched)

    def test_is_refused_where_it_cannot_be(self, idle: Any, oracle: Any, clip: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="guidance has 'both'; expected some of in turn, paired"):
            idle.guidance = "both"
        idle.guidance = "paired"
        vars(idle)["transformer"] = oracle.transformer  # not adopted, as models of no known kind are not
        with pytest.raises(ConfigError, match="does not take several texts"):
            idle("a cat", **clip)


class TestPhases:
    def test_are_told_with_what_they_begin_with(self, pipeline: Any, clip: dict[str, Any]) -> None:
        told: list[tuple[str, dict[str, Any]]] = []
        pipeline.on_phase = lambda phase, **given: told.append((phase, given))
        made = frames(pipeline, **clip, output_type="pt")
        assert [phase for phase, _ in told] == ["encode", "denoise", "decode"]
        sizes = {"height", "width", "num_frames"}
        assert {name: told[0][1][name] for name in sizes} == {name: clip[name] for name in sizes}
        assert told[0][1]["num_inference_steps"] == 5
        pipeline.on_phase = None
        torch.manual_seed(5)
        if "generator" not in told[2][1]:  # whose state has moved on
            video = pipeline.decode_latents(**told[2][1])
            assert torch.equal(video.transpose(1, 2).mul(0.5).add(0.5).clamp(0, 1), made)
        told.clear()
        frames(pipeline, **clip, output_type="latent")
        assert not told

    def test_check_computes_nothing_and_says_the_sizes(self, idle: Any, clip: dict[str, Any]) -> None:
        seen = idle.on_phase = lambda phase, **given: pytest.fail("a phase began")
        sizes = idle.check("a cat", **clip)
        assert idle.on_phase is seen
        assert (sizes["height"], sizes["num_inference_steps"]) == (clip["height"], 50)
        with pytest.raises(ConfigError, match="width is 0"):
            idle.check("a cat", **clip | {"width": 0})


class TestWrongArguments:
    @pytest.mark.parametrize(("arguments", "message"), REFUSED)
    def test_are_refused_before_anything_runs(
        self, arguments: dict[str, Any], message: str, idle: Any, clip: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **clip, **arguments})

    def test_sizes_and_tensors(self, idle: Any, family: str, clip: dict[str, Any]) -> None:
        multiple, text = FAMILIES[family].multiple, ready(family)
        tall, narrow = multiple * 5 // 2, multiple // 2
        shape = re.escape(str(FAMILIES[family].latents))
        for arguments, message in (
            (
                {"height": tall},
                f"height is {tall}; .* multiple of {multiple}, for example {2 * multiple} or {3 * multiple}",
            ),
            ({"width": narrow}, f"width is {narrow}; expected a multiple of {multiple}, for example {multiple}"),
            ({"latents": torch.zeros(1, 2, 3)}, rf"\(1, 2, 3\).*{shape}"),
            (text, "both prompt and prompt_embeds"),
        ):
            with pytest.raises(ConfigError, match=message):
                idle(**{"prompt": "a cat", **clip, **arguments})

    @pytest.mark.parametrize("name", ["", "negative_"])
    def test_embeddings(self, name: str, idle: Any, family: str, clip: dict[str, Any]) -> None:
        key = f"{name}prompt_embeds"
        for embeds, message in (
            (torch.zeros(1, 12, 33), f"{key} has 33 channels; the transformer takes 32"),
            (torch.zeros(1, 12, 32, dtype=torch.int64), f"{key} is torch.int64; expected floating values"),
            (torch.zeros(1, 0, 32), rf"{key} has shape \(1, 0, 32\); expected \(prompts, tokens"),
        ):
            texts = ready(family) | ready(family, "negative_") | FAMILIES[family].guided | {key: embeds}
            with pytest.raises(ConfigError, match=message):
                idle(**clip | texts)

    def test_components_of_another_kind(self, idle: Any) -> None:
        linear = torch.nn.Linear(2, 2)
        for name, wrong in (
            ("transformer", (3, "x", linear, type(idle.transformer))),
            ("vae", (3, "x", linear, type(idle.vae))),
            ("text_encoder", (3, "x", type(idle.text_encoder))),
            ("tokenizer", (3, "x", linear, type(idle.tokenizer))),
            ("scheduler", (3, "UniPC", linear, type(idle.scheduler))),
        ):
            before = getattr(idle, name)
            for component in wrong:
                given = getattr(component, "__name__", type(component).__name__)
                with pytest.raises(ConfigError, match=f"the {name} is (a|the class) {given}; expected "):
                    setattr(idle, name, component)
            assert getattr(idle, name) is before

    def test_schedulers_of_other_families(self, idle: Any, family: str, clip: dict[str, Any]) -> None:
        others = (
            [vramkit.FlowMatchEulerDiscreteScheduler(), vramkit.UniPCMultistepScheduler.from_config({}, **FLOW)]
            if family == "CogVideoX"
            else [vramkit.CogVideoXDDIMScheduler(), vramkit.CogVideoXDPMScheduler()]
        )
        for scheduler in others:
            idle.scheduler = scheduler
            with pytest.raises(
                ConfigError, match=r"goes by (flow_prediction|epsilon), and this checkpoint's model makes"
            ):
                idle("a cat", **clip)

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("transformer", "no transformer"),
            ("scheduler", "no scheduler"),
            ("vae", 'output_type="latent"'),
            ("text_encoder", "give prompt_embeds"),
            ("tokenizer", "give prompt_embeds"),
        ],
    )
    def test_missing_components(self, missing: str, message: str, idle: Any, clip: dict[str, Any]) -> None:
        setattr(idle, missing, None)
        with pytest.raises(ConfigError, match=message):
            idle("a cat", **clip)

    def test_a_negative_text_without_its_tokenizer(self, idle: Any, family: str, clip: dict[str, Any]) -> None:
        idle.tokenizer = None
        with pytest.raises(ConfigError, match="negative_prompt_embeds"):
            idle(**clip, **ready(family, tokens=16), negative_prompt="x", **FAMILIES[family].guided)


class TestLoading:
    def test_weights_are_mapped_frozen_and_those_of_diffusers(self, pipeline: Any, oracle: Any) -> None:
        for name, model in models_of(pipeline).items():
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
            assert all(span_of(parameter) is not None for parameter in model.parameters())  # views of the files
            theirs = getattr(oracle, name).state_dict()
            assert model.state_dict().keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())

    def test_text_encoders_are_those_of_transformers(self, pipeline: Any, oracle: Any) -> None:
        for name in pipeline.components.keys() & {"text_encoder", "text_encoder_2"}:
            ours, theirs = getattr(pipeline, name), getattr(oracle, name)
            assert type(ours) is type(theirs)
            assert len(list(ours.parameters())) == len(list(theirs.parameters()))  # as many are shared
            computed = dict(theirs.named_buffers())
            assert computed.keys() == dict(ours.named_buffers()).keys()
            assert all(torch.equal(buffer, computed[key]) for key, buffer in ours.named_buffers())

    def test_shards_of_a_variant(self, family: str, clip: dict[str, Any], tmp_path: Path) -> None:
        FAMILIES[family].write(tmp_path, seed=1, variant="fp16", max_shard_size="30KB")
        for part in ("transformer", "text_encoder"):
            assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
        with pytest.raises(CheckpointError, match="safetensors"):
            load(family, tmp_path)
        compare(load(family, tmp_path, variant="fp16"), load_oracle(tmp_path, variant="fp16"), **clip)

    def test_null_components_stay_null(self, family: str, clip: dict[str, Any], copied: Path, oracle: Any) -> None:
        full = load(family, copied)
        absent = [name for name in full.components if name.startswith(("tokenizer", "text_encoder", "vae"))]
        edit_json(copied / "model_index.json", **{name: [None, None] for name in absent})
        pipeline = load(family, copied)
        null = {name for name, part in pipeline.components.items() if part is None}
        assert null == {*absent, *(name for name, part in full.components.items() if part is None)}
        texts = ready(family, tokens=16) | ready(family, "negative_", tokens=16, seed=5)
        compare(pipeline, oracle, **clip, **texts, **FAMILIES[family].guided, output_type="latent")


class TestPlacement:
    def test_to(self, family: str, folder: Path) -> None:
        pipeline = load(family, folder).to(torch.float64)
        assert {model.dtype for model in models_of(pipeline).values()} == {pipeline.dtype} == {torch.float64}
        assert pipeline.device == torch.device("cpu")

    def test_offloaded_models_keep_their_place(self, family: str, folder: Path) -> None:
        pipeline = load(family, folder)
        handle = apply_group_offloading(pipeline.transformer, "cpu", offload_type="leaf_level", store="disk")
        with pytest.warns(RuntimeWarning, match="transformer: offloaded.*moving does nothing"):
            pipeline.to("meta")  # anything that moved has lost its weights
        assert pipeline.vae.device.type == "meta"
        assert pipeline.transformer.device.type == "cpu"
        handle.remove()

    def test_model_offload_needs_a_device(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="no GPU"):
            pipeline.enable_model_cpu_offload()
