"""The autoencoders that the tests run on: tiny ones of random weights beside diffusers', and the published configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from families import normal
from torch import nn

import vramkit


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    kind: str  # the class, of the same name in both libraries
    published: dict[str, Any]  # vae/config.json, or where it differs from the defaults
    parameters: int  # of the published
    tiny: dict[str, Any]
    part: tuple[str, int]  # what bounds the parts of a convolution, and a value that cuts
    clip: tuple[int, ...]  # frames, rows and columns that are encoded
    latents: tuple[int, ...]  # those that are decoded
    narrow: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)  # in which diffusers makes the same

    def random_clip(self, batch: int = 1, seed: int = 1) -> torch.Tensor:
        return normal(batch, 3, *self.clip, seed=seed)

    def random_latents(self, batch: int = 1, seed: int = 1) -> torch.Tensor:
        return normal(batch, 4, *self.latents, seed=seed)


_WAN = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
# Of Wan-AI/Wan2.2-TI2V-5B-Diffusers, without its statistics of latents.
_WAN_5B = _WAN | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "is_residual": True,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "z_dim": 48,
}
# Of hunyuanvideo-community/HunyuanVideo.
_HUNYUAN = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "_diffusers_version": "0.32.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
}
# Of Lightricks/LTX-Video, by version.
_LTX_NOISY = {
    "decoder_block_out_channels": [256, 512, 1024],
    "decoder_spatio_temporal_scaling": [True] * 3,
    "decoder_layers_per_block": [5, 6, 7, 8],
    "decoder_inject_noise": [True, True, True, False],
    "upsample_residual": [True] * 3,
    "upsample_factor": [2] * 3,
    "timestep_conditioning": True,
}
_LTX_FOLDED = _LTX_NOISY | {
    "block_out_channels": [128, 256, 512, 1024, 2048],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": [True] * 4,
    "decoder_inject_noise": [False] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def _ltx(published: dict[str, Any], parameters: int, narrow: tuple[torch.dtype, ...], **tiny: Any) -> Autoencoder:
    return Autoencoder(
        kind="AutoencoderKLLTXVideo",
        published=published,
        parameters=parameters,
        tiny=published | {"latent_channels": 4, "layers_per_block": [1] * 5} | tiny,
        part=("vramkit.pipelines.ltx.vae_convolution._PART_NUMBERS", 5 * 4 * 16 * 16),
        clip=(17, 64, 64),
        latents=(3, 2, 2),
        narrow=narrow,
    )


AUTOENCODERS = {
    "Wan2.1": Autoencoder(
        kind="AutoencoderKLWan",
        published=_WAN,
        parameters=126_892_531,
        tiny={"base_dim": 8, "z_dim": 4},
        part=("vramkit.pipelines.wan.vae._PART_PIXELS", 2 * 32 * 32),
        clip=(9, 24, 32),
        latents=(3, 3, 4),
    ),
    "Wan2.2 5B": Autoencoder(
        kind="AutoencoderKLWan",
        published=_WAN_5B,
        parameters=704_688_668,
        tiny=_WAN_5B | {"base_dim": 8, "decoder_base_dim": 12, "num_res_blocks": 1, "z_dim": 4},
        part=("vramkit.pipelines.wan.vae._PART_PIXELS", 2 * 32 * 32),
        clip=(9, 32, 48),
        latents=(3, 2, 3),
    ),
    "HunyuanVideo": Autoencoder(
        kind="AutoencoderKLHunyuanVideo",
        published=_HUNYUAN,
        parameters=246_478_803,
        tiny={"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        part=("vramkit.pipelines.hunyuan_video.vae_layers._PART_PIXELS", 3 * 32 * 32),
        clip=(9, 24, 32),
        latents=(6, 3, 4),
    ),
    "LTX-Video 0.9.0": _ltx(
        {},
        419_193_649,
        (torch.bfloat16,),
        block_out_channels=[4, 8, 8, 12],
        decoder_block_out_channels=[4, 8, 8, 12],
        decoder_layers_per_block=[1] * 5,
    ),
    "LTX-Video 0.9.1": _ltx(
        _LTX_NOISY,
        934_976_434,
        (),  # its noise is another in another dtype
        block_out_channels=[4, 4, 8, 8],
        decoder_block_out_channels=[8, 16, 32],
        decoder_layers_per_block=[1, 2, 1, 1],
    ),
    "LTX-Video 0.9.5": _ltx(
        _LTX_FOLDED,
        1_246_913_522,
        (torch.bfloat16,),
        block_out_channels=[4, 8, 16, 32, 16],
        decoder_block_out_channels=[8, 16, 32],
        decoder_layers_per_block=[1, 2, 1, 1],
    ),
    "CogVideoX": Autoencoder(
        kind="AutoencoderKLCogVideoX",
        published={"invert_scale_latents": True, "scaling_factor": 0.7},
        parameters=215_583_907,
        tiny={
            "block_out_channels": (8, 8, 16, 16),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_height": 96,
            "sample_width": 80,
        },
        part=("vramkit.pipelines.cogvideox.vae_layers._PART_NUMEL", 3 * 8 * 32 * 32),
        clip=(17, 24, 32),
        latents=(5, 3, 4),
    ),
}


def classes(name: str) -> tuple[Any, Any]:
    kind = AUTOENCODERS[name].kind
    return getattr(vramkit, kind), getattr(diffusers, kind)


def build_pair(name: str, **config: Any) -> tuple[Any, Any]:
    """Ours and diffusers', tiny, with the same random weights."""
    our_class, their_class = classes(name)
    config = AUTOENCODERS[name].tiny | config
    torch.manual_seed(0)
    oracle = their_class(**config).eval().requires_grad_(False)
    for key, parameter in oracle.named_parameters():
        if name in ("Wan2.1", "Wan2.2 5B", "CogVideoX") and parameter.ndim > 1 and parameter.shape[0] > 1:
            nn.init.normal_(parameter, std=0.15)  # the default initialization is nearly linear
        elif key != "decoder.timestep_scale_multiplier":
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = our_class.from_config(config).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def encoded(vae: Any, x: torch.Tensor) -> Any:
    return vae.encode(x).latent_dist.parameters


def decoded(vae: Any, z: torch.Tensor, timestep: float = 0.05) -> Any:
    """The clip of latents; the timestep is for decoders that are told one."""
    torch.manual_seed(2)  # that of LTX-Video 0.9.1 draws from the global generator
    return vae.decode(z, *told(vae, z, timestep)).sample


def told(vae: Any, z: torch.Tensor, timestep: float = 0.05) -> tuple[torch.Tensor, ...]:
    needs_one = getattr(vae.config, "timestep_conditioning", False)
    return (torch.full((z.shape[0],), timestep, dtype=z.dtype),) if needs_one else ()
