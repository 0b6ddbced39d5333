"""`vramkit batch --address`: a cluster that somebody else has started, and addresses of none."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vramkit import cli
from vramkit.batch import ray_workers
from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import TINY
from vramkit.errors import ConfigError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

PATIENCE_S = 180
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
OPTIONS = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--device", "cpu"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(TINY, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': name, 'name': name})}\n" for name in ("cat", "dog")))
    return file


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """What ``ray start --head`` starts, by its address."""
    port = free_port()
    # A folder with a short name: those of sockets have an end.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = {
            "port": port, "node-ip-address": "127.0.0.1", "num-cpus": 2, "object-store-memory": 80 * 2**20,
            "include-dashboard": "false", "temp-dir": folder,
        }  # fmt: skip
        told = [f"--{name}={value}" for name, value in options.items()]
        command = [*RAY, "start", "--head", "--block", "--disable-usage-stats", *told]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
            try:
                assert head.stdout is not None
                said = ""
                while "Ray runtime started" not in said:
                    line = head.stdout.readline()
                    assert line, said
                    said += line
                yield f"127.0.0.1:{port}"
            finally:
                ours = psutil.Process(head.pid)
                ours = [ours, *ours.children(recursive=True)]
                head.terminate()
                _, alive = psutil.wait_procs(ours, timeout=20)
                for process in alive:
                    process.kill()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_cluster_that_was_started_elsewhere(model: Path, prompts: Path, tmp_path: Path) -> None:
    """Joined by its address; it is still there afterwards, for another run."""
    batch = [sys.executable, "-m", "vramkit", "batch", str(prompts), "--model", str(model), *OPTIONS]
    with cluster() as address:
        for out in ("first", "second"):
            done = subprocess.run(
                [*batch, "--out", str(tmp_path / out), "--address", address],
                capture_output=True, text=True, check=False, timeout=PATIENCE_S,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout.split() == [str(tmp_path / out / f"{name}.mp4") for name in ("cat", "dog")]
    clips = [(tmp_path / out / "dog.mp4").read_bytes() for out in ("first", "second")]
    assert clips[0] == clips[1]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("closed", "Connection refused"),
        ("ray://closed", "Connection refused"),
        ("elsewhere", r"expected a host and a port such as 192\.0\.2\.1:6379"),
        ("127.0.0.1:0", "expected a host and a port"),
        ("no.such.host.invalid:6379", "Ray cannot be reached at --address"),
    ],
)
def test_an_address_of_nothing_is_one_error_soon(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, reason: str
) -> None:
    address = address.replace("closed", f"127.0.0.1:{free_port()}")
    out = tmp_path / "out"
    start = time.monotonic()
    assert (
        cli.main(["batch", str(prompts), "--model", str(model), *OPTIONS, "--out", str(out), "--address", address]) == 1
    )
    assert time.monotonic() - start < 60  # of which the address takes 10 at most
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == 1
    assert address in said.err
    assert re.search(reason, " ".join(said.err.split()))
    assert [path.name for path in out.iterdir()] == ["journal.jsonl"]


def test_an_address_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a firewall drops what is sent: a port that takes no more connections is the same from here."""
    monkeypatch.setattr(ray_workers, "_REACHED_S", 0.2)
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        for _ in range(3):  # more than are let wait
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        time.sleep(0.1)
        with pytest.raises(ConfigError, match=r"cannot be reached at --address .*timed out"):
            ray_workers._check_address(f"127.0.0.1:{port}")
