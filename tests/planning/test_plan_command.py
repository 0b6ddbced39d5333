"""``vramkit plan`` and ``vramkit run --vram``, and plans without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json
from families import FAMILIES, Stock

from vramkit import Plan, PlanInfeasible, plan
from vramkit.cli import main
from vramkit.commands.options import sides
from vramkit.errors import CheckpointError, ConfigError
from vramkit.memory import MIB, format_bytes
from vramkit.planning.skeletons import known_models, skeleton_of

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_planned_from_its_configs_alone(family: str, stock: Stock) -> None:
    folder, clip = stock.folder(family), dict(FAMILIES[family].clip)
    if family == "CogVideoX image-to-video":
        pytest.skip("its small file has positions in fp64, which no config says")
    clip.pop("max_sequence_length")
    planned = plan(folder, "1GiB", device="cpu", num_inference_steps=2, **clip)
    loaded = plan(stock.pipeline(family), "1GiB", device="cpu", num_inference_steps=2, **clip)
    sizes = [(each.name, each.weight_bytes, each.device_bytes) for each in planned.components]
    assert sizes == [(each.name, each.weight_bytes, each.device_bytes) for each in loaded.components]
    assert planned.phases[-1].activation_bytes == pytest.approx(loaded.phases[-1].activation_bytes, rel=0.01)


def test_a_device_that_is_not_there_is_assumed(stock: Stock) -> None:
    clip = {**FAMILIES["Wan2.1"].clip, "num_inference_steps": 2}
    planned = plan(stock.folder("Wan2.1"), "1GiB", **clip)
    assert planned.device == "cuda"
    assert planned.is_measured == torch.cuda.is_available()
    assert planned.margin_bytes == 64 * MIB
    assert (
        planned.component("transformer").weight_bytes
        < plan(stock.folder("Wan2.1"), "1GiB", device="cpu", **clip).component("transformer").weight_bytes
    )  # 16 bits


def test_the_command(stock: Stock, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(stock.folder("Wan2.1"))
    assert main(["plan", folder, *SMALL, "--vram", "100MiB"]) == 0
    text = capsys.readouterr().out
    for expected in ("WanPipeline", "transformer", "vae", "100 MiB", "peak"):
        assert expected in text
    assert main(["plan", folder, *SMALL, "--vram", "100MiB", "--json", "--device", "cpu"]) == 0
    assert Plan.from_json(capsys.readouterr().out).call["num_frames"] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["wan2.1-41b", "--vram", "6GiB"], "near ones are wan2.1-14b"),
        (["wan2.1-14b", "--vram", "plenty"], "vram='plenty'"),
        (["wan2.1-14b", "--vram", "6"], 'did you mean "6GiB"?'),
        (["wan2.1-14b", "--vram", "7.5"], 'did you mean "7.5GiB"?'),
        (["wan2.1-14b", "--vram", "6000"], 'did you mean "6000MiB"?'),
        (["wan2.1-14b", "--vram", "6GiB", "--ram", "32"], 'did you mean "32GiB"?'),
        (["wan2.1-14b", "--vram", "6GiB", "--image", "nowhere.png"], "nowhere.png"),
        (["wan2.1-14b", "--vram", "6GiB", "--size", "832"], "832x480"),
        (["wan2.1-14b", "--vram", "6GiB", "--allow", "all"], "'bounded'"),
        (["./nowhere", "--vram", "6GiB"], "does not exist"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"num_attention_heads": -1}, "does not describe a WanTransformer3DModel"),
        ("transformer", {"num_layers": 10**9}, "does not describe a WanTransformer3DModel"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean of the vae has 1 numbers, 0.0 the least"),
        ("vae", {"latents_std": [0.0] * 16}, "expected a finite one for each of 16 channels, above 0"),
        ("text_encoder", {"num_layers": 10**7}, "does not describe a UMT5EncoderModel"),
        ("text_encoder", {"d_model": "wide"}, "does not describe a UMT5EncoderModel"),
    ],
)
def test_damaged_configs(
    command: str, part: str, changes: dict[str, Any], said: str, stock: Stock, tmp_path: Path, capsys: Any
) -> None:
    folder = shutil.copytree(stock.folder("Wan2.1"), tmp_path / "model")
    edit_json(folder / part / "config.json", **changes)
    given = {"plan": [str(folder), *SMALL], "run": ["--model", str(folder), "--prompt", "x", "--device", "cpu"]}
    assert main([command, *given[command], "--vram", "1GiB"]) == 1
    assert said in capsys.readouterr().err


def test_an_index_that_lists_too_little(stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(stock.folder("Wan2.1"), tmp_path / "model")
    edit_json(folder / "model_index.json", vae=["diffusers"], scheduler=None)
    assert main(["plan", str(folder), *SMALL, "--vram", "1GiB"]) == 1
    assert "does not list vae, scheduler as [library, class]" in capsys.readouterr().err


def test_below_the_floor_the_command_says_what_would_do(stock: Stock, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(stock.folder("LTX-Video")), "--size", "96x64", "--frames", "9", "--device", "cpu"]
    assert main([*arguments, "--vram", "1MiB"]) == 1
    said = capsys.readouterr().err
    assert "the nearest budget that fits is" in said.lower()
    assert "decode" in said


def test_sizes() -> None:
    assert sides("832x480", height=None, width=None) == sides(None, height=480, width=832)
    with pytest.raises(ConfigError, match="832x480"):
        sides("big", height=None, width=None)
    with pytest.raises(ConfigError, match=r"--size 832x480 was given with --height or --width"):
        sides("832x480", height=None, width=832)


def test_every_command_for_clips_takes_their_size_in_one_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}')
    out = str(tmp_path / "out.mp4")
    commands = [
        ["plan", "wan2.1-14b", "--vram", "6GiB"],
        ["run", "--model", "none", "--prompt", "a cat", "--out", out],
        ["batch", str(tmp_path / "prompts.jsonl"), "--model", "none", "--out", out],
    ]
    for command in commands:
        assert main([*command, "--size", "big"]) == 1
        assert "--size 'big'; expected width and height in pixels" in capsys.readouterr().err


@pytest.mark.parametrize("name", known_models())
def test_known_models_are_what_was_published(name: str) -> None:
    """Billions of parameters, as the model cards have them."""
    published = {
        "wan2.1-14b": (14.3, 5.68),
        "wan2.1-1.3b": (1.42, 5.68),
        "wan2.2-t2v-a14b": (14.3, 5.68),
        "wan2.2-ti2v-5b": (5.0, 5.68),
        "hunyuanvideo": (12.8, 7.51),
        "ltx-video-2b": (1.92, 4.76),
        "cogvideox-2b": (1.69, 4.76),
        "cogvideox-5b": (5.57, 4.76),
    }
    pipeline = skeleton_of(name.upper(), dtype=torch.bfloat16)
    counts = [
        sum(parameter.numel() for parameter in part.parameters()) / 1e9
        for part in (pipeline.transformer, pipeline.text_encoder)
    ]
    assert counts == pytest.approx(published[name], rel=0.01)
    assert all(parameter.is_meta for parameter in pipeline.transformer.parameters())


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        plan(tmp_path, "1GiB")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StrangePipeline"}))
    with pytest.raises(CheckpointError, match="StrangePipeline"):
        plan(tmp_path, "1GiB")


@pytest.mark.parametrize("command", ["run", "verify", "decode"])
def test_a_budget_is_refused_before_anything_is_read(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"run": ["--model", "nowhere", "--prompt", "a"], "verify": ["nowhere"], "decode": ["nowhere"]}[command]
    assert main([command, *arguments, "--vram", "6"]) == 1
    assert 'did you mean "6GiB"?' in capsys.readouterr().err
    assert main([command, *arguments, "--ram", "6GiB"]) == 1
    assert "go with --vram" in capsys.readouterr().err
    assert main([command, *arguments, "--vram", "6GiB", "--slots", "2"]) == 1
    assert "leave one of them out" in capsys.readouterr().err


def test_a_clip_within_a_budget_is_verified(stock: Stock, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1", "--device", "cpu"]
    assert main(["verify", str(stock.folder("Wan2.1")), *small, "--vram", "24MiB"]) == 0
    assert "24 MiB on the device" in capsys.readouterr().err


def test_latents_are_decoded_within_a_budget(stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip.mp4"
    small = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1", "--device", "cpu", "--keep-latents"]
    assert main(["run", "--model", str(stock.folder("Wan2.1")), "--prompt", "a", "--out", str(out), *small]) == 0
    latents = str(tmp_path / "clip.latents.safetensors")
    first = out.read_bytes()
    assert main(["decode", latents, "--device", "cpu", "--keep-latents", "--vram", "30KiB"]) == 1
    assert "the decode by vae" in capsys.readouterr().err
    assert main(["decode", latents, "--device", "cpu", "--vram", "24MiB"]) == 0
    assert "24 MiB on the device" in capsys.readouterr().err
    assert out.read_bytes() == first


def test_a_run_within_a_budget(stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "run",
        "--model",
        str(stock.folder("Wan2.1")),
        "--prompt",
        "a cat",
        "--out",
        str(tmp_path / "clip.mp4"),
    ]
    arguments += ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--device", "cpu"]
    assert main([*arguments, "--vram", "24MiB"]) == 0
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    said = capsys.readouterr().err
    assert f"of {format_bytes(24 * MIB)} for tensors" in said
    assert "which no budget bounds" in said
    assert main([*arguments, "--vram", "10KiB"]) == 1
    assert "nearest budget" in capsys.readouterr().err
    assert main([*arguments, "--vram", "24MiB", "--slots", "2"]) == 1
    assert "leave one of them out" in capsys.readouterr().err
    assert main([*arguments, "--ram", "6GiB"]) == 1
    assert "go with --vram" in capsys.readouterr().err


def test_infeasible_is_a_config_error() -> None:
    assert issubclass(PlanInfeasible, ConfigError)
