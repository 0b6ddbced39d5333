"""Checkpoints of random weights in the published folder layouts, for `from_pretrained` of every library.

The weights are made on the device, where that takes no time, and written tensor by tensor by several threads, so that it
takes as long as the memory or the disk behind the folder does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS, Network
from vramkit.demo.tokenizer import write_tokenizer
from vramkit.memory import GIB, available_ram_bytes
from vramkit.offload import parameters_on_meta
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.pipelines.loading.auto_model import AutoModel
from vramkit.tensors import byte_view

__all__ = [
    "empty",
    "make_room",
    "random_values",
    "room_for",
    "write_adapter",
    "write_model",
    "write_network",
    "write_parts",
    "write_wan",
]

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_SHARD_BYTES = 5 * 10**9  # as the published ones
_TINY_SHARD_BYTES = 100_000
_THREADS = 8
_MEMORY = Path("/dev/shm")
_RAM_SHARE = 2.5  # files in RAM leave room for a copy of the weights, and for one that is rounded up
_WAN_PARTS = {"transformer": "wan-14b", "text_encoder": "umt5-xxl"}
_TINY_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


def empty(network: Network, scale: str, *, library: str = "diffusers") -> nn.Module:
    """Build a network of a library without weights, with the buffers that no file holds."""
    config = network.config_at(scale)
    with parameters_on_meta():
        if network.config_class:
            import transformers

            given = getattr(transformers, network.config_class)(**config, architectures=[network.class_name])
            model = getattr(transformers, network.class_name)(given)
        elif library == "diffusers":
            import diffusers

            model = getattr(diffusers, network.class_name)(**config)
        else:
            model = AutoModel.class_named(network.class_name).from_config(config)
    found: nn.Module = model.eval().requires_grad_(False)
    return found


def write_network(folder: Path, name: str, scale: str, device: torch.device) -> Path:
    """Write the checkpoint of a network below `folder`, unless it is there; returns its folder."""
    network, target = NETWORKS[name], folder / name
    if (target / "config.json").exists():
        return target
    if scale != "smoke":
        make_room(folder, network.bytes)
    model = empty(network, scale)
    stem = "model" if network.config_class else "diffusion_pytorch_model"
    _write_weights(target, stem, model, _file_dtypes(model), scale, device)
    config: Any = model
    if network.config_class:
        config.config.save_pretrained(target)
    else:
        config.save_config(target)
    return target


def write_model(path: Path, config: dict[str, Any], device: torch.device) -> Path:
    """Write one of our models in bf16 as a single file, from its config.json, unless it is there."""
    if not path.exists():
        with torch.device("meta"):
            model = AutoModel.class_named(config["_class_name"]).from_config(config)
        make_room(path.parent, 2 * sum(value.numel() for value in model.state_dict().values()), keep=path.stem)
        generator = torch.Generator(device=device).manual_seed(0)
        state = model.state_dict().items()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, {name: random_values(name, value, torch.bfloat16, generator) for name, value in state})
    return path


def write_wan(folder: Path, scale: str, device: torch.device) -> Path:
    """Write the whole published checkpoint of Wan2.1-14B into a folder below `folder`, unless it is there."""
    target = folder / "Wan2.1-T2V-14B-Diffusers"
    parts = {part: write_network(folder, name, scale, device) for part, name in _WAN_PARTS.items()}
    if (target / "model_index.json").exists():
        return target
    import diffusers
    from transformers import AutoTokenizer

    target.mkdir(parents=True, exist_ok=True)
    for part, written in parts.items():
        (target / part).symlink_to(written.resolve(), target_is_directory=True)
    with parameters_on_meta():
        vae = diffusers.AutoencoderKLWan(**(_TINY_VAE if scale == "smoke" else {}))
    _write_weights(
        target / "vae", "diffusion_pytorch_model", vae, dict.fromkeys(dict(vae.named_parameters()), torch.float32),
        scale, device,
    )  # fmt: skip
    vae.save_config(target / "vae")
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(target / "scheduler")
    write_tokenizer(target / "tokenizer")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", type(AutoTokenizer.from_pretrained(target / "tokenizer")).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2))
    return target


def write_parts(target: Path, parts: Mapping[str, Any], scale: str, device: torch.device) -> None:
    """Write models of diffusers that have no weights yet, and what else there is, each into its folder in `target`."""
    dtypes = {name: _file_dtypes(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    if scale != "smoke":
        sizes = (value.numel() * dtypes[name][key].itemsize for name in dtypes for key, value in _held(parts[name]))
        make_room(target.parent, sum(sizes))
    for name, part in parts.items():
        if name in dtypes:
            _write_weights(target / name, "diffusion_pytorch_model", part, dtypes[name], scale, device)
        part.save_config(target / name)


def write_adapter(path: Path, model: nn.Module, *, rank: int, seed: int) -> Path:
    """Write an adapter for the attention layers of a transformer, with the names of diffusers, unless it is there."""
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        weights: dict[str, Tensor] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
                down = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
                up = torch.randn(layer.out_features, rank, generator=generator) * 0.02
                weights[f"transformer.{name}.lora_A.weight"] = down.to(torch.bfloat16)
                weights[f"transformer.{name}.lora_B.weight"] = up.to(torch.bfloat16)
        write_checkpoint(path, weights)
    return path


def random_values(name: str, parameter: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values in host memory that keep the size of what flows through them: around 1 for norms, else around 0."""
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
    values = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
    values.normal_(0.0, 0.02 if fan_in == 1 else fan_in**-0.5, generator=generator)
    if name.endswith(("weight", "gamma")) and parameter.numel() == parameter.shape[0]:
        values.add_(1.0)
    return values.cpu()


def room_for(size_bytes: int) -> Path:
    """Return where a checkpoint of this size is written fastest and fits: RAM, else the folder for temporary files.

    Raises:
        SystemExit: nowhere.
    """
    disk = Path(tempfile.gettempdir())
    if _MEMORY.is_dir() and _has_room(_MEMORY, size_bytes) and available_ram_bytes() > _RAM_SHARE * size_bytes:
        return _MEMORY
    if _has_room(disk, size_bytes):
        return disk
    raise SystemExit(f"{size_bytes / GIB:.0f} GiB fit neither into {_MEMORY} nor into {disk}; give --folder")


def make_room(folder: Path, size_bytes: int, *, keep: str = "") -> None:
    """Delete checkpoints of ours in `folder`, the oldest first, until a new one fits; none of the same clip as `keep`."""
    clip = keep.rpartition("-")[0]
    ours = [folder / name for name in NETWORKS] + [
        path
        for pattern in ("clip-*.safetensors", "foreign-*")
        for path in folder.glob(pattern)
        if not clip or not path.name.startswith(clip)
    ]
    for path in sorted((path for path in ours if path.exists()), key=lambda path: path.stat().st_mtime):
        if _has_room(folder, size_bytes):
            return
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _has_room(folder: Path, size_bytes: int) -> bool:
    free = shutil.disk_usage(folder).free
    if _MEMORY in (folder, *folder.resolve().parents):  # which may be larger than what is left of the RAM
        free = min(free, available_ram_bytes())
    return os.access(folder, os.W_OK) and free > 1.05 * size_bytes


def _file_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes that `from_pretrained(torch_dtype=torch.bfloat16)` gives weights, and files of them have."""
    is_diffusers = "diffusers" in type(model).__module__  # transformers keeps them for fp16 alone
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if is_diffusers else set()
    return {
        name: torch.float32 if kept & set(name.split(".")) else torch.bfloat16
        for name, _ in _held(model)
    }  # fmt: skip


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a file of the model has, tied parameters once."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: Path
    seed: int
    weights: dict[str, tuple[Tensor, torch.dtype]]  # with the dtype in the file; what is on the meta device is drawn


def _write_weights(
    folder: Path, stem: str, model: nn.Module, dtypes: dict[str, torch.dtype], scale: str, device: torch.device
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(model, dtypes, _TINY_SHARD_BYTES if scale == "smoke" else _SHARD_BYTES))
    names = [
        f"{stem}-{at:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else f"{stem}.safetensors"
        for at in range(1, len(parts) + 1)
    ]
    shards = [_Shard(folder / name, at, part) for at, (name, part) in enumerate(zip(names, parts, strict=True))]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda shard: _write_shard(shard, device), shards))
    if len(parts) > 1:
        placed = {name: shard.path.name for shard in shards for name in shard.weights}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": placed}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _parts(
    model: nn.Module, dtypes: dict[str, torch.dtype], shard_bytes: int
) -> Iterator[dict[str, tuple[Tensor, torch.dtype]]]:
    part: dict[str, tuple[Tensor, torch.dtype]] = {}
    size = 0
    for name, parameter in _held(model):
        own = parameter.numel() * dtypes[name].itemsize
        if part and size + own > shard_bytes:
            yield part
            part, size = {}, 0
        part[name] = parameter, dtypes[name]
        size += own
    yield part


def _write_shard(shard: _Shard, device: torch.device) -> int:
    """Write one safetensors file with the note by which transformers knows whose it is; return the bytes of the weights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (parameter, dtype) in shard.weights.items():
        start, end = end, end + math.prod(parameter.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(shard.seed)
    with shard.path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (parameter, dtype) in shard.weights.items():
            drawn = random_values(name, parameter, dtype, generator) if parameter.is_meta else parameter.to(dtype)
            file.write(byte_view(drawn).numpy().data)
    return end
