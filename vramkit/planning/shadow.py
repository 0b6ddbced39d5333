"""Twins without memory: of modules, and of a pipeline around them. The originals are read, never changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vramkit import tensors
from vramkit.errors import ConfigError
from vramkit.planning.uncopied import stand_in_for_uncopied

__all__ = ["shadow_of", "shadows_of"]

_KNOWN_BYTES = 2**18  # buffers up to this size keep their values: masks, tables of positions


def shadows_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return twins of `modules` whose weights are on the meta device; what they share, their twins share.

    Of what has no copy in their attributes (generators, open files) they have a stand-in, which no call can use.

    Raises:
        ConfigError: a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in modules.values():
        for part in module.modules():
            for parameter in part._parameters.values():  # noqa: SLF001 (`parameters()` is overridden by models of others)
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = _without_memory(parameter)
            for buffer in part._buffers.values():  # noqa: SLF001
                if buffer is not None and (buffer.is_meta or buffer.nbytes > _KNOWN_BYTES) and id(buffer) not in memo:
                    memo[id(buffer)] = _without_memory(buffer)
            for held in vars(part).values():  # weights that are computed before each call, as weight norms do
                if isinstance(held, torch.Tensor) and not held.is_leaf:
                    memo[id(held)] = _without_memory(held)
    try:
        shared = dict(memo)  # deepcopy puts more into the memo, and keeps what it has copied alive there
        twins = {name: copy.deepcopy(module, shared) for name, module in modules.items()}
    except Exception:  # noqa: BLE001 - attributes are of any class
        for module in modules.values():
            stand_in_for_uncopied(module, memo)
        shared = dict(memo)
        twins = {name: _copied(module, shared) for name, module in modules.items()}
    for twin in twins.values():
        twin.requires_grad_(requires_grad=False)
    for part in {part: None for twin in twins.values() for part in twin.modules()}:
        vars(part).update({name: _of_twins(held, shared) for name, held in vars(part).items() if callable(held)})
    return twins


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and calls are planned for with "
            "copies that have no memory; run it without fit, by apply_group_offloading"
        ) from error


def shadow_of(pipeline: Any, shadows: Mapping[str, nn.Module]) -> Any:
    """Return a twin of `pipeline` with `shadows` in the place of its modules, and schedulers of its own."""
    twin = copy.copy(pipeline)
    components = getattr(pipeline, "components", {})
    twins = {id(component): shadows[name] for name, component in components.items() if name in shadows}
    for name, held in {**components, **vars(twin)}.items():
        if id(held) in twins:
            vars(twin)[name] = twins[id(held)]
        elif name in components and hasattr(held, "set_timesteps"):
            vars(twin)[name] = copy.deepcopy(held)
    if isinstance(held := vars(twin).get("components"), Mapping):
        vars(twin)["components"] = {name: twins.get(id(each), each) for name, each in held.items()}
    for name in ("together", "branches"):  # a rehearsal is of one process
        if name in vars(twin):
            vars(twin)[name] = None
    if hasattr(twin, "set_progress_bar_config"):
        twin._progress_bar_config = {}  # noqa: SLF001 - both kinds of pipelines keep it under this name
        twin.set_progress_bar_config(disable=True)
    return twin


def _of_twins(held: Any, memo: dict[int, Any]) -> Any:
    """Return `held`, or where it is a function that was put on a module, one with twins for the originals in its closure.

    Copying leaves functions as they are: what hooks put in the place of a forward would run that of the original.
    """
    if id(held) in memo:
        return memo[id(held)]
    if isinstance(held, types.MethodType):
        return types.MethodType(held.__func__, memo.get(id(held.__self__), held.__self__))
    if isinstance(held, functools.partial):
        keywords = {name: _of_twins(value, memo) for name, value in held.keywords.items()}
        bound = functools.partial(
            _of_twins(held.func, memo), *(_of_twins(value, memo) for value in held.args), **keywords
        )
        vars(bound).update(vars(held))
        return bound
    if not isinstance(held, types.FunctionType) or held.__closure__ is None:
        return held
    cells = tuple(types.CellType() for _ in held.__closure__)
    twin = types.FunctionType(held.__code__, held.__globals__, held.__name__, held.__defaults__, cells)
    memo[id(held)] = twin  # a function may be in its own closure
    twin.__kwdefaults__ = held.__kwdefaults__
    vars(twin).update(vars(held))
    for cell, original in zip(cells, held.__closure__, strict=True):
        with contextlib.suppress(ValueError):  # the cell is empty
            cell.cell_contents = _of_twins(original.cell_contents, memo)
    return twin


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "__tensor_flatten__"):
        bare = tensors.rebuild(tensor, [leaf.to("meta") for leaf in tensors.leaves(tensor)])
    else:
        bare = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensors.as_owned(bare, like=tensor) if isinstance(tensor, nn.Parameter) else bare
