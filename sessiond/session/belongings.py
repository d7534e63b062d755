"""All that a user owns on this machine: found by the uid, and removed.

It is for users of whom nothing is to stay. First their processes end, so that nobody puts back what
is removed, or changes what a path leads to; then what they own goes. Files are looked for where
everybody may write at once, then on every local disk, at low priority. Nothing is followed:
find(1) deletes names in directories that it holds open, on clones of mounts, in which there is
nothing that hangs or is another file system. Where only names tell (mail, lingering), root alone
has made the directories.

Left alone are file systems that have no owners (FAT), that others serve (network, FUSE), and those
that were plugged in: a memory stick is the guest's to take home.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio

from sessiond.errors import Failed
from sessiond.session import end_processes, mounts
from sessiond.session.accounts import Account
from sessiond.session.model import Uid
from sessiond.session.mounts import MountEntry, mount_table
from sessiond.session.process_scan import uids
from sessiond.session.tree import remove_tree

GRACE = 5.0
"""Seconds that programs have from SIGTERM to SIGKILL."""
_PATIENCE = 10.0
"""Seconds that the kernel has to end those that were killed."""

_OPEN_TO_ALL = (
    *("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run", "/run/lock"),
    *("/var/crash", "/var/mail", "/var/spool"),
)
"""Directories in which, or somewhere below which, everybody may leave something."""

_BY_NAME = (
    *("/run/user/{uid}", "/var/lib/systemd/linger/{name}"),
    *("/var/mail/{name}", "/var/spool/cron/crontabs/{name}", "/var/spool/cron/{name}"),
    *("/var/lib/AccountsService/users/{name}", "/var/lib/AccountsService/icons/{name}"),
    *("/var/lib/lightdm-data/{name}", "/run/faillock/{name}", "/media/{name}"),
    *("/run/media/{name}", "/run/sudo/ts/{uid}", "/run/sudo/ts/{name}"),
    *("/var/lib/sudo/lectured/{uid}", "/var/lib/sudo/lectured/{name}"),
)
"""What services keep for a user, as root or as themselves, in directories of theirs."""

_MOUNTED = ("/run/user/{uid}", "/media/{name}", "/run/media/{name}")
"""Below which all that is mounted is for that user."""

_WITH_OWNERS = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "reiserfs"}
    | {"tmpfs", "ubifs", "xfs", "zfs"}
)
"""Local file systems that remember whose a file is."""
_PLUGGED_IN = ("/media", "/run/media")
"""Below which disks are mounted that come and go."""

_SLICES = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
_IPC = {
    "shm": ("shmid", "--shmem-id"),
    "sem": ("semid", "--semaphore-id"),
    "msg": ("msqid", "--queue-id"),
}
"""Tables in /proc/sysvipc: the column with the number, and what ipcrm(1) calls such an object."""


class Belongings(Protocol):
    """What guests ask of the machine when they go."""

    def has_processes(self, uid: Uid) -> bool:
        """Say whether any process has that uid, by any of its user ids."""

    async def end_processes(self, uid: Uid, nobody: Uid) -> None:
        """End all processes of a user, and all others in the user's slice.

        `nobody` is a uid that no account has. Raises `Failed` if one does not end, which then is
        sure to do nothing any more.
        """

    def remove(self, account: Account, home: Path, apart: Collection[Path]) -> list[str]:
        """Remove what else there is of a user, but for `search`; return what could not be.

        `apart`: directories that are left alone. Blocks.
        """

    async def search(self, uid: Uid, apart: Collection[Path]) -> list[str]:
        """Look for what is left on all file systems, which takes long, and remove it.

        Returns what could not be removed.
        """


class SystemBelongings:
    """Implements `Belongings`; needs the capabilities of root."""

    def __init__(self) -> None:
        self._mounts = mounts.SystemMounts()

    def has_processes(self, uid: Uid) -> bool:
        for descriptor in _processes(uid):
            os.close(descriptor)
            return True
        return False

    async def end_processes(self, uid: Uid, nobody: Uid) -> None:
        if self.has_processes(uid):
            await _signal(uid, nobody, signal.SIGTERM)
            with trio.move_on_after(GRACE):
                await _wait_ended(uid)
        with trio.move_on_after(_PATIENCE):
            while True:
                # Also where none is seen: those that fork and end at once are missed by who looks.
                _kill_slice(uid)
                await _signal(uid, nobody, signal.SIGKILL)
                if not self.has_processes(uid):
                    return
                await _wait_ended(uid)
        raise Failed(f"Processes of uid {uid} were killed, and do not end: the kernel waits.")

    def remove(self, account: Account, home: Path, apart: Collection[Path]) -> list[str]:
        failures: list[str] = []

        @contextmanager
        def told(what: str) -> Iterator[None]:
            try:
                yield
            except OSError as error:
                failures.append(f"{what}: {error.strerror or error}")

        named = {"name": account.name, "uid": account.uid}
        for target in self._mounts_of(account, home):
            with told(f"unmounting {target}"):
                self._mounts.detach(target)
        with told("System V IPC"):
            _remove_ipc(account.uid)
        for path in (home, *(Path(pattern.format(**named)) for pattern in _BY_NAME)):
            with told(str(path)):
                if self._mounts.file_system(path) is not None:
                    raise OSError(errno.EBUSY, "something is mounted there")
                _remove(path)
        for place in map(Path, _OPEN_TO_ALL):
            if place.is_dir() and not place.is_symlink():
                with told(str(place)):
                    failures += _delete_owned(account.uid, place, apart)
        return failures

    def _mounts_of(self, account: Account, home: Path) -> list[Path]:
        """The deepest first."""
        tops = {home, *(Path(one.format(name=account.name, uid=account.uid)) for one in _MOUNTED)}
        found = {
            mount.target
            for mount in mount_table()
            if tops & {mount.target, *mount.target.parents}
            or (mount.kind.startswith("fuse") and f"user_id={account.uid}" in mount.options)
        }
        return sorted(found, key=lambda path: len(path.parts), reverse=True)

    async def search(self, uid: Uid, apart: Collection[Path]) -> list[str]:
        failures = []
        for directory in await trio.to_thread.run_sync(_searched, apart):
            try:
                failures += await _search(uid, directory, apart)
            except (FileNotFoundError, NotADirectoryError):
                # Another file system is mounted over the way there, or it is a single file.
                continue
            except OSError as error:
                failures.append(f"{directory}: {error.strerror}")
        return failures


# Processes


def _processes(uid: Uid) -> Iterator[int]:
    """Yield descriptors, to be closed, of all that have not ended."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            descriptor = os.pidfd_open(int(name))
        except OSError:
            continue  # it has ended
        if _is_of(uid, int(name)) and not _has_ended(descriptor):
            yield descriptor
        else:
            os.close(descriptor)


def _is_of(uid: Uid, pid: int) -> bool:
    try:
        return uid in uids(pid)
    except OSError:
        return False


def _has_ended(descriptor: int) -> bool:
    # What /proc has as its state tells less: a process whose first thread has ended may go on.
    ended = select.poll()
    ended.register(descriptor, select.POLLIN)
    return bool(ended.poll(0))


async def _wait_ended(uid: Uid) -> None:
    """Return when all processes that there are now have ended."""
    descriptors = list(_processes(uid))
    try:
        for descriptor in descriptors:
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def _signal(uid: Uid, nobody: Uid, number: signal.Signals) -> None:
    script = str(Path(end_processes.__file__))
    command = [sys.executable, "-I", "-S", script, str(uid), str(nobody), str(int(number))]
    done = await trio.run_process(
        command, check=False, cwd="/", capture_stdout=True, capture_stderr=True
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Failed(f"The processes of uid {uid} cannot be ended: {said}")


def _kill_slice(uid: Uid) -> None:
    """Kill what logind has put together as the user's, at once, whoever it runs as."""
    for hierarchy in _SLICES:
        # Before Linux 5.14, and without logind, there is no such file.
        with suppress(OSError):
            Path(f"{hierarchy}/user.slice/user-{uid}.slice/cgroup.kill").write_text("1")


# What they own


def _remove_ipc(uid: Uid) -> None:
    """Remove segments, semaphores and queues that a user owns or has made. Raises `OSError`."""
    for kind, (number, option) in _IPC.items():
        try:
            header, *lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        except FileNotFoundError:
            continue  # a kernel without
        for line in lines:
            found = dict(zip(header.split(), line.split(), strict=True))
            if str(uid) in (found["uid"], found["cuid"]):
                mounts.run(["ipcrm", option, found[number]])


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EISDIR:
            raise
        remove_tree(path)


def _delete_owned(uid: Uid, directory: Path, apart: Collection[Path]) -> list[str]:
    """Delete what a user owns below a directory, and nothing through a mount point.

    Returns what could not be. Raises `OSError`.
    """
    with _finding(uid, directory, apart) as (command, tree):
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            pass_fds=(tree,),
            check=False,
            env=_environment(),
        )
    return _said(done, directory)


async def _search(uid: Uid, directory: Path, apart: Collection[Path]) -> list[str]:
    """The same, at low priority."""
    with _finding(uid, directory, apart) as (command, tree):
        lowly = ["nice", "-n", "19", "ionice", "-c", "3", *command]
        done = await trio.run_process(
            lowly,
            capture_stdout=True,
            capture_stderr=True,
            pass_fds=(tree,),
            check=False,
            env=_environment(),
        )
    return _said(done, directory)


@contextmanager
def _finding(uid: Uid, directory: Path, apart: Collection[Path]) -> Iterator[tuple[list[str], int]]:
    """Return a command of find(1), and a descriptor that it is to have."""
    tree = mounts.clone(directory)
    try:
        if not stat.S_ISDIR(os.fstat(tree).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        top = f"/proc/self/fd/{tree}/."
        tests = ["-mindepth", "1", "-ignore_readdir_race", "-uid", str(uid)]
        for path in apart:
            if path.is_relative_to(directory):
                within = glob.escape(str(path.relative_to(directory)))
                tests += ["!", "-path", f"{top}/{within}", "!", "-path", f"{top}/{within}/*"]
        yield ["find", top, *tests, "-delete"], tree
    finally:
        os.close(tree)


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _said(done: subprocess.CompletedProcess[bytes], directory: Path) -> list[str]:
    if done.returncode == 0:
        return []
    text = done.stderr.decode(errors="backslashreplace")
    top = str(directory).rstrip("/")
    if not text:
        return [f"{directory}: find has ended with status {done.returncode}"]
    # Others go on working there, and remove what find has just seen.
    failed = [line for line in text.splitlines() if not line.endswith(os.strerror(errno.ENOENT))]
    return [re.sub(r"/proc/self/fd/\d+/\.", top, line) for line in failed]


def _searched(apart: Collection[Path]) -> list[Path]:
    """Return where all local file systems that can be written to are mounted, each once."""
    found: dict[tuple[int, int], list[MountEntry]] = {}
    for mount in mount_table():
        target = mount.target
        out_of_reach = any(target.is_relative_to(one) for one in (*apart, *map(Path, _PLUGGED_IN)))
        if mount.kind not in _WITH_OWNERS or "ro" in mount.options or out_of_reach:
            continue
        others = found.setdefault(mount.device, [])
        if not any(mount.root.is_relative_to(other.root) for other in others):
            others[:] = [one for one in others if not one.root.is_relative_to(mount.root)]
            others.append(mount)
    return [mount.target for mounts_of_one in found.values() for mount in mounts_of_one]
