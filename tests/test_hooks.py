from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from vramkit import hooks


class Noting(hooks.ModuleHook):
    def __init__(self, log: list[str], name: str = "hook") -> None:
        self.log, self.name = log, name

    def pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.log.append(f"{self.name} before")

    def post_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.log.append(f"{self.name} after")


class Other(hooks.ModuleHook):
    pass


class Talker(nn.Module):
    def forward(self, x: int, *, fail: bool = False, scale: int = 1) -> int:
        if fail:
            raise ValueError("on purpose")
        return x * scale

    def decode(self, x: int) -> int:
        """Add one."""
        return x + 1


def test_hooks_run_around_the_forward_and_forward_is_not_replaced() -> None:
    module, log = Talker(), []
    attachment = hooks.attach(module, Noting(log))
    assert module(3) == 3
    assert log == ["hook before", "hook after"]
    assert "forward" not in vars(module)
    attachment.remove()
    attachment.remove()
    assert module(3) == 3
    assert len(log) == 2
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_post_runs_when_the_forward_raises() -> None:
    module, log = Talker(), []
    hooks.attach(module, Noting(log))
    with pytest.raises(ValueError, match="on purpose"):
        module(3, fail=True)
    assert log == ["hook before", "hook after"]


def test_the_latest_hook_is_first_and_before_those_of_others() -> None:
    module, log = Talker(), []
    module.register_forward_pre_hook(lambda *_: log.append("theirs"))
    hooks.attach(module, Noting(log, "one"))
    hooks.attach(module, Noting(log, "two"))
    module(1)
    assert log[:3] == ["two before", "one before", "theirs"]
    assert sorted(log[3:]) == ["one after", "two after"]


def test_arguments_may_be_replaced() -> None:
    class Doubling(hooks.ModuleHook):
        def pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
            return (args[0] * 2,), {**kwargs, "scale": 5}

    module = Talker()
    attachment = hooks.attach(module, Doubling())
    assert module(3, scale=1) == 30
    attachment.remove()
    assert module(3, scale=1) == 3


def test_hooks_are_found_by_class_on_the_module_itself() -> None:
    child = Talker()
    module = nn.Sequential(child)
    hook = Noting([])
    hooks.attach(child, hook)
    hooks.attach(child, Other())
    module.register_forward_pre_hook(lambda *_: None)
    assert list(hooks.attached(child, Noting)) == [hook]
    assert list(hooks.attached(module, hooks.ModuleHook)) == []
    assert len(list(hooks.attached(child, hooks.ModuleHook))) == 2


def test_methods_are_wrapped_on_the_instance_alone() -> None:
    module, other = Talker(), Talker()
    calls: list[tuple[Any, ...]] = []

    def around(method: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return method(*args, **kwargs) * 10

    attachment = hooks.wrap_method(module, "decode", around)
    assert module.decode(1) == 20
    assert module.decode.__doc__ == "Add one."
    assert other.decode(1) == 2
    assert calls == [(1,)]
    attachment.remove()
    assert module.decode(1) == 2
    assert "decode" not in vars(module)


def test_a_method_that_the_instance_had_comes_back() -> None:
    module = Talker()

    def own(x: int) -> int:
        return -x

    module.decode = own  # type: ignore[method-assign]
    hooks.wrap_method(module, "decode", lambda method, x: method(x) * 2).remove()
    assert module.decode is own


def test_hooks_are_left_out_of_compiled_graphs() -> None:
    module, log = nn.Linear(3, 3), []
    hooks.attach(module, Noting(log))
    module.compile(backend="eager", fullgraph=False)
    with torch.no_grad():
        module(torch.ones(1, 3))
        module(torch.ones(1, 3))
    assert log == ["hook before", "hook after"] * 2
    torch._dynamo.reset()


def test_importing_the_engine_imports_no_dynamo_and_no_optional_library() -> None:
    code = (
        "import sys, vramkit, vramkit.hooks, vramkit.offload;"
        "bad = {'torch._dynamo', 'transformers', 'diffusers', 'matplotlib', 'bitsandbytes'} & set(sys.modules);"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
