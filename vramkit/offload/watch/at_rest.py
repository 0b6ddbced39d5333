"""The parameters that a module owns while nothing runs: whoever touches them is answered, noted or refused."""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor

from vramkit import tensors
from vramkit.errors import ConflictError, TrainingError
from vramkit.offload.arguments import any_requires_grad
from vramkit.offload.watch.base import Watched, as_they_were, derived, has_memory_of

__all__ = ["Keeper", "data_at_rest", "is_resting", "released", "resting"]

# What tells about a tensor and reads none of its bytes: methods, and attributes (all except those in _VIEWS).
_TELLING = frozenset(
    {
        *("__hash__", "__len__", "__repr__", "__format__", "__setstate__", "_has_compatible_shallow_copy_type"),
        *("dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "storage_offset"),
        *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_conj", "is_neg", "is_inference"),
        *("is_shared", "is_pinned", "is_same_size", "is_set_to", "has_names", "_is_view"),
        *("requires_grad_", "register_hook", "retain_grad", "register_post_accumulate_grad_hook"),
    }
)
_PLACES = frozenset(["device", "is_cuda", "is_cpu", "is_xpu", "is_meta", "get_device", "layout"])
_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag"])
_ANSWERED = _VIEWS | _PLACES | {"data"}  # attributes that are answered from the device
# What hands out the memory itself, so that it may be changed later without a trace. So may views, which are seen as such.
_HANDING_OUT = frozenset(
    ["numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_"]
)
_MAKES_PARAMETERS = nn.Parameter.__new__.__code__


class Keeper(Protocol):
    """Answers for the weights of one offloaded module."""

    def knows(self, rest: torch.Tensor) -> bool:
        """Whether `rest` is one of them."""

    def is_inside(self) -> bool:
        """Whether the calling thread is in a pass."""

    def witness(self) -> torch.Tensor:
        """Return an empty tensor on the device that computes."""

    def serve(self, rest: torch.Tensor, reader: Callable[..., Any]) -> torch.Tensor:
        """Return what is on the device for `rest`, for the function `reader`."""

    def check(self, rest: torch.Tensor) -> None:
        """Raise StoreError where its memory may not be touched."""

    def alias(self, rest: torch.Tensor) -> torch.Tensor:
        """Return ``rest.data``, one and the same for all who ask, so that writes to it are counted."""

    def handed_out(self, rest: torch.Tensor) -> None:
        """Note that somebody has the memory of `rest`, and may write to it without a trace."""

    def refuse_replacing(self, rest: torch.Tensor) -> None:
        """Raise ConflictError: the memory of `rest` would be replaced."""


class _Resting(Watched):
    """Mixed into the class of a parameter at rest."""

    keepers: tuple[weakref.ref[Keeper], ...]  # several where models share a parameter

    def set_(self, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Refuse other memory: torch does not ask the class about this method."""
        tensor = cast("torch.Tensor", self)
        is_itself = isinstance(source, torch.Tensor) and not args and not kwargs and _is_the_same_memory(tensor, source)
        if not is_itself:
            for keeper in _keepers_of(tensor):
                keeper.refuse_replacing(tensor)
            given = () if source is None else (source, *args)
            as_they_were([tensor], lambda: tensor.set_(*given, **kwargs))
        return tensor

    def as_subclass(self, kind: type[torch.Tensor]) -> torch.Tensor:
        """Answer from the device inside a pass: torch does not ask the class about this method either."""
        tensor = cast("torch.Tensor", self)
        placed = _on_device_or_checked(tensor, torch.Tensor.as_subclass)
        return as_they_were([tensor], lambda: (tensor if placed is None else placed).as_subclass(kind))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        placed = _on_device_or_checked(cast("torch.Tensor", self), copy.deepcopy)
        copied: torch.Tensor = super().__deepcopy__(memo) if placed is None else copy.deepcopy(placed)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        _check(cast("torch.Tensor", self))
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        _check(cast("torch.Tensor", self))
        return super().__repr__()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer a read inside a pass from the device; let everything else happen as to the parameter it was."""
        kwargs = kwargs or {}
        if func is torch.Tensor.detach:
            _refuse_making_a_parameter()
        found = {id(tensor): tensor for tensor in _resting_in((*args, *kwargs.values()))}
        inside: dict[int, Keeper] = {}
        for key, tensor in found.items():
            keepers = _keepers_of(tensor)
            reading = _reading(keepers)
            if reading is not None and not _is_for_a_state_dict(func):
                inside[key] = reading
                continue
            answers = [_before_touching(keeper, tensor, func, args) for keeper in keepers]
            if answers and answers[0] is not None:
                return answers[0]
        name, attribute = _names(func)
        if name in _TELLING or (attribute and attribute not in _ANSWERED):
            inside = {}
        if not inside:
            result = as_they_were(found.values(), func, *args, **kwargs)
            for tensor in found.values():
                if _is_view_of(result, tensor):
                    for keeper in _keepers_of(tensor):
                        keeper.handed_out(tensor)
            return result
        tells_place = name in _PLACES or attribute in _PLACES

        def answered(tensor: torch.Tensor) -> torch.Tensor:
            keeper = inside.get(id(tensor))
            if keeper is None:
                return tensor
            return keeper.witness() if tells_place else keeper.serve(tensor, func)

        args = _mapped(tuple(args), answered)
        if attribute == "data":  # by the property of the class of what is shown
            return args[0].data if name == "__get__" else setattr(args[0], "data", args[1])
        kwargs = {key: _mapped(value, answered) for key, value in kwargs.items()}
        if not tells_place and torch.is_grad_enabled() and any_requires_grad((args, kwargs)):
            raise TrainingError(
                "an operation on a weight of an offloaded module asks for gradients, for which the weight would be needed "
                "after it was overwritten; detach() the other operands, use torch.no_grad(), or remove() the offloading"
            )
        return func(*args, **kwargs)


def resting(tensor: torch.Tensor, keeper: Keeper) -> None:
    """From now on let `tensor` be watched as one at rest, for `keeper` (which is referred to weakly)."""
    tensor.__class__ = _resting_class(tensors.kind_of(tensor), (*_others(tensor, keeper), weakref.ref(keeper)))


def is_resting(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is watched as one at rest: not where it was swapped for another one."""
    return isinstance(tensor, _Resting)


def released(tensor: torch.Tensor, keeper: Keeper) -> None:
    """Let `tensor` be again what it was before `resting`. Not watched: nothing to do."""
    watched: Any = tensor
    if isinstance(watched, _Resting):
        others = _others(tensor, keeper)
        cast("Any", watched).__class__ = (
            _resting_class(watched.watched_kind, others) if others else watched.watched_kind
        )


def data_at_rest(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor.data``, unnoticed."""
    return as_they_were([tensor], lambda: tensor.data)


def _before_touching(
    keeper: Keeper, tensor: torch.Tensor, func: Callable[..., Any], args: Sequence[Any]
) -> torch.Tensor | None:
    """Outside a pass: note or refuse what changes bytes behind the back of torch's counting; answer ``.data``."""
    name, attribute = _names(func)
    if not attribute and name not in _TELLING:
        keeper.check(tensor)
    if name in _HANDING_OUT:
        keeper.handed_out(tensor)
    elif attribute == "data" and args[0] is tensor:
        if name == "__get__":
            keeper.handed_out(tensor)
            return keeper.alias(tensor)
        if not _is_the_same_memory(tensor, args[1]):
            keeper.refuse_replacing(tensor)
    return None


def _is_for_a_state_dict(func: Callable[..., Any]) -> bool:
    """Tell whether a weight is detached to be written into a state dict: that is of what rests, also inside a pass."""
    return func is torch.Tensor.detach and _writes_a_state_dict(2)


def _writes_a_state_dict(depth: int) -> bool:
    """Tell whether the function that is `depth` calls above the one that asks writes a state dict."""
    return sys._getframe(depth + 1).f_code.co_name == "_save_to_state_dict"  # noqa: SLF001


def _is_view_of(result: Any, tensor: torch.Tensor) -> bool:
    if isinstance(result, list | tuple):
        return any(_is_view_of(each, tensor) for each in result)
    if not isinstance(result, torch.Tensor) or result is tensor or not _is_strided(result) or not _is_strided(tensor):
        return False
    mine, its = as_they_were([tensor], lambda: [_storage_id(each) for each in (tensor, result)])
    return mine == its


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 (fake ones have no data_ptr)


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensors.is_plain(tensor) and tensor.layout == torch.strided and not is_functorch_wrapped_tensor(tensor)


def _refuse_making_a_parameter() -> None:
    """Say what to do instead where torch would say that it cannot make a Parameter of a class that it does not know."""
    if sys._getframe(2).f_code is _MAKES_PARAMETERS:  # noqa: SLF001 (of whoever called the operation)
        raise ConflictError(
            "nn.Parameter was given a weight of an offloaded module; give it `weight.detach()`, or change the module "
            "(weight norm, pruning, adapters) inside `with offload_of(module).edit():`"
        )


def _is_the_same_memory(tensor: torch.Tensor, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and as_they_were([tensor], has_memory_of, tensor, other)


def _names(func: Callable[..., Any]) -> tuple[str, str]:
    """Return the name of a function, and for the getter or setter of an attribute the name of that."""
    name = getattr(func, "__name__", "")
    attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else ""
    return name, attribute


def _resting_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, _Resting):
            yield cast("torch.Tensor", value)
        elif isinstance(value, list | tuple):
            yield from _resting_in(value)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, _Resting):
        return change(cast("torch.Tensor", value))
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _keepers_of(tensor: torch.Tensor) -> list[Keeper]:
    """Return those that know `tensor` now: none for what has the class by accident."""
    keepers = (ref() for ref in cast("_Resting", tensor).keepers)
    return [keeper for keeper in keepers if keeper is not None and keeper.knows(tensor)]


def _reading(keepers: Iterable[Keeper]) -> Keeper | None:
    """Return the one in whose pass the calling thread is, or None."""
    return next((keeper for keeper in keepers if keeper.is_inside()), None)


def _others(tensor: torch.Tensor, keeper: Keeper) -> tuple[weakref.ref[Keeper], ...]:
    return tuple(ref for ref in getattr(type(tensor), "keepers", ()) if ref() is not None and ref() is not keeper)


def _check(tensor: torch.Tensor) -> None:
    for keeper in _keepers_of(tensor):
        keeper.check(tensor)


def _on_device_or_checked(tensor: torch.Tensor, reader: Callable[..., Any]) -> torch.Tensor | None:
    """Return what is on the device for `tensor` inside a pass; else None, where its memory may be touched."""
    reading = _reading(_keepers_of(tensor))
    if reading is None:
        _check(tensor)
        return None
    return reading.serve(tensor, reader)


def _resting_class(kind: type[torch.Tensor], keepers: tuple[weakref.ref[Keeper], ...]) -> type[torch.Tensor]:
    latest = keepers[-1]()
    classes: dict[Any, type[torch.Tensor]] = latest.__dict__.setdefault("_resting_classes", {}) if latest else {}
    key = kind, tuple(map(id, keepers))  # of references, which are one for each keeper
    if key not in classes:
        classes[key] = derived(kind, _Resting, {"keepers": keepers, **_methods(kind)})
    return classes[key]


def _methods(kind: type[torch.Tensor]) -> dict[str, Any]:
    """Return the methods that a class of wrappers has beyond torch's, which torch does not ask the class about either."""
    if not hasattr(kind, "__tensor_flatten__"):
        return {}
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__[: kind.__mro__.index(torch.Tensor)]):
        found |= {name: member for name, member in vars(base).items() if isinstance(member, types.FunctionType)}
    return {name: _answering(each) for name, each in found.items() if not name.startswith("_") and name not in _OWN}


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that reads inner tensors and its own class find those of what is on the device, or of what it was."""

    @functools.wraps(method)
    def answering(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_saved = _writes_a_state_dict(1)
        is_internal = not torch._C._is_torch_function_enabled()  # noqa: SLF001 (of code that wants the tensor itself)
        if is_saved:
            _check(self)
        placed = None if is_saved or is_internal else _on_device_or_checked(self, method)
        return as_they_were([self], method, self if placed is None else placed, *args, **kwargs)

    return answering


_OWN = frozenset(vars(_Resting))
