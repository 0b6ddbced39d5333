"""The call that is planned for: with what a pipeline or a module is called, and whether another call asks for more."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from vramkit.errors import ConfigError, VramkitError
from vramkit.extras import extra
from vramkit.offload.arguments import with_tensors
from vramkit.planning.extents import Extent
from vramkit.planning.generation import Generation

__all__ = ["Arguments", "Example", "PlannedCall", "arguments_of", "module_calls", "pipeline_call"]

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Example: TypeAlias = Arguments | Generation
_KNOWN_BYTES = 2**18

# As long as any prompt that is not cut: what is planned for it holds for shorter ones.
_LONG_PROMPT = "a white ferret on a log by the sea " * 64
# What changes neither bytes nor work of a step.
_FREE = frozenset({
    "callback",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "generator",
    "num_inference_steps",
    "return_dict",
})  # fmt: skip
_STEPS = 4  # as many as tell what steps do: schedulers keep up to three results
_NOTHING = Extent.of(None)
_PROSE = ("prompt", "text", "lyrics", "caption")  # in the names of arguments that are read, not chosen from
_SIZES = ("height", "width", "frames", "per_prompt")  # names of arguments that end so are counts from 1 on
_MISTAKES = (TypeError, AttributeError, LookupError, ValueError, AssertionError)  # of arguments
_SAY = "say what the call will be by its arguments (height=, prompt=, image= ...)"
_GIVE = (
    "give a tuple of arguments, a mapping of keyword arguments by their names, or one argument alone (one that is itself a "
    "tuple or a mapping stands in a tuple)"
)
_DRAWN = ("generator", "callback_on_step_end", "callback")


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedCall:
    """The arguments of a call by name, defaults included, and how it is made on a twin."""

    arguments: Mapping[str, Any]
    make: Callable[[Any], object]
    steps: float = 1.0
    """Denoising steps of the call for each one that is made on a twin."""
    extents: Mapping[str, Extent] = dataclasses.field(default_factory=dict)
    """How much each argument asked for when it was given."""

    def __post_init__(self) -> None:
        """Note what the arguments ask for, unless that is given."""
        if not self.extents:
            object.__setattr__(self, "extents", {name: Extent.of(value) for name, value in self.arguments.items()})

    def described(self) -> dict[str, Any]:
        """Return the arguments as plain data: numbers as they are, texts cut, everything else by kind and size."""
        return {name: _described(value) for name, value in self.arguments.items() if value is not None}

    def covers(self, other: PlannedCall) -> bool:
        """Whether what was planned for this call holds for `other`: nothing in it is larger, or of another kind.

        `vramkit.planning.extents` says what is looked at, and what is not.
        """
        if (self.arguments.get("latents") is None) is not (other.arguments.get("latents") is None):
            return False  # many pipelines take the size of the clip from them, whatever else is said
        names = (self.extents.keys() | other.extents.keys()) - _FREE
        if any(_chosen(name, self.arguments.get(name)) != _chosen(name, other.arguments.get(name)) for name in names):
            return False
        return all(other.extents.get(name, _NOTHING).is_within(self.extents.get(name, _NOTHING)) for name in names)

    def beside(self, part: PlannedCall, *, is_first: bool) -> PlannedCall:
        """Return this call of a pipeline, and before or after it `part`, a call of components."""

        def make(twin: Any) -> None:
            if is_first:
                part.make(twin.components)
            self.make(twin)
            if not is_first:
                part.make(twin.components)

        return dataclasses.replace(self, make=make)


def _chosen(name: str, value: Any) -> object:
    """Return what a text chooses by being that and no other, as a mode does; None where it only asks for its length."""
    if not isinstance(value, str) or any(part in name for part in _PROSE):
        return None
    return value == "latent" if name == "output_type" else value  # every other output is decoded in the same way


def pipeline_call(pipeline: Any, given: Mapping[str, Any], *, are_given: bool = False) -> PlannedCall:
    """Say how `pipeline` is called with the arguments `given`, and what it takes itself for those that are not.

    ``batch`` stands for as many clips or pictures per prompt. Without a prompt a long one is taken; without a picture that
    is asked for, a black one. Of arguments that `are_given` before there is a call, those with which it fails are a
    ConfigError when it is made; a call that comes fails as it would by itself.

    Raises:
        ConfigError: an argument that the pipeline does not take, or a size below 1.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    known = list(parameters)[1:]
    given = dict(given)
    if "batch" in given:
        per_prompt = next((name for name in known if name.startswith("num_") and name.endswith("_per_prompt")), None)
        if per_prompt is not None:
            given[per_prompt] = given.pop("batch")
    unknown = sorted(given.keys() - set(known))
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if takes_all:  # and passes over most of it
        unknown = [name for name in unknown if are_given and difflib.get_close_matches(name, known, cutoff=0.8)]
    if unknown:
        raise ConfigError(
            f"{type(pipeline).__name__} takes no {unknown[0]!r}; the call that is planned may have {', '.join(known)}"
        )
    if are_given:
        _refuse_nothing(given)
    make = functools.partial(_call_given, dict(given)) if are_given else _call
    given = _completed(parameters, given)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    rehearsed = {name: value for name, value in given.items() if name not in _DRAWN}
    steps = given.get("num_inference_steps", defaults.get("num_inference_steps"))
    if isinstance(steps, int) and steps > _STEPS and "timesteps" not in given and "sigmas" not in given:
        rehearsed["num_inference_steps"] = _STEPS
        return PlannedCall({**defaults, **given}, functools.partial(make, rehearsed), steps / _STEPS)
    return PlannedCall({**defaults, **given}, functools.partial(make, rehearsed))


def _refuse_nothing(given: Mapping[str, Any]) -> None:
    """Raise ConfigError where a size is none."""
    for name, value in given.items():
        if name.endswith(_SIZES) and isinstance(value, int) and value < 1:
            raise ConfigError(f"{name}={value} was given for the call that is planned; expected at least 1")


def _call_given(given: Mapping[str, Any], rehearsed: dict[str, Any], twin: Any) -> None:
    """Call a twin, and say of an error which arguments `given` it comes of.

    Raises:
        ConfigError: the call failed, and not because of what has no memory.
    """
    with _explained(functools.partial(_asked_of, twin, given), _SAY):
        _call(rehearsed, twin)


def _call(given: dict[str, Any], twin: Any) -> None:
    """Call a twin of a pipeline; what the caller has lies on the device until the end."""
    made: dict[int, torch.Tensor] = {}  # what is given twice counts once

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _stand_in(tensor)
        return made[id(tensor)]

    held = with_tensors(given, stand_in)
    small_bytes = sum(tensor.nbytes for tensor in made.values() if not tensor.is_meta)
    small = torch.empty(small_bytes, dtype=torch.uint8, device="meta")  # of what has its values in host memory here
    twin(**held)
    del small


def _completed(parameters: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    has_text = any(name.startswith("prompt") for name in given)
    if "prompt" in parameters and not has_text:
        given["prompt"] = _LONG_PROMPT
    image = parameters.get("image")
    if image is not None and image.default is image.empty and "image" not in given:
        with extra("video", needed_for="a picture"):
            from PIL import Image  # noqa: PLC0415 - few calls need one

        sides = (given.get(name) or getattr(parameters.get(name), "default", None) for name in ("width", "height"))
        given["image"] = Image.new("RGB", tuple(side if isinstance(side, int) else 512 for side in sides))  # type: ignore[arg-type]
    return given


def arguments_of(example: Any) -> Arguments:
    """Read an example: a tuple of arguments, a mapping of keyword arguments, or one argument. Large tensors are not kept."""
    if isinstance(example, Mapping):
        return _copied(((), dict(example)))
    args = example if isinstance(example, tuple) else (example,)
    return _copied((args, {}))


def module_calls(examples: Mapping[str, Example], *, are_given: bool = False) -> PlannedCall:
    """Say how modules, by their names among the twins, or methods ("name.method"), are called one after the other.

    Of examples that `are_given` before there is a call, those that a forward cannot take are a ConfigError when it is made.
    """

    def make(twins: Mapping[str, Any]) -> None:
        for key, example in examples.items():
            name, _, method = key.rpartition(".")
            is_method = key not in twins
            if isinstance(example, Generation):
                example.make(twins[name])
                continue
            args, kwargs = _copied(example)
            told = functools.partial(_taken_by, key, twins, example)
            with _explained(told, _GIVE) if are_given else contextlib.nullcontext():
                (getattr(twins[name], method) if is_method else twins[key])(*args, **kwargs)

    return PlannedCall(
        {f"{key}.{name}": value for key, each in examples.items() for name, value in _named(each).items()}, make
    )


def _named(example: Example) -> dict[str, Any]:
    """Return the arguments of an example by name, or by number."""
    if isinstance(example, Generation):
        return dataclasses.asdict(example)
    args, kwargs = example
    return {**{str(index): value for index, value in enumerate(args)}, **kwargs}


def _asked_of(twin: Any, given: Mapping[str, Any]) -> str:
    """Say what the call of a pipeline is given."""
    return f"the call of {type(twin).__name__} that is planned for is given {_listed((), given) or 'nothing'}, and"


def _taken_by(name: str, twins: Mapping[str, Any], example: Arguments) -> str:
    """Say what an example gives, and what the forward of the module takes."""
    parameters = inspect.signature(twins[name].forward).parameters.values()
    taken = inspect.Signature([each.replace(annotation=each.empty) for each in parameters])
    return f"example= gives {name} ({_listed(*example)}), its forward takes {taken}, and the call"


@contextlib.contextmanager
def _explained(given: Callable[[], str], advice: str) -> Iterator[None]:
    """Say of an error what was `given`, and what would be right.

    Raises:
        ConfigError: what runs failed, and not because of sizes or of what has no memory.
    """
    try:
        yield
    except VramkitError:
        raise
    except _MISTAKES as error:
        raise ConfigError(f"{given()} fails: {type(error).__name__}: {error}; {advice}") from error


def _listed(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(_shown, args), *(f"{key}={_shown(value)}" for key, value in kwargs.items())])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shown(item)}' for key, item in value.items())}}}"
    return repr(value) if isinstance(value, str) else str(_described(value))


def _copied(arguments: Arguments) -> Arguments:
    """Copy arguments with all that they hold: a rehearsal may write to them, and caches grow by it.

    Large tensors are copied without memory; made inside a rehearsal they count as what the caller holds on the device.

    Raises:
        ConfigError: something in them cannot be copied.
    """
    try:
        with _Copies():
            return copy.deepcopy(arguments)
    except (TypeError, RuntimeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(
            f"an argument of the call cannot be copied ({error}), and the call is planned for with copies; run the module "
            "without fit, by apply_group_offloading, or give it what can be copied"
        ) from error


class _Copies(TorchFunctionMode):
    """Says how tensors are copied that lie anywhere in an argument."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy small tensors, make large ones anew without memory, run everything else."""
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _stand_in(tensor)
        return memo[id(tensor)]


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a rehearsal has in the place of `tensor`: values in host memory, or one without memory, which counts."""
    if tensor.layout is torch.strided and (tensor.is_meta or tensor.nbytes > _KNOWN_BYTES):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    with _disable_current_modes():  # what is small is not counted
        return tensor.detach().cpu().clone()


def _described(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= 40 else f"{len(value)} characters"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return type(value).__name__
