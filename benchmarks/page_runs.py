"""Tables of pages from files of single runs, which scripts before the suite wrote."""

from __future__ import annotations

from benchmarks.page_cells import figure, row_of, seconds, table_of

__all__ = ["families", "loaders", "wan14b"]


def wan14b() -> str:
    """One forward of Wan 14B at three lengths."""
    names = {
        "diffusers, resident": "resident diffusers",
        "diffusers, block + stream": "diffusers block + stream",
        "diffusers, leaf + stream": "diffusers leaf + stream",
        "vramkit, block, diffusers' module": "block, diffusers' module",
        "vramkit, leaf, diffusers' module": "leaf, diffusers' module",
        "vramkit, leaf, vramkit's module": "leaf, our module",
        "the same, blocks compiled, block level": "block, our module compiled",
    }
    lines = []
    for label, case in names.items():
        at = {frames: row_of("wan14b", case=case, shape=f"480p f{frames}") for frames in (5, 33, 81)}
        ready = figure(at[81], "ready_s", ".1f")
        lines.append(
            [label, *map(seconds, at.values()), figure(at[81], "reserved_gib", "#.3g"), f"{ready} s" if ready else ""]
        )
    heads = (
        "", "5 frames, s (of its floor)", "33 frames", "81 frames", "reserved at 81 frames, GiB", "ready after",
    )  # fmt: skip
    return table_of(heads, lines)


def families() -> str:
    """Whole clips of the other families."""
    names = {
        "HunyuanVideo, 1280x720, 129 frames": "hunyuan",
        "CogVideoX-5B, 720x480, 49 frames": "cogvideox-5b",
        "CogVideoX-2B, 720x480, 49 frames": "cogvideox-2b",
        "LTX-Video, 768x512, 161 frames": "ltx",
    }
    lines = []
    for label, family in names.items():
        resident = row_of("families", family=family, case="transformer resident")
        row = row_of("families", family=family, case="streamed, tiled decode")
        weights = figure(resident, "weights_gib", ".1f")
        lines.append(
            [
                f"{label} ({weights} GiB of weights)" if weights else label,
                seconds(row, ".4g", ".3f", "step_s"),
                figure(row, "step_gib", ".2f"),
                figure(row, "decode_s", ".1f"),
                figure(row, "decode_gib", ".2f"),
                f"{figure(row, 'cap_gib', '.0f')} GiB",
            ]
        )
    heads = (
        "", "step, s (of its floor)", "peak of steps, GiB", "decode, s", "peak of decode, GiB", "ran under a cap of",
    )  # fmt: skip
    return table_of(heads, lines)


def loaders() -> str:
    """A forward by who loaded the transformer."""
    names = {
        "diffusers' `from_pretrained`": "from_pretrained",
        "`safetensors.torch.load_file`, assigned": "load_file_assigned",
        "`torch.load(mmap=True)`, assigned": "torch_load_mapped",
        "`load_mapped`": "mapped",
        "constructed in memory": "constructed",
    }
    lines = []
    for label, loader in names.items():
        row = row_of("loaders", loader=loader)
        lines.append(
            [
                label,
                figure(row, "ready_s", ".1f"),
                figure(row, "grown_gib", ".1f"),
                ", ".join(row.get("stores", {})),
                figure(row, "steady_s", ".3f"),
            ]
        )
    return table_of(("loaded by", "ready after, s", "memory it took, GiB", "rests", "forward, s"), lines)
