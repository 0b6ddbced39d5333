from __future__ import annotations

import pytest

from vramkit.planning.explain import _seconds


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.12345, "0.123"), (47.31, "47.3"), (999.4, "999"), (999.6, "1000"), (2804.4, "2804")]
)
def test_seconds_are_never_powers_of_ten(seconds: float, shown: str) -> None:
    assert _seconds(seconds) == shown
