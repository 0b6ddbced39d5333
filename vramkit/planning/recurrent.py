"""How recurrent layers run on the CPU: the inputs of all steps are multiplied at once, and elsewhere step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch._decomp import get_decompositions

__all__ = ["recurrent_kernels"]

_OPERATORS = {
    getattr(torch, name): getattr(torch.ops.aten, name).input for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")
}


def recurrent_kernels(run: Callable[[Any, Any, Any], Any]) -> Mapping[Any, Callable[..., Any]]:
    """Return what takes the place of torch's recurrent functions, which without memory run as on an accelerator.

    `run` runs a function with arguments of which some have no memory.
    """
    steps = get_decompositions(list(_OPERATORS.values()))
    return {
        function: partial(_layers, function, steps[operator], run)
        for function, operator in _OPERATORS.items()
        if operator in steps
    }


def _layers(function: Any, steps: Any, run: Callable[[Any, Any, Any], Any], *args: Any) -> Any:
    given, state, weights, is_packed = *args[:3], not isinstance(args[3], bool)
    if is_packed or not weights[0].is_meta:
        return run(function, args, {})
    if _is_of_library(function, given, state):
        given.new_empty(_bytes_of_layer(given, state[0], weights, args[3:]), dtype=torch.uint8)
        return run(function, args, {})
    first = state[0] if isinstance(state, tuple) else state
    # While the inputs are multiplied for the second direction, products and outputs of the first are there, these twice.
    is_bidirectional = args[7]
    width = weights[0].shape[0] + 2 * first.shape[-1] if is_bidirectional else 0
    of_first_direction = weights[0].new_empty(*given.shape[:-1], width)
    result = steps(*args)
    del of_first_direction
    return result


def _is_of_library(function: Any, given: torch.Tensor, state: Any) -> bool:
    """Whether oneDNN's kernel runs: in 16 bits on processors that multiply them."""
    is_plain = function is torch.lstm and state[0].shape[-1] == state[1].shape[-1]
    return is_plain and given.dtype in _dtypes_of_library()


@functools.cache
def _dtypes_of_library() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    narrow = [dtype for dtype, name in checks.items() if getattr(torch.ops.mkldnn, name)()]
    return frozenset([torch.float32, *narrow])


def _bytes_of_layer(given: torch.Tensor, state: torch.Tensor, weights: Any, options: Any) -> int:
    """What is there while oneDNN computes the last layer, of which its operator shows the result alone.

    These are its weights in another order, zeros as large as those where it has no biases, and the products of all steps,
    for a batch of one in 32 bits too; what the layer before made, one direction of it once more, and a copy of it where it
    is wider than a state; what this one makes; and the transposed input of the first layer. What it takes beside that for
    states and padding was measured with torch 2.13: it is at most what is added for it here, except for a batch of one
    (8 % of all below it with 256 numbers a step).
    """
    has_biases, layers, _, _, is_bidirectional, batch_first = options
    positions, products, width = given.shape[:-1].numel(), weights[0].shape[0], state.shape[-1]
    made = 2 * width if is_bidirectional else width
    read = made if layers > 1 else given.shape[-1]
    beside = made + (read if read > width else 0) + batch_first * given.shape[-1]
    if layers > 1:
        beside += made + (width if is_bidirectional else 0)
    of_each = 4 if has_biases else 2
    pairs = zip(weights[::of_each], weights[1::of_each], strict=True)
    largest = max(first.numel() + other.numel() for first, other in pairs)
    numbers = positions * (products + products // 32 + beside) + largest * (1 if has_biases else 2)
    wide = 10 * state[0].numel() + (positions * products if state.shape[1] == 1 else 0)
    return int(numbers * given.itemsize + 4 * wide + 24 * 2**10)
