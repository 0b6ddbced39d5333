"""Weights for a model on the meta device, whichever way its files hold them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vramkit.errors import ConfigError
from vramkit.tensors import is_plain

__all__ = ["MOST_PARAMETERS", "load_weights", "most_parameters"]

# Bytes of what layers compute in: fp8 is widened before, and positions in fp64 are rounded where they are added.
_WIDTHS = (2, 4)


MOST_PARAMETERS = 10_000  # of a model whose config is all that is read: some times what any has


def most_parameters(files: Any) -> int:
    """How many parameters a model may have whose weights are in `files`, where one tensor may be the rows of four."""
    from vramkit.offload.checkpoint import read_checkpoint  # noqa: PLC0415 - the engine is needed only once weights are

    return 64 + 4 * len(read_checkpoint(files))


def load_weights(model: nn.Module, files: Any, saved: Any, quantization_config: Any, **options: Any) -> None:
    """Give a model on the meta device its weights: as they are, quantized as they are read, or as they were saved.

    Args:
        model: to be filled.
        files: of its weights, as in `load_mapped`.
        saved: the ``quantization_config`` in its config.json, or None.
        quantization_config: what the user asks for, or None.
        **options: for `load_mapped`. Without a `dtype`, weights of several dtypes get that of most, as they are computed
            with together; those of `keep_fp32` stay as they are.

    Raises:
        ConfigError: quantization is asked for, and the weights are quantized already.
        CheckpointError: the files do not fit.
    """
    if saved is None and quantization_config is None:
        from vramkit.offload import load_mapped  # noqa: PLC0415 - the engine is needed only once weights are

        load_mapped(model, files, **options)
        _in_one_dtype(model, options)
        if any(not is_plain(parameter) for parameter in model.parameters()):
            from vramkit.quant.files import note_stored  # noqa: PLC0415 - most checkpoints are loaded as they are

            note_stored(model)
        return
    from vramkit.quant.files import load_quantized, load_quantizing  # noqa: PLC0415

    if saved is None:
        load_quantizing(model, files, quantization_config, **options)
        _in_one_dtype(model, options)
    elif quantization_config is None:
        load_quantized(model, files, saved, **options)
    else:
        raise ConfigError(
            f"quantization_config was given for {type(model).__name__}, whose files are quantized already "
            f"({saved.get('backend', saved.get('quant_method'))}); leave it out, or load the original checkpoint"
        )


def _in_one_dtype(model: nn.Module, options: Mapping[str, Any]) -> None:
    if options.get("dtype") is not None:
        return
    wide = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (not is_plain(parameter) or parameter.dtype.itemsize in _WIDTHS)
    }
    kept = {name for name in wide if any(part in name for part in options.get("keep_fp32", ()))}
    found: Counter[torch.dtype] = Counter()  # in what weights compute, however few bits they are stored in
    for name in wide.keys() - kept:
        found[wide[name].dtype] += wide[name].numel()
    if len(found | Counter(wide[name].dtype for name in kept)) < 2:
        return
    common = found.most_common(1)[0][0]
    changed = 0
    for name, parameter in wide.items():
        wanted = torch.float32 if name in kept else common
        if parameter.dtype != wanted and is_plain(parameter):
            parameter.data = parameter.data.to(wanted)
            changed += name not in kept
    if changed:
        warnings.warn(
            f"{type(model).__name__}: its files hold {' and '.join(sorted(map(str, found)))}, which layers do not compute "
            f"with together; {changed} of {len(wide)} tensors were made {common}, the dtype of most. dtype=... chooses "
            "another one",
            stacklevel=2,
        )
