"""Plans are data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from profiles import MACHINE, profile

from vramkit.errors import ConfigError
from vramkit.memory import GIB
from vramkit.planning.explain import explain
from vramkit.planning.plans import Plan
from vramkit.planning.search import search


def test_plans_are_frozen() -> None:
    plan = search(profile(), MACHINE, 4 * GIB)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.vram_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99}', "null", None, 5])
def test_what_is_no_plan_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"colour": "green"}, r"the plan has the unknown key 'colour'"),
        ({"vram_bytes": -1}, r"the plan\.vram_bytes is -1; expected a whole number, at least 0"),
        ({"vram_bytes": "6GiB"}, r"the plan\.vram_bytes is '6GiB'"),
        ({"vram_bytes": True}, r"the plan\.vram_bytes is True"),
        ({"link_gbps": float("nan")}, r"the plan\.link_gbps is nan; expected a number"),
        ({"is_measured": 1}, r"the plan\.is_measured is 1; expected true or false"),
        ({"allow": "all"}, r"the plan\.allow is 'all'; expected one of 'exact', 'bounded', 'any'"),
        ({"order": "vae"}, r"the plan\.order is 'vae'; expected a list"),
        ({"order": [3]}, r"the plan\.order\[0\] is 3; expected a text"),
        ({"call": []}, r"the plan\.call is \[\]"),
        ({"decode": {"mode": "halves"}}, r"the plan\.decode\.mode is 'halves'"),
        ({"components": [{"name": "vae"}]}, r"the plan\.components\[0\] has no 'phase'"),
        ({"phases": [None]}, r"the plan\.phases\[0\] is None; expected an object"),
    ],
)
def test_plans_with_other_keys_or_values_are_refused(changed: dict[str, object], said: str) -> None:
    fields = json.loads(search(profile(), MACHINE, 4 * GIB).to_json())
    with pytest.raises(ConfigError, match=said):
        Plan.from_json(json.dumps({**fields, **changed}))


def test_a_plan_without_a_key_is_refused() -> None:
    fields = json.loads(search(profile(), MACHINE, 4 * GIB).to_json())
    fields.pop("phases")
    with pytest.raises(ConfigError, match="the plan has no 'phases'"):
        Plan.from_json(json.dumps(fields))


def test_unknown_components_are_named() -> None:
    with pytest.raises(ConfigError, match="transformer, vae"):
        search(profile(), MACHINE, 4 * GIB).component("unet")


def test_a_person_can_read_it() -> None:
    text = explain(search(profile(), MACHINE, 3 * GIB, ram_bytes=GIB))
    for expected in (
        "transformer",
        "mapped",
        "activations",
        "3 GiB",
        "link",
        "one more GiB would save",
        "assumed",
        "whole",
    ):
        assert expected in text
    assert not any(len(line) > 160 for line in text.split("\n"))
