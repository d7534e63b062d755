"""Programs of a session's user that do their worst in it while root carries out each operation.

None of it may keep an operation from its end, or cost another session anything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from sessiond.bus import names
from sessiond.bus.connection import connect
from sessiond.bus.objects import ManagerObject
from tests.matrix.methods import METHODS, Entry, prepare
from tests.matrix.stage import DONE, Outcome, Stage
from tests.support.daemon import BOUND, Daemon
from tests.support.users import NOBODY

OPERATIONS = sorted(
    (one for one in METHODS if one.interface is not ManagerObject), key=lambda one: one.closes
)

# Each begins in the merged view, as its user, and says "ready" when it is about to go on for ever.
TRICKS = {
    "names": """
import ctypes, itertools
exchange = ctypes.CDLL(None).renameat2
for name in ("a/b/c", "x/y"):
    os.makedirs(name)
open("a/b/c/file", "w").write("x" * 5000)
os.symlink("/etc", "link")
os.mkdir("place")
ready()
for n in itertools.count():
    os.rename("a/b", "x/b"); os.rename("x/b", "a/b")
    exchange(-100, b"link", -100, b"place", 2)
    os.link("a/b/c/file", f"a/b/c/{n}"); os.rename(f"a/b/c/{n}", f"x/y/{n % 7}")
    open("x/new", "w").write(str(n)); os.replace("x/new", "a/b/c/file")
    os.mkdir("x/gone"); os.rmdir("x/gone")
""",
    "deep": """
top = os.open(".", os.O_RDONLY)
for n in range(1100):
    os.mkdir("d"); os.chdir("d")
open("bottom", "w").write("x")
ready()
while True:
    open("bottom", "a").write("x"); os.rename("bottom", "other"); os.rename("other", "bottom")
""",
    "many": """
import resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
with open("sparse", "wb") as sparse:
    sparse.truncate(1 << 40); sparse.seek(1 << 39); sparse.write(b"x")
files = []
for n in range(min(most - 50, 1000)):
    files.append(open(f"open{n}", "w")); files[-1].write("x" * 100); files[-1].flush()
    if n % 2: os.unlink(f"open{n}")
ready()
while True:
    for file in files:
        file.write("y"); file.flush()
""",
    "mapping": """
import mmap
file = open("mapped", "w+b"); file.truncate(1 << 20)
image = open("writable", "r+b")
mapping, other = mmap.mmap(file.fileno(), 0), mmap.mmap(image.fileno(), 0)
ready()
n = 0
while True:
    n = (n + 4099) % (1 << 20)
    mapping[n] = n % 256; other[0] = n % 256
    if n % 64 == 0: os.write(file.fileno(), b"x")
""",
    "mounts": """
import ctypes, socket, struct
for name in ("bound", "tmpfs", "fuse"):
    os.mkdir(name)
libc = ctypes.CDLL(None, use_errno=True)
uid = os.getuid()
os.close(os.open("bound", os.O_RDONLY))
if libc.unshare(0x10000000 | 0x00020000):
    print("no user namespaces", flush=True); sys.exit()
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
open("/proc/self/gid_map", "w").write(f"0 {uid} 1")
def mount(source, target, kind, flags=0, data=None):
    if libc.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), target)
mount(b"/proc", b"bound", None, 4096 | 16384)
mount(b"none", b"tmpfs", b"tmpfs")
try:
    device = os.open("/dev/fuse", os.O_RDWR)
except PermissionError:
    pass  # the machine keeps it from users
else:
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    mount(b"none", b"fuse", b"fuse", 0, options.encode())
    if os.fork() == 0:
        os.chdir("fuse")  # a request that nobody answers
        os.listdir(".")
os.chdir("tmpfs")
ready()
while True:
    signal.pause()
""",
    "held": """
import fcntl
os.mkdir("held")
files = [open(f"held/{n}", "w+") for n in range(20)]
for file in files:
    file.write("x" * 1000); file.flush()
    fcntl.lockf(file, fcntl.LOCK_EX)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        pass
signal.signal(signal.SIGIO, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.chdir("held")
ready()
os.kill(os.getpid(), signal.SIGSTOP)
""",
}
IN_TEST = ("names", "mapping", "mounts")
PRELUDE = """
import os, signal, sys
def ready():
    print("ready", flush=True)
"""


@contextmanager
def doing(trick: str, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Have the user do that in a merged view."""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + TRICKS[trick]],
        cwd=root,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if said.startswith(b"no "):
                pytest.skip(said.decode().strip())
            assert said == b"ready\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def attacked(idle_daemon: Daemon) -> Daemon:
    """A daemon with a profile for those who attack, and a session that looks on."""
    image = idle_daemon.directory / "image"
    image.chmod(0o777)
    (image / "writable").write_bytes(b"x" * 100_000)
    (image / "writable").chmod(0o666)
    idle_daemon.configure(
        {
            "profile.guest": {"image": str(image), "size": "256M", "keep": []},
            "profile.other": {"image": str(image), "size": "16M"},
        }
    )
    idle_daemon.start()
    idle_daemon.sessionctl("create", "root", "other", "--id", "onlooker")
    (idle_daemon.root("onlooker") / "file").write_text("looks on")
    return idle_daemon


async def cancelled(stage: Stage, entry: Entry) -> Outcome:
    """Call what would take hours, for it writes holes as zeros, and be satisfied if it is cancelled
    at once.
    """
    results = await stage.call(entry)
    job = str(results[0])
    await stage.connection.call(names.BUS, job, names.JOB, "Cancel", "")
    outcome, said = await stage.result(entry, results)
    return DONE if outcome == "Cancelled" else outcome, said


@pytest.mark.parametrize(
    "trick",
    [pytest.param(one, marks=() if one in IN_TEST else pytest.mark.soak) for one in TRICKS],
)
async def test_whatever_its_user_does(attacked: Daemon, trick: str) -> None:
    await trio.to_thread.run_sync(
        lambda: attacked.sessionctl("create", "nobody", "guest", "--id", "s")
    )
    root, onlooker = attacked.root("s"), attacked.root("onlooker")
    (root / "mine").write_bytes(b"mine")
    wrong = []
    async with connect(attacked.environment["DBUS_SYSTEM_BUS_ADDRESS"]) as connection:
        stage = Stage(connection, "s", user="nobody", uid=NOBODY)
        with doing(trick, root):
            for entry in OPERATIONS:
                with trio.move_on_after(BOUND) as bound:
                    await prepare(stage, entry)
                    if trick == "many" and entry.name == "Export":
                        found, said = await cancelled(stage, entry)
                    else:
                        found, said = await stage.outcome(entry)
                if bound.cancelled_caught:
                    wrong.append(f"{entry} comes to no end")
                    break
                if found != DONE:
                    wrong.append(f"{entry}: {found}: {said}")
                assert (onlooker / "file").read_text() == "looks on"
                (onlooker / "file").write_text("looks on")
        stage.close()
    assert not wrong, "\n".join(wrong)
    assert attacked.runs
    assert list(attacked.sessions()) == ["onlooker"]
