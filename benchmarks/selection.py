"""Which rows to measure: chosen by case, library and words, with the rows that they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.peers import PEERS
from benchmarks.rows import Results, Row, Setting, is_comparable, key_of
from benchmarks.runner import case_named

__all__ = ["missing", "reference_of", "settings_of", "with_references"]


def settings_of(
    cases: Sequence[str], scale: str, *, peers: Sequence[str] = (), words: Sequence[str] = ()
) -> Iterator[Setting]:
    """List the settings of cases; of these libraries only (and everything on the device), with all of `words` in the key.

    Raises:
        ValueError: there is no such case or library.
    """
    if unknown := sorted(set(peers) - set(PEERS)):
        raise ValueError(f"there is no library {unknown[0]!r}; there are {', '.join(PEERS)}")
    for name in cases:
        for setting in case_named(name).settings(scale):
            chosen = not peers or setting.way.split(" ")[0] in (*peers, "resident")
            if chosen and setting.matches(words):
                yield setting


def reference_of(setting: Setting, scale: str) -> Setting | None:
    """Return the setting that one is compared with; None for itself, and where there is nothing to compare."""
    wanted = key_of(setting.key | {"machine": "", "way": "resident"} | setting.reference)
    if wanted == key_of(setting.key):
        return None
    listed = case_named(setting.reference.get("case", setting.case)).settings(scale)
    return next((found for found in listed if key_of(found.key) == wanted), None)


def with_references(settings: Sequence[Setting], scale: str, results: Results, run: Row) -> list[Setting]:
    """Put what they are compared with before them, unless the file has it of such a machine, or it is chosen anyway."""
    there = _measured(results, run)
    chosen = {key_of(setting.key) for setting in settings}
    needed: dict[tuple[str, ...], Setting] = {}
    for setting in settings:
        found = reference_of(setting, scale)
        if found is not None and key_of(found.key) not in there | chosen:
            needed[key_of(found.key)] = found
    return [*needed.values(), *settings]


def missing(settings: Iterable[Setting], results: Results, run: Row) -> list[Setting]:
    """Leave out the settings of which the file has a row without an error, of such a machine."""
    there = _measured(results, run)
    return [setting for setting in settings if key_of(setting.key) not in there]


def _measured(results: Results, run: Row) -> set[tuple[str, ...]]:
    """Return the keys of rows, and those of the settings that rows are several of."""
    same = [row for row in results.rows if "error" not in row and is_comparable(results.runs[row["run"]], run)]
    return {key_of(each) for row in same for each in (row, row | {"way": row.get("of", row.get("way", ""))})}
