"""What a worker, once it serves, cannot do any more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sessiond.fuse import sandbox
from sessiond.session.model import Stack, UpperDirectories
from tests.fuse.conftest import Playground
from tests.support.sessiond_overlay import COMMAND, REPOSITORY

_ATTEMPTS = """
import ctypes, errno, json, os, signal, socket, sys, threading
from pathlib import Path
from sessiond.fuse import sandbox

libc = ctypes.CDLL(None, use_errno=True)
init = os.open("/proc/1/ns/mnt", os.O_RDONLY)

def call(name, *arguments):
    number = getattr(getattr(sandbox, name, None) or sandbox.FORBIDDEN[name], os.uname().machine)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

attempts = {
    "read a file elsewhere": lambda: open("/etc/passwd"),
    "change a file elsewhere": lambda: os.chmod("/etc/passwd", 0o644),
    "follow dots": lambda: open(directory + "/../../../../../../etc/passwd"),
    "read another's memory": lambda: open("/proc/1/mem"),
    "change the kernel": lambda: open("/proc/sys/kernel/core_pattern", "w"),
    "execute": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
    "signal another": lambda: os.kill(1, 0),
    "signal another's thread": lambda: call("_TGKILL", 1, 1, 0),
    "trace": lambda: call("ptrace", 16, 1, 0, 0),
    "open a socket": lambda: socket.socket(socket.AF_INET),
    "mount": lambda: call("mount", b"x", b"/", b"tmpfs", 0, 0),
    "enter a namespace": lambda: call("setns", init, 0),
    "make a namespace": lambda: call("unshare", 0x20000),
    "make a process in a namespace": lambda: call("_CLONE", 0x10000011, 0, 0, 0, 0),
    "change the root": lambda: os.chroot(directory),
    "load a program into the kernel": lambda: call("bpf", 0, 0, 0),
    "write what it imports": lambda: open(sandbox.__file__, "a"),
    "read its layers": lambda: open(directory + "/file"),
    "write its layers": lambda: open(directory + "/new", "x"),
    "make a device": lambda: os.mknod(directory + "/null", 0o20666, os.makedev(1, 3)),
    "give a file away": lambda: os.chown(directory + "/file", 1000, 1000),
    "set a trusted attribute": lambda: os.setxattr(directory + "/file", "trusted.x", b""),
    "open its own descriptors": lambda: open(f"/proc/self/fd/{init}"),
    "signal itself": lambda: (signal.raise_signal(signal.SIGCONT), os.kill(os.getpid(), 0)),
    "import": lambda: __import__("wave"),
}

def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

directory = sys.argv[1]
sandbox.enter([Path(directory)])
result = {name: outcome(attempt) for name, attempt in attempts.items()}
result["processes"] = [name for name in os.listdir("/proc") if name.isdigit()] == [str(os.getpid())]
thread = threading.Thread(target=lambda: result.update(thread=outcome(attempts["trace"])))
thread.start()
thread.join()
print(json.dumps(result))
"""

_OUT_OF_REACH = {
    "read a file elsewhere": "ENOENT",
    "change a file elsewhere": "ENOENT",
    "follow dots": "ENOENT",
    "read another's memory": "ENOENT",
    "change the kernel": "ENOENT",
    "write what it imports": "EROFS",
}
_ALLOWED = (
    "read its layers",
    "write its layers",
    "make a device",
    "give a file away",
    "set a trusted attribute",
    "open its own descriptors",
    "signal itself",
    "import",
)


@pytest.mark.root
def test_what_is_out_of_reach_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", textwrap.dedent(_ATTEMPTS), str(tmp_path)]
    said = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    found = json.loads(said.stdout)
    assert found.pop("processes")
    for name, outcome in found.items():
        assert (name, outcome) == (
            name,
            _OUT_OF_REACH.get(name, "done" if name in _ALLOWED else "EPERM"),
        )


def _status(process: int, thread: str) -> dict[str, str]:
    text = Path(f"/proc/{process}/task/{thread}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def _assert_confined(process: int) -> None:
    kept = sum(1 << number for number in sandbox.KEPT_CAPABILITIES)
    threads = os.listdir(f"/proc/{process}/task")
    for thread in threads:
        status = _status(process, thread)
        for which in ("CapEff", "CapPrm", "CapBnd"):
            assert int(status[which], 16) & ~kept == 0
        assert (status["NoNewPrivs"], status["Seccomp"].strip()) == ("1", "2")


async def test_every_thread_of_a_worker_is_confined(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "file").write_text("served")
        _assert_confined(mount.worker)
        # Nothing else of this machine; of which directories depends on where Python is.
        seen = set(os.listdir(f"/proc/{mount.worker}/root"))
        assert "proc" in seen
        assert seen.isdisjoint({"etc", "dev", "sys", "run", "var", "boot"})


def _mounted_in(process: int) -> set[str]:
    lines = Path(f"/proc/{process}/mountinfo").read_text().splitlines()
    return {line.split(" ")[4] for line in lines}


async def test_a_worker_lets_go_of_storage_that_its_session_has_left(
    playground: Playground, tmp_path: Path
) -> None:
    """Or the RAM of a session that moved to disk would stay in use."""
    before, after = tmp_path / "tmpfs", tmp_path / "disk"
    for directory in (before, after):
        for name in ("fs", "work"):
            (directory / name).mkdir(parents=True)
    old = Stack(UpperDirectories(before / "fs", before / "work"), (playground.image,))
    upper = UpperDirectories(after / "fs", after / "work")
    new = Stack(upper, (playground.image,), former=before / "orphans")
    reachable = (before, after, playground.image)
    async with playground.mounted(old, reachable) as mount:
        assert {str(before), str(after)} <= _mounted_in(mount.worker)
        async with mount.frozen():
            await mount.swap(new, moved=True)
        assert str(before) not in _mounted_in(mount.worker)
        assert {str(after), str(playground.image)} <= _mounted_in(mount.worker)
        (playground.root / "file").write_text("served")
    assert os.listdir(after / "fs") == ["file"]


@pytest.mark.root
def test_the_mount_helper_is_confined(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(
        [*COMMAND, "-o", options, str(tmp_path / "merged")], cwd=REPOSITORY, check=True, timeout=60
    )
    try:
        server = subprocess.run(
            ["pgrep", "--full", "--newest", f"lowerdir={tmp_path}/lower"],
            check=True,
            capture_output=True,
            text=True,
        )
        _assert_confined(int(server.stdout))
    finally:
        subprocess.run(["umount", str(tmp_path / "merged")], check=True)


_HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("architecture", _HEADERS)
def test_system_calls_have_their_numbers(architecture: str) -> None:
    header = _HEADERS[architecture]
    if not header.exists():
        pytest.skip(f"{header} is not there")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    calls = sandbox.FORBIDDEN | {
        "clone": sandbox._CLONE,
        "clone3": sandbox.Forbidden(sandbox._CLONE3, sandbox._CLONE3),
        "kill": sandbox._KILL,
        "tgkill": sandbox._TGKILL,
    }
    for name, numbers in calls.items():
        number = getattr(numbers, architecture)
        # Headers of Debian 12 and 13 differ in what they know.
        assert number == int(known.get(name, number)), name
        assert name in known or number >= 443 or number == -1, name
