"""Every case of the benchmarks runs, tiny, on the CPU; what is compared computes the bytes of its reference."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no part of the installed package

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.networks import NETWORKS
from benchmarks.report import report
from benchmarks.rows import KEY, Results, Row, Setting, compared, key_of
from benchmarks.runner import CASES, case_named, measured_here
from benchmarks.selection import reference_of, settings_of, with_references

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
    ),  # of others
]

# What a case is tried with: words of the keys, one setting for each. Everything that is not here shares its code with these.
TRIED = {
    "quantized": ["bf16 | vramkit leaf", "nf4 | vramkit leaf", "diffusers fp8 | diffusers leaf", "fp8-mm | vramkit leaf"],
    "compiled": ["all resident", "vramkit block"],
    "encode": ["umt5-xxl | vramkit leaf", "umt5-xxl | diffusers leaf stream"],
    "decode": ["wan | 2 stripes", "wan | to host", "wan | tiles", "cogvideox | diffusers whole"],
    "clip": ["ltx | vramkit leaf", "a14b | vramkit fit", "wan2.2-5b | vramkit leaf"],
    "foreign": ["ltx2 | vramkit fit", "qwen-image | vramkit fit", "minimax-h3 | vramkit fit"],
    "guide": ["resident", "vramkit guide", "diffusers guide"],
    "loading": ["from_pretrained", "load_file", "load_mapped", "constructed", "torch.load"],
    "applying": ["vramkit block", "vramkit leaf", "diffusers leaf", "accelerate"],
    "lora": ["vramkit bf16 | vramkit leaf", "diffusers bf16 | diffusers leaf"],
    "budgets": ["vramkit leaf"],
    "cards": ["24 GiB | vramkit fit"],
    "links": ["check", "vramkit leaf"],
    "ram": ["vramkit disk", "vramkit pageable"],
    "growth": ["linear layers | vramkit block", "2 layers | vramkit block"],
    "host": ["bf16 | vramkit block", "fp8 | vramkit leaf", "nf4 | vramkit block"],
    "planning": ["ltx-video-2b"],
    "quality": ["wan", "hunyuan", "ltx", "cogvideox"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    import diffusers
    import transformers

    assert diffusers.WanTransformer3DModel
    assert transformers.UMT5EncoderModel
    gc.collect()
    gc.freeze()  # what is there now need not be looked through at each row
    yield Bench(folder=tmp_path_factory.mktemp("weights"), scale="smoke")
    gc.unfreeze()


def chosen(case: str, words: str) -> Setting:
    parts = [part.strip() for part in words.split("|")]
    listed = [setting for setting in settings_of([case], "smoke") if setting.matches(parts)]
    assert listed, f"{case} has no row with {words}"
    exact = [setting for setting in listed if setting.way == parts[-1]]
    return (exact or listed)[0]


def measured(bench: Bench, *settings: Setting) -> list[Row]:
    """Measure in this process, what they are compared with first; none of the rows is an error."""
    results, run = Results(), {"device": "test", "scale": "smoke"}
    for setting in with_references(settings, "smoke", results, run):
        rows = list(measured_here(setting, bench))
        assert not [row["error"] for row in rows if "error" in row]
        results.add(rows, run)
    assert json.loads(json.dumps(results.rows)) == results.rows
    assert "| subject |" in report(results)
    return compared(results)


def computes_the_same(row: Row) -> bool:
    """Whether a row has to give the bytes of its reference: all but blended tiles, other kernels and fewer bits."""
    others = ("tiles", "2 stripes", "diffusers whole", "casting")
    return not any(word in row["way"] for word in others)


@pytest.mark.parametrize("case", TRIED)
def test_a_case_runs_tiny(case: str, bench: Bench) -> None:
    rows = measured(bench, *(chosen(case, words) for words in TRIED[case]))
    for row in rows:
        assert row.get("s", 1) > 0
        assert row.get("is_finite", True)
        assert row.get("is_unchanged") is not False
        setting = Setting(**{name: row[name] for name in KEY}, reference=row.get("reference", {}))
        if "digest" in row and (row["case"] == "budgets" or reference_of(setting, "smoke") is not None):
            assert row["same_bytes"] or not computes_the_same(row), key_of(row)
    if case in CHECKS:
        CHECKS[case]({row["subject"] + " | " + row["way"]: row for row in rows if row["case"] == case})


def _guide(rows: dict[str, Row]) -> None:
    first, *others = rows.values()
    assert all(row["digests"] == first["digests"] for row in others)
    assert all(min(row[f"{phase}_s"] for phase in ("setup", "encode", "steps", "decode")) > 0 for row in rows.values())


def _loading(rows: dict[str, Row]) -> None:
    kinds = {key.split(" by ")[1].split(" |")[0]: set(row["peer"]["stores"]) for key, row in rows.items()}
    assert kinds.pop("constructed") == {"pageable"}
    assert len(kinds) == 4
    assert all("disk" in found for found in kinds.values())


def _budgets(rows: dict[str, Row]) -> None:
    streamed = [row["moved_bytes"] for row in rows.values()]
    assert len(streamed) == 3
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[-1] == 0


def _clip(rows: dict[str, Row]) -> None:
    assert ["switch_s" in row for key, row in rows.items() if "a14b" in key] == [True, True]
    assert not any("switch_s" in row for key, row in rows.items() if "a14b" not in key)
    assert all(row["moved_bytes"] > 0 for key, row in rows.items() if key.endswith("leaf"))


def _foreign(rows: dict[str, Row]) -> None:
    for key, row in rows.items():
        streams = key.endswith("fit")
        assert (row["moved_bytes"] > 0) == streams
        assert ("predicted_denoise_bytes" in row) == streams
        assert ("digests" in row) == ("minimax-h3" not in key)


def _decode(rows: dict[str, Row]) -> None:
    assert all(row["relative"] <= 1e-5 for key, row in rows.items() if "tiles" not in key)


def _compiled(rows: dict[str, Row]) -> None:
    torch._dynamo.reset()
    resident, streamed = rows.values()
    assert resident["moved_bytes"] == 0 < streamed["moved_bytes"]
    assert resident["graphs"] > 0
    assert streamed["recompiles"] == 0


def _links(rows: dict[str, Row]) -> None:
    assert rows["check | copy"]["same_bytes"]
    assert rows["check | copy"]["plain_gbps"] > 0


def _lora(rows: dict[str, Row]) -> None:
    assert all(row["forward_s"] > 0 and row["load_adapter_s"] > 0 for row in rows.values())


CHECKS: dict[str, Callable[[dict[str, Row]], None]] = {
    "guide": _guide,
    "loading": _loading,
    "budgets": _budgets,
    "clip": _clip,
    "foreign": _foreign,
    "decode": _decode,
    "compiled": _compiled,
    "links": _links,
    "lora": _lora,
}


def test_every_case_is_tried_and_every_network_has_rows() -> None:
    assert TRIED.keys() | {"forward"} == set(CASES)
    keys = [setting.subject for setting in settings_of(["forward", "encode"], "full")]
    assert all(any(subject.startswith(f"{name} ") for subject in keys) for name in NETWORKS)


def test_what_is_to_be_compared_has_something_to_be_compared_with() -> None:
    alone = (
        "host",
        "planning",
        "quality",
        "applying",
        "check",
        "resident",
        "vramkit whole",
        "vramkit block, all resident",
    )
    for scale in ("full", "smoke"):
        for setting in settings_of(CASES, scale):
            known = setting.case in alone or setting.subject in alone or setting.way in alone
            assert known or reference_of(setting, scale) is not None, setting.key


@pytest.mark.parametrize("network", ["wan-5b", "hunyuan", "ltx", "cogvideox-2b", "cogvideox-5b"])
def test_forwards_of_the_networks_are_the_same_bytes_streamed(network: str, bench: Bench) -> None:
    row = measured(bench, chosen("forward", f"{network} | vramkit leaf"))[-1]
    assert row["same_bytes"]
    assert row["moved_bytes"] > 0
    assert row["ratio"] > 0
    assert row["peer"]["groups"] > 0


def _ways() -> Iterator[str]:
    for way in peers.ways():
        if way not in ("resident", "vramkit leaf"):
            yield way


def test_every_way_gives_the_bytes_of_the_resident_run_or_a_row_that_says_why_not(bench: Bench) -> None:
    settings = [setting for setting in settings_of(["forward"], "smoke") if "wan-14b diffusers" in setting.subject]
    results = Results()
    for setting in settings:
        results.add(measured_here(setting, bench), {"device": "test"})
    rows = {row["way"]: row for row in compared(results)}
    assert rows.keys() == set(peers.ways())
    for way in _ways():
        row = rows[way]
        if peers.peer_of(way) in ("vramkit", "diffusers", "accelerate"):
            assert "error" not in row, row
            assert row["same_bytes"] or "casting" in way, way
        else:  # not installed, or without what it needs: a CUDA device
            assert "error" in row or row["same_bytes"], way


def test_settings_are_listed_without_a_device_and_have_keys_of_their_own() -> None:
    for case in CASES:
        for scale in ("full", "smoke"):
            keys = [key_of(setting.key) for setting in case_named(case).settings(scale)]
            assert keys
            assert len(keys) == len(set(keys)), case
