"""Pipelines of diffusers at their published sizes: what they are made of, and what they are asked.

Configs are the defaults of diffusers' classes, or what its conversion scripts say where the published ones differ.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.checkpoints import write_parts
from benchmarks.networks import DTYPE, Clip, Draw
from vramkit.offload import parameters_on_meta

__all__ = ["FOREIGNERS", "Foreigner", "Part"]

Given = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A class of diffusers with its config: published, and what of it a test has smaller."""

    class_name: str
    config: Given = dataclasses.field(default_factory=dict)
    tiny: Given = dataclasses.field(default_factory=dict)
    place: str = "diffusers"

    def config_at(self, scale: str) -> dict[str, Any]:
        """Return the config, published or tiny."""
        return {**self.config, **(self.tiny if scale == "smoke" else {})}

    def make(self, scale: str) -> Any:
        """Build it, without weights."""
        with parameters_on_meta():
            made = getattr(importlib.import_module(self.place), self.class_name)(**self.config_at(scale))
        return made.eval().requires_grad_(False) if isinstance(made, torch.nn.Module) else made


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Foreigner:
    """A pipeline, the clip or picture that it makes, and the memory that it may use for it; or a transformer alone."""

    pipeline: str = ""
    """Its class; nothing for the transformer alone."""
    parts: Mapping[str, Part]
    """Models and scheduler, by their names in the pipeline."""
    absent: tuple[str, ...] = ("tokenizer", "text_encoder")
    """Parts that nobody needs, since embeddings are given in the place of texts."""
    given: Callable[[Draw, Clip, Given], Given]
    """Arguments of the call, from what to draw with, the clip, and the config of the transformer."""
    size: Clip
    """As published; of pictures the frames are 1."""
    tiny: Clip
    fit_gib: float
    """What `fit` is given, and the allocator has."""
    steps: int = 3

    def clip(self, scale: str) -> Clip:
        """Return the published clip, or a tiny one."""
        return self.tiny if scale == "smoke" else self.size

    def empty(self, scale: str) -> Any:
        """Build the pipeline, or the transformer, without weights, as plans are made of it."""
        made = {name: part.make(scale) for name, part in self.parts.items()}
        if not self.pipeline:
            return made["transformer"]
        return self._class()(**made, **dict.fromkeys(self.absent))

    def write(self, bench: Bench, name: str) -> Path:
        """Write it with random weights, as diffusers saves it, unless it is there; returns its folder."""
        target = bench.folder / f"foreign-{name}"
        index = target / "model_index.json"
        if not index.exists():
            empty = self.empty(bench.scale)
            parts = {part: getattr(empty, part) for part in self.parts} if self.pipeline else {"transformer": empty}
            write_parts(target, parts, bench.scale, bench.device)
            if self.pipeline:  # the index says that all is there
                empty.save_config(target)
            else:
                index.write_text("{}")
        return target

    def load(self, folder: Path) -> Any:
        """Load what `write` wrote as its users do."""
        if not self.pipeline:
            alone = getattr(importlib.import_module("diffusers"), self.parts["transformer"].class_name)
            model = alone.from_pretrained(folder, subfolder="transformer", torch_dtype=DTYPE)
            return model.eval().requires_grad_(False)
        pipeline = self._class().from_pretrained(folder, torch_dtype=DTYPE, **dict.fromkeys(self.absent))
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):  # weights that ask for gradients may take other kernels
                part.requires_grad_(False)
        return pipeline

    def arguments(self, bench: Bench) -> Given:
        """Return what the call is given, beside callbacks and generators."""
        given = self.given(Draw(bench.device), self.clip(bench.scale), self.parts["transformer"].config_at(bench.scale))
        return given | ({"num_inference_steps": self.steps, "output_type": "pt"} if self.pipeline else {})

    def _class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.pipeline)


def _sides(clip: Clip) -> Given:
    return {"height": clip.height, "width": clip.width}


def _twice(draw: Draw, *shape: int, mask: str = "") -> Given:
    """Embeddings of a prompt and of a negative one."""
    names = ("prompt", "negative_prompt")
    given: Given = {f"{name}_embeds": draw.normal(*shape) for name in names}
    if mask:
        given |= {f"{name}_{mask}": draw.ones(*shape[:2]).long() for name in names}
    return given


def _ltx2(draw: Draw, clip: Clip, config: Given) -> Given:
    layers, tokens = (49, 1024) if config.get("caption_channels", 3840) == 3840 else (3, 16)
    text = _twice(draw, 1, tokens, config.get("caption_channels", 3840) * layers, mask="attention_mask")
    blocks = [28] if tokens == 1024 else [1]
    return {**text, **_sides(clip), "num_frames": clip.frames, "spatio_temporal_guidance_blocks": blocks}


def _qwen(draw: Draw, clip: Clip, config: Given) -> Given:
    return _twice(draw, 1, 256, config.get("joint_attention_dim", 3584), mask="embeds_mask") | _sides(clip)


def _sana(draw: Draw, clip: Clip, config: Given) -> Given:
    text = _twice(draw, 1, 300, config["caption_channels"], mask="attention_mask")
    return {
        **text,
        **_sides(clip),
        "frames": clip.frames,
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def _kandinsky(draw: Draw, clip: Clip, config: Given) -> Given:
    given: Given = {"num_frames": clip.frames, **_sides(clip)}
    for name in ("", "negative_"):
        given[f"{name}prompt_embeds_qwen"] = draw.normal(1, 256, config.get("in_text_dim", 3584))
        given[f"{name}prompt_embeds_clip"] = draw.normal(1, config.get("in_text_dim2", 768))
        given[f"{name}prompt_cu_seqlens"] = torch.tensor([0, 256], dtype=torch.int32, device=draw.device)
    return given


def _z_image(draw: Draw, clip: Clip, config: Given) -> Given:
    width = config.get("cap_feat_dim", 2560)
    return {f"{name}prompt_embeds": [draw.normal(256, width)] for name in ("", "negative_")} | _sides(clip)


def _minimax_h3(draw: Draw, clip: Clip, config: Given) -> Given:
    """One sequence of text, sound of two channels, and video: 17 frames are 5 latents, 24 frames 40 of each channel."""
    rows, columns, frames = clip.height // 32, clip.width // 32, (clip.frames - 5) // 17 * 5 + 2
    counts = {"text": 512, "audio": 2 * round(clip.frames / 24 * 40), "video": frames * rows * columns}
    tags = torch.cat([torch.full((counts[name],), tag) for name, tag in (("text", 1), ("audio", 2), ("video", 0))])
    positions = torch.zeros(len(tags), 3)
    positions[: -counts["video"], 0] = torch.arange(len(tags) - counts["video"]).float()
    positions[-counts["video"] :] = torch.cartesian_prod(*(torch.arange(float(n)) for n in (frames, rows, columns)))
    channels = {"video": config.get("in_channels", 24) * 4, "audio": config.get("audio_in_channels", 32)}
    noise = {name: draw.normal(1, counts[name], width).float() for name, width in channels.items()}
    placed: dict[str, Tensor] = {
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": positions,
        **{f"{name}_indices": (tags == tag).nonzero().flatten() for name, tag in (("text", 1), ("audio", 2), ("video", 0))},
    }  # fmt: skip
    return {
        "hidden_states": noise["video"],
        "audio_hidden_states": noise["audio"],
        "encoder_hidden_states": draw.normal(1, counts["text"], config.get("text_dim", 5120)),
        **{name: value.to(draw.device) for name, value in placed.items()},
        "return_dict": False,
    }


def _flow(**config: Any) -> Part:
    return Part("FlowMatchEulerDiscreteScheduler", config)


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_SAME = {"in_channels": 4, "out_channels": 4}
_SPLIT = {"rope_type": "split"}
_TINY_CONNECTORS = {"caption_channels": 16, "text_proj_in_factor": 3, "connector_rope_base_seq_len": 32} | {
    f"{name}_connector_{option}": value
    for name in ("video", "audio")
    for option, value in (
        ("num_attention_heads", 2), ("attention_head_dim", 8), ("num_layers", 2), ("num_learnable_registers", None),
    )
}  # fmt: skip
_TINY_WAN_VAE = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}  # fmt: skip
_TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}

FOREIGNERS: dict[str, Foreigner] = {
    "ltx2": Foreigner(
        pipeline="LTX2Pipeline",
        absent=("tokenizer", "text_encoder", "processor", "prompt_enhancer", "duration_head"),
        parts={
            "transformer": Part(
                "LTX2VideoTransformer3DModel",
                _SPLIT,
                _HEADS | _SAME | {
                    "cross_attention_dim": 32, "num_layers": 3, "caption_channels": 16, "audio_in_channels": 4,
                    "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
                    "audio_cross_attention_dim": 16,
                },
            ),
            "connectors": Part("LTX2TextConnectors", _SPLIT, _TINY_CONNECTORS, place="diffusers.pipelines.ltx2"),
            "vae": Part(
                "AutoencoderKLLTX2Video",
                {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
                {
                    "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 16, 32),
                    "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4,
                },
            ),
            "audio_vae": Part("AutoencoderKLLTX2Audio", {}, {"base_channels": 4, "latent_channels": 2, "mel_bins": 8}),
            "vocoder": Part(
                "LTX2Vocoder",
                {},
                {
                    "in_channels": 16, "hidden_channels": 16, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2],
                    "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]], "output_sampling_rate": 16000,
                },
                place="diffusers.pipelines.ltx2",
            ),
            "scheduler": _flow(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
            ),
        },
        given=_ltx2,
        size=Clip(512, 768, 121),
        tiny=Clip(64, 64, 9),
        fit_gib=7.5,
    ),
    "qwen-image": Foreigner(
        pipeline="QwenImagePipeline",
        parts={
            "transformer": Part(
                "QwenImageTransformer2DModel",
                {},
                _HEADS | {
                    "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": 16,
                    "axes_dims_rope": (4, 6, 6),
                },
            ),
            "vae": Part("AutoencoderKLQwenImage", {}, _TINY_WAN_VAE),
            "scheduler": _flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        },
        given=_qwen,
        size=Clip(1328, 1328, 1),
        tiny=Clip(32, 32, 1),
        fit_gib=1.5,
    ),
    "minimax-h3": Foreigner(
        parts={
            "transformer": Part(
                "MiniMaxH3Transformer3DModel",
                {},
                _HEADS | {
                    "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 2, "ffn_dim": 48, "in_channels": 4,
                    "audio_in_channels": 6, "text_dim": 16, "freq_dim": 16, "time_embed_hidden_dim": 24,
                    "time_embed_dim": 16, "rope_freq_dim": 2,
                },
            ),
        },
        given=_minimax_h3,
        size=Clip(768, 1344, 124),
        tiny=Clip(32, 64, 22),
        fit_gib=8.0,
    ),
    "sana-video": Foreigner(
        pipeline="SanaVideoPipeline",
        parts={
            "transformer": Part(
                "SanaVideoTransformer3DModel",
                {"caption_channels": 2304, "mlp_ratio": 3.0},
                _HEADS | _SAME | {
                    "num_layers": 3, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
                    "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8, "rope_max_seq_len": 32,
                },
            ),
            "vae": Part("AutoencoderKLWan", {}, _TINY_WAN_VAE),
            "scheduler": Part(
                "DPMSolverMultistepScheduler",
                {"flow_shift": 8.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            ),
        },
        given=_sana,
        size=Clip(480, 832, 81),
        tiny=Clip(32, 32, 5),
        fit_gib=5.3,
    ),
    "kandinsky-5-lite": Foreigner(
        pipeline="Kandinsky5T2VPipeline",
        parts={
            "transformer": Part(
                "Kandinsky5Transformer3DModel",
                {
                    "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True,
                },
                {
                    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
                    "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6),
                },
            ),
            "vae": Part("AutoencoderKLHunyuanVideo", {}, _TINY_VAE),
            "scheduler": _flow(shift=10.0),
        },
        absent=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        given=_kandinsky,
        size=Clip(512, 768, 121),
        tiny=Clip(32, 32, 5),
        fit_gib=17.0,
    ),
    "z-image": Foreigner(
        pipeline="ZImagePipeline",
        parts={
            "transformer": Part(
                "ZImageTransformer2DModel",
                {},
                {
                    "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
                    "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [512, 32, 32],
                },
            ),
            "vae": Part(
                "AutoencoderKL",
                {
                    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
                    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
                    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
                    "use_post_quant_conv": False, "sample_size": 1024,
                },
                _TINY_VAE,
            ),
            "scheduler": _flow(shift=3.0),
        },
        given=_z_image,
        size=Clip(1024, 1024, 1),
        tiny=Clip(32, 32, 1),
        fit_gib=2.7,
    ),
}  # fmt: skip
