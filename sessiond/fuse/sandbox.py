"""What a worker may do once it serves: reach its layers, and nothing else of the machine.

A worker is root and obeys the session's user, so what a fault in it could do is taken away before
it serves. `enter` gives it a mount namespace with nothing in it but its session's directories;
`confine` drops the capabilities it has no use for, and a seccomp filter refuses the system calls by
which the rest could be turned into more. See docs/design/security.md.

Both count for the calling thread and for those that it starts: call them while it is the only one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import sessiond

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# The same on all architectures, since Linux 5.1.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE = 0x20, 0x1000, 0x2000, 0x4000, 1 << 18
_MNT_DETACH = 2
_CLONE_NEWNS = 0x20000

_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

_CAPABILITY_VERSION = 0x20080522
KEPT_CAPABILITIES = {
    0: "chown",  # files belong to those who make them
    1: "dac_override",  # of all users; the kernel has checked permission
    2: "dac_read_search",  # and open_by_handle_at(2), to find the origin of a copy-up
    3: "fowner",
    4: "fsetid",  # set-group-ID bits survive
    21: "sys_admin",  # trusted.* attributes, private mounts of lowers, FUSE passthrough
    27: "mknod",
    28: "lease",  # to find out whether a file is mapped for writing
    31: "setfcap",  # file capabilities are copied up
}
"""By number (capability.h). Not sys_resource: who has that writes beyond quotas."""
_CAP_SETPCAP = 8


class Forbidden(NamedTuple):
    """A system call by its numbers; -1 where an architecture has none of the name."""

    x86_64: int
    aarch64: int


FORBIDDEN = {
    # other programs, and other processes
    "execve": Forbidden(59, 221),
    "execveat": Forbidden(322, 281),
    "ptrace": Forbidden(101, 117),
    "process_vm_readv": Forbidden(310, 270),
    "process_vm_writev": Forbidden(311, 271),
    "process_madvise": Forbidden(440, 440),
    "pidfd_open": Forbidden(434, 434),
    "pidfd_getfd": Forbidden(438, 438),
    "pidfd_send_signal": Forbidden(424, 424),
    "kcmp": Forbidden(312, 272),
    "tkill": Forbidden(200, 130),
    "rt_sigqueueinfo": Forbidden(129, 138),
    "rt_tgsigqueueinfo": Forbidden(297, 240),
    # a way out of the namespace; umount2(2) only leads further in
    "mount": Forbidden(165, 40),
    "move_mount": Forbidden(429, 429),
    "fsopen": Forbidden(430, 430),
    "fsconfig": Forbidden(431, 431),
    "fsmount": Forbidden(432, 432),
    "fspick": Forbidden(433, 433),
    "pivot_root": Forbidden(155, 41),
    "chroot": Forbidden(161, 51),
    "setns": Forbidden(308, 268),
    "unshare": Forbidden(272, 97),
    # the whole machine
    "bpf": Forbidden(321, 280),
    "perf_event_open": Forbidden(298, 241),
    "kexec_load": Forbidden(246, 104),
    "kexec_file_load": Forbidden(320, 294),
    "init_module": Forbidden(175, 105),
    "finit_module": Forbidden(313, 273),
    "delete_module": Forbidden(176, 106),
    "reboot": Forbidden(169, 142),
    "swapon": Forbidden(167, 224),
    "swapoff": Forbidden(168, 225),
    "acct": Forbidden(163, 89),
    "quotactl": Forbidden(179, 60),
    "quotactl_fd": Forbidden(443, 443),
    "sethostname": Forbidden(170, 161),
    "setdomainname": Forbidden(171, 162),
    "syslog": Forbidden(103, 116),
    "fanotify_init": Forbidden(300, 262),
    "iopl": Forbidden(172, -1),
    "ioperm": Forbidden(173, -1),
    # what the kernel is attacked by, and is of no use here
    "socket": Forbidden(41, 198),
    "add_key": Forbidden(248, 217),
    "request_key": Forbidden(249, 218),
    "keyctl": Forbidden(250, 219),
    "io_uring_setup": Forbidden(425, 425),
    "userfaultfd": Forbidden(323, 282),
    "personality": Forbidden(135, 92),
}
"""Refused with EPERM."""

_CLONE = Forbidden(56, 220)
_CLONE3 = 435
_KILL = Forbidden(62, 129)
_TGKILL = Forbidden(234, 131)
_NEW_NAMESPACES = 0x7E020000
"""The CLONE_NEW flags of clone(2)."""
_AUDIT_ARCH = Forbidden(0xC000003E, 0xC00000B7)
_X32_BIT = 0x40000000

_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data; of an argument, the lower half."""


class Sandbox:
    """The namespace of a worker that has entered it."""

    def __init__(self, reachable: Sequence[Path]) -> None:
        self._reachable = list(reachable)

    def leave(self, layers: Iterable[Path]) -> None:
        """Give up the directories in which none of `layers` is, so that they can be unmounted."""
        paths = list(layers)
        for directory in list(self._reachable):
            if not any(directory == path or directory in path.parents for path in paths):
                _check(_libc.umount2(os.fsencode(directory), _MNT_DETACH), directory)
                self._reachable.remove(directory)


def enter(reachable: Sequence[Path]) -> Sandbox:
    """See and reach nothing but the directories `reachable`, under the paths they have; `confine`.

    Neither what is mounted below them, nor anything else but what Python may have to import. One
    that is not there is left out. Raises OSError, upon which the process is of no use.
    """
    code = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
    modules = [(path, _clone(path, code)) for path in _importable()]
    directories = []
    for path in sorted(reachable):
        with suppress(FileNotFoundError):  # the session has left it for the disk
            directories.append((path, _clone(path, _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)))
    _check(_libc.unshare(_CLONE_NEWNS))
    _mount(b"/", _MS_REC | _MS_PRIVATE)
    # On any directory that there is: it becomes the root.
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount(b"/proc", flags, source=b"sessiond", kind=b"tmpfs", options=b"mode=0755,size=1m")
    os.chdir("/proc")
    for path, clone in modules + directories:
        relative = path.relative_to("/")
        relative.mkdir(parents=True, exist_ok=True)
        _check(
            _libc.syscall(
                _SYS_MOVE_MOUNT,
                clone,
                b"",
                _AT_FDCWD,
                os.fsencode(relative),
                _MOVE_MOUNT_F_EMPTY_PATH,
            ),
            path,
        )
        os.close(clone)
    # For /proc/self/fd. No settings of the kernel, and no process but this one.
    os.mkdir("proc")
    options = b"subset=pid,hidepid=ptraceable"
    _mount(b"proc", flags, source=b"proc", kind=b"proc", options=options)
    _mount(b".", flags | _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
    _become_root()
    confine()
    return Sandbox([path for path, _ in directories])


def _become_root() -> None:
    """Make the mount at the working directory the root, and forget the one there was."""
    if _libc.pivot_root(b".", b".") == 0:
        _check(_libc.umount2(b".", _MNT_DETACH))
    else:  # the root is an initramfs, which cannot be left: it is covered
        _mount(b"/", _MS_MOVE, source=b".")
        os.chroot(".")
    os.chdir("/")


def _importable() -> list[Path]:
    """Return the directories with the modules and libraries that Python loads when it needs
    them.
    """
    package = Path(sessiond.__file__).parents[1]
    found: list[Path] = []
    for path in sorted({Path("/usr"), Path(sys.prefix).resolve(), package.resolve()}):
        if not any(path.is_relative_to(other) for other in found):
            found.append(path)
    return found


def _clone(path: Path, attributes: int) -> int:
    """Return a mount of the directory `path` alone."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), path)
    wanted = struct.pack("QQQQ", attributes, 0, _MS_PRIVATE, 0)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted)), path)
    return tree


def _mount(
    target: bytes,
    flags: int,
    *,
    source: bytes | None = None,
    kind: bytes | None = None,
    options: bytes | None = None,
) -> None:
    result = _libc.mount(source, target, kind, ctypes.c_ulong(flags), options)
    _check(result, Path(os.fsdecode(target)))


def confine() -> None:
    """Drop what a server of a mount has no use for, for good. Raises OSError."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))  # or workers could look into each other
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _drop_capabilities()
    _filter_system_calls()


def _drop_capabilities() -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data))
    # Two structs of effective, permitted, inheritable, with 32 capabilities each.
    _, low, _, _, high, _ = struct.unpack("6I", data.raw)
    permitted = high << 32 | low
    if permitted & 1 << _CAP_SETPCAP:
        for number in range(64):
            if number not in KEPT_CAPABILITIES and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
                break  # there are no more
    kept = permitted & sum(1 << number for number in KEPT_CAPABILITIES)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    _check(_libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)))


def _filter_system_calls() -> None:
    architecture = platform.machine()
    if architecture not in Forbidden._fields:
        return
    program = b"".join(_filter(architecture))
    code = ctypes.create_string_buffer(program)
    pointer = ctypes.cast(code, ctypes.c_void_p).value
    arguments = struct.pack("HxxxxxxP", len(program) // 8, pointer)  # struct sock_fprog
    # Not seccomp(2), which systemd's @system-service lacks.
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, arguments, 0, 0))


def _filter(architecture: str) -> Iterator[bytes]:
    """Yield the instructions of the seccomp filter (struct sock_filter, bpf(2))."""

    def number(call: Forbidden) -> int:
        return int(getattr(call, architecture))

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    refuse = instruction(_RETURN, _ERRNO | _EPERM)
    yield instruction(_LOAD, _ARCHITECTURE)
    yield instruction(_JUMP_EQUAL, number(_AUDIT_ARCH), 1)
    yield refuse
    yield instruction(_LOAD, _NUMBER)
    if architecture == "x86_64":
        yield instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1)
        yield refuse
    for call in FORBIDDEN.values():
        if number(call) >= 0:
            yield instruction(_JUMP_EQUAL, number(call), 0, 1)
            yield refuse
    # Its flags are out of a filter's reach; who gets this error uses clone(2).
    yield instruction(_JUMP_EQUAL, _CLONE3, 0, 1)
    yield instruction(_RETURN, _ERRNO | _ENOSYS)
    yield instruction(_JUMP_EQUAL, number(_CLONE), 0, 3)
    yield instruction(_LOAD, _FIRST_ARGUMENT)
    yield instruction(_JUMP_SET, _NEW_NAMESPACES, 0, 6)
    yield refuse
    # Signals are for this process alone, as abort(3) sends them.
    yield instruction(_JUMP_EQUAL, number(_KILL), 1)
    yield instruction(_JUMP_EQUAL, number(_TGKILL), 0, 3)
    yield instruction(_LOAD, _FIRST_ARGUMENT)
    yield instruction(_JUMP_EQUAL, os.getpid(), 1)
    yield refuse
    yield instruction(_RETURN, _ALLOW)


def _check(result: int, path: Path | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        where = str(path) if path is not None else None
        raise OSError(code, f"the worker cannot be confined: {os.strerror(code)}", where)
    return result
