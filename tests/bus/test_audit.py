"""The audit trail: who asked for what, and how it ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import trio

from sessiond.bus import audit, client, names, service
from sessiond.bus.audit import Attempt, Audit, Outcome
from sessiond.bus.client import Client
from sessiond.errors import AuthorizationRequired, Busy, NotAuthorized, SessiondError
from sessiond.journal import Event
from sessiond.session.model import SessionId, Uid
from tests.bus.fake_manager import FakeManager
from tests.bus.test_authorisation import SESSION, STRANGER, call, guarded, guarded_bus
from tests.support.waiting import until

__all__ = ["guarded", "guarded_bus"]

Fields = dict[str, object]


@pytest.fixture
def trail(caplog: pytest.LogCaptureFixture) -> Iterator[list[Fields]]:
    """The fields of each line that was logged of a request."""
    caplog.set_level(logging.INFO)
    found: list[Fields] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "\n" not in record.getMessage()
            fields = getattr(record, "journal_fields", {})
            if fields.get("MESSAGE_ID") == Event.REQUEST:
                found.append(
                    {
                        name.removeprefix("SESSIOND_").lower(): value
                        for name, value in fields.items()
                        if name != "MESSAGE_ID"
                    }
                )

    collector = Collector()
    logging.getLogger().addHandler(collector)
    yield found
    logging.getLogger().removeHandler(collector)


async def test_what_is_done_is_told(
    sessiond: Client, serving: FakeManager, trail: list[Fields]
) -> None:
    uid = os.geteuid()
    session = await sessiond.create("nobody", "live", session_id="new")
    serving.sessions["new"].uid = Uid(uid)
    snapshot = await session.snapshot("fresh")
    await session.reset()
    with pytest.raises(Busy):
        await session.persist()
    await snapshot.delete()
    await session.close()
    common = {"caller_uid": uid, "session": "new", "user": "nobody"}
    assert trail == [
        {**common, "operation": "create", "outcome": "done"},
        {**common, "operation": "snapshot", "outcome": "done"},
        {**common, "operation": "reset", "outcome": "started", "job": 1},
        {**common, "operation": "persist", "outcome": "failed", "error": "Busy"},
        {**common, "operation": "edit-snapshot", "outcome": "done"},
        {**common, "operation": "close", "outcome": "done"},
    ]


async def test_looking_is_not_told(
    sessiond: Client, serving: FakeManager, trail: list[Fields]
) -> None:
    session = await sessiond.session("live")
    await session.info()
    await session.changes()
    assert trail == []


@pytest.mark.root
async def test_refusals_are_told(guarded: FakeManager, trail: list[Fields]) -> None:
    await call(STRANGER, SESSION, names.SESSION, "Reset", ("a{sv}", "0"))
    await call(STRANGER, SESSION, names.SESSION, "Changes", ("a{sv}", "0"))
    evil = "nobody\nSESSIOND_OUTCOME=done\n" + "x" * 10_000
    arguments = ("ssa{sv}", evil, "live", "0")
    await call(STRANGER, names.ROOT_PATH, names.MANAGER, "CreateSession", arguments)
    refused = {"caller_uid": STRANGER, "outcome": "refused", "error": "NotAuthorized"}
    assert trail == [
        {**refused, "operation": "reset", "session": "live", "user": "nobody"},
        {**refused, "operation": "compare", "session": "live", "user": "nobody"},
        {**refused, "operation": "create", "user": evil[: audit.SHOWN]},
    ]


async def test_a_call_that_is_cut_off_is_told(
    private_bus: str, manager: FakeManager, trail: list[Fields]
) -> None:
    live = manager.sessions["live"]
    live.snapshot_gate = trio.Event()
    async with trio.open_nursery() as serving:
        await serving.start(service.serve, manager)
        async with client.connect() as sessiond, trio.open_nursery() as asking:
            session = await sessiond.session("live")
            asking.start_soon(session.snapshot, "one")
            await until(lambda: live.snapshot_gate.statistics().tasks_waiting)
            serving.cancel_scope.cancel()
            await until(lambda: trail)
            asking.cancel_scope.cancel()
    assert [fields["outcome"] for fields in trail] == ["interrupted"]


async def test_errors_have_the_names_that_they_have_on_the_bus(trail: list[Fields]) -> None:
    error = AuthorizationRequired("Type.")
    Audit().answered(Attempt(Uid(1000), "reset", "desk", "alice"), error)
    assert (trail[0]["outcome"], trail[0]["error"]) == (
        "refused",
        "InteractiveAuthorizationRequired",
    )


def test_a_line_names_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_in = Attempt(Uid(0), "log-in", user="alice")
    Audit().answered(log_in, (names.session_path(SessionId("alice-1")), ""))
    Audit().answered(log_in, ("/", "There is no room."))
    Audit().answered(Attempt(Uid(0), "maintain"), None)
    assert [record.getMessage() for record in caplog.records] == [
        "Request of uid 0: log-in, session 'alice-1' of user 'alice': done",
        "Request of uid 0: log-in of user 'alice': done",
        "Request of uid 0: maintain: done",
    ]


def test_a_flood_of_failures_hides_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(audit, "FAILURES_OF_USER", 3)
    now = 0.0
    monkeypatch.setattr(trio, "current_time", lambda: now)
    log = Audit()

    def answer(uid: int, result: object) -> Outcome:
        return log.answered(Attempt(Uid(uid), "reset", "desk", "alice"), result)

    def told() -> list[str]:
        lines = [record.getMessage().partition(":")[0] for record in caplog.records]
        caplog.clear()
        return lines

    refusal: SessiondError = NotAuthorized("no")
    for _ in range(10):
        assert answer(1000, refusal) is Outcome.REFUSED
        answer(1000, Busy("wait"))
    answer(1000, None)
    answer(1001, refusal)
    for _ in range(5):
        answer(0, Busy("wait"))
    mine, others, roots = (f"Request of uid {uid}" for uid in (1000, 1001, 0))
    assert told() == [mine] * 3 + [mine, others] + [roots] * 5
    now += audit.FAILURES_SECONDS
    answer(1000, refusal)
    assert told() == ["17 more calls of uid 1000 came to nothing.", mine]
