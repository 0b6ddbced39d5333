from __future__ import annotations

import torch
from families import normal

from vramkit.pipelines.networks.workspace import compact, halves


def test_halves_are_views_of_all_channels_that_are_asked_for() -> None:
    x = normal(2, 6, 3)
    first, second = halves(x, 3) or (None, None)
    assert torch.equal(torch.cat((first, second), dim=1), x)
    first.zero_()
    assert not x[:, :3].any()
    assert halves(x, 4) is None


def test_what_is_part_of_something_larger_is_copied_and_nothing_else() -> None:
    x = normal(1, 6, 3)
    part = compact(x[:, :3])
    assert torch.equal(part, x[:, :3])
    assert part.untyped_storage().nbytes() == 9 * 4
    assert compact(x) is x
    assert compact(part) is part
