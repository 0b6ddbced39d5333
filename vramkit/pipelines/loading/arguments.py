"""The arguments of ``from_pretrained`` as scripts for diffusers give them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch

from vramkit.errors import ConfigError
from vramkit.memory import parse_bytes
from vramkit.pipelines.loading.hub import DOWNLOAD
from vramkit.pipelines.loading.options import refuse_arguments

__all__ = [
    "Dtype",
    "device_of",
    "download_arguments",
    "dtype_of",
    "other_arguments",
    "saving_arguments",
    "wanted_dtype",
]

Dtype = torch.dtype | str

_PICKLES = "only safetensors are read, since pickles can run code"
_PLANS = 'load without it and choose: pipeline.to("cuda"), enable_group_offload("cuda") or enable_model_cpu_offload()'
_CODE = "code from repositories is never run; the classes are those of vramkit.pipelines"
_NOTHING = "there is nothing here that it could ask for; leave it out"
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "max_memory": _PLANS,
        "offload_folder": 'enable_group_offload("cuda", offload_to_disk_path=...) writes weights to a disk',
        "offload_state_dict": _NOTHING,
        "custom_pipeline": _CODE,
        "custom_revision": _CODE,
        "trust_remote_code": _CODE,
        "load_connected_pipeline": "load the other pipeline by itself",
        "use_onnx": _NOTHING,
        "provider": _NOTHING,
        "sess_options": _NOTHING,
        "provider_options": _NOTHING,
        "use_flashpack": _PICKLES,
        "from_flax": _PICKLES,
        "disable_mmap": "weights are mapped, and read when they are used; leave it out",
        "proxies": "the environment variables HTTPS_PROXY and HTTP_PROXY say it",
        "mirror": "the environment variable HF_ENDPOINT says it",
        "resume_download": "interrupted downloads always go on where they stopped; leave it out",
        "output_loading_info": "what does not fit is an error or a warning; leave it out",
        "ignore_mismatched_sizes": "what does not fit is an error; leave it out",
        "original_config": "config= takes the published config.json of the model, its folder or repository",
        "config_revision": "config= takes a folder, such as one that `hf download --revision` made",
    }
)
_UPLOAD = "`hf upload` does it, with the folder that was written"
_SAVING: Mapping[str, str] = MappingProxyType(
    {
        "safe_serialization": "only safetensors are written; leave it out",
        "is_main_process": "call it on one rank; leave it out",
        "save_function": "only safetensors are written; leave it out",
        "use_flashpack": "only safetensors are written; leave it out",
        "push_to_hub": _UPLOAD,
        "repo_id": _UPLOAD,
        "commit_message": _UPLOAD,
        "private": _UPLOAD,
        "create_pr": _UPLOAD,
        "token": _UPLOAD,
    }
)
_SAVES = ("safe_serialization", "is_main_process")  # in any case: only False could change something
# These hold in any case, and only their opposite could change something.
_HOLDS = ("low_cpu_mem_usage", "use_safetensors")


def other_arguments(call: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` without the loading arguments of diffusers that change nothing here.

    Raises:
        ConfigError: one that asks for something that there is not, with the way here.
    """
    if given.get("use_safetensors") is False:
        raise ConfigError(f"{call}: use_safetensors=False; {_PICKLES}: leave it out")
    refuse_arguments(call, {name: given[name] for name in _REFUSED if name in given}, _REFUSED)
    return {name: value for name, value in given.items() if name not in _REFUSED and name not in _HOLDS}


def download_arguments(call: str, given: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Return `given` without what changes nothing here, all of it for `local_folder` and `local_file` or `known`.

    Raises:
        ConfigError: an argument that `call` does not have, or one as in `other_arguments`.
    """
    others = other_arguments(call, given)
    if unknown := sorted(others.keys() - DOWNLOAD - set(known)):
        raise ConfigError(f"{call} has no argument {', '.join(unknown)}")
    return others


def saving_arguments(
    variant: str | None, max_shard_size: int | str | None, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``save_pretrained`` was given for the weights' files, sizes in bytes; what is None is left out.

    Raises:
        ConfigError: a value that cannot be meant, or one of `others` as in `refuse_saving`.
    """
    from vramkit.offload.checkpoint import name_of  # noqa: PLC0415 - the engine is needed only once weights are

    refuse_saving(others)
    name_of("", variant)
    size = None if max_shard_size is None else parse_bytes(max_shard_size)
    return {name: value for name, value in (("variant", variant), ("max_shard_size", size)) if value is not None}


def refuse_saving(others: Mapping[str, Any]) -> None:
    """Refuse arguments of diffusers' ``save_pretrained`` that ask for something else than is done here.

    Raises:
        ConfigError: one of those, or an argument that it does not have either.
    """
    if declined := [name for name in _SAVES if others.get(name) is False]:
        raise ConfigError(f"save_pretrained: {declined[0]}=False is not taken; {_SAVING[declined[0]]}")
    refuse_arguments("save_pretrained", {name: others[name] for name in others if name not in _SAVES}, _SAVING)


def wanted_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """Return the one that is given of an argument's two names."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ConfigError(
            f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one argument; give one of them"
        )
    return torch_dtype if dtype is None else dtype


def dtype_of(name: Dtype | None) -> torch.dtype | None:
    """Return the dtype that a name such as "bfloat16" or "torch.bfloat16" stands for; "auto" is that of the files, None."""
    if name is None or name == "auto":
        return None
    if isinstance(name, torch.dtype):
        return name
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f'dtype is {name!r}; expected a floating dtype such as torch.bfloat16 or "bfloat16", or "auto"'
        )
    return found


def device_of(device_map: Any) -> torch.device | None:
    """Return the one device that a ``device_map`` asks for.

    Raises:
        ConfigError: a plan over several devices, or no device.
    """
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    if isinstance(device_map, Mapping) and len({*map(str, device_map.values())}) == 1 and "" in device_map:
        return device_of(device_map[""])
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return torch.device("cuda", device_map)
    try:
        if isinstance(device_map, str):
            return torch.device(device_map)
    except RuntimeError:
        pass  # "balanced", "auto" and the like
    raise ConfigError(
        f'device_map is {device_map!r}; expected one device, such as "cuda". For plans over memory: {_PLANS}'
    )
