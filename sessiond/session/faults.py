"""From `OSError` to sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sessiond.config import NAME_LIMIT
from sessiond.errors import Failed, NoSpace


@contextmanager
def explained(action: str) -> Iterator[None]:
    """Turn an `OSError` from inside into ``Could not ACTION: reason``.

    Raises `NoSpace` when the storage or a quota is full, `Failed` otherwise.
    """
    try:
        yield
    except OSError as error:
        # Calls with a descriptor have its number for a name.
        named = isinstance(error.filename, str | bytes)
        where = f" ({os.fsdecode(error.filename)})" if named else ""
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(
                f"Could not {action}: no space is left{where}; delete files or snapshots, or reset "
                "sessions, there, then try again."
            ) from error
        raise Failed(f"Could not {action}: {error.strerror or error}{where}.") from error


def quoted(text: str) -> str:
    """Return `text`, which anyone may have made up, as it can be put into a sentence."""
    return repr(text) if len(text) <= NAME_LIMIT else f"{text[:NAME_LIMIT]!r}..."
