"""Resets that come by themselves: when, announced how long before, and held back how long."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sessiond.errors import InvalidOption, NoSpace, NotAuthorized, NotSupported
from sessiond.session.clock import Instant, next_time_of_day
from sessiond.session.model import (
    ImageSource,
    ResetRules,
    ScheduledReset,
    SessionId,
    SessionRecord,
    SessionState,
    StorageKind,
    Uid,
)
from sessiond.session.presence import Attendance, NoPresence
from sessiond.session.reset_timer import ResetTimer
from sessiond.session.schedule import Due, Why
from sessiond.session.surroundings import Surroundings
from tests.support.clocks import START, FakeClock

ROOT, ALICE = Uid(0), Uid(1000)
HOUR = 3600.0


class FakePresence:
    """Somebody who is there, until told otherwise."""

    def __init__(self) -> None:
        self.found = Attendance(logged_in=True)

    async def attendance(self, uid: Uid) -> Attendance:
        await trio.lowlevel.checkpoint()
        return self.found


class FakeSession:
    """What the timer needs of a session. `log` has each event with the hour at which it was."""

    def __init__(self, rules: ResetRules, presence: FakePresence | NoPresence) -> None:
        self.clock = FakeClock()
        self.presence = presence
        self.id, self.uid = SessionId("s"), ALICE
        self.state = SessionState.ACTIVE
        self.services: Any = SimpleNamespace(
            surroundings=Surroundings(clock=self.clock, presence=presence)
        )
        self.record = SessionRecord(
            id=self.id,
            user="alice",
            uid=self.uid,
            profile="guest",
            source=ImageSource(path=Path("/image")),
            image="digest",
            mount_point=Path("/mnt"),
            nosuid=True,
            nodev=True,
            storage=StorageKind.TMPFS,
            created_at=START,
            began=Instant.now(self.clock),
            reset_rules=rules,
        )
        self.log: list[tuple[float, str]] = []
        self.failures: list[Exception] = []
        self.dues: list[Due] = []
        self.timer = ResetTimer(self)  # type: ignore[arg-type]

    def note(self, event: str) -> None:
        hours = (self.clock.boottime() - 1000) / HOUR
        self.log.append((round(hours, 3), event))

    def tell_changed(self) -> None:
        pass

    def tell_reset_scheduled(self, when: datetime, why: Why) -> None:
        left = (when - self.clock.now()).total_seconds()
        self.note(f"{why} in {left:.0f} s")

    async def reset_when_idle(self, due: Due) -> None:
        await trio.lowlevel.checkpoint()
        if self.failures:
            self.note("fails")
            raise self.failures.pop(0)
        self.dues.append(due)
        self.note("reset")
        self.record = self.record.reset(Instant.now(self.clock), scheduled=due.why is Why.SCHEDULED)

    async def schedule(self, scheduled: ScheduledReset | None) -> None:
        await trio.lowlevel.checkpoint()
        self.record = self.record.model_copy(update={"scheduled": scheduled})
        self.timer.look()

    def restart(self) -> None:
        """A new manager, with the record of the old one."""
        self.timer = ResetTimer(self)  # type: ignore[arg-type]


@pytest.fixture
def start(nursery: trio.Nursery) -> Callable[..., FakeSession]:
    def start(presence: FakePresence | NoPresence | None = None, **rules: object) -> FakeSession:
        session = FakeSession(ResetRules.model_validate(rules), presence or FakePresence())
        nursery.start_soon(session.timer.run)
        return session

    return start


Start = Callable[..., FakeSession]


@contextmanager
def time_zone(name: str) -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()


# When


async def test_a_session_lasts_so_long(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=2 * HOUR, warning=60)
    await trio.sleep(5 * HOUR)
    assert session.log == [
        (1.983, "after in 60 s"),
        (2.0, "reset"),
        (3.983, "after in 60 s"),
        (4.0, "reset"),
    ]
    assert session.dues[0].asked_by == ROOT


async def test_what_is_to_come_can_be_read(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=2 * HOUR)
    await trio.sleep(1)
    assert session.timer.next_reset == START + timedelta(hours=2)
    assert session.timer.reason == "after"


async def test_nothing_is_to_come_unless_asked_for(autojump_clock: MockClock, start: Start) -> None:
    session = start()
    await trio.sleep(1000 * HOUR)
    assert (session.log, session.timer.next_reset, session.timer.reason) == ([], None, None)


async def test_the_profile_says_how(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=HOUR, terminate=True, grace=3)
    await trio.sleep(1.5 * HOUR)
    assert (session.dues[0].manner.terminate, session.dues[0].manner.grace) == (True, 3)


async def test_setting_the_clock_makes_a_session_neither_longer_nor_shorter(
    autojump_clock: MockClock, start: Start
) -> None:
    session = start(after=2 * HOUR, warning=0)
    await trio.sleep(HOUR)
    session.clock.set_by = timedelta(days=-1000)
    await trio.sleep(HOUR / 2)
    session.clock.set_by = timedelta(days=1000)
    await trio.sleep(2 * HOUR)
    assert session.log == [(2.0, "after in 0 s"), (2.0, "reset")]


async def test_a_suspended_machine_counts(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=2 * HOUR, warning=60)
    await trio.sleep(HOUR)
    session.clock.suspended = 10 * HOUR
    await trio.sleep(HOUR / 2)
    (announced, event), (reset, _) = session.log
    assert 11 <= announced < 11.01, "soon after it has woken"
    assert event == "after in 60 s", "and not without a warning"
    assert 11.016 <= reset < 11.03


async def test_daily(autojump_clock: MockClock, start: Start) -> None:
    with time_zone("UTC"):
        session = start(daily="04:00", warning=60)
        await trio.sleep(41 * HOUR)
    assert session.log == [
        (15.983, "daily in 60 s"),
        (16.0, "reset"),
        (39.983, "daily in 60 s"),
        (40.0, "reset"),
    ]


async def test_daily_counts_from_the_clock_as_it_is_put_right(
    autojump_clock: MockClock, start: Start
) -> None:
    """A machine without a clock of its own begins in 1970."""
    with time_zone("UTC"):
        session = start(daily="04:00", warning=60)
        session.clock.set_by = timedelta(days=-20_000)
        session.record = session.record.model_copy(
            update={"began": Instant.now(session.clock), "created_at": session.clock.now()}
        )
        await trio.sleep(HOUR)
        session.clock.set_by = timedelta(0)
        await trio.sleep(14 * HOUR)
        assert session.log == []
        await trio.sleep(2 * HOUR)
    assert [event for _, event in session.log] == ["daily in 60 s", "reset"]


async def test_daily_is_made_up_for_after_a_night_without_power(
    autojump_clock: MockClock, start: Start
) -> None:
    with time_zone("UTC"):
        session = start(daily="04:00", warning=60)
        session.record = session.record.model_copy(
            update={
                "began": Instant(wall=START - timedelta(hours=20), boot="other", seconds=100),
            }
        )
        await trio.sleep(HOUR)
    assert session.log == [(0.0, "daily in 60 s"), (0.017, "reset")]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("2026-03-28T12:00+00:00", "2026-03-29T01:30+00:00"),  # 02:30 is skipped: 03:30
        ("2026-03-29T12:00+00:00", "2026-03-30T00:30+00:00"),
        ("2026-10-24T12:00+00:00", "2026-10-25T00:30+00:00"),  # the first of two
        ("2026-06-01T00:29:30+00:00", "2026-06-02T00:30+00:00"),  # it was that time just now
    ],
)
def test_times_of_day_and_daylight_saving(after: str, expected: str) -> None:
    with time_zone("Europe/Berlin"):
        found = next_time_of_day(2, 30, datetime.fromisoformat(after))
    assert found == datetime.fromisoformat(expected)
    assert found.tzinfo is UTC


async def test_who_is_idle_is_reset_once(autojump_clock: MockClock, start: Start) -> None:
    session = start(presence := FakePresence(), idle=600, warning=60)
    await trio.sleep(2 * HOUR)
    assert session.log == []
    presence.found = Attendance(logged_in=True, idle_since=session.clock.monotonic())
    await trio.sleep(5 * HOUR)
    assert [event for _, event in session.log] == ["idle in 60 s", "reset"]
    assert session.log[1][0] == pytest.approx(2 + 600 / HOUR, abs=0.01)
    presence.found = Attendance(logged_in=True)
    await trio.sleep(60)
    presence.found = Attendance(logged_in=True, idle_since=session.clock.monotonic())
    await trio.sleep(HOUR)
    assert len(session.dues) == 2


async def test_who_comes_back_in_time_is_not_reset(autojump_clock: MockClock, start: Start) -> None:
    session = start(presence := FakePresence(), idle=600, warning=60)
    await trio.sleep(HOUR)
    presence.found = Attendance(logged_in=True, idle_since=session.clock.monotonic())
    await trio.sleep(570)
    assert [event for _, event in session.log] == ["idle in 60 s"]
    assert session.timer.reason == "idle"
    presence.found = Attendance(logged_in=True)
    await trio.sleep(HOUR)
    assert not session.dues
    assert (session.timer.next_reset, session.timer.reason) == (None, None)


async def test_who_has_logged_out_is_idle(autojump_clock: MockClock, start: Start) -> None:
    session = start(presence := FakePresence(), idle=600, warning=0)
    await trio.sleep(HOUR)
    presence.found = Attendance(logged_in=False)
    await trio.sleep(5 * HOUR)
    assert [event for _, event in session.log] == ["idle in 0 s", "reset"]


async def test_where_nobody_knows_of_idleness_other_rules_count(
    autojump_clock: MockClock,
    start: Start,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = start(NoPresence(), idle=600, after=2 * HOUR, warning=0)
    await trio.sleep(2.5 * HOUR)
    assert [event for _, event in session.log] == ["after in 0 s", "reset"]
    expect_log("whether users are idle")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1, "told once"
    with pytest.raises(NotSupported):
        await session.timer.schedule(ALICE, idle=60)


# Asked for


async def test_at_a_time(autojump_clock: MockClock, start: Start) -> None:
    session = start(warning=60)
    await session.timer.schedule(ALICE, at=START + timedelta(hours=3))
    await trio.sleep(10 * HOUR)
    assert session.log == [(2.983, "scheduled in 60 s"), (3.0, "reset")]
    assert session.dues[0].asked_by == ALICE
    assert session.record.scheduled is None


async def test_the_time_goes_by_the_clock_on_the_wall(
    autojump_clock: MockClock, start: Start
) -> None:
    session = start(warning=0)
    await session.timer.schedule(ALICE, at=START + timedelta(hours=3))
    await trio.sleep(HOUR)
    session.clock.set_by = timedelta(hours=1)
    await trio.sleep(10 * HOUR)
    assert [hour for hour, _ in session.log] == [2.0, 2.0]


async def test_after_a_while_does_not(autojump_clock: MockClock, start: Start) -> None:
    session = start(warning=0)
    await session.timer.schedule(ALICE, after=3 * HOUR)
    await trio.sleep(HOUR)
    session.clock.set_by = timedelta(hours=1)
    await trio.sleep(10 * HOUR)
    assert [hour for hour, _ in session.log] == [3.0, 3.0]


async def test_who_asks_for_it_soon_gets_it_soon(autojump_clock: MockClock, start: Start) -> None:
    session = start(warning=600)
    await session.timer.schedule(ALICE, after=5)
    await trio.sleep(6)
    assert [event for _, event in session.log] == ["scheduled in 5 s", "reset"]


async def test_one_takes_the_place_of_another(autojump_clock: MockClock, start: Start) -> None:
    session = start(warning=0)
    await session.timer.schedule(ALICE, after=HOUR)
    await session.timer.schedule(ALICE, after=2 * HOUR)
    await trio.sleep(10 * HOUR)
    assert session.log == [(2.0, "scheduled in 0 s"), (2.0, "reset")]


async def test_it_can_be_cancelled(autojump_clock: MockClock, start: Start) -> None:
    session = start(warning=60)
    await session.timer.schedule(ALICE, after=HOUR)
    await trio.sleep(HOUR - 30)
    await session.timer.cancel(ALICE)
    await session.timer.cancel(ALICE)
    await trio.sleep(HOUR)
    assert not session.dues
    assert session.timer.next_reset is None


async def test_owners_do_not_undo_what_root_has_scheduled(
    autojump_clock: MockClock, start: Start
) -> None:
    session = start(warning=60)
    await session.timer.schedule(ALICE, after=HOUR)
    await session.timer.schedule(ROOT, after=2 * HOUR)
    with pytest.raises(NotAuthorized, match="Root has scheduled"):
        await session.timer.cancel(ALICE)
    with pytest.raises(NotAuthorized):
        await session.timer.schedule(ALICE, after=1)
    await session.timer.cancel(ROOT)


@pytest.mark.parametrize(
    "when",
    [
        {},
        {"at": START},
        {"at": START + timedelta(days=365 * 100)},
        {"at": START + timedelta(hours=1), "after": 1.0},
        {"after": 1.0, "idle": 1.0},
    ],
)
async def test_impossible_times_are_refused(
    autojump_clock: MockClock, start: Start, when: dict[str, Any]
) -> None:
    session = start()
    with pytest.raises(InvalidOption):
        await session.timer.schedule(ALICE, **when)


async def test_a_new_manager_goes_on(autojump_clock: MockClock, start: Start) -> None:
    session = start(warning=60)
    await session.timer.schedule(ALICE, after=2 * HOUR)
    await trio.sleep(HOUR)
    session.restart()
    session.record = SessionRecord.model_validate_json(session.record.model_dump_json())
    async with trio.open_nursery() as second:
        second.start_soon(session.timer.run)
        await trio.sleep(1.5 * HOUR)
        second.cancel_scope.cancel()
    assert (2.0, "reset") in session.log


async def test_one_that_fails_is_tried_again(
    autojump_clock: MockClock, start: Start, expect_log: Callable[[str], None]
) -> None:
    session = start(warning=0)
    session.failures = [NoSpace("The disk is full."), NoSpace("The disk is full.")]
    await session.timer.schedule(ALICE, after=HOUR)
    await trio.sleep(2 * HOUR)
    assert [event for _, event in session.log] == ["scheduled in 0 s", "fails", "fails", "reset"]
    assert session.log[-1][0] == pytest.approx(1 + 120 / HOUR, abs=0.002)
    expect_log("The disk is full.")


# Held back


async def test_an_inhibitor_holds_until_it_is_closed(
    autojump_clock: MockClock, start: Start
) -> None:
    session = start(after=HOUR, warning=60, inhibit=5 * HOUR)
    lock = session.timer.inhibitors.add(ALICE, "Player", "A film")
    await trio.sleep(2 * HOUR)
    assert session.log == []
    (held,) = session.timer.inhibitors.all
    assert (held.who, held.why, held.uid) == ("Player", "A film", ALICE)
    os.close(lock)
    await trio.sleep(HOUR / 2)
    assert session.log == [(2.0, "after in 60 s"), (2.017, "reset")]
    assert session.timer.inhibitors.all == ()


async def test_it_holds_also_once_it_is_announced(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=HOUR, warning=60, inhibit=5 * HOUR)
    await trio.sleep(HOUR - 30)
    lock = session.timer.inhibitors.add(ALICE, "Player", "A film")
    await trio.sleep(HOUR)
    assert [event for _, event in session.log] == ["after in 60 s"]
    assert session.timer.next_reset == START + timedelta(hours=6)
    os.close(lock)


async def test_a_user_cannot_hold_it_for_ever(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=HOUR, warning=60, inhibit=HOUR)
    lock = session.timer.inhibitors.add(ALICE, "Me", "I like it here")
    await trio.sleep(10 * HOUR)
    assert session.log[:2] == [(1.983, "after in 60 s"), (2.0, "reset")]
    assert session.log[3][0] == 4.0, "each time"
    os.close(lock)


async def test_nor_by_letting_go_and_holding_again(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=HOUR, warning=60, inhibit=HOUR)
    while not session.dues:
        lock = session.timer.inhibitors.add(ALICE, "Me", "I like it here")
        await trio.sleep(20)
        os.close(lock)
        await trio.sleep(5)
    assert session.log[-1] == (2.0, "reset")


async def test_nor_by_scheduling_others(autojump_clock: MockClock, start: Start) -> None:
    session = start(presence := FakePresence(), after=HOUR, warning=60, inhibit=HOUR)
    presence.found = Attendance(logged_in=True, idle_since=session.clock.monotonic())
    lock = session.timer.inhibitors.add(ALICE, "Me", "I like it here")
    while not session.dues:
        await session.timer.schedule(ALICE, idle=1)
        await trio.sleep(20)
        await session.timer.cancel(ALICE)
        await trio.sleep(20)
    assert session.log[-1][0] <= 2.001
    os.close(lock)


async def test_root_can(autojump_clock: MockClock, start: Start) -> None:
    session = start(after=HOUR, warning=60, inhibit=HOUR)
    lock = session.timer.inhibitors.add(ROOT, "Administrator", "Backup")
    await trio.sleep(100 * HOUR)
    assert session.log == []
    assert session.timer.next_reset is None
    assert session.timer.reason == "after"
    os.close(lock)
    await trio.sleep(HOUR / 2)
    assert session.log == [(100.0, "after in 60 s"), (100.017, "reset")]


async def test_who_writes_into_the_lock_wakes_nobody(
    autojump_clock: MockClock, start: Start
) -> None:
    session = start(after=HOUR, warning=60, inhibit=5 * HOUR)
    lock = session.timer.inhibitors.add(ALICE, "Player", "A film")
    os.write(lock, b"x" * 5000)
    await trio.sleep(2 * HOUR)
    assert len(session.timer.inhibitors.all) == 1
    assert session.log == []
    os.close(lock)


async def test_a_fault_ends_no_session(
    autojump_clock: MockClock,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:
    session = start(after=HOUR, warning=0)
    faults = [ZeroDivisionError("a fault")]

    def fail(self: FakeClock) -> datetime:
        if faults:
            raise faults.pop()
        return START + timedelta(seconds=self.boottime() - 1000)

    monkeypatch.setattr(FakeClock, "now", fail)
    await trio.sleep(2 * HOUR)
    assert session.dues
    expect_log("The timer of session s failed")
