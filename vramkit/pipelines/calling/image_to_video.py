"""What image-to-video calls share: a picture's latents for each clip.

Shapes: N pictures, one for all prompts or one for each; B clips, those of one prompt in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vramkit.pipelines.calling.inputs import Generators
from vramkit.pipelines.calling.pipeline import execution_device

__all__ = ["draw_latents", "for_clips"]


def for_clips(each: Tensor, clips: int) -> Tensor:
    """Give every clip its row: [N, ...] -> [B, ...]."""
    return each.repeat_interleave(clips // each.shape[0], dim=0)


def draw_latents(vae: Any, frames: Tensor, generator: Generators, clips: int) -> Tensor:
    """Encode pictures [N, 3, H, W], or clips [N, 3, F, H, W], in -1 .. 1 and draw their latents [B, c, f, h, w].

    A single generator draws once for each picture, a list of them once for each clip, as the published pipelines do.
    """
    videos = (frames if frames.ndim == 5 else frames[:, :, None]).to(execution_device(vae), vae.dtype)
    distributions = [vae.encode(video, return_dict=False)[0] for video in torch.split(videos, 1)]
    if isinstance(generator, list):
        of_clip = [distributions[clip * len(videos) // clips] for clip in range(clips)]
        return torch.cat([each.sample(own) for each, own in zip(of_clip, generator, strict=True)])
    return for_clips(torch.cat([each.sample(generator) for each in distributions]), clips)
