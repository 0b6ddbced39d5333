"""What ranks do in tests. Each function runs on all ranks of a mesh; what it asserts fails the test that asked for it."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import signal
import time
import warnings
from typing import Any

import denoisers
import torch
from allocated_bytes import AllocatedBytes
from families import FAMILIES
from rank_models import WIDTHS, Blocks, blocks

import vramkit
from vramkit.cli import main
from vramkit.commands import ranks
from vramkit.distributed import Mesh, connect, heartbeats, parallelize
from vramkit.distributed.sequence import SequenceRanks
from vramkit.distributed.tiles import TileRanks
from vramkit.errors import ConfigError, RankError
from vramkit.offload import apply_group_offloading, load_mapped
from vramkit.offload.disk import FileReader, span_of
from vramkit.planning.calls import PlannedCall
from vramkit.planning.planner import Budget, Planner

# -- weights


def streams_the_bytes_of_all(mesh: Mesh, file: str, level: str, slots: int) -> int:
    """Weights from a file, of which this rank reads its part; returns the bytes that it read."""
    resident = blocks()
    x = torch.randn(3, WIDTHS[0])
    calls = [(), (1, 2), (), (), (4,), (1, 2), (0, 1, 2, 3), ()]  # guesses are wrong at first
    expected = [resident(x, skip) for skip in calls]
    read, plain = [0], FileReader.read

    def counted(self: FileReader, offset: int, target: torch.Tensor) -> None:
        read[0] += target.numel()
        plain(self, offset, target)

    model = load_mapped(Blocks().eval().requires_grad_(False), file)
    FileReader.read = counted  # type: ignore[method-assign]
    try:
        offload = apply_group_offloading(model, "cpu", offload_type=level, slots=slots, unit_bytes=50_000, mesh=mesh)
        results = [model(x, skip) for skip in calls]
        stats = offload.stats()
        offload.remove()
    finally:
        FileReader.read = plain  # type: ignore[method-assign]
    assert all(map(torch.equal, results, expected))
    assert stats.loads > stats.groups
    assert stats.stores.keys() == {"disk"}
    assert read[0] < stats.loaded_bytes / mesh.size * 1.15, (read, stats)
    assert mesh.carried["pushed"] >= stats.loads
    assert not mesh.carried["gathered"]
    return read[0]


def streams_from_memory(mesh: Mesh, folder: str | None) -> tuple[str, int]:
    """Weights that each rank has in its memory; returns the file and the place in it of which they are views then."""
    model, x = blocks(), torch.randn(3, WIDTHS[0])
    expected = model(x)
    with connect(timeout_s=60) as other:
        offload = apply_group_offloading(model, "cpu", mesh=other, offload_to_disk_path=folder)
        assert torch.equal(model(x), expected)
        span = span_of(model.blocks[0][0].weight)
        assert span is not None
        assert not span.file.path.exists()  # nothing is left behind when ranks die
        with offload.edit():
            model.blocks[1][0].weight.mul_(2)  # the same on all ranks
        changed = model(x)
        offload.remove()
    assert torch.equal(changed, model(x))
    assert not torch.equal(changed, expected)
    return str(span.file.path), span.offset


def other_orders_are_an_error(mesh: Mesh, file: str) -> None:
    model = load_mapped(Blocks().eval().requires_grad_(False), file)
    with connect(timeout_s=60) as other:
        offload = apply_group_offloading(model, "cpu", slots=1, mesh=other)
        x = torch.randn(3, WIDTHS[0])
        model(x)
        try:
            with other.call():
                model(x, (1,) if mesh.is_first else (2,))
                model(x)
        except RankError as error:
            assert "blocks." in str(error) or "different orders" in str(error), error  # noqa: PT017 - on each rank
        else:
            raise AssertionError("weights were read in different orders, and nobody noticed")
        offload.remove()


# -- agreement


def what_differs_is_refused(mesh: Mesh, file: str) -> list[str]:
    """Returns what was said of versions, options, weights and the arguments of a call."""
    me, said = mesh.rank, []

    def refused(what: Any) -> None:
        try:
            what()
        except ConfigError as error:
            said.append(str(error))
        else:
            said.append("nothing")

    version = vramkit.__version__
    vramkit.__version__ = version if me == 0 else "9.9"
    refused(lambda: connect(timeout_s=60))
    vramkit.__version__ = version
    model = load_mapped(Blocks().eval().requires_grad_(False), file)
    refused(lambda: apply_group_offloading(model, "cpu", slots=2 + (me == 1), mesh=mesh))
    refused(lambda: apply_group_offloading(blocks(seed=me), "cpu", mesh=mesh))
    refused(lambda: vramkit.fit(model, f"{1 + me}MiB", mesh=mesh))
    assert vramkit.offload_of(model) is None
    return said


def calls_that_differ_are_refused(mesh: Mesh, folder: str) -> str:
    with connect(timeout_s=60) as other:
        pipe = _pipeline("Wan2.1", folder)
        handle = parallelize(pipe, other)
        try:
            pipe(prompt="a cat", **FAMILIES["Wan2.1"].clip, num_inference_steps=2 + mesh.rank, output_type="latent")
        except ConfigError as error:
            return str(error)
        finally:
            handle.remove()
    return "nothing"


# -- who is to blame


def branches_end_with_their_mesh(mesh: Mesh) -> str:
    """Returns what this rank raises where one raises between calls, while the other waits for it in branches."""
    try:
        with connect(timeout_s=60) as other:
            branches = other.with_branches(2)
            if not mesh.is_first:
                raise ValueError("between calls")
            with branches.call():
                branches.all.barrier()
    except (ValueError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def one_leaves(mesh: Mesh) -> str:
    """Returns what this rank raises where the other leaves and lives on."""
    heartbeats._LEFT_S, before = 0.5, heartbeats._LEFT_S
    try:
        with connect(timeout_s=60) as other:
            if mesh.is_first:
                other.all.barrier()
    except RankError as error:
        return str(error)
    finally:
        heartbeats._LEFT_S = before
    return "nothing"


# -- tokens


def shares_tokens(mesh: Mesh, family: str) -> None:
    """Each forward within rounding of that of one rank, the same bytes on all ranks and in each run."""
    denoiser = denoisers.DENOISERS[family]
    kind = getattr(vramkit, denoiser.kind)
    torch.manual_seed(0)
    model = kind.from_config(denoiser.tiny).eval()
    sharing = SequenceRanks(mesh.in_sequence)
    lone = [denoiser.inputs(), denoiser.inputs(**denoiser.two)]
    if getattr(kind, "takes_timestep_runs", False):
        given = denoiser.inputs()
        tokens = _tokens(model, given)
        # One run of few tokens, of which most ranks have none, and another one.
        lone.append(given | {"timestep": torch.tensor([[0.0, 700.0]]), "timestep_tokens": (2, tokens - 2)})
    for given in lone:
        expected = model(**given).sample
        exchanged = _count_exchanges(mesh)
        model.set_token_ranks(sharing)
        shared, again = model(**given).sample, model(**given).sample
        model.set_token_ranks(None)
        assert exchanged(), "no token was exchanged"
        assert torch.equal(shared, again)
        torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)
        sums = mesh.all.collect(_digest(shared))
        assert len(set(sums)) == 1, sums


def shares_tokens_compiled(mesh: Mesh, family: str, whole: bool) -> None:
    """Blocks, or the whole model, compiled as one graph each: what they give without that, and no second graph."""
    denoiser = denoisers.DENOISERS[family]
    torch.manual_seed(0)
    few = {name: 1 for name in denoiser.tiny if name.startswith("num_") and name.endswith("layers")}
    model = getattr(vramkit, denoiser.kind).from_config(denoiser.tiny | few).eval()
    model.set_chunk_size(12)  # several, of each rank's tokens
    given = denoiser.inputs(**({"lengths": (5,)} if whole else {}))
    alone = model(**given).sample
    model.set_token_ranks(SequenceRanks(mesh.in_sequence))
    expected = model(**given).sample
    torch._dynamo.reset()
    blocks = [getattr(model, name, ()) for name in ("blocks", "transformer_blocks", "single_transformer_blocks")]
    for module in [model] if whole else [block for some in blocks for block in some]:
        module.compile(fullgraph=True, backend="aot_eager")
    exchanged = _count_exchanges(mesh)
    made = model(**given).sample
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = model(**given).sample
    assert exchanged()
    torch._dynamo.reset()
    assert torch.equal(made, again)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made, alone, rtol=1e-5, atol=1e-5)


def _tokens(model: Any, given: dict[str, Any]) -> int:
    seen: list[int] = []
    plain = model._ops_for

    def noted(tokens: int) -> Any:
        seen.append(tokens)
        return plain(tokens)

    model._ops_for = noted
    model(**given)
    del model._ops_for
    return seen[0]


def _count_exchanges(mesh: Mesh) -> Any:
    before = mesh._heartbeats._counts[mesh.in_sequence.name]
    return lambda: mesh._heartbeats._counts[mesh.in_sequence.name] - before


def _digest(x: torch.Tensor) -> str:
    from vramkit.distributed.agreement import describe

    return describe(x)


# -- clips


def _pipeline(family: str, folder: str) -> Any:
    pipe = getattr(vramkit, FAMILIES[family].pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip(pipe: Any, family: str, output_type: str, seed: int | None = 3) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    arguments = FAMILIES[family].clip | FAMILIES[family].guided
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = pipe(
            prompt="a cat", negative_prompt="rain", **arguments, num_inference_steps=2, generator=generator,
            output_type=output_type,
        ).frames  # fmt: skip
    return frames if isinstance(frames, torch.Tensor) else torch.as_tensor(frames)


def makes_the_clip_of_one(mesh: Mesh, family: str, folder: str, exact: bool, stream: bool, alone: bool = False) -> str:
    """A whole clip by all ranks, and `alone` one more by each afterwards; returns a digest of it."""
    pipe = _pipeline(family, folder)
    pipe.vae.enable_tiling(**FAMILIES[family].tiles)
    expected = _clip(pipe, family, "pt")
    offloads = [apply_group_offloading(pipe.transformer, "cpu", mesh=mesh)] if stream else []
    with parallelize(pipe, mesh) as handle:
        assert f"{mesh.guidance} x {mesh.sequence}" in repr(handle)
        calls: list[int] = []
        counting = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        made = _clip(pipe, family, "pt")
        counting.remove()
        assert len(calls) == 2 * (2 if mesh.guidance == 1 else 1)  # two steps, of each one branch or both
        again = made if exact else _clip(pipe, family, "pt")
        torch.manual_seed(mesh.rank)
        drawn = _clip(pipe, family, "latent", seed=None) if alone else made  # by torch's own generator
    for offload in offloads:
        offload.remove()
    assert torch.equal(made, again)
    assert len(set(mesh.all.collect(_digest(drawn)))) == 1
    if exact:
        assert torch.equal(made, expected)
    else:
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    if alone:
        assert torch.equal(_clip(pipe, family, "pt"), expected)
    return _digest(made)


def decodes_tiles(mesh: Mesh, family: str, folder: str, framewise: bool) -> int:
    """Decode in tiles, some by each rank; returns how many tiles this rank has computed."""
    vae = _pipeline(family, folder).vae
    if not framewise:
        vae.enable_tiling(**FAMILIES[family].tiles)
    torch.manual_seed(1)
    channels = vae.config.z_dim if hasattr(vae.config, "z_dim") else vae.config.latent_channels
    z = torch.randn(1, channels, 7 if framewise else 3, 6, 10)
    expected = vae.decode(z, **({"temb": torch.tensor([0.05])} if _is_timed(vae) else {})).sample
    counted = TileRanks(mesh.all)
    own, plain = [0], counted.computed

    def computed(shapes: Any, makes: Any, like: torch.Tensor) -> Any:
        def counting(make: Any) -> Any:
            own[0] += 1
            return make()

        return plain(shapes, [lambda make=make: counting(make) for make in makes], like)

    counted.computed = computed  # type: ignore[method-assign]
    vae.tile_ranks = counted
    decoded = vae.decode(z, **({"temb": torch.tensor([0.05])} if _is_timed(vae) else {})).sample
    vae.tile_ranks = None
    assert torch.equal(decoded, expected)
    return own[0]


def decodes_rows(mesh: Mesh, family: str, folder: str, stripes: int | None) -> tuple[list[int], str]:
    """Decode without tiles; returns of what heights this rank's results of the last convolution were, and a digest."""
    pipe = _pipeline(family, folder)
    vae = pipe.vae.double()
    if stripes is not None:
        vae.enable_striping(stripes)
    torch.manual_seed(1)
    channels = vae.config.z_dim if hasattr(vae.config, "z_dim") else vae.config.latent_channels
    z = torch.randn(2, channels, 2, 24 if family == "Wan2.1" else 6, 3).double()
    given = {"temb": torch.tensor([0.05]).double()} if _is_timed(vae) else {}
    expected = vae.decode(z, **given).sample
    with parallelize(pipe, mesh):
        heights: list[int] = []
        last = vae.decoder.conv_out.register_forward_hook(lambda *called: heights.append(called[2].shape[-2]))
        decoded = vae.decode(z, **given).sample
        last.remove()
    assert vae.tile_ranks is None
    assert (decoded - expected).abs().amax() <= 1e-11 * expected.abs().amax()
    return heights, _digest(decoded)


def _is_timed(vae: Any) -> bool:
    return bool(getattr(vae.config, "timestep_conditioning", False))


def keeps_a_budget(mesh: Mesh, folder: str) -> tuple[str, str]:
    """A pipeline within a budget on each rank, of which one says that it took more; returns the last plan and a digest."""
    family = "Wan2.1"
    pipe = _pipeline(family, folder)
    pipe.vae.enable_tiling(**FAMILIES[family].tiles)
    expected = _clip(pipe, family, "pt")
    call = FAMILIES[family].clip | {"num_inference_steps": 2, "guidance_scale": 5.0}
    try:
        vramkit.fit(pipe, "1KiB", mesh=mesh, **call)
    except vramkit.PlanInfeasible as error:
        least_bytes = error.nearest_bytes
    else:
        raise AssertionError("a budget of nothing was planned for")
    assert pipe.together is None
    with vramkit.fit(pipe, least_bytes + 200_000, mesh=mesh, **call) as fitted:
        assert "MiB" in fitted.explain()
        assert pipe.together is not None
        for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
            assert type(copied) is type(pipe).offloaded_kind
            assert copied.together is copied.transformer._token_ranks is copied.vae.tile_ranks is None
        assert any(stats.groups for stats in fitted.stats().values())
        before = fitted.plan
        fitted._calls._meter = _Meter(before.vram_bytes + 50_000 if mesh.rank == 1 else None)  # type: ignore[assignment]
        made = _clip(pipe, family, "pt")
        plan = fitted.plan
        assert plan.margin_bytes == before.vram_bytes + 50_000 - before.peak_bytes
    assert pipe.together is None
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    return plan.to_json(), _digest(made)


def decodes_as_planned(mesh: Mesh, family: str, folder: str, tiles: bool) -> tuple[int, int, int]:
    """Bytes of a decode on this rank, as a plan for all ranks has them, and as one for one rank alone has them."""
    pipe = _pipeline(family, folder)
    if tiles:
        pipe.vae.enable_tiling(**FAMILIES[family].tiles)
    latents = torch.randn(1, pipe.vae.config.z_dim, 2, *((6, 30) if tiles else (24, 3)))
    call = PlannedCall({"latents": latents}, lambda twin: twin.vae.decode(latents))
    planned = []
    for count in (mesh.size, 1):
        planner = Planner(pipe, Budget("1GiB", None, "exact"), torch.device("cpu"), ranks=count)
        planned.append(next(p.activation_bytes for p in planner.plan(call).phases if p.name == "decode"))
    with parallelize(pipe, mesh), torch.no_grad(), AllocatedBytes() as taken:
        pipe.vae.decode(latents)
    return taken.peak_bytes, *planned


class _Meter:
    """Measures what it is told to."""

    def __init__(self, peak_bytes: int | None) -> None:
        self._peak_bytes = peak_bytes

    def begin(self, held_bytes: int) -> tuple[int, int, int]:
        return held_bytes, 0, 0

    def end(self, begun: tuple[int, int, int]) -> tuple[int | None, bool]:
        return self._peak_bytes, False


# -- commands


def runs_a_command(mesh: Mesh, arguments: list[str]) -> tuple[str, str, int]:
    """Returns what this rank has printed, what it has said of errors, and its status."""
    out, err = io.StringIO(), io.StringIO()
    ranks._HEARD_S = 0.0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return out.getvalue(), err.getvalue(), status


# -- faults, of rank 1 or of rank 0, each in processes of its own


def _until_it_fails(rank: int, fault: Any, *, of: int = 1, timeout_s: float = 100.0) -> None:
    heartbeats._GRACE_S = 2.0
    with connect(timeout_s=timeout_s) as mesh:
        model, x = blocks(), torch.randn(2, WIDTHS[0])
        apply_group_offloading(model, "cpu", mesh=mesh)
        for step in range(1000):
            with mesh.call():
                if step == 2 and rank == of:
                    fault()
                model(x)
                mesh.all.barrier()


def is_killed(rank: int) -> None:
    _until_it_fails(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def first_is_killed(rank: int) -> None:
    """The process that holds the store of all."""
    _until_it_fails(rank, lambda: os.kill(os.getpid(), signal.SIGKILL), of=0)


def hangs(rank: int) -> None:
    _until_it_fails(rank, lambda: time.sleep(600), timeout_s=5.0)


def _raise_memory_error() -> None:
    raise MemoryError("no room for 3 GiB")


def runs_out_of_memory(rank: int) -> None:
    _until_it_fails(rank, _raise_memory_error)


def first_runs_out_of_memory(rank: int) -> None:
    """The process that holds the store of all, and so what it has said of its error."""
    _until_it_fails(rank, _raise_memory_error, of=0)
