"""Guests in a directory of a test's own, whom the system does not know."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sessiond.session.accounts import Account
from sessiond.session.model import Uid
from sessiond.session.tree import remove_tree
from sessiond.session.user_records import SystemUserRecords


class UnknownUserRecords(SystemUserRecords):
    """Records that only sessiond reads."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.taken: set[str] = set()
        """Names of other users."""

    def is_taken(self, account: Account) -> bool:
        return account.name in self.taken

    def _require_known(self, account: Account) -> None:
        pass


class FewBelongings:
    """Of users who own their home, and nothing else."""

    def __init__(self) -> None:
        self.busy: set[Uid] = set()
        """Who has processes."""
        self.failures: list[str] = []
        """What cannot be removed."""
        self.searched: list[Uid] = []
        self.log: list[str] = []

    def has_processes(self, uid: Uid) -> bool:
        return uid in self.busy

    async def end_processes(self, uid: Uid, nobody: Uid) -> None:
        self.log.append("processes")
        self.busy.discard(uid)

    def remove(self, account: Account, home: Path, apart: Collection[Path]) -> list[str]:
        self.log.append("files")
        remove_tree(home)
        return list(self.failures)

    async def search(self, uid: Uid, apart: Collection[Path]) -> list[str]:
        self.searched.append(uid)
        return list(self.failures)


def guests_table(directory: Path) -> dict[str, str]:
    """Return the configuration for guests below a directory."""
    return {"home": str(directory / "homes"), "skeleton": str(directory / "skeleton")}
