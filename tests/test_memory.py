from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import BlockNet, TiedNet
from torch import nn

from vramkit import memory
from vramkit.errors import ConfigError
from vramkit.memory import (
    CgroupLimit,
    available_ram_bytes,
    cgroup_limits,
    format_apart,
    format_bytes,
    format_enough,
    module_bytes,
    parse_bytes,
    probe_link_gbps,
    tensor_bytes,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("123B", 123),
        ("6GiB", 6 * 2**30),
        (" 512 MiB ", 512 * 2**20),
        ("4.5GB", 4_500_000_000),
        ("2kb", 2000),
        ("2KiB", 2048),
        ("0.5 tib", 2**39),
    ],
)
def test_sizes_are_read(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", -1, "6 GiBs", "6 G", "1e3", "1,5GB", True, 1.5, None, "nan", "1..5GB"]
)
def test_what_is_no_size_is_an_error_that_shows_it(text: object) -> None:
    with pytest.raises(ConfigError, match="6GiB"):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.integers(0, 2**50))
def test_printed_sizes_are_read_back_within_their_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006, abs=1)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (2**20, "1 MiB"), (26.6 * 2**30, "26.6 GiB"), (2000 * 2**30, "2000 GiB")],
)
def test_sizes_are_printed_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**43), st.integers(1, 2**20))
def test_two_sizes_are_printed_apart_and_the_larger_is_enough(less: int, difference: int) -> None:
    below, above = format_apart(less, less + difference)
    assert below != above
    assert parse_bytes(below) <= less < less + difference <= parse_bytes(above)
    assert above == format_enough(less + difference)


def test_modules_are_counted_once_where_they_are_tied() -> None:
    model = TiedNet()
    distinct = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert module_bytes(model) == sum(t.numel() * 4 for t in distinct)
    with torch.device("meta"):
        assert module_bytes(TiedNet()) == module_bytes(model)
    model = nn.Linear(3, 5).to(torch.bfloat16)
    assert module_bytes(model) == 40
    assert tensor_bytes(torch.empty(3, 5, dtype=torch.float8_e4m3fn)) == 15
    assert module_bytes(BlockNet(blocks=2)) < module_bytes(BlockNet(blocks=3))


def test_free_ram_is_some_and_less_than_all() -> None:
    import psutil

    assert 0 < available_ram_bytes() <= psutil.virtual_memory().total


def limit(folder: Path, size: str, names: tuple[str, str] = ("memory.max", "memory.current")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{size}\n")
    (folder / names[1]).write_text("5\n")


class TestCgroups:
    def test_those_above_count(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.write_text("0::/a/b/c\n")
        limit(tmp_path / "tree" / "a" / "b" / "c", "max")
        limit(tmp_path / "tree" / "a" / "b", "300")
        limit(tmp_path / "tree" / "a", "200")
        found = cgroup_limits(tmp_path / "tree", own)
        assert [(Path(each.path).name, each.limit_bytes, each.used_bytes) for each in found] == [
            ("b", 300, 5),
            ("a", 200, 5),
        ]

    def test_a_container_sees_its_own_at_the_root(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.write_text("0::/docker/1f\n")
        limit(tmp_path / "tree", "400")
        assert [each.limit_bytes for each in cgroup_limits(tmp_path / "tree", own)] == [400]

    def test_of_the_first_version(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.write_text("4:cpu,cpuacct:/x\n3:memory:/x\n")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit(tmp_path / "tree" / "memory" / "x", "700", names)
        limit(tmp_path / "tree" / "memory", str(2**63 - 4096), names)
        assert [each.limit_bytes for each in cgroup_limits(tmp_path / "tree", own)] == [700]

    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ("anon 900\nfile 700\nshmem 300\nactive_file 250\ninactive_file 150\n", 600),
            ("cache 99\nactive_file 1\ninactive_file 2\ntotal_active_file 300\ntotal_inactive_file 50\n", 650),
            ("active_file 5000\ninactive_file 5000\n", 0),  # counted at different moments
            ("anon 900\nnonsense\n\n", 1000),
        ],
        ids=["second-version", "first-version", "more-than-all", "without"],
    )
    def test_copies_of_files_are_free(self, tmp_path: Path, text: str, left: int) -> None:
        """A container that has read a large checkpoint is not full: the system drops such pages when memory is wanted."""
        own = tmp_path / "own"
        own.write_text("0::/a\n")
        limit(tmp_path / "a", "2000")
        (tmp_path / "a" / "memory.current").write_text("1000\n")
        (tmp_path / "a" / "memory.stat").write_text(text)
        assert [each.used_bytes for each in cgroup_limits(tmp_path, own)] == [left]

    def test_none_without_control_groups(self, tmp_path: Path) -> None:
        assert cgroup_limits(tmp_path, tmp_path / "missing") == []

    def test_the_tightest_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = [CgroupLimit("inner", 3000, 1000), CgroupLimit("outer", 2000, 1900)]
        monkeypatch.setattr(memory, "cgroup_limits", lambda: limits)
        assert available_ram_bytes() == 100
        limits[1] = CgroupLimit("outer", 2000, 2001)
        assert available_ram_bytes() == 0


def test_the_cpu_has_no_link() -> None:
    with pytest.raises(ConfigError, match="accelerator"):
        probe_link_gbps("cpu")


@pytest.mark.gpu
def test_the_link_is_measured() -> None:
    assert probe_link_gbps("cuda", probe_bytes=2**24, repeats=2) > 0.1
