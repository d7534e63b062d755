"""sessiond-overlay: the overlay as a mount helper, with the options of the kernel's overlayfs.

sessiond-overlay [-f] -o lowerdir=A:B,upperdir=U,workdir=W[,...] [SOURCE] MOUNTPOINT
mount -t fuse.sessiond-overlay -o lowerdir=... SOURCE MOUNTPOINT
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sessiond import __version__
from sessiond.fuse import data_path, device, sandbox, worker
from sessiond.overlay.kernel_mounts import refuse_mounted
from sessiond.overlay.lowerdir import parse_lowers, split, unescape
from sessiond.overlay.stack import Stack, StackOptions
from sessiond.session.model import DataPath

PROGRAM = "sessiond-overlay"
FS_TYPE = "fuse.sessiond-overlay"

_FLAGS = {
    "ro": device.MS_RDONLY,
    "nosuid": device.MS_NOSUID,
    "nodev": device.MS_NODEV,
    "noexec": device.MS_NOEXEC,
}
_CLEARED = {"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec"}
_FOR_MOUNT = re.compile(
    r"defaults|auto|noauto|nofail|_netdev|user|nouser|group|owner|x-.*|comment=.*"
)
"""What fstab(5) knows and mount(8) may pass on; no business of a file system."""


class UsageError(Exception):
    """The command line or an option makes no sense; the message is one line for people."""


@dataclass
class Options:
    """What was asked for with -o."""

    lowers: list[bytes] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    """Data-only lowers: they only hold contents of metadata-only files above them."""
    upper: bytes | None = None
    work: bytes | None = None
    allow_other: bool = False
    user_xattrs: bool = False
    flags: set[str] = field(default_factory=set)

    @property
    def mount_flags(self) -> int:
        """Flags for mount(2)."""
        value = 0
        for name in self.flags:
            value |= _FLAGS[name]
        return value


def parse_options(text: str) -> Options:
    """Parse the argument of -o. As for overlayfs, a backslash keeps ``:``, ``,`` or itself literal.

    Raises `UsageError`.
    """
    options = Options()
    for option in split(text, ","):
        name, has_value, value = option.partition("=")
        if has_value and name in {"lowerdir", "upperdir", "workdir"}:
            _set_directory(options, name, value)
        elif option == "allow_other":
            options.allow_other = True
        elif option == "userxattr":
            options.user_xattrs = True
        elif option in _FLAGS:
            options.flags.add(option)
        elif option in _CLEARED:
            options.flags.discard(_CLEARED[option])
        elif option and not _FOR_MOUNT.fullmatch(option):
            raise UsageError(
                f"unknown option '{option}'; known are lowerdir=, upperdir=, workdir=, "
                "allow_other, userxattr, ro, rw, nosuid, nodev and noexec"
            )
    return _checked(options)


def _checked(options: Options) -> Options:
    if not any(options.lowers):
        raise UsageError(
            "option lowerdir= is missing: name the read-only directories, topmost first"
        )
    if (options.upper is None) != (options.work is None):
        missing = "workdir" if options.work is None else "upperdir"
        raise UsageError(f"option {missing}= is missing: upperdir and workdir go together")
    if options.upper is None:
        options.flags.add("ro")
    elif "ro" in options.flags:
        options.lowers.insert(0, options.upper)
        options.upper = options.work = None
    return options


def _set_directory(options: Options, name: str, value: str) -> None:
    if name == "lowerdir":
        _set_lowers(options, value)
        return
    directory = os.fsencode(unescape(value))
    if not directory:
        raise UsageError(f"option {name}= names no directory")
    if name == "upperdir":
        options.upper = directory
    else:
        options.work = directory


def _set_lowers(options: Options, value: str) -> None:
    try:
        options.lowers, options.data = parse_lowers(value)
    except ValueError as error:
        raise UsageError(f"option lowerdir= {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Mount an overlay of directories, in user space.",
        epilog="Unmount with umount(8).",
    )
    parser.add_argument("source", nargs="?", default=PROGRAM, help="shown as the mount's source")
    parser.add_argument("mount_point", metavar="mountpoint", type=Path)
    parser.add_argument(
        "-o", dest="options", action="append", default=[], help="options, as mount(8)"
    )
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay in the foreground until unmounted"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount, and serve in the background or, with -f, here. Return the exit code."""
    parsed = _parser().parse_intermixed_args(arguments)
    logging.basicConfig(format=f"{PROGRAM}: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        options = parse_options(",".join(parsed.options))
        return _mount(parsed.source, parsed.mount_point, options, foreground=parsed.foreground)
    except UsageError as error:
        return _complain(str(error), 2)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 1)


def _complain(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _mount(source: str, mount_point: Path, options: Options, *, foreground: bool) -> int:
    _check_mount_point(mount_point)
    if options.upper is not None:
        refuse_mounted(options.upper)
    try:
        path = data_path.choose(DataPath.PASSTHROUGH)
    except ValueError as error:
        raise UsageError(str(error)) from None
    worker.prepare_process()
    stack_options = StackOptions(user_xattrs=options.user_xattrs)
    stack = Stack.open(
        options.lowers, options.upper, options.work, stack_options, data=options.data
    )
    connection = _connect(source, mount_point, options)
    ready = None if foreground else _Fork()
    if ready is not None and ready.is_parent:
        return ready.wait()
    sandbox.confine()
    operations = worker.start_fuse(stack, connection, path)
    try:
        if ready is not None:
            ready.announce()
        trio.run(_serve_until_signal, mount_point.absolute())
    finally:
        operations.overlay.close()
    return 0


class _Fork:
    """Both ends of a fork: the parent waits until the child serves."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.is_parent = os.fork() != 0

    def wait(self) -> int:
        """In the parent: return the exit code."""
        os.close(self._write)
        return 0 if os.read(self._read, 1) else 1

    def announce(self) -> None:
        """In the child: let the parent go, and become a daemon."""
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.write(self._write, b"+")
        os.close(self._write)
        os.close(self._read)


def _check_mount_point(mount_point: Path) -> None:
    try:
        if not mount_point.is_dir():
            code = errno.ENOTDIR if mount_point.exists() else errno.ENOENT
            raise OSError(
                code, "the mount point is no directory; create it first", str(mount_point)
            )
    except PermissionError as error:
        raise OSError(
            errno.EACCES, "the mount point cannot be reached", str(mount_point)
        ) from error


def _connect(source: str, mount_point: Path, options: Options) -> str:
    """Mount the connection; return what libfuse is to be told."""
    try:
        fd = device.mount_device(
            mount_point,
            source,
            options.mount_flags,
            fs_type=FS_TYPE,
            allow_other=options.allow_other,
        )
    except FileNotFoundError as error:
        if error.filename != "/dev/fuse":
            raise
        raise OSError(
            errno.ENOENT,
            "the FUSE device is missing; load the kernel module: modprobe fuse",
            "/dev/fuse",
        ) from error
    except PermissionError as error:
        raise OSError(
            error.errno,
            f"mounting takes root, or a user namespace ({error.strerror})",
            str(mount_point),
        ) from error
    return f"/dev/fd/{fd}"


async def _serve_until_signal(mount_point: Path) -> None:
    """Serve until the mount is gone. A signal that ends a program unmounts first."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_at_signal, received, mount_point, nursery.cancel_scope)
            await worker.serve_fuse()
            nursery.cancel_scope.cancel()


async def _end_at_signal(
    received: AsyncIterator[int], mount_point: Path, scope: trio.CancelScope
) -> None:
    async for _ in received:
        device.detach(mount_point)
        scope.cancel()


if __name__ == "__main__":
    sys.exit(main())
