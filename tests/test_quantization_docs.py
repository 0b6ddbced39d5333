"""The Python blocks of docs/quantization.md run as they stand, one after the other, with a small checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from documents import DOCS, ROOT, run_blocks

from vramkit.casting import NarrowTensor
from vramkit.quant import quantization_of
from vramkit.quant.scaled_linear import ScaledLinear

PAGE = DOCS / "quantization.md"


def test_python_blocks_run(wan_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks(PAGE, {"Wan-AI/Wan2.1-T2V-14B-Diffusers": str(wan_folder)}, at_least=6)
    printed = capsys.readouterr().out
    assert "fp8: 8 weights, 8 MiB -> 2.02 MiB; 0 layers as they were" in printed  # as the comment says
    assert "widened at use, for sizes that scaled_mm cannot multiply: none" in printed
    assert names["done"].skipped == ("0.1", "0.3", "3.1", "3.3")
    assert isinstance(names["fast"][0][1], ScaledLinear)
    transformer = names["pipeline"].transformer
    assert isinstance(transformer.blocks[0].ffn.net[2].weight, NarrowTensor)
    assert quantization_of(names["pipeline"].text_encoder) is not None
    assert quantization_of(names["pipeline"].vae) is None
    assert list(Path("transformer-fp8").glob("*.safetensors"))
    assert names["found"].forward_db < 30
    torch._dynamo.reset()


def test_links_and_tests_that_it_names_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / target).exists(), target
