"""Ways in which JSON, and text in general, goes wrong: the same for the same random numbers."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

__all__ = ["drawn_stand_in", "mutated_bytes", "mutated_json"]

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), 10**400),
    *(2**16, 2**31 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)),
    *("", "x", "F32", "F4", "float32", "1", "None", "../../x", "\0", "\u00e9", "\ud800", "x" * 3000, "(a+)+$"),
    *(
        [],
        [0],
        [1, 2],
        [[]],
        [None],
        ["x"],
        [1] * 300,
        {},
        {"a": 1},
        {"x": {"x": {}}},
        {"U8": None},
        ["U8", [4], [0, 4]],
    ),
)
_TOKENS = (
    *(
        b"NaN",
        b"Infinity",
        b"-0",
        b"-",
        b"+1",
        b"1.",
        b".5",
        b"1e5",
        b"1e999",
        b"00",
        b"9" * 400,
        b"0x1",
        b"true",
        b"null",
    ),
    *(
        b"\\ud800",
        b"\\udc00",
        b"\\u0000",
        b"\\x",
        b"\\",
        b"\0",
        b"\x01",
        b"\xff",
        b"\xc3",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
    ),
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"'", b" ", b"\n", b"//", b"[" * 130, b"[" * 2000, b'"a":1,', b'{"x":'),
)

_STAND_INS = (
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0f" * 32 + b"\nsize 9876543210\n",
    b"version https://git-lfs.github.com/spec/v1\r\noid sha256:\r\nsize " + b"9" * 400,
    b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
    b'\xef\xbb\xbf  <?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    b"PK\x03\x04" + bytes(40),
    b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
    b"\x1f\x8b\x08" + bytes(30),
    b"GGUF\x03\0\0\0" + bytes(16),
    b'\x10\0\0\0\0\0\0\0{"a": {"dtype":1',
    b"Entry not found",
    b"Access to model x/y is restricted.\n" * 40,
    b"\0" * 600,
    b"\n\n\n",
)


def drawn_stand_in(rng: random.Random, good: bytes) -> bytes:
    """Return what lies under a name where a download went wrong: another format, a pointer, a page, half of `good`."""
    made = rng.choice((*_STAND_INS, good[: len(good) // 2]))
    return made[: rng.randrange(len(made) + 1)] if rng.random() < 0.3 else made


def mutated_json(rng: random.Random, value: Any) -> bytes:
    """Return `value` as JSON with one to three things in it changed, and sometimes its text too."""
    box = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, box)
    text = json.dumps(box[0], ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    return mutated_bytes(rng, text) if rng.random() < 0.25 else text


def mutated_bytes(rng: random.Random, text: bytes) -> bytes:
    """Return `text` with a few bytes flipped, cut, doubled, or replaced by what means something in JSON."""
    made = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(made) + 1)
        to = min(len(made), at + rng.choice((0, 1, 1, 2, 8)))
        match rng.randrange(5):
            case 0:
                made[at:to] = rng.choice(_TOKENS)
            case 1:
                made[at:to] = bytes(rng.randrange(256) for _ in range(to - at))
            case 2:
                del made[at:to]
            case 3:
                made[at:at] = made[at : at + rng.choice((1, 2, 20, 100))]
            case 4:
                _swap_digits(rng, made)
    return bytes(made)


def _swap_digits(rng: random.Random, text: bytearray) -> None:
    digits = [at for at, byte in enumerate(text) if 48 <= byte <= 57]
    if digits:
        text[rng.choice(digits)] = 48 + rng.randrange(10)


def _change(rng: random.Random, box: list[Any]) -> None:
    """Change one thing somewhere in the only item of `box`."""
    owner, key = rng.choice(list(_places(box)))
    value = owner[key]
    match rng.randrange(6):
        case 0 | 1:
            owner[key] = _odd(rng)
        case 2 if isinstance(value, int | float):
            owner[key] = rng.choice(
                (
                    value + 1,
                    value - 1,
                    value * 2,
                    -value,
                    value // 2 if isinstance(value, int) else value / 2,
                    str(value)[:400],
                    [value],
                    value * 1000,
                )
            )
        case 2 if isinstance(value, str) and value:
            at = rng.randrange(len(value))
            owner[key] = rng.choice((value[:at], value[:at] + "?" + value[at + 1 :], value * 2, [value], value.upper()))
        case 3 if owner is not box:
            del owner[key]
        case 4:
            other_owner, other_key = rng.choice(list(_places(box)))
            owner[key] = copy.deepcopy(other_owner[other_key])
        case _ if isinstance(value, dict):
            value[rng.choice(("x", "", "dtype", "_x", "__metadata__", *value))] = _odd(rng)
        case _ if isinstance(value, list):
            value.insert(rng.randrange(len(value) + 1), _odd(rng))
        case _:
            owner[key] = _odd(rng)


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_ODD))


def _places(owner: Any) -> Any:
    """Yield each place inside lists and dicts, as its owner and its index or key."""
    for key, value in owner.items() if isinstance(owner, dict) else enumerate(owner):
        yield owner, key
        if isinstance(value, dict | list):
            yield from _places(value)
