"""What the journal is told of sessions, in fields."""

from __future__ import annotations

import logging

import pytest

from sessiond.errors import SessiondError
from sessiond.journal import Event
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("expect_log")


async def test_each_event_has_its_fields(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def told() -> list[dict[str, object]]:
        return [one.journal_fields for one in caplog.records if hasattr(one, "journal_fields")]

    def expected(kind: Event, **fields: object) -> dict[str, object]:
        return {"MESSAGE_ID": kind, "SESSIOND_SESSION": "s", "SESSIOND_USER": USER} | {
            f"SESSIOND_{name.upper()}": value for name, value in fields.items()
        }

    caplog.set_level(logging.INFO)
    profile = {"profile": "volatile"}
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        await session.snapshots.make("one")
        await session.snapshots.delete("one")
        await session.reset(started_by=UID).wait()
        cancelled = session.reset(started_by=UID)
        cancelled.cancel()
        with pytest.raises(SessiondError):
            await cancelled.wait()
        world.mount("s").die()
        await until(lambda: world.mount("s").recovered_times)
        await until(lambda: told()[-1]["MESSAGE_ID"] == Event.WORKER_DIED)
    job = {"caller_uid": UID, "operation": "reset"}
    assert told() == [
        expected(Event.SESSION_STARTED, **profile),
        expected(Event.SNAPSHOT_MADE, snapshot="one", **profile),
        expected(Event.SNAPSHOT_DELETED, snapshot="one", **profile),
        expected(Event.JOB_ENDED, **job, job=1, outcome="succeeded"),
        expected(Event.JOB_ENDED, **job, job=2, outcome="cancelled", error="Cancelled"),
        expected(Event.WORKER_DIED, outcome="recovered", **profile),
        expected(Event.SESSION_ENDED, **profile),
    ]
