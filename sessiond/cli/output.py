"""What sessionctl prints: tables for people, JSON for programs.

Names come from users and from their files, and may hold what a terminal acts on: for people they
are escaped, in JSON they are exact.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sessiond.words import _, pgettext

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
ANY_WIDTH = 1_000_000
"""Columns of what is no terminal."""


def printable(text: str) -> str:
    """Return `text` with all that a terminal might act on escaped, as in Python and C literals.

    Bytes that were no UTF-8 (surrogate escapes) come as ``\\xNN``. Nothing else in the result has a
    backslash, so the original can be read from it.
    """
    return "".join(c if c.isprintable() and c != "\\" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    if 0x80 <= number <= 0xFF:  # as \\xNN they would be taken for bytes
        return f"\\u{number:04x}"
    return character.encode("unicode_escape").decode("ascii")


def size(count: int) -> str:
    """Return a number of bytes in words for people."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count} B" if power == 0 else f"{count / 1024**power:.1f} {_UNITS[power]}"


def used_of(used: int, limit: int) -> str:
    """Return used and allowed bytes in words; without a limit (0) it is the whole disk's use."""
    if limit == 0:
        return _("{used} on its disk").format(used=size(used))
    share = f"{used / limit:.0%}"
    return _("{used} of {limit} ({share})").format(used=size(used), limit=size(limit), share=share)


def when(moment: datetime | None) -> str:
    """Return a moment in local time, to the second."""
    return _("never") if moment is None else moment.astimezone().isoformat(" ", "seconds")


def print_json(value: Json) -> None:
    """Print `value` on one line; bytes that were no UTF-8 stay as lone surrogates (``\\udcNN``)."""
    print(json.dumps(value))


def print_line(text: str) -> None:
    """Print one line for people, escaped."""
    print(printable(text))


def listed(parts: Iterable[str]) -> str:
    """Return `parts` as one text."""
    return pgettext("between parts of a list", ", ").join(parts)


def padded(text: str, width: int) -> str:
    """Return `text` with as many spaces as it needs to take that many columns of a terminal."""
    return text + " " * (width - cell_len(text))


def broken(text: str, width: int) -> list[str]:
    """Return the lines of `text`, in which none takes more than that many columns."""
    return [line.plain.rstrip() for line in Text(text).wrap(Console(), width)]


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` in columns. Nothing is cut or wrapped where the output is not a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    show(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names with their values, one pair a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(printable(value)))
    show(table)


def show(what: RenderableType) -> None:
    """Print what rich draws. Raises `BrokenPipeError`, upon which rich itself would exit."""
    # Without highlighting and markup: the text is data. A pipe has no width, unlike a terminal.
    width = None if sys.stdout.isatty() else ANY_WIDTH
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    with console.capture() as drawn:
        console.print(what)
    sys.stdout.write(drawn.get())
