"""The modules of a pipeline: by which methods they run, and for which part of a call."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload.inventory import refuse_scripted

__all__ = [
    "PHASES",
    "Component",
    "Phase",
    "components_of",
    "entry_points_of",
    "phase_of",
    "refuse_shared_modules",
    "refuse_without_twins",
    "tied_components",
]

Phase = Literal["encode", "denoise", "forward", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "denoise", "forward", "decode")

_ENTRY_POINTS = (
    "forward",
    "encode",
    "decode",
    "generate",
    "encode_image",
    "get_text_features",
    "get_image_features",
    "get_prompt_embeds",
)
# By how names of components begin; whatever else there is encodes.
_DENOISERS = ("transformer", "unet", "prior", "controlnet", "dit", "denoiser", "adapter", "motion_adapter")
_DECODERS = ("vae", "vqvae", "movq", "vqgan", "audio_vae", "vocoder", "decoder", "latent_upsampler")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Component:
    """One module of a pipeline, or a module alone."""

    name: str
    module: nn.Module
    entry_points: tuple[str, ...]
    phase: Phase
    """The part of a call that it works in; of a module alone, which is all that a call runs, ``"forward"``."""


def components_of(target: Any) -> dict[str, Component]:
    """Return the modules of a pipeline (anything with ``.components``), of a mapping, or a module alone, by name.

    A module that stands under two names is listed under the first.

    Raises:
        ConfigError: there is no module.
    """
    if isinstance(target, nn.Module) and not isinstance(getattr(target, "components", None), Mapping):
        name = type(target).__name__
        return {name: Component(name, target, entry_points_of(target), "forward")}
    held = getattr(target, "components", target)
    if not isinstance(held, Mapping):
        hint = "; load it first: plan() alone takes names and folders" if isinstance(target, str | os.PathLike) else ""
        raise ConfigError(
            f"a {type(target).__name__} was given; expected a pipeline (with .components), a mapping of names to modules, "
            f"or a torch.nn.Module{hint}"
        )
    found: dict[str, Component] = {}
    seen: set[int] = set()
    for name, module in held.items():
        if isinstance(module, nn.Module) and id(module) not in seen:
            seen.add(id(module))
            found[str(name)] = Component(str(name), module, entry_points_of(module), phase_of(str(name)))
    if not found:
        raise ConfigError(
            f"the {type(target).__name__} that was given has no torch.nn.Module in it; load its models first"
        )
    return found


def phase_of(name: str) -> Phase:
    """Tell by the name of a component which part of a call it works in."""
    if name.startswith(_DENOISERS):
        return "denoise"
    return "decode" if name.startswith(_DECODERS) else "encode"


def tied_components(components: Mapping[str, Component]) -> dict[str, str]:
    """Return, for each component that shares a weight with an earlier one, the earlier one's name."""
    owner: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, component in components.items():
        for parameter in component.module.parameters():
            first = owner.setdefault(id(parameter), name)
            if first != name:
                tied.setdefault(name, first)
    return tied


def refuse_shared_modules(components: Mapping[str, Component]) -> None:
    """Raise ConflictError where a part of one component is a part of another one: each is offloaded by itself."""
    owner: dict[int, tuple[str, str]] = {}
    for name, component in components.items():
        for part, module in component.module.named_modules():
            first, first_part = owner.setdefault(id(module), (name, part))
            if first != name and any(True for _ in module.parameters()):
                raise ConflictError(
                    f"{_joined(name, part)} is {_joined(first, first_part)}, one module in two components, and each "
                    f"component is offloaded by itself; give only one of {first} and {name}, or a module that holds both"
                )


def refuse_without_twins(components: Mapping[str, Component]) -> None:
    """Raise ConfigError where a component is compiled by TorchScript, or has weights that have no shape yet."""
    for name, component in components.items():
        refuse_scripted(name, component.module)
        for part, module in component.module.named_modules():
            if any(is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):  # noqa: SLF001
                raise ConfigError(
                    f"{_joined(name, part)} is a {type(module).__name__} whose weights have no shape yet; call the module "
                    "once, with what it will be given, before it is planned for"
                )


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def entry_points_of(module: nn.Module) -> tuple[str, ...]:
    """Return the methods by which `module` may be run."""

    def is_method(name: str) -> bool:
        member = getattr(module, name, None)
        return callable(member) and not isinstance(member, nn.Module)

    return tuple(name for name in _ENTRY_POINTS if is_method(name))
