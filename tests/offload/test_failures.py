"""Acceptance 18, 21, 22: after an error, a Ctrl-C or a second thread the next call is right, and training is refused."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from modules import Block, BlockNet, Codec, mapped_copy, tokens
from sweeps import sweep
from torch import nn

from vramkit.errors import ConcurrentUseError, StoreError, TrainingError
from vramkit.offload import Offload, apply_group_offloading
from vramkit.offload.disk import FileReader
from vramkit.offload.stores import DiskStore
from vramkit.offload.streamer import Streamer
from vramkit.offload.watch import is_resting

LEVELS = ["block_level", "leaf_level", "model_level"]
STEPS = ["acquire", "release", "_take", "_load", "_prefetch", "end_pass"]

# What an error of memory is answered with is looked at in test_memory_pressure.
pytestmark = pytest.mark.filterwarnings("ignore:the device had no room")


class FailingError(Exception):
    """Raised on purpose."""


ERRORS = [FailingError, KeyboardInterrupt, torch.OutOfMemoryError, SystemExit]


def raising(method: Any, error: type[BaseException], at: int) -> Callable[..., Any]:
    """Return `method`, except that its `at`-th call (from 0) raises."""
    calls = iter(range(10**9))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error("on purpose")
        return method(*args, **kwargs)

    return wrapper


def call(module: nn.Module, *, times: int) -> None:
    for _ in range(times):
        module(tokens(8))


def assert_right(module: nn.Module, model: nn.Module, offload: Offload) -> None:
    """Three calls in a row are right, and nothing but the ring is in use between them."""
    with torch.no_grad():
        for _ in range(3):
            x = tokens(8)
            assert torch.equal(module(x), model(x))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    engine = offload._engine
    assert engine is not None
    assert engine._streamer.is_clean
    assert not any(hook._running for hook in engine._group_hooks)


@sweep("level place error", itertools.product(LEVELS, ["block", "leaf", "embedder"], ERRORS))
def test_call_after_a_torn_forward_is_right(
    level: str, place: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    broken = {"block": module.blocks[3], "leaf": module.blocks[2].down, "embedder": module.embed}[place]
    for at in (0, 1):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(broken, "forward", raising(broken.forward, error, at))
            with pytest.raises(error):
                call(module, times=2)
        assert_right(module, model, offload)
    offload.remove()


@sweep("level step error", itertools.product(LEVELS, STEPS, [FailingError, KeyboardInterrupt]))
def test_call_after_an_interrupt_inside_the_engine_is_right(
    level: str, step: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    for at in (0, 1, 2, 5):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(Streamer, step, raising(getattr(Streamer, step), error, at))
            try:
                for _ in range(2):
                    module(tokens(8))
            except error:
                pass
        assert_right(module, model, offload)
    offload.remove()


@pytest.mark.parametrize("error", [StoreError, KeyboardInterrupt])
@pytest.mark.parametrize("level", LEVELS)
def test_call_after_a_failed_read_is_right(
    level: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    raised = 0
    for at in (0, 3, 6, 11):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(DiskStore, "fill", raising(DiskStore.fill, error, at))
            try:
                call(module, times=3)
            except error:
                raised += 1  # else that read was a guess after a pass that was cut short, and nobody waited for it
        with torch.no_grad(), contextlib.suppress(error):
            module(tokens(8))  # may still meet the read that failed for it ahead of time
        assert_right(module, model, offload)
        with torch.no_grad():
            module(tokens(8))  # a state dict was taken, so what had been loaded ahead is dropped: also reads that fail
    assert raised >= 3
    offload.remove()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("entry_point", ["encode", "decode"])
def test_call_after_an_interrupted_entry_point_is_right_and_lets_go_of_its_groups(
    entry_point: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Codec().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    with torch.no_grad():
        for block in (module.decoder.layers[2], module.encoder[2]):
            with monkeypatch.context() as patch:
                patch.setattr(block.down, "forward", raising(block.down.forward, KeyboardInterrupt, 0))
                with pytest.raises(KeyboardInterrupt):
                    module(tokens(8))
                patch.setattr(block.up, "forward", raising(block.up.forward, KeyboardInterrupt, 0))
                with pytest.raises(KeyboardInterrupt):
                    module.decode(module.encode(tokens(8)))
            x = tokens(8)
            assert torch.equal(module.encode(x), model.encode(x))
            z = tokens(48)
            assert torch.equal(module.decode(z), model.decode(z))
    assert_right(module, model, offload)
    offload.remove()


def test_memory_stays_in_the_ring_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Codec().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", slots=1)
    block = module.decoder.layers[1]
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(block.up, "forward", raising(block.up.forward, KeyboardInterrupt, 0))
            with pytest.raises(KeyboardInterrupt):
                module.decode(tokens(48))
        assert offload._engine is not None
        monkeypatch.setattr(offload._engine.ring, "make", lambda size_bytes: pytest.fail("outside the ring"))
        for _ in range(2):
            z = tokens(48)
            assert torch.equal(module.decode(z), model.decode(z))
    offload.remove()


def test_weights_are_whole_after_an_interrupt_and_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    before = dict(module.named_parameters())
    offload = apply_group_offloading(module, "cpu")
    monkeypatch.setattr(module.blocks[3].up, "forward", raising(module.blocks[3].up.forward, KeyboardInterrupt, 0))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        module(tokens(8))
    offload.remove()
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("ending", ["call", "remove"])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_written_after_an_interrupt_is_kept(level: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockNet().eval()
    module = copy.deepcopy(model)
    offload = apply_group_offloading(module, "cpu", offload_type=level, slots=1)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            layer = module.blocks[3].down
            patch.setattr(layer, "forward", raising(layer.forward, KeyboardInterrupt, 0))
            with pytest.raises(KeyboardInterrupt):
                module(tokens(8))
        for net in (model, module):  # the units that ran are still on the device
            for block in net.blocks:
                block.up.weight.mul_(2)
                block.down.weight.data.mul_(0.5)
                block.up.bias.copy_(block.up.bias + 1)
        if ending == "remove":
            offload.remove()
        x = tokens(8)
        assert torch.equal(module(x), model(x))
    offload.remove()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_state_dict_after_an_interrupt_is_not_the_next_calls_memory(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    apply_group_offloading(module, "cpu", offload_type=level)
    with monkeypatch.context() as patch, torch.no_grad():
        layer = module.blocks[3].up
        patch.setattr(layer, "forward", raising(layer.forward, KeyboardInterrupt, 0))
        with pytest.raises(KeyboardInterrupt):
            module(tokens(8))
    state = module.state_dict()
    with torch.no_grad():
        call(module, times=2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_failed_read_ends_only_when_no_thread_writes_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the slot would be given to another group while old bytes still trickle in."""
    from vramkit.offload.disk import MappedFile

    path = tmp_path / "x.bin"
    path.write_bytes(b"\1" * (4 * 4096))
    monkeypatch.setattr("vramkit.offload.disk.reader._PIECE_BYTES", 4096)
    first_failed = threading.Event()
    read = FileReader._read_plain

    def unlucky(self: FileReader, offset: int, view: memoryview) -> None:
        if offset == 0:
            first_failed.set()
            raise OSError("on purpose")
        first_failed.wait(5)
        threading.Event().wait(0.05)
        read(self, offset, view)

    monkeypatch.setattr(FileReader, "_read_plain", unlucky)
    reader = FileReader(MappedFile(path))
    target = torch.zeros(4 * 4096, dtype=torch.uint8)
    with pytest.raises(StoreError, match="on purpose"):
        reader.read(0, target)
    after = target.clone()
    reader.close()
    assert torch.equal(target, after)


def test_a_file_that_shrinks_is_an_error_that_names_it(tmp_path: Path) -> None:
    from vramkit.offload.disk import MappedFile

    path = tmp_path / "shrinking.bin"
    path.write_bytes(bytes(10_000))
    for direct in (False, True):
        reader = FileReader(MappedFile(path), direct=direct)
        with pytest.raises(StoreError, match=r"shrinking\.bin.*cut short"):
            reader.read(5_000, torch.zeros(9_000, dtype=torch.uint8))
        reader.close()


def test_an_interrupt_between_any_two_lines_of_a_pass_is_survived() -> None:
    """Where lines are traced (debuggers, coverage) Ctrl-C may also come between the body of a ``with`` and its end."""
    model, x = BlockNet(blocks=1).eval(), tokens(8)
    names = {"begin", "end", "is_busy", "drop_torn"}
    with torch.no_grad():
        expected = model(x)
        offload = apply_group_offloading(model, "cpu")
        engine = offload.current_engine()
        assert engine is not None
        for at in itertools.count(1):
            if not _is_interrupted(lambda: model(x), at, ("engine.py", "passes.py"), names):
                break
            assert engine._lock.acquire(timeout=10)  # a forward would wait for ever
            engine._lock.release()
            assert torch.equal(model(x), expected)
    assert at > 20
    offload.remove()


def test_an_interrupt_between_any_two_lines_of_a_read_leaves_weights_watched() -> None:
    """A weight at rest has its own class for a moment, which a torn read would leave it with."""
    model, x = BlockNet().eval(), tokens(8)
    with torch.no_grad():
        expected = model(x)
        offload = apply_group_offloading(model, "cpu")
        watched = [parameter for parameter in model.parameters() if is_resting(parameter)]
        assert len(watched) > 1
        for at in itertools.count(1):
            if not _is_interrupted(lambda: torch.equal(*watched[:2]), at, ("base.py", "at_rest.py")):
                break
            assert all(map(is_resting, watched))
        assert at > 50
        assert torch.equal(model(x), expected)
    offload.remove()


def _is_interrupted(
    work: Callable[[], object], at: int, files: tuple[str, ...], names: Collection[str] | None = None
) -> bool:
    """Interrupt `work` at the line number `at` of all that it comes to in `files`, in functions of these names."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        is_ours = frame.f_code.co_filename.endswith(files) and (names is None or frame.f_code.co_name in names)
        lines += event == "line" and is_ours
        if lines == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace if is_ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_two_threads_on_two_models_are_right(tmp_path: Path) -> None:
    models = [BlockNet().eval() for _ in range(2)]
    modules = [mapped_copy(model, tmp_path) for model in models]
    offloads = [apply_group_offloading(module, "cpu") for module in modules]
    inputs = [tokens(8) for _ in range(10)]
    results: list[list[torch.Tensor]] = [[], []]

    def work(which: int) -> None:
        with torch.no_grad():
            results[which].extend(modules[which](x) for x in inputs)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for model, outputs in zip(models, results, strict=True):
            assert len(outputs) == len(inputs)
            assert all(torch.equal(model(x), y) for x, y in zip(inputs, outputs, strict=True))
    for offload in offloads:
        offload.remove()


@pytest.mark.parametrize("level", LEVELS)
def test_second_thread_in_one_model_gets_an_error_and_the_first_one_is_right(level: str, tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    errors: list[BaseException] = []
    x = tokens(8)
    forward = module.blocks[3].forward

    def interloper() -> None:
        try:
            with torch.no_grad():
                module(x)
        except ConcurrentUseError as error:
            errors.append(error)

    def forward_with_guest(y: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=interloper)
        thread.start()
        thread.join()
        return forward(y)

    module.blocks[3].forward = forward_with_guest
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(x), model(x))
    assert len(errors) == 2
    assert "another thread" in str(errors[0])
    del module.blocks[3].forward
    assert_right(module, model, offload)
    offload.remove()


def test_second_thread_is_refused_while_the_first_one_still_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mapped_copy(BlockNet().eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu")
    refused: list[BaseException] = []

    def interloper() -> None:
        with torch.no_grad():
            try:
                module(tokens(8))
            except ConcurrentUseError as error:
                refused.append(error)

    release_all = Streamer.release_all

    def slow_release_all(self: Streamer) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=interloper)
            thread.start()
            thread.join()
        release_all(self)

    monkeypatch.setattr(Streamer, "release_all", slow_release_all)
    with torch.no_grad():
        module(tokens(8))
    assert len(refused) == 1
    offload.remove()


def test_many_threads_in_one_model_are_right_or_refused(tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu")
    x = tokens(8)
    with torch.no_grad():
        expected = model(x)
    wrong: list[object] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(15):
                try:
                    if not torch.equal(module(x), expected):
                        wrong.append("wrong numbers")
                except ConcurrentUseError:  # noqa: PERF203 (each call may be refused)
                    pass
                except BaseException as error:  # noqa: BLE001 (reported below)
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_right(module, model, offload)
    offload.remove()


def test_model_of_a_dead_thread_is_usable_after_reset(tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu")
    forward, module.blocks[2].forward = module.blocks[2].forward, raising(None, KeyboardInterrupt, 0)

    def work() -> None:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            module(tokens(8))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    module.blocks[2].forward = forward
    with torch.no_grad(), pytest.raises(ConcurrentUseError, match="reset"):
        module(tokens(8))
    offload.reset()
    assert_right(module, model, offload)
    offload.remove()


@pytest.mark.parametrize("level", LEVELS)
def test_training_mode_with_gradients_is_refused_with_the_reason(level: str) -> None:
    module = BlockNet().train()
    offload = apply_group_offloading(module, "cpu", store="pageable", offload_type=level)
    with pytest.raises(TrainingError, match=r"backward.*no_grad"):
        module(tokens(8))
    with torch.no_grad():
        module(tokens(8))
    offload.remove()
    module(tokens(8)).sum().backward()
    assert module.blocks[0].up.weight.grad is not None


def test_inputs_that_ask_for_gradients_are_refused_with_the_reason(tmp_path: Path) -> None:
    module = mapped_copy(BlockNet().eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu")
    with pytest.raises(TrainingError, match="asks for gradients"):
        module(tokens(8).requires_grad_())
    with torch.no_grad():
        module(tokens(8).requires_grad_())
    offload.remove()


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_without_no_grad_works_and_asks_for_no_gradients(level: str) -> None:
    """Small weights that stay on the device must not bring gradients in where streamed ones have none."""
    model = BlockNet().eval()
    module = BlockNet().eval()
    module.load_state_dict(model.state_dict())
    offload = apply_group_offloading(module, "cpu", store="pageable", offload_type=level)
    x = tokens(8)
    output = module(x)
    assert not output.requires_grad
    assert torch.equal(output, model(x))
    offload.remove()
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_nothing_stays_behind_when_applying_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockNet().eval()
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    from vramkit.offload.disk import SpillFile

    monkeypatch.setattr(SpillFile, "add", raising(SpillFile.add, StoreError, 3))
    threads = threading.active_count()
    with pytest.raises(StoreError):
        apply_group_offloading(model, "cpu", offload_to_disk_path=tmp_path / "spill")
    assert {name: parameter for name, (parameter, _) in before.items()} == dict(model.named_parameters())
    assert list((tmp_path / "spill").iterdir()) == []
    assert threading.active_count() <= threads
    for part in model.modules():
        assert not part._forward_pre_hooks
        assert not part._forward_hooks
    with torch.no_grad():
        assert model(tokens(8)).isfinite().all()
    assert isinstance(model.blocks[0], Block)
