"""Each code block of a published guide runs: imports mapped to vramkit, checkpoints to small local ones, and no more.

Without a GPU, "cuda" is mapped to "cpu", and clips are smaller and shorter. The checkpoints have the published layout and
ratio of pictures to latents; what is small is the number of layers and, without a GPU, of channels. Patches are large, so
that few tokens are left. (Tokens of LTX-Video are latents: there it is latents that stand for more pixels.)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import (
    write_cogvideox_checkpoint,
    write_hunyuan_checkpoint,
    write_lora,
    write_ltx_checkpoint,
    write_wan_checkpoint,
)

import vramkit

GUIDE = Path(__file__).parent / "data" / "video_generation.md"
BLOCKS = dict(
    re.findall(r"^## (.*?)\n\n```py\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
)


def write_wan(folder: Path) -> Path:
    """Tokens of 3 x 4 x 4 latents; an autoencoder of 2 channels."""
    transformer = {"patch_size": (3, 4, 4), "num_layers": 1}
    vae = {"base_dim": 2, "dim_mult": [1] * 4, "num_res_blocks": 0}
    return write_wan_checkpoint(folder, transformer=transformer, vae=vae)


def write_style(folder: Path) -> Path:
    """An adapter for that transformer, alone in its folder."""
    model = vramkit.AutoModel.from_pretrained(write_wan(folder / "wan"), subfolder="transformer")
    return write_lora(model, folder / "style").parent


def write_hunyuan(folder: Path) -> Path:
    transformer = {"patch_size": 10, "patch_size_t": 2, "num_single_layers": 1}
    vae = {"block_out_channels": (2, 2, 2, 2), "norm_num_groups": 1, "layers_per_block": 0}
    return write_hunyuan_checkpoint(folder, transformer=transformer, vae=vae)


def write_ltx(folder: Path) -> Path:
    return write_ltx_checkpoint(folder, transformer={"num_layers": 1}, vae={"patch_size": 16})


def write_cogvideox(folder: Path) -> Path:
    return write_cogvideox_checkpoint(folder, transformer={"num_layers": 1, "max_text_seq_length": 226})


WRITERS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": write_wan,
    "benjamin-paine/steamboat-willie-14b": write_style,
    "hunyuanvideo-community/HunyuanVideo": write_hunyuan,
    "Lightricks/LTX-Video": write_ltx,
    "THUDM/CogVideoX-2b": write_cogvideox,
}


# Clips on the CPU for clips on a GPU: latents that are whole patches of these models, in few steps.
SHORTER = {
    "num_inference_steps=50": "num_inference_steps=3",
    "num_inference_steps=30": "num_inference_steps=3",
    "num_frames=81": "height=256, width=416, num_frames=9, num_inference_steps=3",
    "num_frames=61": "height=320, width=480, num_frames=5",
    "width=768": "width=384",
    "height=512": "height=256",
    "num_frames=161": "num_frames=9",
    "guidance_scale=6,": "guidance_scale=6, num_frames=9,",
}

# Of the published transformers and text encoders: with them, layers have 32 MiB and more.
_T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
REAL_WIDTHS: dict[str, dict[str, Any]] = {
    "TEXT_ENCODER": _T5,
    "TRANSFORMER": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096},
    "LLAMA": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 3,  # the pipeline skips two
    },
    "CLIP": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "HUNYUAN_TRANSFORMER": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "rope_axes_dim": (16, 56, 56),
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "mlp_ratio": 4.0,
    },
    "LTX_TRANSFORMER": {
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "caption_channels": 4096,
    },
    "COGVIDEOX_TRANSFORMER": {
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Checkpoints by published name, each written when it is first asked for; at the published widths for a GPU."""

    class Written(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = WRITERS[name](tmp_path_factory.mktemp("checkpoint"))
            return self[name]

    with pytest.MonkeyPatch.context() as patch:
        for name, widths in REAL_WIDTHS.items() if torch.cuda.is_available() else ():
            patch.setattr(checkpoints, name, getattr(checkpoints, name) | widths)
        yield Written()


def mapped(code: str, folders: dict[str, Path]) -> str:
    code = re.sub(r"from diffusers[\w.]* import ?", "from vramkit import ", code)  # one import lacks its blank
    for name in WRITERS:
        if name in code:
            code = code.replace(name, str(folders[name]))
    if not torch.cuda.is_available():
        code = code.replace('"cuda"', '"cpu"').replace("cpu_offload()", 'cpu_offload("cpu")')
        for long, short in SHORTER.items():
            code = code.replace(long, short)
    return code


def texts_before(title: str) -> dict[str, Any]:
    """The texts that the blocks before one have given names to: the guide uses one of them again."""
    names: dict[str, Any] = {}
    for earlier, code in BLOCKS.items():
        if earlier == title:
            break
        for node in ast.parse(code.replace("importAuto", "import Auto")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names[ast.unparse(node.targets[0])] = node.value.value
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # by inductor, of itself
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # likewise
@pytest.mark.parametrize("title", BLOCKS)
def test_block_runs(title: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = mapped(BLOCKS[title], folders)
    monkeypatch.chdir(tmp_path)
    # One block uses a class that it does not import.
    names: dict[str, Any] = {name: getattr(vramkit, name) for name in vramkit.__all__} | texts_before(title)
    exec(compile(code, f"{GUIDE.name}: {title}", "exec"), names)

    clip = np.asarray(names.get("output", names.get("video")))
    asked = re.search(r"num_frames=(\d+)", code)
    assert clip.ndim == 4
    assert asked is None or len(clip) == int(asked[1])
    assert np.isfinite(clip).all()
    assert clip.std() > 0
    assert (tmp_path / "output.mp4").stat().st_size > 0


def test_all_blocks_are_there() -> None:
    assert len(BLOCKS) == GUIDE.read_text(encoding="utf-8").count("```py") == 9
