"""The command line."""

from __future__ import annotations

import pytest

from sessiond.cli.arguments import parse
from sessiond.cli.commands import COMMANDS
from sessiond.cli.exit_codes import ExitCode

UPPER = ["--upper", "u", "--work", "w", "--lower", "l"]


@pytest.mark.parametrize(
    "program", [["ls", "-la"], ["sh", "-c", "ls --json"], ["git", "log", "--", "file"], ["--json"]]
)
def test_the_program_to_run_is_taken_as_it_is(program: list[str]) -> None:
    assert parse(["run", "live", "--", *program]).program == program


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "COMMAND"),
        (["explode"], "invalid choice: 'explode'"),
        (["status"], "SESSION"),
        (["diff", "live", "--depth", "0"], "levels are a number, 1 or more"),
        (["diff", "live", "--list", "--content"], "not allowed with"),
        (["restore", "live", "good", "--keep", "/srv"], "unrecognized arguments: --keep /srv"),
        (["diff", "live", "--list", "--directories", "5"], "not allowed with"),
        (["diff", "live", "--directories", "101"], "a number from 1 to 100 is needed"),
        (["diff", "live", "--list", "--depth", "5"], "--depth is for directories"),
        (["guest", "remove"], "a name is given to 'guest remove', and only to that"),
        (["guest", "add", "bob"], "a name is given to 'guest remove', and only to that"),
        (["snapshot", "live"], "SNAPSHOT"),
        (["reset", "live", "twice"], "unrecognized arguments: twice"),
        (["reset", "live", "--", "twice"], "unrecognized arguments: twice"),
        (["check", "--upper", "u", "--work", "w"], "--upper, --work and --lower go together"),
        (["check", "live", *UPPER], "no session can be given"),
        (["check", "--state-directory", "s", *UPPER], "no state directory"),
        (["check", "--userxattr"], "--userxattr goes with --upper"),
        (["check", "--config", "c", "--state-directory", "s"], "not allowed with"),
        (["run", "live"], "sessionctl run SESSION -- COMMAND"),
        (["run", "live", "--"], "sessionctl run SESSION -- COMMAND"),
        (["run", "live", "ls", "-l"], "sessionctl run SESSION -- COMMAND"),
    ],
)
def test_a_malformed_command_line_is_a_usage_error_with_a_hint(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == ExitCode.USAGE
    assert hint in capsys.readouterr().err


def test_every_command_is_listed_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == ExitCode.OK
    printed = capsys.readouterr().out
    for command in (*COMMANDS, "run", "shell", "check"):
        assert f"\n    {command}" in printed
    for code in ExitCode:
        assert f"\n  {code.value:2}  " in printed
