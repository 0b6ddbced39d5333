"""``fit``: run a pipeline within a budget, and say how."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from vramkit.device_memory import memory_of
from vramkit.errors import ConcurrentUseError, ConfigError, ConflictError, PlanInfeasible
from vramkit.memory import format_bytes, tensor_bytes
from vramkit.offload import Offload, OffloadStats, offload_of
from vramkit.offload.allocator import use_expandable_segments
from vramkit.planning.apply import Applied
from vramkit.planning.calls import Example, PlannedCall, arguments_of, module_calls, pipeline_call
from vramkit.planning.components import Component, components_of, entry_points_of, phase_of
from vramkit.planning.explain import explain
from vramkit.planning.features import Features, Settings
from vramkit.planning.generation import Generation, can_generate
from vramkit.planning.guard import Guard
from vramkit.planning.measured import PeakMeter
from vramkit.planning.narrowing import STORED, Narrowed
from vramkit.planning.planner import Budget, Planner
from vramkit.planning.plans import Plan

__all__ = ["Fit", "fit"]

_ASKED_FOR = 33  # 32nds of the budget: what a call counts as that ran out of memory and went on


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
    before it begins. After a call that took more device memory than the budget, although less was predicted, a warning says
    so, and later calls are planned with as much more kept free.

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
    _refuse_offloaded(target)
    device = device_of(device) if mesh is None else mesh.device
    use_expandable_segments(device)
    planner = Planner(target, budget, device, ranks=1 if mesh is None else mesh.size)
    plans: Any = planner if mesh is None else _planner_of_first(planner, mesh, budget)
    examples: dict[str, Example] = {}
    if planner.is_of_pipeline:
        if example is not None:
            raise ConfigError(
                f"example= is for modules; say what the call of {type(target).__name__} is by its arguments"
            )
        planned: PlannedCall | None = pipeline_call(target, call)
    else:
        examples = read_examples(target, planner.names, example, call)
        planned = module_calls(examples) if examples else None
    plan = plans.plan(planned)
    folder = None if disk_folder is None else Path(disk_folder)
    return Fit(target, plans, plan=plan, planned=planned, examples=examples, disk_folder=folder, mesh=mesh)


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
    use_expandable_segments(device)
    planner = Planner(pipeline, Budget(vram, ram, "exact"), device_of(device))
    options = {name: value for name, value in decoding.items() if name != "generator"}  # which would have drawn
    args, _ = arguments_of(latents)
    planned = PlannedCall(
        {"latents": args[0], **options}, lambda twin: twin.decode_latents(arguments_of(args)[0][0], **options)
    )
    return Fit(pipeline, planner, plan=planner.plan(planned), planned=planned, examples={}, disk_folder=None)


class Fit:
    """A pipeline, or modules, within a budget, until `remove`."""

    def __init__(
        self,
        target: Any,
        planner: Any,
        *,
        plan: Plan,
        planned: PlannedCall | None,
        examples: Mapping[str, Example],
        disk_folder: Path | None,
        mesh: Any = None,
    ) -> None:
        """Apply `plan`; on an error nothing stays changed."""
        self.plan = plan
        self._target, self._planner, self._planned = target, planner, planned
        self._examples = dict(examples)
        self._disk_folder = disk_folder
        self._modules = {name: component.module for name, component in components_of(target).items()}
        self._features = Features(target, self._modules)
        self._narrowed = Narrowed()
        self._applied: Applied | None = None
        self._mesh, self._parallel = mesh, None
        self._guards: list[Guard] = []
        self._parts: list[PlannedCall] = []  # calls of parts of a pipeline that the plan holds for, too
        self._entered = threading.local()
        self._lock = threading.RLock()  # twins are for one rehearsal at a time
        device = torch.device(plan.device)
        # Ranks plan anew together, for which they have to meet: too much for each call of a module.
        is_measured = device.type != "cpu" and (mesh is None or planner.is_of_pipeline)
        self._meter = PeakMeter(memory_of(device)) if is_measured else None
        self._is_measuring = threading.Lock()
        try:
            if mesh is not None and planner.is_of_pipeline and getattr(target, "together", None) is None:
                self._parallel = _parallelized(target, mesh)
            self._guard()
            self._apply(plan)
        except BaseException:
            self.remove()
            raise

    @property
    def offloads(self) -> dict[str, Offload]:
        """The handles of the components."""
        return {} if self._applied is None else dict(self._applied.offloads)

    def explain(self) -> str:
        """Return a table of what is where and why, and of what each phase takes."""
        return explain(self.plan)

    def stats(self) -> dict[str, OffloadStats]:
        """Return the figures of each component's offloading."""
        return {name: offload.stats() for name, offload in self.offloads.items()}

    def remove(self) -> None:
        """Give everything back: weights to host memory, settings as they were. Later calls do nothing."""
        try:
            self._take_off()
        finally:
            self._unguard()
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

    def _take_off(self) -> None:
        try:
            with contextlib.ExitStack() as steps:  # one that fails keeps no other from being taken
                steps.callback(self._features.reset)
                for name in self._narrowed.ways:
                    steps.callback(self._narrowed.undo, name)
                if self._applied is not None:
                    steps.callback(self._applied.remove)
        except Exception:
            self._applied = None
            raise
        self._applied = None  # not after Ctrl-C: then there is something left to be taken off

    def _apply(self, plan: Plan) -> None:
        if self._applied is not None:
            self._applied.remove()
        self._applied = None
        chosen = Settings.of(plan)
        self._features.set(chosen)
        for each in plan.components:
            if each.wire_dtype in STORED:
                self._narrowed.become(each.name, self._modules[each.name], STORED[each.wire_dtype])
            else:
                self._narrowed.undo(each.name)
        self._applied = Applied(self._modules, plan, disk_folder=self._disk_folder, mesh=self._mesh)
        self._applied.open()
        self.plan, self._weights = plan, _weights_of(components_of(self._target))
        is_other = chosen.decode is not None and chosen.decode != self._features.before.decode
        if plan.allow == "exact" and is_other and plan.decode is not None and plan.decode.mode == "tiles":
            warnings.warn(
                f"a whole decode does not fit {format_bytes(plan.vram_bytes)}: the autoencoder decodes in tiles, which "
                "gives the bytes of a resident run with vae.enable_tiling()",
                UserWarning,
                stacklevel=4,
            )

    def _guard(self) -> None:
        is_of_pipeline = self._planner.is_of_pipeline
        if is_of_pipeline:
            self._attach(Guard(self._target, self._around_pipeline))
            if self._mesh is not None:  # ranks would have to plan together for what each does by itself
                return
        around = self._around_part if is_of_pipeline else self._around
        for name, module in self._modules.items():
            methods = [method for method in entry_points_of(module) if method != "forward"]
            self._attach(Guard(module, functools.partial(around, name), methods))

    def _attach(self, guard: Guard) -> None:
        self._guards.append(guard)  # first: an interrupt may come after any step
        guard.attach()

    def _unguard(self) -> None:
        while self._guards:
            self._guards[-1].remove()
            self._guards.pop()

    @contextlib.contextmanager
    def _inside(self, name: str) -> Iterator[bool]:
        """Be in a call of a component, or of the pipeline (""); tell whether it is looked at: a part of one is not."""
        entered = vars(self._entered).setdefault("names", [])
        depth = len(entered)
        try:
            is_part = name in entered or "" in entered
            entered.append(name)
            yield not is_part
        finally:
            del entered[depth:]

    @contextlib.contextmanager
    def _around_pipeline(self, _method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        names = list(inspect.signature(type(self._target).__call__).parameters)[1:]
        with self._inside(""):
            self._meet(pipeline_call(self._target, {**dict(zip(names, args, strict=False)), **kwargs}))
            if self._applied is not None:
                self._applied.begin()
            with self._measuring():
                yield

    @contextlib.contextmanager
    def _around_part(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Be around a call that goes past the pipeline, such as ``pipeline.vae.decode(latents)``."""
        with self._inside(name) as is_looked_at:
            if not is_looked_at:
                yield
                return
            self._meet_part(name, module_calls({_key(name, method): _example(args, kwargs)}))
            with self._measuring():
                yield

    @contextlib.contextmanager
    def _around(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        example: Example | None = None
        if method == "generate":
            example = Generation.of_call(self._modules[name], args, kwargs)
            if example is None:  # the passes that it makes are looked at, each
                yield
                return
        with self._inside(name) as is_looked_at:
            if not is_looked_at:
                yield
                return
            with self._lock:
                examples = {**self._examples, _key(name, method): example or _example(args, kwargs)}
                if self._meet(module_calls(examples)):
                    self._examples = examples
            with self._measuring():
                yield

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Compare what a call takes with its plan; other calls that run meanwhile are in one measurement with it."""
        meter = self._meter
        if meter is None or not self._is_measuring.acquire(blocking=False):
            yield
            return
        try:
            begun = meter.begin(sum(offload.held_bytes for offload in self.offloads.values()))
            yield
            peak_bytes, ran_out = meter.end(begun)
        finally:
            self._is_measuring.release()
        if ran_out:  # nobody knows how much was asked for
            peak_bytes = self.plan.vram_bytes * _ASKED_FOR // 32
        if self._mesh is not None:
            peak_bytes = self._planner.highest(peak_bytes)
        if peak_bytes is not None:
            self._correct(peak_bytes, ran_out=ran_out)

    def _correct(self, peak_bytes: int, *, ran_out: bool) -> None:
        """Plan anew, with as much kept free as a call took more than was predicted, if it took more than the budget."""
        with self._lock:
            plan, planned = self.plan, self._planned
            if self._applied is None or peak_bytes <= plan.vram_bytes:
                return
            more = peak_bytes - plan.peak_bytes
            taken = f"a call took {format_bytes(peak_bytes)}"
            if ran_out:  # cuDNN then takes another algorithm, which wants no workspace
                taken = "memory ran out within a call, which went on with less or by other, slower kernels,"
            told = (
                f"{taken} where {format_bytes(plan.peak_bytes)} were predicted and {format_bytes(plan.vram_bytes)} "
                "were given"
            )
            try:
                self._refuse_running()
                self._planner.keep_free(more, note=f"{told}: {format_bytes(more)} are kept free since")
                corrected = self._planner.plan(planned, self._narrowed.ways)
            except (PlanInfeasible, ConcurrentUseError) as error:
                warnings.warn(f"{told}, and nothing is changed: {error}", UserWarning, stacklevel=4)
                return
            try:
                self._apply(corrected)
            except BaseException:
                self._apply(plan)
                raise
            warnings.warn(f"{told}; later calls have a plan that keeps more free", UserWarning, stacklevel=4)

    def _meet(self, call: PlannedCall) -> bool:
        """Plan for `call` if it asks for more than what was planned for, and tell whether it did.

        Raises:
            PlanInfeasible: nothing fits; the plan of before stays.
            ConcurrentUseError: a component runs in another thread, which another plan would stop.
        """
        with self._lock:
            if self._applied is None:
                return False
            if self._weights != _weights_of(components_of(self._target)):  # adapters, other components
                self._begin_anew(call)
                return True
            if self._planned is not None and self._planned.covers(call):
                return False
            self._change(call)
            self._parts.clear()
            return True

    def _meet_part(self, name: str, call: PlannedCall) -> None:
        """Plan for `call` of a component beside what was planned for, if it needs more than that component was given.

        Raises:
            PlanInfeasible, ConcurrentUseError: as `_meet`.
        """
        with self._lock:
            planned = self._planned
            if self._applied is None or planned is None or any(each.covers(call) for each in self._parts):
                return
            if self._weights != _weights_of(components_of(self._target)):
                self._begin_anew(planned)
            if self._planner.activation_bytes(name, call, self.plan) > self.plan.component(name).activation_bytes:
                self._change(planned.beside(call, is_first=phase_of(name) == "encode"))
            self._parts.append(call)

    def _change(self, call: PlannedCall) -> None:
        """Run by another plan, for `call`; on an error that of before stays."""
        plan, before = self._planner.plan(call, self._narrowed.ways), self.plan
        if _is_other(plan, before):
            self._refuse_running()
            try:
                self._apply(plan)
            except BaseException:
                self._apply(before)
                raise
        self.plan, self._planned = plan, call

    def _begin_anew(self, call: PlannedCall) -> None:
        """Plan `call` for the modules as they are now; on an error those of before run as before."""
        self._refuse_running()
        before, ways = (self.plan, self._modules, self._features), self._narrowed.ways
        self._take_off()
        self._unguard()
        try:
            self._planner = self._planner.renewed(self._target)
            self._modules = {name: component.module for name, component in components_of(self._target).items()}
            self._features = Features(self._target, self._modules)
            rounded = {name: way for name, way in ways.items() if self._modules.get(name) is before[1][name]}
            plan = self._planner.plan(call, rounded)
            self._guard()
            self._apply(plan)
        except BaseException:
            self._take_off()
            self._unguard()
            plan, self._modules, self._features = before
            self._guard()
            self._apply(plan)
            raise
        self._planned = call
        self._parts.clear()

    def _refuse_running(self) -> None:
        for name, offload in self.offloads.items():
            if offload.is_running_elsewhere:
                raise ConcurrentUseError(
                    f"this call asks for more than was planned for, and {name} is running in another thread, which "
                    "planning anew would stop; make one call after the other, or plan for the largest first"
                )


def _planner_of_first(planner: Planner, mesh: Any, budget: Budget) -> Any:
    from vramkit.distributed.first_planner import FirstPlanner  # noqa: PLC0415 - most processes are no ranks

    mesh.agree({"vram=": budget.vram_bytes, "ram=": budget.ram_bytes, "allow=": budget.allow})
    return FirstPlanner(planner, mesh)


def _parallelized(target: Any, mesh: Any) -> Any:
    from vramkit.distributed.parallel import parallelize  # noqa: PLC0415

    return parallelize(target, mesh)


def _weights_of(components: Mapping[str, Component]) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether a plan is for these modules, or for others or with other weights."""
    sizes = {name: [tensor_bytes(p) for p in each.module.parameters()] for name, each in components.items()}
    return {name: (id(components[name].module), len(each), sum(each)) for name, each in sizes.items()}


def _is_other(plan: Plan, before: Plan) -> bool:
    def doings(plan: Plan) -> Any:
        return plan.components, plan.guidance, plan.chunk_tokens, plan.decode

    return bool(doings(plan) != doings(before))


def _key(name: str, method: str) -> str:
    return name if method == "__call__" else f"{name}.{method}"


def _example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    return arguments_of(args)[0], arguments_of(kwargs)[1]


def read_examples(target: Any, names: Sequence[str], example: Any, options: Mapping[str, Any]) -> dict[str, Example]:
    """Return by the names of the modules the arguments, or what a language model will generate by `options`.

    Raises:
        ConfigError: a mapping of modules, and no mapping of its names; `options` of something that generates nothing.
    """
    if options:
        if not isinstance(target, nn.Module) or not can_generate(target):
            raise ConfigError(
                f"{next(iter(options))}= is an argument of a pipeline's call, or of generate of a language model; modules "
                "take example="
            )
        return {_key(names[0], "generate"): Generation.of_options(example, options)}
    if example is None:
        return {}
    if isinstance(target, nn.Module):
        return {names[0]: arguments_of(example)}
    unknown = sorted(example.keys() - set(names)) if isinstance(example, Mapping) else [type(example).__name__]
    if unknown:
        raise ConfigError(
            f"example= has {unknown[0]!r}; expected a mapping with arguments for some of {', '.join(names)}"
        )
    return {name: arguments_of(each) for name, each in example.items()}


def device_of(given: torch.device | str | None) -> torch.device:
    if given is not None:
        try:
            return torch.device(given)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device={given!r} is no device; give 'cuda', 'cuda:1' or 'cpu'") from error
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _refuse_offloaded(target: Any) -> None:
    for name, component in components_of(target).items():
        for part_name, part in component.module.named_modules():
            if offload_of(part) is not None:
                where = f"{name}.{part_name}" if part_name else name
                raise ConflictError(
                    f"{where} is offloaded already; call remove() on that handle first (offload_of(module) returns it), and "
                    "let fit choose"
                )
