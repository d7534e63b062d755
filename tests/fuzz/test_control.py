"""The manager and a worker, each facing another that talks nonsense."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from sessiond import control
from sessiond.control import (
    ChangeCounts,
    Changes,
    Diff,
    Freeze,
    Halt,
    LayerStack,
    Pending,
    PendingFile,
    PendingFiles,
    Reply,
    Stop,
    Swap,
    Sync,
    Thaw,
)
from sessiond.errors import SessiondError
from sessiond.fuse import layers as opened
from sessiond.fuse.controlled import Controlled
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.operations import OverlayOperations
from sessiond.fuse.sandbox import Sandbox
from sessiond.fuse.spawner import Spawner
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import StackOptions
from sessiond.session.model import DataPath, SessionId, Stack, UpperDirectories
from sessiond.session.mounter import MountRequest
from tests.support import waiting
from tests.support.fuzzing import damaged, fuzz, json_values, mistaken

# Relative, and never one of the machine's own directories: the worker would make them its upper.
_STACK = LayerStack(upper=Path("upper"), work=Path("work"), lowers=(Path("lower"),))
_OTHER = LayerStack(
    upper=Path("next"),
    work=Path("next-work"),
    lowers=(Path("upper"), Path("lower")),
    orphans=Path("orphans"),
)
_REQUESTS = [
    message.model_dump_json().encode()
    for message in (
        Swap(stack=_OTHER, moved=False),
        Swap(stack=_STACK, moved=True),
        Halt(),
        Freeze(),
        Thaw(),
        Changes(),
        Diff(patience=1.0),
        Sync(),
        Pending(),
        Stop(),
    )
]
_PATHS = st.sampled_from(
    ["upper", "next", "next-work", "lower", "missing", "file", "a\0b", "\udcff", "x" * 300, ""]
)
_PACKETS = (
    st.binary(max_size=40)
    | st.sampled_from(_REQUESTS).flatmap(damaged)
    | st.sampled_from(_REQUESTS).flatmap(
        lambda request: mistaken(request, json_values(_PATHS) | _PATHS)
    )
    | st.sampled_from(_REQUESTS)
)
_FREEZE, _THAW, _DIFF = (
    message.model_dump_json().encode() for message in (Freeze(), Thaw(), Diff(patience=1.0))
)
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_TOO_LONG = b"x" * (control.MESSAGE_LIMIT + 1)


def _swap(**paths: object) -> bytes:
    stack = _OTHER.model_dump(mode="json") | paths
    return json.dumps({"kind": "swap", "stack": stack, "moved": False}).encode()


def _harmless(packet: bytes) -> bytes:
    """Leave out of a packet what could name a directory of the machine's."""
    return packet.replace(b"/", b"_").replace(b"\\u002", b"_").replace(b'"."', b'"_"')


class _Peer:
    """The manager's end of a worker's socket; another manager where the worker hangs up."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = trio.socket.from_stdlib_socket(channel)

    async def report(self) -> Reply:
        packet, descriptors = await control.receive(self._channel)
        for descriptor in descriptors:
            os.close(descriptor)
        return Reply.model_validate_json(packet)

    async def ask(self, packet: bytes, descriptors: Sequence[int]) -> None:
        """Send a packet; it is answered, or else the next manager is let in."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        await self._channel.sendmsg([packet], rights if descriptors else [])
        answer, _ = await control.receive(self._channel)
        if answer:
            Reply.model_validate_json(answer)
            return
        self._channel.close()
        self._channel = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        await self._channel.connect("listener")
        await self.report()

    async def stop(self) -> None:
        await control.send(self._channel, Stop())

    def close(self) -> None:
        self._channel.close()


@asynccontextmanager
async def _worker() -> AsyncIterator[_Peer]:
    """Run a worker's side in this process, over the directories of `_STACK`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 4 * control.MESSAGE_LIMIT)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Path("listener").unlink(missing_ok=True)
    listener.bind("listener")
    listener.listen(1)
    operations = OverlayOperations(Overlay(opened.open_stack(_STACK, StackOptions())))
    peer = _Peer(ours)
    connection = os.open("/dev/null", os.O_RDONLY)
    others = trio.socket.from_stdlib_socket(listener)
    with others, closing(peer), closing(operations.overlay):
        async with trio.open_nursery() as nursery:
            controlled = Controlled(
                operations, _STACK, connection, connection, nursery, Sandbox(())
            )
            nursery.start_soon(
                controlled.run,
                trio.socket.from_stdlib_socket(theirs),
                others,
            )
            await peer.report()
            yield peer
    os.close(connection)


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a directory with layers, of which relative paths cannot lead out by mistake."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for name in ("upper", "work", "lower", "next", "next-work"):
        Path(name).mkdir()
    (Path("lower") / "file").write_text("contents")
    Path("file").touch()
    yield
    for orphans in opened._orphans.values():
        orphans.close()
    opened._orphans.clear()


def _is_stop(packet: bytes) -> bool:
    try:
        return isinstance(control.parse_request(packet), Stop)
    except ValidationError:
        return False


def _open_descriptors() -> int:
    """How many there are, but for those of directories of orphans, which a worker keeps."""
    return len(os.listdir("/proc/self/fd")) - len(opened._orphans)


@pytest.mark.root
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a worker's end closes them
@given(st.lists(st.tuples(_PACKETS, st.integers(0, 3)), max_size=8))
@example([(_TOO_LONG, 2), (b"", 1), (b"{}", 253), (_FREEZE, 0), (b"null", 4), (_THAW, 5)])
@example([(_DIFF, 0), (_DIFF, 2), (_DIFF, 1)])
@example([(_swap(orphans="file"), 0), (_swap(orphans="missing/orphans"), 0)])
@example([(_swap(upper="a\0b"), 0), (_swap(lowers=[]), 0), (_swap(lowers=["file"]), 0)])
@fuzz(40)
async def test_a_worker_outlives_any_manager(
    layers: None, packets: list[tuple[bytes, int]]
) -> None:
    before = _open_descriptors()
    target = os.open("/dev/null", os.O_WRONLY)
    async with _worker() as peer:
        for packet, descriptors in packets:
            if not _is_stop(packet):
                await peer.ask(_harmless(packet), [target] * descriptors)
        await peer.ask(_THAW, [])
        await peer.stop()
    os.close(target)
    await waiting.until(lambda: _open_descriptors() == before)


def test_an_error_is_told_whatever_it_is_about() -> None:
    """A name that is not UTF-8, or the number of a descriptor, as listings of directories have."""
    for name in (b"\xff", "\udcff", 7):
        reply = control.failure(OSError(errno.EIO, os.strerror(errno.EIO), name))
        assert Reply.model_validate_json(reply.model_dump_json()).errno == errno.EIO


_REQUEST = MountRequest(
    session=SessionId("session"),
    mount_point=Path("mount-point"),
    stack=Stack(UpperDirectories(fs=Path("upper"), work=Path("work")), lowers=(Path("lower"),)),
    nosuid=True,
    nodev=True,
    data_path=DataPath.PLAIN,
    reachable=(),
)
_REPLIES = [
    reply.model_dump_json().encode()
    for reply in (
        Reply(),
        Reply(error="full", errno=errno.ENOSPC),
        Reply(changes=ChangeCounts(added=1)),
        Reply(pending=PendingFiles(files=(PendingFile(path="/file", inode=7),), count=1)),
        Reply(worker=os.getpid(), data_path="plain", stack=_STACK),
        Reply(worker=os.getpid(), data_path="plain", stack=_OTHER, frozen=True),
    )
]
_ANSWERS = (
    st.binary(max_size=40)
    | st.sampled_from(_REPLIES).flatmap(damaged)
    | st.sampled_from(_REPLIES).flatmap(lambda reply: mistaken(reply, json_values(_PATHS)))
)


def _reply_with(**fields: object) -> bytes:
    return json.dumps(fields).encode()


async def _no_worker(_session: SessionId) -> None:
    pass


@given(_ANSWERS, st.integers(0, 3))
@example(_TOO_LONG, 1)
@example(b"{}", 5)
@example(_reply_with(changes={"added": -1}), 0)
@example(_reply_with(changes={"bytes": 2**64}), 0)
@fuzz(60)
async def test_a_manager_outlives_any_answer(packet: bytes, descriptors: int) -> None:
    before = _open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 4 * control.MESSAGE_LIMIT)
    device, journal = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
    mount = FuseMount(_REQUEST, Spawner(theirs), device, journal, Path("address"), _no_worker)
    await mount.attach(trio.socket.from_stdlib_socket(ours), Reply(worker=os.getpid()))
    socket.send_fds(theirs, [packet], [theirs.fileno()] * descriptors)
    try:
        await mount.pending()
    except SessiondError as error:
        str(error).encode()
    await mount.abandon()
    theirs.close()
    assert _open_descriptors() == before


@pytest.mark.root
@given(_ANSWERS, st.integers(0, 4))
@example(_REPLIES[3], 1)
@example(_REPLIES[3], 3)
@example(b"nonsense", 2)
@example(_reply_with(worker=2**40), 2)
@example(_reply_with(worker=0), 2)
@fuzz(40)
async def test_what_is_found_at_the_socket_of_a_session_is_a_worker_or_nothing(
    layers: None, packet: bytes, descriptors: int
) -> None:
    before = _open_descriptors()
    Path("session").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("session")
        listener.listen(1)
        mounter = FuseMounter(Spawner(listener), Path())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_report_and_go, listener, packet, descriptors)
            mount = await mounter.adopt(_REQUEST)
        if mount is not None:
            await mount.abandon()
    assert _open_descriptors() == before


async def _report_and_go(listener: socket.socket, packet: bytes, descriptors: int) -> None:
    channel, _ = await trio.to_thread.run_sync(listener.accept)
    with channel, open("/dev/null", "rb") as file:
        socket.send_fds(channel, [packet], [file.fileno()] * descriptors)
