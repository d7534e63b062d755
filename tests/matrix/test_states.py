"""Each method on a session that cannot be mounted."""

from __future__ import annotations

import os
from functools import partial

import pytest

from sessiond.errors import Failed
from sessiond.session import view
from sessiond.session.model import ResetRules, SessionState
from tests.matrix.conftest import MatrixWorld
from tests.matrix.methods import METHODS
from tests.matrix.stage import DONE, ERRORS, Stage
from tests.support.waiting import until

RESET = next(entry for entry in METHODS if str(entry) == "Session.Reset")
BROKEN = Failed("Nothing can be mounted today.")


@pytest.mark.parametrize(
    "mendable",
    [pytest.param(False, id="never"), pytest.param(True, id="now", marks=pytest.mark.soak)],
)
async def test_a_session_that_is_not_mounted(
    world: MatrixWorld,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mendable: bool,
) -> None:
    monkeypatch.setattr(view, "_PAUSE_SECONDS", 0.0)
    wrong = []
    async with world.served() as (manager, connection):
        for entry in METHODS:
            stage = Stage(connection, "s")
            await world.session(manager, stage, entry)
            session = manager.get("s")
            if not entry.maintenance:
                world.mounter.injected = {"recover": [BROKEN], "mount": [BROKEN] * 100}
                world.mount("s").die()
                await until(lambda: session.state is SessionState.FAILED)  # noqa: B023
                await until(lambda: "given up" in session.failure)  # noqa: B023
                await session.turn.become_idle()
            if mendable or entry.name in ("CreateSession", "BeginMaintenance"):
                world.mounter.injected = {}
            found, said = await stage.outcome(entry)
            world.mounter.injected = {}
            wanted = DONE if mendable and entry.mounts else entry.unmounted
            assert found in {DONE, *ERRORS}, said
            if found != wanted:
                wrong.append(f"{entry}: {wanted} expected, found {found}: {said}")
            if entry.closes and found == DONE:
                await until(lambda: "s" not in manager.sessions)
            else:
                await session.turn.become_idle()
                if found != DONE or not entry.replaces:
                    layers = map(
                        partial(session.services.store.layer, session.record),
                        session.record.all_layers,
                    )
                    assert any((layer / "fs/mine").exists() for layer in layers), str(entry)
                assert await stage.outcome(RESET) == (DONE, ""), str(entry)
                assert os.listdir(world.mount("s").stack.upper.fs) == [], str(entry)
            stage.close()
            for name in tuple(manager.sessions):
                await manager.close(name)
    assert not wrong, "\n".join(wrong)
    assert [one for one in caplog.records if one.exc_info] == []
    world.assert_nothing_left()


async def test_what_is_done_in_a_maintenance_is_in_its_layers_and_stays(world: MatrixWorld) -> None:
    """Whatever its profile keeps elsewhere, and however often it has sessions reset."""
    async with world.served() as (manager, _):
        session = await manager.begin_maintenance("kept-packed", "", started_by=0)
        assert session.record.keep is None
        assert session.record.reset_rules == ResetRules()
        await manager.cancel_maintenance()
    world.assert_nothing_left()
