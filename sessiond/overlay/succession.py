"""What a process does that goes on with the nodes of one that has died.

Most are found as they are needed, by number or name, by `View.node`. Here is what it takes to find
the others, and what the predecessor was about to do.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext

from sessiond.overlay import lookup, orphans, syscalls
from sessiond.overlay.fastpath import Inherited
from sessiond.overlay.lookup import Entry, Identity
from sessiond.overlay.nodes import (
    EXCHANGE_FACT,
    IDENTITY_FACT,
    MOVING_FACT,
    ORPHAN_FACT,
    PENDING_FACT,
    ROOT_NUMBER,
    SETTING_FACT,
    Node,
    unpack_identity,
)
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.pending import Copies
from sessiond.overlay.writers import put_back

log = logging.getLogger(__name__)


class Succession:
    """What a predecessor has left."""

    def __init__(self, overlay: Overlay) -> None:
        self._view = overlay.view
        self._pending = overlay.pending
        self._exchanging: Identity | None = None
        """What it was about to exchange with something else when it died."""
        self._setting: dict[int, bytes] = {}
        """Extended attributes that it was about to set, by the node's number."""

    def take_over(self, inherited: list[Inherited], *, moved: bool = False) -> None:
        """Let `View.node` find those, too, whose number or name alone does not lead to them.

        `moved`: these layers are copies of those that the predecessor served.
        """
        with self._view.going_by_names() if moved else nullcontext():
            for left in inherited:
                if MOVING_FACT in left.facts:
                    self._put_back(left)
            for left in inherited:
                if left.number == 0 and EXCHANGE_FACT in left.facts:
                    self._exchanging = unpack_identity(left.facts[EXCHANGE_FACT])
                if SETTING_FACT in left.facts:
                    self._setting[left.number] = left.facts[SETTING_FACT]
                if left.number > ROOT_NUMBER and self._view.nodes.get(left.number) is None:
                    self._inherit(left)
        self._view.remove_orphans()

    def was_setting(self, number: int, name: bytes) -> bool:
        """Say whether the predecessor died about when it set that extended attribute of a node."""
        return self._setting.get(number) == name

    def has_exchanged(self, parent: Node, name: bytes) -> bool:
        """Say whether the exchange with which it died has got the object to `name`."""
        entry = self._view.find(parent, name)
        return (entry.stat.st_dev, entry.stat.st_ino) == self._exchanging

    def _put_back(self, left: Inherited) -> None:
        view = self._view
        try:
            put_back(view.stack, left.number, left.facts[MOVING_FACT])
        except OSError as error:
            log.warning("a file that was being moved, node %x, is lost: %s", left.number, error)
        view.fast_path.note(left.number, MOVING_FACT, b"")

    def _inherit(self, left: Inherited) -> None:
        view = self._view
        fact = left.facts.get(PENDING_FACT)
        may_be_left = view.stack.former is not None or view.keep is not None
        copies = Copies(fact) if fact and may_be_left else None
        if copies is not None:
            for stack in view.stacks:
                copies.unite(stack)
        self._inherit_place(left, copies)
        node = view.nodes.get(left.number)
        if (
            node is not None
            and not node.gone
            and copies is not None
            and (node.lasting or view.stack.former is not None)
        ):
            if not self._pending.inherit(node, left.number):
                path = os.fsdecode(b"/" + node.path) if node.linked else "a removed file"
                log.error("what is written to %s by who has it open is lost", path)
        elif fact:  # it was not to be left yet, or is an orphan
            view.fast_path.note(left.number, PENDING_FACT, b"")

    def _inherit_place(self, left: Inherited, copies: Copies | None) -> None:
        view = self._view
        fact = left.facts.get(IDENTITY_FACT)
        identity = unpack_identity(fact) if fact else None

        def is_it(entry: Entry) -> bool:
            if copies is not None:
                return copies.has(entry)
            return entry.identity == identity or view.may_be(left.number, entry)

        for parent, name in left.names:
            if view.claim(left.number, left.kind, parent, name, is_it) is not None:
                return
        fact = left.facts.get(ORPHAN_FACT)
        found = self._find_orphan(fact) if fact else None
        if found is not None and (node := view.nodes.by_orphan(found.orphan)) is not None:
            syscalls.close(found.anchor)
            view.nodes.alias(node, left.number)
            return
        entry = found.entry if found is not None else lookup.nothing(left.kind)
        node = view.nodes.add(entry, view.generation, number=left.number)
        view.nodes.detach(node)
        node.gone = True
        if found is not None:
            node.anchor, node.orphan, node.gone = found.anchor, found.orphan, found.gone
        view.collect(node)  # the kernel may have it open and have forgotten it

    def _find_orphan(self, fact: bytes) -> orphans.Found | None:
        for stack in self._view.stacks:
            if (found := orphans.find(stack, fact)) is not None:
                return found._replace(entry=self._view.own(stack, found.entry))
        return None
