"""Acceptance 23, 24: damaged, unsafe and foreign files are named errors, and no half-written file is left to be trusted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vramkit.errors import CheckpointError, StoreError
from vramkit.offload import apply_group_offloading
from vramkit.offload.checkpoint import read_checkpoint, write_checkpoint
from vramkit.offload.disk import FileReader, MappedFile, atomic_write, forget_span, span_of

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write_raw(path: Path, header: Any, data: bytes = bytes(32), *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_files_of_the_reference_implementation_are_read(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16]
    dtypes += [torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
    dtypes += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint16, torch.uint32, torch.uint64]
    tensors = {str(dtype): (torch.randn(3, 5) * 4).abs().to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_checkpoint(tmp_path / "x.safetensors")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = entries[name].tensor()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert entries[name].size_bytes == tensor.nbytes
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_written_files_are_read_by_the_reference_implementation(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(4, 4), "y": torch.arange(3), "z": torch.randn(5).bfloat16()}
    write_checkpoint(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", (8, 4)), ("F7", (2, 3))])
def test_a_dtype_that_torch_lacks_is_an_error_of_who_uses_it(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "x.safetensors", changed("a", dtype=dtype, shape=list(shape)))
    entries = read_checkpoint(path)
    assert torch.equal(entries["b"].tensor(), torch.zeros(4, dtype=torch.bfloat16))
    assert (entries["a"].size_bytes, entries["a"].shape) == (24, shape)
    for use in (entries["a"].tensor, lambda: entries["a"].dtype):
        with pytest.raises(CheckpointError, match=rf"x\.safetensors.*'a' has dtype '{dtype}'.*known are BOOL, U8"):
            use()


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="came with torch 2.8")
def test_pairs_of_4_bits_are_one_element(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}}
    read = read_checkpoint(write_raw(tmp_path / "x.safetensors", header, bytes(range(6))))["a"].tensor()
    assert (read.dtype, read.shape) == (torch.float4_e2m1fn_x2, (2, 3))
    assert read.view(torch.uint8).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="came with torch 2.7")
def test_scales_that_are_exponents_are_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [0, 3]}}
    read = read_checkpoint(write_raw(tmp_path / "x.safetensors", header, bytes([126, 127, 130])))["a"].tensor()
    assert read.float().tolist() == [0.5, 1.0, 8.0]


DAMAGED: dict[str, tuple[Any, bytes, str]] = {
    "truncated_data": (GOOD, bytes(31), "'b'.*truncated"),
    "no_data": (GOOD, b"", "truncated"),
    "trailing_bytes": (GOOD, bytes(33), "1 bytes follow"),
    "overlap": (changed("b", data_offsets=[20, 28]), bytes(28), "'b' overlaps"),
    "hole": (changed("b", data_offsets=[28, 36]), bytes(36), "'b' leaves a hole of 4"),
    "hole_at_start": ({"b": GOOD["b"]}, bytes(32), "'b' leaves a hole of 24"),
    "backwards": (changed("b", data_offsets=[32, 24]), bytes(32), "'b'"),
    "negative": (changed("a", data_offsets=[-24, 0]), bytes(32), "'a'.*>= 0"),
    "beyond": (changed("b", data_offsets=[24, 2**62]), bytes(32), "'b'.*truncated"),
    "huge_shape": (changed("a", shape=[2**62, 2**62]), bytes(32), "'a'.*does not fit"),
    "huge_empty_shape": (changed("a", shape=[2**70, 0]), bytes(32), "'a'"),
    "negative_shape": (changed("a", shape=[-2, -3]), bytes(32), "'a'.*>= 0"),
    "wrong_shape": (changed("a", shape=[2, 4]), bytes(32), "'a'.*does not fit"),
    "float_shape": (changed("a", shape=[2.0, 3.0]), bytes(32), "'a'.*whole numbers"),
    "bool_shape": (changed("a", shape=[True, 6]), bytes(32), "'a'.*whole numbers"),
    "half_bytes": (changed("a", dtype="F4", shape=[16, 3]), bytes(32), "'a'.*whole bytes"),
    "wrong_shape_of_halves": (changed("a", dtype="F4", shape=[2, 12]), bytes(32), "'a'.*does not fit"),
    "dtype_is_a_list": (changed("a", dtype=["F32"]), bytes(32), "'a' has dtype"),
    "wrong_dtype": (changed("a", dtype="F64"), bytes(32), "'a'.*does not fit"),
    "no_dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "'a' lacks dtype"),
    "entry_is_a_number": ({"a": 3}, bytes(8), "'a' lacks dtype"),
    "three_offsets": (changed("a", data_offsets=[0, 12, 24]), bytes(32), "'a'"),
    "header_is_a_list": ([1, 2], bytes(8), "expected a JSON object"),
    "header_is_no_json": (b"{nonsense", bytes(8), "JSON cannot be read"),
    "header_is_no_text": (b"\xff\xfe{}", bytes(8), "JSON cannot be read"),
    "deep_header": (b"[" * 100_000, b"", "JSON cannot be read"),
    "duplicate_field": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
        "'a' lacks dtype",
    ),
    "metadata_of_numbers": ({"__metadata__": {"x": 1}, **GOOD}, bytes(32), "expected texts"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_an_error_that_names_file_and_tensor(case: str, tmp_path: Path) -> None:
    header, data, message = DAMAGED[case]
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"(?s)bad\.safetensors.*{message}"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"\1", bytes(7), bytes(8), struct.pack("<Q", 2**63), b"\xff" * 64])
def test_file_without_a_header_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"short\.safetensors"):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 3, 8, 50, 200, 500])
def test_file_cut_anywhere_is_an_error(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"x": torch.randn(10, 10), "y": torch.randn(10)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_checkpoint(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | st.just(2**63), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-4, 64), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4), size=st.integers(0, 80))
def test_random_headers_are_read_or_refused(header: dict[str, Any], size: int, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "fuzz.safetensors", header, bytes(size))
    try:
        entries = read_checkpoint(path)
        assert all(entry.tensor().shape == entry.shape for entry in entries.values())
    except CheckpointError as error:
        str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), cut=st.integers(0, 40)
)
def test_flipped_and_missing_bytes_never_crash(flips: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    path = tmp_path / "flip.safetensors"
    save_file({"x": torch.randn(4, 4), "y": torch.arange(9), "z": torch.randn(3)}, path)
    content = bytearray(path.read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    path.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(CheckpointError):
        for entry in read_checkpoint(path).values():
            entry.tensor().clone()


# --- several files


def shards(folder: Path, weight_map: dict[str, str]) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_index_lists_tensors_of_all_shards(tmp_path: Path) -> None:
    entries = read_checkpoint(shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert {name: entry.file.path.name for name, entry in entries.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "three.safetensors"}, "shard three.safetensors is missing"),
        ({"a": "two.safetensors"}, "'a' is listed in shard two.safetensors, which does not hold it"),
        ({"a": "../one.safetensors"}, "outside the folder"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": "sub/one.safetensors"}, "outside the folder"),
        ({"a": "..\\one.safetensors"}, "outside the folder"),
        ({"a": ".."}, "outside the folder"),
        ({"a": ""}, "outside the folder"),
        ({}, "its weight_map lists no tensors; download it again"),
        ({"a": 3}, "expected .*weight_map"),
        (["one.safetensors"], "expected .*weight_map"),
        (None, "expected .*weight_map"),
    ],
)
def test_index_that_cannot_be_trusted_is_an_error(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json.*{message}"):
        read_checkpoint(shards(folder, weight_map))


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("weight_map", [{}, {"a": "x-00001-of-00002.safetensors"}])
def test_index_of_an_earlier_save_is_named_with_the_file_beside_it(
    weight_map: dict[str, str], variant: str, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / f"x{variant}.safetensors")
    index = tmp_path / f"x.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=rf"earlier save: delete it, and x{variant}\.safetensors beside it is read"
    ):
        read_checkpoint(index)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.pth", "weights.ckpt", "weights.pkl", "weights"])
def test_pickles_are_refused_and_not_opened(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=rf"{name}.*only \.safetensors"):
        read_checkpoint(path)
    index = shards(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        read_checkpoint(index)


def test_a_pickle_under_a_safe_name_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        read_checkpoint(tmp_path / "weights.safetensors")


def test_one_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors.*'a' is also in .*one\.safetensors"):
        read_checkpoint([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_missing_file_and_empty_list_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        read_checkpoint([])


# --- files as tensors


def test_misaligned_tensors_are_right(tmp_path: Path) -> None:
    """Old writers did not pad the header."""
    floats = torch.arange(6, dtype=torch.float32)
    text = json.dumps({"x": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}).encode()
    text += b" " * (1 - len(text) % 2)  # an odd length
    path = write_raw(tmp_path / "odd.safetensors", text, floats.numpy().tobytes())
    tensor = read_checkpoint(path)["x"].tensor()
    assert torch.equal(tensor, floats)
    tensor.add_(1)
    assert torch.equal(read_checkpoint(path)["x"].tensor(), floats)


def test_span_goes_where_the_bytes_go(tmp_path: Path) -> None:
    save_file({"x": torch.randn(4, 6)}, tmp_path / "x.safetensors")
    tensor = read_checkpoint(tmp_path / "x.safetensors")["x"].tensor()
    span = span_of(tensor)
    assert span is not None
    assert span_of(torch.nn.Parameter(tensor, requires_grad=False)) is span
    assert span_of(tensor.t()) is span
    part = span_of(tensor[1:3])
    assert part is not None
    assert torch.equal(part.shared(), span.shared()[24:72])
    assert span_of(tensor[:, 1:]) is None
    assert span_of(tensor.clone()) is None
    forget_span(tensor)
    assert span_of(tensor) is None


@pytest.mark.parametrize("is_told", [True, False], ids=["kernel", "contents"])
@pytest.mark.parametrize("by_data", [True, False])
def test_what_was_written_since_is_seen_and_neighbours_are_not_taken_for_it(
    is_told: bool, by_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three tensors share a page: the kernel knows that it was written, the contents tell where."""
    if not is_told:
        monkeypatch.setattr("vramkit.offload.disk.spans.written_pages", lambda _span: None)
    save_file({name: torch.randn(40) for name in "abc"}, tmp_path / "x.safetensors")
    entries = read_checkpoint(tmp_path / "x.safetensors")
    found = {name: entries[name].tensor() for name in "abc"}
    spans = {name: span_of(tensor) for name, tensor in found.items()}

    def written() -> list[str]:
        return [name for name, span in spans.items() if span is not None and span.may_differ(found[name])]

    assert written() == []
    (found["b"].data if by_data else found["b"]).add_(1)
    assert written() == ["b"]


def test_versions_that_were_counted_before_do_not_matter(tmp_path: Path) -> None:
    save_file({"x": torch.randn(4)}, tmp_path / "x.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False).zero_()
    parameter.data = read_checkpoint(tmp_path / "x.safetensors")["x"].tensor()
    assert parameter._version > 0
    span = span_of(parameter)
    assert span is not None
    assert not span.may_differ(parameter)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("has_preadv", [True, False])  # Windows has none
@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (1, 4096), (4095, 2), (4096, 8192), (12_345, 70_000), (99_999, 1)]
)
def test_reads_are_the_bytes_of_the_file(
    offset: int, size: int, has_preadv: bool, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_preadv:
        monkeypatch.delattr(os, "preadv")
    content = torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    path = tmp_path / "x.bin"
    path.write_bytes(content.numpy().tobytes())
    reader = FileReader(MappedFile(path), direct=direct)
    target = torch.zeros(size, dtype=torch.uint8)
    reader.read(offset, target)
    reader.close()
    assert torch.equal(target, content[offset : offset + size])


@pytest.mark.parametrize("most", [1, 100, 5_000])
@pytest.mark.parametrize("direct", [False, True])
def test_what_does_not_come_at_once_is_asked_for_again(
    direct: bool, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read may end anywhere, and around the page cache the next one could not begin there."""
    content = torch.randint(0, 256, (20_000,), dtype=torch.uint8)
    (tmp_path / "x.bin").write_bytes(content.numpy().tobytes())
    whole, short = os.preadv, []

    def reading(descriptor: int, buffers: list[Any], offset: int) -> int:
        count = min(most, whole(descriptor, buffers, offset))
        with memoryview(buffers[0]) as view:
            short.append(count < len(view))
            view[count:] = bytes(len(view) - count)
        return count

    reader = FileReader(MappedFile(tmp_path / "x.bin"), direct=direct)
    monkeypatch.setattr(os, "preadv", reading)
    target = torch.zeros(12_000, dtype=torch.uint8)
    reader.read(2_345, target)
    reader.close()
    assert torch.equal(target, content[2_345:14_345])
    assert any(short)


def test_many_threads_read_at_once_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one position in the file: without turns, bytes of one read would land in another."""
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr("vramkit.offload.disk.reader._PIECE_BYTES", 512)
    content = torch.randint(0, 256, (1_000_000,), dtype=torch.uint8)
    (tmp_path / "x.bin").write_bytes(content.numpy().tobytes())
    file = MappedFile(tmp_path / "x.bin")
    readers = [FileReader(file) for _ in range(2)]
    targets = [torch.zeros_like(content) for _ in readers]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda reader, target: reader.read(0, target), readers, targets))
    for reader, target in zip(readers, targets, strict=True):
        reader.close()
        assert torch.equal(target, content)


def test_a_module_streams_from_disk_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        resident = model(x)
        offload = apply_group_offloading(model, "cpu", offload_type="leaf_level", offload_to_disk_path=tmp_path)
        assert torch.equal(model(x), resident)
    offload.remove()


def test_a_file_that_was_cut_short_is_said_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    (tmp_path / "x.bin").write_bytes(bytes(100))
    reader = FileReader(MappedFile(tmp_path / "x.bin"))
    os.truncate(tmp_path / "x.bin", 60)
    with pytest.raises(StoreError, match=r"ends at byte 60; it was cut short"):
        reader.read(0, torch.zeros(100, dtype=torch.uint8))
    reader.close()


def test_file_stays_readable_when_its_name_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    tensor = read_checkpoint(path)["x"].tensor()
    save_file({"x": torch.zeros(1000)}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(path)
    assert torch.equal(tensor, torch.ones(1000))


# --- writing


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"x\.safetensors failed: No space left"):
        write_checkpoint(path, {"x": torch.ones(1000)})
    assert list(tmp_path.iterdir()) == []


def test_write_cut_short_by_the_kernel_keeps_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {"x": torch.ones(1000)})
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(StoreError, match="nothing was kept"):
            write_checkpoint(path, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_write_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_write(tmp_path / "x.bin") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"x\.bin failed"), atomic_write(tmp_path / "file" / "x.bin"):
        pass
