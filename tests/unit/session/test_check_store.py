"""The checker of the store, over sessions in memory: nothing is mounted, no daemon is left."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sessiond.errors import Busy, Failed, InvalidName, NoSuchSession
from sessiond.overlay.check.findings import Kind
from sessiond.session.check import Found, Report, StoreKind
from sessiond.session.check_store import Scope, check_store
from sessiond.session.model import Uid
from tests.support.sessions import UID, USER, World

pytestmark = pytest.mark.root


class Checked:
    """What one check has found."""

    def __init__(self, found: list[Found], report: Report) -> None:
        self.found = found
        self.report = report

    def told(self, directory: Path) -> list[tuple[str, str]]:
        """Kinds, and paths below `directory` or in a layer."""
        top = os.fsencode(directory) + b"/"
        return sorted((one.kind.id, os.fsdecode(one.path.removeprefix(top))) for one in self.found)


async def check(
    world: World, session: str | None = None, *, repair: bool = False, runtime: bool = True
) -> Checked:
    found: list[Found] = []
    report = Report(found.append)
    scope = Scope(world.state, world.runtime if runtime else None, session, repair)
    await check_store(scope, report, mounts=world.mounts)
    return Checked(found, report)


async def make(world: World) -> None:
    """Leave a persistent session with a snapshot: layers 1 and 2, of which 2 is the upper."""
    async with world.manager() as manager:
        session = await manager.create(USER, "lasting", session_id="s")
        (world.disk("s") / "layers/1/fs/kept").touch()
        await session.snapshots.make("first")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


async def test_a_store_in_order(world: World) -> None:
    await make(world)
    for session in (None, "s"):
        for repair in (False, True):
            checked = await check(world, session, repair=repair)
            assert checked.found == []
            assert (checked.report.sessions, checked.report.layers) == (1, 2)


async def test_what_others_than_root_may_touch(world: World) -> None:
    await make(world)
    session = world.disk("s")
    private = [world.state, session.parent, session, session / "layers", session / "layers/1"]
    for directory in private:
        directory.chmod(0o750)
    (session / "session.json").chmod(0o640)
    (session / "layers/2").chmod(0o1700)
    world.runtime.chmod(0o733)
    expected = sorted(
        ("exposed", str(path)) for path in (*private, session / "session.json", world.runtime)
    )
    for repair in (False, True):
        checked = await check(world, repair=repair)
        assert checked.told(Path("/nowhere")) == expected
    assert (await check(world)).found == []
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in private} == {0o700}
    assert stat.S_IMODE(world.runtime.stat().st_mode) == 0o711
    assert stat.S_IMODE((session / "session.json").stat().st_mode) == 0o600


async def test_leftovers_beside_the_layers(world: World) -> None:
    await make(world)
    session = world.disk("s")
    (session / "orphans/1").touch()
    (session / "spare.new/fs/directory").mkdir(parents=True)
    (world.runtime / "sessions/s").mkdir(exist_ok=True)
    (world.runtime / "sessions/s/job.json").write_text("nonsense")
    checked = await check(world, repair=True)
    assert checked.told(world.directory) == [
        ("job-unreadable", "run/sessions/s/job.json"),
        ("leftover", "state/sessions/s/spare.new"),
        ("orphan", "state/sessions/s/orphans/1"),
    ]
    assert (await check(world)).found == []


async def test_a_machine_without_sessions(world: World) -> None:
    assert (await check(world)).found == []
    with pytest.raises(Failed, match="is no state directory"):
        await check(world, runtime=False)


async def test_a_session_that_is_not_there(world: World) -> None:
    await make(world)
    with pytest.raises(NoSuchSession, match="no session other"):
        await check(world, "other")
    with pytest.raises(InvalidName):
        await check(world, "../s")


async def test_each_layer_is_checked_over_those_below(world: World) -> None:
    await make(world)
    os.mknod(world.disk("s") / "layers/2/fs/kept", stat.S_IFCHR)  # hides what layer 1 has
    for layer in (1, 2):
        os.mknod(world.disk("s") / f"layers/{layer}/fs/gone", stat.S_IFCHR)
    checked = await check(world)
    where = [(one.kind, one.session, one.layer, one.path) for one in checked.found]
    # The one in layer 2 hides one that hides nothing.
    assert where == [
        (Kind.WHITEOUT_OVER_NOTHING, "s", 2, b"gone"),
        (Kind.WHITEOUT_OVER_NOTHING, "s", 1, b"gone"),
    ]


LAYER_2 = "state/sessions/s/layers/2"
RECORD = "state/sessions/s/session.json"

WRONG: dict[str, tuple[Callable[[World], object], list[tuple[str, str]]]] = {
    "no-json": (
        lambda world: (world.directory / RECORD).write_text("{"),
        [("record-unreadable", RECORD)],
    ),
    "empty": (
        lambda world: (world.directory / RECORD).write_text(""),
        [("record-unreadable", RECORD)],
    ),
    "another-session": (
        lambda world: edit(world.directory / RECORD, id="t"),
        [("record-unreadable", RECORD)],
    ),
    "newer": (
        lambda world: edit(world.directory / RECORD, format=99, upper="x"),
        [("record-newer", RECORD)],
    ),
    "number-in-use": (
        lambda world: edit(world.directory / RECORD, next_layer=2),
        [("record-unreadable", RECORD)],
    ),
    "layer-missing": (
        lambda world: (world.directory / LAYER_2).rename(world.directory / "away"),
        [("layer-missing", LAYER_2)],
    ),
    "layer-half-there": (
        lambda world: (world.directory / LAYER_2 / "fs").rename(world.directory / "away"),
        [("layer-unreadable", LAYER_2)],
    ),
    "image-missing": (
        lambda world: world.image.rename(world.directory / "away"),
        [("image-unavailable", "image")],
    ),
    "layer-unreferenced": (
        lambda world: (world.disk("s") / "layers/7/fs/a/b").mkdir(parents=True),
        [("layer-unreferenced", "state/sessions/s/layers/7")],
    ),
    "half-made": (
        lambda world: (
            (world.disk("t") / "layers/1/fs").mkdir(parents=True),
            (world.disk("t") / "session.new").touch(),
        ),
        [("half-made", "state/sessions/t")],
    ),
    "half-made-volatile": (
        lambda world: (
            (world.runtime / "sessions/t/storage/layers").mkdir(parents=True),
            (world.runtime / "sessions/t/session.old").touch(),
        ),
        [("half-made", "run/sessions/t")],
    ),
    "record-lost": (
        lambda world: (world.disk("t") / "layers/1/fs").mkdir(parents=True),
        [("record-missing", "state/sessions/t")],
    ),
    "no-layer": (
        lambda world: (world.disk("s") / "layers/notes").mkdir(),
        [("foreign", "state/sessions/s/layers/notes")],
    ),
    "record-half-written": (
        lambda world: (world.disk("s") / "session.new").touch(),
        [("leftover", "state/sessions/s/session.new")],
    ),
    "trash": (
        lambda world: (world.state / "trash/s-1/layers").mkdir(parents=True),
        [("trash", "state/trash/s-1")],
    ),
    "set-aside": (
        lambda world: (world.state / "set-aside/s-1").mkdir(parents=True),
        [("set-aside", "state/set-aside/s-1")],
    ),
    "foreign": (
        lambda world: (
            (world.state / "sessions/a file").touch(),
            (world.state / "sessions/link").symlink_to("/"),
        ),
        [("foreign", "state/sessions/a file"), ("foreign", "state/sessions/link")],
    ),
}


@pytest.mark.parametrize(("damage", "wrong"), WRONG.values(), ids=WRONG)
async def test_what_is_wrong(
    world: World, damage: Callable[[World], object], wrong: list[tuple[str, str]]
) -> None:
    await make(world)
    damage(world)
    checked = await check(world)
    assert checked.told(world.directory) == wrong
    mended = await check(world, repair=True)
    assert mended.told(world.directory) == wrong
    assert all(one.repaired == bool(one.kind.description.repair) for one in mended.found)
    left = [one for one in checked.found if not one.kind.description.repair]
    assert len((await check(world, repair=True)).found) == len(left)


async def test_without_the_image_layers_are_checked_as_far_as_possible(world: World) -> None:
    await make(world)
    world.image.rmdir()
    os.mknod(world.disk("s") / "layers/2/fs/gone", stat.S_IFCHR)
    (world.disk("s") / "layers/2/work/work/left").mkdir(parents=True)
    checked = await check(world)
    assert [one.kind for one in checked.found] == [
        StoreKind.IMAGE_UNAVAILABLE,
        Kind.WORKDIR_LEFTOVER,
    ]


async def test_an_image_that_was_replaced(world: World) -> None:
    await make(world)
    edit(world.disk("s") / "session.json", image="squashfs-0", source={"path": str(world.state)})
    assert (await check(world)).found == []  # a directory may hold anything
    image = world.directory / "image.squashfs"
    image.write_bytes(b"hsqs".ljust(96, b"\0"))
    edit(world.disk("s") / "session.json", source={"path": str(image)})
    (found,) = (await check(world)).found
    assert found.kind is StoreKind.IMAGE_UNAVAILABLE
    assert "squashfs-0" in found.detail
    assert world.mounts.mounted == {}


async def test_volatile_sessions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: object) -> None:
        """The daemon is killed."""

    monkeypatch.setattr("sessiond.session.manager.Manager.shut_down", nothing)
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="v")
    os.mknod(world.storage("v") / "layers/1/fs/gone", stat.S_IFCHR)
    checked = await check(world)
    assert [(one.kind, one.session) for one in checked.found] == [(Kind.WHITEOUT_OVER_NOTHING, "v")]
    world.mounts.mounted.clear()  # as a reboot would, if /run were a disk
    assert (await check(world)).told(world.directory) == [("storage-gone", "run/sessions/v")]


async def test_a_session_that_was_just_moved_to_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="v")
        record = (world.runtime / "sessions/v/session.json").read_text()
        await session.persist(started_by=Uid(UID)).wait()
    (world.runtime / "sessions/v").mkdir(exist_ok=True)
    (world.runtime / "sessions/v/session.json").write_text(record)
    for repair in (False, True):
        assert (await check(world, repair=repair)).told(world.directory) == [
            ("record-twice", "run/sessions/v/session.json")
        ]


# Beside a daemon


def daemon_lock(world: World) -> Path:
    world.runtime.mkdir(exist_ok=True)
    return world.runtime / "lock"


def hold_in_another_process(file: Path) -> tuple[int, int]:
    """Hold the daemon's lock; return the process, and what ends it when closed."""
    told, tell = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if child == 0:
        lock = os.open(file, os.O_WRONLY | os.O_CREAT)
        fcntl.lockf(lock, fcntl.LOCK_EX)
        os.close(end)
        os.write(tell, b"+")
        os.read(wait, 1)
        os._exit(0)
    assert os.read(told, 1) == b"+"
    for fd in (told, tell, wait):
        os.close(fd)
    return child, end


async def test_beside_a_daemon_nothing_is_repaired_and_no_leftover_looked_for(world: World) -> None:
    await make(world)
    (world.state / "trash/s-1").mkdir()
    (world.disk("s") / "layers/7").mkdir()
    (world.disk("t")).mkdir()
    child, end = hold_in_another_process(daemon_lock(world))
    try:
        assert (await check(world)).found == []
        with pytest.raises(Busy, match="systemctl stop sessiond"):
            await check(world, repair=True)
        with pytest.raises(Busy):
            await check(world, "s", repair=True)
        # What is on another disk is none of that daemon's.
        assert len((await check(world, repair=True, runtime=False)).found) == 3
    finally:
        os.close(end)
        os.waitpid(child, 0)


async def test_of_a_session_in_use_only_the_upper_is_left_out(world: World) -> None:
    await make(world)
    layers = world.disk("s") / "layers"
    for layer in ("1", "2"):
        os.mknod(layers / layer / "fs/gone", stat.S_IFCHR)
    upper = os.open(layers / "2/fs", os.O_RDONLY)
    try:
        fcntl.flock(upper, fcntl.LOCK_EX)
        checked = await check(world)
        assert [(one.kind, one.layer) for one in checked.found] == [
            (StoreKind.SERVED, 2),
            (Kind.WHITEOUT_OVER_NOTHING, 1),
        ]
        checked = await check(world, repair=True)
        assert [(one.kind, one.layer) for one in checked.found] == [(StoreKind.SERVED, 2)]
        with pytest.raises(Busy, match="Session s is in use"):
            await check(world, "s")
    finally:
        os.close(upper)


async def test_no_daemon_can_start_during_a_repair(world: World, tmp_path: Path) -> None:
    await make(world)
    (world.state / "trash/s-1").mkdir()
    daemon_lock(world).touch()
    seen: list[bool] = []

    def look(_: Found) -> None:
        with open("/proc/locks", encoding="ascii") as locks:
            inode = str(daemon_lock(world).stat().st_ino)
            seen.append(any(f":{inode} " in line for line in locks))

    for repair in (False, True):
        scope = Scope(world.state, world.runtime, repair=repair)
        await check_store(scope, Report(look), mounts=world.mounts)
    assert seen == [False, True]
