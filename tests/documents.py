"""Pages and their code blocks: README and docs as tests read and run them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["DOCS", "README", "ROOT", "SMALLER", "blocks", "run_blocks", "tables"]

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# Sizes of published calls -> those that a tiny checkpoint makes in a moment.
SMALLER = {
    "height=480": "height=32",
    "width=832": "width=48",
    "num_frames=81": "num_frames=5",
    "num_inference_steps=50": "num_inference_steps=2",
}


def blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path, replacing: Mapping[str, str] | None = None, *, at_least: int = 1) -> dict[str, Any]:
    """Run the Python blocks of a page as they stand, one after the other; return the names that they leave.

    `replacing` maps texts, such as names of repositories, to what stands in for them; each of them has to occur.
    """
    found = blocks(page)
    assert len(found) >= at_least, f"{page.name} has {len(found)} blocks"
    names: dict[str, Any] = {}
    for given in replacing or {}:
        assert any(given in code for code in found), f"{page.name} does not say {given!r} any more"
    for as_it_stands in found:
        code = as_it_stands
        for given, stand_in in (replacing or {}).items():
            code = code.replace(given, stand_in)
        exec(compile(code, page.name, "exec", dont_inherit=True), names)
    return names


def tables(text: str) -> list[list[str]]:
    """The rows of all tables in a text, each as its cells."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
