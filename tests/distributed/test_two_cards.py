"""Ranks that have a card each: what the CPU cannot show of windows. Needs two cards of one host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_group import Faulty, RankGroup
from rank_models import blocks

from vramkit.offload.checkpoint import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card"),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def cards() -> Iterator[RankGroup]:
    group = RankGroup(2, "cuda")
    yield group
    group.close()


@pytest.mark.parametrize("push", [True, False])
def test_cards_give_groups_to_one_another(cards: RankGroup, tmp_path: Path, push: bool) -> None:
    file = tmp_path / "model.safetensors"
    write_checkpoint(file, dict(blocks().state_dict()))
    carried = cards.run("gives_groups_to_all", file=str(file), push=push)
    assert all(each.keys() == {"pushed" if push else "gathered"} for each in carried)


def test_memory_of_windows_counts(cards: RankGroup) -> None:
    cards.run("counts_windows")


def test_a_process_that_waits_on_its_device_for_a_dead_rank_ends() -> None:
    faulty = Faulty("dies_while_others_wait")
    said, statuses = faulty.end(90)
    faulty.close()
    assert statuses[0] == 70
    assert said[0] is None  # it could not raise
