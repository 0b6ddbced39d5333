"""The site: it builds without a warning, its examples run, its tables are true."""

from __future__ import annotations

import builtins
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from checkpoints import write_lora
from documents import DOCS, README, ROOT, SMALLER, blocks, run_blocks, tables
from foreign_pipelines import PIPELINES
from language_models import llama

import vramkit
from vramkit import AutoModel, errors
from vramkit.pipelines import DecodeMemoryError
from vramkit.quant import registry

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links and anchors are checked by that, and so are the docstrings of the reference."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "reference" / "offload.html").read_text(encoding="utf-8")
    for shown in ("apply_group_offloading", "onload_device", "ConflictError", "streamed_bytes", "adapt"):
        assert shown in reference
    for page in (tmp_path / "site").rglob("*.html"):  # nothing is fetched from elsewhere
        assert not re.search(r'(src|<link[^>]*href)="https?://', page.read_text(encoding="utf-8")), page


def test_every_page_with_examples_is_run_by_a_test() -> None:
    with_examples = {page.name for page in DOCS.rglob("*.md") if blocks(page)}
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    run = {name for code in sources if "run_blocks(" in code for name in re.findall(r'DOCS / "([\w-]+\.md)"', code)}
    assert len(with_examples) >= 10
    assert with_examples - run == set()


def test_files_that_pages_name_exist() -> None:
    """Links are checked by the build; this is for what stands in backticks, from the root or within the package."""
    named = 0
    for page in (README, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for path in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|json|toml))`", page.read_text(encoding="utf-8")):
            places = (ROOT, ROOT / "vramkit", ROOT / "vramkit" / "pipelines")
            assert any((place / path).exists() for place in places) or path == "comfy/cli_args.py", (page.name, path)
            named += 1
    assert named > 100


class TestExamples:
    def test_getting_started(self, capsys: pytest.CaptureFixture[str]) -> None:
        names = run_blocks(DOCS / "getting-started.md", at_least=4)
        assert not names["offload"].is_active
        assert "streams" in capsys.readouterr().out

    def test_budgets(self, capsys: pytest.CaptureFixture[str]) -> None:
        run_blocks(DOCS / "budgets.md", at_least=2)
        out = capsys.readouterr().out
        assert "peak" in out
        assert "The nearest budget that fits is" in out

    @pytest.mark.filterwarnings("ignore:a whole decode does not fit")
    def test_third_party(self, tmp_path: Path) -> None:
        PIPELINES["FluxPipeline"].make("FluxPipeline").save_pretrained(tmp_path / "flux")
        llama(tied=True).save_pretrained(tmp_path / "llama")
        names = run_blocks(
            DOCS / "third-party.md",
            {
                "black-forest-labs/FLUX.1-dev": str(tmp_path / "flux"),
                "Qwen/Qwen2.5-32B-Instruct": str(tmp_path / "llama"),
                "height=1024, width=1024": "height=16, width=16, max_sequence_length=9",
                "num_inference_steps=28": "num_inference_steps=2",
                'resident="12GiB"': "resident=1000",
                'vram="11GiB"': 'vram="1GiB", device="cpu"',
            },
            at_least=6,
        )
        assert names["image"].size == (16, 16)
        assert (tmp_path / "run.html").stat().st_size > 0

    def test_video(self, wan_folder: Path) -> None:
        run_blocks(DOCS / "video.md", {"Wan-AI/Wan2.1-T2V-14B-Diffusers": str(wan_folder), **SMALLER})
        assert Path("clip.mp4").stat().st_size > 0

    def test_adapters(self, wan_folder: Path, tmp_path: Path) -> None:
        transformer = AutoModel.from_pretrained(wan_folder, subfolder="transformer")
        adapter = write_lora(transformer, tmp_path / "adapter").parent
        names = run_blocks(
            DOCS / "adapters.md",
            {
                "Wan-AI/Wan2.1-T2V-14B-Diffusers": str(wan_folder),
                "benjamin-paine/steamboat-willie-14b": str(adapter),
            },
        )
        assert names["pipeline"].get_active_adapters() == ["style"]

    def test_a_store(self) -> None:
        names = run_blocks(DOCS / "adding-a-store.md", at_least=3)
        assert torch.equal(names["streamed"], names["resident"])

    def test_a_quantizer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "_HANDLERS", registry._HANDLERS)  # put back what the page adds
        monkeypatch.setitem(sys.modules, "rows_backend", None)
        names = run_blocks(DOCS / "adding-a-quantizer.md", at_least=3)
        assert torch.equal(names["streamed"], names["resident"])
        assert 30 < names["cost"].forward_db < 60
        assert 8 * 256 * 256 <= names["stored_bytes"] <= 8 * 256 * (256 + 4 + 4)  # codes, a scale and a bias per row
        assert type(names["model"][0].weight) is torch.nn.Parameter

    def test_a_backend(self) -> None:
        names = run_blocks(DOCS / "adding-a-backend.md", at_least=2)
        assert torch.equal(names["streamed"], names["resident"])
        assert names["link"].jobs >= names["loads"] >= 4


class TestTroubleshooting:
    PAGE = DOCS / "troubleshooting.md"

    def test_every_error_stands_there_with_what_it_is(self) -> None:
        kinds = [getattr(errors, name) for name in errors.__all__] + [DecodeMemoryError]
        rows = {row[0].strip("`"): row for row in tables(self.PAGE.read_text(encoding="utf-8"))}
        for kind in kinds:
            _, also, when, what_to_do = rows[kind.__name__]
            for name in re.findall(r"`([\w.]+)`", also):
                parent = getattr(builtins, name, None) or getattr(errors, name, None) or torch.OutOfMemoryError
                assert issubclass(kind, parent)
            assert when
            assert what_to_do

    def test_errors_that_it_names_exist(self) -> None:
        for name in re.findall(r"`(\w+Error)`", self.PAGE.read_text(encoding="utf-8")):
            assert hasattr(errors, name) or hasattr(vramkit, name) or hasattr(builtins, name), name

    def test_warnings_that_it_quotes_are_given(self) -> None:
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "vramkit").rglob("*.py"))
        sources = re.sub(r'"\s*\n\s*f?"', "", sources)
        section = self.PAGE.read_text(encoding="utf-8").split("## Warnings")[1].split("\n## ")[0]
        quoted = [row[0] for row in tables(section)[2:]]
        assert len(quoted) >= 6
        for each in quoted:
            for part in re.sub(r"\(`.*`\)", "", each).split("..."):
                assert part.strip(" ;:") in sources, part


class TestComingFrom:
    PAGE = DOCS / "coming-from-others.md"

    def test_every_option_of_accelerate_stands_there(self) -> None:
        section = self.PAGE.read_text(encoding="utf-8").split("\n## accelerate")[1].split("\n## ")[0]
        shown = {name for row in tables(section) for name in re.findall(r"\w+", row[0])}
        for name in (
            *("cpu_offload", "cpu_offload_with_hook", "disk_offload", "dispatch_model", "init_empty_weights"),
            "load_checkpoint_and_dispatch",
        ):
            call = getattr(accelerate, name)
            assert {name, *inspect.signature(call).parameters} - shown == set()

    def test_what_it_names_here_exists(self) -> None:
        own: set[str] = {*vramkit.__all__, "rest", "edit", "report"}
        for row in tables(self.PAGE.read_text(encoding="utf-8")):
            for name in re.findall(r"`(\w+)\(", row[1]):
                found = (vramkit, vramkit.quant, vramkit.WanPipeline, vramkit.AutoencoderKLWan, vramkit.Offload)
                assert name in own or any(hasattr(place, name) for place in found) or name == "compile", name


class TestWhichMode:
    """The figures on the page are those of the results."""

    TEXT = (DOCS / "which-mode.md").read_text(encoding="utf-8")

    def rows(self, name: str, **wanted: Any) -> Iterator[dict[str, Any]]:
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
            if all(row.get(key) == value for key, value in wanted.items()):
                yield row

    def gib(self, name: str, **wanted: Any) -> float:
        (row,) = self.rows(name, **wanted)
        return float(row["reserved_gib"])

    def test_by_memory_of_the_card(self) -> None:
        leaf = {
            "Wan": self.gib("quant14b", case="ours-bf16 leaf level", frames=81),
            "hunyuan": self.gib("families", family="hunyuan", case="streamed, tiled decode"),
            "cogvideox-5b": self.gib("families", family="cogvideox-5b", case="streamed, tiled decode"),
        }
        resident = {
            "nf4": self.gib("quant14b", case="ours-nf4 resident", frames=81),
            "fp8": self.gib("quant14b", case="ours-fp8 resident", frames=81),
            "5b": self.gib("families", family="cogvideox-5b", case="transformer resident"),
            "2b": self.gib("families", family="cogvideox-2b", case="transformer resident"),
            "ltx": self.gib("families", family="ltx", case="transformer resident"),
        }
        cards = {row[0]: row for row in tables(self.TEXT) if row[0].endswith(" GB") and len(row) == 6}
        for card, given in (("8 GB", 7.0), ("12 GB", 11.0), ("16 GB", 15.0), ("24 GB", 22.5)):
            _, give, wan, hunyuan, five, _ = cards[card]
            assert give == f'`"{given:g}GiB"`'
            assert wan.startswith("leaf, bf16")
            assert hunyuan == f"leaf, bf16: {leaf['hunyuan']:.1f} GiB"
            fits = resident["5b"] < 0.9 * given  # what torch reserved, and a tenth beside it
            expected = f"resident: {resident['5b']:.1f} GiB" if fits else f"leaf, bf16: {leaf['cogvideox-5b']:.1f} GiB"
            assert five == expected
            for stored in ("nf4", "fp8"):  # said only where it fits
                is_said = f"{stored} resident: {resident[stored]:.1f} GiB" in wan
                assert not is_said or resident[stored] < 0.9 * given
            assert max(resident["2b"], resident["ltx"]) < given
        assert cards["8 GB"][2] == f"leaf, bf16: {leaf['Wan']:.1f} GiB"
        assert f"{resident['2b']:.1f} and {resident['ltx']:.1f} GiB" in cards["8 GB"][5]

    def _of_bf16(self, way: str) -> float:
        fp8, bf16 = (
            next(self.rows("suite-h200", case="quantized", subject=f"wan-14b vramkit {kind} 832x480x81", way=of))["s"]
            for kind, of in (("fp8", way), ("bf16", "resident"))
        )
        return float(fp8 / bf16)

    def test_what_a_link_costs(self) -> None:
        table = {row[0]: row for row in tables(self.TEXT)}
        for shown, case in (("bf16", "ours-bf16"), ("fp8 storage", "ours-fp8"), ("nf4", "ours-nf4")):
            row = table[shown]
            resident = [next(self.rows("quant14b", case=f"{case} resident", frames=n))["s"] for n in (5, 81)]
            streamed = [next(self.rows("quant14b", case=f"{case} leaf level", frames=n)) for n in (5, 81)]
            gib = streamed[0]["streamed_gib"]
            if shown == "fp8 storage":  # since it is widened once for all chunks: on another machine, beside its bf16
                bf16 = next(self.rows("quant14b", case="ours-bf16 resident", frames=81))["s"]
                resident[1], streamed[1]["s"] = (bf16 * self._of_bf16(way) for way in ("resident", "vramkit leaf"))
            assert row[1] == f"{gib:.1f}"
            assert row[2:4] == [f"{resident[0]:.3f}", f"{resident[1]:.2f}"]
            assert row[4] == f"{streamed[0]['s']:.3f}, {streamed[1]['s']:.2f}"
            for cell, gbps in zip(row[5:8], (25, 12, 3), strict=True):
                assert cell == ", ".join(f"{max(s, gib * 1.073741824 / gbps):.1f}" for s in resident)


def test_pictures_are_pictures() -> None:
    for path in (DOCS / "images").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size < 300_000  # a page is no download
        assert any(f"images/{path.name}" in page.read_text(encoding="utf-8") for page in (README, *DOCS.rglob("*.md")))


def test_the_command_line_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "vramkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vramkit {vramkit.__version__}\n"
