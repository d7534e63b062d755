"""The level of space is told soon after something was written, and idle sessions wake nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from sessiond.session import manager as manager_module
from sessiond.session.activity import ActivityWatch
from sessiond.session.model import DataPath
from tests.space.conftest import Machine, reset
from tests.support.mounts import detach
from tests.support.waiting import until


@pytest.mark.parametrize("data_path", DataPath)
@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_levels_are_told_when_something_is_written(
    machine: Machine, data_path: DataPath, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "_SPACE_SECONDS", 0.01)
    monkeypatch.setattr(manager_module, "_UNTOLD_SECONDS", 3600)
    machine.profiles[profile] |= {"space_warning": 50, "space_critical": 90}
    machine.profiles[profile]["data_path"] = data_path
    if profile == "lasting":
        machine.mount_disk("ext4", "-m", "0", size="16M")
    async with machine.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        total = session.services.store.storage(session.record)
        size = measure_bytes(total)
        with open(session.mount_point / "file", "wb", buffering=0) as file:
            file.write(bytes(size * 6 // 10))
            await until(lambda: session.space_level == "warning")
            with open(session.mount_point / "more", "wb", buffering=0) as more:
                more.write(bytes(size * 32 // 100))
            await until(lambda: session.space_level == "critical")
        # That something is deleted is told before its space is free.
        monkeypatch.setattr(manager_module, "_UNTOLD_SECONDS", 0.1)
        await reset(session)
        await until(lambda: session.space_level == "normal")


def measure_bytes(directory: Path) -> int:
    from sessiond.session.space import measure

    return measure(directory).bytes_total


async def test_nothing_happens_while_nothing_is_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "_SPACE_SECONDS", 0)
    looked = 0

    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        check = session.check_space

        def count() -> None:
            nonlocal looked
            looked += 1
            check()

        monkeypatch.setattr(session, "check_space", count)
        (session.mount_point / "file").touch()
        await until(lambda: looked > 0)
        with trio.move_on_after(0.2):  # were it polled, it would be looked at all the time
            await trio.sleep_forever()
        seen = looked
        for _ in range(100):
            await trio.sleep(0)
        assert looked == seen
        (session.mount_point / "another").touch()
        await until(lambda: looked > seen)


async def test_one_event_is_told_for_any_number_of_changes(machine: Machine) -> None:
    machine.mount_run()
    watch = ActivityWatch()
    assert watch.watch([machine.runtime, machine.directory / "gone"])
    for number in range(100):
        (machine.runtime / f"{number}").touch()
    await watch.wait()
    (machine.runtime / "unseen").touch()
    with trio.move_on_after(0.05) as waited:
        await watch.wait()
    assert waited.cancelled_caught
    assert watch.watch([machine.runtime])
    (machine.runtime / "unseen").unlink()
    await watch.wait()
    detach(str(machine.runtime))  # being watched does not keep it
    watch.close()
    assert not watch.watch([machine.directory])
