"""Texts that were encoded before: kept beside the encoder, in host memory, for calls that ask for the same again."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

__all__ = ["TextCache", "remember_texts", "remembered"]

Encode = TypeVar("Encode", bound=Callable[..., Any])
_CACHE = "_vramkit_texts"


class TextCache:
    """What an encoder made of texts, up to `limit_bytes`; what was not asked for the longest goes first.

    Attributes:
        used_bytes: what the results take in host memory.
        hits: how often a text was not encoded again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[Hashable, tuple[torch.device, tuple[torch.Tensor, ...]]] = OrderedDict()
        self.used_bytes = 0
        self.hits = 0

    def get(self, key: Hashable) -> tuple[torch.Tensor, ...] | None:
        """New tensors with the values that were kept, on the device where they were made."""
        if key not in self._kept:
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        device, tensors = self._kept[key]
        return tuple(tensor.to(device, copy=True) for tensor in tensors)

    def put(self, key: Hashable, tensors: tuple[torch.Tensor, ...]) -> None:
        """Keep a copy of the tensors, unless they are larger than all that may be kept."""
        size = sum(tensor.nbytes for tensor in tensors)
        if size > self._limit_bytes or key in self._kept:
            return
        self._kept[key] = tensors[0].device, tuple(tensor.to("cpu", copy=True) for tensor in tensors)
        self.used_bytes += size
        while self.used_bytes > self._limit_bytes:
            _, (_, dropped) = self._kept.popitem(last=False)
            self.used_bytes -= sum(tensor.nbytes for tensor in dropped)

    def __deepcopy__(self, _memo: dict[int, Any]) -> TextCache:
        return TextCache(0)  # the twin of an encoder may have no values, or other weights by and by


def remember_texts(text_encoder: nn.Module, limit_bytes: int) -> TextCache:
    """Keep what an encoder makes of texts; its weights must not change from then on."""
    cache: TextCache = vars(text_encoder).setdefault(_CACHE, TextCache(limit_bytes))
    return cache


def remembered(encode: Encode) -> Encode:
    """Let a function ``encode(prompts, *, tokenizer, text_encoder, **options)`` ask the cache of its encoder first.

    It returns a tensor or a tuple of tensors, and what it returns depends on nothing but its arguments.
    """

    @functools.wraps(encode)
    def wrapped(prompts: Sequence[str], *, tokenizer: Any, text_encoder: nn.Module, **options: Any) -> Any:
        cache: TextCache | None = getattr(text_encoder, _CACHE, None)
        if cache is None:
            return encode(prompts, tokenizer=tokenizer, text_encoder=text_encoder, **options)
        key = (tuple(prompts), repr(sorted(options.items())))
        if (known := cache.get(key)) is not None:
            return known if len(known) > 1 else known[0]
        made = encode(prompts, tokenizer=tokenizer, text_encoder=text_encoder, **options)
        cache.put(key, made if isinstance(made, tuple) else (made,))
        return made

    return cast("Encode", wrapped)
