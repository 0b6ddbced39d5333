from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramkit.batch import read_prompts
from vramkit.errors import ConfigError


def read(tmp_path: Path, *lines: str | bytes, **defaults: object):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return read_prompts(file, defaults)


def test_lines_become_prompts(tmp_path):
    first, second, third = read(
        tmp_path,
        '\ufeff{"prompt": "a cat", "name": "the cat", "seed": 3, "guidance": 2}',
        "",
        '{"prompt": "Ein Bär", "negative_prompt": "", "seed": 18446744073709551615, "fps": 12.5}\r',
        "   ",
        '{"prompt": "a\\ndog", "image": "pictures/dog.png", "last_image": "https://example.org/dog.png"}',
        seed=1,
        steps=4,
    )
    assert (first.name, first.line) == ("the cat", 1)
    assert first.settings == {"prompt": "a cat", "seed": 3, "guidance": 2, "steps": 4}
    assert (second.name, second.line) == ("0003", 3)
    assert second.settings == {"prompt": "Ein Bär", "negative_prompt": "", "seed": 2**64 - 1, "fps": 12.5, "steps": 4}
    assert (third.name, third.line) == ("0005", 5)
    assert third.settings["image"] == str(tmp_path / "pictures/dog.png")
    assert third.settings["last_image"] == "https://example.org/dog.png"
    assert third.settings["seed"] == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is no JSON (column 2"),
        ("a cat", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ('"a cat"', 'it is "a cat"; expected an object'),
        ("[1]", "it is [1]; expected an object"),
        ("{}", "there is no prompt"),
        (b'{"prompt": "\xff"}', "it is not UTF-8"),
        ('{"prompt": "a", "sede": 3}', "there is no 'sede'; expected name, prompt, negative_prompt"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
        ('{"prompt": " "}', 'prompt is " "; expected text'),
        ('{"prompt": 3}', "prompt is 3; expected text"),
        ('{"prompt": "a", "seed": -1}', "seed is -1; expected a whole number from 0"),
        ('{"prompt": "a", "seed": 18446744073709551616}', "seed is 18446744073709551616"),
        ('{"prompt": "a", "seed": null}', "seed is null"),
        ('{"prompt": "a", "seed": true}', "seed is true"),
        ('{"prompt": "a", "steps": 2.0}', "steps is 2.0; expected a whole number from 1"),
        ('{"prompt": "a", "frames": 0}', "frames is 0"),
        ('{"prompt": "a", "height": "480"}', 'height is "480"'),
        ('{"prompt": "a", "guidance": NaN}', "guidance is NaN; expected a finite number"),
        ('{"prompt": "a", "fps": 0}', "fps is 0; expected a number above 0"),
        ('{"prompt": "a", "fps": 1e999}', "fps is Infinity"),
        ('{"prompt": "a", "name": ""}', 'name is ""; expected a name for a file'),
        ('{"prompt": "a", "name": "../a"}', 'name is "../a"'),
        ('{"prompt": "a", "name": ".hidden"}', 'name is ".hidden"'),
        ('{"prompt": "a", "name": "a\\u0000b"}', "name is"),
        ('{"prompt": "a", "name": "a "}', 'name is "a "'),
        ('{"prompt": "a", "name": "\\ud800"}', "name is"),
        (json.dumps({"prompt": "a", "name": "ä" * 101}), "name is"),
        ('{"prompt": "a", "name": "B"}', "the name 'B' is that of line 1 too"),
    ],
)
def test_wrong_lines_are_named(line, said, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, '{"prompt": "first", "name": "b"}', "", line)
    assert f"prompts.jsonl, line 3: {said}" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_and_options(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "missing.jsonl", {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path, {})
    with pytest.raises(ConfigError, match="has no prompts"):
        read(tmp_path, "", " ")
    with pytest.raises(ConfigError, match=r"^--frames is 0; expected"):
        read(tmp_path, '{"prompt": "a"}', frames=0)
