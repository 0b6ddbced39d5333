"""Linear layers with adapters beside them, as PEFT makes them: put in, switched, merged and taken out.

Such a layer keeps the original one as ``base_layer`` and adds ``lora_B(lora_A(x)) * scaling`` for every active adapter.
Weights of adapters have the dtype that the base computes in, whatever it is stored in.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.casting.narrow import NarrowTensor
from vramkit.errors import ConfigError
from vramkit.extras import extra
from vramkit.offload.collector import collector_paused
from vramkit.pipelines.lora.keys import LoraWeights
from vramkit.pipelines.lora.merged import MergedTensor, add_product
from vramkit.tensors import is_plain

__all__ = [
    "Apart",
    "activate",
    "delete",
    "enable",
    "insert",
    "keep_merged",
    "lora_layers",
    "merge",
    "merge_apart",
    "refuse_infinite",
    "refuse_unmergeable",
    "require_peft",
    "take_out",
    "unmerge",
    "unmerge_apart",
]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry adapters, by the names of the layers that they stand for."""
    return {name: module for name, module in model.named_modules() if _is_lora(module)}


@collector_paused()
def insert(model: nn.Module, adapter: str, weights: Mapping[str, LoraWeights], dtype: torch.dtype) -> None:
    """Put an adapter beside the linear layers that `weights` names.

    dtype is what adapters compute in where the base weight does not tell.
    """
    peft = require_peft()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # it is there from the last adapter
        peft.inject_adapter_in_model(_config(peft, weights), model, adapter_name=adapter, low_cpu_mem_usage=True)
    for name, each in weights.items():
        layer: Any = model.get_submodule(name)
        base = layer.get_base_layer()
        layer.train(base.training)
        wide = base.weight.dtype.is_floating_point and base.weight.dtype.itemsize > 1
        where = {"device": base.weight.device, "dtype": base.weight.dtype if wide else dtype}
        layer.lora_A[adapter].weight = _frozen(each.down, **where)
        layer.lora_B[adapter].weight = _frozen(each.up, **where)
        if each.bias is not None:
            layer.lora_B[adapter].bias = _frozen(each.bias, **where)
            layer.lora_bias[adapter] = True


def activate(model: nn.Module, adapters: Sequence[str], scale_of: Callable[[str, str], float]) -> None:
    """Let these adapters count, each times ``scale_of(adapter, layer)``, and no others. Weights stay where they are."""
    for name, layer in lora_layers(model).items():
        _switch(layer, list(adapters))
        for adapter in adapters:
            layer.set_scale(adapter, scale_of(adapter, name))


def enable(model: nn.Module, *, enabled: bool) -> None:
    """Let layers compute with adapters, or as if they had none."""
    for layer in lora_layers(model).values():
        layer.enable_adapters(enabled)
        _freeze(layer)


def delete(model: nn.Module, adapter: str) -> None:
    """Take one adapter out, and the layers that carried no other."""
    for name, layer in lora_layers(model).items():
        _switch(layer, [other for other in layer.active_adapters if other != adapter])
        layer.delete_adapter(adapter)
        if not layer.lora_A:
            model.set_submodule(name, layer.get_base_layer())
    peft_config: Any = getattr(model, "peft_config", {})
    if peft_config.pop(adapter, None) is not None and not peft_config:
        del model.peft_config


def take_out(model: nn.Module) -> None:
    """Take all adapters out; what is merged stays in the weights."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def refuse_unmergeable(model: nn.Module, names: Sequence[str], *, in_place: bool) -> None:
    """Refuse weights that cannot be changed, before any is.

    Raises:
        ConfigError: quantized weights, those in fp8 unless they are changed `in_place`, or an adapter with a bias for a
            layer without one.
    """
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        kind = type(base.weight)
        is_wide = is_plain(base.weight) and base.weight.dtype.itemsize > 1
        if not in_place and not is_wide and any(adapter in layer.lora_A for adapter in names):
            raise ConfigError(
                f"{name} has a stored weight ({kind.__name__}), which adapters are not added to in a slot: leave them "
                "unfused, or leave out in_place=False"
            )
        if not is_wide and not isinstance(base.weight, NarrowTensor):
            raise ConfigError(
                f"{name} has a quantized weight ({kind.__name__}, {base.weight.dtype}), into which nothing can be merged: "
                "leave the adapters unfused, or fuse before quantizing"
            )
        if base.bias is None and any(layer.lora_bias.get(adapter) for adapter in names):
            raise ConfigError(f"{name} has no bias to merge that of the adapter into: leave the adapters unfused")


def refuse_infinite(model: nn.Module, names: Sequence[str], scale: float) -> None:
    """Refuse to merge what would leave weights that are not finite.

    Raises:
        ConfigError: such a layer.
    """
    for name, layer in lora_layers(model).items():
        for adapter in (each for each in names if each in layer.lora_A):
            change = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
            if not bool(torch.isfinite(change.mul_(scale * layer.scaling[adapter])).all()):
                raise ConfigError(f"{adapter!r} has numbers at {name} that are not finite: it cannot be fused safely")


def merge(model: nn.Module, names: Sequence[str], scale: float) -> None:
    """Add adapters to the weights, each times its own scale and `scale`. Merged layers compute as if they had none."""
    for layer in lora_layers(model).values():
        held = [adapter for adapter in names if adapter in layer.lora_A]
        _add(layer, held, scale)
        layer.merged_adapters.extend(held)
        layer.merged_scale = scale


def unmerge(model: nn.Module) -> None:
    """Subtract what `merge` added; the weights come back to rounding."""
    for layer in lora_layers(model).values():
        if layer.merged_adapters:
            _add(layer, layer.merged_adapters, -layer.merged_scale)
            layer.merged_adapters.clear()


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """A layer with adapters that is out of its model, in which its base has their sum; and the bias that was without."""

    layer: Any
    bias: nn.Parameter | None


def merge_apart(model: nn.Module, names: Sequence[str], scale: float, apart: dict[str, Apart]) -> None:
    """Put base layers in the place of those with adapters, whose weights have the same values as after `merge`.

    The weights themselves stay as they are, within tensors that make the sums where they are used (`MergedTensor`). What
    was taken out is noted in `apart`, before it is.
    """
    for name, layer in lora_layers(model).items():
        held = [adapter for adapter in names if adapter in layer.lora_A]
        if not held:
            continue
        base = layer.get_base_layer()
        apart[name] = Apart(layer, base.bias)
        factors = {adapter: scale * layer.scaling[adapter] for adapter in held}
        pairs = [
            (layer.lora_B[each].weight.detach(), layer.lora_A[each].weight.detach(), factors[each]) for each in held
        ]
        base.weight = nn.Parameter(MergedTensor(base.weight.detach(), pairs), requires_grad=False)
        if biases := [each for each in held if layer.lora_B[each].bias is not None]:
            base.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
            for each in biases:
                _change(base.bias, layer.lora_B[each].bias.float() * factors[each])
        model.set_submodule(name, base)


def unmerge_apart(model: nn.Module, apart: dict[str, Apart]) -> None:
    """Put layers with adapters back, and forget them: their weights are what they were."""
    while apart:
        name = next(iter(apart))
        layer: Any = apart[name].layer
        base = layer.get_base_layer()
        if isinstance(base.weight, MergedTensor):  # else an interrupt came before
            base.weight = nn.Parameter(base.weight.base, requires_grad=False)
        base.bias = apart[name].bias
        model.set_submodule(name, layer)
        del apart[name]


def keep_merged(model: nn.Module, apart: Mapping[str, Apart]) -> None:
    """Let weights be ordinary ones with the values that they have as the sum of others."""
    for name in apart:
        base: Any = model.get_submodule(name)
        base.weight = nn.Parameter(base.weight.dequantize(), requires_grad=False)


def _add(layer: Any, names: Sequence[str], scale: float) -> None:
    base = layer.get_base_layer()
    for adapter in names:
        up, down = layer.lora_B[adapter], layer.lora_A[adapter]
        factor = scale * layer.scaling[adapter]
        if is_plain(base.weight):
            add_product(base.weight, up.weight, down.weight, factor)
        else:
            _change(base.weight, (up.weight.float() @ down.weight.float()).mul_(factor))
        if up.bias is not None:
            _change(base.bias, up.bias.float() * factor)


@torch.no_grad()
def _change(weight: Tensor, change: Tensor) -> None:
    """Add in fp32 with one rounding, also to what is stored in fp8."""
    weight.copy_(change.add_(weight.float()))


def _switch(layer: Any, names: list[str]) -> None:
    layer.set_adapter(names)
    _freeze(layer)


def _freeze(layer: Any) -> None:
    for part in (layer.lora_A, layer.lora_B):
        part.requires_grad_(requires_grad=False)  # PEFT takes an active adapter for one that is trained


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _frozen(tensor: Tensor, *, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, dtype), requires_grad=False)


def _config(peft: ModuleType, weights: Mapping[str, LoraWeights]) -> Any:
    from peft.tuners.lora import Linear  # noqa: PLC0415

    (rank, alpha), _ = Counter((each.rank, each.alpha) for each in weights.values()).most_common(1)[0]
    others = {f"^{re.escape(name)}": each for name, each in weights.items() if (each.rank, each.alpha) != (rank, alpha)}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="|".join(map(re.escape, weights)),  # matched as a whole, where a list would match ends of names
        rank_pattern={pattern: each.rank for pattern, each in others.items()},
        alpha_pattern={pattern: each.alpha for pattern, each in others.items()},
        init_lora_weights=False,
        inference_mode=True,
    )
    # Weights of linear layers are tensors of many kinds here, and none of them is a layer of another class.
    config._register_custom_module({nn.Linear: Linear})  # noqa: SLF001 (PEFT's way to choose the layer)
    return config


def require_peft() -> ModuleType:
    """Import PEFT.

    Raises:
        ConfigError: it is not installed.
    """
    with extra("lora", needed_for="LoRA"):
        import peft  # noqa: PLC0415
    module: ModuleType = peft
    return module
