"""A profile made by hand: 40 blocks of 100 MiB that run 50 times, and an autoencoder of two."""

from __future__ import annotations

from typing import Any

from vramkit.memory import GIB, MIB
from vramkit.planning.features import Settings
from vramkit.planning.machine import Machine
from vramkit.planning.plans import Decode
from vramkit.planning.profile import ComponentProfile, Cut, Profile, Variant, Work

MACHINE = Machine(device="cuda", link_gbps=10.0, tflops=100.0, is_measured=False)
BLOCKS, BLOCK = 40, 100 * MIB


def component(name: str, phase: str, blocks: int = BLOCKS, **changes: Any) -> ComponentProfile:
    def cut(granularity: str, slots: int, size: int) -> Cut:
        sizes = (size,) * (blocks * BLOCK // size)
        whole = blocks * BLOCK + MIB
        return Cut(
            granularity=granularity,
            slots=slots,
            unit_bytes=None,
            sizes=sizes,
            fixed_bytes=MIB,
            table_bytes=0,
            whole_bytes=whole,
        )

    cuts = [cut("block_level", slots, BLOCK) for slots in (2, 3, 1)]
    cuts += [cut("leaf_level", slots, BLOCK // 4) for slots in (3, 2, 1)]
    return ComponentProfile(name=name, phase=phase, weight_bytes=blocks * BLOCK + MIB, cuts=tuple(cuts), **changes)


def work(phase: str, name: str, activations: int, *, calls: int = 1, flops: float = 0) -> Work:
    return Work(phase=phase, component=name, activation_bytes=activations, calls=calls, flops=int(flops), turns=1)


def profile(*, flops: float = 0, decodes: tuple[tuple[Decode, int], ...] = ((Decode(), 2 * GIB),)) -> Profile:
    steps = work("denoise", "transformer", GIB, calls=50, flops=flops)
    return Profile(
        model="a model",
        call={"height": 480},
        components=(component("transformer", "denoise"), component("vae", "decode", 2)),
        variants=tuple(
            Variant(settings=Settings(decode=decode), works=(steps, work("decode", "vae", size, flops=1e12)))
            for decode, size in decodes
        ),
    )
