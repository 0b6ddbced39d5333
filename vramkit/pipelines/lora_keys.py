"""The names that LoRA files give to the layers of a model, read into one form.

A name is a prefix, a layer and a part, as in ``transformer.blocks.0.attn1.to_q.lora_A.weight``. Layers are spelled as in
diffusers and PEFT, as in the model's original code (ComfyUI and most trainers), or as either with underscores for dots
(kohya, musubi). What a file changes is up @ down * alpha / rank per layer, plus, in some files, a bias (``diff_b``) or a
whole difference (``diff``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.errors import CheckpointError

__all__ = ["LoraWeights", "lora_weights"]

_PREFIX = re.compile(r"(base_model\.model\.|model\.)?(transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)?")
_PARTS = {
    "down": re.compile(r"\.(lora_A|lora_down|lora\.down)(\.default)?\.weight$"),
    "up": re.compile(r"\.(lora_B|lora_up|lora\.up)(\.default)?\.weight$"),
    "bias": re.compile(r"\.lora_B(\.default)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "diff": re.compile(r"\.diff$"),
    "diff_b": re.compile(r"\.diff_b$"),
}

_Rules = tuple[tuple[str, str], ...]
_ORIGINAL: dict[str, _Rules] = {  # class of the model -> (pattern of our names, original spelling)
    "WanTransformer3DModel": (
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])$", r".\1"),
        (r"\.to_out\.0$", ".o"),
        (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
        (r"\.ffn\.net\.2$", ".ffn.2"),
        (r"^condition_embedder\.(text|time)_embedder\.linear_1$", r"\1_embedding.0"),
        (r"^condition_embedder\.(text|time)_embedder\.linear_2$", r"\1_embedding.2"),
        (r"^condition_embedder\.time_proj$", "time_projection.1"),
        (r"^proj_out$", "head.head"),
    ),
    "HunyuanVideoTransformer3DModel": (
        (r"^transformer_blocks\.", "double_blocks."),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^(double_blocks\.\d+)\.attn\.to_[qkv]$", r"\1.img_attn_qkv"),
        (r"^(double_blocks\.\d+)\.attn\.add_[qkv]_proj$", r"\1.txt_attn_qkv"),
        (r"^(double_blocks\.\d+)\.attn\.to_out\.0$", r"\1.img_attn_proj"),
        (r"^(double_blocks\.\d+)\.attn\.to_add_out$", r"\1.txt_attn_proj"),
        (r"^(double_blocks\.\d+)\.norm1\.linear$", r"\1.img_mod.linear"),
        (r"^(double_blocks\.\d+)\.norm1_context\.linear$", r"\1.txt_mod.linear"),
        (r"^(double_blocks\.\d+)\.ff\.net\.0\.proj$", r"\1.img_mlp.fc1"),
        (r"^(double_blocks\.\d+)\.ff\.net\.2$", r"\1.img_mlp.fc2"),
        (r"^(double_blocks\.\d+)\.ff_context\.net\.0\.proj$", r"\1.txt_mlp.fc1"),
        (r"^(double_blocks\.\d+)\.ff_context\.net\.2$", r"\1.txt_mlp.fc2"),
        (r"^(single_blocks\.\d+)\.(attn\.to_[qkv]|proj_mlp)$", r"\1.linear1"),
        (r"^(single_blocks\.\d+)\.proj_out$", r"\1.linear2"),
        (r"^(single_blocks\.\d+)\.norm\.linear$", r"\1.modulation.linear"),
    ),
}
_ROWS = re.compile(r"(to_q|add_q_proj)|(to_k|add_k_proj)|(to_v|add_v_proj)|(proj_mlp)")  # the order in a joined layer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraWeights:
    """What an adapter adds to one linear layer: ``(up @ down) * alpha / rank``, and a bias on the same scale."""

    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank]
    alpha: float
    bias: Tensor | None = None  # [outputs]

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.down.shape[0]


def lora_weights(
    model: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None, *, source: str
) -> dict[str, LoraWeights]:
    """Read the tensors of a LoRA file for `model`, by the names of its linear layers.

    Args:
        model: its linear layers may carry adapters already.
        state: tensors by their names in the file.
        metadata: a PEFT config; its alphas count where the file has none. Without both, alpha is the rank.
        source: the file, for messages.

    Raises:
        CheckpointError: nothing in it, names that the model does not have, shapes that do not fit, or DoRA.
    """
    metadata = {} if metadata is None else metadata
    if metadata.get("use_dora") or any("dora_scale" in key or "lora_magnitude_vector" in key for key in state):
        raise CheckpointError(
            f"{source} holds a DoRA adapter, which scales whole weights; only plain LoRA is supported"
        )
    layers = dict(_linear_layers(model))
    problems: list[str] = []
    found = _sorted_by_layer(state, _spellings(type(model).__name__, layers), layers, problems)
    joined = {name: _joined(name, layers[name], parts, metadata, problems) for name, parts in found.items()}
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}. Is it for another model?"
        )
    weights = {name: each for name, each in joined.items() if each is not None}
    if not weights:
        raise CheckpointError(f"{source} holds no LoRA weights")
    return weights


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Walk the linear layers under the names that they have without adapters."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
            yield name, base


def _spellings(model_class: str, layers: Mapping[str, nn.Linear]) -> dict[str, tuple[str, ...]]:
    """Every way to write a layer -> our layers, several where the original code has one for their rows together."""
    originals: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        spelling = name
        for pattern, original in _ORIGINAL.get(model_class, ()):
            spelling = re.sub(pattern, original, spelling)
        originals[spelling].append(name)
    spelled = {spelling: tuple(sorted(names, key=_row_order)) for spelling, names in originals.items()}
    spelled |= {name: (name,) for name in layers}
    return {spelling.replace(".", "_"): names for spelling, names in spelled.items()} | spelled


def _row_order(name: str) -> int:
    match = _ROWS.search(name)
    return match.lastindex or 0 if match else 0


def _split(key: str) -> tuple[str, str | None]:
    for part, pattern in _PARTS.items():
        if match := pattern.search(key):
            layer = key[: match.start()]
            prefix = _PREFIX.match(layer)
            return layer[prefix.end() :] if prefix else layer, part
    return key, None


def _sorted_by_layer(
    state: Mapping[str, Tensor],
    spelled: Mapping[str, tuple[str, ...]],
    layers: Mapping[str, nn.Linear],
    problems: list[str],
) -> dict[str, dict[str, Tensor]]:
    """Our layer -> part -> tensor."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        spelling, part = _split(key)
        if part is None or spelling not in spelled:
            # Trainers write differences of norms although they did not train them.
            if part not in ("diff", "diff_b") or bool(tensor.any()):
                problems.append(f"{key} is not a name that the model knows")
            continue
        names = spelled[spelling]
        rows = [layers[name].out_features for name in names]
        if part in ("down", "alpha") or len(names) == 1:
            pieces = [tensor] * len(names)
        elif not tensor.ndim or tensor.shape[0] != sum(rows):
            problems.append(f"{key} is {list(tensor.shape)}, expected {sum(rows)} rows")
            continue
        else:
            pieces = [piece.clone() for piece in torch.split(tensor, rows)]
        for name, piece in zip(names, pieces, strict=True):
            found[name][part] = piece
    return found


def _joined(
    name: str, layer: nn.Linear, parts: dict[str, Tensor], metadata: Mapping[str, Any], problems: list[str]
) -> LoraWeights | None:
    """Put the parts of one layer together; None where they change nothing, or where there is a problem."""
    try:
        down, up = _matrices(name, layer, parts)
        bias = parts.get("bias", parts.get("diff_b"))
        if bias is not None and bias.shape != (layer.out_features,):
            raise ValueError(f"a bias of {list(bias.shape)}, expected [{layer.out_features}]")
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return None
    if down is None or up is None:
        return None
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(name, rank, metadata)
    if "bias" not in parts and bias is not None and alpha != rank:
        bias = bias * (rank / alpha)  # diff_b is not scaled by alpha; biases of PEFT, which this becomes, are
    return LoraWeights(down=down, up=up, alpha=alpha, bias=bias)


def _matrices(name: str, layer: nn.Linear, parts: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    down, up = parts.get("down"), parts.get("up")
    if down is None and up is None:
        return _matrices_of_difference(name, layer, parts)
    if down is None or up is None:
        raise ValueError(f"has no lora_{'A' if down is None else 'B'} weight")
    if "diff" in parts and bool(parts["diff"].any()):
        raise ValueError("has LoRA weights and a whole difference (diff) as well")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ValueError(
            f"lora_A is {list(down.shape)} and lora_B {list(up.shape)}; expected [rank, in] and [out, rank]"
        )
    if (down.shape[1], up.shape[0]) != (layer.in_features, layer.out_features):
        raise ValueError(
            f"LoRA weights for {down.shape[1]} -> {up.shape[0]} features, the layer has {layer.in_features} -> "
            f"{layer.out_features}"
        )
    return down, up


def _matrices_of_difference(
    name: str, layer: nn.Linear, parts: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """A whole difference as a LoRA of full rank; a bias alone as one that multiplies by zero."""
    inputs, outputs = layer.in_features, layer.out_features
    diff = parts.get("diff")
    if diff is not None and bool(diff.any()):
        if diff.shape != (outputs, inputs):
            raise ValueError(f"diff is {list(diff.shape)}, expected [{outputs}, {inputs}]")
        eye = torch.eye(min(inputs, outputs), dtype=diff.dtype)
        return (diff, eye) if outputs <= inputs else (eye, diff)
    bias = parts.get("bias", parts.get("diff_b"))
    # One published file has biases of this layer and no weights for it; diffusers leaves them out as well.
    if bias is None or not bool(bias.any()) or name == "condition_embedder.time_proj":
        return None, None
    return bias.new_zeros(1, inputs), bias.new_zeros(outputs, 1)


def _alpha(name: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Alpha of a layer by a PEFT config: patterns match the end of a name."""
    if "lora_alpha" not in metadata:
        return float(rank)
    patterns = metadata.get("alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = float(next(matching, metadata["lora_alpha"]))
    return alpha * rank**0.5 if metadata.get("use_rslora") else alpha
