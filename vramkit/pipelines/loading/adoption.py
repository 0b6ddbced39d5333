"""Ready models of diffusers in our pipelines: each becomes ours, of the same config and around the same weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload import offload_of
from vramkit.offload.inventory import refuse_foreign_hooks
from vramkit.pipelines.loading.auto_model import AutoModel
from vramkit.pipelines.loading.folders import listed
from vramkit.pipelines.loading.modeling import Model
from vramkit.pipelines.loading.registry import MODELS
from vramkit.tensors import is_plain

__all__ = ["adopted"]

_FAMILIES = "vramkit.pipelines."
_SWITCHES = ("use_slicing", "use_framewise_encoding", "use_framewise_decoding")


def adopted(component: Any, name: str, pipeline: type) -> Any:
    """Return a component as `pipeline` can use it: models of diffusers become ours, anything else stays what it is.

    Weights are shared, also those that diffusers keeps in the blocks of GGUF, and stay where they are. Tiling and slicing of
    an autoencoder that are switched on are so in ours.

    Args:
        component: what is given for `name`, a transformer or an autoencoder.
        name: of the component, for messages.
        pipeline: the class that it is for.

    Raises:
        ConfigError: a model of diffusers that `pipeline` has no counterpart of, or that is compiled or has adapters.
        ConflictError: a model that is offloaded, or cast or moved by hooks.
    """
    compiled = getattr(component, "_orig_mod", None)
    kind = type(component if compiled is None else compiled)
    is_foreign = kind.__module__.startswith("diffusers.")
    if is_foreign and compiled is not None:
        raise ConfigError(
            f"{name} is a compiled {kind.__name__} of diffusers; give the model itself, and compile ours after"
        )
    if is_foreign and kind.__name__ not in MODELS:
        raise ConfigError(
            f"{name} is a {kind.__name__} of diffusers, which {pipeline.__name__} cannot use; expected one of "
            f"{', '.join(sorted(MODELS))}, from diffusers or vramkit"
        )
    model_class = AutoModel.class_named(kind.__name__, source=name) if is_foreign else kind
    _check_family(model_class, name, pipeline)
    return _made(model_class, component, name) if is_foreign else component


def _check_family(model_class: type, name: str, pipeline: type) -> None:
    families = [each.__module__.removeprefix(_FAMILIES).partition(".")[0] for each in (model_class, pipeline)]
    both = all(each.__module__.startswith(_FAMILIES) for each in (model_class, pipeline))
    if both and issubclass(model_class, Model) and families[0] != families[1]:
        raise ConfigError(
            f"{name} is a {model_class.__name__}, which {pipeline.__name__} cannot use: it is of another family"
        )


def _made(model_class: type[Model], component: nn.Module, name: str) -> Model:
    for path, part in component.named_modules():
        refuse_foreign_hooks(path or name, part)
        if offload_of(part) is not None:
            raise ConflictError(f"{name} is offloaded: remove() that first, and offload pipeline.{name} afterwards")
        if hasattr(part, "base_layer"):
            raise ConfigError(f"{name} carries adapters: fuse or unload them first, or load them into the pipeline")
    config: Any = component.config
    model = model_class.described_by(dict(config), source=f"{name} of diffusers")
    theirs = dict(component.named_parameters(remove_duplicate=False)) | dict(component.named_buffers())
    names = list(model.state_dict())
    given = list(component.state_dict())
    if odd := sorted(set(names).symmetric_difference(given)):
        raise ConfigError(
            f"{name} of diffusers and our {model_class.__name__} differ in {listed(odd)}; load it by vramkit"
        )
    for path in names:
        owner, key = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        tensor = _shared(theirs[path], component.get_submodule(path.rpartition(".")[0]))
        if tensor.shape != getattr(owner, key).shape:
            raise ConfigError(
                f"{name}: {path} has shape {list(tensor.shape)}, expected {list(getattr(owner, key).shape)}"
            )
        setattr(owner, key, nn.Parameter(tensor, requires_grad=False) if key in owner._parameters else tensor)  # noqa: SLF001
    device = next(iter(theirs.values())).device
    model.to(device=device)  # the buffers that no file has
    if any(not is_plain(parameter) for parameter in model.parameters()):
        from vramkit.quant.files import note_stored  # noqa: PLC0415 - most models are not quantized

        note_stored(model)
    _switch_on(model, component)
    return model.train(component.training)


def _shared(tensor: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Return a weight of diffusers as an ordinary tensor over the same memory, or as one of ours of the same blocks."""
    kind: Any = getattr(tensor, "quant_type", None)
    if kind is None or type(tensor).__name__ != "GGUFParameter":
        return tensor.detach()
    from vramkit.quant.gguf import FORMATS, GgufTensor, widened  # noqa: PLC0415

    stored: Any = tensor
    plain = stored.as_tensor().detach()
    dtype = getattr(layer, "compute_dtype", None) or torch.float32
    if kind.name == "BF16":
        wide: torch.Tensor = plain.view(torch.bfloat16)
        return wide
    if kind.name not in FORMATS:
        raise ConfigError(f"a weight is stored as {kind.name}; known formats of GGUF are {', '.join(FORMATS)}")
    shape = tuple(stored.quant_shape)
    if len(shape) != 2:
        return widened(plain.reshape(-1, plain.shape[-1]), kind.name, dtype).view(shape)
    return GgufTensor({"blocks": plain}, shape, dtype, (kind.name,))


def _switch_on(model: Model, component: nn.Module) -> None:
    """Give an autoencoder what was switched on in its counterpart."""
    for switch in _SWITCHES:
        if hasattr(component, switch) and hasattr(model, switch):
            setattr(model, switch, getattr(component, switch))
    enable: Any = getattr(model, "enable_tiling", None)
    if enable is not None and getattr(component, "use_tiling", False):
        sizes = {
            key: getattr(component, key) for key in inspect.signature(enable).parameters if hasattr(component, key)
        }
        enable(**sizes)
