"""What outlives resets: what is recorded, and what is asked of whoever serves the mount."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sessiond.config import Config
from sessiond.errors import (
    Cancelled,
    Failed,
    Interrupted,
    InvalidOption,
    NoSpace,
    NotSupported,
    SessiondError,
    SessionExists,
)
from sessiond.session import schedule
from sessiond.session.clock import Instant
from sessiond.session.manager import Manager, Session
from sessiond.session.memory import MemoryMount
from sessiond.session.model import (
    Manner,
    ResetRules,
    SessionRecord,
    SessionState,
    SnapshotName,
    Stack,
    Uid,
)
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

ExpectLog = Callable[[str], None]
RULES = ("/home/*/docs", "/data")


def keeping(world: World, *rules: str, **profile: object) -> Config:
    config = world.config().model_dump(mode="json", exclude_unset=True)
    config["profile"]["volatile"] |= {"keep": rules, **profile}
    return Config.model_validate(config, strict=False)


def kept(world: World) -> Path:
    return world.state / "kept" / str(UID) / "volatile"


async def create(manager: Manager, session: str = "s") -> Session:
    return await manager.create(USER, "volatile", session_id=session)


async def test_what_is_kept_outlives_the_session(world: World) -> None:
    async with world.manager(keeping(world, *RULES)) as manager:
        session = await create(manager)
        assert session.keep == RULES
        request = world.mount("s").request
        assert request.keep is not None
        assert (request.keep.upper.fs, request.keep.rules) == (kept(world) / "fs", RULES)
        assert kept(world) in request.reachable
        (request.keep.upper.fs / "data").write_text("kept")
        await session.reset(started_by=UID).wait()
        await manager.close("s")
        await create(manager, "other")
        assert (kept(world) / "fs/data").read_text() == "kept"


async def test_without_rules_there_is_no_place_for_it(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        assert world.mount("s").request.keep is None
        assert not kept(world).parent.exists()
        with pytest.raises(NotSupported, match="Add keep = "):
            session.commit(["/file"], started_by=UID)
        with pytest.raises(NotSupported, match="Make a new session"):
            await session.set_keep([])


async def test_one_session_at_a_time(world: World) -> None:
    async with world.manager(keeping(world)) as manager:
        await create(manager)
        with pytest.raises(SessionExists, match="is in use by session s; close that"):
            await create(manager, "other")
        await manager.create(USER, "lasting", session_id="another")
        await manager.close("s")
        await create(manager, "other")


async def test_rules_follow_the_configuration(world: World) -> None:
    async with world.manager(keeping(world, *RULES)) as manager:
        session = await create(manager)
        await manager.reload(keeping(world, "/data", "/new"))
        await until(lambda: world.mount("s").rules == ("/data", "/new", "/home/*/docs"))
        assert session.keep == world.mount("s").rules
        await session.reset(started_by=UID).wait()
        assert session.keep == world.mount("s").rules == ("/data", "/new")
        await session.set_keep(["/data"])
        await manager.reload(keeping(world, "/data", "/new"))
        assert session.keep == ("/data", "/new")  # taken back, until the next reset
        await session.reset(started_by=UID).wait()
        assert session.keep == ("/data",)
    async with world.manager(keeping(world)) as manager:
        assert manager.sessions == {}


async def test_a_reset_that_is_done_cannot_be_cancelled(world: World) -> None:
    jobs = []

    class CancellingMount(MemoryMount):
        async def swap(
            self, stack: Stack, *, moved: bool = False, retained: bool = False
        ) -> tuple[str, ...]:
            inexact = await super().swap(stack, moved=moved, retained=retained)
            jobs[0].cancel()
            return inexact

    world.mounter.kind = CancellingMount
    async with world.manager(keeping(world, *RULES)) as manager:
        session = await create(manager)
        await session.set_keep([])
        jobs.append(session.reset(started_by=UID))
        await jobs[0].wait()
        assert session.keep == world.mount("s").rules == ()
        assert "reset s" in world.recorder.events


async def test_a_job_that_runs_is_waited_for(world: World) -> None:
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        async with world.mount("s").frozen():
            job = session.commit(["/file"], started_by=UID)
            await manager.reload(keeping(world, *RULES))
            assert session.state is SessionState.BUSY
        await job.wait()
        await until(lambda: session.keep == (*RULES, "/file"))


async def test_a_commit(world: World) -> None:
    async with world.manager(keeping(world, *RULES)) as manager:
        session = await create(manager)
        await session.commit(["/etc/a*b", "/etc/c"], started_by=UID).wait()
        mount = world.mount("s")
        assert mount.committed == ("/etc/a*b", "/etc/c")
        assert mount.frozen_times == 1
        assert session.keep == mount.rules == (*RULES, "/etc/a[*]b", "/etc/c")
        written = json.loads((kept(world) / "committed.json").read_text())
        assert written == {"rules": ["/etc/a[*]b", "/etc/c"], "unwanted": []}
        await session.reset(started_by=UID).wait()
        assert session.keep == (*RULES, "/etc/a[*]b", "/etc/c")
        await manager.close("s")
        other = await create(manager, "other")
        assert other.keep == world.mount("other").rules == (*RULES, "/etc/a[*]b", "/etc/c")


@pytest.mark.parametrize(
    "paths", [[], ["relative"], ["/"], ["/a/../b"], ["/a//b"], [f"/{n}" for n in range(257)]]
)
async def test_what_cannot_be_committed(world: World, paths: list[str]) -> None:
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        with pytest.raises(InvalidOption):
            session.commit(paths, started_by=UID)
        with pytest.raises(InvalidOption):
            await session.set_keep(paths or ["/a/**"])
        assert session.keep == ()


@pytest.mark.parametrize("step", ["commit", "commit rest", "commit publish"])
@pytest.mark.parametrize("fault", [NoSpace("full"), Failed("copying failed")])
async def test_a_commit_that_fails_changes_nothing(
    world: World, fault: SessiondError, step: str
) -> None:
    async with world.manager(keeping(world, *RULES)) as manager:
        session = await create(manager)
        world.mounter.injected[step] = [fault]
        with pytest.raises(type(fault)):
            await session.commit(["/file"], started_by=UID).wait()
        assert session.keep == world.mount("s").rules == RULES
        assert session.state is SessionState.ACTIVE
        assert not (kept(world) / "committed.json").exists()


async def test_a_commit_whose_manager_dies_is_done_or_undone(world: World) -> None:
    """What counts is the record; what is missing then is made up for."""
    async with world.crashing_manager() as manager:
        await manager.reload(keeping(world))
        session = await create(manager)
        record = session.record
        await session.commit(["/file"], started_by=UID).wait()
        (kept(world) / "committed.json").unlink()
        job = world.runtime / "sessions/s/job.json"
        noted = json.loads(job.read_text()) | {"finished": False}
        job.write_text(json.dumps(noted))
    world.remember_mounts()
    async with world.crashing_manager() as manager:
        session = manager.get("s")
        assert session.last_job is not None
        assert session.last_job.error is None
        assert session.keep == world.mount("s").rules == ("/file",)
        assert "/file" in (kept(world) / "committed.json").read_text()
        session.services.store.write(record)
        job.write_text(json.dumps(noted))
    async with world.crashing_manager() as manager:
        last = manager.get("s").last_job
        assert last is not None
        assert isinstance(last.error, Interrupted)


@pytest.mark.parametrize("text", ["", "no JSON", '{"rules": ["relative"]}', '{"rules": 7}'])
async def test_a_damaged_list_of_commits_is_told(
    world: World, text: str, expect_log: ExpectLog
) -> None:
    async with world.manager(keeping(world)) as manager:
        await create(manager)
        await manager.close("s")
        (kept(world) / "committed.json").write_text(text)
        with pytest.raises(Failed, match="makes no sense"):
            await create(manager)
        (kept(world) / "committed.json").unlink()
        await create(manager)


async def test_what_was_half_made_is_made_anew(world: World) -> None:
    async with world.manager(keeping(world)) as manager:
        new = world.state / "kept" / f"new-{UID}-volatile"
        (new / "fs").mkdir(parents=True)
        await create(manager)
        assert not new.exists()
        assert sorted(path.name for path in kept(world).iterdir()) == ["fs", "orphans", "work"]


async def test_a_commit_says_how_far_it_is(world: World) -> None:
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        async with world.mount("s").frozen():
            job = session.commit(["/file"], started_by=UID)
            await until(lambda: job.bytes == 1000)
            assert (job.progress, job.progress_valid) == (1, True)
            assert not job.finished
            job.cancel()
        with pytest.raises(Cancelled):
            await job.wait()
        assert session.keep == world.mount("s").rules == ()
        assert world.mount("s").committed == ()


async def test_a_commit_that_cannot_be_recorded_is_taken_away(world: World) -> None:
    """The worker is told by the rules of before that it does not count."""
    async with world.manager(keeping(world, *RULES)) as manager:
        session = await create(manager)
        mount = world.mount("s")
        told: list[tuple[str, ...]] = []

        def full(record: SessionRecord) -> None:
            raise NoSpace("full")

        async def keep(rules: tuple[str, ...]) -> None:
            told.append(rules)

        mount.keep = keep  # type: ignore[method-assign]
        session.services.store.write = full  # type: ignore[method-assign]
        with pytest.raises(NoSpace):
            await session.commit(["/file"], started_by=UID).wait()
        del session.services.store.write
        assert told == [RULES]
        assert session.keep == RULES


async def test_uncommit(world: World) -> None:
    """The session goes on with what it shows; the reset ends that, and nothing is deleted."""
    async with world.manager(keeping(world, "/data")) as manager:
        session = await create(manager)
        await session.commit(["/etc/a*b", "/etc/c"], started_by=UID).wait()
        await session.uncommit(["/etc/a*b"])
        assert set(session.keep) == {"/data", "/etc/a[*]b", "/etc/c"}
        assert [one.path for one in await session.committed()] == ["/etc/c"]
        await session.reset(started_by=UID).wait()
        assert session.keep == world.mount("s").rules == ("/data", "/etc/c")
        await session.uncommit(["/etc/c"])
        await manager.close("s")
        assert (await create(manager, "other")).keep == ("/data",)
        assert world.mount("s").discarded == world.mount("other").discarded == ()


async def test_uncommit_deletes_what_nobody_sees_any_more(world: World) -> None:
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        await session.commit(["/a", "/b", "/c", "/d"], started_by=UID).wait()
        await session.uncommit(["/a", "/b", "/c"], delete=True)
        await session.commit(["/b"], started_by=UID).wait()  # wanted after all
        assert world.mount("s").discarded == ()
        await session.reset(started_by=UID).wait()
        assert world.mount("s").discarded == ("/a", "/c")
        await session.reset(started_by=UID).wait()
        assert world.mount("s").discarded == ("/a", "/c")
        await session.uncommit(["/b", "/d"], delete=True)
        await session.set_keep(["/d"])
        await session.reset(started_by=UID).wait()
        assert world.mount("s").discarded == ("/a", "/c", "/b")
        await session.set_keep([])
        await session.reset(started_by=UID).wait()
        assert world.mount("s").discarded == ("/a", "/c", "/b")


async def test_what_is_to_be_deleted_is_so_in_the_next_session(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        await session.commit(["/a"], started_by=UID).wait()
        await session.uncommit(["/a"], delete=True)
        await manager.close("s")
        world.mounter.injected["discard"] = [Failed("the disk is broken")]
        await create(manager, "other")
        expect_log("What was uncommitted in session other is there still: the disk is broken")
        assert world.mount("other").discarded == ()
        await manager.close("other")
        await create(manager, "third")
        assert world.mount("third").discarded == ("/a",)


@pytest.mark.parametrize(
    ("paths", "delete", "reason"),
    [
        ([], False, "name the paths"),
        (["/other"], False, r"/other was not committed\. What was: /a, /data/b\."),
        (["/a/below"], False, "/a/below was not committed"),
        (["/data/b"], True, "/data/b cannot be deleted: it is kept by another rule"),
    ],
)
async def test_what_cannot_be_uncommitted(
    world: World, paths: list[str], delete: bool, reason: str
) -> None:
    async with world.manager(keeping(world, "/data")) as manager:
        session = await create(manager)
        await session.commit(["/a", "/data/b"], started_by=UID).wait()
        with pytest.raises(InvalidOption, match=reason):
            await session.uncommit(paths, delete=delete)
        assert session.keep == ("/data", "/a", "/data/b")


async def test_an_uncommit_that_cannot_be_recorded_changes_nothing(world: World) -> None:
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        await session.commit(["/a"], started_by=UID).wait()
        before = session.record
        (kept(world) / "committed.json").write_text("damaged")
        with pytest.raises(Failed, match="makes no sense"):
            await session.uncommit(["/a"])
        assert session.record == before
        with pytest.raises(Failed, match="makes no sense"):
            await session.commit(["/b"], started_by=UID).wait()
        assert session.keep == ("/a",)
        (kept(world) / "committed.json").unlink()


async def test_how_much_was_committed(world: World) -> None:
    """No symlink leads outside, whoever has put it there."""
    async with world.manager(keeping(world)) as manager:
        session = await create(manager)
        await session.commit(["/a", "/b/c/d", "/gone"], started_by=UID).wait()
        fs = kept(world) / "fs"
        (fs / "a/b").mkdir(parents=True)
        (fs / "a/b/file").write_bytes(b"x" * 50_000)
        (fs / "a/link").symlink_to("/usr")
        (fs / "b").symlink_to("/usr")
        sizes = {one.path: one.bytes for one in await session.committed()}
        assert 50_000 <= sizes.pop("/a") < 100_000
        assert sizes == {"/b/c/d": 0, "/gone": 0}


# What one reset keeps


PARTLY = Manner(keep=("/new",))


async def test_a_reset_that_leaves_something(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await world.mount("s").write("new", b"kept")
        await world.mount("s").write("lost", b"lost")
        began = session.record.began
        await session.reset(started_by=UID, manner=PARTLY).wait()
        upper = world.mount("s").stack.upper.fs
        assert {path.name: path.read_bytes() for path in upper.iterdir()} == {"new": b"kept"}
        assert world.mount("s").frozen_times == 1
        assert session.last_reset is not None
        assert session.record.began == began, "or who uses it could make it last for ever"
        await session.reset(started_by=UID).wait()
        assert session.record.began != began


@pytest.mark.parametrize("fault", [NoSpace("It is full."), Failed("The worker is gone.")])
@pytest.mark.parametrize("call", ["retain", "swap"])
async def test_if_it_cannot_all_is_as_before(world: World, call: str, fault: SessiondError) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await world.mount("s").write("new", b"kept")
        await world.mount("s").write("other", b"not lost")
        before = session.record
        world.mounter.injected[call] = [fault]
        with pytest.raises(type(fault)) as failed:
            await session.reset(started_by=UID, manner=PARTLY).wait()
        if call == "retain" and isinstance(fault, NoSpace):
            assert "no space in session s to keep /new over the reset" in str(failed.value)
        assert session.record.layers == before.layers
        assert session.record.upper == before.upper
        upper = world.mount("s").stack.upper.fs
        assert {path.name for path in upper.iterdir()} == {"new", "other"}
        await until(lambda: len(world.layers(world.storage("s"))) == 1)


async def test_a_session_that_is_not_mounted_keeps_nothing(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.view.unmount()
        with pytest.raises(Failed, match="is not mounted"):
            await session.reset(started_by=UID, manner=PARTLY).wait()
        await session.reset(started_by=UID).wait()


async def test_it_can_be_cancelled_while_it_is_copied(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await world.mount("s").write("new", b"kept")
        before = session.record

        async def retain(*_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(world.mount("s"), "retain", retain)
        job = session.reset(started_by=UID, manner=PARTLY)
        await until(lambda: len(world.layers(world.storage("s"))) == 2)
        job.cancel()
        with pytest.raises(Cancelled):
            await job.wait()
        assert session.record.upper == before.upper
        await world.mount("s").write("later", b"")


async def test_a_reset_that_is_due_is_not_put_off_by_it(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        clock = session.services.surroundings.clock
        before = session.record.model_copy(update={"reset_rules": ResetRules(after=3600)})
        now = Instant.now(clock)
        (due,) = schedule.due(before, clock, None)
        (still,) = schedule.due(before.reset(now, partly=True), clock, None)
        assert still.of == due.of, "or it would be announced anew"
        assert still.at == pytest.approx(due.at, abs=1)
        (later,) = schedule.due(before.reset(now), clock, None)
        assert later.of != due.of


async def test_a_snapshot_is_made_of_all(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await world.mount("s").write("lost", b"lost")
        manner = Manner(keep=("/new",), snapshot=SnapshotName("before"))
        await session.reset(started_by=UID, manner=manner).wait()
        (layer,) = session.snapshots["before"].layers
        assert (world.storage("s") / "layers" / str(layer) / "fs/lost").exists()


async def test_a_scheduled_one_keeps_it_over_a_restart(world: World) -> None:
    async with world.manager(world.config()) as manager:
        session = await manager.create(USER, "lasting", session_id="s")
        await session.timer.schedule(Uid(UID), after=3600, manner=PARTLY)
    async with world.manager() as manager:
        scheduled = manager.get("s").record.scheduled
        assert scheduled is not None
        assert scheduled.manner.keep == ("/new",)
