"""What an engine asks of the handle that users hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vramkit.offload.engine import Engine

__all__ = ["Owner"]


class Owner(Protocol):
    """What the engine asks of the handle that users hold."""

    def current_engine(self) -> Engine | None:
        """Return the engine that runs now, ready for a pass."""

    def begin_turn(self) -> None:
        """Note that a pass begins."""

    def make_room(self) -> None:
        """Let others on the device go, as far as it is needed."""

    def rearrange(self) -> None:
        """Form other units: a pass ended that left a group for another one and came back."""

    def is_first_move(self) -> bool:
        """Whether nobody has tried to move the module before."""

    def give_memory(self) -> None:
        """Do with less: a pass ended because the device had no room for what it computes."""
