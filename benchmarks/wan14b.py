"""One forward of a Wan2.1-14B-shaped transformer, resident and streamed, ours and diffusers', in one process.

    python -m benchmarks.wan14b --out results/wan14b --cases resident,block,leaf,lean
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python -m benchmarks.wan14b   # reserved stays close to allocated

Random bf16 weights at the published shapes, written once to a safetensors file and mapped from there. Each row tells the
seconds, the allocator's peaks, the floor max(resident seconds, streamed bytes / link) and how far from it the row is.
Needs a CUDA device with 40 GiB, 64 GiB of RAM, and diffusers for the cases that compare with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from benchmarks.measure import GIB, Row, environment, measure, release_memory, table, write_json
from vramkit.memory import module_bytes, probe_link_gbps
from vramkit.offload import Offload, apply_group_offloading, load_mapped
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.pipelines.wan.transformer import WanTransformer3DModel, WanTransformerConfig

DEVICE = torch.device("cuda")
SHAPES = {"480p f5": (480, 832, 5), "480p f33": (480, 832, 33), "480p f81": (480, 832, 81), "720p f81": (720, 1280, 81)}
SMALL = ("480p f5", "480p f33", "480p f81")
COLUMNS = ("case", "shape", "s", "floor_s", "ratio", "allocated_gib", "reserved_gib", "ready_s", "same_bytes", "error")


def inputs(shape: str) -> dict[str, Any]:
    """Random latents, a timestep and text states for one forward."""
    height, width, frames = SHAPES[shape]
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16, "generator": generator}
    return {
        "hidden_states": torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, **options),
        "timestep": torch.tensor([500], device=DEVICE),
        "encoder_hidden_states": torch.randn(1, 512, 4096, **options),
        "return_dict": False,
    }


def random_checkpoint(folder: Path) -> Path:
    """Write random weights of the 14B shape in the published names: most in bf16, the few that stay fp32 in fp32."""
    with torch.device("meta"):
        model = WanTransformer3DModel(WanTransformerConfig())
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, device=DEVICE, dtype=torch.bfloat16)
        weights[name] = values.normal_(0, 0.02, generator=generator).cpu()
    path = folder / "diffusion_pytorch_model.safetensors"
    write_checkpoint(path, weights)
    return path


def our_model() -> nn.Module:
    """Return our transformer without weights."""
    with torch.device("meta"):
        return WanTransformer3DModel(WanTransformerConfig()).eval()


def their_model() -> nn.Module:
    """Return diffusers' transformer without weights (its rotary table is not in checkpoints, so it is made here)."""
    from diffusers import WanTransformer3DModel as TheirTransformer
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    with torch.device("meta"):
        model = TheirTransformer(num_layers=40)
    model.rope = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    return model.eval()  # type: ignore[no-any-return]


class Bench:
    """Runs cases, remembers resident seconds and results, collects rows."""

    def __init__(self, file: Path, link_gbps: float) -> None:
        self.file = file
        self.link_gbps = link_gbps
        self.rows: list[Row] = []
        self.resident_s: dict[tuple[str, str], float] = {}
        self.results: dict[tuple[str, str], torch.Tensor] = {}

    def run(self, case: str, model: nn.Module, shapes: tuple[str, ...], **options: Any) -> None:
        """Measure forwards of `model`; `like` names the module family whose resident run is the reference."""
        like, streamed_bytes = options.pop("like"), options.pop("streamed_bytes", 0)
        remember, notes = options.pop("remember", False), options.pop("notes", {})
        for shape in shapes:
            row: Row = {"case": case, "shape": shape, **notes}
            try:
                given = inputs(shape)
                with torch.no_grad():
                    figures, result = measure(lambda given=given: model(**given)[0], **options)  # type: ignore[misc]
                row |= figures.row()
                self._compare(row, like, shape, streamed_bytes, result, remember=remember)
            except torch.cuda.OutOfMemoryError as error:
                row["error"] = str(error).split(".")[0]
            self.rows.append(row)
            print(row, flush=True)

    def _compare(
        self, row: Row, like: str, shape: str, streamed_bytes: int, result: torch.Tensor, *, remember: bool
    ) -> None:
        if remember:
            self.resident_s[like, shape] = row["s"]
            self.results[like, shape] = result.cpu()
            return
        reference = self.results.get((like, shape))
        if reference is not None:
            ours, theirs = result.cpu(), reference
            row["same_bytes"] = torch.equal(ours, theirs)
            row["relative_error"] = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if (like, shape) in self.resident_s:
            floor = max(self.resident_s[like, shape], streamed_bytes / self.link_gbps / 1e9)
            row |= {"floor_s": round(floor, 4), "ratio": round(row["s"] / floor, 3), "streamed_bytes": streamed_bytes}


@contextlib.contextmanager
def offloaded(model: nn.Module, **options: Any) -> Iterator[tuple[Offload, float]]:
    """Apply offloading; yields the handle and the seconds until a forward can start."""
    start = time.perf_counter()
    offload = apply_group_offloading(model, DEVICE, **options)
    torch.cuda.synchronize()
    try:
        yield offload, time.perf_counter() - start
    finally:
        offload.remove()
        release_memory()


def case_resident(bench: Bench) -> None:
    """Everything on the device: diffusers' module and ours."""
    for like, build in (("diffusers", their_model), ("vramkit", our_model)):
        model = load_mapped(build(), bench.file).to(DEVICE)
        bench.run(f"resident {like}", model, SMALL, like=like, remember=True)
        del model
        release_memory()


def _streamed(bench: Bench, case: str, build: Callable[[], nn.Module], shapes: tuple[str, ...], **options: Any) -> None:
    like = "diffusers" if build is their_model else "vramkit"
    start = time.perf_counter()
    model = load_mapped(build(), bench.file)
    loaded_s = time.perf_counter() - start
    with offloaded(model, **options) as (offload, applied_s):
        stats = offload.stats()
        notes = {"ready_s": round(loaded_s + applied_s, 2), "stores": stats.stores, "slot_mib": stats.slot_bytes >> 20}
        bench.run(case, model, shapes, like=like, streamed_bytes=stats.streamed_bytes, notes=notes)
        print(offload.stats(), flush=True)


def case_block(bench: Bench) -> None:
    """Block level, eager, diffusers' module under our engine."""
    _streamed(bench, "block, diffusers' module", their_model, SMALL)


def case_ours(bench: Bench) -> None:
    """Block level, eager, our module."""
    _streamed(bench, "block, our module", our_model, SMALL)


def case_leaf(bench: Bench) -> None:
    """Leaf level, diffusers' module under our engine."""
    _streamed(bench, "leaf, diffusers' module", their_model, SMALL, offload_type="leaf_level")


def case_lean(bench: Bench) -> None:
    """Leaf level, our module: attention and feed-forward travel as wholes; the least memory."""
    _streamed(bench, "leaf, our module", our_model, tuple(SHAPES), offload_type="leaf_level")


def case_capped(bench: Bench) -> None:
    """Our module at leaf level with the allocator capped, as on a small card."""
    total = torch.cuda.get_device_properties(0).total_memory
    for shape, cap_gib in (("480p f81", 2.6), ("720p f81", 4.0)):
        release_memory()
        torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total)
        _streamed(bench, f"leaf, our module, {cap_gib} GiB cap", our_model, (shape,), offload_type="leaf_level")
        torch.cuda.set_per_process_memory_fraction(1.0)


def case_ram(bench: Bench) -> None:
    """Weights in ordinary RAM: how long until the first forward can start."""
    model = _in_ram(their_model(), bench.file)
    with offloaded(model) as (offload, applied_s):
        stats = offload.stats()
        notes = {"ready_s": round(applied_s, 2), "stores": stats.stores}
        options = {"like": "diffusers", "streamed_bytes": stats.streamed_bytes, "notes": notes}
        bench.run("block, diffusers' module, from RAM", model, ("480p f5",), **options)


def _in_ram(model: nn.Module, file: Path) -> nn.Module:
    for parameter in load_mapped(model, file).parameters():
        parameter.data = parameter.data.clone()
    return model


def _resident_then_streamed(
    bench: Bench, model: nn.Module, name: str, shapes: tuple[str, ...], notes: Row | None = None
) -> None:
    """Measure one module with every group on the device, then streamed: the same code, and compiled code, in both."""
    with offloaded(model, resident="100GiB"):
        bench.run(f"resident, {name}", model, shapes, like=name, remember=True)
    with offloaded(model) as (offload, applied_s):
        stats = offload.stats()
        notes = {"ready_s": round(applied_s, 2), "stores": stats.stores} | (notes or {})
        bench.run(f"block, {name}", model, shapes, like=name, streamed_bytes=stats.streamed_bytes, notes=notes)


def case_compiled(bench: Bench) -> None:
    """Our module with blocks compiled fullgraph, resident and streamed; recompiles while streaming are counted."""
    from torch._dynamo.utils import counters

    model = load_mapped(our_model(), bench.file)
    for block in cast("nn.ModuleList", model.blocks):
        block.compile(fullgraph=True, dynamic=False)
    with offloaded(model), torch.no_grad():
        for shape in ("480p f5", "480p f81"):
            model(**inputs(shape))
    graphs = counters["stats"]["unique_graphs"]
    _resident_then_streamed(bench, model, "our module compiled", ("480p f5", "480p f81"))
    recompiles = counters["stats"]["unique_graphs"] - graphs
    bench.rows.append({"case": "graphs, then recompiles of our module", "s": graphs, "ratio": recompiles})


def case_fp8(bench: Bench) -> None:
    """fp8 storage with a scale per row, resident and streamed: the link carries half the bytes."""
    from vramkit.casting import apply_layerwise_casting

    model = load_mapped(our_model(), bench.file)
    start = time.perf_counter()
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)
    notes = {"cast_s": round(time.perf_counter() - start, 2)}
    _resident_then_streamed(bench, model, "our module in fp8", ("480p f5", "480p f81"), notes)


def case_diffusers(bench: Bench) -> None:
    """diffusers' own hooks on its own module, from RAM."""
    from diffusers.hooks import apply_group_offloading as theirs

    for kind, kwargs in (("block", {"num_blocks_per_group": 1}), ("leaf", {})):
        model = _in_ram(their_model(), bench.file)
        start = time.perf_counter()
        options = {"onload_device": DEVICE, "offload_device": torch.device("cpu"), "use_stream": True}
        theirs(model, offload_type=f"{kind}_level", **options, **kwargs)
        torch.cuda.synchronize()
        notes = {"ready_s": round(time.perf_counter() - start, 2)}
        streamed = {"like": "diffusers", "streamed_bytes": module_bytes(model)}
        bench.run(f"diffusers {kind} + stream", model, SMALL, repeats=2, notes=notes, **streamed)
        del model
        release_memory()
        torch._C._host_emptyCache()


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


def _report(bench: Bench, notes: Row) -> str:
    facts = "".join(f"- {name}: {value}\n" for name, value in (environment() | notes).items())
    return f"# One forward of a Wan2.1-14B-shaped transformer\n\n{facts}\n{table(bench.rows, COLUMNS)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wan14b"), help="path without an ending")
    parser.add_argument("--cases", default=",".join(CASES), help="of: " + ", ".join(CASES))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to keep the checkpoint (default: a temporary one)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        folder = args.folder or Path(temporary)
        file = folder / "diffusion_pytorch_model.safetensors"
        file = file if file.exists() else random_checkpoint(folder)
        bench = Bench(file, probe_link_gbps(DEVICE))
        print(
            environment(),
            f"link {bench.link_gbps:.1f} GB/s, checkpoint {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        for name in args.cases.split(","):
            start = time.perf_counter()
            CASES[name](bench)
            print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
            notes = {"link_gbps": round(bench.link_gbps, 2), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
            write_json(args.out.with_suffix(".json"), "wan14b", bench.rows, **notes)
            args.out.with_suffix(".md").write_text(_report(bench, notes))
    print(table(bench.rows, COLUMNS))


if __name__ == "__main__":
    main()
