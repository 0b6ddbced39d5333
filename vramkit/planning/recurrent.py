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
    if is_packed or not weights[0].is_meta or _is_of_library(function, given, state):
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
    """Whether oneDNN's kernel runs, which keeps no more than single steps do: for narrow dtypes on some processors only."""
    is_plain = function is torch.lstm and state[0].shape[-1] == state[1].shape[-1]
    return is_plain and given.dtype in _dtypes_of_library()


@functools.cache
def _dtypes_of_library() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    narrow = [dtype for dtype, name in checks.items() if getattr(torch.ops.mkldnn, name)()]
    return frozenset([torch.float32, *narrow])
