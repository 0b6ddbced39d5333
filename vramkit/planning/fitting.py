"""``fit``: run a pipeline within a budget, and say how."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from vramkit.errors import ConfigError, ConflictError
from vramkit.memory import format_bytes
from vramkit.offload import Offload, OffloadStats, offload_of
from vramkit.offload.allocator import use_expandable_segments
from vramkit.offload.config import usable_device
from vramkit.planning.calls import Example, PlannedCall, arguments_of, module_calls, pipeline_call
from vramkit.planning.components import components_of
from vramkit.planning.examples import read_examples
from vramkit.planning.explain import explain
from vramkit.planning.machine import device_of
from vramkit.planning.planner import Budget, Planner
from vramkit.planning.plans import Plan
from vramkit.planning.regime import Regime
from vramkit.planning.twins import is_pipeline
from vramkit.planning.watched_calls import WatchedCalls

__all__ = ["Fit", "fit"]


def fit(
    target: Any,
    vram: int | str,
    *,
    ram: int | str | None = None,
    allow: str = "exact",
    device: torch.device | str | None = None,
    example: Any = None,
    disk_folder: str | Path | None = None,
    mesh: Any = None,
    **call: Any,
) -> Fit:
    """Run `target` within `vram` of device memory, as fast as that allows.

    The call is rehearsed on twins without memory, a plan is searched, and the plan is applied: what stays on the device,
    what streams and how, how the autoencoder decodes. A later call that asks for more than the planned one is planned for
    before it begins, or refused: arguments are compared with all that lists, sets, mappings, dataclasses, partials and
    closures among them hold; objects of other classes (caches, the object of a bound method) are not looked into. After a
    call that took more device memory than the budget, although less was predicted, a warning says so, and later calls are
    planned with as much more kept free.

    On CUDA torch's allocator is told, for the process, to reserve memory in segments that grow, unless an environment
    variable says otherwise: what it reserves then stays near to what is in use.

    Args:
        target: a pipeline of vramkit or diffusers (anything with ``.components``), a mapping of names to modules, or a
            module. Weights may be in RAM or views of files.
        vram: device memory for weights and activations: bytes, or text such as ``"6GiB"``. On the device ``"cpu"`` it is
            the RAM that slots, resident weights and activations take.
        ram: bound on page-locked memory and on process memory that weights take at rest; None for none. Beyond it weights
            rest in their files, or in new ones.
        allow: ``"exact"``: the bytes of the resident run with the plan's settings and the same kernels; ``"bounded"``: also
            weights in int8, fp8 or nf4, where nothing else fits or a twentieth of the time is saved, whose measured decibels
            the plan prints; ``"any"``: also nf4 for the layers that models name as fragile, of which nothing was measured.
        device: where it computes; by default the accelerator if there is one, else the CPU.
        example: for modules: the arguments of the call, a tuple, a mapping of keyword arguments, or one; for a mapping of
            modules one of those for each name. Without it the first call is planned for when it comes.
        disk_folder: where weights are written that `ram` has no room for; by default the folder for temporary files.
        mesh: ranks (`vramkit.distributed.connect`) that all make this call, each with a budget of `vram` on its device: they
            share work, a pipeline as by `vramkit.distributed.parallelize`, and where the plan says so the links.
        **call: for pipelines: what the call will be (``height=``, ``width=``, ``num_frames=``, ``batch=``, ``prompt=`` ...);
            what is left out is as the pipeline has it. For a language model of transformers: what it will generate
            (``batch=``, ``max_length=``, ``max_new_tokens=``, ``cache_implementation=``), after `example`, the token ids
            [batch, tokens] of a prompt, or prompts as long as the lengths leave; the cache counts at its full length.

    Returns:
        The handle: ``plan``, ``explain()``, ``stats()``, ``remove()``. A context manager, too.

    Raises:
        PlanInfeasible: no plan fits; names the nearest budget that does, and what binds. Nothing was changed.
        ConfigError: an argument that cannot be used.
        ConflictError, UnsupportedTensorError, StoreError: as `apply_group_offloading`.
    """
    budget = Budget(vram, ram, allow)
    if mesh is not None and not hasattr(mesh, "agree"):
        raise ConfigError(f"mesh={mesh!r}; expected what vramkit.distributed.connect() returns, or None")
    folder = None if disk_folder is None else _folder(disk_folder)
    _refuse_offloaded(target)
    WatchedCalls.end_idle(target)
    device = device_of(device) if mesh is None else mesh.device
    usable_device(device, "device")
    use_expandable_segments(device)
    planner = Planner(target, budget, device, ranks=1 if mesh is None else mesh.size)
    plans: Any = planner if mesh is None else _planner_of_first(planner, mesh, budget)
    examples: dict[str, Example] = {}
    if planner.is_of_pipeline:
        if example is not None:
            raise ConfigError(
                f"example= is for modules; say what the call of {type(target).__name__} is by its arguments"
            )
        planned: PlannedCall | None = pipeline_call(target, call, are_given=True)
    else:
        examples = read_examples(target, planner.names, example, call)
        planned = module_calls(examples, are_given=True) if examples else None
    regime = Regime(target, plans.plan(planned), disk_folder=folder, mesh=mesh)
    return Fit(target, WatchedCalls(target, plans, regime, planned=planned, examples=examples, mesh=mesh), mesh=mesh)


def fit_decode(
    pipeline: Any,
    latents: torch.Tensor,
    decoding: Mapping[str, Any],
    vram: int | str,
    *,
    ram: int | str | None,
    device: str,
) -> Fit:
    """Fit ``pipeline.decode_latents(latents, **decoding)`` of a pipeline that has its autoencoder alone.

    Raises:
        PlanInfeasible, ConfigError: as `fit`.
    """
    usable_device(device, "device")
    use_expandable_segments(device)
    planner = Planner(pipeline, Budget(vram, ram, "exact"), device_of(device))
    options = {name: value for name, value in decoding.items() if name != "generator"}  # which would have drawn
    args, _ = arguments_of(latents)
    planned = PlannedCall(
        {"latents": args[0], **options}, lambda twin: twin.decode_latents(arguments_of(args)[0][0], **options)
    )
    regime = Regime(pipeline, planner.plan(planned), disk_folder=None, mesh=None)
    return Fit(pipeline, WatchedCalls(pipeline, planner, regime, planned=planned, examples={}))


class Fit:
    """A pipeline, or modules, within a budget, until `remove`."""

    def __init__(self, target: Any, calls: WatchedCalls, *, mesh: Any = None) -> None:
        """Begin to run and to watch the `calls` of `target` by their plan; on an error nothing stays changed."""
        self._calls = calls
        self._parallel: Any = None
        try:
            if mesh is not None and is_pipeline(target) and getattr(target, "together", None) is None:
                self._parallel = _parallelized(target, mesh)
            self._calls.begin()
        except BaseException:
            self.remove()
            raise

    @property
    def plan(self) -> Plan:
        """The plan by which it runs."""
        return self._calls.regime.plan

    @property
    def offloads(self) -> dict[str, Offload]:
        """The handles of the components."""
        return self._calls.regime.offloads

    def explain(self) -> str:
        """Return a table of what is where and why, and of what each phase takes."""
        return explain(self.plan)

    def stats(self) -> dict[str, OffloadStats]:
        """Return the figures of each component's offloading."""
        return {name: offload.stats() for name, offload in self.offloads.items()}

    def remove(self) -> None:
        """Give everything back: weights to host memory, settings as they were. Later calls do nothing.

        Weights that a plan of another class than "exact" has rounded stay as they were stored.
        """
        try:
            self._calls.end()
        finally:
            if self._parallel is not None:
                self._parallel.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.plan.model} in {format_bytes(self.plan.vram_bytes)}>"


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(
            f"disk_folder={path!r}; expected the path of a folder (it is made when it is missing), or None"
        )
    return Path(path)


def _planner_of_first(planner: Planner, mesh: Any, budget: Budget) -> Any:
    from vramkit.distributed.first_planner import FirstPlanner  # noqa: PLC0415 - most processes are no ranks

    mesh.agree({"vram=": budget.vram_bytes, "ram=": budget.ram_bytes, "allow=": budget.allow})
    return FirstPlanner(planner, mesh)


def _parallelized(target: Any, mesh: Any) -> Any:
    from vramkit.distributed.parallel import parallelize  # noqa: PLC0415

    return parallelize(target, mesh)


def _refuse_offloaded(target: Any) -> None:
    for name, component in components_of(target).items():
        for part_name, part in component.module.named_modules():
            if offload_of(part) is not None:
                where = f"{name}.{part_name}" if part_name else name
                raise ConflictError(
                    f"{where} is offloaded already; call remove() on that handle first (offload_of(module) returns it), and "
                    "let fit choose"
                )
