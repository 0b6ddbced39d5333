"""Acceptance 20: compiled blocks run whole beside the hooks, without recompiles; leaf level is refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, mapped_copy, tokens
from torch import nn

from vramkit.offload import apply_group_offloading


@pytest.fixture(autouse=True)
def _strict() -> None:
    """In place of the one of all tests: the compiler leaves alone what runs under a mode."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, style: str) -> None:
    for block in model.blocks:
        if style == "compile()":
            block.compile(fullgraph=True, backend="eager")
        else:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")


@pytest.mark.parametrize("order", ["compile_first", "offload_first"])
@pytest.mark.parametrize("style", ["compile()", "forward"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_compiled_blocks_run_whole_without_recompiles(style: str, slots: int, order: str, tmp_path: Path) -> None:
    model = BlockNet().eval()
    compiled(model, style)
    module = mapped_copy(BlockNet().eval(), tmp_path)
    module.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"store": "pageable", "slots": slots}
    if order == "compile_first":
        compiled(module, style)
        offload = apply_group_offloading(module, "cpu", **options)
    else:
        offload = apply_group_offloading(module, "cpu", **options)
        compiled(module, style)
    x = tokens(8)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), model(x))
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                y = tokens(8)
                assert torch.equal(module(y), model(y))
    offload.remove()


def test_leaf_level_under_fullgraph_is_refused_with_the_reason(tmp_path: Path) -> None:
    module = mapped_copy(BlockNet().eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type="leaf_level", unit_bytes=1)
    compiled(module, "forward")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="Offload at block level"):
        module(tokens(8))
    offload.remove()


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_whole_model_compiles_with_graph_breaks(level: str, tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    whole = torch.compile(module, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            x = tokens(8)
            assert torch.equal(whole(x), model(x))
    offload.remove()
