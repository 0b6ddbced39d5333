"""The config of the Wan video autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.options import Config

__all__ = ["AutoencoderKLWanConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLWanConfig(Config):
    """The keys of the published `vae/config.json`.

    `dropout` is read and has no effect, since nothing here trains. `is_residual` and `patch_size` make the autoencoder of
    Wan2.2 5B, whose channels at both ends are those of a patch. `attn_scales` must keep its default: no published
    checkpoint uses it.

    Raises:
        ConfigError: an option of another autoencoder, or sizes that contradict each other.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temperal_downsample: Sequence[bool] = (False, True, True)
    dropout: float = 0.0
    # fmt: off
    latents_mean: Sequence[float] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: Sequence[float] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        if self.patch < 1 or self.in_channels % self.patch**2 or self.out_channels % self.patch**2:
            raise ConfigError(
                f"patch_size={self.patch_size} contradicts in_channels={self.in_channels} and out_channels="
                f"{self.out_channels}, which are those of a patch."
            )
        if self.attn_scales:
            raise ConfigError(
                f"attn_scales={list(self.attn_scales)} asks for attention between the levels of the encoder, "
                "which is not supported; use a checkpoint whose attn_scales is []."
            )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries, one for each step between the "
                f"{len(self.dim_mult)} levels of dim_mult was expected."
            )
        ratios = (2 ** sum(self.temperal_downsample), 2 ** len(self.temperal_downsample) * self.patch)
        if (self.scale_factor_temporal, self.scale_factor_spatial) != ratios:
            raise ConfigError(
                f"scale_factor_temporal={self.scale_factor_temporal}, scale_factor_spatial={self.scale_factor_spatial} "
                f"contradict temperal_downsample={list(self.temperal_downsample)} and patch_size={self.patch_size}, which "
                f"give {ratios[0]} and {ratios[1]}."
            )

    @property
    def patch(self) -> int:
        """Rows and columns of pixels that are channels of the outermost layers."""
        return 1 if self.patch_size is None else self.patch_size
