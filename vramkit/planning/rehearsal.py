"""Run a call once on twins without memory: which component computes when, at what peak, with how much work."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from vramkit.planning.deeds import Known
from vramkit.planning.device import Device
from vramkit.planning.ledger import Ledger, Segment
from vramkit.planning.watch import Watch

__all__ = ["Rehearsal", "rehearse"]

_LOGGING = ("diffusers", "transformers")  # by handlers of their own


@dataclasses.dataclass(slots=True)
class Rehearsal:
    """What one call would do."""

    segments: list[Segment]
    peak_bytes: int
    used_in_loops: dict[str, int]
    """Bytes of the weights that a loop over chunks uses, the most of each component."""


def rehearse(
    shadows: Mapping[str, nn.Module],
    entry_points: Mapping[str, tuple[str, ...]],
    call: Callable[[], object],
    *,
    device: torch.device,
    known: Known | None = None,
) -> Rehearsal:
    """Run `call`, which uses `shadows`, as if they were on `device`.

    A call that fails after something in it was not run a second time is run once more, and all that is in it: it may read
    what its components do beside what they return, such as the attention that a processor keeps, or what a hook notes.

    Args:
        shadows: the twins by name.
        entry_points: the methods of each that run it.
        call: what to run.
        device: where the computation will be.
        known: what calls of components did in rehearsals before, and gets what they do in this one.
    """
    known = Known() if known is None else known
    with contextlib.suppress(_NotRepeatable):
        return _rehearsed(shadows, entry_points, call, device, known)
    known.is_repeated = False
    return _rehearsed(shadows, entry_points, call, device, known)


class _NotRepeatable(Exception):  # noqa: N818 - no error, where all is run
    """A call failed that had parts which were not run again."""


def _rehearsed(
    shadows: Mapping[str, nn.Module],
    entry_points: Mapping[str, tuple[str, ...]],
    call: Callable[[], object],
    device: torch.device,
    known: Known,
) -> Rehearsal:
    # Kept until the end: a call may put others in their place, which would else be taken for them.
    held = [(tensor, name) for name, module in reversed(list(shadows.items())) for tensor in _held(module)]
    owners = {tensor.untyped_storage()._cdata: name for tensor, name in held}  # noqa: SLF001 (see Ledger)
    ledger = Ledger(owners, known.results, on_accelerator=device.type != "cpu")
    watch = Watch(ledger, known)
    with contextlib.ExitStack() as stack:
        for name, module in shadows.items():
            for method in entry_points[name]:
                stack.enter_context(watch.watching_component(name, module, method))
            for part in _alone(module):
                stack.enter_context(watch.watching_block(name, part, is_alone=True))
            for block in _alike(module):
                stack.enter_context(watch.watching_block(name, block))
            for layer in _layers_of_their_own(module):
                stack.enter_context(watch.watching_layer(name, layer))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to say is said when the call is made
        stack.enter_context(_unlogged())
        stack.enter_context(torch.random.fork_rng(devices=()))  # the call that follows draws what it would have drawn
        stack.enter_context(torch.no_grad())
        stack.enter_context(ledger)
        stack.enter_context(Device(device, ledger))
        try:
            call()
        except NotImplementedError:  # an operator that does nothing without memory, however often others ran
            raise
        except Exception as error:
            if watch.has_repeated:
                raise _NotRepeatable from error
            raise
    return Rehearsal(ledger.segments, ledger.peak_bytes, ledger.used_in_loops)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep to itself what libraries log in this thread, such as that a prompt is cut which stands for any."""
    here = threading.get_ident()

    def is_shown(record: logging.LogRecord) -> bool:
        return record.thread != here or record.levelno >= logging.ERROR

    handlers = [handler for name in _LOGGING for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(is_shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_shown)


def _held(module: nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):  # noqa: SLF001
            yield from (tensor for tensor in held.values() if isinstance(tensor, torch.Tensor))


def _alone(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that a component consists of, as the halves of an autoencoder."""
    yield from (part for part in module.children() if part._modules and not _is_prepared(part))  # noqa: SLF001


def _alike(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of lists that hold several of one class."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            blocks = [block for block in part if isinstance(block, nn.Module)]  # a list may hold None
            kinds = Counter(map(type, blocks))
            yield from (block for block in blocks if kinds[type(block)] > 1 and not _is_prepared(block))


def _is_prepared(block: nn.Module) -> bool:
    """Whether something is called before it, which may keep things for each block, as weight norms keep weights."""
    return "forward" in vars(block) or any(inner._forward_pre_hooks for inner in block.modules())  # noqa: SLF001


def _layers_of_their_own(module: nn.Module) -> Iterator[nn.Module]:
    """Yield layers that are no operators of torch, as norms: autoencoders call each for every frame, tile or stripe."""
    for part in module.modules():
        is_leaf = part._parameters and not part._modules  # noqa: SLF001
        is_own = "forward" in vars(part) or part._forward_pre_hooks  # noqa: SLF001
        if is_leaf and not is_own and not type(part).__module__.startswith("torch."):
            yield part
