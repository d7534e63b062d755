"""Two states of a session compared, for whoever asked: counted, or listed into a pipe.

Runs in threads of the worker, beside everything else, on stacks of its own.
"""

from __future__ import annotations

import json
import os
import select
import stat as modes
from collections.abc import Callable, Iterator
from contextlib import suppress

from sessiond.control import MESSAGE_LIMIT, ChangeCounts, DirectoryCounts, LargeFile
from sessiond.fuse.contents import Contents
from sessiond.overlay.by_directory import ByDirectory
from sessiond.overlay.diff import Change, ChangeKind, changes
from sessiond.overlay.stack import Stack
from sessiond.overlay.tally import Sums, sums_of

_CHANGED = (ChangeKind.CONTENTS, ChangeKind.METADATA, ChangeKind.TYPE)
_TYPES = {modes.S_IFREG: "file", modes.S_IFDIR: "directory", modes.S_IFLNK: "symlink"}
_BUFFER = 1 << 16
_PATHS_LIMIT = MESSAGE_LIMIT // 8
"""Bytes of the paths of directories in one message, where a byte may become six."""
_COMPLETE = json.dumps({"complete": True}).encode() + b"\n"


def count(stack: Stack, base: Stack, by_directory: ByDirectory | None = None) -> ChangeCounts:
    """Count the changes from `base` to `stack`, and close both. Raises `OSError`."""
    try:
        return told(sums_of(changes(stack, base), by_directory))
    finally:
        stack.close()
        base.close()


def told(sums: Sums) -> ChangeCounts:
    """Return sums as they are sent."""
    return ChangeCounts(
        added=sums.of(ChangeKind.ADDED),
        changed=sums.of(*_CHANGED),
        deleted=sums.of(ChangeKind.DELETED),
        renamed=sums.of(ChangeKind.RENAMED),
        bytes=sums.bytes,
        largest=tuple(
            LargeFile(path=_printable(path), change=kind.value, size=size)
            for path, kind, size in sums.largest
        ),
        directories=tuple(_told_below(sums)),
    )


def _told_below(sums: Sums) -> Iterator[DirectoryCounts]:
    size = 0
    for one in sums.directories:
        size += len(one.path)
        if size > _PATHS_LIMIT:
            return
        below = Sums(one.kinds, one.bytes, ())
        yield DirectoryCounts(
            path=_printable(one.path),
            added=below.of(ChangeKind.ADDED),
            changed=below.of(*_CHANGED),
            deleted=below.of(ChangeKind.DELETED),
            renamed=below.of(ChangeKind.RENAMED),
            bytes=below.bytes,
        )


def _printable(path: bytes) -> str:
    """Return a path without what is not UTF-8, which has no place in JSON."""
    return "/" + path.decode(errors="backslashreplace")


def write_list(
    stack: Stack,
    base: Stack,
    target: int,
    patience: float,
    is_left: Callable[[], bool],
    reader: int | None = None,
) -> None:
    """Write the changes from `base` to `stack` as JSON lines, then that this was all; close all.

    `reader`: with the text that has changed, as far as the user with that uid may read it.
    `is_left`: whether nobody takes care any more that layers stay; then it may not have been all.
    `target`: the end of a pipe that does not block. A reader that hangs up ends the list. Raises
    `TimeoutError` when there was no room for more for `patience` seconds, `OSError`.
    """
    try:
        lines = bytearray()
        contents = None if reader is None else Contents(stack, base, reader)
        for change in changes(stack, base):
            lines += _line(change, contents)
            if len(lines) >= _BUFFER:
                _write(target, lines, patience)
                lines.clear()
        _write(target, lines if is_left() else lines + _COMPLETE, patience)
    except BrokenPipeError:
        return
    finally:
        os.close(target)
        stack.close()
        base.close()


def _write(target: int, lines: bytearray, patience: float) -> None:
    room = select.poll()
    room.register(target, select.POLLOUT)
    written = 0
    while written < len(lines):
        if not room.poll(patience * 1000):
            raise TimeoutError(
                f"nothing of the list of changes was read for {patience:g} seconds; it is given up"
            )
        with suppress(BlockingIOError):  # root, who can open the pipe as well, was faster
            written += os.write(target, lines[written:])


def _line(change: Change, contents: Contents | None) -> bytes:
    fields: dict[str, str | int | dict[str, str]] = {
        "path": _text(change.path),
        "kind": change.kind.value,
        "type": _TYPES.get(modes.S_IFMT(change.mode), "other"),
        "size": change.size,
        "old_size": change.old_size,
    }
    if change.source is not None:
        fields["from"] = _text(change.source)
    if change.also is not None:
        fields["changed"] = change.also.value
    if contents is not None and (text := contents.of(change)) is not None:
        fields["content"] = text
    return json.dumps(fields).encode() + b"\n"


def _text(path: bytes) -> str:
    return os.fsdecode(b"/" + path)
