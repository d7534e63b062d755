"""The reference in docs/ names every command, option and key, and becomes good manual pages."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from sessiond import daemon
from sessiond.cli import arguments
from sessiond.config import (
    DaemonTable,
    GuestsTable,
    LoginTable,
    Profile,
    ResetTable,
    SessionTable,
    SnapshotsTable,
)
from sessiond.desktop import main as desktop
from sessiond.fuse import mount

ROOT = Path(__file__).parents[2]
SPHINX = ["sphinx-build", "-q", "-n", "-W", "--keep-going"]
PAGES = [
    "org.sessiond.Overlay1.5",
    "sessionctl.1",
    "sessiond-overlay.8",
    "sessiond-reset.1",
    "sessiond.8",
    "sessiond.toml.5",
]


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser, but for those that every command has."""
    found = {name for action in parser._actions for name in action.option_strings}
    return found - {"-h", "--help", "--version"}


def commands() -> dict[str, argparse.ArgumentParser]:
    for action in arguments._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("sessionctl has commands")


def tables(document: str) -> Iterator[tuple[str, str, str]]:
    """Yield section, first cell and second cell of each row of a table."""
    section = ""
    for line in (ROOT / "docs" / document).read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| "):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            yield section, cells[0], cells[1]


def written_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def synopses(command: str) -> list[tuple[str, str]]:
    """Section and text of what `sessionctl.md` says of how a command is called."""
    return [
        (section, cell.partition(" -- ")[0])
        for section, cell, _ in tables("sessionctl.md")
        if re.match(rf"`sessionctl {command}[ `]", cell)
    ]


@pytest.mark.parametrize("command", commands())
def test_each_command_is_documented_with_its_options(command: str) -> None:
    found = synopses(command)
    assert found
    assert set().union(*(written_options(text) for _, text in found)) == options(
        commands()[command]
    )


def test_each_option_of_sessionctl_is_explained() -> None:
    explained: dict[str, set[str]] = {}
    for section, cell, _ in tables("sessionctl.md"):
        if cell.startswith("`--"):
            explained.setdefault(section, set()).update(written_options(cell))
    for command, parser in commands().items():
        for section, _ in synopses(command):
            known = explained.get(section, set()) | {"--json"}
            if command == "restore":  # "others: as of `reset`"
                known |= explained["Resets"]
            assert options(parser) <= known, command


def test_no_command_is_made_up() -> None:
    named = {
        match[1]
        for _, cell, _ in tables("sessionctl.md")
        if (match := re.match(r"`sessionctl ([a-z-]+)", cell))
    }
    assert named == set(commands())


@pytest.mark.parametrize(
    ("document", "parser"),
    [
        ("sessiond.md", daemon._parser()),
        ("sessiond-overlay.md", mount._parser()),
        ("desktop.md", desktop._parser()),
    ],
)
def test_each_option_is_documented(document: str, parser: argparse.ArgumentParser) -> None:
    explained = {
        option
        for _, cell, _ in tables(document)
        if cell.startswith(("`-", "`sessiond-reset --"))
        for option in written_options(cell)
    }
    assert explained - {"-h", "--help", "--version"} == options(parser)


def test_each_mount_option_is_documented() -> None:
    named = {
        name
        for _, cell, _ in tables("sessiond-overlay.md")
        for name in re.findall(r"`([a-z_]+)=?[^`]*`", cell)
    }
    assert {"lowerdir", "upperdir", "workdir", "allow_other", "userxattr"} <= named
    assert mount._FLAGS.keys() | mount._CLEARED.keys() <= named


@pytest.mark.parametrize(
    "table",
    [Profile, SnapshotsTable, ResetTable, SessionTable, LoginTable, GuestsTable, DaemonTable],
)
def test_each_key_of_the_configuration_is_documented(table: type[BaseModel]) -> None:
    named = {
        name
        for _, cell, _ in tables("configuration.md")
        for name in re.findall(r"`([a-z_]+)`", cell)
    }
    keys = {field.alias or name for name, field in table.model_fields.items()}
    assert keys - {"reset", "snapshots"} <= named  # these two are tables of their own


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("manual")
    subprocess.run([ROOT / "packaging/manual/build", directory], check=True)
    return directory


def test_all_pages_are_built(manual: Path) -> None:
    assert sorted(path.name for path in manual.iterdir()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_faults(manual: Path, page: str) -> None:
    path = manual / page
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", path], capture_output=True, text=True
    )
    assert lint.stdout + lint.stderr == ""
    shown = subprocess.run(
        ["man", "--warnings", "--local-file", path],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        check=True,
    )
    assert shown.stderr == ""
    assert "](" not in shown.stdout
    assert "|---" not in shown.stdout


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_found_by_what_it_is_about(manual: Path, page: str) -> None:
    result = subprocess.run(["lexgrog", manual / page], capture_output=True, text=True, check=True)
    assert f'"{page.rpartition(".")[0]} - ' in result.stdout


def test_the_site_has_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [*SPHINX, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )
    assert built.stderr == ""
    assert (tmp_path / "site/index.html").exists()


def test_pages_name_each_other(manual: Path) -> None:
    assert r"\f[B]sessionctl\f[R](1)" in (manual / "sessiond.8").read_text()
