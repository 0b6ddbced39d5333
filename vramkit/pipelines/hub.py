"""From the name that a user gives - a local folder or a Hugging Face repository - to a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vramkit.errors import CheckpointError, ConfigError

# Weights are read from safetensors alone: a repository's pickles are never even downloaded.
CHECKPOINT_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")


def local_folder(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """Return the local folder that holds a checkpoint, downloading it first when a repository id is given.

    An existing local folder wins over a repository of the same name. Interrupted downloads go on where they stopped.

    Args:
        path_or_repo: a folder, or a repository id such as ``"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"``.
        subfolder: the component's folder inside the checkpoint; only that part is downloaded.
        revision: branch, tag or commit of the repository. Ignored for a local folder.
        cache_dir: where downloads are kept; by default the shared Hugging Face cache.
        allow_patterns: glob patterns of the files to download, relative to the repository. By default safetensors,
            JSON and tokenizer files.

    Raises:
        ConfigError: a path that does not exist, or a name that is neither a path nor a repository id.
        CheckpointError: the download failed, or the subfolder is not there.
    """
    root = _existing_folder(path_or_repo)
    if root is None:
        root = _download(
            os.fspath(path_or_repo),
            patterns=list(allow_patterns) if allow_patterns is not None else _patterns(subfolder),
            revision=revision,
            cache_dir=cache_dir,
        )
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "none"
        raise CheckpointError(f"{path_or_repo} has no folder {subfolder!r} (folders there: {found}).")
    return folder


def _existing_folder(path_or_repo: str | os.PathLike[str]) -> Path | None:
    """Return the folder that ``path_or_repo`` names, None when it has to be a repository id."""
    name = os.fspath(path_or_repo)
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


def _looks_like_path(name: str) -> bool:
    """Say whether ``name`` cannot be a repository id: those have one slash at most, and no leading dot or tilde."""
    return name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1 or "\\" in name or ":" in name


def _patterns(subfolder: str | None) -> list[str]:
    return [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in CHECKPOINT_PATTERNS]


def _download(
    repo: str, *, patterns: list[str], revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
    import huggingface_hub  # noqa: PLC0415 - a local checkpoint needs no network library

    try:
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=patterns, revision=revision, cache_dir=os.fspath(cache_dir) if cache_dir else None
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or "no reason given"
        raise CheckpointError(
            f"Cannot download {repo!r}: {type(error).__name__}: {reason}. "
            "Check the name, the network and `hf auth login` for gated models, or give a local folder."
        ) from error
    return Path(folder)
