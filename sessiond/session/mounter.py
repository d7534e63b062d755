"""What the session layer needs of whatever serves the mounts.

`sessiond.fuse.mounter` is the real one, `sessiond.session.memory` the one for tests without root.
Both pass the same tests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from sessiond.cgroups import Freezer
from sessiond.session.model import (
    NO_BREAKDOWN,
    WHOLE,
    Breakdown,
    ChangeSummary,
    DataPath,
    KeptLayers,
    PendingWrites,
    SessionId,
    Span,
    Stack,
    Uid,
    UpperDirectories,
)

VIEW_TYPE = "fuse.sessiond"
"""The type of file system of merged views, by which those of a dead manager are known."""


class MergeState(StrEnum):
    """How far a merge of two layers is."""

    MORE = "more"
    DONE = "done"
    """The upper one of the two is empty."""
    NEVER = "never"
    """They cannot be merged; nothing was changed."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """A merged view to be mounted at `mount_point`, an existing directory."""

    session: SessionId
    mount_point: Path
    stack: Stack
    nosuid: bool
    nodev: bool
    data_path: DataPath
    """The one wanted; another is used where it cannot be had."""
    reachable: tuple[Path, ...]
    """Directories that hold the layers of `stack` and of all stacks swapped in later."""
    keep: KeptLayers | None = None
    """What outlives resets; None: nothing ever will."""


class Mount(Protocol):
    """One live mount. Calls may come from several tasks; they are served one after another."""

    @property
    def worker(self) -> int:
        """Id of the process that serves it; 0 if there is none."""

    async def swap(
        self, stack: Stack, *, moved: bool = False, retained: bool = False
    ) -> tuple[str, ...]:
        """Serve `stack` from now on, in place of the layers served so far.

        Atomic for everyone inside: a system call sees either the old layers or the new. The new
        upper has to be empty or to have been written by this overlay; or it is the same one as
        before, and what `stack` lacks of the lowers is empty. Files open across the swap
        keep their contents where the new stack no longer has them. With `moved`, the new layers
        hold copies of what the old ones hold, and open files go on in these. With `retained`, the
        new upper is the one that `retain` has filled while changes were held, as they still are.

        Returns the paths of files, some of them if they are many, of which the old upper, now a
        lower, has a state of another moment than of all others: programs wrote to them meanwhile.
        Raises `Failed`, with
        the old stack still served, when a layer cannot be opened.
        """

    async def halt(self, freezer: Freezer) -> None:
        """Have all programs of a cgroup stand still at the next `swap` or `frozen`: from before it
        holds changes until layers have been exchanged, or it ends, `LONGEST` at most. Nobody is
        stopped where holding changes is enough.

        Where they go on before all files that are written have been copied, `swap` returns those
        that have not. Raises `Failed`. Then, and when the worker dies, it is for the caller to let
        them go on.
        """

    def frozen(self) -> AbstractAsyncContextManager[None]:
        """Hold every change to the merged view while the context is open; reading goes on.

        `swap` may be called inside; it raises `Failed` if the worker has died since changes are
        held, for they pass then. Programs that write wait; keep it short.
        """

    async def changes(
        self, span: Span = WHOLE, breakdown: Breakdown = NO_BREAKDOWN
    ) -> ChangeSummary:
        """Count how the end of `span` differs from its start; its layers must stay meanwhile."""

    async def diff(self, target: int, span: Span = WHOLE, reader: Uid | None = None) -> None:
        """Write the same differences to `target`, a pipe that does not block.

        Lines of JSON, as docs/dbus.md has them; with the text that has changed, as far as the user
        `reader` may read it, if there is one. A directory comes before what is in it. After the
        last comes ``{"complete": true}``. The caller closes `target`. Returns when the list has
        ended, early when the reader hangs up. Raises `Failed` when it cannot be completed: for one,
        because nothing was read for long.
        """

    async def merge(self, top: Path, bottom: Path) -> MergeState:
        """Go on for a moment with moving what is in the lower `top` to `bottom`, right below it.

        Each moment leaves the merged view, and that of all stacks in which the two lie on each
        other, as it was, also when it is the last. `swap` can take `top` away when it is empty; the
        upper stays the same then. Raises `NoSpace`, `Failed`: it may be tried again.
        """

    async def keep(self, rules: tuple[str, ...]) -> None:
        """Keep what these rules name from now on; what is named no more is as the stack has it.

        Files that are open under a path that is kept from now on go on there, if it was committed.
        Precondition: `MountRequest.keep`. Raises `Failed`.
        """

    def committing(
        self, paths: tuple[str, ...], report: Callable[[int, int], None]
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        """Copy what the merged view shows at `paths`, deletions included, to what is kept.

        That is done, while programs go on, when the context is entered; `report` is told how many
        bytes of how many are copied. Then comes what is returned, twice, both times `frozen`: the
        first copies what has changed meanwhile, the second has all take its place; `keep` has to
        follow, which says whether it counts: the view changes only by that. If the context is left
        before, nothing has changed. All raise `NoSpace`, `Failed`; nothing has changed then.
        """

    async def discard(self, paths: tuple[str, ...]) -> None:
        """Delete what is kept at `paths`, of which the rules name nothing, or only what is below.

        Raises `NoSpace`, `Failed`.
        """

    async def retain(self, paths: tuple[str, ...], upper: UpperDirectories) -> None:
        """Bring what the merged view shows at `paths`, deletions included, into an empty upper,
        which is to be served over the image next.

        What rules keep is left out. The view changes only by `swap`, with `retained`; files of the
        present upper, if they have one name, go on as the same files then, open or not.
        Precondition: `frozen`. Raises `NoSpace`, `Failed`; `upper` is of no use then.
        """

    async def sync(self) -> None:
        """Return when all that was written before is on the upper's disk.

        Raises `Failed`, `NoSpace`.
        """

    async def pending(self) -> PendingWrites:
        """Say which files are still written to the storage from which the layers were `moved`.

        Programs had them open for writing then. Until their last close, the disk has what they
        contained a moment ago, or when fsync(2) was called last. That storage has to stay as long
        as it is in use, or they would be lost should the worker die. Raises `Failed`.
        """

    async def unmount(self) -> None:
        """Detach the mount, write back what is dirty and end its worker.

        Never fails, may be repeated.
        """

    async def wait_died(self) -> None:
        """Return when the worker is gone, whatever the reason."""

    async def recover(self) -> None:
        """Have another process go on for the worker, which is gone.

        For who uses the mount it was a pause: no request, no open file and no lock is lost. A
        `swap` that was under way when the worker ended was done, or has failed; changes that were
        held pass. Should the other process end as well, `wait_died` returns at once. Raises
        `Failed` where no other can go on; all that is left to do then is `unmount`.
        """


class Mounter(Protocol):
    """Makes mounts."""

    async def mount(self, request: MountRequest) -> Mount:
        """Mount and return once the merged view is usable.

        Raises `Failed` or `NoSpace` with the reason; nothing is left mounted then.
        """

    def left(self) -> set[SessionId]:
        """Return the sessions that an earlier manager may have left mounted, to be adopted."""

    async def adopt(self, request: MountRequest) -> Mount | None:
        """Go on with the mount of a session that an earlier manager has left; None if there is none
        that can be gone on with.

        For who uses it, it was a pause. It serves what `request` says from then on.
        """

    async def forget_left(self) -> None:
        """Give up what an earlier manager has left and nobody has adopted."""
