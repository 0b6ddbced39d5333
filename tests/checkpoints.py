"""Tiny Wan checkpoints in the published folder layout, written by the libraries that wrote the real ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vramkit.demo.tokenizer import write_tokenizer

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
TEXT_ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
UNIPC = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
    "flow_shift": 3.0,
}


def write_wan_checkpoint(
    folder: Path,
    *,
    scheduler: str = "unipc",
    seed: int = 0,
    max_shard_size: str = "10GB",
    variant: str | None = None,
    transformer: Mapping[str, Any] = MappingProxyType({}),
    vae: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a whole checkpoint with random weights of a few hundred KB and return its folder.

    transformer and vae change their configs.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    vocab_size = write_tokenizer(folder / "tokenizer")
    schedulers: dict[str, Any] = {
        "unipc": lambda: UniPCMultistepScheduler(**UNIPC),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **TEXT_ENCODER)).eval()
    for parameter in text_encoder.parameters():
        # The class's own initialization is so small that its output hardly depends on the prompt.
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder,
        transformer=_noisy(WanTransformer3DModel(**TRANSFORMER | transformer)),
        vae=_noisy(AutoencoderKLWan(**VAE | vae)),
        scheduler=schedulers[scheduler](),
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None as a value is written as null."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_oracle(folder: Path, **options: Any) -> Any:
    """Load the folder with diffusers, quietly, in float32 unless told otherwise."""
    from diffusers import WanPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = WanPipeline.from_pretrained(folder, **({"torch_dtype": torch.float32} | options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _noisy(model: torch.nn.Module) -> torch.nn.Module:
    """Move one-dimensional parameters off their ones and zeros, so that a swapped norm or bias shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or 1 in parameter.shape:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
