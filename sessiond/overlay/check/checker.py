"""The offline checker: what is wrong with an upper and its workdir, over their lowers.

The lowers are only looked at. A repair never changes what the merged view shows, nor the contents
of a file, nor does it drop what tells where something came from; so there is much that it leaves.
Each repair is one system call, or the removal of a tree that nothing refers to: after a crash, the
next run goes on.

The upper may have been filled by anyone. It is walked without recursion, entry by entry, through
descriptors of directories; what is kept in memory grows with its depth, with the number of
subdirectories of one directory and with that of renamed ones, not with the number of files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from sessiond.overlay import syscalls
from sessiond.overlay.check.findings import Finding, Kind
from sessiond.overlay.check.inspection import Inspection
from sessiond.overlay.check.upper import check_upper
from sessiond.overlay.check.workdir import check_workdir
from sessiond.overlay.kernel_mounts import refuse_mounted
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack, StackOptions, check_pair, lock_layer, open_layer


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be checked: directories, topmost first, as `Stack.open` takes them."""

    upper: bytes
    work: bytes
    lowers: Sequence[bytes]
    data: Sequence[bytes] = ()
    user_xattrs: bool = False
    """As in `StackOptions`."""
    complete: bool = True
    """False if lowers are missing at the bottom: what cannot be said without them is left out."""


def check(target: Target, *, repair: bool = False) -> Iterator[Finding]:
    """Yield what is wrong, and, if asked to, mend what can be mended without risk.

    Raises OSError, with a message for people in `strerror` and the directory in `filename`: when
    one is missing, and EBUSY when the upper is mounted, also when that happens in the course. While
    it is being repaired, it cannot be mounted by sessiond.
    """
    with ExitStack() as undo:
        upper = open_layer(target.upper, "upper directory", undo, writable=repair)
        work = open_layer(target.work, "workdir", undo, writable=repair)
        below = tuple(
            open_layer(path, "lower directory", undo, writable=False) for path in target.lowers
        )
        data = tuple(
            open_layer(path, "lower directory", undo, writable=False) for path in target.data
        )
        check_pair(upper, target.upper, work, target.work)
        _keep_alone(target, upper, work, undo if repair else None)
        options = StackOptions(user_xattrs=target.user_xattrs)
        stack = Stack(below, upper, None, options, data=data)
        trusted = not repair or _may_be_right(Inspection(stack, False, target.complete))
        inspection = Inspection(stack, repair, target.complete, trusted)
        yield from check_upper(inspection)
        yield from check_workdir(inspection, work)
        yield from inspection.tallies()
        if inspection.repaired:
            syscalls.syncfs(upper.root)
        if not repair:
            _keep_alone(target, upper, work, None)


_SIGNS = frozenset({Kind.REDIRECT_DANGLING, Kind.METACOPY_WITHOUT_DATA, Kind.ORIGIN_GONE})


def _may_be_right(inspection: Inspection) -> bool:
    """Say whether these may be the lowers that the upper was written over. If not, a whiteout that
    hides nothing may hide something over the right ones.
    """
    findings = itertools.chain(check_upper(inspection), inspection.tallies())
    return not any(one.kind in _SIGNS for one in findings)


def _keep_alone(target: Target, upper: Layer, work: Layer, undo: ExitStack | None) -> None:
    """Raise OSError, EBUSY, if the layers are mounted; keep them from it until `undo`, if given, is
    done. Who only reads does not keep a session from starting.
    """
    with ExitStack() as brief:
        for layer, path in ((upper, target.upper), (work, target.work)):
            lock_layer(layer, path, undo or brief)
        refuse_mounted(target.upper, target.work)
