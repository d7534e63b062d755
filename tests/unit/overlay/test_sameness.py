"""A tree that was made of a merged view is compared with it, and the first difference is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sessiond.overlay.layer import Layer
from sessiond.overlay.sameness import first_difference
from sessiond.overlay.stack import Stack


def unchecked() -> None:
    """Nobody wants it to stop."""


def difference(layers: list[Path], tree: Path) -> tuple[bytes, str] | None:
    stack = Stack.open([os.fsencode(layer) for layer in layers])
    made = Layer.open(os.fsencode(tree), writable=False)
    try:
        return first_difference(stack, made, unchecked)
    finally:
        made.close()
        stack.close()


CHANGES: dict[str, tuple[Callable[[Path], object], bytes, str]] = {
    "contents": (lambda tree: (tree / "d/f").write_text("b"), b"d/f", "has other contents"),
    "mode": (lambda tree: (tree / "d/f").chmod(0o600), b"d/f", "has another type or mode"),
    "missing": (lambda tree: (tree / "d/f").unlink(), b"d/f", "is missing"),
    "more": (lambda tree: (tree / "d/g").touch(), b"d/g", "should not be there"),
    "root": (lambda tree: tree.chmod(0o711), b"", "has another type or mode"),
    "root's attributes": (
        lambda tree: os.setxattr(tree, "user.a", b"b"),
        b"",
        "has other extended attributes or another ACL",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_difference_is_found(tmp_path: Path, change: str) -> None:
    upper, image, tree = (tmp_path / name for name in ("upper", "image", "tree"))
    for layer in (upper, image):
        (layer / "d").mkdir(parents=True)
    (image / "d/f").write_text("image")
    (upper / "d/f").write_text("a")
    (image / "d/under").write_text("under")
    shutil.copytree(image, tree)
    shutil.copy2(upper / "d/f", tree / "d/f")
    assert difference([upper, image], tree) is None
    make, path, how = CHANGES[change]
    make(tree)
    assert difference([upper, image], tree) == (path, how)
