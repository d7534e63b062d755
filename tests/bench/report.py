"""What was measured: medians, ratios, a table for people, and JSON for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.rows import Unit

_EMPTY = "—"
_FAILED = "failed"


@dataclass
class Cell:
    """A row on a peer: a figure for each round, or why there is none."""

    values: list[float] = field(default_factory=list)
    skipped: str = ""
    """Why it means nothing to ask for this figure."""
    failures: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """The median of all rounds; None without any figure."""
        return statistics.median(self.values) if self.values else None


@dataclass
class Report:
    """Rows by name, each with its cells by peer."""

    machine: Mapping[str, str]
    """What it was measured on, by what name."""
    peers: Mapping[str, str]
    """Columns, with their versions."""
    own: Sequence[str]
    """Those columns that are sessiond's."""
    units: dict[str, Unit] = field(default_factory=dict)
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def add_row(self, name: str, unit: Unit) -> dict[str, Cell]:
        """Return the cells of a row, which are empty at first."""
        self.units[name] = unit
        return self.rows.setdefault(name, {peer: Cell() for peer in self.peers})

    def ratio(self, row: str, own: str, peer: str) -> float | None:
        """Return how many times longer (or more) `own` takes than `peer`; None if unknown."""
        ours, theirs = self.rows[row][own].median, self.rows[row][peer].median
        return ours / theirs if ours is not None and theirs else None

    @property
    def others(self) -> list[str]:
        """The columns that sessiond is compared with."""
        return [peer for peer in self.peers if peer not in self.own]

    @property
    def failed(self) -> bool:
        """Whether there was a failure anywhere."""
        return any(cell.failures for cells in self.rows.values() for cell in cells.values())

    def text(self) -> str:
        """Return the tables, and below them what failed and what was left out."""
        medians = [
            [row, *(_shown(cell, self.units[row]) for cell in cells.values())]
            for row, cells in self.rows.items()
        ]
        parts = [_table(["median", *self.peers], medians)]
        for own in self.own:
            compared = [row for row in self.rows if any(self._ratios(row, own))]
            ratios = [[row, *map(_times, self._ratios(row, own))] for row in compared]
            if ratios:
                parts.append(_table([f"{own} as a multiple of", *self.others], ratios))
        parts.append("\n".join(self._remarks()))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _ratios(self, row: str, own: str) -> list[float | None]:
        return [self.ratio(row, own, peer) for peer in self.others]

    def _remarks(self) -> Iterator[str]:
        """Yield a line for each failure, and for each row without any figure."""
        for row, cells in self.rows.items():
            for peer, cell in cells.items():
                for reason in dict.fromkeys(cell.failures):
                    yield f"failed: {row}, {peer}: {reason.splitlines()[0]}"
            if all(cell.skipped for cell in cells.values()):
                for reason in dict.fromkeys(cell.skipped for cell in cells.values()):
                    yield f"left out: {row}: {reason}"

    def write_json(self, path: Path) -> None:
        """Write all of it, and replace what was there in one step."""
        rows = [
            {
                "name": row,
                "unit": self.units[row].value,
                "cells": {
                    peer: {"median": cell.median, **vars(cell)} for peer, cell in cells.items()
                },
                "ratios": {
                    own: {peer: self.ratio(row, own, peer) for peer in self.others}
                    for own in self.own
                },
            }
            for row, cells in self.rows.items()
        ]
        whole = {"machine": self.machine, "peers": self.peers, "own": self.own, "rows": rows}
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n")
        unfinished.replace(path)


def _shown(cell: Cell, unit: Unit) -> str:
    if cell.median is not None:
        return quantity(cell.median, unit)
    return _FAILED if cell.failures else _EMPTY


def _times(ratio: float | None) -> str:
    return _EMPTY if ratio is None else f"{ratio:.2f}"


def quantity(value: float, unit: Unit) -> str:
    """Return a figure with three digits and a unit for people."""
    step, names = {
        Unit.NANOSECONDS: (1000, ("ns", "µs", "ms", "s")),
        Unit.BYTES: (1024, ("B", "KiB", "MiB", "GiB")),
    }[unit]
    for name in names:
        if value < 999.5 or name == names[-1]:
            break
        value /= step
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f} {name}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Align columns, the first at its left; long heads take two lines."""
    upper, lower = zip(*map(_split_head, head), strict=True)
    everything = [upper, lower, *lines] if any(upper) else [lower, *lines]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if number == 0 else text.rjust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in everything
    )


def _split_head(name: str) -> tuple[str, str]:
    first, dash, rest = name.partition("-")
    return (first + dash, rest) if dash and " " not in name else ("", name)
