"""What a text-to-video call may be given: every check runs before anything is computed."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch

from vramkit.errors import ConfigError

Prompt = str | list[str] | None
_PACKAGE = f"{__name__.partition('.')[0]}."
Generators = torch.Generator | list[torch.Generator] | None


def plain_number(value: Any) -> Any:
    """Return a number of numpy or a tensor of one number as Python's own; everything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def check_positive(**counts: Any) -> None:
    """Refuse counts that are not whole numbers of at least one."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"{name} is {count!r}; expected a whole number of at least 1")


def check_finite(**numbers: Any) -> None:
    """Refuse what is no number, and the infinite ones."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or not math.isfinite(number):
            raise ConfigError(f"{name} is {number!r}; expected a finite number")


def falling_numbers(name: str, given: Any, *, most: float, to_zero: bool) -> list[float]:
    """Return the schedule that a call is given as plain numbers; refuse one that does not fall from ``most`` at most."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ConfigError(f"{name} is {given!r}; expected a list of numbers, one for each step")
    numbers = [plain_number(number) for number in given]
    check_finite(**{f"{name}[{at}]": number for at, number in enumerate(numbers)})
    falling = all(before >= after for before, after in pairwise(numbers))  # a step of no length does no harm
    if not numbers or numbers[0] > most or not falling or not (numbers[-1] > 0 or (to_zero and numbers[-1] == 0)):
        end = "0 at least" if to_zero else "above 0"
        raise ConfigError(f"{name} is {numbers}; expected falling numbers, from {most:g} at most to {end}")
    return numbers


def check_tensor(
    name: str, given: Any, shape: Sequence[int | str], *, floating: bool = True, because: str = ""
) -> None:
    """Refuse what is no dense tensor of such a shape; names in it stand for any number from one up."""
    expected = f"({', '.join(map(str, shape))}){because and f', {because}'}"
    if not isinstance(given, torch.Tensor):
        raise ConfigError(f"{name} is a {type(given).__name__}; expected a tensor of shape {expected}")
    if given.is_complex() or (floating and not given.is_floating_point()):
        raise ConfigError(f"{name} is {given.dtype}; expected {'floating' if floating else 'real'} values")
    if given.layout is not torch.strided:
        raise ConfigError(f"{name} is {given.layout}; expected a dense tensor: give {name}.to_dense()")
    fits = all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for wanted, size in zip(shape, given.shape, strict=False)
    )
    if given.ndim != len(shape) or not fits:
        raise ConfigError(f"{name} has shape {tuple(given.shape)}; expected {expected}")


def check_choices(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names outside ``known``."""
    unknown = [choice for choice in given if choice not in known]
    if unknown:
        raise ConfigError(f"{name} has {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")


def check_size(height: int, width: int, *, multiple: int) -> None:
    """Refuse sizes that do not split into patches, naming the near ones that do."""
    for name, pixels in (("height", height), ("width", width)):
        if pixels % multiple:
            below = pixels // multiple * multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ConfigError(f"{name} is {pixels}; expected a multiple of {multiple}, for example {near}")


def check_scheduler(scheduler: Any, asked: Sequence[str], predictions: Sequence[str]) -> None:
    """Refuse schedulers that these pipelines cannot drive.

    ``asked`` is what set_timesteps is given beside steps; ``predictions`` are those of the model, any if there are none.
    """
    name = type(scheduler).__name__
    way = (
        f"take pipeline.scheduler = vramkit.{name}.from_config(scheduler.config), or another scheduler that vramkit has"
    )
    step = inspect.signature(scheduler.step).parameters.values()
    needed = {each.name for each in step if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD}
    if unknown := sorted(needed - {"model_output", "timestep", "sample"}):
        raise ConfigError(f"the scheduler's {name}.step asks for {', '.join(unknown)}, which is not known here; {way}")
    settable = inspect.signature(scheduler.set_timesteps).parameters
    if missing := [argument for argument in asked if argument not in settable]:
        raise ConfigError(f"the scheduler's {name}.set_timesteps takes no {' and no '.join(missing)}; {way}")
    if (deviation := float(getattr(scheduler, "init_noise_sigma", 1.0))) != 1:
        raise ConfigError(f"the scheduler {name} asks for noise of deviation {deviation:g}, expected 1; {way}")
    kind = (
        "flow_prediction" if name.startswith("FlowMatch") else getattr(scheduler, "config", {}).get("prediction_type")
    )
    if predictions and kind is not None and kind not in predictions:
        raise ConfigError(
            f"the scheduler {name} goes by {kind}, and this checkpoint's model makes {' or '.join(predictions)}: take the "
            "scheduler of the checkpoint, or one of its family"
        )


def warn_caller(message: str) -> None:
    """Warn where this package was called from."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def whole_patches(name: str, pixels: int, *, multiple: int) -> int:
    """Round a size down to a ``multiple`` of pixels, with a warning as `whole_latent_frames` gives it."""
    rounded = pixels // multiple * multiple
    if rounded in (0, pixels):
        return pixels
    warn_caller(f"{name} is {pixels}, but this checkpoint needs a multiple of {multiple}. Making {rounded} pixels")
    return rounded


def whole_latent_frames(num_frames: int, *, factor: int, down: bool = False) -> int:
    """Round to ``factor`` * k + 1 frames, with a warning, exactly as the published pipeline does; some always round down."""
    if num_frames % factor == 1 or factor == 1:
        return num_frames
    rounded = (num_frames - down) // factor * factor + 1
    warn_caller(
        f"num_frames is {num_frames}, but a latent frame stands for {factor} frames: it has to be {factor} * k + 1. "
        f"Making {rounded} frames"
    )
    return rounded


def check_prompts(
    prompt: Prompt,
    negative_prompt: Prompt,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    *,
    channels: int | None = None,
) -> int:
    """Return how many prompts there are; refuse what is missing, given twice or of unequal number.

    ``channels`` are those of ready embeddings, if the transformer is known.
    """
    batch = _count("prompt", prompt, prompt_embeds)
    if batch is None:
        raise ConfigError("there is no prompt: give prompt or prompt_embeds")
    negative_batch = _count("negative_prompt", negative_prompt, negative_prompt_embeds)
    one_for_all = negative_batch is None or isinstance(negative_prompt, str)
    if not one_for_all and negative_batch != batch:
        raise ConfigError(f"there are {batch} prompts and {negative_batch} negative prompts: give one for each")
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is not None and channels not in (None, embeds.shape[-1]):
            raise ConfigError(
                f"{name} has {embeds.shape[-1]} channels; the transformer takes {channels}: encode the prompt with the text "
                "encoder of this checkpoint"
            )
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        width, negative_width = prompt_embeds.shape[-1], negative_prompt_embeds.shape[-1]
        if width != negative_width:
            raise ConfigError(f"prompt_embeds has {width} channels, negative_prompt_embeds {negative_width}")
    return batch


def _count(name: str, texts: Prompt, embeds: torch.Tensor | None) -> int | None:
    if texts is not None and embeds is not None:
        raise ConfigError(f"both {name} and {name}_embeds are given: give one of the two")
    if embeds is not None:
        check_tensor(f"{name}_embeds", embeds, ("prompts", "tokens", "channels"))
        return embeds.shape[0]
    if texts is None:
        return None
    if isinstance(texts, str):
        return 1
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name} is {texts!r}; expected a string or a list of strings")
    return len(texts)


def check_noise(
    shape: tuple[int, ...], generator: Generators, latents: torch.Tensor | None, *, device: torch.device
) -> None:
    """Refuse given latents of another shape, and generators that cannot make the noise."""
    if latents is not None:
        check_tensor("latents", latents, shape, because="as height, width, frames and prompts ask for")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ConfigError(
            f"there is a list of {len(generator)} generators for {shape[0]} clips: give one for each clip"
        )
    given = [] if generator is None else generator if isinstance(generator, list) else [generator]
    for each in given:
        if not isinstance(each, torch.Generator):
            raise ConfigError(
                f"generator is a {type(each).__name__}; expected a torch.Generator, such as "
                "torch.Generator().manual_seed(0), or a list of them"
            )
        if each.device.type not in ("cpu", device.type):
            raise ConfigError(
                f"the generator is on {each.device} and the latents are on {device}: use a generator of that device, or "
                "one on the CPU"
            )


def make_noise(
    shape: tuple[int, ...], generator: Generators, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw noise on the generator's device, clip by clip when there is one generator per clip.

    The dtype counts: another one draws other noise, not the same in fewer digits.
    """
    if isinstance(generator, list):
        return torch.cat([make_noise((1, *shape[1:]), each, device=device, dtype=dtype) for each in generator])
    drawn_on = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=drawn_on, dtype=dtype).to(device)
