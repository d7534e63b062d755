"""Mount points: where a session's merged view may be mounted, and what has to be there.

The daemon mounts as root. So nobody but root may be able to replace any part of the path: else a
user could lead a mount over any directory of the machine.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sessiond.errors import Failed
from sessiond.session.faults import explained
from sessiond.session.model import Uid
from sessiond.session.mounts import Mounts


def resolve(path: Path) -> Path:
    """Return `path` without symlinks, after checking that only root can change where it leads.

    The last part may be missing. Raises `Failed` when there is no directory for it, or a part of
    the path is under a user's control.
    """
    return resolve_trusted(path, f"mount point {path}", "Choose another mount_point.")


def resolve_trusted(path: Path, what: str, hint: str) -> Path:
    """The same for a path that is not to be mounted at; `what` it is, and what to do instead."""
    _require_trusted(path, what, hint)
    with explained(f"use the {what}"):
        resolved = path.parent.resolve(strict=True) / path.name
        if resolved.is_symlink():
            resolved = resolved.resolve(strict=True)
    _require_trusted(resolved, what, hint)
    return resolved


def _require_trusted(path: Path, what: str, hint: str) -> None:
    trusted = {0, os.geteuid()}
    for directory in reversed(path.parents):
        with explained(f"use the {what}"):
            inode = directory.stat()
        # In a sticky directory none may replace another's name; but whoever is first makes it.
        sticky = inode.st_mode & stat.S_ISVTX and directory != path.parent
        open_to_all = inode.st_mode & 0o022 and not sticky
        if inode.st_uid not in trusted or open_to_all:
            raise Failed(
                f"The {what} cannot be used: others than root may write to {directory}, and so "
                f"could lead it elsewhere. {hint}"
            )


def prepare(path: Path, uid: Uid, mounts: Mounts) -> None:
    """Make sure that `path` is a directory with nothing mounted on it; one that is made is `uid`'s.

    Raises `Failed`.
    """
    kind = mounts.file_system(path)
    if kind is not None:
        raise Failed(
            f"The mount point {path} is in use: a {kind} is mounted there. Unmount it, or choose "
            "another mount_point."
        )
    with explained(f"prepare the mount point {path}"):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not path.is_dir():
                raise
        else:
            os.chown(path, uid, -1)
