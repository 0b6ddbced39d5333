from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, write_lora
from typer.testing import CliRunner

from vramkit import __version__, cli
from vramkit.demo import job
from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import TINY
from vramkit.errors import CheckpointError
from vramkit.offload import offload_of
from vramkit.pipelines.wan.pipeline import WanPipeline

SIZE = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(TINY, cache=tmp_path_factory.mktemp("cache"))


def run(model: Path | str, *arguments: str) -> list[str]:
    return ["run", "--model", str(model), "--prompt", "a cat", *SIZE, *arguments]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail, and return the one line that it says."""
    assert cli.main(arguments) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err


class TestHelp:
    @pytest.mark.parametrize("arguments", [["--help"], [], ["run", "--help"], ["demo", "--help"]])
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
        assert "1/1" in captured.err

    def test_tiles(self, model: Path, tmp_path: Path) -> None:
        self.video(tmp_path, model, "--vae-tiling")

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
                cli.place(pipeline, "cpu", cli.Offload.block, store="disk", resident=resident, slots=2)
            offloads = {name: offload_of(pipeline.components[name]) for name in ("text_encoder", "transformer", "vae")}
            return {name: offload.stats().resident_bytes for name, offload in offloads.items() if offload is not None}

        none, some = resident_bytes("0"), resident_bytes("200KiB")
        assert some["transformer"] > none["transformer"]
        assert some | {"transformer": 0} == none | {"transformer": 0}
        assert len(some) == 3


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
            (run("x", "--out", "./missing/clip.mp4"), "missing does not exist"),
        ],
    )
    def test_are_one_line(self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert said in fails(arguments, capsys)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--height", "40"], "multiple of 16"),
            (["--frames", "0"], "num_frames is 0"),
            (["--steps", "0"], "num_inference_steps is 0"),
            (["--guidance", "nan"], "guidance_scale is nan"),
            (["--flow-shift", "0"], "flow_shift=0.0"),
            (["--store", "tape"], "tape"),
            (["--resident", "much"], "much"),
            (["--fps", "0"], "fps"),
            (["--lora", "./missing.safetensors"], "missing.safetensors"),
        ],
    )
    def test_found_with_a_model_are_one_line(
        self, arguments: list[str], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = run(model, "--device", "cpu", "--out", str(tmp_path / "clip.mp4"), *arguments)
        assert said in fails(command, capsys)
        assert list(tmp_path.iterdir()) == []

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
        ("changes", "said"), [({"identical": False}, "differ"), ({"within_budget": False}, "raise --budget")]
    )
    def test_of_a_demo_that_did_not_hold(
        self, changes: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Outcome:
            identical = True
            within_budget = True

        for name, value in changes.items():
            setattr(Outcome, name, value)
        monkeypatch.setattr(job, "run_demo", lambda *arguments, **options: Outcome())
        assert said in fails(["demo"], capsys)


def test_as_a_program(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vramkit.cli", *run("./missing", "--out", str(tmp_path / "x.mp4"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ./missing does not exist")
    assert "Traceback" not in done.stderr
