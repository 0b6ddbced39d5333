"""Run by tests/test_packaging.py with nothing but what the engine needs: vramkit from a wheel, no GPU, no optional package.

Prints "right" where it ends. Whatever extras bring is hidden.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The engine's packages are torch, numpy, safetensors, psutil, typing_extensions; torch brings others, none of these.
HIDDEN = (
    *("PIL", "accelerate", "bitsandbytes", "diffusers", "ftfy", "huggingface_hub", "imageio_ffmpeg", "matplotlib"),
    *("optimum", "peft", "rich", "tokenizers", "torchao", "tqdm", "transformers", "typer", "click", "gguf"),
)
# Modules that are of an extra as a whole, by their beginnings.
WHOLE = ("vramkit.cli", "vramkit.commands.", "vramkit.quant.bitsandbytes_", "vramkit.quant.quanto")


class Without:
    """A finder that does not find them, as if they were not installed."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]  # type: ignore[misc]

import torch  # noqa: E402

import vramkit  # noqa: E402
from vramkit.errors import ConfigError  # noqa: E402


def main() -> None:
    for found in pkgutil.walk_packages(vramkit.__path__, "vramkit."):
        if not found.name.startswith(WHOLE):
            importlib.import_module(found.name)
    assert all(getattr(vramkit, name) is not None for name in vramkit.__all__)
    assert not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        streams(Path(folder))
        casts_and_plans()
        names_the_extras(Path(folder))
    sys.stdout.write("right\n")


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6))).eval().requires_grad_(False)


def streams(folder: Path) -> None:
    """From memory, from a mapped file and from disk, the same bytes as resident."""
    from safetensors.torch import save_file

    model, x = net(), torch.randn(2, 64)
    expected = model(x)
    save_file(model.state_dict(), folder / "net.safetensors")
    for options in ({}, {"offload_to_disk_path": folder}):
        offload = vramkit.apply_group_offloading(model, "cpu", offload_type="leaf_level", **options)
        assert torch.equal(model(x), expected)
        offload.remove()
    with vramkit.parameters_on_meta():
        mapped = net()
    vramkit.load_mapped(mapped, folder / "net.safetensors")
    vramkit.apply_group_offloading(mapped, "cpu", offload_type="leaf_level")
    assert torch.equal(mapped(x), expected)


def casts_and_plans() -> None:
    model = net()
    vramkit.quantize(model, vramkit.quant.Fp8Config())
    with vramkit.fit(model, vram="1MiB", device="cpu", example={"input": torch.randn(2, 64)}) as fitted:
        assert fitted.explain()
        assert model(torch.randn(2, 64)).shape == (2, 64)


def names_the_extras(folder: Path) -> None:
    from vramkit.pipelines.calling.prompts import clean_prompt
    from vramkit.pipelines.loading.text_encoders import load_tokenizer
    from vramkit.pipelines.lora.layers import require_peft
    from vramkit.quant import BitsAndBytes4bitConfig, QuantoConfig
    from vramkit.timeline import plot

    frames = torch.zeros(2, 3, 16, 16)
    (folder / "tokenizer.json").write_text("{}")
    with vramkit.MemoryTimeline() as timeline:
        pass
    says("hub", lambda: vramkit.WanPipeline.from_pretrained("somebody/something"))
    says("text", lambda: clean_prompt("A ferret"))
    says("text", lambda: load_tokenizer(folder))
    says("video", lambda: vramkit.export_to_video(frames, folder / "clip.mp4"))
    says("video", lambda: vramkit.load_image("ferret.png"))
    says("plots", lambda: plot({"nothing": timeline.trace()}, folder / "memory.png"))
    says("quant", lambda: vramkit.quantize(net(), BitsAndBytes4bitConfig()))
    says("quant", lambda: vramkit.quantize(net(), QuantoConfig(weights="int8")))
    says("lora", require_peft)
    says("pipelines", lambda: vramkit.Pipeline.progress_bar(SimpleNamespace(_progress_bar_config={}), total=1))
    says("cli", lambda: importlib.import_module("vramkit.__main__").main())


def says(extra: str, call: Callable[[], Any]) -> None:
    """Fail unless `call` names the extra by an error; the command line has one line on stderr, and a status."""
    said, status = "", None
    try:
        status = call()
    except ConfigError as error:
        said = str(error)
    expected = extra == "cli" and status == 1
    assert expected or f'pip install "vramkit[{extra}]"' in said, (extra, said)


if __name__ == "__main__":
    main()
