"""Layers in which anything is said in the overlay's attributes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sessiond.overlay import origin
from sessiond.overlay.diff import changes
from sessiond.overlay.layer import Layer
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from tests.support import trees
from tests.support.checker import findings
from tests.support.core_views import contents
from tests.support.fuzzing import fuzz
from tests.support.trees import Device, Link, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

_SECRET = b"not in any layer"
_LAYERS = ("upper", "middle", "low")
_TREE: Tree = {
    "a": {"b": {"file": b"in b", "link": Symlink("../../../secret")}, "gone": Whiteout()},
    "c": {"file": b"in c"},
    "file": b"at the root",
    "second": Link("file"),
    "empty": b"",
    "up": Symlink("../.."),
    "null": Device(kind=0o020000, major=1, minor=3),
}
_PATHS = (".", "a", "a/b", "a/b/file", "c", "c/file", "file", "empty")
_HANDLE = b"\0\xfb\x1d\0\1" + bytes(16) + b"12345678"
_OF_SECRET = b"<the handle of the secret>"

_VALUES = {
    "redirect": st.binary(max_size=12)
    | st.lists(
        st.sampled_from([b"", b"a", b"b", b"c", b"file", b"..", b".", b"up", b"link", b"secret"]),
        min_size=1,
        max_size=4,
    ).map(b"/".join)
    | st.sampled_from([b"/" + b"x" * 300, b"/a" * 2000, b"a\0b", b"/a/b\0"]),
    "origin": st.binary(max_size=40) | st.just(_HANDLE) | st.just(_OF_SECRET),
    "nlink": st.binary(max_size=8) | st.from_regex(rb"[UL][+-][0-9]{1,20}", fullmatch=True),
    "metacopy": st.binary(max_size=40) | st.just(b""),
    "opaque": st.sampled_from([b"y", b"x", b"", b"yy", b"\0"]),
    "whiteout": st.sampled_from([b"", b"y"]),
    "impure": st.sampled_from([b"y", b""]),
    "unknown": st.binary(max_size=4),
}


class _Mark(NamedTuple):
    layer: str
    path: str
    attribute: str
    value: bytes


_MARKS = st.sampled_from(sorted(_VALUES)).flatmap(
    lambda attribute: st.builds(
        _Mark,
        st.sampled_from(_LAYERS),
        st.sampled_from(_PATHS),
        st.just(attribute),
        _VALUES[attribute],
    )
)


@contextmanager
def _layers(marks: list[_Mark]) -> Iterator[Path]:
    """Make the layers, and a secret beside them; it is as it was in the end."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        secret = directory / "secret"
        secret.write_bytes(_SECRET)
        secret.chmod(0o600)
        for layer in (*_LAYERS, "work"):
            (directory / layer).mkdir()
            if layer != "work":
                trees.build(_TREE, str(directory / layer))
        for mark in marks:
            value = _handle_of(secret) if mark.value == _OF_SECRET else mark.value
            with suppress(OSError):  # of a value that is too long for the file system
                name = f"trusted.overlay.{mark.attribute}"
                os.setxattr(directory / mark.layer / mark.path, name, value)
        before = trees.snapshot(str(secret))
        yield directory
        assert trees.snapshot(str(secret)) == before
        assert sorted(os.listdir(directory)) == sorted([*_LAYERS, "work", "secret"])


def _handle_of(file: Path) -> bytes:
    around = Layer.open(os.fsencode(file.parent), writable=True)
    try:
        return origin.encode(around, around.at(os.fsencode(file.name))) or b""
    finally:
        around.close()


def _open(directory: Path) -> Overlay:
    upper, *lowers = (os.fsencode(directory / layer) for layer in _LAYERS)
    return Overlay(Stack.open(lowers, upper, os.fsencode(directory / "work")))


def _visit(overlay: Overlay) -> list[tuple[Node, bytes, Node]]:
    """Look at everything in the view; return the objects with their names and directories."""
    seen = []
    pending = [(overlay.view.root, 0)]
    while pending:
        parent, depth = pending.pop()
        try:
            names = overlay.names(parent)
        except OSError:
            continue
        assert depth < 20, "it has no end"
        for name in names:
            with suppress(OSError):
                node, status = overlay.view.lookup(parent, name)
                overlay.view.refer(node)
                seen.append((parent, name, node))
                if node.is_directory:
                    pending.append((node, depth + 1))
                overlay.view.link_count(node, status)
                for attribute in overlay.listxattr(node):
                    assert not attribute.startswith(b"trusted.overlay.")
                    overlay.getxattr(node, attribute)
                if status.st_mode & 0o170000 == 0o100000:
                    assert contents(overlay, node) != _SECRET
    return seen


_EVERYWHERE = [
    _Mark(layer, path, "redirect", value)
    for layer in _LAYERS
    for path, value in (("a", b"/../secret"), ("c", b".."), ("file", b"/secret"))
]


@given(st.lists(_MARKS, max_size=6))
@example(_EVERYWHERE)
@example([_Mark("upper", "file", "metacopy", b""), _Mark("upper", "file", "origin", _OF_SECRET)])
@example(
    [_Mark("upper", "file", "metacopy", b""), _Mark("upper", "file", "redirect", b"/up/secret")]
)
@example([_Mark("middle", "a", "redirect", b"/a/b"), _Mark("upper", "a", "redirect", b"/a/b")])
@fuzz(40)
def test_nothing_said_in_attributes_leads_out_of_the_layers(marks: list[_Mark]) -> None:
    with _layers(marks) as directory:
        overlay = _open(directory)
        try:
            found = _visit(overlay)
            with suppress(OSError):
                list(changes(overlay.view.stack.copy(), overlay.view.stack.bottom()))
            _change(overlay, found)
            _visit(overlay)
        finally:
            overlay.close()
        upper, *lowers = (directory / layer for layer in _LAYERS)
        for repair in (False, True):
            with suppress(OSError):
                findings(upper, directory / "work", lowers, repair=repair)


def _change(overlay: Overlay, found: list[tuple[Node, bytes, Node]]) -> None:
    """Change all that there is, each in another way; deepest first, as far as it can be."""
    for number, (parent, name, node) in enumerate(reversed(found)):
        with suppress(OSError):
            overlay.chmod(node, 0o640)
        with suppress(OSError):
            overlay.resize(node, 3)
        with suppress(OSError):
            if number % 3 == 0:
                overlay.rename((parent, name), (overlay.view.root, b"renamed-%d" % number))
            elif node.is_directory:
                overlay.rmdir(parent, name)
            else:
                overlay.unlink(parent, name)
