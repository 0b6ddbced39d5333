"""LoRA adapters of a pipeline's models: load, weigh, switch, swap, fuse and unload, under every way of keeping weights.

The calls are those of diffusers. They open what is offloaded by `Offload.edit`, so adapters travel with the layers that
they stand beside; switching only changes numbers in Python and moves nothing, but for weights that are changed in place.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.absent import Absent
from vramkit.pipelines.loading.arguments import download_arguments, refuse_saving
from vramkit.pipelines.loading.use import refuse_within_call
from vramkit.pipelines.lora.files import LoraFile, LoraSource, read_lora, save_lora
from vramkit.pipelines.lora.keys import AdapterWeights, check_fit, lora_weights
from vramkit.pipelines.lora.model_adapters import ModelAdapters, Weight, check_name, name_to_swap, new_name
from vramkit.pipelines.lora.names import component_of

__all__ = ["LoraAdapters"]

_LAYERS, _METADATA = "_lora_layers", "_lora_adapter_metadata"  # ends of the arguments of save_lora_weights


class LoraAdapters:
    """The part of a pipeline that carries adapters."""

    lora_components: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2", "text_encoder", "text_encoder_2")

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: LoraSource,
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        load_into_transformer_2: bool = False,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **where: Any,
    ) -> None:
        """Add a LoRA; it counts from now on, and others of the same models do not (`set_adapters`).

        Names may be those of diffusers and PEFT, of the model's original code, of ComfyUI, or of kohya's trainers; ranks and
        alphas may differ from layer to layer. Linear layers get layers beside them; whole differences of other weights
        (norms, tables, convolutions) are added to those, and are not scaled by alpha. Keys of several components go to each
        of them. What the models have no place for is left out with one warning. A model that is compiled is compiled anew.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder or Hugging Face repository with one (also one
                of PEFT's save_pretrained), or tensors by name.
            adapter_name: what to call it; by default ``default_0``, ``default_1``, ...
            hotswap: put it in the place of the adapter `adapter_name`, in the same tensors, so that nothing is compiled
                anew; see `enable_lora_hotswap`. Models that the file has nothing for stay as they are.
            load_into_transformer_2: what is for the transformer is for the second one of two.
            weight_name: which file of a folder or repository.
            subfolder: where in it.
            **where: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, as `from_pretrained` takes them.

        Raises:
            ConfigError: a name that is taken or has a dot, or with `hotswap` one that is not loaded or has no room; a path
                that does not exist, several files, a quantized weight that would be changed in place, or no PEFT.
            CheckpointError: nothing that fits, a kind that is not plain LoRA, or a damaged file. Nothing is changed then.
            ConflictError: adapters are fused.
        """
        refuse_within_call(self, "load_lora_weights")
        models = self._lora_models()
        for model in models.values():
            model.refuse_fused()
        check_name(adapter_name)
        main = "transformer_2" if load_into_transformer_2 else "transformer"
        found = self._found(
            pretrained_model_name_or_path_or_dict, main, weight_name=weight_name, subfolder=subfolder, **where
        )
        targets = {component: models[component] for component in found}
        name = name_to_swap(targets, adapter_name) if hotswap else new_name(targets, adapter_name)
        for component, model in targets.items():
            if hotswap:
                model.swap(name, found[component])
            else:
                model.add(name, found[component])

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Give adapters that are loaded from now on room for others, which ``load_lora_weights(hotswap=True)`` puts there.

        The first adapter has to have all the layers that others will have, and is loaded before models are compiled.

        Args:
            target_rank: the highest rank of all of them.
            check_compiled: accepted as in diffusers; compiling before the first adapter is loaded is not an error here, it
                costs compiling anew.

        Raises:
            ConfigError: a rank that is no positive number.
        """
        refuse_within_call(self, "enable_lora_hotswap")
        if not isinstance(target_rank, int) or target_rank < 1:
            raise ConfigError(
                f"target_rank={target_rank}; expected the highest rank of the adapters to come, 1 or more"
            )
        for model in self._lora_models().values():
            model.allow_swaps(target_rank)

    def check_lora_weights(self, pretrained_model_name_or_path_or_dict: LoraSource, **where: Any) -> None:
        """Refuse what `load_lora_weights` would refuse of a file, and change nothing; models may be on the meta device.

        Raises:
            ConfigError, CheckpointError: as there.
        """
        self._found(pretrained_model_name_or_path_or_dict, "transformer", **where)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, Any] | Sequence[float | Mapping[str, Any] | None] | None = None,
    ) -> None:
        """Choose the adapters that count, and how much: one weight for all, or one each (default 1).

        A weight is a number, a dict of numbers by parts of the names of layers (``{"blocks.0": 0.5, "attn2": 0.8}``: the
        first that a layer's name has in it counts, other layers have 1), or a dict of either by component.
        Nothing is read or moved, offloaded or not, but norms and tables that an adapter changes in place. Compiled blocks
        are compiled anew for new weights.

        Raises:
            ConfigError: an adapter that is not loaded, another number of weights than of names, a weight that is no finite
                number, or one for layers that an adapter does not have.
            ConflictError: adapters are fused.
        """
        refuse_within_call(self, "set_adapters")
        models = self._lora_models()
        names = _each_once(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        self._check_loaded(names)
        if len(weights) != len(names):
            raise ConfigError(
                f"{len(weights)} adapter weights for {len(names)} adapters; give one for each, or one number"
            )
        for model in models.values():
            model.refuse_fused()
        chosen = {
            component: {
                name: self._weight_in(component, weight)
                for name, weight in zip(names, weights, strict=True)
                if name in model.names
            }
            for component, model in models.items()
        }
        for component, held in chosen.items():
            for name, each in held.items():
                if isinstance(each, Mapping):
                    models[component].refuse_unknown_parts(name, each)
        for component, held in chosen.items():
            models[component].activate(held)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        return list(
            dict.fromkeys(name for model in self._lora_models(required=False).values() for name in model.active)
        )

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters by component."""
        return {component: model.names for component, model in self._lora_models(required=False).items() if model.names}

    @property
    def fused_loras(self) -> list[str]:
        """Names of the adapters that are fused."""
        return list(dict.fromkeys(name for model in self._lora_models(required=False).values() for name in model.fused))

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused."""
        return len(self.fused_loras)

    def disable_lora(self) -> None:
        """Compute as if there were no adapters, until `enable_lora` or another one is loaded.

        Raises:
            ConflictError: adapters are fused.
        """
        refuse_within_call(self, "disable_lora")
        self._enable(enabled=False)

    def enable_lora(self) -> None:
        """Compute with the adapters that count, as before `disable_lora`.

        Raises:
            ConflictError: adapters are fused.
        """
        refuse_within_call(self, "enable_lora")
        self._enable(enabled=True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unload some adapters; the others go on as they were.

        Where none that counted is left, the oldest of the others counts from now on, as in diffusers.

        Raises:
            ConfigError: an adapter that is not loaded.
            ConflictError: adapters are fused.
        """
        refuse_within_call(self, "delete_adapters")
        models = self._lora_models()
        names = list(dict.fromkeys(_names(adapter_names)))
        self._check_loaded(names)
        for model in models.values():
            model.refuse_fused()
        for model in models.values():
            for name in names:
                if name in model.names:
                    model.delete(name)

    def unload_lora_weights(self) -> None:
        """Unload all adapters. What was fused stays in the weights, as in diffusers; `unfuse_lora` first to be rid of it."""
        refuse_within_call(self, "unload_lora_weights")
        for model in self._lora_models(required=False).values():
            if model.names:
                model.take_out()

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        in_place: bool = True,
    ) -> None:
        """Add adapters to the weights, so that they cost nothing more, each times its weight and `lora_scale`.

        Weights of mapped files become private memory. Those stored in fp8 are rounded anew. With ``in_place=False`` neither
        happens to models that are offloaded: the same sums are made in each slot when a layer has arrived there.

        Args:
            components: of which models; by default of all that have adapters.
            lora_scale: for all of them.
            safe_fusing: refuse adapters that have numbers that are not finite.
            adapter_names: which; by default those that count.
            in_place: False leaves the weights at rest as they are; `unfuse_lora` then gives back the same bytes. What is
                not offloaded makes the sum at each use, which costs as much again.

        Raises:
            ConfigError: no adapter, one that is not loaded, a component without models, or a layer with a quantized weight
                (without `in_place` also one in fp8); nothing is changed then.
            ConflictError: adapters are fused already.
        """
        refuse_within_call(self, "fuse_lora")
        models = self._chosen(components)
        lora_scale = _number(lora_scale)
        if adapter_names is not None:
            adapter_names = _each_once(adapter_names)
        self._check_loaded(adapter_names or ())
        chosen = {
            component: [
                name for name in (model.active if adapter_names is None else adapter_names) if name in model.names
            ]
            for component, model in models.items()
        }
        if not any(chosen.values()):
            raise ConfigError("no adapter to fuse: load_lora_weights() first")
        for component, names in chosen.items():
            models[component].refuse_fused()
            models[component].refuse_unmergeable(names, lora_scale, finite=safe_fusing, in_place=in_place)
        for component, names in chosen.items():
            if names:
                models[component].merge(names, lora_scale, in_place=in_place)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Take fused adapters out of the weights, which come back to rounding; they count again as before `fuse_lora`.

        Raises:
            ConfigError: a component without models.
        """
        refuse_within_call(self, "unfuse_lora")
        for model in self._chosen(components).values():
            model.unmerge()

    def lora_layers(self, adapter_name: str) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a loaded adapter as arguments of `save_lora_weights`, alphas worked into them.

        Raises:
            ConfigError: an adapter that is not loaded.
        """
        self._check_loaded([adapter_name])
        return {
            component + _LAYERS: model.state_dict(adapter_name)
            for component, model in self._lora_models().items()
            if adapter_name in model.names
        }

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        **layers_and_metadata: Any,
    ) -> Path | None:
        """Write a LoRA that was trained, or a loaded one: ``save_lora_weights(folder, **pipeline.lora_layers("style"))``.

        Args:
            save_directory: the folder, made where it is not there.
            transformer_lora_layers: tensors by their names in the transformer, as PEFT's get_peft_model_state_dict has them.
            is_main_process: False does nothing.
            weight_name: of the file; by default the one that diffusers looks for.
            **layers_and_metadata: ``<component>_lora_layers`` and ``<component>_lora_adapter_metadata`` of components: their
                tensors, and the entries of their PEFT configs (without those, alpha is the rank).

        Returns:
            The file.

        Raises:
            ConfigError: no tensors, or an argument that is none of these.
        """
        given = {"transformer" + _LAYERS: transformer_lora_layers} | layers_and_metadata
        layers: dict[str, Mapping[str, Tensor]] = {}
        metadata: dict[str, Mapping[str, Any]] = {}
        refuse_saving({name: given.pop(name) for name in ("save_function", "safe_serialization") if name in given})
        for key, value in given.items():
            component = key.removesuffix(_LAYERS).removesuffix(_METADATA)
            if component == key or component not in cls.lora_components:
                raise ConfigError(f"unknown argument {key}; expected <component>{_LAYERS} or <component>{_METADATA}")
            if key.endswith(_LAYERS) and value is not None:
                layers[component] = value.state_dict() if isinstance(value, nn.Module) else value
            elif value:
                metadata[component] = value
        if not any(layers.values()):
            raise ConfigError(
                "no layers to save: give transformer_lora_layers=, or **pipeline.lora_layers(adapter_name)"
            )
        return save_lora(save_directory, layers, metadata, weight_name=weight_name) if is_main_process else None

    set_lora_device = Absent(
        "adapters are where the layers are that they belong to; delete_adapters() frees their memory"
    )
    lora_state_dict = Absent(
        "load_lora_weights() takes all kinds of files; vramkit.pipelines.lora.files.read_lora reads one"
    )
    load_lora_into_transformer = Absent("load_lora_weights() takes state dicts too")

    def _lora_models(self, *, required: bool = True) -> dict[str, ModelAdapters]:
        """The models that may have adapters, by component."""
        found = {name: getattr(self, name, None) for name in self.lora_components}
        models = {name: ModelAdapters(each) for name, each in found.items() if isinstance(each, nn.Module)}
        if required and not models.keys() & {"transformer", "transformer_2"}:
            raise ConfigError("the pipeline has no transformer, which adapters belong to")
        return models

    def _chosen(self, components: Sequence[str] | None) -> dict[str, ModelAdapters]:
        models = self._lora_models()
        if components is None:
            return models
        if isinstance(components, str) or not isinstance(components, Sequence) or not components:
            raise ConfigError(f"components={components!r}; expected a list of some of {', '.join(models)}")
        if unknown := [name for name in components if name not in models]:
            raise ConfigError(f"unknown component {', '.join(unknown)}; expected some of {', '.join(models)}")
        return {name: models[name] for name in components}

    def _found(self, source: LoraSource, main: str, **where: Any) -> dict[str, AdapterWeights]:
        """Read what a file has for the models of the pipeline, by component, and refuse what they cannot take."""
        known = ("weight_name", "subfolder", "revision", "cache_dir")
        file = read_lora(source, **download_arguments("load_lora_weights", where, known))
        found = {name: each for name, each in self._read(file, main).items() if each.layers or each.changes}
        for component, model in self._lora_models().items():
            if component in found:
                model.check(found[component])
        return found

    def _read(self, file: LoraFile, main: str) -> dict[str, AdapterWeights]:
        """Read a file for the models that it is for, by component; `main` takes what is for the transformer."""
        models = self._lora_models()
        parts: dict[str, dict[str, str]] = defaultdict(dict)  # component by its names -> name in it -> name in the file
        for key in file.state:
            named, inner = component_of(key)
            if inner in parts[named]:
                raise CheckpointError(f"{file.source} has one layer twice, as {parts[named][inner]} and as {key}")
            parts[named][inner] = key
        if main in parts and main != "transformer" and "transformer" in parts:
            raise CheckpointError(
                f"{file.source} has layers of both transformer and {main}, so both cannot be for {main}: leave out "
                f"load_into_{main}, and each gets its own"
            )
        read: dict[str, AdapterWeights] = {}
        for named, keys in parts.items():
            component = main if named == "transformer" else named
            if component not in models:
                left = dict.fromkeys(keys.values(), f"is for {component}, which the pipeline does not have")
                read[component] = AdapterWeights(left_out=left)
                continue
            model = models[component]
            found = lora_weights(
                model.model,
                {inner: file.state[key] for inner, key in keys.items()},
                file.config(named),
                source=file.source,
                bases=model.differences.bases,
            )
            left = {keys[inner]: reason for inner, reason in found.left_out.items()}
            read[component] = AdapterWeights(layers=found.layers, changes=found.changes, left_out=left)
        names = ", ".join(type(models[component].model).__name__ for component in read if component in models)
        check_fit(read, file.state, source=file.source, model=names or type(self).__name__)
        return read

    def _weight_in(self, component: str, weight: float | Mapping[str, Any] | None) -> Weight:
        """The weight of an adapter in one component: a dict is by component, or by parts of names for all of them."""
        if isinstance(weight, Mapping):
            known = [key for key in weight if key in self.lora_components]
            if known and len(known) < len(weight):
                raise ConfigError(f"the weights {dict(weight)!r} mix components and parts of layers; expected one kind")
            if known:
                weight = weight.get(component)
        if isinstance(weight, Mapping):
            return {part: _number(each) for part, each in weight.items()}
        return 1.0 if weight is None else _number(weight)

    def _enable(self, *, enabled: bool) -> None:
        models = self._lora_models()
        for model in models.values():
            model.refuse_fused()
        for model in models.values():
            model.enable(enabled=enabled)

    def _check_loaded(self, names: Sequence[str]) -> None:
        loaded = list(dict.fromkeys(name for held in self.get_list_adapters().values() for name in held))
        unknown = [name for name in names if name not in loaded]
        if unknown:
            raise ConfigError(f"no adapter {', '.join(map(repr, unknown))}; loaded: {', '.join(loaded) or 'none'}")


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence | set | frozenset) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"adapter names are {given!r}; expected a name, or a list of names")
    return list(names)


def _each_once(given: Any) -> list[str]:
    names = _names(given)
    if len(set(names)) < len(names):
        raise ConfigError(f"adapter names are {given!r}; expected each of them once")
    return names


def _number(weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"the adapter weight is {weight!r}; expected a finite number")
    return number
