"""Where the models of a pipeline rest and compute: the calls that diffusers' pipelines have for it."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload import ModelOffload, Offload, apply_group_offloading, apply_model_offload, offload_of
from vramkit.offload.config import usable_device
from vramkit.pipelines.loading.absent import Absent

__all__ = ["MemoryCalls"]

Self = TypeVar("Self", bound="MemoryCalls")
_ATTENTION = "attention is computed without a matrix of weights on every backend; leave it out"


class MemoryCalls(ABC):
    """The part of a pipeline that places its models."""

    hf_device_map: None = None  # as in diffusers: no model is spread over devices
    _model_offload: ModelOffload | None

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """The components by name."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that computes."""

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move, cast or both: ``to(device)``, ``to(dtype)``, ``to(device, dtype)``, or by those names.

        Offloaded models keep their place, with a warning where they are asked to another device than the CPU: their weights
        travel by themselves.

        Raises:
            ConfigError: no device or dtype, or a device that is not there; nothing is changed then.
            ConflictError: a cast of a model that is offloaded; nothing is changed then.
        """
        device, dtype = _destination(args, kwargs)
        modules = self._modules()
        offloaded = [name for name, module in modules.items() if offload_of(module) is not None]
        if uncast := [name for name in offloaded if dtype is not None and not _has_dtype(modules[name], dtype)]:
            raise ConflictError(
                f"{', '.join(uncast)}: offloaded, so the weights cannot be cast. Load with dtype={dtype}, cast before "
                f"offloading, or inside `with offload_of(pipeline.{uncast[0]}).edit():`"
            )
        if offloaded and device is not None and device.type != "cpu":
            warnings.warn(
                f"{', '.join(offloaded)}: offloaded, so the weights stay where they rest and travel to the device that "
                "computes by themselves; moving does nothing. remove_all_hooks() before to() brings them there for good",
                RuntimeWarning,
                stacklevel=2,
            )
        moved = [module for name, module in modules.items() if name not in offloaded]
        if moved and device is not None and device.type in {"cuda", "xpu"}:
            usable_device(device, "device")
        for module in moved:
            module.to(device=device, dtype=dtype)
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int | torch.device | str | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep every model in RAM and bring it to the device, whole, while it works; the previous one leaves first.

        Args:
            gpu_id: the number of a GPU, or a device.
            device: where the models compute; by default the GPU, which has to be there.

        Raises:
            ConfigError: no device is named and there is no GPU, or two are.
        """
        target = _one_device(gpu_id, device)
        if target is None and not torch.cuda.is_available():
            raise ConfigError('no GPU was found: name the device, for example enable_model_cpu_offload("cpu")')
        if self._model_offload is not None:
            self._model_offload.remove()
        self._model_offload = apply_model_offload(self, target or "cuda")

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        *args: Any,
        exclude_modules: str | Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Offload]:
        """Stream the weights of every model through a small window on the device.

        Args:
            onload_device: where the models compute.
            *args: by position, as in `vramkit.offload.apply_group_offloading`.
            exclude_modules: names of components that are put on the device whole.
            **options: of `vramkit.offload.apply_group_offloading`, for every model.

        Returns:
            The handles by component name.

        Raises:
            ConfigError, ConflictError, UnsupportedTensorError, StoreError: as `apply_group_offloading`; what this call
                offloaded before is given back then.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        if unknown := sorted(set(excluded) - set(self.components)):
            warnings.warn(
                f"exclude_modules names {', '.join(unknown)}; the components are {', '.join(self.components)}",
                stacklevel=2,
            )
        handles: dict[str, Offload] = {}
        with ExitStack() as undo:
            for name, module in self._modules().items():
                if name not in excluded:
                    before = offload_of(module)
                    handles[name] = apply_group_offloading(module, onload_device, *args, **options)
                    if before is None:
                        undo.callback(handles[name].remove)
            undo.pop_all()
        for name, module in self._modules().items():
            if name in excluded:
                module.to(onload_device)
        return handles

    enable_sequential_cpu_offload = Absent(
        'enable_group_offload("cuda", offload_type="leaf_level") keeps as little on the device, and waits for no layer'
    )

    def remove_all_hooks(self) -> None:
        """End all offloading of whole models: their weights are in host memory, as before."""
        if self._model_offload is not None:
            self._model_offload.remove()
            self._model_offload = None
        for module in self._modules().values():
            if (offload := offload_of(module)) is not None:
                offload.remove()

    def reset_device_map(self) -> None:
        """Bring the models to host memory; there is no device map here that could be reset."""
        self.to("cpu")

    def maybe_free(self) -> None:
        """Take the model that `enable_model_cpu_offload` brought to the device off it again; calls end with this."""
        if self._model_offload is not None:
            self._model_offload.evict()

    def maybe_free_model_hooks(self) -> None:
        """`maybe_free`, by its name in diffusers."""
        self.maybe_free()

    # -- the decoder ---------------------------------------------------------------------------------------------------

    def enable_vae_tiling(self, **sizes: Any) -> None:
        """Decode in tiles: less memory, other numbers where tiles meet; sizes as the VAE's `enable_tiling` takes them."""
        self._decoder().enable_tiling(**sizes)

    def disable_vae_tiling(self) -> None:
        """Decode pictures of every size whole."""
        self._decoder().disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode the clips of a call one after the other."""
        self._decoder().enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode the clips of a call together."""
        self._decoder().disable_slicing()

    enable_attention_slicing = Absent(_ATTENTION)
    disable_attention_slicing = Absent(_ATTENTION)
    set_attention_slice = Absent(_ATTENTION)
    enable_xformers_memory_efficient_attention = Absent(_ATTENTION)
    disable_xformers_memory_efficient_attention = Absent(_ATTENTION)
    set_use_memory_efficient_attention_xformers = Absent(_ATTENTION)
    enable_freeu = Absent("it is for U-Nets, which none of these models is")

    def _decoder(self) -> Any:
        decoder = self.components.get("vae")
        if decoder is None:
            raise ConfigError("this pipeline has no vae: load the checkpoint with it, or set pipeline.vae")
        return decoder

    def _modules(self) -> dict[str, nn.Module]:
        return {name: component for name, component in self.components.items() if isinstance(component, nn.Module)}


def _destination(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype of a call of ``to``."""
    named = {name: value for name, value in kwargs.items() if name not in {"silence_dtype_warnings", "non_blocking"}}
    for value in args:
        if value is not None and not isinstance(value, bool):  # a third one is non_blocking
            name = "dtype" if isinstance(value, torch.dtype) else "device"
            if named.get(name) is not None:
                raise ConfigError(f"to: there are two of {name}, {named[name]!r} and {value!r}; give one")
            named[name] = value
    device, dtype = named.pop("device", None), named.pop("dtype", None)
    if named or not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        given = ", ".join(f"{name}={value!r}" for name, value in {**named, "dtype": dtype}.items())
        raise ConfigError(f"to: got {given}; expected a device, a floating torch.dtype, or both")
    try:
        return None if device is None else torch.device(device), dtype
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"to: {device!r} is not a device; give 'cuda', 'cuda:1' or 'cpu'") from error


def _has_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    return all(t.dtype == dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def _one_device(gpu_id: int | torch.device | str | None, device: torch.device | str | None) -> torch.device | None:
    """The device that two arguments name; ``gpu_id`` may be a device itself, ``device`` one without a number."""
    target = None if device is None else torch.device(device)
    if gpu_id is None:
        return target
    if isinstance(gpu_id, int):
        named = torch.device("cuda" if target is None else target.type, gpu_id)
    else:
        named = torch.device(gpu_id)
    if target is not None and (target.type != named.type or target.index not in {None, named.index}):
        raise ConfigError(f"gpu_id={gpu_id} and device={device} are two devices; give one")
    return named
