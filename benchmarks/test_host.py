"""What the engine costs the host, measured by pytest-benchmark on the CPU: the same code as the cases of the suite.

    pip install -e ".[bench]" && pytest benchmarks --benchmark-json host.json

Not collected by plain ``pytest``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench import Bench
from benchmarks.cases.host import stack_of, unloaded
from benchmarks.cases.lora import adapted
from benchmarks.subjects import Subject
from vramkit import plan
from vramkit.offload import apply_group_offloading

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the libraries

GROUPS = 200


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Tiny shapes on the CPU."""
    return Bench(folder=tmp_path, scale="smoke")


@pytest.mark.parametrize("weights", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_a_pass_without_copies(benchmark: Any, bench: Bench, weights: str, level: str) -> None:
    """Host seconds of a pass; ``extra_info`` has the number of groups that they are of."""
    call = unloaded(stack_of(GROUPS, bench, weights), f"vramkit {level}", bench)
    benchmark.extra_info.update(call.told())
    with torch.no_grad():
        benchmark(call.run)
    call.remove()


@pytest.mark.parametrize("weights", ["bf16", "fp8", "nf4"])
def test_the_same_pass_on_the_device(benchmark: Any, bench: Bench, weights: str) -> None:
    """What has to be taken off the pass without copies."""
    built = stack_of(GROUPS, bench, weights)
    with torch.no_grad():
        benchmark(lambda: built.model(built.x))


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_applying_and_removing(benchmark: Any, bench: Bench, level: str) -> None:
    """Both together, of weights in RAM."""
    built = stack_of(GROUPS, bench)
    benchmark(lambda: apply_group_offloading(built.model, "cpu", offload_type=f"{level}_level").remove())


def test_loading_to_the_first_step(benchmark: Any, bench: Bench) -> None:
    """From the files of a small checkpoint to the end of the first pass."""
    subject = Subject.of("wan-14b", "smoke", library="vramkit")
    given = subject.inputs(bench)
    subject.prepare(bench)

    def first_step() -> None:
        model = subject.load(bench)
        with torch.no_grad():
            apply_group_offloading(model, "cpu", offload_type="leaf_level")
            model(**given)

    benchmark(first_step)


def test_planning(benchmark: Any) -> None:
    """A small call of the smallest published model, without weights."""
    benchmark.pedantic(
        lambda: plan("wan2.1-1.3b", "8GiB", device="cpu", height=64, width=64, num_frames=5), rounds=2, warmup_rounds=0
    )


def test_switching_adapters(benchmark: Any, bench: Bench) -> None:
    """Between two of a streamed transformer."""
    adapters = adapted(Subject.of("wan-14b", "smoke", library="vramkit"), "vramkit leaf", bench)
    names = itertools.cycle(("style0", "style1"))
    benchmark(lambda: adapters.use(next(names)))
