"""Block caches of diffusers decide in every step which blocks run; what is skipped is not loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from torch import nn

from vramkit.offload import apply_group_offloading

STEPS = 9
BLOCKS = 6


def wan() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = WanTransformer3DModel(
        num_layers=BLOCKS, num_attention_heads=4, attention_head_dim=32, text_dim=32, ffn_dim=1024, freq_dim=16
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 1, 8, 8),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    return model.eval(), inputs


def flux() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=BLOCKS - 2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    return model.eval(), inputs


def first_block_cache(model: nn.Module) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))


def mag_cache(model: nn.Module) -> None:
    config = MagCacheConfig(
        mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, threshold=0.5, max_skip_steps=2, retention_ratio=0.2
    )
    apply_mag_cache(model, config)


def run(model: nn.Module, inputs: dict[str, torch.Tensor], after: Callable[[int], None] = lambda _: None) -> list[Any]:
    """Run the steps of a sampler; every third one changes so much that nothing may be skipped."""
    outputs = []
    with torch.no_grad(), model.cache_context("cond"):
        for step in range(STEPS):
            changed = inputs["hidden_states"] * (1 + step // 3)
            outputs.append(model(**{**inputs, "hidden_states": changed}, return_dict=False)[0])
            after(step)
    return outputs


@pytest.mark.parametrize("is_cached_first", [True, False])
@pytest.mark.parametrize("cache", [first_block_cache, mag_cache])
@pytest.mark.parametrize("kind", [wan, flux])
@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "block_level"},
        {"offload_type": "block_level", "num_blocks_per_group": 2, "slots": 1},
        {"offload_type": "leaf_level", "unit_bytes": 100_000},
    ],
)
def test_what_a_cache_skips_is_not_loaded(
    options: dict[str, Any],
    kind: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]],
    cache: Callable[[nn.Module], None],
    is_cached_first: bool,
) -> None:
    torch.manual_seed(0)
    resident, inputs = kind()
    model = kind()[0]
    model.load_state_dict(resident.state_dict())
    cache(resident)
    calls: list[nn.Module] = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    expected = run(resident, inputs)
    if is_cached_first:
        cache(model)
    offload = apply_group_offloading(model, "cpu", **options)
    if not is_cached_first:
        cache(model)
    assert all(map(torch.equal, run(model, inputs), expected))
    called: list[set[nn.Module]] = []

    def after(_: int) -> None:
        called.append(set(calls))
        calls.clear()

    for _ in range(3):  # twice to see what comes after what, once to count
        model._reset_stateful_cache()
        calls.clear()
        called.clear()
        before = offload.stats()
        assert all(map(torch.equal, run(model, inputs, after), expected))
    groups = offload._engine.assembly.groups
    used = [group for step in called for group in groups if step & {owner for owner, _ in group.owners()}]
    stats = offload.stats()
    assert len(used) < STEPS * len(groups) * 0.8  # steps were skipped
    assert stats.loads - before.loads == len(used)
    assert stats.dropped_loads == before.dropped_loads
