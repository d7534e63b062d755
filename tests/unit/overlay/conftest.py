"""The core on plain directories: no mount, no FUSE."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sessiond.overlay.directory import NewObject
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack


@dataclass
class Bench:
    """Directories for layers, and overlays of them."""

    directory: Path
    _opened: list[Overlay] = field(default_factory=list)

    def layer(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def stack(self, *lowers: str, upper: str = "upper") -> Stack:
        """Open a stack; lowers that were uppers bring their indexes along."""
        indexes = [
            os.fsencode(path)
            for name in lowers
            if (path := self.directory / f"{name}-work" / "index").exists()
        ]
        paths = [os.fsencode(self.layer(name)) for name in lowers]
        work = os.fsencode(self.layer(f"{upper}-work"))
        return Stack.open(paths, os.fsencode(self.layer(upper)), work, indexes=indexes)

    def overlay(self, *lowers: str, upper: str = "upper") -> Overlay:
        overlay = Overlay(self.stack(*lowers, upper=upper))
        self._opened.append(overlay)
        return overlay

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()
    # Deeper than what Python's own tree removal, and so pytest's, can take.
    subprocess.run(["rm", "-rf", tmp_path], check=True)


def find(overlay: Overlay, path: str) -> Node:
    node = overlay.view.root
    for name in path.split("/"):
        node, _ = overlay.view.lookup(node, os.fsencode(name))
    return node


def contents(overlay: Overlay, path: str) -> bytes:
    node = find(overlay, path)
    overlay.open_file(node, write=False)
    try:
        return overlay.read(node, 1 << 20, 0)
    finally:
        overlay.release_file(node)


def names(overlay: Overlay, path: str = "") -> list[str]:
    node = find(overlay, path) if path else overlay.view.root
    return sorted(os.fsdecode(name) for name in overlay.names(node))


def new_file(mode: int = 0o100644) -> NewObject:
    return NewObject(mode, 0, 0)


def new_directory(mode: int = 0o040755) -> NewObject:
    return NewObject(mode, 0, 0)
