"""What people and programs get to see."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from sessiond.cli import output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("größe", "größe"),
        ("back\\slash", "back\\\\slash"),
        ("new\nline", "new\\nline"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x00\x7f", "\\x00\\x7f"),
        ("\x9b31m", "\\u009b31m"),
        (b"\xff\x9b".decode("utf-8", "surrogateescape"), "\\xff\\x9b"),
        ("right\u202eleft", "right\\u202eleft"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_a_terminal_acts_on_is_escaped(text: str, shown: str) -> None:
    assert output.printable(text) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 74, "16384.0 EiB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert output.size(count) == shown


def test_use_of_storage() -> None:
    assert output.used_of(1024, 0) == "1.0 KiB on its disk"
    assert output.used_of(1024, 4096) == "1.0 KiB of 4.0 KiB (25%)"


def test_moments() -> None:
    moment = datetime(2020, 2, 29, 12, 30, 15, 999999, UTC)
    assert datetime.fromisoformat(output.when(moment)) == moment.replace(microsecond=0)
    assert output.when(None) == "never"


def test_tables_in_a_pipe_are_not_cut_and_hold_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "x" * 500
    output.print_table(("NAME", "SIZE"), [(long, "1 B"), ("[bold]a\x1b[0m", "10 B")])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "SIZE"]
    assert first.split() == [long, "1", "B"]
    assert second.split() == ["[bold]a\\x1b[0m", "10", "B"]
    assert first.index("1 B") == second.index("10 B")


def test_facts(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts([("Session", "a"), ("Mount point", "/x\n/y")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["Session      a", "Mount point  /x\\n/y"]


def test_json_keeps_names_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    name = b"\xff\n".decode("utf-8", "surrogateescape")
    output.print_json({"path": name})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"path": name}
