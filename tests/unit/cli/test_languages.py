"""What sessionctl says in other languages, and what is the same in each."""

from __future__ import annotations

import os

import pytest
from rich.cells import cell_len

from sessiond.cli.exit_codes import ExitCode
from tests.bus.fake_manager import FakeManager
from tests.unit.cli.conftest import Sessionctl

DIFF = (
    b'{"path": "/etc/motd", "kind": "contents", "type": "file", "size": 12, "old_size": 12}\n'
    b'{"path": "/srv/b", "kind": "renamed", "type": "directory", "size": 0, "old_size": 0, '
    b'"from": "/srv/a", "changed": "metadata"}\n'
)


class Speaking:
    """sessionctl in one language, whose locale need not be there."""

    def __init__(self, sessionctl: Sessionctl, language: str) -> None:
        self._sessionctl = Sessionctl.__new__(Sessionctl)
        self._sessionctl.environment = sessionctl.environment | {
            "LC_ALL": f"{language}.UTF-8",
            "PYTHONUTF8": "1",
            "COLUMNS": "80",
        }

    async def said(self, *arguments: str, code: int = 0) -> str:
        done = await self._sessionctl(*arguments, code=code)
        return (done.stderr if code else done.stdout).decode()

    async def lines(self, *arguments: str) -> list[str]:
        return (await self.said(*arguments)).splitlines()


@pytest.fixture
def german(sessionctl: Sessionctl) -> Speaking:
    return Speaking(sessionctl, "de_DE")


@pytest.fixture
def chinese(sessionctl: Sessionctl) -> Speaking:
    return Speaking(sessionctl, "zh_CN")


def serve(manager: FakeManager) -> None:
    session = manager.sessions[next(iter(manager.sessions))]
    session.diff_body = lambda target: os.write(target, DIFF)


async def test_help(german: Speaking) -> None:
    said = await german.said("--help")
    assert "Alle Sitzungen auflisten\n" in said
    assert "   3  nicht gefunden\n" in said
    assert said.startswith("Aufruf: sessionctl ")
    assert "diese Hilfe anzeigen und enden\n" in said
    assert "Standard: 10" in await german.said("reset", "--help")


async def test_tables(manager: FakeManager, german: Speaking) -> None:
    head, row = await german.lines("list")
    assert head.split()[:5] == ["KENNUNG", "BENUTZER", "PROFIL", "SPEICHER", "ZUSTAND"]
    assert "aktiv" in row
    assert "4.0 KiB von 1.0 TiB (0%)" in row


async def test_status(manager: FakeManager, german: Speaking) -> None:
    said = " ".join((await german.said("status", "live")).split())
    assert "Sitzung live Benutzer nobody (65534) " in said
    assert "Zuletzt zurückgesetzt nie " in said
    assert "Schnappschüsse keine Änderungen 1 hinzugefügt, " in said


async def test_differences(manager: FakeManager, german: Speaking) -> None:
    serve(manager)
    tree = await german.said("diff", "live")
    assert "umbenannt, bisher /srv/a, Metadaten" in tree
    assert "1 geändert, 1 umbenannt; 12 B in Dateien" in tree


async def test_errors_of_its_own(manager: FakeManager, german: Speaking) -> None:
    said = await german.said("import", "live", "new", "/none/such", code=ExitCode.FAILED)
    assert said.startswith("sessionctl: /none/such kann nicht geöffnet oder geschrieben werden: ")


async def test_what_the_daemon_says_stays_as_it_is(
    manager: FakeManager, sessionctl: Sessionctl, german: Speaking
) -> None:
    english = (await sessionctl("status", "none", code=ExitCode.NOT_FOUND)).stderr.decode()
    assert await german.said("status", "none", code=ExitCode.NOT_FOUND) == english


async def test_columns_of_wide_characters(manager: FakeManager, chinese: Speaking) -> None:
    manager.add("other", "root", 0)
    serve(manager)
    head, *rows = await chinese.lines("list")
    column = cell_len(head.partition("挂载点")[0])
    assert [cell_len(row.partition("/run")[0]) for row in rows] == [column, column]
    *files, _sum = await chinese.lines("diff", "live", "--list")
    assert len({cell_len(line.partition("/")[0]) for line in files}) == 1
    session, user, *_others = await chinese.lines("status", "live")
    assert cell_len(session.partition("live")[0]) == cell_len(user.partition("nobody")[0])


async def test_help_of_wide_characters_is_as_wide_as_the_terminal(chinese: Speaking) -> None:
    lines = await chinese.lines("rebase", "--help")
    assert max(map(cell_len, lines)) in range(70, 81)


async def test_programs_read_the_same(
    manager: FakeManager, sessionctl: Sessionctl, german: Speaking
) -> None:
    serve(manager)
    for asked in ("list", "status live", "snapshots live", "diff live", "shadowed live"):
        arguments = (*asked.split(), "--json")
        assert await german.said(*arguments) == (await sessionctl(*arguments)).stdout.decode()
    for asked, code in (
        ("status none", ExitCode.NOT_FOUND),
        ("snapshot live -", ExitCode.USAGE),
        ("check --userxattr --upper /none --work /none --lower /none", ExitCode.FAILED),
    ):
        await german.said(*asked.split(), code=code)
