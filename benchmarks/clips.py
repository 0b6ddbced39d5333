"""Whole clips of the families at their published sizes, from random weights: what each pipeline is made of and asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vramkit
from benchmarks.bench import Bench
from benchmarks.checkpoints import write_model
from benchmarks.networks import NETWORKS, Clip, Draw
from vramkit.offload import load_mapped
from vramkit.pipelines.loading.auto_model import AutoModel

__all__ = ["FAMILIES", "Family"]

Text = Callable[[Draw, int], dict[str, Tensor]]
_GROUPS: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Models, the clip that they make, and the memory that they may use for it."""

    pipeline: str
    """Its class, here and in diffusers."""
    network: str
    """The transformer, of `NETWORKS`."""
    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What of its tiny config differs, so that it fits the tiny autoencoder."""
    vae: dict[str, Any] | None
    """config.json; None for clips that are not decoded."""
    tiny_vae: dict[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: Callable[[], Any]
    text: Text
    tiny_clip: Clip
    passes: int = 2
    """Forwards in a step."""
    cap_gib: float
    """What the allocator has where every part is offloaded by hand."""
    fit_gib: float
    """What `fit` is given, and the allocator has."""
    size: Clip | None = None
    """The clip at full scale, if it is not that of the network."""
    steps: int = 3
    absent: tuple[str, ...] = ("tokenizer", "text_encoder")
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_two_experts: bool = False
    has_image: bool = False

    def clip(self, scale: str) -> Clip:
        """Return the published clip, or a tiny one."""
        return self.tiny_clip if scale == "smoke" else self.size or NETWORKS[self.network].clip

    def load(self, bench: Bench) -> Any:
        """Build the pipeline, its weights mapped from files, which are written if they are not there."""
        network = NETWORKS[self.network]
        config = network.config_at(bench.scale) | (self.transformer if bench.is_smoke else {})
        configs = {"transformer": {"_class_name": network.class_name, **config}}
        if self.has_two_experts:
            configs["transformer_2"] = configs["transformer"]
        if self.vae is not None:
            configs["vae"] = self.vae | (self.tiny_vae if bench.is_smoke else {})
        models = {
            part: _mapped(bench, f"clip-{self.network}-{part}", given)
            for part, given in configs.items()
        }  # fmt: skip
        nothing = dict.fromkeys((*self.absent, *(() if "vae" in models else ("vae",))))
        pipeline = getattr(vramkit, self.pipeline)(**nothing | models, scheduler=self.scheduler(), **self.options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def arguments(self, bench: Bench) -> dict[str, Any]:
        """Return what the call is given beside steps and callbacks."""
        draw, clip, config = Draw(bench.device), self.clip(bench.scale), NETWORKS[self.network].config_at(bench.scale)
        width = config.get("text_dim") or config.get("text_embed_dim") or config.get("caption_channels") or 4096
        given: dict[str, Any] = {"height": clip.height, "width": clip.width, "num_frames": clip.frames}
        given |= self.text(draw, int(width))
        if self.has_image:
            given["image"] = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(2))
        return given


def _mapped(bench: Bench, name: str, config: dict[str, Any]) -> nn.Module:
    path = write_model(bench.folder / f"{name}.safetensors", config, bench.device)
    with torch.device("meta"):
        model = AutoModel.class_named(config["_class_name"]).from_config(config).eval()
    return load_mapped(model, path)


def _t5(tokens: int, *, masks: bool = False) -> Text:
    def make(draw: Draw, width: int) -> dict[str, Tensor]:
        names = ("prompt", "negative_prompt")
        given = {f"{name}_embeds": draw.normal(1, tokens, width) for name in names}
        if masks:
            given |= {f"{name}_attention_mask": draw.ones(1, tokens).bool() for name in names}
        return given

    return make


def _llama_and_clip(draw: Draw, width: int) -> dict[str, Tensor]:
    pooled = 768 if width == 4096 else 8
    return {
        "prompt_embeds": draw.normal(1, 256, width),
        "pooled_prompt_embeds": draw.normal(1, pooled),
        "prompt_attention_mask": draw.ones(1, 256).bool(),
    }


def _euler(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from vramkit.pipelines.schedulers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**options)

    return make


def _unipc() -> Any:
    from vramkit.pipelines.schedulers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def _ddim() -> Any:
    from vramkit.pipelines.schedulers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler()


def _wan(size: Clip, *, fit_gib: float, steps: int = 3) -> Family:
    return Family(
        pipeline="WanPipeline",
        network="wan-14b",
        vae={"_class_name": "AutoencoderKLWan"},
        tiny_vae={"base_dim": 4, "num_res_blocks": 1},
        scheduler=_unipc,
        text=_t5(512),
        size=size,
        tiny_clip=Clip(64, 96, 5),
        cap_gib=5.0,
        fit_gib=fit_gib,
        steps=steps,
    )


_COG_VAE: dict[str, Any] = {"_class_name": "AutoencoderKLCogVideoX"}
_TINY_COG = {"in_channels": 4, "out_channels": 4}
_TINY_COG_VAE = _GROUPS | {"sample_height": 96, "sample_width": 80}

FAMILIES: dict[str, Family] = {
    "wan2.1-14b": _wan(Clip(480, 832, 81), fit_gib=2.5),
    "wan2.1-14b-720p": _wan(Clip(720, 1280, 81), fit_gib=3.8, steps=2),
    "wan2.1-14b-short": _wan(Clip(480, 832, 5), fit_gib=2.5),
    "hunyuan": Family(
        pipeline="HunyuanVideoPipeline",
        network="hunyuan",
        transformer={"in_channels": 4, "out_channels": 4},
        vae={"_class_name": "AutoencoderKLHunyuanVideo"},
        tiny_vae=_GROUPS,
        scheduler=_euler(shift=7.0),
        text=_llama_and_clip,
        tiny_clip=Clip(32, 48, 5),
        passes=1,  # the guidance is a number that the model is told
        cap_gib=5.0,
        fit_gib=3.8,
        steps=2,
        absent=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    ),
    "ltx": Family(
        pipeline="LTXPipeline",
        network="ltx",
        vae={"_class_name": "AutoencoderKLLTXVideo"},
        tiny_vae={
            "latent_channels": 8, "block_out_channels": [4, 4, 8, 8], "decoder_block_out_channels": [4, 4, 8, 8],
            "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5,
        },
        scheduler=_euler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        text=_t5(128, masks=True),
        tiny_clip=Clip(64, 96, 9),
        cap_gib=2.0,
        fit_gib=1.5,
    ),
    "cogvideox-2b": Family(
        pipeline="CogVideoXPipeline",
        network="cogvideox-2b",
        transformer=_TINY_COG,
        vae=_COG_VAE | {"scaling_factor": 1.15258426},
        tiny_vae=_TINY_COG_VAE,
        scheduler=_ddim,
        text=_t5(226),
        tiny_clip=Clip(32, 48, 5),
        cap_gib=3.0,
        fit_gib=1.8,
    ),
    "cogvideox-5b": Family(
        pipeline="CogVideoXPipeline",
        network="cogvideox-5b",
        transformer=_TINY_COG,
        vae=_COG_VAE | {"scaling_factor": 0.7},
        tiny_vae=_TINY_COG_VAE,
        scheduler=_ddim,
        text=_t5(226),
        tiny_clip=Clip(32, 48, 5),
        cap_gib=3.0,
        fit_gib=1.8,
    ),
    "wan2.2-a14b": Family(
        pipeline="WanPipeline",
        network="wan-14b",
        vae=None,
        scheduler=_unipc,
        text=_t5(512),
        tiny_clip=Clip(64, 96, 5),
        cap_gib=8.0,
        fit_gib=2.3,
        steps=6,
        options={"boundary_ratio": 0.875},
        has_two_experts=True,
    ),
    "wan2.2-5b": Family(
        pipeline="WanImageToVideoPipeline",
        network="wan-5b",
        vae={
            "_class_name": "AutoencoderKLWan", "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True,
            "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
        },
        tiny_vae={"base_dim": 8, "decoder_base_dim": 12, "num_res_blocks": 1},
        scheduler=_unipc,
        text=_t5(512),
        tiny_clip=Clip(64, 96, 5),
        cap_gib=8.0,
        fit_gib=6.0,
        options={"expand_timesteps": True},
        has_image=True,
    ),
}  # fmt: skip
