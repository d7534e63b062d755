"""Extended attributes: the overlay's own, and how the merged view hides and escapes them.

The names and values are those of the kernel (fs/overlayfs/overlayfs.h, enum ovl_xattr). An
attribute of that prefix that is set through the merged view belongs to a nested overlay: it is
stored with ``overlay.`` inserted after the prefix (ovl_xattr_escape_name, Linux 6.7) and shown
without.
"""

from __future__ import annotations

import errno
import os

from sessiond.overlay import syscalls
from sessiond.overlay.syscalls import At, Object

CAPABILITY = b"security.capability"

_ESCAPE = b"overlay."
_MUST_COPY = (b"security.", b"system.posix_acl_")
_DEFAULT_ACL = b"system.posix_acl_default"


class OverlayXattrs:
    """Names of the overlay's own attributes under ``trusted.overlay.`` or ``user.overlay.``."""

    def __init__(self, *, user: bool = False) -> None:
        self.prefix = b"user.overlay." if user else b"trusted.overlay."
        self.opaque = self.prefix + b"opaque"
        self.redirect = self.prefix + b"redirect"
        self.origin = self.prefix + b"origin"
        self.impure = self.prefix + b"impure"
        self.nlink = self.prefix + b"nlink"
        self.metacopy = self.prefix + b"metacopy"
        self.whiteout = self.prefix + b"whiteout"
        self._escaped = self.prefix + _ESCAPE

    def stored(self, name: bytes) -> bytes:
        """Return the name under which the merged view's attribute `name` is stored in a layer."""
        if name.startswith(self.prefix):
            return self._escaped + name[len(self.prefix) :]
        return name

    def shown(self, names: list[bytes]) -> list[bytes]:
        """Return the names that the merged view shows of those stored in a layer."""
        return [self._unescaped(name) for name in names if not self.is_own(name)]

    def own(self, at: Object) -> list[bytes]:
        """Return the names of the overlay's own attributes that an object of a layer has.

        One call answers for all of them, and most objects have none.
        """
        return [name for name in syscalls.listxattr(at) if self.is_own(name)]

    def is_own(self, name: bytes) -> bool:
        return name.startswith(self.prefix) and not name.startswith(self._escaped)

    def _unescaped(self, name: bytes) -> bytes:
        if name.startswith(self._escaped):
            return self.prefix + name[len(self._escaped) :]
        return name

    def copy(self, source: Object, target: Object) -> None:
        """Copy all attributes but the overlay's own, ACLs included.

        What the target's file system does not support is left out, except ACLs and ``security.``
        attributes, without which the copy would be less protected (ovl_copy_xattr).
        """
        for name in syscalls.listxattr(source):
            if self.is_own(name):
                continue
            value = syscalls.getxattr(source, name)
            if value is None:
                continue
            try:
                syscalls.setxattr(target, name, value)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or name.startswith(_MUST_COPY):
                    raise


def copy_attributes(
    source: Object, target: Object, stat: os.stat_result, xattrs: OverlayXattrs
) -> None:
    """Give `target` the xattrs, owner, mode and times of `source`, whose stat(2) is `stat`."""
    syscalls.chown(target, stat.st_uid, stat.st_gid)
    xattrs.copy(source, target)  # after chown(2), which drops security.capability
    if not is_symlink(stat.st_mode):
        syscalls.chmod(target, stat.st_mode & 0o7777)
    syscalls.utime(target, stat.st_atime_ns, stat.st_mtime_ns)


def is_symlink(mode: int) -> bool:
    return mode & 0o170000 == 0o120000


def default_acl(directory: At) -> bytes | None:
    """Return the ACL that new entries of `directory` inherit."""
    if _DEFAULT_ACL not in syscalls.listxattr(directory):  # cheaper than asking for it in vain
        return None
    return syscalls.getxattr(directory, _DEFAULT_ACL)


def set_default_acl(directory: At, acl: bytes) -> None:
    syscalls.setxattr(directory, _DEFAULT_ACL, acl)
