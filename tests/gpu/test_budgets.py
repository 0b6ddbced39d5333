"""Turns, budgets, traces and the allocator on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from modules import Block, BlockNet, mapped_copy, tokens
from torch import nn

import vramkit
from vramkit.offload import Offload, PinBudget, Turns, apply_group_offloading

pytestmark = pytest.mark.gpu

MIB = 2**20


class Wide(nn.Module):
    """Blocks of 8 MiB each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(1024, 1024) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.synchronize()


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_slots_of_idle_components_are_given_back(tmp_path: Path) -> None:
    models = {
        name: Wide(blocks).eval().requires_grad_(False) for name, blocks in (("text", 12), ("dit", 16), ("vae", 8))
    }
    modules = {name: mapped_copy(model, tmp_path) for name, model in models.items()}
    resident = {name: mapped_copy(model, tmp_path).cuda() for name, model in models.items()}
    x = torch.randn(2, 64, 1024, device="cuda")
    with torch.no_grad():
        resident["text"](x)  # the workspace of cuBLAS is nobody's slot
    before = allocated()
    offloads = {name: apply_group_offloading(module, "cuda", slots=3) for name, module in modules.items()}
    with torch.no_grad():
        for name in ("text", "text", *["dit"] * 8, "vae", "text", *["dit"] * 8, "vae"):
            assert torch.equal(modules[name](x), resident[name](x))
            stays = sum(offload.stats().resident_bytes for offload in offloads.values())
            slots = offloads[name].stats().slots * offloads[name].stats().slot_bytes
            assert [each for each, offload in offloads.items() if not offload.is_at_rest] == [name]
            assert allocated() - before <= slots + stays + 12 * MIB
    for offload in offloads.values():
        offload.remove()


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_nothing_is_allocated_at_rest_and_the_bytes_are_the_same(level: str, tmp_path: Path) -> None:
    model = Wide(10).eval().requires_grad_(False)
    module, resident = mapped_copy(model, tmp_path), mapped_copy(model, tmp_path).cuda()
    x = torch.randn(2, 64, 1024, device="cuda")
    with torch.no_grad():
        expected = resident(x)
        del resident
        before = allocated()
        offload = apply_group_offloading(module, "cuda", offload_type=level, resident="30MiB")
        for _ in range(3):
            assert torch.equal(module(x), expected)
            offload.rest()
            assert allocated() - before <= MIB
        for options in ({"slots": 4}, {"resident": "60MiB"}, {"slots": 1, "resident": 0}):
            if level != "model_level":
                offload.adapt(**options)  # type: ignore[arg-type]
            assert torch.equal(module(x), expected)
    offload.remove()


def test_slots_change_hands_while_copies_and_kernels_are_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward

    def slow(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(2_000_000)
        return forward(self, x)

    models = [BlockNet(6).eval() for _ in range(2)]
    modules = [mapped_copy(model, tmp_path) for model in models]
    offloads = [apply_group_offloading(module, "cuda", turns=turns) for turns in [Turns(0)] for module in modules]
    monkeypatch.setattr(nn.Linear, "forward", slow)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for turn in range(6):
            x = tokens(8)
            with torch.cuda.stream(stream if turn % 3 else torch.cuda.current_stream()):
                results = [module(x) for module in modules]
            torch.cuda.synchronize()
            for result, model in zip(results, models, strict=True):
                torch.testing.assert_close(result.cpu(), model(x), rtol=1e-4, atol=1e-5)
    for offload in offloads:
        offload.remove()


def test_what_others_take_is_done_without(tmp_path: Path) -> None:
    model = Wide(16).eval().requires_grad_(False)
    module, resident = mapped_copy(model, tmp_path), mapped_copy(model, tmp_path).cuda()
    x = torch.randn(2, 64, 1024, device="cuda")
    with torch.no_grad():
        expected = resident(x)
        del resident
        offload: Offload = apply_group_offloading(module, "cuda", slots=4, resident="64MiB")
        assert torch.equal(module(x), expected)
        offload.rest()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 40 * MIB) / total)
        try:
            with pytest.warns(RuntimeWarning, match="no room"):
                assert torch.equal(module(x), expected)
            assert torch.equal(module(x), expected)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert offload.stats().slots < 4
    offload.remove()


def test_page_locked_bytes_of_several_stay_within_their_budget(tmp_path: Path) -> None:
    budget = PinBudget("400MiB")
    modules = [mapped_copy(Wide(30).eval().requires_grad_(False), tmp_path) for _ in range(2)]
    with pytest.warns(RuntimeWarning, match="could not page-lock"):
        offloads = [apply_group_offloading(module, "cuda", pin_budget=budget) for module in modules]
    x = torch.randn(2, 64, 1024, device="cuda")
    with torch.no_grad():
        for module in modules:
            module(x)
    assert sum(offload.stats().pinned_bytes for offload in offloads) == budget.used_bytes <= budget.limit_bytes
    assert offloads[1].stats().stores.keys() == {"mapped", "pageable"}
    for offload in offloads:
        offload.remove()
    assert budget.used_bytes == 0


def test_a_trace_of_a_device_tells_copies_and_stalls(tmp_path: Path) -> None:
    module = mapped_copy(Wide(16).eval().requires_grad_(False), tmp_path)
    offload = apply_group_offloading(module, "cuda")
    x = torch.randn(2, 64, 1024, device="cuda")
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        with vramkit.trace(tmp_path / "run.json") as traced:
            for _ in range(3):
                module(x)
    recording = traced.recording
    assert len(recording.of("pass")) == 3
    assert len(recording.of("compute")) == 48
    assert 1 < recording.rate_gbps < 200
    assert recording.stalled_s > 0, "the link is the limit of so small a computation"
    computed = recording.of("compute")
    assert all(a.start_s <= b.start_s for a, b in pairwise(computed))
    assert 0 <= recording.events[0].start_s < recording.events[-1].end_s < recording.memory.seconds + 0.1
    offload.remove()


def test_reserved_stays_close_to_allocated_without_environment_variables(tmp_path: Path) -> None:
    """Our transformer, 4 layers of the 14B width, in a process of its own: settings come before the first allocation."""
    script = textwrap.dedent("""
        import torch
        from vramkit.offload import apply_group_offloading
        from vramkit.offload.allocator import use_expandable_segments
        from vramkit.pipelines.wan.transformer import WanTransformer3DModel, WanTransformerConfig

        assert use_expandable_segments("cuda")
        model = WanTransformer3DModel(WanTransformerConfig(num_layers=4)).eval().bfloat16().requires_grad_(False)
        apply_group_offloading(model, "cuda", offload_type="leaf_level")
        given = dict(hidden_states=torch.randn(1, 16, 9, 60, 104, device="cuda", dtype=torch.bfloat16),
                     timestep=torch.tensor([500], device="cuda"),
                     encoder_hidden_states=torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16), return_dict=False)
        with torch.no_grad():
            for _ in range(3):
                model(**given)
        torch.cuda.synchronize()
        print(torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated())
    """)

    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 64 * MIB


class Embedded:
    """A pipeline that is given embeddings and a mask, and joins them."""

    def __init__(self) -> None:
        self.net = Wide(4).eval().requires_grad_(False)
        self.components = {"net": self.net}

    def __call__(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.net(embeds * mask.to(embeds.device))  # type: ignore[no-any-return]


def test_a_call_with_tensors_on_the_device_is_rehearsed() -> None:
    pipeline = Embedded()
    given = {"embeds": torch.randn(1, 4096, 1024, device="cuda"), "mask": torch.ones(1, 4096, 1, device="cuda")}
    with vramkit.fit(pipeline, "512MiB", device="cuda", **given) as fitted:
        assert not any("cannot be rehearsed" in note for note in fitted.plan.notes)
        assert 2 * given["embeds"].nbytes <= fitted.plan.before_bytes <= 3 * given["embeds"].nbytes
        made = pipeline(**given)
    assert torch.equal(made, pipeline.net.cuda()(given["embeds"] * given["mask"]))
