from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.options import make_options


@dataclass(frozen=True, kw_only=True)
class Options:
    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    name: str = "x"
    sizes: tuple[int, int] = (1, 2)
    means: Sequence[float] = ()
    maybe: int | None = None
    never: None = None
    anything: Any = None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"count": 2, "ratio": 3, "flag": True, "name": "y"},
        {"count": np.int64(2), "ratio": np.float32(0.5)},
        {"flag": None},  # null for off
        {"sizes": [3, 4], "means": (1, 0.5)},
        {"sizes": [3]},  # how many is for the class to check
        {"maybe": None, "anything": "x"},
        {"maybe": 3, "never": 3},
    ],
)
def test_fitting_values_are_taken_as_they_are(given: dict[str, Any]) -> None:
    assert make_options(Options, given, owner="Owner") == Options(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"other": 1}, r"Owner: unknown options \['other'\], expected some of \['anything', 'count'"),
        ({"count": "2"}, "Owner: option count='2', expected int"),
        ({"count": 2.0}, "count=2.0, expected int"),
        ({"count": True}, "count=True"),
        ({"count": None}, "count=None"),
        ({"ratio": "x"}, "ratio='x', expected float"),
        ({"flag": 1}, "flag=1, expected bool"),
        ({"name": None}, "name=None, expected str"),
        ({"sizes": 3}, r"sizes=3, expected tuple\[int, int\]"),
        ({"sizes": ["1", 2]}, "sizes="),
        ({"means": "12"}, "means='12'"),
        ({"maybe": "x"}, r"maybe='x', expected int \| None"),
    ],
)
def test_others_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_options(Options, given, owner="Owner")
