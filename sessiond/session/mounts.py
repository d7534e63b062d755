"""The machine's own mounts, of images and tmpfs, and the system calls for them that `os` lacks.

The merged views are not made here but by a `Mounter`. All functions block, and may be called from
any thread; they never look into what is mounted, which for a dead merged view would hang or fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from sessiond.session import loop

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# The numbers of system calls since 5.1 are the same on all architectures that Python supports.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_CLONE_NEWNS = 0x20000
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_ATTR_RDONLY = 0x1
_MS_NOSUID = 0x2
_MS_NODEV = 0x4
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8


class Mounts(Protocol):
    """What the session layer asks of the kernel. Tests without root use one that mounts nothing."""

    def mount_tmpfs(self, target: Path, *, size: str, inodes: int | None) -> None:
        """Mount a tmpfs that only root can enter. Raises `OSError`."""

    def tmpfs_limits(self, target: Path) -> tuple[int, int]:
        """Return the bytes and inodes that the tmpfs at `target` may hold; 0 of each if it is gone.

        Raises `OSError`.
        """

    def mount_clone(self, source: Path, target: Path) -> None:
        """Mount the directory `source` read-only, without the mounts below it.

        Raises `OSError`.
        """

    def mount_image(self, device: Path, target: Path, kind: str) -> None:
        """Mount a file or block device of file system `kind` read-only.

        Raises `OSError`; its `strerror` is what mount(8) says.
        """

    def file_system(self, target: Path) -> str | None:
        """Return the type of the topmost file system mounted at `target`, None if there is none."""

    def is_in_ram(self, directory: Path) -> bool:
        """Tell whether what is in an existing directory is gone after a reboot."""

    def device(self, target: Path) -> str | None:
        """Return ``MAJOR:MINOR`` of the topmost file system mounted at `target`, if there is one.

        For those of overlays and FUSE it is what stat(2) says of the files in them.
        """

    def mounted_below(self, directory: Path) -> list[Path]:
        """Return all mount points below `directory`, the deepest first."""

    def detach(self, target: Path, *, only: str | None = None) -> None:
        """Take away what is mounted at `target`, in use or dead, until nothing is left there.

        With `only`, until the topmost is not of that type of file system. Raises `OSError`.
        """

    def supports(self, kind: str) -> bool:
        """Tell whether the running kernel knows the file system `kind`."""


class SystemMounts:
    """The real thing; needs CAP_SYS_ADMIN."""

    def mount_tmpfs(self, target: Path, *, size: str, inodes: int | None) -> None:
        options = f"mode=0700,size={size}" + (f",nr_inodes={inodes}" if inodes else "")
        result = _libc.mount(
            b"sessiond",
            os.fsencode(target),
            b"tmpfs",
            ctypes.c_ulong(_MS_NOSUID | _MS_NODEV),
            options.encode(),
        )
        _check(result, target)

    def tmpfs_limits(self, target: Path) -> tuple[int, int]:
        try:
            if target.stat().st_dev == target.parent.stat().st_dev:
                return 0, 0
            found = os.statvfs(target)
        except FileNotFoundError:
            return 0, 0
        return found.f_blocks * found.f_frsize, found.f_files

    def mount_clone(self, source: Path, target: Path) -> None:
        tree = clone(source, read_only=True)
        try:
            _check(
                _libc.syscall(
                    _SYS_MOVE_MOUNT,
                    tree,
                    b"",
                    _AT_FDCWD,
                    os.fsencode(target),
                    _MOVE_MOUNT_F_EMPTY_PATH,
                ),
                target,
            )
        finally:
            os.close(tree)

    def mount_image(self, device: Path, target: Path, kind: str) -> None:
        if not device.is_block_device():
            with loop.attached(device) as attached:
                self.mount_image(attached, target, kind)
            return
        # mount(8), since it loads the module.
        options = ["ro"]
        if kind == "ext4":
            options.append("noload")  # the journal is not replayed: nothing is written to the image
        run(["mount", "-t", kind, "-o", ",".join(options), "--", str(device), str(target)])

    def file_system(self, target: Path) -> str | None:
        kinds = [mount.kind for mount in mount_table() if mount.target == target]
        return kinds[-1] if kinds else None

    def is_in_ram(self, directory: Path) -> bool:
        holding = _mount_of(directory.resolve())
        if holding.kind == "overlay":  # such as the root of a live system
            upper = [option for option in holding.options if option.startswith("upperdir=")]
            if upper:
                holding = _mount_of(Path(upper[0].removeprefix("upperdir=")))
        return holding.kind in {"tmpfs", "ramfs", "rootfs"}

    def device(self, target: Path) -> str | None:
        devices = [mount.device for mount in mount_table() if mount.target == target]
        return "{}:{}".format(*devices[-1]) if devices else None

    def mounted_below(self, directory: Path) -> list[Path]:
        below = {mount.target for mount in mount_table() if directory in mount.target.parents}
        return sorted(below, key=lambda path: len(path.parts), reverse=True)

    def detach(self, target: Path, *, only: str | None = None) -> None:
        while (kind := self.file_system(target)) is not None and only in {None, kind}:
            _check(_libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW), target)

    def supports(self, kind: str) -> bool:
        with open("/proc/filesystems", encoding="ascii") as known:
            return any(line.split()[-1] == kind for line in known)


def sync_file_system(directory: Path) -> None:
    """Write to disk all that is dirty in the file system that holds `directory`.

    Raises `OSError`, also when writing had failed earlier.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check(_libc.syncfs(fd), directory)
    finally:
        os.close(fd)


def run(command: list[str]) -> str:
    """Run a system tool, and return what it printed.

    Raises `OSError`: its `strerror` is what was printed, or says that the tool is missing.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"the program {command[0]} is not installed") from None
    except OSError as error:
        reason = f"the program {command[0]} cannot be run: {error.strerror}"
        raise OSError(error.errno, reason) from error
    if result.returncode != 0:
        said = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        said = [line for line in said if not line.startswith("dmesg(1) may have")]
        reason = " ".join(said) or f"{command[0]} ended with status {result.returncode}"
        raise OSError(errno.EIO, reason.removesuffix("."))
    return result.stdout


def clone(directory: Path, *, read_only: bool = False) -> int:
    """Return a descriptor of `directory` as it would be if nothing were mounted below it.

    It is a mount of its own, which nobody else sees, and ends with the descriptor. Raises
    `OSError`.
    """
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    tree = _check(
        _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), flags), directory
    )
    try:
        # Private, or what is mounted below the source later would show up in the clone as well.
        wanted = _MOUNT_ATTR_RDONLY if read_only else 0
        attributes = struct.pack("=QQQQ", wanted, 0, _MS_PRIVATE, 0)
        _check(
            _libc.syscall(
                _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes)
            ),
            directory,
        )
    except BaseException:
        os.close(tree)
        raise
    return tree


def mount_for_oneself() -> None:
    """Have what this process mounts from now on seen by it alone, and gone with it.

    Raises `OSError`.
    """
    _check(_libc.unshare(_CLONE_NEWNS), Path("/"))
    flags = ctypes.c_ulong(_MS_REC | _MS_SLAVE)  # what others unmount is unmounted here as well
    _check(_libc.mount(None, b"/", None, flags, None), Path("/"))


class MountEntry(NamedTuple):
    """One line of mountinfo; see proc_pid_mountinfo(5)."""

    number: int
    device: tuple[int, int]
    target: Path
    kind: str
    root: Path
    """What of the file system is seen at `target`."""
    options: tuple[str, ...]
    """Of the mount, then of the file system."""


def mount_table(process: str = "self") -> Iterator[MountEntry]:
    """Yield what is mounted as `process` sees it, the uppermost last. Raises `OSError`."""
    with open(f"/proc/{process}/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            # proc(5): a varying number of optional fields ends with a lone hyphen.
            hyphen = fields.index(b"-", 6)
            kind = fields[hyphen + 1]
            options = b",".join((fields[5], fields[hyphen + 3].rstrip(b"\n")))
            major, minor = map(int, fields[2].split(b":"))
            root, target = (Path(_unescaped(field)) for field in fields[3:5])
            yield MountEntry(
                int(fields[0]),
                (major, minor),
                target,
                kind.decode(),
                root,
                tuple(_unescaped(option) for option in options.split(b",")),
            )


def _mount_of(path: Path) -> MountEntry:
    """Return the mount by which a resolved path is seen, whether or not it exists."""
    mounts = [mount for mount in mount_table() if path.is_relative_to(mount.target)]
    depth = max(len(mount.target.parts) for mount in mounts)
    return [mount for mount in mounts if len(mount.target.parts) == depth][-1]


def _unescaped(field: bytes) -> str:
    octal = re.compile(rb"\\([0-7]{3})")
    return os.fsdecode(octal.sub(lambda match: bytes([int(match[1], 8)]), field))


def _check(result: int, path: Path) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return result
