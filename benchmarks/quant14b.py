"""Quantized forwards of a Wan2.1-14B-shaped transformer, resident and streamed, ours and diffusers'.

    python -m benchmarks.quant14b --folder /tmp/wan14b --out results/quant14b.json --cases ours-fp8,ours-nf4
    python -m benchmarks.quant14b --folder /tmp/wan14b --out results/quant14b.json --cases diffusers-fp8,diffusers-nf4
    python -m benchmarks.quant14b --tiny --cases ours-fp8   # any machine, to see that it runs

Random bf16 weights at the published shapes are written once to a checkpoint folder and mapped from there. A case, a process
of its own, quantizes them (timed, with the part of the file that the page cache held before), measures the module with
everything on the device, then streamed. The ratio is streamed seconds / max(resident seconds of the same quantization,
streamed bytes / link): bytes as the engine counted them, the link as measured in the same process. Rows of cases that run
again replace those in the file.
Needs a CUDA device with 40 GiB, 64 GiB of RAM, bitsandbytes for nf4, and diffusers for the cases named after it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.measure import Row, environment, measure, release_memory, synchronize, table, write_json
from vramkit.errors import UnsupportedTensorError
from vramkit.memory import module_bytes, probe_link_gbps
from vramkit.offload import apply_group_offloading, load_mapped
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.pipelines.wan.transformer import WanTransformer3DModel, WanTransformerConfig
from vramkit.quant import BitsAndBytes4bitConfig, Fp8Config, QuantConfig, quantize, sqnr_db
from vramkit.quant.registry import handler_for

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
COLUMNS = (
    *("case", "frames", "s", "floor_s", "ratio", "allocated_gib", "reserved_gib", "quantize_s", "page_cache"),
    *("weights_gib", "streamed_gib", "link_gbps", "forward_db", "same_bytes", "error"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures."""

    case: str
    folder: Path
    height: int
    width: int
    frames: tuple[int, ...]
    repeats: int
    warm_up_s: float
    cold: bool

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS

    def config(self) -> dict[str, Any]:
        """The keys of config.json that are not about its class."""
        given = json.loads((self.folder / "config.json").read_text())
        return {key: value for key, value in given.items() if not key.startswith("_")}

    def inputs(self, frames: int) -> dict[str, Any]:
        """Random latents, a timestep and text states for one forward."""
        config = WanTransformerConfig(**self.config())
        generator = torch.Generator(device=DEVICE).manual_seed(1)
        options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16, "generator": generator}
        return {
            "hidden_states": torch.randn(1, 16, (frames - 1) // 4 + 1, self.height // 8, self.width // 8, **options),
            "timestep": torch.tensor([500], device=DEVICE),
            "encoder_hidden_states": torch.randn(1, 512, config.text_dim, **options),
            "return_dict": False,
        }


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def write_random_checkpoint(folder: Path, config: WanTransformerConfig) -> None:
    """Write random bf16 weights in the published names, and config.json."""
    with torch.device("meta"):
        model = WanTransformer3DModel(config)
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, device=DEVICE, dtype=torch.bfloat16)
        weights[name] = values.normal_(0, 0.02, generator=generator).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / WEIGHTS, weights)
    named = {"_class_name": "WanTransformer3DModel", **asdict(config)}
    (folder / "config.json").write_text(json.dumps(named))


def cached_fraction(path: Path) -> float:
    """Return the part of a file that the page cache holds (mincore of Linux), NaN where it cannot be asked."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        pages = math.ceil(len(mapped) / mmap.PAGESIZE)
        held = (ctypes.c_ubyte * pages)()
        view = np.frombuffer(mapped, dtype=np.uint8)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped)), held)
        del view  # the map cannot be closed while it is looked at
    return math.nan if failed else sum(byte & 1 for byte in held) / pages


def settle_page_cache(path: Path, *, cold: bool) -> float:
    """Read a file once, or ask the system to drop it; return the part that is cached now."""
    with path.open("rb", buffering=0) as file:
        if cold:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            buffer = bytearray(1 << 26)
            while file.readinto(buffer):
                pass
    return cached_fraction(path)


def held_bytes(model: nn.Module) -> int:
    """Count the bytes of a module, also of one with bitsandbytes' own parameters."""
    try:
        return module_bytes(model)
    except UnsupportedTensorError:
        states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
        scales: int = sum(state.absmax.nbytes for state in states if state is not None)
        return scales + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


# -- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """Measures the forwards of one case and collects its rows."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.link_gbps = round(probe_link_gbps(DEVICE), 2) if CUDA else None
        self.rows: list[Row] = []
        self._resident: dict[int, tuple[float, torch.Tensor]] = {}

    def prepare(self, build: Callable[[], nn.Module]) -> tuple[nn.Module, Row]:
        """Build the module that is measured, with the seconds that takes and the state of the page cache before."""
        cached = settle_page_cache(self.job.file, cold=self.job.cold)
        start = time.perf_counter()
        model = build()
        synchronize()
        notes = {"quantize_s": round(time.perf_counter() - start, 2), "page_cache": round(cached, 3)}
        return model, notes | {"weights_gib": round(held_bytes(model) / 2**30, 3)}

    def run(self, model: nn.Module, how: str, notes: Row, traffic: Callable[[], Row] | None = None) -> None:
        """Measure every number of frames; `traffic` tells of the bytes of a pass, None for resident."""
        for frames in self.job.frames:
            row: Row = {"case": f"{self.job.case} {how}", "frames": frames, **notes}
            try:
                given = self.job.inputs(frames)
                with torch.no_grad():
                    figures, result = measure(
                        lambda given=given: model(**given)[0],  # type: ignore[misc]
                        repeats=self.job.repeats,
                        warm_up_s=self.job.warm_up_s,
                    )
                row |= figures.row()
                self._compare(row, frames, result, traffic)
            except torch.cuda.OutOfMemoryError as error:
                row["error"] = str(error).split(".")[0]
            self.rows.append(row)
            print(row, flush=True)

    def _compare(self, row: Row, frames: int, result: torch.Tensor, traffic: Callable[[], Row] | None) -> None:
        if traffic is None:
            self._resident[frames] = row["s"], result
        elif frames in self._resident:
            row |= traffic() | {"link_gbps": self.link_gbps}
            floor, expected = self._resident[frames]
            if self.link_gbps:
                floor = max(floor, row["streamed_bytes"] / self.link_gbps / 1e9)
            row |= {"floor_s": round(floor, 4), "ratio": round(row["s"] / floor, 3)}
            row |= {
                "streamed_gib": round(row["streamed_bytes"] / 2**30, 3),
                "same_bytes": torch.equal(result, expected),
            }
        self._against_bf16(row, frames, result)

    def _against_bf16(self, row: Row, frames: int, result: torch.Tensor) -> None:
        """Keep our bf16 result in the folder; tell how far the others are from it."""
        path = self.job.folder / f"bf16-{self.job.height}x{self.job.width}x{frames}.safetensors"
        if self.job.case == "ours-bf16":
            save_file({"sample": result.cpu().contiguous()}, path)
        elif path.exists():
            row["forward_db"] = round(sqnr_db(load_file(path)["sample"], result.cpu()), 1)


@contextmanager
def streamed(model: nn.Module, **options: Any) -> Iterator[Callable[[], Row]]:
    """Offload a module; yields a function that returns the bytes of a pass, and how many were loaded since it was called.

    The two differ by what was loaded for a pass to come.
    """
    offload = apply_group_offloading(model, DEVICE, **options)
    synchronize()
    before = offload.stats()

    def traffic() -> Row:
        nonlocal before
        last, before = before, offload.stats()
        passes, loaded = before.passes - last.passes, before.loaded_bytes - last.loaded_bytes
        return {"streamed_bytes": before.streamed_bytes, "loaded_bytes": loaded, "passes": passes}

    try:
        yield traffic
    finally:
        offload.remove()
        release_memory()


# -- cases -------------------------------------------------------------------------------------------------------------


def _ours(bench: Bench, config: QuantConfig | None) -> None:
    if config is not None:
        handler_for(config)  # imports what it needs, which is not timed

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = WanTransformer3DModel(WanTransformerConfig(**bench.job.config()))
        load_mapped(model.eval(), bench.job.file)
        if config is not None:
            print(quantize(model, config), flush=True)
        return model

    model, notes = bench.prepare(build)
    model.to(DEVICE)
    bench.run(model, "resident", notes)
    for level in ("block_level", "leaf_level"):
        with streamed(model, offload_type=level) as traffic:
            bench.run(model, level.replace("_", " "), {}, traffic)


def case_ours_bf16(bench: Bench) -> None:
    """Not quantized: what the others are compared with."""
    _ours(bench, None)


def case_ours_fp8(bench: Bench) -> None:
    """fp8 storage, widened at use."""
    _ours(bench, Fp8Config())


def case_ours_fp8_mm(bench: Bench) -> None:
    """fp8 storage and fp8 products."""
    _ours(bench, Fp8Config(compute="scaled_mm"))


def case_ours_nf4(bench: Bench) -> None:
    """4 bits by bitsandbytes."""
    _ours(bench, BitsAndBytes4bitConfig(quant_type="nf4"))


def _their_model(bench: Bench) -> nn.Module:
    """Return diffusers' transformer with bf16 weights in RAM."""
    model = _their_class().from_pretrained(bench.job.folder, torch_dtype=torch.bfloat16)
    return model.eval()  # type: ignore[no-any-return]


def _their_class() -> Any:
    """Import diffusers, which is not timed."""
    from diffusers import WanTransformer3DModel as TheirTransformer

    return TheirTransformer


def _their_offloading(bench: Bench, model: nn.Module, kind: str) -> None:
    """Stream by diffusers' hooks; they count nothing, so every weight counts once."""
    from diffusers.hooks import apply_group_offloading as theirs

    moved = {"streamed_bytes": held_bytes(model)}
    blocks = {"num_blocks_per_group": 1} if kind == "block" else {}
    options = {"onload_device": DEVICE, "offload_device": torch.device("cpu"), "use_stream": CUDA}
    start = time.perf_counter()
    theirs(model, offload_type=f"{kind}_level", **options, **blocks)
    synchronize()
    bench.run(model, f"{kind} level", {"ready_s": round(time.perf_counter() - start, 2)}, lambda: moved)


def case_diffusers_bf16(bench: Bench) -> None:
    """diffusers: resident, then its group offloading, in bf16."""
    _their_class()
    model, notes = bench.prepare(lambda: _their_model(bench))
    bench.run(model.to(DEVICE), "resident", notes)
    _their_offloading(bench, model.to("cpu"), "leaf")


def case_diffusers_fp8(bench: Bench) -> None:
    """diffusers: layerwise casting, resident, then with its group offloading."""
    from diffusers.hooks import apply_layerwise_casting as theirs

    _their_class()

    def build() -> nn.Module:
        model = _their_model(bench)
        skipped = ("patch_embedding", "condition_embedder", "norm", "proj_out$")
        theirs(model, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=skipped)
        return model

    model, notes = bench.prepare(build)
    bench.run(model.to(DEVICE), "resident", notes)
    _their_offloading(bench, model.to("cpu"), "leaf")


def case_diffusers_nf4(bench: Bench) -> None:
    """diffusers: bitsandbytes nf4 through its own config, resident, then with its group offloading."""
    from diffusers import BitsAndBytesConfig

    transformer = _their_class()

    def build() -> nn.Module:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        model = transformer.from_pretrained(bench.job.folder, quantization_config=config, torch_dtype=torch.bfloat16)
        return model.eval()  # type: ignore[no-any-return]

    model, notes = bench.prepare(build)
    bench.run(model.to(DEVICE), "resident", notes)
    _their_offloading(bench, model, "leaf")


CASES: dict[str, Callable[[Bench], None]] = {
    name.removeprefix("case_").replace("_", "-"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}


# -- one process per case ----------------------------------------------------------------------------------------------


def _run_case(job: Job) -> list[Row]:
    """Measure one case in a process of its own; what goes wrong there becomes its row."""
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "rows.json"
        arguments = ["--folder", str(job.folder), "--one", job.case, "--out", str(result), "--height", str(job.height)]
        arguments += [
            "--width",
            str(job.width),
            "--frames",
            ",".join(map(str, job.frames)),
            "--repeats",
            str(job.repeats),
        ]
        arguments += ["--warm-up-s", str(job.warm_up_s), *(["--cold"] if job.cold else [])]
        code = subprocess.run([sys.executable, "-m", "benchmarks.quant14b", *arguments], check=False).returncode
        rows: list[Row] = json.loads(result.read_text()) if result.exists() else []
    if code:
        rows.append({"case": job.case, "error": f"its process ended with {code}"})
    return rows


def _merge(out: Path, case: str, rows: list[Row]) -> list[Row]:
    """Return the rows of the file, those of `case` replaced."""
    present: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    return [row for row in present if row["case"].split(" ")[0] != case] + rows


def write_report(out: Path) -> None:
    """Write the rows of a JSON file as a Markdown table beside it."""
    found = json.loads(out.read_text())
    facts = found["environment"] | {"allocator": found["allocator"]}
    lines = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    title = "# Quantized forwards of a Wan2.1-14B-shaped transformer"
    out.with_suffix(".md").write_text(f"{title}\n\n{lines}\n{table(found['rows'], COLUMNS)}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quant14b.json"), help="JSON file")
    parser.add_argument("--cases", default=",".join(CASES), help="of: " + ", ".join(CASES))
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "vramkit-wan14b", help="checkpoint"
    )
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", default="5,81", help="numbers of frames")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per row")
    parser.add_argument("--warm-up-s", type=float, default=1.5, help="seconds of calls that are not counted")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before quantizing")
    parser.add_argument("--tiny", action="store_true", help="a model of a few KB and pictures of 32 x 48")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.cases.split(",")) - CASES.keys()
    if unknown:
        parser.error(f"--cases names {sorted(unknown)}; there are {', '.join(CASES)}")
    if args.tiny:
        args.height, args.width, args.repeats, args.warm_up_s = 32, 48, 1, 0.0
        args.folder = args.folder.with_name(args.folder.name + "-tiny")
    return args


def main() -> None:
    args = _parse()
    frames = tuple(int(count) for count in args.frames.split(","))
    options = (args.folder, args.height, args.width, frames, args.repeats, args.warm_up_s, args.cold)
    if args.one:
        bench = Bench(Job(args.one, *options))
        try:
            CASES[args.one](bench)
        finally:
            args.out.write_text(json.dumps(bench.rows))
        return
    if not (args.folder / WEIGHTS).exists():
        start = time.perf_counter()
        size = TINY if args.tiny else {"num_layers": args.layers}
        write_random_checkpoint(args.folder, WanTransformerConfig(**size))
        release_memory()  # for the processes of the cases
        print(f"{args.folder / WEIGHTS}: written in {time.perf_counter() - start:.0f} s", flush=True)
    rows: list[Row] = []
    for case in args.cases.split(","):
        start = time.perf_counter()
        rows = _merge(args.out, case, _run_case(Job(case, *options)))
        print(f"-- {case}: {time.perf_counter() - start:.0f} s", flush=True)
        write_json(args.out, "quant14b", rows, allocator=os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
        write_report(args.out)
    print(json.dumps(environment()))
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
