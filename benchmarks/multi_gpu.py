"""Several cards beside one, in one run: streamed weights, shared tokens, branches of guidance, rows and tiles of a decode.

    python -m benchmarks.multi_gpu --out results/multi_gpu                       # every case on two cards
    python -m benchmarks.multi_gpu --cases link,guidance --ranks 4 --folder /data
    python -m benchmarks.multi_gpu --cases link,guidance,compute --weights gathered   # beside those that are pushed
    python -m benchmarks.multi_gpu --tiny                                        # toy sizes on the CPU, by gloo

Random bf16 weights at the published shapes, written once to safetensors files, by all ranks at once, and mapped by each. Of
each case the first card runs it alone while the others wait, then all cards together; a row tells seconds (the slowest
rank's median), the ratio and its target, the allocator's peak on each side (with slots that other ranks write into, which
are outside the allocator), and whether the results are the same bytes. Where weights stream, `weights` says how they came
from rank to rank: pushed into each other's slots (asked for unless `--weights` says otherwise), gathered by NCCL, both, or
read apart, all by each rank. Decodes are compared with the whole decode on one card, those in tiles with tiles. NCCL's
buffers are outside the peaks; `used_gib` is what the driver says of the fullest card. Needs 32 GiB of disk and of RAM for
each of the two models.

The cases that tell most come first. A row is written when it is there. A case that takes longer than `--limit-s` ends the
run, with the stacks of its threads on stderr; so does the run that takes longer than `--total-s`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import faulthandler
import gc
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import vramkit
from benchmarks.numbers import at_least_one
from benchmarks.rows import Results, Row
from vramkit.device_memory import memory_of
from vramkit.distributed import Mesh, connect
from vramkit.distributed.branches import GuidanceBranches
from vramkit.distributed.sequence import SequenceRanks
from vramkit.distributed.tiles import TileRanks
from vramkit.memory import probe_link_gbps
from vramkit.offload import Offload, apply_group_offloading, load_mapped, parameters_on_meta
from vramkit.offload.checkpoint import write_checkpoint

GIB = 2**30
OUT = Path("benchmarks/results/multi_gpu")
TINY_OUT = Path("tiny_multi_gpu")  # toy sizes shall not take the place of what was measured
# Of the seconds of one card, on two.
TARGETS = {
    "link": 0.53,
    "compute": 0.54,
    "decode": 0.56,
    "guidance": 0.51,
    "decode_720p": 0.56,
    "decode_tiles": 0.56,
    "hunyuan": 0.54,
}
MODELS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # class, published config, tiny one
    "wan": (
        "WanTransformer3DModel",
        {},
        {
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 96,
            "num_layers": 3,
        },
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {},
        {
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "rope_axes_dim": (8, 8, 8),
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
        },
    ),
    "vae": ("AutoencoderKLWan", {}, {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}),
}
SHAPES = {  # model, (height, width, frames), and those of --tiny
    "link": ("wan", (480, 832, 5), (32, 48, 5)),
    "compute": ("wan", (480, 832, 81), (32, 48, 13)),
    "decode": ("vae", (480, 832, 81), (192, 96, 5)),
    "guidance": ("wan", (480, 832, 33), (32, 48, 9)),
    "decode_720p": ("vae", (720, 1280, 81), (240, 144, 5)),
    "decode_tiles": ("vae", (480, 832, 81), (96, 96, 5)),
    "hunyuan": ("hunyuan", (720, 1280, 129), (32, 48, 9)),
}
_REPEATED_S = 12.0  # for how long a side of a case is repeated, once at least
_THREADS = 4  # that write weights, of each rank
_SHARD_BYTES = 2 * 10**9


class Bench:
    """One rank of the run."""

    def __init__(
        self, mesh: Mesh, branched: Mesh, folder: Path, *, is_tiny: bool, repeats: int, is_apart: bool
    ) -> None:
        self.mesh, self.branched, self.is_apart = mesh, branched, is_apart
        self.device, self.is_tiny, self.repeats = mesh.device, is_tiny, repeats
        self.dtype = torch.float32 if is_tiny else torch.bfloat16
        self._folder = folder

    def model(self, name: str) -> nn.Module:
        """A model whose weights are views of files, of which each rank has written some."""
        kind, published, tiny = MODELS[name]
        with parameters_on_meta():
            model: nn.Module = getattr(vramkit, kind).from_config(tiny if self.is_tiny else published).eval()
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        shards = self._shards(model)
        names = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
        own = [at for at in range(self.mesh.rank, len(shards), self.mesh.size) if not (folder / names[at]).exists()]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda at: self._write(folder / names[at], shards[at], seed=at), own))
        index = folder / "model.safetensors.index.json"
        if self.mesh.is_first:
            placed = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
            index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
        self.mesh.all.barrier()
        return load_mapped(model, index)

    def _shards(self, model: nn.Module) -> list[dict[str, torch.Size]]:
        """Names and shapes of weights, in files of a few GB."""
        shards: list[dict[str, torch.Size]] = [{}]
        room = _SHARD_BYTES
        for key, parameter in model.named_parameters():
            if room < 0:
                shards.append({})
                room = _SHARD_BYTES
            shards[-1][key] = parameter.shape
            room -= parameter.numel() * self.dtype.itemsize
        return shards

    def _write(self, file: Path, shapes: Mapping[str, torch.Size], *, seed: int) -> None:
        """Write random weights, which are made on the device."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        made = (torch.empty(shape, device=self.device, dtype=self.dtype) for shape in shapes.values())
        write_checkpoint(
            file, {key: w.normal_(0, 0.02, generator=generator) for key, w in zip(shapes, made, strict=True)}
        )

    def inputs(self, case: str, seed: int = 1) -> dict[str, Any]:
        """Random inputs, the same on all ranks."""
        name, full, tiny = SHAPES[case]
        height, width, frames = tiny if self.is_tiny else full
        generator = torch.Generator().manual_seed(seed)
        latent = (frames - 1) // 4 + 1, height // 8, width // 8

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        if name == "vae":
            return {"z": draw(1, 16, *latent)}
        given: dict[str, Any] = {
            "hidden_states": draw(1, 16, *latent),
            "timestep": torch.tensor([500], device=self.device),
        }
        text = {"wan": 32 if self.is_tiny else 4096, "hunyuan": 32 if self.is_tiny else 4096}[name]
        given["encoder_hidden_states"] = draw(1, 16 if self.is_tiny else 512 if name == "wan" else 256, text)
        if name == "hunyuan":
            given |= {
                "encoder_attention_mask": (given["encoder_hidden_states"].shape[1],),
                "pooled_projections": draw(1, 16 if self.is_tiny else 768),
                "guidance": torch.tensor([6000.0], device=self.device, dtype=self.dtype),
            }
        return given | {"return_dict": False}

    def measured(self, run: Callable[[], Tensor], *, is_shared: bool) -> tuple[float, float, float, Tensor]:
        """Seconds (median), allocator peak in GiB, what the driver counts in GiB, and the result on the host."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            memory_of(self.device).look()  # and so it sees that peaks were reset
        run()  # records orders and warms up
        seconds: list[float] = []
        most = self.repeats
        while len(seconds) < most:
            self._synchronize()
            start = time.perf_counter()
            result = run()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:  # ranks that share a run repeat it equally often
                once_s = max(self.mesh.all.collect(seconds[0])) if is_shared else seconds[0]
                most = max(1, min(self.repeats, round(_REPEATED_S / once_s)))
        peak = used = 0.0
        if self.device.type == "cuda":
            peak = memory_of(self.device).peak_bytes / GIB
            free, total = torch.cuda.mem_get_info()
            used = (total - free) / GIB
        return statistics.median(seconds), peak, used, result.cpu()

    def row(self, case: str, alone: Callable[[], Tensor], together: Callable[[], Tensor]) -> Row | None:
        """Measure a case on the first card alone, then on all; the row is on the first rank."""
        one = self.measured(alone, is_shared=False) if self.mesh.is_first else None
        self.mesh.all.barrier()
        s, peak, used, result = self.measured(together, is_shared=True)
        figures = self.mesh.all.collect([s, peak, used])
        if one is None:
            return None
        slowest, peaks, fullest = (max(each) for each in zip(*figures, strict=True))
        error = float((result.float() - one[3].float()).norm() / one[3].float().norm())
        return {
            "case": case,
            "ranks": self.mesh.size,
            "one_s": round(one[0], 4),
            "s": round(slowest, 4),
            "ratio": round(slowest / one[0], 3),
            "target": TARGETS[case],
            "one_gib": round(one[1], 3),
            "gib": round(peaks, 3),
            "one_used_gib": round(one[2], 2),
            "used_gib": round(fullest, 2),
            "same_bytes": torch.equal(result, one[3]),
            "relative_error": error,
        } | self._carried(case)

    def _carried(self, case: str) -> Row:
        """How weights have come to ranks since this was asked last."""
        ways = sorted({way for mesh in (self.mesh, self.branched) for way in mesh.carried})
        for mesh in (self.mesh, self.branched):
            mesh.carried.clear()
        return {} if SHAPES[case][0] == "vae" else {"weights": " and ".join(ways) or "apart"}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def forward(bench: Bench, case: str) -> Row | None:
    """One forward: its weights streamed by one rank, then shared by all, as are the tokens."""
    given = bench.inputs(case)
    with torch.no_grad(), _streamed(bench, case) as streamed:
        return bench.row(case, lambda: streamed.run(given), lambda: streamed.replaced(bench.mesh).run(given))


def guidance(bench: Bench, case: str) -> Row | None:
    """Two predictions: in turn on one card, then on a branch of ranks each."""
    prompts = [bench.inputs(case, seed) for seed in (1, 2)]
    prompts[1]["hidden_states"] = prompts[0]["hidden_states"]
    branches = GuidanceBranches(bench.branched.in_guidance)
    with torch.no_grad(), _streamed(bench, case) as streamed:

        def predict(given: Mapping[str, Any]) -> tuple[Tensor]:
            return (streamed.run(given),)

        def together() -> Tensor:
            streamed.replaced(bench.branched)
            return torch.stack(branches.predictions(predict, *prompts))

        return bench.row(case, lambda: torch.stack([streamed.run(each) for each in prompts]), together)


def decode(bench: Bench, case: str) -> Row | None:
    """A decode of whole pictures or in tiles: all by one card, then by each a part of the rows or some of the tiles."""
    vae: Any = bench.model("vae").to(bench.device)
    if case == "decode_tiles":
        tiles = {f"tile_sample_{what}": 32 for what in ("min_height", "min_width", "stride_height", "stride_width")}
        vae.enable_tiling(**(tiles if bench.is_tiny else {}))
    z = bench.inputs(case)["z"]

    def together() -> Tensor:
        vae.tile_ranks = TileRanks(bench.mesh.all)
        sample: Tensor = vae.decode(z).sample
        return sample

    return bench.row(case, lambda: vae.decode(z).sample, together)


@contextlib.contextmanager
def _streamed(bench: Bench, case: str) -> Iterator[_Streamed]:
    """Until the end of a case, whose host memory the next one needs."""
    streamed = _Streamed(bench, case, None)
    yield streamed
    streamed.remove()


class _Streamed:
    """A transformer, offloaded by its own rank when it first runs, or by all of a mesh."""

    def __init__(self, bench: Bench, case: str, mesh: Mesh | None) -> None:
        self._model: Any = bench.model(SHAPES[case][0])
        self._bench, self._mesh = bench, mesh
        self._offload: Offload | None = None

    def replaced(self, mesh: Mesh) -> _Streamed:
        """The same shared by all ranks of `mesh`."""
        if self._mesh is None:
            self.remove()
            self._mesh = mesh
        return self

    def remove(self) -> None:
        if self._offload is not None:
            self._offload.remove()
            self._model.set_token_ranks(None)
        self._offload = None

    def run(self, given: Mapping[str, Any]) -> Tensor:
        if self._offload is None:
            mesh = self._mesh.apart if self._mesh is not None and self._bench.is_apart else self._mesh
            self._offload = apply_group_offloading(self._model, self._bench.device, mesh=mesh)
            if self._mesh is not None and self._mesh.sequence > 1:
                self._model.set_token_ranks(SequenceRanks(self._mesh.in_sequence))
        result: Tensor = self._model(**given)[0]
        return result


CASES: Mapping[str, Callable[[Bench, str], Row | None]] = {
    "link": forward,
    "compute": forward,
    "decode": decode,
    "guidance": guidance,
    "decode_720p": decode,
    "decode_tiles": decode,
    "hunyuan": forward,  # last: it takes as long as all others together, and weights of its own
}


def work(rank: int, args: argparse.Namespace, port: int, folder: str) -> None:
    """What one rank does."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": args.ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    # Loading a kernel at its first use waits for those that run, and one of NCCL runs until the other card has come to it.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    if args.tiny:
        torch.set_num_threads(1)
    device = "cpu" if args.tiny else None
    rows: list[Row] = []
    with connect(device=device, timeout_s=600, push=args.weights == "pushed") as mesh:
        branched = mesh.with_branches(2) if args.ranks % 2 == 0 else mesh
        link_gbps = None if args.tiny else round(probe_link_gbps(mesh.device), 1)
        notes = environment(mesh.device) | {"links_at_once_gbps": mesh.all.collect(link_gbps)}
        is_apart = args.weights == "apart"
        bench = Bench(mesh, branched, Path(folder), is_tiny=args.tiny, repeats=args.repeats, is_apart=is_apart)
        with limited(args.limit_s):
            for ranks in (mesh.all, mesh.weights, branched.all, branched.weights, branched.in_guidance):
                ranks.begin_on(mesh.device)
        for case in args.cases.split(","):
            start = time.perf_counter()
            with limited(args.limit_s):
                row = CASES[case](bench, case)
            if row is not None:
                rows.append(row)
                print(row, f"-- {time.perf_counter() - start:.0f} s", flush=True)
                write(args.out, rows, notes)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process, and with it the run, where something takes longer: what waits for a device raises nothing."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def environment(device: torch.device) -> Row:
    """What the run was on."""
    nccl: Any = torch.cuda.nccl
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "nccl": ".".join(map(str, nccl.version())) if device.type == "cuda" else None,
    }


def write(out: Path, rows: list[Row], notes: Row) -> None:
    """Put the rows into a file of results, in the place of older ones of these cases, and write its table."""
    from benchmarks.report import report

    file = out.with_suffix(".json")
    results = Results.of(file, title="multi_gpu")
    results.add(rows, notes)
    results.write(file)
    out.with_suffix(".md").write_text(report(results))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"path without an ending (default: {OUT}, with --tiny {TINY_OUT})")
    parser.add_argument("--cases", default=",".join(CASES), help="of: " + ", ".join(CASES))
    parser.add_argument("--ranks", type=at_least_one, default=2, help="cards")
    parser.add_argument("--weights", choices=("pushed", "gathered", "apart"), default="pushed", help="how they travel")
    parser.add_argument(
        "--repeats", type=at_least_one, default=3, help="of each side of a case at most, after a first one"
    )
    parser.add_argument("--limit-s", type=float, default=150.0, help="seconds after which a case ends the run")
    parser.add_argument("--total-s", type=float, default=540.0, help="seconds after which the run ends")
    parser.add_argument("--folder", type=Path, default=None, help="where to keep the checkpoints (default: temporary)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.cases.split(",") if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    args.out = args.out or (TINY_OUT if args.tiny else OUT)
    try:
        if not args.tiny and torch.cuda.device_count() < args.ranks:
            raise ValueError(
                f"--ranks {args.ranks}, and this machine has {torch.cuda.device_count()} cards; see --tiny"
            )
        Results.kept_in(args.out.with_suffix(".json"), title="multi_gpu")
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start: Any = mp.start_processes  # type: ignore[attr-defined]
        method = "forkserver" if args.tiny else "spawn"
        ranks = start(work, (args, port, str(folder)), nprocs=args.ranks, join=False, start_method=method)
        end = time.monotonic() + args.total_s
        while not ranks.join(timeout=max(0.1, min(5.0, end - time.monotonic()))):
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                sys.exit(f"the run took longer than {args.total_s:.0f} s; what was measured is in {args.out}.json")


if __name__ == "__main__":
    main()
