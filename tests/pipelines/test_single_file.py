"""Models from single files: names of the original code, of ComfyUI and of diffusers, in every format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import autoencoders
import denoisers
import diffusers
import huggingface_hub
import pytest
import torch
from families import FAMILIES, Stock, seeded
from gguf_files import random_blocks, write_gguf
from safetensors.torch import save_file
from single_files import ORIGINAL, original_file
from torch import Tensor

import vramkit
from vramkit import apply_group_offloading
from vramkit.casting.narrow import NarrowTensor
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload.disk import span_of
from vramkit.pipelines.loading.auto_model import AutoModel
from vramkit.pipelines.loading.original_names import renaming
from vramkit.pipelines.loading.registry import published_rest
from vramkit.pipelines.loading.told_configs import told_config
from vramkit.quant import Fp8Config, GgufConfig, quantization_of
from vramkit.quant.gguf import GgufTensor

TINY: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": denoisers.DENOISERS["Wan2.1"].tiny,
    "HunyuanVideoTransformer3DModel": denoisers.DENOISERS["HunyuanVideo"].tiny,
    "LTXVideoTransformer3DModel": denoisers.DENOISERS["LTX-Video"].tiny,
    "CogVideoXTransformer3DModel": denoisers.DENOISERS["CogVideoX"].tiny,
    "AutoencoderKLWan": autoencoders.AUTOENCODERS["Wan2.1"].tiny,
    "AutoencoderKLHunyuanVideo": autoencoders.AUTOENCODERS["HunyuanVideo"].tiny,
    "AutoencoderKLLTXVideo": autoencoders.AUTOENCODERS["LTX-Video 0.9.0"].tiny,
    "AutoencoderKLLTXVideo, 0.9.5": autoencoders.AUTOENCODERS["LTX-Video 0.9.5"].tiny,
    "AutoencoderKLCogVideoX": autoencoders.AUTOENCODERS["CogVideoX"].tiny,
}
# diffusers cuts the joined layers of HunyuanVideo at 3072 and knows LTX-Video 0.9.5 by its 2048 channels, whatever the
# model, and reads no others of these.
ORACLES = ("WanTransformer3DModel", "AutoencoderKLWan", "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo")


def config_of(layout: str) -> dict[str, Any]:
    return TINY.get(layout) or TINY[layout.partition(",")[0]]


def build(layout: str) -> Any:
    """A model of diffusers with random weights."""
    kind = layout.partition(",")[0]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config_of(layout)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours(layout: str) -> Any:
    return getattr(vramkit, layout.partition(",")[0])


def assert_same(got: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = got.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("layout", ORIGINAL)
def test_original_names(layout: str, tmp_path: Path) -> None:
    reference = build(layout)
    written = original_file(layout, reference.state_dict())
    names = reference.state_dict().keys()
    assert layout == "AutoencoderKLHunyuanVideo" or len(written.keys() - names) > len(written) / 2
    save_file(written, tmp_path / "x.safetensors")
    loaded = ours(layout).from_single_file(tmp_path / "x.safetensors", config=config_of(layout))
    assert_same(loaded, reference.state_dict())
    assert type(AutoModel.from_single_file(tmp_path / "x.safetensors", config=config_of(layout))) is type(loaded)
    moved = [name for name, weight in loaded.state_dict().items() if span_of(weight) is None]
    # All are views of the file but those whose parts stand there in another order.
    assert all("norm_out.linear" in name or ".norm1.linear" in name or ".norm2.linear" in name for name in moved)
    assert not loaded.training


@pytest.mark.parametrize(
    "layout", [layout for layout in ORIGINAL if layout.startswith(ORACLES) and "0.9.5" not in layout]
)
def test_diffusers_reads_the_same(layout: str, tmp_path: Path) -> None:
    reference = build(layout)
    reference.save_pretrained(tmp_path / "config")
    save_file(original_file(layout, reference.state_dict()), tmp_path / "x.safetensors")
    options: dict[str, Any] = {"config": str(tmp_path / "config")}
    oracle = type(reference).from_single_file(str(tmp_path / "x.safetensors"), torch_dtype=torch.float32, **options)
    assert_same(ours(layout).from_single_file(tmp_path / "x.safetensors", **options), oracle.state_dict())


@pytest.mark.parametrize("layout", TINY)
def test_names_of_diffusers(layout: str, tmp_path: Path) -> None:
    reference = build(layout)
    save_file(reference.state_dict(), tmp_path / "x.safetensors")
    loaded = ours(layout).from_single_file(tmp_path / "x.safetensors", config=config_of(layout))
    assert_same(loaded, reference.state_dict())


PUBLISHED = {
    "WanTransformer3DModel": {f"Wan2.1 {size}": c for size, (c, _) in denoisers.DENOISERS["Wan2.1"].published.items()},
    "HunyuanVideoTransformer3DModel": {s: c for s, (c, _) in denoisers.DENOISERS["HunyuanVideo"].published.items()},
    "LTXVideoTransformer3DModel": {s: c for s, (c, _) in denoisers.DENOISERS["LTX-Video"].published.items()},
    "CogVideoXTransformer3DModel": {s: denoisers.DENOISERS["CogVideoX"].published[s][0] for s in ("2b", "5b")},
    "AutoencoderKLWan": {"": autoencoders.AUTOENCODERS["Wan2.1"].published},
    "AutoencoderKLHunyuanVideo": {"": autoencoders.AUTOENCODERS["HunyuanVideo"].published},
    "AutoencoderKLLTXVideo": {
        v: autoencoders.AUTOENCODERS[f"LTX-Video {v}"].published for v in ("0.9.0", "0.9.1", "0.9.5")
    },
}


@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind, sizes in PUBLISHED.items() for size in sizes])
def test_configs_of_published_models_are_told_by_shapes(kind: str, size: str) -> None:
    published = PUBLISHED[kind][size]
    with torch.device("meta"):
        model = getattr(vramkit, kind).from_config(published)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    told = told_config(kind, shapes)
    assert told is not None
    known = dataclasses.asdict(model.config)
    assert json.loads(json.dumps({**dataclasses.asdict(model.config_class()), **told})) == json.loads(json.dumps(known))


WAN = "WanTransformer3DModel"
WIDE = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 512, "text_dim": 256, "freq_dim": 256}


def narrow(weights: dict[str, Tensor], *, scaled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices of blocks in fp8, as ComfyUI stores them, and what they stand for."""
    stored, wide = {}, {}
    for name, weight in weights.items():
        stored[name] = wide[name] = weight.bfloat16()
        if "blocks" in name and weight.ndim == 2:
            scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            wide[name] = (stored[name].float() * scale).bfloat16()
            if scaled:
                stored[name.removesuffix("weight") + "scale_weight"] = scale
    if scaled:
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return stored, wide


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", [WAN, "HunyuanVideoTransformer3DModel"])
def test_fp8_stays_fp8_and_is_streamed(layout: str, scaled: bool, tmp_path: Path) -> None:
    original = original_file(layout, build(layout).state_dict())
    stored, wide = narrow(original, scaled=scaled)
    for name, state in (("stored", stored), ("wide", wide)):
        save_file(state, tmp_path / f"{name}.safetensors")
    options: dict[str, Any] = {"config": config_of(layout), "torch_dtype": torch.bfloat16}
    model, reference = (
        ours(layout).from_single_file(tmp_path / f"{n}.safetensors", **options) for n in ("stored", "wide")
    )
    kept = [weight for weight in model.parameters() if isinstance(weight, NarrowTensor)]
    assert len(kept) > 10
    assert all(span_of(weight.stored) is not None for weight in kept)
    kind = "Wan2.1" if layout == WAN else "HunyuanVideo"
    inputs = denoisers.DENOISERS[kind].inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        out, expected = model(**inputs).sample, reference(**inputs).sample
        assert torch.equal(out, expected)
        offload = apply_group_offloading(model, "cpu", offload_type="leaf_level")
        assert torch.equal(model(**inputs).sample, out)
    offload.remove()
    model.save_pretrained(tmp_path / "saved")
    again = ours(layout).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**inputs).sample, out)


class TestGguf:
    @pytest.fixture
    def file(self, tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """A Wan transformer in mixed formats, under its original names, its values under them, and its config."""
        torch.manual_seed(0)
        config = denoisers.DENOISERS["Wan2.1"].tiny | WIDE
        original = original_file(WAN, diffusers.WanTransformer3DModel(**config).state_dict())
        written: dict[str, Any] = {}
        forms = iter(["Q4_K", "Q8_0", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q3_K", "Q2_K", "Q4_1", "Q5_1"] * 9)
        for at, (name, weight) in enumerate(original.items()):
            written[name] = original[name] = weight if weight.ndim < 5 else weight.half()
            if "blocks" in name and weight.ndim == 2:
                form = next(forms)
                blocks, original[name] = random_blocks(form, *weight.shape, seed=at)
                written[name] = (form, blocks)
        return write_gguf(tmp_path / "wan.gguf", written), original, config

    def test_blocks_are_kept_and_streamed(
        self, file: tuple[Path, dict[str, Tensor], dict[str, Any]], tmp_path: Path
    ) -> None:
        path, values, config = file
        save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "wide.safetensors")
        quantized = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
        model = vramkit.WanTransformer3DModel.from_single_file(path, config=config, quantization_config=quantized)
        reference = vramkit.WanTransformer3DModel.from_single_file(
            tmp_path / "wide.safetensors", config=config, torch_dtype=torch.bfloat16
        )
        done = quantization_of(model)
        assert done is not None
        assert len(done.quantized) == 2 * 10
        assert isinstance(model.blocks[0].attn1.to_q.weight, GgufTensor)
        inputs = denoisers.wan_inputs(dtype=torch.bfloat16)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(1, 1, 16)
        with torch.no_grad():
            out = model(**inputs).sample
            assert torch.equal(out, reference(**inputs).sample)
            offload = apply_group_offloading(model, "cpu", offload_type="leaf_level")
            assert torch.equal(model(**inputs).sample, out)
        assert offload.stats().streamed_bytes < 0.65 * sum(p.numel() * 2 for p in reference.parameters())
        model.save_pretrained(tmp_path / "saved")  # still offloaded
        again = vramkit.WanTransformer3DModel.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            assert torch.equal(again(**inputs).sample, out)

    def test_diffusers_reads_the_same(
        self, file: tuple[Path, dict[str, Tensor], dict[str, Any]], tmp_path: Path
    ) -> None:
        path, _, config = file
        diffusers.WanTransformer3DModel(**config).save_pretrained(tmp_path / "config")
        oracle = diffusers.WanTransformer3DModel.from_single_file(
            str(path),
            config=str(tmp_path / "config"),
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )
        model = vramkit.WanTransformer3DModel.from_single_file(path, config=tmp_path / "config")
        inputs = denoisers.wan_inputs()
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(1, 1, 16)
        with torch.no_grad():
            out, expected = model(**inputs).sample, oracle(**inputs).sample
        assert (out - expected).abs().max() < 0.02 * expected.abs().max()  # it multiplies scales in half precision

    def test_what_cannot_be_meant_is_refused(self, file: tuple[Path, dict[str, Tensor], dict[str, Any]]) -> None:
        path, _, config = file
        load = vramkit.WanTransformer3DModel.from_single_file
        with pytest.raises(ConfigError, match=r"torch_dtype=torch\.float16 and compute_dtype=torch\.bfloat16"):
            load(
                path, config=config, torch_dtype=torch.float16, quantization_config=GgufConfig(compute_dtype="bfloat16")
            )
        model = load(path, config=config, quantization_config=Fp8Config(), torch_dtype=torch.bfloat16)
        assert isinstance(model.blocks[0].attn1.to_q.weight, NarrowTensor)  # of what the blocks stand for


class TestPipelines:
    @pytest.mark.parametrize("family", ["Wan2.1", "LTX-Video"])
    def test_the_file_has_the_transformer_and_the_folder_the_rest(
        self, family: str, stock: Stock, tmp_path: Path
    ) -> None:
        folder, pipeline = stock.folder(family), stock.pipeline(family)
        parts = [(type(pipeline.transformer).__name__, pipeline.transformer)]
        if family == "LTX-Video":  # whose files have both
            parts.append((type(pipeline.vae).__name__, pipeline.vae))
        written: dict[str, Tensor] = {}
        for layout, model in parts:
            written |= original_file(layout, model.state_dict())
        save_file(written, tmp_path / "both.safetensors")
        made = type(pipeline).from_single_file(tmp_path / "both.safetensors", config=folder)
        for name in ("transformer", "vae"):
            assert_same(getattr(made, name), getattr(pipeline, name).state_dict())
        made.set_progress_bar_config(disable=True)
        call = {**FAMILIES[family].clip, "num_inference_steps": 2, "output_type": "latent"}
        ours, theirs = (each("a cat", generator=seeded(), **call).frames for each in (made, pipeline))
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        ("channels", "rest"), [(16, "Wan-AI/Wan2.1-T2V-14B-Diffusers"), (48, "Wan-AI/Wan2.2-TI2V-5B-Diffusers")]
    )
    def test_the_transformer_tells_where_the_rest_is(
        self, channels: int, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = config_of(WAN) | {"in_channels": channels, "out_channels": channels}
        config |= {"num_attention_heads": 1, "attention_head_dim": 128}  # heads of another size are not told
        model = vramkit.WanTransformer3DModel.from_config(config)
        save_file(original_file(WAN, model.state_dict()), tmp_path / "x.safetensors")
        monkeypatch.setattr(vramkit.WanPipeline, "from_pretrained", lambda source, **given: (source, given))
        source, given = vramkit.WanPipeline.from_single_file(tmp_path / "x.safetensors")
        assert source == rest
        assert_same(given["transformer"], model.state_dict())

    def test_an_autoencoder_that_no_transformer_tells_of_wants_a_config(self, stock: Stock) -> None:
        file = stock.folder("CogVideoX") / "vae" / "diffusion_pytorch_model.safetensors"
        with pytest.raises(CheckpointError, match=r"give config=.*CogVideoX-2b"):
            vramkit.CogVideoXPipeline.from_single_file(file)
        assert published_rest("CogVideoXPipeline", {"num_attention_heads": 30}) == "THUDM/CogVideoX-2b"
        assert published_rest("CogVideoXPipeline", {"num_attention_heads": 48}) == "THUDM/CogVideoX-5b"

    def test_the_base_class_says_which_to_use(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="use the class of the family"):
            vramkit.Pipeline.from_single_file(tmp_path / "x.safetensors")


class TestErrors:
    def test_another_model_and_unknown_names(self, tmp_path: Path) -> None:
        save_file(original_file(WAN, build(WAN).state_dict()), tmp_path / "wan.safetensors")
        with pytest.raises(
            CheckpointError, match=r"no weights of a AutoencoderKLWan .*; it holds WanTransformer3DModel"
        ):
            vramkit.AutoencoderKLWan.from_single_file(tmp_path / "wan.safetensors")
        save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "other.safetensors")
        for load in (AutoModel.from_single_file, vramkit.WanTransformer3DModel.from_single_file):
            with pytest.raises(CheckpointError, match=r"other\.safetensors: no .* a, b"):
                load(tmp_path / "other.safetensors")

    def test_a_config_that_shapes_do_not_tell(self, tmp_path: Path) -> None:
        save_file(original_file(WAN, build(WAN).state_dict()), tmp_path / "wan.safetensors")  # heads of 12
        with pytest.raises(CheckpointError, match="do not tell the config of this WanTransformer3DModel; give config="):
            vramkit.WanTransformer3DModel.from_single_file(tmp_path / "wan.safetensors")

    @pytest.mark.parametrize("prefix", ["net.", "module.", "model.", "transformer.", "generator.model."])
    def test_what_trainers_write_before_names(self, prefix: str, tmp_path: Path) -> None:
        state = build(WAN).state_dict()
        original = {
            name.removeprefix("model.diffusion_model."): each for name, each in original_file(WAN, state).items()
        }
        for names in (state, original):
            save_file({prefix + name: each.contiguous() for name, each in names.items()}, tmp_path / "x.safetensors")
            model = vramkit.WanTransformer3DModel.from_single_file(tmp_path / "x.safetensors", config=config_of(WAN))
            assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())

    def test_a_scale_that_is_in_no_file(self, tmp_path: Path) -> None:
        """The autoencoders of CogVideoX-2b and 5b differ in it alone."""
        layout = "AutoencoderKLCogVideoX"
        save_file(original_file(layout, build(layout).state_dict()), tmp_path / "vae.safetensors")
        load = vramkit.AutoencoderKLCogVideoX.from_single_file
        with pytest.raises(CheckpointError, match=r"1\.15258426\} is that of CogVideoX-2b.* 0\.7\} that of 5b"):
            load(tmp_path / "vae.safetensors")
        model = load(tmp_path / "vae.safetensors", config=config_of(layout) | {"scaling_factor": 0.7})
        assert model.config.scaling_factor == 0.7

    @pytest.mark.parametrize("name", ["wan.pth", "wan.ckpt", "wan.bin"])
    def test_pickles_are_refused_by_name(self, name: str, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name}.*pickled"):
            vramkit.WanTransformer3DModel.from_single_file(tmp_path / name)

    def test_missing_files_and_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist; expected a"):
            vramkit.WanTransformer3DModel.from_single_file(tmp_path / "x.safetensors")
        with pytest.raises(ConfigError, match="is a folder: use from_pretrained"):
            AutoModel.from_single_file(tmp_path)
        written = original_file(WAN, build(WAN).state_dict())
        del written["blocks.1.self_attn.q.weight"]
        save_file(written | {"blocks.9.extra": torch.ones(1)}, tmp_path / "wan.safetensors")
        with pytest.raises(CheckpointError, match=r"does not have: blocks\.9\.extra"):
            vramkit.WanTransformer3DModel.from_single_file(tmp_path / "wan.safetensors", config=config_of(WAN))

    def test_joined_rows_that_do_not_fit_are_named(self, tmp_path: Path) -> None:
        layout = "HunyuanVideoTransformer3DModel"
        written = original_file(layout, build(layout).state_dict())
        name = "single_blocks.0.linear1.weight"
        save_file(written | {name: written[name][:-1].clone()}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"'single_blocks\.0\.linear1\.weight' .* should hold the rows of"):
            vramkit.HunyuanVideoTransformer3DModel.from_single_file(
                tmp_path / "x.safetensors", config=config_of(layout)
            )


@pytest.mark.parametrize(
    ("url", "revision"),
    [
        ("https://huggingface.co/owner/name/blob/main/folder/x.safetensors", "main"),
        ("https://huggingface.co/owner/name/resolve/v2/folder/x.safetensors?download=true", "v2"),
        ("hf.co/owner/name/folder/x.safetensors", None),
    ],
)
def test_addresses_on_the_hub(url: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    save_file(original_file(WAN, build(WAN).state_dict()), tmp_path / "folder" / "x.safetensors")
    asked: list[Any] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options["allow_patterns"], options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    vramkit.WanTransformer3DModel.from_single_file(url, config=config_of(WAN))
    assert asked == [("owner/name", ["folder/x.safetensors"], revision)]


def test_wan22_autoencoder_names() -> None:
    names = {
        "encoder.downsamples.1.downsamples.0.residual.2.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
        "encoder.downsamples.1.downsamples.2.resample.1.weight": "encoder.down_blocks.1.downsampler.resample.1.weight",
        "encoder.downsamples.1.downsamples.2.time_conv.bias": "encoder.down_blocks.1.downsampler.time_conv.bias",
        "decoder.upsamples.2.upsamples.1.shortcut.weight": "decoder.up_blocks.2.resnets.1.conv_shortcut.weight",
        "decoder.upsamples.2.upsamples.3.resample.1.bias": "decoder.up_blocks.2.upsampler.resample.1.bias",
        "decoder.middle.1.to_qkv.weight": "decoder.mid_block.attentions.0.to_qkv.weight",
    }
    rename = renaming("AutoencoderKLWan", names, source="x")
    assert {name: rename(name) for name in names} == names
