"""LoRA adapters of a pipeline's transformer: load, weigh, switch, fuse and unload, under every way of keeping weights.

The calls are those of diffusers. They open what is offloaded by `Offload.edit`, so adapters travel with the layers that
they stand beside; switching only changes numbers in Python and moves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload.handle import editable
from vramkit.pipelines import lora_layers
from vramkit.pipelines.lora_files import LoraSource, read_lora
from vramkit.pipelines.lora_keys import lora_weights

__all__ = ["LoraAdapters"]


class LoraAdapters:
    """The part of a pipeline that carries adapters."""

    lora_component: ClassVar[str] = "transformer"

    def load_lora_weights(
        self,
        path_or_repo_or_state_dict: LoraSource,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Add a LoRA to the transformer; it counts from now on, and those that were loaded before do not (`set_adapters`).

        Names of layers may be those of diffusers and PEFT, of the model's original code, or of kohya's trainers; ranks and
        alphas may differ from layer to layer. Weights of linear layers only. A model that is compiled is compiled anew.

        Args:
            path_or_repo_or_state_dict: a safetensors file, a folder or Hugging Face repository with one, or tensors by name.
            adapter_name: what to call it; by default ``default_0``, ``default_1``, ...
            weight_name: which file of a folder or repository.
            subfolder: where in it.
            revision: branch, tag or commit of the repository.
            cache_dir: where downloads are kept.

        Raises:
            ConfigError: a name that is taken or has a dot, a path that does not exist, several files, or no PEFT.
            CheckpointError: names or shapes that do not fit the model, or a damaged file. Nothing is changed then.
            ConflictError: adapters are fused.
        """
        model = self._lora_model()
        _refuse_fused(model)
        taken = lora_layers.adapters(model)
        name = adapter_name if adapter_name is not None else _free_name(taken)
        if name in taken or not name or "." in name:
            raise ConfigError(
                f"adapter_name={name!r} is {'taken' if name in taken else 'no name without dots'}; loaded: "
                f"{', '.join(taken) or 'none'}. Choose another one, or delete_adapters({name!r}) first"
            )
        state, metadata, source = read_lora(
            path_or_repo_or_state_dict,
            component=self.lora_component,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
        )
        weights = lora_weights(model, state, metadata, source=source)
        lora_layers.require_peft()
        dtype = model.dtype
        with editable(model):
            lora_layers.insert(model, name, weights, dtype)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Choose the adapters that count, and how much: one weight for all, or one each (default 1).

        Nothing is read or moved, offloaded or not. Compiled blocks are compiled anew for new weights.

        Raises:
            ConfigError: an adapter that is not loaded, or another number of weights than of names.
            ConflictError: adapters are fused.
        """
        model = self._lora_model()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        self._check_loaded(model, names)
        if len(weights) != len(names):
            raise ConfigError(
                f"{len(weights)} adapter weights for {len(names)} adapters; give one for each, or one number"
            )
        _refuse_fused(model)
        scales = {name: 1.0 if weight is None else float(weight) for name, weight in zip(names, weights, strict=True)}
        lora_layers.activate(model, scales)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        return lora_layers.active(self._lora_model())

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters by component."""
        names = lora_layers.adapters(self._lora_model())
        return {self.lora_component: names} if names else {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unload some adapters; the others go on as they were.

        Raises:
            ConfigError: an adapter that is not loaded.
            ConflictError: adapters are fused.
        """
        model = self._lora_model()
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        self._check_loaded(model, names)
        _refuse_fused(model)
        with editable(model):
            for name in names:
                lora_layers.delete(model, name)

    def unload_lora_weights(self) -> None:
        """Unload all adapters. What was fused stays in the weights, as in diffusers; `unfuse_lora` first to be rid of it."""
        model = self._lora_model()
        if lora_layers.adapters(model):
            with editable(model):
                lora_layers.take_out(model)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters to the weights, so that they cost nothing more, each times its weight and `lora_scale`.

        Weights of mapped files become private memory. Those stored in fp8 are rounded anew.

        Args:
            lora_scale: for all of them.
            adapter_names: which; by default those that count.

        Raises:
            ConfigError: no adapter, one that is not loaded, or a layer with a quantized weight; nothing is changed then.
            ConflictError: adapters are fused already.
        """
        model = self._lora_model()
        names = lora_layers.active(model) if adapter_names is None else list(adapter_names)
        self._check_loaded(model, names)
        if not names:
            raise ConfigError("no adapter to fuse: load_lora_weights() first")
        _refuse_fused(model)
        lora_layers.refuse_unmergeable(model, names)
        with editable(model):
            lora_layers.merge(model, names, lora_scale)

    def unfuse_lora(self) -> None:
        """Take fused adapters out of the weights, which come back to rounding; they count again as before `fuse_lora`."""
        model = self._lora_model()
        if lora_layers.fused(model):
            with editable(model):
                lora_layers.unmerge(model)

    def _lora_model(self) -> Any:
        component = getattr(self, self.lora_component, None)
        if not isinstance(component, nn.Module):
            raise ConfigError(f"the pipeline has no {self.lora_component}, which adapters belong to")
        return getattr(component, "_orig_mod", component)  # what torch.compile wraps

    def _check_loaded(self, model: nn.Module, names: Sequence[str]) -> None:
        loaded = lora_layers.adapters(model)
        unknown = [name for name in names if name not in loaded]
        if unknown:
            raise ConfigError(f"no adapter {', '.join(map(repr, unknown))}; loaded: {', '.join(loaded) or 'none'}")


def _free_name(taken: Sequence[str]) -> str:
    number = len(taken)
    while f"default_{number}" in taken:
        number += 1
    return f"default_{number}"


def _refuse_fused(model: nn.Module) -> None:
    names = lora_layers.fused(model)
    if names:
        raise ConflictError(
            f"{', '.join(names)} is fused into the weights, beside which adapters do not count: unfuse_lora() first, or "
            "unload_lora_weights() to keep what is fused"
        )
