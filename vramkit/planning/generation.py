"""Texts that a language model of transformers will generate: how many, how long, and what its cache takes by then."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from vramkit.errors import ConfigError

__all__ = ["Generation", "can_generate"]

_OPTIONS = ("batch", "max_length", "max_new_tokens", "cache_implementation")
_NEW_TOKENS = 20  # of transformers, where neither call nor config says


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A call of ``generate``. Lengths are in tokens."""

    batch: int
    prompt: int
    length: int
    """Of the prompt and what is generated, together."""
    cache_implementation: str | None = None

    @classmethod
    def of_options(cls, example: Any, options: Mapping[str, Any]) -> Generation:
        """Read what `vramkit.fit` was told: token ids [B, tokens] or a mapping with ``input_ids``, and lengths.

        Without an example, prompts are as long as ``max_new_tokens`` leaves of ``max_length``, or all but one token of it.

        Raises:
            ConfigError: an unknown option, a size that is none, or too little to know the length by.
        """
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise ConfigError(
                f"{unknown[0]}= is no argument of a generation that is planned; those are {', '.join(_OPTIONS)}"
            )
        for name in _OPTIONS[:3]:
            value = options.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}; expected a whole number, at least 1")
        length, new = options.get("max_length"), options.get("max_new_tokens")
        if example is None and length is None:
            raise ConfigError(
                f"{', '.join(options)} were given, and no length of what is generated; give max_length=, or example= (token "
                "ids) and max_new_tokens="
            )
        batch, prompt = (1, max(1, (length or 1) - (new or 1))) if example is None else _sizes_of(example)
        return cls(
            batch=options.get("batch", batch),
            prompt=prompt,
            length=max(prompt + 1, length if length is not None else prompt + (new or _NEW_TOKENS)),
            cache_implementation=options.get("cache_implementation"),
        )

    @classmethod
    def of_call(cls, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation | None:
        """Read a call of ``module.generate``; None where it is not known what that does."""
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | dict(kwargs)
        ids = next((given[name] for name in ("inputs", "input_ids") if given.get(name) is not None), None)
        configs = (given.get("generation_config"), getattr(module, "generation_config", None))

        def said(name: str) -> Any:
            found = [given.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in found if value is not None), None)

        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or said("use_cache") is False:
            return None
        prompt, new, length = ids.shape[1], said("max_new_tokens"), said("max_length")
        return cls(
            batch=ids.shape[0] * max(said("num_beams") or 1, said("num_return_sequences") or 1),
            prompt=prompt,
            length=max(prompt + 1, prompt + new if new is not None else length or prompt + _NEW_TOKENS),
            cache_implementation=said("cache_implementation"),
        )

    def make(self, twin: Any) -> None:
        """Generate the first token on a twin, and the last one, for which the cache is as long as it becomes."""
        first = self._token(twin, self.prompt)
        cache = first.past_key_values
        del first
        layers = [layer for layer in getattr(cache, "layers", ()) if torch.is_tensor(getattr(layer, "keys", None))]
        if self.length - self.prompt < 2 or self.cache_implementation is not None or not layers:
            return
        for layer in layers:
            longest = getattr(layer, "sliding_window", None) or self.length
            for name in ("keys", "values"):
                held = getattr(layer, name)
                length = max(held.shape[-2], min(self.length, longest) - 1)
                setattr(layer, name, held.new_empty(*held.shape[:-2], length, held.shape[-1]))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self.length - 1
        self._token(twin, self.length - 1, past_key_values=cache)

    def _token(self, twin: Any, tokens: int, **more: Any) -> Any:
        if more:  # of a cache, all but the last token are known
            tokens += 1
        config = twin.generation_config
        twin.generation_config = copy.copy(config)
        twin.generation_config.eos_token_id = None  # no token has a value that could be compared with it
        if twin.generation_config.decoder_start_token_id is None:  # the call may say it; only encoder-decoders need one
            twin.generation_config.decoder_start_token_id = 0
        try:
            return twin.generate(
                torch.ones(self.batch, tokens, dtype=torch.int64),
                max_new_tokens=max(1, self.length - tokens),
                do_sample=False,
                return_dict_in_generate=True,
                stopping_criteria=[lambda ids, _scores, **_: torch.ones(len(ids), dtype=torch.bool)],
                **({"cache_implementation": self.cache_implementation} if self.cache_implementation else {}),
                **more,
            )
        finally:
            twin.generation_config = config


def can_generate(module: Any) -> bool:
    """Whether `module` is a language model of transformers."""
    return callable(getattr(module, "generate", None)) and hasattr(module, "generation_config")


def _sizes_of(example: Any) -> tuple[int, int]:
    ids = (
        example.get("input_ids")
        if isinstance(example, Mapping)
        else example[0]
        if isinstance(example, tuple)
        else example
    )
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise ConfigError(
            f"example= is {type(example).__name__}; expected token ids [batch, tokens], or a mapping with input_ids"
        )
    return ids.shape[0], ids.shape[1]
