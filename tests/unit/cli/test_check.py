"""sessionctl check, as a process, on an upper made by hand."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sessiond.cli.exit_codes import ExitCode
from sessiond.overlay.check.findings import Kind
from sessiond.session.check import StoreKind

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[3]


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """A directory with `upper`, `work` and `low`, in which nothing is wrong."""
    for name in ("upper", "work/work", "low/d", "e"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def sessionctl(*arguments: str, code: ExitCode, user: int | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sessiond.cli.main", *arguments],
        capture_output=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        user=user,
        cwd=ROOT,
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return (done.stdout + done.stderr).decode()


def check(layers: Path, *arguments: str, code: ExitCode, lower: str = "{}/low") -> str:
    given = ["--upper", f"{layers}/upper", "--work", f"{layers}/work"]
    lowers = lower.replace("{}", str(layers))
    return sessionctl("check", *given, "--lower", lowers, *arguments, code=code)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR)


def test_nothing_found(layers: Path) -> None:
    assert check(layers, code=ExitCode.OK) == "Checked 1 layer: nothing was found.\n"


def test_notes_are_no_damage(layers: Path) -> None:
    for number in range(12):
        whiteout(layers / f"upper/gone-{number}\n")
    said = check(layers, code=ExitCode.OK).splitlines()
    assert said[0] == "  note: whiteout-over-nothing"
    assert said[1].startswith("    upper: gone-")
    assert said[1].endswith("\\n"), "what a terminal could act on is escaped"
    assert said[11:] == [
        "    and 2 more",
        "    It hides nothing: no lower has this name. With --repair it is removed.",
        "Checked 1 layer: 12 notes.",
    ]
    said = check(layers, "--repair", code=ExitCode.OK).splitlines()
    assert said[12:] == [
        "    It hides nothing: no lower has this name. It was removed.",
        "Checked 1 layer: 12 notes, 12 repaired.",
    ]
    assert os.listdir(layers / "upper") == []


def test_several_lowers(layers: Path) -> None:
    whiteout(layers / "upper/d")
    (layers / "e:f").mkdir()
    found = check(layers, lower="{}/e:{}/low", code=ExitCode.OK)
    assert found.endswith("nothing was found.\n")
    assert "whiteout" in check(layers, lower="{}/e:{}/e\\:f", code=ExitCode.OK)
    said = check(layers, lower="{}/e::{}/low:{}/e", code=ExitCode.USAGE)
    assert "--lower takes directories" in said


def test_damage(layers: Path) -> None:
    (layers / "upper/a").mkdir()
    os.setxattr(layers / "upper/a", "trusted.overlay.redirect", b"/nowhere")
    for arguments in ((), ("--repair",)):
        said = check(layers, *arguments, code=ExitCode.DAMAGED)
        assert "error: redirect-dangling\n    upper: a  (redirect /nowhere)\n" in said
        assert said.endswith("Checked 1 layer: 1 error.\n")


def test_damage_that_is_repaired(layers: Path) -> None:
    (layers / "upper/a").touch()
    os.setxattr(layers / "upper/a", "trusted.overlay.opaque", b"y")
    check(layers, code=ExitCode.DAMAGED)
    said = check(layers, "--repair", code=ExitCode.REPAIRED)
    assert "It was freed of the attribute." in said
    check(layers, "--repair", code=ExitCode.OK)


def test_json_is_one_document(layers: Path) -> None:
    assert json.loads(check(layers, "--json", code=ExitCode.OK)) == {
        "findings": [],
        "complete": True,
        "sessions": 0,
        "layers": 1,
        "errors": 0,
        "warnings": 0,
        "notes": 0,
        "repaired": 0,
    }
    whiteout(layers / "upper/gone")
    os.mknod(os.fsencode(layers) + b"/work/work/\xff", stat.S_IFREG)
    told = json.loads(check(layers, "--json", "--repair", code=ExitCode.OK))
    assert told["notes"] == told["repaired"] == 2
    assert told["findings"][0] == {
        "kind": "whiteout-over-nothing",
        "severity": "note",
        "session": None,
        "layer": None,
        "place": "upper",
        "path": "gone",
        "number": 1,
        "meaning": "It hides nothing: no lower has this name.",
        "detail": "",
        "repairable": True,
        "repaired": True,
    }
    assert told["findings"][1]["place"] == "workdir"
    assert told["findings"][1]["path"] == "work/\udcff"


def test_what_cannot_be_checked(layers: Path) -> None:
    (layers / "work/work").rmdir()
    (layers / "work").rmdir()
    said = check(layers, "--json", code=ExitCode.FAILED)
    document, error, _ = said.split("\n")
    assert json.loads(document)["complete"] is False
    assert error == f"sessionctl: {layers}/work: workdir does not exist."
    said = sessionctl("check", "--state-directory", str(layers), code=ExitCode.FAILED)
    assert f"{layers} has no sessions" in said
    said = sessionctl("check", "--config", f"{layers}/none.toml", code=ExitCode.FAILED)
    assert "none.toml: cannot be read" in said


def test_who_is_not_root_cannot_see_the_marks() -> None:
    said = sessionctl("check", code=ExitCode.NOT_AUTHORIZED, user=65534)
    assert said == "sessionctl: Reading layers takes root: use sudo or su.\n"


def test_every_kind_is_documented() -> None:
    text = (ROOT / "docs/check.md").read_text()
    for kind in (*Kind, *StoreKind):
        about = kind.description
        row = f"| `{about.id}` | {about.severity} |"
        assert row in text
        line = next(line for line in text.splitlines() if line.startswith(row))
        assert about.repair in line.rpartition("|")[0].rpartition("|")[2]
    rows = re.findall(r"\n\| `[a-z-]+` \| (?:error|warning|note) \|", text)
    assert len(rows) == len(Kind) + len(StoreKind)
