"""What PEFT's config of an adapter says: how strong it is, and which weights its file has in place of those of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vramkit.errors import CheckpointError

__all__ = ["LoraConfig"]

_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal")  # beginnings that leave the base weights as they are
_MOST_ALPHA = 1e30
_MOST_REPEATS = 2  # in a pattern, which may be written so that it tries for years
_CHANGING = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "alora_invocation_tokens",
)


class LoraConfig:
    """The entries of an adapter_config.json, or of the metadata that diffusers writes; none at all is a config too."""

    def __init__(self, entries: Mapping[str, Any] | None = None, *, source: str = "the adapter") -> None:
        """Read `entries`.

        Raises:
            CheckpointError: an adapter of another kind, or one whose effect is more than ``up @ down``.
        """
        self._entries = dict(entries or {})
        get = self._entries.get
        kind = str(get("peft_type") or "LORA").rpartition(".")[-1]
        if kind != "LORA" or get("use_dora"):
            raise CheckpointError(
                f"{source} holds a {'DoRA' if kind == 'LORA' else kind} adapter by its config; only plain LoRA is supported"
            )
        start = get("init_lora_weights")
        if start not in _UNTOUCHED:
            raise CheckpointError(
                f"{source} was trained from init_lora_weights={start!r}, which changes the weights of the model too: save "
                "it by PEFT with path_initial_model_for_weight_conversion, which makes plain LoRA of it"
            )
        if changing := [name for name in _CHANGING if get(name)]:
            raise CheckpointError(f"{source} has {', '.join(changing)} in its config; only plain LoRA is supported")
        saved = get("modules_to_save") or ()
        if not isinstance(saved, list | tuple | set) or not all(isinstance(each, str) for each in saved):
            raise CheckpointError(f"{source}: its config has modules_to_save={saved!r}, expected names")
        patterns = get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{source}: its config has alpha_pattern={patterns!r}, expected alphas by pattern")
        for value in (get("lora_alpha", 1), *patterns.values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST_ALPHA:
                raise CheckpointError(f"{source}: its config has an alpha of {value!r}, expected a number")
        self._patterns = [(_compiled(pattern, source), float(value)) for pattern, value in patterns.items()]

    @property
    def has_biases(self) -> bool:
        """Whether the file has biases of the model, as training left them."""
        return str(self._entries.get("bias") or "none") != "none"

    def replaces(self, layers: Iterable[str]) -> bool:
        """Whether the file has a whole layer of the model, as training left it; `layers` are ways to write its name."""
        saved = self._entries.get("modules_to_save") or ()
        return any(layer == each or layer.endswith(f".{each}") for layer in layers for each in saved)

    def alpha(self, layers: Iterable[str], rank: int) -> float:
        """Alpha of a layer: its effect is ``up @ down * alpha / rank``. Patterns match the end of one of `layers`."""
        if "lora_alpha" not in self._entries:
            return float(rank)
        matching = (value for layer in layers for pattern, value in self._patterns if pattern.match(layer))
        alpha = float(next(matching, self._entries["lora_alpha"]))
        return alpha * rank**0.5 if self._entries.get("use_rslora") else alpha


def _compiled(pattern: Any, source: str) -> re.Pattern[str]:
    """A pattern for the end of a layer's name, as PEFT takes it, but for those that could take time without end."""
    text = str(pattern)
    if len(re.findall(r"[*+{]", text)) > _MOST_REPEATS or re.search(r"\)[*+{]", text):
        raise CheckpointError(
            f"{source}: its config has alpha_pattern {text!r}, expected names, or patterns with {_MOST_REPEATS} repeats at "
            "most and no repeated groups"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: its config has alpha_pattern {text!r}, which is no pattern: {error}"
        ) from error
