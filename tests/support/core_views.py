"""The merged view as the core shows it, as a value; no mount, no FUSE."""

from __future__ import annotations

import os
import stat as modes

from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from tests.support import trees
from tests.support.trees import Entry, Snapshot

_WHOLE = 1 << 30


def find(overlay: Overlay, path: str) -> Node:
    """Return the node of a path from the root, which is ``""``. Raises `OSError`."""
    node = overlay.view.root
    for name in filter(None, path.split("/")):
        node, _ = overlay.view.lookup(node, os.fsencode(name))
    return node


def contents(overlay: Overlay, node: Node) -> bytes:
    """Return the contents of a regular file."""
    overlay.open_file(node, write=False)
    try:
        return overlay.read(node, _WHOLE, 0)
    finally:
        overlay.release_file(node)


def snapshot(overlay: Overlay, *, recent_ns: int) -> Snapshot:
    """Read the whole merged view, as `trees.snapshot` would through a mount."""
    entries: Snapshot = {}
    names: dict[int, list[bytes]] = {}
    pending = [(b".", overlay.view.root)]
    while pending:
        path, node = pending.pop()
        overlay.view.refer(node)  # so that names of one file are found to be of one node
        entries[path] = entry = _entry(overlay, node, recent_ns)
        if entry.nlink > 1:
            names.setdefault(node.number, []).append(path)
        if node.is_directory:
            for name in overlay.names(node):
                child, _ = overlay.view.lookup(node, name)
                pending.append((name if path == b"." else path + b"/" + name, child))
    for paths in names.values():
        for path in paths:
            entries[path] = entries[path]._replace(links=tuple(sorted(paths)))
    return entries


def _entry(overlay: Overlay, node: Node, recent_ns: int) -> Entry:
    stat = overlay.view.stat(node)
    regular, directory = modes.S_ISREG(stat.st_mode), modes.S_ISDIR(stat.st_mode)
    recent = stat.st_mtime_ns >= recent_ns
    digest = trees.digest_of(contents(overlay, node)) if regular else ""
    xattrs = sorted(overlay.listxattr(node))
    return Entry(
        kind=trees.KINDS[modes.S_IFMT(stat.st_mode)],
        mode=modes.S_IMODE(stat.st_mode),
        uid=stat.st_uid,
        gid=stat.st_gid,
        rdev=stat.st_rdev,
        size=0 if directory else stat.st_size,
        mtime_ns=trees.RECENT if recent else stat.st_mtime_ns,
        digest=digest,
        target=overlay.readlink(node) if modes.S_ISLNK(stat.st_mode) else b"",
        xattrs=tuple((os.fsdecode(name), overlay.getxattr(node, name)) for name in xattrs),
        links=(),
        nlink=0 if directory else overlay.view.link_count(node, stat),
    )
