"""Every operation that changes a merged view, on everything that it can be done to.

All act on one set of layers, in which each name says what it is: of which layers, and whether it
was copied up, put into the index or redirected before.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from typing import NamedTuple

from sessiond.overlay import syscalls
from sessiond.overlay.directory import NewObject
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from tests.support.core_views import find
from tests.support.trees import Device, Dir, Fifo, File, Link, Symlink, Tree, Whiteout, acl

DATA = bytes(range(256)) * 64
ACL = acl(("u", None, 6), ("u", 7, 4), ("g", None, 4), ("m", None, 4), ("o", None, 0))
DEFAULT_ACL = acl(("u", None, 7), ("u", 7, 5), ("g", None, 5), ("m", None, 5), ("o", None, 0))

LOWEST: Tree = {
    "plain": File(
        DATA,
        mode=0o640,
        uid=1,
        gid=2,
        xattrs={"user.x": b"1", "system.posix_acl_access": ACL, "trusted.overlay.overlay.x": b"n"},
    ),
    "suid": File(DATA, mode=0o4755, uid=3),
    "sparse": File(DATA, hole=1 << 17),
    "hard": b"three names",
    "last": b"its last name",
    "removed": Link("last"),
    "copied": File(DATA, mode=0o600),
    "indexed": b"two names, copied up",
    "over": b"hidden by a file",
    "gone": b"hidden by a whiteout",
    "symlink": Symlink("plain", uid=4),
    "fifo": Fifo(),
    "device": Device(stat.S_IFCHR, 1, 3),
    "deep": {"er": Dir({"file": DATA, "other": b""}, mode=0o750, uid=5)},
    "goner": {"file": b"hidden by a whiteout"},
    "lower": {"a": b"in two layers", "b": b"", "hard": Link("hard"), "indexed": Link("indexed")},
    "empty": Dir({}, mode=0o700),
    "merged": {"lower": b"", "hard": Link("hard")},
    "opaque": {"lower": b"hidden"},
    "origin": {"file": b"in a directory that is redirected"},
    "emptied": {"a": b"", "b": {}},
    "cleared": {"a": b""},
}
MIDDLE: Tree = {
    "lower": Dir({"a": b"of the middle", "c": {"d": b""}}, mode=0o711),
    "cleared": {"a": Whiteout()},
    "origin": {"file": Whiteout(), "middle": b""},
    "stays": b"",
}
UPPER: Tree = {
    "new": File(DATA, uid=6),
    "pair": b"two names in the upper",
    "twin": Link("pair"),
    "over": b"of upper",
    "gone": Whiteout(),
    "goner": Whiteout(),
    "newdir": {"file": b"", "dir": {}},
    "newempty": Dir({}, mode=0o702),
    "merged": Dir({"upper": b""}, mode=0o700),
    "opaque": Dir({"upper": b""}, opaque=True),
    "emptied": Dir({"a": Whiteout(), "b": Whiteout()}, mode=0o701),
    "setgid": Dir({}, mode=0o2775, gid=8),
    "acl": Dir({}, xattrs={"system.posix_acl_default": DEFAULT_ACL}),
}
LOWERS = (MIDDLE, LOWEST)

FILES = (
    *("plain", "suid", "hard", "last", "copied", "indexed", "over", "new", "pair", "symlink"),
    *(
        "fifo",
        "device",
        "deep/er/file",
        "lower/a",
        "lower/hard",
        "redirected/middle",
        "opaque/upper",
    ),
)
SPECIAL = ("symlink", "fifo", "device")
IN_UPPER = ("copied", "indexed", "over", "new", "pair", "opaque/upper")
EMPTY_DIRECTORIES = ("empty", "emptied", "cleared", "newempty")
DIRECTORIES = ("lower", "merged", "opaque", "redirected", "newdir", "deep/er", *EMPTY_DIRECTORIES)
HIDDEN = ("gone", "goner")
FREE = ("free", *HIDDEN, "lower/free", "newdir/free", "deep/er/free")


class Operation(NamedTuple):
    """What to do, and the paths of the directories and files whose fsync(2) makes it durable."""

    name: str
    run: Callable[[Overlay], object]
    synced: tuple[str, ...]
    spare_whiteout: str = ""
    """Where there may be a whiteout over nothing, if this is interrupted."""
    in_place: bool = False
    """It changes contents that are in the upper, which is its file system's affair."""


def prepare(overlay: Overlay) -> None:
    """Bring about what no description of a layer can."""
    for path in ("copied", "indexed"):
        overlay.chmod(find(overlay, path), 0o644)
    overlay.unlink(*place(overlay, "removed"))
    overlay.rename(place(overlay, "origin"), place(overlay, "redirected"))


def place(overlay: Overlay, path: str) -> tuple[Node, bytes]:
    """Return a path as a directory and a name in it."""
    parent, _, name = path.rpartition("/")
    return find(overlay, parent), os.fsencode(name)


def operations() -> Iterator[Operation]:
    """Return all operations; no two have the same name."""
    yield from _changes_of_attributes()
    yield from _changes_of_contents()
    yield from _creations()
    yield from _removals()
    yield from _renames()
    yield from _exchanges()


def metacopy_operations() -> Iterator[Operation]:
    """Return what is done to files of which the upper has only the metadata."""
    targets = [*product(("plain", "hard"), ("free", "new"))]
    for path in ("plain", "hard"):
        yield _on("chmod", path, lambda overlay, node: overlay.chmod(node, 0o604))
        yield _on("write to", path, _write)
        for size in (0, 5, 1 << 18):
            yield _on(f"truncate to {size}", path, partial(_resize, size))
        yield _unlink(path)
    for source, target in targets:
        yield _rename(source, target, 0)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _on(name: str, path: str, act: Callable[[Overlay, Node], object]) -> Operation:
    return Operation(
        f"{name} {path}",
        lambda overlay: act(overlay, find(overlay, path)),
        (path, _parent(path)),
    )


def _changes_of_attributes() -> Iterator[Operation]:
    for path in (*FILES, *DIRECTORIES):
        yield _on("chown", path, lambda overlay, node: overlay.chown(node, 41, 42))
        yield _on("utime", path, lambda overlay, node: overlay.utime(node, 10**18, 10**18 + 1))
        yield _on(
            "setxattr", path, lambda overlay, node: overlay.setxattr(node, b"trusted.t", b"2")
        )
        if path != "symlink":
            yield _on("chmod", path, lambda overlay, node: overlay.chmod(node, 0o604))
    yield _on("removexattr", "plain", lambda overlay, node: overlay.removexattr(node, b"user.x"))
    yield _on(
        "remove the ACL of",
        "plain",
        lambda overlay, node: overlay.removexattr(node, b"system.posix_acl_access"),
    )
    yield _on("drop the privileges of", "suid", Overlay.drop_privileges)


def _changes_of_contents() -> Iterator[Operation]:
    for path in (*(path for path in FILES if path not in SPECIAL), "sparse"):
        acts: dict[str, Callable[[Overlay, Node], object]] = {
            "write to": _write,
            "open and truncate": _open_truncated,
        }
        for size in (0, 5, 1 << 18):
            acts[f"truncate to {size}"] = partial(_resize, size)
        for name, act in acts.items():
            yield _on(name, path, act)._replace(in_place=path in IN_UPPER)


def _resize(size: int, overlay: Overlay, node: Node) -> None:
    overlay.resize(node, size)


def _write(overlay: Overlay, node: Node) -> None:
    overlay.open_file(node, write=True)
    overlay.write(node, b"written", 0)
    overlay.fsync(node, data_only=False)


def _open_truncated(overlay: Overlay, node: Node) -> None:
    overlay.open_file(node, write=True, truncate=True)


def _creations() -> Iterator[Operation]:
    kinds = {
        "file": NewObject(stat.S_IFREG | 0o640, 0, 0),
        "directory": NewObject(stat.S_IFDIR | 0o750, 0, 0),
        "symlink": NewObject(stat.S_IFLNK | 0o777, 0, 0, target=b"somewhere"),
        "fifo": NewObject(stat.S_IFIFO | 0o600, 0, 0),
        "device": NewObject(stat.S_IFBLK | 0o600, 0, 0, device=os.makedev(7, 9)),
    }
    for (kind, new), uid, path in product(
        kinds.items(), (0, 9), (*FREE, "setgid/free", "acl/free")
    ):
        owned = new._replace(uid=uid, gid=uid, umask=0o027)
        yield Operation(
            f"create a {kind} of {uid} at {path}",
            lambda overlay, path=path, new=owned: overlay.create(*place(overlay, path), new),
            (_parent(path),),
        )
    for path in FREE:
        yield Operation(
            f"name an anonymous file {path}",
            lambda overlay, path=path: _name_anonymous(overlay, path),
            (path, _parent(path)),
        )
    for source, target in product(FILES, FREE):
        yield Operation(
            f"link {source} to {target}",
            lambda overlay, source=source, target=target: overlay.link(
                find(overlay, source), *place(overlay, target)
            ),
            (source, _parent(target)),
        )


def _name_anonymous(overlay: Overlay, path: str) -> None:
    parent, name = place(overlay, path)
    new = NewObject(stat.S_IFREG | 0o644, 9, 9)
    node, _, fd = overlay.create_anonymous(parent, new)
    syscalls.write(fd, DATA, 0)
    syscalls.fsync(fd)
    syscalls.close(fd)
    overlay.link(node, parent, name)


def _removals() -> Iterator[Operation]:
    for path in FILES:
        yield _unlink(path)
    for path in EMPTY_DIRECTORIES:
        yield Operation(
            f"rmdir {path}",
            lambda overlay, path=path: overlay.rmdir(*place(overlay, path)),
            (_parent(path),),
        )


def _unlink(path: str) -> Operation:
    return Operation(
        f"unlink {path}", lambda overlay: overlay.unlink(*place(overlay, path)), (_parent(path),)
    )


def _renames() -> Iterator[Operation]:
    sources = [
        *product(FILES, (*FREE, *FILES), (0,)),
        *product(DIRECTORIES, (*FREE, *EMPTY_DIRECTORIES), (0,)),
        *product((*FILES, *DIRECTORIES), FREE, (syscalls.RENAME_NOREPLACE,)),
    ]
    for source, target, flags in sources:
        if _apart(source, target):
            yield _rename(source, target, flags)


def _exchanges() -> Iterator[Operation]:
    for first, second in combinations((*FILES, *DIRECTORIES), 2):
        if _apart(first, second):
            yield _rename(first, second, syscalls.RENAME_EXCHANGE)


def _apart(first: str, second: str) -> bool:
    """Neither is the other, nor is in it, nor another name of it."""
    names = {first, second}
    if names in ({"hard", "lower/hard"}, {"indexed", "lower/indexed"}):
        return False
    return not (f"{first}/".startswith(f"{second}/") or f"{second}/".startswith(f"{first}/"))


def _rename(source: str, target: str, flags: int) -> Operation:
    verb = {0: "rename", syscalls.RENAME_NOREPLACE: "move", syscalls.RENAME_EXCHANGE: "exchange"}
    return Operation(
        f"{verb[flags]} {source} to {target}",
        lambda overlay: overlay.rename(place(overlay, source), place(overlay, target), flags),
        (_parent(target), _parent(source)),
        spare_whiteout=source if flags != syscalls.RENAME_EXCHANGE and target in HIDDEN else "",
    )
