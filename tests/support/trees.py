"""Trees of files: built from a compact description, merged as an overlay would, compared as values.

A tree is a mapping of names to nodes; ``bytes`` stand for a file, a mapping for a directory::

    build({"etc": {"hosts": b"::1 localhost\n"}, "run": Symlink("/run")}, path)

Names are `str`; bytes that are not UTF-8 come as surrogate escapes, as from `os.fsdecode`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

MTIME_NS = 1_234_567_890_123_456_789
"""Modification and access time of nodes that name none: past, with all nine digits in use."""

_BLOCK = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What all files have. Times are in nanoseconds; xattrs include ``system.posix_acl_*``."""

    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = MTIME_NS
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class File(Node):
    """A regular file: `hole` bytes that take no space, then `content`."""

    content: bytes = b""
    hole: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Dir(Node):
    """A directory; an opaque one, in a layer, hides what the layers below have in its place."""

    entries: Tree = field(default_factory=dict)
    mode: int = field(default=0o755, kw_only=True)
    opaque: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class Symlink(Node):
    """A symbolic link. Its mode is always 0777."""

    target: str


@dataclass(frozen=True, slots=True, eq=False)
class Device(Node):
    """A device node; `kind` is `stat.S_IFCHR` or `stat.S_IFBLK`."""

    kind: int
    major: int
    minor: int


@dataclass(frozen=True, slots=True, eq=False)
class Fifo(Node):
    """A named pipe."""


@dataclass(frozen=True, slots=True, eq=False)
class Socket(Node):
    """A bound socket that nobody listens on."""


@dataclass(frozen=True, slots=True, eq=False)
class Whiteout(Node):
    """In a layer: hides the name in the layers below."""


@dataclass(frozen=True, slots=True, eq=False)
class Link(Node):
    """A hard link to the file of another path, which is relative to the root of the tree."""

    path: str


Tree: TypeAlias = "Mapping[str, Node | bytes | Tree]"

FlatTree: TypeAlias = dict[str, Node]
"""Paths from the root, parents first; hard links are paths of one and the same node object."""


def acl(*entries: tuple[str, int | None, int]) -> bytes:
    """Return a POSIX ACL as the value of ``system.posix_acl_access`` or ``…_default``.

    Each entry is a tag (``u``, ``g``, ``m`` or ``o``), an id or None for the owner, and a mode.
    """
    tags = {
        ("u", False): 1,
        ("u", True): 2,
        ("g", False): 4,
        ("g", True): 8,
        ("m", False): 16,
        ("o", False): 32,
    }
    packed = [
        struct.pack("<HHI", tags[tag, who is not None], mode, 0xFFFFFFFF if who is None else who)
        for tag, who, mode in entries
    ]
    return struct.pack("<I", 2) + b"".join(packed)


def flatten(tree: Tree) -> FlatTree:
    """Return every node by its path, with hard links resolved; the root is not among them."""
    flat = dict(_walk(tree, ""))
    for path, node in flat.items():
        while isinstance(node, Link):
            node = flat[node.path]
        flat[path] = node
    return flat


def _walk(tree: Tree, parent: str) -> Iterator[tuple[str, Node]]:
    for name, value in tree.items():
        node = _node(value)
        yield parent + name, node
        if isinstance(node, Dir):
            yield from _walk(node.entries, f"{parent}{name}/")


def _node(value: Node | bytes | Tree) -> Node:
    """Return a node of this path alone: one constant may describe several files."""
    if isinstance(value, Node):
        return replace(value)
    return File(value) if isinstance(value, bytes) else Dir(value)


def merge(*layers: Tree) -> FlatTree:
    """Return what an overlay of `layers`, topmost first, shows."""
    merged: FlatTree = {}
    for layer in reversed(layers):
        for path, node in flatten(layer).items():
            old = merged.get(path)
            if not (isinstance(old, Dir) and isinstance(node, Dir)) or node.opaque:
                _remove(merged, path)
            if isinstance(node, Dir):
                merged[path] = replace(node, opaque=False)
            elif not isinstance(node, Whiteout):
                merged[path] = node
    return dict(sorted(merged.items()))


def _remove(tree: FlatTree, path: str) -> None:
    for name in [name for name in tree if name == path or name.startswith(f"{path}/")]:
        del tree[name]


def build(tree: Tree, root: str, *, xattr_namespace: str = "trusted") -> None:
    """Create `tree` in the existing directory `root`.

    Layers keep overlay's marks in `xattr_namespace`. The root's own time becomes `MTIME_NS`.
    Raises `OSError`.
    """
    build_flat(flatten(tree), root, xattr_namespace=xattr_namespace)


def build_flat(tree: FlatTree, root: str, *, xattr_namespace: str = "trusted") -> None:
    """The same for a tree that is flat already, as from `merge`."""
    made: dict[int, str] = {}
    for path, node in tree.items():
        target = f"{root}/{path}"
        if first := made.get(id(node)):
            os.link(first, target, follow_symlinks=False)
            continue
        made[id(node)] = target
        _create(node, target)
        _describe(node, target, xattr_namespace)
    for path, node in reversed(tree.items()):
        os.utime(f"{root}/{path}", ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)
    os.utime(root, ns=(MTIME_NS, MTIME_NS))


def _create(node: Node, path: str) -> None:
    match node:
        case File(content=content, hole=hole):
            with open(path, "xb", buffering=0) as file:
                os.truncate(path, hole + len(content))
                os.pwrite(file.fileno(), content, hole)
        case Dir():
            os.mkdir(path)
        case Symlink(target=target):
            os.symlink(target, path)
        case Device(kind=kind, major=major, minor=minor):
            os.mknod(path, kind, os.makedev(major, minor))
        case Fifo():
            os.mkfifo(path)
        case Socket():
            bind_socket(path)
        case Whiteout():
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        case _:
            raise AssertionError(f"{path} is no node that can be created: {node!r}")


def bind_socket(path: str) -> None:
    """Leave a socket at `path`, which may be longer than the 107 bytes of a socket's address."""
    parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{parent}/{os.path.basename(path)}")
    finally:
        os.close(parent)


def _describe(node: Node, path: str, xattr_namespace: str) -> None:
    os.chown(path, node.uid, node.gid, follow_symlinks=False)
    if not isinstance(node, Symlink):
        os.chmod(path, node.mode)
    for name, value in node.xattrs.items():
        os.setxattr(path, name, value, follow_symlinks=False)
    if isinstance(node, Dir) and node.opaque:
        os.setxattr(path, f"{xattr_namespace}.overlay.opaque", b"y")


class Entry(NamedTuple):
    """What is compared of one file. Of directories, neither sizes nor link counts mean anything."""

    kind: str
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    digest: str
    target: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[bytes, ...]
    """All paths of the tree that are this file, where there are several."""
    nlink: int


Snapshot: TypeAlias = dict[bytes, Entry]
"""Entries by their path from the root, which itself is ``b"."``."""

RECENT = -1
"""Stands for a time of modification that is no earlier than asked for."""

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def snapshot(root: str, *, recent_ns: int | None = None) -> Snapshot:
    """Read the tree, or the single file, at `root` as a value.

    Times at or after `recent_ns` become `RECENT`: trees that were changed one after another can
    then be compared by whether, not when. Xattrs are all those that the file system lists.
    """
    top = os.fsencode(root)
    entries: Snapshot = {}
    inodes: dict[tuple[int, int], list[bytes]] = {}
    for path in _paths(top, b"."):
        full = top if path == b"." else top + b"/" + path
        status = os.lstat(full)
        entries[path] = _entry(full, status, recent_ns)
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            inodes.setdefault((status.st_dev, status.st_ino), []).append(path)
    for paths in inodes.values():
        for path in paths:
            entries[path] = entries[path]._replace(links=tuple(sorted(paths)))
    return entries


def _paths(top: bytes, path: bytes) -> Iterator[bytes]:
    yield path
    if path == b"." and not os.path.isdir(top):
        return
    with os.scandir(top + b"/" + path) as listing:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing)
    for name, is_directory in found:
        child = name if path == b"." else path + b"/" + name
        if is_directory:
            yield from _paths(top, child)
        else:
            yield child


def _entry(path: bytes, status: os.stat_result, recent_ns: int | None) -> Entry:
    regular, directory = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
    recent = recent_ns is not None and status.st_mtime_ns >= recent_ns
    names = _xattr_names(path)
    return Entry(
        kind=KINDS[stat.S_IFMT(status.st_mode)],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        rdev=status.st_rdev,
        size=0 if directory else status.st_size,
        mtime_ns=RECENT if recent else status.st_mtime_ns,
        digest=digest(path) if regular else "",
        target=os.readlink(path) if stat.S_ISLNK(status.st_mode) else b"",
        xattrs=tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names),
        links=(),
        nlink=0 if directory else status.st_nlink,
    )


def _xattr_names(path: bytes) -> list[str]:
    try:
        return sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # a squashfs without any, for one
            return []
        raise


def digest(path: bytes | str) -> str:
    """Return a digest of a file's contents, to which holes and zeros are the same."""
    summary = hashlib.blake2b(digest_size=8)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: from here to the end it is all hole
                break
            position -= position % _BLOCK
            _update(summary, position, os.pread(file.fileno(), _BLOCK, position))
            position += _BLOCK
    return summary.hexdigest()


def digest_of(content: bytes) -> str:
    """Return the `digest` of a file with that content."""
    summary = hashlib.blake2b(digest_size=8)
    for position in range(0, len(content), _BLOCK):
        _update(summary, position, content[position : position + _BLOCK])
    return summary.hexdigest()


def _update(summary: hashlib.blake2b, position: int, block: bytes) -> None:
    if block.strip(b"\0"):
        summary.update(struct.pack("<QQ", position, len(block)) + block)


def diff(expected: Snapshot, found: Snapshot) -> str:
    """Return a line for each path and fact in which the trees differ; empty if they do not."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        name = os.fsdecode(path)
        if path not in found:
            lines.append(f"{name!r}: missing, a {expected[path].kind}")
        elif path not in expected:
            lines.append(f"{name!r}: too much, a {found[path].kind}")
        else:
            lines += [
                f"{name!r}: {fact} is {_shown(fact, is_)}, expected {_shown(fact, want)}"
                for fact, want, is_ in zip(Entry._fields, expected[path], found[path], strict=True)
                if want != is_
            ]
    return "\n".join(lines)


def _shown(fact: str, value: object) -> str:
    show: Mapping[str, Callable[[object], str]] = {"mode": lambda value: f"{value:04o}"}
    return show.get(fact, repr)(value)


def assert_same(expected: Snapshot, found: Snapshot, what: str = "the trees differ") -> None:
    """Fail with `what` and the differences unless the trees are the same."""
    differences = diff(expected, found)
    assert not differences, f"{what}:\n{differences}"
