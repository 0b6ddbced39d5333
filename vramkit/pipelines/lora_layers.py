"""Linear layers with adapters beside them, as PEFT makes them: put in, switched, merged and taken out.

Such a layer keeps the original one as ``base_layer`` and adds ``lora_B(lora_A(x)) * scaling`` for every active adapter.
Weights of adapters have the dtype that the base computes in, whatever it is stored in.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.casting.narrow import NarrowTensor
from vramkit.errors import ConfigError
from vramkit.pipelines.lora_keys import LoraWeights
from vramkit.tensors import is_plain

__all__ = [
    "activate",
    "active",
    "adapters",
    "delete",
    "fused",
    "insert",
    "lora_layers",
    "merge",
    "refuse_unmergeable",
    "require_peft",
    "take_out",
    "unmerge",
]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry adapters, by the names of the layers that they stand for."""
    return {name: module for name, module in model.named_modules() if _is_lora(module)}


def adapters(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order of loading."""
    return list(dict.fromkeys(getattr(model, "peft_config", {})))


def active(model: nn.Module) -> list[str]:
    """Names of the adapters that count."""
    layer = next(iter(lora_layers(model).values()), None)
    return [] if layer is None else list(layer.active_adapters)


def fused(model: nn.Module) -> list[str]:
    """Names of the adapters that are merged into the weights."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.merged_adapters))


def insert(model: nn.Module, adapter: str, weights: Mapping[str, LoraWeights], dtype: torch.dtype) -> None:
    """Put an adapter beside the linear layers that `weights` names, active at scale 1 with all others inactive.

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
    activate(model, {adapter: 1.0})


def activate(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Let these adapters count, each times its scale, and no others. Weights stay where they are."""
    for layer in lora_layers(model).values():
        _switch(layer, list(scales))
        for adapter, scale in scales.items():
            layer.set_scale(adapter, scale)


def delete(model: nn.Module, adapter: str) -> None:
    """Take one adapter out, and the layers that carried no other."""
    for name, layer in lora_layers(model).items():
        _switch(layer, [other for other in layer.active_adapters if other != adapter])
        layer.delete_adapter(adapter)
        if not layer.lora_A:
            model.set_submodule(name, layer.get_base_layer())
    peft_config: Any = model.peft_config
    del peft_config[adapter]
    if not peft_config:
        del model.peft_config


def take_out(model: nn.Module) -> None:
    """Take all adapters out; what is merged stays in the weights."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def refuse_unmergeable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse weights that cannot be changed, before any is.

    Raises:
        ConfigError: quantized weights, or an adapter with a bias for a layer without one.
    """
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        kind = type(base.weight)
        if not (is_plain(base.weight) and base.weight.dtype.itemsize > 1) and not isinstance(base.weight, NarrowTensor):
            raise ConfigError(
                f"{name} has a quantized weight ({kind.__name__}, {base.weight.dtype}), into which nothing can be merged: "
                "leave the adapters unfused, or fuse before quantizing"
            )
        if base.bias is None and any(layer.lora_bias.get(adapter) for adapter in names):
            raise ConfigError(f"{name} has no bias to merge that of the adapter into: leave the adapters unfused")


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


def _add(layer: Any, names: Sequence[str], scale: float) -> None:
    base = layer.get_base_layer()
    for adapter in names:
        up, down = layer.lora_B[adapter], layer.lora_A[adapter]
        factor = scale * layer.scaling[adapter]
        _change(base.weight, (up.weight.float() @ down.weight.float()).mul_(factor))
        if up.bias is not None:
            _change(base.bias, up.bias.float() * factor)


@torch.no_grad()
def _change(weight: Tensor, change: Tensor) -> None:
    """Add in fp32 with one rounding, also to what is stored in fp8."""
    weight.copy_(change.add_(weight.float()))


def _switch(layer: Any, names: list[str]) -> None:
    layer.set_adapter(names)
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
    try:
        import peft  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            'LoRA needs PEFT, which is not installed: pip install "vramkit[lora]" (or pip install peft)'
        ) from error
    module: ModuleType = peft
    return module
