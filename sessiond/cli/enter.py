"""Enter a session: its root with the host's /dev, /proc, /sys and /run, as its user.

The tree is under the control of the session's user, and this runs as root. So: nothing in it is
followed or believed (the user's record and groups are the host's), and nothing of it is loaded
before the privileges are gone. It is a working place, no jail: a session of root's is root.

Everything here happens in a child process made for it, with one thread.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from sessiond.errors import Failed, NotSupported
from sessiond.words import _

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000

# /run first: the merged view is usually below it, and would be cloned with what is mounted there.
_FROM_HOST = ("run", "dev", "proc", "sys")

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT_VARIABLES = ("TERM", "COLORTERM", "LANG", "LANGUAGE", "TZ")

COMMAND_NOT_EXECUTABLE, COMMAND_NOT_FOUND = 126, 127
"""Exit codes when the command cannot be run, as shells have them."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Account:
    """A user as the host knows them."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str

    @classmethod
    def of(cls, uid: int) -> Account:
        """Look `uid` up on the host. Raises `Failed` when it has no such user."""
        try:
            record = pwd.getpwuid(uid)
        except KeyError:
            sentence = _("This machine has no user with the id {uid}; create it, then try again.")
            raise Failed(sentence.format(uid=uid)) from None
        return cls(
            name=record.pw_name,
            uid=uid,
            gid=record.pw_gid,
            groups=tuple(os.getgrouplist(record.pw_name, record.pw_gid)),
            home=record.pw_dir,
            shell=record.pw_shell or "/bin/sh",
        )


def enter(root: str, account: Account, program: str, arguments: Sequence[str]) -> NoReturn:
    """Become `program` with `arguments` (its name first) in the merged view mounted at `root`.

    `program` without a slash is searched for in the session's PATH. Raises `Failed` or
    `NotSupported` when the session cannot be entered, `OSError` when the program cannot be run.
    """
    environment = _environment(account, os.environ)
    try:
        _change_root(root)
        _drop_privileges(account)
    except OSError as error:
        sentence = _("The session's root {root} cannot be entered: {reason}.")
        raise Failed(sentence.format(root=root, reason=error.strerror)) from error
    try:
        os.chdir(account.home)
    except OSError:
        os.chdir("/")  # as login(1) does: one may enter to find out what became of the home
    os.umask(0o022)
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    os.closerange(3, 2**31 - 1)
    os.execvpe(program, list(arguments), environment)


def _change_root(root: str) -> None:
    _unshare_mounts()
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    for name in _FROM_HOST:
        _bind(name, root_fd)
    os.fchdir(root_fd)
    os.chroot(".")
    os.close(root_fd)


def _unshare_mounts() -> None:
    if _libc.unshare(_CLONE_NEWNS) != 0:
        _fail(_("A mount namespace cannot be made: {reason}."), ctypes.get_errno())
    # Slave rather than private: what the host unmounts, a closed session's root for one, goes here
    # too, instead of being kept alive by this namespace.
    _mount(None, "/", _MS_REC | _MS_SLAVE)


def _bind(name: str, root_fd: int) -> None:
    """Mount the host's /`name` on the directory `name` of the session, which may have none.

    One component and O_NOFOLLOW: the descriptor is a directory of the merged view itself, whatever
    the user puts there meanwhile, and the mount goes onto that descriptor rather than onto a path.
    """
    try:
        target = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root_fd)
    except FileNotFoundError:
        return
    except OSError as error:
        sentence = _(
            "{path} of the session is no directory ({reason}), so the host's cannot be mounted "
            "there. Reset the session, or restore a snapshot of it."
        )
        raise NotSupported(sentence.format(path=f"/{name}", reason=error.strerror)) from error
    try:
        _mount(f"/{name}", f"/proc/self/fd/{target}", _MS_BIND | _MS_REC)
    finally:
        os.close(target)


def _mount(source: str | None, target: str, flags: int) -> None:
    encoded = None if source is None else os.fsencode(source)
    if _libc.mount(encoded, os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        sentence = (
            _("Mount propagation cannot be set up for the session: {reason}.")
            if source is None
            else _("{path} cannot be mounted in the session: {reason}.")
        )
        _fail(sentence, ctypes.get_errno(), path=source)


def _fail(sentence: str, number: int, **named: str | None) -> NoReturn:
    raise Failed(sentence.format(reason=os.strerror(number), **named))


def _drop_privileges(account: Account) -> None:
    # Between chroot and here nothing may be looked up: name services, locales and Python modules
    # would come from the session's tree, with root's rights.
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


def _environment(account: Account, caller: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in caller.items()
        if name in _KEPT_VARIABLES or name.startswith("LC_")
    }
    return kept | {
        "HOME": account.home,
        "LOGNAME": account.name,
        "PATH": _PATH,
        "SHELL": account.shell,
        "USER": account.name,
    }
