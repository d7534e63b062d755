"""Layers as the manager names them: opened, and noted for a worker that has to go on with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sessiond import control
from sessiond.control import KeptLayers, LayerStack
from sessiond.fuse import data_path
from sessiond.keep_rules import KeepRules
from sessiond.overlay.fastpath import Inherited
from sessiond.overlay.keep import Keep
from sessiond.overlay.nodes import KEEP_FACT, STACK_FACT
from sessiond.overlay.orphans import Orphans
from sessiond.overlay.stack import Stack, StackOptions
from sessiond.overlay.view import View

if data_path.HAS_EXTENSION:
    from sessiond.fuse import _kernel_io


def open_stack(layers: LayerStack, options: StackOptions) -> Stack:
    """Open the layers. Raises OSError with a message for people."""
    stack = Stack.open(
        [os.fsencode(path) for path in layers.lowers],
        os.fsencode(layers.upper),
        os.fsencode(layers.work),
        options,
        indexes=[os.fsencode(path) for path in layers.indexes if path.is_dir()],
    )
    if layers.orphans is not None:
        try:
            stack.orphans = _open_orphans(layers.orphans)
            if layers.former is not None and layers.former.is_dir():
                stack.former = _open_orphans(layers.former)
        except BaseException:
            stack.close()
            raise
    return stack


def open_lowers(lowers: control.Lowers) -> Stack:
    """Open layers for reading. Raises OSError with a message for people."""
    return Stack.open(
        [os.fsencode(path) for path in lowers.paths],
        indexes=[os.fsencode(path) for path in lowers.indexes if path.is_dir()],
    )


def open_keep(layers: KeptLayers, session: Stack) -> Keep:
    """Open the layers of what outlives resets of `session`, as `open_stack` does."""
    stack = Stack.open_over(
        session.lowers[-1], os.fsencode(layers.upper), os.fsencode(layers.work), session.options
    )
    try:
        stack.orphans = _open_orphans(layers.orphans)
    except BaseException:
        stack.close()
        raise
    return Keep(stack, session, KeepRules(layers.rules))


_orphans: dict[Path, Orphans] = {}
"""Those of the present layers, and of earlier ones as long as something is there."""


def _open_orphans(directory: Path) -> Orphans:
    if directory not in _orphans:
        directory.mkdir(mode=0o700, exist_ok=True)
        _orphans[directory] = Orphans(os.fsencode(directory))
    return _orphans[directory]


def storages_open() -> int:
    """Return on how many storages files without a name may be: those in use, and left ones."""
    return len(_orphans)


def close_unused_orphans(view: View) -> None:
    """Let go of storage that the session has left, and its space with it."""
    in_use = [stack.orphans for stack in view.stacks]
    for directory, orphans in list(_orphans.items()):
        if orphans not in in_use and not any(map(orphans.has, view.nodes.all())):
            orphans.close()
            del _orphans[directory]
            if orphans is view.stack.former:
                view.stack.former = None


def stack_of(inherited: list[Inherited]) -> LayerStack | None:
    """Return what a predecessor has served, as far as it could be noted."""
    facts = next((left.facts for left in inherited if left.number == 0), {})
    text = facts.get(STACK_FACT)
    return LayerStack.model_validate_json(text) if text else None


def note_stack(layers: LayerStack) -> None:
    _kernel_io.note(0, STACK_FACT, layers.model_dump_json().encode())


def rules_of(inherited: list[Inherited]) -> tuple[str, ...] | None:
    """Return the rules that a predecessor went by, if it has noted them."""
    facts = next((left.facts for left in inherited if left.number == 0), {})
    text = facts.get(KEEP_FACT)
    return tuple(json.loads(text)) if text else None


def note_rules(rules: KeepRules) -> None:
    _kernel_io.note(0, KEEP_FACT, json.dumps(rules.rules).encode())


def open_either(first: LayerStack, second: LayerStack) -> tuple[LayerStack, Stack]:
    """Open layers; others, where one of them is not there any more."""
    try:
        return first, open_stack(first, StackOptions())
    except FileNotFoundError:
        return second, open_stack(second, StackOptions())
