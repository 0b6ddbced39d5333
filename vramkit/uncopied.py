"""What belongs to this process, and to no copy."""

from __future__ import annotations

from typing import Any

__all__ = ["Uncopied"]


class Uncopied:
    """Deep copies and pickles of what holds one have None there: they compute by themselves."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Let copies compute by themselves: twins that rehearse a call, for one."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
