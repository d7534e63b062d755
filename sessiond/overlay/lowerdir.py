"""The syntax of overlayfs's options that name directories, ``lowerdir=`` first of all."""

from __future__ import annotations

import os
import re


def parse_lowers(text: str) -> tuple[list[bytes], list[bytes]]:
    """Take ``A:B::C::D``: return the lowers A and B, and the data-only lowers C and D.

    A backslash keeps ``:``, ``,`` or itself literal. Raises ValueError.
    """
    lowers, *data = _split_twice(text)
    if not all(lowers) or not all(len(part) == 1 and part[0] for part in data):
        raise ValueError(
            "takes directories with ':' between them, and after '::' one data-only directory"
        )
    return lowers, [part[0] for part in data]


def _split_twice(value: str) -> list[list[bytes]]:
    """Split at ``::``, and the parts at ``:``."""
    parts: list[list[bytes]] = [[]]
    for directory in split(value, ":"):
        if directory or len(parts[-1]) == 0:
            parts[-1].append(os.fsencode(unescape(directory)))
        else:
            parts.append([])
    return parts


def split(text: str, separator: str) -> list[str]:
    """Split at separators without a backslash before them; backslashes stay."""
    parts = re.findall(rf"(?:\\.|[^\\{separator}])*(?:{separator}|$)", text, re.DOTALL)
    if not text.endswith(separator):
        parts.pop()  # the empty match at the end
    return [part.removesuffix(separator) for part in parts if part or text.endswith(separator)]


def unescape(text: str) -> str:
    """Take away the backslashes that kept a character literal."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
