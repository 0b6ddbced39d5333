"""Mutated JSON of checkpoints through the loader that reads it: it loads, or a VramkitError says what is wrong, soon.

A case changes one file of a small checkpoint: config.json of a transformer, an autoencoder or a text encoder,
model_index.json, an index of shards, what quantization noted, a scheduler's config, an adapter's, a tokenizer's; or puts
there what is no JSON, as downloads that went wrong do. What loads although a value was changed computes with it, so nothing
more is asked of it than of a good file: weights that are there.
"""

from __future__ import annotations

import io
import json
import random
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._mutations import drawn_stand_in, mutated_json
from benchmarks.faults.headers import MOST_MESSAGE
from vramkit.errors import VramkitError

COUNT = 10_000
_MOST_SECONDS = 20  # of a case that takes milliseconds; the machine may be busy


@dataclass(frozen=True)
class Kind:
    """A file that is changed, and who reads it."""

    name: str
    file: Path
    load: Callable[[], Any]
    weight: int  # how many of a round are of this kind


class TooLong(BaseException):
    """A case that did not end; no `except Exception` of a library may take it."""


def run(count: int, seed: int) -> dict[str, int]:
    """Try `count` files."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter({BROKEN: 0})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kinds(Path(folder))
        for case in range(count):
            kind = rng.choices(found, [each.weight for each in found])[0]
            good = kind.file.read_bytes()
            is_other = rng.random() < 0.05
            changed = drawn_stand_in(rng, good) if is_other else mutated_json(rng, json.loads(good))
            try:
                kind.file.write_bytes(changed)
                ended = _tried(kind)
                assert ended == "refused" or not is_other, "what is no JSON at all was taken"
                outcomes[f"{kind.name}, {ended}"] += 1
            except BaseException as error:  # whatever it is: that is what is looked for
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes[BROKEN] += 1
                tell("configs", case, f"{kind.name}: {type(error).__name__}: {str(error)[:200]}\n{changed[:1500]!r}")
            finally:
                kind.file.write_bytes(good)
    return dict(outcomes)


def _tried(kind: Kind) -> str:
    try:
        with _time_limit(_MOST_SECONDS), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            loaded = kind.load()
    except VramkitError as error:
        if len(str(error)) > MOST_MESSAGE:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
        return "refused"
    if isinstance(loaded, torch.nn.Module) and any(each.is_meta for each in loaded.parameters()):
        raise AssertionError("it has weights on the meta device")
    return "loaded"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_arguments: Any) -> None:
        raise TooLong(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kinds(folder: Path) -> list[Kind]:
    """Write a small checkpoint with everything that has a config, and say who reads what of it."""
    from vramkit import WanPipeline
    from vramkit.pipelines import AutoModel
    from vramkit.pipelines.calling.pipeline import Pipeline
    from vramkit.pipelines.loading.text_encoders import load_text_encoder, load_tokenizer
    from vramkit.pipelines.schedulers.unipc import UniPCMultistepScheduler
    from vramkit.quant import BitsAndBytes4bitConfig, Fp8Config, quantize, save_quantized

    whole = _checkpoint(folder / "whole")
    transformer = AutoModel.from_pretrained(whole / "transformer")
    sharded = folder / "sharded"
    transformer.save_pretrained(sharded, max_shard_size="40KB")
    index = next(sharded.glob("*.index.json"))
    empty: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": None, "transformer": None}
    pipeline = WanPipeline.from_pretrained(whole, **empty | {"transformer": transformer})
    adapter = _adapter(folder / "adapter")
    made = [
        Kind("transformer", whole / "transformer" / "config.json", _loader(AutoModel, whole / "transformer"), 4),
        Kind("autoencoder", whole / "vae" / "config.json", _loader(AutoModel, whole / "vae"), 4),
        Kind("text encoder", whole / "text_encoder" / "config.json", lambda: load_text_encoder(
            whole / "text_encoder", class_name="UMT5EncoderModel"), 2),
        Kind("tokenizer", whole / "tokenizer" / "tokenizer_config.json", lambda: load_tokenizer(whole / "tokenizer"), 1),
        Kind("vocabulary", whole / "tokenizer" / "tokenizer.json", lambda: load_tokenizer(whole / "tokenizer"), 1),
        Kind("scheduler", whole / "scheduler" / "scheduler_config.json",
             lambda: UniPCMultistepScheduler.from_pretrained(whole / "scheduler").set_timesteps(4), 3),
        Kind("model index", whole / "model_index.json", lambda: Pipeline.from_pretrained(whole, **empty), 3),
        Kind("index of shards", index, lambda: AutoModel.from_pretrained(sharded), 3),
        Kind("adapter", adapter / "adapter_config.json", lambda: _load_adapter(pipeline, adapter), 3),
    ]  # fmt: skip
    for name, config in (("nf4", BitsAndBytes4bitConfig(quant_type="nf4", double_quant=True)), ("fp8", Fp8Config())):
        quantized = AutoModel.from_pretrained(whole / "transformer")
        quantize(quantized, config)
        save_quantized(quantized, folder / name)
        made.append(Kind(name, folder / name / "config.json", _loader(AutoModel, folder / name), 3))
    return made


def _loader(auto: Any, folder: Path) -> Callable[[], Any]:
    return lambda: auto.from_pretrained(folder)


def _load_adapter(pipeline: Any, folder: Path) -> None:
    try:
        pipeline.load_lora_weights(folder, "x")
    finally:
        pipeline.unload_lora_weights()


def _checkpoint(folder: Path) -> Path:
    """Write a Wan2.1 checkpoint of some hundred KB."""
    from vramkit.demo.checkpoint import write_checkpoint
    from vramkit.demo.presets import TINY

    folder.mkdir()
    write_checkpoint(folder, TINY)
    return folder


def _adapter(folder: Path) -> Path:
    """Write an adapter as PEFT does."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q"],
        "bias": "none",
        "use_dora": False,
        "alpha_pattern": {"blocks.0.attn1.to_q": 8},
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "layer_replication": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.blocks.0.attn1.to_q.lora_"
    state = {f"{layer}A.weight": torch.ones(2, 48), f"{layer}B.weight": torch.ones(48, 2)}
    save_file(state, folder / "adapter_model.safetensors")
    return folder
