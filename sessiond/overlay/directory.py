"""Changes to directories: create, link, unlink, rmdir and rename.

Each is prepared in the workdir and published by one system call on the upper, so that a crash
leaves the merged view as it was before or as it is after (fs/overlayfs/dir.c, which this follows).
What a change replaces lands in the workdir and is removed there.

Preconditions of all: the directories given are linked and of the current generation, names have
been looked up, and the kernel or the caller has checked permissions.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sessiond.overlay import orphans, syscalls
from sessiond.overlay.copy_up import (
    copy_up,
    copy_up_name,
    count_from_upper,
    drop_index,
    locate,
    mark_impure,
    may_have_names,
    must_index,
)
from sessiond.overlay.keep import is_way, seen_by
from sessiond.overlay.lookup import Presence, covered, join
from sessiond.overlay.nodes import EXCHANGE_FACT, Node, Remains, pack_identity
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.workdir import Workdir
from sessiond.overlay.xattrs import OverlayXattrs, copy_attributes, default_acl, set_default_acl

_REDIRECT_LIMIT = 256  # OVL_REDIRECT_MAX


class NewObject(NamedTuple):
    """What is to be created: a complete ``st_mode``, its owner, and what its type needs besides."""

    mode: int
    uid: int
    gid: int
    umask: int = 0
    """Takes bits off the mode, unless the directory has a default ACL (acl(5))."""
    device: int = 0
    target: bytes = b""


class Place(NamedTuple):
    """One end of a rename: a name, and the node that has it, if any."""

    parent: Node
    name: bytes
    node: Node | None
    presence: Presence


def _upper_name(stack: Stack, parent: Node, name: bytes) -> At:
    return At(stack.writable.directory(parent.path), name)


def create(stack: Stack, parent: Node, name: bytes, presence: Presence, new: NewObject) -> int:
    """Create an object at a free name. Return a descriptor of a regular file, -1 of anything else.

    The group, default ACL and setgid bit of the parent are inherited as the upper's file system
    does it. What this process owns is whole from the start, so it is made where it belongs.
    """
    work = stack.workdir
    copy_up(stack, parent)
    target = _upper_name(stack, parent, name)
    own = new.uid == os.geteuid() and new.gid == os.getegid()
    if own and presence is not Presence.WHITEOUT:
        return syscalls.with_umask(new.umask, lambda: _make(target, new))
    fd = -1
    try:
        with _nursery(work, target.directory) as (prepared, inherits_group):
            fd = syscalls.with_umask(new.umask, lambda: _make(prepared, new))
            if not own:
                _own(prepared, fd, new, inherits_group=inherits_group)
            if presence is not Presence.WHITEOUT:
                syscalls.rename(prepared, target, syscalls.RENAME_NOREPLACE)
            elif modes.S_ISDIR(new.mode):
                syscalls.setxattr(prepared, stack.xattrs.opaque, b"y")
                syscalls.rename(prepared, target, syscalls.RENAME_EXCHANGE)
                syscalls.unlink(prepared)
            else:
                syscalls.rename(prepared, target)
    except BaseException:
        if fd >= 0:
            syscalls.close(fd)
        raise
    return fd


def create_anonymous(stack: Stack, parent: Node, new: NewObject) -> int:
    """Create a regular file that has no name; return a descriptor of it."""
    copy_up(stack, parent)
    directory = stack.writable.directory(parent.path)
    with _nursery(stack.workdir, directory) as (prepared, inherits_group):
        fd = syscalls.with_umask(
            new.umask, lambda: syscalls.create_anonymous(prepared.directory, new.mode & 0o7777)
        )
        try:
            _own(prepared, fd, new, inherits_group=inherits_group)
        except BaseException:
            syscalls.close(fd)
            raise
    return fd


@contextmanager
def _nursery(work: Workdir, parent: int) -> Iterator[tuple[At, bool]]:
    """Hand out a name in a directory that gives new entries what the directory `parent` would give
    them, and whether that includes the group.

    That is the workdir itself for most; for a setgid directory, or one with a default ACL, a
    directory made like it. So inheritance is the file system's, never computed here.
    """
    at = At(parent, b"")
    stat = syscalls.stat(at)
    acl = default_acl(at)
    if not stat.st_mode & modes.S_ISGID and acl is None:
        with work.publishing() as prepared:
            yield prepared, False
        return
    with work.preparing() as nursery:
        syscalls.mkdir(nursery, 0o700)
        if acl is not None:
            set_default_acl(nursery, acl)
        if stat.st_mode & modes.S_ISGID:
            syscalls.chown(nursery, 0, stat.st_gid)
            syscalls.chmod(nursery, 0o2700)
        fd = syscalls.open_path(nursery)
        try:
            yield At(fd, b"new"), bool(stat.st_mode & modes.S_ISGID)
        finally:
            syscalls.close(fd)


def _make(at: At, new: NewObject) -> int:
    permissions = new.mode & 0o7777
    if modes.S_ISREG(new.mode):
        return syscalls.create_file(at, permissions)
    if modes.S_ISDIR(new.mode):
        syscalls.mkdir(at, permissions)
    elif modes.S_ISLNK(new.mode):
        syscalls.symlink(at, new.target)
    else:
        syscalls.mknod(at, new.mode, new.device)
    return -1


def _own(at: At, fd: int, new: NewObject, *, inherits_group: bool) -> None:
    made = fd if fd >= 0 else at
    syscalls.chown(made, new.uid, -1 if inherits_group else new.gid)
    special = new.mode & (modes.S_ISUID | modes.S_ISGID)
    if special and not modes.S_ISDIR(new.mode):  # chown(2) has cleared them
        syscalls.chmod(made, modes.S_IMODE(syscalls.stat(made).st_mode) | special)


def link(stack: Stack, node: Node, parent: Node, name: bytes, presence: Presence) -> None:
    """Give `node` another name. Raises ENOENT if it has none any more, as linkat(2) does."""
    work = stack.workdir
    if not node.linked:
        _name_anonymous(stack, node, parent, name, presence)
        return
    copy_up(stack, node)
    copy_up(stack, parent)
    mark_impure(stack, parent)
    count_from_upper(stack, node)
    if presence is Presence.WHITEOUT:
        with work.publishing() as prepared:
            syscalls.link(locate(stack, node), prepared)
            syscalls.rename(prepared, _upper_name(stack, parent, name))
    else:
        syscalls.link(locate(stack, node), _upper_name(stack, parent, name))
    node.add_link(parent, name, in_upper=True)


def _name_anonymous(
    stack: Stack, node: Node, parent: Node, name: bytes, presence: Presence
) -> None:
    """Give a file its first name. The file system refuses one that has had a name (I_LINKABLE)."""
    if node.anchor < 0 or not node.upper or node.gone:
        raise syscalls.failure(errno.ENOENT)
    copy_up(stack, parent)
    with stack.workdir.preparing() as prepared:
        syscalls.link_descriptor(node.anchor, prepared)
        flags = 0 if presence is Presence.WHITEOUT else syscalls.RENAME_NOREPLACE
        syscalls.rename(prepared, _upper_name(stack, parent, name), flags)
    node.add_link(parent, name, in_upper=True)
    node.drop_anchor()


def unlink(stack: Stack, node: Node, parent: Node, name: bytes) -> None:
    """Remove a name of a file. Who holds the file goes on using it, through its anchor."""
    work = stack.workdir
    stat = syscalls.stat(locate(stack, node))
    _settle_name(stack, node, parent, name, stat)
    copy_up(stack, parent)
    target = _upper_name(stack, parent, name)
    in_upper = node.links[parent, name]
    hide = in_upper and covered(stack, seen_by(stack, parent), name)
    count_from_upper(stack, node)
    _keep_in_reach(stack, node, stat)
    if not in_upper:
        work.make_whiteout(target)
    elif hide:
        with work.publishing() as whiteout:
            work.make_whiteout(whiteout)
            syscalls.rename(whiteout, target)
    else:
        syscalls.unlink(target)
    node.drop_link(parent, name)
    drop_index(stack, node)


@contextmanager
def _removing(stack: Stack, parent: Node, name: bytes, *, in_upper: bool) -> Iterator[None]:
    """Remove a file's name on the way out; what may fail for want of space is done before."""
    work = stack.workdir
    copy_up(stack, parent)
    target = _upper_name(stack, parent, name)
    if in_upper and not covered(stack, seen_by(stack, parent), name):
        yield
        syscalls.unlink(target)
        return
    with work.publishing() as whiteout:
        work.make_whiteout(whiteout)
        yield
        syscalls.rename(whiteout, target)


def carry(stack: Stack, old: Place, new_stack: Stack, new: Place, limit: int) -> os.stat_result:
    """Move a file to a name that belongs to other layers: a copy of it takes that name, as in a
    rename, and then the old name goes. Who dies in between leaves both.

    Return the stat(2) of the copy; the caller binds the node to it. Raises OSError: EISDIR; EXDEV,
    upon which mv(1) copies, for a file of more than `limit` bytes, with more than one name, or that
    is being written past the overlay.
    """
    node = old.node
    assert node is not None
    source = locate(stack, node)
    stat = syscalls.stat(source)
    if (
        node.index is not None
        or may_have_names(stack, node, stat)
        or node.writers
        or node.kept >= 0
        or (modes.S_ISREG(node.kind) and stat.st_size > limit)
    ):
        raise syscalls.failure(errno.EXDEV)
    if new.node is not None:
        check_replaceable(node, new.node)
    in_upper = node.links[old.parent, old.name]
    with _removing(stack, old.parent, old.name, in_upper=in_upper):
        copy_up(new_stack, new.parent)
        with new_stack.workdir.publishing() as prepared:
            contents = node.data_lower().at() if node.metacopy else source
            copy_object(contents, source, prepared, new_stack.xattrs)
            if new.node is not None:
                _prepare_replacement(new_stack, new_stack.workdir, new)
            _announce(node, new)
            target = _upper_name(new_stack, new.parent, new.name)
            syscalls.rename(prepared, target)
            # Before the old name goes, which may be on another disk.
            syscalls.fsync_directory(target.directory)
        if new.node is not None:
            new.node.drop_link(new.parent, new.name)
            drop_index(new_stack, new.node)
    node.drop_link(old.parent, old.name)
    return syscalls.stat(_upper_name(new_stack, new.parent, new.name))


def copy_object(
    contents: At,
    source: At,
    target: At,
    xattrs: OverlayXattrs,
    cancelled: Callable[[], bool] = lambda: False,
    *,
    on_disk: bool = True,
) -> None:
    """Make `target` a copy of a file; `contents`: where its data is.

    With `on_disk`, the data is there when this returns. Raises OSError: ECANCELED soon after
    `cancelled` has begun to return True.
    """
    stat = syscalls.stat(source)
    if not modes.S_ISREG(stat.st_mode):
        if modes.S_ISLNK(stat.st_mode):
            syscalls.symlink(target, syscalls.readlink(source))
        else:
            syscalls.mknod(target, modes.S_IFMT(stat.st_mode) | 0o600, stat.st_rdev)
        copy_attributes(source, target, stat, xattrs)
        return
    file, copy = syscalls.open_file(contents, os.O_RDONLY), -1
    try:
        copy = syscalls.create_file(target, 0o600)
        syscalls.copy_data(file, copy, stat.st_size, cancelled)
        copy_attributes(source, copy, stat, xattrs)
        if on_disk:
            syscalls.fsync(copy)
    finally:
        for fd in (file, copy):
            if fd >= 0:
                syscalls.close(fd)


def _keep_in_reach(stack: Stack, node: Node, stat: os.stat_result) -> None:
    """Provide for what holds the file `node` if the name that is about to go is its last one.

    An anchor keeps the inode, and its space, until the kernel forgets it, which may be after the
    program's next call. So a regular file that nobody has open gets none, unless it has other
    names that are unknown here, or somebody is about to open it (`Node.wanted`).
    """
    if len(node.links) > 1 or node.index is not None:
        return
    idle = not node.is_open and not node.wanted
    if modes.S_ISREG(node.kind) and idle and stat.st_nlink == 1:
        (link,) = node.links
        node.remains = Remains(stat, link)
    else:
        orphans.anchor(stack, node, locate(stack, node))


def rmdir(stack: Stack, node: Node, parent: Node, name: bytes) -> None:
    """Remove a directory. Precondition: the merged view of it has no entry."""
    work = stack.workdir
    copy_up(stack, parent)
    orphans.anchor(stack, node, locate(stack, node))
    target = _upper_name(stack, parent, name)
    path = parent.child_path(name)
    if not node.upper:
        work.make_whiteout(target)
    elif covered(stack, seen_by(stack, parent), name):
        with work.preparing() as whiteout:
            work.make_whiteout(whiteout)
            syscalls.rename(whiteout, target, syscalls.RENAME_EXCHANGE)
    else:
        _remove_empty(work, target)
    stack.writable.forget(path)
    node.drop_link(parent, name)


def _remove_empty(work: Workdir, target: At) -> None:
    """Remove an upper directory that has nothing but, perhaps, whiteouts."""
    try:
        syscalls.rmdir(target)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        with work.preparing() as aside:
            syscalls.rename(target, aside)


def rename(stack: Stack, old: Place, new: Place) -> None:
    """Move `old.node` to `new`, replacing a file, or a directory, which must be empty, there.

    Raises OSError: EISDIR, ENOTDIR; EXDEV for a directory of a lower where redirects
    cannot be written, upon which mv(1) copies.
    """
    work = stack.workdir
    node = old.node
    assert node is not None
    if new.node is node:  # two names of one file: nothing to do (rename(2))
        return
    if new.node is not None:
        check_replaceable(node, new.node)
    _bring_up(stack, old)
    copy_up(stack, new.parent)
    if new.node is not None:
        _prepare_replacement(stack, work, new)
    _prepare_move(stack, node, new)
    hide = _hides_lower(stack, old)
    _announce(node, new)
    source = _upper_name(stack, old.parent, old.name)
    target = _upper_name(stack, new.parent, new.name)
    if hide and new.presence is Presence.WHITEOUT:
        syscalls.rename(source, target, syscalls.RENAME_EXCHANGE)  # the two whiteouts change places
    elif hide:
        syscalls.rename(source, target, syscalls.RENAME_WHITEOUT)
    elif node.is_directory and new.presence is Presence.WHITEOUT:
        syscalls.rename(source, target, syscalls.RENAME_EXCHANGE)
        syscalls.unlink(source)
    else:
        syscalls.rename(source, target)
    if new.node is not None:
        new.node.drop_link(new.parent, new.name)
        drop_index(stack, new.node)
        node.wanted += new.node.wanted
    _leave(stack, node, old)
    node.add_link(new.parent, new.name, in_upper=True)


def exchange(stack: Stack, old: Place, new: Place) -> None:
    """Let two names change places (RENAME_EXCHANGE)."""
    first, second = old.node, new.node
    assert first is not None
    assert second is not None
    if first is second:
        return
    _bring_up(stack, old)
    _bring_up(stack, new)
    _prepare_move(stack, first, new)
    _prepare_move(stack, second, old)
    _announce(first, new)
    _announce(second, old)
    first.fast_path.note(0, EXCHANGE_FACT, pack_identity(first.real))
    syscalls.rename(
        _upper_name(stack, old.parent, old.name),
        _upper_name(stack, new.parent, new.name),
        syscalls.RENAME_EXCHANGE,
    )
    _leave(stack, first, old)
    _leave(stack, second, new)
    first.add_link(new.parent, new.name, in_upper=True)
    second.add_link(old.parent, old.name, in_upper=True)
    first.fast_path.note(0, EXCHANGE_FACT, b"")


def _bring_up(stack: Stack, place: Place) -> None:
    node = place.node
    assert node is not None
    if node.index is not None or not node.upper:
        stat = syscalls.stat(locate(stack, node))
        _settle_name(stack, node, place.parent, place.name, stat)
    copy_up(stack, node)


def _settle_name(stack: Stack, node: Node, parent: Node, name: bytes, stat: os.stat_result) -> None:
    """Get the name of a lower hard link into the upper, so that its going changes the count with
    it. `stat`: the node's stat(2).
    """
    if node.index is not None or must_index(stack, node, stat):
        copy_up_name(stack, node, parent, name)


def check_replaceable(node: Node, replaced: Node) -> None:
    if replaced.is_directory and not node.is_directory:
        raise syscalls.failure(errno.EISDIR)
    if node.is_directory and not replaced.is_directory:
        raise syscalls.failure(errno.ENOTDIR)


def _prepare_replacement(stack: Stack, work: Workdir, place: Place) -> None:
    """Get what is about to be replaced ready to go in one step."""
    node = place.node
    assert node is not None
    if not node.is_directory:
        stat = syscalls.stat(locate(stack, node))
        _settle_name(stack, node, place.parent, place.name, stat)
        count_from_upper(stack, node)
        _keep_in_reach(stack, node, stat)
        return
    if node.upper and syscalls.scan(stack.writable.directory(node.path)):
        _clear(stack, work, node, _upper_name(stack, place.parent, place.name))
    orphans.anchor(stack, node, locate(stack, node))
    stack.writable.forget(node.path)


def _clear(stack: Stack, work: Workdir, node: Node, target: At) -> None:
    """Replace an upper directory that has only whiteouts by an opaque, really empty one
    (ovl_clear_empty).
    """
    with work.preparing() as empty:
        syscalls.mkdir(empty, 0o700)
        copy_attributes(target, empty, syscalls.stat(target), stack.xattrs)
        syscalls.setxattr(empty, stack.xattrs.opaque, b"y")
        syscalls.rename(empty, target, syscalls.RENAME_EXCHANGE)
    stack.writable.forget(node.path)
    node.lowers = ()


def _prepare_move(stack: Stack, node: Node, new: Place) -> None:
    """Mark what moves, so that at its new name it merges with the same lowers and no others."""
    mark_impure(stack, new.parent)
    if not node.is_directory:
        return
    if node.lowers:
        _set_redirect(stack, node, new.parent)
    elif _hides_lower(stack, new):
        syscalls.setxattr(locate(stack, node), stack.xattrs.opaque, b"y")


def _hides_lower(stack: Stack, place: Place) -> bool:
    """Say whether a lower would show through if the upper had nothing at `place`."""
    if place.presence is Presence.LOWER:
        return True
    return place.presence is not Presence.ABSENT and covered(
        stack, seen_by(stack, place.parent), place.name
    )


def _set_redirect(stack: Stack, node: Node, parent: Node) -> None:
    """Have a directory merge with the same lowers under a name in `parent` (ovl_set_redirect).

    It does so under its present name as well, in case that a crash keeps it from being moved.
    """
    if stack.options.user_xattrs:
        raise syscalls.failure(errno.EXDEV)
    at = locate(stack, node)
    present = syscalls.getxattr(at, stack.xattrs.redirect) or b""
    if present.startswith(b"/") or (present and parent is node.parent):
        return
    value = _own_name(node) if parent is node.parent else _path_below(stack, node)
    if len(value) > _REDIRECT_LIMIT:
        raise syscalls.failure(errno.EXDEV)
    syscalls.setxattr(at, stack.xattrs.redirect, value)


def _path_below(stack: Stack, node: Node) -> bytes:
    """Return the absolute path at which the layers below the upper show a directory that is in the
    upper (ovl_get_redirect).

    Not its path in one of these layers: another one above that may have renamed what is on the way.
    """
    path = b""
    while not node.is_root and not path.startswith(b"/"):
        moved = not is_way(stack, node) and syscalls.getxattr(
            locate(stack, node), stack.xattrs.redirect
        )
        name = moved or _own_name(node)
        path = join(name, path) if path else name
        node = node.parent
    return path if path.startswith(b"/") else b"/" + path


def _own_name(directory: Node) -> bytes:
    ((_, name),) = directory.links
    return name


def _announce(node: Node, new: Place) -> None:
    """Tell a successor where else to look, should this process die while the node moves."""
    node.fast_path.placed(node.number, node.kind, new.parent.number, new.name)


def _leave(stack: Stack, node: Node, old: Place) -> None:
    """Forget a name that a node has no more."""
    if node.is_directory:
        stack.writable.forget_tree(node.path)
    node.drop_link(old.parent, old.name)
