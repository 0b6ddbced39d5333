"""The CPU tier fails where a device would: a weight that is read where it rests, while a pass is open, is an error by name.

On the CPU host memory and slots are the same kind of memory, so such a read gives the right numbers by luck. On a device it
is a mismatch of devices. What stays on a device is a copy there, and so it is here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vramkit import tensors
from vramkit.offload.keeper import WeightKeeper
from vramkit.offload.resting import RestingPlace

__all__ = ["RestedRead", "strict"]


class RestedRead(AssertionError):
    """A weight was read where it rests."""


class _Strict(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.resting: dict[int, tuple[str, weakref.ref[WeightKeeper]]] = {}

    def watch(self, keeper: WeightKeeper) -> None:
        names = {id(parameter): name for name, parameter in keeper._module.named_parameters()}
        for rest in keeper._rests.values():
            if id(rest) not in keeper._tables:  # their rows are looked up at rest
                for leaf in tensors.leaves(rest):
                    key = leaf.untyped_storage().data_ptr()
                    self.resting[key] = names.get(id(rest), "a weight"), weakref.ref(keeper)

    def release(self, keeper: WeightKeeper) -> None:
        self.resting = {key: value for key, value in self.resting.items() if value[1]() not in (None, keeper)}

    def copied(self, leaf: torch.Tensor) -> torch.Tensor:
        """A copy that a device would have made of what rests: not a read of the module's."""
        resting, self.resting = self.resting, {}
        try:
            return leaf.clone()
        finally:
            self.resting = resting

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.resting and not func.is_view:
            written = {0} if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.set_) else set()
            read = [arg for at, arg in enumerate(args) if at not in written]
            for tensor in _plain_tensors((*read, *kwargs.values())):
                name, keeper = self.resting.get(tensor.untyped_storage().data_ptr(), ("", None))
                alive = keeper() if keeper is not None else None
                if alive is not None and alive.is_inside():
                    raise RestedRead(f"{name} was read where it rests, by {func}")
        return func(*args, **kwargs)


def _plain_tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _plain_tensors(value)
        elif isinstance(value, torch.Tensor) and _is_host_memory(value):
            yield value


def _is_host_memory(value: torch.Tensor) -> bool:
    is_plain = tensors.is_plain(value) and value.layout == torch.strided and not is_functorch_wrapped_tensor(value)
    return is_plain and value.device.type == "cpu" and value.numel() > 0


@pytest.fixture
def strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    call = getattr(request.node, "callspec", None)
    is_on_device = call is not None and call.params.get("device", "cpu") != "cpu"
    if is_on_device or request.node.get_closest_marker("gpu"):
        yield  # a device needs no help
        return
    mode = _Strict()
    watch, release = WeightKeeper.watch, WeightKeeper.release

    def watching(keeper: WeightKeeper) -> None:
        watch(keeper)
        mode.watch(keeper)

    def releasing(keeper: WeightKeeper) -> None:
        mode.release(keeper)
        release(keeper)

    to_device = RestingPlace.to_device

    def copying(place: RestingPlace, leaf: torch.Tensor) -> torch.Tensor:
        moved = to_device(place, leaf)
        return mode.copied(moved) if moved is leaf else moved

    monkeypatch.setattr(RestingPlace, "to_device", copying)
    monkeypatch.setattr(WeightKeeper, "watch", watching)
    monkeypatch.setattr(WeightKeeper, "release", releasing)
    with mode:
        yield
