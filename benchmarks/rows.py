"""What is measured and what came of it: settings, rows by key, and the JSON file that keeps them.

A file of results has the ``runs`` that rows were measured in (hardware, versions, date, allocator) and the ``rows``,
each with the number of its run. Rows are replaced by rows of the same key, so that a file may be filled by several
commands. Sizes are in bytes, times in seconds, rates in GB/s (10^9 bytes); `compared` adds what follows from two rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["KEY", "Results", "Row", "Setting", "compared", "floor_s", "is_comparable", "key_of"]

Row = dict[str, Any]
Key = tuple[str, ...]

KEY = ("case", "subject", "way", "machine")
_SAME_MACHINE = ("device", "cuda", "allocator", "scale")  # what two rows must share to be compared
_SAME_PACKAGES = ("torch", "cudnn", "diffusers", "transformers")  # who chooses kernels, and whose models are measured


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row to be: what is measured, in which way, and on what machine."""

    case: str
    subject: str
    """The model, and what it is asked."""
    way: str
    """The peer and its options, ``"diffusers leaf stream"``; ``"resident"`` for everything on the device."""
    machine: str = ""
    """What is emulated, ``"card 8 GiB"``; nothing for the machine as it is."""
    options: Row = dataclasses.field(default_factory=dict)
    """What the case needs to know in its own process; JSON-able."""
    reference: Row = dataclasses.field(default_factory=dict)
    """What differs in the key of the row that this one is compared with; without it, the way ``"resident"``."""
    timeout_s: float = 540.0

    @property
    def key(self) -> Row:
        """The columns by which rows are told apart."""
        return {name: getattr(self, name) for name in KEY}

    def row(self, **figures: Any) -> Row:
        """Return a row of these figures."""
        options = {"options": self.options} if self.options else {}
        reference = {"reference": self.reference} if self.reference else {}
        return self.key | options | reference | figures

    def matches(self, words: Iterable[str]) -> bool:
        """Whether each of `words` is somewhere in the key."""
        text = " ".join(self.key.values())
        return all(word in text for word in words)


def key_of(row: Row) -> Key:
    """Return what tells a row from others; rows of older files have other columns for that."""
    if "way" not in row:
        return tuple(f"{name}={value}" for name, value in row.items() if isinstance(value, str))
    return tuple(row.get(name, "") for name in KEY)


def is_comparable(run: Row, other: Row) -> bool:
    """Whether rows of two runs may be compared: the same device, versions, allocator settings and scale."""
    return _machine_of(run) == _machine_of(other)


@dataclasses.dataclass
class Results:
    """Rows by key, and the runs that they are of."""

    runs: list[Row] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    title: str = "suite"

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file, also one of a single run as they were written before.

        Raises:
            ValueError: it cannot be read, or holds something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as results of a benchmark: {error}") from error
        if not isinstance(found, dict) or "rows" not in found:
            raise ValueError(f"{path} holds no rows of a benchmark")
        if "runs" in found:
            return cls(found["runs"], found["rows"], found["benchmark"])
        notes = {name: value for name, value in found.items() if name not in ("benchmark", "environment", "rows")}
        return cls([found["environment"] | notes], [{"run": 0} | row for row in found["rows"]], found["benchmark"])

    @classmethod
    def of(cls, path: Path, *, title: str = "suite") -> Results:
        """Read the file, or begin a new one.

        Raises:
            ValueError: it cannot be read, or holds something else.
        """
        return cls.read(path) if path.exists() else cls(title=title)

    @classmethod
    def kept_in(cls, path: Path, *, title: str = "suite") -> Results:
        """Read the file that rows will be put into; one that takes none is known before they are measured.

        Raises:
            ValueError: it holds something else, or cannot be written.
        """
        is_new = not path.exists()
        results = cls.of(path, title=title)
        try:
            results.write(path)
            if is_new:
                path.unlink()
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error}; give another file by --out") from error
        return results

    def add(self, rows: Iterable[Row], run: Row) -> None:
        """Take in rows of `run`; those of the same keys go."""
        if run not in self.runs:
            self.runs.append(run)
        number = self.runs.index(run)
        new = {key_of(row): row | {"run": number} for row in rows}
        self.rows = [row for row in self.rows if key_of(row) not in new] + list(new.values())

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, without runs that no row is left of."""
        numbers = sorted({row["run"] for row in self.rows})
        rows = [row | {"run": numbers.index(row["run"])} for row in self.rows]
        found = {"benchmark": self.title, "runs": [self.runs[number] for number in numbers], "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def compared(results: Results) -> list[Row]:
    """Return the rows with what follows from others: floor, ratio to it, whether the bytes are those of the reference.

    The floor is max(seconds of the reference, bytes / link) with the link of the row, emulated or not. Rows of another
    machine, other versions or another allocator are no reference.
    """
    references = {(_machine_of(results.runs[row["run"]]), key_of(row)): row for row in results.rows if "way" in row}
    told = []
    for row in results.rows:
        names = {"machine": "", "way": "resident"} | row.get("reference", {})
        wanted = tuple((row | names).get(name, "") for name in KEY)
        found = references.get((_machine_of(results.runs[row["run"]]), wanted))
        own = found is not None and key_of(found) == key_of(row)
        told.append(row if found is None or own else row | _against(row, found))
    return told


def _against(row: Row, reference: Row) -> Row:
    figures: Row = {}
    if "digest" in row and "digest" in reference:
        figures["same_bytes"] = row["digest"] == reference["digest"]
    if row.get("s") and reference.get("s"):
        floor = floor_s(row, reference)
        figures |= {"reference_s": reference["s"], "floor_s": floor, "ratio": round(row["s"] / floor, 3)}
    return figures


def floor_s(row: Row, reference: Row) -> float:
    """Return the seconds that a row cannot be below: those of its reference, or of its bytes on its link."""
    moved, link = row.get("moved_bytes") or 0, row.get("link_gbps")
    return float(max(reference["s"], moved / (link * 1e9) if link else 0))


def _machine_of(run: Row) -> tuple[Any, ...]:
    packages = run.get("packages") or {}
    return (*map(run.get, _SAME_MACHINE), *map(packages.get, _SAME_PACKAGES))
