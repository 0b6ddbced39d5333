"""The public calls: validate, then delegate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vramkit import hooks
from vramkit.errors import ConfigError, ConflictError
from vramkit.memory import format_bytes
from vramkit.offload.config import OffloadConfig, refuse_no_module, refuse_no_names
from vramkit.offload.engine import Engine
from vramkit.offload.handle import Offload
from vramkit.offload.offloaded import offload_of
from vramkit.offload.pinning import PinBudget
from vramkit.offload.stores import Sharing
from vramkit.offload.turns import Turns
from vramkit.uncopied import Uncopied

__all__ = ["ModelOffload", "apply_group_offloading", "apply_model_offload"]


def apply_group_offloading(  # noqa: PLR0917 (the peers' signature)
    module: nn.Module,
    onload_device: torch.device | str,
    offload_device: torch.device | str = "cpu",
    offload_type: str = "block_level",
    num_blocks_per_group: int | None = None,
    non_blocking: bool = False,
    use_stream: bool | None = None,
    record_stream: bool = False,
    low_cpu_mem_usage: bool = False,
    offload_to_disk_path: str | os.PathLike[str] | None = None,
    block_modules: Sequence[str] | None = None,
    exclude_kwargs: Sequence[str] | None = None,
    *,
    slots: int | None = None,
    resident: int | str = 0,
    store: str | None = None,
    unit_bytes: int | str | None = None,
    direct_io: bool = False,
    pin_budget: PinBudget | int | str | None = None,
    entry_points: Sequence[str] | None = None,
    turns: Turns | None = None,
    mesh: Sharing | None = None,
    peer_device: torch.device | str | None = None,
) -> Offload:
    """Run `module` on a device smaller than it: weights rest in host memory or files and travel just in time.

    Mirrors ``diffusers.hooks.apply_group_offloading``. The results are the same bytes as with everything on the device.

    Args:
        module: any module in evaluation use. Its weights may be in RAM, on the device, or views of files (`load_mapped`,
            and what ``from_pretrained``, ``load_file`` or ``torch.load(mmap=True)`` leave).
        onload_device: where it computes: ``"cuda"``, ``"xpu"`` (untested), or ``"cpu"`` (weights stream from files to RAM).
        offload_device: where weights rest; only ``"cpu"``. Files are chosen by `store` or `offload_to_disk_path`.
        offload_type: ``"block_level"``: the blocks of every ``ModuleList`` or ``Sequential``, at any depth;
            ``"leaf_level"``: single layers, small neighbours joined; ``"model_level"``: everything for each call.
        num_blocks_per_group: consecutive blocks that travel together at block level. None: each by itself, but of small ones
            as many as make 16 MiB, or a 32nd of the model: a copy below that does not reach the speed of the link.
        non_blocking: accepted; copies never block where the memory allows that.
        use_stream: False keeps one group on the device at a time (slots=1); otherwise loading overlaps computing.
        record_stream: accepted and needless: slots are never freed while a copy or a computation uses them.
        low_cpu_mem_usage: accepted and needless: host memory is page-locked where it lies, not copied.
        offload_to_disk_path: folder to write weights to (a new subfolder each time, removed by ``remove()``).
        block_modules: names of submodules that are block lists or blocks (default: found).
        exclude_kwargs: keyword arguments of the forward that are not moved to the device.
        slots: groups that the device has room for (default 2: one computes, one loads; 3 at leaf level).
        resident: weights that stay on the device, spread evenly over the blocks: bytes, or text such as ``"4GiB"``.
        store: ``"registered"``, ``"mapped"``, ``"pageable"``, ``"disk"`` or ``"peer"``; None chooses the fastest
            that works, of those on the host.
        unit_bytes: upper bound for what travels together; blocks are cut at their submodules to meet it.
        direct_io: read files around the page cache (O_DIRECT) where the system can.
        pin_budget: most host memory to page-lock: bytes or text (default: nine tenths of the free RAM), or a `PinBudget`
            that several modules share.
        entry_points: methods besides ``forward`` that run the module (default: ``encode``, ``decode``, ``generate`` if it
            has them).
        turns: share them among components to keep a budget of device memory (`Turns`). None: with all on this device that
            have none of their own; slots of what is idle are let go of when another one begins.
        mesh: ranks (`vramkit.distributed.connect`) that all run this module, in the same calls: each reads its part of what
            travels, over its own link, and they give it to one another (``mesh.apart``: each reads all, which is once in
            host memory). A rank that runs out of memory ends all.
        peer_device: with ``store="peer"``, another device of this process, such as ``"cuda:1"``, that keeps a copy of all
            that travels. It has to have room for that.

    Returns:
        The handle: ``remove()``, ``edit()``, ``adapt()``, ``rest()``, ``stats()``.
        Applying the same options again returns the same handle.

    Raises:
        ConfigError: an option cannot be used, weights are on the meta device, or ranks differ in options or weights.
        ConflictError: the module, or a part of it, is offloaded already, by this or another library.
        UnsupportedTensorError: a parameter is of a kind that cannot be taken apart.
        StoreError: the disk folder cannot be written.
    """
    del non_blocking, record_stream, low_cpu_mem_usage  # documented above: what they ask for always holds
    refuse_no_module(module, ", or let vramkit.fit(pipeline, vram=...) do it for all")
    config = OffloadConfig.from_options(
        module,
        onload_device=onload_device,
        offload_device=offload_device,
        offload_type=offload_type,
        num_blocks_per_group=num_blocks_per_group,
        use_stream=use_stream,
        offload_to_disk_path=offload_to_disk_path,
        block_modules=block_modules,
        exclude_kwargs=exclude_kwargs,
        slots=slots,
        unit_bytes=unit_bytes,
        resident=resident,
        store=store,
        direct_io=direct_io,
        pin_budget=pin_budget,
        entry_points=entry_points,
        mesh=mesh,
        peer_device=peer_device,
    )
    present = offload_of(module)
    if present is not None and present.config == config:
        present.join(turns)
        return present
    _refuse_offloaded(module)
    if mesh is not None:
        mesh.prepare(module, config.compared(), config.disk_folder)
    return Offload(module, config, turns=turns)


class ModelOffload(Uncopied):
    """Several components that take turns on the device, from `apply_model_offload` until `remove`."""

    def __init__(self, offloads: Mapping[str, Offload], turns: Turns) -> None:
        self.offloads = dict(offloads)
        self._turns = turns

    def __repr__(self) -> str:
        """Return a short table of the components."""
        rows = [
            f"  {name:<20}{type(offload.module).__name__:<32}{format_bytes(offload.held_bytes)} on the device now"
            for name, offload in self.offloads.items()
        ]
        return "\n".join(["ModelOffload, whole components in turn", *rows])

    def evict(self) -> None:
        """Take the component that is on the device off it."""
        self._turns.end()

    def remove(self) -> None:
        """Give all components their tensors back, in host memory; one that fails keeps no other from it."""
        with contextlib.ExitStack() as steps:  # the last one that is put on it is taken first
            for offload in reversed(self.offloads.values()):
                steps.callback(offload.remove)
            steps.callback(self._turns.end)


def apply_model_offload(
    components: Any, device: torch.device | str = "cuda", *, exclude: Collection[str] = (), store: str | None = None
) -> ModelOffload:
    """Put whole components on `device` when they are called; each leaves before the next one needs the room.

    Mirrors ``enable_model_cpu_offload`` of diffusers.

    Args:
        components: a mapping name -> module, a sequence of modules, or a pipeline (anything with ``.components``).
            What is not a module is passed over, and so is a module that is offloaded already; one of them must be one.
        device: where components compute.
        exclude: names of components to leave where they are.
        store: as in `apply_group_offloading`.

    Raises:
        ConfigError, ConflictError, UnsupportedTensorError: as `apply_group_offloading`; then no component is offloaded.
    """
    named = _modules_of(components)
    refuse_no_names("exclude", exclude)
    unknown = sorted(set(exclude) - named.keys())
    if unknown:
        raise ConfigError(
            f"exclude names {unknown[0]!r}, which is no component; there are {', '.join(map(str, named))}"
        )
    turns = Turns(budget=0)  # whatever does not run leaves
    offloads: dict[str, Offload] = {}
    try:
        for name, module in named.items():
            if name not in exclude and offload_of(module) is None:
                _refuse_offloaded(module)
                config = OffloadConfig.from_options(
                    module, onload_device=device, offload_type="model_level", store=store
                )
                offloads[name] = Offload(module, config, turns=turns, holds_on=True)
    except BaseException:
        ModelOffload(offloads, turns).remove()
        raise
    return ModelOffload(offloads, turns)


def _modules_of(components: Any) -> dict[str, nn.Module]:
    held = getattr(components, "components", components)
    if isinstance(held, nn.Module):
        held = {type(held).__name__: held}
    if not isinstance(held, Mapping):
        held = {str(at): each for at, each in enumerate(held if isinstance(held, Iterable) else ())}
    named = {name: component for name, component in held.items() if isinstance(component, nn.Module)}
    if not named:
        raise ConfigError(
            f"the {type(components).__name__} that was given has no torch.nn.Module in it; expected a mapping of names to "
            "modules, a sequence of modules, or a pipeline (with .components)"
        )
    return named


def _refuse_offloaded(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if any(isinstance(owner, Engine) for owner in hooks.marks(part)):
            what = f"its part {name!r}" if name else "it, or a module that it belongs to,"
            raise ConflictError(
                f"{type(module).__name__} cannot be offloaded, because {what} is offloaded already, with other options; "
                "call remove() on that handle first (offload_of(part) returns it)"
            )
