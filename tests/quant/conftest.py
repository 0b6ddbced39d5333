from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def quanto_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto's own weights of 4 and 2 bits without its extension, which is compiled for a minute when it is first called."""
    from optimum.quanto.library.extensions import cpp

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        parts = [packed // 2**low % 2**bits for low in range(0, 8, bits)]
        return torch.cat(parts)

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
