"""What is told to systemd, and what is taken from it; the real one is in tests/system."""

from __future__ import annotations

import array
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sessiond.systemd import Systemd
from tests.support.waiting import BOUND


class Receiver:
    """The end at which systemd listens."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self._socket.settimeout(BOUND)

    def receive(self) -> tuple[list[str], list[int]]:
        """Return the assignments and the inodes of the descriptors of the next message."""
        message, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(64))
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        inodes = [os.fstat(descriptor).st_ino for descriptor in descriptors]
        for descriptor in descriptors:
            os.close(descriptor)
        return message.decode().split("\n"), inodes

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["{path}/notify", "@sessiond-{pid}"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    assert isinstance(request.param, str)
    return request.param.format(path=tmp_path, pid=os.getpid())


@pytest.fixture
def receiver(address: str) -> Iterator[Receiver]:
    receiver = Receiver(address)
    yield receiver
    receiver.close()


def from_systemd(address: str, **more: str) -> Systemd:
    return Systemd({"NOTIFY_SOCKET": address, "SYSTEMD_EXEC_PID": str(os.getpid()), **more})


def test_notifications(address: str, receiver: Receiver) -> None:
    systemd = from_systemd(address)
    systemd.ready("All is well.")
    assert receiver.receive() == (["READY=1", "STATUS=All is well."], [])
    systemd.reloading()
    reloading, now = receiver.receive()[0]
    assert reloading == "RELOADING=1"
    assert int(now.removeprefix("MONOTONIC_USEC=")) > 0
    systemd.stopping("Done.")
    assert receiver.receive() == (["STOPPING=1", "STATUS=Done."], [])


def test_descriptors_are_kept_by_name(address: str, receiver: Receiver, tmp_path: Path) -> None:
    store = from_systemd(address).descriptors
    with open(tmp_path / "file", "w") as file:
        inode = os.fstat(file.fileno()).st_ino
        store.keep("one", file.fileno())
        stored = ["FDSTORE=1", "FDNAME=one", "FDPOLL=0"]
        assert receiver.receive() == (stored, [inode])
        # Systemd would keep both.
        store.keep("one", file.fileno())
        assert receiver.receive() == (["FDSTOREREMOVE=1", "FDNAME=one"], [])
        assert receiver.receive() == (stored, [inode])
    store.drop("other")
    store.drop("one")
    store.drop("one")
    store.keep("last", 0)
    assert receiver.receive() == (["FDSTOREREMOVE=1", "FDNAME=one"], [])
    assert receiver.receive()[0][1] == "FDNAME=last"


def test_descriptors_are_inherited(address: str, receiver: Receiver) -> None:
    # In a child, where 3 and 4 are free to be what they have to be.
    code = """if True:
        import os
        from sessiond.systemd import Systemd
        os.environ["LISTEN_PID"] = os.environ["SYSTEMD_EXEC_PID"] = str(os.getpid())
        store = Systemd(os.environ).descriptors
        assert store.inherited == {"a": 3, "b-1": 5}, store.inherited
        assert os.read(3, 9) == b"first" and os.read(5, 9) == b"third"
        assert not os.get_inheritable(3) and not os.get_inheritable(5)
        try:
            os.fstat(4)
        except OSError:
            pass
        else:
            raise AssertionError("what was kept twice is open")
        assert not any(name.startswith("LISTEN") for name in os.environ)
        store.drop("b-1")
    """
    pid = os.fork()
    if pid == 0:
        try:
            for descriptor, text in ((3, b"first"), (4, b"second"), (5, b"third")):
                pipe, writing = os.pipe()
                os.write(writing, text)
                os.dup2(pipe, 10 + descriptor, inheritable=True)
            for descriptor in (3, 4, 5):
                os.dup2(10 + descriptor, descriptor, inheritable=True)
            environment = {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b-1:b-1"}
            python = [os.path.realpath("/proc/self/exe"), "-c", code]
            os.execve(
                python[0],
                python,
                os.environ
                | environment
                | {"NOTIFY_SOCKET": address, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            os._exit(127)
    assert os.waitpid(pid, 0)[1] == 0
    assert receiver.receive() == (["FDSTOREREMOVE=1", "FDNAME=b-1"], [])


def test_what_is_meant_for_another_process_is_not_taken(
    address: str, receiver: Receiver, tmp_path: Path
) -> None:
    environment = {
        "NOTIFY_SOCKET": address,
        "SYSTEMD_EXEC_PID": "999999999",
        "LISTEN_PID": "999999999",
        "LISTEN_FDS": "1",
        "WATCHDOG_PID": "999999999",
        "WATCHDOG_USEC": "1000",
    }
    systemd = Systemd(environment)
    assert systemd.descriptors.inherited == {}
    systemd.descriptors.keep("one", 0)
    systemd.ready("")
    assert receiver.receive()[0][0] == "READY=1"


async def test_the_watchdog_is_fed_for_as_long_as_the_loop_runs(
    address: str, receiver: Receiver
) -> None:
    systemd = from_systemd(address, WATCHDOG_USEC="1000", WATCHDOG_PID=str(os.getpid()))
    await from_systemd(address).feed_watchdog()  # nobody wants to know
    async with trio.open_nursery() as nursery:
        nursery.start_soon(systemd.feed_watchdog)
        for _ in range(3):
            assert await trio.to_thread.run_sync(receiver.receive) == (["WATCHDOG=1"], [])
        nursery.cancel_scope.cancel()


def test_without_systemd_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    systemd = Systemd({})
    systemd.ready("")
    systemd.descriptors.keep("one", 0)
    systemd.descriptors.drop("one")
    assert caplog.text == ""


def test_a_systemd_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from_systemd(f"{tmp_path}/none").ready("")
    assert "systemd could not be told READY=1" in caplog.text
