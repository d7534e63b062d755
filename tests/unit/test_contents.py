"""Which text of files that differ is told to whom."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sessiond.fuse.contents import LIMIT, Contents
from sessiond.overlay import syscalls
from sessiond.overlay.diff import changes
from sessiond.overlay.stack import Stack

pytestmark = pytest.mark.root

OWNER, OTHER, ROOT = 1001, 1002, 0
MESSAGE = {"old": "before\n", "new": "after\n"}


class Layers:
    """An image, and an upper over it."""

    def __init__(self, directory: Path) -> None:
        self.image, self.upper = directory / "image", directory / "upper"
        for path in (self.image, self.upper, directory / "work"):
            path.mkdir()
        self._directory = directory

    def write(self, path: str, old: bytes | None, new: bytes | None, owner: int = ROOT) -> None:
        """Have a file with these contents in the image and the upper."""
        for layer, data in ((self.image, old), (self.upper, new)):
            (layer / path).parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                (layer / path).write_bytes(data)
                os.chown(layer / path, owner, owner)
            elif layer is self.upper:
                os.mknod(layer / path, 0o020000)

    def told(self, uid: int) -> dict[str, object]:
        """Return what is told of each file that differs."""
        paths = [os.fsencode(path) for path in (self.image, self.upper, self._directory / "work")]
        with_upper = Stack.open(paths[:1], *paths[1:])
        stack, base = with_upper.copy(), with_upper.bottom()
        contents = Contents(stack, base, uid)
        try:
            found = {one.path.decode(): contents.of(one) for one in changes(stack, base)}
            return {path: what for path, what in found.items() if what is not None}
        finally:
            for one in (stack, base, with_upper):
                one.close()


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def test_text_is_told(layers: Layers) -> None:
    layers.write("changed", b"before\n", b"after\n")
    layers.write("d/added", None, "ä".encode())
    layers.write("deleted", b"gone", None)
    layers.write("binary", b"\0", b"text")
    layers.write("latin", b"\xe4", b"text")
    layers.write("large", b"", b"x" * (LIMIT + 1))
    layers.write("fits", b"", b"x" * LIMIT)
    assert layers.told(OTHER) == {
        "changed": MESSAGE,
        "d/added": {"old": "", "new": "ä"},
        "deleted": {"old": "gone", "new": ""},
        "binary": "binary",
        "latin": "binary",
        "large": "large",
        "fits": {"old": "", "new": "x" * LIMIT},
    }


@pytest.mark.parametrize(
    ("protect", "may_read"),
    [
        (lambda layer: (layer / "d/file").chmod(0o600), {ROOT, OWNER}),
        (lambda layer: (layer / "d/file").chmod(0o044), {ROOT, OTHER}),
        (lambda layer: (layer / "d/file").chmod(0o604), {ROOT, OWNER}),
        (lambda layer: (layer / "d/file").chmod(0o640), {ROOT, OWNER}),
        (lambda layer: (layer / "d").chmod(0o700), {ROOT}),
        (lambda layer: (layer / "d").chmod(0o701), {ROOT}),
        (lambda layer: layer.chmod(0o700), {ROOT}),
        (lambda layer: set_acl(layer / "d/file"), {ROOT}),
        (lambda layer: set_acl(layer / "d"), {ROOT}),
    ],
)
@pytest.mark.parametrize("where", ["image", "upper"])
def test_what_somebody_may_not_read_is_not_told(
    layers: Layers, where: str, protect: Callable[[Path], None], may_read: set[int]
) -> None:
    """Neither where the image forbids it nor where the session does."""
    layers.write("d/file", b"before\n", b"after\n", OWNER)
    protect(getattr(layers, where))
    for uid in (ROOT, OWNER, OTHER):
        told = layers.told(uid)["d/file"]
        assert told == (MESSAGE if uid in may_read else "forbidden"), uid


def set_acl(path: Path) -> None:
    """Give a user who does not matter a right that does not matter."""
    entries = [(1, 7, -1), (2, 4, 4242), (4, 5, -1), (16, 5, -1), (32, 5, -1)]
    value = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little")
        + rights.to_bytes(2, "little")
        + (who % 2**32).to_bytes(4, "little")
        for tag, rights, who in entries
    )
    os.setxattr(path, "system.posix_acl_access", value)


def test_what_is_exchanged_meanwhile_is_not_told(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of the user's takes the place of a secret one when that is looked at."""
    layers.write("own/file", None, b"own", OWNER)
    layers.write("secret/file", None, b"secret")
    (layers.upper / "secret").chmod(0o700)
    found = syscalls.open_path

    def exchange(at: syscalls.At) -> int:
        """Just before the directory that was looked up is opened, and again after that."""
        if at.name in {b"own", b"secret"}:
            root = os.open(layers.upper, os.O_PATH)
            ends = syscalls.At(root, b"own"), syscalls.At(root, b"secret")
            syscalls.rename(*ends, syscalls.RENAME_EXCHANGE)
            fd = found(at)
            syscalls.rename(*ends, syscalls.RENAME_EXCHANGE)
            os.close(root)
            return fd
        return found(at)

    monkeypatch.setattr(syscalls, "open_path", exchange)
    assert "secret" not in str(layers.told(OWNER).values())
