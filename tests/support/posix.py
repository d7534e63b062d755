"""Short forms for what file-system tests say most often."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def read(path: str) -> bytes:
    """Return the contents of a file."""
    with open(path, "rb") as file:
        return file.read()


def write(path: str, content: bytes) -> None:
    """Create a file, or replace its contents in place."""
    with open(path, "wb") as file:
        file.write(content)


def append(path: str, content: bytes) -> None:
    """Add to the end of an existing or new file."""
    with open(path, "ab") as file:
        file.write(content)


def names(path: str) -> set[str]:
    """Return what a directory lists, each name once."""
    listed = os.listdir(path)
    assert len(listed) == len(set(listed)), f"{path} lists a name twice: {sorted(listed)}"
    return set(listed)


@contextmanager
def opened(path: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """Hold a descriptor of `path` while the context is open."""
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def fails(error: int) -> Iterator[None]:
    """Demand that the system call inside fails with errno `error`."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == error, f"{os.strerror(error)} expected, not: {caught.value}"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Have another umask while the context is open."""
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)
