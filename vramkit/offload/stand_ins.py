"""What lies under the name of a file that was never downloaded: pointers of git-lfs, web pages, other formats.

Asked only of files whose own format was not found in them.
"""

from __future__ import annotations

import re
from pathlib import Path

from vramkit.memory import format_bytes

__all__ = ["is_pointer", "stand_in"]

_LFS = b"version https://git-lfs.github.com/spec/"  # the first line of a pointer (git-lfs, docs/spec.md)
_PICKLE = "a pickle, which can run code when it is read: convert it to safetensors where it comes from"
_STARTS: tuple[tuple[bytes, str], ...] = (
    (rb"PK\x03\x04", f"a zip archive. If torch.save wrote it, it is {_PICKLE}; else unpack it"),
    (rb"\x80[\x02-\x05]", _PICKLE),
    (rb"\x1f\x8b", "compressed by gzip: unpack it"),
    (rb"GGUF", "a GGUF file: give it a name that ends in .gguf"),
    (rb".{8}\s*\{\s*\"", "a safetensors file: give it a name that ends in .safetensors"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|head|!--)",
        "a web page: download the file itself (/resolve/ for /blob/ in its address; `hf auth login` if it is gated)",
    ),
)
_READ_BYTES = 512


def stand_in(path: Path, *, is_text: bool = False) -> str | None:
    """Say what a file is instead of what its name says, and what to do, as the rest of a sentence about it; or None.

    `is_text`: its own format is text.
    """
    with path.open("rb") as stream:
        start = stream.read(_READ_BYTES)
    if not start:
        return "is empty: download it again"
    if start.startswith(_LFS):
        size = re.search(rb"^size (\d{1,18})$", start, re.MULTILINE)
        what = f" ({format_bytes(int(size[1]))})" if size else ""
        return (
            f"is a git-lfs pointer and not the file{what} that it stands for: run `git lfs install` and `git lfs pull` in "
            "the repository, or download it with `hf download`"
        )
    for pattern, what in _STARTS:
        is_own = what.endswith(f" {path.suffix}")  # a damaged file of the format that its name says
        if re.match(pattern, start, re.DOTALL) and not is_own:
            return f"is {what}"
    line = start.splitlines()[0].strip()
    if len(line) > 7 and not is_text and all(32 <= byte < 127 for byte in line):
        return f"is text that begins with {line[:80].decode()!r}: download the file again"
    return None


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of git-lfs."""
    with path.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS
