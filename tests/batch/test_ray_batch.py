"""`vramkit batch` with two workers of a local cluster on the CPU; the cluster is started once, as the command does it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import batch_jobs
import psutil
import pytest
from batch_jobs import ClumsyJob, PaperJob

from vramkit import cli
from vramkit.batch import Dispatch, Journal, Prompt
from vramkit.batch.ray_workers import RayWorkers, connected, processors_each, share_out
from vramkit.commands import clips
from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import TINY
from vramkit.errors import ConfigError, VramkitError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

OPTIONS = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--device", "cpu"]
LINES = [
    {"prompt": "a cat", "name": "dies"},
    {"prompt": "a dog", "name": "fails", "seed": 3},
    {"prompt": "a bird", "name": "bird", "frames": 9, "steps": 3, "fps": 8, "negative_prompt": "dark"},
    {"prompt": "a cat", "name": "other cat", "seed": 1},
]


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """A cluster of this process; the last test is that nothing is left of it."""
    patch = pytest.MonkeyPatch()
    paths = [str(Path(batch_jobs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    patch.setenv("PYTHONPATH", os.pathsep.join(paths))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with connected(None, cpus=2):
        import ray

        folder = Path(ray._private.worker._global_node.get_temp_dir_path())
        assert folder.is_dir()
        ours = {child for child in psutil.Process().children(recursive=True) if child.pid not in before}
        assert ours
        yield
    _, alive = psutil.wait_procs(ours, timeout=30)
    assert not alive
    assert not folder.exists()
    assert not ray.is_initialized()
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(TINY, cache=tmp_path_factory.mktemp("cache"))


def batch(tmp_path: Path, model: Path, *arguments: str) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    return ["batch", str(file), "--model", str(model), "--out", str(tmp_path / "out"), *OPTIONS, *arguments]


def noted(folder: Path) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {}
    for line in map(json.loads, (folder / "journal.jsonl").read_text().splitlines()[1:]):
        states.setdefault(line["name"], []).append(line["state"])
    return states


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "journal.jsonl"}


@pytest.mark.usefixtures("_cluster")
def test_a_killed_worker_loses_nothing_and_makes_nothing_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(clips, "ClipJob", ClumsyJob)
        assert cli.main(batch(tmp_path, model, "--workers", "2")) == 1
    said = capsys.readouterr()
    assert sorted(said.out.split("\n")[:-1]) == [f"{out}/{name}.mp4" for name in ("bird", "dies", "other cat")]
    assert "which was at dies: " in said.err
    assert "failed   fails (line 2): this one is not to be" in said.err
    assert "error: 1 of 4 prompts have no clip (fails): the same command tries them again" in said.err
    assert said.err.count("stream from disk") == 3  # told once, and not for each worker
    assert noted(out) == {
        "dies": ["begun", "begun", "made"],
        "fails": ["begun", "failed"],
        "bird": ["begun", "made"],
        "other cat": ["begun", "made"],
    }
    first = content(out)
    assert first.keys() == {"dies.mp4", "bird.mp4", "other cat.mp4"}

    assert cli.main(batch(tmp_path, model)) == 0  # again, and with a better worker
    said = capsys.readouterr()
    assert said.out == f"{out}/fails.mp4\n"
    assert "4 prompts, 3 of them made before" in said.err
    assert content(out) == first | {"fails.mp4": content(out)["fails.mp4"]}

    assert cli.main(batch(tmp_path, model)) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "4 of them made before" in said.err
    for line in LINES[1:3]:  # as `vramkit run` makes them
        options = {f"--{name.replace('_', '-')}": str(value) for name, value in line.items() if name != "name"}
        alone = tmp_path / "alone.mp4"
        arguments = [part for option in options.items() for part in option]
        assert cli.main(["run", "--model", str(model), *OPTIONS, *arguments, "--out", str(alone)]) == 0
        assert alone.read_bytes() == content(out)[f"{line['name']}.mp4"]


class Silent:
    def __getattr__(self, name: str):
        return lambda *arguments: None


def dispatch(folder: Path, fates: dict[str, str], *, load: str = "", count: int = 1) -> dict[str, str]:
    """Let workers without a model write files; what happens to each is told."""
    wanted = [Prompt(name=name, line=1, settings={"prompt": fate}) for name, fate in fates.items()]
    with Journal(folder, {}) as journal, RayWorkers(PaperJob(folder, load), gpus=0, cpus=1) as workers:
        journal.remaining(wanted)
        given = Dispatch(wanted, workers, journal, count=count, retries=1, watcher=Silent())
        given.run()
    return given.failures


@pytest.mark.usefixtures("_cluster")
def test_what_happens_to_workers_is_told(tmp_path: Path) -> None:
    failures = dispatch(tmp_path, {"good": "", "refused": "refuse", "told too late": "die", "broken": "break"})
    # The file of one that dies after it was written is there, so it counts; so it is with a device that breaks.
    assert failures == {"refused": "it is refused"}
    assert noted(tmp_path)["told too late"] == ["begun", "made"]
    pids = [(tmp_path / f"{name}.mp4").read_text() for name in ("good", "told too late", "broken")]
    assert pids[0] == pids[1] != pids[2]


@pytest.mark.usefixtures("_cluster")
def test_workers_that_cannot_load_end_it(tmp_path: Path) -> None:
    with pytest.raises(VramkitError, match=r"cannot be loaded by a worker: process .*: it is refused"):
        dispatch(tmp_path, {"a": ""}, load="refuse")
    with pytest.raises(VramkitError, match="2 workers in a row were lost while they loaded the model"):
        dispatch(tmp_path, {"a": ""}, load="die")


@pytest.mark.usefixtures("_cluster")
def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    def press() -> None:
        while not (tmp_path / "hangs.mp4").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        dispatch(tmp_path, {"hangs": "hang", "waits": ""})
    worker = int((tmp_path / "hangs.mp4").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(timeout=30)
    assert not psutil.pid_exists(worker)
    assert noted(tmp_path) == {"hangs": ["begun"]}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.usefixtures("_cluster")
def test_workers_are_shared_out() -> None:
    assert share_out("auto", None)[:2] == ("cpu", 1)
    device, count, each = share_out("cpu", 2)
    assert (device, count) == ("cpu", 2)
    assert each >= 1
    with pytest.raises(ConfigError, match="Ray sees no GPU"):
        share_out("cuda", None)
    with pytest.raises(ConfigError, match=r"--device is 'cuda:1'; expected auto, cpu or cuda"):
        share_out("cuda:1", None)
    with pytest.raises(ConfigError, match=r"--workers is 1000, and Ray has \d+ processors"):
        share_out("cpu", 1000)


@pytest.mark.parametrize(
    ("cpus", "places", "count", "each"),
    [
        ([64], [8], 8, 8),
        ([64], [8], 1, 64),
        ([64, 8], [8, 0], 8, 8),  # the second host has no GPU
        ([64, 8], [8, 2], 10, 4),
        ([4], [8], 8, 0),  # more GPUs than processors
        ([5, 5], [5, 5], 3, 2),
        ([2], [2], 2, 1),
    ],
)
def test_processors_each(cpus: list[int], places: list[int], count: int, each: int) -> None:
    assert processors_each(cpus, places, count) == each
