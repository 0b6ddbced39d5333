from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import BlockNet, TiedNet
from torch import nn

from vramkit.errors import ConfigError
from vramkit.memory import available_ram_bytes, format_bytes, module_bytes, parse_bytes, probe_link_gbps, tensor_bytes


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


def test_the_cpu_has_no_link() -> None:
    with pytest.raises(ConfigError, match="accelerator"):
        probe_link_gbps("cpu")


@pytest.mark.gpu
def test_the_link_is_measured() -> None:
    assert probe_link_gbps("cuda", probe_bytes=2**24, repeats=2) > 0.1
