"""Lists of changes that nobody reads, or whose worker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest
import trio

from sessiond.bus import client
from sessiond.bus.client import Client
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.errors import Failed
from tests.support.daemon import Daemon
from tests.support.waiting import BOUND, until

MANY_FILES = "cd /home; seq 1 1000 | sed s/^/a-rather-long-name-to-fill-the-pipe-/ | xargs touch"


@pytest.fixture
def session(daemon: Daemon) -> str:
    """One that differs from its image by more than a pipe holds."""
    daemon.sessionctl("create", "root", "machine", "--id", "one")
    daemon.run("one", MANY_FILES)
    return "one"


@pytest.fixture
async def sessiond(daemon: Daemon) -> AsyncIterator[Client]:
    async with client.connect(daemon.environment[ADDRESS_VARIABLE]) as connected:
        yield connected


async def test_lists_that_are_not_read(daemon: Daemon, session: str, sessiond: Client) -> None:
    """Nothing waits for them: no reset, no counting, and closing least of all."""
    unread = [
        trio.lowlevel.FdStream(descriptor)
        for _ in range(12)
        for descriptor in await (await sessiond.session(session))._call("OpenDiff", "a{sv}", {})
        if isinstance(descriptor, int)
    ]
    assert (await (await sessiond.session(session)).changes()).added >= 1000
    await (await (await sessiond.session(session)).reset()).wait()
    assert daemon.differences(session) == {}
    (worker,) = daemon.workers()
    ended = os.pidfd_open(worker)
    await (await sessiond.session(session)).close()
    with trio.fail_after(BOUND):
        await trio.lowlevel.wait_readable(ended)  # each thread: one would go on if somebody reads
    os.close(ended)
    for stream in unread:
        listed = b""
        async with stream:
            async for part in stream:
                listed += part
        assert b'"complete"' not in listed


async def test_a_reset_while_a_list_is_read(daemon: Daemon, session: str, sessiond: Client) -> None:
    """It is of what was there before, all of it; the reset does not wait, nor do later lists."""
    asked = await sessiond.session(session)
    async with asked.diff() as differences:
        await anext(differences)
        await (await asked.reset()).wait()
        assert daemon.differences(session) == {}
        assert len([one async for one in differences]) >= 999  # and the first
    layers = daemon.runtime / "sessions" / session / "storage/layers"
    await until(lambda: len(list(layers.iterdir())) == 1)


async def test_a_manager_that_dies_while_a_list_is_read(
    daemon: Daemon, session: str, sessiond: Client
) -> None:
    """The next deletes layers without knowing of the list, which does not end as if it was all."""
    (reader,) = [
        descriptor
        for descriptor in await (await sessiond.session(session))._call("OpenDiff", "a{sv}", {})
        if isinstance(descriptor, int)
    ]
    async with trio.lowlevel.FdStream(reader) as stream:
        listed = await stream.receive_some(1)
        daemon.kill()
        daemon.start()
        daemon.sessionctl("reset", session)
        async for part in stream:
            listed += part
    assert listed.count(b"\n") > 0
    assert b'"complete"' not in listed


async def test_a_list_whose_worker_dies(daemon: Daemon, session: str, sessiond: Client) -> None:
    async with (await sessiond.session(session)).diff() as differences:
        await anext(differences)
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(Failed, match="ends early"):
            async for _ in differences:
                pass
    assert len(daemon.differences(session)) >= 1000
    await until(lambda: "the list of changes ends early" in daemon.log())
