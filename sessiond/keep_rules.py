"""Which paths of a merged view outlive a reset: the rules in a profile, and what was committed."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable

RULES_LIMIT = 256
"""Most rules of one session: each name that is looked up is held against them."""
COMPONENTS_LIMIT = 64
_BYTES_LIMIT = 4000  # below PATH_MAX

_GLOB = frozenset("*?[")
_ESCAPED = re.compile(r"\[([*?[])\]")


def checked_rule(rule: str) -> str:
    """Return `rule`. Raises ValueError, with what is allowed, unless it is a rule.

    That is an absolute path whose components may have ``*``, ``?`` and ``[...]``, as glob(7) has
    them: none of these stands for a slash, nor for a dot at the beginning of a name.
    """
    components = rule.split("/")[1:]
    if not rule.startswith("/") or not {"", ".", ".."}.isdisjoint(components):
        raise ValueError(f"{rule!r}: an absolute path without '.', '..' and empty parts is needed")
    if "\0" in rule:
        raise ValueError(f"{rule!r}: a path without NUL is needed")
    if any("**" in component for component in components):
        raise ValueError(f"{rule!r}: '**' is not known; all below a path is kept with it")
    if len(components) > COMPONENTS_LIMIT or len(os.fsencode(rule)) > _BYTES_LIMIT:
        raise ValueError(
            f"a rule has at most {_BYTES_LIMIT} bytes and {COMPONENTS_LIMIT} parts, "
            f"which {rule[:40]!r}... has not"
        )
    return rule


def rule_for(path: bytes) -> str:
    """Return the rule for just one path of the merged view, which is without a leading slash."""
    return "/" + glob.escape(os.fsdecode(path))


def checked_path(path: str) -> str:
    """Return `path`. Raises ValueError, with what is allowed, unless it is one that can be kept:
    absolute in a merged view, below its root.
    """
    if not path.startswith("/"):
        raise ValueError(f"{path!r}: an absolute path of the session is needed")
    checked_rule(rule_for(os.fsencode(path[1:])))
    return path


def path_of(rule: str) -> bytes:
    """Return the path that `rule_for` has made a rule of."""
    return os.fsencode(_ESCAPED.sub(r"\1", rule))[1:]


class KeepRules:
    """A set of rules. Paths are those of the merged view, without a leading slash."""

    def __init__(self, rules: Iterable[str] = ()) -> None:
        """Precondition: each has passed `checked_rule`."""
        self.rules = tuple(rules)
        self._compiled = [tuple(map(_Component, rule[1:].split("/"))) for rule in self.rules]

    def keep(self, path: bytes) -> bool:
        """Say whether `path`, or a directory above it, is named by a rule."""
        components = path.split(b"/")
        return any(
            len(rule) <= len(components) and _agree(rule, components) for rule in self._compiled
        )

    def lead(self, path: bytes) -> bool:
        """Say whether something below `path` may be named by a rule, while `path` is not kept."""
        components = path.split(b"/") if path else []
        return not (path and self.keep(path)) and any(
            len(rule) > len(components) and _agree(rule, components) for rule in self._compiled
        )


class _Component:
    """One part of a rule."""

    def __init__(self, text: str) -> None:
        self._name = None if _GLOB & set(text) else os.fsencode(text)
        self._matches = re.compile(fnmatch.translate(text)).match
        self._hidden = text.startswith(".")

    def names(self, name: bytes) -> bool:
        if self._name is not None:
            return self._name == name
        if name.startswith(b".") and not self._hidden:
            return False
        return self._matches(os.fsdecode(name)) is not None


def _agree(rule: tuple[_Component, ...], components: list[bytes]) -> bool:
    """Say whether both begin alike, as far as the shorter of them goes."""
    return all(part.names(name) for part, name in zip(rule, components, strict=False))
