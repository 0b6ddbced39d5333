"""From the name that a user gives - a local folder or a Hugging Face repository - to a local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vramkit.errors import CheckpointError, ConfigError
from vramkit.extras import extra

_STEMS = ("diffusion_pytorch_model", "model")  # of weights, by diffusers and by transformers
_ADDRESS = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/((blob|resolve|raw)/(?P<revision>[^/]+)/)?"
    r"(?P<file>[^?]+\.\w+)(\?.*)?"
)
_SHARD = "-".join(("", "[0-9]" * 5, "of", "[0-9]" * 5))


def checkpoint_patterns(variant: str | None = None) -> list[str]:
    """The files of a component's folder that are downloaded: JSON, vocabularies, and the weights of one variant alone.

    Weights are read from safetensors: a repository's pickles are never even downloaded.
    """
    weights = [f"{stem}{middle}.safetensors" for stem in _STEMS for middle in _middles(variant)]
    return ["*.json", "*.txt", "*.model", *weights]


def _middles(variant: str | None) -> tuple[str, ...]:
    """What stands between stem and ending; shards have the variant before their number, older ones behind it."""
    return ("", _SHARD) if variant is None else (f".{variant}", f".{variant}{_SHARD}", f"{_SHARD}.{variant}")


DOWNLOAD = frozenset({"token", "local_files_only", "force_download"})  # how huggingface_hub downloads


def local_folder(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_patterns: Sequence[str] | None = None,
    **download: Any,
) -> Path:
    """Return the local folder that holds a checkpoint, downloading it first when a repository id is given.

    An existing local folder wins over a repository of the same name. Interrupted downloads go on where they stopped.

    Args:
        path_or_repo: a folder, or a repository id such as ``"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"``.
        subfolder: the component's folder inside the checkpoint; only that part is downloaded.
        variant: of the weights that are downloaded; those of others are not.
        revision: branch, tag or commit of the repository. Ignored for a local folder.
        cache_dir: where downloads are kept; by default the shared Hugging Face cache.
        allow_patterns: glob patterns of the files to download, relative to the repository. By default
            `checkpoint_patterns`.
        **download: ``token``, ``local_files_only`` and ``force_download``, as huggingface_hub takes them.

    Raises:
        ConfigError: a path that does not exist, or a name that is neither a path nor a repository id.
        CheckpointError: the download failed, or the subfolder is not there.
    """
    root = _existing_folder(path_or_repo)
    if root is None:
        root = _download(
            os.fspath(path_or_repo),
            patterns=list(allow_patterns) if allow_patterns is not None else _patterns(subfolder, variant),
            revision=revision,
            cache_dir=cache_dir,
            **download,
        )
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "none"
        raise CheckpointError(f"{path_or_repo} has no folder {subfolder!r} (folders there: {found}).")
    return folder


def local_file(
    path_or_url: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **download: Any,
) -> Path:
    """Return a local file, downloading it first where its address on the Hugging Face hub is given.

    Args:
        path_or_url: a file, or ``https://huggingface.co/<owner>/<name>/blob/<revision>/<file>`` (``hf.co`` for short, and
            ``/blob/<revision>`` may be missing).
        revision: branch, tag or commit; the address may say it too.
        cache_dir: where downloads are kept.
        **download: as in `local_folder`.

    Raises:
        ConfigError: neither an existing file nor such an address.
        CheckpointError: the download failed.
    """
    name = _text(path_or_url, "a .safetensors or .gguf file, or its address on huggingface.co")
    address = _ADDRESS.fullmatch(name)
    if address is None:
        path = Path(name).expanduser()
        if not path.is_file():
            what = "is a folder: use from_pretrained, or give a file" if path.is_dir() else "does not exist"
            raise ConfigError(f"{name} {what}; expected a .safetensors or .gguf file, or its address on huggingface.co")
        return path
    revision = revision or address["revision"]
    root = _download(address["repo"], patterns=[address["file"]], revision=revision, cache_dir=cache_dir, **download)
    if not (root / address["file"]).is_file():
        raise CheckpointError(f"{address['repo']} has no file {address['file']}")
    return root / address["file"]


def is_address(path_or_url: str | os.PathLike[str]) -> bool:
    """Whether this is the address of a file on the Hugging Face hub, as `local_file` takes it."""
    return _ADDRESS.fullmatch(os.fspath(path_or_url)) is not None


def _existing_folder(path_or_repo: str | os.PathLike[str]) -> Path | None:
    """Return the folder that ``path_or_repo`` names, None when it has to be a repository id."""
    name = _text(path_or_repo, "a folder, or a Hugging Face repository id")
    if not name:
        raise ConfigError("The model path is empty: give a local folder or a Hugging Face repository id.")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"{name} is a file: give the checkpoint's folder, the one that holds model_index.json.")
    if isinstance(path_or_repo, os.PathLike) or _looks_like_path(name):
        raise ConfigError(
            f"{name} does not exist: give a checkpoint's folder or a Hugging Face repository id (owner/name)."
        )
    return None


def _text(given: Any, expected: str) -> str:
    if not isinstance(given, str | os.PathLike):
        hint = (
            "; write tensors at hand to a file first (safetensors.torch.save_file)" if isinstance(given, dict) else ""
        )
        raise ConfigError(f"{type(given).__name__} was given, expected {expected}{hint}")
    return os.fspath(given)


def _looks_like_path(name: str) -> bool:
    """Say whether ``name`` cannot be a repository id: those have one slash at most, and no leading dot or tilde."""
    return name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1 or "\\" in name or ":" in name


def _patterns(subfolder: str | None, variant: str | None) -> list[str]:
    return [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in checkpoint_patterns(variant)]


def _download(
    repo: str,
    *,
    patterns: list[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    with extra("hub", needed_for="a download"):
        import huggingface_hub  # noqa: PLC0415 - a local checkpoint needs no network library

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            allow_patterns=patterns,
            revision=revision,
            cache_dir=os.fspath(cache_dir) if cache_dir else None,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or "no reason given"
        if "/" not in repo:
            raise CheckpointError(
                f"{repo!r} is no folder here and no repository (owner/name); names such as 'wan2.1-14b' are known to "
                f"`vramkit plan` alone, which needs no weights ({type(error).__name__}: {reason})"
            ) from error
        raise CheckpointError(
            f"Cannot download {repo!r}: {type(error).__name__}: {reason}. "
            "Check the name, the network and `hf auth login` for gated models, or give a local folder."
        ) from error
    return Path(folder)
