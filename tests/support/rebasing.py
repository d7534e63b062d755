"""A machine on which an image is exchanged for another, under a session ``s``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sessiond.config import Config
from sessiond.session.manager import Manager, Session, open_manager
from sessiond.session.memory import MemoryMounter
from sessiond.session.rebase import old_image
from tests.support import trees
from tests.support.checker import findings
from tests.support.sessions import USER

LATER_NS = 4_000_000_000 * 10**9
NEWER = trees.File(content=b"image 2", mtime_ns=LATER_NS)
OLD: trees.Tree = {"etc": {"a": b"image", "b": b"image"}}
NEW: trees.Tree = {"etc": {"a": NEWER, "b": b"image"}, "new": b""}


@dataclass
class Machine:
    """A machine with a profile ``p``, whose image can be exchanged."""

    directory: Path
    mounter: MemoryMounter = field(default_factory=MemoryMounter)

    @property
    def image(self) -> Path:
        return self.directory / "image.squashfs"

    def pack(self, tree: trees.Tree, *, keep_old: bool = False) -> None:
        """Put an image of `tree` in place."""
        content = self.directory / "content"
        subprocess.run(["rm", "-rf", content], check=True)
        content.mkdir()
        trees.build(tree, str(content))
        new = self.directory / "new"
        pack = ["mksquashfs", content, new, "-quiet", "-no-progress", "-noappend"]
        subprocess.run(pack, check=True, capture_output=True)
        if keep_old:
            os.link(self.image, old_image(self.image))
        new.rename(self.image)

    def config(self, **profile: object) -> Config:
        table = {"image": str(self.image), "storage": "persistent", **profile}
        return Config.model_validate(
            {
                "daemon": {
                    "runtime_directory": str(self.directory / "run"),
                    "state_directory": str(self.directory / "state"),
                },
                "profile": {"p": table},
            }
        )

    @asynccontextmanager
    async def manager(self, **profile: object) -> AsyncIterator[Manager]:
        async with open_manager(self.config(**profile), self.mounter) as manager:
            await manager.start()
            yield manager
            await manager.shut_down()

    def layer(self, number: int) -> Path:
        return self.directory / "state/sessions/s/layers" / str(number)

    def assert_in_order(self, session: Session) -> None:
        """The checker finds nothing in any layer."""
        root = self.directory / "run/images" / session.image
        for number, below in session.record.stacks():
            layer = self.layer(number)
            lowers = [self.layer(lower) / "fs" for lower in below]
            assert findings(layer / "fs", layer / "work", [*lowers, root]) == []

    async def make_session(self, manager: Manager) -> None:
        """Make session ``s``: ``a`` was changed before its snapshot ``one``, ``b`` after it."""
        session = await manager.create(USER, "p", session_id="s")
        change(self.layer(1) / "fs", "a")
        await session.snapshots.make("one")
        change(self.layer(2) / "fs", "b")


def change(upper: Path, name: str) -> None:
    """Change a file of ``etc`` that has not been changed in that layer."""
    (upper / "etc").mkdir()
    (upper / "etc").chmod(0o755)
    (upper / "etc" / name).write_text("mine")
