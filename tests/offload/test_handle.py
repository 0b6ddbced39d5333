"""What handles say of themselves, and what is said of options and calls that do nothing."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, Codec, OrderNet, mapped_copy, tokens
from torch import nn

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload import apply_group_offloading, apply_model_offload


def test_a_handle_prints_a_short_table_with_sizes(tmp_path: Path) -> None:
    module = mapped_copy(BlockNet(8).eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu", slots=2, resident="100 kB")
    with torch.no_grad():
        module(tokens(8))
    shown = repr(offload)
    for part in ("Offload of BlockNet, block level on cpu", "KiB in 6 groups", "KiB disk", "2 of", "1 passes"):
        assert part in shown, shown
    assert len(shown.splitlines()) < 10
    assert max(map(len, shown.splitlines())) < 90
    offload.rest()
    assert "0 B now" in repr(offload)
    offload.remove()
    assert repr(offload) == "Offload of BlockNet: removed"


def test_the_handle_of_a_pipeline_lists_its_components(tmp_path: Path) -> None:
    handles = apply_model_offload({"vae": mapped_copy(Codec().eval(), tmp_path)}, "cpu")
    assert repr(handles).splitlines()[1].split()[:2] == ["vae", "Codec"]
    handles.remove()


def test_a_pipeline_is_refused_by_naming_fit() -> None:
    with pytest.raises(ConfigError, match=r"a SimpleNamespace was given.*vramkit\.fit\(pipeline, vram="):
        apply_group_offloading(types.SimpleNamespace(components={}), "cpu")  # type: ignore[arg-type]


def test_blocks_per_group_at_leaf_level_is_said_to_do_nothing(tmp_path: Path) -> None:
    module = mapped_copy(BlockNet().eval(), tmp_path)
    with pytest.warns(RuntimeWarning, match="num_blocks_per_group=4 does nothing at leaf level") as said:
        apply_group_offloading(module, "cpu", offload_type="leaf_level", num_blocks_per_group=4).remove()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_group_offloading(module, "cpu", offload_type="leaf_level").remove()


@pytest.mark.parametrize(
    "trace", [torch.jit.trace, lambda module, x: torch.export.export(module, (x,))], ids=["jit.trace", "export"]
)
def test_tracing_an_offloaded_module_is_refused(
    trace: Callable[[nn.Module, torch.Tensor], Any], tmp_path: Path
) -> None:
    model = BlockNet(4).eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu")
    x = tokens(8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ConflictError, match="BlockNet is offloaded and is being traced"):
            trace(module, x)
        assert torch.equal(module(x), model(x))
    offload.remove()


def test_a_move_is_warned_of_once_also_after_units_formed_again(tmp_path: Path) -> None:
    module = mapped_copy(OrderNet().eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu")
    with pytest.warns(RuntimeWarning, match="moving it does nothing"):
        module.to("meta")
    offload.adapt(slots=3)
    with offload.edit():
        pass
    module.to("meta")  # warnings are errors here
    offload.remove()
