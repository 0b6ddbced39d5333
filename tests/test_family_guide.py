"""The small family of docs/adding-a-family.md works, streamed as resident."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-family.md"


def test_the_family_of_the_guide_runs() -> None:
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, GUIDE.name, "exec"), names)
    assert names["streamed"].shape == (1, 9, 64, 96, 3)
    assert np.isfinite(names["streamed"]).all()
    np.testing.assert_array_equal(names["streamed"], names["resident"])


def test_the_files_it_names_exist() -> None:
    pipelines = GUIDE.parents[1] / "vramkit" / "pipelines"
    rows = re.findall(r"^\| .* \| (`.*`) \|$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert len(named) >= 9
    for name in named:
        assert (pipelines / name).exists(), name
