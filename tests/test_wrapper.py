"""Values of stored weights that loops over chunks use again."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch.nn import functional as F

from vramkit.casting import NarrowTensor, narrowed
from vramkit.wrapper import widened_once


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The values that were made; by weak hands, they are not kept here."""
    made: list[int] = []
    dequantize = NarrowTensor.dequantize
    monkeypatch.setattr(NarrowTensor, "dequantize", lambda weight: made.append(1) or dequantize(weight))
    return made  # type: ignore[return-value]


def weight(seed: int = 0) -> NarrowTensor:
    """A weight of four by eight in fp8."""
    return narrowed(
        torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), torch.float8_e4m3fn, torch.float32
    )


def test_values_are_made_once_within_and_each_time_without(counted: list[torch.Tensor]) -> None:
    first, other, x = weight(), weight(1), torch.ones(3, 8)
    expected = F.linear(x, first), F.linear(x, other)
    for uses, made in ((1, 4), (2, 2)):
        counted.clear()
        with widened_once(uses):
            for _ in range(2):
                assert torch.equal(F.linear(x, first), expected[0])
                assert torch.equal(F.linear(x, other), expected[1])
        assert len(counted) == made
    with pytest.raises(KeyError), widened_once(2):
        raise KeyError
    counted.clear()
    F.linear(x, first), F.linear(x, first)
    assert len(counted) == 2


def test_another_thread_has_its_own(counted: list[torch.Tensor]) -> None:
    first, x = weight(), torch.ones(3, 8)
    with widened_once(2):
        F.linear(x, first)
        threads = [threading.Thread(target=F.linear, args=(x, first)) for _ in range(3)]
        for thread in threads:
            thread.start()
            thread.join()
    assert len(counted) == 4


def test_values_go_with_their_weight() -> None:
    first, x = weight(), torch.ones(3, 8)
    with widened_once(2):
        F.linear(x, first)
        values = first.values_once()
        storage = values.untyped_storage()._cdata
        assert first.values_once().untyped_storage()._cdata == storage
        references = [each for each in gc.get_referrers(values) if isinstance(each, dict)]
        assert len(references) == 1
        del first, values
        assert not references[0]
