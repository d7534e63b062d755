"""Messages between the manager and a worker, over one SOCK_SEQPACKET socket for each session.

One request, one reply, in turn; a message is one packet of JSON. Descriptors travel beside the
packet. When the manager's end closes, the worker ends.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import trio
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MESSAGE_LIMIT = 1 << 18
"""Bytes; a stack of some hundred layers with long paths fits."""
_DESCRIPTORS_LIMIT = 4
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerStack(_Message):
    """Directories of the layers, topmost first."""

    upper: Path
    work: Path
    lowers: tuple[Path, ...]
    indexes: tuple[Path, ...] = ()
    """Of the lowers that were uppers once; those that do not exist are left out."""
    orphans: Path | None = None
    """Where files that were removed while they are open are kept; on the upper's file system."""
    former: Path | None = None
    """The same, of the storage from which the session moved to this one; it may be gone."""


class KeptLayers(_Message):
    """The upper of what outlives resets, over the bottom-most lower, and which paths that is."""

    upper: Path
    work: Path
    orphans: Path
    rules: tuple[str, ...]
    """As `sessiond.keep_rules.checked_rule` has them."""


class Start(_Message):
    """What a worker is told at its birth."""

    stack: LayerStack
    keep: KeptLayers | None = None
    data_path: str
    reachable: tuple[Path, ...]
    """All that the worker will see of the machine: layers swapped in later have to be there."""
    inherits: bool = False
    """Go on for a worker that has died, by its journal; serve `stack` in place of its layers."""


class Lowers(_Message):
    """Directories of layers that are only read, topmost first."""

    paths: tuple[Path, ...]
    indexes: tuple[Path, ...] = ()
    """As of a `LayerStack`."""


class Swap(_Message):
    """Serve another stack from now on. With the same upper, it lacks lowers that are empty."""

    kind: Literal["swap"] = "swap"
    stack: LayerStack
    moved: bool
    """The layers are copies of those served: files that are open go on in them."""
    held: bool = False
    """Refuse that unless changes are held back: it relies on what was found since they are."""
    retained: bool = False
    """The upper was filled by a `Retain`, since when changes were held back."""


class Halt(_Message):
    """Stop the programs of a cgroup at the next `Freeze` or `Swap`, before changes are held, if
    they write to files past the worker.

    They go on when layers have been exchanged, at a `Thaw`, and when nobody is there to ask for
    these. Descriptors: as `sessiond.cgroups.Freezer` takes them.
    """

    kind: Literal["halt"] = "halt"


class Freeze(_Message):
    """Hold changes back."""

    kind: Literal["freeze"] = "freeze"


class Thaw(_Message):
    """Let changes pass again."""

    kind: Literal["thaw"] = "thaw"


class Changes(_Message):
    """Count the differences between two states.

    It takes long, so the answer says only that it has begun. The outcome is another `Reply`, with
    `changes`, through the socket that comes along; if that closes without one, the worker has died.
    """

    kind: Literal["changes"] = "changes"
    start: Lowers | None = None
    """None: the bottom-most lower of what is served."""
    end: Lowers | None = None
    """None: what is served."""
    directories: Annotated[int, Field(ge=0, le=100)] = 0
    """Tell also what differs below so many directories, those with most of it."""
    depth: _Count = 0
    """And how many levels below the root these may be."""


class Diff(_Message):
    """Write the differences between two states to a pipe that does not block.

    The outcome comes as that of `Changes`. Descriptors: the socket for it, the pipe.
    """

    kind: Literal["diff"] = "diff"
    start: Lowers | None = None
    end: Lowers | None = None
    patience: float
    """Seconds for which the pipe may be full until the list is given up."""
    reader: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Tell also the text that has changed, as far as the user with that uid may read it."""


class MergeLayers(_Message):
    """Go on for a moment with moving what is in one lower to the next one below it."""

    kind: Literal["merge"] = "merge"
    top: Path
    bottom: Path


class Keep(_Message):
    """Have other rules for what outlives resets. Precondition: the worker began with some layers
    for that.
    """

    kind: Literal["keep"] = "keep"
    rules: tuple[str, ...]


class Discard(_Message):
    """Delete what is kept at paths that no rule names any more; the view does not show it."""

    kind: Literal["discard"] = "discard"
    paths: tuple[str, ...]
    """Absolute in the merged view."""


class Commit(_Message):
    """Copy what the merged view shows at paths to the layers of what outlives resets.

    Through the socket that comes along, replies with `copied` tell how far it is. One without says
    that a `Step` is awaited there: the first brings what has changed meanwhile, for which changes
    have to be held back from here to the `Keep` that follows; the second has the copies take their
    place. The next `Keep` makes that final if its rules name the paths, or undoes it. If the socket
    closes before the second, all that was copied is removed.
    """

    kind: Literal["commit"] = "commit"
    paths: tuple[str, ...]
    """Absolute in the merged view."""


class Retain(_Message):
    """Bring what the merged view shows at paths into an upper that is to be served next.

    Precondition: changes are held back. The outcome comes as that of `Changes`; if the socket for
    it closes before, it is given up.
    """

    kind: Literal["retain"] = "retain"
    paths: tuple[str, ...]
    """Absolute in the merged view."""
    upper: Path


class Step(_Message):
    """Go on with a `Commit`."""


class Sync(_Message):
    """Write the uppers back to disk, and before, what is still written to storage that was left.

    It may take long; the outcome comes as that of `Changes`.
    """

    kind: Literal["sync"] = "sync"


class Pending(_Message):
    """Say what is still written to, or held in, storage that the session has left."""

    kind: Literal["pending"] = "pending"


class Stop(_Message):
    """End. There is no reply: the socket closes."""

    kind: Literal["stop"] = "stop"


Request = Annotated[
    Swap
    | Halt
    | Freeze
    | Thaw
    | Changes
    | Diff
    | MergeLayers
    | Keep
    | Discard
    | Commit
    | Retain
    | Sync
    | Pending
    | Stop,
    Field(discriminator="kind"),
]


class LargeFile(_Message):
    """One that differs; of its path, bytes that are not UTF-8 are escaped."""

    path: str
    change: str
    size: _Count


class DirectoryCounts(_Message):
    """What differs below a directory, as `ChangeCounts`; its path as of a `LargeFile`."""

    path: str
    added: _Count
    changed: _Count
    deleted: _Count
    renamed: _Count
    bytes: _Count


class ChangeCounts(_Message):
    """How many objects differ, and the bytes in the regular files among them."""

    added: _Count = 0
    changed: _Count = 0
    deleted: _Count = 0
    renamed: _Count = 0
    bytes: _Count = 0
    largest: tuple[LargeFile, ...] = ()
    """Of these, largest first."""
    directories: tuple[DirectoryCounts, ...] = ()
    """Those that were asked for, largest first; fewer if their paths are very long."""


class PendingFile(_Message):
    """A file of which the disk has what it contained a moment ago."""

    path: str
    """In the merged view; what is not UTF-8 is escaped."""
    inode: _Count
    """Its number there."""


class PendingFiles(_Message):
    """What storage that a session has left is still needed for."""

    files: tuple[PendingFile, ...] = ()
    """Some of them, if they are very many."""
    count: _Count = 0
    """Of all."""
    in_use: bool = False
    """Something is there: one of these, or a file that was removed while it was open."""


class Copied(_Message):
    """How much of what is to be copied is, in bytes."""

    done: _Count
    total: _Count


class Reply(_Message):
    """The answer to a request; also sent once unasked, when the worker is ready or cannot be."""

    error: str | None = None
    errno: int = 0
    """Of the system call that failed; 0 without error, or if it was none."""
    changes: ChangeCounts | None = None
    pending: PendingFiles | None = None
    copied: Copied | None = None
    inexact: tuple[str, ...] = ()
    """Of a swap: see `Mount.swap`; what is not UTF-8 is escaped."""
    worker: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Process id, when it is ready."""
    data_path: str | None = None
    """The one in use, when it is ready."""
    stack: LayerStack | None = None
    """What it serves, when it is ready."""
    merging: Literal["more", "done", "never"] | None = None
    """How far a merge of layers is."""
    obstacle: str | None = None
    """Why they cannot be merged."""
    frozen: bool = False
    """Whether it holds changes back, when another manager finds it."""


def failure(error: OSError) -> Reply:
    """Return the answer to a request that has failed, in words for people."""
    # Calls with a descriptor have its number for a name.
    named = isinstance(error.filename, str | bytes)
    text = f"{os.fsdecode(error.filename) + ': ' if named else ''}{error.strerror or error}"
    # A name that is not UTF-8 has no place in JSON.
    printable = text.encode(errors="backslashreplace").decode()
    return Reply(error=printable, errno=error.errno or 0)


_requests: TypeAdapter[Request] = TypeAdapter(Request)


def parse_request(packet: bytes) -> Request:
    """Raises pydantic's ValidationError."""
    return _requests.validate_json(packet)


async def send(
    channel: trio.socket.SocketType, message: BaseModel, descriptors: Sequence[int] = ()
) -> None:
    """Send one message. Raises OSError when the other end is gone."""
    packet = message.model_dump_json().encode()
    if len(packet) > MESSAGE_LIMIT:
        raise OSError(f"control message of {len(packet)} bytes exceeds {MESSAGE_LIMIT}")
    ancillary = []
    if descriptors:
        rights = array.array("i", descriptors).tobytes()
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
    await channel.sendmsg([packet], ancillary)


async def receive(channel: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors; an empty packet when the other end is gone."""
    size = socket.CMSG_SPACE(_DESCRIPTORS_LIMIT * array.array("i").itemsize)
    try:
        packet, ancillary, flags, _ = await channel.recvmsg(
            MESSAGE_LIMIT, size, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return b"", []
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in descriptors:
            os.close(fd)
        raise OSError("truncated control message")
    return packet, list(descriptors)


def hung_up(channel: trio.socket.SocketType) -> bool:
    """Say whether nobody waits for an outcome any more."""
    poll = select.poll()
    poll.register(channel.fileno(), 0)
    return bool(poll.poll(0))
