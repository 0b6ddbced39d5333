"""What convolutions of the CPU take beside their results: torch chooses by sizes what computes them."""

from __future__ import annotations

from typing import Any

import torch

from vramkit.planning.convolutions import has_channels_innermost

__all__ = ["workspace_bytes_on_cpu"]

_C: Any = torch._C  # noqa: SLF001 - what computes a convolution has no public name
_UNFOLDS_ALL = {_C._ConvBackend.Slow2d, _C._ConvBackend.Slow3d}  # noqa: SLF001
_UNFOLDS_EACH = {  # picture or clip of a batch
    getattr(_C._ConvBackend, name)  # noqa: SLF001
    for name in ("SlowDilated2d", "SlowDilated3d", "SlowTranspose2d", "SlowTranspose3d")
}
_ONEDNN = _C._ConvBackend.Mkldnn  # noqa: SLF001
_BLOCK = 16  # channels that oneDNN puts side by side with AVX-512; 8 without


def workspace_bytes_on_cpu(
    result: torch.Tensor, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> int:
    """What a convolution takes beside its result on the CPU, where `options` are those of the operator.

    torch's own kernels, which in 32 bits are for few numbers, write out for each position all numbers that are multiplied
    there: a clip becomes 27 times as large for a kernel of 3 x 3 x 3. oneDNN's are told of below. All of it was measured,
    with torch 2.13 on an x86 with AVX-512.
    """
    stride, padding, _, transposed, _, groups = options[:6]
    backend = _chosen(given, weight, *options[:6])
    unfolds_all = backend in _UNFOLDS_ALL
    if unfolds_all or backend in _UNFOLDS_EACH:
        is_by_position = max(weight.shape[2:]) == max(stride) == 1 and not any(padding)
        positions = (given if transposed else result)[:, 0].numel() // (1 if unfolds_all else given.shape[0])
        unfolded_bytes = 0 if unfolds_all and is_by_position else weight[0].nbytes * positions
        taken_bytes = unfolded_bytes + _copied_bytes(given, is_innermost=given.ndim == 4 and not result.is_contiguous())
        # Groups are computed one after the other, and what they have made is put together.
        return taken_bytes if groups == 1 else max(taken_bytes + given.nbytes // groups, result.nbytes)
    if backend == _ONEDNN or transposed:
        return _bytes_of_blocks(result, given, weight, groups, is_transposed=transposed, has_bias=bias is not None)
    return 0


def _chosen(
    given: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, *others: Any
) -> object:
    """Return what torch computes a convolution with, as it says itself of tensors of these sizes."""
    transposed, output_padding, groups = others
    shapes = [tuple(given.shape), tuple(weight.shape)]
    if given.ndim == 3:  # as pictures of one row
        shapes = [(*shape[:2], 1, shape[2]) for shape in shapes]
        stride, padding, dilation, output_padding = (1, *stride), (0, *padding), (1, *dilation), (0, *output_padding)
    of_one_number = [torch.empty_strided(shape, (0,) * len(shape), dtype=given.dtype) for shape in shapes]
    options = stride, padding, dilation, transposed, output_padding, groups, None
    return _C._select_conv_backend(*of_one_number, None, *options)  # noqa: SLF001


def _bytes_of_blocks(
    result: torch.Tensor,
    given: torch.Tensor,
    weight: torch.Tensor,
    groups: int,
    *,
    is_transposed: bool,
    has_bias: bool,
) -> int:
    """What oneDNN takes: input and weight with their channels in blocks, and a result of blocks, also while that is copied.

    Fewer channels than a block has are read as they are, and so is what has its channels innermost; groups and transposed
    convolutions fill no block up. Each thread has sums of 32 bits where positions of 16 are multiplied one by one, and the
    input in 32 for a transposed convolution, whose bias is added to a copy.
    """
    if not result.is_contiguous():
        return 2 * weight.nbytes + _copied_bytes(given, is_innermost=True)
    given_bytes, blocks_bytes = given.nbytes, result.nbytes
    if groups in {1, given.shape[1]} and not is_transposed:
        is_read = groups == 1 and given.shape[1] < _BLOCK
        given_bytes, blocks_bytes = 0 if is_read else _in_blocks(given), _in_blocks(result)
    has_sums = max(weight.shape[2:]) == 1 and given.element_size() == 2
    wide = given[0].numel() if is_transposed else result[0].numel() if has_sums else 0
    beside_bytes = weight.nbytes + 4 * wide * torch.get_num_threads() + _copied_bytes(given, is_innermost=False)
    before_bytes = given_bytes + beside_bytes + blocks_bytes - result.nbytes
    return max(before_bytes, blocks_bytes + (result.nbytes if is_transposed and has_bias else 0))


def _in_blocks(tensor: torch.Tensor) -> int:
    """Bytes of a tensor [B, C, ...] whose channels are filled up to whole blocks."""
    return tensor[:, :1].nbytes * -(-tensor.shape[1] // _BLOCK) * _BLOCK


def _copied_bytes(given: torch.Tensor, *, is_innermost: bool) -> int:
    """What is copied of an input for a kernel that reads contiguous ones, or those with their channels innermost."""
    is_read = has_channels_innermost(given) if is_innermost else given.is_contiguous()
    return 0 if is_read else given.nbytes
