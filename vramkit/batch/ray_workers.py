"""Workers that are actors of Ray: on the GPUs or processors of this host, or of a cluster that is there."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vramkit import __version__
from vramkit.batch.prompts import Prompt
from vramkit.batch.workers import Event, Job
from vramkit.errors import ConfigError, VramkitError

__all__ = ["RayWorkers", "connected", "share_out"]

_WAIT_S = 0.5  # between two looks at how far workers are
_REACHED_S = 10.0  # within which a cluster that is there accepts a connection
_ASKING = "asking"  # the thread of an actor that says how far the other one is
_OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes: nothing large goes through it


def check_installed() -> None:
    """Refuse to go on without Ray, which is not imported yet.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('vramkit batch runs on Ray, which is not installed: pip install "vramkit[ray]"')


def _ray() -> Any:
    import ray  # noqa: PLC0415 - an extra, and slow to import

    return ray


@contextlib.contextmanager
def connected(address: str | None, *, cpus: int = 1) -> Iterator[None]:
    """Be connected to a cluster: the one at an address, else the one that this process has, else a new one on this host.

    The new one has no dashboard and reports nothing, asks for a token that only its processes know, and is gone at the end
    with its folder.

    Args:
        address: such as "192.0.2.1:6379", or "auto" for the one that runs on this host.
        cpus: processors that a new one has, if there are no more.

    Raises:
        ConfigError: the address is none, nothing answers at it (within 10 s), what answers is no cluster of Ray (within a
            minute, unless Ray was imported before), or Ray does not start, as on a host that is too busy.
    """
    with contextlib.ExitStack() as stack:
        # Read when Ray is imported. It prints on stdout what becomes of workers, which events tell here.
        stack.enter_context(_environment(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS_SKIP_REGEX="."))
        if address is not None:
            stack.enter_context(_environment(RAY_NUM_REDIS_GET_RETRIES="1"))  # of 40 s each; a new one needs more
        ray = _ray()
        if ray.is_initialized():
            yield
            return
        stack.enter_context(_signals_kept())
        if address is not None:
            _check_address(address)
        if address is None:
            _have_token()
            options = _of_its_own(stack.enter_context(_folder()), cpus)
        else:
            options = {"address": address}
        stack.callback(ray.shutdown)
        try:
            ray.init(**options, log_to_driver=False, logging_level="error")
        except Exception as error:  # some of its errors are of no class of its own
            where = "be started on this host" if address is None else f"be reached at --address {address}"
            raise ConfigError(f"Ray cannot {where}: {str(error).splitlines()[0] if str(error) else error!r}") from error
        yield


def _check_address(address: str) -> None:
    """Refuse an address at which nothing answers: Ray would ask for a quarter of an hour, in lines of its own.

    Raises:
        ConfigError: names the address and why.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--address is {address!r}; expected a host and a port such as 192.0.2.1:6379, as `ray start --head` prints "
            "them, or auto for the cluster of this host"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"Ray cannot be reached at --address {address}: {reason}. `ray start --head` on that host prints the address, "
            "and `ray status` whether it runs; look at ports that are closed in between"
        ) from error


def _of_its_own(folder: str, cpus: int) -> dict[str, object]:
    """What a cluster is started with that this process has for itself."""
    import torch  # noqa: PLC0415

    return {
        "address": "local",
        "num_cpus": max(cpus, _processors()),
        "num_gpus": torch.cuda.device_count(),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": folder,
        "_system_config": {
            "prestart_worker_first_driver": False
        },  # else a process for each processor, asked for or not
    }


def share_out(device: str, count: int | None) -> tuple[str, int, int]:
    """The device of workers, how many there are to be, and the processors that each has.

    Args:
        device: "auto", "cpu" or "cuda".
        count: how many are asked for; by default one for each GPU, or one for each host where they compute on processors.

    Raises:
        ConfigError: the cluster has not as many GPUs or processors, or the device names one GPU.
    """
    hosts = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    cpus = [int(host.get("CPU", 0)) for host in hosts]
    gpus = [int(host.get("GPU", 0)) for host in hosts]
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}; expected auto, cpu or cuda: each worker has a GPU of its own")
    if device == "auto":
        device = "cuda" if any(gpus) else "cpu"
    if device == "cuda" and not any(gpus):
        raise ConfigError("--device cuda was given, but Ray sees no GPU: use --device cpu")
    places, what = (gpus, "GPUs") if device == "cuda" else (cpus, "processors")
    if count is None:
        count = sum(gpus) if device == "cuda" else sum(number > 0 for number in cpus)
    if count > sum(places):
        raise ConfigError(f"--workers is {count}, and Ray has {sum(places)} {what}: give {sum(places)} at most")
    return device, count, processors_each(cpus, places, count)


def processors_each(cpus: Sequence[int], places: Sequence[int], count: int) -> int:
    """The most processors that each of `count` workers can have, when host i has room for `places[i]`; 0 if not even one."""
    for each in range(max(cpus), 0, -1):
        if sum(min(have // each, room) for have, room in zip(cpus, places, strict=True)) >= count:
            return each
    return 0


class RayWorkers:
    """Actors, one for each worker, in the cluster that the process is connected to; see `Workers`.

    Args:
        job: what each of them does; pickled.
        gpus: of each worker, 0 or 1.
        cpus: processors of each worker, which torch computes with.
    """

    def __init__(self, job: Job, *, gpus: int, cpus: int) -> None:
        ray = self._ray = _ray()
        options = {"num_gpus": gpus, "num_cpus": cpus, "max_restarts": 0, "concurrency_groups": {_ASKING: 1}}
        self._actor = ray.remote(**options)(_Worker)
        self._arguments = (job, cpus)
        self._numbers = itertools.count(1)
        self._actors: dict[int, Any] = {}
        self._answers: dict[Any, int] = {}  # what workers were asked for, by who was
        self._shares: dict[int, float] = {}
        self._asked: dict[Any, int] = {}  # how far they are

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for worker in list(self._actors):
            self._end(worker)

    def start(self) -> int:
        """Begin to start one more."""
        worker = next(self._numbers)
        actor = self._actors[worker] = self._actor.remote(*self._arguments)
        self._answers[actor.load.remote(__version__)] = worker
        return worker

    def give(self, worker: int, prompt: Prompt, attempt: int) -> None:
        """Let a worker make a clip."""
        self._answers[self._actors[worker].make.remote(prompt, attempt)] = worker

    def wait(self) -> list[Event]:
        """What happened since; waits for half a second if that is nothing."""
        answered, _ = self._ray.wait(list(self._answers), num_returns=1, timeout=_WAIT_S)
        if not answered:
            self._look()
            return []
        answered, _ = self._ray.wait(list(self._answers), num_returns=len(self._answers), timeout=0)
        return [self._event(answer) for answer in answered]

    def share(self, worker: int) -> float:
        """How far a worker was when it was asked the last time."""
        return self._shares.get(worker, 0.0)

    def _event(self, answer: Any) -> Event:
        worker = self._answers.pop(answer)
        self._shares.pop(worker, None)
        try:
            kind, detail = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            kind, detail = "lost", _reason(error)
        if kind == "lost":
            self._end(worker)
        return Event(worker, kind, detail)

    def _look(self) -> None:
        """Take what workers said of how far they are, and ask those who said it again."""
        said = list(self._asked)
        if said:
            said, _ = self._ray.wait(said, num_returns=len(said), timeout=0)
        for answer in said:
            with contextlib.suppress(self._ray.exceptions.RayError):  # lost ones are noticed by what they were to do
                self._shares[self._asked[answer]] = self._ray.get(answer)
            del self._asked[answer]
        for worker in set(self._answers.values()) - set(self._asked.values()):
            self._asked[self._actors[worker].share.options(concurrency_group=_ASKING).remote()] = worker

    def _end(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker), no_restart=True)


class _Worker:
    """The actor: one job in a process of its own. What it returns are kinds and details of events."""

    def __init__(self, job: Job, cpus: int) -> None:
        self._job = job
        self._cpus = cpus

    def load(self, version: str) -> tuple[str, str]:
        import torch  # noqa: PLC0415

        where = f"process {os.getpid()} of {platform.node()}"
        if version != __version__:
            return "unable", f"{where} has vramkit {__version__}, and this is {version}: install the same on all hosts"
        torch.set_num_threads(max(1, self._cpus))
        try:
            return "ready", f"{where}\n{self._job.load()}"
        except Exception as error:  # noqa: BLE001 - it may be of a class that the other side does not have
            return "unable", f"{where}: {_told(error)}"

    def make(self, prompt: Prompt, attempt: int) -> tuple[str, str]:
        try:
            self._job.make(prompt, attempt)
        except Exception as error:  # noqa: BLE001 - one prompt's error is not another's
            return "lost" if _breaks_device(error) else "failed", _told(error)
        return "made", ""

    def share(self) -> float:
        return self._job.share()


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (VramkitError, OSError)) and text else f"{type(error).__name__}: {text}"


def _breaks_device(error: Exception) -> bool:
    """Whether no computation on the device will go well in this process any more."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return "AcceleratorError" in names and "OutOfMemoryError" not in names


def _reason(error: Exception) -> str:
    """One line of what Ray says, which is many: how a process ended, or the error that it ended with."""
    told = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if (ended := re.search(r"exit detail: *(.*?)(?: Some common causes|\n|$)", told)) is not None:
        return ended[1]
    return told.strip().splitlines()[-1].strip() if told.strip() else type(error).__name__


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _have_token() -> None:
    """Have a token for a new cluster. Ray would write one to the home folder; it reads it once in a process, so it stays."""
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Have variables set for processes that are started; what the user has set stays."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back what is done at SIGTERM, which Ray changes."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder for sockets and logs. The name of a socket has a hundred letters, of which Ray takes seventy."""
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="vramkit-", dir=parent if len(parent) <= 20 or os.name == "nt" else "/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
