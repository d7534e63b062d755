"""Acting as another user."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

NOBODY = 65534
SOMEBODY = 12345


@contextmanager
def acting_as(uid: int, gid: int | None = None, groups: Sequence[int] = ()) -> Iterator[None]:
    """Have this process act on files as `uid`, without capabilities, while the context is open.

    `gid` is the same number unless given. Only the effective ids change: file systems ask for them.
    """
    own_groups = os.getgroups()
    os.setgroups(list(groups))
    os.setegid(uid if gid is None else gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own_groups)
