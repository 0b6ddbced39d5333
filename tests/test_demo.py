from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console

from vramkit.demo import checkpoint, job, worker
from vramkit.demo.checkpoint import MANIFEST, cache_folder, cached_checkpoint, is_whole
from vramkit.demo.presets import PRESETS, SMALL, TINY
from vramkit.demo.tokenizer import vocabulary, write_tokenizer
from vramkit.errors import ConfigError, StoreError, VramkitError
from vramkit.machine import resolve_device
from vramkit.timeline import Trace


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    cached_checkpoint(TINY, cache=folder)
    return folder


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache to be spoiled."""
    return shutil.copytree(cache, tmp_path / "cache")


def listing(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


class TestTokenizer:
    def test_cuts_known_words_whole_and_others_into_letters(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        count = write_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert len(tokenizer) == count == len(vocabulary())
        ids = tokenizer("a cat 7!", padding="max_length", max_length=12).input_ids
        assert ids[-4:] == [0] * 4
        assert tokenizer.convert_ids_to_tokens(ids[:3]) == ["\u2581a", "\u2581cat", "\u2581"]
        assert ids.index(1) < 8  # the end token
        assert 2 not in tokenizer("every letter is known: xyz").input_ids
        assert 2 in tokenizer("\u732b").input_ids

    def test_pieces_are_unique(self) -> None:
        pieces = [piece for piece, _ in vocabulary()]
        assert len(set(pieces)) == len(pieces)
        assert all(len(pieces) <= preset.text_encoder["vocab_size"] for preset in PRESETS.values())


class TestCheckpoint:
    def test_is_read_by_diffusers_too(self, cache: Path) -> None:
        from diffusers import WanPipeline

        pipeline = WanPipeline.from_pretrained(cache / "demo-tiny", torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": TINY.height, "width": TINY.width, "num_frames": 5, "num_inference_steps": 1}
        frames = pipeline("a cat", **size, generator=torch.Generator().manual_seed(0)).frames
        assert np.isfinite(frames).all()
        assert frames.std() > 0.05

    def test_is_the_same_every_time(self, cache: Path, tmp_path: Path) -> None:
        again = cached_checkpoint(TINY, cache=tmp_path)
        assert (again / MANIFEST).read_text() == (cache / "demo-tiny" / MANIFEST).read_text()

    def test_is_written_once(self, own_cache: Path) -> None:
        weights = own_cache / "demo-tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
        written = weights.stat().st_mtime_ns
        assert cached_checkpoint(TINY, cache=own_cache) == own_cache / "demo-tiny"
        assert weights.stat().st_mtime_ns == written
        cached_checkpoint(TINY, cache=own_cache, fresh=True)
        assert weights.stat().st_mtime_ns != written

    def test_what_killed_processes_left_is_removed(self, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        kept = [f".demo-tiny.{os.getpid()}0.part.txt", f".demo-tiny.{os.getppid()}.part", ".demo-tiny.mine.part"]
        for name in (f".demo-tiny.{ended.pid}.part", *kept):
            (tmp_path / name).mkdir()
        cached_checkpoint(TINY, cache=tmp_path)
        assert listing(tmp_path) == sorted([*kept, "demo-tiny"])

    def spoil_flip(self, folder: Path) -> None:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    def spoil_cut(self, folder: Path) -> None:
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def spoil_missing(self, folder: Path) -> None:
        (folder / "tokenizer" / "tokenizer.json").unlink()

    def spoil_old(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))

    def spoil_manifest(self, folder: Path) -> None:
        (folder / MANIFEST).write_text("{")

    @pytest.mark.parametrize("how", ["flip", "cut", "missing", "old", "manifest"])
    def test_damaged_and_old_ones_are_written_again(self, how: str, own_cache: Path) -> None:
        folder = own_cache / "demo-tiny"
        getattr(self, f"spoil_{how}")(folder)
        assert not is_whole(folder, TINY)
        assert is_whole(cached_checkpoint(TINY, cache=own_cache), TINY)
        assert listing(own_cache) == ["demo-tiny"]

    def test_of_another_shape_is_not_used(self, cache: Path) -> None:
        other = dataclasses.replace(TINY, transformer=TINY.transformer | {"num_layers": 4})
        assert not is_whole(cache / "demo-tiny", other)
        assert is_whole(cache / "demo-tiny", dataclasses.replace(TINY, num_frames=9))  # the clip is not its business

    @pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_a_torn_write_leaves_nothing(
        self, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(folder: Path, preset: Any) -> None:
            (folder / "half").write_text("half")
            raise error

        monkeypatch.setattr(checkpoint, "write_checkpoint", write)
        expected = StoreError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left.*VRAMKIT_CACHE" if expected is StoreError else None):
            cached_checkpoint(TINY, cache=tmp_path)
        assert listing(tmp_path) == []

    def test_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VRAMKIT_CACHE", str(tmp_path))
        assert cache_folder() == tmp_path
        monkeypatch.delenv("VRAMKIT_CACHE")
        monkeypatch.setattr(checkpoint.sys, "platform", "linux")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "vramkit"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == Path.home() / ".cache" / "vramkit"
        monkeypatch.setattr(checkpoint.sys, "platform", "darwin")
        assert cache_folder() == Path.home() / "Library" / "Caches" / "vramkit"


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[job.Outcome, str, Path]:
    """The demo on the tiny checkpoint, its workers in this process: its outcome, what it printed, its output folder."""

    def work(command: list[str], **_options: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=worker.main(command[-1]))

    out, text = tmp_path_factory.mktemp("out") / "made", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VRAMKIT_CACHE", str(cache))
        patch.setattr(job.subprocess, "run", work)
        outcome = job.run_demo(TINY, out=out, device="cpu", console=Console(file=text, width=100))
    return outcome, text.getvalue(), out


class TestJob:
    def test_both_clips_are_the_same_bytes(self, finished: tuple[job.Outcome, str, Path]) -> None:
        outcome, _, _ = finished
        assert outcome.is_right
        assert all(run.is_same_clip(outcome.resident) for run in outcome.budgeted)
        assert outcome.within_budget
        assert outcome.resident.frames.shape == (TINY.num_frames, TINY.height, TINY.width, 3)
        assert outcome.resident.frames.std() > 0.05

    def test_timelines_have_the_phases(self, finished: tuple[job.Outcome, str, Path]) -> None:
        outcome, _, _ = finished
        for run in (outcome.resident, *outcome.budgeted):
            assert [mark.name for mark in run.trace.marks] == ["load", "encode", "denoise", "decode"]
            assert run.trace.peak_bytes > 0
            assert len(run.trace.samples) > 5
            assert 0 < run.clip_s < run.trace.seconds
        assert [run.budget_bytes for run in outcome.budgeted] == [512 * 2**20, 256 * 2**20]
        assert 0 < outcome.floor_bytes < 256 * 2**20

    def test_writes_video_picture_and_table(self, finished: tuple[job.Outcome, str, Path], cache: Path) -> None:
        outcome, text, out = finished
        assert listing(out) == [job.SWEEP, job.PICTURE, job.VIDEO]
        for name in (job.PICTURE, job.SWEEP):
            with PIL.Image.open(out / name) as picture:
                assert picture.width > 1000
        assert (out / job.VIDEO).stat().st_size > 1000
        assert "yes, every byte" in text
        assert "512 MiB" in text
        assert "1.44 MiB of weights" in text
        assert '--frames 5 --prompt "A red bird" --vram 512MiB' in text
        assert "noise, as it should be: the weights are random" in text
        assert outcome.weights_bytes == sum(path.stat().st_size for path in cache.rglob("*.safetensors"))

    def test_a_missed_budget_and_other_bytes_are_told(self, finished: tuple[job.Outcome, str, Path]) -> None:
        outcome, _, _ = finished
        run = outcome.budgeted[0]
        run = dataclasses.replace(run, budget_bytes=run.trace.peak_bytes - 1)
        tight = dataclasses.replace(outcome, budgeted=[outcome.budgeted[1], run])
        assert not tight.within_budget
        frames = outcome.resident.frames.copy()
        frames.view(np.uint8).reshape(-1)[0] ^= 1
        other = dataclasses.replace(tight, budgeted=[dataclasses.replace(run, frames=frames)])
        assert not other.is_right
        nan = dataclasses.replace(outcome.resident, frames=np.full_like(frames, np.nan))
        assert not dataclasses.replace(outcome, resident=nan, budgeted=[nan]).is_right
        text = io.StringIO()
        job.print_outcome(other, Console(file=text, width=100))
        assert "(above)" in text.getvalue()
        assert "NO" in text.getvalue()

    def test_a_decode_in_parts_may_round(self, finished: tuple[job.Outcome, str, Path]) -> None:
        """Small budgets ask for it, and what they give is no defect."""
        outcome, _, _ = finished
        frames = outcome.resident.frames
        for decode, off, told in (
            ("8 stripes", 1e-5, "rounded: 8 stripes"),
            ("8 stripes", 0.1, None),
            ("8 stripes", np.nan, None),
            ("tiles", 0.1, "blended: tiles"),
            ("whole", 1e-5, None),
        ):
            run = dataclasses.replace(outcome.budgeted[0], frames=frames + np.float32(off), decode=decode)
            assert run.likeness(outcome.resident) == told
            assert dataclasses.replace(outcome, budgeted=[run]).is_right == (told is not None)

    def test_a_failing_worker_is_an_error(self, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        monkeypatch.setattr(job, "_START", "import sys; sys.exit('error: its own message')")
        with pytest.raises(VramkitError, match="exit status 1"):
            job._run_worker(cache / "demo-tiny", TINY, "cpu", budget_bytes=None)
        assert capfd.readouterr().err == "error: its own message\n"

    def test_a_budget_below_the_floor_is_refused_before_a_run(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VRAMKIT_CACHE", str(cache))
        with pytest.raises(ConfigError, match=r"--budget is 1 KiB; the least that fits is 5\d.* MiB"):
            job.run_demo(TINY, out=tmp_path / "out", device="cpu", budget_bytes=1024, console=Console(quiet=True))
        assert listing(tmp_path / "out") == []

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolve_device("auto") == "cpu"
        with pytest.raises(ConfigError, match="no CUDA device"):
            resolve_device("cuda")
        with pytest.raises(ConfigError, match="'tpu'"):
            resolve_device("tpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert resolve_device("auto") == resolve_device("cuda") == "cuda:0"
        assert resolve_device("cuda:1") == "cuda:1"


class TestWorker:
    def test_request_goes_to_json_and_back(self) -> None:
        request = worker.Request(checkpoint="a", preset="tiny", device="cpu", folder="b", budget_bytes=3)
        assert worker.Request.from_json(request.to_json()) == request

    @pytest.mark.parametrize("budget_bytes", [None, 2**30])
    def test_in_this_process(self, budget_bytes: int | None, cache: Path, tmp_path: Path) -> None:
        request = worker.Request(
            checkpoint=str(cache / "demo-tiny"),
            preset="tiny",
            device="cpu",
            folder=str(tmp_path),
            budget_bytes=budget_bytes,
        )
        assert worker.main(request.to_json()) == 0
        assert np.load(tmp_path / worker.FRAMES).dtype == np.float32
        assert Trace.load(tmp_path / worker.TRACE).kind == "process memory"

    def test_a_damaged_checkpoint_is_an_error(self, own_cache: Path, tmp_path: Path, capsys: Any) -> None:
        checkpoint = own_cache / "demo-tiny"
        shutil.rmtree(checkpoint / "vae")
        request = worker.Request(
            checkpoint=str(checkpoint), preset="tiny", device="cpu", folder=str(tmp_path), budget_bytes=None
        )
        assert worker.main(request.to_json()) == 1
        assert "vae is missing" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            (KeyboardInterrupt(), 130, ""),
            (torch.OutOfMemoryError("cuda"), 1, "device memory of 1 GiB is not enough"),
            (OSError("disk"), 1, "disk"),
            (ConfigError("option"), 1, "option"),
        ],
    )
    def test_failures_are_one_line(
        self, error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        def fail(request: Any) -> None:
            raise error

        monkeypatch.setattr(worker, "generate", fail)
        request = worker.Request(checkpoint="a", preset="tiny", device="cpu", folder="b", budget_bytes=2**30)
        assert worker.main(request.to_json()) == status
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == (status == 1)


# The clip of the preset made in fewer steps, here and in the workers that the demo starts.
SHORTER = {"num_inference_steps": 2}
START_SHORTER = f"""
import dataclasses, sys
sys.path = [sys.argv[1], *filter(None, sys.path)]
from vramkit.demo import worker
worker.PRESETS = {{"small": dataclasses.replace(worker.PRESETS["small"], **{SHORTER})}}
sys.exit(worker.main(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shorter", [pytest.param({}, marks=pytest.mark.thorough), SHORTER])
def test_the_main_job(shorter: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vramkit demo` as a new user runs it, less its further budgets: half a GiB of weights under half of that.

    Its workers start from a folder where modules have the names of theirs.
    """
    working = tmp_path / "working"
    (working / "vramkit").mkdir(parents=True)
    for path in (working / "vramkit" / "__init__.py", working / "numpy.py"):
        path.write_text("raise ImportError('of the working folder')")
    monkeypatch.chdir(working)
    monkeypatch.setenv("VRAMKIT_CACHE", str(tmp_path / "cache"))
    if shorter:
        monkeypatch.setattr(job, "_START", START_SHORTER)
    preset = dataclasses.replace(SMALL, sweep=(), **shorter)
    outcome = job.run_demo(preset, out=tmp_path / "out", device="cpu", console=Console(file=io.StringIO()))
    assert outcome.is_right
    assert all(run.is_same_clip(outcome.resident) for run in outcome.budgeted)
    assert outcome.within_budget
    assert outcome.weights_bytes > 1.9 * outcome.budgeted[0].budget_bytes
    assert outcome.resident.trace.peak_bytes > outcome.weights_bytes
