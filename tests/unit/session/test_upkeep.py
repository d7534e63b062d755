"""What a session does about its snapshots by itself."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing

from sessiond.config import Config
from sessiond.session import session as session_module
from sessiond.session.layer_size import layer_bytes
from sessiond.session.manager import Manager, Session
from sessiond.session.model import LayerNumber, SessionState, SnapshotName, SnapshotRules
from sessiond.session.space import Space
from sessiond.session.tree import tree_bytes, unchecked
from sessiond.session.upkeep import _seconds_left
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until
from tests.unit.session.test_retention import session as session_record
from tests.unit.session.test_retention import snapshot as snapshot_record

ExpectLog = Callable[[str], None]

KIB = 1 << 10
ONE, TWO = SnapshotName("one"), SnapshotName("two")


def config(world: World, **rule: object) -> Config:
    """The profiles of `world`, with a rule for snapshots."""
    tables = world.config().model_dump(mode="json", exclude_unset=True)
    for profile in tables["profile"].values():
        profile["snapshots"] = rule
    return Config.model_validate(tables)


async def create(manager: Manager, profile: str = "volatile") -> Session:
    return await manager.create(USER, profile, session_id="s")


async def snapshot(world: World, session: Session, name: str, size: int) -> None:
    """Write a file of `size` bytes, and keep that state."""
    await world.mount("s").write(f"of-{name}", b"x" * size)
    await session.snapshots.make(name)


def valid(session: Session, *names: str) -> bool:
    return all(session.snapshots.size(SnapshotName(name)).known for name in names)


async def test_sizes_are_told_when_they_are_known(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 64 * KIB)
        await snapshot(world, session, "two", 256 * KIB)
        await until(lambda: valid(session, "one", "two"))
        one, two = session.snapshots.size(ONE), session.snapshots.size(TWO)
        assert 64 * KIB <= one.bytes < 128 * KIB
        assert 320 * KIB <= two.bytes < 448 * KIB
        assert (one.exclusive, two.exclusive) == (0, 0)  # the merged view needs them
        await session.reset(started_by=UID).wait()
        assert session.snapshots.size(ONE).exclusive == 0
        assert session.snapshots.size(TWO).exclusive == two.bytes - one.bytes
        await session.snapshots.delete("two")
        assert session.snapshots.size(ONE).exclusive == one.bytes


async def test_sizes_are_counted_again_where_the_session_has_moved_to(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 64 * KIB)
        await until(lambda: valid(session, "one"))
        await session.persist(started_by=UID).wait()
        await until(lambda: valid(session, "one"))


async def test_count_is_kept_to_with_each_new_snapshot(
    world: World, caplog: pytest.LogCaptureFixture, expect_log: ExpectLog
) -> None:
    caplog.set_level(logging.INFO)
    async with world.manager(config(world, count=2)) as manager:
        session = await create(manager)
        for name in ("one", "two", "three"):
            await snapshot(world, session, name, 1)
        assert list(session.snapshots) == ["two", "three"]
        assert "no snapshot s one" in world.recorder.events
        expect_log(
            "Snapshot one of session s is deleted: it is not among those that count = 2 keeps."
        )
        await session.snapshots.pin("two", True)
        await snapshot(world, session, "four", 1)
        assert list(session.snapshots) == ["two", "three", "four"]
        await session.restore("three", started_by=UID).wait()
        assert list(session.snapshots) == ["two", "three", "four"]


async def test_a_rule_does_not_take_what_is_being_restored(world: World) -> None:
    async with world.manager(config(world, count=1)) as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 1)
        await world.mount("s").write("new", b"")
        await session.restore("one", started_by=UID).wait()
        one, kept = session.snapshots
        assert (one, kept.startswith("before-restore-")) == ("one", True)
        assert session.record.layers == session.record.snapshot("one").layers


async def test_max_bytes_is_kept_to_once_sizes_are_known(world: World) -> None:
    async with world.manager(config(world, max_bytes="100K")) as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 64 * KIB)
        await session.reset(started_by=UID).wait()
        await snapshot(world, session, "two", 64 * KIB)
        await until(lambda: valid(session, "one", "two"))
        assert list(session.snapshots) == ["one", "two"]  # two is what the merged view is built on
        await session.reset(started_by=UID).wait()
        await until(lambda: list(session.snapshots) == ["two"])
        await until(lambda: world.layers(world.storage("s")) == ["3", "5"])


async def test_short_space_takes_automatic_ones_one_by_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space(0, 100, 0, 0)
    monkeypatch.setattr(session_module, "measure", lambda _: space)
    monkeypatch.setattr("sessiond.session.manager._SPACE_SECONDS", 3600.0)
    async with world.manager() as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 1)
        for number in range(3):
            await world.mount("s").write(f"new{number}", b"")
            await session.restore("one", started_by=UID).wait()
        *_, last = session.snapshots
        space = Space(99, 100, 0, 0)
        for left in (3, 2):
            await until(lambda: not session.is_deleting)
            session.check_space()
            await until(lambda left=left: len(session.snapshots) == left)  # type: ignore[misc]
        space = Space(10, 100, 0, 0)
        await until(lambda: not session.is_deleting)
        session.check_space()
        assert list(session.snapshots) == ["one", last]


async def test_nobody_deletes_while_an_operation_runs(world: World) -> None:
    async with world.manager(config(world, max_bytes="1K")) as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 64 * KIB)
        await until(lambda: valid(session, "one"))
        job = session.reset(started_by=UID)
        await job.wait()
        assert job.error is None
        await until(lambda: not session.snapshots)


async def seen(condition: Callable[[], object]) -> None:
    """Return once `condition` holds, with a clock that stands still."""
    for _ in range(1000):
        if condition():
            return
        await trio.testing.wait_all_tasks_blocked(0.01)
    raise AssertionError


async def test_snapshots_are_made_at_an_interval(
    world: World, mock_clock: trio.testing.MockClock
) -> None:
    async with world.manager(config(world, every="1h")) as manager:
        session = await create(manager)
        await world.mount("s").write("one", b"")
        mock_clock.jump(3599)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not session.snapshots
        mock_clock.jump(2)
        await seen(lambda: len(session.snapshots) == 1 and session.state is SessionState.ACTIVE)
        (made,) = session.snapshots.values()
        assert made.automatic
        assert made.name.startswith("timed-20")
        mock_clock.jump(3600)  # nothing was changed
        await trio.testing.wait_all_tasks_blocked(0.01)
        await world.mount("s").write("two", b"")
        mock_clock.jump(3600)
        await seen(lambda: len(session.snapshots) == 2)
        await seen(lambda: session.state is SessionState.ACTIVE)


@pytest.mark.parametrize(
    ("every", "passed", "left"),
    [(None, 0, math.inf), (3600, 1000, 2600), (3600, 7200, 0), (3600, -86400, 3600)],
)
def test_the_interval_begins_with_the_last_automatic_one(
    every: int | None, passed: float, left: float
) -> None:
    then = datetime.now(UTC) - timedelta(seconds=passed)
    made = snapshot_record("a", 1, automatic=True).model_copy(update={"created_at": then})
    by_hand = snapshot_record("b", 2)
    record = session_record(SnapshotRules(every=every), [made, by_hand])
    created = record.model_copy(update={"created_at": then - timedelta(days=9)})
    assert _seconds_left(created) == pytest.approx(left, abs=60)


@pytest.mark.root
def test_a_size_is_counted_once(tmp_path: Path) -> None:
    layer = tmp_path / "7"
    (layer / "fs").mkdir(parents=True)
    (layer / "fs/file").write_bytes(b"x" * 64 * KIB)
    os.link(layer / "fs/file", layer / "link")
    number = LayerNumber(7)
    size = layer_bytes(layer, number, unchecked)
    assert size == tree_bytes(layer)
    assert 64 * KIB <= size < 128 * KIB

    def never() -> None:
        raise AssertionError

    assert layer_bytes(layer, number, never) == size
    # An emptied layer may become another one.
    layer = layer.rename(tmp_path / "8")
    (layer / "fs/file").unlink()
    (layer / "link").unlink()
    assert layer_bytes(layer, LayerNumber(8), unchecked) < 64 * KIB
    os.setxattr(layer, "trusted.sessiond.bytes", b"8 forged")
    assert layer_bytes(layer, LayerNumber(8), unchecked) < 64 * KIB


async def test_a_layer_that_cannot_be_counted_is_only_told_of(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expect_log: ExpectLog,
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sessiond.session.upkeep.layer_bytes", broken)
    async with world.manager() as manager:
        session = await create(manager)
        await snapshot(world, session, "one", 1)
        await until(lambda: "cannot be counted" in caplog.text)
        assert session.snapshots.size(ONE) == (0, 0, False)
