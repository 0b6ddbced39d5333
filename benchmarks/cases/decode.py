"""Decodes of the families' autoencoders at published sizes: whole, in stripes of rows, in tiles, and by diffusers' class.

Random weights on the device, random latents. The peak contains the weights of the whole autoencoder and the clip. The
reference is the whole decode, whose result is kept in the folder of the checkpoints; ``relative`` is how far the
others' numbers are from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import vramkit
from benchmarks.bench import Bench
from benchmarks.measure import digest, release_memory
from benchmarks.rows import Row, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decode:
    """An autoencoder, and latents of which it makes a clip."""

    kind: str  # the class, of the same name in diffusers
    latents: tuple[int, ...]
    dtype: str = "bfloat16"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_stripes: bool = False


_WAN_480P, _WAN_720P = (1, 16, 21, 60, 104), (1, 16, 21, 90, 160)
_WAN: dict[str, Any] = {"kind": "AutoencoderKLWan", "has_stripes": True}
FULL = {
    "wan 480p bf16": _Decode(**_WAN, latents=_WAN_480P),
    "wan 480p fp32": _Decode(**_WAN, latents=_WAN_480P, dtype="float32"),
    "wan 720p bf16": _Decode(**_WAN, latents=_WAN_720P),
    "wan 720p fp32": _Decode(**_WAN, latents=_WAN_720P, dtype="float32"),
    "ltx": _Decode(kind="AutoencoderKLLTXVideo", latents=(1, 128, 21, 16, 24), has_stripes=True),
    "hunyuan": _Decode(kind="AutoencoderKLHunyuanVideo", latents=(1, 16, 33, 90, 160)),
    "cogvideox": _Decode(kind="AutoencoderKLCogVideoX", latents=(1, 16, 13, 60, 90)),
}
_TINY_GROUPS = {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
SMOKE = {
    "wan": _Decode(
        **_WAN, latents=(1, 4, 2, 12, 2), dtype="float32", config={"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
    ),
    "cogvideox": _Decode(
        kind="AutoencoderKLCogVideoX",
        latents=(1, 4, 1, 8, 6),
        dtype="float32",
        config=_TINY_GROUPS | {"sample_height": 96, "sample_width": 80},
    ),
}
_WHOLE = "vramkit whole"
_STRIPES = ("vramkit stripes", "vramkit 2 stripes", "vramkit 4 stripes", "vramkit 8 stripes", "vramkit stripes to host")


def settings(scale: str) -> Iterator[Setting]:
    """The whole decode of each first."""
    for name, decode in (SMOKE if scale == "smoke" else FULL).items():
        stripes = _STRIPES[:1] + _STRIPES[1:2] + _STRIPES[-1:] if scale == "smoke" else _STRIPES
        for way in (_WHOLE, *(stripes if decode.has_stripes else ()), "vramkit tiles", "diffusers whole"):
            yield Setting(case="decode", subject=name, way=way, options={"decode": name}, reference={"way": _WHOLE})


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Decode one clip in one way."""
    decode = (SMOKE if bench.is_smoke else FULL)[setting.options["decode"]]
    vae = _built(decode, bench.device)
    if setting.way == "diffusers whole":
        import diffusers

        published = _built(decode, bench.device, diffusers)
        published.load_state_dict(vae.state_dict())
        vae = published
    _enable(vae, setting.way.removeprefix("vramkit "))
    dtype = getattr(torch, decode.dtype)
    generator = torch.Generator(device=bench.device).manual_seed(1)
    z = torch.randn(decode.latents, device=bench.device, dtype=dtype, generator=generator)
    release_memory()
    figures, result = bench.measure(lambda: vae.decode(z, return_dict=False)[0])
    row = figures.row() | {"digest": digest(result), "relative": _relative(setting, bench, result.cpu())}
    yield setting.row(**row)


def _relative(setting: Setting, bench: Bench, video: torch.Tensor) -> float | None:
    path = bench.folder / "results" / f"decode {setting.subject}.pt"
    if setting.way == _WHOLE:
        path.parent.mkdir(exist_ok=True)
        torch.save(video, path)
    if not path.exists():
        return None
    whole = torch.load(path, weights_only=True)
    return float(f"{(video.float() - whole.float()).norm() / whole.float().norm():.2g}")


def _built(decode: _Decode, device: torch.device, library: Any = vramkit) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        vae = getattr(library, decode.kind).from_config(decode.config)
    return vae.to(getattr(torch, decode.dtype)).eval().requires_grad_(False)


def _enable(vae: Any, how: str) -> None:
    if "tiles" in how:
        vae.enable_tiling()
    elif "stripes" in how:
        count = how.split(" ", maxsplit=1)[0]
        vae.enable_striping(
            int(count) if count.isdigit() else None, output_device="cpu" if how.endswith("to host") else None
        )
