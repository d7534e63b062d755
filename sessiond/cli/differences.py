"""How `sessionctl diff` shows what differs: as a tree, a list, JSON, or text that has changed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import AsyncIterable, Iterator
from dataclasses import dataclass, field

from rich.text import Text
from rich.tree import Tree

from sessiond.bus.client import ChangeSummary, Difference
from sessiond.cli.output import (
    Json,
    listed,
    padded,
    print_json,
    print_line,
    print_table,
    printable,
    show,
    size,
)
from sessiond.cli.terms import CHANGE_KINDS, FILE_TYPES
from sessiond.words import _, ngettext

LEVELS = 3
"""Of the tree, unless told otherwise."""
ALL_LEVELS = 4096
"""More than a path can have."""

_COLOURS = {"added": "green", "deleted": "red", "renamed": "cyan", "metadata": "dim"}
_TOLD = {
    "binary": _("Binary files differ: {path}"),
    "large": _("Too large to be shown: {path}"),
    "forbidden": _("Not shown, since you may not read it: {path}"),
}


@dataclass
class Sums:
    """How much differs."""

    kinds: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def add(self, one: Difference) -> None:
        """Count one more."""
        self.kinds[_counted_as(one.kind)] += 1
        self.bytes += one.size if one.type == "file" else 0

    def __str__(self) -> str:
        added, changed, deleted, renamed = (self.kinds[kind] for kind in _COUNTED)
        counts = [
            (added, ngettext("{number} added", "{number} added", added)),
            (changed, ngettext("{number} changed", "{number} changed", changed)),
            (deleted, ngettext("{number} deleted", "{number} deleted", deleted)),
            (renamed, ngettext("{number} renamed", "{number} renamed", renamed)),
        ]
        told = listed(text.format(number=number) for number, text in counts if number)
        if not told:
            return _("None: nothing differs.")
        return _("{counts}; {size} in files").format(counts=told, size=size(self.bytes))


_COUNTED = ("added", "changed", "deleted", "renamed")


def counts(changes: ChangeSummary) -> str:
    """Return in words how much differs."""
    return str(Sums(Counter({kind: getattr(changes, kind) for kind in _COUNTED}), changes.bytes))


def _counted_as(kind: str) -> str:
    return kind if kind in _COUNTED else "changed"


async def print_as_json(differences: AsyncIterable[Difference]) -> None:
    """Print each as one line of JSON, as it is found."""
    async for one in differences:
        print_json(_as_json(one))


def _as_json(one: Difference) -> dict[str, Json]:
    told: dict[str, Json] = {
        "path": one.path,
        "kind": one.kind,
        "type": one.type,
        "size": one.size,
        "old_size": one.old_size,
    }
    if one.source is not None:
        told["from"] = one.source
    if one.changed is not None:
        told["changed"] = one.changed
    return told


async def print_list(differences: AsyncIterable[Difference]) -> None:
    """Print each on a line, as it is found; then how many there are."""
    sums = Sums()
    async for one in differences:
        sums.add(one)
        kind = padded(CHANGE_KINDS[one.kind], CHANGE_KINDS.width)
        what = padded(FILE_TYPES[one.type], FILE_TYPES.width)
        print_line(f"{kind}  {what}  {_size(one):>10}  {_name(one)}")
    print_line(str(sums))


async def print_tree(differences: AsyncIterable[Difference], depth: int) -> None:
    """Print directories with what differs in them, sorted; below `depth` only sums."""
    root = _Node()
    async for one in differences:
        root.insert(one)
    if root.sums.kinds:
        show(_tree(root, depth))
    print_line(str(root.sums))


def print_directories(changes: ChangeSummary, *, as_json: bool) -> None:
    """Print the directories with most changes in them, and how much that is."""
    if as_json:
        for one in changes.directories:
            print_json(dict(one._asdict()))
        return
    columns = [
        [size(one.bytes), *(str(getattr(one, kind)) for kind in _COUNTED), one.path]
        for one in changes.directories
    ]
    titles = (_("IN FILES"), _("ADDED"), _("CHANGED"), _("DELETED"), _("RENAMED"), _("BELOW"))
    print_table(titles, columns)


async def print_content(differences: AsyncIterable[Difference]) -> None:
    """Print how the text of files differs, as `diff -u` does."""
    sums = Sums()
    async for one in differences:
        sums.add(one)
        for line in _unified(one):
            print_line(line)
    print_line(str(sums))


def _unified(one: Difference) -> Iterator[str]:
    if one.content is None:
        return
    if isinstance(one.content, str):
        yield _TOLD.get(one.content, "{path}").format(path=one.path)
        return
    old, new = one.content
    yield from difflib.unified_diff(
        old.splitlines(),
        new.splitlines(),
        "/dev/null" if one.kind == "added" else f"a{one.source or one.path}",
        "/dev/null" if one.kind == "deleted" else f"b{one.path}",
        lineterm="",
    )


class _Node:
    """A directory of the tree, or what is in one."""

    def __init__(self) -> None:
        self.changes: list[Difference] = []
        self.below: dict[str, _Node] = {}
        self.sums = Sums()
        """Of all that is below, and of itself."""

    def insert(self, one: Difference) -> None:
        node = self
        node.sums.add(one)
        for name in filter(None, one.path.split("/")):
            node = node.below.setdefault(name, _Node())
            node.sums.add(one)
        node.changes.append(one)


def _tree(root: _Node, depth: int) -> Tree:
    top = Tree(_label("/", root))
    pending = [(top, root, 1)]
    while pending:
        shown, node, level = pending.pop()
        if level > depth:
            continue
        for name, below in sorted(node.below.items()):
            pending.append((shown.add(_label(name, below)), below, level + 1))
    return top


def _label(name: str, node: _Node) -> Text:
    label = Text(printable(name))
    if node.below and name != "/":
        label.append("/")
    for one in node.changes:
        label.append(f"  {printable(_what(one))}", _COLOURS.get(one.kind, "yellow"))
    if node.below:
        label.append(f"  ({node.sums})", "dim")
    return label


def _what(one: Difference) -> str:
    text = CHANGE_KINDS[one.kind]
    if one.kind == "type":
        text = _("now a {type}").format(type=FILE_TYPES[one.type])
    if one.source is not None:
        text = _("renamed from {path}").format(path=one.source)
    if one.changed is not None:
        text += f", {CHANGE_KINDS[one.changed]}"
    return f"{text}, {_size(one)}" if _size(one) else text


def _name(one: Difference) -> str:
    if one.source is None:
        return one.path
    return _("{path} (from {source})").format(path=one.path, source=one.source)


def _size(one: Difference) -> str:
    """Return the size in words; also the one before, if that was another."""
    if one.type != "file":
        return ""
    if one.kind == "deleted":
        return size(one.old_size)
    if one.kind in {"contents", "renamed"} and one.size != one.old_size:
        return f"{size(one.old_size)} -> {size(one.size)}"
    return size(one.size)
