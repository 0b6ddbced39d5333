"""GGUF files of random blocks, written by the package of that name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor


def random_blocks(form: str, rows: int, columns: int, *, seed: int = 0) -> tuple[np.ndarray, Tensor]:
    """Rows of blocks of a format with scales of a common size, and the float32 values that they stand for."""
    kind = gguf.GGMLQuantizationType[form]
    weights, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, columns // weights, size_bytes), dtype=np.uint8)
    for at in _SCALES[form]:
        blocks[..., at + 1] = blocks[..., at + 1] & 0x83 | 0x10  # float16 of about 2 ** -10
    blocks = blocks.reshape(rows, -1)
    return blocks, torch.from_numpy(gguf.quants.dequantize(blocks, kind).astype(np.float32))


# Where blocks have float16 numbers.
_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
FORMATS = tuple(_SCALES)


def write_gguf(path: Path, tensors: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write float tensors of torch, and pairs of a format and blocks."""
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in (metadata or {}).items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=gguf.GGMLQuantizationType[tensor[0]])
        elif tensor.dtype == torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
