"""A manager that dies while layers are merged: the session and its snapshots are what they were."""

from __future__ import annotations

from itertools import count

import pytest

from sessiond.session import flattening
from sessiond.session.manager import Manager
from tests.crash import sessions
from tests.crash.sessions import Life
from tests.support.sessions import USER, World
from tests.support.waiting import until


def deep(profile: str) -> Life:
    """Return the life that leaves a session with layers that no snapshot needs."""

    async def life(world: World, manager: Manager) -> None:
        session = await manager.create(USER, profile, session_id="s")
        for number in range(5):
            await world.mount("s").write(f"file{number}", b"%d" % number * 5000)
            await world.mount("s").write("changed", b"%d" % number * 3000)
            await session.snapshots.make(f"snapshot{number}")
        for number in (0, 2, 4):
            await session.snapshots.delete(f"snapshot{number}")
        await world.mount("s").write("changed", b"at last")

    return life


async def flatten(world: World, manager: Manager) -> None:
    flattening._PAUSE_SECONDS = 0.0
    session = manager.get("s")
    session.record = session.record.model_copy(update={"flatten_above": 0})
    session.flattening.consider()
    await until(lambda: not flattening.mergeable(session.record))


@pytest.mark.parametrize(
    ("profile", "every"),
    [
        ("lasting", 5),
        pytest.param("lasting", 1, marks=pytest.mark.soak),
        pytest.param("volatile", 1, marks=pytest.mark.soak),
    ],
)
def test_death(scratch: str, caplog: pytest.LogCaptureFixture, profile: str, every: int) -> None:
    with sessions.machine(scratch, deep(profile)) as top:
        before = sessions.recovered(top)
    assert before.keys() == {"s"}
    layers = []
    for point in count(step=every):
        with sessions.machine(scratch, deep(profile)) as top:
            lived = sessions.die(top, flatten, die_at=point)
            layers.append(len(list(top.rglob("layers/*"))))
            found = sessions.recovered(top)
        what = f"killed before change {point}, {lived.calls[-1]}"
        assert found == before, what
        assert caplog.records == [], what
        if not lived.died:
            break
    assert layers[0] > layers[-1]
    assert point > 20
