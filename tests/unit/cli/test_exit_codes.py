"""Every failure has its exit code, in the table and in the documentation."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from sessiond import errors
from sessiond.cli.exit_codes import EXIT_CODES, ExitCode, exit_code
from sessiond.errors import SessiondError

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, SessiondError) and kind is not SessiondError
]


def test_the_table_is_complete() -> None:
    assert set(EXIT_CODES) == set(KINDS)


def test_every_code_is_in_use() -> None:
    of_checks = {ExitCode.OK, ExitCode.DAMAGED, ExitCode.REPAIRED}
    assert {*of_checks, *EXIT_CODES.values()} == set(ExitCode)


@pytest.mark.parametrize("kind", KINDS)
def test_no_failure_looks_like_success(kind: type[SessiondError]) -> None:
    assert exit_code(kind("It went wrong.")) != ExitCode.OK


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs/sessionctl.md").read_text()
    for code in ExitCode:
        assert f"| {code.value} |" in text
