from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramkit.batch import Journal, Prompt
from vramkit.errors import CheckpointError, ConfigError

SHARED = {"model": "m"}


def prompt(name: str, **settings: object) -> Prompt:
    return Prompt(name=name, line=7, settings={"prompt": "a cat", "seed": 0, **settings})


def names(prompts: list[Prompt]) -> list[str]:
    return [each.name for each in prompts]


def test_a_later_run_goes_on(tmp_path: Path):
    wanted = [prompt("made"), prompt("failed"), prompt("torn off"), prompt("not told"), prompt("waiting")]
    with Journal(tmp_path, SHARED) as journal:
        assert journal.remaining(wanted) == wanted
        for each in wanted[:4]:
            journal.begin(each, worker="1")
        journal.video(wanted[0]).touch()
        journal.made(wanted[0], seconds=1.5)
        journal.failed(wanted[1], "no")
        journal.video(wanted[3]).touch()  # the process ends between this and the note of it
    with Journal(tmp_path, SHARED) as journal:
        assert names(journal.remaining(wanted)) == ["failed", "torn off", "waiting"]
        journal.video(wanted[0]).unlink()
        assert names(journal.remaining(wanted))[0] == "made"
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line.get("state") for line in lines] == [None, *["begun"] * 4, "made", "failed"]
    assert lines[1]["settings"] == {"model": "m", "prompt": "a cat", "seed": 0}


def test_clips_of_something_else_are_not_taken_for_these(tmp_path: Path):
    with Journal(tmp_path, SHARED) as journal:
        journal.begin(prompt("a"), worker="1")
        journal.begin(prompt("b"), worker="1")
        journal.video(prompt("a")).touch()
        journal.video(prompt("foreign")).touch()
        assert names(journal.remaining([prompt("b", seed=1)])) == ["b"]  # nothing came of it
        with pytest.raises(ConfigError, match=r"a\.mp4 was made with seed 0, and line 7 asks for 1"):
            journal.remaining([prompt("a", seed=1)])
        with pytest.raises(ConfigError, match="was made with steps null, and line 7 asks for 4"):
            journal.remaining([prompt("a", steps=4)])
        with pytest.raises(ConfigError, match=r"foreign\.mp4 is there, and this folder's journal does not know it"):
            journal.remaining([prompt("foreign")])
    said = 'was made with model "m", and line 7 asks for "other"'
    with Journal(tmp_path, {"model": "other"}) as journal, pytest.raises(ConfigError, match=said):
        journal.remaining([prompt("a")])


def test_one_run_at_a_time(tmp_path: Path):
    with Journal(tmp_path, SHARED), pytest.raises(ConfigError, match="is open in another run"):
        Journal(tmp_path, SHARED)
    Journal(tmp_path, SHARED).close()


def test_what_is_not_whole_goes(tmp_path: Path):
    (tmp_path / ".vramkit-batch-0").mkdir()
    (tmp_path / ".vramkit-batch-0" / "a.1.mp4").touch()
    with Journal(tmp_path, SHARED) as journal:
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [journal.stage.name]
        (journal.stage / "a.1.mp4").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_wherever_it_was_cut_it_is_read(tmp_path: Path):
    with Journal(tmp_path, SHARED) as journal:
        for each in (prompt("a"), prompt("b")):
            journal.begin(each, worker="1")
            journal.video(each).touch()
            journal.made(each)
    content = (tmp_path / "journal.jsonl").read_bytes()
    begun = content.index(b"\n", content.index(b'"b", "state": "begun"'))
    for length in range(0, len(content), 11):
        (tmp_path / "journal.jsonl").write_bytes(content[:length])
        with Journal(tmp_path, SHARED) as journal:
            if length > begun:
                assert journal.remaining([prompt("a"), prompt("b")]) == []
            else:
                with pytest.raises(ConfigError, match="does not know it"):
                    journal.remaining([prompt("b")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello\n", "is no journal of `vramkit batch`"),
        (b'{"prompt": "a cat"}\n', "is no journal of `vramkit batch`"),
        (b'{"format": "vramkit batch 2"}\n', "is of another version"),
        (b'{"format": "vramkit batch 1"}\n{"name":\n', "line 2 is damaged"),
        (b'{"format": "vramkit batch 1"}\n[]\n', "line 2 is damaged"),
        (b'{"format": "vramkit batch 1"}\n{"name": 3, "state": "begun"}\n', "line 2 is damaged"),
        (b'{"format": "vramkit batch 1"}\n{"name": "a", "state": "made"}\n', "line 2 is damaged"),
        (b'{"format": "vramkit batch 1"}\n{"name": "a", "state": "x", "settings": {}}\n', "line 2 is damaged"),
    ],
)
def test_damage_is_named_and_left(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        Journal(tmp_path, SHARED)
    assert (tmp_path / "journal.jsonl").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1
