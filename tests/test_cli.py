from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, write_lora
from denoisers import build_pair
from families import FAMILIES, Stock, picture
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from vramkit import __version__, cli, machine
from vramkit.commands import checkpoints as checkpoints_of_commands
from vramkit.commands.checkpoints import place
from vramkit.commands.latents import Latents
from vramkit.commands.options import Offload
from vramkit.demo import job
from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import TINY
from vramkit.errors import CheckpointError, StoreError
from vramkit.offload import offload_of
from vramkit.pipelines.wan.pipeline import WanPipeline

doctor_of_commands = importlib.import_module("vramkit.commands.doctor")
SIZES = {"height": "height", "width": "width", "frames": "num_frames"}
SIZE = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(TINY, cache=tmp_path_factory.mktemp("cache"))


def run(model: Path | str, *arguments: str) -> list[str]:
    return ["run", "--model", str(model), "--prompt", "a cat", *SIZE, *arguments]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail, and return the one line that it says."""
    capsys.readouterr()  # what imports of the test have said
    assert cli.main(arguments) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err


def latents_of(pipeline: str, model: str) -> Latents:
    """As a run of so named a pipeline would leave them, but for their size."""
    return Latents(
        latents=torch.zeros(1),
        decoding={},
        pipeline=pipeline,
        model=model,
        dtype="float32",
        fps=16,
        seed=0,
        tiling=False,
        video="x.mp4",
    )


class TestHelp:
    @pytest.mark.parametrize(
        "arguments",
        [["--help"], [], *([name, "--help"] for name in ("run", "batch", "demo", "decode", "verify", "doctor"))],
    )
    def test_is_printed(self, arguments: list[str]) -> None:
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output

    def test_names_every_option(self) -> None:
        text = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).output
        for option in [
            "model",
            "prompt",
            "out",
            "negative-prompt",
            "image",
            "last-image",
            "height",
            "width",
            "frames",
            "steps",
            "guidance",
            "seed",
            "fps",
            "flow-shift",
            "dtype",
            "device",
            "offload",
            "store",
            "resident",
            "slots",
            "quantize",
            "lora",
            "lora-weight",
            "vae-tiling",
            "keep-latents",
            "trace",
            "vram",
            "ram",
            "allow",
        ]:
            assert f"--{option}" in text

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"vramkit {__version__}\n"

    def test_starts_without_torch(self) -> None:
        code = "import sys; from vramkit import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


class TestRunWan:
    def video(self, tmp_path: Path, model: Path, *arguments: str) -> bytes:
        out = tmp_path / "clip.mp4"
        assert cli.main(run(model, "--out", str(out), "--device", "cpu", *arguments)) == 0
        return out.read_bytes()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--offload", "block"],
            ["--offload", "leaf", "--slots", "1", "--store", "disk"],
            ["--offload", "leaf", "--slots", "3", "--resident", "100KiB"],
            ["--offload", "model"],
        ],
    )
    def test_every_offloading_gives_the_same_video(self, arguments: list[str], model: Path, tmp_path: Path) -> None:
        resident = self.video(tmp_path, model, "--offload", "none")
        assert self.video(tmp_path, model, *arguments) == resident

    def test_seed_and_settings_arrive(self, model: Path, tmp_path: Path) -> None:
        plain = self.video(tmp_path, model)
        for change in (
            ["--seed", "1"],
            ["--guidance", "1"],
            ["--flow-shift", "7", "--steps", "2"],
            ["--negative-prompt", "dark"],
            ["--fps", "8"],
            ["--dtype", "bf16"],
        ):
            assert self.video(tmp_path, model, *change) != plain

    def test_prints_the_video_and_shows_progress(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.video(tmp_path, model)
        captured = capsys.readouterr()
        assert captured.out == f"{tmp_path / 'clip.mp4'}\n"
        lines = captured.err.replace("\r", "\n").splitlines()
        told = {line.split()[0]: line for line in lines if line[:1].isalpha()}
        assert list(told) == ["model", "weights", "clip", "encode:", "denoise:", "decode:", "write:", "done"]
        assert all("100%" in told[phase] for phase in ("encode:", "denoise:", "decode:", "write:"))
        assert told["model"].endswith("demo-tiny: WanPipeline in float32 on cpu")
        assert "text_encoder: 209 KiB stream from disk through 2 slots of 64 KiB, 640 B stay on cpu" in told["weights"]
        assert told["clip"].split(maxsplit=1)[1] == (
            "48x32, 5 frames, 1 steps, guidance 5 (default), seed 0, 16 frames/s (default)"
        )
        assert re.search(r"peak [\d.]+ [KM]iB of process memory", told["done"])
        assert re.search(r"s \(load [\d.]+, encode [\d.]+, denoise [\d.]+, decode [\d.]+, write [\d.]+\)", lines[-2])
        assert str(tmp_path / "clip.mp4") in lines[-1]
        assert list(tmp_path.iterdir()) == [tmp_path / "clip.mp4"]

    def test_a_trace_is_written_and_summed_up(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.video(tmp_path, model, "--offload", "block", "--slots", "1", "--trace", str(tmp_path / "run.json"))
        assert f"{tmp_path / 'run.json'}: " in capsys.readouterr().err
        events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
        assert {"copy", "pass"} <= {event.get("cat") for event in events}

    def test_tiles(self, model: Path, tmp_path: Path) -> None:
        self.video(tmp_path, model, "--vae-tiling")

    def test_without_an_image_that_is_needed(
        self, stock: Stock, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture().save(tmp_path / "image.png")
        image, folder = str(tmp_path / "image.png"), stock.folder("Wan2.1 image-to-video")
        others = [stock.folder(family) for family in ("LTX-Video", "HunyuanVideo")]
        capsys.readouterr()  # what their writers say
        assert "makes clips of an image: give --image" in fails(run(folder), capsys)
        assert "missing.png does not exist" in fails(run(folder, "--image", "missing.png"), capsys)
        said = fails(run(others[0], "--image", image, "--last-image", image), capsys)
        assert "--last-image was given, which LTXImageToVideoPipeline does not take" in said
        said = fails(run(others[1], "--image", image), capsys)
        assert "--image was given, which HunyuanVideoPipeline does not take" in said
        assert "takes 16 channels" in fails(run(model, "--image", image, "--device", "cpu"), capsys)

    @pytest.mark.parametrize("family", ["Wan2.1 image-to-video", "Wan2.2 5B", "LTX-Video"])
    def test_of_an_image(self, family: str, stock: Stock, tmp_path: Path) -> None:
        videos = []
        for seed in (7, 8):
            image, out = tmp_path / "image.png", tmp_path / f"{seed}.mp4"
            picture(seed=seed).save(image)
            command = run(stock.folder(family), "--image", str(image), "--out", str(out), "--device", "cpu")
            assert cli.main([*command, "--width", "96", "--height", "64", "--frames", "9"]) == 0
            videos.append(out.read_bytes())
        assert videos[0] != videos[1]

    def test_quantized_and_adapted(self, model: Path, tmp_path: Path) -> None:
        adapter = write_lora(WanPipeline.from_pretrained(model).transformer, tmp_path / "adapter")
        videos = [self.video(tmp_path, model)]
        videos += [self.video(tmp_path, model, "--quantize", kind) for kind in ("fp8", "int8", "nf4")]
        videos += [
            self.video(tmp_path, model, "--lora", str(adapter), "--lora-weight", weight) for weight in ("1", "2")
        ]
        assert len(set(videos)) == len(videos)
        both = ("--quantize", "nf4", "--lora", str(adapter))
        assert self.video(tmp_path, model, *both, "--offload", "leaf") == self.video(tmp_path, model, *both)

    def test_resident_is_for_the_transformer(self, model: Path) -> None:
        def resident_bytes(resident: str) -> dict[str, int]:
            pipeline = WanPipeline.from_pretrained(model)
            for _ in range(2):  # again is harmless
                place(pipeline, "cpu", Offload.block, store="disk", resident=resident, slots=2)
            offloads = {name: offload_of(pipeline.components[name]) for name in ("text_encoder", "transformer", "vae")}
            return {name: offload.stats().resident_bytes for name, offload in offloads.items() if offload is not None}

        none, some = resident_bytes("0"), resident_bytes("200KiB")
        assert some["transformer"] > none["transformer"]
        assert some | {"transformer": 0} == none | {"transformer": 0}
        assert len(some) == 3


def test_disk_is_hinted_at_where_memory_is_short(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = WanPipeline.from_pretrained(model)
    assert checkpoints_of_commands.hint_of_disk(pipeline, None) is None
    monkeypatch.setattr(checkpoints_of_commands, "available_ram_bytes", lambda: 2**20)
    assert "1 MiB of free memory" in str(checkpoints_of_commands.hint_of_disk(pipeline, None))
    assert checkpoints_of_commands.hint_of_disk(pipeline, "disk") is None


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["bogus"], "bogus"),
            (["run", "--model", "x", "--prompt", "a", "bogus"], "bogus"),
            (["run"], "--model"),
            (["run", "--model", "x"], "--prompt"),
            (["--bogus"], "--bogus"),
            (["demo", "--budget", "many"], "many"),
            (["demo", "--device", "tpu"], "tpu"),
            (["demo", "--preset", "huge"], "huge"),
            (run("./missing"), "missing does not exist"),
            (run("x", "--steps", "many"), "--steps"),
            (run("x", "--slots", "0"), "--slots"),
            (run("x", "--quantize", "int3"), "--quantize"),
            (run("x", "--seed", "-1"), "--seed"),
            (run("x", "--seed", str(2**64)), "--seed"),
            (run("x", "--dtype", "int8"), "--dtype"),
            (run("x", "--offload", "some"), "--offload"),
            (run("x", "--offload", "model", "--store", "disk"), "--store was given with --offload model"),
            (run("x", "--offload", "none", "--slots", "2"), "--slots was given with --offload none"),
            (run("x", "--device", "tpu"), "tpu"),
            (run("x", "--out", "clip.txt"), ".mp4"),
            (run("x", "--store", "tape"), "--store is 'tape'; expected one of registered, mapped"),
            (run("x", "--resident", "much"), "--resident: a size was given as 'much'"),
            (run("x", "--lora-weight", "nan"), "--lora-weight is nan"),
            (["run", "--model", "x", "--prompt", " "], "--prompt is empty"),
            (["decode", "./missing.safetensors"], "missing.safetensors cannot be read"),
            (["verify", "x", "--offload", "none"], "--offload is 'none'"),
            (["doctor", "--folder", "./missing"], "--folder is 'missing', which is no folder"),
            (run("x", "--out", "./missing/clip.mp4"), "missing does not exist"),
        ],
    )
    def test_are_one_line(self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert said in fails(arguments, capsys)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--height", "40"], "error: --height is 40; expected a multiple of 16"),
            (["--frames", "0"], "--frames is 0"),
            (["--steps", "0"], "--steps is 0"),
            (["--guidance", "nan"], "--guidance is nan"),
            (["--flow-shift", "0"], "--flow-shift=0.0"),
            (["--fps", "0"], "--fps is 0"),
            (["--lora", "./missing.safetensors"], "missing.safetensors"),
        ],
    )
    def test_found_with_a_model_are_one_line(
        self, arguments: list[str], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And before a weight is read: there are none in this copy of the checkpoint."""
        copy = shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
        command = run(copy, "--device", "cpu", "--out", str(tmp_path / "clip.mp4"), *arguments)
        assert said in fails(command, capsys)
        assert list(tmp_path.iterdir()) == [copy]

    def test_adapters_of_other_models_are_found_before_weights(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
        adapter = write_lora(build_pair("LTX-Video")[0], tmp_path / "adapter")
        command = run(copy, "--device", "cpu", "--out", str(tmp_path / "clip.mp4"), "--lora", str(adapter))
        assert str(adapter) in fails(command, capsys)

    def test_damaged_checkpoint(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
        said = fails(run(copy, "--device", "cpu", "--out", str(tmp_path / "clip.mp4")), capsys)
        assert "diffusion_pytorch_model.safetensors" in said

    @pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "transformer", "scheduler", "vae"])
    def test_checkpoint_without_a_part(
        self, name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        edit_json(copy / "model_index.json", **{name: [None, None]})
        options = ["--vae-tiling", "--flow-shift", "3"]
        assert f"has no {name}" in fails(run(copy, "--device", "cpu", *options), capsys)

    def test_demo_into_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert "cannot be written to" in fails(["demo", "--device", "cpu", "--out", str(tmp_path / "file")], capsys)

    def raising(self, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any, **options: Any) -> Any:
            raise error

        monkeypatch.setattr(job, "run_demo", fail)

    def test_ctrl_c(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.raising(KeyboardInterrupt(), monkeypatch)
        assert cli.main(["demo"]) == 130
        assert capsys.readouterr().err.split() == ["interrupted"]

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (CheckpointError("first line\nsecond line"), "first line second line"),
            (OSError(28, "No space left on device"), "No space left"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--offload leaf"),
        ],
    )
    def test_of_a_run(
        self, error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.raising(error, monkeypatch)
        assert said in fails(["demo"], capsys)

    def test_defects_are_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raising(RuntimeError("a defect"), monkeypatch)
        with pytest.raises(RuntimeError, match="a defect"):
            cli.main(["demo"])

    @pytest.mark.parametrize(
        ("changes", "said"), [({"is_right": False}, "differ"), ({"within_budget": False}, "raise --budget")]
    )
    def test_of_a_demo_that_did_not_hold(
        self, changes: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Outcome:
            is_right = True
            within_budget = True

        for name, value in changes.items():
            setattr(Outcome, name, value)
        monkeypatch.setattr(job, "run_demo", lambda *arguments, **options: Outcome())
        assert said in fails(["demo"], capsys)


class TestDecode:
    @pytest.fixture
    def whole(self, model: Path, tmp_path: Path) -> bytes:
        """The video of a run that comes to its end."""
        assert cli.main(run(model, "--out", str(tmp_path / "whole.mp4"), "--device", "cpu", "--vae-tiling")) == 0
        return (tmp_path / "whole.mp4").read_bytes()

    def interrupted(self, model: Path, out: Path, error: BaseException) -> int:
        """The status of the same run, stopped in its decode."""

        def fail(*arguments: Any, **options: Any) -> Any:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WanPipeline, "decode_latents", fail)
            return cli.main(run(model, "--out", str(out), "--device", "cpu", "--vae-tiling"))

    def test_finishes_what_was_interrupted(
        self, whole: bytes, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, latents = tmp_path / "clip.mp4", tmp_path / "clip.latents.safetensors"
        assert self.interrupted(model, out, torch.OutOfMemoryError("CUDA out of memory")) == 1
        *_, kept, error = capsys.readouterr().err.splitlines()
        assert f"`vramkit decode {latents}` makes the video" in kept
        assert error.startswith("error: the device memory is not enough")
        assert latents.exists()
        assert not out.exists()
        assert f"{latents} is there" in fails(run(model, "--out", str(out), "--device", "cpu"), capsys)
        assert cli.main(["decode", str(latents), "--device", "cpu", "--keep-latents"]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        assert out.read_bytes() == whole
        other = tmp_path / "other.mkv"
        arguments = ["--model", str(model), "--output", str(other), "--offload", "none"]
        assert cli.main(["decode", str(latents), "--device", "cpu", *arguments]) == 0
        assert other.exists()
        assert not latents.exists()

    def test_a_run_goes_on_where_latents_cannot_be_kept(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(self: Any, path: Path) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(Latents, "save", fail)
        assert cli.main(run(model, "--out", str(tmp_path / "clip.mp4"), "--device", "cpu")) == 0
        assert "the latents are not kept: the disk is full" in capsys.readouterr().err

    def test_refuses_other_checkpoints_and_other_files(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "x.latents.safetensors"
        latents_of("LTXPipeline", str(model)).save(path)
        said = fails(["decode", str(path), "--device", "cpu"], capsys)
        assert "is a checkpoint of WanPipeline" in said
        assert "holds latents of LTXPipeline" in said
        weights = model / "vae" / "diffusion_pytorch_model.safetensors"
        assert "holds no latents" in fails(["decode", str(weights), "--device", "cpu"], capsys)

    @pytest.mark.parametrize(
        "damage",
        [
            {"decoding": None},
            {"settings": "{"},
            {"settings": "[1]"},
            {"settings": {"fps": "16"}},
            {"settings": {"dtype": "save"}},
            {"settings": {"more": 1}},
            {"settings": {"seed": True}},
            {"tensors": {}},
            {"tensors": {"latents": torch.zeros(1, dtype=torch.int64)}},
            {"tensors": {"latents": torch.zeros(1), "generator_state": torch.zeros(3, dtype=torch.uint8)}},
        ],
    )
    def test_damaged_latents(self, damage: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "x.latents.safetensors"
        latents_of("WanPipeline", "x").save(path)
        assert Latents.load(path).video == "x.mp4"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = damage.get("tensors", {"latents": file.get_tensor("latents")})
        settings = damage.get("settings", {})
        if isinstance(settings, dict):
            settings = json.dumps(json.loads(metadata["settings"]) | settings)
        metadata |= {"settings": settings, "decoding": damage.get("decoding", metadata["decoding"])}
        save_file(tensors, path, {name: value for name, value in metadata.items() if value is not None})
        assert f"{path} is damaged: " in fails(["decode", str(path), "--device", "cpu"], capsys)
        assert path.exists()

    @pytest.mark.parametrize("family", ["HunyuanVideo", "LTX-Video", "CogVideoX"])
    def test_latents_of_every_family_are_decoded_alike(self, family: str, stock: Stock, tmp_path: Path) -> None:
        size = [f"--{name}={FAMILIES[family].clip[key]}" for name, key in SIZES.items()]
        command = ["run", "--model", str(stock.folder(family)), "--prompt", "a cat", "--steps", "2", "--device", "cpu"]
        out = tmp_path / "clip.mp4"
        assert cli.main([*command, *size, "--out", str(out), "--keep-latents"]) == 0
        video = out.read_bytes()
        out.unlink()
        assert cli.main(["decode", str(tmp_path / "clip.latents.safetensors"), "--device", "cpu"]) == 0
        assert out.read_bytes() == video
        assert [*tmp_path.iterdir()] == [out]


class TestVerify:
    SMALL = ("--height", "32", "--width", "32", "--frames", "5", "--steps", "1", "--device", "cpu")

    def test_streamed_is_resident(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["verify", str(model), *self.SMALL, "--offload", "block"]) == 0
        captured = capsys.readouterr()
        assert captured.out == "the same, bit by bit: latents and frames\n"
        sums = re.findall(r"latents (\w{8}), frames (\w{8})", captured.err)
        assert len(sums) == 2
        assert sums[0] == sums[1]

    @pytest.mark.parametrize(
        ("part", "said"), [("transformer", "the latents differ in"), ("vae", "the frames differ in")]
    )
    def test_other_bytes_are_told(
        self, part: str, said: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def place_spoiled(pipeline: Any, device: str, way: Offload, **options: Any) -> None:
            if way is not Offload.none:
                for parameter in getattr(pipeline, part).parameters():
                    parameter.data.mul_(1.01)

        monkeypatch.setattr(checkpoints_of_commands, "place", place_spoiled)
        assert cli.main(["verify", str(model), *self.SMALL]) == 1
        assert said in capsys.readouterr().err

    def test_sizes_are_checked_first(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--width is 40" in fails(["verify", str(model), "--device", "cpu", "--width", "40"], capsys)


class TestDoctor:
    def test_json_and_lines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setattr(machine, "disk_read_gbps", lambda folder: (1.25, True))
        assert cli.main(["doctor", "--folder", str(tmp_path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["versions"]["torch"] == torch.__version__
        assert found["disk"] == {"folder": str(tmp_path), "read_gbps": 1.25, "is_direct": True}
        assert found["ram"]["total_bytes"] > found["ram"]["available_bytes"] > 0
        assert cli.main(["doctor", "--folder", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        for name in ("versions", "device", "memory", "cgroup", "locking", "disk", "warning"):
            assert f"\n{name} " in f"\n{shown}"

    def test_what_is_in_the_way(self) -> None:
        gpu = {"name": "A", "shares_ram": True, "link_gbps": None, "memory_bytes": 2**35, "free_bytes": 2**34}
        found = {
            "devices": [gpu],
            "page_lock_limit_bytes": 8 * 2**20,
            "cgroups": [
                {"path": "/inner", "limit_bytes": 2**40, "used_bytes": 0},
                {"path": "/outer", "limit_bytes": 2**32, "used_bytes": 0},
            ],
            "ram": {"total_bytes": 2**36},
        }
        told = "\n".join(doctor_of_commands._findings(found))
        for part in ("locking is limited to 8 MiB", "/outer limits memory to 4 GiB", "computes in system memory"):
            assert part in told
        free = {"devices": [gpu | {"shares_ram": False, "link_gbps": 55.25}], "cgroups": []}
        assert "limit" not in "\n".join(doctor_of_commands._findings(found | free))
        disk = {"folder": "/d", "read_gbps": 3.0, "is_direct": False}
        ram = {"total_bytes": 2**36, "available_bytes": 2**35}
        shown = doctor_of_commands._lines(found | free | {"versions": {}, "disk": disk, "ram": ram, "warnings": []})
        assert "device    A: 32 GiB, 16 GiB free, link 55.2 GB/s" in shown
        assert "locking   8 MiB (ulimit -l)" in shown
        assert "warning   none" in shown


def test_as_a_program(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vramkit", *run("./missing", "--out", str(tmp_path / "x.mp4"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ./missing does not exist")
    assert "Traceback" not in done.stderr
