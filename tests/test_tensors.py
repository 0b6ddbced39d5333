from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vramkit import tensors
from vramkit.errors import UnsupportedTensorError
from vramkit.offload.layout import BufferLayout


class Scaled(torch.Tensor):
    """A wrapper as quantization libraries make them: two inner tensors and a note."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, note: str) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, note: str) -> None:
        self.inner, self.scale, self.note = data, scale, note

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["inner", "scale"], self.note

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], note: str, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["inner"], inner["scale"], note)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Scaled(args[0].inner, args[0].scale, args[0].note)
        raise NotImplementedError(function)


def scaled(inner: torch.Tensor | None = None) -> Scaled:
    return Scaled(torch.ones(4, 3, dtype=torch.int8) if inner is None else inner, torch.rand(4, 1), "by row")


def test_a_plain_tensor_is_its_own_leaf() -> None:
    for tensor in (torch.ones(3), nn.Parameter(torch.ones(3)), nn.Buffer(torch.ones(3))):
        (leaf,) = tensors.leaves(tensor)
        assert leaf.data_ptr() == tensor.data_ptr()
        assert not leaf.requires_grad
        assert tensors.rebuild(tensor, [leaf]) is leaf


def test_wrappers_are_taken_apart_and_put_together_however_deep() -> None:
    inside, outside = scaled(), scaled(scaled())
    assert [leaf.dtype for leaf in tensors.leaves(inside)] == [torch.int8, torch.float32]
    assert len(tensors.leaves(outside)) == 3
    copies = [leaf.clone() for leaf in tensors.leaves(outside)]
    again = tensors.rebuild(outside, copies)
    assert isinstance(again, Scaled)
    assert again.note == "by row"
    assert [leaf.data_ptr() for leaf in tensors.leaves(again)] == [leaf.data_ptr() for leaf in copies]
    with pytest.raises(ValueError, match="more leaves"):
        tensors.rebuild(inside, copies)


def test_what_cannot_be_taken_apart_is_refused_by_name() -> None:
    class Opaque(torch.Tensor):
        pass

    with pytest.raises(UnsupportedTensorError, match="Opaque"):
        tensors.leaves(torch.ones(3).as_subclass(Opaque))
    with pytest.raises(UnsupportedTensorError, match="to_dense"):
        tensors.leaves(torch.eye(3).to_sparse())


def test_ownership_is_kept() -> None:
    parameter = tensors.as_owned(torch.ones(2), like=nn.Parameter(torch.ones(2)))
    assert isinstance(parameter, nn.Parameter)
    assert not parameter.requires_grad
    plain = torch.ones(2)
    assert tensors.as_owned(plain, like=torch.ones(2)) is plain


def test_versions_count_writes_through_every_leaf() -> None:
    tensor = torch.ones(3)
    before = tensors.version(tensor)
    tensor.add_(1)
    assert tensors.version(tensor) > before
    with torch.no_grad():
        parameter = nn.Parameter(tensor)
        before = tensors.version(parameter)
        parameter.add_(1)
        assert tensors.version(parameter) > before
    wrapper = scaled()
    before = tensors.version(wrapper)
    wrapper.scale.mul_(2)
    assert tensors.version(wrapper) > before
    with torch.inference_mode():
        inference = torch.ones(3)
        assert tensors.version(inference) == 0
        inference.data = tensor  # as gathering does; then `is_inference` is False, and there is still no count
        assert tensors.version(inference) == 0


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int64]),
)
def test_layouts_keep_bytes_and_dense_strides(shape: list[int], order: Any, dtype: torch.dtype) -> None:
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    leaf = torch.randint(-100, 100, shape).to(dtype).permute(permutation) if shape else torch.tensor(3).to(dtype)
    other = torch.randn(5, 7)[:, ::2]
    layout = BufferLayout.of([leaf, other, leaf])
    memory = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    for spec, source in zip(layout.leaves, (leaf, other, leaf), strict=True):
        assert spec.offset % 256 == 0
        view = spec.view(memory)
        view.copy_(source)
        assert view.shape == source.shape
        assert torch.equal(view.float(), source.float())
        if tensors.is_dense(source):
            assert view.stride() == source.stride()
            if source.numel():
                assert torch.equal(memory[spec.offset : spec.offset + spec.size_bytes], tensors.byte_view(source))
        else:
            assert view.is_contiguous()
    ends = [(spec.offset, spec.offset + spec.size_bytes) for spec in layout.leaves]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))


def test_dense_is_told_from_holes_and_overlaps() -> None:
    whole = torch.randn(4, 6)
    assert tensors.is_dense(whole)
    assert tensors.is_dense(whole.t())
    assert tensors.is_dense(whole[:2])
    assert tensors.is_dense(torch.empty(0, 3))
    assert not tensors.is_dense(whole[:, :3])
    assert not tensors.is_dense(whole[::2])
    assert not tensors.is_dense(torch.ones(1).expand(4))


def test_views_are_no_inference_tensors() -> None:
    with torch.inference_mode():
        view = tensors.typed_view(torch.zeros(64, dtype=torch.uint8), 16, torch.float32, (2, 2), (1, 2))
    assert view.stride() == (1, 2)
    assert view.storage_offset() == 4
