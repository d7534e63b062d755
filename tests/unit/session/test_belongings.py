"""What a user owns, ended and removed for real: processes, memory, mounts, files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import trio

from sessiond.session import belongings, end_processes
from sessiond.session.accounts import Account
from sessiond.session.belongings import SystemBelongings
from sessiond.session.guests import NOBODY
from sessiond.session.model import Uid
from tests.support import libc
from tests.support.mounts import detach
from tests.support.waiting import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="what others own takes root"),
]

SYSTEM = SystemBelongings()
UIDS = count(NOBODY + 1_000_000 + os.getpid() % 1_000_000 * 20)

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def uid() -> Uid:
    """That of nobody else, also not in tests that run at the same time."""
    return Uid(next(UIDS))


@pytest.fixture
def start(uid: Uid) -> Iterator[Start]:
    """Start a shell of the user's, which says when it is ready."""
    started = []

    def start(script: str, *, user: int = uid, real: int | None = None) -> subprocess.Popen[bytes]:
        def become() -> None:
            os.setgroups([])
            os.setresuid(user if real is None else real, user, user)

        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", script],
            stdout=subprocess.PIPE,
            preexec_fn=become,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


READY = "import os, signal, sys, time\nprint('ready', flush=True)\n"
WAIT = READY + "signal.pause()\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT
# Each process forks and ends; their first one (a subreaper) has the kernel forget them.
FORKING = (
    "import ctypes, signal\n"
    "ctypes.CDLL(None).prctl(36, 1)\n"
    "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    + READY
    + "if os.fork():\n    signal.pause()\n"
    + "while True:\n    if os.fork():\n        os._exit(0)\n    os.setsid()\n"
)
# Its first thread has ended.
HEADLESS = (
    "import ctypes, threading, time\n"
    "print('ready', flush=True)\n"
    "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
    "ctypes.CDLL(None).syscall(60, 0)\n"
)


async def test_processes_are_asked_first(
    uid: Uid, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(belongings, "GRACE", 60.0)
    polite = start(
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + WAIT
    )
    assert SYSTEM.has_processes(uid)
    await SYSTEM.end_processes(uid, NOBODY)
    assert polite.wait() == 7


@pytest.mark.parametrize("script", [STUBBORN, FORKING, HEADLESS])
async def test_none_is_left(
    uid: Uid, start: Start, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(belongings, "GRACE", 0.1)
    other = start(WAIT, user=uid + 1)
    own = start(script)
    await until(lambda: SYSTEM.has_processes(uid))
    await SYSTEM.end_processes(uid, NOBODY)
    assert not SYSTEM.has_processes(uid)
    own.wait()
    assert other.poll() is None
    assert SYSTEM.has_processes(Uid(uid + 1))


async def test_who_has_become_another_is_left_alone(uid: Uid, start: Start) -> None:
    """As `su` does; where there is logind, the slice has it."""
    became = start(WAIT, user=uid + 2)
    start(WAIT)
    await SYSTEM.end_processes(uid, NOBODY)
    assert became.poll() is None


async def test_a_set_user_id_program_ends_as_well(uid: Uid, start: Start) -> None:
    program = start(WAIT, user=uid + 3, real=uid)
    assert SYSTEM.has_processes(uid)
    await SYSTEM.end_processes(uid, NOBODY)
    assert program.wait() == -signal.SIGTERM


async def test_who_ends_them_cannot_be_ended_by_them(uid: Uid, start: Start) -> None:
    """It has their uid as its effective one alone, by which nobody may be signalled."""
    watcher = start(
        READY + "killed = set()\nwhile True:\n"
        "    for name in os.listdir('/proc'):\n"
        "        if name.isdigit() and int(name) != os.getpid():\n"
        "            try:\n                os.kill(int(name), 9)\n"
        "            except OSError:\n                continue\n"
    )
    own = start(STUBBORN, user=uid + 4)
    await SYSTEM.end_processes(uid, NOBODY)
    assert watcher.wait() == -signal.SIGTERM
    assert own.poll() is None


def test_who_ends_them_is_that_user_for_one_signal_to_all(uid: Uid) -> None:
    """Others of that uid can do nothing to it, and it has no right but that."""
    script = (
        "import os, runpy, sys\n"
        "def kill(*args): print(*args, *os.getresuid(), *os.getresgid(), os.getgroups())\n"
        "os.kill = kill\n"
        f"sys.argv = ['', '{uid}', '{NOBODY}', '9']\n"
        f"runpy.run_path({end_processes.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE)
    ids = f"{NOBODY} {uid} {NOBODY} {NOBODY} {NOBODY} {NOBODY}"
    assert done.stdout.decode() == f"-1 9 {ids} []\n"


@pytest.mark.parametrize("wrong", [("0", "1"), ("1", "0")])
def test_it_is_never_root(wrong: tuple[str, str]) -> None:
    script = end_processes.__file__
    done = subprocess.run([sys.executable, "-I", "-S", script, *wrong, "0"], stderr=subprocess.PIPE)
    assert b"AssertionError" in done.stderr


# What they own


@pytest.fixture
def account(uid: Uid) -> Account:
    return Account(f"guest-{uid - NOBODY}", uid)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which everybody may write, the only one there is."""
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setattr(belongings, "_OPEN_TO_ALL", (str(place), str(tmp_path / "missing")))
    monkeypatch.setattr(belongings, "_BY_NAME", (str(tmp_path / "mail/{name}"),))
    monkeypatch.setattr(belongings, "_MOUNTED", (str(tmp_path / "media/{name}"),))
    return place


def owned(path: Path, uid: int) -> Path:
    """Make a file, or a directory where there is one already, a user's."""
    if not path.is_dir():
        path.touch()
    os.chown(path, uid, uid)
    return path


def below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_files_go_and_those_of_others_stay(account: Account, place: Path, tmp_path: Path) -> None:
    uid = account.uid
    (place / "deep/er").mkdir(parents=True)
    for path in ("deep", "deep/er", "deep/er/file", "file", "new\nline"):
        owned(place / path, uid)
    (place / "shared").mkdir()
    owned(place / "shared/mine", uid)
    owned(place / "shared/theirs", 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    owned(outside / "file", uid)
    (place / "link").symlink_to(outside)
    os.chown(place / "link", uid, uid, follow_symlinks=False)
    apart = place / "apart"
    apart.mkdir()
    owned(apart / "layer", uid)
    (tmp_path / "mail").mkdir()
    (tmp_path / "mail" / account.name).mkdir()
    (tmp_path / "mail" / account.name / "letter").touch()
    assert SYSTEM.remove(account, tmp_path / "home", (apart,)) == []
    assert below(place) == {"shared", "shared/theirs", "apart", "apart/layer"}
    assert below(outside) == {"file"}
    assert below(tmp_path / "mail") == set()


def test_what_others_have_put_there_stays(account: Account, place: Path, tmp_path: Path) -> None:
    (place / "open").mkdir()
    owned(place / "open", account.uid)
    owned(place / "open/theirs", 1)
    owned(place / "open/mine", account.uid)
    (told,) = SYSTEM.remove(account, tmp_path / "home", ())
    assert f"{place}/open" in told
    assert "not empty" in told
    assert below(place) == {"open", "open/theirs"}


def test_the_home_goes_whoever_has_what_in_it(
    account: Account, place: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (home / "directory").mkdir(parents=True)
    owned(home / "directory/theirs", 1)
    assert SYSTEM.remove(account, home, ()) == []
    assert not home.exists()


def test_nothing_that_is_mounted_is_deleted(account: Account, place: Path, tmp_path: Path) -> None:
    """What is mounted in the home is unmounted; elsewhere nobody looks into it."""
    home = tmp_path / "home"
    stick = tmp_path / "stick"
    points = [home / "mnt", tmp_path / "media" / account.name / "stick", place / "mnt"]
    stick.mkdir()
    owned(stick / "file", account.uid)
    for point in points:
        point.mkdir(parents=True)
        libc.mount(str(stick), str(point), "none", libc.MS_BIND)
    try:
        assert SYSTEM.remove(account, home, ()) == []
        assert (stick / "file").exists()
        assert not home.exists()
        assert below(place) == {"mnt", "mnt/file"}
        mounted = {one.target for one in belongings.mount_table()}
        assert [point in mounted for point in points] == [False, False, True]
    finally:
        for point in points:
            detach(str(point))


def test_what_cannot_be_unmounted_is_not_emptied(
    account: Account, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    libc.mount("tmpfs", str(home), "tmpfs")
    try:
        (home / "file").touch()
        monkeypatch.setattr(SystemBelongings, "_mounts_of", lambda *_: [])
        assert SYSTEM.remove(account, home, ()) == [f"{home}: something is mounted there"]
        assert (home / "file").exists()
    finally:
        detach(str(home))


def test_system_v_ipc_goes(account: Account, place: Path, tmp_path: Path) -> None:
    for option in ("--shmem=4096", "--queue", "--semaphore=1"):
        for user in (account.uid, account.uid + 5):
            make = ["ipcmk", *option.split("=")]
            subprocess.run(make, user=user, check=True, stdout=subprocess.DEVNULL)

    def owners() -> list[int]:
        tables = [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "msg", "sem")]
        users = (account.uid, account.uid + 5)
        return sorted(user for table in tables for user in users if f" {user} " in table)

    assert owners() == [account.uid] * 3 + [account.uid + 5] * 3
    assert SYSTEM.remove(account, tmp_path / "home", ()) == []
    assert owners() == [account.uid + 5] * 3
    assert SYSTEM.remove(Account("guest-5", Uid(account.uid + 5)), tmp_path / "home", ()) == []
    assert owners() == []


async def test_all_disks_are_searched(
    uid: Uid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = {name: tmp_path / name for name in ("disk", "other", "state", "read-only")}
    for disk in disks.values():
        disk.mkdir()
        libc.mount("tmpfs", str(disk), "tmpfs")
        owned(disk / "file", uid)
    (disks["disk"] / "bound").mkdir()
    libc.mount(str(disks["other"]), str(disks["disk"] / "bound"), "none", libc.MS_BIND)
    subprocess.run(["mount", "-o", "remount,bind,ro", disks["read-only"]], check=True)
    single = tmp_path / "single"
    single.touch()
    libc.mount(str(owned(tmp_path / "source", uid)), str(single), "none", libc.MS_BIND)
    table = belongings.mount_table
    monkeypatch.setattr(
        belongings,
        "mount_table",
        lambda: [one for one in table() if tmp_path in one.target.parents],
    )
    try:
        searched = belongings._searched((disks["state"],))
        assert sorted(searched) == [disks["disk"], disks["other"], single]
        assert await SYSTEM.search(uid, (disks["state"],)) == []
        left = [name for name, disk in disks.items() if (disk / "file").exists()]
        assert left == ["state", "read-only"]
    finally:
        for point in (single, disks["disk"] / "bound"):
            detach(str(point))
        for disk in disks.values():
            detach(str(disk))


async def test_a_search_can_be_given_up(uid: Uid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(belongings, "_searched", lambda _: [Path("/")])
    with trio.CancelScope() as scope:
        scope.cancel()
        await SYSTEM.search(uid, ())
    assert scope.cancelled_caught
