from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from sessiond.overlay import syscalls
from tests.support import libc


@pytest.fixture(scope="module")
def scratch() -> Iterator[str]:
    """A tmpfs."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with ExitStack() as undo:
        top = tempfile.mkdtemp(prefix="sessiond-crash-")
        undo.callback(os.rmdir, top)
        libc.mount("scratch", top, "tmpfs", libc.MS_NOATIME, "mode=755")
        undo.callback(libc.umount, top, libc.MNT_DETACH)
        yield top


@pytest.fixture(autouse=True, scope="module")
def no_clones() -> Iterator[None]:
    """Serve lowers from where they are: to unmount thousands of clones would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "clone_read_only", lambda _: None)
        yield
