"""Several ranks against one: the same bytes, or the same numbers within rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import denoisers
import pytest
from allocated_bytes import is_planned_well
from families import Stock
from rank_group import RankGroup
from rank_models import blocks

from vramkit.distributed import connect, parallelize
from vramkit.distributed.ranks import Transfer
from vramkit.distributed.tiles import owners
from vramkit.errors import ConfigError
from vramkit.offload.checkpoint import write_checkpoint

FAMILIES = ("Wan2.1", "HunyuanVideo", "LTX-Video", "CogVideoX")


class Groups(dict[int, RankGroup]):
    """Ranks by their number, which begin when they are first asked for."""

    def __missing__(self, count: int) -> RankGroup:
        self[count] = RankGroup(count)
        return self[count]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    made = Groups()
    yield made
    for group in made.values():
        group.close()


@pytest.fixture
def two(groups: Groups) -> RankGroup:
    return groups[2]


@pytest.fixture
def four(groups: Groups) -> RankGroup:
    return groups[4]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_checkpoint(path, dict(blocks().state_dict()))
    return str(path)


@pytest.mark.parametrize(
    ("count", "slots", "level"), [(2, 2, "block_level"), (2, 3, "leaf_level"), (4, 3, "block_level")]
)
def test_each_rank_reads_its_part_of_the_weights(groups: Groups, file: str, count: int, slots: int, level: str) -> None:
    read = groups[count].run("streams_the_bytes_of_all", file=file, level=level, slots=slots)
    assert max(read) < 1.05 * min(read)


@pytest.mark.parametrize(
    ("count", "push"), [(2, True), (4, True), (2, False), pytest.param(3, True, marks=pytest.mark.thorough)]
)
def test_ranks_give_groups_to_one_another(groups: Groups, file: str, count: int, push: bool) -> None:
    carried = groups[count].run("gives_groups_to_all", file=file, push=push)
    assert all(each.keys() == {"pushed" if push else "gathered"} for each in carried)


@pytest.mark.parametrize("fault", ["own 0", "own 1", "other 0", "other 1"])  # after so many times
def test_ranks_gather_where_one_of_them_has_no_window(two: RankGroup, file: str, fault: str) -> None:
    carried = two.run("falls_back_with_all", file=file, fault=fault)
    assert all(each.keys() == {"gathered"} for each in carried)


def test_each_rank_may_read_all_for_itself(two: RankGroup, file: str) -> None:
    assert two.run("reads_apart", file=file) == [{}, {}]


@pytest.mark.parametrize("on_disk", [False, True])
def test_weights_in_memory_become_one_copy(two: RankGroup, tmp_path: Path, on_disk: bool) -> None:
    places = two.run("streams_from_memory", folder=str(tmp_path / "spilled") if on_disk else None)
    assert places[0] == places[1]
    assert (tmp_path in Path(places[0][0]).parents) == on_disk


def test_each_rank_keeps_a_budget_by_the_plan_of_the_first(two: RankGroup, wan_folder: Path) -> None:
    plans, made = zip(*two.run("keeps_a_budget", guidance=2, folder=str(wan_folder)), strict=True)
    assert len(set(plans)) == len(set(made)) == 1


@pytest.mark.parametrize("tiles", [False, True])
def test_a_plan_counts_what_the_fullest_rank_decodes(two: RankGroup, wan_folder: Path, tiles: bool) -> None:
    taken, planned, alone = zip(
        *two.run("decodes_as_planned", family="Wan2.1", folder=str(wan_folder), tiles=tiles), strict=True
    )
    assert len(set(planned)) == 1
    assert is_planned_well(planned[0], max(taken), least=0.95, most=1.05)
    assert tiles or planned[0] < alone[0] * 0.75


def test_ranks_that_need_other_weights_end_with_an_error(two: RankGroup, file: str) -> None:
    two.run("other_orders_are_an_error", file=file)


def test_other_versions_options_and_weights_are_refused_on_all_ranks(two: RankGroup, file: str) -> None:
    versions, options, weights, budgets = zip(*two.run("what_differs_is_refused", file=file), strict=True)
    for said in (versions, options, weights, budgets):
        assert said[0] == said[1]
        assert "rank 0 has" in said[0]
    assert "version of vramkit" in versions[0]
    assert "rank 1 has 9.9" in versions[0]
    assert "slots" in options[0]
    assert "weights of Blocks" in weights[0]
    assert "the vram: rank 0 has 1048576, rank 1 has 2097152" in budgets[0]


def test_who_raises_or_leaves_is_to_blame_and_not_who_waits(two: RankGroup) -> None:
    raised = "rank 1 failed: ValueError: between calls"
    assert two.run("branches_end_with_their_mesh") == [f"RankError: {raised}", "ValueError: between calls"]
    first, last = two.run("one_leaves")
    assert first.startswith("rank 1 failed: it has left: others have waited ")
    assert last == "nothing"


def test_calls_with_other_arguments_are_refused_on_all_ranks(two: RankGroup, wan_folder: Path) -> None:
    said = two.run("calls_that_differ_are_refused", folder=str(wan_folder))
    assert said[0] == said[1]
    assert "argument num_inference_steps of the call: rank 0 has 2, rank 1 has 3" in said[0]


@pytest.mark.parametrize("count", [2, 4])  # which divide the heads of some, and make rings with others
@pytest.mark.parametrize("family", denoisers.DENOISERS)
def test_ranks_that_share_tokens_predict_what_one_does(groups: Groups, family: str, count: int) -> None:
    groups[count].run("shares_tokens", family=family)


@pytest.mark.parametrize("family", denoisers.DENOISERS)
def test_blocks_that_share_tokens_compile_fullgraph(two: RankGroup, family: str) -> None:
    two.run("shares_tokens_compiled", family=family, whole=False)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_mask_of_texts_is_kept_where_a_whole_model_is_compiled(groups: Groups, count: int) -> None:
    """Whose compiler knows no lengths, so texts are not cut."""
    groups[count].run("shares_tokens_compiled", family="HunyuanVideo", whole=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_of_guidance_on_two_ranks_give_the_bytes_of_one(two: RankGroup, stock: Stock, family: str) -> None:
    is_first = family == FAMILIES[0]
    given = {
        "family": family,
        "folder": str(stock.folder(family)),
        "exact": True,
        "stream": is_first,
        "alone": is_first,
    }
    made = two.run("makes_the_clip_of_one", guidance=2, **given)
    assert len(set(made)) == 1


def test_two_branches_of_two_ranks_make_a_clip(four: RankGroup, wan_folder: Path) -> None:
    """With shared weights, tokens and tiles."""
    given = {"family": "Wan2.1", "folder": str(wan_folder), "exact": False, "stream": True}
    assert len(set(four.run("makes_the_clip_of_one", guidance=2, **given))) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_on_several_ranks_are_the_bytes_of_one(two: RankGroup, stock: Stock, family: str) -> None:
    computed = two.run("decodes_tiles", family=family, folder=str(stock.folder(family)), framewise=False)
    assert min(computed) > 0


def test_tiles_of_frames_on_several_ranks_are_the_bytes_of_one(two: RankGroup, stock: Stock) -> None:
    given = {"family": "HunyuanVideo", "folder": str(stock.folder("HunyuanVideo")), "framewise": True}
    assert min(two.run("decodes_tiles", **given)) > 0


@pytest.mark.parametrize(("family", "stripes"), [("Wan2.1", None), ("Wan2.1", 4), ("LTX-Video", None)])
def test_rows_of_a_decode_on_two_ranks_are_those_of_one(
    two: RankGroup, stock: Stock, family: str, stripes: int | None
) -> None:
    (one, made), (other, same) = two.run(
        "decodes_rows", family=family, folder=str(stock.folder(family)), stripes=stripes
    )
    assert made == same
    assert one
    assert other
    if family == "Wan2.1":  # of pictures of 192 rows
        assert max(one + other) <= (96 if stripes is None else 60)


def test_what_is_wrong_with_a_command_is_said_once(two: RankGroup, wan_folder: Path, tmp_path: Path) -> None:
    wrong = ["run", "--model", str(wan_folder), "--prompt", "a cat", "--device", "cpu", "--guidance", "nan"]
    said, others = two.run("runs_a_command", arguments=[*wrong, "--out", str(tmp_path / "clip.mp4")])
    assert said[0] == ""
    assert said[1].count("error: ") == 1
    assert "guidance" in said[1]
    assert others == ("", "", 1)
    assert said[2] == 1
    said, others = two.run("runs_a_command", arguments=["run", "--bogus", "1"])
    assert said[1].count("--bogus") == 1
    assert others == ("", "", said[2]) == ("", "", 2)


def test_what_ends_just_after_a_wait_was_over_has_not_failed() -> None:
    class Late:
        """Ends between a wait and the question whether it has ended."""

        waits = 0

        def wait(self, timeout: object) -> None:
            self.waits += 1
            if self.waits == 1:
                raise RuntimeError("Operation timed out!")

        def is_completed(self) -> bool:
            return self.waits > 0

    heartbeats: Any = SimpleNamespace(check=lambda: None)
    work = Late()
    Transfer(work, heartbeats, on_host=True).wait()
    assert work.waits == 2


def test_exported_names() -> None:
    from vramkit import distributed

    assert distributed.__all__ == ["Mesh", "Parallel", "connect", "parallelize"]
    assert all(getattr(distributed, name) is not None for name in distributed.__all__)


def test_a_lone_process_is_told_how_to_be_one_of_several() -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        connect()


def test_what_is_no_pipeline_of_ours_is_refused() -> None:
    mesh: Any = None
    with pytest.raises(ConfigError, match="WanPipeline"):
        parallelize(object(), mesh)


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [([4, 4, 4, 4, 1], 2, [0, 1, 0, 1, 0]), ([1, 2, 3], 3, [2, 1, 0]), ([5], 2, [0]), ([], 2, [])],
)
def test_tiles_are_dealt_to_who_has_least_to_do(costs: list[int], ranks: int, expected: list[int]) -> None:
    assert owners(costs, ranks) == expected
