"""Nothing in a checkpoint folder is executed, and nothing is downloaded that was not asked for."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json

from vramkit import plan
from vramkit.errors import CheckpointError
from vramkit.pipelines import WanPipeline
from vramkit.pipelines.loading.text_encoders import load_image_processor, load_text_encoder, load_tokenizer
from vramkit.pipelines.wan.transformer import WanTransformer3DModel

CODE = "raise SystemExit('code of the folder was run')\n"
RAN: list[str] = []


def note(what: str) -> None:
    RAN.append(what)


class Runs:
    """A pickle that tells when it is read."""

    def __reduce__(self) -> Any:
        return (note, ("pickle",))


@pytest.fixture
def folder(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of one's own; questions on the terminal and calls into the network are noted, and end in an error."""
    RAN.clear()

    def refuse(what: str) -> Any:
        def call(*_args: Any, **_kwargs: Any) -> Any:
            RAN.append(what)
            raise OSError(f"{what} was tried")

        return call

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(builtins, "input", refuse("input"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("network"))
    monkeypatch.setattr(socket.socket, "connect", refuse("network"))
    return Path(shutil.copytree(wan_folder, tmp_path / "checkpoint"))


def test_a_whole_pipeline_asks_nothing_of_the_network(folder: Path) -> None:
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.tokenizer("a cat").input_ids
    assert RAN == []


@pytest.mark.parametrize(
    "kind", ["tokenizer.Mine", {"AutoTokenizer": ["tokenizer.Mine", None]}, ["o/r--t.Mine", None], 3]
)
def test_code_of_a_tokenizer_is_refused(kind: Any, folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.py").write_text(CODE)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", auto_map=kind, tokenizer_class="Mine")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json names code of its own"):
        WanPipeline.from_pretrained(folder)
    assert RAN == []


def test_code_of_a_config_beside_a_tokenizer_is_not_run(folder: Path) -> None:
    (folder / "tokenizer" / "mine.py").write_text(CODE)
    described = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoTokenizer": "mine.Tokenizer"}}
    (folder / "tokenizer" / "config.json").write_text(json.dumps(described))
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except CheckpointError:
        pass
    else:
        assert tokenizer("a cat").input_ids
    assert RAN == []
    assert not any("mine" in name.rpartition(".")[2] for name in sys.modules if name.startswith("transformers_modules"))


def test_a_chat_template_is_not_rendered(folder: Path) -> None:
    template = "{{ raise_exception('rendered') }}{% for i in range(10**12) %}x{% endfor %}"
    edit_json(folder / "tokenizer" / "tokenizer_config.json", chat_template=template)
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    pipeline = WanPipeline.from_pretrained(folder)
    embeds, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=16)
    assert embeds.isfinite().all()


@pytest.mark.parametrize(
    "entry",
    [
        {"auto_map": {"AutoModel": "mine.Model", "AutoConfig": "mine.Config"}},
        {"architectures": ["os.system"], "_name_or_path": "owner/name", "custom_pipelines": {"x": {"impl": "mine.F"}}},
    ],
)
def test_code_of_a_text_encoder_is_passed_over(entry: dict[str, Any], folder: Path) -> None:
    (folder / "text_encoder" / "mine.py").write_text(CODE)
    edit_json(folder / "text_encoder" / "config.json", **entry)
    encoder = load_text_encoder(folder / "text_encoder", class_name="UMT5EncoderModel")
    assert type(encoder).__module__ == "transformers.models.umt5.modeling_umt5"
    assert RAN == []


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_of_a_repository_are_refused(key: str, nested: bool, folder: Path) -> None:
    entry: dict[str, Any] = {key: {"": "owner/kernels"} if nested else "owner/kernels"}
    edit_json(folder / "text_encoder" / "config.json", **({"text_config": entry} if nested else entry))
    with pytest.raises(CheckpointError, match="kernels from the repository 'owner/kernels'"):
        load_text_encoder(folder / "text_encoder", class_name="UMT5EncoderModel")
    with pytest.raises(CheckpointError, match="kernels from the repository 'owner/kernels'"):
        plan(folder, "1GiB", device="cpu")
    assert RAN == []


def test_code_of_our_own_models_is_passed_over(folder: Path) -> None:
    (folder / "transformer" / "mine.py").write_text(CODE)
    edit_json(
        folder / "transformer" / "config.json",
        auto_map={"AutoModel": "mine.Model"},
        _class_name="WanTransformer3DModel",
    )
    with pytest.warns(UserWarning, match="does not know auto_map"):
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    edit_json(folder / "model_index.json", scheduler=["mine", "Scheduler"])
    with pytest.raises(CheckpointError, match=r"mine\.Scheduler.*not supported"):
        WanPipeline.from_pretrained(folder, transformer=None)
    assert RAN == []


def test_code_of_an_image_processor_is_not_run(tmp_path: Path, folder: Path) -> None:
    described = {
        "image_processor_type": "Mine",
        "auto_map": {"AutoImageProcessor": "mine.Mine"},
        "size": {"shortest_edge": 8},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    (tmp_path / "mine.py").write_text(CODE)
    assert type(load_image_processor(tmp_path, class_name="CLIPImageProcessor")).__module__.startswith("transformers.")
    assert RAN == []


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_wherever_weights_are_read(ending: str, folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    bad = weights.with_name(f"diffusion_pytorch_model{ending}")
    bad.write_bytes(pickle.dumps(Runs()))
    pipeline = WanPipeline.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="can run code"):
        WanPipeline.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="can run code"):
        WanTransformer3DModel.from_single_file(bad)
    with pytest.raises(CheckpointError, match="can run code"):
        pipeline.load_lora_weights(bad)
    with pytest.raises(CheckpointError, match="can run code"):
        pipeline.load_lora_weights(folder / "transformer", weight_name=bad.name)
    assert RAN == []


def test_a_pickle_under_the_name_of_safetensors_is_refused(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    for content in (pickle.dumps(Runs()), b"PK\x03\x04" + bytes(64)):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="safetensors"):
            WanPipeline.from_pretrained(folder)
    assert RAN == []


def test_the_pickle_of_these_tests_would_run() -> None:
    RAN.clear()
    pickle.loads(pickle.dumps(Runs()))
    assert RAN == ["pickle"]
