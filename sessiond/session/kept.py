"""What outlives resets of a user's sessions of one profile, on disk; and the operations on it.

    STATE/kept/UID/PROFILE/{fs,work}/      the layer; see `sessiond.overlay.keep`
    STATE/kept/UID/PROFILE/orphans/        see `sessiond.overlay.orphans`
    STATE/kept/UID/PROFILE/committed.json  rules of what was committed
    STATE/kept/new-UID-PROFILE/            one that is being made; garbage at any other time

It outlives sessions, and serves one at a time. Nothing of it is ever removed but by a person.
"""

from __future__ import annotations

import logging
import os
import stat as modes
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import trio
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from sessiond.errors import Failed, InvalidOption, NotSupported, SessiondError
from sessiond.keep_rules import (
    RULES_LIMIT,
    KeepRules,
    checked_path,
    checked_rule,
    path_of,
    rule_for,
)
from sessiond.overlay import syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import join
from sessiond.session import durable, quota
from sessiond.session.faults import explained
from sessiond.session.model import KeptLayers, SessionRecord, UpperDirectories
from sessiond.session.records import fsync_directory
from sessiond.session.tree import copy_root, remove_tree

if TYPE_CHECKING:
    from sessiond.session.jobs import Job
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_DIRECTORIES = ("fs", "work", "work/work", "work/index", "orphans")
_FILE = "committed.json"
_FILE_LIMIT = 8 << 20


_Rule = Annotated[str, AfterValidator(checked_rule)]


class _Committed(BaseModel):
    """The contents of ``committed.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[_Rule, ...]
    unwanted: tuple[_Rule, ...] = ()
    """Of what is to be deleted as soon as no session shows it."""


class CommittedPath(NamedTuple):
    """What was committed, as it is now."""

    path: str
    """Absolute in the merged view."""
    bytes: int
    """That it takes on disk."""


class KeptFiles:
    """What of the state directory outlives sessions. Functions block."""

    def __init__(self, state: Path) -> None:
        self._base = state / "kept"

    def directory(self, record: SessionRecord) -> Path:
        """Where what outlives resets of a session is."""
        return self._base / str(record.uid) / record.profile

    def prepare(self, record: SessionRecord, image: Path) -> tuple[str, ...]:
        """Have a place for what outlives resets of a session on `image`; return what was committed.

        Raises `Failed`, `NoSpace` or, for its quota, `NotSupported`: it must not be served then.
        """
        directory = self.directory(record)
        with explained(f"prepare what outlives resets of session {record.id}, in {directory}"):
            if not directory.is_dir():
                self._make(record, directory, image)
            elif record.keep_quota is not None:
                quota.ensure(directory, record.keep_quota)
            else:
                with suppress(OSError, NotSupported):  # it never had one where there are none
                    quota.release(directory)
            return self._read(directory).rules

    def layers(self, record: SessionRecord) -> KeptLayers:
        """What is to be mounted."""
        directory = self.directory(record)
        upper = UpperDirectories(fs=directory / "fs", work=directory / "work")
        return KeptLayers(upper, directory / "orphans", record.keep_rules)

    def write(self, record: SessionRecord, unwanted: tuple[str, ...] = ()) -> None:
        """Make what `record` says was committed so for all later sessions, too.

        What `unwanted` rules name is to be deleted as soon as nothing else names it. Raises
        `Failed`, `NoSpace`.
        """
        all_unwanted = dict.fromkeys((*self._read(self.directory(record)).unwanted, *unwanted))
        self._write(record, tuple(rule for rule in all_unwanted if rule not in record.commits))

    def unwanted(self, record: SessionRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the rules of what is to be deleted now, and of what the session shows until reset.

        What another rule has come to name is no longer unwanted. Raises `Failed`.
        """
        unwanted = self._read(self.directory(record)).unwanted
        shown, wanted = KeepRules(record.keep_rules), KeepRules(record.lasting_rules)
        return (
            tuple(rule for rule in unwanted if not shown.keep(path_of(rule))),
            tuple(
                rule
                for rule in unwanted
                if shown.keep(path_of(rule)) and not wanted.keep(path_of(rule))
            ),
        )

    def forget_unwanted(self, record: SessionRecord, rest: tuple[str, ...]) -> None:
        """Note that there is nothing but `rest` to be deleted. Raises `Failed`, `NoSpace`."""
        self._write(record, rest)

    def sizes(self, record: SessionRecord) -> list[CommittedPath]:
        """Return what was committed, and what it takes. Raises `Failed`."""
        fs = self.directory(record) / "fs"
        with explained(f"look at {fs}"), closing(_open_layer(fs)) as layer:
            return [
                CommittedPath("/" + os.fsdecode(path), _bytes_at(layer, path))
                for path in map(path_of, record.commits)
            ]

    def _write(self, record: SessionRecord, unwanted: tuple[str, ...]) -> None:
        directory = self.directory(record)
        with explained(f"write down in {directory} what was committed"):
            committed = _Committed(rules=record.commits, unwanted=unwanted)
            text = committed.model_dump_json(indent=1)
            durable.replace(directory / _FILE, text.encode())

    def _make(self, record: SessionRecord, directory: Path, image: Path) -> None:
        new = self._base / f"new-{record.uid}-{record.profile}"
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_tree(new)
        new.mkdir(mode=0o700)
        if record.keep_quota is not None:
            quota.assign(new, record.keep_quota)
        for name in _DIRECTORIES:
            (new / name).mkdir(mode=0o700)
        copy_root(image, new / "fs")
        for path in (new / "fs", new):
            fsync_directory(path)
        new.rename(directory)
        for path in (directory.parent, self._base, self._base.parent):
            fsync_directory(path)

    def _read(self, directory: Path) -> _Committed:
        try:
            fd = os.open(directory / _FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return _Committed(rules=())
        with open(fd, "rb") as file:
            text = file.read(_FILE_LIMIT)
        try:
            return _Committed.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]["msg"]
            raise Failed(
                f"{directory / _FILE} makes no sense ({first}); correct it, or move it away: what "
                "was committed is not shown then, unless the profile keeps it."
            ) from None


def _open_layer(fs: Path) -> Layer:
    return Layer.open(os.fsencode(fs), writable=True)


def _bytes_at(layer: Layer, path: bytes) -> int:
    """Return the bytes that what a layer has at a path takes; programs may change it meanwhile.

    A file with several names counts for each. No symlink is followed.
    """
    total, pending = 0, [path]
    while pending:
        trio.from_thread.check_cancelled()
        path = pending.pop()
        stat = layer.stat_or_none(path)
        if stat is not None:
            total += stat.st_blocks * 512
            if modes.S_ISDIR(stat.st_mode):
                with suppress(FileNotFoundError, NotADirectoryError):
                    pending += [
                        join(path, name) for name, _ in syscalls.scan(layer.directory(path))
                    ]
    return total


def with_committed(record: SessionRecord, rules: tuple[str, ...]) -> SessionRecord:
    """Return `record`, knowing also of what was committed by others."""
    commits = tuple(dict.fromkeys((*rules, *record.commits)))
    return record.model_copy(update={"commits": commits})


def committed_rules(record: SessionRecord, paths: list[str]) -> tuple[str, ...]:
    """Return the rules that a commit of `paths` adds. Raises `InvalidOption`, `NotSupported`."""
    if record.keep is None:
        raise NotSupported(
            f"Nothing outlives resets of session {record.id}: the profile it was made from has no "
            "'keep'. Add keep = [] to it, and make a new session."
        )
    if not paths:
        raise InvalidOption("There is nothing to commit: name the paths of files or directories.")
    try:
        rules = tuple(rule_for(os.fsencode(checked_path(path)[1:])) for path in paths)
    except ValueError as error:
        raise InvalidOption(f"{error}.") from None
    _require_few(record, (*record.keep_rules, *rules))
    return rules


def checked_rules(record: SessionRecord, rules: list[str]) -> tuple[str, ...]:
    """Return rules that are to be those of a session. Raises `InvalidOption`, `NotSupported`."""
    if record.keep is None:
        raise NotSupported(
            f"Nothing outlives resets of session {record.id}: the profile it was made from has no "
            "'keep'. Make a new session."
        )
    try:
        checked = tuple(checked_rule(rule) for rule in rules)
    except ValueError as error:
        raise InvalidOption(f"{error}.") from None
    _require_few(record, checked)
    return checked


def _require_few(record: SessionRecord, rules: tuple[str, ...]) -> None:
    if len(set(rules)) > RULES_LIMIT:
        raise InvalidOption(
            f"Session {record.id} would have {len(set(rules))} rules for what is kept; at most "
            f"{RULES_LIMIT} are allowed. Name directories in place of what is in them."
        )


async def commit(session: Session, job: Job, paths: list[str], rules: tuple[str, ...]) -> None:
    """Save what a session shows at `paths`; within its operation.

    Programs that write wait for the end of it only. `rules` are those of the paths. Raises
    `NoSpace`, `Failed`; all is as before then.
    """
    store = session.services.store
    mount = session.view.require()
    await trio.to_thread.run_sync(store.kept.unwanted, session.record)  # can be read, that is
    async with mount.committing(tuple(paths), job.report) as step, mount.frozen():
        await step()
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await step()
            after = with_committed(session.record, rules)
            try:
                # The record first: who finds the one and not the other finishes it (`KeptFiles`).
                await trio.to_thread.run_sync(store.write, after)
                session.adopt(after)
                await trio.to_thread.run_sync(store.kept.write, after)
            finally:
                await mount.keep(session.record.keep_rules)


async def uncommit(session: Session, paths: list[str], *, delete: bool) -> None:
    """Take commits back; within its operation. Raises `InvalidOption`, `NotSupported`, `NoSpace`,
    `Failed`; all is as before then.
    """
    before = session.record
    rules = committed_rules(before, paths)
    for rule in rules:
        if rule not in before.commits:
            raise InvalidOption(
                f"{shown_path(rule)} was not committed. What was: "
                f"{', '.join(map(shown_path, before.commits)) or 'nothing'}."
            )
    after = before.without_commits(rules)
    others = KeepRules(after.lasting_rules)
    for rule in rules:
        if delete and others.keep(path_of(rule)):
            raise InvalidOption(
                f"{shown_path(rule)} cannot be deleted: it is kept by another rule, too."
            )
    store = session.services.store
    with trio.CancelScope(shield=True):
        await session.write(after)
        try:
            await trio.to_thread.run_sync(store.kept.write, after, rules if delete else ())
        except SessiondError:
            await session.write(before)
            raise


def shown_path(rule: str) -> str:
    """Return the path of a rule of `rule_for`, for people."""
    return "/" + os.fsdecode(path_of(rule))


async def committed(session: Session) -> list[CommittedPath]:
    """Return what was committed, with sizes. Raises `Failed`."""
    if session.record.keep is None:
        return []
    kept = session.services.store.kept
    return await trio.to_thread.run_sync(kept.sizes, session.record, abandon_on_cancel=True)


async def discard_unwanted(session: Session) -> None:
    """Delete what was uncommitted for that, if the session does not show it any more.

    Only within an operation. That it cannot be is logged: it is tried again at the next reset.
    """
    record, kept = session.record, session.services.store.kept
    if session.view.mount is None or record.keep is None:
        return
    try:
        unwanted, rest = await trio.to_thread.run_sync(kept.unwanted, record)
        if unwanted:
            await session.view.mount.discard(tuple(map(shown_path, unwanted)))
            await trio.to_thread.run_sync(kept.forget_unwanted, record, rest)
    except SessiondError as error:
        log.error("What was uncommitted in session %s is there still: %s", session.id, error)  # noqa: TRY400


async def use_rules(session: Session) -> None:
    """Have the rules of the record in force, which is the last step of what changed them."""
    if session.view.mount is None or session.record.keep is None:
        return
    try:
        await session.view.mount.keep(session.record.keep_rules)
    except SessiondError as error:
        log.error("Session %s keeps by its rules of before: %s", session.id, error)  # noqa: TRY400
