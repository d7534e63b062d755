"""Which layers are served, and by which rules names are kept, while programs work in the view.

Nodes find their new place when they are used next. What cannot wait is done here: files that are
open, and that programs write past the overlay, must not be lost to those who have them; and the
caller has to know what to tell the kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as modes
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.copy_up import locate
from sessiond.overlay.directory import NewObject
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Identity
from sessiond.overlay.nodes import ROOT_NUMBER, Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.writers import Halt, MovingFile, is_written, settle
from sessiond.overlay.xattrs import copy_attributes

log = logging.getLogger(__name__)

_SPARE_DESCRIPTORS = 256
_VANISHED_LIMIT = 1000
"""How many directories are looked for in new layers while all wait."""


class Outdated(NamedTuple):
    """What the kernel may know that is of earlier layers."""

    names: list[tuple[int, bytes]]
    """Found or missing: number of the directory, and name in it. Not those below `vanished`."""
    directories: list[int]
    """Numbers; their attributes and listings."""
    vanished: list[tuple[int, bytes, int]]
    """Directories that are gone with all that was in them: names, which are among `names`, and
    their own numbers.
    """
    below: set[int]
    """Numbers of these directories, and of those that were in them."""
    inexact: tuple[bytes, ...] = ()
    """Paths of files in the layer that was frozen that are of another moment than the rest of it:
    they were written to while they were copied.
    """


class HalfDoneError(Exception):
    """An exchange of layers could not be completed, nor undone: neither these layers nor those
    before are what this process may serve. A successor goes on with those before.
    """


class Exchange:
    """Gives an overlay other layers, or rules."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._view = overlay.view
        self._pending = overlay.pending
        self._moved: list[Node] = []
        """Files that the last exchange of layers has moved from one upper to the next."""

    # The session's layers

    def swap(
        self,
        stack: Stack,
        *,
        moved: bool = False,
        retained: bool = False,
        halt: Halt | None = None,
    ) -> Outdated:
        """Serve `stack` instead of the present layers, which are closed.

        Nodes find their new place when they are used next. Files that are open and not in the new
        layers go on as unlinked ones. `moved`: the new layers are copies of the present ones, so
        files that are open go on in them. `retained`: the new upper has other names of files of the
        present one, which pending ones have been renewed in. `halt`: programs that stand still,
        until files that they write have been copied. The caller tells the kernel what it knows that
        is out of date.

        Raises OSError, with nothing changed; `HalfDoneError`.
        """
        self.settle()
        if not retained:  # a new copy would not get the names in the new upper
            self._pending.renew_all()
        opened = self._opened()
        moving, inexact = ([], ()) if moved else self._copy_writers(opened, stack, halt)
        if moved:
            self._pending.keep(opened)
        with no_way_back():
            outdated = self._serve(stack, opened, moving, moved=moved)
        return outdated._replace(inexact=inexact)

    def _serve(
        self, stack: Stack, opened: list[Node], moving: list[MovingFile], *, moved: bool
    ) -> Outdated:
        """Do what `swap` has prepared."""
        for file in moving:
            file.leave()
        image = self._view.stack.lowers[-1]
        same_view = self._exchange(stack)
        outdated = self._begin_generation(
            opened if moved else [file.node for file in moving],
            image=None if moved else image,
            same_view=same_view,
        )
        if moved:
            self._pending.note_all()
        for file in moving:
            file.arrive()
        self._moved = [file.node for file in moving]
        if self._view.fast_path.recorded:
            # A successor could not find what only the old layers have.
            for node in opened:
                try:
                    self._view.node(node.number)
                except OSError as error:  # the image is damaged: who uses it is told
                    log.warning("node %x, which is open, cannot be found: %s", node.number, error)
        return outdated

    def settle(self) -> None:
        """Make a `swap` final: no successor will have to go back on it."""
        moved, self._moved = self._moved, []
        for node in moved:
            settle(node)

    def upper_names(self) -> list[tuple[Node, Node, bytes]]:
        """Return all names of regular files in the upper, of those, that is, that take space: node,
        parent, name.
        """
        nodes = self._view.nodes.all()
        files = (node for node in nodes if node.upper and modes.S_ISREG(node.kind))
        return [(node, *link) for node in files for link in node.links]

    def lost_names(
        self, held: list[tuple[Node, Node, bytes]], outdated: Outdated
    ) -> list[tuple[int, bytes]]:
        """Return which of the names that were `held` before a swap are no longer what they were,
        and which directory they were in, unless that has vanished.
        """
        view, lost = self._view, []
        for node, parent, name in held:
            if parent.number not in outdated.below and view.nodes.get(node.number) is node:
                with suppress(OSError):  # the image is damaged: who comes by that name is told
                    view.node(node.number)
                if node.generation != view.generation or (parent, name) not in node.links:
                    lost.append((parent.number, name))
        return lost

    def _opened(self) -> list[Node]:
        """Return files that are, or may be, open, each found in the present layers."""
        view = self._view
        numbers = view.fast_path.opened()
        if numbers is None:
            opened = [node for node in view.nodes.all() if modes.S_ISREG(node.kind)]
        else:
            held = (view.nodes.get(number) for number in numbers)
            opened = [node for node in held if node is not None]
            opened += view.open_here
        return [view.node(node.number) for node in opened]

    def _exchange(self, stack: Stack) -> bool:
        """Return whether the view is the same, as at a snapshot."""
        view = self._view
        layers = [one.identity for one in view.stack.layers]
        same_view = layers == [one.identity for one in stack.lowers]
        if not same_view:
            view.touched.everything()
        old, view.stack = view.stack, stack
        if view.keep is not None:
            view.keep.ways.session = stack
        old.close()
        return same_view

    def _begin_generation(
        self, moved: list[Node], *, image: Layer | None = None, same_view: bool = False
    ) -> Outdated:
        """Find all nodes anew from now on; those that have `moved`, by their names.

        `image`: what was the bottom layer, if directories may have vanished.
        """
        view = self._view
        directories = view.begin_generation()
        # Now: what was answered until then is among them, and nothing has found its new place.
        names = [] if same_view else self._names()
        view.refresh_root()
        vanished = self._vanished(image) if image is not None and not same_view else []
        self.find_ways()
        with view.going_by_names():
            for node in moved:
                view.node(node.number)
        if same_view:
            return Outdated([], [], [], set())
        # However many names are below them: the kernel comes by the directory, or has no way there.
        below = {node.number for _, _, top in vanished for node in _directories(top)}
        return Outdated(
            [one for one in names if one[0] not in below],
            [*directories, *view.nodes.directories],
            [(parent.number, name, top.number) for parent, name, top in vanished],
            below,
        )

    def _names(self) -> list[tuple[int, bytes]]:
        """Return all names that the kernel may know, or know to be missing."""
        names = self._view.fast_path.names()
        for node in self._view.nodes.all():
            names += [(parent.number, name) for parent, name in node.links]
        return names

    def _vanished(self, image: Layer) -> list[tuple[Node, bytes, Node]]:
        """Return directories that have had nothing of the image, and that the view does not have
        any more, each with the directory above it and its name in it; not what is in them.

        Those that are left out are found to be gone when they are used.
        """
        vanished: list[tuple[Node, bytes, Node]] = []
        left, parents = _VANISHED_LIMIT, [self._view.root]
        while parents:
            parent = parents.pop()
            for name, node in list(parent.children.items()):
                if not node.is_directory:
                    continue
                of_image = node.lowers and node.lowers[-1].layer is image
                if of_image or node.lasting or not left:
                    parents.append(node)
                    continue
                left -= 1
                if self._has_directory(parent, name):
                    parents.append(node)
                else:
                    vanished.append((parent, name, node))
        return vanished

    def _has_directory(self, parent: Node, name: bytes) -> bool:
        view = self._view
        try:
            if parent.generation != view.generation:
                view.refresh(parent)
            return parent.linked and view.find(parent, name).is_directory
        except OSError:  # the image is damaged: who comes by that name is told
            return False

    # Files that are open

    def _copy_writers(
        self, opened: list[Node], new: Stack, halt: Halt | None
    ) -> tuple[list[MovingFile], tuple[bytes, ...]]:
        """If the upper becomes a lower, prepare to get files out of it that are written past the
        overlay.

        Returns them, and as `Outdated.inexact`.
        """
        view = self._view
        old = view.stack.upper
        if old is None or not any(old.is_same(layer) for layer in new.lowers):
            stay = [layer.identity for layer in new.lowers]
            self._hold_contents(
                [node for node in opened if not node.lasting and _is_left(node, stay)]
            )
            return [], ()
        moving: list[MovingFile] = []
        try:
            for node in opened:
                if is_written(node):
                    contents = view.fast_path.duplicate(node.number)
                    file = MovingFile(view.stack, new, node, contents)
                    moving.append(file)
                    if halt is not None and not halt.holds():
                        file.doubt()
            inexact = tuple(b"/" + file.node.path for file in moving if not file.is_exact())
            if halt is not None:
                halt.end()
            for file in moving:
                file.sync()
        except BaseException:
            for file in moving:
                file.abandon()
            raise
        return moving, inexact

    def _hold_contents(self, opened: list[Node]) -> None:
        """Keep files of layers that go away within reach of who may have them open."""
        view = self._view
        held: list[Node] = []
        for node in opened:
            if node.linked and not view.fast_path.holds(node.number):
                try:
                    node.anchor_to(view.locate(node))
                except OSError as error:
                    if error.errno != errno.EMFILE:
                        raise
                    log.warning("too many files may be open; some will be lost to who has them")
                    for other in held[:_SPARE_DESCRIPTORS]:
                        other.drop_anchor()
                    return
                held.append(node)

    # Lowers

    def lowers_changed(self, changed: Collection[Identity]) -> None:
        """Find anew what is in those layers: it is in another of them by now.

        The view is what it was, so the kernel need not be told of anything.
        """
        stack = self._view.stack
        layers = [layer for layer in (*stack.lowers, *stack.indexes) if layer.identity in changed]
        for layer in layers:
            layer.forget_all()
        self._find_all_again(layers)
        self._opened()  # a successor has to know those whose origin has gone

    def exchange_lowers(self, lowers: Sequence[bytes], indexes: Sequence[bytes]) -> None:
        """Serve other lowers, which show the same: those that are more, or less, are empty.

        Raises `OSError` as `Stack.open` does; nothing has changed then.
        """
        dropped = self._view.stack.exchange_lowers(lowers, indexes)
        self._find_all_again(dropped)
        for layer in dropped:
            layer.close()

    def _find_all_again(self, layers: list[Layer]) -> None:
        """Find all that is in those layers: files when they are used next, directories at once,
        since what is in them goes by their place.
        """
        view = self._view
        view.refresh_root()
        view.fast_path.withdraw(ROOT_NUMBER)
        directories = []
        for node in view.nodes.all():
            if not node.linked or node.is_root:
                continue
            for lower in node.lowers:
                if lower.layer in layers:
                    view.mark_stale(node)
                    if node.is_directory:
                        directories.append(node)
                    break
        for node in directories:
            view.fast_path.withdraw(node.number)
            view.node(node.number)

    # What is kept

    def keep_paths(self, rules: KeepRules) -> Outdated:
        """Keep what `rules` name from now on, and nothing else.

        Files that are open where it is kept from now on go on in what is kept there, if they were
        committed, and as unlinked ones if not.
        """
        keep = self._view.keep
        assert keep is not None
        self.settle()
        opened = self._opened()
        moved = [node for node in opened if node.linked and node.lasting != rules.keep(node.path)]
        entering = [node for node in moved if not node.lasting]
        self._pending.keep(entering)
        self._hold_contents([node for node in moved if node.upper])
        keep.change(rules)
        outdated = self._begin_generation(entering)
        self._pending.note_all()
        return outdated

    def take_hidden(self, path: bytes) -> At | None:
        """Take what the session's upper has at `path`, which is kept now, out of the way: nobody
        sees it. Return where it is, for the caller to remove; None if there is nothing.
        """
        stack = self._view.stack
        if self._pending.numbers:
            return None  # the contents of files that are still open may be there
        try:
            at = stack.writable.at(path)
            if syscalls.stat_or_none(at) is None:
                return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._view.touched.path(path, whole=True)
        aside = stack.workdir.temporary()
        syscalls.rename(at, aside)
        stack.writable.forget_tree(path)
        return aside

    def make_way(self, path: bytes) -> None:
        """Prepare for `path`, which is not kept, to be copied to what is.

        Raises ENOENT, ENOTDIR, with words for people.
        """
        view = self._view
        assert view.keep is not None
        try:
            parent = view.find_parent(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = "there is no directory of that name to find it in (symlinks do not count)"
            raise OSError(error.errno, reason, b"/" + path) from error
        try:
            if not parent.lasting:
                view.keep.ways.make(parent)
        finally:
            view.collect(parent)

    def find_ways(self) -> None:
        """Make the directories above what is kept, where the session's layers lack them."""
        keep = self._view.keep
        for path in keep.lost_ways() if keep is not None else ():
            try:
                self._find_way(path)
            except OSError as error:
                log.warning(
                    "what is kept below /%s cannot be reached: %s", os.fsdecode(path), error
                )

    def _find_way(self, path: bytes) -> None:
        view = self._view
        assert view.keep is not None
        parent, name = view.find_parent(path), path.rpartition(b"/")[2]
        if not view.find(parent, name).positive:
            way = view.keep.stack.writable.at(path)
            stat = syscalls.stat(way)
            new = NewObject(stat.st_mode, stat.st_uid, stat.st_gid)
            made, _ = self._overlay.create(parent, name, new)
            copy_attributes(way, locate(view.stack, made), stat, view.stack.xattrs)
            parent = made
        view.collect(parent)


@contextmanager
def no_way_back() -> Iterator[None]:
    """Raise `HalfDoneError` for whatever fails."""
    try:
        yield
    except Exception as error:
        raise HalfDoneError from error


def _directories(top: Node) -> Iterator[Node]:
    """Yield a directory and all that are held below it."""
    left = [top]
    while left:
        node = left.pop()
        yield node
        left += [child for child in node.children.values() if child.is_directory]


def _is_left(node: Node, stay: Sequence[Identity]) -> bool:
    """Say whether what a node stands for is in an upper that goes away, or in such a lower."""
    return node.upper or (bool(node.lowers) and node.lowers[0].layer.identity not in stay)
