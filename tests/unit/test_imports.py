"""Imports run in one direction, as docs/architecture.md draws them; libraries stay in place."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sessiond

ROOT = Path(sessiond.__file__).parent

VERSION = {"sessiond", "sessiond.__version__"}
CONTRACTS = {"sessiond.session.model", "sessiond.session.mounter"}
CHECKER = {"sessiond.session.check", "sessiond.session.check_store"}
"""What of the session layer works without a daemon, for `sessionctl check`."""

ALLOWED: dict[str, set[str]] = {
    "sessiond.errors": set(),
    "sessiond.keep_rules": set(),
    "sessiond.cgroups": set(),
    "sessiond.config": {"sessiond.errors", "sessiond.keep_rules"},
    "sessiond.control": {"sessiond.errors"},
    "sessiond.descriptors": set(),
    "sessiond.journal": set(),
    "sessiond.systemd": {"sessiond.descriptors"},
    "sessiond.words": set(),
    "sessiond.overlay": {"sessiond.keep_rules"},
    "sessiond.fuse": {
        "sessiond.overlay",
        "sessiond.cgroups",
        "sessiond.keep_rules",
        "sessiond.control",
        "sessiond.descriptors",
        "sessiond.errors",
        *CONTRACTS,
    },
    "sessiond.session": {
        "sessiond.overlay",
        "sessiond.cgroups",
        "sessiond.config",
        "sessiond.errors",
        "sessiond.journal",
        "sessiond.keep_rules",
    },
    "sessiond.bus": {"sessiond.session", "sessiond.errors", "sessiond.journal"},
    "sessiond.cli": {
        "sessiond.bus.client",
        "sessiond.bus.mirror",
        "sessiond.config",
        "sessiond.errors",
        "sessiond.words",
        *CHECKER,
    },
    "sessiond.desktop": {"sessiond.words"},
    "sessiond.daemon": {"sessiond"},
}
"""What each part may import of this project, apart from itself and the version."""

LIBRARIES: dict[str, set[str]] = {
    "sessiond.errors": set(),
    "sessiond.keep_rules": set(),
    "sessiond.cgroups": {"trio"},
    "sessiond.config": {"pydantic", "pydantic_core"},
    "sessiond.control": {"pydantic", "trio"},
    "sessiond.descriptors": set(),
    "sessiond.journal": set(),
    "sessiond.systemd": {"trio"},
    "sessiond.words": set(),
    "sessiond.overlay": set(),
    "sessiond.fuse": {"pydantic", "pyfuse3", "trio"},
    "sessiond.session": {"pydantic", "pydantic_core", "trio"},
    "sessiond.bus": {"dbus_next", "pydantic", "pydantic_core", "trio"},
    "sessiond.cli": {"rich", "trio"},
    "sessiond.desktop": {"gi"},
    "sessiond.daemon": {"trio"},
}
"""What each part may import from elsewhere, apart from the standard library."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue  # the version, and nothing else
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def part_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of all that the file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


def violations(module: str, names: Iterator[str]) -> list[str]:
    part = part_of(module)
    wrong = []
    for name in names:
        top = name.split(".")[0]
        if top == "sessiond":
            allowed = name in VERSION or within(name, {part, *ALLOWED[part]})
        else:
            allowed = top in sys.stdlib_module_names or top in LIBRARIES[part]
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported(ROOT / "__init__.py")) == []


def test_every_part_has_a_rule() -> None:
    assert {part_of(module) for module in MODULES} <= ALLOWED.keys()
    assert ALLOWED.keys() == LIBRARIES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_in_the_allowed_direction(module: str) -> None:
    assert violations(module, imported(MODULES[module])) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sessiond.overlay.layer", "trio"),
        ("sessiond.overlay.layer", "sessiond.fuse.operations"),
        ("sessiond.session.manager", "sessiond.bus.names"),
        ("sessiond.session.manager", "sessiond.fuse"),
        ("sessiond.cli.main", "sessiond.session.model.SessionId"),
        ("sessiond.cli.main", "dbus_next.message"),
        ("sessiond.bus.service", "sessiond.daemon"),
        ("sessiond.fuse.mounter", "sessiond.session.manager"),
        ("sessiond.desktop.main", "sessiond.bus.client"),
        ("sessiond.desktop.main", "trio"),
    ],
)
def test_a_forbidden_import_is_found(module: str, name: str) -> None:
    assert violations(module, iter([name])) == [f"{module} imports {name}"]
