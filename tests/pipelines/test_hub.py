from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.hub import checkpoint_patterns, local_folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Replace the download by a folder with one component; return the calls it got."""
    calls: list[dict[str, Any]] = []
    snapshot = tmp_path / "snapshot"
    (snapshot / "vae").mkdir(parents=True)

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def fail_to_download(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_existing_folder_is_used_as_it_is(tmp_path: Path, downloads: list[dict[str, Any]]) -> None:
    (tmp_path / "vae").mkdir()
    assert local_folder(tmp_path) == tmp_path
    assert local_folder(str(tmp_path), subfolder="vae") == tmp_path / "vae"
    assert downloads == []


def test_existing_folder_wins_over_a_repository_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert local_folder("owner/name") == Path("owner/name")
    assert downloads == []


def test_repository_is_downloaded_without_pickles(downloads: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = local_folder("owner/name", revision="main", cache_dir=tmp_path / "cache")
    assert folder.is_dir()
    (call,) = downloads
    assert call["repo"] == "owner/name"
    assert call["revision"] == "main"
    assert call["cache_dir"] == str(tmp_path / "cache")
    assert call["allow_patterns"] == checkpoint_patterns()
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in checkpoint_patterns())


WEIGHTS = {  # files of a repository -> their variant
    "model.safetensors": None,
    "diffusion_pytorch_model-00001-of-00002.safetensors": None,
    "model.fp16.safetensors": "fp16",
    "model.fp16-00001-of-00002.safetensors": "fp16",
    "diffusion_pytorch_model-00001-of-00002.fp16.safetensors": "fp16",
    "diffusion_pytorch_model.bf16.safetensors": "bf16",
}


@pytest.mark.parametrize("variant", [None, "fp16", "bf16", "f16"])
def test_only_the_wanted_variant_is_downloaded(variant: str | None, downloads: list[dict[str, Any]]) -> None:
    local_folder("owner/name", subfolder="vae", variant=variant)
    patterns = downloads[0]["allow_patterns"]
    taken = [name for name in WEIGHTS if any(fnmatch.fnmatch(f"vae/{name}", pattern) for pattern in patterns)]
    assert taken == [name for name, its in WEIGHTS.items() if its == variant]


def test_only_the_subfolder_is_downloaded(downloads: list[dict[str, Any]]) -> None:
    assert local_folder("owner/name", subfolder="vae").name == "vae"
    assert all(pattern.startswith("vae/") for pattern in downloads[0]["allow_patterns"])


@pytest.mark.parametrize("name", ["./missing", "~/missing/model", "/missing/model", "a/b/c", "missing/", "C:\\models"])
def test_missing_path_is_an_error_and_not_a_download(name: str, downloads: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        local_folder(name)
    assert downloads == []


def test_a_path_object_is_never_a_repository(downloads: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        local_folder(Path("owner/name"))
    assert downloads == []


def test_file_and_empty_name_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match=r"is a file.*model_index\.json"):
        local_folder(file)
    with pytest.raises(ConfigError, match="empty"):
        local_folder("")


def test_missing_subfolder_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(CheckpointError, match=r"no folder 'vae'.*transformer"):
        local_folder(tmp_path, subfolder="vae")


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nmore lines"), RuntimeError("transport"), ValueError("bad repo id"), OSError()]
)
def test_failed_download_is_one_clear_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_download(monkeypatch, error)
    with pytest.raises(CheckpointError, match="owner/name") as caught:
        local_folder("owner/name")
    assert "\n" not in str(caught.value)
    assert "local folder" in str(caught.value)
    assert caught.value.__cause__ is error


def test_offline_without_a_cached_copy_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="owner/never-cached"):
        local_folder("owner/never-cached", cache_dir=tmp_path)


def test_ctrl_c_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(KeyboardInterrupt):
        local_folder("owner/name")
