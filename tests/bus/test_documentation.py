"""docs/dbus.md lists all that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sessiond.bus import names
from sessiond.bus.interface import Argument, Interface
from sessiond.bus.objects import JobObject, ManagerObject, SessionObject, SnapshotObject

TEXT = (Path(__file__).parents[2] / "docs/dbus.md").read_text()


def section(interface: type[Interface]) -> str:
    title = interface.name.rpartition(".")[2]
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def written(arguments: tuple[Argument, ...]) -> str:
    return ", ".join(f"{argument.type} {argument.name}" for argument in arguments)


@pytest.mark.parametrize("interface", [ManagerObject, SessionObject, SnapshotObject, JobObject])
def test_members_are_documented(interface: type[Interface]) -> None:
    text = section(interface)
    for method in interface.methods.values():
        result = f" → {written(method.outputs)}" if method.outputs else ""
        assert f"`{method.name}({written(method.inputs)}){result}`" in text
    for signal in interface.signals:
        assert f"`{signal.name}({written(signal.arguments)})`" in text
    for declared in interface.properties:
        assert f"`{declared.name}`" in text


def test_errors_are_documented() -> None:
    text = TEXT.partition("\n## Errors\n")[2]
    for name in names.ERRORS.values():
        assert f"`{name.rpartition('.')[2]}`" in text
