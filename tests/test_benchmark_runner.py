"""The runner, the file of results, and that README and docs say what the files say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no part of the installed package

from benchmarks import __main__ as command
from benchmarks import checkpoints, emulation, page_cells, pages, plots, runner
from benchmarks.__main__ import main
from benchmarks.bench import Bench
from benchmarks.cases.host import overhead, stack_of
from benchmarks.measure import digest, environment
from benchmarks.pages import PAGES, TABLES, rendered
from benchmarks.peers import flextensor, resting_bytes
from benchmarks.report import IMAGES, RESULTS, cell, remade, report
from benchmarks.report import main as report_main
from benchmarks.rows import Results, Row, Setting, compared, key_of
from benchmarks.runner import case_named
from benchmarks.selection import missing, with_references
from vramkit.offload import apply_group_offloading
from vramkit.offload.stores import PinnedStore

SETTING = Setting(
    case="host", subject="12 linear layers bf16", way="vramkit block", options={"weights": "bf16", "groups": 3}
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(folder=tmp_path, scale="smoke")


def test_a_row_comes_from_a_process_of_its_own_and_so_does_an_error(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--smoke", "--case", "host", "--match", "bf16 block", "--out", str(out), "--folder", str(tmp_path)]
    assert main(words) == 0
    (row,) = Results.read(out).rows
    assert row["groups"] == 12
    assert row["s"] > 0
    wrong = dataclasses.replace(SETTING, options={"weights": "bf16"})
    (failed,) = runner.measured_here(wrong, bench)
    assert failed["error"].startswith("KeyError: 'groups'")
    assert key_of(failed) == key_of(row)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by signal 9"),
        ("raise SystemExit('the reason')", "its process ended with 1: the reason"),
    ],
)
def test_a_process_that_does_not_end_well_is_a_row(
    code: str, error: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = runner.subprocess.Popen
    stand_in = SimpleNamespace(
        **{name: getattr(runner.subprocess, name) for name in ("PIPE", "TimeoutExpired")},
        Popen=lambda _command, **options: popen([sys.executable, "-c", code], **options),
    )
    monkeypatch.setattr(runner, "subprocess", stand_in)
    limit = 1 if "sleep" in code else 30
    start = time.monotonic()
    (row,) = runner.run(dataclasses.replace(SETTING, timeout_s=limit), bench)
    assert row == SETTING.row(error=error)
    assert time.monotonic() - start < 30


def test_rows_replace_those_of_their_key_and_stay_beside_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first, second = {"device": "A", "date": "1"}, {"device": "A", "date": "2"}
    results = Results()
    results.add([SETTING.row(s=1.0), SETTING.row(s=5.0) | {"way": "resident"}], first)
    results.write(path)
    results = Results.read(path)
    results.add([SETTING.row(s=2.0)], second)
    results.write(path)
    found = Results.read(path)
    assert {row["way"]: (row["s"], found.runs[row["run"]]["date"]) for row in found.rows} == {
        "resident": (5.0, "1"),
        "vramkit block": (2.0, "2"),
    }
    found.add([SETTING.row(s=5.0) | {"way": "resident"}], second)
    found.write(path)
    assert Results.read(path).runs == [second]  # no row is left of the first


def test_rows_are_compared_with_their_reference_on_the_same_machine() -> None:
    rows = [
        SETTING.row(s=1.0, digest="a") | {"way": "resident"},
        SETTING.row(s=3.0, digest="a", moved_bytes=20 * 10**9, link_gbps=10.0),
        SETTING.row(s=1.1, digest="b", moved_bytes=10**9, link_gbps=10.0) | {"machine": "card 4 GiB"},
        SETTING.row(error="RuntimeError: no") | {"way": "mmgp pinned"},
    ]
    results = Results()
    results.add(rows, {"device": "A"})
    results.add([SETTING.row(s=9.0, digest="a") | {"way": "vramkit leaf"}], {"device": "B"})
    told = {(row["way"], row["machine"]): row for row in compared(results)}
    assert "ratio" not in told["resident", ""]
    assert told["vramkit block", ""]["floor_s"] == 2.0
    assert told["vramkit block", ""]["ratio"] == 1.5
    assert told["vramkit block", ""]["same_bytes"]
    assert told["vramkit block", "card 4 GiB"]["ratio"] == 1.1
    assert not told["vramkit block", "card 4 GiB"]["same_bytes"]
    assert "floor_s" not in told["mmgp pinned", ""]
    assert "floor_s" not in told["vramkit leaf", ""]  # measured on another machine


def test_a_list_is_worked_off_by_several_commands() -> None:
    other = dataclasses.replace(SETTING, way="vramkit leaf")
    run = {"device": "A", "date": "1"}
    results = Results()
    results.add([SETTING.row(s=1.0), other.row(error="x")], run)
    assert missing([SETTING, other], results, run | {"date": "2"}) == [other]  # errors are tried again
    assert missing([SETTING, other], results, {"device": "B"}) == [SETTING, other]


def test_a_command_ends_in_time_and_says_what_is_left(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, run, out = Results(), {"allocator": "", "device": "A"}, tmp_path / "out.json"
    assert command.measured([SETTING, SETTING], bench, results, run, out=out, minutes=0) == 2

    def cut_short(setting: Setting, _bench: Bench, *, timeout_s: float, **_options: object) -> list[Row]:
        time.sleep(timeout_s)
        return [setting.row(error="not done")]

    monkeypatch.setattr(command, "run", cut_short)
    assert command.measured([SETTING], bench, results, run, out=out, minutes=0.001) == 1
    assert not results.rows  # it was not given its time


def test_a_row_is_ended_after_as_long_as_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(
        command, "run", lambda _setting, _bench, *, timeout_s, **_options: given.append(timeout_s) or []
    )
    words = ["--smoke", "--case", "host", "--match", "bf16 block", "--out", str(tmp_path / "out.json")]
    assert main([*words, "--folder", str(tmp_path), "--row-s", "7"]) == 0
    assert given == [7]
    given.clear()
    main([*words, "--folder", str(tmp_path)])
    assert given == [SETTING.timeout_s]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--case", "nonsense"], "there is no case 'nonsense'"),
        (["--peer", "nonsense"], "there is no library 'nonsense'; there are resident, vramkit"),
        (["--case", "host", "--match", "nonsense"], "no row has .*--list names all"),
        (["--repeats", "0"], "'0' was given; expected a whole number"),
        (["--minutes", "-1"], "'-1' was given; expected a number above 0"),
        (["--row-s", "x"], "'x' was given; expected a number above 0"),
        (["--device", "nonsense"], "--device='nonsense' is not a device"),
        (["--device", "cuda:99"], "but this machine has"),
        (["--out", "{tmp}"], "cannot be read as results"),
        (["--out", "{tmp}/cut.json"], "cut.json cannot be read as results of a benchmark: Unterminated string"),
        (["--out", "{tmp}/cut.json/x.json"], "x.json cannot be written"),
        (["--folder", "{tmp}/cut.json"], "--folder .* cannot be made"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line_before_anything_is(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run", lambda *_, **__: pytest.fail("something was measured"))
    (tmp_path / "cut.json").write_text('{"benchmark": "su')
    with pytest.raises(SystemExit, match="2"):
        main(["--smoke", *(word.format(tmp=tmp_path) for word in words)])
    assert re.search(error, capsys.readouterr().err.splitlines()[-1])


def test_rows_of_a_device_that_is_not_there_are_refused_and_tiny_ones_go_into_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run", lambda setting, *_, **__: [setting.row(s=1.0)])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            main(["--case", "host"])
        assert not (tmp_path / command.OUT).exists()
    assert main(["--smoke", "--case", "host", "--match", "bf16 block"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.json"]


@pytest.mark.parametrize("name", ["cut.json", "missing.json"])
def test_a_file_that_holds_no_results_is_no_report(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.json").write_text('{"benchmark": "su')
    with pytest.raises(SystemExit, match="2"):
        report_main([str(tmp_path / name)])
    assert f"{name} cannot be read as results of a benchmark" in capsys.readouterr().err


def test_what_a_row_is_compared_with_is_measured_before_it_once_for_a_machine() -> None:
    cards = [setting for setting in case_named("cards").settings("smoke") if setting.way == "vramkit fit"]
    run = {"device": "A", "scale": "smoke"}
    chosen = with_references(cards, "smoke", Results(), run)
    assert [(setting.case, setting.way) for setting in chosen[:2]] == [("forward", "resident")] * 2  # of both libraries
    assert chosen[2:] == cards
    results = Results()
    results.add([setting.row(s=1.0) for setting in chosen[:2]], run)
    assert with_references(cards, "smoke", results, run) == cards
    assert with_references(cards, "smoke", results, run | {"device": "B"}) == chosen


def test_pages_and_reports_say_what_the_committed_files_say() -> None:
    differing = [
        str(path) for path, text in remade(sorted(RESULTS.glob("*.json")), PAGES).items() if path.read_text() != text
    ]
    assert not differing, f"python -m benchmarks.report makes them anew: {differing}"
    marks = [set(re.findall(r"<!-- results: ([\w-]+) -->", page.read_text(encoding="utf-8"))) for page in PAGES]
    assert marks == [
        {"wan14b", "guide"},
        {
            *(
                "wan14b",
                "quantized-5",
                "quantized",
                "families",
                "fits",
                "decodes",
                "decodes-h200",
                "budgets",
                "budgets-33",
            ),
            *("peers", "ways", "encodes", "cards", "links", "ram", "guide", "loaders", "again"),
            *("growth", "adapters", "applying", "loading"),
        },
    ]
    assert rendered("<!-- results: wan14b -->\nold\n<!-- end -->").count("0.527 (1.02)") == 1


def test_tables_of_a_page_are_made_from_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, results = "wan-14b diffusers bf16 832x480x81", Results()
    row = SETTING.row(s=3.0, digest="a", load_s=1.0, setup_s=0.5, first_s=3.0, reserved_bytes=2**31)
    forward = row | {"case": "forward", "subject": subject}
    card = {"case": "cards", "subject": subject, "reference": {"case": "forward"}}
    results.add(
        [
            forward | {"way": "resident"},
            forward | {"way": "vramkit leaf", "s": 3.3},
            SETTING.row(error="RuntimeError: a | b") | {"case": "forward", "subject": subject, "way": "mmgp pinned"},
            row | card | {"machine": "card 8 GiB"},
            SETTING.row(error="OutOfMemoryError: no") | card | {"machine": "card 2 GiB"},
            SETTING.row(error="TypeError: no") | card | {"machine": "card 16 GiB"},
            SETTING.row(error="not done after 80 s") | card | {"way": "mmgp pinned", "machine": "card 16 GiB"},
            row | card | {"way": "mmgp pinned", "machine": "card 8 GiB"},
        ],
        {"device": "A"},
    )
    results.write(tmp_path / "suite.json")
    monkeypatch.setattr(page_cells, "_RESULTS", tmp_path)
    plain = page_cells.rows_of.__wrapped__
    for each in (page_cells, pages):
        monkeypatch.setattr(each, "rows_of", plain)
    peers, cards = TABLES["peers"]().splitlines(), TABLES["cards"]().splitlines()
    assert peers[3] == "| vramkit leaf | | | 3.300 (1.10) | 2.00 | 4.5 | | yes |"
    assert peers[4] == "| mmgp pinned | | | RuntimeError: a / b | | | | |"
    assert cards[0] == "| | 16 GiB | 8 GiB | 2 GiB |"
    assert cards[2:] == [
        "| vramkit block, model of diffusers | failed | 3.00 | no room |",
        "| mmgp pinned, model of diffusers | not done | 3.00 | |",
    ]


def test_tables_tell_errors_and_what_was_not_done() -> None:
    grown, adapted, loaded = (TABLES[name]() for name in ("growth", "adapters", "loading"))
    assert "| 121 frames | not done after 70 s | | 5.865 | 3.07 |" in grown
    assert "| 17 frames, 10 layers | 0.119 | 7.49 |" in grown
    assert "| resident, diffusers | 1.1 | 1.1 | 15 |" in adapted
    assert loaded.splitlines()[-1] == "| torch.load mapped | | | | | | | not done after 60 s |"


def test_pictures_and_tables_are_made_by_one_command(tmp_path: Path) -> None:
    rows = []
    for way, s in (("resident", 1.0), ("vramkit leaf", 1.1)):
        rows.append(SETTING.row(s=s, reserved_bytes=2**30) | {"case": "forward", "way": way})
        rows.append(
            SETTING.row(s=s) | {"case": "cards", "way": way, "options": {"card_bytes": 2**33}, "machine": "card 8 GiB"}
        )
    rows.append(SETTING.row(s=1.0, resident_bytes=2**20) | {"case": "budgets"})
    rows.append(SETTING.row(s=1.0) | {"case": "growth", "options": {"leaves": 5}})
    frames = {"subject": {"clip": {"frames": 5}, "layers": None}}
    rows.append(SETTING.row(s=1.0, allocated_bytes=2**30) | {"case": "growth", "options": frames, "way": "resident"})
    results = Results()
    results.add(rows, environment(scale="smoke"))
    path = tmp_path / "some.json"
    results.write(path)
    assert report_main([str(path)]) == 0
    names = {found.name for found in tmp_path.iterdir()}
    assert names == {"some.json", "some.md", *(f"some-{name}.png" for name in plots.PLOTS)}
    assert "some-cards.png" in path.with_suffix(".md").read_text()
    assert report_main([str(path), "--check"]) == 0
    path.with_suffix(".md").write_text("other")
    assert report_main([str(path), "--check"]) == 1


def test_pictures_of_pages_are_those_of_results() -> None:
    shown = list(IMAGES.glob("suite-*.png"))
    assert {path.name for path in shown} == {"suite-frames.png", "suite-growth.png"}
    for path in shown:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), "python -m benchmarks.report copies them"


def test_memory_grows_by_activations_and_slots_alone() -> None:
    """What the page says of growth: to the byte, in all rows that have a resident one."""
    rows = [row for row in page_cells.rows_of("suite") if row.get("case") == "growth" and row["subject"][:3] == "wan"]
    activations = {
        row["subject"]: row["allocated_bytes"] - row["peer"]["weights_bytes"]
        for row in rows
        if row["way"] == "resident" and "s" in row
    }
    streamed = [row for row in rows if row["way"] != "resident" and row["subject"] in activations]
    assert len(streamed) >= 20
    for row in streamed:
        told = row["peer"]
        held = told["slots"] * told["slot_bytes"] + told["resident_bytes"]
        assert row["allocated_bytes"] == activations[row["subject"]] + held
        assert row["same_bytes"]


def test_the_floor_is_that_of_the_best_link_of_a_run() -> None:
    """A probe that was disturbed would make a floor that the pass undercuts."""
    row = {"s": 1.1, "reference_s": 0.5, "moved_bytes": 10e9, "link_gbps": 8.0, "ratio": 0.88}
    quick = row | {"link_gbps": 10.0}
    first, second, alone = page_cells.on_the_best_link([row, quick, {"s": 2.0}])
    assert first["ratio"] == second["ratio"] == pytest.approx(1.1)
    assert alone == {"s": 2.0}


def test_figures_are_printed_and_files_of_older_runs_are_read(tmp_path: Path) -> None:
    assert [cell("rss_bytes", 2**30), cell("s", 0.1234567), cell("same_bytes", True), cell("s", None)] == [
        "1.000", "0.123", "yes", "",
    ]  # fmt: skip
    for path in RESULTS.glob("*.json"):
        results = Results.read(path)
        assert all("run" in row for row in results.rows)
        assert report(results).count("\n| ") >= len(results.rows)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no rows"):
        Results.read(tmp_path / "other.json")


# -- emulation ---------------------------------------------------------------------------------------------------------


class Counting(PinnedStore):
    """A store that counts what travels."""

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(memory, "registered")
        self.filled = 0

    def fill(self, target: torch.Tensor) -> None:
        self.filled += target.numel()
        super().fill(target)


@pytest.mark.parametrize("times", [1.0, 2.0, 3.7])
def test_a_slowed_store_moves_its_bytes_so_often_and_leaves_them_right(times: float) -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    store, target = Counting(memory), torch.zeros(100, dtype=torch.uint8)
    emulation.SlowStore(store, times).fill(target)
    assert torch.equal(target, memory)
    assert store.filled == 100 * int(times)  # the part of the last time is copied beside it
    with pytest.raises(ValueError, match="cannot be emulated"), emulation.slowed(0.5):
        pass


def test_slowed_modules_compute_the_same_and_stores_are_as_before_afterwards(bench: Bench) -> None:
    built = stack_of(6, bench)
    expected = built.model(built.x)
    with emulation.slowed(2.5):
        offload = apply_group_offloading(built.model, "cpu")
        for _ in range(3):
            assert torch.equal(built.model(built.x), expected)
        offload.remove()
    assert torch.equal(built.model(built.x), expected)


def test_without_copies_nothing_travels_and_the_host_is_what_is_left(bench: Bench) -> None:
    built = stack_of(6, bench)
    row = overhead(built, "vramkit block", bench)
    assert row["groups"] == 6
    assert row["per_group_us"] is not None
    with torch.no_grad():
        right = built.model(built.x)
        with emulation.without_copies():
            offload = apply_group_offloading(built.model, "cpu")
            assert digest(built.model(built.x)) != digest(right)
            offload.remove()


def test_a_crowd_takes_memory_and_gives_it_back() -> None:
    with emulation.crowded(0, most_bytes=2**20) as left:
        assert left >= 0
    with emulation.capped(torch.device("cpu"), 2**30) as is_capped:
        assert not is_capped


def test_flextensor_is_given_the_outermost_lists_and_the_rest_on_the_device() -> None:
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Linear(2, 2),
            "encoder": torch.nn.ModuleDict(
                {"block": torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))}
            ),
            "norm": torch.nn.BatchNorm1d(2),
            "out": torch.nn.Linear(2, 2),
        }
    )
    model["out"].weight = model["embed"].weight
    assert flextensor._block_lists(model) == ["encoder.block"]
    flextensor._move_rest(model, ["encoder.block"], torch.device("meta"))
    moved = {name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"}
    assert moved == {name for name in model.state_dict() if not name.startswith("encoder.block.")}
    assert model["out"].weight is model["embed"].weight
    in_blocks = sum(tensor.nbytes for tensor in model["encoder"].parameters())
    assert resting_bytes(model, torch.device("meta")) == in_blocks


def test_older_checkpoints_give_way_to_a_new_one_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=1000 - size()))
    for age, name in enumerate(("ltx/weights", "clip-ltx-vae.safetensors", "mine.safetensors", "hunyuan/weights")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(200))
        os.utime(path.parent if "/" in name else path, (age, age))
    checkpoints.make_room(tmp_path, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clip-ltx-vae.safetensors",
        "hunyuan",
        "mine.safetensors",
    ]
    checkpoints.make_room(tmp_path, 700, keep="clip-ltx-transformer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip-ltx-vae.safetensors", "mine.safetensors"]


def test_the_environment_of_a_run_is_told() -> None:
    run = environment(allocator="x", scale="smoke", peers={"mmgp": None})
    assert run["allocator"] == "x"
    assert run["packages"]["mmgp"] is None
    assert run["packages"]["torch"] == torch.__version__
    assert json.dumps(run)
