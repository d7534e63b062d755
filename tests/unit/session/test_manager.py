"""The manager over mounts in memory: sessions come and go, and are found again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable

import pytest
import trio

from sessiond.config import Config
from sessiond.errors import (
    Failed,
    ImageUnavailable,
    Interrupted,
    InvalidName,
    NoSpace,
    NoSuchProfile,
    NoSuchSession,
    SessiondError,
    SessionExists,
)
from sessiond.session.manager import open_manager
from sessiond.session.model import SessionId, SessionState, StorageKind, Uid
from sessiond.session.mounter import VIEW_TYPE
from sessiond.session.store import Store
from sessiond.session.view import View
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

ExpectLog = Callable[[str], None]


class Crash(BaseException):
    """The daemon is killed."""


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it in a manager's context, for nothing to be cleaned up on the way out."""

    def arm() -> None:
        async def nothing(_: object) -> None:
            pass

        monkeypatch.setattr("sessiond.session.manager.Manager.shut_down", nothing)

    return arm


async def test_create(world: World) -> None:
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile")
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*-1", session.id)
        assert session.user == USER
        assert session.uid == UID
        assert session.profile == "volatile"
        assert session.state is SessionState.ACTIVE
        assert session.storage is StorageKind.TMPFS
        assert session.mount_point == world.runtime / "sessions" / session.id / "root"
        request = world.mount(session.id).request
        assert request.nosuid == request.nodev == (UID != 0)
        assert manager.sessions == {session.id: session}
        assert manager.get(session.id) is session
        assert manager.by_uid(Uid(UID)) is session
        assert manager.images == (session.image,)
        assert manager.profiles == ("lasting", "volatile")
        assert world.recorder.events == [f"added {session.id} active"]
        second = await manager.create(USER, "volatile")
        assert second.id.endswith("-2")
        assert manager.by_uid(Uid(UID)) is session


async def test_directories_are_roots_but_mount_points_can_be_reached(world: World) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="s")
        modes = {
            path: path.stat().st_mode & 0o777
            for path in (
                world.runtime,
                world.runtime / "sessions",
                world.runtime / "sessions" / "s",
                world.storage("s"),
                world.state,
                world.runtime / "images",
            )
        }
        assert list(modes.values()) == [0o711, 0o711, 0o711, 0o700, 0o700, 0o700], modes


@pytest.mark.parametrize(
    ("user", "profile", "session_id", "error"),
    [
        ("no such user", "volatile", None, InvalidName),
        ("nul\0", "volatile", None, InvalidName),
        ("\udcff", "volatile", None, InvalidName),
        ("x" * (2 << 20), "volatile", None, InvalidName),
        (USER, "no such profile", None, NoSuchProfile),
        (USER, "volatile", "../x", InvalidName),
        (USER, "volatile", "a\nb", InvalidName),
        (USER, "volatile", "x" * (2 << 20), InvalidName),
        (USER, "volatile", "taken", SessionExists),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) else None,
)
async def test_what_cannot_be_created_is_refused_in_a_sentence(
    world: World, user: str, profile: str, session_id: str | None, error: type[SessiondError]
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="taken")
        with pytest.raises(error) as caught:
            await manager.create(user, profile, session_id=session_id)
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()
        assert list(manager.sessions) == ["taken"]


@pytest.mark.parametrize("step", ["mount", "image", "tmpfs", "record"])
async def test_nothing_is_left_of_a_session_that_could_not_be_created(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        match step:
            case "mount":
                world.mounter.injected["mount"] = [Failed("No.")]
            case "image":
                world.image.rmdir()
            case "tmpfs":
                await manager.create(USER, "lasting", session_id="holds-the-image")
                world.mounts.injected = [OSError(12, "Cannot allocate memory")]
            case _:

                def fail(*_: object) -> None:
                    raise Failed("No.")

                monkeypatch.setattr(Store, "write", fail)
        with pytest.raises((Failed, ImageUnavailable)):
            await manager.create(USER, "volatile", session_id="s")
        assert SessionId("s") not in manager.sessions
        assert not any("s " in event for event in world.recorder.events if "holds" not in event)
        await until(lambda: not any((world.runtime / "trash").iterdir()))
        assert not (world.runtime / "sessions" / "s").exists()
        assert world.storage("s") not in world.mounts.mounted
        assert len(manager.images) == (1 if step == "tmpfs" else 0)


async def test_an_id_is_taken_while_its_session_is_being_created(world: World) -> None:
    outcomes: list[str] = []

    async with world.manager() as manager:

        async def create() -> None:
            try:
                await manager.create(USER, "volatile", session_id="s")
                outcomes.append("created")
            except SessionExists:
                outcomes.append("refused")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            nursery.start_soon(create)
        assert sorted(outcomes) == ["created", "refused"]


def with_mount_point(world: World, pattern: str) -> Config:
    values = world.config().model_dump(mode="json", exclude_unset=True)
    values["profile"]["volatile"]["mount_point"] = pattern
    return Config.model_validate(values)


async def test_mount_point_pattern(world: World) -> None:
    (world.directory / "mnt").mkdir()
    config = with_mount_point(world, f"{world.directory}/mnt/{{user}}-{{uid}}-{{id}}")
    async with world.manager(config) as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        assert session.mount_point == world.directory / "mnt" / f"{USER}-{UID}-s"
        assert session.mount_point.stat().st_uid == UID
        assert session.mount_point.stat().st_mode & 0o777 == 0o700


async def test_a_mount_point_is_used_once(world: World) -> None:
    async with world.manager(with_mount_point(world, f"{world.directory}/{{user}}")) as manager:
        await manager.create(USER, "volatile", session_id="one")
        with pytest.raises(SessionExists, match="session one is mounted"):
            await manager.create(USER, "volatile", session_id="two")
        await manager.close("one")
        world.mounts.mounted[world.directory / USER] = "nfs"
        with pytest.raises(Failed, match="a nfs is mounted there"):
            await manager.create(USER, "volatile", session_id="two")


async def test_a_mount_point_within_a_merged_view_is_refused(world: World) -> None:
    pattern = f"{world.runtime}/sessions/outer/root/{{id}}"
    async with world.manager(with_mount_point(world, pattern)) as manager:
        await manager.create(USER, "lasting", session_id="outer")
        with pytest.raises(SessionExists, match="session outer is mounted"):
            await manager.create(USER, "volatile", session_id="inner")


async def test_close(world: World) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "lasting", session_id="s")
        await manager.close("s")
        assert not world.mount("s").mounted
        assert manager.images == ()
        assert world.recorder.events[-1] == "removed s"
        with pytest.raises(NoSuchSession):
            await manager.close("s")
        with pytest.raises(NoSuchSession):
            manager.get("s")
        with pytest.raises(NoSuchSession, match=f"uid {UID}"):
            manager.by_uid(Uid(UID))
        await manager.create(USER, "lasting", session_id="s")


async def test_a_session_whose_files_cannot_be_removed_is_closed_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="s")

        def fail(*_: object) -> None:
            raise Failed("Could not remove it.")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "forget", fail)
            with pytest.raises(Failed, match="Could not remove it"):
                await manager.close("s")
        assert manager.sessions == {}
        assert not world.mount("s").mounted


async def test_a_session_is_being_closed_when_the_daemon_is_stopped(world: World) -> None:
    async with world.manager() as manager:
        session = await manager.create(USER, "lasting", session_id="s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.close, "s")
            await until(lambda: session.state is SessionState.CLOSING)
            await manager.shut_down()
        assert manager.sessions == {}
    assert not world.disk("s").exists()


async def test_a_clean_end_keeps_persistent_sessions_only(world: World) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="v")
        await manager.create(USER, "lasting", session_id="p")
        await world.mount("p").write("file", b"kept")
        await manager.get("p").snapshots.make("one")
    assert world.mounts.mounted == {}
    assert not world.mount("p").mounted
    assert not world.mount("v").mounted
    assert [path.name for path in (world.state / "sessions").iterdir()] == ["p"]
    assert not any((world.runtime / "sessions").iterdir())
    assert not any((world.runtime / "images").iterdir())

    async with world.manager() as manager:
        assert list(manager.sessions) == ["p"]
        session = manager.get("p")
        assert session.state is SessionState.ACTIVE
        assert list(session.snapshots) == ["one"]
        assert (world.mount("p").stack.lowers[0] / "file").read_bytes() == b"kept"


async def test_after_a_crash_all_sessions_are_found_again(
    world: World, crash: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        for name, profile in (("v", "volatile"), ("p", "lasting")):
            await manager.create(USER, profile, session_id=name)
            await world.mount(name).write("file", name.encode())
            # What the dead daemon leaves: its views are still mounted.
            world.mounts.mounted[world.mount(name).request.mount_point] = "fuse.sessiond"
        crash()
    monkeypatch.undo()
    old = dict(world.mounter.mounts)

    async with world.manager() as manager:
        assert set(manager.sessions) == {"v", "p"}
        for name in ("v", "p"):
            assert world.mount(name) is not old[SessionId(name)]
            assert (world.mount(name).stack.upper.fs / "file").read_text() == name


async def test_a_view_elsewhere_is_detached_after_a_crash(
    world: World, crash: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_mount_point(world, f"{world.directory}/{{id}}")
    async with world.manager(config) as manager:
        await manager.create(USER, "volatile", session_id="s")
        world.mounts.mounted[world.directory / "s"] = "fuse.sessiond"
        crash()
    monkeypatch.undo()
    async with world.manager(config) as manager:
        assert manager.get("s").state is SessionState.ACTIVE


async def test_what_no_record_knows_is_removed_at_start(
    world: World, crash: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="v")
        await manager.create(USER, "lasting", session_id="p")
        crash()
    monkeypatch.undo()
    (world.disk("p") / "layers" / "7" / "fs").mkdir(parents=True)
    (world.storage("v") / "layers" / "9" / "fs").mkdir(parents=True)
    (world.disk("half-made") / "layers" / "1").mkdir(parents=True)
    (world.disk("half-made") / "session.new").touch()
    (world.disk("deleted") / "layers" / "1").mkdir(parents=True)
    (world.disk("deleted") / "session.old").touch()
    (world.state / "trash" / "old").mkdir()
    (world.runtime / "sessions" / "x" / "root").mkdir(parents=True)

    async with world.manager() as manager:
        assert set(manager.sessions) == {"v", "p"}
        await until(
            lambda: world.layers(world.disk("p")) == world.layers(world.storage("v")) == ["1"]
        )
        await until(lambda: not any((world.state / "trash").iterdir()))
        await until(lambda: not any((world.runtime / "trash").iterdir()))
        assert not world.disk("half-made").exists()
        assert not world.disk("deleted").exists()
        assert not (world.runtime / "sessions" / "x").exists()


async def test_a_volatile_session_ends_with_the_machine(
    world: World, crash: Callable[[], None], monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    """Where the runtime directory is on disk, its files outlive a reboot, unlike the tmpfs."""
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="s")
        crash()
    monkeypatch.undo()
    world.mounts.mounted.clear()
    async with world.manager() as manager:
        assert manager.sessions == {}
        assert not (world.runtime / "sessions" / "s").exists()
        await manager.create(USER, "volatile", session_id="s")
    expect_log("ended with the last boot")


async def test_what_is_to_be_deleted_lends_no_layer_its_name(world: World) -> None:
    """It is deleted later: whoever used that name meanwhile would lose what is there."""
    async with world.crashing_manager() as manager:
        record = (await manager.create(USER, "lasting", session_id="s")).record
    (world.disk("s") / "layers" / str(record.next_layer) / "fs").mkdir(parents=True)
    loaded = Store(world.runtime, world.state, world.mounts).load()
    assert world.disk("s") / "layers" / str(record.next_layer) in loaded.garbage
    assert loaded.records[0].next_layer == record.next_layer + 1


async def test_a_stop_before_a_session_is_adopted_unmounts_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = world.config().model_dump(mode="json", exclude_unset=True)
    values["profile"]["volatile"]["mount_point"] = str(world.directory / "home")
    config = Config.model_validate(values)
    world.config = lambda **_: config  # type: ignore[method-assign]
    async with world.crashing_manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
    world.mounts.mounted[session.mount_point] = VIEW_TYPE
    monkeypatch.setattr(world.mounter, "left", lambda: {SessionId("s")})
    async with open_manager(config, world.mounter, mounts=world.mounts) as manager:
        with trio.CancelScope() as start:
            monkeypatch.setattr(View, "adopt", lambda _: _cancelled(start))
            await manager.start()
        assert start.cancelled_caught
        await manager.shut_down()
    assert session.mount_point not in world.mounts.mounted


async def _cancelled(scope: trio.CancelScope) -> bool:
    scope.cancel()
    await trio.sleep_forever()
    raise AssertionError


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ('{"format": 1}', "required"),
        ('{"format": 1, "surprise": 2}', "required"),
        ("other id", "persistent session other"),
        ("missing layer", "layer 5, which is not there"),
    ],
)
async def test_a_corrupt_record_is_set_aside_and_the_others_are_served(
    world: World, damage: str, complaint: str, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "lasting", session_id="good")
        await manager.create(USER, "lasting", session_id="bad")
        await world.mount("bad").write("precious", b"data")
    file = world.disk("bad") / "session.json"
    record = json.loads(file.read_text())
    match damage:
        case "other id":
            file.write_text(json.dumps(record | {"id": "other"}))
        case "missing layer":
            file.write_text(json.dumps(record | {"upper": 5, "next_layer": 6}))
        case _:
            file.write_text(damage)

    async with world.manager() as manager:
        assert list(manager.sessions) == ["good"]
        (aside,) = (world.state / "set-aside").iterdir()
        assert (aside / "layers" / "1" / "fs" / "precious").read_bytes() == b"data"
        await manager.create(USER, "lasting", session_id="bad")
    expect_log("Session bad cannot be served")
    expect_log(complaint)


async def test_a_record_of_a_newer_format_is_left_alone(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "lasting", session_id="s")
    file = world.disk("s") / "session.json"
    text = json.dumps(json.loads(file.read_text()) | {"format": 2, "novelty": True})
    file.write_text(text)
    async with world.manager() as manager:
        assert manager.sessions == {}
        with pytest.raises(SessionExists, match="not served"):
            await manager.create(USER, "lasting", session_id="s")
    assert file.read_text() == text
    assert (world.disk("s") / "layers" / "1" / "fs").is_dir()
    expect_log("format 2")


async def test_configured_sessions_are_created_once(world: World) -> None:
    config = world.config(kiosk="lasting", guest="volatile")
    async with world.manager(config) as manager:
        assert set(manager.sessions) == {"kiosk", "guest"}
        created = manager.get("kiosk").created_at
    async with world.manager(config) as manager:
        assert set(manager.sessions) == {"kiosk", "guest"}
        assert manager.get("kiosk").created_at == created


async def test_a_missing_image_stops_no_other_session(world: World, expect_log: ExpectLog) -> None:
    async with world.manager(world.config(old="lasting")):
        pass
    world.image.rmdir()
    other = world.directory / "other"
    other.mkdir()
    values = world.config(new="volatile").model_dump(mode="json", exclude_unset=True)
    values["profile"]["other"] = {"image": str(other)}
    values["session"]["fine"] = {"user": USER, "profile": "other"}
    config = Config.model_validate(values)
    async with world.manager(config) as manager:
        assert set(manager.sessions) == {"old", "fine"}
        old = manager.get("old")
        assert old.state is SessionState.FAILED
        assert "cannot be read" in old.failure
        assert manager.get("fine").state is SessionState.ACTIVE
        with pytest.raises(ImageUnavailable):
            await old.reset(started_by=UID).wait()
        # With the image back, a reload serves what could not be served.
        world.image.mkdir()
        await manager.reload(config)
        assert old.state is SessionState.ACTIVE
        assert set(manager.sessions) == {"old", "fine", "new"}
    expect_log("Session new is not created")
    expect_log("Session old is not served")


async def test_an_image_file_that_changed_is_refused(world: World, expect_log: ExpectLog) -> None:
    world.image.rmdir()
    squashfs = b"hsqs" + bytes(36) + (4096).to_bytes(8, "little") + bytes(4048)
    world.image.write_bytes(squashfs)
    async with world.manager(world.config(s="lasting")) as manager:
        assert manager.get("s").image.startswith("squashfs-")
    os.utime(world.image, ns=(0, 0))
    async with world.manager() as manager:
        assert "is not the one that session s was built on" in manager.get("s").failure
        assert manager.images == ()
    expect_log("is not the one")


async def test_reload_uses_new_profiles_for_new_sessions(world: World) -> None:
    async with world.manager() as manager:
        old = await manager.create(USER, "volatile", session_id="old")
        values = world.config(kiosk="new").model_dump(mode="json", exclude_unset=True)
        values["profile"] = {"new": {"image": str(world.image), "nosuid": True}}
        await manager.reload(Config.model_validate(values))
        assert manager.profiles == ("new",)
        assert manager.get("kiosk").profile == "new"
        assert world.mount("kiosk").request.nosuid
        await old.reset(started_by=UID).wait()
        with pytest.raises(NoSuchProfile, match="profiles are: new"):
            await manager.create(USER, "volatile")


async def test_images_are_shared_and_unmounted_with_the_last_session(world: World) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="one")
        await manager.create(USER, "lasting", session_id="two")
        (image,) = manager.images
        assert world.mounts.mounted[world.runtime / "images" / image] == "directory"
        await manager.close("one")
        assert manager.images == (image,)
        await manager.close("two")
        assert manager.images == ()
        assert world.runtime / "images" / image not in world.mounts.mounted


async def test_a_manager_that_was_never_started_ends(world: World) -> None:
    async with open_manager(world.config(), world.mounter, mounts=world.mounts) as manager:
        assert manager.sessions == {}


async def test_leaving_undoes_the_job_that_runs_and_keeps_all_else(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.crashing_manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        await manager.create(USER, "volatile", session_id="idle")
        await world.mount("s").write("file", b"kept")
        job = session.persist(started_by=UID)
        # Held just before the session would move to disk.
        async with world.mount("s")._held:
            await until(lambda: world.mount("s").frozen_times == 0 and world.disk("s").exists())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(manager.leave)
                with pytest.raises(Interrupted, match="restarted"):
                    await job.wait()
        assert world.mount("s").mounted
        assert world.mount("idle").mounted
        with pytest.raises(NoSuchSession):
            session.reset(started_by=UID)
    async with world.manager() as manager:
        assert set(manager.sessions) == {"s", "idle"}
        session = manager.get("s")
        assert session.storage is StorageKind.TMPFS
        served = world.mount("s").stack
        assert any((layer / "file").exists() for layer in (served.upper.fs, *served.lowers))
        assert session.last_job is not None
        assert session.last_job.id == job.id
        assert isinstance(session.last_job.error, Interrupted)
        assert str(session.last_job.error) == str(job.error)
        later = manager.get("idle").reset(started_by=UID)
        await later.wait()
        assert later.id == job.id + 1
        await until(lambda: not world.disk("s").exists())


async def test_a_job_that_cannot_be_noted_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    def fail(*_: object) -> None:
        raise NoSpace("Full.")

    monkeypatch.setattr(Store, "write_job", fail)
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        await session.reset(started_by=UID).wait()
    expect_log("Full. Should sessiond die, it will not know of the job.")


@pytest.mark.parametrize("damage", ["{", '{"number": 0}', "\0"])
async def test_a_note_of_a_job_that_makes_no_sense_costs_nothing(
    world: World,
    damage: str,
    crash: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    expect_log: ExpectLog,
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "volatile", session_id="s")
        crash()
    monkeypatch.undo()
    (world.runtime / "sessions" / "s" / "job.json").write_text(damage)
    async with world.manager() as manager:
        assert manager.get("s").last_job is None
        await manager.get("s").reset(started_by=UID).wait()
    expect_log("The last job of session s is not known")


async def test_a_session_that_cannot_be_loaded_keeps_no_other_from_it(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        await manager.create(USER, "lasting", session_id="good")
        await manager.create(USER, "lasting", session_id="bad")
    (world.runtime / "sessions" / "bad").write_text("in the way")
    async with world.manager() as manager:
        assert list(manager.sessions) == ["good"]
        with pytest.raises(SessionExists):
            await manager.create(USER, "lasting", session_id="bad")
    expect_log("Session bad is left as it is: ")
    (world.runtime / "sessions" / "bad").unlink()
    async with world.manager() as manager:
        assert set(manager.sessions) == {"good", "bad"}
