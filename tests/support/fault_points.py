"""Processes that die at a chosen system call.

The kernel itself says what a process is about to do: every system call of it that is not in the
list of those that only read is announced to this process (seccomp's user notification), and goes on
when this process says so, or never, because the caller is killed first. So fault points are found
without any help by the code under test, whatever module or library makes the call, and in whatever
thread. A system call that is missing in the list is a fault point too many, never one too few.

What a process leaves on disk when it dies after its k-th change is what it leaves when it dies
before the next, so there is one fault point for each change, and the whole action after the last.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_READING = """\
    accept4 access arch_prctl brk capget chdir clock_getres clock_gettime clock_nanosleep clone
    clone3 close close_range connect dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait epoll_wait
    eventfd2 execve exit exit_group faccessat faccessat2 fadvise64 fchdir fcntl fdatasync
    fgetxattr flistxattr flock fork fstat fstatfs fsync futex get_robust_list getcwd getdents
    getdents64 getegid geteuid getgid getgroups getpeername getpgrp getpid getppid getrandom
    getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr kill
    lgetxattr listen listxattr llistxattr lseek lstat madvise membarrier mincore mmap mprotect
    mremap munmap name_to_handle_at nanosleep newfstatat open_by_handle_at open_tree pidfd_getfd
    pidfd_open pidfd_send_signal pipe pipe2 poll ppoll prctl pread64 preadv prlimit64 pselect6 read
    readahead readlink readlinkat readv recvfrom recvmmsg recvmsg restart_syscall rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait
    sched_getaffinity sched_getparam sched_getscheduler sched_setaffinity sched_yield select sendmsg
    sendto set_robust_list set_tid_address setitimer setpgid setpriority setrlimit setsid setsockopt
    shutdown sigaltstack signalfd4 socket socketpair stat statfs statx sync sync_file_range syncfs
    sysinfo tgkill time timerfd_create timerfd_gettime timerfd_settime umask uname vfork wait4
    waitid
""".split()  # noqa: SIM905
_WRITING = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile")
"""Change something only if they write to a file, and not to a pipe, socket, eventfd or device."""
_OPENING = ("open", "openat", "openat2")
_READING_IOCTLS = frozenset(
    {
        0x5401,  # TCGETS, by which Python asks whether a file is a terminal
        0x5421,  # FIONBIO
        0x5451,  # FIOCLEX
        0x80111500,  # FS_IOC_GETFSUUID
    }
)
_CREATING = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)

_LIFE_SECONDS = 60
"""A little less than a test may take."""

_ALLOW = 0x7FFF0000
_NOTIFY = 0x7FC00000
_NOTIF_RECV = 0xC0502100
_NOTIF_SEND = 0xC0182101
_CONTINUE = 1
_NOTIFICATION = struct.Struct("QIIiIQ6Q")
_RESPONSE = struct.Struct("QqiI")


class Lived(NamedTuple):
    """How far a process got."""

    calls: tuple[str, ...]
    """Names of the changing system calls, in order; the last one was not made if it died."""
    died: bool


class _Call(NamedTuple):
    process: int
    number: int
    arguments: tuple[int, ...]


class _Seccomp:
    """libseccomp, which knows the numbers of system calls on every architecture."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        library.seccomp_init.restype = ctypes.c_void_p
        library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
        self._library = library
        self._names: dict[int, str] = {}

    def number(self, name: str) -> int:
        """Return the system call's number on this machine; negative where there is none."""
        return int(self._library.seccomp_syscall_resolve_name(name.encode()))

    def name(self, number: int) -> str:
        """Return the system call's name."""
        if number not in self._names:
            text = self._library.seccomp_syscall_resolve_num_arch(0, number)
            self._names[number] = ctypes.string_at(text).decode()
        return self._names[number]

    def load(self) -> int:
        """Have this process announce what it does; return the descriptor that tells of it."""
        context = ctypes.c_void_p(self._library.seccomp_init(_NOTIFY))
        for name in _READING:
            number = self.number(name)
            if number >= 0:
                failed = self._library.seccomp_rule_add_array(
                    context, ctypes.c_uint(_ALLOW), number, 0, None
                )
                assert not failed, name
        failed = self._library.seccomp_load(context)
        assert not failed, os.strerror(-failed)
        return int(self._library.seccomp_notify_fd(context))


_seccomp = _Seccomp()


def run(
    action: Callable[[T], object], prepare: Callable[[], T], *, die_at: int | None = None
) -> Lived:
    """Run `action` on what `prepare` returns, both in a forked process.

    With `die_at`, that is killed before the change of that number which `action` makes, counted
    from 0. Fails if either raises.
    """
    ours, theirs = socket.socketpair()
    with ExitStack() as undo:
        undo.enter_context(ours)
        child = _fork()
        if child == 0:
            _act(action, prepare, theirs)
        undo.callback(_end, child)
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        assert descriptors, "the process ended before it had begun"
        undo.callback(os.close, descriptors[0])
        return _supervise(child, descriptors[0], die_at)


def _fork() -> int:
    with warnings.catch_warnings():
        # Threads that an earlier test has left idle are none of the child's.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _act(action: Callable[[T], object], prepare: Callable[[], T], parent: socket.socket) -> None:
    status = 1
    try:
        signal.alarm(_LIFE_SECONDS)
        prepared = prepare()
        listener = _seccomp.load()
        socket.send_fds(parent, [b"!"], [listener])
        os.close(listener)
        action(prepared)
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def _end(child: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _supervise(child: int, listener: int, die_at: int | None) -> Lived:
    calls: list[str] = []
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    while True:
        ((_, event),) = waiting.poll()
        if not event & select.POLLIN:  # hung up: all that the filter was for has ended
            _, status = os.waitpid(child, 0)
            assert status == 0, "the action failed; see its traceback"
            return Lived(tuple(calls), died=False)
        notification = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _NOTIF_RECV, notification)
        except FileNotFoundError:  # its caller has ended meanwhile
            continue
        identity, process, _, number, _, _, *arguments = _NOTIFICATION.unpack(notification)
        if _changes(_Call(process, number, tuple(arguments))):
            calls.append(_seccomp.name(number))
            if len(calls) - 1 == die_at:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Lived(tuple(calls), died=True)
        with suppress(FileNotFoundError):  # its process has ended by itself meanwhile
            fcntl.ioctl(listener, _NOTIF_SEND, _RESPONSE.pack(identity, 0, 0, _CONTINUE))


def _changes(call: _Call) -> bool:
    """Say whether an announced call can change what others find when its caller is gone."""
    name = _seccomp.name(call.number)
    if name in _WRITING:
        return stat.S_ISREG(os.stat(f"/proc/{call.process}/fd/{call.arguments[0]}").st_mode)
    if name in _OPENING:
        return bool(_open_flags(name, call) & _CREATING)
    if name == "ioctl":
        return call.arguments[1] & 0xFFFFFFFF not in _READING_IOCTLS
    return True


def _open_flags(name: str, call: _Call) -> int:
    if name == "open":
        return call.arguments[1]
    if name == "openat":
        return call.arguments[2]
    with open(f"/proc/{call.process}/mem", "rb", buffering=0) as memory:
        memory.seek(call.arguments[2])  # struct open_how
        return int.from_bytes(memory.read(8), sys.byteorder)
