"""The small family of docs/adding-a-family.md works, streamed as resident."""

from __future__ import annotations

import re

import numpy as np
from documents import DOCS, ROOT, run_blocks

GUIDE = DOCS / "adding-a-family.md"


def test_the_family_of_the_guide_runs() -> None:
    names = run_blocks(GUIDE, at_least=3)
    assert names["streamed"].shape == (1, 9, 64, 96, 3)
    assert np.isfinite(names["streamed"]).all()
    np.testing.assert_array_equal(names["streamed"], names["resident"])


def test_the_files_it_names_exist() -> None:
    pipelines = ROOT / "vramkit" / "pipelines"
    rows = re.findall(r"^\| .* \| (`.*`) \|$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert len(named) >= 9
    for name in named:
        assert (pipelines / name).exists(), name
