"""Who gets which prompt, with workers of paper: what happens to them is told by the test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vramkit.batch import Dispatch, Event, Journal, Prompt
from vramkit.errors import VramkitError


class PaperWorkers:
    """Ask the test what becomes of a worker: of one that loads (None), or makes a prompt the n-th time."""

    def __init__(self, journal: Journal, fate: Callable[[Prompt | None, int], str]) -> None:
        self.journal = journal
        self.fate = fate
        self.started = 0
        self.at: dict[int, tuple[Prompt | None, int]] = {}
        self.most = 0

    def start(self) -> int:
        self.started += 1
        self.at[self.started] = None, 0
        return self.started

    def give(self, worker: int, prompt: Prompt, attempt: int) -> None:
        assert worker not in self.at, "it has something to do"
        self.at[worker] = prompt, attempt
        self.most = max(self.most, len(self.at))

    def wait(self) -> list[Event]:
        worker = next(iter(self.at))
        prompt, attempt = self.at.pop(worker)
        fate = self.fate(prompt, attempt)
        if prompt is not None and fate in ("made", "lost on the way"):
            with self.journal.video(prompt).open("x"):  # never twice
                pass
        kind = "lost" if fate == "lost on the way" else fate
        return [Event(worker, kind, f"because of {fate}")]

    def share(self, worker: int) -> float:
        return 0.25


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.clips: list[float] = []

    def ready(self, worker: int, detail: str) -> None:
        self.lines.append(f"ready {worker}")

    def made(self, prompt: Prompt, seconds: float) -> None:
        self.lines.append(f"made {prompt.name}")

    def failed(self, prompt: Prompt, error: str) -> None:
        self.lines.append(f"failed {prompt.name}: {error}")

    def lost(self, worker: int, prompt: Prompt | None, why: str) -> None:
        self.lines.append(f"lost {worker}" + (f" with {prompt.name}" if prompt else ""))

    def progress(self, clips: float) -> None:
        self.clips.append(clips)


def dispatched(
    folder: Path, names: str, fate: Callable[[Prompt | None, int], str], *, count: int = 2, retries: int = 2
):
    wanted = [Prompt(name=name, line=at, settings={"prompt": name}) for at, name in enumerate(names, start=1)]
    with Journal(folder, {}) as journal:
        workers, notes = PaperWorkers(journal, fate), Notes()
        dispatch = Dispatch(journal.remaining(wanted), workers, journal, count=count, retries=retries, watcher=notes)
        dispatch.run()
    return dispatch, workers, notes


def states(folder: Path, name: str) -> list[str]:
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line["state"] for line in lines if line.get("name") == name]


def good(prompt: Prompt | None, attempt: int) -> str:
    return "ready" if prompt is None else "made"


def test_all_is_made_in_turn(tmp_path: Path):
    dispatch, workers, notes = dispatched(tmp_path, "abcde", good)
    assert [line for line in notes.lines if "made" in line] == [f"made {name}" for name in "abcde"]
    assert dispatch.failures == {}
    assert workers.started == workers.most == 2
    assert notes.clips[-1] == 5
    assert 0.25 in notes.clips  # one that is a quarter done
    assert states(tmp_path, "a") == ["begun", "made"]
    assert len(list(tmp_path.glob("*.mp4"))) == 5


def test_no_more_workers_than_prompts(tmp_path: Path):
    _, workers, _ = dispatched(tmp_path, "ab", good, count=8)
    assert workers.started == 2


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path):
    def fate(prompt: Prompt | None, attempt: int) -> str:
        return "failed" if prompt is not None and prompt.name == "b" else good(prompt, attempt)

    dispatch, workers, notes = dispatched(tmp_path, "abc", fate)
    assert dispatch.failures == {"b": "because of failed"}
    assert workers.started == 2
    assert notes.clips[-1] == 3
    assert states(tmp_path, "b") == ["begun", "failed"]
    assert {path.stem for path in tmp_path.glob("*.mp4")} == {"a", "c"}


def test_a_lost_worker_is_replaced_and_its_prompt_is_next(tmp_path: Path):
    def fate(prompt: Prompt | None, attempt: int) -> str:
        return "lost" if prompt is not None and prompt.name == "a" and attempt < 3 else good(prompt, attempt)

    dispatch, workers, notes = dispatched(tmp_path, "abcd", fate, count=1)
    assert dispatch.failures == {}
    assert workers.started == 3
    assert notes.lines[1:6] == ["lost 1 with a", "ready 2", "lost 2 with a", "ready 3", "made a"]
    assert states(tmp_path, "a") == ["begun"] * 3 + ["made"]


def test_a_prompt_that_takes_every_worker_with_it_is_given_up(tmp_path: Path):
    def fate(prompt: Prompt | None, attempt: int) -> str:
        return "lost" if prompt is not None and prompt.name == "a" else good(prompt, attempt)

    dispatch, workers, _ = dispatched(tmp_path, "ab", fate, count=1, retries=1)
    assert dispatch.failures == {"a": "its worker was lost, 2 times: because of lost"}
    assert workers.started == 3
    assert states(tmp_path, "b") == ["begun", "made"]


def test_lost_on_its_way_to_tell_is_made(tmp_path: Path):
    def fate(prompt: Prompt | None, attempt: int) -> str:
        return "lost on the way" if prompt is not None else "ready"

    dispatch, workers, notes = dispatched(tmp_path, "ab", fate, count=1, retries=0)
    assert dispatch.failures == {}
    assert [line for line in notes.lines if "made" in line] == ["made a", "made b"]
    assert workers.started == 2


@pytest.mark.parametrize(("fate", "said"), [("lost", "3 workers in a row were lost"), ("unable", "cannot be loaded")])
def test_without_a_worker_it_ends(fate: str, said: str, tmp_path: Path):
    with pytest.raises(VramkitError, match=said):
        dispatched(tmp_path, "ab", lambda prompt, attempt: fate)
    assert not list(tmp_path.glob("*.mp4"))


def test_ready_ones_make_good_for_those_that_never_were(tmp_path: Path):
    fates = iter(["lost", "lost", "ready", "lost", "lost", "ready"])

    def fate(prompt: Prompt | None, attempt: int) -> str:
        if prompt is None:
            return next(fates)
        return "lost" if attempt == 1 else "made"

    dispatch, _, _ = dispatched(tmp_path, "a", fate, count=1)
    assert dispatch.failures == {}


@pytest.mark.parametrize("seed", range(40))
def test_nothing_lost_and_nothing_twice(seed: int, tmp_path: Path):
    """Workers die, prompts fail, and runs are interrupted, at random; runs are repeated until all is there."""
    chance = random.Random(seed)

    def fate(prompt: Prompt | None, attempt: int) -> str:
        if chance.random() < 0.05:
            raise KeyboardInterrupt
        if prompt is None:
            return "ready" if chance.random() < 0.9 else "lost"
        return chance.choice(["made", "made", "made", "failed", "lost", "lost on the way"])

    for _ in range(60):
        try:
            dispatch, _, _ = dispatched(tmp_path, "abcdefghij", fate, count=chance.randint(1, 4), retries=1)
        except (KeyboardInterrupt, VramkitError):
            continue
        assert set(dispatch.failures) | {path.stem for path in tmp_path.glob("*.mp4")} == set("abcdefghij")
        if not dispatch.failures:
            break
    assert {path.stem for path in tmp_path.glob("*.mp4")} == set("abcdefghij")
    assert all(states(tmp_path, name).count("made") <= 1 for name in "abcdefghij")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
